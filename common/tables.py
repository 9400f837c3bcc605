"""Reading data: a file, a folder of files of one kind, or a data set of the hub.

A cell is read as it is written. Text stays text; a number stays a number only where that number is written so again,
else it is the text (1e17, 1.50). Within a list or an object a number stays a number, as `json` reads it. No type is
inferred from the cells of a column.
"""

import contextlib
import csv
import datetime
import gzip
import hashlib
import itertools
import json
import math
import os
import re
import secrets
import shutil
import time
import zlib
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from common.cli import UserError, first_line

if TYPE_CHECKING:
    import datasets

KINDS = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
ABOUT = ("dataset_info.json", "dataset_infos.json")  # they describe the data beside them
DESCRIBES = re.compile(r"(?i)(read_?me|licen[cs]e|about)\b")  # how the names of texts about the data begin
ONE_KIND = {".jsonl": ".json"}
SPLIT_OF_WORD = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLIT_OF_WORD |= dict.fromkeys(("validation", "valid", "val", "dev", "eval", "evaluation", "heldout"), "validation")
BATCH_ROWS, BATCH_BYTES = 1000, 2**24  # how much of a file is held in memory before it is written to the cache

UNUSED_SECONDS = 30 * 24 * 3600  # a table that nobody reads so long is removed from the cache

Row = dict[str, Any]


class HubError(UserError):
    """A data set of the hub that cannot be reached from here."""


@dataclass
class Json:
    """For `datasets`: a column of other values than texts. Its own type of this name reads by ujson, which rounds."""

    _type: str = field(default="ExactJson", init=False, repr=False)

    def __call__(self) -> Any:
        import pyarrow as pa

        return pa.string()

    def encode_example(self, value: Any) -> str | None:
        return None if value is None else json.dumps(value, ensure_ascii=False)

    def decode_example(self, text: str | None, **_: Any) -> Any:
        return None if text is None else json.loads(text)


def _datasets() -> Any:
    """`datasets`, which knows the type Json."""
    import datasets

    datasets.features.features._FEATURE_TYPES["ExactJson"] = Json  # as register_feature does, which warns
    return datasets


def load_records(
    source: str, split: str = "train", subset: str | None = None, name: str | None = None
) -> "datasets.Dataset":
    """Reads a data set from a local file, a folder of files of one kind, or the hub.

    Args:
        split, subset: a split of a hub data set or of a folder; a folder inside it.
        name: configuration of a hub data set.

    Raises:
        UserError: nothing there, or nothing readable; names file and line.
    """
    path = Path(source)
    if path.is_dir():
        files = files_of_split(path / (subset or ""), split)[0]
    elif path.is_file():
        files = [path]
        if kind_of(path) not in KINDS:
            known = f"{', '.join(KINDS)}, or one of them but parquet with .gz"
            raise UserError(f"cannot tell the format of {source}: expected {known}")
    elif kind_of(path) in KINDS or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise UserError(f"no such data file or folder: {source}")
    else:
        datasets = _datasets()
        try:
            found = datasets.load_dataset(source, name, data_dir=subset, split=split)
            names = _class_names(found.features.arrow_schema)
            values = [column for column, kind in found.features.items() if _changes(kind)]
            kinds = dict.fromkeys(names, datasets.Value("string")) | dict.fromkeys(values, Json())
            how = {"batched": True, "fn_kwargs": {"names": names, "values": values, "made_by": _code_digest()}}
            how["features"] = datasets.Features(found.features | kinds)
            return found.with_format("arrow").map(_as_written, **how).with_format(None) if kinds else found
        except Exception as error:  # the hub's client raises dozens of kinds
            raise HubError(f"cannot load the data set {source!r} from the hub: {first_line(error)}") from error
    kinds = sorted({kind_of(file) for file in files})
    if len({ONE_KIND.get(kind, kind) for kind in kinds}) > 1:
        raise UserError(f"{source} mixes kinds of files ({', '.join(kinds)}): name one file")
    records = _cached(files)
    if int(os.environ.get("RANK", 0)) == 0:
        for file in files:
            if kind_of(file) == ".parquet":
                _announce_class_names(file)
    return records


