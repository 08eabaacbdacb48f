"""What onnxruntime's operators for weight-only products cost in answers, by their settings: KL beside the exact graph's.

    python bench/operators.py FLOAT32_ENGINE ENGINE [ENGINE ...] --text FILE [FILE ...] [--settings 4:16,4:32,4:128] [--json]

Engine directories of one model, from `thoughtx-build --backend onnxruntime --dtype float32`: the unquantized one, then quantized ones. A
setting is ACCURACY_LEVEL:BLOCK of `MatMulNBits`, for INT8 weights too, which engines run on QGemm. `engine` is what an engine runs, `exact`
the graph as it stands. Pieces of 256 tokens of the texts are prefilled; KL is of the unquantized engine's distribution from the other's,
in nats, and `beyond exact` that of the exact graph's from the operators'.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from onnx import helper

ROOT = Path(__file__).resolve().parents[1]
LENGTH = 256


def use(ort_blocks: Any, ort_fused: Any, level: int, block: int) -> None:
    """Have engines that are loaded from now on use `MatMulNBits` at this level, with blocks of at most `block` inputs."""
    ort_blocks.LEVEL, ort_blocks.BLOCKS = level, tuple(size for size in ort_blocks.BLOCKS if size <= block)

    def rows(node: Any, matrix: Any, tensors: Any, data: Any, done: Any) -> Any:
        weight, names = tensors[matrix.input[0]], (f"{matrix.input[0]}/unsigned", f"{matrix.input[1]}/blocks")
        num_out, num_in = weight.dims
        size = ort_blocks.block_of(num_in)
        raw = ort_fused.read_initializer(weight, data) ^ np.uint8(ort_fused.INT8.sign)
        scales = ort_fused.read_initializer(tensors[matrix.input[1]], data).view(np.float32).reshape(-1, 1)
        arrays = raw.reshape(num_out, num_in // size, size), np.repeat(scales, num_in // size, 1)
        said = {"K": num_in, "N": num_out, "bits": 8, "block_size": size, "accuracy_level": level}
        inputs = [node.input[0], *names]
        made = helper.make_node("MatMulNBits", inputs, [ort_fused._output(node)], domain=ort_blocks.DOMAIN, **said)
        return [made], dict(zip(names, arrays, strict=True))

    ort_fused._rows_product = rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("engines", type=Path, nargs="+")
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--settings", default="4:16,4:32,4:64,4:128")
    parser.add_argument("--pieces", type=int, default=4, help="pieces of each text")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from trtllm_thoughtx import Engine
    from trtllm_thoughtx.backends import ort_blocks, ort_fused
    from trtllm_thoughtx.validate.divergence import Divergence

    def logits(path: Path, rows: list[list[int]], *, exact: bool) -> list[np.ndarray]:
        engine = Engine.load(path, "onnxruntime", exact=exact)
        found = [engine.forward([row])[0] for row in rows]
        engine.close()
        return found

    first = Engine.load(args.engines[0], "onnxruntime")
    assert first.text is not None, "the engines need a tokenizer"
    rows = []
    for path in args.text:
        ids = first.text.encode(path.read_text(encoding="utf-8"))
        rows += [ids[i * LENGTH : (i + 1) * LENGTH] for i in range(args.pieces) if len(ids) >= (i + 1) * LENGTH]
    first.close()
    kept = ort_blocks.LEVEL, ort_blocks.BLOCKS, ort_fused._rows_product
    wanted = logits(args.engines[0], rows, exact=False)
    table = []
    for path in args.engines[1:]:
        whole = logits(path, rows, exact=True)
        for setting in ["exact", "engine", *args.settings.split(",")]:
            if setting == "exact":
                got = whole
            else:
                if setting != "engine":
                    use(ort_blocks, ort_fused, *map(int, setting.split(":")))
                got = logits(path, rows, exact=False)
                ort_blocks.LEVEL, ort_blocks.BLOCKS, ort_fused._rows_product = kept
            seen, beyond = Divergence(), Divergence()
            for row, a, b, c in zip(rows, wanted, got, whole, strict=True):
                seen.add(a, b, [*row[1:], -1])
                beyond.add(c, b)
            told = seen.summary()
            keep = {key: getattr(told, key) for key in ("kl", "top1_agreement", "perplexity_ratio", "num_positions")}
            table.append({"engine": path.name, "setting": setting, **keep, "beyond_exact": beyond.summary().kl})
            if not args.json:
                cells = (f"{table[-1][key]:>18.6f}" for key in ("kl", "beyond_exact", "top1_agreement", "perplexity_ratio"))
                print(f"{path.name:<20}{setting:>10}", *cells, flush=True)
    if args.json:
        print(json.dumps(table))


if __name__ == "__main__":
    main()
