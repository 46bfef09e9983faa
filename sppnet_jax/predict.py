r"""Names what is in images of any size, with a trained or a pretrained network.

python -m sppnet_jax.predict --workdir=runs/digits a.jpg b.png
python -m sppnet_jax.predict --trunk=efficientnet_lite0 photo.jpg
python -m sppnet_jax.predict --trunk=efficientnet_lite0 --windows \
    --picture=found.png photo.jpg

`--trunk` takes a network of ImageNet's 1,000 classes, with nothing trained. `--windows`
names parts of each image besides: the windows of selective search are pooled from one
map of it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from sppnet_jax import cli
from sppnet_jax.training.network_settings import (
    NetworkSettings,
    network_settings,
    published_settings,
)

if TYPE_CHECKING:
    from sppnet_jax.network.trained import Network

BEST = 5  # classes, and windows, that are printed for each image
_THUMBNAIL = 256  # shorter side of images in the picture, in pixels

_PICTURE = flags.DEFINE_string(
    "picture", "", "Also draws the images with their classes into this PNG file."
)
_WINDOWS = flags.DEFINE_bool(
    "windows", False, "Also names the windows of each image that are told best."
)


def main(argv: Sequence[str]) -> None:
    if not argv:
        raise ValueError(
            "give images: python -m sppnet_jax.predict --workdir=… a.jpg …"
        )
    settings = cli.given_settings(NetworkSettings)
    network = cli.given_network(settings)
    if not network.class_names:
        raise ValueError(
            "with other cuts, levels or head than its classifier was made for, a "
            "network scores no classes: leave those out, or take python -m "
            "sppnet_jax.features"
        )
    picture = Path(_PICTURE.value).expanduser() if _PICTURE.value else None
    show = show_windows if _WINDOWS.value else show_images
    failed = show(settings, network, argv, picture)
    if failed:
        raise ValueError(f"{failed} of {len(argv)} files could not be read")


def show_images(
    settings: NetworkSettings,
    network: "Network",
    paths: Sequence[str],
    picture: Path | None = None,
) -> int:
    """Prints the best classes of each image; returns how many were unreadable.

    Each image keeps its aspect ratio and is scored whole, its shorter side at the
    network's `resize_side`. A network without SPP sees the centre crop, the only size
    that it takes.
    """
    from sppnet_jax.buckets.whole_images import MAX_ASPECT
    from sppnet_jax.classification.pictures import Prediction, plot_predictions
    from sppnet_jax.classification.scores import score_images
    from sppnet_jax.data.images import resize_whole
    from sppnet_jax.data.photographs import read_images

    names, side = network.class_names, network.resize_side
    sizes, resized, thumbnails, errors = {}, {}, {}, {}
    for path, image in read_images(paths, settings.data.threads):
        try:
            if isinstance(image, Exception):
                raise image
            resized[path] = resize_whole(image, side, MAX_ASPECT)
            sizes[path] = image.shape[:2]
            if picture:
                thumbnails[path] = resize_whole(image, _THUMBNAIL, MAX_ASPECT)
        except (OSError, ValueError) as error:
            errors[path] = error
    scores = score_images(
        network, list(resized.values()), batch_size=settings.batch_size
    )
    found = dict(zip(resized, scores, strict=True))
    for path in paths:
        if path in errors:
            print(f"{path}: can't be read: {errors[path]}")
            continue
        height, width = sizes[path]
        print(f"{path} ({width}×{height} pixels)")
        for label in (-found[path]).argsort(kind="stable")[:BEST]:
            print(f"  {found[path][label]:6.1%}  {names[label]}")
    if picture and thumbnails:
        shown = [
            Prediction(
                image, names[found[path].argmax()], float(found[path].max()), label=None
            )
            for path, image in thumbnails.items()
        ]
        print(f"picture: {plot_predictions(shown, picture)}")
    return len([path for path in paths if path in errors])


def show_windows(
    settings: NetworkSettings,
    network: "Network",
    paths: Sequence[str],
    picture: Path | None = None,
) -> int:
    """Prints each image's classes and its best windows; returns how many failed."""
    from sppnet_jax.classification.scores import score_images
    from sppnet_jax.data.photographs import read_images
    from sppnet_jax.detection.pictures import draw_detections, save_image
    from sppnet_jax.detection.window_classes import classify_windows

    failed = 0
    for path, image in read_images(paths, settings.data.threads):
        if isinstance(image, Exception):
            print(f"{path}: can't be read: {image}")
            failed += 1
            continue
        (scores,) = score_images(network, [image])
        best = int(scores.argmax())
        names = network.class_names
        print(f"{path} ({image.shape[1]}×{image.shape[0]} pixels)")
        print(f"  {scores[best]:6.1%}  {names[best]}, the whole image")
        found = classify_windows(network, image, most=BEST)
        for box, label, score in zip(*found, strict=True):
            ymin, xmin, ymax, xmax = box
            print(
                f"  {score:6.1%}  {names[label]}, x {xmin:.0f} to {xmax:.0f}, "
                f"y {ymin:.0f} to {ymax:.0f}"
            )
        if picture:
            drawn = draw_detections(image, *found, names)
            file = picture
            if len(paths) > 1:
                number = list(paths).index(path) + 1
                file = picture.with_stem(f"{picture.stem}_{number}")
            print(f"  picture: {save_image(drawn, file)}")
    return failed


if __name__ == "__main__":
    cli.run(main, NetworkSettings, network_settings, published_settings)
