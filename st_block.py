"""What every stage shares: the ST-transformer and the vector quantizer (part 1), and the plumbing
of a training script (part 2).

The legend of shapes, for the whole project:
    B clips   T frames   N tokens of a frame   D width   K codes   V tokens of the vocabulary
    H W C pixels   P pixels along a patch's side   h heads   dh width of a head   S a sequence
    M vectors, of however many clips   F frames of a whole data set

Genie (Bruce et al. 2024, arXiv 2402.15391) is three models made of one block, the ST block of
section 2 of the paper. A frame is cut into patches, squares of pixels. Inside a model each patch is
a vector, a token. A token never looks at every other token of the video. It looks at its own frame
(spatial attention), then at its own place in earlier frames (temporal attention; causal: never at
later ones), then it passes one feed-forward layer, two matrices with a bend between them. So
T N^2 + N T^2 pairs are compared instead of (T N)^2.
"""
import contextlib
import os
import signal
import sys


def leave(*_):
    """Ctrl-C while torch is loaded, which takes seconds: one line, and out."""
    print("interrupted; nothing was begun", file=sys.stderr)
    os._exit(130)


# only the main thread may catch signals
with contextlib.suppress(ValueError):
    as_before = signal.signal(signal.SIGINT, leave)

import argparse
import functools
import hashlib
import io
import json
import math
import secrets
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

with contextlib.suppress(ValueError, NameError):
    signal.signal(signal.SIGINT, as_before)

# ------------------------------------------------------------------------------- patches


def grid(H, W, P):
    """How many rows and columns of patches cover a frame. The last ones may reach beyond it."""
    return math.ceil(H / P), math.ceil(W / P)


def patchify(x, P):
    """Cut frames (B, T, H, W, C) into squares of P x P pixels, row by row: (B, T, N, P*P*C).

    A frame that is no whole number of patches is padded with zeros, below and on the right.
    """
    B, T, H, W, C = x.shape
    rows, columns = grid(H, W, P)
    if (rows * P, columns * P) != (H, W):
        x = F.pad(x, (0, 0, 0, columns * P - W, 0, rows * P - H))
    x = x.view(B, T, rows, P, columns, P, C)
    x = x.permute(0, 1, 2, 4, 3, 5, 6)                              # (B, T, H/P, W/P, P, P, C)
    return x.reshape(B, T, rows * columns, P * P * C)


def unpatchify(x, P, H, W):
    """The inverse of patchify: (B, T, N, P*P*C) -> frames (B, T, H, W, C), without padding."""
    B, T, N, _ = x.shape
    rows, columns = grid(H, W, P)
    x = x.view(B, T, rows, columns, P, P, -1)
    x = x.permute(0, 1, 2, 4, 3, 5, 6)                              # (B, T, H/P, P, W/P, P, C)
    x = x.reshape(B, T, rows * P, columns * P, -1)
    return x[:, :, :H, :W]


# ------------------------------------------------------------------------------- attention


def rotary(time, dim):
    """The cosines and sines, (T, dim/2) each, of rotary position embedding (Su et al. 2021).

    It tells attention when each frame is, by turning vectors. time (T,) is the number of each
    frame. The pair of entries i and i + dim/2 of a query or a key is turned by the angle
    time * theta_i. Then q . k depends on the difference of the two times
    alone. The usual base of 10000 is made for thousands of positions. The windows here are 16
    frames at most, so the base is 100, and the periods run from 6 to about 500 frames.
    """
    theta = 100.0 ** (-torch.arange(0, dim, 2, device=time.device).float() / dim)
    angle = time.float()[:, None] * theta                           # (T, dim/2)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turn the pairs of x (..., T, dh) by the angles of `rotary`."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)


def attention_by_hand(q, k, v, mask=None):
    """softmax(q k^T / sqrt(dh)) v for q, k, v (..., S, dh). mask: True where q may look at k.

    Each position of a sequence has a query q (what it looks for), a key k (what it offers) and a
    value v (what it hands over). It collects the values whose keys match its query.
    """
    # how well does each query match each key?
    weight = q @ k.transpose(-1, -2) / math.sqrt(q.size(-1))        # (..., Sq, Sk)
    # what a query may not see gets a weight of zero
    if mask is not None:
        weight = weight.masked_fill(~mask, float("-inf"))
    return weight.softmax(-1) @ v                                   # (..., Sq, dh)


def attention(q, k, v, mask=None):
    """The same as attention_by_hand, by whichever of the two is faster. A test says they agree.

    The kernel of torch never stores the weights, which pays for long sequences. On a GPU it works
    in tiles of 64 positions, which a window of 16 frames leaves mostly empty: hence the 64 below.
    On a CPU, and for short sequences, torch.compile makes the version by hand the faster one.
    """
    # under autocast (16-bit floats where they do no harm) the norm leaves both in 32 bits
    q, k = q.to(v.dtype), k.to(v.dtype)
    if torch.compiler.is_compiling() and (q.device.type == "cpu" or q.size(-2) < 64):
        return attention_by_hand(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, mask)


# what all layer norms add to a variance before they divide: chosen by hand; torch's default of 1e-5
# was not compared
EPS = 1e-6


