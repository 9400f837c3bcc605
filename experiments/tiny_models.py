#!/usr/bin/env python3
"""Tiny random models with the architectures of the published ones, for twins that run everything and mean nothing.

    python experiments/tiny_models.py tiny-llama FOLDER      also tiny-mistral, tiny-gemma, tiny-roberta, tiny-t5

Their shapes are in data/shapes/. The tokenizer knows bytes; except T5's, its end-of-sequence token is
the padding token too.
"""

import json
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast

from common.cli import UserError, run_script

ROOT = Path(__file__).resolve().parent.parent

NAMES = ("tiny-llama", "tiny-mistral", "tiny-gemma", "tiny-roberta", "tiny-t5")
EOS, PAD = "<|end|>", "<|pad|>"


def make_tokenizer(*, closes: bool) -> PreTrainedTokenizerFast:
    """A token per byte. `closes`: every text ends with the end-of-sequence token, as T5's do, and padding is another
    token, since T5's classifier looks for the last end of a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*alphabet, EOS, *([PAD] if closes else [])])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if closes:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {EOS}", pair=f"$A {EOS} $B {EOS}", special_tokens=[(EOS, vocab[EOS])]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD if closes else EOS)


def make(name: str, folder: Path, seed: int = 0) -> None:
    """Writes the model and its tokenizer, whole or not at all."""
    tokenizer = make_tokenizer(closes=name == "tiny-t5")
    settings = json.loads((ROOT / "data" / "shapes" / f"{name}.json").read_text())
    end = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    if name == "tiny-t5":
        end["decoder_start_token_id"] = tokenizer.pad_token_id
    config = AutoConfig.for_model(settings.pop("model_type"), **settings, **end)
    torch.manual_seed(seed)
    kind = AutoModelForCausalLM if "architectures" in settings else AutoModel
    model = kind.from_config(config, dtype=torch.float32)
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def main(argv: list[str]) -> None:
    if len(argv) != 2 or argv[0] not in NAMES:
        raise UserError(f"expected one of {', '.join(NAMES)} and a folder")
    make(argv[0], Path(argv[1]))


if __name__ == "__main__":
    run_script(main)
