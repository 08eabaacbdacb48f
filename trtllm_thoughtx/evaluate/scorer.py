"""Log-likelihoods and answers of texts, from an engine or from transformers: what a benchmark harness asks of a model.

A `System` gives logits and new token ids, `Scorer` turns texts into them and back. The rules are lm-eval's (prompts lose their beginning
when they are too long, a continuation's score is the sum over its tokens), with two deliberate differences: the thought is cut off
before stop strings are looked for and before an answer is scored, and a thought that never ends is no answer, where lm-eval would
score the thought. No benchmark package is imported here.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.evaluate.systems import System
from trtllm_thoughtx.progress import Stage
from trtllm_thoughtx.text.answer import split_text
from trtllm_thoughtx.text.params import GenerationParams

LOOK_EVERY = 8  # tokens between two looks for a stop string
MAX_NEW = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class Scorer:
    """Log-likelihoods and answers of texts. `think_tags`: (start, end) of a thought, None: nothing is cut, "auto": the model's own.

    `num_truncated` counts the requests whose prompt lost its beginning, to fit into the model, as lm-eval does it; `num_alike` those
    that are another one's tokens exactly: choices that the tokenizer cannot tell apart, whose accuracy means nothing.
    """

    def __init__(
        self, source: System, *, is_chat: bool = False, think_tags: tuple[str, str] | str | None = "auto", max_new_tokens: int = 256
    ) -> None:
        self.source, self.text, self.is_chat, self.max_new_tokens = source, source.text, is_chat, max_new_tokens
        tags = self.text.think_tags if think_tags == "auto" else think_tags
        self.think_tags = tags if isinstance(tags, tuple) else None
        named = {self.text.decode([i], skip_special=False).strip() for i in self.text.eos_ids} | set(self.text.special.values())
        self._special = sorted(named - {""}, key=len, reverse=True)
        self.num_truncated = self.num_alike = 0
        self.stage: Stage | None = None

    @property
    def prefix_id(self) -> int:
        """What stands before a text that has nothing before it: BOS, or EOS where there is none."""
        found = [i for i in (self.text.bos_id, *self.text.eos_ids) if i is not None]
        if not found:
            why = "an empty prompt needs one of them in its place"
            raise ThoughtxError(
                "E112",
                "neither BOS nor EOS",
                where="the tokenizer",
                why=why,
                fix='name one in the model\'s tokenizer_config.json ("eos_token"), and build again',
            )
        return found[0]

    def encode(self, text: str, add_special: bool | None = None) -> list[int]:
        """Token ids. A rendered chat holds its special tokens already, and so may a text that begins with BOS."""
        if add_special is None:
            bos = self.text.special.get("bos_token")
            add_special = not self.is_chat and not (bos and text.startswith(bos))
        return self.text.encode(text, add_special=add_special)

    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, bool]]:
        """(context, continuation) ids -> (sum of log-probabilities in nats, whether greedy decoding would write it)."""
        room = self.source.max_length
        jobs: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}  # choices that differ in their last token are one
        for index, (context, continuation) in enumerate(pairs):
            if not context or not continuation:
                why = "the tokenizer drops it, or joins it to the last word before it"
                fix = "use a model whose tokenizer knows the words of this task, or leave out --chat_template if it was given"
                raise ThoughtxError("E140", "a text to be scored has no tokens", where=f"request {index}", why=why, fix=fix)
            if len(continuation) > room:
                raise _too_long(f"a continuation of {len(continuation)} tokens", room)
            self.num_truncated += len(context) + len(continuation) > room + 1
            jobs.setdefault((tuple(context[-(room + 1 - len(continuation)) :]), tuple(continuation[:-1])), []).append(index)
        self.num_alike += len(pairs) - len({(tuple(context), tuple(continuation)) for context, continuation in pairs})
        scores: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        order = sorted(jobs, key=lambda job: (-len(job[0]), job))  # a context that two have is read once
        asked = [(context, tuple(tuple(pairs[index][1]) for index in jobs[context, begun])) for context, begun in order]
        for place, found in self.source.score(asked):
            for index, score in zip(jobs[order[place]], found, strict=True):
                scores[index] = score
            self._advance(len(found))
        return scores

    def complete(self, requests: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
        """(prompt, lm-eval's generation settings) -> the answer: after the thought, up to the first stop string."""
        groups: dict[tuple[GenerationParams, tuple[str, ...]], list[int]] = {}
        for index, (_, settings) in enumerate(requests):
            groups.setdefault(self._settings(settings), []).append(index)
        answers = [""] * len(requests)
        for (params, until), members in groups.items():
            rows = {index: self._prompt(requests[index][0], params.max_new_tokens) for index in members}
            if params.is_greedy and self.source.is_grouped:
                members = sorted(members, key=lambda index: -len(rows[index]))
            prompts = [requests[index][0] for index in members]
            is_done = functools.partial(self._is_done, prompts, until)
            streams = range(len(members))
            for place, one in self.source.write([rows[index] for index in members], [params] * len(members), streams, is_done):
                if isinstance(one, ThoughtxError):
                    raise one
                answers[members[place]] = self.answer(prompts[place], one.ids, until)
                self._advance(1)
        return answers

    def answer(self, prompt: str, ids: Sequence[int], until: Sequence[str] = ()) -> str:
        """The text of new ids behind the last thought, "" when a thought began and did not end; cut before the first stop string."""
        text = self._after_thought(prompt, ids)
        return text[: min((text.find(stop) for stop in until if stop and stop in text), default=len(text))]

    def _after_thought(self, prompt: str, ids: Sequence[int]) -> str:
        if self.think_tags is None:
            return self.text.decode(ids)
        raw = self.text.decode(ids, skip_special=False)  # the tags may be special tokens
        reasoning, answer = split_text(raw, self.think_tags, is_open=prompt.rstrip().endswith(self.think_tags[0]))
        if reasoning is None:
            return self.text.decode(ids)
        return functools.reduce(lambda rest, token: rest.replace(token, ""), self._special, answer or "").strip()

    def _is_done(self, prompts: Sequence[str], until: Sequence[str], row: int, ids: list[int]) -> bool:
        if not until or len(ids) % LOOK_EVERY:
            return False
        text = self._after_thought(prompts[row], ids)
        return any(stop in text for stop in until if stop)

    def _settings(self, given: dict[str, Any]) -> tuple[GenerationParams, tuple[str, ...]]:
        until = given.get("until") or ()
        temperature = float(given.get("temperature") or (1.0 if given.get("do_sample") else 0.0))
        params = GenerationParams(
            max_new_tokens=int(next((given[name] for name in MAX_NEW if given.get(name) is not None), self.max_new_tokens)),
            temperature=0.0 if given.get("do_sample") is False else temperature,
            top_k=int(given.get("top_k") or 0),
            top_p=float(given.get("top_p") or 1.0),
            seed=int(given.get("seed") or 0),
            repetition_penalty=float(given.get("repetition_penalty") or self.text.default_params().repetition_penalty),
            stop_ids=self.text.eos_ids,
        )
        return params, (until,) if isinstance(until, str) else tuple(until)

    def _prompt(self, prompt: str, num_new: int) -> list[int]:
        room = self.source.max_length - num_new
        if room < 1:
            raise _too_long(f"{num_new} new tokens and a prompt", self.source.max_length)
        ids = self.encode(prompt) or [self.prefix_id]
        self.num_truncated += len(ids) > room
        return ids[-room:]

    def _advance(self, num: int) -> None:
        if self.stage is not None:
            self.stage.advance(num)


def _too_long(what: str, room: int) -> ThoughtxError:
    fix = "ask for fewer new tokens, or build an engine with more room: thoughtx-build --max_seq_len"
    return ThoughtxError("E122", f"{what} do not fit", where="the harness", why=f"the model takes {room} tokens in all", fix=fix)
