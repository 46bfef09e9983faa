"""The suite on images of many sizes."""

import numpy as np
import pytest

from sppnet_jax.benchmarks import variable_sizes as suite
from sppnet_jax.benchmarks.report import Timing


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return suite.run(Timing(2, True, tmp_path_factory.mktemp("bench")))


def by_name(rows):
    return {row["what"]: row for row in rows}


@pytest.mark.slow
def test_there_are_as_many_programs_as_buckets_shapes_and_one(report):
    programs = {name: row["programs"] for name, row in by_name(report.rows).items()}
    assert programs == {
        suite.BUCKETS: suite.QUICK.buckets,
        suite.SHAPES: suite.QUICK.images,
        suite.WARPED: 1,
        suite.ALONE: suite.QUICK.images,
    }


@pytest.mark.slow
def test_buckets_agree_with_a_batch_of_one_and_warping_does_not(report):
    rows = by_name(report.rows)
    assert rows[suite.BUCKETS]["differs by"] < 1e-5
    assert rows[suite.BUCKETS]["top-1 equal"] == 1
    assert rows[suite.SHAPES]["differs by"] == rows[suite.ALONE]["differs by"] == 0
    assert rows[suite.WARPED]["differs by"] > 1e-2


@pytest.mark.slow
def test_the_ratio_is_that_of_the_seconds(report):
    rows = by_name(report.rows)
    ratio = rows[suite.SHAPES]["cold s"] / rows[suite.BUCKETS]["cold s"]
    assert rows[suite.SHAPES]["× as long"] == pytest.approx(ratio)
    assert report.results["one jit per shape / fitted buckets, from cold"] == ratio
    assert rows[suite.ALONE]["cold s"] is None
    for name in (suite.BUCKETS, suite.WARPED):
        assert rows[name]["compile s/program"] > 0
        assert rows[name]["warm s"] > 0


@pytest.mark.slow
def test_blank_rows_count_as_padding(report):
    padding = by_name(report.rows)[suite.BUCKETS]["padding"]
    assert 1 > padding >= report.results["padded share, full batches"] > 0


@pytest.mark.slow
def test_the_picture_names_every_way(report):
    figure = report.plot(report.rows)
    assert [len(axes.get_yticks()) for axes in figure.axes] == [3, 4, 4]


def test_a_wrong_result_shows_in_the_table():
    logits = np.array([[4.0, 1.0], [0.0, 2.0]])
    wrong = np.array([[4.0, 1.0], [3.0, 2.0]])

    def found(logits):
        return suite.Pass(logits, 2, 1.0, 0.0, lambda: logits)

    ways = (suite.BUCKETS, suite.SHAPES, suite.WARPED)
    runs = {name: found(logits) for name in ways} | {suite.BUCKETS: found(wrong)}
    seconds = {name: np.array([2.0, 4.0]) for name in ways}
    rows = by_name(suite._rows(runs, seconds, seconds))
    assert rows[suite.BUCKETS]["differs by"] == 3 / 4
    assert rows[suite.BUCKETS]["top-1 equal"] == 0.5
    assert rows[suite.WARPED]["differs by"] == 0
    assert rows[suite.BUCKETS]["warm ms/image"] == 1500
