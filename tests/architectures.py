"""Tiny random models of each architecture, trained for two steps: the table in docs/adapters.md.

python tests/architectures.py [NAME...]        prints the rows
python tests/architectures.py vllm [NAME...]   asks vLLM first about those that IN_VLLM lacks: a minute for each
"""

import contextlib
import functools
import gc
import io
import json
import multiprocessing
import re
import sys
import tempfile
from pathlib import Path
from unittest import mock

import greedy_by_vllm
import peft
import torch
import transformers
from conftest import encode_turn, make_tokenizer, relative_error
from transformers import AutoConfig, AutoModelForCausalLM

import train
from common.cli import UserError

HEAD = {"vocab_size": 258, "bos_token_id": None, "eos_token_id": 257, "pad_token_id": 257, "initializer_range": 0.1}
SMALL = HEAD | {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 512}
SHAPE = SMALL | {"intermediate_size": 192, "num_key_value_heads": 2}
GPT = HEAD | {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 512}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
SHARED = EXPERTS | {"shared_expert_intermediate_size": 64}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 64}
ROUTED |= {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
LATENT = {"num_key_value_heads": 4, "kv_lora_rank": 64, "q_lora_rank": 64, "v_head_dim": 32}
LATENT |= {"qk_rope_head_dim": 32, "qk_nope_head_dim": 32}
PUBLISHED = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}  # vLLM's kernel for CPUs takes no other sizes
SIGMOID = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}  # published so, and read by vLLM alone
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
LINEAR |= {"linear_key_head_dim": 32, "linear_value_head_dim": 32}
HYBRID = LINEAR | {"layer_types": ["linear_attention", "full_attention"]}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 64, "mamba_d_state": 8}
PER_LAYER = {"num_kv_shared_layers": 0, "vocab_size_per_layer_input": 258, "hidden_size_per_layer_input": 8}
WIDE = {"head_dim": 32}
BERT = SMALL | {"intermediate_size": 192, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
KEYED = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]

