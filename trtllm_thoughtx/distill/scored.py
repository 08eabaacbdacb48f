"""Stage 3, scored paths: sample several paths to a question, score each, and learn from what is better than the rest (GRPO).

The score is `reward.score`, which anyone can verify; the update is TRL's (GRPO, arXiv 2402.03300, section 4), with a small KL
to the model before.
"""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from trtllm_thoughtx.distill import loop, models, reward, rows, supervised
from trtllm_thoughtx.distill.preference import draw_items
from trtllm_thoughtx.distill.settings import Settings
from trtllm_thoughtx.distill.traces import Trace
from trtllm_thoughtx.text.answer import split_ids
from trtllm_thoughtx.text.text import Text

MARGIN = 1.25  # room for completions beyond the largest budget, which then are cut and score nothing


class Scored(loop.Guarded, GRPOTrainer):
    """GRPO with whole checkpoints."""


def run(settings: Settings, model: Any, text: Text, written: list[Trace] | None, watch: loop.Watch) -> Any:
    """Train `model` in place; the trainer. `batch_size` counts completions: that many, in groups of `num_generations`, a step."""
    num_steps = settings.scored_steps
    num_prompts = num_steps * settings.batch_size // settings.num_generations
    asked: list[Any] = []
    while len(asked) < num_prompts:
        asked += written or draw_items(num_prompts, settings.seed + 1)
    encode = rows.encoder(text)
    budgets = [reward.budget_of(one, lambda said: len(encode(said))) for one in asked]
    longest = round(MARGIN * max(budgets))
    prompts = [{"prompt": rows.prompt_text(text, one.prompt), "place": place} for place, one in enumerate(asked)]

    def path_score(completion_ids: list[list[int]], place: list[int], log_metric: Any = None, **_: Any) -> list[float | None]:
        scores = [
            reward.score(asked[where], split_ids(text, ids, is_open=True), len(ids), budgets[where], settings.reward_weights)
            for ids, where in zip(completion_ids, place, strict=True)
        ]
        if log_metric is not None:
            log_metric("correct", sum(one.correct for one in scores) / len(scores))
            log_metric("coherence", sum(one.coherence for one in scores) / len(scores))
            log_metric("steps", sum(one.num_steps for one in scores) / len(scores))
        return [one.reward for one in scores]

    args = GRPOConfig(
        **supervised.arguments(settings, "scored", num_steps, settings.scored_lr or settings.lr, settings.rows_a_device),
        gradient_checkpointing=False,
        num_generations=settings.num_generations,
        max_completion_length=min(longest, settings.max_seq_len),
        beta=settings.scored_beta,
        temperature=1.0,
        shuffle_dataset=False,
        log_completions=False,
    )
    trainer = Scored(
        model=model,
        reward_funcs=path_score,
        args=args,
        train_dataset=Dataset.from_list(prompts),
        processing_class=models.load_tokenizer(settings.student_dir),
        callbacks=[watch],
    )
    loop.train(trainer, watch)
    return trainer
