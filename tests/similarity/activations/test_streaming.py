"""The pass over text: what it keeps is what the experts were given, whatever the batches look like."""

import pytest
import torch
from tests import tiny
from tests.reference import similarity_capture as reference
from tests.similarity.activations.streams import assert_equal, assert_same_samples, batches, documents, left_over
from tests.tiny_moe import FAMILIES, inputs_for
from torch import nn

from lamella.backbones.moe import Dispatch, moe_layers, watch_dispatch
from lamella.errors import LamellaError
from lamella.progress import listening
from lamella.similarity.activations import Capture, capture
from lamella.similarity.activations.streaming import LOOK
from lamella.tracing import record_routing

TEXTS = documents()


@pytest.fixture(params=["qwen2_moe", "mixtral"])
def model(request):
    return FAMILIES[request.param](dtype=torch.float64)


@torch.no_grad()
def dispatches(model: nn.Module, stream: list[dict]) -> list[list[Dispatch]]:
    """What the layers gave to their experts, batch by batch."""
    told = []
    for batch in stream:
        seen: list[Dispatch] = []
        with watch_dispatch(model, moe_layers(model), seen.append):
            model(**batch)
        told.append(seen)
    return told


def test_every_expert_has_the_tokens_with_the_smallest_keys(model, tmp_path):
    given: dict[tuple[int, int], dict] = {}
    for row, text in enumerate(TEXTS):  # one document at a time, without padding
        (seen,) = dispatches(model, [{"input_ids": text[None]}])
        for dispatch in seen:
            for position, chosen in enumerate(dispatch.routing.indices.tolist()):
                for expert in chosen:
                    given.setdefault((dispatch.layer.index, expert), {})[row, position] = dispatch.x[position]
    snapshot = capture(model, batches(TEXTS), tmp_path, per_expert=6, seed=4)
    routing = snapshot.routing.set_index(["layer", "expert"])
    for layer, expert in snapshot.experts:
        tokens = given.get((layer, expert), {})
        expected = reference.smallest(4, layer, expert, tokens, 6)
        parts = (snapshot.keys(layer, expert), snapshot.rows(layer, expert), snapshot.positions(layer, expert))
        assert list(zip(*(part.tolist() for part in parts), strict=True)) == expected
        if expected:
            x = torch.stack([tokens[row, position] for _, row, position in expected])
            torch.testing.assert_close(snapshot.inputs(layer, expert), x.float())
        assert routing.loc[(layer, expert), "selected"] == len(tokens)
        assert routing.loc[(layer, expert), "captured"] == len(expected)
    assert (routing.tokens == sum(map(len, TEXTS))).all()
    assert routing.dropped.sum() == 0
    assert snapshot.manifest.tokens == sum(map(len, TEXTS))
    assert snapshot.manifest.rows_done == len(TEXTS)
    assert snapshot.manifest.complete


@pytest.mark.parametrize("other", [{"size": 1}, {"size": 7}, {"padding": "left"}, {"size": 2, "wider": 3}])
def test_padding_and_batch_size_change_no_sample(model, tmp_path, other):
    expected = capture(model, batches(TEXTS), tmp_path / "expected", per_expert=6)
    assert_same_samples(capture(model, batches(TEXTS, **other), tmp_path / "found", per_expert=6), expected)


def test_it_ends_at_the_first_look_at_which_every_expert_has_its_samples(tmp_path):
    model, texts = FAMILIES["qwen2_moe"](), documents(2 * LOOK + 5)
    first = capture(model, batches(texts[:LOOK], size=50), tmp_path / "first", per_expert=6, whole_text=True)
    assert (first.routing["captured"] == 6).all()
    for size in (30, len(texts)):
        ended = capture(model, batches(texts, size=size), tmp_path / f"{size}", per_expert=6)
        assert_same_samples(ended, first)
        assert ended.manifest.rows_done == LOOK
    again = capture(model, batches(texts, size=50), tmp_path / "30", per_expert=6)
    assert again.manifest.rows_done == LOOK  # nothing is added
    whole = capture(model, batches(texts, size=50), tmp_path / "whole", per_expert=6, whole_text=True)
    assert whole.manifest.rows_done == len(texts)
    more = int(first.routing["selected"].min()) + 1  # not yet there at the first look
    later = capture(model, batches(texts, size=50), tmp_path / "more", per_expert=more)
    assert later.manifest.rows_done == 2 * LOOK


