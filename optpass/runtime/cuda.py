"""The first NVIDIA GPU through its driver alone, so that an engine needs neither torch nor a CUDA package to run."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

DRIVERS = ("libcuda.so.1", "nvcuda.dll")

MAJOR, MINOR = 75, 76
"""Attributes of a device that make up its compute capability."""


@functools.cache
def _driver() -> Any:
    for name in DRIVERS:
        try:
            found = ctypes.CDLL(name)
        except OSError:
            continue
        if found.cuInit(0) == 0:
            return found
    return None


@functools.cache
def device() -> str:
    """The GPU by its compute capability, such as ``sm_89``; empty where there is none."""
    driver, handle, value = _driver(), ctypes.c_int(), ctypes.c_int()
    if driver is None or driver.cuDeviceGet(ctypes.byref(handle), 0) != 0:
        return ""
    parts = []
    for attribute in (MAJOR, MINOR):
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, handle) != 0:
            return ""
        parts.append(str(value.value))
    return f"sm_{''.join(parts)}"


def named(target: Sequence[str]) -> list[str]:
    """The GPUs among what an engine is built for, which may be features of a CPU too."""
    return [name for name in target if name.startswith("sm_")]


def unfit(target: Sequence[str]) -> str:
    """Why what is built for some GPUs cannot run here, in words that follow its name; empty where it can."""
    here, gpus = device(), named(target)
    if not gpus:
        return "" if here else "needs an NVIDIA GPU, and here is none"
    return "" if here in gpus else f"is built for {', '.join(gpus)}, and here is {here or 'no NVIDIA GPU'}"


class Memory:
    """Buffers on the GPU by name, kept from call to call, and a stream on which all is done in order.

    Raises:
        RuntimeError: of any method, where the driver refuses; with its number.
    """

    def __init__(self) -> None:
        self.driver = _driver()
        self.sizes: dict[str, int] = {}
        self.addresses: dict[str, ctypes.c_uint64] = {}
        handle, context, stream = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        self._do("cuDeviceGet", ctypes.byref(handle), 0)
        self._do("cuDevicePrimaryCtxRetain", ctypes.byref(context), handle)
        self.context = context
        self.enter()
        self._do("cuStreamCreate", ctypes.byref(stream), 1)
        self.stream = stream

    def enter(self) -> None:
        """Make the GPU that of this thread."""
        self._do("cuCtxSetCurrent", self.context)

    def address(self, name: str, size: int) -> int:
        """A buffer of at least ``size`` bytes."""
        size = max(size, 1)
        if self.sizes.get(name, 0) < size:
            if name in self.addresses:
                self._do("cuMemFree_v2", self.addresses.pop(name))
            made = ctypes.c_uint64()
            self._do("cuMemAlloc_v2", ctypes.byref(made), ctypes.c_size_t(size))
            self.addresses[name], self.sizes[name] = made, size
        return int(self.addresses[name].value)

    def upload(self, name: str, array: NDArray[Any]) -> int:
        """Copy an array to a buffer, whose address is returned."""
        address = self.address(name, array.nbytes)
        if array.nbytes:
            source = ctypes.c_void_p(array.ctypes.data)
            self._do("cuMemcpyHtoD_v2", ctypes.c_uint64(address), source, ctypes.c_size_t(array.nbytes))
        return address

    def download(self, name: str, shape: Sequence[int], dtype: Any) -> NDArray[Any]:
        """Copy a buffer to a new array, when all that was asked for is done."""
        array = np.empty(tuple(shape), dtype)
        self._do("cuStreamSynchronize", self.stream)
        if array.nbytes:
            target = ctypes.c_void_p(array.ctypes.data)
            self._do("cuMemcpyDtoH_v2", target, self.addresses[name], ctypes.c_size_t(array.nbytes))
        return array

    def _do(self, function: str, *args: Any) -> None:
        code = getattr(self.driver, function)(*args)
        if code:
            raise RuntimeError(f"{function} of the NVIDIA driver fails with error {code}")
