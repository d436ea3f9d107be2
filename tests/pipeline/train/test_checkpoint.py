"""Checkpoints survive kills, damage and full disks, and are read by any number of workers."""

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from firstlight.pipeline.data.mirror import mirror as mirror_module
from firstlight.pipeline.data.mirror.places import CACHE_VARIABLE, find_mirror, place_storage
from firstlight.pipeline.data.sources import remote_files
from firstlight.pipeline.errors import StopTraining
from firstlight.pipeline.records import write_sealed_json
from firstlight.pipeline.train.checkpoint import Checkpoints, pack_state, unpack_state
from firstlight.pipeline.train.folder_manifest import FOLDER_MANIFEST, write_file
from firstlight.tasks.collective import rank
from tests.support.clean_process import run_in_clean_process
from tests.support.gloo import Pool
from tests.support.object_server import ObjectServer, serve_objects
from tests.support.state_hash import hash_state


def state(step: int) -> dict[str, Any]:
    weights = torch.arange(12, dtype=torch.float32).view(3, 4) * step
    return {
        "model": {"w": weights},
        "optimizer": {"state": {0: {"step": torch.tensor(float(step)), "b": None}}, "groups": [{"lr": 0.1, "p": [0]}]},
    }


def shard(step: int) -> dict[str, dict[str, torch.Tensor]]:
    return {"assignment": {"ids": torch.arange(5), "rows": torch.arange(5) + step}}


def save(folder: Path, *steps: int) -> Checkpoints:
    checkpoints = Checkpoints(folder)
    for step in steps:
        checkpoints.save(step, state(step), shard(step), {"plan": "p"})
    return checkpoints


nested = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=4)
    | st.integers(1, 4).map(torch.arange),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=4), nested))
def test_unpack_state_inverts_pack_state(value: dict[str, Any]) -> None:
    tensors: dict[str, torch.Tensor] = {}
    back = unpack_state(json.loads(json.dumps(pack_state(value, tensors))), tensors)
    assert hash_state(back) == hash_state(value)


def test_newest_checkpoint_equals_the_saved_state(tmp_path: Path) -> None:
    found, complaints = save(tmp_path, 3, 7).read_newest()
    assert found is not None
    assert (found.step, complaints) == (7, [])
    assert hash_state(found.shared) == hash_state(state(7))
    assert hash_state(found.shards[0]) == hash_state(shard(7))
    assert hash_state(found.shared) != hash_state(state(3))


@pytest.mark.fault(19, "leftovers of a killed save")
def test_two_newest_checkpoints_are_kept_and_leftovers_deleted(tmp_path: Path) -> None:
    (tmp_path / "step-000000002-dead").mkdir(parents=True)
    save(tmp_path, 1, 2, 3)
    assert sorted(p.name[:14] for p in tmp_path.iterdir()) == ["step-000000002", "step-000000003"]


@pytest.mark.fault(19, "no manifest yet")
def test_folder_without_manifest_does_not_count(tmp_path: Path) -> None:
    checkpoints = save(tmp_path, 1, 2)
    (max(tmp_path.iterdir()) / FOLDER_MANIFEST).unlink()
    found, complaints = checkpoints.read_newest()
    assert found is not None
    assert (found.step, complaints) == (1, [])


def save_until_killed(folder: Path, done: Path) -> None:
    """Save one after the other, and say after each that it is there, until somebody kills."""
    checkpoints = Checkpoints(folder)
    for step in range(1, 100_000):
        checkpoints.save(step, state(step), shard(step), {"plan": "p"})
        with open(done, "a", encoding="utf-8") as file:
            file.write(f"{step}\n")


