"""Names what is in images of any size, with a trained SPP-net.

python -m sppnet_jax.predict --workdir=runs/digits a.jpg b.png
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from sppnet_jax import cli
from sppnet_jax.training.network_settings import NetworkSettings, network_settings

BEST = 5  # classes that are printed for each image
_THUMBNAIL = 256  # shorter side of images in the picture, in pixels

_PICTURE = flags.DEFINE_string(
    "picture", "", "Also draws the images with their classes into this PNG file."
)


def main(argv: Sequence[str]) -> None:
    if not argv:
        raise ValueError(
            "give images: python -m sppnet_jax.predict --workdir=… a.jpg …"
        )
    settings, workdir = cli.given_settings(NetworkSettings), cli.given_workdir()
    picture = Path(_PICTURE.value).expanduser() if _PICTURE.value else None
    failed = predict_files(settings, workdir, argv, picture)
    if failed:
        raise ValueError(f"{failed} of {len(argv)} files could not be read")


def predict_files(
    settings: NetworkSettings,
    workdir: Path,
    paths: Sequence[str],
    picture: Path | None = None,
) -> int:
    """Prints the best classes of each image; returns how many were unreadable.

    Each image keeps its aspect ratio and is scored whole, its shorter side at the
    `resize_side` of the run's settings. A network without SPP sees the centre crop, the
    only size that it takes.
    """
    from sppnet_jax.buckets.whole_images import MAX_ASPECT
    from sppnet_jax.classification.scores import score_images
    from sppnet_jax.data.images import resize_whole
    from sppnet_jax.data.photographs import read_images
    from sppnet_jax.network.trained import load_network
    from sppnet_jax.run.settings import plain

    network = load_network(workdir, plain(settings))
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
        from sppnet_jax.classification.pictures import Prediction, plot_predictions

        shown = [
            Prediction(
                image, names[found[path].argmax()], float(found[path].max()), label=None
            )
            for path, image in thumbnails.items()
        ]
        print(f"picture: {plot_predictions(shown, picture)}")
    return len([path for path in paths if path in errors])


if __name__ == "__main__":
    cli.run(main, NetworkSettings, network_settings)
