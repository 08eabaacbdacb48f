"""`thoughtx-calibrate --fit_exit_head`, `--exit_layers`: a checkpoint with the exits that its own traces teach.

Three sets of questions: one to fit, one to choose the threshold for the stated loss, one to report what both are worth. The checkpoint
appears whole or not at all; nothing in it changes but the two files of `checkpoint.exits` and the manifest.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trtllm_thoughtx import report
from trtllm_thoughtx.build.build import build
from trtllm_thoughtx.calibrate.exits import rule
from trtllm_thoughtx.calibrate.exits.fit import logistic, low_rank
from trtllm_thoughtx.calibrate.exits.traces import Trace, collect, hidden_states, normed, text_for
from trtllm_thoughtx.checkpoint.convert import convert
from trtllm_thoughtx.checkpoint.exits import BOUNDARY, ExitAdapter, ExitHead, ExitWeights, read_exits, write_exits
from trtllm_thoughtx.checkpoint.opened import Checkpoint
from trtllm_thoughtx.checkpoint.outputs import Output
from trtllm_thoughtx.checkpoint.recorded import command_line
from trtllm_thoughtx.checkpoint.tensor_check import EMBEDDING, HEAD
from trtllm_thoughtx.checkpoint.weights import open_weights
from trtllm_thoughtx.config import ModelConfig
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.evaluate.questions import Question, from_file, generated, sha256_of_questions
from trtllm_thoughtx.evaluate.run import prompt_of
from trtllm_thoughtx.families.size import head_in_layers
from trtllm_thoughtx.progress import SILENT, Progress
from trtllm_thoughtx.runtime.engine import Engine
from trtllm_thoughtx.tasks import TASKS
from trtllm_thoughtx.text.text import Text

MAX_LENGTH = 2048  # tokens of a question and its traced answer
MIN_ITEMS = 20  # of the user's own questions
MAX_ADAPTER_TOKENS = 40_000
SPLITS = ("train", "validation", "test")  # to fit, to choose, to report


@dataclass
class TracedSet:
    traces: list[Trace]
    states: list[np.ndarray]  # see traces.hidden_states


def calibrate_exits(
    model_dir: Path,
    output_dir: Path,
    *,
    lora_dir: Path | None = None,
    fit_exit_head: bool = False,
    exit_layers: Sequence[int] = (),
    adapter_rank: int = 64,
    tasks: Sequence[str] | None = None,
    dataset: Path | None = None,
    num_items: int = 120,
    max_new_tokens: int = 512,
    max_accuracy_loss: float = 0.5,
    batch_size: int = 16,
    seed: int = 0,
    num_threads: int | None = None,
    enable_thinking: str | None = None,
    chat_template_kwargs: str | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Write `model_dir` (Hugging Face or TensorRT-LLM) with its exits to `output_dir` as a TensorRT-LLM checkpoint.

    `num_items` questions of each task and set, or those of `dataset`, dealt to the three sets. `max_accuracy_loss` in points. Returns
    what was measured. E001 for settings that cannot be, E112 for a model without the thinking tags that an exit head needs, E140 for too
    few questions.
    """
    command = command_line("thoughtx-calibrate", locals())
    model_dir, output_dir = Path(model_dir), Path(output_dir)
    with open_weights(Checkpoint.open(model_dir, lora_dir=lora_dir), progress=progress) as source:
        config = source.config
        _check(config, fit_exit_head, exit_layers, adapter_rank, max_accuracy_loss)
        gain = source.read("transformer.ln_f.weight", "float32")
        matrix = source.read(EMBEDDING if config.tied else HEAD, "float32") if exit_layers else None
        held, num_bytes = source.exits, sum(source.num_bytes(name) for name in source.names())
    text, template = (
        text_for(Text.load(model_dir, source.members.config), model_dir, needs_tags=fit_exit_head),
        (enable_thinking, chat_template_kwargs),
    )
    for unread in text.set_template(*template):
        progress.note(f"not applied: {unread}")
    asked, longest = _questions(tasks, dataset, num_items, seed, progress), min(config.longest, MAX_LENGTH)
    for question in (question for questions in asked for question in questions):
        if (num := len(prompt_of(question, text))) >= longest:
            why = f"{question.id} has {num} tokens, and an answer must follow within {longest}"
            raise ThoughtxError("E122", "a question is too long", where=str(dataset or model_dir), why=why, fix="leave it out")
    settings = {
        "fit_exit_head": fit_exit_head,
        "exit_layers": list(exit_layers),
        "adapter_rank": adapter_rank,
        "template_kwargs": text.template_kwargs,
        "max_new_tokens": max_new_tokens,
        "max_accuracy_loss": max_accuracy_loss,
        "batch_size": batch_size,
        "seed": seed,
        "questions": [sha256_of_questions(questions) for questions in asked],
    }
    output = Output(output_dir, source.members, settings, command=command, force=force, progress=progress)
    if output.is_current():
        return {"output_dir": str(output_dir), "up_to_date": True, **read_exits(output_dir, config).report}
    output.prepare(num_bytes)
    with tempfile.TemporaryDirectory(prefix="thoughtx-calibrate-") as folder:
        scratch = Path(folder)
        options = {"backend": ("onnxruntime",), "dtype": "float32", "max_batch_size": batch_size, "max_seq_len": longest}
        build(source.checkpoint, scratch / "engine", options, progress=progress)
        engine = Engine.load(scratch / "engine", num_threads=num_threads, tap_layers=True)
        text_for(engine.text, model_dir, needs_tags=fit_exit_head).set_template(*template)
        try:
            sets = [
                measure(engine, questions, max_new_tokens, gain, exit_layers, progress, model_dir, with_stops=fit_exit_head)
                for questions in asked
            ]
        finally:
            engine.close()
        head, of_head = _fit_head(sets, max_accuracy_loss / 100, gain, config.norm_eps) if fit_exit_head else (None, None)
        adapters, of_drafts = _fit_adapters(sets, exit_layers, adapter_rank, config, gain, matrix)
        found = ({"head": of_head} if of_head else {}) | ({"adapters": of_drafts} if of_drafts else {})
        made = ExitWeights(head or held.head, adapters or held.adapters, {**held.report, **report.plain(found)})
        checkpoint: Path | Checkpoint = source.checkpoint
        if source.kind == "huggingface" or source.checkpoint.adapter is not None:
            checkpoint = scratch / "checkpoint"
            convert(source.checkpoint, scratch / "checkpoint", progress=progress)
        _write(output, checkpoint, made, config)
    return {"output_dir": str(output_dir), "up_to_date": False, **made.report}


