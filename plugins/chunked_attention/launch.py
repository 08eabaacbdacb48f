"""PTX on a GPU through the driver alone, as TensorRT launches an ahead-of-time plugin: input pointers, int32 numbers, output pointers.

What is launched is the text that ships (`artifacts`), not what Triton would compile for itself. The library is libcuda, or a stand-in.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from trtllm_thoughtx.plugins.chunked_attention.artifacts import Artifact

MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
DEFAULT_SHARED = 48 << 10  # what a kernel may use without asking


class DriverError(RuntimeError):
    """A call of the driver failed; the message has its name and status."""


class Kernel:
    """One loaded kernel. Needs a current context (torch makes one). Use as a context manager."""

    def __init__(self, artifact: Artifact, library: str = "libcuda.so.1") -> None:
        self.artifact = artifact
        try:
            self._cuda = ctypes.CDLL(library)
        except OSError as error:
            raise DriverError(f"{library} cannot be loaded: {error}") from None
        self._module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(self._module), ctypes.c_char_p(artifact.ptx.encode()))
        self._call("cuModuleGetFunction", ctypes.byref(self._function), self._module, artifact.entry.encode())
        if artifact.shared_bytes > DEFAULT_SHARED:
            self._call("cuFuncSetAttribute", self._function, MAX_DYNAMIC_SHARED, artifact.shared_bytes)

    def _call(self, name: str, *args: Any) -> None:
        status = getattr(self._cuda, name)(*args)
        if status:
            raise DriverError(f"{name} of {self.artifact.name}: status {status}")

    def launch(
        self, grid: tuple[int, int, int], inputs: Sequence[int], numbers: Sequence[int], outputs: Sequence[int], stream: int = 0
    ) -> None:
        """Addresses of inputs, int32 numbers, addresses of outputs; ValueError when there are not as many as the kernel declares."""
        values: list[Any] = [ctypes.c_void_p(address) for address in inputs]
        values += [ctypes.c_int32(number) for number in numbers]
        values += [ctypes.c_void_p(address) for address in outputs]
        if len(values) != self.artifact.num_params:
            raise ValueError(f"{self.artifact.name} takes {self.artifact.num_params} parameters, got {len(values)}")
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.cast(ctypes.pointer(value), ctypes.c_void_p) for value in values))
        sizes = [ctypes.c_uint(n) for n in (*grid, 32 * self.artifact.num_warps, 1, 1, self.artifact.shared_bytes)]
        self._call("cuLaunchKernel", self._function, *sizes, ctypes.c_void_p(stream), pointers, None)

    def close(self) -> None:
        if self._module:
            self._call("cuModuleUnload", self._module)
            self._module = ctypes.c_void_p()

    def __enter__(self) -> Kernel:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
