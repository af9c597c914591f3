"""A grid of pictures inside the page, a row per prompt and a column per way to draw it."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lamella.errors import LamellaError
from lamella.lab.report.sections import draw, section

if TYPE_CHECKING:
    from markupsafe import Markup

    from lamella.lab.report.report import Report


Picture = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class PictureGrid:
    """Pictures to lay out.

    Attributes:
        prompts: a row each.
        columns: by name, each with a picture per prompt: ``(H, W, 3)``, from 0 to 255.
        caption: what the grid shows.
    """

    prompts: Sequence[str]
    columns: Mapping[str, Sequence[Picture]]
    caption: str


@dataclass(frozen=True)
class GridView:
    """The grid as the page draws it: per prompt, each picture's source and its words for who cannot see it."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]


def picture_view(grid: PictureGrid) -> GridView:
    """Puts every picture into the page itself, as a PNG.

    Raises:
        LamellaError: no prompt or column, a column without a picture for each prompt, or an array of another form than
            a picture's.
    """
    if not grid.prompts or not grid.columns:
        raise LamellaError(f"The grid '{grid.caption}' needs a prompt and a column at least.")
    for name, pictures in grid.columns.items():
        if len(pictures) != len(grid.prompts):
            raise LamellaError(
                f"The column {name!r} of '{grid.caption}' has {len(pictures)} pictures for {len(grid.prompts)} prompts."
            )
    rows = (
        (prompt, tuple((_source(pictures[at]), f"{name}: {prompt}") for name, pictures in grid.columns.items()))
        for at, prompt in enumerate(grid.prompts)
    )
    return GridView(grid.caption, tuple(grid.columns), tuple(rows))


def _source(picture: Any) -> str:
    """A picture as a data URI."""
    from PIL import Image

    pixels = np.asarray(picture)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise LamellaError(
            f"A picture is an array (H, W, 3) of whole numbers from 0 to 255 (uint8); this one is {pixels.shape} of "
            f"{pixels.dtype}."
        )
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


@section("Pictures", 10, pictures=True)
def pictures_section(report: Report) -> Markup | None:
    """What was drawn from which prompts."""
    return None if report.pictures is None else draw("pictures", picture_view(report.pictures))
