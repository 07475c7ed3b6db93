"""Parts of a page that the tests of README and docs read: its code blocks, what they need, its links."""

import ast
import builtins
import re
import shlex
import symtable
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROVIDED = {"MultiScaleDeformableAttention"}
"""Packages that exist once our integration has been imported."""

NAMED_AS_THEIR_PACKAGE = {"transformers", "rfdetr", "mmcv", "ultralytics", "detrex"}
"""Integrations whose apply() needs the package of the same name."""


NEEDED_PART = {"mmcv": "mmcv._ext"} if find_spec("mmcv") else {}
"""The part of a package that an installation may lack and a block needs."""


def blocks(language, page):
    """The fenced blocks of a page's text in one language."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    return [text for kind, text in fenced if kind == language]


def commands(page):
    """Every line of the bash blocks, as words; a backslash at its end joins it with the next."""
    lines = (line for block in blocks("bash", page) for line in block.replace("\\\n", " ").splitlines())
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def imports(code):
    """The import statements of a block, wherever they stand."""
    return [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import | ast.ImportFrom)]


def missing_packages(code):
    """Packages that a block, or an integration in it, imports and this environment does not have."""
    modules = [
        name
        for node in imports(code)
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    ]
    packages = {module.split(".")[0] for module in modules} - PROVIDED
    packages |= NAMED_AS_THEIR_PACKAGE & set(re.findall(r"integrations\.(\w+)", code))
    return sorted(package for package in packages if find_spec(NEEDED_PART.get(package, package)) is None)


def names_of_the_reader(code):
    """Names that a block uses and does not define: `model`, which is the reader's."""
    table = symtable.symtable(code, "block", "exec")
    defined = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_assigned() or symbol.is_imported()}

    def used(scope):
        for symbol in scope.get_symbols():
            if symbol.is_referenced() and (scope is table or symbol.is_global()):
                yield symbol.get_name()
        for inner in scope.get_children():
            yield from used(inner)

    return sorted(set(used(table)) - defined - set(dir(builtins)))


def dead_links(page):
    """The links of a page, given by its path, to files that do not exist."""
    text = re.sub(r"^```.*?^```$|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text)
    return [t for t in targets if not t.startswith("https://") and not (page.parent / t).exists()]
