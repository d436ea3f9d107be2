"""The contract of a downstream task: a learner that starts from a pretrained encoder and can predict."""

from abc import abstractmethod

from torch import Tensor

from tasks.encoders import Encoder
from tasks.learner import Learner


class Task(Learner):
    """The keyword-only parameters of `__init__` are its hyper-parameters: the config checks them by their annotations."""

    def __init__(self, encoder: Encoder, classes: int) -> None:
        super().__init__()
        self.encoder, self.classes = encoder, classes

    @abstractmethod
    def predict(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in 0..1 -> (B,) int64, the predicted classes."""
