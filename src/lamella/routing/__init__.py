"""Decisions: which experts a token uses, with which weights, and what a router pays for imbalance. Plain torch."""

from lamella.routing.attachment import attach, refuse_reentrant_collection
from lamella.routing.balance import CollectedLoss, RouterLoss, balance_gradient, balance_loss, z_gradient, z_loss
from lamella.routing.calls import CallListener, RoutedCall, RouterKey, Scale
from lamella.routing.context import Frame, collect_losses, current_frame, in_frame, prompt
from lamella.routing.decision import (
    CachedDecision,
    Decision,
    Override,
    Projection,
    Score,
    SharedDecision,
    mixing_weights,
)
from lamella.routing.documents import Rows, Sequences
from lamella.routing.generating import Asked
from lamella.routing.pooling import count_votes, pool_mean, pool_mode
from lamella.routing.prompt import Generation, Prompt, Readable, find_readable
from lamella.routing.router import CosineRouter, LinearRouter, ProjectedCosineRouter, Router, Routing, make_router
from lamella.routing.tracking import (
    CallTracker,
    find_tracker,
    loss_scale,
    track_calls,
    untrack_calls,
)

__all__ = [
    "Asked",
    "CachedDecision",
    "CallListener",
    "CallTracker",
    "CollectedLoss",
    "CosineRouter",
    "Decision",
    "Frame",
    "Generation",
    "LinearRouter",
    "Override",
    "ProjectedCosineRouter",
    "Projection",
    "Prompt",
    "Readable",
    "RoutedCall",
    "Router",
    "RouterKey",
    "RouterLoss",
    "Routing",
    "Rows",
    "Scale",
    "Score",
    "Sequences",
    "SharedDecision",
    "attach",
    "balance_gradient",
    "balance_loss",
    "collect_losses",
    "count_votes",
    "current_frame",
    "find_readable",
    "find_tracker",
    "in_frame",
    "loss_scale",
    "make_router",
    "mixing_weights",
    "pool_mean",
    "pool_mode",
    "prompt",
    "refuse_reentrant_collection",
    "track_calls",
    "untrack_calls",
    "z_gradient",
    "z_loss",
]
