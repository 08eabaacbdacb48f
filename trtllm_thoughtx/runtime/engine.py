"""`Engine`: a loaded engine directory that turns token ids into logits, and prompts into completions.

    engine = Engine.load("engine-dir")
    for completion in engine.generate([engine.text.chat("x1 = 3 x2 = 5 ?")]):
        print(engine.text.decode(completion.output_ids))

Prompts come and go through the rows of one KV cache (`Generation`): each is prefilled in segments, then decoded one token a step with the
others that run. What runs underneath is a `Session`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trtllm_thoughtx.backends import BACKENDS, Runner, open_runner
from trtllm_thoughtx.backends.gpu import num_gpus
from trtllm_thoughtx.build.engine_dir import EngineDir
from trtllm_thoughtx.checkpoint.generation_config import read_generation_config
from trtllm_thoughtx.config import BuildConfig, ModelConfig
from trtllm_thoughtx.errors import ThoughtxError, shown
from trtllm_thoughtx.process.machine import release_freed
from trtllm_thoughtx.runtime import chunks
from trtllm_thoughtx.runtime.adapters import read_adapter
from trtllm_thoughtx.runtime.batch import Batch
from trtllm_thoughtx.runtime.completion import Completion, Stats
from trtllm_thoughtx.runtime.generation import Generation, OnToken
from trtllm_thoughtx.runtime.pace import Pace
from trtllm_thoughtx.runtime.row import STREAMS_APART, Request
from trtllm_thoughtx.runtime.session import Session
from trtllm_thoughtx.ship.signature import verify
from trtllm_thoughtx.text.params import GenerationParams, token_ids
from trtllm_thoughtx.text.text import Text


@dataclass
class Engine:
    """Use `Engine.load`. Not for several threads at once: it owns one KV cache."""

    session: Session
    backend: str
    text: Text | None

    @classmethod
    def load(
        cls,
        engine_dir: Path | str,
        backend: str | None = None,
        num_threads: int | None = None,
        *,
        tap_layers: bool = False,
        exact: bool = False,
        verify_key: Path | str | None = None,
    ) -> Engine:
        """Check every file against the manifest, then load them. E120 when they differ, E201/E202 when the backend cannot run here.

        `verify_key`: a public key (PEM) that must have signed the directory with thoughtx-sign or model-signing, else E124.
        `exact`: a quantized graph runs on onnxruntime as it stands, not on that runtime's faster operators.
        """
        directory = EngineDir.open(Path(engine_dir))
        backend = directory.choose(backend)
        verify(directory, verify_key)
        text = Text.load(directory.root, {})  # an engine's config.json holds no settings of generation
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
        release_freed()  # sessions pack their weights, and have copies of them until then: a third of the memory at this moment
        return cls(Session(directory, runner), backend, text)

    @property
    def directory(self) -> EngineDir:
        return self.session.directory

    @property
    def config(self) -> ModelConfig:
        return self.session.config

    @property
    def build(self) -> BuildConfig:
        return self.session.build

    @property
    def runner(self) -> Runner:
        return self.session.runner

    @property
    def overlooked(self) -> str | None:
        """What to tell who named no backend, where a GPU is visible and the directory has a plan that is not what runs."""
        plans = [name for name in self.directory.backends if BACKENDS[name].builds_plans]
        if BACKENDS[self.backend].builds_plans or not plans or not num_gpus():
            return None
        return f"a GPU is visible, and the engine has a plan for {plans[0]}; {self.backend} runs it unless --backend {plans[0]} is given"

    @property
    def stats(self) -> Stats:
        """Of the last `generate`; the work of any call that followed it is added."""
        return self.session.stats

    @property
    def pace(self) -> Pace:
        return self.session.pace

    @pace.setter
    def pace(self, pace: Pace) -> None:
        self.session.pace = pace

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

    def close(self) -> None:
        self.runner.close()

    def load_adapter(self, path: Path | str, name: str | None = None) -> str:
        """Read a PEFT directory, which requests may name from then on; its name, by default that of the directory. E122 for an engine that
        takes none, or one of a smaller rank; E103 for an adapter that has to be merged."""
        name = name or Path(path).resolve().name
        if name in self.session.adapters:
            why, fix = "requests may be using it", "give the new one another name"
            raise ThoughtxError("E001", f"there is an adapter {shown(name, 80)} already", where=shown(str(path)), why=why, fix=fix)
        self.session.adapters[name] = read_adapter(Path(path), self.directory)
        return name

    def forward(
        self,
        ids: Sequence[Sequence[int]],
        *,
        chunk_size: int | None = None,
        segment: int | None = None,
        adapters: Sequence[str | None] | None = None,
    ) -> list[np.ndarray]:
        """Read rows in segments of at most `segment` tokens; float32 logits [length, vocab] of every position of each row.

        `adapters`: of each row, by name; None: the base model."""
        return self.forward_layers(ids, chunk_size=chunk_size, segment=segment, adapters=adapters)[0]

    def forward_layers(
        self,
        ids: Sequence[Sequence[int]],
        *,
        chunk_size: int | None = None,
        segment: int | None = None,
        adapters: Sequence[str | None] | None = None,
    ) -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
        """`forward`, and hidden states by layer (0: embedding, i: after layer i) and row, float32 [length, hidden].

        Needs `Engine.load(..., tap_layers=True)`.
        """
        return self.session.forward(self._start(ids, chunk_size, adapters), ids, segment)

    def _start(self, ids: Sequence[Sequence[int]], chunk_size: int | None, adapters: Sequence[str | None] | None) -> Batch:
        batch = self.session.start(ids, chunk_size)
        for row, adapter in enumerate(adapters or ()):
            self.session.check_adapter(adapter)
            self.session.wear(row, adapter)
        return batch

    def decode_logits(
        self,
        ids: Sequence[Sequence[int]],
        num_prompt: Sequence[int],
        *,
        chunk_size: int | None = None,
        adapters: Sequence[str | None] | None = None,
    ) -> list[np.ndarray]:
        """Teacher-forced decoding: read the first `num_prompt[b]` tokens of each row, then feed a token a step to all rows that have one.

        Returns float32 logits [length - num_prompt + 1, vocab] per row, for positions num_prompt-1 .. length-1.
        """
        session, steps = self.session, [len(row) - num for row, num in zip(ids, num_prompt, strict=True)]
        order = sorted(range(len(ids)), key=lambda row: -steps[row])
        batch = self._start(ids, chunk_size, None if adapters is None else [adapters[row] for row in order])
        logits: dict[int, list[np.ndarray]] = {}
        for slot, row in enumerate(order):
            logits[row] = [session.extend(batch.view(slot, slot + 1), ids[row][: num_prompt[row]])]
        for step in range(max(steps)):
            live = [row for row in order if steps[row] > step]
            new = [[ids[row][num_prompt[row] + step]] for row in live]
            for row, values in zip(live, session.step(batch.view(0, len(live)), new, [[0]] * len(live))[:, 0], strict=True):
                logits[row].append(values)
        return [np.stack(logits[row]) for row in range(len(ids))]

    def prompt_entropy(self, prompts: Sequence[Sequence[int]]) -> list[float]:
        """The prompt entropy, in nats, of each prompt: how unsure the model is of what follows its tokens (`chunks`)."""
        return chunks.prompt_entropies(self.session, prompts)

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
        adapter: str | Sequence[str | None] | None = None,
    ) -> list[Completion]:
        """Complete every prompt. `params`: for all, or one for each prompt; None: the checkpoint's generation_config, or greedy.
        `chunk_size`: tokens, "auto" (each prompt gets one from its entropy), or None: as the engine was built. `adapter`: the name of a
        loaded one, for all, or one for each prompt; None: the base model.

        Sampling depends on the seed, the prompt's stream (default: its place in `prompts`) and the step, not on what runs beside it.
        A prompt with num_return_sequences above 1 gives so many completions, one behind the other, the first of them the one that it
        gives alone; `on_token` counts completions, and ends one by a true result.
        """
        if params is None:
            params = self.default_params()
        each = [params] * len(prompts) if isinstance(params, GenerationParams) else list(params)
        if len(each) != len(prompts):
            raise ValueError(f"{len(each)} settings for {len(prompts)} prompts")
        numbers = range(len(prompts)) if streams is None else streams
        worn = [adapter] * len(prompts) if adapter is None or isinstance(adapter, str) else list(adapter)
        places = [(i, k) for i, one in enumerate(each) for k in range(one.num_return_sequences)]
        requests = [
            Request(
                *(prompts[i], each[i], index, numbers[i] + k * STREAMS_APART, return_logits, return_logprobs, chunk_size),
                adapter=worn[i],
            )
            for index, (i, k) in enumerate(places)
        ]
        done: dict[int, Completion] = {}
        for index, outcome in self.complete(requests, on_token):
            if isinstance(outcome, ThoughtxError):
                raise outcome
            done[index] = dataclasses.replace(outcome, index=places[index][1])
        return [done[index] for index in range(len(places))]

    def complete(
        self, requests: Sequence[Request], on_token: OnToken | None = None, *, num_slots: int | None = None
    ) -> Iterator[tuple[int, Completion | ThoughtxError]]:
        """The requests, whose `index` tells them apart, with what became of them, each as soon as it has ended: at most `num_slots` run at
        a time (None: as many as the engine takes). A request that does not fit is named before anything runs (E122), one whose logits are
        not finite ends with its error (E123); the others go on."""
        self.session.stats = Stats()
        if not requests:
            return
        size = min(num_slots or self.build.max_batch_size, self.build.max_batch_size, len(requests))
        generation = Generation(self.session, self.text, self.eos_ids, size, on_token, fills_first=True)
        for request in requests:
            try:
                generation.add(request)
            except ThoughtxError as error:
                yield request.index, error
        while not generation.is_idle:
            yield from generation.tick()
