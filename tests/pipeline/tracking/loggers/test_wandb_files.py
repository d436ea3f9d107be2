"""Reading of W&B's files, which are logs of LevelDB."""

import struct
from pathlib import Path

import pytest

from firstlight.pipeline.tracking.loggers.wandb_files import (
    BLOCK_BYTES,
    STEP_KEY,
    iterate_wandb_records,
    read_wandb_logs,
)

pb = pytest.importorskip("wandb.proto.wandb_internal_pb2")


def write_log(file: Path, payloads: list[bytes]) -> None:
    """Writes records as LevelDB does: parts that fill blocks of 32 KiB, each behind a header."""
    data = bytearray(struct.pack("<4sHB", b":W&B", 0xBEE1, 0))
    for payload in payloads:
        is_first, rest = True, payload
        while is_first or rest:
            left = BLOCK_BYTES - len(data) % BLOCK_BYTES
            if left < 7:
                data += bytes(left)
                continue
            part, rest = rest[: left - 7], rest[left - 7 :]
            kind = {(True, True): 1, (True, False): 2, (False, False): 3, (False, True): 4}[is_first, not rest]
            data += struct.pack("<IHB", 0, len(part), kind) + part
            is_first = False
    file.parent.mkdir(parents=True)
    file.write_bytes(data)


def make_record(step: int, text: str = "", **items: str) -> bytes:
    record = pb.Record()
    for key, value in {"_step": str(step), STEP_KEY: str(10 * step), "text": f'"{text}"', **items}.items():
        item = record.history.item.add(value_json=value)
        # The key of an image has parts, as W&B writes it: "figures/x", "sha256"
        item.nested_key.extend(key.split("|"))
    return bytes(record.SerializeToString())


@pytest.mark.parametrize("size", [10, 32_700, 100_000])
def test_records_over_several_blocks_are_whole(tmp_path: Path, size: int) -> None:
    payloads = [make_record(k, "x" * (size + k)) for k in range(9)]
    write_log(tmp_path / "a" / "run.wandb", payloads)
    file = tmp_path / "a" / "run.wandb"
    assert [record.SerializeToString() for record in iterate_wandb_records(file)] == payloads
    file.write_bytes(file.read_bytes()[:-3])
    assert len(list(iterate_wandb_records(file))) == 8, "a torn last record is left out"
    file.write_bytes(b"something else")
    assert not list(iterate_wandb_records(file))


def test_logs_of_a_run_are_read_together(tmp_path: Path) -> None:
    image = {"figures/x|_type": '"image-file"', "figures/x|sha256": '"ab"', "figures/x|size": "9"}
    first = [make_record(0, "1", loss="0.5", odd='"NaN"'), make_record(1, "2", loss="0.25")]
    write_log(tmp_path / "wandb" / "offline-run-20260101_000000-r1" / "run-r1.wandb", first)
    second = [make_record(2, "3", **image, **{"big": '"Infinity"'})]
    write_log(tmp_path / "wandb" / "run-20260101_000001-r1" / "run-r1.wandb", second)
    write_log(tmp_path / "wandb" / "run-20260101_000001-r2" / "run-r2.wandb", [make_record(7, "4", loss="1")])
    found = read_wandb_logs(tmp_path, "r1")
    assert {number for number in found.numbers if number[0] != "odd"} == {
        ("loss", 0, 0.5),
        ("loss", 10, 0.25),
        ("big", 20, float("inf")),
    }
    assert "odd" in {number[0] for number in found.numbers}
    assert found.images == [("figures/x", "ab")]
    assert found.num_rows == 3
