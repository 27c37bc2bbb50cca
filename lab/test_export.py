"""A world that is handed on plays like the one that was trained, and harms no training."""
import json
import shutil

import pytest
import torch

import play
from lab import export

FILES = {"tokenizer.pt", "dynamics.pt", "tokenizer.json", "lam.json", "dynamics.json"}


def names(folder):
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


@pytest.fixture
def trained(world):
    return world / "runs" / "platformer"


def some_frames(folder):
    """The frames under each code, from a grey picture, at one pass a frame: (K, H, W, C)."""
    game = play.Game(play.load(folder, "cpu"), "cpu", steps=1, temperature=0.0)
    game.reset(torch.full((64, 64, 3), 0.5))
    return torch.from_numpy(game.every_button())


def test_a_world_handed_on_plays_the_same_in_a_quarter_of_the_bytes(trained, tmp_path):
    there = tmp_path / "my" / "world"
    export.main(["--run", str(trained), "--to", str(there)])
    assert names(there) == FILES
    assert json.loads((there / "lam.json").read_text()) == play.read_scores(trained / "lam.json")
    for stage in ("tokenizer", "dynamics"):
        before = (trained / f"{stage}.pt").stat().st_size
        assert (there / f"{stage}.pt").stat().st_size < before / 4
    # rounding may turn a token where two are about as likely
    close = (some_frames(there) - some_frames(trained)).abs() < 0.02
    assert close.float().mean() > 0.95
    # once more, over what it wrote
    export.main(["--run", str(trained), "--to", str(there)])
    assert names(there) == FILES


def test_no_training_is_overwritten(trained, tmp_path):
    with pytest.raises(SystemExit, match="name another folder"):
        export.main(["--run", str(trained), "--to", str(trained / ".." / "platformer")])
    # a LAM alone is a training, too
    shutil.copy(trained / "lam.pt", tmp_path)
    with pytest.raises(SystemExit, match="holds a training, which would be lost"):
        export.main(["--run", str(trained), "--to", str(tmp_path)])
    assert names(tmp_path) == {"lam.pt"}


def test_all_files_or_none(trained, tmp_path, monkeypatch):
    """The disk is full when the second checkpoint is written."""
    save = torch.save

    def full_disk(ckpt, file):
        if ckpt["stage"] == "dynamics":
            raise OSError("No space left on device")
        save(ckpt, file)

    monkeypatch.setattr(torch, "save", full_disk)
    there = tmp_path / "there"
    with pytest.raises(SystemExit, match="No space left on device"):
        export.main(["--run", str(trained), "--to", str(there)])
    assert not names(there)


def test_what_half_precision_cannot_hold_stays_as_it_is():
    weights = dict(weight=torch.tensor([1 / 3]), count=torch.tensor([1e6]), place=torch.arange(3))
    small = export.halved(weights)
    assert small["weight"].dtype == torch.half
    assert torch.equal(small["count"], weights["count"])
    assert torch.equal(small["place"], weights["place"])
