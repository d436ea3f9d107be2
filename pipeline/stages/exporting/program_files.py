"""Files of a network's graph: ONNX, and the programs of torch.export."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from firstlight.pipeline.files import write_flushed
from firstlight.pipeline.stages.exporting.comparison import NetworkAnswer

# The one that torch's exporter writes; others are converted from it.
ONNX_OPSET = 18


def write_onnx(
    program: Any, file: Path, outputs: list[str], facts: Mapping[str, str]
) -> tuple[NetworkAnswer, dict[str, Any]]:
    """Writes an exported program as ONNX, with `facts` as the file's metadata. Returns it as onnxruntime runs it."""
    import onnxruntime

    names: dict[str, Any] = {"input_names": ["images"], "output_names": outputs}
    written = torch.onnx.export(program, (), opset_version=ONNX_OPSET, verbose=False, **names)
    assert written is not None
    written.model.metadata_props.update(facts)
    written.save(file)
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def answer(images: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.from_numpy(found) for found in session.run(outputs, {"images": images.numpy()}))

    return answer, {"opset": ONNX_OPSET, "version": onnxruntime.__version__}


def write_torch_program(program: Any, file: Path) -> dict[str, Any]:
    """Writes a program of torch.export. Returns facts about it.

    It is compared as it was before it was written, because reading it back unpickles.
    """
    written = io.BytesIO()
    torch.export.save(program, written)
    write_flushed(file, written.getvalue())
    return {"version": torch.__version__}
