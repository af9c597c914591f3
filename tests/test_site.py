"""The documentation site, without building it: `make docs` does, and a warning is an error there."""

import re
from pathlib import Path

import lamella

DOCS = Path(__file__).parents[1] / "docs"


def test_every_public_name_is_in_the_reference():
    pages = "".join(page.read_text(encoding="utf-8") for page in sorted((DOCS / "api").glob("*.md")))
    told = set(re.findall(r"^::: lamella\.(\w+)$", pages, re.MULTILINE))
    rooms = {"lab", "similarity", "__version__"}
    assert told == set(lamella.__all__) - rooms
