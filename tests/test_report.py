"""The report: the published tables come back, averages are recomputed, and what has not been run is said."""

import json
import re
import statistics
import xml.etree.ElementTree

import pytest
from conftest import record, write_jsonl
from test_user_errors import error_of

from common import intervals
from common.cli import UserError
from eval import report
from eval.benchmark import state_of
from experiments import report as of_experiment

# The published tables as they were printed (BA-LoRA's seed README, with the five deviations that lack their point put
# right), as text: what the JSON must reproduce.
PRINTED = {
    "LLaMA-2-7B": """
        Full FT | 49.13±0.21 | 7.29±0.22 | 21.20±0.30 | 35.59±0.25 | 4.91±0.01 | 23.62
        LoRA | 42.47±0.29 | 5.60±0.35 | 17.03±0.61 | 32.77±0.46 | 4.62±0.11 | 20.50
        PiSSA | 52.37±0.52 | 7.76±0.19 | 21.55±0.44 | 33.09±0.57 | 4.87±0.06 | 23.93
        BA-LoRA | 54.53±0.41 | 9.21±0.17 | 23.58±0.25 | 36.86±0.31 | 5.11±0.05 | 25.86""",
    "Mistral-7B": """
        Full FT | 69.91±0.25 | 18.64±0.35 | 45.31±0.14 | 51.46±0.13 | 4.95±0.05 | 38.05
        LoRA | 67.68±0.55 | 19.90±0.25 | 42.54±0.44 | 56.85±0.23 | 4.92±0.07 | 38.38
        PiSSA | 72.25±0.64 | 21.95±0.37 | 45.37±0.25 | 61.57±0.44 | 5.23±0.05 | 41.27
        BA-LoRA | 73.17±0.34 | 22.79±0.56 | 46.31±0.17 | 62.77±0.33 | 5.41±0.06 | 42.09""",
    "Gemma-7B": """
        Full FT | 72.09±0.32 | 22.71±0.34 | 47.02±0.27 | 55.67±0.05 | 5.40±0.12 | 40.58
        LoRA | 74.64±0.58 | 31.16±0.33 | 51.64±0.28 | 63.52±0.65 | 5.01±0.03 | 45.19
        PiSSA | 77.58±0.41 | 31.47±0.44 | 53.22±0.35 | 65.49±0.18 | 5.66±0.05 | 46.68
        BA-LoRA | 78.13±0.25 | 32.25±0.25 | 54.44±0.15 | 66.25±0.33 | 5.73±0.07 | 47.36""",
    "DeBERTa-v3-base": """
        Full FT | 90.34 | 96.33 | 89.95 | 71.43 | 94.24 | 92.11 | 83.75 | 91.04 | 88.86
        LoRA | 90.71 | 94.79 | 89.85 | 70.05 | 93.94 | 92.07 | 85.43 | 91.67 | 88.56
        DoRA | 90.48 | 95.85 | 91.04 | 71.03 | 94.21 | 92.34 | 86.19 | 91.92 | 89.13
        AdaLoRA | 90.87 | 96.18 | 90.81 | 71.64 | 94.68 | 92.37 | 87.78 | 91.97 | 89.53
        PiSSA | 90.47 | 95.81 | 91.48 | 72.27 | 94.41 | 92.21 | 87.14 | 91.93 | 89.47
        BA-LoRA | 90.92 | 96.25 | 91.83 | 72.79 | 94.84 | 92.59 | 87.87 | 92.15 | 89.91""",
}
MISPRINTED = {
    ("DeBERTa-v3-base", "Full FT"): "88.65 (printed: 88.86)",
    ("DeBERTa-v3-base", "AdaLoRA"): "89.54 (printed: 89.53)",
}


def tables_of(text: str) -> dict[str, list[list[str]]]:
    """The cells of each Markdown table by its heading."""
    tables = {}
    for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        name, *lines = part.splitlines()
        rows = [line.strip("|").split("|") for line in lines if line.startswith("|") and not line.startswith("|-")]
        tables[name] = [[cell.strip() for cell in row] for row in rows]
    return tables


def write_summary(folder, name, value, of, ckpt="some/model", interval=None, **about):
    folder.mkdir(parents=True, exist_ok=True)
    score = {"value": value, "of": of, "interval_95": interval or [value, value]}
    names = {report.NLG[name].score, "accuracy", "accuracy_lenient", "answer_extracted"}
    content = dict.fromkeys(names, score) | {"ckpt": ckpt, "adapter": None, "response_loss": None}
    (folder / f"{name}.json").write_text(json.dumps(content | about))


