"""Adapters against the base model, PEFT, and the published parameter counts."""

import json
import math
import re
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers
from architectures import LATENT, ROUTED, SHAPE
from conftest import PUBLISHED, ROOT, encode_turn, make_model, make_tokenizer, relative_error
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_docs import fences

import train
from common import exports
from common.cli import RunStopped, UserError
from common.exports import export_adapter
from common.layers import TARGET_MODULES
from common.templates import encode_prompt
from common.tensors import save_tensors

METHODS = ["lora", "pissa", "ba-lora"]
INPUT_IDS = torch.randint(256, (2, 9), generator=torch.Generator().manual_seed(0))


def perturb(model: torch.nn.Module) -> None:
    """Moves the trainable factors away from their start, as training would."""
    generator = torch.Generator().manual_seed(1)
    for layer in train.adapter_layers(model).values():
        for factor in (layer.lora_A, layer.lora_B):
            factor.data += 0.05 * torch.randn(factor.shape, generator=generator)


@pytest.mark.parametrize("alpha", [4, 16])
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_adding_adapters_changes_nothing(method, alpha):
    base, model = make_model(), make_model()
    assert train.add_adapters(model, method, 4, alpha, TARGET_MODULES) is model
    expected = base(INPUT_IDS).logits
    assert relative_error(model(INPUT_IDS).logits, expected) < 1e-5
    perturb(model)
    assert relative_error(model(INPUT_IDS).logits, expected) > 1e-3
    with train.adapters_disabled(model):
        assert torch.equal(model(INPUT_IDS).logits, expected)
    assert relative_error(model(INPUT_IDS).logits, expected) > 1e-3  # on again
    base_weights = dict(base.named_parameters())
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, base_weights[name.replace(".base.", ".")])


def test_adapters_come_back_on_after_an_error(model):
    train.add_adapters(model, "pissa", 4, 4, ["q_proj"])
    with pytest.raises(RuntimeError), train.adapters_disabled(model):
        raise RuntimeError
    assert all(layer.enabled for layer in train.adapter_layers(model).values())


@pytest.mark.parametrize("kind", ["deepseek_v2", "glm4_moe"])
def test_layers_that_peft_takes_for_others_get_no_adapter(kind):
    """PEFT reads a mixture's down_proj as parameters of its experts."""
    more = ROUTED | (LATENT if kind == "deepseek_v2" else {"head_dim": 16})
    config = transformers.AutoConfig.for_model(kind, **SHAPE | more)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match="PEFT would read the adapter otherwise at model"):
        train.add_adapters(model, "lora", 4, 4, ["gate_proj", "up_proj", "down_proj"])
    named = {name for name, module in model.named_modules() if name.endswith(("gate_proj", "up_proj", "down_proj"))}
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["gate_proj", "up_proj", "down_proj"]))
    factors = {name for name, _ in theirs.named_parameters() if "lora_A" in name}
    assert {re.sub(r"base_model\.model\.(.*)\.lora_A.*", r"\1", name) for name in factors} != named


def test_only_the_factors_of_lora_are_drawn():
    """Layer by layer, so that the seed alone decides the start of training."""
    model = make_model()
    torch.manual_seed(5)
    train.add_adapters(model, "lora", 4, 4, TARGET_MODULES)
    torch.manual_seed(5)
    for layer in train.adapter_layers(model).values():
        drawn = torch.nn.init.kaiming_uniform_(torch.empty(4, layer.base.in_features), a=math.sqrt(5))
        assert torch.equal(layer.lora_A, drawn)


@pytest.mark.parametrize("targets", [["all-linear"], [r".*\.1\..*(q|up)_proj"], None, ["q_proj", "mlp.up_proj"]])
@torch.no_grad()
def test_peft_takes_the_targets_that_the_adapters_were_added_by(targets, tmp_path):
    model = train.add_adapters(make_model(), "pissa", 4, 4, targets)
    perturb(model)
    export_adapter(train.adapter_layers(model), tmp_path, "base", targets, "CAUSAL_LM")
    theirs = peft.PeftModel.from_pretrained(make_model(), tmp_path)
    assert relative_error(theirs(INPUT_IDS).logits, model(INPUT_IDS).logits) < 1e-5
    assert relative_error(theirs(INPUT_IDS).logits, make_model()(INPUT_IDS).logits) > 1e-3


