"""The commands about images of one's own, from their arguments to what they print."""

from pathlib import Path
from typing import Any

import pytest

from firstlight.pipeline.cli import predict
from firstlight.pipeline.config.load import load_recipe
from firstlight.pipeline.look import look
from tests.support.command_output import run_command
from tests.support.folders_of_noise import write_noise_folder


def test_init_writes_a_recipe_and_tells_what_was_chosen(tmp_path: Path) -> None:
    write_noise_folder(tmp_path / "images", {"a": 10, "b": 10}, (40, 36))
    out = tmp_path / "mine.yaml"
    *reasons, last = run_command(
        "init", str(tmp_path / "images"), "--out", str(out), "--method", "simclr", "--epochs", "3"
    ).splitlines()
    assert [line.partition(":")[0] for line in reasons] == ["images", "size", "network", "method", "length"]
    assert last == f"written; next: firstlight run {out}"
    pretrain = load_recipe(out).stages["pretrain"]
    assert (pretrain.method.name, pretrain.epochs) == ("simclr", 3)  # type: ignore[attr-defined]


def test_look_passes_its_options_and_prints_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[Any]()

    def keep_request(request: Any, console: Any, tell: Any) -> Path:
        asked.append(request)
        tell("near duplicates: 0")
        return tmp_path / "look.html"

    monkeypatch.setattr(look, "look_at_images", keep_request)
    answer = run_command("look", str(tmp_path), "--images", "30", "--diverse", "7", "--out", str(tmp_path / "out"))
    assert answer.splitlines() == ["near duplicates: 0", f"page: {tmp_path / 'look.html'}"]
    (request,) = asked
    assert (request.data, request.out, request.images, request.diverse) == (tmp_path, tmp_path / "out", 30, 7)


def test_predict_passes_where_the_run_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[Any]()

    def keep_arguments(model: str, paths: tuple[str, ...], location: Any, options: Any) -> int:
        asked.append((model, paths, location.storage, options.top))
        return 0

    monkeypatch.setattr(predict, "run_predictions", keep_arguments)
    run_command("predict", "models:/m@best", "a.png", "b.png", "--top", "5", "--from", f"storage={tmp_path}")
    assert asked == [("models:/m@best", ("a.png", "b.png"), tmp_path, 5)]
