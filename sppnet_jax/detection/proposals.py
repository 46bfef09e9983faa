"""The proposals of a data set's images: found once and kept, or read from a file.

`propose` finds them in parallel and keeps those of an image as soon as they are there,
in FOLDER/SETTINGS/IMAGE.npy, named by hashes of the settings and of the image's bytes.
A file is whole or not there: a killed run loses what was under way, several processes
can use one folder, and an image that two splits share is searched once. The workers are
threads: OpenCV releases Python's lock while it searches.

Proposals are a list, one float32 [N, 4] for each record of a source: half-open boxes
(ymin, xmin, ymax, xmax) in pixels of the decoded image, the most promising first.
"""

import hashlib
import json
import logging
import math
import os
import zipfile
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np

from sppnet_jax.data.broken import BrokenImages
from sppnet_jax.data.images import READING, decode_part, image_size
from sppnet_jax.data.sources import Objects, Source
from sppnet_jax.detection.boxes import clip_boxes, iou
from sppnet_jax.detection.proposers import (
    MAX_PIXELS,
    edge_boxes,
    load_edge_model,
    selective_search,
)
from sppnet_jax.run.files import read_array, whole_file, write_array
from sppnet_jax.run.progress import progress_bar
from sppnet_jax.run.settings import at_least, between, helpers, one_of, pixels
from sppnet_jax.run.shares import ALONE, Share

log = logging.getLogger(__name__)

NO_COLOUR = "selective_search_no_colour"
METHODS = ("selective_search", NO_COLOUR, "edge_boxes", "file")
# Raise this when the same settings give other boxes than before.
_VERSION = 1
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff")
_MAX_NAMED = 5


class ProposalSettings(NamedTuple):
    """How to find proposals; see `selective_search` and `edge_boxes`.

    `method`: "selective_search" or, faster, "selective_search_no_colour", which read
    `width` (0: images' own), `max_pixels`, `min_side` and `seed`; "edge_boxes", which
    reads `model`, the path of its model; or "file", which takes them from `file`, and
    `test_file` for the test split ("": the same). `max_windows`: of an image.
    `workers`: threads that search, several in one image where images are fewer; 0 is
    one for each core.
    """

    method: Annotated[str, one_of(METHODS)] = "selective_search"
    max_windows: Annotated[int, at_least(1)] = 2000
    width: Annotated[int, pixels(0)] = 500
    max_pixels: Annotated[int, between(1, MAX_PIXELS + 1)] = MAX_PIXELS
    min_side: Annotated[int, at_least(1)] = 20
    seed: Annotated[int, between(0, 2**31)] = 0
    workers: Annotated[int, helpers()] = 0
    file: str = ""
    test_file: str = ""
    model: str = ""

    def check(self) -> None:
        """Raises ValueError for settings that don't fit together."""
        if self.method == "file" and not self.file:
            raise ValueError("give the file of boxes: --config.proposals.file=FILE")
        if self.method == "edge_boxes" and not self.model:
            raise ValueError(
                "EdgeBoxes needs its structured-edge model: --config.proposals.model="
                "model.yml.gz (opencv_extra has it)"
            )


def propose(
    source: Source,
    settings: ProposalSettings,
    folder: str | Path,
    share: Share = ALONE,
) -> list[np.ndarray]:
    """The proposals of every record of a source, from the folder or found now.

    `folder`: where proposals are kept, those of other data sets and settings too.
    `share`: of several processes that find them together.

    Returns: a list of float32 [N, 4], one for each record; empty for an image that
    can't be decoded, which the log names and the next run tries again.
    Raises: FileNotFoundError for a missing model of EdgeBoxes; OSError for a folder
    that can't be used; RuntimeError naming the image where searching fails.
    """
    folder = Path(folder) / hashlib.sha256(settings_key(settings).encode()).hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    first: dict[Path, int] = {}
    for index in range(len(source.records)):
        digest = hashlib.sha256(source.records[index]["image"]).hexdigest()
        files.append(folder / f"{digest}.npy")
        first.setdefault(files[-1], index)
    if not all(file.exists() for file in first):
        _find_missing(source, settings, first, share)
    broken = BrokenImages(source)
    for index in (index for index, file in enumerate(files) if not file.exists()):
        broken.add(index)
    broken.summarize()
    none = np.zeros((0, 4), np.float32)
    return [read_array(file) if file.exists() else none for file in files]


