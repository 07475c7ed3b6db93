"""`route-kernels doctor`: what it says of a model that agrees, of one that does not, and of what it cannot use."""

import inspect
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from integration_checks import align_corners_mistaken

from route_kernels import cli
from route_kernels.doctor import UsageError
from route_kernels.doctor.agreement import AGREE, DIFFER, UNANSWERED, borrowed, compare
from route_kernels.doctor.fitting import what_fits
from route_kernels.doctor.target import build, example_inputs, load
from route_kernels.doctor.training_step import loss_of, peak_bytes

TINY = """
    import torch
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, ResNetConfig

    BACKBONE = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], out_features=["stage2", "stage3", "stage4"]
    )
    CONFIG = DeformableDetrConfig(
        backbone_config=BACKBONE, d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, num_queries=5, num_feature_levels=3,
        image_size=64,
    )

    def build():
        return DeformableDetrForObjectDetection(CONFIG)

    def build_with_inputs():
        return build(), {"pixel_values": torch.randn(1, 3, 48, 64)}

    def build_with_inputs_later():
        return build().eval(), lambda: (torch.randn(1, 3, 48, 64),)

    class NeedsFloat32(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.detector = build()

        def forward(self, pixels):
            if pixels.dtype != torch.float32:
                raise RuntimeError("expected float32")
            return {"loss": self.detector(pixels).logits.square().mean()}

    def build_float32():
        return NeedsFloat32(), (torch.randn(1, 3, 48, 64),)

    class NeverTheSame(NeedsFloat32):
        generator = torch.Generator()

        def forward(self, pixels):
            return self.detector(pixels).logits * torch.rand((), generator=self.generator)

    def build_never_the_same():
        return NeverTheSame(), (torch.randn(1, 3, 48, 64),)
"""

PLAIN = """
    import torch
    from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention

    LEVELS = [(5, 7), (3, 4)]

    class OwnAttention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.sampling_offsets = torch.nn.Linear(16, 2 * 2 * 2 * 3)
            self.attn = MultiScaleDeformableAttention()

        def forward(self, query, memory):
            places = 0.5 + 0.1 * self.sampling_offsets(query).view(2, -1, 2, 2, 3, 2)
            weights = torch.full(places.shape[:-1], 1 / 6, dtype=query.dtype)
            value = memory.view(2, -1, 2, 8)
            shapes, starts = torch.tensor(LEVELS), torch.tensor([0, 35])
            return self.attn(value, shapes, LEVELS, starts, places, weights, 64)

    def build():
        return OwnAttention(), (torch.randn(2, 6, 16), torch.randn(2, 47, 16))
"""

FAMILIES = """
    import torch
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig
    from transformers_models import model_and_inputs

    BOXES = torch.tensor([[0.5, 0.4, 0.3, 0.5], [0.2, 0.6, 0.2, 0.3]])
    LABELS = [{"class_labels": torch.tensor([0, 1]), "boxes": BOXES}]

    def build_whose_loss_needs_float32():
        model, inputs = model_and_inputs("d_fine")
        return model.float(), {"pixel_values": inputs["pixel_values"][:1], "labels": LABELS}

    def build_discrete():
        return model_and_inputs("rt_detr_v2", decoder_method="discrete")

    def build_frozen():
        model, inputs = model_and_inputs("rt_detr")
        return model.requires_grad_(False), inputs

    def build_without_deformable_attention():
        backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"])
        return DetrForObjectDetection(
            DetrConfig(
                backbone_config=backbone, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16,
                decoder_ffn_dim=16, num_queries=5, encoder_attention_heads=2, decoder_attention_heads=2,
            )
        ), (torch.randn(1, 3, 48, 64),)
"""

RESEARCH = """
    import torch
    from benchmarks.research_modules import MSDeformAttn
    from transformers.activations import GELUActivation

    class Detector(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.of_a_codebase_that_it_takes_something_from = GELUActivation()
            self.attention = MSDeformAttn(d_model=16, n_levels=2, n_heads=2, n_points=3)

        def forward(self, query, memory):
            shapes, starts = torch.tensor([[5, 7], [3, 4]]), torch.tensor([0, 35])
            references = query[:, :, None, :2].sigmoid().expand(-1, -1, 2, -1)
            return self.attention(query, references, memory, shapes, starts)

    def build():
        return Detector(), {"query": torch.randn(2, 6, 16), "memory": torch.randn(2, 47, 16)}
"""

