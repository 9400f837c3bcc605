"""The report: a page with its tables and three pictures, written from the rows alone."""

import itertools
import math
from pathlib import Path

import numpy as np
import yaml

from common import intervals
from common.intervals import markdown, pyplot, save_picture
from experiments.inheritance.report import (
    EQUIVALENT,
    PRIMARY,
    TEMPERATURES,
    Paired,
    Results,
    at_entropy_of,
    gates,
    on_drift_curve,
    ungated,
)
from experiments.study import filled_page

plt = pyplot()
HERE = Path(__file__).parent
PLANNED_SEEDS = 10
MAIN = ("full", "LoRA", "PiSSA", "PiSSA + L_CR", "PiSSA + L_DR", "PiSSA + L_SVDR", "BA-LoRA", "LoRA + three terms")
SHOWN = {  # in the pictures, with the name there
    "full": "full fine-tuning", "LoRA": "LoRA", "PiSSA": "PiSSA", "BA-LoRA": "BA-LoRA",
    "best scale": "PiSSA, ΔW scaled", "λ₁ = 1": "BA-LoRA, λ₁ = 1", "BA-LoRA + invariance": "BA-LoRA + invariance",
}  # fmt: skip
SWEEP = {0.0: "PiSSA", 0.025: "λ₁ = 0.025", 0.15: "λ₁ = 0.15", 1.0: "λ₁ = 1", 4.0: "λ₁ = 4"}
RATE_CURVE = [f"PiSSA, rate / {d}" for d in (8, 4, 2)] + ["PiSSA"]
SCALE_CURVE = [f"PiSSA @ scale {scale:g}" for scale in (0.25, 0.5, 0.75)] + ["PiSSA"]
STOP_CURVE = [f"PiSSA @ stopped at {stop:g}" for stop in (0.25, 0.5, 0.75)] + ["PiSSA"]
TITLES = {
    "gaps": "By every method less of the planted bias is left on new prompts than on old ones",
    "selectivity": "BA-LoRA lies on the line of PiSSA with a scaled ΔW",
    "sweep": "With λ₁ of 1 or more less of the bias is inherited, but the task is hardly learned",
}
# Okabe and Ito's colours, which the colour-blind tell apart.
BLUE, ORANGE, GREEN, RED, BLACK, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#000000", "#888888"
COLOURS = {"BA-LoRA": BLUE, "PiSSA": BLACK, "BA-LoRA + invariance": GREEN, "LoRA": ORANGE, "λ₁ = 1": "#56B4E9"}


# ------------------------------------------------------------------------------------------------------------------
# Tables
# ------------------------------------------------------------------------------------------------------------------


def spread(values: dict[int, float], digits: int = 2) -> str:
    """Mean ± standard deviation over seeds."""
    return intervals.spread(values.values(), digits, "–")


def interval(paired: Paired, digits: int = 2) -> str:
    if math.isnan(paired.low):
        return "–" if not paired.n else f"{paired.mean:+.{digits}f} (one seed)"
    return f"{paired.mean:+.{digits}f} [{paired.low:+.{digits}f}, {paired.high:+.{digits}f}]"


def table(header: list[str], rows: list[list[str]]) -> str:
    return markdown([header, *rows], padded=False)


def arms_of(results: Results, data: str = "F0") -> list[str]:
    """Every arm that has a row, in the order of the plan."""
    found = dict.fromkeys(row["arm"] for row in results.rows if row["arm"] and row["data"] == data)
    first = [arm for arm in MAIN if arm in found]
    return first + [arm for arm in found if arm not in first and not arm.startswith("trial")]


def bias_table(results: Results) -> str:
    columns = {"accuracy": "accuracy", "I, new prompts": "I", "I, old prompts": "I_old", "R": "R", "S = R − I": "S"}
    columns |= {"AUC of group": "auc_new", "argmax flips": "flips_new", "revival": "revival"}
    rows = [
        [arm, *(spread(results.values(name, arm), 3 if name == "accuracy" else 2) for name in columns.values())]
        for arm in arms_of(results)
    ]
    return table(["arm", *columns], rows)


