"""The table at the end: pretrained beside the same network without, over seeds, and whether it helped."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rich.table import Table

from pipeline.config import Evaluate, Finetune, Recipe, Retrieve
from pipeline.stage import Instance
from tasks.downstream import TASKS

ARMS = ("pretrained", "random")


HOW = {"pretrained_decoder": "with the decoder", "scratch": "from scratch"}  # arms that are told of; the others by their names


@dataclass(frozen=True)
class Row:
    """Test accuracies (0..1) by seed of one measure. `against` says what the baseline is."""

    stage: str
    measure: str
    against: str
    pretrained: tuple[float, ...]
    baseline: tuple[float, ...]

    @property
    def gain(self) -> np.ndarray:
        return np.asarray(100 * (np.asarray(self.pretrained) - np.asarray(self.baseline)))

    @property
    def verdict(self) -> str:
        """Pretraining helps if every seed gains and the mean gain is above twice its standard error; hurts likewise."""
        gain, seeds = self.gain, len(self.gain)
        error = gain.std(ddof=1) / np.sqrt(seeds) if seeds > 1 else np.inf
        if seeds > 1 and abs(gain.mean()) > 2 * error and (np.all(gain > 0) or np.all(gain < 0)):
            return "helps" if gain.mean() > 0 else "hurts"
        return "no clear difference" if seeds > 1 else "one seed: no verdict"


def rows(recipe: Recipe, instances: Sequence[Instance]) -> list[Row]:
    """A row per measure of the finished evaluations and fine-tunings."""
    out = []
    for name, stage in recipe.stages.items():
        results = [i.result for i in instances if i.stage == name]
        found = [r for r in results if r is not None]
        if isinstance(stage, Evaluate) and found:
            for ending, of in zip(stage.endings, _told(stage), strict=True):
                for measure, text in (("knn", _named("kNN", f"k={stage.knn_k}", of)), ("probe", _named("linear probe", of))):
                    out.append(_against_random(name, text, [{arm: r[arm][measure + ending]["test"] for arm in ARMS} for r in found]))
        if isinstance(stage, Retrieve) and found and "precision" in found[0]["pretrained"]:
            for k in stage.precision_at:
                text = _named(f"precision@{k}", *_told(stage))
                out.append(_against_random(name, text, [{arm: r[arm]["precision"][str(k)] for arm in ARMS} for r in found]))
        if isinstance(stage, Finetune) and found:
            *arms, baseline = stage.arms
            for arm in arms or [baseline]:
                how = "" if arm == "pretrained" else f", {HOW.get(arm, arm)}"
                text = f"{_measured(stage)}, {found[0]['labels']} {'labels' if stage.task.name == 'classify' else 'images'}{how}"
                out.append(Row(name, text, baseline, *(tuple(r[a]["test"] for r in found) for a in (arm, baseline))))
    return out


def _told(stage: Evaluate | Retrieve) -> list[str]:
    """Which features a stage looks at, a word or two for each layer; nothing for what is usual."""
    if stage.features == "head":
        return ["head"]
    return ["" if stage.layers == (-1,) else f"layer {layer}" for layer in stage.layers]


def _named(measure: str, *details: str) -> str:
    told = ", ".join(detail for detail in details if detail)
    return f"{measure} ({told})" if told else measure


def _against_random(stage: str, measure: str, found: Sequence[Mapping[str, float]]) -> Row:
    return Row(stage, measure, "random weights", *(tuple(r[arm] for r in found) for arm in ARMS))


def _measured(stage: Finetune) -> str:
    measure = TASKS[stage.task.name].measure
    return str(stage.task.name) if measure == "accuracy" else f"{stage.task.name} {measure}"


def _spread(values: Sequence[float] | np.ndarray) -> str:
    percent = 100 * np.asarray(values)
    return f"{percent.mean():.2f} ± {percent.std(ddof=1):.2f}" if len(percent) > 1 else f"{percent.mean():.2f}"


def table(recipe: Recipe, found: Sequence[Row]) -> Table:
    """Mean ± standard deviation over seeds, in percent."""
    out = Table(title=f"{recipe.name}: test scores (%), {len(recipe.seeds)} seed{'s' if len(recipe.seeds) > 1 else ''}", title_justify="left")
    for heading in ("stage", "measure", "pretrained", "without", "baseline", "gain", "pretraining"):
        out.add_column(heading, justify="right" if heading in ("pretrained", "baseline", "gain") else "left", no_wrap=True)
    for row in found:
        style = {"helps": "green", "hurts": "red"}.get(row.verdict, "yellow")
        gain = _spread(row.gain / 100)
        sign = "+" if row.gain.mean() >= 0 else ""
        out.add_row(row.stage, row.measure, _spread(row.pretrained), row.against, _spread(row.baseline), sign + gain, f"[{style}]{row.verdict}[/]")
    return out
