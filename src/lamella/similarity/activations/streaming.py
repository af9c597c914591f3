"""The streaming pass: the model reads the text once, and every expert keeps a uniform sample of what it is given."""

import inspect
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lamella.backbones.moe import Dispatch, MoELayer, moe_layers, watch_dispatch
from lamella.backbones.offloading import input_device
from lamella.backbones.side_by_side import has_offloaded_blocks, run_side_by_side
from lamella.errors import LamellaError
from lamella.files import claimed
from lamella.progress import Work, working
from lamella.similarity.activations.checkpoints import Reservoirs, Saver
from lamella.similarity.activations.documents import Batch, Documents, added, unread
from lamella.similarity.activations.manifest import DTYPES, Manifest, model_fingerprint, tokenizer_fingerprint
from lamella.similarity.activations.reading import Capture

LOOK = 64  # documents after which it is seen whether every expert has its samples


def capture(
    model: nn.Module,
    batches: Iterable[Batch],
    folder: str | Path,
    per_expert: int = 512,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tokenizer: Any = None,
    origin: str = "",
    whole_text: bool = False,
) -> Capture:
    """Runs text through a mixture-of-experts model once and keeps a sample of every expert's inputs.

    Every (layer, expert, document, place among its real tokens) has a fixed pseudo-random key, and an expert keeps the
    ``per_expert`` tokens with the smallest keys (bottom-k sampling). So the sample is uniform over the tokens the
    expert was given, and the same for any size and padding of the batches, and for any order of the same documents.
    Padding is left out; tokens that an expert had no room for are counted, not sampled.

    It ends with the text, or, looked at after every 64 documents, when every expert has its samples: give it documents
    in random order (`TextBatches.shuffled`), so that the first ones stand for all.

    Where weights of the model's blocks are kept elsewhere (accelerate's offloading), the batches of 64 documents go
    through the model side by side, block by block, so that each weight is read once for them. The samples are the same.

    The folder holds a checkpoint from time to time: the same call goes on where a killed one stopped, reading over the
    documents it has, and gives the same capture. On a finished one it only compares the text.

    Args:
        model: as transformers builds it; it is evaluated, and its training flags are restored.
        batches: what the model is called with: ``input_ids (batch, tokens)``, one document a row, ``attention_mask``
            where there is padding, and whatever else. ``rows (batch,)`` may number the documents; otherwise they are
            counted.
        folder: of this capture alone.
        per_expert: most samples of an expert; memory is experts x per_expert x hidden size.
        seed: of the keys.
        dtype: of the samples, float32 or bfloat16.
        tokenizer: of the text, so that later steps can tell another one.
        origin: what the text is, a sentence.
        whole_text: read on to the end of the text, where a few documents would do: counts of choices are of all then.

    Raises:
        LamellaError: not a mixture of experts; the folder holds a capture of something else, or another process is at
            it; a batch that cannot be read, or none; NaN or infinite activations; the disk is full.
    """
    folder = Path(folder)
    layers = moe_layers(model)
    asked = _asked(model, layers, per_expert, seed, dtype, tokenizer, origin, whole_text)
    with _alone(folder):
        return _captured(model, layers, batches, folder, asked)


def _captured(
    model: nn.Module,
    layers: Sequence[MoELayer],
    batches: Iterable[Batch],
    folder: Path,
    asked: Manifest,
) -> Capture:
    saver = Saver(folder)
    done, reservoirs = saver.resume(asked)
    if done.complete:
        taken = Capture.load(folder)
        more = next(unread(batches, done, folder), None)
        if more is not None and not _ended(done, [count["captured"] for count in taken.counts.values()]):
            raise LamellaError(
                f"The capture in {folder} is complete with {done.rows_done:,} documents, but the text given now goes "
                "on. Capture into another folder."
            )
        return taken
    stream = _together(_cut(unread(batches, done, folder), done.rows_done), done.rows_done, has_offloaded_blocks(model))
    with working("capturing", getattr(batches, "documents", None), "documents", done.rows_done) as work:
        taking = _Taking(model, layers, replace(done, whole_text=asked.whole_text), reservoirs, work)
        with _evaluating(model), torch.no_grad(), watch_dispatch(model, layers, taking.watch), taking.checked(layers):
            while not taking.ended and (several := next(stream, None)) is not None:
                taking.take(several)
                saver.checkpoint(taking.manifest, reservoirs)
                taking.tell()
    if not taking.manifest.rows_done:
        raise LamellaError("There is nothing to capture: the text has no documents.")
    return saver.finish(taking.manifest, reservoirs)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """No other process may write to the folder meanwhile; one that was made for nothing goes again."""
    was_there = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with claimed(folder) as mine:
        if not mine:
            raise LamellaError(
                f"Another process is capturing into {folder}. Let it finish, or capture into another folder."
            )
        try:
            yield
        finally:
            if not was_there:
                with suppress(OSError):  # something was written
                    folder.rmdir()


