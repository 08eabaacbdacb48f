"""The kernels as PTX for GPUs that are not here, and what each needs of one: registers, spills, shared memory.

    python -m trtllm_thoughtx.plugins.chunked_attention.artifacts --cc 80,90 --output_dir OUT     PTX files and manifest.json
    python -m trtllm_thoughtx.plugins.chunked_attention.artifacts --record                        resources.json beside this file

Triton adds two pointers for scratch memory behind the parameters that a kernel declares. TensorRT's launcher does not pass them, so
they are taken out of the entry; a kernel that uses them is refused. The registers and spills are ptxas's own account.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from trtllm_thoughtx.plugins.chunked_attention import kernels, tiles
from trtllm_thoughtx.plugins.chunked_attention.tiles import Tile

CAPABILITIES = (80, 86, 89, 90, 100, 120)
DTYPES = {"float16": "fp16", "bfloat16": "bf16"}
KV_TYPES = {"same": "", "int8": "i8", "float8": "fp8e4nv"}
FLOAT8_FROM = 89  # compute capability with e4m3 conversions
FORMS = ("attend", "attend_split", "combine")
RECORD = Path(__file__).with_name("resources.json")
LOG2E = 1.4426950408889634
PTX_VERSION = 87  # the oldest that names all these GPUs: a newer one needs a newer driver
SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB of one block (CUDA C++ programming guide, table of limits)


@dataclass(frozen=True)
class Spec:
    """One kernel of one shape. `rows` is about how many rows a call has: it picks the tile where none is given."""

    form: str
    cc: int
    dtype: str = "float16"
    kv: str = "same"
    head_dim: int = 128
    groups: int = 7
    sink: int = 4
    left: int = 1
    anchors: int = 0
    scale: float = 0.0  # 0: head_dim ** -0.5
    rows: int = 4096
    tile: Tile | None = None

    @property
    def name(self) -> str:
        return f"{self.form}-sm{self.cc}-{self.dtype}-{self.kv}-d{self.head_dim}-g{self.groups}-{'rows' if self.rows > 16 else 'row'}"


@dataclass(frozen=True)
class Artifact:
    """PTX with exactly the declared parameters: `num_params` = inputs + int32 numbers + outputs."""

    name: str
    entry: str
    ptx: str
    sha256: str
    num_params: int
    num_warps: int
    shared_bytes: int
    registers: int
    spill_bytes: int
    tile: Tile

    def facts(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "ptx"}


def compile_kernel(spec: Spec) -> Artifact:
    """ValueError for what a GPU of that generation cannot run."""
    if spec.kv == "float8" and spec.cc < FLOAT8_FROM:
        raise ValueError(f"float8 keys and values need compute capability 8.9, not {spec.cc / 10}")
    tile = spec.tile or tiles.tile_for(spec.cc, spec.head_dim, spec.rows, scaled=spec.kv != "same")
    signature, constants = _signature(spec, tile)
    kernel = getattr(kernels, spec.form)
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "ptx_version": PTX_VERSION}
    with tempfile.TemporaryDirectory() as cache, triton.knobs.cache.scope():
        triton.knobs.cache.dir = cache  # nothing in the user's home
        made = triton.compile(source, target=GPUTarget("cuda", spec.cc, 32), options=options)
        num_params = sum(kind != "constexpr" for kind in signature.values())
        ptx = strip_scratch(made.asm["ptx"], made.metadata.name, num_params)
    registers, spills = resources(ptx)
    shared = int(made.metadata.shared)
    if shared > SHARED_LIMIT[spec.cc] << 10:
        raise ValueError(f"{spec.name} needs {shared} bytes of shared memory, the GPU has {SHARED_LIMIT[spec.cc]} KiB")
    digest = hashlib.sha256(ptx.encode()).hexdigest()
    return Artifact(spec.name, made.metadata.name, ptx, digest, num_params, tile.num_warps, shared, registers, spills, tile)


def _signature(spec: Spec, tile: Tile) -> tuple[dict[str, str], dict[str, Any]]:
    kernel = getattr(kernels, spec.form)
    own = f"*{DTYPES[spec.dtype]}"
    stored = own if spec.kv == "same" else f"*{KV_TYPES[spec.kv]}"
    scale = "constexpr" if spec.kv == "same" else "*fp32"
    kinds = {
        **{"Q": own, "K": stored, "V": stored, "Q_POSITIONS": "*i64", "KV_POSITIONS": "*i64", "CHUNK_SIZE": "*i64"},
        **{"KS": scale, "VS": scale, "HK": "i32", "S": "i32", "T": "i32", "PER_SPLIT": "i32", "SPLITS": "i32"},
        **{"Y": own, "PARTIAL": "*fp32", "LSE": "*fp32"},
    }
    values: dict[str, Any] = {
        **{"SCALE_LOG2E": (spec.scale or spec.head_dim**-0.5) * LOG2E, "SINK": spec.sink, "LEFT": spec.left, "ANCHORS": spec.anchors},
        **{"GROUPS": spec.groups, "D": spec.head_dim, "BLOCK_D": triton.next_power_of_2(spec.head_dim), "BLOCK_M": tile.block_m},
        **{"BLOCK_N": tile.block_n, "BLOCK_SCAN": tiles.BLOCK_SCAN, "SCALED": spec.kv != "same", "EMULATE": False, "KS": None, "VS": None},
    }
    names = kernel.arg_names
    signature = {name: kinds.get(name, "constexpr") for name in names}
    return signature, {name: values[name] for name in names if signature[name] == "constexpr"}


def strip_scratch(ptx: str, entry: str, num_params: int) -> str:
    """The PTX with the first `num_params` parameters of its entry alone. ValueError when another one is used."""
    found = re.search(rf"(\.entry\s+{re.escape(entry)}\()(.*?)(\n\))", ptx, re.S)
    if found is None:
        raise ValueError(f"no entry {entry} in the PTX")
    params = [line.strip().rstrip(",") for line in found.group(2).strip().splitlines()]
    if len(params) < num_params:
        raise ValueError(f"{entry} has {len(params)} parameters, {num_params} were declared")
    for param in params[num_params:]:
        if re.search(rf"\b{re.escape(param.split()[-1])}\b", ptx[found.end() :]):
            raise ValueError(f"{entry} uses {param.split()[-1]}: scratch memory, which its launcher does not give")
    return ptx[: found.start(2)] + "\n\t" + ",\n\t".join(params[:num_params]) + ptx[found.end(2) :]


def resources(ptx: str) -> tuple[int, int]:
    """Registers of a thread and bytes spilled, as ptxas counts them; the ptxas that comes with Triton."""
    target = re.search(r"\.target\s+(sm_\w+)", ptx)
    assert target
    blackwell = int(re.sub(r"\D", "", target.group(1))) >= 100
    with tempfile.TemporaryDirectory() as work:
        path = Path(work, "kernel.ptx")
        path.write_text(ptx)
        command = [str(ptxas(blackwell)), "-v", f"-arch={target.group(1)}", str(path), "-o", str(Path(work, "kernel.cubin"))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"ptxas refuses the kernel: {done.stderr.strip()[:300]}")
    registers = re.search(r"Used (\d+) registers", done.stderr)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stderr)
    return int(registers[1]) if registers else 0, max(map(int, spills), default=0)


def ptxas(blackwell: bool = False) -> Path:
    root = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    newer = root / "ptxas-blackwell"
    return newer if blackwell and newer.exists() else root / "ptxas"


def specs(capabilities: tuple[int, ...] = CAPABILITIES) -> Iterator[Spec]:
    """What is recorded: both types, prefill and decode, keys and values as they are and quantized; heads as in Qwen2.5-7B and 0.5B."""
    for cc in capabilities:
        for dtype in DTYPES:
            for head_dim in (64, 128):
                base = Spec("attend", cc, dtype, head_dim=head_dim)
                yield base
                yield replace(base, form="attend_split", rows=7)
                yield replace(base, form="combine", rows=7)
            for kv in ("int8", *(["float8"] if cc >= FLOAT8_FROM else [])):
                yield Spec("attend", cc, dtype, kv=kv)
                yield Spec("attend_split", cc, dtype, kv=kv, rows=7)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--cc", default=",".join(map(str, CAPABILITIES)), help="compute capabilities, e.g. 80,90")
    parser.add_argument("--only", default="", help="compile those alone whose name holds this text")
    parser.add_argument("--output_dir", type=Path, help="where PTX files and manifest.json go")
    parser.add_argument("--record", action="store_true", help="write resources.json")
    args = parser.parse_args()
    if kernels.INTERPRETED:
        sys.exit("TRITON_INTERPRET is set: unset it to compile")
    wanted = [spec for spec in specs(tuple(int(cc) for cc in args.cc.split(","))) if args.only in spec.name]
    made = [compile_kernel(spec) for spec in wanted]
    facts = {one.name: one.facts() for one in made}
    if args.output_dir:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        for one in made:
            (args.output_dir / f"{one.name}.ptx").write_text(one.ptx)
        (args.output_dir / "manifest.json").write_text(json.dumps({"triton": triton.__version__, "kernels": facts}, indent=1) + "\n")
    if args.record:
        kept = {name: {key: row[key] for key in ("registers", "spill_bytes", "shared_bytes", "num_params")} for name, row in facts.items()}
        RECORD.write_text(json.dumps({"triton": triton.__version__, "kernels": kept}, indent=1) + "\n")
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
