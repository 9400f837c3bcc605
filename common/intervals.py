"""How sure a number is: shares and means with their counts and their 95 % intervals; tables and pictures of them."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

Z_95 = 1.959963984540054  # the standard normal's 97.5 % quantile


def wilson_interval(successes: float, trials: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a proportion (E. B. Wilson, JASA 22, 1927); (0, 1) without trials."""
    if trials == 0:
        return 0.0, 1.0
    p = successes / trials
    denominator = 1 + Z_95**2 / trials
    centre = (p + Z_95**2 / (2 * trials)) / denominator
    half = Z_95 / denominator * math.sqrt(p * (1 - p) / trials + Z_95**2 / (4 * trials**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def proportion(successes: int, trials: int) -> dict[str, Any]:
    """A share with its count and its interval, as every summary states it."""
    return {
        "value": successes / trials if trials else None,
        "count": successes,
        "of": trials,
        "interval_95": wilson_interval(successes, trials),
    }


def share(items: list[dict], name: str) -> dict[str, Any]:
    """The share of items where `name` is true; with several samples the mean of the items' own shares."""
    of_items: dict[int, list[bool]] = {}
    for item in items:
        of_items.setdefault(item["index"], []).append(bool(item[name]))
    if len(of_items) == len(items):
        return proportion(sum(item[name] for item in items), len(items))
    return mean_of_shares([sum(verdicts) / len(verdicts) for verdicts in of_items.values()])


def mean_of_shares(values: list[float]) -> dict[str, Any]:
    """A mean of shares as `mean` gives it. If all are equal, a bootstrap shows no width: the interval is Wilson's then,
    as for one sample each."""
    found = mean(values)
    if len(set(values)) == 1:
        found["interval_95"] = wilson_interval(sum(values), len(values))
    return found


def mean(values: list[float], resamples: int = 10_000) -> dict[str, Any]:
    """A mean with its count and its 95 % percentile bootstrap interval over the values (B. Efron, 1979)."""
    if not values:
        return {"value": None, "of": 0, "interval_95": None}
    import numpy as np

    sample = np.asarray(values, dtype=float)
    generator = np.random.default_rng(0)
    means = [sample[generator.integers(len(sample), size=len(sample))].mean() for _ in range(resamples)]
    return {
        "value": float(sample.mean()),
        "of": len(values),
        "interval_95": tuple(float(bound) for bound in np.quantile(means, [0.025, 0.975])),
    }


def paired_interval(differences: list[float]) -> tuple[float, float]:
    """The mean of two or more paired differences, and half of its 95 % interval by Student's t."""
    from scipy import stats

    deviation = statistics.stdev(differences)
    half = float(stats.t.ppf(0.975, len(differences) - 1)) * deviation / len(differences) ** 0.5
    return statistics.mean(differences), half


def by_seed(ours: Mapping[int, float | None], theirs: Mapping[int, float | None]) -> dict[int, float]:
    """`ours` − `theirs` for every seed that has both."""
    both = {seed: (ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())}
    return {seed: one - other for seed, (one, other) in both.items() if one is not None and other is not None}


def spread(values: Iterable[float | None], digits: int, nothing: str = "-") -> str:
    """Mean ± sample standard deviation of those that are there, as text."""
    known = [value for value in values if value is not None]
    if not known:
        return nothing
    if not all(map(math.isfinite, known)):
        return not_finite(known)
    text = f"{statistics.mean(known):.{digits}f}"
    return text + (f" ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else "")


def not_finite(values: Sequence[float]) -> str:
    """The text that a table has instead of a mean if a run diverged."""
    return f"not finite in {sum(not math.isfinite(value) for value in values)} of {len(values)}"


def difference(paired: Iterable[float], digits: int, nothing: str = "-", one: str = "one pair") -> str:
    """The mean of paired differences with its 95 % interval by Student's t, as text."""
    known = list(paired)
    if not all(map(math.isfinite, known)):
        return not_finite(known)
    if len(known) < 2:
        return f"{known[0]:+.{digits}f} ({one})" if known else nothing
    mean, half = paired_interval(known)
    return f"{mean:+.{digits}f} [{mean - half:+.{digits}f}, {mean + half:+.{digits}f}]"


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values in the order given (S. Holm, Scandinavian Journal of Statistics 6, 1979)."""
    import numpy as np

    order = np.argsort(p_values)
    factors = np.arange(len(order), 0, -1)
    rising = np.minimum(1.0, np.maximum.accumulate(factors * np.asarray(p_values)[order]))
    return rising[np.argsort(order)].tolist()


def ratio(sums: list[float], counts: list[int], resamples: int = 10_000) -> dict[str, Any]:
    """Σ sums / Σ counts with its 95 % percentile bootstrap interval over the groups. An example is the mean over all
    tokens of some documents: the tokens of one document are not independent."""
    import numpy as np

    total, weight = np.asarray(sums, dtype=float), np.asarray(counts, dtype=float)
    return _bootstrapped(lambda drawn: (drawn @ total) / (drawn @ weight), len(total), resamples)


def slope(before: Sequence[float], after: Sequence[float], resamples: int = 10_000) -> dict[str, Any]:
    """The least-squares slope of `after` on `before`, with its 95 % percentile bootstrap interval over the pairs; None
    where all of `before` are equal, or there are fewer than three."""
    import numpy as np

    x, y = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    if len(x) < 3 or np.ptp(x) == 0:
        return {"value": None, "of": len(x), "interval_95": None}

    def of(drawn: "np.ndarray") -> "np.ndarray":
        mean_x, mean_y = drawn @ x / len(x), drawn @ y / len(x)
        with np.errstate(divide="ignore", invalid="ignore"):  # all draws of one pair
            return (drawn @ (x * y) / len(x) - mean_x * mean_y) / (drawn @ (x * x) / len(x) - mean_x**2)

    return _bootstrapped(of, len(x), resamples)


def _bootstrapped(statistic: Callable[[Any], Any], size: int, resamples: int) -> dict[str, Any]:
    """A statistic of `size` members with its 95 % percentile bootstrap interval.

    Args:
        statistic: maps draws (R × size), which count how often each member was drawn, to (R,) values.
    """
    import numpy as np

    generator = np.random.default_rng(0)
    block = max(1, 10**6 // size)  # resamples that are drawn at a time
    found = []
    for start in range(0, resamples, block):
        count = min(block, resamples - start)
        found.append(statistic(generator.multinomial(size, np.full(size, 1 / size), size=count)))
    return {
        "value": float(statistic(np.ones((1, size)))[0]),
        "of": size,
        "interval_95": tuple(float(bound) for bound in np.nanquantile(np.concatenate(found), [0.025, 0.975])),
    }


def score_line(label: str, score: dict[str, Any], form: Callable[[float], str] = "{:.1%}".format) -> str:
    """One line of the terminal's report: a proportion or a mean with its interval and count."""
    if score["value"] is None:
        return f"  {label:24}not measured"
    low, high = score["interval_95"]
    count = f"{score['count']} of {score['of']}" if "count" in score else f"mean of {score['of']}"
    return f"  {label:24}{form(score['value']):>6}  [{form(low)}, {form(high)}]  {count}"


# ------------------------------------------------------------------------------------------------------------------
# Tables for the terminal and for pages, and the pictures of the pages
# ------------------------------------------------------------------------------------------------------------------


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
