"""README.md and docs/: every link, path, option, variable and name in them exists, and the first page stays short."""

import ast
import dataclasses
import functools
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

import finetune_bert_l_sst2 as nlu
from eval.published import published_tables

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
FOLDERS = ("bench", "common", "configs", "data", "docs", "eval", "experiments", "scripts", "tests")
WRITTEN_BY_RUNS = ("output/", "results/")

# Options of other programs that the pages name, by the program that takes them.
OTHERS = {
    "deepspeed": "--no_local_rank --num_gpus --hostfile",
    "torchrun": "--nproc_per_node --nnodes --node_rank --master_addr --master_port --shutdown-timeout "
    "--signals-to-handle --max-restarts",
    "vllm": "--served-model-name --host --port --api-key --enable-lora --max-lora-rank --lora-modules --model",
    "accelerate": "--num_processes",
    "sbatch": "--requeue",
    "tensorboard": "--logdir",
    "pip": "--no-deps --no-binary --dest",
    "convert_hf_to_gguf.py": "--outfile --outtype",
    "convert_lora_to_gguf.py": "--outfile --outtype --base",
    "llama-server": "--model --lora --jinja",
    "snakemake": "--executor --jobs --unlock --default-resources --set-resources --set-threads --cores "
    "--slurm-status-command",
    "every script": "--help",
}
OTHERS = {program: set(options.split()) for program, options in OTHERS.items()}
# The shell scripts hand their options on to one of these.
BEHIND = {name: ["train.py"] for name in ("ba-lora", "lora", "pissa", "full-ft", "nlg")}
BEHIND |= {"glue": ["finetune_bert_l_sst2.py"]}
BEHIND |= {"experiment": ["snakemake"]}
BEHIND |= {"eval": ["eval/suite.py"]}

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


# ------------------------------------------------------------------------------------------------------------------
# Reading a page
# ------------------------------------------------------------------------------------------------------------------


def fences(text: str) -> list[tuple[str, str]]:
    """Language and content of every fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def prose(text: str) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```\w*\n.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def spans(text: str) -> list[str]:
    """What stands between backticks in the prose, a line end as a space."""
    return [span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", prose(text))]


def commands(text: str) -> list[list[str]]:
    """The words of every command: of the shell blocks, and of spans that start a program."""
    found = []
    for language, block in fences(text):
        if language == "sh":
            found += [words for line in shell_lines(block) for words in split_at_operators(line)]
    starts = re.compile(r"([A-Z_]+=\S+ )*(sh|python|deepspeed|torchrun|vllm|tensorboard|--[a-z][\w-]+) ")
    return found + [shlex.split(span) for span in spans(text) if starts.match(span + " ")]


def shell_lines(block: str) -> list[str]:
    """The logical lines of a shell block: a line that goes on, by a backslash or in quotes, is one with the next."""
    lines, pending = [], ""
    for line in block.replace("\\\n", " ").splitlines():
        pending = f"{pending}\n{line}" if pending else line
        try:
            shlex.split(pending, comments=True)
        except ValueError:  # a quotation that is still open
            continue
        lines.append(pending)
        pending = ""
    assert not pending, f"an open quotation in {pending!r}"
    return lines


def split_at_operators(line: str) -> list[list[str]]:
    parts: list[list[str]] = [[]]
    for word in shlex.split(line, comments=True):
        if word in ("&&", "||", ";", "|"):
            parts.append([])
        else:
            parts[-1].append(word)
    return [part for part in parts if part]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# ------------------------------------------------------------------------------------------------------------------
# What the project has
# ------------------------------------------------------------------------------------------------------------------


@functools.cache
def options_of(script: str) -> frozenset[str]:
    """The options of a Python script: of its `Arguments`, or those that it adds to argparse."""
    tree = ast.parse((ROOT / script).read_text())
    shared = ["bench/side_by_side.py"] if "step_parser" in (ROOT / script).read_text() else []  # it adds to argparse
    trees = [tree, *(ast.parse((ROOT / file).read_text()) for file in shared)]
    calls = [node for each in trees for node in ast.walk(each) if isinstance(node, ast.Call)]
    added = [call for call in calls if getattr(call.func, "attr", None) == "add_argument"]
    names = {word.value for call in added for word in call.args if isinstance(word, ast.Constant)}
    arguments = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Arguments"]
    if arguments and script.startswith(("bench/", "experiments/")):
        fields = [node.target.id for node in arguments[0].body if isinstance(node, ast.AnnAssign)]
    elif arguments:
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        declared = dataclasses.fields(module.Arguments)
        fields = [item.name for item in declared] + [f"no_{item.name}" for item in declared if item.type is bool]
    else:
        fields = []
    return frozenset(names | {f"--{name.replace('_', '-')}" for name in fields} | OTHERS["every script"])


def python_scripts() -> list[str]:
    files = [*ROOT.glob("*.py"), *(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))]
    texts = {str(file.relative_to(ROOT)): file.read_text() for file in files}
    return [name for name, text in texts.items() if "__main__" in text and not name.startswith("tests/")]


@functools.cache
def known_options() -> frozenset[str]:
    """Of all scripts and of the other programs."""
    return frozenset().union(*map(options_of, python_scripts()), *OTHERS.values())


def takers(words: list[str]) -> list[tuple[str, frozenset[str]]]:
    """The options in a command's words, each with those that the program before it knows."""
    known, found = known_options(), []
    for word in words:
        name = Path(word).name
        if name.endswith(".py"):
            known = frozenset(OTHERS[name]) if name in OTHERS else options_of(word)
        elif name.endswith(".sh"):
            behind = BEHIND.get(name.removesuffix(".sh"), [])
            known = frozenset().union(*(OTHERS[other] if other in OTHERS else options_of(other) for other in behind))
        elif word in OTHERS:
            known = frozenset(OTHERS[word])
        elif word.startswith("vllm."):
            known = frozenset(OTHERS["vllm"])
        elif word.startswith("--"):
            found.append((word.partition("=")[0], known))
    return found


