"""MOLE as a PEFT tuner: puts LoRAs that are trained already on a model, with one router for each group."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, _ExcludedModule
from torch import Tensor, nn

from lamella.adapters import LoraSource, projects
from lamella.backbones import Stack, find_place, find_stacks, width_of
from lamella.errors import LamellaError
from lamella.findings import Examination
from lamella.kernels import FrozenLoras
from lamella.tuners.model import RoutedModel
from lamella.tuners.mole.block_forms import BlockGroup, mix_at_block, remove_mixtures
from lamella.tuners.mole.config import MoleConfig
from lamella.tuners.mole.group import Group
from lamella.tuners.mole.layer import CANNOT_MERGE, MoleLinear, MoleProjection, empty
from lamella.tuners.mole.mixture import MoleMixture
from lamella.tuners.mole.plan import GroupPlan, Plan, make_plan, read_sources, refuse_flatten_on_decoder, warn_of_missed
from lamella.tuners.mole.router import GroupRouter, MoleRouter
from lamella.tuners.mole.shared import SharedRouter
from lamella.tuners.mole.shelf import Stock, embedding_of, stock_of
from lamella.tuners.mole.shortlisted import ShortlistGroup
from lamella.tuners.summary import Summary


class MoleModel(RoutedModel):
    """Puts K frozen LoRAs on the modules that they adapt, and routers beside them.

    Built by ``lamella.compose``, ``get_peft_model(model, MoleConfig(adapters=...))``, ``PeftModel.from_pretrained`` or
    transformers' ``add_adapter`` and ``load_adapter``.
    """

    prefix: str = "lamella_mole_"
    tuner_layer_cls = MoleLinear
    method = "MOLE"
    paper = "*Mixture of LoRA Experts* (arXiv:2404.13628)"
    cannot_merge = CANNOT_MERGE
    instead_of_adapter_names = "For other weights per row, use lamella.fixed_weights(model, [{...}, ...])."

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Reads the LoRAs and checks the whole request before the first module is touched, then injects."""
        config: MoleConfig = self.peft_config[adapter_name]
        stacks = find_stacks(model)
        stock: Stock | None = None
        sources: Sequence[LoraSource] | None = None
        if config.shortlist is not None:
            stock, sources = stock_of(model, config.adapters, config.retrieval, config.shortlist)
        elif config.embedded is None:
            sources = read_sources(config)
        plan = make_plan(model, config, sources, stacks)
        self.seen = plan.seen
        make = self._group_maker(model, plan, adapter_name, config, stacks, stock)
        twin = self._adapter_with_the_same_loras(adapter_name) if sources is None else None
        self._composition = Composition(plan, adapter_name, config, stacks, make, twin, stock)
        if plan.heads:
            config.modules_to_save = sorted({*(config.modules_to_save or ()), *plan.heads})
        if sources is not None:
            if not all(isinstance(given, dict) and given["sha256"] for given in config.adapters.values()):
                warn_of_missed(plan.missed, config.modules_to_save or ())  # not again when a composition is loaded
            config.adapters = {source.name: source for source in sources}  # the references are those of what was read
            config.adapters = {name: reference.to_dict() for name, reference in config.references.items()}
            config.embedded = plan.ranks if config.embed_adapters else None
            config.embedded_constants = list(plan.constants) if config.embed_adapters and plan.constants else None
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        if not all(group.inputs or group.members for group in self._composition.distinct):
            raise LamellaError(
                "exclude_modules or layers_to_transform leaves out modules whose LoRAs are embedded in the adapter's "
                "file: they were changed after it was saved. Restore its config from a copy."
            )
        plan.factors = None  # the layers have their own copies
        for head, tensors in plan.heads.items():
            wrapper: Any = model.get_submodule(head)
            wrapper.modules_to_save[adapter_name].load_state_dict(tensors, strict=False)  # what was trained
        for group in self._composition.distinct:
            if isinstance(group, BlockGroup):
                mix_at_block(model.get_submodule(group.name), group)
        self.keep_summary(self._composition.summary())

    def _adapter_with_the_same_loras(self, adapter_name: str) -> str | None:
        """Another adapter of the model that has the LoRAs which are embedded in this one's file."""
        config: MoleConfig = self.peft_config[adapter_name]
        for name, other in self.peft_config.items():
            same = isinstance(other, MoleConfig) and (other.references, other.embedded) == (
                config.references,
                config.embedded,
            )
            if same and name != adapter_name:
                return name
        return None

    def lora_mixture(self, adapter_name: str) -> MoleMixture:
        return MoleMixture(self.model, adapter_name)

    def examine(self, model: nn.Module, run: Callable[[], float], examination: Examination) -> None:
        """Looks for LoRAs whose B or scaling is zero wherever they are."""
        for adapter in self.active_adapters:
            silent = set(self.peft_config[adapter].adapters)
            for layer in (one for one in model.modules() if isinstance(one, MoleLinear) and adapter in one.groups):
                silent -= set(layer.adding(adapter))
            if silent:
                examination.warning(
                    "lora-adds-nothing",
                    f"{len(silent)} of {len(self.peft_config[adapter].adapters)} LoRAs add nothing anywhere",
                    sorted(silent),
                    "their B is zero, or their scaling (lora_alpha): whatever weight they get, they change no output",
                    "look for the checkpoints that were trained, or leave them out",
                )

    def _prepare_adapter_config(self, peft_config: MoleConfig, model_config: dict[str, Any]) -> MoleConfig:
        return peft_config  # there are no target_modules to fill in

    def _check_target_module_exists(self, peft_config: MoleConfig, key: str) -> bool | _ExcludedModule:
        # What is left out is told from what was never meant, or PEFT warns that nothing was excluded.
        return _ExcludedModule() if key in self._composition.plan.excluded else key in self._composition.plan.ranks

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
        layer = self._composition.place(target, current_key)
        layer.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def _group_maker(
        self,
        model: nn.Module,
        plan: Plan,
        adapter: str,
        config: MoleConfig,
        stacks: Sequence[Stack],
        stock: Stock | None,
    ) -> Callable[[GroupPlan], Group]:
        causal = {stack.name for stack in stacks if stack.causal}

        def make(one: GroupPlan) -> Group:
            decoder = one.place.stack in causal
            if config.router_input == "flatten" and one.input == "own" and decoder:
                refuse_flatten_on_decoder(one.place.stack)
            if stock is not None:
                keys = stock.table(one.inputs, of_sequences=one.input != "row")
                return ShortlistGroup(one, adapter, config, plan.names, decoder, keys, embedding_of(model))
            if config.form == "delta" or one.input == "row":
                return Group(one, adapter, config, plan.names, decoder)
            return BlockGroup(one, adapter, config, plan.names, decoder, width_of(model, one.place.stack))

        return make

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model: nn.Module = super()._unload_and_optionally_merge(*args, **kwargs)
        remove_mixtures(model)
        return model


