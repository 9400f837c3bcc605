"""A pre-trained encoder with a classifier on top: loading, head, outputs; GPT-2's layers; the linear probe."""

import copy
import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from tqdm import tqdm

from common.cli import UserError
from common.labelled import Data
from common.layers import default_target_modules, find_target_modules, require_adapters
from common.metrics import score
from common.pretrained import (
    check_checkpoint,
    counts_from_padding,
    lacking_weights,
    load_tokenizer_and_config,
    require_positions,
    require_row,
    require_unquantized,
    require_weights,
)
from common.tensors import num_ranks

if TYPE_CHECKING:
    import transformers

INPUTS = ("input_ids", "attention_mask", "token_type_ids")

# The linear layers of BERT and RoBERTa, DeBERTa, GPT-2, XLNet that get an adapter: attention, its output, the
# feed-forward. XLNet's attention has no linear layers, only parameters.
ENCODER_TARGETS = ["query", "key", "value", "query_proj", "key_proj", "value_proj", "intermediate.dense"]
ENCODER_TARGETS += ["output.dense", "c_attn", "c_fc", "c_proj", "ff.layer_1", "ff.layer_2"]


def load_tokenizer(args: Any, path: str, num_classes: int) -> "tuple[Any, transformers.PretrainedConfig]":
    """The tokenizer, and the configuration of the model with a head of `num_classes`; reads no weights. Fills in the
    target modules of `args`.

    Raises:
        UserError: not a readable checkpoint, or its head, targets or positions do not fit `args`.
    """
    check_checkpoint(path)
    tokenizer, config = load_tokenizer_and_config(path, args.model_revision, needs_all=False)
    if tokenizer is None:
        raise UserError(f"{args.model} has no tokenizer that can be read: copy it beside the weights")
    require_unquantized(args.model, config)
    settle_tokenizer(tokenizer, config, args.model)
    own_padding = getattr(config, "pad_token_id", None)
    config.num_labels, config.pad_token_id = num_classes, tokenizer.pad_token_id
    config.problem_type = "regression" if num_classes == 1 else "single_label_classification"
    try:
        with torch.device("meta"):  # shapes only: a rank or target that does not fit is found before any weight is read
            skeleton = transformers.AutoModelForSequenceClassification.from_config(config)
    except ValueError as error:
        raise UserError(f"{args.model} ({config.model_type}) has no classifier in transformers") from error
    require_positions(args.model, skeleton, args.max_length)
    if own_padding not in (None, tokenizer.pad_token_id) and counts_from_padding(skeleton):
        pads = f"token {tokenizer.pad_token_id}, its configuration with {own_padding}"
        raise UserError(f"the tokenizer of {args.model} pads with {pads}, where positions are counted: make them alike")
    if args.method != "full":
        linear_for_conv1d(skeleton)
        if args.target_modules is None:
            args.target_modules = default_targets(skeleton)
        found = find_target_modules(skeleton, args.target_modules, args.rank)
        require_adapters(skeleton, found)
        for name in found:
            if name.startswith(tuple(f"{head}." for head in head_modules(skeleton))):
                raise UserError(f"--target-modules names {name} too, which is trained whole: give longer names")
    return tokenizer, config


