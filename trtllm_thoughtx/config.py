"""The typed objects that everything else is built from: `ModelConfig` with its `RopeConfig`, `QuantConfig` and
`ExpertsConfig`, and `BuildConfig`.

A Hugging Face or TensorRT-LLM config.json is read once, at the door (`families` and `checkpoint`), into a frozen
`ModelConfig`; nothing later sees a dict or guesses a default. `BuildConfig` is what `thoughtx-build` was asked for, after
flags and YAML are merged; it is what the engine's config.json and manifest record.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from dataclasses import dataclass
from typing import Any

DTYPES = ("float32", "float16", "bfloat16")
PLUGINS = ("function", "aot", "cpp")
PLUGIN_LIBRARY = "libthoughtx_chunked_attention.so"  # in an engine directory whose plans need it
AUTO = "auto"  # the chunk size of a request for which the engine chooses one
EXIT_POLICIES = ("off", "verify", "trust", "auto")  # what becomes of drafted tokens
CHUNK_STEP = 16  # chosen chunk sizes are multiples of it


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary embedding. `kind` is none | linear | yarn | llama3; unused fields keep their defaults.

    Sources: linear (kaiokendev's position interpolation), YaRN (arXiv 2309.00071), llama3 (Llama 3.1 model card);
    field meanings follow transformers' `modeling_rope_utils`.
    """

    theta: float
    kind: str = "none"
    factor: float = 1.0
    original_max_position: int = 0  # yarn, llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn; None: 0.1 * ln(factor) + 1
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """How the linear layers of a checkpoint are stored: fields of TensorRT-LLM's `quantization` section.

    `exclude` holds names of modules, such as `lm_head` or `transformer.layers.3.mlp.proj`; `*` and `?` are wildcards.
    """

    algo: str | None  # a key of `families.formats.FORMATS`; None: the cache alone is quantized
    kv_algo: str | None = None  # FP8 | INT8
    group_size: int = 128  # input channels that share a scale, in formats with groups
    scale_dtype: str = "float32"  # that scales are stored in: float32 | float16
    prequant: bool = False  # inputs are multiplied by a factor per channel
    zero_point: bool = False  # 4-bit groups have a zero of their own
    input_order: bool = False  # inputs are put in the order of their 4-bit groups first (GPTQ's activation order)
    embedding: bool = False  # the embedding, and a head that the format does not cover, are stored in 8 bits
    embedding_group: int = 0  # channels of it that share a scale; 0: a row does
    wide: tuple[str, ...] = ()  # modules that a 4-bit format stores in 8 bits, in groups of the same size
    exclude: tuple[str, ...] = ("lm_head",)

    def covers(self, module: str) -> bool:
        """True when the weight of this linear layer is stored quantized."""
        return self.algo is not None and not any(fnmatch.fnmatchcase(module, pattern) for pattern in self.exclude)

    def widens(self, module: str) -> bool:
        """True when it is stored in 8 bits beside 4-bit ones."""
        return self.covers(module) and any(fnmatch.fnmatchcase(module, pattern) for pattern in self.wide)


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """A mixture of experts in place of every layer's MLP."""

    num_experts: int
    num_active: int  # experts that a token is sent to
    intermediate_size: int  # of one expert
    shared_size: int = 0  # intermediate size of the expert that sees every token; 0 without one
    is_normalized: bool = False  # the routing weights of a token's experts sum to 1


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One decoder, whatever its family. Sizes are element counts."""

    family: str  # qwen2 | qwen3 | llama | qwen2_moe | qwen3_moe
    architecture: str  # Hugging Face class name, e.g. Qwen2ForCausalLM
    dtype: str  # of the weights: float32 | float16 | bfloat16
    vocab_size: int
    hidden_size: int
    intermediate_size: int  # of a dense MLP; unused where there are experts
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope: RopeConfig
    max_position: int  # max_position_embeddings as the checkpoint states it
    tied: bool  # lm_head shares the embedding
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool
    quantization: QuantConfig | None = None
    experts: ExpertsConfig | None = None
    sliding_window: int | None = None  # positions that some layers attend to; None: every layer attends to all

    @property
    def longest(self) -> int:
        """Most positions of a sequence: those that the model was made for, and no more than a sliding window shows all of."""
        made_for = int(self.max_position * (self.rope.factor if self.rope.kind in ("linear", "yarn") else 1))
        return min(made_for, self.sliding_window or made_for)

    @property
    def mlp_width(self) -> int:
        """Intermediate size that one token goes through: of the dense MLP, or of its experts together."""
        experts = self.experts
        return self.intermediate_size if experts is None else experts.num_active * experts.intermediate_size + experts.shared_size

    @property
    def has_shared_expert(self) -> bool:
        return self.experts is not None and self.experts.shared_size > 0

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def has_head(self) -> bool:
        """The checkpoint holds `lm_head.weight`: the model is not tied, or its head is quantized and the embedding is not."""
        quant = self.quantization
        return not self.tied or (quant is not None and not quant.embedding and quant.covers("lm_head"))

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Bytes of K and V of all layers for one position, in a cache of `dtype` unless it is quantized."""
        is_small = self.quantization is not None and self.quantization.kv_algo is not None
        return 2 * self.num_layers * self.kv_size * (1 if is_small else 4 if dtype == "float32" else 2)


