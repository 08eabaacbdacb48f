"""`Session`: a loaded model and its KV cache. Generation, drafts, probes and forward passes all feed tokens through it.

`start` begins a batch, `step` is one call of the model, `extend` feeds any number of tokens in prefill segments of at most
max_input_len. All work is counted here. The same Python runs every backend; `backends.Runner` is the seam.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from trtllm_thoughtx.backends import Runner
from trtllm_thoughtx.build.engine_dir import EngineDir
from trtllm_thoughtx.config import BuildConfig, ModelConfig
from trtllm_thoughtx.errors import ThoughtxError, shown
from trtllm_thoughtx.families.size import matrix_bytes
from trtllm_thoughtx.runtime.adapters import Matrices
from trtllm_thoughtx.runtime.batch import Batch
from trtllm_thoughtx.runtime.completion import Stats
from trtllm_thoughtx.runtime.pace import Pace


@dataclass
class Session:
    """Has one KV cache, whose rows are those of the last batch: not for several threads at once."""

    directory: EngineDir
    runner: Runner
    stats: Stats = field(default_factory=Stats)
    pace: Pace = field(default_factory=Pace)  # of drafts
    adapters: dict[str, Matrices] = field(default_factory=dict)  # that rows may have, by name
    adapter: str | None = None  # that rows of a batch begin with

    @property
    def config(self) -> ModelConfig:
        return self.directory.config

    @property
    def build(self) -> BuildConfig:
        return self.directory.build

    @functools.cached_property
    def part_bytes(self) -> list[int]:
        """Of the matrices of each part of the graph, exit head and draft adapters included, as `Work.weight_bytes` counts them."""
        item, found = 4 if self.build.dtype == "float32" else 2, []
        for part in self.directory.parts:
            num_bytes = matrix_bytes(self.config, part.first_layer, part.last_layer, item, head=part.head)
            if part.head:
                num_bytes += 2 * self.build.exit_head * self.config.hidden_size * item
            if part.last_layer in self.build.draft_layers:
                num_bytes += self.directory.adapter_weights(part.last_layer) * item
            found.append(num_bytes)
        return found

    def start(self, rows: Sequence[Sequence[int]], chunk_size: int | None) -> Batch:
        """An empty batch for these rows, once they are found to fit (else E122)."""
        self.check_chunk_size(chunk_size)
        for index, row in enumerate(rows):
            self.check_prompt(index, row)
        return self.begin(len(rows), chunk_size)

    def begin(self, num_rows: int, chunk_size: int | None = None) -> Batch:
        """A batch of empty rows. E122 for more than the engine takes."""
        if not 1 <= num_rows <= self.build.max_batch_size:
            raise self._unfit(f"a batch of {num_rows}; the engine takes 1 to {self.build.max_batch_size}")
        chunk = np.full(num_rows, chunk_size or self.build.chunk_size, np.int64) if self.build.use_chunked_attention else None
        self.runner.start(num_rows)
        for row in range(num_rows if self.adapter is not None else 0):
            self.wear(row, self.adapter)
        return Batch(num_rows, self.build, chunk)

    def wear(self, row: int, adapter: str | None) -> None:
        """The row is the base model (None), or has an adapter."""
        if self.build.max_lora_rank:
            self.runner.set_adapter(row, {} if adapter is None else self.adapters[adapter])

    def check_adapter(self, adapter: str | None) -> None:
        """E122 for one that is not loaded."""
        if adapter is not None and adapter not in self.adapters:
            raise self._unfit(f"there is no adapter {shown(adapter, 80)}; loaded are {', '.join(self.adapters) or 'none'}")

    def check_prompt(self, index: int, ids: Sequence[int]) -> None:
        """E122 for one that does not fit."""
        if (what := self.problem(ids)) is not None:
            raise self._unfit(f"prompt {index} {what}")

    def problem(self, ids: Sequence[int]) -> str | None:
        """Why a prompt does not fit this engine, None when it does."""
        wrong = next((t for t in ids if not 0 <= t < self.config.vocab_size), None)
        if not ids:
            return "is empty"
        if len(ids) > self.build.max_seq_len:
            return f"has {len(ids)} tokens; the engine's max_seq_len is {self.build.max_seq_len}"
        return None if wrong is None else f"has token id {wrong}; the vocabulary has {self.config.vocab_size}"

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
            problem = (
                f"chunk size {chunk_size}; the engine's KV cache was sized for {build.max_chunk_size} (thoughtx-build --max_chunk_size)"
            )
        if problem:
            raise self._unfit(problem)

    def _unfit(self, why: str) -> ThoughtxError:
        what, fix = (
            "the request does not fit the engine",
            "change the request, or build an engine with other limits (thoughtx-build --help)",
        )
        return ThoughtxError("E122", what, where=str(self.directory.root), why=why, fix=fix)

    def step(self, batch: Batch, new: list[list[int]], logit_rows: list[list[int]]) -> np.ndarray:
        """Logits [B, K, vocab] of `call`."""
        return self.call(batch, new, logit_rows)[0]

    def call(self, batch: Batch, new: list[list[int]], logit_rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        """One call of all parts, after those that keep what the next chunk still needs; logits [B, K, vocab], and what an exit head says
        there, [B, K, 2], zeros without one."""
        self.upkeep(batch, new)
        counts, rows = list(map(len, new)), list(map(len, logit_rows))
        out = self.run_parts(batch, batch.feed(new, logit_rows), 0, len(self.directory.parts), counts, rows)
        logits = out["logits"]
        return logits, out["exit"] if "exit" in out else np.zeros((*logits.shape[:2], 2), np.float32)

    def upkeep(self, batch: Batch, new: Sequence[Sequence[int]]) -> None:
        """The calls that must come before `new` is fed: see `Batch.upkeep`."""
        for row in range(len(new)):
            for alone, feeds in batch.upkeep(row):
                self.run_parts(alone, feeds, 0, len(self.directory.parts), [0], [0])
                self.stats.work.num_layer_tokens += feeds["positions"].shape[1] * self.config.num_layers

    def run_parts(
        self, batch: Batch, feeds: Mapping[str, np.ndarray], first: int, last: int, num_tokens: Sequence[int], num_rows: Sequence[int]
    ) -> dict[str, np.ndarray]:
        """`Runner.run`, with its work counted: `num_tokens` and `num_rows` (of logits) of each row."""
        parts = self.directory.parts[first:last]
        num_layers = parts[-1].last_layer - parts[0].first_layer
        for row, number in enumerate(num_tokens):
            batch.layer_tokens[row] += number * num_layers
        self.stats.work.add(num_layers, sum(num_tokens), sum(num_rows), sum(self.part_bytes[first:last]))
        return self.runner.run(feeds, first, last, batch.first)

    def extend(self, batch: Batch, tokens: Sequence[int]) -> np.ndarray:
        """Feed the one row tokens, in as many calls as they take; float32 logits [vocab] of the last of them."""
        for num in batch.segments(len(tokens), self.build.max_input_len):
            fed, tokens = list(tokens[:num]), tokens[num:]
            logits = self.step(batch, [fed], [[num - 1]])[0, 0]
        return logits

    def forward(
        self, batch: Batch, rows: Sequence[Sequence[int]], max_segment: int | None
    ) -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
        """Feed whole rows, one after the other, in segments of at most `max_segment` tokens. Of every position of each row: float32 logits
        [length, vocab], and hidden states [length, H] by layer (0: embedding) and row, where the runner taps them."""
        most = min(max_segment or self.build.max_input_len, self.build.max_input_len, self.runner.max_logit_rows)
        logits, layers = list[np.ndarray](), list[list[np.ndarray]]()
        for row, tokens in enumerate(rows):
            alone, found, hidden = batch.view(row, row + 1), list[np.ndarray](), list[list[np.ndarray]]()
            for num in alone.segments(len(tokens), most):
                first = len(alone.tokens[0])
                found.append(self.step(alone, [list(tokens[first : first + num])], [list(range(num))])[0])
                hidden.append([states.reshape(num, -1).astype(np.float32) for _, states in sorted(self.runner.tapped.items())])
            logits.append(np.concatenate(found))
            layers.append([np.concatenate(segments) for segments in zip(*hidden, strict=True)])
        return logits, [list(layer) for layer in zip(*layers, strict=True)]
