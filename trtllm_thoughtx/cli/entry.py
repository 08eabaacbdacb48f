"""Where the installed commands begin: from here on, Ctrl-C is taken care of, and only then is anything imported that takes time."""

from trtllm_thoughtx.process import interrupt

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

interrupt.guard()


def __getattr__(name: str) -> "Any":
    """`from trtllm_thoughtx.cli.entry import build_main`: the function that runs `thoughtx-build`; `main` runs `thoughtx`."""
    from functools import partial

    from trtllm_thoughtx.cli import commands

    command = name.removesuffix("_main")
    if command != "main" and command not in commands.COMMANDS:
        raise AttributeError(name)
    return commands.main if command == "main" else partial(commands.main, command)
