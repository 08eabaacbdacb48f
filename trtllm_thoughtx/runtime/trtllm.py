"""An engine directory of TensorRT-LLM 1.2, as `thoughtx-build --backend tensorrt-llm` leaves it, run by that package's own executor.

A thin way through, to see whether an engine answers: tokenizer, chat template and settings are ours, the tokens are its. Not run where it
was written, which has no such package; tests have a stand-in. What its executor cannot be told is refused, not left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from trtllm_thoughtx import report
from trtllm_thoughtx.errors import ThoughtxError, shown
from trtllm_thoughtx.files import read_json
from trtllm_thoughtx.text.params import DRAFTS, THINKING, GenerationParams
from trtllm_thoughtx.text.text import Text

CONFIG, ENGINE = "config.json", "rank{}.engine"
UNKNOWN = (*THINKING, *DRAFTS, "stop", "logprobs", "num_return_sequences")
DEFAULTS = {field.name: field.default for field in fields(GenerationParams)}


@dataclass(frozen=True)
class Answer:
    output_ids: list[int]
    stop_reason: str  # eos | length, or what the executor calls it


def is_trtllm(root: Path) -> bool:
    """Whether this is TensorRT-LLM's own directory; False for anything that cannot be read, whose reader says why."""
    try:
        config = read_json(root, CONFIG)
        has_engine = (root / ENGINE.format(0)).is_file()
    except (ThoughtxError, OSError):
        return False
    return has_engine and isinstance(config, dict) and {"pretrained_config", "build_config"} <= config.keys() and "thoughtx" not in config


class Executor:
    """Its files are compared with the manifest before anything is loaded. E120 when they differ, E201 without the package, E205 when it
    fails."""

    def __init__(self, root: Path) -> None:
        self.root, world = root, read_json(root, CONFIG)["pretrained_config"].get("mapping", {}).get("world_size", 1)
        report.verify_files(root, [CONFIG, *(ENGINE.format(rank) for rank in range(world if isinstance(world, int) else 1))])
        self.text = Text.load(root, {})
        try:
            from tensorrt_llm import SamplingParams
            from tensorrt_llm._tensorrt_engine import LLM
        except ImportError as error:
            why = f"an engine of its own kind is run by TensorRT-LLM 1.2: {shown(str(error))}"
            fix = "run it on a host with a GPU and tensorrt-llm 1.2, or build the checkpoint for another --backend"
            raise ThoughtxError("E201", "TensorRT-LLM 1.2 cannot be imported here", where=str(root), why=why, fix=fix) from None
        self._params = SamplingParams
        self._llm = self._asked(lambda: LLM(model=str(root), skip_tokenizer_init=True))

    def complete(self, prompts: Sequence[Sequence[int]], params: Sequence[GenerationParams]) -> list[Answer]:
        """All prompts at once. E001 for a setting that it cannot follow."""
        for one in params:
            if unknown := [name for name in UNKNOWN if getattr(one, name) != DEFAULTS[name]]:
                what, why = f"--{unknown[0]} cannot be used with an engine of TensorRT-LLM", "its executor knows nothing like it"
                fix = "leave it out, or build the checkpoint for another --backend"
                raise ThoughtxError("E001", what, where=f"--{unknown[0]}", why=why, fix=fix)
        settings = [self._params(**_settings(one)) for one in params]
        made = self._asked(lambda: self._llm.generate([list(ids) for ids in prompts], sampling_params=settings, use_tqdm=False))
        names = {"stop": "eos"}
        return [Answer(list(one.outputs[0].token_ids), names.get(reason := str(one.outputs[0].finish_reason), reason)) for one in made]

    def close(self) -> None:
        self._llm.shutdown()

    def _asked(self, call: Any) -> Any:
        try:
            return call()
        except Exception as error:  # whatever it raises, and it raises much
            why = f"{type(error).__name__}: {shown(str(error), 600)}"
            fix = "see what it printed; the engine runs on the GPU and the release that built it"
            raise ThoughtxError("E205", "TensorRT-LLM failed", where=str(self.root), why=why, fix=fix) from None


def _settings(params: GenerationParams) -> dict[str, Any]:
    """As its SamplingParams has them. Greedy is the likeliest token of one; an end that is ignored is no token."""
    ends = () if params.ignore_eos else params.stop_ids
    found: dict[str, Any] = {
        "max_tokens": params.max_new_tokens,
        "end_id": ends[0] if ends else -1,
        "pad_id": ends[0] if ends else 0,
        "stop_token_ids": [*ends[1:], *params.stop_token_ids] or None,
        "ignore_eos": params.ignore_eos,
        "seed": params.seed,
        "detokenize": False,
        **{name: getattr(params, name) for name in ("repetition_penalty", "presence_penalty", "frequency_penalty")},
    }
    if params.is_greedy:
        return {**found, "top_k": 1}
    return {**found, **{name: getattr(params, name) for name in ("temperature", "top_k", "top_p", "min_p")}}
