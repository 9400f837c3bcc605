"""What bad input gets: one line that names the thing, exit code 2, before any model is loaded, and nothing lost."""

import errno
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from accelerate.commands import launch
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from conftest import ROOT, make_model
from safetensors.torch import load_file, save_file

import finetune_bert_l_sst2 as nlu
import train
from common import conversations, ranks, validation
from common.cli import RunStopped, UserError, as_words, parse_arguments, run_script
from common.exports import export_adapter
from common.layers import TARGET_MODULES
from common.pretrained import load_model
from common.runs import clear_folder
from common.templates import ALPACA_PROMPT
from common.tensors import kept_in_file
from eval import gsm8k, report, suite
from experiments import make_data


@pytest.fixture(autouse=True)
def no_model_is_loaded(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a model was loaded before the input was checked")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)


def error_of(script, argv, monkeypatch, capsys) -> str:
    """The one line that a script ends with on bad input."""
    monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, argv)])
    with pytest.raises(SystemExit) as exit_info:
        run_script(script.main)
    assert exit_info.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture
def train_error(checkpoint, data_file, tmp_path, monkeypatch, capsys):
    """Runs train.py with valid arguments and the given ones over them; returns the error line."""

    def run(*options, model=checkpoint, data=data_file):
        capsys.readouterr()
        defaults = ["--model", model, "--data", data, "--output-dir", tmp_path / "out", "--rank", 4]
        line = error_of(train, [*defaults, *options], monkeypatch, capsys)
        assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()), "an empty folder was left"
        return line

    return run


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--rnak", "8"], "--rnak"),
        (["--rank", "eight"], "--rank"),
        (["--method", "dora"], "dora"),
        (["--rank", "0"], "--rank is 0"),
        (["--rank", "17"], "rank 17 is larger than"),
        (["--target-modules", "c_attn"], "'c_attn' names no linear layer"),
        (["--temperature", "0"], "--temperature"),
        (["--lambda-spectral", "-1"], "--lambda-spectral"),
        (["--warmup-fraction", "0"], "--warmup-fraction"),
        (["--lr-scheduler", "sine"], "'sine'"),
        (["--lr-scheduler", "reduce_lr_on_plateau"], "one of cosine, linear"),  # needs settings of its own
        (["--max-steps", "0"], "--max-steps is 0"),
        (["--attn-implementation", "magic"], 'attn_implementation="magic"` is not supported'),
        (["--deepspeed", "README.md"], "no DeepSpeed configuration in README.md"),
        (["--deepspeed", "configs/ds_zero2.json"], "needs its launcher"),
        (["--target-modules", "lm_head"], "has its weight in common with the input embeddings"),
        (["--fields", "instruction"], "example 1: instruction is no list of messages"),
        (["--fields", "question", "answer"], "no field 'question'; its fields are instruction, output"),
        (["--max-length", "8"], "no example of"),
        (["--limit", "0"], "--limit"),
        (["--deepspeed", "nowhere.json"], "nowhere.json"),
        *((["--learning-rate", value], f"--learning-rate is {value}") for value in ("nan", "inf", "-1.0")),
        *((["--max-grad-norm", value], f"--max-grad-norm is {value}") for value in ("nan", "-1.0")),
        *((["--weight-decay", value], f"--weight-decay is {value}") for value in ("nan", "-0.1")),
        *(
            ([f"--{name}", "nan"], f"--{name} is nan")
            for name in ("epochs", "temperature", "lambda-diversity", "alpha")
        ),
        (["--seed", "-1"], "--seed is -1"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--resume", "--overwrite"], "--resume goes on with what --overwrite deletes"),
        (["--save-steps", "-1"], "--save-steps"),
        (["--keep-checkpoints", "0"], "--keep-checkpoints"),
        (["--on-nonfinite", "ignore"], "ignore"),
        (["--export-from", "nowhere"], "no config.yaml there"),
        (["--init-adapter", "nowhere"], "nowhere is no adapter in PEFT's format"),
        (["--init-adapter", "nowhere", "--method", "full"], "--init-adapter needs a method with adapters"),
        (["--load-in", "4bit", "--method", "full"], "--load-in quantizes a frozen base"),
        (["--regularize", "--method", "full"], "--regularize needs a method with adapters"),
        (
            ["--validation-data", "e.jsonl", "--eval-share", "0.1"],
            "--validation-data and --eval-share both choose the held-out examples",
        ),
        (["--eval-share", "1"], "--eval-share is 1.0: it must be above 0 and below 1"),
        (["--eval-share", "0"], "--eval-share is 0.0"),
        (["--eval-share", "0.99"], "leaves none to train on"),
        (["--validation-data", "nowhere.jsonl"], "no such data file or folder: nowhere.jsonl"),
        (["--eval-share", "0.1", "--eval-steps", "0"], "--eval-steps is 0"),
        (["--eval-share", "0.1", "--patience", "0"], "--patience is 0"),
        (["--seed", "4294967296"], "--seed is 4294967296"),
        (["--lr-scheduler", "polynomial", "--learning-rate", "1e-7"], "--learning-rate must be above"),
        (["--lr-scheduler", "cosine_with_min_lr"], "unknown --lr-scheduler 'cosine_with_min_lr': one of cosine"),
        (["--keep-best"], "--keep-best needs a validation"),
        (["--patience", "2"], "--patience needs a validation"),
        (["--sample-prompts", "README.md"], "--sample-prompts are answered at validations"),
        (["--eval-share", "0.1", "--sample-prompts", "nowhere.txt"], "cannot read --sample-prompts nowhere.txt"),
        (["--report-to", "trackr"], "unknown --report-to 'trackr'"),
        (["--report-to", "clearml"], "--report-to clearml: its package is not installed or not set up"),
        (["--report-to", "none", "tensorboard"], "--report-to none cannot be combined"),
        (["--push-to-hub", "me/a/b"], "--push-to-hub"),
        (["--push-to-hub", "me/mine", "--method", "full"], "--method full has none"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments(options, expected, train_error, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert expected in train_error(*options)


def test_held_out_data_that_does_not_serve(train_error, tmp_path, monkeypatch):
    """An empty file; fields of another name; no prompt; a prompt that is none; whole weights that ZeRO-3 has not."""
    held_out, prompts = tmp_path / "held_out.jsonl", tmp_path / "prompts.jsonl"
    held_out.write_text("")
    assert str(held_out) in train_error("--validation-data", held_out)
    held_out.write_text('{"question": "a", "answer": "b"}\n')
    assert "held_out.jsonl has no field 'instruction'" in train_error("--validation-data", held_out)
    held_out.write_text('{"instruction": "a", "output": " "}\n')
    assert f"no example of {held_out} has a response token" in train_error("--validation-data", held_out)
    for text, expected in (
        ("\n", "holds no prompt"),
        ('"one"\n{"text": "two"}\n', "line 2: no text in the field 'instruction' or 'prompt'"),
        ("one\n", "line 1 is no JSON"),
        ('{"instruction": "' + "x" * 600 + '"}\n', "prompt 1 fills --max-length"),
    ):
        prompts.write_text(text)
        assert expected in train_error("--eval-share", 0.5, "--sample-prompts", prompts)
    rows = (tmp_path / "data.jsonl").read_text().splitlines(keepends=True)
    held_out.write_text("".join(reversed(rows)))  # the training data in another order
    assert f"{held_out} has exactly the examples of the training" in train_error("--validation-data", held_out)
    prompts.write_text('{"prompt": "one"}\n')
    zero3 = ("--deepspeed", ROOT / "configs" / "ds_zero3.json")
    assert "ZeRO-3 splits them" in train_error("--eval-share", 0.5, "--sample-prompts", prompts, *zero3)


def test_a_table_of_positions_bounds_the_length_and_rotary_ones_are_told(train_error, tmp_path, checkpoint, capsys):
    sizes = {"vocab_size": 258, "hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.OPTForCausalLM(
        transformers.OPTConfig(**sizes, word_embed_proj_dim=16, max_position_embeddings=64)
    )
    model.save_pretrained(tmp_path / "opt")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoint / name, tmp_path / "opt")
    assert "--max-length is 65, and" in train_error("--max-length", 65, model=tmp_path / "opt")
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    twice = tmp_path / "twice.jsonl"
    twice.write_text('{"instruction": "x", "output": "y"}\n' * 2)
    train.main(["--model", str(checkpoint), "--data", str(twice), "--eval-share", "0.5", "--rank", "4", "--dry-run"])
    printed = capsys.readouterr().out
    length = len(ALPACA_PROMPT.format(instruction="x")) + len("y") + 1  # a token a byte, and the end
    assert f"the longest example has {length} tokens, the model 64 positions" in printed
    assert "note: 1 of the 1 examples of what is held out are trained on too" in printed


def test_a_port_that_another_run_has_is_one_line(monkeypatch, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        monkeypatch.setattr(sys, "argv", ["train.py"])
        with pytest.raises(SystemExit) as exit_info:
            ranks.run_rank(lambda argv: torch.distributed.TCPStore("127.0.0.1", port, 2, is_master=True))
    assert exit_info.value.code == 2
    assert f"error: port {port} is in use" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "setting"),
    [
        (["--use_deepspeed", "--zero_stage", "3"], "use_deepspeed to true"),
        (["--use_fsdp"], "use_fsdp to true"),
        (["--dynamo_backend", "eager"], "dynamo_backend to EAGER"),
        (["--mixed_precision", "bf16"], "mixed_precision to bf16"),
        ([], None),
    ],
)
def test_settings_of_accelerate_launch_are_refused_and_its_ranks_are_not(options, setting, monkeypatch):
    """The variables are those that accelerate's own launcher makes of its command line."""
    words = ["--num_processes", "2", "--num_machines", "1", *options, "x.py"]
    parsed, *_ = launch._validate_launch_command(launch.launch_command_parser().parse_args(words))
    parsed.deepspeed_fields_from_accelerate_config = ""
    made = prepare_deepspeed_cmd_env(parsed)[1] if parsed.use_deepspeed else prepare_multi_gpu_env(parsed)
    for name in [name for name in made if name.startswith("ACCELERATE_")]:
        monkeypatch.setenv(name, made[name])
    if setting is None:
        assert "ACCELERATE_DYNAMO_BACKEND" in made
        assert ranks.start_ranks(SimpleNamespace(deepspeed=None)).num_processes == 1
    else:
        with pytest.raises(UserError, match=f"accelerate launch sets {setting}, which is not followed here"):
            ranks.start_ranks(SimpleNamespace(deepspeed=None))


RESTART = """
import os, sys
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    sys.exit(1)
import train
from common.ranks import run_rank
run_rank(train.main)
"""


@pytest.mark.parametrize(("name", "value"), [("WORLD_SIZE", "2"), ("RANK", "1")])
@pytest.mark.parametrize("script", [train, nlu])
def test_ranks_that_no_launcher_started_are_refused(script, name, value, tmp_path, checkpoint, monkeypatch, capsys):
    """As a job's operator sets them around a plain `python train.py`, or a shell that still has them. A dry run may."""
    monkeypatch.setenv(name, value)
    words = ["--model", checkpoint, "--data", "demo", "--output-dir", tmp_path / "out"]
    said = f"{name} is {value}, and no launcher started this process"
    assert said in error_of(script, words, monkeypatch, capsys)
    words += ["--method", "full"] if script is nlu else ["--rank", 4, "--fields", "question", "response"]
    script.main([*map(str, words), "--dry-run"])
    assert "steps" in capsys.readouterr().out


def test_an_automatic_restart_deletes_nothing(tmp_path, checkpoint, data_file, train_error, monkeypatch):
    """By Slurm's variable, and by the real torchrun with the variable that it sets."""
    with monkeypatch.context() as patch:
        patch.setenv("SLURM_RESTART_COUNT", "1")
        assert "this is a restart (SLURM_RESTART_COUNT is 1)" in train_error("--overwrite")
    (tmp_path / "failing.py").write_text(RESTART)
    (tmp_path / "out" / "checkpoints" / "checkpoint-5").mkdir(parents=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", "1", "failing.py"]
    command += ["--model", checkpoint, "--data", data_file, "--output-dir", tmp_path / "out", "--overwrite"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "error: this is a restart (TORCHELASTIC_RESTART_COUNT is 1)" in done.stderr
    assert "give --resume from the first start on" in done.stderr
    assert (tmp_path / "out" / "checkpoints" / "checkpoint-5").is_dir()


def test_a_cached_factor_that_cannot_be_written_is_one_line_and_a_damaged_one_is_made_again(tmp_path, capsys):
    """A file of at most 100 bytes stands for a full disk; zeros are what a power cut leaves."""
    path, made = tmp_path / "cache" / "k.safetensors", (torch.arange(900.0).view(3, 300), torch.ones(9))
    what = (path, ("A", "B"), lambda: made, torch.device("cpu"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(RunStopped, match=r"cannot write .*make room, or name another folder"):
            kept_in_file(*what)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(path.parent.iterdir()) == []
    path.write_bytes(b"\0" * 500)
    assert all(map(torch.equal, kept_in_file(*what), made))
    assert f"{path} is damaged" in capsys.readouterr().err
    assert torch.equal(load_file(path)["A"], made[0])


def test_a_folder_that_cannot_be_emptied_is_one_line(tmp_path, monkeypatch):
    """As on NFS, where an open file stays in its folder."""

    def rmdir(path, *_, **__):
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))

    (tmp_path / "out" / "tensorboard").mkdir(parents=True)
    monkeypatch.setattr(os, "rmdir", rmdir)
    with pytest.raises(RunStopped, match=r"cannot empty .*out \(Directory not empty: .*tensorboard"):
        clear_folder(tmp_path / "out")


@pytest.mark.parametrize("variable", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"])
def test_more_ranks_than_gpus_are_refused_under_either_launcher(variable, monkeypatch):
    """torchrun sets the first variable, `deepspeed` the second."""
    monkeypatch.setenv(variable, "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="3 ranks on this machine, and torch sees 2 GPUs"):
        ranks.choose_device()


def test_a_disk_that_takes_no_file_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as exit_info:
        run_script(lambda argv: Path("/dev/full").write_text("x"))
    assert exit_info.value.code == 1
    assert capsys.readouterr().err == "train.py: stopped: No space left on device\n"


def test_a_push_without_a_token(train_error, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "needs a token of the hub: type `hf auth login`" in train_error("--push-to-hub", "me/mine")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can quantize")
def test_quantization_without_a_gpu(train_error):
    assert "needs a CUDA GPU" in train_error("--load-in", "8bit")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"hidden_size": 64}, "has another size than this model's"),
        ({"num_hidden_layers": 1}, "has no factors for model.layers.1"),
        ({"num_hidden_layers": 3}, "has factors for model.layers.2"),
    ],
)
def test_an_adapter_of_another_model(overrides, expected, train_error, tmp_path):
    other = make_model(**overrides)
    train.add_adapters(other, "pissa", 4, 4, TARGET_MODULES)
    export_adapter(train.adapter_layers(other), tmp_path / "adapter", "other", TARGET_MODULES, "CAUSAL_LM")
    assert expected in train_error("--init-adapter", tmp_path / "adapter")


@pytest.mark.parametrize(
    "shapes", [((0,), (0,)), ((4, 32), None), (None, (32, 4)), ((8, 32), (32, 8)), ((4, 32), (32, 2))]
)
def test_an_adapter_whose_factors_are_not_of_its_rank(shapes, train_error, tmp_path):
    """ZeRO-3's empty parts among them."""
    folder = saved_adapter(tmp_path / "adapter")
    names = [f"base_model.model.model.layers.1.self_attn.q_proj.lora_{which}.weight" for which in "AB"]
    tensors = load_file(folder / "adapter_model.safetensors")
    assert [tuple(tensors.pop(name).shape) for name in names] == [(4, 32), (32, 4)]
    tensors |= {name: torch.zeros(shape) for name, shape in zip(names, shapes, strict=True) if shape is not None}
    save_file(tensors, folder / "adapter_model.safetensors")
    error = train_error("--init-adapter", folder)
    assert "model.layers.1.self_attn.q_proj, not two matrices of rank 4" in error
    assert all(str(shape) in error for shape in shapes if shape is not None)


def test_a_run_without_a_checkpoint_has_nothing_to_export(train_error, tmp_path):
    (tmp_path / "run" / "checkpoints" / "checkpoint-3").mkdir(parents=True)  # begun, never completed
    (tmp_path / "run" / "config.yaml").write_text("rank: 4\n")
    assert "no complete checkpoint" in train_error("--export-from", tmp_path / "run", "--output-dir", tmp_path / "new")


def saved_adapter(folder, **settings):
    """A LoRA that PEFT has started on the tiny model."""
    model = peft.get_peft_model(make_model(), peft.LoraConfig(r=4, **({"target_modules": ["q_proj"]} | settings)))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"init_lora_weights": "olora"}, "olora changed the base's weights"),
        ({"modules_to_save": ["norm"]}, "from factors of linear layers only, not base_model.model"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens"),
        ({"alora_invocation_tokens": [3]}, "not alora_invocation_tokens"),
    ],
    ids=str,
)
def test_an_adapter_that_is_more_than_factors(settings, expected, train_error, tmp_path):
    """Started from without what is left out, the model would be another one."""
    assert expected in train_error("--init-adapter", saved_adapter(tmp_path / "adapter", **settings))


