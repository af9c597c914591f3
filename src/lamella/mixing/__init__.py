"""The arithmetic of ``y + s * sum_e g_e B_e A_e x``: three forms with one result, and the choice between them.

For LoRAs that are trained already: the same with A and B frozen, merged into the layer where that is cheaper; and what
their outputs tell a router, read in rank space.
"""

from lamella.mixing.choice import SORTED_ABOVE, Form, choose_form
from lamella.mixing.dense import mix_dense, project
from lamella.mixing.frozen import FrozenLoras, concatenate, leave_out_unused, mix_frozen
from lamella.mixing.merged import forward_frozen, mix_merged, prefers_merged
from lamella.mixing.plain import mix_plain
from lamella.mixing.rank_space import read_outputs, read_positions
from lamella.mixing.reference import mix_reference
from lamella.mixing.sorted import mix_sorted

__all__ = [
    "SORTED_ABOVE",
    "Form",
    "FrozenLoras",
    "choose_form",
    "concatenate",
    "forward_frozen",
    "leave_out_unused",
    "mix_dense",
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