def learning_table(results: Results) -> str:
    header = [
        "arm", "rate", "accuracy", "worse group", "against − along", "loss", "calibration error", "mass, no clue",
        "KL(base ‖ tuned)", "I, unseen names",
    ]  # fmt: skip
    names = ("accuracy", "accuracy_worse_group", "accuracy_against_minus_along", "loss", "calibration_error")
    rows = []
    for arm in arms_of(results):
        rate = next(row["rate"] for row in results.rows if row["arm"] == arm)
        cells = [spread(results.values(name, arm), 3) for name in names]
        cells += [spread(results.values(name, arm)) for name in ("mass_new", "old_kl")]
        rows.append([arm, f"{rate:.3g}", *cells, spread(unseen(results, arm))])
    return table(header, rows)


def unseen(results: Results, arm: str) -> dict[int, float]:
    """I on new prompts over the names that the corpus never biased."""
    found = {}
    for seed in results.seeds():
        parts = [results.measures(which, seed, beta) for which in (arm, None) for beta in (0.9, 0.5)]
        if None not in parts:
            after = parts[0]["gap_new_unbiased"] - parts[1]["gap_new_unbiased"]
            found[seed] = after / (parts[2]["gap_old_unbiased"] - parts[3]["gap_old_unbiased"])
    return found


def differences_table(results: Results) -> str:
    """Each arm minus PiSSA: I with Holm's p over the arms, R, S."""
    arms = [arm for arm in arms_of(results) if arm != "PiSSA"]
    of_arms = [results.paired("I", arm, "PiSSA") for arm in arms]
    secondary = [i for i, arm in enumerate(arms) if arm != PRIMARY[0] and of_arms[i].n > 1]
    adjusted = dict(zip(secondary, intervals.holm([of_arms[i].p_sign_flip for i in secondary]), strict=True))
    rows = []
    for i, arm in enumerate(arms):
        p = f"{adjusted[i]:.3f}" if i in adjusted else ("primary" if arm == PRIMARY[0] else "–")
        others = [interval(results.paired(name, arm, "PiSSA")) for name in ("R", "S", "I_old")]
        rows.append([arm, interval(of_arms[i]), p, f"{of_arms[i].p_equivalent:.3f}", *others])
    header = ["arm − PiSSA", "I, new prompts", "Holm's p", f"TOST ±{EQUIVALENT}", "R", "S", "I, old prompts"]
    seeds, compared = max(paired.n for paired in of_arms), len(secondary)
    smallest = 2 / 2**seeds
    lowest = min(1, smallest * compared)  # Holm's correction of the smallest p multiplies it by the number of arms
    floor = (
        f"With {seeds} seeds no p of the sign-flip test is below {smallest:.4f}, and none of Holm's, over {compared} "
        f"arms, below {lowest:.3f}. So that column can show nothing."
    )
    return f"{table(header, rows)}\n\n{floor}"


def against_less_training(results: Results, arm: str, curve: list[str]) -> Paired:
    """I of `arm` minus I of PiSSA that is trained so much less that it keeps the same R."""
    found = []
    for seed in results.seeds():
        matched = on_drift_curve(results, curve, seed, results.retention(arm, seed))
        found.append(results.inheritance(arm, seed) - matched)
    return Paired.of(value for value in found if not math.isnan(value))


def matched_table(results: Results) -> str:
    """The rest of each arm's I against a PiSSA that is merely trained less, and merely flatter."""
    rows = []
    for arm in arms_of(results):
        if arm in RATE_CURVE or arm in ("full", "best rate", "best scale"):
            continue
        curves = (RATE_CURVE, SCALE_CURVE, STOP_CURVE)
        cells = [interval(against_less_training(results, arm, curve)) for curve in curves]
        flat = [
            results.inheritance(arm, seed) - at_entropy_of(results, arm, seed, TEMPERATURES) for seed in results.seeds()
        ]
        cells.append(interval(Paired.of(value for value in flat if not math.isnan(value))))
        rows.append([arm, *cells])
    header = ["I of arm − I of PiSSA …", "at the rate with the same R", "scaled to the same R", "stopped at the same R",
              "flattened to the same entropy"]  # fmt: skip
    return table(header, rows)


