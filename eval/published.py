"""The published tables, from data/published.json: one for each formulation, with its source and its certainty.

    {"nlg": {"source", "certainty", "formulation", "models": {model: {method: cells}},
             "versions": {NAME: {"source", "certainty", "note", "models", "also"}}}, "nlu": ...}

cells has a benchmark's [mean] or [mean, standard deviation], or null where it is not known, "params" and "average". The
first table of a part is that of the first repository (arxiv2024); "versions" has the others by name. certainty is
"primary", read at the source, or "secondary", as readers of it have copied it.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATH = Path(__file__).resolve().parent.parent / "data" / "published.json"


@dataclass(frozen=True)
class PublishedTable:
    """One model's table. cells: by method and benchmark; see above."""

    part: str
    model: str
    version: str
    source: str
    certainty: str
    cells: dict[str, dict[str, Any]]

    @property
    def caption(self) -> str:
        """Where it is from, for the line under a table."""
        how = {"primary": "", "secondary": "; a secondary source, not checked against the paper"}[self.certainty]
        return f"{self.source} ({self.version}{how})"


def published_tables() -> list[PublishedTable]:
    """All tables; part is "nlg" or "nlu", version a formulation ("arxiv2024" or "iclr2026") or "peft-metamath"."""
    tables = []
    for part, content in json.loads(PATH.read_text()).items():
        for version, found in {content["formulation"]: content, **content["versions"]}.items():
            for model, cells in found["models"].items():
                tables.append(PublishedTable(part, model, version, found["source"], found["certainty"], cells))
    return tables


def published_rows(
    tables: list[PublishedTable], formulations: set[str]
) -> Iterator[tuple[PublishedTable, str, dict[str, Any]]]:
    """A model's rows to stand beside results of these formulations, each with its table and its method.

    A method without numbers in these formulations gets those of a primary source, as on Mistral-7B (ICLR's only).
    """
    for method in dict.fromkeys(method for table in tables for method in table.cells):
        known = [table for table in tables if method in table.cells]
        chosen = [table for table in known if table.version in formulations]
        for table in chosen or [table for table in known if table.certainty == "primary"]:
            yield table, method, table.cells[method]
