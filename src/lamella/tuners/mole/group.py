"""What decides: a group of modules of one adapter that share a router's decision.

A module asks its group for the LoRAs' weights. The first module of the group that runs is where the decision is taken,
from the outputs of those LoRAs whose input is the group's; the others find it in the frame, or in the cache.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from lamella.backbones import Place
from lamella.backbones.offloading import onloaded
from lamella.errors import LamellaError
from lamella.kernels import FrozenLoras
from lamella.routing import (
    CachedDecision,
    Decision,
    Frame,
    Override,
    Projection,
    Readable,
    Routing,
    Rows,
    SharedDecision,
    mixing_weights,
)
from lamella.tuners.cache import recall
from lamella.tuners.mole.balancing import RouterBalance
from lamella.tuners.mole.config import MoleConfig
from lamella.tuners.mole.plan import GroupPlan
from lamella.tuners.mole.router import GroupRouter, RankSpaceInputs, RouterInputs
from lamella.tuners.routed import refuse_recording


class Member(nn.Module):
    """A module that asks its group for weights."""

    name: str
    lamella_mole_router: nn.ModuleDict
    lamella_mole_loras: nn.ModuleDict

    @property
    def reads_encoder(self) -> bool:
        """Whether its input is the encoder's states."""
        raise NotImplementedError

    def loras(self, adapter: str) -> FrozenLoras:
        """The LoRAs of an adapter, scaling inside B."""
        raise NotImplementedError

    def runs(self, group: "Group") -> bool:
        """Whether the group's adapter is on here."""
        raise NotImplementedError


