"""Train stage 2, the latent action model (LAM, section 2.1): it discovers what the player did.

    python lam.py                            # data/platformer -> runs/platformer/lam.pt
    python lam.py --data data/mine           # your own videos -> runs/mine/lam.pt
    python lam.py --recipe paper --run runs/paper            # the LAM as published

Nobody labels the videos. The encoder sees frames x_1..x_t AND the next one, x_{t+1}, and may say
one of a few codes, the latent action a_t: 8 in the paper, 9 here. (Latent: nobody has seen it.) The
decoder sees x_1..x_t and that code, and must draw x_{t+1}. So few codes cannot describe a frame.
They help most when they tell what the past could not: in a game, what the player did. In play the
player says the code, and only the codebook, the vectors of the codes, is kept.
"""
import st_block     # first: so Ctrl-C ends the program in one line, even during the imports
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from data import (ACTIONS, Clips, displacement, moves_within, psnr, standard_error,
                  true_actions)
from st_block import (Neighbours, OnlineKMeans, Run, STTransformer, VectorQuantizer, autocast,
                      check_patch, command, counts, grid, make_optimizer, parallel, parser,
                      patchify, perplexity, prepare, pyplot_for_files, save_figure, schedule,
                      settle, stop, unpatchify)

# Each knob has a value for every --size. Two frames are enough for a clip, since the decoder of
# --recipe ours sees one frame only. Many short clips teach more than few long ones. lab/NOTES.md
# compares some values of size laptop; the rest were chosen by hand.
KNOBS = dict(
    #             test  laptop   gpu  coinrun
    steps=       (300,   1800,  1200, 200000, "training steps"),
    batch=       ( 48,     48,    96,    288, "clips in a step"),
    frames=      (  2,      2,     2,      2, "frames in a clip"),
    patch=       (  8,      8,     8,      8, "pixels along a patch's side"),
    dim=         ( 64,    128,   256,    512, "width D"),
    layers=      (  1,      2,     4,      8, "ST blocks of the encoder, and of the decoder"),
    heads=       (  2,      2,     4,      8, "attention heads"),
    codes=       (  9,      9,     9,      9, "latent actions |A|"),
    latent_dim=  (  8,     32,    32,     32, "dimensions of a code"),
    lr=          (3e-3,  4e-3,  1e-3,   3e-4, "peak learning rate"),
    warmup=      ( 10,    100,   100,   5000, "steps of linear warm-up"),
    scored=      (192,    768,   768,    768, "held-out clips in the scores"),
)
# --recipe paper overrides some. Its clips have 16 frames, since its decoder sees the whole past. At
# coinrun, the paper's case study, all values are from its appendix F, except the patch: it gives
# one for its large model only (16 pixels, of frames of 160x90). We use 8.
PAPER = dict(
    batch=       (  4,      8,    16,     36),
    frames=      ( 16,     16,    16,     16),
    codes=       (  8,      8,     8,      6),
    lr=          (1e-3,  1e-3,  3e-4,   3e-5),
    scored=      ( 32,     96,    96,     96),
)
# the knobs that the model is built from
MODEL = ("patch", "dim", "layers", "heads", "codes", "latent_dim")


# ------------------------------------------------------------------------------- the paper's model