def test_autocast_computes_an_adapted_layer_in_its_type():
    """As TRL's default, bf16=True, does with a model in fp32; compared with y = W x + B A x in fp32."""
    torch.manual_seed(0)
    layer, x = train.LoRALinear(torch.nn.Linear(16, 12), 4, 4), torch.randn(5, 16, requires_grad=True)
    layer.lora_B.data.normal_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    plain = torch.nn.functional.linear(x, layer.base.weight, layer.base.bias) + x @ layer.lora_A.T @ layer.lora_B.T
    tensors = (x, layer.lora_A, layer.lora_B)
    found, expected = (torch.autograd.grad(of.float().square().sum(), tensors) for of in (y, plain))
    for ours, theirs in zip((y, *found), (plain, *expected), strict=True):
        assert relative_error(ours.float(), theirs) < 2e-2


def test_adapters_are_added_once():
    """A second call would freeze the first one's factors, and an export has one scale for all."""
    model = train.add_adapters(make_model(), "pissa", 4, 4, ["q_proj"])
    with pytest.raises(UserError, match="has adapters already"):
        train.add_adapters(model, "pissa", 4, 8, ["gate_proj"])
    train.add_adapters(train.merge_adapters(model), "lora", 4, 8, ["gate_proj"])
    assert all(name.endswith("gate_proj") for name in train.adapter_layers(model))


@torch.no_grad()
def test_an_adapter_of_a_wrapped_model_has_the_names_of_the_model_itself(tmp_path):
    model = train.add_adapters(make_model(), "pissa", 4, 4, TARGET_MODULES)
    perturb(model)
    expected = model(INPUT_IDS).logits
    wrappers = [torch.compile, train.BALoRAModel, torch.nn.DataParallel]
    for number, wrapped in enumerate([*(wrap(model) for wrap in wrappers), torch.compile(train.BALoRAModel(model))]):
        export_adapter(train.adapter_layers(wrapped), tmp_path / str(number), "base", TARGET_MODULES, "CAUSAL_LM")
        theirs = peft.PeftModel.from_pretrained(make_model(), tmp_path / str(number))
        assert relative_error(theirs(INPUT_IDS).logits, expected) < 1e-5
    train.merge_adapters(wrapped)
    assert not train.adapter_layers(model)
    assert relative_error(model(INPUT_IDS).logits, expected) < 1e-5


def test_only_the_factors_train_and_they_are_fp32():
    model = make_model().to(torch.bfloat16)
    train.add_adapters(model, "ba-lora", 4, 4, TARGET_MODULES)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * 7 * 2  # two factors, seven projections, two layers
    assert all(name.endswith(("lora_A", "lora_B")) and p.dtype == torch.float32 for name, p in trainable.items())
    assert model(INPUT_IDS).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("alpha", [4, 16])
@pytest.mark.parametrize("name", ["q_proj", "k_proj", "gate_proj", "down_proj"])
def test_pissa_starts_at_the_best_low_rank_approximation(name, alpha):
    """Against numpy's float64 SVD (Eckart and Young), and the balance |A₀ row| = |B₀ column|."""
    model = make_model()
    train.add_adapters(model, "pissa", 4, alpha, [name])
    for layer in train.adapter_layers(model).values():
        U, S, Vh = torch.linalg.svd(layer.base.weight.double(), full_matrices=False)
        best = (U[:, :4] * S[:4]) @ Vh[:4]
        assert relative_error(layer.scaling * layer.lora_B @ layer.lora_A, best) < 1e-5
        assert torch.allclose(layer.lora_A.norm(dim=1), layer.lora_B.norm(dim=0), rtol=1e-4)


@pytest.mark.parametrize("alpha", [4, 16])
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_peft_and_transformers_load_what_was_trained(method, alpha, tmp_path):
    """The adapter on the unmodified base; the merged model, which is plain."""
    model = make_model()
    train.add_adapters(model, method, 4, alpha, TARGET_MODULES)
    perturb(model)
    export_adapter(train.adapter_layers(model), tmp_path, "some/base", TARGET_MODULES, "CAUSAL_LM")
    expected = model(INPUT_IDS).logits
    loaded = peft.PeftModel.from_pretrained(make_model(), tmp_path)
    assert relative_error(loaded(INPUT_IDS).logits, expected) < 1e-4
    assert relative_error(loaded.merge_and_unload()(INPUT_IDS).logits, expected) < 1e-4
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == (4 if method == "lora" else 8)
    assert config["base_model_name_or_path"] == "some/base"
    train.merge_adapters(model).save_pretrained(tmp_path / "merged")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert relative_error(plain(INPUT_IDS).logits, expected) < 1e-4
    assert plain.state_dict().keys() == make_model().state_dict().keys()


