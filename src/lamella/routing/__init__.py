"""Decisions: which experts a token uses, with which weights, and what a router pays for imbalance. Plain torch."""

from lamella.routing.attachment import attach
from lamella.routing.balance import RouterLoss, balance_gradient, balance_loss, z_gradient, z_loss
from lamella.routing.collecting import CollectedLoss, collect_losses
from lamella.routing.context import CallListener, Frame, RoutedCall, current_frame, loss_scale, track_calls
from lamella.routing.pooling import count_votes, pool_mean, pool_mode
from lamella.routing.prompt import Prompt, Readable, prompt
from lamella.routing.router import CosineRouter, LinearRouter, ProjectedCosineRouter, Router, Routing, make_router

__all__ = [
    "CallListener",
    "CollectedLoss",
    "CosineRouter",
    "Frame",
    "LinearRouter",
    "ProjectedCosineRouter",
    "Prompt",
    "Readable",
    "RoutedCall",
    "Router",
    "RouterLoss",
    "Routing",
    "attach",
    "balance_gradient",
    "balance_loss",
    "collect_losses",
    "count_votes",
    "current_frame",
    "loss_scale",
    "make_router",
    "pool_mean",
    "pool_mode",
    "prompt",
    "track_calls",
    "z_gradient",
    "z_loss",
]
