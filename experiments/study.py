"""What any study needs: cells that are run once and kept as rows, workers in parallel, and what is said of the scores.

A study is a list of cells, each a frozen dataclass of what differs from one run to the next. A row of the results file
is a JSON object of a cell's fields and of what came out, on one line; a cell whose row is there is not run again.
"""

import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from common.intervals import paired_interval

CellType = TypeVar("CellType")

# ------------------------------------------------------------------------------------------------------------------
# Runs
# ------------------------------------------------------------------------------------------------------------------


def read_results(path: Path, cell_type: type[CellType]) -> dict[CellType, dict[str, Any]]:
    """The rows by cell; a last line that was cut short is left out."""
    rows = {}
    if path.is_file():
        for line in path.read_text().splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            rows[cell_type(**{field.name: row[field.name] for field in fields(cell_type) if field.name in row})] = row
    return rows


def run_missing(
    cells: list[CellType],
    path: Path,
    processes: int,
    run: Callable[[CellType], dict[str, Any]],
    prepare: Callable[[], None],
    describe: Callable[[dict[str, Any]], str],
    title: str,
) -> None:
    """Runs the cells that `path` lacks, and appends each one's row as it comes.

    Args:
        processes: how many at a time.
        run: gives a cell's row. prepare: what each process does first. Both are functions of a module.
        describe: a row in a few words, for the terminal. title: what kind of runs these are.
    """
    done = read_results(path, type(cells[0]))
    missing = [cell for cell in cells if cell not in done]
    if not missing:
        return
    print(f"{len(missing)} of {len(cells)} {title} runs to do, {processes} at a time", flush=True)
    started = time.monotonic()
    context = multiprocessing.get_context("spawn")
    if path.is_file() and not path.read_bytes().endswith(b"\n"):
        path.open("a").write("\n")  # after a line that was cut short
    with ProcessPoolExecutor(processes, mp_context=context, initializer=prepare) as pool, open(path, "a") as file:
        futures = [pool.submit(run, cell) for cell in missing]
        try:
            for count, future in enumerate(as_completed(futures), 1):
                row = future.result()
                file.write(json.dumps(row) + "\n")
                file.flush()
                left = (time.monotonic() - started) / count * (len(missing) - count)
                print(f"{count}/{len(missing)} {describe(row)}; {left / 60:.0f} min left", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


# ------------------------------------------------------------------------------------------------------------------
# Scores over seeds
# ------------------------------------------------------------------------------------------------------------------


def mean_and_deviation(numbers: list[float]) -> str:
    if not numbers:
        return "not run"
    mean = f"{statistics.mean(numbers):.1f}"
    return f"{mean} ± {statistics.stdev(numbers):.1f}" if len(numbers) > 1 else mean


def paired_difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> str:
    """Mean of the differences seed by seed with its 95 % interval by Student's t; a star where it excludes 0."""
    differences = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    if len(differences) < 2:
        return "not run"
    mean, half = paired_interval(differences)
    return f"{mean:+.1f} [{mean - half:+.1f}, {mean + half:+.1f}]" + ("*" if abs(mean) > half else "")
