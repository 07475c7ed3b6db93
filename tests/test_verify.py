"""`route-kernels verify` passes here, and finds each kind of broken promise."""

import json

import pytest
import torch

import route_kernels as rk
from route_kernels import native, verify
from route_kernels.backends import OPS, PRODUCTS, requested_backend
from route_kernels.cli import main

pytestmark = pytest.mark.skipif(native.load_error is not None, reason=str(native.load_error))
OP = "query_similarity"
CPU = torch.device("cpu")


@pytest.fixture
def one_op(monkeypatch):
    """Verify runs one op, small and odd."""
    monkeypatch.setattr(verify, "OPS", (OP,))
    monkeypatch.setattr(verify, "PRODUCTS", ("add_linear",))
    monkeypatch.setattr(verify, "sizes", lambda op, backend: [{}])


def broken_by(fault, monkeypatch):
    """The broken promises of a row of the op with `fault` in its output on the CPU kernels."""
    sound = getattr(rk, OP)
    monkeypatch.setattr(
        rk, OP, lambda **given: fault(sound(**given)) if requested_backend() == "cpu" else sound(**given)
    )
    broken = verify.examined(OP, "cpu", torch.float32, CPU)["broken"]
    return [promise for promise, faults in broken.items() if faults]


def test_every_op_and_dtype_is_examined(monkeypatch):
    monkeypatch.setattr(verify, "examined", lambda *row: row)
    found = {(op, backend, dtype) for op, backend, dtype, _ in verify.rows([CPU])}
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    assert {(op, "reference", dtype) for op in OPS for dtype in dtypes} <= found
    assert {(op, "pytorch", dtype) for op in PRODUCTS for dtype in dtypes} <= found


def test_it_passes_here_and_writes_what_it_found(one_op, tmp_path, capsys):
    assert main(["verify", "--json", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["passed"] and found["versions"]["torch"] == torch.__version__ and found["threads"] >= 1
    assert {row["op"] for row in found["rows"]} == {OP, "add_linear"}
    assert all(0 <= row["error"] <= 1 for row in found["rows"])
    assert f"{len(found['rows'])} of {len(found['rows'])} hold" in capsys.readouterr().out


def test_a_wrong_result_is_found_and_said(one_op, monkeypatch, capsys):
    assert broken_by(lambda output: output + 0.1, monkeypatch) == ["accuracy"]
    assert main(["verify"]) == 1
    assert f"{OP}" in (said := capsys.readouterr().out) and "accuracy: " in said and "RMS error" in said


def test_an_element_that_is_not_written_is_found(one_op, monkeypatch):
    """Deterministic mode fills it with NaN."""

    def unwritten(output):
        return torch.where(torch.arange(output.numel()).view_as(output) == 5, torch.empty_like(output), output)

    assert "accuracy" in broken_by(unwritten, monkeypatch)


def test_other_bits_the_second_time_are_found(one_op, monkeypatch):
    assert broken_by(lambda output: output * (1 + 1e-7 * torch.rand(())), monkeypatch)[0] == "repeats"


def test_other_bits_with_other_threads_are_found(one_op, monkeypatch):
    fault = broken_by(lambda output: output * (1 + 1e-6 * (torch.get_num_threads() == 3)), monkeypatch)
    assert fault == ["threads"]


def test_an_error_is_a_finding(one_op, monkeypatch):
    def fails(output):
        raise RuntimeError("no such kernel")

    assert broken_by(fails, monkeypatch) == ["accuracy"]


def test_modes_are_put_back(one_op):
    before = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    verify.examined(OP, "cpu", torch.float32, CPU)
    assert (torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_option_is_one_line(capsys):
    assert main(["verify", "--gpu"]) == 1
    assert "--gpu: expected a GPU" in capsys.readouterr().out
