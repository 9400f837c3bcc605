"""Reads exports as software on transformers 4 does; run by the python of .venv-transformers4.

    .venv-transformers4/bin/python tests/read_by_transformers4.py RUN...   folders with base/, merged/ and adapter/

Writes each one's read.safetensors: the tokens of TEXT, the logits of merged/ and of base/ with adapter/, and the tokens
that merged/ generates.
"""

import sys
from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import save_file

TEXT = "Count to 7, please: naïve 你好 " * 3
MESSAGES = [{"role": "user", "content": "Hi"}]


@torch.no_grad()
def read(run: Path) -> dict[str, torch.Tensor]:
    """The same from any version of transformers."""
    tokenizer, other = (transformers.AutoTokenizer.from_pretrained(run / name) for name in ("merged", "adapter"))
    input_ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
    merged = transformers.AutoModelForCausalLM.from_pretrained(run / "merged").eval()
    base = transformers.AutoModelForCausalLM.from_pretrained(run / "base").eval()
    return {
        "tokens": input_ids,
        "tokens of adapter": torch.tensor([other(TEXT)["input_ids"]]),
        "prompt": torch.tensor(list(tokenizer.apply_chat_template(MESSAGES, tokenize=False).encode())),
        "merged": merged(input_ids).logits,
        "generated": merged.generate(input_ids, max_new_tokens=8, do_sample=False),
        "adapter": peft.PeftModel.from_pretrained(base, run / "adapter")(input_ids).logits,
    }


if __name__ == "__main__":
    assert transformers.__version__.startswith("4."), transformers.__version__
    for word in sys.argv[1:]:
        save_file(read(Path(word)), Path(word, "read.safetensors"))
