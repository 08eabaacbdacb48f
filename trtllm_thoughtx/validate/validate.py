"""Is this engine the model? A list of named checks on an engine directory, each passed, failed, or skipped with the reason.

    files       every file is what the manifest says (nothing is loaded before)
    plan        a TensorRT plan was built from exactly the graph at hand, by hash
    prefill     logits of prompts below, at and past a chunk boundary, against the reference
    layers      every layer's hidden state
    decode      logits through the KV cache, one token at a time, with the reference's tokens
    ragged      rows of different lengths in one batch, against the reference and against the same rows alone
    pieces      a prompt prefilled in segments, against the reference and against the whole
    answers     of a quantized engine, and of experts in 16 bits, in place of all these: KL, top-1 agreement, perplexity (`quality`)

What is expected comes from transformers (`reference`) or from a golden file; the limits are `parity`'s. A backend that cannot run
here yields a skipped check, never a passed one.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from trtllm_thoughtx import report
from trtllm_thoughtx.backends import BACKENDS
from trtllm_thoughtx.build.engine_dir import EngineDir
from trtllm_thoughtx.checkpoint.directory import HUGGING_FACE
from trtllm_thoughtx.checkpoint.opened import Checkpoint
from trtllm_thoughtx.config import BuildConfig, ModelConfig
from trtllm_thoughtx.errors import ThoughtxError, listed, shown
from trtllm_thoughtx.progress import SILENT, Progress
from trtllm_thoughtx.report import Check
from trtllm_thoughtx.runtime.engine import Engine
from trtllm_thoughtx.ship.signature import file_checks
from trtllm_thoughtx.validate import golden as golden_file
from trtllm_thoughtx.validate import parity, polygraphy, quality
from trtllm_thoughtx.validate.given import check_same_model, given_prompts
from trtllm_thoughtx.validate.golden import Expected, Prompt, Truth
from trtllm_thoughtx.validate.runs import SEGMENTS, Run, decoded, longest, prefilled

WEIGHTS = (".safetensors", "config.json")  # of the inputs, those that make the numbers; tokenizers do not
Model = Path | Checkpoint
MAX_RAGGED_LENGTH = 512


@dataclass(frozen=True)
class Report:
    """The checks of one validation. `ok`: none failed; look at `count` for how many were skipped."""

    checks: tuple[Check, ...]
    expected_from: str

    @property
    def ok(self) -> bool:
        return not self.count["failed"]

    @property
    def count(self) -> dict[str, int]:
        return report.count(self.checks)

    def document(self) -> dict[str, Any]:
        return {"expected_from": self.expected_from, "checks": self.checks, "count": self.count}

    def strictly(self) -> Report:
        """The same with skipped checks as failures."""

        def strict(check: Check) -> Check:
            why = f"skipped, and --strict was given: {check.reason}"
            return replace(check, status="failed", reason=why) if check.status == "skipped" else check

        return replace(self, checks=tuple(map(strict, self.checks)))

    @property
    def verdict(self) -> str:
        count = self.count
        said = "FAILED" if not self.ok else "PASSED WHAT WAS CHECKED" if count["skipped"] else "PASSED"
        return f"{said}: {count['passed']} passed, {count['failed']} failed, {count['skipped']} skipped"


def validate(
    engine_dir: Path,
    reference: Path | None = None,
    golden: Path | None = None,
    record: Path | None = None,
    bisect: bool = False,
    backend: str | None = None,
    seed: int = 0,
    exact: bool = False,
    prompts: Path | None = None,
    private_data: bool = False,
    verify_key: Path | None = None,
    export_check: Path | None = None,
    lora_dir: Path | None = None,
    progress: Progress = SILENT,
) -> Report:
    """Check the engine in `engine_dir` against a Hugging Face directory or a golden file; `backend` None is every one it holds.

    `exact`: onnxruntime runs the graph as it stands, and is judged by the exact graph's limits. `lora_dir` is merged by peft.
    `prompts`: a JSONL file of prompts that are checked beside the plan's; with `private_data` a recorded file has only their hashes.
    `record` writes the reference's results as a golden file. `bisect` adds a check that names the first layer out of its band.
    `verify_key` adds a check: that this public key signed the directory. `export_check`, where nothing failed, gets files with which
    Polygraphy checks the engine; it needs nothing to compare with.
    Raises ThoughtxError when the question cannot be asked (another model, nothing to compare with); a wrong engine is a Report.
    """
    if export_check is None or reference is not None or golden is not None:
        _check_request(reference, golden, record)
    if private_data and (record is None or prompts is None):
        why, fix = "it says how a recorded file keeps the prompts that were given", "add --record FILE and --prompts FILE.jsonl"
        raise _usage("--private_data", "--private_data needs --record and --prompts", why, fix)
    if lora_dir is not None and reference is None:
        raise _usage("--lora_dir", "--lora_dir needs --reference", "it changes the reference alone", "add --reference HF")
    directory = EngineDir.open(Path(engine_dir))
    backends = directory.backends if backend is None else (directory.choose(backend),)
    if export_check is not None:
        polygraphy.check_exportable(directory, export_check)
    checks = file_checks(directory, verify_key)
    if any(check.status == "failed" for check in checks):
        why = f"the files do not match their {'manifest' if verify_key is None else 'manifest and signature'}, so nothing was loaded"
        return Report((*checks, *(Check(f"{name}: runs", "skipped", why) for name in backends)), "nothing")
    if reference is None and golden is None:
        assert export_check is not None
        return Report((*checks, polygraphy.export_check(directory, export_check, seed)), "nothing")
    given = () if prompts is None else given_prompts(prompts, directory)
    model = reference and Checkpoint.open(reference, HUGGING_FACE, lora_dir)
    expected = read_expected(directory, model, golden, seed, progress, given)
    if record is not None:
        golden_file.write_golden(Path(record), expected, is_private=private_data)
    for name in backends:
        checks += _backend_checks(directory, name, expected, bisect, exact and BACKENDS[name].runs_graph, progress, lora_dir)
    if export_check is not None and Report(tuple(checks), "").ok:
        checks.append(polygraphy.export_check(directory, export_check, seed))
    return Report(tuple(checks), expected.source)


def _usage(where: str, what: str, why: str, fix: str) -> ThoughtxError:
    return ThoughtxError("E001", what, where=where, why=why, fix=fix)


def _check_request(reference: Path | None, golden: Path | None, record: Path | None) -> None:
    refuse = partial(_usage, "--reference, --golden, --record")
    if (reference is None) == (golden is None):
        raise refuse("one thing to compare with is needed", "give either --reference or --golden", "add --reference HF or --golden FILE")
    if record is not None and reference is None:
        raise refuse("--record needs --reference", "a golden file holds the reference's results", "add --reference HF")
    if record is not None and (record.is_dir() or not record.absolute().parent.is_dir()):
        why = f"{shown(str(record))} is a directory, or its parent is none"
        raise ThoughtxError("E130", "the golden file cannot be written", where=shown(str(record)), why=why, fix="choose another path")


# --- what is expected ------------------------------------------------------------------------------------------------


def identity_of(directory: EngineDir) -> dict[str, Any]:
    """Whose results these are: the model's sizes, the engine's type and mask, and the sha256 of the weights it was made from."""
    config, build = directory.config, directory.build
    chunks = [build.chunk_size, build.sink_tokens, build.left_chunks, build.num_anchors] if build.use_chunked_attention else None
    inputs = directory.manifest["inputs"]
    return {
        "family": config.family,
        "dtype": build.cache_dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_layers": config.num_layers,
        "chunks": chunks,
        "max_seq_len": build.max_seq_len,
        "inputs": {row["name"]: row["sha256"] for row in inputs if row["name"].endswith(WEIGHTS) and "tokenizer" not in row["name"]},
    }


def read_expected(
    directory: EngineDir, reference: Model | None, golden: Path | None, seed: int, progress: Progress, given: tuple[Prompt, ...] = ()
) -> Expected:
    """From a golden file, or from the reference. `given`: prompts beside those of the plan."""
    identity = identity_of(directory)
    if golden is not None:
        return golden_file.read_golden(Path(golden), identity, given)
    assert reference is not None
    check_same_model(directory, reference := Checkpoint.open(reference, HUGGING_FACE))
    config, build, prompts = directory.config, directory.build, tuple[Prompt, ...]()
    if config.quantization is not None:
        prompts = quality.prompts_of(quality.read_limits(directory)[1], build, config.vocab_size)
    prompts = (*(prompts or parity.plan_prompts(config, build, seed)), *given)
    return run_reference(reference, config, build, identity, seed, progress, prompts)


def run_reference(
    path: Model,
    config: ModelConfig,
    build: BuildConfig,
    identity: dict[str, Any],
    seed: int = 0,
    progress: Progress = SILENT,
    prompts: tuple[Prompt, ...] | None = None,
) -> Expected:
    """Two runs of the reference, one model in memory at a time: the truth, then the rounding band. `prompts` None: `parity`'s."""
    from trtllm_thoughtx.validate.reference import Reference, version

    dtype = build.cache_dtype
    prompts = prompts or parity.plan_prompts(config, build, seed)
    runs = []
    for kind in (parity.WIDER[dtype], dtype):
        with progress.stage(f"reference in {kind}", len(prompts), "steps") as stage:
            model, results = Reference(path, kind, rounds=not build.max_lora_rank), {}
            for prompt in prompts:
                results[prompt.name] = model.run(prompt.ids, chunk=prompt.mask, layers=prompt.layers, rows=prompt.rows)
                stage.advance(1)
            model.close()
        runs.append(results)
    truths = {}
    for name, (logits, hidden) in runs[0].items():
        rough, rough_hidden = runs[1][name]
        bands = tuple(parity.band_of(a, b) for a, b in zip(hidden, rough_hidden, strict=True))
        truths[name] = Truth(logits, parity.band_of(logits, rough), tuple(hidden), bands)
    source = f"{version(path)} in {parity.WIDER[dtype]}, seed {seed}"
    return Expected(identity, source, prompts, parity.pooled(truths, dtype))


