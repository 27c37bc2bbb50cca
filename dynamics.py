"""Train stage 3, the dynamics (ST-MaskGIT, section 2.1): it draws what happens next.

    python dynamics.py                       # needs tokenizer.pt and lam.pt -> dynamics.pt
    python dynamics.py --cotrain             # trains the LAM along with it -> lam.pt, dynamics.pt
    python dynamics.py --recipe paper --run runs/paper       # the dynamics as published

It sees the tokens z_1..z_{t-1} and the latent actions a_1..a_{t-1}, and fills in the masked tokens
of z_t: a masked token is hidden behind a number of its own, MASK. In training, of all frames but
the first, a random half of the tokens or more is masked. In play all tokens of the new frame are,
and they are sampled, drawn by their chances, a few at a time (MaskGIT, Chang et al. 2022). Action
a_{t-1} leads from frame t-1 to frame t. It is added to every token of frame t.
"""
import st_block     # first: so Ctrl-C ends the program in one line, even during the imports
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import lam as lam_stage
import tokenizer as tokenizer_stage
from data import Clips, psnr, standard_error
from st_block import (Neighbours, Run, STTransformer, autocast, command, fingerprint, grid,
                      load_model, make_optimizer, parallel, parser, patchify, perplexity, prepare,
                      read_checkpoint, save_picture, schedule, settle, stop, write_atomically)

# Each knob has a value for every --size. lab/NOTES.md compares some values of size laptop; the rest
# were chosen by hand. At temperature 0 the likeliest token is drawn always, at 1 each as often as
# the model expects it.
KNOBS = dict(
    #             test  laptop   gpu  coinrun
    steps=       (500,  10000,  2500, 200000, "training steps"),
    batch=       (  8,      4,    20,     36, "clips in a step"),
    frames=      (  4,     16,    16,     16, "frames in a clip, and how far back a frame looks"),
    dim=         ( 64,    128,   768,    512, "width D"),
    layers=      (  2,      2,    12,     12, "ST blocks"),
    heads=       (  2,      4,    12,      8, "attention heads"),
    maskgit=     (  2,      2,     8,      8, "MaskGIT steps of a frame, for the scores"),
    temperature= (0.0,    0.0,   0.5,    0.5, "temperature of the sampling, for the scores"),
    lr=          (3e-3,  8e-3,  1e-3,   3e-4, "peak learning rate"),
    warmup=      ( 10,    100,   200,   5000, "steps of linear warm-up"),
    scored=      (128,    256,   256,    256, "held-out clips in the scores"),
)
# --recipe paper overrides some. The paper samples in 25 steps, on CoinRun at temperature 1. At
# coinrun, its case study, all is that of its appendix F.
PAPER = dict(
    frames=      ( 16,     16,    16,     16),
    batch=       (  4,      4,    20,     36),
    maskgit=     (  8,     25,    25,     25),
    temperature= (1.0,    1.0,   1.0,    1.0),
    lr=          (1e-3,  3e-3,  3e-4,   3e-5),
)
# the knobs that the model is built from
MODEL = ("dim", "layers", "heads")
# How play.py samples the worlds of each recipe, unless its flags say otherwise. Eight steps are two
# rounds of `maskgit_apart`: the second one keeps the hero longer (lab/NOTES.md). At temperature 0 a
# rest is the same frame for ever, and keys are obeyed after it. (The scores of a training take
# fewer steps at size laptop, to be quick.)
SAMPLING = dict(
    paper=dict(steps=25, temperature=1.0, order="random"),
    ours=dict(steps=8, temperature=0.0, order="apart"),
)


# ------------------------------------------------------------------------------- the paper's model


