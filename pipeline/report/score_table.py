"""The table at the end: pretrained beside the same network without, over seeds, whether it helped, and what the paper reports."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.table import Table

from firstlight.pipeline.config.recipe import Evaluate, Expected, Finetune, Pretrain, Recipe, Retrieve
from firstlight.pipeline.stages.stage import Instance
from firstlight.pipeline.train.metrics import METRICS, read_metrics
from firstlight.tasks.downstream import TASKS
from firstlight.tasks.pretrain import METHODS

Result = Mapping[str, Any]  # what a stage with a seed has found
ARMS = ("pretrained", "random")
HOW = {
    "pretrained_decoder": "with the decoder",
    "scratch": "from scratch",
}  # arms that are told of; the others by their names


@dataclass(frozen=True)
class Row:
    """Test scores (0..1) by seed of one measure. `against` says what the baseline is; () and "" where there is none.

    `key` and `arm`: what a recipe's `expected` calls it. `scale`: what a score is multiplied by to be shown.
    """

    stage: str
    measure: str
    against: str
    pretrained: tuple[float, ...]
    baseline: tuple[float, ...]
    key: str = ""
    arm: str = "pretrained"
    scale: float = 100.0

    @property
    def mean(self) -> float:
        return self.scale * float(np.mean(self.pretrained))

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
    """A row per measure of the finished evaluations and fine-tunings, and of the pretrainings that the paper has a number for."""
    out: list[Row] = []
    for name, stage in recipe.stages.items() if recipe.score_test else ():
        done = [i for i in instances if i.stage == name and i.result is not None]
        found = [i.result for i in done if i.result is not None]
        if isinstance(stage, Pretrain) and found:
            out += [
                row
                for said in recipe.expected
                if said.stage == name and (row := _of_pretraining(said, stage, done)).pretrained
            ]
        if isinstance(stage, Evaluate) and found:
            out += _of_evaluation(name, stage, found)
        if isinstance(stage, Retrieve) and found and "precision" in found[0]["pretrained"]:
            out += _of_retrieval(name, stage, found)
        if isinstance(stage, Finetune) and found:
            out += _of_tuning(name, stage, found, [row for row in recipe.expected if row.stage == name])
    return out


def _of_evaluation(name: str, stage: Evaluate, found: Sequence[Result]) -> list[Row]:
    out = []
    for ending, of in zip(stage.endings, _told(stage), strict=True):
        for measure, text in (("knn", _named("kNN", f"k={stage.knn_k}", of)), ("probe", _named("linear probe", of))):
            ours, random = (tuple(r[arm][measure + ending]["test"] for r in found) for arm in ARMS)
            out.append(Row(name, text, "random weights", ours, random, measure + ending))
    return out


def _of_retrieval(name: str, stage: Retrieve, found: Sequence[Result]) -> list[Row]:
    out = []
    for k in stage.precision_at:
        ours, random = (tuple(r[arm]["precision"][str(k)] for r in found) for arm in ARMS)
        out.append(Row(name, _named(f"precision@{k}", *_told(stage)), "random weights", ours, random, f"precision@{k}"))
    return out


def _of_tuning(name: str, stage: Finetune, found: Sequence[Result], expected: Sequence[Expected]) -> list[Row]:
    """Every arm beside the last; that one too, without a baseline, where it is alone or the paper has a number for it."""
    *arms, last = stage.arms
    main, out = TASKS[stage.task.name].measure, []
    for measure in stage.measures:
        shown = stage.task.name if measure == "accuracy" else f"{stage.task.name} {measure}"
        text = f"{shown}, {found[0]['labels']} {'labels' if TASKS[stage.task.name].target == 'label' else 'images'}"
        scores = {
            arm: tuple(r[arm]["test"] if measure == main else r[arm]["scores"]["test"][measure] for r in found)
            for arm in stage.arms
        }
        for arm in arms:
            how = "" if arm == "pretrained" else f", {HOW.get(arm, arm)}"
            out.append(Row(name, text + how, last, scores[arm], scores[last], measure, arm))
        if not arms or any((row.arm, row.measure) == (last, measure) for row in expected):
            out.append(Row(name, f"{text}, {HOW.get(last, last)}", "", scores[last], (), measure, last))
    return out


def _told(stage: Evaluate | Retrieve) -> list[str]:
    """Which features a stage looks at, a word or two for each layer; nothing for what is usual."""
    if stage.features == "head":
        return ["head"]
    return ["" if stage.layers == (-1,) else f"layer {layer}" for layer in stage.layers]


def _named(measure: str, *details: str) -> str:
    told = ", ".join(detail for detail in details if detail)
    return f"{measure} ({told})" if told else measure


def _of_pretraining(row: Expected, stage: Pretrain, done: Sequence[Instance]) -> Row:
    """One of a pretraining's `measures`; without scores where there are none."""
    results = [i.result for i in done if i.result is not None]
    if row.measure == "accuracy":
        found = tuple(r["accuracy"]["test"] for r in results if "test" in r["accuracy"])
        return Row(row.stage, "its own classifier", "", found, (), key=row.measure)
    if row.measure in METHODS[stage.method.name].judged:
        found = tuple(r["held_out"][row.measure] for r in results if row.measure in r["held_out"])
        decibels = row.measure == "psnr"
        told = f"{'PSNR (dB)' if decibels else row.measure}, held-out images"
        return Row(row.stage, told, "", found, (), row.measure, scale=1.0 if decibels else 100.0)
    found = tuple(
        values[-1]
        for i in done
        if (values := [r[row.measure] for r in read_metrics(i.folder / METRICS) if row.measure in r])
    )
    return Row(row.stage, row.measure, "", found, (), row.measure)


