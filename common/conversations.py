"""Training data: from a record, in one of the formats that people write, to tokens and labels.

A record is read as a conversation, a list of messages with `role` and `content`. common/templates.py says how a
conversation is written out, and which of its tokens are trained.

    instruction, output         two text fields, named by --fields
    messages                    a list of role and content; a column of another name is named by --fields
    conversations               ShareGPT's: a list of from and value
    prompt, completion          texts, or lists of messages; what stands in the prompt is never trained
"""

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from common.cli import UserError
from common.pretrained import resolve_demo
from common.tables import load_records, require_fields
from common.templates import IGNORE_INDEX, Messages, Template

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

DEFAULT_FIELDS = ("instruction", "output")
FORMATS = (DEFAULT_FIELDS, ("messages",), ("conversations",), ("conversation",), ("prompt", "completion"))

# What the ecosystem calls the four roles: OpenAI's and Hugging Face's names, and ShareGPT's.
ROLES = {
    "system": ("system",),
    "user": ("user", "human"),
    "assistant": ("assistant", "gpt", "chatgpt", "bing", "bard", "model", "function_call"),
    "tool": ("tool", "function", "observation", "function_response"),
}
ROLE_OF_NAME = {name: role for role, names in ROLES.items() for name in names}


# ------------------------------------------------------------------------------------------------------------------
# Formats
# ------------------------------------------------------------------------------------------------------------------


def load_training_records(args: Any) -> "datasets.Dataset":
    """The examples that --data, --fields and --max-examples name, as they are written; fills in `args.template`.

    Raises:
        UserError: no such data, none in a known format, or an example that is not in the format of the first.
    """
    records = load_records(resolve_demo(args.data, "train"), args.split, args.data_subset, args.data_config)
    if args.max_examples is not None:
        records = records.select(range(min(args.max_examples, len(records))))
    format = Format.of(records, args.fields, args.data)
    for number, record in enumerate(records, 1):
        format.read(record, number)
    args.template = args.template or format.template
    return records


@dataclass
class Format:
    """How a file's examples are written.

    Attributes:
        columns: the one that holds conversations, or a prompt's and a response's.
        is_named: whether they are two text fields that --fields names.
        template: what stands around the turns where --template does not say it.
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
            UserError: there is none, --fields names a column that is not there, or one of two that holds no text.
        """
        there = [names for names in FORMATS if set(names) <= set(records.column_names)]
        if tuple(fields) == DEFAULT_FIELDS and there:
            first = records[0] if len(records) else {}
            columns = next((names for names in there if all(first.get(name) is not None for name in names)), there[0])
        else:
            require_fields(records, fields, source, "name two texts, or one that holds conversations, with --fields")
            columns = tuple(fields)
        kinds = [getattr(records.features[name], "dtype", "list") for name in columns]
        others = [i for i, kind in enumerate(kinds) if not kind.endswith("string") and not kind.startswith(TEXT_KINDS)]
        are_texts = not others
        is_named = len(columns) == 2 and columns == tuple(fields)
        if is_named and not are_texts:
            name, kind = columns[others[0]], kinds[others[0]]
            raise UserError(f"{source}: the field {name!r} holds no text but {kind}: write it as text")
        template = "alpaca" if is_named else "raw" if len(columns) == 2 and are_texts else "chat"
        return cls(columns, is_named, template, source)

    def read(self, record: dict[str, Any], number: int) -> tuple[Messages, int] | None:
        """The messages of the example of this `number`, and the place of the first that may be trained.

        None: a named field is empty.

        Raises:
            UserError: names the example and says what is wrong with it.
        """
        where = f"{self.source}, example {number}"
        if all(record[name] is None for name in self.columns):
            for names in FORMATS:
                if all(record.get(name) is not None for name in names):
                    ours, theirs = " and ".join(self.columns), " and ".join(names)
                    raise UserError(f"{where} has {theirs}, where examples before it have {ours}: split the file")
        if self.is_named:
            texts = ["" if record[name] is None else str(record[name]) for name in self.columns]
            if not all(text.strip() for text in texts):
                return None
            return [{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts, strict=True)], 1
        if record.get("tools"):
            raise UserError(f"{where} has tools, which are not read: write them as text into the system's turn")
        parts = [_read_messages(record[name], name, where) for name in self.columns]
        messages = [message for part in parts for message in part]
        if isinstance(record.get("system"), str) and record["system"].strip() and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": record["system"]})
        _check_turns(messages, where)
        first = len(messages) - len(parts[-1]) if len(parts) > 1 else 0
        if not any(message["role"] == "assistant" for message in messages[first:]):
            raise UserError(f"{where} has no assistant turn: there is nothing to train on")
        return messages, first


