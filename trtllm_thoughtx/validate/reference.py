"""The reference: transformers, loaded from local safetensors, with a mask and a precision of our choosing.

`Reference` runs one prompt through a Hugging Face model and returns logits and every layer's hidden state; `validate`
compares engines with it. This is the only file that imports torch or transformers, so importing it without them is E201.

Three things differ from a plain `from_pretrained(...)(ids)`:
- The attention mask is always passed as an explicit 4-D additive mask made by `visible`, the definition of chunked
  attention; eager attention adds it to the scores as it is.
- Hidden states come from hooks on the decoder layers, because transformers applies the final norm to the last entry of
  its own `output_hidden_states`.
- In float64 the run is float64 everywhere. transformers asks for float32 by name inside RMSNorm, rotary embedding and
  softmax, whatever the model's dtype; `_Widened` rewrites those requests to float64 while they run, so its own code is
  executed, only wider. Weights of any dtype are widened exactly, which makes this the truth for float32 engines.

The price is a slow, memory-hungry run: it is a measure, not a server.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trtllm_thoughtx.checkpoint.adapter import Adapter
from trtllm_thoughtx.checkpoint.directory import HUGGING_FACE
from trtllm_thoughtx.checkpoint.opened import Checkpoint
from trtllm_thoughtx.checkpoint.tensor_check import STORED_DTYPES
from trtllm_thoughtx.checkpoint.weights import open_weights
from trtllm_thoughtx.errors import ThoughtxError, shown
from trtllm_thoughtx.graph.chunked_attention import visible
from trtllm_thoughtx.process.machine import available_bytes
from trtllm_thoughtx.process.outside import own_caches
from trtllm_thoughtx.validate.golden import ChunkSpec

own_caches()
try:
    import torch
    import transformers
    from torch.overrides import TorchFunctionMode
except ImportError as error:
    raise ThoughtxError(
        "E201",
        "PyTorch models need torch and transformers",
        where=f"import of {shown(error.name or 'torch')}",
        why="they are not installed here",
        fix='pip install "trtllm-thoughtx[reference]"; engines are checked without them too: thoughtx-validate --golden FILE',
    ) from error

DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SPARE_BYTES = 1 << 30  # activations, logits and torch itself, beside the weights


class _Widened(TorchFunctionMode):
    """While active, every explicit request for float32 becomes one for float64."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*args, **kwargs)


class Reference:
    """A transformers model in one precision. `dtype` is a key of `DTYPES`; `run` is the whole interface."""

    def __init__(self, path: Path | Checkpoint, dtype: str, *, rounds: bool = True) -> None:
        """`rounds`: a merged weight has the type of the stored one; else that of the run."""
        self.path, self.dtype = path, dtype
        self._precision: Callable[[], AbstractContextManager] = _Widened if dtype == "float64" else nullcontext
        self._model = load_model(
            path, DTYPES[dtype], experts="eager", rounds=rounds
        )  # a loop over experts: grouped products know no float64
        if dtype == "float64":
            body = self._model.model
            with self._precision():  # the frequencies too are made in float32 by name
                body.rotary_emb = type(body.rotary_emb)(config=self._model.config)

    @property
    def num_layers(self) -> int:
        return len(self._model.model.layers)

    def run(
        self, ids: Sequence[int], *, chunk: ChunkSpec | None = None, layers: bool = False, rows: Sequence[int] | None = None
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """Logits [rows, vocab], and with `layers` the hidden states [rows, hidden] of the embedding and of each layer.

        `rows` are the positions to return, all of them by default. float64 from a float64 model, float32 otherwise.
        """
        at = torch.arange(len(ids)) if rows is None else torch.tensor(list(rows), dtype=torch.int64)
        hidden: list[np.ndarray] = []

        def keep(_module: Any, _inputs: Any, output: Any) -> None:
            state = output[0] if isinstance(output, tuple) else output
            hidden.append(_numpy(state[0, at]))

        body = self._model.model
        hooks = [module.register_forward_hook(keep) for module in [body.embed_tokens, *body.layers]] if layers else []
        try:
            with torch.inference_mode(), self._precision():
                output = self._model(
                    input_ids=torch.tensor([list(ids)], dtype=torch.int64),
                    attention_mask=additive_mask(len(ids), chunk, DTYPES[self.dtype]),
                    logits_to_keep=at,
                    use_cache=False,
                )
        finally:
            for hook in hooks:
                hook.remove()
        return _numpy(output.logits[0]), hidden

    def attention(self, ids: Sequence[int], visit: Callable[[int, np.ndarray], None]) -> None:
        """Run with full attention and hand each layer's softmax, float [heads, length, length], to `visit(layer, weights)`."""

        def hook(layer: int) -> Callable[..., None]:
            def look(_module: Any, _inputs: Any, output: Any) -> None:
                visit(layer, _numpy(output[1][0]))

            return look

        hooks = [block.self_attn.register_forward_hook(hook(i)) for i, block in enumerate(self._model.model.layers)]
        try:
            with torch.inference_mode(), self._precision():
                mask = additive_mask(len(ids), None, DTYPES[self.dtype])
                self._model.model(input_ids=torch.tensor([list(ids)]), attention_mask=mask, use_cache=False)
        finally:
            for one in hooks:
                one.remove()

    def close(self) -> None:
        """Give the weights back before the next model is loaded."""
        self._model = None


def version(path: Path | Checkpoint | None = None) -> str:
    """What runs the model at `path`."""
    own = f"transformers {transformers.__version__}"
    if not isinstance(path, Checkpoint) or path.adapter is None:
        return own
    from trtllm_thoughtx.validate.merging import peft

    return f"{own}, adapter merged by peft {peft().__version__}"


def additive_mask(length: int, chunk: ChunkSpec | None, dtype: torch.dtype) -> torch.Tensor:
    """[1, 1, length, length]: 0 where query p sees key j, the dtype's lowest number elsewhere; no chunk is full causal."""
    at = np.arange(length)
    mask = visible(at, at, None) if chunk is None else visible(at, at, np.array(chunk.chunk_size), chunk.sink, chunk.left, chunk.anchors)
    seen = torch.from_numpy(mask)
    return torch.zeros(length, length, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)[None, None]


@dataclass(frozen=True)
class Timed:
    prefill_seconds: float
    decode_tokens_per_second: float
    num_threads: int


def time_decode(path: Path, *, prompt_len: int, new_tokens: int, batch: int, dtype: str, num_threads: int | None) -> Timed:
    """Time transformers' own eager loop: one prefill, then `new_tokens - 1` greedy steps through its KV cache.

    The first token comes out of the prefill. Token ids are arbitrary; equal work is what is wanted. Restores torch's threads.
    """
    before = torch.get_num_threads()
    model = load_model(path, DTYPES[dtype])
    vocab = model.config.vocab_size
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, vocab, (batch, prompt_len)))
    try:
        torch.set_num_threads(num_threads or before)
        with torch.inference_mode():
            model(input_ids=ids[:, :1], use_cache=True)  # first-call costs are not the loop's
            start = time.perf_counter()
            out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            prefilled = time.perf_counter()
            for _ in range(new_tokens - 1):
                out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
                token = out.logits[:, -1].argmax(-1, keepdim=True)
            decode = time.perf_counter() - prefilled
        return Timed(prefilled - start, batch * (new_tokens - 1) / decode, torch.get_num_threads())
    finally:
        torch.set_num_threads(before)


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().to(torch.float64 if tensor.dtype == torch.float64 else torch.float32).numpy(force=True)


