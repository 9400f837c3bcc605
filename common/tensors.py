"""Tensors in files and by content; partitioned and quantized parameters."""

import contextlib
import hashlib
import json
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common.cli import RunStopped, first_line


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
    """The tensors in the file; if it does not exist or is damaged, those of `make`, which are stored in it. Safe among
    processes.

    Raises:
        RunStopped: the file cannot be written.
    """
    if path.exists():
        try:
            return _read(path, names, device)
        except (SafetensorError, KeyError) as error:
            print(f"note: {path} is damaged ({first_line(error)}) and made again", file=sys.stderr)
    tensors = {name: tensor.cpu() for name, tensor in zip(names, make(), strict=True)}
    partial = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial)
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise RunStopped(f"cannot write {path} ({first_line(error)}): make room, or name another folder") from error
    return _read(path, names, device)


def _read(path: Path, names: tuple[str, ...], device: torch.device) -> tuple[Tensor, ...]:
    stored = load_file(path, device=str(device))
    return tuple(stored[name] for name in names)


# ------------------------------------------------------------------------------------------------------------------
# Parameters that ZeRO-3 partitions, and quantized ones: their shape, their device, the whole tensor
# ------------------------------------------------------------------------------------------------------------------


def num_ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_partitioned(parameter: Tensor) -> bool:
    """Whether DeepSpeed's ZeRO-3 holds this parameter in parts, one on each rank."""
    return hasattr(parameter, "ds_tensor")


def shape_of(parameter: Tensor) -> torch.Size:
    """The whole parameter's shape, even if it is partitioned or packed."""
    if is_partitioned(parameter):
        return parameter.ds_shape
    state = getattr(parameter, "quant_state", None)  # bitsandbytes packs 4 bits
    return parameter.shape if state is None else state.shape


def device_of(parameter: Tensor) -> torch.device:
    """Where this process computes with the parameter; a partitioned one may be kept elsewhere."""
    if is_partitioned(parameter) and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return parameter.device


def any_rank_lacks(tensor: Tensor | None, weight: Tensor) -> bool:
    """Whether `tensor` is None here, or, where ZeRO-3 holds `weight` in parts, on any rank: a pass of the model gathers
    weights, so all ranks run it there or none. Collective."""
    if num_ranks() == 1 or not is_partitioned(weight):
        return tensor is None
    lacking = torch.tensor(int(tensor is None), device=device_of(weight))
    dist.all_reduce(lacking, op=dist.ReduceOp.MAX)
    return bool(lacking)


@contextlib.contextmanager
def gathered(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Inside, every process holds these parameters whole. Collective; does nothing without ZeRO-3."""
    partitioned = [parameter for parameter in parameters if is_partitioned(parameter)]
    if not partitioned:
        yield
        return
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    with GatheredParameters(partitioned):
        yield


def whole(parameter: Tensor) -> Tensor:
    """The whole parameter on every process: itself, or under ZeRO-3 a copy. Collective."""
    with gathered([parameter]):
        return parameter.detach().clone() if is_partitioned(parameter) else parameter.detach()


def gathered_by(owner: int, parameter: Tensor) -> Tensor | None:
    """The whole parameter on process `owner`, None on the others, which keep only their part. Collective."""
    mine = dist.get_rank() == owner
    if not is_partitioned(parameter):
        return parameter if mine else None
    part = parameter.ds_tensor.detach().to(device_of(parameter))
    parts = part.new_empty(dist.get_world_size() * part.numel()) if mine else None
    # Sent as bytes, because not every backend can send every type.
    receive = list(parts.view(torch.uint8).chunk(dist.get_world_size())) if mine else None
    dist.gather(part.view(torch.uint8), receive, dst=owner)
    return parts[: parameter.ds_numel].view(parameter.ds_shape) if mine else None


@contextlib.contextmanager
def gathered_module_by_module(model: nn.Module) -> Iterator[None]:
    """Inside, `model` runs before DeepSpeed has wrapped it: each module holds its own parameters while it runs."""
    held: dict[nn.Module, contextlib.ExitStack] = {}

    def enter(module: nn.Module, _: Any) -> None:
        held[module] = contextlib.ExitStack()
        held[module].enter_context(gathered(module.parameters(recurse=False)))

    def leave(module: nn.Module, *_: Any) -> None:
        held.pop(module).close()

    handles = []
    for module in model.modules():
        if any(is_partitioned(parameter) for parameter in module.parameters(recurse=False)):
            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def dequantized(layer: nn.Linear, weight: Tensor | None = None) -> Tensor:
    """The layer's dequantized weight if bitsandbytes has quantized it, else `weight`, by default the layer's own."""
    own = layer.weight
    if hasattr(own, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(own.data, own.quant_state)
    if hasattr(own, "SCB"):  # 8 bit: each row times its scale; the first forward pass moves the scales to the state
        scales = layer.state.SCB if own.SCB is None else own.SCB
        return own.data.float() * scales[:, None] / 127
    return own if weight is None else weight


def shared_among_ranks(
    layers: list[nn.Linear], factors: Callable[[Tensor], tuple[Tensor, Tensor]], rank: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Each of n processes decomposes every n-th weight, holds one weight whole, and sends the factors to the others."""
    me, count = dist.get_rank(), dist.get_world_size()
    for first in range(0, len(layers), count):
        group = layers[first : first + count]
        own = None
        for owner, layer in enumerate(group):
            whole = gathered_by(owner, layer.weight)
            own = dequantized(layer, whole) if owner == me else own
        pair = None if own is None else factors(own)
        del own, whole
        for owner, layer in enumerate(group):
            num_out, num_in = shape_of(layer.weight)
            if owner == me:
                A, B = pair
            else:
                shapes = ((rank, num_in), (num_out, rank))
                A, B = (torch.empty(shape, device=device_of(layer.weight)) for shape in shapes)
            dist.broadcast(A, owner)
            dist.broadcast(B, owner)
            yield A, B


def factors_of_all(
    layers: list[nn.Linear], factors: Callable[[Tensor], tuple[Tensor, Tensor]], rank: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """`factors` of each layer's weight in order: shared out among the ranks, or one thread per core."""
    if num_ranks() > 1:
        yield from shared_among_ranks(layers, factors, rank)
        return
    num_threads = torch.get_num_threads()
    # One decomposition alone cannot use all cores.
    workers = num_threads if all(layer.weight.device.type == "cpu" for layer in layers) else 1
    try:
        torch.set_num_threads(num_threads // workers)
        with ThreadPoolExecutor(workers) as pool:
            yield from pool.map(lambda layer: factors(dequantized(layer)), layers)
    finally:
        torch.set_num_threads(num_threads)
