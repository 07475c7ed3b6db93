"""Adding an op touches the files that CONTRIBUTING lists, at most 14, and no other."""

import re
from pathlib import Path

import pytest

from route_kernels.backends import OPS

ROOT = Path(__file__).parents[1]
MOST = 14
FOLDERS = ("benchmarks", "csrc", "examples", "route_detr", "route_kernels", "tests")
FILES = ("setup.py", "pyproject.toml", "constraints.txt", "Makefile")
READ = {".py", ".cpp", ".h", ".cuh", ".cu", ".toml", ".txt"}
USERS = ("route_detr", "route_kernels/nn", "route_kernels/integrations")
"""Who calls ops. Tests of other ops and of layers are users as well: all but test_<op>.py."""


def listed(op):
    """The files of CONTRIBUTING's table."""
    section = (ROOT / "CONTRIBUTING.md").read_text().partition("## Add an op")[2].partition("\n## ")[0]
    return {path.replace("<op>", op) for path in re.findall(r"^\| `([^`]+)` \|", section, flags=re.M)}


def naming(op, root=ROOT):
    """Every file of the tree that names the op or is named so, but for users, pages and results."""
    files = [root / name for name in FILES]
    files += [path for folder in FOLDERS for path in (root / folder).rglob("*") if path.suffix in READ]
    found = set()
    for file in files:
        path = file.relative_to(root).as_posix()
        of_another_test = path.startswith("tests/") and path != f"tests/test_{op}.py"
        if of_another_test or path.startswith(USERS) or "__pycache__" in path or not file.is_file():
            continue
        if op in path or op in file.read_text():
            found.add(path)
    return found


@pytest.mark.parametrize("op", ["add_layer_norm", "query_similarity", "sigmoid_focal_loss"])
def test_an_op_is_named_in_the_files_that_contributing_lists(op):
    assert op in OPS
    assert naming(op) == listed(op) and 10 <= len(listed(op)) <= MOST


def test_a_file_that_is_not_listed_is_found(tmp_path):
    for path in ("benchmarks/more.py", "csrc/more/cpu.cpp", "route_kernels/new.py", "setup.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("OPS = ['new_op']")
    (tmp_path / "route_kernels/nn").mkdir()
    (tmp_path / "route_kernels/nn/layer.py").write_text("new_op")
    assert naming("new_op", tmp_path) == {"benchmarks/more.py", "csrc/more/cpu.cpp", "route_kernels/new.py", "setup.py"}


def test_no_test_lists_the_ops():
    """A table of ops in a test would be one more file to touch: they are generated from the list."""
    of_all = re.compile("|".join(rf"[\"']{op}[\"']:" for op in OPS))
    for path in (ROOT / "tests").glob("*.py"):
        keys = {key for key in of_all.findall(path.read_text())}
        assert len(keys) < len(OPS), path.name