class Attention(nn.Module):
    """Self-attention over one axis, by several heads, each on its part of the width, with QK-norm:
    queries and keys are brought to the same length before they are compared.

    The paper does so in the dynamics model (section 2.1). We do it in all three models. Queries
    and keys share one norm.
    """

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.norm = nn.LayerNorm(dim // heads, eps=EPS, bias=False)

    def forward(self, x, turn=None, mask=None, past=None):
        """x (B, S, D) attends along S. Returns (B, S, D).

        Here B counts sequences: the frames of all clips, or all places of all clips. turn: the
        cosines and sines of `rotary`, for attention through time. mask (S, S): True where a query
        (row) may look at a key (column). past: (keys, values, slot) of one layer of a Cache.
        """
        B, S, D = x.shape
        # queries, keys and values of every head
        qkv = self.qkv(x).view(B, S, 3, self.heads, D // self.heads)
        qkv = qkv.permute(2, 0, 3, 1, 4)                            # (3, B, h, S, dh)
        # QK-norm bounds how sharply a query can choose
        qk, v = self.norm(qkv[:2]), qkv[2]
        # through time, both are turned by the time of their frame
        if turn is not None:
            qk = rotate(qk, *turn)
        q, k = qk                                                   # (B, h, S, dh) each
        # in play, the keys and values of the new frame join those of the frames before it
        if past is not None:
            keys, values, slot = past
            k = keys.index_copy_(2, slot, k.to(keys.dtype))         # (B, h, window, dh)
            v = values.index_copy_(2, slot, v.to(values.dtype))
        # every query collects the values of the keys that match it
        x = attention(q, k, v, mask)                                # (B, h, S, dh)
        # the heads side by side again
        return self.out(x.transpose(1, 2).reshape(B, S, D))


# ------------------------------------------------------------------------------- the ST block


class STBlock(nn.Module):
    """Spatial attention, causal temporal attention, ONE feed-forward layer after both (section 2).

    Each part adds to x what it found. The paper leaves some things open. We use a layer norm before
    each part (it gives each vector mean 0 and variance 1), and squared ReLU, max(0, x)^2 (So et al.
    2021). The feed-forward layer is `ffw` times D wide. The published
    numbers of parameters come to 7 to 10 D^2 a block. The two attentions take 8 D^2, and the
    feed-forward layer takes 2 * ffw D^2. So --recipe paper uses ffw = 1, which makes 10. The usual
    ffw = 4 makes 16. --recipe ours uses it: at the small sizes there are only one or two blocks,
    and most of what they can learn is in that layer.
    """

    def __init__(self, dim, heads, window, ffw):
        super().__init__()
        self.norm_space = nn.LayerNorm(dim, eps=EPS, bias=False)
        self.space = Attention(dim, heads)
        # in a window of one frame there is nothing to attend to through time
        self.time = None
        if window > 1:
            self.norm_time = nn.LayerNorm(dim, eps=EPS, bias=False)
            self.time = Attention(dim, heads)
        self.norm_ffw = nn.LayerNorm(dim, eps=EPS, bias=False)
        self.up = nn.Linear(dim, ffw * dim)
        self.down = nn.Linear(ffw * dim, dim)

    def forward(self, x, turn, mask, past=None):
        """x (B, T, N, D) -> the same. turn, mask, past: through time, see Attention."""
        B, T, N, D = x.shape
        # space: every frame by itself
        s = self.norm_space(x).view(B * T, N, D)
        x = x + self.space(s).view(B, T, N, D)
        # time: every place by itself
        if self.time is not None:
            t = self.norm_time(x).transpose(1, 2).contiguous().view(B * N, T, D)
            x = x + self.time(t, turn, mask, past).view(B, N, T, D).transpose(1, 2)
        # one feed-forward layer after both
        f = self.up(self.norm_ffw(x))
        f = F.relu(f).square()
        return x + self.down(f)                                     # (B, T, N, D)


class STTransformer(nn.Module):
    """A stack of ST blocks over (B, T, N, D).

    Token (t, n) of the output depends on frames 1..t of the input only. In each layer a frame
    looks at itself and at the `window` - 1 frames before it, however long the clip is.
    """

    def __init__(self, tokens, dim, layers, heads, window, ffw):
        super().__init__()
        self.heads = heads
        self.window = window
        # an embedding, a learned vector, for each place in the frame; `rotary` tells the time.
        # (0.02: as in GPT-2. With 0.5 a short training of the dynamics ended at a loss of 1.37
        # instead of 1.26)
        self.place = nn.Parameter(0.02 * torch.randn(tokens, dim))
        self.blocks = nn.ModuleList(STBlock(dim, heads, window, ffw) for _ in range(layers))
        self.norm = nn.LayerNorm(dim, eps=EPS, bias=False)
        # torch's defaults, except these: the weights of what a block adds to x begin small, as in
        # GPT-2. A block adds three times
        for name, p in self.named_parameters():
            if name.endswith(("out.weight", "down.weight")):
                nn.init.normal_(p, std=0.02 / math.sqrt(3 * layers))

    def visible(self, T, device):
        """Which frames (columns) may each of T frames (rows) look at? True there, (T, T)."""
        # not at later ones, and not further back than the window
        return torch.ones(T, T, dtype=torch.bool, device=device).tril().triu(1 - self.window)

    def forward(self, x, cache=None):
        """x (B, T, N, D) -> the same. With a cache, x (B, 1, N, D) is the one frame that is new."""
        if cache is not None:
            return self.run_blocks(x, cache.turn, cache.mask, cache)
        # when is each frame, and which part of the past may it see?
        T = x.size(1)
        turn = rotary(torch.arange(T, device=x.device), x.size(-1) // self.heads)
        return self.run_blocks(x, turn, self.visible(T, x.device))

    def run_blocks(self, x, turn, mask, cache=None):
        """x (B, T, N, D) -> the same, with the turn and the mask that are given: see Attention."""
        # every token knows its place in the frame
        x = x + self.place
        for layer, block in enumerate(self.blocks):
            past = None
            if cache is not None:
                past = cache.keys[layer], cache.values[layer], cache.slot
            x = block(x, turn, mask, past)
        return self.norm(x)

    def new_cache(self, B):
        """An empty Cache for B worlds played side by side."""
        tokens, dim = self.place.shape
        shape = (B * tokens, self.heads, self.window, dim // self.heads)
        return Cache(len(self.blocks), shape, self.place.device)


class Cache:
    """What play remembers: the temporal keys and values of the last `window` frames, by layer.

    Spatial attention never leaves a frame and temporal attention never looks ahead. So a new frame
    changes nothing about the frames before it, and their keys and values can be kept. They lie in
    a ring: frame t, counted from 0, is in slot t mod window, and the oldest frame is overwritten.
    A forward pass writes the slot of its frame. Several passes of one frame, as sampling needs
    them, write the same slot again, until `advance` goes on to the next frame.
    Rotary time is relative, so nothing that is kept has to be turned again. The result equals that
    of the whole past under the mask of STTransformer, at any length (a test).
    """

    def __init__(self, layers, shape, device):
        """shape: (B*N, h, window, dh) of the keys of one layer."""
        self.keys = [torch.zeros(shape, device=device) for _ in range(layers)]
        self.values = [torch.zeros(shape, device=device) for _ in range(layers)]
        self.clear()

    def move_to(self, now):
        """Make frame number `now` the next one. Its passes need a slot, a turn and a mask."""
        _, _, window, dh = self.keys[0].shape
        device = self.keys[0].device
        time = torch.tensor([now], device=device)
        self.now = now
        self.slot = time % window                                   # (1,)
        self.turn = rotary(time, dh)
        # the ring holds just the window, and at first less than that
        self.mask = (torch.arange(window, device=device) <= now)[None]      # (1, window)

    def advance(self):
        """Keep the frame that came in last. The next forward pass is of the frame after it."""
        self.move_to(self.now + 1)

    def clear(self):
        """Forget everything. The next frame is the first. (The mask hides what is in the slots.)"""
        self.move_to(0)

    def snapshot(self):
        """What the next frame will overwrite, for `restore`."""
        return self.now, [t.index_select(2, self.slot) for t in self.keys + self.values]

    def restore(self, snapshot):
        """Take back the frame since `snapshot`. Of several frames, take the newest back first."""
        now, kept = snapshot
        self.move_to(now)
        for mine, t in zip(self.keys + self.values, kept):
            mine.index_copy_(2, self.slot, t)


# ------------------------------------------------------------------------------- vector quantizer


class VectorQuantizer(nn.Module):
    """The quantizer of VQ-VAE as printed (van den Oord et al. 2017, equation 3).

    It rounds: each vector v becomes e, the nearest of the K codes of its codebook. Three things
    make that learn, where sg stops the gradient and | |^2 is a mean over entries:
    - straight-through: the gradient at the code e is handed to the vector v as it is;
    - codebook loss |sg(v) - e|^2: a code moves to the vectors that chose it;
    - commitment loss beta |v - sg(e)|^2: a vector stays near the code that it chose.
    """

    def __init__(self, codes, dim, beta):
        super().__init__()
        self.beta = beta
        # the paper does not say how codes begin. This is common in published code
        start = torch.empty(codes, dim).uniform_(-1 / codes, 1 / codes)
        self.codebook = nn.Parameter(start)                         # (K, dim)

    @torch.no_grad()
    def nearest(self, v):
        """The index (...) of the code nearest to each vector of v (..., dim)."""
        e = self.codebook
        # |v - e|^2 = |v|^2 - 2 v.e + |e|^2, and |v|^2 is alike for all codes.
        # In 32 bits: with 16, of a thousand codes the wrong one would often be taken
        with torch.autocast(v.device.type, enabled=False):
            length = (e * e).sum(-1)                                # (K,)
            distance = torch.addmm(length, v.float().flatten(0, -2), e.T, alpha=-2)
        return distance.argmin(-1).view(v.shape[:-1])

    def lookup(self, index):
        """The code vectors (..., dim) of indices (...)."""
        return F.embedding(index, self.codebook)

    def forward(self, v):
        """Vectors v (..., dim) -> their codes e (..., dim), the indices (...), and the loss."""
        v = v.float()
        # the nearest code of each vector
        index = self.nearest(v)
        e = self.lookup(index)                                      # (..., dim)
        # codes move to vectors, and vectors stay near codes
        codebook_loss = F.mse_loss(e, v.detach())
        commitment_loss = F.mse_loss(v, e.detach())
        # straight-through: forward e, backward as if it were v
        e = v + (e - v).detach()
        return e, index, codebook_loss + self.beta * commitment_loss


def counts(index, K):
    """How often each of K codes occurs in index (...): (K,) floats."""
    # torch.bincount would make a GPU wait
    ones = torch.ones(index.numel(), device=index.device)
    return torch.zeros(K, device=index.device).index_add_(0, index.flatten(), ones)


def perplexity(index, K):
    """exp(entropy) of the use of codes: K if all are equally common, 1 if one alone is used."""
    p = counts(index, K) / index.numel()
    # a code that is not used adds 0
    return torch.exp(-(p * p.clamp(min=1e-12).log()).sum())


# What follows in part 1 is ours. The paper's models do not use it.


class OnlineKMeans(VectorQuantizer):
    """The quantizer that --recipe ours trains with. It differs from VQ-VAE's in three ways.

    - Vectors are brought to unit root-mean-square first, each by itself. Without any norm, codes
      collapse to few. A norm by statistics of the batch drifts while the encoder learns, and then
      the same clip gets other codes in evaluation than in training.
    - A code is the running mean of the vectors that chose it (VQ-VAE, appendix A.1). That is
      k-means online. The gradient of the codebook loss is too slow for a training of minutes.
    - A dead code, one that is hardly chosen of late, moves onto a random vector of the batch, plus
      noise. Noise matters: an exact copy of a live code would tie with it for ever.

    The first four numbers below were chosen by hand. The notes have no comparison of others.
    """
    decay = 0.98        # of the running means: they forget half in 34 steps
    dead_below = 0.03   # a code with less than this part of its fair share of vectors is dead
    reborn = 0.2        # the part that a revived code begins with: time enough to prove itself
    noise = 0.05        # added to the vector that a dead code moves onto
    # added to the mean square of a vector before the norm. A transition in which nothing moves has
    # a vector near zero. With torch's default of 1e-7 its gradient, in bf16 all of it rounding, is
    # four times that of a moving one. With 1e-4 it is a seventh.
    eps = 1e-4

    def __init__(self, codes, dim, beta):
        super().__init__(codes, dim, beta)
        # the codebook learns by counting, not by gradient: it is a buffer
        del self.codebook
        start = F.rms_norm(torch.randn(codes, dim), (dim,))
        self.register_buffer("codebook", start)                     # (K, dim)
        # running means over the batches: the sum of the vectors that chose each code, and their
        # number. They begin at 0, so the first batch revives nearly all codes, on its vectors
        self.register_buffer("mean_sum", torch.zeros(codes, dim))
        self.register_buffer("mean_count", torch.zeros(codes))

    def norm(self, v):
        """v (..., dim) in fp32, brought to unit root-mean-square."""
        with torch.autocast(v.device.type, enabled=False):
            return F.rms_norm(v.float(), (v.size(-1),), eps=self.eps)

    def nearest(self, v):
        """The index (...) of the code nearest to each vector of v (..., dim), of any length."""
        return super().nearest(self.norm(v))

    def forward(self, v):
        """Vectors v (..., dim) -> their codes e (..., dim), the indices (...), and the loss."""
        v = self.norm(v)
        index = super().nearest(v)
        # the codes move first, so that e is where a code is now
        if self.training:
            self.learn(v.detach().flatten(0, -2), index.flatten())
        e = self.lookup(index)                                      # (..., dim)
        commitment_loss = F.mse_loss(v, e.detach())
        # straight-through, as above
        return v + (e - v).detach(), index, self.beta * commitment_loss

    @torch.no_grad()
    def learn(self, v, index):
        """One step of online k-means on v (M, dim), which chose index (M,). Then the revival."""
        K = len(self.codebook)
        M = len(v)
        # running means of how many vectors chose each code, and of their sum
        total = torch.zeros_like(self.mean_sum).index_add_(0, index, v)
        self.mean_count.lerp_(counts(index, K), 1 - self.decay)
        self.mean_sum.lerp_(total, 1 - self.decay)
        # dead codes move onto vectors of the batch
        dead = self.mean_count < self.dead_below * M / K            # (K,)
        fresh = v[torch.randint(M, (K,), device=v.device)]
        fresh = fresh + self.noise * torch.randn_like(fresh)
        share = M / K * self.reborn
        self.mean_sum.copy_(torch.where(dead[:, None], fresh * share, self.mean_sum))
        self.mean_count.masked_fill_(dead, share)
        # a code is the mean of its vectors (without revival, one that has none stays). Both 1e-6
        # and 1e-9 only keep apart what has vectors and what has none
        used = self.mean_count[:, None] > 1e-6
        mean = self.mean_sum / self.mean_count[:, None].clamp(min=1e-9)
        self.codebook.copy_(torch.where(used, mean, self.codebook))


class Neighbours(nn.Module):
    """x plus a 3x3 convolution of x over the grid of patches: (B, T, N, D) -> the same.

    From frame to frame most things move by a few pixels, to where a neighbour was. Attention can
    learn to fetch them from there, place by place. This gives it to the model from the start.
    """

    def __init__(self, rows, columns, dim):
        super().__init__()
        self.rows = rows
        self.columns = columns
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x):
        grid = x.reshape(-1, self.rows, self.columns, x.size(-1))
        around = self.conv(grid.permute(0, 3, 1, 2))                # (B*T, D, rows, columns)
        return x + around.permute(0, 2, 3, 1).reshape(x.shape)


# #########################################################################################
#
#   PART 2: the plumbing of a training script. Skip this on a first reading.
#
#   Flags and sizes, optimizer and learning rate, device and precision, checkpoints, resume,
#   pictures. (Optimizer and learning rate are those of appendix C.)
#
# #########################################################################################

SIZES = ("test", "laptop", "gpu", "coinrun")        # how large, and how long
RECIPES = ("paper", "ours")                         # how: as published, or with what we added


# ------------------------------------------------------------------------------- command line


def stop(message):
    """End the program because of a user's mistake: one sentence on stderr, exit code 1."""
    end_bars()
    raise SystemExit(f"error: {message}")


def end_bars():
    """Close the progress bars. What is printed next stands on a line of its own."""
    for bar in list(getattr(tqdm, "_instances", [])):
        bar.close()


def on_ending(call):
    """Call `call` when somebody ends the program: Ctrl-C, kill, or a terminal that is closed."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        # Windows knows no SIGHUP, under nohup it is ignored, and only the main thread may ask
        if number and not (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):
            with contextlib.suppress(ValueError):
                signal.signal(number, call)


def command(main):
    """Run the main function of a script. What a user can run into ends in one sentence."""
    on_ending(signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        end_bars()
        print("interrupted; what was saved before is untouched", file=sys.stderr)
        raise SystemExit(130) from None
    except torch.OutOfMemoryError:
        stop("the memory of the GPU is full; in training try a smaller --batch, --recompute on "
             "or --size laptop, in play --device cpu")
    # permission denied, a full disk, a loop of links, a name of 300 letters
    except OSError as e:
        stop(f"{e.filename or 'a file'} cannot be used ({e.strerror or e})")
    # on a CPU torch says so in a RuntimeError
    except (MemoryError, RuntimeError) as e:
        full = any(word in str(e) for word in ("allocate memory", "calculation overflowed"))
        if isinstance(e, RuntimeError) and not full:
            raise
        stop("the memory is full; try a smaller --batch, --scored or --size")


def flag(knob):
    """How a knob is written on the command line."""
    return "--" + knob.replace("_", "-")


def new_parser(doc):
    """A command line without flags. Its --help opens with the docstring of the script."""
    return argparse.ArgumentParser(description=doc, usage=argparse.SUPPRESS, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)


def parser(doc, knobs, paper):
    """The command line of a stage: the flags that all stages have, and one for each knob.

    knobs: {name: (value at size test, laptop, gpu, coinrun, help text)}.
    paper: {name: (four values)} for the knobs that --recipe paper sets otherwise.
    """
    p = new_parser(doc)
    p.add_argument("--data", type=Path, default=Path("data/platformer"),
                   help="folder that data.py wrote (default: %(default)s)")
    p.add_argument("--run", type=Path,
                   help="folder for checkpoints, scores, pictures (default: runs/NAME OF THE DATA)")
    p.add_argument("--recipe", choices=RECIPES,
                   help="paper: Genie as published; ours: with what we added (default: ours)")
    p.add_argument("--size", choices=SIZES,
                   help="sets every knob below (default: gpu with CUDA, else laptop)")
    p.add_argument("--seed", type=int, help="same seed, same machine: the same run (default: 0)")
    p.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    p.add_argument("--resume", action="store_true", help="go on where a run was interrupted")
    p.add_argument("--overwrite", action="store_true",
                   help="replace a model that is in the run folder (it is kept as NAME.old.pt)")
    p.add_argument("--compile", choices=("auto", "on", "off"), default="auto",
                   help="torch.compile (auto: on where it works, but not at size test)")
    p.add_argument("--recompute", choices=("auto", "on", "off"), default="auto",
                   help="save memory, not time: keep only the input of each block, and compute "
                        "the rest again for the gradient (auto: on at size coinrun)")
    group = p.add_argument_group("knobs", "with their values at --size " + " / ".join(SIZES))
    for name, (*values, text) in knobs.items():
        text += f" ({' / '.join(map(str, values))}"
        if name in paper:
            text += f"; recipe paper: {' / '.join(map(str, paper[name]))}"
        kind = type(values[1])
        group.add_argument(flag(name), type=kind, metavar=kind.__name__.upper(), help=text + ")")
    p.set_defaults(knobs=knobs, paper=paper)
    return p


def find_device(name):
    """The torch.device of --device. Without a name it is the GPU, if there is one.

    On a GPU, products of fp32 matrices (32-bit floats) are computed in TF32 from here on: faster,
    with 10 bits of each number instead of 23.
    """
    device = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
        # torchrun gives each process a GPU
        if device.type == "cuda" and "LOCAL_RANK" in os.environ:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        # a device without memory, as meta, has no number to give back
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as e:
        reason = str(e).splitlines()[0]
        stop(f"--device {device} cannot be used here ({reason}); try --device cpu")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    return device


def settle(args, stage):
    """Fill in what the user left open: device, folder, recipe, size, and every knob at these.

    With --resume they come from the checkpoint. Under torchrun it joins the processes.
    """
    args.device = find_device(args.device)
    args.run = args.run or Path("runs") / args.data.name
    asked = {}
    for name in (*args.knobs, "recipe", "size", "seed"):
        if getattr(args, name) is not None:
            asked[name] = getattr(args, name)
    if args.resume:
        asked = settle_resumed(args, asked, stage)
    args.recipe = asked.get("recipe", "ours")
    args.size = asked.get("size") or ("gpu" if args.device.type == "cuda" else "laptop")
    args.seed = asked.get("seed", 0)
    for name, values in args.knobs.items():
        # the recipe may set a knob otherwise than the size
        if args.recipe == "paper" and name in args.paper:
            values = args.paper[name]
        value = asked.get(name, values[SIZES.index(args.size)])
        check_knob(name, value)
        setattr(args, name, value)
    # every step has a seed of its own, of 64 bits: see Run
    if abs(args.seed) > 10 ** 9:
        stop(f"--seed {args.seed} is too large; at most a billion")
    # rotary embedding turns pairs, so the width of a head is even
    if args.dim % (2 * args.heads):
        stop(f"--dim {args.dim} must be a multiple of twice --heads {args.heads}")
    if stage != "tokenizer" and args.frames < 2:
        stop("--frames 1 holds no transition; it must be at least 2")
    if args.recompute == "auto":
        args.recompute = "on" if args.size == "coinrun" else "off"
    join_processes(args)
    return args


def settle_resumed(args, asked, stage):
    """The knobs of the run that is resumed. What is asked for must not contradict them."""
    path = args.run / f"{stage}.pt"
    if args.run.exists() and int(os.environ.get("RANK", 0)) == 0:
        lock(args.run)
        finish_renames(args.run)
    begun = read_checkpoint(path, stage)["knobs"]
    for name, (*values, _) in args.knobs.items():
        if type(begun.get(name)) is not type(values[1]):
            stop(f"{path} was begun by another version, which knew no {flag(name)}; "
                 "train afresh with --overwrite")
    for name, value in asked.items():
        if name != "steps" and begun[name] != value:
            stop(f"{flag(name)} {value} was asked for, but {path} was begun with {begun[name]}; "
                 "leave it out to resume")
    return begun | asked


def check_knob(name, value):
    """Numbers must be finite. Whole numbers count something, so they are at least 1."""
    least = 0 if isinstance(value, float) else 1
    if not least <= value <= 10 ** 9:
        stop(f"{flag(name)} {value} makes no sense; it must be at least {least}, and finite (at "
             "most a billion)")


# ------------------------------------------------------------------------------- optimizer


def schedule(optimizer, step, args):
    """Set the learning rate of a step: linear warm-up, then a cosine down to a tenth of --lr.

    Appendix C says so of the LAM and the dynamics. We do the same for the tokenizer.
    """
    if step < args.warmup:
        share = (step + 1) / args.warmup
    else:
        done = (step - args.warmup) / max(1, args.steps - args.warmup)
        share = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done))
    for group in optimizer.param_groups:
        group["lr"] = args.lr * share


def make_optimizer(model, lr):
    """AdamW with the betas and the weight decay of appendix C."""
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.9), weight_decay=1e-4,
                             fused=True)


# ------------------------------------------------------------------------------- checkpoints


def write_atomically(path, write, *more):
    """Write beside `path` and rename: who opens it finds the old file or the new, never half.

    write(f) writes to the open file f. more: pairs (path, write) of files that belong to it. All
    of them are written before the first one is replaced. If the process is killed in between,
    `finish_renames` does the rest.
    """
    # no two writers share a name
    token = secrets.token_hex(4)
    files = [(Path(p), Path(f"{p}.{token}.part"), w) for p, w in ((path, write), *more)]
    notes = files[0][0].with_name(f"renames.{token}.part") if more else None
    try:
        for path, part, write in files:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(part, "wb") as f:
                write(f)
                # it is on the disk before it replaces anything
                f.flush()
                os.fsync(f.fileno())
        if notes:
            names = [[part.name, path.name] for path, part, _ in files]
            write_atomically(notes, lambda f: f.write(json.dumps(names).encode()))
        for path, part, _ in files:
            os.replace(part, path)
    # torch.save wraps a full disk in a RuntimeError
    except (OSError, RuntimeError) as e:
        stop(f"cannot write {path} ({e}); what was there before is untouched")
    finally:
        # after an error, or Ctrl-C, no half files stay
        for part in [part for _, part, _ in files] + ([notes] if notes else []):
            with contextlib.suppress(OSError):
                part.unlink()


def finish_renames(folder):
    """Do the renames that a killed process left undone, and delete what it left half written.

    Called under the lock of the folder, so nobody is writing there.
    """
    for notes in folder.glob("renames.????????.part"):
        for part, name in json.loads(notes.read_text()):
            if (folder / part).exists():
                os.replace(folder / part, folder / name)
        notes.unlink()
    for name in ("tokenizer", "lam", "dynamics", "tokens"):
        for part in folder.glob(f"{name}.pt.????????.part"):
            part.unlink()


LOCKS = {}              # folder: the open handle that holds its lock


def lock(folder):
    """Keep other processes of this project from writing to a folder, until this process ends.

    The lock is the operating system's: it dies with the process, and leaves no file behind.
    """
    folder = os.path.realpath(folder)
    if folder in LOCKS:
        return
    # Windows has no such module
    with contextlib.suppress(ImportError):
        import fcntl
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            stop(f"another process is writing to {folder}; wait for it, or name another folder")
        # some network disks have no locks
        except OSError:
            pass
        LOCKS[folder] = handle


def unlock(folder):
    handle = LOCKS.pop(os.path.realpath(folder), None)
    if handle is not None:
        os.close(handle)


def check_writable(folder):
    """Can files be written into it? Better asked before an hour of training than after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        stop(f"cannot write to {folder} ({e.strerror})")


def write_json(path, value):
    text = json.dumps(value, indent=1) + "\n"
    write_atomically(path, lambda f: f.write(text.encode()))


def fingerprint(model):
    """A short hash of the weights. A checkpoint names the models that it was built on by it."""
    h = hashlib.sha256()
    for name, t in sorted(model.state_dict().items()):
        h.update(name.encode() + t.detach().float().cpu().numpy().tobytes())
    return h.hexdigest()[:12]


# what a checkpoint holds, and of which types
CHECKPOINT = dict(stage=str, config=dict, knobs=dict, origin=dict, step=int, seconds=(int, float),
                  curve=list, model=dict, optimizer=(dict, type(None)), fingerprint=str)


def check_checkpoint(ckpt):
    """Raises some error unless a checkpoint holds what the rest of the program relies on."""
    for name, kind in CHECKPOINT.items():
        if not isinstance(ckpt[name], kind):
            raise TypeError(f"{name} is {ckpt[name]!r:.40}")
    # what was it trained on?
    names = ("data", "tokenizer", "lam") if ckpt["stage"] == "dynamics" else ("data",)
    for name in names:
        if not isinstance(ckpt["origin"][name], str):
            raise TypeError(f"origin is {ckpt['origin']!r:.40}")
    # how?
    steps, recipe, size = (ckpt["knobs"][name] for name in ("steps", "recipe", "size"))
    if recipe not in RECIPES or size not in SIZES:
        raise ValueError(f"recipe {recipe}, size {size}")
    if not 0 <= ckpt["step"] <= steps:
        raise ValueError(f"step {ckpt['step']} of {steps}")


def read_checkpoint(path, stage):
    """The checkpoint at `path` as a dictionary, or one sentence that says why not."""
    path = Path(path)
    again = f"python {stage}.py (and the same --data and --run)"
    if not path.exists():
        stop(f"{path} does not exist; make it first with: {again}")
    try:
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
        found = ckpt["stage"]
        # one of another stage is told as such
        if found == stage:
            check_checkpoint(ckpt)
    except PermissionError:
        raise
    # torch.load raises half a dozen types on a damaged file
    except Exception as e:
        reason = f"{type(e).__name__}: {e}".splitlines()[0][:100]
        stop(f"{path} is damaged or no checkpoint of this project ({reason}); "
             f"train again with: {again}")
    if found != stage:
        stop(f"{path} is a checkpoint of {found}.py, but one of {stage}.py is needed here")
    return ckpt


def load_model(path, build, stage, device="cpu"):
    """A trained model, frozen, and its checkpoint. build(**config) makes the model."""
    ckpt = read_checkpoint(path, stage)
    weights = ckpt["model"]
    try:
        # a size that the weights do not bear out could fill the memory before they are compared
        most = sum(w.numel() for w in weights.values())
        sizes = [v for v in ckpt["config"].values() if isinstance(v, int)]
        if max(sizes) > most or ckpt["config"].get("layers", 1) > len(weights):
            raise ValueError("its configuration is larger than its weights")
        model = build(**ckpt["config"])
        model.load_state_dict(weights)
        if not all(p.isfinite().all() for p in model.state_dict().values()):
            raise ValueError("its weights are not all finite numbers")
    # a wrong configuration raises whatever it leads to
    except Exception as e:
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        stop(f"{path} does not fit this version of {stage}.py ({reason}); train again")
    return model.to(device).float().eval().requires_grad_(False), ckpt


# ------------------------------------------------------------------------------- training


def autocast(args):
    """bf16 (16-bit floats) for matrix products where the device has a unit for them; else it costs
    time.

    On a CPU that is so in compiled blocks only. Weights, norms, losses and the quantizer stay in
    fp32.
    """
    if args.device.type == "cuda":
        able = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        units = (torch.cpu._is_amx_tile_supported, torch.cpu._is_avx512_bf16_supported)
        able = args.compile == "on" and any(unit() for unit in units)
    return torch.autocast(args.device.type, torch.bfloat16, enabled=able)


def check_compiler(args):
    """Settle --compile auto by trying: torch.compile needs a C++ compiler, on a GPU Triton."""
    if args.compile == "auto" and args.size == "test":
        args.compile = "off"
    if args.compile == "off":
        return
    try:
        torch.compile(torch.cos, fullgraph=True)(torch.zeros(8, device=args.device))
    # it raises many types
    except Exception as e:
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        why = (f"torch.compile does not work here ({reason}; on Linux it needs the packages g++ "
               "and python3-dev)")
        if args.compile == "on":
            stop(f"{why}; leave out --compile on")
        print(f"{why}: training without it, more slowly", file=sys.stderr)
        args.compile = "off"
    else:
        args.compile = "on"


def prepare(model, args):
    """Prepare the ST blocks of a model: compiled, in bf16 on a GPU, saving memory, as --flags say.

    Blocks are compiled one by one. They share one graph, so this takes a third of the time that
    the whole model takes, and brings nearly as much.

    Threads are as torch has them: on two cores of their own they are the fastest. Beside other
    busy programs they spin, and OMP_WAIT_POLICY=PASSIVE before the command helps (lab/SPEED.md).
    """
    check_compiler(args)
    for module in model.modules():
        if isinstance(module, STBlock) and args.compile == "on":
            module.forward = torch.compile(module.forward, fullgraph=True, dynamic=False)
        # activation checkpointing (Chen et al. 2016); nothing in a block is random
        if isinstance(module, STBlock) and args.recompute == "on":
            module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False,
                                               preserve_rng_state=False)
        # what blocks hand on is in bf16, too: at these widths a GPU waits for its memory
        if isinstance(module, STTransformer) and args.device.type == "cuda":
            module.blocks[0].register_forward_pre_hook(to_bf16)


def to_bf16(block, inputs):
    """Under autocast, what goes into the first block is bf16, and so is what comes after it."""
    x, *rest = inputs
    if torch.is_autocast_enabled(x.device.type):
        x = x.bfloat16()
    return x, *rest


def memory(device):
    """Peak memory of this process in GB, of the GPU or resident. None where nobody tells."""
    if torch.device(device).type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e9, 3)
    # Windows has no such module
    with contextlib.suppress(ImportError):
        import resource
        unit = 1 if sys.platform == "darwin" else 1024
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 3)


