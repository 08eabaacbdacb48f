"""`thoughtx-export --triton`: an engine directory as a model of a Triton repository.

    REPO/NAME/config.pbtxt     inputs and outputs under TensorRT-LLM's names, which Triton's OpenAI front end sends; settings as parameters
    REPO/NAME/1/model.py       for Triton's Python backend; it calls `serve.triton`, so this package must be installed in that Python
    REPO/NAME/1/engine/        the engine directory, signature included

Nothing there depends on where the repository is, and the same engine gives the same bytes.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtllm_thoughtx import __version__
from trtllm_thoughtx.build.engine_dir import EngineDir
from trtllm_thoughtx.errors import ThoughtxError, shown
from trtllm_thoughtx.files import PLAIN_NAME, atomic_dir, check_output, require_space
from trtllm_thoughtx.progress import SILENT, Progress
from trtllm_thoughtx.ship.export.contents import checked_names, copy, num_bytes

CONFIG, MODEL, ENGINE, VERSION = "config.pbtxt", "model.py", "engine", "1"


@dataclass(frozen=True)
class Tensor:
    """`field`: what a request to `thoughtx-serve` calls it; empty: it says what is sent back."""

    name: str
    kind: str
    field: str = ""
    is_list: bool = False


INPUTS = (
    Tensor("text_input", "TYPE_STRING", "prompt"),
    Tensor("stream", "TYPE_BOOL", "stream"),
    Tensor("max_tokens", "TYPE_INT32", "max_tokens"),
    Tensor("stop_words", "TYPE_STRING", "stop", is_list=True),
    Tensor("temperature", "TYPE_FP32", "temperature"),
    Tensor("top_k", "TYPE_INT32", "top_k"),
    Tensor("top_p", "TYPE_FP32", "top_p"),
    Tensor("min_p", "TYPE_FP32", "min_p"),
    Tensor("seed", "TYPE_UINT64", "seed"),
    Tensor("repetition_penalty", "TYPE_FP32", "repetition_penalty"),
    Tensor("presence_penalty", "TYPE_FP32", "presence_penalty"),
    Tensor("frequency_penalty", "TYPE_FP32", "frequency_penalty"),
    Tensor("ignore_eos", "TYPE_BOOL", "ignore_eos"),
    Tensor("max_thinking_tokens", "TYPE_INT32", "max_thinking_tokens"),
    Tensor("max_reasoning_depth", "TYPE_INT32", "max_reasoning_depth"),
    Tensor("exit_threshold", "TYPE_FP32", "exit_threshold"),
    Tensor("chunk_size", "TYPE_INT32", "chunk_size"),
    Tensor("return_num_input_tokens", "TYPE_BOOL"),
    Tensor("return_num_output_tokens", "TYPE_BOOL"),
)
OUTPUTS = (
    Tensor("text_output", "TYPE_STRING"),
    Tensor("finish_reason", "TYPE_STRING"),
    Tensor("num_input_tokens", "TYPE_UINT32"),
    Tensor("num_output_tokens", "TYPE_UINT32"),
)
# Parameters of config.pbtxt and what each is at first; empty: not set.
PARAMETERS = {"backend": "", "max_num_seqs": "", "max_queued_requests": "64", "prefill_segment": "512", "num_threads": "", "verify_key": ""}

MODEL_PY = f'''"""Triton loads this file; what it does is in the package trtllm_thoughtx, which must be installed in Triton's Python."""

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        try:
            from trtllm_thoughtx.serve.triton import Served
        except ImportError as error:
            raise pb_utils.TritonModelException(
                "error[E201]: trtllm-thoughtx cannot be imported in Triton's Python\\n"
                f"  where: {{__file__}}\\n  why:   {{error}}\\n"
                "  fix:   pip install trtllm-thoughtx=={__version__}, in the Python that Triton runs"
            ) from None
        self.served = Served(pb_utils, args)

    def execute(self, requests):
        self.served.execute(requests)

    def finalize(self):
        self.served.close()
'''


def export_triton(
    engine_dir: Path, repository: Path, *, model_name: str | None = None, verify_key: Path | None = None, progress: Progress = SILENT
) -> dict[str, Any]:
    """Add the engine to the directory `repository`, which is made where there is none. E120, E121 and E124 for an engine that is not as it
    was built and signed, E130 for a repository that cannot be written or has a model of that name, E122 for an engine without tokenizer."""
    name = model_name if model_name is not None else Path(engine_dir).resolve().name
    if not PLAIN_NAME.fullmatch(name):
        why, fix = "a name has letters, digits, dots, dashes and underscores", "choose another --model_name"
        raise ThoughtxError("E001", f"{shown(name)} cannot name a model", where="--model_name", why=why, fix=fix)
    directory = EngineDir.open(Path(engine_dir))
    if not (directory.root / "tokenizer.json").exists():
        what, why = "this engine has no tokenizer, and clients of Triton send texts", "it was built from files without a tokenizer.json"
        fix = "build it from a checkpoint with its tokenizer files"
        raise ThoughtxError("E122", what, where=str(engine_dir), why=why, fix=fix)
    if os.path.lexists(repository / name):
        why, fix = "its directory is there", "choose another --model_name; a name in use is never replaced"
        raise ThoughtxError("E130", f"the repository has a model {shown(name)}", where=str(repository / name), why=why, fix=fix)
    is_new = not repository.exists()
    check_output(repository if is_new else repository / name, force=False, inputs=[engine_dir])
    names = checked_names(directory, verify_key)
    total = num_bytes(directory, names)
    require_space(repository.absolute(), total + (1 << 20))
    with atomic_dir(repository if is_new else repository / name, force=False) as partial:
        model = partial / name if is_new else partial
        (model / VERSION / ENGINE).mkdir(parents=True)
        with progress.stage("copying", total, "bytes") as stage:
            for file in names:
                copy(directory, file, model / VERSION / ENGINE / file, stage)
        (model / CONFIG).write_text(config_pbtxt(name), encoding="utf-8")
        (model / VERSION / MODEL).write_text(MODEL_PY, encoding="utf-8")
    return {"engine_dir": str(engine_dir), "triton": str(repository), "model": name, "files": len(names) + 2, "bytes": total}


def config_pbtxt(name: str) -> str:
    """An inference.ModelConfig as text. KIND_MODEL: the engine takes the first GPU that it sees, or none; one batch is one request, and
    those that run at a time share the engine's own slots."""
    rows = [f"name: {json.dumps(name)}", 'backend: "python"', "max_batch_size: 1", "model_transaction_policy { decoupled: true }"]
    for tensor in INPUTS:
        is_optional = "" if tensor.name == "text_input" else ", optional: true"
        rows.append(f'input {{ name: "{tensor.name}", data_type: {tensor.kind}, dims: [ {-1 if tensor.is_list else 1} ]{is_optional} }}')
    rows += [f'output {{ name: "{tensor.name}", data_type: {tensor.kind}, dims: [ 1 ] }}' for tensor in OUTPUTS]
    rows.append("instance_group { count: 1, kind: KIND_MODEL }")
    rows += [f'parameters {{ key: "{key}", value {{ string_value: "{value}" }} }}' for key, value in PARAMETERS.items()]
    return "\n".join(rows) + "\n"
