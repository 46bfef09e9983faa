"""Tables 9 and 10: is SPP-net as good a detector as R-CNN, and how much faster?

    python -m experiments.detection_vs_rcnn --preset=digits
    python -m experiments.detection_vs_rcnn --preset=folder --root=FOLDER \\
        --network=WORKDIR --fc_rank 512 128
    python -m experiments.detection_vs_rcnn --preset=paper

Trains and tests SPP-net with one scale and with five, and R-CNN, on one network and the
same proposals. Then the systems detect in the same images in turn, with the seconds of
each part measured; so are SPP-nets that treat every window by itself, and one whose fc
layers are truncated by SVD, with its cost in mAP.

`--preset=paper` is about time alone: a full-width ZF-5 with random weights, the paper's
sizes, one photograph and 2,000 windows; fc6 and fc7 are computed, nothing after them.
"""

import argparse
from collections import defaultdict
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import jax
import numpy as np
import sklearn.datasets

from experiments import detection_timing as timing
from experiments.detection_timing import (
    CONVOLUTION,
    FC,
    POOLING,
    SUPPRESSION,
    WARPING,
    Convolutions,
    Part,
    Photo,
    Seconds,
    System,
    Windows,
)
from experiments.report import (
    TEXT,
    Cited,
    Claim,
    Column,
    Ratio,
    Row,
    differences,
    write_report,
)
from experiments.runs import (
    PAPER_SIDE,
    DetectionSetting,
    DetectorRecipe,
    detector_settings_of,
    detector_test,
    load_detector,
    open_test_split,
)
from experiments.setting import PAPER_SCALES, paper_scales, run_detection
from sppnet_jax.benchmarks.samples import random_network
from sppnet_jax.data.images import decode_image
from sppnet_jax.detection.detector import layer_head
from sppnet_jax.detection.detector_settings import DetectorSettings
from sppnet_jax.detection.low_rank import (
    FC_LAYERS,
    multiplications,
    spectrum_kept,
    truncate_fc,
)
from sppnet_jax.detection.pictures import plot_times
from sppnet_jax.detection.proposals import ProposalSettings, find_boxes
from sppnet_jax.detection.proposers import selective_search
from sppnet_jax.detection.rcnn import PAPER_CONTEXT
from sppnet_jax.detection.split_features import feature_settings
from sppnet_jax.network.preprocess import Preprocessing
from sppnet_jax.training.network_settings import network_settings

NAME = "detection_vs_rcnn"
TITLE = "SPP-net and R-CNN"
ELEVEN, AREA = "mAP, 11 points", "mAP, area"
PROPOSALS, FEATURES = "proposals", "convolution, pooling, fc"
ONE, FIVE, RCNN = "SPP, 1 scale", "SPP, 5 scales", "R-CNN"
EVERY, SVD = ", every window by itself", ", SVD"
PRECISIONS = (Column(ELEVEN), Column(AREA, paper=False))
PARTS = (
    Column(PROPOSALS, "s", paper=False),
    Column(WARPING, "s", paper=False),
    Column(CONVOLUTION, "s"),
    Column(POOLING, "s", paper=False),
    Column(FC, "s"),
    Column(SUPPRESSION, "s", paper=False),
    Column(FEATURES, "s", paper=False),
)
ROUNDS = 5  # of SPP-net for one of R-CNN
PAPER_RANKS = ((1024, 256), (512, 256))

# VOC 2007; all three with the same ZF-5, fc7 fine-tuned, box regression.
PAPER: dict[str, dict[str, Cited]] = {
    ONE: {
        ELEVEN: Cited(0.580, TEXT),
        CONVOLUTION: Cited(0.053),
        FC: Cited(0.089),
    },
    FIVE: {
        ELEVEN: Cited(0.592, TEXT),
        CONVOLUTION: Cited(0.293),
        FC: Cited(0.089),
    },
    RCNN: {
        ELEVEN: Cited(0.592, TEXT),
        CONVOLUTION: Cited(14.37, TEXT),
        FC: Cited(0.089, TEXT),
    },
}
# How many times faster than R-CNN; the paper's windows go through fc one by one.
PAPER_RATIOS = {
    (ONE, CONVOLUTION): Cited(270, TEXT),
    (FIVE, CONVOLUTION): Cited(49, TEXT),
    (ONE + EVERY, FEATURES): Cited(102, TEXT),
    (FIVE + EVERY, FEATURES): Cited(38, TEXT),
}
COMPARISONS = {
    f"{ONE} is better than {RCNN}": (ONE, RCNN),
    f"{FIVE} is better than {RCNN}": (FIVE, RCNN),
    f"SVD lowers mAP ({ONE}, the same SVMs)": (ONE, ONE + SVD),
}