def default_targets(model: nn.Module) -> list[str]:
    """The entries of ENCODER_TARGETS that `model` has, or else those of a language model."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    found = [target for target in ENCODER_TARGETS if any(name.endswith(f".{target}") for name in names)]
    return found or default_target_modules(model)


def load_classifier(path: str, config: "transformers.PretrainedConfig", seed: int, revision: str | None = None) -> Any:
    """The pre-trained model with a classifier for the classes of `config`. A trained classifier's rows are taken by the
    classes' names; if they do not match, or there is no classifier, the final layer is random, by the seed.

    Attributes of the model that tell what was found:
        new_modules: modules of the encoder that the checkpoint lacks; see `head_modules`.
        has_trained_head: whether the final layer is the checkpoint's.
        replaces_head: whether the checkpoint has a final layer of another size.
        head_note: a line for the user on a trained classifier of other or otherwise ordered classes; or None.

    Raises:
        UserError: the files cannot be read, or lack weights of the encoder.
    """
    transformers.set_seed(seed)
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # transformers would warn that the head is missing, as it should be
    loaded = copy.deepcopy(config)
    try:
        own = transformers.AutoConfig.from_pretrained(path, revision=revision)
        rows = rows_by_name(own, config)
        if rows is not None:
            loaded.num_labels = own.num_labels
        model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
            path,
            config=loaded,
            revision=revision,
            dtype=torch.float32,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # a classifier of other classes makes room for a new one
            output_loading_info=True,
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"cannot load the model {path!r}: {str(error).splitlines()[0]}") from error
    finally:
        transformers.logging.set_verbosity(level)
    head = tuple(f"{name}." for name in head_modules(model))
    lacking = [name for name in lacking_weights(info) if not name.startswith(head)]
    # A pooler may be new. The embeddings and the numbered layers are the pre-trained model itself.
    require_weights(path, [name for name in lacking if _is_of_encoder(model, name)], info)
    model.new_modules = sorted({name.rpartition(".")[0] for name in lacking})
    layer = final_linear(model)
    weight = next(f"{name}.weight" for name, module in model.named_modules() if module is layer)
    was_trained = weight not in info["missing_keys"]
    model.has_trained_head, model.head_note = was_trained and rows is not None, None
    model.replaces_head = was_trained and own.num_labels != config.num_labels
    theirs, ours = (", ".join(map(str, this.id2label.values())) for this in (own, config))
    if rows is not None:
        if rows != list(range(own.num_labels)):
            _take_rows(layer, rows)
            model.head_note = f"note: the classifier of {path} has {theirs}: its rows are taken by name, {ours}"
        elif was_trained and config.num_labels == 1:
            model.head_note = f"note: the numbers of {path}'s final layer are taken to be in the units of the labels"
    elif was_trained:
        if weight not in lacking_weights(info):  # of the same size, and loaded
            layer.weight.data.normal_(0, getattr(config, "initializer_range", 0.02))
            if layer.bias is not None:
                layer.bias.data.zero_()
        model.head_note = f"note: the classifier of {path} has {theirs}, not {ours}: its final layer is started anew"
    model.num_labels = config.num_labels
    model.config.id2label, model.config.label2id = config.id2label, config.label2id
    return model


def _is_of_encoder(model: nn.Module, name: str) -> bool:
    """Whether the weight `name` is an embedding's or stands in a numbered layer."""
    module = model.get_submodule(name.rpartition(".")[0])
    return bool(re.search(r"embed|\.\d+\.", name)) or isinstance(module, nn.Embedding)


def rows_by_name(own: "transformers.PretrainedConfig", config: "transformers.PretrainedConfig") -> list[int] | None:
    """For each class of `config`, its number in a checkpoint's configuration `own`, without regard to case; None if a
    class has no counterpart. LABEL_3, which transformers writes when no name is known, is class 3."""
    if config.num_labels == 1 or own.num_labels == 1:
        return [0] if own.num_labels == config.num_labels else None
    theirs, ours = (
        [str(this.id2label[row]).strip().casefold().removeprefix("label_") for row in range(this.num_labels)]
        for this in (own, config)
    )
    # Numbers name other classes in another task: a match with some of more numbers means nothing.
    is_part_of_numbers = len(theirs) != len(ours) and all(name.isdecimal() for name in ours)
    if is_part_of_numbers or len(set(theirs)) < len(theirs) or not set(ours) <= set(theirs):
        return None
    return [theirs.index(name) for name in ours]


def _take_rows(layer: nn.Linear, rows: list[int]) -> None:
    layer.weight = nn.Parameter(layer.weight.detach()[rows].clone())
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.detach()[rows].clone())
    layer.out_features = len(rows)


@torch.no_grad()
def rescale_outputs(model: "transformers.PreTrainedModel", shift: float, unit: float) -> None:
    """Makes the final layer give unit·y + shift where it gave y, in place; without bias, `shift` must be 0."""
    layer = final_linear(model)
    layer.weight.mul_(unit)
    if layer.bias is not None:
        layer.bias.mul_(unit).add_(shift)


def head_modules(model: "transformers.PreTrainedModel") -> list[str]:
    """The names of the modules on top of the encoder: `classifier`; DeBERTa: `pooler` too; GPT-2: `score`. Before them
    the encoder's modules that the checkpoint lacked: the pooler of a BERT that was trained as a language model."""
    return getattr(model, "new_modules", []) + [
        name
        for name, module in model.named_children()
        if name != model.base_model_prefix and any(True for _ in module.parameters())
    ]


def final_linear(model: "transformers.PreTrainedModel") -> nn.Linear:
    """The layer whose outputs are the logits."""
    modules = [module for name in head_modules(model) for module in model.get_submodule(name).modules()]
    return [module for module in modules if isinstance(module, nn.Linear)][-1]


@torch.no_grad()
def set_head(model: "transformers.PreTrainedModel", probe: tuple[Tensor, Tensor]) -> None:
    """Makes the probe the model's final linear layer."""
    layer, (weight, bias) = final_linear(model), probe
    layer.weight.copy_(weight)
    if layer.bias is not None:
        layer.bias.copy_(bias)


def count_parameters(model: "transformers.PreTrainedModel") -> tuple[int, int]:
    """How many parameters are trained outside of the head, and how many the head has."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    modules = map(model.get_submodule, head_modules(model))
    head = sum(parameter.numel() for module in modules for parameter in module.parameters())
    return trained - head, head


def linear_for_conv1d(model: nn.Module) -> list[str]:
    """Replaces each of GPT-2's Conv1D (weight in × out) by an equal nn.Linear, in place; returns their names."""
    from transformers.pytorch_utils import Conv1D

    names = [name for name, module in model.named_modules() if isinstance(module, Conv1D)]
    _replace(model, names, lambda layer: _with(nn.Linear(*layer.weight.shape, device="meta"), layer))
    return names


def conv1d_for_linear(model: nn.Module, names: list[str]) -> None:
    """Undoes `linear_for_conv1d` for the layers `names`, in place."""
    from transformers.pytorch_utils import Conv1D

    _replace(model, names, lambda layer: _with(Conv1D(*layer.weight.shape), layer))


def _replace(model: nn.Module, names: list[str], make: Callable[[nn.Module], nn.Module]) -> None:
    for name in names:
        parent, _, child = name.rpartition(".")
        module = model.get_submodule(parent)
        setattr(module, child, make(getattr(module, child)))


def _with(layer: nn.Module, source: nn.Module) -> nn.Module:
    """`layer` with the transposed weight of `source`, and its bias."""
    layer.weight = nn.Parameter(source.weight.detach().T.contiguous())
    layer.bias = nn.Parameter(source.bias.detach())
    return layer


def classifies_by_last_position(config: "transformers.PretrainedConfig") -> bool:
    """Whether the classifier reads the last position, padded or not: XLNet."""
    return getattr(config, "summary_type", None) == "last"


def has_segments(config: "transformers.PretrainedConfig") -> bool:
    """Whether the model tells the two texts of a pair apart by token_type_ids; XLNet and Funnel have no table."""
    return (getattr(config, "type_vocab_size", None) or 0) >= 2 or config.model_type in ("xlnet", "funnel")