def read_table(source: str, fields: list[str], label: str, split: str = "train") -> "datasets.Dataset":
    """`load_records`, or, if all columns are named by numbers, a csv or tsv file without header.

    Raises:
        UserError: nothing readable there, or lines of different width.
    """
    path = Path(source)
    if not all(name.isdigit() for name in (*fields, label)) or kind_of(path) not in (".csv", ".tsv"):
        return load_records(source, split)
    return _cached([path], has_header=False)


Pairs = Iterable[tuple[Hashable, Hashable]]


def note_on_overlap(trained: Pairs, held_out: Pairs, name: str) -> str | None:
    """A note if held-out examples are also trained on, as pairs of a text and its label or answer; else None."""
    trained, held_out = set(trained), list(held_out)
    texts, of_all = {text for text, _ in trained}, f"of the {len(held_out)} examples of {name}"
    same = sum(pair in trained for pair in held_out)
    other = sum(text in texts for text, _ in held_out) - same
    parts = [f"{same} {of_all} are trained on too"] if same else []
    parts += [f"{other} {of_all} are trained on with another label or answer"] if other else []
    return f"note: {'; '.join(parts)}" if parts else None


def require_fields(records: "datasets.Dataset", fields: list[str], source: str, remedy: str) -> None:
    """Raises a UserError that lists the existing fields if `records` lacks one of `fields`."""
    for name in fields:
        if name not in records.column_names:
            known = ", ".join(records.column_names)
            raise UserError(f"{source} has no field {name!r}; its fields are {known}: {remedy}")


def with_texts(record: Row, place: str, fields: Iterable[str], lists: Iterable[str] = ()) -> Row:
    """The record with the cells of `fields` as texts and those of `lists` as lists of texts. A number becomes its text;
    a list may be written as JSON.

    Raises:
        UserError: a cell is missing, empty or something else; begins with `place`.
    """
    cells = {name: _filled(record.get(name)) for name in fields}
    for name in lists:
        cell = record.get(name)
        with contextlib.suppress(ValueError):
            cell = json.loads(cell) if isinstance(cell, str) else cell
        parts = [_filled(part) for part in cell] if isinstance(cell, list) else []
        cells[name] = parts if all(parts) else None
    for name, cell in cells.items():
        if not cell:
            what = "list of texts" if name in lists else "text"
            raise UserError(f"{place} has no {what} in {name!r}: {as_text(record.get(name))[:80]}")
    return record | cells


def _filled(cell: Any) -> str | None:
    """A cell's text, or a number's; None if there is none."""
    if isinstance(cell, int | float) and not isinstance(cell, bool) and math.isfinite(cell):
        return str(cell)
    return cell if isinstance(cell, str) and cell.strip() else None


def as_text(cell: Any) -> str:
    """A cell as text: a text as it is, any other value as JSON."""
    return cell if isinstance(cell, str) else json.dumps(cell, ensure_ascii=False, default=str)


# ------------------------------------------------------------------------------------------------------------------
# Which files
# ------------------------------------------------------------------------------------------------------------------


def kind_of(path: Path) -> str:
    """The suffix that names a file's format, in lower case and without .gz: .jsonl for data.JSONL and data.jsonl.gz."""
    return path.with_suffix("" if path.suffix.lower() == ".gz" else path.suffix).suffix.lower()


