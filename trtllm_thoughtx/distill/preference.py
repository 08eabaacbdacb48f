"""Stage 2, coherent intermediate steps: prefer the sound next step to an unsound one, given the same sound beginning.

A pair differs in one step alone (Step-DPO, arXiv 2406.18629): nothing behind it is judged, so that answers are not turned and
recovering from a wrong step is not punished. The likelihood of the sound step is held up by an SFT term, since DPO by itself
lowers both (arXiv 2404.19733, section 2).
"""

from __future__ import annotations

import random
from typing import Any

from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from trtllm_thoughtx.distill import loop, models, rows, supervised
from trtllm_thoughtx.distill.mixture import CHAIN_SIZES, SIZES, TASK_WEIGHTS
from trtllm_thoughtx.distill.settings import Settings
from trtllm_thoughtx.distill.traces import Trace, corrupt
from trtllm_thoughtx.tasks import draw, item
from trtllm_thoughtx.tasks.item import Item
from trtllm_thoughtx.text.text import Text

SFT_WEIGHT = 0.2


def draw_items(num: int, seed: int) -> list[Item]:
    """Generated questions in the mixture of stage 1, none with a stretched context."""
    rng = random.Random(f"items {seed}")
    tasks = rng.choices(list(TASK_WEIGHTS), list(TASK_WEIGHTS.values()), k=num)
    sizes = [rng.choice(CHAIN_SIZES if task == "chain" else SIZES) for task in tasks]
    return [draw(task, "train", size=size, seed=rng.getrandbits(48)) for task, size in zip(tasks, sizes, strict=True)]


def pair(asked: Item | Trace, text: Text, rng: random.Random) -> dict[str, list[int]]:
    """Ids of the sound beginning, of the sound next step and of an unsound one."""
    at = rng.randrange(len(asked.steps))
    encode = rows.encoder(text)
    unsound = corrupt(asked.steps, at, rng, tuple(asked.prompt.split()))
    begun = "".join(f"{step}{item.BOUNDARY}" for step in asked.steps[:at])
    begin = encode(rows.prompt_text(text, asked.prompt)) + (encode(begun) if begun else [])
    chosen, rejected = (encode(f"{step}{item.BOUNDARY}") for step in (asked.steps[at], unsound))
    return {"prompt_ids": begin, "chosen_ids": chosen, "rejected_ids": rejected}


class Preference(loop.Guarded, DPOTrainer):
    """DPO on token ids: TRL would close every step with an EOS."""

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset


def run(settings: Settings, model: Any, text: Text, written: list[Trace] | None, watch: loop.Watch) -> Any:
    """Train `model` in place; the trainer. The reference is the model as it comes."""
    num_steps = settings.preference_steps
    rng = random.Random(f"pairs {settings.seed}")
    asked: list[Any] = []
    if written is None:
        asked = list(draw_items(num_steps * settings.batch_size, settings.seed))
    while len(asked) < num_steps * settings.batch_size and written:
        asked += rng.sample(written, len(written))
    dataset = Dataset.from_list([pair(one, text, rng) for one in asked])
    common = supervised.arguments(settings, "preference", num_steps, settings.preference_lr or settings.lr, settings.rows_a_device)
    args = DPOConfig(
        **common,
        gradient_checkpointing=False,
        beta=settings.beta,
        loss_type=["sigmoid", "sft"],
        loss_weights=[1.0, SFT_WEIGHT],
        max_length=settings.max_seq_len,
    )
    tokenizer = models.load_tokenizer(settings.student_dir)
    trainer = Preference(model=model, args=args, train_dataset=dataset, processing_class=tokenizer, callbacks=[watch])
    loop.train(trainer, watch)
    return trainer
