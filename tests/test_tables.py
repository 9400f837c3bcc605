"""The reader of tables: a few lines of json, csv and pyarrow are the peer."""

import codecs
import csv
import datetime
import gzip
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import ROOT

from common.cli import UserError
from common.conversations import Format
from common.tables import files_of_split, load_records, numbered_lines, read_table


def read(path):
    return list(load_records(str(path)))


ROWS = [{"instruction": "Grüße, \u2028 x", "output": "Schön\n"}, {"instruction": "日本", "output": '"q"\t'}]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "pretty.json", "a.csv", "A.JSONL"])
def test_encodings_that_name_themselves(name, encoding, tmp_path):
    if name.endswith("csv"):
        stream = io.StringIO(newline="")
        csv.writer(stream).writerows([list(ROWS[0]), *(list(row.values()) for row in ROWS)])
        text = stream.getvalue() + "\r\n"  # an empty line
    elif name == "a.json":
        text = json.dumps(ROWS, indent=2, ensure_ascii=False)
    else:
        indent = 1 if name == "pretty.json" else None
        text = "\r\n".join(json.dumps(row, ensure_ascii=False, indent=indent) for row in ROWS)
    (tmp_path / name).write_bytes(text.encode(encoding))
    assert read(tmp_path / name) == ROWS


def test_cells_are_as_they_are_written(tmp_path):
    literals = [
        "3",
        "0.5",
        "1.50",
        "1e17",
        "100000000000000001",
        "1180591620717411303424",
        "true",
        '"2021-03-01"',
        "-0",
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"x": {literal}, "y": [{literal}]}}\n' for literal in literals))
    for row, literal in zip(read(path), literals, strict=True):
        assert (row["x"] if isinstance(row["x"], str) else json.dumps(row["x"])) == literal.strip('"')
        assert row["y"] == [json.loads(literal)]


def test_a_number_within_a_list_or_an_object_is_the_number_that_json_reads(tmp_path):
    """Beside a number of 16 or 32 bits, parquet's, which is numpy's shortest spelling of it."""
    literals = [f"{number / 100:g}" for number in range(1, 1000)]
    literals += ["1e-5", "0.00001", "10.50", "12345678901234567890", "37.774929499999996", "1e17", "-0.0", "5e-324"]
    lines = [f'{{"x": {{"a": {literal}, "b": [[{literal}]]}}}}\n' for literal in literals]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    assert list(map(json.dumps, read(tmp_path / "a.jsonl"))) == [json.dumps(json.loads(line)) for line in lines]
    (tmp_path / "b.jsonl").write_text('{"x": [1e999]}')
    with pytest.raises(UserError, match="line 1: 1e999 is larger than a number of 64 bits"):
        read(tmp_path / "b.jsonl")


@pytest.mark.parametrize("comes_from", ["a file", "the hub"])
def test_a_number_of_a_table_is_the_shortest_one_that_it_stands_for(tmp_path, monkeypatch, comes_from):
    """numpy's shortest spelling of the same bits is the peer; pandas writes such columns for models' scores."""
    numbers = [0.1, 1 / 3, 37.774929499999996, 3e-5, 123456.79, 2.0]
    table = pa.table({name: pa.array(numbers, kind) for name, kind in (("e", pa.float64()), ("f", pa.float32()))})
    nested = pa.StructArray.from_arrays(table.columns[0].chunks + table.columns[1].chunks, ["e", "f"])
    columns = [[nested], [[[number]] for number in numbers], [[("k", number)] for number in numbers], [2**64 - 1] * 6]
    kinds = [nested.type, pa.list_(pa.list_(pa.float32())), pa.map_(pa.string(), pa.float32()), pa.uint64()]
    for name, cells, kind in zip("slmu", columns, kinds, strict=True):
        table = table.append_column(name, pa.chunked_array(cells if name == "s" else [pa.array(cells, kind)], kind))
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    without_map = table.drop_columns("m")  # a type that `datasets` does not know
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset(without_map))
    rows = read(tmp_path / "a.parquet") if comes_from == "a file" else list(load_records("somebody/data"))
    for number, row in zip(numbers, rows, strict=True):
        short = float(str(np.float32(number)))
        expected = {"e": number, "f": short, "s": {"e": number, "f": short}, "l": [[short]], "u": 2**64 - 1}
        assert row == expected | ({"m": [["k", short]]} if comes_from == "a file" else {})


def test_a_key_that_comes_late_or_changes_its_kind(tmp_path):
    """Behind the first batch, in a second file, inside a message."""
    rows = [{"messages": [{"role": "user"}], "n": "a"} for _ in range(2500)]
    rows += [{"messages": [{"role": "user", "weight": 0}], "n": 7, "late": "x"}]
    for name, part in (("a.jsonl", rows), ("b.jsonl", [{"later": {"z": [1]}}])):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in part))
    names = ("messages", "n", "late", "later")
    assert read(tmp_path) == [{name: row.get(name) for name in names} for row in [*rows, {"later": {"z": [1]}}]]


def test_parquet_is_read_as_text_and_plain_values(tmp_path):
    rows = {
        "t": [b"a"],
        "d": [datetime.date(2021, 3, 1)],
        "n": [2**53 + 1],
        "f": [float("nan")],
        "m": [[{"role": "u"}]],
    }
    pa.parquet.write_table(pa.table(rows), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [
        {"t": "a", "d": "2021-03-01", "n": 2**53 + 1, "f": None, "m": [{"role": "u"}]}
    ]


@pytest.mark.parametrize("comes_from", ["a file", "the hub"])
def test_a_class_number_is_read_as_the_class_name(tmp_path, monkeypatch, comes_from):
    """`datasets` writes a class as a number, and its names into the table's description; −1 is a class not known."""
    kinds = {"t": datasets.Value("string"), "c": datasets.ClassLabel(names=["no", "yes"]), "n": datasets.Value("int64")}
    made = datasets.Dataset.from_dict(
        {"t": ["a", "b", "c"], "c": [1, 0, -1], "n": [1, 0, -1]}, datasets.Features(kinds)
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: made)
    made.to_parquet(tmp_path / "a.parquet")
    rows = read(tmp_path / "a.parquet") if comes_from == "a file" else list(load_records("somebody/data"))
    assert rows == [{"t": "a", "c": "yes", "n": 1}, {"t": "b", "c": "no", "n": 0}, {"t": "c", "c": None, "n": -1}]
    written = made.data.table.set_column(1, "c", pa.array(["yes", "no", "?"]))  # its description still has the names
    pa.parquet.write_table(written.replace_schema_metadata(made.data.schema.metadata), tmp_path / "b.parquet")
    assert [row["c"] for row in read(tmp_path / "b.parquet")] == ["yes", "no", "?"]


def test_names_of_classes_are_read_where_the_column_still_is_and_are_announced(tmp_path, capsys):
    """pyarrow's select, rename, drop and set_column keep the description of the table that they were given."""
    stars = [f"{number} stars" for number in range(1, 8)]
    kinds = datasets.Features({"t": datasets.Value("string"), "label": datasets.ClassLabel(names=stars)})
    datasets.Dataset.from_dict({"t": ["a", "b"], "label": [0, 4]}, kinds).to_parquet(tmp_path / "whole.parquet")
    whole = pa.parquet.read_table(tmp_path / "whole.parquet")
    cases = {
        "whole": (whole, [{"t": "a", "label": "1 stars"}, {"t": "b", "label": "5 stars"}]),
        "dropped": (whole.select(["t"]), [{"t": "a"}, {"t": "b"}]),
        "renamed": (whole.rename_columns(["t", "y"]), [{"t": "a", "y": 0}, {"t": "b", "y": 4}]),
        "text": (
            whole.set_column(1, "label", pa.array(["x", "y"])),
            [{"t": "a", "label": "x"}, {"t": "b", "label": "y"}],
        ),
        "other": (
            whole.set_column(1, "label", pa.array([1, 0])),
            [{"t": "a", "label": "2 stars"}, {"t": "b", "label": "1 stars"}],
        ),
    }
    for name, (table, rows) in cases.items():
        path = tmp_path / f"{name}.parquet"
        pa.parquet.write_table(table, path)
        for _ in range(2):  # the second time from the cache
            assert read(path) == rows
            said = capsys.readouterr().out
            assert (str(path) in said) == (name in ("whole", "other"))
            assert ("'label' are read as the names that are written" in said) == (name in ("whole", "other"))
            assert ("0 = 1 stars" in said) == ("5 stars, and 2 more" in said) == (name in ("whole", "other"))


@pytest.mark.parametrize("comes_from", ["a file", "the hub"])
def test_an_object_has_the_keys_that_it_was_written_with(tmp_path, monkeypatch, comes_from):
    """Arrow gives all objects of a column the keys of all, with nulls, which would be arguments of a tool call."""
    calls = [{"name": "weather", "arguments": {"city": "Paris"}}, {"name": "time", "arguments": {"zone": {"utc": 1}}}]
    rows = [{"messages": [{"role": "user"}, {"tool_calls": [{"function": call}]}], "n": 1} for call in calls]
    rows.append({"messages": None, "n": None})
    made = datasets.Dataset(pa.Table.from_pylist(rows))
    assert made[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"city": "Paris", "zone": None}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: made)
    made.to_parquet(tmp_path / "a.parquet")
    found = read(tmp_path / "a.parquet") if comes_from == "a file" else list(load_records("somebody/data"))
    assert found == rows
    mixed = datasets.Features({"messages": datasets.List({"calls": datasets.Json()}), "more": datasets.Json()})
    rows = [{"messages": [{"calls": {"x": 0.7}}, {"calls": "text"}], "more": [{"y": "0"}, None]}]
    made = datasets.Dataset.from_list(rows, features=mixed)
    made.to_parquet(tmp_path / "a.parquet")
    found = read(tmp_path / "a.parquet") if comes_from == "a file" else list(load_records("somebody/data"))
    assert found == rows
    (tmp_path / "a.jsonl").write_text('{"arguments": {"city": null}}')  # written so by somebody
    assert read(tmp_path / "a.jsonl") == [{"arguments": {"city": None}}]


