"""The measurements on a GPU, as far as a CPU can tell: the contenders' formulas, the cases, rows and tables."""

import dataclasses
import json
import math
import re
from functools import partial

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import flex_attention

import route_kernels as rk
from benchmarks import contenders, gpu_parts, gpu_report, measure, timing
from benchmarks.chips import CHIPS
from benchmarks.ops.ms_deform_attn import HEADLINE, Sampling, sampled_on
from benchmarks.registry import MIB, OURS, Case, Contender, Target, Unavailable, cases, parts
from benchmarks.report import aligned, markdown
from benchmarks.roofline import call_floor, least_work, sizes_of
from route_kernels.backends import OPS
from route_kernels.testing import (
    EAGER,
    check_accuracy,
    map_tensors,
    named_tensors,
    routed_attention_arguments,
    sample_arguments,
)

CPU = torch.device("cpu")
SMALL = dict(batch=2, heads=2, queries=20, channels=16)
FLEX = [contenders.FLEX_FACTORED, contenders.FLEX_LOOKED_UP]


def by_score_mod(score_mod_of):
    """FlexAttention's definition, every pair at once: it differentiates on a GPU alone."""

    def attend(query, key, value, routing):
        b, h, i, j = (torch.arange(size) for size in (*query.shape[:3], key.shape[2]))
        indices = (b[:, None, None, None], h[:, None, None], i[:, None], j)
        scores = query @ key.mT / math.sqrt(query.shape[-1])
        return torch.softmax(score_mod_of(CAPTURED[score_mod_of](routing))(scores, *indices), dim=-1) @ value

    return attend


CAPTURED = {
    contenders.factored_score_mod: lambda routing: routing,
    contenders.looked_up_score_mod: contenders._bias,
}


@pytest.mark.parametrize("score_mod_of", CAPTURED)
@pytest.mark.parametrize("limit", [5.0, 0.5])
def test_score_mods_are_the_bias_and_its_gradients(score_mod_of, limit):
    check_accuracy("routed_attention", routed_attention_arguments(limit=limit, **SMALL), by_score_mod(score_mod_of))


@pytest.mark.slow
@pytest.mark.parametrize("contender", FLEX, ids=lambda contender: contender.name)
def test_compiled_flex_attention_forward(contender):
    sizes = dict(batch=1, heads=2, queries=300, channels=32, rank=16, gate_rank=3)
    arguments = map_tensors(routed_attention_arguments(**sizes), torch.Tensor.detach)
    with torch.no_grad():
        output = contender.call(**arguments)
    torch.testing.assert_close(output, EAGER["routed_attention"](**arguments), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("contender", FLEX, ids=lambda contender: contender.name)
def test_flex_attention_differentiates_them(contender, monkeypatch):
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)  # no backward on a CPU when compiled
    for name, score_mod_of in (("factored", "factored_score_mod"), ("looked_up", "looked_up_score_mod")):
        uncompiled = contenders._flex(getattr(contenders, score_mod_of))
        monkeypatch.setattr(contenders, f"_compiled_{name}", uncompiled)
    monkeypatch.setattr(contenders, "_compiled_bias", contenders._bias)
    monkeypatch.setattr(contenders, "_flex_differentiates", lambda query: None)
    check_accuracy("routed_attention", routed_attention_arguments(**SMALL), contender.call)


def test_public_code_is_the_formula():
    check_accuracy("routed_attention", routed_attention_arguments(**SMALL), contenders.public_code)


def test_compiled_contenders_are_made_when_called(monkeypatch):
    made = []
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: made.append(function) or function)
    contender = contenders.compiled(F.softmax)
    assert made == []
    assert torch.equal(contender(input=torch.zeros(2), dim=0), contender(input=torch.zeros(2), dim=0))
    assert made == [F.softmax]


# ---- cases ---------------------------------------------------------------------------------------------------------


def test_cases_are_those_that_the_targets_speak_of():
    found = cases("cuda")
    assert {case.op for case in found} == set(OPS)
    assert len({(case.part, case.op, case.name, case.backward) for case in found}) == len(found)
    for case in found:
        assert case.contenders[0].name == OURS
        assert {target.against for target in case.targets} <= {contender.name for contender in case.contenders[1:]}
    headline = next(case for case in found if case.op == "routed_attention")
    assert (headline.op, headline.name, headline.backward) == ("routed_attention", "B 16 N 1100 bf16", True)
    assert [(target.against, target.at_most) for target in headline.targets] == [
        ("public code", 1 / 8),
        ("plain SDPA, no bias", 1.4),
    ]
    assert headline.peak_at_most == 130 * MIB
    flex = [case for case in found if case.part == "flex"]
    assert [[target.at_most for target in case.targets] for case in flex] == [[0.5, 0.5]]


def test_headline_arguments():
    arguments = next(case for case in cases("cuda") if case.op == "routed_attention").make_arguments()
    sizes = {"B": 16, "H": 8, "N": 1100, "M": 1100, "D": 32, "R": 16, "G": 3}
    assert sizes_of("routed_attention", arguments) == sizes
    assert arguments["query"].dtype == arguments["routing"].sup_q.dtype == torch.bfloat16


@pytest.mark.parametrize("op", ["ms_deform_attn", "ms_deform_attn_fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("near", [True, False])
def test_sampling_arguments(op, dtype, near):
    sampling = Sampling(((4, 6), (2, 3)), batch=2, queries=30, near=near)
    arguments = sampled_on(sampling, dtype, True, op == "ms_deform_attn_fused")
    assert arguments["value"].dtype == dtype and arguments["value"].requires_grad
    if op == "ms_deform_attn_fused":
        assert arguments["sampling_offsets"].dtype == arguments["attention_logits"].dtype == dtype
        fractions = (arguments["sampling_offsets"].double() % 1).unique() * 16
        assert dtype == torch.float32 or (fractions % 2 == 1).all()
    check_accuracy(op, arguments)


@pytest.mark.parametrize("op", OPS)
def test_sizes_of_a_call_are_those_of_the_roofline(op):
    for arguments in sample_arguments(op, torch.bfloat16).values():
        work = least_work(op, "forward", sizes_of(op, arguments), "bfloat16")
        assert work.memory_bytes > 0
        floor = call_floor(op, arguments, ("forward",), CHIPS["H100"])
        assert floor["microseconds"] > 0 and floor["chip"] == "H100"


def test_floor_of_both_passes_is_their_sum():
    arguments = routed_attention_arguments(**SMALL)
    each = [call_floor("routed_attention", arguments, (way,), CHIPS["H200"]) for way in ("forward", "backward")]
    both = call_floor("routed_attention", arguments, ("forward", "backward"), CHIPS["H200"])
    assert both["microseconds"] == pytest.approx(sum(floor["microseconds"] for floor in each))
    plain = call_floor("routed_attention", {**arguments, "routing": None}, ("forward",), CHIPS["H200"])
    assert plain["microseconds"] < each[0]["microseconds"]


# ---- rows ----------------------------------------------------------------------------------------------------------


def case_with(*others, targets=(), **options):
    ours = Contender(OURS, rk.routed_attention, EAGER["routed_attention"])
    make = lambda: routed_attention_arguments(**SMALL)  # noqa: E731
    return Case("routed_attention", "small", True, make, (ours, *others), targets, part="attention", **options)


def measured(case, graph_of=lambda call, device: call):
    return measure.measured(case, CPU, 0.0, on_gpu(graph_of))[0]


def on_gpu(graph_of=lambda call, device: call):
    """Measuring as on a GPU, with a clock that counts."""
    seconds = iter(range(1, 100_000))
    return measure.OnGpu(CPU, lambda call, repeats: float(next(seconds)), graph_of, lambda *_: 3 * MIB)


EAGER_FORM = Contender("eager", EAGER["routed_attention"], EAGER["routed_attention"])


def test_a_row_has_times_peaks_and_verdicts():
    row = measured(case_with(EAGER_FORM, targets=[Target("eager", 1e9)], peak_at_most=2 * MIB))
    assert row["failure"] is None and row["pass"] == "forward + backward" and row["backend"] == "cpu"
    assert set(row["contenders"]) == {OURS, "eager"}
    for found in row["contenders"].values():
        assert found["milliseconds"]["median"] > 0 and found["replayed"] and found["peak_bytes"] == 3 * MIB
        assert found["bytes_a_second"] > 0
    assert row["targets"] == [{"against": "eager", "at_most": 1e9, "met": True}]
    assert row["peak_target"] == {"at_most_bytes": 2 * MIB, "met": False}
    json.dumps(row)


def test_a_wrong_contender_has_no_time_and_ours_keeps_its_own():
    wrong = Contender("wrong", lambda **x: 1.001 * EAGER["routed_attention"](**x), EAGER["routed_attention"])
    row = measured(case_with(wrong, EAGER_FORM, targets=[Target("wrong", 1.0)]))
    assert set(row["contenders"]["wrong"]) == {"failure"} and "RMS error" in row["contenders"]["wrong"]["failure"]
    assert row["targets"][0]["met"] is None and "milliseconds" in row["contenders"][OURS]


def test_nothing_is_timed_where_ours_is_wrong(monkeypatch):
    case = case_with(EAGER_FORM)
    wrong = Contender(OURS, lambda **x: EAGER["routed_attention"](**x) * torch.nan, EAGER["routed_attention"])
    row = measured(Case(case.op, case.name, True, case.make_arguments, (wrong, EAGER_FORM), part="attention"))
    assert row["failure"].startswith(f"{OURS}: output") and "milliseconds" not in json.dumps(row)


def test_the_reference_is_not_measured_as_ours():
    with rk.backend("reference"):
        row = measured(case_with(EAGER_FORM))
    assert row["failure"].startswith("no kernel runs here: ") and "triton" in row["failure"]


def missing(**arguments):
    raise Unavailable("no such package")


def test_a_missing_package_is_named():
    row = measured(case_with(Contender("peer", missing, EAGER["routed_attention"])))
    assert row["contenders"]["peer"] == {"unavailable": "no such package"}


@pytest.mark.parametrize("uncapturable", ["eager", OURS])
def test_what_no_graph_holds_is_compared_called(uncapturable):
    def graph_of(call, device):
        name = "eager" if call.args[0] is EAGER_FORM else OURS
        if name == uncapturable:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return call

    row = measured(case_with(EAGER_FORM), graph_of)
    assert row["contenders"]["eager"]["replayed"] is False and row["contenders"]["eager"]["why_not_replayed"]
    assert row["contenders"][OURS]["replayed"] is (uncapturable == "eager")
    assert "our_time_over_its" in row["contenders"]["eager"]


def test_inputs_rotate_through_copies_that_the_cache_does_not_hold():
    arguments = routed_attention_arguments(**SMALL)
    contender = Contender(OURS, rk.routed_attention, EAGER["routed_attention"])
    calls = measure.rotation(partial(measure.run, contender, arguments, None))
    assert len(calls) == timing.MOST_COPIES
    expected, addresses = rk.routed_attention(**arguments), set()
    turn = timing.in_turn(calls[:3])
    assert all(torch.equal(turn()["output"], expected) for _ in range(4))
    for call in calls:
        (query, *_) = (tensor for _, tensor in named_tensors(call.args[1]))
        assert query.requires_grad and query.is_leaf
        addresses.add(query.data_ptr())
    assert len(addresses) == len(calls) and calls[0].args[1] is arguments


@pytest.mark.parametrize("size, copies", [(0, 64), (2**20, 64), (60 * MIB, 5), (256 * MIB, 1), (2**34, 1)])
def test_copies_beyond_the_cache(size, copies):
    assert timing.copies_beyond_cache(size) == copies


@pytest.mark.parametrize("op", ["ms_deform_attn", "ms_deform_attn_fused"])
def test_each_of_our_gpu_backends_is_a_contender_or_says_why_not(op):
    headline = [case for case in cases("cuda") if case.op == op and case.name == HEADLINE]
    assert [case.backward for case in headline] == [True, False]
    names = [contender.name for contender in headline[0].contenders]
    assert names[0] == OURS and {"ours, triton", "eager grid_sample", "eager, torch.compile"} <= set(names)
    assert len(headline[0].targets) == 1
    arguments = next(iter(sample_arguments(op).values()))
    with pytest.raises(Unavailable, match=re.escape(rk.can_run(op, "cuda")[1])):
        contenders.on_backend(op, "cuda").call(**arguments)
    expected = EAGER[op](**arguments)
    torch.testing.assert_close(contenders.on_backend(op, "cpu").call(**arguments), expected, rtol=1e-4, atol=1e-5)


def test_launch_costs_of_every_op():
    rows = list(gpu_parts.launch_rows(CPU, lambda call, device: call() is None or 5e-6))
    assert {row["op"] for row in rows} == set(OPS)
    assert all(row["host_microseconds"] == 5.0 and row["backend"] == "cpu" for row in rows)
    assert [row["pass"] for row in rows if row["op"] == "routed_attention"] == ["forward", "forward + backward"]


# ---- profiles and tables -------------------------------------------------------------------------------------------


class Kernel:
    def __init__(self, name, microseconds):
        self.name, self.time_range = name, self
        self.elapsed_us = lambda: microseconds


def test_kernel_times_are_medians_of_sums():
    profiles = [[Kernel("a", 1), Kernel("a", 2), Kernel("b", 9)], [Kernel("a", 5)], [Kernel("a", 4), Kernel("b", 7)]]
    assert gpu_parts.kernel_times(profiles) == [
        {"kernel": "b", "microseconds": 8, "calls": 1},
        {"kernel": "a", "microseconds": 4, "calls": 1},
    ]


def test_every_op_is_profiled_in_each_pass():
    found = {case.op: case for case in gpu_parts.headline_cases()}
    assert set(found) == set(OPS)
    assert "N = S" in found["ms_deform_attn"].name and found["routed_attention"].name.startswith("B 16 N 1100")
    small = case_with()
    arguments = small.arguments_on(CPU)
    for direction, prepare in gpu_parts.passes(small, small.contenders[0], arguments).items():
        assert prepare()() is not None, direction


def profile_of(floor):
    kernels = [{"kernel": "forward_kernel", "microseconds": 40.0, "calls": 1}]
    return gpu_parts.profile_row(case_with(), OURS, "forward", kernels, floor)


def test_share_of_the_floor():
    floor = {"chip": "H100", "microseconds": 30.0, "bound_by": ["special"]}
    assert profile_of(floor)["floor_over_time"] == 0.75
    assert profile_of(None)["floor_over_time"] is None


RESULTS = {
    "commit": "0123456789abcdef", "dirty": False, "date": "2026-01-02T03:04:05+00:00", "versions": {"torch": "2.13.0"},
    "gpu": {"name": "a GPU", "triton": "3.7.1", "driver": "580"}, "parts": {"tests": {"status": "done", "seconds": 3}},
    "ceilings": [{"what": "copy, bytes a second", "rate": 3e12}],
    "launch": [{"op": "routed_attention", "pass": "forward", "backend": "triton", "host_microseconds": 31.25}],
}  # fmt: skip


def results_with(*rows, **others):
    floor = {"chip": "H100", "microseconds": 30.0, "bound_by": ["special"]}
    tests = {"passed": 2, "failed": [], "skipped": {"no second GPU": 3}}
    return {
        **RESULTS,
        "speed": list(rows),
        "steps": [],
        "trainings": [],
        "profiles": [profile_of(floor)],
        "tests": tests,
        **others,
    }


@pytest.mark.parametrize("layout", [aligned, markdown])
def test_tables_show_everything(layout):
    peer = Contender("peer", missing, EAGER["routed_attention"])
    wrong = Contender("wrong", lambda **x: EAGER["routed_attention"](**x) * 2, EAGER["routed_attention"])
    case = case_with(EAGER_FORM, peer, wrong, targets=[Target("eager", 1e-9), Target("peer", 1.0)], peak_at_most=MIB)
    page = gpu_report.text(results_with(measured(case)), layout)
    for part in ("a GPU", "MISSED", "not measured", "not there", "no such package", "FAILED", "at most 1: MISSED"):
        assert part in page, part
    found = results_with(measured(case))
    rate = found["speed"][0]["contenders"][OURS]["bytes_a_second"]
    faster = {**found, "ceilings": [{"what": gpu_report.COPY, "rate": 4 * rate}]}
    assert "0.25" in gpu_report.text(faster, layout)
    for part in ("forward_kernel 40.0", "0.75", "31.2", "copy", "2 passed, 0 failed, 3 skipped", "no second GPU"):
        assert part in page, part


def test_what_counts_as_failed():
    right = measured(case_with(EAGER_FORM, targets=[Target("eager", 1e-9)]))
    assert not gpu_report.failed(results_with(right))
    assert gpu_report.failed(results_with({**right, "failure": "wrong"}))
    assert gpu_report.failed(results_with(right, parts={"tests": {"status": "stopped after 3 s", "seconds": 3}}))
    assert gpu_report.failed(results_with(tests={"passed": 0, "failed": [{"test": "a"}], "skipped": {}}))


def test_tables_from_a_file(tmp_path, capsys):
    (tmp_path / "gpu.json").write_text(json.dumps(results_with()))
    assert gpu_report.main(["--tables", str(tmp_path / "gpu.json")]) == 0
    assert "| op | case |" in capsys.readouterr().out


def test_parts_of_the_cases():
    assert parts()[:4] == ["attention", "flex", "ms_deform_attn", "ms_deform_attn_fused"]  # by value
    assert set(parts()) == {"attention", "flex", *OPS} - {"routed_attention"}


def test_targets_are_those_that_were_set():
    by_case = {(case.op, case.name, case.backward): case for case in cases("cuda")}
    assert by_case["ms_deform_attn", HEADLINE, False].microseconds_at_most == 150
    goal = by_case["ms_deform_attn", HEADLINE, True].targets
    assert goal == [Target("deformops 3.0.1, Triton, float32 sums", 1 / 2.5)]
    deterministic = by_case["ms_deform_attn", f"{HEADLINE}, deterministic", True]
    assert deterministic.targets == [Target("ours, not deterministic", 1.5)]
    row = measured(dataclasses.replace(case_with(), microseconds_at_most=1e12))
    assert row["time_target"] == {"at_most_microseconds": 1e12, "met": True}


def test_ours_of_a_deterministic_case_runs_in_that_mode():
    seen = []

    def call(**arguments):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return rk.ms_deform_attn(**arguments)

    ours, fast = (dataclasses.replace(each, call=call) for each in contenders.in_the_fast_mode("ms_deform_attn"))
    arguments = Sampling(((4, 6), (2, 3)), 1, 5, near=False).arguments(True)[0]
    found = [measure.run(each, arguments, torch.ones(1, 5, 256)) for each in (ours, fast)]
    assert seen == [True, False] and not torch.are_deterministic_algorithms_enabled()
    torch.testing.assert_close(found[0], found[1])


def small_cases(device):
    """A case for every op and part, of a detector's shapes at a size that a CPU runs at once."""
    assert device == "cuda"
    found = [
        dataclasses.replace(case_with(EAGER_FORM, contenders.PLAIN_SDPA), part=part) for part in ("attention", "flex")
    ]
    for op in OPS:
        if op != "routed_attention":
            arguments = next(iter(sample_arguments(op).values()))
            ours = Contender(OURS, getattr(rk, op), EAGER[op])
            backward = any(tensor.requires_grad for _, tensor in named_tensors(arguments))
            found.append(Case(op, "N = S small", backward, lambda arguments=arguments: arguments, (ours,), part=op))
    return found


def test_dry_run_of_every_part(tmp_path, monkeypatch):
    """All that a report does but for the GPU: rows of every part, their places, the tables."""
    monkeypatch.setattr(gpu_parts, "cases", small_cases)
    monkeypatch.setattr(gpu_parts, "SECONDS_A_CASE", 0.0)
    monkeypatch.setattr(gpu_parts, "EventTimer", lambda device: on_gpu().sample)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(gpu_parts, "profiled", lambda prepare, device: gpu_parts.kernel_times([[Kernel("a", 3)]]))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(
        gpu_parts, "ceilings", lambda device: iter([{"kind": "ceiling", "what": gpu_parts.COPY, "rate": 4e12}])
    )
    report = gpu_report.Report(tmp_path / "gpu.json", {name: RESULTS[name] for name in ("commit", "dirty", "date")})
    small = gpu_parts.Step("tiny", 1, (64, 64), 20)
    for name, rows in gpu_parts.PARTS.items():
        if name in parts():
            found = list(gpu_parts.speed_rows(name, CPU, on_gpu()))
        elif name in (gpu_parts.STEP, gpu_parts.TRAINING):
            found = list(rows(CPU, small, 2))
            torch.use_deterministic_algorithms(False)
        else:
            found = list(rows(CPU))
        assert found, name
        for row in found:
            report.add(json.loads(json.dumps(row)))
        report.end_part(name, {"status": "done", "seconds": 1})
    results = json.loads((tmp_path / "gpu.json").read_text()) | {name: RESULTS[name] for name in ("gpu", "versions")}
    assert {row["op"] for row in results["speed"]} == {row["op"] for row in results["profiles"]} == set(OPS)
    assert not gpu_report.failed(results)
    assert [row["same_losses"] for row in results["trainings"]] == [None, True]
    assert results["steps"][-1]["planned_bytes"] > 0 and results["steps"][-1]["loss"] > 0
    page = gpu_report.text(results)
    for part in ("hot in L2", "of the plan: not measured", "yes: met", "N = S small"):
        assert part in page, part
