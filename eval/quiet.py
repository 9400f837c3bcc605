"""Hides lines that vLLM prints at every start and that mean nothing; everything else is still printed.

The hidden notes are about settings that `VLLMBackend` chooses on purpose, and about parts that the CPU package lacks.
"""

import contextlib
import ctypes
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

# The beginnings of the notes, by the logger that writes them.
VLLM_NOTES = {
    "vllm.triton_utils.importing": ("Triton is installed, but doesn't include CPU backend.",),
    "vllm.engine.arg_utils": ("The global random seed is set to",),
    "vllm.config.vllm": (
        "Enforce eager set, disabling torch.compile",
        "Inductor compilation was disabled by user settings",
        "Model Runner V2 requires Triton",
    ),
    "vllm.platforms.cpu": ("Triton is not installed.", "Reset SSM cache type to float32"),
    "vllm.v1.worker.cpu_worker": (
        "%s is not found in LD_PRELOAD.",
        "CPU backend doesn't allow to use `torch.set_num_threads`",
    ),
}


class WithoutNotes(logging.Filter):
    """Drops a logger's messages that have one of these beginnings; all others pass."""

    def __init__(self, beginnings: tuple[str, ...]):
        super().__init__()
        self.beginnings = beginnings

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(self.beginnings)


@contextlib.contextmanager
def quiet_vllm() -> Iterator[None]:
    """Inside, vLLM is imported and its engine started; the filters of its loggers stay."""
    for name, beginnings in VLLM_NOTES.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, WithoutNotes) for known in logger.filters):
            logger.addFilter(WithoutNotes(beginnings))
    with warnings.catch_warnings(), _no_native_warnings():
        warnings.filterwarnings("ignore", r"`torch\.distributed\.reduce_op` is deprecated", FutureWarning)
        yield


@contextlib.contextmanager
def _no_native_warnings() -> Iterator[None]:
    """Inside, torch's native code writes errors and no warnings: vLLM's kernels warn of memory that they bind to the
    NUMA node it is on, past Python's warnings and loggers. This is the level that TORCH_CPP_LOG_LEVEL sets at the
    start of a process."""
    import torch

    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
        level = ctypes.c_int.in_dll(library, "FLAGS_caffe2_log_level")
    except (OSError, ValueError):  # another build of torch: the line is written
        yield
        return
    before = level.value
    level.value = max(before, 2)  # ERROR
    try:
        yield
    finally:
        level.value = before
