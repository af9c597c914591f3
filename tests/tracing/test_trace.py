"""The trace against an independent count of every router's decisions, made from the routers' own inputs."""

import math
import sys

import pandas as pd
import pytest
import torch
from peft import get_peft_model
from tests import tiny
from torch import Tensor, nn

from lamella import LamellaError, MolaConfig
from lamella.tracing import COLUMNS, TOKEN_COLUMNS, record_routing, routers_of
from lamella.tuners.mola import MolaLinear

TOP_K = 2


def mixture(model: nn.Module) -> nn.Module:
    return get_peft_model(model, MolaConfig(r=2, num_experts=4, top_k=TOP_K, init_lora_weights=False)).eval()


class Truth:
    """Counts, by hand, what each router chooses: softmax, sort, the first k, real rows only."""

    def __init__(self, model: nn.Module) -> None:
        self.counts: dict[str, Tensor] = {}
        self.entropies: dict[str, list[float]] = {}
        self.effective: dict[str, list[float]] = {}
        self.mask_of = lambda layer, x: torch.ones(x.shape[:-1], dtype=torch.bool)
        for layer in (m for m in model.modules() if isinstance(m, MolaLinear)):
            layer.register_forward_pre_hook(self.count)

    def count(self, layer: MolaLinear, args: tuple[Tensor, ...]) -> None:
        (x,) = args
        probs = torch.softmax(x @ layer.lamella_mola_router["default"].weight.t(), dim=-1)
        real = probs[self.mask_of(layer, x)]  # (N, E)
        counts = self.counts.setdefault(layer.name, torch.zeros(probs.shape[-1], dtype=torch.long))
        for row in real:
            for expert in row.argsort(descending=True)[:TOP_K].tolist():
                counts[expert] += 1
            self.entropies.setdefault(layer.name, []).append(-sum(p * math.log(p) for p in row.tolist()))
            best = sorted(row.tolist())[-TOP_K:]
            self.effective.setdefault(layer.name, []).append(1 / sum((p / sum(best)) ** 2 for p in best))


def assert_trace_is(trace, truth: Truth) -> None:
    actual = {f"{stack}.{layer}.{module}": counts for (_, stack, layer, module), counts in trace.counts.items()}
    assert actual.keys() == truth.counts.keys()
    for name, counts in truth.counts.items():
        assert actual[name].tolist() == counts.tolist(), name
    entropy = {f"{stack}.{layer}.{module}": value for (_, stack, layer, module), value in trace.entropy.items()}
    for name, values in truth.entropies.items():
        assert entropy[name] == pytest.approx(sum(values) / len(values), rel=1e-5)
    for use in trace.routers:
        values = truth.effective[f"{use.stack}.{use.layer}.{use.module}"]
        assert use.effective_experts == pytest.approx(sum(values) / len(values), rel=1e-5)


@torch.no_grad()
def test_encoder_with_padding():
    model = mixture(tiny.bert())
    ids = torch.randint(3, tiny.VOCAB, (3, 7))
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0  # right padding
    mask[1, :2] = 0  # left padding
    truth = Truth(model)
    truth.mask_of = lambda layer, x: mask.bool()
    with record_routing(model) as trace:
        model(input_ids=ids, attention_mask=mask)
        model(input_ids=ids, attention_mask=mask)
    assert_trace_is(trace, truth)
    assert set(trace.frame.tokens) == {2 * int(mask.sum())}


@torch.no_grad()
def test_decoder_generating_with_a_cache():
    model = mixture(tiny.llama())
    ids = torch.randint(3, tiny.VOCAB, (2, 6))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    truth = Truth(model)
    truth.mask_of = lambda layer, x: mask.bool() if x.shape[1] == 6 else torch.ones(x.shape[:2], dtype=torch.bool)
    with record_routing(model) as trace:
        model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=True
        )
    assert_trace_is(trace, truth)
    assert set(trace.frame.tokens) == {int(mask.sum()) + 2 * 3}  # the last new token is never fed back