GOOD = '{"a": "b"}\n'


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", GOOD * 3000 + '{"a": "b",}\n', "line 3001: no JSON at character"),
        ("a.jsonl", GOOD + "\n" + '{"a": NaN}\n', "line 3: NaN is no value of JSON"),
        ("a.jsonl", GOOD.strip() + ",\n" + GOOD, "line 1: no JSON at character 11: Extra data"),
        ("a.jsonl", GOOD + '{"a": "b', "line 2: no JSON"),
        ("a.jsonl", GOOD + "null\n", "line 2: null is no object"),
        ("a.jsonl", '"x"\n', "line 1: x is no object"),
        ("a.jsonl", '[{"role": "user"}]\n', 'line 1: [{"role": "user"}] is no object'),
        ("a.jsonl", GOOD + '{"a": 1, "a": 2}\n', "line 2: the key 'a' comes twice"),
        ("a.jsonl", GOOD + '{"a": "\\ud83d"}\n', r"line 2: \ud83d is half of a character"),
        ("a.jsonl", GOOD.encode() + b'{"a": "caf\xe9"}\n', "line 2: byte 0xe9 at character 11 is no utf-8"),
        ("a.jsonl", " \n\n", "it holds no row"),
        ("a.json", "[\n" + GOOD + ",\n" + '{"a": }\n]', "line 4: no JSON"),
        ("a.json", '[\n{"a": "b"},\n]', "line 3: a comma before the list's end"),
        ("a.json", '[\n{"a": "b"}\n', "line 3: the list of objects ends"),
        ("a.json", '[\n{"a": 1}\n] x', "line 3: there is more behind the list of objects"),
        ("a.jsonl", "[" * 10**5, "line 1: nested too deeply"),
        ("a.jsonl.gz", GOOD, "Not a gzipped file"),
        ("a.csv", "a,b\n1,2\n1,2,3\n", "line 3: 3 columns, where the first line has 2"),
        ("a.csv", 'a,b\n1,2\n"1,2\n', "line 3: not as csv: unexpected end of data"),
        ("a.csv", b"a,b\n1,\xff\n", "line 2: byte 0xff at character 3"),
        ("a.csv", "a,a\n1,2\n", "line 1: the column 'a' comes twice"),
        ("a.tsv", 'a\tb\n"1\t2\n3\n"4\t5\n', "line 3: 1 columns, where the first line has 2"),
        ("a.parquet", "PAR1", "cannot read"),
    ],
)
def test_an_error_names_file_and_line(name, content, expected, tmp_path):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        read(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert expected in str(caught.value)


def test_a_damaged_gzip_is_refused_in_one_line(tmp_path):
    """Each byte in turn is turned over: some leave the text whole, such as the time of writing."""
    draw, path, kinds = random.Random(0), tmp_path / "a.jsonl.gz", set()
    text = "".join(json.dumps({"a": "".join(draw.choices("abcdefgh ", k=9))}) + "\n" for _ in range(30))
    whole = gzip.compress(text.encode())
    for place in range(len(whole)):
        damaged = bytes(byte ^ 0xFF if at == place else byte for at, byte in enumerate(whole))
        try:
            expected = gzip.decompress(damaged).decode()
        except Exception as error:
            kinds.add(type(error))
            path.write_bytes(damaged)
            with pytest.raises(UserError, match=re.escape(f"cannot read {path}")):
                list(numbered_lines(path))
        else:
            assert expected == text
    assert zlib.error in kinds


@pytest.mark.parametrize("header", [True, False])
def test_a_tsv_of_lines_is_text_and_one_of_a_spreadsheet_is_quoted(header, tmp_path):
    """GLUE's kind has quotation marks that nothing closes; as many rows come out as lines go in."""
    texts = ['"opens', 'closes"', '"both"', 'in "the" middle', "plain", '""', "a\rreturn"]
    lines = [f"{text}\t{i % 2}" for i, text in enumerate(texts)]
    pair = ['"opens\t0', 'closes"\t1', "plain\t0"]  # csv would read the first two as one row
    for name, part in (("lines", lines), ("pair", pair)):
        (tmp_path / f"{name}.tsv").write_text("\n".join((["s\tl"] if header else []) + part) + "\n")
    quoted = [["a\tb", "1"], ['say "x"', "0"], ["two\nlines", "1"]]
    with open(tmp_path / "quoted.tsv", "w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows(([["s", "l"]] if header else []) + quoted)
    names = ("s", "l") if header else ("0", "1")
    of_lines = {f"{name}.tsv": [line.split("\t") for line in part] for name, part in (("lines", lines), ("pair", pair))}
    for path, expected in (of_lines | {"quoted.tsv": quoted}).items():
        table = read_table(str(tmp_path / path), [names[0]], names[1])
        assert [[row[name] for name in names] for row in table] == expected


@pytest.mark.parametrize("seed", range(4))
def test_random_lines_with_quotation_marks_are_rows_or_the_odd_one_is_named(seed, tmp_path):
    """100 files each: marks that open, close, do both or stand inside; in every second file a line of another width."""
    draw, path, refused = random.Random(seed), tmp_path / "lines.tsv", 0
    forms = ['"{}', '{}"', '"{}"', '{} "{}" {}', '""{}', "{}", "{}", "{}", "{} ' {}"]
    for number in range(100):
        lines = []
        for _ in range(draw.randrange(4, 40)):
            form = draw.choice(forms)
            words = (
                " ".join(draw.choices(("a", "film", "né", "--", "it's"), k=draw.randrange(1, 4))) for _ in range(3)
            )
            lines.append([form.format(*words), draw.choice("01")])
        odd = draw.randrange(1, len(lines)) if number % 2 else None
        if odd is not None:
            lines[odd] = draw.choice(([*lines[odd], ""], [*lines[odd], "0"], [lines[odd][0].replace('"', "")]))
        end = draw.choice(("\n", "\r\n"))
        path.write_text(end.join("\t".join(line) for line in lines) + draw.choice(("", end)), newline="")
        if odd is None:
            assert [[row["0"], row["1"]] for row in read_table(str(path), ["0"], "1")] == lines
        else:
            with pytest.raises(UserError, match=rf"line {odd + 1}: \d columns, where the first line has 2"):
                read_table(str(path), ["0"], "1")
            refused += 1
    assert refused == 50


def test_a_folder_is_read_with_its_links_and_without_what_is_hidden(tmp_path):
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    hidden = (".ipynb_checkpoints/own-checkpoint.jsonl", "a/.own.jsonl", "__MACOSX/own.jsonl", "dataset_info.json")
    for file in (
        data / "own.jsonl",
        data / "a" / "__own.jsonl",
        elsewhere / ".v1" / "b.jsonl",
        *map(data.joinpath, hidden),
    ):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"from": str(file.relative_to(tmp_path))}) + "\n")
    (data / "linked").symlink_to(elsewhere / ".v1")  # a link may point to a hidden folder
    (data / "again").symlink_to(data / "a")
    (data / "a" / "circle").symlink_to(data)
    (data / ".gone").symlink_to(tmp_path / "nowhere")
    expected = ["data/a/__own.jsonl", "data/own.jsonl", "elsewhere/.v1/b.jsonl"]
    assert sorted(row["from"] for row in read(data)) == expected
    (data / "more").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="data/more: a link to nothing"):
        read(data)


