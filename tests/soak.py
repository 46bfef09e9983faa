"""For hours: runs that are killed, out of disk, started twice or given too much.

    python tests/soak.py --hours=2 --out=FOLDER

draws one case after the other and prints a line of each. What a command leaves is
compared with that of one that nothing happened to: numbers must be equal in every
digit. The first that differs ends it, and keeps its folder. FOLDER/soak.json says how
often each case was run. A full disk is a small file system in memory, for which the
script must run as root on Linux; it is left out elsewhere.
"""

import argparse
import hashlib
import json
import os
import platform
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).parent.parent
TRAIN = [
    *("train", "--config=configs/digits.py", "--config.model.width=0.05"),
    *("--config.data.image_size=32", "--config.data.resize_side=36"),
    *("--config.batch_size=16", "--config.max_steps=150", "--config.log_steps=1"),
    *("--config.checkpoint_steps=10", "--config.data.workers=2"),
]
EVALUATE = ["evaluate", "--config.data.test_split=test[:100]"]
DETECTOR = [
    *("detect", "train", "--config=configs/detect_digits.py"),
    *("--config.data.train_split=train[:60]", "--config.data.test_split=test[:30]"),
    *("--config.scales=(60,)", "--config.proposals.width=120"),
    *("--config.proposals.min_side=10", "--config.proposals.max_windows=120"),
    *("--config.finetune.steps=20", "--config.finetune.drop_steps=()"),
    *("--config.finetune.batch_size=16", "--config.svm.max_rounds=2"),
]
TEST = ["detect", "test"]
# Of what differs from run to run, in results.
TIMES = {"seconds", "images_per_second", "workdir", "workdirs", "written", "time"}
MEMORY = 200  # MB, what seven times as many photographs may take more


class Soak:
    """The folder of all runs, what is to come out, and how long it took."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.whole = folder / "whole"
        self.seconds: dict[str, float] = {}

    def start(self, words: list[str], workdir: Path, *more: str) -> subprocess.Popen:
        """A command in a process group of its own; its words go to a file beside."""
        environment = {
            **os.environ,
            "XDG_CACHE_HOME": str(self.folder / "cache"),
            "PYTHONPATH": str(REPOSITORY),
        }
        module, *arguments = words
        command = [sys.executable, "-m", f"sppnet_jax.{module}", *arguments]
        with (self.folder / "log.txt").open("w") as log:
            return subprocess.Popen(
                [*command, f"--workdir={workdir}", *more],
                cwd=REPOSITORY,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # Also where this script is in the background, and ignores it.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )

    def run(self, words: list[str], workdir: Path, *more: str) -> int:
        """How a command ended."""
        return self.start(words, workdir, *more).wait(1800)

    def said(self) -> str:
        """What the last command printed."""
        return (self.folder / "log.txt").read_text(errors="replace")

    def make_whole(self) -> None:
        """What comes out where nothing happens, and how long each command takes.

        Twice: the first fills the cache of compiled programs.
        """
        for _ in range(2):
            self._make_whole(fresh(self.whole))

    def _make_whole(self, whole: Path) -> None:
        detector = whole / "detector"
        network = f"--config.network={whole}"
        for words, workdir, more in (
            (TRAIN, whole, []),
            (EVALUATE, whole, []),
            ([*DETECTOR, network], detector, []),
            (TEST, detector, []),
        ):
            began = time.monotonic()
            status = self.run(words, workdir, *more)
            check(status == 0, self.said())
            self.seconds[" ".join(words[:2])] = time.monotonic() - began

    def copy_of_whole(self, name: str, *left_out: str) -> Path:
        """The finished run at another place, without some of its parts."""
        place = fresh(self.folder / name)
        shutil.copytree(self.whole, place, ignore=shutil.ignore_patterns(*left_out))
        return place


def check(holds: bool, why: str) -> None:
    """Ends the script where something doesn't hold."""
    if not holds:
        raise AssertionError(why)


