"""The loop of `Engine.generate` over one batch: probe, write a token of each row (more where drafts are accepted), feed, until all rows
have ended. What a row writes next is its own affair (`row`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from trtllm_thoughtx.checkpoint.exits import READY
from trtllm_thoughtx.config import AUTO
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.runtime import chunks, probe
from trtllm_thoughtx.runtime.chunks import Choice
from trtllm_thoughtx.runtime.completion import Completion
from trtllm_thoughtx.runtime.drafts import OFF, TRUST, TRUSTED, Drafter, check_policy
from trtllm_thoughtx.runtime.pace import Pace, Timer
from trtllm_thoughtx.runtime.row import Request, Row
from trtllm_thoughtx.runtime.sampling import Sampler
from trtllm_thoughtx.runtime.session import Session
from trtllm_thoughtx.text import opening, thinking
from trtllm_thoughtx.text.params import GenerationParams
from trtllm_thoughtx.text.text import Text
from trtllm_thoughtx.text.thinking import Thinking

OnToken = Callable[[int, int], None]  # (index of the completion, token id)


class Generation:
    """One batch of requests on its way to completions."""

    def __init__(
        self,
        session: Session,
        text: Text | None,
        eos_ids: Iterable[int],
        requests: Sequence[Request],
        chunk_size: int | str | None,
        on_token: OnToken | None,
    ) -> None:
        self.session, self.text, self.eos_ids, self.on_token = session, text, frozenset(eos_ids), on_token
        for params in dict.fromkeys(request.params for request in requests):
            check(session, text, params)
        self.began = time.perf_counter()
        self.batch, choices = chunks.start(session, [request.prompt for request in requests], chunk_size)
        self.rows = [self._row(index, *asked) for index, asked in enumerate(zip(requests, choices, strict=True))]
        self.sampler = Sampler(
            [request.params for request in requests],
            len(requests),
            streams=[request.stream for request in requests],
            prompts=[row.prompt for row in self.rows],
        )
        self.drafter, self.timer = self._drafter()

    def run(self) -> list[Completion]:
        stats = self.session.stats
        self._offer(self.session.prefill(self.batch, [row.prompt for row in self.rows])[:, None])
        prefilled = time.perf_counter()
        while True:
            self._probe(self.rows)
            new = [self._write(row) for row in self.rows]
            while held := [row for row in self.rows if row.is_held]:  # a step ended among drafts, and probes come first
                self._probe(held)
                for row in held:
                    new[row.index] = self._write(row)
            if not any(row.is_live for row in self.rows):
                break
            self._feed(new)
        stats.prefill_seconds += prefilled - self.began
        stats.decode_seconds += time.perf_counter() - prefilled
        stats.num_prefilled += sum(len(row.request.prompt) for row in self.rows)
        stats.num_decoded += sum(max(0, len(row.output) - 1) for row in self.rows)
        return [row.completion(self.batch.layer_tokens[row.index]) for row in self.rows]

    def _row(self, index: int, request: Request, choice: Choice | None) -> Row:
        build, params = self.session.build, request.params
        row = Row(index, request, list(request.prompt), choice, self.eos_ids, build.max_seq_len)
        row.reason = None if params.max_new_tokens else "length"
        row.thought = self._thought(row)
        row.exit_threshold = build.exit_threshold if isinstance(params.exit_threshold, str) else params.exit_threshold
        if self.text is not None and (params.stop or params.stop_token_ids):
            row.stream = self.text.stop_stream(params)
        return row

    def _thought(self, row: Row) -> Thinking | None:
        """Follows the row's thinking. A thinking that must not begin is closed in the prompt."""
        text, params, stop = self.text, row.params, None
        prompt = row.request.prompt  # which knows how its template closes a thinking: no list does
        if text is None or text.think_ids is None:
            return None
        if row.choice is not None and row.choice.single_step:
            stop = thinking.SINGLE_STEP
        elif params.thinks_nothing:
            stop = thinking.DEPTH if params.max_reasoning_depth == 0 else thinking.TOKENS
        if stop is not None:
            closed = opening.closed(text, prompt)
            if len(closed) < self.session.build.max_seq_len:
                prompt, row.prompt = closed, list(closed)
                fed = self.batch.tokens[row.index]
                same = next((i for i, pair in enumerate(zip(fed, closed, strict=False)) if pair[0] != pair[1]), len(fed))
                self.session.stats.num_read_again += len(fed) - same
                self.batch.forget(row.index, same)
            elif params.thinks_nothing:
                row.reason = "capacity"
        thought = Thinking(text, prompt, params)
        if stop is not None and thought.state == thinking.BEFORE:
            thought.stop = stop
        return thought

    def _drafter(self) -> tuple[Drafter | None, Timer]:
        build, policies = self.session.build, {row.params.exit_policy for row in self.rows}
        if policies == {OFF} or not build.draft_layers:
            return None, Timer(None)
        calibrated = build.draft_thresholds[0]
        usual = [max(TRUSTED, calibrated) if row.params.exit_policy == TRUST else calibrated for row in self.rows]
        given = [row.params.draft_threshold for row in self.rows]
        thresholds = [default if value is None else value for default, value in zip(usual, given, strict=True)]
        pace = self.session.paces.setdefault(len(self.rows), Pace()) if policies <= {AUTO, OFF} else None
        return Drafter(self.session, self.batch, thresholds), Timer(pace)

    def _feed(self, new: list[list[int]]) -> None:
        """Feed the tokens just written, with drafts behind them where these pay."""
        if self.drafter is None or not self.timer.start(sum(len(row.output) for row in self.rows), sum(map(bool, new))):
            for row in self.rows:
                row.drafts = []
            self._offer(self.session.step(self.batch, new, [[0]] * len(new)))
            return
        most = [row.max_drafts if fed else 0 for row, fed in zip(self.rows, new, strict=True)]
        drafts, logits, exit_probs = self.drafter.cycle(new, most, self.sampler.guess)
        for row, drafted in zip(self.rows, drafts, strict=True):
            row.drafts = drafted
        self._offer(logits, exit_probs)

    def _offer(self, logits: np.ndarray, exit_probs: np.ndarray | None = None) -> None:
        """What each row may be written from next: logits [B, W, V], behind the last token fed and each draft, and what the exit head says
        there (copied: the tokens of probes change what the batch holds)."""
        self.logits = logits
        self.exit_probs = self.batch.exit_probs[:, None].copy() if exit_probs is None else exit_probs
        for row in self.rows:
            row.num_used = 0

    def _write(self, row: Row) -> list[int]:
        """Write tokens of a row as far as its logits reach; the one that is to be fed, none when the row has ended or is held."""
        row.is_held = False
        while row.is_live:
            place, drafts = row.num_used, row.drafts
            logits = self.logits[row.index, place]
            picked = int(self.sampler.pick(logits[None], [row.index])[0])
            if place < len(drafts) and row.params.exit_policy == TRUST:
                picked = drafts[place]
            token = row.next_token(picked, self.exit_probs[row.index, place, READY])
            row.append(token, logits)
            row.num_used += 1
            self.sampler.note(row.index, token)
            if self.on_token:
                self.on_token(row.request.index, token)
            is_accepted = row.is_live and place < len(drafts) and token == drafts[place]
            self.session.stats.num_accepted += is_accepted
            if not is_accepted:
                self._take_back(row, len(drafts) - place)
                return [token] if row.is_live else []
            if row.awaits_probe:
                self._take_back(row, len(drafts) - place - 1)
                row.is_held = True
                return []
        return []

    def _take_back(self, row: Row, num_drafts: int) -> None:
        """The last drafts of a row will not be written."""
        if num_drafts:
            self.batch.forget(row.index, len(self.batch.tokens[row.index]) - num_drafts)
        row.drafts = row.drafts[: len(row.drafts) - num_drafts]

    def _probe(self, rows: Sequence[Row]) -> None:
        """Ask those of the rows that ended a step for their answers. Rows that ask alike are probed together."""
        asked: dict[tuple[int, frozenset[int]], dict[int, list[int]]] = {}  # tokens of a probe and what ends it -> closings by row
        for row in self.rows:
            row.is_settled = False
        for row in rows:
            if row.thought is None or not row.can_probe:
                continue
            closing, num_tokens = row.thought.closing(), row.params.probe_tokens
            if len(closing) + num_tokens <= probe.room(self.batch, row.index):
                asked.setdefault((num_tokens, row.stop_ids), {})[row.index] = closing
            else:
                row.probes.num_skipped += 1
        for (num_tokens, ends), closings in asked.items():
            for index, (answer, confidence) in probe.ask(self.session, self.batch, closings, num_tokens, ends).items():
                row, said = self.rows[index], self.text.decode(answer) if self.text else ""
                threshold, agree = row.params.exit_probe or 0.0, row.params.probe_agree
                row.is_settled = row.probes.settles(answer, confidence, said, threshold=threshold, num_agreeing=agree)


