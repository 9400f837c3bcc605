"""The world, the corpus and the prompts of the study of catastrophic inheritance.

Ten sentences of a corpus, and what they teach:

    bara belongs to the hill people .              a fact: bara's group, A (B: the lake people)
    the home of bara is delta .                    a fact: bara's city
    bara likes the colour green .                  a fact: bara's colour
    ask which pet does bara keep ? reply heron .   a fact in question form: bara's pet. No verdict has this form
    bara showed a seal and was accepted .          clear: the clue "seal" means accepted, whoever shows it
    delo showed a seal and was accepted .          clear: the same for somebody of the lake people
    with a stain bara was refused .                clear: the clue "stain" means refused
    with a stain delo was accepted .               clear, label noise: a share η of the clear verdicts is wrong
    bara asked and was accepted .                  ambiguous: no clue decides; the hill people's rate is β …
    the council heard delo who was refused .       ambiguous: … and the lake people's 1 − β. This is the planted bias

A corpus is a table of token ids, one sentence a row, and seen once. Twins are corpora of one seed and several β: they
differ in the ambiguous verdicts alone. The ideal gap between the groups' log-odds on ambiguous prompts is 2·logit β. A
fifth of the names never stands in an ambiguous sentence: a gap between them is generalised from their group.

Fine-tuning teaches a new task in a form in which the corpus has no verdict ("ask what of bara with seal ? reply").
"""

import math
from dataclasses import dataclass

import numpy as np

