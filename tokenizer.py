"""Train stage 1, the video tokenizer (section 2.1, the paper's ST-ViViT): frames <-> tokens.

    python tokenizer.py                      # data/platformer -> runs/platformer/tokenizer.pt
    python tokenizer.py --data data/mine     # your own videos -> runs/mine/tokenizer.pt
    python tokenizer.py --recipe paper --run runs/paper      # VQ-VAE as published

It is a VQ-VAE (vector-quantized variational autoencoder). The encoder turns each patch of a frame
into a vector. The quantizer replaces the vector by the nearest of the codes that it has learned,
its codebook. The number of that code is the patch's token, a word of a vocabulary of patches. The
decoder turns tokens back into pixels. Encoder and decoder are causal ST-transformers: the tokens
z_t of frame t depend on x_1..x_t, and frame t is decoded from z_1..z_t. The later stages see tokens
only.
"""
import st_block     # first: so Ctrl-C ends the program in one line, even during the imports
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import Clips, psnr
from st_block import (OnlineKMeans, Run, STTransformer, VectorQuantizer, autocast, check_patch,
                      command, grid, make_optimizer, parallel, parser, patchify, perplexity,
                      prepare, save_picture, schedule, settle, unpatchify)

# Each knob has a value for every --size. At coinrun, the paper's case study, they are those of its
# appendix F. Elsewhere patches of 8 pixels instead of 4 give a quarter of the tokens, and so a
# quarter of the work to each later stage. lab/NOTES.md compares some values of size laptop; the
# rest were chosen by hand. The learning rate rises to its peak in the steps of warm-up.
KNOBS = dict(
    #             test  laptop   gpu  coinrun
    steps=       (350,    700,  2000, 300000, "training steps"),
    batch=       (  8,     16,    32,     48, "clips in a step"),
    frames=      (  4,      8,    16,     16, "frames in a clip, and how far back a frame looks"),
    patch=       (  8,      8,     8,      4, "pixels along a patch's side"),
    dim=         ( 64,    128,   512,    512, "width D"),
    layers=      (  1,      1,     4,      8, "ST blocks of the encoder, and of the decoder"),
    heads=       (  2,      2,     8,      8, "attention heads"),
    vocabulary=  (256,   1024,  1024,   1024, "how many different tokens there are"),
    latent_dim=  (  8,     32,    32,     32, "dimensions of the vector behind a token"),
    lr=          (3e-3,  2e-3,  1e-3,   3e-4, "peak learning rate"),
    warmup=      ( 10,    100,   200,  10000, "steps of linear warm-up"),
    scored=      ( 32,     64,   256,    256, "held-out clips in the scores"),
)
# --recipe paper overrides some: its clips have 16 frames. (Batch times frames stays the same.)
PAPER = dict(
    frames=      ( 16,     16,    16,     16),
    batch=       (  2,      8,    32,     48),
)
# the knobs that the model is built from
MODEL = ("patch", "dim", "layers", "heads", "vocabulary", "latent_dim")


# ------------------------------------------------------------------------------- the paper's model


class Tokenizer(nn.Module):
    """Frames (B, T, H, W, C) in [0, 1] <-> tokens (B, T, N), integers below `vocabulary`."""
    quantizer = VectorQuantizer
    beta = 0.25         # how strongly vectors are drawn to their codes; VQ-VAE's value
    ffw = 1             # width of the feed-forward layers, in D: see STBlock

    def __init__(self, height, width, window, patch, dim, layers, heads, vocabulary, latent_dim):
        super().__init__()
        self.height = height
        self.width = width
        self.patch = patch
        self.tokens = math.prod(grid(height, width, patch))         # N
        pixels = 3 * patch * patch
        self.embed = nn.Linear(pixels, dim)
        self.encoder = STTransformer(self.tokens, dim, layers, heads, window, self.ffw)
        self.to_latent = nn.Linear(dim, latent_dim)
        self.vq = self.quantizer(vocabulary, latent_dim, self.beta)
        self.from_latent = nn.Linear(latent_dim, dim)
        self.decoder = STTransformer(self.tokens, dim, layers, heads, window, self.ffw)
        self.to_pixels = nn.Linear(dim, pixels)

    def features(self, x):
        """Frames (B, T, H, W, C) -> vectors to be quantized (B, T, N, latent_dim)."""
        # patches of pixels in [-1, 1], each a vector
        patches = patchify(2 * x - 1, self.patch)                   # (B, T, N, P*P*C)
        h = self.encoder(self.embed(patches))                       # (B, T, N, D)
        return self.to_latent(h)

    def pixels(self, e, cache=None):
        """Quantized vectors (B, T, N, latent_dim) -> frames (B, T, H, W, C), not clamped."""
        h = self.decoder(self.from_latent(e), cache)                # (B, T, N, D)
        patches = self.to_pixels(h).float()                         # (B, T, N, P*P*C)
        return unpatchify(patches, self.patch, self.height, self.width) / 2 + 0.5

    def encode(self, x):
        """Frames (B, T, H, W, C) -> tokens (B, T, N)."""
        return self.vq.nearest(self.features(x))

    def decode(self, z, cache=None):
        """Tokens (B, T, N) -> frames (B, T, H, W, C) in [0, 1].

        With a cache: the tokens (B, 1, N) of one new frame. The caller advances the cache.
        """
        return self.pixels(self.vq.lookup(z), cache).clamp(0, 1)

    def error(self, y, x):
        """How far reconstructions y are from frames x, both (B, T, H, W, C): the mean square."""
        return F.mse_loss(y, x)

    def forward(self, x):
        """Clips x (B, T, H, W, C) in [0, 1] -> the loss, and its parts: {name: scalar}."""
        # each patch becomes a vector, each vector the nearest code e, with the token z
        e, z, vq_loss = self.vq(self.features(x))                   # e (B, T, N, latent_dim)
        # draw the clip again from the codes
        y = self.pixels(e)                                          # (B, T, H, W, C)
        error = self.error(y, x)
        return error + vq_loss, dict(error=error, vq=vq_loss)


