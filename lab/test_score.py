"""The scores of a world in play: do they know a perfect world, and what is wrong with a broken one?

Here the true game stands in for a world that has been learned. It is perfect, until a test breaks
it in one way, and then the score that looks for this must fall.
"""
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import dynamics
import lam
import play
import tokenizer
from lab import fvd, pictures, score
from st_block import patchify


class TrueWorld:
    """The true game in the place of `play.Game`: its codes are the true buttons."""
    K = 6
    keys = range(6)
    meaning = range(6)
    built_in = True
    device = "cpu"

    def __init__(self, show):
        """show(world, frame) makes of the true frame (H, W, C) what the world shows."""
        self.show = show
        # its tokens are the pixels themselves
        self.tokenizer = SimpleNamespace(encode=same, decode=same)

    def reset(self, frame, true):
        self.first = frame
        self.true = true
        self.frame = frame.numpy()
        self.frame = self.show(self, self.frame.copy())

    def take_back(self):
        state, self.frame = self.moment
        self.true.restore(state)

    def press(self, code, button):
        self.moment = self.true.save(), self.frame
        self.true.step(button)
        self.frame = self.show(self, self.true.frame() / np.float32(255))
        return self.frame

    def every_button(self):
        state = self.true.save()
        frames = []
        for code in range(self.K):
            self.true.step(code)
            frames.append(self.show(self, self.true.frame() / np.float32(255)))
            self.true.restore(state)
        return np.stack(frames)


def same(x):
    return x


def perfect(world, frame):
    return frame


def frozen(world, frame):
    """It shows what it showed before."""
    return world.frame


def mirrored(world, frame):
    """It shows the true frame upside down and with left and right exchanged."""
    return frame[::-1, ::-1]


def black(world, frame):
    return 0 * frame


def twice(world, frame):
    """It shows the hero a second time, 12 pixels below himself."""
    colour = world.true.ink[1] / np.float32(255)
    frame[np.roll((frame == colour).all(-1), 12, 0)] = colour
    return frame


@pytest.fixture
def supply():
    """Starting frames in levels of the true game."""
    return play.starts(TrueWorld(perfect), seed=0)


# ------------------------------------------------------------------------------- each score


def test_arrow_keys_of_a_perfect_world_and_a_frozen_one(supply):
    scores = score.score_arrows(TrueWorld(perfect), supply, 10)
    assert scores["arrow_presses"] == 100
    assert scores["arrow_keys_held"] == 1
    assert scores["arrow_keys_held_at_walls"] == 1
    assert scores["arrow_keys_varied"] == 1
    scores = score.score_arrows(TrueWorld(frozen), supply, 10)
    assert scores["arrow_keys_held_walls"] > 2
    assert scores["arrow_keys_held_at_walls"] == 1, "against a wall the view stands still"
    assert scores["arrow_keys_held_elsewhere"] < 0.4


def test_who_stands_still_because_no_button_says_otherwise_is_at_no_wall(supply):
    world = TrueWorld(perfect)
    world.reset(*next(supply))
    none = np.zeros(4, int)
    right, wall = score.play_beside(world, none)
    assert right.all()
    assert not wall.any()
    # run to the left until the end of the level, which is a wall
    left = np.ones(120, int)
    right, wall = score.play_beside(world, left)
    assert right.all()
    assert wall[-1]
    assert not wall[0]


def shares(scores):
    """The shares that score_obeyed gave, without those that could not be had, by their names."""
    return {name: value for name, value in scores.items()
            if not name.endswith("_se") and value is not None}


def test_a_press_is_obeyed_by_a_perfect_world_and_by_no_other(supply, monkeypatch):
    monkeypatch.setattr(score, "RESTS", (0, 5))
    perfectly = shares(score.score_obeyed(TrueWorld(perfect), supply, 12))
    assert set(perfectly.values()) == {1}, "the true game obeys its keys"
    for button in ("left", "right", "jump", "left+jump", "right+jump"):
        for moment in ("rest_0", "rest_5", "walked", "run"):
            assert f"obeyed.{button}.{moment}" in perfectly
    assert "obeyed.left.wall" in perfectly and "obeyed.right.air" in perfectly

    standing = shares(score.score_obeyed(TrueWorld(frozen), supply, 12))
    for name, value in standing.items():
        assert value == (1 if name.endswith("wall") else 0), f"{name}: nothing ever moves"

    turned = shares(score.score_obeyed(TrueWorld(mirrored), supply, 12))
    assert turned["obeyed.left.rest_0"] == turned["obeyed.right.rest_5"] == 0
    assert turned["obeyed.jump.rest_0"] == 0, "nobody rises"


