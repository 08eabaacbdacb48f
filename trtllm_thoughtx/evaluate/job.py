"""One call of `thoughtx-eval`: check all that it names, ask, compare, keep and draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtllm_thoughtx import plot as pictures
from trtllm_thoughtx import report
from trtllm_thoughtx.bench import BUSY
from trtllm_thoughtx.checkpoint.directory import kind_of
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.evaluate import memory, record
from trtllm_thoughtx.evaluate.opened import SYSTEMS, check_system, open_system
from trtllm_thoughtx.evaluate.questions import Question, file_rows, generated
from trtllm_thoughtx.evaluate.record import Result
from trtllm_thoughtx.evaluate.run import evaluate
from trtllm_thoughtx.evaluate.summary import Comparison, Summary, check_same_questions, comparison_tables, result_tables, summarize
from trtllm_thoughtx.evaluate.summary import compare as compared
from trtllm_thoughtx.jsonl import Bad
from trtllm_thoughtx.progress import SILENT, Progress
from trtllm_thoughtx.runtime.answers import Answers
from trtllm_thoughtx.runtime.jobs import ROW, STOP
from trtllm_thoughtx.text.params import DRAFTS, PENALTIES, THINKING, GenerationParams, unused_settings

if TYPE_CHECKING:
    from trtllm_thoughtx.evaluate.harness import HarnessResult

OWN = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "do_sample")  # what eval sets itself
CHECKPOINTS = ("repetition_penalty", "stop")  # what its generation_config.json sets where no flag does
SETTINGS = ("top_k", "min_p", *PENALTIES, "stop", "stop_token_ids")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What `thoughtx-eval` found: the summary of a system and of the one beside it, or lm-eval's results."""

    path: str
    num_errors: int = 0
    summary: Summary | None = None
    other_summary: Summary | None = None
    comparison: Comparison | None = None
    harness: HarnessResult | None = None


def evaluation(
    path: Path,
    *,
    tasks: Sequence[str] | None = None,
    dataset: Path | None = None,
    compare: Path | None = None,
    num_items: int = 120,
    sizes: Sequence[int] | None = None,
    lengths: Sequence[int] = (0,),
    cut_share: float = 0.0,
    split: str = "test",
    seed: int = 0,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    batch_size: int | None = None,
    backend: str | None = None,
    num_threads: int | None = None,
    exact: bool = False,
    verify_key: Path | None = None,
    chunk_size: int | str | None = None,
    memory_context: int | None = None,
    output: Path | None = None,
    answers: Path | None = None,
    resume: bool = False,
    on_error: str = STOP,
    plot: Path | None = None,
    limit: int | None = None,
    match: str | None = None,
    enable_thinking: str | None = None,
    chat_template_kwargs: str | None = None,
    progress: Progress = SILENT,
    **settings: Any,
) -> Evaluation:
    """Ask the system at `path`, and the one that it is compared with, the questions of `tasks` or `dataset`; the flags of
    `thoughtx-eval` have the same names."""
    for target in (output, plot):
        if target is not None:
            report.check_file_output(target)
    if plot is not None:
        pictures.check_format(plot)
    assert set(settings) <= {*THINKING, *DRAFTS, *SETTINGS}, settings
    settings = {name: value for name, value in settings.items() if value is not None}
    if resume and answers is None:
        raise _usage("--resume needs --answers", "there is nothing to go on with", "name the file that the stopped evaluation wrote")
    if answers is not None and compare is not None and not compare.is_file():
        why, fix = "they are those of one system", "ask the other one alone with --output, and give that file to --compare"
        raise _usage("--answers cannot be used with two systems", why, fix)
    done = None if answers is None else Answers(answers, resume=resume, num_tokens="num_tokens")
    bad: list[Bad] = []
    if dataset is None:
        asked = generated(tasks or (), split, num_items=num_items, seed=seed, sizes=sizes, lengths=lengths, cut_share=cut_share)
    else:
        rows = file_rows(dataset, match, with_settings=True)
        asked, bad = (rows.good if on_error == ROW and rows.good else rows.all())[:limit], rows.bad
        if rows.note:
            progress.note(rows.note)
    earlier = record.load(compare) if compare is not None and compare.is_file() else None
    asking = Asking(
        asked,
        GenerationParams(max_new_tokens=max_new_tokens or 512, temperature=temperature, top_p=top_p, seed=seed, **settings),
        frozenset(settings),
        (enable_thinking, chat_template_kwargs),
        {"backend": backend, "num_threads": num_threads, "batch_size": batch_size, "chunk_size": chunk_size},
        memory_context if memory_context is not None else 2048 if compare is not None else 0,
        progress,
        bad,
        on_error,
    )
    if earlier is not None:
        check_same_questions([(one.id, " | ".join(one.accepted), one.match) for one in asked], earlier)
    paths = (path, *((compare,) if compare is not None and earlier is None else ()))
    of_engines = {"exact": exact, "verify_key": verify_key}
    owns = [of_engines if one is path or kind_of(one, SYSTEMS) == "engine" else {} for one in paths]
    for one, own in zip(paths, owns, strict=True):
        asking.check(one, own)
    results: list[Result] = []
    for one, own in zip(paths, owns, strict=True):
        results.append(asking.ask(one, own, done))
        if output is not None and one is path:
            record.save(results[0], output)
    results += [earlier] if earlier is not None else []
    summaries = [summarize(result) for result in results]
    if plot is not None:
        pictures.accuracy_plot(plot, summaries)
    return Evaluation(
        path=str(path),
        num_errors=max(len(result.failed) for result in results),
        summary=summaries[0],
        other_summary=summaries[1] if len(results) > 1 else None,
        comparison=compared(*results) if len(results) > 1 else None,
    )


