"""Each thing in its room: how long files and functions may be, and which room may not reach into which."""

import ast
import graphlib
import re
import subprocess
import sys

import pytest
from conftest import ROOT

ROOMS_BELOW = ("common", "data", "eval")  # which no script at the root may be needed for
LONGEST_FILE = {"train.py": 1500, "finetune_bert_l_sst2.py": 700}
LONGEST_FUNCTION, LONGEST_MAIN, LONGEST_README = 80, 60, 150


def tracked(pattern: str) -> list[str]:
    listed = subprocess.run(["git", "ls-files", pattern], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.split() if (ROOT / name).is_file()]


def functions(name: str):
    """Each function of the file with its number of lines, as the parser counts them."""
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node.end_lineno - node.lineno + 1


def imported(name: str) -> set[str]:
    """Everything that the file imports, anywhere in it, by dotted names."""
    modules = set()
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return modules


PROGRAMS = [name for name in tracked("*.py") if not name.startswith("tests/")]


@pytest.mark.parametrize(("name", "most"), LONGEST_FILE.items())
def test_a_file_is_read_in_one_sitting(name, most):
    assert len((ROOT / name).read_text().splitlines()) <= most


@pytest.mark.parametrize("name", PROGRAMS)
def test_no_function_is_long(name):
    lengths = dict(functions(name))
    assert {function: length for function, length in lengths.items() if length > LONGEST_FUNCTION} == {}


@pytest.mark.parametrize("name", LONGEST_FILE)
def test_main_is_the_list_of_a_runs_stages(name):
    """Short, and the last of the file's functions."""
    tree = ast.parse((ROOT / name).read_text())
    assert [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)][-1] == "main"
    assert dict(functions(name))["main"] <= LONGEST_MAIN


@pytest.mark.parametrize("name", [name for name in PROGRAMS if name.startswith(ROOMS_BELOW)])
def test_no_room_reaches_into_one_above(name):
    above = {"train", "finetune_bert_l_sst2", "experiments", "bench"} | (
        {"eval"} if not name.startswith("eval") else set()
    )
    assert not {module.partition(".")[0] for module in imported(name)} & above


def test_what_both_scripts_share_has_few_files():
    assert sum(name.startswith("common/") and not name.endswith("__init__.py") for name in PROGRAMS) <= 22


def test_no_files_import_each_other_in_a_circle():
    modules = {name.removesuffix(".py").replace("/", ".").removeprefix("bench."): name for name in PROGRAMS}
    graph = {module: imported(name) & modules.keys() for module, name in modules.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names them


@pytest.mark.parametrize("name", PROGRAMS)
def test_there_is_one_way_to_import(name):
    """The installation makes every room importable; no file helps itself."""
    assert not re.search(r"sys\.path\b", (ROOT / name).read_text())


def test_scripts_import_from_any_folder(tmp_path):
    """As after the README's installation line: the rooms are found from a folder that has nothing to do with them."""
    code = "import common.cli, data.demo, eval.benchmark, train; print(train.__file__)"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout.strip().endswith("train.py"), result.stderr
