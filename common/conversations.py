"""Training data: from a record, in one of the formats that people write, to tokens and labels.

A record is read as a conversation, a list of messages with `role` and `content`. common/templates.py says how a
conversation is written out, and which of its tokens are trained.

    instruction, output         two text fields, named by --fields
    messages                    a list of role and content; a column of another name is named by --fields
    conversations               ShareGPT's: a list of from and value
    prompt, completion          texts, or lists of messages; what stands in the prompt is never trained

Every other column, and every key of a message, is either read, or refused if it holds something, or announced as not
used: COLUMNS and KEYS say which.
"""

import hashlib
import inspect
import itertools
import json
import re
from collections import defaultdict
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import UserError
from common.pretrained import resolve_demo
from common.tables import as_text, files_of_split, load_records, require_fields, split_of
from common.templates import IGNORE_INDEX, LEAVES_OUT, REASONING, Messages, Pieces, Template

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

DEFAULT_FIELDS = ("instruction", "output")
FORMATS = (DEFAULT_FIELDS, ("messages",), ("conversations",), ("conversation",), ("prompt", "completion"))

SKIPPED = "skipped: cannot be trained on"
PREFERENCE = "preference data is not trained on: keep the good answers alone, without this column (or rename it)"

ONLY_TEXTS = "texts alone are trained on: take it away, or leave such examples out (--skip-bad)"

# Columns beside a format's own, and their use. A column that is not listed here is announced as not used.
COLUMNS = {
    "input": "read: stands below the instruction",
    "context": "read: stands below the instruction",
    "system": "read: the system's turn",
    "system_prompt": "read: the system's turn",
    "history": "read: earlier turns, a list of pairs of question and answer",
    "tools": "read: the tools that the chat template offers",
    "functions": "read: the tools that the chat template offers, in OpenAI's older form",
    "weight": "read: 0 leaves the example out, 1 trains it",
    "train": "read: false leaves the example out, true trains it",
    "chosen": f"refused, as every name with this word in it: {PREFERENCE}",
    "rejected": f"refused, as every name with this word in it: {PREFERENCE}",
    "kto_tag": f"refused, as every name with `kto` in it: {PREFERENCE}",
    "label": f"refused where it is true or false, and beside a completion where it is 0 or 1: {PREFERENCE}",
    "images": f"refused: {ONLY_TEXTS}",
    "image": f"refused: {ONLY_TEXTS}",
    "audios": f"refused: {ONLY_TEXTS}",
    "videos": f"refused: {ONLY_TEXTS}",
}
# The keys of a message, and their use. A key that is not listed goes to the chat template. It is announced as not used
# if the template writes the same text without it.
KEYS = {
    "role": "read",
    "from": "read: the role",
    "content": "read: a text, or a list of parts that are texts",
    "value": "read: the content",
    "weight": "read: 0 leaves the turn out of the loss, 1 trains it",
    "train": "read: false leaves the turn out of the loss, true trains it",
    "tool_calls": "read: written by the chat template, and trained",
    "function_call": "read: one tool call, in OpenAI's older form",
    "tools": "read in a system's turn that comes first: the tools that the chat template offers",
    **dict.fromkeys(REASONING, "read where the chat template has a place for it"),
    "images": f"refused: {ONLY_TEXTS}",
}
LISTS = ("history", "tools", "functions", "tool_calls", "images", "audios", "videos")  # csv has them as JSON texts

# The names of the four roles elsewhere: OpenAI's and Hugging Face's, and ShareGPT's.
ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "chatgpt", "bing", "bard", "bot", "ai", "model", "function_call"),
    "tool": ("tool", "function", "observation", "function_response", "tool_response"),
}
ROLE_OF_NAME = {name: role for role, names in ROLES.items() for name in names}


# ------------------------------------------------------------------------------------------------------------------
# Formats
# ------------------------------------------------------------------------------------------------------------------


@dataclass
class Notes:
    """The use that was made of the data, for the first screen and run.json.

    Attributes:
        fates: how many examples are whole, cut, dropped or skipped, and why.
        columns, keys: how many examples or messages hold something under a name that is not used.
        template: how many examples the chat template changes, by the kind of change.
        files: files of the folder that belong to another split, are hidden, or are of another kind.
        skipped: the errors in the first examples that --skip-bad left out.
    """

    fates: dict[str, int] = field(default_factory=dict)
    columns: dict[str, int] = field(default_factory=dict)
    keys: dict[str, int] = field(default_factory=dict)
    template: dict[str, int] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, table: Any, files: list[str]) -> "Notes":
        """Counts the columns `fate` and `notes` of an Arrow table."""
        import pyarrow.compute as pc

        fates = {row["values"]: row["counts"] for row in pc.value_counts(table["fate"]).to_pylist()}
        notes = cls(fates=fates, files=files)
        for row in pc.value_counts(pc.list_flatten(table["notes"])).to_pylist():
            kind, _, what = row["values"].partition(" ")
            if kind == "skipped":
                notes.skipped = [*notes.skipped, what][:3]
            else:
                getattr(notes, kind)[what] = row["counts"]
        return notes

    def lines(self) -> list[str]:
        """A line for each kind of thing."""
        kinds = [("columns", self.columns), ("keys of messages", self.keys), ("files", self.files)]
        lines = [f"not used: {kind} {_named_first(list(names))}" for kind, names in kinds if names]
        lines += [f"note: {what} ({count} examples)" for what, count in self.template.items()]
        if self.skipped:
            lines.append(f"skipped {self.fates[SKIPPED]} examples that cannot be trained on; the first ones:")
            lines += [f"  {what}" for what in self.skipped]
        return [*lines, "examples: " + ", ".join(f"{count} {fate}" for fate, count in self.fates.items())]


