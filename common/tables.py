"""Reading data: a file, a folder of files of one kind, or a data set of the hub."""

import csv
import io
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import UserError, first_line

if TYPE_CHECKING:
    import datasets

DATA_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
SPLIT_OF_WORD = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLIT_OF_WORD |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")


def load_records(
    source: str, split: str = "train", subset: str | None = None, name: str | None = None
) -> "datasets.Dataset":
    """Reads a data set from a local file, a folder of files of one kind, or the hub.

    Args:
        split, subset: of a hub data set or a folder: its split, a folder inside it.
        name: configuration of a hub data set.

    Raises:
        UserError: nothing there, or nothing readable.
    """
    import datasets

    path = Path(source)
    if path.is_dir():
        files = files_of_split(path / (subset or ""), split)
    elif path.is_file():
        files = [path]
        if path.suffix not in DATA_BUILDERS:
            raise UserError(f"cannot tell the format of {source}: expected {', '.join(DATA_BUILDERS)}")
    elif path.suffix in DATA_BUILDERS or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise UserError(f"no such data file or folder: {source}")
    else:
        try:
            return datasets.load_dataset(source, name, data_dir=subset, split=split)
        except Exception as error:  # the hub's client has dozens of kinds
            raise UserError(f"cannot load the data set {source!r} from the hub: {first_line(error)}") from error
    suffixes = sorted({file.suffix for file in files})
    if len({DATA_BUILDERS[suffix] for suffix in suffixes}) > 1:
        raise UserError(f"{source} mixes kinds of files ({', '.join(suffixes)}): name one file")
    extra: dict[str, Any] = {}
    try:
        if DATA_BUILDERS[files[0].suffix] == "csv":
            is_tsv = files[0].suffix == ".tsv"
            quoting = csv.QUOTE_NONE if is_tsv and any(map(quotes_are_text, files)) else csv.QUOTE_MINIMAL
            extra = {"sep": "\t" if is_tsv else ",", "quoting": quoting, "keep_default_na": False}
            # Every cell is text as it is written: pandas would make 7 of "007", 2.0 of "2", nothing of "NA".
            names = {name for file in files for name in header_of(file, extra["sep"], quoting)}
            extra["converters"] = dict.fromkeys(sorted(names), str)
        return datasets.load_dataset(
            DATA_BUILDERS[files[0].suffix], data_files=[str(file) for file in files], split="train", **extra
        )
    except Exception as error:  # each format's reader raises its own
        cause = error.__cause__ or error
        raise UserError(f"cannot read {source}: {first_line(cause)}") from error


def header_of(file: Path, sep: str, quoting: int) -> list[str]:
    """The column names in the first line of a csv or tsv file."""
    with open(file, encoding="utf-8-sig", newline="") as stream:
        return next(csv.reader(stream, delimiter=sep, quoting=quoting), [])


def quotes_are_text(file: Path) -> bool:
    """Whether a tsv file, like GLUE's, was written without quoting: each line is a row, which reading it with quotation
    marks that enclose line ends would join."""
    with open(file, encoding="utf-8-sig", newline="") as stream:
        lines = [line for line in stream.read().split("\n") if line.strip("\r")]
    if len({line.count("\t") for line in lines}) > 1:
        return False
    csv.field_size_limit(2**31 - 1)
    return sum(1 for row in csv.reader((line + "\n" for line in lines), delimiter="\t") if row) != len(lines)


def files_of_split(folder: Path, split: str) -> list[Path]:
    """The data files below `folder`; where names or folders tell splits apart, those of `split` alone.

    Raises:
        UserError: there is none.
    """
    files = sorted(file for file in folder.rglob("*") if file.suffix in DATA_BUILDERS)
    if not files:
        raise UserError(f"{folder} holds no {', '.join(DATA_BUILDERS)} file")
    splits = {}
    for file in files:
        words = re.split(r"[^a-z]+", str(file.relative_to(folder)).lower())
        splits[file] = next((SPLIT_OF_WORD[word] for word in words if word in SPLIT_OF_WORD), None)
    known = sorted({found for found in splits.values() if found})
    if not known:
        return files
    chosen = [file for file in files if splits[file] == SPLIT_OF_WORD.get(split, split)]
    if not chosen:
        raise UserError(
            f"{folder} has files of {', '.join(known)} and none of {split!r}: choose by --split, or name one"
        )
    return chosen


def read_table(source: str, fields: list[str], label: str) -> "datasets.Dataset":
    """`load_records`; where all columns are given as numbers, a csv or tsv file without header, read line by line.

    Raises:
        UserError: nothing readable there, or lines of different width.
    """
    import datasets

    path = Path(source)
    if not all(name.isdigit() for name in (*fields, label)) or path.suffix not in (".csv", ".tsv"):
        return load_records(source)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {source}: {error}") from error
    if path.suffix == ".tsv":  # a quotation mark is text in a tsv file of GLUE's kind
        rows = [line.rstrip("\r").split("\t") for line in text.removesuffix("\n").split("\n")]
    else:
        try:
            rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))
        except csv.Error as error:
            raise UserError(f"cannot read {source} as csv: {error}") from error
    width = len(rows[0]) if rows else 0
    for number, row in enumerate(rows, 1):
        if len(row) != width:
            raise UserError(f"{source}, line {number}: {len(row)} columns, where the first line has {width}")
    return datasets.Dataset.from_dict({str(column): [row[column] for row in rows] for column in range(width)})


def require_fields(records: "datasets.Dataset", fields: list[str], source: str, remedy: str) -> None:
    """Raises a UserError that lists what there is, where `records` lacks one of `fields`."""
    for name in fields:
        if name not in records.column_names:
            known = ", ".join(records.column_names)
            raise UserError(f"{source} has no field {name!r}; its fields are {known}: {remedy}")
