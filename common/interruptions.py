"""SIGTERM and SIGINT while a model is trained."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import transformers


class Interruption(transformers.TrainerCallback):
    """SIGTERM and SIGINT: the step is finished, a checkpoint saved, the training ended. A second one leaves at once.

    Attributes:
        signal: the number of the signal that came, 0 before.
        agreed: whether it has come to any rank, as of the step under way.
    """

    def __init__(self):
        self.signal = 0
        self.agreed = False
        self._came_at = 0.0

    def _receive(self, number: int, frame: Any) -> None:
        # Launchers pass on what the terminal sends to all of them anyway: the same signal twice at once is one.
        if self.signal and time.monotonic() - self._came_at > 2:
            os._exit(128 + number)
        if not self.signal:
            self.signal, self._came_at = number, time.monotonic()
            print(f"{signal.Signals(number).name}: stopping after this step", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def awaited(self) -> Iterator[None]:
        """Inside, the signals are taken this way."""
        handlers = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def on_step_end(self, args, state, control, **kwargs):
        if self.agreed or (self.signal and args.world_size == 1):
            self.agreed = control.should_training_stop = control.should_save = True