# --- checks ----------------------------------------------------------------------------------------------------------


def _backend_checks(
    directory: EngineDir, backend: str, expected: Expected, bisect: bool, exact: bool, progress: Progress, lora_dir: Path | None
) -> list[Check]:
    checks = [_plan_check(directory, backend)] if BACKENDS[backend].builds_plans else []
    if any(check.status == "failed" for check in checks):
        return [*checks, Check(f"{backend}: runs", "skipped", "the plan belongs to another graph")]
    try:
        engine = _loaded(directory, backend, lora_dir, exact=exact)
    except ThoughtxError as error:
        if error.code not in ("E201", "E202"):
            raise
        return [*checks, Check(f"{backend}: runs", "skipped", f"{error.what}: {error.why}")]
    if quality.applies(directory):
        with contextlib.closing(engine), progress.stage(f"{backend} against the reference"):
            found = quality.checks(engine, backend, expected, quality.limits_of(directory, expected, is_exact=engine.is_exact))
            return [*checks, *(Check(name, "failed" if wrong else "passed", wrong, evidence) for name, wrong, evidence in found)]
    with progress.stage(f"{backend} against the reference", 2 * len(expected.prompts), "steps") as stage:
        checks += logits_checks(engine, backend, expected, lambda: stage.advance(1))
        engine.close()
    if not BACKENDS[backend].runs_graph:
        return [*checks, Check(f"{backend}: layers", "skipped", "a plan has no outputs for hidden states")]
    tapped = _loaded(directory, backend, lora_dir, exact=exact, tap_layers=True)
    checks += layers_checks(tapped, backend, expected, bisect)
    tapped.close()
    return checks


