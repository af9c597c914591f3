"""A pipeline with LoRAs composed in it: weights given from outside, what trains, its file, and the way back."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lamella.errors import LamellaError
from lamella.files import atomic
from lamella.routing import untrack_calls
from lamella.tuners.mole.config import MoleConfig
from lamella.tuners.mole.group import Group
from lamella.tuners.mole.layer import MoleLinear
from lamella.tuners.mole.model import numbered
from lamella.tuners.mole.overrides import Weights, fixed_weights, masked_experts

ROUTERS = "routers.safetensors"
CONFIG = "adapter_config.json"


@dataclass(frozen=True, eq=False)
class Component:
    """One composed model of a pipeline.

    Attributes:
        model: with the routers inside.
        layers: its composed modules by name.
        groups: what decides.
        trained: the parameters that wanted a gradient before.
    """

    model: nn.Module
    layers: dict[str, MoleLinear]
    groups: tuple[Group, ...]
    trained: tuple[nn.Parameter, ...]


class PipelineComposition:
    """A pipeline with LoRAs composed in it, which is called as before; made by ``lamella.compose_pipeline``.

    Each model of the pipeline has mixing weights, and so a balance loss, of its own. A router decides for each sample,
    by the mean over its tokens, or for each place of it and each word (``router_input="token"``): with classifier-free
    guidance, once for the row with the prompt and once for the one without.

    Attributes:
        pipe: the pipeline.
        config: the settings, with references to the LoRAs.
        names: the K LoRAs, in the order of the routers' logits.
        components: the composed models by their names in the pipeline.
        skipped: what of the LoRAs is left out, and why.
    """

    def __init__(
        self,
        pipe: Any,
        config: MoleConfig,
        names: tuple[str, ...],
        components: dict[str, Component],
        skipped: Sequence[tuple[str, str]],
    ) -> None:
        self.pipe = pipe
        self.config = config
        self.names = names
        self.components = components
        self.skipped = tuple(skipped)
        for target in self._targets():
            if hasattr(target, "save_pretrained"):
                target.save_pretrained = _refuse_to_save

    def routers(self) -> dict[str, nn.Module]:
        """The routers by component and group."""
        return {
            f"{component}.{group.name}": group.router
            for component, part in self.components.items()
            for group in part.groups
        }

    def parameters(self) -> list[nn.Parameter]:
        """All that trains: the routers and their temperatures."""
        return [parameter for router in self.routers().values() for parameter in router.parameters()]

    def train(self, mode: bool = True) -> None:
        """Sets the composed models to train, where routers pay for uneven weights, or back."""
        for part in self.components.values():
            part.model.train(mode)

    @contextmanager
    def masked_experts(self, drop: Sequence[str]) -> Iterator[None]:
        """``lamella.masked_experts`` for all models of the pipeline at once."""
        with ExitStack() as stack:
            for part in self.components.values():
                stack.enter_context(masked_experts(part.model, drop))
            yield

    @contextmanager
    def fixed_weights(self, weights: Weights) -> Iterator[None]:
        """``lamella.fixed_weights`` for all models of the pipeline at once; several sets are one per image."""
        with ExitStack() as stack:
            for part in self.components.values():
                stack.enter_context(fixed_weights(part.model, weights))
            yield

    def save(self, folder: Path | str) -> Path:
        """Writes ``routers.safetensors`` and ``adapter_config.json``, which refers to the LoRAs where they lie.

        Returns:
            The folder.
        """
        folder = Path(folder)
        with atomic(folder / ROUTERS) as unfinished:
            save_file({name: parameter.detach().contiguous() for name, parameter in self._named().items()}, unfinished)
        self.config.save_pretrained(str(folder))  # last: a folder without it is not a composition
        return folder

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Gives the routers the values of a saved composition.

        Raises:
            LamellaError: tensors that are missing, left over or of other shapes. Nothing is changed then.
        """
        expected = self._named()
        unfit = sorted(set(expected) ^ set(tensors)) or [
            name for name, parameter in expected.items() if parameter.shape != tensors[name].shape
        ]
        if unfit:
            raise LamellaError(
                f"The saved routers do not fit this pipeline: {len(unfit)} tensors are missing, left over or of "
                f"another shape, first {unfit[0]}. Load them into the kind of pipeline that they were trained in."
            )
        for name, parameter in expected.items():
            parameter.data.copy_(tensors[name])

    def _named(self) -> dict[str, nn.Parameter]:
        """The routers' parameters by component, the module that holds the router, and name."""
        return {
            f"{component}.{group.owner.name}.{name}": parameter
            for component, part in self.components.items()
            for group in part.groups
            for name, parameter in group.router.named_parameters()
        }

    def unload(self) -> None:
        """Takes the composition out: the pipeline is as it was before, bit for bit."""
        for part in self.components.values():
            for name, layer in part.layers.items():
                part.model.set_submodule(name, layer.get_base_layer())
            untrack_calls(part.model)
            for parameter in part.trained:
                parameter.requires_grad_(True)
        for target in self._targets():
            vars(target).pop("save_pretrained", None)
        self.components = {}

    def _targets(self) -> tuple[Any, ...]:
        """What diffusers would save with the names of the layers that the composition has put in place."""
        return self.pipe, *(part.model for part in self.components.values())

    def __str__(self) -> str:
        count = sum(parameter.numel() for parameter in self.parameters())
        lines = [f"MOLE of {len(self.names)} LoRAs: {count:,} trainable parameters", f"  {numbered(self.names)}"]
        for name, part in self.components.items():
            alone = [group.name for group in part.groups if not group.place.stack]
            lines.append(f"  {name}: {len(part.layers)} modules, {len(part.groups)} routers")
            if alone:
                lines.append(f"    outside its blocks: {', '.join(alone)}")
            blind = [group.name for group in part.groups if not group.inputs]
            if blind:
                lines.append(f"    {len(blind)} routers read nothing, first {blind[0]}")
        lines += [f"  skipped {name}: {reason}" for name, reason in self.skipped]
        return "\n".join(lines)


def _refuse_to_save(*_: Any, **__: Any) -> None:
    """In the place of diffusers' own way to save."""
    raise LamellaError(
        "save_pretrained would write a composed pipeline under names that no pipeline has. Write the composition with "
        "composition.save(folder), or call composition.unload() first to save the pipeline without it."
    )


def read_routers(folder: Path) -> dict[str, Tensor]:
    """The routers' tensors of a saved composition, for `PipelineComposition.fill`.

    Raises:
        LamellaError: the folder is not a saved composition, or its file is damaged.
    """
    for name in (CONFIG, ROUTERS):
        if not (folder / name).is_file():
            raise LamellaError(f"{folder} has no {name}, so it is not a saved composition of a pipeline.")
    try:
        with safe_open(folder / ROUTERS, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise LamellaError(f"{folder / ROUTERS} is not a safetensors file or is cut short ({error}).") from error
