"""Every candidate of a fine-tuning is trained, but those that start from the same network once."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from firstlight.pipeline.data.store import Store
from firstlight.pipeline.stages.finetuning import trainings
from firstlight.pipeline.stages.sections.finetune import Finetune
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.train.context import StageContext
from firstlight.pipeline.train.loop import fit
from firstlight.pipeline.train.metrics import METRICS_FILE, read_metrics, read_metrics_rows
from firstlight.pipeline.train.training_job import TrainingJob
from firstlight.tasks.downstream.task import Task
from tests.support.finetunings import save_seen_encoder, start_arm


@pytest.mark.parametrize("is_same", [True, False])
def test_arms_that_start_from_the_same_network_are_trained_once(
    tmp_path: Path, digits: Store, monkeypatch: pytest.MonkeyPatch, is_same: bool
) -> None:
    context, stage, instance, start = start_arm(tmp_path, digits, "given")
    object.__setattr__(instance, "encoder", instance.given)
    stage = stage.model_copy(update={"arms": ("pretrained", "given", "scratch")})
    fitted = []
    monkeypatch.setattr(trainings, "fit", lambda job, task: (fitted.append(job.folder.name), fit(job, task)))
    if not is_same:
        build = trainings.build_arm_task

        def build_other(*arguments: object) -> torch.nn.Module:
            task = build(*arguments)  # type: ignore[arg-type]
            with torch.no_grad():
                next(task.parameters()).flatten()[0].add_(1e-7 if arguments[-1] == "given" else 0.0)
            return task

        monkeypatch.setattr(trainings, "build_arm_task", build_other)
    tasks = trainings.train_candidates(context, stage, instance)
    wanted = [f"{arm}-lr{rate}" for arm in ("pretrained", "given", "scratch") for rate in (0.1, 0.3)]
    assert list(tasks) == wanted
    assert fitted == [name for name in wanted if not is_same or not name.startswith("given")]
    for rate in (0.1, 0.3):
        pretrained, given = tasks[f"pretrained-lr{rate}"], tasks[f"given-lr{rate}"]
        assert (pretrained is given) == is_same
        assert not torch.equal(next(given.parameters()), next(start.parameters()))
        assert tasks[f"scratch-lr{rate}"] is not given
        curves = [instance.folder / f"{arm}-lr{rate}" / METRICS_FILE for arm in ("pretrained", "given")]
        assert (read_metrics(curves[0]) == read_metrics(curves[1])) == is_same
        notes = [row["note"] for row in read_metrics_rows(curves[1]) if "one training" in row.get("note", "")]
        assert notes == (
            [f"given-lr{rate} starts from the same network as pretrained-lr{rate}: they are one training"]
            if is_same
            else []
        )


def test_trainings_that_are_repeated_after_a_kill_note_it_once(tmp_path: Path, digits: Store) -> None:
    context, stage, instance, _ = start_arm(tmp_path, digits, "given")
    object.__setattr__(instance, "encoder", instance.given)
    stage = stage.model_copy(update={"arms": ("pretrained", "given")})
    once = trainings.train_candidates(context, stage, instance)
    again = trainings.train_candidates(context, stage, instance)
    for name, task in once.items():
        assert all(map(torch.equal, task.state_dict().values(), again[name].state_dict().values()))
    notes = [row["note"] for row in read_metrics_rows(instance.folder / "given-lr0.1" / METRICS_FILE) if "note" in row]
    assert len([note for note in notes if "one training" in note]) == 1


@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)])
def test_candidates_that_were_trained_one_by_one_are_those_that_are_trained_together(
    tmp_path: Path, digits: Store, monkeypatch: pytest.MonkeyPatch, order: slice
) -> None:
    context, stage, instance, _ = start_arm(tmp_path, digits, "given")
    object.__setattr__(instance, "encoder", instance.given)
    stage = stage.model_copy(update={"arms": ("pretrained", "given", "scratch")})
    names = [f"{arm}-lr{rate}" for arm in ("pretrained", "given", "scratch") for rate in (0.1, 0.3)]
    together = trainings.train_candidates(context, stage, replace(instance, folder=tmp_path / "together"))
    fitted = []
    monkeypatch.setattr(trainings, "fit", lambda job, task: (fitted.append(job.folder.name), fit(job, task)))
    for name in names[order]:
        trainings.train_candidate(context, stage, instance, name)
    assert fitted == [name for name in names[order] if not name.startswith("given")], "given is pretrained here"
    before = {name: read_metrics(instance.folder / name / METRICS_FILE) for name in fitted}
    found = trainings.train_candidates(context, stage, instance)
    assert list(found) == list(together) == names
    for name, task in together.items():
        assert all(map(torch.equal, task.state_dict().values(), found[name].state_dict().values()))
        folders = [base / name for base in (instance.folder, tmp_path / "together")]
        for key in ("loss", "note"):
            found_rows, rows = (
                [row[key] for row in read_metrics_rows(folder / METRICS_FILE) if key in row] for folder in folders
            )
            assert found_rows == rows
    # No step was made again for those that were finished.
    assert {name: read_metrics(instance.folder / name / METRICS_FILE) for name in before} == before


def _train_counted(
    monkeypatch: pytest.MonkeyPatch, context: StageContext, stage: Finetune, instance: StageInstance
) -> tuple[dict[str, Task], list[str]]:
    """Returns the networks of `train_candidates`, and the trainings that it made steps for."""
    trained = []

    def fit_counted(job: TrainingJob, task: Task) -> None:
        if not (job.folder / "checkpoints").exists():
            trained.append(job.folder.name)
        fit(job, task)

    monkeypatch.setattr(trainings, "fit", fit_counted)
    return trainings.train_candidates(context, stage, instance), trained


def test_stages_that_differ_in_their_encoder_share_the_training_from_scratch(
    tmp_path: Path, digits: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, stage, first, _ = start_arm(tmp_path, digits, "pretrained")
    stage = stage.model_copy(update={"arms": ("pretrained", "scratch")})
    facts = {"stage": {"encoder": "a", "epochs": 2, "arms": None}, "seed": 3, "store": digits.hash}
    first = replace(first, facts={**facts, "from": "a"})
    mine, trained = _train_counted(monkeypatch, context, stage, first)
    assert trained == ["pretrained-lr0.1", "pretrained-lr0.3", "scratch-lr0.1", "scratch-lr0.3"]

    _, other = save_seen_encoder(tmp_path / "other", {**context.recipe.network_spec, "init": "he"})
    own = {"encoder": "b", "epochs": 2, "arms": ["pretrained", "scratch"]}
    second = replace(
        first, stage="other", folder=tmp_path / "other-job", encoder=other, facts={**facts, "stage": own, "from": "b"}
    )
    others, trained = _train_counted(monkeypatch, context, stage, second)
    assert trained == ["pretrained-lr0.1", "pretrained-lr0.3"]
    for name, task in others.items():
        equal = all(map(torch.equal, task.state_dict().values(), mine[name].state_dict().values()))
        assert equal == name.startswith("scratch")
        curves = [read_metrics(instance.folder / name / METRICS_FILE) for instance in (first, second)]
        assert (curves[0] == curves[1]) == name.startswith("scratch")
    notes = [row["note"] for row in read_metrics_rows(second.folder / "scratch-lr0.1" / METRICS_FILE) if "note" in row]
    assert notes[-1].startswith("scratch-lr0.1 has the images, settings and first weights of job/scratch-lr0.1")


@pytest.mark.parametrize(
    "change", [{"seed": 4}, {"stage": {"encoder": "b", "epochs": 3}}, {"store": "other"}, {"code": "newer"}]
)
def test_a_training_of_other_facts_is_not_shared(
    tmp_path: Path, digits: Store, monkeypatch: pytest.MonkeyPatch, change: dict[str, object]
) -> None:
    context, stage, first, _ = start_arm(tmp_path, digits, "pretrained")
    stage = stage.model_copy(update={"arms": ("scratch",), "learning_rates": ()})
    facts = {"stage": {"encoder": "a", "epochs": 2}, "seed": 3, "store": digits.hash, "code": "this"}
    first = replace(first, facts=facts)
    _train_counted(monkeypatch, context, stage, first)
    same = replace(first, folder=tmp_path / "same")
    assert _train_counted(monkeypatch, context, stage, same)[1] == []
    changed = replace(first, folder=tmp_path / "changed", facts={**facts, **change})
    assert len(_train_counted(monkeypatch, context, stage, changed)[1]) == 1