Times = dict[str, Seconds]  # by system, by part


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--timed_images", type=int, default=10)
    parser.add_argument(
        "--repeats", type=int, default=1, help=f"of R-CNN's times; SPP-net's: {ROUNDS}×"
    )
    parser.add_argument("--batch", type=int, help="R-CNN's; default: the fastest of 3")
    parser.add_argument(
        "--fc_rank", type=int, nargs=2, help="of fc6 and fc7; default: 1/4 and 1/16"
    )
    parser.add_argument("--image", help="of preset paper; default: scikit-learn's")
    parser.add_argument(
        "--width", type=float, default=1.0, help="of preset paper's network"
    )


def main(given: DetectionSetting, options: argparse.Namespace) -> Path:
    _check(options)
    ranks = _ranks(given, options)
    detectors = {
        ONE: DetectorRecipe(paper_scales(given, 1)),
        FIVE: DetectorRecipe(paper_scales(given, 5)),
        RCNN: DetectorRecipe(system="rcnn"),
        ONE + SVD: DetectorRecipe(paper_scales(given, 1), ranks=ranks),
    }
    reports: dict[str, dict[int, Any]] = defaultdict(dict)
    for seed in given.seeds:
        for name, detector in detectors.items():
            reports[name][seed] = detector_test(given, detector, seed)
            _report(given, reports, {}, [])
    times, notes = _time(given, options, detectors)
    return _report(given, reports, times, notes)


def on_paper(folder: Path, options: argparse.Namespace) -> Path:
    """Measures the times at the paper's sizes; no detector is trained."""
    _check(options)
    model, params = random_network(options.width, PAPER_SIDE, "float32")
    inputs = Preprocessing(np.array(128, np.float32), 1.0, np.zeros((3, 3), np.float32))
    network = Convolutions(model, params, inputs)
    photo, proposal_seconds, note = _paper_photo(options)
    batch, batch_note = _batch(network, [photo], options.batch)
    fc = {name: network.params[name] for name in FC_LAYERS}
    program = timing.fc_program(layer_head(network.model, "fc7"))
    notes = [note, batch_note]
    wanted = [tuple(options.fc_rank)] if options.fc_rank else PAPER_RANKS
    truncated = {}
    for ranks in wanted:
        own = truncate_fc(fc, dict(zip(("fc6", "fc7"), ranks, strict=True)))
        truncated[f"{SVD} {ranks[0]}/{ranks[1]}"] = jax.device_put(own)
        notes.append(_saved(f"SVD of ranks {ranks[0]} and {ranks[1]}", fc, own))
    systems = []
    for name, count in ((ONE, 1), (FIVE, 5)):
        windows = Windows(PAPER_SCALES[count], PAPER_SIDE**2)
        rounds = ROUNDS * options.repeats
        apart = timing.spp_parts(network, windows, [photo], shared=False)
        shared = timing.spp_parts(network, windows, [photo])
        for kind, weights in {EVERY: fc, "": fc, **truncated}.items():
            parts = dict(apart if kind == EVERY else shared)
            parts[FC] = timing.fc_part(program, weights)
            systems.append(System(name + kind, parts, rounds))
        notes.append(_distinct(name, network, windows, [photo]))
    context = round(PAPER_SIDE * PAPER_CONTEXT)
    parts = timing.rcnn_parts(network, [photo], context=context, batch_size=batch)
    parts[FC] = timing.fc_part(program, fc)
    systems.append(System(RCNN, parts, options.repeats, warm_boxes=batch))
    times, _ = timing.measure(systems, [photo])
    for seconds in times.values():
        seconds[PROPOSALS] = [proposal_seconds] if proposal_seconds else []
    rows = [_row(system.name, {}, times) for system in systems]
    measured = [c for c in PARTS if any(row.measured.get(c.name) for row in rows)]
    given = DetectionSetting("paper", DetectorSettings(), PAPER_SIDE, folder, ())
    made = write_report(
        given,
        NAME,
        title=f"{TITLE}: seconds at the paper's sizes",
        about={"width": options.width, "batch": batch},
        columns=measured,
        rows=rows,
        ratios=_ratios(times),
        notes=notes,
    )
    # Proposals are the same for all, and would hide what differs.
    _plot(made, times, PARTS[1:])
    return made


