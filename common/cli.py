"""The command line of every script: options from a dataclass, a configuration file, and one line for a mistake.

A script's arguments are a dataclass of `option`s. If it inherits from several dataclasses, each of them is a group of
--help, titled by its docstring; a subclass of the same name adds options to a group or replaces them. tyro reads the
options; nothing here imports more than tyro.
"""

import argparse
import dataclasses
import difflib
import errno
import math
import os
import select
import sys
from collections.abc import Callable, Iterable
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar, get_args, get_origin

ArgumentsType = TypeVar("ArgumentsType")


class UserError(ValueError):
    """A mistake of the user's. The message is one line that names the thing and the remedy; scripts exit with 2."""


class RunStopped(RuntimeError):
    """The run cannot go on, without a mistake of the user. One line on stderr and exit code 1; checkpoints are kept."""


def first_line(error: Exception) -> str:
    """The first line of an error's message that is not empty, or else the error's kind."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def run_script(main: Callable[[list[str]], None]) -> None:
    """Runs `main` on the command line. A UserError becomes one line on stderr and exit code 2; a disk that cannot be
    written or read becomes one line and exit code 1."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except RunStopped as error:
        print(f"{Path(sys.argv[0]).name}: stopped: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        if not _nobody_reads_stdout():
            raise  # another pipe, such as a worker's
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES):
            raise
        where = f" ({error.filename})" if error.filename else ""
        print(f"{Path(sys.argv[0]).name}: stopped: {error.strerror}{where}", file=sys.stderr)
        sys.exit(1)


def _nobody_reads_stdout() -> bool:
    """Whether the other end of the pipe that is stdout is closed: `head` has seen enough."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


# ------------------------------------------------------------------------------------------------------------------
# Options
# ------------------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse's, for scripts with arguments in an order: the description as it is written, mistakes in one line."""

    def __init__(self, description: str):
        shown = argparse.RawDescriptionHelpFormatter
        self.lists: list[str] = []
        super().__init__(description=description, formatter_class=shown, allow_abbrev=False)

    def add_argument(self, *names: str, **how: Any) -> argparse.Action:
        self.lists += [name for name in names if how.get("nargs") in ("+", "*")]
        return super().add_argument(*names, **how)

    def parse_args(self, argv: list[str]) -> argparse.Namespace:
        require_once(argv, self.lists)
        return super().parse_args(argv)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the options)")


def option(default: Any, text: str, formerly: str | None = None, first: bool = False) -> Any:
    """A dataclass field that is also a command-line option with the help `text`.

    Args:
        formerly: its old name, which still works.
        first: --help shows it before all groups.
    """
    about = {"help": text, "formerly": formerly, "first": first}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=about)
    return field(default=default, metadata=about)


def parse_arguments(arguments_type: type[ArgumentsType], description: str, argv: list[str]) -> ArgumentsType:
    """Reads `argv` into the dataclass; a `--config` file's entries come first, so that the command line wins. The
    result's `given` has the names of the options that stand in either, as --batch-size.

    Raises:
        UserError: an unknown option or key, a list or a key that stands twice, or a value that does not fit.
    """
    import tyro
    from tyro import _errors  # tyro has no other way to an error of one line; its version is pinned

    names = [item.name for item in dataclasses.fields(arguments_type)]
    grouped = _grouped(arguments_type)
    # Looking for comments beside the fields, which all have their help, takes half of the time.
    how = (tyro.conf.OmitArgPrefixes, tyro.conf.HelptextFromCommentsOff)
    argv = [word for word in argv if not word.replace("-", "_").startswith("__local_rank=")]  # deepspeed's launcher
    argv = [_by_its_name(word, arguments_type) for word in argv]
    kinds = {item.name: (item.type, *get_args(item.type)) for item in dataclasses.fields(arguments_type)}
    require_once(argv, [option_name(name) for name, kind in kinds.items() if list in map(get_origin, kind)])

    def parse(words: list[str]) -> dict[str, Any]:
        with _errors.on_parse_error(lambda event: _raise_user_error(event, names)):
            groups = tyro.cli(grouped, description=description, args=words, config=how)
        return {name: value for group in vars(groups).values() for name, value in vars(group).items()}

    values, words = parse(argv), []
    if values.get("config"):
        words = _config_as_argv(Path(values["config"]), arguments_type)
        parse(words)  # by itself too: a value that the command line overrides would not be checked
        values = parse(words + argv)
    args = arguments_type(**values)
    args.given = set(options_in(words + argv))
    return args


