"""A stage is done once, goes on, or is redone, whenever a run was killed."""

import json
import logging
import signal
import time

import pytest

from sppnet_jax.run import stages
from sppnet_jax.run.run_folder import locked
from sppnet_jax.run.stages import digest_of, is_done, run_stage
from tests.processes import Started


class Killed(BaseException):
    """Nothing catches it, as nothing catches kill −9."""


class Work:
    """A stage's work in two parts, each a file; notes what it finds and does."""

    def __init__(self):
        self.found = []
        self.dies = False

    def __call__(self, folder):
        self.found.append({p.name for p in folder.iterdir()} - {"stage.json"})
        (folder / "first").write_text("1")
        if self.dies:
            raise Killed
        (folder / "second").write_text("2")
        return {"parts": 2}


@pytest.fixture
def work():
    return Work()


@pytest.fixture(autouse=True)
def log(caplog):
    caplog.set_level(logging.INFO, logger="sppnet_jax")
    return caplog


INPUTS = {"seed": 0, "scales": (96, 128), "finetune": {"steps": 5}}


def test_a_stage_that_is_done_is_not_run_again(tmp_path, work, log):
    digest = run_stage(tmp_path, "svm", INPUTS, work)
    assert is_done(tmp_path, "svm")
    assert run_stage(tmp_path, "svm", INPUTS, work) == digest
    assert work.found == [set()]
    assert log.messages[0] == "stage svm begins"
    assert log.messages[-1] == "stage svm is done"


def test_one_that_was_killed_finds_what_it_had_left(tmp_path, work, log):
    work.dies = True
    with pytest.raises(Killed):
        run_stage(tmp_path, "svm", INPUTS, work)
    assert not is_done(tmp_path, "svm")
    work.dies = False
    run_stage(tmp_path, "svm", INPUTS, work)
    assert work.found == [set(), {"first"}]
    assert is_done(tmp_path, "svm")
    assert "stage svm goes on" in log.messages


@pytest.mark.parametrize("dies", [False, True])
def test_changed_inputs_redo_it_from_nothing_and_the_log_says_why(
    dies, tmp_path, work, log
):
    if dies:
        work.dies = True
        with pytest.raises(Killed):
            run_stage(tmp_path, "svm", INPUTS, work)
        work.dies = False
    else:
        run_stage(tmp_path, "svm", INPUTS, work)
    changed = {"scales": [96], "seed": 0, "C": 0.1, "finetune": {"steps": 5}}
    before = digest_of(INPUTS)
    assert run_stage(tmp_path, "svm", changed, work) == digest_of(changed) != before
    assert work.found == [set(), set()]
    assert (
        "stage svm is redone, for its inputs have changed: C was null, now 0.1; scales "
        "was [96, 128], now [96]" in log.messages
    )
    assert is_done(tmp_path, "svm")


def test_a_changed_setting_of_a_group_is_named_alone(tmp_path, work, log):
    before = {"seed": 0, "finetune": {"learning_rate": 0.01, "steps": 5, "deep": {}}}
    now = {"seed": 0, "finetune": {"learning_rate": 0.02, "steps": 5, "deep": {"C": 1}}}
    run_stage(tmp_path, "svm", before, work)
    run_stage(tmp_path, "svm", now, work)
    assert (
        "stage svm is redone, for its inputs have changed: finetune.deep.C was null, "
        "now 1; finetune.learning_rate was 0.01, now 0.02" in log.messages
    )


def test_only_one_trains_in_a_folder_at_a_time(tmp_path):
    with locked(tmp_path / "run"):
        with (
            pytest.raises(ValueError, match=f"at work in {tmp_path}/run: wait"),
            locked(tmp_path / "run"),
        ):
            pass
        with locked(tmp_path / "other"):
            pass
    with pytest.raises(Killed), locked(tmp_path / "run"):
        raise Killed
    with locked(tmp_path / "run"):
        pass


def lock_for_long(folder):
    """In a process of its own."""
    with locked(folder):
        print("locked", flush=True)
        time.sleep(300)


def test_a_killed_process_locks_its_folder_no_longer(tmp_path):
    process = Started(lock_for_long, tmp_path)
    process.wait_until(process.printed)
    with pytest.raises(ValueError, match="another process"), locked(tmp_path):
        pass
    process.send(signal.SIGKILL)
    assert process.end() == (-signal.SIGKILL, "locked\n", "")
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("how_far", [0, 1])
def test_a_run_killed_while_it_removes_the_old_results_begins_from_nothing(
    how_far, tmp_path, work, monkeypatch
):
    """Killed before the first file is gone, and in the middle."""
    run_stage(tmp_path, "svm", INPUTS, work)

    def die(path):
        for file in sorted(path.iterdir())[:how_far]:
            file.unlink()
        raise Killed

    monkeypatch.setattr(stages.shutil, "rmtree", die)
    with pytest.raises(Killed):
        run_stage(tmp_path, "svm", {"seed": 1}, work)
    monkeypatch.undo()
    assert not is_done(tmp_path, "svm")
    run_stage(tmp_path, "svm", {"seed": 1}, work)
    assert work.found == [set(), set()]
    assert [path.name for path in tmp_path.iterdir()] == ["svm"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"inputs": {}}', "null"])
def test_a_record_that_cannot_be_read_is_no_record(text, tmp_path, work):
    run_stage(tmp_path, "svm", INPUTS, work)
    (tmp_path / "svm/stage.json").write_text(text)
    assert not is_done(tmp_path, "svm")
    run_stage(tmp_path, "svm", INPUTS, work)
    assert work.found == [set(), set()]


@pytest.mark.parametrize("left", [(), ("stage.partial",)])
def test_a_run_killed_before_its_first_record_is_no_obstacle(left, tmp_path, work):
    (tmp_path / "svm").mkdir()
    for name in left:
        (tmp_path / "svm" / name).write_text("{")
    run_stage(tmp_path, "svm", INPUTS, work)
    assert is_done(tmp_path, "svm")


def test_a_folder_that_no_stage_has_made_is_not_removed(tmp_path, work):
    """--workdir=runs beside a trained classifier in runs/network."""
    (tmp_path / "network").mkdir()
    (tmp_path / "network/config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"network would be .* \(config.json\)"):
        run_stage(tmp_path, "network", INPUTS, work)
    assert (tmp_path / "network/config.json").exists()
    assert not work.found


def test_the_record_is_for_people_to_read(tmp_path, work):
    digest = run_stage(tmp_path, "svm", INPUTS, work)
    record = json.loads((tmp_path / "svm/stage.json").read_text())
    assert record["inputs"] == {**INPUTS, "scales": [96, 128]}
    assert record["digest"] == digest
    assert record["seconds"] >= 0
    assert record["report"] == {"parts": 2}


def test_a_digest_depends_on_values_not_on_their_order_or_kind_of_list():
    assert digest_of({"a": (1, 2), "b": 3}) == digest_of({"b": 3, "a": [1, 2]})
    assert digest_of({"a": 1}) != digest_of({"a": 2})
    assert digest_of({"a": 1}) != digest_of({"b": 1})