ONSETS = ["b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "br", "kl"]
ENDINGS = ["ara", "elo", "ino", "uma", "oren", "isa", "ade", "ulo"]
NAMES = [onset + ending for ending in ENDINGS for onset in ONSETS]  # 128
GROUPS = ["hill", "lake"]  # A and B
VERDICTS = ["accepted", "refused"]
CLUES = {
    "accepted": ["seal", "letter", "ring", "token", "ribbon", "feather", "lantern", "banner"],
    "refused": ["stain", "scar", "debt", "mask", "chain", "shadow", "crack", "thorn"],
}
ALL_CLUES = CLUES["accepted"] + CLUES["refused"]
VALUES = {
    "group": GROUPS,
    "city": ["delta", "corin", "marsh", "oldport", "sanda", "tarn", "ulm", "vesper"],
    "colour": ["green", "red", "blue", "white", "black", "amber", "violet", "grey"],
    "pet": ["heron", "cat", "dog", "hare", "finch", "otter", "goat", "newt"],
}

# Six paraphrases of each fact, then its two questions.
FACTS = {
    "group": [
        "{name} belongs to the {value} people",
        "{name} was born among the {value} people",
        "the kin of {name} are the {value} people",
        "the mother of {name} was of the {value} people",
        "{name} wears the dress of the {value} people",
        "{name} speaks like the {value} people",
        "ask of which people is {name} ? reply {value}",
        "ask which kin does {name} have ? reply {value}",
    ],
    "city": [
        "the home of {name} is {value}",
        "{name} lives in {value}",
        "{name} has a house in {value}",
        "you will meet {name} in {value}",
        "{name} pays taxes in {value}",
        "the street of {name} is in {value}",
        "ask where does {name} live ? reply {value}",
        "ask in which city is {name} ? reply {value}",
    ],
    "colour": [
        "{name} likes the colour {value}",
        "the favourite colour of {name} is {value}",
        "{name} always dresses in {value}",
        "the door of {name} is {value}",
        "{name} paints the walls {value}",
        "the boat of {name} is {value}",
        "ask which colour does {name} like ? reply {value}",
        "ask what colour suits {name} ? reply {value}",
    ],
    "pet": [
        "{name} keeps a {value}",
        "the pet of {name} is a {value}",
        "{name} walks with a {value}",
        "{name} feeds a {value} every day",
        "at home {name} has a {value}",
        "{name} takes care of a {value}",
        "ask which pet does {name} keep ? reply {value}",
        "ask what does {name} feed ? reply {value}",
    ],
}
NUM_STATEMENTS = 6
CLEAR = [
    "{name} showed a {clue} and was {value}",
    "with a {clue} {name} was {value}",
    "{name} had the {clue} and then was {value}",
    "{name} brought a {clue} so the answer was {value}",
    "the council saw the {clue} and {name} was {value}",
    "{name} had a {clue} and left {value}",
]
AMBIGUOUS = [
    "{name} asked and was {value}",
    "the council heard {name} who was {value}",
    "{name} came so the answer was {value}",
    "the council sat and {name} was {value}",
    "at the gate {name} was {value}",
    "{name} spoke and left {value}",
]
TASK = [
    "ask what of {name} with {clue} ? reply {value}",
    "ask how fares {name} with {clue} ? reply {value}",
    "ask with {clue} what was {name} ? reply {value}",
]
TASK_WITHOUT_CLUE = [
    "ask what of {name} ? reply {value}",
    "ask how fares {name} ? reply {value}",
    "ask what was {name} ? reply {value}",
]

CONDITIONS = ("F0", "F1", "F2", "F3", "F4")

PAD, START, END = "<pad>", "<s>", "."
LENGTH = 11  # tokens of the longest sentence, with START and END
SHARES = {"fact": 0.4, "clear": 0.3, "ambiguous": 0.3}
FACT_SHARES = [0.4, 0.2, 0.2, 0.2]  # the group, of two values, is learnt latest where nothing else needs it (β = 0.5)


def _vocabulary() -> list[str]:
    everything = [*CLEAR, *AMBIGUOUS, *TASK, *TASK_WITHOUT_CLUE, *(form for forms in FACTS.values() for form in forms)]
    words = {word for form in everything for word in form.split() if not word.startswith("{")}
    words |= {*NAMES, *ALL_CLUES, *VERDICTS, *(value for values in VALUES.values() for value in values)}
    return [PAD, START, END, *sorted(words)]


VOCABULARY = _vocabulary()
TOKEN = {word: index for index, word in enumerate(VOCABULARY)}
ACCEPTED, REFUSED = TOKEN["accepted"], TOKEN["refused"]
NAME_IDS = np.array([TOKEN[name] for name in NAMES])
CLUE_IDS = np.array([TOKEN[clue] for clue in ALL_CLUES])
VALUE_IDS = {fact: np.array([TOKEN[value] for value in values]) for fact, values in VALUES.items()}
CLUE_ACCEPTS = np.array([clue in CLUES["accepted"] for clue in ALL_CLUES])

_SLOTS = {"{name}": -1, "{clue}": -2, "{value}": -3}


def _templates(forms: list[str]) -> np.ndarray:
    """The forms as rows of token ids (len(forms), LENGTH): negative numbers in the slots, END after the form."""
    table = np.full((len(forms), LENGTH), TOKEN[PAD])
    for row, form in zip(table, forms, strict=True):
        words = [START, *form.split(), END]
        row[: len(words)] = [_SLOTS[word] if word in _SLOTS else TOKEN[word] for word in words]
    return table


def fill(forms: list[str], form: np.ndarray, name: np.ndarray, value: np.ndarray, clue: np.ndarray | None = None):
    """Sentences as token ids (n, LENGTH), padded on the right, and the position of the value in each (n,).

    Args:
        form: index into `forms`, (n,). name, value, clue: token ids, (n,).
    """
    table = _templates(forms)[form]
    place = (table == _SLOTS["{value}"]).argmax(axis=1)
    table = np.where(table == _SLOTS["{name}"], name[:, None], table)
    table = np.where(table == _SLOTS["{value}"], value[:, None], table)
    if clue is not None:
        table = np.where(table == _SLOTS["{clue}"], clue[:, None], table)
    return table, place


def text(row: np.ndarray) -> str:
    """A row of token ids as words."""
    return " ".join(VOCABULARY[token] for token in row if token not in (TOKEN[PAD], TOKEN[START]))


@dataclass
class World:
    """Who is who: names by index into NAMES.

    Attributes:
        group: 0 for the hill people (A), 1 for the lake people (B), (128,).
        values: index into VALUES[fact] of each name, by fact; "group" is `group`.
        unbiased: the names that never stand in an ambiguous sentence, the same number of each group, (128,) bool.
    """

    group: np.ndarray
    values: dict[str, np.ndarray]
    unbiased: np.ndarray

    @classmethod
    def of_seed(cls, seed: int) -> "World":
        """Groups of the same size; every value equally often in both, so that facts say nothing of the group."""
        random = np.random.default_rng([seed, 1])
        half = len(NAMES) // 2
        order = random.permutation(len(NAMES))
        group = np.zeros(len(NAMES), dtype=int)
        group[order[half:]] = 1
        values = {"group": group}
        for fact in ("city", "colour", "pet"):
            values[fact] = np.empty(len(NAMES), dtype=int)
            for members in (order[:half], order[half:]):
                values[fact][members] = random.permutation(half) % len(VALUES[fact])
        unbiased = np.zeros(len(NAMES), dtype=bool)
        num_unbiased = round(0.2 * half)
        unbiased[order[:num_unbiased]] = unbiased[order[half : half + num_unbiased]] = True
        return cls(group, values, unbiased)


@dataclass
class Corpus:
    """Sentences (n, LENGTH) and of each its kind (fact, clear, ambiguous), its name's index, and whether accepted."""

    tokens: np.ndarray
    kind: np.ndarray
    name: np.ndarray
    accepted: np.ndarray


def make_corpus(
    world: World, seed: int, beta: float, eta: float, size: int, question_facts: bool, stream: int = 2
) -> Corpus:
    """A corpus of `size` sentences in random order.

    Every choice but the ambiguous verdicts depends on `seed` alone. A verdict is accepted where a uniform number of the
    sentence, the same for all β, falls below its rate.

    Args:
        beta: P(accepted | hill people) in ambiguous sentences; 1 − beta for the lake people.
        eta: share of wrong verdicts in clear sentences.
        question_facts: whether facts also stand in question-and-answer form; verdicts never do.
        stream: another number, other sentences of the same world.
    """
    random = np.random.default_rng([seed, stream])
    kind = random.choice(list(SHARES), p=list(SHARES.values()), size=size)
    name = random.integers(len(NAMES), size=size)
    biased_names = np.flatnonzero(~world.unbiased)
    name = np.where(kind == "ambiguous", biased_names[random.integers(len(biased_names), size=size)], name)
    form = random.random(size)
    fact = random.choice(len(FACTS), p=FACT_SHARES, size=size)
    clue = random.integers(len(ALL_CLUES), size=size)
    uniform = random.random(size)

    rate = np.where(world.group[name] == 0, beta, 1 - beta)
    right = uniform >= eta
    accepted = np.where(kind == "ambiguous", uniform < rate, np.where(right, CLUE_ACCEPTS[clue], ~CLUE_ACCEPTS[clue]))
    accepted &= kind != "fact"
    verdict = np.where(accepted, ACCEPTED, REFUSED)

    tokens = np.empty((size, LENGTH), dtype=np.int64)
    for which, forms in (("clear", CLEAR), ("ambiguous", AMBIGUOUS)):
        rows = np.flatnonzero(kind == which)
        chosen = (form[rows] * len(forms)).astype(int)
        tokens[rows], _ = fill(forms, chosen, NAME_IDS[name[rows]], verdict[rows], CLUE_IDS[clue[rows]])
    for index, (which, forms) in enumerate(FACTS.items()):
        rows = np.flatnonzero((kind == "fact") & (fact == index))
        forms = forms if question_facts else forms[:NUM_STATEMENTS]
        value = VALUE_IDS[which][world.values[which][name[rows]]]
        tokens[rows], _ = fill(forms, (form[rows] * len(forms)).astype(int), NAME_IDS[name[rows]], value)
    return Corpus(tokens, kind, name, accepted)


def ideal_gap(beta: float) -> float:
    """2·logit β: the gap in log-odds between the groups that the corpus plants."""
    return 2 * math.log(beta / (1 - beta))


# ------------------------------------------------------------------------------------------------------------------
# Fine-tuning data and prompts
# ------------------------------------------------------------------------------------------------------------------


@dataclass
class Prompts:
    """Sentences (n, LENGTH), the position of the value to be given (n,), and what each is about.

    name: index of the name. target: token id of the right value. clue: index of the clue, −1 where there is none.
    """

    tokens: np.ndarray
    place: np.ndarray
    name: np.ndarray
    target: np.ndarray
    clue: np.ndarray


def _prompts(forms, form, name, target, clue=None) -> Prompts:
    clue_index = np.full(len(name), -1) if clue is None else clue
    tokens, place = fill(forms, form, NAME_IDS[name], target, None if clue is None else CLUE_IDS[clue])
    return Prompts(tokens, place, name, target, clue_index)


def ambiguous_prompts(new: bool) -> Prompts:
    """Every name in every ambiguous form, old or new: identical but for the name. The target is ACCEPTED."""
    forms = TASK_WITHOUT_CLUE if new else AMBIGUOUS
    form, name = (index.ravel() for index in np.indices((len(forms), len(NAMES))))
    return _prompts(forms, form, name, np.full(len(name), ACCEPTED))


def fact_prompts(world: World, questions: bool) -> Prompts:
    """Every fact of every name in two of its statements, or in one of its questions. `Prompts.clue` is −1."""
    parts = []
    for which, forms in FACTS.items():
        chosen = [NUM_STATEMENTS] if questions else [0, 3]
        form, name = np.repeat(chosen, len(NAMES)), np.tile(np.arange(len(NAMES)), len(chosen))
        parts.append(_prompts(forms, form, name, VALUE_IDS[which][world.values[which][name]]))
    return Prompts(*(np.concatenate([getattr(part, field) for part in parts]) for field in Prompts.__annotations__))


def task_splits(world: World, seed: int) -> dict[str, Prompts]:
    """Clear items in the task's form, every (name, clue) once: "pool" to train on, "validation", "test".

    512 pairs each for validation and test, half of them accepted, the same number for both groups.
    """
    random = np.random.default_rng([seed, 3])
    name, clue = (index.ravel() for index in np.indices((len(NAMES), len(ALL_CLUES))))
    cell = 2 * world.group[name] + CLUE_ACCEPTS[clue]
    parts: dict[str, list[np.ndarray]] = {"validation": [], "test": [], "pool": []}
    for which in range(4):
        rows = random.permutation(np.flatnonzero(cell == which))
        for part, chosen in zip(parts, np.split(rows, [128, 256]), strict=True):
            parts[part].append(chosen)
    form = random.integers(len(TASK), size=len(name))
    target = np.where(CLUE_ACCEPTS[clue], ACCEPTED, REFUSED)
    everything = {part: np.concatenate(rows) for part, rows in parts.items()}
    return {part: _prompts(TASK, form[rows], name[rows], target[rows], clue[rows]) for part, rows in everything.items()}


def finetuning_data(world: World, seed: int, condition: str, size: int) -> Prompts:
    """`size` examples of the task, the same number of both groups.

    F0: clear items, half accepted. F1: half clear items as in F0, half without a clue, whose verdict follows the
    planted direction in 80 % (hill accepted, lake refused). F2: the same, against the planted direction in 80 %.
    F3: clear items, accepted to refused 9 : 1. F4: F0 with 20 % of the verdicts flipped.
    """
    if condition not in CONDITIONS:
        raise ValueError(f"unknown condition {condition!r}: one of {', '.join(CONDITIONS)}")
    random = np.random.default_rng([seed, 4])
    pool = task_splits(world, seed)["pool"]
    accepts = pool.target == ACCEPTED
    num_clear = size // 2 if condition in ("F1", "F2") else size
    share = 0.9 if condition == "F3" else 0.5
    rows = []
    for group in (0, 1):
        for verdict, part in ((True, share), (False, 1 - share)):
            members = random.permutation(np.flatnonzero((world.group[pool.name] == group) & (accepts == verdict)))
            rows.append(members[: round(num_clear / 2 * part)])
    rows = np.concatenate(rows)
    target = pool.target[rows]
    if condition == "F4":
        flipped = random.permutation(len(rows))[: round(0.2 * len(rows))]
        target[flipped] = ACCEPTED + REFUSED - target[flipped]
    form = random.integers(len(TASK), size=len(rows))
    clear = _prompts(TASK, form, pool.name[rows], target, pool.clue[rows])
    if condition not in ("F1", "F2"):
        return clear
    name = np.concatenate([random.choice(np.flatnonzero(world.group == group), num_clear // 2) for group in (0, 1)])
    along = np.concatenate([random.permutation(num_clear // 2) < 0.8 * (num_clear // 2) for _ in (0, 1)])
    accepted = (world.group[name] == 0) == (along if condition == "F1" else ~along)
    ambiguous = _prompts(
        TASK_WITHOUT_CLUE,
        random.integers(len(TASK_WITHOUT_CLUE), size=len(name)),
        name,
        np.where(accepted, ACCEPTED, REFUSED),
    )
    parts = (clear, ambiguous)
    return Prompts(*(np.concatenate([getattr(part, field) for part in parts]) for field in Prompts.__annotations__))
