"""Tests a trained SPP-net on a split of its data set.

python -m sppnet_jax.evaluate --workdir=runs/digits --protocol=single
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from sppnet_jax import cli

PROTOCOLS = ("single",)
_PROTOCOL = flags.DEFINE_enum(
    "protocol", "single", PROTOCOLS, "How an image is scored: single, the centre crop."
)


def main(argv: Sequence[str]) -> None:
    if argv:
        raise ValueError(f"unexpected arguments: {' '.join(argv)}")
    config, workdir = cli.given_config(), cli.given_workdir()
    cli.join_processes()
    evaluate_from_config(config, workdir, _PROTOCOL.value)


def evaluate_from_config(
    config: ConfigDict, workdir: Path, protocol: str
) -> dict[str, Any]:
    """Tests the newest checkpoint; prints the result, writes JSON and a picture."""
    import numpy as np

    from sppnet_jax import from_config, parallel, plots, run_folder
    from sppnet_jax.classification.evaluate import Sample, count_correct
    from sppnet_jax.classification.step import make_test_step
    from sppnet_jax.data.broken import BrokenImages
    from sppnet_jax.data.pipeline import Example

    trained_on = run_folder.load_training_data(workdir)
    class_names = trained_on.class_names
    source = from_config.open_split(config, "test")
    if source.class_names != class_names:
        raise ValueError(
            f"{source.name!r} has the {len(source.class_names)} classes "
            f"{', '.join(source.class_names[:5])} …; the run in {workdir} was trained "
            f"on {trained_on}"
        )
    from_config.check_training_data_is_unchanged(config, trained_on)
    model, params = from_config.load_model(config, workdir, len(class_names))
    preprocessing = from_config.make_preprocessing(config, workdir)
    broken = BrokenImages(source)
    sample = Sample(len(source.records), size=24)

    def on_batch(batch: Example, scores: np.ndarray) -> None:
        broken.report(batch)
        sample.add(batch, scores)

    result = count_correct(
        make_test_step(model, preprocessing),
        parallel.replicate(params),
        from_config.make_eval_batches(config, source),
        records=len(source.records),
        show_progress=True,
        on_batch=on_batch,
    )
    broken.summarize()
    report = {
        "data": source.name,
        "split": source.split,
        "protocol": protocol,
        **result,
    }
    if not parallel.is_first_process():
        return report
    (workdir / f"evaluate_{protocol}.json").write_text(json.dumps(report, indent=2))
    print(
        f"{protocol}: top-1 {result['top1']:.2%}, top-5 {result['top5']:.2%} "
        f"of {result['count']} images of {source.name}, split {source.split}"
        + (f" ({result['broken']} broken skipped)" if result["broken"] else "")
    )
    predictions = [
        plots.Prediction(
            example.image,
            class_names[example.scores.argmax()],
            float(example.scores.max()),
            class_names[example.label],
        )
        for example in sample.examples()
    ]
    picture = plots.plot_predictions(predictions, workdir / f"evaluate_{protocol}.png")
    print(f"examples: {picture}")
    return report


if __name__ == "__main__":
    cli.run(main, saved_config=True)
