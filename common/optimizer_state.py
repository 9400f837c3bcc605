"""AdamW's state, whole, by the names of the parameters.

One process, several ranks, ZeRO-2 and ZeRO-3 write and read the same files, so that a run goes on with another number
of processes. What is trained is small; only full fine-tuning has to gather much, one moment after the other.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from common.checkpoints import TRAINED_TENSORS, is_held_in_parts

STATE = ("step", "exp_avg", "exp_avg_sq")  # each with a file of its own


def state_file(folder: Path, key: str) -> Path:
    return folder / f"{key}.safetensors"


def optimizer_tensors(
    model: nn.Module, optimizer: Any, *, keep: bool = True
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """For each of STATE, its tensors of all trained parameters, whole, on the CPU.

    Collective, one parameter at a time. Without `keep` they are empty, for a rank that only gives its parts.

    Args:
        optimizer: torch's, or DeepSpeed's around it.
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
    if key == "step":  # one for all parameters of a part
        return torch.tensor(float(max(state["step"] for state in optimizer.optimizer.state.values())))
    from deepspeed.utils import safe_get_full_optimizer_state

    return safe_get_full_optimizer_state(parameter, key)


def load_optimizer(model: nn.Module, optimizer: Any, folder: Path) -> None:
    """Puts what `optimizer_tensors` gave, and is now in `folder`, into the optimizer; each rank takes its part.

    Under DeepSpeed also the parameters themselves in full precision, of which a rank holds its part there too.
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
    is_torch = isinstance(zero.optimizer, torch.optim.AdamW)  # DeepSpeed's own count by a plain number
    for part in parts:
        moments = {key: torch.zeros_like(part) for key in STATE[1:]}
        zero.optimizer.state[part] = {"step": step.clone() if is_torch else int(step), **moments}
    _link_moments(zero)


def _link_moments(zero: Any) -> None:
    """Lets ZeRO-2 tell each parameter where its moments are. By itself it does so once, after the first group's first
    step, when those of the other groups are not there yet."""
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def _set_part(parameter: Tensor, value: Tensor, key: str | None = None) -> None:
    """Puts this rank's part of a whole tensor to its place: of a moment, or without `key` of the parameter itself."""
    from deepspeed import utils

    if not hasattr(parameter, "ds_tensor"):
        if key is None:
            utils.safe_set_full_fp32_param(parameter, value)
        else:
            utils.safe_set_full_optimizer_state(parameter, value, key)
        return
    size = parameter.ds_tensor.numel()  # the last rank's is filled up
    first = size * dist.get_rank()
    part = value.flatten()[first : first + size]
    part = F.pad(part, (0, size - part.numel()))
    if key is None:
        utils.safe_set_local_fp32_param(parameter, part)
        parameter.ds_tensor.data.copy_(part)  # what the passes gather
        if parameter.data.numel() == value.numel():  # a small one, which every rank keeps whole
            parameter.data.copy_(value)
    else:
        utils.safe_set_local_optimizer_state(parameter, part, key)
