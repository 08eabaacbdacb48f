"""What every stage's trainer shares: whole checkpoints, a stop when the loss is no number, progress, and a log to draw from.

transformers and TRL bring the loops, and with them several GPUs and nodes; `Guarded` goes in front of their trainer classes.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.files import atomic_file, read_named
from trtllm_thoughtx.progress import Progress

LOG = "log.jsonl"
LOG_BYTES = 256 << 20
PARTIAL = "unfinished"
NUM_KEPT = 2


def checkpoints(directory: Path) -> list[Path]:
    """The finished checkpoints of a stage, oldest first."""
    found = [path for path in directory.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def read_log(directory: Path) -> list[dict[str, Any]]:
    path = directory / LOG
    return [json.loads(line) for line in read_named(path, LOG_BYTES).splitlines()] if path.is_file() else []


class Guarded:
    """Mixin in front of a Trainer: a checkpoint appears under its name when it is whole; NaN stops the run (E162)."""

    _writes_partial = False

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        if not torch.isfinite(loss):
            state, last = self.state, checkpoints(Path(self.args.output_dir))  # type: ignore[attr-defined]
            kept = f"the last whole checkpoint is {last[-1]}" if last else "no checkpoint was written yet"
            raise ThoughtxError(
                "E162",
                "the loss is not a finite number",
                where=f"{self.args.output_dir} step {state.global_step + 1}",  # type: ignore[attr-defined]
                why="a learning rate that is too high, or weights or data that are damaged",
                fix=f"lower --lr; {kept}, and the same command goes on from there",
            )
        return loss

    def _get_output_dir(self, trial: Any) -> str:
        directory: str = super()._get_output_dir(trial=trial)  # type: ignore[misc]
        return os.path.join(directory, PARTIAL) if self._writes_partial else directory

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        root = Path(self.args.output_dir)  # type: ignore[attr-defined]
        name = f"checkpoint-{self.state.global_step}"  # type: ignore[attr-defined]
        self._writes_partial = True
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
        finally:
            self._writes_partial = False
        self.accelerator.wait_for_everyone()  # type: ignore[attr-defined]
        if self.args.should_save:  # type: ignore[attr-defined]
            if (root / name).exists():
                shutil.rmtree(root / name)
            (root / PARTIAL / name).rename(root / name)
            shutil.rmtree(root / PARTIAL, ignore_errors=True)
            for old in checkpoints(root)[:-NUM_KEPT]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()  # type: ignore[attr-defined]


class Watch(TrainerCallback):
    """Progress with the time left, and one line of `log.jsonl` for each time that the trainer logs."""

    def __init__(self, stage: str, directory: Path, progress: Progress) -> None:
        self.stage, self.directory, self.progress = stage, directory, progress
        self.stack = contextlib.ExitStack()
        self.shown: Any = None
        self.began, self.before = 0.0, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        kept = [row for row in read_log(self.directory) if row["step"] <= state.global_step]
        with atomic_file(self.directory / LOG) as file:
            file.writelines(json.dumps(row).encode() + b"\n" for row in kept)
        self.before = kept[-1]["seconds"] if kept else 0.0
        self.began = time.monotonic()
        self.shown = self.stack.enter_context(self.progress.stage(self.stage, state.max_steps - state.global_step))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.shown is not None:
            self.shown.advance(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self.shown is None or not logs or "train_runtime" in logs:
            return
        numbers = {key: value for key, value in logs.items() if isinstance(value, (int, float))}
        seconds = round(self.before + time.monotonic() - self.began, 1)
        row = {"stage": self.stage, "step": state.global_step, "seconds": seconds, **numbers}
        with open(self.directory / LOG, "ab") as file:
            file.write(json.dumps(row).encode() + b"\n")


def train(trainer: Any, watch: Watch) -> None:
    """Run to the end, from the last whole checkpoint where there is one."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    done = checkpoints(watch.directory)
    shutil.rmtree(watch.directory / PARTIAL, ignore_errors=True)
    with watch.stack:
        trainer.train(resume_from_checkpoint=str(done[-1]) if done else None)