def settle_tokenizer(tokenizer: Any, config: "transformers.PretrainedConfig", name: str) -> None:
    """Gives `tokenizer` the padding that the classifier needs, a token that ends no text on the classifier's side, and
    the names of the inputs that the model takes, which the tokenizers of transformers 5 do not know.

    Raises:
        UserError: no token can pad.
    """
    if tokenizer.pad_token_id is None:
        # A classifier like GPT-2's reads the last token that is not padding.
        known = (getattr(tokenizer, f"{kind}_token") for kind in ("eos", "bos", "sep", "cls", "mask"))
        tokenizer.pad_token = next((token for token in known if token is not None), None)
    if tokenizer.pad_token_id is None:
        raise UserError(f"the tokenizer of {name} has no special token that can pad: declare its pad_token")
    if tokenizer.pad_token_id >= num_embeddings(config):
        pad = f"{tokenizer.pad_token!r}, token {tokenizer.pad_token_id}"
        raise UserError(f"{name} has no embedding for its padding {pad}: declare another pad_token of its tokenizer")
    tokenizer.padding_side = "left" if classifies_by_last_position(config) else "right"
    tokenizer.model_input_names = [name for name in INPUTS if name != "token_type_ids" or has_segments(config)]
    # transformers saves the settings that stand here, with the attributes' values
    tokenizer.init_kwargs |= {name: getattr(tokenizer, name) for name in ("padding_side", "model_input_names")}


WHOLE = 10**6  # tokens: a length that cuts no text


def num_embeddings(config: "transformers.PretrainedConfig") -> float:
    """How many tokens the model knows; infinite for a model that has no vocabulary."""
    return getattr(config.get_text_config(), "vocab_size", math.inf)


def encode(
    tokenizer: "transformers.PreTrainedTokenizerBase",
    config: "transformers.PretrainedConfig",
    texts: list[tuple[str, ...]],
    max_length: int,
) -> list[dict[str, list[int]]]:
    """The inputs of each example that a tokenizer of `settle_tokenizer` names, without padding.

    Raises:
        UserError: a token has no embedding.
    """
    how = {"truncation": True, "max_length": max_length}
    if config.is_encoder_decoder:  # classifies by the end token; one in the text is text
        how["split_special_tokens"] = True
    encoded = tokenizer(*map(list, zip(*texts, strict=True)), **how)
    require_row(max(itertools.chain.from_iterable(encoded["input_ids"]), default=0), num_embeddings(config))
    return [dict(zip(encoded, row, strict=True)) for row in zip(*encoded.values(), strict=True)]


def separates_pairs(tokenizer: "transformers.PreTrainedTokenizerBase") -> bool:
    """Whether a token stands between the two texts of a pair."""
    first, second = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in "ab")
    pair, joined = tokenizer("a", "b")["input_ids"], first + second
    return not any(pair[place:][: len(joined)] == joined for place in range(len(pair)))


def encode_data(
    data: Data,
    tokenizer: "transformers.PreTrainedTokenizerBase",
    config: "transformers.PretrainedConfig",
    max_length: int,
) -> None:
    """`encode` for every split, which gets its `examples`. Notes on texts that are cut, and on pairs that nothing
    separates."""
    if len(data.train.texts[0]) == 2 and not separates_pairs(tokenizer):
        data.notes.append(
            "note: this tokenizer puts nothing between the two texts of a pair, so the model cannot see where one ends"
        )
    for name, split in (("training", data.train), ("validation", data.validation), *data.tests.items()):
        split.examples = encode(tokenizer, config, split.texts, max_length)
        full = [row for row, example in enumerate(split.examples) if len(example["input_ids"]) == max_length]
        whole = encode(tokenizer, config, [split.texts[row] for row in full], WHOLE) if full else []
        if cut := sum(len(example["input_ids"]) > max_length for example in whole):
            data.notes.append(f"note: {cut} of the {len(split)} examples of {name} are cut after {max_length} tokens")


def training_examples(
    examples: list[dict[str, list[int]]], labels: list[int | float], teacher_logits: np.ndarray | None
) -> list[dict[str, Any]]:
    """The examples for `fit`: inputs, label, and for BA-LoRA the teacher's logits, (N, D)."""
    if teacher_logits is None:
        return [example | {"labels": label} for example, label in zip(examples, labels, strict=True)]
    return [
        example | {"labels": label, "teacher_logits": teacher}
        for example, label, teacher in zip(examples, labels, teacher_logits, strict=True)
    ]


