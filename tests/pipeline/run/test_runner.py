"""Runs of whole recipes: resumed, not repeated, published to MLflow; in process and on Ray with two workers."""

import io
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlflow
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

from firstlight.pipeline.config.load import parse_recipe
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.data.labelled import LABELLED_FILE
from firstlight.pipeline.data.manifest import DUPLICATES_FILE, MANIFEST_FILE, QUARANTINE_FILE
from firstlight.pipeline.data.prepare import prepare as prepare_module
from firstlight.pipeline.data.prepare.prepare import prepare
from firstlight.pipeline.data.sources import open_source
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.errors import StageFailed, StopTraining, UserError
from firstlight.pipeline.report.score_table import describe_scores
from firstlight.pipeline.run import preflight
from firstlight.pipeline.run.graph import adopt_encoder
from firstlight.pipeline.run.preparing import recipe_store
from firstlight.pipeline.run.ray_session import RaySession
from firstlight.pipeline.run.runner import run_recipe
from firstlight.pipeline.stages import pretrain
from firstlight.pipeline.stages.artifacts.companions import load_decoder
from firstlight.pipeline.stages.artifacts.encoder_description import read_encoder_spec
from firstlight.pipeline.stages.artifacts.encoder_folder import load_encoder
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.tracking import retry
from firstlight.pipeline.tracking.location import TrackingLocation
from firstlight.pipeline.train.checkpoint import Checkpoints
from firstlight.pipeline.train.context import StageContext
from tests.support import command, recipes
from tests.support.gloo import Pool
from tests.support.grey_images import images
from tests.support.recipe_runs import QUIET, on_ray, runs_of
from tests.support.state_hash import hash_state

pytestmark = pytest.mark.usefixtures("undrawn_figures")
PICTURES = ("curves", "targets", "speed", "neighbours", "map", "views", "filters")  # of a pretraining with NAT


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def files_of(storage: Path, recipe: Recipe, pattern: str) -> list[Path]:
    return sorted((storage / recipe.name).glob(pattern))


@pytest.mark.fault(21, "the run that is then run again")
def test_recipe_runs_all_stages_and_publishes_them(storage: Path) -> None:
    recipe = recipes.recipe(storage, seeds=[0, 1], stages__pretrain__register_as="small-nat")
    console = Console(file=io.StringIO())
    ran = run_recipe(recipe, console)
    rows = ran.rows
    assert isinstance(console.file, io.StringIO)
    lines = [line.strip() for line in console.file.getvalue().splitlines()]
    for row in rows:
        assert describe_scores(row) in lines, "the scores of a stage are printed when it ends"
    assert any(line.startswith("encoder (seed 0; 1 more): ") and "runs:/" in line for line in lines)
    assert [row.measure for row in rows] == ["kNN (k=5)", "linear probe", "classify, 40 labels"]
    assert all(len(row.pretrained) == len(row.baseline) == 2 for row in rows)
    assert all(0.05 < value <= 1 for row in rows for value in (*row.pretrained, *row.baseline))
    found = runs_of(recipe)
    parent = found["small"]
    assert set(found) == {
        "small",
        "prepare",
        *(f"{stage} seed {s}" for stage in ("pretrain", "evaluate", "finetune") for s in (0, 1)),
    }
    for name, child in found.items():
        assert child.info.status == "FINISHED", name
        if name != "small":
            assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    one = found["pretrain seed 0"]
    assert one.data.params["stage.method.permutation_period"] == "2"
    assert one.inputs.dataset_inputs[0].dataset.digest == Store.open(next((storage / "stores").iterdir())).hash[:36]
    client = mlflow.MlflowClient(TrackingLocation.of(recipe).uri)
    assert [m.step for m in client.get_metric_history(one.info.run_id, "loss")] == [1, 2, 3, 4, 5, 6]
    assert {a.path for a in client.list_artifacts(one.info.run_id, "figures")} == {f"figures/{n}.png" for n in PICTURES}
    assert one.data.metrics["time_forward"] > 0
    assert "report.html" in {a.path for a in client.list_artifacts(parent.info.run_id)}
    assert "figures/comparison.png" in {a.path for a in client.list_artifacts(parent.info.run_id, "figures")}
    tuned = found["finetune seed 1"]
    assert {"tails.jsonl"} <= {a.path for a in client.list_artifacts(one.info.run_id)}
    assert {"labelled.parquet", "finetune.json"} <= {a.path for a in client.list_artifacts(tuned.info.run_id)}
    (folder,) = files_of(storage, recipe, "finetune-seed1-*")
    assert pq.read_table(folder / LABELLED_FILE).column("label").to_pylist() == tuned_labels(storage, recipe)
    assert tuned.data.tags["firstlight.encoder"] == f"runs:/{found['pretrain seed 1'].info.run_id}/encoder"
    assert tuned.data.metrics["scratch/test"] == pytest.approx(rows[2].baseline[1])
    assert client.get_model_version_by_alias("small-nat", "current").run_id == one.info.run_id