@pytest.mark.fault(19, "20 kills at random moments of a save")
def test_killed_save_keeps_what_was_saved_before(tmp_path: Path) -> None:
    rng, cut = random.Random(0), 0
    for attempt in range(20):
        folder, done = tmp_path / f"{attempt}", tmp_path / f"done{attempt}"
        pid = os.fork()
        if pid == 0:
            save_until_killed(folder, done)
            os._exit(1)
        while not done.exists():
            time.sleep(0.001)
        time.sleep(rng.uniform(0.0, 0.1))
        os.kill(pid, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        last = int(done.read_text().splitlines()[-1])
        cut += sum(not (begun / FOLDER_MANIFEST).exists() for begun in folder.iterdir())
        found, complaints = Checkpoints(folder).read_newest()
        assert found is not None
        assert complaints == []
        assert found.step in (last, last + 1), "what was said to be saved, or what was saved before it could be said"
        assert hash_state([found.shared, found.shards[0]]) == hash_state([state(found.step), shard(found.step)])
        save(folder, found.step + 1)
        assert all((left / FOLDER_MANIFEST).exists() for left in folder.iterdir()), (
            "the next save sweeps what was begun"
        )
    assert cut, "some of them in the middle of a save"


FILES = ["shared.json", "shared.safetensors", "shard-00000-of-00001.safetensors", FOLDER_MANIFEST]


@pytest.mark.fault(17, "a file is cut, empty or gone")
@pytest.mark.fault(18, "a bit of any file")
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "gone"])
def test_damaged_file_is_named_and_earlier_checkpoint_is_read(tmp_path: Path, file: str, damage: str) -> None:
    checkpoints = save(tmp_path, 1, 2)
    path = max(tmp_path.iterdir()) / file
    if damage == "gone" and file == FOLDER_MANIFEST:
        pytest.skip("a folder without a manifest is not a checkpoint")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes({"flip": bytes(data), "cut": path.read_bytes()[:-1], "empty": b"", "gone": b""}[damage])
    if damage == "gone":
        path.unlink()
    found, complaints = checkpoints.read_newest()
    assert found is not None
    assert found.step == 1
    assert len(complaints) == 1
    assert str(path) in complaints[0]


@pytest.mark.fault(18, "60 random bits")
def test_any_flipped_bit_is_detected(tmp_path: Path) -> None:
    checkpoints = save(tmp_path, 1, 2)
    folder = max(tmp_path.iterdir())
    rng = random.Random(0)
    for _ in range(60):
        path = folder / rng.choice(FILES)
        data = path.read_bytes()
        changed = bytearray(data)
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(changed))
        found, _ = checkpoints.read_newest()
        assert found is not None
        assert found.step == 1
        path.write_bytes(data)
    found, _ = checkpoints.read_newest()
    assert found is not None
    assert found.step == 2


@pytest.mark.fault(18, "a bit of a checkpoint's manifest")
@pytest.mark.parametrize("change", [{"step": 9}, {"step": 10**9}, {"world": 2}, {"plan": "other"}])
def test_changed_number_of_a_manifest_is_named_and_earlier_checkpoint_is_read(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    """The number changes as by one bit: the sum in the manifest stays."""
    checkpoints = save(tmp_path, 1, 2)
    path = max(tmp_path.iterdir()) / FOLDER_MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    found, (complaint,) = checkpoints.read_newest()
    assert found is not None
    assert found.step == 1
    assert complaint == f"{path}: is damaged: its content differs from its sum"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"step": 9}, "it says step 9, its folder 2"),
        ({"world": 2}, "has 1 of 2 shards"),
        ({"world": 0}, "world = 0: must be greater than or equal to 1"),
        ({"step": "2"}, "step = '2': must be a valid integer"),
        ({"files": [1]}, "files = [1]: must be a valid dictionary"),
        ({"files": {"shared.json": {"bytes": -1, "sha256": "0" * 64}}}, "bytes = -1: must be greater"),
        ({"files": {"../x": {"bytes": 1, "sha256": "0" * 64}}}, "no file of its folder"),
    ],
)
def test_manifest_without_a_sum_is_checked_against_the_folder_and_the_shape(
    tmp_path: Path, change: dict[str, Any], problem: str
) -> None:
    """Earlier versions wrote manifests without a sum."""
    checkpoints = save(tmp_path, 1, 2)
    path = max(tmp_path.iterdir()) / FOLDER_MANIFEST
    earlier = {key: value for key, value in json.loads(path.read_text()).items() if key != "sum"}
    path.write_text(json.dumps(earlier))
    found, complaints = checkpoints.read_newest()
    assert found is not None
    assert (found.step, complaints) == (2, [])
    path.write_text(json.dumps({**earlier, **change}))
    found, (complaint,) = checkpoints.read_newest()
    assert found is not None
    assert found.step == 1
    assert problem in complaint
    assert str(path.parent) in complaint


