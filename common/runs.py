"""A run's output folder: whether it may be written to, its settings and versions. Records of many runs."""

import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from common.cli import RunStopped, UserError, first_line


def require_output_dir(args: Any, may_hold: bool, remedy: str, *inputs: str | None) -> None:
    """Raises UserError where --output-dir is a file, or is not empty though it has to be, or holds one of the `inputs`
    or the working directory, which --overwrite would delete."""
    path = Path(args.output_dir)
    if path.exists() and not path.is_dir():
        raise UserError(f"--output-dir {path} is a file")
    if path.is_dir() and {entry.name for entry in path.iterdir()} - {LOCK} and not may_hold:
        raise UserError(f"--output-dir {path} is not empty: {remedy}")
    for name in (".", *filter(None, inputs)):
        if args.overwrite and Path(name).exists() and Path(name).resolve().is_relative_to(path.resolve()):
            what = "the working directory" if name == "." else name
            raise UserError(f"--output-dir {path} holds {what}, which --overwrite would delete: name another folder")


def clear_folder(folder: Path) -> None:
    """Makes `folder`, or empties it, but for the lock of the run that does so.

    Raises:
        RunStopped: something there cannot be deleted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()
    except OSError as error:  # on NFS a file that is open elsewhere stays under another name
        where = error.filename or path
        raise RunStopped(f"cannot empty {folder} ({error.strerror}: {where}): is a file there in use?") from error


# Options that may change when a run is resumed: its paths, its further outputs, and its use of the machine.
NOT_IDENTITY = {"config", "output_dir", "overwrite", "dry_run", "dry_run_gpu", "export_from", "resume", "save_steps"}
NOT_IDENTITY |= {"keep_checkpoints", "on_nonfinite", "logging_steps", "init_cache", "teacher_cache", "deepspeed"}
NOT_IDENTITY |= {"dtype", "attn_implementation", "packing", "objective_memory", "token_kernel"}
NOT_IDENTITY |= {"gradient_checkpointing", "trust_remote_code", "skip_done", "scale", "scale_tolerance"}
NOT_IDENTITY |= {"sample_prompts", "report_to", "push_to_hub", "accept_changes"}


def first_difference(
    theirs: Mapping[str, Any], ours: Mapping[str, Any], but: Collection[str] = (), *, common: bool = False
) -> str | None:
    """The first difference between the settings of existing results and `ours`, in a few words; None without any.

    Args:
        but: names that may differ.
        common: compare only the names that both have, not all of ours.
    """
    for name, value in ours.items():
        if name not in but and (name in theirs or not common) and theirs.get(name) != value:
            return f"{name} = {theirs.get(name)}, not {value}"
    return None


DATA = ("data", "validation_data", "test_data")  # a training's options that name files


def sha256(file: Path) -> str:
    """The SHA-256 of a file's content."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def contents_of(args: Any, names: Iterable[str] = DATA) -> dict[str, str]:
    """By argument, a digest of the files on this disk that it names; an argument that names a hub's data has none."""
    from common.tables import data_files

    found = {}
    for name in names:
        given = getattr(args, name, None) or []
        digests = []
        for path in map(Path, [given] if isinstance(given, str) else given):
            digests += map(sha256, data_files(path)[0] if path.is_dir() else [path] if path.is_file() else [])
        if digests:
            found[name] = hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:32]
    return found


def changed_content(one: Mapping[str, Any], other: Mapping[str, Any], but: Collection[str] = ()) -> str | None:
    """The first argument with different files in the two summaries, in a few words; None without any. Older summaries
    lack the digests, and are not compared.

    Args:
        but: arguments that may differ.
    """
    ours, theirs = one.get("contents") or {}, other.get("contents") or {}
    changed = [name for name in ours if name in theirs and name not in but and ours[name] != theirs[name]]
    return f"another content of --{changed[0].replace('_', '-')}" if changed else None


def config_text(args: Any) -> str:
    """The resolved arguments as YAML that `--config` takes."""
    once = ("config", "overwrite", "skip_done", "resume", "dry_run", "dry_run_gpu", "export_from", "scale")
    once += ("scale_tolerance",)
    entries = {name: value for name, value in dataclasses.asdict(args).items() if name not in once}
    return "# Every argument of this run, for --config.\n" + yaml.safe_dump(entries, sort_keys=False)


