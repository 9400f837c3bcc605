"""Checkpoints of the trained weights. A checkpoint is complete, or it is not there.

The trained parameters and PiSSA's initial factors, AdamW's state, and the run's progress with its log. Never the base
weights. A checkpoint is written under another name, sealed by a manifest with its files' digests, and renamed.
"""

import dataclasses
import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common.cli import RunStopped, UserError, first_line
from common.pretrained import DIGEST_FORM, is_earlier_digest
from common.runs import INCOMPLETE, NOT_IDENTITY, first_difference, sha256
from common.tensors import num_ranks
from common.validation import is_out_of_patience, losses_by_step, row_digests

if TYPE_CHECKING:
    import datasets

TRAINED_TENSORS = "trained.safetensors"
PROGRESS = "progress.json"
MANIFEST = "manifest.json"


@dataclass
class Progress:
    """How far a training is: optimizer steps, skipped steps (NaN or Inf), seconds of training, the log.

    Attributes:
        window: the values for the next line of the log so far: the loss, sums, steps and seconds.
    """

    max_steps: int
    step: int = 0
    skipped_steps: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    window: dict[str, Any] = field(default_factory=dict)


# ------------------------------------------------------------------------------------------------------------------
# Trained tensors
# ------------------------------------------------------------------------------------------------------------------


def trained_tensors(model: nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
    """Trainable parameters in full precision and PiSSA's frozen factors, whole, on the CPU.

    Collective, one parameter at a time: no device holds two of them whole. Without `keep` nothing is returned: such a
    rank only contributes its parts.
    """
    tensors = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            whole = _master(parameter)
            if keep:
                tensors[name] = whole.detach().cpu().contiguous()
    for name, factor in _initial_factors_in(model) if keep else ():
        tensors[name] = factor.detach().cpu().contiguous()
    return tensors


def _initial_factors_in(model: nn.Module) -> list[tuple[str, Tensor]]:
    """PiSSA's frozen A₀ and B₀ in `model`, by the names of their buffers."""
    return [(name, buffer) for name, buffer in model.named_buffers() if name.endswith((".initial_A", ".initial_B"))]


def is_held_in_parts(parameter: Tensor) -> bool:
    """Whether DeepSpeed's optimizer holds the parameter: an fp32 copy and its moments, partitioned among the ranks."""
    return hasattr(parameter, "_hp_mapping") or hasattr(parameter, "_z3_optimizer")


def _master(parameter: Tensor) -> Tensor:
    """The parameter as the optimizer keeps it."""
    if is_held_in_parts(parameter):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter)
    return parameter


@torch.no_grad()
def load_trained_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Puts `trained_tensors` of a model of the same shape into `model`.

    Raises:
        KeyError: a tensor is missing.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.copy_(tensors[name])
    for name, factor in _initial_factors_in(model):
        factor.copy_(tensors[name])


