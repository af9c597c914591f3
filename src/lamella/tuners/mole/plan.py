"""Everything about a composition that can be known, and refused, before the first module is touched."""

import re
import warnings
from collections import Counter
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lamella.adapters import (
    Factors,
    LoraSource,
    Mapped,
    Reference,
    adds_bias,
    check_base,
    fan,
    map_to,
    projects,
    read_lora,
    sides_of,
)
from lamella.adapters.mapping import LEFT_OUT
from lamella.backbones import Place, Rehearsal, Stack, find_place, rehearse, siblings_with_same_input
from lamella.backbones.blocks import CROSS_ATTENTION
from lamella.errors import LamellaError
from lamella.kernels import FrozenLoras, concatenate
from lamella.tuners.bypassing import why_unfit
from lamella.tuners.config import wrote_before
from lamella.tuners.mole.config import MoleConfig
from lamella.tuners.targets import Selection, check_names

Head = Mapping[str, Tensor]
_ATTENTION = ("attention", "attn")
_NOT_SEEN = Rehearsal()


@dataclass
class GroupPlan:
    """The modules that share one decision.

    Attributes:
        place: the group's stack, block, and name inside it: "network", "block", a sub-layer's or a matrix's name.
        input: what a row of its input is: a token of its "own" stack, a token of the "encoder", or a "row" of which
            nothing is known, outside the blocks or given other rows than those of its block's sequences.
        members: the adapted modules that its weights are for, in the model's order.
        inputs: those of them that are given the group's own input; their LoRAs' outputs are the router inputs.
        balance_share: what its router's loss counts: one over the routers of its block.
    """

    place: Place
    input: str
    members: list[str] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    balance_share: float = 1.0

    @property
    def spans_blocks(self) -> bool:
        """Whether its decision is for several blocks."""
        return self.place.module.startswith("network")

    @property
    def name(self) -> str:
        """The group's dotted name in the model."""
        if self.spans_blocks:
            return f"{self.place.stack}.{self.place.module}"
        inside = "" if self.place.module == "block" else f".{self.place.module}"
        return f"{self.place.stack}.{self.place.layer}{inside}" if self.place.stack else self.place.module


@dataclass
class Plan:
    """A composition that fits a model.

    Attributes:
        names: the K LoRAs, in the order of the logits.
        ranks: each LoRA's rank in each adapted module, 0 where it has none, by module name in the model's order.
        widths: the modules' outputs.
        factors: the LoRAs by module and LoRA; None where the adapter's own file is to bring them.
        constants: what LoRAs add to a module's output whatever its input, ``(out,)``, by module and LoRA; by module
            alone where the adapter's own file is to bring them.
        heads: modules trained whole, in all LoRAs to the same: their tensors, by module.
        missed: modules trained whole that the composition does not take over, each with the reason.
        groups: what decides.
        excluded: modules that the config leaves out.
        skipped: what of the LoRAs is left out, and why.
        notes: what else a user should know.
        seen: what a forward of a few tokens has shown of the model.
        unfit: modules that no adapter has an effect on, also none of the LoRAs alone. A composition of the first
            edition may have some.
    """

    names: tuple[str, ...]
    ranks: dict[str, list[int]]
    widths: dict[str, int]
    factors: dict[str, dict[str, Factors]] | None
    constants: dict[str, dict[str, Tensor]]
    heads: dict[str, Head]
    missed: dict[str, str]
    groups: list[GroupPlan]
    excluded: set[str]
    skipped: list[tuple[str, str]]
    notes: list[str]
    seen: Rehearsal = field(default_factory=Rehearsal)
    unfit: frozenset[str] = frozenset()

    def loras(self, module: str) -> FrozenLoras:
        """A module's LoRAs side by side."""
        assert self.factors is not None
        factors = [self.factors[module].get(name) for name in self.names]
        flat = [None if lora is None else (lora.A.flatten(1), lora.B, lora.scaling) for lora in factors]
        is_double = any(lora is not None and lora.A.dtype == torch.float64 for lora in factors)
        return concatenate(flat, torch.float64 if is_double else torch.float32)

    def constant(self, module: str) -> Tensor | None:
        """What each LoRA adds to a module's output whatever its input, ``(K, out)``; None where none does."""
        given = self.constants.get(module)
        if given is None:
            return None
        if self.factors is None:
            return torch.full((len(self.names), self.widths[module]), torch.nan)
        zero = torch.zeros(self.widths[module])
        return torch.stack([given.get(name, zero) for name in self.names])


