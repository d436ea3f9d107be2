"""The formats of an encoder."""

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from firstlight.pipeline.files import write_flushed
from firstlight.pipeline.stages.artifacts.encoder_description import WEIGHTS_ORIGIN_KEY
from firstlight.pipeline.stages.artifacts.encoder_folder import load_encoder, save_encoder
from firstlight.pipeline.stages.exporting.comparison import NetworkAnswer
from firstlight.pipeline.stages.exporting.encoder_origin import read_encoder_origin
from firstlight.pipeline.stages.exporting.loading_by_name import choose_last_map, has_last_map, load_by_name
from firstlight.pipeline.stages.exporting.program_files import write_onnx, write_torch_program
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.nn.export_formats import (
    Counterpart,
    ExportGraph,
    explain_missing_format,
    export_program,
    find_counterpart,
)
from firstlight.tasks.nn.timm_folder import describe_for_timm


@dataclass(frozen=True)
class EncoderExporter:
    """Writes the encoder in each format. Every method, named as its format, takes a folder and returns the network as
    others load it, and facts about it.
    """

    encoder: Encoder
    instance: StageInstance
    # The known facts of the existing weights that it comes from.
    origin: Mapping[str, str]
    what = "encoder"

    def answer_images(self, images: Tensor) -> tuple[Tensor, ...]:
        features, map_ = ExportGraph(self.encoder).eval()(images)
        return features, map_

    def explain_missing(self, format: str) -> str | None:
        """Returns the reason why the encoder cannot be exported in a format; None if it can."""
        return explain_missing_format(self.encoder, format)

    @cached_property
    def program(self) -> Any:
        return export_program(self.encoder)

    def torchvision(self, folder: Path) -> tuple[NetworkAnswer, dict[str, Any]]:
        return self._state_dict(folder, find_counterpart(self.encoder, "torchvision"))

    def timm(self, folder: Path) -> tuple[NetworkAnswer, dict[str, Any]]:
        return self._state_dict(folder, find_counterpart(self.encoder, "timm"))

    def _state_dict(self, folder: Path, found: Counterpart) -> tuple[NetworkAnswer, dict[str, Any]]:
        data = save_tensors(
            found.library_state(self.encoder), {"format": "pt", "model": found.model, "library": found.library}
        )
        write_flushed(folder / "model.safetensors", data)
        net, missing = found.build_network(load_tensors((folder / "model.safetensors").read_bytes()))
        last_map, facts = found.last_map(net), dict[str, Any]()
        if found.library == "timm":
            content = describe_for_timm(self.encoder, found.model, found.options, licence=self.origin.get("licence"))
            named, facts = load_by_name(folder, self.encoder, content, partial(has_last_map, self.encoder, found))
            # The network as others load it is the one that is compared.
            last_map = choose_last_map(found, named) if named else last_map

        def answer(images: Tensor) -> tuple[Tensor, Tensor]:
            map_ = last_map(self.encoder.input(images))
            return map_.mean((2, 3)), map_

        version = importlib.metadata.version(found.library)
        return answer, {
            "model": found.model,
            "options": dict(found.options),
            "place": found.source,
            "turned": found.channels_last,
            "missing": missing,
            "version": version,
            **facts,
        }

    def safetensors(self, folder: Path) -> tuple[NetworkAnswer, dict[str, Any]]:
        assert self.instance.encoder is not None
        origin = {WEIGHTS_ORIGIN_KEY: self.origin} if self.origin else {}
        save_encoder(self.encoder, folder, {**read_encoder_origin(self.instance.encoder), **origin})
        return ExportGraph(load_encoder(folder, self.encoder.image_size)).eval(), {}

    def torch_export(self, folder: Path) -> tuple[NetworkAnswer, dict[str, Any]]:
        facts = write_torch_program(self.program, folder / "encoder.pt2")
        return self.program.module(), facts

    def onnx(self, folder: Path) -> tuple[NetworkAnswer, dict[str, Any]]:
        return write_onnx(self.program, folder / "encoder.onnx", ["features", "map"], {})
