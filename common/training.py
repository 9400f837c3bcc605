"""Everything around an optimizer step: micro-batches, signals, the guard against NaN, the log, trackers, checkpoints.

The loops of train.py and finetune_bert_l_sst2.py call everything here by name; nothing here calls back.
"""

import contextlib
import dataclasses
import math
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common import checkpoints
from common.checkpoints import Progress
from common.cli import (
    RunStopped,
    UserError,
    first_line,
    option,
    require_below_one,
    require_finite,
    require_not_negative,
    require_positive,
    require_share,
)
from common.ranks import is_lost_rank, launchers, peak_memory_gib, start_time
from common.runs import METRICS, JsonLines, contents_of
from common.tensors import shape_of

if TYPE_CHECKING:
    from accelerate import Accelerator

# The schedules of transformers that need no settings of their own. Each is a function of the step alone.
LR_SCHEDULERS = ("cosine", "linear", "constant", "constant_with_warmup", "inverse_sqrt", "polynomial")
LR_SCHEDULERS += ("cosine_with_restarts",)
POLYNOMIAL_END = 1e-7  # the rate that transformers' polynomial schedule ends at


def resolve_shared_arguments(args: Any, formulations: Mapping[str, Mapping[str, Any]]) -> None:
    """Fills in the open values of `args`, alpha and the formulation's, and checks the options of every training.

    Raises:
        UserError: a value out of range.
    """
    if args.alpha is None:
        args.alpha = float(args.rank)
    for name, value in formulations[args.formulation].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    require_finite(args)
    positive = ("rank", "alpha", "max_length", "batch_size", "learning_rate", "temperature", "epochs", "spectral_k")
    positive += ("gradient_accumulation", "keep_checkpoints")
    require_positive(args, *positive, "limit")
    lambdas = [name for name in vars(args) if name.startswith("lambda_")]
    require_not_negative(args, *lambdas, "save_steps", "weight_decay", "max_grad_norm", "seed")
    if args.seed >= 2**32:
        raise UserError(f"--seed is {args.seed}: it must be below 2**32")
    require_share(args, "warmup_fraction")
    require_below_one(args, "warmup_ratio")
    if args.lr_scheduler not in LR_SCHEDULERS:
        raise UserError(f"unknown --lr-scheduler {args.lr_scheduler!r}: one of {', '.join(LR_SCHEDULERS)}")
    if args.lr_scheduler == "polynomial" and args.learning_rate <= POLYNOMIAL_END:
        raise UserError(f"--lr-scheduler polynomial ends at {POLYNOMIAL_END}: --learning-rate must be above it")
    if args.resume and args.overwrite:
        raise UserError("--resume goes on with what --overwrite deletes: give one of the two")
    for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"):
        if args.overwrite and os.environ.get(name, "0") != "0":
            raise UserError(
                f"this is a restart ({name} is {os.environ[name]}), and --overwrite would delete what the run has "
                "done: give --resume from the first start on"
            )
    if args.max_steps != -1 and args.max_steps <= 0:
        raise UserError(f"--max-steps is {args.max_steps}: it must be above 0, or -1 for --epochs to decide")


# ------------------------------------------------------------------------------------------------------------------
# Micro-batches and signals
# ------------------------------------------------------------------------------------------------------------------