@dataclass
class Collator:
    """Pads a batch to its longest example, on the right, or on the left where the last position classifies."""

    pad_token_id: int
    on_left: bool = False

    @classmethod
    def of(cls, tokenizer: Any, config: "transformers.PretrainedConfig") -> "Collator":
        return cls(tokenizer.pad_token_id, classifies_by_last_position(config))

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        length = max(len(example["input_ids"]) for example in examples)
        batch = {}
        for name in examples[0]:
            values = [example[name] for example in examples]
            if name in INPUTS:
                fill = self.pad_token_id if name == "input_ids" else 0
                padded = [(row, [fill] * (length - len(row))) for row in values]
                values = [padding + row if self.on_left else row + padding for row, padding in padded]
            batch[name] = torch.tensor(np.array(values))
        return batch


@dataclass
class Outputs:
    """A model's outputs on N examples.

    Attributes:
        logits: (N, D).
        features: the inputs of the final linear layer, (N, d).
        mean_states: the encoder's last hidden states, averaged over each example's tokens, (N, h).
    """

    logits: np.ndarray
    features: np.ndarray
    mean_states: np.ndarray


@torch.no_grad()
def run_model(
    model: "transformers.PreTrainedModel",
    examples: list[dict[str, Any]],
    collator: Callable[[list[dict[str, Any]]], dict[str, Tensor]],
    batch_size: int = 64,
    title: str | None = None,
) -> Outputs:
    """Runs `model` on `examples` without dropout, in batches of similar length. The ranks share the batches, and every
    rank gets all outputs.

    Args:
        examples: each with those of INPUTS that the model takes.
        collator: makes a batch of examples.
        title: of the progress bar; None: no bar.
    """
    captured = {}
    handles = [
        final_linear(model).register_forward_pre_hook(lambda _, inputs: captured.update(features=inputs[0])),
        model.base_model.register_forward_hook(lambda *call: captured.update(states=call[2].last_hidden_state)),
    ]
    training, device = model.training, next(model.parameters()).device
    model.eval()
    order = sorted(range(len(examples)), key=lambda row: len(examples[row]["input_ids"]))
    parts: list[tuple[Tensor, ...]] = []
    count, rank = num_ranks(), dist.get_rank() if num_ranks() > 1 else 0
    own = range(rank * batch_size, len(order), count * batch_size)
    try:
        with tqdm(total=len(own), desc=title, unit="batch", disable=title is None or rank > 0) as bar:
            for first in own:
                chosen = [examples[row] for row in order[first : first + batch_size]]
                batch = collator([{name: row[name] for name in INPUTS if name in row} for row in chosen])
                batch = {name: tensor.to(device) for name, tensor in batch.items()}
                logits = model(**batch).logits
                mask, features = batch["attention_mask"], captured["features"]
                if features.dim() == 3:  # GPT-2 scores every token and takes the last that does not pad
                    real = batch["input_ids"] != model.config.pad_token_id
                    places = torch.arange(real.shape[1], device=device)
                    features = features[torch.arange(len(mask), device=device), (places * real).argmax(dim=1)]
                means = (captured["states"] * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
                parts.append(tuple(tensor.float().cpu() for tensor in (logits, features, means)))
                bar.update()
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    if count > 1:
        of_ranks: list[list[tuple[Tensor, ...]]] = [[] for _ in range(count)]
        dist.all_gather_object(of_ranks, parts)
        parts = [batch for one_round in itertools.zip_longest(*of_ranks) for batch in one_round if batch is not None]
    place = np.argsort(order)
    return Outputs(*(torch.cat(tensors).numpy()[place] for tensors in zip(*parts, strict=True)))


# ------------------------------------------------------------------------------------------------------------------
# The linear probe, which measures how well a frozen encoder's features already separate the classes
# ------------------------------------------------------------------------------------------------------------------


PROBE_EXAMPLES = 20_000  # more examples change a probe little
PROBE_PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)

Scores = dict[str, dict[str, Any]]  # by test set, then by method or probe


