"""The compiler of augmentations, numba: Python's own functions, on arrays, as machine code that needs no GIL."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
from numba import types

Function = TypeVar("Function", bound=Callable[..., Any])
# Its type stubs lack some options.
njit: Any = numba.njit
config: Any = numba.config
OPTIONS = {"nogil": True, "error_model": "numpy"}
# (pixels, numbers, weights, views), see `views.make_views`.
SIGNATURE = types.void(
    types.Array(types.uint8, 4, "C", readonly=True),
    types.Array(types.float64, 3, "C", readonly=True),
    types.Array(types.int32, 3, "C", readonly=True),
    types.Array(types.uint8, 4, "C"),
)


def compiled(function: Function) -> Function:
    """Returns a function as machine code, for others that are compiled: Python cannot call it.

    It is compiled with the first of these. Products and sums are neither fused nor put in another order, so that
    numbers are those of C.
    """
    return cast(Function, njit(**OPTIONS, no_cpython_wrapper=True, no_cfunc_wrapper=True)(function))


def compile_for_python(function: Function, folder: Path) -> Function:
    """Returns a function of `SIGNATURE` as machine code that Python can call, which is kept in `folder`.

    The functions that it calls are kept with it, so that the folder must be another one after a change of any of them.

    Raises:
        RuntimeError: numba is set not to compile.
    """
    if config.DISABLE_JIT:
        raise RuntimeError("NUMBA_DISABLE_JIT is set")
    kept, config.CACHE_DIR = config.CACHE_DIR, str(folder)
    try:
        return cast(Function, njit(SIGNATURE, **OPTIONS, cache=True)(function))
    finally:
        config.CACHE_DIR = kept