def test_the_published_tables_come_back_with_their_averages(capsys):
    """Cell by cell as printed; the averages recomputed, and where a printed one is not its row's mean, both."""
    report.main([])
    tables = tables_of(capsys.readouterr().out)
    assert list(tables) == [*list(PRINTED)[:3], "Llama-3.2-3B", "DeBERTa-v3-base"]
    for model, text in PRINTED.items():
        printed = [[cell.strip() for cell in line.split("|")] for line in text.strip().splitlines()]
        head, *rows = tables[model]
        for row in rows:  # of every source: an average is that of its row, where the whole row was copied
            is_misprint = row[1] == "published, arxiv2024" and (model, row[0]) in MISPRINTED
            assert "not published" in row or ("printed" in row[-1]) == is_misprint, row
        published = [[row[0], *row[3:]] for row in rows if row[1] == "published, arxiv2024"]
        for row, expected in zip(published, printed, strict=True):
            *cells, average = expected
            recomputed = statistics.mean(float(cell.partition("±")[0]) for cell in cells[1:])
            assert row[:-1] == cells
            assert row[-1] == MISPRINTED.get((model, row[0]), average)
            assert float(row[-1].split()[0]) == pytest.approx(recomputed, abs=0.00501)
        ours = [row for row in rows if row[1] == "ours"]
        assert [row[0] for row in ours] == ["Full FT", "LoRA", "PiSSA", "BA-LoRA"]
        assert all(cell == "not run" for row in ours for cell in row[3:])
        assert len(head) == len(rows[0])


def train_py_run(folder, value, **settings):
    """A run of train.py with a result of GSM8K; returns its results folder."""
    folder.mkdir()
    (folder / "config.yaml").write_text(json.dumps({"method": "ba-lora", "seed": 1} | settings))
    (folder / "metrics.jsonl").write_text("")
    write_summary(folder / "results", "gsm8k", value, 1319, ckpt=str(folder / "merged"))
    return str(folder / "results")


@pytest.mark.parametrize(
    ("model", "formulations", "expected"),
    [
        ("meta-llama/Llama-2-7b-hf", ["arxiv2024"], {"arxiv2024": "54.53±0.41"}),
        ("meta-llama/Llama-2-7b-hf", ["iclr2026"], {"iclr2026": "55.86"}),
        (
            "meta-llama/Llama-2-7b-hf",
            ["iclr2026", "arxiv2024"],
            {"arxiv2024": "54.53±0.41", "iclr2026": "55.86"},
        ),
        ("google/gemma-7b", ["iclr2026"], {"arxiv2024": "78.13±0.25"}),
    ],
)
def test_published_numbers_are_chosen_by_formulation(model, formulations, expected, tmp_path, capsys):
    """BA-LoRA's GSM8K as two sources print it. A secondary source is called so; ICLR has no Gemma, so the first one."""
    folders = [
        f"{name}={train_py_run(tmp_path / name, 0.5, model=model, formulation=name)}" for name in formulations
    ] + [train_py_run(tmp_path / "lora", 0.4, model=model, formulation="iclr2026", method="lora")]
    report.main([*folders, "--output-dir", str(tmp_path / "report")])
    printed = capsys.readouterr().out
    ((_, *rows),) = tables_of(printed).values()
    published = {row[1]: row[3] for row in rows if row[0] == "BA-LoRA" and row[1].startswith("published")}
    assert published == {f"published, {version}": cell for version, cell in expected.items()}
    captions = [line for line in printed.splitlines() if line.startswith("Published: ")]
    for line, version in zip(captions, expected, strict=True):
        assert f"({version}" in line
        assert ("secondary source" in line) == (version == "iclr2026")
    assert ("CorDA++" in printed) == ("iclr2026" in expected)