# ------------------------------------------------------------------------------- what we added


class OurTokenizer(Tokenizer):
    """--recipe ours. What differs, and why:

    - quantizer: the codebook is k-means, which brings nearly all codes into use within minutes.
    - error: the mean square error is divided by the variance of the pixels. It starts near 1 on
      every video, so the commitment loss (see VectorQuantizer) cannot drown it.
    - ffw: see STBlock.
    """
    quantizer = OnlineKMeans
    ffw = 4

    def error(self, y, x):
        # frames of one colour vary by nothing. 1e-4 is a deviation of 0.01, 2.5 grey levels
        return super().error(y, x) / x.var().clamp(min=1e-4)


MODELS = dict(paper=Tokenizer, ours=OurTokenizer)


def build(recipe, **config):
    """The model of a checkpoint. An unknown recipe, such as a lab model's name, is a KeyError."""
    return MODELS[recipe](**config)


# ------------------------------------------------------------------------------- what it learned


@torch.no_grad()
def tokens_of(tokenizer, clips, batch=16):
    """The tokens (B, T, N) of many clips (B, T, H, W, C), a few at a time."""
    return torch.cat([tokenizer.encode(part) for part in clips.split(batch)])


@torch.no_grad()
def evaluate(tokenizer, args):
    """Held-out levels: psnr (see data.psnr: 3 dB more is half of the squared error) beside
    copy_psnr, and how much of the vocabulary is in use.

    psnr: of the reconstruction. psnr_frame_1: of first frames, which have no past. copy_psnr: if
    the last frame were shown again. token_perplexity: see `perplexity`. Writes tokenizer.png.
    """
    tokenizer.eval()
    # longer than the clips of training may be: do tokens get worse with time?
    valid = Clips(args.data, "valid", 16, args.device)
    x = valid.at(valid.spread(args.scored))                         # (B, 16, H, W, C)
    z = tokens_of(tokenizer, x)                                     # (B, 16, N)
    y = torch.cat([tokenizer.decode(part) for part in z.split(16)])
    # three clips, eight frames of each
    rows = []
    for i in range(0, len(x), math.ceil(len(x) / 3)):
        rows += [x[i, :8], y[i, :8], (x[i, :8] - y[i, :8]).abs()]
    save_picture(args.run / "tokenizer.png", rows,
                 "held-out frames, their reconstruction, the absolute error")
    V = len(tokenizer.vq.codebook)
    quality = psnr(x, y)                                            # (B, 16)
    scores = dict(psnr=quality.mean().item(),
                  psnr_frame_1=quality[:, 0].mean().item(),
                  copy_psnr=psnr(x[:, 1:], x[:, :-1]).mean().item(),
                  tokens_in_use=len(z.unique()) / V,
                  token_perplexity=perplexity(z, V).item(),
                  vocabulary=V)
    return scores | dict(verdict=verdict(scores))


def verdict(scores):
    """What the scores mean for whoever wants to play: one sentence."""
    if scores["psnr"] < scores["copy_psnr"]:
        return "worse than showing the last frame again: more --steps"
    # chosen by hand: another game was played worse at 27.5 dB than at 31 (lab/NOTES.md)
    if scores["psnr"] < 30:
        return "blurred, below 30 dB: more --steps, or --patch 4"
    return "sharp enough to play"


# ------------------------------------------------------------------------------- training


def main(argv=None, model_class=None, runner=Run):
    """Train the tokenizer. The lab passes a model_class or a runner of its own."""
    args = settle(parser(__doc__, KNOBS, PAPER).parse_args(argv), "tokenizer")
    # the clips to learn from, and some from other levels
    clips = Clips(args.data, "train", args.frames, args.device)
    valid = Clips(args.data, "valid", args.frames, args.device)
    held_out = valid.at(valid.spread(args.batch))                   # (B, T, H, W, C)
    height, width, _ = clips.meta["frame"]
    check_patch(args.patch, height, width)

    # the model
    config = dict(height=height, width=width, window=args.frames)
    config |= {name: getattr(args, name) for name in MODEL}
    torch.manual_seed(args.seed)
    model = (model_class or MODELS[args.recipe])(**config).to(args.device)
    optimizer = make_optimizer(model, args.lr)
    config["recipe"] = model_class.__name__ if model_class else args.recipe

    def held_out_loss():
        return model(held_out)[0]

    run = runner("tokenizer", args, model, optimizer, config, held_out_loss, data=clips.name)
    prepare(model, args)
    net = parallel(model, args)

    for step in run.steps():
        schedule(optimizer, step, args)
        # a batch of random clips
        x = clips.sample(args.batch // args.world)                  # (B, T, H, W, C)
        # reconstruct them
        with autocast(args):
            loss, parts = net(x)
        # learn from the error. A gradient longer than 1 is shortened to that, so that one odd batch
        # cannot spoil the weights. (1 is the usual value; the notes have no other)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        run.log(step, loss, **parts)

    run.report(evaluate)


if __name__ == "__main__":
    command(main)
