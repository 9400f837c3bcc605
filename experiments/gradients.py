#!/usr/bin/env python3
"""Each term's share of the gradient along training: why a term acts, or does nothing at its weight.

    python experiments/gradients.py output/mine --examples 4       a run of train.py that kept its checkpoints

At every checkpoint of the run, on the first examples of its data as one micro-batch: the norm of the gradient of λ·term
with respect to the trained weights, divided by that of the task's loss. Each λ is the run's own, before its schedule.
If the run's λ is 0, the formulation's published λ is taken. A share of 0.01 moves the update by a hundredth at most.
"""

import json
from pathlib import Path
from typing import Any

import torch

import train
from common import checkpoints, pretrained
from common.cli import Parser, UserError, run_script
from common.conversations import encoded, load_training_records
from common.intervals import markdown
from experiments.curve import run_of


def norm_of(loss: torch.Tensor, parameters: list[torch.Tensor]) -> float:
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return sum(float(part.double().square().sum()) for part in found if part is not None) ** 0.5


def shares(model: Any, examples: list[dict[str, Any]], args: train.Arguments) -> dict[str, float]:
    """The task's gradient norm, and of each term that of λ·term over it, on `examples` as one micro-batch."""
    batch = train.PaddingCollator(0)(examples)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}

    def logits() -> torch.Tensor:
        return model(**inputs, use_cache=False).logits.flatten(0, 1)[batch["valid_positions"]].float()  # (M, V)

    with torch.no_grad(), train.adapters_disabled(model):
        teacher = logits()
    student, targets = logits(), batch["targets"]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    task = norm_of(torch.nn.functional.cross_entropy(student, targets), parameters)
    found = {"task": task}
    for name, term in train.TERMS.items():
        weight = getattr(args, f"lambda_{name}") or train.FORMULATIONS[args.formulation].get(f"lambda_{name}", 1.0)
        loss = weight * term.function(student, teacher, targets, args)
        found[name] = norm_of(loss, parameters) / task
    return found


def measured(folder: Path, count: int) -> dict[int, dict[str, float]]:
    """By step, the start among them where a checkpoint has it."""
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: no config.yaml there, so no run of train.py")
    args, folders = run_of(folder)
    if args.method == "full":
        raise UserError(f"{folder} trained without adapters: the terms' teacher is the model without them")
    path = pretrained.resolve_demo(args.model, "model")
    tokenizer, _ = pretrained.load_tokenizer_and_config(path, args.model_revision, args.trust_remote_code)
    examples, _ = encoded(args, tokenizer, load_training_records(args).select(range(count)))
    model, rows = None, {}
    for step, checkpoint in folders.items():
        tensors = checkpoints.load_tensors(checkpoint)
        if model is None:
            model = train.rebuilt_model(args, path, pretrained.resolve_dtype(args.dtype), tensors)
        with torch.no_grad():
            checkpoints.load_trained_tensors(model, tensors)
        rows[step] = shares(model, list(examples), args)
    return rows


def main(argv: list[str]) -> None:
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, help="folder of a run of train.py")
    parser.add_argument("--examples", type=int, default=4, help="the first N examples of its data")
    parser.add_argument("--json", type=Path, help="file that gets the numbers")
    args = parser.parse_args(argv)
    if args.examples < 1:
        raise UserError(f"--examples is {args.examples}: it must be above 0")
    rows = measured(args.run, args.examples)
    names = list(next(iter(rows.values())))
    lines = [["step", "norm of the task's gradient", *(f"{name}, share" for name in names[1:])]]
    lines += [[str(step), *(f"{row[name]:.4f}" for name in names)] for step, row in rows.items()]
    print(markdown(lines))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    run_script(main)
