"""The flags of `trtllm-build` that are used here, as data, so that a command line is checked where TensorRT-LLM is not installed.

From TensorRT-LLM's commands/build.py (commit 65f1d153) and plugin/plugin.py (c20322ff), as they were before the 1.2 releases, the last with
it. Where the package is installed, a test compares the table with the parser that the package itself makes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

SWITCH = ("enable", "disable")
GEMM = ("auto", "float16", "float32", "bfloat16", "int32", "fp8", "nvfp4", "disable")


@dataclass(frozen=True)
class Flag:
    """`kind` of its value; `choices`: all that it takes, empty for any; `default` as the command has it."""

    name: str
    kind: type = str
    choices: tuple[str, ...] = ()
    default: Any = None


FLAGS = {
    flag.name: flag
    for flag in (
        Flag("checkpoint_dir"),
        Flag("output_dir", default="engine_outputs"),
        Flag("max_batch_size", int, default=2048),
        Flag("max_input_len", int, default=1024),
        Flag("max_seq_len", int),
        Flag("max_beam_width", int, default=1),
        Flag("max_num_tokens", int, default=8192),
        Flag("kv_cache_type", choices=("continuous", "paged", "disabled")),
        Flag("workers", int, default=1),
        Flag("log_level", choices=("verbose", "info", "warning", "error", "internal_error"), default="info"),
        Flag("gemm_plugin", choices=GEMM),
        Flag("gpt_attention_plugin", choices=("auto", "float16", "float32", "bfloat16", "disable"), default="auto"),
        Flag("context_fmha", choices=SWITCH, default="enable"),
        Flag("remove_input_padding", choices=SWITCH, default="enable"),
        Flag("use_paged_context_fmha", choices=SWITCH, default="enable"),
        Flag("use_fp8_context_fmha", choices=SWITCH, default="enable"),
        Flag("use_fused_mlp", choices=SWITCH, default="enable"),
    )
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parse(arguments: Sequence[str]) -> dict[str, Any]:
    """What `trtllm-build` would understand. ValueError for a flag that it lacks or a value that it does not take."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    for flag in FLAGS.values():
        parser.add_argument(f"--{flag.name}", type=flag.kind, choices=flag.choices or None, default=flag.default)
    return vars(parser.parse_args(list(arguments)))