OTHER = """
    import torch

    SIZE = 3

    def build():
        return torch.nn.Linear(SIZE, SIZE), (torch.randn(2, SIZE),)

    def build_without_inputs():
        return torch.nn.Linear(SIZE, SIZE)

    def build_wrong_inputs():
        return torch.nn.Linear(SIZE, SIZE), (torch.randn(2, SIZE + 1),)

    def build_number():
        return 7

    def build_odd_inputs():
        return torch.nn.Linear(SIZE, SIZE), 7

    def build_nothing_to_train():
        return torch.nn.ReLU(), (torch.randn(2, SIZE),)

    def raises():
        raise KeyError("weights")
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A user's folder with their modules, which is left behind without a trace."""
    (tmp_path / "tiny_model.py").write_text(textwrap.dedent(TINY))
    (tmp_path / "plain_model.py").write_text(textwrap.dedent(PLAIN))
    (tmp_path / "families_model.py").write_text(textwrap.dedent(FAMILIES))
    (tmp_path / "other_model.py").write_text(textwrap.dedent(OTHER))
    (tmp_path / "broken_model.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    for name in [path.stem for path in tmp_path.glob("*_model.py")]:
        sys.modules.pop(name, None)


def doctor(target, *options):
    return cli.main(["doctor", target, "--repeat", "1", *options])


def needs_transformers():
    pytest.importorskip("transformers", reason="transformers is not installed")


# ---- a model of another codebase -----------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["tiny_model:build", "tiny_model.py:build_with_inputs"])
def test_a_model_that_agrees(target, capsys):
    needs_transformers()
    assert doctor(target) == AGREE
    said = capsys.readouterr()
    for expected in (
        "model      DeformableDetrForObjectDetection, ", " M parameters, float32 on cpu, ",
        "inputs     pixel_values [", "route-kernels: transformers: 3 replaced, 0 left", "-> ms_deform_attn_fused",
        "agreement  of one training step in float64", "gradients, largest relative errors:",
        "run twice: 0.0e+00", "verdict: agrees", "in a forward pass: ms_deform_attn_fused 3", " ms a step (",
        "median of 1", "MB at the peak of a step",
    ):  # fmt: skip
        assert expected in said.out, expected
    assert "timing, 1 of 1" in said.err


def test_a_wrong_op_is_told_and_named(capsys):
    needs_transformers()
    with align_corners_mistaken():
        assert doctor("tiny_model:build_with_inputs") == DIFFER
    said = capsys.readouterr().out
    assert "verdict: DIFFERS" in said and "verdict: agrees" not in said
    assert "sampling_offsets" in said, "the worst gradients are named"


def test_an_op_that_raises_is_told(capsys, monkeypatch):
    needs_transformers()
    from route_kernels.integrations import transformers

    def broken(*_, **__):
        raise ArithmeticError("no such kernel")

    monkeypatch.setattr(transformers, "ms_deform_attn_fused", broken)
    assert doctor("tiny_model:build_with_inputs") == DIFFER
    said = capsys.readouterr()
    assert "verdict: DIFFERS: with our ops the step raised ArithmeticError: no such kernel" in said.out
    assert "Traceback" in said.err and "MB at the peak" not in said.out


def test_a_cast_that_is_lost_under_autocast_is_told(capsys, monkeypatch):
    needs_transformers()
    from transformers.models.deformable_detr import modeling_deformable_detr as modeling

    attention = modeling.DeformableDetrMultiscaleDeformableAttention
    cast = torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    monkeypatch.setattr(attention, "forward", cast(attention.forward))
    assert doctor("tiny_model:build_with_inputs") == AGREE
    assert "3 replaced modules were compared under autocast, too" in capsys.readouterr().out
    monkeypatch.setattr(
        "route_kernels.integrations.codebase.inside_decorators", lambda forward, make: make(inspect.unwrap(forward))
    )
    assert doctor("tiny_model:build_with_inputs") == DIFFER
    told = "under autocast model.encoder.layers.0.self_attn is not what it was: under autocast it returns torch.float32"
    said = capsys.readouterr().out
    assert told in said and "verdict: DIFFERS" in said


def test_a_part_in_float32_is_compared_in_float32(capsys):
    needs_transformers()
    assert doctor("tiny_model:build_float32", "--dtype", "float32") == AGREE
    assert "agreement  of one training step in float32" in capsys.readouterr().out


def test_a_model_that_does_not_repeat_itself_gets_no_verdict(capsys):
    needs_transformers()
    assert doctor("tiny_model:build_never_the_same") == UNANSWERED
    assert "verdict: none, as the model's own code does not repeat itself" in capsys.readouterr().out


def test_time_and_memory_in_another_dtype_with_inputs_of_a_function(capsys):
    needs_transformers()
    assert doctor("tiny_model:build_with_inputs_later", "--dtype", "bfloat16", "--seed", "3") == AGREE
    said = capsys.readouterr().out
    assert "bfloat16 on cpu, eval mode" in said and "inputs     0 [1, 3, 48, 64]" in said


def test_results_that_rounding_alone_moves_are_not_judged(capsys):
    """In float32 some gradients of D-FINE are nothing but rounding; the others agree, and show a wrong op."""
    needs_transformers()
    assert doctor("families_model:build_whose_loss_needs_float32") == AGREE
    said = capsys.readouterr().out
    assert "agreement  of one training step in float32" in said
    assert "are not judged, as rounding alone moves them: grad " in said
    with align_corners_mistaken():
        assert doctor("families_model:build_whose_loss_needs_float32") == DIFFER


@pytest.mark.parametrize(
    "target, reason",
    [
        ("build_without_deformable_attention", "got DetrForObjectDetection, which has none"),
        ("build_discrete", "method='discrete' is another operator"),
    ],
)
def test_a_model_that_calls_nothing_that_is_replaced(target, reason, capsys):
    needs_transformers()
    assert doctor(f"families_model:{target}") == UNANSWERED
    said = capsys.readouterr().out
    assert "nothing of ours ran: the model calls nothing that could be replaced" in said
    assert reason in said and "replaced, " not in said


def test_a_model_without_anything_to_train(capsys):
    needs_transformers()
    assert doctor("families_model:build_frozen") == UNANSWERED
    assert "requires a gradient, got none; is every parameter frozen?" in capsys.readouterr().err


def test_nothing_ran_where_the_replacements_call_the_original(capsys, monkeypatch):
    needs_transformers()
    monkeypatch.setattr("route_kernels.native.load_error", "not built")
    assert doctor("tiny_model:build_with_inputs") == UNANSWERED
    said = capsys.readouterr().out
    assert "nothing of ours ran: the replacements called the original code" in said
    assert "ms_deform_attn_fused: reference: plain PyTorch; cpu: not built" in said


def test_a_part_of_another_codebase_in_a_model_of_ones_own(capsys):
    """No module of the model is known, so the whole package is switched: what the model calls is."""
    needs_transformers()
    assert doctor("plain_model:build") == AGREE
    said = capsys.readouterr().out
    assert "in a forward pass: ms_deform_attn 1" in said
    assert (
        "transformers: 1 replaced, 0 left\n  deformable_detr: MultiScaleDeformableAttention  -> ms_deform_attn\n"
        in said
    )
    with align_corners_mistaken():
        assert doctor("plain_model:build") == DIFFER


EXTENSIONS = {  # how the reader's program comes to its extension, and whose ops its own code then calls
    "compiled": ("import sys\nfrom benchmarks import research_modules\n"
                 "sys.modules[research_modules.EXTENSION] = research_modules.compiled_extension()\n", False),
    "ours": ("import route_kernels as rk\nrk.integrations.deformable_detr.apply(verbose=False)\n", True),
}  # fmt: skip


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_research_code(extension, folder):
    provided, calls_ours = EXTENSIONS[extension]
    (folder / "research_model.py").write_text(provided + textwrap.dedent(RESEARCH))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "route_kernels.cli", "doctor", "research_model:build", "--repeat", "1"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == AGREE, done.stdout + done.stderr
    assert "in a forward pass: ms_deform_attn_fused 1" in done.stdout
    told = "in the model's own code, which is not only its own: ms_deform_attn 1" in done.stdout
    assert told == calls_ours
    assert "transformers" not in done.stdout and "deformable_detr: 1 replaced, 0 left" in done.stdout


def test_comparison_leaves_the_model_as_it_was():
    needs_transformers()
    model, inputs = build(load("tiny_model:build_with_inputs"), "tiny")
    model.double()
    appliers, _ = what_fits(model)
    before = {name: (tensor.clone(), tensor.data_ptr()) for name, tensor in model.state_dict().items()}
    agreement = compare(model, inputs, appliers, seed=0)
    assert agreement.code == AGREE and agreement.perturbed == 12
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]
    for name, tensor in model.state_dict().items():
        values, address = before[name]
        assert torch.equal(tensor, values) and tensor.data_ptr() == address, name


