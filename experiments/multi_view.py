"""Section 3.1.5: do more views, pooled from feature maps, lower the error?

    python -m experiments.multi_view --preset=digits

Tests Overfeat-7, trained at two sizes, with ten crops, with the same ten views pooled
from the map of the whole image, with all views at six scales, and with the full images
on top; then all seeds' networks together.
"""

from operator import itemgetter
from pathlib import Path
from typing import Any

from experiments.report import (
    TEXT,
    Cited,
    Claim,
    Row,
    differences,
    write_network_report,
)
from experiments.runs import (
    NetworkRecipe,
    Setting,
    diverged,
    network_test,
    networks_of,
)
from experiments.setting import run

NAME = "multi_view"
COLUMNS = ("top-1 error", "top-5 error")
NETWORK = NetworkRecipe("overfeat7", training="multi")
PROTOCOLS = {
    "single": "centre crop",
    "ten_view": "ten views, crops",
    "ten_view_map": "ten views, from maps",
    "multi_view": "six scales (the paper's 96 views)",
    "multi_view_full": "six scales and full images (98)",
}

# ImageNet 2012 validation. The paper's ten views on maps are within 0.1 % of crops.
PAPER: dict[str, dict[str, Cited]] = {
    "single": {"top-1 error": Cited(0.3257)},
    "ten_view": {"top-1 error": Cited(0.2968), "top-5 error": Cited(0.1095)},
    "multi_view": {"top-5 error": Cited(0.0936, TEXT)},
    "multi_view_full": {"top-5 error": Cited(0.0914, TEXT)},
}

Reports = dict[str, list[dict[str, Any]]]  # by protocol, one for each seed


def main(given: Setting) -> Path:
    reports: Reports = {protocol: [] for protocol in PROTOCOLS}
    workdirs = []
    for _, _, workdir in networks_of(given, (NETWORK,)):
        workdirs.append(workdir)
        for protocol in PROTOCOLS:
            reports[protocol].append(network_test([workdir], protocol))
        folder = _report(given, reports, None)
    if len(workdirs) > 1:
        folder = _report(given, reports, network_test(workdirs, "multi_view_full"))
    return folder


def _report(given: Setting, reports: Reports, combined: dict[str, Any] | None) -> Path:
    rows = [
        Row(label, _errors(reports[protocol]), PAPER.get(protocol, {}))
        for protocol, label in PROTOCOLS.items()
    ]
    networks = len(combined["workdirs"]) if combined else "all"
    rows.append(
        Row(
            f"{networks} networks combined", _errors([combined] if combined else []), {}
        )
    )
    views = ", ".join(
        f"{tests[0]['views']:.4g} ({PROTOCOLS[protocol]})"
        for protocol, tests in reports.items()
    )
    report = reports["single"][0]
    return write_network_report(
        given,
        NAME,
        title=f"More views of an image, {NETWORK.label}",
        columns=COLUMNS,
        rows=rows,
        claims=[
            Claim(
                f"Lower top-1 error: {PROTOCOLS[more]}, against {PROTOCOLS[less]}",
                differences(
                    dict(enumerate(reports[more])),
                    dict(enumerate(reports[less])),
                    itemgetter("top1"),
                ),
            )
            for less, more in (
                ("single", "ten_view"),
                ("ten_view", "multi_view"),
                ("multi_view", "multi_view_full"),
            )
        ],
        notes=[
            f"Views of an image on average: {views}.",
            f"Tested on {report['count']} images of {report['data']}, split "
            f"{report['split']}; the paper on ImageNet's validation set.",
            *diverged(given, (NETWORK,)),
        ],
    )


def _errors(reports: list[dict[str, Any]]) -> dict[str, list[float]]:
    names = {"top-1 error": "top1", "top-5 error": "top5"}
    return {
        column: [1 - report[name] for report in reports]
        for column, name in names.items()
    }


if __name__ == "__main__":
    run(main, __doc__)
