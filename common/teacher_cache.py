"""The teacher's hidden states on disk, so that further epochs, seeds and λs skip the teacher's pass."""

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
from common.pretrained import computation_of
from common.tensors import device_of, fingerprint, shape_of, whole

if TYPE_CHECKING:
    import datasets


class TeacherCache:
    """The teacher's last hidden states at every example's valid positions, on disk: exact, not approximated logits.

    The first pass over the examples fills it, later passes read it. The file's name is a digest of the base weights,
    the configuration and the tokenised data, so an outdated cache is never read. An example counts only once all its
    states are written, so the next run can go on with the cache of a killed run.
    """

    def __init__(
        self, folder: Path, model: "transformers.PreTrainedModel", dataset: "datasets.Dataset", counts: list[int]
    ):
        """Opens or makes the cache of the base weights in `model` (adapters aside) and the tokenised `dataset`.

        Args:
            counts: each example's number of valid positions.

        Raises:
            UserError: the disk cannot hold the cache, or the file cannot be made.
        """
        self.offsets = [0, *itertools.accumulate(counts)]
        self.width = shape_of(model.get_output_embeddings().weight)[1]
        parameter = model.get_input_embeddings().weight
        self.device, dtype = device_of(parameter), parameter.dtype
        base = (whole(tensor) for name, tensor in model.named_parameters() if "lora_" not in name)
        rows = (torch.tensor(row) for name in ("input_ids", "labels") for row in dataset[name])
        computation = torch.tensor(list(computation_of(model.config.to_diff_dict()).encode()))
        path = folder / f"teacher-{fingerprint(itertools.chain([computation], base, rows))[:32]}"
        self.num_bytes = self.offsets[-1] * self.width * dtype.itemsize
        states, done = path.with_suffix(".states"), path.with_suffix(".done")
        require_space(folder, self.num_bytes, [states])
        for file, size in ((states, self.num_bytes), (done, len(counts))):
            allocate(file, size)
        shape = (self.offsets[-1], self.width)
        self.states = torch.from_file(str(states), shared=True, size=math.prod(shape), dtype=dtype).view(shape)
        self.done = torch.from_file(str(done), shared=True, size=len(counts), dtype=torch.bool)

    def get(self, example_ids: list[int]) -> Tensor | None:
        """The states of these examples, in order, (M, d); None if an example is missing."""
        if not all(self.done[i] for i in example_ids):
            return None
        return torch.cat([self.states[self.offsets[i] : self.offsets[i + 1]] for i in example_ids]).to(self.device)

    def put(self, example_ids: list[int], states: Tensor) -> None:
        """Keeps the states of these examples, (M, d) in order."""
        sizes = [self.offsets[i + 1] - self.offsets[i] for i in example_ids]
        for i, rows in zip(example_ids, states.split(sizes), strict=True):
            self.states[self.offsets[i] : self.offsets[i + 1]] = rows.to(self.states)
            # The mark comes last: a kill between the two lines loses the example's states, but never leaves wrong ones.
            self.done[i] = True


def allocate(file: Path, num_bytes: int) -> None:
    """Allocates a memory-mapped file's whole space. A disk that fills up later would kill the process (SIGBUS).

    Raises:
        UserError: the disk does not have the space.
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
    """Raises a UserError if the disk of `folder` cannot hold a cache of `num_bytes`; the folder need not exist yet.

    Args:
        files: files that may be the begun cache; None: any file of its size, because its name is not known yet.
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
