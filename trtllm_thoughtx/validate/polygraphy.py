"""`--export_check`: files with which NVIDIA's Polygraphy checks an engine where this package is not installed.

    PART.prefill.inputs.json, PART.decode.inputs.json   inputs of a prompt's call and of the next token's, KV only as far as it is written
    PART.prefill.golden.json, PART.decode.golden.json   what the graph gives for them, on onnxruntime as it stands
    data_loader.py                                      brings the KV cache to its full size
    check.sh, README.md                                 the commands, for onnxruntime and for plans
    reduce.sh                                           the smallest part of the graph that two runtimes compute differently

Golden values are those of the engine's own graph, which the other checks of thoughtx-validate compare with PyTorch; so this one tells
whether another runtime, another GPU or a copied directory computes that graph. A value may differ by `TOLERANCE` of the largest value of
its output. In float32, a norm's weight or a whole matrix that is off by 1 % moves the outputs of a trained 8-layer model and of
SmolLM2-135M by 1e-4 to 3e-2 of it; one weight of a matrix may move them by no more than 1e-6, which no tolerance tells from another order
of summation. Polygraphy's JSON is plain: base64 of .npy files, nothing pickled.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trtllm_thoughtx.backends import BACKENDS
from trtllm_thoughtx.build.engine_dir import EngineDir
from trtllm_thoughtx.config import PLUGIN_LIBRARY, PartFiles
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.files import atomic_dir, check_output, read_named
from trtllm_thoughtx.report import Check
from trtllm_thoughtx.runtime.engine import Engine
from trtllm_thoughtx.validate import data_loader

# Of the largest value of an output, by the engine's type; a quantized product rounds its inputs, and a tie may fall on the other side.
TOLERANCE = {"float32": 1e-5, "float16": 4e-3}
QUANTIZED = 2e-2
PROMPT, ROWS, CHUNK = 17, 4, 8  # tokens, rows of logits, and the chunk size of an engine that takes any
STEPS = ("prefill", "decode")  # in the order of the plans' optimization profiles
RUNNERS = {"onnxruntime": "--onnxrt", "tensorrt": "--trt --model-type engine", "tensorrt-rtx": "--trt --model-type engine"}
REDUCE = """#!/bin/sh
# sh reduce.sh ENGINE_DIR [COMMAND ...]: reduced.onnx, the smallest part of {graph} for which COMMAND fails. It sees polygraphy_debug.onnx,
# and layers.json with the values of every tensor in it. Without COMMAND: TensorRT against onnxruntime.
engine=$(cd "${{1:?ENGINE_DIR}}" && pwd) || exit 2
shift
cd "$(dirname "$0")" || exit 2
[ $# -gt 0 ] || set -- polygraphy run polygraphy_debug.onnx --onnxrt --trt --load-inputs layers.json
polygraphy run "$engine/{graph}" --onnxrt --onnx-outputs mark all --data-loader-script data_loader.py:{loader} \\
  --save-inputs given.json --save-outputs made.json &&
polygraphy data merge given.json made.json -o layers.json &&
polygraphy debug reduce "$engine/{graph}" -o reduced.onnx --mode bisect --load-external-data "$engine" \\
  --load-inputs layers.json --check "$@"
"""
SCRIPT_BYTES = 1 << 20


@dataclass(frozen=True)
class Call:
    """One call of a part: what goes in, what comes out without the KV cache."""

    name: str
    step: str
    part: PartFiles
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]


def check_exportable(directory: EngineDir, target: Path) -> None:
    """Refuse before any work: E130 for a target, E101 for an engine without its graph's weights, E103 for a type that Polygraphy lacks."""
    check_output(target, force=False, inputs=[directory.root])
    again = "build one of the same checkpoint: thoughtx-build"
    if "onnxruntime" not in directory.backends:
        why = f"golden values are computed by onnxruntime; it was built for {', '.join(directory.backends)}"
        fix = f"{again} --backend {','.join((*directory.backends, 'onnxruntime'))}"
        raise ThoughtxError("E101", "the engine does not hold the weights of its graph", where=str(directory.root), why=why, fix=fix)
    if directory.build.dtype not in TOLERANCE:
        why, fix = f"this one is {directory.build.dtype}, which NumPy's files do not have", f"{again} --dtype float32"
        raise ThoughtxError("E103", "--export_check takes float32 and float16 engines", where=str(directory.root), why=why, fix=fix)


def export_check(directory: EngineDir, target: Path, seed: int = 0) -> Check:
    """Write the files for Polygraphy; the check says how many calls of how many parts they are."""
    engine = Engine.load(directory.root, "onnxruntime", exact=True)
    try:
        with atomic_dir(target, force=False) as partial:
            calls = []
            for call in _calls(engine, seed):
                _write(partial / f"{call.name}.inputs.json", _inputs_json(call.inputs))
                _write(partial / f"{call.name}.golden.json", _golden_json(call.outputs))
                calls.append((call, _tolerances(call.outputs, directory)))
            _write(partial / "data_loader.py", _loader(calls, directory.build.kv_capacity))
            _write(partial / "check.sh", _script(calls, directory))
            _write(partial / "reduce.sh", REDUCE.format(graph=calls[0][0].part.onnx, loader=_function(calls[0][0])))
            _write(partial / "README.md", _readme(directory))
    finally:
        engine.close()
    sizes = [path.stat().st_size for path in target.iterdir()]
    return Check("files for Polygraphy", "passed", evidence={"calls": len(calls), "files": len(sizes), "bytes": sum(sizes)})


def _calls(engine: Engine, seed: int) -> Iterator[Call]:
    """Each part's call of a prompt, then of the token behind it, through the parts as a request goes."""
    session, build = engine.session, engine.build
    runner: Any = engine.runner  # onnxruntime's
    num = min(PROMPT, build.max_segment, build.max_seq_len - 1)
    ids = np.random.default_rng(seed).integers(0, engine.config.vocab_size, num + 1).tolist()
    batch = session.start([ids[:num]], min(CHUNK, build.chunk_size) if build.use_chunked_attention and not build.is_bounded else None)
    for step, tokens, rows in zip(STEPS, (ids[:num], ids[num:]), (min(ROWS, num), 1), strict=True):
        session.upkeep(batch, [tokens])
        written = int(batch.used[0])  # slots: a bounded cache does not begin at its first
        feeds = batch.feed([tokens], [list(range(len(tokens) - rows, len(tokens)))])
        for number, part in enumerate(engine.directory.parts):
            inputs = {}
            for value in runner.sessions[number].get_inputs():
                if value.name.startswith("past_"):
                    inputs[value.name] = runner.cache[value.name[5:]].numpy()[:1, :, :written].copy()
                elif value.name in runner.adapters:
                    inputs[value.name] = runner.adapters[value.name].numpy()[:1].copy()
                else:
                    inputs[value.name] = feeds[value.name]
            outputs = runner.run(feeds, number, number + 1)
            yield Call(f"{part.name}.{step}", step, part, inputs, outputs)
            feeds = feeds | {"hidden_states": outputs["hidden_states_out"]} if "hidden_states_out" in outputs else feeds


def _tolerances(outputs: Mapping[str, np.ndarray], directory: EngineDir) -> dict[str, float]:
    share = TOLERANCE[directory.build.dtype] if directory.config.quantization is None else QUANTIZED
    return {name: share * (float(np.abs(value.astype(np.float32)).max()) or 1.0) for name, value in outputs.items()}


# --- the files ---------------------------------------------------------------------------------------------------------


def _write(path: Path, text: str) -> None:
    with path.open("x", encoding="ascii") as file:
        file.write(text)


def _array(value: np.ndarray) -> dict[str, str]:
    held = io.BytesIO()
    np.save(held, np.ascontiguousarray(value), allow_pickle=False)
    return {"array": base64.b64encode(held.getvalue()).decode(), "polygraphy_class": "ndarray"}


def _inputs_json(inputs: Mapping[str, np.ndarray]) -> str:
    return json.dumps([{name: _array(value) for name, value in inputs.items()}])


def _golden_json(outputs: Mapping[str, np.ndarray]) -> str:
    lazy = {name: {"values": _array(value), "polygraphy_class": "LazyArray"} for name, value in outputs.items()}
    result = {"outputs": lazy, "runtime": None, "runner_name": "golden", "polygraphy_class": "IterationResult"}
    return json.dumps({"lst": [["golden", [result]]], "polygraphy_class": "RunResults"})


def _function(call: Call) -> str:
    return call.name.replace(".", "_")


def _loader(calls: list[tuple[Call, dict[str, float]]], capacity: int) -> str:
    text = read_named(Path(data_loader.__file__), SCRIPT_BYTES).decode()
    for call, _ in calls:
        text += f'\n\ndef {_function(call)}() -> Iterator[dict[str, np.ndarray]]:\n    return load("{call.name}", {capacity})\n'
    return text


def _command(call: Call, tolerances: Mapping[str, float], backend: str, *, has_library: bool) -> str:
    file = call.part.plans[backend].file if BACKENDS[backend].builds_plans else call.part.onnx
    profile = f" --optimization-profile {STEPS.index(call.step)}" if BACKENDS[backend].builds_plans else ""
    profile += f' --plugins "$engine/{PLUGIN_LIBRARY}"' if has_library else ""
    limits = " ".join(f"{name}:{limit:.3g}" for name, limit in tolerances.items())
    return (
        f'polygraphy run "$engine/{file}" {RUNNERS[backend]}{profile} --data-loader-script data_loader.py:{_function(call)}'
        f" --load-outputs {call.name}.golden.json --rtol 0 --atol {limits}"
    )


def _script(calls: list[tuple[Call, dict[str, float]]], directory: EngineDir) -> str:
    lines = [
        "#!/bin/sh",
        "# sh check.sh ENGINE_DIR [BACKEND]: exit status 0 when every call of every part gives the golden values",
        'engine=$(cd "${1:?ENGINE_DIR}" && pwd) || exit 2',
        'cd "$(dirname "$0")" || exit 2',
        f'case "${{2:-{directory.backends[0]}}}" in',
    ]
    for backend in directory.backends:
        lines += [f"{backend})", *(["export POLYGRAPHY_USE_TENSORRT_RTX=1"] if backend == "tensorrt-rtx" else [])]
        has_library = BACKENDS[backend].takes_plugins and directory.build.plugin == "cpp"
        lines += [" &&\n".join(_command(call, limits, backend, has_library=has_library) for call, limits in calls), ";;"]
    return "\n".join([*lines, f'*) echo "backends: {" ".join(directory.backends)}" >&2; exit 2 ;;', "esac", ""])


def _readme(directory: EngineDir) -> str:
    share = TOLERANCE[directory.build.dtype] if directory.config.quantization is None else QUANTIZED
    lines = [
        "# Check of an engine with Polygraphy",
        "",
        "Needed: polygraphy, numpy, and onnxruntime or TensorRT. Not needed: trtllm-thoughtx.",
        "",
        *(f"    sh check.sh ENGINE_DIR {backend}" for backend in directory.backends),
        "",
        "Exit status 0: each part of the engine, called with a prompt and with the token behind it, gives the golden values within",
        f"{share:g} of the largest value of each output. Anything else is a failure; Polygraphy prints the output and the difference.",
        "The commands stand in check.sh, one a call. `polygraphy inspect data FILE.json` shows inputs and golden values.",
        "",
        "`sh reduce.sh ENGINE_DIR` finds the smallest part of the graph that TensorRT computes otherwise than onnxruntime, where both are",
        "installed, by `polygraphy debug reduce`; `sh reduce.sh ENGINE_DIR COMMAND ...` that for which a command fails.",
        "",
    ]
    return "\n".join(lines)
