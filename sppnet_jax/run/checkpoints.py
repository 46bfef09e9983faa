"""Checkpoints with Orbax: all that a run needs to go on as if it had never stopped.

A checkpoint holds the parameters, the rest of the training state, and what the host
remembers (a JSON dict, the position of the data iterator in it). Each is written to a
temporary folder and renamed, so a killed run leaves whole checkpoints only.

Who wants the parameters alone reads their arrays as Orbax does, by TensorStore, without
Orbax's import and its manager: 0.04 s for 0.33 s with a small network.
"""

import contextlib
import functools
import glob
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sppnet_jax.run import files

log = logging.getLogger(__name__)

# Bytes, at most, that it takes to keep an array beside its own.
_OVERHEAD = 8192


def _is_no_failed_write(record: logging.LogRecord) -> bool:
    """Orbax's threads log pages of what is raised here, in a sentence, too."""
    error = str(record.exc_info[1]) if record.exc_info else ""
    return not error or ".orbax-checkpoint-tmp" not in error


for _name in ("absl", "asyncio"):
    logging.getLogger(_name).addFilter(_is_no_failed_write)


class OtherModelError(ValueError):
    """A checkpoint holds parameters of other shapes than are wanted."""


class Checkpoints:
    """The checkpoints of one run, the newest `keep` of them; a context manager.

    One that can't be read is named in a warning, and the one before it is taken.
    `step`: of the one that was read last.
    """

    def __init__(self, folder: str | Path, *, keep: int = 2) -> None:
        self.step: int | None = None
        self._folder = Path(folder).absolute()
        self._keep = keep
        self._saved = f"a checkpoint in {self._folder}"
        self._closing = contextlib.ExitStack()

    @functools.cached_property
    def _manager(self) -> Any:
        import orbax.checkpoint as ocp

        return ocp.CheckpointManager(
            self._closing.enter_context(_without_pattern(self._folder)),
            item_handlers={
                "params": ocp.StandardCheckpointHandler(),
                "training": ocp.StandardCheckpointHandler(),
                "host": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(max_to_keep=self._keep),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        with self._closing:
            if "_manager" not in vars(self):
                return
            if error is not None and jax.process_count() > 1:
                return  # closing waits for all processes
            try:
                with self._writing():
                    self._manager.close()
            except OSError:
                if error is None:  # else that one tells what came first
                    raise

    def save(
        self, step: int, *, params: Any, training: Any, host: dict[str, Any]
    ) -> None:
        """Saves trees of NumPy arrays and a JSON dict.

        It is written while the caller goes on: what goes wrong may be told by the next
        call, or at the end.

        Raises: OSError that says what it takes, where it can't be written.
        """
        import orbax.checkpoint as ocp

        with self._writing():
            self._manager.wait_until_finished()  # what is written before takes room too
        self.check_space(params, training, step=step)
        with self._writing():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(params),
                    training=ocp.args.StandardSave(training),
                    host=ocp.args.JsonSave(host),
                ),
            )

    def check_space(self, *trees: Any, step: int = 0) -> None:
        """Raises OSError if a checkpoint of arrays, or of their shapes, finds no room.

        Also where its folder can't be written to.
        """
        leaves = jax.tree.leaves(trees)
        bytes_of = (int(np.prod(x.shape)) * np.dtype(x.dtype).itemsize for x in leaves)
        size = sum(bytes_of) + _OVERHEAD * len(leaves)
        path = self._folder / str(step)
        self._saved = f"the checkpoint {path}, of {size / 1e6:,.1f} MB,"
        files.check_folder(self._folder)
        files.check_space(path, size)

    def latest_step(self) -> int | None:
        """The step of the newest checkpoint, or None."""
        return self._manager.latest_step()

    def restore(self, *, params: Any, training: Any) -> tuple[Any, Any, dict[str, Any]]:
        """The newest checkpoint as (params, training, host), to go on from there.

        `params` and `training` give the expected shapes. Newer ones that can't be read
        are renamed, so that they can be written again.
        Raises: ValueError that names every array whose shape differs.
        """
        import orbax.checkpoint as ocp

        restored = self._restore(
            params,
            training=ocp.args.StandardRestore(training),
            host=ocp.args.JsonRestore(),
        )
        assert self.step is not None
        for step in [n for n in self._manager.all_steps() if n > self.step]:
            path = self._folder / str(step)
            with contextlib.suppress(FileNotFoundError):  # another process was first
                path.rename(path.with_name(f"{step}.damaged.{os.getpid()}"))
            self._manager.reload()
        return restored.params, restored.training, restored.host

    def restore_params(self, params: Any = None) -> Any:
        """The parameters alone of the newest checkpoint; raises as `restore` does.

        None takes them as they are there.
        """
        names = [path.name for path in self._folder.glob("[0-9]*")]
        newest = max((int(name) for name in names if name.isdecimal()), default=None)
        try:
            found = _read_arrays(self._folder / str(newest) / "params")
        except Exception:  # of many kinds: Orbax tells what is wrong
            return self._restore(params).params
        if params is not None and _types(found) != _types(params):
            return self._restore(params).params
        self.step = newest
        return found

    def _restore(self, params: Any, **others: Any) -> Any:
        import orbax.checkpoint as ocp

        if self.latest_step() is None:
            raise FileNotFoundError(
                f"no checkpoint in {self._folder}: train first, or give the --workdir "
                "of a run that has been trained"
            )
        args = ocp.args.Composite(params=ocp.args.StandardRestore(params), **others)

        def read(step: int) -> Any:
            if params is not None:
                self._check_shapes(step, params)
            return self._manager.restore(step, args=args)

        return self._of_newest(read)

    def check_shapes(self, params: Any) -> None:
        """Raises ValueError if the newest checkpoint holds parameters of other shapes.

        It names each of them, and passes where there is no checkpoint yet.
        """
        if self.latest_step() is not None:
            self._of_newest(lambda step: self._check_shapes(step, params))

    def _of_newest(self, read: Callable[[int], Any]) -> Any:
        """What is read of the newest checkpoint of which it can be."""
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                found = read(step)
            except (MemoryError, OtherModelError):
                raise
            except Exception as error:  # of many libraries
                reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                path = self._folder / str(step)
                log.warning("the checkpoint %s can't be read (%s)", path, reason)
                continue
            if step != self.latest_step():
                log.warning("the checkpoint before it, of step %d, is taken", step)
            self.step = step
            return found
        raise ValueError(
            f"none of the checkpoints in {self._folder} can be read ({reason}): "
            "restore one, or train in another --workdir"
        )

    def _check_shapes(self, step: int, params: Any) -> None:
        stored = _shapes(self._manager.item_metadata(step)["params"])
        if not stored:
            raise ValueError("it holds no parameters")
        wanted = _shapes(params)
        lines = [
            f"  {name}: checkpoint {stored.get(name, 'none')}, "
            f"config {wanted.get(name, 'none')}"
            for name in sorted(stored | wanted)
            if stored.get(name) != wanted.get(name)
        ]
        if lines:
            raise OtherModelError(
                f"the checkpoint {self._folder / str(step)} holds another model than "
                "the config describes:\n" + "\n".join(lines) + "\n"
                "Use the config it was trained with, or another --workdir."
            )

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Errors say which checkpoint can't be written, and how large it is."""
        try:
            yield
        except Exception as error:  # of many libraries
            full = "No space left" in str(error)
            reason = "no space left on the disk" if full else str(error)[:300]
            raise OSError(f"{self._saved} can't be written: {reason}") from error


@contextlib.contextmanager
def _without_pattern(folder: Path) -> Iterator[Path]:
    """A path of a folder that Orbax doesn't take for a pattern, as it does `[` and `*`.

    Raises: ValueError where the system has no other path for it.
    """
    if not glob.has_magic(str(folder)):
        yield folder
        return
    with files.named(folder):
        folder.mkdir(parents=True, exist_ok=True)
    number = os.open(folder, os.O_RDONLY)
    try:
        other = Path(f"/proc/self/fd/{number}")
        if not other.is_dir():
            raise ValueError(
                f"checkpoints can't be kept in {folder}, whose path has one of *?[: "
                "rename that folder, or give another --workdir"
            )
        yield other
    finally:
        os.close(number)


def _read_arrays(folder: Path) -> Any:
    """A tree of arrays that Orbax has written, of nested dicts.

    Raises: whatever goes wrong, where it isn't whole or not written so.
    """
    import tensorstore as ts

    context = ts.Context()
    described = json.loads((folder / "_METADATA").read_text())
    if not described["use_ocdbt"] or described["use_zarr3"]:
        raise ValueError("arrays are stored in another way")
    base = {"driver": "file", "path": f"{folder}/"}
    reads = {}
    for one in described["tree_metadata"].values():
        if one["value_metadata"]["value_type"] not in ("np.ndarray", "jax.Array"):
            raise ValueError("it holds other values than arrays")
        keys = tuple(key["key"] for key in one["key_metadata"])
        place = {"driver": "ocdbt", "base": base, "path": f"{'.'.join(keys)}/"}
        # Missing parts would else be zeros.
        store = {"driver": "zarr", "kvstore": place, "fill_missing_data_reads": False}
        reads[keys] = ts.open(store, open=True, read=True, context=context)
    arrays = {keys: opened.result().read() for keys, opened in reads.items()}
    tree: dict[str, Any] = {}
    for (*groups, name), array in arrays.items():
        inner = functools.reduce(lambda at, key: at.setdefault(key, {}), groups, tree)
        inner[name] = array.result()
    if not tree:
        raise ValueError("it holds no parameters")
    return tree


def _types(tree: Any) -> Any:
    """The shape and the type of each array by its place."""
    return jax.tree.map(lambda x: (tuple(x.shape), np.dtype(x.dtype)), tree)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(
        getattr(tree, "tree", tree), is_leaf=lambda x: hasattr(x, "shape")
    )
    return {
        "/".join(str(getattr(key, "key", key)) for key in path): tuple(leaf.shape)
        for path, leaf in leaves
    }
