import pytest
import torch
from tests.tiny_moe import CONFIGS, FAMILIES, inputs, inputs_for
from torch import nn
from transformers import AutoModelForSequenceClassification

from lamella.errors import LamellaError
from lamella.similarity.swapping import text_scores


def alone(batch):
    """Each text as its own batch, without padding."""
    for row, mask in enumerate(batch["attention_mask"].bool()):
        yield {name: tensor[row : row + 1, mask] for name, tensor in batch.items() if name != "labels"}


@pytest.mark.parametrize("padding", ["left", "right"])
def test_a_text_scores_alike_alone_and_beside_others(padding):
    model = FAMILIES["qwen2_moe"]()
    batch = inputs(padding=padding)
    together, apart = text_scores(model, [batch], "nll"), text_scores(model, list(alone(batch)), "nll")
    torch.testing.assert_close(together.sums, apart.sums, rtol=1e-5, atol=1e-5)
    assert together.weights.tolist() == apart.weights.tolist() == [6, 5, 4]
    assert together.value == pytest.approx(together.sums.sum() / 15)


def test_nll_is_the_models_own_loss():
    for family in ("mixtral", "switch_transformers"):
        model = FAMILIES[family]()
        batch = inputs_for(model, padding=None)
        given = batch if "labels" in batch else batch | {"labels": batch["input_ids"]}
        with torch.no_grad():
            loss = model(**given).loss
        assert text_scores(model, [batch], "nll").value == pytest.approx(loss.item(), rel=1e-5)


def test_labels_of_a_decoder_say_what_counts():
    model = FAMILIES["mixtral"]()
    batch = inputs(padding=None)
    labels = batch["input_ids"].clone()
    labels[:, :4] = -100
    labels[0] = -100
    scores = text_scores(model, [batch | {"labels": labels, "rows": torch.arange(3)}], "nll")
    assert scores.weights.tolist() == [0, 3, 3]
    assert scores.sums[0] == 0


def test_accuracy_of_label_tokens_is_what_greedy_decoding_writes():
    model = FAMILIES["switch_transformers"](expert_capacity=64)
    batch = inputs_for(model, padding=None)
    with torch.no_grad():
        written = model.generate(batch["input_ids"], max_new_tokens=3, min_new_tokens=3)[:, 1:]
    labels = written.clone()
    labels[1, 2] = (labels[1, 2] + 1) % 48
    labels[2, 1:] = -100
    scores = text_scores(model, [batch | {"labels": labels}], "accuracy")
    assert scores.sums.tolist() == [1, 0, 1]
    assert scores.value == pytest.approx(2 / 3)


def test_accuracy_among_choices():
    model = FAMILIES["switch_transformers"]()
    batch = inputs_for(model, padding=None)
    with torch.no_grad():
        first = model(**batch).logits[:, 0]
    labels = torch.full_like(batch["labels"], -100)
    choices = [7, 3, 11]
    labels[:, 0] = torch.tensor(choices)[first[:, choices].argmax(-1)]
    given = [batch | {"labels": labels}]
    assert text_scores(model, given, "accuracy", choices).value == 1
    assert text_scores(model, given, "accuracy").value < 1


def test_accuracy_of_a_decoders_label_tokens():
    model = FAMILIES["mixtral"]()
    batch = inputs(padding="left")
    with torch.no_grad():
        likeliest = model(**batch).logits[:, -2].argmax(-1)
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, -1] = likeliest
    labels[2, -1] = (likeliest[2] + 1) % 48
    assert text_scores(model, [batch | {"labels": labels}], "accuracy").sums.tolist() == [1, 1, 0]


def test_a_classifier():
    torch.manual_seed(0)
    config = CONFIGS["mixtral"]()
    config.num_labels = 3
    model = AutoModelForSequenceClassification.from_config(config).eval()
    batch = inputs()
    with torch.no_grad():
        logits = model(**batch).logits
    labels = logits.argmax(-1)
    labels[1] = (labels[1] + 1) % 3
    given = [batch | {"labels": labels}]
    assert text_scores(model, given, "accuracy").sums.tolist() == [1, 0, 1]
    expected = nn.functional.cross_entropy(logits, labels).item()
    assert text_scores(model, given, "nll").value == pytest.approx(expected, rel=1e-5)
    with pytest.raises(LamellaError, match="classifier is measured against labels"):
        text_scores(model, [batch], "nll")


def test_every_module_keeps_its_mode():
    model = FAMILIES["phimoe"]().train()
    model.model.layers[1].eval()
    before = [module.training for module in model.modules()]
    first, second = (text_scores(model, [inputs()], "nll") for _ in range(2))
    assert [module.training for module in model.modules()] == before
    assert first.value == second.value  # the router's jitter is for training


def test_what_cannot_be_scored_is_refused():
    model, switch = FAMILIES["mixtral"](), FAMILIES["switch_transformers"]()
    for given, batches, metric, told in (
        (model, [], "nll", "no texts"),
        (model, [inputs()], "accuracy", "Accuracy needs labels"),
        (model, [inputs()], "bleu", "'bleu' is not one of nll, accuracy"),
        (model, [inputs(tokens=1)], "nll", "No token"),
        (switch, [inputs()], "nll", "with labels"),
    ):
        with pytest.raises(LamellaError, match=told):
            text_scores(given, batches, metric)
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(LamellaError, match="logits of the tiny one are not finite"):
        text_scores(model, [inputs()], "nll", name="the tiny one")
