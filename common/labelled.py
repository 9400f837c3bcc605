"""Labelled texts to train, select and score a classifier on, checked row by row."""

import hashlib
import json
import math
import random
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.cli import UserError
from common.tables import load_records, note_on_overlap, read_table, require_fields

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class Task:
    """A GLUE task: its texts' columns on the hub, its classes in the hub's order (none: a number is predicted), its
    metrics (the first selects the best state), and its evaluation splits."""

    fields: tuple[str, ...]
    classes: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    eval_splits: tuple[str, ...] = ("validation",)


TASKS = {
    "cola": Task(("sentence",), ("unacceptable", "acceptable"), ("matthews", "accuracy")),
    "sst2": Task(("sentence",), ("negative", "positive")),
    "mrpc": Task(("sentence1", "sentence2"), ("not_equivalent", "equivalent"), ("accuracy", "f1")),
    "qqp": Task(("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1")),
    "stsb": Task(("sentence1", "sentence2"), (), ("pearson", "spearman")),
    "mnli": Task(
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        eval_splits=("validation_matched", "validation_mismatched"),
    ),
    "qnli": Task(("question", "sentence"), ("entailment", "not_entailment")),
    "rte": Task(("sentence1", "sentence2"), ("entailment", "not_entailment")),
}


# What GLUE, R and pandas write where a label is not known.
NOT_KNOWN = ("-1", "na", "n/a", "<na>", "nan", "none", "null")


@dataclass
class Split:
    """Texts (each a tuple of one or two) and labels: class numbers, or numbers to predict.

    Attributes:
        examples: the texts as the model's inputs, once they are encoded.
    """

    texts: list[tuple[str, ...]]
    labels: list[int | float]
    examples: list[dict[str, list[int]]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, rows: list[int]) -> "Split":
        return Split([self.texts[row] for row in rows], [self.labels[row] for row in rows])


@dataclass
class Data:
    """A run's data: the state is selected on `validation`; nothing is selected on `tests`.

    Attributes:
        shift, unit: a number y to predict is (y − shift) / unit in `train` and `validation`, and y itself in `tests`.
        notes: lines for the user on labels that may have another meaning than it seems.
    """

    train: Split
    validation: Split
    tests: dict[str, Split]
    class_names: list[str]  # empty: a number is predicted
    metrics: tuple[str, ...]
    shift: float = 0.0
    unit: float = 1.0
    notes: list[str] = field(default_factory=list)

    @property
    def is_regression(self) -> bool:
        return not self.class_names

    @property
    def f1_class(self) -> str | None:
        """The class that the metric f1 is computed for: the second one; None without that metric."""
        return self.class_names[1] if "f1" in self.metrics else None

    @property
    def num_outputs(self) -> int:
        """Columns of the logits, D."""
        return len(self.class_names) or 1

    def standardize(self, *, centre: bool) -> None:
        """Gives the training labels mean 0 (with `centre`) and mean square 1, and the validation labels the scale."""
        labels = np.asarray(self.train.labels)
        self.shift = float(labels.mean()) if centre else 0.0
        self.unit = float(np.sqrt(np.mean((labels - self.shift) ** 2)))
        for split in (self.train, self.validation):
            split.labels = [(label - self.shift) / self.unit for label in split.labels]

    def in_units(self, values: np.ndarray) -> np.ndarray:
        """Predicted numbers, or standardized labels, in the units of the file; logits of classes as they are."""
        return values * self.unit + self.shift if self.is_regression else values

    def sizes(self, model: str) -> str:
        """For the first screen: the run's examples and classes, and notes on data that may not be as the user means."""
        tests = ", ".join(f"{name} {len(split)}" for name, split in self.tests.items())
        selected = f"{len(self.train)} examples to train on, {len(self.validation)} to select by"
        return "\n".join([f"{model}: {selected}; to test: {tests}", self.counts(), *self.notes])

    def counts(self) -> str:
        """How many training examples each class has, or the numbers' range."""
        if self.is_regression:
            labels = self.in_units(np.asarray(self.train.labels))
            return f"numbers from {labels.min():g} to {labels.max():g}, mean {labels.mean():g}"
        of_class = Counter(self.train.labels)
        return "classes: " + ", ".join(f"{name} {of_class[row]}" for row, name in enumerate(self.class_names))


def contents_of(data: Data) -> str:
    """A digest of the texts and labels that are trained and selected on."""
    rows = [(split.texts, split.labels) for split in (data.train, data.validation)]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def demo_data(limit: int | None = None) -> Data:
    """The embedded movie reviews, with their own validation split, and three other domains to test on."""
    from data import sentiment

    names = ["negative", "positive"]

    def read(split: str) -> Split:
        try:
            with open(sentiment.sentences(split), encoding="utf-8") as file:
                rows = [json.loads(line) for line in file]
        except (RuntimeError, OSError) as error:
            raise UserError(f"cannot make the demo's sentences: {error}") from error
        return Split([(row["sentence"],) for row in rows], [names.index(row["label"]) for row in rows])

    first, *others = sentiment.DOMAINS
    tests = {first: read("test")} | {domain: read(domain) for domain in others}
    train = read("train")
    if limit is not None:
        train = train.select(list(range(min(limit, len(train)))))
    return Data(train, read("validation"), tests, names, ("accuracy",))


