#!/usr/bin/env python3
"""The last hidden layer under fine-tuning: t-SNE over training, and spectra of logits and features.

    python experiments/nlu_pictures.py      trains each method once, at the learning rate that nlu_robustness.py chose

The setting is that of experiments/nlu_robustness.py without noise, seed 0: MiniLM, 600 movie-review sentences, 3
epochs. The points are its 600 test sentences, as the classifier is given them. t-SNE is computed for each panel by
itself: places and distances cannot be compared between panels, only how far the two classes are apart within one.

    nlu_tsne        LoRA above, BA-LoRA below; before training and after 1, 2 and 3 epochs
    nlu_spectrum    left: the smaller of the logits' two singular values, as a share of both. L_SVDR with k = 1 asks for
                    little of it; L_DR may pull away from z₁ = −z₂, the rank-one form that cross-entropy comes to.
                    Right: the features' singular values, centred, relative to the first
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import finetune_bert_l_sst2 as nlu
from common.classifiers import Outputs, run_model
from common.cli import UserError, option, parse_arguments, run_script
from common.intervals import pyplot, save_picture
from experiments import nlu_robustness as robustness

TSNE_TITLE = "One seed: BA-LoRA separates the two classes later than LoRA"
SPECTRUM_TITLE = "One seed: BA-LoRA concentrates the logits less than the other methods"


@dataclass
class Arguments:
    """The pictures, and the results that they are drawn from."""

    results: str = option(robustness.Arguments.results, "results of experiments/nlu_robustness.py")
    head: str = option("initial", "the head that training starts from: initial or probe")
    pictures: str = option("docs/results", "folder for the pictures")


def snapshots(method: str, head: str, learning_rate: float) -> list[Outputs]:
    """The model's outputs on the test sentences: before training, and after each epoch."""
    rows, labels = robustness.training_set(robustness.CONDITIONS[0], 0)
    taken = []
    with tempfile.TemporaryDirectory() as folder:
        model, examples, args = robustness.start(
            robustness.Cell("study", 0, robustness.CONDITIONS[0], method, head, learning_rate), rows, labels, folder
        )

        def take() -> float:
            taken.append(run_model(model, robustness.POOLS["movies"].examples, robustness.PARTS["collator"]))
            return float(len(taken))  # rises: the last state is the best

        nlu.fit(model, examples, robustness.PARTS["collator"], args, take, quiet=True)
    return taken


def draw_tsne(runs: dict[str, list[Outputs]], labels: np.ndarray, folder: Path) -> Path:
    """A row per method, a column per snapshot."""
    from sklearn.manifold import TSNE
    from sklearn.metrics import silhouette_score

    count = len(next(iter(runs.values())))
    figure, axes = pyplot().subplots(len(runs), count, figsize=(3 * count, 3.2 * len(runs)), layout="constrained")
    for (method, outputs), row in zip(runs.items(), axes, strict=True):
        for epoch, (output, axis) in enumerate(zip(outputs, row, strict=True)):
            points = TSNE(random_state=0, init="pca", perplexity=30).fit_transform(output.features)
            for value, colour, marker in ((0, "#0072B2", "o"), (1, "#E69F00", "^")):
                chosen = points[labels == value]
                axis.scatter(*chosen.T, s=9, c=colour, marker=marker, linewidths=0, alpha=0.8)
            separation = silhouette_score(output.features, labels)
            accuracy = 100 * np.mean(output.logits.argmax(axis=1) == labels)
            axis.set_title(
                f"{method}, epoch {epoch}\naccuracy {accuracy:.0f} %, silhouette {separation:.2f}", fontsize=9
            )
            axis.set_xticks([])
            axis.set_yticks([])
    figure.legend(["negative", "positive"], loc="outside lower center", ncols=2, frameon=False, markerscale=2)
    return save_picture(figure, folder / "nlu_tsne.png", TSNE_TITLE)


def draw_spectrum(runs: dict[str, list[Outputs]], folder: Path) -> Path:
    """Singular values of the logits and of the centred features at the end of training."""
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for place, (method, outputs) in enumerate(runs.items()):
        colour, marker = robustness.STYLE[method]
        sigma = np.linalg.svd(outputs[-1].logits, compute_uv=False)
        left.bar(place, 100 * sigma[1] / sigma.sum(), color=colour, width=0.6)
        left.annotate(
            f"{100 * sigma[1] / sigma.sum():.1f}", (place, 100 * sigma[1] / sigma.sum()), ha="center", va="bottom"
        )
        features = outputs[-1].features - outputs[-1].features.mean(axis=0)
        values = np.linalg.svd(features, compute_uv=False)[:30]
        right.plot(range(1, 31), values / values[0], color=colour, marker=marker, markersize=4, label=method)
    first = next(iter(runs.values()))[0].features
    values = np.linalg.svd(first - first.mean(axis=0), compute_uv=False)[:30]
    right.plot(range(1, 31), values / values[0], color="black", linestyle=":", label="before training")
    left.set_xticks(range(len(runs)), list(runs))
    left.set_ylabel("σ₂ / (σ₁ + σ₂) of the logits, %")
    right.set_yscale("log")
    right.set_xlabel("i")
    right.set_ylabel("σᵢ / σ₁ of the features")
    right.legend(frameon=False, fontsize=8)
    return save_picture(figure, folder / "nlu_spectrum.png", SPECTRUM_TITLE)


def main(argv: list[str]) -> None:
    args = parse_arguments(Arguments, __doc__, argv)
    if args.head not in robustness.HEADS:
        raise UserError(f"--head is {args.head!r}: initial or probe")
    rows = robustness.read_results(Path(args.results))
    if not set(robustness.tuning_cells()) <= set(rows):
        raise UserError(f"{args.results} lacks tuning runs: run experiments/nlu_robustness.py first")
    rates = robustness.select(rows)
    robustness.prepare(torch.get_num_threads())
    runs = {method: snapshots(method, args.head, rates[method, args.head]) for method in robustness.METHODS}
    labels = robustness.POOLS["movies"].labels
    compared = {method: runs[method] for method in ("lora", "ba-lora")}
    folder = Path(args.pictures)
    print(draw_tsne(compared, labels, folder), draw_spectrum(runs, folder), sep="\n")


if __name__ == "__main__":
    run_script(main)
