"""The command line of the suites, and the suites of the layer and of windows."""

import importlib
import json
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

from sppnet_jax import bench as command
from sppnet_jax.bench import SUITES
from sppnet_jax.benchmarks import peers, report, timing
from sppnet_jax.benchmarks import pyramid_speed as pyramid
from sppnet_jax.benchmarks import window_speed as windows
from sppnet_jax.benchmarks.peak import count_flops
from sppnet_jax.benchmarks.report import Timing
from sppnet_jax.network.layers import conv

QUICK = ["--quick", "--rounds", "2"]


@pytest.fixture
def bench(command_line, tmp_path):
    def run(*arguments, **options):
        return command_line("bench", *arguments, "--out", tmp_path, **options)

    return run


@pytest.fixture
def setting(tmp_path):
    return Timing(rounds=2, quick=True, folder=tmp_path)


def test_a_suite_prints_a_table_and_writes_json_and_a_picture(bench, tmp_path):
    printed = bench("windows", *QUICK, devices=1).stdout
    found = json.loads((tmp_path / "windows.json").read_text())
    assert found["quick"] is True
    assert found["rounds"] == 2
    assert found["machine"]["device"]
    assert found["machine"]["versions"]["jax"]
    for row in found["rows"]:
        assert row["low"] <= row["ms"] <= row["high"]
        assert row["dtype"] in ("float32", "bfloat16")
    assert "ours is × as fast" in printed
    assert "these numbers mean nothing" in printed
    assert (tmp_path / "windows.png").stat().st_size > 5_000


def test_a_suite_that_is_stopped_leaves_the_rows_that_it_has(setting):
    rows, unfinished = [], setting.folder / "some_unfinished.json"
    for case in report.kept("ab", rows, "some", setting):
        if case == "b":
            break
        rows.append({"case": case, "ms": 1.0})
    found = json.loads(unfinished.read_text())
    assert found["rows"] == [{"case": "a", "ms": 1.0}]
    assert found["machine"]["device"]
    done = report.Report("some", "Some", rows, lambda rows: Figure())
    report.show(done, setting)
    assert not unfinished.exists()


def test_an_accelerator_works_through_a_queue_of_calls(monkeypatch):
    waited = []
    monkeypatch.setattr(timing, "finish", waited.append)
    monkeypatch.setattr(timing, "_repeats", lambda *_: 5)
    numbers = iter(range(100))
    timing.time_in_turn({"one": lambda: next(numbers)}, rounds=2)
    assert waited == [*range(5), 4, *range(5, 10), 9]  # a processor's, one by one
    waited.clear()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    timing.time_in_turn({"one": lambda: next(numbers)}, rounds=2)
    assert waited == [14, 19]


def test_an_unknown_suite_is_refused_with_those_that_there_are(bench):
    result = bench("piramid", check=False)
    assert result.returncode == 2
    assert "unknown suite 'piramid': choose from buckets" in result.stderr
    assert "--rounds must be at least 1" in bench("--rounds=0", check=False).stderr


