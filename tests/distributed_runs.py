"""What test_distributed.py launches on several ranks: train.main for each list of arguments in a JSON file."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import accelerate
import torch.distributed as dist
import transformers

import train


def main() -> None:
    for argv in json.loads(Path(sys.argv[1]).read_text()):
        sys.argv[1:] = argv
        train.main(argv)
        # What a process keeps between runs, though a user's process makes only one.
        transformers.integrations.deepspeed.unset_hf_deepspeed_config()
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=False)
        accelerate.state.GradientState._reset_state()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
