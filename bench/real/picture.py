"""Size against loss: bits per weight of the whole directory, and KL from float32, of ours and of every peer, on the same tokens.

    python bench/real/picture.py WORK/ours.json WORK/llama.cpp.json ... --output quality.png

Each file is what `quality.py --json` or `peers.py` wrote; they must be of as many tokens. The line joins
the formats that no other one beats in both ways.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def frontier(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those (bits, KL) that no other is at most as large and at most as lossy as, by bits."""
    best: list[tuple[float, float]] = []
    for bits, kl in sorted(points):
        if not best or kl < best[-1][1]:
            best.append((bits, kl))
    return best


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    from matplotlib.figure import Figure

    documents: list[dict[str, Any]] = [json.loads(file.read_text()) for file in args.files]
    if len({document["num_tokens"] for document in documents}) > 1:
        sys.exit("the files are of different tokens: run quality.py and peers.py in one work directory")
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axis = figure.subplots()
    all_points = []
    for file, document in zip(args.files, documents, strict=True):
        points = [(one["bits"], one["kl"]) for one in document["formats"] if one["kl"] > 1e-6]
        all_points += points
        axis.scatter([bits for bits, _ in points], [kl for _, kl in points], label=file.stem, s=28)
        for one in document["formats"]:
            if one["kl"] > 1e-6:
                axis.annotate(
                    one["name"].removeprefix(f"{file.stem} "),
                    (one["bits"], one["kl"]),
                    (4, 3),
                    textcoords="offset points",
                    fontsize=7,
                )
    axis.plot(*zip(*frontier(all_points), strict=True), color="0.6", linewidth=1, zorder=0, label="frontier")
    axis.set_yscale("log")
    axis.set_xlabel("bits per weight, whole directory")
    axis.set_ylabel("KL from float32, nats per token")
    axis.set_title(f"{Path(documents[0]['model_dir']).name}: {documents[0]['num_tokens']} tokens of held-out text")
    axis.legend(fontsize=8)
    figure.savefig(args.output, dpi=110, metadata={"Software": None})
    return 0


if __name__ == "__main__":
    sys.exit(main())