class Group:
    """The modules of one adapter that share a decision.

    Attributes:
        place: where it lies, and its name there, for who watches.
        name: its dotted name in the model.
        key: the adapter's name and its own.
        names: the K LoRAs, in the order of the logits.
        members: the modules that its weights are for, in the model's order.
        inputs: those whose LoRAs' outputs the router reads.
        balance: what its router pays.
        watchers: who wants to see what each member is given and its weights.
    """

    def __init__(self, plan: GroupPlan, adapter: str, config: MoleConfig, names: Sequence[str], decoder: bool) -> None:
        self.place: Place = plan.place
        self.name = plan.name
        self.input = plan.input
        self.spans_blocks = plan.spans_blocks
        self.adapter = adapter
        self.key = (adapter, plan.name)
        self.config = config
        self.names = tuple(names)
        self.decoder = decoder
        self.members: list[Member] = []
        self.inputs: list[Member] = []
        self.balance = RouterBalance(
            adapter, plan.name, config.balance, config.router_aux_loss_coef, plan.balance_share
        )
        self.watchers: list[Callable[..., None]] = []

    @property
    def by_token(self) -> bool:
        """Whether each row of the input has a decision of its own."""
        return self.config.router_input == "token" or self.input == "row"

    @property
    def goes_with_sequences(self) -> bool:
        """Whether a sequence that goes on in a later call goes on with the decision of its first."""
        return self.decoder and self.input == "own" and not self.by_token

    @property
    def looks_at_no_number(self) -> bool:
        """Whether what runs depends on no number in a tensor, so that it can be traced."""
        config = self.config
        return config.form == "delta" and config.router_input != "flatten" and config.shortlist is None

    @property
    def owner(self) -> Member:
        """The module that holds the router."""
        return (self.inputs or self.members)[0]

    @property
    def router(self) -> GroupRouter:
        """The router, which may be on another device than the members."""
        router = self.owner.lamella_mole_router[self.adapter]
        assert isinstance(router, GroupRouter)
        return router

    def mixing_weights(self, layer: Member, x: Tensor, frame: Frame | None) -> tuple[Tensor | None, Tensor | None]:
        """The LoRAs' weights for a module's input.

        Args:
            layer: one of the members.
            x: its input, ``(*rows, in)``.
            frame: the running stack's.

        Returns:
            Weights ``(*some, K)``, ``some`` a leading part of ``rows``, None where no LoRA is to run; and ``A x`` where
            it is known already.
        """
        override = self.override(frame)
        if override.fixed is not None:
            fixed = override.fixed_weights(x.device)
            if layer is self.owner:
                self.show_fixed(fixed, x, frame)
            weights, h = fixed if fixed.dim() == 1 else self.repeated(fixed, layer, x), None
        else:
            weights, h = self._routed(layer, x, frame, override)
        for watch in self.watchers:
            watch(layer, x, weights, frame)
        return weights, h

    def leaves_out(self, weights: Tensor) -> bool:
        """Whether weights are for so few sequences that some LoRAs have none in any of them, ties apart."""
        top_k = self.config.top_k
        if top_k is None or torch.compiler.is_compiling():  # how many are used is no shape that can be compiled
            return False
        return weights.dim() == 2 and len(weights) * top_k < len(self.names)

    def override(self, frame: Frame | None) -> Override:
        """What holds in this call in place of the router."""
        said = None if frame is None else frame.call.overrides.get(self.adapter)
        return said or Override(self.adapter)

    def _routed(
        self, layer: Member, x: Tensor, frame: Frame | None, override: Override
    ) -> tuple[Tensor, Tensor | None]:
        decision = None if frame is None else self._taken_before(layer, frame)
        if decision is None:
            if not self.looks_at_no_number:
                refuse_recording(self.name)
            self._refuse_too_early(layer)
            self._refuse_other_rows(layer, x, frame)
            decision = self.decide(layer, x, self.router_inputs(override, frame), frame, override)
        shared = None if frame is None else frame.projections.pop((layer, self.adapter), None)
        return self.fit(decision, layer, x), shared.down if shared is not None and shared.x is x else None

    def router_inputs(self, override: Override, frame: Frame | None) -> RouterInputs:
        """What the router reads."""
        with onloaded(*(member.lamella_mole_loras[self.adapter] for member in self.inputs)):
            return RankSpaceInputs(self.router, [member.loras(self.adapter) for member in self.inputs])

    def without_decision(self, override: Override, like: Tensor) -> Tensor:
        """The weights, ``(K,)`` as ``like``, of tokens that run without the decision."""
        return override.weights(torch.zeros_like(like), None, self.config.score)

    def _taken_before(self, layer: Member, frame: Frame) -> Decision | None:
        """The decision already taken in this call; None where the module that took it is called again."""
        decision = frame.decisions.get(self.key)
        shared = frame.call.decisions.get(self.key) if decision is None else None
        # A recomputed block takes its own decision anew, and only its own.
        if shared is not None and layer is not shared.decision.taken_at:
            return shared.seen(frame.recomputing)
        return None if decision is None or decision.taken_at is layer else decision

    def _refuse_too_early(self, layer: Member) -> None:
        if self.inputs and layer not in self.inputs:
            raise LamellaError(
                f"{layer.name} runs before any module that {self.name} reads to decide its weights, or outside a "
                "forward of its model. Call the model itself; if it does run in that order, use granularity='matrix'."
            )

    def _refuse_other_rows(self, layer: Member, x: Tensor, frame: Frame | None) -> None:
        before = None if frame is None else frame.decisions.get(self.key)
        if before is not None and before.rows != x.shape[:-1] and len(self.members) > 1:
            raise LamellaError(
                f"{layer.name} decides for all of {self.name} and is called twice, with {tuple(before.rows)} rows and "
                f"then with {tuple(x.shape[:-1])}, which cannot be the same tokens: in DeBERTa with share_att_key, a "
                "table of relative positions. Use granularity='matrix', where each decides for itself."
            )

    def decide(
        self, layer: Member, x: Tensor, inputs: RouterInputs, frame: Frame | None, override: Override
    ) -> Decision:
        """Takes the decision, with its balance loss attached and its observers told.

        Args:
            layer: the module at whose call it is taken.
            x: the group's input, ``(*rows, in)``.
            inputs: the LoRAs' outputs for it.
            frame: the running stack's.
            override: what holds in place of the router.
        """
        with torch.autocast(x.device.type, enabled=False):
            take = self._decide_by_token if self.by_token else self._decide_by_sequence
            decision, logits, real = take(layer, x, inputs, frame, override)
        pays = self.owner.training and self.balance.counts
        if frame is None:
            if pays and logits.requires_grad:
                raise LamellaError(
                    f"{self.name} trains outside a forward of its model, where padding and the scale of the task loss "
                    "are unknown to its balance loss. Call the model itself, checkpoint with "
                    "gradient_checkpointing_enable(), or set balance='none'."
                )
            return decision
        if pays:
            trains = any(parameter.requires_grad for parameter in self.router.parameters())
            decision = replace(decision, weights=self.balance.attach(decision.weights, logits, real, trains, frame))
        if self.spans_blocks:
            decision = self._share(decision, frame)
        frame.decisions[self.key] = decision
        return decision

    def _share(self, decision: Decision, frame: Frame) -> Decision:
        """Leaves a decision for the other blocks of the call; returns it for the block at hand."""
        before = frame.call.decisions.get(self.key)
        if frame.recomputing and before is not None:
            return replace(decision, weights=before.retaken(decision.weights))
        frame.call.decisions[self.key] = SharedDecision(decision)
        return decision

    def _decide_by_token(
        self, layer: Member, x: Tensor, inputs: RouterInputs, frame: Frame | None, override: Override
    ) -> tuple[Decision, Tensor, Tensor | None]:
        """The decision, the logits it comes from, and which rows of those are real, ``(rows,)``."""
        logits, projections = inputs.by_token(x)
        if frame is not None:
            for member, h in zip(self.inputs, projections, strict=False):  # a block's outputs bring none
                frame.projections[member, self.adapter] = Projection(x, h)
        mask = None if frame is None else frame.token_mask(x, self.input == "encoder", layer.name)
        self._show(logits, override, mask, x.shape[:-1], frame)
        return (
            Decision(override.weights(logits, self.config.top_k, self.config.score), layer, x.shape[:-1]),
            logits,
            mask,
        )

    def _decide_by_sequence(
        self, layer: Member, x: Tensor, inputs: RouterInputs, frame: Frame | None, override: Override
    ) -> tuple[Decision, Tensor, Tensor | None]:
        tokens = self.as_sequences(layer, x, frame)  # (batch, tokens, in)
        first = self.config.prompt_tokens
        travels = frame is not None and self.goes_with_sequences
        cached = recall(frame, self.key, tokens, self.decoder, first) if frame is not None and travels else None
        if cached is not None:
            logits = cached.tensors[0].to(x.device)
            return (
                Decision(override.weights(logits, self.config.top_k, self.config.score), layer, x.shape[:-1]),
                logits,
                None,
            )
        readable = self.readable(tokens, layer, frame)
        read, sequences = readable.read, readable.sequences
        logits = inputs.by_sequence(tokens, read, sequences)  # (S, K)
        by_row = sequences.by_row(logits.detach())  # (batch, K)
        if frame is not None and travels and by_row is not None:
            frame.call.cached[self.key] = CachedDecision((by_row,), readable.extent, first)
        real = sequences.total(read.long()) > 0  # (S,)
        self._show(logits, override, real, logits.shape[:1], frame)
        uniform = None if readable.without is None else self.without_decision(override, logits[0])
        weights = override.weights(logits, self.config.top_k, self.config.score)
        return Decision(weights, layer, x.shape[:-1], readable.without, uniform, sequences), logits, real

    def as_sequences(self, layer: Member, x: Tensor, frame: Frame | None) -> Tensor:
        """An input as ``(batch, tokens, in)``."""
        if x.dim() > 2:
            return x.flatten(1, -2)
        said = () if frame is None else (frame.mask, frame.given)
        rows = next(
            (known.shape[:2] for known in said if known is not None and known.shape[:2].numel() == len(x)), None
        )
        if rows is not None:
            return x.view(*rows, -1)
        raise LamellaError(
            f"{layer.name} is given rows of which nobody says to which sequence they belong, shape {tuple(x.shape)}, "
            "and a router decides for whole sequences. Use router_input='token' with granularity='matrix'."
        )

    def readable(self, tokens: Tensor, layer: Member, frame: Frame | None) -> Readable:
        """What a decision for whole sequences may read."""
        if frame is None:
            everything = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
            return Readable(everything, None, Rows(len(tokens)))
        if self.input == "encoder":
            mask = frame.token_mask(tokens, of_encoder=True)
            ones = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
            read = ones if mask is None else mask.view(tokens.shape[:2]).to(tokens.device)
            return Readable(read, None, Rows(len(tokens)))
        traced = self.looks_at_no_number and frame.is_traced
        return frame.readable(tokens, self.decoder, self.config.prompt_tokens, traced)

    def fit(self, decision: Decision, layer: Member, x: Tensor) -> Tensor:
        """The decision's weights for this module's rows."""
        weights = decision.weights.to(x.device)
        if self.by_token:
            return self._by_token(weights, layer, x)
        sequences = decision.sequences
        packed = sequences is not None and sequences.packed
        if sequences is not None and packed and layer.reads_encoder:
            by_row = None if bool(sequences.mixed) else sequences.by_row(weights)
            if by_row is None:
                raise LamellaError(
                    f"{layer.name} reads the encoder's states for several documents in one row, and which of them each "
                    "state belongs to is not known. Give each document a row of its own, or use router_input='token'."
                )
            weights, packed = by_row, False
        if decision.without is None and not packed:
            return self.repeated(weights, layer, x)
        uniform = None if decision.uniform is None else decision.uniform.to(x.device)
        without = None if decision.without is None else decision.without.to(x.device)
        if layer.reads_encoder:  # every token attends to these rows, those that run without the decision too
            assert without is not None
            assert uniform is not None
            mixed = torch.where(without.any(dim=1, keepdim=True), uniform, weights)
            return self.repeated(mixed, layer, x)
        by_token = weights[:, None] if sequences is None else sequences.spread(weights)  # (batch, tokens or 1, K)
        if without is not None and uniform is not None:
            by_token = torch.where(without[..., None], uniform, by_token)  # (batch, tokens, K)
        return self._by_token(by_token, layer, x)

    def _by_token(self, weights: Tensor, layer: Member, x: Tensor) -> Tensor:
        """Weights per token ``(*rows, K)`` for a module that is given the same tokens."""
        if weights[..., 0].numel() != x[..., 0].numel():
            raise LamellaError(
                f"{layer.name} is given {tuple(x.shape[:-1])} rows, and {self.name} has decided for "
                f"{tuple(weights.shape[:-1])}. Use router_input='mean' or granularity='matrix'."
            )
        return weights.view(*x.shape[:-1], -1)

    def repeated(self, weights: Tensor, layer: Member, x: Tensor) -> Tensor:
        """Weights per sequence for rows of which several, one after another, belong to each."""
        rows, sequences = x.shape[0], weights.shape[0]
        if rows % sequences:
            raise LamellaError(
                f"There are weights for {sequences} sequences, and {layer.name} is given {rows} rows; give one set of "
                "weights per sequence of the batch."
            )
        return weights if rows == sequences else weights.repeat_interleave(rows // sequences, dim=0)

    def _show(
        self, logits: Tensor, override: Override, real: Tensor | None, shape: torch.Size, frame: Frame | None
    ) -> None:
        """Shows the decision to who watches."""
        if frame is None or not frame.observers:
            return
        rows = override.masked(logits.detach()).flatten(0, -2)  # (N, K)
        score, top_k = self.config.score, self.config.top_k or self.config.shortlist
        given = mixing_weights(rows, self.config.top_k, score)
        if score == "sigmoid":  # so that their softmax are the gates' shares
            rows = nn.functional.logsigmoid(rows)
        weights, indices = given.sort(dim=-1, descending=True, stable=True)
        used = len(self.names) if override.allowed is None else int(override.allowed.sum())
        if top_k is not None:
            used = min(used, max(top_k, int((given > 0).sum(dim=-1).max())))  # more where some tie
        granularity: Literal["token", "sequence"] = "token" if self.by_token else "sequence"
        routing = Routing(rows, weights[:, :used], indices[:, :used], granularity)
        for observe in frame.observers:
            observe(self, self.adapter, routing, real, shape)

    def show_fixed(self, fixed: Tensor, x: Tensor, frame: Frame | None) -> None:
        """Shows fixed weights as the decision for every sequence."""
        if frame is None or not frame.observers:
            return
        rows = fixed.expand(len(x), -1) if fixed.dim() == 1 else self.repeated(fixed, self.owner, x)
        weights, indices = rows.sort(dim=-1, descending=True, stable=True)
        logits = rows.clamp_min(torch.finfo(rows.dtype).tiny).log()  # all may be 0
        routing = Routing(logits, weights, indices, "sequence")
        for observe in frame.observers:
            observe(self, self.adapter, routing, None, x.shape[:1])
