"""From messages to the prompt text: chat templates, rendered at arm's length.

`ChatTemplate.render` hands the template to the program in `render.py`, started on first use and kept for the next prompts
(the start costs 0.1 s, a prompt 0.2 ms). That process has half a second of processor time for each prompt, 512 MiB, and
4 Mi characters of output; when it dies, the answer is E112 and the next call starts another. What the template itself
refuses, say two user messages in a row, is E140: there the prompt is at fault.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trtllm_thoughtx.errors import ThoughtxError, shown
from trtllm_thoughtx.strictjson import parse_json
from trtllm_thoughtx.text.render import CPU_SECONDS

WALL_SECONDS = 20.0  # of one rendering, start of the process included; processor time is bounded far below
REPLY_BYTES = 64 << 20
RESERVED = ("messages", "tools", "documents", "add_generation_prompt")
REASONING = ("reasoning_content", "thinking", "reasoning")  # names in use for a message's reasoning, preferred first


class ChatTemplate:
    """One template and its process. `where` names the file it came from. Safe to call from several threads."""

    def __init__(self, source: str, where: str) -> None:
        self.source, self.where = source, where
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._end: Callable[[], object] = bool
        self._owner = 0

    def render(self, **args: Any) -> str:
        """The rendered text. `args` are plain JSON values; E112 for a bad template, E140 for what the template refuses."""
        request = json.dumps({"template": self.source, "args": args}).encode("ascii") + b"\n"
        with self._lock:
            reply = self._ask(request)
        if "refused" in reply:
            raise ThoughtxError(
                "E140",
                f"the chat template refuses these messages: {shown(reply['refused'])}",
                where="the prompt",
                why=f"{self.where} raises this itself",
                fix="bring the messages into the order and roles that the template allows",
            )
        if "error" in reply:
            raise self._bad(shown(reply["error"]))
        return reply["text"]

    def _ask(self, request: bytes) -> dict[str, str]:
        if self._process is None or self._owner != os.getpid():  # after a fork the pipes belong to the parent
            self._process, self._owner = _start(), os.getpid()
            self._end = weakref.finalize(self, _stop, self._process, self._owner)
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        line = None
        try:
            process.stdin.write(request)
            process.stdin.flush()
            line = _read_line(process.stdout.fileno(), time.monotonic() + WALL_SECONDS)
        except BrokenPipeError:
            pass
        finally:
            if line is None:  # also on Ctrl-C: a late reply must not answer the next request
                self._process = None
                self._end()
        if line is None:
            is_slow = process.returncode in (-signal.SIGPROF, -signal.SIGKILL)
            raise self._bad(
                f"it takes more than {CPU_SECONDS} s of processor time" if is_slow else "it ended the process that renders it (memory?)"
            )
        return json.loads(line)

    def _bad(self, what: str) -> ThoughtxError:
        return ThoughtxError(
            "E112",
            f"the chat template cannot be rendered: {what}",
            where=self.where,
            why="templates run in a sandbox, with bounds on time, memory and output",
            fix="correct the template, or give token ids, which need none: thoughtx-run --input_ids",
        )


def template_settings(enable_thinking: object, kwargs: object, where: str, code: str = "E001") -> dict[str, Any]:
    """The variables that a user gives a template, by the names that flags and lines have: true or false, and JSON as text or object."""
    given: Any = parse_json(kwargs.encode(), where, code) if isinstance(kwargs, str) else {} if kwargs is None else kwargs
    switch = {"true": True, "false": False}.get(str(enable_thinking).lower())
    problem = None
    if not isinstance(given, dict):
        problem = f"chat_template_kwargs must be a JSON object, not {shown(given, 60)}"
    elif taken := [name for name in RESERVED if name in given]:
        problem = f"chat_template_kwargs cannot set {taken[0]}: the run itself does"
    elif enable_thinking is not None and switch is None:
        problem = f"enable_thinking must be true or false, not {shown(enable_thinking, 60)}"
    elif switch is not None and given.get("enable_thinking", switch) != switch:
        problem = "enable_thinking and chat_template_kwargs contradict each other"
    if problem:
        why, fix = "the chat template is rendered with these variables", 'give an object such as {"enable_thinking": false}'
        raise ThoughtxError(code, problem, where=where, why=why, fix=fix)
    return {**given, **({} if switch is None else {"enable_thinking": switch})}


def plain_messages(messages: object, where: str) -> list[dict[str, Any]]:
    """Messages as a template sees them in transformers: null fields dropped, reasoning under all its names. E140 when malformed."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise _bad_messages("messages must be a list with at least one message", where)
    plain = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise _bad_messages(f"message {i} must be an object with a role", where)
        if not isinstance(message.get("content"), (str, list, type(None))):
            raise _bad_messages(f"message {i}: content must be a text or a list of parts", where)
        kept = {key: value for key, value in message.items() if value is not None}
        reasoning = next((kept[key] for key in REASONING if key in kept), None)
        plain.append(kept if reasoning is None else {"thinking": reasoning, **kept, "reasoning_content": reasoning})
    try:
        json.dumps(plain, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:  # UnicodeEncodeError is a ValueError
        raise _bad_messages(f"messages must be plain JSON values and valid Unicode: {shown(str(error))}", where) from None
    return plain


def text_messages(messages: object, where: str) -> tuple[dict[str, Any], ...]:
    """`plain_messages` of a user's line: contents that are lists of parts become their texts, a line each; ValueError names a part that
    is no text."""
    plain = plain_messages(messages, where)
    for i, message in enumerate(plain):
        parts = message.get("content")
        if isinstance(parts, list):
            for part in parts:
                kind = part.get("type") if isinstance(part, dict) else part
                if kind != "text" or not isinstance(part.get("text"), str):
                    raise ValueError(f"message {i} has a part of type {shown(kind, 40)}; only text is read")
            message["content"] = "\n".join(part["text"] for part in parts)
    return tuple(plain)


def _bad_messages(what: str, where: str) -> ThoughtxError:
    return ThoughtxError(
        "E140", what, where=where, why="a chat is a list of role and content", fix='for example [{"role": "user", "content": "Hello"}]'
    )


def _start() -> subprocess.Popen[bytes]:
    specs = [importlib.util.find_spec(name) for name in ("jinja2", "markupsafe")]
    places = [str(Path(spec.origin).parents[1]) for spec in specs if spec is not None and spec.origin]
    try:
        if len(places) < len(specs):
            raise OSError("jinja2 is not installed")
        return subprocess.Popen(
            [sys.executable, "-I", str(Path(__file__).with_name("render.py")), *dict.fromkeys(places)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for this process
        )
    except OSError as error:
        raise ThoughtxError(
            "E201",
            f"chat templates cannot be rendered: {shown(str(error))}",
            where=shown(sys.executable or "no Python executable"),
            why="templates are rendered with jinja2 by a Python process of their own",
            fix="pip install jinja2, or give token ids, which need none: thoughtx-run --input_ids",
        ) from None


def _stop(process: subprocess.Popen[bytes], owner: int) -> None:
    """End the process and collect its status. In a fork it is not ours to end."""
    if owner != os.getpid():
        return
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(BrokenPipeError):
            if pipe is not None:
                pipe.close()


def _read_line(fd: int, deadline: float) -> bytes | None:
    """One line, or None when the pipe closes, the deadline passes or the line is too long."""
    blocks: list[bytes] = []
    size = 0
    while size <= REPLY_BYTES and select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
        block = os.read(fd, 1 << 16)
        if not block:
            return None
        blocks.append(block)
        size += len(block)
        if block.endswith(b"\n"):
            return b"".join(blocks)
    return None