def test_a_hero_who_is_there_or_gone_or_doubled(supply, monkeypatch):
    monkeypatch.setattr(score, "HERO_FRAMES", (8, 16))
    scores = score.score_hero(TrueWorld(perfect), supply, 20)
    assert scores["hero_once_16"] == scores["hero_once_16_true_game"] > 0.9
    assert scores["hero_doubled_16"] == 0, "at night a coin in front of him is of nearly his colour"
    assert scores["motion_ratio_8"] == pytest.approx(1)
    assert scores["motion_ratio_16"] == pytest.approx(1)
    assert score.score_hero(TrueWorld(black), supply, 5)["hero_gone_8"] == 1
    assert score.score_hero(TrueWorld(twice), supply, 10)["hero_doubled_8"] > 0.5
    assert score.score_hero(TrueWorld(frozen), supply, 5)["motion_ratio_16"] == 0


def test_counterfactuals_of_a_perfect_world_and_of_exchanged_buttons(supply):
    scores = score.score_counterfactual(TrueWorld(perfect), supply, 5)
    # psnr is capped at 60 dB
    assert scores["counterfactual_psnr"] == pytest.approx(60)
    assert scores["counterfactual_psnr_se"] == pytest.approx(0, abs=1e-4)
    assert scores["counterfactual_psnr_tokenizer"] == pytest.approx(60)
    assert scores["counterfactual_copy_psnr"] < 50

    scores = score.score_counterfactual(TrueWorld(frozen), supply, 5)
    assert scores["counterfactual_psnr"] == scores["counterfactual_copy_psnr"]

    exchanged = TrueWorld(perfect)
    exchanged.meaning = [3, 2, 1, 0, 5, 4]
    scores = score.score_counterfactual(exchanged, supply, 5)
    assert scores["counterfactual_psnr"] < scores["counterfactual_copy_psnr"]


def test_codes_that_lead_elsewhere_and_codes_that_do_not(supply):
    """A LAM stands beside it that reads the true button from how the view moved."""
    def encode(pairs):
        moved = data.displacement(pairs[:, 0], pairs[:, 1])[:, 0].sign()
        return torch.where(moved < 0, 1, torch.where(moved > 0, 2, 0))[:, None]

    reader = SimpleNamespace(encode=encode)
    scores = score.score_codes(TrueWorld(perfect), supply, reader, 12)
    assert scores["fork"] > 0.9
    assert scores["consistency"] > 0.9, "at a wall left is not left"
    assert 0.35 < scores["cycle"] <= 0.5, "it knows three of the six, except at walls"

    scores = score.score_codes(TrueWorld(frozen), supply, reader, 12)
    assert scores["fork"] == 0
    assert scores["consistency"] == 1
    assert scores["cycle"] == pytest.approx(1 / 6), "no code and nothing happens is one of six"
    assert "cycle" not in score.score_codes(TrueWorld(frozen), supply, None, 2)


def test_delta_psnr_of_a_perfect_world_and_a_frozen_one(platformer, monkeypatch, capsys):
    """The "latent actions" of a clip are here the clip itself, for the world to make what it likes.
    """
    pixels = SimpleNamespace(encode=same, decode=same)
    codebook = SimpleNamespace(codebook=torch.zeros(2, 1))

    def scores_of(generate):
        monkeypatch.setattr(dynamics, "generate", generate)
        root = platformer / "data/platformer"
        return score.score_delta(pixels, codebook, pixels, root, "test", {})

    def obedient(model, z, a):
        return a

    def still(model, z, a):
        return z.expand_as(a)

    # few clips will do
    monkeypatch.setattr(score, "DELTAS", ((4, 8, (1, 4)), (16, 4, (16,)), (99, 4, (99,))))
    scores = scores_of(obedient)
    for t in (1, 4, 16):
        assert scores[f"psnr_t{t}"] == pytest.approx(60)
        assert scores[f"delta_psnr_t{t}"] > 40
        assert scores[f"copy_psnr_t{t}"] < 40
    assert scores["delta_psnr_curve_16"][15] == pytest.approx(scores["delta_psnr_t16"], abs=1e-3)
    assert "delta_psnr_t99" not in scores
    assert "no delta 99 frames ahead" in capsys.readouterr().err

    scores = scores_of(still)
    for t in (1, 4, 16):
        assert scores[f"delta_psnr_t{t}"] == 0
        assert scores[f"psnr_t{t}"] == scores[f"copy_psnr_t{t}"]