class Dynamics(nn.Module):
    """Tokens (B, T, N), some of them masked, and latent actions (B, T-1) -> what the tokens are.

    Causal in time. `forward` returns the loss; `features` and `head` make logits (B, T, N, V): one
    number for each token of the vocabulary, and softmax makes chances of them.
    """
    ffw = 1             # width of the feed-forward layers, in D: see STBlock
    # In play, the past consists of finished frames. (False: of frames as the last pass of their
    # sampling saw them, some tokens still masked.)
    remembers_finished = True

    def __init__(self, rows, columns, vocabulary, codes, latent_dim, window, dim, layers, heads):
        super().__init__()
        self.N = rows * columns
        self.columns = columns
        self.V = vocabulary
        self.MASK = vocabulary                                      # the number of a masked token
        # a vector for each token. 0.5 was chosen by hand, between the 1 of torch and the 0.02 of
        # GPT-2. The notes have no comparison
        self.embed = nn.Embedding(vocabulary + 1, dim)
        nn.init.normal_(self.embed.weight, std=0.5)
        # the codebook of the LAM: all that is left of it
        self.register_buffer("codebook", torch.zeros(codes, latent_dim))
        self.embed_action = nn.Linear(latent_dim, dim)
        self.transformer = STTransformer(self.N, dim, layers, heads, window, self.ffw)
        self.head = nn.Linear(dim, vocabulary)
        self.prior = None                                           # see OurDynamics

    def vectors(self, a):
        """Latent actions (B, T) -> action vectors e (B, T, D): the codes' vectors at width D."""
        return self.embed_action(F.embedding(a, self.codebook))

    def actions(self, a):
        """Latent actions (B, T-1) -> action vectors e (B, T, D), each at the frame it leads TO."""
        # nothing led to frame 1: a vector of zeros
        return F.pad(self.vectors(a), (0, 0, 1, 0))

    def features(self, z, e, cache=None):
        """Tokens z (B, T, N), action vectors e (B, T, D) -> (B, T, N, D). cache: in play."""
        # actions are added to every token of their frame
        x = self.embed(z) + e.unsqueeze(2)                          # (B, T, N, D)
        return self.transformer(x, cache)

    def logits_at(self, place, x):
        """Of features x (B, 1, N, D), at places (B, 1, n) alone: logits (B, 1, n, V)."""
        return self.head(x.take_along_dim(place.unsqueeze(-1), 2))

    def mask_rate(self, z):
        """With what chance is a token of clips z (B, T, N) masked? (B, 1, 1) or (B, T, 1)."""
        B = len(z)
        # a rate for each clip, U(0.5, 1)
        rate = torch.rand(B, 1, 1, device=z.device) * 0.5 + 0.5
        return rate

    def draw_mask(self, z):
        """Which tokens of clips z (B, T, N) are masked in this step? True there, (B, T, N)."""
        rate = self.mask_rate(z)
        # a coin for each token
        masked = torch.rand(z.shape, device=z.device) < rate
        # frame 1 is never masked: in play it is given, as the prompt
        masked[:, 0] = False
        return masked

    def forward(self, z, a):
        """Clips z (B, T, N) under latent actions a (B, T-1) -> the loss."""
        # mask half of the tokens or more
        masked = self.draw_mask(z)
        # what could they be, given the others, the past, and the actions?
        x = self.features(z.masked_fill(masked, self.MASK), self.actions(a))
        return self.loss(x, z, masked)

    def loss(self, x, z, masked):
        """Cross-entropy of features x (B, T, N, D) against tokens z (B, T, N), where masked.

        It is the mean of -log p, with p the chance that the model gave to the true token.
        """
        # -100: a token that was given is not scored
        target = z.masked_fill(~masked, -100)
        logits = self.head(x).flatten(0, -2).float()                # (B*T*N, V)
        return F.cross_entropy(logits, target.flatten())


# ------------------------------------------------------------------------------- inference


def maskgit(predict, B, N, MASK, steps, temperature=1.0, order="random", device="cpu", film=None):
    """Sample the tokens (B, 1, N) of one frame in a few steps (MaskGIT, section 2.2).

    predict(z, place) gives the logits (B, 1, n, V) of frame z, part of it masked, at n places
    (B, 1, n). In each step some tokens are sampled and stay. The rest are masked in the next step,
    too. How many stay follows a cosine. Which ones: in `random` order, as the paper says, or those
    of the highest probability first (`confidence`, as in MaskGIT). film: a list, to which the frame
    is appended as it is after each step.
    """
    z = torch.full((B, 1, N), MASK, device=device)
    everywhere = torch.arange(N, device=device).expand(z.shape)
    shuffled = torch.rand(z.shape, device=device).argsort(-1)       # (B, 1, N)
    done = 0
    for s in range(steps):
        # how many tokens are there by the end of this step? One more at least
        upto = N - int(N * math.cos(0.5 * math.pi * (s + 1) / steps))
        upto = min(N, max(done + 1, upto))
        # in random order, only those whose turn has come are sampled
        place = shuffled[..., done:upto] if order == "random" else everywhere
        logits = predict(z, place).float()                          # (B, 1, n, V)
        sampled = sample(logits, temperature)                       # (B, 1, n)
        # by confidence, every place is sampled, and the surest of the masked ones stay
        if order == "confidence":
            score = logits.log_softmax(-1).gather(-1, sampled.unsqueeze(-1)).squeeze(-1)
            place = score.masked_fill(z != MASK, -math.inf).topk(upto - done, -1).indices
            sampled = sampled.gather(-1, place)
        z = z.scatter(-1, place, sampled)
        done = upto
        if film is not None:
            film.append(z)
    return z


def sample(logits, temperature):
    """Tokens (...) from logits (..., V), each as often as softmax(logits / temperature) says."""
    # below a millionth, 0 or not, there is no other choice
    if temperature < 1e-6:
        return logits.argmax(-1)
    # the first token whose cumulative probability reaches a random number: faster than
    # torch.multinomial, which draws a random number for each entry of the vocabulary
    upto = (logits / temperature).softmax(-1).cumsum(-1)            # (..., V)
    # rounding may leave the last entry below 1
    u = (1 - torch.rand_like(upto[..., :1])) * upto[..., -1:]
    return torch.searchsorted(upto, u).squeeze(-1)


@torch.no_grad()
def rollout(dynamics, z, a, **sampling):
    """Inference, as section 2.2 defines it: go on from frames z (B, T, N) under actions a.

    a (B, T-1+M): the first T-1 led to z, the others lead on. Returns (B, T+M, N). Every MaskGIT
    step computes the whole past anew. `generate` gives the same tokens from the same seed, faster.
    """
    for t in range(z.size(1) - 1, a.size(1)):
        # the actions that led to each frame, the new one included
        e = dynamics.actions(a[:, :t + 1])                          # (B, t+2, D)

        def predict(new, place):
            x = dynamics.features(torch.cat([z, new], 1), e)
            return dynamics.logits_at(place, x[:, -1:])

        new = maskgit(predict, len(z), dynamics.N, dynamics.MASK, device=z.device, **sampling)
        z = torch.cat([z, new], 1)
    return z


# ------------------------------------------------------------------------------- what we added

