"""Whether Triton can run, why not, with which block sizes, and what `route-kernels tune` keeps."""

import json
import sys
import types

import pytest
import torch

import route_kernels as rk
from route_kernels import cli
from route_kernels.backends import OPS
from route_kernels.triton import availability

pytest.importorskip("triton")

from benchmarks import tune
from route_kernels.triton import block_sizes, launch
from route_kernels.triton.block_sizes import INTERPRETER, TABLE, Entry

needs_interpreter = pytest.mark.skipif(not availability.interpreted(), reason="this run has a GPU")


@pytest.fixture
def compiled(monkeypatch):
    """Pretends that triton was imported without TRITON_INTERPRET."""
    monkeypatch.setattr(availability, "interpreted", lambda: False)
    monkeypatch.setattr(block_sizes, "interpreted", lambda: False)
    for cached in (availability._known_obstacle, block_sizes.architecture, block_sizes.settings, block_sizes._rows_of):
        cached.cache_clear()
    yield
    for cached in (availability._known_obstacle, block_sizes.architecture, block_sizes.settings, block_sizes._rows_of):
        cached.cache_clear()


def gpu(monkeypatch, capability=(9, 0), name="NVIDIA H100 80GB HBM3", hip=None):
    """Pretends that this GPU is here."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    monkeypatch.setattr(torch.version, "hip", hip)
    return torch.device("cuda", 0)


# ---- can_run -------------------------------------------------------------------------------------------------------


@needs_interpreter
def test_the_interpreter_takes_cpu_tensors_only_when_asked():
    x = torch.randn(1, 5, 4)
    assert rk.can_run("query_similarity", "triton", x)[1].endswith("kernel in the interpreter")
    assert rk.backends.resolve("query_similarity", None, x) in ("cpu", "reference")
    with rk.backend("triton"):
        assert rk.backends.choose("query_similarity", x) == "triton"
    assert rk.can_run("query_similarity", "triton", x.to("meta")) == (
        False,
        "Triton's interpreter does not run on meta tensors",
    )


def test_without_triton_the_reason_says_how_to_get_it(monkeypatch, compiled):
    monkeypatch.setitem(sys.modules, "triton", None)
    runs, reason = rk.can_run("query_similarity", "triton")
    assert not runs and "Triton cannot be imported" in reason and "pip install 'triton>=3.5'" in reason


def test_an_old_triton_is_refused(monkeypatch, compiled):
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__="3.4.0+git1"))
    runs, reason = rk.can_run("query_similarity", "triton")
    assert not runs and reason == "Triton 3.4.0+git1 is installed, the kernels need 3.5 or newer"


def test_cpu_tensors_are_refused_with_the_way_to_test_them(compiled):
    runs, reason = rk.can_run("query_similarity", "triton", torch.empty(0))
    assert not runs and "take CUDA and HIP tensors" in reason and "TRITON_INTERPRET=1" in reason


@pytest.mark.parametrize("capability, runs", [((7, 5), False), ((8, 0), True), ((9, 0), True), ((12, 0), True)])
def test_nvidia_from_compute_capability_8(monkeypatch, compiled, capability, runs):
    gpu(monkeypatch, capability)
    answer, reason = rk.can_run("query_similarity", "triton")
    assert answer == runs
    assert reason.startswith("Triton ") if runs else reason.endswith("8.0 or newer, this GPU has 7.5")


def test_every_amd_gpu_is_taken(monkeypatch, compiled):
    gpu(monkeypatch, (1, 0), "AMD Instinct", hip="6.4")
    assert rk.can_run("query_similarity", "triton")[0]


@pytest.mark.parametrize("text, numbers", [("3.7.1", (3, 7, 1)), ("3.5.0+git12", (3, 5, 0)), ("3.6", (3, 6))])
def test_versions(text, numbers):
    assert availability.version_of(text) == numbers


def test_info_explains_every_op():
    lines = "\n".join(cli.info())
    for op in OPS:
        _, reason = rk.can_run(op, "triton")
        assert reason.replace(f" for {op}", "") in lines


# ---- block sizes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "capability, hip, expected",
    [((8, 0), None, "sm80"), ((8, 6), None, "sm86"), ((8, 9), None, "sm86"), ((9, 0), None, "sm90"),
     ((10, 0), None, "sm100"), ((10, 3), None, "sm100"), ((12, 1), None, "sm120"), ((9, 4), "6.4", "gfx942")],
)  # fmt: skip
def test_architectures(monkeypatch, compiled, capability, hip, expected):
    assert block_sizes.architecture(gpu(monkeypatch, capability, hip=hip)) == expected


def test_the_first_entry_that_fits_is_taken(monkeypatch):
    small, large, interpreted = ({"BLOCK_N": size} for size in (32, 64, 16))
    monkeypatch.setitem(
        TABLE, "kernel",
        (Entry(interpreted, (INTERPRETER,)), Entry(small, ("sm90",), (torch.float32,), {"N": 100}),
         Entry(large, ("sm90",))),
    )  # fmt: skip
    for where, dtype, n, expected in [
        (INTERPRETER, torch.float32, 7, interpreted), ("sm90", torch.float32, 100, small),
        ("sm90", torch.float32, 101, large), ("sm90", torch.float16, 7, large),
    ]:  # fmt: skip
        assert block_sizes.entry("kernel", where, dtype, {"N": n})[1].settings is expected
    with pytest.raises(LookupError, match=r"kernel: no entry of the table fits sm80, torch.float16, {'N': 7}"):
        block_sizes.entry("kernel", "sm80", torch.float16, {"N": 7})


@needs_interpreter
def test_a_kernel_that_is_launched_on_nothing_is_not_launched():
    launch.Kernel(None)[launch.Grid((0, 3))](torch.empty(0))


def test_products_of_float32_round_to_tf32_only_where_pytorch_s_do():
    assert launch.input_precision() == "ieee"
    try:
        torch.backends.cuda.matmul.allow_tf32 = True
        assert launch.input_precision() == "tf32"
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    assert launch.input_precision() == "ieee"


def test_blocks_and_padding():
    assert [launch.blocks(size, 16) for size in (0, 1, 16, 17)] == [0, 1, 1, 2]
    assert [launch.padded(width) for width in (0, 1, 16, 17, 64, 65)] == [16, 16, 16, 32, 64, 128]


# ---- tuned settings ------------------------------------------------------------------------------------------------


def test_shapes_of_one_bucket_share_a_key():
    assert [block_sizes.bucket(size) for size in (0, 1, 2, 3, 900, 1024, 1025)] == [1, 1, 2, 4, 1024, 1024, 2048]
    assert block_sizes.tuned_key("kernel", torch.bfloat16, {"N": 900, "D": 32}) == "kernel bfloat16 D=32 N=1024"


@pytest.fixture
def tuned_file(monkeypatch, tmp_path, compiled):
    """(device, file that will be read for it)."""
    monkeypatch.setenv(block_sizes.VARIABLE, str(tmp_path / "folder" / "tuned.json"))
    device = gpu(monkeypatch)
    return device, block_sizes.tuned_path(device)


SIZES = {"N": 900, "C": 256, "ODD": 0}
ROWS = {
    "query_similarity_relu bfloat16 C=256 N=1024 ODD=1": {"BLOCK_N": 32, "BLOCK_C": 64, "num_warps": 2, "num_stages": 4}
}


def test_tuned_settings_go_before_the_table(tuned_file):
    device, file = tuned_file
    tune.write(file, block_sizes.circumstances(device), ROWS)
    assert [path.name for path in file.parent.iterdir()] == ["tuned.json"]
    config = block_sizes.config
    assert config("query_similarity_relu", device, torch.bfloat16, N=900, C=256, ODD=0) == next(iter(ROWS.values()))
    other = config("query_similarity_relu", device, torch.bfloat16, N=1025, C=256, ODD=0)
    assert other in [entry.settings for entry in TABLE["query_similarity_relu"]]


@pytest.mark.parametrize(
    "name, value", [("triton", "3.5.0"), ("gpu", "NVIDIA A100"), ("route-kernels", "0"), ("format", 0)]
)
def test_a_file_of_other_circumstances_is_ignored_with_a_warning(tuned_file, name, value):
    device, file = tuned_file
    tune.write(file, {**block_sizes.circumstances(device), name: value}, ROWS)
    with pytest.warns(UserWarning, match=rf"{name} {value}, now .* run `route-kernels tune` again or delete it"):
        found = block_sizes.config("query_similarity_relu", device, torch.bfloat16, N=900, C=256, ODD=0)
    assert found in [entry.settings for entry in TABLE["query_similarity_relu"]]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"rows": {}}', '{"circumstances": [], "rows": {}}'])
def test_a_broken_file_is_ignored_with_a_warning(tuned_file, content):
    device, file = tuned_file
    file.parent.mkdir()
    file.write_text(content)
    with pytest.warns(UserWarning, match="cannot be read"):
        assert (
            block_sizes.tuned_settings("query_similarity_relu", device, torch.bfloat16, {"N": 900, "C": 256, "ODD": 0})
            is None
        )


def test_settings_that_are_no_integers_are_ignored_with_a_warning(tuned_file):
    device, file = tuned_file
    tune.write(file, block_sizes.circumstances(device), {next(iter(ROWS)): {"BLOCK_N": "64"}})
    with pytest.warns(UserWarning, match="settings that are no integers"):
        assert (
            block_sizes.tuned_settings("query_similarity_relu", device, torch.bfloat16, {"N": 900, "C": 256, "ODD": 0})
            is None
        )


def test_a_write_that_fails_leaves_the_old_file(tuned_file):
    device, file = tuned_file
    tune.write(file, block_sizes.circumstances(device), ROWS)
    with pytest.raises(TypeError):
        tune.write(file, block_sizes.circumstances(device), {"key": object()})
    assert json.loads(file.read_text())["rows"] == ROWS
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_where_the_file_is(monkeypatch, tmp_path, compiled):
    device = gpu(monkeypatch)
    monkeypatch.delenv(block_sizes.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert block_sizes.tuned_path(device) == tmp_path / "route-kernels" / "tuned-nvidia-h100-80gb-hbm3.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert block_sizes.tuned_path(device) == tmp_path / ".cache" / "route-kernels" / "tuned-nvidia-h100-80gb-hbm3.json"
