"""The common part of HumanEval and MBPP: the code in a completion, its verdict from the sandbox, pass@k."""

import ast
import builtins
import codeop
import functools
import math
import re
import symtable
import sys
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from common.cli import UserError, option, require_positive
from common.intervals import mean_of_shares, score_line, share
from eval import benchmark
from eval.benchmark import Run, after_thoughts, digest
from eval.sandbox import INSIDE, Limits, Program, Verdict, packages, require_isolation, run_programs


@dataclass
class ProgramArguments:
    """How programs are run and counted."""

    k: list[int] = option([1], "the k of pass@k; none may be above --samples")
    timeout: float = option(Limits.timeout, "seconds of CPU time, and of waiting, for one program with its tests")
    memory_mib: int = option(Limits.memory_mib, "memory for one program")
    workers: int | None = option(None, "programs that run at the same time; None: one per core of this process")
    unsafe: bool = option(False, "run the model's programs even where nothing isolates them from this machine")


@dataclass
class Arguments(ProgramArguments, benchmark.Arguments):
    """The arguments of HumanEval and MBPP."""


def check_code_arguments(args: Arguments) -> None:
    """Prints the isolation that the sandbox has here.

    Raises:
        UserError: a value out of range; nothing isolates programs here and `--unsafe` is not given.
    """
    require_positive(args, "timeout", "memory_mib", "workers")
    if min(args.k, default=0) <= 0:
        raise UserError(f"--k is {' '.join(map(str, args.k)) or 'empty'}: every k must be above 0")
    if args.rescore is None and max(args.k) > args.samples:
        raise UserError(f"--k {max(args.k)} needs as many --samples; there are {args.samples}")
    print(require_isolation(args.unsafe).describe())


def pass_at_k(n: int, c: int, k: int) -> float:
    """The unbiased estimate of pass@k from c passes among n samples: 1 − C(n−c, k) / C(n, k) (arXiv 2107.03374, eq. 1).

    It is computed in whole numbers up to the last division, so that nothing cancels.
    """
    return (math.comb(n, k) - math.comb(n - c, k)) / math.comb(n, k)


# ----------------------------------------------------------------------------------------------------------------------
# The code in a completion: the statements that Python's parser finds in it, whatever stands between them
# ----------------------------------------------------------------------------------------------------------------------

# A model may go on after its own end, or with a problem that it makes up.
END_OF_TEXT = re.compile(r"<\|[\w ]+\|>|</s>[ \t]*$|^(?:" + "|".join(benchmark.BEGINNINGS) + ")", re.MULTILINE)
FENCE = re.compile(r"(.*?)(`{3,}|~{3,})(.*)")
INLINE = re.compile(r"[ \t]*(?:(?:python3?|py)\b[ \t]*)?(?=\w)(.*?)(?:`{3,}|~{3,})(.*)", re.IGNORECASE)
MARK = re.compile(r"([ \t]*)(?:>>>|In \[\d+\]:|\.\.\.:?|>)(?: |$)")  # an interpreter's prompts, a quotation
COMPOUND = re.compile(r"(?:async|class|def|for|if|try|while|with)\b|@")
CONTINUES = re.compile(r"(?:elif|else|except|finally)\b")
# Words in the lines before a further version: that it replaces the version before, or that it stands beside it.
CORRECTS = re.compile(
    r"\b(?:actually|correct(?:ed|ion|ly)?|final|fix(?:ed)?|improved|revised|sorry|updated|wait)\b", re.I
)
BESIDE = re.compile(r"\b(?:also|alternatively?|another|buggy|incorrect\w*|mistakes?|naive|not|other|wrong)\b", re.I)
ODD_INDENT = re.compile(r"^[ \t]*[^\S\n \t][^\S\n]*", re.MULTILINE)  # with blanks that are neither space nor tab
# A statement with one of these reads, shows, tests or ends something: it is no part of the function.
DRIVES = set("__name__ _exit argv assert exit input main parse_args print quit show stdin testmod".split())  # noqa: SIM905
READS = set("argv input parse_args stdin".split())  # noqa: SIM905
NOT_HARMLESS = set("antigravity idlelib this tkinter turtle turtledemo".split())  # noqa: SIM905  # act, or need a screen
PACKAGES = {Path(folder).name for folder in packages()}  # that a program may import beside Python's library
BUILT_IN = frozenset(dir(builtins))
MOST_PARSED = 1_000_000  # characters of one completion that are parsed: some texts would take for ever
MOST_ROUNDS = 10  # rounds in which statements that change needed data are added
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
IMPORTS = (ast.Import, ast.ImportFrom)
DATA = (ast.Constant, ast.JoinedStr, ast.List, ast.Tuple, ast.Set, ast.Dict, ast.ListComp, ast.SetComp, ast.DictComp)
DATA += (ast.BinOp, ast.UnaryOp, ast.Compare)  # expressions that give no function


