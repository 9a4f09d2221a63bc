"""Builds what is published, a source archive and the wheel that it gives, and checks both: `make release`."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Collection
from pathlib import Path
from tempfile import TemporaryDirectory

import click

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("patch/", "segm/", "vis/", "configs/")
SCRIPTS = ("scripts/prepare_", "scripts/check_dataset.py", "scripts/convert_checkpoint.py")
TEXTS = (".md", ".bib", ".cff")
BUILT_WITH = ("LICENSE", "MANIFEST.in", "pyproject.toml", "setup.py")


@click.command()
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), default="dist", show_default=True, help="Folder of both."
)
def main(out: Path) -> None:
    """Build source archive and wheel of the last commit, check what they hold, and print how to publish them."""
    if changed := git("status", "--porcelain"):
        raise click.ClickException(
            f"not as in the last commit: {len(changed)} files, such as {changed[0]}; commit them"
        )
    if out.exists() and any(out.iterdir()):
        raise click.ClickException(f"{out} is not empty: delete it, or choose another folder with --out")
    archive, wheel = build(out)
    if errors := [*wrong_in_archive(archive, git("ls-files")), *wrong_in_wheel(wheel, git("ls-files"))]:
        raise click.ClickException("; ".join(errors))
    version = wheel.name.split("-")[1]
    click.echo(f"{archive} and {wheel} hold what they should. Publish them:")
    click.echo(f"  git tag v{version} && git push origin v{version}")
    click.echo(f"  python -m twine upload {archive} {wheel}")


def git(*words: str) -> list[str]:
    """The lines that a git command prints here.

    Raises:
        click.ClickException: this is no checkout of git.
    """
    found = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    if found.returncode:
        raise click.ClickException(f"{ROOT} is no checkout of git: {found.stderr.strip()}")
    return found.stdout.splitlines()


def build(out: Path) -> tuple[Path, Path]:
    """Build the source archive of all files that git tracks, and the wheel from what the archive holds."""
    with TemporaryDirectory() as folder:
        copy = Path(folder, "copy")
        for name in git("ls-files"):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
        setup_py(copy, "sdist", out)
        (archive,) = out.glob("g2tm-*.tar.gz")
        with tarfile.open(archive) as files:
            files.extractall(folder, filter="data")
        setup_py(Path(folder, archive.name.removesuffix(".tar.gz")), "bdist_wheel", out)
    (wheel,) = out.glob("g2tm-*.whl")
    return archive, wheel


def setup_py(folder: Path, command: str, out: Path) -> None:
    """Run a command of setup.py in a folder.

    Raises:
        click.ClickException: it failed.
    """
    words = [sys.executable, "setup.py", "-q", command, "--dist-dir", str(out.resolve())]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(f"setup.py {command} failed: {done.stderr.strip()}")


def wrong_in_archive(archive: Path, tracked: Collection[str]) -> list[str]:
    """Say what an archive lacks, and what it holds besides: what the wheel is built of, without tests and results."""
    with tarfile.open(archive) as files:
        held = {one.name.partition("/")[2] for one in files.getmembers() if one.isfile()}
    wanted = {name for name in tracked if name.startswith(("g2tm/", *ROOMS, *SCRIPTS))}
    wanted |= {name for name in tracked if "/" not in name and name.endswith(TEXTS)} | {*BUILT_WITH}
    made = {name for name in held if name in ("PKG-INFO", "setup.cfg") or name.startswith("g2tm.egg-info/")}
    return different(archive.name, wanted, held - made)


def wrong_in_wheel(wheel: Path, tracked: Collection[str]) -> list[str]:
    """Say what a wheel lacks, and what it holds besides: it installs g2tm, with rooms and scripts below it."""
    with zipfile.ZipFile(wheel) as files:
        held = {name for name in files.namelist() if ".dist-info/" not in name}
    wanted = {name for name in tracked if name.startswith("g2tm/")}
    wanted |= {f"g2tm/{name}" for name in tracked if name.startswith(ROOMS + SCRIPTS)}
    return different(wheel.name, wanted, held)


def different(name: str, wanted: Collection[str], held: Collection[str]) -> list[str]:
    """Say what a file lacks, and what it holds besides."""
    return [
        *(f"{name} lacks {one}" for one in sorted({*wanted} - {*held})),
        *(f"{name} holds {one}, which does not belong there" for one in sorted({*held} - {*wanted})),
    ]


if __name__ == "__main__":
    main()
