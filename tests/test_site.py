"""The documentation site, without building it: `make docs` does, and a warning is an error there."""

import re
from pathlib import Path

import lamella

DOCS = Path(__file__).parents[1] / "docs"


def told(room):
    """The names of a room that a page of the reference has."""
    pages = "".join(page.read_text(encoding="utf-8") for page in sorted((DOCS / "api").glob("*.md")))
    return set(re.findall(rf"^::: {re.escape(room)}\.(\w+)$", pages, re.MULTILINE))


def test_every_public_name_is_in_the_reference():
    rooms = {"lab", "similarity", "__version__"}
    assert told("lamella") == set(lamella.__all__) - rooms
    assert told("lamella.similarity") == set(lamella.similarity.__all__)
    assert told("lamella.diffusion") | told("lamella") >= set(lamella.diffusion.__all__)
