"""Pre-trained checkpoints: whether a name can be one, its tokenizer and configuration, the embedded demo."""

import contextlib
import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from common.cli import UserError, first_line

if TYPE_CHECKING:
    import datasets
    import torch
    import transformers

DIGEST_BLOCK, TENSOR_BLOCK = 2**18, 2**12  # bytes; a file up to 64 MiB is read whole
DIGEST_FORM = "2:"  # before a folder's digest; the first form, without it, left out the configuration


def check_checkpoint(name: str) -> None:
    """Raises a UserError where the local folder `name` cannot be a checkpoint; reads no weights. Hub names pass."""
    folder = Path(name)
    if not folder.is_dir():
        if folder.is_file() or name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise UserError(f"no such model folder: {name}")
        return
    if not (folder / "config.json").is_file():
        raise UserError(f"{name} has no config.json: not a transformers checkpoint")
    if (folder / "adapter_config.json").is_file():  # transformers would load the adapter, and then write no weights
        raise UserError(f"{name} holds an adapter beside the model: move its adapter_*.* away, or merge it first")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{name} has no .safetensors file (pickled weights are not loaded: convert them first)")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            missing = {*json.loads(index.read_text())["weight_map"].values()} - {file.name for file in files}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index} is no index of weights ({first_line(error)}): fetch or copy it again") from error
        if missing:
            raise UserError(f"{name} lacks {sorted(missing)[0]}, which its index names: the checkpoint is incomplete")
    from safetensors import safe_open

    for file in files:
        try:
            with safe_open(file, "pt"):
                pass
        except Exception as error:
            raise UserError(f"{file} is damaged ({first_line(error)}): fetch or copy it again") from error


def load_tokenizer_and_config(
    name: str, revision: str | None = None, trust_remote_code: bool = False, *, needs_all: bool = True
) -> "tuple[transformers.PreTrainedTokenizerBase | None, transformers.PretrainedConfig]":
    """The tokenizer and configuration of a checkpoint.

    Args:
        needs_all: False: weights and tokenizer may be missing; None is returned for a missing tokenizer.

    Raises:
        UserError: neither a readable folder nor a hub name that answers, or no end-of-sequence token.
    """
    if needs_all:
        check_checkpoint(name)
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = None
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
        with contextlib.nullcontext() if needs_all else contextlib.suppress(Exception):
            tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # OSError, ValueError, and errors of the hub's client
        raise UserError(f"cannot load the model {name!r}: {first_line(error)}") from error
    if needs_all and tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {name} has no end-of-sequence token: set eos_token in its configuration")
    return tokenizer, config


def settle_config(args: Any, config: "transformers.PretrainedConfig") -> None:
    """Chooses the attention that `config` needs. Prints a note if the model's own loss has a part that is not trained.

    Raises:
        UserError: see `require_trainable`; or the attention that the user chose leaves out a part of the model.
    """
    require_trainable(args.model, config)
    is_capped = getattr(config, "attn_logit_softcapping", None)
    if is_capped and "sdpa" in (args.attn_implementation or ""):
        raise UserError(
            f"--attn-implementation {args.attn_implementation} does not cap the attention's logits, and the "
            f"configuration of {args.model} caps them: leave the option out, or take eager or flash_attention_2"
        )
    if is_capped and args.attn_implementation is None:
        args.attn_implementation = "eager"
        print("note: attends eagerly, since only that caps the attention's logits as this model's configuration says")
    if getattr(config, "output_router_logits", False):
        print("note: the router's loss (output_router_logits) is not part of the objective")


def require_trainable(name: str, config: "transformers.PretrainedConfig") -> None:
    """Raises a UserError where the configuration is of a kind that cannot be trained here."""
    require_unquantized(name, config, "; --load-in quantizes it")
    if config.is_encoder_decoder:
        raise UserError(f"{name} is an encoder with a decoder ({config.model_type}): only decoders can be trained")
    if config.get_text_config() is not config:
        kind = config.model_type
        raise UserError(f"{name} is more than a text model ({kind}): save its language model first (docs/adapters.md)")


