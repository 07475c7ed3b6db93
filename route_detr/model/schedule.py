"""The schedules of dual-branch training, pure functions of time: lambda(t), alpha(t) and the route type.

The paper's (arXiv 2512.13876) is a cosine by epochs, one strength for all layers, both route types from the start; it
names other schedules as open.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from .structures import RouteType, RoutingValues

if TYPE_CHECKING:
    from ..config import Config, ScheduleConfig


def rise(time: float, config: ScheduleConfig) -> float:
    """From 0 to 1: 0 through the warm-up, then the ramp's shape, then 1; `time` in the schedule's unit."""
    since_warmup = time - config.warmup
    if since_warmup < 0:
        return 0.0
    if config.shape == "constant" or since_warmup >= config.ramp:
        return 1.0
    share = since_warmup / config.ramp
    return share if config.shape == "linear" else 0.5 * (1.0 - math.cos(math.pi * share))


def route_type(time: float, config: ScheduleConfig) -> RouteType:
    """The suppressor alone, later the delegator alone, then both, gated."""
    if time < config.suppressor_until:
        return "suppressor"
    return "delegator" if time < config.delegator_until else "gated"


def routing_values(config: Config, step: int, steps_per_epoch: int) -> RoutingValues:
    """The values at optimizer step `step` (from 0); without routing no strengths and alpha 0."""
    layers, schedule = len(config.detector.routed_layer_indices), config.schedule
    if not layers:
        return RoutingValues((), 0.0, "gated")
    time = step if schedule.unit == "step" else step / steps_per_epoch
    risen = rise(time, schedule)
    strengths = tuple(schedule.strength * factor * risen for factor in schedule.layer_strengths or (1.0,) * layers)
    alpha = schedule.aux_start + (schedule.aux_end - schedule.aux_start) * risen
    return RoutingValues(strengths, alpha, route_type(time, schedule))