def tuned_labels(storage: Path, recipe: Recipe) -> list[int]:
    """Returns the labels of the images that the fine-tuning with seed 1 learned from."""
    context = StageContext.create(recipe, Store.open(next((storage / "stores").iterdir())), on_ray=False)
    stage: Any = recipe.stages["finetune"]
    return context.splits.labels[context.splits.labelled_subset(stage, 1)].tolist()  # type: ignore[no-any-return]


def test_auto_encoder_publishes_reconstructions_and_its_decoder(tmp_path: Path) -> None:
    adam = {"name": "Adam", "lr": 1e-3}
    recipe = recipes.recipe(
        tmp_path, stages__pretrain__method={"name": "dae"}, stages__pretrain__optimizer=adam, **recipes.QUICK
    )
    assert len(run_recipe(recipe, QUIET).rows) == 3
    trained = runs_of(recipe)["pretrain seed 0"]
    client = mlflow.MlflowClient(TrackingLocation.of(recipe).uri)
    assert {"figures/reconstructions.png", "figures/feature_maps.png"} <= {
        a.path for a in client.list_artifacts(trained.info.run_id, "figures")
    }
    assert {a.path for a in client.list_artifacts(trained.info.run_id, "decoder")} == {
        f"decoder/{name}" for name in ("manifest.json", "network.json", "network.safetensors")
    }
    (folder,) = files_of(tmp_path, recipe, "pretrain-seed0-*")
    encoder, decoder = load_encoder(folder / "encoder", 8).eval(), load_decoder(folder / "decoder").eval()
    context = StageContext.create(recipe, Store.open(next((tmp_path / "stores").iterdir())), on_ray=False)
    batch = next(context.iterate_batches(context.splits.val, 4))
    given = encoder.input(batch.views[0])
    with torch.no_grad():
        assert decoder(encoder(batch.views[0]), given).shape == given.shape
    (folder / "decoder" / "network.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="is not a whole decoder"):
        load_decoder(folder / "decoder")


def test_a_semi_supervised_method_is_scored_by_its_own_classifier(tmp_path: Path) -> None:
    raw = recipes.recipe(tmp_path, encoder__width=16).dump()
    stage = raw["stages"]["pretrain"] | {
        "method": {"name": "clustering_locality", "gamma": 0.0},
        "epochs": 40,
        "labelled_per_batch": 16,
    }
    stage |= {"labels_per_class": 5, "optimizer": {"name": "Adam", "lr": 0.01}, "checkpoint_every": 0}
    recipe = parse_recipe({**raw, "stages": {"pretrain": stage}})
    assert run_recipe(recipe, QUIET).rows == []
    told = runs_of(recipe)["pretrain seed 0"].data.metrics
    assert told["own_classifier/test"] > 0.3, "ten classes"
    assert 0 <= told["own_classifier/val"] <= 1
    (folder,) = files_of(tmp_path, recipe, "pretrain-seed0-*")
    assert pq.read_table(folder / LABELLED_FILE).num_rows == 50


@pytest.mark.fault(21, "the same run again")
def test_second_run_does_nothing_and_returns_the_same_table(storage: Path) -> None:
    recipe = recipes.recipe(storage, seeds=[0, 1], stages__pretrain__register_as="small-nat")
    before = {name: r.info.end_time for name, r in runs_of(recipe).items()}
    rows = run_recipe(recipe, QUIET).rows
    assert len(rows) == 3
    assert {name: r.info.end_time for name, r in runs_of(recipe).items()} == before


@pytest.mark.fault(21, "a run of the same name with other settings")
def test_changed_stage_runs_without_the_stages_before_it(storage: Path) -> None:
    recipe = recipes.recipe(storage, seeds=[0, 1], stages__finetune__epochs=2, stages__finetune__learning_rates=[])
    before = len(files_of(storage, recipe, "pretrain-*"))
    run_recipe(recipe, QUIET)
    assert len(files_of(storage, recipe, "pretrain-*")) == before
    assert len(files_of(storage, recipe, "finetune-*")) == 4


@pytest.mark.parametrize("reference", ["runs:/{run}/encoder", "models:/small-nat@current", "models:/small-nat/1"])
def test_encoder_by_reference_equals_that_of_the_previous_stage(storage: Path, reference: str) -> None:
    found = runs_of(recipes.recipe(storage))
    reference = reference.format(run=found["pretrain seed 0"].info.run_id)
    recipe = recipes.recipe(storage, stages__finetune__encoder=reference, name="referring")
    del recipe.stages["pretrain"], recipe.stages["evaluate"]
    rows = run_recipe(recipe, QUIET).rows
    original = json.loads(
        files_of(storage, recipes.recipe(storage), "finetune-seed0-*")[0].joinpath("result.json").read_text()
    )
    previous = [
        json.loads(f.joinpath("result.json").read_text())
        for f in files_of(storage, recipes.recipe(storage), "finetune-seed0-*")
    ]
    assert original in previous
    assert any(
        rows[0].pretrained[0] == p["pretrained"]["test"] and rows[0].baseline[0] == p["scratch"]["test"]
        for p in previous
    )


@pytest.mark.parametrize(
    ("section", "told"),
    [
        (None, 'name "convnet", input "gray", norm "sync", width 4, depth 2'),
        ({"name": "convnet"}, 'input "gray", norm "sync", width 4, depth 2'),
        ({"name": "convnet", "width": 4, "input": "gray"}, 'norm "sync", depth 2'),
        ({"name": "resnet18"}, ""),
    ],
)
def test_keys_of_the_encoder_that_are_left_out_are_those_of_the_artifact(
    storage: Path, section: dict[str, Any] | None, told: str
) -> None:
    whole = recipes.recipe(storage, stages__finetune__encoder="models:/small-nat/1", name="whole")
    raw = {**whole.dump(), "encoder": section, "stages": {"finetune": whole.dump()["stages"]["finetune"]}}
    recipe = parse_recipe(raw)
    found, line = adopt_encoder(recipe, None, None)
    if not told:
        assert (found, line) == (recipe, ""), "all else differs, too: it is refused by its name"
        return
    saved = read_encoder_spec(files_of(storage, recipes.recipe(storage), "pretrain-seed0-*")[0] / "encoder")
    assert json.loads(json.dumps(found.network_spec)) == json.loads(json.dumps(saved))
    assert found.dump() | {"encoder": None} == raw | {"encoder": None}
    start = "encoder, as models:/small-nat/1 has it, which stages.finetune.encoder names: "
    assert set(told.split(", ")) <= set(line.removeprefix(start).split(", "))
    assert line.startswith(start)
    assert not section or "name" not in line.removeprefix(start)


def test_stage_runs_without_a_section_of_the_encoder(storage: Path) -> None:
    whole = recipes.recipe(storage, stages__finetune__encoder="models:/small-nat/1", name="whole", **recipes.QUICK)
    stages = {"finetune": whole.dump()["stages"]["finetune"]}
    console = Console(record=True, width=300, file=io.StringIO())
    absent = parse_recipe({**whole.dump(), "name": "absent", "encoder": None, "stages": stages})
    (row,) = run_recipe(absent, console).rows
    assert "encoder, as models:/small-nat/1 has it" in console.export_text()
    (stated,) = run_recipe(parse_recipe({**whole.dump(), "name": "stated", "stages": stages}), QUIET).rows
    assert (row.pretrained, row.baseline) == (stated.pretrained, stated.baseline)


def test_encoder_is_read_from_no_artifact_where_a_stage_trains_it(storage: Path) -> None:
    recipe = recipes.recipe(storage, stages__finetune__encoder="models:/none@current")
    raw = recipe.dump()
    del raw["encoder"]["width"]
    partial = parse_recipe(raw)
    assert adopt_encoder(partial, None, None) == (partial, "")
    with pytest.raises(UserError, match=r"^encoder: is missing and has no default; it can be left out only where "):
        parse_recipe({**raw, "encoder": None})


def test_key_of_the_encoder_that_contradicts_the_artifact_is_refused(storage: Path) -> None:
    whole = recipes.recipe(storage, stages__finetune__encoder="models:/small-nat/1", name="contradicting")
    raw = {**whole.dump(), "encoder": {"name": "convnet", "width": 5}}
    raw["stages"] = {"finetune": raw["stages"]["finetune"]}
    with pytest.raises(UserError, match=r"^encoder\.width: 5 differs from 4 of the encoder that stages\.finetune"):
        run_recipe(parse_recipe(raw), QUIET)


@pytest.mark.fault(13, "64 workers")
@pytest.mark.fault(33, "a batch larger than the images")
@pytest.mark.fault(41, "no MLflow server at the start")
@pytest.mark.fault(43, "file: as tracking.uri")
@pytest.mark.fault(47, "an encoder of another width")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"stages__finetune__encoder": "runs:/0123456789abcdef0123456789abcdef/encoder"},
            "stages.finetune.encoder: 'runs:/0123",
        ),
        ({"stages__finetune__encoder": "models:/none@current"}, "stages.finetune.encoder: 'models:/none@current'"),
        ({"stages__finetune__encoder": "models:/small-nat/1", "encoder__width": 5}, "encoder.width: 5 differs from 4"),
        ({"stages__finetune__labels_per_class": 99}, "stages.finetune.labels_per_class: 99 is more than"),
        (
            {"stages__finetune__labels_per_class": None, "stages__finetune__labels_subset": "fold{seed}"},
            "stages.finetune.labels_subset: ",
        ),
        ({"stages__pretrain__batch_size": 500}, "stages.pretrain.batch_size: 500 is more than the 110 images"),
        ({"dataset__max_train": 5000}, "dataset.max_train: 5000 is more than"),
        ({"dataset__test_fraction": 0.0}, "needs a test split"),
        ({"scale__workers": 3, "stages__pretrain__batch_size": 32, "scale__cpus": 8}, "stages.pretrain.batch_size: 32"),
        ({"scale__workers": 64}, "scale.workers: 64 workers"),
        ({"scale__workers": 1, "scale__cpus": 4, "scale__gpus_per_worker": 999}, "scale.gpus_per_worker"),
        ({"tracking__uri": "file:///tmp/mlruns"}, "tracking.uri: 'file:///tmp/mlruns'"),
        ({"tracking__uri": "http://127.0.0.1:9"}, "tracking.uri: 'http://127.0.0.1:9' cannot be used"),
        ({"dataset__image_size": 4, "encoder__depth": 4}, "dataset.image_size: 4"),
    ],
)
def test_impossible_recipe_is_one_line_before_any_training(
    storage: Path, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A server that does not answer is not asked again, as seconds would pass before that.
    monkeypatch.setattr(retry, "SHORT_TIMEOUT_RETRIES", 0)
    with pytest.raises(UserError) as caught:
        run_recipe(recipes.recipe(storage, **changes), QUIET)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert len(files_of(storage, recipes.recipe(storage), "pretrain-*")) == 2, "nothing was trained"


@pytest.mark.fault(24, "storage below a file, and in /sys")
@pytest.mark.parametrize("where", ["file/below", "/sys/firstlight"])
def test_storage_that_cannot_be_written_is_refused(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"storage: .* cannot be written: "):
        run_recipe(recipes.recipe(tmp_path / where), QUIET)


@pytest.mark.fault(32, "no such folder of images")
def test_missing_dataset_folder_is_refused(tmp_path: Path) -> None:
    changes = {"dataset__source": "folder", "dataset__root": str(tmp_path / "none")}
    with pytest.raises(UserError, match=r"dataset\.root"):
        run_recipe(recipes.recipe(tmp_path, **changes), QUIET)


@pytest.mark.parametrize(("address", "writes_on_ray"), [("local", False), ("auto", True)])
def test_only_a_cluster_writes_its_store_on_ray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str, writes_on_ray: bool
) -> None:
    """Also, the files are listed once, for the checks and for the store."""
    listed, asked = [], []

    def follow_prepare(*arguments: Any) -> Any:
        asked.append(arguments[2]())
        return prepare(*arguments[:2], lambda: False, *arguments[3:])

    monkeypatch.setattr(RaySession, "start", lambda session: True)
    monkeypatch.setattr(recipe_store, "prepare", follow_prepare)
    monkeypatch.setattr(preflight, "open_source", lambda dataset: listed.append(dataset) or open_source(dataset))
    monkeypatch.setattr(prepare_module, "open_source", lambda dataset: pytest.fail("it is listed again"))
    recipe = recipes.recipe(tmp_path, scale__workers=1, scale__address=address)
    run_recipe(recipe, QUIET, only="prepare")
    assert (asked, len(listed)) == ([writes_on_ray], 1)


