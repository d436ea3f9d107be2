"""Files of a network's graph are valid for other software, and take any number of images."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch

from firstlight.pipeline.data.store import Store
from tests.support.exported_models import export_encoder


def test_an_onnx_file_is_checked_by_onnx_and_takes_any_number_of_images(tmp_path: Path, digits: Store) -> None:
    instance, _, made = export_encoder(
        tmp_path, digits, {"name": "convnet", "width": 4, "depth": 2, "input": "sobel"}, 8, formats=["onnx"]
    )
    file = instance.folder / "export/onnx/encoder.onnx"
    model = onnx.load(file)
    onnx.checker.check_model(model, full_check=True)
    assert model.opset_import[0].version == 18
    session = onnxruntime.InferenceSession(file)
    for count in (1, 3, 16):
        x = torch.rand(count, 3, 8, 8)
        features, map_ = session.run(["features", "map"], {"images": x.numpy()})
        with torch.no_grad():
            own = made(x)[-1]
        assert features.shape == (count, own.shape[1])
        assert np.allclose(map_, own.numpy(), atol=1e-4 * float(own.abs().max()))