def _time(
    given: DetectionSetting,
    options: argparse.Namespace,
    detectors: dict[str, DetectorRecipe],
) -> tuple[Times, list[str]]:
    """The times of the first seed's detectors on some test images, and notes."""
    seed = given.seeds[0]
    all_settings = {
        name: detector_settings_of(given, detector, seed)
        for name, detector in detectors.items()
    }
    loaded = {
        name: load_detector(given, detector, seed)
        for name, detector in detectors.items()
    }
    settings, one = all_settings[ONE], loaded[ONE]
    photos = _photos(
        open_test_split(given, detectors[ONE], seed),
        options.timed_images,
    )
    own = one.network
    network = Convolutions(own.model, own.params, own.preprocessing)
    batch, batch_note = _batch(network, photos, options.batch)
    # One program for the fc part of all: their heads differ in their weights alone.
    program = timing.fc_program(one.head)
    last = timing.suppression_part(settings.test)
    count = np.mean([len(photo.boxes) for photo in photos])
    notes = [
        f"Times on {len(photos)} test images, {count:.0f} windows each on average, by "
        "the detectors of the first seed; decoding is left out. Parts are added up for "
        "each image: the median of sums is not the sum of medians.",
        batch_note,
    ]
    systems, area = [], given.image_size**2
    kinds = {ONE: True, ONE + EVERY: False, ONE + SVD: True, FIVE: True}
    for name, shared in {**kinds, FIVE + EVERY: False}.items():
        trained = name.replace(EVERY, "")
        windows = Windows(all_settings[trained].scales, area, settings.rule)
        parts = timing.spp_parts(network, windows, photos, shared=shared)
        parts[FC] = timing.fc_part(program, loaded[trained].weights)
        parts[SUPPRESSION] = last
        systems.append(System(name, parts, ROUNDS * options.repeats))
        if name in (ONE, FIVE):
            notes.append(_distinct(name, network, windows, photos))
    rcnn = feature_settings(all_settings[RCNN], own)
    parts = timing.rcnn_parts(
        network, photos, context=rcnn["context"], batch_size=batch
    )
    parts[FC] = timing.fc_part(program, loaded[RCNN].weights)
    parts[SUPPRESSION] = last
    systems.append(System(RCNN, parts, options.repeats, warm_boxes=batch))
    proposing = _proposer(settings.proposals)
    if proposing:
        systems.append(System(PROPOSALS, {PROPOSALS: proposing}))
    times, _ = timing.measure(systems, photos)
    shared_by_all = times.pop(PROPOSALS, {})
    times = {name: {**shared_by_all, **seconds} for name, seconds in times.items()}
    whole, low = one.weights["fc"], loaded[ONE + SVD].weights["fc"]
    first, second = detectors[ONE + SVD].ranks
    notes.append(_saved(f"SVD of ranks {first} and {second}", whole, low, kept=True))
    return times, notes


def _photos(split: Any, count: int) -> list[Photo]:
    """Some images of a split that have proposals, spaced evenly over it."""
    usable = [number for number, boxes in enumerate(split.proposals) if len(boxes)]
    if not usable:
        raise ValueError(f"no image of split {split.source.split!r} has proposals")
    spaced = np.linspace(0, len(usable) - 1, min(count, len(usable))).astype(int)
    return [
        Photo(
            decode_image(split.source.records[usable[place]]["image"]),
            split.proposals[usable[place]],
        )
        for place in spaced
    ]


