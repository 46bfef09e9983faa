"""Ctrl-C and SIGTERM as a wish to stop soon, with nothing lost."""

import contextlib
import logging
import signal
from typing import Any

import jax

log = logging.getLogger(__name__)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM stopped some work; what was done is saved, and can go on."""


class Interrupt:
    """Notes Ctrl-C and SIGTERM, so that the step under way can end and be saved.

    A second Ctrl-C interrupts at once. Of several processes each would stop at a step
    of its own and wait for the others forever, so there nothing is caught.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        numbers = (signal.SIGINT, signal.SIGTERM) if jax.process_count() == 1 else ()
        with contextlib.suppress(ValueError):  # only the main thread may set handlers
            for number in numbers:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        log.info("interrupted: saving a checkpoint after this step")