def fit_probe(
    features: np.ndarray,
    labels: list[int | float],
    validation_features: np.ndarray,
    validation_labels: list[int | float],
    *,
    regression: bool = False,
    bias: bool = True,
    penalties: tuple[float, ...] = PROBE_PENALTIES,
) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression (scikit-learn's) on standardized features; ridge regression for `regression`.

    Args:
        features: (N, d). bias: False if the head has no bias.
        penalties: inverse strengths C of the L2 penalty; the C with the best validation score is taken.

    Returns:
        weight (D, d) and bias (D,) on the features as they come.
    """
    from sklearn.linear_model import LogisticRegression, Ridge

    labels = np.asarray(labels)
    rows = np.random.default_rng(0).permutation(len(labels))
    if len(rows) > PROBE_EXAMPLES:
        if not regression:  # one example of each class comes first, or a rare class might be left out
            first = np.unique(labels[rows], return_index=True)[1]
            rows = np.concatenate([rows[first], np.delete(rows, first)])
        rows = rows[:PROBE_EXAMPLES]
    features, labels = features[rows].astype(np.float64), labels[rows]
    mean = features.mean(axis=0) if bias else np.zeros(features.shape[1])
    scale = features.std(axis=0)
    scale[scale < 1e-8] = 1.0

    def fitted(C: float) -> tuple[float, np.ndarray, np.ndarray]:
        if regression:
            probe = Ridge(alpha=1 / C, fit_intercept=bias)
        else:
            probe = LogisticRegression(C=C, max_iter=2000, fit_intercept=bias)
        probe.fit((features - mean) / scale, labels)
        weight, offset = np.atleast_2d(probe.coef_), np.atleast_1d(probe.intercept_)
        if not regression and len(weight) == 1:  # two classes: the difference of the logits, half to each
            weight, offset = np.concatenate([-weight, weight]) / 2, np.concatenate([-offset, offset]) / 2
        weight = weight / scale
        return probe.score((validation_features - mean) / scale, validation_labels), weight, offset - weight @ mean

    _, weight, offset = max((fitted(C) for C in penalties), key=lambda item: item[0])
    return torch.tensor(weight, dtype=torch.float32), torch.tensor(offset, dtype=torch.float32)


def apply_probe(probe: tuple[Tensor, Tensor], features: np.ndarray) -> np.ndarray:
    """Logits (N, D)."""
    weight, bias = probe
    return F.linear(torch.from_numpy(features), weight, bias).numpy()


def probe_encoder(
    model: "transformers.PreTrainedModel", data: Data, collator: Collator
) -> tuple[Outputs, tuple[Tensor, Tensor], Scores]:
    """Scores the frozen encoder by two linear probes, fitted on the training examples.

    Returns:
        the model's outputs on the training examples; the probe of the final layer's inputs, weight and bias; the
        scores of this `probe` on every test set, and those of `probe_mean_states`, which reads the mean hidden states.
    """
    outputs = run_model(model, data.train.examples, collator, title="pre-trained model")
    validation = run_model(model, data.validation.examples, collator)
    tests = {name: run_model(model, split.examples, collator) for name, split in data.tests.items()}
    has_bias = final_linear(model).bias is not None
    probes = {}
    for kind, bias in (("features", has_bias), ("mean_states", True)):
        fitted_on = (getattr(outputs, kind), data.train.labels, getattr(validation, kind), data.validation.labels)
        probes[kind] = fit_probe(*fitted_on, regression=data.is_regression, bias=bias)
    scores: Scores = {}
    for name, split in data.tests.items():
        logits = {kind: data.in_units(apply_probe(probe, getattr(tests[name], kind))) for kind, probe in probes.items()}
        of_kind = {kind: score(row, split.labels, data.metrics, data.class_names) for kind, row in logits.items()}
        scores[name] = {"probe": of_kind["features"], "probe_mean_states": of_kind["mean_states"]}
    return outputs, probes["features"], scores


def start_head(
    model: "transformers.PreTrainedModel", args: Any, probe: tuple[Tensor, Tensor], outputs: Outputs
) -> np.ndarray:
    """Gives `model` the head that --teacher-head names; returns the teacher's logits of the training examples."""
    if args.teacher_head == "initial":
        return outputs.logits
    set_head(model, probe)
    return apply_probe(probe, outputs.features)
