"""Accuracy, time and memory of thoughtx-calibrate beside NVIDIA ModelOpt: the same model, the same rows, the same measure.

    python bench/beside_modelopt.py MODEL_DIR [--formats fp8,int8_sq,int4_awq] [--seeds 0,1,2,3,4] [--plant 64] [--calib_data FILE]
        [--calib_size 128] [--calib_seq_len 512] [--defaults] [--together] [--json]

Needs nvidia-modelopt, in a virtual environment of its own: pip install -e ".[reference]" nvidia-modelopt requests. Without it nothing is
measured, and the reason is said. Both take the rows that `calibrate.data.read_data` gives for the seed, one at a time, in float32, without
padding; both leave lm_head and the KV cache as they are, and have the same 4-bit group size. Judged on the held-out rows:
KL from the model as it was, top-1 agreement, ratio of perplexities. Each run is a process of its own, loading, calibrating and judging
included; its peak is VmHWM, and where other work runs its CPU seconds say more than its seconds.

A seed chooses the rows, the held-out ones too. Rounding itself is a draw: scales that are a few percent apart are equally good and
give another KL, the same way for all seeds of a model; compare several models before a small difference is taken for one.

ModelOpt's settings are its presets (SmoothQuant alpha 1, awq_lite in steps of 0.1) and, unless --defaults, those nearest to what ours
searches: alpha 0.5, and awq_full, which also clips. It calibrates q, k, v and gate, up apart; "fused" is the same model after
the step of its exporter that gives layers with one input one factor and one input scale, as an engine needs it. Without a GPU its NVFP4
can be measured of the weights alone (nvfp4_wo), as its exporter rounds them: `NVFP4QTensor`, one second scale for layers with one input.

--plant F measures a copy of the model whose function is the same bit for bit (F is a power of two), in front of whose linear layers a few
channels are F times as large.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.metadata
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
NUM_PLANTED = 3  # channels in front of each linear layer
# format -> name of a variant -> (ModelOpt's preset, its algorithm where it is not the preset's)
VARIANTS: dict[str, dict[str, tuple[str, Any]]] = {
    "fp8": {"preset": ("FP8_DEFAULT_CFG", None)},
    "int8_sq": {"preset": ("INT8_SMOOTHQUANT_CFG", None), "alpha 0.5": ("INT8_SMOOTHQUANT_CFG", {"method": "smoothquant", "alpha": 0.5})},
    "int4_awq": {"preset": ("INT4_AWQ_CFG", None), "awq_full": ("INT4_AWQ_CFG", {"method": "awq_full", "alpha_step": 0.1})},
    "nvfp4_wo": {"preset": ("W4A16_NVFP4_CFG", None)},
}
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # layers with one input
MARK = "result: "
SHOWN = ("kl", "top1_agreement", "perplexity_ratio")


def plant(source: Path, target: Path, factor: float, seed: int = 3) -> None:
    """Copy a Hugging Face directory. In each layer `NUM_PLANTED` channels in front of each linear layer become `factor` times as large, and
    what reads them as much smaller; a channel of the values is read by every query head of its group."""
    assert np.frexp(factor)[0] == 0.5, "a power of two, so that nothing is rounded"
    from trtllm_thoughtx.checkpoint.directory import read_tensors
    from trtllm_thoughtx.checkpoint.tensor_check import STORED_DTYPES
    from trtllm_thoughtx.checkpoint.weights import NUMPY_DTYPES

    shutil.copytree(source, target)
    config = json.loads((source / "config.json").read_text())
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    groups = config["num_attention_heads"] // config["num_key_value_heads"]
    rng = np.random.default_rng(seed)
    infos = {name: (path, info) for path in target.glob("*.safetensors") for name, info in read_tensors(target, [path.name]).items()}

    def scale(name: str, index: Any, by: float) -> None:
        if name in infos:
            path, info = infos[name]
            values = np.memmap(path, NUMPY_DTYPES[STORED_DTYPES[info.dtype]], "r+", info.offset, info.shape)
            values[index] *= values.dtype.type(by)
            values.flush()

    def some(num: int) -> np.ndarray:
        return rng.choice(num, NUM_PLANTED, replace=False)

    for layer in range(config["num_hidden_layers"]):
        p = f"model.layers.{layer}."
        for norm, readers in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            channels = some(config["hidden_size"])
            scale(f"{p}{norm}.weight", channels, factor)
            for reader in readers:
                scale(f"{p}{reader}.weight", (slice(None), channels), 1 / factor)
        values = some(config["num_key_value_heads"] * size)
        scale(f"{p}self_attn.v_proj.weight", values, factor)
        scale(f"{p}self_attn.v_proj.bias", values, factor)
        heads = np.concatenate([(values // size * groups + g) * size + values % size for g in range(groups)])
        scale(f"{p}self_attn.o_proj.weight", (slice(None), heads), 1 / factor)
        channels = some(config["intermediate_size"])
        scale(f"{p}mlp.up_proj.weight", channels, factor)
        scale(f"{p}mlp.down_proj.weight", (slice(None), channels), 1 / factor)


def ours(task: dict[str, Any]) -> dict[str, Any]:
    """thoughtx-calibrate's own work; it judges the held-out rows while it walks."""
    from trtllm_thoughtx.calibrate.quantize.job import calibrate

    options = {key: task[key] for key in ("calib_size", "calib_seq_len", "seed")}
    data = Path(task["calib_data"]) if task["calib_data"] else None
    as_it_is = ("transformer.vocab_embedding",)
    found = calibrate(Path(task["model_dir"]), Path(task["out"]), qformat=task["qformat"], calib_data=data, exclude=as_it_is, **options)
    return {
        "extra_s": 0.0,
        "cpu_s": time.process_time(),
        "peak_mib": peak_mib(),
        "group_size": found["quantization"]["group_size"],
        "tokens_sha256": found["data"]["tokens_sha256"],
        "num_rows": found["data"]["num_sequences"],
        "systems": {"thoughtx": found["end_to_end"]},
    }


