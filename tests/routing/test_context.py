import copy
from collections.abc import Iterator
from contextvars import Context

import pytest
import torch
from tests import tiny
from torch import Tensor, nn

from lamella.routing import Frame, RoutedCall, collect_losses, current_frame, find_tracker, prompt, track_calls


class Stack(nn.Module):
    """Stands for a transformer's stack: remembers the frame it ran in."""

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.inner = inner
        self.frames: list[Frame | None] = []

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, fail: bool = False) -> Tensor:
        self.frames.append(current_frame())
        if fail:
            raise RuntimeError("inside the block")
        if self.inner is not None:
            x = self.inner(x, attention_mask=1 - attention_mask)
        self.frames.append(current_frame())
        return x


X, MASK = torch.zeros(2, 3, 4), torch.tensor([[1, 1, 1], [1, 1, 0]])


@pytest.mark.parametrize("name", ["bert", "mpnet", "gpt2", "llama"])
def test_every_layer_of_a_single_stack_sees_the_attention_mask(name: str) -> None:
    model = tiny.adapted(tiny.MODELS[name]())
    given = tiny.batch(model.get_base_model())
    with tiny.watch(model) as seen, torch.no_grad():
        model(**given)
    assert len(seen) >= 8
    for place, routing, mask in seen:
        assert mask is not None, place
        assert torch.equal(mask, given["attention_mask"].bool().flatten())
        assert len(routing.logits) == mask.numel()


def test_a_mask_given_by_position_is_seen_too() -> None:
    model = tiny.adapted(tiny.bert())
    given = tiny.inputs(model.get_base_model())
    with tiny.watch(model) as seen, torch.no_grad():
        model.get_base_model()(given["input_ids"], given["attention_mask"])
    assert all(torch.equal(mask, given["attention_mask"].bool().flatten()) for _, _, mask in seen)


@pytest.mark.parametrize("name", tiny.MODELS)
def test_without_a_mask_all_tokens_are_real(name: str) -> None:
    model = tiny.adapted(tiny.MODELS[name]())
    given = tiny.inputs(model.get_base_model())
    del given["attention_mask"]
    with tiny.watch(model) as seen, torch.no_grad():
        model(**given)
    assert seen
    assert all(mask is None for _, _, mask in seen)


@pytest.mark.parametrize("by_labels", [True, False])
def test_encoder_decoder_and_cross_attention_each_see_their_own_mask(by_labels: bool) -> None:
    model = tiny.adapted(tiny.t5())
    base = model.get_base_model()
    given = tiny.batch(base) if by_labels else tiny.inputs(base)
    if by_labels:
        decoder = given["labels"].ne(-100).flatten()
    else:
        given["decoder_attention_mask"] = torch.ones_like(given["decoder_input_ids"])
        given["decoder_attention_mask"][0, -1] = 0
        decoder = given["decoder_attention_mask"].bool().flatten()
    encoder = given["attention_mask"].bool().flatten()
    assert len(encoder) != len(decoder)
    with tiny.watch(model) as seen, torch.no_grad():
        model(**given)
    assert len(seen) == 2 * 7 + 2 * 11
    for place, routing, mask in seen:
        is_cross_input = "EncDecAttention.k" in place.module or "EncDecAttention.v" in place.module
        expected = encoder if place.stack == "encoder.block" or is_cross_input else decoder
        assert len(routing.logits) == len(expected), place
        assert mask is not None, place
        assert torch.equal(mask, expected), place


def test_with_a_cache_the_mask_of_the_sequence_so_far_is_cut_to_the_new_tokens() -> None:
    model = tiny.adapted(tiny.llama())
    ids = torch.randint(3, tiny.VOCAB, (2, 6))
    mask = torch.tensor([[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])
    with torch.no_grad():
        cache = model(input_ids=ids[:, :4], attention_mask=mask[:, :4], use_cache=True).past_key_values
        with tiny.watch(model) as seen:
            model(input_ids=ids[:, 4:], attention_mask=mask, past_key_values=cache)
    assert len(seen) == 14
    for _, routing, real in seen:
        assert len(routing.logits) == 4
        assert real is not None
        assert real.tolist() == [True, False, True, True]


def test_token_mask_suits_flat_inputs_and_says_nothing_where_the_shapes_differ() -> None:
    frame = Frame(None, MASK.bool(), None)  # type: ignore[arg-type]
    assert frame.token_mask(X).tolist() == MASK.bool().flatten().tolist()
    assert frame.token_mask(X.flatten(0, 1)).tolist() == MASK.bool().flatten().tolist()
    assert frame.token_mask(torch.zeros(2, 5, 4)) is None  # longer than the mask
    assert frame.token_mask(torch.zeros(7, 4)) is None
    assert frame.token_mask(X, of_encoder=True) is None


def test_the_frame_is_gone_after_the_forward_and_after_an_exception() -> None:
    stack = Stack()
    track_calls(stack)
    stack(X, attention_mask=MASK)
    assert stack.frames[0] is not None
    assert current_frame() is None
    with pytest.raises(RuntimeError, match="inside the block"):
        stack(X, attention_mask=MASK, fail=True)
    assert current_frame() is None


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_an_exception_deep_in_a_block_leaves_no_frame_and_the_next_call_is_right(name: str) -> None:
    model = tiny.adapted(tiny.MODELS[name]())
    given = tiny.inputs(model.get_base_model())
    with torch.no_grad():
        expected = model(**given).logits

    def fail(module: nn.Module, args: tuple[object, ...]) -> None:
        raise RuntimeError("interrupted")

    last = [module for module in model.modules() if isinstance(module, tiny.MolaLinear)][-1]
    hook = last.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="interrupted"):
        model(**given)
    assert current_frame() is None
    hook.remove()
    with torch.no_grad():
        assert torch.equal(model(**given).logits, expected)


