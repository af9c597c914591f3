"""An adapter folder: its files by themselves, the base it is for, tensors one to one, and the load itself."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor, nn

from lamella.adapters import has_weights_of, located, published_name
from lamella.diagnostics.running import clone, transformer
from lamella.diagnostics.weights import examine_numbers, examine_targets
from lamella.errors import LamellaError, UnreadableError
from lamella.files import read_json, read_tensors
from lamella.findings import Examination
from lamella.tuners.config import LamellaConfig
from lamella.tuners.loading import shape_of

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_WEIGHT_NAMES = ("adapter_model", "pytorch_model", "model")
_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
_ELSEWHERE = "load it on the base it was trained on: give that one as base, or correct base_model_name_or_path"


@dataclass(frozen=True)
class AdapterFiles:
    """What a folder holds, so far as it could be read."""

    config: PeftConfig | None
    tensors: dict[str, Tensor] | None


def examine_files(folder: Path, examination: Examination) -> AdapterFiles:
    """Reads config and weights of an adapter folder.

    Raises:
        UnreadableError: the config is not a JSON object, so this is not an adapter.
    """
    _examine_pickles(folder, examination)
    config = _config(folder, examination)
    tensors = _tensors(folder, examination)
    if tensors is not None:
        examine_numbers(tensors, WEIGHTS, examination)
        if isinstance(config, LoraConfig):
            _examine_effect(tensors, examination)
    return AdapterFiles(config, tensors)


def _examine_effect(tensors: Mapping[str, Tensor], examination: Examination) -> None:
    """Looks for a LoRA that adds nothing, as before its first step of training."""
    up = [name for name in tensors if ".lora_B." in name or ".lora_embedding_B" in name]
    beside = [name for name in tensors if ".lora_" not in name]
    if up and not beside and not any(bool(tensors[name].any()) for name in up):
        examination.warning(
            "adds-nothing",
            f"B is zero in all {len(up)} modules",
            up,
            "the model does what its base does: nothing was trained, or what was trained was not saved",
            "train it, or look for the checkpoint that was",
        )
    examination.saw(f"effect: B of {len(up)} modules")


def _examine_pickles(folder: Path, examination: Examination) -> None:
    pickles = [
        path.name
        for path in sorted(folder.iterdir())
        if path.suffix in _PICKLES and path.stem.startswith(_WEIGHT_NAMES)
    ]
    if pickles:
        examination.error(
            "pickle-weights",
            "weights are stored as pickle",
            pickles,
            "a pickle can run any code when it is opened",
            f"load them where you trust them, save_pretrained again as {WEIGHTS}, and delete these files",
        )
    examination.saw(f"pickled weights: {len(pickles)} file(s)")


def _config(folder: Path, examination: Examination) -> PeftConfig | None:
    kind = read_json(folder / CONFIG).get("peft_type")
    if str(kind) not in PEFT_TYPE_TO_CONFIG_MAPPING:
        near = difflib.get_close_matches(str(kind), [str(one.value) for one in PEFT_TYPE_TO_CONFIG_MAPPING], n=1)
        examination.error(
            "method-unknown",
            f"peft_type is {kind!r}" + (f" (did you mean {near[0]!r}?)" if near else ""),
            CONFIG,
            "nothing that is installed here can load the adapter",
            "correct peft_type, or install the package that wrote the adapter",
        )
        return None
    known = {field.name for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[str(kind)])}
    values = PeftConfig.from_json_file(str(folder / CONFIG))  # under the names that keys have today
    unknown = sorted(set(values) - known)
    if unknown:
        _report_unknown(unknown, known, values, examination)
        return None
    examination.saw(f"{CONFIG}: {len(values)} keys, all known")
    try:
        return PeftConfig.from_pretrained(str(folder))
    except _refusals(PEFT_TYPE_TO_CONFIG_MAPPING[str(kind)]) as error:
        examination.error(
            "config-invalid",
            f"a value cannot be used: {error}",
            CONFIG,
            "the adapter cannot be loaded",
            "correct the value",
        )
        return None


def _refusals(method: type[PeftConfig]) -> type[Exception]:
    """What is raised over a method's files: lamella's methods say what is wrong, and anything else is a mistake there.

    PEFT's own take values of any type, and their layers raise whatever comes.
    """
    return LamellaError if issubclass(method, LamellaConfig) else Exception


def _report_unknown(unknown: list[str], known: set[str], values: dict[str, Any], examination: Examination) -> None:
    near = {key: difflib.get_close_matches(key, known, n=1) for key in unknown}
    said = [f"{key!r}" + (f" (did you mean {near[key][0]!r}?)" if near[key] else "") for key in unknown]
    writer = values.get("lamella_version") or values.get("peft_version")
    examination.error(
        "config-key-unknown",
        f"{', '.join(said)} is unknown to {values['peft_type']}" + (f"; written by version {writer}" if writer else ""),
        CONFIG,
        "a setting that is not read has no effect: the adapter would not be what was trained",
        "correct the key, or use the version that wrote the file",
    )


def _tensors(folder: Path, examination: Examination) -> dict[str, Tensor] | None:
    path = folder / WEIGHTS
    if not path.is_file():
        examination.error(
            "weights-missing",
            f"there is no {WEIGHTS}",
            folder.name,
            "there is nothing to load: PEFT would use freshly drawn weights or stop",
            "save the adapter again with save_pretrained",
        )
        return None
    try:
        return read_tensors(path)
    except UnreadableError as error:
        examination.error(
            "weights-unreadable",
            str(error),
            WEIGHTS,
            "it was cut short or damaged, and the adapter cannot be loaded",
            "copy or save it again",
        )
        return None


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter's files, whole and readable."""

    folder: Path
    config: PeftConfig
    tensors: dict[str, Tensor]

    @classmethod
    def read(cls, folder: Path) -> SavedAdapter:
        """What lies in the folder.

        Raises:
            LamellaError: what `examine_files` calls an error.
        """
        examination = Examination()
        files = examine_files(folder, examination)
        _refuse_faults(folder, examination)
        assert files.config is not None  # else there was a fault
        assert files.tensors is not None
        return cls(folder, files.config, files.tensors)

    def on(self, base: nn.Module) -> PeftModel:
        """Loaded on its base, in evaluation mode: every tensor of the file, and none left as it was drawn.

        Raises:
            LamellaError: it does not fit the base, or a tensor is missing or has no place there.
        """
        examination = Examination()
        files = AdapterFiles(self.config, self.tensors)
        with warnings.catch_warnings():  # what PEFT warns of is an error here, and one sentence
            warnings.filterwarnings("ignore", "Found missing adapter keys")
            model = load_adapter(self.folder, files, base, examination, trainable=False)
        if model is not None:
            # an embedding that was saved with the adapter is the base's own parameter
            embedded = {name: tensor for name, tensor in model.state_dict().items() if name in self.tensors}
            _compare({**embedded, **_state(model)}, self.tensors, examination)
        _refuse_faults(self.folder, examination)
        assert model is not None  # else there was a fault
        return model.eval()