def _loaded(directory: EngineDir, backend: str, lora_dir: Path | None, **how: Any) -> Engine:
    """With the adapter in every row, where the engine takes adapters; else it is merged already."""
    engine = Engine.load(directory.root, backend, **how)
    if lora_dir is not None and directory.build.max_lora_rank:
        engine.session.adapter = engine.load_adapter(lora_dir)
    return engine


def _plan_check(directory: EngineDir, backend: str) -> Check:
    """By hash: graph and weights at hand are those recorded when the plan was built, and the plan is that plan."""
    hashes = {row["name"]: row["sha256"] for row in directory.manifest["outputs"]}
    wrong, num = [], 0
    for part in directory.parts:
        plan = part.plans[backend]
        wanted = [("graph_sha256", part.onnx, plan.graph_sha256), ("sha256", plan.file, plan.sha256)]
        if part.data:
            wanted.append(("weights_sha256", part.data, plan.weights_sha256))
        for what, file, recorded in wanted:
            num += 1
            if hashes.get(file) is None or hashes[file] != recorded:
                wrong.append(f"{shown(file)}: {what} recorded for the plan is {shown(recorded)}, the file has {hashes.get(file)}")
    name = f"{backend}: plan was built from this graph"
    return Check(name, "failed" if wrong else "passed", listed(wrong), {"num_hashes": num, "num_parts": len(directory.parts)})


