"""The transformers Trainer for runs that may be interrupted: checkpoints, signals, NaN and Inf, lost ranks, metrics."""

import itertools
import json
import math
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from common.batches import MicroBatches, generator_of
from common.checkpoints import (
    TRAINED_TENSORS,
    best_checkpoint,
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
from common.optimizer_state import load_optimizer, optimizer_tensors, state_file
from common.partitioned import num_ranks
from common.runs import INCOMPLETE
from common.training import LogOfLastStep, ProgressBar, peak_memory_gib
from common.validation import Sampler, held_out_means, is_out_of_patience, vain_validations

if TYPE_CHECKING:
    from accelerate.data_loader import DataLoaderShard


class ResumableTrainer(Trainer):
    """What a training here is beside its loss. A subclass has `num_items`; its `compute_loss` multiplies the loss by
    `loss_scale`, and calls `record`; its `validation_sums` gives what a validation adds up of one held-out micro-batch.

    Args:
        arguments: the script's; of them on_nonfinite, keep_checkpoints, what `checkpoint_identity` compares, and, with
            an `eval_dataset`, keep_best and patience.

    Attributes:
        sampler: what is answered at every validation, where anything is.
        trained: the module whose trained parameters a checkpoint keeps; a subclass may name a part of what is wrapped.
        skipped_steps: steps left out for NaN or Inf.
        num_micro_batches: of the step under way, on all ranks.
    """

    def __init__(self, *, arguments: Any, args: TrainingArguments, **kwargs: Any):
        super().__init__(args=args, **kwargs)
        self.arguments = arguments
        self.keep_best = getattr(arguments, "keep_best", False)
        self.identity = checkpoint_identity(arguments, args.gradient_accumulation_steps * args.world_size)
        self.interruption = Interruption()
        self.add_callback(self.interruption)
        self.add_callback(LogOfLastStep)
        self.pop_callback(transformers.ProgressCallback)
        self.pop_callback(transformers.PrinterCallback)
        if not args.disable_tqdm:
            self.add_callback(ProgressBar)
        self.skipped_steps = 0
        self.num_micro_batches = 1
        self.loss_is_scaled_for_ga = True  # a loss here is of its step, not of its micro-batch
        self.sampler: Sampler | None = None
        self._staging: Path | None = None
        self._tr_loss = torch.zeros(())  # the Trainer's own, before it starts
        self._problems: list[str] = []  # of the checkpoint that is written
        self._micro_batches: list[tuple[dict[str, float | Tensor], list[int]]] = []  # of the step under way
        self._num_own, self._num_done = 0, 0  # this rank's micro-batches of it: how many there are, how many are begun
        self._reset_clock()

    @property
    def trained(self) -> nn.Module:
        return self.model

    def is_finished(self, checkpoint: Path | None) -> bool:
        """Whether no step is left to take."""
        return is_complete(checkpoint, self.arguments.patience)

    def fit(self, checkpoint: Path | None) -> tuple[float, float]:
        """Trains, from `checkpoint` where there is one; returns the mean loss and the seconds.

        Raises:
            RunStopped: another rank is lost.
            SystemExit: SIGTERM or SIGINT came; a checkpoint is written.
        """
        output_dir = self.args.output_dir
        if self.is_finished(checkpoint):  # the Trainer would take one step more
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
        """Over all steps, those before an interruption too; the Trainer's own is of its last start alone. Each entry of
        the log has the mean since the one before it."""
        total, step = 0.0, 0
        for entry in self.state.log_history:
            if "loss" in entry:
                total, step = total + entry["loss"] * (entry["step"] - step), entry["step"]
        return total / max(step, 1)

    # One optimizer step: the same micro-batches on every number of ranks, counts that all agree on, a guard before the
    # update.

    def num_items(self, batch: dict[str, Any]) -> int:
        """How much a micro-batch counts for in the step's mean."""
        raise NotImplementedError

    def order(self, epoch: int) -> list[int]:
        """The examples of an epoch in order."""
        return torch.randperm(len(self.train_dataset), generator=generator_of(self.args.seed, epoch)).tolist()

    def get_train_dataloader(self) -> "DataLoaderShard":
        """The Trainer's own would repeat examples at the end of an epoch, and how many depends on the ranks."""
        from accelerate.data_loader import DataLoaderShard

        args = self.args
        ranks = (args.process_index, args.world_size)
        batches = MicroBatches(self.order, len(self.train_dataset), args.train_batch_size, *ranks)
        return DataLoaderShard(
            self.train_dataset,
            device=args.device,
            batch_sampler=batches,
            collate_fn=lambda examples: self.data_collator(examples) if examples else None,
            pin_memory=args.dataloader_pin_memory,
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any] | None], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], int]:
        """One optimizer step's micro-batches of this rank, and the step's `num_items` over all ranks."""
        batches = [batch for batch in itertools.islice(epoch_iterator, num_batches) if batch is not None]
        self._num_own, self._num_done = len(batches), 0
        num_items, self.num_micro_batches = self._begin_step(sum(map(self.num_items, batches)), len(batches))
        # Gradients are averaged by all ranks or none: one that has nothing left runs what counts for nothing.
        for _ in range(num_batches - len(batches)):
            rows = range(min(self.args.train_batch_size, len(self.train_dataset)))
            batches.append(self._prepare_inputs(self.data_collator([self.train_dataset[row] for row in rows])))
        return batches, num_items

    def _begin_step(self, *counts: int) -> list[int]:
        """The sums of these counts over all ranks."""
        sums = torch.tensor([*counts, self.interruption.signal], device=self.args.device)
        if self.accelerator.num_processes > 1:
            sums = self.accelerator.reduce(sums, reduction="sum")
        *totals, signals = sums.tolist()
        self.interruption.agreed = signals > 0  # all ranks stop after the same step
        self._micro_batches = []
        self._before_step = (self._tr_loss.clone(), dict(self._sums))
        return totals

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Dropout is drawn for the micro-batch: the same whichever rank has it, and after an interruption."""
        place = self._num_done * self.args.world_size + self.args.process_index
        torch.manual_seed(random.Random(f"{self.args.seed} {self.state.global_step} {place}").getrandbits(63))
        self._num_done += 1
        return super().training_step(*args, **kwargs)

    @property
    def _stands_in(self) -> bool:
        """Whether the micro-batch under way counts for nothing."""
        return self._num_done > self._num_own

    @property
    def loss_scale(self) -> int:
        """Gradients are averaged over ranks, but the parts of the loss add up."""
        return 0 if self._stands_in else self.accelerator.num_processes

    def record(self, terms: dict[str, float | Tensor], tokens: int | Tensor, example_ids: list[int]) -> None:
        """Keeps one micro-batch's parts of the step's values for the log and the guard."""
        if self._stands_in:
            terms, tokens = {name: 0.0 * value for name, value in terms.items()}, 0
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
                return ", ".join(names) + (f", in the examples {example_ids}" if example_ids else "")
        every = [index for _, example_ids in self._micro_batches for index in example_ids]
        where = "the gradients" if self.accelerator.num_processes == 1 else "the gradients, or another rank's terms"
        return where + (f", in the examples {every}" if every else "")

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

    # Validation: outside of all that training draws from, adds to or counts.

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """`held_out_means` into the log, and the samples; then perhaps a checkpoint of the best state, or the end."""
        started = time.monotonic()
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.no_grad(), torch.random.fork_rng(devices):
            self.model_wrapped.eval()
            metrics = held_out_means(self)
            if self.sampler is not None and self.is_world_process_zero():
                self.sampler.write(self.trained, self.state.global_step)
            self.model_wrapped.train()
        seconds = time.monotonic() - started
        self._last_log = (self._last_log[0] + seconds, self._last_log[1])  # no time of training's
        self.log(metrics | {"eval_seconds": seconds})
        if self.keep_best and vain_validations(self.state.log_history) == 0:
            self.control.should_save = True
        if is_out_of_patience(self.state.log_history, self.arguments.patience):
            self.control.should_training_stop = True
            self.control.should_save |= bool(self.arguments.save_steps)  # as at any other end
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def checkpoint_to_export(self) -> Path | None:
        """With --keep-best the checkpoint of the best state; the same on all ranks. None: the last state it is."""
        if not self.keep_best:
            return None
        self.accelerator.wait_for_everyone()  # the first of them may be writing one
        return best_checkpoint(self.state.log_history, complete_checkpoints(self.args.output_dir))

    # Checkpoints: the Trainer's own files, but only what is trained; written elsewhere and moved to their place.

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        # Not told of the checkpoint: DeepSpeed would insist on its own files, one for each rank, and the base weights.
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        zero = getattr(self.model_wrapped, "optimizer", None)
        if hasattr(zero, "check_grad_overflow"):
            zero.check_grad_overflow = True  # ZeRO-2 looks for NaN in bf16 alone, and steps on it in fp32
        self._reset_clock()
        return prepared

    def _get_output_dir(self, trial: Any = None) -> str:
        return str(self._staging) if self._staging is not None else super()._get_output_dir(trial)

    # Each rank gives its parts of all tensors, whatever becomes of the files: else the others would wait for it.

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        self._write(output_dir, TRAINED_TENSORS, trained_tensors(self.trained, keep=self.args.should_save))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        for key, tensors in optimizer_tensors(self.trained, self.optimizer.optimizer, keep=self.args.should_save):
            self._write(output_dir, state_file(Path(), key).name, tensors)
        if self.args.should_save:
            self._attempt(lambda: torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt"))

    def _write(
        self, folder: str, name: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
    ) -> None:
        def write() -> None:
            Path(folder).mkdir(parents=True, exist_ok=True)
            save_file(tensors, Path(folder) / name, metadata)

        if self.args.should_save:
            self._attempt(write)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        load_optimizer(self.trained, self.optimizer.optimizer, Path(checkpoint))
        groups = self.optimizer.param_groups
        schedule = torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True)
        # All groups have one rate, and DeepSpeed leaves out a group that is empty.
        schedule |= {name: value[:1] * len(groups) for name, value in schedule.items() if isinstance(value, list)}
        self.lr_scheduler.load_state_dict(schedule)
        for group, rate in zip(groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trained_tensors(self.trained, load_file(Path(resume_from_checkpoint) / TRAINED_TENSORS))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self.args.output_dir) / "checkpoints"
        final = folder / f"checkpoint-{self.state.global_step}"
        if final.exists() and checkpoint_problem(final, self.identity) is None:
            return
        self._staging, self._problems = folder / INCOMPLETE, []
        if self.args.should_save:
            self._attempt(self._empty_staging)
        self.accelerator.wait_for_everyone()
        self._attempt(lambda: super(ResumableTrainer, self)._save_checkpoint(model, trial))
        failed = torch.tensor(float(bool(self._problems)), device=self.args.device)
        if self.accelerator.num_processes > 1:  # which also awaits everyone
            failed = self.accelerator.reduce(failed, reduction="sum")
        if self.args.should_save:
            if not failed:
                self._attempt(lambda: self._put_in_place(final))
            shutil.rmtree(self._staging, ignore_errors=True)
        self._staging = None
        if self._problems or (failed and self.args.should_save):
            self._warn(self._problems[0] if self._problems else "another rank says why")
        elif self.args.should_save:
            self._delete_old_checkpoints()

    def _delete_old_checkpoints(self) -> None:
        there, count = complete_checkpoints(self.args.output_dir), self.arguments.keep_checkpoints
        # The best state of each that stays: whichever a resumed run goes on from, its best is there.
        best = [best_checkpoint(last_state(kept).log_history, there) for kept in there[:count] if self.keep_best]
        for old in there[count:]:
            if old not in best:
                shutil.rmtree(old, ignore_errors=True)

    def _attempt(self, part: Callable[[], Any]) -> None:
        """Runs `part`; where the disk does not take what it writes, notes why."""
        try:
            part()
        except (OSError, RuntimeError, SafetensorError) as error:  # each writer has its own for a full disk
            self._problems.append(first_line(error))

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
