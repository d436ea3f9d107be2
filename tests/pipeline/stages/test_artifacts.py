import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from firstlight.pipeline.errors import UserError
from firstlight.pipeline.stages.artifacts import (
    SavedTable,
    check_encoder_spec,
    check_untrusted_encoder,
    load_encoder,
    load_table,
    read_encoder_spec,
    save_encoder,
    save_table,
    trace_weights,
)
from firstlight.pipeline.train.folder_manifest import write_file, write_manifest
from firstlight.tasks.nn.encoders import Encoder
from tests.support import recipes

SPEC: dict[str, Any] = {
    "name": "convnet",
    "norm": "sync",
    "width": 4,
    "depth": 2,
    "input": "sobel",
    "mean": (0.1, 0.2, 0.3),
}
FILES = ["encoder.json", "encoder.safetensors", "manifest.json"]


def encoder(seed: int = 0, **changes: Any) -> Encoder:
    """With statistics that are not the initial ones."""
    torch.manual_seed(seed)
    made = Encoder({**SPEC, **changes}, 8)
    made(torch.rand(4, 3, 8, 8))
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_encoder(encoder(), tmp_path / "encoder", {"method": {"name": "nat"}, "seed": 3})
    return tmp_path / "encoder"


def test_a_round_trip_keeps_every_bit(folder: Path) -> None:
    before, after = encoder(), load_encoder(folder, 8)
    assert before.state_dict().keys() == after.state_dict().keys()
    for name, tensor in before.state_dict().items():
        assert torch.equal(after.state_dict()[name], tensor), name
        assert after.state_dict()[name].dtype == tensor.dtype
    x = torch.rand(3, 3, 8, 8)
    assert all(torch.equal(a, b) for a, b in zip(before.eval()(x), after.eval()(x), strict=True))
    assert not torch.equal(encoder(seed=1).state_dict()["stages.0.0.weight"], before.state_dict()["stages.0.0.weight"])


def test_the_folder_describes_itself_without_pickle(folder: Path) -> None:
    assert sorted(p.name for p in folder.iterdir()) == FILES
    told = json.loads((folder / "encoder.json").read_text())
    assert told == {
        "format": 1,
        "spec": {**SPEC, "mean": [0.1, 0.2, 0.3]},
        "image_size": 8,
        "shapes": [[4, 4, 4], [8, 2, 2]],
        "method": {"name": "nat"},
        "seed": 3,
    }
    assert json.loads((folder / "manifest.json").read_text())["files"].keys() == {"encoder.json", "encoder.safetensors"}


def test_an_encoder_in_another_memory_layout_is_kept(tmp_path: Path) -> None:
    made = encoder().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    save_encoder(made, tmp_path, {})
    assert all(torch.equal(t, made.state_dict()[name]) for name, t in load_encoder(tmp_path, 8).state_dict().items())


def test_encoder_loads_for_another_image_size(folder: Path) -> None:
    assert load_encoder(folder, 16).shapes == [(4, 8, 8), (8, 4, 4)]


def test_saving_again_replaces_the_encoder(folder: Path) -> None:
    save_encoder(encoder(seed=1), folder, {})
    assert torch.equal(
        load_encoder(folder, 8).state_dict()["stages.0.0.weight"], encoder(seed=1).state_dict()["stages.0.0.weight"]
    )


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b" x"),
    "flipped": flip,
}


@pytest.mark.fault(17, "a handed-on encoder is cut, empty or gone")
@pytest.mark.fault(18, "a bit of a handed-on encoder")
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_encoder_names_the_file(folder: Path, file: str, kind: str) -> None:
    DAMAGE[kind](folder / file)
    for read in (read_encoder_spec, lambda path: load_encoder(path, 8)):
        with pytest.raises(UserError) as told:
            read(folder)  # type: ignore[operator]
        assert str(folder) in str(told.value)
        assert str(folder / file) in str(told.value)
        assert "\n" not in str(told.value)


def test_missing_encoder_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"{tmp_path / 'none'}: is not a whole encoder: .*manifest.json"):
        read_encoder_spec(tmp_path / "none")


