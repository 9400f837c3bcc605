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
        best: the highest score so far. best_step: the step of that score; 0: before training. tensors: that step's
            trained tensors, on the CPU.
        has_trained: whether a state after step 0 had a score.
    """

    def __init__(self, patience: int):
        self.patience = patience
        self.best, self.best_step, self.vain, self.has_trained = -math.inf, 0, 0, False
        self.tensors: dict[str, Tensor] = {}

    @property
    def is_vain(self) -> bool:
        return self.vain >= self.patience

    def update(self, score: float, step: int, model: nn.Module) -> None:
        """Keeps the model's state if its score, the same on all ranks, is the best so far; −∞ is no score. A trained
        state that ties with the state before training replaces it."""
        self.has_trained |= step > 0 and score > -math.inf
        if score > self.best or (score == self.best > -math.inf and self.best_step == 0):
            self.best, self.best_step, self.vain = score, step, 0
            self.tensors = {name: tensor.clone() for name, tensor in trained_tensors(model).items()}
        elif step > 0:
            self.vain += 1

    def for_checkpoint(self) -> dict[str, tuple[dict[str, Tensor], dict[str, str]]]:
        """The best state as a file of a checkpoint: tensors and metadata by name."""
        summary = {"best": repr(self.best), "best_step": str(self.best_step), "vain": str(self.vain)}
        summary["has_trained"] = str(self.has_trained)
        return {BEST_TENSORS: (self.tensors, summary)}

    def load(self, checkpoint: Path) -> None:
        """Goes on from the best state in a checkpoint."""
        with safe_open(checkpoint / BEST_TENSORS, "pt") as file:
            summary = file.metadata()
        self.tensors = load_file(checkpoint / BEST_TENSORS)
        self.best, self.best_step, self.vain = float(summary["best"]), int(summary["best_step"]), int(summary["vain"])
        self.has_trained = summary["has_trained"] == "True"

    def put_back(self, model: nn.Module) -> None:
        """Makes the best state the model's.

        Raises:
            RunStopped: no state of the training had a score.
        """
        if not self.has_trained:
            raise RunStopped(
                "no state can be chosen: at every validation the predictions were NaN or Inf, or one number for all "
                "examples: lower --learning-rate"
            )
        load_trained_tensors(model, self.tensors)
