"""An adapter that somebody copies says what it said: by the names of its parameters, as TRL does, or whole."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model_state_dict
from tests import tiny
from tests.tuners.mola.test_mola_trainers import QUIET, TEXTS, changed, snapshot, tokenizer
from tests.tuners.mole import trained
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import LlamaForCausalLM

from lamella import LamellaError

ADAPTERS: dict[str, Callable[[LlamaForCausalLM, Path], PeftModel]] = {
    "mola": lambda base, _: tiny.adapted(base, num_experts=[1, 3], top_k=[1, 2], router="cosine"),
    "molex": lambda base, _: tiny.molex(base, alpha_mode="learned", router_scope="per-layer"),
    "mole": lambda base, folder: trained.composed(base, "llama", folder),
    "mole-embedded": lambda base, folder: trained.composed(base, "llama", folder, embed_adapters=True),
    "mole-blocks": lambda base, folder: trained.composed(
        base, "llama", folder, embed_adapters=True, granularity="block", form="block-delta"
    ),
}


@pytest.fixture(params=list(ADAPTERS))
def model(request: pytest.FixtureRequest, folder: Path) -> PeftModel:
    adapted = ADAPTERS[request.param](tiny.llama(), folder).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "alpha" in name:
                parameter.add_(1.0)  # off what the config says
    return adapted


def said(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**tiny.inputs(tiny.llama()), use_cache=False).logits


def copy_by_names(model: PeftModel) -> None:
    """The loop of TRL's DPO, KTO, GRPO and RLOO trainers."""
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)


def test_a_copy_by_names_is_whole(model: PeftModel) -> None:
    expected = said(model)
    with model.disable_adapter():
        assert not torch.allclose(said(model), expected)
    copy_by_names(model)
    model.set_adapter("ref")
    assert torch.equal(said(model), expected)
    model.delete_adapter("default")
    assert torch.equal(said(model), expected), "the copy has tensors of its own"