TEXT_KINDS = ("int", "uint", "float", "bool", "null")  # beside strings: numbers are written out


def _read_messages(cell: Any, name: str, where: str) -> Messages:
    """The messages of one cell: a list of them, or a text, which is the turn that its column's `name` says."""
    if isinstance(cell, str) and name in ("prompt", "completion"):
        cell = [{"role": "user" if name == "prompt" else "assistant", "content": cell}]
    if not isinstance(cell, list) or not cell or not all(isinstance(message, dict) for message in cell):
        raise UserError(f"{where}: {name} is no list of messages")
    return [_read_message(message, f"{where}, message {number}") for number, message in enumerate(cell, 1)]


def _read_message(message: dict, where: str) -> dict[str, str]:
    """Role and content under one name each; other texts, such as `reasoning_content`, are left for the template."""
    name = message.get("from") if message.get("role") is None else message["role"]
    content = message.get("value") if message.get("content") is None else message["content"]
    if name not in ROLE_OF_NAME:
        raise UserError(f"{where}: nobody knows the role {name!r}; roles are {', '.join(ROLES)}")
    if message.get("tool_calls"):
        raise UserError(f"{where} has tool_calls, which are not read: write them as text into its content")
    if content is not None and not isinstance(content, str):
        raise UserError(f"{where}: its content is no text")
    if ROLE_OF_NAME[name] == "assistant" and not (content or "").strip():
        raise UserError(f"{where}: an assistant turn that is empty")
    others = {key: value for key, value in message.items() if isinstance(value, str) and key not in ("from", "value")}
    return others | {"role": ROLE_OF_NAME[name], "content": content or ""}


def _check_turns(messages: Messages, where: str) -> None:
    """Raises a UserError where an assistant turn follows another one, or nothing."""
    before = None
    for number, message in enumerate(messages, 1):
        if message["role"] == before == "assistant":
            raise UserError(f"{where}, message {number}: two assistant turns in a row")
        if message["role"] == "assistant" and before in (None, "system"):
            raise UserError(f"{where}, message {number}: an assistant turn that answers nobody")
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
) -> tuple["datasets.Dataset", int]:
    """Tokenises `records`; returns the examples and how many were dropped for having nothing to train on left.

    Two named fields are cut after `max_length` tokens. A conversation is cut after its last assistant turn that fits.
    An example's `index` is its place in what is returned.

    Args:
        template: `alpaca`, `chat` or `raw`; None: the format's own. train_on: `all` assistant turns, or the `last`.
        source: names the data in an error.

    Raises:
        UserError: names the example that is not in the format of the first, or that the template cannot take.
    """
    format = Format.of(records, fields, source)
    writer = Template(tokenizer, template or format.template)

    def encode(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        encoded = {"input_ids": [], "labels": []}
        for number, *cells in zip(indices, *batch.values(), strict=True):
            conversation = format.read(dict(zip(batch, cells, strict=True)), number + 1)
            if conversation is None:
                continue
            messages, first = conversation
            if train_on == "last":
                first = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
            try:
                pieces = writer.pieces(messages, first)
            except UserError as error:
                raise UserError(f"{source}, example {number + 1}: {error}") from error
            example = encode_pieces(pieces, max_length, whole_turns=not format.is_named)
            if any(label != IGNORE_INDEX for label in example["labels"][1:]):
                for name, ids in example.items():
                    encoded[name].append(ids)
        return encoded

    encoded = records.map(
        encode, batched=True, with_indices=True, remove_columns=records.column_names, desc="tokenising"
    )
    return encoded.add_column("index", list(range(len(encoded)))), len(records) - len(encoded)


def encode_pieces(pieces: list[tuple[list[int], bool]], max_length: int, *, whole_turns: bool) -> dict[str, list[int]]:
    """`input_ids` and `labels` of a conversation's pieces, each trained or not, in at most `max_length` tokens.

    What follows the last trained token is left out: nothing is learnt there.

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
    return sum(label != IGNORE_INDEX for label in labels[1:])
