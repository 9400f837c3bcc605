"""Adapters in PEFT's file format: an ordinary LoRA on the unmodified base, written and read."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open
from torch import Tensor, nn

from common.cli import UserError, first_line
from common.templates import ALPACA_PROMPT
from common.tensors import save_tensors


def export_adapter(
    layers: Mapping[str, Any],
    folder: Path,
    base_model: str,
    target_modules: list[str],
    task_type: str,
    modules_to_save: Mapping[str, nn.Module] | None = None,
    *,
    revision: str | None = None,
) -> int:
    """Writes the adapters as an ordinary LoRA on the unmodified base, in PEFT's format; returns its rank, PiSSA's 2r.

    Args:
        layers: the adapted layers (train.py's LoRALinear) by name.
        modules_to_save: trained modules by name, such as a classifier, that are stored whole beside the adapters.
        revision: the base's revision on the hub.
    """
    tensors = {}
    for name, layer in layers.items():
        A, B = layer.stacked_factors()
        tensors[f"base_model.model.{name}.lora_A.weight"] = A.detach().cpu().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = B.detach().cpu().contiguous()
    for name, module in (modules_to_save or {}).items():
        for key, tensor in module.state_dict().items():
            tensors[f"base_model.model.{name}.{key}"] = tensor.detach().cpu().contiguous()
    rank = len(A)
    metadata = {"format": "pt"}
    if layer.initial_A is not None:
        metadata["principal_rank"] = str(len(layer.lora_A))  # the trained part of the stacked rank
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        # The whole path of a folder: AutoPeft would look for a relative one from wherever it is called.
        "base_model_name_or_path": str(Path(base_model).absolute()) if Path(base_model).is_dir() else base_model,
        "revision": revision,
        "r": rank,
        "lora_alpha": layer.scaling * rank,
        "target_modules": target_modules,
        "modules_to_save": list(modules_to_save) if modules_to_save else None,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(tensors, folder / "adapter_model.safetensors", metadata)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return rank


def adapter_card(args: Any, rank: int, about: Mapping[str, Any] | None = None) -> str:
    """README.md of an exported adapter that is stored with `rank`: its base, its training, and how to load it.

    Args:
        about: `scale` of ΔW if it was set after training, and `why`; `unfinished`: how far the training was.
    """
    front = {"base_model": args.model, "library_name": "peft", "tags": ["lora", args.method]}
    if Path(args.model).is_dir():  # the hub refuses a card whose base_model is no repository
        del front["base_model"]
    settings = {
        "base model": args.model + (f", revision {args.model_revision}" if args.model_revision else ""),
        "method": args.method
        + (" with the three terms" if args.regularize else "")
        + (f", formulation {args.formulation}" if args.has_terms else ""),
        "data, template": f"{args.data}, {args.template}",
        "rank, alpha": f"{args.rank}, {args.alpha:g}"
        + (f"; stored as a LoRA of rank {rank}" if rank != args.rank else ""),
        "target modules": ", ".join(args.target_modules),
        "learning rate, epochs, seed": f"{args.learning_rate:g}, {args.epochs:g}, {args.seed}",
    }
    if args.has_terms:
        weights = [f"{name[7:]} {value:g}" for name, value in vars(args).items() if name.startswith("lambda_")]
        settings["weights λ of the terms"] = ", ".join(weights) + (", without the target" if args.mask_target else "")
    if about and about.get("unfinished"):
        settings["not trained to the end"] = about["unfinished"]
    if about and about["scale"] != 1:
        why = f": {about['why']}, on {about['held_out_examples']} held-out examples" if "why" in about else ""
        settings["scaled after training"] = f"ΔW times {about['scale']:g}{why}; lora_alpha holds it"
    rows = "".join(f"| {name} | {value} |\n" for name, value in settings.items())
    prompt = "It was trained with the chat template in chat_template.jinja, which a chat endpoint takes.\n\n"
    if args.template == "alpaca":
        prompt += f"An instruction stands in it like this:\n\n```text\n{ALPACA_PROMPT}\n```\n\n"
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# {args.method} adapter of {args.model}\n\n"
        "An ordinary LoRA adapter in PEFT's format, for the base model as it is published"
        + (": the factors are [A; A₀] and [B, −B₀], A₀ and B₀ PiSSA's start.\n\n" if rank != args.rank else ".\n\n")
        + f"| | |\n|---|---|\n{rows}\n"
        "```python\nmodel = AutoModelForCausalLM.from_pretrained(base)\n"
        'model = peft.PeftModel.from_pretrained(model, "this folder")\n```\n\n'
        + prompt
        + f"vLLM serves it as a LoRA with `--enable-lora --max-lora-rank {rank}` or more.\n"
    )


# Fields of PEFT's configurations that do not change the forward pass of plain LoRA, or that `read_adapter` checks. Any
# other field that is not empty has an effect that is not known here.
KNOWN_FIELDS = {
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "auto_mapping", "peft_version"),
    *("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("modules_to_save", "bias", "init_lora_weights", "eva_config", "loftq_config", "corda_config", "lora_ga_config"),
    *("megatron_config", "megatron_core", "qalora_group_size", "runtime_config", "inference_mode"),
}


def _selects(config: Mapping[str, Any], name: str) -> bool:
    """Whether PEFT's target_modules, exclude_modules and layers_to_transform choose the layer `name`."""

    def names(targets: str | list[str] | None) -> bool:
        if isinstance(targets, str):
            return re.fullmatch(targets, name) is not None
        return any(name == target or name.endswith(f".{target}") for target in targets or ())

    layers = config.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    index = re.search(r"\.(\d+)\.", name)
    is_wanted = layers is None or (index is not None and int(index[1]) in layers)
    return is_wanted and names(config.get("target_modules")) and not names(config.get("exclude_modules"))


def classifier_card(args: Any, rank: int, config: Any, is_of_other_size: bool) -> str:
    """README.md of a classifier's adapter that is stored with `rank`: its base, its classes, and how to load it.

    Args:
        is_of_other_size: the base has a trained classifier with another number of classes.
    """
    front = {"base_model": args.model, "library_name": "peft", "tags": ["lora", args.method]}
    is_local = args.model == "demo" or Path(args.model).is_dir()
    if is_local:  # the hub refuses a card whose base_model is no repository
        del front["base_model"]
    predicts = ", ".join(config.id2label.values()) if config.num_labels > 1 else "a number, in the units of the labels"
    # PEFT reads the base's own configuration, which knows neither the classes nor their names.
    classes = f"id2label={config.id2label}" if config.num_labels > 1 else "num_labels=1"
    options = "" if is_local else f", {classes}, pad_token_id={config.pad_token_id}"
    options += ", ignore_mismatched_sizes=True" if is_of_other_size else ""
    moved = "\nElsewhere, correct the base's folder in adapter_config.json.\n" if is_local else ""
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# {args.method} classifier on {args.model}\n\n"
        f"An ordinary LoRA adapter of rank {rank} in PEFT's format, with the classifier, for the base as it is "
        f"published.\n\n| | |\n|---|---|\n| predicts | {predicts} |\n| data | {args.data or args.task} |\n"
        f"| rank, alpha | {args.rank}, {args.alpha:g} |\n| target modules | {', '.join(args.target_modules)} |\n"
        f"| learning rate, epochs, seed | {args.learning_rate:g}, {args.epochs:g}, {args.seed} |\n\n"
        f'```python\npeft.AutoPeftModelForSequenceClassification.from_pretrained("this folder"{options})\n```\n{moved}'
    )


