"""Checkpoints of what is trained, complete or not there.

What is trained and PiSSA's initial factors, the optimizer, the schedule, the random states, the position in the data.
Never the base weights. A checkpoint is written under another name, sealed by a manifest of its files, and renamed.
"""

import dataclasses
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from common.cli import UserError
from common.runs import NOT_IDENTITY, first_difference
from common.validation import is_out_of_patience, losses_by_step

TRAINED_TENSORS = "trained.safetensors"
MANIFEST = "manifest.json"


def trained_tensors(model: nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
    """Trainable parameters in full precision and PiSSA's frozen factors, whole, on the CPU.

    Collective, one parameter at a time: no device holds two of them whole. Without `keep` nothing is returned, for a
    rank that only gives its parts.
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
    """Whether DeepSpeed's optimizer has the parameter: a copy in fp32 and its moments, each rank a part."""
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
        KeyError: one is missing.
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


def checkpoint_identity(args: Any, micro_batches: int | None = None) -> dict[str, Any]:
    """What must be the same for a run to go on from a checkpoint, and the FOLLOWING.

    Args:
        micro_batches: how many an optimizer step has on all processes together.
    """
    identity = {name: value for name, value in dataclasses.asdict(args).items() if name not in NOT_IDENTITY}
    return identity | {"micro_batches": micro_batches}


FOLLOWING = ("gradient_accumulation", "micro_batches")  # what `accumulation` compares


def seal_checkpoint(folder: Path, identity: dict[str, Any]) -> None:
    """Writes the manifest, and everything through to the disk: what is renamed after this is complete."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    sizes = {str(file.relative_to(folder)): file.stat().st_size for file in files}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"identity": identity, "sizes": sizes}, indent=2) + "\n")
    for file in (*files, manifest, folder):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def last_state(checkpoint: Path) -> transformers.TrainerState:
    """Where the run was when it wrote the checkpoint."""
    return transformers.TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))


def checkpoint_problem(folder: Path, identity: dict[str, Any] | None = None) -> str | None:
    """Why the checkpoint cannot be used, in a few words; None where it can."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        sizes, theirs = manifest["sizes"], manifest["identity"]
    except (OSError, ValueError, KeyError, TypeError):
        return "it has no readable manifest"
    if "micro_batches" not in theirs:
        return "it is of an earlier version of this program"
    for name, size in sizes.items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != size:
            return f"{name} is cut short or missing"
    difference = first_difference(theirs, identity or {}, FOLLOWING)
    return f"it belongs to a run with {difference}" if difference else None


def complete_checkpoints(output_dir: str | Path, identity: dict[str, Any] | None = None) -> list[Path]:
    """The usable checkpoints of a run, the newest first; of `identity`, where it is given."""
    return [folder for folder in _all_checkpoints(output_dir) if checkpoint_problem(folder, identity) is None]


def _all_checkpoints(output_dir: str | Path) -> list[Path]:
    folders = (Path(output_dir) / "checkpoints").glob("checkpoint-*")
    numbered = [folder for folder in folders if folder.name.partition("-")[2].isdigit()]
    return sorted(numbered, key=lambda folder: int(folder.name.partition("-")[2]), reverse=True)


def newest_checkpoint(
    output_dir: str | Path, identity: dict[str, Any] | None = None, *, verbose: bool = False
) -> Path | None:
    """The newest usable checkpoint; with `verbose`, says which newer ones were passed over and why."""
    for folder in _all_checkpoints(output_dir):
        problem = checkpoint_problem(folder, identity)
        if problem is None:
            return folder
        if verbose:
            print(f"note: {folder} is passed over: {problem}", file=sys.stderr)
    return None


def checkpoint_to_resume(args: Any) -> Path | None:
    """What --resume goes on from; None: from the start.

    Raises:
        UserError: there are complete checkpoints, and all are another run's: starting anew would delete them. Or this
            number of processes cannot go on from it.
    """
    if not args.resume:
        return None
    output_dir, is_main = Path(args.output_dir), os.environ.get("RANK", "0") == "0"
    identity = checkpoint_identity(args)
    checkpoint = newest_checkpoint(output_dir, identity, verbose=is_main)
    others = complete_checkpoints(output_dir)
    if checkpoint is None and others:
        raise UserError(
            f"--resume: {others[0]}: {checkpoint_problem(others[0], identity)}; give that run's settings, name "
            "another --output-dir, or replace it with --overwrite instead of --resume"
        )
    steps = accumulation(args, checkpoint)
    if is_main:
        where = f"going on from {checkpoint}" if checkpoint else f"no usable checkpoint in {output_dir}: starting"
        follows = "" if steps == args.gradient_accumulation else f", with --gradient-accumulation {steps}"
        print(where + follows, flush=True)
    return checkpoint


def accumulation(args: Any, checkpoint: Path | None) -> int:
    """Micro-batches per optimizer step and process: as many on all together as the run of `checkpoint` has.

    Raises:
        UserError: its micro-batches cannot be shared out equally, or --gradient-accumulation is neither that run's nor
            what follows.
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


def is_complete(checkpoint: Path | None, patience: int | None = None) -> bool:
    """Whether a run's checkpoint is of its last step, of all or by `patience`: only the export is missing."""
    if checkpoint is None:
        return False
    state = last_state(checkpoint)
    return state.global_step >= state.max_steps or is_out_of_patience(state.log_history, patience)


def best_checkpoint(history: Sequence[Mapping[str, float]], folders: list[Path]) -> Path | None:
    """Of these checkpoints the one of the lowest validation loss in a run's log, the earliest such; None of none."""
    losses = {step: loss for step, loss in losses_by_step(history).items() if math.isfinite(loss)}
    validated = {int(folder.name.partition("-")[2]): folder for folder in folders}
    steps = sorted(validated.keys() & losses.keys())
    return validated[min(steps, key=losses.get)] if steps else None
