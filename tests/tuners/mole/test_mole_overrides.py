"""What is said in place of the routers holds for the flow of control that said it, and ends with it."""

import asyncio
import contextvars
import copy
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Barrier, Thread

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from tests import tiny
from tests.tuners.mole import trained
from torch import Tensor

from lamella import compose, fixed_weights, masked_experts

NEWS, CODE = {"news": 1.0}, {"code": 1.0, "law": 0.5}
Run = Callable[[], Tensor]


@pytest.fixture
def model(folder: Path) -> PeftModel:
    return trained.composition("bert", folder)


@pytest.fixture
def run(model: PeftModel) -> Run:
    given = tiny.inputs(model.get_base_model())
    return lambda: trained.run(model, given)


def alone(model: PeftModel, run: Run, weights: dict[str, float]) -> Tensor:
    with fixed_weights(model, weights):
        return run()


def request(model: PeftModel, run: Run, weights: dict[str, float]) -> Generator[Tensor, None, None]:
    with fixed_weights(model, weights):
        while True:
            yield run()


def test_two_threads_are_each_served_by_their_own(model: PeftModel, run: Run) -> None:
    expected = {"news": alone(model, run, NEWS), "code": alone(model, run, CODE), "plain": run()}
    everybody, actual = Barrier(3, timeout=60), {}

    def serve(name: str, weights: dict[str, float]) -> None:
        with fixed_weights(model, weights):
            everybody.wait()
            actual[name] = run()
            everybody.wait()

    threads = [Thread(target=serve, args=one) for one in (("news", NEWS), ("code", CODE))]
    for thread in threads:
        thread.start()
    everybody.wait()
    with pytest.warns(UserWarning, match=r"holds in another thread.*copy_context"):
        actual["plain"] = run()
    everybody.wait()
    for thread in threads:
        thread.join()
    tiny.assert_same(actual, expected, rtol=0, atol=0)


def test_a_thread_started_with_a_copy_of_the_context_takes_part(model: PeftModel, run: Run) -> None:
    actual = []
    with fixed_weights(model, NEWS):
        thread = Thread(target=contextvars.copy_context().run, args=(lambda: actual.append(run()),))
        thread.start()
        thread.join()
    assert torch.equal(actual[0], alone(model, run, NEWS))


def test_coroutines_are_each_served_by_their_own(model: PeftModel, run: Run) -> None:
    async def serve(weights: dict[str, float]) -> list[Tensor]:
        with fixed_weights(model, weights):
            outputs = []
            for _ in range(2):
                await asyncio.sleep(0)  # the others' turn
                outputs.append(run())
            outputs.append(await asyncio.to_thread(run))
            return outputs

    async def everybody() -> list[list[Tensor]]:
        return await asyncio.gather(serve(NEWS), serve(CODE))

    for outputs, weights in zip(asyncio.run(everybody()), (NEWS, CODE), strict=True):
        assert all(torch.equal(output, alone(model, run, weights)) for output in outputs)


@pytest.mark.parametrize("first_closed", [0, 1])
def test_generators_are_each_served_by_their_own_and_may_be_closed_late(
    first_closed: int, model: PeftModel, run: Run
) -> None:
    plain, expected = run(), [alone(model, run, weights) for weights in (NEWS, CODE)]
    requests = [request(model, run, weights) for weights in (NEWS, CODE)]
    assert torch.equal(next(requests[0]), expected[0])
    with pytest.warns(UserWarning, match=r"stands in a generator that is suspended.*contextlib\.contextmanager"):
        assert torch.equal(run(), plain), "who iterates a generator is not inside it"
    for _ in range(2):
        for one, output in zip(requests, expected, strict=True):
            assert torch.equal(next(one), output)
            assert torch.equal(run(), plain)
    with fixed_weights(model, [0.0, 0.0, 1.0]):
        assert torch.equal(next(requests[0]), expected[0]), "a generator is inside what its reader says"
    requests[first_closed].close()
    assert torch.equal(next(requests[1 - first_closed]), expected[1 - first_closed])
    requests[1 - first_closed].close()
    assert torch.equal(run(), plain)


