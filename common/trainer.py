"""The transformers Trainer for runs that may be interrupted: checkpoints, signals, NaN and Inf, lost ranks, metrics."""

import json
import math
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from common.checkpoints import (
    TRAINED_TENSORS,
    checkpoint_identity,
    checkpoint_problem,
    complete_checkpoints,
    is_complete,
    last_state,
    load_trained_tensors,
    newest_checkpoint,
    seal_checkpoint,
    trained_tensors,
)
from common.cli import RunStopped, first_line
from common.interruptions import Interruption
from common.partitioned import num_ranks
from common.runs import INCOMPLETE
from common.training import ProgressBar, peak_memory_gib


class ResumableTrainer(Trainer):
    """What a training here is beside its loss. A subclass's `get_batch_samples` calls `begin_step`, its `compute_loss`
    calls `record`.

    Args:
        arguments: the script's; of them on_nonfinite, keep_checkpoints, and what `checkpoint_identity` compares.

    Attributes:
        trained: the module whose trained parameters a checkpoint keeps; a subclass may name a part of what is wrapped.
        skipped_steps: steps left out for NaN or Inf.
    """

    def __init__(self, *, arguments: Any, args: TrainingArguments, **kwargs: Any):
        super().__init__(args=args, **kwargs)
        self.arguments = arguments
        self.identity = checkpoint_identity(arguments, args.world_size)
        self.interruption = Interruption()
        self.add_callback(self.interruption)
        self.pop_callback(transformers.ProgressCallback)
        self.add_callback(ProgressBar)
        self.skipped_steps = 0
        self._staging: Path | None = None
        self._tr_loss = torch.zeros(())  # the Trainer's own, before it starts
        self._micro_batches: list[tuple[dict[str, float | Tensor], list[int]]] = []  # of the step under way
        self._reset_clock()

    @property
    def trained(self) -> nn.Module:
        return self.model

    def fit(self, checkpoint: Path | None) -> tuple[float, float]:
        """Trains, from `checkpoint` where there is one; returns the mean loss and the seconds.

        Raises:
            RunStopped: another rank is lost.
            SystemExit: SIGTERM or SIGINT came; a checkpoint is written.
        """
        output_dir = self.args.output_dir
        if is_complete(checkpoint):  # the Trainer would take one step more
            self.state = last_state(checkpoint)
            return self._mean_loss(), 0.0
        try:
            with self.interruption.awaited():
                result = self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except RuntimeError as error:  # the backends have no exception of their own for it
            if num_ranks() > 1 and any(name in str(error) for name in ("gloo", "NCCL", "Connection")):
                kept = newest_checkpoint(output_dir)
                raise RunStopped(
                    f"rank {self.args.process_index} lost another rank after step {self.state.global_step} "
                    f"({first_line(error)}); --resume goes on from {kept if kept else 'the start'}"
                ) from error
            raise
        if self.interruption.agreed and self.state.global_step < self.state.max_steps:
            if self.is_world_process_zero():
                kept = newest_checkpoint(output_dir) or "no checkpoint"
                print(f"interrupted after step {self.state.global_step}: {kept} is what --resume goes on from")
            sys.exit(128 + (self.interruption.signal or signal.SIGTERM))
        return self._mean_loss() or result.training_loss, result.metrics["train_runtime"]

    def _mean_loss(self) -> float:
        """Over the logged steps, those before an interruption too; the Trainer's own is of its last start alone."""
        losses = [entry["loss"] for entry in self.state.log_history if "loss" in entry]
        return sum(losses) / max(len(losses), 1)

    # One optimizer step: counts that all ranks agree on, the terms of its micro-batches, a guard before the update.

    def begin_step(self, *counts: int) -> list[int]:
        """The sums of these counts over all ranks. Called once before each optimizer step."""
        sums = torch.tensor([*counts, self.interruption.signal], device=self.args.device)
        if self.accelerator.num_processes > 1:
            sums = self.accelerator.reduce(sums, reduction="sum")
        *totals, signals = sums.tolist()
        self.interruption.agreed = signals > 0  # all ranks stop after the same step
        self._micro_batches = []
        self._before_step = (self._tr_loss.clone(), dict(self._sums))
        return totals

    def record(self, terms: dict[str, float | Tensor], tokens: int | Tensor, example_ids: list[int]) -> None:
        """Keeps one micro-batch's parts of the step's values for the log and the guard."""
        self._micro_batches.append((terms, example_ids))
        # As tensors: reading them here would make the device wait at every micro-step.
        for name, value in (terms | {"tokens": tokens}).items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float:
        """The norm, after the guard: NaN or Inf anywhere in the step's terms or gradients stops the run or skips the
        step. The one place between the gradients and the optimizer's step that the Trainer leaves open."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        values = [value for terms, _ in self._micro_batches for value in terms.values()]
        total = torch.stack([torch.as_tensor(value, device=self.args.device).float() for value in values]).sum()
        total = total + torch.as_tensor(grad_norm, device=self.args.device).float()
        if getattr(getattr(self.model_wrapped, "optimizer", None), "overflow", False):  # DeepSpeed's own verdict
            total = total + math.inf
        if self.accelerator.num_processes > 1:
            total = self.accelerator.reduce(total, reduction="sum")
        if math.isfinite(total.item()):
            return grad_norm
        found = self._describe_nonfinite()
        if self.arguments.on_nonfinite == "stop":
            kept = newest_checkpoint(self.args.output_dir)
            raise RunStopped(
                f"NaN or Inf in step {self.state.global_step + 1}: {found}; the last checkpoint is "
                f"{kept if kept else 'none'}; --on-nonfinite skip leaves such steps out"
            )
        self.skipped_steps += 1
        if self.is_world_process_zero():
            print(f"note: step {self.state.global_step + 1} skipped, NaN or Inf in {found}", file=sys.stderr)
        # The log's means leave the step out too.
        self._tr_loss, self._sums = self._before_step
        self._globalstep_last_logged += 1
        self._last_log = (self._last_log[0], self._last_log[1] + 1)
        if not self.is_deepspeed_enabled:  # which has skipped by itself
            model.zero_grad(set_to_none=True)  # AdamW leaves alone what has no gradient
        return 0.0

    def _describe_nonfinite(self) -> str:
        """The terms that are NaN or Inf with their examples' places in the data; this rank's."""
        for terms, example_ids in self._micro_batches:
            names = [name for name, value in terms.items() if not math.isfinite(float(value))]
            if names:
                return f"{', '.join(names)}, in the examples {example_ids}"
        every = [index for _, example_ids in self._micro_batches for index in example_ids]
        where = "the gradients" if self.accelerator.num_processes == 1 else "the gradients, or another rank's terms"
        return f"{where}, in the examples {every}"

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the terms, the λs, tokens per second and peak memory to a training step's log; writes metrics.jsonl."""
        if "loss" in logs:
            names = sorted(self._sums)
            sums = torch.stack([torch.as_tensor(self._sums[name], device=self.args.device).float() for name in names])
            sums = dict(zip(names, self.accelerator.reduce(sums, reduction="sum").tolist(), strict=True))
            then, step = self._last_log
            tokens = sums.pop("tokens")
            logs |= {name: value / (self.state.global_step - step) for name, value in sums.items()}
            logs["tokens_per_second"] = tokens / (time.monotonic() - then)
            logs["peak_memory_gib"] = peak_memory_gib()
            self._reset_clock()
        super().log(logs, start_time)
        if self.is_world_process_zero():
            with open(Path(self.args.output_dir) / "metrics.jsonl", "a") as file:
                file.write(json.dumps(self.state.log_history[-1]) + "\n")

    def _reset_clock(self) -> None:
        self._sums = {}
        self._last_log = (time.monotonic(), self.state.global_step)

    # Checkpoints: the Trainer's own files, but only what is trained; written elsewhere and moved to their place.

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        # DeepSpeed would insist on the base weights, which no checkpoint holds.
        deepspeed = self.is_deepspeed_enabled and resume_from_checkpoint is not None
        prepared = super()._prepare_for_training(
            max_steps, train_dataloader, None if deepspeed else resume_from_checkpoint
        )
        if deepspeed:
            self.model_wrapped.load_checkpoint(resume_from_checkpoint, load_module_strict=False)
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
        zero = getattr(self.model_wrapped, "optimizer", None)
        if hasattr(zero, "check_grad_overflow"):
            zero.check_grad_overflow = True  # ZeRO-2 looks for NaN in bf16 alone, and steps on it in fp32
        self._reset_clock()
        return prepared

    def _get_output_dir(self, trial: Any = None) -> str:
        return str(self._staging) if self._staging is not None else super()._get_output_dir(trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        tensors = trained_tensors(self.trained, keep=self.args.should_save)
        if self.args.should_save:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            save_file(tensors, Path(output_dir) / TRAINED_TENSORS)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled:
            self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)
            if self.args.should_save:  # transformers' own schedule, of which DeepSpeed knows nothing
                torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trained_tensors(self.trained, load_file(Path(resume_from_checkpoint) / TRAINED_TENSORS))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self.args.output_dir) / "checkpoints"
        final = folder / f"checkpoint-{self.state.global_step}"
        if final.exists() and checkpoint_problem(final, self.identity) is None:
            return
        self._staging = folder / INCOMPLETE
        problems = []
        if self.args.should_save:
            self._attempt(self._empty_staging, problems)
        self.accelerator.wait_for_everyone()
        self._attempt(lambda: super(ResumableTrainer, self)._save_checkpoint(model, trial), problems)
        if problems and self.is_deepspeed_enabled and self.accelerator.num_processes > 1:
            # The other ranks are inside of DeepSpeed's own writing, and wait for this one there.
            raise RunStopped(f"the checkpoint of step {self.state.global_step} could not be written ({problems[0]})")
        failed = torch.tensor(float(bool(problems)), device=self.args.device)
        if self.accelerator.num_processes > 1:  # which also awaits everyone
            failed = self.accelerator.reduce(failed, reduction="sum")
        if self.args.should_save:
            if not failed:
                self._attempt(lambda: self._put_in_place(final), problems)
            shutil.rmtree(self._staging, ignore_errors=True)
        self._staging = None
        if problems or (failed and self.args.should_save):
            self._warn(problems[0] if problems else "another rank says why")
        elif self.args.should_save:
            for old in complete_checkpoints(self.args.output_dir)[self.arguments.keep_checkpoints :]:
                shutil.rmtree(old, ignore_errors=True)

    @staticmethod
    def _attempt(part: Callable[[], Any], problems: list[str]) -> None:
        """Runs `part`; where the disk does not take what it writes, adds why to `problems`."""
        try:
            part()
        except (OSError, RuntimeError, SafetensorError) as error:  # each writer has its own for a full disk
            problems.append(first_line(error))

    def _empty_staging(self) -> None:
        shutil.rmtree(self._staging, ignore_errors=True)
        self._staging.mkdir(parents=True)

    def _put_in_place(self, final: Path) -> None:
        seal_checkpoint(self._staging / final.name, self.identity)
        shutil.rmtree(final, ignore_errors=True)  # a damaged one
        (self._staging / final.name).rename(final)

    def _warn(self, problem: str) -> None:
        kept = newest_checkpoint(self.args.output_dir)
        print(
            f"warning: the checkpoint of step {self.state.global_step} could not be written ({problem}); "
            f"{'the last one is ' + str(kept) if kept else 'there is none yet'}",
            file=sys.stderr,
        )