def _named_first(names: list[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + f" and {len(names) - most} more" * (len(names) > most)


def load_training_records(args: Any) -> "datasets.Dataset":
    """The examples that --data, --fields and --limit name, as they are written; fills in `args.template`.

    The result's `other_files` are the folder's files that are not read.

    Raises:
        UserError: no such data, or none in a known format, or an option that chooses nothing there.
    """
    source = resolve_demo(args.data, "train")
    folder = Path(source) / (args.data_subset or "")
    without_effect = {"--data-config": args.data_config if Path(source).exists() else None}
    without_effect |= {"--data-subset": args.data_subset if Path(source).is_file() else None}
    without_effect |= {"--split": args.split if split_of(folder, args.split) != args.split else None}
    for name, value in without_effect.items():
        if value is not None:
            raise UserError(
                f"{name} {value} chooses nothing in {args.data}, which has no such parts: leave it out, or give None"
            )
    records = load_records(source, args.split, args.data_subset, args.data_config)
    if (limit := getattr(args, "limit", None)) is not None:
        records = records.select(range(min(limit, len(records))))
    args.template = args.template or Format.of(records, args.fields, args.data).template
    records.other_files = []
    if Path(source).is_dir():
        records.other_files = [str(file.relative_to(folder)) for file in files_of_split(folder, args.split)[1]]
    return records


def read_template_args(text: str | None) -> dict[str, Any]:
    """The variables in --template-args.

    Raises:
        UserError: it is no JSON object.
    """
    arguments = _parsed(text or "{}", "--template-args")
    if not isinstance(arguments, dict) or not all(name.isidentifier() for name in arguments):
        raise UserError(f'--template-args {text}: not an object of JSON such as {{"enable_thinking": false}}')
    return arguments


@dataclass
class Conversation:
    """One example.

    Attributes:
        first: index of the first message that may be trained. masked: indices of messages that may not.
        tools: the tools that the chat template offers to the model.
        unused: `columns NAME` or `keys NAME` for each name that holds something and is not used.
    """

    messages: Messages
    first: int
    masked: set[int]
    tools: list[dict] | None
    unused: list[str]

    def pieces(self, template: Template) -> Pieces:
        return template.pieces(self.messages, self.first, self.masked, self.tools)

    def require_served(self, template: Template, pieces: Pieces, served: Any = None) -> set[str]:
        """See `Template.require_served`."""
        return template.require_served(self.messages, pieces, self.tools, served, self.untrained)

    def notes(self, template: Template, pieces: Pieces, keys_read: list[set[str]]) -> list[str]:
        """The example's unused columns and keys, and its changes by the template, in the form that Notes counts.

        Args:
            keys_read: the keys that the template reads in each of the first examples of this kind; gets this one's.

        Raises:
            UserError: a server's prompt differs, or the template leaves out a part of the last answer.
        """
        notes = []
        if len(keys_read) < SERVED_SAMPLE:
            notes += [f"template {what}" for what in self.require_served(template, pieces)]
            keys_read.append(template.keys_read(self.messages, self.tools))
        keys = set().union(*keys_read)
        if template.leaves_out(self.messages, self.tools, keys, self.untrained):
            notes.append(f"template {LEAVES_OUT}")
        return notes + [name for name in self.unused if name.removeprefix("keys ") not in keys]

    def kind(self) -> str:
        """Its kind for a template: roles with their keys and thoughts, tools, and whether turns repeat."""
        parts = {
            " ".join((message["role"], *sorted(message), "thought" * ("</think>" in message["content"])))
            for message in self.messages
        }
        turns = sum(message["role"] == "assistant" for message in self.messages)
        return "; ".join([*sorted(parts), "tools" * bool(self.tools), "turns" * (turns > 1)])

    @property
    def untrained(self) -> set[int]:
        return self.masked | set(range(self.first))

    def only_last(self) -> None:
        """Trains the last assistant turn alone."""
        self.first = max(i for i, message in enumerate(self.messages) if message["role"] == "assistant")


@dataclass
class Format:
    """How a file's examples are written.

    Attributes:
        columns: the column of conversations, or the columns of prompt and response.
        is_named: whether they are two text fields that --fields names.
        template: the template where --template names none.
        source: names the data in an error.
    """

    columns: tuple[str, ...]
    is_named: bool
    template: str
    source: str

    @classmethod
    def of(cls, records: "datasets.Dataset", fields: list[str], source: str) -> "Format":
        """The format of --fields, or else the first known one in the first example.

        Raises:
            UserError: there is none, or --fields names a column that is not there.
        """
        first = records[0] if len(records) else {}
        for name, cell in first.items():  # before the format is sought, because preference data may have none
            if _holds(cell, name) and _is_preference(name, cell, first):
                raise UserError(f"{source} has a column {name!r}: {PREFERENCE}")
        there = [names for names in FORMATS if set(names) <= set(records.column_names)]
        if tuple(fields) == DEFAULT_FIELDS and there:
            columns = next((names for names in there if all(first.get(name) is not None for name in names)), there[0])
        else:
            require_fields(records, fields, source, "name two texts, or one that holds conversations, with --fields")
            columns = tuple(fields)
        are_texts = not any(isinstance(cell, list | dict) for cell in _cells(first, columns))
        is_named = len(columns) == 2 and columns == tuple(fields)
        template = "alpaca" if is_named else "raw" if len(columns) == 2 and are_texts else "chat"
        return cls(columns, is_named, template, source)

    def read(self, record: dict[str, Any], number: int) -> Conversation | None:
        """The example with this `number`. None: a named field is empty, or the example's weight is 0.

        Raises:
            UserError: names the example and says what is wrong with it.
        """
        where = f"{self.source}, example {number}"
        if all(record[name] is None for name in self.columns):
            for names in FORMATS:
                if all(record.get(name) is not None for name in names):
                    ours, theirs = " and ".join(self.columns), " and ".join(names)
                    raise UserError(f"{where} has {theirs}, where examples before it have {ours}: split the file")
        unused: list[str] = []
        beside = self._beside(record, where, unused)
        if not _is_trained(beside, where):
            return None
        if self.is_named:
            for name in self.columns:
                if isinstance(record[name], list | dict):
                    kind = type(record[name]).__name__
                    raise UserError(f"{where}: the field {name!r} holds no text but {kind}: write it as text")
            texts = ["" if record[name] is None else as_text(record[name]) for name in self.columns]
            if not all(text.strip() for text in texts):
                return None
            below = [as_text(beside[name]) for name in ("input", "context") if name in beside]
            texts[0] = "\n".join([texts[0], *(text for text in below if text != texts[0])])
            parts = [[{"role": "user", "content": texts[0]}], [{"role": "assistant", "content": texts[1]}]]
        else:
            cells = zip(self.columns, _cells(record, self.columns), strict=True)
            parts = [_read_messages(cell, name, where, unused) for name, cell in cells]
        earlier = _read_history(beside.get("history"), where)
        _move_tools(parts[0], beside, where, unused)
        has_one = bool(parts[0]) and parts[0][0]["role"] == "system"
        systems = {as_text(beside[name]) for name in ("system", "system_prompt") if name in beside}
        if len(systems | ({parts[0][0]["content"]} if has_one else set())) > 1:
            raise UserError(f"{where} has two different system turns: leave one out")
        if has_one:
            earlier.insert(0, parts[0].pop(0))  # before the history
        else:
            earlier[:0] = [{"role": "system", "content": text} for text in systems]
        messages = [*earlier, *(message for part in parts for message in part)]
        masked = {i for i, message in enumerate(messages) if not _is_trained(message, f"{where}, message {i + 1}")}
        messages = [{key: value for key, value in message.items() if key not in _MASKS} for message in messages]
        _check_turns(messages, where)
        first = len(messages) - len(parts[-1]) if len(parts) > 1 and not self.is_named else 0
        if not any(message["role"] == "assistant" for message in messages[first:]):
            raise UserError(f"{where} has no assistant turn: there is nothing to train on")
        return Conversation(messages, first, masked, _read_tools(beside, where), unused)

    def _beside(self, record: dict[str, Any], where: str, unused: list[str]) -> dict[str, Any]:
        """The columns of COLUMNS that are read and hold something; adds the others to `unused`.

        Raises:
            UserError: a column that is refused holds something.
        """
        found = {}
        for name, cell in record.items():
            if name in self.columns or not _holds(cell, name):
                continue
            fate = f"refused: {PREFERENCE}" if _is_preference(name, cell, record) else COLUMNS.get(name, "")
            if fate.startswith("refused:"):
                raise UserError(f"{where} has a column {name!r}: {fate.partition(': ')[2]}")
            if not fate.startswith("read") or (name in ("input", "context") and not self.is_named):
                unused.append(f"columns {name}")
            else:
                found[name] = cell
        return found


_MASKS = ("weight", "train")
_WEIGHTS = dict.fromkeys(("0", "0.0", "false"), False) | dict.fromkeys(("1", "1.0", "true", ""), True)


def _is_preference(name: str, cell: Any, record: dict[str, Any]) -> bool:
    """Whether a column of `record` says which answers are good: DPO's `chosen` and `rejected_response`, KTO's `label`
    beside a completion, LLaMA-Factory's `kto_tag`."""
    if name == "label":
        verdicts = ("true", "false") + (("0", "1", "0.0", "1.0") if "completion" in record else ())
        return str(cell).lower() in verdicts
    return bool({"chosen", "rejected", "kto"} & {*name.lower().split("_")})


def _holds(cell: Any, name: str = "") -> bool:
    """Whether there is something in a cell: not null, nor blank, nor an empty list. The text "[]" is an empty list only
    under the `name` of a list, because it may be the input of a task."""
    empty = ("", "[]") if name in LISTS else ("",)
    return cell is not None and not (isinstance(cell, str) and cell.strip() in empty) and cell not in ([], {})


def _is_trained(holder: dict[str, Any], where: str) -> bool:
    """Whether an example or a turn is trained, by its `weight` and `train`.

    Raises:
        UserError: a weight between or beyond 0 and 1.
    """
    for name in _MASKS:
        if holder.get(name) is None:
            continue
        weight = as_text(holder[name]).lower()
        if weight not in _WEIGHTS:
            raise UserError(f"{where}: its {name} is {weight}: it must be 0 or 1")
        if not _WEIGHTS[weight]:
            return False
    return True


def _parsed(cell: Any, what: str) -> Any:
    """The list or object in a cell, which may be written as JSON text.

    Raises:
        UserError: the text is not JSON.
    """
    if not isinstance(cell, str):
        return cell
    try:
        return json.loads(cell)
    except ValueError as error:
        raise UserError(f"{what} is no JSON: {cell[:40]!r}") from error


def _json_of(text: str, keys: set[str]) -> list[dict] | None:
    """The objects in a JSON text, if each has one of `keys`; None for any other text."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    found = found if isinstance(found, list) else [found]
    return found if found and all(isinstance(part, dict) and keys & part.keys() for part in found) else None


def _cells(record: dict[str, Any], columns: tuple[str, ...]) -> list[Any]:
    """The cells of `columns`. Where all hold messages, those written as JSON text, as csv has them, are lists."""
    cells = [record.get(name) for name in columns]
    found = [_json_of(cell, {"role", "from"}) if isinstance(cell, str) else cell for cell in cells]
    return found if all(isinstance(cell, list | dict) for cell in found) else cells


def _move_tools(messages: Messages, beside: dict[str, Any], where: str, unused: list[str]) -> None:
    """Moves the tools of a system's turn, the first of `messages`, into `beside`; a turn without more is left out.

    Raises:
        UserError: `beside` has other tools.
    """
    if messages[0]["role"] != "system" or "tools" not in messages[0]:
        return
    tools = messages[0].pop("tools")
    unused.remove("keys tools")
    if _read_tools(beside, where) not in (None, _read_tools({"tools": tools}, where)):
        raise UserError(f"{where} has other tools in its system's turn than beside it: leave one out")
    beside["tools"] = tools
    if not messages[0]["content"].strip():
        del messages[0]


def _read_tools(beside: dict[str, Any], where: str) -> list[dict] | None:
    tools = _parsed(beside.get("tools", beside.get("functions")), f"{where}: its tools")
    if tools is None:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f"{where}: its tools are no list of objects")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def _read_history(cell: Any, where: str) -> Messages:
    """Earlier turns: pairs of question and answer."""
    pairs = _parsed(cell, f"{where}: history") if _holds(cell) else []
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(_holds(text) for text in pair) for pair in pairs
    ):
        raise UserError(f"{where}: history is no list of pairs of question and answer")
    return [
        {"role": role, "content": as_text(text)}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def _read_messages(cell: Any, name: str, where: str, unused: list[str]) -> list[dict[str, Any]]:
    """The messages of one cell: a list of messages, or one text; its role follows from its column's `name`."""
    if name in ("prompt", "completion") and not isinstance(cell, list | dict):
        cell = [{"role": "user" if name == "prompt" else "assistant", "content": cell}]
    elif isinstance(cell, str) and cell.lstrip().startswith("["):
        cell = _parsed(cell, f"{where}: {name}")
    elif isinstance(cell, dict) and all(isinstance(column, list) for column in cell.values()):
        # `datasets` may hold a list of messages as one list for each key. Columns of other lengths are refused below.
        columns = cell.values() if len(set(map(len, cell.values()))) == 1 else ()
        cell = [dict(zip(cell, row, strict=True)) for row in zip(*columns, strict=True)]
    if not isinstance(cell, list) or not cell or not all(isinstance(message, dict) for message in cell):
        raise UserError(f"{where}: {name} is no list of messages")
    return [_read_message(message, f"{where}, message {number}", unused) for number, message in enumerate(cell, 1)]


def _read_message(message: dict, where: str, unused: list[str]) -> dict[str, Any]:
    """Role and content under one name each; other keys, such as `reasoning_content`, are left for the template."""
    name = message.get("from") if message.get("role") is None else message["role"]
    content = message.get("value") if message.get("content") is None else message["content"]
    role = ROLE_OF_NAME.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise UserError(f"{where}: unknown role {name!r}; the roles are {', '.join(ROLES)}")
    if isinstance(content, list):
        content = "".join(_read_part(part, where, unused) for part in content)
    if isinstance(content, dict):
        raise UserError(f"{where}: its content is no text")
    if name.lower() == "function_call" and isinstance(content, str) and _json_of(content, {"arguments"}):
        message, content = message | {"tool_calls": content}, ""
    content = "" if content is None else as_text(content)
    read = {"role": role, "content": content}
    if calls := _read_calls(message, where):
        read["tool_calls"] = calls
    elif not content.strip() and role != "tool" and not (role == "system" and _holds(message.get("tools"), "tools")):
        article = "an" if role == "assistant" else "a"
        raise UserError(f"{where}: {article} {role} turn that is empty; its keys are {', '.join(message)}")
    for key, value in message.items():
        fate = KEYS.get(key, "")
        if not _holds(value, key) or key in read or key in ("from", "value", "function_call"):
            continue
        if fate.startswith("refused"):
            raise UserError(f"{where} has {key}: {fate.partition(': ')[2]}")
        read[key] = value
        if key not in _MASKS:
            unused.append(f"keys {key}")
    return read


def _read_part(part: Any, where: str, unused: list[str]) -> str:
    """The text of one part of a content. OpenAI's names for such parts are text, input_text and output_text."""
    is_text = isinstance(part, dict) and isinstance(part.get("text"), str)
    if not is_text or not str(part.get("type") or "text").endswith("text"):
        raise UserError(f"{where}: a part of its content is no text: {ONLY_TEXTS}")
    unused += [f"keys {key}" for key, value in part.items() if key not in ("type", "text") and _holds(value)]
    return part["text"]


def _read_calls(message: dict, where: str) -> list[dict]:
    """Tool calls in the form that chat templates read, arguments as an object.

    Raises:
        UserError: a call has no name, or its arguments are not an object.
    """
    calls = _parsed(message.get("tool_calls"), f"{where}: tool_calls") or []
    if _holds(message.get("function_call")):
        calls = [*calls, {"function": _parsed(message["function_call"], f"{where}: function_call")}]
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(f"{where}: a tool call without a function's name")
        arguments = _parsed(function.get("arguments") or {}, f"{where}: the arguments of {function['name']}")
        if not isinstance(arguments, dict):
            raise UserError(f"{where}: the arguments of {function['name']} are no object")
        found.append({"type": "function"} | call | {"function": {"name": function["name"], "arguments": arguments}})
        if function is call:
            found[-1] = {"type": "function", "function": found[-1]["function"]}
    return found


def _check_turns(messages: Messages, where: str) -> None:
    """Raises a UserError where an assistant turn follows another assistant turn, or comes first."""
    before = None
    for number, message in enumerate(messages, 1):
        if message["role"] == before == "assistant":
            raise UserError(f"{where}, message {number}: two assistant turns in a row")
        if message["role"] == "assistant" and before in (None, "system"):
            raise UserError(
                f"{where}, message {number}: an assistant turn without a turn before it to answer (--skip-bad skips it)"
            )
        before = message["role"]


# ------------------------------------------------------------------------------------------------------------------
# Examples
# ------------------------------------------------------------------------------------------------------------------


def build_dataset(
    records: "datasets.Dataset",
    tokenizer: "PreTrainedTokenizerBase",
    fields: list[str],
    max_length: int,
    template: str | None = None,
    train_on: str = "all",
    source: str = "the data",
    skip_bad: bool = False,
    template_args: dict[str, Any] | None = None,
) -> tuple["datasets.Dataset", int]:
    """Tokenises `records`; returns the examples, and how many were dropped because no trained token was left.

    Two named fields are cut after `max_length` tokens. A conversation is cut after its last assistant turn that fits.
    An example's `index` is its place in the result. The result's `notes` are its Notes, and its `sample` has messages
    and tools of each kind of conversation.

    Args:
        template: `alpaca`, `chat` or `raw`; None: the format's own. train_on: `all` assistant turns, or the `last`.
        source: names the data in an error. skip_bad: drop an example that cannot be read, instead of raising.
        template_args: variables of the chat template.

    Raises:
        UserError: names the example that is not in the first one's format, or that the template cannot take; or a
            server would build another prompt for an example than the trained one.
    """
    import datasets

    format = Format.of(records, fields, source)
    if len(records) and not skip_bad:
        format.read(records[0], 1)  # an error of the data is reported before an error of the template
    writer = Template(tokenizer, template or format.template, template_args)
    keys_read: dict[str, list[set[str]]] = defaultdict(list)

    def encode_one(record: dict, number: int) -> dict[str, Any]:
        conversation = format.read(record, number)
        if conversation is None:
            return {"fate": "dropped: a field is empty, or the weight is 0"}
        if train_on == "last":
            conversation.only_last()
        kind = conversation.kind()
        try:
            pieces = conversation.pieces(writer)
            notes = conversation.notes(writer, pieces, keys_read[kind])
        except UserError as error:
            raise UserError(f"{source}, example {number}: {error}") from error
        example = encode_pieces(pieces, max_length, whole_turns=not format.is_named)
        if num_valid(example["labels"]) == 0:
            why = "no turn is to be trained" if not any(on for _, on in pieces) else f"longer than {max_length} tokens"
            return {"fate": f"dropped: {why}", "kind": kind, "notes": notes}
        whole = sum(len(ids) for ids, _ in pieces) <= max_length
        return {**example, "fate": "whole" if whole else "cut", "kind": kind, "notes": notes}

    def encode(batch: dict[str, list], indices: list[int], made_by: str) -> dict[str, list]:
        rows = []
        for number, *cells in zip(indices, *batch.values(), strict=True):
            try:
                rows.append(encode_one(dict(zip(batch, cells, strict=True)), number + 1))
            except UserError as error:
                if not skip_bad:
                    raise
                rows.append({"fate": SKIPPED, "notes": [f"skipped {error}"]})
        return {name: [row.get(name, "" if name == "kind" else []) for row in rows] for name in features}

    ids, text = datasets.List(datasets.Value("int64")), datasets.Value("string")
    types = {"input_ids": ids, "labels": ids, "fate": text, "kind": text, "notes": datasets.List(text)}
    features = datasets.Features(types)  # explicit, because the first thousand examples may all be dropped
    how = {"batched": True, "with_indices": True, "features": features, "desc": "tokenising"}
    how["fn_kwargs"] = {"made_by": _code_digest(tokenizer)}
    encoded = records.map(encode, remove_columns=records.column_names, **how)
    dataset = _trainable(encoded)
    dataset.notes = Notes.of(encoded.data.table, getattr(records, "other_files", []))
    dataset.sample = [format.read(records[row], row + 1) for row in _first_of_kinds(encoded.data.table["kind"])]
    dataset.writer = writer
    return dataset, len(records) - len(dataset)


def encoded(
    args: Any, tokenizer: "PreTrainedTokenizerBase", records: "datasets.Dataset"
) -> "tuple[datasets.Dataset, int]":
    """`build_dataset` of the records of --data.

    Raises:
        UserError: no example is left, or one cannot be trained on.
    """
    how = (args.fields, args.max_length, args.template, args.train_on, args.data, args.skip_bad)
    dataset, num_dropped = build_dataset(records, tokenizer, *how, read_template_args(args.template_args))
    if len(dataset) == 0:
        counts = ", ".join(f"{count} {fate}" for fate, count in dataset.notes.fates.items())
        raise UserError(
            f"no example of {args.data} has a response token within --max-length {args.max_length}: {counts}"
        )
    return dataset, num_dropped


def _code_digest(tokenizer: "PreTrainedTokenizerBase") -> str:
    """A digest of the code that makes tokens. `datasets` makes its cache anew when the arguments of a function change,
    and knows imported functions by their names alone."""
    digest = hashlib.sha256(repr([version(name) for name in ("transformers", "tokenizers", "jinja2")]).encode())
    for made in (build_dataset, Template, load_records, type(tokenizer)):
        digest.update(Path(inspect.getfile(made)).read_bytes())
    return digest.hexdigest()


def _first_of_kinds(kinds: Any) -> list[int]:
    import pyarrow.compute as pc

    return [pc.index(kinds, kind).as_py() for kind in pc.unique(kinds).to_pylist() if kind][:SERVED_SAMPLE]


def _trainable(encoded: "datasets.Dataset") -> "datasets.Dataset":
    """The examples that have a trained token, numbered."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    fates = encoded.data.table["fate"]
    encoded = encoded.remove_columns(["fate", "kind", "notes"])
    if len(kept := pc.indices_nonzero(pc.is_in(fates, pa.array(["whole", "cut"])))) < len(encoded):
        encoded = encoded.select(kept)
    return encoded.add_column("index", np.arange(len(encoded)))


SERVED_SAMPLE = 8  # so many examples of each kind are compared with a server's prompt, and so many kinds after export


def first_screen(examples: "datasets.Dataset") -> str:
    """For the terminal: names that are not used, the fates of the examples, and one example as it is trained."""
    lines = examples.notes.lines()
    if len(examples):
        shown = []
        pairs = zip(examples[0]["input_ids"], examples[0]["labels"], strict=True)
        for is_trained, group in itertools.groupby(pairs, key=lambda pair: pair[1] != IGNORE_INDEX):
            text = examples.writer.tokenizer.decode([token for token, _ in group])
            shown.append(f"⟦{text}⟧" if is_trained else text)
        text = re.sub(r"(?s)^(.{1500}).{100,}(.{500})$", r"\1 [...] \2", "".join(shown))
        lines += ["the first example; what stands in ⟦ ⟧ is trained:", text]
    return "\n".join(lines)


def encode_pieces(pieces: list[tuple[list[int], bool]], max_length: int, *, whole_turns: bool) -> dict[str, list[int]]:
    """`input_ids` and `labels` of a conversation's pieces, each trained or not, in at most `max_length` tokens.

    Tokens after the last trained one are left out, because nothing is learnt there.

    Args:
        whole_turns: cut after the last trained piece that fits, not inside it.
    """
    input_ids, labels, end = [], [], 0
    for is_trained, group in itertools.groupby(pieces, key=lambda piece: piece[1]):
        ids = [token for piece, _ in group for token in piece]
        input_ids += ids
        labels += ids if is_trained else [IGNORE_INDEX] * len(ids)
        if is_trained and (len(input_ids) <= max_length or not whole_turns):
            end = min(len(input_ids), max_length)
    return {"input_ids": input_ids[:end], "labels": labels[:end]}


def num_valid(labels: list[int]) -> int:
    """How many positions of an example have a trained token next."""
    later = labels[1:]
    return len(later) - later.count(IGNORE_INDEX)