@pytest.mark.fault(35, "a test image is also in train")
def test_statistics_are_printed_once_and_warnings_about_images_every_time(tmp_path: Path) -> None:
    root = images(tmp_path / "in", 150, bad=(3,))
    (root / "train/a/000.png").write_bytes((root / "test/a/000.png").read_bytes())
    fields = {
        "name": "greys",
        "source": "folder",
        "root": str(root),
        "max_train": None,
        "max_test": None,
        "max_bad_fraction": 0.1,
    }
    recipe = recipes.recipe(
        tmp_path / "st",
        stages__finetune__labels_per_class=20,
        **{f"dataset__{key}": value for key, value in fields.items()},
    )
    told = []
    for _ in range(2):
        console = Console(file=io.StringIO(), width=100)
        run_recipe(recipe, console, only="prepare")
        told.append(console.file.getvalue().splitlines())  # type: ignore[attr-defined]
    (store,) = (tmp_path / "st" / "stores").iterdir()
    notes = [
        f"note 1 image cannot be decoded (1 truncated), listed in {store / QUARANTINE_FILE}",
        "note images of one colour: 155",
        "note copies of other images: 1, 1 of them test images that are also in train, "
        f"listed in {store / DUPLICATES_FILE}",
    ]
    assert [line for line in told[0] if line.startswith("  ")] == [
        "  read 156 files, left out 0",
        "  splits: training = train; test = test",
        "  classes, 2 with their training images: a 75, b 75",
        "  train 149, test 6 images of 3 to 5 x 4 pixels, 0.1 kB each on average",
        "  format PNG; mode RGB",
        "  train: 2 classes of 74 to 75 images",
        "  test: 2 classes of 3 images",
        "  images: 134 to train on, 15 held out of these, 6 to test on",
    ]
    assert [line for line in told[0] if line.startswith("note")] == notes
    assert [line for line in told[1] if not line.startswith(("prepare:", "chosen:"))] == [
        *notes,
        f"the store is complete: {store}",
    ]
    client, prepared = mlflow.MlflowClient(TrackingLocation.of(recipe).uri), runs_of(recipe)["prepare"]
    assert {a.path for a in client.list_artifacts(prepared.info.run_id)} == {
        "figures",
        MANIFEST_FILE,
        QUARANTINE_FILE,
        DUPLICATES_FILE,
    }
    assert {a.path for a in client.list_artifacts(prepared.info.run_id, "figures")} == {
        f"figures/{n}.png" for n in ("classes", "images", "sample")
    }
    assert {k: v for k, v in prepared.data.metrics.items() if "images" not in k} == {
        "quarantined": 1,
        "copies": 1,
        "of_train_in_test": 1,
    }


