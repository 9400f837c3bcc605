#!/usr/bin/env python3
"""What bf16 costs a PiSSA adapter, by the form in which its product is computed. One command does the missing runs and
prints the table. Each run is a row of experiments/results/bf16_forms.jsonl. A run that has a row is not run again.

    python experiments/bf16_forms.py            all runs, in the order below
    python experiments/bf16_forms.py --table    the table alone

Plan, committed before the first row. SmolLM2-135M-Instruct on the demo's problems (configs/demo.yaml, r = 32): PiSSA at
1e-4 and LoRA at 1e-3, 100 steps of 4 sequences, three seeds; then PiSSA for 400 steps. (Until the first row was due the
plan had the configuration's 8 sequences: three seeds of those do not fit the budget.) Forms of ΔW x, all else alike:
    stacked       [B, −B₀] [A; A₀] x, as train.py has it, with the factors rounded to bf16
    differences   (B − B₀) A x + B₀ (A − A₀) x: the same rank and cost, the differences taken in fp32 and then rounded
    residual      (W − s B₀A₀) x + s B A x, the residual rounded to bf16: PEFT's PiSSA under autocast
    fp32          stacked, in fp32: the reference of the others
    zero2         stacked, under DeepSpeed's ZeRO-2 on one rank: the factors are bf16 too, their masters fp32. PiSSA,
                  100 steps. It entered this plan after the other rows of 100 steps, and has no prediction
Read at the end: the loss on the held-out fiftieth of the problems, in the type of training; and the median over
layers of ‖ΔW − ΔW₃₂‖ / ‖ΔW₃₂‖, where ΔW₃₂ is the fp32 run's of the same seed.

Budget: four hours of one core. Seed by seed; where it ends before the seeds do, whole seeds are left out.
Decision: `differences` replaces `stacked` where its held-out loss is lower in the mean at 100 and at 400 steps, and in
at least two of three seeds each; else `stacked` stays.
Predictions:
    1. fp32 has the lowest loss in every seed.
    2. differences and stacked are within 0.003 of each other in the mean, with no order that all seeds share.
    3. residual is within 0.003 of stacked.
    4. The distance of LoRA's ΔW in bf16 is below that of PiSSA's.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import train
from common.cli import Parser, run_script
from common.intervals import by_seed, difference, markdown, spread
from experiments.study import Row, append_row, mend_rows, read_rows

ROWS = Path(__file__).resolve().parent / "results" / "bf16_forms.jsonl"
FORMS = ("fp32", "stacked", "differences", "residual", "zero2")
ARMS = (("pissa", 1e-4, 100), ("lora", 1e-3, 100), ("pissa", 1e-4, 400))


def stacked_differences(
    A: Tensor, B: Tensor, initial_A: Tensor | None, initial_B: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Factors of the same product B A − B₀A₀, of the same rank: [A; A − A₀] and [B − B₀, B₀]."""
    if initial_A is None:
        return A, B
    return torch.cat([A, A - initial_A]), torch.cat([B - initial_B, initial_B], dim=1)


class ByDifferences(torch.autograd.Function):
    """train.py's product with `stacked_differences` in the place of its stacks: A has a gradient by both halves."""

    plain = train._AddLowRank
    forward = staticmethod(plain.forward)

    @staticmethod
    def backward(ctx, grad_y):
        grads = list(ByDifferences.plain.backward(ctx, grad_y))
        x, _, A, _, _, initial_B = ctx.saved_tensors
        if initial_B is not None:
            rows, grad_rows = x.flatten(0, -2), grad_y.flatten(0, -2)
            grads[2] += ((grad_rows @ initial_B.to(x.dtype)).mul_(ctx.scaling).T @ rows).to(A.dtype)
        return tuple(grads)