@torch.no_grad()
def test_merging_rounds_once():
    """A bf16 base: the merged weight is the float64 sum, rounded once to bf16 (but for ties of fp32 rounding)."""
    model = make_model().to(torch.bfloat16)
    train.add_adapters(model, "pissa", 4, 4, ["up_proj"])
    perturb(model)
    for layer in train.adapter_layers(model).values():
        A, B, A0, B0 = (f.double() for f in (layer.lora_A, layer.lora_B, layer.initial_A, layer.initial_B))
        exact = layer.base.weight.double() + layer.scaling * (B @ A - B0 @ A0)
        equal = layer.merged_weight() == exact.to(torch.bfloat16)
        assert equal.double().mean() > 0.99


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_of_the_published_table(name):
    config, rank, millions, _ = PUBLISHED[name]
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
        train.add_adapters(model, "lora", rank, rank, TARGET_MODULES)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert round(trainable / 1e6, 1) == millions


def test_full_fine_tuning_trains_everything(model):
    train.add_adapters(model, "full", 4, 4, TARGET_MODULES)
    assert not train.adapter_layers(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("method", "rank", "names", "expected"),
    [
        ("lora", 4, ["q_proj", "query"], r"'query'.*names no linear layer.*q_proj"),
        ("pissa", 17, TARGET_MODULES, r"rank 17 is larger than .*k_proj allows \(16\)"),
        ("dora", 4, ["q_proj"], "dora"),
    ],
)
def test_what_cannot_be_adapted_is_one_line_and_changes_nothing(method, rank, names, expected, model):
    with pytest.raises(UserError, match=expected):
        train.add_adapters(model, method, rank, rank, names)
    assert not train.adapter_layers(model)


def test_lora_starts_like_pefts():
    """The same Kaiming-uniform A and zero B."""
    model, reference = make_model(), make_model()
    train.add_adapters(model, "lora", 4, 8, ["q_proj"])
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"])
    reference = peft.get_peft_model(reference, config)
    bound = 1 / math.sqrt(model.config.hidden_size)  # of Kaiming-uniform with a = √5
    for (_, layer), theirs in zip(
        train.adapter_layers(model).items(),
        [module for module in reference.modules() if isinstance(module, peft.tuners.lora.Linear)],
        strict=True,
    ):
        assert layer.lora_A.abs().max() <= bound
        assert layer.lora_A.std().item() == pytest.approx(theirs.lora_A["default"].weight.std().item(), rel=0.2)
        assert torch.count_nonzero(layer.lora_B) == 0
        assert layer.scaling == theirs.scaling["default"]


def test_cached_factors_are_the_computed_ones(tmp_path):
    """The second model reads what the first wrote; another weight, rank or alpha is computed anew."""
    for alpha, seed, num_files in ((4, 0, 4), (4, 0, 4), (8, 0, 8), (4, 1, 12)):
        cached, computed = make_model(seed), make_model(seed)
        train.add_adapters(cached, "pissa", 4, alpha, ["q_proj", "up_proj"], cache=tmp_path)
        train.add_adapters(computed, "pissa", 4, alpha, ["q_proj", "up_proj"])
        assert len(list(tmp_path.iterdir())) == num_files
        for mine, other in zip(
            train.adapter_layers(cached).values(), train.adapter_layers(computed).values(), strict=True
        ):
            assert torch.equal(mine.initial_A, other.initial_A)
            assert torch.equal(mine.lora_B, other.lora_B)