def test_data_that_is_no_text(train_error, tmp_path):
    data = tmp_path / "data.jsonl"
    for value, kind in ((["a", "b"], "list"), ({"role": "user"}, "dict")):
        data.write_text(json.dumps({"instruction": "x", "output": value}) + "\n")
        assert f"the field 'output' holds no text but {kind}" in train_error(data=data)


def test_a_finished_run_stays(tmp_path, train_error):
    """--resume with other settings and no checkpoint to compare them with."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text("{}")
    for text, expected in (("rank: 8\n", "holds a run with rank = 8, not 4"), ("- 1\n", "config.yaml is damaged")):
        (tmp_path / "out" / "config.yaml").write_text(text)
        assert expected in train_error("--resume")
        assert (tmp_path / "out" / "config.yaml").read_text() == text


def test_a_disk_too_small_for_the_teacher_cache(train_error, tmp_path, monkeypatch):
    """Told before the model is loaded, and nothing is written."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=10))
    assert "and the disk has 0.00 left" in train_error("--teacher-cache", tmp_path / "states")
    assert not (tmp_path / "states").exists()


def test_no_model_and_no_data(monkeypatch, capsys):
    assert "no --model" in error_of(train, [], monkeypatch, capsys)
    assert "no --data" in error_of(train, ["--model", "m"], monkeypatch, capsys)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rnak: 8\n", "unknown key 'rnak'"),
        ("rank: many\n", "--rank"),
        ("- rank\n", "is not a configuration"),
        ("rank: [\n", "cannot read the configuration"),
        ("seed: 1\nrank: 4\nseed: 2\n", "the key 'seed' stands twice in"),
        ("learning_rate: 1e-4\nlearning-rate: 5e-4\n", "the key 'learning_rate' stands twice in"),
        ("max_examples: 3\nlimit: 4\n", "the key 'limit' stands twice in"),
        *((f"{key}: {null}\n", f"the key '{key}' in") for key in ("max_length", "split") for null in ("null", "~", "")),
        ("fields: []\n", "--fields takes instruction and response, or one name, not 0"),
        ("max_length: 8:32\n", "--max-length"),  # 512 to the base 60, by YAML 1.1
    ],
)
def test_bad_configurations(text, expected, train_error, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(text)
    assert expected in train_error("--config", config)


def test_an_unknown_key_gets_the_nearest_name(train_error, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("learning_rat: 1e-4\n")
    assert "did you mean 'learning_rate'?" in train_error("--config", config)


def test_the_command_line_overrides_the_configuration(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("rank: 8\nlearning_rate: 1e-4\nfields: [a, b]\noverwrite: true\nalpha: null\n")
    args = parse_arguments(train.Arguments, "", ["--config", str(config), "--rank", "16"])
    assert (args.rank, args.learning_rate, args.fields, args.overwrite, args.alpha) == (
        16,
        1e-4,
        ["a", "b"],
        True,
        None,
    )


@pytest.mark.parametrize("text", ["1.10", "no", "2023_11", "0123", "12:30", "0x10", "1e3", "2023-11-01", "true", ".5"])
def test_a_text_of_the_configuration_is_what_stands_there(text, tmp_path):
    """As it is typed after the option's name, whatever type YAML gives it."""
    (tmp_path / "config.yaml").write_text(f"output_dir: {text}\ndata_config: {text}\nfields: [{text}, '{text}']\n")
    args = parse_arguments(train.Arguments, "", ["--config", str(tmp_path / "config.yaml")])
    assert (args.output_dir, args.data_config, args.fields) == (text, text, [text, text])


@pytest.mark.parametrize(
    ("script", "argv", "name"),
    [
        (nlu, ["--fields", "premise", "--fields", "hypothesis"], "fields"),
        (nlu, ["--test-data=a.csv", "--test_data", "b.csv"], "test-data"),
        (nlu, ["--eval-data", "a.csv", "--seed", "1", "--test-data", "b.csv"], "test-data"),  # its old name
        (train, ["--target-modules", "q_proj", "--target-modules", "v_proj"], "target-modules"),
        (suite, ["--benchmarks", "gsm8k", "--benchmarks", "mbpp"], "benchmarks"),
        (make_data, ["noise", "out", "--fields", "a", "--fields", "b"], "fields"),
    ],
)
def test_a_list_that_stands_twice_loses_no_value(script, argv, name, monkeypatch, capsys):
    assert f"--{name} stands twice: give all its values after one --{name}" in error_of(
        script, argv, monkeypatch, capsys
    )


def test_the_last_of_two_single_values_counts_and_a_list_replaces_the_configurations(tmp_path):
    (tmp_path / "config.yaml").write_text("fields: [a, b]\nseed: 1\n")
    words = ["--config", str(tmp_path / "config.yaml"), "--fields", "c", "--seed", "2", "--seed", "3"]
    args = parse_arguments(train.Arguments, "", words)
    assert (args.fields, args.seed) == (["c"], 3)
    words = as_words({"target-modules": ["q_proj"], "seed": 1, "rank": 2}, ["--target_modules", "v_proj", "--rank=4"])
    args = parse_arguments(train.Arguments, "", words)  # an experiment's settings, and what its user types after --
    assert (args.target_modules, args.seed, args.rank) == (["v_proj"], 1, 4)


def test_data_that_is_not_there(train_error, tmp_path):
    (tmp_path / "data.txt").write_text("a b")
    assert "cannot tell the format" in train_error(data=tmp_path / "data.txt")
    assert "no such data file" in train_error(data=tmp_path / "nowhere.jsonl")
    (tmp_path / "empty").mkdir()
    assert "holds no" in train_error(data=tmp_path / "empty")
    (tmp_path / "splits" / "metamath").mkdir(parents=True)
    (tmp_path / "splits" / "metamath" / "test.jsonl").write_text("{}\n")
    assert "has files of test and none of 'train'" in train_error(data=tmp_path / "splits")
    assert "choose by --split" in train_error("--data-subset", "metamath", "--split", "dev", data=tmp_path / "splits")
    assert "from the hub" in train_error(data="nobody/nothing")


def test_an_option_that_chooses_nothing_in_the_data(train_error, tmp_path, data_file):
    """A file is read whole, and a folder by its own folders and, where files are named after splits, by these."""
    (tmp_path / "folder" / "part").mkdir(parents=True)
    (tmp_path / "folder" / "part" / "a.jsonl").write_text(data_file.read_text())
    refused = {("--split", "test[:0]"), ("--data-subset", "metamath"), ("--data-config", "main")}
    for source, options in ((data_file, refused), (tmp_path / "folder", refused - {("--data-subset", "metamath")})):
        for option in options:
            assert f"{' '.join(option)} chooses nothing in {source}" in train_error(*option, data=source)
    found = conversations.load_training_records(train.Arguments(data=str(tmp_path / "folder"), data_subset="part"))
    assert len(found) == len(data_file.read_text().splitlines())
    for held_out in (data_file, tmp_path / "folder"):  # held-out data has no option of its own, and is read whole
        args = train.Arguments(data="nobody/nothing", split="dev", data_config="x", validation_data=str(held_out))
        assert len(conversations.load_training_records(validation.arguments_of_validation_data(args))) == len(found)


def test_overwrite_deletes_nothing_that_the_run_reads(train_error, tmp_path, data_file):
    (tmp_path / "out").mkdir()
    inside = tmp_path / "out" / "data.jsonl"
    inside.write_text(data_file.read_text())
    assert "which --overwrite would delete" in train_error("--overwrite", data=inside)
    (tmp_path / "out" / "mine.yaml").write_text("rank: 4\n")
    assert "mine.yaml, which --overwrite" in train_error("--overwrite", "--config", tmp_path / "out" / "mine.yaml")
    (tmp_path / "out" / "states").mkdir()
    assert "states, which --overwrite" in train_error("--overwrite", "--teacher-cache", tmp_path / "out" / "states")
    assert inside.read_text() == data_file.read_text()


def test_weights_that_cannot_be_had(train_error, monkeypatch):
    """What transformers raises for a hub model without safetensors."""

    def refuse(*args, use_safetensors, **kwargs):
        assert use_safetensors
        raise OSError("nobody/pickled does not appear to have a file named model.safetensors\nPlease do not")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    assert "cannot load the model" in train_error()


def test_weights_under_other_names(checkpoint, monkeypatch):
    """As DistributedDataParallel names them: transformers would go on with a random model."""
    monkeypatch.undo()  # the model is loaded here
    weights = load_file(checkpoint / "model.safetensors")
    save_file({f"module.{name}": tensor for name, tensor in weights.items()}, checkpoint / "model.safetensors")
    args = train.Arguments(model="mine")
    with pytest.raises(UserError, match=r"lack .* in this form.*; they have module.model.embed_tokens.weight, which"):
        load_model(args, str(checkpoint), torch.float32)


def test_a_model_of_another_kind(train_error, checkpoint):
    """An encoder-decoder cannot be trained as a causal language model."""
    config = transformers.T5Config(vocab_size=258, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
    transformers.T5ForConditionalGeneration(config).save_pretrained(checkpoint)
    assert "is an encoder with a decoder (t5): only decoders can be trained" in train_error()


def test_a_folder_of_mixed_formats(train_error, tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    for name in ("a.jsonl", "b.csv"):
        (folder / name).write_text("")
    assert "mixes kinds of files" in train_error(data=folder)


def test_checkpoints_that_cannot_be_read(train_error, checkpoint, tmp_path):
    assert "no such model folder" in train_error(model=tmp_path / "nowhere")
    assert "nobody/nothing" in train_error(model="nobody/nothing")
    (tmp_path / "empty").mkdir()
    assert "no config.json" in train_error(model=tmp_path / "empty")
    weights = checkpoint / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "is damaged" in train_error()
    weights.rename(checkpoint / "pytorch_model.bin")
    assert "no .safetensors file" in train_error()
    weights.write_bytes(whole)
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "lacks model-00002.safetensors" in train_error()
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    for text in ("", pointer, "{}", "[]", '{"weight_map": ["a"]}', '{"weight_map": {"a": {}}}', "\udcff"):
        (checkpoint / "model.safetensors.index.json").write_text(text, errors="surrogateescape")
        assert "model.safetensors.index.json is no index of weights" in train_error(), text


def test_nothing_is_overwritten_without_being_asked(train_error, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("precious")
    assert "is not empty" in train_error()
    # Even with --overwrite, a later mistake is found before anything is removed.
    assert "--rank is 0" in train_error("--overwrite", "--rank", "0")
    assert "no field" in train_error("--overwrite", "--fields", "a", "b")
    assert (tmp_path / "out" / "precious.txt").read_text() == "precious"
    (tmp_path / "file").write_text("")
    assert "is a file" in train_error("--output-dir", tmp_path / "file")


@pytest.fixture
def gsm8k_error(checkpoint, tmp_path, monkeypatch, capsys):
    """Runs eval/gsm8k.py with valid arguments and the given ones over them; returns the error line."""
    problems = tmp_path / "problems.jsonl"
    problems.write_text(json.dumps({"question": "1 + 1?", "answer": "#### 2"}) + "\n")

    def run(*options, ckpt=checkpoint, data=problems):
        capsys.readouterr()
        defaults = ["--ckpt", ckpt, "--data", data, "--output-dir", tmp_path / "results"]
        return error_of(gsm8k, [*defaults, "--max-new-tokens", 8, *options], monkeypatch, capsys)

    return run


def test_bad_input_of_gsm8k(gsm8k_error, data_file, tmp_path, monkeypatch, capsys):
    assert "no --ckpt" in error_of(gsm8k, [], monkeypatch, capsys)
    assert "no such model folder" in gsm8k_error(ckpt=tmp_path / "nowhere")
    assert "no such data file" in gsm8k_error(data=tmp_path / "nowhere.jsonl")
    assert "no field 'question'" in gsm8k_error(data=data_file)
    assert "no field 'response'" in gsm8k_error("--loss-field", "response")
    assert "--limit is 0" in gsm8k_error("--limit", "0")
    assert "--max-new-tokens is 0" in gsm8k_error("--max-new-tokens", "0")
    assert "holds 512 tokens" in gsm8k_error("--max-new-tokens", "4000")
    no_gold = tmp_path / "no_gold.jsonl"
    no_gold.write_text(json.dumps({"question": "1 + 1?", "answer": "two"}) + "\n")
    assert "item 0" in gsm8k_error(data=no_gold)
    assert not (tmp_path / "results").exists()
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "gsm8k.json").write_text("precious")
    assert "is there already" in gsm8k_error()
    assert (tmp_path / "results" / "gsm8k.json").read_text() == "precious"


def test_bad_input_of_the_report(tmp_path, monkeypatch, capsys):
    assert "no results in" in error_of(report, [tmp_path], monkeypatch, capsys)
    (tmp_path / "gsm8k.json").write_text("{")
    assert "is damaged" in error_of(report, [tmp_path], monkeypatch, capsys)


def test_the_whole_script_prints_one_line_and_exits_with_2(tmp_path):
    """The real process: nothing but the line, no traceback."""
    command = [sys.executable, str(ROOT / "train.py"), "--model", "m", "--data", "d", "--rank", "-1"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.strip().splitlines() == ["train.py: error: --rank is -1: it must be above 0"]
    assert result.stdout == ""


def test_a_wrong_method_of_the_shell_script():
    result = subprocess.run(
        ["sh", str(ROOT / "scripts/ba-lora.sh")], env={"METHOD": "dora", "PATH": "/usr/bin:/bin"}, capture_output=True
    )
    assert result.returncode == 2
    assert b"METHOD=dora" in result.stderr


@pytest.mark.parametrize("script", ["ba-lora.sh", "pissa.sh", "lora.sh", "full-ft.sh"])
def test_a_shell_script_goes_on_in_a_folder_that_is_named(script):
    """By itself it would name a new folder after the time, and start anew there."""
    command = ["sh", str(ROOT / "scripts" / script), "--seed", "1", "--resume"]
    started = {"PATH": "/usr/bin:/bin", "DRY_RUN": "1", "NUM_GPUS": "0"}
    refused = subprocess.run(command, env=started, capture_output=True, text=True)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "--resume goes on in a folder: OUTPUT=output/NAME" in refused.stderr
    taken = subprocess.run(command, env=started | {"OUTPUT": "output/x"}, capture_output=True, text=True)
    assert taken.returncode == 0, taken.stderr
    (training,) = (line for line in taken.stdout.splitlines() if "train.py" in line)
    assert "--output-dir output/x " in training and training.endswith("--resume")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ([1], "no JSON object"),
        ({}, "zero_optimization.stage is None"),
        ({"zero_optimization": {"stage": "2"}}, "zero_optimization.stage is '2'"),
        ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage is 0"),
        ({"fp16": {"enabled": True}}, "switches fp16 on"),
        ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, "switches torch_autocast on"),
        ({"optimizer": {"type": "AdamW"}}, "optimizer of its own"),
        ({"scheduler": {"type": "WarmupDecayLR"}}, "a scheduler of its own"),
        ({"gradient_clipping": 0.5}, "gradient_clipping is 0.5, and --max-grad-norm says 1.0"),
        ({"train_micro_batch_size_per_gpu": 8}, "and --batch-size says 4"),
        ({"gradient_accumulation_steps": 3}, "and --gradient-accumulation says 2"),
        ({"train_batch_size": 9}, "train_batch_size is 9, and --batch-size and --gradient-accumulation says 8"),
        ({"bf16": {"enabled": True}}, "and --dtype makes it False"),
    ],
)
def test_a_deepspeed_configuration_contradicts_no_option(change, expected, tmp_path):
    path = tmp_path / "ds.json"
    config = json.loads((ROOT / "configs" / "ds_zero2.json").read_text())
    path.write_text(json.dumps(config | change if change and isinstance(change, dict) else change))
    args = train.Arguments(model="m", data="d", deepspeed=str(path))
    with pytest.raises(UserError) as error:
        ranks.deepspeed_config(args, 2, False, 64)
    assert expected in str(error.value)


def test_what_a_deepspeed_configuration_leaves_out_follows_from_the_options(tmp_path):
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 3}, "gradient_clipping": "auto"}')
    args = train.Arguments(model="m", data="d", deepspeed=str(tmp_path / "ds.json"))
    config = ranks.deepspeed_config(args, 2, True, 64)
    assert (config["gradient_clipping"], config["train_batch_size"], config["bf16"]["enabled"]) == (1.0, 8, True)
    assert config["zero_optimization"]["reduce_bucket_size"] == 64 * 64
    assert "auto" not in json.dumps(config)


@pytest.mark.parametrize(
    ("script", "old", "name"),
    [
        (train, ["--eval-data", "held.jsonl"], "validation_data"),
        (train, ["--max_examples=3"], "limit"),
        (nlu, ["--eval-data", "a.csv", "b.csv"], "test_data"),
        (nlu, ["--max-examples", "3"], "limit"),
    ],
)
def test_an_options_old_name_still_works_and_says_the_new_one(script, old, name, tmp_path, capsys):
    """On the command line and in a configuration; the same as under the new name."""
    option = f"--{name.replace('_', '-')}"
    typed, values = old[0].partition("=")[0], [*old[0].partition("=")[2:], *old[1:]]
    values = [value for value in values if value]
    expected = parse_arguments(script.Arguments, "", [option, *values])
    assert capsys.readouterr().err == ""
    note = f"note: {typed} is called {option} now"
    assert parse_arguments(script.Arguments, "", old) == expected
    assert note in capsys.readouterr().err
    config = tmp_path / "old.yaml"
    config.write_text(f"{typed.strip('-')}: {values if len(values) > 1 else values[0]}\n")
    of_file = parse_arguments(script.Arguments, "", ["--config", str(config)])
    assert getattr(of_file, name) == getattr(expected, name)
    assert "is called" in capsys.readouterr().err
