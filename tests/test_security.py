"""No file that a user gives runs code when it is read: SECURITY.md."""

import ast
import os
from pathlib import Path

import pytest
import torch

from route_detr.run import CheckpointError, load_checkpoint
from route_detr.tools.importing import _torch_file

ROOT = Path(__file__).parents[1]
FILES = [path for package in ("route_kernels", "route_detr") for path in sorted((ROOT / package).rglob("*.py"))]
UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
RUNNING = {"eval", "exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system"}


def dotted(node):
    """ "torch.load" of such an expression, else "."."""
    if isinstance(node, ast.Name):
        return node.id
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else "."


def dangers(source):
    """The lines of a module that unpickle, or run what they read."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            if UNPICKLERS & {name.split(".")[0] for name in names}:
                yield node.lineno, "import of an unpickler"
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            given = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
            if name == "torch.load" and given.get("weights_only") is not True:
                yield node.lineno, "torch.load without weights_only=True"
            if name in RUNNING or given.get("allow_pickle") or given.get("trust_remote_code"):
                yield node.lineno, name


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_that_ships_unpickles(path):
    assert list(dangers(path.read_text())) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "import torch\ntorch.load(file)",
        "torch.load(file, weights_only=False)",
        "np.load(file, allow_pickle=True)",
        "yaml.load(text)",
        "eval(text)",
    ],
)
def test_the_search_finds(source):
    assert len(list(dangers(source))) == 1


class Runs:
    """An object whose unpickling makes a folder."""

    def __init__(self, path):
        self.path = os.fspath(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("read, error", [(load_checkpoint, CheckpointError), (_torch_file, ValueError)])
def test_a_file_that_would_run_code_is_refused(read, error, tmp_path):
    torch.save({"model": {"weight": torch.zeros(2)}, "more": Runs(tmp_path / "ran")}, tmp_path / "file.pt")
    with pytest.raises(error):
        read(tmp_path / "file.pt")
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "file.pt", weights_only=False)
    assert (tmp_path / "ran").exists()
