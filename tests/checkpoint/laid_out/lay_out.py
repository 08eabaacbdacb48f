"""Makes the checkpoints of this directory with the libraries that write such checkpoints: a Llama of one layer in each format.

    python lay_out.py    (in an environment with torch, transformers, compressed-tensors 0.20.1 and nvidia-modelopt 0.47.0)

Each directory gets the checkpoint as the library lays it out, and in meant.json the sha256 of what the library itself makes of each matrix
again, as float32: NVFP4 in float32 (compressed-tensors: without the second scale), the rest rounded to bfloat16. Zeros have no sign.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from pathlib import Path

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import load_file, save_file
from transformers import FineGrainedFP8Config, LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 32}
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    made = LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=1, max_position_embeddings=64, architectures=["LlamaForCausalLM"]))
    for parameter in made.parameters():
        parameter.data = torch.randn_like(parameter) * (0.05 if parameter.dim() == 2 else 0.0) + (parameter.dim() == 1)
    return made.bfloat16().eval()


def args(bits: int, kind: str, strategy: str, **more: object) -> QuantizationArgs:
    return QuantizationArgs(num_bits=bits, type=kind, strategy=strategy, **{"symmetric": True, "dynamic": False, **more})


def schemes() -> dict[str, tuple[str, QuantizationScheme]]:
    def weights(*given: object, **more: object) -> QuantizationScheme:
        return QuantizationScheme(targets=["Linear"], weights=args(*given, **more))

    def preset(name: str) -> QuantizationScheme:
        return preset_name_to_scheme(name, ["Linear"])

    block = preset("FP8_BLOCK")
    block.weights.block_structure = [16, 32]
    return {
        "ct-nvfp4": ("nvfp4-pack-quantized", preset("NVFP4")),
        "ct-nvfp4a16": ("nvfp4-pack-quantized", preset("NVFP4A16")),
        "ct-fp8-block": ("float-quantized", block),
        "ct-w4a16": ("pack-quantized", weights(4, "int", "group", group_size=16)),
        "ct-w4a16-asym": ("pack-quantized", weights(4, "int", "group", group_size=16, symmetric=False)),
        "ct-w4a16-channel": ("pack-quantized", weights(4, "int", "channel")),
        "ct-w8a16": ("pack-quantized", weights(8, "int", "group", group_size=16)),
        "ct-w8a16-channel": ("pack-quantized", weights(8, "int", "channel")),
        "ct-w8a8": ("int-quantized", preset("W8A8")),
        "ct-w8a8-static": (
            "int-quantized",
            QuantizationScheme(targets=["Linear"], weights=args(8, "int", "channel"), input_activations=args(8, "int", "tensor")),
        ),
    }


def compressed(name: str, fmt: str, scheme: QuantizationScheme) -> None:
    made = model()
    scheme.format = fmt
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"], format=fmt, quantization_status="frozen")
    apply_quantization_config(made, config)
    linears = {n: m for n, m in made.named_modules() if hasattr(m, "quantization_scheme") and n != "lm_head"}
    for n, m in linears.items():
        weight, w = m.weight.data, scheme.weights
        if w.strategy == "tensor_group":
            together = next((f for f in FUSED if n.rpartition(".")[2] in f), (n.rpartition(".")[2],))
            amax = max(linears[f"{n.rpartition('.')[0]}.{one}"].weight.abs().max() for one in together)
            m.weight_global_scale.data.copy_(generate_gparam(-amax.float(), amax.float()))
            if scheme.input_activations is not None:
                m.input_global_scale.data.copy_(generate_gparam(torch.tensor(-3.7), torch.tensor(3.7)))
        rows, cols = weight.shape
        grouped = weight.float()
        if w.strategy in ("group", "tensor_group"):
            grouped = grouped.reshape(rows, -1, w.group_size)
        elif w.strategy == "block":
            high, wide = w.block_structure
            grouped = grouped.reshape(rows // high, high, cols // wide, wide).transpose(1, 2).flatten(2)
        low, top = grouped.amin(-1), grouped.amax(-1)
        if w.strategy == "channel":
            low, top = low[:, None], top[:, None]
        scale, zero = calculate_qparams(low, top, w, **({"global_scale": m.weight_global_scale} if w.strategy == "tensor_group" else {}))
        m.weight_scale.data.copy_(scale.to(m.weight_scale.dtype))
        if hasattr(m, "weight_zero_point"):
            m.weight_zero_point.data.copy_(zero.to(m.weight_zero_point.dtype))
        if hasattr(m, "input_scale"):
            m.input_scale.data.fill_(0.03)
    out = HERE / name
    shutil.rmtree(out, ignore_errors=True)
    compressor = ModelCompressor.from_pretrained_model(made)
    compressor.compress_model(made)
    made.save_pretrained(out)
    compressor.update_config(out)
    compressor.decompress_model(made)
    meant = {f"{n}.weight": m.weight.data for n, m in made.named_modules() if n in linears}
    if fmt.startswith("nvfp4"):  # without the second scale, which the library divides by in bfloat16
        stored = load_file(out / "model.safetensors")
        for n in linears:
            packed, scale = stored[f"{n}.weight_packed"], stored[f"{n}.weight_scale"]
            numbers = unpack_fp4_from_uint8(packed, packed.shape[0], 2 * packed.shape[1], dtype=torch.float32)
            meant[f"{n}.weight"] = dequantize(numbers, scale.float(), args=scheme.weights, dtype=torch.float32)
    tidy(out, meant)


def modelopt(name: str, preset: str) -> None:
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    made = mtq.quantize(model(), copy.deepcopy(getattr(mtq, preset)), lambda one: one(torch.arange(32)[None]))
    out = HERE / name
    shutil.rmtree(out, ignore_errors=True)
    export_hf_checkpoint(made, export_dir=out)
    stored, meant = load_file(out / "model.safetensors"), {}
    for n in stored:
        if n.endswith(".weight_scale_2"):
            base, packed = n.removesuffix(".weight_scale_2"), stored[n.replace("_scale_2", "")]
            one = NVFP4QTensor(torch.Size((packed.shape[0], 2 * packed.shape[1])), torch.float32, packed)
            scales = {"scale": stored[f"{base}.weight_scale"], "double_scale": stored[n]}
            meant[f"{base}.weight"] = one.dequantize(dtype=torch.float32, block_sizes={-1: 16}, **scales)
    tidy(out, meant)


def blocks_of_transformers(name: str, source: str) -> None:
    """The blocks of `source` in the layout of DeepSeek's and Qwen3's releases, which transformers can only read on a CPU."""
    out = HERE / name
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    config = json.loads((HERE / source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [16, 32]}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    stored = load_file(HERE / source / "model.safetensors")
    scaled = {n.replace("weight_scale", "weight_scale_inv"): t.float() if "_scale" in n else t for n, t in stored.items()}
    save_file(scaled, out / "model.safetensors", {"format": "pt"})
    wide = FineGrainedFP8Config(weight_block_size=(16, 32), dequantize=True)
    made = LlamaForCausalLM.from_pretrained(out, quantization_config=wide, dtype=torch.float32)
    tidy(out, {n: t.bfloat16() for n, t in made.state_dict().items() if f"{n}_scale_inv" in scaled})


def tidy(out: Path, meant: dict[str, torch.Tensor]) -> None:
    (out / "generation_config.json").unlink(missing_ok=True)
    sums = {n: hashlib.sha256((t.float() + 0).contiguous().numpy().tobytes()).hexdigest() for n, t in sorted(meant.items())}
    (out / "meant.json").write_text(json.dumps(sums, indent=1) + "\n")


if __name__ == "__main__":
    for name, (fmt, scheme) in schemes().items():
        compressed(name, fmt, scheme)
    modelopt("modelopt-nvfp4", "NVFP4_DEFAULT_CFG")
    modelopt("modelopt-nvfp4a16", "W4A16_NVFP4_CFG")
    blocks_of_transformers("hf-fp8", "ct-fp8-block")
