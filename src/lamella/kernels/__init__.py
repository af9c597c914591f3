"""The arithmetic of ``y + s * sum_e g_e B_e A_e x``: three forms with one result, and the choice between them.

For LoRAs that are trained already: the same with A and B frozen, merged into the layer where that is cheaper; and what
their outputs tell a router, read in rank space.
"""

from lamella.kernels.dense import mix_dense, project
from lamella.kernels.few import FEW, mix_few
from lamella.kernels.frozen import FrozenLoras, concatenate, leave_out_unused, mix_frozen
from lamella.kernels.merged import forward_frozen, mix_merged, prefers_merged
from lamella.kernels.plain import mix_plain
from lamella.kernels.rank_space import read_outputs, read_positions
from lamella.kernels.reference import mix_reference
from lamella.kernels.sorted import SORTED_ABOVE, Form, choose_form, mix_sorted

__all__ = [
    "FEW",
    "SORTED_ABOVE",
    "Form",
    "FrozenLoras",
    "choose_form",
    "concatenate",
    "forward_frozen",
    "leave_out_unused",
    "mix_dense",
    "mix_few",
    "mix_frozen",
    "mix_merged",
    "mix_plain",
    "mix_reference",
    "mix_sorted",
    "prefers_merged",
    "project",
    "read_outputs",
    "read_positions",
]
