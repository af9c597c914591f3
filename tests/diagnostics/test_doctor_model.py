"""Doctor on a model in memory: each fault planted is found, and a healthy model has none."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests import tiny
from tests.pairwise import pairwise

from lamella import LamellaError, MolaConfig
from lamella.diagnostics.doctor import doctor
from lamella.findings import Diagnosis, Finding
from lamella.routing import CallTracker
from lamella.tuners.mola import MolaLinear


def mixture(model, **config):
    """A fresh adapter, as users make it: B is zero."""
    torch.manual_seed(17)
    return get_peft_model(model, MolaConfig(**{"r": 2, "num_experts": 4, "top_k": 2, **config}))


def trained(model, **config):
    return mixture(model, init_lora_weights=False, **config)


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, MolaLinear)]


def codes(diagnosis):
    return [finding.code for finding in diagnosis.findings]


def the_finding(diagnosis, code):
    assert codes(diagnosis) == [code], diagnosis
    finding = diagnosis.findings[0]
    assert all((finding.what, finding.where, finding.why, finding.fix))
    assert not diagnosis.ok
    return finding


def real_batches(model, count=4):
    """Enough tokens for routing to be judged; as long as the model's positions allow."""
    return [tiny.batch(model.get_base_model(), rows=6, tokens=29, seed=seed) for seed in range(count)]


@pytest.mark.parametrize(
    ("name", "make", "given"), pairwise(("bert", "gpt2", "llama", "t5"), (mixture, trained), (False, True))
)
def test_a_healthy_model_has_no_finding(name, make, given):
    model = make(tiny.MODELS[name]())

    diagnosis = doctor(model, batches=real_batches(model) if given else None)

    assert diagnosis.ok, diagnosis
    said = "\n".join(diagnosis.checked)
    assert "gradient in a training step: arrives at" in said
    if not given:
        assert "routing statistics: not examined on real data" in said
    elif make is mixture:
        assert "not judged, the experts have not been trained" in said
    else:
        assert "routers judged" in said


@pytest.mark.parametrize(
    "config",
    [
        {"num_experts": "1-4"},
        {"num_experts": 2, "top_k": 2},  # no balance gradient, and none from the task while B is zero
        {"num_experts": 2, "top_k": 1},
        {"router_aux_loss_coef": 0.0},
        {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 1e-3},
        {"router": "cosine"},
        {"lora_dropout": 0.3, "expert_dropout": 0.3, "mixing_weights": "equal", "share_lora_a": True},
    ],
)
def test_other_healthy_configs_have_no_finding(config):
    assert doctor(mixture(tiny.bert(), **config)).ok


def test_where_the_first_gradient_comes_from_is_said():
    """Four experts learn from the balance loss at once; two of two only when B has moved."""
    said = str(doctor(mixture(tiny.bert(), num_experts="2-4"))).replace("\n    ", " ")

    assert "arrives at 12 of 12 routers. The experts do nothing yet at 12" in said
    assert "6 get it from the balance loss now, 6 from the task loss once B has moved (tried)" in said


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_is_no_fault(reentrant):
    model = mixture(tiny.llama())
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})

    assert doctor(model).ok


def test_a_healthy_plain_lora_has_no_finding():
    diagnosis = doctor(get_peft_model(tiny.bert(), LoraConfig(r=2, target_modules=["query", "value"])))

    assert diagnosis.ok
    assert any("this model has none" in line for line in diagnosis.checked)


def test_an_adapter_added_by_transformers_is_examined():
    model = tiny.bert()
    model.add_adapter(MolaConfig(r=2, num_experts=4))

    diagnosis = doctor(model)

    assert diagnosis.ok
    assert any("arrives at 12 of 12 routers" in line for line in diagnosis.checked)


def test_the_model_is_left_as_it_was():
    model = mixture(tiny.bert(), lora_dropout=0.1).train()
    layers_of(model)[0].eval()
    first = next(p for p in model.parameters() if p.requires_grad)
    first.grad = torch.ones_like(first)
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    rng, config = torch.get_rng_state(), copy.deepcopy(model.peft_config["default"])

    doctor(model, batches=real_batches(model))

    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(rng, torch.get_rng_state())
    assert torch.equal(first.grad, torch.ones_like(first))
    assert sum(p.grad is not None for p in model.parameters()) == 1
    assert model.peft_config["default"] == config