def link_base(folder: Path, base: Path, config: Any) -> None:
    """Makes `folder` a copy of the local `base` as a classifier: links to its weights, and the configuration `config`
    with the classes. An adapter that names this folder loads in PEFT without further arguments."""
    config.save_pretrained(folder)
    for file in base.glob("*.safetensors*"):
        (folder / file.name).symlink_to(file.resolve())


@dataclass
class InitialAdapter:
    """An adapter in PEFT's format that a run starts from."""

    folder: Path
    rank: int
    alpha: float
    target_modules: list[str]
    factors: dict[str, tuple[Tensor, Tensor]]  # A (R × in) and B (out × R) by layer name
    principal_rank: int | None  # in our files: so many first rows of R are trained, the others are PiSSA's start
    is_pissa: bool  # PEFT's PiSSA: A₀ and B₀ are the weight's own
    config: dict[str, Any]  # its adapter_config.json

    def require_fit(self, layers: dict[str, nn.Linear]) -> None:
        """Raises a UserError where the adapter does not fit the model's linear layers."""
        for name in layers:
            if name not in self.factors and _selects(self.config, name):
                raise UserError(f"--init-adapter {self.folder} has no factors for {name}: an adapter of another model")
        for name, (A, B) in self.factors.items():
            if name not in layers:
                raise UserError(f"--init-adapter {self.folder} has factors for {name}, which this model lacks")
            if (B.shape[0], A.shape[1]) != (layers[name].out_features, layers[name].in_features):
                raise UserError(f"--init-adapter {self.folder}: {name} has another size than this model's")

    def note(self, model: str) -> str:
        """A line for the user: the adapter's settings, and its base if the path `model` has another name."""
        base = self.config.get("base_model_name_or_path") or model
        is_other = Path(base).name.lower() != Path(model).absolute().name.lower()
        other = f"; it was trained on {base}, not on {model}" if is_other else ""
        return f"note: rank {self.rank}, alpha {self.alpha:g} and the layers are those of {self.folder}{other}"

    def trained_tensors(self, principal_factors: Callable[[str], tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """The `trained_tensors` of a model that starts from this adapter.

        Args:
            principal_factors: gives PiSSA's A₀ and B₀ of a layer's weight by the layer's name.
        """
        tensors = {}
        for name, (A, B) in self.factors.items():
            r = self.rank
            tensors |= {f"{name}.lora_A": A[:r].contiguous(), f"{name}.lora_B": B[:, :r].contiguous()}
            if self.principal_rank is not None:
                initial = (A[r:].contiguous(), -B[:, r:])
            elif self.is_pissa:
                initial = principal_factors(name)
            else:
                continue
            tensors |= {f"{name}.initial_A": initial[0].cpu(), f"{name}.initial_B": initial[1].cpu()}
        return tensors


def read_adapter(folder: Path, method: str) -> InitialAdapter:
    """Reads a LoRA adapter in PEFT's format.

    Raises:
        UserError: not such an adapter, or a kind that this script cannot go on with.
    """
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # OSError, and errors of json and safetensors
        raise UserError(f"--init-adapter {folder} is no adapter in PEFT's format: {first_line(error)}") from error
    start = config.get("init_lora_weights", True)
    unsupported = [name for name, value in config.items() if value and name not in KNOWN_FIELDS]
    if config.get("peft_type") != "LORA" or unsupported or config.get("bias", "none") != "none":
        kind = ", ".join(unsupported) or f"peft_type {config.get('peft_type')}, bias {config.get('bias')}"
        raise UserError(f"--init-adapter {folder}: training can continue from plain LoRA only, not {kind}")
    if start not in (True, False, "gaussian", "eva", "orthogonal", "pissa"):
        raise UserError(f"--init-adapter {folder}: {start} changed the base's weights; convert it to a LoRA with PEFT")
    others = [name for name in tensors if not name.endswith((".lora_A.weight", ".lora_B.weight"))]
    if others:
        raise UserError(
            f"--init-adapter {folder}: training can continue from factors of linear layers only, not {others[0]}"
        )
    prefix, factors = "base_model.model.", {}
    for name in tensors:
        if name.endswith(".lora_A.weight"):
            layer = name.removesuffix(".lora_A.weight")
            factors[layer.removeprefix(prefix)] = (tensors[name], tensors[f"{layer}.lora_B.weight"])
    principal_rank = int(metadata["principal_rank"]) if "principal_rank" in metadata else None
    is_pissa = start == "pissa"
    if (is_pissa or principal_rank is not None) and method == "lora":
        raise UserError(f"--init-adapter {folder} is a PiSSA adapter: go on with --method pissa or ba-lora")
    rank = principal_rank or config["r"]
    alpha = config["lora_alpha"] * rank / config["r"]
    return InitialAdapter(folder, rank, alpha, sorted(factors), factors, principal_rank, is_pissa, config)