def require_same_run(output_dir: Path, args: Any, summary: Mapping[str, Any], but: Collection[str] = ()) -> None:
    """Raises a UserError where the finished run in `output_dir` was made with other settings than `args`, `but` for
    these names, or with other data in the same files.

    Args:
        summary: the results that the run wrote at its end.
    """
    # Values that the finished run filled in.
    open_ones = {name for name in ("target_modules", "template") if getattr(args, name, None) is None}
    try:
        made = dict(yaml.safe_load((output_dir / "config.yaml").read_text()))
        difference = first_difference(made, dataclasses.asdict(args), NOT_IDENTITY | open_ones | {*but}, common=True)
    except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{output_dir / 'config.yaml'} is damaged: replace the run with --overwrite") from error
    if not difference and not args.accept_changes and (contents := contents_of(args)):
        difference = changed_content({"contents": contents}, summary)
        if "contents" not in summary and os.environ.get("RANK", "0") == "0":
            print(f"note: {output_dir} is older than the digests of data files: they are not compared", file=sys.stderr)
    if difference:
        raise UserError(f"{output_dir} holds a run with {difference}: name another --output-dir, or use --overwrite")


INCOMPLETE = ".incomplete"  # the folder of files that are being written
LOCK = ".lock"  # held by the run that writes to the folder
METRICS = "metrics.jsonl"  # a line per logging step and validation
SAMPLES = "samples.jsonl"  # the model's answers at each validation


def leave_if_done(args: Any) -> None:
    """Ends the program where --output-dir holds a finished run of these settings.

    Raises:
        UserError: it is a run of other settings, or cannot be read.
    """
    results = Path(args.output_dir) / "results.json"
    if results.is_file():
        require_same_run(Path(args.output_dir), args, read_json(results))
        print(f"done: {results}")
        sys.exit(0)


