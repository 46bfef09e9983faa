"""Names what is in images of any size, with a trained SPP-net.

python -m sppnet_jax.predict --workdir=runs/digits a.jpg b.png
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from sppnet_jax import cli

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
    `resize_side` of the run's config.
    """
    import numpy as np

    from sppnet_jax import from_config, plots, run_folder
    from sppnet_jax.classification.full_image import make_image_scorer
    from sppnet_jax.data.images import decode_image

    class_names = run_folder.load_training_data(workdir).class_names
    model, params = from_config.load_model(config, workdir, len(class_names))
    score = make_image_scorer(
        model,
        params,
        from_config.make_preprocessing(config, workdir),
        resize_side=config.data.resize_side,
    )
    shown, failed = [], 0
    for path in paths:
        try:
            image = decode_image(Path(path).expanduser().read_bytes())
            scores = score(image)
        except (OSError, ValueError) as error:
            print(f"{path}: can't be read: {error}")
            failed += 1
            continue
        best = np.argsort(-scores, kind="stable")[:5]
        print(f"{path} ({image.shape[1]}×{image.shape[0]} pixels)")
        for label in best:
            print(f"  {scores[label]:6.1%}  {class_names[label]}")
        shown.append(
            plots.Prediction(
                image, class_names[best[0]], float(scores[best[0]]), label=None
            )
        )
    if picture and shown:
        print(f"picture: {plots.plot_predictions(shown, Path(picture))}")
    return failed


if __name__ == "__main__":
    cli.run(main, saved_config=True)
