#!/usr/bin/env python3
"""Whole trainings, side by side: TRL's SFTTrainer with PEFT's PiSSA, and train.py's `pissa` and `ba-lora`.

    python bench/trainers.py --data FILE.jsonl --fields question answer

Every training is a process of its own, started as a user would start it: TRL with its defaults, bf16 and gradient
checkpointing among them, train.py with the allocator settings of scripts/setup.sh. They take turns, `--rounds` times,
each on the same examples from the start. `trl-tuned` is TRL with the settings that help it on a CPU: fp32, no gradient
checkpointing, and the same allocator settings. Printed: the median seconds of a step over the whole training (the
trainers' own time divided by the steps: data, logging and all), the ratio to TRL round by round, and the peak resident
memory.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from side_by_side import allocator_settings, machine, print_table, step_parser

from common.cli import UserError, as_words, run_script

CONTENDERS = {
    "trl": "TRL's SFTTrainer, PEFT's PiSSA",
    "trl-tuned": "the same in fp32, all activations kept, ours' allocator settings",
    "pissa": "train.py --method pissa",
    "ba-lora": "train.py --method ba-lora",
    "pissa-bf16": "train.py --method pissa --dtype bfloat16",
    "ba-lora-bf16": "train.py --method ba-lora --dtype bfloat16",
}


def train_trl(options: dict[str, Any]) -> None:
    """One training by TRL; its time, memory and settings go to `options["result"]`."""
    import peft
    import trl

    from common.layers import TARGET_MODULES
    from common.pretrained import resolve_demo
    from common.ranks import peak_memory_gib
    from common.tables import load_records
    from common.templates import ALPACA_PROMPT

    instruction, response = options["fields"]
    records = load_records(resolve_demo(options["data"], "train")).select(range(options["examples"]))
    dataset = records.map(
        lambda record: {
            "prompt": ALPACA_PROMPT.format(instruction=record[instruction]),
            "completion": " " + record[response],
        },
        remove_columns=records.column_names,
    )
    tuned = {"bf16": False, "gradient_checkpointing": False} if options["name"] == "trl-tuned" else {}
    config = trl.SFTConfig(
        output_dir=options["output_dir"],
        max_steps=options["steps"],
        per_device_train_batch_size=options["batch_size"],
        max_length=options["max_length"],
        learning_rate=2e-5,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        **tuned,
    )
    lora = peft.LoraConfig(
        r=options["rank"],
        lora_alpha=options["rank"],
        target_modules=TARGET_MODULES,
        init_lora_weights="pissa",
        task_type="CAUSAL_LM",
    )
    model = resolve_demo(options["model"], "model")
    trainer = trl.SFTTrainer(model=model, args=config, train_dataset=dataset, peft_config=lora)
    seconds = trainer.train().metrics["train_runtime"]
    kept = {name: getattr(config, name) for name in ("bf16", "gradient_checkpointing", "packing")}
    kept["dtype"] = str(next(trainer.model.parameters()).dtype)
    kept |= {"train_seconds": seconds, "peak_memory_gib": peak_memory_gib()}
    Path(options["result"]).write_text(json.dumps(kept))


def run_once(name: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One training in a process of its own: its summary, with train_seconds and peak_memory_gib.

    Raises:
        UserError: it failed; its last lines are in the message.
    """
    environment = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES"}
    if name != "trl":
        environment["GLIBC_TUNABLES"] = allocator_settings()
    shared = {"model": args.model, "data": args.data, "fields": args.fields, "rank": args.rank}
    shared |= {"batch_size": args.batch_size, "max_length": args.max_length, "output_dir": str(folder / "run")}
    result = folder / "run" / "run.json"
    if name in ("trl", "trl-tuned"):
        result = folder / "result.json"
        more = {"name": name, "steps": args.steps, "examples": args.steps * args.batch_size, "result": str(result)}
        command = [sys.executable, __file__, "--child", json.dumps(shared | more)]
    else:
        method = name.removesuffix("-bf16")
        command = [sys.executable, "train.py", "--method", method, *as_words(shared), "--gradient-accumulation", "1"]
        command += ["--max-steps", str(args.steps), "--limit", str(args.steps * args.batch_size)]
        command += ["--save-steps", "0", "--dtype", "bfloat16" if name.endswith("-bf16") else "float32"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{name} failed: {' / '.join(done.stderr.strip().splitlines()[-3:])}")
    return json.loads(result.read_text())


def main(argv: list[str]) -> None:
    parser = step_parser(__doc__, 8, CONTENDERS)
    parser.add_argument("--rounds", type=int, default=3, help="trainings of each contender")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        train_trl(json.loads(args.child))
        return

    seconds: dict[str, list[float]] = {name: [] for name in args.only}
    memory: dict[str, list[float]] = {name: [] for name in args.only}
    settings = {}
    for number in range(args.rounds):
        for name in args.only:
            with tempfile.TemporaryDirectory() as folder:
                made = run_once(name, args, Path(folder))
            seconds[name].append(made["train_seconds"] / args.steps)
            memory[name].append(made["peak_memory_gib"])
            settings[name] = {key: made[key] for key in ("bf16", "gradient_checkpointing", "dtype") if key in made}
            print(f"round {number} {name}: {seconds[name][-1]:.2f} s a step", file=sys.stderr, flush=True)

    peaks = {name: statistics.median(found) for name, found in memory.items()}
    print_table("whole training | seconds a step", CONTENDERS, seconds, peaks)
    print(
        f"\n{args.rounds} trainings of {args.steps} steps each; {args.batch_size} sequences of at most "
        f"{args.max_length} tokens a step; r = {args.rank}. TRL's settings: {settings.get('trl')}. "
        f"{machine()}"
    )


if __name__ == "__main__":
    run_script(main)
