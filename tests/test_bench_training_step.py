"""What the suite reports follows from what it measures, with PyTorch and without."""

import sys
from unittest import mock

import numpy as np
import pytest

from sppnet_jax.benchmarks import training_step
from sppnet_jax.benchmarks.report import Timing, show
from sppnet_jax.benchmarks.training_step import OURS, QUICK, Peer


def fake_seconds(alternatives, *, rounds, label):
    """Ours takes 0.1 and 0.3 s, the second 0.2 and 0.9, the third 0.05 and 0.6."""
    for call in alternatives.values():
        call()
    times = ([0.1, 0.3], [0.2, 0.9], [0.05, 0.6])
    return {name: np.array(t) for name, t in zip(alternatives, times, strict=False)}


@pytest.fixture
def setting(tmp_path):
    return Timing(rounds=2, quick=True, folder=tmp_path)


@pytest.fixture
def quiet(monkeypatch):
    """No clock and no processes."""
    monkeypatch.setattr(training_step, "time_in_turn", fake_seconds)
    monkeypatch.setattr(training_step, "measured_peak", lambda dtype: 1e12)
    monkeypatch.setattr(
        training_step,
        "_resident_peaks",
        lambda name, dtype, size, peers: {OURS: 3 * 2**20},
    )


def test_columns_follow_from_seconds(quiet, setting):
    pytest.importorskip("torch")
    report = training_step.run(setting)
    ours, first, last = report.rows
    assert [row["what"] for row in report.rows] == [
        "sppnet_jax",
        "PyTorch, contiguous",
        "PyTorch, channels_last",
    ]
    assert ours["ms"] == pytest.approx(200)
    assert ours["images/s"] == pytest.approx(QUICK.batch / 0.2)
    assert ours["ours is × as fast"] is None
    # Round by round: 0.2/0.1 and 0.9/0.3; 0.05/0.1 and 0.6/0.3.
    assert first["ours is × as fast"] == pytest.approx((2 + 3) / 2)
    assert last["ours is × as fast"] == pytest.approx((0.5 + 2) / 2)
    assert ours["share of peak"] == pytest.approx(ours["GFLOP"] * 1e9 / 0.2 / 1e12)
    assert ours["peak MB"] == 3
    assert first["peak MB"] is None
    assert first["differs by"] < 1e-4
    assert last["differs by"] < 1e-4
    show(report, setting)
    assert (setting.folder / "training_step.png").stat().st_size > 1000
    assert not list(setting.folder.glob("*_unfinished.json"))


def test_without_pytorch_ours_is_measured_and_the_rest_noted(
    quiet, setting, monkeypatch
):
    monkeypatch.setitem(sys.modules, "torch", None)
    report = training_step.run(setting)
    assert [row["what"] for row in report.rows] == [OURS]
    assert "torch can't be imported" in report.notes[0]
    assert not any("differs by" in note for note in report.notes)


def test_a_peer_that_fails_is_noted_and_the_others_are_measured(
    quiet, setting, monkeypatch
):
    pytest.importorskip("torch")
    real, peers_of = training_step._torch_step, training_step._peers
    compiled = Peer("channels_last", False, True)

    def step(name, size, peer, params):
        if peer.compiled:
            raise NotImplementedError("no compiler for this processor")
        return real(name, size, peer, params)

    monkeypatch.setattr(training_step, "_torch_step", step)
    monkeypatch.setattr(
        training_step, "_peers", lambda dtype: [compiled, *peers_of(dtype)]
    )
    report = training_step.run(setting)
    assert len(report.rows) == 3
    (note,) = (note for note in report.notes if "no compiler" in note)
    assert note.startswith("PyTorch, channels_last, compiled, zf5, float32: NotImpl")


def test_another_network_would_be_seen(quiet):
    """The column "differs by" is no ornament: parameters that differ show in it."""
    pytest.importorskip("torch")
    params = training_step._random_params("zf5", "float32", QUICK)
    logits = training_step._our_logits("zf5", "float32", QUICK, params)
    params["conv2"]["kernel"] = 1.1 * params["conv2"]["kernel"]
    peer = Peer("contiguous_format", False, False)
    _, theirs = training_step._torch_step("zf5", QUICK, peer, params)
    assert np.abs(theirs - logits).max() > 1e-4 * np.abs(logits).max()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
def test_resident_peak_holds_parameters_gradients_and_momentum():
    size = QUICK._replace(width=1 / 4)
    (peak,) = training_step._resident_peaks("zf5", "float32", size, [None]).values()
    params = training_step._random_params("zf5", "float32", size)
    held = sum(p.nbytes for layer in params.values() for p in layer.values())
    assert 2 * held < peak < 20 * held


def test_a_process_that_dies_leaves_its_memory_unknown(monkeypatch):
    pool = mock.MagicMock()
    submit = pool.return_value.__enter__.return_value.submit
    submit.return_value.result.side_effect = training_step.BrokenExecutor("killed")
    monkeypatch.setattr(training_step, "ProcessPoolExecutor", pool)
    assert training_step._resident_peaks("zf5", "float32", QUICK, [None]) == {}
