"""An export that is pushed is loaded by timm; what goes wrong is one line that never has the token."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
import yaml
from click.testing import CliRunner, Result

from firstlight.pipeline.cli.main import cli
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.report.cards.fine_tuned_card import write_exported_card
from firstlight.pipeline.report.publish.hub import HubTarget, find_export, hide_tokens, open_export, push_folder
from firstlight.pipeline.report.publish.hub_files import list_hub_files
from firstlight.pipeline.tracking.lineage import read_lineage
from firstlight.pipeline.tracking.location import parse_location
from tests.support.exported_models import export_model, write_export
from tests.support.hub_server import HubServer, serve_hub
from tests.support.mlflow_runs import Past
from tests.support.saved_models import CLASSES, MODELS, save_small_model

TOKEN = "hf_" + "aZ09" * 8
VIT = {"name": "timm", "model": "test_vit", "img_size": 32}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """Returns a hub that the client reaches, and that knows its token."""
    with serve_hub(TOKEN) as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory, digits: Store) -> tuple[Path, torch.nn.Module]:
    """Returns the exported folder of a fine-tuned ViT, and its task."""
    folder = tmp_path_factory.mktemp("classifier")
    facts = {"arm": "given", "weights": {"source": "w.pth", "licence": "Ours: <b>\n---\nlicense: mit"}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "classify", ({}, 32, MODELS["classify"][2]))
        task = save_small_model(folder / "model", "classify", encoder=VIT, pool="cls", facts=facts)
    worker, instance = export_model(folder, digits, folder / "model", 32, formats=["timm", "safetensors"])
    assert write_exported_card(worker, instance, [], [], {})
    return instance.folder / "export", task


def push(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["push", *arguments], standalone_mode=False)


def test_pushed_classifier_is_loaded_by_timm_with_its_labels_and_logits(
    tmp_path: Path, hub: HubServer, classifier: tuple[Path, torch.nn.Module]
) -> None:
    folder, task = classifier
    (folder / "timm" / "notes.txt").write_text("not exported")
    done = push(str(folder), "owner/digits", "--private")
    assert done.output == f"pushed: {hub.address}/owner/digits/commit/{'1' * 40}\n"
    assert hub.private == {"owner/digits": True}
    files = hub.files["owner/digits"]["main"]
    assert set(files) == {
        *("README.md", "config.json", "model.safetensors", "manifest.json", "timm/config.json"),
        *("timm/model.safetensors", *(f"safetensors/{file.name}" for file in (folder / "safetensors").iterdir())),
    }
    assert files["README.md"] == (folder / "card.md").read_bytes()
    fields = yaml.safe_load(files["README.md"].decode().split("---\n")[1])
    assert fields["library_name"] == "timm"
    assert fields["license"] == "other"
    assert fields["license_name"] == "ours-b-license-mit"
    for name, data in files.items():
        (tmp_path / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "clone" / name).write_bytes(data)
    network = timm.create_model(f"local-dir:{tmp_path / 'clone'}", pretrained=True).eval()
    assert network.num_classes == len(CLASSES)
    assert network.pretrained_cfg["label_names"] == list(CLASSES)
    images = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        own = task.compute_logits(images)  # type: ignore[operator]
        there = network(task.encoder.input(images))  # type: ignore[union-attr,operator]
    torch.testing.assert_close(there, own, rtol=1e-4, atol=1e-4 * float(own.abs().max()))


def test_second_push_replaces_what_the_first_has_written(
    hub: HubServer, classifier: tuple[Path, torch.nn.Module]
) -> None:
    target = HubTarget("owner/digits", "trial/one")
    push_folder(classifier[0], target)
    files = hub.files["owner/digits"]["trial/one"]
    assert not hub.files["owner/digits"]["main"]
    files |= {"onnx/encoder.onnx": b"earlier", "notes.md": b"of the owner"}
    push_folder(classifier[0], target)
    assert "onnx/encoder.onnx" not in files
    assert files["notes.md"] == b"of the owner"


def test_private_push_sends_no_file_to_a_public_repository(
    hub: HubServer, classifier: tuple[Path, torch.nn.Module]
) -> None:
    push_folder(classifier[0], HubTarget("owner/open"))
    before = dict(hub.files["owner/open"]["main"])
    del hub.files["owner/open"]["main"]["README.md"]
    with pytest.raises(UserError, match="--private: 'owner/open' exists and is public; nothing was pushed"):
        push_folder(classifier[0], HubTarget("owner/open", is_private=True))
    assert hub.files["owner/open"]["main"].keys() == before.keys() - {"README.md"}


def test_dry_run_lists_the_files_and_sends_nothing(hub: HubServer, classifier: tuple[Path, torch.nn.Module]) -> None:
    output = push(str(classifier[0]), "owner/name", "--dry-run", "--revision", "v1").output
    assert output.startswith("to owner/name, branch v1\n")
    assert re.search(r"^ *[\d,]+ bytes  model\.safetensors$", output, re.M)
    assert 'license: "other"' in output
    assert not hub.requests


def test_refused_token_is_one_line_without_it(
    hub: HubServer, classifier: tuple[Path, torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "not-even-like-a-token")
    with pytest.raises(UserError) as caught:
        push_folder(classifier[0], HubTarget("owner/name"))
    assert re.match(r"OWNER/NAME: 'owner/name' cannot be pushed to http://127\.0\.0\.1:\d+: .*401", str(caught.value))
    assert "not-even-like" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not hub.files


@pytest.mark.parametrize("text", [f"token {TOKEN} x", "Authorization: Bearer abc.def", "my-secret is wrong"])
def test_tokens_are_hidden_in_any_message(text: str) -> None:
    hidden = hide_tokens(text, "my-secret")
    assert "***" in hidden
    assert not any(secret in hidden for secret in (TOKEN, "abc.def", "my-secret"))


def test_hub_that_cannot_be_reached_is_a_one_line_error(
    classifier: tuple[Path, torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve_hub(TOKEN) as server:
        address = server.address
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(UserError, match=rf"cannot be pushed to {address}: .*efused") as caught:
        push_folder(classifier[0], HubTarget("owner/name"))
    assert "\n" not in str(caught.value)
    assert TOKEN not in str(caught.value)


def test_missing_token_and_missing_extra_are_one_line(
    tmp_path: Path, classifier: tuple[Path, torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UserError, match="there is no token of the hub; valid: `hf auth login`"):
        push_folder(classifier[0], HubTarget("owner/name"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"push: needs an extra: pip install 'firstlight\[hub\]'"):
        push_folder(classifier[0], HubTarget("owner/name"))


@pytest.mark.parametrize(
    "name",
    ["name", "a/b/c", "/b", "a/", "a/b c", "a/../b", "a/b--c", "a/b.git", "a/b\n", "https://x/y", "a/" + "b" * 99],
)
def test_invalid_repository_is_refused_before_anything_is_read(name: str) -> None:
    done = push("no-such-folder", name)
    assert isinstance(done.exception, UserError)
    assert str(done.exception).startswith(f"OWNER/NAME: {name!r} is not valid; valid: <owner>/<name>")


@pytest.mark.parametrize("branch", ["", "a b", "../x", "a..b", "refs/", "-x", "x.lock"])
def test_invalid_branch_is_refused(branch: str) -> None:
    with pytest.raises(UserError, match=r"--revision: .* is not valid; valid: the name of a branch"):
        HubTarget("a/b", branch).check_names()


def test_source_that_is_neither_folder_nor_run_is_a_one_line_error(tmp_path: Path) -> None:
    location = parse_location([f"storage={tmp_path}"])
    with pytest.raises(UserError, match="RUN_OR_FOLDER: 'no/folder' is no folder"), open_export("no/folder", location):
        pass
    with pytest.raises(UserError, match=r"tracking\.uri"), open_export("name", location):
        pass


def test_run_or_recipe_gives_the_export_of_the_first_seed(tmp_path: Path) -> None:
    folder = write_export(tmp_path / "export")
    past = Past(tmp_path / "runs")
    recipe = past.recipe("flowers")
    past.pretrain("flowers", recipe)
    first = past.export("flowers", recipe, folder)
    past.export("flowers", recipe, folder, seed=1)
    location = f"storage={tmp_path / 'runs'}"
    for source in ("flowers", first[:8], f"runs:/{first}"):
        with open_export(source, parse_location([location])) as fetched:
            assert {file.name for file in list_hub_files(fetched)} >= {"README.md", "config.json", "onnx/encoder.onnx"}
    assert "model.safetensors" in push("flowers", "owner/name", "--dry-run", "--from", location).output


def test_run_without_an_export_or_with_several_is_a_one_line_error(tmp_path: Path) -> None:
    folder = write_export(tmp_path / "export")
    past = Past(tmp_path / "runs")
    recipe = past.recipe("flowers")
    trained = past.pretrain("flowers", recipe)
    lineage, client = read_lineage(parse_location([f"storage={tmp_path / 'runs'}"]))
    with pytest.raises(UserError, match=r"run: flowers \(.*\) has no export; valid: a run of a stage export"):
        find_export(lineage, lineage.find_run("flowers"))
    with pytest.raises(UserError, match=r"run: pretrain seed 0 \(.*\) has no export"):
        find_export(lineage, lineage.find_run(trained))
    one, other = past.export("flowers", recipe, folder), past.export("flowers", recipe, folder, seed=1)
    client.set_tag(other, "firstlight.stage", "export_model")
    client.update_run(one, "FAILED")
    lineage, _ = read_lineage(parse_location([f"storage={tmp_path / 'runs'}"]))
    with pytest.raises(UserError, match=rf"has several exports; valid: the id of one: .*{other[:8]}"):
        find_export(lineage, lineage.find_run("flowers"))
    with pytest.raises(UserError, match="has not finished: it has no export to push"):
        find_export(lineage, lineage.find_run(one))
