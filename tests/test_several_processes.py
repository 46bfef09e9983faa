"""Processes that share a folder make each piece once, and the same as one process."""

import itertools
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from test_pretrained_detector import base, make  # noqa: F401, a fixture
from test_window_features import BOXES, MODEL, PARAMS, PLAIN, SCALES, SOURCE, convolve

from sppnet_jax.classification.evaluation import evaluate_networks
from sppnet_jax.classification.feature_files import load_features, write_features
from sppnet_jax.detection import maps, proposals, rcnn, trained_detector
from sppnet_jax.detection.box_split import open_split_of
from sppnet_jax.detection.detector_evaluation import evaluate_detectors
from sppnet_jax.detection.detector_training import train_detector
from sppnet_jax.detection.rcnn import convolve_windows
from sppnet_jax.detection.trained_detector import detect_split, load_detector
from sppnet_jax.network.trained import as_network, load_network
from sppnet_jax.run import parallel, shares
from sppnet_jax.run.run_folder import read_json
from sppnet_jax.run.shares import Share, check_share, cluster_share, in_parts
from sppnet_jax.training.network_settings import network_settings
from tests.conftest import SMALL
from tests.data_helpers import encode, picture
from tests.network_helpers import run_with_tiny_trunk
from tests.processes import Started, run_command

pytestmark = pytest.mark.slow  # all but a few

FIRST, SECOND = Share(0, 2), Share(1, 2)


def all_of(count):
    return [Share(index, count) for index in range(count)]


@pytest.mark.parametrize("pieces", [0, 1, 7, 24])
@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_a_process_looks_at_its_own_pieces_first_and_then_at_all_others(pieces, count):
    for share in all_of(count):
        order = share.order(pieces)
        assert sorted(order) == list(range(pieces))
        own = [piece for piece in order if piece % count == share.index]
        assert order[: len(own)] == own == sorted(own)


def make_in_turns(folder, processes, pieces, delay):
    """How often each piece is made where a file is there only `delay` turns later."""
    files = [folder / str(piece) for piece in range(pieces)]
    running = {share: share.missing(files, "pieces") for share in processes}
    made, waiting = [], []
    while running:
        for share in list(running):
            piece = next(running[share], None)
            waiting.append(piece)
            if piece is None:
                del running[share]
            else:
                made.append(piece)
            if len(waiting) > delay and (old := waiting.pop(0)) is not None:
                files[old].touch()
    return [made.count(piece) for piece in range(pieces)]


@pytest.mark.parametrize("alive", [[0], [1], [0, 1, 2], [0, 2], [1, 2]])
@pytest.mark.parametrize("delay", [0, 4])
def test_the_living_make_all_pieces_and_few_of_them_twice(alive, delay, tmp_path):
    processes = [Share(index, 3) for index in alive]
    times = make_in_turns(tmp_path, processes, 60, delay)
    assert min(times) == 1
    assert sum(times) <= 60 + 3 * delay


def test_two_that_help_a_third_begin_at_different_places():
    first, second = (Share(index, 3).order(30)[10:] for index in (0, 1))
    assert next(piece for piece in first if piece % 3 == 2) == 29
    assert next(piece for piece in second if piece % 3 == 2) < 25


def test_a_process_that_finds_nothing_of_others_asks_whether_they_share(
    tmp_path, caplog
):
    for _ in SECOND.missing([tmp_path / "0", tmp_path / "1"], "maps"):
        pass
    assert "process 1 of 2 found no maps of another process" in caplog.text
    assert f"is {tmp_path} a folder that all of them share?" in caplog.text


@pytest.mark.parametrize(
    ("index", "count", "message"),
    [
        (2, 2, "--process_index must be from 0 to 1 of 2 processes"),
        (-1, 2, "got -1"),
        (0, 0, "--process_count must be at least 1, got 0"),
    ],
)
def test_processes_that_cannot_be_are_refused(index, count, message):
    with pytest.raises(ValueError, match=message):
        check_share(index, count)


