"""What a run writes about itself: metrics.jsonl and TensorBoard events."""

import contextlib
import errno
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sppnet_jax.run.files import named, write_text

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter

FILE = "metrics.jsonl"

log = logging.getLogger(__name__)


class MetricsLog:
    """Appends rows to `workdir/metrics.jsonl` and to TensorBoard; a context manager.

    `resumed_step`: rows after this step are from a run that was cut off and are
    removed, since the resumed run writes them again. `enabled=False` writes nothing:
    one of several processes keeps the log.
    """

    def __init__(
        self, workdir: Path, *, resumed_step: int, enabled: bool = True
    ) -> None:
        self._enabled = enabled
        if not enabled:
            return
        path = workdir / FILE
        with named(path):
            kept = [row for row in read_metrics(workdir) if row["step"] <= resumed_step]
            write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
            # Unbuffered: nothing is left that could fail at the end.
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND)
        self._workdir, self._purge_step = workdir, resumed_step + 1
        self._events: SummaryWriter | None = None

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        if not self._enabled:
            return
        os.close(self._file)
        if self._events is not None:
            self._events.close()

    def write(self, split: str, step: int, values: dict[str, float]) -> None:
        """Adds one row: the split it speaks of, the steps done, and its numbers."""
        if not self._enabled:
            return
        row: dict[str, Any] = {"split": split, "step": step, **values}
        line = f"{json.dumps(row)}\n".encode()
        with named(self._workdir / FILE):
            if os.write(self._file, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self._events is None:
            # Here, not above: it imports PyTorch where there is one, for seconds. The
            # first row is written when the first step is under way on the device.
            from tensorboardX import SummaryWriter

            where, purge = str(self._workdir), self._purge_step
            self._events = SummaryWriter(where, purge_step=purge)
        for name, value in values.items():
            self._events.add_scalar(f"{split}/{name}", value, step)


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl, without lines that are cut off or damaged."""
    path = workdir / FILE
    rows: list[dict[str, Any]] = []
    lines = path.read_bytes().splitlines() if path.exists() else []
    for line in lines:
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and {"split", "step"} <= set(row):
                rows.append(row)
    # The last is cut where a run was killed; its step is run again.
    if len(rows) < len(lines) - 1:
        lost = len(lines) - len(rows)
        log.warning("%s: %d damaged lines are left out", path, lost)
    return rows
