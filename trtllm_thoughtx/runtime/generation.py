"""The loop of `Engine.generate` over one batch: pick a token of each row, write it, feed it.

What comes next is the sampler's choice unless the thinking must end there (`thinking`): then the end tag is written instead, token
by token like any other, so that rows of a batch, streams and logits see nothing special.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from trtllm_thoughtx.config import AUTO
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.exit_weights import READY
from trtllm_thoughtx.runtime import opening, probe, thinking
from trtllm_thoughtx.runtime.completion import Completion
from trtllm_thoughtx.runtime.drafts import MAX_DRAFTS, OFF, TRUST, TRUSTED, Drafter, Pace, Timer, check_policy
from trtllm_thoughtx.runtime.probe import Trials
from trtllm_thoughtx.runtime.sampling import GenerationParams, Sampler, log_probability
from trtllm_thoughtx.runtime.thinking import Thinking

if TYPE_CHECKING:
    from trtllm_thoughtx.runtime.engine import Engine

OnToken = Callable[[int, int], None]  # (index of the prompt, token id)


class Generation:
    """One batch of prompts on its way to answers. `wants`: whether logits, and whether log-probabilities are kept."""

    def __init__(
        self,
        engine: Engine,
        prompts: Sequence[Sequence[int]],
        first_row: int,
        streams: Sequence[int],
        params: GenerationParams,
        on_token: OnToken | None,
        wants: tuple[bool, bool],
        chunk_size: int | str | None,
    ) -> None:
        self.engine, self.params, self.on_token, self.wants, self.first_row = engine, params, on_token, wants, first_row
        self.prompts = prompts
        self.num_prompt = [len(prompt) for prompt in prompts]
        self._check()
        self.began = time.perf_counter()
        self.batch, self.rows, self.choices = engine.choose(prompts, chunk_size)
        self.sampler = Sampler(params, len(prompts), streams=streams)
        self.eos_ids = frozenset() if params.ignore_eos or not engine.text else frozenset(engine.text.eos_ids)
        self.output: list[list[int]] = [[] for _ in prompts]
        self.logits: list[list[np.ndarray]] = [[] for _ in prompts]
        self.logprobs: list[list[float]] = [[] for _ in prompts]
        self.reasons: list[str | None] = [None if params.max_new_tokens else "length" for _ in prompts]
        self.forced: list[list[int]] = [[] for _ in prompts]  # what must be written next
        self.why: list[str] = ["" for _ in prompts]  # the thinking ends by what is forced
        self.thoughts = [self._thought(row) for row in range(len(prompts))]
        asked = params.exit_threshold
        self.exit_threshold = engine.build.exit_threshold if asked == AUTO else asked
        self.chances = self.batch.chances  # what the exit head says of each row's last token
        self.trials = [Trials() for _ in prompts]
        self.is_settled = [False for _ in prompts]  # by a trial, behind the step that just ended
        self.is_held = [False for _ in prompts]
        self.drafts: list[list[int]] = [[] for _ in prompts]
        self.drafter, self.timer = self._drafter()

    def run(self) -> list[Completion]:
        engine, stats = self.engine, self.engine.stats
        self._offer(engine.prefill(self.batch, self.rows)[:, None], None)
        prefilled = time.perf_counter()
        while True:
            self._look()
            new = [self._write(row) for row in range(len(self.rows))]
            while any(self.is_held):  # a step ended among drafts, and trial answers come first
                held = [row for row, is_held in enumerate(self.is_held) if is_held]
                self._look()
                for row in held:
                    new[row] = self._write(row)
            if None not in self.reasons:
                break
            self._feed(new)
        stats.prefill_seconds += prefilled - self.began
        stats.decode_seconds += time.perf_counter() - prefilled
        stats.num_prefilled += sum(self.num_prompt)
        stats.num_decoded += sum(max(0, len(row) - 1) for row in self.output)
        return [self._completion(row) for row in range(len(self.rows))]

    def _feed(self, new: list[list[int]]) -> None:
        """Feed the tokens just written, with drafts behind them where these pay."""
        if self.drafter is None or not self.timer.start(sum(map(len, self.output)), sum(map(bool, new))):
            self.drafts = [[] for _ in new]
            self._offer(self.engine.step(self.batch, new, [[0]] * len(new)), None)
            return
        most = [self._most_drafts(row) if extra else 0 for row, extra in enumerate(new)]
        self.drafts, logits, chances = self.drafter.cycle(new, most, self.sampler.guess)
        self._offer(logits, chances)

    def _most_drafts(self, row: int) -> int:
        thought = self.thoughts[row]
        if self.params.exit_probe is not None and thought is not None and thought.is_step_end:
            return 0  # a trial comes first
        return min(MAX_DRAFTS, self.params.max_new_tokens - len(self.output[row]) - 1)

    def _offer(self, logits: np.ndarray, chances: np.ndarray | None) -> None:
        """What each row may be written from next: logits [B, W, V], behind the last token fed and behind each draft."""
        self.logits_of, self.chances_of = logits, chances
        self.num_used = [0] * len(logits)

    def _check(self) -> None:
        """E122 for settings of the thinking that this engine cannot follow, before any work."""
        engine, text, flags = self.engine, self.engine.text, self.params.thinking_flags
        where, what = str(engine.directory.root), ", ".join(f"--{name}" for name in flags)
        if flags and (text is None or text.think_ids is None):
            why = "neither the tokenizer nor the chat template has them" if text else "the engine was built without a tokenizer"
            fix = f"leave {what} out, or build from a checkpoint whose tokenizer files have the tags"
            raise ThoughtxError("E122", f"{what} needs thinking tags", where=where, why=why, fix=fix)
        if self.params.exit_threshold is not None and not engine.build.exit_head:
            why = "its checkpoint carried no exit head when it was built"
            fix = "use --exit_probe, which needs none, or fit one (thoughtx-calibrate --fit_exit_head) and build again"
            raise ThoughtxError("E122", "--exit_threshold needs an exit head, and this engine has none", where=where, why=why, fix=fix)
        check_policy(engine, self.params.exit_policy)
        if self.params.exit_probe is not None and text is not None and text.think_ids is not None:
            probe.check_room(engine, len(text.think_ids[1]) + self.params.probe_tokens)

    def _drafter(self) -> tuple[Drafter | None, Timer]:
        engine, params = self.engine, self.params
        if params.exit_policy == OFF or not engine.build.draft_layers:
            return None, Timer(None)
        threshold = params.draft_threshold
        if threshold is None and params.exit_policy == TRUST:
            threshold = max(TRUSTED, engine.build.draft_thresholds[0])
        pace = engine.paces.setdefault(len(self.rows), Pace()) if params.exit_policy == AUTO else None
        return Drafter(engine, self.batch, threshold), Timer(pace)

    def _thought(self, row: int) -> Thinking | None:
        """Follows the row's thinking. A thinking that must not begin is closed in the prompt."""
        text = self.engine.text
        if text is None or text.think_ids is None:
            return None
        choice, stop, prompt = self.choices[row], None, self.prompts[row]
        if choice is not None and choice.single_step:
            stop = thinking.SINGLE_STEP
        elif self.params.thinks_nothing:
            stop = thinking.DEPTH if self.params.max_reasoning_depth == 0 else thinking.TOKENS
        if stop is not None:
            closed = opening.closed(text, prompt)
            if len(closed) < self.engine.build.max_seq_len:
                prompt, self.rows[row] = closed, list(closed)
                fed = self.batch.tokens[row]
                same = next((i for i, pair in enumerate(zip(fed, closed, strict=False)) if pair[0] != pair[1]), len(fed))
                self.engine.stats.num_read_again += len(fed) - same
                self.batch.forget(row, same)
            elif self.params.thinks_nothing:
                self.reasons[row] = "capacity"
        followed = Thinking(text, prompt, self.params)
        if stop is not None and followed.state == thinking.BEFORE:
            followed.stop = stop
        return followed

    def _write(self, row: int) -> list[int]:
        """Write tokens of a row as far as its logits reach; the one that is to be fed, none when the row has ended or is held."""
        self.is_held[row] = False
        while self.reasons[row] is None:
            place = self.num_used[row]
            logits, drafts = self.logits_of[row, place], self.drafts[row]
            if self.chances_of is not None:
                self.chances[row] = self.chances_of[row, place]
            picked = int(self.sampler.pick(logits[None], [row])[0])
            if place < len(drafts) and self.params.exit_policy == TRUST:
                picked = drafts[place]
            token = self._next(row, picked)
            self._keep(row, token, logits)
            self.num_used[row] += 1
            if self.reasons[row] is None and place < len(drafts) and token == drafts[place]:
                self.engine.stats.num_accepted += 1
                thought = self.thoughts[row]
                if self.params.exit_probe is not None and thought is not None and thought.is_step_end:
                    self._take_back(row, len(drafts) - place - 1)
                    self.is_held[row] = True
                    return []
                continue
            self._take_back(row, len(drafts) - place)
            return [token] if self.reasons[row] is None else []
        return []

    def _take_back(self, row: int, num_drafts: int) -> None:
        """The last drafts of a row will not be written."""
        if num_drafts:
            self.batch.forget(row, len(self.batch.tokens[row]) - num_drafts)
        self.drafts[row] = self.drafts[row][: len(self.drafts[row]) - num_drafts]

    def _keep(self, row: int, token: int, logits: np.ndarray) -> None:
        self.output[row].append(token)
        if self.wants[0]:
            self.logits[row].append(logits.copy())
        if self.wants[1]:
            self.logprobs[row].append(log_probability(logits, token))
        if self.on_token:
            self.on_token(self.first_row + row, token)
        self.reasons[row] = self._reason(row, token)

    def _next(self, row: int, choice: int) -> int:
        """The row's next token: the sampler's `choice`, or one that ends the thinking."""
        thought, forced = self.thoughts[row], self.forced[row]
        if thought is None:
            return choice
        if not forced and (why := self._must_end(row, thought, choice)):
            self.why[row] = why
            forced += thought.closing()
        if not forced:
            thought.push(choice)
            return choice
        token = forced.pop(0)
        if not forced:
            thought.end(self.why[row])
        return token

    def _must_end(self, row: int, thought: Thinking, choice: int) -> str | None:
        if thought.is_end_tag(choice):
            return None
        why = thought.budget_spent or (None if thought.admits(choice) else thinking.DEPTH)
        if why or not thought.is_step_end:
            return why
        if self.exit_threshold is not None and self.chances[row, READY] >= self.exit_threshold:
            return thinking.HEAD
        return thinking.PROBE if self.is_settled[row] else None

    def _look(self) -> None:
        """What is known behind the tokens just fed: the exit head's word, and trial answers of the rows that ended a step."""
        if self.chances_of is None:
            self.chances = self.batch.chances.copy()
        threshold, text = self.params.exit_probe, self.engine.text
        if threshold is None or text is None:
            return
        self.is_settled = [False] * len(self.rows)
        closings = {}
        for row, thought in enumerate(self.thoughts):
            is_next = self.is_held[row] or not any(self.is_held)
            if (
                is_next
                and self.reasons[row] is None
                and not self.forced[row]
                and thought
                and thought.is_step_end
                and not thought.budget_spent
            ):
                closing = thought.closing()
                if len(closing) + self.params.probe_tokens <= probe.room(self.batch, row):
                    closings[row] = closing
                else:
                    self.trials[row].num_skipped += 1
        found = probe.trial(self.engine, self.batch, closings, self.params.probe_tokens, self.eos_ids | self.params.stops)
        for row, (answer, confidence) in found.items():
            said = text.decode(answer)
            agree = self.params.probe_agree
            self.is_settled[row] = self.trials[row].settles(answer, confidence, said, threshold=threshold, num_agreeing=agree)

    def _reason(self, row: int, token: int) -> str | None:
        num_new, params = len(self.output[row]), self.params
        if token in self.eos_ids:
            return "eos"
        if token in params.stops:
            return "stop"
        if num_new >= params.max_new_tokens:
            return "length"
        return "capacity" if len(self.rows[row]) + num_new >= self.engine.build.max_seq_len else None

    def _completion(self, row: int) -> Completion:
        choice, thought = self.choices[row], self.thoughts[row]
        logits = np.stack(self.logits[row]) if self.logits[row] else None
        logprobs = self.logprobs[row] if self.wants[1] else None
        size, complexity, single = (None, None, False) if choice is None else (choice.chunk_size, choice.complexity, choice.single_step)
        if thought is not None:
            thought.finish()
        return Completion(
            output_ids=self.output[row],
            stop_reason=str(self.reasons[row]),
            num_prompt_tokens=self.num_prompt[row],
            chunk_size=size,
            logits=logits,
            logprobs=logprobs,
            complexity=complexity,
            single_step=single,
            is_open=thought is not None and thought.was_open,
            num_steps=thought.num_steps if thought else 0,
            num_thinking_tokens=thought.num_tokens if thought else 0,
            thinking_stop=thought.stop if thought else None,
            num_layer_tokens=self.batch.layer_tokens[row],
            num_probes=self.trials[row].num_done,
            num_probes_skipped=self.trials[row].num_skipped,
        )