class Residual(train.LoRALinear):
    """PEFT's PiSSA: the base holds W − s·B₀A₀ in its own type, and the adapter is B A alone."""

    def __init__(self, base, rank, alpha, initial=None):
        super().__init__(base, rank, alpha, initial)
        if initial is not None:
            A, B = initial
            base.weight.data = (base.weight.float() - self.scaling * B @ A).to(base.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        A, B = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        # A copy: activations that are computed again (common/layers.py) come back in the shape of x itself alone.
        return self.base(x) + self.scaling * (x.clone() @ A.T) @ B.T


def patches(form: str) -> list:
    """The patches that make train.py compute by this form."""
    if form == "differences":
        replaced = {"_stack": stacked_differences, "_AddLowRank": ByDifferences}
    else:
        replaced = {"LoRALinear": Residual} if form == "residual" else {}
    return [mock.patch.object(train, name, value) for name, value in replaced.items()]


def run(form: str, method: str, rate: float, steps: int, seed: int, folder: Path) -> tuple[float, dict[str, Tensor]]:
    """Held-out loss and trained factors of one run; nothing is exported."""
    words = ["--config", "configs/demo.yaml", "--method", method, "--learning-rate", str(rate), "--seed", str(seed)]
    words += ["--dtype", "float32" if form == "fp32" else "bfloat16", "--max-steps", str(steps), "--eval-share", "0.02"]
    words += ["--eval-steps", str(steps), "--save-steps", "0", "--report-to", "none", "--output-dir", str(folder)]
    words += ["--init-cache", "output/bf16_forms", "--batch-size", "4", "--gradient-accumulation", "1"]
    words += ["--deepspeed", "configs/ds_zero2.json"] if form == "zero2" else []
    kept = {}

    def keep(model, *_, **__):
        for name, layer in train.adapter_layers(model).items():
            factors = {"A": layer.lora_A, "B": layer.lora_B, "A0": layer.initial_A, "B0": layer.initial_B}
            kept.update({f"{name}.{k}": v.detach().clone() for k, v in factors.items() if v is not None})

    for patch in [*(found := patches(form)), held := mock.patch.object(train, "export_model", keep)]:
        patch.start()
    try:
        train.main(words)
    finally:
        for patch in (*found, held):
            patch.stop()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return next(line["eval_loss"] for line in reversed(lines) if "eval_loss" in line), kept


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The median over layers of ‖ΔW − ΔW'‖ / ‖ΔW'‖, in fp64."""

    def delta(t: dict[str, Tensor], name: str) -> Tensor:
        A, B, *initial = (t[f"{name}.{k}"].double() for k in ("A", "B", "A0", "B0") if f"{name}.{k}" in t)
        return B @ A - (initial[1] @ initial[0] if initial else 0)

    names = [name.removesuffix(".A") for name in theirs if name.endswith(".A")]
    deltas = [(delta(ours, name), delta(theirs, name)) for name in names]
    return statistics.median(((mine - other).norm() / other.norm()).item() for mine, other in deltas)


def is_planned(method: str, steps: int, form: str) -> bool:
    if form == "zero2":
        return (method, steps) == ("pissa", ARMS[0][2])
    return method == "pissa" or form != "residual"


def table(rows: list[Row]) -> str:
    """Means over seeds by method, steps and form; differences are taken seed by seed."""
    groups: dict[tuple[str, int], dict[str, dict[int, Row]]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["steps"]), {}).setdefault(row["form"], {})[row["seed"]] = row
    body = []
    for (method, steps), forms in groups.items():
        losses = {form: {seed: row["loss"] for seed, row in of_seed.items()} for form, of_seed in forms.items()}
        for form in sorted(forms, key=FORMS.index):
            if method == "lora" and form == "differences":  # LoRA has no initial factors: its forms are one
                continue
            against = [
                "" if form == other else difference(by_seed(losses[form], losses.get(other, {})).values(), 4)
                for other in ("fp32", "stacked")
            ]
            distance = spread([100 * row["distance"] for row in forms[form].values()], 1)
            name, seeds = f"{method}, {steps} steps", str(len(losses[form]))
            body.append([name, form, seeds, spread(losses[form].values(), 4), *against, f"{distance} %"])
    titles = ["", "form", "seeds", "held-out loss", "− fp32's", "− stacked's", "ΔW from fp32's"]
    return markdown([titles, *body])


def main(argv: list[str]) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--table", action="store_true", help="run nothing")
    args = parser.parse_args(argv)
    mend_rows(ROWS)
    factors = Path("output/bf16_forms")
    factors.mkdir(parents=True, exist_ok=True)
    is_rank = "RANK" in os.environ  # a rank does one run under DeepSpeed, which leaves its state in the process
    cells = [(*arm, seed, form) for arm in ARMS for seed in args.seeds for form in FORMS]
    for method, rate, steps, seed, form in () if args.table else cells:
        about = {"method": method, "rate": rate, "steps": steps, "seed": seed, "form": form}
        if not is_planned(method, steps, form) or any(about.items() <= row.items() for row in read_rows(ROWS)):
            continue
        if is_rank != (form == "zero2"):
            if not is_rank:
                launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
                subprocess.run([*launcher, __file__, "--seeds", str(seed)], check=True)
            continue
        reference = factors / f"{method}-{steps}-{seed}.safetensors"
        with tempfile.TemporaryDirectory() as folder:
            loss, kept = run(form, method, rate, steps, seed, Path(folder))
        if form == "fp32":
            save_file(kept, reference)
        append_row(ROWS, about | {"loss": loss, "distance": distance(kept, load_file(reference))})
        if is_rank:
            return
    print(table(read_rows(ROWS)))


if __name__ == "__main__":
    run_script(main)
