"""Layouts train alike; a worker that dies or hangs ends the suite with its words."""

import os
from pathlib import Path

import numpy as np
import pytest

from sppnet_jax.benchmarks import scaling
from sppnet_jax.benchmarks.report import Timing, show
from sppnet_jax.benchmarks.scaling import QUICK, Layout, workers


def test_layouts_are_powers_of_two_in_one_process_and_two():
    assert scaling._layouts(4) == [(1, 1), (1, 2), (1, 4), (2, 2), (2, 4)]
    assert scaling._layouts(3) == [(1, 1), (1, 2), (2, 2)]
    assert scaling._layouts(1) == [(1, 1)]


@pytest.mark.slow
def test_the_suite_runs_and_all_layouts_have_the_same_losses(tmp_path):
    timing = Timing(rounds=2, quick=True, folder=tmp_path)
    report = scaling.run(timing)
    assert [
        (r["processes × devices"], r["scaling"], r["batch"]) for r in report.rows
    ] == [
        ("1 × 1", "strong", 4),
        ("1 × 2", "strong", 4),
        ("2 × 1", "strong", 4),
        ("1 × 1", "weak", 2),
        ("1 × 2", "weak", 4),
        ("2 × 1", "weak", 4),
    ]
    for row in report.rows:
        assert row["differs by"] < 1e-5
        assert row["images/s"] == pytest.approx(row["batch"] / row["ms"] * 1e3)
        assert row["low"] <= row["ms"] <= row["high"]
    assert report.rows[0]["loss"] != pytest.approx(report.rows[3]["loss"])
    show(report, timing)
    assert (tmp_path / "scaling.png").stat().st_size > 1000


class FakeWorkers:
    """Answers a loss that goes by the number of devices."""

    def __init__(self, layout):
        self.layout = layout

    def ask(self, question):
        return [10.0 + (self.layout == (2, 2))]


def test_a_layout_with_another_loss_shows(monkeypatch):
    times = {"1 × 1": [1.0, 2.0], "1 × 2": [0.5, 0.5], "2 × 1": [2.0, 1.0]}
    monkeypatch.setattr(
        scaling,
        "time_in_turn",
        lambda names, **_: {name: np.array(times[name]) for name in names},
    )
    groups = {layout: FakeWorkers(layout) for layout in scaling._layouts(2)}
    timing = Timing(2, True, Path())
    rows = scaling._compared(scaling._rows("strong", groups, QUICK, timing))
    assert [row["differs by"] for row in rows] == pytest.approx([0, 0, 0.1])
    assert [row["rate"] for row in rows] == pytest.approx(
        [1, np.median([1 / 0.5, 2 / 0.5]), np.median([1 / 2, 2 / 1])]
    )
    assert rows[1]["ms"] == pytest.approx(1e3 * 0.5 / scaling.STEPS)
    weak = scaling._rows("weak", groups, QUICK, timing)
    assert [row["batch"] for row in weak] == [2, 4, 4]
    # Twice the images in half the time are four times the rate.
    assert weak[1]["rate"] == pytest.approx(np.median([2 / 0.5, 4 / 0.5]))


def test_a_worker_that_dies_tells_its_stderr():
    broken = QUICK._replace(image_size=1)
    with (
        workers(Layout(1, 1), broken) as group,
        pytest.raises(RuntimeError, match=r"worker 0 of 1 .*ended with 1") as error,
    ):
        group.ask("loss strong")
    assert "too small for this stack" in str(error.value)


def test_a_worker_that_hangs_ends_in_time_and_leaves_no_process():
    """The other process of two never starts, so the first waits for it for ever."""
    with workers(Layout(2, 2), QUICK, timeout=3) as group:
        group.processes[1].kill()
        group.processes[1].wait()
        alone = group._replace(processes=group.processes[:1], logs=group.logs[:1])
        with pytest.raises(RuntimeError, match="has not answered for 3 s"):
            alone.ask("loss strong")
    assert all(process.poll() is not None for process in group.processes)


def test_workers_see_their_own_devices_only(monkeypatch):
    monkeypatch.setenv(
        "XLA_FLAGS", "--xla_force_host_platform_device_count=7 --xla_dump_to=x"
    )
    on_host = scaling._environment(Layout(2, 4), 1, on_gpu=False)
    assert on_host["XLA_FLAGS"].split() == [
        "--xla_dump_to=x",
        "--xla_force_host_platform_device_count=2",
    ]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    second = scaling._environment(Layout(2, 4), 1, on_gpu=True)
    assert second["CUDA_VISIBLE_DEVICES"] == "2,3"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,1,7,4")
    second = scaling._environment(Layout(2, 4), 1, on_gpu=True)
    assert second["CUDA_VISIBLE_DEVICES"] == "7,4"
    assert second["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5,1,7,4"