def data_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """The data files below `folder`, in linked folders too, and those that are passed over. Each folder is read once.

    As `datasets` does, it passes over names that begin with a dot (.ipynb_checkpoints) and folders with __ (__MACOSX).
    It passes over files of other kinds too, which may be parts of the data (.jsonl.zst).

    Raises:
        UserError: a folder that may not be read, a link to nothing, or a folder of `datasets`' own form.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"cannot read {error.filename}: {error.strerror}")

    found, passed, known = [], [], set()
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if os.path.realpath(place) in known:
            folders.clear()
            continue
        known.add(os.path.realpath(place))
        passed += [Path(place, name) for name in folders if name.startswith((".", "__"))]
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        if "state.json" in names and any(name.endswith(".arrow") for name in names):
            raise UserError(f"{place} was written by save_to_disk: write it by to_parquet, and name that file")
        for file in (Path(place, name) for name in names):
            if file.is_symlink() and not file.exists() and file.name[0] != ".":
                raise UserError(f"cannot read {file}: a link to nothing")
            if not file.is_file() or file.name in ABOUT:
                continue
            if kind_of(file) in KINDS:
                (passed if file.name[0] == "." else found).append(file)
            elif file.name[0] != "." and not DESCRIBES.match(file.name):
                passed.append(file)
    return sorted(found), sorted(passed)


def _splits(files: list[Path], folder: Path) -> dict[Path, str | None]:
    """The split that each file's path below `folder` names."""
    splits = {}
    for file in files:
        words = re.split(r"[^a-z]+", str(file.relative_to(folder)).lower().replace("held_out", "heldout"))
        splits[file] = next((SPLIT_OF_WORD[word] for word in words if word in SPLIT_OF_WORD), None)
    return splits


def split_of(source: str | Path, split: str) -> str:
    """`split` where `source` may have several: a hub's name, a folder with files that name one. Else train."""
    path = Path(source)
    has_one = path.is_file() or (path.is_dir() and not any(_splits(data_files(path)[0], path).values()))
    return "train" if has_one else split


def files_of_split(folder: Path, split: str) -> tuple[list[Path], list[Path]]:
    """The data files below `folder`: those of `split`, and the others. A name without a split's word counts as train.

    Raises:
        UserError: the folder has no data file, or none of `split`, or one in two forms.
    """
    files, passed = data_files(folder)
    if not files:
        raise UserError(f"{folder} holds no {', '.join(KINDS)} file")
    splits = _splits(files, folder)
    known = sorted({found for found in splits.values() if found})
    unnamed = None if "train" not in known and SPLIT_OF_WORD.get(split, split) == "train" else split
    chosen = [file for file in files if not known or splits[file] in (SPLIT_OF_WORD.get(split, split), unnamed)]
    if not chosen:
        raise UserError(
            f"{folder} has files of {', '.join(known)} and none of {split!r}: choose by --split, or name one"
        )
    forms: dict[Path, Path] = {}
    for file in chosen:
        other = forms.setdefault((file.with_suffix("") if file.suffix.lower() == ".gz" else file).with_suffix(""), file)
        if other != file:
            raise UserError(f"{other} and {file.name} may hold the same examples: name one of them, or rename one")
    return chosen, sorted([*passed, *(file for file in files if file not in chosen)])


# ------------------------------------------------------------------------------------------------------------------
# From rows to a table on the disk
# ------------------------------------------------------------------------------------------------------------------


def _code_digest() -> str:
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def _cached(files: list[Path], has_header: bool = True) -> "datasets.Dataset":
    """The files' rows as a table on disk, which is made again when a file's content or this reader has changed. Users
    may share the folder: a table has the mode that the umask gives, and one that cannot be read is made again.

    Raises:
        UserError: a file cannot be read, or the table cannot be kept.
    """
    datasets = _datasets()
    key = hashlib.sha256(_code_digest().encode())
    try:
        for file in files:
            with open(file, "rb") as stream:
                key.update(f"{kind_of(file)} {has_header} {hashlib.file_digest(stream, 'sha256').hexdigest()}".encode())
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "tables" / key.hexdigest()[:32]
    table = folder / "rows.arrow"
    if not os.access(table, os.R_OK):
        being_written = folder / f"{secrets.token_hex(8)}.partial"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            being_written.touch()
        except PermissionError as error:
            where = f"{error.filename}: {error.strerror}"
            raise UserError(f"cannot keep {files[0]} in {where}; set HF_DATASETS_CACHE to a folder of yours") from error
        try:
            kinds: dict[str, bool] = {}
            while not _write(files, has_header, being_written, kinds):
                pass
            os.replace(being_written, table)
        finally:
            being_written.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # another process may remove the same table, another user owns the folder
            for other in folder.parent.iterdir():  # the tables of a file that changes often would fill the disk
                if time.time() - other.stat().st_mtime > UNUSED_SECONDS:
                    shutil.rmtree(other, ignore_errors=True)
    with contextlib.suppress(OSError):  # another user's folder, or a disk that is read alone
        os.utime(folder)
    return datasets.Dataset.from_file(str(table))