def rounded_by_exporter(model: Any) -> None:
    """Every matrix of the layers to what ModelOpt's exporter stores for it."""
    import torch

    tensor: Any = importlib.import_module("modelopt.torch.quantization.qtensor").NVFP4QTensor
    linears = {name: one for name, one in model.model.layers.named_modules() if isinstance(one, torch.nn.Linear)}
    for name, one in linears.items():
        base, _, last = name.rpartition(".")
        together = next((names for names in FUSED if last in names), (last,))
        second = max(linears[f"{base}.{other}"].weight.abs().max() for other in together) / (6 * 448)
        made, scale, second = tensor.quantize(one.weight.data, 16, weights_scaling_factor_2=second)
        wide = made.dequantize(dtype=torch.float32, scale=scale, double_scale=second, block_sizes={-1: 16})
        one.weight.data.copy_(wide)


def theirs(task: dict[str, Any]) -> dict[str, Any]:
    """ModelOpt on the same rows, in transformers."""
    import torch

    from trtllm_thoughtx.calibrate.data import read_data
    from trtllm_thoughtx.checkpoint.weights import open_weights
    from trtllm_thoughtx.config import ModelConfig
    from trtllm_thoughtx.text.text import Text
    from trtllm_thoughtx.validate.divergence import Divergence
    from trtllm_thoughtx.validate.reference import load_model

    mtq: Any = importlib.import_module("modelopt.torch.quantization")
    exporter: Any = importlib.import_module("modelopt.torch.export.unified_export_hf")
    path = Path(task["model_dir"])
    with open_weights(path) as source:
        config: ModelConfig = source.config
    text = Text.load(path)
    data = read_data(
        Path(task["calib_data"]) if task["calib_data"] else None,
        text,
        vocab_size=config.vocab_size,
        num_samples=task["calib_size"],
        max_len=min(task["calib_seq_len"], config.max_position),
        seed=task["seed"],
        pad_id=text.pad_id if text else None,
    )
    model = load_model(path, torch.float32, "sdpa")

    def run(ids: list[int]) -> torch.Tensor:
        return model(torch.tensor([ids]), use_cache=False).logits[0]

    def feed(_: Any) -> None:
        for ids in data.rows:
            model.model(torch.tensor([ids]), use_cache=False)  # the head is not quantized: its logits are not needed

    def judged() -> dict[str, float]:
        seen = Divergence()
        for ids, logits in zip(data.held, wanted, strict=True):
            seen.add(logits, run(ids).numpy(), [*ids[1:], -1])
        return asdict(seen.summary())

    preset, algorithm = VARIANTS[task["qformat"]][task["variant"]]
    settings = copy.deepcopy(getattr(mtq, preset))
    for entry in settings["quant_cfg"]:
        if (entry.get("cfg") or {}).get("block_sizes"):
            entry["cfg"]["block_sizes"][-1] = task["group_size"]
    if algorithm is not None:
        settings["algorithm"] = algorithm
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = [run(ids).numpy() for ids in data.held]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = time.perf_counter()
        if task["qformat"] == "nvfp4_wo":
            rounded_by_exporter(model)
        else:
            model = mtq.quantize(model, settings, forward_loop=feed)
            on = [name for name, module in model.named_modules() if name.endswith("weight_quantizer") and module.is_enabled]
            assert len(on) == 7 * config.num_layers, f"{len(on)} matrices are quantized"
        quantize_s = time.perf_counter() - start
        systems, peak, cpu_s, begun = {"modelopt": judged()}, peak_mib(), time.process_time(), time.perf_counter()
        if task["fused"]:
            exporter.requantize_resmooth_fused_llm_layers(model)
            systems["modelopt fused"] = judged()
    return {
        "quantize_s": quantize_s,
        "extra_s": time.perf_counter() - begun,
        "cpu_s": cpu_s,
        "peak_mib": peak,
        "tokens_sha256": data.facts["tokens_sha256"],
        "systems": systems,
    }


