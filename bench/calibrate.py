"""What does a calibration cost: time and peak memory of `thoughtx-calibrate` on a synthetic checkpoint of a real shape.

    python bench/calibrate.py --shape 7b [--formats fp8,int8_sq,int4_awq] [--num_rows 128] [--seq_len 512] [--options ".."] [--work DIR]

The data are rows of random tokens, `--seq_len` long, so that memory is what full-length text takes; weights are random, too, so its
accuracy means nothing. `--options` are more flags for the command. The disk needs the checkpoint, twice its half, and the rows' states.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from build import measured
from convert import ROOT, SHAPES, config_of, make_checkpoint

COMMAND = "import sys; from trtllm_thoughtx.cli.entry import calibrate_main; sys.argv[0] = 'thoughtx-calibrate'; calibrate_main()"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--shape", choices=SHAPES, default="0.5b")
    parser.add_argument("--formats", default="fp8,int8_sq,int4_awq")
    parser.add_argument("--num_rows", type=int, default=128, help="an eighth of them judges")
    parser.add_argument("--seq_len", type=int, default=512)
    parser.add_argument("--options", default="")
    parser.add_argument("--work", type=Path, help="an existing directory on the disk to use (default: the system's temporary one)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        model, data, out = (Path(work, name) for name in ("model", "data.jsonl", "out"))
        num_bytes = make_checkpoint(model, args.shape)
        rng = np.random.default_rng(0)
        rows = rng.integers(0, config_of(args.shape)["vocab_size"], (args.num_rows, args.seq_len)).tolist()  # type: ignore[call-overload]
        data.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
        for name in args.formats.split(","):
            words = ["--model_dir", model, "--output_dir", out, "--qformat", name, "--calib_data", data, "--calib_seq_len", args.seq_len]
            words += ["--calib_size", args.num_rows, "-q", *shlex.split(args.options)]
            seconds, peak = measured([sys.executable, "-c", COMMAND, *map(str, words)])
            size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
            row = {
                "shape": args.shape,
                "checkpoint_mib": num_bytes >> 20,
                "qformat": name,
                "num_rows": args.num_rows,
                "seq_len": args.seq_len,
            }
            row |= {"seconds": round(seconds, 1), "peak_mib": round(peak), "output_mib": size >> 20}
            print(json.dumps(row) if args.json else "  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            shutil.rmtree(out)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