def find_boxes(
    image: np.ndarray, settings: ProposalSettings, *, threads: int | None = None
) -> np.ndarray:
    """The proposals of one image, uint8 [height, width, 3]: float32 [N, 4].

    `threads`: that search it; 0 is one for each core. By default the settings'
    `workers`.

    Raises: ValueError where they are from a file.
    """
    if settings.method == "file":
        raise ValueError(
            "this detector was trained on proposals from a file, which has none for "
            "new images: give --config.proposals.method=selective_search"
        )
    if settings.method == "edge_boxes":
        return edge_boxes(image, settings.model, max_windows=settings.max_windows)
    return selective_search(
        image,
        width=settings.width,
        max_pixels=settings.max_pixels,
        min_side=settings.min_side,
        max_windows=settings.max_windows,
        seed=settings.seed,
        threads=settings.workers if threads is None else threads,
        colour=settings.method != NO_COLOUR,
    )


def searched_side(settings: ProposalSettings) -> float:
    """What the shorter side of an image that is searched is at most, in pixels.

    See `images.decode_part`. EdgeBoxes looks at every pixel of an image.
    """
    if settings.method not in ("selective_search", NO_COLOUR):
        return math.inf
    most = math.sqrt(settings.max_pixels)
    return min(settings.width, most) if settings.width else most


def settings_key(settings: ProposalSettings) -> str:
    """The settings that decide about the boxes, as canonical JSON.

    The model of EdgeBoxes is in it by the hash of its bytes.

    Raises: FileNotFoundError for a missing model, ValueError for a file that is none.
    """
    chosen: dict[str, Any] = {
        "method": settings.method,
        "max_windows": settings.max_windows,
        "version": _VERSION,
        "reading": READING,
    }
    if settings.method == "edge_boxes":
        load_edge_model(settings.model)
        content = Path(settings.model).read_bytes()
        chosen["edge_model"] = hashlib.sha256(content).hexdigest()
    else:
        names = ("width", "max_pixels", "min_side", "seed")
        chosen |= {name: getattr(settings, name) for name in names}
    return json.dumps(chosen, sort_keys=True)


def save_proposals(
    path: str | Path, names: Sequence[str], proposals: Sequence[np.ndarray]
) -> None:
    """Writes proposals to an `.npz` file that `load_proposals` reads.

    It holds `names`, str [images], the images' file names, with or without their
    suffix; `counts`, int [images], the number of boxes of each; and `boxes`, float32
    [sum of counts, 4], those of the first image first, half-open (ymin, xmin, ymax,
    xmax) in pixels, 0-based.

    Raises: ValueError for arrays that don't fit together, and for names that repeat.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"proposals are written to .npz files, not to {str(path)!r}")
    if len(names) != len(proposals):
        raise ValueError(
            f"{len(names)} names, but proposals of {len(proposals)} images"
        )
    _check_distinct(names, "the names")
    for name, boxes in zip(names, proposals, strict=True):
        _check_boxes(boxes, f"the proposals of {name!r}")
    arrays = [np.asarray(boxes, np.float32).reshape(-1, 4) for boxes in proposals]
    with whole_file(path) as file:
        np.savez_compressed(
            file,
            names=np.array(names, str),
            counts=np.array([len(boxes) for boxes in arrays], np.int64),
            boxes=np.concatenate([np.zeros((0, 4), np.float32), *arrays]),
        )


def load_proposals(path: str | Path, source: Source) -> list[np.ndarray]:
    """Reads proposals of a source's images from a file, clipped to their image.

    `path`: an `.npz` as `save_proposals` documents it; or a `.mat` of the R-CNN
    releases, such as `selective_search_data/voc_2007_trainval.mat`: a cell `images` of
    names, and a cell `boxes` of [N, 4], 1-based and inclusive (ymin, xmin, ymax, xmax).
    `source`: its records are matched by name, with or without their suffix.

    Returns: a list of float32 [N, 4], one for each record; boxes wholly outside of
    their image are left out, and all of an image that can't be opened.
    Raises: FileNotFoundError if there is no file; ValueError for a file of another
    kind, images without proposals, boxes that are none, and an image all of whose boxes
    are outside.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of proposals {str(path)!r}")
    readers = {".npz": _read_npz, ".mat": _read_mat}
    if path.suffix not in readers:
        raise ValueError(f"proposals are read from .npz and .mat, not {str(path)!r}")
    names, boxes = readers[path.suffix](path)
    _check_distinct(names, str(path))
    rows = _match(source, names, path)
    broken = BrokenImages(source)
    proposals, outside = [], 0
    for index, row in enumerate(rows):
        record = source.records[index]
        what = f"{str(path)!r}: the proposals of {record['name']!r}"
        _check_boxes(boxes[row], what)
        try:
            height, width = image_size(record["image"])
        except ValueError:
            broken.add(index)
            proposals.append(np.zeros((0, 4), np.float32))
            continue
        clipped = clip_boxes(np.asarray(boxes[row], np.float32), height, width)
        inside = (clipped[:, :2] < clipped[:, 2:]).all(axis=1)
        if len(clipped) and not inside.any():
            raise ValueError(
                f"{what} are all outside of its {height}×{width} pixels, first "
                f"{boxes[row][0].tolist()}; they may be of another image, or in "
                "another order of coordinates than (ymin, xmin, ymax, xmax)"
            )
        outside += int((~inside).sum())
        proposals.append(np.asarray(clipped[inside], np.float32))
    if outside:
        log.warning("%s: left out %d boxes outside of their image", path, outside)
    broken.summarize()
    return proposals


