"""Greedy tokens by vLLM's own engine, in a process of its own: greedy_by_vllm.py MODEL ADAPTER|- PROMPTS TOKENS OUT."""

import json
import sys
from pathlib import Path

if __name__ == "__main__":
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    model, adapter, prompts, num_tokens, out = sys.argv[1:]
    options, request = {}, None
    if adapter != "-":
        rank = json.loads((Path(adapter) / "adapter_config.json").read_text())["r"]
        options = {"enable_lora": True, "max_lora_rank": rank}
        request = LoRARequest("adapter", 1, adapter)
    llm = LLM(model, dtype="float32", max_model_len=512, enforce_eager=True, generation_config="vllm", **options)
    sampling = SamplingParams(temperature=0.0, max_tokens=int(num_tokens), ignore_eos=True)
    inputs = [{"prompt_token_ids": ids} for ids in json.loads(Path(prompts).read_text())]
    outputs = llm.generate(inputs, sampling, lora_request=request, use_tqdm=False)
    Path(out).write_text(json.dumps([list(output.outputs[0].token_ids) for output in outputs]))