def test_extended_store_reports_how_many_images_it_had(tmp_path: Path) -> None:
    fields = {
        "name": "greys",
        "source": "folder",
        "root": str(images(tmp_path / "in", 150)),
        "max_train": None,
        "max_test": None,
    }
    changes = {"stages__finetune__labels_per_class": 20, **{f"dataset__{key}": value for key, value in fields.items()}}
    run_recipe(recipes.recipe(tmp_path / "st", **changes), QUIET, only="prepare")
    (store,) = (tmp_path / "st" / "stores").iterdir()
    images(tmp_path / "in", 160)  # writes the first 150 again, to the same bytes
    console = Console(file=io.StringIO(), width=60)
    extended = recipes.recipe(tmp_path / "st", **changes, dataset__extends=str(store))
    run_recipe(extended, console, only="prepare")
    told = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert any(line.startswith(f"prepare: 166 images (156 of them in {store.name}) in ") for line in told)
    assert "  train 160, test 6 images of 3 to 5 x 4 pixels, 0.1 kB each on average" in told
    with pytest.raises(UserError, match=r"^dataset\.extends: 'none' has no manifest\.json; valid: "):
        run_recipe(recipes.recipe(tmp_path / "st", **changes, dataset__extends="none"), QUIET, only="prepare")