class MicroBatches:
    """Divides the examples into steps and micro-batches, the same for any number of ranks, and among the ranks.

    The n-th micro-batch of an epoch belongs to rank n mod `num_ranks`. No example comes twice in an epoch. Where the
    last round has fewer micro-batches than there are ranks, a rank without one runs a dummy micro-batch with weight 0,
    because all ranks must take part when gradients are averaged.

    Args:
        order: gives an epoch's order of the examples.
        accumulation: micro-batches per optimizer step and rank.
    """

    def __init__(
        self,
        order: Callable[[int], list[int]],
        num_examples: int,
        batch_size: int,
        accumulation: int,
        rank: int = 0,
        num_ranks: int = 1,
    ):
        self.order, self.num_examples, self.batch_size = order, num_examples, batch_size
        self.accumulation, self.rank, self.num_ranks = accumulation, rank, num_ranks
        self.rounds_per_epoch = math.ceil(math.ceil(num_examples / batch_size) / num_ranks)
        self.steps_per_epoch = math.ceil(self.rounds_per_epoch / accumulation)
        self._epoch: tuple[int, list[int]] | None = None

    def of_step(self, step: int) -> list[tuple[list[int], bool]]:
        """This rank's micro-batches of a step, counted from 0: the rows of each, and whether it counts."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, self.order(epoch)
        order, found = self._epoch[1], []
        for number in range(place * self.accumulation, min((place + 1) * self.accumulation, self.rounds_per_epoch)):
            first = (number * self.num_ranks + self.rank) * self.batch_size
            rows = order[first : first + self.batch_size]
            found.append((rows or list(range(min(self.batch_size, self.num_examples))), bool(rows)))
        return found

    def epochs_after(self, step: int) -> float:
        """How many epochs have passed after `step` steps."""
        epochs, place = divmod(step, self.steps_per_epoch)
        return epochs + min(place * self.accumulation, self.rounds_per_epoch) / self.rounds_per_epoch


def num_steps(args: Any, num_examples: int, num_ranks: int, accumulation: int | None = None) -> int:
    """Optimizer steps of a run: --max-steps, or --epochs over the examples. `accumulation`: see MicroBatches."""
    if args.max_steps > 0:
        return args.max_steps
    per_step = args.batch_size * (accumulation or args.gradient_accumulation) * num_ranks
    return math.ceil(args.epochs * math.ceil(num_examples / per_step))


def generator_of(seed: int, epoch: int) -> torch.Generator:
    """The random generator of an epoch's order."""
    return torch.Generator().manual_seed(seed + epoch)


def random_order(num_examples: int, seed: int) -> Callable[[int], list[int]]:
    return lambda epoch: torch.randperm(num_examples, generator=generator_of(seed, epoch)).tolist()


