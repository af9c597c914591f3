import pytest
import torch
from peft import PeftModel
from tests import tiny
from torch import nn

from lamella.errors import LamellaError
from lamella.lab.robustness.noise import changed_embeddings, gaussian_noise, input_embeddings, pgd

ROWS = [0, 1, 2]


class Attacked:
    """A tiny classifier whose losses (N,) under a perturbation an attack may ask for."""

    def __init__(self, model, rows=ROWS):
        self.model, self.rows = model, rows
        batch = tiny.batch(model.get_base_model() if isinstance(model, PeftModel) else model)
        self.labels = batch.pop("labels")[rows]
        self.batch = {name: value[rows] for name, value in batch.items()}
        self.ids, self.touched = self.batch["input_ids"], self.batch["attention_mask"].bool()
        self.touched[:, 0] = False  # as a special token
        self.embeddings = input_embeddings(model)(self.ids).detach()

    def losses(self, delta):
        with changed_embeddings(self.model, self.ids.shape, lambda clean: clean + delta):
            logits = self.model(**self.batch).logits
        return nn.functional.cross_entropy(logits, self.labels, reduction="none")

    def found(self, radius=0.3, **options):
        return pgd(self.losses, self.embeddings, self.touched, self.rows, radius, 0, **options)

    def limits(self, radius):
        return radius * (self.embeddings * self.touched[..., None]).flatten(1).norm(dim=1)


@pytest.fixture(params=["bert", "mola"])
def attacked(request):
    torch.manual_seed(3)
    return Attacked(tiny.adapted(tiny.bert()).eval() if request.param == "mola" else tiny.bert())


@pytest.mark.parametrize("radius", [0.05, 0.3, 1.0])
def test_it_stays_in_its_ball_and_off_what_it_may_not_touch(attacked, radius):
    delta = attacked.found(radius, steps=5)
    assert (delta.flatten(1).norm(dim=1) <= attacked.limits(radius) * (1 + 1e-5)).all()
    assert (delta[~attacked.touched] == 0).all()
    assert (delta[attacked.touched] != 0).any()


def test_it_raises_every_row_s_loss_and_more_than_random_noise_of_its_size(attacked):
    with torch.no_grad():
        plain = attacked.losses(torch.zeros_like(attacked.embeddings))
        reached = attacked.losses(attacked.found(0.3))
        noise = gaussian_noise(attacked.embeddings, attacked.touched, attacked.rows, 0.3, 0)
        random = attacked.losses(noise)
    assert (reached > plain).all()
    assert (reached > random).all()


def test_a_larger_ball_holds_a_higher_loss(attacked):
    with torch.no_grad():
        reached = [attacked.losses(attacked.found(radius)).mean().item() for radius in (0.0, 0.1, 0.5)]
    assert reached[0] < reached[1] < reached[2]


def test_a_row_does_not_see_its_batch_mates(attacked):
    together = attacked.found()
    for row in ROWS:
        alone = Attacked(attacked.model, [row]).found()
        torch.testing.assert_close(together[row], alone[0], rtol=1e-3, atol=1e-5)


def test_the_highest_point_on_a_sphere_is_found():
    """A linear loss is highest where the gradient meets the sphere."""
    embeddings, touched = torch.randn(2, 4, 8), torch.ones(2, 4).bool()
    slope = torch.randn(2, 4, 8)
    delta = pgd(lambda d: (d * slope).sum((1, 2)), embeddings, touched, [0, 1], 0.5, 0, steps=40, step_size=0.25)
    norms = embeddings.flatten(1).norm(dim=1)[:, None, None]
    best = 0.5 * norms * slope / slope.flatten(1).norm(dim=1)[:, None, None]
    assert (torch.cosine_similarity(delta.flatten(1), best.flatten(1)) > 0.999).all()
    torch.testing.assert_close(delta.flatten(1).norm(dim=1), 0.5 * norms.flatten())


def test_the_highest_point_inside_the_ball_is_found():
    embeddings, touched = torch.randn(2, 4, 8), torch.ones(2, 4).bool()
    peak = 0.3 * embeddings.flip(2)  # as far out as 0.6 of the radius
    delta = pgd(
        lambda d: -(d - peak).square().sum((1, 2)), embeddings, touched, [0, 1], 0.5, 0, steps=60, step_size=0.05
    )
    assert ((delta - peak).flatten(1).norm(dim=1) < 0.05 * embeddings.flatten(1).norm(dim=1)).all()


def test_where_nothing_raises_the_loss_nothing_is_done():
    embeddings, touched = torch.randn(2, 4, 8), torch.ones(2, 4).bool()
    delta = pgd(lambda d: -d.square().sum((1, 2)), embeddings, touched, [0, 1], 0.5, 0)
    assert (delta == 0).all()


def test_the_start_is_random_by_seed_and_row_and_in_the_ball():
    embeddings, touched = torch.randn(1, 4, 8), torch.ones(1, 4).bool()
    starts = {}
    for seed, row in ((0, 0), (0, 1), (1, 0), (0, 0)):
        seen = []

        def losses(delta, seen=seen):
            seen.append(delta.detach().clone())
            return delta.sum((1, 2))

        pgd(losses, embeddings, touched, [row], 0.5, seed, steps=1)
        if (seed, row) in starts:
            assert torch.equal(seen[1], starts[seed, row])
        starts[seed, row] = seen[1]  # the first is without a perturbation
    for start in starts.values():
        assert 0.2 * embeddings.norm() < start.norm() <= 0.5 * embeddings.norm()
    assert not torch.equal(starts[0, 0], starts[0, 1])
    assert not torch.equal(starts[0, 0], starts[1, 0])


def test_the_model_is_left_as_it_was(attacked):
    for parameter in attacked.model.parameters():
        parameter.requires_grad_()
    before = {name: tensor.clone() for name, tensor in attacked.model.state_dict().items()}
    with torch.no_grad():
        attacked.found()
    assert all(parameter.grad is None for parameter in attacked.model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in attacked.model.state_dict().items())


def test_what_cannot_be_attacked_is_said(attacked):
    for wrong in ({"radius": -1.0}, {"radius": float("nan")}, {"steps": 0}):
        with pytest.raises(LamellaError, match="radius of 0 or more and at least 1 step"):
            attacked.found(**wrong)
    with pytest.raises(LamellaError, match="does not depend on the embeddings' perturbation"):
        pgd(lambda delta: torch.ones(3), attacked.embeddings, attacked.touched, ROWS, 0.1, 0)