def test_documents_with_numbers_of_their_own_may_come_in_any_order(model, tmp_path):
    expected = capture(model, batches(TEXTS), tmp_path / "expected", per_expert=6)
    order = [3, 0, 6, 5, 1, 2, 4]
    stream = list(batches([TEXTS[row] for row in order], rows=order))
    snapshot = capture(model, stream, tmp_path / "found", per_expert=6)
    assert_same_samples(snapshot, expected)
    assert all("rows" in batch for batch in stream)  # what was given is not changed


@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4, 1, 6], [5, 3, 9, 2, 9, 0, 1]])
def test_a_number_that_comes_again_in_another_batch_is_refused(model, tmp_path, rows):
    with pytest.raises(LamellaError, match=rf"Document {[1, 9][rows[0] > 0]} comes again in batch 1"):
        capture(model, batches(TEXTS, size=4, rows=rows), tmp_path, per_expert=6)


def test_another_seed_draws_others_and_the_same_seed_the_same(model, tmp_path):
    first, again, other = (
        capture(model, batches(TEXTS), tmp_path / name, per_expert=4, seed=seed)
        for name, seed in (("first", 1), ("again", 1), ("other", 2))
    )
    assert_equal(again, first)
    assert any(not torch.equal(first.inputs(*at), other.inputs(*at)) for at in first.experts)


