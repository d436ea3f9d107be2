"""The settings of a first recipe, chosen from the images and the machine, each with its reason."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from firstlight.pipeline.config import yaml_reader
from firstlight.pipeline.config.conf_files import CONF_FOLDER, STARTER_FILE
from firstlight.pipeline.config.load import merge_sections
from firstlight.pipeline.config.scale import AUTO
from firstlight.pipeline.config.schema import parse_augment
from firstlight.pipeline.config.schemas.entries import load_entries
from firstlight.pipeline.data.channels.channel_ops import keep_channel_ops
from firstlight.pipeline.data.channels.pixel_format import RGB_PIXELS
from firstlight.pipeline.errors import UserError, suggest_valid
from firstlight.pipeline.run.input_colours import COLOUR_KEYS
from firstlight.pipeline.starter.own_encoder import OwnEncoder, find_own_encoder
from firstlight.pipeline.starter.survey import ImageSurvey
from firstlight.pipeline.terminal import format_count

# Sides of images in pixels: on the CPUs, on a GPU, and where a network has weights of photographs.
CPU_SIDE, CPU_WEIGHTS_SIDE, GPU_SIDE = 64, 128, 224
# A training on CPUs may take as many passes of an image through the network as the study, which has so many images.
STUDY_IMAGES, GPU_EPOCHS, EPOCH_RANGE = 45_000, 200, (10, 200)
# A network with weights is changed this much more slowly, its first layers more so, for few epochs, as in `photos`.
WEIGHTS_RATE_FACTOR, WEIGHTS_LAYER_DECAY, WEIGHTS_EPOCHS, WEIGHTS_BATCH = 0.04, 0.7, 6, 64
# Augmentations that change nothing of a grey image but its levels.
COLOUR_OPS = ("color_jitter", "random_grayscale")
# Photographs are at least so large; with fewer images of them than this, weights that exist are worth more.
LEAST_PHOTOGRAPH_SIDE, MOST_IMAGES_FOR_WEIGHTS = 64, 20_000
WEIGHTS_ADVICE = (
    "; weights that exist are worth more for photographs: "
    "--model tf_efficientnet_lite0 --weights timm (docs/weights.md)"
)
# Goals that cannot be reached without labels.
GOALS_WITH_LABELS = ("evaluate", "finetune")
# Neighbours that vote in kNN: a third of the images of the smallest class, and at most as many as the field takes.
MOST_NEIGHBOURS = 200
# Labels of each class that the fine-tuning gets.
LABELS_PER_CLASS = 10


@dataclass(frozen=True)
class Wishes:
    """Settings that the user has asked for; None is left to Firstlight."""

    model: str | None = None
    weights: str | None = None
    method: str | None = None
    epochs: int | None = None
    # The kind of stage that is wanted; None for all that tell of a pretraining.
    goal: str | None = None

    @property
    def pretrains(self) -> bool:
        """True if a network is pretrained: it is for every goal, unless there are weights to reach the goal from."""
        return self.goal in (None, "pretrain") or self.weights is None


@dataclass(frozen=True)
class ChosenSettings:
    """The sections of a recipe as plain values, and a line for each decision."""

    image_size: int
    encoder: dict[str, Any]
    # Keys of the pretraining; None where the weights are taken as they are.
    pretrain: dict[str, Any] | None
    # Keys of the fine-tuning; None without enough labels.
    finetune: dict[str, Any] | None
    # The kinds of the stages after the pretraining, in order.
    goals: tuple[str, ...]
    # The number of neighbours that vote in kNN.
    knn_k: int
    # The section `scale`.
    scale: dict[str, Any]
    seeds: tuple[int, ...]
    reasons: tuple[str, ...]


def choose_settings(survey: ImageSurvey, wishes: Wishes, has_gpu: bool) -> ChosenSettings:
    """Chooses the settings for images on a machine with or without a GPU.

    Raises:
        UserError: one of the wishes is not valid; names it and the valid ones.
    """
    own = find_own_encoder(wishes.weights) if wishes.weights is not None else None
    image_size = own.image_size if own else _choose_size(survey.side, wishes.weights is not None, has_gpu)
    encoder = _fit_own_encoder(own, survey, wishes) if own else _choose_encoder(survey, wishes, image_size, has_gpu)
    pretrain = _choose_pretraining(survey, wishes, has_gpu) if wishes.pretrains else None
    finetune = None
    labels = min(LABELS_PER_CLASS, int(0.8 * survey.class_images))
    if len(survey.classes) > 1 and labels >= 1:
        batch = _largest_power(max(labels * len(survey.classes) // 4, 1), 32)
        finetune = {"labels_per_class": labels, "batch_size": batch}
    goals = _choose_goals(wishes.goal, finetune is not None)
    # One seed is enough if no score is compared.
    seeds = (0, 1, 2) if any(goal in GOALS_WITH_LABELS for goal in goals) else (0,)
    test = f" and {survey.num_test:,} test images" if survey.num_test else ""
    labelled = f"{len(survey.classes):,} classes" if finetune else "not used as classes"
    colour = str(survey.shared) if survey.shared is not None else "grey" if survey.is_grey else "colour"
    reasons = (
        f"images: {survey.num_train:,} training{test}, {labelled}, {colour}, {survey.side} pixels on the shorter side",
        f"size: {image_size} x {image_size} pixels, "
        + ("as the network had them" if own else "for a GPU" if has_gpu else "for the CPUs of this machine"),
        _describe_network(survey, wishes, encoder),
        *(_describe_pretraining(pretrain, wishes, seeds) if pretrain else _describe_goals(goals, seeds)),
    )
    knn_k = min(max(survey.class_images // 3, 5), MOST_NEIGHBOURS)
    # Workers on Ray would share the CPUs that one process has to itself if there is no GPU.
    scale = {"name": "local", **({} if has_gpu else {"workers": 0})}
    return ChosenSettings(image_size, encoder, pretrain, finetune, goals, knn_k, scale, seeds, reasons)


def _choose_goals(goal: str | None, is_labelled: bool) -> tuple[str, ...]:
    """Returns the kinds of the stages that come after a pretraining, or take the weights as they are."""
    if goal in GOALS_WITH_LABELS and not is_labelled:
        raise UserError(
            f"--data: {goal} needs labels, and its images have none; valid: a folder for each class, a list with "
            "labels, or the commands pretrain, embed, retrieve and export"
        )
    if goal in (None, "pretrain"):
        return ("embed",) if not is_labelled else ("evaluate",) if goal else ("evaluate", "finetune")
    return (goal,)


def _describe_network(survey: ImageSurvey, wishes: Wishes, encoder: Mapping[str, Any]) -> str:
    name = f"network: {encoder.get('model', encoder['name'])}"
    if wishes.weights is None:
        are_photographs = survey.shared is None and not survey.is_grey and survey.side >= LEAST_PHOTOGRAPH_SIDE
        is_small = survey.num_train < MOST_IMAGES_FOR_WEIGHTS
        return f"{name} from random weights{WEIGHTS_ADVICE * (are_photographs and is_small)}"
    if survey.shared is not None and not encoder.get("mean"):
        numbers = format_count(survey.shared.pixels.channels, "number")
        return f"{name} from {encoder['weights']}; mean and std, {numbers} each, must be stated unless it brings them"
    return f"{name} from {encoder['weights']}"


def _describe_pretraining(pretrain: Mapping[str, Any], wishes: Wishes, seeds: tuple[int, ...]) -> tuple[str, str]:
    name, method = wishes.method or _read_recommended(), pretrain["method"]["name"]
    shown = name if name == method else f"{name}, a setting of {method}"
    return (
        f"method: {shown}, {'which was asked for' if wishes.method else 'recommended'}",
        f"length: {format_count(pretrain['epochs'], 'epoch')} with batches of {pretrain['batch_size']}, "
        f"{format_count(len(seeds), 'seed')}",
    )


def _describe_goals(goals: tuple[str, ...], seeds: tuple[int, ...]) -> tuple[str, str]:
    return (
        "method: none, the weights are taken as they came",
        f"stage: {', '.join(goals)}, {format_count(len(seeds), 'seed')}",
    )


def _choose_size(side: int, has_weights: bool, has_gpu: bool) -> int:
    """Returns the side of the network's images: not above that of the images, and a multiple of 8 from 32 on."""
    most = GPU_SIDE if has_gpu else CPU_WEIGHTS_SIDE if has_weights else CPU_SIDE
    size = min(side, most)
    return max(size // 8 * 8, 32) if size >= 32 else max(size, 8)


def _fit_own_encoder(own: OwnEncoder, survey: ImageSurvey, wishes: Wishes) -> dict[str, Any]:
    """Returns the section of a saved encoder for the images: those of three channels can be adapted to others."""
    images = survey.shared.pixels.channels if survey.shared is not None else RGB_PIXELS.channels
    if own.channels == images:
        return own.section
    if own.channels != RGB_PIXELS.channels:
        found = str(survey.shared.pixels) if survey.shared is not None else "colours"
        raise UserError(
            f"--weights: {wishes.weights} is of images with {format_count(own.channels, 'channel')}, and these are "
            f"{found}; valid: weights of {format_count(images, 'channel')}, or leave it out"
        )
    return {key: value for key, value in own.section.items() if key not in COLOUR_KEYS}


def _choose_encoder(survey: ImageSurvey, wishes: Wishes, image_size: int, has_gpu: bool) -> dict[str, Any]:
    if wishes.weights is not None and wishes.model is None:
        raise UserError(
            "--weights: needs --model, the network that the weights are of; valid: a name of timm's, e.g. resnet18"
        )
    if wishes.model is not None:
        own = load_entries()["encoders"]
        if wishes.weights is None and wishes.model in own and wishes.model != "timm":
            return {"name": wishes.model, "mean": None, "std": None}
        chosen = {"name": "timm", "model": wishes.model}
        if wishes.weights is not None:
            return {**chosen, "weights": wishes.weights}
        return chosen if survey.shared is None else {**chosen, **dict.fromkeys(COLOUR_KEYS)}
    if has_gpu:
        return {"name": "resnet18", "stem": "cifar" if image_size <= 64 else "imagenet", "mean": None, "std": None}
    depth = 5 if image_size >= 64 else 4 if image_size >= 24 else 3
    return {
        "name": "convnet",
        "input": "gray" if survey.is_grey else "rgb",
        "width": 32,
        "depth": depth,
        "mean": None,
        "std": None,
    }


def _choose_pretraining(survey: ImageSurvey, wishes: Wishes, has_gpu: bool) -> dict[str, Any]:
    starter = yaml_reader.read_yaml(STARTER_FILE)
    study = yaml_reader.read_yaml(CONF_FOLDER / "recipe" / f"{starter['recipe']}.yaml")
    stages = _list_unlabelled_methods(study)
    name = wishes.method or _read_recommended()
    if name not in stages:
        raise UserError(f"--method: {name!r} is unknown; {suggest_valid(name, stages)}")
    stage = merge_sections(study["defaults"]["pretrain"], stages[name])
    method: dict[str, Any] = {"name": stage["method"]} if isinstance(stage["method"], str) else dict(stage["method"])
    batch = _largest_power(max(survey.num_train // 4, 2), WEIGHTS_BATCH if wishes.weights else stage["batch_size"])
    # Learning rates of the study are for its batches.
    scaled = batch / stage["batch_size"] if stage["optimizer"]["name"] == "SGD" else 1.0
    rate = stage["optimizer"]["lr"] * scaled * (WEIGHTS_RATE_FACTOR if wishes.weights else 1.0)
    epochs = wishes.epochs or (
        WEIGHTS_EPOCHS if wishes.weights else _choose_epochs(stage["epochs"], survey.num_train, has_gpu)
    )
    # Rounds must be equally long.
    if "rounds" in method and epochs % method["rounds"]:
        method["rounds"] = 1
    found: dict[str, Any] = {
        "method": method,
        "epochs": epochs,
        "batch_size": batch,
        "optimizer": {**stage["optimizer"], "lr": float(f"{rate:.3g}")},
    }
    if wishes.weights:
        found["layer_decay"] = WEIGHTS_LAYER_DECAY
    augment = [op for op in stage.get("augment", ()) if not (survey.is_grey and op["op"] in COLOUR_OPS)]
    if augment:
        found["augment"] = augment if survey.shared is None else _leave_out_mixing(augment)
    # The study compares methods in single precision, which few devices are fastest in.
    return {**found, "schedule": stage["schedule"], "channels_last": stage["channels_last"], "precision": AUTO}


def _leave_out_mixing(augment: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the augmentations without what mixes colours."""
    suited = []
    for stated, completed in zip(augment, parse_augment(augment), strict=True):
        op = completed.model_dump()
        for kept in keep_channel_ops([op])[0]:
            suited.append({**stated, **{key: value for key, value in kept.items() if value != op[key]}})
    return suited


def _read_recommended() -> str:
    """Returns the name of the recommended method, as the study calls it."""
    return str(yaml_reader.read_yaml(STARTER_FILE)["method"])


def _list_unlabelled_methods(study: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the pretraining stages of the study that need no label, by their names."""
    stages: Mapping[str, dict[str, Any]] = study["stages"]
    return {k: v for k, v in stages.items() if v.get("kind") == "pretrain" and "labels_per_class" not in v}


def _choose_epochs(study_epochs: int, num_train: int, has_gpu: bool) -> int:
    low, high = EPOCH_RANGE
    return GPU_EPOCHS if has_gpu else int(min(max(study_epochs * STUDY_IMAGES // num_train, low), high))


def _largest_power(count: int, most: int) -> int:
    """Returns the largest power of two up to `count` and `most`."""
    return int(min(1 << (count.bit_length() - 1), most))
