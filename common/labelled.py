"""Labelled texts: what a classifier is trained, selected and scored on, checked row by row."""

import json
import math
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from common.cli import UserError

if TYPE_CHECKING:
    import datasets


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
    """What a run reads: the state is selected on `validation`; `tests` are scored once, at the end, by name."""

    train: Split
    validation: Split
    tests: dict[str, Split]
    class_names: list[str]  # empty: a number is predicted
    metrics: tuple[str, ...]

    @property
    def is_regression(self) -> bool:
        return not self.class_names

    @property
    def num_outputs(self) -> int:
        """Columns of the logits, D."""
        return len(self.class_names) or 1


def demo_data(max_examples: int | None = None) -> Data:
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
    if max_examples is not None:
        train = train.select(list(range(min(max_examples, len(train)))))
    return Data(train, read("validation"), tests, names, ("accuracy",))


def classes_of(labels: list[Any], source: str, label_field: str) -> list[str]:
    """The names of the classes, numbers in their order.

    Raises:
        UserError: labels are numbers to predict, or of fewer than two classes.
    """
    if any(map(_is_fraction, labels)):
        raise UserError(f"{source} has numbers in {label_field!r}, not classes: --task stsb learns to predict them")
    names = sorted({str(label) for label in labels if label not in (None, "")}, key=_natural)
    if len(names) < 2:
        raise UserError(f"{source} has {len(names)} class in {label_field!r}: classification needs two or more")
    return names


def _is_fraction(label: Any) -> bool:
    try:
        return math.isfinite(float(label)) and float(label) % 1 != 0
    except (TypeError, ValueError):
        return False


def _natural(name: str) -> tuple[int, int | str]:
    return (0, int(name)) if name.isdecimal() else (1, name)


def to_split(
    records: "datasets.Dataset", fields: list[str], label_field: str, class_names: list[str] | None, source: str
) -> Split:
    """Checks every row.

    Args:
        fields: of the texts, one or two. class_names: None: labels are numbers to predict. source: for the message.

    Raises:
        UserError: an empty text, a label that is none.
    """
    if len(records) == 0:
        raise UserError(f"{source} holds no example")
    columns = [records[name] for name in fields]
    texts, labels = list(zip(*columns, strict=True)), []
    for number, (row, label) in enumerate(zip(texts, records[label_field], strict=True), 1):
        for name, text in zip(fields, row, strict=True):
            # One text of two may be empty: QQP has such questions.
            if not isinstance(text, str) or not any(map(str.strip, row)):
                raise UserError(f"{source}, example {number}: {name!r} is empty or no text: {text!r}")
        if class_names is None:
            try:
                labels.append(float(label))
                if not math.isfinite(labels[-1]):
                    raise ValueError
            except (TypeError, ValueError) as error:
                raise UserError(f"{source}, example {number}: {label_field!r} is no number: {label!r}") from error
        elif str(label) in class_names:
            labels.append(class_names.index(str(label)))
        else:
            raise UserError(
                f"{source}, example {number}: label {label!r} is none of the training classes {', '.join(class_names)}"
            )
    return Split(texts, labels)


def set_aside(split: Split, source: str) -> tuple[Split, Split]:
    """A fixed random tenth, at most 2,000 examples, taken out: what is left, and the tenth."""
    rows = list(range(len(split)))
    random.Random(0).shuffle(rows)
    count = min(max(len(rows) // 10, 1), 2000)
    if len(rows) <= count:
        raise UserError(f"{source} has {len(rows)} example: too few to set some aside")
    return split.select(sorted(rows[count:])), split.select(sorted(rows[:count]))