# ............................................................ several GPUs, under torchrun


def join_processes(args):
    """Each process of torchrun trains on its share of the batch. Without torchrun there is one."""
    args.rank = int(os.environ.get("RANK", 0))
    args.world = int(os.environ.get("WORLD_SIZE", 1))
    if args.batch % args.world:
        stop(f"--batch {args.batch} cannot be shared by {args.world} processes; "
             "make it a multiple")
    if args.world > 1 and not torch.distributed.is_initialized():
        if args.device.type == "cuda":
            torch.cuda.set_device(args.device)
        torch.distributed.init_process_group("nccl" if args.device.type == "cuda" else "gloo")


def parallel(model, args):
    """Average the gradients over the processes. Buffers, as a codebook, are those of the first."""
    if args.world == 1:
        return model
    devices = [args.device.index] if args.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=devices)


# ............................................................ the run


def stamp(folder):
    """Which files are in a folder of data, how large, and when written: to see if they change."""
    files = [file for file in folder.glob("*") if file.suffix in (".u8", ".json")]
    return {file.name: (file.stat().st_size, file.stat().st_mtime_ns) for file in files}


class Run:
    """What a training loop needs besides its mathematics: steps, saving, resuming, the report.

    Every step seeds torch with (seed, step, rank). So a resumed run draws the very numbers that it
    would have drawn, and ends bit-identical to one that was never interrupted (CPU, same machine).
    """
    # a checkpoint after so many steps or so many seconds, whichever comes first: a crash costs two
    # minutes at most. Chosen by hand
    save_every = 500
    save_after = 120

    def __init__(self, stage, args, model, optimizer, config, held_out, **origin):
        """held_out(): the loss of the model on held-out clips. origin: what it is trained on."""
        self.stage = stage
        self.args = args
        self.model = model
        self.optimizer = optimizer
        self.config = config
        self.held_out = held_out
        self.origin = origin
        self.path = args.run / f"{stage}.pt"
        self.knobs = {name: getattr(args, name) for name in (*args.knobs, "recipe", "size", "seed")}
        self.beside = None          # the Run of a model that is trained in the same loop
        self.bar = None             # the progress bar
        self.first = 0              # the step to begin with
        self.seconds = 0.0          # of training, in earlier sittings
        self.began = None           # when this sitting began
        self.curve = []             # [step, training loss, held-out loss]
        self.recent = []            # training losses that were shown since the last point of it
        self.replaced = args.resume # has the file of an earlier run been set aside?
        self.saved = time.time()    # when there was nothing to lose
        self.data_now = stamp(args.data)
        # nobody else may write there, and nothing is replaced that nobody asked to replace
        if args.rank == 0:
            check_writable(args.run)
            lock(args.run)
            finish_renames(args.run)
        if args.resume:
            self.resume()
        elif self.path.exists() and not args.overwrite:
            stop(f"{self.path} already exists; go on with it by --resume, replace it by "
                 "--overwrite, or name another folder with --run")

    def resume(self):
        """Go on from the checkpoint, if it is of the same model on the same data."""
        ckpt = read_checkpoint(self.path, self.stage)
        other = (f"{self.path} cannot be resumed here (other data, play-only weights, or of "
                 "another version); train afresh with --overwrite")
        if ckpt["config"] != self.config or not ckpt["optimizer"]:
            stop(other)
        for name, now in self.origin.items():
            before = ckpt["origin"].get(name)
            if before != now:
                hint = "name that with --data, or " if name == "data" else ""
                stop(f"{self.path} was begun on another {name} ({before}, now {now}); "
                     f"{hint}train afresh with --overwrite")
        if self.args.steps < ckpt["step"]:
            stop(f"{self.path} is at step {ckpt['step']} already, beyond --steps {self.args.steps}")
        try:
            self.model.load_state_dict(ckpt["model"])
            self.optimizer.load_state_dict(ckpt["optimizer"])
            # the fused optimizer would write beyond a state of another shape
            for p, state in self.optimizer.state.items():
                for moment in (state["exp_avg"], state["exp_avg_sq"]):
                    if moment.shape != p.shape:
                        raise ValueError("an optimizer of another shape")
        # whatever a wrong state leads to
        except Exception:
            stop(other)
        self.first = ckpt["step"]
        self.seconds = ckpt["seconds"]
        self.curve = ckpt["curve"]

    def steps(self):
        """Yield the numbers of the steps up to --steps. Seeds each step, and saves now and then."""
        args = self.args
        self.began = time.time()
        self.stopped = False
        self.bar = tqdm(total=args.steps, initial=self.first, desc=self.stage,
                        disable=args.rank > 0, mininterval=1, dynamic_ncols=True)
        on_ending(self.ask_to_stop)
        for step in range(self.first, args.steps):
            # no two steps, and no two processes, share a seed: the factors are larger than the
            # number of steps of any --size, and of processes
            torch.manual_seed((args.seed * 1_000_003 + step) * 1009 + args.rank)
            yield step
            self.bar.update()
            if self.must_stop(step):
                self.save(step + 1)
                self.bar.close()
                if args.rank == 0:
                    print(f"stopped and saved at step {step + 1}; go on with the same command "
                          "and --resume", file=sys.stderr)
                raise SystemExit(130)
            late = time.time() - self.saved > self.save_after
            if (step + 1) % self.save_every == 0 or late:
                self.save(step + 1)
        self.bar.close()
        # the clock stops: what a stage does afterwards is no training
        self.seconds += time.time() - self.began
        self.began = None
        self.save(args.steps)
        on_ending(self.while_scoring)

    def ask_to_stop(self, number, _):
        self.stopped = True
        # a terminal that is closed takes no more of the bar
        if self.bar and number != signal.SIGINT:
            self.bar.disable = True

    def while_scoring(self, *_):
        stop("interrupted while scoring; the weights are saved: the same command with --resume "
             "goes on")

    def must_stop(self, step):
        """Was Ctrl-C pressed? Processes hear of it in different steps, and stop after the same."""
        if self.args.world == 1:
            return self.stopped
        if step % 20:
            return False
        stopped = torch.tensor(float(self.stopped), device=self.args.device)
        torch.distributed.all_reduce(stopped, torch.distributed.ReduceOp.MAX)
        return stopped.item() > 0

    def log(self, step, loss, **watch):
        """Show the numbers every 20 steps (reading them makes a GPU wait), and draw the curve."""
        last = step == self.args.steps - 1
        if step % 20 and not last:
            return
        value = loss.detach().item()
        if not math.isfinite(value):
            stop(f"the loss is {value} at step {step}; what was saved before is untouched; "
                 "try a lower --lr")
        shown = {name: f"{v.detach().item():.4f}" for name, v in dict(loss=loss, **watch).items()}
        if self.bar:
            self.bar.set_postfix(shown)
        self.recent.append(value)
        # twenty to forty points of the curve in a run
        every = max(20, self.args.steps // 400 * 20)
        if self.args.rank == 0 and (step % every == 0 or last):
            training_loss = sum(self.recent) / len(self.recent)
            self.curve.append([step, round(training_loss, 5), round(self.held_out_loss(), 5)])
            self.recent = []

    @torch.no_grad()
    def held_out_loss(self):
        """The loss on held-out clips, with the same luck each time."""
        self.model.eval()
        # uncompiled: other shapes than in training are not worth compiling
        gpus = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(gpus), torch.compiler.set_stance("force_eager"):
            torch.manual_seed(0)
            loss = self.held_out().item()
        self.model.train()
        return loss

    def save(self, step):
        """Write the checkpoint, and with it that of a model that is trained beside it."""
        runs = [self]
        if self.beside:
            self.beside.began = self.began
            self.beside.seconds = self.seconds
            self.origin[self.beside.stage] = fingerprint(self.beside.model)
            runs = [self.beside, self]
        for run in runs:
            if not all(p.isfinite().all() for p in run.model.parameters()):
                stop(f"the weights are no longer finite at step {step}; {run.path} is as it was; "
                     "try a lower --lr")
        if self.args.rank == 0:
            # of a pair, the one that was scored first has let it go
            lock(self.args.run)
            (path, write), *more = [run.checkpoint(step) for run in runs]
            write_atomically(path, write, *more)
        self.saved = time.time()

    def checkpoint(self, step):
        """The path, and what writes the checkpoint to an open file.

        What an earlier run left there is kept, once, as NAME.old.pt.
        """
        if not self.replaced and self.path.exists():
            earlier = self.path.read_bytes()
            write_atomically(self.path.with_suffix(".old.pt"), lambda f: f.write(earlier))
        self.replaced = True
        seconds = self.seconds
        if self.began:
            seconds += time.time() - self.began
        ckpt = dict(stage=self.stage, config=self.config, knobs=self.knobs, origin=self.origin,
                    step=step, seconds=seconds, curve=self.curve, model=self.model.state_dict(),
                    optimizer=self.optimizer.state_dict(), fingerprint=fingerprint(self.model))
        return self.path, lambda f: torch.save(ckpt, f)

    def report(self, evaluate):
        """Score the finished model. Print the scores, and write NAME.json beside the checkpoint."""
        args = self.args
        if args.world > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        if args.rank > 0:
            return
        if stamp(args.data) != self.data_now:
            stop(f"{args.data} was changed during the training; {self.path} is saved, but scores "
                 "would be those of other data")
        # other shapes than in training: not worth compiling
        with torch.compiler.set_stance("force_eager"):
            scores = evaluate(self.model, args)
        for name, v in scores.items():
            scores[name] = round(v, 4) if isinstance(v, float) else v
            print(f"{name:>24}  {scores[name]}")
        parameters = sum(p.numel() for p in self.model.parameters())
        about = dict(stage=self.stage, recipe=args.recipe, size=args.size, steps=args.steps,
                     seconds=round(self.seconds, 1), device=str(args.device), seed=args.seed,
                     parameters=parameters, peak_memory_gb=memory(args.device),
                     torch=torch.__version__, **self.origin, fingerprint=fingerprint(self.model),
                     knobs=self.knobs, curve_of="step, training loss, held-out loss",
                     curve=self.curve)
        path = args.run / f"{self.stage}.json"
        write_json(path, scores | about)
        print(f"{self.seconds / 60:.1f} minutes of training, {parameters / 1e6:.1f}M parameters; "
              f"scores in {path}")
        unlock(args.run)
        # Ctrl-C means again what it meant before
        on_ending(signal.default_int_handler)


# ------------------------------------------------------------------------------- pictures


def check_patch(patch, height, width):
    if patch > min(height, width):
        stop(f"frames of {width}x{height} pixels cannot be cut into patches of {patch}; "
             "choose a smaller --patch")


def to_bytes(image):
    """An image (..., H, W, C) in [0, 1], torch or numpy, as uint8."""
    return (np.clip(np.asarray(image), 0, 1) * 255).astype(np.uint8)


def save_picture(path, clips, title):
    """Write clips, each (T, H, W, C) in [0, 1], as a PNG twice as large: a row for each clip."""
    import imageio.v2 as imageio
    rows = [torch.hstack(list(clip)) for clip in clips]             # (H, T * W, C) each
    pixels = to_bytes(torch.vstack(rows).cpu()).repeat(2, 0).repeat(2, 1)
    write_atomically(path, lambda f: imageio.imwrite(f, pixels, format="png"))
    print(f"{path}: {title}")


def pyplot_for_files():
    """matplotlib.pyplot, to draw into files alone, whatever window MPLBACKEND asks for."""
    # read when matplotlib is first imported, when it may name a backend that is not there
    os.environ["MPLBACKEND"] = "Agg"
    import matplotlib
    matplotlib.use("Agg", force=True)
    import matplotlib.pyplot as plt
    return plt


def save_figure(path, figure, title):
    """Write a matplotlib figure as a PNG, and say what it shows."""
    write_atomically(path, lambda f: figure.savefig(f, format="png", dpi=80, bbox_inches="tight"))
    print(f"{path}: {title}")


def write_gif(path, frames, fps=10):
    """Write frames, (H, W, C) arrays in [0, 1], as a GIF, four times as large."""
    import imageio.v2 as imageio
    big = [to_bytes(frame).repeat(4, 0).repeat(4, 1) for frame in frames]
    film = io.BytesIO()
    imageio.mimwrite(film, big, format="gif", duration=1000 / fps, loop=0)
    write_atomically(path, lambda f: f.write(film.getbuffer()))
    print(f"{path}: {len(frames)} frames")
