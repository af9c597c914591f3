"""The settings of MoLEx."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import peft
from peft import LoraConfig

from lamella.errors import LamellaError
from lamella.tuners.config import LamellaConfig, check_lora, of_lora, refuse_missing, unknown_keys, wrote_before
from lamella.tuners.kinds import Bounds, Coefficient, Count, Index
from lamella.tuners.registry import LamellaType

# What belongs to the whole adapter, or would change the base model's own weights or number of blocks.
_NOT_INSIDE = ("task_type", "modules_to_save", "layer_replication", "trainable_token_indices", "loftq_config")
# What every PEFT writes of a LoRA that changes what it computes.
_OF_ANY_PEFT = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "target_modules")
_HARMLESS_INITS = (True, False, "gaussian", "orthogonal")


@dataclass
class MolexConfig(LamellaConfig):
    """Mixture of layer experts: each block mixes in another pretrained block of the model (arXiv 2503.11144).

    ``h' = B_t(h) + (1 - alpha) * s * (B_tau(h) - B_t(h))`` on the outputs of whole blocks, LoRA included.

    Args:
        alpha: weight of the block's own output. 1 is the base with its LoRA, and no guest runs.
        alpha_mode: "fixed", or "learned" as one logit that starts where ``alpha`` says.
        alpha_scope: "shared" by the blocks of a stack, or "per-layer".
        router: "linear" or "cosine".
        router_proj: features that the cosine router projects its input to first, as published; None for none.
        score: "softmax" over the candidates, or a "sigmoid" for each.
        router_scope: one router "shared" by the blocks of a stack, or one "per-layer".
        top_k: guests per decision; with two, the pair weighted by its renormalised scores takes the guest's place.
        granularity: what a decision is for: a "sequence", a "token", or the whole "batch" as published, where a
            prediction depends on the other sequences of its batch.
        aggregate: how tokens' scores become one decision: their "mean", or the "mode" of their own choices.
        candidates: "all" blocks of the same kind, those "later" in the stack, or a list of block indices. With
            ``guests_of``, "all" has the second model's blocks too, whose indices go on from the model's own.
        router_gradient: how the task loss reaches the router: "scale" (s = p / stopgrad(p)), "straight-through"
            (s = 1 + p - stopgrad(p)), or "none" as published, where the balance loss alone trains it.
        policy: who decides: the "learned" router, or a control without one: "random" (by a hash of what the sequence
            reads, its encoder's input included), "fixed" (``fixed_layer`` everywhere), "self" (no guest), "uniform"
            (the mean of all candidates).
        fixed_layer: the guest of policy "fixed"; ``lamella.tuners.molex.best_fixed_layer`` finds the best.
        prompt_tokens: on a decoder, how many first tokens decide where nothing tells the prompt (``lamella.prompt``).
        router_aux_loss_coef: coefficient of the balance loss, summed over blocks.
        guests_of: a second pretrained model, a folder or hub id, whose blocks are guests as well, frozen and behind an
            aligner (``lamella.tuners.molex.SecondModel``); None for the model's own blocks alone.
        guest_aligner: "linear", two matrices that are trained, one pair for all depths and all of the second model's
            blocks; ``lamella.tuners.molex.align_guests`` fits them on texts first. Or "identity", without parameters,
            for a second model of the same width and basis, such as a fine-tuned copy.
        guest_weights: "pretrained", or "random", drawn by ``seed``: a control for what the second model has learned.
        guests_sha256: of the second model's weights; filled in, and another model is refused.
        lora: the LoRA inside the blocks, with PEFT's own settings; None for none. The second model's have none.
        guest_dtype: "bfloat16" computes guests under autocast to it, on a CPU all but their attention; None or
            "float32" as the block itself.
        recompute_guest: guests are recomputed in the backward pass instead of kept.
        seed: of the policy "random", and of random ``guest_weights``.
        target_modules: not a setting of MoLEx, which takes whole blocks; the linear modules are ``lora``'s.

    Raises:
        LamellaError: a value out of range, an unknown key, or values that contradict each other.
    """

    target_modules: list[str] | set[str] | str | None = None
    init_lora_weights: bool = True
    alpha: Annotated[float, Bounds(0, most=1)] = 0.95
    alpha_mode: Literal["fixed", "learned"] = "fixed"
    alpha_scope: Literal["shared", "per-layer"] = "shared"
    router: Literal["linear", "cosine"] = "linear"
    router_proj: Count | None = None
    score: Literal["softmax", "sigmoid"] = "softmax"
    router_scope: Literal["shared", "per-layer"] = "shared"
    top_k: Count = 1
    granularity: Literal["sequence", "batch", "token"] = "sequence"
    aggregate: Literal["mean", "mode"] = "mean"
    candidates: Literal["all", "later"] | list[Index] = "all"
    router_gradient: Literal["scale", "straight-through", "none"] = "scale"
    policy: Literal["learned", "random", "fixed", "self", "uniform"] = "learned"
    fixed_layer: Index | None = None
    prompt_tokens: Count = 4
    router_aux_loss_coef: Coefficient = 1e-3
    guests_of: str | None = None
    guest_aligner: Literal["linear", "identity"] = "linear"
    guest_weights: Literal["pretrained", "random"] = "pretrained"
    guests_sha256: str | None = None
    lora: LoraConfig | None = field(default_factory=LoraConfig)
    guest_dtype: Literal["float32", "bfloat16"] | None = None
    recompute_guest: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.lora, Mapping):
            self.lora = _lora_from(self.lora)
        super().__post_init__()
        self.peft_type = LamellaType.MOLEX
        self._check_together()
        self._check_lora()

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON knows it, with the LoRA inside as a dictionary of its own."""
        values = super().to_dict()
        if self.lora is not None:
            lora = self.lora.to_dict()
            values["lora"] = {key: sorted(v) if isinstance(v, set) else v for key, v in lora.items()}
        return values

    @classmethod
    def read_saved(cls, values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        """As every method's; nothing of the LoRA inside may be missing either."""
        read = super().read_saved(values, folder)
        if isinstance(lora := read.get("lora"), Mapping):
            # another PEFT may know settings that this one does not, or the other way round
            always = set(LoraConfig().to_dict()) if lora.get("peft_version") == peft.__version__ else set(_OF_ANY_PEFT)
            refuse_missing({f"lora.{key}" for key in always - set(lora)}, "PEFT", folder)
        return read

    @property
    def mixes(self) -> bool:
        """Whether any guest can change an output."""
        return self.policy != "self" and not (self.alpha_mode == "fixed" and self.alpha == 1)

    @property
    def trains_router(self) -> bool:
        """Whether any loss reaches a router."""
        return (
            self.mixes
            and self.policy == "learned"
            and (self.router_gradient != "none" or self.router_aux_loss_coef > 0)
        )

    def _check_together(self) -> None:
        if isinstance(self.candidates, list):
            unlike = len(set(self.candidates)) == len(self.candidates) > 0
            self.check("candidates", unlike, "at least one block, each once, by its index counted from 0")
        if self.target_modules is not None:
            raise LamellaError(
                f"target_modules={self.target_modules!r} is not a setting of MoLEx, which takes whole blocks. Name the "
                "linear modules in lora=LoraConfig(target_modules=...), and the blocks in layers_to_transform."
            )
        if self.alpha_mode == "learned" and self.alpha in (0, 1):
            raise LamellaError(
                f"alpha={self.alpha} cannot be where a learned alpha starts: its logit would be infinite and get no "
                "gradient. Start strictly between 0 and 1, such as 0.95, or use alpha_mode='fixed'."
            )
        if isinstance(self.candidates, list) and self.policy == "learned" and self.top_k > len(self.candidates):
            raise LamellaError(
                f"top_k={self.top_k} guests cannot be chosen among the {len(self.candidates)} of "
                f"candidates={self.candidates!r}; name more candidates, or lower top_k."
            )
        if self.fixed_layer is not None and self.policy != "fixed":
            raise LamellaError(f"fixed_layer={self.fixed_layer} has no effect with policy={self.policy!r}; drop it.")
        self._check_guests_of()
        if self.router_proj is not None and self.router != "cosine":
            raise LamellaError(f"router_proj={self.router_proj} belongs to router='cosine', not {self.router!r}.")

    def _check_guests_of(self) -> None:
        if self.guests_of is None:
            told = ("guests_sha256", "guest_aligner", "guest_weights")
            idle = next((name for name in told if getattr(self, name) not in (None, "linear", "pretrained")), None)
            if idle is not None:
                raise LamellaError(f"{idle}={getattr(self, idle)!r} is of a second model; give guests_of, or drop it.")
        elif self.candidates == "later":
            raise LamellaError(
                f"candidates='later' has no meaning for the blocks of another model, {self.guests_of!r}. Use 'all', or "
                "list indices; the second model's go on from the model's own."
            )

    def _check_lora(self) -> None:
        if self.lora is None:
            return
        if type(self.lora) is not LoraConfig:
            raise LamellaError(f"lora must be a peft.LoraConfig or None, not a {type(self.lora).__name__}.")
        check_lora(self.lora)
        outside = [name for name in _NOT_INSIDE if getattr(self.lora, name, None)]
        if outside:
            raise LamellaError(
                f"lora sets {', '.join(outside)}, which does not work inside MoLEx; task_type and modules_to_save "
                "belong to MolexConfig itself."
            )
        for name, alpha in {"lora_alpha": self.lora.lora_alpha, **of_lora(self.lora, "alpha_pattern")}.items():
            if alpha == 0 and not wrote_before(self, "0.2"):
                raise LamellaError(
                    f"lora has {name}=0, and all that it adds there is multiplied by that. Leave such modules out of "
                    "its target_modules; without any, use lora=None."
                )
        if self.lora.bias != "none":
            raise LamellaError(
                f"lora has bias={self.lora.bias!r}, which would train the base model's biases and not save them with "
                "the blocks; MoLEx needs bias='none'."
            )
        if self.lora.init_lora_weights not in _HARMLESS_INITS:
            raise LamellaError(
                f"lora has init_lora_weights={self.lora.init_lora_weights!r}, which changes the base model's weights, "
                f"so that MoLEx would not start from the pretrained blocks; use one of {list(_HARMLESS_INITS)}."
            )


def _lora_from(values: Mapping[str, Any]) -> LoraConfig:
    known = {f.name for f in fields(LoraConfig)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise LamellaError(unknown_keys("lora", unknown, known, values))
    try:
        return LoraConfig(**values)
    except Exception as error:  # its own code meets values of any type
        raise LamellaError(f"lora cannot be a peft.LoraConfig: {error}") from error
