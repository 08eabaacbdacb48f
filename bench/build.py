"""What does a TensorRT-RTX build cost beside the bare builder's calls on the same graphs? Time, peak memory, and whether it repeats.

    python bench/build.py --shape 0.5b [--dtype float16] [--rounds 1] [--work DIR] [--json]

One round: `thoughtx-build --backend tensorrt-rtx` on a synthetic checkpoint (weights from the checkpoint through memory into plans on disk,
hashed), then for each of its graphs, with the weights written beside it beforehand and not timed, a bare process that parses
the file and streams the plan to disk. Peak memory is that of the largest process, the weights it was handed included. The disk
needs the checkpoint, the plans, and one part's weights and plan more. Needs the extra [rtx]; needs no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from convert import ROOT, SHAPES, make_checkpoint

BUILD = "import sys; from trtllm_thoughtx.cli.entry import build_main; sys.argv[0] = 'thoughtx-build'; build_main()"
BARE = """
import json, sys
import tensorrt_rtx as trt

class Writer(trt.IStreamWriter):
    def __init__(self, path):
        trt.IStreamWriter.__init__(self)
        self.file = open(path, "wb")
    def write(self, data):
        self.file.write(data)
        return len(data)

graph, plan, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
parser = trt.OnnxParser(network, builder.logger)
assert parser.parse_from_file(graph)
config = builder.create_builder_config()
for shapes in settings["profiles"]:
    profile = builder.create_optimization_profile()
    for name, ranges in shapes.items():
        profile.set_shape(name, *ranges)
    config.add_optimization_profile(profile)
targets = settings["targets"]
config.num_compute_capabilities = len(targets)
for index, target in enumerate(targets):
    config.set_compute_capability(getattr(trt.ComputeCapability, "SM" + target.replace(".", "")), index)
assert builder.build_serialized_network_to_stream(network, config, Writer(plan))
"""


def measured(command: list[str]) -> tuple[float, float]:
    """(seconds, MiB of the largest process) of a command and the processes that it waits for."""
    start = time.perf_counter()
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command[3:])[:200]} failed with status {process.returncode}")
    return seconds, usage.ru_maxrss / 1024


def bare_seconds(checkpoint: Path, engine: Path, work: Path) -> float:
    """Seconds of the bare calls, summed over the parts of `engine`."""
    from trtllm_thoughtx.build.build import profiles_of
    from trtllm_thoughtx.build.engine_dir import EngineDir
    from trtllm_thoughtx.checkpoint.weights import open_weights
    from trtllm_thoughtx.graph import external
    from trtllm_thoughtx.graph.decoder import decoder_graph, parts_of
    from trtllm_thoughtx.progress import SILENT

    build, total = EngineDir.open(engine).build, 0.0
    with open_weights(checkpoint) as source:
        for part in parts_of(source.config, build.stages):
            bound = external.bind(decoder_graph(source.config, build, part), build.dtype, f"{part.name}.data")
            assert (engine / f"{part.name}.onnx").read_bytes() == bound.model
            work.mkdir()
            (work / "graph.onnx").write_bytes(bound.model)
            external.write_data(bound, source, work / bound.location, SILENT)
            settings = {"profiles": profiles_of(bound.graph, build), "targets": build.compute_capabilities}
            command = [sys.executable, "-c", BARE, str(work / "graph.onnx"), str(work / "bare.engine"), json.dumps(settings)]
            total += measured(command)[0]
            shutil.rmtree(work)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--shape", choices=SHAPES, default="0.5b")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--targets", default="8.9", help="compute capabilities, comma-separated")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--work", type=Path, help="an existing directory on the disk to use (default: the system's temporary one)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        source, engine = Path(work, "source"), Path(work, "engine")
        num_bytes = make_checkpoint(source, args.shape)
        rows, hashes = [], []
        for _ in range(args.rounds):
            shutil.rmtree(engine, ignore_errors=True)
            options = ["--checkpoint_dir", str(source), "--output_dir", str(engine), "--backend", "tensorrt-rtx", "--dtype", args.dtype]
            seconds, peak = measured([sys.executable, "-c", BUILD, *options, "--compute_capabilities", args.targets])
            parts = json.loads((engine / "config.json").read_text())["thoughtx"]["parts"]
            hashes.append([part["plans"]["tensorrt-rtx"]["sha256"] for part in parts])
            bare = bare_seconds(source, engine, Path(work, "bare"))
            rows.append(
                {"build_s": round(seconds, 1), "bare_s": round(bare, 1), "ratio": round(seconds / bare, 3), "peak_mib": round(peak)}
            )
        plans = sum(path.stat().st_size for path in engine.glob("*.engine"))
    result = {
        "shape": args.shape,
        "dtype": args.dtype,
        "targets": args.targets,
        "checkpoint_bytes": num_bytes,
        "plan_bytes": plans,
        "num_parts": len(hashes[0]),
        "rounds": rows,
        "median_ratio": statistics.median(row["ratio"] for row in rows),
        "repeats": None if len(hashes) < 2 else all(row == hashes[0] for row in hashes),
    }
    if args.json:
        print(json.dumps(result))
        return
    print(f"{args.shape} {args.dtype} for {args.targets}: {len(hashes[0])} plans, {plans / 2**30:.2f} GiB")
    for row in rows:
        print(f"build {row['build_s']} s, bare builder {row['bare_s']} s, ratio {row['ratio']}, peak {row['peak_mib']} MiB")
    if len(hashes) > 1:
        print("the same sha256 in every round" if result["repeats"] else "the rounds differ")


if __name__ == "__main__":
    main()
