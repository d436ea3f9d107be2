"""Variables of MATLAB files up to version 7. Arrays, texts and structs only: the format holds no code, and none is run."""

from pathlib import Path

import numpy as np

from firstlight.pipeline.errors import UserError


def shapes(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Variable -> shape and MATLAB's class, without reading the values.

    Raises:
        UserError: as `variable`.
    """
    from scipy.io import whosmat  # a second to import, and few sources need it

    try:
        return {name: (tuple(shape), kind) for name, shape, kind in whosmat(file)}
    except OSError:
        raise
    except Exception as error:  # scipy raises whatever its parsing of damaged bytes runs into
        raise _unreadable(file, error) from None


def variable(file: Path, name: str) -> np.ndarray:
    """The value, with at least two dimensions, as MATLAB has it.

    Raises:
        UserError: the file cannot be parsed, or has no such variable.
    """
    from scipy.io import loadmat

    try:
        found = loadmat(file, variable_names=[name])
    except OSError:
        raise
    except Exception as error:
        raise _unreadable(file, error) from None
    if name not in found:
        names = ", ".join(shapes(file)) or "no variable"
        raise UserError(f"{file}: has no variable {name!r}, but {names}; the file may be cut short")
    return np.asarray(found[name])


def integers(file: Path, name: str) -> np.ndarray:
    """The value, flat: (n,) int64. MATLAB keeps whole numbers as doubles, too.

    Raises:
        UserError: as `variable`, or a value is no whole number.
    """
    found = variable(file, name).reshape(-1)
    if found.dtype.kind not in "iuf" or not np.all(np.mod(found, 1) == 0):
        raise UserError(f"{file}: the variable {name!r} must hold whole numbers")
    return found.astype(np.int64)


def _unreadable(file: Path, error: Exception) -> UserError:
    return UserError(
        f"{file}: cannot be read as a MATLAB file up to version 7: {' '.join(str(error).split()) or type(error).__name__}"
    )