@pytest.mark.parametrize("decay", [1e-4, 1e-2, 1.0])
def test_principal_factors_of_weights_with_a_steep_spectrum(decay):
    """σ_r far below σ₁, where squaring in fp32 would lose it: the residual is the best one's to 1e-4."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(60, 60, generator=generator, dtype=torch.float64)).Q for _ in range(2))
    sigma = torch.logspace(0, math.log10(decay), 60, dtype=torch.float64)
    weight = ((left * sigma) @ right.T).float()
    A, B = train.principal_factors(weight, 40, 1.0)
    residual = (weight.double() - B.double() @ A.double()).norm()
    assert residual <= 1.0001 * sigma[40:].norm() + 1e-6


def test_the_same_tensors_are_the_same_bytes(tmp_path):
    """safetensors alone writes several entries of metadata in another order each time; what it reads stays the same."""
    tensors = {name: torch.arange(5.0) * number for number, name in enumerate("bca")}
    metadata = {name: name * 3 for name in ("principal_rank", "format", "é", "x", "y", "z")}
    written = set()
    for number in range(8):
        path = tmp_path / f"{number}.safetensors"
        save_tensors(tensors, path, metadata)
        written.add(path.read_bytes())
    assert len(written) == 1
    with safe_open(path, "pt") as file:
        assert file.metadata() == metadata
        assert all(torch.equal(file.get_tensor(name), tensors[name]) for name in tensors)


# ---------------------------------------------------------------------------------------------- what goes out


@pytest.mark.parametrize(
    ("rope", "classic"),
    [
        ({"rope_type": "default", "rope_theta": 5e5}, {"rope_theta": 5e5}),
        (
            {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "partial_rotary_factor": 0.5},
            {
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
                "rope_scaling": {"rope_type": "yarn", "type": "yarn", "factor": 4.0},
            },
        ),
        (
            {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0], "original_max_position_embeddings": 64},
            {
                "rope_theta": 1e4,
                "original_max_position_embeddings": 64,
                "rope_scaling": {"type": "longrope", "short_factor": [1.0]},
            },
        ),
        (
            {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
            {
                "rope_theta": 1e6,
                "rope_local_base_freq": 1e4,
                "rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 8.0},
            },
        ),
        (None, {}),
    ],
)
def test_rotary_settings_by_the_names_of_transformers_4(rope, classic):
    """As the configurations of Llama, Phi-3 and Gemma-3 in transformers 4.57 read them."""
    assert exports.classic_rope({"rope_parameters": rope}) == classic


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run on a tiny Llama with a theta of its own, and its base."""
    folder = tmp_path_factory.mktemp("exports")
    model = make_model()
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 500000.0}
    model.save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    (folder / "data.jsonl").write_text(json.dumps({"instruction": "Add 1 and 1", "output": "2"}) + "\n")
    trained(folder / "base", folder, folder / "out", "--save-steps", 200, "--model-revision", "v1")
    return folder


def trained(base: Path, run_folder: Path, out: Path, *options: object) -> Path:
    """The folder of a run of two steps on `base`."""
    files = ("--model", base, "--data", run_folder / "data.jsonl", "--output-dir", out)
    settings = ("--rank", 4, "--max-steps", 2, "--learning-rate", "1e-2", "--save-steps", 0, "--logging-steps", 1)
    train.main([*map(str, (*files, *settings, *options))])
    return out


def test_what_goes_out_is_readable_without_transformers_5(run_folder):
    config = json.loads((run_folder / "out" / "merged" / "config.json").read_text())
    assert (config["rope_theta"], config["rope_parameters"]["rope_theta"]) == (500000.0, 500000.0)
    assert config["torch_dtype"] == config["dtype"] == "float32"
    for name in ("merged", "adapter"):
        tokenizer = json.loads((run_folder / "out" / name / "tokenizer_config.json").read_text())
        assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert not tokenizer.keys() & {"backend", "is_local", "local_files_only"}
        assert "generation %}" not in (run_folder / "out" / name / "chat_template.jinja").read_text()
    assert json.loads((run_folder / "out" / "adapter" / "adapter_config.json").read_text())["revision"] == "v1"


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_tensor(path: Path, name: str, edit: object) -> None:
    """Puts what `edit` makes of it in the place of a tensor; None takes it out."""
    tensors = load_file(path)
    changed = edit(tensors.pop(name).clone())
    save_file(tensors | ({} if changed is None else {name: changed.contiguous()}), path, metadata={"format": "pt"})


def edit_tokenizer(out: Path, edit: object) -> None:
    path = out / "merged" / "tokenizer.json"
    content = json.loads(path.read_text())
    edit(content["model"])
    path.write_text(json.dumps(content))