def _write(files: list[Path], has_header: bool, target: Path, kinds: dict[str, bool]) -> bool:
    """Writes all rows. False if a later row changed `kinds`, which tells for each column whether it is text.

    Raises:
        UserError: there is no row, or a row cannot be read.
    """
    import pyarrow as pa

    datasets = _datasets()
    writer, done, has_rows = None, True, False
    with pa.OSFile(str(target), "wb") as sink:
        for file in files:
            for rows in _batches(_rows_of(file, has_header)):
                before, has_rows = dict(kinds), True
                for row in rows:
                    for name, cell in row.items():
                        if not (cell is None or isinstance(cell, str)):
                            kinds[name] = False
                        elif name not in kinds:
                            kinds[name] = True
                done = done and (writer is None or kinds == before)
                if not done:
                    continue  # the remaining rows are read only to complete `kinds`
                if writer is None:
                    features = {name: datasets.Value("string") if text else Json() for name, text in kinds.items()}
                    schema = datasets.Features(features).arrow_schema
                    writer = pa.ipc.new_stream(sink, schema)
                writer.write_batch(_batch(rows, kinds, schema))
        if writer is not None:
            writer.close()
    if not has_rows:
        raise UserError(f"cannot read {files[0]}: it holds no row")
    return done


def _batch(rows: list[Row], kinds: dict[str, bool], schema: Any) -> Any:
    import pyarrow as pa

    columns = []
    for name, is_text in kinds.items():
        cells = [row.get(name) for row in rows]
        columns.append(pa.array(cells if is_text else map(Json().encode_example, cells), pa.string()))
    return pa.record_batch(columns, schema=schema)


def _batches(rows: Iterable[tuple[Row, int]]) -> Iterator[list[Row]]:
    """Rows in lists of bounded size; each row comes with its number of characters."""
    batch, size = [], 0
    for row, length in rows:
        batch.append(row)
        size += length
        if len(batch) == BATCH_ROWS or size > BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _rows_of(file: Path, has_header: bool) -> Iterator[tuple[Row, int]]:
    match kind_of(file):
        case ".parquet":
            return _parquet_rows(file)
        case ".csv" | ".tsv" as kind:
            return _table_rows(file, "\t" if kind == ".tsv" else ",", has_header)
    return _json_rows(file)


# ------------------------------------------------------------------------------------------------------------------
# Lines of text
# ------------------------------------------------------------------------------------------------------------------


DAMAGED = (OSError, EOFError, zlib.error)  # errors of a failing disk, and of a gzip that is damaged or cut


def _unreadable(file: Path, line: int, what: str) -> UserError:
    return UserError(f"cannot read {file}, line {line}: {what}")


def _open(file: Path) -> TextIO:
    """A file's text, in the encoding that its first bytes name; an invalid byte becomes a lone surrogate."""
    opened = gzip.open if file.suffix.lower() == ".gz" else open
    try:
        with opened(file, "rb") as stream:
            encoding = json.detect_encoding(stream.read(4))
    except DAMAGED as error:
        raise UserError(f"cannot read {file}: {first_line(error)}") from error
    return opened(file, "rt", encoding=encoding, errors="surrogateescape", newline="\n")


