"""One block of a stack with its guests."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lamella.backbones import BlockCall, Place, hidden_states_of, with_hidden_states
from lamella.backbones.offloading import onloaded
from lamella.compiling import between_graphs
from lamella.errors import CannotMergeError, LamellaError
from lamella.routing import (
    CachedDecision,
    Frame,
    Readable,
    Router,
    RouterLoss,
    Rows,
    attach,
    current_frame,
)
from lamella.tuners.cache import recall, refuse_foreign
from lamella.tuners.molex.cache import GuestSlots, can_extend, guest_slots, is_static
from lamella.tuners.molex.choosing import (
    Choice,
    as_routing,
    choose,
    decides_for_something,
    draw,
    guest_weights,
    hash_sequences,
    hash_tokens,
    new_router,
    pool_scores,
    score_candidates,
    spread,
)
from lamella.tuners.molex.config import MolexConfig
from lamella.tuners.molex.guests import (
    beginning,
    is_checkpointed,
    keep_in_graph,
    refuse_sharded,
    run_guest,
    show_mixture,
)
from lamella.tuners.molex.plan import Depth
from lamella.tuners.molex.second_model import SecondModel
from lamella.tuners.routed import AttachedLoss, RoutedLayer, refuse_recording
from lamella.tuners.tensors import AdapterLayer, AdapterTensors, is_meta

CANNOT_MERGE = (
    "MoLEx lets each sequence choose the blocks it runs through, so there is no single weight to merge into the base, "
    "and no plain LoRA that does the same (lamella.collapse and lamella.export_experts are for MoLA). Serve it with "
    "PEFT as it is, or train with policy='self', which is plain LoRA. A trainer that syncs weights by merging (TRL "
    "with vLLM) cannot use it."
)


_PRECISIONS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # not of codes of quantised weights


@dataclass(frozen=True)
class _Mixture:
    """One adapter's settings at this block."""

    config: MolexConfig
    depth: Depth

    @property
    def granularity(self) -> str:
        """What a decision is for; without a choice, all tokens of a sequence have the same guests."""
        return self.config.granularity if self.config.policy in ("learned", "random") else "sequence"


