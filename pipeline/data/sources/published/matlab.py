"""Variables of MATLAB files up to version 7.

Only arrays, texts and structs are read. The format holds no code, and none is run.
"""

from pathlib import Path

import numpy as np

from firstlight.pipeline.errors import UserError, one_line


def read_shapes(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Returns the name of each variable -> its shape and MATLAB's class, without reading the values.

    Raises:
        UserError: as `read_variable`.
    """
    # The import takes a second, and most sources do not need it
    from scipy.io import whosmat

    try:
        return {name: (tuple(shape), kind) for name, shape, kind in whosmat(file)}
    except OSError:
        raise
    # Damaged bytes make scipy raise almost any exception
    except Exception as error:
        raise _make_matlab_error(file, error) from None


def read_variable(file: Path, name: str) -> np.ndarray:
    """Returns the value of a variable, with at least two dimensions, as in MATLAB.

    Raises:
        UserError: the file cannot be parsed, or has no such variable.
    """
    from scipy.io import loadmat

    try:
        found = loadmat(file, variable_names=[name])
    except OSError:
        raise
    except Exception as error:
        raise _make_matlab_error(file, error) from None
    if name not in found:
        names = ", ".join(read_shapes(file)) or "no variable"
        raise UserError(f"{file}: has no variable {name!r}, but {names}; the file may be cut short")
    return np.asarray(found[name])


def read_integers(file: Path, name: str) -> np.ndarray:
    """Returns a variable as (n,) int64. MATLAB also stores whole numbers as doubles.

    Raises:
        UserError: a value is no whole number, or as `read_variable`.
    """
    found = read_variable(file, name).reshape(-1)
    if found.dtype.kind not in "iuf" or not np.all(np.mod(found, 1) == 0):
        raise UserError(f"{file}: the variable {name!r} must hold whole numbers")
    return found.astype(np.int64)


def _make_matlab_error(file: Path, error: Exception) -> UserError:
    reason = one_line(error) or type(error).__name__
    return UserError(f"{file}: cannot be read as a MATLAB file up to version 7: {reason}")