def initial_factors(tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """A₀ and B₀ by layer among `trained_tensors`."""
    names = [name.removesuffix(".initial_A") for name in tensors if name.endswith(".initial_A")]
    return {name: (tensors[f"{name}.initial_A"], tensors[f"{name}.initial_B"]) for name in names}


# ------------------------------------------------------------------------------------------------------------------
# AdamW's state
# ------------------------------------------------------------------------------------------------------------------


# AdamW's state by the names of the parameters. One process, several ranks, ZeRO-2 and ZeRO-3 write and read the same
# files, so that a run goes on with another number of processes.
STATE = ("step", "exp_avg", "exp_avg_sq")  # each with a file of its own


def state_file(folder: Path, key: str) -> Path:
    return folder / f"{key}.safetensors"


def optimizer_tensors(
    model: nn.Module, optimizer: Any, *, keep: bool = True
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """For each key of STATE, the tensors of all trained parameters, whole, on the CPU.

    Collective, one parameter at a time. Without `keep` they are empty: such a rank only contributes its parts.

    Args:
        optimizer: torch's optimizer, or DeepSpeed's wrapper of it.
    """
    _link_moments(optimizer)
    for key in STATE:
        tensors = {}
        for name, parameter in model.named_parameters():
            value = _whole_state(parameter, optimizer, key) if parameter.requires_grad else None
            if keep and value is not None:
                tensors[name] = value.detach().cpu().contiguous()
        yield key, tensors


def _whole_state(parameter: Tensor, optimizer: Any, key: str) -> Tensor | None:
    """None where the parameter has never had a gradient."""
    if not is_held_in_parts(parameter):
        return optimizer.state[parameter].get(key)
    if key == "step":  # all parameters of a partition have one step count
        return torch.tensor(float(max(state["step"] for state in optimizer.optimizer.state.values())))
    from deepspeed.utils import safe_get_full_optimizer_state

    return safe_get_full_optimizer_state(parameter, key)


def load_optimizer(model: nn.Module, optimizer: Any, folder: Path) -> None:
    """Loads the tensors of `optimizer_tensors` from `folder` into the optimizer; each rank takes its part.

    DeepSpeed also keeps the parameters in full precision, partitioned among the ranks. Each rank loads its part.
    """
    files = {key: safe_open(state_file(folder, key), "pt") for key in STATE}
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    known = set(files["step"].keys())
    if not any(map(is_held_in_parts, parameters.values())):
        names = {parameter: name for name, parameter in parameters.items()}
        order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
        state = {
            index: {key: file.get_tensor(name) for key, file in files.items()}
            for index, name in enumerate(order)
            if name in known
        }
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
        return
    _make_empty_state(optimizer, max(files["step"].get_tensor(name) for name in known))
    masters = safe_open(folder / TRAINED_TENSORS, "pt")
    for name, parameter in parameters.items():
        _set_part(parameter, masters.get_tensor(name))
        for key in STATE[1:]:
            _set_part(parameter, files[key].get_tensor(name), key)


def _make_empty_state(zero: Any, step: Tensor) -> None:
    """Gives DeepSpeed's optimizer the state that it otherwise makes in its first step: moments of zero, at `step`."""
    places = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
    parts = next(getattr(zero, name) for name in places if hasattr(zero, name))  # ZeRO-3; ZeRO-2; bf16 without ZeRO
    is_torch = isinstance(zero.optimizer, torch.optim.AdamW)  # DeepSpeed's own optimizers count steps by an int
    for part in parts:
        moments = {key: torch.zeros_like(part) for key in STATE[1:]}
        zero.optimizer.state[part] = {"step": step.clone() if is_torch else int(step), **moments}
    _link_moments(zero)


def _link_moments(zero: Any) -> None:
    """Lets ZeRO-2 tell each parameter where its moments are. By itself ZeRO-2 does so once, after the first group's
    first step, when the moments of the other groups do not exist yet."""
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def _set_part(parameter: Tensor, value: Tensor, key: str | None = None) -> None:
    """Loads this rank's part of a whole tensor into the moment `key`, or without `key` into the parameter itself."""
    from deepspeed import utils

    if not hasattr(parameter, "ds_tensor"):
        if key is None:
            utils.safe_set_full_fp32_param(parameter, value)
        else:
            utils.safe_set_full_optimizer_state(parameter, value, key)
        return
    size = parameter.ds_tensor.numel()  # the last rank's part is padded
    first = size * dist.get_rank()
    part = value.flatten()[first : first + size]
    part = F.pad(part, (0, size - part.numel()))
    if key is None:
        utils.safe_set_local_fp32_param(parameter, part)
        parameter.ds_tensor.data.copy_(part)  # the forward and backward passes gather this copy
        if parameter.data.numel() == value.numel():  # every rank keeps a small parameter whole
            parameter.data.copy_(value)
    else:
        utils.safe_set_local_optimizer_state(parameter, part, key)


# ------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ------------------------------------------------------------------------------------------------------------------


# The paths in these options may change, their contents may not: `require_same_contents` compares the contents.
NAMES_OF_CONTENTS = {"model", "data", "validation_data", "test_data"}
PATHS_OF_A_NODE = {"config", "deepspeed", "init_cache", "teacher_cache"}  # a node may have its own copy


def contents_of(examples: "datasets.Dataset") -> str:
    """A digest of tokenised examples: their `input_ids` and `labels`, in order."""
    return hashlib.sha256(b"".join(row_digests(examples))).hexdigest()


def require_same_contents(checkpoint: Path | None, contents: Mapping[str, str], accept_changes: bool) -> None:
    """Raises a UserError where the data or the base model are not those that the checkpoint was trained with.

    Args:
        contents: digests by name, such as "data". accept_changes: the user insists.
    """
    if checkpoint is None:
        return
    made = json.loads((checkpoint / MANIFEST).read_text())["identity"].get("contents", {})
    if is_earlier_digest(made.get("base model", "")) and contents.get("base model", "").startswith(DIGEST_FORM):
        contents = {name: digest for name, digest in contents.items() if name != "base model"}
        if os.environ.get("RANK", "0") == "0":
            print(f"note: {checkpoint} is older than this digest of the base model: not compared", file=sys.stderr)
    changed = [name for name, digest in contents.items() if made.get(name) != digest]
    if changed and not accept_changes:
        raise UserError(
            f"the {' and the '.join(changed)} changed since {checkpoint} was written: put the old content "
            "back, or insist with --accept-changes"
        )


def require_same_start(args: Any, checkpoint: Path | None, contents: Mapping[str, str]) -> None:
    """Raises a UserError, on all ranks, where a rank starts otherwise than the first: each node has its own files and
    its own command line, and the run would train on, silently wrong. See also `require_same_contents`."""
    others = NAMES_OF_CONTENTS | PATHS_OF_A_NODE
    mine = {name: value for name, value in dataclasses.asdict(args).items() if name not in others}
    mine |= {f"content of the {name}": contents.get(name) for name in ("base model", "data", "evaluation data")}
    mine["checkpoint"] = checkpoint and f"{checkpoint} ({sha256(checkpoint / MANIFEST)})"
    ranks = [mine] * num_ranks()
    if len(ranks) > 1:
        dist.all_gather_object(ranks, mine)
    for rank, theirs in enumerate(ranks):
        if difference := first_difference(theirs, ranks[0]):
            raise UserError(
                f"rank {rank} has {difference} as rank 0: all nodes need the same command, the same model and data, "
                "and one --output-dir"
            )
    require_same_contents(checkpoint, contents, args.accept_changes)


def checkpoint_identity(args: Any, micro_batches: int | None = None) -> dict[str, Any]:
    """The settings that must be the same for a run to go on from a checkpoint.

    Args:
        micro_batches: micro-batches of an optimizer step, on all processes together.
    """
    left_out = NOT_IDENTITY | NAMES_OF_CONTENTS
    identity = {name: value for name, value in dataclasses.asdict(args).items() if name not in left_out}
    return identity | {"micro_batches": micro_batches}


FOLLOWING = ("gradient_accumulation", "micro_batches")  # settings that `accumulation` compares


def write_checkpoint(training: Any) -> None:
    """Writes a checkpoint of a `Training`, whole or not at all (with a warning); deletes those beyond
    --keep-checkpoints. Each rank contributes its parts of all tensors even if the first rank fails to write its files:
    otherwise the other ranks would wait for ever.
    """
    args, progress = training.args, training.progress
    folder = Path(args.output_dir) / "checkpoints"
    final, staging = folder / f"checkpoint-{progress.step}", folder / INCOMPLETE / f"checkpoint-{progress.step}"
    if training.agree(final.exists() and checkpoint_problem(final, training.identity, read_all=True) is None):
        return
    problems: list[str] = []

    def attempt(part: Callable[[], Any]) -> None:
        if training.is_main and not problems:
            try:
                part()
            except (OSError, RuntimeError, SafetensorError) as error:  # each writer reports a full disk differently
                problems.append(first_line(error))
        training.agree(None)  # the others wait here, and not in a group of DeepSpeed's, which has a shorter timeout

    def begin() -> None:
        shutil.rmtree(staging.parent, ignore_errors=True)
        staging.mkdir(parents=True)

    def put_in_place() -> None:
        _seal(staging, training.identity)
        shutil.rmtree(final, ignore_errors=True)  # a damaged one
        staging.rename(final)

    attempt(begin)
    tensors = trained_tensors(training.trained, keep=training.is_main)
    attempt(lambda: save_file(tensors, staging / TRAINED_TENSORS))
    for key, state in optimizer_tensors(training.trained, training.optimizer.optimizer, keep=training.is_main):
        attempt(lambda key=key, state=state: save_file(state, state_file(staging, key)))
    for name, (extra, metadata) in training.extra().items():
        attempt(lambda name=name, extra=extra, metadata=metadata: save_file(extra, staging / name, metadata))
    attempt(lambda: (staging / PROGRESS).write_text(json.dumps(dataclasses.asdict(progress))))
    attempt(put_in_place)
    if training.is_main:
        shutil.rmtree(staging.parent, ignore_errors=True)
        if problems:
            kept = newest_checkpoint(args.output_dir)
            print(
                f"warning: the checkpoint of step {progress.step} could not be written ({problems[0]}); "
                f"{'the last one is ' + str(kept) if kept else 'there is none yet'}",
                file=sys.stderr,
            )
        else:
            _delete_old_checkpoints(args)


def _seal(folder: Path, identity: dict[str, Any]) -> None:
    """Writes the manifest and flushes everything to disk: a folder that is renamed after this is complete."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    made = {file.name: {"size": file.stat().st_size, "sha256": sha256(file)} for file in files}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"identity": identity, "files": made}, indent=2) + "\n")
    for file in (*files, manifest, folder):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _delete_old_checkpoints(args: Any) -> None:
    there, count = complete_checkpoints(args.output_dir), args.keep_checkpoints
    # A resumed run may go on from any checkpoint that stays, so the best state of each stays too.
    keep_best = getattr(args, "keep_best", False)
    best = [best_checkpoint(load_progress(kept).history, there) for kept in there[:count] if keep_best]
    for old in there[count:]:
        if old not in best:
            shutil.rmtree(old, ignore_errors=True)


def load_progress(checkpoint: Path) -> Progress:
    """How far the run was when it wrote the checkpoint."""
    return Progress(**json.loads((checkpoint / PROGRESS).read_text()))


def load_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """`trained_tensors` of a checkpoint."""
    return load_file(checkpoint / TRAINED_TENSORS)


def checkpoint_problem(folder: Path, identity: dict[str, Any] | None = None, *, read_all: bool = False) -> str | None:
    """Why the checkpoint cannot be used, in a few words; None where it can.

    Args:
        read_all: compare every file's digest, not its size alone.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        theirs = manifest["identity"]
        if "files" not in manifest:
            return "it is of an earlier version of this program"
        for name, made in manifest["files"].items():
            if not (folder / name).is_file() or (folder / name).stat().st_size != made["size"]:
                return f"{name} is cut short or missing"
            if read_all and sha256(folder / name) != made["sha256"]:
                return f"{name} is damaged: its bytes are not those that were written"
    except (OSError, ValueError, KeyError, TypeError):
        return "it has no readable manifest"
    difference = first_difference(theirs, identity or {}, FOLLOWING)
    return f"it belongs to a run with {difference}" if difference else None


def complete_checkpoints(*where: Any, **how: Any) -> list[Path]:
    """The usable checkpoints of a run, the newest first; for the arguments see `_usable_checkpoints`."""
    return list(_usable_checkpoints(*where, **how))


def newest_checkpoint(*where: Any, **how: Any) -> Path | None:
    """The newest of `complete_checkpoints`."""
    return next(_usable_checkpoints(*where, **how), None)


def _all_checkpoints(output_dir: str | Path) -> list[Path]:
    folders = (Path(output_dir) / "checkpoints").glob("checkpoint-*")
    numbered = [folder for folder in folders if folder.name.partition("-")[2].isdigit()]
    return sorted(numbered, key=lambda folder: int(folder.name.partition("-")[2]), reverse=True)


def _usable_checkpoints(
    output_dir: str | Path,
    identity: dict[str, Any] | None = None,
    *,
    read_all: bool = False,
    verbose: bool = False,
) -> Iterator[Path]:
    """The usable checkpoints of a run, the newest first.

    Args:
        identity: the settings that they must have. read_all: see `checkpoint_problem`.
        verbose: says which ones are passed over and why.
    """
    for folder in _all_checkpoints(output_dir):
        problem = checkpoint_problem(folder, identity, read_all=read_all)
        if problem is None:
            yield folder
        elif verbose:
            print(f"note: {folder} is passed over: {problem}", file=sys.stderr)


def _set_damaged_aside(output_dir: Path, good: Path | None) -> None:
    """Renames the checkpoints, besides a `good` one, that have wrong bytes in files of the right size. Later, where
    sizes alone are compared, they would be counted as complete, and good ones deleted in their place."""
    for folder in complete_checkpoints(output_dir):
        if folder != good and checkpoint_problem(folder, read_all=True) is not None:
            aside = folder.with_name(f"{folder.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
            print(f"note: {folder} is damaged, and called {aside.name} now", file=sys.stderr)


def checkpoint_to_resume(args: Any) -> Path | None:
    """The checkpoint that --resume goes on from; None: from the start.

    Raises:
        UserError: all complete checkpoints are another run's, and starting anew would delete them; or this number of
            processes cannot go on from the checkpoint.
    """
    if not args.resume:
        return None
    output_dir, is_main = Path(args.output_dir), os.environ.get("RANK", "0") == "0"
    identity = checkpoint_identity(args)
    checkpoint = newest_checkpoint(output_dir, identity, read_all=True, verbose=is_main)
    for other in complete_checkpoints(output_dir) if checkpoint is None else ():
        if problem := checkpoint_problem(other, identity):
            raise UserError(
                f"--resume: {other}: {problem}; give that run's settings, name "
                "another --output-dir, or replace it with --overwrite instead of --resume"
            )
    steps = accumulation(args, checkpoint)
    if is_main:
        _set_damaged_aside(output_dir, checkpoint)
        where = f"going on from {checkpoint}" if checkpoint else f"no usable checkpoint in {output_dir}: starting"
        follows = "" if steps == args.gradient_accumulation else f", with --gradient-accumulation {steps}"
        print(where + follows, flush=True)
    return checkpoint


def accumulation(args: Any, checkpoint: Path | None) -> int:
    """Micro-batches per optimizer step and process; all processes together have as many as the run of `checkpoint`.

    Raises:
        UserError: that run's micro-batches cannot be divided equally among the processes, or --gradient-accumulation is
            neither that run's nor the quotient.
    """
    if checkpoint is None:
        return args.gradient_accumulation
    made = json.loads((checkpoint / MANIFEST).read_text())["identity"]
    total, processes = made["micro_batches"], int(os.environ.get("WORLD_SIZE", "1"))
    if total % processes:
        numbers = ", ".join(str(number) for number in range(1, total + 1) if total % number == 0)
        raise UserError(
            f"--resume: a step of {checkpoint} has {total} micro-batches, which {processes} processes cannot share "
            f"equally: start as many as divide it, {numbers}"
        )
    if args.gradient_accumulation not in (made["gradient_accumulation"], total // processes):
        raise UserError(
            f"--gradient-accumulation {args.gradient_accumulation} on {processes} processes is not the {total} "
            f"micro-batches that a step of {checkpoint} has: give {total // processes}"
        )
    return total // processes


def is_complete(checkpoint: Path | None, patience: int | None = None, max_steps: int | None = None) -> bool:
    """Whether a checkpoint ends its run, by the last step or by `patience`, so that only the export is missing.

    Args:
        max_steps: the run's length; None: its length when it wrote the checkpoint.
    """
    if checkpoint is None:
        return False
    progress = load_progress(checkpoint)
    return progress.step >= (max_steps or progress.max_steps) or is_out_of_patience(progress.history, patience)


def checkpoint_to_export(folder: Path, patience: int | None, keep_best: bool) -> tuple[Path, str | None]:
    """The checkpoint that --export-from takes, the best state's or the newest, and how far a run is that has not ended.

    Raises:
        UserError: there is no complete checkpoint.
    """
    usable = _usable_checkpoints(folder, read_all=True, verbose=True)
    newest = next(usable, None)
    if newest is None:
        raise UserError(f"--export-from {folder}: no complete checkpoint in {folder / 'checkpoints'}")
    progress = load_progress(newest)
    unfinished = None if is_complete(newest, patience) else f"step {progress.step} of {progress.max_steps}"
    best = best_checkpoint(progress.history, [newest, *usable]) if keep_best else None
    return best or newest, unfinished


def way_to_export(args: Any) -> str:
    """The user's remedy if the export failed after a training; the end of the training may have no checkpoint."""
    newest = newest_checkpoint(args.output_dir)
    if is_complete(newest, args.patience):
        return f"give the same command with --resume, or train.py --export-from {args.output_dir}"
    return f"give the same command with --resume, which goes on from {newest or 'the start'}"


def best_checkpoint(history: Sequence[Mapping[str, float]], folders: list[Path]) -> Path | None:
    """The checkpoint with the lowest validation loss in a run's log, the earliest of equals; None without any."""
    losses = {step: loss for step, loss in losses_by_step(history).items() if math.isfinite(loss)}
    validated = {int(folder.name.partition("-")[2]): folder for folder in folders}
    steps = sorted(validated.keys() & losses.keys())
    return validated[min(steps, key=losses.get)] if steps else None


# ------------------------------------------------------------------------------------------------------------------
# The best state of a classifier
# ------------------------------------------------------------------------------------------------------------------


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
