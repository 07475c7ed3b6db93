"""A task of one of two ranks, for test_scale_out.py: `torchrun --nproc-per-node 2 tests/two_processes.py TASK ...`."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin, DistributedType

from route_detr import cli, evaluation
from route_detr.config import Config
from route_detr.model.criterion import Criterion
from route_detr.run import Run, load_checkpoint
from route_detr.scale_out import start_processes
from route_detr.tools.plots import plot_curves
from route_detr.train import Training

RANK = int(os.environ.get("RANK", 0))


def seen_while_training(training: Training) -> dict:
    """Trains, and notes in each step what the forward pass of this rank has made of the schedule."""
    seen = {"steps": [], "evaluations": []}
    criterion, average_precision = training.criterion, evaluation.average_precision

    def watching_criterion(output, targets, box_count):
        branches = output.layers[-1].boxes.shape[1]
        strength = float(training.detector.routing.strength.max())
        seen["steps"].append([branches, strength, float(output.aux_weight), len(targets)])
        return criterion(output, targets, box_count)

    def watching_average_precision(coco, results, image_ids, **options):
        seen["evaluations"].append([results, image_ids])
        return average_precision(coco, results, image_ids, **options)

    def draw():
        return training.run.draw("curves.png", lambda path: plot_curves(training.run.records(), path))

    training.criterion, evaluation.average_precision = watching_criterion, watching_average_precision
    try:
        training.start()
        training.fit(after_evaluation=draw)
    finally:
        evaluation.average_precision = average_precision
    router = next(training.detector.decoder.routers.parameters())
    return {**seen, "router": router.detach().flatten().tolist(), "kind": type(training.model).__name__}


def comes_back(run: Run, training: Training) -> bool:
    """Whether a resumed run holds, on this rank, the model and the optimizer that the checkpoint has."""
    again = Training(run, training.config, training.data, training.accelerator)
    again.resume()
    stored, state = load_checkpoint(run.last), again.state()
    equal = [
        torch.equal(value, state["optimizer"]["state"][index][name])
        for index, moments in stored["optimizer"]["state"].items()
        for name, value in moments.items()
    ] + [torch.equal(value, state["model"][name]) for name, value in stored["model"].items()]
    return all(equal) and state["progress"] == stored["progress"] and state["loss_sums"] == stored["loss_sums"]


def train(config: str, data: str, out: str) -> None:
    """A run with DDP in OUT/ddp and one with FSDP in OUT/fsdp; what each rank saw in OUT/ddp-0.json, ..."""
    torch.set_num_threads(1)
    for name in ("ddp", "fsdp"):
        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ["ACCELERATE_USE_FSDP"] = str(name == "fsdp")
        run = Run(Path(out) / name, writes=RANK == 0)
        training = Training(run, Config.from_dict(json.loads(config)), json.loads(data), start_processes("cpu"))
        seen = seen_while_training(training)
        seen["comes back"] = comes_back(run, training)
        run.close()
        (Path(out) / f"{name}-{RANK}.json").write_text(json.dumps(seen))


def lose_a_process(*arguments: str) -> None:
    """The command line ARGUMENTS; rank 1 is killed in its seventh step."""
    original, calls = Criterion.__call__, []

    def dying(*args, **kwargs):
        calls.append(1)
        if RANK == 1 and len(calls) == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    Criterion.__call__ = dying
    sys.exit(cli.main(arguments))


def start_deepspeed() -> Accelerator:
    """Does as `start_processes`, with DeepSpeed over gloo: Accelerate's own switch wants an accelerator."""
    from deepspeed import comm

    accelerator, plugin = Accelerator(cpu=True), DeepSpeedPlugin(zero_stage=2)
    comm.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.DEEPSPEED
    accelerator.state.deepspeed_plugins, accelerator.deepspeed_engine_wrapped = {"default": plugin}, None
    plugin.set_mixed_precision(os.environ["ACCELERATE_MIXED_PRECISION"])
    plugin.select(_from_accelerator_state=True)
    return accelerator


def deepspeed(config: str, data: str, out: str) -> None:
    """A run with DeepSpeed in OUT."""
    run = Run(out, writes=RANK == 0)
    training = Training(run, Config.from_dict(json.loads(config)), json.loads(data), start_deepspeed())
    training.start()
    training.fit()
    run.close()


if __name__ == "__main__":
    {"train": train, "lose_a_process": lose_a_process, "deepspeed": deepspeed}[sys.argv[1]](*sys.argv[2:])
