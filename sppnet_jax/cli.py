"""What the command lines share: flags, settings, and errors a person can read."""

import atexit
import contextlib
import functools
import glob
import io
import logging
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import absl.logging
from absl import app, flags
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

import sppnet_jax.run.quick_start
from sppnet_jax.data.sources import FOLDERS
from sppnet_jax.run import caches, memory, parallel
from sppnet_jax.run.files import check_can_write
from sppnet_jax.run.interrupt import Interrupted, stop_at_signals
from sppnet_jax.run.photo_results import check_suffix
from sppnet_jax.run.settings import MOVED, fields_of, plain, read, unknown_field
from sppnet_jax.run.shares import Share, check_share, cluster_share
from sppnet_jax.training.network_settings import NetworkSettings

if TYPE_CHECKING:
    from sppnet_jax.network.trained import Network

Kind = TypeVar("Kind", bound=tuple)
WRONG_USAGE = 2  # the exit code, as argparse has it; 1 is a failure

log = logging.getLogger(__name__)

WORKDIR = flags.DEFINE_string("workdir", None, "The folder of the run.")
_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    "",
    "Of several processes that train a network: host:port of process 0. 'auto' on a "
    "cluster that JAX knows (TPU pod, Slurm, Open MPI), which tells all three flags.",
)
_PROCESS_INDEX = flags.DEFINE_integer("process_index", 0, "Which process this is.")
_PROCESS_COUNT = flags.DEFINE_integer("process_count", 1, "How many processes run.")
_TRACEBACK = flags.DEFINE_bool("traceback", False, "Show where an error came from.")
TRUNK = flags.DEFINE_string(
    "trunk",
    "",
    "A published network with its pretrained weights in place of a --workdir, such as "
    "efficientnet_lite0, whose weights are installed.",
)
WEIGHTS = flags.DEFINE_string(
    "weights",
    "pretrained",
    "Of the --trunk: those of its package; or a file .safetensors, .npz, .h5 or .pth, "
    "package:NAME, hub:OWNER/NAME or hub:OWNER/NAME/FILE.",
)
OUT = flags.DEFINE_string(
    "out",
    "",
    "The file that is written: what is found in photographs, .json or .csv, after each "
    "of them; of an export, the file or folder that is made.",
)
# Settings that may differ between the processes of one training.
_OF_ONE_PROCESS = ("root", "data_dir", "cache", "network", "workers", "threads")
_CONFIG_HELP = "The settings of a run, a file such as configs/digits.py."
_WHERE_CONFIGS_ARE = "the project's own are in configs/ of its repository"


class UsageError(ValueError):
    """A command line that can't be meant; the command exits with 2."""


def base_config() -> ConfigDict:
    """A config of all settings of a network's training, the paper's for ImageNet.

    Its fields, their meaning and their valid values are those of `NetworkSettings`.
    """
    return ConfigDict(plain(NetworkSettings()))


def detector_base_config() -> ConfigDict:
    """A config of all settings of a detector, the paper's for VOC 2007.

    Its fields, their meaning and their valid values are those of `DetectorSettings`.
    """
    from sppnet_jax.detection.detector_settings import DetectorSettings

    return ConfigDict(plain(DetectorSettings()))


