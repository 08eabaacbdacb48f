"""What formats of llama.cpp, OpenVINO and onnxruntime-genai lose on the tokens of quality.py, each peer in an environment of its own.

    python bench/real/peers.py llama.cpp --model_dir DIR --work WORK [--formats F32,Q8_0,Q4_0,Q4_K_M] [--out FILE]

WORK is the directory of quality.py, which leaves the tokens and the float32 logits there; DIR is the directory that it was given. Every
peer quantizes DIR with its own tool and computes with its own operators. The result has the same keys as `quality.py --json`, so that
`picture.py` draws both. What the environments need, beside this repository:

    llama.cpp            llama-cpp-python gguf safetensors ml_dtypes
    openvino             openvino nncf optimum-intel torch transformers
    onnxruntime-genai    onnxruntime-genai onnxruntime onnx onnx-ir torch transformers

Bits are those of the whole directory or file, tokenizer included, over all parameters.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
FORMATS = {"llama.cpp": "F32,Q8_0,Q4_0,Q4_K_M", "openvino": "int8,int4", "onnxruntime-genai": "int8,int4"}
Rows = list[list[int]]


def as_peers_read(model_dir: Path, work: Path) -> Path:
    """The directory with the rotary base where every release of transformers looks for it: 5 writes `rope_parameters`, and 4, which the
    exporters still take, reads `rope_theta` and silently falls back to 10,000 without it."""
    config = json.loads((model_dir / "config.json").read_text())
    copy = work / "model"
    copy.mkdir(exist_ok=True)
    for file in model_dir.iterdir():
        if file.is_file() and file.name != "config.json" and not (copy / file.name).exists():
            (copy / file.name).symlink_to(file.resolve())
    rope = config.get("rope_parameters") or {}
    config.setdefault("rope_theta", rope.get("rope_theta", 10000.0))
    config.setdefault("torch_dtype", config.get("dtype", "bfloat16"))
    (copy / "config.json").write_text(json.dumps(config, indent=1))
    return copy


def num_parameters(model_dir: Path) -> int:
    from safetensors import safe_open

    tied = json.loads((model_dir / "config.json").read_text()).get("tie_word_embeddings", False)
    total = 0
    for file in model_dir.glob("*.safetensors"):
        with safe_open(file, "np") as stored:
            for name in stored.keys():  # noqa: SIM118
                total += 0 if tied and name == "lm_head.weight" else int(np.prod(stored.get_slice(name).get_shape()))
    return total


# --- llama.cpp ---------------------------------------------------------------------------------------------------------

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def to_gguf(model_dir: Path, out: Path) -> None:
    """A Qwen2 or Llama directory as a float32 GGUF file with its tokenizer."""
    import gguf
    import ml_dtypes  # noqa: F401  # NumPy knows bfloat16 with it
    from safetensors import safe_open

    config = json.loads((model_dir / "config.json").read_text())
    tokenizer = json.loads((model_dir / "tokenizer.json").read_text())
    family, heads = config["model_type"], config["num_attention_heads"]
    writer = gguf.GGUFWriter(out, family)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base((config.get("rope_parameters") or config)["rope_theta"])
    writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // heads)
    writer.add_vocab_size(config["vocab_size"])
    by_id = {number: token for token, number in tokenizer["model"]["vocab"].items()}
    special = {one["id"]: one["content"] for one in tokenizer["added_tokens"]}
    ids = range(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2" if family == "qwen2" else "smollm")
    writer.add_token_list([special.get(i) or by_id.get(i) or f"[PAD{i}]" for i in ids])
    writer.add_token_types([3 if i in special else 1 if i in by_id else 5 for i in ids])
    writer.add_token_merges([one if isinstance(one, str) else " ".join(one) for one in tokenizer["model"]["merges"]])
    for file in sorted(model_dir.glob("*.safetensors")):
        with safe_open(file, "np") as stored:
            for name in stored.keys():  # noqa: SIM118
                module, _, kind = name.rpartition(".")
                if module == "lm_head" and config.get("tie_word_embeddings"):
                    continue
                value = stored.get_tensor(name).astype(np.float32)
                if module in OUTSIDE:
                    writer.add_tensor(f"{OUTSIDE[module]}.{kind}", value)
                    continue
                layer, _, part = module.removeprefix("model.layers.").partition(".")
                if family == "llama" and part.endswith(("q_proj", "k_proj")):  # this family's rotary pairs are neighbours there
                    of = heads if part.endswith("q_proj") else config["num_key_value_heads"]
                    value = value.reshape(of, 2, len(value) // of // 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
                writer.add_tensor(f"blk.{layer}.{NAMES[part]}.{kind}", np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_cpp(model_dir: Path, work: Path, name: str, rows: Rows) -> tuple[Path, Iterator[np.ndarray]]:
    import llama_cpp as ll

    wide, file = work / "F32.gguf", work / f"{name}.gguf"
    if not wide.is_file():
        partial = work / "partial.gguf"
        to_gguf(model_dir, partial)
        partial.rename(wide)
    if not file.is_file():
        params = ll.llama_model_quantize_default_params()
        params.ftype = getattr(ll, f"LLAMA_FTYPE_MOSTLY_{name}")
        if ll.llama_model_quantize(str(wide).encode(), str(file).encode(), ctypes.byref(params)):
            raise SystemExit(f"llama.cpp cannot quantize to {name}")
    return file, _llama_logits(ll, file, rows)


def _llama_logits(ll: Any, file: Path, rows: Rows) -> Iterator[np.ndarray]:
    length = max(map(len, rows))
    model = ll.llama_model_load_from_file(str(file).encode(), ll.llama_model_default_params())
    params = ll.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = length
    params.type_k = params.type_v = ll.GGML_TYPE_F32  # the weights are judged, not the cache
    context = ll.llama_init_from_model(model, params)
    size = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(model))
    batch = ll.llama_batch_init(length, 0, 1)
    for row in rows:
        ll.llama_memory_clear(ll.llama_get_memory(context), True)
        batch.n_tokens = len(row)
        for i, token in enumerate(row):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
            batch.seq_id[i][0] = 0
        if ll.llama_decode(context, batch):
            raise SystemExit(f"llama.cpp cannot run {file}")
        yield np.ctypeslib.as_array(ll.llama_get_logits(context), (len(row), size)).copy()


# --- OpenVINO, onnxruntime-genai ---------------------------------------------------------------------------------------


def openvino(model_dir: Path, work: Path, name: str, rows: Rows) -> tuple[Path, Iterator[np.ndarray]]:
    made = work / name
    if not made.is_dir():
        command = [str(Path(sys.executable).with_name("optimum-cli")), "export", "openvino", "-m", str(model_dir)]
        subprocess.run([*command, "--task", "text-generation-with-past", "--weight-format", name, str(made)], check=True)

    def logits() -> Iterator[np.ndarray]:
        import openvino as ov

        hints = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
        request = ov.Core().compile_model(made / "openvino_model.xml", "CPU", hints).create_infer_request()
        names = {value for one in request.model_inputs for value in one.names}
        for row in rows:
            request.reset_state()
            ids = np.asarray([row], np.int64)
            feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(len(row))[None]}
            feeds["beam_idx"] = np.zeros(1, np.int32)
            request.infer({key: value for key, value in feeds.items() if key in names})
            yield request.get_tensor("logits").data[0].astype(np.float32)

    return made, logits()


def onnxruntime_genai(model_dir: Path, work: Path, name: str, rows: Rows) -> tuple[Path, Iterator[np.ndarray]]:
    made = work / name
    if not made.is_dir():
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(model_dir), "-o", str(made), "-p", name]
        subprocess.run([*command, "-e", "cpu", "-c", str(work / "cache")], check=True)

    def logits() -> Iterator[np.ndarray]:
        import onnxruntime as ort

        size = json.loads((made / "genai_config.json").read_text())["model"]["decoder"]["head_size"]
        session = ort.InferenceSession(made / "model.onnx", providers=["CPUExecutionProvider"])
        for row in rows:
            ids = np.asarray([row], np.int64)
            feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(len(row))[None]}
            given = {}
            for value in session.get_inputs():
                shape = (1, value.shape[1], 0, size) if "past" in value.name else None
                given[value.name] = feeds[value.name] if shape is None else np.zeros(shape, np.float32)
            yield session.run(["logits"], given)[0][0].astype(np.float32)

    return made, logits()


PEERS = {"llama.cpp": llama_cpp, "openvino": openvino, "onnxruntime-genai": onnxruntime_genai}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=list(PEERS))
    parser.add_argument("--model_dir", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="of quality.py")
    parser.add_argument("--formats", help="of the peer, by commas")
    parser.add_argument("--out", type=Path, help="default: WORK/PEER.json")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from trtllm_thoughtx.validate.divergence import Divergence

    reference = max(args.work.glob("reference-*/rows.json"), key=lambda file: file.stat().st_mtime).parent
    rows: Rows = json.loads((reference / "rows.json").read_text())
    work = args.work / args.peer
    work.mkdir(exist_ok=True)
    total, table, model_dir = num_parameters(args.model_dir), [], as_peers_read(args.model_dir, work)
    for name in (args.formats or FORMATS[args.peer]).split(","):
        made, logits = PEERS[args.peer](model_dir, work, name, rows)
        seen = Divergence()
        for number, (row, got) in enumerate(zip(rows, logits, strict=True)):
            wanted = np.load(reference / f"{number}.npy")
            seen.add(wanted, got[:, : wanted.shape[1]], [*row[1:], -1])
        size = sum(file.stat().st_size for file in ([made] if made.is_file() else made.rglob("*")) if file.is_file())
        table.append({"name": f"{args.peer} {name}", "bits": 8 * size / total, **asdict(seen.summary())})
        print(json.dumps(table[-1]), flush=True)
    found = {"model_dir": str(args.model_dir), "num_tokens": sum(map(len, rows)), "formats": table}
    (args.out or args.work / f"{args.peer}.json").write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