@pytest.mark.fault(22, "two runs of one name at once")
def test_second_run_of_the_same_name_at_once_is_refused(storage: Path) -> None:
    program = (
        "import fcntl, sys, time; file = open(sys.argv[1], 'a+'); fcntl.flock(file, fcntl.LOCK_EX)\n"
        "file.truncate(0); file.write('4711'); file.flush(); print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(storage / "small" / ".lock")], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    try:
        with pytest.raises(UserError, match="'small' is being run by process 4711"):
            run_recipe(recipes.recipe(storage), QUIET)
    finally:
        holder.kill()
        holder.wait()


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    recipe = recipes.recipe(tmp_path)
    recipes.store(tmp_path)
    shard = next((tmp_path / "stores").glob("*/train-00000.parquet"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(bytes(data))
    with pytest.raises(UserError, match=r"train-00000\.parquet: .*sha256"):
        run_recipe(recipe, QUIET)


@pytest.mark.fault(50, "the encoder of an earlier stage is damaged")
def test_a_damaged_encoder_is_named(storage: Path, tmp_path: Path) -> None:
    shutil.copytree(storage, tmp_path / "copy")
    recipe = recipes.recipe(tmp_path / "copy", stages__finetune__epochs=3)
    (weights,) = (tmp_path / "copy" / "small").glob("pretrain-seed0-*/encoder/encoder.safetensors")
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"encoder\.safetensors: has \d+ bytes, its manifest says"):
        run_recipe(recipe, QUIET)


@pytest.mark.fault(50, "an earlier stage that still runs, or has failed: in this recipe and by reference")
def test_an_encoder_of_a_run_that_has_not_finished_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipes.recipe(tmp_path)

    def explode(*arguments: Any) -> None:
        raise StopTraining("the loss of step 3 is not finite")

    with monkeypatch.context() as cut:
        cut.setattr(pretrain, "fit", explode)
        with pytest.raises(StopTraining):
            run_recipe(recipe, QUIET)
    with pytest.raises(
        UserError,
        match=r"^stages\.finetune\.encoder: 'previous' is pretrain seed 0, which has not finished; run it first",
    ):
        run_recipe(recipe, QUIET, only="finetune")
    upstream = runs_of(recipe)["pretrain seed 0"].info
    assert upstream.status == "FAILED"
    other = recipes.recipe(tmp_path, name="other", stages__finetune__encoder=f"runs:/{upstream.run_id}/encoder")
    del other.stages["pretrain"], other.stages["evaluate"]
    with pytest.raises(
        UserError, match=rf"^stages\.finetune\.encoder: 'runs:/{upstream.run_id}/encoder' is not in sqlite:"
    ):
        run_recipe(other, QUIET)


def test_stopped_training_fails_its_runs_and_the_next_command_revives_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipes.recipe(tmp_path, **recipes.QUICK)
    real = pretrain.fit

    def explode(*arguments: Any) -> None:
        real(*arguments)
        raise StopTraining("the loss of step 3 is not finite")

    monkeypatch.setattr(pretrain, "fit", explode)
    with pytest.raises(StopTraining):
        run_recipe(recipe, QUIET)
    failed = runs_of(recipe)
    assert {failed[n].info.status for n in ("small", "pretrain seed 0")} == {"FAILED"}
    report = (tmp_path / "small" / "report.html").read_text()
    assert "the loss of step 3 is not finite" in report
    assert "stopped: 0 of 3 parts done" in report
    monkeypatch.setattr(pretrain, "fit", real)
    run_recipe(recipe, QUIET)
    after = runs_of(recipe)
    for name in ("small", "pretrain seed 0"):
        assert after[name].info.run_id == failed[name].info.run_id
        assert after[name].info.status == "FINISHED"
    report = (tmp_path / "small" / "report.html").read_text()
    assert "is not finite" not in report
    assert "resumed 1 time<" in report
    with pytest.raises(UserError):
        run_recipe(recipes.recipe(tmp_path, stages__finetune__labels_per_class=99, **recipes.QUICK), QUIET)
    assert (tmp_path / "small" / "report.html").read_text() == report, "a mistake before the work leaves it as it is"
    history = mlflow.MlflowClient(TrackingLocation.of(recipe).uri).get_metric_history(
        after["pretrain seed 0"].info.run_id, "loss"
    )
    assert [m.step for m in history] == [1, 2, 3, 4, 5, 6]


@pytest.mark.fault(8, "killed between MLflow and the disk")
@pytest.mark.fault(55, "params that MLflow has already")
@pytest.mark.parametrize("remembered", ["key", "nothing published"])
def test_run_and_model_of_a_killed_process_are_not_duplicated(storage: Path, remembered: str) -> None:
    """It was killed between making the run and noting its id, or between publishing and noting that."""
    recipe = recipes.recipe(storage, seeds=[0, 1], stages__pretrain__register_as="small-nat")
    run_recipe(recipe, QUIET)
    client = mlflow.MlflowClient(TrackingLocation.of(recipe).uri)
    experiment = client.get_experiment_by_name("firstlight").experiment_id

    def made() -> tuple[Any, ...]:
        runs, models = client.search_runs([experiment]), client.search_logged_models([experiment])
        return (
            {r.info.run_id for r in runs},
            {m.model_id for m in models},
            [v.version for v in client.search_model_versions("name = 'small-nat'")],
        )

    before = made()
    (folder,) = files_of(storage, recipe, "pretrain-seed0-*")
    (folder / "published.json").unlink()
    if remembered == "key":
        note = json.loads((folder / "mlflow.json").read_text())
        (folder / "mlflow.json").write_text(json.dumps({"key": note["key"]}))
    run_recipe(recipe, QUIET)
    assert made() == before
    assert runs_of(recipe)["pretrain seed 0"].info.status == "FINISHED"


def pretrain_below_ray(folder: str, store: str) -> None:
    recipe = on_ray(Path(folder))
    context = StageContext.create(recipe, Store.open(Path(store)), on_ray=False)
    pretrain.PretrainStage().run(
        context, recipe.stages["pretrain"], StageInstance("pretrain", 0, "f", Path(folder) / "pretrain-seed0-f")
    )  # type: ignore[arg-type]


def end_state(folder: Path) -> str:
    (instance,) = folder.glob("pretrain-seed0-*")
    found, _ = Checkpoints(instance / "checkpoints").read_newest()
    assert found is not None
    return hash_state([found.shared, found.shards])


@pytest.mark.fault(1, "a worker is killed, under Ray")
@pytest.mark.ray
def test_killed_worker_is_replaced_and_training_ends_bit_identical(
    tmp_path: Path, pool: Pool, ray_local: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The yardstick is a training below Ray, by two processes that are not killed: Ray changes no bit either."""
    recipe = on_ray(tmp_path, stream__resident="off")  # through Ray Data; below Ray the images are held decoded
    once = tmp_path / "once"
    monkeypatch.setenv("FIRSTLIGHT_FAULT", f"rank=1,step=4,kind=sigkill,once={once}")
    run_recipe(recipe, QUIET)
    assert once.exists(), "the fault was injected"
    (store,) = (tmp_path / "stores").iterdir()
    pool.run(pretrain_below_ray, str(tmp_path / "clean"), str(store))
    assert end_state(tmp_path / recipe.name) == end_state(tmp_path / "clean")


@pytest.mark.fault(2, "a worker raises, under Ray")
@pytest.mark.ray
def test_worker_that_always_fails_ends_in_one_line(
    tmp_path: Path, ray_local: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = on_ray(tmp_path, scale__max_failures=0)
    monkeypatch.setenv("FIRSTLIGHT_FAULT", f"rank=1,step=2,kind=raise,once={tmp_path / 'once'}")
    with pytest.raises(StageFailed) as caught:
        run_recipe(recipe, QUIET)
    assert "injected fault" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.fault(9, "SIGTERM, under Ray")
@pytest.mark.ray
def test_sigterm_ends_the_run_as_killed(tmp_path: Path, forked_ray_workers: None) -> None:
    conf = tmp_path / "recipe.yaml"
    recipe = on_ray(tmp_path / "runs", stages__pretrain__epochs=400)
    conf.write_text(json.dumps(recipe.dump()))
    running = command.start(tmp_path / "out.txt", "run", str(conf), has_small_ray=True)
    wait_for_steps(tmp_path / "runs" / "small", running)
    running.send(signal.SIGTERM)
    code, output = running.wait(timeout=300)
    assert code == 143, output
    assert output.splitlines()[-1] == "stopped; run the same command again to continue"
    assert "Traceback" not in output
    assert runs_of(recipe)["pretrain seed 0"].info.status == "KILLED"


def wait_for_steps(folder: Path, running: command.Command) -> None:
    """Until the training has logged something."""
    end = time.monotonic() + 900
    while time.monotonic() < end and running.process.is_alive():
        found = list(folder.glob("pretrain-seed0-*/metrics.jsonl"))
        if found and "loss" in found[0].read_text():
            return
        time.sleep(0.5)
    raise AssertionError(f"no step was made: {running.wait(timeout=5)}")


def test_command_of_a_kind_that_the_recipe_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no stage of the kind retrieve; .*stages\.retrieve=\{\} adds one"):
        run_recipe(recipes.recipe(tmp_path), QUIET, only="retrieve")
    assert not (tmp_path / "stores").exists()
