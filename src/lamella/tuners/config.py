"""What the configs of all methods share: PEFT's fields, strictness about unknown keys, and faithful JSON."""

import difflib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from packaging.version import Version
from peft import LoraConfig, PeftConfig, TaskType

from lamella.errors import LamellaError, UnreadableError
from lamella.tuners.kinds import Alpha, Count, Share, fits, in_words
from lamella.version import FIRST_VERSION, __version__, defaults_of, is_version

Self = TypeVar("Self", bound="LamellaConfig")

# Keys that have a new name: refused where they are typed, mapped where they were saved.
RENAMED = {
    "balance_coef": "router_aux_loss_coef",
    "z_coef": "router_z_loss_coef",
    "init_weights": "init_lora_weights",
}

# Settings of PEFT's LoRA that no method of lamella has, and what to do instead.
INSTEAD = {
    "trainable_token_indices": "train the embedding whole, with modules_to_save",
    "ensure_weight_tying": "modules that modules_to_save does not name stay tied",
    "target_parameters": "only modules can be adapted, by target_modules",
    "rank_pattern": "all experts have one rank",
    "alpha_pattern": "all experts have one alpha",
    "bias": "biases stay as they are",
    "lora_bias": "experts have none",
    "use_dora": "experts are added, and no norms are trained",
}

# What a key means that a saved config lacks, where it is not today's default: by the last version that meant it, by
# peft_type, by key. Whoever moves a default writes the former one here.
FORMER_DEFAULTS: dict[str, dict[str, dict[str, Any]]] = {"0.2.0.dev1": {"LAMELLA_MOLE": {"router_scale": None}}}


@dataclass
class LamellaConfig(PeftConfig):
    """Base of lamella's configs.

    Args:
        target_modules: names or a regex of the linear modules to adapt, or "all-linear".
        exclude_modules: names or a regex of modules to leave alone.
        layers_to_transform: indices of the blocks to adapt, counted in their stack; all when None.
        layers_pattern: name of the stack, for ``layers_to_transform``.
        modules_to_save: modules outside the method that are trained and saved, such as a classifier.
        init_lora_weights: True starts with LoRAs that add nothing (B zero), so that MoLA starts at the base exactly
            and MoLEx at its blocks mixed by alpha; False draws B at random, for tests.
        base_experts: of which smaller model of ``lamella.similarity.compress`` it is, None for any other; filled in.
        lamella_version: the version that wrote the config; filled in.
    """

    target_modules: list[str] | set[str] | str | None = "all-linear"
    exclude_modules: list[str] | set[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    base_experts: str | None = None
    lamella_version: str | None = field(default=None)

    def __new__(cls: type[Self], *args: Any, **kwargs: Any) -> Self:
        # PEFT drops keys it does not know with a warning; here they are an error, before the constructor is reached.
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(kwargs) - known)
        if unknown:
            raise LamellaError(unknown_keys(cls.__name__, unknown, known, kwargs))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self.lamella_version = self.lamella_version or __version__
        for f in fields(self):
            if isinstance(value := getattr(self, f.name), tuple):
                setattr(self, f.name, list(value))
        self._check_kinds()  # before PEFT meets them
        self.check("lamella_version", is_version(self.lamella_version), f"a version, such as {__version__!r}")
        tasks = [task.value for task in TaskType]
        self.check("task_type", self.task_type is None or self.task_type in tasks, f"None, or one of {tasks}")
        check_patterns(self, type(self).__name__)
        for name in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, name), list):
                setattr(self, name, set(value))
        super().__post_init__()
        self.check(
            "layers_pattern",
            self.layers_pattern is None or self.layers_to_transform is not None,
            "given together with layers_to_transform: it says which stack those mean",
        )

    def check(self, name: str, holds: bool, expected: str) -> None:
        """Raises `LamellaError`, naming a setting and its value, unless what is expected of it holds."""
        if not holds:
            raise LamellaError(f"{name}={getattr(self, name)!r} must be {expected}.")

    def _check_kinds(self) -> None:
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            if name != "peft_type":  # of PEFT's own enum, by its hint
                self.check(name, fits(getattr(self, name), hint), in_words(hint))

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON knows it: sets become sorted lists, so that the same config is the same file."""
        values = {key: sorted(value) if isinstance(value, set) else value for key, value in super().to_dict().items()}
        return values | {"lamella_version": __version__}  # a config that an earlier one wrote is now in these words

    @classmethod
    def read_saved(cls, values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        """A saved config's values in the words and with the defaults of this version.

        Args:
            values: what its file says.
            folder: where the file lies.
        """
        renamed = {_new_name(key, values): value for key, value in values.items()}
        writer = values.get("lamella_version") or FIRST_VERSION
        if not is_version(writer):
            raise LamellaError(f"lamella_version={writer!r} in {folder} must be a version, such as {__version__!r}.")
        settings = {f.name for f in fields(cls)} - {f.name for f in fields(PeftConfig)}
        refuse_missing(settings - set(renamed) if writer == __version__ else (), f"lamella {__version__}", folder)
        return defaults_of(writer, FORMER_DEFAULTS, values["peft_type"]) | renamed | {"lamella_version": writer}


def refuse_missing(missing: Collection[str], writer: str, folder: Path) -> None:
    """Raises where keys are missing that a writer of the config in a folder always writes."""
    if missing:
        raise UnreadableError(
            f"The adapter_config.json in {folder} lacks {min(missing)!r}, which {writer} writes, and its default may "
            "be another value than what was trained. Restore the file from a copy."
        )


# What PEFT's hints leave open: its layers take any alpha.
_OF_LORA = {"r": Count, "lora_alpha": Alpha, "lora_dropout": Share, "rank_pattern": dict, "alpha_pattern": dict}


def check_lora(lora: LoraConfig) -> None:
    """Raises unless the settings of a LoRA are of the right kinds, of which PEFT's own config looks at few."""
    hints = get_type_hints(LoraConfig) | _OF_LORA
    given = {f.name: (getattr(lora, f.name), hints[f.name]) for f in fields(lora)}
    # PEFT's configs inside check themselves, and are dictionaries in JSON
    settings = {name: (v, hint) for name, (v, hint) in given.items() if name in _OF_LORA or not isinstance(v, dict)}
    for name, (value, hint) in settings.items():
        _check_of_lora(name, list(value) if isinstance(value, set | tuple) else value, hint)
    for name, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        for own, value in of_lora(lora, pattern).items():
            _check_of_lora(own, value, _OF_LORA[name])
    check_patterns(lora, "lora")