@pytest.mark.parametrize("content", [b"[]", b"null", b'{"format": 1}', b'{"spec": 3}', b"{", b"\xff"])
def test_folder_of_another_artifact_is_refused(tmp_path: Path, content: bytes) -> None:
    write_manifest(tmp_path, write_file(tmp_path, "encoder.json", content))
    with pytest.raises(UserError, match=rf"{tmp_path}: is not a whole encoder"):
        read_encoder_spec(tmp_path)


@pytest.mark.fault(54, "a manifest that leads out of its folder")
def test_a_manifest_must_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_manifest(
        tmp_path / "in", {f"../{name}": entry for name, entry in write_file(tmp_path, "encoder.json", b"{}").items()}
    )
    with pytest.raises(UserError, match=r"it names '\.\./encoder\.json', which is no file of its folder"):
        read_encoder_spec(tmp_path / "in")


def rewritten(folder: Path, weights: bytes | None, **spec: Any) -> None:
    """Sealed again, with other weights or another spec."""
    told = json.loads((folder / "encoder.json").read_text())
    files = write_file(folder, "encoder.json", json.dumps({**told, "spec": {**told["spec"], **spec}}).encode())
    if weights is not None:
        files |= write_file(folder, "encoder.safetensors", weights)
    write_manifest(folder, files)


@pytest.mark.fault(47, "weights of another network")
@pytest.mark.fault(52, "a safetensors file that is none")
@pytest.mark.parametrize(
    "weights",
    [save({"stages.0.0.weight": torch.zeros(4, 2, 3, 3)}), save(encoder(width=8).state_dict()), b"no tensors"],
)
def test_weights_that_do_not_fit_are_refused(folder: Path, weights: bytes) -> None:
    rewritten(folder, weights)
    reason = "is damaged: Error while deserializing" if weights == b"no tensors" else "does not fit its spec"
    with pytest.raises(UserError, match=rf"{folder / 'encoder.safetensors'}: {reason}"):
        load_encoder(folder, 8)


def test_spec_that_does_not_fit_the_weights_is_refused(folder: Path) -> None:
    rewritten(folder, None, depth=1)
    with pytest.raises(UserError, match=rf"{folder / 'encoder.safetensors'}: does not fit its spec"):
        load_encoder(folder, 8)


def test_the_same_spec_passes_as_tuples_and_as_lists(folder: Path) -> None:
    check_encoder_spec(folder, SPEC, "stages.evaluate.encoder")
    check_encoder_spec(folder, {**SPEC, "mean": [0.1, 0.2, 0.3]}, "stages.evaluate.encoder")
    with pytest.raises(UserError, match=r"^encoder\.mean: "):
        check_encoder_spec(folder, {**SPEC, "mean": [0.1, 0.2, 0.31]}, "stages.evaluate.encoder")


@pytest.mark.fault(47, "an encoder of another shape, input or statistics")
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"width": 8}, "encoder.width: 8 differs from 4 of"),
        ({"width": 8, "depth": 3}, "encoder.depth: 3 differs from 2 of"),
        ({"mean": (0.1, 0.2, 0.4)}, "encoder.mean: [0.1, 0.2, 0.4] differs from [0.1, 0.2, 0.3] of"),
        ({"stem": "cifar"}, "encoder.stem: 'cifar' differs from None of"),
        ({"name": "alexnet", "depth": 3}, "encoder.name: 'alexnet' differs from 'convnet' of"),
    ],
)
def test_the_first_key_that_differs_is_named_with_both_values(folder: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError) as error:
        check_encoder_spec(folder, {**SPEC, **changes}, "stages.evaluate.encoder")
    assert str(error.value) == f"{told} the encoder that stages.evaluate.encoder names ({folder})"


def test_key_that_only_the_saved_encoder_has_is_named(folder: Path) -> None:
    with pytest.raises(UserError, match=r"encoder\.input: None differs from 'sobel'"):
        check_encoder_spec(folder, {k: v for k, v in SPEC.items() if k != "input"}, "x")