def test_inputs_of_a_transformers_model():
    needs_transformers()
    model = load("tiny_model:build")()
    candidates = list(example_inputs(model))
    assert [set(inputs) - {"labels"} for inputs in candidates] == [{"pixel_values"}] * len(candidates)
    assert candidates[-1]["pixel_values"].shape == (2, 3, 64, 64) and "labels" not in candidates[-1]
    with pytest.raises(UsageError, match=r"Linear: expected \(model, inputs\)"):
        list(example_inputs(torch.nn.Linear(2, 2)))


# ---- what it cannot use --------------------------------------------------------------------------------------------


def test_a_model_that_no_integration_fits(capsys):
    assert doctor("other_model:build") == UNANSWERED
    assert "nothing applied: no integration of route-kernels fits this model" in capsys.readouterr().out


USAGE = {
    "other_model": "TARGET: expected your.module:function or file.py:function, got 'other_model'",
    "no_such_module:build": "no_such_module: expected a module, but there is no no_such_module in ",
    "no_such.module:build": "no_such.module: expected a module, but there is no no_such in ",
    "nowhere/file.py:build": "nowhere/file.py: expected a Python file, found none",
    "other_model:absent": "other_model:absent: expected a function that builds a model, but other_model has no absent",
    "other_model:SIZE": "other_model:SIZE: expected a function that builds a model, got int",
    "other_model:build_number": "expected it to return a torch.nn.Module or (module, inputs), got int",
    "other_model:build_odd_inputs": "inputs: expected a tuple or mapping of arguments, or a function that returns one",
    "other_model:build_without_inputs": "Linear: expected (model, inputs), as only a transformers model",
    "other_model:build_nothing_to_train": "expected a model with parameters, got ReLU, which has none",
}
RAISES = {
    "broken_model:build": ("importing broken_model raised ModuleNotFoundError", "a_package_that_is_not_there"),
    "broken_model.py:build": ("importing broken_model.py raised ModuleNotFoundError", "a_package_that_is_not_there"),
    "other_model:raises": ("other_model:raises() raised KeyError", 'raise KeyError("weights")'),
    "other_model:build_wrong_inputs": ("a training step of the model as it is raised RuntimeError", "mat1 and mat2"),
}


