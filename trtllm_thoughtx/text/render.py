"""The program that renders chat templates, run by `chat.py` as a process of its own.

A chat template is a program from a checkpoint, and jinja2's sandbox bounds what it can reach but not what it can burn: nested
loops, doubling strings or a shared list printed forty levels deep never come back. Here the kernel bounds the processor
time and the memory, so that the caller only ever loses this process. It imports nothing of the package.

One JSON object per line in, {"template", "args"}; one per line out, {"text"} or {"refused"} (the template's own
raise_exception) or {"error"}. Settings are transformers': trim_blocks, lstrip_blocks, loop controls, a `generation` tag
that only groups, `tojson` without HTML escapes, `raise_exception` and `strftime_now` (local time: such a prompt changes by the day).
"""

from __future__ import annotations

import datetime
import functools
import json
import resource
import signal
import sys
from typing import Any, NoReturn

CPU_SECONDS = 0.5  # per rendering, compiling included; real templates take a few milliseconds
MEMORY_BYTES = 512 << 20
OUTPUT_CHARACTERS = 4 << 20


def serve() -> None:
    """Answer until standard input closes. The arguments of the program are directories where jinja2 may be found."""
    sys.path += sys.argv[1:]
    import jinja2
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Refusal(jinja2.TemplateError):
        """What a template says through raise_exception."""

    class Generation(Extension):
        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    Generation.tags = {"generation"}

    def raise_exception(message: object) -> NoReturn:
        raise Refusal(str(message))

    def tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(pattern: str) -> str:
        return datetime.datetime.now().strftime(pattern)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    compiled = functools.lru_cache(8)(environment.from_string)

    def answer(line: bytes) -> dict[str, str]:
        try:
            request = json.loads(line)
            pieces, size = [], 0
            for piece in compiled(request["template"]).generate(**request["args"]):
                pieces.append(piece)
                size += len(piece)
                if size > OUTPUT_CHARACTERS:
                    return {"error": f"the output is longer than {OUTPUT_CHARACTERS:,} characters"}
            return {"text": "".join(pieces)}
        except Refusal as refusal:
            return {"refused": str(refusal)[:2000]}
        except jinja2.TemplateSyntaxError as error:
            return {"error": f"line {error.lineno}: {error.message}"[:2000]}
        except Exception as error:  # whatever a template does is the template's fault, and this process's only business
            return {"error": f"{type(error).__name__}: {error}"[:2000]}

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for kind, limit in ((resource.RLIMIT_AS, MEMORY_BYTES), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(kind, (limit, limit))
    for line in iter(sys.stdin.buffer.readline, b""):
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # SIGPROF ends the process, even inside one long operation
        reply = json.dumps(answer(line)).encode("ascii") + b"\n"
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(reply)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    serve()
