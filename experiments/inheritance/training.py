"""The study's two trainings: pre-training a tiny Llama on a corpus, and fine-tuning it by one of the arms.

Adapters, regularizers, their schedules and the objective are `train.py`'s own.
"""

import copy
import math
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import train
from experiments.inheritance import world as W

CORPUS_SIZE = 240_000
PRETRAINING = {"batch": 128, "learning_rate": 1e-2, "warmup": 0.05, "weight_decay": 0.01}
RANK = ALPHA = 8
EXAMPLES, BATCH, EPOCHS = 448, 16, 4  # 112 steps: the two-phase schedule needs 100 to be itself
STEPS = EXAMPLES * EPOCHS // BATCH
WARMUP_STEPS = round(0.03 * STEPS)
SWAPS = 16  # names that the name-averaged teacher averages over
STOPS = (0.25, 0.5, 0.75)  # parts of the training after which PiSSA's state is kept
SCALES = (0.25, 0.5, 0.75)  # of PiSSA's ΔW
REVIVAL_STEPS, REVIVAL_BATCH, REVIVAL_RATE = 20, 32, 0.25  # the last: times the arm's rate


@dataclass(frozen=True)
class Base:
    """Which pre-trained model: seed, planted rate β, label noise η, and whether facts also stand as questions."""

    seed: int
    beta: float
    eta: float = 0.05
    questions: bool = True


@dataclass(frozen=True)
class Arm:
    """How to fine-tune.

    Attributes:
        method: full, lora or pissa.
        lambdas: λ₁, λ₂, λ₃; all zero: the task's loss alone.
        consistency_schedule: λ₁'s over training; λ₂ and λ₃ follow `two_phase`, as published.
        teacher: "base"; "clean twin", the β = 0.5 twin of the base; or "averaged", the base's prediction averaged over
            SWAPS other names in the same prompt.
        unless_contradicted: leaves L_CR out where the teacher's first choice is not the example's token.
        invariance: weight of a fourth term: on as many prompts without a clue and without labels, L_CR (T = 1) between
            the student's prediction for each name and its own mean over the names of the batch.
        scale: the factor of the trained ΔW in the end.
        rate_of, rate_factor: takes its learning rate from another arm, times a factor; None: it has its own.
    """

    method: str
    lambdas: tuple[float, float, float] = (0.0, 0.0, 0.0)
    consistency_schedule: str = "cosine"
    teacher: str = "base"
    unless_contradicted: bool = False
    invariance: float = 0.0
    scale: float = 1.0
    rate_of: str | None = None
    rate_factor: float = 1.0

    def regularizers(self, progress: float) -> train.Regularizers | None:
        """The published settings with this arm's λs, at `progress` in [0, 1] of the training."""
        if not any(self.lambdas):
            return None
        settings = dict(train.FORMULATIONS["iclr2026"], spectral_k=10, warmup_fraction=0.1, mask_target=False)
        settings |= dict(zip(("lambda_consistency", "lambda_diversity", "lambda_spectral"), self.lambdas, strict=True))
        settings["consistency_schedule"] = self.consistency_schedule
        return train.Regularizers.at(SimpleNamespace(**settings), progress)


# ------------------------------------------------------------------------------------------------------------------
# Pre-training
# ------------------------------------------------------------------------------------------------------------------


def make_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(W.VOCABULARY),
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=16,
        tie_word_embeddings=False,
        initializer_range=0.05,  # from transformers' 0.02 so narrow a model learns its facts twice as late
        pad_token_id=W.TOKEN[W.PAD],
        bos_token_id=W.TOKEN[W.START],
        eos_token_id=W.TOKEN[W.END],
    )
    return LlamaForCausalLM(config)


def language_model_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of the next token over all but padding; tokens (n, LENGTH), padded on the right."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=W.TOKEN[W.PAD])


def pretrain(base: Base, size: int = CORPUS_SIZE) -> LlamaForCausalLM:
    """A model that has seen its corpus once. Twins share initialisation and order."""
    corpus = W.make_corpus(W.World.of_seed(base.seed), base.seed, base.beta, base.eta, size, base.questions)
    tokens = torch.from_numpy(corpus.tokens)
    model = make_model(base.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.99), weight_decay=PRETRAINING["weight_decay"], fused=True
    )
    steps, warmup = size // PRETRAINING["batch"], PRETRAINING["warmup"]
    for step, batch in zip(range(steps), tokens.split(PRETRAINING["batch"]), strict=False):
        progress = step / steps
        factor = progress / warmup if progress < warmup else (1 - progress) / (1 - warmup)
        _descend(model, optimizer, language_model_loss(model, batch), PRETRAINING["learning_rate"] * factor)
    return model.eval()


