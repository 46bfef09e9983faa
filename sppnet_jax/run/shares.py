"""Processes that share a folder share the work that ends up in files.

A piece of work is a file, whole or not there. Each process does its own share first,
then what is still missing of the others'. So none waits for another or has to find it;
one that has died is made up for, and one that is started again does only what is
missing. At worst two do the same piece at the same time, and write the same file.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from sppnet_jax.run.files import read_arrays, write_arrays

# Parts of a data set for each process, in `in_parts`: a slow one can be helped out.
PARTS = 8

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Share:
    """Which of `count` processes this is: `index`, from 0 on.

    The first joins what all have made, and does what can't be shared.
    """

    index: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes results."""
        return self.index == 0

    def order(self, pieces: int) -> list[int]:
        """In which order to look at pieces of work: its own, then those of others.

        Of others it begins with the last, for they begin with their first; and each
        process begins somewhere else, so that two that help a third seldom meet.
        """
        own = range(self.index, pieces, self.count)
        others = [n for n in reversed(range(pieces)) if n % self.count != self.index]
        start = len(others) * self.index // self.count
        return [*own, *others[start:], *others[:start]]

    def missing(self, files: Sequence[Path], what: str) -> Iterator[int]:
        """The numbers of the files that are not there when their turn comes.

        `what`: the files hold, in words, for the log of several processes.
        """
        made = 0
        for number in self.order(len(files)):
            if not files[number].exists():
                made += 1
                yield number
        if self.count > 1:
            log.info("%s: %s, %d of %d made here", self, what, made, len(files))
        if self.count > 1 and made == len(files) > 1:
            log.warning(
                "%s found no %s of another process: if others run, is %s a folder that "
                "all of them share?",
                self,
                what,
                files[0].parent,
            )

    def tell_end(self) -> None:
        """Says of a process that is not the first that all it could do is done."""
        if not self.is_first:
            log.info("%s is done; process 0 goes on", self)

    def __str__(self) -> str:
        return f"process {self.index} of {self.count}"


ALONE = Share()


def check_share(index: int, count: int) -> Share:
    """The share of a process; ValueError for numbers that are none."""
    if count < 1:
        raise ValueError(f"--process_count must be at least 1, got {count}")
    if not 0 <= index < count:
        raise ValueError(
            f"--process_index must be from 0 to {count - 1} of {count} processes "
            f"(--process_count), got {index}"
        )
    return Share(index, count)


def cluster_share() -> Share:
    """The share of a process that a cluster has started, as JAX tells it.

    Nothing is waited for: the processes need not run at the same time.

    Raises: ValueError where JAX knows no cluster.
    """
    # JAX's own way to tell without joining the processes.
    from jax._src.clusters import ClusterEnv

    detect = ClusterEnv.auto_detect_unset_distributed_params
    _, count, index, _ = detect("", None, None, [], None, None)
    if count is None or index is None:
        raise ValueError(
            "--coordinator=auto is for clusters that JAX knows (TPU pod, Slurm, Open "
            "MPI), and this is none: give --process_index=I and --process_count=N"
        )
    return check_share(index, count)


def in_parts(
    compute: Callable[[np.ndarray], Sequence[np.ndarray]],
    rows: int,
    folder: Path,
    share: Share,
    what: str,
) -> list[np.ndarray] | None:
    """Arrays with a row for each image, computed in parts by several processes.

    `compute`: from the numbers of some images, int [n], to arrays of n rows each.
    `rows`: of all images. `folder`: for the parts; its name says what decides them.

    Returns: the whole arrays, in the first process; None in the others.
    """
    parts = np.array_split(np.arange(rows), min(rows, PARTS * share.count))
    files = [folder / f"{number:04d}.npz" for number in range(len(parts))]
    for number in share.missing(files, what):
        arrays = compute(parts[number])
        write_arrays(files[number], **{str(n): own for n, own in enumerate(arrays)})
    if not share.is_first:
        return None
    joined: list[np.ndarray] = []
    for part, file in zip(parts, files, strict=True):
        found = list(read_arrays(file).values())
        joined = joined or [np.empty((rows, *a.shape[1:]), a.dtype) for a in found]
        for whole, own in zip(joined, found, strict=True):
            whole[part] = own
    return joined