def test_a_frozen_router():
    model = mixture(tiny.bert())
    layers_of(model)[3].lamella_mola_router.requires_grad_(False)

    finding = the_finding(doctor(model), "router-no-gradient")

    assert finding.severity == "error"
    assert "requires_grad is off" in finding.what
    assert finding.where == layers_of(model)[3].name


@pytest.mark.parametrize("make", [mixture, trained])
def test_a_detached_router(make, monkeypatch):
    model = make(tiny.bert())
    router = layers_of(model)[2].lamella_mola_router["default"]
    score = type(router).logits
    monkeypatch.setattr(router, "logits", lambda x, product=None: score(router, x, product).detach(), raising=False)

    diagnosis = doctor(model)

    assert set(codes(diagnosis)) == {"router-no-gradient", "balance-missing"}
    cut_off = next(finding for finding in diagnosis.findings if finding.code == "router-no-gradient")
    assert "cut off" in cut_off.what
    assert cut_off.where == layers_of(model)[2].name


def test_top_one_needs_no_balance_loss_to_learn():
    diagnosis = doctor(mixture(tiny.bert(), top_k=1, router_aux_loss_coef=0.0))

    assert "router-no-gradient" not in codes(diagnosis)
    assert "arrives at 12 of 12 routers" in str(diagnosis)


def test_frozen_experts():
    model = mixture(tiny.bert())
    layers_of(model)[0].lamella_mola_lora_B.requires_grad_(False)

    assert layers_of(model)[0].name in the_finding(doctor(model), "expert-no-gradient").where


def test_a_balance_coefficient_without_balance_loss(monkeypatch):
    model = mixture(tiny.bert(), router_aux_loss_coef=0.01)
    layer = layers_of(model)[5]
    monkeypatch.setattr(layer, "_attach_losses", lambda adapter, routing, mask, frame: routing)

    diagnosis = doctor(model)

    finding = the_finding(diagnosis, "balance-missing")
    assert finding.where == layer.name
    assert "router_aux_loss_coef=0.01" in finding.what


def test_a_balance_loss_of_zero():
    model = trained(tiny.bert())
    layers_of(model)[5].balance_share["default"] = 0.0

    assert the_finding(doctor(model), "balance-missing").where == layers_of(model)[5].name


def test_removed_hooks():
    model = mixture(tiny.bert())
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [k for k, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), CallTracker)]:
                del hooks[key]

    the_finding(doctor(model), "hooks-missing")


def test_a_training_step_that_stops():
    model = mixture(tiny.bert())
    layers_of(model)[0].base_layer.register_forward_hook(lambda *_: (_ for _ in ()).throw(LamellaError("by design")))

    diagnosis = doctor(model)

    assert "by design" in diagnosis.findings[0].what
    assert "training-step-fails" in codes(diagnosis)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(value):
    model = mixture(tiny.bert())
    with torch.no_grad():
        layers_of(model)[0].lamella_mola_lora_A["default"].weight[1, 0, 2] = value

    finding = the_finding(doctor(model), "not-finite")

    assert "lora_A" in finding.where


def test_a_target_that_matched_nothing():
    model = mixture(tiny.bert(), target_modules=["query", "value"])
    model.peft_config["default"].target_modules.add("valeu")

    finding = the_finding(doctor(model), "target-unmatched")

    assert "'valeu'" in finding.what
    assert "'value'" in finding.what


def test_what_all_linear_skips_is_said_and_no_finding():
    diagnosis = doctor(mixture(tiny.bert()))

    assert any("left alone" in line and "pooler" in line for line in diagnosis.checked)


def two_routers():
    """One in each block, on the query."""
    model = trained(tiny.bert(), target_modules=["query"])
    return model, layers_of(model)