def test_cells_that_are_not_published_are_named(tmp_path, capsys):
    """ICLR's GLUE row of BA-LoRA, of which four tasks were copied; the average is the printed one. Its baselines are
    those of the later README."""
    report.main([])
    tables = tables_of(capsys.readouterr().out)
    head, *rows = tables["DeBERTa-v3-base"]
    (row,) = (dict(zip(head, row, strict=True)) for row in rows if row[1] == "published, iclr2026")
    assert (row["method"], row["MNLI"], row["CoLA"], row["average"]) == (
        "BA-LoRA",
        "91.26",
        "75.46",
        "(printed: 90.67)",
    )
    assert {row[name] for name in ("SST-2", "MRPC", "QNLI", "STS-B")} == {"not published"}
    head, *rows = tables["Llama-3.2-3B"]
    assert rows[0] == ["LoRA", "published, peft-metamath", "9.2M", "47.80", *["not published"] * 5]
    write_classification(tmp_path / "a", 1, {"dev": {"matthews": 0.5}}, task="cola")
    content = json.loads((tmp_path / "a" / "results.json").read_text())
    content["arguments"]["formulation"] = "iclr2026"
    (tmp_path / "a" / "results.json").write_text(json.dumps(content))
    report.main([str(tmp_path / "a"), "--output-dir", str(tmp_path / "report")])
    ((_, *rows),) = tables_of(capsys.readouterr().out).values()
    versions = {row[0]: row[1] for row in rows if row[1].startswith("published")}
    assert versions == dict.fromkeys(("Full FT", "LoRA", "DoRA", "AdaLoRA", "PiSSA"), "published, arxiv2024") | {
        "BA-LoRA": "published, iclr2026"
    }
    assert (tmp_path / "report" / "report.png").read_bytes().startswith(b"\x89PNG")


def test_the_runs_of_a_folder_of_records_are_its_rows(tmp_path, capsys):
    """As run_record.py writes them: an arm over its seeds is a row; what chose a rate or has no score is none."""

    def write(name, value, arm="lora-terms", **changes):
        start, terms = arm.split("-")
        score = {"value": value, "of": 300, "interval_95": [value - 0.1, value + 0.1]}
        names = ("accuracy", "accuracy_strict", "accuracy_lenient", "answer_extracted")
        scores = {"gsm8k": dict.fromkeys(names, score), "forgetting": {"forgetting": score}}
        settings = {"model": "demo", "method": start, "seed": int(name[-1]), "formulation": "iclr2026"}
        about = {"labels": {"start": start, "terms": terms, "seed": name[-1]}, "script": "train.py"}
        about |= {"parameters": {"trainable": 9_000_000}, "settings": settings, "scores": scores}
        (tmp_path / f"{name}.json").write_text(json.dumps(record(name, **about | changes)))

    values = {"a-1": 0.2, "a-2": 0.4}
    for name, value in values.items():
        write(name, value)
    write("b-1", 0.3, "pissa-plain")
    write("tune-1", 0.9, phase="tuning")
    failure = {"step": "train", "code": 2, "message": "no such file"}
    write("c-1", 0.0, "pissa-plain", scores={}, status="failed", error=failure)
    report.main([str(tmp_path), "--output-dir", str(tmp_path / "report")])
    printed = capsys.readouterr().out
    head, *rows = tables_of(printed)["demo"]
    rows = [dict(zip(head, row, strict=True)) for row in rows]
    assert [(row["method"], row["whose"]) for row in rows] == [("lora-terms", "ours, 2 seeds"), ("pissa-plain", "ours")]
    deviation = statistics.stdev([20, 40])
    assert rows[0]["GSM8K"] == f"30.00±{deviation:.2f} n = 300"
    assert rows[1]["forgetting, nats"] == "+0.300 [+0.200, +0.400], n = 300"
    assert f"note: 1 of 4 runs in {tmp_path} have no score: c-1 (failed)" in printed


def test_a_mean_of_fewer_seeds_and_seeds_that_were_made_otherwise_are_named(tmp_path, capsys):
    """In both reports: HumanEval has two of three seeds, and the third was made by another commit and torch."""
    score = {"value": 0.5, "of": 164, "interval_95": [0.4, 0.6]}
    gsm8k = dict.fromkeys(("accuracy", "accuracy_strict", "accuracy_lenient", "answer_extracted"), score)
    for seed, commit, torch in ((1, "a" * 40, "2.4"), (2, "a" * 40, "2.4"), (3, "b" * 40 + "+", "2.13")):
        scores = {"gsm8k": gsm8k} | ({"humaneval": {"pass@1": score}} if seed < 3 else {})
        settings = {"model": "demo", "method": "lora", "seed": seed, "dtype": "bfloat16"}
        about = {"labels": {"method": "lora", "seed": str(seed)}, "script": "train.py", "experiment": "mine"}
        about |= {"arm": "lora", "commit": commit, "versions": {"torch": torch}, "hardware": {"device": "cpu"}}
        about |= {"parameters": {"trainable": 1}, "settings": settings, "scores": scores, "seed": seed}
        (tmp_path / f"lora-{seed}.json").write_text(json.dumps(record(f"lora-{seed}", **about)))
    report.main([str(tmp_path), "--output-dir", str(tmp_path / "report")])
    printed = capsys.readouterr().out
    head, row = tables_of(printed)["demo"]
    cells = dict(zip(head, row, strict=True))
    assert (cells["whose"], cells["HumanEval"]) == ("ours, 3 seeds", "50.00±0.00 2 of 3 seeds")
    assert "of 3 seeds" not in cells["GSM8K"]
    unlike = "differ in: commit aaaaaaaaaa / bbbbbbbbbb+, torch 2.4 / 2.13"
    assert f"LoRA: its runs {unlike}" in printed
    of_experiment.main([str(tmp_path)])
    printed = capsys.readouterr().out
    assert "| 50.00 ± 0.00 (2 of 3 seeds) |" in printed
    assert f"- lora: its seeds {unlike}" in printed


