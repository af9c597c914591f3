"""Tiny models with two experts that are one up to the order of their hidden units, and their tables."""

import torch
from tests.reference.similarity_compress import identity_table
from tests.tiny_moe import HIDDEN, build, inputs_for

from lamella.backbones.moe import Expert, moe_layers

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


class Counts:
    """What compression reads of a capture: how the routers shared out the tokens."""

    def __init__(self, model, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.shares = {
            (layer.index, e): float(torch.rand(1, generator=generator))
            for layer in moe_layers(model)
            for e in range(layer.num_experts)
        }

    def check(self, model, tokenizer=None):
        pass
