"""What the command lines keep from one start to the next, in the user's cache folder.

Compiled programs and statistics of training sets. All of it can be removed at any
time: it is made again. JAX finds a program by the versions of JAX and XLA, its flags
and its kind of device, with the instructions that a CPU knows: machines may share it.
"""

import logging
import os
from pathlib import Path
from typing import Any

import jax

log = logging.getLogger(__name__)

# Programs that compile faster are not worth a file.
LEAST_SECONDS = 0.2


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
