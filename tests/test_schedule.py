import math

import pytest

from route_detr.config import TrainConfig
from route_detr.schedule import aux_weight, routing_strength

PUBLIC = TrainConfig()


@pytest.mark.parametrize(
    ("epoch", "strength", "alpha"),
    [
        (0, 0.0, 0.3),
        (0.5, 0.0, 0.3),
        (1, 0.0, 0.3),
        (2, 0.3 * (1 - math.sqrt(0.5)) / 2, 0.3 + 0.4 * (1 - math.sqrt(0.5)) / 2),
        (3, 0.15, 0.5),
        (4.5, 0.3 * (1 - math.cos(7 * math.pi / 8)) / 2, 0.3 + 0.4 * (1 - math.cos(7 * math.pi / 8)) / 2),
        (5, 0.3, 0.7),
        (11, 0.3, 0.7),
    ],
)
def test_public_schedule(epoch, strength, alpha):
    assert routing_strength(epoch, PUBLIC) == pytest.approx(strength, abs=1e-15)
    assert aux_weight(epoch, PUBLIC) == pytest.approx(alpha, abs=1e-15)


def test_alpha_may_start_at_zero_as_in_the_paper():
    paper = TrainConfig(aux_start=0.0)
    assert aux_weight(1, paper) == 0.0
    assert aux_weight(3, paper) == pytest.approx(0.35)


def test_no_ramp_is_a_step():
    step = TrainConfig(strength_ramp_epochs=0.0)
    assert routing_strength(0.99, step) == 0.0
    assert routing_strength(1.0, step) == 0.3


def test_schedules_never_fall():
    epochs = [i / 16 for i in range(200)]
    for schedule in (routing_strength, aux_weight):
        values = [schedule(epoch, PUBLIC) for epoch in epochs]
        assert values == sorted(values)
