"""Linear SVMs trained against the windows that they get wrong: hard-negative mining.

Nearly all windows of an image are negatives, far too many to train on. So the SVMs are
trained on a random few (round 0); then, round by round, all windows are scored, those
of high score that a class has not seen are added to its negatives, and the SVMs are
trained again. Where the features come from is the caller's business: a function gives
those of one image at a time, once a round, for all classes.

It terminates, on any data: a window enters the negatives of a class once and never
leaves, and every round but the last adds at least one. It ends where training on
everything would: a window that no round adds any more scores at most `hard_score` < −1,
so its hinge loss is zero, and it would not change the optimum. What is thinned out, for
overlapping a negative of its class by more than `thinning`, is no candidate.
"""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple

import numpy as np

from sppnet_jax.classification.ranking import check_finite
from sppnet_jax.classification.svm import LinearSVMs
from sppnet_jax.data.sources import Objects
from sppnet_jax.detection.boxes import iou
from sppnet_jax.detection.examples import check_labels
from sppnet_jax.detection.svm_solver import solve_svms
from sppnet_jax.run.progress import progress_bar
from sppnet_jax.run.settings import above, at_least, share

log = logging.getLogger(__name__)

# Rows by which the negatives in memory grow.
SPARE = 4096
# The score of a class that has no positives: finite, and below every threshold.
NEVER = -1e9


class Mining(NamedTuple):
    """How negatives are found and SVMs trained; `C` to `thinning` are the release's.

    `C`, `positive_weight`, `bias_multiplier`, `tolerance`: see `solve_svms`.
    `feature_norm`: features are scaled to this mean length before.
    `negative_overlap`: of a negative with objects of its class, at most (IoU).
    `thinning`: of negatives of a class with each other, at most (IoU); 1 thins none.
    `max_rounds`: after round 0; the release's one pass over the images trains the SVMs
    again and again on the way.
    `initial_per_image`: random negatives of a class in each image, at most.
    `hard_per_image`: those that a round adds for a class in each image, at most.
    `max_rows`: windows kept in memory for all classes together, at most; training
    takes twice the memory of their float32 features.
    `hard_score`: negatives that score more are hard; below −1.
    `calibration_parts`: of the training images, each scored by SVMs that have not seen
    it, to move every class's scores so that 0 parts objects from all else the best;
    0 leaves them as they are.
    """

    C: Annotated[float, above(0)] = 1e-3
    bias_multiplier: Annotated[float, above(0)] = 10.0
    positive_weight: Annotated[float, above(0)] = 2.0
    feature_norm: Annotated[float, above(0)] = 20.0
    negative_overlap: Annotated[float, share()] = 0.3
    thinning: Annotated[float, share()] = 0.7
    max_rounds: Annotated[int, at_least(0)] = 3
    initial_per_image: Annotated[int, at_least(1)] = 5
    max_rows: Annotated[int, at_least(1)] = 100_000
    hard_per_image: Annotated[int, at_least(1)] = 50
    hard_score: float = -1.0001
    tolerance: Annotated[float, above(0)] = 1e-3
    calibration_parts: Annotated[int, at_least(0)] = 0

    def check(self) -> None:
        """Raises ValueError for a score that would miss negatives with a loss."""
        if not self.hard_score < -1:
            raise ValueError(
                f"config.svm.hard_score must be below -1, not {self.hard_score}: "
                "negatives above -1 have a loss, and would be missed"
            )
        if self.calibration_parts == 1:
            raise ValueError(
                "config.svm.calibration_parts is 1: SVMs without the only part have no "
                "images. Give 2 or more, or 0 for no calibration"
            )


class MiningState(NamedTuple):
    """All that the next round needs: `np.savez(path, **state._asdict())` keeps it, and
    `MiningState(**np.load(path))` brings it back.

    One row for each negative, shared by all classes that it is a negative of; one
    record for each round so far, round 0 first.
    """

    features: np.ndarray  # float32 [rows, D]
    images: np.ndarray  # int32 [rows]
    windows: np.ndarray  # int32 [rows], among the boxes of the image
    members: np.ndarray  # bool [rows, classes]
    duals: np.ndarray  # float32 [positives + rows, classes]
    weights: np.ndarray  # float32 [classes, D]
    biases: np.ndarray  # float32 [classes]
    added: np.ndarray  # int32 [rounds, classes]
    objectives: np.ndarray  # float64 [rounds, classes]
    seconds: np.ndarray  # float64 [rounds]
    converged: np.ndarray  # bool []: no hard negatives were left
    full: np.ndarray  # bool []: some were left out, for `max_rows`


