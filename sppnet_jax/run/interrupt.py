"""Ctrl-C and SIGTERM as a wish to stop soon, with nothing lost."""

import contextlib
import logging
import os
import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils

log = logging.getLogger(__name__)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM stopped some work; what was done is saved, and can go on."""


# Ctrl-C, what a system sends before it ends a process, and a terminal that was closed.
_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def stop_at_signals() -> None:
    """From here on these end a command as Ctrl-C does, by a KeyboardInterrupt.

    One that is ignored, as by `nohup`, stays so.
    """
    with contextlib.suppress(ValueError):  # only the main thread may set handlers
        for number in _NUMBERS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _raise)


def _raise(number: int, frame: Any) -> None:
    if frame is not None and frame.f_code.co_name == "_xla_gc_callback":
        # JAX's, in which Python would print the exception and go on.
        threading.Timer(0.01, os.kill, (os.getpid(), number)).start()
        return
    raise KeyboardInterrupt


class Interrupt:
    """Notes Ctrl-C and SIGTERM, so that the step under way can end and be saved.

    A second Ctrl-C interrupts at once. Of several processes all stop at the same step,
    whichever was told; JAX agrees on it, and catches SIGTERM for that.
    """

    def __init__(self) -> None:
        self.requested = False
        self._noted = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        numbers = _NUMBERS if jax.process_count() == 1 else (signal.SIGINT,)
        with contextlib.suppress(ValueError):  # only the main thread may set handlers
            for number in numbers:
                ignored = signal.getsignal(number) is signal.SIG_IGN
                if number != signal.SIGHUP or not ignored:  # as by nohup
                    self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def stops_after(self, step: int) -> bool:
        """Whether to stop after a step; to be asked after every one."""
        if jax.process_count() > 1:
            self.requested |= multihost_utils.reached_preemption_sync_point(step)
        return self.requested

    def _note(self, number: int, frame: object) -> None:
        if self._noted:
            raise KeyboardInterrupt
        self._noted = True
        log.info("interrupted: saving a checkpoint after this step")
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self.requested = True