class Composition:
    """A planned composition as it is put on a model, module by module.

    It needs nothing of PEFT's models: whoever walks over a model's modules in their order can put the layers in place.

    Args:
        plan: what is composed where.
        adapter: its name.
        config: its settings.
        stacks: the model's stacks of blocks.
        make: makes a group from its plan.
        twin: an adapter that is there already and has the same LoRAs, where the plan has none.
        stock: the library that LoRAs are shortlisted from; None where all are composed.
    """

    def __init__(
        self,
        plan: Plan,
        adapter: str,
        config: MoleConfig,
        stacks: Sequence[Stack],
        make: Callable[[GroupPlan], Group],
        twin: str | None = None,
        stock: Stock | None = None,
    ) -> None:
        self.plan, self.adapter, self.config, self.stacks = plan, adapter, config, stacks
        self.twin, self.stock = twin, stock
        self.distinct = [make(one) for one in plan.groups]
        self._of_module = {
            name: (one, group) for one, group in zip(plan.groups, self.distinct, strict=True) for name in one.members
        }

    def place(self, target: nn.Module, name: str) -> MoleLinear:
        """Gives one module its LoRAs, and its group's router where it is the owner.

        Args:
            target: a linear module, or one that carries LoRAs of another adapter already.
            name: its dotted name.

        Returns:
            The layer to put in the module's place; the module itself where it is one already.
        """
        if isinstance(target, MoleLinear):
            layer = target
        else:
            kind = MoleProjection if projects(BaseTunerLayer.get_base_layer(target)) else MoleLinear
            layer = kind(target, name, find_place(name, self.stacks))
            layer.is_watched = layer.is_watched and name not in self.plan.unfit
        one, group = self._of_module[name]
        group.members.append(layer)
        if name in one.inputs:
            group.inputs.append(layer)
        router = self._router(one, group) if name == (one.inputs or one.members)[0] else None
        layer.groups[self.adapter] = group
        if self.stock is not None:
            layer.shelve(self.adapter, self.stock.shelf(name), router)
        else:
            layer.update_layer(self.adapter, *self._brought(name, layer), self.config.embed_adapters, router)
        return layer

    def _brought(self, name: str, layer: MoleLinear) -> tuple[FrozenLoras, Tensor | None]:
        """A module's LoRAs, and what they add whatever the input."""
        if self.plan.factors is None and self.twin is not None:
            twin = layer.frozen(self.twin)
            constant = None if twin.constant is None else twin.constant.clone()
            return FrozenLoras(twin.A.clone(), twin.B.clone(), twin.ranks), constant
        has_factors = name in (self.plan.factors or ())
        loras = self.plan.loras(name) if has_factors else empty(self.plan.ranks[name], layer)
        return loras, self.plan.constant(name)

    def _router(self, one: GroupPlan, group: Group) -> GroupRouter:
        config, count = self.config, len(self.plan.names)
        widths = sum(self.plan.widths[read] for read in one.inputs)
        if isinstance(group, BlockGroup):
            widths = group.features
        positions = None if group.by_token else config.flatten_length
        tau = (config.temperature, config.learn_temperature)
        router: MoleRouter | SharedRouter
        if config.has_shared_router:
            router = SharedRouter(count, widths, *tau, config.router_scale)
        else:
            router = MoleRouter(count, widths, *tau, positions, config.router_scale)
        if not config.init_lora_weights:
            router.randomise()
        return router

    def summary(self) -> Summary:
        """What was put on the model."""
        plan, config = self.plan, self.config
        modules = {stack.name: [0] * stack.depth for stack in self.stacks}
        for name in plan.ranks:
            place = find_place(name, self.stacks)
            if place is not None:
                modules[place.stack][place.layer] += 1
        by_block = {name: [len(plan.names) if count else 0 for count in counts] for name, counts in modules.items()}
        used = {
            name: [min(count, config.top_k or config.shortlist or count) for count in counts]
            for name, counts in by_block.items()
        }
        trainable = sum(p.numel() for group in self.distinct for p in group.router.parameters())
        return Summary(
            method=f"MOLE of {len(plan.names)} LoRAs",
            adapter=self.adapter,
            stacks=tuple(self.stacks),
            experts=by_block,
            top_k=used,
            modules=modules,
            skipped=tuple(plan.skipped),
            notes=(numbered(plan.names), *plan.notes, *_settings(config, plan.groups, trainable)),
            trainable=trainable,
            unit="token" if config.router_input == "token" else "sequence",
        )