def since(schema: int, default: Any) -> Any:
    """A field of `BuildConfig` that engine directories have from `schema` on. Older engines have `default`, so it never changes."""
    return dataclasses.field(default=default, metadata={"schema": schema})


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """What to build. Lengths are tokens; `stages` holds the first layer of each stage after the first.

    New fields are declared as `name: type = since(engine_dir.SCHEMA, default)`, so that older engine directories stay readable.
    """

    dtype: str = "float32"
    backends: tuple[str, ...] = ("tensorrt-rtx", "onnxruntime")
    max_batch_size: int = 4
    max_input_len: int = 512  # longest segment of a prompt that one prefill call takes
    max_seq_len: int = 2048  # positions: prompt and answer
    use_chunked_attention: bool = False
    chunk_size: int = 0  # default chunk of the engine, a run-time input; 0 without chunked attention
    sink_tokens: int = 0
    left_chunks: int = 0
    max_chunk_size: int = 0  # largest chunk that a request may ask for: it sizes the KV cache
    num_anchors: int = 0  # older chunks whose last token stays visible
    adaptive_chunks: bool = False  # a request that names no chunk size gets one from its prompt entropy
    base_size: float = 0.0  # tokens of chunk per nat of prompt entropy; 0: the engine cannot choose
    threshold_low: float = 0.0  # nats; a prompt below it is answered in a single step
    plugin: str = "function"  # form of the chunked attention in a tensorrt engine
    stages: tuple[int, ...] = ()
    exit_head: bool = False  # the checkpoint carries one, and so does the engine
    exit_threshold: float = 0.0  # readiness from which its calibration ends the thinking; 0 without a head
    draft_layers: tuple[int, ...] = ()  # stages that draft tokens: each ends before one of these layers
    draft_ranks: tuple[int, ...] = ()  # of their maps
    draft_thresholds: tuple[float, ...] = ()  # confidence from which a draft of each is worth verifying
    compute_capabilities: tuple[str, ...] = ("8.6", "8.9", "12.0")
    optimization_level: int | None = None
    kv_cache_dtype: str = since(2, AUTO)  # "float16": of a float32 engine, whose cache takes half of the bytes then

    max_lora_rank: int = since(2, 0)  # of adapters that rows bring; 0: none can

    @property
    def cache_dtype(self) -> str:
        """Of the KV cache, unless the checkpoint has a quantized one."""
        return self.dtype if self.kv_cache_dtype == AUTO else self.kv_cache_dtype

    @property
    def num_kept(self) -> int:
        """Slots of tokens that outlive their chunk: sinks, and anchors (those that are visible, and those that wait for it)."""
        return self.sink_tokens + (self.num_anchors + self.left_chunks + 1 if self.num_anchors else 0)

    @property
    def kv_capacity(self) -> int:
        """Slots of the KV cache for one sequence: the window of chunked attention, or every position where that is fewer."""
        if not self.use_chunked_attention:
            return self.max_seq_len
        return min(self.max_seq_len, self.num_kept + (self.left_chunks + 1) * max(self.max_chunk_size, self.chunk_size))

    @property
    def max_segment(self) -> int:
        """Most tokens of a row that one call takes: a bounded cache is written within one chunk."""
        return min(self.max_input_len, max(self.max_chunk_size, self.chunk_size)) if self.is_bounded else self.max_input_len

    @property
    def is_bounded(self) -> bool:
        """Slots are used again; else every position has its own."""
        return self.kv_capacity < self.max_seq_len

    def as_dict(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}


@dataclass(frozen=True)
class PlanFile:
    """A TensorRT plan of one part, and the hashes of what it was built from."""

    file: str
    sha256: str | None
    graph_sha256: str | None
    weights_sha256: str | None  # None without `PartFiles.data`
    compute_capabilities: tuple[str, ...]


@dataclass(frozen=True)
class PartFiles:
    """One part of an engine on disk: layers first_layer .. last_layer - 1, its graph, weights and plans."""

    name: str
    first_layer: int
    last_layer: int
    embeds: bool
    head: bool
    onnx: str
    data: str | None  # None: no backend of the engine runs the graph itself
    graph_sha256: str
    weights_sha256: str | None
    plans: dict[str, PlanFile]  # by backend

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
