"""A forward that ended in whatever way leaves nothing behind, and forwards in threads and tasks keep to themselves."""

import asyncio
import contextvars
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests import tiny
from torch import Tensor, nn

from lamella import prompt
from lamella.routing import collect_losses, current_frame
from lamella.routing.context import stated_prompt

ENDS = (KeyboardInterrupt, SystemExit, asyncio.CancelledError, GeneratorExit, RuntimeError)
IDS = torch.randint(3, tiny.VOCAB, (3, 9), generator=torch.Generator().manual_seed(4))
LABELS = IDS.masked_fill(torch.arange(9) < torch.tensor([[3], [5], [4]]), -100)


def molex(**settings: Any) -> PeftModel:
    return tiny.molex(tiny.llama(layers=3), router_aux_loss_coef=0.5, **settings)


def interrupt(
    module: nn.Module, kind: type[BaseException], backward: bool = False, recomputing: bool = False
) -> Callable[[], None]:
    """Ends what runs at this module, in its recomputation alone if told; returns what undoes it."""

    def end(*_: Any) -> None:
        frame = current_frame()
        if not recomputing or (frame is not None and frame.recomputing):
            raise kind("ended")

    if backward:
        return module.register_full_backward_pre_hook(end).remove
    return module.register_forward_pre_hook(end).remove


def step(model: PeftModel) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits and gradients of a step in training."""
    output = model(input_ids=IDS, labels=LABELS)
    output.loss.backward()
    return output.logits.detach(), tiny.gradients(model)


def assert_right(model: PeftModel, expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    assert current_frame() is None
    assert stated_prompt() is None
    logits, gradients = step(model)
    assert torch.equal(logits, expected[0])
    tiny.assert_same(gradients, expected[1], rtol=0, atol=0)


@pytest.mark.parametrize("kind", ENDS)
@pytest.mark.parametrize("place", ["stack", "block", "linear"])
def test_the_next_forward_does_not_belong_to_the_one_that_ended(kind: type[BaseException], place: str) -> None:
    model = molex().train()
    expected = step(model)
    llama = model.get_base_model().model
    undo = interrupt(
        {"stack": llama.norm, "block": llama.layers[1], "linear": llama.layers[2].mlp.up_proj}[place], kind
    )
    with pytest.raises(kind):
        model(input_ids=IDS.flip(1)[:2])
    undo()
    assert_right(model, expected)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputation_or_a_backward_pass_that_ended_leaves_nothing(
    kind: type[BaseException], reentrant: bool
) -> None:
    model = molex().train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    expected = step(model)
    last = model.get_base_model().model.layers[2].mlp.down_proj
    for where in ({"recomputing": True}, {"backward": True}):
        undo = interrupt(last, kind, **where)
        output = model(input_ids=IDS, labels=LABELS)
        with pytest.raises(kind):
            output.loss.backward()
        undo()
        del output
        model.zero_grad(set_to_none=True)
        assert_right(model, expected)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("method", ["mola", "molex"])
def test_losses_of_a_forward_that_ended_are_not_collected(kind: type[BaseException], method: str) -> None:
    model = (tiny.adapted(tiny.llama(), router_aux_loss_coef=0.5) if method == "mola" else molex()).train()
    with collect_losses() as losses:
        model(input_ids=IDS)
        expected, names = losses.total().detach(), [name for name, _ in losses.by_name]
    undo = interrupt(model.get_base_model().lm_head, kind)
    with collect_losses() as losses:
        with pytest.raises(kind):
            model(input_ids=IDS)
        undo()
        model(input_ids=IDS)
    assert [name for name, _ in losses.by_name] == names
    torch.testing.assert_close(losses.total().detach(), expected)


def run(model: PeftModel, ids: Tensor = IDS, **more: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, **more).logits
    return logits


def test_two_threads_and_one_that_ends_in_the_middle() -> None:
    model = molex(alpha=0.2)
    inside, done = threading.Event(), threading.Event()
    expected, found = run(model, labels=LABELS), {}

    def wait(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if threading.current_thread().name == "slow":
            inside.set()
            done.wait(20)
        if threading.current_thread().name == "dying":
            raise SystemExit

    hook = model.get_base_model().model.layers[1].register_forward_pre_hook(wait)
    slow = threading.Thread(target=lambda: found.update(slow=run(model, labels=LABELS)), name="slow")
    slow.start()
    assert inside.wait(20)
    with prompt([2, 2]):
        quick = run(model, IDS[:2])
    dying = threading.Thread(target=lambda: run(model, IDS[1:], labels=LABELS[1:]), name="dying")
    dying.start()
    dying.join(20)
    done.set()
    slow.join(20)
    hook.remove()
    assert torch.equal(found["slow"], expected)
    with prompt([2, 2]):
        assert torch.equal(run(model, IDS[:2]), quick)


def test_a_model_called_inside_itself_or_in_a_thread_with_its_context_makes_a_call_of_its_own() -> None:
    model = molex(alpha=0.2)
    expected, other = run(model, labels=LABELS), IDS.flip(1)
    expected_inside = run(model, other)
    found: list[Tensor] = []

    def again(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        hook.remove()
        found.append(run(model, other))
        context = contextvars.copy_context()
        thread = threading.Thread(target=lambda: found.append(context.run(run, model, other)))
        thread.start()
        thread.join(20)

    hook = model.get_base_model().model.layers[1].register_forward_pre_hook(again)
    assert torch.equal(run(model, labels=LABELS), expected)
    assert len(found) == 2
    assert all(torch.equal(one, expected_inside) for one in found)


def test_a_model_inside_another_module_that_is_interrupted() -> None:
    model = molex(alpha=0.2)
    expected = run(model, labels=LABELS)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = model, nn.Linear(tiny.VOCAB, 2)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(run(self.inner, ids))

    outer = Outer()
    for module in (outer.head, model.get_base_model().model.layers[1]):
        undo = interrupt(module, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            outer(IDS[:1])
        undo()
        assert current_frame() is None
        assert torch.equal(run(model, labels=LABELS), expected)


def test_prompts_said_in_generators_and_tasks_end_in_any_order() -> None:
    model = molex(alpha=0.2)
    plain = run(model)
    with prompt([5, 5, 5]):
        expected = run(model)

    def streaming(length: int) -> Iterator[Tensor]:
        with prompt([length] * 3):
            yield run(model)

    first, second = streaming(2), streaming(5)
    next(first)
    assert torch.equal(next(second), expected)
    first.close()
    assert torch.equal(run(model), plain), "what a suspended generator says is for itself"
    elsewhere = threading.Thread(target=second.close)
    elsewhere.start()
    elsewhere.join(20)
    assert stated_prompt() is None

    async def ask(length: int) -> Tensor:
        with prompt([length] * 3):
            await asyncio.sleep(0)
            return run(model)

    async def both() -> list[Tensor]:
        cancelled = asyncio.create_task(ask(3))
        tasks = [asyncio.create_task(ask(length)) for length in (2, 5)]
        await asyncio.sleep(0)
        cancelled.cancel()
        return await asyncio.gather(*tasks)

    assert torch.equal(asyncio.run(both())[1], expected)
    assert stated_prompt() is None