def read_sources(config: MoleConfig, pipe: Any = None) -> list[LoraSource]:
    """A config's LoRAs, read where they lie unless they have been, for a diffusers pipeline where there is one.

    Raises:
        LamellaError: there are fewer than two, or one cannot be read or has changed.
    """
    refuse_too_few(list(config.adapters))
    return [
        replace(given, name=name)
        if isinstance(given, LoraSource)
        else read_lora(Reference(**given), name=name, pipe=pipe)
        for name, given in config.adapters.items()
    ]


def refuse_too_few(names: Sequence[str]) -> None:
    """Raises unless there are two LoRAs or more."""
    if len(names) < 2:
        given = f"only {names[0]!r}" if names else "none"
        raise LamellaError(
            f"A composition needs at least two LoRAs, and there is {given}. Name them in "
            "lamella.compose(model, {'a': path, 'b': path}); a single LoRA needs no router: load it with PEFT."
        )


def refuse_too_large(top_k: int | None, names: Sequence[str]) -> None:
    """Raises where more LoRAs are to be used than there are."""
    if top_k is not None and top_k > len(names):
        raise LamellaError(
            f"top_k={top_k} is more than the {len(names)} LoRAs of the composition; lower it, or None uses all."
        )


def make_plan(
    model: nn.Module,
    config: MoleConfig,
    sources: Sequence[LoraSource] | None,
    stacks: Sequence[Stack],
) -> Plan:
    """Fits a composition to a model.

    Args:
        model: the base model, which may carry other adapters.
        config: the settings.
        sources: the LoRAs; None where the adapter's file will bring those that ``config.embedded`` describes.
        stacks: the model's stacks of blocks.

    Raises:
        LamellaError: fewer than two LoRAs, one of another base, modules that the model does not have, nothing left to
            adapt, or settings that do not suit the model.
    """
    refuse_too_few(list(config.adapters))
    refuse_too_large(config.top_k, list(config.adapters))
    selection = Selection(model, config, stacks, as_saved=wrote_before(config, "0.2"))
    check_names(model, config)
    modules = _composable(model)
    linear = [name for name, module in modules.items() if not projects(module)]
    seen = rehearse(model, stacks, linear)
    unfit = why_unfit(model, seen)
    skipped: list[tuple[str, str]] = []
    excluded: set[str] = set()
    notes: list[str] = []
    if sources is None:
        names, ranks, factors = tuple(config.adapters), _embedded_ranks(config, modules), None
        constants: dict[str, dict[str, Tensor]] = {name: {} for name in config.embedded_constants or ()}
        heads: dict[str, Head] = {}
        missed: dict[str, str] = {}
        excluded |= {name for name in linear if selection.leaves_out(name)}
        notes.append(f"{len(names)} LoRAs from the adapter's own file")
    else:
        names = tuple(source.name for source in sources)
        factors, constants, whole = _factors(model, selection, sources, excluded, skipped, notes)
        heads, missed = shared_heads(model, whole, {*factors, *constants})
        notes += [f"{head}: the one that all LoRAs were trained with" for head in heads]
        skipped += missed.items()
        ranks = {
            name: [len(factors[name][lora].A) if lora in factors.get(name, ()) else 0 for lora in names]
            for name in modules
            if name in factors or name in constants
        }
        if not selection.as_saved:
            _leave_out(config, [name for name in ranks if name in unfit])
            skipped += [(name, why) for name, why in unfit.items() if ranks.pop(name, None)]
    if not ranks:
        raise LamellaError(
            "No module is left to compose on: exclude_modules and layers_to_transform leave out every module that the "
            "LoRAs adapt."
        )
    by_token = config.router_input == "token" and config.form == "delta"  # a block's output has its own tokens alone
    silent = {name for name, of in ranks.items() if not any(of)}  # whose LoRAs are constants alone
    alone = {name for name in ranks if projects(modules[name])} | silent if config.form == "delta" else set()
    # Block forms run whole blocks with one LoRA at a time, so that no module in them decides.
    order = seen if config.form == "delta" else _NOT_SEEN
    groups = plan_groups(list(ranks), linear, stacks, config.granularity, by_token, alone, order)
    for group in groups:
        group.inputs = [name for name in group.inputs if name not in silent]
    widths = {name: sides_of(modules[name])[1] for name in ranks}
    never = frozenset(unfit)
    return Plan(names, ranks, widths, factors, constants, heads, missed, groups, excluded, skipped, notes, seen, never)


