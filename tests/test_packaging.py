"""Metadata, entry points and pinned versions fit together."""

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import route_kernels

ROOT = Path(__file__).parents[1]
DISTRIBUTION = "route-kernels"


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def constraints():
    """Name -> [(version, marker), ...] of constraints.txt."""
    pinned = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            match = re.fullmatch(r"([\w.-]+)==([\w.]+)(?:; (.+))?", line)
            assert match, f"not an exact version: {line}"
            name, version, marker = match.groups()
            pinned.setdefault(canonical(name), []).append((version, marker))
    return pinned


def requirements():
    """Everything that the distribution declares, extras included: (name, oldest version)."""
    declared = metadata.requires(DISTRIBUTION)
    names = (re.match(r"([\w.-]+)(?:\[[\w,]+\])?>=([\d.]+)", text) for text in declared if DISTRIBUTION not in text)
    return [(canonical(match.group(1)), match.group(2)) for match in names]


def numbers(version):
    return tuple(int(part) for part in re.findall(r"\d+", version))


def test_versions_agree():
    version = metadata.version(DISTRIBUTION)
    assert route_kernels.__version__ == version
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("command", ["route-kernels", "route-detr"])
def test_entry_points_resolve(command):
    (point,) = metadata.entry_points(group="console_scripts", name=command)
    with pytest.raises(SystemExit) as stop:
        point.load()(["--help"])
    assert stop.value.code == 0


@pytest.mark.parametrize("name, oldest", requirements())
def test_every_dependency_is_pinned_and_not_older_than_declared(name, oldest):
    versions = constraints()[name]
    assert all(numbers(version) >= numbers(oldest) for version, _ in versions)


def test_pins_cover_every_python_once():
    for name, versions in constraints().items():
        markers = sorted(marker or "" for _, marker in versions)
        older, newer = 'python_version < "3.11"', 'python_version >= "3.11"'
        allowed = ([""], [older], [newer], [older, newer])
        assert markers in allowed, name


def test_what_is_installed_here_is_what_is_pinned_when_set_up_by_make():
    if not (ROOT / ".venv" / ".set-up").exists() or Path(sys.prefix) != ROOT / ".venv":
        pytest.skip("not the environment that make sets up")
    here = "<" if sys.version_info < (3, 11) else ">="
    for name, _ in requirements():
        (version,) = (v for v, marker in constraints()[name] if marker is None or here in marker)
        assert metadata.version(name).split("+")[0] == version


def test_build_takes_the_pytorch_that_is_pinned():
    page = (ROOT / "pyproject.toml").read_text()
    (version,) = re.findall(r"\"torch==([\d.]+)\"", page)
    assert constraints()["torch"] == [(version, None)]


def test_license_is_the_declared_one():
    assert metadata.metadata(DISTRIBUTION)["License-Expression"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text


def test_info_says_what_runs_and_why_not():
    done = subprocess.run([sys.executable, "-m", "route_kernels.cli", "info"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for word in ("routed_attention", "reference", "cpu", "triton", "no cuda kernel"):
        assert word in done.stdout


def test_bench_without_a_checkout_says_where_it_is(monkeypatch, tmp_path, capsys):
    from route_kernels import cli

    monkeypatch.setattr(cli, "CHECKOUT", tmp_path)
    assert cli.main(["bench", "--quick"]) == 1
    assert "make bench" in capsys.readouterr().err


def test_info_without_native_kernels_says_so(monkeypatch):
    from route_kernels import cli, native

    monkeypatch.setattr(native, "load_error", "the native library was not built")
    lines = "\n".join(cli.info())
    assert "reference backend" in lines and "the native library was not built" in lines
