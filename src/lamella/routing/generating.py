"""How the forwards inside ``generate`` learn which ids were given.

Nothing in transformers tells a model's layers where the prompt ends, so ``generate`` itself is wrapped on the model.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lamella.routing.context import current_context, prompted
from lamella.routing.prompt import Prompt


class PromptedGenerate:
    """A model's ``generate`` that says which ids it was given. Set on the model, so that every caller goes through it.

    What ``lamella.prompt`` says around it stands. Where nobody has said anything about compilation it is off:
    transformers compiles by itself for a static cache on a GPU, and what runs here is decided while it runs.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.before = model.__dict__.get("generate")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model's own ``generate``."""
        generate = self.before or type(self.model).generate.__get__(self.model)  # type: ignore[attr-defined]
        if not self._compilation_is_settled(args, kwargs):
            kwargs = {**kwargs, "disable_compile": True}
        with prompted(self._known(args, kwargs)):
            return generate(*args, **kwargs)

    def _known(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Prompt:
        said = current_context().prompt
        named = (kwargs.get("inputs_embeds"), *args[:1], *(kwargs.get(n) for n in ("inputs", "input_ids")))
        given = [tensor for tensor in named if isinstance(tensor, Tensor) and tensor.dim() > 1 and tensor.shape[1] > 0]
        if getattr(getattr(self.model, "config", None), "is_encoder_decoder", False):
            # The ids given are the encoder's; what the decoder starts from, its first forward shows.
            given += [tensor for tensor in (kwargs.get("pixel_values"),) if isinstance(tensor, Tensor)]
            return replace(said or Prompt(), source=next(iter(given), None))
        return said or Prompt(width=int(given[0].shape[1]) if given else None)

    def _compilation_is_settled(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        default = getattr(self.model, "generation_config", None)
        if default is None:
            return True  # no generate of transformers'
        configs = (default, kwargs.get("generation_config"), *args[1:2])
        names = ("disable_compile", "compile_config")
        return any(kwargs.get(n) is not None or any(getattr(c, n, None) is not None for c in configs) for n in names)


def set_prompted_generate(model: nn.Module) -> None:
    """Lets a model's ``generate``, where it has one, say which ids it was given."""
    if hasattr(type(model), "generate"):
        model.__dict__["generate"] = PromptedGenerate(model)


def unset_prompted_generate(model: nn.Module) -> None:
    """Takes that away again."""
    generate = model.__dict__.get("generate")
    if isinstance(generate, PromptedGenerate):
        del model.__dict__["generate"]
        if generate.before is not None:
            model.__dict__["generate"] = generate.before