@torch.no_grad()
def test_encoder_decoder_counts_each_stack_by_its_own_mask():
    model = mixture(tiny.t5())
    source, target = torch.randint(3, tiny.VOCAB, (2, 6)), torch.randint(3, tiny.VOCAB, (2, 4))
    source_mask = torch.ones_like(source)
    source_mask[1, 3:] = 0
    labels = target.clone()
    labels[0, 2:] = -100
    truth = Truth(model)
    truth.mask_of = lambda layer, x: source_mask.bool() if x.shape[1] == 6 else labels.ne(-100)
    with record_routing(model) as trace:
        model(input_ids=source, attention_mask=source_mask, labels=labels)
    assert_trace_is(trace, truth)
    crossing = trace.frame[trace.frame.module.str.contains("EncDecAttention")]
    by_module = crossing.groupby("module").tokens.first()
    assert by_module["layer.1.EncDecAttention.k"] == int(source_mask.sum())
    assert by_module["layer.1.EncDecAttention.q"] == int(labels.ne(-100).sum())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_counts_each_token_once(use_reentrant):
    model = mixture(tiny.llama()).train()
    model.enable_input_require_grads()
    ids = torch.randint(3, tiny.VOCAB, (2, 5))
    with record_routing(model) as plain:
        model(input_ids=ids, labels=ids).loss.backward()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    with record_routing(model) as checkpointed:
        model(input_ids=ids, labels=ids).loss.backward()
    pd.testing.assert_frame_equal(plain.frame, checkpointed.frame)


def test_frame_and_parquet(tmp_path):
    model = mixture(tiny.bert())
    with record_routing(model) as trace, torch.no_grad():
        model(input_ids=torch.randint(3, tiny.VOCAB, (2, 5)))
    frame = trace.frame
    assert tuple(frame.columns) == COLUMNS
    per_router = frame.groupby(["stack", "layer", "module"])
    assert per_router["share"].sum().to_numpy() == pytest.approx(1)
    assert per_router["mean_weight"].sum().to_numpy() == pytest.approx(1)
    assert (frame.entropy <= math.log(4) + 1e-9).all()
    trace.save(tmp_path / "trace.parquet")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "trace.parquet"), frame)
    assert [path.name for path in tmp_path.iterdir()] == ["trace.parquet"]


@torch.no_grad()
def test_tokens_are_the_choices_behind_the_counts():
    model = mixture(tiny.bert())
    ids = torch.randint(3, tiny.VOCAB, (2, 5))
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    with record_routing(model, per_token=True) as trace:
        model(input_ids=ids, attention_mask=mask)
        model(input_ids=ids, attention_mask=mask)
    tokens = trace.tokens
    assert tuple(tokens.columns) == TOKEN_COLUMNS
    one = tokens[(tokens["layer"] == 1) & (tokens["module"] == "output.dense")]
    seen = set(zip(one.call, one.sequence, one.position, strict=True))
    assert seen == {(c, s, p) for c in (0, 1) for s, p in mask.nonzero().tolist()}
    assert one.groupby(["call", "sequence", "position"]).weight.sum().to_numpy() == pytest.approx(1)
    counts = next(v for (_, _, layer, module), v in trace.counts.items() if layer == 1 and module == "output.dense")
    assert one.expert.value_counts().reindex(range(4), fill_value=0).tolist() == counts.tolist()


def test_recording_ends_with_the_context_also_after_an_error():
    model = mixture(tiny.bert())
    ids = torch.randint(3, tiny.VOCAB, (2, 5))

    def interrupted(trace_of: list[object]) -> None:
        with record_routing(model) as trace:
            trace_of.append(trace)
            model(input_ids=ids)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted(traces := [])
    (trace,) = traces
    before = trace.counts
    model(input_ids=ids)
    assert all(torch.equal(before[key], counts) for key, counts in trace.counts.items())


def test_a_model_without_an_adapter_is_an_error():
    with pytest.raises(LamellaError, match="no lamella adapter"), record_routing(tiny.bert()):
        pass


@torch.no_grad()
def test_coactivation_is_the_share_of_tokens_that_chose_both():
    model = mixture(tiny.bert())
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[0, 5:] = 0

    with record_routing(model, per_token=True) as trace:
        model(input_ids=torch.randint(3, tiny.VOCAB, (3, 7)), attention_mask=mask)

    frame, tokens = trace.coactivation, trace.tokens
    router = ["stack", "layer", "module"]
    for key, own in tokens.groupby(router):
        chosen = [set(experts) for _, experts in own.groupby(["sequence", "position"])["expert"]]
        pairs = frame.set_index(router).loc[key]
        assert len(pairs) == 16
        for row in pairs.itertuples():
            both = sum({row.expert, row.other} <= choice for choice in chosen)
            assert row.share == pytest.approx(both / len(chosen))
    diagonal = frame[frame["expert"] == frame["other"]]
    assert diagonal.groupby(router)["share"].sum().tolist() == pytest.approx([TOP_K] * len(trace.counts))


