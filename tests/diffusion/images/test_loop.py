"""Training routers in tiny pipelines: what moves, what does not, and what is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests import tiny_pipelines as tiny
from tests.diffusion.conftest import Loras
from tests.tiny_pipelines import clip
from torch import Tensor, nn

from lamella import LamellaError, MoleConfig, compose_pipeline
from lamella.diffusion import ClipGuidance, ImageBatch, PipelineComposition, denoising_loss, train_routers

BATCHES = [ImageBatch(["a cat", "a dog"], tiny.latents(2, 1)), ImageBatch(["a cat"], tiny.latents(1, 2))]


@pytest.fixture
def composed(loras_of: Loras) -> Callable[..., PipelineComposition]:
    """A composition of a kind of pipeline with these settings."""

    def compose(make: Any, **settings: Any) -> PipelineComposition:
        return compose_pipeline(make(), loras_of(make), MoleConfig(**settings))

    return compose


def frozen(composition: PipelineComposition) -> dict[str, Tensor]:
    """All parameters and buffers of the pipeline, the LoRAs' among them, but the routers'."""
    models = {name: part for name, part in composition.pipe.components.items() if isinstance(part, nn.Module)}
    own = {id(p) for p in composition.parameters()}
    return {
        f"{part}.{name}": tensor
        for part, model in models.items()
        for named in (model.named_parameters(), model.named_buffers())
        for name, tensor in named
        if id(tensor) not in own
    }


@pytest.mark.parametrize("make", [tiny.stable_diffusion, tiny.sdxl, tiny.pixart])
@pytest.mark.parametrize("kind", ["denoising", "guidance"])
def test_routers_learn_and_nothing_else_moves(make: Any, kind: str, composed: Any) -> None:
    composition = composed(make)
    model = clip()
    loss = denoising_loss if kind == "denoising" else ClipGuidance(model, tiny.tokenizer(), ["cat", "dog"])
    before = {name: t.clone() for name, t in frozen(composition).items()}
    assert any("lamella_mole_loras" in name for name in before)
    start = [p.clone() for p in composition.parameters()]
    log = train_routers(composition, loss, BATCHES, steps=3, learning_rate=0.05)
    assert [row.step for row in log] == [1, 2, 3]
    for name, tensor in frozen(composition).items():
        assert torch.equal(tensor, before[name]), name
        assert tensor.grad is None, name
    assert all(p.grad is None for p in model.parameters())
    moved = [not torch.equal(now, was) for now, was in zip(composition.parameters(), start, strict=True)]
    assert sum(moved) / len(moved) > 0.6
    assert not any(own.model.training for own in composition.components.values())


def test_the_loss_falls_and_the_log_says_so(composed: Any) -> None:
    """A task that one LoRA solves: the other's weight has to go."""
    composition = composed(tiny.stable_diffusion, balance="none")
    batch = BATCHES[:1]
    with composition.fixed_weights({"cat": 1.0}), torch.no_grad():
        wanted = _prediction(composition.pipe, batch[0].latents)

    def like_cat(pipe: Any, prompts: Any, latents: Tensor, generator: torch.Generator) -> Tensor:
        return (_prediction(pipe, latents) - wanted).square().mean()

    log = train_routers(composition, like_cat, batch, steps=20, learning_rate=2e-3)
    assert log[-1].loss < 0.5 * log[0].loss
    assert {row.balance for row in log} == {0.0}
    assert log[0].gradient_norm > 0


def _prediction(pipe: Any, latents: Tensor) -> Tensor:
    states = pipe.encode_prompt(["a cat", "a dog"], latents.device, 1, False)[0]
    return pipe.unet(latents, timestep=torch.tensor([20, 30]), encoder_hidden_states=states).sample


def test_the_balance_of_all_models_is_in_the_loss(composed: Any) -> None:
    """At uniform weights each model pays coefficient x N ln N, and weights that are kept alike are what it wants."""
    composition = composed(tiny.stable_diffusion, router_aux_loss_coef=0.25)
    (row,) = train_routers(composition, denoising_loss, BATCHES, steps=1)
    assert row.balance == pytest.approx(0.25 * 2 * 2 * torch.tensor(2.0).log().item())


def test_a_seed_means_the_same_run_and_another_seed_another(composed: Any) -> None:
    def run(seed: int) -> list[Any]:
        composition = composed(tiny.stable_diffusion)
        return train_routers(composition, denoising_loss, BATCHES, steps=3, learning_rate=0.01, seed=seed)

    first = run(1)
    assert run(1) == first
    assert run(2) != first


def test_what_cannot_train_is_refused(composed: Any) -> None:
    composition = composed(tiny.stable_diffusion)
    with pytest.raises(LamellaError, match="a batch and a step"):
        train_routers(composition, denoising_loss, [])

    def without_text(pipe: Any, prompts: Any, latents: Tensor, generator: torch.Generator) -> Tensor:
        states = torch.zeros(len(latents), 5, tiny.WIDTH)
        return pipe.unet(latents, timestep=1, encoder_hidden_states=states).sample.square().mean()

    with pytest.raises(LamellaError, match=r"2 of 18 routers get no gradient.*text_encoder"):
        train_routers(composition, without_text, BATCHES)
    start = [p.clone() for p in composition.parameters()]
    with pytest.raises(LamellaError, match="The loss is nan at step 1"):
        train_routers(composition, lambda *given: denoising_loss(*given) * torch.nan, BATCHES)
    assert all(torch.equal(now, was) for now, was in zip(composition.parameters(), start, strict=True))
