"""A run's files for other programs: merged/ and adapter/, written for transformers 4 and 5 and read back; ΔW scaled."""

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from common import checkpoints, runs, validation
from common.cli import RunStopped, UserError, first_line, option
from common.conversations import encoded, load_training_records
from common.templates import ALPACA_PROMPT, IGNORE_INDEX
from common.tensors import same_bits, save_tensors

if TYPE_CHECKING:
    import datasets
    import transformers
    from transformers import PreTrainedTokenizerBase

SAMPLE_SIZE = 2**28  # how many numbers of adapted weights are compared bit for bit; a small model is compared whole
FITTING_GIB = 32  # a larger model is not loaded again


# Architectures with other names for the rotary settings in transformers 4, and in llama.cpp.
NEOX = {"partial_rotary_factor": "rotary_pct", "rope_theta": "rotary_emb_base"}
MODERN = {"rope_theta": "global_rope_theta", "rope_local_base_freq": "local_rope_theta"}
OWN_NAMES = {"gpt_neox": NEOX, "gpt_neox_japanese": NEOX, "modernbert": MODERN, "modernbert-decoder": MODERN}


def save_merged(model: "transformers.PreTrainedModel", folder: Path, dtype: torch.dtype) -> None:
    """Writes a plain checkpoint for transformers 4 and 5."""
    convert(model, dtype)
    model.save_pretrained(folder)
    model.config.dtype = dtype
    save_config(model.config, folder)


def save_config(config: "transformers.PreTrainedConfig", folder: Path) -> None:
    """Writes config.json with the rotary settings under the names of transformers 4 and 5. The names of 4 are left out
    where 5 would then read the settings differently, as for Gemma-4, which 4 does not know."""
    config.save_pretrained(folder)
    path, rope = folder / "config.json", getattr(config, "rope_parameters", None)
    content = json.loads(path.read_text())
    if "dtype" in content:
        content["torch_dtype"] = content["dtype"]
    for classic in (classic_rope(content), {}):
        path.write_text(json.dumps(content | classic, indent=2, sort_keys=True) + "\n")
        with contextlib.suppress(KeyError, ValueError):
            if not classic or _has_all(type(config).from_pretrained(folder).rope_parameters, rope):
                break


def convert(model: "transformers.PreTrainedModel", dtype: torch.dtype) -> None:
    """Gives each tensor the type that it has where transformers loads the model in `dtype`, in place: fp32 where the
    architecture keeps it so (DeepSeek-V3's e_score_correction_bias), else `dtype`."""
    own, kept = model.dtype, "|".join(model._get_dtype_plan(dtype)).replace("*", ".*")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if kept and tensor.is_floating_point() and re.search(kept, name):
            tensor.data = tensor.data.float()
        elif tensor.dtype == own:
            tensor.data = tensor.data.to(dtype)


def _has_all(found: Any, wanted: Any) -> bool:
    """Whether `found` has every entry of `wanted`, at every depth."""
    if not isinstance(wanted, Mapping):
        return found == wanted
    return isinstance(found, Mapping) and all(_has_all(found.get(name), value) for name, value in wanted.items())


