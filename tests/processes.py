"""Processes of their own for what users start, without seconds of imports for each.

They are forked from a server process, one for each worker of pytest, that has imported
the libraries of others, and nothing of ours.
"""

import atexit
import contextlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).parent.parent
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        *("pytest", "numpy", "jax", "jax.numpy", "flax.linen", "optax", "cv2", "grain"),
        *("orbax.checkpoint", "tensorflow_datasets", "matplotlib.pyplot", "PIL.Image"),
        *("scipy.optimize", "scipy.stats", "sklearn.svm", "sklearn.datasets"),
        *("tensorboardX", "ml_collections.config_flags", "absl.app", "tqdm"),
    ]
)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt here, also where tests run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def with_devices(count: int) -> dict[str, str]:
    """The environment of a process with so many host devices; the last flag counts."""
    flag = f"--xla_force_host_platform_device_count={count}"
    return {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flag}"}


def run_program(program: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Runs lines of Python in a process of their own; it has to end with 0."""
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )


class Finished(NamedTuple):
    """What a process printed, and how it ended (−9: killed by signal 9)."""

    returncode: int
    stdout: str
    stderr: str


class Started:
    """A process that calls a function, and what it has printed so far."""

    def __init__(
        self,
        function: Callable[..., None],
        *arguments: Any,
        cwd: Path = REPOSITORY,
        devices: int = 2,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        names = {**os.environ, **with_devices(devices), **(environment or {})}
        given = function, arguments, self._folder.name, str(cwd), names
        self._process = _CONTEXT.Process(target=_run, args=given)
        self._process.start()
        self.pid = self._process.pid

    @property
    def running(self) -> bool:
        return self._process.is_alive()

    def send(self, number: int, *, to_all: bool = False) -> None:
        """A signal; `to_all`: also to the processes that it has started."""
        (os.killpg if to_all else os.kill)(self.pid, number)

    def printed(self, name: str = "stdout") -> str:
        """All of stdout or stderr so far."""
        path = Path(self._folder.name, name)
        return path.read_text() if path.exists() else ""

    def wait_until(self, condition: Callable[[], Any], seconds: float = 180) -> None:
        """Returns when a condition holds; fails if the process ends before."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.running, self.printed("stderr")
            assert time.monotonic() < deadline, self.printed("stderr")
            time.sleep(0.02)

    def end(self, seconds: float = 300) -> Finished:
        """Waits for its end; kills it and fails if that takes longer."""
        self._process.join(seconds)
        late = self.running
        if late:
            os.killpg(self.pid, signal.SIGKILL)
            self._process.join()
        printed = self.printed("stdout"), self.printed("stderr")
        self._folder.cleanup()
        assert not late, f"it ran for more than {seconds} s\n{printed[0]}\n{printed[1]}"
        return Finished(self._process.exitcode, *printed)


def run_command(module: str, arguments: list[str]) -> None:
    """`python -m MODULE ARGUMENTS…`, in this process."""
    sys.argv = [module, *arguments]
    sys.path[0] = os.getcwd()
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def run_and_be_killed(module: str, arguments: list[str], name: str, done: int) -> None:
    """The same, killed (signal 9) when a progress bar of that name has come so far."""
    from sppnet_jax.run import progress

    def kill(bar: str, count: int) -> None:
        if bar == name and count >= done:
            os.kill(os.getpid(), signal.SIGKILL)

    progress.WATCHERS.append(kill)
    run_command(module, arguments)


def start_anew(module: str, arguments: list[str]) -> None:
    """`python -m MODULE ARGUMENTS…` in place of this process, with its own imports."""
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])


def import_times(module: str, arguments: list[str]) -> None:
    """The same, and writes each module that is imported to stderr."""
    python = [sys.executable, "-X", "importtime", "-m"]
    os.execv(sys.executable, [*python, module, *arguments])


def _run(
    function: Callable[..., None],
    arguments: tuple[Any, ...],
    folder: str,
    cwd: str,
    environment: dict[str, str],
) -> None:
    os.setsid()
    # As a shell would start it, also where the tests run in the background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    code: Any = 0
    try:
        function(*arguments)
    except SystemExit as ended:
        code = ended.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()  # as at the end of a program, which says first why it ends
    sys.exit(code)
