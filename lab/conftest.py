"""What the tests share: small models, a small world, a few helpers, and the marker `slow`.

    pytest -q               everything but the slow tests
    pytest -q -m slow       the slow tests alone

pytest hands the fixtures to the tests in this folder. test_genie.py, one folder up, imports them.
For pytest they are other fixtures there, so what is dear to make is made by cached functions: once
in a whole run.
"""
import contextlib
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# the tests import data, dynamics and so on from the folder above this one
HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))

import data
import dynamics
import lam
import st_block
import tokenizer

# scripts run here on the CPU, where the same seed gives the same bits
NO_GPU = os.environ | {"CUDA_VISIBLE_DEVICES": ""}

# of small tensors, more threads make more work
torch.set_num_threads(min(2, torch.get_num_threads()))


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: skipped, unless -m slow asks for it")


def pytest_collection_modifyitems(config, items):
    if "slow" in config.getoption("markexpr"):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow; run it with: pytest -m slow"))


# ------------------------------------------------------------------------------- helpers


@contextlib.contextmanager
def inside(folder):
    """Work in `folder` for a while. (contextlib.chdir came with Python 3.11.)"""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield


def refuses(words, main, *arguments, cwd="."):
    """main(arguments) must end with one sentence that holds `words`, a regular expression.

    It runs in this process, to be quick. Who runs a script sees the same sentence on stderr.
    """
    with inside(cwd), pytest.raises(SystemExit, match=words) as stopped:
        main([str(argument) for argument in arguments])
    sentence = str(stopped.value)
    assert len(sentence.splitlines()) == 1, f"more than one sentence: {sentence}"


def run(*command, cwd, env=NO_GPU):
    """Run a script as a user does: python COMMAND, in the folder `cwd`. Returns what subprocess
    does, with stdout and stderr as text."""
    words = [str(word) for word in command]
    return subprocess.run([sys.executable, *words], cwd=cwd, capture_output=True, text=True,
                          timeout=560, env=env)


def checkpoint(folder, stage):
    """What a stage, by its name, left in a run folder."""
    return st_block.read_checkpoint(folder / f"{stage}.pt", stage)


def scores(folder, stage):
    """The scores of a stage of the miniature world, which lies in `folder`: a dictionary."""
    return json.loads((folder / f"runs/platformer/{stage}.json").read_text())


# ------------------------------------------------------------------------------- small models

# All of these are untrained. They are for frames of 32x32 pixels, in 4x4 patches, and look back on
# a window of 4 frames.


def small_tokenizer(recipe, dim=16, vocabulary=24):
    torch.manual_seed(0)
    return tokenizer.build(recipe, height=32, width=32, window=4, patch=8, dim=dim, layers=2,
                           heads=2, vocabulary=vocabulary, latent_dim=8).eval()


def small_lam(recipe, dim=16):
    torch.manual_seed(0)
    m = lam.build(recipe, height=32, width=32, window=4, patch=8, dim=dim, layers=2, heads=2,
                  codes=8, latent_dim=8).eval()
    # ours begins with zeros there, and then no frame would depend on anything but the last
    torch.nn.init.normal_(m.to_pixels.weight, std=0.1)
    return m


def small_dynamics(recipe, dim=16, vocabulary=24, **more):
    torch.manual_seed(0)
    m = dynamics.build(recipe, rows=4, columns=4, vocabulary=vocabulary, codes=8, latent_dim=8,
                       window=4, dim=dim, layers=2, heads=2, **more).eval()
    m.codebook.copy_(torch.randn(8, 8))
    return m


# ------------------------------------------------------------------------------- fixtures


@functools.cache
def make_platformer(folder):
    folder = folder / "world"
    folder.mkdir()
    with inside(folder):
        data.main(["--episodes", "60", "--frames", "80"])
    return folder


@functools.cache
def make_world(folder):
    folder = make_platformer(folder)
    with inside(folder):
        for stage, steps in ((tokenizer, 350), (lam, 200), (dynamics, 300)):
            stage.main(["--device", "cpu", "--size", "test", "--steps", str(steps)])
    return folder


@pytest.fixture(scope="session")
def platformer(tmp_path_factory):
    """A folder with a small data set of the built-in game, data/platformer."""
    return make_platformer(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The same folder, with a world in miniature in runs/platformer: all stages, recipe ours."""
    return make_world(tmp_path_factory.getbasetemp())


@pytest.fixture
def unscored(monkeypatch):
    """No stage is scored: of a training of few steps, scores and pictures take most of the time."""
    def nothing(*args, **kwargs):
        return {}

    for stage in (tokenizer, lam, dynamics):
        monkeypatch.setattr(stage, "evaluate", nothing)


@pytest.fixture
def few(tmp_path, monkeypatch, unscored):
    """The flags of a training of 12 steps, on two levels of 40 frames. Nothing is scored."""
    monkeypatch.setitem(dynamics.PRIOR_STEPS, "test", 2)
    data.build_platformer(tmp_path / "small", 2, 40, 0, False)
    return ["--device", "cpu", "--size", "test", "--data", str(tmp_path / "small"),
            "--steps", "12", "--batch", "4", "--frames", "4"]
