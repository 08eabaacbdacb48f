"""`Engine`: a loaded engine directory that turns token ids into logits, and prompts into completions.

    engine = Engine.load("engine-dir")
    for completion in engine.generate([engine.text.chat("x1 = 3 x2 = 5 ?")]):
        print(engine.text.decode(completion.output_ids))

Prompts are prefilled in pieces of at most max_input_len tokens (scheduling: it changes no result), then decoded one token a step through
the KV cache. Rows of a batch may have any lengths. The same Python runs every backend; `engines.Runner` is the seam.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from trtllm_thoughtx.config import BuildConfig, ModelConfig
from trtllm_thoughtx.engine_dir import EngineDir
from trtllm_thoughtx.engines import Runner, open_runner
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.runtime.batch import Batch
from trtllm_thoughtx.runtime.sampling import GenerationParams, Sampler, log_probability
from trtllm_thoughtx.runtime.text import Text

OnToken = Callable[[int, int], None]  # (index of the prompt, token id)


@dataclass(frozen=True)
class Completion:
    """One answer. `stop_reason` is eos | stop | length (max_new_tokens) | capacity (the engine's max_seq_len);
    `logits` float32 [new tokens, vocab], those that each token was picked from, and `logprobs` (natural, temperature 1), when asked for."""

    output_ids: list[int]
    stop_reason: str
    num_prompt_tokens: int
    chunk_size: int | None
    logits: np.ndarray | None = None
    logprobs: list[float] | None = None


@dataclass
class Stats:
    """Wall-clock of the last `generate`, summed over its batches."""

    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    num_prefilled: int = 0
    num_decoded: int = 0  # tokens that came from decode steps: all but each row's first


@dataclass
class Engine:
    """Use `Engine.load`. Not for several threads at once: it owns one KV cache."""

    directory: EngineDir
    backend: str
    runner: Runner
    text: Text | None
    stats: Stats = field(default_factory=Stats)

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
        """Check the files against the manifest, then load them. E120 when they differ, E201/E202 when the backend cannot run here.

        `exact`: a quantized graph runs on onnxruntime as it stands, not on that runtime's faster operators.
        """
        directory = EngineDir.open(Path(engine_dir))
        backend = directory.choose(backend)
        directory.verify(backend)
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
    def tokenizer(self) -> Text | None:
        return self.text

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
        first = self._prefill(batch, [list(row[:n]) for row, n in zip(ids, num_prompt, strict=True)])
        logits = [[row] for row in first]
        for step in range(max(len(row) - n for row, n in zip(ids, num_prompt, strict=True))):
            new = [list(row[n + step : n + step + 1]) for row, n in zip(ids, num_prompt, strict=True)]
            out = self._step(batch, new, [[0]] * len(new))[:, 0]
            for row, token, value in zip(logits, new, out, strict=True):
                if token:
                    row.append(value)
        return [np.stack(row) for row in logits]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: GenerationParams | None = None,
        on_token: OnToken | None = None,
        *,
        return_logits: bool = False,
        return_logprobs: bool = False,
        chunk_size: int | None = None,
        streams: Sequence[int] | None = None,
    ) -> list[Completion]:
        """Complete every prompt, at most max_batch_size at a time. `params` None: the checkpoint's generation_config, or greedy.

        Sampling depends on the seed, the prompt's stream (default: its place in `prompts`) and the step, not on how prompts share
        a batch.
        """
        params = params or (self.text.default_params() if self.text else GenerationParams())
        self.stats = Stats()
        size = self.build.max_batch_size
        done: list[Completion] = []
        numbers = range(len(prompts)) if streams is None else streams
        wants = (return_logits, return_logprobs)
        for start in range(0, len(prompts), size):
            part = slice(start, start + size)
            done += self._complete(prompts[part], start, numbers[part], params, on_token, wants, chunk_size)
        return done

    def _complete(
        self,
        prompts: Sequence[Sequence[int]],
        first_row: int,
        streams: Sequence[int],
        params: GenerationParams,
        on_token: OnToken | None,
        wants: tuple[bool, bool],
        chunk_size: int | None,
    ) -> list[Completion]:
        began = time.perf_counter()
        batch = self._start(prompts, chunk_size)
        logits = self._prefill(batch, [list(row) for row in prompts])
        prefilled = time.perf_counter()
        sampler = Sampler(params, len(prompts), streams=streams)
        eos_ids = frozenset() if params.ignore_eos or not self.text else frozenset(self.text.eos_ids)
        output: list[list[int]] = [[] for _ in prompts]
        kept: list[list[np.ndarray]] = [[] for _ in prompts]
        logprobs: list[list[float]] = [[] for _ in prompts]
        reasons: list[str | None] = [None if params.max_new_tokens else "length" for _ in prompts]
        while None in reasons:
            picked = sampler.pick(logits)
            new: list[list[int]] = [[] for _ in prompts]
            for row, token in enumerate(picked.tolist()):
                if reasons[row] is not None:
                    continue
                output[row].append(token)
                if wants[0]:
                    kept[row].append(logits[row])
                if wants[1]:
                    logprobs[row].append(log_probability(logits[row], token))
                if on_token:
                    on_token(first_row + row, token)
                reasons[row] = self._reason(token, len(output[row]), len(prompts[row]), params, eos_ids)
                if reasons[row] is None:
                    new[row] = [token]
            if None not in reasons:
                break
            logits = self._step(batch, new, [[0]] * len(new))[:, 0]
            self.stats.num_decoded += sum(map(len, new))
        self.stats.prefill_seconds += prefilled - began
        self.stats.decode_seconds += time.perf_counter() - prefilled
        self.stats.num_prefilled += sum(map(len, prompts))
        used = None if batch.chunk_size is None else int(batch.chunk_size[0])
        return [
            Completion(ids, str(reason), len(prompt), used, np.stack(rows) if rows else None, logs if wants[1] else None)
            for ids, reason, prompt, rows, logs in zip(output, reasons, prompts, kept, logprobs, strict=True)
        ]

    def _reason(self, token: int, num_new: int, num_prompt: int, params: GenerationParams, eos_ids: frozenset[int]) -> str | None:
        if token in eos_ids:
            return "eos"
        if token in params.stops:
            return "stop"
        if num_new >= params.max_new_tokens:
            return "length"
        return "capacity" if num_prompt + num_new >= self.build.max_seq_len else None

    def _start(self, rows: Sequence[Sequence[int]], chunk_size: int | None) -> Batch:
        self._check(rows, chunk_size)
        chunk = None
        if self.build.use_chunked_attention:
            chunk = np.full(len(rows), chunk_size or self.build.chunk_size, np.int64)
        self.runner.start(len(rows))
        return Batch(len(rows), self.build, chunk)

    def _check(self, rows: Sequence[Sequence[int]], chunk_size: int | None) -> None:
        build, vocab = self.build, self.config.vocab_size
        problem = None
        if not 1 <= len(rows) <= build.max_batch_size:
            problem = f"a batch of {len(rows)}; the engine takes 1 to {build.max_batch_size}"
        elif chunk_size is not None and not build.use_chunked_attention:
            problem = "a chunk size was given, and the engine was built without chunked attention"
        elif chunk_size is not None and chunk_size < 1:
            problem = f"chunk size {chunk_size}; it must be at least 1"
        elif chunk_size is not None and build.is_bounded and chunk_size > build.max_chunk_size:
            problem = f"chunk size {chunk_size}; the engine's KV cache was sized for {build.max_chunk_size} (--max_chunk_size)"
        for index, row in enumerate(rows):
            if problem:
                break
            wrong = [t for t in row if not 0 <= t < vocab]
            if not row:
                problem = f"prompt {index} is empty"
            elif len(row) > build.max_seq_len:
                problem = f"prompt {index} has {len(row)} tokens; the engine's max_seq_len is {build.max_seq_len}"
            elif wrong:
                problem = f"prompt {index} has token id {wrong[0]}; the vocabulary has {vocab}"
        if problem:
            raise ThoughtxError(
                "E122",
                "the request does not fit the engine",
                where=str(self.directory.root),
                why=problem,
                fix="change the request, or build an engine with other limits (thoughtx-build --help)",
            )

    def _step(self, batch: Batch, new: list[list[int]], logit_rows: list[list[int]]) -> np.ndarray:
        """One call of the runner, after those that keep what the next chunk still needs; logits [B, K, vocab]."""
        for feeds in batch.upkeep(new):
            self.runner.step(feeds)
        return self.runner.step(batch.feed(new, logit_rows))

    def _prefill(self, batch: Batch, rows: list[list[int]]) -> np.ndarray:
        """Feed whole rows; float32 logits [B, vocab] of each row's last token."""
        logits = np.zeros((len(rows), self.config.vocab_size), np.float32)
        done = [0] * len(rows)
        while any(at < len(row) for at, row in zip(done, rows, strict=True)):
            new = batch.cut([row[at:] for at, row in zip(done, rows, strict=True)], self.build.max_input_len)
            out = self._step(batch, new, [[max(len(x) - 1, 0)] for x in new])[:, 0]
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