def classic_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Converts the rotary settings in transformers 5's config.json to version 4's `rope_theta`, `rope_scaling` etc."""
    rope = config.get("rope_parameters")
    if not rope:
        return {}
    local = rope.get("sliding_attention") or {}
    whole = dict(rope.get("full_attention") or local or rope)
    kind = whole.pop("rope_type", "default")
    classic = {name: whole.pop(name) for name in ("rope_theta", "partial_rotary_factor") if name in whole}
    if "rope_theta" in local and "full_attention" in rope:
        classic["rope_local_base_freq"] = local["rope_theta"]
    if kind == "longrope":  # Phi-3's configuration wants these names and no others
        length = whole.pop("original_max_position_embeddings", None)
        classic |= {"original_max_position_embeddings": length} if length is not None else {}
        classic["rope_scaling"] = {"type": kind} | whole
    elif kind != "default":
        classic["rope_scaling"] = {"rope_type": kind, "type": kind} | whole
    names = OWN_NAMES.get(config.get("model_type"), {})
    return classic | {own: classic[name] for name, own in names.items() if name in classic}


@torch.no_grad()
def probe_logits(model: nn.Module) -> Tensor:
    """Of two sequences from all over the vocabulary, (2, 12, V) on the CPU, in fp32."""
    training, embedding = model.training, model.get_input_embeddings()
    input_ids = torch.linspace(0, embedding.num_embeddings - 1, 24).long().view(2, 12)
    model.eval()
    try:
        return model(input_ids=input_ids.to(embedding.weight.device), use_cache=False).logits.float().cpu()
    finally:
        model.train(training)


class ReadBack:
    """Compares an export's files with the model that was trained. It must be made before the adapters are merged away.

    Attributes:
        logits: the trained model's `probe_logits`.
        weights: W by name for a sample of the adapted layers, all of them below SAMPLE_SIZE.
        ends: by name, the first and the last row of each vector and matrix without an adapter, in the type of training.
    """

    def __init__(self, model: "transformers.PreTrainedModel", layers: Mapping[str, Any]):
        self.weights: dict[str, Tensor] = {}
        size = 0
        names = list(layers)  # from both ends, so that a sample has early and late layers
        for name in (name for pair in zip(names, reversed(names), strict=True) for name in pair):
            weight = layers[name].base.weight
            if name not in self.weights and (not self.weights or size + weight.numel() <= SAMPLE_SIZE):
                self.weights[name], size = weight.data, size + weight.numel()
        self.adapted = set(layers)
        self.trained_in = model.dtype
        tensors = model.state_dict().items()
        # Of experts in one tensor, a row is a whole expert: these are compared as they were written.
        self.ends = {name: tensor[[0, -1]] for name, tensor in tensors if tensor.dim() in (1, 2) and len(tensor)}
        num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        self.fits = num_bytes <= min(FITTING_GIB * 2**30, free / 3)
        self.logits = probe_logits(model) if self.fits else None

    def require_same(
        self, folder: Path, model: "transformers.PreTrainedModel", template: Any, sample: Any, options: dict[str, Any]
    ) -> None:
        """Opens `folder`/merged and `folder`/adapter.

        Args:
            model: the merged model that was written. template: training's template. sample: conversations of training.
            options: arguments of `from_pretrained` for code and attention.

        Raises:
            ValueError: something differs; names it in one line.
        """
        try:
            self._require_files(folder, model)
            for name in ("merged", "adapter"):
                if (folder / name).is_dir():
                    _require_tokenizer(folder / name, template, sample, model.generation_config)
            if self.fits:
                self._require_loaded(folder, model, options)
        except Exception as error:  # ours, and safetensors, transformers and PEFT raise kinds of their own
            raise ValueError(f"reading back: {first_line(error)}") from error

    def _require_files(self, folder: Path, model: "transformers.PreTrainedModel") -> None:
        """Every tensor is there with its shape, type, first and last row; W + s·B·A of the adapter's file is the merged
        weight."""
        expected = model.state_dict()
        stored = {}
        for path in sorted((folder / "merged").glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                stored |= dict.fromkeys(file.keys(), path)
        tied = set(getattr(model, "all_tied_weights_keys", None) or ())
        missing = sorted(expected.keys() - stored.keys() - tied)
        if missing and not stored.keys() - expected.keys():  # else the class uses other names in files than in memory
            raise ValueError(f"merged/ lacks {missing[0]}")
        if self.weights:
            config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
            factors = load_file(folder / "adapter" / "adapter_model.safetensors")
            names = {f"base_model.model.{layer}.lora_{which}.weight" for layer in self.adapted for which in "AB"}
            if factors.keys() != names:
                raise ValueError(f"adapter/ lacks or adds {sorted(factors.keys() ^ names)[0]}")
        for name, path in stored.items():
            layer = name.removesuffix(".weight")
            with safe_open(path, "pt") as file:
                part = file.get_slice(name)
                if name in expected and tuple(part.get_shape()) != tuple(expected[name].shape):
                    raise ValueError(f"{name} in merged/ has the shape {part.get_shape()}")
                for rows in (slice(0, 1), slice(-1, None)) if name in expected and part.get_shape() else ():
                    known = self.ends.get(name, expected[name])
                    dtype = expected[name].dtype if known.dtype == self.trained_in else known.dtype
                    _require_bits(f"{name} in merged/", part[rows], known[rows].to(dtype))
                if layer not in self.weights or not name.endswith(".weight"):
                    continue
                found = file.get_tensor(name)
            weight = self.weights[layer]
            pair = (factors[f"base_model.model.{layer}.lora_{which}.weight"] for which in "AB")
            A, B = (factor.to(weight.device).float() for factor in pair)
            sum_ = torch.addmm(weight.float(), B, A, alpha=config["lora_alpha"] / config["r"]).to(weight.dtype)
            if not same_bits(found, sum_.to(expected[name].dtype)):
                raise ValueError(f"{name} in merged/ is not W + ΔW of adapter/")

    def _require_loaded(self, folder: Path, model: "transformers.PreTrainedModel", options: dict[str, Any]) -> None:
        """merged/ and base + adapter/, loaded by transformers and PEFT, have the trained model's tensors and logits."""
        from transformers import AutoModelForCausalLM

        merged, loading = AutoModelForCausalLM.from_pretrained(
            folder / "merged", dtype="auto", output_loading_info=True, **options
        )
        for what, names in loading.items():
            if names and what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
                raise ValueError(f"merged/ has {what.replace('_', ' ')}: {sorted(names)[0]}")
        expected = model.state_dict()
        for name, tensor in merged.state_dict().items():
            if name in expected:
                _require_bits(f"{name} in merged/", tensor, expected[name])
        self._require_logits("merged/", merged)
        if not self.adapted:
            return
        import peft

        config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
        base = AutoModelForCausalLM.from_pretrained(
            config["base_model_name_or_path"], revision=config.get("revision"), dtype=self.trained_in, **options
        )
        for name, tensor in base.state_dict().items():
            if name.removesuffix(".weight") not in self.adapted:
                _require_bits(f"{name} of the base", tensor.to(expected[name].dtype), expected[name])
        self._require_logits("the base with adapter/", peft.PeftModel.from_pretrained(base, folder / "adapter"))

    def _require_logits(self, what: str, model: nn.Module) -> None:
        """Compares the median position's logits in 16 bits, where a mixture's router may differ at a few positions."""
        distance = (probe_logits(model) - self.logits).norm(dim=-1) / self.logits.norm(dim=-1).clamp(min=1e-30)
        is_exact = self.trained_in == next(model.parameters()).dtype == torch.float32
        found, limit = (distance.max(), 1e-4) if is_exact else (distance.median(), 0.1)
        if not found <= limit:
            raise ValueError(f"the logits of {what} are {float(found):.1e} off the trained model's")


