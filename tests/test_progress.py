"""Whoever watches is told how far long work has come."""

import pytest

from sppnet_jax.run import parallel, progress
from sppnet_jax.run.progress import map_in_threads, progress_bar


@pytest.fixture
def told(monkeypatch):
    told = []
    monkeypatch.setattr(progress, "WATCHERS", [lambda *given: told.append(given)])
    return told


@pytest.mark.parametrize("shown", [True, False])
def test_a_watcher_is_told_of_every_piece_whether_a_bar_is_shown_or_not(
    shown, told, monkeypatch
):
    monkeypatch.setattr(parallel, "is_first_process", lambda: shown)
    with progress_bar("maps", 10, done=2) as bar:
        bar.update()
        bar.update(3)
    assert told == [("maps", 3), ("maps", 6)]


def test_work_in_threads_is_watched_too_and_keeps_its_order(told):
    assert map_in_threads(str, [3, 1, 2], "words", threads=2) == ["3", "1", "2"]
    assert told == [("words", 1), ("words", 2), ("words", 3)]