# Without dropout or noise, so that the first loss can be compared.
# Name: model type, what differs from SHAPE, or the whole configuration where it has other names, --target-modules.
ARCHITECTURES = {
    "Llama": ("llama", {}, None),
    "Llama, tied": ("llama", {"tie_word_embeddings": True}, None),
    "Llama, biased": ("llama", {"attention_bias": True, "mlp_bias": True}, None),
    "Llama, head_dim": ("llama", {"head_dim": 64}, None),
    "Mistral": ("mistral", {"sliding_window": None}, None),
    "Ministral": ("ministral", WIDE, None),
    "Ministral-3": ("ministral3", WIDE, None),
    "Gemma": ("gemma", WIDE, None),
    "Gemma-2": ("gemma2", WIDE | {"final_logit_softcapping": 30.0}, None),
    "Gemma-3": ("gemma3_text", WIDE, None),
    "Gemma-3n": (
        "gemma3n_text",
        WIDE
        | PER_LAYER
        | {
            "laurel_rank": 4,
            "activation_sparsity_pattern": [0.0, 0.0],
            "intermediate_size": [192, 192],
            "layer_types": ["sliding_attention", "full_attention"],
        },
        None,
    ),
    "Gemma-4": ("gemma4_text", WIDE | PER_LAYER | {"global_head_dim": 64}, None),
    "VaultGemma": ("vaultgemma", WIDE, None),
    "Qwen2": ("qwen2", {}, None),
    "Qwen2-MoE": ("qwen2_moe", SHARED, None),
    "Qwen3": ("qwen3", WIDE, None),
    "Qwen3-MoE": ("qwen3_moe", WIDE | EXPERTS, None),
    "Qwen3-MoE, a dense layer": ("qwen3_moe", WIDE | EXPERTS | {"mlp_only_layers": [0]}, None),
    "Qwen3-Next": ("qwen3_next", WIDE | SHARED | HYBRID, None),
    "Qwen3.5": ("qwen3_5_text", WIDE | HYBRID, None),
    "Mixtral": ("mixtral", LOCAL, None),
    "OLMoE": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}, None),
    "Phi": ("phi", {}, None),
    "Phi-3": ("phi3", {}, None),
    "PhiMoE": ("phimoe", LOCAL | {"router_jitter_noise": 0.0}, None),
    "GPT-2": ("gpt2", GPT, None),
    "GPT-NeoX": ("gpt_neox", SMALL | {"intermediate_size": 192}, KEYED),
    "GPT-J": ("gptj", GPT | {"rotary_dim": 8}, None),
    "GPT-Neo": (
        "gpt_neo",
        SMALL | {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8},
        None,
    ),
    "GPTBigCode": (
        "gpt_bigcode",
        GPT | {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
        ["c_attn", "c_proj", "c_fc"],
    ),
    "gpt-oss": ("gpt_oss", WIDE | LOCAL | {"sliding_window": 512}, None),
    "OPT": ("opt", SMALL | {"ffn_dim": 192, "word_embed_proj_dim": 128, "dropout": 0.0}, None),
    "BLOOM": ("bloom", HEAD | {"hidden_size": 128, "n_layer": 2, "n_head": 4}, KEYED),
    "MPT": ("mpt", HEAD | {"d_model": 128, "n_layers": 2, "n_heads": 4, "max_seq_len": 512}, ["Wqkv", "out_proj"]),
    "Falcon": ("falcon", SMALL, KEYED),
    "Falcon-H1": ("falcon_h1", WIDE | MAMBA | {"mamba_d_ssm": 256, "mamba_n_groups": 1}, None),
    "StableLM": ("stablelm", {}, None),
    "OLMo": ("olmo", {}, None),
    "OLMo-2": ("olmo2", {}, None),
    "OLMo-3": ("olmo3", {}, None),
    "OLMo-Hybrid": ("olmo_hybrid", {"layer_types": ["linear_attention", "full_attention"]}, None),
    "Granite": ("granite", {"logits_scaling": 8.0, "residual_multiplier": 0.22, "attention_multiplier": 0.25}, None),
    "GraniteMoE": ("granitemoe", LOCAL | {"logits_scaling": 6.0}, None),
    "GraniteMoE-Hybrid": (
        "granitemoehybrid",
        LOCAL | MAMBA | {"mamba_n_groups": 1, "shared_intermediate_size": 64, "layer_types": ["mamba", "attention"]},
        None,
    ),
    "Cohere": ("cohere", {"logit_scale": 0.0625}, None),
    "Cohere-2": ("cohere2", {"logit_scale": 0.0625}, None),
    "DeepSeek-V2": ("deepseek_v2", LATENT | PUBLISHED | ROUTED, None),
    "DeepSeek-V3": ("deepseek_v3", LATENT | PUBLISHED | ROUTED | SIGMOID, None),
    "MiniCPM-3": ("minicpm3", LATENT, None),
    "ModernBERT, decoder": ("modernbert-decoder", {"bos_token_id": 1}, None),
    "Llama-4": ("llama4_text", WIDE | LOCAL | {"intermediate_size_mlp": 192, "num_experts_per_tok": 1}, None),
    "SmolLM3": ("smollm3", {}, None),
    "Seed-OSS": ("seed_oss", WIDE | {"attention_dropout": 0.0, "residual_dropout": 0.0}, None),
    "EXAONE-4": ("exaone4", {"sliding_window": 512, "sliding_window_pattern": 2}, None),
    "GLM": ("glm", WIDE, None),
    "GLM-4": ("glm4", WIDE, None),
    "GLM-4-MoE": ("glm4_moe", WIDE | ROUTED, None),
    "StarCoder2": ("starcoder2", {}, None),
    "Nemotron": ("nemotron", {}, None),
    "Nemotron-H": (
        "nemotron_h",
        WIDE | {"mamba_num_heads": 4, "mamba_head_dim": 64, "ssm_state_size": 8, "n_groups": 1},
        None,
    ),
    "Helium": ("helium", WIDE, None),
    "Arcee": ("arcee", {}, None),
    "Apertus": ("apertus", {}, None),
    "Persimmon": ("persimmon", {}, KEYED),
    "CodeGen": ("codegen", GPT | {"rotary_dim": 8}, None),
    "LFM2": ("lfm2", {"layer_types": ["conv", "full_attention"], "conv_dim": 128, "block_dim": 128}, None),
    "Bamba": ("bamba", MAMBA | {"attn_layer_indices": [1]}, None),
    "Jamba": (
        "jamba",
        {"num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4},
        None,
    ),
    "Mamba": ("mamba", SMALL | {"state_size": 8}, ["in_proj", "out_proj"]),
    "Mamba, in_proj": ("mamba", SMALL | {"state_size": 8}, ["in_proj"]),
    "Mamba-2": (
        "mamba2",
        SMALL | {"state_size": 8, "head_dim": 64, "num_heads": 4, "n_groups": 1},
        ["in_proj"],
    ),
    "RecurrentGemma": (
        "recurrent_gemma",
        {"lru_width": 128, "attention_window_size": 512, "block_types": ["recurrent", "attention"]},
        None,
    ),
    "RWKV": ("rwkv", SMALL | {"attention_hidden_size": 128, "intermediate_size": 192}, ["key", "value", "receptance"]),
    "BERT": ("bert", BERT, ["query", "value"]),
    "BERT, is_decoder": ("bert", BERT | {"is_decoder": True}, ["query", "value"]),
    "T5": ("t5", {"vocab_size": 258, "d_model": 128, "d_kv": 32, "d_ff": 192, "num_layers": 2, "num_heads": 4}, None),
    "ERNIE-4.5-MoE": (
        "ernie4_5_moe",
        {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 64, "moe_layer_start_index": 1},
        None,
    ),
    "dots.llm1": ("dots1", ROUTED, None),
    "MiniMax": ("minimax", WIDE | LOCAL | {"layer_types": ["linear_attention", "full_attention"]}, None),
    "HunYuan": ("hunyuan_v1_dense", WIDE, None),
    "nanochat": ("nanochat", {}, None),
    "Doge": ("doge", {}, None),
    "DiffLlama": ("diffllama", {}, None),
    "XGLM": (
        "xglm",
        HEAD | {"d_model": 128, "ffn_dim": 192, "num_layers": 2, "attention_heads": 4} | NO_DROPOUT,
        None,
    ),
}
IN_VLLM = Path(__file__).with_name("architectures_in_vllm.json")  # what `in_vllm` gave, by name
EXAMPLES = [("Count to 3", "One two three"), ("Count to 1 please", "One"), ("Add 2 and 2", "It is four, I think")]
IDS = torch.arange(3, 43).view(2, 20)
PROMPTS = [row[:length].tolist() for row in IDS for length in (5, 20)]
REASONS = {  # by what vLLM's error has
    "does not support LoRA|not is_lora_enabled": "vLLM has no LoRA for it",
    "triton|selective_scan_fwd|only for CUDA": "the kernels need a GPU",
    "requires BF16": "on a CPU vLLM has it in bfloat16 alone",
    "failed to be inspected": "vLLM's module needs torchvision",
    "received.*gate_up_proj": "vLLM takes no adapter on `gate_up_proj`",
}
CLOSE = 5e-3  # of log-probabilities, which two steps of training move by about 1


def save_base(name: str, folder: Path) -> None:
    """A random model and the tests' tokenizer in `folder`; biases and attention sinks are not zero."""
    kind, settings, _ = ARCHITECTURES[name]
    config = AutoConfig.for_model(kind, **(settings if "vocab_size" in settings else SHAPE | settings))
    make_tokenizer().save_pretrained(folder)
    torch.manual_seed(0)
    kinds = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = kinds.from_config(config, dtype=torch.float32)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias") or "sink" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)


def loaded(folder: Path) -> transformers.PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=IDS, use_cache=False).logits.clone()


