"""Counts rather than times: the page comes from JSON alone, and counts are those of small cases."""

import pytest
import torch

from benchmarks import counted, gradient_errors, memory_front, peer_machine_code, summing
from benchmarks.memory_front import COMPILED, OURS, PUBLIC, Point, dominating
from benchmarks.report import fill
from route_detr.config import preset
from route_detr.memory.planner import Request
from route_kernels.nn import attention

PARTS = (memory_front, gradient_errors, summing, peer_machine_code)


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.NAME)
def test_the_page_comes_from_the_json(part):
    page = counted.PAGE.read_text()
    assert fill(page, part.section(counted.read(part.NAME))) == page


def test_a_point_is_dominated_by_what_needs_less_of_one_and_no_more_of_the_other():
    point = Point(OURS, "lean", saved=5, peak=10, flop=10)
    others = [Point(PUBLIC, str(i), 9, *each) for i, each in enumerate([(10, 10), (9, 10), (9, 11), (11, 9), (10, 9)])]
    assert [each.setting for each in dominating(point, others, "peak")] == ["1", "4"]
    assert dominating(point, others, "saved") == []


def test_no_level_is_dominated_in_the_committed_front():
    points = [Point(**each) for each in counted.read(memory_front.NAME)["points"]]
    rivals = [each for each in points if each.way not in (OURS, memory_front.OURS_COMPILED)]
    assert all(not dominating(each, rivals, "peak") for each in points if each.way == OURS)


def test_a_budget_saves_bytes_for_arithmetic():
    request = Request(preset("tiny"), 1, (64, 64), torch.bfloat16, "transformer", public=True)
    whole, half, nothing = memory_front.compiled_points(COMPILED, request, (1.0, 0.5, 0.0))
    assert whole.saved > half.saved > nothing.saved == 0
    assert whole.flop < nothing.flop
    as_it_is = memory_front.as_it_runs(PUBLIC, "as it is", request)
    assert as_it_is.saved > whole.saved and as_it_is.peak > as_it_is.saved


def test_checkpointed_layers_keep_less_and_compute_more():
    request = Request(preset("tiny"), 1, (64, 64), torch.bfloat16, "transformer", public=True)
    found = {point.setting: point for point in memory_front.public_points(request)}
    assert found["all layers"].saved < found["encoder layers"].saved < found["as it is"].saved
    assert found["as it is"].flop < found["encoder layers"].flop < found["all layers"].flop
    assert found["all layers"].saved < found["keeps gathers"].saved < found["keeps products"].saved
    assert found["keeps products"].flop < found["keeps gathers"].flop < found["all layers"].flop


def test_errors_are_of_the_same_rounded_inputs():
    samples = gradient_errors.near_samples(((5, 6), (2, 2)))
    assert samples.additions() == [4 * 34 * 4 / 30, 4 * 34 * 4 / 4]
    cpu = {"ours, cpu": gradient_errors.CONTENDERS["ours, cpu"]}
    rows = list(gradient_errors.measured({"small": samples}, cpu))
    assert [row["dtype"] for row in rows] == list(gradient_errors.DTYPES)
    for row, rounding in zip(rows, (2**-9, 2**-12), strict=True):
        assert len(row["errors"]["value"]) == 2
        assert all(0 < each < rounding for part in ("output", "value") for each in row["errors"][part])


def test_what_cannot_run_says_why():
    def missing(samples):
        raise ImportError("no such package here")

    (row, _) = gradient_errors.measured({"small": gradient_errors.near_samples(((2, 2),))}, {"peer": missing})
    assert row["unavailable"] == "no such package here" and "errors" not in row


def test_the_switch_changes_the_sum_alone():
    torch.manual_seed(0)
    shapes, samples = [(5, 6), (3, 3)], (2, 7, 3, 4)
    value, reference, mask = torch.randn(2, 39, 3, 4), torch.rand(2, 7, 1, 2), torch.rand(2, 39) < 0.2
    leaves = [x.requires_grad_() for x in (value, 2 * torch.randn(*samples, 2), torch.randn(samples))]

    def gradients(dtype):
        with summing.summed_in(dtype):
            call = attention.ms_deform_attn_fused
            output = call(leaves[0], shapes, reference, *leaves[1:], value_mask=mask)
        return torch.autograd.grad(output.square().sum(), leaves)

    expected = gradients(None)
    torch.testing.assert_close(gradients(torch.float32), expected)
    short = gradients(torch.bfloat16)
    assert torch.equal(short[1], expected[1]) and torch.equal(short[2], expected[2])
    off = (short[0] - expected[0]).norm() / expected[0].norm()
    assert 1e-4 < off < 1e-2


def test_reductions_of_a_corner_are_by_the_width_of_the_instruction():
    wide = {"REDG.E.ADD.BF16x8.RN.STRONG.GPU": 4, "REDG.E.ADD.F32x4.FTZ.RN.STRONG.GPU": 8, "REDG.E.ADD.F32.STRONG": 1}
    found = peer_machine_code.reductions_of_a_corner(wide).split(", ")
    assert [int(each.split()[0]) for each in found] == [4, 8, 32]