def exchange(model: dict) -> None:
    """Two bytes that no text has."""
    model["vocab"]["ú"], model["vocab"]["û"] = model["vocab"]["û"], model["vocab"]["ú"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


MERGED, ADAPTER = Path("merged", "model.safetensors"), Path("adapter", "adapter_model.safetensors")
Q_PROJ, NORM = "model.layers.1.self_attn.q_proj.weight", "model.norm.weight"
A_FACTOR = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
FAULTS = {
    "a sign in an adapted layer": lambda out: edit_tensor(out / MERGED, Q_PROJ, lambda x: x * (1 - 2 * (x == x[0, 0]))),
    "a number in another tensor": lambda out: edit_tensor(out / MERGED, NORM, lambda x: x.index_fill(0, INDEX, 1.0001)),
    "the first number of another": lambda out: edit_tensor(out / MERGED, NORM, lambda x: x + (x == x[0])),
    "a tensor gone": lambda out: edit_tensor(out / MERGED, NORM, lambda x: None),
    "another shape": lambda out: edit_tensor(out / MERGED, NORM, lambda x: x[:-1]),
    "another type": lambda out: edit_tensor(out / MERGED, Q_PROJ, lambda x: x.bfloat16()),
    "merged weights cut": lambda out: cut(out / MERGED),
    "adapter cut": lambda out: cut(out / ADAPTER),
    "a factor": lambda out: edit_tensor(out / ADAPTER, A_FACTOR, lambda x: x * 1.01),
    "a factor gone": lambda out: edit_tensor(out / ADAPTER, A_FACTOR, lambda x: None),
    "alpha": lambda out: edit_json(out / "adapter" / "adapter_config.json", lora_alpha=5),
    "a target left out": lambda out: edit_json(out / "adapter" / "adapter_config.json", target_modules=["q_proj"]),
    "a wrong base": lambda out: edit_json(
        out / "adapter" / "adapter_config.json", base_model_name_or_path=str(other_base(out))
    ),
    "theta": lambda out: edit_json(
        out / "merged" / "config.json", rope_theta=1e4, rope_parameters={"rope_type": "default", "rope_theta": 1e4}
    ),
    "the end token": lambda out: edit_json(out / "adapter" / "generation_config.json", eos_token_id=3),
    "sampling": lambda out: edit_json(out / "merged" / "generation_config.json", do_sample=True),
    "a merge of the tokenizer": lambda out: edit_tokenizer(out, lambda model: model["merges"].pop()),
    "two tokens exchanged": lambda out: edit_tokenizer(out, exchange),
    "the tokenizer's end": lambda out: edit_json(out / "adapter" / "tokenizer_config.json", eos_token="!"),
    "the chat template": lambda out: (out / "merged" / "chat_template.jinja").write_text("{{ messages }}"),
}
INDEX = torch.tensor([3])


def other_base(out: Path) -> Path:
    folder = out.parents[1] / "another"
    make_model(seed=5).save_pretrained(folder)
    return folder


def export_with(fault: str, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--export-from, with a fault put in between the writing and the reading back."""
    require_same = exports.ReadBack.require_same

    def damaged(self, folder, *args):
        FAULTS[fault](folder)
        require_same(self, folder, *args)

    monkeypatch.setattr(exports.ReadBack, "require_same", damaged)
    with pytest.raises(RunStopped, match=r"reading back: .*give this command again"):
        train.main(["--export-from", str(out), "--overwrite"])


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_export_is_found_and_the_checkpoint_stays(fault, run_folder, tmp_path, monkeypatch):
    shutil.copytree(run_folder / "out", tmp_path / "out")
    before = sorted((tmp_path / "out").rglob("*"))
    export_with(fault, tmp_path / "out", monkeypatch)
    assert before == sorted((tmp_path / "out").rglob("*"))
    monkeypatch.undo()
    train.main(["--export-from", str(tmp_path / "out"), "--overwrite"])


FOUND_BY_LOADING = {"a number in another tensor", "alpha", "a target left out", "a wrong base", "theta"}


@pytest.mark.parametrize("fault", sorted(FAULTS.keys() - FOUND_BY_LOADING))
def test_a_model_that_does_not_fit_twice_is_read_back_in_part(fault, run_folder, tmp_path, monkeypatch):
    """The factors and W + ΔW of a sample, and of every tensor the shape and the first and last row."""
    monkeypatch.setattr(exports, "FITTING_GIB", 0)
    monkeypatch.setattr(exports.ReadBack, "_require_loaded", lambda *args: pytest.fail("loaded again"))
    shutil.copytree(run_folder / "out", tmp_path / "out")
    export_with(fault, tmp_path / "out", monkeypatch)


@pytest.mark.parametrize("options", [("--dtype", "bfloat16"), (), ("--method", "full")])
@pytest.mark.parametrize("fits", [True, False])
def test_a_tensor_that_the_architecture_keeps_in_fp32_goes_out_as_it_came(
    options, fits, run_folder, tmp_path, monkeypatch
):
    """DeepSeek-V3's selection biases lie close together; rounded to bf16 they choose other experts."""
    monkeypatch.setattr(exports, "FITTING_GIB", 32 * fits)
    name, base = "model.layers.1.mlp.gate.e_score_correction_bias", tmp_path / "base"
    config = transformers.DeepseekV3Config(**SHAPE | LATENT | ROUTED)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.get_buffer(name).data = 10.16 + torch.tensor([0.001, 0.002, 0.003, 0.004])
    model.save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    out = trained(base, run_folder, tmp_path / "out", "--save-steps", 200, *options)
    before, after = (load_file(folder / "model.safetensors") for folder in (base, out / "merged"))
    assert torch.equal(after[name], 10.16 + torch.tensor([0.001, 0.002, 0.003, 0.004]))
    assert {name: tensor.dtype for name, tensor in after.items()} == {n: t.dtype for n, t in before.items()}
    assert json.loads((out / "merged" / "config.json").read_text())["dtype"] == "bfloat16"
    rounded = lambda out: edit_tensor(out / MERGED, name, lambda x: x.bfloat16().float())  # noqa: E731
    monkeypatch.setitem(FAULTS, "biases in bf16", rounded)
    export_with("biases in bf16", out, monkeypatch)


CHOICES = {  # PEFT's ways to choose layers
    "layers_to_transform": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
    "exclude_modules": {"target_modules": ["q_proj"], "exclude_modules": ["model.layers.0.self_attn.q_proj"]},
    "regular expression": {"target_modules": r".*layers\.0\..*(q|v)_proj"},
}


@pytest.mark.parametrize("choice", CHOICES)
def test_an_adapter_of_some_layers_can_be_gone_on_from(choice, run_folder, tmp_path, monkeypatch, capsys):
    """A note says what is taken from it, and its base where that has another name; a relative base is stored whole."""
    monkeypatch.chdir(run_folder)
    base = Path("base")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    peft.get_peft_model(model, peft.LoraConfig(r=4, **CHOICES[choice])).save_pretrained(tmp_path / "adapter")
    before = load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    for start, out in ((tmp_path / "adapter", "first"), (tmp_path / "first" / "adapter", "second")):
        trained(base, run_folder, tmp_path / out, "--method", "lora", "--init-adapter", start)
        folder = tmp_path / out / "adapter"
        assert load_file(folder / "adapter_model.safetensors").keys() == before
        assert peft.PeftConfig.from_pretrained(folder).base_model_name_or_path == str(run_folder / "base")
        assert re.findall("^note: rank 4, alpha 8 .*", capsys.readouterr().out, re.M) == [
            f"note: rank 4, alpha 8 and the layers are those of {start}"
        ]
    edit_json(folder / "adapter_config.json", base_model_name_or_path="hub/other")
    trained(base, run_folder, tmp_path / "third", "--method", "lora", "--init-adapter", folder)
    assert "; it was trained on hub/other, not on base\n" in capsys.readouterr().out


def test_targets_as_pefts_users_name_them(model):
    linear = train.find_target_modules(model, ["all-linear"], 4)
    assert {name.rpartition(".")[2] for name in linear} == set(TARGET_MODULES)
    assert list(train.find_target_modules(model, [r".*layers\.1\..*(q|v)_proj"], 4)) == [
        f"model.layers.1.self_attn.{which}_proj" for which in "qv"
    ]


MIXTURE = {
    **{"vocab_size": 258, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4, "moe_intermediate_size": 16},
    **{"num_experts_per_tok": 2, "eos_token_id": 257},
}
GPTQ = {"quant_method": "gptq", "bits": 4}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}
UNTRAINABLE = {
    "an adapter beside the weights": (lambda base: (base / "adapter_config.json").write_text("{}"), "holds an adapter"),
    "GPTQ": (lambda base: edit_json(base / "config.json", quantization_config=GPTQ), r"is quantized \(gptq\)"),
    "bitsandbytes": (lambda base: edit_json(base / "config.json", quantization_config=BNB), "is quantized"),
    "a vision part": (lambda base: another(base, gemma3_with_vision()), r"more than a text model \(gemma3\)"),
    "no embedding for a token of the data": (
        lambda base: new_token(base, "Add 1 and 1"),
        "token 258 of the data is beyond the model's 258 embeddings",
    ),
    "dense layers among experts, all of them adapted": (
        lambda base: another(base, transformers.Qwen3MoeConfig(**MIXTURE, mlp_only_layers=[0])),
        "PEFT would read the adapter otherwise at model.layers.0.mlp",
    ),
}


def another(base: Path, config: transformers.PretrainedConfig) -> None:
    kinds = transformers.AutoModelForImageTextToText if hasattr(config, "vision_config") else None
    (kinds or transformers.AutoModelForCausalLM).from_config(config).save_pretrained(base)


def gemma3_with_vision() -> transformers.PretrainedConfig:
    """As the sizes from 4 B on are published."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    text = sizes | {"vocab_size": 258, "num_key_value_heads": 2, "head_dim": 8}
    vision = sizes | {"image_size": 28, "patch_size": 14}
    return transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)


def mistral3() -> transformers.PretrainedConfig:
    config = gemma3_with_vision()
    text = {name: value for name, value in MIXTURE.items() if "experts" not in name and "moe" not in name}
    vision = {name: getattr(config.vision_config, name) for name in ("image_size", "patch_size")}
    vision |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    return transformers.Mistral3Config(text_config=text | {"model_type": "mistral"}, vision_config=vision)


def new_token(base: Path, token: str) -> None:
    """The tokenizer gets one that the model has no row for."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([token])
    tokenizer.save_pretrained(base)


@pytest.mark.parametrize("kind", UNTRAINABLE)
def test_a_model_that_cannot_be_trained_is_one_line(kind, run_folder, tmp_path):
    shutil.copytree(run_folder / "base", tmp_path / "base")
    edit, expected = UNTRAINABLE[kind]
    edit(tmp_path / "base")
    targets = ["--target-modules", "all-linear"] if "dense layers" in kind else []
    with pytest.raises(UserError, match=expected) as error:
        trained(tmp_path / "base", run_folder, tmp_path / "out", *targets)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out" / "merged").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_merged_has_the_type_of_the_base(dtype, run_folder, tmp_path):
    """W + ΔW, added in fp32, is rounded once: half a unit in the last place of float64's sum, but for ties."""
    make_model().to(dtype).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    out = trained(tmp_path / "base", run_folder, tmp_path / "out")
    merged, base = load_file(out / MERGED), load_file(tmp_path / "base" / "model.safetensors")
    assert {tensor.dtype for tensor in merged.values()} == {dtype}
    assert json.loads((out / "merged" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    factors = load_file(out / ADAPTER)
    A, B = (factors[A_FACTOR.replace("lora_A", f"lora_{which}")].double() for which in "AB")
    name = A_FACTOR.removeprefix("base_model.model.").replace("lora_A.", "")
    exact = base[name].double() + B @ A
    assert ((merged[name].double() - exact).abs() <= 0.501 * torch.finfo(dtype).eps * 2 * exact.abs() + 1e-7).all()
    assert not torch.equal(merged[name], base[name])


def test_a_base_that_decodes_greedily_with_leftover_sampling_values(run_folder, tmp_path):
    shutil.copytree(run_folder / "base", tmp_path / "base")
    settings = {"do_sample": False, "temperature": 0.7, "top_p": 0.9, "top_k": 20, "eos_token_id": 257}
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(settings))
    out = trained(tmp_path / "base", run_folder, tmp_path / "out")
    for name in ("merged", "adapter"):
        written = json.loads((out / name / "generation_config.json").read_text())
        assert not written.keys() & {"temperature", "top_p", "top_k"}  # vLLM would sample by them
        assert not written.get("do_sample")
    model = transformers.AutoModelForCausalLM.from_pretrained(out / "merged").eval()
    with torch.no_grad():
        first = model(INPUT_IDS[:1]).logits[0, -1].argmax()
        assert model.generate(INPUT_IDS[:1], max_new_tokens=1)[0, -1] == first


def test_attention_capped_by_the_configuration_is_capped_in_training(run_folder, tmp_path, capsys):
    """Gemma-2's cap, small enough to be felt: the first loss is that of transformers' eager attention."""
    sizes = {name: value for name, value in MIXTURE.items() if "experts" not in name and "moe" not in name}
    torch.manual_seed(0)
    config = transformers.Gemma2Config(**sizes, attn_logit_softcapping=2.0, initializer_range=0.5)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    out = trained(tmp_path / "base", run_folder, tmp_path / "out")
    assert "attends eagerly" in capsys.readouterr().out
    row = encode_turn(make_tokenizer(), "Add 1 and 1", "2", 512)
    losses = {}
    for attention in ("eager", "sdpa"):
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation=attention)
        with torch.no_grad():
            losses[attention] = float(model(**{name: torch.tensor([ids]) for name, ids in row.items()}).loss)
    found = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])["task"]
    assert found == pytest.approx(losses["eager"], rel=1e-5)
    assert abs(losses["sdpa"] - losses["eager"]) > 1e-2
    with pytest.raises(UserError, match="--attn-implementation sdpa does not cap the attention's logits"):
        trained(tmp_path / "base", run_folder, tmp_path / "sdpa", "--attn-implementation", "sdpa")