def _leave_out(config: MoleConfig, names: list[str]) -> None:
    """Excludes modules, so that whoever loads the composition does without them too, whatever can be seen there."""
    excluded = config.exclude_modules
    if names and isinstance(excluded, str):
        config.exclude_modules = "|".join([f"(?:{excluded})", *map(re.escape, names)])
    elif names:
        config.exclude_modules = {*(excluded or ()), *names}


def _factors(
    model: nn.Module,
    selection: Selection,
    sources: Sequence[LoraSource],
    excluded: set[str],
    skipped: list[tuple[str, str]],
    notes: list[str],
) -> tuple[dict[str, dict[str, Factors]], dict[str, dict[str, Tensor]], dict[str, Mapping[str, Head]]]:
    """By module and LoRA the LoRAs and what they add whatever the input; by LoRA what was trained whole.

    Notes what is left out.
    """
    whole: dict[str, Mapping[str, Head]] = {}
    by_module: dict[str, dict[str, Factors]] = {}
    constants: dict[str, dict[str, Tensor]] = {}

    for source in {(source.format, source.base): source for source in reversed(sources)}.values():
        check_base(model, source)
    mappings: dict[int, Mapped] = {}  # LoRAs of a library share their components
    for source in sources:
        is_known = id(source.components) in mappings
        if not is_known:
            mappings[id(source.components)] = map_to(model, source, leave_out=selection.leaves_out)
        mapped = mappings[id(source.components)]
        excluded |= {name for name, reason in mapped.skipped if reason == LEFT_OUT}
        skipped += [(f"{source.name}: {name}", reason) for name, reason in mapped.skipped]
        for name, lora in mapped.modules.items():
            by_module.setdefault(name, {})[source.name] = lora
        for name, constant in mapped.constants.items():
            if selection.leaves_out(name):
                skipped.append((f"{source.name}: {name}.bias", LEFT_OUT))
            else:
                constants.setdefault(name, {})[source.name] = constant
        whole[source.name] = mapped.whole
        ranks = sorted({len(mapped.modules[name].A) for name in mapped.modules})
        renamed = f", {mapped.renamed}" if mapped.renamed else ""
        of_rank = ", ".join(map(str, ranks))
        if not is_known:
            notes.append(
                f"{source.name}: {source.format} LoRA of rank {of_rank} on {len(mapped.modules)} modules{renamed}"
            )
    return by_module, constants, whole


def shared_heads(
    model: nn.Module, whole: Mapping[str, Mapping[str, Head]], adapted: Container[str]
) -> tuple[dict[str, Head], dict[str, str]]:
    """Modules that all LoRAs were trained with alike, and those that cannot be taken over, each with the reason.

    Args:
        model: the base model.
        whole: what each LoRA brings whole, by LoRA and module.
        adapted: modules that LoRAs are composed on.
    """
    heads: dict[str, Head] = {}
    missed: dict[str, str] = {}
    modules = dict(model.named_modules())
    for head in dict.fromkeys(head for of in whole.values() for head in of):
        first, *others = (of.get(head) for of in whole.values())
        having = [name for name, of in whole.items() if head in of]
        shapes = {key: tuple(tensor.shape) for key, tensor in whole[having[0]][head].items()}
        module = getattr(modules.get(head), "original_module", modules.get(head))  # where another adapter has one
        own = module.state_dict() if isinstance(module, nn.Module) else {}
        unfit = [key for key, shape in shapes.items() if key not in own or own[key].shape != shape]
        if first is None or any(other is None or not _same(first, other) for other in others):
            missed[head] = f"trained whole by {', '.join(having)}, not alike in all LoRAs"
        elif unfit or head in adapted:
            said = f"{unfit[0]} {shapes[unfit[0]]} does not fit the model" if unfit else "it has a LoRA too"
            missed[head] = f"trained whole by all LoRAs, but {said}"
        else:
            heads[head] = first
    return heads, missed


def warn_of_missed(missed: Mapping[str, str], saved: Collection[str]) -> None:
    """Says which modules that were trained with the LoRAs the composition does without.

    Args:
        missed: their names, and why.
        saved: ``modules_to_save`` of its config, which it trains anew.
    """
    if not missed:
        return
    said = "; ".join(f"{head} ({reason})" for head, reason in missed.items())
    left = [head for head in missed if not any(f".{head}".endswith(f".{name}") for name in saved)]
    instead = (
        "the composition uses the model's own, so that no LoRA alone is what it was. Weights of whole modules are not "
        f"mixed. Train one for the composition, with modules_to_save={left} in its config, or put one in place first: "
        "lamella.adapters.read_lora(path).whole holds each."
        if left
        else "the composition trains one of its own (modules_to_save), with which no LoRA alone is what it was."
    )
    warnings.warn(f"The LoRAs were trained together with {said}: {instead}", stacklevel=2)