def logits_checks(engine: Engine, backend: str, expected: Expected, step: Callable[[], object] = lambda: None) -> list[Check]:
    """Prefill, decode, ragged and segments, on an engine that is loaded."""
    judge = _Judge(backend, expected)
    alone: dict[str, np.ndarray] = {}
    for prompt in expected.prompts:
        alone[prompt.name] = engine.forward([prompt.ids], chunk_size=prompt.chunk_size)[0][list(prompt.rows)]
        judge.logits(f"prefill {prompt.name}", prompt, alone[prompt.name])
        step()
    for prompt in expected.prompts:
        if len(prompt.ids) > 1:
            _decoded(engine, judge, f"decode {prompt.name}", [prompt], [max(1, len(prompt.ids) - parity.NUM_DECODED)])
        step()
    _ragged(engine, judge, alone, [prompt for prompt in expected.prompts if not prompt.is_given])
    if given := [prompt for prompt in expected.prompts if prompt.is_given]:
        _ragged(engine, judge, alone, given, " of --prompts")
    _segments(engine, judge, alone)
    return judge.checks


class _Judge:
    """Collects checks of one backend against the expected numbers."""

    def __init__(self, backend: str, expected: Expected) -> None:
        self.backend, self.expected, self.dtype = backend, expected, expected.identity["dtype"]
        self.checks: list[Check] = []

    def add(self, name: str, verdicts: Sequence[parity.Verdict], **evidence: Any) -> None:
        """One check over several comparisons; the worst is its evidence."""
        worst = max(verdicts, key=lambda v: (not v.ok, v.rms_ratio))
        ok = all(verdict.ok for verdict in verdicts)
        numbers = {key: value for key, value in dataclasses.asdict(worst).items() if key not in ("ok", "num_bad")}
        self.checks.append(
            Check(f"{self.backend}: {name}", "passed" if ok else "failed", "" if ok else worst.reason, {**evidence, **numbers})
        )

    def skip(self, name: str, reason: str) -> None:
        self.checks.append(Check(f"{self.backend}: {name}", "skipped", reason))

    def verdict(self, prompt: Prompt, got: np.ndarray, rows: Sequence[int], other: np.ndarray | None = None) -> parity.Verdict:
        """`got` [rows, vocab] against the truth, or against `other`, by the prompt's band; `rows` index into the prompt's."""
        truth = self.expected.truths[prompt.name]
        return parity.compare(got, (truth.logits if other is None else other)[list(rows)], truth.logits_band, self.dtype)

    def verdicts(self, run: Run, others: Mapping[str, np.ndarray] | None = None) -> list[parity.Verdict]:
        """Of each prompt of a run, at its rows, against the truth or against the rows of the same prompt in `others`."""
        found = []
        for prompt, first, logits in run:
            rows = [i for i, position in enumerate(prompt.rows) if position >= first]
            got = logits[[prompt.rows[i] - first for i in rows]]
            found.append(self.verdict(prompt, got, rows, None if others is None else others[prompt.name]))
        return found

    def logits(self, name: str, prompt: Prompt, got: np.ndarray) -> None:
        rows = range(len(prompt.rows))
        agree = float(np.mean(got.argmax(-1) == self.expected.truths[prompt.name].logits.argmax(-1)))
        self.add(name, [self.verdict(prompt, got, rows)], num_tokens=len(prompt.ids), num_rows=len(rows), top1_agreement=agree)


