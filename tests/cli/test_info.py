import json
from importlib.metadata import PackageNotFoundError

import pytest
from packaging.requirements import Requirement
from typer.testing import CliRunner

from lamella import version as versions
from lamella.cli import info as told
from lamella.cli.app import app
from lamella.version import __version__


@pytest.fixture
def asks(monkeypatch):
    """What the package asks for, and what is installed."""

    def of(lines, installed):
        def version(name):
            if name not in installed:
                raise PackageNotFoundError(name)
            return installed[name]

        monkeypatch.setattr(versions, "requires", lambda name: lines)
        monkeypatch.setattr(versions, "version", version)

    return of


LINES = [
    "torch>=2",
    'ray>=2.58; extra == "ray"',
    'lamella[lab]; extra == "demo"',
    'gguf; extra == "demo"',
    'rich>=13; extra == "lab"',
]


@pytest.mark.parametrize(
    ("extra", "installed", "lacking"),
    [
        ("ray", {}, ["ray>=2.58"]),
        ("ray", {"ray": "2.58.0"}, []),
        ("ray", {"ray": "2.50"}, ["ray>=2.58"]),
        ("ray", {"ray": "2.59.0.dev1"}, []),
        ("demo", {"gguf": "1"}, ["rich>=13"]),
        ("demo", {"rich": "14"}, ["gguf"]),
        ("demo", {"rich": "14", "gguf": "1"}, []),
    ],
)
def test_what_an_extra_lacks_is_named(asks, extra, installed, lacking):
    asks(LINES, installed)
    assert list(told.missing(extra)) == lacking


def test_every_public_extra_is_one_of_the_package():
    from importlib.metadata import metadata

    extras = set(metadata("lamella").get_all("Provides-Extra"))
    assert set(told._PUBLIC) <= extras
    assert all(Requirement(line) for line in metadata("lamella").get_all("Requires-Dist"))


def test_info_says_versions_and_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("LAMELLA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LAMELLA_DATA", raising=False)
    said = CliRunner().invoke(app, ["info"], obj=lambda: None).output
    assert said.startswith(f"lamella {__version__}\ntorch ")
    assert f"demo models and data (LAMELLA_CACHE): {tmp_path / 'cache'}" in said
    assert "task data (LAMELLA_DATA): not set" in said
    found = json.loads(CliRunner().invoke(app, ["info", "--json"], obj=lambda: None).output)
    assert found["packages"]["lamella"] == __version__
    assert set(found["extras"]) == set(told._PUBLIC)