class _Forward(threading.local):
    """What one forward of the model reads; forwards side by side are in threads of their own.

    Attributes:
        documents: the batch.
        told: the layers that have run.
        last: what was given to the experts that run now.
    """

    documents: Documents
    told: set[int]
    last: Dispatch

    def begin(self, documents: Documents) -> None:
        """Another batch is read."""
        self.documents, self.told = documents, set()


class _Taking:
    """What one run of a capture has taken in."""

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[MoELayer],
        done: Manifest,
        reservoirs: Reservoirs,
        work: Work,
    ) -> None:
        self.manifest = done
        self._model = model
        self._reservoirs = reservoirs
        self._work, self._documents = work, work.total
        self._device = input_device(model)
        self._now = _Forward()

    def take(self, several: Sequence[Documents]) -> None:
        """Lets the model read batches, and counts them."""
        if len(several) == 1:
            self._read(several[0])
        else:
            run_side_by_side(self._model, [partial(self._read, documents) for documents in several], self.tell)
        for documents in several:
            self.manifest = replace(
                self.manifest,
                rows_done=self.manifest.rows_done + len(documents),
                tokens=self.manifest.tokens + documents.tokens,
                text=added(self.manifest.text, documents.text),
            )

    def _read(self, documents: Documents) -> None:
        self._now.begin(documents)
        inputs = {n: v.to(self._device) if isinstance(v, Tensor) else v for n, v in documents.inputs.items()}
        self._model(**inputs, **_sparing(self._model, inputs))

    def tell(self, blocks: int = 0) -> None:
        """Says how far it is; ``blocks`` of an offloaded model are behind the next documents."""
        asked, rows = self.manifest.per_expert, self.manifest.rows_done
        captured = torch.cat([one.captured.cpu() for one in self._reservoirs.values()])
        rarest, short = int(captured.min()), int((captured < asked).sum())
        if rarest and not self.manifest.whole_text:  # by then the expert that is chosen most rarely has its samples
            ends = [-(-rows * asked // rarest), *([] if self._documents is None else [self._documents])]
            self._work.total = max(rows, min(ends))
        self._work.note = f"{self.manifest.tokens:,} tokens, {short} of {len(captured)} experts short of their samples"
        if blocks:
            self._work.note += f", the next documents behind {blocks} blocks"
        self._work.reach(rows)

    def watch(self, dispatch: Dispatch) -> None:
        """Takes in what one layer gave to its experts."""
        layer, real = dispatch.layer, dispatch.real
        self._now.last = dispatch
        if layer.index in self._now.told:
            raise LamellaError(
                f"Layer {layer.index} ({layer.name}) runs twice in one forward, so its tokens would count twice."
            )
        self._now.told.add(layer.index)
        positions = (real.view(dispatch.shape).cumsum(dim=1) - 1).flatten()[real]  # (n,), n real tokens
        rows = self._now.documents.rows.to(real.device).repeat_interleave(dispatch.shape[1])[real]
        x, indices = dispatch.x[real], dispatch.routing.indices[real]  # (n, h), (n, k)
        kept = None if dispatch.routing.kept is None else dispatch.routing.kept[real]
        self._check_finite(layer, x, indices, rows, positions)
        reservoir = self._reservoirs[layer.index]
        reservoir.count(indices, kept, None if dispatch.routing.skipped is None else dispatch.routing.skipped[real])
        taken = torch.ones_like(indices, dtype=torch.bool) if kept is None else kept
        reservoir.offer(self.manifest.seed, layer.index, indices, taken, rows, positions, x)

    @contextmanager
    def checked(self, layers: Sequence[MoELayer]) -> Iterator[None]:
        """Inside the context, NaN and infinity are found where they arise, and the expert that gave them is named."""
        handles = [layer.experts_module.register_forward_hook(self._check_output) for layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _check_output(self, _: nn.Module, args: Any, output: Tensor) -> None:
        dispatch = self._now.last
        if output.numel() // output.shape[-1] != len(dispatch.x):
            return  # not one row for each token: the next layer's inputs tell
        broken = ~output.reshape(len(dispatch.x), -1).isfinite().all(dim=1) & dispatch.real
        if not broken.any():
            return
        at, layer = int(broken.int().argmax()), dispatch.layer
        x = dispatch.x[at : at + 1]
        chosen = [e for e in dispatch.routing.indices[at].tolist() if not layer.experts[e](x).isfinite().all()]
        place = at % dispatch.shape[1]
        rows, real = self._now.documents.rows, dispatch.real.view(dispatch.shape)
        self._refuse(
            f"{f'Expert {chosen[0]}' if chosen else 'The experts'} of layer {layer.index} ({layer.name}) put out",
            int(rows[at // dispatch.shape[1]]),
            int(real[at // dispatch.shape[1], :place].sum()),
        )

    def _check_finite(self, layer: MoELayer, x: Tensor, indices: Tensor, rows: Tensor, positions: Tensor) -> None:
        finite = x.isfinite().all(dim=1)
        if not finite.all():
            first = int(finite.int().argmin())
            what = f"Layer {layer.index} ({layer.name}) gives its expert {int(indices[first, 0])}"
            self._refuse(what, int(rows[first]), int(positions[first]))

    def _refuse(self, what: str, row: int, position: int) -> NoReturn:
        raise LamellaError(
            f"{what} NaN or infinite activations in batch {self._now.documents.number}, document {row}, token "
            f"{position}. A model that was trained in bfloat16 overflows in float16: load it in bfloat16 or float32; "
            "or mend its weights."
        )

    @property
    def ended(self) -> bool:
        """Whether it ends before the text does."""
        return _ended(self.manifest, [one.captured for one in self._reservoirs.values()])


def _asked(
    model: nn.Module,
    layers: Sequence[MoELayer],
    per_expert: int,
    seed: int,
    dtype: torch.dtype,
    tokenizer: Any,
    origin: str,
    whole_text: bool,
) -> Manifest:
    """What is asked for, as the manifest of a capture that has not begun."""
    name = next((name for name, known in DTYPES.items() if known == dtype), None)
    if name is None:
        raise LamellaError(f"Samples are kept in {' or '.join(DTYPES)}, not in {dtype}.")
    if per_expert < 1:
        raise LamellaError(f"per_expert={per_expert}: an expert keeps at least one sample.")
    widths = {layer.experts.width for layer in layers}
    twice = len(layers) - len({layer.index for layer in layers})
    if twice or len(widths) > 1:
        raise LamellaError(
            f"{type(model).__name__} has {len(layers)} layers of experts, {twice} more than blocks that have any, of "
            f"the widths {', '.join(map(str, sorted(widths)))}. A capture names an expert by its block and takes one "
            "layer a block, all of one width; put an adapter's experts on one module a block, or capture without it."
        )
    return Manifest(
        model=model_fingerprint(model),
        tokenizer=None if tokenizer is None else tokenizer_fingerprint(tokenizer),
        origin=origin,
        seed=seed,
        per_expert=per_expert,
        dtype=name,
        layers=tuple((layer.index, layer.num_experts) for layer in layers),
        hidden_size=widths.pop(),
        whole_text=whole_text,
    )


def _ended(manifest: Manifest, captured: Sequence[Tensor]) -> bool:
    """Whether, at a look, every expert has its samples ``(E,)``, so that nothing more needs to be read."""
    looked = manifest.rows_done > 0 and manifest.rows_done % LOOK == 0
    return looked and not manifest.whole_text and all(bool((one >= manifest.per_expert).all()) for one in captured)


def _cut(stream: Iterable[Documents], taken: int) -> Iterator[Documents]:
    """The documents after those taken, no batch reaching over a multiple of `LOOK`: batches of any size end alike."""
    for documents in stream:
        while len(documents) > (room := LOOK - taken % LOOK):
            yield documents.part(0, room)
            documents, taken = documents.part(room), taken + room
        yield documents
        taken += len(documents)


def _together(stream: Iterable[Documents], taken: int, side_by_side: bool) -> Iterator[list[Documents]]:
    """The batches that the model reads at once: one, or those up to the next look."""
    several: list[Documents] = []
    for documents in stream:
        several.append(documents)
        taken += len(documents)
        if not side_by_side or taken % LOOK == 0:
            yield several
            several = []
    if several:
        yield several


def _sparing(model: nn.Module, inputs: Batch) -> dict[str, Any]:
    """Arguments that keep a model from computing what nobody reads: a cache, and the logits of every token."""
    spared = {"use_cache": False} | ({} if "labels" in inputs else {"logits_to_keep": 1})
    takes = inspect.signature(model.forward).parameters
    return {name: value for name, value in spared.items() if name in takes and name not in inputs}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