def table(n: int = 6) -> SavedTable:
    return SavedTable(np.arange(n) * 3, torch.rand(n, 4), "ab" * 32)


def test_table_round_trip_keeps_every_bit_and_the_facts(tmp_path: Path) -> None:
    saved = table()
    save_table(saved, tmp_path, {"method": {"name": "super_and"}, "seed": 3})
    found = load_table(tmp_path)
    assert found.ids.tolist() == [0, 3, 6, 9, 12, 15]
    assert torch.equal(found.values, saved.values)
    assert found.store == saved.store
    told = json.loads((tmp_path / "table.json").read_text())
    assert told == {"format": 1, "shape": [6, 4], "method": {"name": "super_and"}, "seed": 3, "store": saved.store}
    assert {path.name for path in tmp_path.iterdir()} == {"table.json", "table.safetensors", "manifest.json"}


@pytest.mark.parametrize("file", ["table.json", "table.safetensors", "manifest.json"])
@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_table_names_the_file(tmp_path: Path, file: str, kind: str) -> None:
    save_table(table(), tmp_path, {})
    DAMAGE[kind](tmp_path / file)
    with pytest.raises(UserError, match=rf"^{tmp_path}: is not a whole table: .*{file}") as told:
        load_table(tmp_path)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("ids", "shape"), [([0, 0, 3], [3, 4]), ([3, 0, 6], [3, 4]), ([0, 3], [3, 4]), ([0, 3, 6], [3, 5])]
)
def test_table_whose_ids_or_shape_are_wrong_is_refused(tmp_path: Path, ids: list[int], shape: list[int]) -> None:
    tensors = {"ids": torch.tensor(ids), "values": torch.zeros(3, 4)}
    files = write_file(tmp_path, "table.safetensors", save(tensors))
    files |= write_file(tmp_path, "table.json", json.dumps({"shape": shape, "store": "x"}).encode())
    write_manifest(tmp_path, files)
    with pytest.raises(UserError, match=rf"^{tmp_path}: is not a whole table: table\."):
        load_table(tmp_path)


def test_table_with_numbers_that_are_not_finite_is_refused(tmp_path: Path) -> None:
    values = torch.rand(6, 4)
    values[2, 1] = torch.nan
    save_table(SavedTable(table().ids, values, "x"), tmp_path, {})
    with pytest.raises(UserError, match=r"is not a whole table: values has numbers that are not finite$"):
        load_table(tmp_path)


def test_folder_of_a_network_is_no_table(folder: Path) -> None:
    with pytest.raises(UserError, match="is not a whole table"):
        load_table(folder)


def rewrite(folder: Path, weights: Any = None, **description: Any) -> None:
    """Replaces weights, or keys of the description, with sums that are right."""
    told = {**json.loads((folder / "encoder.json").read_text()), **description}
    data = save(weights) if weights is not None else (folder / "encoder.safetensors").read_bytes()
    files = write_file(folder, "encoder.safetensors", data)
    write_manifest(folder, files | write_file(folder, "encoder.json", json.dumps(told).encode()))


@pytest.mark.fault(47, "an encoder of NaN or of huge numbers, with right sums")
@pytest.mark.parametrize(
    ("value", "told"),
    [
        (float("nan"), "is damaged: stages.0.0.weight has numbers that are not finite"),
        (float("inf"), "is damaged: stages.0.0.weight has numbers that are not finite"),
        (3e38, "is damaged: the feature maps of an image of noise are not finite"),
    ],
)
def test_encoder_whose_features_are_not_finite_is_named(folder: Path, value: float, told: str) -> None:
    weights = encoder().state_dict()
    weights["stages.0.0.weight"] = torch.full_like(weights["stages.0.0.weight"], value)
    if value == 3e38:
        weights = {name: torch.full_like(t, value) if t.is_floating_point() else t for name, t in weights.items()}
    rewrite(folder, weights)
    with pytest.raises(UserError) as raised:
        load_encoder(folder, 8)
    assert str(raised.value) == f"{folder / 'encoder.safetensors'}: {told}"


