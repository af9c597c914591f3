"""Files and folders written atomically (complete or not at all), and the digest of what is read."""

import contextlib
import hashlib
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

UNFINISHED = ".writing-"  # how the names begin of what a killed process left half-written


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A path to write a file or a folder to; it takes the place of ``path`` if the block succeeds.

    It lies in the same folder, so that what names other files relative to its own place stays right. That folder is
    made where there is none.

    Raises:
        OSError: it could not be written (a full disk, say); it names ``path``, and what was there is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{UNFINISHED}{uuid.uuid4().hex[:12]}-{path.name}")
    try:
        yield unfinished
        if path.is_dir() and unfinished.is_dir():
            shutil.rmtree(path)
        unfinished.replace(path)
    except OSError as error:
        # an error without a file comes from a library that had just this one open
        if error.filename is not None and unfinished.name not in str(error.filename):
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        if unfinished.is_dir():
            shutil.rmtree(unfinished)
        unfinished.unlink(missing_ok=True)


def write_atomic(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    with atomic(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def sha256_of(*files: Path) -> str:
    """The SHA-256 of the files' bytes one after another, in hexadecimal, read piece by piece."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while piece := stream.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()
