"""Files of weights: what is in them is read, and nothing in them is run."""

import argparse
import io
import os
import pickle
import struct
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from firstlight.tasks.nn.weights import checkpoint_files
from firstlight.tasks.nn.weights.checkpoint_files import read_state_dict

WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2)}


def saved(folder: Path, content: Any, name: str = "w.pth", **options: Any) -> Path:
    torch.save(content, folder / name, **options)
    return folder / name


def is_equal(found: Any, expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", ["w.pth", "w.pt", "pytorch_model.bin", "last.ckpt", "checkpoint.pth.tar"])
@pytest.mark.parametrize("archive", [True, False], ids=["zip", "before 1.6"])
def test_state_dict_of_torch_is_read(tmp_path: Path, name: str, archive: bool) -> None:
    path = saved(tmp_path, OrderedDict(WEIGHTS), name, _use_new_zipfile_serialization=archive)
    found = read_state_dict(path)
    assert is_equal(found.tensors, WEIGHTS)
    assert (found.part, found.other_parts, len(found.sha256)) == ("", (), 64)


def test_safetensors_are_read_with_their_notes(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "w.safetensors", {"model": "resnet18"})
    found = read_state_dict(tmp_path / "w.safetensors")
    assert is_equal(found.tensors, WEIGHTS)
    assert found.notes == {"model": "resnet18"}


OTHER = {"a.weight": torch.zeros(2, 3), "a.bias": torch.zeros(2)}


@pytest.mark.parametrize(
    ("content", "part", "others"),
    [
        (
            {"state_dict": WEIGHTS, "epoch": 3, "best_acc1": torch.tensor(0.5), "optimizer": {"state": {}}},
            "state_dict",
            (),
        ),
        ({"model": WEIGHTS, "args": argparse.Namespace(lr=0.1, arch="vit")}, "model", ()),
        ({"student": OTHER, "teacher": WEIGHTS, "epoch": 1}, "teacher", ("student",)),
        ({"state_dict": OTHER, "state_dict_ema": WEIGHTS}, "state_dict_ema", ("state_dict",)),
        ({"model": {"state_dict": WEIGHTS}}, "model.state_dict", ()),
        ({"my_network": WEIGHTS, "step": 7}, "my_network", ()),
        ({"encoder": OTHER, "target_encoder": WEIGHTS}, "target_encoder", ("encoder",)),
    ],
)
def test_part_is_chosen_by_the_documented_order(
    tmp_path: Path, content: Any, part: str, others: tuple[str, ...]
) -> None:
    found = read_state_dict(saved(tmp_path, content))
    assert is_equal(found.tensors, WEIGHTS)
    assert (found.part, found.other_parts) == (part, others)


def test_another_part_is_taken_where_it_is_asked_for(tmp_path: Path) -> None:
    path = saved(tmp_path, {"student": WEIGHTS, "teacher": OTHER, "run": {"state_dict": OTHER}})
    assert is_equal(read_state_dict(path, "student").tensors, WEIGHTS)
    assert is_equal(read_state_dict(path, "run.state_dict").tensors, OTHER)
    with pytest.raises(ValueError, match=r"has no part 'tutor'; valid: 'teacher', 'student'$"):
        read_state_dict(path, "tutor")


class Call:
    """Unpickling it would call a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def shorten_storage(folder: Path) -> Path:
    """An archive that declares a tensor of 4 MB, and holds 24 bytes of it."""
    source = saved(folder, {"a": torch.ones(1_000_000)}, "large.pth")
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(folder / "s.pth", "w") as target:
        for name in archive.namelist():
            data = archive.read(name)
            target.writestr(name, data[:24] if name.endswith("data/0") else data)
    source.unlink()
    return folder / "s.pth"


def declare_storage(folder: Path) -> Path:
    """A file in the format before 1.6 that declares a storage of 10^12 numbers, and holds six."""
    path = saved(folder, {"a": torch.ones(6)}, "declared.pth", _use_new_zipfile_serialization=False)
    old = b"K\x06N"
    assert path.read_bytes().count(old) == 1
    path.write_bytes(path.read_bytes().replace(old, b"\x8a\x06" + (10**12).to_bytes(6, "little") + b"N"))
    return path


def compress(folder: Path) -> Path:
    """A zip bomb: 64 MB of zeros in a few kB."""
    source = saved(folder, {"a": torch.zeros(16_000_000)}, "large.pth")
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(folder / "b.pth", "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in archive.namelist():
            bomb.writestr(name, archive.read(name))
    source.unlink()
    return folder / "b.pth"


def overlap(folder: Path) -> Path:
    """An archive whose directory names one member a thousand times."""
    source = saved(folder, {"a": torch.ones(1000)}, "one.pth")
    with zipfile.ZipFile(source, "a") as archive:
        member = next(m for m in archive.infolist() if m.filename.endswith("data/0"))
        archive.filelist += [member] * 1000
        archive._didModify = True  # type: ignore[attr-defined]
    return source


def cut(path: Path, share: float) -> Path:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path


def write_tar(folder: Path) -> Path:
    """The format of torch 0.1.9, whose storages are files."""
    with tarfile.open(folder / "t.pth", "w") as archive:
        for name in ("sys_info", "storages", "tensors", "pickle"):
            data = pickle.dumps({"little_endian": True})
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return folder / "t.pth"


def write_bytes(folder: Path, name: str, data: bytes) -> Path:
    (folder / name).write_bytes(data)
    return folder / name


def write_safetensors(folder: Path, header: bytes, data: bytes = b"") -> Path:
    return write_bytes(folder, "h.safetensors", struct.pack("<Q", len(header)) + header + data)


def nest(depth: int) -> dict[str, Any]:
    content: dict[str, Any] = dict(WEIGHTS)
    for _ in range(depth):
        content = {"model": content}
    return content


def save_script(folder: Path) -> Path:
    torch.jit.script(nn.Linear(2, 2)).save(str(folder / "s.pt"))  # type: ignore[no-untyped-call]
    return folder / "s.pt"


def save_numpy(folder: Path) -> Path:
    with (folder / "n.pth").open("wb") as file:
        np.savez(file, a=np.ones(3))
    return folder / "n.pth"


HOSTILE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a call beside weights": (lambda f: saved(f, {**WEIGHTS, "x": Call(os.system, f"touch {f}/ran")}), "not a weight"),
    "a call before 1.6": (
        lambda f: saved(f, Call(os.system, f"touch {f}/ran"), _use_new_zipfile_serialization=False),
        "not a weight",
    ),
    "a plain pickle": (
        lambda f: write_bytes(f, "p.bin", pickle.dumps(Call(os.system, f"touch {f}/ran"), 2)),
        "not a weight",
    ),
    "eval in a nested part": (
        lambda f: saved(f, {"model": {"a": Call(eval, f"open('{f}/ran', 'w')")}}),
        "not a weight",
    ),
    "a whole network": (lambda f: saved(f, nn.Linear(2, 2)), "'torch.nn.modules.linear.Linear', which is not a weight"),
    "a compressed archive": (compress, "compressed"),
    "an overlapping archive": (overlap, "larger than the file"),
    "a storage that is cut": (shorten_storage, "not a whole checkpoint"),
    "a larger storage before 1.6": (declare_storage, "not a whole checkpoint"),
    "a view larger than the file": (lambda f: saved(f, {"a": torch.ones(1).expand(10**12)}), "larger than the file"),
    "a cut archive": (lambda f: cut(saved(f, WEIGHTS), 0.7), "not a whole checkpoint"),
    "a cut file before 1.6": (
        lambda f: cut(saved(f, WEIGHTS, _use_new_zipfile_serialization=False), 0.9),
        "not a whole checkpoint",
    ),
    "a list": (lambda f: saved(f, [torch.ones(2)]), "holds a list, not a state dict"),
    "a tensor": (lambda f: saved(f, torch.ones(2)), "holds a Tensor, not a state dict"),
    "no tensors": (lambda f: saved(f, {"epoch": 1, "lr": 0.1}), "holds no tensors by name, but 'epoch', 'lr'"),
    "names that are numbers": (lambda f: saved(f, {1: torch.ones(2)}), "holds no tensors by name, but 1"),
    "parts of parts": (lambda f: saved(f, nest(9)), "holds no tensors by name, but 'model'"),
    "a sparse tensor": (lambda f: saved(f, {"a": torch.eye(3).to_sparse()}), "'a', which is no dense tensor"),
    "TorchScript": (save_script, "not a whole checkpoint"),
    "a tar": (write_tar, "not a whole checkpoint"),
    "NumPy's arrays": (save_numpy, "not a whole checkpoint"),
    "an empty file": (lambda f: write_bytes(f, "e.pth", b""), "has 0 bytes"),
    "noise": (lambda f: write_bytes(f, "n.pth", bytes(range(256)) * 9), "not a whole checkpoint"),
    "another suffix": (lambda f: write_bytes(f, "w.npz", b"1"), "not a file of weights, by its name"),
    "no file": (lambda f: f / "absent.pth", "cannot be read: No such file"),
    "a folder": (lambda f: f.joinpath("d.pth").mkdir() or f / "d.pth", "cannot be read|bytes; valid"),
    "safetensors with a huge header": (
        lambda f: write_bytes(f, "h.safetensors", b"\xff" * 64),
        "not a whole safetensors",
    ),
    "safetensors beyond the end": (
        lambda f: write_safetensors(f, b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}', b"1234"),
        "not a whole safetensors",
    ),
    "safetensors that are a pickle": (
        lambda f: write_bytes(f, "p.safetensors", pickle.dumps(Call(os.system, f"touch {f}/ran"))),
        "not a whole safetensors",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_and_broken_files_are_refused_in_one_line(tmp_path: Path, name: str) -> None:
    build, reason = HOSTILE[name]
    path = build(tmp_path)
    with pytest.raises(ValueError, match=reason) as caught:
        read_state_dict(path)
    assert str(caught.value).startswith(repr(str(path)))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert not (tmp_path / "ran").exists(), "nothing was run"


def test_canary_would_run_where_it_is_unpickled(tmp_path: Path) -> None:
    """Otherwise its absence would say nothing."""
    pickle.loads(pickle.dumps(Call(os.system, f"touch {tmp_path}/ran")))
    assert (tmp_path / "ran").exists()


def test_environment_cannot_turn_the_restriction_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(ValueError, match="was not run"):
        read_state_dict(saved(tmp_path, Call(os.system, f"touch {tmp_path}/ran")))
    assert not (tmp_path / "ran").exists()


def test_terminal_codes_in_a_file_are_not_passed_on(tmp_path: Path) -> None:
    content = {"\x1b[31mname": 1}
    with pytest.raises(ValueError) as caught:
        read_state_dict(saved(tmp_path, content))
    assert str(caught.value).isprintable()


def test_too_large_files_are_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path, WEIGHTS)
    monkeypatch.setattr(checkpoint_files, "MAX_FILE_BYTES", 100)
    with pytest.raises(ValueError, match=r"has \d+ bytes; valid: 1 to 100$"):
        read_state_dict(path)
