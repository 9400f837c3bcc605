"""Tables for the terminal and for pages, and the pictures of the pages."""

from pathlib import Path
from typing import Any


def markdown(rows: list[list[str]], padded: bool = True) -> str:
    """A Markdown table of a head and rows; `padded`: the columns stand below one another."""
    widths = [max(map(len, column)) if padded else 0 for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (max(width, 1) + 2) for width in widths) + "|")
    return "\n".join(lines)


def pyplot() -> Any:
    """matplotlib's pyplot, for files. The import takes a second, so it happens only where a picture is drawn."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt


def save_picture(figure: Any, path: Path, title: str) -> Path:
    """Writes the picture with its message above it. The file does not name the version of matplotlib."""
    figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    pyplot().close(figure)
    return path
