"""The loader's benchmark: it loads what training does, and its file has every contender."""

import json

from benchmarks import loader


def test_every_contender_loads_whole_epochs_and_orientation_saves_padding(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loader, "SIZES", ((80, 60), (60, 80)))
    config = loader.TransformConfig(scales=(60,), max_size=100, crop=0.0)
    monkeypatch.setattr(loader, "TransformConfig", lambda: config)
    monkeypatch.setattr("benchmarks.timing.FEWEST_ROUNDS", 1)
    assert loader.main(["--workers", "0", "--images", "16", "--seconds", "0", "--out", str(tmp_path)]) == 0
    (setting,) = json.loads((tmp_path / "loader.json").read_text())["settings"]
    found = setting["contenders"]
    assert list(found) == list(loader.CONTENDERS)
    assert all(each["images_per_second"]["median"] > 0 for each in found.values())
    assert found["boxes"]["padding"] == 0 < found["boxes, batches in plain random order"]["padding"]
    assert "images/s" in capsys.readouterr().out
