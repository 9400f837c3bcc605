"""The linear probe, which measures how well a frozen encoder's features already separate the classes."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.classifiers import Collator, Outputs, final_linear, run_model, set_head
from common.labelled import Data
from common.metrics import score

if TYPE_CHECKING:
    import transformers

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