@pytest.mark.fault(47, "a spec of a network that is too large for any machine")
@pytest.mark.parametrize("change", [{"width": 10**9}, {"width": 10**30}, {"depth": 10**9}, {"width": 5}, {"depth": 40}])
def test_spec_of_another_size_than_the_weights_is_named(folder: Path, change: dict[str, int]) -> None:
    rewrite(folder, spec={**SPEC, **change})
    checks: list[Callable[[Path, int], object]] = [check_untrusted_encoder]
    checks += [] if change == {"depth": 40} else [load_encoder]
    for check in checks:
        with pytest.raises(UserError, match=rf"^{folder}/encoder\.(json|safetensors): does not fit its") as raised:
            check(folder, 8)
        assert len(str(raised.value).splitlines()) == 1


def test_encoder_that_fits_its_spec_passes_the_check(folder: Path) -> None:
    check_untrusted_encoder(folder, 8)
    assert load_encoder(folder, 8).state_dict().keys() == encoder().state_dict().keys()


@pytest.mark.parametrize(
    "description", [{"image_size": 10**9}, {"image_size": 0}, {"image_size": "8"}, {"spec": []}, {"shapes": 3}]
)
def test_description_of_another_shape_is_named(folder: Path, description: dict[str, Any]) -> None:
    rewrite(folder, **description)
    (key,) = description
    with pytest.raises(UserError, match=rf"^{folder}: is not a whole encoder: encoder\.json: is damaged: {key}"):
        load_encoder(folder, 8)


@pytest.mark.parametrize(
    ("saved", "changes", "origin"),
    [
        ({}, {}, {}),
        ({"weights": {"source": "a", "licence": "mit"}}, {}, {"source": "a", "licence": "mit"}),
        ({"weights": {"licence": ["mit"], "sha256": 3}}, {}, {}),
        ({"weights": "mit"}, {}, {}),
        ({}, {"encoder__weights": "/x/w.pth"}, {"source": "w.pth"}),
        ({"weights": {"source": "old.pth"}}, {"encoder__weights": "/x/w.pth"}, {"source": "old.pth"}),
        (
            {"weights": {"licence": "mit"}},
            {"encoder__weights": "/x/w.pth", "encoder__licence": "gpl"},
            {"source": "w.pth", "licence": "gpl"},
        ),
        ({}, {"encoder__weights": "runs:/1/encoder"}, {}),
        ({}, {"encoder__weights": "/x/w.pth", "stages__pretrain__encoder": "random"}, {}),
        (
            {"weights": {"source": "a"}},
            {"encoder__weights": "/x/w.pth", "encoder__licence": "gpl", "stages__pretrain__encoder": "runs:/1/encoder"},
            {"source": "a"},
        ),
    ],
)
def test_origin_of_weights_is_what_was_saved_and_what_the_recipe_states(
    tmp_path: Path, saved: dict[str, Any], changes: dict[str, Any], origin: dict[str, str]
) -> None:
    save_encoder(encoder(), tmp_path / "encoder", saved)
    recipe = recipes.recipe(tmp_path, stages__export={"kind": "export"}, **changes)
    for stage in ("pretrain", "export"):
        assert trace_weights(recipe, stage, tmp_path / "encoder") == origin


@pytest.mark.parametrize(("arm", "licence"), [("pretrained", "gpl"), ("given", "gpl"), ("scratch", None)])
def test_arm_of_a_fine_tuning_decides_which_weights_it_comes_from(
    tmp_path: Path, arm: str, licence: str | None
) -> None:
    recipe = recipes.recipe(tmp_path, encoder__weights="/x/w.pth", encoder__licence="gpl")
    save_encoder(encoder(), tmp_path / "model", {"arm": arm})
    assert trace_weights(recipe, "finetune", tmp_path / "model").get("licence") == licence
    save_encoder(encoder(), tmp_path / "start", {})
    assert trace_weights(recipe, "finetune", tmp_path / "start", arm).get("licence") == licence
