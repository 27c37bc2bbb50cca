"""What every stage shares: the ST-transformer, the vector quantizer, and the plumbing around a training loop.

Genie (Bruce et al. 2024, arXiv 2402.15391) is three models made of one block. The ST block (section 2, figure 4) never
lets a token look at every other token of the video. It looks at its own frame (spatial attention), then at its own place
in earlier frames (temporal attention, causal), then passes one feed-forward layer. T N^2 + N T^2 pairs, not (T N)^2.

The legend of shapes, for the whole project:
    B clips   T frames   N tokens of a frame   D width   K codes   H W C pixels   h heads   P pixels along a patch's side

Where the paper is silent, this is what we chose: pre-norm LayerNorm without bias (RMSNorm learns as well, but where torch has no
kernel for it, on a CPU, it is eight operations in place of one, and in play that is felt), a feed-forward of 4 D with squared
ReLU (So et al. 2021; it learns faster here than GELU, and costs a CPU less), a learned embedding for the place in the frame,
rotary embedding for time (so that a cached past stays valid when the window slides on).
"""
import argparse
import contextlib
import hashlib
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

SIZES = ("test", "laptop", "gpu", "coinrun")


# ------------------------------------------------------------------------------------------------ patches

def patchify(x, P):
    """Cut frames (B, T, H, W, C) into squares of P pixels: (B, T, N, P*P*C), N = (H/P) (W/P), row by row."""
    B, T, H, W, C = x.shape
    x = x.view(B, T, H // P, P, W // P, P, C).permute(0, 1, 2, 4, 3, 5, 6)      # (B, T, H/P, W/P, P, P, C)
    return x.reshape(B, T, (H // P) * (W // P), P * P * C)


def unpatchify(x, P, H, W):
    """The inverse of patchify: (B, T, N, P*P*C) -> (B, T, H, W, C)."""
    B, T, N, _ = x.shape
    x = x.view(B, T, H // P, W // P, P, P, -1).permute(0, 1, 2, 4, 3, 5, 6)     # (B, T, H/P, P, W/P, P, C)
    return x.reshape(B, T, H, W, -1)


class Neighbours(nn.Module):
    """What lies around each token of a frame: x plus a 3x3 convolution of x over the grid of patches, (B, T, N, D) -> the same.

    From frame to frame most things move by a few pixels, to where a neighbour was. Attention can learn to fetch it from
    there, place by place, from position embeddings; here that is given, as it is to a convolutional network.
    """

    def __init__(self, rows, columns, dim):
        super().__init__()
        self.rows, self.columns = rows, columns
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x):
        grid = x.reshape(-1, self.rows, self.columns, x.size(-1)).permute(0, 3, 1, 2)    # (B*T, D, rows, columns)
        return x + self.conv(grid).permute(0, 2, 3, 1).reshape(x.shape)


# ------------------------------------------------------------------------------------------------ attention

def rotary(time, dim):
    """Cosines and sines (T, dim/2) that turn pair i of a query or key by an angle time * theta_i (Su et al. 2021).

    After the turn, q . k depends on the difference of the two times alone. theta spans periods from 6 frames to some
    500: the windows here are 16 frames, so the usual base of 10000 would leave most pairs nearly unturned.
    """
    theta = 100.0 ** (-torch.arange(0, dim, 2, device=time.device).float() / dim)
    angle = time.float()[:, None] * theta                                        # (T, dim/2)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Apply `rotary` to x (..., T, dh)."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)


def attention_by_hand(q, k, v, mask=None):
    """softmax(q k^T / sqrt(dh)) v, as it is written in every paper. mask (Tq, Tk): True where q may look at k.

    torch's scaled_dot_product_attention is the same mathematics without ever storing the weights: right for a GPU, and for long
    sequences. Ours are many and short: on a CPU, and for time on a GPU, this one is faster once torch.compile has fused it. A test
    holds the two together.
    """
    weight = q @ k.transpose(-1, -2) / math.sqrt(q.size(-1))                     # (..., Tq, Tk)
    if mask is not None:
        weight = weight.masked_fill(~mask, float("-inf"))
    return weight.softmax(-1) @ v


class Attention(nn.Module):
    """Multi-head self-attention with QK-norm (section 2.1 uses it for the dynamics; it hurts nowhere, so: everywhere).
    Queries and keys share one norm, so that one operation does for both."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.norm = nn.LayerNorm(dim // heads, eps=1e-6, bias=False)

    def forward(self, x, turn=None, mask=None, past=None):
        """x (B, S, D) attends along S. turn: (cos, sin) of `rotary`. past: a cache's (k, v, slot), see Cache."""
        B, S, D = x.shape
        qkv = self.qkv(x).view(B, S, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)      # (3, B, h, S, dh)
        qk, v = self.norm(qkv[:2]), qkv[2]
        q, k = qk if turn is None else rotate(qk, *turn)
        if past is not None:                        # a new frame: its keys and values join those of the frames before
            past_k, past_v, slot = past
            k = past_k.index_copy_(2, slot, k.to(past_k.dtype))                  # (B, h, window, dh)
            v = past_v.index_copy_(2, slot, v.to(past_v.dtype))
        # torch's kernels for a GPU compute tiles of 64 places or more: of 16 frames they would waste three quarters
        by_hand = torch.compiler.is_compiling() and (q.device.type == "cpu" or turn is not None)
        attend = attention_by_hand if by_hand else F.scaled_dot_product_attention
        x = attend(q.to(v.dtype), k.to(v.dtype), v, mask)                        # the norm left q and k in fp32 under autocast
        return self.out(x.transpose(1, 2).reshape(B, S, D))


# ------------------------------------------------------------------------------------------------ the ST block

class STBlock(nn.Module):
    """Spatial attention, causal temporal attention, ONE feed-forward after both (section 2, figure 4). With a window of one frame
    there is no past to look at: attention to oneself alone is a matrix product, and it is left out."""

    def __init__(self, dim, heads, window):
        super().__init__()
        self.norm_space, self.space = nn.LayerNorm(dim, eps=1e-6, bias=False), Attention(dim, heads)
        self.time = None
        if window > 1:
            self.norm_time, self.time = nn.LayerNorm(dim, eps=1e-6, bias=False), Attention(dim, heads)
        self.norm_ffw = nn.LayerNorm(dim, eps=1e-6, bias=False)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x, turn, mask, past=None):
        """x (B, T, N, D) -> the same. turn, mask, past: of time, see Attention."""
        B, T, N, D = x.shape
        s = self.norm_space(x).view(B * T, N, D)                                 # every frame by itself
        x = x + self.space(s).view(B, T, N, D)
        if self.time is not None:
            t = self.norm_time(x).transpose(1, 2).contiguous().view(B * N, T, D)         # every place by itself, contiguous: qkv is faster
            x = x + self.time(t, turn, mask, past).view(B, N, T, D).transpose(1, 2)
        return x + self.down(F.relu(self.up(self.norm_ffw(x))).square())         # (B, T, N, D)


class STTransformer(nn.Module):
    """A stack of ST blocks over (B, T, N, D). Token (t, n) of the output depends on frames 1..t of the input only.

    In each layer a frame looks at itself and the window - 1 frames before it, however long the clip.
    """
    recompute = False           # activation checkpointing: of each block keep its input alone, and compute the rest again for the gradient

    def __init__(self, tokens, dim, layers, heads, window):
        super().__init__()
        self.heads, self.window = heads, window
        self.place = nn.Parameter(0.02 * torch.randn(tokens, dim))
        self.blocks = nn.ModuleList(STBlock(dim, heads, window) for _ in range(layers))
        self.norm = nn.LayerNorm(dim, eps=1e-6, bias=False)
        for name, p in self.named_parameters():     # GPT-2's start: residual branches begin small, by the depth
            if name.endswith(("out.weight", "down.weight")):
                nn.init.normal_(p, std=0.02 / math.sqrt(3 * layers))

    def forward(self, x, time=None, mask=None, cache=None):
        """x (B, T, N, D) -> the same. time (T,) and mask (T, T) default to 0..T-1 and causal within the window.

        With a cache, x (B, 1, N, D) is the frame after those that it has advanced past.
        """
        T = x.size(1)
        if cache is not None:
            turn, mask = cache.turn, cache.mask
        else:
            turn = rotary(torch.arange(T, device=x.device) if time is None else time, x.size(-1) // self.heads)
        if mask is None:
            mask = torch.ones(T, T, dtype=torch.bool, device=x.device).tril().triu(1 - self.window)
        x = x + self.place
        if x.is_cuda and torch.is_autocast_enabled("cuda"):
            x = x.bfloat16()                # the residual stream as well: at these widths memory traffic is the limit, and bf16 halves it
        for i, block in enumerate(self.blocks):
            if self.recompute and self.training and cache is None:
                x = checkpoint(block, x, turn, mask, use_reentrant=False, preserve_rng_state=False)      # nothing in it is random
            else:
                x = block(x, turn, mask, cache and (cache.k[i], cache.v[i], cache.slot))
        return self.norm(x)

    def new_cache(self, B):
        """An empty Cache for B worlds played side by side."""
        p = self.place
        return Cache(len(self.blocks), B * len(p), self.heads, self.window, p.size(1) // self.heads, p.device)


class Cache:
    """The temporal keys and values of the last `window` frames, layer by layer: what makes playing cheap.

    Spatial attention never leaves a frame and temporal attention never looks ahead, so a new frame changes nothing about
    the frames before it: their keys and values can be kept. A ring of fixed size: frame t lies in slot t mod window, the
    oldest is overwritten, nothing grows. A forward pass writes the slot of its frame, again at every MaskGIT step;
    `advance` moves on to the next. Rotary time is relative, so nothing kept has to be turned again. The result is
    that of the whole past under the windowed mask of STTransformer, up to rounding, at any length (a test).
    """

    def __init__(self, layers, rows, heads, window, dh, device):
        self.k = [torch.zeros(rows, heads, window, dh, device=device) for _ in range(layers)]
        self.v = [torch.zeros(rows, heads, window, dh, device=device) for _ in range(layers)]
        self.clear()

    def move_to(self, now):
        """The next frame is frame `now`. What its passes need, once for all MaskGIT steps: its slot (1,), how far it is turned,
        and which slots it may look at (1, window)."""
        window, device = self.k[0].size(2), self.k[0].device
        time = torch.tensor([now], device=device)
        self.now, self.slot, self.turn = now, time % window, rotary(time, self.k[0].size(-1))
        self.mask = (torch.arange(window, device=device) <= now)[None]           # the ring holds just the window; at first, less

    def advance(self):
        """The frame that came in last stays as it is: the next forward pass is of the one after it."""
        self.move_to(self.now + 1)

    def clear(self):
        """Forget everything: the next frame is the first."""
        self.move_to(0)

    def snapshot(self):
        """What drawing the next frame will overwrite."""
        return self.now, [t.index_select(2, self.slot) for t in self.k + self.v]

    def restore(self, snapshot):
        """Take back the frame drawn since `snapshot`; of several frames, the newest first."""
        now, kept = snapshot
        self.move_to(now)
        for mine, t in zip(self.k + self.v, kept):
            mine.index_copy_(2, self.slot, t)


# ------------------------------------------------------------------------------------------------ vector quantizer

class VectorQuantizer(nn.Module):
    """Nearest neighbour in a codebook of K vectors (van den Oord et al. 2017, VQ-VAE).

    - Vectors are first brought to unit root-mean-square, each by itself. Any norm that uses statistics of the batch drifts
      while the encoder moves, and then the same clip gets other codes in evaluation than it had in training.
    - Forward: z -> e_k, k = argmin |z - e_k|^2. Backward: the gradient at e_k is handed to z as it is (straight-through).
    - Commitment loss |z - sg(e_k)|^2 keeps the encoder near its codes.
    - The codebook itself learns as a running mean of the vectors that chose each code (VQ-VAE appendix A.1): k-means
      online, in place of the codebook loss |sg(z) - e_k|^2, whose gradient is too slow for a run of minutes.
    - A dead code (hardly chosen of late) is moved onto a random vector of the batch, plus noise. Copying a *live code*
      would do nothing: the two would tie for ever.
    normalise, revive: False leaves out the first or the last of these, to see what they are for.
    """

    def __init__(self, codes, dim, decay=0.98, dead=0.03, noise=0.05, normalise=True, revive=True):
        super().__init__()
        self.decay, self.dead, self.noise, self.normalise = decay, dead if revive else 0.0, noise, normalise
        start = F.rms_norm(torch.randn(codes, dim), (dim,))
        self.register_buffer("codebook", start.clone())                          # (K, dim)
        held = torch.full((codes,), 0.0 if revive else 1.0)                      # revival begins on the data; else each start counts as one
        self.register_buffer("mean_sum", held[:, None] * start)                  # running sum of the vectors of a code
        self.register_buffer("mean_count", held)                                 # running count of them, per batch

    def norm(self, z):
        """z (..., dim) brought to unit root-mean-square, if `normalise`."""
        return F.rms_norm(z, (z.size(-1),)) if self.normalise else z

    def nearest(self, z):
        """Indices (...) of the codes nearest to the normalised z (..., dim)."""
        e = self.codebook
        with torch.autocast(z.device.type, enabled=False):                       # in bf16 half of the tokens come out wrong
            distance = torch.addmm((e * e).sum(-1), z.float().flatten(0, -2), e.T, alpha=-2)     # but for |z|^2, alike for all codes
            return distance.argmin(-1).view(z.shape[:-1])

    def forward(self, z):
        """z (..., dim) -> quantised (..., dim) with straight-through gradient, indices (...), commitment loss."""
        with torch.autocast(z.device.type, enabled=False):
            z = self.norm(z.float())
            index = self.nearest(z.detach())
            if self.training:
                self.learn(z.detach().reshape(-1, z.size(-1)), index.reshape(-1))
            e = F.embedding(index, self.codebook)
            loss = F.mse_loss(z, e.detach())
            return z + (e - z).detach(), index, loss

    @torch.no_grad()
    def learn(self, z, index):
        """One step of online k-means on z (M, dim), then the revival of dead codes."""
        K, M = len(self.codebook), len(z)
        count = counts(index, K)
        total = torch.zeros_like(self.mean_sum).index_add_(0, index, z)
        self.mean_count.lerp_(count, 1 - self.decay)
        self.mean_sum.lerp_(total, 1 - self.decay)
        dead = self.mean_count < self.dead * M / K                               # (K,): far under its fair share
        fresh = z[torch.randint(M, (K,), device=z.device)]
        fresh = fresh + self.noise * torch.randn_like(fresh)
        start = M / K * 0.2                                                      # a fifth of that share: time enough to prove itself
        self.mean_sum.copy_(torch.where(dead[:, None], fresh * start, self.mean_sum))
        self.mean_count.masked_fill_(dead, start)
        used = self.mean_count[:, None] > 1e-6                                   # without revival, some are not
        self.codebook.copy_(torch.where(used, self.mean_sum / self.mean_count[:, None].clamp(min=1e-9), self.codebook))

    @torch.no_grad()
    def restart(self, z, tries=16, rounds=30, better=0.97):
        """Online k-means ends in the local minimum that it began near: two codes may share one thing, and one stand for two. So k-means on
        vectors z (M, dim) from `tries` new beginnings. The codebook moves to where the best of them ends, if the mean squared distance of
        z to it is clearly lower there than where it would end itself. Returns both distances. Draws no number from torch's generator:
        where nothing moves, training goes on as without."""
        z, K = self.norm(z.float()), len(self.codebook)
        generator = torch.Generator(z.device).manual_seed(0)
        mine, *_ = kmeans(z, self.codebook, rounds)
        ends = [kmeans(z, kmeans_plus_plus(z, K, generator), rounds) for _ in range(tries)]
        best, e, n = min(ends, key=lambda end: end[0])
        if best < better * mine:
            self.mean_count.copy_(n / len(z) * self.mean_count.sum())
            self.mean_sum.copy_(e * self.mean_count[:, None])
            self.codebook.copy_(e)
        return mine, best


def kmeans_plus_plus(z, K, generator):
    """K of the vectors z (M, dim) to begin k-means with, each likely to be far from those before it (Arthur & Vassilvitskii 2007)."""
    e = z[torch.randint(len(z), (1,), generator=generator, device=z.device)]
    while len(e) < K:
        far = torch.cdist(z, e).amin(1).square()                                 # (M,)
        far = far if far.sum() > 0 else torch.ones_like(far)                     # fewer than K different vectors: any
        e = torch.cat([e, z[torch.multinomial(far, 1, generator=generator)]])
    return e


def kmeans(z, e, rounds):
    """Lloyd's algorithm on z (M, dim) from codes e (K, dim). Returns the mean squared distance to the nearest code, the codes, and how
    many vectors each of them had (K,)."""
    for _ in range(rounds):
        index = torch.cdist(z, e).argmin(1)
        n = counts(index, len(e))                                                # (K,)
        mean = torch.zeros_like(e).index_add_(0, index, z) / n[:, None].clamp(min=1)
        e = torch.where(n[:, None] > 0, mean, e)
    return torch.cdist(z, e).amin(1).square().mean().item(), e, n


def counts(index, K):
    """How often each of K codes occurs in index (...): (K,) floats. (torch.bincount would synchronise the GPU.)"""
    return torch.zeros(K, device=index.device).index_add_(0, index.flatten(), torch.ones(index.numel(), device=index.device))


def perplexity(index, K):
    """exp(entropy) of code usage: K if all codes are equally common, 1 if only one is ever used."""
    p = counts(index, K) / index.numel()
    return torch.exp(-(p * p.clamp(min=1e-12).log()).sum())


# ------------------------------------------------------------------------------------------------ plumbing: command line

def stop(message):
    """A user's mistake, or the world's: one sentence on stderr and exit code 1. Never a traceback."""
    raise SystemExit(f"error: {message}")


def command(main):
    """Run a script's main. Ctrl-C where nothing better is done about it (see Run.steps): one sentence, and exit code 130. A GPU that is too
    small: one sentence."""
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted; what was saved before is untouched", file=sys.stderr)
        raise SystemExit(130) from None
    except torch.OutOfMemoryError:
        stop("the memory of the GPU is full; in training try a smaller --batch, --recompute on or --size laptop, in play --device cpu")


def flag(knob):
    """How a knob is written on the command line."""
    return "--" + knob.replace("_", "-")


def parser(doc, knobs, **choices):
    """The flags that every stage has, and one flag for each knob.

    knobs: {name: (value at size test, laptop, gpu, coinrun, help text)}. `--size` picks a column, a flag overrides.
    choices: for a knob that is a word, the words it may be.
    """
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--data", default="data/platformer", help="folder that data.py wrote (default: %(default)s)")
    p.add_argument("--run", help="folder for checkpoints, scores and pictures (default: runs/NAME OF THE DATA)")
    p.add_argument("--size", choices=SIZES, help="the one dial: sets every knob below (default: gpu with CUDA, else laptop)")
    p.add_argument("--seed", type=int, help="same seed, same machine: the same run (default: 0)")
    p.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    p.add_argument("--resume", action="store_true", help="go on where an interrupted run was saved")
    p.add_argument("--bench", action="store_true", help="train nothing: time a few steps and print one line of JSON")
    p.add_argument("--compile", choices=("auto", "on", "off"), default="auto",
                   help="torch.compile (auto: on where it works, but not at size test)")
    p.add_argument("--recompute", choices=("auto", "on", "off"), default="auto",
                   help="save memory, not time: of each block keep the input only, compute it again in the backward pass "
                        "(auto: on at size coinrun alone)")
    group = p.add_argument_group("knobs", "values for --size " + " / ".join(SIZES))
    for name, (*values, text) in knobs.items():
        kind = type(values[1])
        group.add_argument(flag(name), type=kind, choices=choices.get(name), metavar=kind.__name__.upper(),
                           help=f"{text} ({' / '.join(map(str, values))})".replace("%", "%%"))
    p.set_defaults(knobs=knobs)
    return p


def find_device(name):
    """The torch.device of --device; without one, the GPU if there is one. On a GPU, products of fp32 matrices are done in TF32 from
    here on: 3 decimal digits instead of 7."""
    device = name
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and "LOCAL_RANK" in os.environ:         # torchrun: a GPU for each process
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.zeros(1, device=device)
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        return device
    except (RuntimeError, AssertionError) as e:
        stop(f"--device {device} cannot be used here ({str(e).splitlines()[0]}); try --device cpu")


def settle(args, stage):
    """Fill what the user left open: device, run folder, size, every knob of that size; when resuming, from the checkpoint.
    Starts torchrun's process group."""
    args.device = find_device(args.device)
    args.data = Path(args.data)
    args.run = Path(args.run or Path("runs") / args.data.name)
    asked = {k: getattr(args, k) for k in [*args.knobs, "size", "seed"] if getattr(args, k) is not None}
    if args.resume:                                  # a checkpoint carries its configuration: no flag need be repeated
        path = args.run / f"{stage}.pt"
        begun = read_checkpoint(path, stage)["knobs"]
        for k in args.knobs:
            if k not in begun:
                stop(f"{path} was begun by another version, which knew no {flag(k)}; train afresh without --resume")
        for k, v in asked.items():
            if k != "steps" and begun[k] != v:
                stop(f"{flag(k)} {v} was asked for, but {path} was begun with {begun[k]}; leave it out to resume")
        asked = begun | asked
    args.size = asked.get("size") or ("gpu" if args.device.type == "cuda" else "laptop")
    args.seed = asked.get("seed", 0)
    for k, values in args.knobs.items():
        v = asked.get(k, values[SIZES.index(args.size)])
        least = 0 if isinstance(v, float) or 0 in values else 1          # a count may be 0 only where it is so at some size
        if not isinstance(v, str) and not least <= v < math.inf:         # (nan is neither)
            stop(f"{flag(k)} {v} makes no sense; it must be at least {least}" + ", and finite" * (v == math.inf))
        setattr(args, k, v)
    if abs(args.seed) > 10 ** 9:                     # each step has a seed of its own, of 64 bits: see Run
        stop(f"--seed {args.seed} is too large; at most a billion")
    if args.recompute == "auto":
        args.recompute = "on" if args.size == "coinrun" else "off"
    if args.dim % (2 * args.heads):
        stop(f"--dim {args.dim} must be a multiple of twice --heads {args.heads}")
    if stage != "tokenizer" and args.frames < 2:
        stop("--frames 1 holds no transition; it must be at least 2")
    args.rank, args.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if args.batch % args.world:
        stop(f"--batch {args.batch} cannot be shared by {args.world} processes; make it a multiple")
    if args.world > 1 and not torch.distributed.is_initialized():
        if args.device.type == "cuda":
            torch.cuda.set_device(args.device)
        torch.distributed.init_process_group("nccl" if args.device.type == "cuda" else "gloo")
    return args


# ------------------------------------------------------------------------------------------------ plumbing: checkpoints

def write_atomically(path, write, *more):
    """Write beside `path` and rename: whoever opens `path` finds the old file or the new one, never half of one. more: pairs (path, write)
    of files that belong to it: all are written before the first is replaced."""
    files = [(Path(p), Path(f"{p}.part"), w) for p, w in ((path, write), *more)]
    try:
        for path, part, write in files:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(part, "wb") as f:
                write(f)
        for path, part, _ in files:
            os.replace(part, path)
    except (OSError, RuntimeError) as e:            # torch.save wraps a full disk in a RuntimeError
        for _, part, _ in files:
            with contextlib.suppress(OSError):
                part.unlink()
        stop(f"cannot write {path} ({e}); what was there before is untouched")


def check_writable(folder):
    """Can files be written to it? To be asked now, not after an hour."""
    write_atomically(folder / "writable", lambda f: None)
    (folder / "writable").unlink()


def write_json(path, value):
    write_atomically(path, lambda f: f.write((json.dumps(value, indent=1) + "\n").encode()))


def fingerprint(model):
    """Short hash of a model's weights: a checkpoint names the one that it was built on by it."""
    h = hashlib.sha256()
    for name, t in sorted(model.state_dict().items()):
        h.update(name.encode() + t.detach().float().cpu().numpy().tobytes())
    return h.hexdigest()[:12]


def read_checkpoint(path, stage):
    """The checkpoint at `path` as a dictionary, or one sentence that says why not."""
    path = Path(path)
    if not path.exists():
        stop(f"{path} does not exist; make it first with: python {stage}.py (and the same --data and --run)")
    try:
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
        found = ckpt["stage"]
    except Exception as e:                          # torch.load raises half a dozen types on a damaged file
        stop(f"{path} is damaged or no checkpoint of this project ({type(e).__name__}); train again with: python {stage}.py (and the same --data and --run)")
    if found != stage:
        stop(f"{path} is a checkpoint of {found}.py, but one of {stage}.py is needed here")
    return ckpt


def load_model(path, build, stage, device="cpu"):
    """A trained model, frozen, and its checkpoint. `build` makes the model from the checkpoint's configuration."""
    ckpt = read_checkpoint(path, stage)
    try:
        model = build(**ckpt["config"])
        model.load_state_dict(ckpt["model"])
    except (TypeError, RuntimeError, KeyError) as e:
        stop(f"{path} does not fit this version of {stage}.py ({str(e).splitlines()[0]}); train again")
    return model.to(device).float().eval().requires_grad_(False), ckpt


# ------------------------------------------------------------------------------------------------ plumbing: training

def schedule(optimizer, step, args):
    """Set the learning rate of `step`: linear warm-up to args.lr, then half a cosine down to a tenth of it (appendix C)."""
    if step < args.warmup:
        share = (step + 1) / args.warmup
    else:
        share = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - args.warmup) / max(1, args.steps - args.warmup)))
    for group in optimizer.param_groups:
        group["lr"] = args.lr * share


def make_optimizer(model, lr):
    """AdamW with the paper's betas and weight decay (appendix C); one fused kernel for the whole step."""
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.9), weight_decay=1e-4, fused=True)