def test_seeds_of_one_method_are_one_row(tmp_path, capsys):
    """Mean and sample standard deviation by the standard library; published rows of the same model beside them."""
    values = {seed: {name: 0.1 * seed + 0.01 * place for place, name in enumerate(report.NLG)} for seed in (1, 2, 3)}
    for seed, of_benchmarks in values.items():
        made = tmp_path / f"run-{seed}"
        made.mkdir()
        (made / "config.yaml").write_text(
            f"model: meta-llama/Llama-2-7b-hf\nmethod: pissa\nformulation: arxiv2024\nseed: {seed}\n"
        )
        (made / "metrics.jsonl").write_text(json.dumps({"loss": 1.0, "step": 1}) + "\n")
        (made / "run.json").write_text(json.dumps({"trainable_parameters": 319_815_680}))
        for name, value in of_benchmarks.items():
            said = {"arguments": {"completions": [f"{made}/x.jsonl"]}, "contents": {"completions": str(seed)}}
            write_summary(made / "results", name, value, report.NLG[name].items, ckpt=str(made / "merged"), **said)
    report.main([str(tmp_path / f"run-{seed}" / "results") for seed in values])
    (table,) = tables_of(capsys.readouterr().out).values()
    methods = ["Full FT", "LoRA", "PiSSA", "BA-LoRA"]
    assert [row[:2] for row in table[1:5]] == [[name, "published, arxiv2024"] for name in methods]
    ours = table[5]
    assert ours[:3] == ["PiSSA", "ours, 3 seeds", "319.8M"]
    means = []
    for name, cell in zip(report.NLG, ours[3:8], strict=True):
        scaled = [of[name] * (1 if name == "mt_bench" else 100) for of in values.values()]
        means.append(statistics.mean(scaled))
        assert cell == f"{means[-1]:.2f}±{statistics.stdev(scaled):.2f}"
    assert ours[8] == f"{statistics.mean(means):.2f}"
    assert [row[0] for row in table[6:]] == ["Full FT", "LoRA", "BA-LoRA"]
    assert all(cell == "not run" for row in table[6:] for cell in row[3:])


def test_a_row_is_named_after_the_run_whose_weights_were_scored(tmp_path, capsys):
    """Scored, then trained again in the same folder by another method; then one benchmark more is scored there."""
    made, results = tmp_path / "run", tmp_path / "first-results"
    (made / "merged").mkdir(parents=True)
    (made / "metrics.jsonl").write_text(json.dumps({"loss": 1.0, "step": 1}) + "\n")

    def train(method):
        (made / "config.yaml").write_text(f"model: meta-llama/Llama-2-7b-hf\nmethod: {method}\nseed: 1\n")
        (made / "merged" / "model.safetensors").write_text(f"weights of {method}")

    def score(name):
        write_summary(results, name, 0.5, report.NLG[name].items, ckpt=str(made / "merged"))
        summary = json.loads((results / f"{name}.json").read_text())
        summary |= {"checkpoint": state_of(str(made / "merged")), "arguments": {"ckpt": str(made / "merged")}}
        (results / f"{name}.json").write_text(json.dumps(summary))

    def rows():
        report.main([str(results), "--output-dir", str(tmp_path / "report"), "--overwrite"])
        printed = capsys.readouterr().out
        (table,) = tables_of(printed).values()
        return {row[0] for row in table[1:] if row[1] == "ours" and set(row[3:]) != {"not run"}}, printed

    train("pissa")
    score("gsm8k")
    assert rows()[0] == {"PiSSA"}
    train("ba-lora")
    names, printed = rows()
    assert names == {"first-results"}
    assert f"note: {results} was scored on other weights than {made / 'merged'} has now" in printed
    score("mbpp")
    with pytest.raises(UserError, match="mixes results of several checkpoints"):
        rows()
    (results / "gsm8k.json").unlink()
    assert rows()[0] == {"BA-LoRA"}


