"""The alignment of many pairs, tile by tile, each result on disk once."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lamella.backbones.loading import load_pretrained
from lamella.errors import LamellaError, optional_module
from lamella.progress import working
from lamella.similarity.activations import Capture
from lamella.similarity.alignment.on_ray import compute_on_ray
from lamella.similarity.alignment.run import align as align_pairs
from lamella.similarity.alignment.tiles import PAIRS, Load, Work, cut
from lamella.similarity.pairs import NAMES, Pair, all_pairs, check_pairs

if TYPE_CHECKING:
    import pandas as pd

_GIVEN_PER_TILE = ("capture", "model", "pairs", "score_on")


def sweep(
    capture: Capture,
    model: str | Path,
    out: Path,
    pairs: Iterable[Pair] | None = None,
    *,
    ray: str | None = None,
    score_on: Capture | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    tile_pairs: int = PAIRS,
    align: Callable[..., pd.DataFrame] = align_pairs,
    load: Load = load_pretrained,
    **settings: Any,
) -> pd.DataFrame:
    """`align` for any number of pairs: what is on disk already is not computed again.

    A tile is all pairs of some sources of one layer. Its result lies in ``out/tiles/KEY.parquet``, the key a hash of
    all that it depends on: captures (and through them model and text), settings and pairs. Tiles are computed in one
    thread each, so that the table is the same, byte for byte, wherever they are computed on CPUs of one kind.

    Args:
        capture: inputs of the experts.
        model: the captured model by hub id or path (or whatever ``load`` takes); every process loads it for itself.
        out: folder of the study.
        pairs: (source, target), each a (layer, expert); None takes all ordered pairs of captured experts.
        ray: address of a Ray cluster, "auto" for the one on this machine; None computes in this process.
        score_on: a capture of another text to score on.
        dtype: of the model.
        device: to compute on; on a cluster anything but "cpu" asks for one GPU for each tile.
        tile_pairs: pairs of a tile at most, where one source has not more.
        align: what aligns the pairs of a tile; it takes what `lamella.similarity.alignment.align` takes.
        load: from name and dtype to the model.
        settings: of ``align``: aligner, seed, steps, ...

    Returns:
        The rows of all tiles, sorted by pair, as `align` gives them.

    Raises:
        LamellaError: no pairs, a pair of an expert that was not captured, a setting that ``align`` does not have, or
            what loading, aligning or the cluster raises.
    """
    ordered = all_pairs(capture.experts) if pairs is None else check_pairs(pairs, capture.experts)
    if not ordered:
        raise LamellaError("There is no pair of experts to align: give at least one, or capture two experts or more.")
    captures = [capture] if score_on is None else [capture, score_on]
    work = Work(
        model=os.fspath(Path(model).resolve()) if Path(model).exists() else str(model),
        dtype=dtype,
        device=device,
        captures=tuple(one.folder.resolve() for one in captures),
        manifests=tuple(one.manifest for one in captures),
        settings=_resolve(align, settings),
        folder=out.resolve() / "tiles",
        align=align,
        load=load,
    )
    tiles = cut(ordered, tile_pairs)
    missing = [tile for tile in tiles if not work.path(tile).is_file()]
    with working("aligning", len(tiles), "tiles", done=len(tiles) - len(missing)) as under_way:
        if missing and ray is not None:
            compute_on_ray(work, missing, ray, under_way.advance)
        elif missing:
            opened = work.open()
            for tile in missing:
                opened.compute(work, tile)
                under_way.advance()
    return _join([work.path(tile) for tile in tiles])


def _resolve(align: Callable[..., Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with ``align``'s defaults, so that a key changes with a default."""
    known = inspect.signature(align).parameters
    defaults = {name: one.default for name, one in known.items() if name not in _GIVEN_PER_TILE}
    if unknown := sorted(set(settings) - set(defaults)):
        raise LamellaError(f"An alignment has no setting {unknown[0]!r}; it has {', '.join(sorted(defaults))}.")
    return {**defaults, **settings}


def _join(paths: list[Path]) -> pd.DataFrame:
    pd = optional_module("pandas", "A table of aligned pairs")

    frames = [pd.read_parquet(path) for path in paths]
    notes = [note for frame in frames for note in frame.attrs.get("notes", [])]
    filled = [frame for frame in frames if len(frame)]
    if not filled:
        raise LamellaError(f"No expert can be aligned: {'; '.join(notes)}. Capture more text, or of more documents.")
    rows = pd.concat(filled, ignore_index=True)
    table = rows.sort_values([*NAMES, "kind"], kind="stable", ignore_index=True)
    table.attrs = {"notes": notes}
    return table
