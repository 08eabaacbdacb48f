"""Which layers to keep as they are: how much the answer changes when each is quantized alone, and the fewest that must stay out of the
grid for the whole to hold a budget. Beside NVFP4 they have 8 bits first, and stay as they are only where that is not enough.

Several variants of the model walk through the layers side by side, so that each layer's weights are read once for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F

from trtllm_thoughtx.backends.ort_product import FusedProduct
from trtllm_thoughtx.calibrate.data import NUM_STORED
from trtllm_thoughtx.calibrate.quantize import grid
from trtllm_thoughtx.calibrate.quantize.layers import STORED_LEN, Walk, add_stored
from trtllm_thoughtx.calibrate.quantize.model import UNITS, Head, Layer, device, read
from trtllm_thoughtx.calibrate.quantize.products import fused, on_head, quantized
from trtllm_thoughtx.calibrate.quantize.search import Quantized
from trtllm_thoughtx.checkpoint import tensor_file
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.families.formats import FORMATS
from trtllm_thoughtx.progress import Progress
from trtllm_thoughtx.validate.divergence import Divergence
from trtllm_thoughtx.validate.quality import ORT

NUM_TRIED = 4  # numbers of kept units that one pass compares
Streams = list[torch.Tensor]  # of each row, [tokens, hidden]


def units_of(modules: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Quantized layers, those that share their inputs together, in the model's order."""
    found = []
    prefixes = dict.fromkeys(name.rpartition(".")[0].rpartition(".")[0] for name in modules if name != "lm_head")
    for prefix in prefixes:
        for unit in UNITS:
            names = tuple(f"{prefix}.{module}" for module in unit if modules.get(f"{prefix}.{module}", {}).get("quantized"))
            found += [names] if names else []
    return [*found, *([("lm_head",)] if modules.get("lm_head", {}).get("quantized") else [])]


def sensitivities(walk: Walk, modules: Mapping[str, Mapping[str, Any]], progress: Progress) -> dict[str, float]:
    """Mean KL of the model with one unit quantized and all else as it was, in nats, by each module of the unit; on a few
    held-out rows."""
    units = units_of(modules)
    rows = [row[:STORED_LEN] for row in walk.data.held[:NUM_STORED]]
    config = walk.source.config
    found: dict[str, float] = {}
    with torch.inference_mode(), progress.stage("sensitivity", config.num_layers + 1) as stage:
        clean, variants = _embedded(walk, rows), dict[tuple[str, ...], Streams]()
        for index in range(config.num_layers):
            layer, grids = Layer(walk.source, index), _grids(walk, f"layer.{index}.safetensors")
            for unit, streams in variants.items():
                variants[unit] = [layer.forward(x, walk.rotary) for x in streams]
            for unit in units:
                if unit[0].startswith(f"{layer.name}."):
                    variants[unit] = [_forward(walk, layer, x, {name: grids[name] for name in unit}) for x in clean]
            clean = [layer.forward(x, walk.rotary) for x in clean]
            stage.advance(1)
        grids = _grids(walk, "head.safetensors") if walk.quant.covers("lm_head") else {}
        streams_of = {unit: (variants.get(unit, clean), unit == ("lm_head",)) for unit in units}
        for unit, seen, _ in _judged(walk, rows, clean, streams_of, grids.get("lm_head"), all_judge=True):
            found |= dict.fromkeys(unit, seen.summary().kl)
        stage.advance(1)
    return found


@dataclass(frozen=True)
class Mix:
    """Layers that stay `kept` as they are, and those that have `wide` numbers of 8 bits in place of fewer."""

    kept: frozenset[str] = frozenset()
    wide: frozenset[str] = frozenset()


Losses = dict[str, tuple[Divergence, Divergence]]  # by way to run: on all held-out rows, and on the stored ones


