"""Errors that a user can act on: what, where, why, fix.

Every failure that a user may cause or meet is a `ThoughtxError` with a stable code from `CODES`; the code decides the
exit status. Anything else that escapes is our bug (exit 70). Text that comes from a file (tensor names, paths in JSON)
goes through `shown` first, so that a hostile name cannot write control characters to a terminal or flood a log.
"""

from __future__ import annotations

import enum


class Exit(enum.IntEnum):
    """Exit statuses of every command."""

    OK = 0
    NO = 1  # ran fine, and the answer is no: a parity failure
    USAGE = 2  # bad flag, bad config file
    REFUSED = 3  # input is malformed, unsafe or unsupported
    ENVIRONMENT = 4  # no GPU, package missing, out of memory or disk
    BUG = 70
    INTERRUPTED = 130


# code -> (exit status, one-line meaning). The README lists this table; a test holds the two together.
CODES: dict[str, tuple[Exit, str]] = {
    "E001": (Exit.USAGE, "a flag or its value is wrong"),
    "E002": (Exit.USAGE, "a config file is wrong"),
    "E101": (Exit.REFUSED, "the input path is not what the command needs"),
    "E102": (Exit.REFUSED, "config.json is malformed or has an impossible value"),
    "E103": (Exit.REFUSED, "the model is valid but not supported"),
    "E104": (Exit.REFUSED, "a file name in the input leaves its directory or is not a plain file"),
    "E105": (Exit.REFUSED, "a safetensors file is malformed"),
    "E106": (Exit.REFUSED, "the shards do not agree with their index"),
    "E107": (Exit.REFUSED, "tensors are missing, extra, misshapen or of the wrong type"),
    "E108": (Exit.REFUSED, "weights are not finite numbers, or leave the range of the wanted type"),
    "E109": (Exit.REFUSED, "weights are in a format that is not read (pickle, LFS pointer, HTML)"),
    "E110": (Exit.REFUSED, "the checkpoint wants to run code"),
    "E111": (Exit.REFUSED, "the input changed while it was read"),
    "E112": (Exit.REFUSED, "tokenizer or chat template is malformed"),
    "E120": (Exit.REFUSED, "an engine directory does not match its manifest"),
    "E121": (Exit.REFUSED, "an engine directory is malformed"),
    "E122": (Exit.REFUSED, "the request does not fit the engine's limits"),
    "E123": (Exit.REFUSED, "the engine computed numbers that are not finite"),
    "E124": (Exit.REFUSED, "an engine directory is not signed by the given key, or not as it was signed"),
    "E125": (Exit.REFUSED, "a key cannot be used to sign or verify"),
    "E130": (Exit.REFUSED, "the output path cannot be used"),
    "E140": (Exit.REFUSED, "a prompt or prompts file is malformed"),
    "E150": (Exit.REFUSED, "a golden file is malformed or belongs to another model"),
    "E160": (Exit.REFUSED, "a result file is malformed or belongs to other items"),
    "E161": (Exit.REFUSED, "training data has rows that cannot be used"),
    "E162": (Exit.NO, "training stopped: the loss is not a number"),
    "E163": (Exit.USAGE, "a training setting is wrong"),
    "E164": (Exit.REFUSED, "calibration data has rows that cannot be used"),
    "E165": (Exit.REFUSED, "a layer computes numbers that are not finite on the calibration data"),
    "E166": (Exit.REFUSED, "the KV cache of the model loses too much in the asked precision"),
    "E201": (Exit.ENVIRONMENT, "a package that this step needs is not installed"),
    "E202": (Exit.ENVIRONMENT, "no GPU that can run this engine"),
    "E203": (Exit.ENVIRONMENT, "not enough disk space"),
    "E204": (Exit.ENVIRONMENT, "not enough memory"),
    "E205": (Exit.ENVIRONMENT, "the backend failed, building or running"),
    "E206": (Exit.ENVIRONMENT, "the file system refused an operation"),
    "E207": (Exit.ENVIRONMENT, "the server does not take the request: no key, no such path, full, too late, or shutting down"),
}


class ThoughtxError(Exception):
    """A refusal with its four parts. `code` is a key of `CODES`."""

    def __init__(self, code: str, what: str, *, where: str, why: str, fix: str) -> None:
        assert code in CODES, code
        super().__init__(f"[{code}] {what}")
        self.code, self.what, self.why, self.fix = code, what, why, fix
        self.where = shown(where, 400)  # nearly always a path, which may hold anything

    @property
    def exit(self) -> Exit:
        return CODES[self.code][0]

    def at(self, where: str) -> ThoughtxError:
        """The same at another place, such as the line of a file."""
        return ThoughtxError(self.code, self.what, where=where, why=self.why, fix=self.fix)

    def as_dict(self) -> dict[str, str]:
        return {"code": self.code, "what": self.what, "where": self.where, "why": self.why, "fix": self.fix}

    def render(self) -> str:
        """The four-part message for a terminal, no trailing newline."""
        return f"error[{self.code}]: {self.what}\n  where: {self.where}\n  why:   {self.why}\n  fix:   {self.fix}"


def shown(value: object, limit: int = 200) -> str:
    """Text from an untrusted file, made safe to print: control and non-ASCII characters escaped, cut at `limit`."""
    text = value if isinstance(value, str) else repr(value)
    safe = "".join(c if c.isprintable() and c.isascii() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
    return safe if len(safe) <= limit else f"{safe[:limit]}... ({len(safe)} characters)"


def counted(num: int, noun: str) -> str:
    """1 question, 2 questions."""
    return f"{num} {noun}{'s' * (num != 1)}"


def listed(items: list[str], limit: int = 20) -> str:
    """All findings at once, one per line; past `limit` a count of the rest."""
    rest = len(items) - limit
    return "\n           ".join(items[:limit] + ([f"... and {rest} more"] if rest > 0 else []))
