"""Tensors in files and by content."""

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of the tensors' types, shapes and bytes, in order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def padded(
    rows: list[list[int]], pad: int, left: bool = False, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """Rows of several lengths as one tensor (B, T), padded on the right or on the left, and the mask of the rest."""
    width = max(map(len, rows))
    fill = [[pad] * (width - len(row)) for row in rows]
    values = [[*more, *row] if left else [*row, *more] for row, more in zip(rows, fill, strict=True)]
    lengths = torch.tensor(list(map(len, rows)), device=device)[:, None]
    places = torch.arange(width, device=device)
    return torch.tensor(values, device=device), (places >= width - lengths if left else places < lengths).long()


def same_bits(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two tensors have the same type, shape and bytes, NaN included."""
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        return False
    return torch.equal(*(tensor.detach().cpu().contiguous().flatten().view(torch.uint8) for tensor in (ours, theirs)))


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Writes a safetensors file with the same bytes for the same tensors and metadata.

    safetensors itself writes several metadata entries in another order each time. They stand in the header: eight bytes
    with its length, then JSON. Sorting the entries does not change the length.
    """
    save_file(tensors, path, metadata=metadata)
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        file.seek(8)
        file.write(text.ljust(size))


def kept_in_file(
    path: Path, names: tuple[str, ...], make: Callable[[], tuple[Tensor, ...]], device: torch.device
) -> tuple[Tensor, ...]:
    """The tensors in the file; if it does not exist, those of `make`, which are stored in it. Safe among processes."""
    if not path.exists():
        tensors = {name: tensor.cpu() for name, tensor in zip(names, make(), strict=True)}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
        save_file(tensors, partial)
        partial.rename(path)
    stored = load_file(path, device=str(device))
    return tuple(stored[name] for name in names)
