"""What a distillation will need, from the two config.json files alone: memory on each GPU, steps, work, and the command to type.

Nothing is loaded or written. Memory is that of fully sharded training (FSDP): float32 weights, gradients and two AdamW moments are
16 bytes a parameter, the frozen teacher or reference 2, all of them over all GPUs; activations and logits are each GPU's own.
Hours assume a fraction of the GPU's peak, stated beside them: computed, not measured.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trtllm_thoughtx import report
from trtllm_thoughtx.checkpoint.directory import HUGGING_FACE, kind_and_config
from trtllm_thoughtx.config import ModelConfig
from trtllm_thoughtx.distill.settings import GENERATED, STAGES, Settings
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.families import tensors_of
from trtllm_thoughtx.families.hf_config import model_config_from_hf
from trtllm_thoughtx.families.size import num_parameters
from trtllm_thoughtx.files import human_bytes

FROZEN_STUDENT_BYTES = 4
TRAINED_BYTES, FROZEN_BYTES, COMPUTED_BYTES = 16, 2, 2  # a parameter that is trained, one that is not, a number of an activation
LAYER_NUMBERS = 20  # hidden-sized activations of the one layer that is computed again (Korthikanti et al., arXiv 2205.05198, section 4)
LOGIT_COPIES = 4  # float32: the logits, their log-softmax, both gradients
RUNTIME_BYTES = 3 << 30  # CUDA, NCCL and a gathered layer
PEAK_FLOPS, FRACTION_OF_PEAK = 989e12, 0.35  # H100 or H200, dense bf16
SAMPLING_FRACTION = 0.02  # of the peak, while paths are written token by token
GIB = 1 << 30


def read_config(path: Path) -> ModelConfig:
    """Only config.json has to be there."""
    raw = kind_and_config(path, HUGGING_FACE)[1]
    return model_config_from_hf(raw, str(path / "config.json"), weights_dtype="bfloat16")


def plan(settings: Settings) -> dict[str, Any]:
    """The plan for `settings.num_gpus` GPUs of `gpu_memory_gib` each, and the fewest GPUs on which every stage fits."""
    student = read_config(settings.student_dir)
    if settings.layers is not None and max(settings.layers) >= student.num_layers:
        why = f"the model has layers 0 to {student.num_layers - 1}"
        raise ThoughtxError(
            "E163",
            "layers that the model does not have",
            where=str(settings.student_dir),
            why=why,
            fix=f"give --layers from 0 to {student.num_layers - 1}",
        )
    teacher = read_config(settings.teacher_dir) if settings.teacher_dir is not None and settings.kd_weight else None
    if teacher is not None and abs(teacher.vocab_size - student.vocab_size) > 1024:
        why = f"{teacher.vocab_size} and {student.vocab_size} words: logits of other vocabularies cannot be learned"
        fix = "give a teacher of the same family, or --kd_weight 0 to learn its traces alone"
        raise ThoughtxError("E163", "teacher and student have different vocabularies", where=str(settings.teacher_dir), why=why, fix=fix)
    sizes = {"student": num_parameters(student), "teacher": None if teacher is None else num_parameters(teacher)}
    if settings.layers is not None:
        layers = num_parameters(student, "model.layers.")
        sizes["student"] = num_parameters(student) - layers + layers * len(settings.layers) // student.num_layers
    if settings.lora_rank:
        sizes["adapter"] = adapter_parameters(student, settings.lora_rank)
    stages = [_stage(settings, stage, student, sizes, settings.num_gpus) for stage in STAGES if getattr(settings, f"{stage}_steps")]
    room = settings.gpu_memory_gib * GIB
    counts = (1, 2, 4, *range(8, 1025, 8))
    fewest = next(
        (n for n in counts if all(_stage(settings, one["stage"], student, sizes, n)["bytes_a_gpu"] <= room for one in stages)), None
    )
    return {
        "parameters": sizes,
        "num_gpus": settings.num_gpus,
        "gpu_memory_gib": settings.gpu_memory_gib,
        "fits": all(one["bytes_a_gpu"] <= room for one in stages),
        "fewest_gpus": fewest,
        "stages": stages,
        "assumed": {"peak_flops": PEAK_FLOPS, "share_of_peak": FRACTION_OF_PEAK, "sampling_share": SAMPLING_FRACTION},
        "data": settings.data,
        "data_is_there": settings.data == GENERATED or Path(settings.data).is_file(),
        "command": launch_command(settings, student.architecture.replace("ForCausalLM", "DecoderLayer")),
    }


def adapter_parameters(config: ModelConfig, rank: int) -> int:
    """Numbers of a product of this rank beside every linear layer."""
    parts = [part for tensor in tensors_of(config) if tensor.layer is not None for part in tensor.parts if len(part.shape) == 2]
    return sum(rank * sum(part.shape) for part in parts)


def _stage(settings: Settings, stage: str, config: ModelConfig, sizes: dict[str, int | None], num_gpus: int) -> dict[str, Any]:
    own, steps = sizes["student"] or 0, getattr(settings, f"{stage}_steps")
    teacher = sizes["teacher"] or 0
    held = teacher if stage == "supervised" else own  # the reference of stages 2 and 3 is the student before
    rows = settings.batch_size * (2 if stage == "preference" else 1)  # a sound and an unsound one
    in_flight = min(settings.per_device_batch_size, max(1, settings.batch_size // num_gpus)) * (2 if stage == "preference" else 1)
    length = settings.max_seq_len
    num_layers = config.num_layers if settings.layers is None else len(settings.layers)
    kept = num_layers if settings.gradient_checkpointing else num_layers * LAYER_NUMBERS
    activations = in_flight * length * config.hidden_size * COMPUTED_BYTES * (kept + LAYER_NUMBERS)
    logits = in_flight * length * config.vocab_size * 4 * (LOGIT_COPIES + 2 * (stage == "supervised" and teacher > 0))
    cache = 0
    if stage == "scored":
        cache = -(-settings.batch_size // num_gpus) * length * config.kv_bytes_per_token("bfloat16")
    if settings.lora_rank:  # the student stays, in float32, and is the reference of stages 2 and 3 itself
        held_bytes = own * FROZEN_STUDENT_BYTES + adapter_parameters(config, settings.lora_rank) * TRAINED_BYTES
        sharded = (held_bytes + (held * FROZEN_BYTES if stage == "supervised" else 0)) / num_gpus
    else:
        sharded = (own * TRAINED_BYTES + held * FROZEN_BYTES) / num_gpus
    tokens = rows * length * steps
    passes = (8 if settings.gradient_checkpointing else 6) * own + 2 * held  # operations a token, forward and backward
    seconds = tokens * passes / (PEAK_FLOPS * FRACTION_OF_PEAK * num_gpus)
    if stage == "scored":
        seconds += tokens * 2 * own / (PEAK_FLOPS * SAMPLING_FRACTION * num_gpus)
    return {
        "stage": stage,
        "num_steps": steps,
        "rows_a_step": rows,
        "most_tokens": tokens,
        "bytes_a_gpu": round(sharded + activations + logits + cache + RUNTIME_BYTES),
        "weights_and_state": round(sharded),
        "activations": round(activations),
        "logits": round(logits),
        "kv_cache": round(cache),
        "hours_computed": seconds / 3600,
    }


def launch_command(settings: Settings, layer_class: str) -> str:
    """One line for a machine with `num_gpus` GPUs; several machines add --num_machines, --machine_rank and --main_process_ip."""
    words = ["accelerate launch", f"--num_processes {settings.num_gpus}"]
    if settings.num_gpus > 1:
        words += ["--use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP"]
        words += [f"--fsdp_transformer_layer_cls_to_wrap {layer_class} --fsdp_reshard_after_forward true"]
        words += ["--fsdp_cpu_ram_efficient_loading true --fsdp_state_dict_type FULL_STATE_DICT"]
    words += [f"--mixed_precision {'bf16' if settings.dtype == 'bfloat16' else 'no'}", "-m trtllm_thoughtx distill"]
    return " ".join(words)


def plan_tables(found: dict[str, Any]) -> list[Any]:
    columns = ("stage", "steps", "rows a step", "most tokens", "each GPU", "weights and state", "activations", "logits", "KV", "hours")
    lines = [
        [one["stage"], one["num_steps"], one["rows_a_step"], f"{one['most_tokens'] / 1e6:.1f} M", human_bytes(one["bytes_a_gpu"])]
        + [human_bytes(one[key]) for key in ("weights_and_state", "activations", "logits", "kv_cache")]
        + [f"{one['hours_computed']:.2g}"]
        for one in found["stages"]
    ]
    sizes, room = found["parameters"], f"{found['gpu_memory_gib']:.0f} GiB"
    told = ", ".join(f"{name} {count / 1e9:.3g} B" for name, count in sizes.items() if count)
    fits = "it fits" if found["fits"] else "it does NOT fit"
    fewest = f"the fewest GPUs of that size: {found['fewest_gpus']}" if found["fewest_gpus"] else "1,024 such GPUs do not hold it"
    assumed = found["assumed"]
    return [
        f"parameters: {told}",
        report.table(f"plan for {found['num_gpus']} GPUs of {room}, computed", columns, lines),
        f"{fits} {room}; {fewest}. Hours assume {assumed['share_of_peak']:.0%} of {assumed['peak_flops'] / 1e12:.0f} TFLOPS a GPU",
        *([] if found["data_is_there"] else [f"{found['data']} is not there yet: one JSON object a line, see README"]),
        f"run: {found['command']} <the flags of this call, without --dry_run>",
    ]
