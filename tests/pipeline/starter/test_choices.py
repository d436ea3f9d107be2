"""The settings of a first recipe follow from the images, the machine and the wishes of the user."""

from dataclasses import replace
from typing import Any

import pytest

from firstlight.pipeline.config import yaml_reader
from firstlight.pipeline.config.load import load_recipe
from firstlight.pipeline.data.channels.pixel_format import PixelFormat
from firstlight.pipeline.data.prepare.shared_format import SharedFormat
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.starter.choices import Wishes, choose_settings
from firstlight.pipeline.starter.survey import ImageSurvey
from tests.support.paths import ROOT

FLOWERS = ImageSurvey({"name": "folder", "root": "/data"}, 720, 240, tuple("abcdefghijkl"), 60, 224, False)
BANDS = replace(
    FLOWERS,
    dataset={**FLOWERS.dataset, "channels": 13, "bits": 16},
    shared=SharedFormat(PixelFormat(13, 16), 200, 200, 224),
)
ADVICE = (
    "; weights that exist are worth more for photographs: "
    "--model tf_efficientnet_lite0 --weights timm (docs/weights.md)"
)
UNLABELLED = replace(FLOWERS, classes=(), class_images=0, num_test=0)


@pytest.mark.parametrize(
    ("side", "weights", "gpu", "size"),
    [(8, 0, 0, 8), (28, 0, 0, 28), (32, 0, 1, 32), (61, 0, 0, 56), (500, 0, 0, 64), (500, 1, 0, 128), (500, 0, 1, 224)],
)
def test_size_is_that_of_the_images_up_to_what_the_machine_takes(side: int, weights: int, gpu: int, size: int) -> None:
    wishes = Wishes(model="resnet18", weights="timm") if weights else Wishes()
    assert choose_settings(replace(FLOWERS, side=side), wishes, bool(gpu)).image_size == size


def test_labels_decide_the_fine_tuning_and_the_seeds() -> None:
    labelled, unlabelled = (choose_settings(survey, Wishes(), False) for survey in (FLOWERS, UNLABELLED))
    assert labelled.finetune == {"labels_per_class": 10, "batch_size": 16}
    assert labelled.seeds == (0, 1, 2)
    assert unlabelled.finetune is None
    assert unlabelled.seeds == (0,)
    few = choose_settings(replace(FLOWERS, class_images=5), Wishes(), False)
    assert few.finetune is not None
    assert few.finetune["labels_per_class"] == 4, "a part of the training images is held out"
    assert choose_settings(replace(FLOWERS, class_images=1), Wishes(), False).finetune is None


def test_pretraining_is_the_study_s_with_a_rate_for_its_batch() -> None:
    study = load_recipe(ROOT / "conf/recipe/study.yaml", ("dataset.root=/data",))
    recommended = yaml_reader.read_yaml(ROOT / "conf/starter.yaml")["method"]
    stage = study.stages[recommended]
    many = choose_settings(replace(FLOWERS, num_train=45_000), Wishes(), False).pretrain
    assert many["method"].items() <= stage.method.model_dump().items()  # type: ignore[attr-defined]
    assert many["batch_size"] == stage.batch_size  # type: ignore[attr-defined]
    assert many["optimizer"]["lr"] == stage.optimizer.lr  # type: ignore[attr-defined]
    few = choose_settings(FLOWERS, Wishes(), False).pretrain
    assert (few["batch_size"], few["optimizer"]["lr"]) == (128, many["optimizer"]["lr"] / 2)
    assert few["epochs"] == 200
    assert many["epochs"] == 10
    adaptive = choose_settings(FLOWERS, Wishes(method="lejepa"), False).pretrain
    assert adaptive["optimizer"]["name"] == "AdamW"
    assert adaptive["optimizer"]["lr"] == study.stages["lejepa"].optimizer.lr  # type: ignore[attr-defined]


def test_weights_are_changed_slowly_and_for_few_epochs() -> None:
    chosen = choose_settings(FLOWERS, Wishes(model="tf_efficientnet_lite0", weights="timm"), False)
    assert chosen.encoder == {"name": "timm", "model": "tf_efficientnet_lite0", "weights": "timm"}
    fresh = choose_settings(FLOWERS, Wishes(), False).pretrain
    assert chosen.pretrain["layer_decay"] == 0.7
    assert chosen.pretrain["epochs"] == 6
    assert chosen.pretrain["optimizer"]["lr"] < fresh["optimizer"]["lr"] / 10


