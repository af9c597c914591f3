"""Which LoRAs of a library help a task, by their loss on a few labelled examples, beside two controls."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from lamella.adapters import AdapterLibrary, fit, map_to
from lamella.backbones.modes import evaluating
from lamella.errors import LamellaError
from lamella.progress import working
from lamella.retrieval.examples import Batch, Examples, Judged
from lamella.retrieval.exchange import Exchange, random_like
from lamella.retrieval.halving import halve, passes, plan_rungs
from lamella.statistics import Contrast, contrast, mean_intervals
from lamella.tuners.mole.composing import refuse_other_bases

BASE, RANDOM = "the base", "a random LoRA"  # the controls
_WANTED = 8  # LoRAs, where there are as many


@dataclass(frozen=True)
class Scored:
    """A LoRA, or a control, on the examples that did not choose it.

    Attributes:
        name: of the LoRA, "the base" or "a random LoRA".
        loss: the mean, in nats of a label or of a label's tokens.
        interval: its 95 % interval.
        gain: how much less it is than the base's, with interval; None for the base itself.
        accuracy: the share of examples whose likeliest class is the label; None where examples have no classes.
        helps: whether the gain is significant, Holm-corrected for all that were shortlisted.
    """

    name: str
    loss: float
    interval: tuple[float, float]
    gain: Contrast | None = None
    accuracy: float | None = None

    @property
    def helps(self) -> bool:
        """Whether its loss is below the base's, and significantly so."""
        return self.gain is not None and self.gain.significant and self.gain.interval.difference > 0


@dataclass(frozen=True)
class Shortlist:
    """The LoRAs of a library that have the smallest loss; `print` it.

    Attributes:
        library: those LoRAs, the best first, to be composed.
        scores: theirs, and those of the controls.
        cost: how many examples have run through the model.
        unused: LoRAs that were tried without their heads, which are of another size or for other labels than the
            model's, with the reason.
        assumed: LoRAs whose heads are taken as for the model's labels in their order, as the LoRA's card or the
            model's config names none.
        misfits: LoRAs that are not for the model, with the reason.
    """

    library: AdapterLibrary
    scores: tuple[Scored, ...]
    cost: int
    unused: dict[str, str]
    assumed: tuple[str, ...]
    misfits: dict[str, str]

    @property
    def names(self) -> tuple[str, ...]:
        """The LoRAs, the best first."""
        return self.library.names

    @property
    def sentence(self) -> str:
        """The answer in words."""
        helping = [one.name for one in self.scores if one.helps and one.name in self.names]
        if not helping:
            return "None of them beats the base on these examples."
        return f"{', '.join(helping)} {'beats' if len(helping) == 1 else 'beat'} the base on these examples."

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        rows = [
            {"name": one.name, "loss": one.loss, "interval": one.interval, "helps": one.helps,
             "gain": None if one.gain is None else asdict(one.gain.interval), "accuracy": one.accuracy}
            for one in self.scores
        ]  # fmt: skip
        return {
            "names": self.names, "scores": rows, "answer": self.sentence, "cost": self.cost,
            "unused_heads": self.unused, "assumed_heads": self.assumed, "misfits": self.misfits,
        }  # fmt: skip

    def __str__(self) -> str:
        width = max(len(one.name) for one in self.scores)
        accuracy = "accuracy  " if any(one.accuracy is not None for one in self.scores) else ""
        lines = [f"{'':<{width}}  {accuracy}loss  95 % interval   below the base by"]
        for one in self.scores:
            low, high = one.interval
            share = "" if one.accuracy is None else f"{one.accuracy:>8.3f}  "
            gain = "" if one.gain is None else f"   {one.gain.interval}"
            headless = "   no head for these labels" if one.name in self.unused else ""
            lines.append(f"{one.name:<{width}}  {share}{one.loss:.3f} [{low:.3f}, {high:.3f}]{gain}{headless}")
        notes = []
        if self.unused:
            each = "; ".join(f"{name}: {why}" for name, why in self.unused.items())
            notes.append(f"tried without their heads, which are not for these labels ({each})")
        if self.assumed:
            notes.append(
                "heads taken as in the same order as the task's labels, as no card of the LoRA, or no id2label of the "
                f"model, names them: {', '.join(self.assumed)}"
            )
        if self.misfits:
            name, reason = next(iter(self.misfits.items()))
            notes.append(f"{len(self.misfits)} LoRAs are not for this model, first {name}: {reason}")
        return "\n".join([*lines, self.sentence, *notes])


