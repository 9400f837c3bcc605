"""What test_distributed.py launches on several ranks: train.main for each run in a JSON file, one after the other.

A run is {"argv": its arguments}, with "copy": [from, to] before it starts, "in": the folder that it runs in, and
"full_disk_on": the rank whose first checkpoint cannot be written. A line "=== run" with its number stands before what
it prints. Starting the processes takes longer than such runs.
"""

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import accelerate
import torch.distributed as dist
import transformers
import warm  # noqa: F401

import train
from common import checkpoints
from common.cli import run_script
from common.ranks import leave


@contextlib.contextmanager
def full_disk_once(rank: str | None) -> Iterator[None]:
    """On this rank the first checkpoint of the run cannot be written."""
    save = checkpoints.save_file
    is_full = [rank is not None and os.environ.get("RANK") == rank]

    def failing(*args):
        if is_full[0]:
            is_full[0] = False
            raise OSError(28, "No space left on device")
        save(*args)

    checkpoints.save_file = failing
    yield
    checkpoints.save_file = save


def together() -> None:
    """What all ranks have printed is out before one goes on."""
    sys.stdout.flush()
    sys.stderr.flush()
    if dist.is_initialized():
        dist.barrier()


def main(argv: list[str]) -> None:
    for number, run in enumerate(json.loads(Path(argv[0]).read_text())):
        together()
        if os.environ.get("RANK", "0") == "0":
            print(f"\n=== run {number}", flush=True)
        sys.argv[1:] = run["argv"]
        if "copy" in run and os.environ.get("RANK", "0") == "0":
            shutil.copytree(*run["copy"])
        together()
        os.chdir(run.get("in", "."))
        with full_disk_once(run.get("full_disk_on")):
            train.main(run["argv"])
        # What a process keeps between runs, though a user's process makes only one.
        transformers.integrations.deepspeed.unset_hf_deepspeed_config()
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=False)
        accelerate.state.GradientState._reset_state()
    leave(0)


if __name__ == "__main__":
    run_script(main)