class Interruption:
    """A signal that ends a run early: the step is finished, a checkpoint saved. A second one leaves at once.

    SIGTERM and SIGINT; SIGUSR1, which Slurm sends before a job's time is up; SIGHUP, when an ssh connection is lost. If
    the launcher is gone, this counts as SIGTERM: no signal would reach the ranks any more, and they would train on.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

    def __init__(self):
        self._signal = 0
        self._came_at = 0.0
        self._launchers = launchers()

    @property
    def signal(self) -> int:
        """The number of the signal that came; 0 if none has come."""
        if not self._signal and any(start_time(number) != started for number, started in self._launchers):
            self._receive(signal.SIGTERM, None)
        return self._signal

    def _receive(self, number: int, frame: Any) -> None:
        # Launchers forward a signal that the terminal has sent to all ranks already: two equal signals at once are one.
        if self._signal and time.monotonic() - self._came_at > 2:
            os._exit(128 + number)
        if not self._signal:
            self._signal, self._came_at = number, time.monotonic()
            with contextlib.suppress(OSError, RuntimeError):  # the terminal is gone, or is being written to
                print(f"{signal.Signals(number).name}: stopping after this step", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def awaited(self) -> Iterator[None]:
        """Inside, signals are handled by this object."""
        handlers = {number: signal.signal(number, self._receive) for number in self.SIGNALS}
        if handlers[signal.SIGHUP] == signal.SIG_IGN:  # set by `nohup`
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------------------------
# One training
# ------------------------------------------------------------------------------------------------------------------


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups: matrices decay, vectors (biases, norms' weights) do not. No group is empty."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if len(shape_of(parameter)) > 1]
    vectors = [parameter for parameter in trained if len(shape_of(parameter)) <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


class Training:
    """A training's place in its data, and everything that must survive an interruption. The script has the step itself.

    Args:
        args: the script's arguments.
        accumulation: see `checkpoints.accumulation`.
        order: gives an epoch's order of the examples.
        quiet: no bar, no log and no checkpoints, for a fit within a study.
        contents: digests of the data and the base model, which a resumed run must find again.

    Attributes:
        progress: steps taken, the log, seconds; a checkpoint holds it.
        model, optimizer, schedule: the wrapped model, AdamW, the learning rate's schedule; after `prepare`.
        trained: the module with the trained parameters; a checkpoint keeps these.
        extra: further files of a checkpoint: tensors and metadata by name.
    """

    def __init__(
        self,
        args: Any,
        accelerator: "Accelerator",
        accumulation: int,
        num_examples: int,
        order: Callable[[int], list[int]],
        quiet: bool = False,
        contents: Mapping[str, str] | None = None,
    ):
        self.args, self.accelerator, self.quiet = args, accelerator, quiet
        self.rank, self.num_ranks, self.device = (
            accelerator.process_index,
            accelerator.num_processes,
            accelerator.device,
        )
        self.is_main = self.rank == 0
        self.batches = MicroBatches(order, num_examples, args.batch_size, accumulation, self.rank, self.num_ranks)
        self.progress = Progress(max_steps=num_steps(args, num_examples, self.num_ranks, accumulation))
        self.contents = dict(contents or {})
        identity = checkpoints.checkpoint_identity(args, accumulation * self.num_ranks)
        self.identity = identity | {"contents": self.contents}
        # Read now, because the files may change while the run trains. The first rank writes the summary.
        self._files = contents_of(args) if self.is_main and not quiet else {}
        self.interruption = Interruption()
        self.is_over = self._interrupted = False
        self.extra: Callable[[], dict[str, tuple[dict[str, Tensor], dict[str, str]]]] = dict
        self._metrics = JsonLines(Path(args.output_dir) / METRICS)
        self._trackers: list[Any] = []
        self._resumed_seconds, self._started = 0.0, time.monotonic()
        self._bar: tqdm | None = None
        self._shown: dict[str, str] = {}
        self._reset_window()

    @property
    def step(self) -> int:
        """How many optimizer steps are taken."""
        return self.progress.step

    @property
    def fraction(self) -> float:
        """The part of training that is done, in [0, 1]; the λs' schedules depend on it."""
        return self.progress.step / self.progress.max_steps

    def prepare(self, model: nn.Module, trained: nn.Module) -> None:
        """Wraps `model` for its ranks and makes its optimizer and schedule.

        Args:
            trained: `model`, or the part of it that holds all trained parameters.
        """
        from transformers import get_scheduler

        args, self.trained = self.args, trained
        groups = parameter_groups(trained, args.weight_decay)
        self.model, self.optimizer = self.accelerator.prepare(model, torch.optim.AdamW(groups, lr=args.learning_rate))
        self.engine = self.model if getattr(self.args, "deepspeed", None) else None
        zero = getattr(self.model, "optimizer", None)
        if hasattr(zero, "check_grad_overflow"):
            zero.check_grad_overflow = True  # by itself ZeRO-2 checks for NaN in bf16 only, and updates with it in fp32
        # A warm-up over all steps would never reach the learning rate.
        warmup = min(math.ceil(self.progress.max_steps * args.warmup_ratio), self.progress.max_steps - 1)
        self.schedule = get_scheduler(
            args.lr_scheduler, self.optimizer, num_warmup_steps=warmup, num_training_steps=self.progress.max_steps
        )
        self.model.train()

    def resume(self, checkpoint: Path | None) -> None:
        """Restores a checkpoint's parameters, optimizer, log and place in the data; None: does nothing."""
        if checkpoint is None:
            return
        # The length is this start's, as the schedule's is: with --accept-changes the data may have grown or shrunk.
        self.progress = dataclasses.replace(checkpoints.load_progress(checkpoint), max_steps=self.progress.max_steps)
        self._resumed_seconds = self.progress.seconds
        if self.engine is None:
            checkpoints.load_trained_tensors(self.trained, checkpoints.load_tensors(checkpoint))
        checkpoints.load_optimizer(self.trained, self.optimizer.optimizer, checkpoint)
        # Every schedule here is a function of the step alone.
        rates = [
            rate * of_step(self.step)
            for rate, of_step in zip(self.schedule.base_lrs, self.schedule.lr_lambdas, strict=True)
        ]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self.schedule.load_state_dict(self.schedule.state_dict() | {"last_epoch": self.step, "_last_lr": rates})
        window = self.progress.window
        self._loss += window["loss"]
        # The stored sums are over all ranks, so only the first rank starts with them.
        self._sums = {name: value if self.is_main else 0 * value for name, value in window["sums"].items()}
        self._window_steps = window["steps"]

    @contextlib.contextmanager
    def underway(self) -> Iterator[None]:
        """Inside, signals end the run after a step, a bar shows the steps, and a lost rank is reported in one line.

        Raises:
            RunStopped: another rank is lost.
            SystemExit: a signal came; a checkpoint is written.
        """
        self._started = time.monotonic()
        self._window_began = self._started - self.progress.window.get("seconds", 0.0)
        how = {"total": self.progress.max_steps, "initial": self.step, "disable": self.quiet or not self.is_main}
        # The interpreter's own stream, so that a step calls none of ours. The terminal may be gone, here and later.
        with contextlib.suppress(OSError):
            self._bar = tqdm(**how, file=sys.__stderr__)
        try:
            with self.interruption.awaited():
                self.is_over = self.step >= self.progress.max_steps
                yield
        except RuntimeError as error:  # the backends have no exception of their own for a lost rank
            if is_lost_rank(error):
                kept = checkpoints.newest_checkpoint(self.args.output_dir)
                raise RunStopped(
                    f"rank {self.rank} lost another rank after step {self.step} "
                    f"({first_line(error)}); --resume goes on from {kept if kept else 'the start'}"
                ) from error
            raise
        finally:
            self._show("close")
            self._finish_trackers()
        if self._interrupted and self.step < self.progress.max_steps:
            if self.is_main:
                kept = checkpoints.newest_checkpoint(self.args.output_dir) or "no checkpoint"
                print(f"interrupted after step {self.step}: {kept} is what --resume goes on from")
            sys.exit(128 + (self.interruption.signal or signal.SIGTERM))

    # One step, in the order in which its parts are called.

    def begin_step(self, *counts: int) -> list[int]:
        """The sums over all ranks of a step's counts. Here all ranks also learn of a signal to any of them."""
        sums = torch.tensor([*counts, self.interruption.signal], device=self.device)
        if self.num_ranks > 1:
            sums = self.accelerator.reduce(sums, reduction="sum")
        *totals, signals = sums.tolist()
        self._interrupted = signals > 0
        self._terms: list[tuple[dict[str, float | Tensor], list[int]]] = []
        self._before_step = (self._loss.clone(), dict(self._sums))
        return totals

    def to_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {name: value.to(self.device) if isinstance(value, Tensor) else value for name, value in batch.items()}

    @contextlib.contextmanager
    def micro_batch(self, number: int, is_last: bool) -> Iterator[None]:
        """Inside runs one forward and backward pass. Gradients are exchanged only in the step's last one.

        Dropout is seeded by the micro-batch: it is the same on any rank, and after an interruption.
        """
        place = number * self.num_ranks + self.rank
        torch.manual_seed(random.Random(f"{self.args.seed} {self.step} {place}").getrandbits(63))
        if self.engine is not None:
            self.engine.set_gradient_accumulation_boundary(is_last)
            yield
        else:
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.model):
                yield

    def backward(self, loss: Tensor, counts: bool) -> None:
        """Adds the gradient of one micro-batch's part of the step's loss; the ranks' averaging is compensated.

        Args:
            counts: False: a dummy micro-batch, with weight 0.
        """
        loss = loss * (self.num_ranks if counts else 0)
        if self.engine is not None:
            self.engine.backward(loss, scale_wrt_gas=False)
        else:
            loss.backward()
        self._loss += loss.detach()

    def record(
        self, terms: dict[str, float | Tensor], tokens: int | Tensor, counts: bool, example_ids: list[int] = ()
    ) -> None:
        """Keeps one micro-batch's parts of the step's values for the log and the guard."""
        if not counts:
            terms, tokens = {name: 0.0 * value for name, value in terms.items()}, 0
        self._terms.append((terms, example_ids))
        # Kept as tensors: reading their values would make the host wait at every micro-batch.
        for name, value in (terms | {"tokens": tokens}).items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def clip_gradients(self) -> Tensor | float:
        """Clips the step's gradients to --max-grad-norm (0: does not clip) and returns their norm.

        Under DeepSpeed the update happens here too: its engine clips, skips NaN and updates in one call.
        """
        if self.engine is not None:
            self.engine.step()
            return self.engine.get_global_grad_norm()
        return nn.utils.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm or math.inf)

    def is_finite(self, norm: Tensor | float) -> bool:
        """The guard: whether no term and no gradient of the step is NaN or infinite, on any rank.

        Raises:
            RunStopped: a value is NaN or infinite, and --on-nonfinite is stop.
        """
        values = [value for terms, _ in self._terms for value in terms.values()]
        total = torch.stack([torch.as_tensor(value, device=self.device).float() for value in values]).sum()
        total = total + torch.as_tensor(norm, device=self.device).float()
        if self.engine is not None and getattr(self.engine.optimizer, "overflow", False):  # DeepSpeed's own verdict
            total = total + math.inf
        if self.num_ranks > 1:
            total = self.accelerator.reduce(total, reduction="sum")
        if math.isfinite(total.item()):
            return True
        found = self._describe_nonfinite()
        if self.args.on_nonfinite == "stop":
            kept = checkpoints.newest_checkpoint(self.args.output_dir)
            raise RunStopped(
                f"NaN or Inf in step {self.step + 1}: {found}; the last checkpoint is "
                f"{kept if kept else 'none'}; --on-nonfinite skip leaves such steps out"
            )
        self.progress.skipped_steps += 1
        if self.is_main:
            print(f"note: step {self.step + 1} skipped, NaN or Inf in {found}", file=sys.stderr)
        self._loss, self._sums = self._before_step  # the log's means leave the step out too
        self._window_steps -= 1
        return False

    def _describe_nonfinite(self) -> str:
        """This rank's terms that are NaN or Inf, with their examples' places in the data."""
        for terms, example_ids in self._terms:
            names = [name for name, value in terms.items() if not math.isfinite(float(value))]
            if names:
                return ", ".join(names) + (f", in the examples {example_ids}" if example_ids else "")
        every = [index for _, example_ids in self._terms for index in example_ids]
        where = "the gradients" if self.num_ranks == 1 else "the gradients, or another rank's terms"
        return where + (f", in the examples {every}" if every else "")

    def end_step(self, norm: Tensor | float, logging_steps: int, log_first: bool = False) -> None:
        """Advances the schedule, drops the gradients, counts the step, and logs it if a line is due."""
        rate = self.schedule.get_last_lr()[0]
        self.schedule.step()
        self.optimizer.zero_grad()
        self.progress.step += 1
        self._window_steps += 1
        self._show("update")
        if self.num_ranks == 1 and self.interruption.signal:  # several ranks agree when the next step begins
            self._interrupted = True
        self.is_over = self.step >= self.progress.max_steps or self._interrupted
        if self._window_steps > 0 and (self.is_due(logging_steps) or (log_first and self.step == 1)):
            self._log_window(norm, rate)

    def _show(self, what: str, *values: Any) -> None:
        """Calls a method of the bar."""
        if self._bar is not None:
            with contextlib.suppress(OSError):
                getattr(self._bar, what)(*values)

    def is_due(self, every: int) -> bool:
        """Whether the number of steps taken is a multiple of `every`, or the last step is taken."""
        return bool(every) and (self.step % every == 0 or self.step >= self.progress.max_steps)

    # The log.

    def _reset_window(self) -> None:
        self._loss = torch.zeros((), device=self.device)
        self._sums: dict[str, float | Tensor] = {}
        self._window_steps, self._window_began = 0, time.monotonic()

    def _log_window(self, norm: Tensor | float, rate: float) -> None:
        """Logs the means since the last line: the loss, the terms and λs; tokens per second, memory."""
        if self.quiet:
            self._reset_window()
            return
        names = sorted(self._sums)
        sums = torch.stack([torch.as_tensor(self._sums[name], device=self.device).float() for name in names])
        loss = self._loss
        if self.num_ranks > 1:
            loss = self.accelerator.reduce(loss, reduction="mean")
            sums = self.accelerator.reduce(sums, reduction="sum")
        sums = dict(zip(names, sums.tolist(), strict=True))
        tokens = sums.pop("tokens")
        entry = {"loss": loss.item() / self._window_steps, "grad_norm": float(norm), "learning_rate": rate}
        entry |= {name: value / self._window_steps for name, value in sums.items()}
        entry["tokens_per_second"] = tokens / (time.monotonic() - self._window_began)
        entry["peak_memory_gib"] = peak_memory_gib()
        self._reset_window()
        self.log(entry)

    def log(self, entry: dict[str, Any]) -> None:
        """Adds a line to the log, metrics.jsonl and the trackers; if a tracker fails, training goes on."""
        entry = entry | {"epoch": self.batches.epochs_after(self.step), "step": self.step}
        self.progress.history.append(entry)
        if not self.is_main or self.quiet:
            return
        self._metrics.append([entry])
        names = {"loss": "loss", "task": "task", "tok/s": "tokens_per_second", "validation": "eval_loss"}
        self._shown |= {label: f"{entry[name]:.4g}" for label, name in names.items() if entry.get(name) is not None}
        self._show("set_postfix", self._shown)
        if self._trackers:
            try:
                for tracker in self._trackers:
                    tracker.log({_tracked(name): value for name, value in entry.items()}, step=self.step)
            except Exception as error:  # each tracker raises kinds of its own
                print(f"warning: the trackers stopped at step {self.step} ({first_line(error)})", file=sys.stderr)
                self._finish_trackers()

    def start_trackers(self) -> None:
        """Tells the trackers of --report-to of this run."""
        if not self.is_main or self.args.report_to == ["none"]:
            return
        try:
            self._trackers = start_trackers(self.args)
        except Exception as error:
            print(f"warning: no tracker is told of this run ({first_line(error)})", file=sys.stderr)

    def _finish_trackers(self) -> None:
        """Lets each tracker send its last lines. A rank leaves without the exit hooks that would do so."""
        trackers, self._trackers = self._trackers, []
        for tracker in trackers:
            try:
                tracker.finish()
            except Exception as error:
                print(f"warning: a tracker lacks this run's last lines ({first_line(error)})", file=sys.stderr)

    @contextlib.contextmanager
    def validating(self) -> Iterator[None]:
        """Inside, the model has no gradients and no dropout; training's random numbers and time are not affected."""
        started = time.monotonic()
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.no_grad(), torch.random.fork_rng(devices):
            self.model.eval()
            yield
            self.model.train()
        self._window_began += time.monotonic() - started

    def agree(self, value: Any) -> Any:
        """The first rank's value, on all ranks."""
        if self.num_ranks == 1:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]

    def checkpoint_to_export(self) -> Path | None:
        """With --keep-best the checkpoint of the best state, the same on all ranks; None to export the last state."""
        if not self.args.keep_best:
            return None
        found = None
        if self.is_main:
            there = checkpoints.complete_checkpoints(self.args.output_dir, read_all=True, verbose=True)
            found = checkpoints.best_checkpoint(self.progress.history, there)
        return self.agree(found)

    def mean_loss(self) -> float:
        """The mean loss of all steps, also before an interruption. Each line of the log has the mean since the last."""
        total, step = 0.0, 0
        for entry in self.progress.history:
            if "loss" in entry:
                total, step = total + entry["loss"] * (entry["step"] - step), entry["step"]
        return total / max(step, 1)

    def summary(self) -> dict[str, Any]:
        """The numbers of processes, micro-batches per step, steps and skipped steps; the mean loss; the data files'
        digests."""
        return {
            "processes": self.num_ranks,
            "micro_batches": self.batches.accumulation * self.num_ranks,
            "steps": self.step,
            "skipped_steps": self.progress.skipped_steps,
            "train_loss": self.mean_loss(),
            "contents": self._files,
        }

    @property
    def seconds(self) -> float:
        """The seconds of training, with those before an interruption."""
        return self._resumed_seconds + time.monotonic() - self._started

    # Checkpoints.

    def save_if_due(self, also: bool = False) -> None:
        """Writes a checkpoint every --save-steps, at the end, after a signal, and where `also` asks for one."""
        every = 0 if self.quiet else self.args.save_steps
        if self._interrupted or also or (every and (self.is_over or self.is_due(every))):
            self.save()

    def save(self) -> None:
        """Writes a checkpoint: whole, or not at all with a warning."""
        self.progress.seconds = self.seconds
        loss, sums = self._loss, {name: torch.as_tensor(value).item() for name, value in self._sums.items()}
        if self.num_ranks > 1:
            loss = self.accelerator.reduce(loss, reduction="mean")
            totals = torch.tensor([sums[name] for name in sorted(sums)], dtype=torch.float64, device=self.device)
            sums = dict(zip(sorted(sums), self.accelerator.reduce(totals, reduction="sum").tolist(), strict=True))
        seconds = time.monotonic() - self._window_began
        window = {"loss": loss.item(), "sums": sums, "steps": self._window_steps, "seconds": seconds}
        self.progress.window = window
        checkpoints.write_checkpoint(self)


