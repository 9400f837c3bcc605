"""The state of a training that scored best on held-out examples, and when to stop waiting for a better one."""

import math
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from common.checkpoints import load_trained_tensors, trained_tensors
from common.cli import RunStopped

BEST_TENSORS = "best.safetensors"


class BestState:
    """The trained tensors of the highest validation score so far, in memory: a classifier's are small.

    Args:
        patience: validations in a row without a better score after which training ends.

    Attributes:
        best: the highest score so far. best_step: when. tensors: the trained tensors then, on the CPU.
    """

    def __init__(self, patience: int):
        self.patience = patience
        self.best, self.best_step, self.vain = -math.inf, 0, 0
        self.tensors: dict[str, Tensor] = {}

    @property
    def is_vain(self) -> bool:
        return self.vain >= self.patience

    def update(self, score: float, step: int, model: nn.Module) -> None:
        """Keeps the model's state where its score, the same on all ranks, is the best so far."""
        if score > self.best:
            self.best, self.best_step, self.vain = score, step, 0
            self.tensors = {name: tensor.clone() for name, tensor in trained_tensors(model).items()}
        else:
            self.vain += 1

    def for_checkpoint(self) -> dict[str, tuple[dict[str, Tensor], dict[str, str]]]:
        """The file that a checkpoint has of it: tensors and metadata by name."""
        summary = {"best": repr(self.best), "best_step": str(self.best_step), "vain": str(self.vain)}
        return {BEST_TENSORS: (self.tensors, summary)}

    def load(self, checkpoint: Path) -> None:
        """Goes on from what a checkpoint has."""
        with safe_open(checkpoint / BEST_TENSORS, "pt") as file:
            summary = file.metadata()
        self.tensors = load_file(checkpoint / BEST_TENSORS)
        self.best, self.best_step, self.vain = float(summary["best"]), int(summary["best_step"]), int(summary["vain"])

    def put_back(self, model: nn.Module) -> None:
        """Makes the best state the model's.

        Raises:
            RunStopped: there has been none.
        """
        if self.best == -math.inf:
            raise RunStopped("the training diverged, NaN or Inf at every validation: lower --learning-rate")
        load_trained_tensors(model, self.tensors)
