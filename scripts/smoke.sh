#!/bin/sh
# Everything once, in half a minute: a tiny random model is trained for two steps, exported, read back and scored, and a tiny
# classifier too. The numbers mean nothing; an error does. For whoever changes something, before the tests.
#
#     sh scripts/smoke.sh                 --method ba-lora
#     sh scripts/smoke.sh full lora       these methods
set -eu
cd "$(dirname "$0")/.."
if [ -x .venv/bin/python ]; then PATH="$PWD/.venv/bin:$PATH"; fi
export HF_HUB_OFFLINE=1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

quietly() {
    if ! "$@" >"$folder/log" 2>&1; then
        cat "$folder/log" >&2
        echo "failed: $*" >&2
        exit 1
    fi
}

quietly python - "$folder" <<'END'
import json
import sys
from pathlib import Path

from experiments import tiny_models

folder = Path(sys.argv[1])
tiny_models.make("tiny-llama", folder / "llama")
tiny_models.make("tiny-roberta", folder / "roberta")
rows = {
    "chat": ({"instruction": f"Add {i} and 1", "output": f"The answer is: {i + 1}"} for i in range(24)),
    "labels": ({"sentence": f"film {i}" + " good" * (i % 2), "label": i % 2} for i in range(24)),
    "problems": ({"question": f"What is {i} and 1?", "answer": f"#### {i + 1}"} for i in range(4)),
}
for name, lines in rows.items():
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
END
for method in "${@:-ba-lora}"; do
    quietly python train.py --model "$folder/llama" --data "$folder/chat.jsonl" --method "$method" --rank 4 --max-steps 2 \
        --batch-size 4 --save-steps 1 --report-to none --output-dir "$folder/$method"
    echo "train.py --method $method: trained, exported, read back"
done
quietly python eval/gsm8k.py --ckpt "$folder/${1:-ba-lora}/merged" --data "$folder/problems.jsonl" --backend transformers \
    --max-new-tokens 8 --output-dir "$folder/scores"
echo "eval/gsm8k.py: scored"
quietly python finetune_bert_l_sst2.py --model "$folder/roberta" --data "$folder/labels.jsonl" --rank 2 --max-steps 2 \
    --batch-size 4 --output-dir "$folder/classifier"
echo "finetune_bert_l_sst2.py: trained, exported"
echo "smoke: all passed"