def variables_of(script: Path) -> set[str]:
    """What a shell script, or one that it names, reads from the environment."""
    seen, waiting, names = set(), [script], set()
    while waiting:
        file = waiting.pop()
        if file in seen or not file.is_file():
            continue
        seen.add(file)
        text = file.read_text()
        names |= set(re.findall(r"\$\{?([A-Z][A-Z0-9_]+)", text))
        waiting += [file.parent / name for name in re.findall(r"[\w-]+\.sh", text)]
    return names


def looks_like_a_path(word: str) -> bool:
    """Whether a word can only be meant as a file of this repository."""
    if not re.fullmatch(r"[\w./*-]+", word) or word.startswith((*WRITTEN_BY_RUNS, "/", ".", "-")):
        return False
    if word.split("/")[0] in FOLDERS and "/" in word:
        return True
    return word.endswith((".py", ".sh")) or word.startswith("requirements")


# ------------------------------------------------------------------------------------------------------------------
# Tests
# ------------------------------------------------------------------------------------------------------------------


def test_the_first_page_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 140


def test_the_first_page_links_every_other():
    text = (ROOT / "README.md").read_text()
    others = [str(page.relative_to(ROOT)) for page in PAGES if page.name != "README.md"]
    assert len(others) >= 9
    assert [page for page in others if f"]({page})" not in text] == []


@every_page
def test_links_and_pictures_resolve(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text()))
    for target in targets:
        if target.startswith(("https://", "http://")):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.is_relative_to(ROOT) and file.exists(), f"{target}: no such file"
        if anchor:
            assert anchor in anchors(file), f"{target}: no such heading"


@every_page
def test_options_exist(page):
    text = page.read_text()
    for words in commands(text):
        for option, known in takers(words):
            assert option in known, f"{option} in {shlex.join(words)!r}"
    for option in re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", " ".join(spans(text))):
        assert option in known_options(), option


@every_page
def test_paths_exist(page):
    text = page.read_text()
    words = [word for line in commands(text) for word in line]
    words += [word for span in spans(text) for word in span.split()]
    for word in filter(looks_like_a_path, words):
        assert any(ROOT.glob(word)), f"{word}: no such file"


@every_page
def test_variables_of_the_shell_scripts_exist(page):
    text = page.read_text()
    anywhere = set().union(*map(variables_of, (ROOT / "scripts").glob("*.sh")))
    for words in commands(text):
        scripts = [word for word in words if word.endswith(".sh")]
        assigned = [word.partition("=")[0] for word in words if re.match(r"[A-Z][A-Z0-9_]+=", word)]
        for name in assigned if scripts else ():
            assert name in variables_of(ROOT / scripts[0]), f"{name} in {shlex.join(words)!r}"
    for span in spans(text):
        if match := re.fullmatch(r"([A-Z][A-Z0-9_]+)=.*", span):
            assert match[1] in anywhere, span