def fresh(folder: Path) -> Path:
    """A folder that isn't there."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def without_times(value: object) -> object:
    """Results without what differs from run to run."""
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in TIMES}
    if isinstance(value, list):
        return [without_times(part) for part in value]
    return value


def outcome(workdir: Path) -> dict[str, object]:
    """What a run left, by file: losses, results, and arrays by their hash."""
    found: dict[str, object] = {}
    for path in sorted(workdir.rglob("*")):
        name = str(path.relative_to(workdir))
        if name == "metrics.jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = {r["step"]: r["loss"] for r in rows if r["split"] == "train"}
        elif path.name == "results.json" or name.startswith("evaluate_"):
            if path.suffix == ".json":
                found[name] = without_times(json.loads(path.read_text()))
        elif path.suffix == ".npz" and "cache" not in path.parts:
            with np.load(path) as arrays:
                found[name] = {
                    key: hashlib.sha256(arrays[key].tobytes()).hexdigest()
                    for key in arrays.files
                }
    return found


def compare(workdir: Path, whole: Path) -> None:
    """Ends the script where a run left something else than the whole one."""
    seen, wanted = outcome(workdir), outcome(whole)
    differ = [name for name in wanted if seen.get(name) != wanted[name]]
    check(not differ, f"{workdir} differs from {whole} in {', '.join(differ)}")


def kill_until_done(soak: Soak, words: list[str], workdir: Path) -> str:
    """Starts a command again and again, each killed at a random moment."""
    usual, kills = soak.seconds[" ".join(words[:2])], 0
    while True:
        process = soak.start(words, workdir)
        try:
            status = process.wait(soak.random.uniform(0, 1.3 * usual))
            check(status == 0, soak.said())
            return f"killed {kills} times"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
        if kills == 6:  # enough
            check(soak.run(words, workdir) == 0, soak.said())
            return f"killed {kills} times"


def killed_training(soak: Soak) -> str:
    """A network's training and its test."""
    workdir = fresh(soak.folder / "training")
    told = kill_until_done(soak, TRAIN, workdir)
    kill_until_done(soak, EVALUATE, workdir)
    shutil.copytree(soak.whole / "detector", workdir / "detector")
    compare(workdir, soak.whole)
    return told


def killed_detector(soak: Soak) -> str:
    """A detector's training, with a cache of its own, and its test."""
    workdir = fresh(soak.folder / "detector")
    words = [*DETECTOR, f"--config.network={soak.whole}"]
    told = kill_until_done(soak, [*words, f"--config.cache={workdir}/cache"], workdir)
    kill_until_done(soak, TEST, workdir)
    compare(workdir, soak.whole / "detector")
    return told


def interrupted_training(soak: Soak) -> str:
    """Ctrl-C at a random moment: it ends with 1, soon, and a sentence."""
    count, usual = 0, soak.seconds[" ".join(TRAIN[:2])]
    for number in (signal.SIGINT, signal.SIGTERM):
        workdir = fresh(soak.folder / "interrupted")
        process = soak.start(TRAIN, workdir)
        time.sleep(soak.random.uniform(0.3, 1) * usual)
        os.kill(process.pid, number)
        status = process.wait(120)
        count += status != 0
        # Before its own lines, while libraries are loaded, Python tells where it was.
        check(status <= 1, soak.said())
        check(soak.run(TRAIN, workdir) == 0, soak.said())
        losses = outcome(workdir)["metrics.jsonl"]
        wanted = outcome(soak.whole)["metrics.jsonl"]
        check(losses == wanted, f"other losses in {workdir}")
    return f"interrupted {count} times"


def started_twice(soak: Soak) -> str:
    """Two trainings in one folder: one does it all, or one after the other."""
    workdir = fresh(soak.folder / "twice")
    first = soak.start(TRAIN, workdir)
    time.sleep(soak.random.uniform(0, 8))
    second = soak.start(TRAIN, workdir)
    states = first.wait(1800), second.wait(1800)
    check(0 in states and set(states) <= {0, 1}, f"they ended with {states}")
    check("Traceback" not in soak.said(), soak.said())
    losses = outcome(workdir)["metrics.jsonl"]
    wanted = outcome(soak.whole)["metrics.jsonl"]
    check(losses == wanted, f"other losses in {workdir}")
    return f"they ended with {states}"


