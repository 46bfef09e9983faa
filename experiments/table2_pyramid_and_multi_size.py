"""Table 2: does a pyramid help, and does training at several sizes help?

    python -m experiments.table2_pyramid_and_multi_size --preset=digits

Trains four architectures without SPP, with {6,3,2,1} at one size, and at two sizes in
turn; ZF-5 with {4,3,2,1}; Overfeat-7 at sizes drawn for each epoch. Tests each with ten
views. It goes on where it was interrupted, and shares its networks with the others.
"""

from collections import defaultdict
from operator import itemgetter
from pathlib import Path
from typing import Any

from experiments.report import Claim, differences, network_rows, write_network_report
from experiments.runs import (
    NetworkRecipe,
    Setting,
    diverged,
    network_test,
    networks_of,
)
from experiments.setting import run

NAME = "table2_pyramid_and_multi_size"
COLUMNS = ("top-1 error", "top-5 error")
BACKBONES = ("zf5", "convnet5", "overfeat5", "overfeat7")

# ImageNet 2012 validation, ten views.
PAPER = {
    NetworkRecipe("zf5", ()): (0.3599, 0.1476),
    NetworkRecipe("zf5"): (0.3498, 0.1414),
    NetworkRecipe("zf5", training="multi"): (0.3460, 0.1364),
    NetworkRecipe("zf5", levels=(4, 3, 2, 1)): (0.3506, 0.1404),
    NetworkRecipe("convnet5", ()): (0.3493, 0.1392),
    NetworkRecipe("convnet5"): (0.3438, 0.1354),
    NetworkRecipe("convnet5", training="multi"): (0.3394, 0.1333),
    NetworkRecipe("overfeat5", ()): (0.3413, 0.1352),
    NetworkRecipe("overfeat5"): (0.3287, 0.1280),
    NetworkRecipe("overfeat5", training="multi"): (0.3226, 0.1233),
    NetworkRecipe("overfeat7", ()): (0.3201, 0.1197),
    NetworkRecipe("overfeat7"): (0.3036, 0.1112),
    NetworkRecipe("overfeat7", training="multi"): (0.2968, 0.1095),
    NetworkRecipe("overfeat7", training="uniform"): (0.3006, 0.1096),
}
IN_TEXT = (
    NetworkRecipe("zf5", levels=(4, 3, 2, 1)),
    NetworkRecipe("overfeat7", training="uniform"),
)
SPP_PAIRS = [(NetworkRecipe(name, ()), NetworkRecipe(name)) for name in BACKBONES]
MULTI_PAIRS = [
    (NetworkRecipe(name), NetworkRecipe(name, training="multi")) for name in BACKBONES
]

Errors = dict[NetworkRecipe, dict[int, tuple[float, float]]]  # by seed: top-1, top-5


def main(given: Setting) -> Path:
    errors: Errors = defaultdict(dict)
    for network, seed, workdir in networks_of(given, tuple(PAPER)):
        report = network_test([workdir], "ten_view")
        errors[network][seed] = 1 - report["top1"], 1 - report["top5"]
        folder = _report(given, errors, report)
    return folder


def _report(given: Setting, errors: Errors, report: dict[str, Any]) -> Path:
    claims = [
        Claim("SPP has a lower top-1 error than no SPP", _gains(errors, SPP_PAIRS)),
        Claim(
            "Multi-size training has a lower top-1 error than single-size",
            _gains(errors, MULTI_PAIRS),
        ),
    ]
    views = f"{report['views']:.3g} views" + ("" if report["flip"][0] else ", no flips")
    return write_network_report(
        given,
        NAME,
        title="Pyramid and multi-size training, ten-view error",
        columns=COLUMNS,
        rows=network_rows(COLUMNS, errors, PAPER, IN_TEXT),
        claims=claims,
        notes=[
            f"Tested on {report['count']} images of {report['data']}, split "
            f"{report['split']}, {views}; the paper on ImageNet's validation set.",
            "Multi-size training begins at the larger size, which the test has, and "
            "takes turns; with an even number of epochs it ends at the smaller.",
            *diverged(given, tuple(PAPER)),
        ],
    )


def _gains(
    errors: Errors, pairs: list[tuple[NetworkRecipe, NetworkRecipe]]
) -> list[float]:
    """How much lower the second network's top-1 error is, for each pair and seed."""
    return [
        gain
        for first, second in pairs
        for gain in differences(errors[first], errors[second], itemgetter(0))
    ]


if __name__ == "__main__":
    run(main, __doc__)
