"""The processes of a training and their devices: accelerate's ranks, DeepSpeed's configuration, launchers, GPUs."""

import functools
import json
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist

from common.cli import RunStopped, UserError, first_line, run_script

if TYPE_CHECKING:
    from accelerate import Accelerator

# The keys of a DeepSpeed configuration that repeat our options: the key, the option, and how the value follows from
# `args` and the number of micro-batches per process.
DEEPSPEED_KEYS: dict[str, tuple[str, Callable[[Any, int, int], Any]]] = {
    "gradient_clipping": ("--max-grad-norm", lambda args, steps, ranks: args.max_grad_norm),
    "train_micro_batch_size_per_gpu": ("--batch-size", lambda args, steps, ranks: args.batch_size),
    "gradient_accumulation_steps": ("--gradient-accumulation", lambda args, steps, ranks: steps),
    "train_batch_size": (
        "--batch-size and --gradient-accumulation",
        lambda args, steps, ranks: args.batch_size * steps * ranks,
    ),
}


# What `accelerate launch` may set beside the ranks, and what decides it here. Accelerator would follow a part of it.
OF_ACCELERATE = {
    "USE_DEEPSPEED": "train.py has --deepspeed FILE",
    "USE_FSDP": "train.py splits weights by --deepspeed configs/ds_zero3.json",
    "USE_MEGATRON_LM": "train.py splits weights by --deepspeed configs/ds_zero3.json",
    "USE_PARALLELISM_CONFIG": "ranks share the micro-batches of a step",
    "DYNAMO_BACKEND": "nothing is compiled",
    "MIXED_PRECISION": "train.py has --dtype",
    "GRADIENT_ACCUMULATION_STEPS": "--gradient-accumulation decides",
}

# The others wait while the first rank alone tokenises the data, or digests a large checkpoint and flushes it to disk.
# NCCL by itself gives up after ten minutes.
LONGEST_WAIT = timedelta(hours=2)


def read_deepspeed(path: str | None) -> dict[str, Any]:
    """The DeepSpeed configuration in a file, empty without a file; refuses settings that contradict this program.

    Raises:
        UserError: no JSON object, no ZeRO stage from 1 to 3, fp16, autocast, or an optimizer or scheduler of its own.
    """
    if not path:
        return {}
    try:
        config = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"no DeepSpeed configuration in {path}: {first_line(error)}") from error
    where = f"--deepspeed {path}"
    if not isinstance(config, dict):
        raise UserError(f"{where} holds no JSON object: copy configs/ds_zero2.json")
    zero = config.get("zero_optimization")
    if not isinstance(zero, dict) or zero.get("stage") not in (1, 2, 3):
        found = zero.get("stage") if isinstance(zero, dict) else zero
        raise UserError(
            f"{where}: zero_optimization.stage is {found!r}: it must be 1, 2 or 3; without ZeRO use torchrun"
        )
    for key, option in (("optimizer", "--learning-rate and --weight-decay"), ("scheduler", "--lr-scheduler")):
        if config.get(key):
            raise UserError(f"{where} has a {key} of its own, which {option} decides here: take it out")
    for key in ("fp16", "amp", "torch_autocast"):
        section = config.get(key)
        if section and (not isinstance(section, dict) or section.get("enabled", key == "amp") not in (False, "auto")):
            raise UserError(f'{where} switches {key} on: --dtype takes float32 or bfloat16, set bf16 to "auto"')
    return config


def deepspeed_config(args: Any, num_micro_batches: int, mixed: bool, width: int) -> dict[str, Any]:
    """The configuration of --deepspeed with every "auto" and every missing key filled in from the options.

    Args:
        num_micro_batches: per optimizer step and process.
        mixed: whether weights and activations are bf16.
        width: the model's hidden size; ZeRO's buckets follow from it, as in transformers.

    Raises:
        UserError: a value that contradicts an option.
    """
    config, where = read_deepspeed(args.deepspeed), f"--deepspeed {args.deepspeed}"
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    for key, (option, value_of) in DEEPSPEED_KEYS.items():
        value = value_of(args, num_micro_batches, ranks)
        if config.get(key, "auto") not in ("auto", value):
            raise UserError(f'{where}: {key} is {config[key]}, and {option} says {value}: set "auto"')
        config[key] = value
    bf16 = config.get("bf16") or {}
    if not isinstance(bf16, dict) or bf16.get("enabled", "auto") not in ("auto", mixed):
        raise UserError(f'{where}: bf16 is {bf16}, and --dtype makes it {mixed}: set "auto"')
    config["bf16"] = {**bf16, "enabled": mixed}
    config.pop("fp16", None)
    zero = config["zero_optimization"]
    sizes = {"reduce_bucket_size": width * width}
    # The gradients of adapters fill less than a bucket: overlapping has no use, and a second stream needs buffers.
    sizes["overlap_comm"] = args.method == "full"
    if zero["stage"] == 3:
        sizes |= {"stage3_prefetch_bucket_size": int(0.9 * width * width)}
        sizes |= {"stage3_param_persistence_threshold": 10 * width}
    zero |= {key: size for key, size in sizes.items() if zero.get(key, "auto") == "auto"}
    return config | {"zero_allow_untested_optimizer": True}


