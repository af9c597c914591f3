"""The settings of MOLE."""

import copy
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from lamella.adapters import LoraSource, Reference
from lamella.adapters.keys import key_named
from lamella.adapters.locate import exists
from lamella.errors import LamellaError
from lamella.files import write_atomic
from lamella.routing import Score
from lamella.tuners.config import LamellaConfig
from lamella.tuners.kinds import MOST, Bounds, Coefficient, Count, Index
from lamella.tuners.mole.router import LOWEST_TEMPERATURE
from lamella.tuners.registry import LamellaType

Self = TypeVar("Self", bound="MoleConfig")
Adapters = Mapping[str, Any]
_REFERENCE = tuple(f.name for f in fields(Reference))


@dataclass
class MoleConfig(LamellaConfig):
    """Mixture of LoRA experts: K LoRAs that are trained already, mixed by routers that read them (arXiv 2404.13628).

    ``y = W0 x + sum_i G_i s_i B_i A_i x`` in every linear module that a LoRA adapts, with one G for each group.

    A published router has ``K * K * D`` parameters and a few: for each of K logits one for each output of each of the K
    LoRAs, D in the matrices that it reads (a block: query, key and value where adapted), times the positions for
    "flatten". At width 768 with query and value adapted, that is 98 thousand for 8 LoRAs, 25 million for 128 and 1.5
    billion for 1,000, each of 16 bytes in training with Adam; granularity "network" has one router a stack. A shared
    router has D parameters and two, whatever K is. The summary says how many parameters all routers have.

    Args:
        adapters: the LoRAs by name, in the order of the routers' logits: paths, hub ids, references
            (``{source, revision, subfolder, sha256}``), or LoRAs that were read, of which the injection leaves the
            references. ``lamella.compose`` fills it in.
        router: "published": each logit reads the outputs of all LoRAs, with weights of its own; or "shared": each reads
            its LoRA's own outputs and their length, with weights that are the same for all, so that LoRAs may be added
            after training, or taken away. None is "published", and "shared" with a shortlist.
        shortlist: how many of the K LoRAs a sequence uses; retrieval chooses them for each group by what the group is
            given of the sequence (of a decoder's, the prompt), and the others are not read. None for all. There is no
            balance loss then, and where nothing tells the prompt the tokens that decide run without LoRAs.
        retrieval: the key that chooses (`lamella.adapters.keys`): "spectrum" or "arrow", by the LoRAs' weights; or by
            their cards "centroids", or "text", by which all groups of a sequence have one shortlist (modules outside
            the blocks, of whose rows nothing says what text they are of, have one by "spectrum").
        granularity: what has a router of its own: each "matrix", each "sublayer" (attention, MLP), each "block", or
            the "network" (each stack of blocks: encoder, decoder).
        router_input: what of the LoRAs' outputs a router reads: their "mean" over a sequence's real tokens, those of
            each "token" for itself, or all of a sequence "flatten"-ed, as published.
        flatten_length: tokens of a flattened sequence, the longest that can be read.
        top_k: of a decision's K weights, only the largest ones are used, renormalised: the softmax over their logits,
            those that tie with the last among them; None for all, as published. Balance losses see all K. Where
            decisions are for whole sequences, and fewer than K LoRAs can be in use in a batch, the rest cost nothing
            but their part in the router.
        form: "delta" as above; "block-delta", ``F(x) + sum_i G_i (E_i(x) - F(x))`` on the outputs of whole blocks, each
            run with one LoRA; or "published", ``F(x) + sum_i G_i E_i(x)``, which counts the input twice.
        router_scale: the logits are ``router_scale (e . E) / n + b``, n numbers being read, so that one
            learning rate suits models of every width; None for ``e . E + b``, as published.
        score: what becomes of the logits: "softmax", weights that sum to 1 and start at the LoRAs' mean, as published;
            or "sigmoid", a gate for each LoRA by itself, ``2 sigmoid(logit)`` between 0 and 2, which starts at 1, so
            that the LoRAs start at their sum. With ``top_k`` the largest gates stay as they are, and so do the others
            where LoRAs are dropped. Gates do not compete, and have no balance loss.
        temperature: the logits are divided by it.
        learn_temperature: whether each router learns its own, starting there.
        balance: "log" as published, over all routers together; or for each router its "entropy", or the "switch" loss;
            or "none".
        router_aux_loss_coef: its coefficient. The last two are averaged over a block's routers and summed over blocks.
        prompt_tokens: on a decoder, how many first tokens decide where nothing tells the prompt (``lamella.prompt``).
        embed_adapters: save the LoRAs in the adapter's file, so that loading needs none of their own.
        embedded: where they are saved: each LoRA's rank in each module, 0 where it has none; filled in.
        embedded_constants: the modules to whose outputs they add something whatever the input; filled in.
        init_lora_weights: True starts every router at zero, with equal weights; False at random, for tests.
        target_modules: not a setting of MOLE: the LoRAs say what they adapt.

    Raises:
        LamellaError: a value out of range, an unknown key, or values that contradict each other.
    """

    target_modules: list[str] | set[str] | str | None = None
    init_lora_weights: bool = True
    adapters: dict[str, Any] = field(default_factory=dict)
    router: Literal["published", "shared"] | None = None
    shortlist: Count | None = None
    retrieval: str = "spectrum"
    granularity: Literal["matrix", "sublayer", "block", "network"] = "block"
    router_input: Literal["mean", "token", "flatten"] = "mean"
    flatten_length: Count | None = None
    top_k: Count | None = None
    form: Literal["delta", "block-delta", "published"] = "delta"
    router_scale: Annotated[float, Bounds(0, MOST)] | None = 1_000.0
    score: Score = "softmax"
    temperature: Annotated[float, Bounds(LOWEST_TEMPERATURE, MOST)] = 1.0
    learn_temperature: bool = True
    balance: Literal["log", "entropy", "switch", "none"] = "log"
    router_aux_loss_coef: Coefficient = 0.5
    prompt_tokens: Count = 4
    embed_adapters: bool = False
    embedded: dict[str, list[Index]] | None = None
    embedded_constants: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = LamellaType.MOLE
        self.adapters = {
            name: given if isinstance(given, LoraSource) else _as_dict(name, given)
            for name, given in self.adapters.items()
        }
        if self.balance == "log" and (self.shortlist is not None or self.score == "sigmoid"):
            self.balance = "none"  # what is on no shortlist would cost infinitely much, and gates do not sum to 1
        self._check_together()
        self._check_router()

    @property
    def has_shared_router(self) -> bool:
        """Whether the routers' weights are the same for all LoRAs."""
        return self.router == "shared" or (self.router is None and self.shortlist is not None)

    @property
    def references(self) -> dict[str, Reference]:
        """Where the LoRAs lie."""
        return {
            name: _absolute_reference(given.reference) if isinstance(given, LoraSource) else Reference(**given)
            for name, given in self.adapters.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """As JSON; of LoRAs that were read, where they lie."""
        written = copy.copy(self)
        written.adapters = {name: reference.to_dict() for name, reference in self.references.items()}
        return super(MoleConfig, written).to_dict()

    @classmethod
    def from_pretrained(
        cls: type[Self], path: str, subfolder: str | None = None, adapters: Adapters | None = None, **kwargs: Any
    ) -> Self:
        """Reads a saved config.

        Args:
            path: its folder or hub id.
            subfolder: inside it.
            adapters: other places for some of its LoRAs, by name. The digests that were recorded still hold, unless a
                reference brings one of its own.
            kwargs: for the hub.

        Raises:
            LamellaError: a place for a LoRA that the composition does not have.
        """
        config: Self = super().from_pretrained(path, subfolder=subfolder, **kwargs)
        unknown = sorted(set(adapters or {}) - set(config.adapters))
        if unknown:
            raise LamellaError(
                f"adapters names {', '.join(map(repr, unknown))}, and the composition in {path} has "
                f"{', '.join(config.adapters)}. Give places for those; which LoRAs it has is settled."
            )
        for name, given in (adapters or {}).items():
            moved, recorded = _as_dict(name, given), config.adapters[name]["sha256"]
            config.adapters[name] = {**moved, "sha256": moved["sha256"] or recorded}
        return config

    @classmethod
    def read_saved(cls, values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        """As for any method; paths of LoRAs that are relative to the folder are made absolute."""
        values = super().read_saved(values, folder)
        adapters = values.get("adapters")
        for written in adapters.values() if isinstance(adapters, dict) else ():
            if not isinstance(written, dict) or not isinstance(written.get("source"), str):
                continue  # the constructor refuses it by name
            if written["source"].split("/")[0] in (".", ".."):
                path = folder.resolve() / written["source"]
                # the first version wrote a path that was given as ./lora as it was, relative to the working directory
                there = path if path.exists() else Path(written["source"]).absolute()
                written["source"] = os.path.normpath(there if there.exists() else path)
        return values

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Writes the config: paths of LoRAs relative to the folder, in the order of the routers' logits."""
        super().save_pretrained(save_directory, **kwargs)
        path = Path(save_directory) / "adapter_config.json"
        written = json.loads(path.read_text(encoding="utf-8"))
        references = self.references
        written["adapters"] = {
            name: _relative(reference, path.parent).to_dict() for name, reference in references.items()
        }
        write_atomic(path, json.dumps(written, indent=2))

    def _check_together(self) -> None:
        for module, ranks in (self.embedded or {}).items():
            if len(ranks) != len(self.adapters):
                raise LamellaError(
                    f"embedded has {len(ranks)} ranks of {module!r}, and adapters names {len(self.adapters)} LoRAs: "
                    "one of the two was changed after the adapter was saved. Restore its config from a copy."
                )
        if self.target_modules is not None:
            raise LamellaError(
                f"target_modules={self.target_modules!r} is not a setting of MOLE: the LoRAs say which modules they "
                "adapt. Leave modules out with exclude_modules or layers_to_transform."
            )
        if (self.router_input == "flatten") != (self.flatten_length is not None):
            raise LamellaError(
                "router_input='flatten' reads sequences up to a fixed length and needs flatten_length; the other inputs"
                f" have none. Here router_input={self.router_input!r} and flatten_length={self.flatten_length!r}."
            )
        if self.form != "delta" and self.granularity != "block":
            raise LamellaError(
                f"form={self.form!r} mixes the outputs of whole blocks, so it needs granularity='block', not "
                f"{self.granularity!r}."
            )
        if self.form != "delta" and self.top_k is not None:
            raise LamellaError(
                f"form={self.form!r} runs the block with every LoRA before its router can decide, so that "
                f"top_k={self.top_k} would spare nothing. Use form='delta', or leave top_k out."
            )
        unfit = "balance" if self.balance != "none" else "form" if self.form == "published" else None
        if self.score == "sigmoid" and unfit is not None:
            raise LamellaError(
                f"{unfit}={getattr(self, unfit)!r} is for weights that sum to 1, and score='sigmoid' weighs each LoRA "
                f"by itself. Leave {unfit} out, or use score='softmax'."
            )

    def _check_router(self) -> None:
        key_named(self.retrieval)
        if self.has_shared_router and (self.form != "delta" or self.router_input == "flatten"):
            given = f"form={self.form!r}" if self.form != "delta" else "router_input='flatten'"
            raise LamellaError(
                f"router='shared' reads means or tokens in rank space; {given} needs router='published'."
            )
        if self.shortlist is None:
            return
        if self.router == "published":
            raise LamellaError(
                "A published router reads the outputs of all LoRAs, and with a shortlist only its own are computed. "
                "Use router='shared', or leave the shortlist out."
            )
        unfit = {"router_input": "mean", "balance": "none", "embed_adapters": False}
        wrong = next((name for name, value in unfit.items() if getattr(self, name) != value), None)
        if wrong is not None:
            raise LamellaError(
                f"{wrong}={getattr(self, wrong)!r} does not go with a shortlist, which is made once for a sequence "
                f"by its mean, of LoRAs that stay in their files and need no balance. Leave {wrong} out."
            )


def _as_dict(name: str, given: Any) -> dict[str, Any]:
    """What says where a LoRA lies, as a config writes it."""
    if isinstance(given, str | Path):
        return Reference(_absolute(str(given))).to_dict()
    if isinstance(given, Reference):
        return _absolute_reference(given).to_dict()
    if not isinstance(given, Mapping) or "source" not in given or set(given) - set(_REFERENCE):
        raise LamellaError(
            f"adapters[{name!r}]={given!r} must be a path, a hub id, or a dictionary with the keys "
            f"{', '.join(_REFERENCE)}."
        )
    for key, value in given.items():
        if not (isinstance(value, str) or (value is None and key != "source")):
            raise LamellaError(f"adapters[{name!r}] has {key}={value!r}, which must be a string.")
    return Reference(**{**given, "source": _absolute(given["source"])}).to_dict()


def _absolute_reference(reference: Reference) -> Reference:
    return replace(reference, source=_absolute(reference.source))


def _absolute(source: str) -> str:
    """A path's own full name, wherever it is read from; a hub id as it is."""
    path = Path(source).expanduser()
    return str(path.absolute()) if exists(path) else source


def _relative(reference: Reference, folder: Path) -> Reference:
    """A local path as seen from the config's folder, in a form that no hub id has; a hub id as it is."""
    if not Path(reference.source).is_absolute():
        return reference
    try:
        path = Path(os.path.relpath(reference.source, folder.resolve())).as_posix()
    except ValueError:  # on another drive
        return reference
    return replace(reference, source=path if path.startswith("..") else f"./{path}")