def _refuse_faults(folder: Path, examination: Examination) -> None:
    for fault in examination.diagnosis().findings:
        raise LamellaError(
            f"The adapter in {folder} cannot be used: {fault.what} ({fault.where}). {fault.fix[0].upper()}"
            f"{fault.fix[1:]}. `lamella doctor` says what else is wrong with it."
        )


def load_base(config: PeftConfig, tensors: Mapping[str, Tensor], name: str) -> nn.Module:
    """The model an adapter is for, with the head whose size the adapter's tensors tell.

    Args:
        config: the adapter's.
        tensors: the adapter's.
        name: a demo model, a hub id or a folder.

    Raises:
        LamellaError: it cannot be loaded.
    """
    loader, options = _class(config), {}
    if config.task_type in ("SEQ_CLS", "TOKEN_CLS") and (labels := head_size(tensors)):
        options["num_labels"] = labels
    path = located(name)
    revision = config.revision if name == config.base_model_name_or_path else None
    try:
        model: nn.Module = loader.from_pretrained(path, revision=revision, trust_remote_code=False, **options)
    except Exception as error:  # transformers alone runs here, and damaged files make it raise anything
        first_line = str(error).strip().split("\n")[0]
        raise LamellaError(f"The base model {name!r} could not be loaded: {first_line}") from error
    return model


def head_size(tensors: Mapping[str, Tensor]) -> int | None:
    """Rows of the last layer of the saved head, None without one; a head's inner layers are wider."""
    heads = [
        t for name, t in tensors.items() if name.endswith("weight") and {"classifier", "score"} & set(name.split("."))
    ]
    return min((int(head.shape[0]) for head in heads), default=None)


def examine_name(config: PeftConfig, base: nn.Module, examination: Examination) -> None:
    """Compares the base named in the adapter's config with the model it is examined on."""
    named, ours = (
        published_name(name or "") for name in (config.base_model_name_or_path, getattr(base, "name_or_path", ""))
    )
    if not named or not ours:
        examination.saw("base: loaded without a name, so that it was compared by its shapes alone")
        return
    same = named == ours or has_weights_of(transformer(base), named, config.revision)
    if not (_same(named, ours) if same is None else same):
        examination.warning(
            "base-differs",
            f"the adapter was saved for {named}, and is examined on {ours}",
            f"base_model_name_or_path in {CONFIG}",
            "on other weights of the same shapes an adapter loads without a word and answers nonsense",
            _ELSEWHERE,
        )
    examination.saw(f"base: {ours}, by name and shapes (its weights have no fingerprint in the adapter)")