def harness_evaluation(
    path: Path,
    harness: Sequence[str],
    *,
    data_dir: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    chat_template: bool = False,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    exact: bool = False,
    verify_key: Path | None = None,
    enable_thinking: str | None = None,
    chat_template_kwargs: str | None = None,
    progress: Progress = SILENT,
) -> Evaluation:
    """The same for the lm-eval tasks `harness`."""
    from trtllm_thoughtx.evaluate.harness import run_harness

    found = run_harness(
        path,
        harness,
        data_dir,
        num_fewshot,
        limit,
        use_chat_template=chat_template,
        template=(enable_thinking, chat_template_kwargs),
        max_new_tokens=max_new_tokens,
        temperature=temperature or None,
        exact=exact,
        verify_key=verify_key,
        progress=progress,
    )
    return Evaluation(path=str(path), harness=found)


def _usage(what: str, why: str, fix: str) -> ThoughtxError:
    return ThoughtxError("E001", what, where="thoughtx-eval", why=why, fix=fix)


@dataclass(frozen=True)
class Asking:
    """What is asked of each system, and how. `given` names the settings that a flag set, `options` how a system is opened;
    `context` is the length at which memory is measured, 0 not; `bad` are the lines that are no questions. A method's `of_engine` are flags
    that only an engine has."""

    questions: Sequence[Question]
    params: GenerationParams
    given: frozenset[str]
    template: tuple[str | None, str | None]
    options: Mapping[str, Any]
    context: int
    progress: Progress
    bad: Sequence[Bad]
    on_error: str

    def check(self, path: Path, of_engine: Mapping[str, Any]) -> None:
        """Refuse what can be refused before anything is loaded."""
        flags = {name: self.options[name] for name in ("backend", "batch_size", "chunk_size")}
        check_system(path, **flags, **of_engine, engine_flags=tuple(self.params.engine_flags))

    def ask(self, path: Path, of_engine: Mapping[str, Any], answers: Answers | None) -> Result:
        progress, system = self.progress, open_system(path, **of_engine, **self.options)
        try:
            unread = system.text.set_template(*self.template)
            unread += [] if system.text.has_template else ["chat template (the checkpoint has none: questions go in as they are)"]
            for one in unread:
                progress.note(f"{path.name}: not applied: {one}")
            own = system.text.default_params()
            params = replace(self.params, **{name: getattr(own, name) for name in CHECKPOINTS if name not in self.given})
            ignored = unused_settings(system.text.generation_config, {*self.given, *OWN})
            if ignored:
                progress.note(f"not applied: {', '.join(ignored)} (the checkpoint's setting is malformed or not supported)")
            result = evaluate(system, self.questions, params, progress, answers=answers, bad=self.bad, on_error=self.on_error)
            result.conditions.update({"template_kwargs": system.text.template_kwargs, "not_applied": [*ignored, *unread]})
        finally:
            system.close()
        if self.context:
            progress.note(f"measuring the memory of {path.name} at {self.context} tokens")
            result.conditions["memory"] = memory.measure(path, self.context, self.options["backend"], exact=of_engine.get("exact", False))
        return result


def evaluation_tables(found: Evaluation) -> list[Any]:
    """An evaluation for people."""
    if found.harness is not None:
        lines = [
            [task, metric, value.value, value.stderr, row.num_items, row.num_fewshot, row.num_truncated]
            for task, row in found.harness.tasks.items()
            for metric, value in row.metrics.items()
        ]
        return [report.table("lm-eval", ("task", "metric", "value", "standard error", "items", "few-shot", "cut prompts"), lines)]
    assert found.summary is not None
    tables = result_tables(found.summary)
    if found.comparison is not None and found.other_summary is not None:
        tables += [*result_tables(found.other_summary), *comparison_tables(found.comparison)]
    machine = found.summary.conditions["machine"]
    if machine["load"] > BUSY * (machine["num_cpus"] or 1):
        tables.append(
            f"times NOT TO BE QUOTED: the machine was busy before the start (load {machine['load']:.1f} on {machine['num_cpus']} CPUs)"
        )
    return tables
