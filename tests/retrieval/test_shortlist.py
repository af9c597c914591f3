"""Which LoRAs help a task: exchanged in place, by successive halving, beside the base and a random LoRA."""

import random

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests import tiny
from tests.reference.retrieval import successive_halving

from lamella import AdapterLibrary, LamellaError, MolaConfig, compose, shortlist
from lamella.adapters import fit, map_to, read_lora
from lamella.adapters.card import Card
from lamella.adapters.heads import fit_head
from lamella.progress import listening
from lamella.retrieval.examples import Examples
from lamella.retrieval.exchange import Exchange, random_like
from lamella.retrieval.halving import halve, passes, plan_rungs

TARGETS = {"bert": ["query", "value"], "llama": ["q_proj", "down_proj"], "t5": ["q", "wo"]}


def save(folder, kind="bert", seed=0, scale=1.0, **settings):
    base = tiny.build(kind, layers=2)
    torch.manual_seed(seed)  # building seeds too
    config = {"r": 2, "target_modules": TARGETS[kind], "init_lora_weights": False, **settings}
    model = get_peft_model(base, LoraConfig(**config))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data *= scale
    model.save_pretrained(folder)
    return folder


def library(folder, kind="bert", count=5):
    for seed in range(count):
        save(folder / f"lora-{seed}", kind, seed, scale=0.3 * (1 + seed))
    return AdapterLibrary(folder)


def test_halving_keeps_whom_the_plain_form_keeps():
    draw = random.Random(0)
    for trial in range(20):
        count, examples, keep = draw.randint(1, 40), draw.randint(1, 33), draw.randint(1, 8)
        losses = {f"{trial}-{at}": [draw.random() + at / 40 for _ in range(examples)] for at in range(count)}
        asked = []

        def look(name, places, losses=losses, asked=asked):
            asked.extend(places)
            return torch.tensor([losses[name][place] for place in places], dtype=torch.float64)

        rungs = plan_rungs(count, examples, keep)
        assert halve(list(losses), rungs, keep, look) == successive_halving(losses, keep)
        assert len(asked) == passes(rungs) <= count * examples


def test_the_cost_of_a_thousand_is_a_third_of_all():
    rungs = plan_rungs(1024, 32, 8)
    assert rungs == [(1024, 4), (512, 8), (256, 16), (128, 32)]
    assert passes(rungs) == 4096 + 2048 + 2048 + 2048


@pytest.mark.parametrize("kind", ["bert", "llama", "t5"])
def test_a_lora_in_place_is_peft_with_that_lora_and_the_base_comes_back(kind, tmp_path):
    opened, base = library(tmp_path, kind, 2), tiny.build(kind, layers=2)
    batch = tiny.batch(base)
    with torch.no_grad():
        bare = base(**batch).logits
        exchange = Exchange(base)
        modules = next(iter(fit(base, opened).modules.values()))
        with exchange.installed(modules):
            for name in opened.names:
                assert exchange.put(opened.read(name)) == ({}, ())
                peft = PeftModel.from_pretrained(tiny.build(kind, layers=2), tmp_path / name).eval()
                torch.testing.assert_close(base(**batch).logits, peft(**batch).logits)
        assert torch.equal(base(**batch).logits, bare)


def test_a_head_goes_with_its_lora_where_it_fits(tmp_path):
    save(tmp_path / "own", modules_to_save=["classifier"])
    base = tiny.bert()
    batch = tiny.inputs(base)
    before = base.classifier.weight.data.clone()
    source, exchange = read_lora(tmp_path / "own"), Exchange(base)
    source.whole["classifier.weight"].mul_(3)
    with torch.no_grad(), exchange.installed(map_to(base, source).modules):
        assert exchange.put(source) == ({}, ("classifier",))  # no labels are named
        assert torch.equal(base.classifier.weight, source.whole["classifier.weight"])
        base(**batch)
    assert torch.equal(base.classifier.weight, before)
    other = tiny.bert(labels=5)
    assert Exchange(other).put(source) == ({"classifier": "its classifier is of another size"}, ())


NAMES = ["bad", "good", "so-so"]


def named(*labels):
    base = tiny.bert(labels=len(labels))
    base.config.id2label = dict(enumerate(labels))
    return base