def write_classification(
    folder, seed, scores, method="ba-lora", task=None, model="microsoft/deberta-v3-base", data="my/train.csv", rank=8
):
    """results.json as finetune_bert_l_sst2.py writes it. scores: by test set, by metric."""
    folder.mkdir(parents=True)
    of = {name: {m: {"value": v, "of": 277, "interval_95": [v - 0.01, v + 0.01]} for m, v in metrics.items()}
          for name, metrics in scores.items()}  # fmt: skip
    content = {
        "results": {name: {"probe": {}, method: metrics} for name, metrics in of.items()},
        "arguments": {"task": task, "model": model, "method": method, "seed": seed, "data": data, "rank": rank},
        "adapter_parameters": 1_327_104,
    }
    (folder / "results.json").write_text(json.dumps(content))


def test_runs_of_the_classification_script_fill_the_glue_table(tmp_path, capsys):
    """Two tasks, three seeds, the published metric of each; MNLI's matched set; what is missing is not run."""
    values = {seed: 0.1 * seed for seed in (1, 2, 3)}
    for seed, value in values.items():
        write_classification(
            tmp_path / f"cola-{seed}", seed, {"dev": {"matthews": value, "accuracy": 0.9}}, task="cola"
        )
        matched = {"validation_matched": {"accuracy": value}, "validation_mismatched": {"accuracy": 0.9}}
        write_classification(tmp_path / f"mnli-{seed}", seed, matched, task="mnli", data=None)
    report.main([str(tmp_path / f"{task}-{seed}") for task in ("mnli", "cola") for seed in values])
    (table,) = tables_of(capsys.readouterr().out).values()
    ours = {row[0]: row for row in table if row[1].startswith("ours")}
    row = dict(zip(table[0], ours["BA-LoRA"], strict=True))
    cell = f"20.00±{100 * statistics.stdev(values.values()):.2f} n = 277"
    assert (row["whose"], row["parameters"]) == ("ours, 3 seeds", "1.33M")
    assert (row["MNLI"], row["CoLA"]) == (cell, cell)
    assert {row[name] for name in ("SST-2", "MRPC", "QNLI", "QQP", "RTE", "STS-B", "average")} == {"not run"}
    assert set(ours) == {"Full FT", "LoRA", "PiSSA", "BA-LoRA"}
    assert [row[0] for row in table if row[1] == "published, arxiv2024"][-1] == "BA-LoRA"


def test_own_classification_data_has_a_column_per_test_set(tmp_path, capsys):
    for method, value in (("lora", 0.5), ("ba-lora", 0.75)):
        write_classification(tmp_path / method, 1, {"test": {"accuracy": value}, "other": {"accuracy": 0.25}}, method)
    (tmp_path / "lora" / "metrics.jsonl").write_text('{"step": 2, "validation": 0.5}\n')  # too short to be logged
    report.main([str(tmp_path / "lora"), str(tmp_path / "ba-lora"), "--output-dir", str(tmp_path / "report")])
    assert not (tmp_path / "report" / "training.png").exists()
    head, *rows = tables_of(capsys.readouterr().out)["microsoft/deberta-v3-base on my/train.csv"]
    assert head[3:] == ["test", "other", "average"]
    assert [[row[0], *row[3:]] for row in rows] == [
        ["LoRA", "50.00 [49.00, 51.00], n = 277", "25.00 [24.00, 26.00], n = 277", "37.50"],
        ["BA-LoRA", "75.00 [74.00, 76.00], n = 277", "25.00 [24.00, 26.00], n = 277", "50.00"],
    ]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"seed": 1}, "are the same run, of BA-LoRA"),
        ({"seed": 2, "rank": 16}, "are no seeds of one BA-LoRA: rank = 8, not 16"),
        ({"seed": 2, "data": "other.csv"}, "no seeds of one BA-LoRA: data = my/train.csv, not other.csv"),
    ],
)
def test_only_seeds_are_averaged(second, message, tmp_path, monkeypatch, capsys):
    write_classification(tmp_path / "a", 1, {"dev": {"accuracy": 0.5}}, task="sst2")
    write_classification(tmp_path / "b", scores={"dev": {"accuracy": 0.7}}, task="sst2", **second)
    assert message in error_of(report, [tmp_path / "a", tmp_path / "b"], monkeypatch, capsys)
    report.main([f"Both={tmp_path / 'a'}", f"Both={tmp_path / 'b'}"])  # whoever names them knows
    assert "60.00±14.14" in capsys.readouterr().out


