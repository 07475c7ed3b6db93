"""`python -m route_kernels.shim`: a script that needs the compiled extension runs as under plain python."""

import json
import os
import subprocess
import sys

import pytest

from route_kernels import shim
from route_kernels.integrations import deformable_detr

SCRIPT = """
import importlib, json, sys
import {neighbour}
import MultiScaleDeformableAttention as MSDA
import torch

value = torch.ones(3, 4, 1, 2)
arguments = torch.tensor([[2, 2]]), torch.tensor([0]), torch.full((3, 1, 1, 1, 1, 2), 0.5), torch.ones(3, 1, 1, 1, 1)
output = MSDA.ms_deform_attn_forward(value, *arguments, 2)
grad = MSDA.ms_deform_attn_backward(value, *arguments, output, 2)[0]
print(json.dumps({{
    "argv": sys.argv[1:], "name": __name__, "file": __file__, "path": sys.path[0], "neighbour": {neighbour}.ANSWER,
    "mmcv": type(importlib.import_module("mmcv._ext")).__name__,
    "output": output.flatten().tolist(), "grad": grad.sum().item(), "main": sys.modules["__main__"].__file__,
}}))
"""

WORKER = """
import multiprocessing
import MultiScaleDeformableAttention as MSDA

def work(_):
    return MSDA.ms_deform_attn_forward.__module__

if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.map(work, [0])[0])
"""


def run(*arguments, cwd, prefix=("-m", "route_kernels.shim")):
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *prefix, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture
def project(tmp_path):
    """A script beside a module that it imports, in a folder that is not the working directory; an uncompiled mmcv."""
    folder = tmp_path / "project"
    (folder / "package").mkdir(parents=True)
    (folder / "mmcv").mkdir()
    (folder / "mmcv" / "__init__.py").write_text("")
    (folder / "beside.py").write_text("ANSWER = 42\n")
    (folder / "main.py").write_text(SCRIPT.format(neighbour="beside"))
    (folder / "package" / "__init__.py").write_text("import MultiScaleDeformableAttention\n")
    (folder / "package" / "train.py").write_text(SCRIPT.format(neighbour="beside"))
    (folder / "worker.py").write_text(WORKER)
    return folder


def test_a_script_sees_what_it_would_under_python(project, tmp_path):
    finished = run("project/main.py", "--lr", "1e-4", "-m", cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    seen = json.loads(finished.stdout)
    assert seen == {
        "argv": ["--lr", "1e-4", "-m"], "name": "__main__", "file": "project/main.py", "path": str(project),
        "neighbour": 42, "mmcv": "StandIn", "output": [1.0] * 6, "grad": 6.0, "main": "project/main.py",
    }  # fmt: skip


def test_a_module(project):
    finished = run("-m", "package.train", "--lr", "1e-4", cwd=project)
    assert finished.returncode == 0, finished.stderr
    seen = json.loads(finished.stdout)
    file = str(project / "package" / "train.py")
    assert (seen["argv"], seen["name"], seen["file"]) == (["--lr", "1e-4"], "__main__", file)
    assert seen["path"] == str(project)


def test_a_module_that_is_there_and_imports_what_is_not(project):
    (project / "package" / "__init__.py").write_text("import nothing_of_that_name\n")
    finished = run("-m", "package.train", cwd=project)
    assert finished.returncode == 1
    assert finished.stderr.endswith("ModuleNotFoundError: No module named 'nothing_of_that_name'\n")


def test_spawned_workers_find_the_extension(project):
    finished = run("worker.py", cwd=project)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == "route_kernels.integrations.extension\n"


def test_without_the_shim_there_is_no_extension(project):
    finished = run(project / "main.py", cwd=project, prefix=())
    assert finished.returncode == 1
    assert "No module named 'MultiScaleDeformableAttention'" in finished.stderr


def test_the_exit_status_and_the_error_are_the_scripts(project):
    (project / "stops.py").write_text("raise SystemExit(7)\n")
    (project / "fails.py").write_text("import sys\nsys.exit(1 / 0)\n")
    assert run("stops.py", cwd=project).returncode == 7
    failed = run("fails.py", cwd=project)
    assert failed.returncode == 1
    assert failed.stderr.endswith("ZeroDivisionError: division by zero\n")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "expected a script or -m MODULE"),
        (["missing.py"], "missing.py is not a file"),
        (["-m"], "-m: expected the name of a module"),
        (["-m", "missing.module"], "-m: no module named missing.module"),
        (["--verbose", "main.py"], "unknown option --verbose"),
    ],
)
def test_wrong_usage(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["shim"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert shim.main(arguments) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"route_kernels.shim: {message}")
    assert errors.endswith(f"{shim.USAGE}\n")
    deformable_detr.revert()


def test_help(capsys):
    assert shim.main(["--help"]) is None
    assert shim.USAGE in capsys.readouterr().out
