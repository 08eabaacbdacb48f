"""Where the installed commands begin: from here on, Ctrl-C is taken care of, and only then is anything imported that takes time."""

from trtllm_thoughtx.process import interrupt

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

interrupt.guard()


def __getattr__(name: str) -> "Any":
    """`from trtllm_thoughtx.cli.entry import build_main`: the function of that name in `cli`."""
    from trtllm_thoughtx.cli import commands as cli

    return getattr(cli, name)
