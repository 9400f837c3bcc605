"""Greedy tokens by vLLM's own engine. It takes its process over: run it in one that is forked for it."""

import gc
import json
import os
from pathlib import Path


def main(prompts: list[list[int]], num_tokens: int, out: Path, models: list[tuple[Path, Path | None]]) -> None:
    """Writes a list per model, of the tokens after each prompt; a model is its folder and an adapter's, or None."""
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    os.environ |= settings | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # one process, which imports vLLM once
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    inputs = [{"prompt_token_ids": ids} for ids in prompts]
    sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    found = []
    for model, adapter in models:
        options = {"dtype": "float32", "max_model_len": 512, "distributed_executor_backend": "uni"}
        request = None
        if adapter is not None:
            rank = json.loads((adapter / "adapter_config.json").read_text())["r"]
            options |= {"enable_lora": True, "max_lora_rank": rank}
            request = LoRARequest("adapter", 1, str(adapter))
        llm = LLM(str(model), enforce_eager=True, generation_config="vllm", **options)
        outputs = llm.generate(inputs, sampling, lora_request=request, use_tqdm=False)
        found.append([list(output.outputs[0].token_ids) for output in outputs])
        del llm
        gc.collect()
    out.write_text(json.dumps(found))
