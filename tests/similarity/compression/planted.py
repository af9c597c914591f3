"""Tiny models with two experts that are one up to the order of their hidden units, and their tables."""

import tempfile
from pathlib import Path

import torch
from tests.reference.similarity_compress import identity_table
from tests.tiny_moe import HIDDEN, build, inputs_for

from lamella.backbones.moe import Expert, moe_layers
from lamella.similarity.activations import capture
from lamella.similarity.alignment import make_aligner

TWINS = ((1, 0), (1, 3))


def shuffled(expert, seed=0):
    order = torch.randperm(len(expert.up), generator=torch.Generator().manual_seed(seed))
    turned = {
        name: matrix[:, order] if name == "down" else matrix if name == "down_bias" else matrix[order]
        for name, matrix in expert.matrices.items()
    }
    return Expert(activation=expert.activation, **{name: matrix.clone() for name, matrix in turned.items()})


def with_twins(name="qwen2_moe", twins=TWINS, dtype=torch.float64):
    """In layer 1 experts 0 and 3 do the same; in a family whose layer 1 is dense or absent, take others."""
    model = build(name, dtype=dtype)
    layers = {layer.index: layer for layer in moe_layers(model)}
    (layer, first), (other, second) = twins
    layers[other].experts[second].write(shuffled(layers[layer].experts[first]))
    return model


@torch.no_grad()
def table(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, HIDDEN, generator=generator, dtype=next(model.parameters()).dtype)
    return identity_table(moe_layers(model), x)


@torch.no_grad()
def logits(model, **settings):
    return model(**inputs_for(model, padding="right", **settings)).logits


def state(model):
    return {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def same_state(model, before) -> bool:
    now = dict([*model.named_parameters(), *model.named_buffers()])
    return now.keys() == before.keys() and all(torch.equal(now[name], tensor) for name, tensor in before.items())


def texts_of(model):
    """Batches as the model takes them."""
    return [inputs_for(model, batch=4, tokens=9, seed=seed) for seed in (3, 4, 5)]


def captured(model, folder=None):
    """All that the experts of the model are given of a text; without a folder in one that the process leaves behind."""
    return capture(model, texts_of(model), folder or Path(tempfile.mkdtemp()) / "capture", per_expert=200)


def aligners(kind, pairs, rank=2):
    made = {}
    for pair in pairs:
        made[pair] = make_aligner(kind, HIDDEN, rank).double()
        for at, parameter in enumerate(made[pair].parameters()):
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(at + 7 * pair[0][1]))
    return made
