"""The loop of `Engine.generate` over one batch: pick a token of each row, write it, feed it.

What comes next is the sampler's choice unless the thinking must end there (`thinking`): then the end tag is written instead, token
by token like any other, so that rows of a batch, streams and logits see nothing special.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from trtllm_thoughtx.checkpoint.exits import READY
from trtllm_thoughtx.config import AUTO
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.runtime import probe
from trtllm_thoughtx.runtime.chunks import Choice
from trtllm_thoughtx.runtime.completion import Completion
from trtllm_thoughtx.runtime.drafts import MAX_DRAFTS, OFF, TRUST, TRUSTED, Drafter, Pace, Timer, check_policy
from trtllm_thoughtx.runtime.row import Row
from trtllm_thoughtx.runtime.sampling import GenerationParams, Sampler, log_probability, top_logprobs
from trtllm_thoughtx.text import opening, thinking
from trtllm_thoughtx.text.thinking import Thinking

if TYPE_CHECKING:
    from trtllm_thoughtx.runtime.engine import Engine

OnToken = Callable[[int, int], None]  # (index of the prompt, token id)


class Generation:
    """One batch of prompts on its way to answers, each with its own `params`. `wants`: whether logits, and log-probabilities are kept."""

    def __init__(
        self,
        engine: Engine,
        prompts: Sequence[Sequence[int]],
        first_row: int,
        streams: Sequence[int],
        params: Sequence[GenerationParams],
        on_token: OnToken | None,
        wants: tuple[bool, bool],
        chunk_size: int | str | None,
    ) -> None:
        self.engine, self.on_token, self.wants, self.first_row = engine, on_token, wants, first_row
        for one in dict.fromkeys(params):
            check(engine, one)
        self.began = time.perf_counter()
        self.batch, choices = engine.choose(prompts, chunk_size)
        asked = zip(params, prompts, choices, strict=True)
        self.rows = [self._row(index, *one) for index, one in enumerate(asked)]
        self.sampler = Sampler(params, len(prompts), streams=streams, prompts=[row.prompt for row in self.rows])
        self.eos_ids = frozenset(engine.eos_ids)
        self.chances = self.batch.chances  # what the exit head says of each row's last token
        self.drafter, self.timer = self._drafter()

    def run(self) -> list[Completion]:
        engine, stats = self.engine, self.engine.stats
        self._offer(engine.prefill(self.batch, [row.prompt for row in self.rows])[:, None], None)
        prefilled = time.perf_counter()
        while True:
            self._look()
            new = [self._write(row) for row in self.rows]
            while held := [row for row in self.rows if row.is_held]:  # a step ended among drafts, and trial answers come first
                self._look()
                for row in held:
                    new[row.index] = self._write(row)
            if not any(row.is_live for row in self.rows):
                break
            self._feed(new)
        stats.prefill_seconds += prefilled - self.began
        stats.decode_seconds += time.perf_counter() - prefilled
        stats.num_prefilled += sum(row.num_prompt for row in self.rows)
        stats.num_decoded += sum(max(0, len(row.output) - 1) for row in self.rows)
        work = self.batch.layer_tokens
        return [row.completion(has_logprobs=self.wants[1], num_layer_tokens=work[row.index]) for row in self.rows]

    def _row(self, index: int, params: GenerationParams, prompt: Sequence[int], choice: Choice | None) -> Row:
        row = Row(index, params, list(prompt), len(prompt), choice, reason=None if params.max_new_tokens else "length")
        row.thought = self._thought(row, prompt)
        if self.engine.text is not None and (params.stop or params.stop_token_ids):
            row.stream = self.engine.text.stop_stream(params)
        asked = params.exit_threshold
        row.exit_threshold = self.engine.build.exit_threshold if isinstance(asked, str) else asked
        return row

    def _feed(self, new: list[list[int]]) -> None:
        """Feed the tokens just written, with drafts behind them where these pay."""
        if self.drafter is None or not self.timer.start(sum(len(row.output) for row in self.rows), sum(map(bool, new))):
            for row in self.rows:
                row.drafts = []
            self._offer(self.engine.step(self.batch, new, [[0]] * len(new)), None)
            return
        most = [self._most_drafts(row) if extra else 0 for row, extra in zip(self.rows, new, strict=True)]
        drafts, logits, chances = self.drafter.cycle(new, most, self.sampler.guess)
        for row, drafted in zip(self.rows, drafts, strict=True):
            row.drafts = drafted
        self._offer(logits, chances)

    def _most_drafts(self, row: Row) -> int:
        if row.awaits_trial or row.params.exit_policy == OFF:
            return 0
        return min(MAX_DRAFTS, row.params.max_new_tokens - len(row.output) - 1)

    def _offer(self, logits: np.ndarray, chances: np.ndarray | None) -> None:
        """What each row may be written from next: logits [B, W, V], behind the last token fed and behind each draft."""
        self.logits_of, self.chances_of = logits, chances
        for row in self.rows:
            row.num_used = 0

    def _drafter(self) -> tuple[Drafter | None, Timer]:
        engine, policies = self.engine, {row.params.exit_policy for row in self.rows}
        if policies == {OFF} or not engine.build.draft_layers:
            return None, Timer(None)
        usual = engine.build.draft_thresholds[0]
        thresholds = [usual if row.params.draft_threshold is None else row.params.draft_threshold for row in self.rows]
        for row in self.rows:
            if row.params.exit_policy == TRUST and row.params.draft_threshold is None:
                thresholds[row.index] = max(TRUSTED, usual)
        is_timed = policies <= {AUTO, OFF}
        pace = engine.paces.setdefault(len(self.rows), Pace()) if is_timed else None
        return Drafter(engine, self.batch, thresholds), Timer(pace)

    def _thought(self, row: Row, prompt: Sequence[int]) -> Thinking | None:
        """Follows the row's thinking. A thinking that must not begin is closed in the prompt."""
        text, params = self.engine.text, row.params
        if text is None or text.think_ids is None:
            return None
        stop = None
        if row.choice is not None and row.choice.single_step:
            stop = thinking.SINGLE_STEP
        elif params.thinks_nothing:
            stop = thinking.DEPTH if params.max_reasoning_depth == 0 else thinking.TOKENS
        if stop is not None:
            closed = opening.closed(text, prompt)
            if len(closed) < self.engine.build.max_seq_len:
                prompt, row.prompt = closed, list(closed)
                fed = self.batch.tokens[row.index]
                same = next((i for i, pair in enumerate(zip(fed, closed, strict=False)) if pair[0] != pair[1]), len(fed))
                self.engine.stats.num_read_again += len(fed) - same
                self.batch.forget(row.index, same)
            elif params.thinks_nothing:
                row.reason = "capacity"
        followed = Thinking(text, prompt, params)
        if stop is not None and followed.state == thinking.BEFORE:
            followed.stop = stop
        return followed

    def _write(self, row: Row) -> list[int]:
        """Write tokens of a row as far as its logits reach; the one that is to be fed, none when the row has ended or is held."""
        row.is_held = False
        while row.is_live:
            place = row.num_used
            logits, drafts = self.logits_of[row.index, place], row.drafts
            if self.chances_of is not None:
                self.chances[row.index] = self.chances_of[row.index, place]
            picked = int(self.sampler.pick(logits[None], [row.index])[0])
            if place < len(drafts) and row.params.exit_policy == TRUST:
                picked = drafts[place]
            token = self._next(row, picked)
            self._keep(row, token, logits)
            row.num_used += 1
            if row.is_live and place < len(drafts) and token == drafts[place]:
                self.engine.stats.num_accepted += 1
                if row.awaits_trial:
                    self._take_back(row, len(drafts) - place - 1)
                    row.is_held = True
                    return []
                continue
            self._take_back(row, len(drafts) - place)
            return [token] if row.is_live else []
        return []

    def _take_back(self, row: Row, num_drafts: int) -> None:
        """The last drafts of a row will not be written."""
        if num_drafts:
            self.batch.forget(row.index, len(self.batch.tokens[row.index]) - num_drafts)
        row.drafts = row.drafts[: len(row.drafts) - num_drafts]

    def _keep(self, row: Row, token: int, logits: np.ndarray) -> None:
        row.output.append(token)
        self.sampler.note(row.index, token)
        num_top = row.params.logprobs
        if self.wants[0]:
            row.logits.append(logits.copy())
        if self.wants[1] or num_top is not None:
            row.logprobs.append(log_probability(logits, token))
        if num_top is not None:
            row.top_logprobs.append(top_logprobs(logits, num_top))
        if row.stream is not None:
            row.stream.push(token)
        if self.on_token:
            self.on_token(self.first_row + row.index, token)
        row.reason = self._reason(row, token)

    def _next(self, row: Row, choice: int) -> int:
        """The row's next token: the sampler's `choice`, or one that ends the thinking."""
        thought = row.thought
        if thought is None:
            return choice
        if not row.forced and (why := self._must_end(row, thought, choice)):
            row.why = why
            row.forced += thought.closing()
        if not row.forced:
            thought.push(choice)
            return choice
        token = row.forced.pop(0)
        if not row.forced:
            thought.end(row.why)
        return token

    def _must_end(self, row: Row, thought: Thinking, choice: int) -> str | None:
        if thought.is_end_tag(choice):
            return None
        why = thought.budget_spent or (None if thought.admits(choice) else thinking.DEPTH)
        if why or not thought.is_step_end:
            return why
        if row.exit_threshold is not None and self.chances[row.index, READY] >= row.exit_threshold:
            return thinking.HEAD
        return thinking.PROBE if row.is_settled else None

    def _look(self) -> None:
        """What is known behind the tokens just fed: the exit head's word, and trial answers of the rows that ended a step."""
        if self.chances_of is None:
            self.chances = self.batch.chances.copy()
        is_any_held = any(row.is_held for row in self.rows)
        tried: dict[tuple[int, frozenset[int]], dict[int, list[int]]] = {}  # tokens of a trial and what ends it -> closings by row
        for row in self.rows:
            row.is_settled = False
            thought = row.thought
            if thought is None or not row.awaits_trial or not row.is_live or row.forced or thought.budget_spent:
                continue
            if is_any_held and not row.is_held:
                continue
            closing, num_tokens = thought.closing(), row.params.probe_tokens
            if len(closing) + num_tokens <= probe.room(self.batch, row.index):
                tried.setdefault((num_tokens, self._ends(row)), {})[row.index] = closing
            else:
                row.trials.num_skipped += 1
        for (num_tokens, ends), closings in tried.items():
            for index, (answer, confidence) in probe.trial(self.engine, self.batch, closings, num_tokens, ends).items():
                row, said = self.rows[index], self.engine.text.decode(answer) if self.engine.text else ""
                threshold, agree = row.params.exit_probe or 0.0, row.params.probe_agree
                row.is_settled = row.trials.settles(answer, confidence, said, threshold=threshold, num_agreeing=agree)

    def _ends(self, row: Row) -> frozenset[int]:
        """The ids that end a row."""
        return row.params.stops | (frozenset() if row.params.ignore_eos else self.eos_ids)

    def _reason(self, row: Row, token: int) -> str | None:
        num_new, params = len(row.output), row.params
        if token in self._ends(row):
            return "eos" if token in self.eos_ids and not params.ignore_eos else "stop"
        if row.stream is not None and row.stream.is_done:
            return "stop"
        if num_new >= params.max_new_tokens:
            return "length"
        return "capacity" if len(row.prompt) + num_new >= self.engine.build.max_seq_len else None


