"""What the CUDA driver says of its GPUs. The driver's library is loaded when it is first needed."""

from __future__ import annotations

import ctypes
import itertools


class Driver:
    """The GPUs that the driver shows to this process, by CUDA's ordinals."""

    def __init__(self) -> None:
        """Loads the driver. Raises OSError if there is none, or if it does not work."""
        self._cuda = ctypes.CDLL("libcuda.so.1")
        self._call("cuInit", 0)
        self.num_gpus = self._int("cuDeviceGetCount")

    @property
    def version(self) -> str:
        """The newest version of CUDA that the driver supports."""
        version = self._int("cuDriverGetVersion")
        return f"{version // 1000}.{version % 1000 // 10}"

    def total_bytes(self, gpu: int) -> int:
        total = ctypes.c_size_t()
        self._call("cuDeviceTotalMem_v2", ctypes.byref(total), self._device(gpu))
        return total.value

    def peer_access(self) -> list[list[bool]]:
        """Whether the first GPU can read and write the memory of the second."""
        reaches = [[True] * self.num_gpus for _ in range(self.num_gpus)]
        for a, b in itertools.permutations(range(self.num_gpus), 2):
            devices = (self._device(a), self._device(b))
            reaches[a][b] = bool(self._int("cuDeviceCanAccessPeer", *devices))
        return reaches

    def _device(self, gpu: int) -> int:
        return self._int("cuDeviceGet", gpu)

    def _int(self, name: str, *args: int) -> int:
        value = ctypes.c_int()
        self._call(name, ctypes.byref(value), *args)
        return value.value

    def _call(self, name: str, *args: object) -> None:
        status = getattr(self._cuda, name)(*args)
        if status:
            raise OSError(f"{name} returned CUDA error {status}")