class MolexBlock(nn.Module, AdapterLayer):
    """``h' = B_t(h) + (1 - alpha) * sum_i c_i (B_i(h) - B_t(h))`` over the guests i that were chosen for h.

    Tensors per adapter, as a file calls them, where the block has its own: ``lamella_molex_router.weight (T, in)`` and
    ``.bias (T,)``, ``lamella_molex_alpha ()``, a logit, and ``lamella_molex_guests.aligner.down.weight (G, in)``,
    ``down.bias (G,)`` and ``up.weight (in, G)``. Blocks that share them find them at the first that has one. T counts
    the stack's blocks and those of a second model behind them.
    """

    adapter_layer_names: tuple[str, ...] = ("lamella_molex_router", "lamella_molex_alpha", "lamella_molex_guests")
    other_param_names: tuple[str, ...] = ("mixtures", "routers", "alphas", "seconds")

    def __init__(
        self, base_layer: nn.Module, place: Place, blocks: list[nn.Module], decoder: bool, after_encoder: bool = False
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.place = place
        self.decoder = decoder
        self.after_encoder = after_encoder
        # A plain list, so that the other blocks are not registered here a second time.
        self.blocks = blocks
        self.lamella_molex_router = nn.ModuleDict()
        self.lamella_molex_alpha = AdapterTensors()
        self.lamella_molex_guests = nn.ModuleDict()
        self.mixtures: dict[str, _Mixture] = {}
        self.routers: dict[str, MolexBlock] = {}
        self.alphas: dict[str, MolexBlock] = {}
        self.seconds: dict[str, MolexBlock] = {}
        self.merged_adapters: list[str] = []
        self.frozen_peft_weight_names: dict[str, tuple[str, ...]] = {}

    def update_layer(
        self,
        adapter: str,
        config: MolexConfig,
        depth: Depth,
        width: int,
        router_at: "MolexBlock | None",
        alpha_at: "MolexBlock | None",
        second: "tuple[MolexBlock, SecondModel] | None" = None,
    ) -> None:
        """Gives this block the settings of an adapter, and the router and alpha that it is to hold.

        Args:
            adapter: its name.
            config: its settings.
            depth: what happens at this block.
            width: features of the hidden states.
            router_at: the block that holds the router this one asks; None where none decides.
            alpha_at: the block that holds the learned alpha this one uses; None where it is fixed.
            second: the block that holds the second model whose blocks are guests here, and that model; None without.
        """
        self.mixtures[adapter] = _Mixture(config, depth)
        if router_at is not None:
            self.routers[adapter] = router_at
        if alpha_at is not None:
            self.alphas[adapter] = alpha_at
        device, dtype = _kind_of(self.base_layer)
        if second is not None:
            self.seconds[adapter] = second[0]
            if second[0] is self:
                self.lamella_molex_guests[adapter] = second[1].to(device, dtype)
        if router_at is self:
            router = new_router(config, width, self._total(adapter)).to(dtype)
            self.lamella_molex_router[adapter] = router if is_meta(router) else router.to(device)
            if not config.trains_router:
                self.frozen_peft_weight_names[adapter] = ("lamella_molex_router",)
        if alpha_at is self:
            alpha = torch.tensor(float(config.alpha)).logit().to(dtype)
            self.lamella_molex_alpha.put(adapter, alpha if alpha.is_meta else alpha.to(device))
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Maps what the block maps, ``(batch, tokens, features)``, and returns what the block returns."""
        adapter = self._running()
        if adapter is None:
            return self.base_layer(*args, **kwargs)
        call, frame = BlockCall(self.base_layer, args, kwargs), current_frame()
        if not self.mixtures[adapter].depth.mixes:
            return self._run_itself(call, frame)
        refuse_recording(self.name)
        refuse_sharded(self, self.base_layer)
        call.check_states(self.name)
        slots = self._slots(adapter, call, frame)
        choice = self._choice(adapter, call.hidden_states, frame, slots)
        output = self._run_itself(call, frame)
        mix = self._mixed_apart if choice.everywhere is None else self._mixed
        return with_hidden_states(output, mix(adapter, call, output, choice, slots, frame))

    def _mixed(
        self, adapter: str, call: BlockCall, output: Any, choice: Choice, slots: GuestSlots | None, frame: Frame | None
    ) -> Tensor:
        """The block's states with its guests, and what the router pays."""
        mixed = self._with_guests(adapter, call, output, choice, slots, frame)
        mixed = self._attach_losses(adapter, mixed, choice, frame)
        show_mixture(hidden_states_of(output), mixed)
        return mixed

    _mixed_apart = between_graphs("which blocks run, and on which rows, depends on what was chosen")(_mixed)

    def _run_itself(self, call: BlockCall, frame: Frame | None) -> Any:
        mixes = any(mixture.config.mixes for mixture in self.mixtures.values())  # or no block is ever a guest
        begins = mixes and call.cache is not None and frame is not None and frame.call.past == 0
        with beginning(self.base_layer, call.hidden_states.shape[1] == 1) if begins else nullcontext():
            return self.base_layer(*call.args, **call.kwargs)

    @property
    def name(self) -> str:
        """The block's dotted name in the model."""
        return f"{self.place.stack}.{self.place.layer}"

    @property
    def goes_with_sequences(self) -> bool:
        """Whether guests are mixed in here, whose keys go with each sequence, for `lamella.tuners.cache`."""
        adapter = self._running()
        return adapter is not None and self.mixtures[adapter].depth.mixes

    def routed(self, adapter: str) -> bool:
        """Whether a router decides here for the adapter."""
        return adapter in self.routers

    def router(self, adapter: str) -> Router:
        """The router that decides here, wherever it is held."""
        router = self.routers[adapter].lamella_molex_router[adapter]
        assert isinstance(router, Router)
        return router

    def routed_layer(self, adapter: str) -> RoutedLayer | None:
        """The router that decides here and its candidates, for `lamella.tuners.routed.RoutedModule`."""
        if not self.routed(adapter):
            return None
        config, depth = self.mixtures[adapter].config, self.mixtures[adapter].depth
        loss = None
        if config.router_aux_loss_coef > 0:
            is_flat = depth.top_k == len(depth.candidates)
            loss = AttachedLoss(self.name, f"router_aux_loss_coef={config.router_aux_loss_coef:g}", is_flat=is_flat)
        second = self.second_model(adapter)
        own = tuple(str(index) for index in range(len(self.blocks)))
        return RoutedLayer(
            self, self.name, self.place, adapter, self.router(adapter), len(depth.candidates), depth.top_k,
            expert_names=() if second is None else own + second.names, chooses_blocks=True,
            learns=config.trains_router, loss=loss,
        )  # fmt: skip

    def alpha(self, adapter: str, device: torch.device | None = None) -> Tensor | float:
        """The weight of the block's own output, a tensor on that device where it is learned."""
        if adapter not in self.alphas:
            return self.mixtures[adapter].config.alpha
        logits = self.alphas[adapter].lamella_molex_alpha
        with onloaded(logits[adapter]):
            return torch.sigmoid(logits.of(adapter)).to(device)

    def second_model(self, adapter: str) -> SecondModel | None:
        """The second model whose blocks are guests here too; None without one."""
        if adapter not in self.seconds:
            return None
        second = self.seconds[adapter].lamella_molex_guests[adapter]
        assert isinstance(second, SecondModel)
        return second

    def _total(self, adapter: str) -> int:
        """T, how many blocks a router scores."""
        return len(self.blocks) + len(self.second_model(adapter) or ())

    def _running(self) -> str | None:
        if self.disable_adapters:
            return None
        active = [adapter for adapter in self.active_adapters if adapter in self.mixtures]
        if len(active) > 1:
            raise LamellaError(
                f"{len(active)} MoLEx adapters are active at {self.name} ({', '.join(active)}), and each would put "
                "another block in the same place; activate one with set_adapter."
            )
        return active[0] if active else None

    def _slots(self, adapter: str, call: BlockCall, frame: Frame | None) -> GuestSlots | None:
        """Where guests keep their keys and values; None without a cache."""
        if frame is not None:
            refuse_foreign(frame.call, self.name)
        if call.cache is None or is_checkpointed(self.base_layer):
            return None
        goes_on = frame is not None and (frame.call.generation is not None or frame.call.past > 0)
        needs_slots = goes_on or is_static(call.cache)
        if self.mixtures[adapter].granularity != "token":
            packed = frame is not None and frame.call.past == 0 and frame.sequences(call.hidden_states).packed
            if packed or not (needs_slots or can_extend(call.cache)):
                return None  # a row of several documents is not continued, by the base neither
            slots = guest_slots(call.cache, len(self.blocks))
            if frame is not None and frame.call.past == 0:
                slots.begin(self.place.layer)
            return slots
        if needs_slots:
            raise LamellaError(
                "With granularity='token' any block can become the guest of any later token, and none has keys for the "
                "tokens before, so there is nothing to keep in a cache. Use use_cache=False, or granularity='sequence'."
            )
        return None

    def _choice(self, adapter: str, h: Tensor, frame: Frame | None, slots: GuestSlots | None) -> Choice:
        """The guests: as the cache has them, or decided now."""
        key = (adapter, self.name)
        first = self.mixtures[adapter].config.prompt_tokens
        cached = None if slots is None or frame is None else recall(frame, key, h, self.decoder, first)
        if cached is not None:
            if cached.worked_out is None:
                indices, weights = cached.tensors
                cached.worked_out = Choice(indices, weights).to(h.device)
            known: Choice = cached.worked_out
            return known
        with torch.autocast(h.device.type, enabled=False):
            choice = self._decide(adapter, h, frame, traced=slots is None and frame is not None and frame.is_traced)
        if slots is not None and frame is not None:
            assert choice.extent is not None
            frame.call.cached[key] = CachedDecision((choice.indices, choice.weights.detach()), choice.extent, first)
        if frame is not None and choice.routing is not None:
            shape = choice.routing.indices.shape[:1] if choice.routing.granularity != "token" else h.shape[:2]
            for observe in frame.observers:
                observe(self, adapter, choice.routing, choice.real, shape)
        return choice

    def _decide(self, adapter: str, h: Tensor, frame: Frame | None, traced: bool) -> Choice:
        mixture = self.mixtures[adapter]
        config, depth, granularity = mixture.config, mixture.depth, mixture.granularity
        has_same = not self.routed(adapter) and config.policy != "random"  # guests for all sequences
        readable = self._readable(h, frame, granularity, config, traced)
        read, sequences = readable.read, readable.sequences
        if self.routed(adapter):
            scores = score_candidates(self._logits(adapter, h), depth.candidates, config.score)
            rows = pool_scores(scores, read, sequences, granularity)
            picked, mean = choose(*rows, depth.top_k, config.aggregate)
            weights = guest_weights(mean.gather(1, picked), config.router_gradient)
            logits = mean.clamp_min(torch.finfo(mean.dtype).tiny).log()
        else:
            logits, picked = self._without_router(mixture, h, readable, frame)
            weights = torch.full_like(logits[:, :1], 1 / picked.shape[1]).expand(picked.shape)
        is_watched = frame is not None and bool(frame.observers)
        every = (depth.candidates, self._total(adapter), granularity)
        chosen = torch.as_tensor(depth.candidates, device=h.device)[picked]  # (decisions, k)
        laid_out = (*h.shape[:2], sequences, granularity)
        return Choice(
            indices=chosen[:1].expand(len(h), -1) if has_same else spread(chosen, *laid_out),
            weights=weights[:1].expand(len(h), -1) if has_same else spread(weights, *laid_out),
            without=readable.without,
            extent=readable.extent,
            routing=as_routing(logits, picked, weights, *every) if is_watched else None,
            real=decides_for_something(read, sequences, granularity),
            scores=logits if self.routed(adapter) else None,
            picked=picked,
            everywhere=depth.candidates[: depth.top_k] if has_same else None,
        )

    def _readable(
        self, h: Tensor, frame: Frame | None, granularity: str, config: MolexConfig, traced: bool
    ) -> Readable:
        if frame is None:
            return Readable(torch.ones(h.shape[:2], dtype=torch.bool, device=h.device), None, Rows(len(h)))
        self._refuse_padded_inside(h, frame)
        if granularity == "token":  # a token decides by itself, so it sees nothing later
            return Readable(frame.real_tokens(h), None, frame.sequences(h, traced))
        return frame.readable(h, self.decoder, config.prompt_tokens, traced)

    def _refuse_padded_inside(self, h: Tensor, frame: Frame) -> None:
        if frame.of_stack is None and frame.width is not None and h.shape[1] > frame.width:
            raise LamellaError(
                f"{self.name} is given {h.shape[1]} tokens where the model was given {frame.width}: the model has "
                "padded them itself, and nothing says which are real. Pad the batch to that length "
                "(pad_to_multiple_of), with an attention_mask."
            )

    def _logits(self, adapter: str, h: Tensor) -> Tensor:
        """The router's scores of all blocks, in float32 or wider, ``(batch, tokens, T)``."""
        router = self.router(adapter)
        with onloaded(*router.modules()):
            wide = h.to(router.weight.device, torch.promote_types(h.dtype, torch.float32))
            return router.logits(wide.flatten(0, 1)).view(*h.shape[:2], -1).to(h.device)

    def _without_router(
        self, mixture: _Mixture, h: Tensor, readable: Readable, frame: Frame | None
    ) -> tuple[Tensor, Tensor]:
        """Logits of the candidates, equal, and those chosen: for the policies, and where there is only one."""
        config, depth, read, sequences = mixture.config, mixture.depth, readable.read, readable.sequences
        count = len(depth.candidates)
        if config.policy == "random":
            if frame is None:
                raise LamellaError(
                    f"policy='random' draws from what the model reads, so {self.name} cannot run outside its forward."
                )
            given = frame.given
            if (stack := frame.of_stack) is not None and given is not None:  # other tokens than those that were given
                given = hash_sequences(given, stack.mask)[:, None]
            tokens = hash_tokens(given, read, sequences, self._hash_source(frame, len(read)))
            drawn = draw(tokens, sequences, depth.index, config.seed, count, mixture.granularity)
            picked = drawn.sort(dim=1, descending=True, stable=True).indices[:, : depth.top_k]
        else:
            rows = {"token": read.numel(), "batch": 1}.get(mixture.granularity, sequences.count)
            picked = torch.arange(depth.top_k, device=h.device).expand(rows, -1)
        logits = torch.zeros(len(picked), count, dtype=torch.promote_types(h.dtype, torch.float32), device=h.device)
        return logits, picked

    def _hash_source(self, frame: Frame, rows: int) -> Tensor | None:
        """A hash of what the encoder was given, ``(rows,)``: all decoders' prompts begin with the same token."""
        if not self.after_encoder:
            return None
        around, generation = frame.parent, frame.call.generation
        given = around.given if around is not None and around.call is frame.call else None
        if given is None and generation is not None:
            given = generation.source
        if given is None:
            raise LamellaError(
                f"policy='random' draws from what the model reads, and {self.name} is not told what its encoder was "
                "given: pass input_ids beside encoder_outputs."
            )
        return hash_sequences(given.repeat_interleave(rows // len(given), dim=0), frame.encoder_mask)

    def _with_guests(
        self, adapter: str, call: BlockCall, output: Any, choice: Choice, slots: GuestSlots | None, frame: Frame | None
    ) -> Tensor:
        """Adds each chosen block's difference from this one, run on the rows in which something chose it."""
        host, depth = hidden_states_of(output), self.place.layer
        spans_rows = frame is not None and frame.packing.spans_rows
        guests = choice.to(host.device).guests  # which need not be where the block's input is
        left = 1 - self.alpha(adapter, host.device)
        mixed = host
        for guest, chosen_by, share in guests:
            if guest == depth:
                continue
            rows = None if spans_rows else chosen_by
            states = self._run_guest(adapter, guest, rows, call, output, slots)
            share = (share * left).to(host.dtype)  # (batch, tokens or 1, 1)
            if rows is None:
                mixed = mixed + share * (states - host)
            else:
                add = mixed.index_add if mixed is host else mixed.index_add_  # in place once it is a tensor of ours
                mixed = add(0, rows, share[rows] * (states - host[rows]))
        return mixed

    def _run_guest(
        self, adapter: str, guest: int, rows: Tensor | None, call: BlockCall, output: Any, slots: GuestSlots | None
    ) -> Tensor:
        """The states that a guest makes of these rows of the block's input, ``(rows, tokens, features)``."""
        config, second, place = self.mixtures[adapter].config, self.second_model(adapter), guest - len(self.blocks)
        depth, batch, frame = self.place.layer, len(call.hidden_states), current_frame()
        past = None if frame is None else frame.call.past
        runs_on_all = slots is not None and slots.has_all(depth, guest, batch)
        is_cut = rows is not None and not runs_on_all and (place >= 0 or call.can_cut(output))
        together = rows if is_cut else None
        if place >= 0 and second is not None:
            recompute = config.recompute_guest or is_checkpointed(self.base_layer)
            view = None if slots is None else second.view(slots, depth, guest, together, batch, past)
            states = second.run(place, call.hidden_states, together, frame, view, config.guest_dtype, recompute)
        else:
            view = None if slots is None else slots.view(depth, guest, together, batch, past)
            kept = None if slots is None else slots.states(depth, guest)
            settings = config.guest_dtype, config.recompute_guest
            states = run_guest(self.blocks[guest], call, together, view, kept, output, *settings)
        return states if rows is None or together is not None else states[rows]

    def _attach_losses(self, adapter: str, mixed: Tensor, choice: Choice, frame: Frame | None) -> Tensor:
        """The router's own loss, and a place in the graph for parameters that no guest used."""
        if not self.training or not torch.is_grad_enabled():
            return mixed
        idle: list[Tensor] = [self.alphas[adapter].lamella_molex_alpha.of(adapter)] if adapter in self.alphas else []
        idle += self.seconds[adapter].lamella_molex_guests[adapter].parameters() if adapter in self.seconds else []
        if choice.scores is not None:
            self._check_trainable(adapter)
            if choice.scores.requires_grad:
                mixed = self._balanced(adapter, mixed, choice, frame)
                idle.append(choice.scores)
        return keep_in_graph(mixed, idle)

    def _balanced(self, adapter: str, mixed: Tensor, choice: Choice, frame: Frame | None) -> Tensor:
        coefficient = self.mixtures[adapter].config.router_aux_loss_coef
        if coefficient == 0:
            return mixed
        if frame is None:
            raise LamellaError(
                f"{self.name} trains outside a forward of its model, where padding and the scale of the task loss are "
                "unknown to its balance loss. Call the model itself, or set router_aux_loss_coef=0."
            )
        loss = RouterLoss(coefficient, 0.0)
        assert choice.scores is not None
        others = (choice.picked, choice.real)
        return attach(mixed, choice.scores, loss.value, loss.gradient, others, frame, self.name)

    def _check_trainable(self, adapter: str) -> None:
        config = self.mixtures[adapter].config
        if not config.trains_router and any(p.requires_grad for p in self.router(adapter).parameters()):
            raise LamellaError(
                f"The router of adapter {adapter!r} is set to train, but cannot receive a gradient: with "
                "router_gradient='none' the task loss does not depend on it, and router_aux_loss_coef=0 leaves no "
                "other. Use router_gradient='scale', a router_aux_loss_coef above 0, or leave the router frozen."
            )

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        raise CannotMergeError(CANNOT_MERGE)

    def unmerge(self) -> None:
        raise CannotMergeError(f"{self.name} is never merged, so there is nothing to unmerge.")

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Models ask a block what kind of attention it has.
            if name.startswith("_") or name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def __repr__(self) -> str:
        return "molex." + super().__repr__()


def _kind_of(block: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a block's weights lie and in which precision, which PEFT widens afterwards unless told not to."""
    first = next(block.parameters())
    kinds = (parameter.dtype for parameter in block.parameters() if parameter.dtype in _PRECISIONS)
    return first.device, next(kinds, torch.float32)
