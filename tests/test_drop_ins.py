"""The figures of the drop-ins do not lie: sides that differ are not timed, what ran and what is missing is said."""

import dataclasses
import io
import json
import sys

import pytest
import torch
from integration_checks import align_corners_mistaken

from benchmarks import drop_in_step, drop_ins, report, worker
from benchmarks.codebases import BEFORE, CODEBASES, Codebase, _applying
from benchmarks.registry import Unavailable
from benchmarks.research_code import DeformableTransformer, published
from route_kernels.doctor.fitting import applied
from route_kernels.integrations import deformable_detr


@pytest.fixture(autouse=True)
def modules_as_before():
    """`models.bricks...` of one test is not found by the next."""
    before = dict(sys.modules)
    yield
    for name in sys.modules.keys() - before.keys():
        if name.split(".")[0] == "models":
            del sys.modules[name]


class InThisProcess:
    """A `Worker` that takes its steps here."""

    def __init__(self, module, choices):
        assert module == "drop-in-step"
        codebase = CODEBASES[choices["key"]]
        self.model, self.arguments = codebase.built(choices["side"])
        self.appliers = [] if choices["after"] is None else codebase.afters[choices["after"]](self.model)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def answer(self):
        return {**self.ask("step"), "before_bytes": 10_000_000}

    def ask(self, question):
        if question == "peak":
            return {"peak_bytes": 30_000_000}
        with applied(self.appliers):
            return drop_in_step.step(self.model, self.arguments)


def tiny_transformer(side):
    model = DeformableTransformer(queries=5, classes=3, layers=1, channels=32, hidden=8)
    features = [torch.randn(1, width, size, side) for width, size in ((512, 3), (1024, 2), (2048, 1), (2048, 1))]
    return model, {"features": features, "labels": torch.randint(0, 3, (1, 5)), "boxes": torch.rand(1, 5, 4)}


TINY = Codebase(
    "research code", "a tiny one", "1 image, {side} x {width}", tiny_transformer,
    {
        "route_kernels.shim": _applying("deformable_detr", to_model=False),
        "apply(model)": _applying("deformable_detr"),
    },
    side=4, quick_side=4,
)  # fmt: skip


@pytest.fixture(autouse=True)
def no_extension_provided_beforehand():
    deformable_detr.revert()  # which another test file may have applied


@pytest.fixture
def measured(monkeypatch):
    """The row of a codebase, steps taken in this process."""

    def row(codebase):
        monkeypatch.setitem(CODEBASES, "tiny", codebase)
        monkeypatch.setattr(worker, "Worker", InThisProcess)
        return drop_ins.measured("tiny", codebase.side, seconds=0)

    return row


def assert_not_timed(row):
    assert row["contenders"] == {} and "milliseconds" not in json.dumps(row)
    (cells,) = report.drop_in_cells([row])
    assert len(cells) == len(report.DROP_INS_HEAD) and not any(" ms" in cell for cell in cells)


def test_row_has_both_sides_and_what_ran(measured):
    row = measured(TINY)
    assert row["failure"] is None and row["unavailable"] is None and row["inputs"] == "1 image, 4 x 6"
    assert {name: agreed["calls"] for name, agreed in row["agreement"].items()} == {
        "route_kernels.shim": {"ms_deform_attn": 2},
        "apply(model)": {"ms_deform_attn_fused": 2},
    }
    for agreed in row["agreement"].values():
        assert agreed["gradients"] > 30 and 0 < agreed["largest_relative_error"] < 1e-10
    assert list(row["contenders"]) == [BEFORE, *TINY.afters]
    for contender in row["contenders"].values():
        times = contender["milliseconds"]
        assert 0 < times["min"] <= times["median"] <= times["max"] and contender["rounds"] >= 5
    assert row["contenders"][BEFORE]["its_time_over_before"] == {"median": 1, "min": 1, "max": 1}
    cells = report.drop_in_cells([row])
    assert [line[3] for line in cells] == ["`route_kernels.shim`", "`apply(model)`"]
    assert all(line[-2:] == ["20 MB", "20 MB"] for line in cells)
    assert published.EXTENSION not in sys.modules


def test_sides_that_differ_are_not_timed(measured):
    with align_corners_mistaken():
        row = measured(TINY)
    assert "relative error" in row["failure"]
    assert_not_timed(row)


def test_nothing_that_ran_is_nothing_to_time(measured):
    row = measured(dataclasses.replace(TINY, afters={"nothing": lambda model: []}))
    assert row["failure"] == "nothing: calls {} of our ops, before {}"
    assert_not_timed(row)


