"""Mining ends where training on every window at once would have ended."""

import itertools
import logging
from typing import NamedTuple

import numpy as np
import pytest
from data_helpers import overlap
from test_svm_solver import hinge_objective, scikit_learns

from sppnet_jax.data.sources import Objects
from sppnet_jax.detection.hard_negatives import (
    NEVER,
    Mining,
    MiningState,
    feature_scale,
    mine_hard_negatives,
    mining_report,
)

CLASSES = 3
EVERYTHING = Mining(
    thinning=1.0, hard_per_image=3, max_rounds=100, C=0.1, tolerance=1e-4
)


class World(NamedTuple):
    """Images with boxes, objects and features; image 2 shows nothing."""

    boxes: list[np.ndarray]
    objects: list[Objects]
    features: list[np.ndarray]
    positives: np.ndarray
    labels: np.ndarray

    def scores_of(self, image, svms):
        return svms.scores(self.features[image])

    def mine(self, settings, scores_of=None, **arguments):
        svms, state = mine_hard_negatives(
            lambda image, rows: self.features[image][rows],
            scores_of or self.scores_of,
            *self[:2],
            *self[3:],
            CLASSES,
            settings,
            **arguments,
        )
        return svms.weights, svms.biases, state


def random_boxes(rng, count):
    starts = rng.integers(0, 30, (count, 2))
    return np.concatenate([starts, starts + rng.integers(4, 20, (count, 2))], axis=1)


def world(seed=0, images=4, windows=40):
    rng = np.random.default_rng(seed)
    angles = 2 * np.pi * np.arange(CLASSES) / CLASSES
    centres = 7 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    boxes, objects, features, positives, labels = [], [], [], [], []
    for image in range(images):
        count = 0 if image == 2 else 5
        truth = Objects(
            random_boxes(rng, count).astype(np.float64),
            np.arange(count, dtype=np.int32) % CLASSES,
            np.arange(count) == 3,
        )
        boxes.append(
            np.concatenate([truth.boxes, random_boxes(rng, windows)]).astype(np.float32)
        )
        scattered = 2.5 * rng.normal(size=(count + windows, 2))
        scattered[:count] = centres[truth.labels] + 0.3 * scattered[:count]
        features.append(scattered.astype(np.float32))
        positives.append(features[-1][:count][~truth.difficult])
        labels.append(truth.labels[~truth.difficult])
        objects.append(truth)
    return World(
        boxes, objects, features, np.concatenate(positives), np.concatenate(labels)
    )


def all_candidates(world, number):
    """Every (image, window) that may be a negative of a class, box by box."""
    found = []
    for image, (boxes, truth) in enumerate(
        zip(world.boxes, world.objects, strict=True)
    ):
        for window, box in enumerate(boxes):
            pairs = zip(truth.boxes, truth.labels, strict=True)
            if all(overlap(box, b) <= 0.3 for b, label in pairs if label == number):
                found.append((image, window))
    return found


def members_of(state, number):
    own = state.members[:, number]
    return list(
        zip(state.images[own].tolist(), state.windows[own].tolist(), strict=True)
    )


@pytest.mark.parametrize("seed", [0, 1])
def test_mining_ends_at_the_svm_of_all_windows(seed):
    made = world(seed)
    weights, biases, state = made.mine(EVERYTHING._replace(initial_per_image=2))
    report = mining_report(state)
    assert report["ended"] == "converged"
    assert len(report["rounds"]) > 2
    for number in range(CLASSES):
        candidates = all_candidates(made, number)
        assert set(members_of(state, number)) < set(candidates)
        own = made.positives[made.labels == number]
        features = np.concatenate(
            [own, [made.features[image][window] for image, window in candidates]]
        ).astype(np.float64)
        signs = np.repeat([1, -1], [len(own), len(candidates)])
        best = scikit_learns(features, signs, 0.1, 2, 10)
        found = hinge_objective(
            *(weights[number], biases[number], features, signs), 0.1, 2, 10
        )
        assert best * (1 - 1e-6) <= found <= best * 1.001


def test_what_is_left_in_the_end_is_easy():
    made = world()
    weights, biases, state = made.mine(EVERYTHING._replace(initial_per_image=1))
    for number in range(CLASSES):
        kept = set(members_of(state, number))
        for image, window in all_candidates(made, number):
            score = made.features[image][window] @ weights[number] + biases[number]
            assert (image, window) in kept or score <= -1.0001 + 1e-5


