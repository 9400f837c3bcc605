"""Which linear layers of a model get an adapter."""

import re
from collections import Counter
from collections.abc import Iterable

from torch import nn

from common.cli import UserError

# The attention and feed-forward projections of Llama, Mistral, Gemma and Qwen2, and their fused forms in Phi-3. The
# experts of Mixtral are no linear layers in transformers: there, attention alone.
TARGET_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FEED_FORWARD = TARGET_MODULES[4:]
FUSED_TARGET_MODULES = ["qkv_proj", "gate_up_proj"]


def default_target_modules(model: nn.Module) -> list[str]:
    """The names of TARGET_MODULES and their fused forms that `model` has.

    Raises:
        UserError: it has none of them.
    """
    linear = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    found = [name for name in (*TARGET_MODULES, *FUSED_TARGET_MODULES) if name in linear]
    if not found:
        raise UserError(f"no known projection in {type(model).__name__}: name --target-modules among {_known(model)}")
    if dense_beside_experts(model, find_target_modules(model, found, 1)):
        found = [name for name in found if name not in FEED_FORWARD]
    return found


def _known(model: nn.Module) -> str:
    """The last names of the linear layers, for a message."""
    modules = dict(model.named_modules())
    names = sorted({name.rpartition(".")[2] for name, module in modules.items() if isinstance(module, nn.Linear)})
    conv = sorted({name.rpartition(".")[2] for name, module in modules.items() if type(module).__name__ == "Conv1D"})
    return ", ".join(names) + (f"; {', '.join(conv)} are Conv1D, which get no adapters here" if conv else "")


def dense_beside_experts(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Layers of `names` that stand where other layers of the model have experts: PEFT takes their factors for those."""
    with_experts = {
        re.sub(r"\d+", "*", name.rpartition(".")[0])
        for name, module in model.named_modules()
        if name.endswith(".experts") and any(parameter.dim() == 3 for parameter in module.parameters(recurse=False))
    }
    return [name for name in names if re.sub(r"\d+", "*", name.rpartition(".")[0]) in with_experts]


def plain_names(model: nn.Module, found: Iterable[str]) -> list[str]:
    """Targets that any reader of an adapter understands: last names where these name `found` alone, else whole ones."""
    names = list(found)
    last = sorted({name.rpartition(".")[2] for name in names})
    return last if find_target_modules(model, last, 1).keys() == set(names) else names


def coverage(model: nn.Module, found: Iterable[str]) -> dict[str, dict[str, int]]:
    """How many linear layers of each last name get an adapter, and how many do not; the output layer aside."""
    found, head = set(found), model.get_output_embeddings()
    layers = {
        name: name in found
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and (module is not head or name in found)
    }
    return {
        what: dict(Counter(name.rpartition(".")[2] for name, is_adapted in layers.items() if is_adapted == wanted))
        for what, wanted in (("adapted", True), ("not_adapted", False))
    }


def find_target_modules(model: nn.Module, target_modules: list[str] | None, rank: int) -> dict[str, nn.Linear]:
    """The linear layers of `model` that an entry of `target_modules` names.

    Args:
        target_modules: last names, dotted suffixes, regular expressions for the whole name, or `all-linear`, which is
            every linear layer but the output layer; None: `default_target_modules`.

    Raises:
        UserError: an entry matches nothing, or `rank` is larger than a layer's smaller side.
    """
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    found = {}
    for target in default_target_modules(model) if target_modules is None else target_modules:
        if target == "all-linear":
            head = model.get_output_embeddings()
            matches = [name for name in linear if linear[name] is not head]
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
