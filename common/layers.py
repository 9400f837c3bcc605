"""Layers of a model: which get an adapter, and which keep fewer activations for the backward pass."""

import copy
import functools
import inspect
import itertools
import re
import warnings
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from common.cli import UserError, first_line
from common.tensors import device_of, gathered, is_partitioned, shape_of

# The attention and feed-forward projections of Llama, Mistral, Gemma and Qwen2, and their fused forms in Phi-3. In
# Mixtral only attention gets adapters: the experts are not linear layers in transformers.
TARGET_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FEED_FORWARD = TARGET_MODULES[4:]
FUSED_TARGET_MODULES = ["qkv_proj", "gate_up_proj"]


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def _last_names(names: Iterable[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})


def default_target_modules(model: nn.Module) -> list[str]:
    """The names of TARGET_MODULES and their fused forms that `model` has.

    Raises:
        UserError: the model has none of them.
    """
    linear = _last_names(linear_layers(model))
    found = [name for name in (*TARGET_MODULES, *FUSED_TARGET_MODULES) if name in linear]
    if not found:
        raise UserError(f"no known projection in {type(model).__name__}: name --target-modules among {_known(model)}")
    if obstacle_to_adapters(model, find_target_modules(model, found, 1)):
        found = [name for name in found if name not in FEED_FORWARD]
    return found


def _known(model: nn.Module) -> str:
    """The last names of the linear layers, for a message."""
    conv = _last_names(name for name, module in model.named_modules() if type(module).__name__ == "Conv1D")
    names = ", ".join(_last_names(linear_layers(model)))
    return names + (f"; {', '.join(conv)} are Conv1D, which get no adapters here" if conv else "")


def obstacle_to_adapters(model: nn.Module, found: Iterable[str]) -> str | None:
    """The reason why adapters on the layers `found` would not act everywhere as in training; None if they would.

    PEFT is asked, because for mixtures it takes some names for those of experts. Only whole nn.Linear are put to it:
    quantized and partitioned ones have no shapes. The code of a layer's parent is read, because the fused kernels of
    state-space layers take the weight and bypass the adapter.
    """
    names, modules = list(found), dict(model.named_modules())
    for name in names:
        parent, _, child = name.rpartition(".")
        reading = rf"\b(?<!isinstance\()self\.{child}\.weight\b(?!\[|\.(dtype|device|shape))"
        if re.search(reading, _source(type(modules[parent]))):
            return f"{type(modules[parent]).__name__} reads the weight of {child} past an adapter"
    if any(type(modules[name]) is not nn.Linear or is_partitioned(modules[name].weight) for name in names):
        return None
    try:
        import peft
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError:  # bench/gpu.py runs where it is not installed
        return None
    try:
        config = peft.LoraConfig(r=1, target_modules=plain_names(model, names))
        # PEFT's start of an adapter draws random numbers, which would move the start of training.
        with warnings.catch_warnings(action="ignore"), torch.random.fork_rng(devices=[]):
            adapted = peft.get_peft_model(_without_weights(model), config).base_model.model
    except (ValueError, TypeError) as error:
        return first_line(error)
    taken = {name for name, module in adapted.named_modules() if isinstance(module, BaseTunerLayer)}
    others = sorted(taken ^ set(names))
    return f"PEFT would read the adapter otherwise at {others[0]}" if others else None


def require_adapters(model: nn.Module, found: Iterable[str]) -> None:
    """Raises a UserError where `obstacle_to_adapters` finds one."""
    if obstacle := obstacle_to_adapters(model, found):
        names = ", ".join(_last_names(found))
        raise UserError(f"no adapter on {names}: {obstacle}; name other --target-modules")


def _without_weights(model: nn.Module) -> nn.Module:
    """A copy of the model that has shapes and no memory: its parameters and buffers are on the meta device."""
    memo = {}
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        bare = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        memo[id(tensor)] = nn.Parameter(bare, requires_grad=False) if isinstance(tensor, nn.Parameter) else bare
    return copy.deepcopy(model, memo)


@functools.cache
def _source(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # a class without a file
        return ""


def plain_names(model: nn.Module, found: Iterable[str]) -> list[str]:
    """Targets that every reader of adapters understands: last names if they match only `found`, else whole names."""
    names, last = list(found), _last_names(found)
    named = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in last}
    return last if named == set(names) else names


def coverage(model: nn.Module, found: Iterable[str]) -> dict[str, dict[str, int]]:
    """How many linear layers of each last name get an adapter, and how many do not; without the output layer."""
    found, head = set(found), model.get_output_embeddings()
    layers = {name: name in found for name, layer in linear_layers(model).items() if layer is not head or name in found}
    return {
        what: dict(Counter(name.rpartition(".")[2] for name, is_adapted in layers.items() if is_adapted == wanted))
        for what, wanted in (("adapted", True), ("not_adapted", False))
    }


