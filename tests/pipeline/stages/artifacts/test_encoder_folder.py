"""A saved encoder is loaded with every bit, or refused in one line that names the file."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from firstlight.pipeline.errors import UserError
from firstlight.pipeline.stages.artifacts.encoder_description import read_encoder_spec
from firstlight.pipeline.stages.artifacts.encoder_folder import check_untrusted_encoder, load_encoder, save_encoder
from tests.support.saved_encoders import (
    DAMAGE,
    ENCODER_FILES,
    SMALL_SPEC,
    make_small_encoder,
    reseal_encoder,
    rewrite_encoder,
)


def test_a_round_trip_keeps_every_bit(folder: Path) -> None:
    before, after = make_small_encoder(), load_encoder(folder, 8)
    assert before.state_dict().keys() == after.state_dict().keys()
    for name, tensor in before.state_dict().items():
        assert torch.equal(after.state_dict()[name], tensor), name
        assert after.state_dict()[name].dtype == tensor.dtype
    x = torch.rand(3, 3, 8, 8)
    assert all(torch.equal(a, b) for a, b in zip(before.eval()(x), after.eval()(x), strict=True))
    assert not torch.equal(
        make_small_encoder(seed=1).state_dict()["stages.0.0.weight"], before.state_dict()["stages.0.0.weight"]
    )


def test_the_folder_describes_itself_without_pickle(folder: Path) -> None:
    assert sorted(p.name for p in folder.iterdir()) == ENCODER_FILES
    told = json.loads((folder / "encoder.json").read_text())
    assert told == {
        "format": 1,
        "spec": {**SMALL_SPEC, "mean": [0.1, 0.2, 0.3]},
        "image_size": 8,
        "shapes": [[4, 4, 4], [8, 2, 2]],
        "method": {"name": "nat"},
        "seed": 3,
    }
    assert json.loads((folder / "manifest.json").read_text())["files"].keys() == {"encoder.json", "encoder.safetensors"}


def test_an_encoder_in_another_memory_layout_is_kept(tmp_path: Path) -> None:
    made = make_small_encoder().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    save_encoder(made, tmp_path, {})
    assert all(torch.equal(t, made.state_dict()[name]) for name, t in load_encoder(tmp_path, 8).state_dict().items())


def test_encoder_loads_for_another_image_size(folder: Path) -> None:
    assert load_encoder(folder, 16).shapes == [(4, 8, 8), (8, 4, 4)]


def test_saving_again_replaces_the_encoder(folder: Path) -> None:
    save_encoder(make_small_encoder(seed=1), folder, {})
    assert torch.equal(
        load_encoder(folder, 8).state_dict()["stages.0.0.weight"],
        make_small_encoder(seed=1).state_dict()["stages.0.0.weight"],
    )


@pytest.mark.fault(17, "a handed-on encoder is cut, empty or gone")
@pytest.mark.fault(18, "a bit of a handed-on encoder")
@pytest.mark.parametrize("file", ENCODER_FILES)
@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_encoder_names_the_file(folder: Path, file: str, kind: str) -> None:
    DAMAGE[kind](folder / file)
    for read in (read_encoder_spec, lambda path: load_encoder(path, 8)):
        with pytest.raises(UserError) as told:
            read(folder)  # type: ignore[operator]
        assert str(folder) in str(told.value)
        assert str(folder / file) in str(told.value)
        assert "\n" not in str(told.value)


@pytest.mark.fault(47, "weights of another network")
@pytest.mark.fault(52, "a safetensors file that is none")
@pytest.mark.parametrize(
    "weights",
    [
        save({"stages.0.0.weight": torch.zeros(4, 2, 3, 3)}),
        save(make_small_encoder(width=8).state_dict()),
        b"no tensors",
    ],
)
def test_weights_that_do_not_fit_are_refused(folder: Path, weights: bytes) -> None:
    reseal_encoder(folder, weights)
    reason = "is damaged: Error while deserializing" if weights == b"no tensors" else "does not fit its spec"
    with pytest.raises(UserError, match=rf"{folder / 'encoder.safetensors'}: {reason}"):
        load_encoder(folder, 8)


def test_spec_that_does_not_fit_the_weights_is_refused(folder: Path) -> None:
    reseal_encoder(folder, None, depth=1)
    with pytest.raises(UserError, match=rf"{folder / 'encoder.safetensors'}: does not fit its spec"):
        load_encoder(folder, 8)


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
    weights = make_small_encoder().state_dict()
    weights["stages.0.0.weight"] = torch.full_like(weights["stages.0.0.weight"], value)
    if value == 3e38:
        weights = {name: torch.full_like(t, value) if t.is_floating_point() else t for name, t in weights.items()}
    rewrite_encoder(folder, weights)
    with pytest.raises(UserError) as raised:
        load_encoder(folder, 8)
    assert str(raised.value) == f"{folder / 'encoder.safetensors'}: {told}"


@pytest.mark.fault(47, "a spec of a network that is too large for any machine")
@pytest.mark.parametrize("change", [{"width": 10**9}, {"width": 10**30}, {"depth": 10**9}, {"width": 5}, {"depth": 40}])
def test_spec_of_another_size_than_the_weights_is_named(folder: Path, change: dict[str, int]) -> None:
    rewrite_encoder(folder, spec={**SMALL_SPEC, **change})
    checks: list[Callable[[Path, int], object]] = [check_untrusted_encoder]
    checks += [] if change == {"depth": 40} else [load_encoder]
    for check in checks:
        with pytest.raises(UserError, match=rf"^{folder}/encoder\.(json|safetensors): does not fit its") as raised:
            check(folder, 8)
        assert len(str(raised.value).splitlines()) == 1


def test_encoder_that_fits_its_spec_passes_the_check(folder: Path) -> None:
    check_untrusted_encoder(folder, 8)
    assert load_encoder(folder, 8).state_dict().keys() == make_small_encoder().state_dict().keys()