@torch.no_grad()
def test_molex_counts_one_decision_per_sequence_over_all_blocks():
    model = tiny.molex(tiny.bert(layers=4), top_k=2)
    given = tiny.inputs(model.get_base_model(), rows=5)
    with tiny.watch(model) as seen, record_routing(model, per_token=True) as trace:
        model(**given)
    assert set(trace.frame.module) == {"block"}
    assert set(trace.frame.tokens) == {5}
    assert set(trace.frame.num_experts) == {4}
    for place, routing, _ in seen:
        counts = trace.counts["default", place.stack, place.layer, "block"]
        assert counts.tolist() == torch.bincount(routing.indices.flatten(), minlength=4).tolist()
        rows = trace.frame[trace.frame.layer == place.layer]
        weights = torch.zeros(4).index_add(0, routing.indices.flatten(), routing.weights.flatten()) / 5
        assert rows.mean_weight.to_numpy() == pytest.approx(weights.numpy())
    tokens = trace.tokens
    assert len(tokens) == 4 * 5 * 2
    assert set(tokens.position) == {-1}
    assert sorted(set(tokens.sequence)) == [0, 1, 2, 3, 4]


@torch.no_grad()
def test_molex_per_token_and_per_batch():
    given = tiny.inputs(tiny.bert(), rows=3)
    model = tiny.molex(tiny.bert(layers=4), granularity="token")
    with record_routing(model, per_token=True) as trace:
        model(**given)
    assert set(trace.frame.tokens) == {int(given["attention_mask"].sum())}
    assert set(zip(trace.tokens.sequence, trace.tokens.position, strict=True)) == set(
        map(tuple, given["attention_mask"].nonzero().tolist())
    )
    model = tiny.molex(tiny.bert(layers=4), granularity="batch")
    with record_routing(model, per_token=True) as trace:
        model(**given)
        model(**given)
    assert set(trace.frame.tokens) == {2}
    assert set(trace.tokens.sequence) == set(trace.tokens.position) == {-1}


@torch.no_grad()
def test_molex_decides_once_with_a_cache():
    model = tiny.molex(tiny.llama(layers=4))
    ids = torch.randint(3, tiny.VOCAB, (2, 6))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with record_routing(model) as trace:
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert set(trace.frame.tokens) == {2}


@pytest.mark.parametrize("policy", ["random", "uniform", "fixed"])
@torch.no_grad()
def test_molex_policies_are_recorded_like_a_router(policy):
    model = tiny.molex(tiny.bert(layers=4), policy=policy, **({"fixed_layer": 2} if policy == "fixed" else {}))
    with record_routing(model) as trace:
        model(**tiny.inputs(model.get_base_model(), rows=6))
    entropy = {layer: value for (_, _, layer, _), value in trace.entropy.items()}
    if policy == "fixed":
        assert entropy == {0: 0.0, 1: 0.0, 3: 0.0}, "a block that is its own guest decides nothing"
        assert set(trace.frame[trace.frame.expert == 2].share) == {1.0}
    else:
        assert entropy == pytest.approx(dict.fromkeys(range(4), math.log(4)))
    if policy == "uniform":
        assert trace.frame.share.to_numpy() == pytest.approx(0.25)


def test_without_pandas_only_the_tables_are_missing(monkeypatch):
    model = mixture(tiny.bert(layers=1))
    with record_routing(model) as trace:
        model(**tiny.batch(model.get_base_model()))
    assert routers_of(trace.frame) == list(trace.routers)

    monkeypatch.setitem(sys.modules, "pandas", None)

    assert [use.num_experts for use in trace.routers] == [4] * 6
    assert all(sum(use.shares) == pytest.approx(1) for use in trace.routers)
    with pytest.raises(LamellaError, match="pandas, which is not installed"):
        _ = trace.frame
