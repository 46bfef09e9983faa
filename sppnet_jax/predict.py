"""Names what is in images of any size, with a trained SPP-net.

python -m sppnet_jax.predict --workdir=runs/digits a.jpg b.png
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from sppnet_jax import cli
from sppnet_jax.classification import views
from sppnet_jax.data.image_files import Files
from sppnet_jax.data.sources import Source

MAX_BUCKETS = 4  # programs that are compiled at most

_PICTURE = flags.DEFINE_string(
    "picture", "", "Also draws the images with their classes into this PNG file."
)


def main(argv: Sequence[str]) -> None:
    if not argv:
        raise ValueError(
            "give images: python -m sppnet_jax.predict --workdir=… a.jpg …"
        )
    config, workdir = cli.given_config(), cli.given_workdir()
    failed = predict_files(config, workdir, argv, _PICTURE.value)
    if failed:
        raise ValueError(f"{failed} of {len(argv)} files could not be read")


def predict_files(
    config: ConfigDict, workdir: Path, paths: Sequence[str], picture: str = ""
) -> int:
    """Prints the five best classes of each image; returns how many were unreadable.

    Each image keeps its aspect ratio and is scored whole, its shorter side at the
    `resize_side` of the run's config. A network without SPP sees the centre crop, the
    only size that it takes.
    """
    import numpy as np

    from sppnet_jax import from_config
    from sppnet_jax.classification import pictures as plots
    from sppnet_jax.data.images import decode_image
    from sppnet_jax.run import run_folder

    class_names = run_folder.load_training_data(workdir).class_names
    config.data.strict = False
    protocol = views.named_protocol(
        "full_image" if config.model.levels else "single",
        view=config.data.image_size,
        resize_side=config.data.resize_side,
        flip=False,
    )
    found, _ = from_config.score_split(
        config,
        workdir,
        Source(Files(paths), class_names, "files", "given"),
        protocol,
        loading=config.data,
        max_buckets=MAX_BUCKETS,
    )
    shown, failed = [], 0
    for path, scores, valid in zip(paths, found.scores, found.valid, strict=True):
        try:
            image = decode_image(Path(path).expanduser().read_bytes())
            if not valid:
                size = f"{image.shape[1]}×{image.shape[0]}"
                raise ValueError(f"it can't be resized and cropped at {size} pixels")
        except (OSError, ValueError) as error:
            print(f"{path}: can't be read: {error}")
            failed += 1
            continue
        best = np.argsort(-scores, kind="stable")[:5]
        print(f"{path} ({image.shape[1]}×{image.shape[0]} pixels)")
        for label in best:
            print(f"  {scores[label]:6.1%}  {class_names[label]}")
        if picture:
            name, probability = class_names[best[0]], float(scores[best[0]])
            shown.append(plots.Prediction(image, name, probability, label=None))
    if shown:
        print(f"picture: {plots.plot_predictions(shown, Path(picture))}")
    return failed


if __name__ == "__main__":
    cli.run(main, saved_config=True)
