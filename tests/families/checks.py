"""What is asked of a method on a family, and how the answer is found: the base is asked first, by the same function.

A *probe* runs a model and returns by how much two outputs that should be equal differ, as a share of the largest
output. What the base itself does not keep is not asked of a method.
"""

import copy
import inspect
import math
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.families.models import FIRST_WORD, VOCAB, Family, batch, tiny_model
from torch import Tensor, nn

import lamella
from lamella import MolaConfig, MoleConfig, MolexConfig
from lamella.errors import LamellaError

TOLERANCE = 1e-4  # of the largest output: float32 differs by 1e-6, another decision by more than 1e-2
CHECKS = ("start", "backward", "saved", "generation", "padding", "batch-mates", "causality", "checkpointing")
PROMPT = 3  # words before the first label
METHODS = ("LoRA", "MoLA", "MoLEx", "MOLE")
Probe = Callable[[nn.Module], float]


@dataclass(frozen=True)
class Answer:
    """What a check found.

    Attributes:
        said: "yes", "no" (refused by name), "not asked" (the base does not keep it), or "fault": a difference or a raw
            error, which nobody should see.
        reason: why not yes.
        difference: the largest one found, where outputs were compared.
    """

    said: str
    reason: str = ""
    difference: float | None = None


class FindingError(AssertionError):
    """A check that failed by what it found, not by an error."""


class LackingError(Exception):
    """What a check would need of the base, and the base does not have."""


def examine(
    family: Family, methods: Sequence[str] = METHODS, checks: Sequence[str] = CHECKS
) -> dict[str, dict[str, dict[str, Any]]]:
    """The answer to each check, of PEFT's LoRA and each method, by method and check."""
    base = tiny_model(family)
    probes = {name: list(_kept(family, base, named)) for name, named in _probes(family, base).items() if name in checks}
    with tempfile.TemporaryDirectory() as folder:
        rows = {method: _examine(family, base, method, checks, probes, Path(folder)) for method in methods}
    return {method: {check: asdict(answer) for check, answer in answers.items()} for method, answers in rows.items()}


def _examine(
    family: Family,
    base: nn.Module,
    method: str,
    checks: Sequence[str],
    probes: dict[str, list[tuple[Probe, str]]],
    folder: Path,
) -> dict[str, Answer]:
    asked: dict[str, Callable[[PeftModel], float]] = {
        "start": lambda _: _start(family, base, method, folder),
        "backward": lambda _: _backward(family, _adapted(family, base, method, folder, train=True)),
        "saved": lambda model: _saved(family, base, model, folder / f"saved-{method}"),
    }
    model: PeftModel | None = None
    answers = {}
    for check in checks:
        kept = [probe for probe, why_not in probes.get(check, ()) if not why_not]
        if check not in asked and not kept:
            answers[check] = Answer("not asked", "; ".join(dict.fromkeys(why for _, why in probes[check])))
            continue

        def ask(check: str = check, kept: Sequence[Probe] = kept) -> float:
            nonlocal model
            model = model or _adapted(family, base, method, folder)
            return asked[check](model) if check in asked else max(probe(model) for probe in kept)

        answers[check] = _answer(ask, is_lora=method == "LoRA")
        if answers[check].said != "yes":
            model = None  # what failed may have left something behind
    return answers


def _answer(ask: Callable[[], float], is_lora: bool) -> Answer:
    try:
        difference = ask()
    except LamellaError as error:
        return Answer("no", " ".join(str(error).split()))
    except FindingError as found:
        return Answer("no" if is_lora else "fault", str(found))
    except Exception as error:  # whatever it is, it is not a LamellaError
        return Answer("no" if is_lora else "fault", _raw(error))
    if difference <= TOLERANCE:
        return Answer("yes", "", difference)
    return Answer("no" if is_lora else "fault", f"differs by {difference:.2g}", difference)


def _kept(family: Family, base: nn.Module, probes: list[tuple[str, Probe]]) -> Iterator[tuple[Probe, str]]:
    """Each probe, and why it is not asked; empty where the base keeps it."""
    for name, probe in probes:
        try:
            moved = probe(copy.deepcopy(base))
        except LackingError as error:
            yield probe, str(error)
            continue
        except Exception as error:
            yield probe, f"{name}: the base itself raises {_raw(error)}"
            continue
        why_not = "" if moved <= TOLERANCE else f"{name}: the base itself moves by {moved:.2g}"
        yield probe, why_not


