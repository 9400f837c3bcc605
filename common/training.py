"""What every training here tells the transformers Trainer, and shows while it runs."""

import os
import re
import resource
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import transformers
from transformers import TrainingArguments

from common.cli import (
    UserError,
    require_below_one,
    require_not_negative,
    require_positive,
    require_share,
    run_script,
)
from common.pretrained import resolve_dtype

# Those of transformers' schedules that need no settings of their own.
LR_SCHEDULERS = ("cosine", "linear", "constant", "constant_with_warmup", "inverse_sqrt", "polynomial")
LR_SCHEDULERS += ("cosine_with_restarts",)


def resolve_shared_arguments(args: Any, formulations: Mapping[str, Mapping[str, Any]]) -> None:
    """Fills in `args` what every training here leaves open, alpha and the formulation's values, and checks what every
    training is told.

    Raises:
        UserError: a value out of range.
    """
    if args.alpha is None:
        args.alpha = float(args.rank)
    for name, value in formulations[args.formulation].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    positive = ("rank", "alpha", "max_length", "batch_size", "learning_rate", "temperature", "epochs", "spectral_k")
    positive += ("gradient_accumulation", "keep_checkpoints")
    require_positive(args, *positive, "max_examples")
    require_not_negative(args, "lambda_consistency", "lambda_diversity", "lambda_spectral", "save_steps")
    require_share(args, "warmup_fraction")
    require_below_one(args, "warmup_ratio")
    if args.lr_scheduler not in LR_SCHEDULERS:
        raise UserError(f"unknown --lr-scheduler {args.lr_scheduler!r}: one of {', '.join(LR_SCHEDULERS)}")
    if args.resume and args.overwrite:
        raise UserError("--resume goes on with what --overwrite deletes: give one of the two")
    if args.max_steps != -1 and args.max_steps <= 0:
        raise UserError(f"--max-steps is {args.max_steps}: it must be above 0, or -1 for --epochs to decide")


def training_arguments(args: Any, accumulation: int | None = None) -> TrainingArguments:
    """What the transformers Trainer needs to know of `args`; `accumulation`: see `checkpoints.accumulation`."""
    dtype = resolve_dtype(args.dtype)
    # Full fine-tuning needs fp32 master weights: bf16 only inside autocast. DeepSpeed keeps masters of its own.
    mixed = dtype == torch.bfloat16 and (args.method == "full" or args.deepspeed is not None)
    return common_training_arguments(
        args,
        gradient_accumulation_steps=accumulation or args.gradient_accumulation,
        bf16=mixed,
        gradient_checkpointing=args.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        deepspeed=args.deepspeed,
        logging_steps=args.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # it would read the loss from the device at every micro-step
        save_strategy="steps" if args.save_steps else "no",
        save_steps=args.save_steps or 500,
        eval_strategy="no" if args.eval_data is None and args.eval_share is None else "steps",
        eval_steps=args.eval_steps,
        report_to=args.report_to,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,  # PiSSA's frozen factors, which no step changes
    )


def common_training_arguments(args: Any, **settings: Any) -> TrainingArguments:
    """What every training here tells the Trainer, and `settings`."""
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # what DeepSpeed would find too, with a warning in every process
    trainer_args = TrainingArguments(
        output_dir=args.output_dir,
        num_train_epochs=args.epochs,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        warmup_steps=args.warmup_ratio,  # below 1: a fraction of all steps
        lr_scheduler_type=args.lr_scheduler,
        max_grad_norm=args.max_grad_norm,
        optim="adamw_torch",
        seed=args.seed,
        use_cpu=not torch.cuda.is_available(),
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        **settings,
    )
    # Started by plain python on a machine of several GPUs, the Trainer would take them all and multiply the batch.
    if trainer_args.n_gpu > 1:
        print(f"note: one of {trainer_args.n_gpu} GPUs is used; torchrun or deepspeed start train.py on all of them")
        trainer_args._n_gpu = 1
    return trainer_args


class LogOfLastStep(transformers.TrainerCallback):
    """The steps after the last multiple of --logging-steps are logged too."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log |= state.global_step >= state.max_steps


class ProgressBar(transformers.ProgressCallback):
    """The Trainer's progress bar with the loss on the bar itself, the validation's too; metrics.jsonl has the rest."""

    def __init__(self):
        super().__init__()
        self._shown: dict[str, str] = {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None:
            names = {"loss": "loss", "task": "task", "tok/s": "tokens_per_second", "validation": "eval_loss"}
            self._shown |= {label: f"{logs[name]:.4g}" for label, name in names.items() if name in logs}
            self.training_bar.set_postfix(self._shown)


def peak_memory_gib() -> float:
    """This process's peak so far in GiB: allocated on the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status")
    found = re.search(r"^VmHWM:\s+(\d+)", status.read_text(), re.MULTILINE) if status.exists() else None
    if found:
        return int(found[1]) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # on Linux not less than the starting process had
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def leave(code: int) -> None:
    """Ends a rank's process at once. In an ordinary exit the threads that its libraries have left running may abort it,
    and the launcher would then end the other ranks, of which one still writes the model."""
    if dist.is_initialized() and code != 1:  # with 1 another rank may be lost, and with it what closes the connections
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_rank(main: Callable[[list[str]], None]) -> NoReturn:
    """`run_script` for a script whose process may be one of several ranks."""
    code = 0
    try:
        run_script(main)
    except SystemExit as end:
        code = end.code
    if "RANK" in os.environ:
        leave(code)
    sys.exit(code)
