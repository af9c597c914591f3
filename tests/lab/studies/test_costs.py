from peft import get_peft_model
from tests import tiny
from tests.lab.tiny_runs import tiny_settings

from lamella import MolaConfig
from lamella.lab.methods import trainable_parameters
from lamella.lab.studies import costs
from lamella.lab.studies.costs import active_parameters


def test_of_a_modules_experts_only_the_chosen_ones_are_active():
    model = get_peft_model(tiny.bert(), MolaConfig(r=2, num_experts=4, top_k=1, target_modules=["query"]))

    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    factors = sum(p.numel() for name, p in parameters.items() if "lora_" in name)
    routers = sum(p.numel() for name, p in parameters.items() if "router" in name)
    assert trainable_parameters(model) == factors + routers
    assert active_parameters(model) == factors // 4 + routers


def test_rows_of_one_task_are_its_first_ones_in_turn(bert, questions):
    few = costs._untrained(tiny_settings(bert, questions, "lora", limit={"train": 5}))

    rows = few.training["input_ids"].tolist()
    assert len({tuple(row) for row in rows}) == 5
    assert rows[5:] == rows[:3]


def test_what_the_reference_keeps_is_measured_in_training_too(bert, questions, monkeypatch):
    training = []
    loss = costs._loss

    def watched(model, batch):
        training.append(all(module.training for module in model.modules()))
        return loss(model, batch)

    monkeypatch.setattr(costs, "_loss", watched)
    costs.method_costs({"LoRA": tiny_settings(bert, questions, "lora")}, "LoRA")
    assert training == [True]
