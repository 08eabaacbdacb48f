"""The edge between a command and the world: exit statuses, and one place where every error ends.

A command function raises; only `run` decides what is printed and which status is returned. Results are printed on stdout,
everything else on stderr. With --json, stdout carries exactly one document, for a refusal as well.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import click

from trtllm_thoughtx.errors import Exit, ThoughtxError, shown
from trtllm_thoughtx.process import interrupt

CONTEXT: dict[str, Any] = {
    "help_option_names": ["-h", "--help"],
    "max_content_width": 100,
    "show_default": True,
    "token_normalize_func": lambda name: name.replace("-", "_"),  # --max-seq-len is --max_seq_len
}
EXIT_CODES = "Exit codes: 0 done, 1 the answer is no, 2 usage, 3 input refused, 4 environment, 70 a bug in this package, 130 interrupted."
WIDTH_OF_LOGS = 160  # of tables that do not go to a terminal, in columns
EXIT_BROKEN_PIPE = 141  # what a shell reports for a program stopped by SIGPIPE


def emit(name: str, body: Any, *, as_json: bool, ok: bool = True, human: Sequence[Any] = ()) -> None:
    """Print one result: a JSON document, or the rich renderables and strings in `human`."""
    from trtllm_thoughtx.report import plain, to_json

    if as_json:
        click.echo(to_json({**plain(body), "schema": f"thoughtx.{name}/1", "ok": ok}), nl=False)
        return
    from rich.console import Console

    class Result(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # rich would end the process with status 1, which here means "the answer is no"

    look = {"markup": False, "highlight": False, "emoji": False}
    printer = Result(file=sys.stdout, **look)  # type: ignore[arg-type]
    if not printer.is_terminal:
        printer = Result(file=sys.stdout, width=WIDTH_OF_LOGS, **look)  # type: ignore[arg-type]
    for item in human:
        printer.print(item, soft_wrap=isinstance(item, str))


# Why a command line was refused, by click's exception; the first that fits
_REASONS: tuple[tuple[type[click.UsageError], str], ...] = (
    (click.MissingParameter, "the command cannot start without it"),
    (click.BadParameter, "the flag does not take this value"),
    (click.NoSuchOption, "no flag of this command has that name"),
    (click.UsageError, "the command line does not fit the command"),
)


def _usage(error: click.UsageError, prog: str) -> ThoughtxError:
    command = error.ctx.command_path if error.ctx else prog
    what = shown(" ".join(error.format_message().split()).rstrip("."), 600)
    why = next(reason for kind, reason in _REASONS if isinstance(error, kind))
    return ThoughtxError("E001", what, where=command, why=why, fix=f"{command} --help lists every flag. Nothing was read or written.")


def _from_os(error: OSError) -> ThoughtxError:
    where = shown(str(error.filename)) if error.filename else "the file system"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ThoughtxError(
            "E203",
            "no space left",
            where=where,
            why=shown(error.strerror),
            fix="free some space, or write elsewhere. What was half-written was removed.",
        )
    why = shown(error.strerror or str(error))
    return ThoughtxError(
        "E206", "the file system refused an operation", where=where, why=why, fix="check the path, its permissions and the disk"
    )


def _bug(error: BaseException, debug: bool) -> None:
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    kept = "above"
    if debug:
        sys.stderr.write(text)
    else:
        try:
            import tempfile

            handle, kept = tempfile.mkstemp(prefix="thoughtx-bug-", suffix=".txt")
            with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
        except OSError:
            sys.stderr.write(text)
            kept = "above"
    what = shown(f"{type(error).__name__}: {error}", 400)
    sys.stderr.write(f"bug: {what}\n  This is a fault of trtllm-thoughtx, not of your input. Please report it with the traceback: {kept}\n")


def _report(error: ThoughtxError, as_json: bool, debug: bool) -> int:
    if debug:
        traceback.print_exception(type(error), error, error.__traceback__)
    print(error.render(), file=sys.stderr)
    if as_json:
        print(json.dumps({"schema": "thoughtx.error/1", "ok": False, "error": error.as_dict()}, indent=2))
    return int(error.exit)


def run(command: click.Command, prog: str, args: Sequence[str] | None = None) -> int:
    """Run `command` on `args` (default: sys.argv) and return its exit status. Nothing but SystemExit of completion escapes."""
    args = list(sys.argv[1:] if args is None else args)
    flags = args[: args.index("--")] if "--" in args else args
    as_json, debug = "--json" in flags, "--debug" in flags
    try:
        with interrupt.raising():
            if f"_{prog.replace('-', '_').upper()}_COMPLETE" in os.environ:
                command.main(args=args, prog_name=prog)
            with command.make_context(prog, list(args)) as ctx:
                command.invoke(ctx)
            sys.stdout.flush()
            return int(Exit.OK)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return int(Exit.USAGE)
    except click.exceptions.Exit as error:
        return int(error.exit_code)
    except click.UsageError as error:
        return _report(_usage(error, prog), as_json, debug)
    except ThoughtxError as error:
        return _report(error, as_json, debug)
    except (KeyboardInterrupt, click.Abort):
        sys.stderr.write(interrupt.LINE)
        return int(Exit.INTERRUPTED)
    except MemoryError as error:
        need = shown(str(error)) or "the system gave no more"
        smaller = {"build": "use thoughtx-build with a smaller --max_batch_size or --max_seq_len, or in stages (--num_stages)"}
        fix = f"{smaller.get(prog.removeprefix('thoughtx-'), 'end other programs')}, or use a machine with more memory"
        return _report(ThoughtxError("E204", "not enough memory", where=prog, why=need, fix=fix), as_json, debug)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the flush at exit must not complain either
        return EXIT_BROKEN_PIPE
    except OSError as error:
        return _report(_from_os(error), as_json, debug)
    except Exception as error:
        _bug(error, debug)
        if as_json:
            print(json.dumps({"schema": "thoughtx.error/1", "ok": False, "error": {"code": "bug", "what": shown(repr(error))}}, indent=2))
        return int(Exit.BUG)
