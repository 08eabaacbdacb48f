"""The walk through the layers: run the rows, see what each linear layer is fed, choose its grid, and run the held-out rows on it.

After each layer its tensors, its facts and the rows' states are on disk; a run that is started again goes on behind the last of them.
Held-out rows go through twice, on the layers as they were and on the quantized ones, so the end-to-end loss is known after one walk.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from trtllm_thoughtx import report
from trtllm_thoughtx.backends.ort_product import FusedProduct
from trtllm_thoughtx.calibrate.data import Data
from trtllm_thoughtx.calibrate.quantize import grid, kv, table
from trtllm_thoughtx.calibrate.quantize.model import UNITS, Head, Layer, Rotary, read
from trtllm_thoughtx.calibrate.quantize.products import fused, on_head, operators_of, quantized
from trtllm_thoughtx.calibrate.quantize.search import Quantized, widened
from trtllm_thoughtx.calibrate.quantize.states import States
from trtllm_thoughtx.calibrate.quantize.watch import Judge, Watch, choose, picks_of, stored_tensors
from trtllm_thoughtx.checkpoint import tensor_file
from trtllm_thoughtx.checkpoint.weights import WeightSource
from trtllm_thoughtx.config import QuantConfig
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.families.formats import FORMATS
from trtllm_thoughtx.families.quantization import TABLE, embedding_of, linear_modules, wide_of
from trtllm_thoughtx.files import atomic_file, read_json
from trtllm_thoughtx.progress import Progress
from trtllm_thoughtx.validate.divergence import Divergence, Loss, spread
from trtllm_thoughtx.validate.quality import EXACT, ORT

STORED_LEN = 256  # tokens of a sequence that travels with the checkpoint, at most; a multiple of `Head.ROWS`


class Walk:
    """One calibration under way. `root` is its working directory."""

    def __init__(
        self, source: WeightSource, data: Data, quant: QuantConfig, root: Path, batch_size: int, rounding: str = "nearest"
    ) -> None:
        assert quant.algo is not None
        self.source, self.data, self.quant, self.algo, self.root = source, data, quant, quant.algo, root
        self.batch_size, self.rounding, self.compensates = batch_size, rounding, rounding == "gptq"
        self.num_rows, self.num_held = len(data.rows), len(data.judging)
        self.kind = operators_of(quant)
        self.ways = (EXACT, ORT) if self.kind else (EXACT,)
        rows = [*data.rows, *data.judging * (1 + len(self.ways))]
        self.lengths = [len(row) for row in rows]
        self.states = States(root, self.lengths, source.config.hidden_size)
        self.rotary = Rotary(source.config, max(self.lengths))
        self.picks = picks_of(self.lengths[: self.num_rows])

    @property
    def held(self) -> range:
        return range(self.num_rows, self.num_rows + self.num_held)

    def held_by(self, way: str) -> range:
        """The held-out rows on the quantized layers, run one of `ways`."""
        first = self.held.stop + self.ways.index(way) * self.num_held
        return range(first, first + self.num_held)

    def _products(self, prefix: str, found: Mapping[str, Quantized]) -> dict[str, FusedProduct]:
        """Quantized layers on onnxruntime's operators, by module."""
        made = {}
        for module, one in found.items():
            name = f"{prefix}.{module}".strip(".")
            made[module] = fused(stored_tensors(name, one, self.quant), name, self.algo)
        return made

    def embedded(self) -> Callable[[Sequence[int]], torch.Tensor]:
        """Looks rows of the embedding up as the quantized model does."""
        if self.quant.embedding:
            tensors = tensor_file.read_all(self.root, table.FILE)
            return lambda ids: table.looked_up(tensors, TABLE, ids, embedding_of(self.quant))
        weight = read(self.source, f"{TABLE}.weight")
        return lambda ids: weight[torch.tensor(list(ids), device=weight.device)]

    def head_of_embedding(self) -> Quantized | None:
        """The head in the embedding's 8 bits; None where it has the layers' format, or is not quantized."""
        if not self.quant.embedding or self.quant.covers("lm_head"):
            return None
        if self.source.config.tied:
            return table.found(tensor_file.read_all(self.root, table.FILE), TABLE, embedding_of(self.quant))
        return table.found(tensor_file.read_all(self.root, "head.safetensors"), "lm_head", embedding_of(self.quant))

    def product_of_head(self, one: Quantized) -> FusedProduct | None:
        """The same on onnxruntime's operators."""
        if ORT not in self.ways:
            return None
        algo = embedding_of(self.quant).algo or ""
        few_bits = FORMATS[self.algo].number.bits < FORMATS[algo].number.bits
        return FusedProduct(grid.pack(one.matrix, one.scale, algo), one.scale.numpy(force=True), rounds_inputs=few_bits)

    def run(self, progress: Progress) -> None:
        """Every layer and the head; what is there already is kept."""
        num_layers = self.source.config.num_layers
        with torch.inference_mode(), progress.stage("calibrate layers", num_layers + 1) as stage:
            done = self.resume_point()
            if done == 0 and not self.states.is_whole(-1):
                self._embed()
            stage.advance(done)
            for index in range(done, num_layers):
                self._layer(index)
                stage.advance(1)
            if not (self.root / "head.json").is_file():
                self._head()
            stage.advance(1)

    def resume_point(self) -> int:
        """Layers whose tensors are on disk, with the states that the next one needs."""
        for done in range(self.source.config.num_layers, 0, -1):
            if self.states.is_whole(done - 1) and all((self.root / f"layer.{i}.json").is_file() for i in range(done)):
                return done
        return 0

    def _embed(self) -> None:
        weight = read(self.source, f"{TABLE}.weight")
        if self.quant.embedding:
            tensor_file.write_all(self.root / table.FILE, table.rounded(weight, TABLE, embedding_of(self.quant)))
        looked_up = self.embedded()
        for row, ids in enumerate([*self.data.rows, *self.data.judging * (1 + len(self.ways))]):
            as_it_was = row in self.held or (row < self.num_rows and not self.compensates)
            value = weight[torch.tensor(ids, device=weight.device)] if as_it_was else looked_up(ids)
            self.states.write(-1, row, value.numpy(force=True))

    def _batches(self, rows: Sequence[int]) -> list[Sequence[int]]:
        return [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]

    def _each(self, index: int, rows: Sequence[int], run: Callable[[int, torch.Tensor], torch.Tensor]) -> None:
        """Rows through a layer, `batch_size` of them in memory; E165 when one comes out with numbers that are not finite."""
        for batch in self._batches(rows):
            held = [(row, torch.from_numpy(self.states.read(index - 1, row)).to(self.rotary.cos.device)) for row in batch]
            for row, x in held:
                out = run(row, x)
                if not bool(torch.isfinite(out).all()):
                    raise not_finite(f"transformer.layers.{index}")
                self.states.write(index, row, out.numpy(force=True))

    def _layer(self, index: int) -> None:
        layer = Layer(self.source, index)
        watches: dict[str, Watch] = {unit[0]: Watch(self.picks, self.rounding) for unit in UNITS}

        def observe(row: int, x: torch.Tensor) -> torch.Tensor:
            def linear(module: str, h: torch.Tensor) -> torch.Tensor:
                if not bool(torch.isfinite(h).all()):
                    raise not_finite(f"{layer.name}.{module}")
                if module in watches:
                    watches[module].add(h, row)
                return layer.plain(module, h)

            return layer.forward(x, self.rotary, linear)

        before, kv_algo, kv_scale = index - 1, self.quant.kv_algo, None
        if kv_algo:
            kv_scale = kv.scale_of(layer, (self._state(before, row) for row in range(self.num_rows)), self.rotary, kv_algo)
        self._each(index, range(self.num_rows), observe)
        found: dict[str, Quantized] = {}
        facts: dict[str, Any] = {}
        for unit in UNITS:
            seen = watches.pop(unit[0]).inputs()
            weights = {module: layer.weights[f"{module}.weight"] for module in unit}
            made, told = choose(layer.name, weights, seen, self.quant)
            found |= made
            facts |= told
        rounded = None
        if kv_algo and kv_scale is not None:
            rounded = kv.on_grid(kv_scale, kv_algo)
            share = kv.error_share(layer, (self._state(before, row) for row in self.held), self.rotary, rounded, kv_algo)
            facts[f"{layer.name}.attention.qkv"]["cache_error_share"] = share
        judges = {module: Judge(one, self.algo) for module, one in found.items()}

        def judge(row: int, x: torch.Tensor) -> torch.Tensor:
            def linear(module: str, h: torch.Tensor) -> torch.Tensor:
                wanted = layer.plain(module, h)
                if module in found:
                    judges[module].add(h, wanted, quantized(layer, module, found[module], self.algo, h))
                return wanted

            return layer.forward(x, self.rotary, linear)

        def on_grid(products: Mapping[str, FusedProduct]) -> Callable[[int, torch.Tensor], torch.Tensor]:
            def linear(module: str, h: torch.Tensor) -> torch.Tensor:
                if module not in found:
                    return layer.plain(module, h)
                return quantized(layer, module, found[module], self.algo, h, products.get(module))

            return lambda _, x: layer.forward(x, self.rotary, linear, rounded)

        self._each(index, self.held, judge)
        for way in self.ways:
            self._each(index, self.held_by(way), on_grid(self._products(layer.name, found) if way == ORT else {}))
        if self.compensates:  # the next layer is rounded for inputs as this one gives them
            self._each(index, range(self.num_rows), on_grid({}))
        for module, one in judges.items():
            facts[f"{layer.name}.{module}"] |= one.facts()
        extra = {} if kv_scale is None else {f"{layer.name}.attention.kv_cache_scaling_factor": kv_scale.numpy(force=True)}
        self._keep(f"layer.{index}", layer.name, found, facts, extra)
        self.states.drop(index - 1)

    def cache_of(self, layer: Layer) -> kv.Cache | None:
        """The rounding of a finished layer's KV cache; None when it is not quantized."""
        if self.quant.kv_algo is None:
            return None
        name = f"{layer.name}.attention.kv_cache_scaling_factor"
        scale = tensor_file.read_all(self.root, f"layer.{layer.index}.safetensors")[name]
        return kv.on_grid(torch.from_numpy(scale.copy()), self.quant.kv_algo)

    def _state(self, layer: int, row: int) -> torch.Tensor:
        return torch.from_numpy(self.states.read(layer, row)).to(self.rotary.cos.device)

    def _keep(
        self,
        file: str,
        prefix: str,
        found: dict[str, Quantized],
        facts: dict[str, Any],
        extra: Mapping[str, np.ndarray] = MappingProxyType({}),
        **more: Any,
    ) -> None:
        tensors = dict(extra)
        for module, one in found.items():
            tensors |= stored_tensors(f"{prefix}.{module}".strip("."), one, self.quant)
        tensor_file.write_all(self.root / f"{file}.safetensors", tensors)
        with atomic_file(self.root / f"{file}.json") as out:
            out.write(report.to_json({"modules": facts, **more}).encode())

    def _head(self) -> None:
        last = self.source.config.num_layers - 1
        head = Head(self.source)
        facts: dict[str, Any] = {}
        found: dict[str, Quantized] = {}
        extra: dict[str, np.ndarray] = {}
        one: Quantized | None = None
        product: FusedProduct | None = None
        if self.quant.covers("lm_head"):
            watch = Watch(self.picks, self.rounding)
            for row in range(self.num_rows):
                watch.add(head.normed(torch.from_numpy(self.states.read(last, row)).to(head.weight.device)), row)
            found, facts = choose("", {"lm_head": head.weight}, watch.inputs(), self.quant)
            one, product = found.get("lm_head"), self._products("", found).get("lm_head") if ORT in self.ways else None
        elif self.quant.embedding:
            if not self.source.config.tied:
                extra = table.rounded(head.weight, "lm_head", embedding_of(self.quant))
                tensor_file.write_all(self.root / "head.safetensors", extra)
            one = self.head_of_embedding()
            product = self.product_of_head(one) if one else None
        judge = Judge(one, self.algo) if one and found else None
        seen = {way: (Divergence(), Divergence()) for way in self.ways}
        for number, row in enumerate(self.held):
            ids = self.data.judging[number]
            pair = {way: head.normed(self._state(last, self.held_by(way)[number])) for way in self.ways}
            whole = head.normed(self._state(last, row))
            for at in range(0, len(ids), Head.ROWS):
                clean = whole[at : at + Head.ROWS]
                wanted = F.linear(clean, head.weight)
                if judge and one:
                    judge.add(clean, wanted, F.linear(one.inputs(clean, self.algo), one.matrix))
                targets = [*ids[at + 1 : at + 1 + Head.ROWS], -1][: len(clean)]
                for way, (divergence, stored_part) in seen.items():
                    rough = pair[way][at : at + Head.ROWS]
                    got = on_head(one, rough, self.algo, product if way == ORT else None) if one else F.linear(rough, head.weight)
                    pair_of_logits = wanted.numpy(force=True), got.numpy(force=True)
                    if self.data.judges(number):
                        divergence.add(*pair_of_logits, targets)
                    if self.data.travels(number):
                        add_stored(stored_part, ids, at, *pair_of_logits)
        if judge:
            facts["lm_head"] |= judge.facts()
        self._keep(
            "head",
            "",
            found,
            facts,
            extra,
            losses={way: [one.summary() for one in pair_of_way] for way, pair_of_way in seen.items()},
        )

    def facts(self) -> tuple[dict[str, Any], dict[str, tuple[Loss, Loss]]]:
        """(module -> facts, way -> end-to-end numbers and those of the stored sequences alone) of a walk that is done."""
        modules: dict[str, Any] = {}
        for index in range(self.source.config.num_layers):
            modules |= read_json(self.root, f"layer.{index}.json")["modules"]
        last = read_json(self.root, "head.json")
        modules |= last["modules"]
        ordered = {name: modules[name] for name in linear_modules(self.source.config) if name in modules}
        return ordered, {way: (Loss(**whole), Loss(**on_stored)) for way, (whole, on_stored) in last["losses"].items()}

    def widened(self, layer: Layer, names: Collection[str], modules: Mapping[str, Mapping[str, Any]]) -> dict[str, Quantized]:
        """Those of a layer's modules that `names` has, in 8 bits; their inputs are as large as those that were seen."""
        mine = [name for name in modules if name in names and name.startswith(f"{layer.name}.")]
        weights = {name: layer.weights[f"{name.removeprefix(layer.name + '.')}.weight"] for name in mine}
        return {name: widened(weight, modules[name]["input_amax"], wide_of(self.quant)) for name, weight in weights.items()}

    def keep_wide(self, names: Collection[str], modules: Mapping[str, Mapping[str, Any]]) -> None:
        """Write the tensors of modules in 8 bits, beside those of their layers; what an earlier run chose goes."""
        for index in range(self.source.config.num_layers):
            path = self.root / f"wide.layer.{index}.safetensors"
            path.unlink(missing_ok=True)
            if any(name.startswith(f"transformer.layers.{index}.") for name in names):
                found = self.widened(Layer(self.source, index), names, modules)
                made = [stored_tensors(name, one, wide_of(self.quant)) for name, one in found.items()]
                tensor_file.write_all(path, {name: value for tensors in made for name, value in tensors.items()})

    def stored_rows(self) -> list[list[int]]:
        """The sequences that go with the checkpoint, so that an engine can be judged on them."""
        return [row[:STORED_LEN] for number, row in enumerate(self.data.judging) if self.data.travels(number)]


def add_stored(seen: Divergence, ids: Sequence[int], at: int, wanted: np.ndarray, got: np.ndarray) -> None:
    """Add the positions that an engine of this checkpoint is later judged at; the last one of a stored row has no target."""
    length = min(len(ids), STORED_LEN)
    rows = [p - at for p in spread(length, wanted.shape[-1]) if at <= p < at + len(wanted)]
    if rows:
        seen.add(wanted[rows], got[rows], [ids[at + r + 1] if at + r + 1 < length else -1 for r in rows])


def not_finite(module: str) -> ThoughtxError:
    return ThoughtxError(
        "E165",
        f"the numbers that {module} computes with are not finite",
        where=module,
        why="NaN or infinity in its inputs or outputs: the weights overflow float32 on this data, or are damaged",
        fix="download the checkpoint again, or calibrate on other data (--calib_data): these inputs drive the original model itself to "
        "infinity. Nothing was written.",
    )
