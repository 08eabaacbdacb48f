"""The options of `thoughtx-build`: defaults that depend on the model, and every combination that cannot be built refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trtllm_thoughtx.backends import BACKENDS
from trtllm_thoughtx.config import AUTO, CHUNK_STEP, DTYPES, PLUGINS, BuildConfig, ModelConfig
from trtllm_thoughtx.errors import ThoughtxError, shown
from trtllm_thoughtx.families.formats import FORMATS, INT4
from trtllm_thoughtx.families.size import layer_parameters

DEFAULT_CHUNK, DEFAULT_SINK, DEFAULT_LEFT = 512, 4, 1
DEFAULT_SEQ_LEN, DEFAULT_INPUT_LEN = 2048, 512
MAX_BASE, MAX_NATS = 1e6, 20.0
STAGE_BYTES = 2100 << 20  # a TensorRT build is cut into stages of at most so many bytes of weights, unless asked otherwise
MAX_BATCH, MAX_LEN = 4096, 1 << 24
CHUNKS = ("chunk_size", "sink_tokens", "left_chunks", "max_chunk_size", "num_anchors", "base_size", "threshold_low")
KNOWN = (
    *("dtype", "backend", "max_batch_size", "max_input_len", "max_seq_len", "use_chunked_attention", *CHUNKS),
    *("plugin", "early_exit_layers", "num_stages", "compute_capabilities", "optimization_level"),
)


def refuse(flag: str, value: object, why: str, fix: str) -> ThoughtxError:
    return ThoughtxError("E001", f"--{flag} {shown(value)} cannot be used", where=f"--{flag}", why=why, fix=fix)


def resolve(config: ModelConfig, options: Mapping[str, Any]) -> BuildConfig:
    """What the user set (None counts as not set) -> a complete, checked `BuildConfig`."""
    given = {key: value for key, value in options.items() if value is not None}
    assert set(given) <= set(KNOWN), set(given) - set(KNOWN)
    backends = tuple(dict.fromkeys(_listed(given.get("backend")) or ("tensorrt-rtx", "onnxruntime")))
    for backend in backends:
        if backend not in BACKENDS:
            raise refuse("backend", backend, "there is no such backend", f"choose from {', '.join(BACKENDS)}")
    _check_cache(config, backends)
    dtype = _dtype(config, given.get("dtype", "auto"), backends)
    longest = config.longest
    max_seq_len = _whole(given, "max_seq_len", min(DEFAULT_SEQ_LEN, longest), 2, MAX_LEN)
    if max_seq_len > longest:
        why = f"the model was made for at most {longest} positions"
        if config.sliding_window == longest:
            why = f"layers of the model attend to a sliding window of {longest} positions, and an engine's layers to all of them"
        raise refuse("max_seq_len", max_seq_len, why, f"use at most {longest}")
    max_input_len = _whole(given, "max_input_len", min(DEFAULT_INPUT_LEN, max_seq_len), 1, max_seq_len)
    return BuildConfig(
        dtype=dtype,
        backends=backends,
        max_batch_size=_whole(given, "max_batch_size", 4, 1, MAX_BATCH),
        max_input_len=max_input_len,
        max_seq_len=max_seq_len,
        **_chunks(given, max_seq_len),
        plugin=_plugin(given, backends, dtype),
        stages=_stages(config, given, dtype, backends),
        compute_capabilities=_targets(config, given),
        optimization_level=_level(given),
    )


def _listed(value: object) -> tuple[Any, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,)


def _dtype(config: ModelConfig, asked: str, backends: tuple[str, ...]) -> str:
    if asked == "auto":
        # A CPU has no bfloat16 kernels; there, float32 is both faster and closer to the checkpoint.
        return config.dtype if any(config.dtype in BACKENDS[name].dtypes for name in backends) else "float32"
    if asked not in DTYPES:
        raise refuse("dtype", asked, "there is no such type", f"choose from auto, {', '.join(DTYPES)}")
    return asked


def _whole(given: Mapping[str, Any], name: str, default: int, low: int, high: int) -> int:
    value = given.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise refuse(name, value, f"it must be a whole number from {low} to {high}", f"use a number from {low} to {high}")
    return value


def _chunks(given: Mapping[str, Any], max_seq_len: int) -> dict[str, Any]:
    if not given.get("use_chunked_attention"):
        for name in CHUNKS:
            if name in given:
                raise refuse(name, given[name], "it means something only with chunked attention", "add --use_chunked_attention")
        return {}
    adaptive = given.get("chunk_size") == AUTO
    default = min(DEFAULT_CHUNK, max_seq_len)
    if adaptive:
        default = default // CHUNK_STEP * CHUNK_STEP
        chunk_size = largest = _whole(given, "max_chunk_size", default, CHUNK_STEP, max_seq_len)
    else:
        chunk_size = _whole(given, "chunk_size", default, 1, max_seq_len)
        largest = _whole(given, "max_chunk_size", chunk_size, chunk_size, max_seq_len)
    base_size = _nats(given, "base_size", MAX_BASE)
    threshold_low = _nats(given, "threshold_low", MAX_NATS)
    if adaptive and not base_size:
        why = "it needs --base_size, the tokens of chunk for each nat of a prompt's complexity"
        raise refuse("chunk_size", AUTO, why, "give --base_size, or the settings that thoughtx-calibrate --chunk_report writes")
    if base_size and largest % CHUNK_STEP:
        nearest = max(CHUNK_STEP, largest // CHUNK_STEP * CHUNK_STEP)
        raise refuse("max_chunk_size", largest, f"chosen chunks are multiples of {CHUNK_STEP}", f"use {nearest}")
    if threshold_low and not base_size:
        raise refuse("threshold_low", threshold_low, "complexity is measured only where chunks are chosen", "give --base_size as well")
    return {
        "use_chunked_attention": True,
        "chunk_size": chunk_size,
        "sink_tokens": _whole(given, "sink_tokens", min(DEFAULT_SINK, max_seq_len - 1), 0, max_seq_len - 1),
        "left_chunks": _whole(given, "left_chunks", DEFAULT_LEFT, 0, max_seq_len),
        "max_chunk_size": largest,
        "num_anchors": _whole(given, "num_anchors", 0, 0, max_seq_len),
        "adaptive_chunks": adaptive,
        "base_size": base_size,
        "threshold_low": threshold_low,
    }


def _plugin(given: Mapping[str, Any], backends: tuple[str, ...], dtype: str) -> str:
    form = given.get("plugin", "function")
    if form not in PLUGINS:
        raise refuse("plugin", form, "there is no such form", f"choose from {', '.join(PLUGINS)}")
    if "plugin" in given and not given.get("use_chunked_attention"):
        raise refuse("plugin", form, "it is a form of the chunked attention", "add --use_chunked_attention")
    if form == "function":
        return form
    if not any(BACKENDS[name].takes_plugins for name in backends):
        why = f"only tensorrt engines hold plugins, and this build is for {', '.join(backends)}; all others run the function"
        raise refuse("plugin", form, why, "add --backend tensorrt, or leave it out")
    if dtype == "float32":
        raise refuse("plugin", form, "the kernels compute in float16 and bfloat16", "give --dtype float16 or bfloat16")
    return form


def _nats(given: Mapping[str, Any], name: str, high: float) -> float:
    """A number above 0 that has to do with entropies; 0 when it is not given."""
    value = given.get(name, 0.0)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= high or (name in given and value == 0):
        raise refuse(name, value, f"it must be a number above 0 and at most {high:g}", f"use a number above 0 and at most {high:g}")
    return float(value)


def _stages(config: ModelConfig, given: Mapping[str, Any], dtype: str, backends: tuple[str, ...]) -> tuple[int, ...]:
    num_layers = config.num_layers
    if "early_exit_layers" in given:
        edges = _listed(given["early_exit_layers"])
        if "num_stages" in given:
            raise refuse("num_stages", given["num_stages"], "--early_exit_layers sets the stages already", "give one of the two")
        good = all(type(edge) is int and 0 < edge < num_layers for edge in edges) and list(edges) == sorted(set(edges))
        if not edges or not good:
            why = f"it must list layers between 1 and {num_layers - 1}, rising, none twice (the model has {num_layers} layers)"
            example = f"for example --early_exit_layers {max(1, num_layers // 2)}"
            raise refuse("early_exit_layers", ",".join(map(str, edges)), why, example)
        return edges
    if "num_stages" in given:
        count = _whole(given, "num_stages", 1, 1, num_layers)
    elif any(BACKENDS[name].builds_plans for name in backends):
        return _stages_by_size(config, dtype)
    else:
        count = 1
    return tuple(num_layers * k // count for k in range(1, count))


def _stages_by_size(config: ModelConfig, dtype: str) -> tuple[int, ...]:
    """Stages of at most STAGE_BYTES, a layer at the least; none when everything fits into one."""
    item = 4 if dtype == "float32" else 2
    layer, table = layer_parameters(config, whole=True) * item, config.vocab_size * config.hidden_size * item
    if layer * config.num_layers + table * (1 if config.tied else 2) <= STAGE_BYTES:
        return ()
    edges, held = [], table
    for index in range(config.num_layers):
        if held + layer > STAGE_BYTES and index:
            edges.append(index)
            held = 0
        held += layer
    return tuple(edges) or (config.num_layers // 2,) if config.num_layers > 1 else ()


def _check_cache(config: ModelConfig, backends: tuple[str, ...]) -> None:
    """E103 for a quantized KV cache that a backend cannot hold."""
    kv_algo = config.quantization.kv_algo if config.quantization is not None else None
    if kv_algo is None or all(kv_algo in BACKENDS[name].kv_algos for name in backends):
        return
    where = f"--backend {','.join(backends)}"
    if kv_algo == "INT8":
        why = "TensorRT's cache update takes float32, float16 and bfloat16 only"
        fix = "use --backend onnxruntime, or quantize without thoughtx-calibrate --kv_cache_dtype"
    else:
        why = "onnxruntime cannot slice FP8 tensors and TensorRT's cache update does not take them; trtllm-build 1.2 reads this checkpoint"
        fix = "for onnxruntime quantize with thoughtx-calibrate --kv_cache_dtype int8, or leave that flag out"
    raise ThoughtxError("E103", f"no engine of these backends has an {kv_algo} KV cache", where=where, why=why, fix=fix)


def _targets(config: ModelConfig, given: Mapping[str, Any]) -> tuple[str, ...]:
    """GPU generations, less those without products of the format."""
    asked = tuple(_listed(given.get("compute_capabilities")))
    number = FORMATS[config.quantization.algo].number if config.quantization and config.quantization.algo else None
    first = number.first_capability if number else (0, 0)
    old = [name for name in asked or BuildConfig().compute_capabilities if tuple(map(int, name.split("."))) < first]
    if asked and old and number:
        why = f"GPUs of that generation have no {number.name} products"
        raise refuse("compute_capabilities", ",".join(old), why, f"use {first[0]}.{first[1]} or later, or an int8 format")
    return tuple(name for name in asked or BuildConfig().compute_capabilities if name not in old)


def _level(given: Mapping[str, Any]) -> int | None:
    return _whole(given, "optimization_level", 3, 0, 5) if "optimization_level" in given else None


def speed_notes(config: ModelConfig, settings: BuildConfig) -> list[str]:
    """Where an engine is known to be no faster than float32 on a CPU, and what to build instead (`bench/quantized.py` measures it)."""
    quant = config.quantization
    if quant is None or quant.algo is None or "onnxruntime" not in settings.backends:
        return []
    if settings.dtype != "float32":
        why = f"onnxruntime widens quantized weights of a {settings.dtype} engine in every step on a CPU"
        return [f"slower than float32: {why}; for CPUs build with --backend onnxruntime --dtype float32"]
    number = FORMATS[quant.algo].number
    if number.is_float:
        why = f"no CPU computes with {number.name}; onnxruntime widens the weights to float32 when it loads them, 4 bytes a weight"
        return [
            f"slower than float32 on a CPU at prefill, and no faster at decode: {why}; for CPUs quantize to int8_wo, int8_sq or int4_awq"
        ]
    if number == INT4 and quant.group_size % 16:
        why = f"onnxruntime has no product for groups of {quant.group_size}, and widens the weights to float32 when it loads them"
        return [f"not faster than float32 on a CPU: {why}; thoughtx-calibrate --group_size 16, or a multiple, is"]
    return []
