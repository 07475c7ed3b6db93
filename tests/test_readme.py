"""The README keeps its word: code runs, commands and options exist, links lead somewhere, figures have their JSON."""

import json
import re
import subprocess
import sys

import pytest
from markdown_pages import ROOT, blocks, commands, dead_links

from benchmarks import report

README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()


def make_targets():
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("code", blocks("python", README), ids=lambda code: code.strip().splitlines()[-1][:40])
def test_python_block_runs_as_it_stands(code):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_there_is_code_to_run():
    assert len(blocks("python", README)) >= 3
    assert ["make", "demo"] in commands(README) and ["make", "test"] in commands(README)


@pytest.mark.parametrize("page", [README, CONTRIBUTING], ids=["README", "CONTRIBUTING"])
def test_make_targets_exist(page):
    named = set(re.findall(r"`make ([\w-]+)", page)) | {words[1] for words in commands(page) if words[0] == "make"}
    assert named
    assert named <= make_targets()


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_to_files_lead_somewhere(page):
    assert dead_links(ROOT / page) == []


def test_named_paths_exist():
    (tree,) = blocks("", README)
    paths = [line.split()[0] for line in tree.splitlines() if line[:1].strip()]
    assert len(paths) >= 6
    assert [path for path in paths if not (ROOT / path.replace("<op>", "routed_attention")).exists()] == []


SECTIONS = {"ops": (report.BEGIN, report.END), "drop-ins": (report.DROP_INS_BEGIN, report.DROP_INS_END)}


def section(begin, end):
    """The text between two marks, the marks included."""
    return README[README.index(begin) : README.index(end)] + end


@pytest.mark.parametrize("marks", SECTIONS.values(), ids=SECTIONS)
def test_figures_are_those_of_the_json_they_link_to(marks):
    if marks[0] not in README:
        pytest.skip(f"the README has no section {marks[0]}")
    linked = re.search(r"\]\((benchmarks/results/[^)]+\.json)\)", section(*marks))
    if linked is None:
        assert not re.search(r"\d ms", section(*marks))
        return
    results = json.loads((ROOT / linked.group(1)).read_text())
    assert results["dirty"] is False
    assert report.readme_section(results, linked.group(1)) == section(*marks)


def test_nothing_is_measured_outside_the_marked_sections():
    rest = README
    for marks in SECTIONS.values():
        if marks[0] in README:
            rest = rest.replace(section(*marks), "")
    assert report.BEGIN not in rest
    assert not re.search(r"\d ms\b|\d times (as fast|faster)", rest)