@pytest.mark.parametrize("layout", [[], 3, {"$dict": 5}, {"$dict": [[1]]}, {"$dict": [[[], 1]]}, {"$tensor": "none"}])
def test_wrong_layout_with_right_sums_is_named(tmp_path: Path, layout: Any) -> None:
    checkpoints = save(tmp_path, 1, 2)
    folder = max(tmp_path.iterdir())
    manifest = json.loads((folder / FOLDER_MANIFEST).read_text())
    manifest["files"] |= write_file(folder, "shared.json", json.dumps(layout).encode())
    write_sealed_json(folder / FOLDER_MANIFEST, manifest)
    found, (complaint,) = checkpoints.read_newest()
    assert found is not None
    assert found.step == 1
    assert str(folder) in complaint


def test_other_files_and_folders_beside_checkpoints_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / FOLDER_MANIFEST).write_text("{}")
    folder = tmp_path / "checkpoints"
    save(folder, 1)
    (folder / "step-000000009-beef").write_text("a file")
    (folder / "step-000000008-beef").symlink_to(tmp_path / "elsewhere")
    (folder / "step-by-step").mkdir()
    found, complaints = save(folder, 2, 3, 4).read_newest()
    assert found is not None
    assert (found.step, complaints) == (4, [])
    assert (tmp_path / "elsewhere" / FOLDER_MANIFEST).exists()
    assert len(list(folder.iterdir())) == 2 + 3


def test_steps_of_ten_digits_come_after_those_of_nine(tmp_path: Path) -> None:
    found, _ = save(tmp_path, 999_999_999, 1_000_000_000).read_newest()
    assert found is not None
    assert found.step == 1_000_000_000


@pytest.mark.fault(17, "no whole checkpoint is left")
def test_only_damaged_checkpoints_raise(tmp_path: Path) -> None:
    checkpoints = save(tmp_path, 1)
    next(tmp_path.glob("*/shared.json")).write_text("{}")
    with pytest.raises(StopTraining, match=r"shared\.json.*no whole checkpoint is left"):
        checkpoints.read_newest()


class Canary:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("canary-acted"),))


