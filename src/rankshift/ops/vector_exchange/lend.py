"""Memory of the host that GPUs read and write where it lies, by CUDA's driver.

Not by torch.cuda.cudart(): what the runtime refuses it reports again at the next launch, whoever's that is.
"""

from __future__ import annotations

import ctypes
import functools


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def lend(address: int, size: int) -> int:
    """Lend whole pages of memory to all GPUs of this process, to the current one first; they stay where they are until
    :func:`take_back`.

    Returns:
        The address that kernels use; 0 where it is refused: by a limit of locked memory, or for want of such a driver.
    """
    try:
        driver = _driver()
    except OSError:  # not Linux
        return 0
    portable_and_mapped, found = 1 | 2, ctypes.c_uint64()
    here = ctypes.c_void_p(address)
    if driver.cuMemHostRegister_v2(here, ctypes.c_size_t(size), ctypes.c_uint(portable_and_mapped)):
        return 0
    if driver.cuMemHostGetDevicePointer_v2(ctypes.byref(found), here, ctypes.c_uint(0)):
        driver.cuMemHostUnregister(here)
        return 0
    return found.value


def take_back(address: int) -> None:
    """Before such memory is freed. What GPUs do with it must have ended."""
    _driver().cuMemHostUnregister(ctypes.c_void_p(address))