def test_a_cluster_tells_which_process_this_is(monkeypatch):
    with pytest.raises(ValueError, match="and this is none: give --process_index=I"):
        cluster_share()
    told = {"JOB_ID": 7, "STEP_NODELIST": "a[1-4]", "NTASKS": 4, "PROCID": 2}
    for name, value in {**told, "LOCALID": 0}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    assert cluster_share() == Share(2, 4)


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        ("train", ["--process_index=3"], "must be from 0 to 0 of 1 processes"),
        ("evaluate", ["--process_count=-2"], "--process_count must be at least 1"),
        ("detect test", ["--coordinator=auto"], "clusters that JAX knows"),
        ("detect image x.jpg", ["--process_count=2"], "runs in one process"),
    ],
)
def test_flags_that_name_no_process_are_told(
    command, flags, message, command_line, tmp_path
):
    name, *arguments = command.split()
    kind = "detect_digits" if name == "detect" else "digits"
    given = f"--config=configs/{kind}.py", f"--workdir={tmp_path}", *flags
    if name == "detect":
        given += ("--config.network=runs/digits",)
    result = command_line(name, *arguments, *given, check=False)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_what_is_computed_in_parts_is_joined_by_the_first(tmp_path):
    seen = []

    def compute(part):
        seen.append(part)
        return part * 2.0, np.stack([part, part + 1], axis=1)

    with pytest.raises(ZeroDivisionError):
        in_parts(lambda part: 1 // 0, 50, tmp_path, SECOND, "rows")
    assert in_parts(compute, 50, tmp_path, SECOND, "rows") is None
    (tmp_path / "0003.npz").unlink()
    doubled, pairs = in_parts(compute, 50, tmp_path, FIRST, "rows")
    assert len(seen) == 16 + 1
    np.testing.assert_array_equal(doubled, 2.0 * np.arange(50))
    np.testing.assert_array_equal(pairs[:, 1], np.arange(1, 51))


def written(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.npy")
    }


def test_maps_are_the_same_to_the_last_bit_whoever_makes_them(tmp_path, monkeypatch):
    """By one process, by two at once, and by one that goes on with what is missing.

    The maps tell the bucket of their image, too.
    """
    make_function = maps.map_function

    def tell_bucket(*network):
        function = make_function(*network)

        def run(params, images, sizes):
            height, width = images.shape[1:3]
            return function(params, images, sizes) + height + width / 1000

        return run

    monkeypatch.setattr(maps, "map_function", tell_bucket)

    def run(name, **options):
        given = {"sides": SCALES[:1], "max_buckets": 4, **options}
        convolve(tmp_path / name, **given)
        return written(tmp_path / name)

    expected = run("alone")
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda share: run("together", share=share), (FIRST, SECOND)))
    assert written(tmp_path / "together") == expected
    for gone in itertools.combinations(range(len(SOURCE.records)), 2):
        for index in gone:
            maps.map_file(tmp_path / "together", SCALES[0], index).unlink()
        assert run("together", share=SECOND) == expected


def test_windows_of_rcnn_are_the_same_and_made_once(tmp_path, monkeypatch):
    given = as_network(MODEL, PARAMS, PLAIN), SOURCE, BOXES
    convolve_windows(*given, tmp_path / "alone", context=4, batch_size=8)
    warped, warp = [], rcnn.warp_windows

    def count(image, *arguments, **options):
        warped.append(image.shape)
        return warp(image, *arguments, **options)

    monkeypatch.setattr(rcnn, "warp_windows", count)
    for share in (SECOND, FIRST):
        folder = tmp_path / "together"
        convolve_windows(*given, folder, context=4, batch_size=8, share=share)
    assert len(warped) == len(SOURCE.records) - 1  # one is broken
    assert written(tmp_path / "together") == written(tmp_path / "alone")


@pytest.fixture(scope="module")
def trained(base):  # noqa: F811
    """Process 1 has made proposals and maps by itself, process 0 did the rest."""
    settings = make(base)
    with pytest.MonkeyPatch.context() as patch:
        train_detector(settings, base / "trained", SECOND)
        assert not (base / "trained" / "config.json").exists()
        for module, name in ((proposals, "find_boxes"), (maps, "map_whole_images")):
            patch.setattr(module, name, None)
        train_detector(settings, base / "trained", FIRST)
    return base / "trained"


