"""Ctrl-C ends a command with status 130 and one line, whatever the moment.

While its modules are imported nothing has been begun, and after its result is printed nothing is left to undo: there the process ends at
once (`guard`). In between (`raising`) an exception takes every open output away. Where Python would drop that exception, in a callback of
the garbage collector or of an import, it is raised again. Only builtin modules are imported here, so that the unguarded time is short.
"""

import _signal
import _thread
import atexit
import os
import sys

STATUS = 130
LINE = "\ninterrupted: unfinished output was removed; finished output, and any older output of the same name, is as it was\n"


def guard() -> None:
    """End at once on Ctrl-C from here on, unless the process ignores it (in the background) or has a handler of its own."""
    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
        _signal.signal(_signal.SIGINT, _end)
        sys.unraisablehook = _again


class raising:
    """Ctrl-C raises KeyboardInterrupt inside of the block."""

    def __enter__(self) -> None:
        self.is_guarded = _signal.getsignal(_signal.SIGINT) is _end
        if self.is_guarded:
            _signal.signal(_signal.SIGINT, _signal.default_int_handler)

    def __exit__(self, *_: object) -> None:
        if self.is_guarded:
            _signal.signal(_signal.SIGINT, _end)


def leave() -> None:
    """End an interrupted process without waiting for its threads."""
    for stream in (sys.stdout, sys.stderr):
        try:  # noqa: SIM105
            stream.flush()
        except (OSError, ValueError):
            pass
    try:
        atexit._run_exitfuncs()
    finally:
        os._exit(STATUS)


def _end(number: int, frame: object) -> None:
    _signal.signal(_signal.SIGINT, _signal.SIG_IGN)
    os.write(2, LINE.encode())
    leave()


def _again(dropped: "sys.UnraisableHookArgs") -> None:
    if dropped.exc_type is KeyboardInterrupt:
        _thread.start_new_thread(_thread.interrupt_main, ())
    else:
        sys.__unraisablehook__(dropped)