@torch.no_grad()
def loss_of_transformers(model: transformers.PreTrainedModel) -> float:
    """The mean over the response tokens of EXAMPLES, padded on the right."""
    rows = [encode_turn(make_tokenizer(), *example, 512) for example in EXAMPLES]
    pad = torch.nn.utils.rnn.pad_sequence
    columns = {
        name: pad([torch.tensor(values(row)) for row in rows], batch_first=True, padding_value=value)
        for name, values, value in (
            ("input_ids", lambda row: row["input_ids"], 257),
            ("labels", lambda row: row["labels"], -100),
            ("attention_mask", lambda row: [1] * len(row["labels"]), 0),
        )
    }
    return float(model(**columns, use_cache=False).loss)


def trained(name: str, folder: Path, method: str = "ba-lora") -> dict:
    """What became of an architecture: `refused`, the error's line; else its losses, what stands in run.json, whether
    it was packed, how far apart the trained model, merged/, base + adapter/ and the two of them merged by PEFT are, and
    the greedy tokens of the first and the last of these."""
    save_base(name, folder / "base")
    rows = [{"instruction": instruction, "output": output} for instruction, output in EXAMPLES]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"--model": folder / "base", "--data": folder / "data.jsonl", "--output-dir": folder / "out"}
    options |= {"--method": method, "--rank": 4, "--max-steps": 2, "--learning-rate": 1e-2, "--save-steps": 0}
    options |= {"--batch-size": 3, "--gradient-accumulation": 1, "--report-to": "none", "--logging-steps": 1}
    argv = [str(word) for option in options.items() for word in option]
    targets = ARCHITECTURES[name][2]
    found, export = [], train.export_model

    def export_model(model: transformers.PreTrainedModel, *rest: object, **options: object) -> None:
        found.append(logits(model))
        export(model, *rest, **options)

    try:
        with contextlib.redirect_stdout(io.StringIO()) as printed, mock.patch("train.export_model", export_model):
            train.main(argv + (["--target-modules", *targets] if targets else []))
    except UserError as error:
        return {"refused": str(error)}
    base, merged = loaded(folder / "base"), loaded(folder / "out" / "merged")
    before, loss = logits(base), loss_of_transformers(base)
    adapted = peft.PeftModel.from_pretrained(base, folder / "out" / "adapter")
    all_logits = [logits(merged), logits(adapted), logits(adapted := adapted.merge_and_unload())]
    first = json.loads((folder / "out" / "metrics.jsonl").read_text().splitlines()[0])
    greedy = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 257}
    return {
        "loss": (first["task"], loss),
        "errors": [relative_error(other, found[0]) for other in all_logits],
        "generated": [model.generate(IDS, **greedy).tolist() for model in (merged, adapted)],
        "moved": relative_error(all_logits[0], before),
        "packed": "batches are padded" not in printed.getvalue(),
        "layers": json.loads((folder / "out" / "run.json").read_text())["linear_layers"],
        "printed": printed.getvalue(),
    }


