"""The options of `thoughtx-build`, a row each: what it takes, its help, and the field of `BuildConfig` that follows from it.

The command's flags, `resolve`, and the check of an engine's settings (`misfits`) go by this table: a new option is a row here and a field
in `config.BuildConfig`. Defaults depend on the model; combinations that cannot be built are refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from trtllm_thoughtx.backends import BACKENDS
from trtllm_thoughtx.build.flags import CHUNK_SIZE, COUNT, LAYERS, MAX_LEN, NATS, PATH, POSITIVE, CommaList, Count, FiniteFloat, OneOf
from trtllm_thoughtx.config import AUTO, CHUNK_STEP, DTYPES, PLUGINS, BuildConfig, ModelConfig, QuantConfig
from trtllm_thoughtx.errors import ThoughtxError, shown
from trtllm_thoughtx.families.formats import FORMATS, FP8, INT4
from trtllm_thoughtx.families.size import layer_parameters

STAGE_BYTES = 2100 << 20  # a TensorRT build is cut into stages of at most so many bytes of weights, unless asked otherwise
TARGET_NAMES = (*BACKENDS, "tensorrt-llm")  # the last is built by `build.trtllm`, into a directory of another kind
NAMES = CommaList(
    "LIST", "|".join(TARGET_NAMES).replace("-", "[-_]"), lambda name: name.replace("_", "-"), f"one of {', '.join(TARGET_NAMES)}"
)
TARGETS = CommaList("LIST", r"\d{1,2}\.\d", str, "a compute capability such as 8.9")
BLANK = BuildConfig()
_HELP_OF_TARGETS = f"GPU generations (compute capabilities) of a tensorrt-rtx plan.  [default: {','.join(BLANK.compute_capabilities)}]"


def refuse(flag: str, value: object, why: str, fix: str) -> ThoughtxError:
    return ThoughtxError("E001", f"--{flag} {shown(value)} cannot be used", where=f"--{flag}", why=why, fix=fix)


class Given:
    """What the user set (None counts as not set); `given[field]` is a field of `BuildConfig`, settled when it is first asked for."""

    def __init__(self, config: ModelConfig, options: Mapping[str, Any]) -> None:
        self.config, self.options = config, {name: value for name, value in options.items() if value is not None}
        assert set(self.options) <= set(OPTIONS), set(self.options) - set(OPTIONS)
        self.is_adaptive = self.options.get("chunk_size") == AUTO
        self._settled: dict[str, Any] = {}

    def __getitem__(self, field: str) -> Any:
        if field not in self._settled:
            row = FIELDS[field]
            if row.is_of_chunks and not self["use_chunked_attention"]:
                if row.name in self.options:
                    why = "it means something only with chunked attention"
                    raise refuse(row.name, self.options[row.name], why, "add --use_chunked_attention")
                self._settled[field] = getattr(BLANK, field)
            else:
                self._settled[field] = row.settle(self) if row.settle else self.value(row.name)
        return self._settled[field]

    def value(self, name: str) -> Any:
        """What was given for an option, or its default; E001 for what it does not take."""
        row = OPTIONS[name]
        default, *bounds = row.bounds(self) if row.bounds else (getattr(BLANK, row.field, None),)
        value: Any = self.options.get(name, default)
        takes = Count(*bounds) if bounds else row.takes
        if takes is not None and value is not default and not takes.admits(value):
            raise refuse(name, value, f"it must be {takes.wanted}", f"use {takes.wanted}")
        return float(value) if isinstance(takes, FiniteFloat) else value


def _listed(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,)


def _backends(given: Given) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(_listed(given.options.get("backend", BLANK.backends))))
    for name in names:
        if name in TARGET_NAMES and name not in BACKENDS:
            raise refuse("backend", ",".join(names), f"{name} makes a directory of its own kind", f"build with --backend {name} alone")
        if name not in BACKENDS:
            raise refuse("backend", name, "there is no such backend", f"choose from {', '.join(BACKENDS)}")
    _check_cache(given.config, names)
    return names


def _dtype(given: Given) -> str:
    dtype = given.config.dtype
    if given.options.get("dtype", AUTO) != AUTO:
        return str(given.value("dtype"))
    # A CPU has no bfloat16 kernels; there, float32 is both faster and closer to the checkpoint.
    return dtype if any(dtype in BACKENDS[name].dtypes for name in given["backends"]) else "float32"


def _kv_cache_dtype(given: Given) -> str:
    dtype = str(given.value("kv_cache_dtype"))
    if dtype == AUTO:
        return dtype
    if given["dtype"] != "float32":
        raise refuse("kv_cache_dtype", dtype, f"the engine computes in {given['dtype']}, and so is its cache", "leave it out")
    if any(BACKENDS[name].builds_plans for name in given["backends"]):
        why = "the cache of a plan has the type that the plan computes in"
        raise refuse("kv_cache_dtype", dtype, why, "add --backend onnxruntime, or give --dtype float16 for plans")
    if given.config.quantization is not None and given.config.quantization.kv_algo is not None:
        why = f"the checkpoint holds scales of an {given.config.quantization.kv_algo} cache, which is smaller"
        raise refuse("kv_cache_dtype", dtype, why, "leave it out")
    return dtype


def _max_seq_len(given: Given) -> int:
    length, longest = int(given.value("max_seq_len")), given.config.longest
    if length > longest:
        why = f"the model was made for at most {longest} positions"
        if given.config.sliding_window == longest:
            why = f"layers of the model attend to a sliding window of {longest} positions, and an engine's layers to all of them"
        raise refuse("max_seq_len", length, why, f"use at most {longest}")
    return length


def _chunk_size(given: Given) -> int:
    if not given.is_adaptive:
        return int(given.value("chunk_size"))
    if not given["base_size"]:
        why = "it needs --base_size, the tokens of chunk for each nat of prompt entropy"
        raise refuse("chunk_size", AUTO, why, "give --base_size, or the settings that thoughtx-calibrate --chunk_report writes")
    return int(given["max_chunk_size"])


def _chunk_bounds(given: Given) -> tuple[int, int, int]:
    """Of the largest chunk."""
    most = given["max_seq_len"]
    if given.is_adaptive:
        return min(512, most) // CHUNK_STEP * CHUNK_STEP, CHUNK_STEP, most
    return given["chunk_size"], given["chunk_size"], most


def _max_chunk_size(given: Given) -> int:
    largest = int(given.value("max_chunk_size"))
    if given["base_size"] and largest % CHUNK_STEP:
        nearest = max(CHUNK_STEP, largest // CHUNK_STEP * CHUNK_STEP)
        raise refuse("max_chunk_size", largest, f"chosen chunks are multiples of {CHUNK_STEP}", f"use {nearest}")
    return largest


def _threshold_low(given: Given) -> float:
    threshold = float(given.value("threshold_low"))
    if threshold and not given["base_size"]:
        raise refuse("threshold_low", threshold, "prompt entropy is measured only where chunks are chosen", "give --base_size as well")
    return threshold


def _plugin(given: Given) -> str:
    form = str(given.value("plugin"))
    if form == "function":
        return form
    if not any(BACKENDS[name].takes_plugins for name in given["backends"]):
        why = f"only tensorrt engines hold plugins, and this build is for {', '.join(given['backends'])}; all others run the function"
        raise refuse("plugin", form, why, "add --backend tensorrt, or leave it out")
    if given["dtype"] == "float32":
        raise refuse("plugin", form, "the kernels compute in float16 and bfloat16", "give --dtype float16 or bfloat16")
    return form


def _stages(given: Given) -> tuple[int, ...]:
    num_layers, asked = given.config.num_layers, given.options
    if "early_exit_layers" in asked:
        edges = _listed(asked["early_exit_layers"])
        if "num_stages" in asked:
            raise refuse("num_stages", asked["num_stages"], "--early_exit_layers sets the stages already", "give one of the two")
        good = all(type(edge) is int and 0 < edge < num_layers for edge in edges) and list(edges) == sorted(set(edges))
        if not edges or not good:
            why = f"it must list layers between 1 and {num_layers - 1}, rising, none twice (the model has {num_layers} layers)"
            example = f"for example --early_exit_layers {max(1, num_layers // 2)}"
            raise refuse("early_exit_layers", ",".join(map(str, edges)), why, example)
        return edges
    if "num_stages" not in asked and any(BACKENDS[name].builds_plans for name in given["backends"]):
        return _stages_by_size(given.config, given["dtype"])
    count = int(given.value("num_stages"))
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


def _targets(given: Given) -> tuple[str, ...]:
    """GPU generations, less those without products of the format."""
    quant = given.config.quantization
    names = _listed(given.options.get("compute_capabilities", BLANK.compute_capabilities))
    number = FORMATS[quant.algo].number if quant and quant.algo else None
    first = number.first_capability if number else (0, 0)
    old = [name for name in names if tuple(map(int, name.split("."))) < first]
    if "compute_capabilities" in given.options and old and number:
        why = f"GPUs of that generation have no {number.name} products"
        raise refuse("compute_capabilities", ",".join(old), why, f"use {first[0]}.{first[1]} or later, or an int8 format")
    return tuple(name for name in names if name not in old)


def _max_lora_rank(given: Given) -> int:
    rank = int(given.value("max_lora_rank"))
    if rank and any(BACKENDS[name].builds_plans for name in given["backends"]):
        why = "plans with such inputs are not run yet"
        raise refuse("max_lora_rank", rank, why, "add --backend onnxruntime, or merge the adapter: --lora_dir")
    if rank and given.config.experts is not None:
        why = "products beside experts are not implemented"
        raise refuse("max_lora_rank", rank, why, "merge the adapter: --lora_dir")
    return rank


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


@dataclass(frozen=True)
class Option:
    """A flag that `takes` a value (None: a bare flag) and sets `field` of `BuildConfig`, that of its name where `target` is None, none
    where it is "". The field is what `settle` makes of all that was given, else the value or the field's default; `bounds` gives the
    default, the least and the most where these depend on the model or on other options. `is_of_chunks`: needs chunked attention."""

    name: str
    takes: Any
    help: str
    settle: Callable[[Given], Any] | None = None
    bounds: Callable[[Given], tuple[int, int, int]] | None = None
    target: str | None = None
    is_of_chunks: bool = False
    is_repeated: bool = False  # the flag itself may be given several times

    @property
    def field(self) -> str:
        return self.name if self.target is None else self.target


_chunk = partial(Option, is_of_chunks=True)
_HELP_OF_BACKEND = f"What to build for: {', '.join(TARGET_NAMES)}.  [default: {','.join(BLANK.backends)}]"
_HELP_OF_CACHE = "Type of the KV cache; float16 halves that of a float32 onnxruntime engine.  [default: auto, that of --dtype]"
_HELP_OF_INPUT = "Most prompt tokens in one call; longer prompts are prefilled in segments."
_HELP_OF_CHUNK = "Default tokens per chunk; auto: chosen per request from prompt entropy, see --base_size."
_HELP_OF_LARGEST = "Largest chunk a request may use; sizes the KV cache.  [default: --chunk_size]"
_HELP_OF_SINKS = "Attention sinks: first tokens of the prompt that stay visible."
_HELP_OF_SINGLE = "Prompts with entropy below this many nats are answered in a single step."

_ROWS = (  # in the order of the command's help
    Option("backend", NAMES, _HELP_OF_BACKEND, _backends, target="backends", is_repeated=True),
    Option("dtype", OneOf((AUTO, *DTYPES)), "Compute type of the engine.  [default: auto, the checkpoint's]", _dtype),
    Option("kv_cache_dtype", OneOf((AUTO, "float16")), _HELP_OF_CACHE, _kv_cache_dtype),
    Option("max_batch_size", POSITIVE, "Maximum batch size.", bounds=lambda given: (4, 1, 4096)),
    Option("max_input_len", POSITIVE, _HELP_OF_INPUT, bounds=lambda given: (min(512, given["max_seq_len"]), 1, given["max_seq_len"])),
    Option(
        "max_seq_len",
        POSITIVE,
        "Maximum tokens of prompt and answer together.",
        _max_seq_len,
        lambda given: (min(2048, given.config.longest), 2, MAX_LEN),
    ),
    Option("use_chunked_attention", None, "Attend to the current chunk, sinks and --left_chunks only."),
    _chunk(
        "chunk_size",
        CHUNK_SIZE,
        _HELP_OF_CHUNK,
        _chunk_size,
        lambda given: (min(512, given["max_seq_len"]), 1, given["max_seq_len"]),
    ),
    _chunk("sink_tokens", COUNT, _HELP_OF_SINKS, bounds=lambda given: (min(4, given["max_seq_len"] - 1), 0, given["max_seq_len"] - 1)),
    _chunk(
        "left_chunks", COUNT, "Whole chunks before the current one that stay visible.", bounds=lambda given: (1, 0, given["max_seq_len"])
    ),
    _chunk("max_chunk_size", POSITIVE, _HELP_OF_LARGEST, _max_chunk_size, _chunk_bounds),
    _chunk(
        "num_anchors", COUNT, "Number of older chunks whose last token stays visible.", bounds=lambda given: (0, 0, given["max_seq_len"])
    ),
    _chunk("base_size", FiniteFloat(0, 1e6, min_open=True), "Tokens of chunk size per nat of prompt entropy."),
    _chunk("threshold_low", NATS, _HELP_OF_SINGLE, _threshold_low),
    _chunk("plugin", OneOf(PLUGINS), "Chunked-attention implementation in a tensorrt engine.  [default: function]", _plugin),
    Option("plugin_library", PATH, "Shared library for --plugin cpp, built by `make plugin`.", target=""),
    Option("early_exit_layers", LAYERS, "Cut the layers into stages before these layers, e.g. 8,16.", _stages, target="stages"),
    Option(
        "num_stages",
        POSITIVE,
        "Cut the layers into this many stages of equal size.",
        bounds=lambda given: (1, 1, given.config.num_layers),
        target="",
    ),
    Option("compute_capabilities", TARGETS, _HELP_OF_TARGETS, _targets),
    Option(
        "max_lora_rank", Count(0, 1024), "Keep LoRA adapters of up to this rank as inputs, chosen per request; 0: none.", _max_lora_rank
    ),
    Option("optimization_level", Count(0, 5), "TensorRT builder optimization level."),
)
OPTIONS = {row.name: row for row in _ROWS}
FIELDS = {row.field: row for row in _ROWS if row.field}


def resolve(config: ModelConfig, options: Mapping[str, Any]) -> BuildConfig:
    """What the user set -> a complete, checked `BuildConfig`."""
    given = Given(config, options)
    return BuildConfig(**{field: given[field] for field in FIELDS}, adaptive_chunks=given.is_adaptive)


def misfits(build: BuildConfig) -> list[str]:
    """Settings of an engine's config.json that no option could have given."""
    values = {field: getattr(build, field) for field, row in FIELDS.items() if row.takes is not None}
    return [field for field, value in values.items() if value != getattr(BLANK, field) and not FIELDS[field].takes.admits(value)]


