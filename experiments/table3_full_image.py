"""Table 3: is the whole image, at its own aspect ratio, better than its centre crop?

    python -m experiments.table3_full_image --preset=digits

Tests ZF-5 and Overfeat-7, trained at one size and at two, with a single view: the
centre crop, then the full image at the same shorter side.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

from experiments.report import Claim, network_rows, write_network_report
from experiments.runs import (
    NetworkRecipe,
    Setting,
    diverged,
    network_test,
    networks_of,
)
from experiments.setting import run

NAME = "table3_full_image"
COLUMNS = ("top-1 error, crop", "top-1 error, full image")

# ImageNet 2012 validation, a single view.
PAPER = {
    NetworkRecipe("zf5"): (0.3801, 0.3755),
    NetworkRecipe("zf5", training="multi"): (0.3757, 0.3707),
    NetworkRecipe("overfeat7"): (0.3318, 0.3272),
    NetworkRecipe("overfeat7", training="multi"): (0.3257, 0.3125),
}

Errors = dict[
    NetworkRecipe, dict[int, tuple[float, float]]
]  # by seed: crop, full image


def main(given: Setting) -> Path:
    errors: Errors = defaultdict(dict)
    for network, seed, workdir in networks_of(given, tuple(PAPER)):
        crop, full = (
            network_test([workdir], name) for name in ("single", "full_image")
        )
        errors[network][seed] = 1 - crop["top1"], 1 - full["top1"]
        folder = _report(given, errors, full)
    return folder


def _report(given: Setting, errors: Errors, report: dict[str, Any]) -> Path:
    gains = [crop - full for seeds in errors.values() for crop, full in seeds.values()]
    return write_network_report(
        given,
        NAME,
        title="Centre crop or full image, single-view error",
        columns=COLUMNS,
        rows=network_rows(COLUMNS, errors, PAPER),
        claims=[Claim("The full image has a lower top-1 error than its crop", gains)],
        notes=[
            f"Tested on {report['count']} images of {report['data']}, split "
            f"{report['split']}, shorter side {report['scales'][0][0]}; the paper on "
            "ImageNet's validation set.",
            *diverged(given, tuple(PAPER)),
        ],
    )


if __name__ == "__main__":
    run(main, __doc__)
