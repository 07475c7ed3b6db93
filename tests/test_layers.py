"""Who imports whom: ARCHITECTURE's "Who may know whom", read from every import, those inside functions included."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHIPS = ("route_kernels", "route_detr")
GROUND = ("route_kernels.precision", "route_kernels.graphs", "route_kernels.boxes")
"""Dtypes of sums, marks for the compiler, overlaps of boxes: what all layers may know."""

MAY_KNOW = {  # a package or module: what of ours it may import beside itself and `GROUND`
    "route_kernels": ["route_kernels"],
    "route_kernels.reference": [],
    "route_kernels.eager": [],
    "route_kernels.triton": [],
    "route_kernels.native": [],
    "route_kernels.cuda": ["route_kernels.native"],
    "route_kernels.backends": [
        *("route_kernels.reference", "route_kernels.eager", "route_kernels.triton"),
        *("route_kernels.native", "route_kernels.cuda"),
    ],
    "route_kernels.ops": [
        *("route_kernels.backends", "route_kernels.reference", "route_kernels.eager"),
        "route_kernels.triton.availability",
    ],
    "route_kernels.recompute": ["route_kernels.backends"],
    "route_kernels.nn": ["route_kernels.ops", "route_kernels.recompute", "route_kernels.backends"],
    "route_kernels.integrations": ["route_kernels.ops", "route_kernels.nn", "route_kernels.backends"],
    "route_kernels.doctor": ["route_kernels.integrations", "route_kernels.ops", "route_kernels.backends"],
    "route_detr": ["route_detr", "route_kernels"],
    "route_detr.model": ["route_kernels"],
    "benchmarks": ["benchmarks", "route_kernels", "route_detr"],
}
OF_TESTS = ("route_kernels.testing", "benchmarks", "tests")
"""No module that ships imports these."""

EXCEPTIONS = {  # (importer, imported), packages or modules: left over, to shrink to the first two
    ("route_kernels.verify", "route_kernels.testing"): "a test that ships: it alone, imported inside a function",
    ("route_kernels.triton.block_sizes", "route_kernels"): "the version, inside a function",
}


@cache
def modules():
    """Modules of both packages and the benchmarks: {name: file}."""
    paths = (path for package in (*SHIPS, "benchmarks") for path in sorted((ROOT / package).rglob("*.py")))
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}
    return {name.removesuffix(".__init__"): path for name, path in names.items()}


@cache
def imports(importer):
    """[(imported, whether inside a function)] of a module: modules of ours, as far as their names say."""
    path = modules()[importer]
    tree = ast.parse(path.read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    inside = {id(node) for function in functions for node in ast.walk(function)}
    of_types = {id(node) for test in ast.walk(tree) if _for_types(test) for node in ast.walk(test)}
    package = importer if path.name == "__init__.py" else importer.rpartition(".")[0]
    found = []
    for node in ast.walk(tree):
        if id(node) in of_types:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            whole = [f"{base}.{alias.name}" for alias in node.names]
            names = [name if name in modules() else base for name in whole]
        else:
            continue
        found += [(name, id(node) in inside) for name in names]
    ours = (*SHIPS, "benchmarks", "tests")
    return [(name, within) for name, within in found if name.split(".")[0] in ours]


def _for_types(node):
    """Whether it is an `if TYPE_CHECKING:`, which imports nothing."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def within(name, package):
    return name == package or name.startswith(f"{package}.")


def _is(pair, importer, imported):
    return within(importer, pair[0]) and (imported == pair[1] or ("." in pair[1] and within(imported, pair[1])))


def edges():
    """(importer, imported, whether inside a function), but for `EXCEPTIONS`."""
    for importer in modules():
        for imported, inside in imports(importer):
            if not any(_is(pair, importer, imported) for pair in EXCEPTIONS):
                yield importer, imported, inside


def shipped():
    """The edges of everything that ships."""
    return [edge for edge in edges() if not any(within(edge[0], package) for package in OF_TESTS)]


def test_who_may_know_whom():
    wrong = []
    for importer, imported, _ in shipped():
        layer = max((layer for layer in MAY_KNOW if within(importer, layer)), key=len)
        if not any(within(imported, known) for known in (layer, *GROUND, *MAY_KNOW[layer])):
            wrong.append(f"{importer} imports {imported}")
    assert not wrong, "\n".join(wrong)


def test_what_ships_imports_nothing_of_the_tests():
    assert [edge for edge in shipped() if any(within(edge[1], package) for package in OF_TESTS)] == []


def test_the_ground_knows_nothing_of_ours():
    assert [edge for edge in shipped() if edge[0] in GROUND] == []


def test_tools_are_imported_by_the_command_line_alone_inside_a_function():
    tools = "route_detr.tools"
    users = {(importer, inside) for importer, imported, inside in shipped() if within(imported, tools)}
    assert {user for user in users if not within(user[0], tools)} <= {("route_detr.cli", True)}


def test_no_circles():
    """Not even through imports inside functions."""
    knows = {importer: set() for importer in modules()}
    for importer, imported, _ in edges():
        if imported in knows and imported != importer:
            knows[importer].add(imported)
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            path.append(name)
            for other in sorted(knows[name]):
                visit(other)
            done.add(path.pop())

    for name in knows:
        visit(name)


@pytest.mark.parametrize("pair", EXCEPTIONS, ids=" imports ".join)
def test_the_exceptions_are_still_needed(pair):
    assert any(_is(pair, importer, imported) for importer in modules() for imported, _ in imports(importer))


def test_imports_inside_functions_are_read():
    assert ("route_kernels.doctor", True) in imports("route_kernels.cli")
    assert ("route_kernels.backends", False) in imports("route_kernels")
