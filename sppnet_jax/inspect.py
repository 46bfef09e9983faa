r"""Says what a folder of images holds before you train on it, and draws some of it.

python -m sppnet_jax.inspect FOLDER
python -m sppnet_jax.inspect FOLDER --picture=sheet.png

A folder of class folders, or of boxes in Pascal VOC's, COCO's or YOLO's format: counts
by class and split, sizes, what was put right or left out and why, and a contact sheet.
"""

import argparse
import io
import logging
import sys
from pathlib import Path

from sppnet_jax.data.box_folder import KINDS
from sppnet_jax.run.files import check_can_write


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m sppnet_jax.inspect",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="FOLDER", help="the folder of images")
    parser.add_argument(
        "--picture",
        default="",
        help="the contact sheet; by default NAME_contact_sheet.png, here",
    )
    kinds = ("image_folder", *KINDS)
    parser.add_argument(
        "--kind", default="", choices=kinds, help="where it could be several kinds"
    )
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files may be no text
        sys.stdout.reconfigure(errors="backslashreplace")
    given = parser.parse_args()
    # The report has the notes that are logged elsewhere.
    logging.getLogger("sppnet_jax").setLevel(logging.ERROR)
    try:
        show_folder(Path(given.folder), Path(given.picture), given.kind)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def show_folder(folder: Path, picture: Path = Path(), kind: str = "") -> None:
    """Prints what a folder holds and draws its contact sheet."""
    from sppnet_jax.data.inspection import draw_contact_sheet, inspect_folder, report

    folder, picture = folder.expanduser(), picture.expanduser()
    if picture == Path():
        picture = Path(f"{folder.resolve().name}_contact_sheet.png")
    check_can_write(picture, (".png", ".jpg", ".jpeg"))
    found = inspect_folder(folder, kind)
    print(report(found))
    print(f"\npicture: {draw_contact_sheet(found, picture)}")


if __name__ == "__main__":
    main()
