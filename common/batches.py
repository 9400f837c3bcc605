"""The micro-batches of an epoch, shared out among ranks: the same ones in the same steps for every number of ranks."""

import math
from collections.abc import Callable, Iterator

import torch


class MicroBatches:
    """A sampler of the micro-batches of one rank: of all that an epoch has, in order, every n-th.

    With the accumulation that belongs to it, each optimizer step has the same micro-batches on any number of ranks.
    No example comes twice: where the last round has fewer micro-batches than there are ranks, the others' are empty.

    Args:
        order: gives an epoch's order of the examples.
    """

    def __init__(
        self, order: Callable[[int], list[int]], num_examples: int, batch_size: int, rank: int, num_ranks: int
    ):
        self.order, self.batch_size = order, batch_size
        self.rank, self.num_ranks, self.epoch = rank, num_ranks, 0
        self.num_rounds = math.ceil(math.ceil(num_examples / batch_size) / num_ranks)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_rounds

    def __iter__(self) -> Iterator[list[int]]:
        order = self.order(self.epoch)
        for number in range(self.num_rounds):
            first = (number * self.num_ranks + self.rank) * self.batch_size
            yield order[first : first + self.batch_size]


def generator_of(seed: int, epoch: int) -> torch.Generator:
    """What an epoch's order is drawn from."""
    return torch.Generator().manual_seed(seed + epoch)
