"""The two schedules of dual-branch training: lambda(t) and alpha(t), pure functions of the epoch."""

from __future__ import annotations

import math

from .config import TrainConfig


def _cosine_rise(epoch: float, config: TrainConfig) -> float:
    """From 0 to 1: 0 through the warm-up, then half a cosine over the ramp, then 1."""
    since_warmup = epoch - config.strength_warmup_epochs
    if since_warmup >= config.strength_ramp_epochs:
        return 1.0
    if since_warmup <= 0:
        return 0.0
    return 0.5 * (1.0 - math.cos(math.pi * since_warmup / config.strength_ramp_epochs))


def routing_strength(epoch: float, config: TrainConfig) -> float:
    """lambda(t) in [0, strength_max] at `epoch` (from 0, fractions allowed): the scale of the routing bias."""
    return config.strength_max * _cosine_rise(epoch, config)


def aux_weight(epoch: float, config: TrainConfig) -> float:
    """alpha(t), from aux_start to aux_max at `epoch`: the weight of the auxiliary branch's losses."""
    return config.aux_start + (config.aux_max - config.aux_start) * _cosine_rise(epoch, config)
