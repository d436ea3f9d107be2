"""The sections of all kinds of stages. Importing this module makes them known to recipes."""

from firstlight.pipeline.config.stages import register_section
from firstlight.pipeline.stages.sections.embed import Embed
from firstlight.pipeline.stages.sections.evaluate import Evaluate
from firstlight.pipeline.stages.sections.export import Export
from firstlight.pipeline.stages.sections.finetune import Finetune
from firstlight.pipeline.stages.sections.pretrain import Pretrain
from firstlight.pipeline.stages.sections.reconstruct import Reconstruct
from firstlight.pipeline.stages.sections.retrieve import Retrieve

KNOWN_SECTIONS = (Pretrain, Evaluate, Finetune, Retrieve, Reconstruct, Embed, Export)
for _section in KNOWN_SECTIONS:
    register_section(_section)
