"""What the command lines share: flags, configs, and errors a person can read."""

import logging
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import absl.logging
from absl import app, flags
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from sppnet_jax.config import base_config, check_config
from sppnet_jax.run import caches, parallel

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The settings of a run, a file such as configs/digits.py."
)
WORKDIR = flags.DEFINE_string("workdir", None, "The folder of the run.")
_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    "",
    "To train with several processes: host:port of process 0, or 'auto' on a cluster "
    "that JAX knows (TPU pod, Slurm, Open MPI).",
)
_PROCESS_INDEX = flags.DEFINE_integer("process_index", 0, "Which process this is.")
_PROCESS_COUNT = flags.DEFINE_integer("process_count", 1, "How many processes run.")
_TRACEBACK = flags.DEFINE_bool("traceback", False, "Show where an error came from.")


def run(
    main: Callable[[Sequence[str]], None],
    *,
    saved_config: bool = False,
    base: Callable[[], ConfigDict] = base_config,
) -> None:
    """Runs a command line; user errors print their message and exit with 1.

    `saved_config`: without a --config, the one that --workdir was trained with.
    `base`: makes a config that has all the fields there are.
    """

    def guarded(argv: Sequence[str]) -> None:
        show_own_log()
        caches.use_compilation_cache()
        try:
            main(argv[1:])
        except (ValueError, OSError, RuntimeError) as error:
            if _TRACEBACK.value:
                traceback.print_exc()
            sys.exit(f"error: {error}\n(--traceback shows where it came from)")

    shown = (CONFIG, WORKDIR, _COORDINATOR, _PROCESS_INDEX, _PROCESS_COUNT, _TRACEBACK)
    for flag in shown:  # by --help, although the main module doesn't define them
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[flag.name])
    app.run(
        guarded,
        flags_parser=lambda argv: _parse_flags(
            _with_saved_config(argv) if saved_config else argv, base
        ),
    )


def given_config(check: Callable[[ConfigDict], None] = check_config) -> ConfigDict:
    """The config of the command line, checked."""
    config = CONFIG.value
    if config is None:
        raise ValueError("give a config: --config=configs/digits.py")
    if not isinstance(config, ConfigDict):
        raise ValueError(_why_unreadable(config))
    check(config)
    return config


def join_processes() -> None:
    """Joins the processes that the flags name; before any other use of JAX."""
    parallel.join_processes(
        _COORDINATOR.value, _PROCESS_INDEX.value, _PROCESS_COUNT.value
    )


def check_single_process() -> None:
    """Raises ValueError if the flags ask for several processes."""
    if _COORDINATOR.value or _PROCESS_COUNT.value > 1:
        raise ValueError(
            "this command runs in one process, on all devices of this machine: leave "
            "out --coordinator and --process_count"
        )


def given_workdir() -> Path:
    """The folder of the run."""
    if not WORKDIR.value:
        raise ValueError("give the folder of the run: --workdir=runs/NAME")
    return Path(WORKDIR.value).expanduser()


def given_workdirs() -> list[Path]:
    """The folders of several runs, written with commas between them."""
    names = [name.strip() for name in str(given_workdir()).split(",")]
    return [Path(name).expanduser() for name in names if name]


class _LogAboveProgressBar(logging.Handler):
    """Prints log lines without tearing a progress bar apart."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def show_own_log() -> None:
    """This project's log lines from INFO on; only warnings of the libraries'."""
    absl.logging.set_verbosity(absl.logging.WARNING)
    handler = _LogAboveProgressBar()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    own = logging.getLogger("sppnet_jax")
    # `python -m sppnet_jax.train` runs under the name __main__.
    for logger in (own, logging.getLogger("__main__")):
        logger.handlers = [handler]
        logger.setLevel(logging.INFO)
        logger.propagate = False


def _with_saved_config(argv: list[str]) -> list[str]:
    """The arguments with the config of their --workdir, if they name no other."""
    known = {}
    for name, value in zip(argv, [*argv[1:], ""], strict=True):
        key, equals, given = name.lstrip("-").partition("=")
        known[key] = given if equals else value
    if "config" in known or "workdir" not in known:
        return argv
    file = Path(__file__).parent / "saved_config.py"
    first = known["workdir"].split(",")[0]
    return [argv[0], f"--config={file}:{first}", *argv[1:]]


def _parse_flags(argv: list[str], base: Callable[[], ConfigDict]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        sys.exit(f"error: {_reason(error)}")
    except FileNotFoundError as error:
        sys.exit(f"error: {error}")
    except (AttributeError, KeyError):
        unknown = _first_unknown_field(argv, base())
        if unknown is None:
            raise
        sys.exit(f"error: {unknown}")


def _first_unknown_field(argv: list[str], base: ConfigDict) -> str | None:
    for argument in argv:
        name = argument.split("=", 1)[0].lstrip("-")
        if not name.startswith("config."):
            continue
        group: Any = base
        path = name.removeprefix("config.").split(".")
        for depth, part in enumerate(path):
            if not isinstance(group, ConfigDict) or part not in group:
                where = ".".join(["config", *path[:depth]])
                names = ", ".join(group) if isinstance(group, ConfigDict) else "none"
                return f"unknown field {part!r}: {where} has the fields {names}"
            group = group[part]
    return None


def _why_unreadable(config: Any) -> str:
    try:
        config.batch_size  # noqa: B018  the config flag raises its reason on use
    except Exception as error:
        return f"can't read the config file: {_reason(error)}"
    return "the config file's get_config() must return an ml_collections.ConfigDict"


def _reason(error: Exception) -> str:
    """An error's text; where that is a whole traceback, its last line."""
    text = str(error).strip()
    return text.splitlines()[-1].strip() if "Traceback" in text else text