def examine_fit(files: AdapterFiles, base: nn.Module, examination: Examination) -> bool:
    """Compares the names and shapes of the tensors with what the config makes on this base; True where they fit."""
    assert files.config is not None
    assert files.tensors is not None
    before = len(examination.findings)
    examine_targets(base, files.config, "default", examination)
    if len(examination.findings) > before:
        return False
    try:
        expected = get_peft_model_state_dict(_adapted(clone(base, on_meta=True), files.config))
    except _refusals(type(files.config)) as error:
        _report_misfit(f"the adapter cannot be put on {type(base).__name__}: {error}", CONFIG, examination)
        return False
    _compare(expected, files.tensors, examination)
    return len(examination.findings) == before


def load_adapter(
    folder: Path, files: AdapterFiles, base: nn.Module, examination: Examination, *, trainable: bool = True
) -> PeftModel | None:
    """Loads the folder as a user would, and compares it; None where it cannot be loaded."""
    assert files.config is not None
    trainable = trainable and not files.config.is_prompt_learning
    try:
        model: PeftModel = PeftModel.from_pretrained(base, str(folder), is_trainable=trainable)
    except _refusals(type(files.config)) as error:
        lines = str(error).split("\n")[:2]  # the first of torch's only announces the others
        said = " ".join(line.strip() for line in lines) or type(error).__name__
        _report_misfit(f"it cannot be loaded on {type(base).__name__}: {said}", folder.name, examination)
        return None
    examine_loaded_tensors(model, files, examination)
    return model


def examine_loaded_tensors(model: PeftModel, files: AdapterFiles, examination: Examination) -> None:
    """Compares every tensor of a loaded model with the file's, bit by bit."""
    assert files.tensors is not None
    loaded = model.state_dict() | _state(model)
    # PEFT widens half precision when it loads, which loses nothing
    unequal = [
        name
        for name, tensor in files.tensors.items()
        if name not in loaded or not bool((loaded[name].cpu() == tensor.to(loaded[name].dtype)).all())
    ]
    if unequal:
        examination.error(
            "saved-unequal",
            f"{len(unequal)} tensors of the loaded model are not those of the file",
            unequal,
            "the model in use is not the model that was saved",
            "load it with lamella and PEFT of the versions in adapter_config.json, and report this",
        )
    base = type(transformer(model)).__name__
    examination.saw(f"loaded on {base}: {len(files.tensors)} tensors compared bit by bit with the file")


def _state(model: PeftModel) -> dict[str, Tensor]:
    """The tensors that PEFT would save of the adapter; to find out whether embeddings grew, it would ask the hub."""
    state: dict[str, Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    return state


def _class(config: PeftConfig) -> Any:
    mapping = config.auto_mapping or {}
    if config.task_type is None and str(mapping.get("parent_library", "")).partition(".")[0] == "transformers":
        return getattr(importlib.import_module(mapping["parent_library"]), mapping["base_model_class"])
    return getattr(transformers, _CLASSES.get(str(config.task_type), "AutoModel"))


def _same(named: str, ours: str) -> bool:
    if named == ours:
        return True
    theirs, here = Path(named), Path(ours)
    if theirs.exists():
        return here.exists() and theirs.samefile(here)
    # saved on another machine: a demo model lies in another home there, under the same last names
    return theirs.is_absolute() and theirs.parts[-3:] == here.parts[-3:]


def _adapted(base: nn.Module, config: PeftConfig) -> PeftModel:
    return MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)(base, config)


def _compare(expected: Mapping[str, Tensor], actual: Mapping[str, Tensor], examination: Examination) -> None:
    missing, extra = sorted(set(expected) - set(actual)), sorted(set(actual) - set(expected))
    shapes = [
        f"{name} is {shape_of(actual[name])}, on this base {shape_of(tensor)}"
        for name, tensor in expected.items()
        if name in actual and shape_of(actual[name]) != shape_of(tensor)
    ]
    if shapes:
        _report_misfit(
            f"{len(shapes)} of {len(expected)} tensors have other shapes than on this base", shapes, examination
        )
    if missing and extra and not set(expected) & set(actual):
        _report_misfit("no tensor has the name that it has on this base", extra, examination)
        return
    if missing:
        examination.error(
            "tensor-missing",
            f"{len(missing)} of {len(expected)} tensors are missing",
            missing,
            "PEFT leaves what is missing as it was drawn at random, and the model is not the one that was trained",
            f"restore {WEIGHTS} from a copy, or save the trained model again",
        )
    if extra:
        examination.error(
            "tensor-extra",
            f"{len(extra)} tensors have no place in the model",
            extra,
            "PEFT drops them: something that was trained is not in the loaded model",
            f"restore {CONFIG} as it was saved (target_modules, num_experts, modules_to_save)",
        )
    examination.saw(f"tensors by name and shape: {len(actual)} in the file, {len(expected)} expected on this base")


def _report_misfit(what: str, where: str | list[str], examination: Examination) -> None:
    examination.error(
        "base-mismatch", what, where, "the adapter was trained on another model, or its config was changed", _ELSEWHERE
    )