def _tracked(name: str) -> str:
    return f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"


# ------------------------------------------------------------------------------------------------------------------
# Trackers and the hub
# ------------------------------------------------------------------------------------------------------------------


@dataclass
class ReportArguments:
    """Trackers and the hub; metrics.jsonl is always written."""

    report_to: list[str] = option(
        ["tensorboard"], "trackers that accelerate knows: tensorboard, wandb, trackio, mlflow and others; none"
    )
    push_to_hub: str | None = option(
        None, "push adapter/ with its card to this repository of the hub at the end, such as me/my-adapter"
    )


def check_reporting(args: Any) -> None:
    """Raises a UserError where a tracker is not known or not installed, or where the hub cannot be pushed to."""
    if args.report_to != ["none"]:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

        known = sorted(LOGGER_TYPE_TO_CLASS)
        here = sorted(str(name) for name in get_available_trackers())
        for name in args.report_to:
            if name == "none":
                raise UserError("--report-to none cannot be combined with a tracker")
            if name not in known:
                raise UserError(f"unknown --report-to {name!r}: one of none, {', '.join(known)}")
            if name not in here:
                there = ", ".join(["none", *here])
                raise UserError(f"--report-to {name}: its package is not installed or not set up; these are: {there}")
    if args.push_to_hub is None:
        return
    from huggingface_hub import get_token
    from huggingface_hub.utils import validate_repo_id

    if args.method == "full":
        raise UserError("--push-to-hub pushes an adapter, and --method full has none: upload merged/ by hand")
    try:
        validate_repo_id(args.push_to_hub)
    except ValueError as error:
        raise UserError(f"--push-to-hub: {first_line(error)}") from error
    if get_token() is None:
        raise UserError("--push-to-hub needs a token of the hub: type `hf auth login`, or set HF_TOKEN")


