"""What a test of a detector leaves behind: precisions, detections, curves, pictures.

results.json  table.md  precision_recall.png  examples.png
voc/comp4_det_SPLIT_CLASS.txt  coco_results.json  coco_ground_truth.json
yolo/labels/IMAGE.txt  yolo/classes.txt
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sppnet_jax.data.images import decode_image
from sppnet_jax.data.sources import Objects, Source
from sppnet_jax.detection import pictures as detection_plots
from sppnet_jax.detection import result_files
from sppnet_jax.detection.average_precision import evaluate_detections
from sppnet_jax.detection.coco_precision import HOW_TO_GET, coco_precision
from sppnet_jax.detection.detection_table import join_detections
from sppnet_jax.detection.detector import Detections
from sppnet_jax.detection.proposals import proposal_recall
from sppnet_jax.run.files import all_tried, table_cell, write_json, write_text

# Of a test's folder; what is to be written is checked with these before the test.
FILES = (
    *("results.json", "table.md", "precision_recall.png", "examples.png"),
    *("coco_results.json", "coco_ground_truth.json", "voc/any", "yolo/labels/any"),
)
EXAMPLES = 12  # images in the picture
CURVES = ("recall", "precision")  # too long for results.json


def write_results(
    folder: Path,
    source: Source,
    objects: Sequence[Objects],
    sizes: np.ndarray,
    proposals: Sequence[np.ndarray],
    found: Sequence[Detections],
    *,
    least_score: float,
    about: dict[str, Any],
) -> dict[str, Any]:
    """Evaluates detections, writes all files and prints the table.

    `objects`, `sizes`, `proposals`, `found`: of each record of the source.
    `least_score`: of the boxes in the picture. `about`: more for results.json.

    Returns: what results.json holds.
    Raises: OSError for files that can't be written, when all are tried.
    """
    class_names, ids, names = source.class_names, image_ids(source), _names(source)
    table = join_detections(found)
    result = evaluate_detections(table, objects, class_names)
    report = {
        "data": source.name,
        "split": source.split,
        "images": len(source.records),
        "map_11_point": result.map_11_point,
        "map_area": result.map_area,
        "classes": [
            {
                "name": name,
                **{k: v for k, v in one._asdict().items() if k not in CURVES},
            }
            for name, one in zip(class_names, result.classes, strict=True)
        ],
        "left_out": result.left_out,
        "coco": coco_precision(table, objects, class_names),
        "proposals": proposal_recall(proposals, objects, len(class_names)),
        **about,
    }
    text = markdown_table(report)
    print(text, flush=True)
    if report["coco"] is None:
        print(HOW_TO_GET)
    curves = [
        detection_plots.Curve(name, one.recall, one.precision, one.ap_11_point)
        for name, one in zip(class_names, result.classes, strict=True)
        if one.ap_11_point is not None
    ]
    truth = folder / "coco_ground_truth.json", names, sizes, objects, class_names
    with all_tried() as attempt:
        attempt(write_json, folder / "results.json", report)
        attempt(write_text, folder / "table.md", text)
        voc = folder / "voc", table, ids, class_names
        attempt(result_files.write_voc_results, *voc, split=source.split)
        yolo = folder / "yolo", table, ids, sizes, class_names
        attempt(result_files.write_yolo_results, *yolo)
        coco = folder / "coco_results.json", table
        attempt(result_files.write_coco_results, *coco)
        attempt(result_files.write_coco_ground_truth, *truth)
        picture = folder / "precision_recall.png"
        drawn = attempt(detection_plots.plot_precision_recall, curves, picture)
        print(f"curves: {drawn or 'none'}")
        picture = folder / "examples.png"
        drawn = attempt(_draw_examples, source, objects, found, least_score, picture)
        print(f"examples: {drawn or 'none'}")
    return report


def image_ids(source: Source) -> list[str]:
    """What VOC calls each image: the name of its file without the suffix.

    Raises: ValueError where two images have the same.
    """
    ids = [str(Path(name).with_suffix("")) for name in _names(source)]
    repeated = [name for name, count in Counter(ids).items() if count > 1]
    if repeated:
        raise ValueError(
            f"{len(repeated)} images of {source.name!r} share a name with another, "
            f"{repeated[0]!r} for instance: result files couldn't tell them apart. "
            "Rename them"
        )
    return ids


def markdown_table(report: dict[str, Any]) -> str:
    """The average precision of each class, and how good the proposals were."""
    lines = [
        f"{report['data']}, split {report['split']}, {report['images']} images",
        "",
        "| class | AP, 11 points | AP, area | objects | difficult | detections |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["classes"]:
        precisions = [
            "–" if row[name] is None else f"{100 * row[name]:.1f}"
            for name in ("ap_11_point", "ap_area")
        ]
        counts = [f"{row[n]:,}" for n in ("ground_truths", "difficult", "detections")]
        cells = [table_cell(row["name"]), *precisions, *counts]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append(
        f"| mean | {100 * report['map_11_point']:.1f} | {100 * report['map_area']:.1f} "
        "| | | |"
    )
    if coco := report.get("coco"):
        names = ("ap", "ap_50", "ap_75", "ap_small", "ap_medium", "ap_large")
        cells = ["–" if coco[n] is None else f"{100 * coco[n]:.1f}" for n in names]
        lines += [
            "",
            "| COCO's AP | IoU 0.50 | IoU 0.75 | small | medium | large |",
            "|---|---|---|---|---|---|",
            f"| {' | '.join(cells)} |",
        ]
    proposals = report["proposals"]
    lines += [
        "",
        f"proposals: {proposals['mean_proposals']:.0f} an image, recall at IoU 0.5 "
        f"{proposals['recall']:.1%}",
        "",
    ]
    return "\n".join(lines)


def _names(source: Source) -> list[str]:
    return [source.records[index]["name"] for index in range(len(source.records))]


def _draw_examples(
    source: Source,
    objects: Sequence[Objects],
    found: Sequence[Detections],
    least_score: float,
    path: Path,
) -> Path:
    """Draws some images, evenly spaced, with what was found and what is there."""
    spaced = np.linspace(0, len(found) - 1, min(EXAMPLES, len(found))).astype(int)
    shown = []
    for index in spaced:
        try:
            image = decode_image(source.records[int(index)]["image"])
        except ValueError:
            continue
        kept = found[index].above(least_score)
        shown.append(detection_plots.Shown(image, *kept, *objects[index]))
    return detection_plots.plot_detections(shown, source.class_names, path)
