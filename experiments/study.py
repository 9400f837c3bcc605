"""The runner of a study: cells that are run once and kept as rows, by workers in parallel.

A study is a list of jobs, each a list of cells: hashable dataclasses of what differs from one run to the next. A row of
the results file is a JSON object of a cell's fields and of what came out, on one line. A cell with a row is not run
again, so that a study that was killed goes on where it was.
"""

import fcntl
import functools
import json
import multiprocessing
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any

from common import intervals

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """The rows of `path`; a last line that a kill cut short is no row."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def mend_rows(path: Path) -> None:
    """Takes a line that a kill cut short off the end of `path`."""
    if path.exists():
        with path.open("rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


def append_row(path: Path, row: Row) -> None:
    """One line in one write, under a lock: processes never mix their lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())


def run_missing(
    jobs: list[list[Hashable]],
    path: Path,
    processes: int,
    run: Callable[[Any], Row],
    prepare: Callable[[], None],
    cell_of: Callable[[Row], Hashable],
    describe: Callable[[Row], str],
) -> None:
    """Runs the cells that `path` lacks, job by job, and appends each one's row as it comes.

    Args:
        processes: how many jobs at a time, each in a process of its own; 1: all in this one.
        run: gives a cell's row. prepare: what each process does first. Both are functions of a module.
        cell_of: the cell of a row. describe: a row in a few words, for the terminal.
    """
    mend_rows(path)
    seen = {cell_of(row) for row in read_rows(path)}
    left = []
    for job in jobs:
        left.append([cell for cell in dict.fromkeys(job) if cell not in seen])
        seen.update(job)
    left = [job for job in left if job]
    count = sum(map(len, left))
    print(f"{count} runs to do, {processes} at a time; {len(seen) - count} rows in {path}", flush=True)
    work, started, done = functools.partial(_run_job, path, run, describe), time.monotonic(), 0
    if processes == 1 or not left:
        prepare()
        for job in left:
            work(job)
        return
    with multiprocessing.get_context("spawn").Pool(processes, prepare) as pool:
        for number in pool.imap_unordered(work, left):
            done += number
            minutes = (time.monotonic() - started) / done * (count - done) / 60
            print(f"{done}/{count}; {minutes:.0f} min left", flush=True)


def _run_job(path: Path, run: Callable[[Any], Row], describe: Callable[[Row], str], job: list[Hashable]) -> int:
    for cell in job:
        row = run(cell)
        append_row(path, row)
        print(describe(row), flush=True)
    return len(job)


def paired_difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> str:
    """Mean of the differences seed by seed with its 95 % interval by Student's t; a star where it excludes 0."""
    differences = list(intervals.by_seed(ours, theirs).values())
    if len(differences) < 2:
        return "not run"
    mean, half = intervals.paired_interval(differences)
    return intervals.difference(differences, 1) + ("*" if abs(mean) > half else "")


def filled_page(template: Path, parts: Mapping[str, str]) -> str:
    """The page's text with each part in the place of its {name}."""
    text = template.read_text()
    for name, part in parts.items():
        text = text.replace("{" + name + "}", part)
    return text