def test_outputs_recomputed_are_what_the_model_computed(model, tmp_path):
    layer = moe_layers(model)[1]
    snapshot = capture(model, batches(TEXTS), tmp_path, per_expert=1000)
    for row, text in enumerate(TEXTS):
        ((_, dispatch, _),) = dispatches(model, [{"input_ids": text[None]}])
        outputs = torch.zeros_like(dispatch.x)
        for expert in range(layer.num_experts):
            mine = snapshot.rows(1, expert) == row
            at = snapshot.positions(1, expert)[mine]
            y = layer.experts[expert](snapshot.inputs(1, expert)[mine].double())
            outputs[at] += dispatch.routing.dense_weights()[at, expert, None] * y
        if layer.shared is not None:
            outputs += layer.shared(dispatch.x)
        computed = layer.module(dispatch.x[None])
        torch.testing.assert_close(outputs, computed[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_captured(family, tmp_path):
    model = FAMILIES[family]()
    stream = [inputs_for(model, seed=seed, batch=4, tokens=9) for seed in range(3)]
    seen = dispatches(model, stream)
    snapshot = capture(model, stream, tmp_path, per_expert=8)
    routing = snapshot.routing.groupby("layer")[["selected", "dropped"]].sum()
    for place, layer in enumerate(moe_layers(model)):
        of_layer = [batch[place] for batch in seen]
        real = sum(int(dispatch.real.sum()) for dispatch in of_layer)
        lost = sum(0 if one.routing.kept is None else int((~one.routing.kept[one.real]).sum()) for one in of_layer)
        assert routing.loc[layer.index].tolist() == [real * layer.top_k, lost]
    assert snapshot.hidden_size == moe_layers(model)[0].experts[0].up.shape[1]


def test_tokens_without_room_are_counted_apart_and_not_sampled(tmp_path):
    model = FAMILIES["switch_transformers"]()  # an expert has room for two tokens of a sequence
    stream = [inputs_for(model, seed=seed, batch=4, tokens=9) for seed in range(3)]
    lost = set()
    for number, seen in enumerate(dispatches(model, stream)):
        for dispatch in seen:
            kept = dispatch.routing.kept[:, 0].view(dispatch.shape)
            real = dispatch.real.view(dispatch.shape)
            for row, token in torch.nonzero(real & ~kept).tolist():
                expert = int(dispatch.routing.indices.view(dispatch.shape)[row, token])
                lost.add((dispatch.layer.index, expert, 4 * number + row, int(real[row, :token].sum())))
    snapshot = capture(model, stream, tmp_path, per_expert=1000)
    sampled = {
        (*at, row, position)
        for at in snapshot.experts
        for row, position in zip(snapshot.rows(*at).tolist(), snapshot.positions(*at).tolist(), strict=True)
    }
    assert lost
    assert not lost & sampled
    assert snapshot.routing.dropped.sum() == len(lost)
    assert (snapshot.routing.selected - snapshot.routing.dropped == snapshot.routing.captured).all()
    assert len(sampled) == snapshot.routing.captured.sum()
    with torch.no_grad(), record_routing(model) as trace:
        for batch in stream:
            model(**batch)
    assert sorted(snapshot.routing.share) == pytest.approx(sorted(trace.frame.share))
    taken = snapshot.routing.captured
    totals = taken.groupby(snapshot.routing.layer).transform("sum")
    assert snapshot.routing.share.tolist() == pytest.approx((taken / totals).tolist())


def test_bfloat16_keeps_the_same_tokens_in_half_the_room(model, tmp_path):
    full, half = (
        capture(model, batches(TEXTS), tmp_path / str(dtype), per_expert=20, dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
    )
    for at in full.experts:
        assert torch.equal(half.keys(*at), full.keys(*at))
        assert torch.equal(half.inputs(*at), full.inputs(*at).bfloat16().float())
    shards = [one.manifest.shard(one.folder, 0).stat().st_size for one in (half, full)]
    assert shards[0] < shards[1]


def test_modules_train_on_as_they_did(tmp_path):
    model = FAMILIES["mixtral"]().train()
    frozen = moe_layers(model)[0].block.eval()
    seen = []
    model.register_forward_hook(lambda module, args, output: seen.append(module.training))
    before = {name: module.training for name, module in model.named_modules()}
    snapshot = capture(model, batches(TEXTS), tmp_path / "found", per_expert=4)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert not frozen.training
    assert not any(seen)
    assert_equal(snapshot, capture(model.eval(), batches(TEXTS), tmp_path / "expected", per_expert=4))


def test_progress_tells_tokens_and_experts_that_are_short(model, tmp_path):
    rows, notes, totals = [], [], []

    def listen(work):
        rows.append(work.done)
        notes.append(work.note)
        totals.append(work.total)

    with listening(listen):
        snapshot = capture(model, batches(TEXTS), tmp_path, per_expert=12)
    assert rows == [3, 6, 7]
    tokens = [int(note.split(" tokens")[0]) for note in notes]
    assert tokens == [sum(map(len, TEXTS[:rows])) for rows in (3, 6, 7)]
    short = [int(note.split(", ")[1].split()[0]) for note in notes]
    assert short[0] > short[-1] == len(snapshot.short(12))
    assert all(note.endswith(f" of {len(snapshot.experts)} experts short of their samples") for note in notes)
    rarest = min(int(count["captured"].min()) for count in snapshot.counts.values())
    assert totals[-1] == (-(-7 * 12 // rarest) if rarest else None)  # when the rarest expert has its samples


def test_the_folder_holds_shards_and_manifest_alone(model, tmp_path):
    snapshot = capture(model, batches(TEXTS), tmp_path)
    shards = {f"layer-{layer:03d}.safetensors" for layer, _ in snapshot.manifest.layers}
    assert left_over(tmp_path) == shards | {"manifest.json"}
    assert_equal(Capture.load(tmp_path), snapshot)


def test_inputs_that_are_no_text_or_not_one_document_a_row_are_refused(model, tmp_path):
    with pytest.raises(LamellaError, match=r"Batch 0 has no input_ids.*it has input_ids \(1, 2, 3\)"):
        capture(model, [{"input_ids": torch.ones(1, 2, 3, dtype=torch.int64)}], tmp_path)
    with pytest.raises(LamellaError, match="rows of batch 0 do not give each of its 2 documents one number"):
        capture(model, [{"input_ids": torch.ones(2, 3, dtype=torch.int64), "rows": torch.zeros(2)}], tmp_path)
    with pytest.raises(LamellaError, match="no documents"):
        capture(model, [], tmp_path)
    assert not left_over(tmp_path)


def test_settings_that_cannot_be_are_refused(model, tmp_path):
    with pytest.raises(LamellaError, match=r"float32 or bfloat16, not in torch\.float16"):
        capture(model, [], tmp_path, dtype=torch.float16)
    with pytest.raises(LamellaError, match="per_expert=0"):
        capture(model, [], tmp_path, per_expert=0)


def test_activations_that_are_not_finite_are_told_by_layer_expert_and_batch(tmp_path):
    model = FAMILIES["mixtral"]()
    last = TEXTS[4][2].item()  # a token of the second batch
    texts = [text.where(text != last, text.new_tensor(5)) if row < 3 else text for row, text in enumerate(TEXTS)]
    with torch.no_grad():
        model.get_input_embeddings().weight[last] = torch.inf
    with pytest.raises(
        LamellaError, match=r"Layer 0 \(.*\) gives its expert \d NaN or infinite .* in batch 1, document"
    ):
        capture(model, batches(texts), tmp_path)


def test_activations_of_padding_may_be_anything(tmp_path):
    model = FAMILIES["mixtral"]()

    def spoil(module, args):
        return (torch.cat([args[0][:, :3], torch.full_like(args[0][:, 3:], torch.nan)], dim=1),)

    moe_layers(model)[-1].module.register_forward_pre_hook(spoil)
    snapshot = capture(model, batches([TEXTS[0][:3]], wider=4), tmp_path, per_expert=4)
    assert (snapshot.routing.tokens == 3).all()
    with pytest.raises(LamellaError, match="NaN"):
        capture(model, batches([TEXTS[0][:4]], wider=4), tmp_path / "real", per_expert=4)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_nan_is_blamed_on_the_expert_that_gives_it(family, tmp_path):
    model = FAMILIES[family]()
    layer = moe_layers(model)[1]
    with torch.no_grad():
        layer.experts[2].down[0, 0] = torch.nan
    with pytest.raises(LamellaError, match=r"^Expert 2 of layer 1 .* put out NaN .* token \d"):
        capture(model, batches(TEXTS), tmp_path)


def test_a_layer_that_runs_twice_is_refused(tmp_path):
    model = FAMILIES["mixtral"]()
    again = moe_layers(model)[0].module
    again.register_forward_hook(lambda module, args, output: module.forward(args[0]).numel() and None)
    with pytest.raises(LamellaError, match=r"Layer 0 .* runs twice"):
        capture(model, batches(TEXTS), tmp_path)


def test_a_model_without_experts_is_refused(tmp_path):
    with pytest.raises(LamellaError, match="Linear"):
        capture(nn.Linear(2, 2), [], tmp_path)


def test_experts_of_an_adapter_are_captured_where_a_block_has_one_layer_of_them(tmp_path):
    adapted = tiny.adapted(tiny.llama(), target_modules=["q_proj"]).eval()
    snapshot = capture(adapted, batches(TEXTS), tmp_path, per_expert=6)
    assert snapshot.experts == [(layer, expert) for layer in range(2) for expert in range(3)]
    assert (snapshot.routing.tokens == sum(map(len, TEXTS))).all()
    with pytest.raises(LamellaError, match=r"14 layers of experts, 12 more than blocks .* of the widths 16, 24"):
        capture(tiny.adapted(tiny.llama()), batches(TEXTS), tmp_path / "many")
