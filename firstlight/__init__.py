"""Firstlight: unsupervised and semi-supervised visual pretraining on Ray, tracked in MLflow.

    import firstlight as fl

    result = fl.run(fl.load_recipe("conf/recipe/quickstart.yaml"))
    encoder = fl.load_encoder(result.encoders[0])
    vectors = encoder.embed(["a.jpg", "b.png"])

The names below are imported when they are used first (PEP 562), so that `import firstlight` loads neither torch nor Ray
nor MLflow.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from firstlight.pipeline.api import RunResult as RunResult
    from firstlight.pipeline.api import list_runs as list_runs
    from firstlight.pipeline.api import load_encoder as load_encoder
    from firstlight.pipeline.api import load_model as load_model
    from firstlight.pipeline.api import load_recipe as load_recipe
    from firstlight.pipeline.api import open_embeddings as open_embeddings
    from firstlight.pipeline.api import open_index as open_index
    from firstlight.pipeline.api import open_store as open_store
    from firstlight.pipeline.api import run as run
    from firstlight.pipeline.api import search as search
    from firstlight.pipeline.errors import UserError as UserError
    from firstlight.pipeline.first_runs import embed as embed
    from firstlight.pipeline.first_runs import evaluate as evaluate
    from firstlight.pipeline.first_runs import export as export
    from firstlight.pipeline.first_runs import finetune as finetune
    from firstlight.pipeline.first_runs import pretrain as pretrain
    from firstlight.pipeline.first_runs import retrieve as retrieve
    from firstlight.pipeline.image_encoder import ImageEncoder as ImageEncoder
    from firstlight.pipeline.stages.prediction.predictor import FineTunedModel as FineTunedModel
    from firstlight.tasks.downstream import TASKS as TASKS
    from firstlight.tasks.nn.encoders import ENCODERS as ENCODERS
    from firstlight.tasks.pretrain import METHODS as METHODS

# The threads of torch wait for one another after every operation. By default they spin for milliseconds, and beside any
# other work on the CPUs, such as the decoding of images, two of them can then be ten times slower than one. They sleep
# here after a thousand turns, some ten microseconds. Threads of a small network seldom wait longer, and to wake one
# that sleeps would take as long as its operation. OpenMP reads this when torch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "passive"
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

_MODULES = {
    **dict.fromkeys(
        (
            *("load_recipe", "run", "search", "RunResult"),
            *("load_encoder", "load_model", "list_runs"),
            *("open_store", "open_embeddings", "open_index"),
        ),
        "firstlight.pipeline.api",
    ),
    **dict.fromkeys(
        ("pretrain", "evaluate", "finetune", "retrieve", "embed", "export"), "firstlight.pipeline.first_runs"
    ),
    "FineTunedModel": "firstlight.pipeline.stages.prediction.predictor",
    "ImageEncoder": "firstlight.pipeline.image_encoder",
    "UserError": "firstlight.pipeline.errors",
    "METHODS": "firstlight.tasks.pretrain",
    "TASKS": "firstlight.tasks.downstream",
    "ENCODERS": "firstlight.tasks.nn.encoders",
}
__all__ = sorted(_MODULES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'firstlight' has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
