"""Requests on their way to completions, over the slots of one engine: they come and go between ticks, and every request gets the tokens
that it gets alone.

A tick (`scheduler`) feeds each running row the token that it wrote last, all rows in one call, and each row writes the next one (more where
drafts are accepted; what a row writes is its own affair, see `row`). Then one segment of one prompt is fed, in a call of its own.
Upkeep of bounded caches, probes and drafts are calls of one row. So no call has padding, and none holds tokens of a row whose sums could
depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from time import perf_counter as clock

from trtllm_thoughtx.checkpoint.exits import READY
from trtllm_thoughtx.config import AUTO
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.runtime import chunks, drafts, lookup, probe
from trtllm_thoughtx.runtime.batch import Batch
from trtllm_thoughtx.runtime.chunks import Choice
from trtllm_thoughtx.runtime.completion import Completion
from trtllm_thoughtx.runtime.drafts import MAX_DRAFTS, OFF, TRUST, TRUSTED, Drafter, check_policy
from trtllm_thoughtx.runtime.row import SCORED, Request, Row
from trtllm_thoughtx.runtime.scheduler import Scheduler
from trtllm_thoughtx.runtime.session import Session
from trtllm_thoughtx.runtime.slots import Slots
from trtllm_thoughtx.text import opening, thinking
from trtllm_thoughtx.text.params import GenerationParams
from trtllm_thoughtx.text.text import Text
from trtllm_thoughtx.text.thinking import Thinking

PREFILL_SEGMENT = 512  # tokens of a prompt that one tick takes
CANCELLED, DONE = "cancelled", object()
OnToken = Callable[[int, int], object]  # (number of the request, token id); a true result cancels it
Outcome = Completion | ThoughtxError


class Generation:
    """Holds the KV cache of its session. `add` and `cancel` at any time between ticks; `tick` returns who has ended."""

    def __init__(
        self,
        session: Session,
        text: Text | None,
        eos_ids: Iterable[int],
        num_slots: int,
        on_token: OnToken | None = None,
        *,
        prefill_segment: int = PREFILL_SEGMENT,
        fills_first: bool = False,
        reuses: bool = True,
    ) -> None:
        self.session, self.text, self.eos_ids, self.on_token = session, text, frozenset(eos_ids), on_token
        self.segment = min(prefill_segment, session.build.max_input_len)
        self.slots = Slots(session, num_slots, self.segment, reuses=reuses)
        self.scheduler = Scheduler(num_slots, fills_first=fills_first, choose_slot=self._choose_slot)
        self.rows: dict[int, Row] = {}
        self.drafter = Drafter(session) if session.build.draft_layers else None
        self._filling: Generator[None, None, None] | None = None
        self._ended: list[tuple[int, Outcome]] = []

    @property
    def is_idle(self) -> bool:
        return self.scheduler.is_idle

    def add(self, request: Request) -> None:
        """E122 for one that the engine cannot follow."""
        check_request(self.session, self.text, request)
        assert request.index not in self.rows, request.index
        self.rows[request.index] = self._row(request)
        self.scheduler.add(request.index, request.priority)

    @property
    def kv_usage(self) -> float:
        """Part of the KV cache that requests use now."""
        batch, build = self.slots.batch, self.session.build
        taken = [slot for index in [*self.rows] if (slot := self.scheduler.slot_of(index)) is not None]
        return sum(min(int(batch.used[slot]), build.kv_capacity) for slot in taken) / (self.slots.num_slots * build.kv_capacity)

    def has_begun(self, index: int) -> bool:
        """It has a slot."""
        return self.scheduler.slot_of(index) is not None

    def cancel(self, index: int) -> Completion | None:
        """What there is of a request, whose slot is free now; None when there is no such request any more."""
        row = self.rows.get(index)
        if row is None:
            return None
        row.reason = row.reason or CANCELLED
        done = self._completion(index)
        self._leave(index)
        return done

    def tick(self) -> list[tuple[int, Outcome]]:
        """One step of each running row, and a segment of a prompt; the requests that ended by it."""
        plan, stats, self._ended = self.scheduler.plan(), self.session.stats, []
        began = clock()
        if plan.decode:
            self._decode([self.rows[index] for index in plan.decode])
        decoded = clock()
        if plan.fill is not None:
            self._fill(self.rows[plan.fill])
        stats.decode_seconds += decoded - began
        stats.prefill_seconds += clock() - decoded
        return self._ended

    def _row(self, request: Request) -> Row:
        build, params = self.session.build, request.params
        row = Row(request, request.fed, self.eos_ids, build.max_seq_len)
        row.draft_cost = lookup.cost_of(self.session.config)
        row.exit_threshold = build.exit_threshold if isinstance(params.exit_threshold, str) else params.exit_threshold
        if self.text is not None and (params.stop or params.stop_token_ids):
            row.stream = self.text.stop_stream(params)
        if build.use_chunked_attention and not self._is_chosen(request):
            assert not isinstance(request.chunk_size, str)
            row.choice = Choice(request.chunk_size or build.chunk_size)
        if not self._is_chosen(request):
            row.thought = self._thought(row)
        return row

    def _is_chosen(self, request: Request) -> bool:
        return chunks.is_chosen(self.session.build, request.chunk_size)

    def _thought(self, row: Row) -> Thinking | None:
        """Follows the row's thinking. A thinking that must not begin is closed in the prompt."""
        text, params, stop = self.text, row.params, None
        if row.request.continuations:
            return None
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
            elif params.thinks_nothing:
                row.reason = "capacity"
        thought = Thinking(text, prompt, params)
        if stop is not None and thought.state == thinking.BEFORE:
            thought.stop = stop
        return thought

    # prompts

    def _choose_slot(self, index: int, free: list[int]) -> int:
        row = self.rows[index]
        return self.slots.choose(() if self._is_chosen(row.request) else row.prompt, row.chunk_size, free, row.request.adapter)

    def _fill(self, row: Row) -> None:
        """Feed the next segment of a prompt. When all of it is in, the row runs, and writes its first token."""
        index = row.request.index
        if self._filling is None:
            row.began = clock()
            self._filling = self._segments(row, self._slot(index))
        try:
            if next(self._filling, DONE) is not DONE:
                return
        except ThoughtxError as error:
            self._failed(index, error)
            return
        self._filling = None
        self.slots.exchange(*self.scheduler.filled())
        self.session.stats.num_prefilled += len(row.request.prompt)
        self._advance(row)

    def _segments(self, row: Row, slot: int) -> Generator[None, None, None]:
        """Feeds a prompt; stops between two calls. The slot stays the row's all the time."""
        slots, request = self.slots, row.request
        if self._is_chosen(request):
            slots.empty(slot, None, request.adapter)
            batch = slots.view(slot, slot + 1)
            row.choice = yield from chunks.read(self.session, batch, row.prompt, self.segment)
            row.thought = self._thought(row)
            fed = batch.tokens[0]
            same = next((i for i, pair in enumerate(zip(fed, row.prompt, strict=False)) if pair[0] != pair[1]), len(fed))
            same = min(same, row.first_wanted)
            self.session.stats.num_read_again += len(fed) - same
            batch.forget(0, same)
        elif row.is_live:
            row.num_reused = slots.begin(slot, row.prompt[: row.first_wanted + 1], row.chunk_size, request.adapter)
        else:
            slots.empty(slot, row.chunk_size, request.adapter)
        batch, most = slots.view(slot, slot + 1), self.segment
        if row.first_wanted < len(row.prompt) - 1:
            most = min(most, self.session.runner.max_logit_rows)
        while row.is_live and (rest := row.prompt[len(batch.tokens[0]) :]):
            num = batch.segment(len(rest), most)
            wanted = list(range(max(0, row.first_wanted - len(batch.tokens[0])), num))
            logits, exit_probs = self.session.call(batch, [rest[:num]], [wanted or [num - 1]])
            if wanted:
                row.look_at(logits[0], rest[wanted[0] + 1 : num + 1])
            if not self._is_chosen(request):
                slots.num_filled[slot] = len(batch.tokens[0])
            if num < len(rest):
                yield
            else:
                row.offer([], logits[0, -1:], exit_probs[0, -1:])

    # decoding

    def _decode(self, rows: Sequence[Row]) -> None:
        """Feed each row the token that it wrote last, and let it go on."""
        if len(rows) == 1 or any(self._trusts(row) for row in rows):
            for row in rows:
                self._decode_alone(row)
            return
        logits, exit_probs = self.session.call(self.slots.view(0, len(rows)), [[row.output[-1]] for row in rows], [[0]] * len(rows))
        for place, row in enumerate(rows):
            row.offer([], logits[place], exit_probs[place])
        for row in rows:
            self._advance(row)

    def _trusts(self, row: Row) -> bool:
        """Its answer depends on what is drafted, which must not depend on the other rows."""
        return self.drafter is not None and row.params.exit_policy == TRUST

    def _decode_alone(self, row: Row) -> None:
        """The same for one row, with drafts where there are any and they pay."""
        began, num_before, pace = clock(), len(row.output), self.session.pace
        batch = self._view(row)
        most = min(row.max_drafts, drafts.room(self.session, batch) - 1)
        looks = row.params.prompt_lookup > 0 and not self._trusts(row)
        found = row.lookup.drafts(min(most, row.params.prompt_lookup)) if looks else []
        is_timed = row.params.exit_policy == AUTO
        is_drafted = not found and self._may_draft(row) and (not is_timed or pace.pays())
        if found:
            row.offer(*drafts.verified(self.session, batch, row.output[-1], found))
        elif is_drafted and self.drafter is not None:
            guess = lambda ahead, logits: row.sampler.guess(0, ahead, logits)  # noqa: E731
            row.offer(*self.drafter.cycle(batch, row.output[-1], min(most, MAX_DRAFTS), self._threshold(row), guess))
        else:
            row.offer([], *(values[0] for values in self.session.call(batch, [[row.output[-1]]], [[0]])))
        fed = clock() - began
        self._advance(row)
        num_new = len(row.output) - num_before
        if looks and not is_drafted:
            row.lookup.judge(len(found), num_new - 1)
        if self._may_draft(row) and is_timed and not found:
            pace.note(is_drafted, fed, num_new)

    def _may_draft(self, row: Row) -> bool:
        return self.drafter is not None and row.params.exit_policy != OFF

    def _threshold(self, row: Row) -> float:
        """How confident drafts must be."""
        if row.params.draft_threshold is not None:
            return row.params.draft_threshold
        calibrated = self.session.build.draft_thresholds[0]
        return max(TRUSTED, calibrated) if row.params.exit_policy == TRUST else calibrated

    def _advance(self, row: Row) -> None:
        """Let a row write as far as its logits reach: at its end it has written a token that is not fed yet, or it has ended."""
        index = row.request.index
        if row.request.continuations:
            row.reason = SCORED
        try:
            self._probe(row)
            while row.is_live and self._write(row):
                self._probe(row)
        except ThoughtxError as error:
            self._failed(index, error)
            return
        if not row.is_live:
            self.session.stats.num_decoded += max(0, len(row.output) - 1)
            done = self._completion(index)
            self._leave(index)
            self._ended.append((index, done))

    def _failed(self, index: int, error: ThoughtxError) -> None:
        """E123 is the affair of the request that met it; any other error is the engine's."""
        if error.code != "E123":
            raise error
        self._leave(index)
        self._ended.append((index, error))

    def _write(self, row: Row) -> bool:
        """Write one token; whether there are logits for another one: it was drafted."""
        place = row.num_used
        logits = row.offered[place]
        picked = int(row.sampler.pick(logits[None])[0])
        if place < len(row.drafts) and row.params.exit_policy == TRUST and self.drafter is not None:
            picked = row.drafts[place]
        token = row.next_token(picked, row.exit_probs[place, READY])
        row.append(token, logits)
        row.num_used += 1
        if self.on_token is not None and self.on_token(row.request.index, token):
            row.reason = row.reason or CANCELLED
        is_accepted = row.is_live and place < len(row.drafts) and token == row.drafts[place]
        self.session.stats.num_accepted += is_accepted
        if not is_accepted:
            self._take_back(row, len(row.drafts) - place)
        elif row.awaits_probe:
            self._take_back(row, len(row.drafts) - place - 1)
        return is_accepted

    def _take_back(self, row: Row, num_drafts: int) -> None:
        """The last drafts of a row will not be written."""
        if num_drafts:
            batch = self._view(row)
            batch.forget(0, len(batch.tokens[0]) - num_drafts)
            row.drafts = row.drafts[: len(row.drafts) - num_drafts]

    def _probe(self, row: Row) -> None:
        """Ask a row that ended a step for its answer."""
        row.is_settled = False
        if row.thought is None or not row.can_probe:
            return
        batch, closing = self._view(row), row.thought.closing()
        if len(closing) + row.params.probe_tokens > probe.room(batch):
            row.probes.num_skipped += 1
            return
        answer, confidence = probe.ask(self.session, batch, closing, row.params.probe_tokens, row.stop_ids)
        said, params = self.text.decode(answer) if self.text else "", row.params
        row.is_settled = row.probes.settles(answer, confidence, said, threshold=params.exit_probe or 0.0, num_agreeing=params.probe_agree)

    # slots

    def _slot(self, index: int) -> int:
        slot = self.scheduler.slot_of(index)
        assert slot is not None
        return slot

    def _view(self, row: Row) -> Batch:
        slot = self._slot(row.request.index)
        return self.slots.view(slot, slot + 1)

    def _completion(self, index: int) -> Completion:
        slot = self.scheduler.slot_of(index)
        has_begun = slot is not None and (self._filling is not None or index in self.scheduler.running)
        if not has_begun:
            return self.rows[index].completion(0, 0.0)
        return self.rows[index].completion(int(self.slots.batch.layer_tokens[slot]), clock() - self.rows[index].began)

    def _leave(self, index: int) -> None:
        """Its slot is free."""
        slot = self.scheduler.slot_of(index)
        if slot is not None:
            self.slots.touch(slot)
            if index not in self.scheduler.running:
                self._filling = None
        self.slots.exchange(*self.scheduler.end(index))
        del self.rows[index]


def check_request(session: Session, text: Text | None, request: Request) -> None:
    """E122 for one that this engine cannot follow, before any work."""
    check(session, text, request.params)
    chunks.check(session, request.chunk_size)
    session.check_prompt(request.index, request.fed)
    session.check_adapter(request.adapter)


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