def load_data(args: Any) -> Data:
    """Reads, checks and splits the data that the script's `args` name; sets `args.loss_weights`.

    Raises:
        UserError: a missing column, an empty text, a label that training does not know, fewer than two classes, a
            metric or class weights that do not fit.
    """
    data = demo_data(args.limit) if args.data == "demo" else _read_data(args)
    if args.metric is not None:
        fitting = ("pearson", "spearman") if data.is_regression else ("accuracy", "macro_f1", "matthews")
        if len(data.class_names) == 2:
            fitting += ("f1",)
        if args.metric not in fitting:
            raise UserError(f"--metric {args.metric} does not fit these labels: choose among {', '.join(fitting)}")
        data.metrics = tuple(dict.fromkeys((args.metric, *data.metrics)))
    if "f1" in data.metrics:
        data.notes.append(f"note: f1 is that of the class {data.f1_class!r}")
    if args.class_weights is not None:
        if data.is_regression:
            raise UserError("--class-weights needs classes, and here numbers are predicted: leave it out")
        counts = np.bincount(data.train.labels, minlength=data.num_outputs)
        args.loss_weights = (len(data.train) / (data.num_outputs * counts)).tolist()
    return data


def _read_data(args: Any) -> Data:
    task = TASKS.get(args.task)
    if args.data is None:
        source = f"nyu-mll/glue, {args.task}"
        records = {source: load_records("nyu-mll/glue", "train", name=args.task)}
        tests = {name: load_records("nyu-mll/glue", name, name=args.task) for name in task.eval_splits}
    else:
        source, tests = args.data, {}
        records = {source: read_table(source, args.fields, args.label)}
        if args.validation_data:
            records[args.validation_data] = read_table(args.validation_data, args.fields, args.label, "validation")
        for path in args.test_data:
            name = Path(path).stem if Path(path).stem not in tests else path
            tests[name] = read_table(path, args.fields, args.label, "test")
    for name, table in (*records.items(), *tests.items()):
        require_fields(table, [*args.fields, args.label], name, "name the columns with --fields and --label")
    training, notes = records[source], []
    if args.limit is not None:
        training = training.select(range(min(args.limit, len(training))))
        source += f", first {len(training)} examples"
    names: list[str] | None = None
    if task is None:
        names = classes_of(training[args.label], source, args.label)
        if all(column.isdigit() for column in (*args.fields, args.label)):
            _require_no_header(training[args.label], source)
        found = [name for name in names if name.casefold() in NOT_KNOWN]
        notes += [
            f"note: {name} is trained as a class here; files write it where a label is not known" for name in found
        ]
    elif task.classes:
        names = list(task.classes)

    def split(table: Any, name: str) -> Split:
        return to_split(table, args.fields, args.label, names, name, notes, numbered=task is not None)

    train = split(training, source)
    tests = {name: split(table, name) for name, table in tests.items()}
    if not tests:
        train, tests["held out"] = set_aside(train, source)
    if args.validation_data:
        validation = split(records[args.validation_data], args.validation_data)
    else:
        train, validation = set_aside(train, source)
    for number, name in enumerate(names or ()):
        if number not in train.labels:
            raise UserError(f"{source}: no training example of class {name!r} is left among {len(train)}: add some")
    for part, of in (("training", train), ("validation", validation)):
        if names is None and len(set(of.labels)) < 2:
            raise UserError(f"{source}: all {part} examples have the same number in {args.label!r}: add others")
    for name, table in records.items() if args.data else ():
        unused = [column for column in table.column_names if column not in (*args.fields, args.label)]
        unused = [column for column in unused if any(cell not in (None, "") for cell in table[column])]
        notes += [f"note: columns of {name} that are not used: {', '.join(unused)}"] if unused else []
    for name, held_out in (("validation", validation), *tests.items()):
        rows = (zip(part.texts, part.labels, strict=True) for part in (train, held_out))
        notes += filter(None, [note_on_overlap(*rows, name)])
    return Data(train, validation, tests, names or [], task.metrics if task else ("accuracy",), notes=notes)


def label_text(label: Any) -> str:
    """A label as a class's name: without spaces around it; the number 1.0 and the text "1.0" are class 1."""
    return re.sub(r"^(-?\d+)\.0+$", r"\1", str(label).strip())


def _require_one(label: Any, where: str) -> None:
    if isinstance(label, list | tuple | dict):
        raise UserError(f"{where} is a list: an example has one label here, not several")