def test_names_beside_the_formulas_are_defined():
    section = (ROOT / "README.md").read_text().partition("## Where each formula is")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    table = rows[2 : next(n for n, row in enumerate(rows) if row.startswith("| `--formulation`"))]
    assert len(table) > 10
    for row in table:
        names = re.findall(r"`([^`]+)`", row.split("|")[-2])
        files = [name for name in names if name.endswith(".py")]
        defined = set().union(*(names_defined_in(ROOT / file) for file in ("train.py", *files)))
        assert set(names) - set(files) <= defined, row


def names_defined_in(file: Path) -> set[str]:
    """The functions, classes and constants of a file."""
    text = file.read_text()
    return set(re.findall(r"^(?:def |class )?([A-Za-z_]\w*)(?=[(:]| *=)", text, re.MULTILINE))


def test_the_request_to_a_server_has_the_prompt_of_training():
    from common.templates import ALPACA_PROMPT

    block = next(block for _, block in fences((ROOT / "docs/own-model.md").read_text()) if "v1/completions" in block)
    request = json.loads(shlex.split(block)[-1])
    instruction = re.search(r"### Instruction:\n(.*)\n\n### Response", request["prompt"])[1]
    assert request["prompt"] == ALPACA_PROMPT.format(instruction=instruction)


def test_published_numbers_are_those_of_the_data():
    published = [table.cells for table in published_tables() if (table.part, table.version) == ("nlg", "arxiv2024")]
    columns = ("gsm8k", "hendrycks_math", "humaneval", "mbpp", "mt_bench")
    rows = re.findall(r"^\| (Full FT|LoRA|PiSSA|BA-LoRA) \|(.*)\|$", all_tables(), re.MULTILINE)
    checked = 0
    for method, cells in rows:
        printed = [tuple(map(float, pair)) for pair in re.findall(r"(\d+\.\d\d) ?± ?(\d+\.\d\d)", cells)]
        of_models = [[tuple(model[method][name]) for name in columns] for model in published]
        assert printed in of_models, f"{method}: {printed}"
        checked += 1
    assert checked == 12  # LLaMA-2-7B on the first page and, with Mistral-7B, among the tables to make again


def all_tables() -> str:
    return "\n".join((ROOT / name).read_text() for name in ("README.md", "docs/reproducing.md"))


def test_every_rate_is_in_the_table_of_rates():
    """Configurations, scripts, experiments and the pages' commands take the rate of their method and model from it."""
    page = (ROOT / "docs/own-model.md").read_text().partition("## Settings to begin with")[2]
    table = {}
    for row in re.findall(r"^\| (SmolLM2|MiniLM|1 to 3 B|LLaMA)[^|]*\|([^|]*)\|([^|]*)\|([^|]*)\|", page, re.M):
        full, lora, pissa = ([float(rate) for rate in re.findall(r"\d+e-\d+", cell)] for cell in row[1:])
        table[row[0]] = {"full": full, "lora": lora, "pissa": pissa, "ba-lora": pissa}
    assert len(table) == 4
    used = [("SmolLM2", "pissa", yaml.safe_load((ROOT / "configs/demo.yaml").read_text())["learning_rate"])]
    paper = yaml.safe_load((ROOT / "configs/llama2_7b_metamath.yaml").read_text())["learning_rate"]
    used += [("LLaMA", method, paper) for method in table["LLaMA"]]
    used += [("MiniLM", method, rate) for method, rate in nlu.LEARNING_RATES.items()]
    for name in ("glue-demo", "glue-imbalance-demo"):
        arms = yaml.safe_load((ROOT / f"experiments/{name}.yaml").read_text())["axes"]["method"].values()
        used += [("MiniLM", arm["method"], arm["learning-rate"]) for arm in arms]
    script = (ROOT / "scripts/ba-lora.sh").read_text()
    used += [("SmolLM2", *pair) for pair in re.findall(r"^ +(full|lora)\) set -- --learning-rate (\S+)", script, re.M)]
    arms = yaml.safe_load((ROOT / "experiments/frontier.yaml").read_text())["axes"]["arm"]
    used += [("SmolLM2", arm["method"], arm["learning-rate"]) for name, arm in arms.items() if "third" not in name]
    text = "\n".join(file.read_text() for file in PAGES)
    commands = re.findall(r"train\.py(?:[^\n]*\\\n)*[^\n]*", text)
    command = re.compile(r"--method (\S+)(?:.|\n)*--learning-rate (\S+)")
    used += [("SmolLM2", *found.groups()) for text in commands if (found := command.search(text))]
    assert len(used) >= 30
    wrong = [use for use in used if not min(row := table[use[0]][use[1]]) <= float(use[2]) <= max(row)]
    assert not wrong