def test_no_suite_imports_what_a_bare_gpu_machine_has_not():
    suites = [*(module for module, _ in SUITES.values()), "allreduce"]
    modules = ", ".join(f"sppnet_jax.benchmarks.{suite}" for suite in suites)
    program = (
        "import sys\n"
        "for name in ('tensorflow_datasets', 'grain', 'cv2', 'array_record',\n"
        "             'ml_collections', 'torch', 'matplotlib.pyplot'):\n"
        "    sys.modules[name] = None\n"
        f"import sppnet_jax.bench, {modules}\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_peer_that_is_missing_is_noted_and_the_rest_runs(setting, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    found = windows.run(setting)
    names = {row["what"] for row in found.rows}
    assert names == {
        windows.OURS,
        windows.MASKS,
        windows.WRITING,
        windows.GRADIENT,
    }
    assert any("onnxruntime can't be imported" in note for note in found.notes)
    monkeypatch.setitem(sys.modules, "torch", None)
    found = pyramid.run(setting)
    assert {row["what"] for row in found.rows} == {pyramid.OURS}
    assert "pip install -r requirements-bench.txt" in found.notes[0]


def test_alternatives_of_the_layer_agree_exactly_in_both_directions(setting):
    pytest.importorskip("torch")
    rows = pyramid.run(setting).rows
    assert {row["what"] for row in rows} == {pyramid.OURS, pyramid.FIRST, pyramid.LAST}
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16"}
    assert all(row["differs by"] == 0 for row in rows)


def test_alternatives_for_windows_agree_exactly(setting):
    pytest.importorskip("onnxruntime")
    rows = windows.run(setting).rows
    alone = {windows.WRITING, windows.GRADIENT}
    compared = [row for row in rows if row["what"] not in alone]
    assert {row["what"] for row in compared} >= {windows.MAX_ROI_POOL, windows.MASKS}
    assert all(row["differs by"] == 0 for row in compared)


def test_a_wrong_result_shows_in_the_table(setting, monkeypatch):
    right = windows.masked_pool
    monkeypatch.setattr(windows, "masked_pool", lambda *inputs: right(*inputs) + 0.25)
    rows = windows.run(setting).rows
    (worst, *_) = {row["differs by"] for row in rows if row["what"] == windows.MASKS}
    assert worst == pytest.approx(0.25)


def test_the_least_bytes_of_windows_are_those_of_results_and_table():
    case = windows._Case((43, 58, 256), 2_000, (6, 3, 2, 1))
    table = 16 * 43 * 58 * 256  # blocks of 1, 2, 4 and 8 cells on each side
    assert windows.least_bytes(case) == 4 * (table + 2_000 * 50 * 256)


def test_a_ratio_is_the_median_of_the_rounds_ratios():
    ours, theirs = np.array([1.0, 2.0, 10.0]), np.array([3.0, 8.0, 20.0])
    assert timing.times_as_fast(ours, theirs) == (3.0, 2.5, 3.5)
    assert timing.spread(ours).median == 2.0


def test_alternatives_take_turns_and_compile_before_the_clock_starts():
    calls = []
    slow = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = timing.time_in_turn(slow, rounds=3, warmup=2)
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}
    # Two calls to warm up and one to see how many make up a measurement, of each.
    assert calls[:6] == ["a"] * 3 + ["b"] * 3
    turns = [a for a, b in zip(calls[6:], [*calls[7:], None], strict=True) if a != b]
    assert turns == ["a", "b", "a", "b"]  # the second round begins with b


def test_work_takes_turns_at_being_the_first():
    order = []
    work = {name: lambda name=name: order.append(name) or len(order) for name in "abc"}
    found = timing.in_turn(work, rounds=4)
    assert "".join(order) == "abc" + "bca" + "cab" + "abc"
    assert found == {"a": [1, 6, 8, 10], "b": [2, 4, 9, 11], "c": [3, 5, 7, 12]}


def test_a_table_shows_three_digits_and_a_dash_for_what_is_missing():
    rows = [{"what": "a", "ms": 1.23456}, {"what": "b", "ms": None, "n": 12_345}]
    assert report.table(rows).splitlines() == [
        "what    ms       n",
        "a     1.23       –",
        "b        –  12,345",
    ]


def test_a_suite_that_fails_is_named_and_the_others_still_run(
    tmp_path, monkeypatch, capsys
):
    def fail(setting):
        raise TypeError("no such counter")

    found = report.Report("windows", "Windows", [{"ms": 1.0}], windows.plot)
    monkeypatch.setattr(pyramid, "run", fail)
    monkeypatch.setattr(windows, "run", lambda setting: found)
    monkeypatch.setattr(command, "show", lambda report, setting: print(report.title))
    out = str(tmp_path / "new" / "folder")
    monkeypatch.setattr(sys, "argv", ["bench", "pyramid", "windows", f"--out={out}"])
    with pytest.raises(SystemExit, match="failed: pyramid"):
        command.main()
    printed = capsys.readouterr()
    assert "error in pyramid: TypeError: no such counter" in printed.err
    assert printed.out == "Windows\n"