def _proposer(settings: ProposalSettings) -> Part | None:
    """What finds a photo's proposals; None where they come from a file."""
    if settings.method == "file":
        return None

    def propose(photo: Photo, _: Any) -> np.ndarray:
        return find_boxes(photo.image, settings)

    return propose


def _ranks(given: DetectionSetting, options: argparse.Namespace) -> tuple[int, int]:
    """The ranks that were given, or the paper preset's first, in proportion."""
    if options.fc_rank:
        return options.fc_rank[0], options.fc_rank[1]
    width = network_settings(Path(given.settings.network)).model.width
    first, second = (max(1, round(rank * width)) for rank in PAPER_RANKS[0])
    return first, second


def _batch(
    network: Convolutions, photos: Sequence[Photo], wanted: int | None
) -> tuple[int, str]:
    """R-CNN's batch size, and a note on it."""
    if wanted:
        return wanted, f"R-CNN's windows are convolved {wanted} at a time."
    count = round(np.mean([len(photo.boxes) for photo in photos]))
    batch, seconds = timing.fastest_batch(network, count)
    tried = ", ".join(f"{size}: {taken:.3g} s" for size, taken in seconds.items())
    return batch, (
        f"R-CNN's windows are convolved {batch} at a time, the fastest of (for {count} "
        f"windows) {tried}."
    )


def _distinct(
    name: str, network: Convolutions, windows: Windows, photos: Sequence[Photo]
) -> str:
    share = timing.distinct_share(network, windows, photos)
    return (
        f"{name}: {share:.1%} of the windows are distinct on the map; windows of the "
        "same cells go through pooling and fc once, but in rows that say otherwise."
    )


def _saved(name: str, whole: Any, low: Any, *, kept: bool = False) -> str:
    """A note on what a truncation saves, and how much of the layers it keeps."""
    before, after = multiplications(whole), multiplications(low)
    ratio = sum(after[n] for n in ("fc6", "fc7")) / sum(
        before[n] for n in ("fc6", "fc7")
    )
    text = f"{name} of fc6 and fc7 leave {ratio:.1%} of their multiplications"
    if kept:
        shares = spectrum_kept(whole, low)
        text += " and " + ", ".join(
            f"{share:.1%} of {layer}'s squared singular values"
            for layer, share in shares.items()
        )
    return text + "."


def _paper_photo(options: argparse.Namespace) -> tuple[Photo, float, str]:
    """A photograph with 2,000 windows, the seconds that finding them took, and a note.

    Selective search's, and random ones where it finds fewer.
    """
    if options.image:
        path = Path(options.image).expanduser()
        image, name = decode_image(path.read_bytes()), path.name
    else:
        name = "scikit-learn's china.jpg, its middle"
        whole = sklearn.datasets.load_sample_images().images[0]  # 427×640
        image = np.ascontiguousarray(whole[26:401, 70:570])  # as large as VOC's
    wanted = options.max_windows or 2000

    def propose(photo: Photo, _: Any) -> np.ndarray:
        return selective_search(photo.image, max_windows=wanted)

    photo = Photo(image, np.zeros((0, 4), np.float32))
    times, found = timing.measure(
        [System(PROPOSALS, {PROPOSALS: propose}, ROUNDS)], [photo]
    )
    boxes = found[PROPOSALS]
    missing = wanted - len(boxes)
    height, width = image.shape[:2]
    if missing:
        boxes = np.concatenate([boxes, _random_boxes(missing, height, width)])
    photo = Photo(image, boxes)
    note = (
        f"One image, {name}, {height}×{width} pixels; {wanted} windows, "
        f"{wanted - missing} of them by selective search"
        + (f", {missing} at random." if missing else ".")
        + " Random weights: times only. fc: fc6 and fc7, without SVMs."
    )
    return photo, times[PROPOSALS][PROPOSALS][0], note