def run(
    main: Callable[[Sequence[str]], None],
    kind: Any,
    saved: Callable[[Path], Any] | None = None,
    published: Callable[[str, str], Any] | None = None,
) -> None:
    """Runs a command line; errors print their message and exit with 1.

    A command line that can't be meant exits with 2.

    `kind`: the NamedTuple of the command's settings.
    `saved`: reads those that a --workdir was trained with, where there is no --config.
    `published`: those of a --trunk and its --weights, for commands that take one.
    """

    def guarded(argv: Sequence[str]) -> None:
        sppnet_jax.run.quick_start.collect_from_here()
        memory.keep_memory()
        caches.use_compilation_cache()
        names = [part.partition("=")[0] for part in sys.argv if part.startswith("--")]
        for name in dict.fromkeys(n for n in names[1:] if names.count(n) > 1):
            log.warning(
                "%s is given %d times: the last counts", name, names.count(name)
            )
        stop_at_signals()
        try:
            main(argv[1:])
        except Interrupted as error:  # by all processes, that have saved
            parallel.wait_for_all_processes("all are interrupted")
            _fail(str(error))
        except KeyboardInterrupt:
            _fail("interrupted; the same command goes on from there")
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            if _TRACEBACK.value:
                traceback.print_exc()
            if isinstance(error, UsageError):
                _fail(f"error: {error}", WRONG_USAGE)
            _fail(
                f"error: {parallel.reason(error)} (--traceback shows where it came "
                "from)"
            )
        except Exception:  # a fault of this program
            _fail(traceback.format_exc())

    for stream in (sys.stdout, sys.stderr):  # names of files may be no text
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    show_own_log()
    given = _given_flags(sys.argv)
    shown = [WORKDIR, _COORDINATOR, _PROCESS_INDEX, _PROCESS_COUNT, _TRACEBACK]
    shown += [TRUNK, WEIGHTS] if published else []
    if {"help", "helpshort", "h", "?"} & set(given):
        _show_help(kind, shown)
        sys.exit(0)
    try:
        if saved and not {"config", "workdir", "trunk", "helpfull"} & set(given):
            other = " or a pretrained network: --trunk=efficientnet_lite0"
            raise UsageError(
                "give the folder of the run: --workdir=runs/NAME"
                + (other if published else "")
            )
        if "trunk" in given:
            if published is None or {"workdir", "config"} & set(given):
                raise UsageError(
                    "--trunk takes the place of --workdir and --config"
                    if published
                    else "this command takes no --trunk: give the folder of a run, "
                    "--workdir=runs/NAME"
                )
            weights = given.get("weights", WEIGHTS.default)
            config = ConfigDict(plain(published(given["trunk"], weights)))
            config_flags.DEFINE_config_dict("config", config, _CONFIG_HELP)
        elif "weights" in given:
            raise UsageError(
                "--weights are of a --trunk: name it, too; for a training, give "
                "--config.model.weights"
            )
        elif saved and "config" not in given and "workdir" in given:
            workdirs = _workdirs(given["workdir"]) or [Path()]
            config = ConfigDict(plain(saved(workdirs[0])))
            config_flags.DEFINE_config_dict("config", config, _CONFIG_HELP)
        else:
            path = given.get("config", "").partition(":")[0]
            if path and not Path(path).is_file():
                raise UsageError(
                    f"there is no config file {Path(path).absolute()}: give its path; "
                    f"{_WHERE_CONFIGS_ARE}"
                )
            config_flags.DEFINE_config_file("config", None, _CONFIG_HELP)
    except Exception as error:  # a config file may raise any
        _refuse(error, kind)
    with _ends_after_errors():
        app.run(guarded, flags_parser=lambda argv: _parse_flags(argv, kind))


@contextlib.contextmanager
def _ends_after_errors() -> Iterator[None]:
    """Ends the process with an error, also where threads of libraries would go on.

    One that writes a checkpoint waits forever where it could not begin.
    """
    try:
        yield
    except SystemExit as ended:
        others = [thread for thread in threading.enumerate() if not thread.daemon]
        if not ended.code or others == [threading.main_thread()]:
            raise
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ended.code if isinstance(ended.code, int) else 1)


def given_settings(kind: type[Kind]) -> Kind:
    """The settings of the command line, checked."""
    config = flags.FLAGS.config
    if config is None and "config" not in _given_flags(sys.argv):
        raise UsageError(
            "give a config: --config=configs/digits.py, or the path of any other; "
            f"{_WHERE_CONFIGS_ARE}"
        )
    if not isinstance(config, ConfigDict):
        raise UsageError(_why_unreadable(config))
    values = config.to_dict()
    _check_kind(kind, values)
    with _wrong_usage():
        settings = read(kind, values)
    _check_place(values["data"])
    return settings


def join_processes(settings: Any) -> None:
    """Joins the processes that the flags name; before any other use of JAX.

    Raises: ValueError where they can't be joined, and where another has other settings.
    """
    share = given_share()
    with _wrong_usage():
        parallel.join_processes(_COORDINATOR.value, share.index, share.count)
    values = {
        name: functools.reduce(getattr, name.split("."), settings)
        for name, _ in fields_of(type(settings))
        if name.rpartition(".")[2] not in _OF_ONE_PROCESS
    }
    parallel.check_alike("settings", {f"config.{n}": v for n, v in values.items()})


def has_coordinator() -> bool:
    """Whether the flags say how processes find each other, to train together."""
    return bool(_COORDINATOR.value)