def autocast(args):
    """bf16 for the matrix products: on CUDA, and in compiled blocks on a CPU that multiplies in bf16 (AMX tiles, AVX-512 BF16):
    1.7 to 2.5 times as fast as fp32 there, and half as fast anywhere else, GPUs older than 2020 included. Weights, norms, losses and the
    quantizer stay in fp32 (on a GPU its distances are products in TF32: see find_device)."""
    if args.device.type == "cuda":
        able = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        units = ("amx_tile", "avx512_bf16")
        able = args.compile == "on" and any(getattr(torch.cpu, f"_is_{unit}_supported", lambda: False)() for unit in units)
    return torch.autocast(args.device.type, torch.bfloat16, enabled=able)


def check_compiler(args):
    """Does torch.compile work here? It needs a C++ compiler and Python's headers, and on a GPU Triton; whether they do is seen by trying.
    Settles --compile auto: on where it works and pays (at size test it does not)."""
    if args.compile == "auto" and args.size == "test":
        args.compile = "off"
    if args.compile == "off":
        return
    try:
        torch.compile(lambda x: x.cos() + 1, fullgraph=True)(torch.zeros(8, device=args.device))
    except Exception as e:                          # of many types
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        why = f"torch.compile does not work here ({reason}; on Linux it needs the packages g++ and python3-dev)"
        if args.compile == "on":
            stop(f"{why}; leave out --compile on")
        print(f"{why}: training without it, more slowly", file=sys.stderr)
        args.compile = "off"
    else:
        args.compile = "on"


