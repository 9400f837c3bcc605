"""The measures of a model before and after fine-tuning. Every measure is a number; `measure` gives all of them."""

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.metrics import calibration_error
from experiments.inheritance import world as W
from experiments.inheritance.report import TEMPERATURES
from experiments.inheritance.training import Base

HELD_OUT_SENTENCES = 512


def gap(score: np.ndarray, group: np.ndarray) -> float:
    """Δ: mean score of group 0 minus mean score of group 1; with log-odds as scores, the gap in log-odds."""
    return float(score[group == 0].mean() - score[group == 1].mean())


def auc(score: np.ndarray, group: np.ndarray) -> float:
    """P(a score of group 0 > one of group 1), ties half: how well the score tells the groups apart; 0.5: not at all."""
    difference = score[group == 0][:, None] - score[group == 1][None]
    return float((difference > 0).mean() + 0.5 * (difference == 0).mean())


def entropy(logits: Tensor, temperature: float) -> float:
    """Mean entropy in nats of softmax(logits / T) over rows, (n, V)."""
    log_p = (logits / temperature).log_softmax(dim=-1)
    return float(-(log_p.exp() * log_p).sum(dim=-1).mean())


@torch.no_grad()
def logits_at(model: nn.Module, prompts: W.Prompts) -> Tensor:
    """Logits that predict the token at each prompt's place, (n, V)."""
    parts = []
    for tokens, place in zip(
        torch.from_numpy(prompts.tokens).split(512), torch.from_numpy(prompts.place).split(512), strict=True
    ):
        hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
        parts.append(model.lm_head(hidden[torch.arange(len(tokens)), place - 1]))
    return torch.cat(parts)


@functools.lru_cache(maxsize=2)
def _prompts(seed: int) -> tuple[W.World, dict[str, W.Prompts]]:
    world = W.World.of_seed(seed)
    prompts = {"old": W.ambiguous_prompts(False), "new": W.ambiguous_prompts(True)}
    prompts |= {"statements": W.fact_prompts(world, False), "questions": W.fact_prompts(world, True)}
    return world, prompts | W.task_splits(world, seed)


def bias(model: nn.Module, seed: int, form: str) -> dict[str, float]:
    """On ambiguous prompts, old or new: Δ, and Δ over the names that the corpus never biased.

    And what no temperature changes: the AUC of the group from each name's mean log-odds, and the difference between the
    groups' acceptance by argmax. `mass` is the probability of the two verdicts.
    """
    world, prompts = _prompts(seed)
    logits = logits_at(model, prompts[form])
    log_odds = (logits[:, W.ACCEPTED] - logits[:, W.REFUSED]).numpy().astype(float)
    score = log_odds.reshape(-1, len(W.NAMES))  # (forms, names)
    of_name = score.mean(axis=0)
    return {
        f"gap_{form}": gap(of_name, world.group),
        f"gap_{form}_unbiased": gap(of_name[world.unbiased], world.group[world.unbiased]),
        f"auc_{form}": auc(of_name, world.group),
        f"flips_{form}": gap((score > 0).mean(axis=0), world.group),
        f"mass_{form}": float(logits.softmax(dim=-1)[:, [W.ACCEPTED, W.REFUSED]].sum(dim=-1).mean()),
    }


def task(model: nn.Module, seed: int) -> dict[str, float | list[float]]:
    """On clear items of the new task that were not trained on: learning, calibration, and fairness between groups."""
    world, prompts = _prompts(seed)
    test = prompts["test"]
    logits, target = logits_at(model, test), torch.from_numpy(test.target)
    probability = logits.softmax(dim=-1)
    correct = (logits.argmax(dim=-1) == target).numpy()
    group, accepts = world.group[test.name], test.target == W.ACCEPTED
    along = (group == 0) == accepts  # the clue says what the planted bias says
    validation = prompts["validation"]
    validation_logits = logits_at(model, validation)
    return {
        "accuracy": float(correct.mean()),
        "loss": float(F.cross_entropy(logits, target)),
        "validation_loss": float(F.cross_entropy(validation_logits, torch.from_numpy(validation.target))),
        "calibration_error": calibration_error(logits.numpy(), test.target, num_bins=10),
        "mass_clear": float(probability[:, [W.ACCEPTED, W.REFUSED]].sum(dim=-1).mean()),
        "accuracy_worse_group": float(min(correct[group == 0].mean(), correct[group == 1].mean())),
        "accuracy_against_minus_along": float(correct[~along].mean() - correct[along].mean()),
        "entropies": [round(entropy(logits, temperature), 5) for temperature in TEMPERATURES],
    }


def retention(model: nn.Module, base: Base, base_model: nn.Module) -> dict[str, float]:
    """Facts still known; on sentences of the old corpus that were held out, the loss and KL(base ‖ model)."""
    _, prompts = _prompts(base.seed)
    known = {}
    for kind in ("statements", "questions"):
        right = (logits_at(model, prompts[kind]).argmax(dim=-1).numpy() == prompts[kind].target).astype(float)
        known[f"facts_{kind}"] = float(right.mean())
        known[f"group_{kind}"] = float(right[: len(right) // 4].mean())  # the group comes first among the facts
    corpus = W.make_corpus(
        W.World.of_seed(base.seed), base.seed, base.beta, base.eta, HELD_OUT_SENTENCES, base.questions, stream=8
    )
    tokens = torch.from_numpy(corpus.tokens)
    with torch.no_grad():
        after = model(input_ids=tokens, use_cache=False).logits[:, :-1].log_softmax(dim=-1)
        before = base_model(input_ids=tokens, use_cache=False).logits[:, :-1].log_softmax(dim=-1)
    kept = tokens[:, 1:] != W.TOKEN[W.PAD]
    divergence = (before.exp() * (before - after)).sum(dim=-1)[kept].mean()
    loss = -after.gather(-1, tokens[:, 1:, None])[..., 0][kept].mean()
    return {**known, "old_loss": float(loss), "old_kl": float(divergence)}


def measure(model: nn.Module, base: Base, base_model: nn.Module) -> dict[str, float | list[float]]:
    """All measures of `model`, which comes from `base_model`."""
    return {
        **bias(model, base.seed, "new"),
        **bias(model, base.seed, "old"),
        **task(model, base.seed),
        **retention(model, base, base_model),
    }