def _raw(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


# Methods.


def _adapted(
    family: Family, base: nn.Module, method: str, folder: Path, train: bool = False, **config: Any
) -> PeftModel:
    """A copy of the base with an adapter that does something."""
    torch.manual_seed(17)
    base = copy.deepcopy(base)
    settings: dict[str, Any] = {"init_lora_weights": False, **config}
    if method != "LoRA":
        settings["router_aux_loss_coef"] = 1e-2 if train else 0.0
    if method == "LoRA":
        return get_peft_model(base, _lora(family, **settings)).eval()
    if method == "MoLA":
        more = {"r": 2, "lora_alpha": 4, "num_experts": 3, "top_k": 2, "exclude_modules": family.not_lora}
        return get_peft_model(base, MolaConfig(**more, **settings)).eval()
    if method == "MoLEx":
        model = get_peft_model(base, MolexConfig(**{"alpha": 0.5, "lora": _lora(family)} | settings)).eval()
        _sharpen(model)
        return model
    return lamella.compose(base, _trained_loras(family, base, folder), MoleConfig(**settings)).eval()


def _lora(family: Family, **settings: Any) -> LoraConfig:
    modules = {"target_modules": "all-linear", "exclude_modules": family.not_lora}
    return LoraConfig(**{"r": 2, "lora_alpha": 4, "init_lora_weights": False, **modules} | settings)


def _sharpen(model: nn.Module) -> None:
    """Routers of MoLEx that choose different blocks for different inputs."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "molex_router" in name and name.endswith("weight"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


def _trained_loras(family: Family, base: nn.Module, folder: Path) -> dict[str, Path]:
    """Two LoRAs as PEFT saves them, as if trained, in all linear modules (PEFT adds fused experts to "all-linear")."""
    paths = {name: folder / name for name in ("a", "b")}
    if not folder.joinpath("b").exists():
        linear = get_peft_model(copy.deepcopy(base), _lora(family)).base_model.targeted_module_names
        for seed, path in enumerate(paths.values()):
            torch.manual_seed(seed)
            get_peft_model(copy.deepcopy(base), _lora(family, target_modules=linear)).save_pretrained(
                path, save_embedding_layers=False
            )
    return paths


# Checks that need more than one adapted model.


def _start(family: Family, base: nn.Module, method: str, folder: Path) -> float:
    """A fresh adapter is the base, and one that is not fresh is not."""
    given = batch(family)
    plain, moved = run(base, given), _adapted(family, base, method, folder)
    if method == "MOLE":
        one = PeftModel.from_pretrained(copy.deepcopy(base), _trained_loras(family, base, folder)["a"]).eval()
        with lamella.fixed_weights(moved, {"a": 1.0}):
            difference = apart(run(moved, given), run(one, given))
        with lamella.fixed_weights(moved, {"a": 0.0}):
            difference = max(difference, apart(run(moved, given), plain))
    else:
        fresh = {"alpha": 1.0, "lora": None} if method == "MoLEx" else {}
        difference = apart(run(_adapted(family, base, method, folder, init_lora_weights=True, **fresh), given), plain)
        if method == "MoLEx":
            moved = _adapted(family, base, method, folder, lora=None)
    if apart(run(moved, given), plain) <= 10 * TOLERANCE:
        raise FindingError("the adapter has no effect, and nothing says so")
    return difference


def _backward(family: Family, model: PeftModel) -> float:
    """Every trainable parameter gets a finite gradient that is not zero, wherever its module's own weights get one."""
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    model.requires_grad_(True)  # the base's weights show which modules the loss depends on
    ran: set[nn.Module] = set()
    for module in model.modules():
        module.register_forward_pre_hook(lambda module, _: ran.add(module))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        loss_of(model.train(), labelled(family)).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    bad = sorted(name for name in trainable & gradients.keys() if not bool(torch.isfinite(gradients[name]).all()))
    if bad:
        raise FindingError(f"gradient not finite: {bad[0]}, one of {len(bad)}")
    moved = {name for name, gradient in gradients.items() if bool(gradient.any())}
    alive = {name for name in trainable if _is_used(model, _module_of(name), moved - trainable, ran)}
    still = sorted(alive - moved)
    told = [str(one.message) for one in said if "is not trained" in str(one.message)]
    unsaid = [name for name in still if not any(_module_of(name).rpartition(".")[2] in one for one in told)]
    if still and not unsaid:
        raise LamellaError(told[0])
    if still:
        raise FindingError(f"no gradient: {still[0]}, one of {len(still)} of {len(trainable)}")
    if not alive:
        raise FindingError("nothing that trains has an effect")
    return 0.0


def _module_of(parameter: str) -> str:
    """The dotted name of the module that an adapter's parameter belongs to."""
    return re.split(r"\.(?:lamella_|lora_)", parameter)[0]


def _is_used(model: nn.Module, name: str, moved: set[str], ran: set[nn.Module]) -> bool:
    """Whether the loss depends on a module by weights of its own.

    A weight that several modules share (Zamba2's blocks) speaks for those that ran; one of a module that did not run
    and shares it with nobody was read without calling the module.
    """
    module = model.get_submodule(name)
    weights = {p for other, p in model.named_parameters(remove_duplicate=False) if other in moved}
    own = weights & set(module.parameters())
    sharing = [other for other in model.modules() if other in ran and own & set(other._parameters.values())]
    return bool(own) and (module in ran or not sharing)


def _saved(family: Family, base: nn.Module, model: PeftModel, folder: Path) -> float:
    given = batch(family)
    model.save_pretrained(folder, save_embedding_layers=False)  # PEFT looks for some in models that have none
    again = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    before, after = model.state_dict(), again.state_dict()
    unlike = sorted(before.keys() ^ after.keys()) or [name for name in before if not before[name].equal(after[name])]
    if unlike:
        raise FindingError(f"{unlike[0]} is another in the loaded model, one of {len(unlike)}")
    return apart(run(again, given), run(model, given))


# Probes of one model.


def _probes(family: Family, base: nn.Module) -> dict[str, list[tuple[str, Probe]]]:
    has_positions = "position_ids" in inspect.signature(base.forward).parameters
    padding = [
        (f"{side} padding{' with positions' if positions else ''}", partial(_padding, family, side, positions))
        for side in ("right", "left")
        for positions in ((True, False) if has_positions else (False,))
    ]
    causality = [
        (f"what follows token {at}{', with labels' if labels else ''}", partial(_causality, family, at, labels))
        for at, labels in ((2, False), (5, False), (PROMPT, True), (5, True))
    ]
    return {
        "generation": [
            (f"generation, {name}", partial(_generation, family, lengths))
            for name, lengths in (("equal lengths", (6, 6)), ("padded", (6, 3)))
        ],
        "padding": padding,
        "batch-mates": [("batch-mates", partial(_mates, family))],
        "causality": causality,
        "checkpointing": [("gradient checkpointing", partial(_checkpointing, family))],
    }


def _padding(family: Family, side: str, positions: bool, model: nn.Module) -> float:
    """Shorter sequences in a padded batch are what they are alone."""
    lengths = (7, 4, 6)
    together = run(model, batch(family, lengths, side, positions=positions))
    difference = 0.0
    for row, length in enumerate(lengths):
        alone = run(model, batch(family, (length,), first=row, positions=positions))[0]
        same = together[row]
        if alone.dim() > 1:
            same = same[: len(alone)] if side == "right" else same[-len(alone) :]
        difference = max(difference, apart(same, alone))
    return difference


def _mates(family: Family, model: nn.Module) -> float:
    together = run(model, batch(family))
    alone = [run(model, batch(family, (7,), first=row)) for row in range(len(together))]
    return apart(together, torch.cat(alone))


def _causality(family: Family, at: int, with_labels: bool, model: nn.Module) -> float:
    """Outputs before a token are the same whatever stands there and after it."""
    given = labelled(family) if with_labels else batch(family)
    name = "input_ids" if not family.has_own_decoder else "labels" if with_labels else "decoder_input_ids"
    if name not in given:
        raise LackingError("there are no tokens to follow")
    before = run(model, given)
    if before.dim() != 3 or before.shape[1] != given[name].shape[1]:
        raise LackingError("its output is not one for each token")
    start = at + (family.images or 0) * (name == "input_ids")
    other = {key: value.clone() for key, value in given.items()}
    for key in {name, "labels"} & set(given):
        later = other[key][:, start:]  # a view
        later[later >= FIRST_WORD] = (later[later >= FIRST_WORD] + 5 - FIRST_WORD) % (VOCAB - FIRST_WORD) + FIRST_WORD
    return apart(before[:, :start], run(model, other)[:, :start])


def _generation(family: Family, lengths: tuple[int, ...], model: nn.Module) -> float:
    """The logits of greedy generation with the model's cache are those without."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if not getattr(inner, "can_generate", lambda: False)():
        raise LackingError("it does not generate")
    given = batch(family, lengths, "left")
    given.pop("decoder_input_ids", None)
    config = inner.generation_config
    config.eos_token_id = config.forced_eos_token_id = config.forced_bos_token_id = None
    config.pad_token_id = 0
    by_cache = [
        torch.stack(
            model.generate(
                **given, max_new_tokens=5, min_new_tokens=5, do_sample=False, num_beams=1, use_cache=use_cache,
                output_logits=True, return_dict_in_generate=True,
                suppress_tokens=list(range(FIRST_WORD)),
            ).logits
        )
        for use_cache in (True, False)
    ]  # fmt: skip
    return apart(*by_cache)


def _checkpointing(family: Family, model: nn.Module) -> float:
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if not inner.supports_gradient_checkpointing:
        raise LackingError("it does not support gradient checkpointing")
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.requires_grad_(False)  # as beside an adapter: transformers then makes its output require a gradient
    given = labelled(family)
    plain = _gradients(model.train(), given)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    checkpointed = _gradients(model, given)
    if plain.keys() != checkpointed.keys():
        missing = sorted(plain.keys() ^ checkpointed.keys())
        raise FindingError(f"{len(missing)} gradients are there only once, first {missing[0]}")
    largest = max(float(gradient.abs().max()) for gradient in plain.values())
    return max(apart(checkpointed[name], gradient, largest) for name, gradient in plain.items())


def _gradients(model: nn.Module, given: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss_of(model, given).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# What goes in and what comes out.


def run(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    """The model's answer, ``(batch, tokens, features)`` or ``(batch, features)``."""
    with torch.no_grad():
        outputs = model.eval()(**given)
    return _answer_of(outputs)


def _answer_of(outputs: Any) -> Tensor:
    if getattr(outputs, "text_embeds", None) is not None and getattr(outputs, "image_embeds", None) is not None:
        return torch.cat([outputs.text_embeds, outputs.image_embeds], dim=-1)
    for name in ("logits", "prediction_logits", "last_hidden_state"):
        if isinstance(answer := getattr(outputs, name, None), Tensor):
            return answer
    raise ValueError(f"{type(outputs).__name__} has no logits and no hidden states")


def loss_of(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    outputs = model(**given)
    loss = getattr(outputs, "loss", None)
    return _answer_of(outputs).float().square().mean() if loss is None else loss


def labelled(family: Family) -> dict[str, Tensor]:
    """A batch with labels, where the head has any: words after a prompt, what the decoder says, or classes."""
    given = batch(family)
    if family.has_own_decoder:
        given["labels"] = given.pop("decoder_input_ids")
        return given
    if "Classification" in family.head:
        return {**given, "labels": torch.arange(3) % 2}
    if family.head == "ForCTC":
        return {**given, "labels": torch.tensor([[9, 10], [11, 12], [13, 14]])}
    if family.head in ("ForCausalLM", "ForImageTextToText", "ForMaskedLM"):
        labels = given["input_ids"].clone()
        labels[:, : (family.images or 0) + PROMPT] = -100
        return {**given, "labels": labels}
    return given


def apart(one: Tensor, other: Tensor, scale: float | None = None) -> float:
    """The largest difference as a share of the largest value; infinite where one is not a number."""
    if one.shape != other.shape:
        raise FindingError(f"shapes {tuple(one.shape)} and {tuple(other.shape)}")
    if not one.numel():
        return 0.0
    scale = float(other.abs().max()) if scale is None else scale
    difference = float((one.float() - other.float()).abs().max())
    return difference / max(scale, 1e-12) if math.isfinite(difference) else math.inf