def proposal_recall(
    proposals: Sequence[np.ndarray],
    objects: Sequence[Objects],
    num_classes: int,
    *,
    threshold: float = 0.5,
) -> dict[str, Any]:
    """The share of the objects that some proposal of their image overlaps well.

    Difficult objects are not counted.

    `proposals`: float [N, 4] for each image. `objects`: those of each image.
    `threshold`: the IoU from which on an object is found, 0–1.

    Returns: plain values for JSON: "recall", over all objects, and "class_recall", None
    without any; "objects" and "found", numbers; "class_objects"; "mean_proposals" of an
    image; "threshold".
    Raises: ValueError for lists of different lengths, and labels out of range.
    """
    if len(proposals) != len(objects):
        raise ValueError(
            f"proposals of {len(proposals)} images, but objects of {len(objects)}"
        )
    counts, found = np.zeros(num_classes, int), np.zeros(num_classes, int)
    for index, (boxes, those) in enumerate(zip(proposals, objects, strict=True)):
        counted = ~np.asarray(those.difficult, bool)
        labels = np.asarray(those.labels, int)[counted]
        if ((labels < 0) | (labels >= num_classes)).any():
            raise ValueError(
                f"image {index} has labels {labels.tolist()}, outside of "
                f"0…{num_classes - 1}"
            )
        counts += np.bincount(labels, minlength=num_classes)
        overlaps = iou(np.reshape(those.boxes, (-1, 4))[counted], boxes)
        hits = overlaps.max(axis=1, initial=-1) >= threshold
        found += np.bincount(labels[hits], minlength=num_classes)
    total, hit = int(counts.sum()), int(found.sum())
    pairs = zip(found.tolist(), counts.tolist(), strict=True)
    return {
        "recall": hit / total if total else None,
        "class_recall": [own / count if count else None for own, count in pairs],
        "objects": total,
        "found": hit,
        "class_objects": counts.tolist(),
        "mean_proposals": sum(map(len, proposals)) / max(len(proposals), 1),
        "threshold": threshold,
    }


def _find_missing(
    source: Source, settings: ProposalSettings, files: Mapping[Path, int], share: Share
) -> None:
    """Finds the proposals of records without a file, and writes each at once."""
    workers = settings.workers or os.cpu_count() or 1
    paths, records = list(files), list(files.values())
    missing = sum(not path.exists() for path in paths)
    threads = -(-workers // missing) if missing else 1

    def find(number: int) -> None:
        index = records[number]
        record = source.records[index]
        try:
            read = decode_part(record["image"], searched_side(settings))
        except ValueError:
            return  # `propose` names it
        try:
            found = find_boxes(read.pixels, settings, threads=threads)
            boxes = read.in_whole(found)
        except Exception as error:
            raise RuntimeError(
                f"no proposals could be found in {record['name']!r}, record {index} of "
                f"split {source.split!r} of {source.name}: {error!r}. What was found "
                "in other images is kept"
            ) from error
        write_array(paths[number], boxes.astype(np.float32))

    known = len(source.records) - missing
    with (
        progress_bar("proposals", len(source.records), done=known) as bar,
        ThreadPoolExecutor(workers) as pool,
    ):
        running: set[Future[None]] = set()

        def finish(most: int) -> None:
            nonlocal running
            while len(running) > most:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                    bar.update()

        try:
            for number in share.missing(paths, "proposals"):
                running.add(pool.submit(find, number))
                finish(workers)
            finish(0)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _read_npz(path: Path) -> tuple[list[str], list[np.ndarray]]:
    wanted = ("names", "boxes", "counts")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in wanted if name in file}
    except (ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"can't read proposals from {str(path)!r}: {error}") from error
    names, boxes, counts = _chosen(path, arrays, wanted)
    fits = (
        names.ndim == 1
        and names.dtype.kind == "U"
        and counts.shape == names.shape
        and counts.dtype.kind in "iu"
        and (counts >= 0).all()
        and boxes.shape == (counts.sum(), 4)
        and boxes.dtype.kind in "fiu"
    )
    if not fits:
        raise ValueError(
            f"{str(path)!r} must hold names, str [images], counts, int [images], and "
            f"boxes [sum of counts, 4], but names are {names.dtype} {names.shape}, "
            f"counts {counts.dtype} {counts.shape} with sum {counts.sum()}, boxes "
            f"{boxes.shape}"
        )
    return names.tolist(), np.split(boxes, np.cumsum(counts)[:-1])