def feature_scale(features: np.ndarray, target: float = 20.0) -> float:
    """The factor that gives features the mean Euclidean length `target`.

    `features`: float [N, D], a sample.

    Raises: ValueError for no features, or none but zeros.
    """
    lengths = np.linalg.norm(np.asarray(features, np.float64), axis=-1)
    mean = float(lengths.mean()) if lengths.size else 0.0
    if not (np.isfinite(mean) and mean > 0):
        raise ValueError(
            f"features {np.shape(features)} have a mean length of {mean}; no factor "
            f"makes that {target:g}"
        )
    return target / mean


def mine_hard_negatives(
    features_of: Callable[[int, np.ndarray], np.ndarray],
    scores_of: Callable[[int, LinearSVMs], np.ndarray],
    boxes: Sequence[np.ndarray],
    objects: Sequence[Objects],
    positive_features: np.ndarray,
    positive_labels: np.ndarray,
    num_classes: int,
    settings: Mining = Mining(),  # noqa: B008, it can't be changed
    *,
    seed: int = 0,
    state: MiningState | None = None,
    on_round: Callable[[MiningState], None] | None = None,
) -> tuple[LinearSVMs, MiningState]:
    """Trains an SVM for each class, in rounds; section 4 of the paper.

    `features_of`: from the number of an image and chosen rows of its boxes, int [n], to
    float [n, D], scaled (`feature_scale`); called for one image after the other.
    `scores_of`: from the number of an image and SVMs of such features to those of all
    its boxes, float [N, classes].
    `boxes`: float [N, 4] for each image, (ymin, xmin, ymax, xmax) in pixels.
    `objects`: of each image; difficult ones keep windows out of the negatives as well.
    `positive_features`, `positive_labels`: float [P, D], scaled alike, and int [P], 0
    to `num_classes` − 1: the objects' own windows. A class without any is named in the
    log; its score is always NEVER.
    `seed`: of the random negatives and of the solver's order.
    `state`: of an earlier call with the same arguments, to go on from there.
    `on_round`: called with the state after each round, such as to save it.

    Returns: the SVMs and the last state; the same for a resumed call.
    Raises: ValueError for arguments that do not fit, naming the image.
    """
    labels = np.asarray(positive_labels)
    positives = np.asarray(positive_features, np.float32)
    _check(boxes, objects, positives, labels, num_classes, settings)
    trained = np.isin(np.arange(num_classes), labels)
    if not trained.all():
        log.warning(
            "classes %s have no objects to train on: they will never be detected",
            np.flatnonzero(~trained).tolist(),
        )
    if state is None:
        dimensions = positives.shape[1]
        state = MiningState(
            features=np.zeros((0, dimensions), np.float32),
            images=np.zeros(0, np.int32),
            windows=np.zeros(0, np.int32),
            members=np.zeros((0, num_classes), bool),
            duals=np.zeros((len(positives), num_classes), np.float32),
            weights=np.zeros((num_classes, dimensions), np.float32),
            biases=np.zeros(num_classes, np.float32),
            added=np.zeros((0, num_classes), np.int32),
            objectives=np.zeros((0, num_classes)),
            seconds=np.zeros(0),
            converged=np.array(False),
            full=np.array(False),
        )
    _check_state(state, positives, num_classes, boxes)

    while not (
        state.converged or state.full or len(state.seconds) > settings.max_rounds
    ):
        started, before = time.monotonic(), state.members.sum(axis=0)
        state = _find(
            features_of, scores_of, boxes, objects, trained, state, settings, seed
        )
        added = (state.members.sum(axis=0) - before).astype(np.int32)
        state = state._replace(added=np.concatenate([state.added, added[None]]))
        if added.any() or not len(state.seconds):
            state = _train(state, positives, labels, trained, settings, seed)
        else:
            again = np.concatenate([state.objectives, state.objectives[-1:]])
            converged = np.array(not state.full)
            state = state._replace(objectives=again, converged=converged)
        seconds = np.append(state.seconds, time.monotonic() - started)
        state = state._replace(seconds=seconds)
        log.info(
            "round %d: %d negatives added, %d windows in all, %.1f s%s",
            len(seconds) - 1,
            added.sum(),
            len(state.features),
            seconds[-1],
            "; none are left" if state.converged else "",
        )
        if on_round is not None:
            on_round(state)
    return LinearSVMs(state.weights, state.biases), state


def mining_report(state: MiningState) -> dict[str, Any]:
    """What happened in the rounds, as plain values for JSON.

    Returns: "ended": "converged", "max_rows" or "max_rounds"; "windows": the negatives
    in memory; "rounds": for each, "added" and "negatives" (so far) of every class,
    "objectives" of the trained SVMs, and "seconds".
    """
    ended = "max_rows" if state.full else "max_rounds"
    ended = "converged" if state.converged else ended
    columns = {
        "added": state.added,
        "negatives": np.cumsum(state.added, axis=0),
        "objectives": state.objectives,
        "seconds": state.seconds.round(3),
    }
    rounds = [
        {name: column[number].tolist() for name, column in columns.items()}
        for number in range(len(state.seconds))
    ]
    return {"ended": ended, "windows": len(state.features), "rounds": rounds}