class Names(NamedTuple):
    """Names of the module in a statement."""

    binds: set[str]
    reads: set[str]  # and built-in names; functions in the statement count
    at_once: set[str]  # the names that are read when the statement runs


@dataclass
class Statement:
    """Code that stands outside every block of code; a broken statement has no `nodes`."""

    text: str
    lines: range
    indent: int
    group: int  # the same for statements between which there is nothing but code
    introduction: str  # the prose before the group
    nodes: list[ast.stmt]

    def walk(self) -> Iterator[ast.AST]:
        return (node for statement in self.nodes for node in ast.walk(statement))

    @functools.cached_property
    def words(self) -> set[str]:
        """Every name and attribute in it, and "assert" where it has one."""
        return {
            "assert" if isinstance(node, ast.Assert) else getattr(node, "id", getattr(node, "attr", ""))
            for node in self.walk()
        }

    @functools.cached_property
    def calls(self) -> set[str]:
        """The functions and methods that it calls when it runs."""
        run = (node for statement in self.nodes for node in _at_once(statement))
        return {getattr(n.func, "id", getattr(n.func, "attr", "")) for n in run if isinstance(n, ast.Call)}

    @functools.cached_property
    def is_data(self) -> bool:
        """Whether its values are such that nobody calls, by an expression or by a built-in function."""
        values = [getattr(node, "value", None) for node in self.nodes]
        plain = (isinstance(v, DATA) or getattr(getattr(v, "func", None), "id", None) in BUILT_IN for v in values)
        return all(plain) and not any(isinstance(node, ast.Lambda) for node in self.walk())

    @functools.cached_property
    def returns(self) -> bool:
        """Whether it belongs into a function."""
        return any(map(_returns, self.nodes))

    @functools.cached_property
    def names(self) -> Names:
        return _names_of(self.text) if self.nodes else Names(set(), set(), set())

    @functools.cached_property
    def is_absent(self) -> bool:
        """Whether it imports a module that no program has here: the name of a file, or a package."""
        known = sys.stdlib_module_names | PACKAGES
        imports = [node for node in self.nodes if isinstance(node, IMPORTS)]
        return any(module.split(".")[0] not in known for node in imports for module in _modules(node))

    def is_only(self, kinds: tuple[type, ...]) -> bool:
        return all(isinstance(node, kinds) for node in self.nodes)

    def is_stub(self) -> bool:
        """Whether it defines functions or classes and leaves their bodies open."""
        return bool(self.nodes) and all(map(_is_open, self.nodes))


def _modules(node: ast.Import | ast.ImportFrom) -> list[str]:
    """The modules that an import names; a relative one begins with its points."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return ["." * node.level + (node.module or "")]


def _at_once(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes outside of the functions in it."""
    waiting = [node]
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, (*DEFINITIONS, ast.Lambda)):
            waiting += ast.iter_child_nodes(node)


def _returns(node: ast.AST) -> bool:
    """Whether it belongs into a function: it returns or yields outside of the functions in it."""
    return any(isinstance(part, (ast.Return, ast.Yield, ast.YieldFrom)) for part in _at_once(node))


