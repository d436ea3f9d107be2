"""The numbers that a recipe's paper reports, and the data and machines that a full run needs."""

from pydantic import Field

from firstlight.pipeline.config.schemas.strict_model import StrictModel


class ExpectedResult(StrictModel):
    """A number that the paper reports. The table of results shows it next to the measured number."""

    stage: str = Field(description="The name of a stage of this recipe.")
    measure: str = Field(description="One of the stage's measures, for example `accuracy` or `knn`.")
    arm: str = Field("pretrained", description="One of the arms that the stage compares.")
    paper: float = Field(description="The paper's number, in percent; `psnr` in dB.")
    against: float | None = Field(
        None, description="The paper's number for the baseline: the stage's last arm, or random weights."
    )
    source: str = Field(min_length=1, description="The place in the paper, for example a table and its row.")


class ResourceEstimate(StrictModel):
    """The data and the machines that a full run of the recipe needs. Nothing is checked by it."""

    data: str = Field(min_length=1, description="The data set, for people.")
    gpus: int = Field(ge=0, description="The number of GPUs that `hours` is estimated for. 0: two CPU cores.")
    hours: float = Field(gt=0.0, description="The estimated wall time in hours.")
    estimate: str = Field(min_length=1, description="How `hours` was estimated or measured.")
    after: tuple[str, ...] = Field(
        (),
        description="The recipes that must have run before in the same storage, because this one refers to their "
        "encoders.",
    )
