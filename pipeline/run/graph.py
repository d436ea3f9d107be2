"""What a stage starts from: encoders of earlier stages or from MLflow; and the instance of a stage and seed, by all that decides its result."""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from firstlight.pipeline.config.recipe import Downstream, Finetune, Look, Recipe, digest
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.stages.artifacts import check_same, encoder_spec, load_decoder, load_head
from firstlight.pipeline.stages.finetune import check_decoder
from firstlight.pipeline.stages.frozen_features import check_head
from firstlight.pipeline.stages.stage import Instance, Passage, code_version
from firstlight.pipeline.tracking.client import Tracking

DECIDE_NOTHING = {"log_every", "checkpoint_every", "register_as", "watch"}  # settings that leave the result as it is


@dataclass
class Fetched:
    """What a recipe refers to by name, by stage. `references`: of the encoder, pinned, and the folder it was fetched to; `networks`: the folder that
    the head or decoder beside that encoder was fetched to."""

    references: dict[str, tuple[str, Path]] = field(default_factory=dict)
    networks: dict[str, Path] = field(default_factory=dict)


def fetch(recipe: Recipe, kept_in: Tracking, inputs: Path, only: str | None) -> Fetched:
    """All that the stages (or those of one kind) refer to, into folders below `inputs`.

    Raises:
        UserError: there is no such model, or it does not go with the recipe.
    """
    found = Fetched()
    for name, stage in recipe.stages.items():
        if (
            isinstance(stage, Downstream)
            and stage.takes_encoder
            and stage.encoder != "previous"
            and only in (None, stage.kind)
        ):
            where = f"stages.{name}.encoder"
            reference = kept_in.pin(stage.encoder, where)
            folder = kept_in.fetch(reference, inputs / digest(reference)[:12], where)
            check_same(folder, recipe.encoder.model_dump(mode="json"), where)
            found.references[name] = (reference, folder)
            if beside(stage):
                found.networks[name] = _fetch_beside(recipe, name, reference, kept_in, inputs)
    return found


def _fetch_beside(recipe: Recipe, name: str, reference: str, kept_in: Tracking, inputs: Path) -> Path:
    stage, where = recipe.stages[name], f"stages.{name}"
    wanted = beside(stage)
    assert wanted is not None
    key = f"{where}.features" if wanted == "head" else f"{where}.arms"
    other = kept_in.beside(reference, wanted, key)
    folder = kept_in.fetch(other, inputs / digest(other)[:12], key)
    if wanted == "head":
        check_head(load_head(folder), recipe, where)
    elif isinstance(stage, Finetune):
        check_decoder(load_decoder(folder), stage, recipe, where)
    return folder


def beside(stage: Any) -> str | None:
    """The name of the network that a stage needs besides the encoder."""
    if isinstance(stage, Look) and stage.features == "head":
        return "head"
    return "decoder" if isinstance(stage, Finetune) and "pretrained_decoder" in stage.arms else None


@dataclass(frozen=True)
class Chain:
    """The stages of a recipe, with their files in `folder`, on the images of a store (its hash)."""

    recipe: Recipe
    folder: Path
    store: str
    fetched: Fetched
    passage: Passage | None = None

    def instance(self, name: str, seed: int) -> Instance:
        """Found by all that decides its result. The number of workers does not.

        Raises:
            UserError: what it starts from is not there, or damaged.
        """
        recipe, stage = self.recipe, self.recipe.stages[name]
        decides: dict[str, Any] = {
            "stage": {k: v for k, v in stage.model_dump(mode="json").items() if k not in DECIDE_NOTHING},
            "dataset": recipe.dataset.model_dump(mode="json", exclude={"root", "download", "extends"}),
            "encoder": recipe.encoder.model_dump(mode="json"),
            "order": recipe.stream.model_dump(include={"window", "shuffle"}),
            "seed": seed,
            "store": self.store,
            "code": code_version(),
            "score_test": recipe.score_test,
        }
        encoder = None
        if isinstance(stage, Downstream) and stage.takes_encoder:
            encoder = self._encoder(name, stage, seed)
            decides["from"] = digest(json.loads((encoder / "manifest.json").read_text("utf-8")))
        other = None
        if isinstance(stage, Downstream) and (wanted := beside(stage)):
            other = (
                self.fetched.networks[name]
                if stage.encoder != "previous"
                else self.previous(name, seed).folder / wanted
            )
            (load_head if wanted == "head" else load_decoder)(other)
            decides[wanted] = digest(json.loads((other / "manifest.json").read_text("utf-8")))
        passage = self.passage if self.passage and self.passage.stage == name else Passage(name)
        if passage.before:
            decides["before"] = passage.before
        fingerprint = digest(decides)[:12]
        folder = self.folder / f"{name}-seed{seed}-{fingerprint}"
        return Instance(name, seed, fingerprint, folder, encoder, other, passage.begin, passage.until)

    def _encoder(self, name: str, stage: Downstream, seed: int) -> Path:
        """The folder of the encoder that a downstream stage starts from, its files checked."""
        if stage.encoder != "previous":
            return self.fetched.references[name][1]
        upstream = self.previous(name, seed)
        try:
            encoder_spec(upstream.folder / "encoder")
        except UserError as error:
            raise UserError(
                f"{error}; delete {upstream.folder} and run again: {upstream.label} is made anew from its seed"
            ) from None
        return upstream.folder / "encoder"

    def previous(self, name: str, seed: int) -> Instance:
        """The finished pretraining before a stage.

        Raises:
            UserError: it has not finished.
        """
        before = list(self.recipe.stages)[: list(self.recipe.stages).index(name)]
        upstream = next(s for s in reversed(before) if self.recipe.stages[s].kind == "pretrain")
        instance = self.instance(upstream, seed)
        if instance.result is None:
            raise UserError(
                f"stages.{name}.encoder: 'previous' is {instance.label}, which has not finished; run it first: firstlight pretrain ..."
            )
        return instance

    def siblings(self, instance: Instance) -> list[Instance]:
        """The finished instances, of this command or of one before, of all stages that score the encoder of `instance` or of another seed of it."""
        found = []
        for name, stage in self.recipe.stages.items():
            with contextlib.suppress(
                UserError, KeyError
            ):  # a stage whose encoder is not there, or was not fetched for this command
                mine = (
                    [self.instance(name, seed) for seed in self.recipe.seeds] if isinstance(stage, Downstream) else []
                )
                if any(i.seed == instance.seed and i.encoder == instance.encoder for i in mine):
                    found += [i for i in mine if i.result is not None]
        return found

    def begun(self, name: str) -> Sequence[Instance]:
        """The instances of a stage that have a folder."""
        found = []
        for seed in self.recipe.seeds:
            with contextlib.suppress(UserError, KeyError):  # as above
                found.append(self.instance(name, seed))
        return [instance for instance in found if instance.folder.exists()]