@dataclass(frozen=True)
class FittedHead:
    """An exit head: its threshold, chosen on the second set of questions; on the third, what it saves and what the best rule would."""

    max_accuracy_loss: float
    threshold: float
    num_stops_fitted: int
    chosen_on: rule.Savings
    reported_on: rule.Savings
    oracle: rule.Savings
    boundary_accuracy: float


@dataclass(frozen=True)
class FittedAdapter:
    """How often a draft before `layer` is the whole model's token, and that of the drafts above the threshold (a share of all)."""

    layer: int
    rank: int
    threshold: float
    agreement: float
    share_above: float
    agreement_above: float | None


def _check(config: ModelConfig, fit_exit_head: bool, exit_layers: Sequence[int], rank: int, max_loss: float) -> None:
    layers = list(exit_layers)
    problem = None
    if not fit_exit_head and not layers:
        problem = ("--fit_exit_head", "neither --fit_exit_head nor --exit_layers is given", "say what is to be fitted")
    elif not all(0 < layer < config.num_layers for layer in layers) or layers != sorted(set(layers)):
        why = f"it must list layers between 1 and {config.num_layers - 1}, rising, none twice (the model has {config.num_layers} layers)"
        problem = ("--exit_layers", why, f"for example --exit_layers {max(1, config.num_layers // 3)}")
    elif not 1 <= rank <= config.hidden_size:
        problem = ("--adapter_rank", f"it must be from 1 to the hidden size, {config.hidden_size}", "choose such a rank")
    elif not 0 <= max_loss <= 100:
        problem = ("--max_accuracy_loss", "it is a number of points, from 0 to 100", "choose such a number")
    if problem:
        flag, why, fix = problem
        raise ThoughtxError("E001", f"{flag} cannot be used like this", where="thoughtx-calibrate", why=why, fix=fix)


def _questions(tasks: Sequence[str] | None, dataset: Path | None, num_items: int, seed: int, progress: Progress) -> list[list[Question]]:
    """To fit, to choose, to report; no question in two of them."""
    if dataset is None:
        return [generated(tasks or tuple(TASKS), split, num_items=num_items, seed=seed) for split in SPLITS]
    rows = from_file(dataset, note=progress.note)
    if len(rows) < MIN_ITEMS:
        why = f"{len(rows)} questions are too few to fit, to choose a threshold and to report on"
        raise ThoughtxError("E140", "not enough questions", where=str(dataset), why=why, fix=f"give at least {MIN_ITEMS}")
    order = np.random.default_rng(seed).permutation(len(rows))
    return [[rows[i] for i in part] for part in np.array_split(order, 3)]


def measure(
    engine: Engine,
    questions: list[Question],
    max_new_tokens: int,
    gain: np.ndarray,
    layers: Sequence[int],
    progress: Progress,
    model_dir: Path,
    *,
    with_stops: bool = True,
) -> TracedSet:
    """Traces and hidden states; `with_stops`, also the answers behind each step, which an exit head learns from and adapters do not."""
    traces = collect(engine, questions, max_new_tokens, progress, with_stops=with_stops)
    if with_stops and not any(trace.stops for trace in traces):
        why = "none of its answers has a step between its thinking tags"
        raise ThoughtxError(
            "E112",
            "the model does not think in steps",
            where=str(model_dir),
            why=why,
            fix="fit --exit_layers, which need no steps, or use a model that parts its thoughts by blank lines",
        )
    return TracedSet(traces, hidden_states(engine, traces, gain, engine.config.norm_eps, layers))