def with_head(folder, labels=None):
    """A LoRA whose head, not its base's, is for some labels."""
    base = tiny.bert()
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["query"], init_lora_weights=False,
                                            modules_to_save=["classifier"]))  # fmt: skip
    with torch.no_grad():
        for parameter in model.base_model.model.classifier.parameters():
            if parameter.requires_grad:
                parameter.copy_(10 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    model.save_pretrained(folder)
    if labels is not None:
        Card(labels=tuple(labels)).save(folder)
    return PeftModel.from_pretrained(tiny.bert(), folder).eval()


def test_a_head_is_taken_by_the_names_of_its_labels(tmp_path):
    teacher = with_head(tmp_path / "named", NAMES)
    order = [2, 0, 1]  # the task's labels are the LoRA's in another order
    base = named(*(NAMES[at] for at in order))
    batch = tiny.inputs(base)
    with torch.no_grad():
        expected = teacher(**batch).logits[:, order]
        exchange, source = Exchange(base), read_lora(tmp_path / "named")
        with exchange.installed(map_to(base, source).modules):
            assert exchange.put(source, NAMES) == ({}, ())
            torch.testing.assert_close(base(**batch).logits, expected)


@pytest.mark.parametrize(
    ("labels", "of_model", "unused", "assumed"),
    [
        (NAMES, NAMES, False, False),
        (NAMES, ["billing", "delivery", "technical"], True, False),
        (NAMES, ["bad", "good", "other"], True, False),
        (None, NAMES, False, True),  # no card
        (["0", "1", "2"], NAMES, False, True),  # numbers say nothing
        (NAMES, ["LABEL_0", "LABEL_1", "LABEL_2"], False, True),
        (NAMES, ["bad", "good"], True, False),
    ],
)
def test_what_became_of_a_head_is_said(labels, of_model, unused, assumed, tmp_path):
    with_head(tmp_path / "lora", labels)
    save(tmp_path / "bare")
    base = named(*of_model)
    found = shortlist(base, AdapterLibrary(tmp_path), [{**tiny.inputs(base, rows=8), "labels": torch.arange(8) % 2}])
    assert set(found.names) == {"lora", "bare"}  # all of fewer than eight
    assert found.unused == ({"lora": "its head is for bad, good, so-so"} if unused else {})
    assert found.assumed == (("lora",) if assumed else ())
    printed = str(found)
    row = next(line for line in printed.splitlines() if line.startswith("lora "))
    assert row.endswith("no head for these labels") is unused
    assert printed.count("no head for these labels") == unused
    assert ("lora: its head is for bad, good, so-so" in printed) is unused
    assert ("taken as in the same order" in printed) is assumed


def test_of_a_head_of_several_layers_the_last_has_the_labels():
    model = torch.nn.Module()
    model.config = tiny.bert().config
    model.config.id2label = dict(enumerate(["b", "c", "a"]))
    model.head = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh(), torch.nn.Linear(3, 3))
    tensors = dict(model.head.state_dict())
    fitted = fit_head(model, "head", tensors, ["a", "b", "c"]).tensors
    assert torch.equal(fitted["0.weight"], tensors["0.weight"])
    for name in ("2.weight", "2.bias"):
        assert torch.equal(fitted[name], tensors[name][[1, 2, 0]])


@pytest.mark.parametrize("kind", ["bert", "llama", "t5"])
def test_the_loss_of_each_example_is_the_models_own_on_it_alone(kind):
    model = tiny.build(kind, layers=2)
    batch = tiny.batch(model)
    found = Examples([batch, batch]).judge(model, [5, 0, 1, 2])
    alone = [model(**{key: value[row : row + 1] for key, value in batch.items()}).loss for row in range(3)]
    if kind == "bert":
        right = model(**batch).logits.argmax(-1) == batch["labels"]
        assert found.right.tolist() == right[[2, 0, 1, 2]].double().tolist()
    else:
        assert found.right is None
    torch.testing.assert_close(found.losses, torch.stack([alone[2], *alone]).double(), rtol=1e-4, atol=1e-4)


def test_random_controls_have_the_norms_of_the_lora(tmp_path):
    factors = read_lora(save(tmp_path / "one")).components["model"]
    drawn = random_like(factors)
    for module, one in factors.items():
        delta, other = (f.scaling * f.B @ f.A for f in (one, drawn[module]))
        torch.testing.assert_close(delta.norm(), other.norm())
        assert not torch.allclose(delta, other)