class LatentActionModel(nn.Module):
    """Frames (B, T, H, W, C) in [0, 1] -> a latent action for each transition, (B, T-1).

    A latent action is an integer below `codes`. OurLatentActionModel, below, overrides
    `shown_to_encoder`, `features`, `predict`, `error` and `begin_step`.
    """
    quantizer = VectorQuantizer
    beta = 0.25         # how strongly vectors are drawn to their codes; VQ-VAE's value
    ffw = 1             # width of the feed-forward layers, in D: see STBlock

    def __init__(self, height, width, window, patch, dim, layers, heads, codes, latent_dim):
        super().__init__()
        self.height = height
        self.width = width
        self.patch = patch
        tokens = math.prod(grid(height, width, patch))              # N
        pixels = 3 * patch * patch
        self.embed = nn.Linear(pixels, dim)
        self.encoder = STTransformer(tokens, dim, layers, heads, window, self.ffw)
        self.to_latent = nn.Linear(dim, latent_dim)
        self.vq = self.quantizer(codes, latent_dim, self.beta)
        self.embed_past = nn.Linear(pixels, dim)
        self.embed_action = nn.Linear(latent_dim, dim)
        self.decoder = STTransformer(tokens, dim, layers, heads, window, self.ffw)
        self.to_pixels = nn.Linear(dim, pixels)

    def shown_to_encoder(self, x):
        """What the encoder sees of clips x (B, T, H, W, C): all of it, here."""
        return x

    def features(self, x):
        """What happened in each transition of clips x (B, T, H, W, C): (B, T-1, latent_dim).

        Entry t depends on x_1..x_{t+1} and on no later frame.
        """
        # one causal pass over the whole clip
        h = self.encoder(self.embed(patchify(x, self.patch)))       # (B, T, N, D)
        # the output at frame t+1 has seen x_1..x_{t+1}: it tells of the transition from t to t+1.
        # The mean over its N tokens makes it one vector
        h = h[:, 1:].mean(2)                                        # (B, T-1, D)
        return self.to_latent(h)

    def predict(self, x, e):
        """The next frame after each frame of x (B, T, H, W, C), under actions e (B, T, latent_dim).

        Returns (B, T, H, W, C). Entry t predicts x_{t+1}, from x_1..x_t and a_1..a_t.
        """
        # the frames so far
        h = self.embed_past(patchify(x, self.patch))                # (B, T, N, D)
        # an action is added to every token of the frame that it starts from
        h = h + self.embed_action(e).unsqueeze(2)
        patches = self.to_pixels(self.decoder(h)).float()           # (B, T, N, P*P*C)
        # the sigmoid keeps pixels in [0, 1]
        return unpatchify(patches, self.patch, self.height, self.width).sigmoid()

    def error(self, y, x):
        """How far predictions y of x_2..x_T are from clips x (B, T, ...): the mean square."""
        return F.mse_loss(y, x[:, 1:])

    def begin_step(self, step, args):
        """What changes on the way, before each training step: nothing."""

    def encode(self, x):
        """Frames (B, T, H, W, C) -> latent actions (B, T-1)."""
        return self.vq.nearest(self.features(x))

    def decode(self, x, a):
        """The frames after x (B, T, H, W, C) under latent actions a (B, T), clamped to [0, 1]."""
        return self.predict(x, self.vq.lookup(a)).clamp(0, 1)

    def forward(self, x):
        """Clips x (B, T, H, W, C) -> the loss, latent actions (B, T-1), and parts of the loss."""
        # what happened between each frame and the next, as a vector
        v = self.features(self.shown_to_encoder(x))                 # (B, T-1, latent_dim)
        # the nearest of |A| codes e, with index a: all that the decoder is told of the next frame
        e, a, vq_loss = self.vq(v)                                  # e (B, T-1, latent_dim)
        # draw x_2..x_T, each from the frames before it
        y = self.predict(x[:, :-1], e)                              # (B, T-1, H, W, C)
        error = self.error(y, x)
        parts = dict(error=error, vq=vq_loss, codes=perplexity(a, len(self.vq.codebook)))
        return error + vq_loss, a, parts


# ------------------------------------------------------------------------------- what we added

# From this share of the training on, the error becomes its square root. It was chosen at size
# laptop, by five seeds (lab/NOTES.md). At size test trainings are too short for it.
ROOT_FROM = dict(test=1.0, laptop=0.4, gpu=0.4, coinrun=0.4)


