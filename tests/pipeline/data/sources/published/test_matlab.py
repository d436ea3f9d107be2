"""Variables of MATLAB files."""

from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from firstlight.pipeline.data.sources.published.matlab import read_integers, read_shapes, read_variable
from firstlight.pipeline.errors import UserError


def test_variables_and_shapes_are_read(tmp_path: Path) -> None:
    values = np.arange(6, dtype=np.uint8).reshape(1, 2, 3)
    savemat(tmp_path / "x.mat", {"a": values, "b": np.array([[1.0], [2.0]])})
    assert read_shapes(tmp_path / "x.mat") == {"a": ((1, 2, 3), "uint8"), "b": ((2, 1), "double")}
    np.testing.assert_array_equal(read_variable(tmp_path / "x.mat", "a"), values)
    integers = read_integers(tmp_path / "x.mat", "b")
    assert (integers.dtype, integers.tolist()) == (np.int64, [1, 2])


def test_missing_variable_lists_variables(tmp_path: Path) -> None:
    savemat(tmp_path / "x.mat", {"a": np.zeros(1)})
    with pytest.raises(UserError, match=r"x\.mat: has no variable 'b', but a; the file may be cut short"):
        read_variable(tmp_path / "x.mat", "b")


@pytest.mark.parametrize("values", [np.array([1.5]), np.array(["a"]), np.array([np.nan])])
def test_values_that_are_not_whole_raise(tmp_path: Path, values: np.ndarray) -> None:
    savemat(tmp_path / "x.mat", {"a": values})
    with pytest.raises(UserError, match=r"the variable 'a' must hold whole numbers"):
        read_integers(tmp_path / "x.mat", "a")


@pytest.mark.parametrize("content", [b"", b"no MATLAB file" * 20])
def test_damaged_file_raises_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.mat").write_bytes(content)
    for read in (lambda file: read_shapes(file), lambda file: read_variable(file, "a")):
        with pytest.raises(UserError, match=r"x\.mat: cannot be read as a MATLAB file up to version 7: ") as error:
            read(tmp_path / "x.mat")
        assert len(str(error.value).splitlines()) == 1


def test_missing_file_raises_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Reader needs file name"):
        read_variable(tmp_path / "x.mat", "a")