def _is_open(node: ast.stmt) -> bool:
    if isinstance(node, DEFINITIONS):
        return all(_is_open(inner) for inner in node.body)
    if isinstance(node, ast.Raise):
        return any(getattr(part, "id", None) == "NotImplementedError" for part in ast.walk(node))
    return isinstance(node, ast.Pass) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))


def extract_code(completion: str, names: tuple[str, ...], before: str = "", opening: str = "") -> str:
    """The program in a completion: the definitions of `names`, with everything they need and nothing that can do harm.

    All code in a completion is one program, like the cells of a notebook: of several definitions the last one counts.
    Stubs do not count, nor what the text calls another version or a wrong one. Without a definition of `names`: the
    lines that can be a function's body; the first one keeps its indentation.

    Args:
        before: the source that the completion goes on from.
        opening: the beginning of a function; a completion that defines none of `names` is its body.
    """
    with warnings.catch_warnings():  # of the parser
        warnings.simplefilter("ignore")
        lines, statements = statements_of(
            re.sub(r"^ (?=\S)", "", completion)
        )  # the space that parts it from its prompt
        program = _defined(statements, names, before)
        if program is None:
            program = _body(lines, statements)
            if opening:
                whole = opening + as_body(program)
                program = _defined(statements_of(whole)[1], names) or whole  # without what is called after the body
        return program


def _defined(statements: list[Statement], names: tuple[str, ...], before: str = "") -> str | None:
    """The program that defines `names`; None if the statements define none of them."""
    defining = _defining(statements, names)
    if not defining:
        return None
    given = statements_of(before)[1]
    for statement in given:
        statement.group = -1
    levels: dict[int, int] = {}  # by group, how deep the program's own statements stand
    for statement in [*defining, *statements]:
        levels.setdefault(statement.group, statement.indent)
    own = [statement for statement in statements if statement.nodes and statement.indent == levels[statement.group]]
    present = {name for statement in (*given, *own) if not statement.is_absent for name in statement.names.binds}
    own = [statement for statement in own if not (statement.is_absent and statement.names.binds & present)]
    return _program(_current([*given, *own], names), names)


def statements_of(text: str) -> tuple[list[str], list[Statement]]:
    """The text's lines, with fences and other marks taken apart from code, and the statements in them."""
    text = END_OF_TEXT.split(after_thoughts(text), maxsplit=1)[0].replace("\r\n", "\n")
    lines = ODD_INDENT.sub(lambda blanks: re.sub(r"[^\t]", " ", blanks[0]), text).split("\n")
    found: list[Statement] = []
    group, introduction, prose = 0, "", [""]
    start, left = 0, MOST_PARSED
    while start < len(lines):
        line = lines[start].strip()
        if not line or line[0] == "#":
            start += 1
            continue
        end, nodes, left = _statement_at(lines, start, left)
        if nodes is None or (nodes and all(map(_may_be_prose, nodes))):
            prose += [] if FENCE.match(line) else [line]
            group, start = group + 1, start + 1
            continue
        if prose:
            introduction, prose = "\n".join(prose[-3:]), []
        indent = len(lines[start]) - len(lines[start].lstrip())
        code = _at_level(lines[start:end], indent)
        found.append(Statement(code, range(start, end), indent, group, introduction, nodes))
        start = end
    return lines, found


