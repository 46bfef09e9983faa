"""Tests a trained SPP-net, or several together, on a split of their data set.

python -m sppnet_jax.evaluate --workdir=runs/digits --protocol=single
python -m sppnet_jax.evaluate --workdir=runs/a,runs/b --protocol=multi_view_full

Several machines that share the folder share the images: --process_index=I
--process_count=N on each.
"""

from collections.abc import Sequence
from typing import Any

from absl import flags

from sppnet_jax import cli
from sppnet_jax.classification import views
from sppnet_jax.training.network_settings import NetworkSettings, network_settings

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
    cli.refuse_arguments(argv)
    settings, workdirs = cli.given_settings(NetworkSettings), cli.given_workdirs()
    share = cli.given_share()
    if _BUCKETS.value < 1:
        raise cli.UsageError(f"--buckets must be at least 1, got {_BUCKETS.value}")
    scales = [_whole_number(scale) for scale in _SCALES.value]
    from sppnet_jax.classification.evaluation import evaluate_networks, result_name

    name = _PROTOCOL.value

    def tell(report: dict[str, Any]) -> None:
        print(
            f"{name}: top-1 {_share(report, 'top1')}, top-5 {_share(report, 'top5')} "
            f"of {report['count']} images of {report['data']}, split "
            f"{report['split']}, {report['views']:.4g} views each"
            + (f" ({report['broken']} broken skipped)" if report["broken"] else ""),
            flush=True,
        )

    evaluate_networks(
        workdirs,
        name,
        settings=settings,
        scales=scales,
        positions=_VIEWS.value,
        flip=_FLIP.value,
        max_buckets=_BUCKETS.value,
        share=share,
        tell=tell,
    )
    share.tell_end()
    if not share.is_first:
        return
    changed = bool(scales or _VIEWS.value or _FLIP.value is not None)
    picture = f"{result_name(name, len(workdirs), changed=changed)}.png"
    print(f"examples: {workdirs[0] / picture}")


def _share(report: dict[str, Any], name: str) -> str:
    low, high = report[f"{name}_interval"]
    return f"{report[name]:.2%} (95 %: {low:.1%} to {high:.1%})"


def _whole_number(text: str) -> int:
    if not text.strip().isdigit():
        raise cli.UsageError(
            f"--scales takes whole numbers such as 224,256, got {text!r}"
        )
    return int(text)


if __name__ == "__main__":
    cli.run(main, NetworkSettings, network_settings)
