"""The contract of a pretraining method."""

from tasks.encoders import Encoder
from tasks.learner import Learner


class Method(Learner):
    """A pretraining objective around an encoder, which is what later stages receive.

    The keyword-only parameters of `__init__` are its hyper-parameters: the config checks them by their annotations.
    `size`: number of rows of its tables (ids are 0..size-1). `seed`: of everything it draws.
    """

    def __init__(self, encoder: Encoder, size: int, seed: int) -> None:
        super().__init__()
        self.encoder, self.size, self.seed = encoder, size, seed
