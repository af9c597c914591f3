"""From a reference to the files it means. Pickles are refused before anything is opened."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lamella.adapters.source import Reference
from lamella.errors import LamellaError
from lamella.files import sha256_of

CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# Settings that say where a LoRA comes from, not what it does.
_NOT_COUNTED = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping")
_HUB_ID = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(/(?P<file>.+\.safetensors))?")


@dataclass(frozen=True)
class Files:
    """A LoRA on this machine.

    Attributes:
        weights: its tensors.
        config: PEFT's ``adapter_config.json`` beside them; None for a single file.
        reference: where it was found, with commit and digest.
        stem: a name for it, from its folder or file.
    """

    weights: Path
    config: Path | None
    reference: Reference
    stem: str


def locate(reference: Reference) -> Files:
    """Finds a LoRA's files, fetching them from the hub where the source is a hub id, and checks their digest.

    Raises:
        LamellaError: nothing is there, it is a pickle, it is not clear which file is meant, the hub cannot be reached,
            or the files are not those whose digest the reference states.
    """
    if reference.source.endswith(_PICKLES):
        raise LamellaError(_pickle(reference.source))
    here = Path(reference.source).expanduser()
    is_here = exists(here)
    if is_here:
        root, located = here, reference
    else:
        root, located = _fetch(reference)
    place = root / reference.subfolder if reference.subfolder else root
    weights, config = _choose(place, reference)
    digest = sha256_of(weights) if config is None else _digest(config, weights)
    if reference.sha256 is not None and reference.sha256 not in (digest, *_former_digests(config, weights)):
        raise LamellaError(
            f"{reference.source} has changed since the composition was trained: its SHA-256 is {digest}, and "
            f"{reference.sha256} was recorded. Restore the file, or point the reference to a copy of the one it was; "
            "routers trained for one LoRA say nothing about another."
        )
    stem = weights.stem if config is None and weights.name != DIFFUSERS_WEIGHTS else weights.parent.name
    if not is_here:
        stem = Path(reference.subfolder or reference.source).stem
    return Files(weights, config, replace(located, sha256=digest), stem)


def exists(path: Path) -> bool:
    """Whether there is something at a path, which may be what no file can be called."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _digest(config: Path, weights: Path) -> str:
    """Of a PEFT folder: its settings, laid out in one way, and its weights.

    Which base is named, and by which version, is not counted: a LoRA does the same on the same weights elsewhere.
    """
    settings = read_json(config)
    counted = {key: value for key, value in settings.items() if key not in _NOT_COUNTED}
    return sha256_of(weights, after=json.dumps(counted, sort_keys=True).encode())


def _former_digests(config: Path | None, weights: Path) -> Iterator[str]:
    """What versions before 0.2 recorded: the SHA-256 of the files as they are."""
    if config is not None:
        yield sha256_of(config, weights)


def read_json(config: Path) -> dict[str, Any]:
    """The settings of a PEFT folder.

    Raises:
        LamellaError: they are no JSON object.
    """
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LamellaError(f"{config} is not a JSON object: {error}. Restore it.") from error
    if not isinstance(settings, dict):
        raise LamellaError(f"{config} is not a JSON object. Restore it.")
    return settings


def _choose(place: Path, reference: Reference) -> tuple[Path, Path | None]:
    """The weights, and PEFT's config where there is one."""
    if place.is_file():
        if place.suffix != ".safetensors":
            raise LamellaError(f"{place} is not a .safetensors file. {_READ}")
        config = place.parent / CONFIG
        return place, config if place.name == PEFT_WEIGHTS and config.is_file() else None
    if not place.is_dir():
        raise LamellaError(f"{reference.source} has no {reference.subfolder!r}. {_READ}")
    if (place / CONFIG).is_file():
        weights = place / PEFT_WEIGHTS
        if not weights.is_file():
            pickle = next((p.name for p in sorted(place.iterdir()) if p.suffix in _PICKLES), None)
            raise LamellaError(
                _pickle(str(place / pickle)) if pickle else f"{place} has {CONFIG}, but no {PEFT_WEIGHTS}. {_READ}"
            )
        return weights, place / CONFIG
    candidates = sorted(place.glob("*.safetensors"))
    if len(candidates) == 1:
        return candidates[0], None
    inside = sorted(path.parent.relative_to(place).as_posix() for path in place.glob(f"*/{CONFIG}"))
    if not candidates and inside:
        which = "That is" if len(inside) == 1 else "Name one of"
        raise LamellaError(
            f"{place} holds no LoRA itself, but folders inside it do. {which} {', '.join(inside[:5])}: give "
            f"{place / inside[0]}, or subfolder={inside[0]!r}."
        )
    if candidates:
        names = ", ".join(path.name for path in candidates)
        raise LamellaError(f"{place} holds several files ({names}) and no {CONFIG}: name the file that is meant.")
    pickle = next((p.name for p in sorted(place.iterdir()) if p.suffix in _PICKLES), None)
    raise LamellaError(_pickle(str(place / pickle)) if pickle else f"{place} holds no LoRA. {_READ}")


def _fetch(reference: Reference) -> tuple[Path, Reference]:
    """The snapshot of a hub repository with the LoRA's files alone, or one file of it; and the commit it is."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    match = _HUB_ID.fullmatch(reference.source)
    if match is None:
        source = reference.source if len(reference.source) < 200 else f"{reference.source[:80]}..."
        raise LamellaError(f"{source!r} is not a file or folder here, and not a hub id. {_READ}")
    file = match["file"]
    lead = f"{reference.subfolder.strip('/')}/" if reference.subfolder else ""
    wanted = [file] if file else [CONFIG, PEFT_WEIGHTS, DIFFUSERS_WEIGHTS]
    patterns = [lead + name for name in wanted]
    try:
        folder = Path(snapshot_download(match["repository"], revision=reference.revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        first_line = str(error).strip().split("\n")[0]
        raise LamellaError(
            f"{reference.source!r} is not a file or folder here, and could not be fetched from the Hugging Face hub"
            f"{f' at revision {reference.revision!r}' if reference.revision else ''}: {first_line} Check the name, the "
            "revision and the network, or give a local path."
        ) from error
    if not any((folder / pattern).is_file() for pattern in patterns):
        raise LamellaError(
            f"{reference.source} on the Hugging Face hub has none of {', '.join(patterns)}"
            f"{f' at revision {reference.revision}' if reference.revision else ''}. Name its file, as in "
            f"{match['repository']}/FILE.safetensors, or its subfolder; pickles (.bin, .pt, .ckpt) are never loaded."
        )
    root = folder / file if file and not lead else folder
    return root, replace(reference, revision=folder.name)


def _pickle(name: str) -> str:
    return (
        f"{name} is a pickle, which can run any code when it is opened, so lamella never loads one. Convert it once to "
        "safetensors in an environment that you trust with it, for instance with safetensors.torch.save_file, and give "
        "that file."
    )


_READ = (
    f"A LoRA is a PEFT folder ({CONFIG} and {PEFT_WEIGHTS}), a .safetensors file in kohya's or diffusers' format, or "
    "a hub id with one of these."
)
