"""One process or many: what Accelerate is told about the detector, and what it leaves to us."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator, PartialState
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    convert_outputs_to_fp32,
    gather_object,
)
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from route_detr.config import TrainConfig
from route_detr.errors import CheckpointError, UsageError

ACCUMULATION = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"


def start_processes(device: str = "auto") -> Accelerator:
    """This process's part in a run that `accelerate launch`, `torchrun` or nobody has started.

    Precision, gradient accumulation, FSDP (version 2, a shard a layer) and DeepSpeed are what the launcher's options or
    Accelerate's environment variables say.

    Raises:
        UsageError: there is no such device, it is one of several that the launcher deals out, or `accelerate launch`
            has started fewer processes than it was told.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if ":" in device and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UsageError(f"--device {device}: expected cpu, cuda or auto in a run of several processes")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UsageError(f"--device {device}: expected auto, cpu, cuda or one of its devices as cuda:1")
    try:
        chosen = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {device}: {str(error).splitlines()[0]}") from error
    if ":" in device:
        torch.cuda.set_device(chosen)
    sharding = None
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        sharding = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["EncoderLayer", "DecoderLayer"],
            cpu_ram_efficient_loading=False,
        )
    pieces = GradientAccumulationPlugin(num_steps=accumulation())
    accelerator = Accelerator(cpu=chosen.type == "cpu", fsdp_plugin=sharding, gradient_accumulation_plugin=pieces)
    _check_processes(accelerator.num_processes)
    if sharding is not None and accelerator.distributed_type == DistributedType.MULTI_CPU:
        # Accelerate shards on GPUs alone; FSDP2 itself runs on CPUs too, over gloo.
        PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = sharding
    if sharding is not None:
        sharding.mixed_precision_policy = None  # it casts parameters, boxes and all; autocast does not: see `prepared`
    return accelerator


def accumulation(field: int | None = None) -> int:
    """How many pieces a process computes its part of a batch in: what ``field`` (train.accumulate), the launcher or
    Accelerate's environment variable says, 1 where none does.

    Raises UsageError where two of them say different numbers.
    """
    launched, _ = _launcher()
    said: dict[str, Any] = {
        "train.accumulate": field,
        "--gradient_accumulation_steps": launched.gradient_accumulation_steps if launched else None,
        ACCUMULATION: os.environ.get(ACCUMULATION),
    }
    for name, value in said.items():
        if value is not None and (not str(value).isdecimal() or int(value) < 1):
            raise UsageError(f"{name}: expected a whole number of at least 1, got {value}")
    # Accelerate's own 1 is what it writes where it was told nothing.
    said = {name: int(n) for name, n in said.items() if n is not None and (name == "train.accumulate" or int(n) > 1)}
    if len(set(said.values())) > 1:
        given = ", ".join(f"{name} = {value}" for name, value in said.items())
        raise UsageError(f"gradient accumulation: expected one number, got {given}")
    return next(iter(said.values()), 1)


def _launcher() -> tuple[argparse.Namespace | None, dict[str, str]]:
    """The options and the environment of the `accelerate launch` that started this process; (None, {}) without one.

    It hands accumulation on to DeepSpeed alone, and without GPUs it starts one process, however many it is told.
    """
    if "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return None, {}
    try:
        parent = psutil.Process().parent()
        words, environment = (parent.cmdline(), parent.environ()) if parent else ([], {})
    except psutil.Error:
        return None, {}
    names = [Path(word).name.removesuffix(".exe") for word in words]
    at = next((index for index, name in enumerate(names) if re.fullmatch(r"accelerate([.-].+)?", name)), None)
    if at is None:
        return None, {}
    options = words[at + 2 :] if words[at + 1 : at + 2] == ["launch"] else words[at + 1 :]
    return launch_command_parser().parse_args(options), environment


def _check_processes(count: int) -> None:
    launched, environment = _launcher()
    # It sets the address for processes that are to find each other.
    if launched and count == 1 and "MASTER_ADDR" in os.environ and "MASTER_ADDR" not in environment:
        wanted = launched.num_processes or 2
        command = f"torchrun --nproc-per-node {wanted} -m route_detr {shlex.join(sys.argv[1:])}"
        raise UsageError(
            f"accelerate launch has started one process of {wanted}, since it does not find so many GPUs; "
            f"for processes on CPUs: {command}{'' if '--device' in sys.argv else ' --device cpu'}"
        )