# Largest share of the given tokens that are replaced at random in training. 0.3 was better than 0.1
# at size laptop. The other sizes have been measured with 0.1 only.
NOISE = dict(test=0.1, laptop=0.3, gpu=0.1, coinrun=0.1)
# Training steps of the prior, of 64 clips each. At size laptop 2,500 stopped fewer keys at walls
# (lab/NOTES.md).
PRIOR_STEPS = dict(test=200, laptop=5000, gpu=2500, coinrun=2500)
# A code is rare where its chance is below this share of its usual one, see floor_of. With less,
# fewer keys are stopped at walls. With more, more of those that could be obeyed are.
RARE = 0.4


class OurDynamics(Dynamics):
    """--recipe ours. What differs, and why:

    - canvas: a frame is drawn over the last one. Each token's input is its own embedding (or that
      of MASK), plus what was in its place and around it a frame ago. Most of the next frame is
      the last one, moved by a few pixels. Without a canvas the model must first learn to fetch
      that, and only then what an action does to it.
    - noise: some of the given tokens are replaced at random, so that the model learns to live with
      its own mistakes (as GameNGen does). Without it worlds fall apart after some 50 frames.
    - unfinished past: in play a frame is remembered as its last MaskGIT pass saw it, some tokens
      still masked, as in training. The paper's finished past takes a pass more for each frame.
    - agreement: each given token's input is also seen by its neighbours (`given`). Half of the
      frames of a clip are wholly masked, the others a quarter or more. And play draws neighbours
      in different steps, see maskgit_apart. So patches that show one thing agree about it.
    - prior: a small network learns afterwards which codes can come next. See Prior.
    - ffw: see STBlock.
    """
    ffw = 4
    remembers_finished = False

    def __init__(self, rows, columns, vocabulary, codes, latent_dim, window, dim, layers, heads,
                 noise=0.0, pixels=192):
        """noise: in training. pixels: of a patch, see Prior."""
        super().__init__(rows, columns, vocabulary, codes, latent_dim, window, dim, layers, heads)
        self.noise = noise
        # 0.5: as in Dynamics. The vector of MASK says that there was no frame
        self.embed_last = nn.Embedding(vocabulary + 1, dim)
        nn.init.normal_(self.embed_last.weight, std=0.5)
        self.around = Neighbours(rows, columns, dim)
        # it learns afterwards, see learn_prior
        self.prior = Prior(rows, columns, vocabulary, codes, pixels, dim).requires_grad_(False)
        # agreement. It begins as if it were not there
        self.given = Neighbours(rows, columns, dim)
        nn.init.zeros_(self.given.conv.weight)
        nn.init.zeros_(self.given.conv.bias)

    def before(self, z):
        """The frame before each frame of z (B, T, N). Before the first there was none: MASK."""
        return F.pad(z[:, :-1], (0, 0, 1, 0), value=self.MASK)

    def paint(self, last):
        """The canvas (B, T, N, D): what was in each place and around it in frames `last`."""
        return self.around(self.embed_last(last))

    def mask_rate(self, z):
        B, T, _ = z.shape
        # agreement: a rate for each frame, 1 or U(0.25, 1). Other shares were not compared
        rate = torch.rand(B, T, 1, device=z.device)
        return torch.where(rate < 0.5, 1.0, torch.rand_like(rate) * 0.75 + 0.25)

    def with_noise(self, z):
        """Tokens z (B, T, N), of each clip another share of them replaced at random."""
        coin = torch.rand(z.shape, device=z.device)
        wrong = coin < self.noise * torch.rand(len(z), 1, 1, device=z.device)
        return torch.where(wrong, torch.randint(self.V, z.shape, device=z.device), z)

    def features(self, z, e, canvas, cache=None):
        """Tokens z (B, T, N), actions e (B, T, D), canvas (B, T, N, D) -> (B, T, N, D)."""
        x = self.given(self.embed(z)) + canvas                      # (B, T, N, D)
        x = x + e.unsqueeze(2)
        return self.transformer(x, cache)

    def forward(self, z, a):
        """Clips z (B, T, N) under latent actions a (B, T-1) -> the loss."""
        # mask some of the tokens
        masked = self.draw_mask(z)
        # noise: some of the tokens are wrong
        given = self.with_noise(z)
        # the canvas shows the frame before, noise included; nothing on it is masked
        canvas = self.paint(self.before(given))
        x = self.features(given.masked_fill(masked, self.MASK), self.actions(a), canvas)
        # what is to be found are the tokens as they were
        return self.loss(x, z, masked)