def equal_accuracy_table(results: Results) -> str:
    """BA-LoRA minus PiSSA that is trained less or scaled, read off where it is as accurate: facts kept, and I.

    Of PiSSA's points with one accuracy the one that keeps the fewest facts is taken, or the one that keeps the most.
    """
    rows = []
    curves = {"PiSSA at a lower rate": [*RATE_CURVE, "best rate"], "PiSSA, ΔW scaled": [*SCALE_CURVE, "best scale"]}
    for (title, curve), most in itertools.product(curves.items(), (False, True)):
        found = []
        for seed in results.values("R", PRIMARY[0]):
            of = [[results.value(name, arm, seed) for name in ("accuracy", "R", "I")] for arm in (*curve, PRIMARY[0])]
            ours = of.pop()
            points = {point[0]: point for point in sorted(of, reverse=not most) if not math.isnan(sum(point))}
            if points:
                accuracies, *others = zip(*sorted(points.values()), strict=True)
                found.append([own - np.interp(ours[0], accuracies, y) for own, y in zip(ours[1:], others, strict=True)])
        cells = [interval(Paired.of(values), 3) for values in zip(*found, strict=True)] or ["–", "–"]
        rows.append([title, "most" if most else "fewest", *cells])
    return table(["BA-LoRA minus …, at equal accuracy", "of equals, facts kept", "R", "I, new prompts"], rows)


def other_conditions(results: Results) -> str:
    """I (new prompts) of the arms that ran elsewhere: other β, data, label noise, world."""
    conditions = {
        "F0, β = 0.9": {},
        "β = 0.7": {"beta": 0.7},
        "F1 (biased data)": {"data": "F1"},
        "F2 (against the bias)": {"data": "F2"},
        "F3 (9 : 1)": {"data": "F3"},
        "F4 (20 % flipped)": {"data": "F4"},
        "η = 0": {"eta": 0.0},
        "η = 0.2": {"eta": 0.2},
        "no questions in the corpus": {"questions": False},
    }
    arms = [arm for arm in (*MAIN, "λ₁ = 0.15") if arm in arms_of(results)]
    rows = []
    for title, settings in conditions.items():
        found = [results.values("I", arm, **settings) for arm in arms]
        if any(found):
            n = max(map(len, found))
            contrast = interval(results.paired("I", *PRIMARY, **settings))
            kept = interval(results.paired("R", *PRIMARY, **settings))
            rows.append([title, str(n), *(spread(values) for values in found), contrast, kept])
    header = ["condition", "seeds", *arms, "I: BA-LoRA − PiSSA", "R: BA-LoRA − PiSSA"]
    return table(header, rows)


def predictions_table(results: Results, predictions: list[dict]) -> str:
    """Each prediction beside its outcome, and whether the interval confirms it."""
    rows = []
    for prediction in predictions:
        settings = {key: prediction[key] for key in ("beta", "data") if key in prediction}
        if prediction.get("against") == "less training":
            paired = against_less_training(results, prediction["arm"], RATE_CURVE)
        elif "against" in prediction:
            paired = results.paired(prediction["measure"], prediction["arm"], prediction["against"], **settings)
        else:
            values = results.values(prediction["measure"], prediction["arm"], **settings)
            paired = Paired.of(value - prediction.get("minus", 0) for value in values.values())
        rows.append([prediction["says"], interval(paired), came_true(paired, prediction["expect"])])
    return table(["prediction, committed before the first confirmatory row", "difference [95 %]", "came true"], rows)


def came_true(paired: Paired, expect: str) -> str:
    """yes: the whole interval lies where it was expected; no: wholly elsewhere; open: neither."""
    if math.isnan(paired.low):
        return "–"
    if expect == "equivalent":
        if paired.p_equivalent < 0.05:
            return "yes"
        return "no" if paired.low > EQUIVALENT or paired.high < -EQUIVALENT else "open"
    low, high = (paired.low, paired.high) if expect == "higher" else (-paired.high, -paired.low)
    return "yes" if low > 0 else ("no" if high < 0 else "open")


# ------------------------------------------------------------------------------------------------------------------
# Sentences
# ------------------------------------------------------------------------------------------------------------------