def classes_of(labels: list[Any], source: str, label_field: str) -> list[str]:
    """The names of the classes, numbers in their order.

    Raises:
        UserError: labels are lists or numbers to predict, have fewer than two classes, or differ only in case, spaces
            or the form of their characters.
    """
    for number, label in enumerate(labels, 1):
        _require_one(label, f"{source}, example {number}: {label_field!r}")
    if any(map(_is_fraction, labels)):
        raise UserError(f"{source} has numbers in {label_field!r}, not classes: --task stsb learns to predict them")
    names = sorted({label_text(label) for label in labels if label is not None} - {""}, key=_natural)
    if len(names) < 2:
        raise UserError(f"{source} has {len(names)} class in {label_field!r}: classification needs two or more")
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(_looks(name), name)
        if other != name:
            what = "differ only in case, spaces or the form of their characters: write them alike"
            raise UserError(f"{source}: the labels {other!a} and {name!a} {what}")
    return names


def _looks(name: str) -> str:
    """The same text for labels that a reader takes for one: of another case, Unicode form or spacing, +1 and 01."""
    text = unicodedata.normalize("NFKC", name).casefold().replace("\u2212", "-")  # the minus of typesetting
    text = " ".join("".join(char for char in text if unicodedata.category(char) != "Cf").split())
    return str(int(text)) if re.fullmatch(r"[+-]?[0-9]+", text) else text


def _require_no_header(labels: list[Any], source: str) -> None:
    """Raises a UserError where the first line of a file without header has a label that no other line has."""
    first, *others = map(label_text, labels)
    if first not in others:
        remedy = "if it is a header, name the columns by it; if not, add an example of this class"
        raise UserError(f"{source}: the first line alone has the label {first!r}: {remedy}")


def _is_fraction(label: Any) -> bool:
    try:
        return math.isfinite(float(label)) and float(label) % 1 != 0
    except (TypeError, ValueError):
        return False


def _natural(name: str) -> tuple[int, int | str]:
    return (0, int(name)) if re.fullmatch(r"-?[0-9]+", name) else (1, name)


def to_split(
    records: "datasets.Dataset",
    fields: list[str],
    label_field: str,
    class_names: list[str] | None,
    source: str,
    notes: list[str] | None = None,
    *,
    numbered: bool = False,
) -> Split:
    """Checks every row.

    Args:
        fields: one or two columns of text. class_names: None: labels are numbers to predict. source: for the message.
        notes: gets a line on labels with spaces around them. numbered: a label may be its class's number too.

    Raises:
        UserError: an empty text, or not a label.
    """
    if len(records) == 0:
        raise UserError(f"{source} holds no example")
    numbers = {name: number for number, name in enumerate(class_names or ())}
    if numbered:
        numbers |= {str(number): number for number in range(len(numbers))}
    columns = [records[name] for name in fields]
    texts, labels, spaced = list(zip(*columns, strict=True)), [], 0
    for number, (row, label) in enumerate(zip(texts, records[label_field], strict=True), 1):
        where = f"{source}, example {number}"
        for name, text in zip(fields, row, strict=True):
            # One of two texts may be empty: QQP has such questions.
            if not isinstance(text, str) or not any(isinstance(one, str) and one.strip() for one in row):
                raise UserError(f"{where}: {name!r} is empty or no text: {text!r}")
        _require_one(label, f"{where}: {label_field!r}")
        if class_names is None:
            try:
                labels.append(float(label))
                if not math.isfinite(labels[-1]):
                    raise ValueError
            except (TypeError, ValueError) as error:
                raise UserError(f"{where}: {label_field!r} is no number: {label!r}") from error
        elif label_text(label) in numbers:
            labels.append(numbers[label_text(label)])
            spaced += isinstance(label, str) and label != label.strip()
        else:
            raise UserError(f"{where}: {_unknown(label, class_names)}")
    if spaced and notes is not None:
        notes.append(f"note: {spaced} labels of {source} have spaces around them, which are left out")
    return Split(texts, labels)


def _unknown(label: Any, class_names: list[str]) -> str:
    if label is None or not label_text(label):
        return "it has no label: fill it in, or leave the example out"
    text = f"label {label!r} is none of the training classes {', '.join(class_names)}"
    if label_text(label) == "-1":
        return f"{text}: it stands for a label that is not known, as in GLUE's test files; leave those examples out"
    alike = [name for name in class_names if _looks(name) == _looks(label_text(label))]
    return f"{text}: {alike[0]!r} is written otherwise" if alike else text


def set_aside(split: Split, source: str) -> tuple[Split, Split]:
    """Sets a fixed random tenth aside, at most 2,000 examples, stratified by class; returns the rest and the tenth."""
    rows = list(range(len(split)))
    random.Random(0).shuffle(rows)
    count = min(max(len(rows) // 10, 1), 2000)
    if len(rows) <= count:
        raise UserError(f"{source} has {len(rows)} example: too few to set some aside")
    if all(isinstance(label, int) for label in split.labels):
        sizes, taken, place = Counter(split.labels), Counter(), {}
        for row in rows:  # the first tenth of each class comes before the second tenth of any
            label = split.labels[row]
            place[row] = (taken[label] + 0.5) / sizes[label]
            taken[label] += 1
        rows.sort(key=place.__getitem__)
    return split.select(sorted(rows[count:])), split.select(sorted(rows[:count]))