@pytest.mark.fault(51, "a pickle in a checkpoint")
def test_pickle_in_a_checkpoint_is_never_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = save(tmp_path, 1, 2)
    folder = max(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    torch.save(Canary(), folder / "shared.safetensors")
    manifest = json.loads((folder / FOLDER_MANIFEST).read_text())
    data = (folder / "shared.safetensors").read_bytes()
    manifest["files"]["shared.safetensors"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    write_sealed_json(folder / FOLDER_MANIFEST, manifest)
    found, complaints = checkpoints.read_newest()
    assert found is not None
    assert found.step == 1
    assert "Safetensor" in complaints[0]
    assert not (tmp_path / "canary-acted").exists()


def save_on_full_disk(folder: Path, message: Path) -> None:
    """Saves a checkpoint that is larger than files may be, and writes the error to `message`."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    try:
        Checkpoints(folder).save(2, {"w": torch.zeros(10_000)}, {}, {"plan": "p"})
    except StopTraining as error:
        message.write_text(str(error))


@pytest.mark.fault(16, "full disk: a checkpoint")
def test_full_disk_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    """RLIMIT_FSIZE makes writes fail as a full disk does; in a child, since it cannot be taken back."""
    save(tmp_path / "checkpoints", 1)
    message = tmp_path / "message.txt"
    assert run_in_clean_process(save_on_full_disk, tmp_path / "checkpoints", message) == 0
    assert "the checkpoint of step 2 cannot be written: File too large" in message.read_text()
    found, complaints = Checkpoints(tmp_path / "checkpoints").read_newest()
    assert found is not None
    assert (found.step, complaints) == (1, [])
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


def save_on_this_rank(folder: str) -> tuple[int, int]:
    checkpoints = Checkpoints(Path(folder))
    checkpoints.save(
        4, state(4), {"assignment": {"ids": torch.tensor([rank()]), "rows": torch.tensor([10 + rank()])}}, {"plan": "p"}
    )
    found, _ = checkpoints.read_newest()
    assert found is not None
    return found.step, len(found.shards)


def test_each_worker_writes_a_shard_and_one_reads_all(pool: Pool, tmp_path: Path) -> None:
    assert pool.run(save_on_this_rank, str(tmp_path)) == [(4, 2), (4, 2)]
    found, _ = Checkpoints(tmp_path).read_newest()
    assert found is not None
    assert [int(s["assignment"]["rows"]) for s in found.shards] == [10, 11]
    folder = next(tmp_path.iterdir())
    shutil.move(folder / "shard-00001-of-00002.safetensors", tmp_path / "elsewhere")
    with pytest.raises(StopTraining, match=r"shard-00001-of-00002\.safetensors: is missing"):
        Checkpoints(tmp_path).read_newest()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ObjectServer]:
    with serve_objects(tmp_path / "cache") as server:
        yield server


URI = "s3://bucket/runs"
IN_BUCKET = "runs/small/pretrain-seed0-ab/checkpoints"


def place_checkpoints() -> Path:
    return place_storage(URI) / "small" / "pretrain-seed0-ab" / "checkpoints"


def list_uploaded() -> dict[int, list[str]]:
    """Returns the names of the objects of each checkpoint in the bucket, by its step."""
    mirror, found = find_mirror(place_checkpoints()), dict[int, list[str]]()
    assert mirror is not None
    for name in mirror.list_files(place_checkpoints()):
        folder, _, file = name.partition("/")
        found.setdefault(int(folder.split("-")[1]), []).append(file)
    return found


def name_in_bucket(step: int, file: str) -> str:
    mirror = find_mirror(place_checkpoints())
    assert mirror is not None
    (folder,) = {name.partition("/")[0] for name in mirror.list_files(place_checkpoints()) if f"-{step:09d}-" in name}
    return f"{IN_BUCKET}/{folder}/{file}"


def test_checkpoints_are_uploaded_and_old_ones_removed(server: ObjectServer) -> None:
    save(place_checkpoints(), 1, 2, 3)
    files = ["contents.json", "manifest.json", "shard-00000-of-00001.safetensors", "shared.json", "shared.safetensors"]
    assert list_uploaded() == {2: files, 3: files}
    shutil.rmtree(place_storage(URI))
    found, complaints = Checkpoints(place_checkpoints()).read_newest()
    assert found is not None
    assert (found.step, complaints) == (3, [])
    assert torch.equal(found.shared["model"]["w"], state(3)["model"]["w"])
    # The one that was not needed was not downloaded.
    assert len(list(place_checkpoints().iterdir())) == 1
    save(place_checkpoints(), 4)
    assert list_uploaded().keys() == {3, 4}


@pytest.mark.fault(57, "killed before the record of a checkpoint was uploaded")
def test_half_uploaded_checkpoint_is_not_taken(server: ObjectServer) -> None:
    save(place_checkpoints(), 1, 2)
    server.delete(name_in_bucket(2, "contents.json"))
    shutil.rmtree(place_storage(URI))
    found, complaints = Checkpoints(place_checkpoints()).read_newest()
    assert found is not None
    assert (found.step, complaints) == (1, [])
    # The next save removes what was left of it.
    save(place_checkpoints(), 3)
    assert list_uploaded().keys() == {1, 3}


@pytest.mark.fault(58, "a changed byte in a checkpoint in a bucket")
@pytest.mark.parametrize("file", ["shared.safetensors", "shared.json", "manifest.json", "contents.json"])
def test_damaged_object_of_a_checkpoint_is_not_taken(file: str, server: ObjectServer) -> None:
    save(place_checkpoints(), 1, 2)
    name = name_in_bucket(2, file)
    server.flip_byte(name)
    shutil.rmtree(place_storage(URI))
    found, complaints = Checkpoints(place_checkpoints()).read_newest()
    assert found is not None
    assert found.step == 1
    (line,) = complaints
    assert line.startswith(f"s3://bucket/{name}: is damaged")
    server.flip_byte(name_in_bucket(1, file))
    shutil.rmtree(place_storage(URI))
    with pytest.raises(StopTraining, match=rf"delete s3://bucket/{IN_BUCKET} and /.*/checkpoints to train from the be"):
        Checkpoints(place_checkpoints()).read_newest()


@pytest.mark.fault(59, "no connection while a checkpoint is saved")
def test_checkpoint_that_cannot_be_uploaded_is_noted(server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = save(place_checkpoints(), 1)
    monkeypatch.setattr(remote_files, "READ_ATTEMPTS", 1)
    server.stop()
    (line,) = checkpoints.save(2, state(2), shard(2), {"plan": "p"})
    assert line.startswith("s3://bucket/runs/small/pretrain-seed0-ab/checkpoints/step-000000002-")
    assert "is not uploaded: OSError: " in line
    assert line.endswith("; the training goes on")
    found, _ = Checkpoints(place_checkpoints()).read_newest()
    assert found is not None
    assert found.step == 2, "it is on this machine"
    server.start()
    monkeypatch.setattr(mirror_module, "REST_S", 0.0)
    assert checkpoints.save(3, state(3), shard(3), {"plan": "p"}) == []
    assert list_uploaded().keys() == {1, 3}


def save_on_machine_of_rank(environment: dict[str, str], cache: str, step: int) -> list[str]:
    """Saves from a rank whose working folder no other rank sees. Returns the names of its checkpoints and files."""
    os.environ.update({**environment, CACHE_VARIABLE: f"{cache}/{rank()}"})
    rows = {"assignment": {"ids": torch.tensor([rank()]), "rows": torch.tensor([10 * step + rank()])}}
    assert Checkpoints(place_checkpoints(), keep=1).save(step, state(step), rows, {"plan": "p"}) == []
    return sorted(f"{path.parent.name.split('-')[1]}/{path.name}" for path in place_checkpoints().glob("*/*"))


def read_on_machine_of_rank(environment: dict[str, str], cache: str) -> tuple[int, list[int]]:
    os.environ.update({**environment, CACHE_VARIABLE: f"{cache}/{rank()}"})
    found, _ = Checkpoints(place_checkpoints()).read_newest()
    assert found is not None
    return found.step, [int(shard["assignment"]["rows"]) for shard in found.shards]


def test_ranks_on_two_machines_upload_their_own_files(pool: Pool, server: ObjectServer, tmp_path: Path) -> None:
    cache = str(tmp_path / "machines")
    pool.run(save_on_machine_of_rank, server.environment, cache, 1)
    first, second = pool.run(save_on_machine_of_rank, server.environment, cache, 2)
    own = ["manifest.json", "shard-00000-of-00002.safetensors", "shared.json", "shared.safetensors"]
    assert first == [f"000000002/{name}" for name in own]
    assert second == ["000000002/shard-00001-of-00002.safetensors"], "the earlier one is removed on each machine"
    assert list_uploaded() == {2: sorted(["contents.json", "shard-00001-of-00002.safetensors", *own])}
    # Each has the files of the other now, and a third machine all of them.
    assert pool.run(read_on_machine_of_rank, server.environment, cache) == [(2, [20, 21])] * 2
    assert pool.run(read_on_machine_of_rank, server.environment, f"{cache}-new") == [(2, [20, 21])] * 2
    server.flip_byte(name_in_bucket(2, "shard-00001-of-00002.safetensors"))
    with pytest.raises(AssertionError, match=r"shard-00001-of-00002\.safetensors: is damaged"):
        pool.run(read_on_machine_of_rank, server.environment, f"{cache}-third")
