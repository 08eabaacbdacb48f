"""What every command has in common: its options, its examples, and the recipe file that may hold its flags."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from trtllm_thoughtx import __version__
from trtllm_thoughtx.build.flags import COUNT, PATH, PENALTY, PROBABILITY, PROBABILITY_OR_AUTO, TOKENS, Count, FiniteFloat, OneOf
from trtllm_thoughtx.build.options import OPTIONS
from trtllm_thoughtx.cli.params import CONTEXT, EXIT_CODES
from trtllm_thoughtx.config import EXIT_POLICIES
from trtllm_thoughtx.errors import ThoughtxError, shown

COMMANDS: dict[str, click.Command] = {}


def _load_recipe(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    if value is not None and not ctx.resilient_parsing:
        from trtllm_thoughtx.cli.recipe import read_recipe

        ctx.default_map = read_recipe(value, ctx.command, ctx, COMMANDS.values())
    return value


def command(name: str, *examples: str) -> Callable[[Callable[..., None]], click.Command]:
    """Register a command with the common options; its help ends with `examples` and the exit codes."""
    epilog = "\b\nExamples:\n" + "\n".join(f"  {example}" for example in examples) + f"\n\n{EXIT_CODES}"

    def wrap(function: Callable[..., None]) -> click.Command:
        for option in (
            click.version_option(__version__, prog_name="trtllm-thoughtx"),
            click.option("--debug", is_flag=True, help="Print the traceback of an error."),
            click.option("-q", "--quiet", is_flag=True, help="No progress on stderr."),
            click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout."),
            click.option(
                "--config",
                type=PATH,
                is_eager=True,
                callback=_load_recipe,
                expose_value=False,
                help="YAML file with flags of this command.",
            ),
        ):
            function = option(function)
        COMMANDS[name] = click.command(name, context_settings=CONTEXT, epilog=epilog)(function)
        return COMMANDS[name]

    return wrap


def build_options(function: Callable[..., None]) -> Callable[..., None]:
    """The flags of `build.options`."""
    for row in reversed(OPTIONS.values()):
        kind = {"is_flag": True, "default": None} if row.takes is None else {"type": row.takes, "multiple": row.is_repeated}
        function = click.option(f"--{row.name}", help=row.help, **kind)(function)
    return function


def on_error_option(function: Callable[..., None]) -> Callable[..., None]:
    """The flag that says what a bad line of a job costs."""
    text = "A bad line stops the job before it starts, or is a row."
    return click.option("--on_error", type=OneOf(("stop", "row")), default="stop", help=text)(function)


class Named(click.ParamType):
    """NAME=DIR."""

    name = "NAME=DIR"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Path]:
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"([\w.:-]{1,100})=(.+)", str(value), re.ASCII | re.DOTALL)
        if match is None:
            self.fail(f"{shown(str(value))!r} is not NAME=DIR", param, ctx)
        return match[1], PATH.convert(match[2], param, ctx)


def worn_lora_option(function: Callable[..., None]) -> Callable[..., None]:
    """The flag that gives an adapter to the requests of an engine that takes any."""
    text = "PEFT directory of a LoRA adapter for all requests; the engine was built with --max_lora_rank."
    return click.option("--lora_dir", type=PATH, help=text)(function)


def lora_option(function: Callable[..., None]) -> Callable[..., None]:
    """The flag that merges an adapter into the model, wherever one is read."""
    text = "PEFT directory of a LoRA adapter to merge into the model."
    return click.option("--lora_dir", type=PATH, help=text)(function)


def exact_option(function: Callable[..., None]) -> Callable[..., None]:
    """The flag that keeps a CPU's own operators out of a quantized engine, or one with experts."""
    text = "On a CPU, run quantized products and experts as the graph has them, not on faster operators that round a little more."
    return click.option("--exact", is_flag=True, help=text)(function)


def verify_key_option(function: Callable[..., None]) -> Callable[..., None]:
    """The flag that asks for a signature; every command that loads an engine has it."""
    text = "Public key (PEM) with which the engine must be signed; otherwise nothing of it is loaded."
    return click.option("--verify_key", type=PATH, help=text)(function)