def peak_mib() -> float:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


class Workers:
    """Processes that do tasks: one for each task, or (`together`) one for each system, whose seconds and peak then mean nothing."""

    def __init__(self, together: bool) -> None:
        self.together, self.running = together, dict[str, subprocess.Popen[str]]()

    def run(self, task: dict[str, Any]) -> dict[str, Any]:
        """The numbers of a task, with the seconds that its process took, imports included."""
        began = time.perf_counter()
        worker = self.running.pop(task["system"], None) or self._start()
        assert worker.stdin is not None and worker.stdout is not None
        worker.stdin.write(json.dumps(task) + "\n")
        worker.stdin.flush()
        line = next((line for line in worker.stdout if line.startswith(MARK)), None)  # ModelOpt prints, too
        if line is None:
            raise SystemExit(f"{task} failed with status {worker.wait()}")
        if self.together:
            self.running[task["system"]] = worker
        else:
            worker.communicate()
        found = json.loads(line.removeprefix(MARK))
        return found | ({} if self.together else {"seconds": time.perf_counter() - began - found["extra_s"]})

    def _start(self) -> subprocess.Popen[str]:
        env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, str(Path(__file__).resolve()), "--worker"]
        return subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def close(self) -> None:
        for worker in self.running.values():
            worker.communicate()