def given_share() -> Share:
    """Which process this is of those that the flags name, which share a folder.

    Raises: ValueError for numbers that are none, and for "auto" outside a cluster.
    """
    with _wrong_usage():
        if _COORDINATOR.value == "auto":
            return cluster_share()
        return check_share(_PROCESS_INDEX.value, _PROCESS_COUNT.value)


def check_single_process() -> None:
    """Raises ValueError if the flags ask for several processes."""
    if _COORDINATOR.value or _PROCESS_COUNT.value > 1:
        raise UsageError(
            "this command runs in one process, on all devices of this machine: leave "
            "out --coordinator and --process_count"
        )


def refuse_arguments(argv: Sequence[str]) -> None:
    """Raises ValueError for arguments that are no flags, and for --out.

    For commands that take no photographs.
    """
    if argv:
        raise UsageError(f"unexpected arguments: {' '.join(argv)}")
    if OUT.value:
        raise UsageError(
            "--out writes what is found in photographs: it is of predict and of detect "
            "image"
        )


def given_workdir() -> Path:
    """The folder of the run."""
    if not WORKDIR.value:
        raise UsageError("give the folder of the run: --workdir=runs/NAME")
    workdir = Path(WORKDIR.value).expanduser()
    if workdir.is_file():
        raise UsageError(f"--workdir={workdir} is a file: give the folder of a run")
    return workdir


def given_network(settings: NetworkSettings) -> "Network":
    """The trained network of the --workdir, or the pretrained one of the --trunk."""
    from sppnet_jax.network.pretrained import pretrained_network
    from sppnet_jax.network.trained import load_network

    if TRUNK.value:
        return pretrained_network(
            settings.model,
            image_size=settings.data.image_size,
            resize_side=settings.data.resize_side,
        )
    return load_network(given_workdir(), plain(settings))


def given_workdirs() -> list[Path]:
    """The folders of several runs, written with commas between them."""
    return _workdirs(str(given_workdir()))


def _workdirs(given: str) -> list[Path]:
    whole = Path(given).expanduser()
    if whole.exists():  # its name may have a comma
        return [whole]
    names = [name.strip() for name in given.split(",")]
    return [Path(name).expanduser() for name in names if name]


def given_photos(arguments: Sequence[str]) -> list[str]:
    """The photographs that a command line names by files, folders and patterns.

    Of a folder those are its image files, by name, and not those of the folders in it;
    a pattern is one of `glob`, such as "photos/**/*.jpg". A file is taken as it is,
    also one that is not there: whoever reads it says so. Each comes once.

    Raises: ValueError for a folder without image files, and a pattern without a match.
    """
    from sppnet_jax.data import folders

    photos: list[str] = []
    for given in arguments:
        path = os.path.expanduser(given)
        if os.path.isdir(path):
            names = folders.list_folder(Path(path))[1]
            found = [os.path.join(path, name) for name in names]
            found = [file for file in found if folders.is_image(Path(file))]
            why = f"holds no image files ({', '.join(folders.IMAGE_SUFFIXES)})"
        elif glob.has_magic(path) and not os.path.exists(path):
            found = sorted(filter(os.path.isfile, glob.glob(path, recursive=True)))
            why = "matches no file"
        else:
            found = [given]
        if not found:
            raise UsageError(
                f"{given!r} {why}: give photographs, a folder of them, or a pattern "
                "such as 'photos/**/*.jpg'"
            )
        photos += found
    return list(dict.fromkeys(photos))


def given_out() -> Path | None:
    """The file that --out names; None where none is given.

    Raises: ValueError for a suffix other than .json and .csv; OSError for a file that
    can't be written.
    """
    if not OUT.value:
        return None
    out = Path(OUT.value).expanduser()
    check_suffix(out)
    check_can_write(out)
    return out


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


@contextlib.contextmanager
def _wrong_usage() -> Iterator[None]:
    """Faults in here are the command line's."""
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from error


def _fail(message: str, code: int = 1) -> NoReturn:
    """Ends the command, and with it those of processes that were joined."""
    print(message, file=sys.stderr, flush=True)
    parallel.end_together(code)
    sys.exit(code)


def _given_flags(argv: Sequence[str]) -> dict[str, str]:
    """The flags of a command line before they are parsed, by name."""
    given: dict[str, str] = {}
    for name, value in zip(argv, [*argv[1:], ""], strict=True):
        if name == "--":
            break
        if name.startswith("-"):
            key, equals, inline = name.lstrip("-").partition("=")
            given[key] = inline if equals else value
    return given


