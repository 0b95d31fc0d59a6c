"""Numba's compiler, which also works where no folder can keep what it compiled."""

from collections.abc import Callable
from typing import Any

import numba


def njit(*, cache: bool = False, **options: Any) -> Callable[[Callable], Callable]:
    """Return `numba.njit` as a decorator with these options.

    cache: keep the machine code for later processes, in NUMBA_CACHE_DIR, beside the source or in
    the user's cache folder. Where none of them can be written to, each process compiles anew.
    """

    def decorate(function: Callable) -> Callable:
        if cache:
            try:
                return numba.njit(cache=True, **options)(function)
            except RuntimeError as error:
                if "no locator available" not in str(error):
                    raise
        return numba.njit(**options)(function)

    return decorate
