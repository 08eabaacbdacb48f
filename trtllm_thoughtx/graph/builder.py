"""What every file of the graph adds to: `Builder`, which collects nodes and initializers, and the parts and graphs that come of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from trtllm_thoughtx.checkpoint.exits import ExitWeights
from trtllm_thoughtx.config import BuildConfig, ModelConfig

ELEM_TYPE = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}


@dataclass(frozen=True)
class Part:
    """Layers [first_layer, last_layer) with the embedding before and the head after them, if so marked."""

    name: str
    first_layer: int
    last_layer: int
    embeds: bool
    head: bool


@dataclass(frozen=True)
class Initializer:
    """One external tensor: a checkpoint tensor by its TensorRT-LLM name, times `factor`, or a computed array.

    `elem_type` is the ONNX type of a tensor that has its own; None: the graph's type.
    """

    name: str
    shape: tuple[int, ...]
    weight: str = ""
    array: np.ndarray | None = None
    elem_type: int | None = None
    factor: float = 1.0


@dataclass(frozen=True)
class Product:
    """A Gemm that a plan must compute from `weight` (a `plan` name of `families.formats`), and from inputs of that type too if `both`."""

    node: str
    weight: str
    both: bool


@dataclass(frozen=True)
class Graph:
    """A graph without its large weights. `num_attention` and `products` are what a parser and a plan must find in it."""

    part: Part
    model: onnx.ModelProto
    initializers: tuple[Initializer, ...]
    num_attention: int
    products: tuple[Product, ...] = ()


class Builder:
    """Collects nodes and initializers; names follow the checkpoint's, in construction order, so that bytes repeat."""

    def __init__(self, config: ModelConfig, build: BuildConfig, part: Part, exits: ExitWeights) -> None:
        self.config, self.build, self.part, self.exits = config, build, part, exits
        self.elem_type = ELEM_TYPE[build.dtype]
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.inline: list[onnx.TensorProto] = []
        self.external: list[Initializer] = []
        self.num_attention = 0
        self.products: list[Product] = []

    def node(self, op: str, inputs: list[str], output: str, domain: str = "", **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], name=output, domain=domain, **attributes))
        return output

    def constant(self, name: str, value: list[int] | int) -> str:
        self.inline.append(numpy_helper.from_array(np.array(value, np.int64), name))
        return name

    def weight(self, name: str, shape: tuple[int, ...], elem_type: int | None = None, factor: float = 1.0) -> str:
        if all(x.name != name for x in self.external):
            self.external.append(Initializer(name, shape, weight=name, elem_type=elem_type, factor=factor))
        return name

    def table(self, name: str, array: np.ndarray) -> str:
        self.external.append(Initializer(name, array.shape, array=array))
        return name

    def input(self, name: str, elem_type: int, shape: list[str | int]) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, elem_type, shape))
        return name

    def output(self, name: str, elem_type: int, shape: list[str | int]) -> str:
        self.outputs.append(helper.make_tensor_value_info(name, elem_type, shape))
        return name

    def norm(self, x: str, weight: str, output: str, size: int) -> str:
        return self.node("RMSNormalization", [x, self.weight(weight, (size,))], output, axis=-1, epsilon=self.config.norm_eps)
