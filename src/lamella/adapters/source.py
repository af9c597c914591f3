"""A trained LoRA as it was read: where from, for which modules, and what was left behind."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from peft import LoraConfig
from torch import Tensor

from lamella.errors import LamellaError

Format = Literal["PEFT", "diffusers", "kohya"]

# The component of a LoRA whose file does not name one: it is for whichever model it is mapped on.
MODEL = "model"


@dataclass(frozen=True)
class Reference:
    """Where a LoRA lies and what it is.

    Attributes:
        source: a local file or folder, a hub id ``owner/name``, or a file of one, ``owner/name/FILE.safetensors``.
        revision: of a hub id; once read, the commit.
        subfolder: inside ``source``.
        sha256: of the file; for a PEFT folder of its settings, however ``adapter_config.json`` is laid out and
            whichever base it names, followed by ``adapter_model.safetensors``. None where nothing was read yet.
    """

    source: str
    revision: str | None = None
    subfolder: str | None = None
    sha256: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As a config writes it; ``Reference(**written)`` is the way back."""
        return asdict(self)


class Factors(NamedTuple):
    """One module's LoRA: the delta of its weight is ``scaling * B A``.

    Attributes:
        A: ``(r, in)`` of a linear module or a 1x1 convolution, ``(r, in, *kernel)`` of another convolution, in the
            file's precision.
        B: ``(out, r)``.
        scaling: ``alpha / r``, or rsLoRA's ``alpha / sqrt(r)``.
    """

    A: Tensor
    B: Tensor
    scaling: float


def random_factors(A: Tensor, B: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Factors of the same shapes from a normal distribution, in float32; their delta ``B A`` has the same length."""
    drawn_A = torch.randn(A.shape, generator=generator)
    drawn_B = torch.randn(B.shape, generator=generator)
    longer = _length(A.float().cpu(), B.float().cpu()) / _length(drawn_A, drawn_B)
    return drawn_A, longer * drawn_B


def _length(A: Tensor, B: Tensor) -> Tensor:
    """The Frobenius norm of ``B A``, by Gram matrices of the rank's size."""
    return ((A @ A.t()) * (B.t() @ B)).sum().clamp_min(0).sqrt()


class EmbeddingFactors(Factors):
    """The same of an embedding, whose A ``(r, vocabulary)`` is given tokens."""


class Tokens(NamedTuple):
    """Trained rows of an embedding, in place of the base's own.

    Attributes:
        indices: N token ids.
        values: ``(N, features)``.
    """

    indices: list[int]
    values: Tensor


@dataclass(frozen=True)
class Parsed:
    """What the reader of one format found; the attributes are those of `LoraSource`."""

    format: Format
    base: str | None
    components: dict[str, dict[str, Factors]]
    skipped: list[tuple[str, str]]
    constants: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, Tokens] = field(default_factory=dict)
    config: LoraConfig | None = None


@dataclass(frozen=True)
class LoraSource:
    """A trained LoRA.

    Attributes:
        name: what the composition calls it.
        reference: where it was read, with the commit and the digest of what was read.
        format: who wrote it.
        base: the base model it says it was trained on; None where it does not say.
        components: by component ("unet", "text_encoder", "text_encoder_2", "transformer", or "model" where the file
            names none), then by module name, the factors.
        skipped: what the file holds besides, by name, and why it is left out.
        constants: by component and module, what is added to the module's output whatever its input, ``(out,)``: the
            bias of B (lora_bias) with the scaling inside.
        whole: tensors that were trained whole and stand in place of the base's own, by name: a head
            (modules_to_save), embeddings saved whole, biases (bias="all" or "lora_only").
        tokens: rows of embeddings that were trained (trainable_token_indices), by the embedding's name.
        config: PEFT's, where there is one.
    """

    name: str
    reference: Reference
    format: Format
    base: str | None
    components: Mapping[str, Mapping[str, Factors]]
    skipped: tuple[tuple[str, str], ...]
    constants: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    whole: Mapping[str, Tensor] = field(default_factory=dict)
    tokens: Mapping[str, Tokens] = field(default_factory=dict)
    config: LoraConfig | None = None

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.format} LoRA from {self.reference.source}, base {self.base or 'unknown'}"]
        for component, modules in self.components.items():
            ranks = sorted({len(factors.A) for factors in modules.values()})
            scalings = sorted({round(factors.scaling, 6) for factors in modules.values()})
            lines.append(f"  {component}: {len(modules)} modules, ranks {_some(ranks)}, scaling {_some(scalings)}")
        if self.whole:
            lines.append(f"  trained whole: {_some(list(self.whole))}")
        lines += [f"  {len(tokens.indices)} trained tokens in {name}" for name, tokens in self.tokens.items()]
        lines += [f"  skipped {name}: {reason}" for name, reason in self.skipped]
        return "\n".join(lines)

    @property
    def described(self) -> str:
        """Its name and origin, to begin an error with."""
        return described(self.name, self.reference)

    @property
    def is_zero(self) -> bool:
        """Whether it adds nothing at all, as before its first step of training."""
        factors = [one for modules in self.components.values() for one in modules.values()]
        constants = [one for modules in self.constants.values() for one in modules.values()]
        silent = all(not one.scaling or not one.B.any() or not one.A.any() for one in factors)
        return silent and not self.whole and not self.tokens and not any(bool(one.any()) for one in constants)


def described(name: str, reference: Reference) -> str:
    """A LoRA's name and origin, to begin an error with."""
    return f"The LoRA {name!r} ({reference.source})"


def by_name(sources: Iterable[LoraSource]) -> dict[str, LoraSource]:
    """The LoRAs of a composition by name.

    Raises:
        LamellaError: two have the same name.
    """
    named: dict[str, LoraSource] = {}
    for source in sources:
        if source.name in named:
            raise LamellaError(
                f"Two LoRAs are called {source.name!r}: {named[source.name].reference.source} and "
                f"{source.reference.source}. Give each a name of its own."
            )
        named[source.name] = source
    return named


def _some(values: list[Any]) -> str:
    return ", ".join(str(value) for value in values[:6]) + (", ..." if len(values) > 6 else "")
