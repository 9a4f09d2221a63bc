"""The cases of a file of conformance vectors, and why one does not hold."""

import re
from pathlib import Path

import conformance_chain
import conformance_clustvit
import conformance_cubist
import conformance_expedit
import conformance_segmenter
import conformance_steps
from conformance_common import Case, DoesNotHoldError, Vectors

KNOWN = re.compile(  # first parts of names: inputs, and what is held against them
    r"n\d+|x\d+|xrect|xslide|pure|graph|algm|tome|tofu|pitome|mctf|crossget|fpet|diffrate|dct|atc|dtem|ltmp|chain|seq|vit|labels|loss"
    r"|cluster|reconstruct|line|grid"
)
KINDS = (
    conformance_segmenter,
    conformance_steps,
    conformance_chain,
    conformance_clustvit,
    conformance_expedit,
    conformance_cubist,
)


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