def test_negatives_are_thinned_and_keep_off_their_objects():
    made = world(windows=120)
    settings = EVERYTHING._replace(thinning=0.4, initial_per_image=3, hard_per_image=5)
    _, _, state = made.mine(settings)
    thinned_out = 0
    for number in range(CLASSES):
        kept = members_of(state, number)
        assert len(set(kept)) == len(kept)
        assert set(kept) <= set(all_candidates(made, number))
        for (i, a), (j, b) in itertools.combinations(kept, 2):
            assert i != j or overlap(made.boxes[i][a], made.boxes[i][b]) <= 0.4
        thinned_out += len(all_candidates(made, number)) - len(kept)
    assert thinned_out > 100


def test_a_round_adds_the_hardest_first():
    made = world()
    settings = EVERYTHING._replace(initial_per_image=1, max_rounds=0)
    weights, biases, before = made.mine(settings)
    _, _, after = made.mine(
        settings._replace(hard_per_image=1, max_rounds=1), state=before
    )
    for number in range(CLASSES):
        kept = set(members_of(before, number))
        expected = set()
        for image in range(len(made.boxes)):
            scores = made.features[image] @ weights[number] + biases[number]
            hard = [
                (scores[w], w)
                for i, w in all_candidates(made, number)
                if i == image and (i, w) not in kept and scores[w] > -1.0001
            ]
            expected |= {(image, max(hard)[1])} if hard else set()
        assert set(members_of(after, number)) - kept == expected


def test_it_terminates_where_nothing_can_be_told_apart():
    made = world(windows=12)  # each of them is a round, and a round compiles
    same = [np.ones_like(features) for features in made.features]
    made = made._replace(features=same, positives=np.ones_like(made.positives))
    _, _, state = made.mine(EVERYTHING._replace(hard_per_image=1, tolerance=0.5))
    report = mining_report(state)
    assert report["ended"] == "converged"
    # Every window is hard, and each image gives up one a round.
    counts = [len(all_candidates(made, number)) for number in range(CLASSES)]
    assert report["rounds"][-1]["negatives"] == counts
    assert len(report["rounds"]) <= max(map(len, made.boxes)) + 2


def test_the_report_adds_up_and_objectives_never_fall():
    made = world()
    calls = []

    def scores_of(image, svms):
        calls.append(image)
        return made.scores_of(image, svms)

    settings = EVERYTHING._replace(initial_per_image=2)
    *_, state = made.mine(settings, scores_of)
    rounds = mining_report(state)["rounds"]
    assert calls == list(range(4)) * (len(rounds) - 1)  # random ones in round 0
    total = np.zeros(CLASSES, int)
    for before, record in itertools.pairwise([None, *rounds]):
        total += record["added"]
        assert record["negatives"] == total.tolist()
        if before is not None:
            higher = np.array(record["objectives"]) * (1 + 1e-4)
            assert (higher >= before["objectives"]).all()
    assert rounds[-1]["added"] == [0] * CLASSES
    assert state.members.sum(axis=0).tolist() == total.tolist()
    assert mining_report(state)["windows"] == len(state.features) < total.sum()


def test_a_run_goes_on_from_a_file_as_if_never_interrupted(tmp_path):
    made = world()
    settings = EVERYTHING._replace(initial_per_image=1, hard_per_image=3, max_rounds=3)
    states = []
    weights, biases, last = made.mine(settings, on_round=states.append)
    assert [len(state.seconds) for state in states] == [1, 2, 3, 4]
    for number, state in enumerate(states):
        path = tmp_path / f"{number}.npz"
        np.savez(path, **state._asdict())
        again = made.mine(settings, state=MiningState(**np.load(path)))
        np.testing.assert_array_equal(again[0], weights)
        np.testing.assert_array_equal(again[1], biases)
        for name in set(MiningState._fields) - {"seconds"}:
            np.testing.assert_array_equal(getattr(again[2], name), getattr(last, name))


def test_the_last_round_may_come_before_all_are_found():
    _, _, state = world().mine(Mining(initial_per_image=1, max_rounds=1))
    report = mining_report(state)
    assert (report["ended"], len(report["rounds"])) == ("max_rounds", 2)


def test_a_class_without_objects_is_named_and_never_detected(caplog):
    made = world()
    others = made.labels != 1
    made = made._replace(positives=made.positives[others], labels=made.labels[others])
    weights, biases, state = made.mine(EVERYTHING)
    assert "classes [1] have no objects to train on" in caplog.text
    assert not weights[1].any()
    assert biases[1] == np.float32(NEVER)
    assert state.added.sum(axis=0)[1] == 0


