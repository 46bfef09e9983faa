"""Tests a trained SPP-net, or several together, on a split of their data set.

python -m sppnet_jax.evaluate --workdir=runs/digits --protocol=single
python -m sppnet_jax.evaluate --workdir=runs/a,runs/b --protocol=multi_view_full
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from sppnet_jax import cli, saved_config
from sppnet_jax.classification import views

log = logging.getLogger(__name__)

_PROTOCOL = flags.DEFINE_enum(
    "protocol",
    "single",
    views.NAMES,
    "The views whose scores are averaged: single, the centre crop; ten_view, centre "
    "and corners, mirrored too; ten_view_map, the same from the map of the whole "
    "image; full_image; multi_view, 18 views at six scales; multi_view_full, and the "
    "whole image.",
)
_SCALES = flags.DEFINE_list(
    "scales", [], "Shorter sides in pixels, 224,256 for instance; else the protocol's."
)
_VIEWS = flags.DEFINE_list(
    "views", [], "Where views lie, center,top_left for instance; else the protocol's."
)
_FLIP = flags.DEFINE_bool(
    "flip",
    None,
    "Whether mirrored views count too. By default they do in protocols of several "
    "views, if the network was trained on mirrored images (config.data.flip).",
)
_BUCKETS = flags.DEFINE_integer(
    "buckets", 4, "Compiled programs for whole images, at most, for each scale."
)


def main(argv: Sequence[str]) -> None:
    if argv:
        raise ValueError(f"unexpected arguments: {' '.join(argv)}")
    config, workdirs = cli.given_config(), cli.given_workdirs()
    cli.join_processes()
    if _BUCKETS.value < 1:
        raise ValueError(f"--buckets must be at least 1, got {_BUCKETS.value}")
    evaluate_from_config(
        config,
        workdirs,
        _PROTOCOL.value,
        scales=[_whole_number(scale) for scale in _SCALES.value],
        positions=_VIEWS.value,
        flip=_FLIP.value,
        max_buckets=_BUCKETS.value,
    )


def evaluate_from_config(
    config: ConfigDict,
    workdirs: Sequence[Path],
    protocol_name: str,
    *,
    scales: Sequence[int] = (),
    positions: Sequence[str] = (),
    flip: bool | None = None,
    max_buckets: int = 4,
) -> dict[str, Any]:
    """Tests the newest checkpoints; prints the result, writes JSON and a picture.

    `config`: of the first of `workdirs`; its data is what all are tested on. The others
    bring their own models. Several networks average their softmax scores.
    """
    from sppnet_jax import from_config
    from sppnet_jax.classification import pictures as plots
    from sppnet_jax.classification.accuracy import mean_scores, summarize
    from sppnet_jax.data.broken import BrokenImages
    from sppnet_jax.run import files, parallel, run_folder

    trained_on = run_folder.load_training_data(workdirs[0])
    source = from_config.open_split(config, "test")
    several_views = protocol_name not in ("single", "full_image")
    configs, protocols = [], []  # all are checked before anything is computed
    for number, workdir in enumerate(workdirs):
        own = config if number == 0 else saved_config.get_config(str(workdir))
        from_config.check_classes(source, workdir)
        from_config.check_can_test(own, workdir, protocol_name)
        configs.append(own)
        protocols.append(
            views.named_protocol(
                protocol_name,
                view=own.data.image_size,
                resize_side=own.data.resize_side,
                flip=own.data.flip and several_views if flip is None else flip,
                scales=scales,
                positions=positions,
            )
        )
    from_config.check_training_data_is_unchanged(config, trained_on)
    broken = BrokenImages(source)
    sample = plots.Sample(len(source.records), size=24)
    networks = []
    for workdir, own, protocol in zip(workdirs, configs, protocols, strict=True):
        scores, tables = from_config.score_split(
            own,
            workdir,
            source,
            protocol,
            loading=config.data,
            max_buckets=max_buckets,
            on_example=lambda index, valid, image: (
                sample.add(index, image) if valid else broken.add(index)
            ),
        )
        networks.append(scores)
        for scale, table in zip(protocol.scales, tables, strict=False):
            log.info("shorter side %d\n%s", scale, table)
    broken.summarize()
    combined = mean_scores(networks)
    report = {
        "data": source.name,
        "split": source.split,
        "protocol": protocol_name,
        "workdirs": [str(workdir) for workdir in workdirs],
        "checkpoint_steps": [from_config.checkpoint_step(w) for w in workdirs],
        "scales": [protocol.scales for protocol in protocols],
        "positions": [protocol.positions for protocol in protocols],
        "flip": [protocol.flip for protocol in protocols],
        "views": float(combined.views[combined.valid].mean()),
        **summarize(combined),
    }
    if not parallel.is_first_process():
        return report
    changed = bool(scales or positions or flip is not None)
    named = result_name(protocol_name, len(workdirs), changed=changed)
    files.write_json(workdirs[0] / f"{named}.json", report)
    print(
        f"{protocol_name}: top-1 {_share(report, 'top1')}, top-5 "
        f"{_share(report, 'top5')} of {report['count']} images of {source.name}, split "
        f"{source.split}, {report['views']:.4g} views each"
        + (f" ({report['broken']} broken skipped)" if report["broken"] else "")
    )
    predictions = [
        plots.Prediction(
            image,
            trained_on.class_names[combined.scores[index].argmax()],
            float(combined.scores[index].max()),
            trained_on.class_names[combined.labels[index]],
        )
        for index, image in sample.images()
    ]
    picture = plots.plot_predictions(predictions, workdirs[0] / f"{named}.png")
    print(f"examples: {picture}")
    return report


def result_name(protocol_name: str, networks: int, *, changed: bool = False) -> str:
    """What the files of a result are called, without .json and .png.

    `networks`: how many were combined. `changed`: whether scales, views or flips were
    others than the protocol's own.
    """
    combined = f"_of_{networks}" if networks > 1 else ""
    return f"evaluate_{protocol_name}{combined}{'_custom' if changed else ''}"


def _share(report: dict[str, Any], name: str) -> str:
    low, high = report[f"{name}_interval"]
    return f"{report[name]:.2%} (95 %: {low:.1%} to {high:.1%})"


def _whole_number(text: str) -> int:
    if not text.strip().isdigit():
        raise ValueError(f"--scales takes whole numbers such as 224,256, got {text!r}")
    return int(text)


if __name__ == "__main__":
    cli.run(main, saved_config=True)
