"""What a run writes about itself: metrics.jsonl and TensorBoard events."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sppnet_jax.run.files import write_text

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter

FILE = "metrics.jsonl"


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
        kept = [row for row in read_metrics(workdir) if row["step"] <= resumed_step]
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = path.open("a")
        self._workdir, self._purge_step = workdir, resumed_step + 1
        self._events: SummaryWriter | None = None

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        if not self._enabled:
            return
        self._file.close()
        if self._events is not None:
            self._events.close()

    def write(self, split: str, step: int, values: dict[str, float]) -> None:
        """Adds one row: the split it speaks of, the steps done, and its numbers."""
        if not self._enabled:
            return
        row: dict[str, Any] = {"split": split, "step": step, **values}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._events is None:
            # Here, not above: it imports PyTorch where there is one, for seconds. The
            # first row is written when the first step is under way on the device.
            from tensorboardX import SummaryWriter

            where, purge = str(self._workdir), self._purge_step
            self._events = SummaryWriter(where, purge_step=purge)
        for name, value in values.items():
            self._events.add_scalar(f"{split}/{name}", value, step)


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl, without a last line that was cut off."""
    path = workdir / FILE
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
