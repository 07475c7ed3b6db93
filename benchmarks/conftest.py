"""The suite of pytest-benchmark: a device to choose, where figures come from, and what has no time, in its JSON."""

from __future__ import annotations

import pytest
import torch

from .device import circumstances
from .registry import cases
from .test_ops import NOT_TIMED, PEAKS


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where the ops run [%(default)s]")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each contender of each case, those of a case one after the other: they are timed together."""
    if "contender" in metafunc.fixturenames:
        metafunc.parametrize(
            ("case", "contender"),
            [
                pytest.param(
                    case, contender.name, id=f"{case.op}, {case.name}, {case.passes}: {contender.name}",
                    marks=[pytest.mark.quick] if case.quick else [],
                )
                for case in cases(metafunc.config.getoption("--device"))
                for contender in case.contenders
            ],
        )  # fmt: skip


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    chosen = torch.device(pytestconfig.getoption("--device"))
    if chosen.type == "cuda" and not torch.cuda.is_available():
        pytest.exit(f"--device cuda: PyTorch {torch.__version__} finds no GPU", returncode=2)
    return chosen


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, object]:
    """Versions and device, without what differs from run to run: `--benchmark-compare` looks at it."""
    found = circumstances()
    device = {name: value for name, value in found["device"].items() if name != "load_average"}
    return {"versions": found["versions"], "device": device}


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list, output_json: dict) -> None:
    """The rest of a result file: rows of memory, and the contenders without a time."""
    found = circumstances()
    output_json |= {name: found[name] for name in ("commit", "dirty", "date")}
    output_json |= {"load_average": found["device"]["load_average"], "memory": PEAKS, "not_timed": NOT_TIMED}