class TwoPartQuantizer(nn.Module):
    """Codes of two parts: the two halves of a vector are quantized apart.

    Each half has a k-means of its own. With 3 codes for either there are 9 pairs, and 3 i + j is
    the number of the pair (i, j). A single k-means spends its codes where vectors differ most, and
    leaves none for a direction in which they differ less.
    """
    kmeans = OnlineKMeans

    def __init__(self, codes, dim, beta):
        super().__init__()
        first, second = two_factors(codes)
        self.first = self.kmeans(first, dim // 2, beta)
        self.second = self.kmeans(second, dim // 2, beta)

    @property
    def codebook(self):
        """The vectors of all pairs, (codes, dim)."""
        first = self.first.codebook.repeat_interleave(len(self.second.codebook), 0)
        second = self.second.codebook.repeat(len(self.first.codebook), 1)
        return torch.cat([first, second], 1)

    def pair(self, i, j):
        """The number of the pair of codes i and j, of any shape."""
        return i * len(self.second.codebook) + j

    def norm(self, v):
        """Vectors v (..., dim), each half brought to unit root-mean-square."""
        a, b = v.chunk(2, -1)
        return torch.cat([self.first.norm(a), self.second.norm(b)], -1)

    def nearest(self, v):
        """The index (...) of the code nearest to each vector of v (..., dim)."""
        a, b = v.chunk(2, -1)
        return self.pair(self.first.nearest(a), self.second.nearest(b))

    def lookup(self, index):
        """The code vectors (..., dim) of indices (...)."""
        return F.embedding(index, self.codebook)

    def forward(self, v):
        """Vectors v (..., dim) -> their codes e (..., dim), the indices (...), and the loss."""
        a, b = v.chunk(2, -1)
        e, i, loss = self.first(a)
        f, j, other = self.second(b)
        return torch.cat([e, f], -1), self.pair(i, j), (loss + other) / 2


def two_factors(codes):
    """The two numbers nearest to each other whose product is `codes`, the larger one first."""
    second = math.isqrt(codes)
    while codes % second:
        second -= 1
    return codes // second, second


class OurLatentActionModel(LatentActionModel):
    """--recipe ours. Each remedy is a named comment below. lab/NOTES.md has what each one buys.

    - two readings (features): the encoder reads each pair of frames as (x_t, x_{t+1}) and as
      (x_{t+1}, x_t), and the difference is quantized. What does not depend on the direction of
      time cancels, such as the level and its colours. Otherwise codes name the look of the level.
    - motion energy (read): the pair is read by squares of linear filters (Adelson & Bergen 1985).
      A filter answers alike to a bright edge and to a dark one that move alike. Otherwise a code
      can mean one thing on dark levels and another on light ones.
    - no past (PAST): the decoder sees x_t only, the encoder only the pair x_t and x_{t+1}. A
      decoder with a past predicts "still running right" by itself, and then a code means "as
      before", never "right".
    - mirror (features): each pair is read in a mirror, too. What changes its sign there goes
      sideways, and what does not goes up or down. The two are quantized apart, see
      TwoPartQuantizer. Otherwise all codes name the direction in which most moves.
    - off the grid (features): the encoder sees all frames half a patch lower. What stands on the
      ground of a game often fills whole patches. If it then jumps by a whole patch, none of them
      sees which way.
    - shifted clips (shown_to_encoder): the encoder sees half of the clips shifted against the grid
      of patches, so that a code means the same wherever things lie to the grid.
    - neighbours (predict): the decoder sees each patch with the eight around it. What moves, moves
      over the edges of patches.
    - drawn on the last frame (predict): the output is added to x_t and starts at zero, so training
      begins at copying the last frame. A frame painted from nothing starts far worse. So there is
      no sigmoid, and pixels go in as [-1, 1].
    - border, unit, root (error): see there.
    """
    quantizer = TwoPartQuantizer
    beta = 0.05         # error and commitment loss begin near 1 both; the latter is to be a detail
    ffw = 4             # see STBlock
    PAST = 1            # window of encoder (in pairs of frames) and decoder (in frames)
    SHIFTED = 0.5       # share of the clips that the encoder sees shifted: all was worse
    BORDER = 1          # patches along each edge that the error leaves out

    def __init__(self, height, width, window, patch, dim, layers, heads, codes, latent_dim):
        # no past: the window is PAST, whatever the length of the clips
        super().__init__(height, width, self.PAST, patch, dim, layers, heads, codes, latent_dim)
        pixels = 3 * patch * patch
        # motion energy: filters over a pair of frames, without a bias, so that x and -x look alike
        self.embed = nn.Linear(2 * pixels, dim, bias=False)
        # two readings: their difference would cancel a bias
        self.to_latent = nn.Linear(dim, latent_dim, bias=False)
        # neighbours
        self.around = Neighbours(*grid(height, width, patch), dim)
        # drawn on the last frame: at first nothing is added
        nn.init.zeros_(self.to_pixels.weight)
        nn.init.zeros_(self.to_pixels.bias)
        # border
        edge = self.BORDER * patch
        self.inner = slice(edge, height - edge), slice(edge, width - edge)
        self.rooted = False

    def shown_to_encoder(self, x):
        """Shifted clips: in training, half of them are rolled down and right by one random shift
        of less than a patch. What leaves the frame comes in on the other side."""
        if not self.training:
            return x
        n = round(self.SHIFTED * len(x))
        by = torch.randint(self.patch, (2,)).tolist()
        return torch.cat([x[:n].roll(by, (2, 3)), x[n:]])

    def features(self, x):
        """What happened in each transition of clips x (B, T, H, W, C): (B, T-1, latent_dim).

        The first half of a vector tells what went sideways, the second what went up or down.
        """
        # off the grid
        x = x.roll(self.patch // 2, 2)
        # mirror: all of it once more with left and right exchanged
        x = torch.cat([x, x.flip(3)])                               # (2B, T, H, W, C)
        patches = patchify(2 * x - 1, self.patch)                   # (2B, T, N, P*P*C)
        before, after = patches[:, :-1], patches[:, 1:]             # (2B, T-1, N, P*P*C)
        # two readings: every pair of frames forwards and backwards in time
        forwards = torch.cat([before, after], -1)
        backwards = torch.cat([after, before], -1)
        h = self.read(torch.cat([forwards, backwards]))             # (4B, T-1, N, D)
        h, reverse = h.chunk(2)
        # what both say cancels; then the mean over the tokens of a frame
        v = self.to_latent((h - reverse).mean(2))                   # (2B, T-1, latent_dim)
        # what the mirror turns round went sideways; what it leaves as it was went up or down
        v, mirrored = v.chunk(2)
        sideways, _ = (v - mirrored).chunk(2, -1)
        _, upwards = (v + mirrored).chunk(2, -1)
        return torch.cat([sideways, upwards], -1)

    def read(self, pairs):
        """Pairs of patches (B, T-1, N, 2*P*P*C) -> (B, T-1, N, D)."""
        # motion energy: squares of linear filters over two frames
        return self.encoder(self.embed(pairs).square())

    def predict(self, x, e):
        """The next frame after each frame of x (B, T, H, W, C), under actions e (B, T, latent_dim).

        Returns (B, T, H, W, C), not clamped. Entry t predicts x_{t+1}.
        """
        h = self.embed_past(patchify(2 * x - 1, self.patch))        # (B, T, N, D)
        # neighbours: each patch with what lies around it
        h = self.around(h)
        h = h + self.embed_action(e).unsqueeze(2)
        change = self.to_pixels(self.decoder(h)).float()            # (B, T, N, P*P*C)
        # drawn on the last frame
        return x + unpatchify(change, self.patch, self.height, self.width)

    def error(self, y, x):
        """How far predictions y of x_2..x_T are from clips x. 1: no better than copying x_t.

        - border: nobody can know from the last frame what comes into view at the edges. If the
          error counted it, codes would be spent on it.
        - unit: it is divided by the error of copying the last frame, so that the commitment loss
          stays a detail on every video.
        - root: late in training it is the root of the mean square, transition by transition. A
          hero who jumps is 1 % of the picture, and is lost in a mean of squares beside a view that
          scrolls. Early, while nothing is learned, the root cares most for transitions in which
          nothing happens, and codes may collapse.
        """
        def mean_square(y):
            difference = self.inside(y) - self.inside(x[:, 1:])
            return difference.square().mean((2, 3, 4))              # (B, T-1)

        error = mean_square(y)
        copying = mean_square(x[:, :-1])
        if self.rooted:
            # at zero a root has no gradient. 1e-8 is an error of 1e-4, a fortieth of a grey level
            error = error.clamp(min=1e-8).sqrt()
            copying = copying.clamp(min=1e-8).sqrt()
        # where nothing moves, copying is no error: nothing is divided by 0
        return error.mean() / copying.mean().clamp(min=1e-6)

    def inside(self, x):
        """Frames x (B, T, H, W, C) without the border."""
        return x[:, :, self.inner[0], self.inner[1]]

    def begin_step(self, step, args):
        """Before each training step: late in training the error is its root."""
        self.rooted = step >= ROOT_FROM[args.size] * args.steps


MODELS = dict(paper=LatentActionModel, ours=OurLatentActionModel)


def build(recipe, **config):
    """The model of a checkpoint. An unknown recipe, such as a lab model's name, is a KeyError."""
    return MODELS[recipe](**config)


# ------------------------------------------------------------------------------- what it learned


@torch.no_grad()
def actions_of(lam, clips, batch=16):
    """The latent actions (B, T-1) of many clips (B, T, H, W, C), a few at a time."""
    return torch.cat([lam.encode(part) for part in clips.split(batch)])


@torch.no_grad()
def evaluate(lam, args):
    """Held-out levels: psnr of the next frame with inferred codes, shuffled codes, and copying.

    Where the true buttons are known, also how well codes tell them. Writes lam.png.
    """
    lam.eval()
    valid = Clips(args.data, "valid", args.frames, args.device)
    x = valid.at(valid.spread(args.scored))                         # (B, T, H, W, C)
    a = actions_of(lam, x)                                          # (B, T-1)
    K = len(lam.vq.codebook)
    # the same codes, dealt to other transitions
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(a.numel(), generator=generator).to(a.device)
    shuffled = a.flatten()[order].view_as(a)

    def quality(codes):
        """psnr of the next frames under these codes."""
        y = [lam.decode(clips[:, :-1], c) for clips, c in zip(x.split(16), codes.split(16))]
        return psnr(torch.cat(y), x[:, 1:]).mean().item()

    share = counts(a, K) / a.numel()                                # (K,)
    scores = dict(psnr=quality(a), psnr_shuffled=quality(shuffled),
                  copy_psnr=psnr(x[:, :-1], x[:, 1:]).mean().item())
    scores["lam_gain"] = scores["psnr"] - scores["psnr_shuffled"]
    # a code counts if it is used in one transition of fifty, a sixth of its fair share
    scores["codes_in_use"] = int((share >= 0.02).sum())
    scores["codes"] = K
    scores["code_perplexity"] = perplexity(a, K).item()
    scores["code_share"] = [round(s, 3) for s in share.tolist()]
    scores["still"] = code_of_rest(x, a)
    # how things move under each code, and by that, without labels, which code each key may press
    before, after = x[:, :-1].flatten(0, 1), x[:, 1:].flatten(0, 1)
    view = displacement(before, after)                              # (B * (T-1), 2)
    hero = view + moves_on_screen(before, after, view)
    scores |= guess_keys(hero.cpu(), a.flatten().cpu(), K)
    # against the true buttons, which no training has seen
    found, table = score_actions(lam, args)
    picture(lam, args.run / "lam.png", x, a, view.view(*a.shape, 2), table)
    return scores | found | dict(verdict=verdict(scores))


def verdict(scores):
    """What the scores mean for whoever wants to play: one sentence."""
    # 0.5 dB was chosen by hand: codes that were of use had 4 dB and more (lab/NOTES.md)
    if scores["lam_gain"] < 0.5 or scores["codes_in_use"] < 2:
        return "the codes say nothing: more --steps, or more videos with varied motion"
    if scores["psnr"] < scores["copy_psnr"]:
        return "worse than copying the last frame: the codes say little yet; more --steps"
    return "the codes say what happens: go on with dynamics.py"


def code_of_rest(x, a):
    """The code of transitions in which nothing moves, or None where less than 1 % are so.

    x (B, T, H, W, C), a (B, T-1). play.py shows a prompt as a world at rest.
    """
    change = (x[:, 1:] - x[:, :-1]).square().mean((2, 3, 4))        # (B, T-1)
    # the two frames are alike by more than 40 dB, as those of a compressed video at rest are, and
    # the change is next to nothing beside the usual one. (Both bounds were chosen by hand)
    still = change < min(1e-4, 0.01 * change.mean())
    if still.float().mean() <= 0.01:
        return None
    return a[still].mode().values.item()


def labelled(lam, args, split, n):
    """n clips of a split as the codes read them, and as they really were.

    Returns codes (n, T-1), the buttons pressed (n, T-1), which of the six buttons would have led to
    the same next frame (n, T-1, 6), and the levels (n,).
    """
    data = Clips(args.data, split, args.frames, args.device)
    starts = data.spread(n)
    # a few hundred clips in memory at once
    parts = np.array_split(starts, math.ceil(len(starts) / 256))
    a = torch.cat([actions_of(lam, data.at(part)) for part in parts]).cpu().numpy()
    pressed, same, _ = true_actions(args.data, split)
    at = starts[:, None] + np.arange(args.frames - 1)
    return a, pressed[at], same[at], data.levels(starts)


def totals(a, rows, codes):
    """Rows (n, T-1, 6) added up for each code of a (n, T-1): (codes, 6)."""
    table = np.zeros((codes, len(ACTIONS)))
    np.add.at(table, a, rows)
    return table


def name_codes(a, pressed, same, codes):
    """What stands for what, from training levels. The arguments are those of `labelled`.

    mapping: for each code the button that it most often goes with.
    meaning: for each code the button that would most often have led to what the code was used for,
      pressed or not. Buttons that differ in less than 5 % of these uses are a tie, such as jump
      and none in mid-air, and the first of them wins. (Codes that do jump differ in 12 %.)
    keys: for each button the code that goes with it best, by the F-measure with beta = 1/2, a mean
      of precision and recall in which precision counts more (van Rijsbergen 1979). Only
      transitions count at which no other button would have led to the same frame.
    """
    one_hot = np.eye(len(ACTIONS))
    table = totals(a, one_hot[pressed], codes)                      # (codes, 6)
    mapping = table.argmax(1)

    leads = totals(a, same, codes)
    nearly_best = leads >= leads.max(1, keepdims=True) - 0.05 * table.sum(1, keepdims=True)
    meaning = nearly_best.argmax(1)

    alone = same.sum(-1, keepdims=True) == 1
    decisive = totals(a, one_hot[pressed] * alone, codes)
    return mapping, meaning, best_codes(decisive)


def best_codes(table):
    """For each column of a table of counts (codes, n), the code that goes with it best: (n,)."""
    # P(code | column), and P(column | code) if all columns were equally common. The F-measure is
    # (1 + beta^2) precision recall / (beta^2 precision + recall), with beta^2 = 0.25
    recall = table / table.sum(0).clip(1)
    precision = recall / recall.sum(1, keepdims=True).clip(1e-9)
    return (1.25 * precision * recall / (0.25 * precision + recall).clip(1e-9)).argmax(0)


# the ways in which something can go: nowhere, or one of eight directions, counterclockwise
WAYS = "·→↗↑↖←↙↓↘"


def ways_of(moves):
    """The ways, indices of WAYS, of moves (n, 2) in pixels right and down: an array (n,)."""
    dx, dy = np.asarray(moves, float).T
    # on the screen down is positive
    eighths = np.round(np.arctan2(-dy, dx) / (math.pi / 4)).astype(int)
    return np.where(np.hypot(dx, dy) < 1, 0, 1 + eighths % 8)


def moves_on_screen(before, after, view, most=6):
    """How the hero moved on the screen between two frames, both (B, H, W, C): (B, 2), pixels right
    and down, within -most..most.

    view (B, 2): how the view moved, see `displacement`. With it, that is how the hero went in his
    world. Nobody says who the hero is: where the frames differ though the view was followed,
    something moved, by the move that explains most of these pixels.
    """
    H, W = before.shape[1:3]
    # where does the frame differ from what the view alone would show?
    differs = torch.zeros(before.shape[:3], dtype=torch.bool, device=before.device)
    for i, (dx, dy) in enumerate(view.tolist()):
        seen = before[i].roll((-dy, -dx), (0, 1))                   # (H, W, C)
        # another colour by a twentieth: half of the cap of `displacement`, chosen by hand
        other = (after[i] - seen).square().mean(2) > 0.05 ** 2      # (H, W)
        # what came into view tells nothing
        known = slice(max(0, -dy), H - max(0, dy)), slice(max(0, -dx), W - max(0, dx))
        differs[i][known] = other[known]
    clip, row, column = differs.nonzero(as_tuple=True)              # (pixels,) each
    now = after[clip, row, column]                                  # (pixels, C)
    # of moves as good up to rounding, a small advantage goes to the smallest
    moves = moves_within(most)
    errors = []
    for dx, dy in moves:
        came_from = before[clip, (row - dy) % H, (column - dx) % W]     # (pixels, C)
        error = (now - came_from).square().mean(1).clamp(max=0.1 ** 2)  # (pixels,)
        total = error.new_zeros(len(before)).index_add(0, clip, error)  # (B,)
        errors.append(total + 1e-6 * (abs(dx) + abs(dy)))
    best = torch.stack(errors).argmin(0)                            # (B,)
    return torch.tensor(moves, device=before.device)[best]


def guess_keys(moves, a, codes):
    """Which codes may the arrow keys press? Guessed by how the hero goes, without labels.

    moves (n, 2): how he goes in his world, pixels right and down, under codes a (n,). Returns a
    dictionary:
        moves   the mean move under each code
        guess   the codes of no key, left, right, up, left+up, right+up, and of down
        sure    for each of these, the share of its uses in which he went that way
    """
    a = a.numpy()
    moves = moves.numpy()
    table = np.zeros((codes, len(WAYS)))
    np.add.at(table, (a, ways_of(moves)), 1)
    best = best_codes(table)                                        # (9,)
    share = table / table.sum(1, keepdims=True).clip(1)             # (codes, 9)
    found = dict(moves=[], guess=[], sure=[])
    for code in range(codes):
        uses = moves[a == code]
        mean = uses.mean(0) if len(uses) else np.zeros(2)
        found["moves"].append(mean.round(1).tolist())
    # where hardly anything goes up and sideways, in one transition of fifty, up alone has to do;
    # else what stands still
    instead = {"↖": "↑", "↗": "↑"}
    for way in "·←→↑↖↗↓":
        while way != "·" and table[:, WAYS.index(way)].sum() < 0.02 * len(a):
            way = instead.get(way, "·")
        code = int(best[WAYS.index(way)])
        found["guess"].append(code)
        found["sure"].append(round(float(share[code, WAYS.index(way)]), 2))
    return found


def score_actions(lam, args):
    """Against the true buttons, where somebody knows them: action_accuracy, strict_accuracy, chance
    (action_accuracy of the best constant button), and nmi, the normalized mutual information of
    codes and buttons.

    Each code stands for a button (see name_codes). On held-out levels it is right when that button
    would have led the true game to the very same next frame, and strictly right when it was the
    very button. Returns the scores, and a table (codes, 6) of how often each code went with each
    button; ({}, None) where nobody knows.
    """
    if true_actions(args.data, "train") is None:
        return {}, None
    # (the lab's oracle names the six buttons themselves)
    codes = max(len(lam.vq.codebook), len(ACTIONS))
    # a jump that decides is rare: names need many clips, eight times as many as the scores
    a, pressed, same, _ = labelled(lam, args, "train", 8 * args.scored)
    mapping, meaning, keys = name_codes(a, pressed, same, codes)
    a, pressed, same, levels = labelled(lam, args, "valid", args.scored)
    hit = np.take_along_axis(same, mapping[a][..., None], 2)[..., 0]        # (n, T-1)
    table = totals(a, np.eye(len(ACTIONS))[pressed], codes)         # (codes, 6)
    # the best constant button
    chance = same.mean((0, 1)).max()
    scores = dict(action_accuracy=float(hit.mean()), chance=float(chance),
                  action_accuracy_se=standard_error(hit.mean(1), levels),
                  strict_accuracy=float((mapping[a] == pressed).mean()),
                  nmi=mutual_information(table), mapping=mapping.tolist(),
                  meaning=meaning.tolist(), keys=keys.tolist())
    return scores, table


def mutual_information(table):
    """Normalized mutual information of the rows and columns of a table of counts: 1 if each tells
    the other, 0 if neither tells anything."""
    p = table / table.sum()
    rows, columns = p.sum(1), p.sum(0)

    def entropy(q):
        q = q[q > 0]
        return -(q * np.log(q)).sum()

    information = entropy(rows) + entropy(columns) - entropy(p)
    return float(2 * information / (entropy(rows) + entropy(columns)))


def picture(lam, path, x, a, view, table):
    """Write lam.png: a row for each code, which shows what it does.

    x (B, T, H, W, C), their codes a (B, T-1), how the view moves in them (B, T-1, 2). Columns: how
    it moved in frames that carry the code, with the mean; the true buttons behind it (a row of
    `table`, see score_actions), or where nobody knows them, what the code draws that the others do
    not; what the decoder makes of one frame under it; and examples.
    """
    plt = pyplot_for_files()
    K = len(lam.vq.codebook)
    examples = 4
    moved = view.float().cpu()                                      # (B, T-1, 2)
    # up to three frames of one clip, with their codes; only the last code is varied
    start = x[:1, :3].expand(K, -1, -1, -1, -1)
    every = torch.arange(K, device=a.device)[:, None]
    drawn = lam.decode(start, torch.cat([a[:1, :2].expand(K, -1), every], 1))[:, -1]

    figure, axes = plt.subplots(K, 3 + examples, figsize=(2.2 * (3 + examples), 1.3 * K),
                                width_ratios=[1, 1.5, 1] + [2] * examples, squeeze=False)
    for ax in axes.flat:
        ax.set_xticks([])
        ax.set_yticks([])
    for k, row in enumerate(axes):
        mine = moved[a.cpu() == k].numpy()                          # (how often, 2)
        row[0].set_ylabel(f"code {k + 1}\n{len(mine) / a.numel():.0%}", fontsize=9)
        draw_moves(row[0], mine)
        if table is not None:
            draw_shares(row[1], table[k] / max(1, table[k].sum()))
        else:
            # grey: as the codes draw it on average
            row[1].imshow((0.5 + drawn[k] - drawn.mean(0)).clamp(0, 1).cpu().numpy())
        row[2].imshow(drawn[k].cpu().numpy())
        where = (a == k).nonzero()                                  # (how often, 2): clip, frame
        for ax, (clip, t) in zip(row[3:], where[::max(1, len(where) // examples)].tolist()):
            gap = torch.ones_like(x[0, 0, :, :4])
            ax.imshow(torch.cat([x[clip, t], gap, x[clip, t + 1]], 1).cpu().numpy())

    known = "true buttons, %\n(held-out levels)"
    unknown = "the next column,\nless its mean"
    titles = ["how the view\nmoves (pixels)", unknown if table is None else known,
              "one frame,\nevery code", "examples: frame t and t+1"]
    for ax, title in zip(axes[0], titles):
        ax.set_title(title, fontsize=8)
    if table is not None:
        axes[-1, 1].set_xticks(range(len(ACTIONS)), ACTIONS, rotation=90, fontsize=7)
    save_figure(path, figure, "what each latent action does")
    plt.close(figure)


def draw_moves(ax, moves):
    """Moves of the view (n, 2) in pixels as dots, the commoner the larger, and their mean."""
    # in image coordinates down is positive
    ax.set(xlim=(-7, 7), ylim=(7, -7))
    if len(moves):
        places, times = np.unique(moves, axis=0, return_counts=True)
        ax.scatter(*places.T, s=150 * times / len(moves), color="silver")
        arrow = dict(arrowstyle="->", color="crimson", lw=2)
        ax.annotate("", moves.mean(0), (0, 0), arrowprops=arrow)


def draw_shares(ax, share):
    """The shares (6,) of the true buttons as shaded numbers, in percent."""
    ax.imshow(share[None], vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for i, s in enumerate(share):
        ax.text(i, 0, f"{100 * s:.0f}", ha="center", va="center", fontsize=7,
                color="white" if s > 0.5 else "black")


# ------------------------------------------------------------------------------- training


def begin(args, model_class=None, runner=Run):
    """The clips, the model, and the Run that trains it."""
    clips = Clips(args.data, "train", args.frames, args.device)
    valid = Clips(args.data, "valid", args.frames, args.device)
    held_out = valid.at(valid.spread(64))                           # (B, T, H, W, C)
    height, width, _ = clips.meta["frame"]
    check_patch(args.patch, height, width)
    if args.codes < 2:
        stop(f"--codes {args.codes}: a single code can tell nothing; it must be at least 2")
    if args.recipe == "ours" and min(two_factors(args.codes)) < 2:
        stop(f"--codes {args.codes}: a code of ours says two things, which way it went sideways "
             "and which way up or down; choose a product of two numbers, such as 4, 6, 8 or 9")
    if args.recipe == "ours" and args.latent_dim % 2:
        stop(f"--latent-dim {args.latent_dim}: a code of ours has two halves; choose an even "
             "number")
    if args.recipe == "ours" and min(height, width) < 3 * args.patch:
        stop(f"--patch {args.patch}: the error leaves out a border of one patch, and nothing "
             f"would be left of frames of {width}x{height} pixels; choose a smaller one")
    config = dict(height=height, width=width, window=args.frames)
    config |= {name: getattr(args, name) for name in MODEL}
    torch.manual_seed(args.seed)
    model = (model_class or MODELS[args.recipe])(**config).to(args.device)
    config["recipe"] = model_class.__name__ if model_class else args.recipe

    def held_out_loss():
        return model(held_out)[0]

    run = runner("lam", args, model, make_optimizer(model, args.lr), config, held_out_loss,
                 data=clips.name)
    prepare(model, args)
    return clips, model, run


def train_step(run, net, clips, x, step):
    """One step on clips x (B, T, H, W, C). Returns their latent actions (B, T-1)."""
    schedule(run.optimizer, step, run.args)
    run.model.begin_step(step, run.args)
    # read the actions, draw the next frames from them
    with autocast(run.args):
        loss, a, parts = net(x)
    # learn from the error, by a gradient of at most 1, as in tokenizer.py
    run.optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    run.optimizer.step()
    run.log(step, loss, **parts)
    return a


def main(argv=None, model_class=None, runner=Run):
    """Train the LAM. The lab passes a model_class or a runner of its own."""
    args = settle(parser(__doc__, KNOBS, PAPER).parse_args(argv), "lam")
    clips, model, run = begin(args, model_class, runner)
    net = parallel(model, args)

    for step in run.steps():
        x = clips.sample(args.batch // args.world)                  # (B, T, H, W, C)
        train_step(run, net, clips, x, step)

    run.report(evaluate)


if __name__ == "__main__":
    command(main)
