"""`smollm2-experts`: a Llama whose last MLPs are experts of which it is known what each was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lamella.errors import LamellaError
from lamella.lab.data import Task, load_backbone
from models.building import Clock, Made
from models.corpus import documents, prose, token_blocks
from models.fitting import Columns, Curve, fit
from models.scores import expert_shares, model_nll, perplexities, routers_balance, smallest
from models.settings import SmolExpertsSettings
from models.upcycling import last_layers, put_experts, states_before, upcycled

Weights: TypeAlias = list[dict[str, Tensor]]  # the MLPs' state dicts, one per layer
_CHARACTERS = 8  # more than a token of prose has


def make_smollm2_experts(settings: SmolExpertsSettings) -> Made:
    """Train two experts for each kind of prose on halves of its documents, put them together and train their routers.

    What enters the trained layers never changes, so it is computed once; each step runs those layers alone.
    """
    clock, backbone = Clock(), load_backbone(settings.model)
    model, count = backbone.model, settings.layers
    model.requires_grad_(False)
    mixture = upcycled(model, count, 2 * len(settings.kinds), settings.top_k, settings.seed)
    with clock.part("hidden states"):
        tasks = {kind: prose(kind) for kind in settings.kinds}
        halves, test = _texts(settings, tasks, model, backbone.tokenizer)
    log: dict[str, Any] = {
        "source": backbone.source,
        "sources": {kind: task.source for kind, task in tasks.items()},
        "untrained_logit_difference": _difference(model, mixture, test),
    }
    dense = last_layers(model, count)
    copied = _weights(dense)
    log["test_perplexity"] = {"dense": _perplexities(dense, test)}
    trained: list[Weights] = []
    curves: dict[str, Curve] = {}
    with clock.part("experts"):
        for name, columns in halves.items():
            curves[name] = _train_expert(dense, copied, columns, settings)
            trained.append(_weights(dense))
            log["test_perplexity"][name] = _perplexities(dense, test)
    for layer, block in enumerate(mixture.model.layers[-count:]):
        put_experts(block.mlp.experts, [expert[layer] for expert in trained])
    last = last_layers(mixture, count)
    with clock.part("routers"):
        curves["routers"] = _train_routers(last, halves, settings)
    mixture.to(torch.bfloat16).float()  # figures of the experts that are kept
    log["test_perplexity"]["mixture"] = _perplexities(last, test)
    log["shares"] = expert_shares(last, _joined(test), settings.top_k)
    log["shares_by_kind"] = {kind: expert_shares(last, columns, settings.top_k) for kind, columns in test.items()}
    log |= {"smallest_share": smallest(log["shares"]), "seconds": clock.seconds, "curves": curves}
    return Made(
        mixture.to(torch.bfloat16),
        backbone.tokenizer,
        log,
        _failed(log, settings),
        {"ground_truth.json": _ground_truth(settings, model.config.num_hidden_layers)},
    )


def _texts(
    settings: SmolExpertsSettings,
    tasks: Mapping[str, Task],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[dict[str, Columns], dict[str, Columns]]:
    """What enters the trained layers: for training by kind and half ("news 0"), for the test by kind."""

    def columns(texts: list[str], blocks: int) -> Columns:
        ids = token_blocks(texts, tokenizer, settings.block)
        if len(ids) < blocks:
            raise LamellaError(f"{kind} fills {len(ids)} of {blocks} blocks of {settings.block} tokens. Ask for fewer.")
        states = states_before(model, settings.layers, ids[:blocks])
        return {"inputs_embeds": states, "labels": ids[:blocks]}

    per_block = settings.block * _CHARACTERS
    halves, test = {}, {}
    for kind, task in tasks.items():
        texts = documents(task, "train", 3 * settings.blocks * per_block, settings.seed)
        for half in (0, 1):
            with torch.autocast(model.device.type, torch.bfloat16, enabled=settings.experts.bf16):
                halves[f"{kind} {half}"] = columns(texts[half::2], settings.blocks)
        test[kind] = columns(documents(task, "test", settings.held_out_blocks * per_block), settings.held_out_blocks)
    return halves, test


def _train_expert(
    dense: PreTrainedModel,
    copied: Weights,
    columns: Columns,
    settings: SmolExpertsSettings,
) -> Curve:
    """Train the MLPs of the last layers on one half of one kind, from the pretrained ones; they stay in ``dense``."""
    for layer, weights in zip(dense.model.layers, copied, strict=True):
        layer.mlp.load_state_dict(weights)
        layer.mlp.requires_grad_(True)
    curve = fit(dense, columns, settings.experts, seed=settings.seed)
    dense.requires_grad_(False)
    return curve


def _weights(dense: PreTrainedModel) -> Weights:
    return [
        {name: value.detach().clone() for name, value in layer.mlp.state_dict().items()} for layer in dense.model.layers
    ]


def _train_routers(
    last: PreTrainedModel,
    halves: Mapping[str, Columns],
    settings: SmolExpertsSettings,
) -> Curve:
    """Train the routers alone, on all halves together."""
    last.requires_grad_(False)
    for layer in last.model.layers:
        layer.mlp.gate.requires_grad_(True)

    def balance(outputs: Any, _: Columns) -> Tensor:
        return settings.router_aux_loss_coef * routers_balance(outputs.router_logits, settings.top_k)

    return fit(last, _joined(halves), settings.routers, seed=settings.seed, balance=balance)


def _joined(parts: Mapping[str, Columns]) -> Columns:
    first = next(iter(parts.values()))
    return {name: torch.cat([columns[name] for columns in parts.values()]) for name in first}


def _perplexities(last: PreTrainedModel, test: Mapping[str, Columns]) -> dict[str, float]:
    return perplexities({kind: model_nll(last, columns) for kind, columns in test.items()})


@torch.no_grad()
def _difference(model: PreTrainedModel, mixture: PreTrainedModel, test: Mapping[str, Columns]) -> float:
    """The largest difference between the logits of the two for the first test block of each kind."""
    ids = torch.stack([columns["labels"][0] for columns in test.values()])
    return (model(input_ids=ids).logits - mixture(input_ids=ids).logits).abs().max().item()


def _ground_truth(settings: SmolExpertsSettings, layers: int) -> dict[str, Any]:
    """Which layers have experts, and what expert e of each of them was trained on."""
    halves = [(kind, half) for kind in settings.kinds for half in (0, 1)]
    experts = [{"expert": expert, "kind": kind, "half": half} for expert, (kind, half) in enumerate(halves)]
    return {"layers": list(range(layers - settings.layers, layers)), "experts": experts}


def _failed(log: dict[str, Any], settings: SmolExpertsSettings) -> list[str]:
    """What the experts should be and are not."""
    failed, perplexity = [], log["test_perplexity"]
    for kind in settings.kinds:
        others = {f"{other} {half}": perplexity[f"{other} {half}"][kind] for other in settings.kinds for half in (0, 1)}
        best = min(others, key=lambda name: others[name])
        if not best.startswith(f"{kind} "):
            failed.append(f"On test text of {kind}, the expert of '{best}' is better than those of {kind}.")
    if perplexity["mixture"]["all"] > perplexity["dense"]["all"]:
        failed.append(
            f"The mixture's perplexity on test text is {perplexity['mixture']['all']:.2f}; the dense model has "
            f"{perplexity['dense']['all']:.2f}."
        )
    if log["smallest_share"] < settings.smallest_share:
        failed.append(f"An expert gets {log['smallest_share']:.3f} of its layer's choices: it is starved.")
    return failed