def _random_boxes(count: int, height: int, width: int) -> np.ndarray:
    """Boxes with sides of 20 pixels or more, or of the whole image if it is smaller."""
    rng = np.random.default_rng(0)
    size = np.array([height, width])
    sides = rng.uniform(np.minimum(20, size), size, (count, 2))
    corners = rng.uniform(0, size - sides)
    return np.concatenate([corners, corners + sides], axis=1).astype(np.float32)


def _report(
    given: DetectionSetting,
    reports: dict[str, dict[int, Any]],
    times: Times,
    notes: Sequence[str],
) -> Path:
    names = (ONE, FIVE, RCNN, ONE + SVD, ONE + EVERY, FIVE + EVERY)
    rows = [_row(name, reports.get(name, {}), times) for name in names]
    columns = [c for c in PARTS if any(row.measured.get(c.name) for row in rows)]
    report = next(iter(reports[ONE].values()))
    proposals = report["proposals"]
    about_data = (
        f"Tested on {report['images']} images of {report['data']}, split "
        f"{report['split']}; {proposals['mean_proposals']:.0f} proposals an image, "
        f"recall at IoU 0.5 {proposals['recall']:.1%}. Pairs are detectors on the same "
        "network, at one seed."
    )
    same = (
        "Windows by themselves give the scores that shared ones do: mAP is that of the "
        "row without."
    )
    folder = write_report(
        given,
        NAME,
        title=TITLE,
        columns=[*PRECISIONS, *columns],
        rows=rows,
        claims=[
            Claim(
                f"{text}, 11 points",
                differences(
                    reports[better], reports[worse], itemgetter("map_11_point")
                ),
            )
            for text, (better, worse) in COMPARISONS.items()
        ],
        ratios=_ratios(times),
        notes=[about_data, *notes, *([same] if times else [])],
    )
    if times:
        _plot(folder, times, PARTS)
    return folder


def _row(name: str, reports: dict[int, Any], times: Times) -> Row:
    seconds = times.get(name, {})
    measured = dict(seconds)
    if EVERY not in name:
        measured[ELEVEN] = [report["map_11_point"] for report in reports.values()]
        measured[AREA] = [report["map_area"] for report in reports.values()]
    if seconds:
        measured[FEATURES] = _features(seconds)
    return Row(name, measured, PAPER.get(name, {}))


def _features(seconds: Seconds) -> list[float]:
    """The seconds of the whole feature computation, for each image."""
    return np.sum([seconds[p] for p in (CONVOLUTION, POOLING, FC)], axis=0).tolist()


def _ratios(times: Times) -> list[Ratio]:
    """R-CNN's seconds over those of every SPP-net."""
    if RCNN not in times:
        return []
    slow, found = times[RCNN], []
    for name in (ONE, FIVE):
        values = np.divide(slow[CONVOLUTION], times[name][CONVOLUTION]).tolist()
        paper = PAPER_RATIOS[name, CONVOLUTION]
        found.append(Ratio(f"Convolution, R-CNN over {name}", values, paper))
    for name, seconds in times.items():
        if name != RCNN:
            values = np.divide(_features(slow), _features(seconds)).tolist()
            text = f"Convolution, pooling and fc, R-CNN over {name}"
            found.append(Ratio(text, values, PAPER_RATIOS.get((name, FEATURES))))
    return found


def _plot(folder: Path, times: Times, columns: Sequence[Column]) -> None:
    rows = {
        name: {
            column.name: float(np.median(seconds[column.name]))
            for column in columns
            if seconds.get(column.name)
        }
        for name, seconds in times.items()
    }
    plot_times(rows, folder / "plot.png")


def _check(options: argparse.Namespace) -> None:
    """Raises ValueError for options that can't work, before anything is trained."""
    for name in ("timed_images", "repeats", "batch", "max_windows"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    if options.fc_rank and min(options.fc_rank) < 0:
        raise ValueError(
            f"--fc_rank must be two ranks from 0 on, got {options.fc_rank}"
        )


if __name__ == "__main__":
    run_detection(main, __doc__, add_options=add_options, on_paper=on_paper)
