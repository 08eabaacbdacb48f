"""`thoughtx::ChunkedAttention` for TensorRT 10.15 .. 11.x as an ahead-of-time plugin: the kernel lies in the engine.

`register()` tells TensorRT's plugin registry (tensorrt.plugin, quickly deployable plugins) the operator's types and shapes, which tiles to
time, and how to compile and launch each: Triton's PTX for the GPU of this host, without the parameters that TensorRT does not pass. One
kernel serves prefill and decode: it is not split over the keys, since such a plugin has one kernel and no workspace.

TensorRT reads the annotations below as types, so they must not be strings. It has been run through NVIDIA's own Python package of several
versions over a stand-in for the native half (tests/plugins/test_aot.py), and not inside TensorRT on a GPU.
"""

import ctypes
import importlib
from typing import Any

from trtllm_thoughtx.plugins.chunked_attention.tiles import Tile, tile_for

FULL_NAME = "thoughtx::ChunkedAttention"
CUDA_DRIVER = "libcuda.so.1"
CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76  # CUdevice_attribute
FIXED_IN = (11, 2)  # bindings before it refuse the attributes of a plugin under NumPy 2.4 and later


class Refused(RuntimeError):
    """Why the plugin cannot be used here, and what to do."""


def compute_capability() -> int:
    """Of the first GPU, 90 for 9.0. TensorRT builds for the GPU of the host."""
    try:
        driver = ctypes.CDLL(CUDA_DRIVER)
    except OSError as error:
        raise Refused(f"no NVIDIA driver: {error}") from None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    calls = [
        driver.cuInit(0),
        driver.cuDeviceGet(ctypes.byref(device), 0),
        driver.cuDeviceGetAttribute(ctypes.byref(major), CAPABILITY_MAJOR, device),
        driver.cuDeviceGetAttribute(ctypes.byref(minor), CAPABILITY_MINOR, device),
    ]
    if any(calls):
        raise Refused(f"the NVIDIA driver does not name its GPU: status {calls}")
    return 10 * major.value + minor.value


def tactics(cc: int, head_dim: int) -> dict[int, Tile]:
    """Tiles that TensorRT times for each range of shapes: for many rows, one that needs little shared memory, one for few rows."""
    return {1: tile_for(cc, head_dim, 4096), 2: Tile(64, 32, 4, 1), 3: tile_for(cc, head_dim, 1)}


def refuse_old_numpy(tensorrt_version: str, numpy_version: str) -> None:
    tensorrt, numpy = (tuple(int(x) for x in version.split(".")[:2]) for version in (tensorrt_version, numpy_version))
    if tensorrt < FIXED_IN and numpy >= (2, 4):
        fix = 'pip install "numpy<2.4", or a TensorRT from 11.2 on'
        raise Refused(f"TensorRT {tensorrt_version} cannot read a plugin's attributes under NumPy {numpy_version}: {fix}")


def register(cc: int | None = None) -> None:
    """Make the operator known to this process's TensorRT. Refused, with why and what to do, where that cannot work."""
    import numpy

    trt: Any = importlib.import_module("tensorrt")
    refuse_old_numpy(str(trt.__version__), numpy.__version__)
    try:
        from trtllm_thoughtx.plugins.chunked_attention import artifacts
    except ImportError as error:
        raise Refused(f'the kernel is compiled by Triton: {error}; pip install "trtllm-thoughtx[plugin]"') from None
    trtp: Any = importlib.import_module("tensorrt.plugin")
    capability = compute_capability() if cc is None else cc
    if capability not in artifacts.CAPABILITIES:
        raise Refused(f"no tiles for compute capability {capability / 10}; there are some for {artifacts.CAPABILITIES}")

    @trtp.register(FULL_NAME)
    def described(
        q: trtp.TensorDesc,
        k: trtp.TensorDesc,
        v: trtp.TensorDesc,
        q_positions: trtp.TensorDesc,
        kv_positions: trtp.TensorDesc,
        chunk_size: trtp.TensorDesc,
        scale: float,
        sink: int,
        left: int,
        anchors: int,
        head_dim: int,
        groups: int,
    ) -> trtp.TensorDesc:
        return q.like()

    @trtp.autotune(FULL_NAME)
    def tuned(
        q: trtp.TensorDesc,
        k: trtp.TensorDesc,
        v: trtp.TensorDesc,
        q_positions: trtp.TensorDesc,
        kv_positions: trtp.TensorDesc,
        chunk_size: trtp.TensorDesc,
        head_dim: int,
        outputs: tuple[trtp.TensorDesc],
    ) -> list[trtp.AutoTuneCombination]:
        found = []
        for kind in ("FP16", "BF16"):
            one = trtp.AutoTuneCombination(f"{kind}, {kind}, {kind}, INT64, INT64, INT64, {kind}", "LINEAR")
            one.tactics(list(tactics(capability, int(head_dim))))
            found.append(one)
        return found

    @trtp.aot_impl(FULL_NAME)
    def compiled(
        q: trtp.TensorDesc,
        k: trtp.TensorDesc,
        v: trtp.TensorDesc,
        q_positions: trtp.TensorDesc,
        kv_positions: trtp.TensorDesc,
        chunk_size: trtp.TensorDesc,
        scale: float,
        sink: int,
        left: int,
        anchors: int,
        head_dim: int,
        groups: int,
        outputs: tuple[trtp.TensorDesc],
        tactic: int,
    ) -> tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymExprs]:
        sizes = {"head_dim": int(head_dim), "groups": int(groups), "sink": int(sink), "left": int(left), "anchors": int(anchors)}
        tile = tactics(capability, int(head_dim))[tactic]
        dtype = {trt.float16: "float16", trt.bfloat16: "bfloat16"}[q.dtype]
        made = artifacts.compile_kernel(artifacts.Spec("attend", capability, dtype, scale=float(scale), tile=tile, **sizes))
        batch, width, kv_heads, slots = q.shape_expr[0], q.shape_expr[2], k.shape_expr[1], k.shape_expr[2]
        launch = trtp.KernelLaunchParams()
        launch.grid_x = trtp.cdiv(width * int(groups), tile.block_m)
        launch.grid_y = batch * kv_heads
        launch.block_x = 32 * made.num_warps
        launch.shared_mem = made.shared_bytes
        numbers = trtp.SymIntExprs.from_tuple([trtp.SymInt32(value) for value in (kv_heads, width, slots)])
        return made.entry, made.ptx, launch, numbers
