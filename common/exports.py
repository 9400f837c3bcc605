"""A run's files for other programs: written for both transformers 4 and 5, then opened again and compared."""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from common.cli import first_line
from common.tensors import same_bits

if TYPE_CHECKING:
    import transformers

SAMPLE_SIZE = 2**28  # how many numbers of adapted weights are compared bit for bit; a small model is compared whole
FITTING_GIB = 32  # a larger model is not loaded again


def save_merged(model: "transformers.PreTrainedModel", folder: Path, dtype: torch.dtype) -> None:
    """Writes a plain checkpoint with the rotary settings under the names of transformers 4 and 5. The names of 4 are
    left out where 5 would then read the settings differently, as for Gemma-4, which 4 does not know."""
    model.to(dtype).save_pretrained(folder)
    path, rope = folder / "config.json", getattr(model.config, "rope_parameters", None)
    config = json.loads(path.read_text())
    if "dtype" in config:
        config["torch_dtype"] = config["dtype"]
    for classic in (classic_rope(config), {}):
        path.write_text(json.dumps(config | classic, indent=2, sort_keys=True) + "\n")
        with contextlib.suppress(KeyError, ValueError):
            if not classic or _has_all(type(model.config).from_pretrained(folder).rope_parameters, rope):
                break


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
    return classic


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
        self.trained_in = next(model.parameters()).dtype
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
        dtype, expected = next(model.parameters()).dtype, model.state_dict()
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
                    _require_bits(f"{name} in merged/", part[rows], expected[name][rows])
                if layer not in self.weights or not name.endswith(".weight"):
                    continue
                found = file.get_tensor(name)
            weight = self.weights[layer]
            pair = (factors[f"base_model.model.{layer}.lora_{which}.weight"] for which in "AB")
            A, B = (factor.to(weight.device).float() for factor in pair)
            sum_ = torch.addmm(weight.float(), B, A, alpha=config["lora_alpha"] / config["r"]).to(weight.dtype)
            if not same_bits(found, sum_.to(dtype)):
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

    found, tokenizer = AutoTokenizer.from_pretrained(folder), template.tokenizer
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