def find_target_modules(model: nn.Module, target_modules: list[str] | None, rank: int) -> dict[str, nn.Linear]:
    """The linear layers of `model` that an entry of `target_modules` names.

    Args:
        target_modules: last names, dotted suffixes, regular expressions for the whole name, or `all-linear` for every
            linear layer but the output layer; None: `default_target_modules`.

    Raises:
        UserError: an entry matches nothing, or `rank` is larger than a layer's smaller side.
    """
    linear, found = linear_layers(model), {}
    for target in default_target_modules(model) if target_modules is None else target_modules:
        if target == "all-linear":
            matches = [name for name in linear if linear[name] is not model.get_output_embeddings()]
        elif re.fullmatch(r"[\w.]+", target):
            matches = [name for name in linear if name == target or name.endswith(f".{target}")]
        else:
            try:
                matches = [name for name in linear if re.fullmatch(target, name)]
            except re.error as error:
                raise UserError(f"target module {target!r} is no regular expression: {error}") from error
        if not matches:
            raise UserError(
                f"target module {target!r} names no linear layer of {type(model).__name__}; it has {_known(model)}"
            )
        found.update((name, linear[name]) for name in matches)
    embeddings = model.get_input_embeddings()
    for name, module in found.items():
        if embeddings is not None and module.weight is embeddings.weight:
            raise UserError(f"target module {name} has its weight in common with the input embeddings: leave it out")
        smaller = min(module.in_features, module.out_features)
        if rank > smaller:
            raise UserError(f"rank {rank} is larger than {name} allows ({smaller}): use a smaller --rank")
    return dict(sorted(found.items(), key=lambda item: list(linear).index(item[0])))


# ------------------------------------------------------------------------------------------------------------------
# Fewer activations kept for the backward pass, in gated feed-forwards and in frozen norms. Exact
# ------------------------------------------------------------------------------------------------------------------


def save_activations(model: "transformers.PreTrainedModel") -> int:
    """Replaces the forward of gated SiLU MLPs and frozen RMSNorms by one that keeps half as much for the backward pass.

    Each replacement is tried against the module's own forward first. Returns how many were replaced.
    """
    # The embedding has the activations' type: adapters are fp32, and quantized weights are stored as integers.
    count, dtype = 0, model.get_input_embeddings().weight.dtype
    for module in model.modules():
        if all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
            linear = getattr(module.gate_proj, "base", module.gate_proj)
            lean, width = _lean_mlp, linear.in_features
        elif type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            if module.weight.requires_grad:
                continue
            lean, width = _lean_norm, shape_of(module.weight)[0]
        else:
            continue
        device = device_of(next(module.parameters()))
        x = torch.linspace(-2, 2, 3 * width, device=device).view(3, width).to(dtype)
        with torch.no_grad(), gathered(module.parameters()):
            if torch.allclose(lean(module, x).float(), module(x).float(), rtol=1e-2, atol=1e-4):
                module.forward = functools.partial(lean, module)
                count += 1
    return count


def _lean_mlp(mlp: nn.Module, x: Tensor) -> Tensor:
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    product = _SwiGLU.apply(gate, up)
    # down_proj's adapter would keep the product for its gradient; the product is cheap to compute again.
    kept = gate.detach(), up.detach()

    def pack(tensor: Tensor) -> Any:
        return kept if tensor.data_ptr() == product.data_ptr() else tensor

    def unpack(packed: Any) -> Tensor:
        return F.silu(packed[0]).mul_(packed[1]) if isinstance(packed, tuple) else packed

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return mlp.down_proj(product)


def _lean_norm(norm: nn.Module, x: Tensor) -> Tensor:
    if x.is_cuda:  # torch's fused kernel, which keeps x and each row's 1 / rms too
        return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)
    return _RMSNorm.apply(x, norm.weight, norm.variance_epsilon)


class _SwiGLU(torch.autograd.Function):
    """silu(gate)·up; keeps only gate and up for the backward pass."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


class _RMSNorm(torch.autograd.Function):
    """x / rms(x) · weight with a frozen weight, computed in fp32; keeps x and each row's 1 / rms."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        rows = x.float()
        scale = torch.linalg.vecdot(rows, rows).div_(rows.shape[-1]).add_(eps).rsqrt_()[..., None]
        ctx.save_for_backward(x, weight, scale)
        return (rows * scale).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx, grad):
        # With g the gradient at x·scale and d the width: scale·g − scale³·(g·x / d)·x
        x, weight, scale = ctx.saved_tensors
        rows, grad_rows = x.float(), (grad * weight).float()
        mean = torch.linalg.vecdot(grad_rows, rows)[..., None] / x.shape[-1]
        return grad_rows.mul_(scale).addcmul_(rows, mean.mul_(scale**3), value=-1).to(x.dtype), None, None