def load_model(
    path: Path | Checkpoint, dtype: torch.dtype, attention: str = "eager", experts: str | None = None, rounds: bool = True
) -> Any:
    """A model in evaluation mode, from local safetensors only, never running the checkpoint's code. `attention` and `experts` name
    transformers' implementations; None is its own choice. The adapter of a `Checkpoint` is merged, by peft."""
    stored, adapter = _checked(path)
    stored = stored if rounds else dtype
    path = Path(path)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # `dtype` was called `torch_dtype` before transformers 4.56
    word = "dtype" if tuple(int(n) for n in transformers.__version__.split(".")[:2]) >= (4, 56) else "torch_dtype"
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = transformers.AutoConfig.from_pretrained(str(path), **local)
        if experts is not None and hasattr(config, "_experts_implementation"):
            config._experts_implementation = experts
        _check_memory(path, config, dtype)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            str(path), config=config, use_safetensors=True, attn_implementation=attention, **{word: stored or dtype}, **local
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ThoughtxError(
            "E101",
            "transformers cannot load the model",
            where=shown(str(path)),
            why=shown(f"{type(error).__name__}: {error}", 400),
            fix="install a transformers version that knows its model_type, or download the model again",
        ) from error
    if adapter is not None:
        from trtllm_thoughtx.validate.merging import merged

        with adapter.stored:
            model = merged(model, adapter).to(dtype)
    return model.eval()


def _checked(path: Path | Checkpoint) -> tuple[torch.dtype | None, Adapter | None]:
    """Our own strict reading of the directory comes first; transformers and peft only see what passed it. With an adapter, the type in
    which the weights are stored: a merged one is rounded to that."""
    with open_weights(Checkpoint.open(path, HUGGING_FACE), allow_nonfinite=True) as source:
        if source.adapter is None:
            return None, None
        kinds = {info.dtype for info in source.checkpoint.tensors()}
        wide = torch.float64 if "F64" in kinds else torch.float32
        return (DTYPES[STORED_DTYPES[kinds.pop()]] if len(kinds) == 1 and "F64" not in kinds else wide), source.adapter


def _check_memory(path: Path, config: Any, dtype: torch.dtype) -> None:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    need = sum(p.numel() for p in model.parameters()) * dtype.itemsize + SPARE_BYTES
    free = available_bytes()
    if free is not None and need > free:
        raise ThoughtxError(
            "E204",
            "the model does not fit in memory",
            where=shown(str(path)),
            why=f"{str(dtype).removeprefix('torch.')} needs about {need >> 20} MiB and {free >> 20} MiB are free",
            fix="use a machine with more memory; for thoughtx-validate, record the reference there (thoughtx-validate --record FILE), "
            "and compare here (thoughtx-validate --golden FILE)",
        )
