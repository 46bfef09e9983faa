"""The suite on buckets' programs, and what it shares with that on variable sizes."""

import subprocess

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from sppnet_jax.benchmarks import bucket_costs as suite
from sppnet_jax.benchmarks import peak
from sppnet_jax.benchmarks.report import Timing, table
from sppnet_jax.benchmarks.samples import sample_image, sample_sizes
from sppnet_jax.benchmarks.timing import no_persistent_cache


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The suite's quick report, and its cache folder's files after each process."""
    files, in_a_process = [], suite._in_a_process

    def watched(given, cache):
        found = in_a_process(given, cache)
        files.append(cache and {path.name for path in cache.glob("*-cache")})
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite, "_in_a_process", watched)
        report = suite.run(Timing(2, True, tmp_path_factory.mktemp("bench")))
    return report, files


@pytest.mark.slow
def test_every_bucket_has_its_costs_and_its_speed(measured):
    report, _ = measured
    assert [row["bucket"] for row in report.rows] == ["128×64", "64×144"]
    peak_rate = report.results["float32"]["measured peak, GFLOP/s"]
    for row in report.rows:
        assert row["images/s"] == pytest.approx(row["batch"] / row["ms"] * 1e3)
        rate = row["GFLOP"] / row["ms"] * 1e3
        assert row["of peak"] == pytest.approx(rate / peak_rate)
        assert row["low"] <= row["ms"] <= row["high"]
        assert None not in row.values()
    assert sum(row["images"] for row in report.rows) == suite.QUICK[0].images


@pytest.mark.slow
def test_the_second_process_with_a_cache_folder_compiles_nothing_anew(measured):
    _, (without, first, second) = measured
    assert without is None
    assert len(first) >= 2
    assert first == second


@pytest.mark.slow
def test_ratios_of_starts_are_those_of_their_sums(measured):
    report, _ = measured
    result = report.results["float32"]
    for ratio, slow, fast in [
        ("filled cache is × as fast", "empty cache s", "filled cache s"),
        ("first results ahead are × as fast", "on demand s", "ahead s"),
    ]:
        total = [sum(row[name] for row in report.rows) for name in (slow, fast)]
        assert result[ratio] == pytest.approx(total[0] / total[1])


@pytest.mark.slow
def test_the_picture_has_a_bar_for_each_bucket_and_column(measured):
    report, _ = measured
    figure = report.plot(report.rows)
    assert [len(axes.patches) for axes in figure.axes] == [6, 4, 2]


def test_a_start_that_fails_is_noted_and_leaves_blanks(monkeypatch):
    def fails(given, cache):
        said = "Traceback\nRuntimeError: out of memory\n"
        raise subprocess.CalledProcessError(1, "python", stderr=said)

    monkeypatch.setattr(suite, "_in_a_process", fails)
    starts, notes = suite._starts(suite.QUICK[0], [(64, 64)])
    assert not starts
    assert len(notes) == len(suite.STARTS)
    assert notes[0].endswith("failed: RuntimeError: out of memory")
    row = {"bucket": "64×64", **suite._start_columns(starts, "64×64")}
    assert row["filled cache s"] is None
    assert "–" in table([row])
    assert suite._on_starts(suite.QUICK[0], [row], {}) == []


def test_a_process_that_dies_gives_what_it_said(monkeypatch):
    monkeypatch.setattr(suite.sys, "executable", "/bin/false")
    _, notes = suite._starts(suite.QUICK[0], [(64, 64)])
    assert all("failed" in note for note in notes)


def test_the_peak_counts_a_multiply_add_as_two(monkeypatch):
    monkeypatch.setattr(peak, "_fastest", lambda call: 0.5)
    assert peak.measured_peak() == 2 * 512**3 / 0.5
    assert peak.measured_bandwidth(3) == 2 * 3 * 2**20 / 0.5


def test_products_grow_until_they_take_long_enough(monkeypatch):
    seconds = iter([1e-3, 4e-3, 0.06])
    monkeypatch.setattr(peak, "_fastest", lambda call: next(seconds))
    assert peak.measured_peak() == 2 * 1024**3 / 4e-3


def test_a_copy_is_read_and_written_in_place():
    assert peak.measured_bandwidth(1) > 0
    assert peak.measured_peak("bfloat16") > 0


def test_nothing_compiled_goes_to_the_persistent_cache(tmp_path):
    names = {
        "jax_compilation_cache_dir": str(tmp_path),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
        "jax_enable_compilation_cache": True,
    }
    before = {name: jax.config.values[name] for name in names}
    try:
        for name, value in names.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        x = np.ones(3, np.float32)
        with no_persistent_cache():
            jax.jit(lambda x: x * 3 + 1)(x).block_until_ready()
        assert not list(tmp_path.iterdir())
        jax.jit(lambda x: x * 3 + 1)(x).block_until_ready()
        assert list(tmp_path.iterdir())
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


@pytest.mark.parametrize(("count", "side"), [(500, 192), (5, 64)])
def test_sample_sizes_are_distinct_of_one_shorter_side_and_no_longer_than_3_to_1(
    count, side
):
    sizes = sample_sizes(count, side)
    assert len(set(sizes)) == len(sizes) == count
    assert all(min(size) == side and max(size) <= 3 * side for size in sizes)
    assert sizes == sample_sizes(count, side) != sample_sizes(count, side, seed=1)


def test_more_sizes_than_photographs_have_are_refused():
    with pytest.raises(ValueError, match=r"193 distinct sizes .* at most 192"):
        sample_sizes(193, 64)


def test_sample_images_are_smooth_under_their_noise():
    image = sample_image(90, 120).astype(float)
    assert image.shape == (90, 120, 3)
    assert np.array_equal(image, sample_image(90, 120))
    near = np.abs(np.diff(image, axis=0)).mean()
    far = np.abs(image[45:] - image[:45]).mean()
    assert 5 < near < far