def test_other_test_sets_and_other_models_are_not_the_published_ones(tmp_path, capsys):
    sets = {"imdb": {"accuracy": 0.5}, "sst2_dev": {"accuracy": 0.75}}
    write_classification(tmp_path / "a", 1, sets, task="sst2")
    write_classification(tmp_path / "b", 1, {"dev": {"accuracy": 0.5}}, task="sst2", model="microsoft/mdeberta-v3-base")
    report.main([str(tmp_path / "a"), str(tmp_path / "b")])
    tables = tables_of(capsys.readouterr().out)
    assert list(tables) == ["microsoft/deberta-v3-base on my/train.csv", "microsoft/mdeberta-v3-base"]
    assert tables["microsoft/deberta-v3-base on my/train.csv"][0][3:5] == ["imdb", "sst2_dev"]
    assert all(not row[1].startswith("published") for rows in tables.values() for row in rows)


def test_a_part_of_the_benchmarks_has_no_average(tmp_path, capsys):
    """One seed shows its interval; fewer items than the benchmark has are named; an unjudged MT-Bench is named."""
    write_summary(tmp_path / "mine", "gsm8k", 0.5, 120, interval=[0.41, 0.59])
    write_summary(tmp_path / "mine", "hendrycks_math", 0.25, 5000, interval=[0.24, 0.26])
    write_summary(tmp_path / "mine", "mt_bench", None, 0)
    report.main([str(tmp_path / "mine")])
    table = tables_of(capsys.readouterr().out)["some/model"]
    head, row = (dict(zip(table[0], cells, strict=True)) for cells in table)
    assert list(head) == ["method", "whose", "parameters", "GSM8K", "MATH", "HumanEval", "MBPP", "MT-Bench", "average"]
    assert (row["method"], row["whose"], row["parameters"]) == ("mine", "ours", "")
    assert (row["GSM8K"], row["MATH"]) == ("50.00 [41.00, 59.00], n = 120", "25.00 [24.00, 26.00]")
    assert (row["HumanEval"], row["MBPP"], row["MT-Bench"]) == ("not run", "not run", "not judged")
    assert row["average"] == "not run"


def test_what_could_not_be_had_is_named_with_its_reason(tmp_path, capsys, monkeypatch):
    """By eval/suite.py's account; a result that came later stands; of three seeds those without a judge are counted."""
    for name in ("gsm8k", "hendrycks_math", "humaneval"):
        write_summary(tmp_path / "mine", name, 0.5, report.NLG[name].items)
    failures = {
        "mt_bench": {"error": "cannot load the data set 'lighteval/mt-bench' from the hub: offline"},
        "mbpp": {"error": "no such data file or folder: ./mbpp.json"},
        "gsm8k": {"error": "an engine that died"},
    }
    (tmp_path / "mine" / "failures.json").write_text(json.dumps(failures))
    report.main([str(tmp_path / "mine"), "--output-dir", str(tmp_path / "report")])
    printed = capsys.readouterr().out
    table = tables_of(printed)["some/model"]
    assert table[1][3:] == ["50.00 [50.00, 50.00]"] * 3 + ["failed"] * 3
    for name, label in (("mt_bench", "MT-Bench"), ("mbpp", "MBPP")):
        assert f"{tmp_path / 'mine'}: {label} failed: {failures[name]['error']}" in printed
    assert "an engine that died" not in printed
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / "failures.json").write_text(json.dumps({"mbpp": failures["mbpp"]}))
    line = error_of(report, [tmp_path / "nothing"], monkeypatch, capsys)
    assert f"no results in {tmp_path / 'nothing'}: mbpp failed: no such data file" in line
    for seed, value in ((1, 5.0), (2, None), (3, 7.0)):
        write_summary(tmp_path / f"seed-{seed}", "mt_bench", value, 80 if value else 0)
    report.main([f"Mine={tmp_path / f'seed-{seed}'}" for seed in (1, 2, 3)])
    row = tables_of(capsys.readouterr().out)["some/model"][1]
    assert [row[0], row[7]] == ["Mine", "6.00±1.41 1 not judged"]