def one_of_two_killed(soak: Soak) -> str:
    """Two processes share a detector's test; one is killed, the other ends it."""
    workdir = soak.copy_of_whole("shared", "test") / "detector"
    of_two = "--process_count=2"
    first = soak.start(TEST, workdir, of_two, "--process_index=0")
    second = soak.start(TEST, workdir, of_two, "--process_index=1")
    time.sleep(soak.random.uniform(0, soak.seconds[" ".join(TEST)]))
    os.killpg(second.pid, signal.SIGKILL)
    second.wait()
    status = first.wait(1800)
    if status:  # whoever starts it again
        check(soak.run(TEST, workdir) == 0, soak.said())
    compare(workdir, soak.whole / "detector")
    return f"the other ended with {status}"


def full_disk(soak: Soak) -> str:
    """A disk that fills up at any file: one sentence, and nothing is lost."""
    disk = soak.folder / "disk"
    disk.mkdir(exist_ok=True)
    subprocess.run(["umount", str(disk)], capture_output=True)
    size = soak.random.randint(20, 3000)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        return "left out: it needs root"
    try:
        workdir = disk / "run"
        status = soak.run(TRAIN, workdir)
        said = soak.said().strip()
        check(status in (0, 1) and "Traceback" not in said, said)
        last = [line for line in said.splitlines() if line.startswith("error:")]
        check(status == 0 or len(last) == 1, said)
        grow = ["mount", "-o", "remount,size=200m", str(disk)]
        subprocess.run(grow, check=True)
        check(soak.run(TRAIN, workdir) == 0, soak.said())
        losses = outcome(workdir)["metrics.jsonl"]
        wanted = outcome(soak.whole)["metrics.jsonl"]
        check(losses == wanted, f"other losses after a full disk of {size} kB")
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    return f"of {size} kB: ended with {status}"


def many_photographs(soak: Soak) -> str:
    """Seven times as many photographs take no more memory."""
    folder = soak.folder / "photos"
    if not folder.exists():
        import cv2

        folder.mkdir()
        rng = np.random.default_rng(0)
        for number in range(280):
            coarse = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
            photo = cv2.resize(coarse, (2000, 1500))
            cv2.imwrite(str(folder / f"{number:03d}.jpg"), photo)
    peaks = []
    for few in (f"{folder}/0[0-3]?.jpg", f"{folder}/*.jpg"):
        process = soak.start(["predict"], soak.whole, few, f"--out={folder}/found.csv")
        _, status, usage = os.wait4(process.pid, 0)
        check(status == 0, soak.said())
        peaks.append(usage.ru_maxrss // 1000)
    check(peaks[1] < peaks[0] + MEMORY, f"peaks of {peaks} MB")
    return f"peaks of {peaks[0]} and {peaks[1]} MB"


CASES: list[Callable[[Soak], str]] = [
    killed_training,
    killed_detector,
    interrupted_training,
    started_twice,
    one_of_two_killed,
    full_disk,
    many_photographs,
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--hours", type=float, default=1.0, help="how long at least")
    parser.add_argument(
        "--out", type=Path, required=True, help="the folder of all runs"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    given = parser.parse_args()
    folder = given.out.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    soak, counts = Soak(folder, given.seed), Counter[str]()
    soak.make_whole()
    ends = time.monotonic() + given.hours * 3600
    while time.monotonic() < ends:
        for case in CASES:
            began = time.monotonic()
            told = case(soak)
            counts[case.__name__] += 1
            print(
                f"{case.__name__}: {told}, {time.monotonic() - began:.0f} s", flush=True
            )
            result = {
                "rounds": dict(counts),
                "seed": given.seed,
                "machine": platform.processor() or platform.machine(),
                "cores": os.cpu_count(),
                "children_max_gb": round(
                    resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6, 2
                ),
            }
            (folder / "soak.json").write_text(json.dumps(result, indent=2))
            if time.monotonic() > ends:
                break


if __name__ == "__main__":
    main()