def numbered(names: Sequence[str]) -> str:
    """Which LoRA an expert's number in a trace means."""
    return f"LoRAs by number: {', '.join(f'{number} {name}' for number, name in enumerate(names))}"


def _settings(config: MoleConfig, groups: Sequence[GroupPlan], parameters: int) -> Iterator[str]:
    tau = f"temperature {config.temperature:g}{', learned' if config.learn_temperature else ''}"
    gates = ", gates from 0 to 2" if config.score == "sigmoid" else ""
    yield f"{len(groups)} routers, one for each {config.granularity}, reading by {config.router_input}, {tau}{gates}"
    yield f"routers: {parameters:,} parameters{', shared by all LoRAs' if config.has_shared_router else ''}"
    if config.shortlist is not None:
        yield f"each sequence has {config.shortlist} of {len(config.adapters)} LoRAs, retrieved by {config.retrieval}"
    if config.top_k is not None:
        yield f"of {len(config.adapters)} LoRAs the {config.top_k} with the largest weights are used"
    loss = (
        "no balance loss" if config.balance == "none" else f"balance {config.balance} x {config.router_aux_loss_coef:g}"
    )
    yield f"{loss}; LoRAs {'embedded in the file' if config.embed_adapters else 'saved as references'}"
    blind = [group.name for group in groups if not group.inputs]
    if blind:
        yield f"{len(blind)} routers read nothing, since no LoRA adapts what is given their input, first {blind[0]}"
    outside = [group.name for group in groups if group.input == "row"]
    if outside:
        yield f"each row of their input decides for itself: {', '.join(outside)}"
