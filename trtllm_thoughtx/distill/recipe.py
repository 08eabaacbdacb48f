"""The recipe: three stages, each from the model that the one before it left, each whole or resumable.

    output_dir/supervised/{checkpoint-N, log.jsonl, settings.json, model}     likewise preference/ and scored/
    output_dir/curves.png, ablation.json                                      when they are done

A stage whose `model` is there is done. One with checkpoints goes on from the last of them, if its settings are the same.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState

from trtllm_thoughtx import plot, report
from trtllm_thoughtx.checkpoint.members import CALIBRATION, EXITS
from trtllm_thoughtx.checkpoint.opened import Checkpoint
from trtllm_thoughtx.distill import ablation, loop, lora, models, preference, rows, scored, supervised, traces
from trtllm_thoughtx.distill.mixture import Mixture
from trtllm_thoughtx.distill.settings import GENERATED, STAGES, Settings
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.files import atomic_file, read_json
from trtllm_thoughtx.progress import SILENT, Progress
from trtllm_thoughtx.text.text import Text

MODEL = "model"
NOT_IDENTITY = frozenset({"output_dir", "num_gpus", "gpu_memory_gib", "save_every", "per_device_batch_size", "eval_items", "eval_data"})


def identity(settings: Settings, stage: str) -> dict[str, Any]:
    """What a stage's result depends on, as its `settings.json` keeps it."""
    others = {f"{name}_steps" for name in STAGES if name != stage}
    fields = {key: value for key, value in dataclasses.asdict(settings).items() if key not in NOT_IDENTITY | others}
    fields = {key: value for key, value in fields.items() if not key.startswith("lora_") or settings.lora_rank}
    plain: dict[str, Any] = json.loads(json.dumps(fields, default=str))
    return plain


def num_steps(settings: Settings, stage: str) -> int:
    steps: int = getattr(settings, f"{stage}_steps")
    return steps


def start_of(settings: Settings, stage: str) -> Path:
    """The model that a stage starts from: the latest one before it, or the student as it was given."""
    before = [settings.stage_dir(name) / MODEL for name in STAGES[: STAGES.index(stage)]]
    done = [path for path in before if (path / "config.json").is_file()]
    return done[-1] if done else settings.student_dir


def adapter_before(settings: Settings, stage: str) -> Path | None:
    """The adapter that the stages before it made."""
    before = [settings.stage_dir(name) / lora.ADAPTER for name in STAGES[: STAGES.index(stage)]]
    done = [path for path in before if path.is_dir()]
    return done[-1] if done and settings.lora_rank else None


def is_open(settings: Settings, stage: str) -> bool:
    """Whether the stage is still to be run; nothing is written. E163 when its directory holds other settings' work."""
    directory = settings.stage_dir(stage)
    own = identity(settings, stage)
    if (directory / "settings.json").is_file():
        kept = read_json(directory, "settings.json", code="E163")
        changed = sorted(key for key in own if not isinstance(kept, dict) or kept.get(key) != own[key])
        if changed:
            raise ThoughtxError(
                "E163",
                f"the settings of {stage} changed since it began",
                where=str(directory),
                why=f"other values than before: {', '.join(changed)}",
                fix="restore them to go on, give another --output_dir, or --force to start this stage again",
            )
    elif directory.exists():
        fix = "give another --output_dir, or remove the directory"
        raise ThoughtxError("E130", "the directory of a stage holds something else", where=str(directory), why="no settings.json", fix=fix)
    return not (directory / MODEL / "config.json").is_file()


def begin(settings: Settings, stage: str, process: PartialState, *, force: bool) -> None:
    """Make the stage's directory, once all that it needs has been read; every process waits for it."""
    directory = settings.stage_dir(stage)
    process.wait_for_everyone()
    if process.is_main_process:
        if force and directory.is_dir():
            shutil.rmtree(directory)
        if not directory.is_dir():
            directory.mkdir(parents=True)
            with atomic_file(directory / "settings.json") as file:
                file.write(report.to_json(identity(settings, stage)).encode())
    process.wait_for_everyone()


def distill(settings: Settings, stages: Sequence[str] = STAGES, *, force: bool = False, progress: Progress = SILENT) -> dict[str, Any]:
    """Run `stages` (those with steps) in order; what was made, with the first and last loss of each."""
    process = PartialState(cpu=not models.torch.cuda.is_available())
    progress = progress if process.is_main_process else SILENT
    wanted = [stage for stage in STAGES if stage in stages and num_steps(settings, stage)]
    written = None if settings.data == GENERATED else traces.read_traces(Path(settings.data), progress.note)
    dropped = [name for name in (*EXITS, CALIBRATION) if (settings.student_dir / name).is_file()]
    if dropped:
        progress.note(f"note: {', '.join(dropped)} of the student are left out: they belong to the weights before training")
    made = []
    for stage in wanted:
        directory = settings.stage_dir(stage)
        if force or is_open(settings, stage):
            _run(settings, stage, written, loop.Watch(stage, directory, progress), process, force=force)
        else:
            progress.note(f"{stage}: done before, {directory / MODEL} is kept")
        losses = [row["loss"] for row in loop.read_log(directory) if "loss" in row]
        made.append({
            "stage": stage,
            "model": str(directory / MODEL),
            **({"adapter": str(directory / lora.ADAPTER)} if settings.lora_rank else {}),
            "num_steps": num_steps(settings, stage),
            "first_loss": losses[0] if losses else None,
            "last_loss": losses[-1] if losses else None,
        })  # fmt: skip
    found: dict[str, Any] = {"output_dir": str(settings.output_dir), "stages": made, "is_main_process": process.is_main_process}
    found |= {"ablation": None, "curves": None}
    if process.is_main_process and made:
        curves = settings.output_dir / "curves.png"
        plot.curves_plot(curves, {stage: loop.read_log(settings.stage_dir(stage)) for stage in STAGES})
        found["curves"] = str(curves)
        if settings.eval_items and len(ablation.stages_of(settings)) > 1 and (settings.data == GENERATED or settings.eval_data):
            found["ablation"] = ablation.ablate(settings, progress)
    process.wait_for_everyone()
    return found