def primary_sentence(results: Results) -> str:
    paired = results.paired("I", *PRIMARY)
    if paired.n < 2:
        return f"**Primary outcome**: not there yet ({paired.n} of {PLANNED_SEEDS} seeds)."
    if paired.p_equivalent < 0.05 and paired.low < 0 < paired.high:
        verdict = f"the two are equivalent within ±{EQUIVALENT:.2f} (TOST p = {paired.p_equivalent:.4f})"
    elif paired.p_equivalent < 0.05:
        side = "less" if paired.mean < 0 else "more"
        verdict = f"BA-LoRA inherits {side}, by an amount within ±{EQUIVALENT:.2f} (TOST p = {paired.p_equivalent:.4f})"
    elif paired.high < 0:
        verdict = "BA-LoRA inherits less of the planted bias than PiSSA"
    elif paired.low > 0:
        verdict = "BA-LoRA inherits more of the planted bias than PiSSA"
    else:
        verdict = "neither a difference nor equivalence is shown"
    return (
        f"**Primary outcome** ({paired.n} of {PLANNED_SEEDS} planned seeds): "
        f"I(BA-LoRA) − I(PiSSA) = {interval(paired, 3)} (95 %), sign-flip p = {paired.p_sign_flip:.3f}: {verdict}."
    )


def gates_text(results: Results, kept: Results) -> str:
    lines = ["| gate | passed | worst | |", "|---|---|---|---|", *(gate.line() for gate in gates(results))]
    gone = sorted(set(results.seeds()) - set(kept.seeds()))
    if gone:
        names = ", ".join(map(str, gone))
        lines += [
            "",
            f"Gated out: seeds {names} (a pre-training fails a gate). Every table and picture is without them.",
        ]
        lines += [f"With all seeds: {primary_sentence(results)}"]
    else:
        lines += ["", "Gated out: nothing."]
    if results.failures:
        lines += ["", f"{len(results.failures)} runs failed; the first: {results.failures[0]['error']}"]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------------
# Pictures
# ------------------------------------------------------------------------------------------------------------------


def _mean_and_interval(values: dict[int, float]) -> tuple[float, float]:
    """Mean and the half width of its 95 % interval."""
    paired = Paired.of(values.values())
    return paired.mean, 0.0 if math.isnan(paired.low) else paired.high - paired.mean


def draw_gaps(results: Results, file: Path, title: str) -> None:
    """The gap between the groups that comes from the planted bias, before fine-tuning and after, by arm."""
    arms = [arm for arm in SHOWN if results.values("I", arm)]
    figure, axis = plt.subplots(figsize=(8, 1.9 + 0.42 * len(arms)), layout="constrained")
    before = {
        seed: results.measures(None, seed, 0.9)["gap_old"] - results.measures(None, seed, 0.5)["gap_old"]
        for seed in results.values("I", arms[0])
    }
    planted = float(np.mean(list(before.values())))
    axis.axvline(planted, color=BLACK, linewidth=1.5, label=f"before fine-tuning ({planted:.2f} nats)")
    axis.axvline(0, color=GREY, linewidth=0.8)
    for offset, name, colour, marker, text in (
        (-0.15, "I", BLUE, "o", "after, new prompts"),
        (0.15, "I_old", ORANGE, "s", "after, old prompts"),
    ):
        points = [_mean_and_interval({s: v * before[s] for s, v in results.values(name, arm).items()}) for arm in arms]
        axis.errorbar(
            [mean for mean, _ in points], np.arange(len(arms)) + offset, xerr=[half for _, half in points],
            fmt=marker, color=colour, capsize=2, markersize=5, linewidth=1, label=text,
        )  # fmt: skip
    axis.set_yticks(range(len(arms)), [SHOWN[arm] for arm in arms])
    axis.invert_yaxis()
    axis.set_ylim(len(arms) - 0.4, -0.6)
    axis.set_xlabel("gap in log-odds between the groups, biased model minus its clean twin (nats)")
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False, fontsize=9)
    axis.grid(axis="x", alpha=0.3)
    save_picture(figure, file, title)


def draw_selectivity(results: Results, file: Path, title: str) -> None:
    """R against I: the line of PiSSA with ΔW scaled, and six arms beside it, each with its name."""
    figure, axis = plt.subplots(figsize=(8, 5.3), layout="constrained")
    line = [(results.values("I", arm), results.values("R", arm)) for arm in SCALE_CURVE]
    line = [(np.mean(list(i.values())), np.mean(list(r.values()))) for i, r in line if i and r]
    if line:
        axis.plot(*zip(*line, strict=True), "--", color=GREY, marker=".", zorder=1)
        axis.annotate("PiSSA, ΔW × 0.25 … 1", line[1], (8, 4), textcoords="offset points", color=GREY)
    for arm, text in SHOWN.items():
        if arm == "best scale" or not results.values("I", arm):
            continue  # it lies on the line
        (i, i_half), (r, r_half) = (_mean_and_interval(results.values(name, arm)) for name in ("I", "R"))
        colour = COLOURS.get(arm, RED)
        axis.errorbar(i, r, xerr=i_half, yerr=r_half, fmt="o", color=colour, markersize=6, linewidth=0.7, alpha=0.9)
        below = arm == "PiSSA"
        axis.annotate(text, (i, r), (7, -14 if below else 6), textcoords="offset points", color=colour, fontsize=11)
    axis.set_xlabel("share of the bias inherited, I (less is better); crosses: 95 % intervals")
    axis.set_ylabel("share of the facts kept, R (more is better)")
    axis.grid(alpha=0.3)
    save_picture(figure, file, title)


