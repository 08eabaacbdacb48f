"""What the CUDA driver says of this machine: its version, its GPUs, their memory. The driver itself is asked, so that no CUDA package is
needed, and no GPU either: without a driver there is nothing to tell.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

CUDA_DRIVER = "libcuda.so.1"
MAJOR, MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
NATIVE = "native"  # in place of a compute capability: that of a GPU which nobody noted


@dataclass(frozen=True)
class Gpu:
    """A visible GPU. `free_bytes`: None where the driver does not say."""

    name: str
    compute_capability: str
    total_bytes: int
    free_bytes: int | None


def driver_version() -> tuple[int, int] | None:
    """The newest CUDA that the driver runs; None without a driver."""
    version = ctypes.c_int(0)
    driver = _driver()
    if driver is None or driver.cuDriverGetVersion(ctypes.byref(version)):
        return None
    return version.value // 1000, version.value % 1000 // 10


def num_gpus() -> int:
    """GPUs that the driver sees; 0 without a driver."""
    driver = _driver()
    return 0 if driver is None else _count(driver)


def gpus() -> list[Gpu]:
    """The GPUs that the driver sees, in its order; the first is the one that plans run on."""
    driver = _driver()
    return [] if driver is None else [_gpu(driver, ordinal) for ordinal in range(_count(driver))]


def native_capability() -> str:
    """Compute capability of the GPU that plans are built on."""
    found = gpus()
    return found[0].compute_capability if found else NATIVE


def _driver() -> Any:
    try:
        return ctypes.CDLL(CUDA_DRIVER)
    except OSError:
        return None


def _count(driver: Any) -> int:
    count = ctypes.c_int(0)
    return 0 if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) else count.value


def _gpu(driver: Any, ordinal: int) -> Gpu:
    device, major, minor, total = ctypes.c_int(0), ctypes.c_int(0), ctypes.c_int(0), ctypes.c_size_t(0)
    name = ctypes.create_string_buffer(256)
    driver.cuDeviceGet(ctypes.byref(device), ordinal)
    driver.cuDeviceGetName(name, len(name), device)
    driver.cuDeviceGetAttribute(ctypes.byref(major), MAJOR, device)
    driver.cuDeviceGetAttribute(ctypes.byref(minor), MINOR, device)
    driver.cuDeviceTotalMem_v2(ctypes.byref(total), device)
    return Gpu(name.value.decode(errors="replace"), f"{major.value}.{minor.value}", total.value, _free_bytes(driver, device))


def _free_bytes(driver: Any, device: ctypes.c_int) -> int | None:
    """Only a context is told what is free; the device's own one is borrowed."""
    context, free, total = ctypes.c_void_p(), ctypes.c_size_t(0), ctypes.c_size_t(0)
    if driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device):
        return None
    try:
        if driver.cuCtxPushCurrent_v2(context):
            return None
        failed = driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
        driver.cuCtxPopCurrent_v2(ctypes.byref(context))
        return None if failed else free.value
    finally:
        driver.cuDevicePrimaryCtxRelease_v2(device)
