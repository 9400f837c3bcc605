"""docs/own-loop.md: the bare loop and TRL's, run as they stand there, train the same adapter; the trap is one."""

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
from conftest import ROOT, make_model, relative_error, write_jsonl

import train
from common.layers import TARGET_MODULES

BARE, TRL = re.findall(r"```python\n(.*?)```", (ROOT / "docs/own-loop.md").read_text(), re.DOTALL)


def lora_weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="no TRL: sh scripts/test.sh installs it")
def test_both_loops_train_the_same_adapter_and_peft_loads_it(checkpoint, tmp_path):
    data = tmp_path / "data.jsonl"
    rows = ({"prompt": f"Add {i} and 1: ", "completion": f"it is {i + 1}{'!' * (i % 5)}"} for i in range(16))
    write_jsonl(data, rows)
    variables = os.environ | {"PYTHONPATH": str(ROOT)}
    for name, script in (("bare", BARE), ("trl", TRL)):
        (tmp_path / f"loop_{name}.py").write_text(script)
        command = [sys.executable, tmp_path / f"loop_{name}.py", checkpoint, data, tmp_path / name]
        done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, env=variables)
        assert done.returncode == 0, done.stderr[-3000:]
    bare, trl = lora_weights(tmp_path / "bare"), lora_weights(tmp_path / "trl")
    assert bare.keys() == trl.keys()
    base = make_model()
    start = {
        name: layer.stacked_factors()
        for name, layer in train.adapter_layers(train.add_adapters(base, "pissa", 4, 4, TARGET_MODULES)).items()
    }
    for name in start:
        key = f"base_model.model.{name}"
        products = [of[f"{key}.lora_B.weight"] @ of[f"{key}.lora_A.weight"] for of in (bare, trl)]
        assert relative_error(products[0], products[1]) < 1e-3
        assert products[0].norm() > 1e-3  # trained: ΔW starts at 0
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    ids = torch.arange(20)[None]
    before = model(ids).logits
    assert relative_error(peft.PeftModel.from_pretrained(model, tmp_path / "bare")(ids).logits, before) > 1e-3


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
