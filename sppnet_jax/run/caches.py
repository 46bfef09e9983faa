"""What the command lines keep from one start to the next, in the user's cache folder.

Compiled programs, what they were compiled from, and statistics of training sets. All of
it can be removed at any time: it is made again. JAX finds a program by the versions of
JAX and XLA, its flags and its kind of device, with the instructions that a CPU knows:
machines may share it.
"""

import hashlib
import logging
import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from jax import export

from sppnet_jax.run import files

log = logging.getLogger(__name__)

# Programs that compile faster are not worth a file.
LEAST_SECONDS = 0.2
TRACED = "traced"  # the folder of what was traced, among compiled programs
# Functions of fewer arrays are traced sooner than JAX imports what reading takes.
LEAST_ARRAYS = 40


def cache_folder() -> Path:
    """The user's cache folder of this project; it need not exist.

    `$XDG_CACHE_HOME/sppnet_jax`, or `~/.cache/sppnet_jax`.

    Raises: RuntimeError for a user without a home folder.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    # A path that isn't absolute is to be ignored, by the XDG specification.
    base = Path(given) if os.path.isabs(given) else Path("~/.cache").expanduser()
    return base / "sppnet_jax"


def use_compilation_cache() -> None:
    """Keeps compiled programs in `cache_folder()`, so that a next start loads them.

    A folder that JAX was given stays (JAX_COMPILATION_CACHE_DIR), and
    JAX_ENABLE_COMPILATION_CACHE=0 turns the cache off. A folder that can't be written
    to is a warning. Of several processes the first writes.
    """
    config: Any = jax.config  # its fields are made at run time
    if not config.jax_enable_compilation_cache or config.jax_compilation_cache_dir:
        return
    try:
        folder = cache_folder() / "jax"
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(f"{folder} can't be written to")
    except (OSError, RuntimeError) as error:  # RuntimeError: no home folder
        log.warning(
            "compiled programs are not kept, so every start compiles: %s. Set "
            "XDG_CACHE_HOME to a folder that you can write to",
            error,
        )
        return
    config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)


def jit_once(
    function: Callable[..., Any], decided_by: str, *, least_arrays: int | None = None
) -> Callable[..., Any]:
    """`jax.jit(function)`, whose tracing the next start is spared.

    What JAX makes of a large network for one shape of images takes it a second, before
    anything is compiled. It is kept beside the compiled programs, found by this
    project's code, the versions of JAX and Flax, the platform, the arguments' shapes
    and types, and `decided_by`: whatever else it depends on, such as the model and the
    constants that the function holds. Nothing is kept of a small function, nor where no
    compiled programs are.

    `function`: of trees of arrays, free of effects; it returns arrays in tuples, lists
    and dicts. `least_arrays`: of what is not small; by default as many as a network's.
    """
    least = LEAST_ARRAYS if least_arrays is None else least_arrays
    programs = dict[str, Callable[..., Any]]()

    def run(*arguments: Any) -> Any:
        leaves, tree = jax.tree.flatten(arguments)
        seen = f"{tree} {[jax.typeof(leaf) for leaf in leaves]}"
        if seen not in programs:
            # A file knows no trees but tuples, lists and dicts.
            jitted = jax.jit(
                lambda *leaves: function(*jax.tree.unflatten(tree, leaves))
            )
            small, decided = len(leaves) < least, f"{decided_by} {seen}"
            programs[seen] = jitted if small else _kept(jitted, leaves, decided)
        return programs[seen](*leaves)

    return run


def _kept(jitted: Any, arguments: Any, decided_by: str) -> Callable[..., Any]:
    """The function for arguments like these, from its file if there is one."""
    config: Any = jax.config
    folder = config.jax_compilation_cache_dir
    if not (config.jax_enable_compilation_cache and folder):
        return jitted
    versions = [f"{name} {version(name)}" for name in ("jax", "jaxlib", "flax")]
    precision = config.jax_default_matmul_precision, config.jax_enable_x64
    decided = f"{files.own_code()} {versions} {jax.default_backend()} {precision}"
    digest = hashlib.sha256(f"{decided} {decided_by}".encode()).hexdigest()
    path = Path(folder) / TRACED / f"{digest}.stablehlo"
    try:
        return jax.jit(export.deserialize(bytearray(path.read_bytes())).call)
    except FileNotFoundError:
        pass
    except Exception as error:  # whatever is wrong with it, it can be made again
        log.debug("%s can't be used, and is made again: %s", path, error)
    try:
        traced = export.export(jitted)(*arguments)
        with files.whole_file(path) as file:
            file.write(traced.serialize())
    except Exception as error:  # what can't be kept runs all the same
        log.debug("a program is not kept in %s: %s", path, error)
        return jitted
    return jax.jit(traced.call)
