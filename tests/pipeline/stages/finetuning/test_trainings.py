"""Every candidate of a fine-tuning is trained, but those that start from the same network once."""

from pathlib import Path

import pytest
import torch

from firstlight.pipeline.data.store import Store
from firstlight.pipeline.stages.finetuning import trainings
from firstlight.pipeline.train.loop import fit
from firstlight.pipeline.train.metrics import METRICS_FILE, read_metrics, read_metrics_rows
from tests.support.finetunings import start_arm


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
