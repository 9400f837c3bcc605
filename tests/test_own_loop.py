"""docs/own-loop.md: the bare loop and TRL's, run as they stand there, train the same adapter; the trap is one."""

import functools
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
from conftest import ROOT, free_port, make_model, make_tokenizer, relative_error, write_jsonl
from safetensors.torch import load_file
from tokenizers import processors

import train
from common.layers import TARGET_MODULES

BARE, TRL = re.findall(r"```python\n(.*?)```", (ROOT / "docs/own-loop.md").read_text(), re.DOTALL)


needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="no TRL: sh scripts/test.sh installs it")


def trained(script: str, base: Path, folder: Path, *launcher: str) -> dict[str, torch.Tensor]:
    """ΔW by layer after one of the page's scripts on 16 examples."""
    rows = ({"prompt": f"Add {i} and 1: ", "completion": f"it is {i + 1}{'!' * (i % 5)}"} for i in range(16))
    data = write_jsonl(folder.with_suffix(".jsonl"), rows)
    program = folder.with_name(f"loop_{folder.name}.py")
    program.write_text(script)
    command = [sys.executable, *launcher, program, base, data, folder]
    variables = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stderr[-3000:]
    factors = load_file(folder / "adapter_model.safetensors")
    names = {name.partition(".lora_")[0] for name in factors}
    return {name: factors[f"{name}.lora_B.weight"] @ factors[f"{name}.lora_A.weight"] for name in names}


def require_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys() and len(found) == 2 * len(TARGET_MODULES)
    for name in expected:
        assert relative_error(found[name], expected[name]) < 1e-3, name
        assert expected[name].norm() > 1e-3, name  # trained: ΔW starts at 0


@needs_trl
def test_both_loops_train_the_same_adapter_and_peft_loads_it(tmp_path):
    tokenizer, checkpoint = make_tokenizer(), tmp_path / "base"
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    begin = {"single": "<s> $A", "pair": "<s> $A $B", "special_tokens": [("<s>", tokenizer.bos_token_id)]}
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(**begin)
    tokenizer.save_pretrained(checkpoint)
    make_model(vocab_size=260).save_pretrained(checkpoint)
    require_same(*(trained(script, checkpoint, tmp_path / name) for name, script in (("bare", BARE), ("trl", TRL))))
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    ids = torch.arange(20)[None]
    before = model(ids).logits
    assert relative_error(peft.PeftModel.from_pretrained(model, tmp_path / "bare")(ids).logits, before) > 1e-3


@needs_trl
def test_two_ranks_of_trl_end_where_one_process_ends(checkpoint, tmp_path):
    """SGD, because Adam takes the same step for a gradient of any size; and λ₃ so large that L_SVDR counts too."""
    changes = {
        '["iclr2026"]': '["iclr2026"] | {"lambda_spectral": 30.0, "regularizer_schedule": "constant"}',
        "logging_steps=1": 'logging_steps=1, use_cpu=True, optim="sgd", gradient_accumulation_steps=2',
    }
    script = functools.reduce(lambda text, change: text.replace(*change), changes.items(), TRL)
    expected = trained(script, checkpoint, tmp_path / "one")
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}")
    script = script.replace("accumulation_steps=2", "accumulation_steps=1")
    require_same(trained(script, checkpoint, tmp_path / "two", *launcher), expected)


def test_dropout_of_the_model_is_off_while_its_adapters_are():
    model = train.add_adapters(make_model(attention_dropout=0.5), "pissa", 4, 4, TARGET_MODULES).train()
    ids = torch.arange(20)[None]
    with train.adapters_disabled(model):
        teacher = model(ids).logits
    assert torch.equal(teacher, make_model()(ids).logits)
    assert model.training and not torch.equal(model(ids).logits, model(ids).logits)


def test_pefts_pissa_has_no_teacher_behind_disable_adapter():
    ids = torch.arange(20)[None]
    published = make_model()(ids).logits[0]
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=TARGET_MODULES, init_lora_weights="pissa")
    theirs = peft.get_peft_model(make_model(), config)
    with theirs.disable_adapter():
        their_teacher = theirs(ids).logits[0]
    assert train.consistency_loss(theirs(ids).logits[0], published, 2.0) < 1e-6  # the model itself is the published one
    assert train.consistency_loss(theirs(ids).logits[0], their_teacher, 2.0) > 0.05
    ours = train.add_adapters(make_model(), "pissa", 4, 4, TARGET_MODULES)
    with train.adapters_disabled(ours):
        our_teacher = ours(ids).logits[0]
    assert train.consistency_loss(ours(ids).logits[0], our_teacher, 2.0) < 1e-6
