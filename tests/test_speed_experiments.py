"""The experiments on speed: what they measure, at sizes whose numbers mean nothing."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from data_helpers import encode, overlap, picture

from experiments import pipeline_speed, proposal_recall, startup_speed
from experiments.first_step import CPU, PARTS, TOTAL
from experiments.photographs import SIZE, photograph, photograph_folder
from experiments.startup_speed import WHOLE
from sppnet_jax.benchmarks.report import Timing, show
from sppnet_jax.data.datasets import BoxData, open_box_split
from sppnet_jax.data.images import decode_image, image_size
from sppnet_jax.data.sources import Source
from sppnet_jax.detection.proposals import NO_COLOUR, ProposalSettings, find_boxes


@pytest.fixture(scope="module")
def small_case():
    """Forty small photographs in memory."""
    encoded = [encode(picture(40, 50, seed=n), ".jpg") for n in range(40)]
    records = [{"image": e, "label": 0, "name": str(n)} for n, e in enumerate(encoded)]
    source = Source(records, ("one",), "memory", "train")
    return pipeline_speed._Case("small", source, 24, 28, 0.35, True, steps=3)


def test_the_pipeline_s_rates_follow_from_its_seconds(small_case, tmp_path):
    timing = Timing(rounds=2, quick=True, folder=tmp_path)
    report = pipeline_speed.run([small_case], timing, tmp_path, batch=8)
    rows = {row["what"]: row for row in report.rows}
    assert rows["bare decoding"]["of bare decoding"] == 1
    for name in ("bare decoding", "1 thread", "8 threads", "paper's crops"):
        row = rows[name]
        assert row["low"] <= row["CPU ms"] <= row["high"]
        assert row["images/s per core"] == pytest.approx(1e3 / row["CPU ms"])
    assert rows["1 thread"]["CPU ms"] > rows["part: cropping, resizing"]["CPU ms"] > 0
    assert not any("worker" in name for name in rows)
    assert "quick: no worker processes" in report.notes
    show(report, timing)
    stored = json.loads((tmp_path / "pipeline.json").read_text())
    assert [row["what"] for row in stored["rows"]] == list(rows)
    assert decode_image((tmp_path / "pipeline.png").read_bytes()).std() > 10


def test_a_pipeline_s_measurement_holds_exactly_the_images_it_took(
    small_case, tmp_path
):
    records = pipeline_speed.Counted(small_case.source.records, tmp_path / "reads")
    with pipeline_speed.train_batches(
        small_case.source._replace(records=records),
        batch_size=8,
        image_size=24,
        resize_side=28,
        threads=2,
    ) as batches:
        work = pipeline_speed._drain(batches, records, steps=3, batch=8)
        full = records.reads()
        used = work()
        assert records.reads() == full + 24
        time.sleep(0.3)  # nothing is read when nothing is taken
        assert records.reads() == full + 24
    assert used.wall > 0
    assert used.cpu > 0


def test_photographs_are_photographs_of_one_size_and_the_same_each_time(tmp_path):
    assert photograph(3) == photograph(3) != photograph(4)
    assert image_size(photograph(3)) == SIZE
    assert decode_image(photograph(3)).std() > 20
    folder = photograph_folder(tmp_path / "made", images=6, classes=2)
    assert len(list(folder.glob("class[01]/*.jpg"))) == 6
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.jpg")}
    photograph_folder(folder, images=6, classes=2)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*.jpg")}


def test_second_starts_are_compared_with_first_ones_round_by_round(
    tmp_path, monkeypatch
):
    """Each start takes so long as its number says."""
    seen = []

    def start(arguments, workdir, caches):
        assert not workdir.exists()
        workdir.mkdir(parents=True)
        first = not (caches / "filled").exists()
        (caches / "filled").touch()
        seen.append((workdir.name, first))
        whole = 12.0 * len(seen) if first else 3.0
        parts = dict.fromkeys(PARTS, whole / len(PARTS))
        return {**parts, TOTAL: whole, CPU: 1.0}

    monkeypatch.setattr(startup_speed, "start", start)
    report = startup_speed.measure({"one": [], "other": []}, rounds=3, folder=tmp_path)
    assert seen == [("first", True), ("second", False)] * 6
    totals = [row for row in report.rows if row["part"] == TOTAL]
    assert [row["s"] for row in totals] == [36, 3, 108, 3]
    ratio = report.results["second start is × as soon"]["one"]
    assert ratio["median"] == np.median([12 / 3, 36 / 3, 60 / 3])
    assert totals[1]["first / second"] == ratio["median"]
    assert not list(tmp_path.iterdir())
    show(report, Timing(3, True, tmp_path / "out"))
    assert decode_image((tmp_path / "out/startup.png").read_bytes()).std() > 10


def test_a_command_is_timed_from_its_start_to_its_end(tmp_path):
    """Beside trainings, as one part of its own."""
    commands = {"help": ["sppnet_jax.inspect", "--help"]}
    report = startup_speed.measure({}, rounds=1, folder=tmp_path, commands=commands)
    parts = [(row["start"], row["part"]) for row in report.rows]
    assert parts == [(n, p) for n in ("first", "second") for p in (WHOLE, CPU)]
    assert all(row["s"] > 0 for row in report.rows)
    assert "at its end as the first" in report.notes[0]
    show(report, Timing(1, True, tmp_path / "out"))
    assert decode_image((tmp_path / "out/startup.png").read_bytes()).std() > 10
    wrong = {"wrong": ["sppnet_jax.inspect", "no such folder"]}
    with pytest.raises(RuntimeError, match="no such folder"):
        startup_speed.measure({}, rounds=1, folder=tmp_path, commands=wrong)


def test_a_folder_without_a_demo_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no demo: run make demo"):
        startup_speed.photo_commands(tmp_path, tmp_path)


@pytest.mark.slow
def test_a_real_start_is_timed_to_its_first_step(digit_scenes_dir, tmp_path):
    networks = startup_speed.networks(tmp_path, quick=True, data_dir=digit_scenes_dir)
    small = ["--config.data.image_size=32", "--config.data.resize_side=36"]
    arguments = [*networks["digits"], *small, "--config.batch_size=4"]
    caches = Path(os.environ["XDG_CACHE_HOME"])  # compiled once for all test runs
    seconds = startup_speed.start(arguments, tmp_path / "run", caches)
    assert list(seconds) == [*PARTS, TOTAL, CPU]
    assert all(value > 0 for value in seconds.values())
    assert seconds[TOTAL] == pytest.approx(sum(seconds[part] for part in PARTS))
    kept = {path.name for path in (caches / "sppnet_jax").iterdir()}
    assert {"jax", "statistics"} <= kept


def test_a_start_that_fails_says_why(tmp_path):
    with pytest.raises(RuntimeError, match="no config here"):
        startup_speed.start(
            ["--config=no config here.py"], tmp_path / "run", tmp_path / "caches"
        )


def test_a_training_s_imports_hold_neither_pyplot_nor_pytorch():
    """They'd take seconds of every start."""
    code = (
        "import sys\n"
        "from sppnet_jax import cli, train\n"
        "from sppnet_jax.training import networks\n"
        "heavy = 'torch', 'matplotlib', 'sklearn', 'tensorboardX', 'scipy.optimize'\n"
        "print([name for name in heavy if name in sys.modules])\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]", result.stdout


def test_proposals_are_counted_as_by_hand(few_scenes, monkeypatch):
    small = ProposalSettings(width=60, min_side=6)
    given = {"one": small, "other": small._replace(method=NO_COLOUR)}
    monkeypatch.setattr(proposal_recall, "SETTINGS", given)
    data = BoxData(name="digit_scenes/detection", data_dir=str(few_scenes))
    report = proposal_recall.run(data, Timing(1, True, Path()), 3)
    source = open_box_split(data, "train")
    places = [0, (len(source.records) - 1) // 2, len(source.records) - 1]
    for row, settings in zip(report.rows, given.values(), strict=True):
        found, objects, windows = 0, 0, 0
        for place in places:
            record = source.records[place]
            boxes = find_boxes(decode_image(record["image"]), settings)
            windows += len(boxes)
            for own in record["objects"].boxes:
                objects += 1
                found += max(overlap(box, own) for box in boxes[:300]) >= 0.5
        assert row["recall 0.5, 300 windows"] == found / objects
        assert row["recall 0.7, all"] <= row["recall 0.5, all"]
        assert row["windows"] == windows / 3
        assert 0 < row["s an image"] <= row["s, slowest"]
    assert f"{objects} objects" in report.notes[0]
