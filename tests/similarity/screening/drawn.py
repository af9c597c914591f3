"""Experts, and a capture whose samples are drawn at random."""

from dataclasses import dataclass, field

import pandas as pd
import torch

from lamella.backbones.moe import Expert, moe_layers


def drawn_expert(ff, width, biases=False, gate=True, seed=0):
    draw = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=draw)  # noqa: E731
    return Expert(
        normal(ff, width),
        normal(width, ff),
        (lambda gate, up: torch.nn.functional.silu(gate) * up) if gate else (lambda gate, up: up.relu()),
        normal(ff, width) if gate else None,
        normal(ff) if biases and gate else None,
        normal(ff) if biases else None,
        normal(width) if biases else None,
    )


@dataclass
class DrawnCapture:
    """Reads as a `Capture` does; ``samples`` says how many an expert has, every second one held out."""

    model: torch.nn.Module
    samples: dict = field(default_factory=dict)
    usual: int = 40

    @property
    def experts(self):
        return [(layer.index, e) for layer in moe_layers(self.model) for e in range(layer.num_experts)]

    def check(self, model, tokenizer=None):
        assert model is self.model

    def inputs(self, layer, expert):
        draw = torch.Generator().manual_seed(100 * layer + expert)
        n = self.samples.get((layer, expert), self.usual)
        return torch.randn(n, self.model.config.hidden_size, generator=draw)

    def split(self, layer, expert, held_out=0.5, seed=0):
        rows = torch.arange(len(self.inputs(layer, expert)))
        return rows[rows % 2 == 0], rows[rows % 2 == 1]

    def held_out(self, layer, expert):
        return self.inputs(layer, expert)[self.split(layer, expert)[1]]

    @property
    def coactivation(self):
        pairs = [
            (layer.index, e, f, e / 100 if e == f else (e + f) / 1000 + layer.index / 10)
            for layer in moe_layers(self.model)
            for e in range(layer.num_experts)
            for f in range(layer.num_experts)
        ]
        return pd.DataFrame(pairs, columns=["layer", "expert", "other", "share"])
