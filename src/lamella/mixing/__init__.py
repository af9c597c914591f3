"""The arithmetic of ``y + s * sum_e g_e B_e A_e x``: three forms with one result, and the choice between them."""

from lamella.mixing.choice import SORTED_ABOVE, Form, choose_form
from lamella.mixing.dense import mix_dense, project
from lamella.mixing.reference import mix_reference
from lamella.mixing.sorted import mix_sorted

__all__ = ["SORTED_ABOVE", "Form", "choose_form", "mix_dense", "mix_reference", "mix_sorted", "project"]
