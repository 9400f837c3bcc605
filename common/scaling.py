"""How much of what was learned acts: ΔW at a scale α, after training. At 1 it is the trained model, at 0 its base.

    W₀ + α·ΔW        for an adapter its own factor s times α; for full fine-tuning W₀ + α (W − W₀) for every parameter

The function that `--scale auto` chooses α by is the loss on held-out examples; see `smallest_within`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Scaled:
    """A trained model that acts with any α, in place.

    Args:
        model: what was trained.
        adapters: where the factor of each adapter stands: a mapping and its key; train.py's layers and PEFT's differ.
        base: the parameters W₀ by name, for a model that was trained without adapters.
    """

    def __init__(
        self,
        model: nn.Module,
        adapters: Sequence[tuple[dict[str, Any], str]],
        base: Mapping[str, Tensor] | None = None,
    ):
        self.factors = [(place, key, place[key]) for place, key in adapters]
        parameters = dict(model.named_parameters())
        trained = {name: parameters[name] for name in base or {}}
        self.weights = [(weight, base[name], weight.detach().clone()) for name, weight in trained.items()]

    @torch.no_grad()
    def set(self, alpha: float) -> None:
        """Every α is taken from the trained model anew, so that no rounding adds up."""
        for place, key, factor in self.factors:
            place[key] = factor * alpha
        for parameter, before, after in self.weights:
            parameter.copy_(torch.lerp(before.to(parameter.device).float(), after.float(), alpha))


def smallest_within(losses: Mapping[float, float], tolerance: float) -> float:
    """The smallest α whose loss is at most `tolerance` above the lowest."""
    return min(alpha for alpha, loss in losses.items() if loss <= min(losses.values()) + tolerance)
