"""Micro-batches, packed or padded, and attention over sequences that lie end to end in one row."""

import contextlib
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from common.cli import UserError
from common.templates import IGNORE_INDEX
from common.tensors import device_of, gathered_module_by_module, padded

PER_SEQUENCE = "per_sequence"  # the name of `attend_per_sequence` among transformers' attention functions
in_one_launch = True  # on a GPU in half precision: torch's attention for sequences of any lengths, until a trial fails


@dataclass
class PackingCollator:
    """Makes a micro-batch without padding: the examples lie end to end in one row, each with its own positions.

    The tokens that all prompts begin with (at least the template's head) stand once, at the front. Causal states do not
    depend on later tokens, so the states of a shared beginning are the same in every example.

    `input_ids`, `position_ids`: (1, tokens). `sequence_lengths`: list of ints that include the shared beginning;
    `shared_length`: the tokens of the shared beginning. `valid_positions`, `targets`: see PaddingCollator.
    """

    share_beginning: bool = True

    def __call__(self, examples: list[dict[str, list[int]]]) -> dict[str, Any]:
        shared = shared_beginning(examples) if self.share_beginning else 0
        lengths = [len(example["input_ids"]) for example in examples]
        starts = [0] + [shared] * (len(examples) - 1)
        # The first label of each example is never a target: position i predicts label i + 1 of the same example.
        next_token = [
            label
            for example, start in zip(examples, starts, strict=True)
            for label in [*example["labels"][start + 1 :], IGNORE_INDEX]
        ]
        tokens = [token for e, start in zip(examples, starts, strict=True) for token in e["input_ids"][start:]]
        positions = [torch.arange(start, length) for start, length in zip(starts, lengths, strict=True)]
        valid_positions = torch.tensor([i for i, label in enumerate(next_token) if label != IGNORE_INDEX])
        return {
            "input_ids": torch.tensor([tokens]),
            "position_ids": torch.cat(positions)[None],
            "sequence_lengths": lengths,
            "shared_length": shared,
            "valid_positions": valid_positions,
            "targets": torch.tensor(next_token)[valid_positions],
            "example_ids": [example.get("index") for example in examples],
        }


def shared_beginning(examples: list[dict[str, list[int]]]) -> int:
    """How many first tokens all examples share, up to the first position that predicts a response token."""
    beginnings = []
    for example in examples:
        first = next((i for i, label in enumerate(example["labels"][1:]) if label != IGNORE_INDEX), 0)
        beginnings.append(example["input_ids"][:first])
    alike = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*beginnings, strict=False))
    return sum(1 for _ in alike) if len(examples) > 1 else 0


@dataclass
class PaddingCollator:
    """Makes a micro-batch that is padded on the right and masked by length, for models that cannot be packed.

    `input_ids`, `attention_mask`: (B, L). `valid_positions`: (M,) indices into the flattened (B·L) positions whose next
    token is a response token. `targets`: (M,) those next tokens. Any token can pad: even if it is the end-of-sequence
    token, the real end-of-sequence tokens are attended and trained.
    """

    pad_token_id: int

    def __call__(self, examples: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        input_ids, attention_mask = padded([example["input_ids"] for example in examples], self.pad_token_id)
        labels, _ = padded([example["labels"] for example in examples], IGNORE_INDEX)
        next_token = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()
        # The positions are found on the CPU: a boolean mask on the device would make the host wait for the count.
        valid_positions = (next_token != IGNORE_INDEX).nonzero().squeeze(1)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "valid_positions": valid_positions,
            "targets": next_token[valid_positions],
            "example_ids": [example.get("index") for example in examples],
        }


def num_positions(batch: dict[str, Any]) -> int | Tensor:
    """How many tokens the examples of a micro-batch have; a beginning that they share counts in each of them."""
    return sum(batch["sequence_lengths"]) if "sequence_lengths" in batch else batch["attention_mask"].sum()


