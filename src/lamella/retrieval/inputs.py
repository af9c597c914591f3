"""What a base gives its modules on the rows that a LoRA was trained on: the centroids of its card."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lamella.backbones import find_stacks, rehearse
from lamella.backbones.modes import evaluating
from lamella.backbones.offloading import input_device
from lamella.retrieval.examples import Batch
from lamella.routing import Frame, RoutedCall, Rows, Sequences, current_frame, find_tracker, pool_mean, untrack_calls
from lamella.tuners.model import track
from lamella.tuners.mole.plan import GroupPlan, plan_groups
from lamella.tuners.mole.shelf import embedding_of
from lamella.tuners.mole.shortlisted import text_of

_TEXT = ""  # no module's name


class Inputs(NamedTuple):
    """Means over groups of rows.

    Attributes:
        centroids: of what each module is given, ``(groups, in)``, by its name; none of a module that is given other
            rows than the tokens of sequences.
        texts: of the rows' text embeddings, ``(groups, features)``; None where nothing embeds them.
    """

    centroids: dict[str, Tensor]
    texts: Tensor | None


@torch.no_grad()
def mean_inputs(model: nn.Module, modules: Sequence[str], groups: Sequence[Iterable[Batch]]) -> Inputs:
    """Means of what some modules are given, over the tokens by which a composition decides; one forward for each batch.

    Those are a sequence's real tokens, and on a decoder its prompt: what stands before the first label, or all of a row
    whose labels begin with it, which in ``generate`` would be the prompt.

    Args:
        model: the base, without an adapter that is on.
        modules: names of linear modules.
        groups: of each group of rows, batches that the model is called with.
    """
    stacks = find_stacks(model)
    plans = plan_groups(modules, modules, stacks, "matrix", by_token=False, rehearsal=rehearse(model, stacks, modules))
    causal = {stack.name for stack in stacks if stack.causal}
    embedding = embedding_of(model)
    found = []
    with evaluating(model), _tracked(model):
        for batches in groups:
            group = _Means(embedding)
            with ExitStack() as hooks:
                for plan in (one for one in plans if one.input != "row"):
                    note = partial(group.note, plan, plan.place.stack in causal)
                    module = model.get_submodule(plan.members[0])
                    hooks.enter_context(module.register_forward_pre_hook(note, with_kwargs=True))
                for batch in batches:
                    model(**{key: value.to(input_device(model)) for key, value in batch.items()})
            found.append(group.sums)
    names = [name for name in found[0] if all(name in sums for sums in found)]
    centroids = {
        name: torch.stack([total / count for total, count in (sums[name] for sums in found)]) for name in names
    }
    return Inputs(centroids, centroids.pop(_TEXT, None))


class _Means:
    """Sums over the sequences of one group, by module, and how many there were; those of texts under no name."""

    def __init__(self, embedding: nn.Module | None) -> None:
        self.sums: dict[str, tuple[Tensor, int]] = {}
        self._embedding = embedding
        self._call: RoutedCall | None = None  # whose texts are in the sums

    def note(
        self, plan: GroupPlan, decoder: bool, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Forward pre-hook of a module."""
        x, frame = next(iter((*args, *kwargs.values()))), current_frame()
        if frame is None or x.dim() < 3:
            return
        tokens = x.flatten(1, -2)  # (batch, tokens, in)
        read, sequences = _read(frame, tokens, plan.input == "encoder", decoder)
        self._add(plan.members[0], pool_mean(tokens.float().masked_fill(~read[..., None], 0), read, sequences))
        if self._embedding is not None and self._call is not frame.call:
            self._call = frame.call
            texts = text_of(self._embedding, frame, read, sequences)
            if texts is not None:
                self._add(_TEXT, texts)

    def _add(self, name: str, rows: Tensor) -> None:
        total, count = self.sums.get(name, (0, 0))
        self.sums[name] = total + rows.float().sum(dim=0).cpu(), count + len(rows)


def _read(frame: Frame, tokens: Tensor, of_encoder: bool, decoder: bool) -> tuple[Tensor, Sequences]:
    """Which tokens ``(batch, tokens)`` a decision would read, and the sequences."""
    if of_encoder:
        known = frame.token_mask(tokens, of_encoder=True)
        everything = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return everything if known is None else known.view(tokens.shape[:2]).to(tokens.device), Rows(len(tokens))
    real, sequences = frame.real_tokens(tokens), frame.sequences(tokens)
    given = frame.call.given
    prompt = given.prompt(real, sequences) if decoder and given is not None else None
    if prompt is None or frame.call.tracker.whole_input:
        return real, sequences
    return torch.where(sequences.spread(sequences.total(prompt.long()) > 0), prompt, real), sequences


@contextmanager
def _tracked(model: nn.Module) -> Iterator[None]:
    was = find_tracker(model) is not None
    track(model)
    try:
        yield
    finally:
        if not was:
            untrack_calls(model)