def _run(
    settings: Settings, stage: str, written: list[traces.Trace] | None, watch: loop.Watch, process: PartialState, *, force: bool
) -> None:
    start = start_of(settings, stage)
    layers = settings.layers if start == settings.student_dir else None
    if layers is not None and stage != "supervised":
        why = f"{stage} compares with the model that it starts from, which has all its layers"
        fix = "run the supervised stage first, or leave --layers out"
        raise ThoughtxError("E163", "--layers belongs to the supervised stage", where=str(start), why=why, fix=fix)
    text = models.load_text(settings.student_dir)
    models.torch.manual_seed(settings.seed)
    adapter = adapter_before(settings, stage)
    begun: Path | Checkpoint = start if adapter is None else Checkpoint.open(settings.student_dir, lora_dir=adapter)
    model = models.load_student(begun, "float32", layers, gradient_checkpointing=settings.gradient_checkpointing)
    model = lora.with_adapter(model, settings, text, stage) if settings.lora_rank else model
    if stage == "supervised":
        teacher = None
        if settings.teacher_dir is not None and settings.kd_weight:
            teacher = models.load_model(settings.teacher_dir, models.DTYPES[settings.dtype], attention="sdpa")
        data: Mixture | list[rows.Row]
        if written is None:
            pace: dict[str, Any] = {} if settings.curriculum else {"easy_until": 0.0, "short_until": 0.0, "full_from": 0.0}
            data = Mixture(
                rows.encoder(text),
                settings.seed,
                settings.supervised_steps * process.num_processes,
                settings.tokens_a_batch,
                str(settings.reasoning_steps),
                **pace,
            )
        else:
            data = _rows(settings, written, text, watch.progress)
        begin(settings, stage, process, force=force)
        trainer: Any = supervised.run(settings, model, teacher, data, text.pad_id or 0, watch)
    else:
        begin(settings, stage, process, force=force)
        module = preference if stage == "preference" else scored
        trainer = module.run(settings, model, text, written, watch)
    weights = None if settings.lora_rank else trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if process.is_main_process:
        trained = trainer.accelerator.unwrap_model(trainer.model)
        if weights is None:
            lora.save_adapter(trained, adapter, watch.directory / lora.ADAPTER, settings, text)
            trained = trained.merge_and_unload()
            weights = trained.state_dict()
        models.save_model(trained, weights, settings.student_dir, watch.directory / MODEL, settings.saved_dtype)
    process.wait_for_everyone()


def _rows(settings: Settings, written: list[traces.Trace], text: Text, progress: Progress) -> list[rows.Row]:
    """Rows of the traces, as long as `reasoning_steps` wants them; those that do not fit are counted aloud. E161 if none is left."""
    made, num_unusable = [], 0
    for trace in written:
        steps = trace.steps if settings.reasoning_steps == "full" else traces.shortest_sufficient(trace, settings.reasoning_steps)
        row = None if steps is None else rows.from_text(text, trace.prompt, steps, trace.answer)
        if row is None or len(row.ids) > settings.max_seq_len:
            num_unusable += 1
        else:
            made.append(row)
    if not made:
        why = f"all {len(written)} are longer than {settings.max_seq_len} tokens or than {settings.reasoning_steps} steps"
        fix = "raise --max_seq_len, or give --reasoning_steps full"
        raise ThoughtxError("E161", "no row can be used", where=settings.data, why=why, fix=fix)
    if num_unusable:
        progress.note(f"{num_unusable} of {len(written)} traces are left out: longer than --max_seq_len or --reasoning_steps allows")
    return made


def distill_tables(made: dict[str, Any]) -> list[Any]:
    """What was made, for people."""
    columns = ("stage", "steps", "first loss", "last loss", "model")
    lines = [[row["stage"], row["num_steps"], row["first_loss"], row["last_loss"], row["model"]] for row in made["stages"]]
    return [
        report.table("distilled", columns, lines),
        *([] if made["ablation"] is None else ablation.ablation_tables(made["ablation"])),
        *([] if made["curves"] is None else [f"curves: {made['curves']}"]),
        "next: thoughtx-eval --model_dir MODEL, thoughtx-convert --model_dir MODEL --output_dir CKPT",
    ]