def test_step_that_raises_is_told(measured):
    row = measured(dataclasses.replace(TINY, build=lambda side: (torch.nn.Linear(3, 2), (torch.ones(1, 4),))))
    assert row["failure"].startswith("raises mat1 and mat2")
    assert_not_timed(row)


def test_missing_package_is_named_and_left_out_of_the_readme(measured):
    def build(side):
        raise Unavailable("no such package here")

    row = measured(dataclasses.replace(TINY, build=build))
    assert row["unavailable"] == "no such package here" and row["failure"] is None
    assert_not_timed(row)
    assert "no such package here" in report.text({**CIRCUMSTANCES, "codebases": [row]})
    assert "a tiny one" not in report.readme_section({**CIRCUMSTANCES, "codebases": [row]}, "x.json")


def test_processes_must_compute_the_same_before_they_are_timed():
    agreed = {"apply(model)": {"calls": {"ms_deform_attn_fused": 2}}}
    first = {BEFORE: {"loss": 2.0, "calls": {}}, "apply(model)": {"loss": 2.0, "calls": {"ms_deform_attn_fused": 2}}}
    assert drop_ins.disagreement(first, agreed) is None
    for wrong in ({"loss": 2.01}, {"loss": float("nan")}, {"calls": {}}):
        changed = {**first, "apply(model)": first["apply(model)"] | wrong}
        assert drop_ins.disagreement(changed, agreed).startswith("apply(model): ")
    assert drop_ins.disagreement({**first, BEFORE: {"loss": 2.0, "calls": {"x": 1}}}, agreed).startswith(
        "before: calls"
    )


@pytest.mark.parametrize("key", CODEBASES)
def test_codebase_takes_the_same_step_before_and_after(key):
    codebase = CODEBASES[key]
    try:
        model, arguments = codebase.built(codebase.quick_side)
    except Unavailable as reason:
        pytest.skip(str(reason))
    first = {BEFORE: drop_in_step.step(model, arguments)}
    agreed = {}
    for after, appliers in codebase.afters.items():
        with applied(appliers(model)) as reports:
            first[after] = drop_in_step.step(model, arguments)
        agreed[after] = {"calls": first[after]["calls"]}
        assert first[after]["calls"] and all(each.replaced and not each.left for each in reports)
    assert drop_ins.disagreement(first, agreed) is None


def test_worker_is_a_process_of_its_own():
    choices = {"key": "research_code", "after": "route_kernels.shim", "side": 32}
    with worker.Worker("drop-in-step", choices) as process:
        first, second, peak = process.answer(), process.ask("step"), process.ask("peak")
        assert first["calls"] == second["calls"] == {"ms_deform_attn": 12}
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-5)
        assert peak["peak_bytes"] > first["before_bytes"] > 0
    assert process.process.returncode == 0
    assert published.EXTENSION not in sys.modules


def test_process_that_ends_is_an_error():
    with worker.Worker("no-such-command", {}) as process, pytest.raises(RuntimeError, match="ended with 2"):
        process.answer()


def test_answers_are_lines_of_json(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("step\npeak\n"))
    answers = io.StringIO()
    worker.serve(lambda: {"loss": 1.5}, answers)
    first, step, peak = map(json.loads, answers.getvalue().splitlines())
    assert first["loss"] == 1.5 and first["before_bytes"] > 0
    assert step == {"loss": 1.5} and peak["peak_bytes"] >= first["before_bytes"]


CIRCUMSTANCES = {
    "commit": "0123456789abcdef",
    "dirty": False,
    "date": "2026-01-02T03:04:05+00:00",
    "versions": {"torch": "2.13.0"},
    "device": {"cpu": "a processor", "threads": 2, "simd_level": "avx2"},
}


def test_readme_section_of_the_drop_ins_is_filled_and_the_other_stays(measured):
    results = {**CIRCUMSTANCES, "codebases": [measured(TINY)]}
    section = report.readme_section(results, "drop_ins.json")
    page = f"{report.BEGIN} a {report.END} b {report.DROP_INS_BEGIN} old {report.DROP_INS_END} c"
    filled = report.fill(page, section)
    assert filled == f"{report.BEGIN} a {report.END} b {section} c"
    for part in ("commit 0123456789ab", "](drop_ins.json)", "| a tiny one | 1 image, 4 x 6 | `apply(model)` |"):
        assert part in section
    with pytest.raises(ValueError, match=r"marks .*drop-ins: begin"):
        report.fill(f"{report.BEGIN} a {report.END}", section)
