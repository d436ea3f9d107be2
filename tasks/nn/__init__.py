"""Networks: encoders, backbones, decoders, heads, normalisation and export formats.

Types of options that keys of a recipe have too stand here, because they need no torch.
"""

from typing import Annotated, Literal

from annotated_types import Ge

# The ways in which a feature map becomes a vector for a later stage.
Pool = Literal["avg", "grid", "cls", "cls_avg"]
# The corruptions of images.
CorruptionKind = Literal["pixel_gaussian", "patch_gaussian", "big_block", "small_blocks"]
# A noise level, in 0..255.
Sigma = Annotated[float, Ge(0.0)]