def test_copies_of_the_whole_model_say_the_same_and_are_their_own(model: PeftModel) -> None:
    expected = said(model)
    mean = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    mean.update_parameters(model)
    copies = {"deepcopy": copy.deepcopy(model), "EMA": mean.module, "pickle": pickle.loads(pickle.dumps(model))}
    copies["in a parent's state"] = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copies["in a parent's state"].parameters():
            parameter.zero_()
    nn.ModuleList([copies["in a parent's state"]]).load_state_dict(nn.ModuleList([model]).state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    for kind, other in copies.items():
        torch.testing.assert_close(said(other), expected, msg=kind)
        other.train()(**tiny.batch(tiny.llama()), use_cache=False).loss.backward()
        assert tiny.gradients(other), kind
    assert not tiny.gradients(model)


@pytest.mark.parametrize("method", ["mola", "molex", "mole-embedded"])
def test_a_model_without_weights_takes_an_adapter_and_then_both_states(method: str, folder: Path) -> None:
    model = ADAPTERS[method](tiny.llama(), folder).eval()
    with torch.device("meta"):
        bare = LlamaForCausalLM(tiny.llama_config())
    empty = ADAPTERS[method](bare, folder).to_empty(device="cpu")
    empty.load_state_dict(model.state_dict(), strict=False)
    empty.get_base_model().model.rotary_emb = model.get_base_model().model.rotary_emb  # its buffers are in no state
    assert torch.equal(said(empty.eval()), said(model))


def test_loras_put_on_a_model_without_weights_are_never_memory_as_it_was_found(folder: Path) -> None:
    with torch.device("meta"):
        bare = LlamaForCausalLM(tiny.llama_config())
    model = ADAPTERS["mole"](bare, folder).to_empty(device="cpu")
    model.load_state_dict(ADAPTERS["mole"](tiny.llama(), folder).state_dict(), strict=False)
    with pytest.raises(LamellaError, match=r"adapter 'default' at model\.layers\.0.*without weights.*lamella\.compose"):
        said(model)


def test_every_name_has_the_adapters_in_its_middle_and_no_file_has_it(model: PeftModel) -> None:
    named = dict(model.named_parameters())
    mine = {name for name in model.state_dict() if "lamella_" in name or "lora_" in name}
    assert mine
    assert all(".default." in name for name in mine)
    assert mine >= {name for name in named if named[name].requires_grad}
    saved = get_peft_model_state_dict(model)
    assert len(saved) == len(mine)
    assert not any("default" in name for name in saved)
    lone = {name.rpartition(".")[2] for name in saved if "lamella_mola_lora" in name or "alpha" in name}
    assert lone <= {"lamella_mola_lora_A", "lamella_mola_lora_B", "lamella_molex_alpha"}


def test_a_whole_models_state_of_the_first_edition_is_read() -> None:
    model = tiny.adapted(tiny.llama())
    state = {name.replace("_A.default.weight", "_A.default"): value for name, value in model.state_dict().items()}
    state = {name.replace("_B.default.weight", "_B.default"): value for name, value in state.items()}
    assert len([name for name in state if name.endswith(".default")]) == 28
    fresh = tiny.adapted(tiny.llama(seed=1), num_experts=3)
    fresh.load_state_dict(state, strict=True)
    assert torch.equal(said(fresh), said(model))


def _dpo(model: PeftModel, folder: Path) -> Any:
    from trl import DPOConfig, DPOTrainer

    rows = [{"prompt": text, "chosen": "w1 w2", "rejected": "w3"} for text in TEXTS]
    arguments = DPOConfig(
        str(folder), per_device_train_batch_size=4, max_steps=1, learning_rate=1e-2, max_length=32, bf16=False,
        gradient_checkpointing=False, **QUIET,
    )  # fmt: skip
    return DPOTrainer(model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer())


def _kto(model: PeftModel, folder: Path) -> Any:
    from trl import KTOConfig, KTOTrainer

    rows = [{"prompt": text, "completion": "w1 w2", "label": bool(i % 2)} for i, text in enumerate(TEXTS)]
    arguments = KTOConfig(
        str(folder), per_device_train_batch_size=4, max_steps=1, learning_rate=1e-2, max_length=32, bf16=False,
        gradient_checkpointing=False, **QUIET,
    )  # fmt: skip
    return KTOTrainer(model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer())


def _rewarded(trainer: str, model: PeftModel, folder: Path) -> Any:
    import trl

    arguments = getattr(trl, f"{trainer}Config")(
        str(folder), per_device_train_batch_size=4, num_generations=2, max_steps=1, learning_rate=1e-2, beta=0.1,
        max_completion_length=4, bf16=False, gradient_checkpointing=False, **QUIET,
    )  # fmt: skip
    return getattr(trl, f"{trainer}Trainer")(
        model, reward_funcs=lambda completions, **_: [float(len(text)) for text in completions], args=arguments,
        train_dataset=Dataset.from_list([{"prompt": text} for text in TEXTS]), processing_class=tokenizer(),
    )  # fmt: skip


TRAINERS: dict[str, Callable[[PeftModel, Path], Any]] = {
    "dpo": _dpo,
    "kto": _kto,
    "grpo": lambda model, folder: _rewarded("GRPO", model, folder),
    "rloo": lambda model, folder: _rewarded("RLOO", model, folder),
}


@pytest.mark.parametrize(
    "trainer", ["dpo", *(pytest.param(name, marks=pytest.mark.heavy) for name in ("kto", "grpo", "rloo"))]
)
def test_the_reference_of_trls_trainers_is_the_adapter_before_training(trainer: str, tmp_path: Path) -> None:
    model = tiny.adapted(tiny.llama(), router_aux_loss_coef=1e-3)
    expected = said(model.eval())
    training = TRAINERS[trainer](model, tmp_path)
    start = snapshot(model)
    training.train()
    moved = changed(start, snapshot(model))
    assert moved
    assert all(".default." in name for name in moved)
    assert not torch.equal(said(model.eval()), expected)
    model.set_adapter("ref")
    torch.testing.assert_close(said(model), expected, rtol=0, atol=0)
