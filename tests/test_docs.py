"""The pages of docs/ keep their word: code runs where its packages are installed, links lead somewhere."""

import ast
import json
import os
import subprocess
import sys

import pytest
from markdown_pages import ROOT, blocks, commands, dead_links, imports, missing_packages, names_of_the_reader

from route_kernels.integrations import CODEBASES

PAGES = sorted((ROOT / "docs").glob("*.md"))
RUN = """
import contextlib, json, os, sys, tempfile, traceback
import foreign_packages  # so that torchvision can be imported
with contextlib.suppress(ImportError):
    import route_detr.cli, transformers  # what takes its time, once for all pages

said = {}
for page, blocks in json.load(sys.stdin).items():
    with tempfile.TemporaryFile("w+") as error:
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            try:
                for name, code in blocks:
                    exec(compile(code, name, "exec"), {"__name__": name})
            except BaseException:
                traceback.print_exc(file=error)
                error.flush()
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        error.seek(0)
        said[page] = error.read() or f"ended with {status}" if status else ""
print(json.dumps(said))
"""
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def as_far_as_it_can_run(code):
    """The block; or, where it uses what only the reader has, its imports."""
    return "\n".join(map(ast.unparse, imports(code))) if names_of_the_reader(code) else code


def runnable(page):
    """[name, code] of the blocks of a page whose packages are installed."""
    return [
        (f"{page.name}, block {number}", as_far_as_it_can_run(block))
        for number, block in enumerate(blocks("python", page.read_text()), 1)
        if not missing_packages(block)
    ]


@pytest.fixture(scope="module")
def said():
    """By page, the error of its blocks, or nothing: a process is forked for a page, a block has a fresh namespace."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}
    code = json.dumps({page.name: runnable(page) for page in PAGES})
    done = subprocess.run(
        [sys.executable, "-c", RUN], input=code, env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@each_page
def test_python_blocks_run(page, said):
    code = blocks("python", page.read_text())
    assert code or commands(page.read_text()), "a page shows what to type"
    if not runnable(page):
        pytest.skip(f"not installed: {', '.join({package for block in code for package in missing_packages(block)})}")
    assert not said[page.name], said[page.name]


@each_page
def test_links_lead_somewhere(page):
    assert dead_links(page) == []


@pytest.mark.parametrize("codebase", [*CODEBASES, "add_routing"])
def test_every_codebase_has_a_page(codebase):
    named = [page.name for page in PAGES if page.stem == codebase or f"integrations.{codebase}" in page.read_text()]
    assert named, f"no page in docs/ tells of {codebase}"


def test_a_command_may_go_on_in_the_next_line():
    page = "```bash\nmake demo  # all\nroute-detr train \\\n    --epochs 1\n```\n"
    assert commands(page) == [["make", "demo"], ["route-detr", "train", "--epochs", "1"]]


def test_a_block_is_known_by_what_it_needs():
    assert missing_packages("import torch, not_there.at_all\nfrom nor_this import that") == ["nor_this", "not_there"]
    assert missing_packages("import MultiScaleDeformableAttention") == []
    assert missing_packages("rk.integrations.bricks.apply(model)") == []
    assert names_of_the_reader("import torch\nx = torch.ones(2)\nprint(x, model)") == ["model"]
    assert names_of_the_reader("def f(y):\n    z = y\n    return z + w\n[i for i in range(3)]") == ["w"]
    assert as_far_as_it_can_run("import torch\nwith torch.no_grad():\n    import math\n    model(2)") == (
        "import torch\nimport math"
    )
