import copy
from fractions import Fraction

import pytest
import torch

from benchmarks.__main__ import run
from benchmarks.encoder import build_batch, build_encoder, clone, forward
from benchmarks.molex import check_decisions, check_equality, inference_threads
from benchmarks.molex_models import (
    BF16,
    RECOMPUTED,
    MolexModel,
    MolexSettings,
    agreeing,
    build_models,
    disagree,
    molex,
    routers,
)
from benchmarks.naive_molex import NaiveMolexBlock, loras
from lamella.errors import LamellaError

TINY = {"rounds": 2, "tokens": 512, "hidden": 32, "layers": 5, "inference_batches": (2,)}
NAMES = ["lora", "molex p=0", "molex p=1/5", "molex p=2/5", "molex p=1", BF16, RECOMPUTED]
NAMES += ["molex p=0, 2 guests", "molex p=0, 4 guests", "naive p=2/5"]


@pytest.fixture(scope="module")
def built():
    """Settings, encoder, models and batch; what a test changes it puts back."""
    torch.manual_seed(0)
    settings = MolexSettings(**TINY)
    base = build_encoder(settings.hidden, settings.layers)
    batch = build_batch(settings.tokens, settings.hidden)
    return settings, base, build_models(settings, base, batch), batch


def test_the_record_holds_the_train_step_and_inference(record):
    train, inference = record("molex").cases
    assert [method.name for method in train.methods] == NAMES
    assert [method.name for method in inference.methods] == [*NAMES[:6], NAMES[-1]]
    assert (inference.name, inference.threads, inference.clock) == ("batch 2, 1 thread", 1, "process CPU time")
    assert all(len(method.seconds) == 2 for method in train.methods + inference.methods)


def test_every_method_was_compared_first(record):
    (case, _) = record("molex").cases
    lora, router = 2 * 2 * 5, 2 * 5
    routed = len(NAMES) - 2  # all but lora and naive, which is compared with
    assert case.equality.tensors == lora + routed * (lora + router)
    assert 0 <= max(case.equality.output, case.equality.gradient) < 1e-12


def test_blocks_run_and_operations_follow_the_share(record):
    (train, inference) = record("molex").cases
    for case in (train, inference):
        lora = case.method("lora").flops
        for method in case.methods:
            # not all of a forward: no more than the backward pass needs
            again = 0.4 if method.name == RECOMPUTED else 0
            assert method.flops / lora == pytest.approx(method.block_runs + again, rel=0.02)
    runs = {method.name: method.block_runs for method in train.methods}
    assert [runs[name] for name in NAMES[:5]] == [1, 2, 1.8, 1.6, 1]
    assert runs["naive p=2/5"] == 2  # whatever the share


def test_recomputed_guests_keep_little(record):
    (case, _) = record("molex").cases
    kept = {method.name: method.kept_mb for method in case.methods}
    assert kept["lora"] < kept[RECOMPUTED] < 1.25 * kept["lora"] < kept["molex p=1/5"] < kept["molex p=0"]


def test_all_use_the_same_frozen_weights_and_equal_loras(built):
    _, _, models, _ = built
    nets = [one.model for one in models.values()]
    places = [{p.data_ptr() for p in model.parameters() if not p.requires_grad} for model in nets]
    assert all(place == places[0] for place in places)
    first = loras(nets[0])
    for model in nets[1:]:
        for theirs, ours in zip(first, loras(model), strict=True):
            assert torch.equal(theirs[0], ours[0])
            assert torch.equal(theirs[1], ours[1])
    assert first[0][1].abs().sum() > 0  # B is not zero


@pytest.mark.parametrize("guests", [2, 4])
def test_sequences_disagree_as_asked(built, guests):
    settings, base, models, batch = built
    model = molex(settings, base, models["lora"].model)
    disagree(model, batch, guests)
    chosen = []
    for block, router in routers(model):
        block.register_forward_pre_hook(
            lambda block, args, router=router: chosen.append(
                ((router.logits(args[0]).softmax(-1).mean(1).argmax(-1) - block.place.layer) % 5).tolist()
            )
        )
    with torch.no_grad():
        forward(model, batch)
    assert chosen == [[1 + row % guests for row in range(4)]] * 5


def test_a_decision_other_than_the_intended_one_is_not_timed(built):
    _, _, models, batch = built
    _, router = routers(models["molex p=0"].model)[2]
    before = router.bias.detach().clone()
    with torch.no_grad():
        router.bias[2] = 9.0  # one block now chooses itself
    with pytest.raises(LamellaError, match=r"'molex p=0' was to run 2 .* ran 1\.8"):
        check_decisions(models, batch)
    with torch.no_grad():
        router.bias.copy_(before)


def test_nothing_is_timed_when_the_forms_differ(monkeypatch, capsys):
    right = NaiveMolexBlock.forward
    monkeypatch.setattr(NaiveMolexBlock, "forward", lambda block, h, *args, **kw: right(block, h, *args, **kw) * 1.001)
    with pytest.raises(LamellaError, match="nothing was timed"):
        run("molex", [], quick=True)
    assert "timing" not in capsys.readouterr().err


def test_alpha_of_one_is_compared_with_lora(built):
    settings, encoder, models, batch = built
    base, lora = copy.deepcopy(encoder), copy.deepcopy(models["lora"].model)  # they become float64
    only_lora = {"lora": MolexModel(lora, "plain LoRA", Fraction(1), Fraction(1))}
    assert check_equality(settings, base, only_lora, batch).tensors == 2 * 2 * 5
    other = clone(base)
    other.encoder.layer[0].output.dense.bias = torch.nn.Parameter(torch.arange(32.0).double(), False)
    with pytest.raises(LamellaError, match="nothing was timed"):
        check_equality(settings, other, only_lora, batch)


def test_a_block_that_chooses_itself_does_so_evenly_over_the_depth(built):
    settings, base, models, _ = built
    model = agreeing(settings, base, models["lora"].model, 2)
    itself = [int(router.bias.argmax()) == block.place.layer for block, router in routers(model)]
    assert itself == [False, False, True, False, True]


def test_threads_are_those_that_the_machine_has_cores_for(monkeypatch):
    settings = MolexSettings(**{**TINY, "inference_threads": (1, 2)})
    for cores, expected in ((1, [1]), (2, [1, 2]), (8, [1, 2])):
        monkeypatch.setattr("os.cpu_count", lambda cores=cores: cores)
        assert inference_threads(settings) == expected


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"hidden": 40}, "hidden=40"),
        ({"tokens": 600}, "tokens=600"),
        ({"tokens": 256}, "tokens=256 are fewer than 4 rows"),
        ({"layers": 4}, "layers"),
        ({"rounds": 1}, "rounds"),
        ({"alpha": 1.0}, "alpha"),
        ({"round": 5}, "Did you mean 'rounds'"),
        ({"inference_batches": (0,)}, "inference_batches"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(changes, culprit):
    with pytest.raises(LamellaError, match=culprit):
        MolexSettings.parse({**TINY, **changes})
