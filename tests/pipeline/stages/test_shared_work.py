"""Work that stages share is found by its hash, and done again where what is left of it cannot be trusted."""

from pathlib import Path

import pytest
from torch import nn

from firstlight.pipeline.records import write_sealed_json
from firstlight.pipeline.stages.shared_work import (
    SHARED_FOLDER,
    find_shared_folder,
    hash_weights,
    list_shared_facts,
    share_folder,
)
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.tasks.nn.input_normalization import InputNormalization

FACTS = {"stage": {"encoder": "a", "epochs": 2, "arms": None}, "seed": 1, "from": "x", "given": "y", "decoder": "z"}


@pytest.fixture
def instance(tmp_path: Path) -> StageInstance:
    folder = tmp_path / "run" / "finetune-seed1-abc"
    (folder / "scratch-lr0.1").mkdir(parents=True)
    return StageInstance("finetune", 1, "abc", folder, facts=FACTS)


def test_shared_facts_leave_out_networks_and_own_keys(instance: StageInstance) -> None:
    assert list_shared_facts(instance, {"encoder", "arms"}) == {"stage": {"epochs": 2}, "seed": 1}


def test_work_is_found_by_its_hash_until_its_folder_is_gone(instance: StageInstance) -> None:
    done = instance.folder / "scratch-lr0.1"
    assert find_shared_folder(instance, "k1") is None
    share_folder(instance, "k1", done)
    assert find_shared_folder(instance, "k1") == done
    assert find_shared_folder(instance, "k2") is None
    done.rmdir()
    assert find_shared_folder(instance, "k1") is None


def test_an_instance_without_facts_shares_nothing(instance: StageInstance) -> None:
    alone = StageInstance("finetune", 1, "abc", instance.folder)
    share_folder(alone, "k1", instance.folder / "scratch-lr0.1")
    assert not (instance.folder.parent / SHARED_FOLDER).exists()
    share_folder(instance, "k1", instance.folder / "scratch-lr0.1")
    assert find_shared_folder(alone, "k1") is None


@pytest.mark.parametrize("folder", ["../outside", "/tmp", "finetune-seed1-abc/../../outside"])
def test_a_folder_outside_of_the_run_is_not_taken(instance: StageInstance, folder: str) -> None:
    run = instance.folder.parent
    (run.parent / "outside").mkdir()
    (run / SHARED_FOLDER).mkdir()
    write_sealed_json(run / SHARED_FOLDER / "k1.json", {"folder": folder})
    assert find_shared_folder(instance, "k1") is None


def test_a_damaged_file_is_as_none_and_is_written_anew(instance: StageInstance) -> None:
    done = instance.folder / "scratch-lr0.1"
    share_folder(instance, "k1", done)
    file = instance.folder.parent / SHARED_FOLDER / "k1.json"
    file.write_text(file.read_text().replace("scratch", "scratsh"))
    assert find_shared_folder(instance, "k1") is None
    share_folder(instance, "k1", done)
    assert find_shared_folder(instance, "k1") == done


def test_hash_of_weights_covers_colours_shapes_and_types() -> None:
    """Colours are buffers that are not saved with the weights."""
    networks: list[nn.Module] = [
        InputNormalization(mean=(0.1, 0.1, 0.1)),
        InputNormalization(mean=(0.1, 0.1, 0.2)),
        nn.Linear(2, 3, bias=False),
        nn.Linear(3, 2, bias=False),
        nn.Linear(2, 3, bias=False).double(),
    ]
    for network in networks:
        for weight in network.parameters():
            nn.init.zeros_(weight)
    assert len({hash_weights(network) for network in networks}) == len(networks)
    assert hash_weights(networks[0]) == hash_weights(InputNormalization(mean=(0.1, 0.1, 0.1)))
