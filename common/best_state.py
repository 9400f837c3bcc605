"""The state of a training that scored best on held-out examples, and when to stop waiting for a better one."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from common.checkpoints import load_trained_tensors, trained_tensors
from common.cli import RunStopped

BEST_TENSORS = "best.safetensors"


class KeepBest(transformers.TrainerCallback):
    """Validates --evals-per-epoch times per epoch, keeps the best state, stops after --patience vain attempts.

    Args:
        validate: gives the score of the model as it is, the same on all ranks.
        arguments: the script's; of them evals_per_epoch, patience, output_dir.

    Attributes:
        best: the highest score so far. best_step: when. tensors: the trained tensors then, on the CPU.
    """

    def __init__(self, validate: Callable[[], float], arguments: Any):
        self.validate, self.arguments = validate, arguments
        self.best, self.best_step, self.vain = -math.inf, 0, 0
        self.tensors: dict[str, Tensor] = {}

    @property
    def is_vain(self) -> bool:
        return self.vain >= self.arguments.patience

    def on_step_end(self, args, state, control, model=None, train_dataloader=None, **kwargs):
        steps = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
        per_step = self.arguments.evals_per_epoch / steps
        is_due = int(state.global_step * per_step + 1e-9) > int((state.global_step - 1) * per_step + 1e-9)
        if not is_due and state.global_step < state.max_steps:
            return
        score = self.validate()
        if state.is_world_process_zero:
            row = {"step": state.global_step, "validation": score if math.isfinite(score) else None}
            with open(Path(self.arguments.output_dir) / "metrics.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
        if score > self.best:
            self.best, self.best_step, self.vain = score, state.global_step, 0
            self.tensors = {name: tensor.clone() for name, tensor in trained_tensors(model).items()}
        else:
            self.vain += 1
            control.should_training_stop |= self.is_vain

    def summary(self) -> dict[str, str]:
        """What a checkpoint keeps beside the tensors."""
        return {"best": repr(self.best), "best_step": str(self.best_step), "vain": str(self.vain)}

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