def of_lora(lora: LoraConfig, pattern: str) -> dict[str, Any]:
    """The modules' own values of a setting, each by what a user calls it."""
    return {f"{pattern}[{key!r}]": value for key, value in getattr(lora, pattern).items()}


def _check_of_lora(name: str, value: Any, hint: Any) -> None:
    if not fits(value, hint):
        raise LamellaError(f"lora has {name}={value!r}, which must be {in_words(hint)}.")


def check_patterns(config: PeftConfig, name: str) -> None:
    """Raises unless what a config gives as a string for names of modules is a regular expression."""
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        given = getattr(config, key)
        names = given or () if key == "modules_to_save" else ()  # which PEFT puts into expressions
        for pattern in [given] if isinstance(given, str) else names:
            try:
                re.compile(pattern)
            except re.error as error:
                raise LamellaError(
                    f"{name} has {key}={pattern!r}, which is not a regular expression: {error}. A string is matched "
                    "against whole names of modules; give names as a list."
                ) from error


def wrote_before(config: LamellaConfig, edition: str) -> bool:
    """Whether a version before this edition wrote a config."""
    return Version(config.lamella_version or __version__).release < Version(edition).release


def _new_name(key: str, given: Mapping[str, Any]) -> str:
    new = RENAMED.get(key, key)
    return key if new in given else new  # with both, the old one is left to be refused


def unknown_keys(config: str, unknown: list[str], known: set[str], given: Mapping[str, Any]) -> str:
    """An error's text: each unknown key with the nearest known one, and who wrote the config."""
    culprits = []
    for key in unknown:
        if key in INSTEAD:
            culprits.append(f"{key!r} (a setting of PEFT's LoRA; {INSTEAD[key]})")
            continue
        near = difflib.get_close_matches(key, [*known, *RENAMED], n=1)
        new = RENAMED.get(near[0], near[0]) if near else None
        hint = f" (it is called {new!r} now)" if key in RENAMED else f" (did you mean {new!r}?)"
        hint = hint if new in known else ""
        culprits.append(f"{key!r}{hint}")
    writer = given.get("lamella_version")
    written = f" The config was written by lamella {writer}; this is lamella {__version__}." if writer else ""
    wrote_peft = f" It was written with PEFT {given['peft_version']}." if writer and given.get("peft_version") else ""
    return (
        f"{config} does not know {', '.join(culprits)}.{written}{wrote_peft} "
        "Correct the key, or load the adapter with the version that wrote it."
    )
