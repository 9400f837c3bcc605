"""Greedy tokens by vLLM's own engine, in a process of its own: greedy_by_vllm.py PROMPTS TOKENS OUT MODEL[+ADAPTER]...

OUT gets a list per model, of the tokens after each prompt.
"""

import gc
import json
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # one process, which imports vLLM once
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    prompts, num_tokens, out, *models = sys.argv[1:]
    inputs = [{"prompt_token_ids": ids} for ids in json.loads(Path(prompts).read_text())]
    sampling = SamplingParams(temperature=0.0, max_tokens=int(num_tokens), ignore_eos=True)
    found = []
    for name in models:
        model, _, adapter = name.partition("+")
        options, request = {"distributed_executor_backend": "uni"}, None
        if adapter:
            rank = json.loads((Path(adapter) / "adapter_config.json").read_text())["r"]
            options |= {"enable_lora": True, "max_lora_rank": rank}
            request = LoRARequest("adapter", 1, adapter)
        llm = LLM(model, dtype="float32", max_model_len=512, enforce_eager=True, generation_config="vllm", **options)
        outputs = llm.generate(inputs, sampling, lora_request=request, use_tqdm=False)
        found.append([list(output.outputs[0].token_ids) for output in outputs])
        del llm
        gc.collect()
    Path(out).write_text(json.dumps(found))
