from peft import get_peft_model
from tests.tiny import bert

from lamella import MolaConfig
from lamella.lab.methods import trainable_parameters
from lamella.lab.studies.costs import active_parameters


def test_of_a_modules_experts_only_the_chosen_ones_are_active():
    model = get_peft_model(bert(), MolaConfig(r=2, num_experts=4, top_k=1, target_modules=["query"]))

    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    factors = sum(p.numel() for name, p in parameters.items() if "lora_" in name)
    routers = sum(p.numel() for name, p in parameters.items() if "router" in name)
    assert trainable_parameters(model) == factors + routers
    assert active_parameters(model) == factors // 4 + routers
