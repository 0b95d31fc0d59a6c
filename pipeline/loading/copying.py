"""Copies of bytes by their addresses, compiled, so that threads do not wait for each other."""

from typing import Any

import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from pipeline.compiled import njit


@intrinsic
def _copy(_typing: Any, _target: Any, _source: Any, _count: Any) -> Any:
    """Copy so many bytes from address `_source` to address `_target`, as C's memcpy."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        target, source = (builder.inttoptr(each, cgutils.voidptr_t) for each in arguments[:2])
        cgutils.raw_memcpy(builder, target, source, arguments[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@njit(cache=True, nogil=True)
def copy_bytes(addresses: np.ndarray, out: np.ndarray) -> None:
    """Fill each row of `out`, uint8 [N, n], contiguous, with the n bytes at its address, int64 [N].
    Nothing checks the addresses: the caller must have, and must keep that memory mapped."""
    target, count = out.ctypes.data, out.shape[1]
    for n in range(len(addresses)):
        _copy(target + n * count, addresses[n], count)
