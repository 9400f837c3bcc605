"""The two back ends of eval/generation.py, on a checkpoint or on a base with a LoRA adapter.

The import takes seconds, so only `load_backend` of eval/benchmark.py and checks of an adapter do it. The options are
those of both: TransformersBackend leaves alone what is vLLM's.
"""

import contextlib
import hashlib
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from common.cli import UserError, first_line
from common.exports import KEEP_BASE
from common.pretrained import resolve_dtype
from common.ranks import choose_device
from common.templates import decode_response
from common.tensors import padded
from eval.generation import Completion, Sampling, batch_size_of, batches, with_bar
from eval.quiet import quiet_vllm

VLLM_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # the ranks of vLLM's kernels


def check_adapter(adapter: str, ckpt: str, config: PretrainedConfig, backend: str | None) -> None:
    """Raises a UserError where `adapter` is not a LoRA in PEFT's format for the model `ckpt`; reads no weights.

    Names alone do not decide (a local copy has another name), nor do shapes (a chat model has its base's shapes), so
    both must fit. Only the last part of a name counts.

    Args:
        backend: the back end that loads it; None: the base is measured beside it, in the same weights.
    """
    folder = Path(adapter)
    try:
        lora = json.loads((folder / "adapter_config.json").read_text())
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # OSError, and errors of json and safetensors
        reason = str(error).splitlines()[0]
        raise UserError(f"--adapter {adapter} is no LoRA adapter in PEFT's format: {reason}") from error
    with torch.device("meta"):
        weights = AutoModelForCausalLM.from_config(config).state_dict()
    for name, (*_, size) in shapes.items():
        layer, _, factor = name.removeprefix("base_model.model.").partition(".lora_")
        weight = weights.get(f"{layer}.weight")
        if weight is None or factor not in ("A.weight", "B.weight"):
            raise UserError(f"--adapter {adapter} does not fit {ckpt}, which has no layer for {name}")
        fits = size == weight.shape[1] if factor == "A.weight" else shapes[name][0] == weight.shape[0]
        if not fits:
            raise UserError(f"--adapter {adapter} does not fit {ckpt}: {layer} has another size there")
    base = lora.get("base_model_name_or_path")
    if base and Path(base).name.lower() not in {Path(name).name.lower() for name in (ckpt, str(Path(ckpt).resolve()))}:
        raise UserError(
            f"--adapter {adapter} was trained on {base}, not on {ckpt}: give --ckpt {base}, or, where the two are one "
            f"model, correct base_model_name_or_path in adapter_config.json"
        )
    start = lora.get("init_lora_weights", True)
    # PEFT alone takes these starts off the base's weights again, and it leaves them so.
    is_repeated = start in ("pissa", "olora")
    if start not in KEEP_BASE and not (is_repeated and backend == "transformers"):
        other = ", or take --backend transformers" if is_repeated and backend == "vllm" else ""
        raise UserError(
            f"--adapter {adapter}: {start} changed the base's weights; convert it to a LoRA with PEFT{other}"
        )
    if backend == "vllm" and lora["r"] > VLLM_LORA_RANKS[-1]:
        raise UserError(f"--adapter {adapter} has rank {lora['r']}, vLLM takes {VLLM_LORA_RANKS[-1]}: merge it first")


def tokenizer_of(
    adapter: str, ckpt: str, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig
) -> PreTrainedTokenizerBase:
    """The tokenizer in an adapter's folder, which has the chat template of its training; the checkpoint's `tokenizer`
    where the folder has none.

    Raises:
        UserError: it cannot be loaded, has no end token, or has tokens that are not the checkpoint's.
    """
    if not (Path(adapter) / "tokenizer_config.json").is_file():
        return tokenizer
    try:
        theirs = AutoTokenizer.from_pretrained(adapter)
    except Exception as error:  # OSError, ValueError, and errors of tokenizers
        raise UserError(f"--adapter {adapter}: its tokenizer cannot be loaded: {first_line(error)}") from error
    if theirs.eos_token_id is None:
        raise UserError(f"--adapter {adapter}: its tokenizer has no end-of-sequence token: set eos_token there")
    known, found, size = tokenizer.get_vocab(), theirs.get_vocab(), config.get_text_config().vocab_size
    apart = known.items() - found.items() | {(token, i) for token, i in found.items() - known.items() if i >= size}
    if apart:
        token = min(apart)[0]
        raise UserError(f"--adapter {adapter} and {ckpt} have no common tokenizer (they differ in {token!r})")
    return theirs


def _cut(text: str, stop: tuple[str, ...]) -> tuple[str, bool]:
    """The text before the first stop string, and whether there is one."""
    ends = [place for place in (text.find(string) for string in stop) if place >= 0]
    return (text[: min(ends)], True) if ends else (text, False)


class _Stop(StoppingCriteria):
    """Ends a row whose completion has a stop string; transformers' own looks for it in the prompt's end too."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, width: int, stop: tuple[str, ...]):
        self.tokenizer, self.width, self.stop = tokenizer, width, stop
        self.most = max(len(string.encode()) for string in stop) + 1  # tokens; each is a byte or more

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        start = max(self.width, input_ids.shape[1] - self.most)
        ended = [
            _cut(decode_response(self.tokenizer, row[:1], row[1:]), self.stop)[1]
            for row in input_ids[:, start - 1 :].tolist()
        ]
        return torch.tensor(ended, device=input_ids.device)


class TransformersBackend:
    """Padded on the left, so that every completion starts at the same place."""

    name = "transformers"

    def __init__(
        self,
        ckpt: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        dtype: str,
        batch_size: int | None = None,
        adapter: str | None = None,
        **_: Any,
    ):
        self.tokenizer = tokenizer
        self.batch_size = batch_size_of(batch_size, self.name)
        self.eos_token_ids = eos_token_ids_of(tokenizer, ckpt, adapter)
        self.device = choose_device()
        self.model = AutoModelForCausalLM.from_pretrained(ckpt, dtype=resolve_dtype(dtype), use_safetensors=True)
        # The checkpoint's own may switch on sampling, or a repetition penalty, which greedy decoding would obey.
        self.model.generation_config = GenerationConfig()
        if adapter is not None:
            from peft import PeftModel

            self.model = PeftModel.from_pretrained(self.model, adapter)
        self.model.to(self.device).eval()

    @torch.inference_mode()
    def generate(
        self, prompts: list[list[int]], sampling: Sampling, seeds: list[int] | None = None
    ) -> list[Completion]:
        settings: dict[str, Any] = {"do_sample": False}
        if sampling.temperature > 0:
            settings = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
            torch.manual_seed(_seed_of(seeds))
        config = GenerationConfig(
            eos_token_id=self.eos_token_ids,
            pad_token_id=self.eos_token_ids[0],
            max_new_tokens=sampling.max_new_tokens,
            use_cache=True,
            **settings,
        )
        input_ids, attention_mask = padded(prompts, self.eos_token_ids[0], left=True, device=self.device)
        stopping = [_Stop(self.tokenizer, input_ids.shape[1], sampling.stop)] if sampling.stop else []
        output = self.model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            generation_config=config,
            stopping_criteria=StoppingCriteriaList(stopping),
        )
        completions = []
        for prompt, row in zip(prompts, output[:, input_ids.shape[1] :].tolist(), strict=True):
            length = next((n for n, token in enumerate(row) if token in self.eos_token_ids), None)
            tokens = row[:length]
            text, stopped = _cut(decode_response(self.tokenizer, prompt, tokens), sampling.stop)
            completions.append(Completion(text, len(tokens), finished=length is not None or stopped))
        return completions

    @torch.inference_mode()
    def log_likelihoods(self, prompts: list[list[int]], responses: list[list[int]]) -> list[float]:
        sequences = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
        found = [0.0] * len(sequences)
        for indices in with_bar(batches([len(sequence) for sequence in sequences], self.batch_size), "response loss"):
            input_ids, attention_mask = padded([sequences[i] for i in indices], 0, left=True, device=self.device)
            longest = max(len(responses[i]) for i in indices)
            logits = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=(attention_mask.cumsum(dim=1) - 1).clamp(min=0),
                logits_to_keep=longest + 1,
                use_cache=False,
            ).logits
            for i, row in zip(indices, logits, strict=True):
                response = torch.tensor(responses[i], device=self.device)
                predicting = row[-len(response) - 1 : -1].to(torch.promote_types(row.dtype, torch.float32))
                losses = torch.nn.functional.cross_entropy(predicting, response, reduction="none")
                found[i] = -losses.sum(dtype=torch.float64).item()
        return found


def _seed_of(seeds: list[int]) -> int:
    """One seed for a batch: its members draw from one stream of random numbers."""
    return int.from_bytes(hashlib.sha256(json.dumps(seeds).encode()).digest()[:7], "big")


class VLLMBackend:
    """vLLM's offline engine, which forms batches of its own inside each batch it is given."""

    name = "vllm"

    def __init__(
        self,
        ckpt: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        dtype: str,
        max_length: int,
        batch_size: int | None = None,
        adapter: str | None = None,
        seed: int = 0,
        tensor_parallel_size: int = 1,
        gpu_memory_utilization: float = 0.9,
    ):
        """`max_length`: tokens of the longest prompt with its completion, or with its response and one token after it,
        which vLLM makes. vLLM refuses more than the model's context."""
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        # In a process of its own the engine starts on the first request while others still arrive. Chance would decide
        # which requests are computed together, and with it their rounding.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        options: dict[str, Any] = {"gpu_memory_utilization": gpu_memory_utilization}
        if choose_device().type == "cpu":
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB
            options = {"enforce_eager": True}
            if tensor_parallel_size == 1:
                options["distributed_executor_backend"] = "uni"  # a separate worker would import vLLM once more
        with quiet_vllm():
            from vllm import LLM
            from vllm.lora.request import LoRARequest

        self.lora = None
        if adapter is not None:
            rank = json.loads((Path(adapter) / "adapter_config.json").read_text())["r"]
            max_rank = next(size for size in VLLM_LORA_RANKS if size >= rank)
            options |= {"enable_lora": True, "max_lora_rank": max_rank, "max_loras": 1}
            self.lora = LoRARequest("adapter", 1, str(Path(adapter).resolve()))
            if choose_device().type == "cpu" and not _adapts_head(adapter):
                from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

                # Its CPU form adds the adapter's part of the logits once for each sequence, and fails where the
                # log-probabilities of a prompt need it for each token (vLLM's issue 29955). Here this part is zero.
                PunicaWrapperCPU.add_lora_logits = lambda self, y, *args, **kwargs: y
        self.tokenizer = tokenizer
        self.batch_size = batch_size_of(batch_size, self.name)
        self.eos_token_ids = eos_token_ids_of(tokenizer, ckpt, adapter)
        cores = os.sched_getaffinity(0)
        with quiet_vllm():
            self.llm = LLM(
                model=ckpt,
                dtype=str(resolve_dtype(dtype)).removeprefix("torch."),
                max_model_len=max_length,
                seed=seed,
                tensor_parallel_size=tensor_parallel_size,
                use_tqdm_on_load=False,
                generation_config="vllm",  # not the checkpoint's: see TransformersBackend
                **options,
            )
        os.sched_setaffinity(0, cores)  # on a CPU, vLLM binds this thread, and so the later grading, to one core

    def generate(
        self, prompts: list[list[int]], sampling: Sampling, seeds: list[int] | None = None
    ) -> list[Completion]:
        from vllm import SamplingParams

        self.llm.reset_prefix_cache()  # a cache from earlier batches would change the rounding of this one
        settings = [
            SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                seed=seed,
                max_tokens=sampling.max_new_tokens,
                stop=list(sampling.stop),
                stop_token_ids=self.eos_token_ids,
            )
            for seed in seeds or [None] * len(prompts)
        ]
        outputs = self.llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            settings,
            use_tqdm=partial(tqdm, leave=False),
            lora_request=self.lora,
        )
        completions = []
        for prompt, output in zip(prompts, outputs, strict=True):
            tokens = [token for token in output.outputs[0].token_ids if token not in self.eos_token_ids]
            text, _ = _cut(decode_response(self.tokenizer, prompt, tokens), sampling.stop)
            completions.append(Completion(text, len(tokens), finished=output.outputs[0].finish_reason == "stop"))
        return completions

    def log_likelihoods(self, prompts: list[list[int]], responses: list[list[int]]) -> list[float]:
        from vllm import SamplingParams

        sequences = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
        outputs = self.llm.generate(
            [{"prompt_token_ids": sequence} for sequence in sequences],
            SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0),
            lora_request=self.lora,
        )
        found = []
        for output, response in zip(outputs, responses, strict=True):
            of_response = zip(output.prompt_logprobs[-len(response) :], response, strict=True)
            found.append(sum(logprobs[token].logprob for logprobs, token in of_response))
        return found


def _adapts_head(adapter: str) -> bool:
    with safe_open(Path(adapter) / "adapter_model.safetensors", "pt") as file:
        return any("lm_head" in name for name in file.keys())  # noqa: SIM118


def eos_token_ids_of(tokenizer: PreTrainedTokenizerBase, ckpt: str, adapter: str | None) -> list[int]:
    """The tokens that end a completion: the tokenizer's end token, and the end tokens of the first file that names one:
    the adapter's generation_config.json, the checkpoint's, its config.json (as transformers reads it)."""
    configured = None
    for place, is_config in ((adapter, False), (ckpt, False), (ckpt, True)):
        if place is not None and configured is None:
            options = {"config_file_name": "config.json", "_from_model_config": True} if is_config else {}
            with contextlib.suppress(OSError):
                configured = GenerationConfig.from_pretrained(place, **options).eos_token_id
    configured = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in [tokenizer.eos_token_id, *configured] if token is not None})


BACKENDS = {kind.name: kind for kind in (TransformersBackend, VLLMBackend)}