def _same(one: Head, other: Head) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def _composable(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that LoRAs can be composed on, without what adapters have put around them, in the model's order."""
    modules = dict(model.named_modules())
    adapted = tuple(f"{name}." for name, module in modules.items() if isinstance(module, BaseTunerLayer))
    found = {}
    for name, module in modules.items():
        base = BaseTunerLayer.get_base_layer(module)
        if name and not name.startswith(adapted) and (fan(base) is not None or adds_bias(base)):
            found[name] = base
    return found


def _embedded_ranks(config: MoleConfig, modules: Iterable[str]) -> dict[str, list[int]]:
    """What the adapter's file brings."""
    assert config.embedded is not None
    modules = list(modules)
    missing = sorted(set(config.embedded) - set(modules))
    if missing:
        raise LamellaError(
            f"The adapter's file holds LoRAs for {len(missing)} modules that the model does not have, first "
            f"{missing[0]}; load it on the base named in its adapter_config.json."
        )
    return {name: config.embedded[name] for name in modules if name in config.embedded}


def plan_groups(
    adapted: Sequence[str],
    linear: Sequence[str],
    stacks: Sequence[Stack],
    granularity: str,
    by_token: bool,
    alone: Container[str] = (),
    rehearsal: Rehearsal = _NOT_SEEN,
) -> list[GroupPlan]:
    """Puts the adapted modules into groups.

    A group's input is what the first linear module in it is given, adapted or not; the modules named as its siblings
    (query, key and value; gate and up) are given the same. What a rehearsal shows to run before it, or to be given
    other rows than its block's sequences (windows, the tokens of an expert), and modules outside the blocks decide by
    themselves for each row of their input, so that they may lie anywhere.

    Args:
        adapted: names of the modules that any LoRA adapts, in the model's order.
        linear: names of all linear modules, in the model's order.
        stacks: the model's stacks of blocks.
        granularity: "matrix", "sublayer", "block" or "network".
        by_token: whether each token decides for itself, so that what is given the encoder's states needs a group of its
            own: its tokens are others.
        alone: modules that decide by themselves, as those outside the blocks do: what their LoRAs read is not what the
            module is given (a convolution's patches, an embedding's tokens), or nothing.
        rehearsal: in which order the modules run, and on which rows.

    Returns:
        The groups in the order of their first members.
    """
    groups: dict[tuple[str, int, str], GroupPlan] = {}
    entries, apart = _entries(linear, stacks, granularity, by_token, rehearsal)
    for name in adapted:
        if name in alone or name in apart:
            place, input_ = find_place(name, stacks) or Place("", 0, name), "row"
        else:
            place, input_ = _group_of(name, stacks, granularity, by_token)
        key = _key(place)
        group = groups.setdefault(key, GroupPlan(place, input_))
        group.members.append(name)
        if granularity == "matrix" or input_ == "row" or entries.get(name) == key:
            group.inputs.append(name)
    return share_balance(groups.values())


def share_balance(plans: Iterable[GroupPlan]) -> list[GroupPlan]:
    """The same plans, with the balance loss of each block shared by its routers."""
    plans = list(plans)
    in_block = Counter((plan.place.stack, plan.place.layer) for plan in plans)
    for plan in plans:
        plan.balance_share = 1 / in_block[plan.place.stack, plan.place.layer] if plan.place.stack else 1.0
    return plans


def _key(place: Place) -> tuple[str, int, str]:
    return place.stack, place.layer, place.module


def _group_of(name: str, stacks: Sequence[Stack], granularity: str, by_token: bool) -> tuple[Place, str]:
    """A module's group, and what the group's input is."""
    place = find_place(name, stacks)
    if place is None:
        return Place("", 0, name), "row"
    if granularity == "matrix":
        return place, "encoder" if place.reads_encoder else "own"
    rows = "encoder" if by_token and place.reads_encoder else "own"
    of_encoder = " of the encoder's states" if rows == "encoder" else ""
    if granularity == "network":
        return Place(place.stack, 0, f"network{of_encoder}"), rows
    inside = "block" if granularity == "block" else sublayer_of(place.module)
    return Place(place.stack, place.layer, f"{inside}{of_encoder}"), rows


def sublayer_of(module: str) -> str:
    """The sub-layer of a block that a module belongs to: its attention, by name, or else the "mlp"."""
    parts = module.split(".")
    for index, part in enumerate(parts[:-1]):
        if part in CROSS_ATTENTION or any(word in part.lower() for word in _ATTENTION):
            return ".".join(parts[: index + 1])
    return "mlp"


def _entries(
    linear: Sequence[str], stacks: Sequence[Stack], granularity: str, by_token: bool, rehearsal: Rehearsal
) -> tuple[dict[str, tuple[str, int, str]], set[str]]:
    """The modules that are given the input of their group, each with the group; and those that decide by themselves."""
    entries: dict[str, tuple[str, int, str]] = {}
    apart: set[str] = set()
    begun: set[tuple[str, int, str]] = set()
    decoders = {stack.name for stack in stacks if stack.role == "decoder"}  # there the first tokens have other weights
    for name in rehearsal.sort(linear):
        place = find_place(name, stacks)
        if place is None:
            continue
        group, _ = _group_of(name, stacks, granularity, by_token)
        key = _key(group)
        each_token = by_token or place.stack in decoders or key not in begun
        if not (rehearsal.is_given_tokens(name) if each_token else rehearsal.is_given_sequences(name)):
            apart.add(name)
            continue
        if key in begun:
            continue
        begun.add(key)
        root = name.removesuffix(place.module)
        entries |= {
            root + sibling: key
            for sibling in siblings_with_same_input(place)
            if root + sibling in linear and _key(_group_of(root + sibling, stacks, granularity, by_token)[0]) == key
        }
    return entries, apart


def refuse_flatten_on_decoder(stack: str) -> None:
    """Raises: a flattened sequence is read to its end."""
    raise LamellaError(
        f"router_input='flatten' reads a sequence to its end, and {stack} is a decoder, which would see what it has yet"
        " to say. Use router_input='mean' (which reads the prompt) or 'token'."
    )