def test_the_routers_loss_is_said_to_be_left_out(run_folder, tmp_path, capsys):
    another(tmp_path / "base", transformers.Qwen3MoeConfig(**MIXTURE, output_router_logits=True))
    make_tokenizer().save_pretrained(tmp_path / "base")
    trained(tmp_path / "base", run_folder, tmp_path / "out", "--dry-run")
    assert "the router's loss (output_router_logits) is not part of the objective" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------- what the pages say


def test_the_snippet_for_the_adapter_answers_as_merged_does(run_folder, capsys):
    """As it stands in the page, with this run's folder in the place of output/mine."""
    page = (ROOT / "docs" / "own-model.md").read_text()
    (snippet,) = [block for language, block in fences(page) if language == "python" and "AutoPeft" in block]
    assert snippet.count("output/mine") == 1
    exec(snippet.replace("output/mine", str(run_folder / "out")), {})
    answer = capsys.readouterr().out
    merged = transformers.AutoModelForCausalLM.from_pretrained(run_folder / "out" / "merged")
    tokenizer = transformers.AutoTokenizer.from_pretrained(run_folder / "out" / "merged")
    prompt = encode_prompt(tokenizer, re.search(r'"content": "(.*?)"', snippet)[1])
    tokens = merged.generate(torch.tensor([prompt]), max_new_tokens=256, do_sample=False)[0, len(prompt) :]
    assert answer == tokenizer.decode(tokens, skip_special_tokens=True) + "\n"


