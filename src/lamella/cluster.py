"""Work on a Ray cluster: connected to for a while, given one piece at a time, and again where a worker died."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from lamella.errors import LamellaError

RETRIES = 3  # of work whose worker died


class WorkersDiedError(LamellaError):
    """One piece of work ended every worker that it was given to.

    Attributes:
        piece: which one.
    """

    def __init__(self, sentence: str, piece: Any) -> None:
        super().__init__(sentence)
        self.piece = piece


Piece = TypeVar("Piece")


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """Ray, connected to a cluster; a connection that was there before is used and left as it is.

    Args:
        address: "auto" for the cluster that runs on this machine, or one's own; "local" starts one that ends with the
            block.

    Raises:
        LamellaError: Ray is not installed, or no cluster answers.
    """
    try:
        import ray
    except ImportError as error:
        raise LamellaError("Work on a cluster needs Ray: `pip install lamella[ray]`.") from error
    if ray.is_initialized():
        yield ray
        return
    try:
        ray.init(address=address, include_dashboard=False if address == "local" else None, logging_level=logging.ERROR)
    except ConnectionError as error:
        raise LamellaError(
            f"No Ray cluster answers at {address!r}: {error} Start one with `ray start --head`, name its address, or "
            "leave --ray out to compute here."
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


class Cluster(Generic[Piece]):
    """Pieces of work that one function does on the workers of a cluster, which see the same files at the same paths.

    A piece whose worker dies is given to another one, up to `RETRIES` times, so it may be done more than once: the
    function should write its result atomically, to a file that is complete or not there.

    Args:
        ray: from `connected`.
        function: does one piece.
        word: what a piece is called.
        gpus: that each piece takes, beside one CPU.
    """

    def __init__(self, ray: Any, function: Callable[..., None], word: str, gpus: int = 0) -> None:
        self._ray, self._word = ray, word
        self._function = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RETRIES)(function)
        self.waiting: dict[Any, Piece] = {}

    def submit(self, piece: Piece, *arguments: Any) -> None:
        """Give a piece to the cluster; ``arguments`` are those of the function."""
        self.waiting[self._function.remote(*arguments)] = piece

    def next(self) -> Piece:
        """The next piece that is done. What else is waiting goes on, also after an error, until it is cancelled.

        Raises:
            WorkersDiedError: its workers died again and again.
            Exception: whatever the function raised.
        """
        done = self._ray.wait(list(self.waiting))[0][0]
        piece = self.waiting.pop(done)
        exceptions = self._ray.exceptions
        try:
            self._ray.get(done)
        except BaseException as error:
            if isinstance(error, exceptions.RayTaskError) and isinstance(error.cause, LamellaError):
                raise error.cause from error
            if isinstance(
                error, exceptions.WorkerCrashedError | exceptions.OutOfMemoryError | exceptions.NodeDiedError
            ):
                raise WorkersDiedError(
                    f"{RETRIES + 1} workers died over one {self._word} ({piece}), often for want of memory: {error} "
                    f"What is finished is kept: try it with a smaller {self._word} or fewer workers on a machine.",
                    piece,
                ) from error
            raise
        return piece

    def share(self, value: Any) -> Any:
        """Something that many pieces need, sent once; it is given to `submit` in its place."""
        return self._ray.put(value)

    def cancel(self) -> None:
        """Give up what is waiting."""
        for left in self.waiting:
            self._ray.cancel(left, force=True)
        self.waiting.clear()