def require_unquantized(name: str, config: "transformers.PretrainedConfig", more: str = "") -> None:
    """Raises a UserError where the weights are quantized; `more`: for the message's end."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
        raise UserError(f"{name} is quantized ({method}): name the model as it was before{more}")


def require_causal(model: "transformers.PreTrainedModel") -> None:
    """Raises a UserError where the model fails in training mode, or where a position attends to later positions."""
    import torch

    from common.tensors import device_of, gathered_module_by_module

    training, device = model.training, device_of(model.get_input_embeddings().weight)
    input_ids = torch.arange(16, device=device).view(2, 8) % model.config.vocab_size
    input_ids[1, :-1] = input_ids[0, :-1]  # the last token alone differs
    try:
        with torch.no_grad(), torch.random.fork_rng(), gathered_module_by_module(model):
            model.eval()
            logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1].float()
            model.train()  # Mamba takes another path there; dropout draws from the forked generator
            model.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state  # noqa: B018
    except (AttributeError, TypeError) as error:  # an adapted layer is asked for its weight; no decoder, or no states
        raise UserError(f"{type(model).__name__} cannot be trained with adapters: {first_line(error)}") from error
    finally:
        model.train(training)
    tolerance = 1e-5 if next(model.parameters()).dtype == torch.float32 else 1e-2
    if not torch.allclose(logits[0], logits[1], rtol=tolerance, atol=tolerance * float(logits.abs().max())):
        raise UserError(f"{type(model).__name__} sees later tokens: no causal language model (is_decoder: true?)")


def require_embedded(dataset: "datasets.Dataset", model: "transformers.PreTrainedModel", num_tokens: int) -> None:
    """Raises a UserError where a token of the data is beyond the embedding; `num_tokens`: the tokenizer's size."""
    rows = model.get_input_embeddings().num_embeddings
    require_row(max(map(max, dataset["input_ids"])) if num_tokens > rows else 0, rows)


def require_row(largest: int, rows: int) -> None:
    """Raises a UserError where the data's largest token is beyond an embedding of `rows`."""
    if largest >= rows:
        raise UserError(f"token {largest} of the data is beyond the model's {rows} embeddings: enlarge the model's")


def num_positions(model: "transformers.PreTrainedModel") -> int | None:
    """How many positions the model was made for; None without a limit (ALiBi, state spaces, XLNet, T5)."""
    found = getattr(model.config, "max_position_embeddings", None) or 0
    found -= sum(index + 1 for index in counts_from_padding(model))
    return found if found > 0 else None


def counts_from_padding(model: "transformers.PreTrainedModel") -> list[int]:
    """The padding token from which a table of positions counts: RoBERTa's first position is padding_idx + 1."""
    tables = (module for name, module in model.named_modules() if name.endswith("position_embeddings"))
    return [table.padding_idx for table in tables if getattr(table, "padding_idx", None) is not None]


def require_positions(name: str, model: "transformers.PreTrainedModel", max_length: int) -> None:
    """Raises a UserError where --max-length is beyond the positions that the model was made for."""
    known = num_positions(model)
    if known and max_length > known:
        raise UserError(f"--max-length is {max_length}, and {name} has {known} positions")


def note_on_positions(dataset: "datasets.Dataset", model: "transformers.PreTrainedModel") -> str:
    """A note where an example has more positions than the model was made for, else an empty text."""
    known, longest = num_positions(model), max(map(len, dataset["input_ids"]))
    if known is None or longest <= known:
        return ""
    return f"\nnote: the longest example has {longest} tokens, the model {known} positions: --max-length {known} cuts"


def computation_of(entries: dict[str, Any]) -> str:
    """The entries of a configuration that decide the model's computation, as JSON: without its place and its
    author. The type is the weights' own, and a cache of keys and values changes nothing."""
    others = ("_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype", "use_cache")
    entries = {name: value for name, value in entries.items() if name not in others}
    return json.dumps(entries, sort_keys=True, default=str)