def start_ranks(args: Any, num_micro_batches: int = 1, mixed: bool = False, width: int = 0) -> "Accelerator":
    """Makes this process one of a run's ranks under torchrun or DeepSpeed; without a launcher it is the only rank.

    Args:
        num_micro_batches, mixed, width: see `deepspeed_config`; mixed: fp32 masters, passes in bf16.

    Raises:
        UserError: --deepspeed without its launcher, or with a configuration that contradicts the options; settings of
            `accelerate launch` that no run here follows.
    """
    for name, ours in OF_ACCELERATE.items():
        value = os.environ.get(f"ACCELERATE_{name}", "")
        if value.lower() not in ("", "no", "false", "1" if name == "GRADIENT_ACCUMULATION_STEPS" else "0"):
            raise UserError(
                f"accelerate launch sets {name.lower()} to {value}, which is not followed here: take it out of its "
                f"options and its configuration, or start by torchrun; {ours}"
            )
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would find the same, with a warning in every process
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState, PartialState

    settings: dict[str, Any] = {"mixed_precision": "bf16" if mixed else "no"}
    config = None
    if getattr(args, "deepspeed", None) is not None:
        if "RANK" not in os.environ:
            raise UserError("--deepspeed needs its launcher: deepspeed --no_local_rank --num_gpus N train.py ...")
        from accelerate import DeepSpeedPlugin
        from transformers.integrations import HfDeepSpeedConfig

        # ZeRO-3 partitions the weights while they are loaded, and transformers needs this object for it.
        config = HfDeepSpeedConfig(deepspeed_config(args, num_micro_batches, mixed, width))
        settings["deepspeed_plugin"] = DeepSpeedPlugin(hf_ds_config=config)
    # The frozen factors of PiSSA are buffers that no step changes.
    ddp = DistributedDataParallelKwargs(find_unused_parameters=False, broadcast_buffers=False)
    AcceleratorState._reset_state()  # an earlier training in this process may have set it
    on_cpu = not torch.cuda.is_available()
    # Before Accelerator, which with a DeepSpeed plugin reads cpu=True as "no DeepSpeed".
    PartialState(cpu=on_cpu, timeout=LONGEST_WAIT)
    accelerator = Accelerator(cpu=on_cpu and config is None, kwargs_handlers=[ddp], **settings)
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # set by Accelerator, and read by the next one in this process
    accelerator.held_config = config  # transformers keeps only a weak reference
    if config is not None:
        import deepspeed

        if on_cpu:  # helps inference only, and a run that is killed while compiling it leaves a lock for all later runs
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed()  # ZeRO-3 asks how many ranks there are before the first weight is read
    if torch.cuda.device_count() > 1 and accelerator.num_processes == 1:
        print(
            f"note: one of {torch.cuda.device_count()} GPUs is used; torchrun or deepspeed start a run on all of them"
        )
    return accelerator


# ------------------------------------------------------------------------------------------------------------------
# Launchers
# ------------------------------------------------------------------------------------------------------------------


@functools.cache
def launchers() -> list[tuple[int, str]]:
    """The processes that started this rank (`deepspeed`, its node's launcher, torchrun): process id, start time. They
    are read at the first call, as early as possible: a process that has ended by then is not known."""
    found, number = [], os.getppid()
    while "RANK" in os.environ and number > 1:
        try:
            command = Path(f"/proc/{number}/cmdline").read_bytes().decode(errors="replace")
        except OSError:  # no /proc: not Linux
            break
        if not re.search(r"deepspeed|torchrun|torch[./]distributed|elastic", command):
            break
        found.append((number, start_time(number)))
        number = int(_status(number)[1])
    return found


def start_time(number: int) -> str:
    """When a process began, in clock ticks since the machine's start; empty if the process is gone or a zombie."""
    fields = _status(number)
    return fields[19] if fields and fields[0] != "Z" else ""


def _status(number: int) -> list[str]:
    """The fields of /proc/NUMBER/stat after the name (the name may hold spaces): state, parent, ..."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


# ------------------------------------------------------------------------------------------------------------------
# This process
# ------------------------------------------------------------------------------------------------------------------


def first_rank_first(work: Callable[[], Any]) -> Any:
    """`work` on the first rank, then on the others, which find its files; each rank's own result.

    Raises:
        UserError: raised on one rank, it is raised on all of them, because the others would wait for that rank.
    """
    num_ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    result, errors = None, [None] * num_ranks
    for is_turn in (rank == 0, rank != 0):
        if is_turn:
            try:
                result = work()
            except UserError as error:
                errors[rank] = error
        if num_ranks > 1:
            dist.all_gather_object(errors, errors[rank])
        for error in filter(None, errors):
            raise error
    return result


def peak_memory_gib() -> float:
    """This process's peak so far in GiB: allocated on the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status")
    found = re.search(r"^VmHWM:\s+(\d+)", status.read_text(), re.MULTILINE) if status.exists() else None
    if found:
        return int(found[1]) / 2**20
    # The fallback is less exact: ru_maxrss begins with the peak of the process that started this one.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def leave(code: int) -> None:
    """Ends a rank's process at once. In an ordinary exit, threads that its libraries left running may abort it, and the
    launcher would then end the other ranks while one of them still writes the model."""
    if dist.is_initialized() and code != 1:  # after code 1 another rank may be lost, and closing connections would hang
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def is_lost_rank(error: Exception) -> bool:
    """Whether an error says that another rank is gone: the backends have no exception of their own for it."""
    several = dist.is_initialized() and dist.get_world_size() > 1 and not isinstance(error, RunStopped)
    return several and any(name in str(error) for name in ("gloo", "NCCL", "Connection"))


