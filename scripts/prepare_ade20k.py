"""Prepares ADE20K (SceneParsing benchmark, 150 classes) below DIR.

    DIR/images/{training,validation}/*.jpg          20,210 and 2,000 photographs
    DIR/annotations/{training,validation}/*.png     0: other (ignored), 1 … 150: the classes

The archive's own folder ADEChallengeData2016 is left out: DIR takes its place. A DIR in which another tool
has already put the complete ADEChallengeData2016 is left as it is, since `segm` reads that too.
"""

from pathlib import Path

import click
from prepare_common import Archive, Source, is_complete, prepare_options, require_pairs, unpack

SITE = "http://data.csail.mit.edu/places/ADEchallenge/"
TRAINVAL = Archive(
    "ADEChallengeData2016.zip",
    SITE + "ADEChallengeData2016.zip",
    "219e1696abb36c8ba3a3afe7fb2f4b4606a897c7",
)
TEST = Archive("release_test.zip", SITE + "release_test.zip", "e05747892219d10e9243933371a497e905a4860c")

TOP = "ADEChallengeData2016/"
WANTED = ("images/", "annotations/", "objectInfo150.txt", "sceneCategories.txt")
COUNTS = {
    "images/training/*.jpg": 20210,
    "images/validation/*.jpg": 2000,
    "annotations/training/*.png": 20210,
    "annotations/validation/*.png": 2000,
}


def place(name: str) -> str | None:
    """Path below DIR of a member of the archive, None for what is not wanted."""
    name = name.removeprefix(TOP)
    return name if name.startswith(WANTED) else None


def prepare_trainval(folder: Path, source: Source) -> None:
    if any(is_complete(root, COUNTS) for root in (folder, folder / TOP)):
        click.echo(f"{folder}: training and validation set are already complete")
        return
    unpack(source.get(TRAINVAL), folder, place)
    for split in ("training", "validation"):
        require_pairs(folder / "images" / split, ".jpg", folder / "annotations" / split, ".png")


@click.command()
@prepare_options
@click.option(
    "--test-set/--no-test-set",
    default=False,
    show_default=True,
    help="Unpack the photographs of the test set too (DIR/release_test; no labels, read by no command).",
)
def main(folder: Path, archives: tuple[Path, ...], url: str | None, check: bool, test_set: bool) -> None:
    """Download ADE20K and lay it out below DIR for segm/data: images/{training,validation} and
    annotations/{training,validation}. About 1 GB to download; what is already there is kept."""
    source = Source(folder, (TRAINVAL, TEST) if test_set else (TRAINVAL,), archives, url, check)
    prepare_trainval(folder, source)
    if test_set:
        unpack(source.get(TEST), folder, lambda name: name if name.startswith("release_test/") else None)


if __name__ == "__main__":
    main()
