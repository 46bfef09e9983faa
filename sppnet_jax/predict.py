r"""Names what is in images of any size, with a trained or a pretrained network.

python -m sppnet_jax.predict --workdir=runs/digits a.jpg FOLDER
python -m sppnet_jax.predict --trunk=efficientnet_lite0 photo.jpg
python -m sppnet_jax.predict --trunk=efficientnet_lite0 --windows \
    --picture=found.png photo.jpg

`--trunk` takes a network of ImageNet's 1,000 classes, with nothing trained. `--windows`
names parts of each image besides: the windows of selective search are pooled from one
map of it.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from sppnet_jax import cli
from sppnet_jax.run.files import all_tried, check_can_write
from sppnet_jax.training.network_settings import (
    NetworkSettings,
    network_settings,
    published_settings,
)

if TYPE_CHECKING:
    import numpy as np

    from sppnet_jax.network.trained import Network

log = logging.getLogger(__name__)

BEST = 5  # classes, and windows, that are printed for each image
# Of what is written of a class, and of a window.
COLUMNS = ("label", "score")
SIDES = ("ymin", "xmin", "ymax", "xmax")
_THUMBNAIL = 256  # shorter side of images in the picture, in pixels
_MOST_DRAWN = 64  # images in the picture: they are in memory together

_PICTURE = flags.DEFINE_string(
    "picture", "", "Also draws the images with their classes into this PNG file."
)
_WINDOWS = flags.DEFINE_bool(
    "windows", False, "Also names the windows of each image that are told best."
)
flags.declare_key_flag(cli.OUT.name)


def main(argv: Sequence[str]) -> None:
    if not argv:
        raise cli.UsageError(
            "give images: python -m sppnet_jax.predict --workdir=… a.jpg …"
        )
    settings = cli.given_settings(NetworkSettings)
    photos, out = cli.given_photos(argv), cli.given_out()
    picture = Path(_PICTURE.value).expanduser() if _PICTURE.value else None
    if picture:
        check_can_write(picture, (".png", ".jpg", ".jpeg"))
        there = [photo for photo in photos if picture.exists() and Path(photo).exists()]
        if any(picture.samefile(photo) for photo in there):
            raise cli.UsageError(
                f"--picture={picture} is one of the photographs: give another file"
            )
    network = cli.given_network(settings)
    if not network.class_names:
        raise ValueError(
            "with other cuts, levels or head than its classifier was made for, a "
            "network scores no classes: leave those out, or take python -m "
            "sppnet_jax.features"
        )
    show = show_windows if _WINDOWS.value else show_images
    failed = show(settings, network, photos, picture, out)
    if failed:
        raise ValueError(f"{failed} of {len(photos)} files could not be read")


def show_images(
    settings: NetworkSettings,
    network: "Network",
    paths: Sequence[str],
    picture: Path | None = None,
    out: Path | None = None,
) -> int:
    """Prints the best classes of each image; returns how many were unreadable.

    Each image keeps its aspect ratio and is scored whole, its shorter side at the
    network's `resize_side`. A network without SPP sees the centre crop, the only size
    that it takes. `picture`: of the first 64. `out`: see `photo_results`.
    """
    from sppnet_jax.buckets.whole_images import MAX_ASPECT
    from sppnet_jax.classification.image_scores import image_scorer
    from sppnet_jax.data.images import resize_whole
    from sppnet_jax.data.photographs import read_images
    from sppnet_jax.run.photo_results import photo_results

    names, score, failed = network.class_names, image_scorer(network), 0
    side = network.resize_side
    shown: list[Any] = []
    needed = max(side, _THUMBNAIL) if picture else side
    with all_tried() as attempt, photo_results(out, COLUMNS) as write:
        for path, read in read_images(paths, settings.data.threads, needed):
            if isinstance(read, Exception):
                failed += 1
                attempt(write, _unread(path, read))
                continue
            pixels, size = read
            scores = score(resize_whole(pixels, side, MAX_ASPECT, size))
            attempt(write, _tell(path, size, names, scores))
            if picture and len(shown) < _MOST_DRAWN:
                best = int(scores.argmax())
                small = resize_whole(pixels, _THUMBNAIL, MAX_ASPECT, size)
                shown.append((small, names[best], float(scores[best]), None))
    if picture and shown:
        from sppnet_jax.classification.pictures import Prediction, plot_predictions

        drawn = [Prediction(*one) for one in shown]
        print(f"picture: {plot_predictions(drawn, picture)}")
        if len(paths) - failed > len(shown):
            log.info("the picture shows the first %d", len(shown))
    return failed


def show_windows(
    settings: NetworkSettings,
    network: "Network",
    paths: Sequence[str],
    picture: Path | None = None,
    out: Path | None = None,
) -> int:
    """Prints each image's classes and its best windows; returns how many failed.

    `picture`: of each, with its number where there are several. `out`: see
    `photo_results`.
    """
    import numpy as np

    from sppnet_jax.buckets.whole_images import MAX_ASPECT
    from sppnet_jax.classification.image_scores import image_scorer
    from sppnet_jax.data.images import resize_whole
    from sppnet_jax.data.photographs import read_images
    from sppnet_jax.detection.pictures import draw_detections, save_image
    from sppnet_jax.detection.proposals import ProposalSettings, searched_side
    from sppnet_jax.detection.window_classes import classify_windows
    from sppnet_jax.run.photo_results import photo_results

    names, score, failed = network.class_names, image_scorer(network), 0
    side = network.resize_side
    with all_tried() as attempt, photo_results(out, (*COLUMNS, *SIDES)) as write:
        needed = max(2 * side, searched_side(ProposalSettings()))
        images = read_images(paths, settings.data.threads, needed)
        for number, (path, read) in enumerate(images, start=1):
            if isinstance(read, Exception):
                failed += 1
                attempt(write, _unread(path, read))
                continue
            image, size = read
            scores = score(resize_whole(image, side, MAX_ASPECT, size))
            told = _tell(path, size, names, scores, best=1)
            found = classify_windows(network, image, most=BEST)
            whole = found._replace(boxes=read.in_whole(found.boxes))
            for box, label, value in zip(*whole, strict=True):
                sides = ymin, xmin, ymax, xmax = [round(float(edge), 2) for edge in box]
                print(
                    f"  {value:6.1%}  {names[label]}, x {xmin:.0f} to {xmax:.0f}, "
                    f"y {ymin:.0f} to {ymax:.0f}"
                )
                window = dict(zip(SIDES, sides, strict=True))
                told["found"].append({**_row(names[label], value), **window})
            attempt(write, told)
            if picture:
                # A thousand classes have too few colours: those here get the first.
                shown, own = np.unique(found.labels, return_inverse=True)
                few = [names[label] for label in shown]
                drawn = draw_detections(image, found.boxes, own, found.scores, few)
                file = picture
                if len(paths) > 1:
                    file = picture.with_stem(f"{picture.stem}_{number}")
                saved = attempt(save_image, drawn, file)
                print(f"  picture: {saved or 'not written'}")
    return failed


def _tell(
    path: str,
    size: tuple[int, int],
    names: Sequence[str],
    scores: "np.ndarray",
    best: int = BEST,
) -> dict[str, Any]:
    """Prints an image's best classes, and gives them as `photo_results` writes them."""
    height, width = size
    print(f"{path} ({width}×{height} pixels)")
    ranked = (-scores).argsort(kind="stable")[:best]
    for label in ranked:
        whole = ", the whole image" if best == 1 else ""
        print(f"  {scores[label]:6.1%}  {names[label]}{whole}")
    found = [_row(names[label], scores[label]) for label in ranked]
    return {"path": path, "width": width, "height": height, "found": found}


def _row(name: str, score: Any) -> dict[str, Any]:
    return dict(zip(COLUMNS, (name, round(float(score), 6)), strict=True))


def _unread(path: str, error: Exception) -> dict[str, Any]:
    """Prints that an image can't be read, and gives it as `photo_results` writes it."""
    print(f"{path}: can't be read: {error}")
    return {"path": path, "error": str(error)}


if __name__ == "__main__":
    cli.run(main, NetworkSettings, network_settings, published_settings)