def test_every_file_of_a_folder_is_read_or_named_or_describes_the_data(tmp_path):
    parts = ("part-1.jsonl", "part-2.jsonl.gz", "a/part-1.jsonl")
    others = ("a/part-3.jsonl.zst", "part-4.ndjson", "part-5.jsonl.bz2", "part-6.arrow", "part-7", "readmes.txt")
    for name in (*parts, *others, "README.md", "LICENSE", "about.txt", "dataset_infos.json", ".gitattributes"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    found = [[str(file.relative_to(tmp_path)) for file in files] for files in files_of_split(tmp_path, "train")]
    assert list(map(set, found)) == [set(parts), set(others)]


@pytest.mark.parametrize("other", ["train.jsonl.gz", "train.JSON", "train.json"])
def test_one_file_in_two_forms_is_refused(other, tmp_path):
    for name in ("train.jsonl", other, "test.jsonl"):
        (tmp_path / name).write_text('{"a": 1}')
    with pytest.raises(UserError, match=r"train\..* may hold the same examples: name one"):
        read(tmp_path)
    assert list(load_records(str(tmp_path), "test")) == [{"a": 1}]


@pytest.mark.parametrize("made", [datasets.Dataset, datasets.DatasetDict])
def test_a_folder_that_save_to_disk_wrote_is_refused(made, tmp_path):
    rows = datasets.Dataset.from_dict({"a": [1]})
    (datasets.DatasetDict({"train": rows}) if made is datasets.DatasetDict else rows).save_to_disk(tmp_path)
    with pytest.raises(UserError, match="was written by save_to_disk: write it by to_parquet"):
        read(tmp_path)


def test_a_table_that_nobody_reads_leaves_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "a.jsonl"
    for content in (1, 2, 3, 2):
        path.write_text(json.dumps({"a": content}))
        read(path)
    folders = sorted((tmp_path / "cache" / "tables").iterdir(), key=lambda folder: folder.stat().st_mtime)
    for folder in folders[:-1]:
        os.utime(folder, (0, 0))
    path.write_text('{"a": 4}')
    read(path)
    left = set((tmp_path / "cache" / "tables").iterdir())
    assert len(left) == 2
    assert folders[-1] in left


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter; those of pytest are closed to others."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.skipif(os.getuid() != 0, reason="needs a second user")
def test_another_user_reads_a_table_that_is_there_and_makes_one_that_he_cannot_read(open_folder):
    """Two users of one cache: in a folder that the second user may not write, then in one that he may."""
    folder, tables = open_folder, open_folder / "cache" / "tables"
    (folder / "a.jsonl").write_text('{"a": 1}\n')
    code = f"""if True:
        import os, sys, datasets
        from common import cli, tables
        datasets.config.HF_DATASETS_CACHE = {str(folder / "of root")!r}
        list(tables.load_records("a.jsonl"))  # imports what the second user may not read
        datasets.config.HF_DATASETS_CACHE = {str(folder / "cache")!r}
        os.umask(0o022)
        os.setuid(int(sys.argv[1]))
        cli.run_script(lambda _: print(list(tables.load_records("a.jsonl"))))"""

    def run_as(user: int) -> tuple[int, str]:
        command, env = [sys.executable, "-c", code, str(user)], {**os.environ, "PYTHONPATH": str(ROOT)}
        ended = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
        return ended.returncode, ended.stdout + ended.stderr

    assert run_as(0) == (0, "[{'a': 1}]\n")
    (table,) = tables.rglob("rows.arrow")
    assert table.stat().st_mode & 0o777 == 0o644
    assert run_as(65534) == (0, "[{'a': 1}]\n")
    table.chmod(0o600)
    status, said = run_as(65534)
    assert status == 2
    assert f"error: cannot keep a.jsonl in {table.parent}" in said
    assert "set HF_DATASETS_CACHE" in said
    table.parent.chmod(0o777)
    assert run_as(65534) == (0, "[{'a': 1}]\n")
    assert table.stat().st_uid == 65534


def random_value(draw: random.Random, depth: int = 0):
    kinds = ["text", "text", "int", "none", "bool", *(["list", "dict"] if depth < 3 else [])]
    match draw.choice(kinds):
        case "text":
            return "".join(draw.choice('ab "\\\n\t,\u2028é漢😀{}[]') for _ in range(draw.randrange(8)))
        case "int":
            return draw.randrange(-(2**62), 2**62)
        case "none":
            return None
        case "bool":
            return draw.random() < 0.5
        case "list":
            return [random_value(draw, depth + 1) for _ in range(draw.randrange(3))]
    return {draw.choice("abcdé"): random_value(draw, depth + 1) for _ in range(draw.randrange(4))}


def fuzz(folder, count: int, seed: int = 0) -> tuple[int, int]:
    """Random rows come back as json has them; the same bytes cut and flipped come back or are refused in one line."""
    draw, path, refused = random.Random(seed), folder / "a.jsonl", 0
    for _ in range(count):
        rows = [{draw.choice("abcdé"): random_value(draw) for _ in range(1 + draw.randrange(3))} for _ in range(draw.randrange(1, 4))]  # fmt: skip  # noqa: E501
        ascii_only = draw.random() < 0.5
        data = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows).encode()
        path.write_bytes(data)
        shutil.rmtree(folder / "cache", ignore_errors=True)
        for row, found in zip(rows, read(path), strict=True):
            assert {name: cell for name, cell in found.items() if cell is not None} == {
                name: cell for name, cell in row.items() if cell is not None
            }
        damaged = bytearray(data[: draw.randrange(1, len(data) + 1)])
        for _ in range(draw.randrange(3)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            rows = read(path)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
            continue
        known = damaged.removeprefix(codecs.BOM_UTF8).decode(json.detect_encoding(bytes(damaged[:4])))
        assert len(rows) <= known.count("\n") + 1
    return count, refused


INPUTS = int(os.environ.get("FUZZ_INPUTS", 300))  # 100,000 take an hour


def test_whatever_the_bytes_are(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    count, refused = fuzz(tmp_path, INPUTS // 2)
    assert 0 < refused < count


WRITTEN = ("instruction", "output", "input", "context", "system", "history", "messages", "conversations", "prompt")
WRITTEN += ("completion", "tools", "weight", "label", "chosen", "images", "topic")


class Records(list):
    """Rows, with the names of their columns as a data set has them."""

    @property
    def column_names(self):
        return list(self[0])


def random_cell(draw: random.Random, texts: list[str], depth: int = 0):
    def text():
        texts.append(f"t{len(texts)}t")
        return texts[-1]

    def message():
        keys = [("role", "content"), ("from", "value"), ("role", "content", "thinking"), ("role", "weight", "content")]
        cells = {"role": draw.choice(["user", "assistant", "system", "tool", "gpt", "x"])}
        cells |= {"from": draw.choice(["human", "gpt"]), "weight": draw.choice([0, 1, 2, "", None])}
        return {key: cells[key] if key in cells else random_cell(draw, texts, 2) for key in draw.choice(keys)}

    kinds = [text, text, text, lambda: draw.choice([None, "", " ", 0, 1, 0.5, True, False, [], {}])]
    if depth < 2:
        kinds += [lambda: [message() for _ in range(draw.randrange(1, 5))]] * 2
        kinds += [lambda: [[text(), text()]], lambda: json.dumps([message()]), lambda: {text(): text()}]
        kinds += [
            lambda: [
                {"role": r, "content": text()}
                for r in ("system",) * draw.randrange(2) + ("user", "assistant") * draw.randrange(1, 3)
            ]
        ] * 3
    elif draw.random() < 0.2:
        return [{"type": "text", "text": text()}]
    return draw.choice(kinds)()


def test_whatever_a_record_is_no_known_key_is_lost():
    """Each text under a known name is in the conversation, or its column or key is announced, or all is refused."""
    draw, read_whole, refused = random.Random(0), 0, 0
    for _ in range(INPUTS):
        texts, record = [], {}
        names = draw.choice([("instruction", "output"), ("messages",), ("conversations",), ("prompt", "completion")])
        for name in (*names, *draw.sample(WRITTEN, draw.randrange(3))):
            record[name] = random_cell(draw, texts)
        try:
            format = Format.of(Records([record]), ["instruction", "output"], "x")
            conversation = format.read(record, 1)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
            continue
        if conversation is None:
            continue
        read_whole += 1
        found = json.dumps([conversation.messages, conversation.tools])
        announced = {name.partition(" ")[2] for name in conversation.unused}
        for name, cell in record.items():
            if name not in announced:
                assert all(text in found for text in texts if text in json.dumps(cell)), record
    assert min(read_whole, refused) > INPUTS // 20
