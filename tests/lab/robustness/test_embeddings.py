import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from tests import tiny
from torch import nn

from lamella.errors import LamellaError
from lamella.lab.robustness.noise import changed_embeddings, embedding_rms, input_embeddings


def hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize("name", tiny.MODELS)
@pytest.mark.parametrize("with_adapter", [False, True])
def test_the_text_s_embeddings_are_changed_and_nothing_else(name, with_adapter):
    model = tiny.MODELS[name]()
    model = tiny.adapted(model) if with_adapter else model
    batch = tiny.inputs(model)
    table = input_embeddings(model).weight.detach().clone()
    seen = []

    def change(clean):
        seen.append(clean)
        return clean.flip(-1)

    with torch.no_grad():
        plain = model(**batch).logits
        with changed_embeddings(model, batch["input_ids"].shape, lambda clean: clean):
            assert torch.equal(model(**batch).logits, plain)
        with changed_embeddings(model, batch["input_ids"].shape, change):
            changed = model(**batch).logits
        assert torch.equal(model(**batch).logits, plain)
    # of an encoder-decoder the decoder looks up too, which is left alone
    assert len(seen) == 1
    assert torch.equal(seen[0], table[batch["input_ids"]])
    assert not torch.allclose(changed, plain)


def test_positions_are_still_numbered_by_the_ids():
    """MPNet numbers by real ids: with `inputs_embeds` the rows padded on the left would be numbered anew."""
    model = tiny.mpnet()
    ids = torch.tensor([[1, 1, 5, 6, 7], [5, 6, 7, 8, 9]])
    mask = (ids != 1).long()
    with torch.no_grad(), changed_embeddings(model, (2, 5), lambda clean: clean.clone()):
        hooked = model(input_ids=ids, attention_mask=mask).logits
    with torch.no_grad():
        plain = model(input_ids=ids, attention_mask=mask).logits
        given = model(inputs_embeds=input_embeddings(model)(ids), attention_mask=mask).logits
    assert torch.equal(hooked, plain)
    assert not torch.allclose(given, plain)


@pytest.mark.parametrize(("name", "task_type"), [("bert", "SEQ_CLS"), ("llama", "CAUSAL_LM")])
def test_virtual_tokens_of_prompt_tuning_stay_as_they_are(name, task_type):
    model = get_peft_model(tiny.MODELS[name](), PromptTuningConfig(task_type=task_type, num_virtual_tokens=3)).eval()
    batch = tiny.inputs(model.base_model)
    stack = model.base_model.base_model
    given = []

    def keep(module, args, kwargs):
        given.append(kwargs["inputs_embeds"])

    handle = stack.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        model(**batch)
        with changed_embeddings(model, batch["input_ids"].shape, lambda clean: clean + 1.0):
            model(**batch)
    handle.remove()
    plain, changed = given
    assert torch.equal(changed[:, :3], plain[:, :3])
    assert torch.equal(changed[:, 3:], plain[:, 3:] + 1.0)


def test_the_hook_is_gone_after_a_forward_that_raised():
    model = tiny.bert()
    before = hooks(model)

    def fail(clean):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"), changed_embeddings(model, (3, 7), fail):
        model(**tiny.inputs(model))
    assert hooks(model) == before


def test_noise_that_never_reached_the_model_is_an_error():
    model = tiny.bert()
    before = hooks(model)
    with (
        pytest.raises(LamellaError, match=r"did not look up input ids of shape \(3, 7\)"),
        changed_embeddings(model, (3, 7), lambda clean: clean),
    ):
        model(inputs_embeds=torch.zeros(3, 7, tiny.HIDDEN))
    assert hooks(model) == before


def test_a_model_without_input_embeddings_is_named():
    with pytest.raises(LamellaError, match="Linear says nothing of its input embeddings"):
        input_embeddings(nn.Linear(2, 2))


def test_rms():
    assert embedding_rms(torch.tensor([[3.0, -4.0], [0.0, 5.0]])).item() == pytest.approx(50**0.5 / 2)
    assert embedding_rms(torch.zeros(0, 4)).item() == 0.0
