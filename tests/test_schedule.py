import math

import pytest

from route_detr.config import Config
from route_detr.model.schedule import routing_values
from route_detr.tools.plots import sampled_schedule

STEPS = 8  # of an epoch


def at(epoch, changes=None):
    return routing_values(Config().updated(changes or {}), round(epoch * STEPS), STEPS)


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
    values = at(epoch)
    assert values.strengths == pytest.approx((strength, strength), abs=1e-15)
    assert values.aux_weight == pytest.approx(alpha, abs=1e-15)
    assert values.route_type == "gated"


def test_alpha_may_start_at_zero_as_in_the_paper():
    assert at(1, {"schedule.aux_start": 0.0}).aux_weight == 0.0
    assert at(3, {"schedule.aux_start": 0.0}).aux_weight == pytest.approx(0.35)


@pytest.mark.parametrize("changes", [{"schedule.ramp": 0.0}, {"schedule.shape": "constant"}])
def test_no_ramp_is_a_step(changes):
    assert at(0.875, changes).strengths == (0.0, 0.0)
    assert at(1.0, changes).strengths == (0.3, 0.3)


def test_linear_rise():
    assert at(2, {"schedule.shape": "linear"}).strengths == pytest.approx((0.075, 0.075))


def test_times_in_steps():
    steps = {"schedule.unit": "step", "schedule.warmup": 10, "schedule.ramp": 20, "schedule.suppressor_until": 15}
    config = Config().updated(steps)
    assert [routing_values(config, step, STEPS).strengths[0] for step in (10, 20, 30)] == pytest.approx([0, 0.15, 0.3])
    assert [routing_values(config, step, STEPS).route_type for step in (14, 15)] == ["suppressor", "gated"]
    assert routing_values(config, 17, 1) == routing_values(config, 17, 1000)


def test_each_layer_has_its_strength():
    assert at(5, {"schedule.layer_strengths": [0.5, 2.0]}).strengths == pytest.approx((0.15, 0.6))


def test_route_type_by_stage():
    stages = {"schedule.suppressor_until": 2, "schedule.delegator_until": 4}
    assert [at(epoch, stages).route_type for epoch in (0, 1.875, 2, 3.875, 4)] == [
        *("suppressor", "suppressor", "delegator", "delegator", "gated")
    ]


def test_without_routing_everything_is_off():
    assert at(11, {"detector.route": False}) == ((), 0.0, "gated")


@pytest.mark.parametrize("shape", ["constant", "linear", "cosine"])
def test_schedules_never_fall_and_are_sampled_over_the_run(shape):
    config = Config().updated({"schedule.shape": shape, "train.epochs": 6})
    epochs, values = zip(*sampled_schedule(config, STEPS, samples=24), strict=True)
    assert epochs == tuple(i / 4 for i in range(25))
    for curve in ([each.strengths[0] for each in values], [each.aux_weight for each in values]):
        assert list(curve) == sorted(curve) and curve[0] < curve[-1]
    assert len(sampled_schedule(config, 3, samples=400)) == 19
