"""The command that makes an output again, for its manifest: every argument of the call, under the flag that sets it.

The commands pass all that they parsed, recipe included, to one function of the package, whose arguments have the flags' names. So what
that function was called with is what the command line said, and a call from Python records the command that would have made it.
Paths are recorded by name: a manifest tells nothing of the machine.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

FLAGS = {"tasks": "task"}  # argument -> flag, where they differ
FORMS = {"accuracy_budget": "kl={}"}
PATHS = ("model_dir", "checkpoint_dir", "output_dir", "lora_dir", "calib_data", "dataset")
NOT_RECORDED = frozenset({"progress", "force", "dry_run", "built_part"})  # they change nothing in what is made


def command_line(command: str, arguments: Mapping[str, Any]) -> str:
    """`command` with a flag for each of `arguments` that is set; tuples are joined by commas, True is a bare flag."""
    words = command.split()
    for name, value in arguments.items():
        if name not in NOT_RECORDED:
            words += _flag(name, value)
    return shlex.join(words)


def _flag(name: str, value: Any) -> Iterator[str]:
    if value is None or value is False or (isinstance(value, (tuple, list)) and not value):
        return
    yield f"--{FLAGS.get(name, name)}"
    if value is True:
        return
    if name in PATHS or isinstance(value, Path):
        yield os.path.basename(os.path.abspath(value)) or "."
    elif isinstance(value, (tuple, list)):
        yield ",".join(map(str, value))
    else:
        yield FORMS.get(name, "{}").format(value)