def plant(model, expert, logit):
    """Gives every token of the second block a feature that only its router's one expert reads."""
    second = layers_of(model)[1]
    with torch.no_grad():
        model.get_base_model().bert.encoder.layer[0].output.LayerNorm.bias[0] = 6.0
        router = second.lamella_mola_router["default"]
        router.weight[:, 0] = 0.0
        router.weight[expert, 0] = logit / 6


def test_a_collapsed_router():
    model, layers = two_routers()
    assert doctor(model, batches=real_batches(model)).ok
    plant(model, expert=0, logit=4.0)

    finding = the_finding(doctor(model, batches=real_batches(model)), "router-collapsed")

    assert finding.severity == "warning"
    assert finding.where == f"{layers[1].name} (100.0%)"


def test_entropy_near_zero():
    model = trained(tiny.bert())
    layer = layers_of(model)[4]
    with torch.no_grad():
        layer.lamella_mola_router["default"].weight.mul_(1e4)

    finding = the_finding(doctor(model, batches=real_batches(model)), "entropy-near-zero")

    assert layer.name in finding.where


def test_an_expert_that_never_fires():
    model, layers = two_routers()
    plant(model, expert=2, logit=-5.0)

    finding = the_finding(doctor(model, batches=real_batches(model)), "expert-never-fires")

    assert finding.where == f"{layers[1].name} (expert 2)"


def test_padding_does_not_hide_a_collapse():
    """Real tokens alone are counted: here they all go one way, and the padding another."""
    model, layers = two_routers()
    with torch.no_grad():
        positions = model.get_base_model().bert.embeddings.position_embeddings.weight
        positions[:15, 0], positions[15:, 0] = 0.2, -0.2
        layers[0].lamella_mola_router["default"].weight[:, 0] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    batches = real_batches(model)
    for batch in batches:
        batch["attention_mask"][:, 15:] = 0

    assert layers[0].name in the_finding(doctor(model, batches=batches), "router-collapsed").where

    for batch in batches:
        batch["attention_mask"][:] = 1
    assert doctor(model, batches=batches).ok


def test_too_few_tokens_are_not_judged():
    model, _ = two_routers()
    plant(model, expert=0, logit=4.0)

    diagnosis = doctor(model, batches=[tiny.batch(model.get_base_model(), rows=1, tokens=5)])

    assert diagnosis.ok
    assert any("too few tokens" in line for line in diagnosis.checked)


def test_a_file_that_is_not_the_model():
    model = mixture(tiny.bert())
    save = type(model).save_pretrained

    def saves_something_else(self, *args, **kwargs):
        with torch.no_grad():
            A = layers_of(self)[0].lamella_mola_lora_A
            A.put("default", A.of("default") + 1)
        return save(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "save_pretrained", saves_something_else)
        finding = doctor(model).findings[0]

    assert finding.code == "saved-unequal"
    assert "lora_A" in finding.where


def test_an_adapter_loaded_for_inference_is_not_blamed(tmp_path):
    from peft import PeftModel

    mixture(tiny.bert()).save_pretrained(tmp_path)

    diagnosis = doctor(PeftModel.from_pretrained(tiny.bert(), tmp_path))

    assert diagnosis.ok
    assert any("loaded for inference" in line for line in diagnosis.checked)


def test_bad_requests_are_refused():
    with pytest.raises(LamellaError, match="no adapter to examine"):
        doctor(tiny.bert())
    with pytest.raises(LamellaError, match="Leave base out"):
        doctor(mixture(tiny.bert()), base="minilm")
    with pytest.raises(LamellaError, match="batches is empty"):
        doctor(mixture(tiny.bert()), batches=[])


def test_a_diagnosis_can_be_read():
    faults = (
        Finding("warning", "b", "second", "there", "because", "do"),
        Finding("error", "a", "first", "here", "since", "act"),
    )
    text = str(Diagnosis(faults, ("one thing", "another")))

    for word in (
        "error: first [a]",
        "where: here",
        "why:   since",
        "fix:   act",
        "- one thing",
        "1 error(s), 1 warning(s)",
    ):
        assert word in text
    assert Diagnosis((), ("one thing",)).ok
    assert "nothing found" in str(Diagnosis((), ("one thing",)))
    assert Diagnosis(faults, ()).as_dict()["findings"][0]["severity"] == "warning"
