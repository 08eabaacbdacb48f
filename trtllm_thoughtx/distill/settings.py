"""What one distillation is told: the flags of `thoughtx-distill`, which are the keys of its YAML files too."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from trtllm_thoughtx.errors import ThoughtxError

GENERATED = "tasks"  # the value of `data` that means: draw items of trtllm_thoughtx.tasks
STAGES = ("supervised", "preference", "scored")
REASONING = ("auto", "varied", "full")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """`batch_size` counts rows of one optimizer step over all GPUs, `per_device_batch_size` those that one GPU holds at a time.

    Both weights are answer, chain of thought, efficiency: of the loss of stage 1, and of the reward of stage 3.

    `reasoning_steps`: `auto` keeps the shortest trace that suffices, `varied` adds up to three redundant checks to it,
    `full` keeps whole traces, a number keeps at most that many steps.
    """

    student_dir: Path
    output_dir: Path
    teacher_dir: Path | None = None
    data: str = GENERATED
    layers: tuple[int, ...] | None = None
    lora_rank: int = 0  # of the products that train beside a student that stays; 0: all its weights train
    lora_factor: int = 2  # of a product, peft's lora_alpha over r
    lr: float = 5e-6
    batch_size: int = 32
    per_device_batch_size: int = 1
    reasoning_steps: str | int = "auto"
    loss_weights: tuple[float, ...] = (0.4, 0.3, 0.3)
    supervised_steps: int = 1000
    preference_steps: int = 200
    scored_steps: int = 200
    preference_lr: float | None = None  # None: lr
    scored_lr: float | None = None
    max_seq_len: int = 4096
    kd_weight: float = 0.5
    kd_temperature: float = 1.0
    num_generations: int = 8
    beta: float = 0.1
    scored_beta: float = 0.02
    reward_weights: tuple[float, ...] = (0.4, 0.3, 0.3)
    weight_decay: float = 0.0
    warmup_steps: int = 20
    schedule: str = "cosine"
    tokens_a_batch: int = 1536  # of generated rows, padding included
    curriculum: bool = False  # of generated rows: easy items first, long contexts last; else everything from the start
    seed: int = 0
    dtype: str = "bfloat16"  # computed in; the trained weights are float32, which small steps need
    saved_dtype: str = "bfloat16"
    num_gpus: int = 1
    gpu_memory_gib: float = 80.0
    gradient_checkpointing: bool = True
    save_every: int = 200
    eval_items: int = 64  # held-out questions of each task that compare the stages at the end; 0: no comparison
    eval_data: Path | None = None

    def __post_init__(self) -> None:
        wrong = []
        if self.data == GENERATED and isinstance(self.reasoning_steps, int):
            wrong.append(("reasoning_steps", "a number needs traces from a file; generated chains have their own length"))
        if isinstance(self.reasoning_steps, str) and self.reasoning_steps not in REASONING:
            wrong.append(("reasoning_steps", f"it is {self.reasoning_steps!r}; it may be {', '.join(REASONING)} or a number"))
        for name, weights in (("loss_weights", self.loss_weights), ("reward_weights", self.reward_weights)):
            if len(weights) == 3 and min(weights) >= 0 and sum(weights) > 0:
                continue
            wrong.append((name, "three weights are needed (answer, chain of thought, efficiency), none of them negative"))
        if self.teacher_dir is None and self.kd_weight and self.kd_weight != Settings.kd_weight:
            wrong.append(("kd_weight", "without a teacher_dir there are no logits to learn from"))
        at_a_time = self.per_device_batch_size * self.world_size
        if self.batch_size % min(at_a_time, self.batch_size):
            wrong.append(
                ("batch_size", f"{self.batch_size} is no multiple of {at_a_time}, what the {self.world_size} processes hold at a time")
            )
        if self.lora_rank and self.layers is not None:
            wrong.append(("lora_rank", "an adapter belongs to a whole student; --layers makes another one of it"))
        if self.batch_size < self.world_size:
            wrong.append(("batch_size", f"{self.batch_size} rows for {self.world_size} processes"))
        if self.batch_size % (self.num_generations or 1) and self.scored_steps:
            wrong.append(("num_generations", f"batch_size {self.batch_size} is no multiple of {self.num_generations}"))
        if wrong:
            raise ThoughtxError(
                "E163",
                f"{wrong[0][0]} cannot be used",
                where="thoughtx-distill",
                why="; ".join(f"{name}: {why}" for name, why in wrong),
                fix="correct the setting. Nothing was read or written.",
            )

    def stage_dir(self, stage: str) -> Path:
        return self.output_dir / stage

    @property
    def rows_a_device(self) -> tuple[int, int]:
        """Rows that a process holds at a time, and how many times it does so in one optimizer step."""
        rows = min(self.per_device_batch_size, self.batch_size // self.world_size)
        return rows, self.batch_size // (rows * self.world_size)

    @property
    def world_size(self) -> int:
        """Processes that train together, as `accelerate launch` states it."""
        return int(os.environ.get("WORLD_SIZE", "1"))