def _statement_at(lines: list[str], start: int, left: int) -> tuple[int, list[ast.stmt] | None, int]:
    """The end of the statement that begins at a line, its nodes, and how many characters may be parsed afterwards. The
    nodes are None if the line is prose, and empty if it begins a broken statement."""
    indent = len(lines[start]) - len(lines[start].lstrip())
    end = _end_of_block(lines, start + 1, indent)
    while left > 0:
        text = _at_level(lines[start:end], indent)
        left -= len(text)
        try:
            nodes = _parsed(text)
        except SyntaxError as error:
            at = start + (error.lineno or 1) - 1
            if at < len(lines) and _mended(lines, at, error.msg):
                end = _end_of_block(lines, start + 1, indent)
                continue
            if start < at < end and not COMPOUND.match(lines[start].lstrip()):
                end = at  # a line that has lost its indentation, with others after it
                continue
            is_broken = at > start
            break
        if nodes is not None:
            while not lines[end - 1].strip() or lines[end - 1].lstrip()[0] == "#":
                end -= 1
            return end, nodes, left
        is_broken = True
        if end == len(lines):
            break
        end = _end_of_block(lines, end + 1, indent)
    if left > 0 and is_broken and COMPOUND.match(lines[start].lstrip()):
        return _end_of_block(lines, start + 1, indent), [], left
    return start + 1, None, left


def _end_of_block(lines: list[str], line: int, indent: int) -> int:
    """The first line from `line` on that neither stands deeper than `indent` nor goes on with a statement there."""
    while line < len(lines):
        text = lines[line].lstrip()
        depth = len(lines[line]) - len(text)
        inside = depth > indent or (depth == indent and CONTINUES.match(text))
        if text and text[0] != "#" and (not inside or text.startswith(("```", "~~~"))):
            return line
        line += 1
    return line


def _at_level(lines: list[str], indent: int) -> str:
    """The lines without the first one's indentation; in a string a line may stand further left."""
    return "\n".join(line if line[:indent].strip() else line[indent:] for line in lines).rstrip() + "\n"


def _parsed(text: str) -> list[ast.stmt] | None:
    """The statements; None where the text may be the beginning of one.

    Raises:
        SyntaxError: it is no code, or too deep to be parsed.
    """
    try:
        return compile(text, "", "exec", ast.PyCF_ONLY_AST | codeop.PyCF_ALLOW_INCOMPLETE_INPUT, True).body
    except SyntaxError as error:
        if error.msg == "incomplete input":
            return None
        raise
    except (ValueError, MemoryError, RecursionError) as error:  # null bytes, surrogates, depth
        raise SyntaxError(str(error)) from error


def _mended(lines: list[str], at: int, problem: str) -> bool:
    """Removes everything from a line that is not code: blanks other than spaces, a fence beside code, marks before it.
    Also returns whether there was any."""
    line = lines[at]
    if invisible := re.search(r"non-printable character U\+([0-9A-F]+)", problem):
        character = chr(int(invisible[1], 16))
        lines[at] = line.replace(character, " " if character.isspace() else "")
        return lines[at] != line
    if fence := FENCE.fullmatch(line):
        before, mark, after = fence.groups()
        inline = INLINE.fullmatch(after)
        if before.strip() or inline:
            apart = [before, mark + after] if before.strip() else [mark, before + inline[1], mark, inline[2]]
            lines[at : at + 1] = apart
            return True
    count = 0
    while at < len(lines) and (mark := MARK.match(lines[at])):
        lines[at] = mark[1] + lines[at][mark.end() :]
        at, count = at + 1, count + 1
    return count > 0


def _may_be_prose(node: ast.stmt) -> bool:
    """Whether a statement that Python takes has no effect, as "Note: this" and "Yes, indeed" have none."""
    if isinstance(node, ast.AnnAssign):
        return node.value is None
    acts = (ast.Call, ast.Await, ast.Yield, ast.YieldFrom, ast.NamedExpr)
    says = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and node.value.value is not ...
    is_text = says and isinstance(node.value.value, str)
    return isinstance(node, ast.Expr) and not is_text and not any(isinstance(part, acts) for part in ast.walk(node))


