#!/usr/bin/env python3
"""PiSSA's initialisation, side by side: PEFT's exact one, PEFT's `pissa_niter_4`, and ours, on every target matrix.

    python bench/pissa_init.py

Each is timed as a user meets it, from the plain model to the model with adapters, in turns. The error is
‖W − s·B₀A₀‖ in fp64 relative to PEFT's exact decomposition, the largest over all matrices.
"""

import argparse
import statistics
import time

import contenders
import peft
import torch
from side_by_side import machine, ratios
from transformers import AutoModelForCausalLM

import train
from common.layers import TARGET_MODULES
from common.pretrained import resolve_demo

Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]  # B₀ and A₀ by layer


def with_peft(model: torch.nn.Module, rank: int, init: str) -> Factors:
    model = contenders.peft_model(model, rank, init).base_model.model
    layers = {name: m for name, m in model.named_modules() if isinstance(m, peft.tuners.lora.Linear)}
    return {name: (m.lora_B["default"].weight, m.lora_A["default"].weight) for name, m in layers.items()}


def with_ours(model: torch.nn.Module, rank: int) -> Factors:
    train.add_adapters(model, "pissa", rank, rank, TARGET_MODULES)
    return {name: (layer.lora_B, layer.lora_A) for name, layer in train.adapter_layers(model).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="causal language model (default: the embedded SmolLM2-135M)")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    path = resolve_demo(args.model, "model")

    def load() -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    weights = {name: m.weight.detach().clone() for name, m in load().named_modules() if isinstance(m, torch.nn.Linear)}
    runs = {
        "PEFT, pissa": lambda model: with_peft(model, args.rank, "pissa"),
        "PEFT, pissa_niter_4": lambda model: with_peft(model, args.rank, "pissa_niter_4"),
        "ours": lambda model: with_ours(model, args.rank),
    }
    seconds = {name: [] for name in runs}
    residuals = {}
    for _ in range(args.repeats):
        for name, run in runs.items():
            model = load()
            [parameter.sum() for parameter in model.parameters()]  # the file is mapped: read it before the clock runs
            started = time.perf_counter()
            factors = run(model)
            seconds[name].append(time.perf_counter() - started)
            residuals[name] = {
                layer: (weights[layer].double() - B.detach().double() @ A.detach().double()).norm().item()
                for layer, (B, A) in factors.items()
            }
    exact = residuals["PEFT, pissa"]
    print("| PiSSA initialisation | seconds | times faster [min, max] | largest error ratio |")
    print("|---|---|---|---|")
    for name in runs:
        worst = max(residuals[name][layer] / exact[layer] for layer in exact)
        spread = ratios(seconds["PEFT, pissa"], seconds[name])
        print(f"| {name} | {statistics.median(seconds[name]):.2f} | {spread} | {worst:.6f} |")
    print(f"\n{len(exact)} matrices, r = {args.rank}, {args.repeats} turns. {machine()}")


if __name__ == "__main__":
    main()
