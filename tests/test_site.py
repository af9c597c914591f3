"""The documentation site, without building it: `make docs` does, and a warning is an error there."""

import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import lamella
from lamella.lab.methods.base import all_methods

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


def test_the_page_of_keys_has_every_key_of_runs_studies_and_tasks_and_what_it_means():
    spec = importlib.util.spec_from_file_location("keys", DOCS / "hooks" / "keys.py")
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    page = SimpleNamespace(file=SimpleNamespace(src_uri=hook.PAGE))
    written = hook.on_page_markdown((DOCS / hook.PAGE).read_text(encoding="utf-8"), page)
    parts = dict(part.split("\n", 1) for part in re.split(r"^##+ ", written, flags=re.MULTILINE)[1:])
    for title, model in hook.SECTIONS.items():
        assert [key for key, words in hook.described(model).items() if not words] == []
        assert re.findall(r"^\| `(\w+)` \|", parts[title], re.MULTILINE) == list(model.model_fields)
    for name, method in all_methods().items():
        own = [key for key in method.model_fields if key != "name"]
        assert re.findall(r"^\| `(\w+)` \|", parts[name], re.MULTILINE) == own
    assert "| `lr` | number > 0.0 | `0.002` | learning rate at its highest |" in parts["A run"]
    assert hook.on_page_markdown("as it is", SimpleNamespace(file=SimpleNamespace(src_uri="index.md"))) == "as it is"
