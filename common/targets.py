"""Which linear layers of a model get an adapter."""

from torch import nn

from common.cli import UserError

# The attention and feed-forward projections of Llama, Mistral, Gemma and Qwen2, and their fused forms in Phi-3. The
# experts of Mixtral are no linear layers in transformers: there, attention alone.
TARGET_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FUSED_TARGET_MODULES = ["qkv_proj", "gate_up_proj"]


def default_target_modules(model: nn.Module) -> list[str]:
    """The names of TARGET_MODULES and their fused forms that `model` has.

    Raises:
        UserError: it has none of them.
    """
    linear = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    found = [name for name in (*TARGET_MODULES, *FUSED_TARGET_MODULES) if name in linear]
    if not found:
        known = ", ".join(sorted(linear))
        raise UserError(f"no known projection in {type(model).__name__}: name --target-modules among {known}")
    return found


def find_target_modules(model: nn.Module, target_modules: list[str] | None, rank: int) -> dict[str, nn.Linear]:
    """The linear layers of `model` that an entry of `target_modules` names, by their last name or a dotted suffix.

    Args:
        target_modules: None: `default_target_modules`.

    Raises:
        UserError: an entry matches nothing, or `rank` is larger than a layer's smaller side.
    """
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    found = {}
    for target in default_target_modules(model) if target_modules is None else target_modules:
        matches = [name for name in linear if name == target or name.endswith(f".{target}")]
        if not matches:
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise UserError(f"target module {target!r} names no linear layer of {type(model).__name__}; it has {known}")
        found.update((name, linear[name]) for name in matches)
    embeddings = model.get_input_embeddings()
    for name, module in found.items():
        if embeddings is not None and module.weight is embeddings.weight:
            raise UserError(f"target module {name} has its weight in common with the input embeddings: leave it out")
        smaller = min(module.in_features, module.out_features)
        if rank > smaller:
            raise UserError(f"rank {rank} is larger than {name} allows ({smaller}): use a smaller --rank")
    return dict(sorted(found.items(), key=lambda item: list(linear).index(item[0])))
