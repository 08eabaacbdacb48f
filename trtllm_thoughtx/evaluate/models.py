"""A Hugging Face directory as a system that answers questions: transformers in float32, with its own KV cache.

Rows of a batch are padded on the left. What is measured is transformers as its users have it (SDPA attention), not the reference
of `thoughtx-validate`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trtllm_thoughtx import files
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.evaluate.systems import IsDone, Job, Written, need_text
from trtllm_thoughtx.runtime import answers
from trtllm_thoughtx.runtime.logits import Score, Scores, log_probability
from trtllm_thoughtx.runtime.sampling import Sampler
from trtllm_thoughtx.text.params import GenerationParams
from trtllm_thoughtx.text.text import Text
from trtllm_thoughtx.validate.reference import load_model, version

SUFFIXES = (".safetensors", ".json", ".jinja")  # the files that decide what a model answers
FEW = 32  # tokens of a continuation


class ModelSystem:
    """See `systems.System`. A model that is already loaded may be given instead of being read from `path`."""

    is_grouped = True

    def __init__(self, path: Path, num_threads: int | None = None, batch_size: int | None = None, model: Any = None) -> None:
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        self.text = need_text(Text.load(path), path)
        self.model = load_model(path, torch.float32, attention="sdpa") if model is None else model
        self.max_length, self.batch_size = int(self.model.config.max_position_embeddings), batch_size or 1
        backend = f"transformers {version()}"
        self.description = {"name": path.name, "path": str(path), "kind": "model", "backend": backend, "dtype": "float32"}

    def check(self, params: GenerationParams) -> None:
        if params.engine_flags:
            why = "transformers runs this one, and its thinking is not followed"
            fix = "give an engine directory, or leave the flag out"
            raise ThoughtxError(
                "E001", f"--{', --'.join(params.engine_flags)} is for engines", where=self.description["path"], why=why, fix=fix
            )

    def sha256(self) -> str:
        names = sorted(path for suffix in SUFFIXES for path in Path(self.description["path"]).glob(f"*{suffix}"))
        return answers.sha256_of([[path.name, files.sha256_of(path)] for path in names])

    def write(
        self, prompts: Sequence[Sequence[int]], params: Sequence[GenerationParams], streams: Sequence[int], is_done: IsDone | None = None
    ) -> Iterator[tuple[int, Written | ThoughtxError]]:
        for one in params:
            self.check(one)
        for start in range(0, len(prompts), self.batch_size):
            yield from self._written(range(start, min(start + self.batch_size, len(prompts))), prompts, params, streams, is_done)

    def _written(
        self,
        rows: Sequence[int],
        prompts: Sequence[Sequence[int]],
        params: Sequence[GenerationParams],
        streams: Sequence[int],
        is_done: IsDone | None,
    ) -> Iterator[tuple[int, Written | ThoughtxError]]:
        """One batch. When it fails, each of its prompts is run alone, so that one fails alone."""
        try:
            done = self._batch(
                [prompts[row] for row in rows],
                [params[row] for row in rows],
                [streams[row] for row in rows],
                None if is_done is None else lambda place, ids: is_done(rows[place], ids),
            )
        except ThoughtxError as error:
            if len(rows) == 1:
                yield rows[0], error
            for row in rows if len(rows) > 1 else ():
                yield from self._written([row], prompts, params, streams, is_done)
            return
        yield from zip(rows, done, strict=True)

    def _batch(
        self, prompts: Sequence[Sequence[int]], params: Sequence[GenerationParams], streams: Sequence[int], is_done: IsDone | None
    ) -> list[Written]:
        began = time.perf_counter()
        width, num = max(map(len, prompts)), len(prompts)
        ids, mask = torch.zeros(num, width, dtype=torch.int64), torch.zeros(num, width, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(list(prompt))
            mask[row, width - len(prompt) :] = 1
        sampler = Sampler(params, num, streams=streams, prompts=prompts)
        eos = [frozenset(() if one.ignore_eos else self.text.eos_ids) for one in params]
        written: list[list[int]] = [[] for _ in prompts]
        logprobs: list[list[float]] = [[] for _ in prompts]
        reasons: list[str | None] = [None] * num
        seconds = [0.0] * num
        streams_of = [self.text.stop_stream(one) for one in params]
        cache, place = None, (mask.cumsum(1) - 1).clamp(min=0)
        with torch.inference_mode():
            while None in reasons:
                out = self.model(
                    input_ids=ids, attention_mask=mask, position_ids=place, past_key_values=cache, use_cache=True, logits_to_keep=1
                )
                cache, logits = out.past_key_values, out.logits[:, -1].float().numpy(force=True)
                picked = sampler.pick(logits)
                for row, token in enumerate(picked.tolist()):
                    if reasons[row] is not None:
                        continue
                    written[row].append(token)
                    sampler.note(row, token)
                    streams_of[row].push(token)
                    logprobs[row].append(log_probability(logits[row], token))
                    seconds[row] = time.perf_counter() - began
                    full = len(prompts[row]) + len(written[row]) >= self.max_length
                    is_long = len(written[row]) >= params[row].max_new_tokens
                    ends = (
                        (token in eos[row], "eos"),
                        (
                            token in params[row].stops or streams_of[row].is_done or (is_done is not None and is_done(row, written[row])),
                            "stop",
                        ),
                        (is_long, "length"),
                        (full, "capacity"),
                    )
                    reasons[row] = next((reason for is_true, reason in ends if is_true), None)
                ids = torch.from_numpy(picked)[:, None]
                mask = torch.cat([mask, torch.ones(num, 1, dtype=torch.int64)], 1)
                place = place[:, -1:] + 1
        ends_at = [stream.num_chars if stream.is_done else None for stream in streams_of]
        return [Written(written[row], logprobs[row], str(reasons[row]), seconds[row], text_end=ends_at[row]) for row in range(num)]

    def score(self, jobs: Sequence[Job]) -> Iterator[tuple[int, list[Score]]]:
        """In batches; one at a time where there would be logits of many positions."""
        start = 0
        while start < len(jobs):
            few = all(len(continuations[0]) <= FEW for _, continuations in jobs[start : start + self.batch_size])
            batch = jobs[start : start + (self.batch_size if few else 1)]
            rows = [[*context, *continuations[0][:-1]] for context, continuations in batch]
            firsts = [len(context) - 1 for context, _ in batch]
            for place, (logits, (_, continuations)) in enumerate(zip(self._logits(rows, firsts), batch, strict=True), start):
                scores = Scores(continuations)
                scores.add(logits)
                yield place, scores.found
            start += len(batch)

    def _logits(self, rows: Sequence[Sequence[int]], firsts: Sequence[int]) -> list[np.ndarray]:
        """Of each row those of the places from `firsts` on."""
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)  # padded on the right, which a causal mask hides
        for place, row in enumerate(rows):
            ids[place, : len(row)] = torch.tensor(list(row))
        low = min(firsts)
        with torch.inference_mode():
            out = self.model(input_ids=ids, use_cache=False, logits_to_keep=ids.shape[1] - low).logits.float().numpy(force=True)
        return [out[place, first - low : len(row) - low] for place, (row, first) in enumerate(zip(rows, firsts, strict=True))]

    def close(self) -> None:
        self.model = None
