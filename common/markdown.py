"""Tables for the terminal and for pages, and what draws their pictures."""

from typing import Any


def markdown(rows: list[list[str]]) -> str:
    """A Markdown table of a head and rows."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def pyplot() -> Any:
    """matplotlib's pyplot, drawing into files; imported where it is needed, for that takes a second."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt
