"""The roofline sheet: its formulas against counts by hand, and what must be true of any floor."""

import json

import pytest

from benchmarks.chips import CHIPS, chip_of
from benchmarks.roofline import OPS, Work, floor, least_work, main, row

PASSES = [(op, direction) for op, counted in OPS.items() for direction in counted.directions]
DTYPES = ["bfloat16", "float32"]
TINY_ATTENTION = {"B": 1, "H": 2, "N": 3, "M": 4, "D": 8, "R": 2, "G": 1}
TINY_SAMPLING = {"B": 1, "H": 2, "N": 3, "S": 100, "K": 4, "D": 8}


def test_routed_attention_forward_by_hand():
    # q and O 2 x 48, k and v 2 x 64 elements of 2 bytes; 6 sums of 4 bytes; (3 + 4) x 5 factors of 4 bytes
    # 12 pairs: 2 heads x 8 channels x 2 products, 2 x 2 of rank 2, 1 of the gate, a multiply and an add each
    assert least_work("routed_attention", "forward", TINY_ATTENTION, "bfloat16", "float32") == Work(
        memory_bytes=2 * (96 + 128) + 24 + 140,
        l1_bytes=0,
        matrix_flop=12 * 2 * (32 + 4 + 1),
        lane_operations=12 * (5 + 8),
        special_functions=12 * 3 + 12,
    )


def test_routed_attention_backward_by_hand():
    # q, O, dO, dQ 4 x 48, k, v, dK, dV 4 x 64; lse; factors and their gradients
    assert least_work("routed_attention", "backward", TINY_ATTENTION, "bfloat16") == Work(
        memory_bytes=2 * (192 + 256) + 24 + 2 * 2 * 35,
        l1_bytes=0,
        matrix_flop=12 * 2 * (80 + 12 + 3),
        lane_operations=12 * (10 + 10) + 48,
        special_functions=12 * 3,
    )


def test_attention_without_a_bias_is_flash_attention():
    plain = {**TINY_ATTENTION, "R": 0, "G": 0}
    forward = least_work("routed_attention", "forward", plain, "bfloat16")
    backward = least_work("routed_attention", "backward", plain, "bfloat16")
    assert forward.matrix_flop == 4 * 2 * 3 * 4 * 8 and backward.matrix_flop == 5 * forward.matrix_flop // 2
    assert forward.special_functions == 2 * 12 + 12 and backward.special_functions == 2 * 12


def test_query_similarity_by_hand():
    sizes = {"B": 2, "N": 3, "C": 4}  # 3 unordered pairs in each of 2 batches
    assert least_work("query_similarity", "forward", sizes, "float32") == Work(
        memory_bytes=4 * (24 + 6),
        l1_bytes=0,
        matrix_flop=2 * 3 * 4 * 2,
        lane_operations=2 * 9 + 48,
        special_functions=6,
    )
    assert least_work("query_similarity mean", "backward", sizes, "bfloat16") == Work(
        memory_bytes=2 * (48 + 6), l1_bytes=0, matrix_flop=0, lane_operations=7 * 24, special_functions=6
    )


def test_ms_deform_attn_by_hand():
    # 24 samples; of value 100 positions could hold 48 corners of a head: 2 x 48 x 8 elements; output 3 x 2 x 8
    assert least_work("ms_deform_attn", "forward", TINY_SAMPLING, "bfloat16", "float32") == Work(
        memory_bytes=2 * (768 + 48) + 4 * 72,
        l1_bytes=24 * 4 * 8 * 2,
        matrix_flop=0,
        lane_operations=24 * (32 + 14),
        special_functions=0,
    )
    assert least_work("ms_deform_attn", "backward", TINY_SAMPLING, "bfloat16", "float32") == Work(
        memory_bytes=2 * (768 + 48 + 1600) + 4 * 144,
        l1_bytes=24 * 4 * 8 * (2 + 4),
        matrix_flop=0,
        lane_operations=24 * (64 + 26),
        special_functions=0,
    )


@pytest.mark.parametrize("direction, extra", [("forward", 6), ("backward", 9)])
def test_the_fused_form_adds_softmax_and_references(direction, extra):
    plain = least_work("ms_deform_attn", direction, TINY_SAMPLING, "float32")
    fused = least_work("ms_deform_attn_fused", direction, {**TINY_SAMPLING, "L_ref": 1}, "float32")
    assert fused.memory_bytes - plain.memory_bytes == 4 * 3 * 2
    assert fused.lane_operations - plain.lane_operations == extra * 24
    assert (fused.special_functions, plain.special_functions) == (24 + 6, 0)
    assert (fused.l1_bytes, fused.matrix_flop) == (plain.l1_bytes, plain.matrix_flop)


def test_value_is_read_at_most_once():
    everywhere = {**TINY_SAMPLING, "N": 1000}
    few, many = (least_work("ms_deform_attn", "forward", s, "float32") for s in (everywhere, {**everywhere, "N": 2000}))
    assert many.memory_bytes - few.memory_bytes == 4 * 1000 * 2 * (8 + 3 * 4)  # outputs, locations and weights alone


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op, direction", PASSES)
def test_more_of_anything_is_never_less_work(op, direction, dtype):
    headline = OPS[op].headline
    before = least_work(op, direction, headline, dtype)
    for name, size in headline.items():
        grown = least_work(op, direction, {**headline, name: size + 1}, dtype)
        pairs = list(zip(vars(before).values(), vars(grown).values(), strict=True))
        assert all(old <= new for old, new in pairs) and any(old < new for old, new in pairs), name
        for chip in CHIPS.values():
            assert floor(grown, chip, dtype).seconds >= floor(before, chip, dtype).seconds


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op, direction", PASSES)
def test_a_better_chip_has_a_lower_floor(op, direction, dtype):
    work = least_work(op, direction, {}, dtype)
    seconds = [floor(work, CHIPS[name], dtype).seconds for name in ("A100", "H100", "H200", "B200")]
    assert seconds == sorted(seconds, reverse=True) and seconds[-1] > 0


@pytest.mark.parametrize("op, direction", PASSES)
def test_wider_elements_are_never_faster(op, direction):
    for chip in CHIPS.values():
        times = [row(op, direction, {}, chip, dtype)["floor_us"] for dtype in ("bfloat16", "tf32", "float32")]
        assert times == sorted(times)


def test_floor_by_hand():
    # 3.35 MB at 3.35 TB/s; 9.894 GFLOP at 989.4 TFLOP/s; 132 x 16 x 1.98e9 special functions a second
    work = Work(3_350_000, 0, 9_894_000_000, 0, 132 * 16 * 198)
    found = floor(work, CHIPS["H100"], "bfloat16")
    assert (found.memory, found.matrix, found.special) == pytest.approx((1e-6, 10e-6, 0.1e-6))
    assert found.seconds == found.matrix and found.bound_by == "matrix"
    in_float32 = floor(work, CHIPS["H100"], "float32")
    assert in_float32.lanes == in_float32.matrix == pytest.approx(9.894e9 / 66.9e12, rel=1e-3)


def test_stated_float32_rates_follow_from_lanes_and_clock():
    stated = {"A100": 19.5e12, "H100": 66.9e12, "H200": 66.9e12, "B200": 75e12}
    for name, flop_per_s in stated.items():
        assert 2 * CHIPS[name].operations_per_s == pytest.approx(flop_per_s, rel=2e-3)


def test_attention_in_half_precision_is_bound_by_exponentials_on_hopper_and_not_in_float32():
    sizes = OPS["routed_attention"].headline
    assert row("routed_attention", "forward", sizes, CHIPS["H100"], "bfloat16")["bound_by"] == "special"
    assert row("routed_attention", "forward", sizes, CHIPS["H100"], "float32")["bound_by"] == "lanes"


@pytest.mark.parametrize(
    "device, chip",
    [
        ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H200", "H200"), ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA B200", "B200"), ("NVIDIA H100 PCIe", None), ("NVIDIA H200 NVL", None), ("NVIDIA L4", None),
    ],
)  # fmt: skip
def test_chips_by_device_name(device, chip):
    found = chip_of(device)
    assert (found and found.name) == chip


def test_sizes_are_checked():
    with pytest.raises(ValueError, match="expected sizes of B, H, N, M, D, R, G"):
        least_work("routed_attention", "forward", {"K": 3}, "bfloat16")
    with pytest.raises(ValueError, match="expected a pass out of forward, got backward"):
        least_work("query_similarity", "backward", {}, "bfloat16")
    assert row("routed_attention", "forward", {"N": 50}, CHIPS["H100"], "bfloat16")["sizes"]["M"] == 50


def test_table_and_json(capsys):
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(PASSES) * len(CHIPS) + len(CHIPS)
    assert main(["--op", "ms_deform_attn", "--chip", "B200", "--dtype", "float32", "--shape", "N=7", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [found["pass"] for found in printed["rows"]] == ["forward", "backward"]
    assert printed["rows"][0] == row("ms_deform_attn", "forward", {"N": 7}, CHIPS["B200"], "float32")
    assert "datasheet" in printed["chips"][0]["source"]


@pytest.mark.parametrize("wrong", [["--shape", "N"], ["--shape", "Q=3"], ["--op", "attention"]])
def test_wrong_options_are_usage_errors(wrong, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--op", "routed_attention", *wrong])
    assert ended.value.code == 2 and capsys.readouterr().err