def options_in(argv: list[str]) -> list[str]:
    """The names of the options in a command line, as they are typed, in order: --batch-size for --batch_size=8."""
    return [word.partition("=")[0].replace("_", "-") for word in argv if word.startswith("--")]


def require_once(argv: list[str], lists: list[str]) -> None:
    """Raises a UserError where an option that takes several values stands twice: the last one's values alone would
    count. An option with one value may stand twice, because scripts append an option to replace its value."""
    typed = options_in(argv)
    for name in lists:
        if typed.count(name) > 1:
            raise UserError(f"{name} stands twice: give all its values after one {name}")


def _by_its_name(word: str, arguments_type: type) -> str:
    """Replaces an option's old name by its present one, also before "=VALUE"; returns any other word as it is."""
    typed, *value = word.split("=", 1)
    for item in dataclasses.fields(arguments_type):
        if typed.startswith("--") and typed[2:].replace("-", "_") == item.metadata["formerly"]:
            print(f"note: {typed} is called {option_name(item.name)} now", file=sys.stderr)
            return "=".join([option_name(item.name), *value])
    return word


def _grouped(arguments_type: type) -> type:
    """A dataclass with a dataclass in it for every group of options, as tyro shows them."""
    import tyro

    owners: dict[str, list] = {"First": []}
    for item in dataclasses.fields(arguments_type):
        owner = next(
            kind for kind in reversed(arguments_type.__mro__) if item.name in vars(kind).get("__annotations__", ())
        )
        kind = Annotated[item.type, tyro.conf.arg(help=item.metadata["help"])]
        has_default = item.default is not dataclasses.MISSING
        default = field(default=item.default) if has_default else field(default_factory=item.default_factory)
        group = "First" if item.metadata["first"] else owner.__name__
        owners.setdefault(group, []).append((item.name, kind, default))
    groups = []
    for owner, members in owners.items():
        if not members:
            continue
        name = owner.removesuffix("Arguments").lower() or "main"
        titles = {kind.__name__: kind.__doc__ for kind in reversed(arguments_type.__mro__)}
        title = titles.get(owner, "The options that most runs set.")
        group = dataclasses.make_dataclass(owner, members, namespace={"__doc__": title})
        groups.append((name, group, field(default_factory=group)))
    return dataclasses.make_dataclass("Options", groups)


def _raise_user_error(event: Any, names: list[str]) -> NoReturn:
    """Turns tyro's account of a mistake into one line."""
    argument = getattr(event, "argument", None)
    flag = argument.lowered.name_or_flags[0] if argument is not None else ""
    match type(event).__name__:
        case "UnrecognizedArgs":
            word = event.tokens[0].partition("=")[0]
            what = f"unknown option {word}" if word.startswith("-") else f"{word!r} belongs to no option"
            near = nearest(word.lstrip("-").replace("-", "_"), names) if word.startswith("-") else None
            message = what + (f"; did you mean {option_name(near)}?" if near else "")
        case "InvalidChoice":
            message = f"{flag} {event.value}: choose from {', '.join(map(str, event.choices))}"
        case "BadValue":
            found = "" if event.offending_value is None else f", not {event.offending_value!r}"
            message = f"{flag} needs a value{found}"
        case "InstantiationFailure":
            message = f"{flag}: {event.message}"
        case kind:
            message = f"{flag} {kind}".strip()
    raise UserError(f"{' '.join(message.split())} (--help lists the options)")


