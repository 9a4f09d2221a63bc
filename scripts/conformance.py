"""Hold every case of conformance vectors against this project's own functions.

python scripts/conformance.py tests/data/*.safetensors
"""

import re
import sys
from collections import Counter
from pathlib import Path

import click
import conformance_chain
import conformance_clustvit
import conformance_segmenter
import conformance_steps
from conformance_common import Case, DoesNotHoldError, Vectors
from tqdm import tqdm

from segm.cli import Command

KNOWN = re.compile(  # first parts of names: inputs, and what is held against them
    r"n\d+|x\d+|xrect|xslide|pure|graph|algm|tome|tofu|pitome|mctf|crossget|fpet|diffrate|dct|atc|dtem|ltmp|chain|seq|vit|labels|loss"
)
KINDS = (conformance_segmenter, conformance_steps, conformance_chain, conformance_clustvit)


def find_cases(file: Path) -> list[Case]:
    """The cases of a file.

    Raises:
        FileNotFoundError, ValueError: it cannot be read, or holds none.
    """
    vectors = Vectors(file)
    cases = [case for kind in KINDS for case in kind.cases(vectors)]
    unknown = sorted({name.split(".")[0] for name in vectors if not KNOWN.fullmatch(name.split(".")[0])})
    if unknown or not cases:
        what = ", ".join(unknown) or "nothing"
        raise ValueError(f"{file} holds {what}, which no check knows: see the formats beside the vectors")
    return cases


def failure(case: Case) -> str | None:
    """Why a case does not hold; None: it does."""
    try:
        case.check()
    except DoesNotHoldError as error:
        return str(error)
    except (KeyError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


@click.command(cls=Command)
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
def main(files: tuple[Path, ...]) -> None:
    """Check every case in FILES, .safetensors files of conformance vectors.

    Prints how many cases of each family hold, and each that does not; then the status is not 0. A Segmenter's vectors
    need its checkpoint.pth and variant.yml beside them.
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
