"""Scales the trained change ΔW by α after training: α = 1 is the trained model, α = 0 its base.

    W₀ + α·ΔW        for an adapter its own factor s times α; for full fine-tuning W₀ + α (W − W₀) for every parameter

`--scale auto` measures the model at ten scales on held-out examples, and takes the smallest with a loss close to the
lowest. It prints (numbers for illustration):

    scale   held-out loss   KL(base || tuned)
      1.0          0.0602              0.9120
      0.9          0.0621              0.8013
      0.8          0.0655              0.7011
    chosen: 0.9, the smallest scale whose loss is within 0.003 nats of the lowest
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from common import checkpoints, validation
from common.cli import UserError, option
from common.conversations import encoded, load_training_records
from common.templates import IGNORE_INDEX

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

GRID = tuple(tenths / 10 for tenths in range(10, 0, -1))
MOST_NUMBERS = 2**28  # how many log-probabilities of the base are kept at a time


@dataclass
class ScaleArguments:
    """The scale of the trained change in --export-from."""

    scale: str | None = option(
        None, "with --export-from: multiply the trained change of the weights by this; auto: chosen on held-out data"
    )
    scale_tolerance: float = option(
        0.003, "--scale auto: the smallest scale whose held-out loss is at most this many nats above the lowest"
    )


def read_scale(args: Any) -> float | None:
    """--scale as a number, 1 if it is not given; None for auto.

    Raises:
        UserError: not a number above 0 and up to 1, or without --export-from.
    """
    if args.scale is None:
        return 1.0
    if args.export_from is None:
        raise UserError("--scale acts after training: name the run by --export-from")
    if not 0 <= args.scale_tolerance < float("inf"):
        raise UserError(f"--scale-tolerance is {args.scale_tolerance}: it must be 0 or above, in nats")
    if args.scale == "auto":
        return None
    try:
        scale = float(args.scale)
    except ValueError:
        scale = float("nan")
    if not 0 < scale <= 1:
        raise UserError(f"--scale is {args.scale}: give a number above 0 and up to 1, or auto")
    return scale


class Scaled:
    """A trained model that can be set to any α, in place.

    Args:
        model: the trained model.
        adapters: the place of each adapter's factor: a mapping and its key. train.py's layers and PEFT's differ.
        base: the parameters W₀ by name, for a model that was trained without adapters.
    """

    def __init__(
        self,
        model: nn.Module,
        adapters: Sequence[tuple[dict[str, Any], str]],
        base: Mapping[str, Tensor] | None = None,
    ):
        self.model = model
        self.factors = [(place, key, place[key]) for place, key in adapters]
        parameters = dict(model.named_parameters())
        trained = {name: parameters[name] for name in base or {}}
        self.weights = [(weight, base[name], weight.detach().clone()) for name, weight in trained.items()]

    @torch.no_grad()
    def set(self, alpha: float) -> None:
        """Sets α. It starts from the trained weights every time, so that rounding does not add up."""
        for place, key, factor in self.factors:
            place[key] = factor * alpha
        for weight, before, after in self.weights:
            weight.copy_(torch.lerp(before.to(weight.device).float(), after.to(weight.device).float(), alpha))


@dataclass
class Curve:
    """By α, means over the response tokens of held-out examples, in nats."""

    examples: int
    losses: dict[float, float] = field(default_factory=dict)
    kl_base_tuned: dict[float, float] = field(default_factory=dict)

    def smallest_within(self, tolerance: float) -> float:
        """The smallest α whose loss is at most `tolerance` above the lowest."""
        lowest = min(self.losses.values())
        return min(alpha for alpha, loss in self.losses.items() if loss <= lowest + tolerance)


def _log_probabilities(model: nn.Module, example: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """fp32 log-probabilities (M, V) at the positions that predict a response token, and these tokens, (M, 1)."""
    device = model.get_input_embeddings().weight.device
    ids, labels = (torch.tensor(example[name], device=device) for name in ("input_ids", "labels"))
    valid = labels[1:] != IGNORE_INDEX
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1][valid]
    return logits.float().log_softmax(dim=-1), labels[1:][valid][:, None]


def _groups(examples: Sequence[Mapping[str, Any]], vocabulary: int) -> Iterator[list[Mapping[str, Any]]]:
    """The examples in order, in groups of at most MOST_NUMBERS log-probabilities, and at least one example."""
    group, size = [], 0
    for example in examples:
        numbers = len(example["labels"]) * vocabulary
        if group and size + numbers > MOST_NUMBERS:
            yield group
            group, size = [], 0
        group.append(example)
        size += numbers
    yield group


@torch.no_grad()
def measured(scaled: Scaled, examples: Sequence[Mapping[str, Any]]) -> Curve:
    """The trained model on held-out examples, one at a time, at every α of GRID."""
    model, sums, tokens = scaled.model.eval(), {alpha: [0.0, 0.0] for alpha in GRID}, 0
    for group in _groups(examples, model.config.get_text_config().vocab_size):
        scaled.set(0.0)
        base = [_log_probabilities(model, example) for example in group]
        tokens += sum(len(targets) for _, targets in base)
        for alpha in GRID:
            scaled.set(alpha)
            for example, (before, targets) in zip(group, base, strict=True):
                after, _ = _log_probabilities(model, example)
                sums[alpha][0] -= after.gather(-1, targets).double().sum().item()
                sums[alpha][1] += (before.exp() * (before - after)).double().sum().item()
    losses, kls = ({alpha: pair[which] / tokens for alpha, pair in sums.items()} for which in (0, 1))
    return Curve(len(examples), losses, kls)


def choose(scaled: Scaled, examples: Sequence[Mapping[str, Any]], tolerance: float) -> dict[str, Any]:
    """The scale that --scale auto takes, with the measurements behind the choice; prints both."""
    if torch.cuda.is_available():
        scaled.model.to("cuda")
    curve = measured(scaled, examples)
    scale = curve.smallest_within(tolerance)
    lines = ["scale   held-out loss   KL(base || tuned)"]
    lines += [f"{alpha:5.1f}{curve.losses[alpha]:16.4f}{curve.kl_base_tuned[alpha]:20.4f}" for alpha in GRID]
    why = f"the smallest scale whose loss is within {tolerance:g} nats of the lowest"
    print("\n".join([*lines, f"chosen: {scale:g}, {why} on {curve.examples} held-out examples"]), flush=True)
    found = {"held_out_examples": curve.examples, "losses": curve.losses, "kl_base_tuned": curve.kl_base_tuned}
    return {"scale": scale, "why": why, "tolerance": tolerance, **found}


def held_out_examples(
    args: Any, run: Any, tokenizer: "PreTrainedTokenizerBase", checkpoint: Path
) -> "datasets.Dataset":
    """The examples for --scale auto: those of --validation-data, else those that the run held out.

    Raises:
        UserError: there are none, or the run's --data changed, so that other examples would be held out.
    """
    if args.validation_data is not None:
        run = dataclasses.replace(run, validation_data=args.validation_data, eval_share=None)
    if run.validation_data is None and run.eval_share is None:
        raise UserError("--scale auto chooses on held-out examples; the run has none: name some by --validation-data")
    source = validation.arguments_of_validation_data(run) or run
    examples, _ = encoded(source, tokenizer, load_training_records(source))
    if run.eval_share is None:
        return examples
    trained, held_out = validation.hold_out(run, examples, None)
    parts = {"data": trained, "evaluation data": held_out}
    contents = {name: checkpoints.contents_of(part) for name, part in parts.items()}
    checkpoints.require_same_contents(checkpoint, contents, args.accept_changes)
    return held_out
