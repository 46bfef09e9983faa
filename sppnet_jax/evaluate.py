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
    config, workdir = cli.given_or_saved_config(), cli.given_workdir()
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

    parallel.check_batch_size(config.batch_size)
    class_names = run_folder.load_class_names(workdir)
    source = from_config.open_split(config, "test")
    if source.class_names != class_names:
        raise ValueError(
            f"{source.name!r} has the classes {_listed(source.class_names)}, the run "
            f"in {workdir} was trained on {_listed(class_names)}"
        )
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
        total=len(source.records),
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
    print(
        f"{protocol}: top-1 {result['top1']:.2%}, top-5 {result['top5']:.2%} "
        f"of {result['count']} images of {source.name}, split {source.split}"
        + (f" ({result['broken']} broken skipped)" if result["broken"] else "")
    )
    print(f"examples: {picture}")
    return report


def _listed(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:5])
    return f"{shown}, … ({len(names)})" if len(names) > 5 else shown


if __name__ == "__main__":
    cli.run(main)