def measured(walk: Walk, mixes: Sequence[Mix], modules: Mapping[str, Mapping[str, Any]], progress: Progress) -> list[Losses]:
    """What the quantized model loses with each of `mixes`, by way to run."""
    rows, config = walk.data.judging, walk.source.config
    with torch.inference_mode(), progress.stage("measure", config.num_layers + 1) as stage:
        clean, looked_up = _embedded(walk, rows), walk.embedded()
        rounded = [looked_up(ids) for ids in rows]
        variants = {(k, way): list(rounded) for k in range(len(mixes)) for way in walk.ways}
        eights = frozenset[str]().union(*(mix.wide for mix in mixes))
        for index in range(config.num_layers):
            layer, grids = Layer(walk.source, index), _grids(walk, f"layer.{index}.safetensors")
            products = _products(walk, f"layer.{index}.safetensors") if ORT in walk.ways else {}
            wide = walk.widened(layer, eights, modules)
            for (k, way), streams in variants.items():
                mix = mixes[k]
                used = {name: wide[name] if name in mix.wide else one for name, one in grids.items() if name not in mix.kept}
                fused_ones = {name: one for name, one in products.items() if way == ORT and name not in mix.wide}
                variants[k, way] = [_forward(walk, layer, x, used, fused_ones) for x in streams]
            clean = [layer.forward(x, walk.rotary) for x in clean]
            stage.advance(1)
        head = walk.head_of_embedding()
        product = walk.product_of_head(head) if head else None
        if head is None:
            head = _grids(walk, "head.safetensors").get("lm_head")
            product = _products(walk, "head.safetensors").get("lm_head") if ORT in walk.ways else None
        streams_of = {key: (variants[key], "lm_head" not in mixes[key[0]].kept) for key in variants}
        judged = _judged(walk, rows, clean, streams_of, head, product)
        found = {key: (whole, part) for key, whole, part in judged}
        stage.advance(1)
    return [{way: found[k, way] for way in walk.ways} for k in range(len(mixes))]


def worst(losses: Losses) -> float:
    """Mean KL of the way to run that loses most."""
    return max(whole.summary().kl for whole, _ in losses.values())


