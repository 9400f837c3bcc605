"""The teacher's hidden states on disk, so that further epochs, seeds and λs skip its pass."""

import itertools
import math
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from torch import Tensor

from common.cli import UserError
from common.partitioned import device_of, shape_of, whole
from common.tensors import fingerprint

if TYPE_CHECKING:
    import datasets


class TeacherCache:
    """The teacher's last hidden states at every example's valid positions, on disk: exact, not approximated logits.

    Filled as training meets the examples, read from then on. The file's name is a digest of the base weights and the
    tokenised data, so that a stale cache is never met; an example counts only once all its states are written, so that
    a killed run leaves a cache that the next one goes on with.
    """

    def __init__(
        self, folder: Path, model: "transformers.PreTrainedModel", dataset: "datasets.Dataset", counts: list[int]
    ):
        """Opens or makes the cache of the base weights in `model` (adapters aside) and the tokenised `dataset`.

        Args:
            counts: each example's number of valid positions.

        Raises:
            UserError: the disk cannot hold it, or takes no file.
        """
        self.offsets = [0, *itertools.accumulate(counts)]
        self.width = shape_of(model.get_output_embeddings().weight)[1]
        parameter = model.get_input_embeddings().weight
        self.device, dtype = device_of(parameter), parameter.dtype
        base = (whole(tensor) for name, tensor in model.named_parameters() if "lora_" not in name)
        rows = (torch.tensor(row) for name in ("input_ids", "labels") for row in dataset[name])
        path = folder / f"teacher-{fingerprint(itertools.chain(base, rows))[:32]}"
        self.num_bytes = self.offsets[-1] * self.width * dtype.itemsize
        states, done = path.with_suffix(".states"), path.with_suffix(".done")
        require_space(folder, self.num_bytes, [states])
        for file, size in ((states, self.num_bytes), (done, len(counts))):
            allocate(file, size)
        shape = (self.offsets[-1], self.width)
        self.states = torch.from_file(str(states), shared=True, size=math.prod(shape), dtype=dtype).view(shape)
        self.done = torch.from_file(str(done), shared=True, size=len(counts), dtype=torch.bool)

    def get(self, example_ids: list[int]) -> Tensor | None:
        """The states of these examples, in order, (M, d); None where one is missing."""
        if not all(self.done[i] for i in example_ids):
            return None
        return torch.cat([self.states[self.offsets[i] : self.offsets[i + 1]] for i in example_ids]).to(self.device)

    def put(self, example_ids: list[int], states: Tensor) -> None:
        """Keeps the states of these examples, (M, d) in order."""
        sizes = [self.offsets[i + 1] - self.offsets[i] for i in example_ids]
        for i, rows in zip(example_ids, states.split(sizes), strict=True):
            self.states[self.offsets[i] : self.offsets[i + 1]] = rows.to(self.states)
            # Marked last: a kill between the two lines loses the example's states, and never leaves wrong ones.
            self.done[i] = True


def allocate(file: Path, num_bytes: int) -> None:
    """Takes the room of a file that is mapped into memory: a disk that fills up later would kill the process (SIGBUS).

    Raises:
        UserError: the disk does not have it.
    """
    is_new = not file.exists()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "ab") as stream:
            os.posix_fallocate(stream.fileno(), 0, max(num_bytes, 1))
    except OSError as error:
        if is_new:
            file.unlink(missing_ok=True)
        raise UserError(f"--teacher-cache: {file} of {num_bytes} bytes cannot be made: {error.strerror}") from error


def require_space(folder: Path, num_bytes: int, files: Iterable[Path] | None = None) -> None:
    """Raises a UserError where the disk of `folder`, which need not be there yet, cannot hold a cache of `num_bytes`.

    Args:
        files: where the cache may have been begun; None: in any file of its size, as long as its name is not known.
    """
    begun = folder.glob("*.states") if files is None else files
    there = [file.stat() for file in begun if file.exists()]
    missing = num_bytes - max((stat.st_blocks * 512 for stat in there if stat.st_size == num_bytes), default=0)
    free = shutil.disk_usage(
        next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    ).free
    if missing > free:
        raise UserError(
            f"--teacher-cache {folder} needs {num_bytes / 2**30:.2f} GiB and the disk has {free / 2**30:.2f} left: "
            "name another folder, or go without"
        )