def signs_of(labels: np.ndarray, members: np.ndarray) -> np.ndarray:
    """What positives and then negatives are to each class: int8, 1, −1, or 0, neither.

    `labels`: int [P]. `members`: bool [rows, classes], see `MiningState`.
    """
    own = labels[:, None] == np.arange(members.shape[1])
    return np.concatenate([own.astype(np.int8), -members.astype(np.int8)])


def _find(
    features_of: Callable[[int, np.ndarray], np.ndarray],
    scores_of: Callable[[int, LinearSVMs], np.ndarray],
    boxes: Sequence[np.ndarray],
    objects: Sequence[Objects],
    trained: np.ndarray,
    state: MiningState,
    settings: Mining,
    seed: int,
) -> MiningState:
    """One pass over the images: random negatives in round 0, hard ones afterwards."""
    round_number = len(state.seconds)
    # Grown in large steps, not joined from many arrays: these would be as large again.
    rows = np.array(state.features)
    images, windows = [state.images], [state.windows]
    joined: np.ndarray = state.members.copy()
    members = [joined]
    held, left_out = len(state.features), 0

    def look(image: int, chosen: np.ndarray) -> np.ndarray:
        features = np.asarray(features_of(image, chosen), np.float32)
        count, dimensions = len(chosen), state.features.shape[1]
        if features.shape != (count, dimensions):
            raise ValueError(
                f"{count} boxes of image {image} were asked for, and the positives "
                f"have {dimensions} numbers each, but the features are {features.shape}"
            )
        check_finite(features, f"the features of image {image}")
        return features

    def scored(image: int) -> np.ndarray:
        scores = np.asarray(scores_of(image, LinearSVMs(state.weights, state.biases)))
        expected = len(boxes[image]), len(trained)
        if scores.shape != expected:
            raise ValueError(
                f"the scores of image {image} must be [N, classes] = {expected}, got "
                f"{scores.shape}"
            )
        check_finite(scores, f"the scores of image {image}")
        return scores

    order = np.argsort(state.images, kind="stable")
    starts = np.searchsorted(state.images[order], np.arange(1, len(boxes)))
    name = f"hard negatives, round {round_number}" if round_number else "negatives"
    with progress_bar(name, len(boxes)) as bar:
        for image, (own, seen) in enumerate(
            zip(boxes, np.split(order, starts), strict=True)
        ):
            bar.update()
            wanted = _candidates(
                own, objects[image], trained, settings.negative_overlap
            )
            if not wanted.any():
                continue
            taken = np.zeros_like(wanted)
            taken[state.windows[seen]] = state.members[seen]
            if round_number:
                scores = scored(image)
                wanted &= ~taken & (scores > settings.hard_score)
                limit = settings.hard_per_image
            else:
                # The same for all classes: so they share windows.
                rng = np.random.default_rng((seed, image))
                ranks = np.argsort(rng.permutation(len(own)))
                scores = np.broadcast_to(-ranks[:, None], wanted.shape)
                limit = settings.initial_per_image
            chosen = _highest(own, scores, wanted, taken, settings.thinning, limit)
            joined[seen] |= chosen[state.windows[seen]]
            new = np.flatnonzero(chosen.any(axis=1))
            new = new[~np.isin(new, state.windows[seen])]
            # An equal share of the room for every image to come; the hardest first.
            room = max(0, -(-(settings.max_rows - held) // (len(boxes) - image)))
            if len(new) > room:
                left_out += len(new) - room
                hardness = np.where(chosen, scores, -np.inf).max(axis=1)[new]
                new = np.sort(new[np.argsort(-hardness, kind="stable")[:room]])
            if held + len(new) > len(rows):
                rows.resize((held + len(new) + SPARE, rows.shape[1]), refcheck=False)
            if len(new):
                rows[held : held + len(new)] = look(image, new)
            held += len(new)
            images.append(np.full(len(new), image, np.int32))
            windows.append(new.astype(np.int32))
            members.append(chosen[new])
    if left_out:
        log.warning(
            "%d negatives found no room among max_rows = %d, so mining ends early: "
            "lower hard_per_image or initial_per_image, or raise max_rows",
            left_out,
            settings.max_rows,
        )
    rows.resize((held, rows.shape[1]), refcheck=False)
    return state._replace(
        features=rows,
        images=np.concatenate(images),
        windows=np.concatenate(windows),
        members=np.concatenate(members),
        full=np.array(left_out > 0),
    )


def _candidates(
    boxes: np.ndarray, objects: Objects, trained: np.ndarray, overlap: float
) -> np.ndarray:
    """Which boxes may be negatives of which classes: bool [N, classes]."""
    allowed = np.tile(trained, (len(boxes), 1))
    overlaps = iou(boxes, objects.boxes.reshape(-1, 4))
    for number in np.unique(objects.labels):
        own = overlaps[:, objects.labels == number]
        allowed[:, number] &= (own <= overlap).all(axis=1)
    return allowed


def _highest(
    boxes: np.ndarray,
    scores: np.ndarray,
    wanted: np.ndarray,
    taken: np.ndarray,
    most: float,
    limit: int,
) -> np.ndarray:
    """The best windows that each class wants, thinned; bool [N, classes]."""
    chosen = np.zeros_like(wanted)
    for number in np.flatnonzero(wanted.any(axis=0)):
        ranked = np.argsort(-scores[:, number], kind="stable")
        ranked, kept = ranked[wanted[ranked, number]], np.flatnonzero(taken[:, number])
        chosen[_thinned(boxes, ranked, kept, most, limit), number] = True
    return chosen


def _thinned(
    boxes: np.ndarray, ranked: np.ndarray, kept: np.ndarray, most: float, limit: int
) -> np.ndarray:
    """The first `limit` of `ranked` that overlap none of `kept`, nor each other."""
    picks: list[int] = []
    if len(kept):
        ranked = ranked[(iou(boxes[ranked], boxes[kept]) <= most).all(axis=1)]
    while len(ranked) and len(picks) < limit:
        picks.append(int(ranked[0]))
        rest = ranked[1:]
        ranked = rest[iou(boxes[rest], boxes[ranked[:1]])[:, 0] <= most]
    return np.array(picks, np.int64)


def _train(
    state: MiningState,
    positives: np.ndarray,
    labels: np.ndarray,
    trained: np.ndarray,
    settings: Mining,
    seed: int,
) -> MiningState:
    """The state with SVMs of all its rows; `duals` are of fewer rows before."""
    without = trained & ~state.members.any(axis=0)
    if without.any():
        log.warning(
            "classes %s have no negatives: every window may be taken for one of them",
            np.flatnonzero(without).tolist(),
        )
    signs = signs_of(labels, state.members)
    new = np.zeros((len(signs) - len(state.duals), len(trained)), np.float32)
    log.info("training %d SVMs on %d windows", trained.sum(), len(signs))
    solved = solve_svms(
        [positives, state.features],
        signs,
        C=settings.C,
        positive_weight=settings.positive_weight,
        bias_multiplier=settings.bias_multiplier,
        tolerance=settings.tolerance,
        start=np.concatenate([state.duals, new]),
        seed=seed + len(state.seconds),
    )
    return state._replace(
        duals=solved.duals,
        weights=solved.svms.weights,
        biases=np.where(trained, solved.svms.biases, np.float32(NEVER)),
        objectives=np.concatenate([state.objectives, solved.objectives[None]]),
    )


def _check(
    boxes: Sequence[np.ndarray],
    objects: Sequence[Objects],
    positives: np.ndarray,
    labels: np.ndarray,
    classes: int,
    settings: Mining,
) -> None:
    if len(boxes) != len(objects) or not len(boxes):
        raise ValueError(
            f"boxes of {len(boxes)} images and objects of {len(objects)}: give both of "
            "the same images, at least one"
        )
    if positives.ndim != 2 or labels.shape != positives.shape[:1]:
        raise ValueError(
            f"positive features {positives.shape} must be [P, D], and their labels "
            f"{labels.shape} [P]"
        )
    if not len(labels):
        raise ValueError("there are no positives: no class can be trained")
    check_labels(labels, classes, "positive labels")
    for image, (own, truth) in enumerate(zip(boxes, objects, strict=True)):
        if np.ndim(own) != 2 or np.shape(own)[1] != 4:
            raise ValueError(
                f"the boxes of image {image} must be [N, 4], not {np.shape(own)}"
            )
        if not ((truth.labels >= 0) & (truth.labels < classes)).all():
            raise ValueError(
                f"image {image} has objects of the classes {truth.labels.tolist()}, "
                f"but there are only {classes}"
            )
    if not any(len(own) for own in boxes):
        raise ValueError(f"none of the {len(boxes)} images has a box: no negatives")
    settings.check()


def _check_state(
    state: MiningState, positives: np.ndarray, classes: int, boxes: Sequence[np.ndarray]
) -> None:
    duals = (len(positives) + len(state.features), classes)
    fits = state.duals.shape == duals and state.weights.shape[1:] == positives.shape[1:]
    if not fits or state.images.max(initial=0) >= len(boxes):
        raise ValueError(
            f"the state is not one of {len(positives)} positives {positives.shape}, "
            f"{classes} classes and {len(boxes)} images: it has duals "
            f"{state.duals.shape} and weights {state.weights.shape}; start afresh"
        )