def _names_of(code: str) -> Names:
    try:
        module = symtable.symtable(code, "", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # such as a `nonlocal` outside of a function
        return Names(set(), set(), set())
    symbols = module.get_symbols()
    binds = {symbol.get_name() for symbol in symbols if symbol.is_assigned() or symbol.is_imported()}
    at_once = {symbol.get_name() for symbol in symbols if symbol.is_referenced()}
    reads, tables = set(at_once), module.get_children()
    while tables:
        table = tables.pop()
        tables += table.get_children()
        for symbol in table.get_symbols():
            if symbol.is_global():
                reads |= {symbol.get_name()} if symbol.is_referenced() else set()
                binds |= {symbol.get_name()} if symbol.is_assigned() else set()
    return Names(binds, reads, at_once)


def _methods(statement: Statement, names: tuple[str, ...]) -> dict[str, str]:
    """By name, the expression that is a method of a class in this statement: LeetCode's form."""
    found = {}
    for node in statement.nodes:
        for method in node.body if isinstance(node, ast.ClassDef) else []:
            if isinstance(method, ast.FunctionDef) and method.name in names:
                takes_self = [argument.arg for argument in method.args.args[:1]] == ["self"]
                found[method.name] = f"{node.name}{'()' if takes_self else ''}.{method.name}"
    return found


def _defines(statement: Statement, names: tuple[str, ...]) -> bool:
    return bool(statement.names.binds & set(names) or _methods(statement, names))


def _defining(statements: list[Statement], names: tuple[str, ...]) -> list[Statement]:
    """The statements that define one of `names`, but not in a function's body; none if they are stubs for a body."""
    bodies = {s.group for s in statements if s.returns}
    found = [s for s in statements if _defines(s, names) and s.group not in bodies and not s.is_absent]
    return [] if bodies and all(s.is_stub() for s in found) else found


def _current(statements: list[Statement], names: tuple[str, ...]) -> list[Statement]:
    """The versions that count."""
    solid = {name for statement in statements if not statement.is_stub() for name in statement.names.binds}
    statements = [s for s in statements if not (s.is_stub() and s.names.binds <= solid)]
    statements = _without_drivers(statements, names)
    counting, beside = None, set()
    for statement in statements:
        if _defines(statement, names) and statement.group not in {counting, *beside}:
            said = statement.introduction
            if counting is not None and BESIDE.search(said) and not CORRECTS.search(said):
                beside.add(statement.group)
            else:
                counting = statement.group
    return [statement for statement in statements if statement.group not in beside]


def _without_drivers(statements: list[Statement], names: tuple[str, ...]) -> list[Statement]:
    """The statements without those after the last definition that set a function's name, or a built-in one, to input,
    to the function's result or to other data: `str = input()`, `total = total([1, 2])`."""
    functions = {*names, *(name for s in statements if s.is_only(DEFINITIONS) for name in s.names.binds)}
    fixed = (*DEFINITIONS, *IMPORTS)
    uses = [not s.is_only(fixed) and bool(s.words & READS or s.calls & {*names, *s.names.binds}) for s in statements]
    last = max((i for i, s in enumerate(statements) if _defines(s, names) and not uses[i]), default=len(statements))

    def is_driver(statement: Statement, uses: bool) -> bool:
        sets = statement.names.binds & (functions | BUILT_IN)
        return bool(sets) and (uses or (statement.is_data and not sets & functions))

    return [s for i, s in enumerate(statements) if i <= last or not is_driver(s, uses[i])]


def _program(statements: list[Statement], names: tuple[str, ...]) -> str:
    """The definitions of `names`, with the statements that they need and harmless ones, in their order."""
    methods: dict[str, str] = {}
    links: dict[str, set[str]] = {}  # by name, the names in the statements that bind it
    for statement in statements:
        methods |= _methods(statement, names)
        for name in statement.names.binds:
            links.setdefault(name, set()).update(statement.names.reads, statement.names.binds)
    methods = {name: method for name, method in methods.items() if name not in links}
    needed = _reached({*names, *(method.split(".")[0].removesuffix("()") for method in methods.values())}, links)
    waiting = [s for s in statements if not s.is_only((*DEFINITIONS, *IMPORTS))]
    defined = {node.name for s in statements if s.is_only(DEFINITIONS) for node in s.nodes}
    names_of = [(s.is_only(DEFINITIONS), s.names.binds) for s in statements if waiting]
    data = {name for is_function, binds in names_of for name in (binds - defined if is_function else binds)}
    driving = {*names, *(name for s in statements if waiting and s.words & DRIVES for name in s.names.binds)}
    acting: list[Statement] = []
    for _ in range(MOST_ROUNDS):  # a statement that changes needed data needs more data, which others may change
        more = [s for s in waiting if _acts_on(s, needed, data, driving, links)]
        if not more:
            break
        waiting = [s for s in waiting if s not in more]
        acting += more
        needed |= _reached({name for statement in more for name in statement.names.reads}, links)
    kept: list[Statement] = []
    bound = set(BUILT_IN)
    for statement in statements:
        if statement in acting or statement.names.binds & needed or _is_harmless(statement, bound):
            kept.append(statement)
            bound |= statement.names.binds
    kept.sort(key=lambda statement: not statement.text.startswith("from __future__ "))
    text = ""
    for before, statement in zip([None, *kept], kept, strict=False):
        apart = before is not None and (before.group, before.lines.stop) != (statement.group, statement.lines.start)
        text += "\n" * apart + statement.text
    return text + "".join(f"\n{name} = {method}\n" for name, method in methods.items())


def _reached(names: set[str], links: dict[str, set[str]]) -> set[str]:
    """The names, the names in the statements that bind them, and so on."""
    reached, new = set(), set(names)
    while new:
        reached |= new
        new = set().union(*(links.get(name, ()) for name in new)) - reached
    return reached


def _acts_on(
    statement: Statement, needed: set[str], data: set[str], driving: set[str], links: dict[str, set[str]]
) -> bool:
    """Whether a statement changes data that are needed, and drives nothing: no call of `names`, no output, no test."""
    stored = {_root(node) for node in statement.walk() if isinstance(getattr(node, "ctx", None), ast.Store)}
    reached = _reached(statement.names.reads - stored, links)
    if statement.words & DRIVES or reached & driving:
        return False
    sets = any(word.startswith("set") for word in statement.words)  # sys.setrecursionlimit
    return sets or bool(stored & needed) or bool(reached & data & needed)


def _root(node: ast.AST) -> str | None:
    """The name that an attribute or an item belongs to."""
    while not isinstance(node, ast.Name):
        node = next(ast.iter_child_nodes(node), None)
        if node is None:
            return None
    return node.id


def _is_harmless(statement: Statement, bound: set[str]) -> bool:
    """Whether it can neither fail nor act: a function, a value that is written out, an import of Python's library or of
    all names of a package."""
    if statement.is_only(IMPORTS):
        modules = {module.split(".")[0] for node in statement.nodes for module in _modules(node)}
        has_star = any(alias.name == "*" for node in statement.nodes for alias in node.names)
        return modules <= (sys.stdlib_module_names - NOT_HARMLESS | (PACKAGES if has_star else set()))
    if statement.is_only((ast.FunctionDef,)):
        return statement.names.at_once <= bound and not any(node.decorator_list for node in statement.nodes)
    try:
        return statement.is_only((ast.Assign,)) and all(
            ast.literal_eval(node.value) or True for node in statement.nodes
        )
    except (ValueError, TypeError, RecursionError, MemoryError):
        return False


def _body(lines: list[str], statements: list[Statement]) -> str:
    """The lines that can be a function's body: those of the first group with a `return`, else of the first group."""
    groups: dict[int, list[Statement]] = {}
    for statement in statements:
        groups.setdefault(statement.group, []).append(statement)
    returning = [group for group in groups.values() if any(s.returns for s in group)]
    if not groups:
        return "\n"
    chosen = (returning or list(groups.values()))[0]
    start, end = chosen[0].lines.start, chosen[-1].lines.stop
    text = "\n".join(lines[start:end]).rstrip() + "\n"
    is_fenced = any(FENCE.match(line) for line in (*lines[start - 1 : start], *lines[end : end + 1]))
    return textwrap.dedent(text) if is_fenced else text


def as_body(code: str) -> str:
    """The code, indented by four spaces as the body of a function. Its own indentation may be any, and the model or its
    tokenizer may have left out one space or all spaces of the first line."""
    lines = [re.sub(r"^[ \t]+", lambda space: space[0].expandtabs(4), line) for line in code.rstrip().split("\n")]
    depths = [len(line) - len(line.lstrip()) if line.strip() else None for line in lines]
    less = (i for i, depth in enumerate(depths) if i and depth is not None and depth < max(1, depths[0] or 0))
    end = next(less, len(lines))  # lines further left do not belong to the body
    deeper = [depth for depth in depths[1:end] if depth is not None]
    head, tail = lines[:end], lines[end:]
    as_the_next = [" " * min(deeper, default=4) + lines[0].lstrip(), *head[1:]]
    forms = [lines, [*_indented(head), *tail], [*_indented(as_the_next), *tail], _indented(lines)]
    return next(filter(_is_body, map("\n".join, forms)), "\n".join(_indented(head) + tail)) + "\n"


def _indented(lines: list[str]) -> list[str]:
    return textwrap.indent(textwrap.dedent("\n".join(lines)), "    ").split("\n")


def _is_body(code: str) -> bool:
    """Whether it can follow a function's docstring."""
    try:
        nodes = _parsed(f"def f():\n    0\n{code}\n")
    except SyntaxError:
        return False
    return bool(nodes) and not any(map(_returns, nodes))


# ----------------------------------------------------------------------------------------------------------------------
# Verdicts and scores
# ----------------------------------------------------------------------------------------------------------------------


def run_items(run: Run, items: list[dict[str, Any]], programs: list[Program], args: Arguments) -> None:
    """Adds program, verdict, detail, output and `correct` to the items, program by program in the sandbox.

    Verdicts are kept on disk by program, tests, limits and sandbox: a run that was killed while grading goes on.
    """
    limits = Limits(timeout=args.timeout, memory_mib=args.memory_mib)
    store = run.store("verdicts")
    how = [vars(limits), require_isolation(args.unsafe).level, INSIDE.read_text(), sys.version]
    keys = [digest([vars(program), how]) for program in programs]
    missing = {key: program for key, program in zip(keys, programs, strict=True) if key not in store.values}
    verdicts = run_programs(list(missing.values()), limits, unsafe=args.unsafe, workers=args.workers)
    for key, verdict in zip(missing, tqdm(verdicts, "running programs", len(missing), unit="program"), strict=True):
        store.add(key, asdict(verdict))
    for item, key, program in zip(items, keys, programs, strict=True):
        verdict = Verdict(**store.values[key])
        item |= {"program": program.candidate, **asdict(verdict), "correct": verdict.passed}


def finish(run: Run, items: list[dict[str, Any]], args: Arguments) -> None:
    """pass@k of graded items, written and printed.

    Raises:
        UserError: `--rescore`'s file has fewer samples of an item than the largest k.
    """
    passes: dict[int, list[bool]] = {}
    for item in items:
        passes.setdefault(item["index"], []).append(item["correct"])
    fewest = min(map(len, passes.values()))
    if fewest < max(args.k):
        raise UserError(f"--k {max(args.k)}: there are items with {fewest} samples")
    of_k = {
        f"pass@{k}": share(items, "correct")
        if k == 1
        else mean_of_shares([pass_at_k(len(verdicts), sum(verdicts), k) for verdicts in passes.values()])
        for k in sorted(set(args.k) | {1})
    }
    verdicts = {kind: sum(item["verdict"] == kind for item in items) for kind in ("passed", "failed", "timed out")}
    scores = {"accuracy": of_k["pass@1"], **of_k, "finished": share(items, "finished"), "verdicts": verdicts}
    scores["sandbox"] = require_isolation(args.unsafe).level
    lines = [score_line(name, score) for name, score in of_k.items()]
    lines.append(score_line("finished in time", scores["finished"]))
    lines.append(f"  {'programs':24}{', '.join(f'{count} {kind}' for kind, count in verdicts.items())}")
    run.finish(items, scores, lines)
