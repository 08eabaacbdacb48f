"""`thoughtx-eval`: how well a system answers, what that costs, and whether another one does better on the same questions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from trtllm_thoughtx.backends import BACKENDS
from trtllm_thoughtx.build.flags import CHUNK_SIZE, COUNT, PATH, POSITIVE, CommaList, Count, FiniteFloat, OneOf
from trtllm_thoughtx.cli import framework
from trtllm_thoughtx.cli.params import emit
from trtllm_thoughtx.errors import Exit, ThoughtxError
from trtllm_thoughtx.progress import Progress
from trtllm_thoughtx.tasks import TASKS

NUMBERS = CommaList("LIST", r"\d{1,6}", int, "a whole number")
NAMES = CommaList("LIST", "|".join(TASKS), str, f"one of {', '.join(TASKS)}")
MATCHES = ("exact", "normalized", "contains", "last_number", "choice", "boxed")
BENCHMARKS = ("gsm8k", "hotpotqa", "boolq", "commonsense_qa")
HARNESS = CommaList("LIST", "|".join(BENCHMARKS), str, f"one of {', '.join(BENCHMARKS)}")
SOURCES = ("tasks", "dataset", "harness")
OF_TASKS = ("num_items", "sizes", "lengths", "cut_share", "split")
OF_DATASET = ("match", "limit")
ONLY_HARNESS = ("data_dir", "num_fewshot", "chat_template")
OF_HARNESS = (*ONLY_HARNESS, "limit", "max_new_tokens", "temperature", "exact", "verify_key", "enable_thinking", "chat_template_kwargs")


@framework.command(
    "eval",
    "thoughtx-eval --engine_dir ./engine --task chain,lookup --num_items 200 --plot accuracy.png",
    "thoughtx-eval --engine_dir ./engine --task chain --compare ./other-engine",
    "thoughtx-eval --engine_dir ./engine --dataset questions.jsonl --match contains --output result.json",
    "thoughtx-eval --engine_dir ./engine --dataset questions.jsonl --answers answers.jsonl --resume",
    "thoughtx-eval --model_dir ./model --harness gsm8k,boolq --data_dir ./data --limit 100",
)
@click.option("--engine_dir", type=PATH, help="Engine directory to evaluate.")
@click.option("--model_dir", type=PATH, help="Hugging Face directory to evaluate with transformers.")
@click.option("--task", "tasks", type=NAMES, help=f"Generated questions: {', '.join(TASKS)}.")
@click.option("--dataset", type=PATH, help='JSONL file of {"prompt": ..., "answer": ...}, - is stdin.')
@click.option(
    "--match", type=OneOf(MATCHES), help="How answers of --dataset are compared.  [default: by the answer's form: number, letter or words]"
)
@click.option("--harness", type=HARNESS, help=f"lm-eval tasks: {', '.join(BENCHMARKS)}.")
@click.option("--compare", type=PATH, help="Another engine, model or saved result to compare with, on the same questions.")
@click.option("--num_items", type=POSITIVE, default=120, help="Questions per task, spread over its sizes.")
@click.option("--sizes", type=NUMBERS, help="Operands, hops, operations or rules.  [default: 1 to 12 operands, 1 to 4 of others]")
@click.option("--lengths", type=NUMBERS, default="0", help="Words of context of lookups; 0: as short as they come.")
@click.option("--cut_share", type=FiniteFloat(0, 10), default=0.0, help="Also ask this fraction of the questions with a truncated thought.")
@click.option("--split", type=click.Choice(["test", "validation", "train"]), default="test", help="Which generated questions.")
@click.option("--seed", type=Count(0, (1 << 31) - 1), default=0, help="Seed of the questions and of the sampling.")
@click.option("--max_new_tokens", type=POSITIVE, help="Maximum tokens of reasoning and answer.  [default: 512, benchmarks 256]")
@click.option("--temperature", type=FiniteFloat(0, 100), default=0.0, help="0 is greedy.")
@click.option("--top_p", type=FiniteFloat(min=0, min_open=True, max=1), default=1.0, help="Nucleus sampling: keep this probability mass.")
@framework.sampling_options
@click.option("--batch_size", type=POSITIVE, help="Batch size; above 1, times are per batch.  [default: 1]")
@click.option("--backend", type=OneOf(tuple(BACKENDS)), help="Which of the engine's plans to run.")
@click.option("--chunk_size", type=CHUNK_SIZE, help="Tokens per attention chunk of an engine; auto: chosen for each question.")
@framework.template_options
@framework.thinking_options
@framework.exact_option
@framework.verify_key_option
@click.option("--num_threads", type=Count(1, 1024), help="CPU threads.")
@click.option("--memory_context", type=COUNT, help="Measure memory at this many tokens; 0: do not.  [default: 2048 with --compare, else 0]")
@click.option("--output", type=PATH, help="Save every answer to this JSON file, for a later --compare.")
@click.option("--answers", type=PATH, help="Append each answer to this JSONL file when it is done.")
@click.option("--resume", is_flag=True, help="Go on with --answers: what it holds is not asked again.")
@framework.on_error_option
@click.option("--plot", type=PATH, help="Plot accuracy by size and length (.png, .svg, .pdf).")
@click.option("--data_dir", type=PATH, help="Directory with TASK.jsonl for --harness; otherwise lm-eval downloads it.")
@click.option("--limit", type=POSITIVE, help="First questions of --dataset or of each --harness task.")
@click.option("--num_fewshot", type=COUNT, help="Number of few-shot examples for --harness.  [default: the task's own]")
@click.option("--chat_template", is_flag=True, help="Apply the chat template to --harness questions.")
def evaluate(as_json: bool, quiet: bool, debug: bool, **options: Any) -> None:
    """Measure accuracy with intervals, tokens, steps and time; compare two systems on the same questions."""
    from trtllm_thoughtx.evaluate.job import evaluation, evaluation_tables, harness_evaluation

    framework.one_of({name: options[name] for name in ("engine_dir", "model_dir")}, "thoughtx-eval")
    source = framework.one_of({name: options[name] for name in SOURCES}, "thoughtx-eval")
    _refuse_unused(source, options)
    path: Path = options["engine_dir"] or options["model_dir"]
    options["stop"] = options["stop"] or None
    taken = {name: value for name, value in options.items() if name not in ("engine_dir", "model_dir") and not _is_unused(source, name)}
    made = harness_evaluation if source == "harness" else evaluation
    found = made(path, progress=Progress(quiet=quiet), **taken)
    emit("eval", found, as_json=as_json, ok=not found.num_errors, human=evaluation_tables(found))
    if found.num_errors:
        raise click.exceptions.Exit(Exit.NO)


def _is_unused(source: str, name: str) -> bool:
    """True for a flag that means nothing for the questions of `source`: tasks, dataset or harness."""
    if name in SOURCES:
        return name != source
    if source == "harness":
        return name not in OF_HARNESS
    return name in ONLY_HARNESS or name in (OF_DATASET if source == "tasks" else OF_TASKS)


def _refuse_unused(source: str, options: dict[str, Any]) -> None:
    context = click.get_current_context()
    given = [n for n, value in options.items() if context.get_parameter_source(n) is not ParameterSource.DEFAULT and value is not False]
    unused = [f"--{name}" for name in given if name not in ("engine_dir", "model_dir") and _is_unused(source, name)]
    if unused:
        why = "these questions have no use for it"
        raise ThoughtxError("E001", f"{', '.join(unused)} cannot be used here", where="thoughtx-eval", why=why, fix="leave it out")