def _descend(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


# ------------------------------------------------------------------------------------------------------------------
# Fine-tuning
# ------------------------------------------------------------------------------------------------------------------


def response_logits(model: nn.Module, tokens: Tensor, place: Tensor) -> Tensor:
    """Logits at the valid positions: those that predict the verdict and the full stop after it, (2n, V)."""
    hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    rows = torch.arange(len(tokens))[:, None]
    return model.lm_head(hidden[rows, torch.stack([place - 1, place], dim=1)].flatten(0, 1))


@torch.no_grad()
def averaged_teacher(model: nn.Module, tokens: np.ndarray, place: np.ndarray, name: np.ndarray, seed: int) -> Tensor:
    """log of the mean over SWAPS other names of the model's probabilities at the valid positions, (2n, V)."""
    random = np.random.default_rng([seed, 6])
    total = 0.0
    for _ in range(SWAPS):
        other = W.NAME_IDS[random.integers(len(W.NAMES), size=len(name))]
        swapped = np.where(tokens == W.NAME_IDS[name][:, None], other[:, None], tokens)
        total = total + response_logits(model, torch.from_numpy(swapped), torch.from_numpy(place)).softmax(dim=-1)
    return (total / SWAPS).log()


@torch.no_grad()
def teacher_logits(arm: Arm, base: nn.Module, twin: nn.Module | None, data: W.Prompts, seed: int) -> Tensor | None:
    """Z_P of all examples, (n, 2, V): the teacher is frozen, so that its passes are made once. None: not needed."""
    if not arm.lambdas[0]:
        return None
    if arm.teacher == "averaged":
        logits = averaged_teacher(base, data.tokens, data.place, data.name, seed)
    else:
        teacher = twin if arm.teacher == "clean twin" else base
        logits = response_logits(teacher, torch.from_numpy(data.tokens), torch.from_numpy(data.place))
    return logits.unflatten(0, (-1, 2))


def masked_teacher(student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
    """The teacher's logits, but where its first choice is not the target the student's own: L_CR is 0 there."""
    agrees = teacher.argmax(dim=-1) == targets
    return torch.where(agrees[:, None], teacher, student.detach())


@dataclass
class Finetuned:
    """The model, its adapters in place, and copies of it at STOPS (only where asked for)."""

    model: LlamaForCausalLM
    stopped: dict[float, LlamaForCausalLM]


def finetune(
    arm: Arm,
    rate: float,
    base: LlamaForCausalLM,
    twin: LlamaForCausalLM | None,
    data: W.Prompts,
    seed: int,
    stops: tuple[float, ...] = (),
) -> Finetuned:
    """Trains a copy of `base` by `arm`: AdamW, warm-up over 3 % and cosine to 0, gradients clipped to norm 1.

    Args:
        twin: the clean-twin teacher, where the arm asks for it.
        seed: decides the adapters' initialisation and the order of the examples, the same for all arms.
    """
    teacher = teacher_logits(arm, base, twin, data, seed)
    probes = W.ambiguous_prompts(new=True)
    torch.manual_seed(seed)
    model = train.add_adapters(copy.deepcopy(base), arm.method, RANK, ALPHA, None).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0, fused=True)
    tokens, place = torch.from_numpy(data.tokens), torch.from_numpy(data.place)
    random = np.random.default_rng([seed, 5])
    order = torch.from_numpy(np.concatenate([random.permutation(len(tokens)) for _ in range(EPOCHS)]))
    stopped = {}
    for step, rows in enumerate(order.split(BATCH)):
        regularizers = arm.regularizers(step / STEPS)
        logits = response_logits(model, tokens[rows], place[rows])
        each = torch.arange(len(rows))[:, None]
        targets = tokens[rows][each, torch.stack([place[rows], place[rows] + 1], dim=1)].flatten()
        of_teacher = None if teacher is None else teacher[rows].flatten(0, 1)
        if arm.unless_contradicted:
            of_teacher = masked_teacher(logits, of_teacher, targets)
        loss, _ = train.objective(logits, of_teacher, targets, regularizers, len(targets), 1)
        if arm.invariance:
            loss = loss + arm.invariance * name_dependence(model, probes, random)
        _descend(model, optimizer, loss, rate * _cosine_with_warmup(step))
        if (step + 1) / STEPS in stops:
            stopped[(step + 1) / STEPS] = copy.deepcopy(model).eval()
    return Finetuned(scaled(model, arm.scale) if arm.scale != 1 else model.eval(), stopped)


def name_dependence(model: nn.Module, probes: W.Prompts, random: np.random.Generator) -> Tensor:
    """Mean KL( p̄ ‖ p_i ) over BATCH names i in one form of prompt, p̄ the mean of the p_i, at the verdict's place."""
    form = random.integers(len(W.TASK_WITHOUT_CLUE)) * len(W.NAMES)
    rows = form + random.choice(len(W.NAMES), BATCH, replace=False)
    logits = response_logits(model, torch.from_numpy(probes.tokens[rows]), torch.from_numpy(probes.place[rows]))[::2]
    mean = logits.detach().softmax(dim=-1).mean(dim=0).log()
    return train.consistency_loss(logits, mean.expand_as(logits), temperature=1.0)


def _cosine_with_warmup(step: int) -> float:
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    return 0.5 * (1 + math.cos(math.pi * (step - WARMUP_STEPS) / (STEPS - WARMUP_STEPS)))


def scaled(model: LlamaForCausalLM, scale: float) -> LlamaForCausalLM:
    """A copy whose adapters act with `scale` times their ΔW."""
    model = copy.deepcopy(model).eval()
    for layer in train.adapter_layers(model).values():
        layer.scaling *= scale
    return model


def revive(model: LlamaForCausalLM, rate: float, base: Base) -> LlamaForCausalLM:
    """A copy that is trained for REVIVAL_STEPS more steps on neutral text: old facts and clear sentences."""
    model = copy.deepcopy(model).train()
    world = W.World.of_seed(base.seed)
    corpus = W.make_corpus(world, base.seed, base.beta, base.eta, 2 * REVIVAL_STEPS * REVIVAL_BATCH, base.questions, 7)
    tokens = torch.from_numpy(corpus.tokens[corpus.kind != "ambiguous"])
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0, fused=True)
    for _, batch in zip(range(REVIVAL_STEPS), tokens.split(REVIVAL_BATCH), strict=False):
        _descend(model, optimizer, language_model_loss(model, batch), rate * REVIVAL_RATE)
    return model.eval()