def _decoded(engine: Engine, judge: _Judge, name: str, prompts: Sequence[Prompt], num_prompt: Sequence[int]) -> None:
    """Teacher-forced decoding of `prompts` in one batch, from `num_prompt[b]` tokens on."""
    run = decoded(engine, prompts, num_prompt)
    num_rows = sum(position >= first for prompt, first, _ in run for position in prompt.rows)
    steps = [len(p.ids) - n for p, n in zip(prompts, num_prompt, strict=True)]
    judge.add(name, judge.verdicts(run), num_steps=max(steps), num_rows=num_rows)


def _ragged(engine: Engine, judge: _Judge, alone: dict[str, np.ndarray], prompts: Sequence[Prompt], which: str = "") -> None:
    prompts = _batch(prompts, engine.build.max_batch_size)
    if len(prompts) < 2:
        judge.skip(f"ragged prefill{which}", f"max_batch_size is {engine.build.max_batch_size}, or there is one prompt only")
        return
    run, lengths = prefilled(engine, prompts), " ".join(str(len(p.ids)) for p in prompts)
    judge.add(f"ragged prefill{which}", judge.verdicts(run), lengths=lengths)
    judge.add(f"ragged equals alone{which}", judge.verdicts(run, alone), lengths=lengths)
    _decoded(engine, judge, f"ragged decode{which}", prompts, [-(-len(p.ids) // 2) for p in prompts])


def _batch(prompts: Sequence[Prompt], size: int) -> list[Prompt]:
    """At most `size` prompts that may share a batch: of one chunk size and different lengths, the shortest and longest first."""
    first = prompts[0].chunk_size
    fit = sorted((p for p in prompts if p.chunk_size == first and len(p.ids) <= MAX_RAGGED_LENGTH), key=lambda p: len(p.ids))
    ends = [p for pair in zip(fit, reversed(fit), strict=True) for p in pair]
    return list({p.name: p for p in ends}.values())[:size]


def _segments(engine: Engine, judge: _Judge, alone: dict[str, np.ndarray]) -> None:
    prompt, sizes = longest(engine, [p for p in judge.expected.prompts if len(p.ids) <= MAX_RAGGED_LENGTH])
    for size in SEGMENTS:
        if size in sizes:
            run = prefilled(engine, [prompt], size)
            judge.add(f"pieces of {size}", [*judge.verdicts(run), *judge.verdicts(run, alone)], num_tokens=len(prompt.ids))
        else:
            why = f"max_input_len is {engine.build.max_input_len}, the longest prompt has {len(prompt.ids)} tokens"
            judge.skip(f"pieces of {size}", why)


def layers_checks(engine: Engine, backend: str, expected: Expected, bisect: bool) -> list[Check]:
    """Every hidden state of the prompts that have them; with `bisect` also the first layer out of its band, over all of them."""
    judge = _Judge(backend, expected)
    out: list[tuple[int, str, parity.Verdict]] = []
    for prompt in (p for p in expected.prompts if p.layers):
        truth = expected.truths[prompt.name]
        _, hidden = engine.forward_layers([prompt.ids], chunk_size=prompt.chunk_size)
        assert len(hidden) == len(truth.hidden), (len(hidden), len(truth.hidden))
        verdicts = [
            parity.compare(layer[0][list(prompt.rows)], wanted, band, judge.dtype)
            for layer, wanted, band in zip(hidden, truth.hidden, truth.hidden_bands, strict=True)
        ]
        out += [(depth, prompt.name, verdict) for depth, verdict in enumerate(verdicts) if not verdict.ok]
        judge.add(f"layers {prompt.name}", verdicts, num_hidden_states=len(verdicts), ratios=[v.rms_ratio for v in verdicts])
    if bisect:
        judge.checks.append(_bisect_check(backend, out, expected.identity["num_layers"]))
    return judge.checks


def _bisect_check(backend: str, out: list[tuple[int, str, parity.Verdict]], num_layers: int) -> Check:
    name = f"{backend}: bisect"
    if not out:
        return Check(name, "passed", evidence={"first_out_of_band": "none", "num_hidden_states": num_layers + 1})
    depth, prompt, verdict = min(out, key=lambda row: row[0])
    label = "the embedding" if depth == 0 else f"layer {depth - 1}"
    evidence = {"first_out_of_band": label, "prompt": prompt, "rms_error": verdict.rms_error, "rms_band": verdict.rms_band}
    return Check(name, "failed", f"{label} is the first out of its band: {verdict.reason}", evidence)