def prepared(
    accelerator: Accelerator, detector: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Detector and optimizer, wrapped as the run needs them.

    The routers stay whole on every rank and outside the wrapper: they have no gradient while lambda is 0, and FSDP
    takes no scalar parameters. `average_gradients` is theirs. Norms that learn from the batch learn from all ranks'.

    Raises:
        UsageError: DeepSpeed is asked for what it has not been made to do here: ZeRO stage 3, or float16.
    """
    if accelerator.num_processes > 1:
        share_norms(detector, accelerator.device)
    if accelerator.distributed_type == DistributedType.FSDP:
        detector.to(memory_format=torch.contiguous_format)  # a shard is cut from the first dimension
        detector.forward = convert_outputs_to_fp32(accelerator.autocast()(detector.forward))
        # No output of the detector is written to.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        accelerator.state.fsdp_plugin.ignored_modules = list(detector.decoder.routers.values())
    elif accelerator.distributed_type == DistributedType.DEEPSPEED:
        return _prepared_for_deepspeed(accelerator, detector, optimizer, config)
    else:
        routers = {id(parameter) for parameter in detector.decoder.routers.parameters()}
        ignored = [name for name, parameter in detector.named_parameters() if id(parameter) in routers]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(detector, ignored)
    return accelerator.prepare(detector, optimizer)


def share_norms(detector: nn.Module, device: torch.device) -> None:
    """Batch norms that learn from the images of all ranks, in place: PyTorch's on a GPU, which it has alone."""
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(detector)
        return
    for module in detector.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = GlobalBatchNorm2d


def _prepared_for_deepspeed(
    accelerator: Accelerator, detector: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """DeepSpeed owns all parameters, the routers' too; precision is autocast, as everywhere else."""
    plugin, precision = accelerator.state.deepspeed_plugin, accelerator.mixed_precision
    if plugin.zero_stage == 3:
        raise UsageError("DeepSpeed: expected ZeRO stage 0, 1 or 2, got 3 (to shard parameters use FSDP)")
    if precision not in ("no", "bf16"):
        raise UsageError(f"DeepSpeed: expected mixed precision no or bf16, got {precision}")
    pieces = accelerator.num_processes * accelerator.gradient_accumulation_steps
    plugin.deepspeed_config |= {
        "train_micro_batch_size_per_gpu": config.batch_size // pieces,
        "gradient_accumulation_steps": accelerator.gradient_accumulation_steps,
        "gradient_clipping": config.clip_norm,
        "bf16": {"enabled": False},  # it casts parameters, boxes and all
    }
    if precision == "bf16":
        autocast = torch.autocast(accelerator.device.type, torch.bfloat16)
        detector.forward = convert_outputs_to_fp32(autocast(detector.forward))
    # It sends parameters as bytes: contiguous ones, and none without a dimension.
    detector.to(memory_format=torch.contiguous_format)
    for parameter in detector.parameters():
        if parameter.dim() == 0:
            parameter.data = parameter.data.reshape(1)
    return accelerator.prepare(detector, optimizer)


def average_gradients(accelerator: Accelerator, routers: nn.Module) -> None:
    """The routers' gradients of all ranks, averaged in one all-reduce."""
    gradients = [parameter.grad for parameter in routers.parameters() if parameter.grad is not None]
    if accelerator.num_processes == 1 or accelerator.distributed_type == DistributedType.DEEPSPEED or not gradients:
        return
    average = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
    for gradient, part in zip(gradients, average.split([each.numel() for each in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the images of all ranks, for devices that `nn.SyncBatchNorm` does not know."""

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W]; B, H and W may differ between ranks. Statistics are in the weight's dtype."""
        if not self.training:
            return super().forward(x)
        pixels, dtype, x = x.numel() // x.shape[1], x.dtype, x.to(self.weight.dtype)
        sums = AcrossRanks.apply(torch.cat([x.sum((0, 2, 3)), x.new_full((1,), pixels)]))
        mean, count = sums[:-1] / sums[-1], sums[-1]
        centred = x - mean[:, None, None]
        variance = AcrossRanks.apply(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(dtype)


class AcrossRanks(torch.autograd.Function):
    """The sum of a tensor over all ranks; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.contiguous().clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return AcrossRanks.apply(gradient)


def whole(state: Any) -> Any:
    """A state dict with every sharded tensor in one piece, on the CPU. All ranks take part."""
    gathered = tree_map_only(DTensor, lambda tensor: tensor.full_tensor(), state)
    return tree_map_only(Tensor, lambda tensor: tensor.detach().cpu(), gathered)


def _placed(value: Tensor, like: Tensor | None) -> Tensor:
    """A whole tensor as ``like`` is: sharded, or as it stands. Every rank has the whole, so none sends."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def load_model(detector: nn.Module, state: dict[str, Tensor]) -> None:
    """Load a `whole` state dict into a detector whose parameters may be sharded."""
    own = detector.state_dict()
    detector.load_state_dict({name: _placed(value, own.get(name)) for name, value in state.items()})


CLASS_ROWS = re.compile(
    r"(?:decoder\.heads\.\d+|proposals\.head)\.classify\.(?:weight|bias)|denoising\.content\.weight"
)
NOT_WEIGHTS = re.compile(r"routing\..+|.+\.num_batches_tracked")  # lambda and alpha are each run's own
ROUTERS = "decoder.routers."


def take_weights(
    detector: nn.Module,
    checkpoint: str | Path,
    state: dict[str, Any],
    class_names: Sequence[str],
    partial: bool = False,
) -> str:
    """Load the weights of another run's ``state``; says in one sentence what came along and what begins anew.

    ``checkpoint`` names the file that it was read from.

    Rows of class heads follow the classes' names. Routers may be new, or left out. All else has to fit in name and
    shape, unless ``partial``: then what does not fit begins anew.

    Raises:
        CheckpointError: tensors do not fit, or so many that fixed layers of the backbone would be random.
    """
    own = whole(detector.state_dict())
    given, before = state["model"], [str(category["name"]) for category in state["categories"]]
    numbered = before == [str(number) for number in range(len(before))] != list(class_names)  # classes without names
    there, here = _occurrences(before), _occurrences(class_names)
    kept = [] if numbered else [each for each in here if each in there]
    to, rows = [here[each] for each in kept], [there[each] for each in kept]

    agnostic = detector.config.proposal_classes == "agnostic"
    fitting, new, misfits = {}, [], []
    for name, tensor in own.items():
        value, shape = given.get(name), list(tensor.shape)
        if NOT_WEIGHTS.fullmatch(name):
            continue
        of_classes = CLASS_ROWS.fullmatch(name) and not (agnostic and name.startswith("proposals."))
        if value is None:
            new.append(name)
            misfits += [] if name.startswith(ROUTERS) else [f"{name} {shape} (there is none)"]
        elif of_classes and list(value.shape) == [len(before), *shape[1:]]:
            fitting[name] = tensor.index_copy(0, torch.tensor(to, dtype=torch.long), value[rows].to(tensor.dtype))
        elif (
            value.shape == tensor.shape or value.numel() == tensor.numel() == 1
        ):  # DeepSpeed's scalars have a dimension
            fitting[name] = value.reshape(shape)
        else:
            new.append(name)
            misfits.append(f"{name} {shape} (there {list(value.shape)})")
    unused = [name for name in given if name not in own and not NOT_WEIGHTS.fullmatch(name)]
    homeless = [f"{name} {list(given[name].shape)} (has no place)" for name in unused if not name.startswith(ROUTERS)]

    if not fitting or (misfits + homeless and not partial):
        raise CheckpointError(
            f"{checkpoint}: {len(misfits + homeless)} tensors do not fit this detector: {_some(misfits + homeless)}; "
            "without --preset, --config and overrides it has the checkpoint's architecture; --init-partial begins anew "
            "with what does not fit"
        )
    backbone = detector.config.backbone
    random = [name for name in new if name.startswith("backbone.")]
    if random and backbone.fine_tune and backbone.weights is None:
        raise CheckpointError(
            f"{checkpoint}: nothing that fits {_some(random)}, which detector.backbone.fine_tune would fix at random; "
            "give detector.backbone.weights too, or detector.backbone.fine_tune=false"
        )
    load_model(detector, {**own, **fitting})
    told = [f"weights of {checkpoint}: {len(fitting)} of {len(fitting) + len(new)} tensors"]
    if before != list(class_names):
        anew = [each[0] for each in here if each not in kept]
        known = f"{len(kept)} of {len(class_names)} classes are known there by name"
        told.append(known + (f", in the class heads these begin anew: {_some(anew)}" if anew else ""))
    told += [f"{len(new)} tensors begin anew: {_some(new)}"] if new else []
    told += [f"{len(unused)} tensors there are not used: {_some(unused)}"] if unused else []
    return "; ".join(told)


def _occurrences(names: Sequence[str]) -> dict[tuple[str, int], int]:
    """The place of each name and of how many equal ones come before it: two classes may have one name."""
    return {(name, list(names[:place]).count(name)): place for place, name in enumerate(names)}


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + ", ..." * (len(names) > 4)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a `whole` optimizer state into one whose parameters may be sharded."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        index: {name: value if name == "step" else _placed(value, parameters[index]) for name, value in each.items()}
        for index, each in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": moments})


def everybodys(item: Any) -> list[Any]:
    """The picklable ``item`` of every rank, by rank, on all ranks."""
    return gather_object([item])


def is_lost_connection(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank has ended (gloo raises a plain RuntimeError)."""
    return isinstance(error, torch.distributed.DistError) or "onnection " in str(error)
