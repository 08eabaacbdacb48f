"""`thoughtx-distill`: the three stages of distillation, each alone or all in order."""

from __future__ import annotations

from typing import Any

import click

from trtllm_thoughtx.build.flags import LAYERS, PATH, POSITIVE, CommaList, Count, FiniteFloat
from trtllm_thoughtx.cli.framework import command
from trtllm_thoughtx.cli.params import emit
from trtllm_thoughtx.progress import Progress

WEIGHTS = CommaList("A,T,E", r"\d*\.?\d+", float, "a weight")
STEPS = Count(0, 1 << 30)
RATE = FiniteFloat(min=0, max=1, min_open=True)


@command(
    "distill",
    "thoughtx-distill --config build_configs/distill-thoughtx-tiny.yaml --student_dir S --output_dir OUT",
    "thoughtx-distill supervised --student_dir ./model --data traces.jsonl --output_dir OUT",
    "thoughtx-distill --config build_configs/distill-distilqwen2.5-7b.yaml --dry_run",
    "accelerate launch --num_processes 8 -m trtllm_thoughtx distill --config FILE.yaml",
)
@click.argument("stage", type=click.Choice(["all", "supervised", "preference", "scored", "ablation"]), default="all")
@click.option("--student_dir", type=PATH, required=True, help="Hugging Face directory of the student.")
@click.option("--output_dir", type=PATH, required=True, help="Output directory for the stages.")
@click.option("--teacher_dir", type=PATH, help="Hugging Face directory of the teacher; without it, traces alone are learned.")
@click.option("--data", default="tasks", help="JSONL file of traces, or `tasks`: the generated ones.")
@click.option("--layers", type=LAYERS, help="Start from these layers of the student only, e.g. 0,2,4.")
@click.option("--lora_rank", type=Count(0, 1024), default=0, help="Train an adapter of this rank beside the student; 0: all weights.")
@click.option("--lora_factor", type=Count(1, 1024), default=2, help="Factor of its products, lora_alpha over r.")
@click.option("--lr", type=RATE, default=5e-6, help="Peak learning rate.")
@click.option("--preference_lr", type=RATE, help="Learning rate of the preference stage.  [default: --lr]")
@click.option("--scored_lr", type=RATE, help="Learning rate of the scored stage.  [default: --lr]")
@click.option("--batch_size", type=POSITIVE, default=32, help="Global batch size in rows.")
@click.option("--reasoning_steps", default="auto", help="auto: the shortest trace that suffices; varied; full; or a number.")
@click.option("--loss_weights", type=WEIGHTS, default="0.4,0.3,0.3", help="Loss of stage 1: answer, chain of thought, efficiency.")
@click.option("--reward_weights", type=WEIGHTS, default="0.4,0.3,0.3", help="Score of stage 3: answer, coherence, brevity.")
@click.option("--supervised_steps", type=STEPS, default=1000, help="Optimizer steps of stage 1; 0 skips it.")
@click.option("--preference_steps", type=STEPS, default=200, help="Optimizer steps of stage 2.")
@click.option("--scored_steps", type=STEPS, default=200, help="Optimizer steps of stage 3.")
@click.option("--max_seq_len", type=POSITIVE, default=4096, help="Maximum row length in tokens; longer rows are dropped.")
@click.option("--kd_weight", type=FiniteFloat(0, 1), default=0.5, help="Weight of the teacher's logits in the stage-1 loss.")
@click.option("--kd_temperature", type=FiniteFloat(0.1, 100), default=1.0, help="Distillation temperature.")
@click.option("--num_generations", type=Count(2, 1024), default=8, help="Answers sampled per prompt in stage 3.")
@click.option("--beta", type=FiniteFloat(0, 100), default=0.1, help="Stage 2's beta: how strongly it stays near the reference model.")
@click.option("--scored_beta", type=FiniteFloat(0, 100), default=0.02, help="Stage 3's beta.")
@click.option("--weight_decay", type=FiniteFloat(0, 1), default=0.0, help="AdamW weight decay.")
@click.option("--warmup_steps", type=STEPS, default=20, help="Learning-rate warm-up steps.")
@click.option("--schedule", type=click.Choice(["cosine", "stable"]), default="cosine", help="stable: constant, then down to 2 %.")
@click.option("--tokens_a_batch", type=POSITIVE, default=1536, help="Of generated rows, padding included.")
@click.option("--curriculum", is_flag=True, help="Generated rows: easy items first, long contexts last.")
@click.option("--seed", type=Count(0, (1 << 31) - 1), default=0, help="Seed of data and sampling.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), default="bfloat16", help="Training type.")
@click.option("--saved_dtype", type=click.Choice(["bfloat16", "float32"]), default="bfloat16", help="Type of the saved weights.")
@click.option("--gradient_checkpointing/--no_gradient_checkpointing", default=True, help="Recompute activations to save memory.")
@click.option("--per_device_batch_size", type=POSITIVE, default=1, help="Rows per GPU and step (micro-batch).")
@click.option("--eval_items", type=STEPS, default=64, help="Held-out questions of each task that compare the stages; 0: none.")
@click.option("--eval_data", type=PATH, help='JSONL file of {"prompt": ..., "answer": ...} to compare the stages with.')
@click.option("--num_gpus", type=POSITIVE, default=8, help="For --dry_run: total number of GPUs.")
@click.option("--gpu_memory_gib", type=FiniteFloat(1, 10_000), default=80.0, help="For --dry_run: memory per GPU.")
@click.option("--dry_run", is_flag=True, help="Print memory, steps and the command; needs only the two config.json, trains nothing.")
@click.option("--save_every", type=POSITIVE, default=200, help="Steps between checkpoints.")
@click.option("--force", is_flag=True, help="Restart the stages and remove their earlier output.")
def distill(stage: str, force: bool, dry_run: bool, as_json: bool, quiet: bool, debug: bool, **options: Any) -> None:
    """Distill a reasoning model: supervised, preference and scored stages. Resumes after being killed."""
    from trtllm_thoughtx.distill.settings import STAGES, Settings

    steps = options.pop("reasoning_steps")
    settings = Settings(**options, reasoning_steps=int(steps) if steps.isdecimal() else steps)
    if dry_run:
        from trtllm_thoughtx.distill.plan import plan, plan_tables

        planned = plan(settings)
        emit("distill", planned, as_json=as_json, human=plan_tables(planned))
        return
    progress = Progress(quiet=quiet)
    if stage == "ablation":
        from trtllm_thoughtx.distill.ablation import ablate, ablation_tables

        compared = ablate(settings, progress)
        emit("distill", compared, as_json=as_json, human=ablation_tables(compared))
        return
    from trtllm_thoughtx.distill.recipe import distill, distill_tables

    made = distill(settings, STAGES if stage == "all" else (stage,), force=force, progress=progress)
    if made.pop("is_main_process"):
        emit("distill", made, as_json=as_json, human=distill_tables(made))
