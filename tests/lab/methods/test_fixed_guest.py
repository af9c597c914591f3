import copy

import pytest
import torch
from peft import get_peft_model

from lamella import MolexConfig
from lamella.lab.data import encode, load_backbone, load_task
from lamella.lab.methods import Lora, method_from
from lamella.lab.methods.fixed_guest import find_fixed_layer, probe_loss

FIXED = {"name": "molex", "policy": "fixed", "r": 2, "target_modules": ["query"], "alpha": 0.5}


@pytest.fixture
def backbone(bert, questions):
    return load_backbone(bert, load_task(questions))


def test_the_chosen_layer_has_the_lowest_loss_of_all(backbone, questions):
    task = load_task(questions)
    encoded = encode(task, backbone.tokenizer, max_length=64, limit={"train": 256})
    batch = encoded.collator([encoded.train[i] for i in range(len(encoded.train))])
    losses = []
    for layer in range(backbone.model.config.num_hidden_layers):
        config = MolexConfig(policy="fixed", fixed_layer=layer, alpha=0.5, lora=None)
        with torch.no_grad():
            losses.append(float(probe_loss(get_peft_model(copy.deepcopy(backbone.model), config).eval(), batch)))
    assert len(set(losses)) == len(losses)

    layer = find_fixed_layer(backbone, task, MolexConfig(policy="fixed", alpha=0.5))

    assert layer == losses.index(min(losses))


def test_the_method_finds_it_and_says_so(backbone, questions):
    task = load_task(questions)

    built = method_from(FIXED).build(backbone, task)

    assert built.decided == {"fixed_layer": built.model.peft_config["default"].fixed_layer}
    assert not method_from(FIXED | {"fixed_layer": 1}).build(load_backbone(backbone.name, task), task).decided


def test_counting_it_needs_no_search(backbone, questions, monkeypatch):
    monkeypatch.setattr("lamella.lab.methods.finetuning.find_fixed_layer", lambda *_: pytest.fail("it searched"))

    built = Lora(target_modules=["query"], match=method_from(FIXED)).build(backbone, load_task(questions))

    assert built.decided["matched_method"] == "molex"


def test_the_aligner_of_a_second_model_is_fitted_on_training_texts(backbone, questions):
    guests = {"name": "molex", "r": 2, "target_modules": ["query"], "guests_of": backbone.name}
    task = load_task(questions)

    built = method_from(guests).build(backbone, task)

    assert built.decided["aligner_unexplained"] < 0.01, "the second model is the first one"
    fresh = load_backbone(backbone.name, task)
    assert not method_from(guests | {"guest_aligner": "identity"}).build(fresh, task).decided
    counted = Lora(target_modules=["query"], match=method_from(guests)).build(load_backbone(backbone.name, task), task)
    assert counted.decided["matched_parameters"] == built.model.get_nb_trainable_parameters()[0]
