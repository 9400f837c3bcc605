"""What the benchmarks share: greedy generation on a checkpoint, by vLLM or by transformers.

Both back ends take prompts as token ids, made exactly as training makes them, and return the same completions but for
rounding.
"""

import importlib.util
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

sys.path.append(str(Path(__file__).resolve().parent.parent))  # the scripts here are run as files, not as a package

from train import UserError, resolve_dtype


@dataclass
class Completion:
    text: str
    num_tokens: int
    finished: bool  # False: cut at max_new_tokens


class Backend(Protocol):
    """A checkpoint that generates, and that tells the loss of given responses."""

    name: str

    def generate(self, prompts: list[list[int]], max_new_tokens: int) -> list[Completion]:
        """One greedy completion per prompt, in order."""

    def response_loss(self, prompts: list[list[int]], responses: list[list[int]]) -> float:
        """The mean over all response tokens of −ln p(token | prompt, response so far), in nats."""


def load_backend(
    backend: str,
    ckpt: str,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    *,
    dtype: str,
    batch_size: int,
    max_length: int,
    seed: int = 0,
    tensor_parallel_size: int = 1,
    gpu_memory_utilization: float = 0.9,
) -> Backend:
    """Loads the checkpoint; `auto` takes vLLM where it is installed.

    Args:
        max_length: tokens of the longest prompt with its completion or response.

    Raises:
        UserError: vLLM is asked for and not installed, or the model's context is shorter than `max_length`.
    """
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and max_length > context:
        raise UserError(f"{ckpt} holds {context} tokens and {max_length} are needed: lower --max-new-tokens")
    has_vllm = importlib.util.find_spec("vllm") is not None
    if backend == "vllm" and not has_vllm:
        raise UserError("--backend vllm: vLLM is not installed (README, 'Evaluate'); or take --backend transformers")
    eos_token_ids = _eos_token_ids(ckpt, tokenizer)
    if backend == "vllm" or (backend == "auto" and has_vllm):
        return VLLMBackend(
            ckpt, tokenizer, eos_token_ids, dtype, max_length, seed, tensor_parallel_size, gpu_memory_utilization
        )
    return TransformersBackend(ckpt, tokenizer, eos_token_ids, dtype, batch_size)


def _eos_token_ids(ckpt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What ends a completion: the tokenizer's end token, and those of the generation configuration (chat models)."""
    try:
        configured = GenerationConfig.from_pretrained(ckpt).eos_token_id
    except OSError:
        configured = None
    configured = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in [tokenizer.eos_token_id, *configured] if token is not None})


class TransformersBackend:
    """Batches of prompts of similar length, padded on the left."""

    name = "transformers"

    def __init__(
        self, ckpt: str, tokenizer: PreTrainedTokenizerBase, eos_token_ids: list[int], dtype: str, batch_size: int
    ):
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = AutoModelForCausalLM.from_pretrained(ckpt, dtype=resolve_dtype(dtype), use_safetensors=True)
        self.model.to(self.device).eval()
        # Not the checkpoint's own: it may bring sampling, or a repetition penalty that greedy decoding would obey.
        self.model.generation_config = GenerationConfig(
            do_sample=False, eos_token_id=eos_token_ids, pad_token_id=eos_token_ids[0]
        )

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], max_new_tokens: int) -> list[Completion]:
        completions: list[Completion | None] = [None] * len(prompts)
        ends = set(self.model.generation_config.eos_token_id)
        for indices in self._batches([len(prompt) for prompt in prompts], "generating"):
            input_ids, attention_mask = _left_padded([prompts[i] for i in indices], min(ends), self.device)
            output = self.model.generate(
                input_ids=input_ids, attention_mask=attention_mask, max_new_tokens=max_new_tokens, use_cache=True
            )
            for i, row in zip(indices, output[:, input_ids.shape[1] :].tolist(), strict=True):
                length = next((n for n, token in enumerate(row) if token in ends), None)
                tokens = row[:length]
                text = self.tokenizer.decode(tokens, skip_special_tokens=True)
                completions[i] = Completion(text, len(tokens), finished=length is not None)
        return completions

    @torch.inference_mode()
    def response_loss(self, prompts: list[list[int]], responses: list[list[int]]) -> float:
        sequences = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
        total = 0.0
        for indices in self._batches([len(sequence) for sequence in sequences], "response loss"):
            input_ids, attention_mask = _left_padded([sequences[i] for i in indices], 0, self.device)
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
                predicting = row[-len(response) - 1 : -1].float()
                total += torch.nn.functional.cross_entropy(predicting, response, reduction="sum").item()
        return total / sum(map(len, responses))

    def _batches(self, lengths: list[int], description: str) -> Iterable[list[int]]:
        order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)  # memory runs out early or never
        with tqdm(total=len(lengths), desc=description, unit="item") as bar:
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                yield batch
                bar.update(len(batch))


def _left_padded(rows: list[list[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    input_ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
    attention_mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return input_ids, attention_mask


class VLLMBackend:
    """vLLM's offline engine; continuous batching makes a batch size unnecessary."""

    name = "vllm"

    def __init__(
        self,
        ckpt: str,
        tokenizer: PreTrainedTokenizerBase,
        eos_token_ids: list[int],
        dtype: str,
        max_length: int,
        seed: int,
        tensor_parallel_size: int,
        gpu_memory_utilization: float,
    ):
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        options: dict[str, Any] = {"gpu_memory_utilization": gpu_memory_utilization}
        if not torch.cuda.is_available():
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB
            options = {"enforce_eager": True}
        from vllm import LLM

        self.tokenizer = tokenizer
        self.eos_token_ids = eos_token_ids
        self.llm = LLM(
            model=ckpt,
            dtype=str(resolve_dtype(dtype)).removeprefix("torch."),
            max_model_len=max_length + 1,
            seed=seed,
            tensor_parallel_size=tensor_parallel_size,
            generation_config="vllm",  # not the checkpoint's: see TransformersBackend
            **options,
        )

    def generate(self, prompts: list[list[int]], max_new_tokens: int) -> list[Completion]:
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0.0, max_tokens=max_new_tokens, stop_token_ids=self.eos_token_ids)
        outputs = self.llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling)
        completions = []
        for output in outputs:
            tokens = [token for token in output.outputs[0].token_ids if token not in self.eos_token_ids]
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            completions.append(Completion(text, len(tokens), finished=output.outputs[0].finish_reason == "stop"))
        return completions

    def response_loss(self, prompts: list[list[int]], responses: list[list[int]]) -> float:
        from vllm import SamplingParams

        sequences = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
        outputs = self.llm.generate(
            [{"prompt_token_ids": sequence} for sequence in sequences],
            SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0),
        )
        total = 0.0
        for output, response in zip(outputs, responses, strict=True):
            of_response = zip(output.prompt_logprobs[-len(response) :], response, strict=True)
            total -= sum(logprobs[token].logprob for logprobs, token in of_response)
        return total / sum(map(len, responses))