def test_an_asynchronous_generator_is_served_by_its_own_and_its_reader_is_not(model: PeftModel, run: Run) -> None:
    """As a server that streams an answer to whoever reads it."""
    news, code, plain = alone(model, run, NEWS), alone(model, run, CODE), run()

    async def stream() -> AsyncIterator[Tensor]:
        with fixed_weights(model, NEWS):
            yield run()
            await asyncio.sleep(0)
            yield run()

    async def read() -> None:
        async for output in stream():
            assert torch.equal(output, news)
            assert torch.equal(run(), plain)
        left = stream()
        assert torch.equal(await anext(left), news)
        with fixed_weights(model, CODE):
            assert torch.equal(run(), code)
            assert torch.equal(await anext(left), news)
        assert torch.equal(run(), plain)
        await left.aclose()

    asyncio.run(read())


def test_a_generator_may_be_run_in_other_contexts_and_threads(model: PeftModel, run: Run) -> None:
    """As a server does that streams an answer from a pool of threads."""
    stream, actual = request(model, run, NEWS), []
    for _ in range(2):
        thread = Thread(target=contextvars.copy_context().run, args=(lambda: actual.append(next(stream)),))
        thread.start()
        thread.join()
    contextvars.Context().run(stream.close)
    assert all(torch.equal(output, alone(model, run, NEWS)) for output in actual)
    assert torch.equal(run(), trained.run(model, tiny.inputs(model.get_base_model())))
    assert not torch.equal(run(), actual[0])


def test_context_managers_around_it_only_pass_it_on(model: PeftModel, run: Run) -> None:
    @contextmanager
    def tenant(weights: dict[str, float]) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(fixed_weights(model, weights))
            yield

    def fixture() -> Iterator[None]:
        with fixed_weights(model, NEWS):
            yield

    def begin(one: Iterator[None]) -> Iterator[None]:  # as pytest does with its fixtures
        next(one)
        return one

    plain, news = run(), alone(model, run, NEWS)
    with fixed_weights(model, CODE), tenant(NEWS):
        assert torch.equal(run(), news)
    begun = begin(fixture())
    assert torch.equal(run(), news)
    assert next(begun, None) is None
    assert torch.equal(fixed_weights(model, NEWS)(run)(), news)
    assert torch.equal(run(), plain)


def test_fixed_weights_inside_a_mask_leave_out_what_it_leaves_out(model: PeftModel, run: Run) -> None:
    with masked_experts(model, drop=["law"]):
        inside = alone(model, run, CODE)
        assert torch.equal(alone(model, run, NEWS), alone(model, run, NEWS))
    with fixed_weights(model, {"code": 1.5}):
        torch.testing.assert_close(inside, run())


def test_a_copy_of_the_model_begins_with_nothing_said(model: PeftModel, run: Run) -> None:
    plain = run()
    with fixed_weights(model, NEWS):
        copied = copy.deepcopy(model)
        assert torch.equal(trained.run(copied, tiny.inputs(model.get_base_model())), plain)


def test_a_negative_weight_goes_the_other_way(folder: Path) -> None:
    paths = trained.loras("bert", folder)
    given = tiny.inputs(tiny.bert())
    lora = PeftModel.from_pretrained(tiny.bert().double(), paths["news"]).double()
    for module in lora.modules():
        if isinstance(module, LoraLayer):
            module.scale_layer(-0.7)
    composed = compose(tiny.bert().double(), paths).double().eval()
    with fixed_weights(composed, {"news": -0.7}):
        torch.testing.assert_close(trained.run(composed, given), trained.run(lora.eval(), given))
    with fixed_weights(composed, {"news": -0.7, "code": 0.3}), masked_experts(composed, drop=["code"]):
        masked = trained.run(composed, given)
    with fixed_weights(composed, {"news": -1.0}):
        torch.testing.assert_close(masked, trained.run(composed, given))