@pytest.mark.parametrize("target", USAGE)
def test_usage_error_is_one_line(target, capsys):
    assert doctor(target) == UNANSWERED
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("  ...")]
    assert len(said) == 1 and said[0].startswith("route-kernels doctor: ") and USAGE[target] in said[0]


@pytest.mark.parametrize("target", RAISES)
def test_what_the_users_code_raises_is_shown(target, capsys):
    line, in_traceback = RAISES[target]
    assert doctor(target) == UNANSWERED
    said = capsys.readouterr().err
    assert "Traceback" in said and in_traceback in said
    assert f"route-kernels doctor: {line} (traceback above)" in said


def test_options_are_checked(capsys):
    assert cli.main(["doctor", "other_model:build", "--repeat", "0"]) == UNANSWERED
    assert "--repeat: expected a positive number, got 0" in capsys.readouterr().err
    for options in (["--dtype", "int8"], ["--no-such-option"]):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["doctor", "other_model:build", *options])
        assert stopped.value.code == UNANSWERED


# ---- what it measures ----------------------------------------------------------------------------------------------


def test_peak_is_what_is_held_at_once():
    def run():
        first = torch.empty(1000, 1000)  # 4 MB
        second = first + 1
        del first
        return second * 2

    assert 8e6 <= peak_bytes(run, torch.device("cpu")) < 8.1e6


def test_loss_is_the_models_or_the_sum_of_its_outputs():
    x = torch.ones(3, requires_grad=True)
    assert loss_of({"loss": 2 * x.sum(), "logits": x}).item() == 6
    assert loss_of({"loss": None, "logits": x, "indices": torch.ones(3)}).item() == 3
    assert loss_of((x, [x * 2])).item() == 9


def test_borrowed_weights_go_back_after_an_error():
    model = torch.nn.BatchNorm1d(3)
    weights = {name: tensor.data_ptr() for name, tensor in model.state_dict(keep_vars=True).items()}
    with pytest.raises(KeyError), borrowed(model, torch.float64):
        assert model.weight.dtype == model.running_mean.dtype == torch.float64
        model(torch.randn(4, 3, dtype=torch.float64))
        raise KeyError
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict(keep_vars=True).items()} == weights
    assert model.weight.dtype == torch.float32 and model.num_batches_tracked == 0 and not model.running_mean.any()
