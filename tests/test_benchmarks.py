"""The benchmarks do not lie: wrong results are not timed, missing peers are named, missed targets are shown."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch

import route_kernels as rk
from benchmarks import contenders, memory, memory_levels, report, test_ops, train_step, worker
from benchmarks.contenders import PEER
from benchmarks.device import ROOT
from benchmarks.measure import measured
from benchmarks.ops.ms_deform_attn import DETECTORS, Sampling
from benchmarks.registry import OURS, Case, Contender, Target, Unavailable, cases
from benchmarks.timing import ratio, spread, time_in_turns
from route_kernels.testing import EAGER, check_accuracy, routed_attention_arguments

EAGER_FORM = Contender("eager", EAGER["routed_attention"], EAGER["routed_attention"])


def small_case(*others, targets=()):
    ours = Contender(OURS, rk.routed_attention, EAGER["routed_attention"])
    return Case("routed_attention", "small", True, routed_attention_arguments, (ours, *others), targets)


def row_of(case, seconds=0.0):
    return measured(case, torch.device("cpu"), seconds)[0]


def unavailable(**arguments):
    raise Unavailable("no such package here")


def test_row_has_spread_ratio_and_verdict():
    targets = [Target("eager", 1e9), Target("eager", 1e-9)]
    row = row_of(small_case(EAGER_FORM, targets=targets))
    assert row["failure"] is None
    for contender in row["contenders"].values():
        times = contender["milliseconds"]
        assert 0 < times["min"] <= times["median"] <= times["max"]
    assert [target["met"] for target in row["targets"]] == [True, False]
    assert "met" in report.speed_cells([row])[0][-1] and "MISSED" in report.speed_cells([row])[0][-1]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda **x: 1.001 * EAGER["routed_attention"](**x),
        lambda **x: EAGER["routed_attention"](**x)[:, :, :-1],
        lambda **x: EAGER["routed_attention"](**x) * torch.nan,
    ],
    ids=["off by a thousandth", "a row missing", "NaN"],
)
def test_wrong_result_is_not_timed(wrong):
    row = row_of(small_case(Contender("wrong", wrong, EAGER["routed_attention"])))
    assert set(row["contenders"]["wrong"]) == {"failure"} and row["failure"] is None
    assert "milliseconds" in row["contenders"][OURS]
    assert "failed, not timed" in report.text({**LEAST, "speed": [row], "memory": []})


def test_nothing_is_timed_where_ours_is_wrong():
    wrong = Contender(OURS, lambda **x: 1.001 * EAGER["routed_attention"](**x), EAGER["routed_attention"])
    row = row_of(dataclasses.replace(small_case(), contenders=(wrong, EAGER_FORM)))
    assert row["failure"].startswith(f"{OURS}: ") and "milliseconds" not in json.dumps(row)
    assert "failed, not timed" in report.text({**LEAST, "speed": [row], "memory": []})


def test_wrong_gradient_is_not_timed():
    def detached_value(**x):
        return EAGER["routed_attention"](**{**x, "value": x["value"].detach()}) + 0 * x["value"]

    row = row_of(small_case(Contender("wrong", detached_value, EAGER["routed_attention"])))
    (reason,) = row["contenders"]["wrong"].values()
    assert "grad value" in reason


def test_missing_peer_is_named_and_its_target_is_open():
    missing = Contender("peer", unavailable, EAGER["routed_attention"])
    row = row_of(small_case(missing, targets=[Target("peer", 1.0)]))
    assert row["contenders"]["peer"] == {"unavailable": "no such package here"}
    assert row["targets"][0]["met"] is None
    assert "milliseconds" in row["contenders"][OURS]
    assert "not measured" in report.speed_cells([row])[0][-1]


def test_cases_are_those_that_the_targets_speak_of():
    rows = {(case.op, case.name, case.backward): case for case in cases("cpu")}
    assert len(rows) == len(cases("cpu"))
    limits = {
        ("routed_attention", "B 2 N 900", True): ("plain SDPA, no bias", 1.2),
        ("routed_attention", "B 1 N 2048", True): ("plain SDPA, no bias", 1.0),
    }
    for name in ("B 1 N = S = 22223, uniform", "B 1 N = S = 22223, near", "B 2 N = S = 5440, near"):
        for backward in (False, True):
            limits["ms_deform_attn", name, backward] = (PEER, 1 / 3)
    for key, target in limits.items():
        assert [(each.against, each.at_most) for each in rows[key].targets] == [target]
    for case in rows.values():
        assert case.contenders[0].name == OURS
        assert {target.against for target in case.targets} <= {contender.name for contender in case.contenders[1:]}
    assert {op for op, _, _ in rows} == set(rk.backends.OPS)
    goals = {(case.queries, case.target_bytes) for case in memory.CASES if case.target_bytes}
    assert goals == {(16384, 1_500_000_000)}


@pytest.mark.parametrize("points", [4, (3, 1)])
@pytest.mark.parametrize("near", [False, True])
def test_both_deformable_ops_get_the_same_samples(near, points):
    sampling = Sampling(((4, 6), (2, 3)), batch=2, queries=30, near=near, points=points)
    plain, fused = sampling.arguments(backward=False)
    torch.testing.assert_close(rk.ms_deform_attn(**plain), rk.ms_deform_attn_fused(**fused), rtol=1e-4, atol=1e-5)
    sizes = torch.tensor([[6.0, 4.0], [3.0, 2.0]]).repeat_interleave(torch.tensor(sampling.counts), 0)
    pixels = plain["sampling_locations"].reshape(2, 30, 8, -1, 2) * sizes - 0.5
    fractions = pixels - pixels.floor()
    assert fractions.min() > 0.04 and fractions.max() < 0.96


def test_eager_peer_of_similarity_is_right():
    (contender,) = {case.contenders[1] for case in cases("cpu") if case.op == "query_similarity"}
    check_accuracy("query_similarity", {"x": torch.randn(2, 9, 4), "mode": "relu"}, contender.call)


def test_times_are_taken_in_turns():
    calls = []
    samples = time_in_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, seconds=0)
    assert len(samples["a"]) == len(samples["b"]) >= 5
    starts = [name for name, before in zip(calls[2:], calls[1:], strict=False) if name != before]
    assert starts.count("a") > 1 and starts.count("b") > 1


def test_ratio_is_taken_round_by_round():
    assert ratio([1.0, 4.0, 9.0], [1.0, 2.0, 3.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}


@pytest.mark.parametrize("key", memory.CONTENDERS)
def test_memory_is_measured_and_the_result_checked(key):
    found = memory.measure(key, queries=96)
    assert found["peak_bytes"] >= found["before_bytes"] > 0


def test_memory_of_a_wrong_result_is_not_given(monkeypatch):
    wrong = Contender("wrong", lambda **x: 1.001 * EAGER["routed_attention"](**x), EAGER["routed_attention"])
    monkeypatch.setitem(memory.CONTENDERS, "fused", wrong)
    assert set(memory.measure("fused", queries=96)) == {"failure"}


def first_steps(**changed):
    steps = {name: {"loss": 2.0, "gradient_norm": 3.0} for name in train_step.CONTENDERS}
    steps[train_step.OURS] |= changed
    return steps


def test_train_steps_must_agree_before_they_are_timed():
    assert train_step.disagreement(first_steps()) is None
    assert "loss" in train_step.disagreement(first_steps(loss=2.01))
    assert "gradient_norm" in train_step.disagreement(first_steps(gradient_norm=float("nan")))


def test_levels_must_agree_before_they_are_timed():
    first = {level: {"loss": 2.0, "gradient_norm": 3.0} for level in memory_levels.TIMED}
    assert memory_levels.disagreement(first) is None
    assert memory_levels.disagreement(first | {"lean": {"loss": 2.01, "gradient_norm": 3.0}}).startswith("lean: loss")
    assert "tight" in memory_levels.disagreement(first | {"tight": {"loss": 2.0, "gradient_norm": float("nan")}})


def test_levels_are_timed_over_fused_and_the_targets_are_for_half_the_size(monkeypatch):
    class Steps:
        def __init__(self, module, choices):
            self.level = choices["memory"]

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def answer(self):
            return {"loss": 2.0, "gradient_norm": 3.0, "before_bytes": 10}

        def ask(self, question):
            seconds = {"fused": 1.0, "lean": 1.04, "tight": 1.3, "min": 1.3}[self.level]
            return {"seconds": seconds} if question == "step" else {"peak_bytes": 20}

    monkeypatch.setattr(worker, "Worker", Steps)
    result = memory_levels.measured("tiny", 1, memory_levels.IMAGES[0], seconds=0)
    assert {level: each["target_met"] for level, each in result["levels"].items()} == {
        "fused": None, "lean": True, "tight": False, "min": None,
    }  # fmt: skip
    table = memory_levels.table(result)
    assert "at most 1.05: met" in table and "at most 1.2: MISSED" in table
    assert "at most" not in memory_levels.table(memory_levels.measured("tiny", 1, (64, 64), seconds=0))


def test_precision_is_that_of_the_last_evaluation(tmp_path):
    records = [
        {"kind": "epoch", "epoch": 0, "step": 10, "AP": 0.5, "AP50": 0.7},
        {"kind": "step", "epoch": 1, "step": 15, "loss": 1.0},
        {"kind": "epoch", "epoch": 1, "step": 20, "AP": 0.4, "AP50": 0.6},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    sentence = train_step.precision(tmp_path)
    assert "AP 0.400, AP50 0.600 after 20 steps (best AP 0.500, AP50 0.700)" in sentence
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="no evaluation"):
        train_step.precision(tmp_path)


LEAST = {
    "commit": "0123456789abcdef",
    "dirty": True,
    "date": "2026-01-02T03:04:05+00:00",
    "versions": {"torch": "2.13.0"},
    "device": {"cpu": "a processor", "threads": 2, "simd_level": "avx2"},
}


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """Some of `pytest benchmarks`, saved and then compared with."""
    folder = tmp_path_factory.mktemp("suite")
    written = folder / "ops.json"
    chosen = ["-k", "query_similarity and 300 or add_layer_norm and 900 or (rfdetr and fused and not backward)"]
    command = [sys.executable, "-m", "pytest", "benchmarks", "-q", *chosen, "-p", "no:cacheprovider"]
    command += ["--benchmark-storage", str(folder / "saved")]
    for options in ([f"--benchmark-json={written}", "--benchmark-save=first"], ["--benchmark-compare"]):
        done = subprocess.run(
            [*command, *options], cwd=ROOT, capture_output=True, text=True,
            env={name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_"))},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
    return written, done.stdout


def test_suite_of_pytest_benchmark_has_groups_ratios_and_reasons(suite):
    written, printed = suite
    content = json.loads(written.read_text())
    groups = {each["group"] for each in content["benchmarks"]}
    assert {"query_similarity, B 2 N 300, forward", "add_layer_norm, B 1 N 900, forward + backward"} <= groups
    for each in content["benchmarks"]:
        info, stats = each["extra_info"], each["stats"]
        assert each["group"] == f"{info['op']}, {info['case']}, {info['pass']}" and stats["min"] > 0
        assert (info["contender"] == OURS) == ("our_time_over_its" not in info)
    reasons = {(each["op"], each["contender"]): each["unavailable"] for each in content["not_timed"]}
    assert "as many points" not in "".join(reasons.values())
    assert any(name.startswith(contenders.DEFORMOPS) for _, name in reasons)
    assert "(0001_first)" in printed  # compared with


def test_tables_come_from_the_json_of_the_suite(suite):
    results = report.read(suite[0])
    content = json.loads(suite[0].read_text())
    for row in results["speed"]:
        assert next(iter(row["contenders"])) == OURS
    timed = [each for row in results["speed"] for each in row["contenders"].values() if "milliseconds" in each]
    assert len(timed) == len(content["benchmarks"])
    page = report.text(results)
    assert f"commit {content['commit'][:12]}" in page and "not available" in page and "sum and layer_norm" in page


def test_clock_of_the_suite_shows_each_sample():
    clock, found = test_ops.Clock(), []
    clock.set([0.25, 0.5])
    for _ in range(2):
        clock.rewind()
        start = clock()
        clock.advance()
        found.append(clock() - start)
    assert found == [0.25, 0.5]


def test_disabled_benchmarks_are_verified_alone():
    row, samples = measured(small_case(EAGER_FORM), torch.device("cpu"), None)
    assert row["contenders"] == {OURS: {}, "eager": {}} and samples == {}


@pytest.mark.parametrize("name", DETECTORS)
def test_shapes_of_other_detectors_are_measured_everywhere(name):
    for device in ("cpu", "cuda"):
        found = [case for case in cases(device) if case.name.startswith(name)]
        assert {(case.op, case.backward) for case in found} == {
            (op, backward) for op in ("ms_deform_attn", "ms_deform_attn_fused") for backward in (False, True)
        }


def test_concatenation_is_attention_with_an_ungated_bias():
    arguments = routed_attention_arguments()
    taken = contenders.FLASH_BIAS.taken(arguments)
    row = row_of(small_case(contenders.FLASH_BIAS))
    assert set(taken) == {"query", "key", "value", "sup_q", "sup_k"}
    assert "milliseconds" in row["contenders"][contenders.FLASH_BIAS.name], row["contenders"]


@pytest.mark.parametrize("contender", [contenders.TRIANGLE, contenders.FLEX_LOOKED_UP], ids=lambda each: each.name)
def test_contenders_that_need_a_gpu_say_so(contender):
    row = row_of(small_case(contender))
    assert set(row["contenders"][contender.name]) == {"unavailable"}


def test_peers_say_why_they_are_not_there():
    arguments = Sampling(((4, 6), (2, 3)), 1, 5, near=False, points=(3, 1)).arguments(False)[0]
    for contender in contenders.PEERS:
        with pytest.raises(Unavailable, match="as many points"):
            contender.call(**arguments)
    with pytest.raises(Unavailable, match="package nowhere cannot be imported"):
        contenders.package("package nowhere", "no_such_package")


def test_report_draws_and_fills_the_marked_section(tmp_path):
    row = row_of(small_case(EAGER_FORM))
    held = {"op": "routed_attention", "case": "B 1 N 96", "pass": "forward + backward", "contender": OURS}
    held |= {"failure": None, "target_bytes": 10, "target_met": False, "peak_bytes": 20_000_000, "before_bytes": 10}
    results = {**LEAST, "speed": [row], "memory": [held]}
    report.draw(results, tmp_path)
    assert all((tmp_path / picture).stat().st_size > 1000 for picture in report.PICTURES)
    section = report.readme_section(results, "results.json")
    page = report.fill(f"before {report.BEGIN} old {report.END} after", section)
    assert page == f"before {section} after"
    for part in ("commit 0123456789ab with changes", "](results.json)", "20 MB", "MISSED"):
        assert part in section
    with pytest.raises(ValueError, match="marks"):
        report.fill("no marks", section)