def cells(name: str, result: dict) -> list[str]:
    """A row of the table."""
    if "refused" in result:
        return [name, "refused: " + re.sub(r"\S+/base\b", "it", result["refused"]), "–", "–", "–", "–"]
    layers = {what: ", ".join(f"`{layer}`" for layer in names) for what, names in result["layers"].items()}
    loads = "yes" if max(result["errors"]) < 1e-4 else "no"
    return [
        name,
        layers["adapted"],
        layers["not_adapted"] or "–",
        "yes" if result["packed"] else "no",
        loads,
        verdict(recorded().get(name, "not tried")),
    ]


@functools.cache
def vllm_knows() -> set[str]:
    from vllm import LLM, ModelRegistry  # noqa: F401  # LLM's imports, before a process is forked for each engine

    gc.collect()
    gc.freeze()  # an engine collects often
    return set(ModelRegistry.get_supported_archs())


@torch.no_grad()
def distance_by_vllm(folder: Path, model: Path, adapter: Path | None) -> float | str:
    """How far vLLM's log-probabilities of `model` with `adapter` are from transformers' of `folder`/out/merged at most,
    at each of vLLM's greedy tokens; or the error with which vLLM ended."""
    out = folder / "by_vllm.json"
    out.unlink(missing_ok=True)
    arguments = (PROMPTS, 4, out, [(model, adapter)])
    process = multiprocessing.get_context("fork").Process(target=greedy_by_vllm.main, args=arguments)
    process.start()
    process.join(600)
    process.kill()
    if not out.exists():
        return f"ended by {process.exitcode}"
    found = json.loads(out.read_text())
    if isinstance(found, str):
        return found
    merged, errors = loaded(folder / "out" / "merged"), []
    for prompt, made in zip(PROMPTS, found[0], strict=True):
        rows = merged(input_ids=torch.tensor([prompt + made["tokens"]]), use_cache=False).logits[0, len(prompt) - 1 :]
        for row, theirs in zip(rows.log_softmax(-1), made["logprobs"], strict=False):
            errors += [abs(float(row[token]) - logprob) for token, logprob in theirs]
    return max(errors)


def in_vllm(result: dict, folder: Path) -> dict | str:
    """Distances of merged/ and of base + adapter/ in vLLM, or errors; a text where vLLM was not asked."""
    if "refused" in result:
        return "–"
    if json.loads((folder / "base" / "config.json").read_text())["architectures"][0] not in vllm_knows():
        return "not tried: vLLM does not list it"
    forms = {"merged": (folder / "out" / "merged", None), "adapter": (folder / "base", folder / "out" / "adapter")}
    return {form: distance_by_vllm(folder, *paths) for form, paths in forms.items()}


def verdict(found: dict | str) -> str:
    """The cell of the table."""
    if isinstance(found, str):
        return found
    reasons = {}
    for form, distance in found.items():
        if isinstance(distance, str):
            known = (words for pattern, words in REASONS.items() if re.search(pattern, distance))
            reasons[form] = next(known, distance.partition("\n")[0].replace("|", "/"))
        elif not distance < CLOSE:
            reasons[form] = f"{distance:.1g} off"
    if "merged" in reasons:
        return f"no: {reasons['merged']}"
    return f"merged alone: {reasons['adapter']}" if reasons else "yes (merged, adapter)"


def recorded() -> dict:
    return json.loads(IN_VLLM.read_text()) if IN_VLLM.exists() else {}


def main(words: list[str]) -> None:
    names = [word for word in words if word != "vllm"] or list(ARCHITECTURES)
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            result = trained(name, Path(folder))
            if "vllm" in words and name not in recorded():
                found = {name: in_vllm(result, Path(folder))}
                found |= recorded()
                ordered = {name: found[name] for name in ARCHITECTURES if name in found}
                IN_VLLM.write_text(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n")
            print("| " + " | ".join(cells(name, result)) + " |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