# ------------------------------------------------------------------------------- the command


@pytest.fixture
def few(monkeypatch):
    """Few clips for delta_psnr, short rests and plays, and no network for fvd."""
    def load_i3d(device):
        return None

    monkeypatch.setattr(fvd, "load_i3d", load_i3d)
    monkeypatch.setattr(score, "DELTAS", ((4, 8, (1, 4)), (16, 4, (16,))))
    monkeypatch.setattr(score, "RESTS", (0, 5))
    monkeypatch.setattr(score, "HERO_FRAMES", (8,))


def read(path):
    return json.loads(path.read_text())


def run_score(*flags):
    flags = [str(flag) for flag in flags]
    score.main(["--device", "cpu", "--maskgit", "1", "--prompts", "2", *flags])


def test_one_command_scores_the_whole_path(world, few, monkeypatch, capsys):
    """Every score of every stage stands in one table, and in scores.json."""
    monkeypatch.chdir(world)
    run = world / "runs/platformer"
    run_score()
    scores = read(run / "scores.json")
    printed = capsys.readouterr()
    of_lam = read(run / "lam.json")
    assert scores["lam.action_accuracy"] == of_lam["action_accuracy"]
    assert scores["tokenizer.psnr"] == read(run / "tokenizer.json")["psnr"]
    wanted = {"lam.nmi", "lam.lam_gain", "lam.code_perplexity", "lam.chance",
              "tokenizer.tokens_in_use", "tokenizer.token_perplexity", "delta_psnr_t4",
              "delta_psnr_t4_se", "psnr_t4", "copy_psnr_t4", "counterfactual_psnr",
              "arrow_keys_held", "arrow_keys_varied", "hero_once_8", "motion_ratio_8", "fork",
              "cycle", "lam.strict_accuracy", "obeyed.left.rest_0"}
    assert wanted <= scores.keys()
    assert all(math.isfinite(scores[name]) for name in wanted)
    assert all(f" {name} " in printed.out for name in scores)
    assert "no fvd" in printed.err
    # 2 prompts of 10 presses
    assert scores["arrow_presses"] == 20


def test_a_score_is_the_same_alone_and_among_others(world, few, tmp_path, monkeypatch):
    """Whatever was scored before it, and whether or not there is a LAM to be loaded."""
    monkeypatch.chdir(world)
    run_score("--only", "hero", "arrows", "delta", "--out", tmp_path / "together.json")
    together = read(tmp_path / "together.json")
    for name in ("delta", "arrows", "hero"):
        run_score("--only", name, "--out", tmp_path / "alone.json")
        alone = read(tmp_path / "alone.json")
        assert alone == {key: together[key] for key in alone}


def test_a_world_without_a_lam_has_the_other_scores(world, few, tmp_path, monkeypatch, capsys):
    for name in ("tokenizer.pt", "dynamics.pt", "tokenizer.json", "lam.json"):
        shutil.copy(world / "runs/platformer" / name, tmp_path)
    # no data is needed either
    monkeypatch.chdir(tmp_path)
    run_score("--run", ".")
    scores = read(tmp_path / "scores.json")
    assert {"lam.nmi", "counterfactual_psnr", "arrow_keys_held", "fork"} <= scores.keys()
    assert "hero_once_8" in scores
    assert not {"delta_psnr_t4", "cycle"} & scores.keys()
    errors = capsys.readouterr().err
    assert "no delta: it needs a LAM" in errors
    assert "no fvd: it needs a LAM" in errors
    with pytest.raises(SystemExit, match="none of these scores can be measured"):
        run_score("--run", ".", "--only", "fvd", "delta")
    assert read(tmp_path / "scores.json") == scores, "what was measured before is still there"


