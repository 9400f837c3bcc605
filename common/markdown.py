"""Tables for the terminal and for pages, and what draws their pictures."""

from typing import Any


def markdown(rows: list[list[str]], padded: bool = True) -> str:
    """A Markdown table of a head and rows; `padded`: the columns stand below one another."""
    widths = [max(map(len, column)) if padded else 0 for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (max(width, 1) + 2) for width in widths) + "|")
    return "\n".join(lines)


def pyplot() -> Any:
    """matplotlib's pyplot, drawing into files; imported where it is needed, for that takes a second."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt
