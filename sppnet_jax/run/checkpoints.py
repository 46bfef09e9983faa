"""Checkpoints with Orbax: all that a run needs to go on as if it had never stopped.

A checkpoint holds the parameters, the rest of the training state, and what the host
remembers (a JSON dict, the position of the data iterator in it). Each is written to a
temporary folder and renamed, so a killed run leaves whole checkpoints only.
"""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp


class Checkpoints:
    """The checkpoints of one run, the newest `keep` of them; a context manager."""

    def __init__(self, folder: str | Path, *, keep: int = 2) -> None:
        self._folder = Path(folder).absolute()
        self._manager = ocp.CheckpointManager(
            self._folder,
            item_handlers={
                "params": ocp.StandardCheckpointHandler(),
                "training": ocp.StandardCheckpointHandler(),
                "host": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(max_to_keep=keep),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None or jax.process_count() == 1:  # closing waits for all processes
            self._manager.close()

    def save(
        self, step: int, *, params: Any, training: Any, host: dict[str, Any]
    ) -> None:
        """Saves trees of NumPy arrays and a JSON dict."""
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(params),
                training=ocp.args.StandardSave(training),
                host=ocp.args.JsonSave(host),
            ),
        )

    def latest_step(self) -> int | None:
        """The step of the newest checkpoint, or None."""
        return self._manager.latest_step()

    def restore(self, *, params: Any, training: Any) -> tuple[Any, Any, dict[str, Any]]:
        """The newest checkpoint as (params, training, host).

        `params` and `training` give the expected shapes.
        Raises: ValueError that names every array whose shape differs.
        """
        restored = self._restore(
            params,
            training=ocp.args.StandardRestore(training),
            host=ocp.args.JsonRestore(),
        )
        return restored.params, restored.training, restored.host

    def restore_params(self, params: Any = None) -> Any:
        """The parameters alone of the newest checkpoint; raises as `restore` does.

        None takes them as they are there.
        """
        return self._restore(params).params

    def _restore(self, params: Any, **others: Any) -> Any:
        step = self.latest_step()
        if step is None:
            raise FileNotFoundError(
                f"no checkpoint in {self._folder}: train first, or give the --workdir "
                "of a run that has been trained"
            )
        if params is not None:
            self.check_shapes(params)
        args = ocp.args.Composite(params=ocp.args.StandardRestore(params), **others)
        return self._manager.restore(step, args=args)

    def check_shapes(self, params: Any) -> None:
        """Raises ValueError if the newest checkpoint holds parameters of other shapes.

        It names each of them, and passes where there is no checkpoint yet.
        """
        step = self.latest_step()
        if step is None:
            return
        stored = _shapes(self._manager.item_metadata(step)["params"])
        wanted = _shapes(params)
        lines = [
            f"  {name}: checkpoint {stored.get(name, 'none')}, "
            f"config {wanted.get(name, 'none')}"
            for name in sorted(stored | wanted)
            if stored.get(name) != wanted.get(name)
        ]
        if lines:
            raise ValueError(
                f"the checkpoint {self._folder / str(step)} holds another model than "
                "the config describes:\n" + "\n".join(lines) + "\n"
                "Use the config it was trained with, or another --workdir."
            )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(
        getattr(tree, "tree", tree), is_leaf=lambda x: hasattr(x, "shape")
    )
    return {
        "/".join(str(getattr(key, "key", key)) for key in path): tuple(leaf.shape)
        for path, leaf in leaves
    }
