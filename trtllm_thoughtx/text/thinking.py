"""Where an answer's thinking stands: its steps, its tokens, and when a budget ends it.

A chain of thought is the text between the thinking tags; its steps are parted by blank lines. Tags of one token are known by their
id. Others are known by their text, because a tokenizer may join their ends with what stands beside them (`.</` `think` `>\\n`), and so
are the blank lines. A budget is exact: no token is written that would begin a step or a thinking token beyond it. Where a cut falls
behind the beginning of an end tag that the model was writing, the rest of that tag is written, not another one.

    end          the model ended its thinking
    depth        --max_reasoning_depth was reached
    tokens       --max_thinking_tokens was reached
    head, probe  a step ended, and the exit head, or a probe answer, said that the answer is known
    single_step  the thinking was closed before it began
    cut          the answer itself ended inside the thinking
"""

from __future__ import annotations

from collections.abc import Sequence

from trtllm_thoughtx.text.opening import BEFORE, BEHIND, INSIDE, state_of
from trtllm_thoughtx.text.params import GenerationParams
from trtllm_thoughtx.text.tokens import Tokens

END, DEPTH, TOKENS, HEAD, PROBE, SINGLE_STEP, CUT = "end", "depth", "tokens", "head", "probe", "single_step", "cut"
WINDOW = 32  # tokens that are decoded again with each new one; a tag has at most that many
STEP_BOUNDARY = "\n\n"


class Thinking:
    """Follows one answer token by token. `text` must have thinking tags (`text.think_ids`)."""

    def __init__(self, text: Tokens, prompt: Sequence[int], params: GenerationParams) -> None:
        assert text.think_ids is not None
        self.text, self.tags = text, text.think_ids
        self.words = [text.decode(ids, skip_special=False) for ids in self.tags]
        self.max_steps, self.max_tokens = params.max_reasoning_depth, params.max_thinking_tokens
        self.num_ended = 0  # steps that a blank line ended
        self.num_tokens = 0
        self.stop: str | None = None
        self._window: list[int] = []  # tokens since the last boundary or tag, at most WINDOW
        self._carry = ""  # text behind a boundary that the boundary's own token holds
        self._has_text = False  # the current step holds more than blanks
        self._num_begun = 0  # tokens of the end tag that were written before `closing`
        self.state = INSIDE if state_of(text, prompt) == INSIDE else BEFORE
        self.was_open = self.state == INSIDE
        self.is_step_end = self.state == INSIDE  # the last token ended a step, or the first step comes next

    @property
    def num_steps(self) -> int:
        """Steps so far, the current one included once it holds text."""
        return self.num_ended + self._has_text

    @property
    def budget_spent(self) -> str | None:
        """Which budget is spent, so that the end tag must follow."""
        if self.state != INSIDE:
            return None
        if self.max_steps is not None and self.num_ended >= self.max_steps:
            return DEPTH
        return TOKENS if self.max_tokens is not None and self.num_tokens >= self.max_tokens else None

    def admits(self, token: int) -> bool:
        """False when `token` would end the last step of the budget and begin another: it must not be written."""
        if self.state != INSIDE or self.max_steps is None or self.num_ended + 1 < self.max_steps or token == self._single(1):
            return True
        rest = self._behind_boundary(self._carry + self.text.decode([*self._window, token], skip_special=False))
        return rest is None or not rest.strip() or self.words[1].startswith(rest.strip())

    def is_end_tag(self, token: int) -> bool:
        return self.state == INSIDE and token == self._single(1)

    def push(self, token: int) -> None:
        """A token of the answer was written."""
        self.is_step_end = False
        if self.state != INSIDE:
            if self._meets(token, 0):
                self._enter(INSIDE)
            return
        self.num_tokens += 1
        if self._meets(token, 1):
            self._leave(END)
            return
        seen = self._seen()
        rest = self._behind_boundary(seen)
        if rest is None and seen.strip():
            self._has_text = True
        elif rest is None and not self._has_text:
            self._window, self._carry = [], ""
        elif rest is not None:
            self.num_ended += 1
            self.is_step_end = True
            self._window, self._carry, self._has_text = [], rest, bool(rest.strip())

    def closing(self) -> list[int]:
        """Ids that end the thinking from here: the end tag, or what is missing of one that was begun."""
        ids, word = list(self.tags[1]), self.words[1]
        self._num_begun = 0
        if len(ids) == 1 or self.state != INSIDE:
            return ids
        seen = self._seen()
        begun = next((num for num in range(len(word) - 1, 0, -1) if seen.endswith(word[:num])), 0)
        if not begun:
            return ids
        num_before = self._num_until(len(seen) - begun)
        self._num_begun = len(self._window) - num_before
        known = self._window[num_before:]
        return ids[len(known) :] if ids[: len(known)] == known else self.text.encode(word[begun:], add_special=False)

    def end(self, why: str) -> None:
        """The tokens of `closing` were written."""
        seen = self._seen()
        self._trim(len(self._window) - self._num_begun, seen, len(seen) if not self._num_begun else seen.rfind(self.words[1][:1]))
        self._leave(why)

    def finish(self) -> None:
        """No token follows."""
        if self.state == INSIDE and self.stop is None:
            self.stop = CUT

    def _single(self, which: int) -> int | None:
        return self.tags[which][0] if len(self.tags[which]) == 1 else None

    def _meets(self, token: int, which: int) -> bool:
        """Whether a tag is complete with `token`, which joins the window. Tokens of an end tag are no thinking."""
        self._window = [*self._window, token][-WINDOW:]
        if len(self.tags[which]) == 1:
            if token == self.tags[which][0]:
                self.num_tokens -= which
                return True
            return False
        seen = self._seen()
        at = seen.find(self.words[which])
        if at >= 0 and which == 1:
            self._trim(self._num_until(at), seen, at)
        return at >= 0

    def _seen(self) -> str:
        return self._carry + self.text.decode(self._window, skip_special=False)

    def _num_until(self, at: int) -> int:
        """How many tokens of the window end at or before the character `at` of what was seen."""
        lengths = (len(self._carry + self.text.decode(self._window[:num], skip_special=False)) for num in range(len(self._window), -1, -1))
        return next(num for num, length in zip(range(len(self._window), -1, -1), lengths, strict=True) if length <= at or not num)

    def _trim(self, num_before: int, seen: str, at: int) -> None:
        """The window's tokens behind the first `num_before`, and its text from `at`, belong to an end tag and are no thinking."""
        self.num_tokens -= len(self._window) - num_before
        if len(self._window) < WINDOW:  # else the step is longer than the window, and has text before it
            self._has_text = bool(seen[:at].strip())

    def _behind_boundary(self, seen: str) -> str | None:
        """What stands behind the blank line that ends the current step; None when there is none."""
        lead = len(seen) - len(seen.lstrip())  # blanks before the first word end nothing
        at = seen.find(STEP_BOUNDARY, 0 if self._has_text and lead == len(seen) else lead)
        return None if at < 0 else seen[at + len(STEP_BOUNDARY) :]

    def _enter(self, state: str) -> None:
        self.state, self.stop, self.is_step_end = state, None, False
        self._window, self._carry = [], ""

    def _leave(self, why: str) -> None:
        self.num_ended, self._has_text, self.is_step_end = self.num_steps, False, False
        self._enter(BEHIND)
        self.stop = why