def is_unfinished(folder: Path) -> bool:
    """Whether the folder is of a run of this script that did not end."""
    try:
        made = yaml.safe_load((folder / "config.yaml").read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False
    return isinstance(made, dict) and "teacher_head" in made and not (folder / "results.json").exists()


def write_whole(path: Path, text: str) -> None:
    """Writes a file under another name and moves it to its place, so that it is there whole or not at all.

    A lone surrogate, which UTF-8 cannot hold, is written as its JSON escape.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


class JsonLines:
    """A file of JSON lines that grows during a run. Lines that do not fit on a full disk are written with the next."""

    def __init__(self, path: Path):
        self.path = path
        self._pending: list[str] = []
        self._size: int | None = None  # bytes that are known to be whole lines

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Adds a line for each row; if they cannot be written, warns once and keeps them in memory."""
        was_pending = bool(self._pending)
        self._pending += [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        try:
            if self._size is None:
                self._size = self.path.stat().st_size if self.path.exists() else 0
            with open(self.path, "ab") as file:
                file.truncate(self._size)  # without half a line of a failed attempt
                self._size += file.write("".join(self._pending).encode())
            self._pending = []
        except OSError as error:
            self._size = None if self._size is None else min(self._size, _size_of(self.path))
            if not was_pending:
                print(
                    f"warning: {self.path} could not be written ({error.strerror}); training goes on", file=sys.stderr
                )


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


class _Lasting:
    """A text stream that drops what cannot be written: its terminal is gone, or its disk is full."""

    def __init__(self, stream: Any):
        self._stream, self.error = stream, None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return self._attempt(self._stream.write, text) or len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, call: Callable[..., Any], *words: str) -> Any:
        try:
            return call(*words)
        except OSError as error:
            self.error = self.error or error


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Inside, neither print nor a progress bar fails when stdout or stderr does: an ssh connection is lost, Ctrl-C has
    ended `| tee log` too, or the log's disk is full. A stream that still fails at the end is closed."""
    found = {name: getattr(sys, name) for name in ("stdout", "stderr") if getattr(sys, name) is not None}
    lasting = {name: _Lasting(stream) for name, stream in found.items()}
    vars(sys).update(lasting)
    try:
        yield
    finally:
        for name, stream in lasting.items():
            stream.flush()
            if stream.error is not None:
                print(f"note: {name} lacks lines that could not be written ({stream.error.strerror})", file=sys.stderr)
        vars(sys).update(found)
        for stream in found.values():
            try:
                stream.flush()
            except OSError:  # else the interpreter fails to flush it at the end, and exits with 120
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextlib.contextmanager
def held_alone(output_dir: Path) -> Iterator[None]:
    """Inside, no other run may write to the folder, and the run outlives its terminal (see `lasting_output`).

    Raises:
        UserError: another run is writing there, or the folder cannot be made.
    """
    with _locked(output_dir) if os.environ.get("RANK", "0") == "0" else contextlib.nullcontext(), lasting_output():
        yield


@contextlib.contextmanager
def _locked(output_dir: Path) -> Iterator[None]:
    """Inside, this process holds the folder's lock, which ends with the process: a record lock, because network file
    systems pass these to their server. The process must not open the file again: closing it would end the lock."""
    import fcntl

    is_new, path = not output_dir.exists(), output_dir / LOCK
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(f"--output-dir {output_dir} cannot be written to: {error.strerror}") from error
    try:
        is_held = False
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_held = not path.exists() or not os.path.samestat(os.fstat(file), path.stat())  # replaced just now
        except OSError as error:
            is_held = error.errno in (errno.EACCES, errno.EAGAIN)
            if not is_held:
                print(f"note: no lock on {output_dir} ({error.strerror}): start no other run there", file=sys.stderr)
        if is_held:
            holder = os.read(file, 1000).decode(errors="replace")
            raise UserError(
                f"another run is writing to {output_dir}: wait, or name another folder ({path}: {holder or 'empty'})"
            )
        with contextlib.suppress(OSError):
            os.truncate(file, 0)
            os.write(file, f"process {os.getpid()} on {platform.node()}".encode())
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
    finally:
        os.close(file)
        with contextlib.suppress(OSError):  # a run that wrote nothing leaves no folder
            if is_new:
                output_dir.rmdir()


@contextlib.contextmanager
def written_whole(output_dir: Path, remedy: str) -> Iterator[Path]:
    """Yields a folder to write into; its folders move into `output_dir` at the end, all of them or none.

    Args:
        remedy: tells the user how to write them again.

    Raises:
        RunStopped: they cannot be written, or the code inside raised a ValueError.
    """
    from safetensors import SafetensorError

    staging = output_dir / INCOMPLETE
    try:
        shutil.rmtree(staging, ignore_errors=True)
        yield staging
        for folder in staging.iterdir():
            shutil.rmtree(output_dir / folder.name, ignore_errors=True)
            folder.rename(output_dir / folder.name)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        room = (
            "" if isinstance(error, ValueError) else "make room, then "
        )  # the files differ when they are read back, or the disk fails
        raise RunStopped(
            f"cannot write the trained model to {output_dir} ({first_line(error)}): {room}{remedy}"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {"python": platform.python_version()}
    for name in ("torch", "transformers", "accelerate", "datasets", "deepspeed", "safetensors", "numpy", "vllm"):
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


@functools.cache
def commit() -> str | None:
    """This repository's commit, with + if files are changed; None outside a repository.

    A training asks at its start and keeps the answer, because the repository may move on meanwhile.
    """
    root = Path(__file__).resolve().parent.parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def open_output_dir(args: Any, checkpoint: Path | None) -> None:
    """Makes or clears --output-dir, and writes the configuration there."""
    output_dir = Path(args.output_dir)
    commit()
    if args.overwrite:
        clear_folder(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    try:
        write_whole(output_dir / "config.yaml", config_text(args))
        forget_metrics_after(output_dir, checkpoint)
    except OSError as error:
        raise RunStopped(
            f"cannot write to {output_dir} ({error.strerror}): make room, or name another folder"
        ) from error


def forget_metrics_after(output_dir: Path, checkpoint: Path | None) -> None:
    """Drops the lines of metrics.jsonl and samples.jsonl that the resumed run will write again."""
    step = int(checkpoint.name.partition("-")[2]) if checkpoint else 0
    for name, keys in ((METRICS, {"loss", "eval_loss", "validation"}), (SAMPLES, {"answer"})):
        path = output_dir / name
        if not path.is_file():
            continue
        kept, damaged = [], 0
        for line in path.read_text(errors="replace").split("\n")[:-1]:
            try:
                row = json.loads(line)
                if keys & row.keys() and row["step"] <= step:
                    kept.append(f"{line}\n")
            except (ValueError, AttributeError, KeyError, TypeError):
                damaged += 1
        if damaged:
            print(f"note: {path}: {damaged} damaged lines are left out", file=sys.stderr)
        write_whole(path, "".join(kept))


def is_trained_already(args: Any) -> bool:
    """Whether --resume meets a finished run; if so, prints it.

    Raises:
        UserError: the finished run has other settings.
    """
    output_dir = Path(args.output_dir)
    if not args.resume or not (output_dir / "run.json").is_file():
        return False
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        run = dict(json.loads((output_dir / "run.json").read_text()))
    except (OSError, ValueError, TypeError):
        print(f"note: {output_dir / 'run.json'} is damaged and passed over", file=sys.stderr)
        return False
    follows = run.get("micro_batches") == args.gradient_accumulation * processes
    require_same_run(output_dir, args, run, ("gradient_accumulation",) if follows else ())
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"trained already, with these settings: {output_dir}")
        if not (output_dir / "merged").is_dir():
            print(f"note: its merged/ is gone; train.py --export-from {output_dir} --overwrite writes it again")
    return True


def question_command(merged: Path) -> str:
    """A command that asks a merged model a question, in the prompt of its training."""
    code = (
        "import sys, transformers; transformers.logging.set_verbosity_error(); "
        "ask = transformers.pipeline('text-generation', sys.argv[1]); "
        "chat = [{'role': 'user', 'content': sys.argv[2]}]; "
        "print(ask(chat, max_new_tokens=200, do_sample=False)[0]['generated_text'][-1]['content'])"
    )
    return f'python -c "{code}" {shlex.quote(str(merged))} "What is 3 and 4?"'


def write_summary(args: Any, run: dict[str, Any]) -> None:
    """Writes run.json, the last of all files, which marks a run as finished. Prints the paths of the results."""
    import torch

    output_dir = Path(args.output_dir)
    run = {
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "seed": args.seed,
        "versions": package_versions(),
        "commit": commit(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
    } | run
    write_whole(output_dir / "run.json", json.dumps(run, indent=2) + "\n")
    lines = [
        "",
        f"{args.method}: {run['steps']} steps in {run['train_seconds']:.0f} s, mean loss {run['train_loss']:.4f}, "
        f"peak memory {run['peak_memory_gib']:.2f} GiB",
    ]
    if args.method != "full":
        lines.append(f"  adapter         {output_dir / 'adapter'}  (PEFT's format, on {args.model})")
    if run["validation"]:
        at_step = {
            name: "loss {eval_loss:.4f}, accuracy {eval_accuracy:.3f} at step {step}".format(**run["validation"][name])
            for name in ("last", "best")
        }
        lines.append(f"  validation      {at_step['last']}; best: {at_step['best']}")
        lines.append(f"  exported        the state of step {run['validation']['exported_step']}")
    tracked = f"  (tensorboard --logdir {output_dir / 'tensorboard'})" if "tensorboard" in args.report_to else ""
    lines += [
        f"  merged model    {output_dir / 'merged'}",
        f"  configuration   {output_dir / 'config.yaml'}, {output_dir / 'run.json'}",
        f"  metrics         {output_dir / 'metrics.jsonl'}{tracked}",
        f"score it: python eval/gsm8k.py --ckpt {output_dir / 'merged'}"
        + ("" if args.template == "alpaca" else f" --prompt {args.template}")
        + "    # GSM8K; your own questions: --data FILE",
        f"serve it: sh scripts/serve.sh {shlex.quote(str(output_dir))}",
        f"ask it:   {question_command(output_dir / 'merged')}",
    ]
    print("\n".join(lines))


def note_export(source: Path, output_dir: Path, about: Mapping[str, Any]) -> None:
    """Adds to run.json what --export-from wrote into `output_dir`.

    An unfinished run has no run.json and gets none, because it would be taken for finished.
    """
    made = source / "run.json"
    if not made.is_file() and output_dir.resolve() == source.resolve():
        return
    run = json.loads(made.read_text()) if made.is_file() else {}
    write_whole(output_dir / "run.json", json.dumps(run | {"export": dict(about)}, indent=2) + "\n")


# ------------------------------------------------------------------------------------------------------------------
# Records of runs: one JSON file per run, with its settings, costs and results
# ------------------------------------------------------------------------------------------------------------------


# Format, version 1. A value that is not known is null.
#
#     version         1; a file of another version is refused
#     experiment, run, arm, phase         names; phase is "study", or "tuning" for a run that only chooses a rate
#     labels          the run's place on each axis of its experiment
#     chooses         of a tuning run: {"option", "score", "mode", "within"}: the option that it chooses, and the score
#                     that decides; mode is "max" or "min", and scores `within` this of the best count as equal
#     status          "done"; "failed": a step ended with an error; "unfinished": a step has not run, or was interrupted
#     error           of a failed run: {"step": ..., "code": its exit code, "message": the last line that it wrote}
#     script, settings                    train.py or finetune_bert_l_sst2.py, with every argument as it was used
#     seed            of the training
#     versions, commit                    of the packages, and of this repository when the training started, with + if
#                                         files were changed; before November 2026: the commit of the recording
#     hardware        {"device", "processes"}
#     time            {"train_seconds", "seconds"}: in training alone, and of a classification's whole run; by benchmark
#     memory          {"peak_gib"} of the fullest process
#     parameters      {"trainable", "total"}
#     steps           of the optimizer
#     scores          by benchmark, by name of the score: {"value", "of": how many items, "interval_95"}, or a number
#     validation      the score that the run selected its state by, if it did
VERSION = 1


def read_json(path: Path) -> Any:
    """A JSON file's content, or None where there is no such file.

    Raises:
        UserError: the file is damaged.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}") from error


def score_of(record: dict[str, Any], benchmark: str, name: str) -> float | None:
    """A score's value, None where the run has none."""
    found = (record["scores"].get(benchmark) or {}).get(name)
    return found.get("value") if isinstance(found, dict) else found


def conditions(made: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, str]:
    """The commit, the version of torch, the device and the number type of a run, as far as they are known.

    Args:
        made: the run's record or summary. settings: its arguments.
    """
    version = made.get("commit") or ""
    found = {
        "commit": version[:10] + "+" * version.endswith("+"),
        "torch": (made.get("versions") or {}).get("torch"),
        "device": made.get("device") or (made.get("hardware") or {}).get("device"),
        "dtype": settings.get("dtype"),
    }
    return {name: value for name, value in found.items() if value}


def differing(seeds: Iterable[Mapping[str, str]]) -> str:
    """The `conditions` that differ between the seeds of one mean, in a few words; "" if none does."""
    values: dict[str, dict[str, None]] = {}
    for one in seeds:
        for name, value in one.items():
            values.setdefault(name, {})[value] = None
    return ", ".join(f"{name} {' / '.join(found)}" for name, found in values.items() if len(found) > 1)


def is_record(content: Any) -> bool:
    return isinstance(content, dict) and {"version", "run", "scores"} <= set(content)


def holds_records(folder: Path) -> bool:
    """Whether the folder's first JSON file is a record of any version."""
    try:
        return is_record(read_json(min(folder.glob("*.json"))))
    except (UserError, ValueError):
        return False


def load_record(path: Path) -> dict[str, Any]:
    """A record of this version.

    Raises:
        UserError: no such file, or a file of another kind or version.
    """
    found = read_json(path)
    if not is_record(found):
        raise UserError(f"{path} is no record of a run: experiments/run_record.py writes such files")
    if found["version"] != VERSION:
        raise UserError(
            f"{path} has version {found['version']} of the format and this script reads {VERSION}: take the script of "
            "its commit, or write the record again with experiments/run_record.py"
        )
    return found


def records_in(folder: Path) -> dict[str, dict[str, Any]]:
    """All records in a folder, by run."""
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise UserError(f"no records of runs in {folder}: experiments/run_record.py writes them")
    return {path.stem: load_record(path) for path in paths}