def test_where_nobody_knows_the_buttons_nothing_is_pressed(world, few, tmp_path, monkeypatch,
                                                           capsys):
    monkeypatch.chdir(world)
    for name in ("tokenizer.pt", "dynamics.pt", "tokenizer.json", "lam.pt"):
        shutil.copy(world / "runs/platformer" / name, tmp_path)
    of_lam = read(world / "runs/platformer/lam.json")
    del of_lam["keys"], of_lam["meaning"]
    (tmp_path / "lam.json").write_text(json.dumps(of_lam))
    run_score("--run", tmp_path)
    assert "delta_psnr_t4" in read(tmp_path / "scores.json")
    errors = capsys.readouterr().err
    for name in ("counterfactual", "arrows", "hero"):
        assert f"no {name}: {tmp_path}/lam.json does not say" in errors


def test_the_world_that_ships_is_left_as_it_is(world, tmp_path, monkeypatch):
    """Its scores go to runs/platformer, unless --out says otherwise."""
    ships = tmp_path / "assets"
    ships.mkdir()
    for name in ("tokenizer.pt", "dynamics.pt", "tokenizer.json", "lam.json"):
        shutil.copy(world / "runs/platformer" / name, ships)
    before = sorted(path.name for path in ships.iterdir())
    monkeypatch.setattr(play, "ASSETS", ships)
    monkeypatch.chdir(tmp_path)
    run_score("--run", "assets", "--only", "stages")
    assert "tokenizer.psnr" in read(tmp_path / "runs/platformer/scores.json")
    assert sorted(path.name for path in ships.iterdir()) == before


def test_a_lam_of_another_training_is_one_sentence(world, tmp_path, monkeypatch):
    monkeypatch.chdir(world)
    for name in ("tokenizer.pt", "dynamics.pt", "lam.json", "lam.pt"):
        shutil.copy(world / "runs/platformer" / name, tmp_path)
    ckpt = torch.load(tmp_path / "lam.pt", weights_only=True)
    ckpt["model"]["to_latent.weight"] += 1
    torch.save(ckpt, tmp_path / "lam.pt")
    with pytest.raises(SystemExit, match="trained on another lam"):
        run_score("--run", tmp_path)
    assert not (tmp_path / "scores.json").exists()


# ------------------------------------------------------------------------------- the pictures


def small_models():
    """An untrained tokenizer, LAM and dynamics model for frames of 32x32 pixels."""
    torch.manual_seed(0)
    common = dict(dim=16, layers=2, heads=2, latent_dim=8, window=4)
    frame = dict(height=32, width=32, patch=8)
    t = tokenizer.build("ours", vocabulary=24, **frame, **common)
    a = lam.build("ours", codes=8, **frame, **common)
    d = dynamics.build("ours", rows=4, columns=4, vocabulary=24, codes=8, **common)
    return t.eval(), a.eval(), d.eval()


@torch.no_grad()
def test_film_of_the_unmasking():
    """In the film of MaskGIT, holes are grey. All are filled, and what is drawn stays."""
    t, a, d = small_models()
    x = torch.rand(1, 5, 32, 32, 3)
    film = torch.stack(pictures.film_of_maskgit(t, d, a, x, frames=3, steps=5, temperature=1.0))
    # the prompt takes the first four pictures
    assert len(film) == 4 + 3 * 5
    patches = patchify(film[None, 4:], 8)[0]                        # (15, N, P*P*C)
    grey = (patches == 0.5).all(-1).unflatten(0, (3, 5))            # (frames, steps, N)
    assert grey[:, 0].any(-1).all(), "the first step leaves holes"
    assert not grey[:, -1].any(), "the last step leaves none"
    assert not (grey[:, 1:] & ~grey[:, :-1]).any(), "what is drawn is never masked again"


def test_one_command_draws_both_pictures(world, monkeypatch, capsys):
    monkeypatch.chdir(world)
    pictures.main(["--device", "cpu", "--maskgit", "1"])
    assert (world / "runs/platformer/delta_psnr.png").stat().st_size > 500
    assert (world / "runs/platformer/maskgit.gif").stat().st_size > 500
    # the curve is printed, a line for each of 16 frames ahead
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if line.split()[0].isdigit()]
    assert [int(row[0]) for row in rows] == list(range(1, 17))
    for t, inferred, random, kept, delta in rows:
        assert float(delta) == pytest.approx(float(inferred) - float(random), abs=0.02)
