"""Stage 1, keep the multi-hop ability: learn the traces, and the teacher's distribution over every token of them.

    loss = (1 - kd_weight) * sum_g w_g CE_g  +  kd_weight * sum_g w_g T^2 KL_g(teacher || student)

g are the parts of a row (answer, chain of thought, efficiency), CE_g and KL_g means over the tokens of a part, w_g the loss
weights made to sum to one over the parts that a batch holds. The soft targets are Hinton's (arXiv 1503.02531, section 2); both
models share a tokenizer, and where one vocabulary is padded longer the rest of it is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainingArguments

from trtllm_thoughtx.distill import loop
from trtllm_thoughtx.distill.mixture import BATCHES_A_POOL, Mixture
from trtllm_thoughtx.distill.rows import ANSWER, EFFICIENCY, GIVEN, THOUGHT, Row, collate
from trtllm_thoughtx.distill.settings import Settings

Batch = tuple[torch.Tensor, torch.Tensor]


class Generated(Dataset[Batch]):
    """Batches of a mixture; a pool is made when its first batch is asked for."""

    def __init__(self, mixture: Mixture) -> None:
        self.mixture, self.held = mixture, (-1, list[list[Row]]())

    def __len__(self) -> int:
        return self.mixture.num_batches

    def __getitem__(self, index: int) -> Batch:
        pool = index // BATCHES_A_POOL
        if self.held[0] != pool:
            self.held = (pool, self.mixture.pool(pool))
        return _tensors(self.held[1][index % BATCHES_A_POOL], 0)


class Written(Dataset[Row]):
    """Rows of a file, in an order that the seed decides, as often as the steps need."""

    def __init__(self, rows: Sequence[Row], num: int, seed: int) -> None:
        self.rows, self.num, self.seed = rows, num, seed

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int) -> Row:
        epoch, place = divmod(index, len(self.rows))
        order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(self.seed + epoch))
        return self.rows[int(order[place])]


def _tensors(rows: Sequence[Row], pad_id: int) -> Batch:
    ids, parts = collate(rows, pad_id)
    return torch.from_numpy(ids), torch.from_numpy(parts)


def weigh(each: torch.Tensor, parts: torch.Tensor, weights: dict[int, float]) -> torch.Tensor:
    """Mean of `each` [N] over the tokens of every part present, then over the parts by weight."""
    present = [(weight, parts == part) for part, weight in weights.items() if weight]
    present = [(weight, where) for weight, where in present if bool(where.any())]
    total = sum(weight for weight, _ in present)
    return torch.stack([each[where].mean() * (weight / total) for weight, where in present]).sum()


def divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 KL(teacher || student) of logits [N, V], for each of N."""
    shared = min(student.shape[-1], teacher.shape[-1])
    log_student = F.log_softmax(student[:, :shared].float() / temperature, -1)
    log_teacher = F.log_softmax(teacher[:, :shared].float() / temperature, -1)
    return temperature**2 * F.kl_div(log_student, log_teacher, log_target=True, reduction="none").sum(-1)


class Supervised(loop.Guarded, Trainer):
    """A Trainer with the loss above."""

    def __init__(self, settings: Settings, teacher: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.settings = settings
        if teacher is not None and self.is_fsdp_enabled:
            from trl.models.utils import prepare_fsdp

            teacher = prepare_fsdp(teacher, self.accelerator)  # a large teacher fits only in shards
        elif teacher is not None:
            teacher = teacher.to(self.args.device)
        self.teacher = teacher
        self.weights = dict(zip((ANSWER, THOUGHT, EFFICIENCY), settings.loss_weights, strict=True))
        self.model_accepts_loss_kwargs = False
        self.sums: dict[str, float] = {}
        self.num_summed = 0

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        rows: Any = self.train_dataset
        return SequentialSampler(rows)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        ids, parts = inputs
        learned = parts[:, 1:] != GIVEN
        targets, kinds = ids[:, 1:][learned], parts[:, 1:][learned]
        output = model(input_ids=ids)
        logits = output.logits[:, :-1][learned]
        loss = truth = weigh(F.cross_entropy(logits.float(), targets, reduction="none"), kinds, self.weights)
        self._note("truth", truth)
        if self.teacher is not None and self.settings.kd_weight:
            with torch.no_grad():
                wanted = self.teacher(input_ids=ids).logits[:, :-1][learned]
            apart = weigh(divergence(logits, wanted, self.settings.kd_temperature), kinds, self.weights)
            self._note("kl", apart)
            loss = (1 - self.settings.kd_weight) * truth + self.settings.kd_weight * apart
        return (loss, output) if return_outputs else loss

    def _note(self, name: str, value: torch.Tensor) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + value.item()
        self.num_summed += name == "truth"

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self.num_summed:
            logs.update({name: value / self.num_summed for name, value in self.sums.items()})
        self.sums, self.num_summed = {}, 0
        super().log(logs, *args, **kwargs)


def arguments(settings: Settings, stage: str, num_steps: int, lr: float, rows: tuple[int, int]) -> dict[str, Any]:
    """What all stages tell their trainer: no network, no reports, a log of a hundred points. `rows` as in Settings.rows_a_device."""
    schedule: dict[str, Any] = {"lr_scheduler_type": "cosine"}
    if settings.schedule == "stable":
        decay = max(1, round(0.4 * num_steps))
        schedule = {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": decay, "min_lr_ratio": 0.02}}
    return {
        "output_dir": str(settings.stage_dir(stage)),
        "max_steps": num_steps,
        "learning_rate": lr,
        "warmup_steps": min(settings.warmup_steps, num_steps // 2),
        "weight_decay": settings.weight_decay,
        "adam_beta2": 0.98,
        "max_grad_norm": 1.0,
        "per_device_train_batch_size": rows[0],
        "gradient_accumulation_steps": rows[1],
        "bf16": settings.dtype == "bfloat16",
        "logging_steps": max(1, num_steps // 100),
        "logging_nan_inf_filter": False,
        "save_steps": settings.save_every,
        "seed": settings.seed,
        "report_to": "none",
        "push_to_hub": False,
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": False,
        **schedule,
    }


def run(settings: Settings, model: Any, teacher: Any, data: Mixture | Sequence[Row], pad_id: int, watch: loop.Watch) -> Trainer:
    """Train `model` in place on generated rows or those of a file; the trainer, from which the weights are gathered."""
    num_steps, per_step = settings.supervised_steps, settings.rows_a_device
    collator: Callable[[list[Any]], Batch]
    if isinstance(data, Mixture):
        dataset: Any = Generated(data)
        per_step, collator = (1, 1), lambda batches: batches[0]
    else:
        dataset = Written(data, num_steps * settings.batch_size, settings.seed)
        collator = lambda rows: _tensors(rows, pad_id)  # noqa: E731
    args = TrainingArguments(
        **arguments(settings, "supervised", num_steps, settings.lr, per_step),
        remove_unused_columns=False,
    )
    if teacher is not None:
        teacher.eval().requires_grad_(False)
    trainer = Supervised(settings, teacher, model=model, args=args, train_dataset=dataset, data_collator=collator, callbacks=[watch])
    loop.train(trainer, watch)
    return trainer