def _fit_head(sets: Sequence[TracedSet], max_loss: float, gain: np.ndarray, epsilon: float) -> tuple[ExitHead, FittedHead]:
    fitted, chosen, reported = (one.traces for one in sets)
    stops = [(trace, stop) for trace in fitted for stop in trace.stops]
    x = np.stack([stop.hidden for _, stop in stops])
    w, b = logistic(x, np.array([stop.answer == trace.answer for trace, stop in stops]))
    inside, ends = _boundaries(sets[0], gain, epsilon)
    v, c = logistic(inside, ends)
    head = ExitHead(np.stack([w, v]), np.array([b, c], np.float32), 1.0)
    head = ExitHead(head.weight, head.bias, rule.choose_threshold(head, chosen, max_loss))
    others, labels = _boundaries(sets[2], gain, epsilon)
    is_said = others @ head.weight[BOUNDARY] + head.bias[BOUNDARY] > 0
    stops_at = rule.by_head(head, head.threshold)
    return head, FittedHead(
        max_accuracy_loss=100 * max_loss,
        threshold=head.threshold,
        num_stops_fitted=len(stops),
        chosen_on=rule.apply(chosen, stops_at),
        reported_on=rule.apply(reported, stops_at),
        oracle=rule.apply(reported, rule.oracle),
        boundary_accuracy=float((is_said == labels).mean()),
    )


def _boundaries(one: TracedSet, gain: np.ndarray, epsilon: float) -> tuple[np.ndarray, np.ndarray]:
    """The final norm's output at every token up to the end of the last step, and which of these tokens end a step."""
    rows, labels = [], []
    for trace, states in zip(one.traces, one.states, strict=True):
        ends = {stop.place for stop in trace.stops}
        num = max(ends, default=-1) + 1
        rows.append(states[-1][trace.num_prompt : trace.num_prompt + num])
        labels += [place in ends for place in range(num)]
    return normed(np.concatenate(rows), gain, epsilon), np.array(labels)


def _fit_adapters(
    sets: Sequence[TracedSet], layers: Sequence[int], rank: int, config: ModelConfig, gain: np.ndarray, matrix: np.ndarray | None
) -> tuple[tuple[ExitAdapter, ...], list[FittedAdapter]]:
    """For each of `layers`: a map to the last layer's output, and the confidence that its next token is the full model's.

    The threshold is the break-even of a draft: it costs `layer` layers and a row of logits, and saves a pass of the rest and its row.
    """
    if matrix is None:
        return (), []
    eps, made, rows = config.norm_eps, list[ExitAdapter](), list[FittedAdapter]()
    ones = np.ones(config.hidden_size, np.float32)
    ends = [_generated(one, -1) for one in sets]
    wanted = [(normed(end, gain, eps) @ matrix.T).argmax(1) for end in ends]
    for place, layer in enumerate(layers):
        starts = [_generated(one, place) for one in sets]
        x = [normed(start, ones, eps) for start in starts]
        down, up = low_rank(x[0], ends[0] - starts[0], rank)
        agrees = [
            (normed(start + (n @ down.T) @ up.T, gain, eps) @ matrix.T).argmax(1) == target
            for start, n, target in zip(starts, x, wanted, strict=True)
        ]
        w, b = logistic(x[1], agrees[1])  # on other traces than the map was fitted to: there it agrees more
        head = head_in_layers(config)
        threshold = round((layer + head) / (config.num_layers + head), 6)
        made.append(ExitAdapter(layer, ones, down, up, w[None], np.array([b], np.float32), threshold))
        is_sure = x[2] @ w + b >= np.log(threshold / (1 - threshold))
        rows.append(
            FittedAdapter(
                layer=layer,
                rank=rank,
                threshold=threshold,
                agreement=float(agrees[2].mean()),
                share_above=float(is_sure.mean()),
                agreement_above=float(agrees[2][is_sure].mean()) if is_sure.any() else None,
            )
        )
    return tuple(made), rows


def _generated(one: TracedSet, place: int) -> np.ndarray:
    """Residual streams at the tokens behind which something was generated, as far as MAX_ADAPTER_TOKENS."""
    return np.concatenate([x[place, trace.num_prompt - 1 : -1] for trace, x in zip(one.traces, one.states, strict=True)])[
        :MAX_ADAPTER_TOKENS
    ]


def _write(output: Output, checkpoint: Path | Checkpoint, exits: ExitWeights, config: ModelConfig) -> None:
    """`checkpoint` is TensorRT-LLM's: the input, or what it was converted to. Its own exits give way to these."""
    with open_weights(checkpoint) as source, output.writing() as partial:
        held = source.members
        output.carry(*held.model, *held.carried, *held.pages, root=held.root)
        write_exits(partial, exits, config)