def run_rank(main: Callable[[list[str]], None]) -> NoReturn:
    """`run_script` for a script that may run as one of several ranks; any of them may be lost, at any time."""

    def guarded(argv: list[str]) -> None:
        try:
            main(argv)
        except torch.OutOfMemoryError as error:
            raise RunStopped(
                f"{first_line(error)} These take less memory: a smaller --batch-size (which changes L_SVDR) with more "
                "--gradient-accumulation, or a shorter --max-length; in train.py --gradient-checkpointing, --load-in "
                "4bit, --objective-memory 128 or --deepspeed configs/ds_zero3.json. --dry-run says what a run takes"
            ) from error
        except RuntimeError as error:
            if "EADDRINUSE" in str(error):
                port = os.environ.get("MASTER_PORT")
                raise UserError(f"port {port} is in use, by another run perhaps: --master_port names one") from error
            if not is_lost_rank(error):
                raise
            rank = os.environ.get("RANK", "0")
            raise RunStopped(
                f"rank {rank} lost another rank ({first_line(error)}); --resume goes on from the newest checkpoint"
            ) from error

    code = 0
    launchers()
    try:
        run_script(guarded)
    except SystemExit as end:
        code = end.code
    if "RANK" in os.environ:
        leave(code)
    sys.exit(code)


# ------------------------------------------------------------------------------------------------------------------
# The device that a run takes: a GPU where torch sees one, else the CPU, but not beside GPUs that torch cannot use
# ------------------------------------------------------------------------------------------------------------------


def choose_device() -> torch.device:
    """The GPU of this process where torch sees one, else the CPU.

    Raises:
        UserError: nvidia-smi lists GPUs, CUDA_VISIBLE_DEVICES hides none of them, and torch sees none; or this node has
            more ranks than GPUs. Only the node's first rank raises it; the others wait until the launcher ends them.
    """
    visible, ranks = os.environ.get("CUDA_VISIBLE_DEVICES"), ranks_of_node()
    problem = None
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        if ranks > count:
            problem = f"{ranks} ranks on this machine, and torch sees {count} GPUs: start one rank for each GPU"
    elif not (visible is not None and visible.strip() in ("", "-1")) and (listed := num_listed_gpus()):
        try:
            torch.cuda.init()
            reason = "CUDA finds no device"
        except (RuntimeError, AssertionError) as error:
            reason = first_line(error)
        among = f" among CUDA_VISIBLE_DEVICES={visible}" if visible else ""
        problem = (
            f"GPUs that nvidia-smi lists: {listed}; that torch {torch.__version__} sees{among}: none ({reason}). "
            "Update the driver, or mend the list; CUDA_VISIBLE_DEVICES= (empty) runs on the CPU"
        )
    if problem is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if int(os.environ.get("LOCAL_RANK", 0)) > 0:
        time.sleep(10)  # the first rank needs time to print its error: the launcher ends all ranks once one has ended
        raise SystemExit(2)
    raise UserError(problem)


def ranks_of_node() -> int:
    """How many ranks this machine has, as torchrun says it or `deepspeed`; 1 without a launcher."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def num_listed_gpus() -> int:
    """How many GPUs nvidia-smi lists; 0 where it finds none, hangs, or is not there."""
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU") for line in listed.splitlines())


def announce_device() -> None:
    """A run's first line: the GPUs of the first machine's ranks by name and UUID, or the CPU. Raises as above, and:

    Raises:
        UserError: the environment says that this is one of several ranks, and no launcher has given it a place on its
            machine. Accelerate would go by that place and make it the only rank, with all that ranks share done twice.
    """
    for name, alone in (("WORLD_SIZE", "1"), ("RANK", "0")):
        if "LOCAL_RANK" not in os.environ and os.environ.get(name, alone) != alone:
            raise UserError(
                f"{name} is {os.environ[name]}, and no launcher started this process, which would set LOCAL_RANK too: "
                f"start it by torchrun, or unset {name}"
            )
    names = f"CPU, {torch.get_num_threads()} threads"
    if choose_device().type == "cuda":
        cards = map(torch.cuda.get_device_properties, range(ranks_of_node()))
        names = ", ".join(f"{card.name} (GPU-{str(card.uuid)[:8]})" for card in cards)
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"device: {names}", flush=True)
