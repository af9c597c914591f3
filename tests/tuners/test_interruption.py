"""An exception of any kind inside a forward leaves nothing behind: what comes next is as in a fresh model."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests import tiny
from tests.tuners.mole import trained
from torch import Tensor, nn

from lamella.routing import current_frame
from lamella.routing.context import current_context

METHODS = ("mola", "molex", "mole")
INTERRUPTIONS = (KeyboardInterrupt, SystemExit, RuntimeError)


def fresh(method: str, kind: str, folder: Path) -> PeftModel:
    """A model in training with a balance loss, the same each time."""
    if method == "mola":
        model = tiny.adapted(tiny.build(kind, layers=2).double(), router_aux_loss_coef=0.1)
    elif method == "molex":
        model = tiny.molex(tiny.build(kind, layers=2).double(), router_aux_loss_coef=0.1)
    else:
        model = trained.composition(kind, folder, balance="log")
    return model.double().train()


@pytest.fixture(params=METHODS)
def make(request: pytest.FixtureRequest, folder: Path) -> Callable[..., PeftModel]:
    return partial(fresh, request.param, folder=folder)


@contextmanager
def interrupted(module: nn.Module, kind: type[BaseException], at: int = 1) -> Iterator[None]:
    """The module's call of that number, counted from 1, raises."""
    calls = 0

    def interrupt(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            raise kind("now")

    hook = module.register_forward_pre_hook(interrupt)
    try:
        yield
    finally:
        hook.remove()
        assert calls >= at, "nothing was interrupted"


def step(model: PeftModel, seed: int = 1, **options: Any) -> dict[str, Tensor]:
    """Loss and gradients of a batch."""
    output = model(**tiny.batch(model.get_base_model(), seed=seed), **options)
    output.loss.backward()
    return {"loss": output.loss.detach(), **tiny.gradients(model)}


def assert_as_fresh(model: PeftModel, make: Callable[..., PeftModel], kind: str) -> None:
    assert current_frame() is None
    assert current_context().around is None
    model.zero_grad()
    actual, expected = step(model, seed=2), step(make(kind=kind), seed=2)
    assert actual.keys() == expected.keys()
    assert any("router" in name for name in actual)
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


def places(model: PeftModel, given: dict[str, Tensor]) -> list[nn.Module]:
    """Where a forward may be: before the first block, in the modules inside the blocks, and after the last."""
    called: dict[nn.Module, None] = {}
    hooks = [
        module.register_forward_pre_hook(lambda module, _: called.update({module: None})) for module in model.modules()
    ]
    with torch.no_grad():
        model(**given)
    for hook in hooks:
        hook.remove()
    inside = list(called)[3:]
    return [*inside[:: len(inside) // 6], inside[-1]]


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_the_forward_after_an_interrupted_one_is_a_fresh_models(make: Callable[..., PeftModel], kind: str) -> None:
    model, given = make(kind=kind), tiny.batch(make(kind=kind).get_base_model())
    for index, module in enumerate(places(model, given)):
        kind_of_exception = INTERRUPTIONS[index % 3]
        with pytest.raises(kind_of_exception), interrupted(module, kind_of_exception):
            model(**given)
        assert current_frame() is None
    assert_as_fresh(model, make, kind)


def test_a_stack_and_a_layer_called_by_themselves_are_in_no_dead_call(make: Callable[..., PeftModel]) -> None:
    model = make(kind="llama").eval()
    inner, given = model.get_base_model().model, tiny.inputs(model.get_base_model(), seed=3)
    with torch.no_grad():
        expected = make(kind="llama").eval().get_base_model().model(**given).last_hidden_state
        with pytest.raises(KeyboardInterrupt), interrupted(inner.norm, KeyboardInterrupt):
            model(**tiny.inputs(model.get_base_model()))
        assert torch.equal(inner(**given).last_hidden_state, expected)


def test_an_interrupted_stack_inside_does_not_end_the_call_around_it(make: Callable[..., PeftModel]) -> None:
    """Whoever catches the exception inside the model goes on in the call that still runs."""
    model = make(kind="t5").eval()
    base, given = model.get_base_model(), tiny.inputs(model.get_base_model())
    encode, frames = type(base.encoder).forward, []

    def again(*args: Any, **kwargs: Any) -> Any:
        frames.append(current_frame())
        return encode(base.encoder, *args, **kwargs)

    def twice(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            with interrupted(base.encoder.block[1], KeyboardInterrupt):
                base.encoder(*args, **kwargs)
        except KeyboardInterrupt:
            frames.append(current_frame())

    with torch.no_grad():
        expected = model(**given).logits
        hook = base.decoder.register_forward_pre_hook(
            lambda module, args, kwargs: twice(module, (), {"input_ids": given["input_ids"]}),
            with_kwargs=True,
            prepend=True,
        )
        base.encoder.forward = again
        actual = model(**given).logits
        del base.encoder.forward
        hook.remove()
    assert torch.equal(actual, expected)
    first, second, after = frames
    assert first.call is second.call
    assert after is first.parent
    assert current_frame() is None


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_text_generated_after_an_interruption_is_a_fresh_models(make: Callable[..., PeftModel], kind: str) -> None:
    model, expected_by = make(kind=kind).eval(), make(kind=kind).eval()
    given = tiny.batch(model.get_base_model(), seed=2)
    del given["labels"]
    options = {"max_new_tokens": 4, "do_sample": False}
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    for at in (1, 3):
        with pytest.raises(KeyboardInterrupt), interrupted(last, KeyboardInterrupt, at=at):
            model.generate(**given, **options)
    assert torch.equal(model.generate(**given, **options), expected_by.generate(**given, **options))
    assert_as_fresh(model.train(), make, kind)


@pytest.mark.parametrize("reentrant", [False, True])
def test_an_interrupted_recomputation_leaves_nothing(make: Callable[..., PeftModel], reentrant: bool) -> None:
    model = make(kind="llama")
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    inner = model.get_base_model().model.layers[0].mlp.down_proj
    loss = model(**tiny.batch(model.get_base_model())).loss
    with pytest.raises(KeyboardInterrupt), interrupted(inner, KeyboardInterrupt):
        loss.backward()
    model.gradient_checkpointing_disable()
    assert_as_fresh(model, make, "llama")


def test_an_interruption_in_a_thread_stays_there(make: Callable[..., PeftModel]) -> None:
    model, results = make(kind="llama"), []
    layer = model.get_base_model().model.layers[1].mlp.down_proj

    def work() -> None:
        try:
            with interrupted(layer, SystemExit):
                model(**tiny.batch(model.get_base_model()))
        except SystemExit:
            results.append(current_frame())
        results.append(step(model, seed=2))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    expected = step(make(kind="llama"), seed=2)
    assert results[0] is None
    assert all(torch.equal(results[1][name], expected[name]) for name in expected)
    assert_as_fresh(model, make, "llama")
