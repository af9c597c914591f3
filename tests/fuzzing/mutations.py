"""Seeded damage to files: what hands, disks, copies and other programs do to what lamella has to read."""

import copy
import csv
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from pyarrow import ArrowException
from safetensors.torch import load_file, save_file
from torch import Tensor

Pick = random.Random
Mutation = Callable[[Path, Pick], str]  # changes a file, and says how

# What stands in files in place of what belongs there: other kinds, limits, and words that look like values.
STRANGE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 10**9, 2**63, -(2**31), 0.5, -0.0, 1e-300, 1e308, float("nan"), float("inf"), 2.0,
    "", "None", "true", "yes", "false", "4", "0.5", "nan", "((", "../..", "a\x00b", "default", "ä\u202e\U0001f9ff",
    [], [1], [None], ["query"], {}, {"a": 1}, [[]], [True],
)  # fmt: skip
_DTYPES = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64)


def truncated(path: Path, pick: Pick) -> str:
    content = path.read_bytes()
    length = pick.randrange(max(len(content), 1))
    path.write_bytes(content[:length])
    return f"cut after {length} of {len(content)} bytes"


def bit_flipped(path: Path, pick: Pick) -> str:
    content = bytearray(path.read_bytes())
    # half of them at the beginning, where most formats keep what the rest means
    place = pick.randrange(min(len(content), 400) if pick.random() < 0.5 else len(content))
    content[place] ^= 1 << pick.randrange(8)
    path.write_bytes(content)
    return f"bit flipped in byte {place}"


def deleted(path: Path, pick: Pick) -> str:
    path.unlink()
    return "deleted"


def emptied(path: Path, pick: Pick) -> str:
    path.write_bytes(b"")
    return "emptied"


def a_folder(path: Path, pick: Pick) -> str:
    path.unlink()
    path.mkdir()
    return "a folder in its place"


def overwritten(path: Path, pick: Pick) -> str:
    content = pick.choice((b"\x00" * 64, b"\xff\xfe\x00", b"<html>404</html>", b"[]", b"null", b"version https://git"))
    path.write_bytes(content)
    return f"overwritten with {content[:8]!r}"


def swapped(path: Path, pick: Pick) -> str:
    others = sorted(other for other in path.parent.iterdir() if other.is_file() and other != path)
    if not others:
        return overwritten(path, pick)
    other = pick.choice(others)
    shutil.copy(other, path)
    return f"{other.name} in its place"


BYTES: tuple[Mutation, ...] = (truncated, bit_flipped, deleted, emptied, a_folder, overwritten, swapped)


def tree_changed(tree: Any, pick: Pick) -> tuple[Any, str]:
    """A tree of mappings and lists, with one thing in it changed."""
    tree = copy.deepcopy(tree)
    holder, key = pick.choice(list(_places(tree)))
    change = pick.choice(("deleted", "retyped", "retyped", "retyped", "renamed", "added", "scaled"))
    said = f"{key!r} {change}"
    if change == "deleted" or (change == "renamed" and isinstance(holder, list)):
        del holder[key]
    elif change == "renamed":
        name = pick.choice((f"{key}s", str(key).upper(), str(key)[:-1]))
        holder[name] = holder.pop(key)
        said += f" to {name!r}"
    elif change == "added" and isinstance(holder, dict):
        holder[pick.choice(("rank", "x", "", "num_expert", "adapters_"))] = pick.choice(STRANGE)
    elif change == "scaled" and isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
        holder[key] = pick.choice((holder[key] + 1, holder[key] * 2, -holder[key], holder[key] / 2, str(holder[key])))
        said += f" to {holder[key]!r}"
    else:
        holder[key] = pick.choice(STRANGE)
        said += f" to {holder[key]!r}"
    return tree, said


def _places(tree: Any) -> Any:
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in entries:
        yield tree, key
        yield from _places(value)


def json_changed(path: Path, pick: Pick) -> str:
    tree, said = tree_changed(json.loads(path.read_text(encoding="utf-8")), pick)
    path.write_text(json.dumps(tree), encoding="utf-8")
    return said