def compared(model_dir: Path, args: argparse.Namespace, scratch: Path, workers: Workers) -> list[dict[str, Any]]:
    """A row for each format, seed and system."""
    rows: list[dict[str, Any]] = []
    for qformat in args.formats.split(","):
        for seed in map(int, args.seeds.split(",")):
            base = {"model_dir": str(model_dir), "qformat": qformat, "seed": seed, "calib_data": args.calib_data}
            base |= {"calib_size": args.calib_size, "calib_seq_len": args.calib_seq_len}
            out = scratch / "out"
            mine = workers.run(base | {"system": "thoughtx", "out": str(out)})
            shutil.rmtree(out)
            runs = [("", mine)]
            for variant in [name for name in VARIANTS[qformat] if name == "preset" or not args.defaults]:
                task = base | {"system": "modelopt", "variant": variant, "group_size": mine["group_size"]}
                task["fused"] = not args.defaults and qformat not in (
                    "fp8",
                    "nvfp4_wo",
                )  # FP8 has no factors, and its input scales are equal already
                runs.append((variant, workers.run(task)))
            for variant, found in runs:
                assert found["tokens_sha256"] == mine["tokens_sha256"], "the rows differ"
                for system, numbers in found["systems"].items():
                    reference = mine["systems"]["thoughtx"]["perplexity_reference"]
                    assert abs(numbers["perplexity_reference"] / reference - 1) < 1e-4, "the models, or the positions judged, differ"
                    row = {"format": qformat, "seed": seed, "system": f"{system} {variant}".strip(), "group_size": mine["group_size"]}
                    row |= {key: numbers[key] for key in (*SHOWN, "num_positions")} | {"num_rows": mine["num_rows"]}
                    rows.append(
                        row
                        | {
                            key: round(found[key], 2)
                            for key in ("seconds", "cpu_s", "quantize_s", "peak_mib")
                            if key in found and not args.together
                        }
                    )
            print(f"{qformat} seed {seed} done", file=sys.stderr)
    return rows


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Medians over the seeds; `KL / ours` and how many seeds it is above 1 come from pairs of the same seed."""
    lines = [
        f"{'format':<10}{'system':<28}{'KL, nats':>11}{'KL / ours':>11}{'min':>8}{'max':>8}{'ours lower':>12}"
        f"{'top-1':>9}{'ppl ratio':>11}{'seconds':>9}{'CPU s':>9}{'peak MiB':>10}"
    ]
    for qformat, system in dict.fromkeys((row["format"], row["system"]) for row in rows):
        own = [row for row in rows if (row["format"], row["system"]) == (qformat, system)]
        mine = {row["seed"]: row["kl"] for row in rows if (row["format"], row["system"]) == (qformat, "thoughtx")}
        ratios = [row["kl"] / mine[row["seed"]] for row in own]
        kl, top1, ppl = (statistics.median(row[key] for row in own) for key in SHOWN)
        seconds, cpu, peak = (statistics.median(row.get(key, math.nan) for row in own) for key in ("seconds", "cpu_s", "peak_mib"))
        won = f"{sum(ratio > 1 for ratio in ratios)} of {len(ratios)}" if system != "thoughtx" else ""
        lines.append(
            f"{qformat:<10}{system:<28}{kl:>11.6f}{statistics.median(ratios):>11.3f}{min(ratios):>8.3f}{max(ratios):>8.3f}{won:>12}"
            f"{top1:>9.4f}{ppl:>11.5f}{seconds:>9.1f}{cpu:>9.1f}{peak:>10.0f}"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("model_dir", type=Path, help="a Hugging Face directory")
    parser.add_argument("--formats", default=",".join(VARIANTS))
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--plant", type=float, help="a power of two: how large the planted outliers are")
    parser.add_argument("--calib_data", help="as thoughtx-calibrate takes it (default: generated tasks)")
    parser.add_argument("--calib_size", type=int, default=128)
    parser.add_argument("--calib_seq_len", type=int, default=512)
    parser.add_argument("--defaults", action="store_true", help="ModelOpt's presets alone, not fused")
    parser.add_argument("--together", action="store_true", help="one process for all runs of a system: quicker, without times and memory")
    parser.add_argument("--work", type=Path, help="an existing directory on the disk to use (default: the system's temporary one)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    try:
        version = importlib.metadata.version("nvidia-modelopt")
    except importlib.metadata.PackageNotFoundError:
        how = 'pip install -e ".[reference]" nvidia-modelopt requests, in an environment of its own'
        print(f"skipped: nvidia-modelopt is not installed; {how}")
        return
    with tempfile.TemporaryDirectory(dir=args.work) as scratch:
        model_dir = args.model_dir.resolve()
        if args.plant:
            plant(model_dir, Path(scratch, "planted"), args.plant)
            model_dir = Path(scratch, "planted")
        workers = Workers(args.together)
        rows = compared(model_dir, args, Path(scratch), workers)
        workers.close()
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")} | {"nvidia-modelopt": version}
    if args.json:
        print(json.dumps({"model": args.model_dir.name, "planted": args.plant, "versions": versions, "rows": rows}))
        return
    planted = f", outliers of {args.plant:g} planted" if args.plant else ""
    groups = "".join(f", 4 bits in groups of {size}" for size in {row["group_size"] for row in rows if row["format"] == "int4_awq"})
    print(f"{args.model_dir.name}{planted}: {rows[0]['num_rows']} rows{groups}; {versions}")
    print("\n".join(table(rows)))


if __name__ == "__main__":
    sys.path[:1] = [str(ROOT)]  # not bench/, whose files have the names of packages
    if sys.argv[1:2] == ["--worker"]:
        for line in sys.stdin:
            task = json.loads(line)
            print(MARK + json.dumps(ours(task) if task["system"] == "thoughtx" else theirs(task)), flush=True)
    else:
        main()
