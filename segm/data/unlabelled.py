"""A folder of photographs as a data set without classes and labels, to measure models on."""

from pathlib import Path

from segm.data.images import find_images, read_image
from segm.data.sample import Sample


class Photographs:
    """The photographs below a folder; `photographs[index]` is a `Sample` without label.

    Raises:
        FileNotFoundError: there is no such folder, or no photograph in it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.name = str(folder)
        self._files = find_images(self.folder)
        if not self._files:
            raise FileNotFoundError(f"no photograph below {folder}: give a data set or a folder of JPEG or PNG files")

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Sample:
        file = self._files[index]
        return Sample(file.relative_to(self.folder).with_suffix("").as_posix(), read_image(file), None)
