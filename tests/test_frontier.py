"""The frontier's rules and its primary outcome, on made-up rows, against numpy and scipy written out here."""

import dataclasses
import json

import numpy as np
import pytest
import scipy.stats
from conftest import record

from experiments import frontier
from experiments.entries import load

ALPHAS = (1.0, 0.9, 0.8, 0.65, 0.5)
RATES = {"": 1e-4, "-third": 3.3e-5}


def losses_of(arm, rate, seed):
    """A loss that is lowest near α = 0.9 for the higher rate, and falls up to 1 for the lower."""
    noise = np.random.default_rng([len(arm), seed]).uniform(0, 0.004)
    return [0.06 + noise + (0.3 * (a - 0.9) ** 2 if rate == 1e-4 else 0.01 + 0.2 * (1 - a)) for a in ALPHAS]


def kls_of(arm, rate, seed):
    factor = {"masked-0.15": 0.5, "cr-0.15": 0.7}.get(arm, 1.0) + 0.01 * seed
    return [factor * rate * 2e3 * a**2 for a in ALPHAS]


def run_of(arm, suffix, seed):
    rate, curve = RATES[suffix], {}
    for a, loss, kl in zip(ALPHAS, losses_of(arm, rate, seed), kls_of(arm, rate, seed), strict=True):
        curve |= {f"validation_loss@{a:g}": loss, f"response_loss@{a:g}": loss + 0.01}
        for shift, text in enumerate(frontier.TEXTS):
            curve |= {f"kl_base_tuned.{text}@{a:g}": kl + 0.1 * (shift - 1), f"forgetting.{text}@{a:g}": kl}
    about = {"experiment": "frontier", "arm": arm + suffix, "seed": seed, "settings": {"learning_rate": rate}}
    return record(f"{arm}{suffix}-{seed}", **about, scores={"curve": curve})


@pytest.fixture
def records():
    arms = ("pissa", "cr-0.15", "masked-0.15")
    return [run_of(arm, suffix, seed) for arm in arms for suffix in RATES for seed in (51, 52, 53, 54, 55)]


def expected_at_level(arm, seed, level):
    found = []
    for rate in RATES.values():
        losses, kls = losses_of(arm, rate, seed)[::-1], kls_of(arm, rate, seed)[::-1]
        for i, alpha in enumerate(ALPHAS[::-1]):
            if losses[i] <= level:
                if i == 0:
                    found.append((rate * alpha, kls[0]))
                else:
                    at = [
                        np.interp(-level, [-losses[i - 1], -losses[i]], [y[i - 1], y[i]]) for y in (ALPHAS[::-1], kls)
                    ]
                    found.append((rate * at[0], at[1]))
                break
    return min(found)[1]


def test_the_two_rules_and_the_primary_outcome(records, tmp_path, capsys):
    arms = frontier.by_arm_and_seed(records)
    for arm, runs in arms.items():
        for seed, of_seed in runs.items():
            points = [
                (rate * a, loss)
                for rate in RATES.values()
                for a, loss in zip(ALPHAS, losses_of(arm, rate, seed), strict=True)
            ]
            least = min(loss for _, loss in points)
            point = frontier.within_tolerance(of_seed)
            assert point.rate * point.alpha == pytest.approx(min(m for m, loss in points if loss <= least + 0.003))
    for above in (*frontier.ABOVE, 0.0):
        kls = {arm: [] for arm in arms}
        for seed in (51, 52, 53, 54, 55):
            level = max(min(min(losses_of(arm, rate, seed)) for rate in RATES.values()) for arm in arms)
            for arm in arms:
                kls[arm].append(expected_at_level(arm, seed, level + above))
        chosen = frontier.chosen_at_level(arms, above)
        for arm in arms:
            assert [point.kl for point in chosen[arm].values()] == pytest.approx(kls[arm])
    assert len(frontier.levels_table(arms).splitlines()) == 2 + 3  # the pairs that have rows
    tests = [scipy.stats.ttest_rel(kls["masked-0.15"], kls[other]) for other in ("cr-0.15", "pissa")]
    small, large = sorted(test.pvalue for test in tests)
    holm = {small: min(1, 2 * small), large: max(large, 2 * small)}
    rows = [line.split("|") for line in frontier.primary_table(chosen).splitlines()[2:]]
    for row, test in zip(rows, tests, strict=True):
        low, high = test.confidence_interval()
        assert row[3].strip() == f"{(low + high) / 2:+.4f} [{low:+.4f}, {high:+.4f}]"
        assert row[4].strip() == f"{holm[test.pvalue]:.4f}"
    table = [line.split("|") for line in frontier.difference_table(chosen).splitlines()[2:]]
    pairs = [("masked-0.15", "cr-0.15"), ("masked-0.15", "pissa"), ("cr-0.15", "pissa")]  # no other arm has rows
    for row, (ours, theirs) in zip(table, pairs, strict=True):
        low, high = scipy.stats.ttest_rel(kls[ours], kls[theirs]).confidence_interval()
        assert row[1].strip() == f"{ours} − {theirs}"
        assert row[3].strip() == f"{(low + high) / 2:+.3f} [{low:+.3f}, {high:+.3f}]"
        assert high < 0  # which the picture's title says
    assert "closer still" in frontier.title(chosen, 5) and "Under study" in frontier.title(chosen, 6)
    nearer = {seed: dataclasses.replace(p, kl=p.kl - 0.01 - 1e-3 * seed) for seed, p in chosen["masked-0.15"].items()}
    assert "closest to the base" in frontier.title(chosen | {"full": nearer}, 5)
    assert "closer still" in frontier.title(chosen | {"full": dict(list(nearer.items())[:4])}, 5)  # one seed is missing
    chosen["masked-0.15"] = chosen["pissa"]
    assert "not shown" in frontier.title(chosen, 5)
    first = {
        arm: {seed: frontier.within_tolerance(runs) for seed, runs in of_seed.items()} for arm, of_seed in arms.items()
    }
    shares = {arm: [0.5 + 0.01 * len(arm) * (seed % 3) for seed in (51, 52, 53, 54, 55)] for arm in arms}
    answers = {
        (point.run, point.alpha): shares[arm][number]
        for arm, points in first.items()
        for number, point in enumerate(points.values())
        if (arm, number) != ("pissa", 4)  # one that is not measured
    }
    low, high = scipy.stats.ttest_rel(shares["masked-0.15"][:4], shares["pissa"][:4]).confidence_interval()
    expected = f"masked-0.15 − pissa: {50 * (low + high):+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
    assert expected in frontier.accuracy_differences(first, answers)
    records.append(run_of("lora", "", 51) | {"status": "failed"})
    for one in records:
        (tmp_path / f"{one['run']}.json").write_text(json.dumps(one))
    (tmp_path / "frontier.md").write_text("# Head\n\n<!-- tables -->\nold\n")
    frontier.main([str(tmp_path), "--page", str(tmp_path)])
    text = (tmp_path / "frontier.md").read_text()
    assert "**Primary outcome:**" in text and "- lora-51: failed" in text and "old" not in text
    assert (tmp_path / "frontier.png").is_file()


def test_a_part_of_the_rows_draws_no_conclusion(records):
    text = frontier.report(records[:-1], {})
    planned = len(load("frontier")["axes"]["arm"]) * 5
    assert text.startswith(f"{len(records) - 1} of {planned} runs are done")
    assert "under way" in text and "4 of 5 seeds" in text and "Primary outcome" not in text