def test_the_shortlist_has_the_loras_that_teach_the_labels_and_says_so(tmp_path):
    opened, base = library(tmp_path), tiny.bert()
    teacher = PeftModel.from_pretrained(tiny.bert(), tmp_path / "lora-3").eval()
    batches = []
    for seed in range(6):
        batch = tiny.batch(base, rows=8, seed=seed)
        with torch.no_grad():
            batch["labels"] = 3 * teacher(**tiny.inputs(base, rows=8, seed=seed)).logits[:, 0]  # of this LoRA alone
        batches.append(batch)
    regressor = tiny.bert(labels=1)
    regressor.load_state_dict({k: v[:1] if "classifier" in k else v for k, v in base.state_dict().items()})
    regressor.classifier.weight.data *= 3
    regressor.classifier.bias.data *= 3
    told = []
    seen = []
    with listening(lambda work: seen.append((work.done, work.total))):
        found = shortlist(regressor, opened, batches, k=2, say=told.append)
    assert seen[-1] == (found.cost, found.cost)
    assert found.names[0] == "lora-3"
    assert found.scores[0].loss < 1e-8
    assert found.scores[0].helps
    assert found.sentence.startswith("lora-3")
    (cost,) = told
    assert "examples run through the model" in cost
    assert f"{found.cost:,}" in cost
    assert [one.name for one in found.scores] == [*found.names, "a random LoRA", "the base"]
    assert not found.scores[-1].helps
    assert "lora-3" in str(found)
    assert "accuracy" not in str(found)  # of numbers there is none
    composed = compose(tiny.bert(), found.library)
    assert composed.peft_config["default"].adapters.keys() == set(found.names)


def test_accuracy_stands_beside_the_loss_of_classes_and_the_seed_draws_the_random_lora(tmp_path):
    opened, base = library(tmp_path, count=2), tiny.bert()
    batches = [tiny.batch(base, rows=8, seed=seed) for seed in range(2)]
    first, again, other = (shortlist(base, opened, batches, k=2, seed=seed) for seed in (0, 0, 1))
    with torch.no_grad():
        right = torch.cat([base(**batch).logits.argmax(-1) == batch["labels"] for batch in batches])
    assert first.scores[-1].accuracy == pytest.approx(right[1::2].double().mean().item())  # of those that judge
    assert f"{first.scores[-1].accuracy:.3f}  {first.scores[-1].loss:.3f} [" in str(first)
    assert first.as_dict()["scores"][-1]["accuracy"] == first.scores[-1].accuracy
    assert again.as_dict() == first.as_dict()
    assert [one.loss for one in other.scores if one.name != "a random LoRA"] == [
        one.loss for one in first.scores if one.name != "a random LoRA"
    ]
    assert other.scores[2].loss != first.scores[2].loss


def test_where_none_helps_it_says_so(tmp_path):
    base = tiny.bert(labels=1)
    batches = [tiny.batch(base, rows=8, seed=seed) for seed in range(3)]
    with torch.no_grad():
        for batch in batches:
            batch["labels"] = base(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, 0]  # its loss is 0
    found = shortlist(base, library(tmp_path), batches, k=3)
    assert found.sentence == "None of them beats the base on these examples."
    assert found.as_dict()["answer"] == found.sentence


def test_what_cannot_be_asked_is_refused(tmp_path):
    opened, base = library(tmp_path, count=2), tiny.bert()
    batch = tiny.batch(base, rows=6)
    with pytest.raises(LamellaError, match="Batch 0 of the examples has no labels"):
        shortlist(base, opened, [tiny.inputs(base)], k=1)
    with pytest.raises(LamellaError, match="k=3 LoRAs are wanted of 2"):
        shortlist(base, opened, [batch], k=3)
    with pytest.raises(LamellaError, match="There are 3 examples"):
        shortlist(base, opened, [tiny.batch(base, rows=3)], k=1)
    with pytest.raises(LamellaError, match="no examples"):
        shortlist(base, opened, [], k=1)
    with pytest.raises(LamellaError, match="neither a class or a number"):
        shortlist(base, opened, [{**batch, "labels": batch["input_ids"]}], k=1)
    adapted = get_peft_model(tiny.bert(), MolaConfig(num_experts=2, r=2))
    with pytest.raises(LamellaError, match="The base is a"):
        shortlist(adapted, opened, [batch], k=1)
    save(tmp_path / "other", "llama")
    with pytest.raises(LamellaError, match=r"k=3 LoRAs are wanted of 2 that are for this model .first misfit: .*other"):
        shortlist(base, AdapterLibrary(tmp_path), [batch], k=3)