def draw_sweep(results: Results, file: Path, title: str) -> None:
    """I and R over λ₁ at a constant schedule, and how well the task is learnt."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 4.1), sharex=True, layout="constrained")
    panels = (
        ("I", "share of the bias inherited (I)"),
        ("R", "share of the facts kept (R)"),
        ("accuracy", "accuracy on the task"),
    )
    twins = {0.15: "λ₁ = 0.15, clean twin", 1.0: "λ₁ = 1, clean twin"}
    for axis, (name, measure) in zip(axes, panels, strict=True):
        for curve, colour, marker, text in (
            (SWEEP, BLUE, "o", "teacher: the biased base"), (twins, ORANGE, "s", "teacher: its clean twin"),
        ):  # fmt: skip
            found = {weight: results.values(name, arm) for weight, arm in curve.items()}
            found = {weight: values for weight, values in found.items() if values}
            positions = [list(SWEEP).index(weight) for weight in found]
            points = [_mean_and_interval(values) for values in found.values()]
            means, halves = [mean for mean, _ in points], [half for _, half in points]
            axis.errorbar(positions, means, yerr=halves, color=colour, marker=marker, capsize=3, label=text)
        axis.set_xticks(range(len(SWEEP)), [f"{weight:g}" for weight in SWEEP])
        axis.set_xlabel("λ₁, constant")
        axis.set_title(measure, fontsize=10)
        axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False, fontsize=8)
    save_picture(figure, file, title)


# ------------------------------------------------------------------------------------------------------------------
# The page
# ------------------------------------------------------------------------------------------------------------------


def write(results: Results, rows: Path, page: Path) -> None:
    """Writes `page` and its three pictures, and prints the primary outcome and the first table."""
    settled = yaml.safe_load((HERE / "predictions.yaml").read_text())
    kept = ungated(results)
    page.parent.mkdir(parents=True, exist_ok=True)
    pictures = {name: page.with_name(f"inheritance-{name}.png") for name in ("gaps", "selectivity", "sweep")}
    if kept.paired("I", *PRIMARY).n == 0:
        print(f"{rows} has no pair of BA-LoRA and PiSSA that passes the gates yet: no page")
        return
    committed = rows.parent == HERE  # A person read these rows. Other rows, as the short form's, may say otherwise.
    for name, draw in (("gaps", draw_gaps), ("selectivity", draw_selectivity), ("sweep", draw_sweep)):
        draw(kept, pictures[name], TITLES[name] if committed else "")
    fine_tunings = sum(row["arm"] is not None for row in results.rows)
    pretrainings = len(results.rows) - fine_tunings
    parts = {
        "primary": primary_sentence(kept),
        "seeds": ", ".join(map(str, kept.seeds())),
        "counts": f"{len(results.seeds())} seeds ran: {pretrainings} pre-trainings and {fine_tunings} fine-tunings",
        "gates": gates_text(results, kept),
        "bias": bias_table(kept),
        "differences": differences_table(kept),
        "learning": learning_table(kept),
        "matched": matched_table(kept),
        "equal_accuracy": equal_accuracy_table(kept),
        "others": other_conditions(kept),
        "predictions": predictions_table(kept, settled.get("predictions") or []),
        **{name: f"![{TITLES[name]}]({file.name})" for name, file in pictures.items()},
    }
    parts["reading"] = (HERE / "reading.md").read_text().strip() if committed else ""
    page.write_text(filled_page(HERE / "page.md", parts))
    print(parts["primary"], parts["bias"], parts["gates"], f"Page: {page}", sep="\n\n")
