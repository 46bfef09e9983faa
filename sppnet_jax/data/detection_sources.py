"""One function that opens a data set of images and boxes, whatever its kind.

    open_detection_source("digit_scenes/detection", "train")
    open_detection_source("voc_folder", "test", root="~/VOCdevkit/VOC2007")
    open_detection_source("voc/2007", "test", data_dir="/data/tfds")

A record's boxes are half-open, 0-based pixels, (ymin, xmin, ymax, xmax), of the image
that `decode_image` makes.
"""

from concurrent.futures import ThreadPoolExecutor

from sppnet_jax.data.sources import Objects, Source, open_any
from sppnet_jax.run.progress import progress_bar

_INSTEAD = {
    "digit_scenes/classification": "'digit_scenes/detection' has",
    "image_folder": "a folder with boxes, in Pascal VOC layout, is a 'voc_folder'",
}


def open_detection_source(
    dataset: str, split: str, *, root: str = "", data_dir: str = ""
) -> Source:
    """Opens a split of a data set of images with boxes.

    A record has `image`, `name` (of its file), `objects`, and `labels` as in a
    multi-label source. Objects of difficult instances are among them; empty boxes are
    not, and a warning names their record.

    `dataset`: "voc_folder"; "digit_scenes/detection", which is prepared on first use;
    or the name of a TFDS data set with the features of its voc ("voc/2007", "voc/2012",
    "voc/2007:5.0.0"), already prepared as ArrayRecord.
    `split`: "train", "trainval", …, or a TFDS slice such as "train[:80%]".
    `root`: the folder of a "voc_folder".
    `data_dir`: where TFDS data sets lie; see `sources.open_source`.

    Returns: the source, with `multi_label`.
    Raises: ValueError for an unknown data set or split, an empty split, one without
    objects, a data set without boxes, a missing root, or labels outside the range of
    the classes; FileNotFoundError for a data set that isn't prepared, saying what to
    run. Reading a record raises a ValueError if its image can't be opened.
    """
    if dataset in _INSTEAD:
        raise ValueError(f"{dataset!r} has no boxes; {_INSTEAD[dataset]}")
    return open_any(dataset, split, root, data_dir, multi_label=True, with_boxes=True)


def read_objects(source: Source, threads: int = 8) -> list[Objects]:
    """The objects of every record of a detection source, in order.

    `threads`: threads that read.

    Raises: ValueError for a source without boxes, and as reading a record does.
    """

    def read(index: int) -> Objects:
        record = source.records[index]
        if "objects" not in record:
            raise ValueError(
                f"the records of split {source.split!r} of {source.name!r} have no "
                "boxes; open it with open_detection_source"
            )
        return record["objects"]

    total = len(source.records)
    objects = []
    bar = progress_bar("reading boxes", total, delay=2)
    with bar, ThreadPoolExecutor(threads) as pool:
        for one in pool.map(read, range(total)):
            objects.append(one)
            bar.update()
    return objects
