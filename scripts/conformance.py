"""Hold every case of conformance vectors against this project's own functions; the checks lie in tests/conformance.

python scripts/conformance.py tests/data/*.safetensors
"""

import sys
from collections import Counter
from pathlib import Path

import click
from tqdm import tqdm

from segm.cli import Command

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests/conformance"))
from conformance_cases import failure, find_cases


@click.command(cls=Command)
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
def main(files: tuple[Path, ...]) -> None:
    """Check every case in FILES, .safetensors files of conformance vectors.

    Prints how many cases of each family hold, and each that does not; then the status is not 0. A Segmenter's vectors
    need its checkpoint.pth and variant.yml next to them.
    """
    cases = [case for file in files for case in find_cases(file)]
    held, failed = Counter[str](), {}
    for case in tqdm(cases, "cases", unit="case", leave=False):
        reason = failure(case)
        held[case.family] += reason is None
        if reason is not None:
            failed[case] = reason
    for family, number in Counter(case.family for case in cases).items():
        click.echo(f"{family}: {held[family]} of {number} hold")
    for case, reason in failed.items():
        click.echo(f"  {case.name}: {reason}")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
