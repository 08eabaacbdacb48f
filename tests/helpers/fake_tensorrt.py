"""A native half for NVIDIA's `tensorrt.plugin`, in Python: what that package takes from the C++ module, and no more.

    module = install(Path("unpacked wheel"), "11.4.0.106")

puts `tensorrt` and `tensorrt.plugin` into sys.modules. Dimensions are functions of named symbols, so that what a plugin computes of them
can be evaluated for any shape.
"""

from __future__ import annotations

import enum
import importlib.util
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Values = Mapping[str, int]
ENUMS = {
    "DataType": "FLOAT HALF INT8 INT32 BOOL UINT8 FP8 BF16 INT64 INT4 FP4 E8M0",
    "TensorFormat": "LINEAR CHW2 HWC8 CHW4 CHW16 CHW32 DHWC8 CDHW32 HWC DLA_LINEAR DLA_HWC4 HWC16 DHWC",
    "PluginFieldType": "FLOAT16 FLOAT32 FLOAT64 INT8 INT16 INT32 CHAR DIMS UNKNOWN BF16 INT64 FP8 INT4 FP4",
    "DimensionOperation": "SUM PROD MAX MIN SUB EQUAL LESS FLOOR_DIV CEIL_DIV",
    "QuickPluginCreationRequest": "UNKNOWN PREFER_JIT PREFER_AOT STRICT_JIT STRICT_AOT",
    "TensorRTPhase": "BUILD RUNTIME",
    "PluginArgType": "INT",
    "PluginArgDataType": "INT8 INT16 INT32",
}
SHORT = {
    **{"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int8": "INT8", "int32": "INT32", "int64": "INT64"},
    **{"bool": "BOOL", "uint8": "UINT8", "fp8": "FP8", "int4": "INT4", "fp4": "FP4"},
}
ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    **{"SUM": lambda a, b: a + b, "PROD": lambda a, b: a * b, "MAX": max, "MIN": min, "SUB": lambda a, b: a - b},
    **{"EQUAL": lambda a, b: int(a == b), "LESS": lambda a, b: int(a < b)},
    **{"FLOOR_DIV": lambda a, b: a // b, "CEIL_DIV": lambda a, b: -(-a // b)},
}
BASES = (
    *("IPluginV3", "IPluginV3QuickCore", "IPluginV3QuickBuild", "IPluginV3QuickRuntime", "IPluginV3QuickAOTBuild"),
    *("IPluginCreatorV3Quick", "ISymExpr", "ITensor"),
)


class Dimension:
    def __init__(self, value: Callable[[Values], int], fixed: bool) -> None:
        self.value, self.fixed = value, fixed

    def is_constant(self) -> bool:
        return self.fixed

    def is_size_tensor(self) -> bool:
        return False

    def get_constant_value(self) -> int:
        return self.value({}) if self.fixed else -(1 << 31)


class Builder:
    def constant(self, value: int) -> Dimension:
        return Dimension(lambda _: int(value), True)

    def symbol(self, name: str) -> Dimension:
        return Dimension(lambda values: values[name], False)

    def operation(self, op: enum.IntEnum, a: Dimension, b: Dimension) -> Dimension:
        return Dimension(lambda values: ARITHMETIC[op.name](a.value(values), b.value(values)), a.fixed and b.fixed)


class Dims(tuple):
    MAX_DIMS = 8


class DimsExprs(list):
    def __init__(self, given: Any) -> None:
        super().__init__([None] * given if isinstance(given, int) else given)


class TensorDesc:
    def __init__(self) -> None:
        self.dims: Any = None
        self.type: Any = None
        self.format: Any = None
        self.scale = 1.0


class DynamicTensorDesc:
    def __init__(self, desc: TensorDesc, shape: tuple[int, ...]) -> None:
        self.desc, self.min, self.opt, self.max = desc, shape, shape, shape


class Field:
    def __init__(self, name: str = "", data: Any = None, type: Any = None) -> None:
        self.name, self.data, self.type = name, data, type


class Registry:
    def __init__(self) -> None:
        self.creators: dict[tuple[str, str, str], Any] = {}

    def register_creator(self, creator: Any, namespace: str) -> bool:
        self.creators[creator.name, creator.plugin_version, namespace] = creator
        return True

    def get_creator(self, name: str, version: str, namespace: str) -> Any:
        return self.creators.get((name, version, namespace))


class Logger:
    WARNING = 2

    def log(self, *_: Any) -> None:
        pass


class Numbers(dict):
    """What a plugin hands over as int32 numbers of its launch."""

    nbSymExprs = 0


def install(root: Path, version: str) -> Any:
    """The module `tensorrt` of the wheel unpacked in `root`."""
    module: Any = types.ModuleType("tensorrt")
    module.__path__, module.__version__ = [], version
    for name, members in ENUMS.items():
        setattr(module, name, enum.IntEnum(name, {member: i for i, member in enumerate(members.split())}))
    for name, member in SHORT.items():
        setattr(module, name, module.DataType[member])
    for name in BASES:
        setattr(module, name, type(name, (), {"__init__": lambda self, *_, **__: None}))
    registry = Registry()
    module.get_plugin_registry = lambda: registry
    module.nptype = lambda kind: {"FLOAT": np.float32, "HALF": np.float16, "INT32": np.int32, "INT64": np.int64}[kind.name]
    given = {
        **{"IDimensionExpr": Dimension, "IExprBuilder": Builder, "Dims": Dims, "DimsExprs": DimsExprs, "Logger": Logger},
        **{"PluginTensorDesc": TensorDesc, "DynamicPluginTensorDesc": DynamicTensorDesc, "PluginField": Field},
        "PluginFieldCollection": list,
    }
    for name, value in given.items():
        setattr(module, name, value)
    sys.modules["tensorrt"] = module
    folder = root / "tensorrt_bindings" / "plugin"
    spec = importlib.util.spec_from_file_location("tensorrt.plugin", folder / "__init__.py", submodule_search_locations=[str(folder)])
    assert spec and spec.loader
    plugin = importlib.util.module_from_spec(spec)
    sys.modules["tensorrt.plugin"] = module.plugin = plugin
    spec.loader.exec_module(plugin)
    return module
