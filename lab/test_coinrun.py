"""CoinRun: the data set that is made of it, and the rulers that play beside it.

Where the optional package procgen-mirror is missing, only what works without it is tested.
"""
import builtins
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import dynamics
import lam
import play
import tokenizer
from lab import coinrun, score
from lab.conftest import inside, refuses
from lab.test_score import TrueWorld, frozen, perfect

needs_game = pytest.mark.skipif(not coinrun.is_installed(),
                                reason="the optional package procgen-mirror is not installed")

# ------------------------------------------------------------------------------ without the package


def test_each_of_the_nine_moves_is_one_of_the_six_buttons():
    """A move with down is the button without it, and each button is a move of its own."""
    words = [data.ACTIONS[button] for button in coinrun.BUTTON]
    assert words == ["left", "left", "left+jump", "none", "none", "jump", "right", "right",
                     "right+jump"]
    assert [coinrun.BUTTON[move] for move in coinrun.MOVE] == [0, 1, 2, 3, 4, 5]
    assert not any("down" in coinrun.MOVES[move] for move in coinrun.MOVE)


def test_without_the_package_one_sentence_says_what_to_install(tmp_path, monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "procgen":
            raise ImportError("No module named 'procgen'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    refuses("pip install procgen-mirror", coinrun.main, cwd=tmp_path)
    assert not (tmp_path / "data").exists()
    assert not coinrun.is_installed()
    assert "procgen-mirror" in coinrun.obstacle("obeyed")
    assert coinrun.obstacle("delta") is None


@pytest.mark.parametrize("flags", (["--frames", "16"], ["--episodes", "0"], ["--seed", "-1"],
                                   ["--name", "../up"]))
def test_a_flag_that_makes_no_sense(tmp_path, flags):
    refuses(flags[0], coinrun.main, *flags, cwd=tmp_path)


def test_players():
    """Random: all nine moves alike, a new one each frame. Sticky: held, and right more often."""
    player = coinrun.RandomPlayer(np.random.default_rng(0))
    moves = np.array([player() for _ in range(9000)])
    assert abs(np.bincount(moves, minlength=9) - 1000).max() < 150
    assert abs((moves[1:] == moves[:-1]).mean() - 1 / 9) < 0.02
    player = coinrun.StickyPlayer(np.random.default_rng(0))
    moves = np.array([player() for _ in range(9000)])
    changes = np.flatnonzero(np.diff(moves)) + 1
    assert np.diff(changes).min() >= 2
    shares = np.bincount(moves // 3, minlength=3) / len(moves)
    assert shares[2] > shares[0] > shares[1] > 0.1


# ------------------------------------------------------------------------------- the game


@needs_game
def test_a_level_is_determined_by_its_seed_and_the_buttons():
    videos = []
    for _ in range(2):
        game = coinrun.CoinRun(3)
        frames = [game.frame()]
        for button in (2, 2, 5, 5, 1, 0, 3):
            game.step(button)
            frames.append(game.frame())
        videos.append(np.stack(frames))
    assert (videos[0] == videos[1]).all()
    assert (videos[0] != coinrun.CoinRun(4).frame()).any()


@needs_game
def test_what_was_saved_can_be_restored():
    game = coinrun.CoinRun(3)
    for button in (2, 2, 5):
        game.step(button)
    state, frame, place = game.save(), game.frame(), game.place()
    for button in (1, 1, 1, 1):
        game.step(button)
    assert (game.frame() != frame).any()
    game.restore(state)
    assert (game.frame() == frame).all() and game.place() == place
    # and time goes on as it did
    game.step(2)
    after = game.frame()
    game.restore(state)
    game.step(2)
    assert (game.frame() == after).all()


@needs_game
def test_all_moves_are_tried_and_one_is_chosen():
    game = coinrun.CoinRun(3)
    game.step(2)
    state = game.save()
    frames = game.try_moves()
    for button, move in enumerate(coinrun.MOVE):
        game.restore(state)
        game.step(button)
        assert (game.frame() == frames[move]).all()
    game.restore(state)
    game.try_moves()
    game.choose(7)
    assert (game.frame() == frames[7]).all()


@needs_game
def test_the_place_of_the_view_is_how_pictures_move():
    """To the right and downwards, within a pixel, in most of 60 transitions of six levels."""
    near = []
    for level in range(6):
        game = coinrun.CoinRun(level)
        player = coinrun.StickyPlayer(np.random.default_rng(level))
        frames, places = [], []
        for _ in range(11):
            game.step(coinrun.BUTTON[player()])
            frames.append(game.frame())
            places.append(game.place())
        x = torch.from_numpy(np.stack(frames)).float() / 255
        seen = data.displacement(x[:-1], x[1:], most=8).numpy()
        near.append(np.abs(seen - np.diff(places, axis=0)) <= 1)
    assert np.concatenate(near).mean(0).min() > 0.8


# ------------------------------------------------------------------------------- the data set


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with data/few: three levels, of at most 40 frames, of the sticky player."""
    folder = tmp_path_factory.mktemp("coinrun")
    with inside(folder):
        coinrun.main(["--policy", "sticky", "--episodes", "3", "--frames", "40", "--name", "few"])
    return folder


@needs_game
def test_a_data_set_has_the_format_of_data_py(small):
    root = small / "data/few"
    meta = json.loads((root / "meta.json").read_text())
    assert meta["source"] == "coinrun, sticky player, seed 0"
    first = dict(train=0, valid=500_000, test=750_000)
    for split in first:
        clips = data.Clips(root, split, 4)
        buttons, same, seeds = data.true_actions(root, split)
        assert clips.frames.shape[1:] == (64, 64, 3)
        assert len(buttons) == len(same) == len(clips.frames)
        assert seeds[0] == first[split] and len(seeds) == len(meta["episodes"][split])
    assert (root / "sheet.png").exists()


@needs_game
def test_the_true_buttons_lead_to_the_frames_of_the_data_set(small):
    """So does any button of which SPLIT_same says so, and no other one, but for moves with down."""
    root = small / "data/few"
    clips = data.Clips(root, "train", 2)
    buttons, same, seeds = data.true_actions(root, "train")
    assert same[np.arange(len(buttons)), buttons].all()
    missed = 0
    for (first, end), seed in zip(clips.episodes, seeds):
        game = coinrun.CoinRun(int(seed))
        for t in range(first, min(end - 1, first + 12)):
            assert (game.frame() == clips.frames[t]).all()
            state = game.save()
            for button in range(6):
                game.restore(state)
                game.step(button)
                missed += (game.frame() == clips.frames[t + 1]).all() != same[t, button]
            game.restore(state)
            game.step(buttons[t])
    assert missed <= 3


@needs_game
def test_an_episode_ends_where_its_level_does():
    """A hero who runs right and jumps is dead, or has the coin, long before the 1,000 frames."""
    def run():
        return 8

    lengths = []
    for level in range(8):
        video, buttons, same, places = coinrun.play_episode(level, 1000, run)
        assert len(video) == len(buttons) == len(same) == len(places)
        # the view never jumps back to where the level begins
        assert np.abs(np.diff(places, axis=0)).max() < 9
        lengths.append(len(video))
    assert min(lengths) < 1000


# ------------------------------------------------------------------------------- scores


def exchanged(world, frame):
    """It shows the true frame with left and right exchanged, so that all moves are so, too."""
    return np.ascontiguousarray(frame[:, ::-1])


@pytest.fixture
def world():
    """A world that is the true game, see lab/test_score.py, and starting frames for it."""
    def make(show):
        game = TrueWorld(show)
        game.origin = dict(data="coinrun, sticky player, seed 0")
        return game, coinrun.starts(game, seed=0)

    return make


@needs_game
def test_keys_are_obeyed_by_a_perfect_world_and_by_no_other(world):
    scores = coinrun.score_obeyed(*world(perfect), prompts=4)
    assert scores["obeyed.sideways"] > 0.9 and scores["obeyed.jump.rest_0"] == 1
    assert coinrun.score_obeyed(*world(frozen), prompts=2)["obeyed.sideways"] == 0
    scores = coinrun.score_obeyed(*world(exchanged), prompts=2)
    assert scores["obeyed.sideways"] < 0.1


@needs_game
def test_arrow_keys_of_a_perfect_world_and_a_frozen_one(world):
    scores = coinrun.score_arrows(*world(perfect), prompts=4)
    assert scores["arrow_keys_varied"] > 0.9
    assert coinrun.score_arrows(*world(frozen), prompts=4)["arrow_keys_varied"] < 0.6


@needs_game
@pytest.mark.slow
def test_a_world_of_coinrun_is_scored_and_played(small, monkeypatch, unscored, capsys):
    """The whole path, in a few steps: lab.score has all but the hero, and play needs no true game.

    The keys come from the labels. (lam.json has none here, so it gets some.)
    """
    monkeypatch.chdir(small)
    monkeypatch.setitem(dynamics.PRIOR_STEPS, "test", 2)
    flags = ["--device", "cpu", "--data", "data/few"]
    for stage in (tokenizer, lam, dynamics):
        stage.main([*flags, "--size", "test", "--steps", "3", "--batch", "4", "--frames", "4"])
    known = json.loads(Path("runs/few/lam.json").read_text())
    known |= dict(keys=[0] * 6, meaning=[0] * 8)
    Path("runs/few/lam.json").write_text(json.dumps(known))
    score.main([*flags, "--prompts", "2", "--maskgit", "1", "--only", "codes", "counterfactual",
                "obeyed", "arrows", "hero"])
    scores = json.loads(Path("runs/few/scores.json").read_text())
    assert {"fork", "counterfactual_psnr", "obeyed.left.rest_0", "arrow_keys_varied"} <= set(scores)
    assert scores["split"] == "test"
    assert "no hero: it knows the hero by his colour" in capsys.readouterr().err
    play.main([*flags, "--script"])
    assert Path("runs/few/play.gif").exists()


def test_the_hero_is_not_counted():
    assert "colour" in coinrun.obstacle("hero")
    assert coinrun.is_coinrun(SimpleNamespace(origin=dict(data="coinrun, random player, seed 0")))
    assert not coinrun.is_coinrun(SimpleNamespace(origin=dict(data="platformer, seed 0")))
