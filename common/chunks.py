"""How many chunks and blocks the objective's logits are computed in, by memory and by the device's speed."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

CPU_MEMORY = 128.0  # MiB
CARD_SHARE, CARD_MOST = 1 / 32, 1 / 8  # of a GPU's memory
FEWEST_ROWS = 1024  # with fewer rows, the product with the head leaves a GPU's matrix units idle
CACHED_BYTES = 2**21  # size of a block's operand that stays in a CPU's cache


def bytes_per_row(vocabulary: int, num_buffers: int, itemsize: int, head_itemsize: int, one_more: bool) -> int:
    """The bytes that one row of logits needs in `num_buffers` buffers with `itemsize` bytes an entry.

    Args:
        head_itemsize: bytes an entry of the head's own output; if smaller than `itemsize`, that output is held too.
        one_more: whether the terms need another buffer of a whole chunk; on a CPU they need one of a block only.
    """
    rounded = head_itemsize if head_itemsize < itemsize else 0
    return vocabulary * ((num_buffers + one_more) * itemsize + rounded)


def most_rows(row: int, memory_mib: float | None, card: int | None) -> int:
    """How many rows of `row` bytes a chunk may have.

    Args:
        memory_mib: the user's budget. None: 128 MiB on a CPU; on a GPU 1/32 of its memory, or the size of 1,024 rows if
            that is more, up to 1/8. All of the memory counts, not the free part: a resumed run has the same chunks.
        card: the GPU's memory in bytes; None: a CPU.
    """
    if memory_mib is None and card is not None:
        budget = max(card * CARD_SHARE, min(FEWEST_ROWS * row, card * CARD_MOST))
    else:
        budget = (CPU_MEMORY if memory_mib is None else memory_mib) * 2**20
    return max(1, int(budget / row))


def card_bytes(device: torch.device | None = None) -> int | None:
    """The memory of this GPU, without `device` of the present one; None: a CPU."""
    is_cuda = torch.cuda.is_available() if device is None else device.type == "cuda"
    return torch.cuda.get_device_properties(device).total_memory if is_cuda else None


def chunks(
    hidden: Tensor, head_weight: Tensor, num_buffers: int, memory_mib: float | None, in_place: bool = False
) -> Iterator[slice]:
    """Equal chunks of rows whose (m, V) logits, `num_buffers` of them, fit into the budget.

    Args:
        in_place: the terms overwrite the head's own output and need no other buffer.
    """
    head_itemsize = head_weight.dtype.itemsize
    itemsize = head_itemsize if in_place else torch.promote_types(hidden.dtype, torch.float32).itemsize
    row = bytes_per_row(len(head_weight), num_buffers, itemsize, head_itemsize, hidden.is_cuda and not in_place)
    count = math.ceil(len(hidden) / most_rows(row, memory_mib, card_bytes(hidden.device)))
    for index in range(count):
        yield slice(len(hidden) * index // count, len(hidden) * (index + 1) // count)


def blocks(z: Tensor) -> Iterator[slice]:
    """Blocks of a chunk's rows that fit a CPU's cache: the terms pass over them a dozen times. A GPU gets one block."""
    if z.is_cuda:  # one block already reaches the memory's bandwidth; another block would launch a dozen kernels more
        yield slice(None)
        return
    size = max(1, CACHED_BYTES // (z.shape[1] * z.element_size()))
    for first in range(0, len(z), size):
        yield slice(first, first + size)


def top_k(z: Tensor, k: int, block: int = 64) -> tuple[Tensor, Tensor]:
    """`z.topk(k)` of wide rows in two steps, exact: the k largest entries lie in the k blocks of the largest maxima."""
    rows, width = z.shape
    whole = width // block * block
    if min(k, width) * block >= width // 4:
        return z.topk(min(k, width), dim=1)
    return top_k_of_blocks(z, z[:, :whole].view(rows, -1, block).amax(dim=2), k, block)


def top_k_of_blocks(z: Tensor, maxima: Tensor, k: int, block: int) -> tuple[Tensor, Tensor]:
    """`top_k`, given the maxima of every whole block, (rows, width // block)."""
    rows, width = z.shape
    chosen = maxima.topk(k, dim=1).indices  # (m, k)
    candidates = (chosen[:, :, None] * block + torch.arange(block, device=z.device)).flatten(1)
    whole = width // block * block
    if whole < width:
        rest = torch.arange(whole, width, device=z.device).expand(rows, -1)
        candidates = torch.cat([candidates, rest], dim=1)
    values, positions = z.gather(1, candidates).topk(k, dim=1)
    return values, candidates.gather(1, positions)