def prepare_blocks(model, args):
    """torch.compile every ST block: they share one compiled graph, so this takes a third of the time that the whole model
    takes, for nearly all of the gain. And --recompute (activation checkpointing, Chen et al. 2016): a third more arithmetic for a
    quarter of the memory. Settles --compile auto, for `autocast`."""
    check_compiler(args)
    for module in model.modules():
        if isinstance(module, STBlock) and args.compile == "on":
            module.compile(fullgraph=True, dynamic=False)
        elif isinstance(module, STTransformer):
            module.recompute = args.recompute == "on"


def parallel(model, args):
    """Under torchrun, average the gradients over the processes (DistributedDataParallel). The codebook is no parameter but a
    buffer: before each step, all processes take over the one that the first has learned from its share of the batch."""
    if args.world == 1:
        return model
    return nn.parallel.DistributedDataParallel(model, device_ids=[args.device.index] if args.device.type == "cuda" else None)


def memory(device):
    """Peak memory of this process so far, in GB: of the GPU, or resident on the CPU. None where nobody tells (Windows)."""
    if torch.device(device).type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e9, 3)
    with contextlib.suppress(ImportError):
        import resource
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1024 if sys.platform != "darwin" else 1) / 1e9, 3)


def seconds(call, n):
    """The median time that a call takes, of n, after one to warm up."""
    took = []
    for _ in range(n + 1):
        began = time.perf_counter()
        call()
        took.append(time.perf_counter() - began)
    return sorted(took[1:])[n // 2]


def matmul_rate(device, dtype):
    """Floating-point operations per second of a large square matrix product: the most that this device gives in practice."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n ** 3 / seconds(lambda: (a @ a)[0, 0].item(), 9)


class Run:
    """What a training loop needs besides its mathematics: steps with a progress bar, Ctrl-C, saving, resuming.

    Every step seeds torch with (seed, step, rank), so a resumed run draws the very numbers it would have drawn, and ends
    bit-identical to one never interrupted (same machine, same seed). `beside`: the Run of a model trained in the same loop.
    """

    def __init__(self, stage, args, model, optimizer, config, **origin):
        self.stage, self.args, self.model, self.optimizer = stage, args, model, optimizer
        self.config, self.origin, self.beside = config, origin, None
        self.path = args.run / f"{stage}.pt"
        self.first, self.seconds, self.replaced = 0, 0.0, args.resume
        self.knobs = {k: getattr(args, k) for k in args.knobs} | {"size": args.size, "seed": args.seed}
        if args.resume:
            ckpt = read_checkpoint(self.path, stage)
            if ckpt["config"] != config or ckpt["optimizer"] is None or ckpt["model"].keys() != model.state_dict().keys():
                stop(f"{self.path} cannot be resumed here (other data, play-only weights, or of another version); train afresh without --resume")
            for k in origin:
                if ckpt["origin"].get(k) != origin[k]:
                    stop(f"{self.path} was begun on another {k} ({ckpt['origin'].get(k)}, now {origin[k]}); "
                         + ("name that with --data, or " if k == "data" else "") + "train afresh")
            model.load_state_dict(ckpt["model"])
            optimizer.load_state_dict(ckpt["optimizer"])
            self.first, self.seconds = ckpt["step"], ckpt["seconds"]
            if args.steps < self.first:
                stop(f"{self.path} is at step {self.first} already, beyond --steps {args.steps}")
        elif args.rank == 0:
            check_writable(args.run)

    def save(self, step):
        """Write the checkpoint, and that of a model trained beside it: both or neither."""
        if self.beside:
            self.beside.began, self.beside.seconds = self.began, self.seconds
            self.origin[self.beside.stage] = fingerprint(self.beside.model)
        runs = [self.beside, self] if self.beside else [self]
        for run in runs:
            if not all(p.isfinite().all() for p in run.model.parameters()):
                stop(f"the weights are no longer finite at step {step}; {run.path} is as it was; try a lower --lr")
        if self.args.rank == 0:
            (path, write), *more = [run.checkpoint(step) for run in runs]
            write_atomically(path, write, *more)

    def checkpoint(self, step):
        """The path, and what writes the checkpoint to an open file. What an earlier run left there is kept, once, as NAME.old.pt."""
        if not self.replaced and self.path.exists():
            write_atomically(self.path.with_suffix(".old.pt"), lambda f: f.write(self.path.read_bytes()))
        self.replaced = True
        seconds = self.seconds + (time.time() - self.began if self.began else 0.0)
        ckpt = dict(stage=self.stage, config=self.config, knobs=self.knobs, origin=self.origin, step=step, seconds=seconds,
                    model=self.model.state_dict(), optimizer=self.optimizer.state_dict(), fingerprint=fingerprint(self.model))
        return self.path, lambda f: torch.save(ckpt, f)

    def steps(self):
        """Yields step numbers up to args.steps. Saves every 500 steps, at Ctrl-C and at the end; sets seed and lr."""
        args, self.began, self.stopped = self.args, time.time(), False
        self.bar = tqdm(total=args.steps, initial=self.first, desc=self.stage, disable=args.rank > 0, mininterval=1,
                        dynamic_ncols=True)
        if args.bench:
            yield from self.bench()
            raise SystemExit(0)
        with contextlib.suppress(ValueError):        # only the main thread may catch signals
            signal.signal(signal.SIGINT, lambda *_: setattr(self, "stopped", True))
        for step in range(self.first, args.steps):
            torch.manual_seed((args.seed * 1_000_003 + step) * 1009 + args.rank)
            schedule(self.optimizer, step, args)
            yield step
            self.bar.update()
            if self.asked_to_stop(step):
                self.save(step + 1)
                self.bar.close()
                if args.rank == 0:
                    print(f"stopped and saved at step {step + 1}; go on with the same command and --resume", file=sys.stderr)
                raise SystemExit(130)
            if (step + 1) % 500 == 0:
                self.save(step + 1)
        self.bar.close()
        self.seconds += time.time() - self.began
        self.began = None                            # the clock stands: what a stage does afterwards is no training
        self.save(args.steps)
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGINT, lambda *_: stop("interrupted while scoring; the weights are saved: the same command with --resume goes on"))

    def asked_to_stop(self, step):
        """Ctrl-C? Under torchrun each process hears of it in a step of its own, and all must stop after the same one: every 20 steps they
        ask each other."""
        if self.args.world == 1:
            return self.stopped
        if step % 20:
            return False
        stopped = torch.tensor(float(self.stopped), device=self.args.device)
        torch.distributed.all_reduce(stopped, torch.distributed.ReduceOp.MAX)
        return stopped.item() > 0

    def bench(self, warm=5, timed=20):
        """`--bench`: the loop runs, and one JSON line says how fast; nothing is saved. Hooks tell the phases of a step apart."""
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.utils.flop_counter import FlopCounterMode
        args, marks, rows = self.args, [], []

        def mark(*_):
            if args.device.type == "cuda":
                torch.cuda.synchronize(args.device)
            marks.append(time.perf_counter())

        hooks = [self.model.register_forward_pre_hook(mark), self.model.register_forward_hook(mark),
                 self.optimizer.register_step_pre_hook(mark), self.optimizer.register_step_post_hook(mark)]
        for step in range(warm + timed):
            marks.clear()
            mark()
            yield step
            rows.append([b - a for a, b in zip(marks, marks[1:])])
        for hook in hooks:
            hook.remove()
        peak, counter, forward = memory(args.device), FlopCounterMode(display=False), []
        self.model.register_forward_pre_hook(lambda _, inputs: tuple(v[:1] if torch.is_tensor(v) else v for v in inputs))    # of one clip
        self.model.register_forward_hook(lambda *_: forward.append(counter.get_total_flops()))   # what is computed again is no progress
        counted = sdpa_kernel(SDPBackend.MATH) if args.device.type == "cpu" else contextlib.nullcontext()
        with torch.compiler.set_stance("force_eager"), counted, counter:         # it sees through torch's operations only
            yield step
        self.bar.close()
        phases = [sorted(column)[timed // 2] for column in zip(*rows[warm:])]
        total, flops = sorted(map(sum, rows[warm:]))[timed // 2], 3 * args.batch // args.world * forward[0]      # by custom: backward costs twice as much
        with autocast(args):
            dtype = torch.get_autocast_dtype(args.device.type) if torch.is_autocast_enabled(args.device.type) else torch.float32
        if args.rank > 0:
            return
        rate = matmul_rate(args.device, dtype)
        print(json.dumps(dict(
            stage=self.stage, size=args.size, device=str(args.device), threads=torch.get_num_threads(), compile=args.compile,
            dtype=str(dtype).removeprefix("torch."), batch=args.batch, frames=args.frames,
            parameters=sum(p.numel() for p in self.model.parameters()), clips_per_second=round(args.batch / total, 2),
            frames_per_second=round(args.batch * args.frames / total, 1),
            milliseconds={k: round(1000 * v, 1) for k, v in zip(("data", "forward", "backward", "optimizer"), phases)},
            gflop_per_step=round(flops / 1e9, 1), matmul_gflops=round(rate / 1e9), mfu=round(flops / total / rate, 3), memory_gb=peak)))

    def log(self, step, loss, **stats):
        """Show the numbers every few steps (reading them makes a GPU wait); a loss that is not finite ends the run."""
        if step % 20 == 0 or step == self.args.steps - 1:
            value = loss.detach().item()
            if not math.isfinite(value):
                stop(f"the loss is {value} at step {step}; what was saved before is untouched; try a lower --lr")
            self.bar.set_postfix({k: f"{v.detach().item():.4f}" for k, v in dict(loss=loss, **stats).items()})

    def report(self, evaluate):
        """Score the finished model; print the scores and write them to NAME.json beside the checkpoint."""
        args = self.args
        if args.world > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        if args.rank > 0:
            return
        with torch.compiler.set_stance("force_eager"):           # other shapes than in training: not worth compiling
            scores = evaluate(self.model, args)
        about = dict(stage=self.stage, size=args.size, steps=args.steps, seconds=round(self.seconds, 1), device=str(args.device),
                     seed=args.seed, parameters=sum(p.numel() for p in self.model.parameters()),
                     peak_memory_gb=memory(args.device), torch=torch.__version__, **self.origin, fingerprint=fingerprint(self.model), knobs=self.knobs)
        scores = {k: round(v, 4) if isinstance(v, float) else v for k, v in scores.items()}
        write_json(args.run / f"{self.stage}.json", scores | about)
        for k, v in scores.items():
            print(f"{k:>24}  {v}")
        print(f"{self.seconds / 60:.1f} minutes of training, {about['parameters'] / 1e6:.1f}M parameters; scores in {args.run}/{self.stage}.json")


def check_patch(patch, height, width):
    if height % patch or width % patch:
        stop(f"frames of {width}x{height} pixels cannot be cut into patches of {patch}; choose a --patch that divides both")


def save_picture(path, clips, title):
    """Write clips, each (T, H, W, C) in [0, 1], as a PNG, a row of frames for each, enlarged without smoothing; say what it shows."""
    import imageio.v2 as imageio
    image = torch.vstack([torch.hstack(list(clip)) for clip in clips])           # (clips * H, T * W, C)
    pixels = (image.clamp(0, 1) * 255).byte().cpu().numpy().repeat(2, 0).repeat(2, 1)
    write_atomically(path, lambda f: imageio.imwrite(f, pixels, format="png"))
    print(f"{path}: {title}")


def pyplot_for_files():
    """matplotlib.pyplot, to draw into files alone, whatever window the shell or a notebook asks for (MPLBACKEND, which may name one that is not there)."""
    os.environ["MPLBACKEND"] = "Agg"                             # read when matplotlib is first imported;
    import matplotlib
    matplotlib.use("Agg", force=True)                            # after that, this counts
    import matplotlib.pyplot as plt
    return plt


def save_figure(path, figure, title):
    """Write a matplotlib figure as a PNG, and say what it shows."""
    write_atomically(path, lambda f: figure.savefig(f, format="png", dpi=80, bbox_inches="tight"))
    print(f"{path}: {title}")


def write_gif(path, frames, fps=10):
    """Write frames, (H, W, C) arrays in [0, 1], as a GIF, four times as large, without smoothing."""
    import imageio.v2 as imageio
    big = [(np.clip(f, 0, 1) * 255).astype(np.uint8).repeat(4, 0).repeat(4, 1) for f in frames]
    write_atomically(path, lambda f: imageio.mimwrite(f, big, format="gif", duration=1000 / fps, loop=0))
    print(f"{path}: {len(frames)} frames")
