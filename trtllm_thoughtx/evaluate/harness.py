"""EleutherAI's lm-eval on this project's engines: GSM8K, BoolQ, CommonsenseQA and HotpotQA.

`run_harness` hands lm-eval a model (`scorer`) and tasks. With `data_dir` nothing is downloaded: TASK.jsonl holds the questions and
TASK-train.jsonl the few-shot examples, one object a line with the data set's own fields. Every row is checked before anything
runs, and lm-eval reads a copy of what was checked. Without `data_dir` lm-eval fetches the data as it always does; HotpotQA,
which it has no task for, comes from the Hub in the same way. Only this file imports lm_eval. No code of a data set or a model is run.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from trtllm_thoughtx import __version__
from trtllm_thoughtx.build.engine_dir import EngineDir
from trtllm_thoughtx.checkpoint.directory import kind_of
from trtllm_thoughtx.errors import ThoughtxError, shown
from trtllm_thoughtx.evaluate.benchmarks import CONFIGS, HUB_HOTPOTQA, TASKS, read_rows
from trtllm_thoughtx.evaluate.opened import SYSTEMS, open_system
from trtllm_thoughtx.evaluate.scorer import Scorer
from trtllm_thoughtx.evaluate.systems import EngineSystem, System
from trtllm_thoughtx.progress import SILENT, Progress
from trtllm_thoughtx.runtime.engine import Engine
from trtllm_thoughtx.text.params import unused_settings

OFFLINE = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
MODEL_BATCH = 8  # rows of a Hugging Face model at once
SEED = 1234  # lm-eval's own, for the choice of few-shot examples
PACKAGES = ("lm_eval", "datasets", "onnxruntime", "tokenizers", "torch", "transformers")


@dataclass(frozen=True)
class Metric:
    """`stderr` is None for one item."""

    value: float
    stderr: float | None


@dataclass(frozen=True, kw_only=True)
class TaskNumbers:
    """`num_truncated` prompts lost their beginning, `num_alike` choices the tokenizer cannot tell apart (both None for an lm-eval model).
    A metric of several filters is named "metric,filter"."""

    num_items: int
    num_fewshot: int
    num_truncated: int | None
    num_alike: int | None
    metrics: dict[str, Metric]


@dataclass(frozen=True, kw_only=True)
class Sample:
    id: Any
    filter: str
    prompt: str
    replies: list[Any]
    expected: Any
    metrics: dict[str, Any]


@dataclass(frozen=True)
class HarnessResult:
    tasks: dict[str, TaskNumbers]
    versions: dict[str, str]
    not_applied: list[str] = field(default_factory=list)
    samples: dict[str, list[Sample]] = field(default_factory=dict)  # with `return_samples`

    def document(self) -> dict[str, Any]:
        found = {"tasks": self.tasks, "versions": self.versions, "not_applied": self.not_applied}
        return {**found, "samples": self.samples} if self.samples else found


def run_harness(
    system: Any,
    task: str | Sequence[str],
    data_dir: Path | str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    *,
    use_chat_template: bool = False,
    think_tags: tuple[str, str] | str | None = "auto",
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    exact: bool = False,
    verify_key: Path | None = None,
    template: tuple[str | None, str | None] = (None, None),
    return_samples: bool = False,
    progress: Progress = SILENT,
) -> HarnessResult:
    """Evaluate one task or several of `TASKS`.

    `system` is an `Engine` (or an object with one as `.engine`), the path of an engine or a Hugging Face directory, a `System`, or an
    lm-eval model. `num_fewshot` None is the task's own number (GSM8K 5, others 0); `limit` takes the first rows of each task.
    Errors: E001 unknown task or numbers out of range, E101 no such file,
    E140 malformed rows, E201 lm-eval is missing or its data cannot be had.
    """
    names = list(dict.fromkeys([task] if isinstance(task, str) else task))
    _check_request(names, num_fewshot, limit)
    rows = {} if data_dir is None else {name: _read_task(Path(data_dir), name, num_fewshot, progress) for name in names}
    lm_eval = _import_lm_eval(offline=data_dir is not None)
    made = HarnessResult({}, _versions())
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="thoughtx-harness-")))
        loaded = {name: _load_task(name, rows.get(name), num_fewshot, folder) for name in names}
        model, scorer = _model(system, use_chat_template, think_tags, max_new_tokens, stack, exact=exact, verify_key=verify_key)
        if scorer is not None:
            scorer.text.set_template(*template)
        config = {} if scorer is None else scorer.text.generation_config
        ignored = unused_settings(config, ("do_sample", "temperature", "top_k", "top_p", "min_p", "max_new_tokens", "stop"))
        if ignored:
            progress.note(f"not applied: {', '.join(ignored)} (the checkpoint's setting is malformed or not supported)")
        made.not_applied.extend(ignored)
        for name, one in loaded.items():
            given = {
                "max_gen_toks": max_new_tokens,
                "temperature": temperature,
                "do_sample": None if temperature is None else temperature > 0,
            }
            changes = {key: value for key, value in given.items() if value is not None}
            if changes and one.get_config("output_type") == "generate_until":
                one.set_config("generation_kwargs", changes, update=True)
            with progress.stage(name) as stage, _quiet():
                if scorer is not None:
                    scorer.stage, scorer.num_truncated, scorer.num_alike = stage, 0, 0
                found = lm_eval.evaluate(
                    model,
                    {name: one},
                    limit=limit,
                    log_samples=return_samples,
                    apply_chat_template=use_chat_template,
                    fewshot_as_multiturn=use_chat_template,
                )
            made.tasks[name] = _numbers(found, name, one, scorer)
            if return_samples:
                made.samples[name] = [_sample(sample) for sample in found["samples"][name]]
    return made


def _check_request(names: list[str], num_fewshot: int | None, limit: int | None) -> None:
    unknown = [name for name in names if name not in TASKS]
    problems = {
        "no task": not names,
        f"unknown task {shown(unknown[:1])}": bool(unknown),
        "num_fewshot is negative": num_fewshot is not None and num_fewshot < 0,
        "limit is below 1": limit is not None and limit < 1,
    }
    problem = next((what for what, is_true in problems.items() if is_true), None)
    if problem:
        why = f"the tasks are {', '.join(TASKS)}; num_fewshot is at least 0 and limit at least 1"
        raise ThoughtxError(
            "E001", problem, where="--harness", why=why, fix="name tasks of that list, parted by commas, and numbers in those ranges"
        )


def _read_task(data_dir: Path, name: str, num_fewshot: int | None, progress: Progress) -> dict[str, list[dict[str, Any]]]:
    wanted = CONFIGS[name].get("num_fewshot", 0) if num_fewshot is None else num_fewshot
    splits = {"test": read_rows(data_dir, f"{name}.jsonl", name, progress.note)}
    if wanted:
        splits["train"] = read_rows(data_dir, f"{name}-train.jsonl", name, progress.note)
        if len(splits["train"]) < wanted:
            why = f"{name}-train.jsonl has {len(splits['train'])}"
            fix = "add examples, or ask for fewer (--num_fewshot)"
            raise ThoughtxError("E001", f"{wanted} few-shot examples are wanted", where=shown(str(data_dir)), why=why, fix=fix)
    return splits


def _import_lm_eval(*, offline: bool) -> Any:
    """lm_eval.evaluator. `offline` holds for the rest of the process if nothing has imported datasets before."""
    with _environment(OFFLINE if offline else {}):
        try:
            return importlib.import_module("lm_eval.evaluator")
        except ImportError as error:
            fix = 'pip install "trtllm-thoughtx[harness]"'
            why = shown(str(error))
            raise ThoughtxError("E201", "the harness needs lm-eval", where="import lm_eval", why=why, fix=fix) from error


def _load_task(name: str, splits: dict[str, list[dict[str, Any]]] | None, num_fewshot: int | None, folder: Path) -> Any:
    from lm_eval.api.task import ConfigurableTask

    config = {"task": name, **CONFIGS[name]} | ({} if num_fewshot is None else {"num_fewshot": num_fewshot})
    if splits is None and name == "hotpotqa":
        config |= HUB_HOTPOTQA
    elif splits is not None:
        files = {split: str(folder / f"{name}-{split}.jsonl") for split in splits}
        for split, rows in splits.items():
            Path(files[split]).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        config |= {"dataset_path": "json", "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")}}
        config |= {"test_split": "test"} | ({"fewshot_split": "train"} if "train" in splits else {})
    try:
        with _quiet(), _environment(OFFLINE if splits is not None else {}):
            if splits is not None or name == "hotpotqa":
                made = ConfigurableTask(config=config)
            else:
                made = _stock_tasks().load([name])["tasks"][name]
    except Exception as error:
        if splits is not None:
            raise
        why = f"{type(error).__name__}: {shown(str(error), 300)}"
        fix = "run where the Hugging Face Hub can be reached, or give the rows as files (--data_dir)"
        raise ThoughtxError("E201", f"the data of {name} cannot be loaded", where=f"lm-eval task {name}", why=why, fix=fix) from error
    wanted = made.get_config("num_fewshot") if num_fewshot is None else num_fewshot
    made.set_config("num_fewshot", wanted or 0)
    made.set_fewshot_seed(seed=SEED)
    return made


@functools.cache
def _stock_tasks() -> Any:
    """lm-eval's index of its tasks, which takes seconds to make."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _model(
    system: Any,
    use_chat_template: bool,
    think_tags: Any,
    max_new_tokens: int | None,
    stack: contextlib.ExitStack,
    *,
    exact: bool,
    verify_key: Path | None,
) -> tuple[Any, Scorer | None]:
    """An lm-eval model, and its scorer where it is one of ours. What is opened here is closed with `stack`."""
    from lm_eval.api.model import LM

    if isinstance(system, LM):
        return system, None
    source: System
    system = getattr(system, "engine", system)
    if isinstance(system, Engine):
        source = EngineSystem(system, batch_size=system.build.max_batch_size)
    elif isinstance(system, (str, Path)):
        batch_size = EngineDir.open(Path(system)).build.max_batch_size if kind_of(Path(system), SYSTEMS) == "engine" else MODEL_BATCH
        source = open_system(Path(system), batch_size=batch_size, exact=exact, verify_key=verify_key)
        stack.callback(source.close)
    else:
        source = system
    scorer = Scorer(source, is_chat=use_chat_template, think_tags=think_tags, max_new_tokens=max_new_tokens or 256)
    return lm_class()(scorer), scorer


