"""How the forwards inside ``generate`` learn which ids were given.

Nothing in transformers tells a model's layers where the prompt ends, so ``generate`` itself is wrapped on the model.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lamella.routing.calls import TrackedModel
from lamella.routing.context import generating
from lamella.routing.prompt import Beginning, Generation

# What generate is asked for where its first forward holds guessed tokens after the prompt.
_DRAFTS = ("assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens", "use_mtp")


class PromptedGenerate:
    """A model's ``generate`` that says which ids it was given. Set on the model, so that every caller goes through it.

    What ``lamella.prompt`` says around it stands. Where nobody has said anything about compilation it is off:
    transformers compiles by itself for a static cache on a GPU, and what runs here is decided while it runs.
    """

    def __init__(self, model: nn.Module, tracker: TrackedModel) -> None:
        self.model, self.tracker = model, tracker
        self.before = model.__dict__.get("generate")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model's own ``generate``."""
        generate = self.before or type(self.model).generate.__get__(self.model)  # type: ignore[attr-defined]
        names = tuple(inspect.signature(type(self.model).generate).parameters)[1:]  # type: ignore[attr-defined]
        asked = Asked(self.model, self.tracker, {**dict(zip(names, args, strict=False)), **kwargs})
        if not asked.is_compilation_settled:
            kwargs = {**kwargs, "disable_compile": True}
        generation = asked.generation()
        for listener in self.tracker.listeners:
            kwargs = listener.asked(generation, asked, kwargs)
        with generating(generation):
            return generate(*args, **kwargs)


class Asked:
    """What a ``generate`` is asked for.

    Attributes:
        model: whose it is.
        tracker: of its calls.
        arguments: by name.
    """

    def __init__(self, model: nn.Module, tracker: TrackedModel, arguments: Mapping[str, Any]) -> None:
        self.model, self.tracker, self.arguments = model, tracker, arguments
        self.is_encoder_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        default = getattr(model, "generation_config", None)
        self._configs = [config for config in (arguments.get("generation_config"), default) if config is not None]

    def setting(self, name: str) -> Any:
        """What is asked for by an argument, by the configuration or by the model's own; None where by none."""
        values = (self.arguments.get(name), *(getattr(config, name, None) for config in self._configs))
        return next((value for value in values if value is not None), None)

    @property
    def is_compilation_settled(self) -> bool:
        """Whether somebody has said whether to compile, or it is no ``generate`` of transformers'."""
        is_foreign = getattr(self.model, "generation_config", None) is None
        return is_foreign or any(self.setting(name) is not None for name in ("disable_compile", "compile_config"))

    @property
    def given(self) -> Tensor | None:
        """What the decoder is given, ``(batch, tokens)`` or embeddings; None where it begins by itself."""
        names = ("decoder_inputs_embeds", "decoder_input_ids")
        return self._first(names if self.is_encoder_decoder else ("inputs_embeds", "inputs", "input_ids"))

    @property
    def mask(self) -> Tensor | None:
        """Which of the sequences' tokens so far are real, ``(batch, tokens)``, where it is told."""
        mask = self.arguments.get("decoder_attention_mask" if self.is_encoder_decoder else "attention_mask")
        return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None

    @property
    def real(self) -> Tensor:
        """The same where it is not told too; with a cache it counts the tokens in it."""
        mask, given = self.mask, self.given
        assert given is not None
        return torch.ones(given.shape[:2], dtype=torch.bool, device=given.device) if mask is None else mask.bool()

    def generation(self) -> Generation:
        """The prompts that are known before the first forward."""
        drafts = any(self.setting(name) is not None and self.setting(name) is not False for name in _DRAFTS)
        given, others = self.given, [self.arguments.get("negative_prompt_ids")]
        beginnings = [] if given is None else [Beginning(given, is_asked=True, drafts=drafts)]
        if given is None and (start := self._start_token()) is not None:
            beginnings.append(Beginning(torch.tensor([[start]]), drafts=drafts))
        if self.setting("guidance_scale") is not None and given is not None:
            others.append(given[:, -1:])
        for processor in self.arguments.get("logits_processor") or ():  # guidance that the caller has made himself
            others.append(getattr(processor, "unconditional_context", {}).get("input_ids"))
        beginnings += [Beginning(other) for other in others if isinstance(other, Tensor)]
        return Generation(beginnings, self._source() if self.is_encoder_decoder else None, drafts)

    def _start_token(self) -> int | None:
        """The one token with which transformers' own ``generate`` begins where nothing is given."""
        if "generate" in type(self.model).__dict__:  # a generate of the model's own, as Whisper's, gives more
            return None
        names = ("decoder_start_token_id", "bos_token_id") if self.is_encoder_decoder else ("bos_token_id",)
        start = next((self.setting(name) for name in names if self.setting(name) is not None), None)
        return start if isinstance(start, int) else None

    def _source(self) -> Tensor | None:
        """What the encoder is given."""
        main = getattr(self.model, "main_input_name", "input_ids")
        return self._first(("inputs_embeds", "inputs", "input_ids", main))

    def _first(self, names: tuple[str, ...]) -> Tensor | None:
        given = [self.arguments.get(name) for name in names]
        return next((one for one in given if isinstance(one, Tensor) and one.dim() > 1 and one.shape[1] > 0), None)


class AnnouncedBatching:
    """A model's way into continuous batching, which runs its forwards in another thread, where no error is raised."""

    def __init__(self, model: nn.Module, tracker: TrackedModel) -> None:
        self.model, self.tracker = model, tracker
        self.before = model.__dict__.get("init_continuous_batching")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Makes the manager, if nobody objects."""
        for listener in self.tracker.listeners:
            listener.batched(self.model)
        make = self.before or type(self.model).init_continuous_batching.__get__(self.model)  # type: ignore[attr-defined]
        return make(*args, **kwargs)


_WRAPPED: dict[str, type[PromptedGenerate] | type[AnnouncedBatching]] = {
    "generate": PromptedGenerate,
    "init_continuous_batching": AnnouncedBatching,
}


def wrap_generation(model: nn.Module, tracker: TrackedModel) -> None:
    """Lets a model's ways to generate, where it has any, say what they are given."""
    for name, wrapper in _WRAPPED.items():
        if hasattr(type(model), name):
            model.__dict__[name] = wrapper(model, tracker)


def unwrap_generation(model: nn.Module) -> None:
    """Takes that away again."""
    for name, wrapper in _WRAPPED.items():
        wrapped = model.__dict__.get(name)
        if isinstance(wrapped, wrapper):
            del model.__dict__[name]
            if wrapped.before is not None:
                model.__dict__[name] = wrapped.before