def start_trackers(args: Any) -> list[Any]:
    """Accelerate's trackers of --report-to, each told of this run's options; tensorboard's files go to --output-dir."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    values = {name: value for name, value in dataclasses.asdict(args).items() if value is not None}
    plain = {name: value if isinstance(value, int | float | str) else str(value) for name, value in values.items()}
    trackers = []
    for name in args.report_to:
        kind = LOGGER_TYPE_TO_CLASS[name]
        folder = (args.output_dir,) if kind.requires_logging_directory else ()
        tracker = kind("tensorboard" if name == "tensorboard" else "ba-lora", *folder)
        tracker.start()
        if name != "tensorboard":  # tensorboard would store the options as a second run
            tracker.store_init_configuration(plain)
        trackers.append(tracker)
    return trackers


def push_adapter(args: Any) -> None:
    """Pushes adapter/ to the repository of --push-to-hub, from the first process; its README.md is the model card.

    Raises:
        RunStopped: the push failed; the run is complete all the same.
    """
    if args.push_to_hub is None or int(os.environ.get("RANK", "0")) != 0:
        return
    from huggingface_hub import HfApi

    folder = Path(args.output_dir) / "adapter"
    try:
        api = HfApi()
        api.create_repo(args.push_to_hub, private=True, exist_ok=True)
        api.upload_folder(repo_id=args.push_to_hub, folder_path=folder, commit_message=f"{args.method} adapter")
    except Exception as error:  # the hub's client raises dozens of kinds
        raise RunStopped(
            f"could not push to {args.push_to_hub} ({first_line(error)}); the run is complete in {args.output_dir}: "
            f"the same command with --resume pushes again, and so does hf upload {args.push_to_hub} {folder}"
        ) from error
    print(f"pushed {folder} to {args.push_to_hub}")
