"""The common parts of the prepare_*.py scripts: fetch archives, check and unpack them, write label maps.

Every file is written beside its place as `<name>.part` and renamed when it is whole, so an interrupted run
leaves no half file that looks finished, and the next run goes on where the last one stopped. A file that is
already there is never replaced, unless it is empty.
"""

import contextlib
import functools
import hashlib
import http.client
import shutil
import stat
import tarfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO

import click
import numpy as np
from PIL import Image
from tqdm import tqdm

from segm.errors import what_it_is
from segm.storage import atomic, part_of

CHUNK = 1 << 20
TIMEOUT_S = 60
FILE_ERRORS = (OSError, EOFError, zipfile.BadZipFile, tarfile.TarError, zlib.error, http.client.HTTPException)


@dataclass(frozen=True)
class Archive:
    """A file to fetch. `url` None: by hand, at `site`; `sha1` None: no checksum is published."""

    name: str
    url: str | None
    sha1: str | None = None
    site: str = ""


# ---------------------------------------------------------------------------------------------- command line


def prepare_options(command: Callable) -> Callable:
    """DIR, --archive, --url and --check for a command; errors about files become one line and status 1."""

    @functools.wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except FILE_ERRORS as error:
            raise click.ClickException(" ".join(str(error).split()) or type(error).__name__) from error

    path = click.Path(exists=True, dir_okay=False, path_type=Path)
    decorators = (
        click.argument("folder", metavar="DIR", type=click.Path(file_okay=False, path_type=Path)),
        click.option(
            "--archive",
            "archives",
            type=path,
            multiple=True,
            metavar="FILE",
            help="Local archive to use instead of a download, under its published name; repeat for several.  "
            "[default: DIR/downloads, then DIR, then download]",
        ),
        click.option(
            "--url",
            metavar="URL",
            help="Where to download from (http, https or file): a folder that holds the archives under their "
            "published names, or the archive itself.  [default: the published addresses]",
        ),
        click.option(
            "--check/--no-check",
            default=True,
            show_default=True,
            help="Compare archives with their published SHA-1, where there is one.",
        ),
    )
    for decorator in reversed(decorators):
        guarded = decorator(guarded)
    return guarded


class Source:
    """The sources of the archives of one run.

    Args:
        folder: the data set's folder; downloads go to `folder/downloads`
        known: the archives that this run can use
        files: local archives, named as in `known` (one archive alone may have any name)
        url: replaces the published addresses
        check: compare with the published SHA-1
    """

    def __init__(
        self, folder: Path, known: tuple[Archive, ...], files: tuple[Path, ...], url: str | None, check: bool
    ) -> None:
        self.folder, self.url, self.check = folder, url, check
        self.given = {file.name: file for file in files}
        names = [archive.name for archive in known]
        if len(names) == len(files) == 1:
            self.given = {names[0]: files[0]}
        unknown = sorted(set(self.given) - set(names))
        if unknown:
            raise click.ClickException(f"--archive {unknown[0]}: expected the name {' or '.join(names)}")

    def get(self, archive: Archive) -> Path:
        """Path of the checked archive: given, already there, or downloaded."""
        places = (self.given.get(archive.name), self._target(archive), self.folder / archive.name)
        local = next((place for place in places if place and place.is_file()), None)
        if local:
            self._verify(local, archive, f"{local}: move it away or pass --no-check")
            return local
        return self._download(archive)

    def _target(self, archive: Archive) -> Path:
        return self.folder / "downloads" / archive.name

    def _verify(self, path: Path, archive: Archive, advice: str) -> None:
        if archive.name.endswith((".zip", ".tar", ".tar.gz", ".tgz")) and not (
            zipfile.is_zipfile(path) or tarfile.is_tarfile(path)
        ):
            raise click.ClickException(f"{path} is neither a zip nor a tar archive ({what_it_is(path)}); {advice}")
        if not (self.check and archive.sha1):
            return
        found = sha1_of(path)
        if found != archive.sha1:
            raise click.ClickException(f"SHA-1 of {archive.name} is {found}, published is {archive.sha1}; {advice}")

    def _download(self, archive: Archive) -> Path:
        url = archive.url
        if self.url:
            # A folder by its address, or the archive itself.
            is_file = self.url.rsplit("/", 1)[-1] == archive.name
            url = self.url if is_file else f"{self.url.rstrip('/')}/{archive.name}"
        target = self._target(archive)
        if not url:
            raise click.ClickException(
                f"{archive.name} is missing: fetch it by hand at {archive.site} and put it into {target.parent} (or "
                "name it with --archive)"
            )
        created = [path for path in (self.folder, target.parent) if not path.exists()]
        target.parent.mkdir(parents=True, exist_ok=True)
        part = part_of(target)
        try:
            download(url, part)
            self._verify(part, archive, f"nothing kept of {url}")
        except click.ClickException:
            part.unlink(missing_ok=True)
            remove_empty(created)
            raise
        except OSError:
            remove_empty(created)
            raise
        part.rename(target)
        return target