def nearest(word: str, known: Iterable[str]) -> str | None:
    """That of `known` which is spelt most alike, if any is."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1)), None)


def _config_as_argv(path: Path, arguments_type: type) -> list[str]:
    import yaml

    try:
        loader = yaml.SafeLoader(path.read_text())
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode | None):
            raise UserError(f"{path} is not a configuration: expected lines of the form 'option: value'")
        # Pairs, because a dictionary would drop a doubled key.
        entries = [(*map(loader.construct_document, pair), pair[1]) for pair in node.value] if node else []
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read the configuration {path}: {first_line(error)}") from error
    fields = {item.name: item for item in dataclasses.fields(arguments_type)}
    argv, seen = [], set()
    for key, value, node in entries:
        key = _by_its_name(f"--{key}", arguments_type)[2:].replace("-", "_")
        if key in seen:
            raise UserError(f"the key {key!r} stands twice in {path}: leave one of them")
        seen.add(key)
        if key not in fields:
            near = nearest(str(key), list(fields))
            raise UserError(f"unknown key {key!r} in {path}" + (f"; did you mean {near!r}?" if near else ""))
        if value is None and type(None) not in get_args(fields[key].type):
            raise UserError(f"the key {key!r} in {path} has no value: give one, or take the line out for the default")
        if value is None:
            continue
        if fields[key].type is bool and str(value).lower() in ("true", "false"):
            argv.append(f"--{key}" if str(value).lower() == "true" else f"--no-{key}")
        elif isinstance(node, yaml.SequenceNode):
            argv += [f"--{key}", *map(_as_written, node.value, value)]
        else:
            argv.append(f"--{key}={_as_written(node, value)}")
    return argv


def _as_written(node: Any, value: Any) -> str:
    """A YAML scalar's text: its value would turn 1.10 into 1.1, no into False, and 12:30 into 750."""
    return node.value if isinstance(node.value, str) else str(value)


# ------------------------------------------------------------------------------------------------------------------
# Ranges
# ------------------------------------------------------------------------------------------------------------------


def require_finite(args: Any) -> None:
    """Raises a UserError where any number among the arguments is NaN or infinite."""
    for name, value in dataclasses.asdict(args).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{option_name(name)} is {value}: it must be a finite number")


def require_positive(args: Any, *names: str) -> None:
    """Raises a UserError where one of these arguments is given and not above 0."""
    for name in names:
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            raise UserError(f"{option_name(name)} is {getattr(args, name)}: it must be above 0")


def require_not_negative(args: Any, *names: str) -> None:
    """Raises a UserError where one of these arguments is below 0."""
    for name in names:
        if getattr(args, name) < 0:
            raise UserError(f"{option_name(name)} is {getattr(args, name)}: it must not be negative")


def require_scales(scales: list[float]) -> None:
    """Raises a UserError where --scales are not different numbers above 0 and up to 1."""
    if len(set(scales)) < max(len(scales), 1) or not all(0 < scale <= 1 for scale in scales):
        raise UserError(f"--scales {' '.join(map(str, scales))}: give different ones, above 0 and up to 1")


def require_share(args: Any, *names: str) -> None:
    """Raises a UserError where one of these arguments is not above 0 and at most 1."""
    for name in names:
        if not 0 < getattr(args, name) <= 1:
            raise UserError(f"{option_name(name)} is {getattr(args, name)}: it must be above 0 and at most 1")


def require_below_one(args: Any, *names: str) -> None:
    """Raises a UserError where one of these arguments is not at least 0 and below 1."""
    for name in names:
        if not 0 <= getattr(args, name) < 1:
            raise UserError(f"{option_name(name)} is {getattr(args, name)}: it must be at least 0 and below 1")


def option_name(name: str) -> str:
    """How an option is typed: `batch_size` is --batch-size."""
    return f"--{name.replace('_', '-')}"


def as_words(options: dict[str, Any], more: Iterable[str] = ()) -> list[str]:
    """Options as they are typed, then `more` words; an option that these name too is left out."""
    words, more = [], list(more)
    for name, value in options.items():
        if option_name(name) in options_in(more):
            continue
        if isinstance(value, bool):
            words.append(option_name(name) if value else option_name(f"no_{name}"))
        else:
            words += [option_name(name), *map(str, value if isinstance(value, list) else [value])]
    return words + more