def _require_bits(what: str, found: Tensor, expected: Tensor) -> None:
    if not same_bits(found, expected):
        raise ValueError(f"{what} differs from the trained model's")


def _require_tokenizer(folder: Path, template: Any, sample: Any, generation: "transformers.GenerationConfig") -> None:
    """Checks that the stored tokenizer gives training's tokens for every token's text and for the prompts of `sample`,
    and that answers end as the trained model's."""
    from transformers import AutoTokenizer, GenerationConfig

    found, tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=template.is_remote), template.tokenizer
    vocabulary = tokenizer.get_vocab()
    text = "\n".join(["Two 2s are 4, naïve 你好", *tokenizer.batch_decode([[id_] for id_ in vocabulary.values()])])
    if found.chat_template != template.plain_jinja:
        raise ValueError(f"{folder.name}/ has another chat template")
    are_alike = found.get_vocab() == vocabulary and found(text)["input_ids"] == tokenizer(text)["input_ids"]
    if not are_alike or found.eos_token_id != tokenizer.eos_token_id:
        raise ValueError(f"the tokenizer of {folder.name}/ gives other tokens")
    ends = GenerationConfig.from_pretrained(folder)
    if (ends.eos_token_id, ends.do_sample) != (generation.eos_token_id, generation.do_sample):
        raise ValueError(f"{folder.name}/ ends or samples its answers otherwise")
    for talk in sample:
        try:
            talk.require_served(template, talk.pieces(template), found)
        except ValueError as error:
            raise ValueError(f"{folder.name}/: {error}") from error


