"""The published tables, from data/published.json: for each formulation its own, with its source and how sure it is.

    {"nlg": {"source", "certainty", "formulation", "models": {model: {method: cells}},
             "versions": {NAME: {"source", "certainty", "note", "models", "also"}}}, "nlu": ...}

cells has a benchmark's [mean] or [mean, standard deviation], or null where it is not known, "params" and "average". The
first table of a part is that of the first repository (arxiv2024); "versions" has the others by name. certainty is
"primary", read at the source, or "secondary", as readers of it have copied it.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.cli import UserError

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


def published_table(part: str, model: str, version: str) -> PublishedTable | None:
    """The table of a model in the version of a formulation; None where nothing is published.

    Args:
        part: "nlg" or "nlu".
        version: a formulation, "arxiv2024" or "iclr2026", or "peft-metamath".

    Raises:
        UserError: no such version.
    """
    content = json.loads(PATH.read_text())[part]
    versions = {content["formulation"]: content, **content["versions"]}
    if version not in versions:
        raise UserError(f"nothing is published as {version!r}: one of {', '.join(versions)}")
    found = versions[version]
    cells = found["models"].get(model)
    return None if cells is None else PublishedTable(part, model, version, found["source"], found["certainty"], cells)
