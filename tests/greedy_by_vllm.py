"""Greedy tokens by vLLM's own engine. It takes its process over: run it in one that is forked for it.

The end token may be chosen here like any other. transformers' `generate(min_new_tokens=...)` forbids it, so its tokens
are no reference. Those of a forward pass are.
"""

import gc
import json
import os
import traceback
from pathlib import Path

LIKELIEST = 20  # how many log-probabilities of each place are kept; vLLM gives no more unless it is told to


def main(prompts: list[list[int]], num_tokens: int, out: Path, models: list[tuple[Path, Path | None]]) -> None:
    """Writes what follows each prompt, for each of `models`: a folder and an adapter's, or None.

    A list per model and prompt: `tokens`, and for each of them `logprobs`, pairs of a token and its log-probability.
    In place of these lists, a text where vLLM raised an error.
    """
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    settings |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    os.environ |= settings | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # one process, which imports vLLM once
    import torch
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    torch.compiler.set_stance("force_eager")  # the sampler would be compiled for a few tokens
    inputs = [{"prompt_token_ids": ids} for ids in prompts]
    sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, logprobs=LIKELIEST)
    found = []
    for model, adapter in models:
        options = {"dtype": "float32", "max_model_len": 512, "distributed_executor_backend": "uni"}
        request = None
        if adapter is not None:
            rank = json.loads((adapter / "adapter_config.json").read_text())["r"]
            options |= {"enable_lora": True, "max_lora_rank": rank}
            request = LoRARequest("adapter", 1, str(adapter))
        try:
            llm = LLM(str(model), enforce_eager=True, generation_config="vllm", **options)
            outputs = llm.generate(inputs, sampling, lora_request=request, use_tqdm=False)
        except Exception as error:  # of any kind: the engine hands on what a model's code, torch or a kernel raised
            reason = str(error) or traceback.extract_tb(error.__traceback__)[-1].line
            out.write_text(json.dumps(f"{type(error).__name__}: {reason}"))
            raise
        found.append([])
        for made, *_ in (output.outputs for output in outputs):
            places = [[(token, its.logprob) for token, its in place.items()] for place in made.logprobs]
            found[-1].append({"tokens": list(made.token_ids), "logprobs": places})
        del llm
        gc.collect()
    out.write_text(json.dumps(found))