def _show_help(kind: Any, shared: Sequence[flags.FlagHolder]) -> None:
    """Prints what a command does, its own flags, those of all, and the settings."""
    print(sys.modules["__main__"].__doc__)
    own = flags.FLAGS.get_key_flags_for_module(sys.argv[0])
    for flag in (*own, *(flags.FLAGS[holder.name] for holder in shared)):
        default = f" Default: {flag.default}." if flag.default else ""
        told = f"--{'[no]' * flag.boolean}{flag.name}: {flag.help}{default}"
        print(flags.text_wrap(told, 88, "    ", ""))
    print(f"--config: {_CONFIG_HELP}")
    print("--config.FIELD=VALUE: changes a setting; these, with the paper's values:")
    for name, _ in fields_of(kind):
        value = functools.reduce(getattr, name.split("."), kind())
        print(f"    {name}={value!r}")


def _parse_flags(argv: list[str], kind: Any) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except SystemExit:  # of --helpfull
        sys.exit(0)
    except Exception as error:  # a config file may raise any
        _refuse(error, kind)


def _refuse(error: Exception, kind: Any) -> NoReturn:
    """Exits with what is wrong with the flags or with the config file."""
    given = _given_flags(sys.argv)
    if "traceback" in given:
        traceback.print_exception(error)
    names = [name for name in given if name.startswith("config.")]
    faults = [unknown_field(kind, name.removeprefix("config.")) for name in names]
    found = next(filter(None, faults), "")
    missing = _reason(error).strip("\"'")
    if not found and any(missing in name.split(".") for name in names):
        found = (
            f"the config {given.get('config')} has no {missing}: is it another "
            "command's? A detector's is for python -m sppnet_jax.detect alone"
        )
    raised = not isinstance(error, flags.Error | ValueError | OSError)
    if not found and (raised or "Traceback" in str(error)):  # by the file's own code
        kind_of_error = f"{type(error).__name__}: " if raised else ""
        reason = kind_of_error + _reason(error).removeprefix("ValueError: ")
        path = given.get("config", "").partition(":")[0]
        found = f"can't read the config {path}: {_with_new_names(reason)}"
    code = 1 if isinstance(error, OSError) else WRONG_USAGE
    _fail(f"error: {found or _reason(error)}", code)


def _check_kind(kind: Any, values: dict[str, Any]) -> None:
    """Raises ValueError for the config of a detector in place of a network's."""
    if kind is NetworkSettings and "proposals" in values:
        raise UsageError(
            "this is the config of a detector, no network: detectors are trained and "
            "tested by python -m sppnet_jax.detect"
        )
    if kind is not NetworkSettings and "model" in values:
        raise UsageError(
            "this is the config of a classifier, no detector: take one such as "
            f"configs/detect_folder.py; {_WHERE_CONFIGS_ARE}"
        )


def _check_place(data: Mapping[str, Any]) -> None:
    """Raises UsageError for a folder, given here, of a data set that isn't one."""
    given = {"config", "config.data.root"} & set(_given_flags(sys.argv))
    if given and data["root"] and data["name"] not in FOLDERS:
        raise UsageError(
            f"config.data.root={data['root']!r} is for {', '.join(FOLDERS)}, but "
            f"config.data.name is {data['name']!r}, which is no folder: leave out the "
            "root, or give its kind, --config.data.name=image_folder"
        )


def _why_unreadable(config: Any) -> str:
    if not type(config).__module__.startswith("ml_collections"):
        return (
            "the config file's get_config() must return an ml_collections.ConfigDict, "
            f"got {type(config).__name__}"
        )
    try:
        config.batch_size  # noqa: B018  the config flag raises its reason on use
    except Exception as error:
        return f"can't read the config file: {_with_new_names(_reason(error))}"
    return "can't read the config file"


def _with_new_names(reason: str) -> str:
    """A reason, and what the settings that it names are called now."""
    moved = [name for name in re.findall(r"['\"](\w+)['\"]", reason) if name in MOVED]
    hints = [f"; config.{name} is now config.{MOVED[name]}" for name in moved]
    return reason + "".join(hints)


def _reason(error: Exception) -> str:
    """An error's text; where that is a whole traceback, its last line."""
    text = str(error).strip()
    return text.splitlines()[-1].strip() if "Traceback" in text else text
