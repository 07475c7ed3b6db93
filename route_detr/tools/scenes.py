"""Crowds in rendered rooms: pictures that nobody here painted, with a mask of every visible object, as a COCO folder.

`vizdoom` (the extra `scenes`) renders Freedoom's maps without a window. For each scene the camera goes to some thing
of a map and turns to where the room is deepest; monsters and items are summoned there in clusters, and the engine tells
which pixel belongs to which object. No map is used in both splits. A scene depends on seed, split and number alone.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image
from pycocotools import mask as rle
from tqdm import tqdm

from route_detr.data.coco import whole_folder, write_instances
from route_detr.data.report import DatasetError
from route_detr.errors import UsageError

if TYPE_CHECKING:
    from vizdoom import DoomGame

CLASSES = (
    *("Zombieman", "ShotgunGuy", "ChaingunGuy", "DoomImp", "Demon", "Cacodemon", "HellKnight", "Revenant"),
    *("Medikit", "ArmorBonus", "RocketBox", "CellPack"),
)
MAPS = {"train": [f"map{n:02}" for n in range(1, 21)], "val": [f"map{n:02}" for n in range(21, 31)]}
SIZE = (320, 240)  # width, height
LEAST_PIXELS, LEAST_OBJECTS, ATTEMPTS = 20, 5, 20
SUMMONED, CLUSTERS = (12, 40), (2, 5)  # least and most of a scene
HEADINGS = 8
FORMAT = 1


class Scene(NamedTuple):
    """A rendered picture and its visible objects."""

    image: np.ndarray  # [H, W, 3] uint8
    masks: np.ndarray  # [T, H, W] bool: the visible part
    labels: list[int]  # of each object, in CLASSES


def game() -> DoomGame:
    """The engine without window and sound, not yet started. UsageError where vizdoom is not installed."""
    try:
        import vizdoom
    except ImportError as error:
        raise UsageError(f'scenes: expected vizdoom, pip install "route-kernels[scenes]": {error}') from error
    found = vizdoom.DoomGame()
    found.set_doom_game_path(str(Path(vizdoom.__file__).with_name("freedoom2.wad")))
    found.set_doom_config_path(os.devnull)  # instead of _vizdoom.ini in the current folder
    found.set_screen_resolution(vizdoom.ScreenResolution.RES_320X240)
    found.set_screen_format(vizdoom.ScreenFormat.RGB24)
    for shown in ("hud", "weapon", "crosshair", "decals", "particles", "messages"):
        getattr(found, f"set_render_{shown}")(False)
    found.set_labels_buffer_enabled(True)
    found.set_depth_buffer_enabled(True)
    found.set_objects_info_enabled(True)
    found.set_window_visible(False)
    found.set_sound_enabled(False)
    found.set_mode(vizdoom.Mode.PLAYER)
    found.add_game_args("+sv_cheats 1 +con_midtime 0")
    found.set_episode_timeout(0)
    found.add_available_button(vizdoom.Button.TURN_LEFT_RIGHT_DELTA)  # degrees to the right
    found.add_available_game_variable(vizdoom.GameVariable.ANGLE)
    return found


def _face(engine: DoomGame, angle: float) -> None:
    """Turn the camera to an angle in degrees; one tic passes."""
    engine.make_action([engine.get_state().game_variables[0] - angle], 1)


def _attempt(engine: DoomGame, map_name: str, rng: np.random.Generator) -> Scene:
    engine.set_doom_map(map_name)
    engine.set_seed(int(rng.integers(2**31)))
    engine.new_episode()
    for cheat in ("god", "notarget", "freeze"):
        engine.send_game_command(cheat)
    engine.make_action([0], 2)
    things = [(each.position_x, each.position_y) for each in engine.get_state().objects]
    x, y = things[rng.integers(len(things))]
    engine.send_game_command(f"warp {x:.0f} {y:.0f}")
    depths = []
    angles = rng.uniform(0, 360) + np.arange(HEADINGS) * 360 / HEADINGS
    for angle in angles:
        _face(engine, angle)
        depths.append(engine.get_state().depth_buffer[SIZE[1] // 3 : 2 * SIZE[1] // 3].mean())
    ahead = angles[int(np.argmax(depths))]
    count, clusters = int(rng.integers(*SUMMONED, endpoint=True)), int(rng.integers(*CLUSTERS, endpoint=True))
    centres = [(rng.uniform(-32, 32), rng.uniform(60, 500)) for _ in range(clusters)]
    for _ in range(count):
        angle, distance = centres[rng.integers(clusters)]
        angle, distance = np.radians(ahead + angle + rng.normal(0, 6)), distance + rng.normal(0, 50)
        engine.send_game_command(f"warp {x + distance * np.cos(angle):.0f} {y + distance * np.sin(angle):.0f}")
        _face(engine, rng.uniform(0, 360))  # a tic, without which what is summoned would not find the floor
        engine.send_game_command(f"summon {CLASSES[rng.integers(len(CLASSES))]}")
        engine.make_action([0], 1)
    engine.send_game_command(f"warp {x:.0f} {y:.0f}")
    engine.make_action([0], 1)
    _face(engine, ahead)
    engine.make_action([0], 1)
    state = engine.get_state()
    masks, labels = [], []
    for each in state.labels:
        mask = state.labels_buffer == each.value
        if each.object_name in CLASSES and mask.sum() >= LEAST_PIXELS:
            masks.append(mask)
            labels.append(CLASSES.index(each.object_name))
    return Scene(state.screen_buffer.copy(), np.array(masks).reshape(-1, *SIZE[::-1]), labels)


def render_scene(engine: DoomGame, seed: int, split: str, index: int) -> Scene:
    """Scene `index` of a split: the first attempt with `LEAST_OBJECTS` in sight, or the fullest of all."""
    rng = np.random.default_rng((seed, list(MAPS).index(split), index))
    scenes = []
    for _ in range(ATTEMPTS):
        scenes.append(_attempt(engine, MAPS[split][rng.integers(len(MAPS[split]))], rng))
        if len(scenes[-1].labels) >= LEAST_OBJECTS:
            break
    return max(scenes, key=lambda scene: len(scene.labels))


def scene_annotations(scene: Scene, image_id: int, first_id: int) -> list[dict]:
    """COCO annotations of a scene: boxes, areas and masks (RLE) of what is visible."""
    encoded = rle.encode(np.asfortranarray(scene.masks.transpose(1, 2, 0).astype(np.uint8)))
    return [
        {"id": number, "image_id": image_id, "category_id": label + 1, "iscrowd": 0}
        | {"bbox": rle.toBbox(mask).tolist(), "area": int(rle.area(mask))}
        | {"segmentation": {"size": mask["size"], "counts": mask["counts"].decode("ascii")}}
        for number, (label, mask) in enumerate(zip(scene.labels, encoded, strict=True), start=first_id)
    ]


def write_scenes(out: str | os.PathLike, seed: int = 0, train_images: int = 2000, val_images: int = 200) -> bool:
    """Write scenes as a COCO folder: ``annotations/``, ``train2017/``, ``val2017/``, ``scenes.json``.

    Returns True when it wrote, False when ``out`` held exactly this data set already.

    Raises:
        UsageError: vizdoom is not installed, or a number is negative.
        DatasetError: ``out`` holds anything else.
    """
    for name, value in (("seed", seed), ("train_images", train_images), ("val_images", val_images)):
        if value < 0:
            raise UsageError(f"{name}: expected at least 0, got {value}")
    parameters = {"seed": seed, "train_images": train_images, "val_images": val_images, "format": FORMAT}
    file = Path(out) / "scenes.json"
    if file.is_file():
        if json.loads(file.read_text(encoding="utf-8")) == parameters:
            return False
        raise DatasetError(f"{out}: holds scenes with other parameters; choose another folder, or delete this one")
    engine = game()
    engine.init()
    try:
        with whole_folder(out) as folder:
            _write(folder, engine, seed, {"train": train_images, "val": val_images})
            (folder / file.name).write_text(json.dumps(parameters, indent=2) + "\n", encoding="utf-8")
    finally:
        engine.close()
    return True


def _write(folder: Path, engine: DoomGame, seed: int, counts: dict[str, int]) -> None:
    categories = [{"id": n, "name": name, "supercategory": "thing"} for n, name in enumerate(CLASSES, start=1)]
    options = {"desc": "scenes", "unit": "image", "mininterval": 0.2 if sys.stderr.isatty() else 20.0}
    with tqdm(total=sum(counts.values()), **options) as bar:
        for split, count in counts.items():
            (folder / f"{split}2017").mkdir()
            images: list[dict] = []
            annotations: list[dict] = []
            for number in range(1, count + 1):
                scene = render_scene(engine, seed, split, number - 1)
                name = f"{number:012d}.png"
                Image.fromarray(scene.image).save(folder / f"{split}2017" / name, compress_level=1)
                images.append({"id": number, "file_name": name, "width": SIZE[0], "height": SIZE[1]})
                annotations += scene_annotations(scene, number, len(annotations) + 1)
                bar.update()
            write_instances(folder, split, images, annotations, categories, description="Crowds in Freedoom's maps")
