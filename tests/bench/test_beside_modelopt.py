"""The bench beside ModelOpt: planting outliers changes no logit, medians are of pairs, and without ModelOpt it says what is missing."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT, script
from places import TINY as SAMPLE

torch = pytest.importorskip("torch")

from trtllm_thoughtx.calibrate.quantize.model import Head, Layer, Rotary, read  # noqa: E402
from trtllm_thoughtx.checkpoint.weights import open_weights  # noqa: E402

BENCH = ROOT / "bench" / "beside_modelopt.py"
bench = script("bench/beside_modelopt.py")


def walked(path: Path, ids: list[int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(logits, largest sizes of the inputs of the linear layers in layer 1 by channel)"""
    sizes: dict[str, torch.Tensor] = {}
    with torch.inference_mode(), open_weights(path) as source:
        x = read(source, "transformer.vocab_embedding.weight")[ids]
        for index in range(source.config.num_layers):
            layer = Layer(source, index)

            def linear(module: str, h: torch.Tensor, layer: Layer = layer) -> torch.Tensor:
                if layer.index == 1:
                    sizes[module] = h.abs().amax(0)
                return layer.plain(module, h)

            x = layer.forward(x, Rotary(source.config, len(ids)), linear)
        head = Head(source)
        return head.normed(x) @ head.weight.T, sizes


def test_planted_outliers_leave_the_function_as_it_is(tmp_path):
    bench.plant(SAMPLE, tmp_path / "m", 64.0)
    ids = list(range(3, 60))
    (wanted, before), (logits, after) = walked(SAMPLE, ids), walked(tmp_path / "m", ids)
    assert torch.equal(logits, wanted)
    for module in ("attention.qkv", "attention.dense", "mlp.fc", "mlp.proj"):
        grown = after[module] / before[module]
        num = int((grown == 64).sum())
        assert num == (2 if module == "attention.dense" else 1) * bench.NUM_PLANTED and int((grown == 1).sum()) == len(grown) - num


def test_the_table_pairs_seeds():
    rows = [
        {"format": "fp8", "system": system, "seed": seed, "kl": kl, "top1_agreement": 1.0, "perplexity_ratio": 1.0, "seconds": 1.0}
        | {"peak_mib": 1.0, "group_size": 128}
        for system, kls in (("thoughtx", (1.0, 2.0, 4.0)), ("modelopt preset", (2.0, 2.2, 3.0)))
        for seed, kl in enumerate(kls)
    ]
    cells = bench.table(rows)[-1].split()
    assert cells[3:10] == ["2.200000", "1.100", "0.750", "2.000", "2", "of", "3"]


def test_without_modelopt_nothing_is_measured():
    if importlib.util.find_spec("modelopt"):
        pytest.skip("nvidia-modelopt is installed")
    done = subprocess.run([sys.executable, str(BENCH), str(SAMPLE)], capture_output=True, text=True, check=True)
    assert "skipped: nvidia-modelopt is not installed; pip install" in done.stdout
