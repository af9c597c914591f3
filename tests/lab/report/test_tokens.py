import numpy as np
import pandas as pd
import pytest
import torch
from peft import get_peft_model
from tests import tiny

from lamella import MolaConfig
from lamella.errors import LamellaError
from lamella.lab.report import token_texts
from lamella.lab.report.tokens import COLUMNS
from lamella.tracing import record_routing


def choices(*rows, adapter="default", stack="encoder", call=0):
    """Rows of (layer, module, sequence, position, expert, weight)."""
    full = [(adapter, stack, layer, module, call, *rest) for layer, module, *rest in rows]
    return pd.DataFrame(full, columns=list(COLUMNS))


TWO_TEXTS = choices(
    (0, "q", 0, 0, 1, 1.0),
    (0, "q", 0, 1, 0, 0.75),
    (0, "q", 0, 1, 1, 0.25),
    (0, "k", 0, 0, 0, 1.0),
    (0, "k", 0, 1, 0, 1.0),
    (0, "q", 1, 2, 1, 1.0),  # padded on the left: its only real token stands third
    (0, "k", 1, 2, 1, 1.0),
)


def test_each_text_gets_the_mean_over_modules_and_each_module_alone():
    first, second = token_texts(TWO_TEXTS, [("a", ["x", "y"]), ("b", ["z"])], 2)
    assert (first.title, list(first.tokens), second.title) == ("a", ["x", "y"], "b")
    weights = {layer.name: layer.weights.tolist() for layer in first.layers}
    assert weights == {
        "layer 0": [[0.5, 0.5], [0.875, 0.125]],
        "layer 0 · q": [[0.0, 1.0], [0.75, 0.25]],
        "layer 0 · k": [[1.0, 0.0], [1.0, 0.0]],
    }
    assert [layer.weights.tolist() for layer in second.layers] == [[[0.0, 1.0]]] * 3


def test_a_router_outside_the_blocks_that_is_given_one_state_of_each_text_is_left_out():
    pooler = choices((0, "pooler", 0, 0, 1, 1.0), (0, "pooler", 1, 2, 1, 1.0), stack="")
    both = token_texts(pd.concat([TWO_TEXTS, pooler]), [("a", ["x", "y"]), ("b", ["z"])], 2)
    assert [layer.name for layer in both[0].layers] == ["layer 0", "layer 0 · q", "layer 0 · k"]
    assert token_texts(pooler, [("a", ["x", "y"]), ("b", ["z", "z"])], 2) == []


def test_layers_come_before_modules_and_a_single_module_stands_alone():
    rows = choices((0, "q", 0, 0, 1, 1.0), (0, "k", 0, 0, 0, 1.0), (1, "q", 0, 0, 2, 1.0), (1, "k", 0, 0, 0, 1.0))
    (text,) = token_texts(rows, [("a", ["x"])], {("encoder", 0): 2, ("encoder", 1): 3})
    assert [(layer.name, layer.num_experts) for layer in text.layers] == [
        ("layer 0", 2),
        ("layer 1", 3),
        ("layer 0 · q", 2),
        ("layer 1 · q", 3),
        ("layer 0 · k", 2),
        ("layer 1 · k", 3),
    ]
    (alone,) = token_texts(rows[rows["module"] == "q"], [("a", ["x"])], 3)
    assert [layer.name for layer in alone.layers] == ["layer 0 · q", "layer 1 · q"]


def test_stacks_and_adapters_are_named_where_there_are_several():
    rows = [
        choices((0, "q", 0, 0, 0, 1.0)),
        choices((0, "q", 0, 0, 1, 1.0), stack="decoder"),
        choices((0, "q", 0, 0, 1, 1.0), adapter="other"),
    ]
    (text,) = token_texts(pd.concat(rows[:2]), [("a", ["x"])], 2)
    assert [layer.name for layer in text.layers] == ["encoder layer 0 · q", "decoder layer 0 · q"]
    (text,) = token_texts(pd.concat(rows[::2]), [("a", ["x"])], 2)
    assert [layer.name for layer in text.layers] == ["default layer 0 · q", "other layer 0 · q"]


def test_calls_come_in_order():
    rows = pd.concat([choices((0, "q", 0, 0, 0, 1.0), call=1), choices((0, "q", 0, 0, 1, 1.0), call=0)])
    first, second = token_texts(rows, [("a", ["x"]), ("b", ["y"])], 2)
    assert np.argmax(first.layers[0].weights) == 1
    assert np.argmax(second.layers[0].weights) == 0


@pytest.mark.parametrize(
    ("texts", "num_experts", "words"),
    [
        ([("a", ["x", "y"])], 2, "2 sequences but 1 texts"),
        ([("a", ["x"]), ("b", ["z"])], 2, "'a' has 1 tokens but encoder layer 0 routed 2"),
        ([("a", ["x", "y"]), ("b", ["z"])], 1, "chose expert 1, but it is said to have 1"),
        ([("a", ["x", "y"]), ("b", ["z"])], {("encoder", 5): 2}, "experts of encoder layer 0 is missing"),
    ],
)
def test_texts_that_do_not_belong_to_the_trace_are_refused(texts, num_experts, words):
    with pytest.raises(LamellaError, match=words):
        token_texts(TWO_TEXTS, texts, num_experts)


def test_a_missing_column_is_refused():
    with pytest.raises(LamellaError, match="lacks the columns weight"):
        token_texts(TWO_TEXTS.drop(columns="weight"), [], 2)


def test_a_recorded_padded_batch_gives_the_weights_of_the_trace():
    model = get_peft_model(tiny.bert(), MolaConfig(target_modules=["query", "value"], num_experts=[2, 4], top_k=2))
    ids = torch.tensor([[5, 6, 7], [8, 9, 0]])
    with record_routing(model, per_token=True) as trace:
        model(input_ids=ids, attention_mask=(ids != 0).long())
    experts = trace.frame.groupby(["stack", "layer"])["num_experts"].max().to_dict()
    texts = token_texts(trace.tokens, [("a", ["5", "6", "7"]), ("b", ["8", "9"])], experts)
    query, value = "attention.self.query", "attention.self.value"
    names = [f"layer {layer}{module}" for module in ("", f" · {query}", f" · {value}") for layer in (0, 1)]
    for text in texts:
        assert [layer.name for layer in text.layers] == names
        assert [layer.weights.shape for layer in text.layers] == [(len(text.tokens), count) for count in (2, 4)] * 3
    # over all real tokens, the mean weights are those the trace summed on its own
    traced = trace.frame.set_index(["layer", "module"])["mean_weight"]
    for at, key in zip(range(2, 6), [(0, query), (1, query), (0, value), (1, value)], strict=True):
        weights = np.concatenate([text.layers[at].weights for text in texts]).mean(axis=0)
        assert weights == pytest.approx(traced[key].tolist(), abs=1e-6)
