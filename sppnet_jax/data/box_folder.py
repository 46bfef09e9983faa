"""A folder of images and boxes in any format that is known: which one, is guessed."""

import os
from pathlib import Path
from types import ModuleType

from sppnet_jax.data import coco_folder, voc_folder, yolo_folder
from sppnet_jax.data.annotated_folders import (
    AnnotatedFolder,
    FolderAnnotations,
    index_paths,
)
from sppnet_jax.data.coco_folder import json_files, names_lists
from sppnet_jax.data.folders import existing_folder, inform_once, printable
from sppnet_jax.data.sources import Source
from sppnet_jax.data.yolo_folder import label_sign

KINDS = {
    "voc_folder": "Pascal VOC's XML",
    "coco_folder": "COCO's JSON",
    "yolo_folder": "YOLO's label files",
}
LAYOUTS = (
    "Expected the folders JPEGImages and Annotations with Pascal VOC's XML, images and "
    "COCO's JSON, or the folders images and labels with YOLO's label files."
)

MODULES = {
    "voc_folder": voc_folder,
    "coco_folder": coco_folder,
    "yolo_folder": yolo_folder,
}


def open_folder(
    root: str, split: str, multi_label: bool = True, with_boxes: bool = False
) -> Source:
    """Opens a split of a folder of boxes; see `open_detection_source`."""
    return _module(root).open_folder(root, split, multi_label, with_boxes)


def scan_folder(root: str | os.PathLike[str]) -> AnnotatedFolder:
    """Finds the splits and images of a folder, as the module of its kind does."""
    return _module(root).scan_folder(root)


def read_annotations(scan: AnnotatedFolder, threads: int = 8) -> FolderAnnotations:
    """Reads every annotation of a folder, as the module of its kind does."""
    return _module(scan.root).read_annotations(scan, threads)


def guess_kind(root: str | os.PathLike[str]) -> str:
    """Which kind of folder it is: "voc_folder", "coco_folder" or "yolo_folder".

    The log says which it is and why.

    Raises: FileNotFoundError if there is no such folder; ValueError if it is none of
    these, or several.
    """
    folder = existing_folder(root, "folder of boxes", LAYOUTS)
    found = find_kinds(folder)
    if not found:
        raise ValueError(f"{str(folder)!r} has no boxes in a known layout. {LAYOUTS}")
    told = [f"{KINDS[kind]} ({printable(sign)})" for kind, sign in found.items()]
    if len(found) > 1:
        raise ValueError(
            f"{str(folder)!r} has boxes in {len(found)} formats, {' and '.join(told)}: "
            f"say which to take, {' or '.join(found)}: --config.data.name=KIND, or of "
            "inspect --kind=KIND"
        )
    (kind,) = found
    inform_once(f"{folder} has {told[0]}: it is read as a {kind}")
    return kind


def find_kinds(folder: Path) -> dict[str, str]:
    """The kinds of folders of boxes that a folder may be, and a file that tells it.

    Pascal VOC's has images in JPEGImages; COCO's has JSON with the lists images and
    annotations; YOLO's has text in a folder labels, a YAML with names, or a list of
    names and text beside images.
    """
    index = index_paths(folder)
    json = json_files(index)[0]
    signs = {
        "voc_folder": next((p for p in index.images if _is_vocs(p)), None),
        "coco_folder": next((p for p in json if names_lists(folder / p)), None),
        "yolo_folder": label_sign(folder, index),
    }
    return {kind: sign for kind, sign in signs.items() if sign}


def _module(root: str | os.PathLike[str]) -> ModuleType:
    return MODULES[guess_kind(root)]


def _is_vocs(path: str) -> bool:
    return "jpegimages" in path.lower().split(os.sep)[:-1]