# ------------------------------------------------------------------------------------------------------------------
# Adapters in PEFT's file format: an ordinary LoRA on the unmodified base, written and read
# ------------------------------------------------------------------------------------------------------------------


def export_adapter(
    layers: Mapping[str, Any],
    folder: Path,
    base_model: str,
    target_modules: list[str] | None,
    task_type: str,
    modules_to_save: Mapping[str, nn.Module] | None = None,
    *,
    revision: str | None = None,
) -> int:
    """Writes the adapters as an ordinary LoRA on the unmodified base, in PEFT's format; returns its rank, PiSSA's 2r.

    Args:
        layers: the adapted layers (train.py's LoRALinear) by name.
        target_modules: as in `find_target_modules`; PEFT gets whole names where it would read an entry otherwise.
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
    if target_modules is None or any(re.search(r"[^\w.]", target) for target in target_modules):
        target_modules = list(layers)
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
    if Path(args.model).is_dir():  # the hub refuses a card if its base_model is no repository
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


KEEP_BASE = (True, False, "gaussian", "eva", "orthogonal", "mica")  # PEFT's init_lora_weights that change no base
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
    if is_local:  # the hub refuses a card if its base_model is no repository
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
    save_config(config, folder)
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
    if start not in (*KEEP_BASE, "pissa"):
        raise UserError(f"--init-adapter {folder}: {start} changed the base's weights; convert it to a LoRA with PEFT")
    others = [name for name in tensors if not name.endswith((".lora_A.weight", ".lora_B.weight"))]
    if others:
        raise UserError(
            f"--init-adapter {folder}: training can continue from factors of linear layers only, not {others[0]}"
        )
    prefix, factors = "base_model.model.", {}
    for layer in dict.fromkeys(name.rpartition(".lora_")[0] for name in tensors):
        A, B = pair = [tensors.get(f"{layer}.lora_{which}.weight", torch.empty(0)) for which in "AB"]
        if [factor.dim() for factor in pair] != [2, 2] or not len(A) == B.shape[1] == config["r"]:
            shapes = " and ".join(str(tuple(factor.shape)) for factor in pair)
            are = f"has the shapes {shapes} for A and B of {layer}, not two matrices of rank {config['r']}"
            raise UserError(f"--init-adapter {folder} {are}: save the whole adapter again")
        factors[layer.removeprefix(prefix)] = (A, B)
    principal_rank = int(metadata["principal_rank"]) if "principal_rank" in metadata else None
    is_pissa = start == "pissa"
    if (is_pissa or principal_rank is not None) and method == "lora":
        raise UserError(f"--init-adapter {folder} is a PiSSA adapter: go on with --method pissa or ba-lora")
    rank = principal_rank or config["r"]
    alpha = config["lora_alpha"] * rank / config["r"]
    return InitialAdapter(folder, rank, alpha, sorted(factors), factors, principal_rank, is_pissa, config)


# ------------------------------------------------------------------------------------------------------------------
# The trained change ΔW scaled by α after training: α = 1 is the trained model, α = 0 its base
# ------------------------------------------------------------------------------------------------------------------


# W₀ + α·ΔW        for an adapter its own factor s times α; for full fine-tuning W₀ + α (W − W₀) for every parameter
#
# `--scale auto` measures the model at ten scales on held-out examples, and takes the smallest with a loss close to the
# lowest. It prints (numbers for illustration):
#
#     scale   held-out loss   KL(base || tuned)
#     1.0          0.0602              0.9120
#     0.9          0.0621              0.8013
#     0.8          0.0655              0.7011
#     chosen: 0.9, the smallest scale within 0.003 nats of the lowest loss

GRID = tuple(tenths / 10 for tenths in range(10, 0, -1))
MOST_NUMBERS = 2**28  # how many log-probabilities of the base are kept at a time


@dataclass
class ScaleArguments:
    """The scale of the trained change in --export-from."""

    scale: str | None = option(
        None, "with --export-from: multiply the trained change of the weights by this; auto: chosen on held-out data"
    )
    scale_tolerance: float = option(
        0.003, "--scale auto: the smallest scale whose held-out loss is at most this many nats above the lowest"
    )


def read_scale(args: Any) -> float | None:
    """--scale as a number, 1 if it is not given; None for auto.

    Raises:
        UserError: not a number above 0 and up to 1, or without --export-from.
    """
    if args.scale is None:
        return 1.0
    if args.export_from is None:
        raise UserError("--scale acts after training: name the run by --export-from")
    if not 0 <= args.scale_tolerance < float("inf"):
        raise UserError(f"--scale-tolerance is {args.scale_tolerance}: it must be 0 or above, in nats")
    if args.scale == "auto":
        return None
    try:
        scale = float(args.scale)
    except ValueError:
        scale = float("nan")
    if not 0 < scale <= 1:
        raise UserError(f"--scale is {args.scale}: give a number above 0 and up to 1, or auto")
    return scale


@contextlib.contextmanager
def exporting(args: Any) -> Iterator[tuple[Path, Path, float | None]]:
    """Yields the folder of --export-from's run, the folder to write to, by default the same, and `read_scale`'s number.
    Inside, no run may write to the second folder.

    Raises:
        UserError: no run, an older export, or a run that writes to the folder; see also `read_scale`.
        RunStopped: the run still trains, and has deleted the checkpoint that was being read.
    """
    scale = read_scale(args)
    source = Path(args.export_from)
    if not (source / "config.yaml").is_file():
        raise UserError(f"--export-from {source}: no config.yaml there, so no run of train.py")
    output_dir = Path(args.output_dir) if "--output-dir" in args.given else source
    existing = [name for name in ("adapter", "merged") if (output_dir / name).exists()]
    if existing and not args.overwrite:
        raise UserError(f"{output_dir / existing[0]} exists: replace it with --overwrite, or name another --output-dir")
    try:
        with runs.held_alone(output_dir):
            yield source, output_dir, scale
    except OSError as error:
        if str(source / "checkpoints") not in str(error):
            raise
        raise RunStopped(
            f"a checkpoint of {source} cannot be read any more ({first_line(error)}): a run that trains deletes its "
            "older ones. Give this command again"
        ) from error


class Scaled:
    """A trained model that can be set to any α, in place.

    Args:
        model: the trained model.
        adapters: the place of each adapter's factor: a mapping and its key. train.py's layers and PEFT's differ.
        base: the parameters W₀ by name, for a model that was trained without adapters.
    """

    def __init__(
        self,
        model: nn.Module,
        adapters: Sequence[tuple[dict[str, Any], str]],
        base: Mapping[str, Tensor] | None = None,
    ):
        self.model = model
        self.factors = [(place, key, place[key]) for place, key in adapters]
        parameters = dict(model.named_parameters())
        trained = {name: parameters[name] for name in base or {}}
        self.weights = [(weight, base[name], weight.detach().clone()) for name, weight in trained.items()]

    @torch.no_grad()
    def set(self, alpha: float) -> None:
        """Sets α. It starts from the trained weights every time, so that rounding does not add up."""
        for place, key, factor in self.factors:
            place[key] = factor * alpha
        for weight, before, after in self.weights:
            weight.copy_(torch.lerp(before.to(weight.device).float(), after.to(weight.device).float(), alpha))


@dataclass
class Curve:
    """By α, means over the response tokens of held-out examples, in nats."""

    examples: int
    losses: dict[float, float] = field(default_factory=dict)
    kl_base_tuned: dict[float, float] = field(default_factory=dict)

    def smallest_within(self, tolerance: float) -> float:
        """The smallest α with a loss of at most `tolerance` above the lowest."""
        lowest = min(self.losses.values())
        return min(alpha for alpha, loss in self.losses.items() if loss <= lowest + tolerance)


def _log_probabilities(model: nn.Module, example: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """fp32 log-probabilities (M, V) at the positions that predict a response token, and these tokens, (M, 1)."""
    device = model.get_input_embeddings().weight.device
    ids, labels = (torch.tensor(example[name], device=device) for name in ("input_ids", "labels"))
    valid = labels[1:] != IGNORE_INDEX
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1][valid]
    return logits.float().log_softmax(dim=-1), labels[1:][valid][:, None]


def _groups(examples: Sequence[Mapping[str, Any]], vocabulary: int) -> Iterator[list[Mapping[str, Any]]]:
    """The examples in order, in groups of at most MOST_NUMBERS log-probabilities, and at least one example."""
    group, size = [], 0
    for example in examples:
        numbers = len(example["labels"]) * vocabulary
        if group and size + numbers > MOST_NUMBERS:
            yield group
            group, size = [], 0
        group.append(example)
        size += numbers
    yield group


@torch.no_grad()
def measured(scaled: Scaled, examples: Sequence[Mapping[str, Any]]) -> Curve:
    """The trained model on held-out examples, one at a time, at every α of GRID."""
    model, sums, tokens = scaled.model.eval(), {alpha: [0.0, 0.0] for alpha in GRID}, 0
    for group in _groups(examples, model.config.get_text_config().vocab_size):
        scaled.set(0.0)
        base = [_log_probabilities(model, example) for example in group]
        tokens += sum(len(targets) for _, targets in base)
        for alpha in GRID:
            scaled.set(alpha)
            for example, (before, targets) in zip(group, base, strict=True):
                after, _ = _log_probabilities(model, example)
                sums[alpha][0] -= after.gather(-1, targets).double().sum().item()
                sums[alpha][1] += (before.exp() * (before - after)).double().sum().item()
    losses, kls = ({alpha: pair[which] / tokens for alpha, pair in sums.items()} for which in (0, 1))
    return Curve(len(examples), losses, kls)


def choose(scaled: Scaled, examples: Sequence[Mapping[str, Any]], tolerance: float) -> dict[str, Any]:
    """The scale that --scale auto takes, with the measurements behind the choice; prints both."""
    if torch.cuda.is_available():
        scaled.model.to("cuda")
    curve = measured(scaled, examples)
    scale = curve.smallest_within(tolerance)
    lines = ["scale   held-out loss   KL(base || tuned)"]
    lines += [f"{alpha:5.1f}{curve.losses[alpha]:16.4f}{curve.kl_base_tuned[alpha]:20.4f}" for alpha in GRID]
    why = f"the smallest scale within {tolerance:g} nats of the lowest loss"
    print("\n".join([*lines, f"chosen: {scale:g}, {why} on {curve.examples} held-out examples"]), flush=True)
    found = {"held_out_examples": curve.examples, "losses": curve.losses, "kl_base_tuned": curve.kl_base_tuned}
    return {"scale": scale, "why": why, "tolerance": tolerance, **found}


def held_out_examples(
    args: Any, run: Any, tokenizer: "PreTrainedTokenizerBase", checkpoint: Path
) -> "datasets.Dataset":
    """The examples for --scale auto: those of --validation-data, else those that the run held out.

    Raises:
        UserError: there are none, or the run's --data changed, so that other examples would be held out.
    """
    if args.validation_data is not None:
        run = dataclasses.replace(run, validation_data=args.validation_data, eval_share=None)
    if run.validation_data is None and run.eval_share is None:
        raise UserError("--scale auto chooses on held-out examples; the run has none: name some by --validation-data")
    source = validation.arguments_of_validation_data(run) or run
    examples, _ = encoded(source, tokenizer, load_training_records(source))
    if run.eval_share is None:
        return examples
    trained, held_out = validation.hold_out(run, examples, None)
    parts = {"data": trained, "evaluation data": held_out}
    contents = {name: checkpoints.contents_of(part) for name, part in parts.items()}
    checkpoints.require_same_contents(checkpoint, contents, args.accept_changes)
    return held_out
