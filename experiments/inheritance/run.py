"""Does BA-LoRA shed inherited bias? Runs the controlled study and writes its report.

    python experiments/inheritance/run.py --form short          5 seeds, the main arms and controls
    python experiments/inheritance/run.py --form confirmatory   the whole study, 10 seeds; goes on where it was
    python experiments/inheritance/run.py --report              the page and the pictures from the committed rows
    python experiments/inheritance/run.py --form selection      rates and best cases, on seeds of their own; prints them

The short form writes to output/inheritance/short/; the other forms add to experiments/inheritance/rows.jsonl, one line
a run, and --report writes docs/results/inheritance.md from it.
"""

import os
from pathlib import Path

from common.cli import Parser, UserError, run_script

ROOT = Path(__file__).resolve().parents[2]
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main(argv: list[str]) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--form", choices=["short", "confirmatory", "selection", "search"])
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="runs at a time, a core each (default 2)")
    parser.add_argument("--report", action="store_true", help="write the page and the pictures from the rows there are")
    parser.add_argument("--output-dir", type=Path, help="another folder for the rows and the report")
    args = parser.parse_args(argv)
    if args.form is None and not args.report:
        raise UserError("name --form or --report")
    if args.workers < 1:
        raise UserError(f"--workers must be at least 1, not {args.workers}")

    here, cache = ROOT / "experiments" / "inheritance", ROOT / "output" / "inheritance" / "pretrained"
    folder = args.output_dir or (ROOT / "output" / "inheritance" / "short" if args.form == "short" else None)
    rows = (folder or here) / "rows.jsonl"
    page = folder / "inheritance.md" if folder else ROOT / "docs" / "results" / "inheritance.md"
    if args.form:
        run(args.form, rows, cache, args.workers)
    if args.report or args.form in ("short", "confirmatory"):
        from experiments.inheritance import page as pages
        from experiments.inheritance.report import Results

        pages.write(Results.read(rows), rows, page)


def run(form: str, rows: Path, cache: Path, workers: int) -> None:
    """Does the missing runs of `form`. The imports are here because --help needs none of them."""
    from experiments.inheritance import study

    if form == "selection":
        print("learning_rates:")
        for arm, rate in study.select_rates(rows.with_name("selection.jsonl"), cache).items():
            print(f'  "{arm}": {rate:g}')
    elif form == "search":
        print("best_case:")
        for which, settings in study.search(rows.with_name("selection.jsonl"), cache).items():
            print(f'  "{which}": {settings}')
    else:
        plan = study.short_plan() if form == "short" else study.confirmatory_plan()
        study.run_jobs(plan, rows, cache, workers)


if __name__ == "__main__":
    run_script(main)