def test_memory_is_bounded_and_the_log_says_when_it_is_full(caplog):
    _, _, state = world().mine(EVERYTHING._replace(initial_per_image=2, max_rows=20))
    assert len(state.features) == 20
    assert mining_report(state)["ended"] == "max_rows"
    assert "found no room among max_rows = 20" in caplog.text


def test_memory_is_shared_by_all_images():
    """Also by those after an image that has nothing to give."""
    made = world()
    made.boxes[1], made.features[1] = np.zeros((0, 4)), np.zeros((0, 2))
    settings = EVERYTHING._replace(initial_per_image=12, max_rows=24, max_rounds=0)
    _, _, state = made.mine(settings)
    # A quarter for the first; what the second leaves is for the others.
    assert np.bincount(state.images, minlength=4).tolist() == [6, 0, 9, 9]
    assert (state.members.any(axis=1)).all()


def test_where_memory_is_short_the_hardest_of_an_image_are_kept():
    made = world()
    settings = EVERYTHING._replace(initial_per_image=1, hard_per_image=6, max_rounds=0)
    weights, biases, before = made.mine(settings)
    more = settings._replace(max_rounds=1)
    _, _, everything = made.mine(more, state=before)
    held = len(before.features)
    _, _, few = made.mine(more._replace(max_rows=held + 8), state=before)
    assert len(everything.features) > held + 12
    expected = set()
    for image in range(4):
        own = np.flatnonzero(everything.images[held:] == image) + held
        ranked = []
        for row in own:
            scores = everything.features[row] @ weights.T + biases
            hardness = max(scores[everything.members[row]])
            ranked.append((hardness, image, int(everything.windows[row])))
        expected |= {(image, window) for _, image, window in sorted(ranked)[-2:]}
        assert len(ranked) > 2
    found = zip(few.images[held:].tolist(), few.windows[held:].tolist(), strict=True)
    assert set(found) == expected
    assert len(few.features) == held + 8


def test_images_without_boxes_are_passed_over(caplog):
    caplog.set_level(logging.WARNING)
    made = world()
    made.boxes[2], made.features[2] = np.zeros((0, 4)), np.zeros((0, 2))
    _, _, state = made.mine(EVERYTHING)
    assert 2 not in state.images
    assert mining_report(state)["ended"] == "converged"
    assert not caplog.records


def test_scaled_features_have_the_wanted_mean_length():
    features = np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32)
    for target in (20.0, 1.0):
        scaled = features * feature_scale(features, target)
        lengths = [
            float(np.sqrt((row.astype(np.float64) ** 2).sum())) for row in scaled
        ]
        assert sum(lengths) / 50 == pytest.approx(target, rel=1e-6)
    for nothing in (np.zeros((3, 2)), np.zeros((0, 2))):
        with pytest.raises(ValueError, match="no factor makes that 20"):
            feature_scale(nothing)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": []}, "boxes of 0 images and objects of 4"),
        ({"boxes": [np.zeros((0, 4))] * 4}, "no negatives"),
        ({"boxes": [np.zeros((3, 5))] * 4}, r"boxes of image 0 must be \[N, 4\]"),
        ({"labels": np.zeros(2, int)}, r"labels \(2,\) \[P\]"),
        ({"labels": np.full(12, 3)}, "from 0 to 2, not int64 from 3 to 3"),
        ({"positives": np.zeros((0, 2)), "labels": np.zeros(0, int)}, "no positives"),
        ({"features": [np.zeros((45, 3))] * 4}, "boxes of image 0 were asked for"),
        ({"features": [np.full((45, 2), np.nan)] * 4}, "image 0 .* aren't finite"),
    ],
)
def test_arguments_that_make_no_sense_are_errors(change, message):
    made = world()
    assert len(made.labels) == 12
    with pytest.raises(ValueError, match=message):
        made._replace(**change).mine(EVERYTHING)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (np.zeros((45, 2)), r"scores of image 0 must be .* = \(45, 3\), got \(45, 2\)"),
        (np.full((45, 3), np.nan), "scores of image 0 .* aren't finite"),
    ],
)
def test_scores_that_make_no_sense_are_errors(scores, message):
    with pytest.raises(ValueError, match=message):
        world().mine(EVERYTHING, lambda *_: scores)


def test_settings_and_states_that_make_no_sense_are_errors():
    made = world()
    with pytest.raises(ValueError, match=r"hard_score must be below -1, not -0\.9"):
        made.mine(Mining(hard_score=-0.9))
    _, _, state = made.mine(Mining())
    fewer = made._replace(positives=made.positives[1:], labels=made.labels[1:])
    with pytest.raises(ValueError, match="not one of 11 positives"):
        fewer.mine(Mining(), state=state)
