r"""Is a trunk better trained with its detector, and does a pyramid help it?

python -m experiments.end_to_end --config=configs/detect_end_to_end.py \
    --config.data.root=FOLDER --workdir=runs/experiments/end_to_end

A row is a pyramid of the windows, {7} is Fast R-CNN's one level of 7×7, and what is
trained on it: no layer (SVMs and ridge regression on the pooled vectors, as
configs/detect_pretrained.py does), the fc layers, or everything from
`--config.finetune.trainable` on. Detectors of fc layers are scored by softmax, and by
SVMs on the pooled vectors after the same training; both move boxes by the box layer.

Writes results.json, table.md and plot.png into WORKDIR/end_to_end. Interrupted, the
same command goes on; a row that is not there yet says so.
"""

import itertools
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import flags

from experiments.report import (
    Claim,
    Column,
    Row,
    differences,
    plot_shares,
    write_report,
)
from experiments.runs import (
    TESTED,
    DetectionSetting,
    share_stages,
    tested_detector,
)
from sppnet_jax import cli
from sppnet_jax.detection.detector_settings import DetectorSettings
from sppnet_jax.network.model import HEAD_ONLY
from sppnet_jax.run import run_folder, stages

NAME = "end_to_end"
TITLE = "End-to-end training by pyramid, mAP (11 points)"
SVM, SOFTMAX = "SVM", "softmax"
NOTHING, FC, EVERYTHING = "trunk frozen, no fc layers", "fc layers", "everything"
# What is better, than what, and the scorer of both.
CLAIMS = {
    "Training everything is better than a frozen trunk": (EVERYTHING, NOTHING, SVM),
    "Training everything is better than the fc layers": (EVERYTHING, FC, SOFTMAX),
}
PARTS = {"nothing": NOTHING, "fc": FC, "everything": EVERYTHING}

SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "The seeds.")
PYRAMIDS = flags.DEFINE_list(
    "pyramids", ["321", "7", "6321"], "The windows' levels, a digit each."
)
NOW = flags.DEFINE_multi_enum(
    "trained", list(PARTS), list(PARTS), "What is trained now; other rows are kept."
)


class Case(NamedTuple):
    """A row: the windows' pyramid, and what is trained on it."""

    levels: tuple[int, ...]
    trained: str

    @property
    def label(self) -> str:
        """Itself in the words of a table."""
        return f"{{{','.join(map(str, self.levels))}}}, {self.trained}"


Precisions = dict[tuple[Case, str], dict[int, float]]  # by row and scorer, by seed


def main(argv: Sequence[str]) -> None:
    cli.refuse_arguments(argv)
    cli.check_single_process()
    settings, folder = cli.given_settings(DetectorSettings), cli.given_workdir()
    settings = settings._replace(
        cache=settings.cache or str((folder / "cache").absolute())
    )
    pyramids = [tuple(map(int, one)) for one in PYRAMIDS.value]
    cases = [Case(levels, own) for levels in pyramids for own in PARTS.values()]
    now = [PARTS[own] for own in NOW.value]
    seeds = tuple(map(int, SEEDS.value))
    name = Path(settings.data.root).name or settings.data.name
    given = DetectionSetting(name, settings, 0, folder, seeds)
    precisions: Precisions = defaultdict(dict)
    minutes: dict[Case, list[float]] = defaultdict(list)
    report(given, cases, precisions, minutes)
    for seed, case in itertools.product(seeds, cases):
        for scorer in (SVM,) if case.trained == NOTHING else (SOFTMAX, SVM):
            workdir = workdir_of(folder, case, scorer, seed)
            if case.trained in now:
                if scorer == SVM and case.trained != NOTHING:
                    share_stages(workdir_of(folder, case, SOFTMAX, seed), workdir)
                own = settings_of(settings, case, scorer, seed)
                found = tested_detector(own, workdir)
            elif (workdir / TESTED).exists():
                found = run_folder.read_json(workdir / TESTED)["report"]
            else:
                continue
            precisions[case, scorer][seed] = found["map_11_point"]
            if scorer == SOFTMAX:
                stage = run_folder.read_json(workdir / "finetune" / stages.STAGE_FILE)
                minutes[case].append(stage["seconds"] / 60)
            report(given, cases, precisions, minutes)
    made = report(given, cases, precisions, minutes)
    print(f"\n{(made / 'table.md').read_text()}")


def settings_of(
    settings: DetectorSettings, case: Case, scorer: str, seed: int
) -> DetectorSettings:
    """The settings of a detector."""
    settings = settings._replace(levels=case.levels, seed=seed)
    if case.trained == NOTHING:
        finetune = settings.finetune._replace(steps=0)
        return settings._replace(
            system="spp", scorer="svm", layer="pyramid", finetune=finetune
        )
    if case.trained == FC:
        finetune = settings.finetune._replace(trainable=HEAD_ONLY)
        settings = settings._replace(finetune=finetune)
    return settings._replace(scorer=scorer.lower(), layer="pyramid")


def workdir_of(folder: Path, case: Case, scorer: str, seed: int) -> Path:
    """Where a detector is kept."""
    levels = "".join(map(str, case.levels))
    return folder / f"{levels}-{case.trained.split()[0]}-{scorer}-seed{seed}".lower()


def report(
    given: DetectionSetting,
    cases: Sequence[Case],
    precisions: Precisions,
    minutes: dict[Case, list[float]],
) -> Path:
    """Writes down what is measured so far; returns the folder."""
    rows = []
    for case in cases:
        scorers = (SVM,) if case.trained == NOTHING else (SVM, SOFTMAX)
        measured = {s: list(precisions.get((case, s), {}).values()) for s in scorers}
        rows.append(Row(case.label, measured, {}))

    def of(
        levels: tuple[int, ...], trained: str, scorer: str = SOFTMAX
    ) -> dict[int, float]:
        return precisions.get((Case(levels, trained), scorer), {})

    pyramids = list(dict.fromkeys(case.levels for case in cases))
    claims = []
    for text, (more, less, scorer) in CLAIMS.items():
        gains = [
            gain
            for levels in pyramids
            for gain in differences(
                of(levels, more, scorer), of(levels, less, scorer), float
            )
        ]
        claims.append(Claim(f"{text} ({scorer})", gains))
    if (7,) in pyramids:
        for levels in (own for own in pyramids if own != (7,)):
            gains = differences(of(levels, EVERYTHING), of((7,), EVERYTHING), float)
            name = ",".join(map(str, levels))
            claims.append(Claim(f"{{{name}}} is better than {{7}} (softmax)", gains))
    steps = given.settings.finetune
    notes = [
        f"Data: {given.preset_name}; shorter sides {list(given.settings.scales)}; "
        f"{steps.steps} steps of {steps.images} images and {steps.batch_size} windows; "
        f"everything is from {steps.trainable} on.",
        "Pairs are detectors that differ in one thing, at one seed; all are tested on "
        "the same images.",
        *(
            f"Minutes of training {case.label}: "
            + ", ".join(f"{own:.1f}" for own in found)
            + "."
            for case, found in minutes.items()
        ),
    ]
    folder = write_report(
        given,
        NAME,
        title=TITLE,
        columns=[Column(SVM, paper=False), Column(SOFTMAX, paper=False)],
        rows=rows,
        claims=claims,
        notes=notes,
    )
    if any(np.size(found) for row in rows for found in row.measured.values()):
        plot_shares(folder, TITLE, {"mAP": [SVM, SOFTMAX]}, rows)
    return folder


if __name__ == "__main__":
    cli.run(main, DetectorSettings)
