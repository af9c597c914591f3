"""Files and folders that are written whole or not at all."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path of the same name to write a file or a folder to; it takes the place of ``path`` if the block succeeds.

    The folder that ``path`` lies in is made where there is none.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as beside:
        unfinished = Path(beside) / path.name
        yield unfinished
        if path.is_dir() and unfinished.is_dir():
            shutil.rmtree(path)
        unfinished.replace(path)


def write_whole(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    with whole(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
