"""Stage 1: the video tokenizer (ST-ViViT, section 2.1). Frames in, a grid of discrete tokens a frame out, and back.

    python tokenizer.py                      # data/platformer -> runs/platformer/tokenizer.pt
    python tokenizer.py --data data/mine     # your own videos

A VQ-VAE whose encoder and decoder are causal ST-transformers: token z_t carries what x_1..x_t showed, and frame t is
decoded from z_1..z_t. Everything later happens in these tokens.

Where it departs from the paper, at every size but coinrun: patches of 8 pixels instead of 4 (64 tokens a frame: a quarter of
the work for each later stage), a smaller model and a higher learning rate (minutes, not days). At every size: the
codebook is online k-means with revival (see VectorQuantizer), and the reconstruction error is divided by the variance of
the pixels, so that it starts near 1 and the commitment loss cannot drown it.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import Clips, psnr
from st_block import (Run, STTransformer, VectorQuantizer, autocast, check_patch, command, make_optimizer, parallel,
                      parser, patchify, perplexity, prepare_blocks, save_picture, settle, unpatchify)

KNOBS = dict(
    #            test  laptop   gpu  coinrun
    steps=      (350,    700,  2000, 300000, "training steps"),
    batch=      (  8,     16,    32,     48, "clips in a step"),
    frames=     (  4,      8,    16,     16, "frames in a clip, and how far back a frame may look"),
    patch=      (  8,      8,     8,      4, "pixels along a patch's side"),
    dim=        ( 64,    128,   512,    512, "width D"),
    layers=     (  1,      1,     4,      8, "ST blocks of the encoder, and of the decoder"),
    heads=      (  2,      2,     8,      8, "attention heads"),
    codes=      (256,   1024,  1024,   1024, "size of the codebook K"),
    code_dim=   (  8,     32,    32,     32, "dimensions of a code"),
    beta=       (0.25,  0.25,  0.25,   0.25, "weight of the commitment loss"),
    lr=         (3e-3,  2e-3,  1e-3,   3e-4, "peak learning rate"),
    warmup=     ( 10,    100,   200,  10000, "steps of linear warm-up"),
    scored=     ( 32,     64,   256,    256, "held-out clips in the scores"),
)
MODEL = ("patch", "dim", "layers", "heads", "codes", "code_dim", "beta")    # the knobs that a checkpoint must carry


class Tokenizer(nn.Module):
    """Frames (B, T, H, W, C) in [0, 1] <-> tokens (B, T, N), integers below `codes`. Both ways causal in time."""

    def __init__(self, height, width, window, patch, dim, layers, heads, codes, code_dim, beta):
        super().__init__()
        self.height, self.width, self.patch, self.beta = height, width, patch, beta
        self.tokens, pixels = (height // patch) * (width // patch), 3 * patch * patch
        self.embed = nn.Linear(pixels, dim)
        self.encoder = STTransformer(self.tokens, dim, layers, heads, window)
        self.to_code = nn.Linear(dim, code_dim)
        self.vq = VectorQuantizer(codes, code_dim)
        self.from_code = nn.Linear(code_dim, dim)
        self.decoder = STTransformer(self.tokens, dim, layers, heads, window)
        self.to_pixels = nn.Linear(dim, pixels)

    def features(self, x):
        """Frames (B, T, H, W, C) -> vectors to be quantised (B, T, N, code_dim)."""
        x = patchify(2 * x - 1, self.patch)                         # (B, T, N, P*P*C)
        return self.to_code(self.encoder(self.embed(x)))            # (B, T, N, code_dim)

    def pixels(self, e, cache=None):
        """Quantised vectors (B, T, N, code_dim) -> frames (B, T, H, W, C), not clamped."""
        x = self.to_pixels(self.decoder(self.from_code(e), cache=cache))
        return unpatchify(x.float(), self.patch, self.height, self.width) / 2 + 0.5         # (B, T, H, W, C)

    def encode(self, x):
        """Frames (B, T, H, W, C) -> tokens (B, T, N)."""
        return self.vq.nearest(self.vq.norm(self.features(x).float()))

    def decode(self, z, cache=None):
        """Tokens (B, T, N) -> frames (B, T, H, W, C) in [0, 1]. With a cache: one new frame, which it must then advance past."""
        return self.pixels(F.embedding(z, self.vq.codebook), cache).clamp(0, 1)

    def forward(self, x):
        """Loss of clips x (B, T, H, W, C) in [0, 1], and what to watch: {name: scalar}."""
        e, z, commitment = self.vq(self.features(x))
        error = F.mse_loss(self.pixels(e), x)
        loss = error / x.var().clamp(min=1e-4) + self.beta * commitment      # (frames of one colour vary by nothing)
        return loss, dict(mse=error, commit=commitment)


build = Tokenizer               # for load_model


@torch.no_grad()
def tokens_of(tokenizer, clips, batch=16):
    """Tokens (B, T, N) of many clips (B, T, H, W, C), a few at a time."""
    return torch.cat([tokenizer.encode(clips[i:i + batch]) for i in range(0, len(clips), batch)])


@torch.no_grad()
def evaluate(tokenizer, args):
    """Held-out levels: psnr beside copy_psnr, and how much of the codebook is in use. Writes the picture."""
    tokenizer.eval()
    valid = Clips(args.data, "valid", 16, args.device)
    x = valid.at(valid.spread(args.scored))                          # (B, 16, H, W, C)
    z = tokens_of(tokenizer, x)
    y = torch.cat([tokenizer.decode(part) for part in z.split(16)])
    K = len(tokenizer.vq.codebook)
    rows = []
    for i in range(0, len(x), math.ceil(len(x) / 3)):                # three clips, eight frames of each
        rows += [x[i, :8], y[i, :8], (x[i, :8] - y[i, :8]).abs()]
    save_picture(args.run / "tokenizer.png", rows, "held-out frames, their reconstruction, the absolute error")
    return dict(psnr=psnr(x, y).mean().item(), psnr_frame_1=psnr(x, y)[:, 0].mean().item(),
                copy_psnr=psnr(x[:, 1:], x[:, :-1]).mean().item(),
                codes_in_use=len(z.unique()) / K, code_perplexity=perplexity(z, K).item(), codes=K)


def main(argv=None):
    args = settle(parser(__doc__, KNOBS).parse_args(argv), "tokenizer")
    clips = Clips(args.data, "train", args.frames, args.device)
    height, width, _ = clips.meta["frame"]
    check_patch(args.patch, height, width)
    config = dict(height=height, width=width, window=args.frames) | {k: getattr(args, k) for k in MODEL}
    torch.manual_seed(args.seed)
    model = Tokenizer(**config).to(args.device)
    optimizer = make_optimizer(model, args.lr)
    run = Run("tokenizer", args, model, optimizer, config, data=clips.name)
    prepare_blocks(model, args)
    net = parallel(model, args)

    for step in run.steps():
        x = clips.sample(args.batch // args.world)                   # (B, T, H, W, C)
        with autocast(args):
            loss, watch = net(x)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        run.log(step, loss, **watch)

    run.report(evaluate)


if __name__ == "__main__":
    command(main)