def numbered_lines(file: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines with their ends. Only line feeds end a line, because texts may contain other separators.

    Raises:
        UserError: a byte that is not valid in the file's encoding; names its line.
    """
    number = 0
    with _open(file) as stream:
        try:
            for number, line in enumerate(stream, 1):
                if not line.isascii():
                    line.encode()
                yield number, line
        except UnicodeEncodeError as error:
            byte = ord(error.object[error.start]) & 0xFF
            what = f"byte {byte:#04x} at character {error.start + 1} is no {stream.encoding}: save the file as UTF-8"
            raise _unreadable(file, number, what) from error
        except (UnicodeDecodeError, *DAMAGED) as error:  # UTF-16 may end within a character
            raise _unreadable(file, number + 1, first_line(error)) from error


# ------------------------------------------------------------------------------------------------------------------
# JSON
# ------------------------------------------------------------------------------------------------------------------


def _finite(text: str) -> float:
    if math.isinf(number := float(text)):
        raise ValueError(f"{text} is larger than a number of 64 bits can be: write a text")
    return number


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no value of JSON: write null, or a text")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} comes twice")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_float=_finite, parse_constant=_refuse_constant)
_SPELLING = json.JSONDecoder(parse_int=str, parse_float=str)


def _json_rows(file: Path) -> Iterator[tuple[Row, int]]:
    """Objects line by line; if the first line is not an object, the objects of a list, or a sequence of objects."""
    is_by_line = False
    for number, line in numbered_lines(file):
        text = line.strip()
        if not text:
            continue
        try:
            row = _DECODER.decode(text)
        except (ValueError, RecursionError) as error:
            if not is_by_line and text[0] in "[{" and getattr(error, "pos", 0) >= len(text):
                yield from _document_rows(file)
                return
            raise _unreadable(file, number, _reason(error)) from error
        if (
            not is_by_line
            and isinstance(row, list)
            and (not row or (isinstance(row[0], dict) and "role" not in row[0]))
        ):
            yield from _document_rows(file)
            return
        is_by_line = True
        yield _checked(row, text, file, number), len(line)


def _document_rows(file: Path) -> Iterator[tuple[Row, int]]:
    text, at, number = "".join(line for _, line in numbered_lines(file)), 0, 1
    space = re.compile(r"\s*")
    at = start = space.match(text).end()
    is_list = text[at] == "["
    at = space.match(text, at + is_list).end()
    number += text.count("\n", 0, at)
    while at < len(text) and not (is_list and text[at] == "]"):
        try:
            row, end = _DECODER.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            line = number + text.count("\n", at, getattr(error, "pos", at))
            raise _unreadable(file, line, _reason(error)) from error
        yield _checked(row, text[at:end], file, number), end - at
        start, at = at, space.match(text, end).end()
        if is_list and text[at : at + 1] == ",":
            at = space.match(text, at + 1).end()
            if text[at : at + 1] == "]":
                raise _unreadable(file, number + text.count("\n", start, at), "a comma before the list's end")
        elif is_list and text[at : at + 1] != "]":
            line = number + text.count("\n", start, at)
            raise _unreadable(file, line, "the list of objects ends, or goes on, without a comma or a bracket")
        number += text.count("\n", start, at)
    if is_list and text[at + 1 :].strip():
        raise _unreadable(file, number, "there is more behind the list of objects")


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"no JSON at character {error.colno}: {error.msg}"
    return "nested too deeply" if isinstance(error, RecursionError) else first_line(error)


def _checked(row: Any, text: str, file: Path, number: int) -> Row:
    """The row of `text`, with texts for the numbers among its cells that Python would write otherwise.

    Raises:
        UserError: it is no object, or a text in it has half of a character.
    """
    if not isinstance(row, dict):
        raise _unreadable(file, number, f"{as_text(row)[:40]} is no object with the example's fields")
    if "\\u" in text:
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            what = f"\\u{ord(error.object[error.start]):04x} is half of a character"
            raise _unreadable(file, number, what) from error
    if numbers := [name for name, cell in row.items() if type(cell) in (int, float)]:
        spelled = _SPELLING.decode(text)
        row = row | {name: spelled[name] for name in numbers if str(row[name]) != spelled[name]}
    return row


# ------------------------------------------------------------------------------------------------------------------
# csv and tsv
# ------------------------------------------------------------------------------------------------------------------


def _table_rows(file: Path, sep: str, has_header: bool) -> Iterator[tuple[Row, int]]:
    """Rows of text; without a header, or with one of numbers, the columns are named by their numbers."""
    rows = _split_lines(file) if sep == "\t" and not _is_quoted(file) else _csv_cells(file, sep)
    names = None
    for number, cells in rows:
        if names is None:
            names = cells if has_header else [str(column) for column in range(len(cells))]
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise _unreadable(file, number, f"the column {twice!r} comes twice")
            if has_header or cells == [str(column) for column in range(len(cells))]:  # as pandas numbers columns
                continue
        if len(cells) != len(names):
            raise _unreadable(file, number, f"{len(cells)} columns, where the first line has {len(names)}")
        yield dict(zip(names, cells, strict=True)), sum(map(len, cells))


def _csv_cells(file: Path, sep: str) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader((line for _, line in numbered_lines(file)), delimiter=sep, strict=True)
    first = 1
    try:
        for cells in reader:
            if cells:
                yield first, cells
            first = reader.line_num + 1
    except csv.Error as error:
        raise _unreadable(file, first, f"not as csv: {error}") from error


def _split_lines(file: Path) -> Iterator[tuple[int, list[str]]]:
    return ((number, line.rstrip("\r\n").split("\t")) for number, line in numbered_lines(file) if line.strip("\r\n"))


def _is_quoted(file: Path) -> bool:
    """Whether a tsv file was written with csv's quoting, as by a spreadsheet, and not line by line, as GLUE's files.

    With quoting, every row has the first row's width, and cells with tabs, line ends or quotation marks are quoted, or
    all cells are. If csv reads a row of several lines, most of them of that width, the lines had lone quotation marks.
    """
    lines = dict(_split_lines(file))
    has_need, starts, width = False, [], None
    try:
        for start, cells in _csv_cells(file, "\t"):
            if len(cells) != (width := width or len(cells)):
                return False
            for cell, text in zip(cells, lines.get(start, ()), strict=False):
                if cell == text and '"' in cell:  # a spreadsheet would have quoted it
                    return False
            starts.append(start)
            has_need = has_need or any(re.search(r'[\t\n"]', cell) for cell in cells)
    except UserError:
        return False
    for start, end in itertools.pairwise([*starts, max(lines, default=0) + 1]):
        widths = [len(lines[number]) for number in range(start, end) if number in lines]
        if len(widths) > 1 and 2 * widths.count(width) > len(widths):
            return False
    return has_need or all(re.fullmatch(r'"[^"]*"', cell) for row in lines.values() for cell in row)


# ------------------------------------------------------------------------------------------------------------------
# parquet
# ------------------------------------------------------------------------------------------------------------------


def _parquet_rows(file: Path) -> Iterator[tuple[Row, int]]:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        with pa.parquet.ParquetFile(file) as table:
            names = _class_names(table.schema_arrow)
            for batch in table.iter_batches(BATCH_ROWS):
                size = max(batch.nbytes // max(len(batch), 1), 1)
                yield from ((row, size) for row in _plain_rows(batch, names))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"cannot read {file}: {first_line(error)}") from error


def _class_names(schema: Any) -> dict[str, dict[int, str | None]]:
    """The names of class numbers by column of integers, where `datasets` wrote the table with a ClassLabel; −1 is no
    class. Other programs leave the description in a table as it is, when they drop a column or replace its cells."""
    import pyarrow as pa

    about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = about.get("info", {}).get("features", {})
    kinds = {name: kind for name, kind in features.items() if isinstance(kind, dict)}
    return {
        name: {-1: None, **dict(enumerate(kind["names"]))}
        for name, kind in kinds.items()
        if kind.get("_type") == "ClassLabel" and name in schema.names and pa.types.is_integer(schema.field(name).type)
    }


def _announce_class_names(file: Path) -> None:
    import pyarrow.parquet

    for column, names in _class_names(pyarrow.parquet.read_schema(file)).items():
        shown = [f"{number} = {name}" for number, name in names.items() if name is not None]
        of_all = ", ".join(shown[:5]) + (f", and {len(shown) - 5} more" if len(shown) > 5 else "")
        print(f"note: {file}: the numbers in {column!r} are read as the names that are written in the file: {of_all}")


def _named(row: Row, names: dict[str, dict[int, str | None]]) -> Row:
    """The row with names in the place of class numbers; another cell, such as a name, stays."""
    numbers = {name: row[name] for name in names if isinstance(row[name], int)}
    return row | {name: names[name].get(number, number) for name, number in numbers.items()} if numbers else row


def _changes(kind: Any) -> bool:
    """Whether `_plain` changes cells of a column of `datasets`: it has objects, or numbers of 16 or 32 bits."""
    import datasets

    changes = isinstance(kind, dict | datasets.Json) or getattr(kind, "dtype", None) in ("float16", "float32")
    return changes or (hasattr(kind, "feature") and _changes(kind.feature))


def _as_written(table: Any, names: dict[str, dict[int, str | None]], values: list[str], made_by: str) -> Any:
    """A table of the hub with the names of its classes, and with `values` as JSON, as they were written.

    Args:
        made_by: not read. `datasets` takes its cached result if the arguments are the same, whatever this function is.
    """
    import pyarrow as pa

    rows = _plain_rows(table.select([*names, *values]), names)
    for name in (*names, *values):
        written = as_text if name in names else Json().encode_example
        cells = [None if row[name] is None else written(row[name]) for row in rows]
        table = table.set_column(table.schema.get_field_index(name), name, pa.array(cells, pa.string()))
    return table


def _plain_rows(batch: Any, names: dict[str, dict[int, str | None]]) -> list[Row]:
    """The rows of one of Arrow's tables or batches, with `names` in the place of its class numbers."""
    kinds = {one.name: one.type for one in batch.schema}
    rows = (_named(row, names) for row in batch.to_pylist())
    return [{name: _plain(cell, kinds[name]) for name, cell in row.items()} for row in rows]


def _plain(cell: Any, kind: Any) -> Any:
    """Converts a value of Arrow's type `kind` to one of JSON: dates, decimals and bytes to text, a missing number to
    None, and a number of 16 or 32 bits to the shortest one that it stands for: 0.1, not 0.10000000149011612.

    Arrow gives the objects of a column all the same keys, with null where an object had no such key. Such keys are left
    out, because a null would be trained as an argument of a tool call.
    """
    match cell:
        case str() if str(kind) == "extension<arrow.json>":  # of `datasets`, for objects of different keys
            return json.loads(cell)
        case None | bool() | str() | int():
            return cell
        case float():
            short = {"float": np.float32, "halffloat": np.float16}.get(str(kind), float)
            return float(str(short(cell))) if math.isfinite(cell) else None
        case dict():
            return {name: _plain(value, kind.field(name).type) for name, value in cell.items() if value is not None}
        case tuple():  # of a map
            return [_plain(value, of) for value, of in zip(cell, (kind.key_type, kind.item_type), strict=True)]
        case list():
            return [_plain(value, getattr(kind, "value_type", kind)) for value in cell]
        case bytes():
            return cell.decode()
        case datetime.date() | datetime.time():
            return cell.isoformat()
    return str(cell)
