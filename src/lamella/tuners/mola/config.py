"""The settings of MoLA."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from lamella.errors import LamellaError
from lamella.tuners.config import LamellaConfig, wrote_before
from lamella.tuners.kinds import MOST, Alpha, Bounds, Coefficient, Count, Share
from lamella.tuners.mola.allocation import AUTO, SHAPES, allocate
from lamella.tuners.registry import LamellaType


@dataclass
class MolaConfig(LamellaConfig):
    """Mixture of LoRA experts with a different number of experts in each layer (arXiv 2402.08562).

    Each adapted linear module has its own router and its layer's number of LoRA experts; each token uses the top-k.

    Args:
        r: rank of each expert.
        lora_alpha: each expert is scaled by ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with ``use_rslora``, as in
            PEFT's LoRA. It is all that scales an expert: for a scaling s at any rank, write ``lora_alpha=s * r``.
            GOAT (arXiv 2502.16894) derives s = sqrt(3 n / r) for a module with n inputs: ``sqrt(3 * n * r)``.
        lora_dropout: dropout on the experts' input, one mask per module; the router reads the input before it.
        expert_dropout: in training, each of a token's chosen experts is left out with this probability, and the others
            count by as much more as keeps the mean (dropout of the mixing weights). Not where there is one expert.
        use_rslora: rank-stabilised scaling.
        share_lora_a: the experts of a module share one A and differ in B alone (HydraLoRA, arXiv 2404.19245).
        fan_in_fan_out: kept for PEFT's sake: GPT-2's Conv1D is recognised, and the delta acts on activations.
        num_experts: an int; a list with one entry per block of the stack; groups such as "2-4-6-8"; or "rectangle",
            "triangle" (8-6-4-2), "inverted-triangle" (2-4-6-8), "hourglass" (8-2-2-8), "diamond" (2-8-8-2); or "auto":
            ``expert_budget`` is shared out by the tails of the base's weights (AlphaLoRA, arXiv 2410.10054), and the
            adapter's config has the list that was found. ``lamella allocate --from`` knows other criteria.
        expert_budget: mean experts per layer that a shape is scaled to, or that "auto" shares out.
        top_k: experts per token, an int or a list with one entry per block. Above an explicit number of experts it is
            an error; in a shape scaled by ``expert_budget`` such a layer uses all it has. With 1 the expert's weight is
            1, and the router learns by the gradient of its probability (``p / stopgrad(p)``).
        router: "linear" or "cosine".
        mixing_weights: of the k chosen experts: "softmax" of their logits, or "equal", 1/k each, as in ReMix (arXiv
            2603.10160), whose router learns by reinforcement. Here it learns by the gradient of its probabilities.
        router_aux_loss_coef: coefficient of the balance loss: mean over a block's routers, summed over blocks.
        router_z_loss_coef: coefficient of the router z-loss.
        init_lora_weights: True starts with experts that add nothing (B zero), at the base exactly; False draws B at
            random, for tests. "svd" starts each expert from its own segment of the frozen weight's singular vectors,
            as GOAT does (arXiv 2502.16894), and subtracts what it started from under the same mixing weight: at the
            base exactly, for twice an expert's memory and time. "goat" subtracts the mean of all experts' starts, as
            published: as each token weighs its experts by itself, this is the base in the mean alone, and the
            preflight says how far off it begins. The base's weights stay as they are in both; the starts are saved
            with the adapter, which is twice as large. Both take one decomposition of every weight.

    Raises:
        LamellaError: a value out of range or an unknown key.
    """

    init_lora_weights: bool | Literal["svd", "goat"] = True
    r: Count = 8
    lora_alpha: Alpha = 16
    lora_dropout: Share = 0.0
    expert_dropout: Share = 0.0
    use_rslora: bool = False
    share_lora_a: bool = False
    fan_in_fan_out: bool = False
    num_experts: int | list[int] | str = 4
    expert_budget: Annotated[float, Bounds(1, MOST)] | None = None
    top_k: Count | list[Count] = 2
    router: Literal["linear", "cosine"] = "linear"
    mixing_weights: Literal["softmax", "equal"] = "softmax"
    router_aux_loss_coef: Coefficient = 1e-3
    router_z_loss_coef: Coefficient = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = LamellaType.MOLA
        if not wrote_before(self, "0.2"):
            self.check("lora_alpha", self.lora_alpha != 0, "other than 0: the experts' sum is multiplied by it")
        self.check(
            "share_lora_a",
            not (self.share_lora_a and self.start),
            f"False with init_lora_weights={self.init_lora_weights!r}: each expert starts from an A of its own",
        )
        self._check_counts()

    @property
    def scaling(self) -> float:
        """What the experts' sum is multiplied by."""
        return float(self.lora_alpha / self.r**0.5 if self.use_rslora else self.lora_alpha / self.r)

    @property
    def start(self) -> Literal["svd", "goat"] | None:
        """How experts start that do not start at zero, or at random."""
        return None if isinstance(self.init_lora_weights, bool) else self.init_lora_weights

    def allocation(self, layers: int, needs: Sequence[float] | None = None) -> tuple[list[int], list[int], list[str]]:
        """Experts and top-k of each block of a stack, and what had to be adjusted.

        Args:
            layers: blocks in the stack.
            needs: how much each needs experts, where these are allocated by needs.

        Returns:
            Experts per block, top-k per block, and notes in words.

        Raises:
            LamellaError: the allocation does not fit the stack, or a block has fewer experts than its top-k.
        """
        experts = allocate(self.num_experts, layers, self.expert_budget, needs)
        wanted = [self.top_k] * layers if isinstance(self.top_k, int) else self.top_k
        if len(wanted) != layers:
            raise LamellaError(
                f"top_k has {len(wanted)} entries but the stack has {layers} blocks; give one per block."
            )
        notes = []
        top_k = []
        for layer, (count, k) in enumerate(zip(experts, wanted, strict=True)):
            # One expert has no router: it is plain LoRA, always used, whatever top-k says.
            if k > count and self.expert_budget is not None:
                notes.append(f"block {layer} has {count} experts after scaling, so its top_k is {count} instead of {k}")
            elif k > count > 1:
                raise LamellaError(
                    f"top_k={k} is more than the {count} experts of block {layer} (num_experts={self.num_experts!r}); "
                    "lower top_k, give it as a list with one entry per block, or raise num_experts."
                )
            top_k.append(min(k, count))
        return experts, top_k, notes

    def _check_counts(self) -> None:
        """What can be said before the depth of the model is known."""
        top_k = self.top_k if isinstance(self.top_k, list) else [self.top_k]
        self.check("top_k", bool(top_k), "one number for each block")
        if isinstance(self.num_experts, int):
            allocate(self.num_experts, 1, self.expert_budget)
            if max(top_k) > self.num_experts > 1:
                raise LamellaError(f"top_k={self.top_k!r} is more than num_experts={self.num_experts}.")
        elif self.num_experts == AUTO:
            allocate(AUTO, 1, self.expert_budget, needs=[1.0])
        elif isinstance(self.num_experts, str):
            groups = SHAPES.get(self.num_experts, ())
            allocate(self.num_experts, max(len(groups), self.num_experts.count("-") + 1), self.expert_budget)
        else:
            allocate(self.num_experts, len(self.num_experts), self.expert_budget)