@pytest.mark.parametrize("config", [gemma3_with_vision, mistral3])
def test_the_language_model_of_a_larger_one_is_saved_as_the_page_says(config, run_folder, tmp_path):
    torch.manual_seed(0)
    another(tmp_path / "whole", config())
    make_tokenizer().save_pretrained(tmp_path / "whole")
    page = (ROOT / "docs" / "adapters.md").read_text()
    (snippet,) = [block for language, block in fences(page) if language == "python" and "ImageTextToText" in block]
    snippet = snippet.replace("google/gemma-3-4b-it", str(tmp_path / "whole"))
    exec(snippet.replace("output/text", str(tmp_path / "text")), {})
    whole = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "whole").eval()
    text = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "text").eval()
    with torch.no_grad():
        assert relative_error(text(INPUT_IDS).logits, whole(INPUT_IDS).logits) < 1e-6
    assert (trained(tmp_path / "text", run_folder, tmp_path / "out") / MERGED).is_file()


@pytest.mark.parametrize("method", ["lora", "pissa"])
@torch.no_grad()
def test_which_of_pefts_combinations_are_averages(method, tmp_path):
    """The mean of two weight changes: `cat` and `svd` at a rank that holds both give it, `linear` twice as much."""
    changes, name = [], "model.layers.0.self_attn.q_proj"
    for seed in (1, 2):
        model = make_model()
        train.add_adapters(model, method, 4, 8, TARGET_MODULES)
        layers = train.adapter_layers(model)
        for layer in layers.values():
            for factor in (layer.lora_A, layer.lora_B):
                factor += 0.01 * torch.randn(factor.shape, generator=torch.Generator().manual_seed(seed))
        export_adapter(layers, tmp_path / str(seed), "some/base", TARGET_MODULES, "CAUSAL_LM")
        changes.append(layers[name].merged_weight() - layers[name].base.weight)
    model = peft.PeftModel.from_pretrained(make_model(), tmp_path / "1", adapter_name="1")
    model.load_adapter(tmp_path / "2", "2")
    mean = (changes[0] + changes[1]) / 2
    for kind in ("cat", "svd", "linear"):
        model.add_weighted_adapter(["1", "2"], [0.5, 0.5], kind, combination_type=kind, svd_rank=16)
        found = model.base_model.model.get_submodule(name).get_delta_weight(kind)
        if kind == "linear":
            assert 1.8 < found.norm() / mean.norm() < 2.2
        else:
            assert relative_error(found, mean) < 1e-4