def keep_for_budget(
    walk: Walk, modules: Mapping[str, Mapping[str, Any]], sensitivity: Mapping[str, float], max_kl: float, progress: Progress
) -> tuple[Mix, Losses]:
    """The shortest head of the list of units, most sensitive first, that must stay as it is for the mean KL to be at most `max_kl`: in 8
    bits where the format has such layers without a search of their own, and as it was where all units in 8 bits are not enough."""
    units = sorted(units_of(modules), key=lambda unit: -sensitivity[unit[0]])

    has_eight = FORMATS[walk.algo].scales == "block"

    def first(count: int) -> Mix:
        names, head = frozenset(name for unit in units[:count] for name in unit), frozenset({"lm_head"})
        if not has_eight:
            return Mix(names)
        kept = frozenset(name for unit in units[: max(0, count - len(units))] for name in unit) | (names & head)
        return Mix(kept, names - kept)

    low = 0
    high = last = len(units) * (1 + has_eight)
    best: Losses | None = None
    while low < high or best is None:
        tried = sorted({low + (high - low) * i // (NUM_TRIED - 1) for i in range(NUM_TRIED)})
        for count, losses in zip(tried, measured(walk, [first(count) for count in tried], modules, progress), strict=True):
            if worst(losses) <= max_kl:
                high, best = count, losses
                break
            low = count + 1
        if low > last:
            least = worst(losses)
            raise ThoughtxError(
                "E001",
                f"--accuracy_budget kl={max_kl:g} cannot be held",
                where="thoughtx-calibrate",
                why=f"with every layer kept, the embedding and the head in 8 bits still lose {least:.3g} nats",
                fix=f"allow more than that, such as --accuracy_budget kl={1.1 * least:.2g}",
            )
    return first(high), best


def keep_for_bits(
    modules: Mapping[str, Mapping[str, Any]], sensitivity: Mapping[str, float], bits: float, wide: int, num_weights: int, max_bits: float
) -> frozenset[str]:
    """Units worth most per bit that they cost, as long as the mean of all weights stays at most `max_bits`."""
    kept: set[str] = set()
    used = sum(facts["num_weights"] * (bits if facts["quantized"] else wide) for facts in modules.values())
    for unit in sorted(units_of(modules), key=lambda unit: -sensitivity[unit[0]] / sum(modules[name]["num_weights"] for name in unit)):
        cost = sum(modules[name]["num_weights"] for name in unit) * (wide - bits)
        if used + cost <= max_bits * num_weights:
            kept |= set(unit)
            used += cost
    return frozenset(kept)


def _embedded(walk: Walk, rows: Sequence[Sequence[int]]) -> Streams:
    table = read(walk.source, "transformer.vocab_embedding.weight")
    return [table[torch.tensor(list(ids), device=table.device)] for ids in rows]


def _grids(walk: Walk, file: str) -> dict[str, Quantized]:
    """The quantized layers of one of the calibration's layer files, by module."""
    tensors = tensor_file.read_all(walk.root, file)
    found = {}
    for name in tensors:
        if name.endswith(".weight"):
            module = name.removesuffix(".weight")
            scale = grid.stored_scale(tensors, module, walk.algo)
            matrix = torch.from_numpy(grid.unpack(tensors[name], scale, tensors.get(f"{module}.zero"), algo=walk.algo)).to(device())
            extra = [
                torch.from_numpy(tensors[f"{module}.{key}"].copy()).to(device()) if f"{module}.{key}" in tensors else None
                for key in ("activation_scaling_factor", "prequant_scaling_factor")
            ]
            found[module] = Quantized(matrix, torch.from_numpy(scale), extra[0], extra[1], None, 0.0, 0.0)
    return found


def _products(walk: Walk, file: str) -> dict[str, FusedProduct]:
    """The quantized layers of one of the calibration's layer files on onnxruntime's operators, by module."""
    tensors = tensor_file.read_all(walk.root, file)
    modules = [name.removesuffix(".weight") for name in tensors if name.endswith(".weight")]
    return {module: fused(tensors, module, walk.algo) for module in modules}


def _forward(
    walk: Walk, layer: Layer, x: torch.Tensor, grids: Mapping[str, Quantized], products: Mapping[str, FusedProduct] = MappingProxyType({})
) -> torch.Tensor:
    def linear(module: str, h: torch.Tensor) -> torch.Tensor:
        name = f"{layer.name}.{module}"
        return quantized(layer, module, grids[name], walk.algo, h, products.get(name)) if name in grids else layer.plain(module, h)

    return layer.forward(x, walk.rotary, linear, walk.cache_of(layer))


def _judged(
    walk: Walk,
    rows: Sequence[Sequence[int]],
    clean: Streams,
    variants: Mapping[Any, tuple[Streams, bool]],
    head_grid: Quantized | None,
    product: FusedProduct | None = None,
    *,
    all_judge: bool = False,
) -> Iterator[tuple[Any, Divergence, Divergence]]:
    """Each variant's logits against those of the clean streams, on the rows that judge and at the stored positions of those that travel
    (`all_judge`: `rows` are not the walk's, all of them judge); its flag says whether its head is quantized, too."""
    head = Head(walk.source)
    seen = {key: (Divergence(), Divergence()) for key in variants}
    for number, ids in enumerate(rows):
        judges, travels = (True, False) if all_judge else (walk.data.judges(number), walk.data.travels(number))
        for at in range(0, len(ids), Head.ROWS):
            part = slice(at, at + Head.ROWS)
            targets = [*ids[at + 1 : at + 1 + Head.ROWS], -1][: len(ids[part])]
            wanted = F.linear(head.normed(clean[number][part]), head.weight).numpy(force=True)
            for key, (streams, is_quantized) in variants.items():
                h = head.normed(streams[number][part])
                if head_grid is not None and is_quantized:
                    got = on_head(head_grid, h, walk.algo, product if isinstance(key, tuple) and key[-1] == ORT else None)
                else:
                    got = F.linear(h, head.weight)
                if judges:
                    seen[key][0].add(wanted, got.numpy(force=True), targets)
                if travels:
                    add_stored(seen[key][1], ids, at, wanted, got.numpy(force=True))
    yield from ((key, whole, part) for key, (whole, part) in seen.items())
