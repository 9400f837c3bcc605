"""The device that a run takes: a GPU where torch sees one, else the CPU, but not beside GPUs that torch cannot use."""

import os
import subprocess
import time

import torch

from common.cli import UserError, first_line


def choose_device() -> torch.device:
    """The GPU of this process where torch sees one, else the CPU.

    Raises:
        UserError: nvidia-smi lists GPUs, CUDA_VISIBLE_DEVICES hides none of them, and torch sees none; or this node has
            more ranks than GPUs. Only the node's first rank raises it; the others wait until the launcher ends them.
    """
    visible, ranks = os.environ.get("CUDA_VISIBLE_DEVICES"), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    problem = None
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        if ranks > count:
            problem = f"{ranks} ranks on this machine, and torch sees {count} GPUs: start one rank for each GPU"
    elif not (visible is not None and visible.strip() in ("", "-1")) and (listed := num_listed_gpus()):
        try:
            torch.cuda.init()
            reason = "CUDA finds no device"
        except (RuntimeError, AssertionError) as error:
            reason = first_line(error)
        among = f" among CUDA_VISIBLE_DEVICES={visible}" if visible else ""
        problem = (
            f"GPUs that nvidia-smi lists: {listed}; that torch {torch.__version__} sees{among}: none ({reason}). "
            "Update the driver, or mend the list; CUDA_VISIBLE_DEVICES= (empty) runs on the CPU"
        )
    if problem is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if int(os.environ.get("LOCAL_RANK", 0)) > 0:
        time.sleep(10)  # the first rank needs time to print its error: the launcher ends all ranks once one has ended
        raise SystemExit(2)
    raise UserError(problem)


def num_listed_gpus() -> int:
    """How many GPUs nvidia-smi lists; 0 where it finds none, hangs, or is not there."""
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU") for line in listed.splitlines())


def announce_device() -> None:
    """A run's first line: the GPUs of the first machine's ranks by name and UUID, or the CPU. Raises as above."""
    names = f"CPU, {torch.get_num_threads()} threads"
    if choose_device().type == "cuda":
        cards = map(torch.cuda.get_device_properties, range(int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
        names = ", ".join(f"{card.name} (GPU-{str(card.uuid)[:8]})" for card in cards)
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"device: {names}", flush=True)