def attend_per_sequence(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sequence_lengths: list[int] | None = None,
    shared_length: int = 0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each of the sequences that lie end to end; transformers' attention interface.

    Args:
        query: (1, heads, tokens, head size); key, value: (1, groups, tokens, head size).
        sequence_lengths: None: one sequence; then the query may be its newest token alone.
        shared_length: how many tokens all sequences begin with. Only the first sequence still holds them.
        kwargs: on a GPU the tensors of `for_one_launch`.
    """
    lengths = sequence_lengths or [key.shape[2]]
    if sliding_window is not None and max(lengths) > sliding_window:
        raise UserError(f"a sequence of {max(lengths)} tokens exceeds the model's window: use --no-packing")
    if query.shape[2] == 1:  # generation's cache holds the earlier tokens
        output = F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
        return output.transpose(1, 2), None
    if in_one_launch and dropout == 0 and "cu_seq_lens_q" in kwargs and query.dtype in (torch.bfloat16, torch.float16):
        return attend_in_one_launch(query, key, value, scaling, **kwargs)[None], None
    held = held_lengths(lengths, shared_length)
    # The beginnings are sliced only once, because the gradient of each slice is as large as the whole tensor.
    beginnings = [x[:, :, :shared_length] for x in (query, key, value)]
    outputs = []
    for index, states in enumerate(zip(*(x.split(held, dim=2) for x in (query, key, value)), strict=True)):
        missing = shared_length if index > 0 else 0
        if missing:
            # The queries get the beginning too, because is_causal needs a square matrix. The beginning is short.
            states = [torch.cat(pair, dim=2) for pair in zip(beginnings, states, strict=True)]
        q, k, v = states
        output = F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        outputs.append(output[:, :, missing:].transpose(1, 2))
    return torch.cat(outputs, dim=1), None  # (1, tokens, heads, head size)


def attend_in_one_launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    cu_seq_lens_q: Tensor,
    cu_seq_lens_k: Tensor,
    max_length_q: int,
    max_length_k: int,
    key_positions: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """`attend_per_sequence` by torch's attention for sequences of any lengths, (tokens, heads, head size).

    Its causal mask ends at the last query and the last key, so that the queries of a sequence need not hold the shared
    beginning. The arguments after `scaling` are those of `for_one_launch`.
    """
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if key_positions is not None:
        k, v = k[key_positions], v[key_positions]
    lengths = (cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
    grouped = q.shape[1] != k.shape[1]
    return varlen_attn(q, k, v, *lengths, scale=scaling, window_size=(-1, 0), enable_gqa=grouped)


def held_lengths(lengths: list[int], shared_length: int) -> list[int]:
    """How many tokens of each sequence stand in the row: the shared beginning stands in the first alone."""
    return [lengths[0], *(length - shared_length for length in lengths[1:])]


def for_one_launch(lengths: list[int], shared_length: int, device: torch.device) -> dict[str, Any]:
    """FlashAttention's form of the lengths, under the names that transformers gives it; `key_positions`: the place of
    each sequence's keys, the shared beginning first, where there is one."""
    held = held_lengths(lengths, shared_length)
    parts = [torch.tensor([0, *counts]).cumsum(0) for counts in (held, lengths)]
    if shared_length:
        beginning, rows = torch.arange(shared_length), torch.arange(sum(held)).split(held)
        parts.append(torch.cat([rows[0], *(torch.cat([beginning, own]) for own in rows[1:])]))
    # One copy to the device for all of them.
    on_device = torch.cat(parts).int().to(device, non_blocking=True).split([len(part) for part in parts])
    names = ("cu_seq_lens_q", "cu_seq_lens_k", "key_positions")
    found = dict(zip(names, on_device, strict=False))
    return found | {"max_length_q": max(held), "max_length_k": max(lengths)}


def model_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    """The entries of a batch that the causal language model itself takes."""
    names = ("input_ids", "attention_mask", "position_ids", "sequence_lengths", "shared_length")
    found = {name: inputs[name] for name in names if name in inputs}
    if inputs["input_ids"].is_cuda and "sequence_lengths" in inputs:
        found |= for_one_launch(inputs["sequence_lengths"], inputs.get("shared_length", 0), inputs["input_ids"].device)
    return found


@torch.no_grad()
def enable_packing(model: "transformers.PreTrainedModel") -> bool:
    """Lets `model` take packed batches if a trial agrees with one sequence at a time; returns whether it does. On a GPU
    a second trial attends without torch's attention for sequences of any lengths, if the first one fails."""
    global in_one_launch
    transformers.AttentionInterface.register(PER_SEQUENCE, attend_per_sequence)
    transformers.AttentionMaskInterface.register(PER_SEQUENCE, lambda *args, **kwargs: None)
    before = model.config._attn_implementation
    # FlashAttention's own form for packed sequences cannot share a beginning, so each sequence keeps the whole of it.
    packable, shared = (before, 0) if before == "flash_attention_2" else (PER_SEQUENCE, 2)
    device = device_of(model.get_input_embeddings().weight)

    def states(lengths: list[int], shared: int = 0) -> Tensor:
        """The hidden states of sequences whose token ids count from 2, (tokens, d)."""
        held = [torch.arange(shared if row else 0, length) for row, length in enumerate(lengths)]
        positions = torch.cat(held)[None].to(device)
        batch = {"input_ids": positions + 2, "position_ids": positions}
        inputs = model_inputs(batch | {"sequence_lengths": lengths, "shared_length": shared})
        return model.get_decoder()(**inputs, use_cache=False).last_hidden_state[0].float()

    fits = False
    for at_once in (True, False) if device.type == "cuda" else (False,):
        in_one_launch = at_once
        with contextlib.suppress(TypeError, ValueError, RuntimeError), gathered_module_by_module(model):
            model.set_attn_implementation(packable)
            packed = states([5, 8], shared)
            model.set_attn_implementation(before)
            alone = torch.cat([states([5]), states([8])[shared:]])
            fits = torch.allclose(packed, alone, rtol=1e-2, atol=1e-2 * float(alone.abs().max()))
        if fits:
            break
    model.set_attn_implementation(packable if fits else before)
    return fits


def obstacle_to_packing(
    model: "transformers.PreTrainedModel", attention: str | None, lengths: Iterable[int]
) -> str | None:
    """The reason why `model` cannot take packed batches, in a few words; if it can, prepares it and returns None.

    Args:
        attention: the attention that the user named. lengths: the sequences' lengths.
    """
    if attention == "eager":  # packing would replace eager attention by another
        return "attends eagerly"
    window = getattr(model.config, "sliding_window", None)
    longest = max(lengths) if window else 0
    if window and longest > window:
        return f"attends {window} tokens of {longest}"
    return None if enable_packing(model) else "cannot attend to packed sequences"