def test_a_folder_that_cannot_be_made_is_refused_before_anything_runs(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "file").write_text("")
    out = str(tmp_path / "file" / "folder")
    monkeypatch.setattr(sys, "argv", ["bench", "windows", f"--out={out}"])
    with pytest.raises(SystemExit, match="2"):
        command.main()
    assert "folder can't be written: Not a directory" in capsys.readouterr().err


def test_flops_are_two_for_each_product_and_nothing_runs():
    a = jax.ShapeDtypeStruct((3, 5), jnp.bfloat16)
    b = jax.ShapeDtypeStruct((5, 7), jnp.bfloat16)
    assert count_flops(jnp.matmul, a, b) == 2 * 3 * 5 * 7


def test_the_flops_of_a_convolution_s_gradients_are_twice_its_own():
    maps = jax.ShapeDtypeStruct((6, 33, 33, 8), jnp.float32)
    kernel = jax.ShapeDtypeStruct((3, 3, 8, 16), jnp.float32)

    def convolve(maps, kernel):
        return conv(maps, kernel, (1, 1), ((0, 0), (0, 0)))

    def gradients(maps, kernel, gradient):
        return jax.vjp(convolve, maps, kernel)[1](gradient)

    own = 2 * 6 * 31 * 31 * 3 * 3 * 8 * 16
    assert count_flops(convolve, maps, kernel) == own
    gradient = jax.eval_shape(convolve, maps, kernel)
    assert 2 * own <= count_flops(gradients, maps, kernel, gradient) <= 3 * own


def test_pytorch_is_left_out_where_it_has_not_our_device(monkeypatch):
    def found_beside(platform, cuda):
        torch = types.SimpleNamespace(
            cuda=types.SimpleNamespace(is_available=lambda: cuda),
            set_num_threads=lambda count: None,
        )
        device = types.SimpleNamespace(platform=platform)
        monkeypatch.setitem(sys.modules, "torch", torch)
        monkeypatch.setattr(peers.jax, "devices", lambda: [device])
        found, notes = peers.find_torch()
        assert found is (None if notes else torch)
        return notes, peers.torch_device()

    assert found_beside("gpu", cuda=True) == ([], "cuda")
    assert found_beside("cpu", cuda=True) == ([], "cpu")
    assert "can't use the GPU" in found_beside("gpu", cuda=False)[0][0]
    assert "no tpu" in found_beside("tpu", cuda=False)[0][0]


def roi_pool(maps, rois, side):
    """torchvision's documented formula, in plain loops."""
    torch = importlib.import_module("torch")
    pooled = torch.zeros(len(rois), maps.shape[1], side, side)
    for n, (_, left, top, right, bottom) in enumerate(rois.int().tolist()):
        height, width = bottom - top + 1, right - left + 1
        for i in range(side):
            for j in range(side):
                rows = slice(
                    top + i * height // side, top + -(-(i + 1) * height // side)
                )
                columns = slice(
                    left + j * width // side, left + -(-(j + 1) * width // side)
                )
                pooled[n, :, i, j] = maps[0, :, rows, columns].amax((1, 2))
    return pooled


def test_roi_pool_is_given_our_windows():
    torch = pytest.importorskip("torch")
    case = windows.QUICK[0]
    features, boxes = windows.inputs(case)
    ops = types.SimpleNamespace(roi_pool=roi_pool)
    found = {"torch": torch, "torchvision": types.SimpleNamespace(ops=ops)}
    theirs = windows._roi_pool(found, features, boxes, case.levels)()
    ours = windows.window_pyramid_pool(features, boxes, case.levels)
    np.testing.assert_array_equal(peers.as_numpy(theirs), ours)


def test_peers_are_modules_by_name():
    found, notes = peers.find_peers("json", "no_such_peer")
    assert list(found) == ["json"]
    assert "no_such_peer can't be imported" in notes[0]
