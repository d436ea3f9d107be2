"""A format that differs from the network, or cannot be written, leaves no file."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from firstlight.pipeline.data.store import Store
from firstlight.pipeline.errors import StageFailed
from firstlight.pipeline.stages.exporting.encoder_exporter import EncoderExporter
from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.nn.export_formats import Counterpart
from tests.support.exported_models import export_encoder


def test_format_that_differs_is_refused_and_leaves_no_file(
    tmp_path: Path, digits: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Counterpart.library_state

    def wrong(self: Any, encoder: Encoder) -> dict[str, torch.Tensor]:
        state = honest(self, encoder)
        # The first call is that of preflight, which asks whether there is a counterpart, and is answered honestly.
        state["bn1.bias"] = state["bn1.bias"] + 1e-2 * (len(calls) > 1)
        calls.append(1)
        return state

    calls: list[int] = []
    monkeypatch.setattr(Counterpart, "library_state", wrong)
    with pytest.raises(
        StageFailed, match=r"export seed 0: torchvision differs from the encoder by .* of its largest value"
    ) as caught:
        export_encoder(tmp_path, digits, {"name": "resnet18"}, 64, formats=["safetensors", "torchvision"])
    assert len(str(caught.value).splitlines()) == 1
    assert not list(tmp_path.glob("export-*/export*"))
    assert not list(tmp_path.glob("export-*/result.json"))


def test_error_of_a_library_is_one_line_and_its_messages_are_heard_again(
    tmp_path: Path, digits: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger, spec = logging.getLogger("torch.onnx"), {"name": "convnet", "width": 4, "depth": 2}
    before, heard = logger.level, list[bool]()

    def fail(self: EncoderExporter, folder: Path) -> Any:
        heard.append(logger.isEnabledFor(logging.WARNING))
        (folder / "encoder.onnx").write_bytes(b"half")
        raise ValueError("no such operator\n" * 100)

    monkeypatch.setattr(EncoderExporter, "onnx", fail)
    with pytest.raises(StageFailed) as caught:
        export_encoder(tmp_path, digits, spec, 8, formats=["safetensors", "onnx"])
    text = str(caught.value)
    assert text.startswith("export seed 0: onnx cannot be exported: ValueError: no such operator no such operator")
    assert "\n" not in text
    assert len(text) < 400
    assert heard == [False]
    assert logger.level == before
    assert not list(tmp_path.glob("export-*/export*"))