def test_grey_images_keep_no_operation_on_colours() -> None:
    chosen = choose_settings(replace(FLOWERS, is_grey=True), Wishes(), False)
    assert chosen.encoder["input"] == "gray"
    assert {op["op"] for op in chosen.pretrain["augment"]} == {"random_resized_crop", "horizontal_flip"}


@pytest.mark.parametrize("epochs", [1, 7])
def test_number_of_epochs_that_is_asked_for_is_kept(epochs: int) -> None:
    chosen = choose_settings(FLOWERS, Wishes(epochs=epochs, method="super_and"), False).pretrain
    assert chosen is not None
    assert chosen["epochs"] == epochs
    assert chosen["method"]["rounds"] == 1


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        (Wishes(method="simclrr"), "--method: 'simclrr' is unknown; did you mean 'simclr'? (valid: "),
        (Wishes(method="fixmatch_40"), "--method: 'fixmatch_40' is unknown; "),
        (Wishes(weights="x.safetensors"), "--weights: needs --model, the network that the weights are of; valid: "),
    ],
)
def test_wish_that_is_not_valid_is_refused(wishes: Wishes, message: str) -> None:
    with pytest.raises(UserError) as caught:
        choose_settings(FLOWERS, wishes, False)
    assert str(caught.value).startswith(message)


def test_five_lines_say_what_was_chosen() -> None:
    assert choose_settings(FLOWERS, Wishes(method="simclr"), False).reasons == (
        "images: 720 training and 240 test images, 12 classes, colour, 224 pixels on the shorter side",
        "size: 64 x 64 pixels, for the CPUs of this machine",
        f"network: convnet from random weights{ADVICE}",
        "method: simclr, which was asked for",
        "length: 200 epochs with batches of 128, 3 seeds",
    )


@pytest.mark.parametrize(
    "other",
    [{"is_grey": True}, {"side": 63}, {"num_train": 20_000}, {"shared": BANDS.shared}],
)
def test_weights_are_advised_for_few_photographs_alone(other: dict[str, Any]) -> None:
    network = choose_settings(replace(FLOWERS, **other), Wishes(), False).reasons[2]
    assert network == "network: convnet from random weights"
    assert choose_settings(replace(FLOWERS, num_train=19_999), Wishes(), False).reasons[2] == network + ADVICE
    assert ADVICE not in choose_settings(FLOWERS, Wishes(model="resnet18", weights="timm"), False).reasons[2]


def test_channels_keep_no_operation_that_mixes_colours() -> None:
    chosen = choose_settings(BANDS, Wishes(method="super_and"), False)
    assert chosen.reasons[0] == (
        "images: 720 training and 240 test images, 12 classes, 13 channels of 16 bits, 224 pixels on the shorter side"
    )
    assert {key: chosen.encoder[key] for key in ("input", "mean", "std")} == {"input": "rgb", "mean": None, "std": None}
    assert chosen.pretrain is not None
    ops = {op["op"]: op for op in chosen.pretrain["augment"]}
    assert "random_grayscale" not in ops
    assert ops["color_jitter"] == {
        "op": "color_jitter",
        "brightness": 0.4,
        "contrast": 0.4,
        "saturation": 0.0,
        "hue": 0.0,
    }
    own = choose_settings(BANDS, Wishes(model="resnet18"), False)
    assert own.encoder == {"name": "resnet18", "mean": None, "std": None}
    timm = choose_settings(BANDS, Wishes(model="test_resnet"), False)
    assert timm.encoder == {"name": "timm", "model": "test_resnet", "mean": None, "std": None}


def test_weights_for_other_channels_need_a_normalisation() -> None:
    chosen = choose_settings(BANDS, Wishes(model="test_resnet", weights="timm"), False)
    assert chosen.encoder == {"name": "timm", "model": "test_resnet", "weights": "timm"}
    assert chosen.reasons[2] == (
        "network: test_resnet from timm; mean and std, 13 numbers each, must be stated unless it brings them"
    )