def speed_notes(config: ModelConfig, settings: BuildConfig) -> list[str]:
    """Where an engine is known to be no faster than float32 on a CPU (`bench/quantized.py` measures it), or a plan no smaller than one of
    16-bit weights, and what to build instead."""
    quant = config.quantization
    if quant is None or quant.algo is None:
        return []
    found = []
    form = FORMATS[quant.algo]
    if form.scales == "group" and form.number.bits == 8 and any(BACKENDS[backend].builds_plans for backend in settings.backends):
        name, fix = form.number.name, "thoughtx-calibrate --group_size 0" if form.of_rows else "quantize the original checkpoint to fp8"
        why = f"TensorRT-RTX 1.7 widens {name} in blocks when it builds, and keeps {name} with a scale a row"
        found = [f"the plan holds 16-bit weights: {why}; for plans: {fix}"]
    return found if "onnxruntime" not in settings.backends else [*found, *_notes_of_cpu(quant, settings)]


def _notes_of_cpu(quant: QuantConfig, settings: BuildConfig) -> list[str]:
    if settings.dtype != "float32":
        why = f"onnxruntime widens quantized weights of a {settings.dtype} engine in every step on a CPU"
        return [f"slower than float32: {why}; for CPUs build with --backend onnxruntime --dtype float32"]
    number = FORMATS[quant.algo or ""].number
    if number == FP8:
        why = f"no CPU computes with {number.name}; onnxruntime widens the weights to float32 when it loads them, 4 bytes a weight"
        return [
            f"slower than float32 on a CPU at prefill, and no faster at decode: {why}; for CPUs quantize to int8_wo, int8_sq or int4_awq"
        ]
    if number == INT4 and quant.group_size % 16:
        why = f"onnxruntime has no product for groups of {quant.group_size}, and widens the weights to float32 when it loads them"
        return [f"not faster than float32 on a CPU: {why}; thoughtx-calibrate --group_size 16, or a multiple, is"]
    return []