def check(session: Session, text: Text | None, params: GenerationParams) -> None:
    """E122 for settings that this engine cannot follow, before any work."""
    where, flags = str(session.directory.root), params.thinking_flags
    if params.stop and text is None:
        why, fix = (
            "the engine was built without a tokenizer",
            "give ids (thoughtx-run --stop_token_ids), or build from a checkpoint with a tokenizer.json",
        )
        raise ThoughtxError("E122", "--stop needs a tokenizer", where=where, why=why, fix=fix)
    if flags and (text is None or text.think_ids is None):
        what = ", ".join(f"--{name}" for name in flags)
        why = "neither the tokenizer nor the chat template has them" if text else "the engine was built without a tokenizer"
        fix = f"leave {what} out, or build from a checkpoint whose tokenizer files have the tags"
        raise ThoughtxError("E122", f"{what} needs thinking tags", where=where, why=why, fix=fix)
    if params.exit_threshold is not None and not session.build.exit_head:
        why = "its checkpoint carried no exit head when it was built"
        fix = "use --exit_probe, which needs none, or fit one (thoughtx-calibrate --fit_exit_head) and build again"
        raise ThoughtxError("E122", "--exit_threshold needs an exit head, and this engine has none", where=where, why=why, fix=fix)
    check_policy(session, params.exit_policy)
    if params.exit_probe is not None and text is not None and text.think_ids is not None:
        probe.check_room(session, len(text.think_ids[1]) + params.probe_tokens)
