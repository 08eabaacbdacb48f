"""What a calibration found, for people: tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trtllm_thoughtx import report

NUM_WORST = 8


def calibration_tables(found: Mapping[str, Any]) -> list[Any]:
    """End-to-end numbers, then the layers that lost most."""
    loss, size = found["end_to_end"], found["size"]
    rows = [
        ["KL divergence, mean (nats)", loss["kl"]],
        ["KL divergence, worst position", loss["worst_kl"]],
        ["same top token", loss["top1_agreement"]],
        ["perplexity before", loss["perplexity_reference"]],
        ["perplexity after", loss["perplexity"]],
        ["mean bits of a weight", size["mean_bits"]],
        ["bytes of the matrices, after / before", size["bytes_after"] / size["bytes_before"]],
    ]
    num_held = found["data"]["num_held_out"]
    title = f"{found['qformat']} on {loss['num_positions']} held-out positions" if num_held else f"{found['qformat']} on its own data"
    judged = {name: facts for name, facts in found["modules"].items() if facts["quantized"]}
    worst = sorted(judged.items(), key=lambda item: -item[1]["error_share"])[:NUM_WORST]
    kept = [name for name, facts in found["modules"].items() if facts.get("kept")]
    rows += [["kept as they are", f"{len(kept)}: {', '.join(kept)}"]] if kept else []
    columns = ["layer", "SQNR dB", "clipped share", "largest input", "alpha"]
    lines = [[name, f["sqnr_db"], f["clipped_share"], f["input_amax"], f["alpha"]] for name, f in worst]
    return [report.table(title, ["measure", "value"], rows), report.table("layers that lost most", columns, lines)]