def test_a_process_that_died_is_made_up_for_in_training(base, trained):  # noqa: F811
    train_detector(make(base, cache=str(base / "other")), base / "alone")
    for name in ("svm/svm.npz", "regression/regression.npz"):
        with np.load(base / "alone" / name) as alone, np.load(trained / name) as both:
            for key in alone:
                np.testing.assert_array_equal(both[key], alone[key])


def test_a_test_that_is_started_again_detects_in_the_rest_of_the_images(
    trained, tmp_path, monkeypatch
):
    detectors = [load_detector(trained)]
    split = open_split_of(detectors[0].settings, "test", trained)
    expected = detect_split(detectors, split)
    calls, suppress = [], trained_detector.suppress

    def die(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return suppress(*arguments)

    monkeypatch.setattr(trained_detector, "suppress", die)
    with pytest.raises(KeyboardInterrupt):
        detect_split(detectors, split, kept=tmp_path / "kept", share=SECOND)
    found = detect_split(detectors, split, kept=tmp_path / "kept", share=FIRST)
    again = detect_split(detectors, split, kept=tmp_path / "kept", share=SECOND)
    assert len(calls) == len(split.images) + 1
    for one, other, own in zip(expected, found, again, strict=True):
        for a, b, c in zip(one, other, own, strict=True):
            np.testing.assert_array_equal(a, b)
            np.testing.assert_array_equal(a, c)
            assert a.dtype == b.dtype
    # Those of another test are of no use any more.
    stricter = detectors[0].settings.test._replace(nms=0.1)
    settings = detectors[0].settings._replace(test=stricter)
    changed = [detectors[0]._replace(settings=settings)]
    detect_split(changed, split, kept=tmp_path / "kept")
    assert len(list((tmp_path / "kept").iterdir())) == 1
    assert len(calls) == 2 * len(split.images) + 1


def test_a_detector_is_tested_alike_by_one_and_by_two(trained):
    alone = evaluate_detectors([trained])
    assert not (trained / "test" / "found").exists()
    assert evaluate_detectors([trained], share=SECOND) == {}
    both = evaluate_detectors([trained], share=FIRST)
    assert {**both, "seconds": 0} == {**alone, "seconds": 0}


def test_two_command_lines_train_and_test_a_detector_as_one_does(
    base,  # noqa: F811
    command_line,
    tmp_path,
):
    arguments = [
        "--config=configs/detect_pretrained.py",
        *("--config.network=resnet18", f"--config.weights={base / 'tiny.safetensors'}"),
        *(f"--config.data.root={base / 'voc'}", "--config.scales=(90,)"),
        *("--config.cuts=()", "--config.levels=(2,1)", "--config.svm.max_rounds=1"),
        *("--config.proposals.width=100", "--config.proposals.max_windows=60"),
    ]

    def run(workdir, *flags):
        for command in (["train", *arguments], ["test"]):
            given = "detect", *command, f"--workdir={workdir}", *flags
            yield command_line(*given, how=run_with_tiny_trunk)

    *_, alone = run(tmp_path / "alone")
    flags = [[f"--process_index={index}", "--process_count=2"] for index in (0, 1)]
    processes = [run(tmp_path / "both", *own) for own in flags]
    with ThreadPoolExecutor(2) as pool:
        (trained, helped), (tested, _) = (
            list(pool.map(next, processes)) for _ in range(2)
        )
    assert tested.stdout.replace("both", "alone") == alone.stdout
    one, both = (
        read_json(tmp_path / name / "test" / "results.json")
        for name in ("alone", "both")
    )
    for name in ("workdirs", "seconds", "settings"):
        del one[name], both[name]
    assert one == both
    assert "process 1 of 2 is done; process 0 goes on" in helped.stderr
    assert "stage" not in helped.stderr
    for what in ("proposals", "maps at 90"):
        told = re.findall(rf"{what}, (\d+) of 12 made", trained.stderr + helped.stderr)
        assert sum(map(int, told)) >= 12


@pytest.fixture
def died_after(monkeypatch):
    """Kills what writes its parts when so many are written."""

    def set_up(parts):
        written = []

        def write(path, **arrays):
            if len(written) == parts:
                raise KeyboardInterrupt
            written.append(path)
            return write_arrays(path, **arrays)

        write_arrays = shares.write_arrays
        monkeypatch.setattr(shares, "write_arrays", write)
        return written

    return set_up


@pytest.mark.parametrize("protocol", ["single", "full_image"])
def test_a_classifier_is_tested_alike_by_one_and_by_two(
    protocol, digits_run, tmp_path, died_after, monkeypatch
):
    workdir = shutil.copytree(digits_run, tmp_path / "run")
    settings = network_settings(workdir)
    settings = settings._replace(data=settings.data._replace(test_split="test[:40]"))

    def test(**options):
        return evaluate_networks([workdir], protocol, settings=settings, **options)

    alone = test()
    died_after(5)
    with pytest.raises(KeyboardInterrupt):
        test(share=SECOND)
    monkeypatch.undo()
    written = died_after(100)
    assert test(share=SECOND) == {}
    other = workdir / f"evaluate_{protocol}.parts" / "of_another_test"
    other.mkdir()
    both = test(share=FIRST)
    assert not other.exists()
    assert len(written) == 16 - 5
    assert both.pop("loss") == pytest.approx(alone.pop("loss"), rel=1e-6)
    assert both == alone
    stored = json.loads((workdir / f"evaluate_{protocol}.json").read_text())
    assert stored["top1_correct"] == alone["top1_correct"]


@pytest.mark.parametrize("mode", ["crop", "full"])
def test_features_are_the_same_from_one_and_from_two(
    mode, digits_run, tmp_path, died_after, monkeypatch
):
    settings, network = network_settings(digits_run), load_network(digits_run)
    request = {"split": "test[:40]", "mode": mode, "workdir": digits_run}

    def write(name, **options):
        given = {**request, "output": tmp_path / f"{name}.npz", **options}
        return write_features(settings, network, **given)

    alone = load_features(write("alone")[0])[0]
    died_after(5)
    with pytest.raises(KeyboardInterrupt):
        write("both", share=SECOND)
    assert not (tmp_path / "both.npz").exists()
    monkeypatch.undo()
    written = died_after(100)
    path, about = write("both", share=FIRST)
    assert write("both", share=SECOND)[1] == {}
    assert len(written) == 16 - 5
    assert about["images"] == 40
    both = load_features(path)[0]
    np.testing.assert_allclose(both.values, alone.values, rtol=1e-5, atol=1e-6)
    assert (both.names, both.broken) == (alone.names, alone.broken)
    np.testing.assert_array_equal(both.labels, alone.labels)
    np.testing.assert_array_equal(both.indices, alone.indices)


@pytest.mark.parametrize("command", ["evaluate", "features"])
def test_two_command_lines_share_a_classifiers_images(
    command, digits_run, command_line, tmp_path
):
    workdir = shutil.copytree(digits_run, tmp_path / "run")
    split = "--config.data.test_split" if command == "evaluate" else "--split"

    def run(index):
        given = f"--workdir={workdir}", f"{split}=test[:40]"
        flags = f"--process_index={index}", "--process_count=2"
        return command_line(command, *given, *flags)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(run, range(2))
    assert "40 images" in first.stdout
    assert not second.stdout
    assert "process 1 of 2 is done; process 0 goes on" in second.stderr


def start_two(workdir, *arguments, own=((), ()), only=(0, 1)):
    """Two processes that train a network together, each with arguments of its own."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = ["--config=configs/digits.py", *SMALL, f"--workdir={workdir}", *arguments]
    return [
        Started(
            run_command,
            "sppnet_jax.train",
            [
                *shared,
                f"--coordinator=localhost:{port}",
                "--process_count=2",
                f"--process_index={index}",
                *own[index],
            ],
            devices=1,
        )
        for index in only
    ]


@pytest.fixture
def training_two(digit_scenes_dir, tmp_path):
    """Two processes in the midst of a training."""
    processes = start_two(tmp_path, "--config.log_steps=1")
    metrics = tmp_path / "metrics.jsonl"
    processes[0].wait_until(
        lambda: metrics.exists() and metrics.read_text().count("\n") > 3
    )
    return processes


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_one_of_two_stops_both_at_the_same_step(
    number, training_two, tmp_path
):
    training_two[1].send(number)
    ended = [process.end(60) for process in training_two]
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    told = f"training stopped at step {checkpoint.name} of"
    for one in ended:
        assert one.returncode == 1
        assert told in one.stderr
        assert "the same command goes on from there" in one.stderr


@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_is_killed_ends_the_other_with_a_sentence(killed, training_two):
    training_two[killed].send(signal.SIGKILL)
    training_two[killed].end()
    other = training_two[1 - killed].end(60)
    assert other.returncode == 1
    assert other.stderr.splitlines()[-1].startswith("error: another process has ended")


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (
            ["--config.batch_size=16"],
            "config.batch_size is 8 in process 0, but 16 in process 1",
        ),
        (
            ["--config.data.root={other}"],
            "different data, or folders of the run: digest of split 'train' is",
        ),
    ],
)
def test_processes_of_different_settings_or_data_say_so_at_the_start(
    own, message, tmp_path
):
    for index in range(10):
        for root, name in (("one", index), ("other", index or "renamed")):
            file = tmp_path / root / ("cat", "dog")[index % 2] / f"{name}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(encode(picture(40, 40, seed=index)))
    both = "--config.data.name=image_folder", f"--config.data.root={tmp_path / 'one'}"
    own = [part.format(other=tmp_path / "other") for part in own]
    for process in start_two(tmp_path / "run", *both, own=((), own)):
        ended = process.end(60)
        assert ended.returncode == 1
        assert message in ended.stderr
    assert not (tmp_path / "run").exists()


def test_an_error_in_one_of_two_ends_the_other(digit_scenes_dir, tmp_path):
    own = (), [f"--config.data.data_dir={__file__}"]
    first, second = (process.end(60) for process in start_two(tmp_path, own=own))
    assert (first.returncode, second.returncode) == (1, 1)
    assert "another process has ended" in first.stderr
    assert "another process has ended" not in second.stderr


@pytest.mark.parametrize("index", [0, 1])
def test_ctrl_c_ends_a_process_that_waits_for_another(index, tmp_path):
    waiting = start_two(tmp_path, only=[index])[0]
    waiting.wait_until(lambda: "waiting for 2 processes" in waiting.printed("stderr"))
    time.sleep(1)  # for JAX to wait, too
    waiting.send(signal.SIGINT)
    ended = waiting.end(60)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith("interrupted")


@pytest.mark.parametrize(
    "address", ["nonsense", "localhost", "localhost:x", ":1234", "no.such.host.:1"]
)
def test_an_address_that_is_none_is_told(address):
    with pytest.raises(ValueError, match="is no address of process 0"):
        parallel.join_processes(address, 0, 2)


def test_a_port_that_is_taken_is_told():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        address = f"localhost:{taken.getsockname()[1]}"
        with pytest.raises(ValueError, match="process 0 can't listen at"):
            parallel.join_processes(address, 0, 2)


LEAVES = """
import atexit, signal, sys
from sppnet_jax.run import parallel

atexit.register(signal.raise_signal, signal.SIGABRT)  # when JAX leaves, or before
parallel.join_processes(sys.argv[1], 0, 1)
if sys.argv[2] == "working":
    signal.raise_signal(signal.SIGABRT)
"""


@pytest.mark.parametrize(("when", "lost"), [("working", True), ("done", False)])
def test_a_process_whose_work_is_done_is_not_lost_with_another(when, lost):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", LEAVES, f"localhost:{port}", when]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == lost, ended.stderr
    assert ("another process has ended" in ended.stderr) == lost
