"""lm-evaluation-harness's own task crows_pairs_english on pairs of a csv file; run by the python of .venv-harness.

    python tests/harness_crows_pairs.py MODEL PAIRS.csv DTYPE OUT.json

OUT.json gets its two numbers, and every pair's two log-likelihoods.
"""

import json
import sys
from pathlib import Path

import lm_eval
import lm_eval.tasks
import yaml

model, pairs, dtype, out = sys.argv[1:]
theirs = Path(lm_eval.tasks.__file__).parent / "crows_pairs" / "crows_pairs_english.yaml"
task = {
    "include": str(theirs),
    "task": "crows_pairs_of_a_file",
    "tag": None,
    "dataset_path": "csv",
    "dataset_name": None,
    "dataset_kwargs": {"data_files": {"test": pairs}},
}
folder = Path(out).parent / "tasks"
folder.mkdir(exist_ok=True)
(folder / "crows_pairs_of_a_file.yaml").write_text(yaml.safe_dump(task))
results = lm_eval.simple_evaluate(
    model="hf",
    model_args={"pretrained": model, "dtype": dtype},
    tasks=[task["task"]],
    task_manager=lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False),
    device="cpu",
    batch_size=8,
    bootstrap_iters=0,
)
scores = results["results"][task["task"]]
samples = sorted(results["samples"][task["task"]], key=lambda sample: sample["doc_id"])
found = {name: scores[f"{name},none"] for name in ("pct_stereotype", "likelihood_diff")}
found["log_likelihoods"] = [[float(value) for value, *_ in sample["filtered_resps"]] for sample in samples]
Path(out).write_text(json.dumps(found))