def write_forgetting(folder, value, documents=464, **arguments):
    """forgetting.json as eval/forgetting.py writes it, as far as the report reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    score = {"value": value, "of": documents, "interval_95": [value - 0.01, value + 0.02]}
    content = {"ckpt": "some/model", "adapter": None, "forgetting": score, "arguments": arguments}
    (folder / "forgetting.json").write_text(json.dumps(content))


def test_forgetting_is_a_column_outside_of_the_average(tmp_path, capsys):
    """With its interval and its documents; mean and deviation over seeds; whoever has none is not run."""
    for name, score in (("base", 0.5), ("mine", 0.7)):
        for benchmark, column in report.NLG.items():
            write_summary(tmp_path / name, benchmark, score, column.items)
    write_forgetting(tmp_path / "mine", 0.1234)
    report.main([str(tmp_path / "base"), str(tmp_path / "mine"), "--output-dir", str(tmp_path / "report")])
    printed = capsys.readouterr().out
    head, base, mine = tables_of(printed)["some/model"]
    assert head[-2:] == ["average", "forgetting, nats"]
    assert base[-2:] == ["40.10", "not run"]
    assert mine[-2:] == ["56.14", "+0.123 [+0.113, +0.143], n = 464"]
    assert mine[-2] == f"{(4 * 70 + 0.7) / 5:.2f}"
    assert "Forgetting is the loss after training less that before" in printed
    latex = (tmp_path / "report" / "report.tex").read_text()
    assert "& forgetting, nats " in latex
    for seed, value in ((1, -0.1), (2, 0.3)):
        write_forgetting(tmp_path / f"seed-{seed}", value)
    report.main([f"Mine={tmp_path / f'seed-{seed}'}" for seed in (1, 2)])
    row = tables_of(capsys.readouterr().out)["some/model"][1]
    assert row[1] == "ours, 2 seeds"
    assert row[-1] == f"+0.100±{statistics.stdev([-0.1, 0.3]):.3f} n = 464"
    report.main([])
    assert "orgetting" not in capsys.readouterr().out


def test_forgetting_on_other_texts_is_no_other_seed(tmp_path, monkeypatch, capsys):
    for name, options in (("a", {"data": ["code"]}), ("b", {"data": ["peft"], "seed": 1})):
        write_forgetting(tmp_path / name / "mine", 0.1, **options)
    line = error_of(report, [tmp_path / "a" / "mine", tmp_path / "b" / "mine"], monkeypatch, capsys)
    assert "are no seeds of one mine: data = ['code'], not ['peft']" in line


def test_files_of_the_report(tmp_path, capsys):
    """Markdown as printed, LaTeX with every cell, pictures that are pictures."""
    metrics = tmp_path / "metrics.jsonl"
    lines = [
        {"loss": 2.0 / step, "task": 1.9 / step, "spectral": -0.5, "lambda_spectral": 0.001 * step, "step": step}
        for step in range(1, 6)
    ]
    write_jsonl(metrics, [*lines, {"train_runtime": 1.0, "step": 5}])
    out = tmp_path / "report"
    report.main(["--output-dir", str(out), "--metrics", str(metrics)])
    printed = capsys.readouterr().out
    text = (out / "report.md").read_text()
    assert text.strip() in printed
    latex = (out / "report.tex").read_text()
    for rows in tables_of(text).values():
        for row in rows:
            line = " & ".join(cell.replace("±", r"$\pm$") for cell in row) + r" \\"
            assert re.sub(r" +", " ", line) in re.sub(r" +", " ", latex)
    for name in ("report", "training"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert xml.etree.ElementTree.parse(out / f"{name}.svg").getroot().tag.endswith("svg")
    axes = report.plot_training({"run": report.load_metrics(metrics)}).axes
    series = {line.get_label(): line.get_xydata().tolist() for axis in axes for line in axis.lines}
    assert series["task"] == [[line["step"], line["task"]] for line in lines]
    assert series["λ₃, at most 0.005"] == [[step, pytest.approx(step / 5)] for step in range(1, 6)]


def test_points_of_the_plot():
    """Each published mean and deviation is where the table has it."""
    table = report.make_tables([])[1]
    panels = report.plot_tables([table]).axes
    for panel, name in zip(panels, table.columns, strict=True):
        for place, (row, container) in enumerate(zip(table.rows, panel.containers, strict=True)):
            assert container.lines[0].get_xydata().tolist() == [[row.mean(name), place]]
            ((left, right),) = (segment[:, 0] for segment in container.lines[2][0].get_segments())
            assert (right - left) / 2 == pytest.approx(row.deviation(name))


def test_latex_escapes():
    table = report.Table(r"a_b & 50% \x", report.NLG, [report.Row("m_1")])
    assert r"\caption{a\_b \& 50\% \textbackslash{}x}" in report.latex_report([table])


def test_bad_input(tmp_path, monkeypatch, capsys):
    assert "no results in" in error_of(report, [tmp_path], monkeypatch, capsys)
    (tmp_path / "mbpp.json").write_text('{"pass@1": 3}')
    assert "is damaged: run eval/mbpp.py" in error_of(report, [tmp_path], monkeypatch, capsys)
    (tmp_path / "mbpp.json").unlink()
    (tmp_path / "gsm8k.json").write_text('{"accuracy": {"value": 0.5}}')
    assert "older than this script and lacks accuracy_strict: python eval/gsm8k.py --rescore" in error_of(
        report, [tmp_path], monkeypatch, capsys
    )
    (tmp_path / "results.json").write_text('{"results": {}}')
    assert "is damaged: run finetune_bert_l_sst2.py" in error_of(report, [tmp_path], monkeypatch, capsys)
    assert "cannot read the metrics" in error_of(report, ["--metrics", tmp_path / "none"], monkeypatch, capsys)
    (tmp_path / "empty.jsonl").write_text("")
    assert "holds no training step" in error_of(report, ["--metrics", tmp_path / "empty.jsonl"], monkeypatch, capsys)
    assert "--nonsense" in error_of(report, ["--nonsense"], monkeypatch, capsys)
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.md").write_text("precious")
    assert "is there already" in error_of(report, ["--output-dir", out], monkeypatch, capsys)
    assert (out / "report.md").read_text() == "precious"


def test_the_verdict_compares_intervals():
    def verdict(one: int, other: int, **arguments) -> str:
        summaries = [{"accuracy": intervals.proportion(count, 100), "arguments": {}} for count in (one, other)]
        summaries[1]["arguments"] = arguments
        return report.verdict(dict(zip(("base", "mine"), summaries, strict=True)))

    assert "mine is better than base" in verdict(4, 40)
    assert "mine is worse than base" in verdict(40, 4)
    assert "no difference" in verdict(4, 8)
    assert "limit = None, not 100: no comparison" in verdict(4, 40, limit=100)
    assert "is better" in verdict(4, 40, batch_size=3)
    files = [{"data": "the file's digest"}, {"data": "another"}, {}]
    of = {"accuracy": intervals.proportion(4, 100), "arguments": {"data": "problems.jsonl"}}
    pairs = [report.verdict({"base": of | {"contents": files[0]}, "mine": of | {"contents": other}}) for other in files]
    assert ["another content of --data: no comparison" in text for text in pairs] == [False, True, False]


def test_scores_that_are_not_comparable_are_not_averaged(tmp_path, monkeypatch, capsys):
    """Models that train.py did not make: another prompt, the same folder twice; one folder with two checkpoints."""
    made = {"a": {"prompt": "alpaca"}, "b": {"prompt": "chat"}, "c": {"prompt": "chat", "seed": 1}}
    for name, arguments in made.items():
        write_summary(tmp_path / name / "base", "gsm8k", 0.5, 100)
        path = tmp_path / name / "base" / "gsm8k.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"arguments": {"seed": 0, "limit": 100} | arguments}))

    def error(*names):
        return error_of(report, [tmp_path / name / "base" for name in names], monkeypatch, capsys)

    assert "no seeds of one base: prompt = alpaca, not chat" in error("a", "b")
    assert "are the same run" in error("a", "a")
    write_summary(tmp_path / "c" / "base", "mbpp", 0.5, 500, ckpt="other/model")
    assert "mixes results of several checkpoints: ckpt is some/model (gsm8k), other/model (mbpp)" in error("c")
    (tmp_path / "c" / "base" / "mbpp.json").unlink()
    write_summary(tmp_path / "b" / "base", "mbpp", 0.5, 500)
    report.main([str(tmp_path / name / "base") for name in ("b", "c")])  # two seeds of sampling
    assert "50.00±0.00 n = 100" in capsys.readouterr().out
