"""The runs of a comparison: ordinary ones, side by side, each gone on with where it was stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from time import sleep
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from route_detr.compare.arms import Arm, as_words
from route_detr.compare.competition import measure
from route_detr.config import Config
from route_detr.data.coco import CocoDetection
from route_detr.errors import Interrupted, RunFailed, UsageError
from route_detr.files import SOFTWARE, with_folder, write_text
from route_detr.predict import load_trained
from route_detr.run import Run
from route_detr.train import StopSignal

MEASURED = "measured.json"
FOUND_IN_THE_DATA = ("detector.num_classes", "detector.backbone.", "train.workers", "train.accumulate")
POLL_SECONDS = 0.2


class Sitting(NamedTuple):
    """The parts that all runs of a comparison share."""

    folder: Path
    begins: list[str]  # words of `route-detr train` that name the preset or the file
    changes: dict[str, Any]  # dotted key -> value in all arms
    base: Config  # with these changes
    data: dict[str, str]  # train_json, train_images, val_json, val_images
    device: str
    jobs: int
    threads: int  # of each


class Member(NamedTuple):
    """One run."""

    sitting: Sitting
    arm: Arm
    seed: int

    @property
    def folder(self) -> Path:
        return self.sitting.folder / f"{self.arm.name}-{self.seed}"

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def done(self) -> bool:
        return (self.folder / MEASURED).is_file()

    def check(self) -> None:
        """Raise UsageError where the folder holds a run of another configuration."""
        file, expected = self.folder / "config.json", self.arm.config(self.sitting.base, self.seed)
        if not file.is_file():
            return
        content = json.loads(file.read_text(encoding="utf-8"))
        there = Config.from_dict({name: content[name] for name in expected.to_dict()})
        for key, (now, before) in expected.differences(there).items():
            if not key.startswith(FOUND_IN_THE_DATA):
                raise UsageError(
                    f"{self.folder}: was begun with {key}={before!r}, not {now!r}; choose another --name, or delete it"
                )

    def command(self) -> list[str]:
        """`route-detr train` in a process of its own, anew or from its last checkpoint."""
        sitting, more = self.sitting, ["--resume"]
        if not Run(self.folder).last.is_file():
            more = sitting.begins + as_words(sitting.changes | self.arm.changes | {"train.seed": self.seed})
        options = [f"--{name.replace('_', '-')}={path}" for name, path in sitting.data.items()]
        options += [f"--device={sitting.device}", f"--threads={sitting.threads}", f"--out={self.folder}"]
        return [sys.executable, "-m", "route_detr", "train", *options, *more]

    def start(self) -> subprocess.Popen:
        """In a session of its own: signals of a terminal come from the comparison alone."""
        environment = os.environ | {"OMP_NUM_THREADS": str(self.sitting.threads)}
        with open(with_folder(self.log), "ab") as log:
            return subprocess.Popen(
                self.command(), stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment,
                start_new_session=True,
            )  # fmt: skip

    def complaint(self) -> str:
        """The last thing that its log says."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()
        return next((line for line in reversed(lines) if line.strip()), "said nothing").strip()

    def share_done(self) -> float:
        """From 0 to 1, by the last line of metrics.jsonl."""
        file, train = self.folder / "metrics.jsonl", self.sitting.base.train
        if self.done:
            return 1.0
        if not file.is_file():
            return 0.0
        with open(file, "rb") as stream:
            stream.seek(max(0, file.stat().st_size - 4096))
            lines = stream.read().split(b"\n")
        if len(lines) < 2 or not lines[-2].startswith(b"{"):
            return 0.0
        record = json.loads(lines[-2])
        done = record["step"] / train.steps if train.steps else record["seconds"] / (train.time_budget or 1)
        return min(1.0, done)

    def measure(self) -> None:
        """Write `MEASURED` into the run's folder: the detections of its last checkpoint, and how queries compete."""
        trained = load_trained(Run(self.folder).last, torch.device(self.sitting.device))
        data, transforms = self.sitting.data, trained.config.transforms
        measures, results = measure(trained, CocoDetection(data["val_json"], data["val_images"], transforms))
        content = {"software": SOFTWARE, "competition": measures, "detections": results}
        write_text(self.folder / MEASURED, json.dumps(content, indent=0) + "\n")


def train_all(members: Sequence[Member]) -> None:
    """Train all runs that are not done, the sitting's jobs at a time, and measure them.

    Raises:
        RunFailed: a run has failed; the others have been stopped, and all go on when this is called again.
        Interrupted: a signal has come, and the runs have been stopped likewise.
    """
    waiting, stop = deque(member for member in members if not member.done), StopSignal()
    running: list[tuple[Member, subprocess.Popen]] = []
    shares = "{percentage:3.0f}% of {total} runs |{bar}| [{elapsed}<{remaining}{postfix}]"
    bar = tqdm(total=len(members), bar_format=shares, mininterval=0.2 if sys.stderr.isatty() else 20.0)
    with stop.watched(), bar:
        try:
            while (waiting or running) and not stop.received:
                while waiting and len(running) < members[0].sitting.jobs:
                    member = waiting.popleft()
                    running.append((member, member.start()))
                ended = [each for each in running if each[1].poll() is not None]
                running = [each for each in running if each not in ended]
                for member, process in ended:
                    if process.returncode:
                        raise RunFailed(f"{member.folder}: {member.complaint()} (all of it in {member.log})")
                    member.measure()
                bar.set_postfix_str(
                    ", ".join(f"{m.folder.name} {m.share_done():.0%}" for m, _ in running), refresh=False
                )
                bar.update(sum(member.share_done() for member in members) - bar.n)
                sleep(POLL_SECONDS)
        finally:
            for _, process in running:
                process.send_signal(signal.SIGTERM)
            for _, process in running:
                process.wait()
    if stop.received:
        raise Interrupted(stop.received)
