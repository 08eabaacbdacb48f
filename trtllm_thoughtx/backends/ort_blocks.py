"""`MatMulNBits`: matrices of 4 and 8 bits in blocks of inputs, as onnxruntime multiplies them on a CPU; and sessions of a few operators."""

from __future__ import annotations

import functools
from collections.abc import Container, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from trtllm_thoughtx.checkpoint.tensor_file import pack_four, unpack_four
from trtllm_thoughtx.families.formats import INT4, INT8

DOMAIN = "com.microsoft"
BLOCKS = (16, 32, 64, 128, 256)  # that `MatMulNBits` knows
LONGEST = 128  # of a row that has one scale: each block's inputs are rounded by themselves
LEVEL = 4


def block_of(group: int, longest: int = BLOCKS[-1]) -> int:
    """Inputs of a block of `MatMulNBits`: the largest that a group of the format's scales can be cut into; 0 for none."""
    return max((size for size in BLOCKS if group and group % size == 0 and size <= longest), default=0)


def blocked(raw: np.ndarray, scales: np.ndarray, group: int, zero: np.ndarray | None = None) -> list[np.ndarray]:
    """Numbers, scales and zero points as `MatMulNBits` takes them, from a stored 4-bit matrix's bytes, its scales [out, in / group] and
    its zero points' bytes. A scale is repeated for each block of its group."""
    size = block_of(group)
    num_out, num_groups = scales.shape
    scales = np.repeat(scales, group // size, 1)
    found = [(raw ^ np.uint8(INT4.sign)).reshape(*scales.shape, size // 2), scales]
    if zero is not None:
        points = unpack_four(zero.reshape(-1))[: num_out * num_groups].reshape(num_out, num_groups)
        points = np.repeat(points, group // size, 1)
        found.append(pack_four(np.pad(points, ((0, 0), (0, points.shape[1] % 2)))) ^ np.uint8(INT4.sign))
    return found


def blocked_bytes(weight: np.ndarray, scales: np.ndarray, size: int) -> list[np.ndarray]:
    """The same of an INT8 matrix [out, in] with a scale for each row, or for each group of `size` inputs or several times that."""
    num_out, num_in = weight.shape
    scales = scales.reshape(num_out, -1)
    numbers = (weight.view(np.uint8) ^ np.uint8(INT8.sign)).reshape(num_out, num_in // size, size)
    return [numbers, np.repeat(scales, num_in // size // scales.shape[1], 1)]


def blocks_node(x: str, names: Sequence[str], output: str, num_out: int, num_in: int, group: int, *, bits: int = 4) -> onnx.NodeProto:
    """Float inputs by a matrix with a scale for each block of inputs; `names` are those of numbers, scales and zero points."""
    attributes: dict[str, Any] = {"K": num_in, "N": num_out, "bits": bits, "block_size": block_of(group), "accuracy_level": LEVEL}
    return helper.make_node("MatMulNBits", [x, *names], [output], name=output, domain=DOMAIN, **attributes)


def split_nodes(
    x: str, names: Sequence[str], output: str, num_out: int, num_in: int, size: int, done: Container[str] = ()
) -> list[onnx.NodeProto]:
    """Float inputs by an INT8 matrix in blocks. Inputs are rounded to 16 bits: to the 8 that `MatMulNBits` would round them to, and the
    rest to 8 again, as rows of one product, so that the matrix is read once. Layers that read the same inputs split them once: `done`
    has names that were made before."""
    halves, two = f"{x}/halves/{size}", f"{output}/two"
    nodes = [] if halves in done else _halves(x, halves, num_in, size)
    nodes.append(blocks_node(halves, names, two, num_out, num_in, size, bits=8))
    nodes.append(helper.make_node("Split", [two], [f"{output}/high", f"{output}/low"], axis=0, num_outputs=2))
    return [*nodes, helper.make_node("Add", [f"{output}/high", f"{output}/low"], [output], name=output)]


def _halves(x: str, halves: str, num_in: int, size: int) -> list[onnx.NodeProto]:
    """[2 N, in]: multiples of each block's step, which are integers to `MatMulNBits` as well, and what they leave."""
    constants = {
        "shape": np.array([-1, num_in // size, size], np.int64),
        "back": np.array([-1, num_in], np.int64),
        "axis": np.array([2], np.int64),
        "step": np.float32(1 / INT8.largest),
        "smallest": np.float32(2.0**-100),  # the step of a block of zeros
    }
    made = {key: f"{halves}/{key}" for key in constants}
    nodes = [
        helper.make_node("Constant", [], [made[key]], value=onnx.numpy_helper.from_array(np.asarray(value)))
        for key, value in constants.items()
    ]
    steps: tuple[tuple[str, tuple[str, ...], str, dict[str, Any]], ...] = (
        ("Reshape", (x, made["shape"]), "blocks", {}),
        ("Abs", ("blocks",), "sizes", {}),
        ("ReduceMax", ("sizes", made["axis"]), "largest", {"keepdims": 1}),
        ("Mul", ("largest", made["step"]), "steps", {}),
        ("Max", ("steps", made["smallest"]), "over", {}),
        ("Div", ("blocks", "over"), "units", {}),
        ("Round", ("units",), "rounded", {}),
        ("Mul", ("rounded", "over"), "high", {}),
        ("Sub", ("blocks", "high"), "low", {}),
        ("Concat", ("high", "low"), "both", {"axis": 0}),
        ("Reshape", ("both", made["back"]), "", {}),
    )
    for op, inputs, out, attributes in steps:
        names = [one if one == x or one in made.values() else f"{halves}/{one}" for one in inputs]
        nodes.append(helper.make_node(op, names, [f"{halves}/{out}" if out else halves], **attributes))
    return nodes


@functools.cache
def takes_bytes() -> bool:
    """Whether `MatMulNBits` multiplies INT8 matrices on this CPU, and the largest numbers right."""
    num = 256
    weight = np.tile(np.array([[127], [-127]], np.int8), (8, num))
    weight[2:] = np.random.default_rng(0).integers(-127, 128, weight[2:].shape)
    arrays = dict(zip("ws", blocked_bytes(weight, np.ones(len(weight), np.float32), LONGEST), strict=True))
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", num])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", len(weight)])]
    tensors = [onnx.numpy_helper.from_array(value, name) for name, value in arrays.items()]
    try:
        session = session_of([blocks_node("x", "ws", "y", len(weight), num, LONGEST, bits=8)], inputs, outputs, tensors)
        for rows in (1, 3, 64):
            x = np.full((rows, num), 127, np.float32)
            if not np.allclose(session.run(None, {"x": x})[0], x @ weight.T.astype(np.float32), rtol=1e-5, atol=2.0):
                return False
    except Exception:  # onnxruntime's own: it has no such product here
        return False
    return True


def session_of(nodes: list[onnx.NodeProto], inputs: list[Any], outputs: list[Any], tensors: list[onnx.TensorProto]) -> ort.InferenceSession:
    """A session of a few operators on the CPU."""
    graph = helper.make_graph(nodes, "products", inputs, outputs, tensors)
    imports = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # torch's threads have the CPU between two calls
    made = helper.make_model(graph, opset_imports=imports, ir_version=10)
    return ort.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