def test_a_stack_inside_gets_its_own_mask_and_the_outer_one_is_restored() -> None:
    inner = Stack()
    outer = Stack(inner)
    tracker = track_calls(outer, [inner])
    outer(X, attention_mask=MASK)
    before, after = outer.frames
    assert before is after
    assert before is not None
    assert inner.frames[0] is not None
    assert inner.frames[0].call is before.call
    assert before.mask.tolist() == MASK.bool().tolist()
    assert inner.frames[0].mask.tolist() == (1 - MASK).bool().tolist()
    assert inner.frames[0].call.tracker is tracker


def test_two_models_inside_each_other_keep_their_calls_apart() -> None:
    other = Stack()
    outer = Stack(other)
    # Two trackers: the inner model was adapted by itself, before it was put into the outer.
    mine = track_calls(other)
    theirs = track_calls(nn.Sequential(), [])
    outer.register_forward_pre_hook(theirs.open, with_kwargs=True)
    outer.register_forward_hook(theirs.close, always_call=True)
    outer(X, attention_mask=MASK)
    assert outer.frames[0] is outer.frames[1]
    assert outer.frames[0] is not None
    assert outer.frames[0].call.tracker is theirs
    assert other.frames[0] is not None
    assert other.frames[0].call.tracker is mine
    assert other.frames[0].call is not outer.frames[0].call
    assert current_frame() is None


def test_a_model_run_in_the_middle_of_another_changes_nothing() -> None:
    first, second = tiny.adapted(tiny.llama()), tiny.adapted(tiny.llama(seed=5))
    given = tiny.inputs(first.get_base_model())
    other = tiny.inputs(second.get_base_model(), rows=1, tokens=4)
    with torch.no_grad():
        expected = first(**given).logits
        block = first.get_base_model().model.layers[0]
        hook = block.mlp.register_forward_pre_hook(lambda module, args: second(**other) and None)
        with tiny.watch(first) as seen, tiny.watch(second) as seen_inside:
            assert torch.equal(first(**given).logits, expected)
        hook.remove()
    assert len(seen) == len(seen_inside) == 14
    assert all(torch.equal(mask, given["attention_mask"].bool().flatten()) for _, _, mask in seen)
    assert all(mask.numel() == 4 for _, _, mask in seen_inside)


def test_a_deep_copy_has_hooks_of_its_own() -> None:
    model = tiny.adapted(tiny.llama())
    clone = copy.deepcopy(model)
    given = tiny.inputs(model.get_base_model())
    assert find_tracker(clone) is not None
    assert find_tracker(clone) is not find_tracker(model)
    with tiny.watch(model) as seen, tiny.watch(clone) as seen_in_clone, torch.no_grad():
        expected = model(**given).logits
        assert len(seen) == 14
        assert not seen_in_clone
        assert torch.equal(clone(**given).logits, expected)
        assert len(seen) == len(seen_in_clone) == 14
    layers = {id(module) for module in clone.modules()}
    for module in clone.modules():
        if isinstance(module, tiny.MolaLinear):
            assert all(id(sibling) in layers for sibling in module.same_input)


def test_tracking_twice_sets_one_pair_of_hooks() -> None:
    stack = Stack()
    assert track_calls(stack) is track_calls(stack)
    assert len(stack._forward_pre_hooks) == len(stack._forward_hooks) == 1


def test_shared_projections_are_gone_when_the_stack_is_done() -> None:
    model = tiny.adapted(tiny.llama())
    frames: list[Frame | None] = []
    attention = model.get_base_model().model.layers[0].self_attn
    hooks = [
        # k has not run yet when q is done
        attention.q_proj.register_forward_hook(lambda *_: frames.append(current_frame())),
        attention.q_proj.register_forward_hook(lambda *_: waiting.append(len(current_frame().projections))),
    ]
    waiting: list[int] = []
    model(**tiny.inputs(model.get_base_model()))
    for hook in hooks:
        hook.remove()
    assert waiting == [2]
    assert frames[0] is not None
    assert not frames[0].projections


def test_what_generators_say_of_prompts_and_losses_is_their_own_whenever_they_end() -> None:
    model = Stack()
    track_calls(model)

    def call() -> RoutedCall:
        model(X)
        frame = model.frames[-1]
        assert frame is not None
        return frame.call

    def serve(length: int) -> Iterator[tuple[RoutedCall, object]]:
        with prompt([length, length]), collect_losses() as losses:
            while True:
                yield call(), losses

    first, second = serve(1), serve(2)
    for _ in range(2):
        for one, length in ((first, 1), (second, 2)):
            made, losses = next(one)
            assert made.prompt is not None
            assert made.prompt.lengths is not None
            assert made.prompt.lengths.tolist() == [length, length]
            assert made.collected is losses
            assert call().prompt is None
    first.close()
    Context().run(second.close)  # as a server does whose client has gone
    assert call().prompt is None
    assert call().collected is None
