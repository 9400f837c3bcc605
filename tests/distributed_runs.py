"""What test_distributed.py launches on several ranks: train.main for each list of arguments in a JSON file."""

import json
import os
import sys
from pathlib import Path

import accelerate
import transformers

import train
from common.training import leave


def full_disk_once(rank: str) -> None:
    """On this rank the first checkpoint cannot be written."""
    save = train.BALoRATrainer._save_rng_state

    def failing(self, output_dir):
        train.BALoRATrainer._save_rng_state = save
        if os.environ["RANK"] == rank:
            raise OSError(28, "No space left on device")
        save(self, output_dir)

    train.BALoRATrainer._save_rng_state = failing


def main() -> None:
    if "FULL_DISK_ON_RANK" in os.environ:
        full_disk_once(os.environ["FULL_DISK_ON_RANK"])
    for argv in json.loads(Path(sys.argv[1]).read_text()):
        sys.argv[1:] = argv
        train.main(argv)
        # What a process keeps between runs, though a user's process makes only one.
        transformers.integrations.deepspeed.unset_hf_deepspeed_config()
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=False)
        accelerate.state.GradientState._reset_state()
    leave(0)


if __name__ == "__main__":
    main()
