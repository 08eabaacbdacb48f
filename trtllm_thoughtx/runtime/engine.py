"""`Engine`: a loaded engine directory that turns token ids into logits, and prompts into completions.

    engine = Engine.load("engine-dir")
    for completion in engine.generate([engine.text.chat("x1 = 3 x2 = 5 ?")]):
        print(engine.text.decode(completion.output_ids))

Prompts are prefilled in pieces of at most max_input_len tokens (scheduling: it changes no result), then decoded one token a step through
the KV cache. Rows of a batch may have any lengths. The same Python runs every backend; `engines.Runner` is the seam.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trtllm_thoughtx.backends import Runner, open_runner
from trtllm_thoughtx.build.engine_dir import EngineDir
from trtllm_thoughtx.checkpoint.generation_config import read_generation_config
from trtllm_thoughtx.config import BuildConfig, ModelConfig
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.runtime import chunks
from trtllm_thoughtx.runtime.batch import Batch
from trtllm_thoughtx.runtime.chunks import AUTO, Choice
from trtllm_thoughtx.runtime.completion import Completion, Stats, Work, matrix_bytes
from trtllm_thoughtx.runtime.drafts import Pace
from trtllm_thoughtx.runtime.generation import Generation, OnToken
from trtllm_thoughtx.runtime.sampling import GenerationParams, token_ids
from trtllm_thoughtx.text.text import Text

__all__ = ["Completion", "Engine", "Stats", "Work"]
STREAMS_APART = 1 << 40  # the random streams of a prompt's several answers: no request has so many prompts


@dataclass
class Engine:
    """Use `Engine.load`. Not for several threads at once: it owns one KV cache."""

    directory: EngineDir
    backend: str
    runner: Runner
    text: Text | None
    stats: Stats = field(default_factory=Stats)
    paces: dict[int, Pace] = field(default_factory=dict)  # by batch size

    @classmethod
    def load(
        cls,
        engine_dir: Path | str,
        backend: str | None = None,
        num_threads: int | None = None,
        *,
        tap_layers: bool = False,
        exact: bool = False,
    ) -> Engine:
        """Check every file against the manifest, then load them. E120 when they differ, E201/E202 when the backend cannot run here.

        `exact`: a quantized graph runs on onnxruntime as it stands, not on that runtime's faster operators.
        """
        directory = EngineDir.open(Path(engine_dir))
        backend = directory.choose(backend)
        directory.verify()
        text = Text.load(directory.root)
        if text is not None:
            text.check_vocab(directory.config.vocab_size)
        runner = open_runner(
            directory.root,
            directory.parts,
            backend,
            directory.config,
            directory.build,
            num_threads=num_threads,
            tap_layers=tap_layers,
            exact=exact,
        )
        return cls(directory, backend, runner, text)

    @property
    def config(self) -> ModelConfig:
        return self.directory.config

    @property
    def build(self) -> BuildConfig:
        return self.directory.build

    @property
    def is_exact(self) -> bool:
        """Whether quantized products are the graph's own, or a faster operator's that rounds a little more."""
        return self.runner.is_exact

    @functools.cached_property
    def generation_config(self) -> dict[str, Any]:
        return self.text.generation_config if self.text else read_generation_config(self.directory.root)

    @functools.cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """What ends an answer; without a tokenizer only what the settings of generation name."""
        return self.text.eos_ids if self.text else tuple(sorted(set(token_ids(self.generation_config, "eos_token_id"))))

    def default_params(self, **overrides: Any) -> GenerationParams:
        """The checkpoint's settings with `overrides` (None: keep)."""
        if self.text is not None:
            return self.text.default_params(**overrides)
        return GenerationParams.from_generation_config(self.generation_config, **overrides)

    @functools.cached_property
    def part_bytes(self) -> list[int]:
        """Of the matrices of each part of the graph, as `Work.weight_bytes` counts them."""
        item = 4 if self.build.dtype == "float32" else 2
        rows = ((part.first_layer, part.last_layer, part.head) for part in self.directory.parts)
        return [matrix_bytes(self.config, first, last, item, head=head) for first, last, head in rows]

    def close(self) -> None:
        self.runner.close()

    def forward(self, ids: Sequence[Sequence[int]], *, chunk_size: int | None = None, piece: int | None = None) -> list[np.ndarray]:
        """Prefill ragged rows, `piece` tokens a call; float32 logits [length, vocab] of every position of each row."""
        return self._forward(ids, chunk_size, piece)[0]

    def forward_layers(
        self, ids: Sequence[Sequence[int]], *, chunk_size: int | None = None, piece: int | None = None
    ) -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
        """`forward`, and hidden states by layer (0: embedding, i: after layer i) and row, float32 [length, hidden].

        Needs `Engine.load(..., tap_layers=True)`.
        """
        return self._forward(ids, chunk_size, piece)

    def decode_logits(self, ids: Sequence[Sequence[int]], num_prompt: Sequence[int], *, chunk_size: int | None = None) -> list[np.ndarray]:
        """Teacher-forced decoding: prefill the first `num_prompt[b]` tokens of each row, then feed one token a step.

        Returns float32 logits [length - num_prompt + 1, vocab] per row, for positions num_prompt-1 .. length-1.
        """
        batch = self._start(ids, chunk_size)
        first = self.prefill(batch, [list(row[:n]) for row, n in zip(ids, num_prompt, strict=True)])
        logits = [[row] for row in first]
        for step in range(max(len(row) - n for row, n in zip(ids, num_prompt, strict=True))):
            new = [list(row[n + step : n + step + 1]) for row, n in zip(ids, num_prompt, strict=True)]
            out = self.step(batch, new, [[0]] * len(new))[:, 0]
            for row, token, value in zip(logits, new, out, strict=True):
                if token:
                    row.append(value)
        return [np.stack(row) for row in logits]

    def complexity(self, prompts: Sequence[Sequence[int]]) -> list[float]:
        """Mean entropy, in nats, of what the model expects after the tokens of each prompt; see `chunks`."""
        found: list[float] = []
        for start in range(0, len(prompts), self.build.max_batch_size):
            rows = [list(row) for row in prompts[start : start + self.build.max_batch_size]]
            found += self._complexity(self._start(rows, self.build.max_chunk_size or None), rows)
        return found

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: GenerationParams | Sequence[GenerationParams] | None = None,
        on_token: OnToken | None = None,
        *,
        return_logits: bool = False,
        return_logprobs: bool = False,
        chunk_size: int | str | None = None,
        streams: Sequence[int] | None = None,
    ) -> list[Completion]:
        """Complete every prompt, at most max_batch_size at a time. `params`: for all, or one for each prompt; None: the checkpoint's
        generation_config, or greedy.
        `chunk_size`: tokens, "auto" (each prompt gets one from its complexity), or None: as the engine was built.

        Sampling depends on the seed, the prompt's stream (default: its place in `prompts`) and the step, not on how prompts share
        a batch. A prompt with num_return_sequences above 1 gives so many completions, one behind the other, the first of them the one
        that it gives alone; `on_token` counts completions.
        """
        if params is None:
            params = self.default_params()
        each = [params] * len(prompts) if isinstance(params, GenerationParams) else list(params)
        if len(each) != len(prompts):
            raise ValueError(f"{len(each)} settings for {len(prompts)} prompts")
        numbers = range(len(prompts)) if streams is None else streams
        places = [(i, k) for i, one in enumerate(each) for k in range(one.num_return_sequences)]
        prompts, each, numbers = (
            [prompts[i] for i, _ in places],
            [each[i] for i, _ in places],
            [numbers[i] + k * STREAMS_APART for i, k in places],
        )
        self.stats = Stats()
        size = self.build.max_batch_size
        done: list[Completion] = []
        wants = (return_logits, return_logprobs)
        for start in range(0, len(prompts), size):
            part = slice(start, start + size)
            done += Generation(self, prompts[part], start, numbers[part], each[part], on_token, wants, chunk_size).run()
        return [one if k == 0 else dataclasses.replace(one, index=k) for one, (_, k) in zip(done, places, strict=True)]

    def choose(self, prompts: Sequence[Sequence[int]], chunk_size: int | str | None) -> tuple[Batch, Sequence[Choice | None]]:
        """The batch, and the chunks of each row (None: full attention)."""
        rows = [list(row) for row in prompts]
        if chunk_size != AUTO and (chunk_size is not None or not self.build.adaptive_chunks):
            assert not isinstance(chunk_size, str)
            batch = self._start(prompts, chunk_size)
            return batch, [None] * len(rows) if batch.chunk_size is None else [Choice(int(size)) for size in batch.chunk_size]
        if not self.build.base_size:
            why = "the engine was built without tokens of chunk per nat (thoughtx-build --base_size), so it cannot choose"
            fix = "name a chunk size, or build with the settings that thoughtx-calibrate --chunk_report writes (build.yaml)"
            raise ThoughtxError("E122", "no chunk size can be chosen", where=str(self.directory.root), why=why, fix=fix)
        batch = self._start(prompts, self.build.max_chunk_size)
        assert batch.chunk_size is not None
        choices = [chunks.choose(nats, self.build) for nats in self._complexity(batch, rows)]
        for row, choice in enumerate(choices):
            kept = min(len(rows[row]) - 1, choice.chunk_size, len(batch.tokens[row]))
            self.stats.num_read_again += len(batch.tokens[row]) - kept
            batch.chunk_size[row] = choice.chunk_size
            batch.forget(row, kept)
        return batch, choices

    def _complexity(self, batch: Batch, rows: list[list[int]]) -> list[float]:
        """Feed the first chunk of each row at most; the mean entropy, in nats, of what the model expects after its tokens."""
        heads = [row[: self.build.max_chunk_size or None] for row in rows]
        sums, done = [0.0] * len(rows), [0] * len(rows)
        most = min(chunks.NUM_ROWS, self.runner.max_logit_rows)
        while any(at < len(head) for at, head in zip(done, heads, strict=True)):
            new = batch.cut([head[at:] for at, head in zip(done, heads, strict=True)], self.build.max_input_len)
            places = [chunks.spread(max(1, len(extra)), min(most, max(map(len, new)))) for extra in new]
            out = chunks.entropy(self.step(batch, new, places))
            for row, extra in enumerate(new):
                done[row] += len(extra)
                if extra:
                    sums[row] += len(extra) * float(out[row, np.unique(places[row], return_index=True)[1]].mean())
        return [total / len(head) for total, head in zip(sums, heads, strict=True)]

    def _start(self, rows: Sequence[Sequence[int]], chunk_size: int | None) -> Batch:
        self._check(rows, chunk_size)
        chunk = None
        if self.build.use_chunked_attention:
            chunk = np.full(len(rows), chunk_size or self.build.chunk_size, np.int64)
        self.runner.start(len(rows))
        return Batch(len(rows), self.build, chunk)

    def problem(self, ids: Sequence[int]) -> str | None:
        """Why a prompt does not fit this engine, None when it does."""
        wrong = next((t for t in ids if not 0 <= t < self.config.vocab_size), None)
        if not ids:
            return "is empty"
        if len(ids) > self.build.max_seq_len:
            return f"has {len(ids)} tokens; the engine's max_seq_len is {self.build.max_seq_len}"
        return None if wrong is None else f"has token id {wrong}; the vocabulary has {self.config.vocab_size}"

    def _check(self, rows: Sequence[Sequence[int]], chunk_size: int | None) -> None:
        if not 1 <= len(rows) <= self.build.max_batch_size:
            raise self._unfit(f"a batch of {len(rows)}; the engine takes 1 to {self.build.max_batch_size}")
        self.check_chunk_size(chunk_size)
        found = (f"prompt {index} {what}" for index, row in enumerate(rows) if (what := self.problem(row)))
        if (problem := next(found, None)) is not None:
            raise self._unfit(problem)

    def check_chunk_size(self, chunk_size: int | str | None) -> None:
        """E122 for one that this engine cannot follow."""
        build, problem = self.build, None
        if chunk_size is None or isinstance(chunk_size, str):
            return
        if not build.use_chunked_attention:
            problem = "a chunk size was given, and the engine was built without chunked attention"
        elif chunk_size < 1:
            problem = f"chunk size {chunk_size}; it must be at least 1"
        elif build.is_bounded and chunk_size > build.max_chunk_size:
            problem = f"chunk size {chunk_size}; the engine's KV cache was sized for {build.max_chunk_size}"
        if problem:
            raise self._unfit(problem)

    def _unfit(self, why: str) -> ThoughtxError:
        what, fix = (
            "the request does not fit the engine",
            "change the request, or build an engine with other limits (thoughtx-build --help)",
        )
        return ThoughtxError("E122", what, where=str(self.directory.root), why=why, fix=fix)

    def step(self, batch: Batch, new: list[list[int]], logit_rows: list[list[int]]) -> np.ndarray:
        """One call of the runner, after those that keep what the next chunk still needs; logits [B, K, vocab]."""
        self.keep(batch, new)
        counts = list(map(len, new))
        rows = [len(wanted) if extra else 0 for wanted, extra in zip(logit_rows, new, strict=True)]
        out = self.run_parts(batch, batch.feed(new, logit_rows), 0, len(self.directory.parts), counts, rows)
        if "exit" in out:
            is_new = [bool(extra) for extra in new]
            batch.chances[is_new] = out["exit"][is_new, -1]
        return out["logits"]

    def keep(self, batch: Batch, new: Sequence[Sequence[int]]) -> None:
        """The calls that must come before `new` is fed: see `Batch.upkeep`."""
        for feeds in batch.upkeep(new):
            none = [0] * len(new)
            self.run_parts(batch, feeds, 0, len(self.directory.parts), none, none)
            self.stats.work.num_layer_tokens += feeds["positions"].shape[1] * self.config.num_layers  # at least one row's

    def run_parts(
        self, batch: Batch, feeds: Mapping[str, np.ndarray], first: int, last: int, num_tokens: Sequence[int], num_rows: Sequence[int]
    ) -> dict[str, np.ndarray]:
        """`Runner.run`, with its work counted: `num_tokens` and `num_rows` (of logits) of each row, padding left out."""
        parts = self.directory.parts[first:last]
        num_layers = parts[-1].last_layer - parts[0].first_layer
        item = 4 if self.build.dtype == "float32" else 2
        weight_bytes = sum(self.part_bytes[first:last])
        if parts[-1].head:
            weight_bytes += 2 * self.build.exit_head * self.config.hidden_size * item
        for part in parts:
            if part.last_layer in self.build.draft_layers:
                weight_bytes += self.directory.adapter_weights(part.last_layer) * item
        for row, number in enumerate(num_tokens):
            batch.layer_tokens[row] += number * num_layers
        self.stats.work.add(num_layers, sum(num_tokens), sum(num_rows), weight_bytes)
        return self.runner.run(feeds, first, last)

    def prefill(self, batch: Batch, rows: list[list[int]]) -> np.ndarray:
        """Feed the rest of whole rows; float32 logits [B, vocab] of each row's last token, which must not be fed yet."""
        return self.extend(batch, [row[len(fed) :] for fed, row in zip(batch.tokens, rows, strict=True)])

    def extend(self, batch: Batch, pending: Sequence[Sequence[int]]) -> np.ndarray:
        """Feed each row its tokens, in as many calls as they take; float32 logits [B, vocab] of the last of them, zeros without any."""
        logits = np.zeros((len(pending), self.config.vocab_size), np.float32)
        done = [0] * len(pending)
        while any(at < len(row) for at, row in zip(done, pending, strict=True)):
            new = batch.cut([row[at:] for at, row in zip(done, pending, strict=True)], self.build.max_input_len)
            out = self.step(batch, new, [[max(len(x) - 1, 0)] for x in new])[:, 0]
            for b, extra in enumerate(new):
                done[b] += len(extra)
                if extra:
                    logits[b] = out[b]
        return logits

    def _forward(
        self, ids: Sequence[Sequence[int]], chunk_size: int | None, piece: int | None
    ) -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
        piece = min(piece or self.build.max_input_len, self.build.max_input_len, self.runner.max_logit_rows)
        batch = self._start(ids, chunk_size)
        logits: list[list[np.ndarray]] = [[] for _ in ids]
        layers: list[list[list[np.ndarray]]] = []
        done = [0] * len(ids)
        while any(at < len(row) for at, row in zip(done, ids, strict=True)):
            new = batch.cut([row[at:] for at, row in zip(done, ids, strict=True)], piece)
            width = max(map(len, new))
            wanted = [[min(i, max(len(x) - 1, 0)) for i in range(width)] for x in new]
            for feeds in batch.upkeep(new):
                self.runner.step(feeds)
            feeds = batch.feed(new, wanted)
            out = self.runner.step(feeds)
            tapped = getattr(self.runner, "tapped", {})
            layers = layers or [[[] for _ in ids] for _ in tapped]
            for b, extra in enumerate(new):
                done[b] += len(extra)
                if not extra:
                    continue
                logits[b].append(out[b, : len(extra)])
                offset = int(feeds["logit_indices"][b, 0])
                for depth, layer in enumerate(sorted(tapped)):
                    shaped = tapped[layer].reshape(len(ids), width, -1)
                    layers[depth][b].append(shaped[b, offset : offset + len(extra)].astype(np.float32))
        return [np.concatenate(x) for x in logits], [[np.concatenate(x) for x in rows] for rows in layers]