def maskgit_apart(predict, B, N, MASK, steps, columns, temperature=1.0, device="cpu", film=None):
    """`maskgit` in our order: neighbours are never drawn in the same step, and are drawn again.

    In one step one corner of every square of 2x2 places is drawn, in the next step another one, and
    so on. So of two neighbours the second is drawn when the first is known. After four steps
    nothing is masked. In further steps the corners take turns again: each is masked once more, and
    drawn anew, given all the rest. (Fewer than four steps draw several corners at once.)
    """
    z = torch.full((B, 1, N), MASK, device=device)
    place = torch.arange(N, device=device)
    corner = 2 * (place // columns % 2) + place % columns % 2       # (N,), 0 to 3
    turn = torch.randperm(4, device=device)[corner]                 # (N,)
    for s in range(steps):
        # whose turn is it?
        now = turn == s % 4 if s >= 4 else turn * min(steps, 4) // 4 == s
        place = now.nonzero()[:, 0].expand(B, 1, -1)                # (B, 1, n)
        # mask them, and draw them
        z = z.scatter(-1, place, MASK)
        z = z.scatter(-1, place, sample(predict(z, place).float(), temperature))
        if film is not None:
            film.append(z)
    return z


def draw_frame(dynamics, predict, B, order="random", **how):
    """The tokens (B, 1, N) of one frame, in any order of drawing. predict, how: see maskgit."""
    N, MASK = dynamics.N, dynamics.MASK
    if order == "apart":
        return maskgit_apart(predict, B, N, MASK, columns=dynamics.columns, **how)
    return maskgit(predict, B, N, MASK, order=order, **how)


@torch.no_grad()
def rollout_ours(dynamics, z, a, **sampling):
    """`rollout` for OurDynamics: over a canvas, and with the past as its last passes saw it."""
    seen = z
    for t in range(z.size(1) - 1, a.size(1)):
        e = dynamics.actions(a[:, :t + 1])                          # (B, t+2, D)
        # the frame before each frame, the new one included
        canvas = dynamics.paint(F.pad(z, (0, 0, 1, 0), value=dynamics.MASK))
        drafts = []

        def predict(new, place):
            drafts.append(new)
            x = dynamics.features(torch.cat([seen, new], 1), e, canvas)
            return dynamics.logits_at(place, x[:, -1:])

        new = draw_frame(dynamics, predict, len(z), device=z.device, **sampling)
        z = torch.cat([z, new], 1)
        seen = torch.cat([seen, new if dynamics.remembers_finished else drafts[-1]], 1)
    return z


# ............................................................ playing: the rollout made fast


class World:
    """A dynamics model in play: B worlds side by side, one frame at a time.

    It draws what `rollout` draws. The cache keeps the past, so that a MaskGIT step is a pass of
    one frame, and time and memory do not grow.
    """

    def __init__(self, dynamics, B=1, steps=8, temperature=1.0, order="random"):
        """steps, temperature, order: see maskgit; order "apart": see maskgit_apart."""
        self.dynamics = dynamics
        self.B = B
        self.steps = steps
        self.temperature = temperature
        self.order = order
        self.cache = dynamics.transformer.new_cache(B)
        # where the world is, set by `prompt` and `step`
        self.last = None            # the newest frame (B, 1, N)
        self.before = None          # the frame before it (B, 1, N)
        self.action = None          # the vector of the action between the two (B, 1, D)
        self.played = None          # the code of that action (B,)

    @torch.no_grad()
    def prompt(self, z, a=None):
        """Forget everything. Begin with frames z (B, T, N) and the codes a (B, T-1) between."""
        d = self.dynamics
        if a is None:
            a = torch.zeros(len(z), 0, dtype=torch.long, device=z.device)
        self.cache.clear()
        self.last = torch.full_like(frames_of(z)[0], d.MASK)        # there was no frame
        # no code led to the first frame: the number after the last code stands for that
        codes = F.pad(a, (1, 0), value=len(d.codebook))             # (B, T)
        for frame, e, code in zip(frames_of(z), frames_of(d.actions(a)), codes.unbind(1)):
            self.start_frame(e, code)
            self.run_pass(frame)
            self.end_frame(frame)

    @torch.no_grad()
    def step(self, a, film=None):
        """Play codes a (B,). Returns the tokens (B, 1, N) of the next frame. film: see maskgit."""
        d = self.dynamics
        self.start_frame(d.vectors(a[:, None]), a)

        def predict(z, place):
            return d.logits_at(place, self.run_pass(z))

        z = draw_frame(d, predict, self.B, steps=self.steps, temperature=self.temperature,
                       order=self.order, device=a.device, film=film)
        # one pass more writes the keys and values of the finished frame
        if d.remembers_finished:
            self.run_pass(z)
        self.end_frame(z)
        return z

    def start_frame(self, e, a):
        """Begin a new frame, to which codes a (B,) lead, with action vectors e (B, 1, D)."""
        self.action = e
        self.played = a

    def run_pass(self, z):
        """One pass of the new frame z (B, 1, N), masked in part or not at all: (B, 1, N, D)."""
        return self.dynamics.features(z, self.action, self.cache)

    def end_frame(self, z):
        """The new frame is z (B, 1, N). Go on to the next."""
        self.before = self.last
        self.last = z
        self.cache.advance()

    def snapshot(self):
        """What the next step will overwrite, for `restore`."""
        return self.last, self.before, self.action, self.played, self.cache.snapshot()

    def restore(self, snapshot):
        """Take back the step since `snapshot`."""
        self.last, self.before, self.action, self.played, cached = snapshot
        self.cache.restore(cached)


class OurWorld(World):
    """The same for OurDynamics, which draws a frame over the last one."""

    def start_frame(self, e, a):
        super().start_frame(e, a)
        self.canvas = self.dynamics.paint(self.last)                # (B, 1, N, D)

    def run_pass(self, z):
        return self.dynamics.features(z, self.action, self.canvas, self.cache)


def new_world(dynamics, B=1, **sampling):
    """The World that fits the model."""
    kind = OurWorld if isinstance(dynamics, OurDynamics) else World
    return kind(dynamics, B, **sampling)


def frames_of(x):
    """The frames of x (B, T, ...), one by one: T of (B, 1, ...).

    They are contiguous. Otherwise their strides would depend on T, and torch.compile would compile
    once more for each T.
    """
    return [frame.clone(memory_format=torch.contiguous_format) for frame in x.split(1, 1)]


def generate(dynamics, z, a, **sampling):
    """What `rollout` draws, by the cache: frames z (B, T, N), codes a (B, T-1+M) -> (B, T+M, N)."""
    T = z.size(1)
    world = new_world(dynamics, len(z), **sampling)
    world.prompt(z, a[:, :T - 1])
    return torch.cat([z] + [world.step(a[:, t]) for t in range(T - 1, a.size(1))], 1)


# ............................................................ the prior


class Prior(nn.Module):
    """Which latent action can come next? Logits of the next code, from the last two frames.

    A latent action tells what happened, and not everything can happen anywhere: who falls cannot
    rise. play.py asks the prior what can be. It knows a token by its appearance, not by its
    number. A few pixels of two patches tell that the hero stands at a wall, and most of the
    thousand tokens of such patches are too rare to be learned one by one.
    """

    def __init__(self, rows, columns, vocabulary, codes, pixels, action_dim, dim=32):
        """dim: its width. 64 was worse (lab/NOTES.md)."""
        super().__init__()
        # of each token, see appearance_of; the last one stands for: there was no frame
        self.register_buffer("appearance", torch.zeros(vocabulary + 1, pixels))
        self.embed_appearance = nn.Sequential(nn.Linear(pixels, 2 * dim), nn.ReLU(),
                                              nn.Linear(2 * dim, 2 * dim))
        self.embed_action = nn.Linear(action_dim, dim)
        # twice: each place with those around it
        self.around = nn.Sequential()
        for _ in range(2):
            self.around.extend([nn.LayerNorm(dim), Neighbours(rows, columns, dim), nn.ReLU()])
        self.around.append(nn.LayerNorm(dim))
        self.head = nn.Linear(rows * columns * dim, codes)
        # below what chance each code is rare, after each code that came before it: see floor_of
        self.register_buffer("floor", torch.zeros(codes + 1, codes))
        self.reset_parameters()

    def reset_parameters(self):
        """Weights that know nothing: anything may come next, about evenly."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.LayerNorm)):
                module.reset_parameters()
        nn.init.zeros_(self.head.weight)

    def forward(self, z, last, e):
        """Frames z and the frame before each, last (B, T, N); e (B, T, D), the action between.

        Returns the logits of the code that comes next, (B, T, codes).
        """
        # more tokens than the vocabulary has, as in training: embed all of it once, then look up
        if z.numel() > len(self.appearance):
            now, ago = self.embed_appearance(self.appearance).chunk(2, -1)  # (V+1, dim) each
            now, ago = F.embedding(z, now), F.embedding(last, ago)  # (B, T, N, dim) each
        # fewer, as in play: embed only what is there
        else:
            both = self.embed_appearance(self.appearance[torch.stack([z, last])])
            now = both[0].chunk(2, -1)[0]                           # (B, T, N, dim)
            ago = both[1].chunk(2, -1)[1]
        # what is there, what was there, and what was done
        h = now + ago + self.embed_action(e).unsqueeze(2)
        return self.head(self.around(h).flatten(2))


def expected(dynamics, z, a):
    """What the prior expects of each code a (B, T-1) of clips z (B, T, N): (B, T-1, codes).

    These are logits. Those of code t are told frames t-1 and t, and the action between them.
    """
    e = dynamics.actions(a)[:, :-1].detach()
    return dynamics.prior(z[:, :-1], dynamics.before(z)[:, :-1], e).float()


def surprise(dynamics, z, a):
    """The loss of the prior: the cross-entropy of codes a (B, T-1) in clips z (B, T, N)."""
    return F.cross_entropy(expected(dynamics, z, a).flatten(0, 1), a.flatten())


@torch.no_grad()
def appearance_of(tokenizer):
    """What each token looks like: (V, P*P*C), standardized.

    It is the mean patch of a frame that consists of this token alone.
    """
    V = len(tokenizer.vq.codebook)
    z = torch.arange(V, device=tokenizer.vq.codebook.device)
    z = z[:, None, None].expand(-1, 1, tokenizer.tokens)            # (V, 1, N)
    patches = []
    for part in z.split(64):
        patches.append(patchify(tokenizer.decode(part), tokenizer.patch).mean((1, 2)))
    x = torch.cat(patches)
    return (x - x.mean(0)) / x.std()


def learn_prior(dynamics, tokens, actions, clips, args):
    """Train the prior of a finished model, from the start, on all but the last tenth of the data.

    Many clips a step: most moments tell it nothing new, and walls are rare. A learning rate of 1e-2
    was worse than 3e-3 (lab/NOTES.md). The weight decay, which pulls all weights to 0, was chosen
    by hand; no other was compared.
    """
    torch.manual_seed(args.seed)
    steps = PRIOR_STEPS[args.size]
    prior = dynamics.prior.requires_grad_(True)
    prior.reset_parameters()
    optimizer = torch.optim.AdamW(prior.parameters(), lr=3e-3, weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    cut = max(1, len(clips.starts) * 9 // 10)
    taught, kept = clips.starts[:cut], clips.starts[cut:]
    bar = tqdm(range(steps), desc="prior", mininterval=1, dynamic_ncols=True)
    for step in bar:
        torch.manual_seed(args.seed * 1_000_003 + step)
        starts = taught[torch.randint(len(taught), (64,)).numpy()]
        z, a = clips_of(tokens, actions, starts, args.frames)
        with autocast(args):
            loss = surprise(dynamics, z, a)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step % 100 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    prior.requires_grad_(False)
    prior.floor.copy_(floor_of(dynamics, tokens, actions, kept, args.frames))


@torch.no_grad()
def floor_of(dynamics, tokens, actions, starts, frames):
    """Below what chance is a code rare, after each code before it? Returns (codes + 1, codes).

    Where a code can come, its chance is what the player of the videos made of it; where it cannot,
    its chance is 0. The prior is seldom sure which of the two a place is, and says something in
    between. So the chance here, divided by the usual chance where the code can come, is about how
    sure it is that the code can come here. Entry (last, code) is the share RARE of the usual one.

    The usual chance is the median, over the moments when `code` came after `last`, of the chance
    that the prior gave to it. A moment counts 1 / chance: so places where the code can come count
    alike, whether the player liked to press it there or hardly ever did.

    A pair seen less than 100 times uses all moments of that code. (Of 100 moments, 50 +- 5 lie
    below the true median.) The last row is for frames that no code led to. A code that never came
    is always rare. The clips must be some that the prior did not learn from: what it has seen, it
    expects too surely.
    """
    table = torch.ones_like(dynamics.prior.floor)
    before, came, chance = [], [], []
    # nearly every moment once
    starts = starts[::frames - 1]
    for i in range(0, len(starts), 64):
        z, a = clips_of(tokens, actions, starts[i:i + 64], frames)  # (64, T, N), (64, T-1)
        before.append(F.pad(a[:, :-1], (1, 0), value=len(table) - 1).flatten())
        came.append(a.flatten())
        likely = expected(dynamics, z, a).softmax(-1)               # (64, T-1, codes)
        chance.append(likely.gather(-1, a[..., None]).flatten())
    before, came, chance = torch.cat(before), torch.cat(came), torch.cat(chance)
    for last, code in np.ndindex(*table.shape):
        pair = (came == code) & (before == last)
        mine = chance[pair if pair.sum() >= 100 else came == code].sort().values
        if len(mine):
            # a chance below 0.002 is the error of the prior, more than the rarity of the moment: a
            # seldom jump has 0.03. Without a bound a single moment could outweigh all others.
            # (Chosen by hand; nearby values were not tried)
            weight = 1 / mine.clamp(min=0.002)
            reached = weight.cumsum(0) / weight.sum()
            usual = mine[(reached >= 0.5).nonzero()[0, 0]]
            table[last, code] = RARE * usual
    return table


MODELS = dict(paper=Dynamics, ours=OurDynamics)


def build(recipe, **config):
    """The model of a checkpoint. An unknown recipe, such as a lab model's name, is a KeyError."""
    return MODELS[recipe](**config)


# ------------------------------------------------------------------------------- what it learned


def sampling_of(args):
    order = SAMPLING[args.recipe]["order"]
    return dict(steps=args.maskgit, temperature=args.temperature, order=order)


@torch.no_grad()
def delta_psnr(dynamics, tokenizer, lam, clips, frames, sampling, batch=32):
    """PSNR with inferred actions, with random ones, and of the first frame kept, frame by frame.

    One real frame is the prompt. x^ follows the actions inferred from the clip, x^' uniformly
    random ones. Returns three tensors (clips, frames), stacked. delta_t PSNR (section 3, Metrics)
    is the first minus the second at t = 4.
    """
    generator = torch.Generator().manual_seed(0)
    codes = len(dynamics.codebook)
    result = []
    parts = clips[:, :frames + 1].split(batch)
    for x in tqdm(parts, desc=f"{frames} frames ahead", dynamic_ncols=True):
        a = lam.encode(x)                                           # (B, frames)
        b = torch.randint(codes, a.shape, generator=generator).to(a.device)
        prompt = tokenizer.encode(x[:, :1])                         # (B, 1, N)
        inferred = tokenizer.decode(generate(dynamics, prompt, a, **sampling))
        random = tokenizer.decode(generate(dynamics, prompt, b, **sampling))
        kept = x[:, :1].expand_as(x)
        result.append(torch.stack([psnr(y[:, 1:], x[:, 1:]) for y in (inferred, random, kept)]))
    return torch.cat(result, 1)


@torch.no_grad()
def evaluate(dynamics, args, tokenizer, lam):
    """Held-out levels: delta_psnr at t = 4 with its standard error. Writes dynamics.png."""
    dynamics.eval()
    torch.manual_seed(0)
    # the prompt and four frames
    valid = Clips(args.data, "valid", 5, args.device)
    starts = valid.spread(args.scored)
    x = valid.at(starts)                                            # (B, 5, H, W, C)
    curves = delta_psnr(dynamics, tokenizer, lam, x, 4, sampling_of(args))
    inferred, random, kept = curves[:, :, 3]                        # (B,) each, at t = 4
    delta = inferred - random
    scores = dict(delta_psnr=delta.mean().item(),
                  delta_psnr_se=standard_error(delta.cpu(), valid.levels(starts)),
                  psnr_t4=inferred.mean().item(),
                  psnr_t4_random=random.mean().item(),
                  copy_psnr_t4=kept.mean().item(),
                  clips=len(x), maskgit=args.maskgit, temperature=args.temperature)
    # how well the prior knows what comes next, beside the entropy of the codes: what a guess by
    # how common they are would score
    a = lam_stage.actions_of(lam, x)                                # (B, 4)
    if dynamics.prior is not None:
        z = tokenizer_stage.tokens_of(tokenizer, x)
        scores["code_surprise"] = surprise(dynamics, z, a).item()
    scores["code_entropy"] = perplexity(a, len(dynamics.codebook)).log().item()
    picture(dynamics, tokenizer, lam, args)
    return scores | dict(verdict=verdict(scores))


def verdict(scores):
    """What the scores mean for whoever wants to play: one sentence."""
    # chosen by hand: the standard error is about 0.3 dB
    if scores["delta_psnr"] < 0.5:
        return "the buttons do nothing yet: more --steps, if the codes of lam.py say what happens"
    if scores["psnr_t4"] < scores["copy_psnr_t4"]:
        return "worse than copying the last frame: the buttons do little yet; more --steps"
    return "the buttons work: play it with play.py"


def picture(dynamics, tokenizer, lam, args):
    """Write dynamics.png: three held-out clips, each above the model's version of it, then one
    frame under every code."""
    data = Clips(args.data, "valid", 9, args.device)
    x = data.at(data.spread(5)[1:4])                                # (3, 9, H, W, C)
    sampling = sampling_of(args)
    prompt = tokenizer.encode(x[:, :1])                             # (3, 1, N)
    y = tokenizer.decode(generate(dynamics, prompt, lam.encode(x), **sampling))
    rows = []
    for real, drawn in zip(x, y):
        rows += [real, drawn]
    # a frame of the second clip, each code held for eight frames
    K = len(dynamics.codebook)
    prompt = tokenizer.encode(x[1:2, :1]).expand(K, -1, -1)         # (K, 1, N)
    held = torch.arange(K, device=x.device)[:, None].expand(-1, 8)  # (K, 8)
    rows += list(tokenizer.decode(generate(dynamics, prompt, held, **sampling)))
    save_picture(args.run / "dynamics.png", rows,
                 "three held-out clips, each above the model's version from its first frame and "
                 "inferred actions; then one frame under every code, held for 8 frames")


# ------------------------------------------------------------------------------- training


def load_upstream(args, clips, stage):
    """The frozen model of an earlier stage, from the run folder. It must be of the same data."""
    name = stage.__name__
    path = args.run / f"{name}.pt"
    model, ckpt = load_model(path, stage.build, name, args.device)
    if ckpt["origin"]["data"] != clips.name:
        stop(f"{path} was trained on {ckpt['origin']['data']}, but {args.data} is {clips.name}; "
             "use its --run folder, or train it on this data")
    # finished later, it would be another model than the one that the dynamics was trained on
    if ckpt["step"] < ckpt["knobs"]["steps"]:
        stop(f"{path} is at step {ckpt['step']} of {ckpt['knobs']['steps']}; finish it first: the "
             f"same {name}.py command with --resume (and --steps {ckpt['step']}, if that is "
             "enough)")
    return model


def begin_lam(args):
    """For --cotrain: a LAM and its Run, trained on the clips of the dynamics, for as many steps."""
    flags = []
    for name in ("data", "run", "recipe", "size", "seed", "device", "compile", "recompute",
                 "steps", "batch", "frames"):
        flags.append(f"--{name}={getattr(args, name)}")
    for name in ("resume", "overwrite"):
        if getattr(args, name):
            flags.append(f"--{name}")
    lam_parser = parser(lam_stage.__doc__, lam_stage.KNOBS, lam_stage.PAPER)
    _, lam, run = lam_stage.begin(settle(lam_parser.parse_args(flags), "lam"))
    return lam, run


@torch.no_grad()
def encode(data, tokenizer, lam, args):
    """All of the data as tokens (F, N) and latent actions (F,), for frozen models.

    Action f leads from frame f to f+1; -1 at the end of an episode. lam=None: no actions. Both
    are kept in tokens.pt of the run folder, for --resume and for the next experiment.
    Doing it once gives nearly what doing it in every step would. (In a clip the first frame has
    no past, which changes 1 token in 1,000.)
    """
    path = args.run / "tokens.pt"
    kept = read_tokens(path, data.device)
    about = data.path.stat()
    made_from = [data.name, about.st_size, about.st_mtime_ns, data.T]
    tokens_from = [*made_from, fingerprint(tokenizer)]
    actions_from = [*made_from, fingerprint(lam)] if lam else []
    z, a = kept.get("tokens"), kept.get("actions")
    # they may have been made of something else, or somebody changed them. (Actions that nobody asks
    # for are kept as they are, if they fit a short integer)
    shape = len(data.frames), tokenizer.tokens
    new_tokens = (kept.get("tokens_of") != tokens_from
                  or not fits(z, shape, len(tokenizer.vq.codebook)))
    new_actions = lam is not None and (kept.get("actions_of") != actions_from
                                       or not fits(a, shape[:1], len(lam.vq.codebook)))
    if new_tokens:
        z = torch.zeros(len(data.frames), tokenizer.tokens, dtype=torch.int, device=data.device)
    if new_actions or not fits(a, shape[:1], 1 << 14):
        a = torch.full(z.shape[:1], -1, dtype=torch.short, device=data.device)
    if not new_tokens and not new_actions:
        return z, a
    # batches of four clips, to save memory, padded by repeating the last clip: one shape, which is
    # compiled once
    clips = data.cover()[::-1]
    clips = np.pad(clips, (0, -len(clips) % 4), mode="edge").reshape(-1, 4)
    bar = tqdm(clips, desc="frames to tokens", disable=args.rank > 0, dynamic_ncols=True)
    for starts in bar:
        x = data.at(starts)                                         # (4, T, H, W, C)
        # Clips run from the last to the first. So of two clips that share a frame the earlier one
        # writes last, in which the frame has more past. The encoder runs in fp32, as in play: in
        # bf16 5 % of the tokens would be others
        if new_tokens:
            for start, tokens in zip(starts, tokenizer.encode(x).int()):
                z[start:start + data.T] = tokens
        # in bf16 1 action in 300 is another, and play infers none
        if new_actions:
            with autocast(args):
                actions = lam.encode(x).short()
            for start, codes in zip(starts, actions):
                a[start:start + data.T - 1] = codes
    if args.rank == 0:
        kept = dict(tokens=z, tokens_of=tokens_from, actions=a, actions_of=actions_from)
        write_atomically(path, lambda f: torch.save(kept, f))
    return z, a


def read_tokens(path, device):
    """What `encode` kept, or nothing."""
    if not path.exists():
        return {}
    try:
        return dict(torch.load(path, map_location=device, weights_only=True))
    # torch.load raises half a dozen types
    except Exception as e:
        stop(f"{path} is damaged ({type(e).__name__}); delete it, and it will be made anew")


def fits(x, shape, most):
    """Is x a tensor of this shape, of whole numbers from -1 to most - 1?"""
    whole = isinstance(x, torch.Tensor) and not x.is_floating_point() and x.shape == shape
    return whole and bool((x >= -1).all() and (x < most).all())


def clips_of(tokens, actions, starts, frames):
    """The clips that begin at starts (B,): tokens (B, T, N), the actions between (B, T-1)."""
    index = torch.from_numpy(starts[:, None] + np.arange(frames))
    index = index.to(tokens.device, non_blocking=True)
    return tokens[index].long(), actions[index[:, :-1]].long()


def new_model(args, tokenizer, lam, model_class=None):
    """A dynamics model for the tokens of a tokenizer and the codes of a LAM; its configuration."""
    rows, columns = grid(tokenizer.height, tokenizer.width, tokenizer.patch)
    config = dict(rows=rows, columns=columns,
                  vocabulary=len(tokenizer.vq.codebook), codes=len(lam.vq.codebook),
                  latent_dim=lam.vq.codebook.size(1), window=args.frames)
    config |= {name: getattr(args, name) for name in MODEL}
    if args.recipe == "ours":
        config |= dict(noise=NOISE[args.size], pixels=3 * tokenizer.patch ** 2)
    torch.manual_seed(args.seed)
    model = (model_class or MODELS[args.recipe])(**config).to(args.device)
    config["recipe"] = model_class.__name__ if model_class else args.recipe
    model.codebook.copy_(lam.vq.codebook.detach())
    if model.prior is not None:
        model.prior.appearance[:-1] = appearance_of(tokenizer)
    return model, config


def main(argv=None, model_class=None, runner=Run):
    """Train the dynamics. The lab passes a model_class or a runner of its own."""
    p = parser(__doc__, KNOBS, PAPER)
    p.add_argument("--cotrain", action="store_true",
                   help="train a LAM along with it (section 2.1), instead of loading lam.pt")
    args = settle(p.parse_args(argv), "dynamics")
    if args.resume:
        begun = read_checkpoint(args.run / "dynamics.pt", "dynamics")
        args.cotrain = bool(begun["origin"].get("cotrain"))

    # the models that come before
    clips = Clips(args.data, "train", args.frames, args.device)
    tokenizer = load_upstream(args, clips, tokenizer_stage)
    lam_run = None
    if args.cotrain:
        lam, lam_run = begin_lam(args)
        lam_net = parallel(lam, args)
    else:
        lam = load_upstream(args, clips, lam_stage)
    prepare(tokenizer, args)
    if not args.cotrain:
        prepare(lam, args)

    # the model
    model, config = new_model(args, tokenizer, lam, model_class)
    optimizer = make_optimizer(model, args.lr)

    # held-out clips
    valid = Clips(args.data, "valid", args.frames, args.device)
    x_valid = valid.at(valid.spread(16))                            # (B, T, H, W, C)
    z_valid = tokenizer_stage.tokens_of(tokenizer, x_valid)         # (B, T, N)

    def held_out_loss():
        return model(z_valid, lam_stage.actions_of(lam, x_valid))

    run = runner("dynamics", args, model, optimizer, config, held_out_loss, data=clips.name,
                 tokenizer=fingerprint(tokenizer), lam=fingerprint(lam),
                 cotrain=args.cotrain or None)
    run.beside = lam_run
    prepare(model, args)
    # logits are by far the largest thing in the model; uncompiled they pass through memory often
    if args.compile == "on":
        model.loss = torch.compile(model.loss, fullgraph=True, dynamic=False)
    net = parallel(model, args)

    # all frames as tokens and latent actions, once: frozen models need it only once
    tokens, actions = encode(clips, tokenizer, None if args.cotrain else lam, args)

    for step in run.steps():
        schedule(optimizer, step, args)
        # a batch of random clips
        starts = clips.draw(args.batch // args.world)
        z, a = clips_of(tokens, actions, starts, args.frames)       # (B, T, N), (B, T-1)
        # joint training: the LAM learns on the same clips. Its codes are integers, so no gradient
        # of the dynamics reaches it: that is the stop-gradient of section 2.1
        if args.cotrain:
            a = lam_stage.train_step(lam_run, lam_net, clips, clips.at(starts), step)
            model.codebook.copy_(lam.vq.codebook.detach())
        # fill in the masked tokens
        with autocast(args):
            loss = net(z, a)
        # learn from the error, by a gradient of at most 1, as in tokenizer.py
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        run.log(step, loss)

    # a LAM that was trained along is scored like any other, and its codes are those of the data
    if args.cotrain:
        lam_run.report(lam_stage.evaluate)
        lam.eval()
        if args.rank == 0:
            tokens, actions = encode(clips, tokenizer, lam, args)
    if model.prior is not None and args.rank == 0:
        learn_prior(model, tokens, actions, clips, args)
        run.save(args.steps)

    def scores(model, args):
        return evaluate(model, args, tokenizer, lam)

    run.report(scores)


if __name__ == "__main__":
    command(main)
