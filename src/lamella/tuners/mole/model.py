"""MOLE as a PEFT tuner: puts LoRAs that are trained already on a model, with one router for each unit."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from peft.tuners.tuners_utils import _ExcludedModule
from torch import Tensor, nn

from lamella.backbones import Stack, find_place, locate_stacks
from lamella.tuners.model import RoutedModel
from lamella.tuners.mole.block_forms import BlockUnit, hidden_width, mix_at_block, remove_mixtures
from lamella.tuners.mole.config import MoleConfig, references_of
from lamella.tuners.mole.layer import CANNOT_MERGE, MoleLinear, empty
from lamella.tuners.mole.mixture import MoleMixture
from lamella.tuners.mole.preparing import Prepared, prepare, read_sources
from lamella.tuners.mole.router import MoleRouter
from lamella.tuners.mole.unit import Unit
from lamella.tuners.mole.units import UnitPlan, refuse_flatten_on_decoder
from lamella.tuners.summary import Summary


class MoleModel(RoutedModel):
    """Puts K frozen LoRAs on the modules that they adapt, and routers beside them.

    Built by ``lamella.compose``, ``get_peft_model(model, MoleConfig(adapters=...))``, ``PeftModel.from_pretrained`` or
    transformers' ``add_adapter`` and ``load_adapter``.
    """

    prefix: str = "lamella_mole_"
    tuner_layer_cls = MoleLinear
    method = "MOLE"
    cannot_merge = CANNOT_MERGE
    instead_of_adapter_names = "To weigh the LoRAs differently per row, use lamella.fixed_weights(model, [{...}, ...])."

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Reads the LoRAs and checks the whole request before the first module is touched, then injects."""
        config: MoleConfig = self.peft_config[adapter_name]
        self._stacks = locate_stacks(model)
        sources = config.take_sources()
        if sources is None and config.embedded is None:
            sources = read_sources(config)
        self._prepared = prepare(model, config, sources, self._stacks)
        self._units = make_units(self._prepared, self._unit_maker(model, adapter_name, config))
        if sources is not None:
            config.adapters = references_of(sources)
            config.embedded = self._prepared.ranks if config.embed_adapters else None
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self._prepared.factors = None  # the layers have their own copies
        for unit in set(self._units.values()):
            if isinstance(unit, BlockUnit):
                mix_at_block(model.get_submodule(unit.name), unit)
        self.keep_summary(self._summarise(model, adapter_name))

    def lora_mixture(self, adapter_name: str) -> MoleMixture:
        return MoleMixture(self.model, adapter_name)

    def _prepare_adapter_config(self, peft_config: MoleConfig, model_config: dict[str, Any]) -> MoleConfig:
        return peft_config  # there are no target_modules to fill in

    def _check_target_module_exists(self, peft_config: MoleConfig, key: str) -> bool | _ExcludedModule:
        # What is left out is told from what was never meant, or PEFT warns that nothing was excluded.
        return _ExcludedModule() if key in self._prepared.excluded else key in self._prepared.ranks

    def _create_and_replace(
        self,
        peft_config: MoleConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = place_loras(target, current_key, adapter_name, peft_config, self._prepared, self._units, self._stacks)
        layer.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def _unit_maker(self, model: nn.Module, adapter: str, config: MoleConfig) -> Callable[[UnitPlan], Unit]:
        decoders = {stack.name for stack in self._stacks if stack.role == "decoder" or _is_decoder(model)}

        def make(plan: UnitPlan) -> Unit:
            decoder = plan.place.stack in decoders
            if config.router_input == "flatten" and plan.input == "own" and decoder:
                refuse_flatten_on_decoder(plan.place.stack)
            if config.form == "delta" or plan.input == "row":
                return Unit(plan, adapter, config, self._prepared.names, decoder)
            return BlockUnit(plan, adapter, config, self._prepared.names, decoder, hidden_width(model))

        return make

    def _summarise(self, model: nn.Module, adapter: str) -> Summary:
        config: MoleConfig = self.peft_config[adapter]
        prepared = self._prepared
        modules = {stack.name: [0] * stack.depth for stack in self._stacks}
        for name in prepared.ranks:
            place = find_place(name, self._stacks)
            if place is not None:
                modules[place.stack][place.layer] += 1
        by_block = {name: [len(prepared.names) if count else 0 for count in counts] for name, counts in modules.items()}
        used = {name: [min(count, config.top_k or count) for count in counts] for name, counts in by_block.items()}
        trainable = sum(p.numel() for unit in set(self._units.values()) for p in unit.router.parameters())
        return Summary(
            method=f"MOLE of {len(prepared.names)} LoRAs",
            adapter=adapter,
            stacks=tuple(self._stacks),
            experts=by_block,
            top_k=used,
            modules=modules,
            skipped=tuple(prepared.skipped),
            notes=(numbered(prepared.names), *prepared.notes, *_settings(config, prepared.units, trainable)),
            trainable=trainable,
            unit="token" if config.router_input == "token" else "sequence",
        )

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model: nn.Module = super()._unload_and_optionally_merge(*args, **kwargs)
        remove_mixtures(model)
        return model

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: MoleConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        # Loaded without copying, a tensor lies in memory as in the file, and one that is not aligned is multiplied in
        # another order: the same numbers would give other last digits.
        return {name: tensor.clone() if f".{cls.prefix}" in name else tensor for name, tensor in tensors.items()}


def make_units(prepared: Prepared, make: Callable[[UnitPlan], Unit]) -> dict[str, Unit]:
    """The units of a composition by the names of their members; a block's routers share its balance loss."""
    in_block = Counter((plan.place.stack, plan.place.layer) for plan in prepared.units)
    units: dict[str, Unit] = {}
    for plan in prepared.units:
        unit = make(plan)
        unit.balance_share = 1 / in_block[plan.place.stack, plan.place.layer] if plan.place.stack else 1
        units |= dict.fromkeys(plan.members, unit)
    return units


def place_loras(
    target: nn.Module,
    name: str,
    adapter: str,
    config: MoleConfig,
    prepared: Prepared,
    units: dict[str, Unit],
    stacks: Sequence[Stack],
) -> MoleLinear:
    """Gives one module its LoRAs, and its unit's router where it is the one to hold it.

    Needs nothing of PEFT's models: whoever walks over a model's modules in their order can put the layer in its place.

    Args:
        target: a linear module, or one that carries LoRAs of another adapter already.
        name: its dotted name.
        adapter: the adapter's name.
        config: its settings.
        prepared: the composition.
        units: by the names of their members.
        stacks: the model's stacks of blocks.

    Returns:
        The layer to put in the module's place; the module itself where it is one already.
    """
    layer = target if isinstance(target, MoleLinear) else MoleLinear(target, name, find_place(name, stacks))
    unit = units[name]
    plan = next(plan for plan in prepared.units if name in plan.members)
    loras = prepared.loras(name) if prepared.factors is not None else empty(prepared.ranks[name], layer)
    router = None
    unit.members.append(layer)
    if name in plan.reads:
        unit.readers.append(layer)
    if name == (plan.reads or plan.members)[0]:
        widths = sum(prepared.widths[read] for read in plan.reads)
        if isinstance(unit, BlockUnit):
            widths = unit.features
        positions = None if unit.by_token else config.flatten_length
        router = MoleRouter(len(prepared.names), widths, config.temperature, config.learn_temperature, positions)
        if not config.init_lora_weights:
            router.randomise()
    layer.units[adapter] = unit
    layer.update_layer(adapter, loras, config.embed_adapters, router)
    return layer


def _is_decoder(model: nn.Module) -> bool:
    """An encoder's family can be configured to be a decoder."""
    return bool(getattr(getattr(model, "config", None), "is_decoder", False))


def numbered(names: Sequence[str]) -> str:
    """Which LoRA an expert's number in a trace means."""
    return f"LoRAs by number: {', '.join(f'{number} {name}' for number, name in enumerate(names))}"


def _settings(config: MoleConfig, units: Sequence[UnitPlan], parameters: int) -> Iterator[str]:
    tau = f"temperature {config.temperature:g}{', learned' if config.learn_temperature else ''}"
    yield f"{len(units)} routers, one for each {config.granularity}, reading by {config.router_input}, {tau}"
    yield f"routers: {parameters:,} parameters"
    if config.top_k is not None:
        yield f"of {len(config.adapters)} LoRAs the {config.top_k} with the largest weights are used"
    loss = (
        "no balance loss" if config.balance == "none" else f"balance {config.balance} x {config.router_aux_loss_coef:g}"
    )
    yield f"{loss}; LoRAs {'embedded in the file' if config.embed_adapters else 'saved as references'}"
    blind = [unit.name for unit in units if not unit.reads]
    if blind:
        yield f"{len(blind)} routers read nothing, since no LoRA adapts what is given their input, first {blind[0]}"
    outside = [unit.name for unit in units if unit.input == "row"]
    if outside:
        yield f"outside the blocks, each row decides for itself: {', '.join(outside)}"
