"""Whether an answer is right: what is taken from what was said, and how it is compared with the answers that count.

`exact` compares texts but for whitespace; `normalized` as SQuAD does (case, punctuation, articles and whitespace apart); `contains`
looks for the words of an accepted answer, in their order, in what was said; `last_number` takes the last number of it, `choice` the
letter of an option (or, where the prompt lists them, its text), `boxed` the last \\boxed{...}. Without a choice of the user the form of
the accepted answers decides.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from trtllm_thoughtx.errors import shown
from trtllm_thoughtx.evaluate.statistics import word_f1

EXACT, NORMALIZED, CONTAINS, LAST_NUMBER, CHOICE, BOXED = MATCHES = ("exact", "normalized", "contains", "last_number", "choice", "boxed")
NUMBER = re.compile(r"(?<![\w.])[-+]?\$?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d{1,3})?|(?<![\w.])[-+]?\.\d+")
OPPOSITES = (("yes", "no"), ("true", "false"))
# The letter of an option, the surest sign first: behind a word that announces it, marked as one, or alone. `A` and `I` are words, too.
LETTERS = (
    re.compile(r"(?i:\b(?:answer|option|choice)\b)(?:\s+(?i:is))?\s*:?\s*[*(\[\"']*([A-Z])\b"),
    re.compile(r"(?:^|[\s*(\[\"'])([A-Z])(?=[.):,\]*\"']|\s*$)"),
    re.compile(r"(?<![\w'])([B-HJ-Z])(?![\w'])"),
)


OPTION = re.compile(r"(?:^|(?<=\s))\(?([A-Z])[.):]\s+(\S.*?)(?=\s+\(?[A-Z][.):]\s|\s*$)", re.MULTILINE)


def options_of(prompt: str) -> dict[str, str]:
    """Letter and text of the options that a question lists ("A. red", "(B) blue", ...): the last list of it, if it has several."""
    found: dict[str, str] = {}
    for letter, text in OPTION.findall(prompt):
        if letter == "A":
            found = {}
        if letter == chr(ord("A") + len(found)):
            found[letter] = text
    return found if len(found) > 1 else {}


def accepted_answers(value: Any) -> tuple[str, ...]:
    """Of a row's `answer`: a text, a number, or a list of them that all count. ValueError for anything else."""
    found = []
    for one in value if isinstance(value, list) else [value]:
        if isinstance(one, bool) or not isinstance(one, (str, int, float)) or not (text := " ".join(str(one).split())):
            raise ValueError(f"answer must be a text, a number or a list of them, none empty, not {shown(value, 40)}")
        found.append(text)
    if not found:
        raise ValueError("answer must not be an empty list")
    return tuple(found)


def match_for(accepted: Sequence[str]) -> str:
    """How answers of this form are compared unless the user says."""
    if all(r"\boxed{" in one for one in accepted):
        return BOXED
    if all(NUMBER.fullmatch(one) for one in accepted):
        return LAST_NUMBER
    if all(re.fullmatch(r"\(?[A-Z][).]?", one) for one in accepted):
        return CHOICE
    return CONTAINS if all(normalized(one) for one in accepted) else EXACT


def check_match(match: str, accepted: Sequence[str]) -> None:
    """ValueError for accepted answers that cannot be compared so."""
    needs = {LAST_NUMBER: ("a number", _number), CHOICE: ("the letter of an option", _letter), NORMALIZED: ("a word", normalized)}
    wanted, read = needs.get(match, needs[NORMALIZED] if match == CONTAINS else ("a text", str))
    wrong = [one for one in accepted if read(one) in (None, "")]
    if wrong:
        raise ValueError(f"answer {shown(wrong[0], 40)} does not go with the match {match}, which needs {wanted}")


def judge(match: str, said: str, accepted: Sequence[str], prompt: str = "") -> tuple[bool, float]:
    """Whether `said` is right, and its F1 with the accepted answer that it is nearest to: over words as `normalized` leaves them; numbers,
    letters and boxed answers are right or wrong. `prompt` may list the options of a choice."""
    inner = boxed(said)
    if match == BOXED:
        right = inner is not None and any(_same(inner, boxed(one) or one) for one in accepted)
        return right, float(right)
    said = " ".join(said.split()) if inner is None else inner
    if match == EXACT:
        return said in accepted, max(word_f1(said.split(), one.split()) for one in accepted)
    if match in (LAST_NUMBER, CHOICE):
        found = _number(said) if match == LAST_NUMBER else _choice(said, options_of(prompt))
        right = found is not None and found in map(_number if match == LAST_NUMBER else _letter, accepted)
        return right, float(right)
    words, wanted = normalized(said).split(), [normalized(one).split() for one in accepted]
    right = words in wanted if match == NORMALIZED else any(_contains(words, one) for one in wanted)
    return right, max(word_f1(words, one) for one in wanted)


def normalized(answer: str) -> str:
    """SQuAD's form of an answer: lower case, no punctuation, no articles, single spaces."""
    plain = "".join(c for c in answer.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def boxed(said: str) -> str | None:
    """What the last \\boxed{...} holds, braces inside it included; None without one."""
    at = said.rfind(r"\boxed{")
    while at >= 0:
        begin = at + len(r"\boxed{")
        depth = 1
        for end in range(begin, len(said)):
            depth += {"{": 1, "}": -1}.get(said[end], 0)
            if depth == 0:
                return said[begin:end].strip()
        at = said.rfind(r"\boxed{", 0, at)
    return None


def _number(said: str) -> Decimal | None:
    found = NUMBER.findall(said)
    return Decimal(found[-1].replace(",", "").replace("$", "")) if found else None


def _letter(said: str) -> str | None:
    bare = said.strip(string.punctuation + string.whitespace)
    if len(bare) == 1 and bare.isascii() and bare.isalpha():
        return bare.upper()
    announced = LETTERS[0].findall(said)
    if announced:
        return announced[-1]
    return next((found[0] for form in LETTERS[1:] if (found := form.findall(said))), None)


def _choice(said: str, options: Mapping[str, str]) -> str | None:
    """The letter that was said, else the one of the only option whose text was. A letter inside an option's text is none."""
    rest, named = said, set[str]()
    for letter, text in sorted(options.items(), key=lambda option: -len(option[1])):  # "red wine" before "red"
        form = re.compile(rf"(?<!\w){re.escape(text.rstrip('.'))}(?!\w)", re.IGNORECASE)
        if len(text) > 1 or text.isdecimal():
            rest, num = form.subn("\0", rest)
            named |= {letter} if num else set()
    return _letter(rest) or (named.pop() if len(named) == 1 else None)


def _same(one: str, other: str) -> bool:
    one, other = "".join(one.split()), "".join(other.split())
    return one == other or (NUMBER.fullmatch(one) is not None and NUMBER.fullmatch(other) is not None and _number(one) == _number(other))


def _contains(words: Sequence[str], wanted: Sequence[str]) -> bool:
    for pair in OPPOSITES:
        if len(wanted) == 1 and wanted[0] in pair:  # "no, it is not, yes ..." holds both: the first is the answer
            return next((word for word in words if word in pair), None) == wanted[0]
    return any(list(words[at : at + len(wanted)]) == list(wanted) for at in range(len(words) - len(wanted) + 1))