def weights_digest(path: str, config: Any) -> str:
    """A digest that tells one base model from another. On the hub: the commit. Of a local folder: the configuration,
    code that belongs to it, and of each file of weights the name, size, header and sampled blocks of bytes. At least
    the beginning of every tensor is among these."""
    folder = Path(path)
    if not folder.is_dir():
        return str(getattr(config, "_commit_hash", None) or path)
    digest = hashlib.sha256(computation_of(json.loads((folder / "config.json").read_text())).encode())
    for file in sorted(folder.glob("*.py")):
        digest.update(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}".encode())
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with open(file, "rb") as stream:
            head = stream.read(8)
            head += stream.read(int.from_bytes(head, "little"))
            tensors = json.loads(head[8:])
            tensors.pop("__metadata__", None)
            starts = dict.fromkeys((len(head) + tensor["data_offsets"][0] for tensor in tensors.values()), TENSOR_BLOCK)
            starts |= dict.fromkeys(range(0, size, max(size // 256, DIGEST_BLOCK)), DIGEST_BLOCK)
            digest.update(head)
            for place, length in sorted(starts.items()):
                stream.seek(place)
                digest.update(stream.read(length))
    return DIGEST_FORM + digest.hexdigest()


def is_earlier_digest(digest: str) -> bool:
    """Whether it is a folder's digest of the first form. A commit on the hub is shorter."""
    return re.fullmatch(r"[0-9a-f]{64}", digest) is not None


def resolve_demo(name: str | None, kind: Literal["model", "train", "test"]) -> str | None:
    """The path behind the reserved name `demo`; any other name as it is."""
    if name != "demo":
        return name
    from data import demo

    try:
        return str(demo.model() if kind == "model" else demo.problems(kind))
    except (RuntimeError, OSError) as error:
        raise UserError(f"cannot make the demo's {kind}: {first_line(error)}") from error


def resolve_dtype(name: str) -> "torch.dtype":
    """The type behind --dtype; auto: bfloat16 where the GPU has it, else float32."""
    import torch

    if name == "auto":
        has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bf16 else torch.float32
    return getattr(torch, name)


def export_dtype(name: str, args: Any) -> "torch.dtype":
    """The type of merged/: the type of --dtype, else the base's own, else the type of training."""
    import torch
    from transformers import AutoConfig

    own = None
    if args.dtype == "auto":
        own = AutoConfig.from_pretrained(name, revision=args.model_revision, trust_remote_code=args.trust_remote_code)
        own = own.dtype
    return own if isinstance(own, torch.dtype) else resolve_dtype(args.dtype)


def mend_generation_config(model: "transformers.PreTrainedModel") -> None:
    """Makes the generation configuration writable. Some published models have sampling values but do not sample;
    transformers ignores such values and refuses to write them. They are removed, and the exported model decodes
    greedily, as its base does. If other settings cannot be written either, only the special tokens are kept."""
    from transformers import GenerationConfig

    config = model.generation_config

    def can_be_written() -> bool:
        try:
            config.validate(strict=True)
        except ValueError:
            return False
        return True

    if not can_be_written() and not config.do_sample:
        for name in ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"):
            setattr(config, name, getattr(GenerationConfig(), name))
    if not can_be_written():
        model.generation_config = GenerationConfig(bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id)


def load_model(
    args: Any, model_path: str, dtype: "torch.dtype", device: "torch.device | None" = None
) -> "transformers.PreTrainedModel":
    """The pre-trained model, quantized where --load-in says so.

    Args:
        device: gets each weight as it is read, so that no rank holds the whole model in the host's memory; None: the
            CPU. ZeRO-3 and bitsandbytes choose themselves.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.integrations import is_deepspeed_zero3_enabled

    options = {}
    if device is not None and args.load_in is None and not is_deepspeed_zero3_enabled():
        options["device_map"] = {"": device}
    if args.load_in is not None:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=args.load_in == "4bit",
            load_in_8bit=args.load_in == "8bit",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
        )
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            model_path,
            revision=args.model_revision,
            trust_remote_code=args.trust_remote_code,
            dtype=dtype,
            attn_implementation=args.attn_implementation,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except OSError as error:  # such as a hub model that has only pickled weights
        raise UserError(f"cannot load the model {args.model!r}: {first_line(error)}") from error
    require_weights(args.model, lacking_weights(info), info)
    return model


def lacking_weights(info: dict[str, Any]) -> list[str]:
    """The names of the weights that the files lacked, or had in another size; transformers makes them at random."""
    mismatched = (item[0] if isinstance(item, tuple) else item for item in info["mismatched_keys"])
    return sorted({*info["missing_keys"], *mismatched})


def require_weights(name: str, lacking: list[str], info: dict[str, Any]) -> None:
    """Raises a UserError where weights are `lacking`, with one that is in the files and is not the model's."""
    if lacking:
        foreign = min(info["unexpected_keys"], default=None)
        instead = f"; they have {foreign}, which the model has not" if foreign else ""
        raise UserError(f"the files of {name} lack {len(lacking)} weights in this form, such as {lacking[0]}{instead}")


def head_is_linear(model: "transformers.PreTrainedModel") -> bool:
    """Whether the logits are exactly H Eᵀ. A trial decides, because it finds biases, soft caps and scales alike."""
    import torch
    from torch import nn

    from common.tensors import device_of, gathered_module_by_module

    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None:
        return False
    input_ids = torch.arange(8, device=device_of(head.weight))[None] % model.config.vocab_size
    with torch.no_grad(), gathered_module_by_module(model):
        hidden = model.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state
        logits = model(input_ids=input_ids, use_cache=False).logits
        return torch.allclose(head(hidden).float(), logits.float(), rtol=1e-5, atol=1e-5)
