"""The base class of every section of a recipe."""

from pydantic import BaseModel, ConfigDict


class StrictModel(BaseModel):
    """A frozen section of a recipe. Unknown keys, wrong types, NaN and infinity are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