def in_paper(recipe: Recipe, row: Row) -> Expected | None:
    """The number of the paper that `row` measures."""
    same = (e for e in recipe.expected if (e.stage, e.measure, e.arm) == (row.stage, row.key, row.arm))
    return next(same, None)


def facts(recipe: Recipe, row: Row) -> dict[str, Any]:
    """A row as plain JSON types; the paper's number and how far the mean is above it, where it has one, as they are shown."""
    plain = {
        "stage": row.stage,
        "measure": row.measure,
        "pretrained": row.pretrained,
        "baseline": row.baseline,
        "against": row.against,
    }
    said = in_paper(recipe, row)
    if said is None:
        return plain
    return plain | {
        "paper": said.paper,
        "paper_baseline": said.against,
        "above_paper": row.mean - said.paper,
        "source": said.source,
    }


def _spread(values: Sequence[float] | np.ndarray, scale: float = 100.0) -> str:
    shown = scale * np.asarray(values)
    return f"{shown.mean():.2f} ± {shown.std(ddof=1):.2f}" if len(shown) > 1 else f"{shown.mean():.2f}"


STYLES = {"helps": "green", "hurts": "red"}


def cells(recipe: Recipe, row: Row) -> dict[str, str]:
    """What the table shows of a row, by heading; "" where it has nothing to show. Mean ± standard deviation over seeds; of the paper its number, in
    brackets that of its baseline, and the difference from it."""
    shown = {"stage": row.stage, "measure": row.measure, "pretrained": _spread(row.pretrained, row.scale)}
    shown |= dict.fromkeys(("without", "baseline", "gain", "pretraining", "paper", "difference"), "")
    if row.baseline:
        sign = "+" if row.gain.mean() >= 0 else ""
        shown |= {
            "without": row.against,
            "baseline": _spread(row.baseline),
            "gain": sign + _spread(row.gain / 100),
            "pretraining": row.verdict,
        }
    if (said := in_paper(recipe, row)) is not None:
        shown["paper"] = f"{said.paper:g}" + ("" if said.against is None else f" ({said.against:g})")
        shown["difference"] = f"{row.mean - said.paper:+.2f}"
    return shown


def headings(recipe: Recipe) -> tuple[str, ...]:
    """Of the columns of the table."""
    paper = ("paper", "difference") if recipe.expected else ()
    return ("stage", "measure", "pretrained", "without", "baseline", "gain", "pretraining", *paper)


def title(recipe: Recipe) -> str:
    return f"test scores (%), {len(recipe.seeds)} seed{'s' if len(recipe.seeds) > 1 else ''}"


def table(recipe: Recipe, found: Sequence[Row]) -> Table:
    """A line for each row, as `cells` says."""
    out = Table(title=f"{recipe.name}: {title(recipe)}", title_justify="left")
    for heading in headings(recipe):
        left = heading in ("stage", "measure", "without", "pretraining")
        out.add_column(heading, justify="left" if left else "right", no_wrap=True)
    for row in found:
        shown = cells(recipe, row)
        if row.baseline:
            shown["pretraining"] = f"[{STYLES.get(row.verdict, 'yellow')}]{row.verdict}[/]"
        out.add_row(*(shown[heading] for heading in headings(recipe)))
    return out