def sampling_options(function: Callable[..., None]) -> Callable[..., None]:
    """Filters, penalties and stops; `run` and `eval` share them."""
    for option in reversed((
        click.option("--top_k", type=COUNT, help="Sample among the K likeliest; 0 is all.  [default: the checkpoint's; eval: all]"),
        click.option("--min_p", type=PROBABILITY, help="Drop tokens of less than this fraction of the likeliest one's probability."),
        click.option(
            "--repetition_penalty",
            type=FiniteFloat(0.01, 100),
            help="Divide the logits of tokens of prompt and answer by this.  [default: the checkpoint's]",
        ),
        click.option("--presence_penalty", type=PENALTY, help="Lower the logits of tokens that the answer has by this.  [default: 0]"),
        click.option("--frequency_penalty", type=PENALTY, help="Lower them by this for each time that it has them.  [default: 0]"),
        click.option(
            "--stop", multiple=True, help="Text before which the answer ends; may be given several times.  [default: the checkpoint's]"
        ),
        click.option("--stop_token_ids", type=TOKENS, help="Ids before which the answer's text ends, also with --ignore_eos."),
    )):  # fmt: skip
        function = option(function)
    return function


def template_options(function: Callable[..., None]) -> Callable[..., None]:
    """What the chat template is told; `run`, `eval` and `calibrate` share them."""
    for option in (
        click.option("--chat_template_kwargs", metavar="JSON", help="Variables of the chat template, e.g. '{\"enable_thinking\": false}'."),
        click.option("--enable_thinking", type=OneOf(("true", "false")), help="What a chat template that reads it is told."),
    ):
        function = option(function)
    return function


def thinking_options(function: Callable[..., None]) -> Callable[..., None]:
    """The flags that end a chain of thought early; `run` and `eval` share them."""
    for option in reversed((
        click.option("--max_reasoning_depth", type=COUNT, help="Maximum reasoning steps; 0 answers at once.  [default: no limit]"),
        click.option("--max_thinking_tokens", type=COUNT, help="Maximum thinking tokens; 0 answers at once.  [default: no limit]"),
        click.option(
            "--exit_threshold",
            type=PROBABILITY_OR_AUTO,
            help="Stop reasoning after a step once exit-head confidence reaches this value; auto: as calibrated.  [default: off]",
        ),
        click.option(
            "--exit_probe", type=PROBABILITY, help="Stop reasoning once probe answers agree with this confidence.  [default: off]"
        ),
        click.option("--probe_agree", type=Count(1, 1000), help="Number of probe answers that must agree.  [default: 2]"),
        click.option("--probe_tokens", type=Count(1, 4096), help="Maximum tokens of a probe answer.  [default: 16]"),
        click.option(
            "--exit_policy",
            type=click.Choice(EXIT_POLICIES),
            help="Self-speculative decoding: verify all drafts, trust confident ones, or verify while it pays.  [default: auto]",
        ),
        click.option("--draft_threshold", type=PROBABILITY, help="Minimum confidence of a draft.  [default: the engine's break-even]"),
        click.option(
            "--prompt_lookup", type=Count(0, 64), help="Maximum tokens drafted at once from the request's own text.  [default: 0, off]"
        ),
    )):  # fmt: skip
        function = option(function)
    return function


def one_of(given: Mapping[str, Any], command: str) -> str:
    """The one flag of these that is set. E001 for none and for two."""
    flags = [f"--{'task' if name == 'tasks' else name}" for name in given]
    named = [flag for flag, value in zip(flags, given.values(), strict=True) if value is not None]
    if len(named) != 1:
        why = f"given: {', '.join(named)}" if named else "none was given"
        what = f"exactly one of {', '.join(flags[:-1])} and {flags[-1]} is needed"
        raise ThoughtxError("E001", what, where=command, why=why, fix=f"{command} --help shows examples")
    return next(name for name, value in given.items() if value is not None)