def shortlist(
    base: nn.Module,
    library: AdapterLibrary,
    examples: Iterable[Batch],
    k: int | None = None,
    say: Callable[[str], object] = lambda _: None,
    seed: int = 0,
) -> Shortlist:
    """Finds the k LoRAs of a library with the smallest loss on a task, by successive halving.

    Every second example chooses; the others, which chose nothing, say how good the chosen ones are, beside the base and
    a random LoRA of the best one's shapes and norms. LoRAs are exchanged in place.

    Args:
        base: the model that the LoRAs are for, with the head of the task. A LoRA's own head takes its place where it
            is for the same labels: by name, in whichever order, where the LoRA's card and the model's config
            (``id2label``) name them, else by number.
        library: the LoRAs; those that are not for the model are left out, and named.
        examples: batches with labels, rows in random order; a few dozen rows.
        k: how many are wanted; None for 8, or all that are for the model where they are fewer.
        say: told what it will cost before it begins.
        seed: of the random LoRA.

    Returns:
        The shortlist; its ``library`` can be composed.

    Raises:
        LamellaError: fewer LoRAs than k are for the model, fewer than 4 examples, or examples without labels.
    """
    refuse_other_bases(base)
    given = Examples(examples)
    if len(given) < 4:
        raise LamellaError(f"There are {len(given)} examples; give at least 4, of which half choose and half judge.")
    found = fit(base, library)
    names = [name for name in library.names if name not in found.misfits]
    k = min(_WANTED, max(len(names), 1)) if k is None else k
    if not 1 <= k <= len(names):
        raise LamellaError(
            f"k={k} LoRAs are wanted of {len(names)} that are for this model"
            f"{_why(found.misfits)}. Give a k from 1 to {len(names)}, or a larger library."
        )
    choosing, judging = range(0, len(given), 2), range(1, len(given), 2)
    rungs = plan_rungs(len(names), len(choosing), k)
    cost = passes(rungs) + (k + 2) * len(judging)
    steps = ", ".join(f"{rung.candidates} on {rung.examples}" for rung in rungs)
    say(f"{len(names)} LoRAs by {len(choosing)} examples ({steps}): {cost:,} examples run through the model")
    exchange = Exchange(base)
    unused: dict[str, str] = {}
    assumed: dict[str, None] = {}

    def losses(name: str, places: Iterable[int]) -> Tensor:
        rows = [choosing[place] for place in places]
        put(name)
        return measured(rows).losses

    def put(name: str) -> None:
        heads = exchange.put(library.read(name), library[name].labels)
        if heads.unused:
            unused[name] = next(iter(heads.unused.values()))
        elif heads.assumed:
            assumed[name] = None

    def measured(rows: Sequence[int]) -> Judged:
        found = given.judge(base, rows)
        work.reach(work.done + len(rows))
        return found

    modules = dict.fromkeys(module for names_of in found.modules.values() for module in names_of)
    with (
        working("choosing LoRAs", cost, "examples") as work,
        evaluating(base),
        exchange.installed(modules),
    ):
        best = halve(names, rungs, k, losses)
        rows = list(judging)
        judged: dict[str, Judged] = {}
        for name in best:
            put(name)
            judged[name] = measured(rows)
        exchange.put_factors(random_like(map_to(base, library.read(best[0])).modules, seed))
        judged[RANDOM] = measured(rows)
        exchange.clear()
        judged[BASE] = measured(rows)
    return Shortlist(library.only(best), _scored(judged), cost, unused, tuple(assumed), found.misfits)


def _scored(judged: dict[str, Judged]) -> tuple[Scored, ...]:
    by_name = {name: {0: one.losses.numpy()} for name, one in judged.items()}
    intervals = mean_intervals(by_name)
    gains = {one.second: one for one in contrast(by_name, [(BASE, name) for name in judged if name != BASE])}
    return tuple(
        Scored(
            name,
            float(one.losses.mean()),
            intervals[name],
            gains.get(name),
            None if one.right is None else float(one.right.mean()),
        )
        for name, one in judged.items()
    )


def _why(misfits: dict[str, str]) -> str:
    return f" (first misfit: {next(iter(misfits.values()))})" if misfits else ""