def remove_empty(folders: list[Path]) -> None:
    """Remove these folders, innermost last in the list, as far as they are empty."""
    for folder in reversed(folders):
        with contextlib.suppress(OSError):
            folder.rmdir()


# ---------------------------------------------------------------------------------------------- download


def download(url: str, part: Path) -> None:
    """Download `url` to `part`; continue after the bytes that `part` holds where the server allows it.

    Raises:
        OSError: the address does not answer, or the connection broke (`part` is kept for the next run).
        click.ClickException: no http, https or file address.
    """
    if not url.startswith(("http://", "https://", "file://")):
        raise click.ClickException(f"{url}: give an http, https or file address")
    have = part.stat().st_size if part.exists() else 0
    try:
        _receive(url, part, have)
    except urllib.error.HTTPError as error:
        if not (have and error.code == 416):  # no bytes after those: another file, or a finished one
            raise OSError(f"{url}: {error}") from error
        _receive(url, part, 0)
    except urllib.error.URLError as error:
        raise OSError(f"{url}: {error.reason}") from error


def _receive(url: str, part: Path, have: int) -> None:
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
        have = have if answer.status == 206 else 0
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length else None
        name = url.rsplit("/", 1)[-1]
        with (
            part.open("ab" if have else "wb") as file,
            tqdm.wrapattr(answer, "read", total, desc=name, initial=have) as source,
        ):
            shutil.copyfileobj(source, file, CHUNK)
    if total is not None and part.stat().st_size != total:
        raise OSError(f"{url}: connection broke after {part.stat().st_size} of {total} bytes; run again to go on")


def sha1_of(path: Path) -> str:
    """SHA-1 of a file as 40 hex digits."""
    digest = hashlib.sha1(usedforsecurity=False)
    with (
        path.open("rb") as file,
        tqdm.wrapattr(file, "read", path.stat().st_size, desc=f"SHA-1 of {path.name}") as source,
    ):
        while chunk := source.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------- unpack


@dataclass(frozen=True)
class Member:
    """A file in an archive; size in bytes."""

    name: str
    size: int
    open: Callable[[], BinaryIO]


@contextlib.contextmanager
def open_members(path: Path) -> Iterator[list[Member]]:
    """The files of a zip or tar archive in the order in which they lie there, or those below a folder.

    Raises:
        click.ClickException: a member would leave the folder, or is a link or a device.
    """
    with contextlib.ExitStack() as stack:
        if path.is_dir():
            members = _folder_members(path)
        elif zipfile.is_zipfile(path):
            members = _zip_members(stack.enter_context(zipfile.ZipFile(path)), path)
        elif tarfile.is_tarfile(path):
            members = _tar_members(stack.enter_context(tarfile.open(path)), path)
        else:
            raise click.ClickException(f"{path} is neither a zip nor a tar archive: download it again")
        for member in members:
            if not is_inside(member.name):
                raise click.ClickException(f"{path} refused: its member {member.name!r} would leave the folder")
        yield members


def _folder_members(folder: Path) -> list[Member]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [
        Member(path.relative_to(folder).as_posix(), path.stat().st_size, functools.partial(path.open, "rb"))
        for path in files
    ]


def _zip_members(archive: zipfile.ZipFile, path: Path) -> list[Member]:
    files = [info for info in archive.infolist() if not info.is_dir()]
    for info in files:
        if stat.S_ISLNK(info.external_attr >> 16):
            raise click.ClickException(f"{path} refused: its member {info.filename!r} is a link")
    return [Member(info.filename, info.file_size, functools.partial(archive.open, info)) for info in files]