def _read_mat(path: Path) -> tuple[list[str], list[np.ndarray]]:
    # Here, not above: a start of a detector has no need of it, and it takes a while.
    import scipy.io
    from scipy.io.matlab import MatReadError

    try:
        content = scipy.io.loadmat(path, variable_names=("images", "boxes"))
    except NotImplementedError as error:
        raise ValueError(
            f"{str(path)!r} is a MATLAB 7.3 file, which SciPy can't read; save it in "
            "MATLAB with the option '-v7'"
        ) from error
    except (ValueError, TypeError, OSError, MatReadError) as error:
        raise ValueError(f"can't read proposals from {str(path)!r}: {error}") from error
    images, cells = (
        part.ravel() for part in _chosen(path, content, ("images", "boxes"))
    )
    if len(images) != len(cells) or {images.dtype, cells.dtype} != {np.dtype(object)}:
        raise ValueError(
            f"{str(path)!r} must hold cells `images` and `boxes` of the same length, "
            f"but has {images.dtype} {images.shape} and {cells.dtype} {cells.shape}"
        )
    names = [str(np.squeeze(name)) for name in images]
    boxes = []
    for name, inclusive in zip(names, cells, strict=True):
        inclusive = inclusive.astype(np.float64) if inclusive.size else np.zeros((0, 4))
        if inclusive.ndim != 2 or inclusive.shape[1] != 4:
            raise ValueError(
                f"{str(path)!r}: the boxes of {name!r} must be [N, 4], got "
                f"{list(inclusive.shape)}"
            )
        boxes.append(inclusive - [1, 1, 0, 0])
    return names, boxes


def _chosen(path: Path, arrays: Mapping[str, Any], wanted: Sequence[str]) -> list[Any]:
    absent = sorted(set(wanted) - set(arrays))
    if absent:
        raise ValueError(f"{str(path)!r} holds no proposals: it lacks {absent}")
    return [arrays[name] for name in wanted]


def _check_distinct(names: Sequence[str], where: str) -> None:
    unique, counts = np.unique(np.array(names, str), return_counts=True)
    if (counts > 1).any():
        repeated = unique[counts > 1][:_MAX_NAMED].tolist()
        raise ValueError(f"{where}: images come more than once, such as {repeated}")


def _check_boxes(boxes: np.ndarray, what: str) -> None:
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"{what} must be [N, 4], got {list(boxes.shape)}")
    for wrong, reason in (
        (~np.isfinite(boxes).all(axis=1), "are not finite"),
        ((boxes[:, :2] >= boxes[:, 2:]).any(axis=1), "end before they begin"),
    ):
        if wrong.any():
            first = int(wrong.argmax())
            raise ValueError(
                f"{what} {reason}, first in row {first}: {boxes[first].tolist()} as "
                "half-open (ymin, xmin, ymax, xmax)"
            )


def _match(source: Source, names: Sequence[str], path: Path) -> list[int]:
    """For each record the row of its name; by the name without suffix if need be."""
    exact = {name: row for row, name in enumerate(names)}
    without: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        without.setdefault(_without_suffix(name), []).append(row)
    rows, missing = [], []
    for index in range(len(source.records)):
        name = source.records[index]["name"]
        candidates = [exact[name]] if name in exact else []
        candidates = candidates or without.get(_without_suffix(name), [])
        if len(candidates) > 1:
            several = [names[row] for row in candidates]
            raise ValueError(f"{str(path)!r}: {name!r} may be any of {several}")
        if not candidates:
            missing.append(name)
        rows += candidates
    if missing:
        raise ValueError(
            f"{str(path)!r} has no proposals for {len(missing)} of the "
            f"{len(source.records)} images in split {source.split!r} of {source.name}, "
            f"such as {missing[:_MAX_NAMED]}; it has {len(names)} images, such as "
            f"{list(names[:_MAX_NAMED])}"
        )
    return rows


def _without_suffix(name: str) -> str:
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in _IMAGE_SUFFIXES else name
