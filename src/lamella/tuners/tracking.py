"""Hooks on a model, so that the layers inside it learn what belongs to a call."""

from torch import nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from lamella.routing import track_calls
from lamella.tuners.cache import DecisionsInCache

# Tasks whose answer is about the whole input; nothing in it is to be predicted from what stands before.
_ABOUT_ALL = frozenset({"ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"})


def track(model: nn.Module) -> None:
    """Sets the hooks of ``lamella.routing.track_calls`` on a model and the transformers inside it, once."""
    # The transformers inside are given attention masks of their own: an encoder's, a decoder's.
    stacks = [m for m in model.modules() if m is not model and isinstance(m, PreTrainedModel)]
    is_encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    loss_type = getattr(model, "loss_type", None) or ""
    shifts_labels = LOSS_MAPPING.get(loss_type) is ForCausalLMLoss and not is_encoder_decoder
    tracker = track_calls(model, stacks, shifts_labels=shifts_labels, whole_input=loss_type in _ABOUT_ALL)
    if not tracker.listeners:
        tracker.listeners.append(DecisionsInCache())