@functools.cache
def lm_class() -> Any:
    """The lm-eval model around a `Scorer`; made on demand, because its base class is lm-eval's."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class ScorerLM(TemplateLM):
        def __init__(self, scorer: Scorer) -> None:
            super().__init__()
            self.scorer = scorer

        @property
        def eot_token_id(self) -> int:
            return self.scorer.prefix_id

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return self.scorer.encode(string, add_special_tokens)

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            return self.scorer.score([(context, continuation) for _, context, continuation in requests])

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            """Whole texts, each token once, with as much before it as fits."""
            totals, room = [], self.scorer.source.max_length
            for request in requests:
                ids = self.scorer.encode(request.args[0], False)
                windows = get_rolling_token_windows(ids, self.scorer.prefix_id, room, 1)
                totals.append(sum(score for score, _ in self.scorer.score([make_disjoint_window(pair) for pair in windows])))
            return totals

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            return self.scorer.complete([request.args for request in requests])

        def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
            return self.scorer.text.render(chat_history, add_generation_prompt=add_generation_prompt)

        @property
        def tokenizer_name(self) -> str:
            return "thoughtx"

        def chat_template(self, chat_template: bool | str = False) -> str:
            return ""

    return ScorerLM


def _numbers(found: dict[str, Any], name: str, task: Any, scorer: Scorer | None) -> TaskNumbers:
    metrics = {}
    for key, value in found["results"][name].items():
        metric, comma, kept = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, (int, float)):
            spread = found["results"][name].get(f"{metric}_stderr,{kept}")
            label = metric if kept == "none" else key
            metrics[label] = Metric(float(value), float(spread) if isinstance(spread, (int, float)) else None)
    return TaskNumbers(
        num_items=int(found["n-samples"][name]["effective"]),
        num_fewshot=int(task.get_config("num_fewshot") or 0),
        num_truncated=None if scorer is None else scorer.num_truncated,
        num_alike=None if scorer is None else scorer.num_alike,
        metrics=metrics,
    )


def _sample(sample: dict[str, Any]) -> Sample:
    return Sample(
        id=sample["doc_id"],
        filter=sample["filter"],
        prompt=sample["arguments"][0][0],
        replies=[reply for replies in sample["resps"] for reply in replies],
        expected=sample["target"],
        metrics={metric: sample[metric] for metric in sample["metrics"]},
    )


def _versions() -> dict[str, str]:
    found = {"trtllm_thoughtx": __version__}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval and datasets print bars and notes; stdout is for results, and progress is ours to show."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