def _tar_members(archive: tarfile.TarFile, path: Path) -> list[Member]:
    files = [info for info in archive.getmembers() if not info.isdir()]
    for info in files:
        if not info.isreg():
            raise click.ClickException(f"{path} refused: its member {info.name!r} is a link or a device")
    return [Member(info.name, info.size, functools.partial(archive.extractfile, info)) for info in files]


def is_inside(name: str) -> bool:
    """Return whether a member of this name stays below the folder, on any system."""
    windows = PureWindowsPath(name)  # splits at / and at \
    return not (PurePosixPath(name).is_absolute() or windows.drive or windows.root or ".." in windows.parts)


def unpack(
    archive: Path,
    folder: Path,
    place: Callable[[str], str | None],
    convert: Callable[[BinaryIO], np.ndarray] | None = None,
) -> None:
    """Write the members of an archive below a folder.

    Args:
        archive: zip, tar, or a folder, whose files are its members.
        folder: of the data set.
        place: name of a member -> its path below `folder`; None: it is left out.
        convert: makes a label map of a member; None: members are written as they are.

    Raises:
        click.ClickException: no such member, an unsafe one, or a file of another size in the place of one.
    """
    with open_members(archive) as members:
        places = [(member, place(member.name)) for member in members]
        jobs = [(member, folder / found) for member, found in places if found]
        if not jobs:
            raise click.ClickException(f"{archive} holds none of the expected files: is it the right archive?")
        todo = [(member, target) for member, target in jobs if not _is_done(target, member, convert is not None)]
        for member, target in tqdm(todo, desc=f"unpack {archive.name}", unit="file", disable=not todo):
            with member.open() as stream:
                if convert:
                    write_label_map(convert(stream), target)
                else:
                    with atomic(target) as part, part.open("wb") as file:
                        shutil.copyfileobj(stream, file, CHUNK)


def _is_done(target: Path, member: Member, converted: bool) -> bool:
    if is_empty(target):
        return member.size == 0 and target.exists()
    if not converted and target.stat().st_size != member.size:
        raise click.ClickException(f"{target} exists and differs from the archive's: move it away")
    return True


# ---------------------------------------------------------------------------------------------- files


def is_empty(path: Path) -> bool:
    """Return whether there is nothing at `path`, or a file without content, as an interrupted tool leaves it."""
    return not path.exists() or path.stat().st_size == 0


def write_label_map(labels: np.ndarray, target: Path) -> None:
    """labels: (H, W) uint8, written as a grey PNG"""
    with atomic(target) as part:
        Image.fromarray(labels).save(part, format="PNG")


def read_label_map(stream: BinaryIO | Path) -> np.ndarray:
    """(H, W) uint8 of a grey or palette PNG"""
    with Image.open(stream) as image:
        if image.mode not in ("L", "P"):
            raise OSError(f"{getattr(stream, 'name', stream)}: a label map of mode {image.mode}, expected L or P")
        return np.array(image)


def label_table(mapping: dict[int, int], other: int) -> np.ndarray:
    """(256,) uint8: new label of every old one; `other` for those that `mapping` does not name"""
    table = np.full(256, other, dtype=np.uint8)
    table[list(mapping)] = list(mapping.values())
    return table


# ---------------------------------------------------------------------------------------------- checks


def has(folder: Path, place: Callable[[str], str | None]) -> bool:
    """Return whether files that `place`, as in `unpack`, takes lie below a folder."""
    return any(place(path.relative_to(folder).as_posix()) for path in folder.rglob("*") if path.is_file())


def is_complete(folder: Path, counts: dict[str, int]) -> bool:
    """Return whether below `folder` every glob pattern finds at least so many files that are not empty."""
    return all(sum(path.stat().st_size > 0 for path in folder.glob(pattern)) >= n for pattern, n in counts.items())


def require_pairs(images: Path, image_suffix: str, labels: Path, label_suffix: str) -> None:
    """Print the number of photographs in the folder of a split.

    Raises:
        click.ClickException: one has no label map.
    """
    names = [path.relative_to(images).as_posix() for path in images.rglob(f"*{image_suffix}")]
    names = [name.removesuffix(image_suffix) for name in names]
    missing = sorted(name for name in names if is_empty(labels / f"{name}{label_suffix}"))
    if missing:
        raise click.ClickException(
            f"{len(missing)} of {len(names)} photographs in {images} have no label map in {labels}, e.g. {missing[0]}"
        )
    click.echo(f"{images}: {len(names)} photographs with label maps")