def yaml_changed(path: Path, pick: Pick) -> str:
    tree, said = tree_changed(yaml.safe_load(path.read_text(encoding="utf-8")), pick)
    path.write_text(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return said


def text_changed(path: Path, pick: Pick) -> str:
    """One line of a text lost, doubled, moved, cut, or with a character in it changed."""
    lines = path.read_text(encoding="utf-8").split("\n")
    at = pick.randrange(len(lines))
    change = pick.choice(("lost", "doubled", "cut", "character", "quote", "indented"))
    if change == "lost":
        del lines[at]
    elif change == "doubled":
        lines.insert(at, lines[at])
    elif change == "cut":
        lines[at] = lines[at][: len(lines[at]) // 2]
    elif change == "indented":
        lines[at] = "  " + lines[at]
    else:
        place = pick.randrange(len(lines[at]) + 1)
        added = '"' if change == "quote" else pick.choice(":{}[],\t\r\x00\u2028'#&*!|>%@`-?")
        lines[at] = lines[at][:place] + added + lines[at][place + pick.randrange(2) :]
    path.write_text("\n".join(lines), encoding="utf-8", newline="")
    return f"line {at} {change}"


def lines_of_json_changed(path: Path, pick: Pick) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    at = pick.randrange(len(lines))
    row, said = tree_changed(json.loads(lines[at]), pick)
    lines[at] = json.dumps(row)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"line {at}: {said}"


def csv_changed(path: Path, pick: Pick) -> str:
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    at = pick.randrange(len(rows))
    row, said = tree_changed(rows[at], pick)
    rows[at] = row if isinstance(row, list) else [row]
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    return f"line {at}: {said}"


def parquet_changed(path: Path, pick: Pick) -> str:
    table = pd.read_parquet(path)
    column = pick.choice(list(table.columns))
    change = pick.choice(("dropped", "renamed", "one strange", "as text", "all None", "doubled rows", "no rows"))
    if change == "dropped":
        table = table.drop(columns=column)
    elif change == "renamed":
        table = table.rename(columns={column: f"{column}_"})
    elif change == "one strange":
        kinds = {"text": (None, "", " ", "x"), "label": (None, -1, 7, 2**40)}
        values = table[column].astype(object)
        values.iloc[pick.randrange(len(values))] = pick.choice(kinds.get(column, (None, 0)))
        table[column] = values
    elif change == "as text":
        table[column] = table[column].astype(str)
    elif change == "all None":
        table[column] = None
    else:
        table = pd.concat([table, table]) if change == "doubled rows" else table.iloc[:0]
    try:
        table.to_parquet(path)
    except (ArrowException, OverflowError):  # one column of several kinds, which the format cannot hold
        return emptied(path, pick)
    return f"column {column!r}: {change}"


def tensors_changed(path: Path, pick: Pick) -> str:
    tensors: dict[str, Tensor] = load_file(path)
    name = pick.choice(sorted(tensors))
    tensor = tensors[name]
    change = pick.choice(
        ("dropped", "added", "renamed", "retyped", "retyped", "reshaped", "a hole", "a hole", "one more")
    )
    said = f"{name} {change}"
    if change == "dropped":
        del tensors[name]
    elif change == "added":
        place = pick.choice((f"{name}.more", f"more.{name}", name.replace("layer.0", "layer.9") + "_", "x"))
        place = pick.choice((place, "base_model.model.bert.encoder.layer.0.attention.self.query.weight"))
        tensors[place] = tensor.clone()
        said += f" as {place}"
    elif change == "renamed":
        tensors[name.replace("layer.0", "layer.7") + "_"] = tensors.pop(name)
    elif change == "retyped":
        dtype = pick.choice(_DTYPES)
        tensors[name] = tensor.to(dtype)
        said += f" to {dtype}"
    elif change == "reshaped":
        tensors[name] = pick.choice((tensor[None], tensor.flatten()[:-1], tensor.flatten()[:0], tensor.reshape(-1, 1)))
    elif change == "a hole":
        value = pick.choice((float("nan"), float("inf"), -float("inf")))
        flat = tensor.clone().flatten()
        flat[pick.randrange(max(len(flat), 1))] = value if tensor.is_floating_point() else 1
        tensors[name] = flat.reshape(tensor.shape)
        said += f" of {value}"
    else:
        tensors[name] = tensor + 1
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata={"format": "pt"})
    return said


_BY_SUFFIX: dict[str, tuple[Mutation, ...]] = {
    ".json": (json_changed,), ".yaml": (yaml_changed, text_changed), ".safetensors": (tensors_changed,),
    ".jsonl": (lines_of_json_changed, text_changed), ".csv": (csv_changed, text_changed),
    ".parquet": (parquet_changed,),
}  # fmt: skip


def damage(file: Path, pick: Pick) -> str:
    """Changes a file in one way, three times of four as one who knows its format, else as bytes; says how."""
    own = _BY_SUFFIX.get(file.suffix, ())
    mutation = pick.choice(own if own and pick.random() < 0.75 else BYTES)
    return f"{file.name}: {mutation(file, pick)}"
