"""The table of refusals and their advice: what makes one, and what a user does who follows its `fix:`. `test_refusals.py` walks it.

When advice is found that does not help, the input becomes a row here first. In command lines @NAME is a path in the row's own
directory: @m the model, @out the output, @e and @c engines of a good one (plain and chunked). A group of `fix` is {1} in `then`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tiny

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
NORM, HEAD, UP = "model.norm.weight", "lm_head.weight", "model.layers.1.mlp.up_proj.weight"
CONVERT = "convert --model_dir @m --output_dir @out"
BUILD = "build --checkpoint_dir @m --output_dir @out --backend onnxruntime"
CALIBRATE = "calibrate --model_dir @m --output_dir @out --calib_data @data.jsonl --calib_size 4 --calib_seq_len 32"
EXITS = "calibrate --model_dir @m --output_dir @out --num_items 3 --max_new_tokens 16 --dataset @q.jsonl"
CHUNKS = "calibrate --model_dir @m --output_dir @out --chunk_report --calib_size 1 --eval_items 0"
DISTILL = "distill --student_dir @m --output_dir @out --data @t.jsonl --supervised_steps 1"
DISTILL += " --preference_steps 0 --scored_steps 0 --eval_items 0 --no_gradient_checkpointing"
RUN = "run --engine_dir @e --input_ids 1,2,3 --max_new_tokens 2"
Make = Callable[[Path], Any]


def nothing(root: Path) -> None:
    pass


@dataclass(frozen=True)
class Row:
    """`follow` changes what the advice says to change, and may return the commands to give; else it is `then`, or the same again."""

    name: str
    code: str
    fix: str  # a pattern
    make: Make
    command: str = CONVERT
    follow: Make = nothing
    then: str | None = None


# --- tools -----------------------------------------------------------------------------------------------------------


def model(**kwargs: Any) -> Make:
    return lambda root: tiny.write_tiny(root / "m", **kwargs) and None


def config(**fields: Any) -> Make:
    return model(config=fields)


def steps(*made: Make) -> Make:
    def do(root: Path) -> None:
        for step in made:
            step(root)

    return do


def set_json(file: str, **fields: Any) -> Make:
    """Fields of a JSON file; None removes one."""

    def change(root: Path) -> None:
        raw = json.loads((root / file).read_text()) | fields
        (root / file).write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))

    return change


def write(file: str, content: str | bytes) -> Make:
    return lambda root: (root / file).write_bytes(content.encode() if isinstance(content, str) else content) and None


def remove(*names: str) -> Make:
    return lambda root: [shutil.rmtree(root / name) if (root / name).is_dir() else (root / name).unlink() for name in names] and None


def rename(old: str, new: str) -> Make:
    return lambda root: (root / old).rename(root / new) and None


def folder(name: str) -> Make:
    return lambda root: (root / name).mkdir()


def again(**kwargs: Any) -> Make:
    """What downloading the model anew comes to."""
    return steps(remove("m"), model(**kwargs))


def cached(root: Path) -> None:
    """An entry of the Hugging Face cache: relative links from a snapshot into blobs."""
    blobs = root / "hub" / "models--a--b" / "blobs"
    snapshot = blobs.parent / "snapshots" / "0123abcd"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    tiny.write_tiny(root / "plain")
    for k, path in enumerate(sorted((root / "plain").iterdir())):
        path.rename(blobs / f"{k:040x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{k:040x}")


def linked_outside(root: Path) -> None:
    tiny.write_tiny(root / "m")
    (root / "m" / SINGLE).rename(root / "elsewhere.safetensors")
    (root / "m" / SINGLE).symlink_to(root / "elsewhere.safetensors")


def as_pickle(name: str) -> Make:
    def do(root: Path) -> None:
        torch = pytest.importorskip("torch")
        tensors = tiny.write_tiny(root / "m")
        (root / "m" / SINGLE).unlink()
        torch.save({name: torch.from_numpy(np.array(values)) for name, values in tensors.items()}, root / "m" / name)

    return do


def saved_again(root: Path) -> list[str]:
    """The Python that the advice names, and the directory that it writes."""
    transformers = pytest.importorskip("transformers")
    transformers.AutoModelForCausalLM.from_pretrained(root / "m").save_pretrained(root / "new")
    return [CONVERT.replace("@m", "@new")]


def without_prefix(root: Path, tied: bool = True) -> None:
    """A base model: no `model.` in front of the names, and no head."""
    tensors = tiny.write_tiny(root / "m", tied=tied)
    renamed: dict[str, Any] = dict.fromkeys(tensors)
    renamed |= {name.removeprefix("model."): array for name, array in tensors.items() if name != HEAD}
    tiny.write_tiny(root / "m", tied=tied, tensors=renamed)


def unlisted(root: Path) -> None:
    index = json.loads((root / "m" / INDEX).read_text())
    del index["weight_map"][NORM]
    (root / "m" / INDEX).write_text(json.dumps(index))


def fp8(root: Path) -> None:
    """Matrices in FP8 with a scale each, as compressed-tensors writes them."""
    plain, changed = tiny.write_tiny(root / "m"), {}
    for name, weight in plain.items():
        if "_proj.weight" in name:
            scale = np.abs(weight).max().reshape(1) / 448
            base = name.removesuffix(".weight")
            changed |= {name: (weight / scale).astype(ml_dtypes.float8_e4m3fn), f"{base}.weight_scale": scale.astype(np.float32)}
            changed |= {f"{base}.input_scale": np.array([0.05], np.float32)}
    kind = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    group = {"weights": kind, "input_activations": kind, "targets": ["Linear"]}
    quantization = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}}
    tiny.write_tiny(root / "m", tensors=changed, config={"quantization_config": quantization})


def modelopt(root: Path) -> None:
    """The same as ModelOpt says it."""
    fp8(root)
    set_json("m/config.json", quantization_config=None)(root)
    (root / "m" / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}}))


def fp8_unexplained(root: Path) -> None:
    fp8(root)
    config = json.loads((root / "m" / "config.json").read_text())
    (root / "kept.json").write_text(json.dumps(config))
    del config["quantization_config"]
    (root / "m" / "config.json").write_text(json.dumps(config))


def data(root: Path) -> None:
    rows = [{"input_ids": np.random.default_rng(k).integers(0, 95, 24).tolist()} for k in range(12)]
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def converted(*flags: str, **kwargs: Any) -> Make:
    """@m becomes a TensorRT-LLM checkpoint, @hf what it was made from."""

    def do(root: Path) -> None:
        from trtllm_thoughtx.checkpoint.convert import convert

        tiny.write_tiny(root / "hf")
        convert(root / "hf", root / "m", **kwargs)

    return do


def questions(count: int) -> Make:
    return lambda root: (
        (root / "q.jsonl").write_text("".join(json.dumps({"prompt": f"{k} ?", "answer": "2"}) + "\n" for k in range(count))) and None
    )


def traces(root: Path) -> None:
    rows = [{"prompt": f"{k} ?", "steps": ["a", "b"], "answer": "2"} for k in range(8)]
    (root / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def model_with_tokenizer(root: Path) -> None:
    tiny.write_tokenizer(root / "hf")


BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
SLIDES = {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 0}
BIG = {UP: np.full((96, 64), 1e6, np.float32)}
BAD = {UP: np.full((96, 64), np.nan, np.float32)}
DYNAMIC = {"type": "dynamic", "factor": 2.0}

PATHS = [
    Row(
        "a weight file for a directory",
        "E101",
        "give the directory that holds it: (.*/m)$",
        model(),
        f"convert --model_dir @m/{SINGLE} --output_dir @out",
        then="convert --model_dir {1} --output_dir @out",
    ),
    Row(
        "config.json for a directory",
        "E101",
        "give the directory that holds it: (.*/m)$",
        model(),
        "inspect @m/config.json",
        then="inspect {1}",
    ),
    Row(
        "one level too high",
        "E101",
        "give (.*/up/x)$",
        steps(model(), folder("up"), rename("m", "up/x")),
        "convert --model_dir @up/ --output_dir @out",
        then="convert --model_dir {1} --output_dir @out",
    ),
    Row(
        "entry of the hub's cache",
        "E101",
        "give (.*/snapshots/0123abcd)$",
        cached,
        "build --checkpoint_dir @hub/models--a--b --output_dir @out --backend onnxruntime",
        then="build --checkpoint_dir {1} --output_dir @out --backend onnxruntime",
    ),
    Row(
        "a GGUF file",
        "E109",
        "use the safetensors checkpoint that it was made from",
        steps(model(), write("model.gguf", b"GGUF" + bytes(64))),
        "convert --model_dir @model.gguf --output_dir @out",
        then=CONVERT,
    ),
    Row(
        "a directory with GGUF alone",
        "E109",
        "use the safetensors checkpoint",
        steps(model(), rename(f"m/{SINGLE}", "m/model-q4.gguf")),
        follow=again(),
    ),
    Row(
        "a path that does not exist",
        "E101",
        "of it (.*) exists",
        model(),
        "convert --model_dir @m/nowhere/deeper --output_dir @out",
        then="convert --model_dir {1} --output_dir @out",
    ),
    Row(
        "link out of the directory",
        "E104",
        "put the file itself into the directory",
        linked_outside,
        follow=steps(remove(f"m/{SINGLE}"), rename("elsewhere.safetensors", f"m/{SINGLE}")),
    ),
    Row(
        "an engine for a checkpoint",
        "E101",
        "^give the Hugging Face directory or TensorRT-LLM checkpoint that it was built from$",
        model(),
        "convert --model_dir @e --output_dir @out",
        then=CONVERT,
    ),
    Row(
        "a checkpoint for an engine",
        "E101",
        "^build an engine of it: thoughtx-(build --checkpoint_dir .*/m --output_dir )ENGINE$",
        model(),
        "bench --engine_dir @m --prompt_len 4 --max_new_tokens 2 --repeats 1",
        follow=lambda root: [BUILD, "bench --engine_dir @out --prompt_len 4 --max_new_tokens 2 --repeats 1"],
    ),
    Row(
        "nothing for an engine",
        "E101",
        "of it .* exists",
        nothing,
        RUN.replace("@e", "@nowhere --backend onnxruntime"),
        follow=lambda root: [tiny.write_tiny(root / "m") and BUILD, RUN.replace("@e", "@out")],
    ),
    Row(
        "an engine's graph for the engine",
        "E101",
        "holds it: (.*/e)$",
        nothing,
        RUN.replace("@e", "@e/rank0.onnx"),
        then=RUN.replace("@e", "{1}"),
    ),
    Row(
        "a directory of engines for an engine",
        "E101",
        "^give (.*/e)$",
        nothing,
        RUN.replace("@e", "@e/.."),
        then=RUN.replace("@e", "{1}"),
    ),
]
# The same slip before each command: what it advises is what that command takes.
TAKES = {
    CONVERT: "^give a Hugging Face directory or a TensorRT-LLM checkpoint$",
    BUILD: "^give a Hugging Face directory or a TensorRT-LLM checkpoint$",
    f"{CALIBRATE} --qformat int8_wo": "^give a Hugging Face directory or a TensorRT-LLM checkpoint$",
    f"{EXITS} --exit_layers 1": "^give a Hugging Face directory or a TensorRT-LLM checkpoint$",
    CHUNKS: "^give a Hugging Face directory$",
    DISTILL: "^give a Hugging Face directory$",
    "validate --engine_dir @e --reference @m": "^give a Hugging Face directory$",
    "eval --model_dir @m --dataset @q.jsonl --max_new_tokens 2": "^give an engine directory or a Hugging Face directory$",
    "inspect @m": "^give a Hugging Face directory, a TensorRT-LLM checkpoint, an engine directory, an .onnx file or an .engine file$",
}
DATA = steps(data, questions(30), traces)
PATHS += [
    Row(
        f"no config.json, {command.split()[0]} {number}",
        "E101",
        fix,
        steps(folder("m"), write("m/x", ""), DATA),
        command,
        again(tokenizer=True),
    )
    for number, (command, fix) in enumerate(TAKES.items())
]
PATHS += [
    Row(
        f"an engine for a model, {command.split()[0]} {number}",
        "E101",
        "^give the Hugging Face directory(?: or TensorRT-LLM checkpoint)? that it was built from$",
        steps(model(tokenizer=True), DATA),
        command.replace("@m", "@e"),
        then=command,
    )
    for number, command in enumerate(TAKES)
    if not command.startswith(("eval", "inspect"))
]
WEIGHTS = [
    Row(
        "missing shard",
        "E106",
        f"download into this directory: {FIRST}",
        steps(model(shards=2), remove(f"m/{FIRST}")),
        follow=model(shards=2),
    ),
    Row("shards without index", "E106", f"download {INDEX} as well", steps(model(shards=2), remove(f"m/{INDEX}")), follow=model(shards=2)),
    Row(
        "one file of another name",
        "E106",
        f"rename weights.safetensors to {SINGLE}",
        steps(model(), rename(f"m/{SINGLE}", "m/weights.safetensors")),
        follow=rename("m/weights.safetensors", f"m/{SINGLE}"),
    ),
    Row("two sets of weights", "E106", f"remove {SINGLE}, or {INDEX}", steps(model(shards=2), model()), follow=remove(f"m/{SINGLE}")),
    Row(
        "two sets of weights, the other way",
        "E106",
        f"remove {SINGLE}, or {INDEX}",
        steps(model(shards=2), model()),
        follow=remove(f"m/{INDEX}", f"m/{FIRST}", f"m/{SECOND}"),
    ),
    Row(
        "an index that is no map",
        "E106",
        f"download {INDEX} again",
        steps(model(shards=2), write(f"m/{INDEX}", "{}")),
        follow=model(shards=2),
    ),
    Row("no weights", "E101", f"download {SINGLE}", steps(model(), remove(f"m/{SINGLE}")), follow=model()),
    Row("a LoRA adapter", "E101", r"--lora_dir THIS", steps(folder("m"), write("m/adapter_config.json", "{}")), follow=again()),
    Row(
        "pickles",
        "E109",
        r"AutoModelForCausalLM.from_pretrained\(DIR\)\.save_pretrained\(NEW_DIR\)",
        as_pickle("pytorch_model.bin"),
        follow=saved_again,
    ),
    Row(
        "a pickle called safetensors",
        "E109",
        r"rename it to pytorch_model.bin; .*save_pretrained\(NEW_DIR\)",
        as_pickle(SINGLE),
        follow=lambda root: rename(f"m/{SINGLE}", "m/pytorch_model.bin")(root) or saved_again(root),
    ),
    Row(
        "an LFS pointer",
        "E109",
        "git lfs pull",
        steps(model(), write(f"m/{SINGLE}", "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 35\n")),
        follow=model(),
    ),
    Row(
        "cut short",
        "E105",
        "download the file again",
        steps(model(), write(f"m/{SINGLE}", b"\x10" + bytes(7) + b'{"a":{}')),
        follow=model(),
    ),
    Row("NaN, converted", "E108", "download the checkpoint again", model(tensors=BAD), follow=model()),
    Row("NaN, kept", "E108", "thoughtx-convert --allow_nonfinite", model(tensors=BAD), then=f"{CONVERT} --allow_nonfinite"),
    Row("NaN, built", "E108", "download the checkpoint again", model(tensors=BAD), BUILD, follow=model()),
    Row(
        "beyond float16",
        "E108",
        "--dtype with more range: bfloat16 or float32",
        model(tensors=BIG),
        f"{CONVERT} --dtype float16",
        then=f"{CONVERT} --dtype bfloat16",
    ),
    Row(
        "beyond float16, built",
        "E108",
        "--dtype with more range: bfloat16 or float32",
        model(tensors=BIG),
        f"{BUILD} --dtype float16",
        then=f"{BUILD} --dtype float32",
    ),
    Row(
        "a head that is not the tied one",
        "E107",
        "set tie_word_embeddings to false",
        config(tie_word_embeddings=True),
        follow=set_json("m/config.json", tie_word_embeddings=False),
    ),
    Row(
        "a head that is not the tied one, dropped",
        "E107",
        "only if the stored head is a leftover, remove it",
        config(tie_word_embeddings=True),
        follow=model(config={"tie_word_embeddings": True}, tensors={HEAD: None}),
    ),
    Row(
        "no head, and not tied",
        "E107",
        "set tie_word_embeddings to true",
        model(tied=True, config={"tie_word_embeddings": False}),
        follow=set_json("m/config.json", tie_word_embeddings=True),
    ),
    Row("a base model, tied", "E107", r"from_pretrained\(DIR\)\.save_pretrained\(NEW_DIR\)", without_prefix, follow=saved_again),
    Row(
        "another model's config", "E107", "use the config.json that belongs to these weights", config(intermediate_size=128), follow=model()
    ),
    Row(
        "matrices in FP8 without a word",
        "E103",
        "the config.json that was saved with these weights and has their quantization_config",
        fp8_unexplained,
        follow=rename("kept.json", "m/config.json"),
    ),
    Row(
        "a quantized model, built",
        "E103",
        "thoughtx-convert --model_dir THIS --output_dir CKPT imports it",
        fp8,
        BUILD,
        follow=lambda root: ["convert --model_dir @m --output_dir @ckpt", BUILD.replace("@m", "@ckpt")],
    ),
    Row(
        "bitsandbytes, built",
        "E103",
        "use the original checkpoint, and quantize it with thoughtx-calibrate",
        config(quantization_config=BNB),
        BUILD,
        follow=steps(model(), data),
        then=f"{CALIBRATE} --qformat int8_wo",
    ),
    Row(
        "bitsandbytes, converted",
        "E103",
        "use the original checkpoint, and quantize it with thoughtx-calibrate",
        config(quantization_config=BNB),
        follow=steps(model(), data),
        then=f"{CALIBRATE} --qformat int8_wo",
    ),
    Row("a quantized model, cast", "E001", "leave it out", fp8, f"{CONVERT} --dtype float16", then=CONVERT),
    Row("a quantized model, calibrated", "E103", "original checkpoint", steps(fp8, data), f"{CALIBRATE} --qformat int8_wo", follow=model()),
    Row(
        "a quantized checkpoint, calibrated again",
        "E103",
        "calibrate the original checkpoint",
        steps(
            fp8,
            data,
            lambda root: __import__("trtllm_thoughtx.checkpoint.quantized", fromlist=["x"]).import_quantized(root / "m", root / "q"),
        ),
        f"{CALIBRATE} --qformat int8_wo".replace("@m", "@q"),
        follow=model(),
        then=f"{CALIBRATE} --qformat int8_wo",
    ),
    Row(
        "a checkpoint in two pieces",
        "E103",
        "thoughtx-convert --tp_size 1 --pp_size 1",
        converted(tp_size=2),
        BUILD,
        follow=lambda root: ["convert --model_dir @hf --output_dir @one --tp_size 1 --pp_size 1", BUILD.replace("@m", "@one")],
    ),
]
WEIGHTS += [
    Row(
        "a tensor that the index lacks", "E106", f"download {INDEX} and the files", steps(model(shards=2), unlisted), follow=model(shards=2)
    ),
    Row(
        "ModelOpt's FP8, built",
        "E103",
        "thoughtx-convert --model_dir THIS --output_dir CKPT imports it",
        modelopt,
        BUILD,
        follow=lambda root: ["convert --model_dir @m --output_dir @ckpt", BUILD.replace("@m", "@ckpt")],
    ),
    Row(
        "a quantized model as a reference",
        "E103",
        "to compare with transformers, give the original checkpoint",
        fp8,
        "validate --engine_dir @e --reference @m",
        follow=again(tokenizer=True),
    ),
    Row(
        "a base model, not tied",
        "E107",
        "use the checkpoint of the causal language model",
        lambda root: without_prefix(root, tied=False),
        follow=again(),
    ),
]
CONFIGS = [
    Row("two types named", "E102", "remove one of the two", config(dtype="float16"), follow=set_json("m/config.json", dtype=None)),
    Row(
        "several types and none named",
        "E102",
        'add "torch_dtype" to config.json: "float32"',
        model(config={"torch_dtype": None}, tensors={NORM: np.ones(64, np.float16)}),
        follow=set_json("m/config.json", torch_dtype="float32"),
    ),
    Row(
        "code of its own",
        "E110",
        "remove auto_map",
        config(auto_map={"AutoModelForCausalLM": "modeling_x.X"}),
        follow=set_json("m/config.json", auto_map=None),
    ),
    Row("a classifier", "E103", "causal language model", config(architectures=["Qwen2ForSequenceClassification"]), follow=model()),
    Row(
        "dynamic rope",
        "E103",
        "remove rope_scaling from config.json",
        config(rope_scaling=DYNAMIC),
        BUILD,
        follow=set_json("m/config.json", rope_scaling=None),
    ),
    Row(
        "a damaged number",
        "E102",
        "correct it in config.json",
        config(num_hidden_layers="2"),
        follow=set_json("m/config.json", num_hidden_layers=2),
    ),
    Row(
        "a trailing comma",
        "E102",
        "correct the file",
        steps(model(), lambda root: write("m/config.json", (root / "m/config.json").read_text().replace("\n}", ",\n}"))(root)),
        follow=model(),
    ),
    Row(
        "longer than the window",
        "E001",
        "use at most (32)$",
        config(**SLIDES),
        f"{BUILD} --max_seq_len 64",
        then=f"{BUILD} --max_seq_len {{1}}",
    ),
    Row("longer than the model", "E001", "use at most (512)$", model(), f"{BUILD} --max_seq_len 1024", then=f"{BUILD} --max_seq_len {{1}}"),
    Row("another family", "E103", "use a checkpoint of a supported type", config(model_type="mamba"), follow=model()),
]
OUTPUTS = [
    Row(
        "output of ours, there already",
        "E130",
        "--force",
        steps(model(), folder("out"), write("out/manifest.json", "{}")),
        then=f"{CONVERT} --force",
    ),
    Row(
        "output of ours, removed",
        "E130",
        "remove it",
        steps(model(), folder("out"), write("out/manifest.json", "{}")),
        follow=remove("out"),
    ),
    Row(
        "output of someone else",
        "E130",
        "^choose another output path$",
        steps(model(), folder("out"), write("out/thesis.tex", "x")),
        then=CONVERT.replace("@out", "@out2"),
    ),
    Row(
        "output of someone else, forced",
        "E130",
        "choose another output path",
        steps(model(), folder("out"), write("out/thesis.tex", "x")),
        f"{CONVERT} --force",
        then=CONVERT.replace("@out", "@out2"),
    ),
    Row("output is a file", "E130", "choose another output path", steps(model(), write("out", "x")), then=CONVERT.replace("@out", "@out2")),
    Row(
        "output inside the input",
        "E130",
        "choose another output path",
        model(),
        "convert --model_dir @m --output_dir @m/ckpt",
        then=CONVERT,
    ),
    Row(
        "output is the input", "E130", "choose another output path", model(), "convert --model_dir @m --output_dir @m --force", then=CONVERT
    ),
    Row(
        "output around the input",
        "E130",
        "choose another output path",
        steps(folder("up"), model(), rename("m", "up/m")),
        "convert --model_dir @up/m --output_dir @up --force",
        then="convert --model_dir @up/m --output_dir @out",
    ),
    Row(
        "output through a link",
        "E130",
        "remove the link",
        steps(model(), lambda root: (root / "out").symlink_to(root / "there")),
        follow=remove("out"),
    ),
    Row(
        "output in a directory that is missing",
        "E130",
        "create it first",
        model(),
        "convert --model_dir @m --output_dir @new/out",
        folder("new"),
    ),
]
BUILDS = [
    Row(
        "tensor parallel of three",
        "E001",
        "choose a tp_size that divides",
        model(),
        f"{CONVERT} --tp_size 3",
        then=f"{CONVERT} --tp_size 2",
    ),
    Row(
        "chunks without chunked attention",
        "E001",
        "add --use_chunked_attention",
        model(),
        f"{BUILD} --chunk_size 16",
        then=f"{BUILD} --chunk_size 16 --use_chunked_attention",
    ),
    Row(
        "a plugin without chunked attention",
        "E001",
        "add --use_chunked_attention",
        model(),
        f"{BUILD} --plugin function",
        then=f"{BUILD} --plugin function --use_chunked_attention",
    ),
    Row(
        "a plugin that no backend holds",
        "E001",
        "or leave it out",
        model(),
        f"{BUILD} --use_chunked_attention --plugin aot",
        then=f"{BUILD} --use_chunked_attention",
    ),
    Row(
        "chunks to be chosen from nothing",
        "E001",
        "give --base_size",
        model(),
        f"{BUILD} --use_chunked_attention --chunk_size auto",
        then=f"{BUILD} --use_chunked_attention --chunk_size auto --base_size 64",
    ),
    Row(
        "an odd chunk to be chosen",
        "E001",
        "use (48)$",
        model(),
        f"{BUILD} --use_chunked_attention --chunk_size auto --base_size 64 --max_chunk_size 50",
        then=f"{BUILD} --use_chunked_attention --chunk_size auto --base_size 64 --max_chunk_size {{1}}",
    ),
    Row(
        "a threshold without sizes",
        "E001",
        "give --base_size as well",
        model(),
        f"{BUILD} --use_chunked_attention --threshold_low 1",
        then=f"{BUILD} --use_chunked_attention --threshold_low 1 --base_size 64",
    ),
    Row("a stage too far", "E001", "for example (--early_exit_layers 1)", model(), f"{BUILD} --early_exit_layers 5", then=f"{BUILD} {{1}}"),
    Row(
        "stages twice",
        "E001",
        "give one of the two",
        model(),
        f"{BUILD} --early_exit_layers 1 --num_stages 2",
        then=f"{BUILD} --num_stages 2",
    ),
    Row(
        "a piece longer than a sequence",
        "E001",
        "use a whole number from 1 to (64)$",
        model(),
        f"{BUILD} --max_seq_len 64 --max_input_len 100",
        then=f"{BUILD} --max_seq_len 64 --max_input_len {{1}}",
    ),
    Row(
        "a library without its plugin",
        "E001",
        "or leave it out",
        steps(model(), write("lib.so", b"\x7fELF")),
        f"{BUILD} --plugin_library @lib.so",
        then=BUILD,
    ),
    Row("a flag that is not there", "E001", "--help lists every flag", model(), f"{BUILD} --sequence 3", then=BUILD),
    Row(
        "a recipe with a flag of another command",
        "E002",
        "give it to thoughtx-convert",
        steps(model(), write("r.yaml", "tp_size: 2\n")),
        f"{BUILD} --config @r.yaml",
        follow=write("r.yaml", "max_batch_size: 2\n"),
    ),
    Row(
        "a recipe with a slip",
        "E002",
        "perhaps (max_batch_size) is meant",
        steps(model(), write("r.yaml", "max_batch_sise: 2\n")),
        f"{BUILD} --config @r.yaml",
        follow=write("r.yaml", "max_batch_size: 2\n"),
    ),
    Row(
        "a recipe with a wrong type",
        "E002",
        "give a whole number",
        steps(model(), write("r.yaml", "max_batch_size: two\n")),
        f"{BUILD} --config @r.yaml",
        follow=write("r.yaml", "max_batch_size: 2\n"),
    ),
]
CALIBRATIONS = [
    Row(
        "two goals",
        "E001",
        "give one of the two",
        steps(model(), data),
        f"{CALIBRATE} --qformat int8_wo --accuracy_budget kl=0.1 --target_bits 9",
        then=f"{CALIBRATE} --qformat int8_wo --target_bits 9",
    ),
    Row(
        "groups that do not fit",
        "E001",
        "use (--group_size 32)$",
        steps(model(), data),
        f"{CALIBRATE} --qformat int4_wo --group_size 128",
        then=f"{CALIBRATE} --qformat int4_wo {{1}}",
    ),
    Row(
        "exclude what is not there",
        "E001",
        "names are like transformer.layers.0",
        steps(model(), data),
        f"{CALIBRATE} --qformat int8_wo --exclude nothing",
        then=f"{CALIBRATE} --qformat int8_wo --exclude transformer.layers.0.mlp.proj",
    ),
    Row(
        "exclude everything",
        "E001",
        "exclude fewer",
        steps(model(), data),
        f"{CALIBRATE} --qformat int8_wo --exclude '*'",
        then=f"{CALIBRATE} --qformat int8_wo --exclude '*.proj'",
    ),
    Row(
        "bits out of reach",
        "E001",
        "from ([0-9.]+) to 32",
        steps(model(), data),
        f"{CALIBRATE} --qformat int8_wo --target_bits 4",
        then=f"{CALIBRATE} --qformat int8_wo --target_bits 20",
    ),
    Row(
        "two jobs",
        "E001",
        "--help shows examples",
        steps(model(), data),
        f"{CALIBRATE} --qformat int8_wo --chunk_report",
        then=f"{CALIBRATE} --qformat int8_wo",
    ),
    Row(
        "a flag of another job",
        "E001",
        "leave it out",
        steps(model(), data),
        f"{CALIBRATE} --qformat int8_wo --context 32",
        then=f"{CALIBRATE} --qformat int8_wo",
    ),
    Row(
        "rows that cannot be used",
        "E164",
        "each line is an object like",
        steps(model(), write("data.jsonl", '{"x": 1}\n')),
        f"{CALIBRATE} --qformat int8_wo",
        follow=data,
    ),
    Row(
        "texts without a tokenizer",
        "E164",
        "input_ids",
        steps(model(), write("data.jsonl", '{"text": "abc abc abc"}\n' * 8)),
        f"{CALIBRATE} --qformat int8_wo",
        follow=data,
    ),
]
CALIBRATIONS += [
    Row(
        "a head for a model without tags",
        "E112",
        "--exit_layers alone needs no tags",
        steps(model(tokenizer=True), questions(30)),
        f"{EXITS} --fit_exit_head",
        then=f"{EXITS} --exit_layers 1",
    ),
    Row(
        "exits without a tokenizer",
        "E112",
        "copy the model's tokenizer.json there",
        steps(model(), questions(30)),
        f"{EXITS} --exit_layers 1",
        follow=model(tokenizer=True),
    ),
    Row(
        "an exit behind the last layer",
        "E001",
        "for example (--exit_layers 1)$",
        steps(model(tokenizer=True), questions(30)),
        f"{EXITS} --exit_layers 2",
        then=f"{EXITS} {{1}}",
    ),
    Row(
        "too few questions",
        "E140",
        "give at least (9|[0-9]+)",
        steps(model(tokenizer=True), questions(2)),
        f"{EXITS} --exit_layers 1",
        follow=questions(30),
    ),
    Row(
        "a context beyond the model",
        "E001",
        "use at most (512)$",
        model(tokenizer=True),
        f"{CHUNKS} --context 4096",
        then=f"{CHUNKS} --context {{1}}",
    ),
    Row(
        "chunks of a converted checkpoint",
        "E101",
        "^give the Hugging Face directory that it was converted from$",
        steps(converted(), model_with_tokenizer),
        CHUNKS.replace("@m", "@m"),
        then=CHUNKS.replace("@m", "@hf"),
    ),
    Row(
        "chunks of a quantized model",
        "E103",
        "to calibrate, .* give the original checkpoint",
        steps(fp8, lambda root: tiny.write_tokenizer(root / "m")),
        CHUNKS,
        follow=again(tokenizer=True),
    ),
]
DISTILLS = [
    Row(
        "a student without a tokenizer",
        "E112",
        "copy the model's tokenizer.json there",
        steps(model(), traces),
        DISTILL,
        follow=model(tokenizer=True),
    ),
    Row(
        "layers that a student lacks",
        "E163",
        "from 0 to (1)",
        steps(model(tokenizer=True), traces),
        f"{DISTILL} --layers 0,5 --dry_run",
        then=f"{DISTILL} --layers 0,{{1}} --dry_run",
    ),
    Row(
        "traces that are none",
        "E161",
        'each line is an object like {"prompt"',
        steps(model(tokenizer=True), write("t.jsonl", "{}\n")),
        DISTILL,
        follow=traces,
    ),
]
EVALS = [
    Row(
        "a question that does not fit",
        "E122",
        "lower --max_new_tokens",
        questions(2),
        "eval --engine_dir @e --dataset @q.jsonl --max_new_tokens 64",
        then="eval --engine_dir @e --dataset @q.jsonl --max_new_tokens 2",
    ),
    Row(
        "lines that are no questions",
        "E140",
        'each line is an object like {"prompt"',
        write("q.jsonl", '{"question": "x"}\n'),
        "eval --engine_dir @e --dataset @q.jsonl --max_new_tokens 2",
        follow=questions(2),
    ),
    Row(
        "a task of a size that it lacks",
        "E001",
        "leave it out",
        model(tokenizer=True),
        "eval --model_dir @m --task chain --sizes 99 --num_items 1 --max_new_tokens 2",
        then="eval --model_dir @m --task chain --num_items 1 --max_new_tokens 2",
    ),
    Row(
        "an engine's flag for a model",
        "E001",
        "leave --backend out",
        steps(model(tokenizer=True), questions(2)),
        "eval --model_dir @m --dataset @q.jsonl --max_new_tokens 2 --backend onnxruntime",
        then="eval --model_dir @m --dataset @q.jsonl --max_new_tokens 2",
    ),
    Row(
        "more questions at once than the engine takes",
        "E122",
        "ask for at most (2)",
        questions(2),
        "eval --engine_dir @e --dataset @q.jsonl --max_new_tokens 2 --batch_size 9",
        then="eval --engine_dir @e --dataset @q.jsonl --max_new_tokens 2 --batch_size {1}",
    ),
    Row(
        "a plot without a picture's name",
        "E001",
        "choose such a name",
        questions(2),
        "eval --engine_dir @e --dataset @q.jsonl --max_new_tokens 2 --plot @a.txt",
        then="eval --engine_dir @e --dataset @q.jsonl --max_new_tokens 2 --plot @a.png",
    ),
    Row(
        "a comparison with nothing",
        "E101",
        "^build an engine of it: .*, or give the Hugging Face directory that it was converted from$",
        steps(converted(), questions(2)),
        "eval --model_dir @m --dataset @q.jsonl --max_new_tokens 2",
        follow=lambda root: tiny.write_tokenizer(root / "hf"),
        then="eval --model_dir @hf --dataset @q.jsonl --max_new_tokens 2",
    ),
]
RUNS = [
    Row("no prompt", "E001", "thoughtx-run --help shows", nothing, "run --engine_dir @e", then=RUN),
    Row(
        "an empty prompt",
        "E140",
        "give some text",
        nothing,
        "run --engine_dir @e --prompt ''",
        then="run --engine_dir @e --prompt abc --max_new_tokens 2",
    ),
    Row(
        "a backend that was not built",
        "E101",
        "choose one of those",
        nothing,
        f"{RUN} --backend tensorrt-rtx",
        then=f"{RUN} --backend onnxruntime",
    ),
    Row("a chunk of an engine without", "E122", "change the request", nothing, f"{RUN} --chunk_size 8", then=RUN),
    Row(
        "a chunk to be chosen",
        "E122",
        "name a chunk size",
        nothing,
        f"{RUN} --chunk_size auto".replace("@e", "@c"),
        then=f"{RUN} --chunk_size 8".replace("@e", "@c"),
    ),
    Row(
        "a chunk too large",
        "E122",
        "change the request",
        nothing,
        f"{RUN} --chunk_size 32".replace("@e", "@c"),
        then=f"{RUN} --chunk_size 16".replace("@e", "@c"),
    ),
    Row("an id that the model lacks", "E122", "change the request", nothing, "run --engine_dir @e --input_ids 1,97", then=RUN),
    Row("tags that the model lacks", "E122", "leave --max_thinking_tokens out", nothing, f"{RUN} --max_thinking_tokens 3", then=RUN),
    Row("a head that the engine lacks", "E122", "leave --exit_threshold out", nothing, f"{RUN} --exit_threshold 0.5", then=RUN),
    Row("drafts that the engine lacks", "E122", "--exit_layers", nothing, f"{RUN} --exit_policy verify", then=RUN),
    Row(
        "more rows than the engine takes",
        "E122",
        "thoughtx-build --max_batch_size (4)",
        model(tokenizer=True),
        "bench --engine_dir @e --batch_size 4 --prompt_len 4 --max_new_tokens 2 --repeats 1",
        follow=lambda root: [
            f"{BUILD} --max_batch_size 4",
            "bench --engine_dir @out --batch_size 4 --prompt_len 4 --max_new_tokens 2 --repeats 1",
        ],
    ),
    Row(
        "more tokens than the engine takes",
        "E122",
        "ask for at most (64)",
        nothing,
        "bench --engine_dir @e --prompt_len 63 --max_new_tokens 2 --repeats 1",
        then="bench --engine_dir @e --prompt_len 62 --max_new_tokens 2 --repeats 1",
    ),
    Row(
        "an engine without its manifest",
        "E121",
        "run thoughtx-build .* again",
        steps(model(), lambda root: (root / "e" / "manifest.json").unlink()),
        RUN,
        follow=lambda root: [BUILD.replace("@out", "@e2"), RUN.replace("@e", "@e2")],
    ),
    Row(
        "a plan that another build left beside an engine",
        "E121",
        "remove these files",
        steps(model(), write("e/rank0.engine", b"x")),
        RUN,
        follow=lambda root: (root / "e" / "rank0.engine").unlink(),
    ),
    Row(
        "an edited engine",
        "E120",
        "copy the directory again, or make it again",
        steps(model(), write("e/rank0.data", b"x")),
        RUN,
        follow=lambda root: [BUILD.replace("@out", "@e2"), RUN.replace("@e", "@e2")],
    ),
    Row(
        "neither reference nor golden",
        "E001",
        "add --reference HF or --golden FILE",
        model(tokenizer=True),
        "validate --engine_dir @e",
        then="validate --engine_dir @e --reference @m",
    ),
    Row(
        "a record of nothing",
        "E001",
        "add --reference HF",
        model(tokenizer=True),
        "validate --engine_dir @e --record @g.safetensors",
        then="validate --engine_dir @e --record @g.safetensors --reference @m",
    ),
    Row(
        "a reference that is another model",
        "E101",
        "that the engine, or its checkpoint, was made from",
        steps(model(tokenizer=True, seed=1, num_layers=3)),
        "validate --engine_dir @e --reference @m",
        follow=again(tokenizer=True),
    ),
    Row(
        "a converted reference",
        "E101",
        "Hugging Face directory that it was converted from",
        converted(),
        "validate --engine_dir @e --reference @m",
        then="validate --engine_dir @e --reference @hf",
    ),
    Row(
        "no golden file",
        "E150",
        "thoughtx-validate --engine_dir ENGINE --reference HF --record FILE",
        steps(model(tokenizer=True), write("g.safetensors", b"\x02" + bytes(7) + b"{}")),
        "validate --engine_dir @e --golden @g.safetensors",
        follow=lambda root: [
            (root / "g.safetensors").unlink() or "validate --engine_dir @e --reference @m --record @g.safetensors",
            "validate --engine_dir @e --golden @g.safetensors",
        ],
    ),
    Row(
        "no questions for eval",
        "E001",
        "--help shows examples",
        write("q.jsonl", '{"prompt": "1 + 1 ?", "answer": "2"}\n'),
        "eval --engine_dir @e",
        then="eval --engine_dir @e --dataset @q.jsonl --max_new_tokens 2",
    ),
]

ROWS = [*PATHS, *WEIGHTS, *CONFIGS, *OUTPUTS, *BUILDS, *CALIBRATIONS, *DISTILLS, *EVALS, *RUNS]