def check(engine: Engine, params: GenerationParams) -> None:
    """E122 for settings that this engine cannot follow, before any work."""
    text, flags = engine.text, params.thinking_flags
    if params.stop and text is None:
        why, fix = (
            "the engine was built without a tokenizer",
            "give ids (thoughtx-run --stop_token_ids), or build from a checkpoint with a tokenizer.json",
        )
        raise ThoughtxError("E122", "--stop needs a tokenizer", where=str(engine.directory.root), why=why, fix=fix)
    where, what = str(engine.directory.root), ", ".join(f"--{name}" for name in flags)
    if flags and (text is None or text.think_ids is None):
        why = "neither the tokenizer nor the chat template has them" if text else "the engine was built without a tokenizer"
        fix = f"leave {what} out, or build from a checkpoint whose tokenizer files have the tags"
        raise ThoughtxError("E122", f"{what} needs thinking tags", where=where, why=why, fix=fix)
    if params.exit_threshold is not None and not engine.build.exit_head:
        why = "its checkpoint carried no exit head when it was built"
        fix = "use --exit_probe, which needs none, or fit one (thoughtx-calibrate --fit_exit_head) and build again"
        raise ThoughtxError("E122", "--exit_threshold needs an exit head, and this engine has none", where=where, why=why, fix=fix)
    check_policy(engine, params.exit_policy)
    if params.exit_probe is not None and text is not None and text.think_ids is not None:
        probe.check_room(engine, len(text.think_ids[1]) + params.probe_tokens)
