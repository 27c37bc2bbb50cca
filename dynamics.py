"""Stage 3: the dynamics model (ST-MaskGIT, section 2.1). Given the past and a button, what does the next frame look like?

    python dynamics.py                       # needs tokenizer.pt and lam.pt in the run folder -> dynamics.pt
    python dynamics.py --cotrain             # trains the LAM along with it, as the paper does -> lam.pt, dynamics.pt

It sees the tokens z_1..z_{t-1} and the latent actions a_1..a_{t-1}, and fills in the masked tokens of z_t: in training some
of them are given, when playing none at first, then more and more (MaskGIT, Chang et al. 2022).
Action a_{t-1} leads from frame t-1 to frame t and is added to every token of frame t, where it is needed.

Where it departs from the paper (each measured in the README's lab notes):
- a frame is drawn over the last one: each token's input is its own embedding (or the mask's) plus what was in its place and
  around it a frame ago (`--canvas last`). Most of the next frame is the last one, moved by a few pixels; from a blank
  canvas, the paper's, the model has to learn first how to fetch it, and only then what a button does to it. The canvas is
  never masked. So the paper's masking, which hides half of the past or more, hides nothing that is needed, and every frame
  of a clip is a lesson: other ways of masking (`--masking`), with a clean past, learn less in the same minutes;
- some of the tokens that are given are replaced at random, on the canvas too, so that the model learns to live with its own mistakes
  (GameNGen's remedy, in tokens);
- a small network beside it learns, afterwards, which codes can come next (`Prior`). A latent action tells what happened, and not
  everything can happen anywhere: who falls cannot rise, who stands at a wall cannot go on. Play asks it (`World.possible`);
- in play the past is as in training: a frame is remembered as its last MaskGIT pass saw it, some tokens still masked. The
  paper conditions on finished frames; here that takes a pass more, and is done only where training had them (`World`).
"""
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import lam as lam_stage
import tokenizer as tokenizer_stage
from data import Clips, psnr
from st_block import (Neighbours, Run, STTransformer, autocast, command, fingerprint, load_model, make_optimizer, parallel,
                      parser, patchify, perplexity, prepare_blocks, pyplot_for_files, read_checkpoint, save_figure, save_picture, schedule,
                      settle, stop, unpatchify, write_atomically, write_gif)

FLAWS = ("none",
         "late",            # in training, every action is attached to the frame after the one that it leads to
         "acausal")         # in training, a frame may look at all frames, later ones and its own clean copy too

KNOBS = dict(
    #            test  laptop   gpu  coinrun
    steps=      (500,  10000,  2500, 200000, "training steps"),
    batch=      (  8,      4,    20,     36, "clips in a step"),
    frames=     (  4,     16,    16,     16, "frames in a clip, and how far back a frame may look"),
    dim=        ( 64,    128,   768,    512, "width D"),
    layers=     (  2,      2,    12,     12, "ST blocks"),
    heads=      (  2,      4,    12,      8, "attention heads"),
    action=     ("add", "add", "add", "add", "how an action enters: added to every token, or 'prepend' as one more token"),
    canvas=     ("last", "last", "last", "blank", "what a frame is drawn over: the last one, or blank (which takes a pass a frame more in play)"),
    masking=    ("paper", "paper", "paper", "paper", "how clips are masked in training: paper, frames, or streams (which takes that pass, too)"),
    noise=      (0.1,    0.3,   0.1,    0.0, "largest share of given tokens replaced at random in training"),
    lr=         (3e-3,  8e-3,  1e-3,   3e-5, "peak learning rate"),
    warmup=     ( 10,    100,   200,   5000, "steps of linear warm-up"),
    maskgit=    (  2,      2,     8,     25, "MaskGIT steps per frame when sampling (for the scores)"),
    temperature=(0.0,    0.0,   0.5,    1.0, "temperature of the sampled tokens (for the scores)"),
    order=      ("random", "random", "random", "random", "which sampled tokens stay: random, or confidence"),
    prior_steps=(200,   2500,  2500,   2500, "steps of the prior, after all else, with 64 clips each: which code can come next?"),
    flaw=       ("none", "none", "none", "none", "break it, to see what happens (README, the collapse laboratory): " + ", ".join(FLAWS[1:])),
    scored=     (128,    256,   256,    256, "held-out clips in the scores"),
)
MODEL = ("dim", "layers", "heads", "action", "canvas", "masking")


class Prior(nn.Module):
    """Which latent action can come next? The paper has no such thing; it would ask no more of a player than of a video.

    It looks at the last two frames, and knows tokens by their looks, not by their names: whether the hero stands at a wall is
    told by a few pixels of two patches, and most of the thousand names that such a patch can have are too rare to be learned one by one.
    """

    def __init__(self, rows, columns, codes, pixels, buttons, action_dim, dim=32):
        super().__init__()
        self.register_buffer("looks", torch.zeros(codes + 1, pixels))    # see looks_of; the last one: no frame before this
        self.see = nn.Sequential(nn.Linear(pixels, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, 2 * dim))
        self.embed_action = nn.Linear(action_dim, dim)
        self.around = Neighbours(rows, columns, dim)
        self.head = nn.Linear(rows * columns * dim, buttons)
        self.register_buffer("came", torch.zeros(buttons + 1, buttons, 101))     # after one code, another: its chance when it came, see `chances`
        self.reset_parameters()

    def reset_parameters(self):
        """Weights that know nothing: anything may come next, about evenly."""
        for layer in (*self.see, self.embed_action, self.around.conv, self.head):
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
        nn.init.zeros_(self.head.weight)
        return self

    def forward(self, z, last, e):
        """Frames z and the frame before each, last (B, T, N); e (B, T, D), the action between the two: logits of the next one (B, T, buttons)."""
        if z.numel() > len(self.looks):                                  # in training: see each code once, and look it up
            now, ago = self.see(self.looks).chunk(2, -1)                 # 2 x (codes + 1, dim)
            now, ago = F.embedding(z, now), F.embedding(last, ago)       # 2 x (B, T, N, dim)
        else:                                                            # in play: see only what is there
            seen = self.see(self.looks[torch.stack([z, last])])          # (2, B, T, N, 2 dim)
            now, ago = seen[0].chunk(2, -1)[0], seen[1].chunk(2, -1)[1]
        h = now + ago + self.embed_action(e).unsqueeze(2)                # (B, T, N, dim)
        return self.head(F.relu(self.around(h)).flatten(2))


class Dynamics(nn.Module):
    """Tokens (B, T, N) with holes, actions (B, T-1) -> logits (B, T, N, K). Causal in time."""

    def __init__(self, rows, columns, codes, pixels, buttons, code_dim, window, dim, layers, heads, action, canvas, masking):
        super().__init__()
        self.N, self.action, self.canvas, self.masking = rows * columns, action, canvas, masking
        self.wants_whole_past = canvas == "blank" or masking == "streams"                    # play shows it finished frames: see World
        self.K = self.MASK = codes
        self.embed = nn.Embedding(codes + 1, dim)                        # the last one is the mask token
        if canvas == "last":
            self.embed_last = nn.Embedding(codes + 1, dim)               # here the last one stands for: no frame before this
            self.around = Neighbours(rows, columns, dim)
            nn.init.normal_(self.embed_last.weight, std=0.5)
        self.register_buffer("buttons", torch.zeros(buttons, code_dim))  # the LAM's codebook: all that is left of the LAM
        self.embed_action = nn.Linear(code_dim, dim)
        self.transformer = STTransformer(self.N + (action == "prepend"), dim, layers, heads, window)
        self.head = nn.Linear(dim, codes)
        self.prior = Prior(rows, columns, codes, pixels, buttons, dim).requires_grad_(False)     # it learns afterwards: learn_prior
        nn.init.normal_(self.embed.weight, std=0.5)

    def vectors(self, a):
        """Action indices (B, T) -> vectors (B, T, D)."""
        return self.embed_action(F.embedding(a, self.buttons))

    def actions(self, a):
        """Action indices (B, T-1) -> vectors (B, T, D), each at the frame it leads TO; nothing led to frame 1."""
        return F.pad(self.vectors(a), (0, 0, 1, 0))

    def before(self, z):
        """The frame before each frame of z (B, T, N); before the first there was none."""
        return F.pad(z[:, :-1], (0, 0, 1, 0), value=self.MASK)

    def paint(self, last):
        """The canvas (B, T, N, D): what was in each place a frame ago, and around it. From the tokens (B, T, N) of `before`."""
        if self.canvas == "blank":
            return torch.zeros(*last.shape, 1, device=last.device)
        return self.around(self.embed_last(last))

    def features(self, z, e, canvas=None, time=None, mask=None, cache=None):
        """Frames z (B, T, N), actions e (B, T, D) from `actions`, the canvas from `paint` (default: over the frames of z)
        -> (B, T, N, D). time, mask, cache: see STTransformer."""
        x = self.embed(z) + (self.paint(self.before(z)) if canvas is None else canvas)       # (B, T, N, D)
        if self.action == "add":
            return self.transformer(x + e.unsqueeze(2), time, mask, cache)
        return self.transformer(torch.cat([e.unsqueeze(2), x], 2), time, mask, cache)[:, :, 1:]

    def logits_at(self, place, x):
        """Of features x (B, 1, N, D), at places (B, 1, n) alone: logits (B, 1, n, K)."""
        return self.head(x.take_along_dim(place.unsqueeze(-1), 2))

    def draw_holes(self, z):
        """Which tokens of clips z (B, T, N) are masked in this step: True there, (B, T, N). `paper`: half or more of every frame (section
        2.1). `frames`: a clean past of random length, and after it frames masked by MaskGIT's cosine. `streams`: all by that cosine."""
        (B, T, N), device = z.shape, z.device
        if self.masking == "paper":                                      # one rate for a clip, U(0.5, 1)
            rate = torch.rand(B, 1, 1, device=device) * 0.5 + 0.5
        else:                                                            # one for each frame: often near 1
            rate = torch.cos(0.5 * math.pi * torch.rand(B, T, 1, device=device))
        if self.masking == "frames":
            clean = torch.rand(B, 1, 1, device=device) * (T - 1)
            rate = rate * (torch.arange(T, device=device)[:, None] >= clean)
        hidden = torch.rand(B, T, N, device=device) < rate
        hidden[:, 0] = False                                             # frame 1 is never masked: it is the prompt
        if self.masking != "paper":
            hidden[:, -1, 0] = True                                      # with few clips there might be nothing to score
        return hidden

    def forward(self, z, a, noise, flaw="none"):
        """Clips z (B, T, N) under actions a (B, T-1) -> loss, the cross-entropy of the masked tokens (section 2.1). noise: the largest share
        of given tokens that are replaced at random.

        Masking `streams` has a clean past for every frame, for nearly twice the tokens: a clean copy of the clip, and a masked copy
        whose frame t looks at frames 1..t-1 of the clean one.
        """
        B, T, N = z.shape
        e = self.actions(F.pad(a[:, :-1], (1, 0)) if flaw == "late" else a)
        hidden = self.draw_holes(z)
        wrong = torch.rand(B, T, N, device=z.device) < noise * torch.rand(B, 1, 1, device=z.device)
        given = torch.where(wrong, torch.randint(self.K, z.shape, device=z.device), z)
        last = self.before(given)
        if self.masking == "streams":
            time, mask = two_streams(T, self.transformer.window, z.device)
            if flaw == "acausal":
                mask = torch.ones_like(mask)
            both = torch.cat([given, z.masked_fill(hidden, self.MASK)[:, 1:]], 1)            # (B, 2T-1, N)
            twice = lambda x: torch.cat([x, x[:, 1:]], 1)
            x = self.features(both, twice(e), twice(self.paint(last)), time, mask)
            x, hidden, target = x[:, T:], hidden[:, 1:], z[:, 1:]
        else:
            mask = torch.ones(T, T, dtype=torch.bool, device=z.device) if flaw == "acausal" else None
            x = self.features(given.masked_fill(hidden, self.MASK), e, self.paint(last), None, mask)
            target = z
        return self.loss(x, target.masked_fill(~hidden, -100))           # the tokens as they were; -100: given, not scored

    def foresee(self, z, a):
        """What the prior expects of each action a (B, T-1) in clips z (B, T, N), given what was before: logits (B, T-1, buttons)."""
        return self.prior(z[:, :-1], self.before(z)[:, :-1], self.actions(a)[:, :-1].detach()).float()

    def surprise(self, z, a):
        """The prior's loss: the cross-entropy of what it expects. Nothing but the prior learns of it."""
        return F.cross_entropy(self.foresee(z, a).flatten(0, 1), a.flatten())

    def loss(self, x, target):
        """Cross-entropy of features x (B, T, N, D) against tokens (B, T, N). Apart, so that it can be compiled: its logits are by
        far the largest thing in the model, and uncompiled they go through memory half a dozen times."""
        return F.cross_entropy(self.head(x).flatten(0, -2).float(), target.flatten())        # logits (B*T*N, K)


def two_streams(T, window, device):
    """Times and mask for a clean clip (T frames) followed by its masked copy (frames 2..T).

    Clean frames look at clean frames up to themselves; a masked frame at the clean frames before it, and at itself.
    """
    time = torch.cat([torch.arange(T), torch.arange(1, T)]).to(device)                       # (2T-1,)
    masked = torch.arange(2 * T - 1, device=device) >= T
    back = time[:, None] - time                                                              # frames from query to key
    clean_key = ~masked & (back >= masked[:, None].long()) & (back < window)
    return time, clean_key | torch.eye(2 * T - 1, dtype=torch.bool, device=device)


# ------------------------------------------------------------------------------------------------ playing

def maskgit(predict, B, N, MASK, steps, temperature=1.0, order="random", device="cpu", film=None):
    """Draw the tokens (B, 1, N) of one frame. predict(z, place): the logits (B, 1, n, K) of a frame z with holes at n places (B, 1, n).

    At each step every hole gets a sampled token, some of these are committed for good, the rest become holes again. How many
    stay open follows MaskGIT's cosine. Which are committed: those of the highest probability (`confidence`), or whichever (`random`);
    then their order is settled beforehand, and a token is drawn only when its turn has come: for the others it would be in vain.
    """
    z = torch.full((B, 1, N), MASK, device=device)
    everywhere, shuffled = torch.arange(N, device=device).expand(z.shape), torch.rand(z.shape, device=device).argsort(-1)
    done = 0
    for s in range(steps):
        keep = N - int(N * math.cos(0.5 * math.pi * (s + 1) / steps))    # so many are committed after this step:
        keep = min(N, max(done + 1, keep))                               # one more at least (25 steps of 64 tokens begin 1, 1, 2)
        place = shuffled[..., done:keep] if order == "random" else everywhere
        logits = predict(z, place).float()                               # (B, 1, n, K)
        if temperature > 0:
            upto = (logits / temperature).softmax(-1).cumsum(-1)         # P(token <= k), up to 1, give or take rounding
            u = (1 - torch.rand_like(upto[..., :1])) * upto[..., -1:]            # one random number a token is enough
            drawn = torch.searchsorted(upto, u).squeeze(-1)
        else:
            drawn = logits.argmax(-1)                                    # (B, 1, n)
        if order == "confidence":
            score = logits.log_softmax(-1).gather(-1, drawn.unsqueeze(-1)).squeeze(-1)
            place = score.masked_fill(z != MASK, -math.inf).topk(keep - done, -1).indices
            drawn = drawn.gather(-1, place)
        z, done = z.scatter(-1, place, drawn), keep
        if film is not None:
            film.append(z)
    return z


def frames_of(x):
    """The frames of x (B, T, ...), one by one: T of (B, 1, ...). Contiguous, so that their strides do not depend on T: torch.compile
    would compile once more for each."""
    return [frame.clone(memory_format=torch.contiguous_format) for frame in x.split(1, 1)]


class World:
    """A dynamics model being played: B worlds side by side, one frame at a time, in constant time and memory.

    One pass a MaskGIT step: the cache keeps the frame as the last of them saw it, with holes (after a single step, nothing else).
    Nothing is lost: the next frame is drawn over this one, and in training half of the past or more was masked, too; held-out
    frames are predicted no worse than after a past without holes (README, lab notes). Two kinds of model need one more pass, over
    the finished frame: over a blank canvas a frame is known by its own tokens alone, and two streams were trained on a whole past.
    """

    def __init__(self, dynamics, B=1, steps=8, temperature=1.0, order="random", least=0.0):
        """least: see `possible`. The rest: see `maskgit`."""
        self.dynamics, self.B, self.steps, self.temperature, self.order = dynamics, B, steps, temperature, order
        self.cache = dynamics.transformer.new_cache(B)
        e = F.normalize(dynamics.buttons, dim=-1, eps=1.0)               # "nothing" is next to 0: it points nowhere
        self.alike = 2 * e @ e.T                                         # (buttons, buttons): 2 cos(a, b), see `possible`
        self.floor = dynamics.prior.came[..., round(1000 * least)]       # (buttons + 1, buttons)

    def see(self, z, e, canvas):
        """One pass of a frame z (B, 1, N), with holes or without: its features (B, 1, N, D)."""
        return self.dynamics.features(z, e, canvas, cache=self.cache)

    def advance(self, z, last, e, played):
        """Frame z (B, 1, N) is finished, drawn over frame `last` under action e (B, 1, D), which is code `played` (B,). The cache moves on, and
        the prior tells how `likely` (B, buttons) each code is to come next."""
        self.last, self.played, self.likely = z, played, self.dynamics.prior(z, last, e)[:, 0].softmax(-1)
        self.cache.advance()

    def possible(self, a):
        """Codes a (B,) as they will be played. Told "rising" in mid-fall, which no video ever showed, the model would have to make up
        something. So a code becomes another where the prior expects it less than in all but a share `least` of the moments at which it
        did come after the code played last (conformal prediction, Vovk et al. 2005): rare is not impossible, and who ran on a moment ago
        is measured by those who run on. What did the player mean? Something likely that points the same way in the LAM's codebook: Bayes'
        rule, where meaning b and saying a has odds of exp(2 cos(a, b))."""
        rare = (self.likely < self.floor[self.played]) & (self.likely < self.likely.amax(-1, keepdim=True))    # (B, buttons), never all of them
        meant = (self.likely.log() + self.alike[a]).masked_fill(rare, -math.inf).argmax(-1)
        return torch.where(rare.gather(-1, a[:, None])[:, 0], meant, a)

    @torch.no_grad()
    def prompt(self, z, a=None):
        """Forget everything; begin with frames z (B, T, N) and the actions a (B, T-1) between them."""
        d = self.dynamics
        a = torch.zeros(len(z), 0, dtype=torch.long, device=z.device) if a is None else a
        self.cache.clear()
        played = F.pad(a, (1, 0), value=len(d.buttons))                  # (B, T): nothing led to the first, see `chances`
        for frame, last, e, code in zip(*map(frames_of, (z, d.before(z), d.actions(a), played))):    # each (B, 1, ...)
            self.see(frame, e, d.paint(last))
            self.advance(frame, last, e, code[:, 0])

    @torch.no_grad()
    def step(self, a, film=None):
        """Press buttons a (B,): the tokens (B, 1, N) of the next frame."""
        d, a = self.dynamics, self.possible(a)
        e, canvas = d.vectors(a[:, None]), d.paint(self.last)            # (B, 1, D), (B, 1, N, D)
        predict = lambda z, place: d.logits_at(place, self.see(z, e, canvas))
        z = maskgit(predict, self.B, d.N, d.MASK, self.steps, self.temperature, self.order, a.device, film)
        if d.wants_whole_past:
            self.see(z, e, canvas)
        self.advance(z, self.last, e, a)
        return z

    def snapshot(self):
        """What the next step will overwrite: to take it back ("undo", "what would every other button do")."""
        return self.last, self.played, self.likely, self.cache.snapshot()

    def restore(self, snapshot):
        self.last, self.played, self.likely, cached = snapshot
        self.cache.restore(cached)


@torch.no_grad()
def rollout(dynamics, z, a, cached=True, **sampling):
    """Go on from frames z (B, T, N) under actions a (B, T-1+M), of which the first T-1 led to z: (B, T+M, N).

    cached=False computes the whole past anew at every MaskGIT step: slow, without a cache, and exactly the same result. What
    is told is played, likely or not (least 0).
    """
    d, T = dynamics, z.size(1)
    if cached:
        world = World(d, len(z), **sampling)
        world.prompt(z, a[:, :T - 1])
        return torch.cat([z] + [world.step(a[:, t]) for t in range(T - 1, a.size(1))], 1)
    seen = z                                                             # each frame as its last pass saw it
    for t in range(T - 1, a.size(1)):
        e, drafts = d.actions(a[:, :t + 1]), []
        canvas = d.paint(F.pad(z, (0, 0, 1, 0), value=d.MASK))           # the frame before each of frames 1..t and the new one

        def predict(new, place):
            drafts.append(new)
            return d.logits_at(place, d.features(torch.cat([seen, new], 1), e, canvas)[:, -1:])

        new = maskgit(predict, len(z), d.N, d.MASK, device=z.device, **sampling)
        z, seen = torch.cat([z, new], 1), torch.cat([seen, new if d.wants_whole_past else drafts[-1]], 1)
    return z


def sampling_of(args):
    return dict(steps=args.maskgit, temperature=args.temperature, order=args.order)


# ------------------------------------------------------------------------------------------------ what it learned

@torch.no_grad()
def delta_psnr(dynamics, tokenizer, lam, clips, frames, sampling, batch=32):
    """PSNR with inferred actions, with random ones, and of the first frame kept, at generated frames 1..frames.

    One real frame is the prompt (play shows it twice, at rest; a frame of a clip need not be); x^ follows the actions
    inferred from the clip, x^' uniformly random ones. Three tensors (clips, frames). delta_t PSNR (section 3, Metrics) is
    the first minus the second at t = 4.
    """
    generator = torch.Generator().manual_seed(0)
    result = []
    for x in tqdm(clips[:, :frames + 1].split(batch), desc=f"{frames} frames ahead", dynamic_ncols=True):
        a = lam.encode(x)                                                # (B, frames)
        b = torch.randint(len(dynamics.buttons), a.shape, generator=generator).to(a.device)
        z = tokenizer.encode(x[:, :1])
        y = [tokenizer.decode(rollout(dynamics, z, actions, **sampling)) for actions in (a, b)]
        result.append(torch.stack([psnr(v[:, 1:], x[:, 1:]) for v in (*y, x[:, :1].expand_as(x))]))
    return torch.cat(result, 1)


@torch.no_grad()
def evaluate(dynamics, args, tokenizer, lam):
    """Held-out levels: delta_psnr with its standard error. Writes the picture."""
    dynamics.eval()
    torch.manual_seed(0)
    valid = Clips(args.data, "valid", 5, args.device)                    # the prompt and four frames
    x = valid.at(valid.spread(args.scored))
    inferred, random, still = delta_psnr(dynamics, tokenizer, lam, x, 4, sampling_of(args))[:, :, 3]   # at t = 4
    delta = inferred - random
    a = lam_stage.actions_of(lam, x)                                     # (clips, 4)
    surprise = dynamics.surprise(tokenizer_stage.tokens_of(tokenizer, x), a)
    scores = dict(delta_psnr=delta.mean().item(), delta_psnr_se=(delta.std() / len(x) ** 0.5).item(), psnr_t4=inferred.mean().item(),
                  psnr_t4_random=random.mean().item(), copy_psnr_t4=still.mean().item(), clips=len(x), maskgit=args.maskgit, temperature=args.temperature,
                  order=args.order, code_surprise=surprise.item(), code_entropy=perplexity(a, len(dynamics.buttons)).log().item())
    long = Clips(args.data, "valid", 9, args.device)
    x = long.at(long.spread(5)[1:4])                                     # (3, 9, H, W, C)
    picture(dynamics, tokenizer, lam, x, args)
    unmasking(dynamics, tokenizer, lam, x[1:2], args)
    return scores | curve(dynamics, tokenizer, lam, args)


def picture(dynamics, tokenizer, lam, x, args):
    """Clips x (3, 9, H, W, C), each above the model's version of it; then a frame of the second under every button."""
    sampling, K = sampling_of(args), len(dynamics.buttons)
    y = tokenizer.decode(rollout(dynamics, tokenizer.encode(x[:, :1]), lam.encode(x), **sampling))
    z = tokenizer.encode(x[1:2, :1]).expand(K, -1, -1)                   # (K, 1, N)
    held = torch.arange(K, device=z.device)[:, None].expand(-1, 8)       # (K, 8)
    rows = [clip for pair in zip(x, y) for clip in pair] + list(tokenizer.decode(rollout(dynamics, z, held, **sampling)))
    save_picture(args.run / "dynamics.png", rows, "three held-out clips, each above the model's version from its first "
                 "frame and inferred actions; then one frame under every button, held for 8 frames")


def curve(dynamics, tokenizer, lam, args):
    """How control fades: PSNR with inferred actions, random ones and the prompt kept, up to 16 frames ahead. Writes the picture."""
    plt = pyplot_for_files()
    frames = min(16, max(Clips(args.data, "valid", 1).meta["episodes"]["valid"]) - 1)
    data = Clips(args.data, "valid", frames + 1, args.device)
    x = data.at(data.spread(min(32, args.scored)))
    result = delta_psnr(dynamics, tokenizer, lam, x, frames, sampling_of(args)).cpu()        # 3 x (clips, frames)
    figure, ax = plt.subplots(figsize=(6, 3.5))
    for row, label, style in zip(result, ("inferred actions", "random actions", "the prompt, kept"), ("-o", "--o", ":")):
        mean, error = row.mean(0), row.std(0) / len(row) ** 0.5
        ax.plot(range(1, frames + 1), mean, style, label=label, markersize=3)
        ax.fill_between(range(1, frames + 1), mean - error, mean + error, alpha=0.2)
    ax.set(xlabel="generated frame t", ylabel="PSNR, dB", title=f"the gap is delta_t PSNR ({len(x)} held-out clips)")
    ax.legend()
    save_figure(args.run / "delta_psnr.png", figure, "how control fades with t")
    plt.close(figure)
    rounded = lambda row: [round(v, 2) for v in row.mean(0).tolist()]
    return dict(psnr_curve=rounded(result[0]), delta_psnr_curve=rounded(result[0] - result[1]), curve_clips=len(x))


@torch.no_grad()
def unmasking(dynamics, tokenizer, lam, x, args, frames=6, steps=8):
    """A small film of MaskGIT at work: frames of clip x (1, T, H, W, C) as they are filled in; grey is still masked."""
    world = World(dynamics, 1, steps, args.temperature, args.order)
    past = tokenizer.encode(x[:, :1])                                    # (1, T, N)
    world.prompt(past)
    actions, film = lam.encode(x), [tokenizer.decode(past)[0, -1]] * 4
    for t in range(frames):
        drafts = []
        z = world.step(actions[:, t], film=drafts)
        for draft in drafts:
            hole = (draft == dynamics.MASK)                              # (1, 1, N)
            pixels = tokenizer.decode(torch.cat([past, torch.where(hole, past[:, -1:], draft)], 1))[:, -1:]
            patches = patchify(pixels, tokenizer.patch).masked_fill(hole[..., None], 0.5)
            film.append(unpatchify(patches, tokenizer.patch, tokenizer.height, tokenizer.width)[0, 0])
        past = torch.cat([past, z], 1)
    write_gif(args.run / "maskgit.gif", [f.cpu().numpy() for f in film], fps=5)


def load_upstream(args, stages):
    """The frozen models of the run folder that come before; all must come from the data in use."""
    data = Clips(args.data, "train", args.frames, args.device)
    models = []
    for stage in stages:
        name = stage.__name__
        model, ckpt = load_model(args.run / f"{name}.pt", stage.build, name, args.device)
        if ckpt["origin"]["data"] != data.name:
            stop(f"{args.run}/{name}.pt was trained on {ckpt['origin']['data']}, but {args.data} is {data.name}; use its --run "
                 f"folder, or train it on this data")
        if ckpt["step"] < ckpt["knobs"]["steps"]:                        # finished later, it would be another model than this was trained on
            stop(f"{args.run}/{name}.pt is at step {ckpt['step']} of {ckpt['knobs']['steps']}; finish it first: the same {name}.py command with "
                 f"--resume (and --steps {ckpt['step']}, if that is enough)")
        models.append(model)
    return data, *models


def begin_lam(args):
    """For --cotrain: a LAM and its Run, set up as lam.py would, but to be trained on the clips of the dynamics, for as many steps."""
    flags = [f"--{k}={getattr(args, k)}" for k in ("data", "run", "size", "seed", "device", "steps", "batch", "frames")]
    if args.resume:
        flags.append("--resume")
    args = settle(parser(lam_stage.__doc__, lam_stage.KNOBS, flaw=lam_stage.FLAWS).parse_args(flags), "lam")
    clips, config = lam_stage.begin(args)
    torch.manual_seed(args.seed)
    lam = lam_stage.build(**config).to(args.device)
    return lam, Run("lam", args, lam, make_optimizer(lam, args.lr), config, data=clips.name)


def lam_step(run, net, x, step, args):
    """One step of lam.py on clips x, for --cotrain: the latent actions (B, T-1). They are integers: no gradient of the dynamics
    loss can pass through them, which is the stop-gradient of section 2.1."""
    schedule(run.optimizer, step, run.args)
    with autocast(args):
        loss, a, _ = net(x, step >= run.args.root_from * run.args.steps, run.args.shifted)
    run.optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    run.optimizer.step()
    return a


@torch.no_grad()
def encode(data, tokenizer, lam, args):
    """All of the data as tokens (F, N) and latent actions (F,), once: both models are frozen (the stop-gradient of section 2.1),
    so doing it in every step would only repeat it (nearly: a clip's first frame would have no past, which changes 1 token in 1,000).
    Action f leads from frame f to f+1 (-1: nowhere, at the end of an episode). Tokens are made in fp32, as in play: in bf16 5 % of them
    would be others. Actions may be made in bf16: 1 in 300 is another, and play infers none. lam=None: no actions.
    Kept in tokens.pt of the run folder, for --resume and for the next experiment on the same tokenizer, or the same two models."""
    path, about, kept = args.run / "tokens.pt", data.path.stat(), {}
    if path.exists():
        try:
            kept = dict(torch.load(path, map_location=data.device, weights_only=True))
        except Exception as e:                                           # torch.load raises half a dozen types
            stop(f"{path} is damaged ({type(e).__name__}); delete it, and it will be made anew")
    made_from = [data.name, about.st_size, about.st_mtime_ns, data.T]
    tokens_from = [*made_from, fingerprint(tokenizer)]
    actions_from = [*made_from, fingerprint(lam)] if lam else []
    new_tokens, new_actions = kept.get("tokens_of") != tokens_from, kept.get("actions_of") != actions_from
    z, a = kept.get("tokens"), kept.get("actions")
    if new_tokens:
        z = torch.zeros(len(data.frames), tokenizer.tokens, dtype=torch.int, device=data.device)
    if new_actions:
        a = torch.full(z.shape[:1], 0 if args.bench else -1, dtype=torch.short, device=data.device)
    if not new_tokens and (lam is None or not new_actions):
        return z, a
    clips = data.cover()[::-1][:4 if args.bench else None]               # the speed of training is the same with zeros
    clips = np.pad(clips, (0, -len(clips) % 4), mode="edge").reshape(-1, 4)      # fours, the last one repeated: one shape, compiled once
    for starts in tqdm(clips, desc="frames to tokens", disable=args.rank > 0, dynamic_ncols=True):
        x = data.at(starts)                                              # (4, T, H, W, C)
        if new_tokens:                                                   # one clip after the other, from the end: a frame that two clips share
            for start, tokens in zip(starts, tokenizer.encode(x).int()):         # has the tokens of the one where it has more past
                z[start:start + data.T] = tokens
        if lam and new_actions:
            with autocast(args):
                for start, codes in zip(starts, lam.encode(x).short()):
                    a[start:start + data.T - 1] = codes
    if args.rank == 0 and not args.bench:
        write_atomically(path, lambda f: torch.save(dict(tokens=z, tokens_of=tokens_from, actions=a, actions_of=actions_from), f))
    return z, a


def clips_of(tokens, actions, starts, frames):
    """The clips that begin at starts (B,), out of all of the data: tokens (B, T, N) and the actions between their frames (B, T-1)."""
    index = torch.from_numpy(starts[:, None] + np.arange(frames)).to(tokens.device, non_blocking=True)
    return tokens[index].long(), actions[index[:, :-1]].long()


@torch.no_grad()
def looks_of(tokenizer):
    """What each code looks like: the mean patch (K, P*P*C) of a frame of nothing but this code; all of them to mean 0 and variance 1."""
    z = torch.arange(len(tokenizer.vq.codebook), device=tokenizer.vq.codebook.device)[:, None, None].expand(-1, 1, tokenizer.tokens)
    x = torch.cat([patchify(tokenizer.decode(part), tokenizer.patch).mean((1, 2)) for part in z.split(64)])
    return (x - x.mean(0)) / x.std()


def learn_prior(dynamics, tokens, actions, clips, args):
    """Train the prior of a finished model, from the start. Many clips a step: most moments tell it nothing new, and walls are rare.
    The last tenth of the data is kept from it, for `chances`."""
    torch.manual_seed(args.seed)
    prior = dynamics.prior.reset_parameters().requires_grad_(True)
    optimizer = torch.optim.AdamW(prior.parameters(), lr=3e-3, weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.prior_steps)
    cut = len(clips.starts) * 9 // 10
    taught, kept = clips.starts[:max(1, cut)], clips.starts[cut:]
    for step in (bar := tqdm(range(args.prior_steps), desc="prior", mininterval=1, dynamic_ncols=True)):
        torch.manual_seed(args.seed * 1_000_003 + step)
        z, a = clips_of(tokens, actions, taught[torch.randint(len(taught), (64,)).numpy()], args.frames)
        with autocast(args):
            loss = dynamics.surprise(z, a)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step % 100 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    prior.requires_grad_(False)
    prior.came.copy_(chances(dynamics, tokens, actions, kept, args.frames))


@torch.no_grad()
def chances(dynamics, tokens, actions, starts, frames):
    """What chance does the prior give each code when it comes, after each other? A table (buttons + 1, buttons, 101): column s of (last, code)
    is a chance that only s in 1,000 moments at which `code` followed `last` stay below (conformal prediction); 0 where there are too few to
    tell. The last row is for frames that nothing led to. Pairs that came less than 100 times have what their code has after any other. A
    code that never came has 1 (but in column 0). From clips that the prior did not learn from: what it has seen, it expects too surely."""
    table, before, came, chance = torch.zeros_like(dynamics.prior.came), [], [], []
    starts = starts[::frames - 1]                                        # nearly every moment once
    for i in range(0, len(starts), 64):
        z, a = clips_of(tokens, actions, starts[i:i + 64], frames)       # (64, T, N), (64, T-1)
        before.append(F.pad(a[:, :-1], (1, 0), value=len(table) - 1).flatten())
        came.append(a.flatten())
        chance.append(dynamics.foresee(z, a).softmax(-1).gather(-1, a[..., None]).flatten())
    before, came, chance = map(torch.cat, (before, came, chance))
    for last, code in np.ndindex(*table.shape[:2]):
        pair = (came == code) & (before == last)
        mine = chance[pair if pair.sum() >= 100 else came == code]
        mine = F.pad(mine.sort().values, (1, 0))                         # (n + 1,), the first is 0
        table[last, code] = mine[torch.arange(101, device=mine.device) * len(mine) // 1000]      # a new moment has each of n + 1 ranks alike
    for code in range(table.size(1)):
        if not (actions == code).any():
            table[:, code, 1:] = 1
    return table


build = Dynamics                # for load_model


def main(argv=None):
    words = dict(action=("add", "prepend"), canvas=("last", "blank"), masking=("paper", "frames", "streams"),
                 order=("random", "confidence"), flaw=FLAWS)
    p = parser(__doc__, KNOBS, **words)
    p.add_argument("--cotrain", action="store_true", help="train a LAM along with it (section 2.1), instead of loading lam.pt")
    args = settle(p.parse_args(argv), "dynamics")
    if args.resume:
        begun = read_checkpoint(args.run / "dynamics.pt", "dynamics")["origin"].get("cotrain")
        if args.cotrain and not begun:
            stop(f"{args.run}/dynamics.pt was begun without --cotrain; leave it out to resume")
        args.cotrain = begun
    if args.cotrain and args.bench:
        stop("--bench times one model: leave out --cotrain (lam.py --bench times the other)")
    beside = None                                                        # the Run of a LAM that is trained along
    if args.cotrain:
        clips, tokenizer = load_upstream(args, [tokenizer_stage])
        lam, beside = begin_lam(args)
    else:
        clips, tokenizer, lam = load_upstream(args, [tokenizer_stage, lam_stage])
    config = dict(rows=tokenizer.height // tokenizer.patch, columns=tokenizer.width // tokenizer.patch,
                  codes=len(tokenizer.vq.codebook), pixels=3 * tokenizer.patch ** 2, buttons=len(lam.vq.codebook), code_dim=lam.vq.codebook.size(1),
                  window=args.frames) | {k: getattr(args, k) for k in MODEL}
    torch.manual_seed(args.seed)
    model = Dynamics(**config).to(args.device)
    model.buttons.copy_(lam.vq.codebook)
    model.prior.looks[:-1] = looks_of(tokenizer)
    optimizer = make_optimizer(model, args.lr)
    run = Run("dynamics", args, model, optimizer, config, data=clips.name, tokenizer=fingerprint(tokenizer), lam=fingerprint(lam),
              cotrain=args.cotrain or None)
    for m in (tokenizer, lam, model):
        prepare_blocks(m, args)
    if args.compile == "on":
        model.loss = torch.compile(model.loss, fullgraph=True, dynamic=False)
    tokens, actions = encode(clips, tokenizer, None if beside else lam, args)
    net = parallel(model, args)
    if beside:
        run.beside, lam_net = beside, parallel(lam, args)

    for step in run.steps():
        starts = clips.draw(args.batch // args.world)
        z, a = clips_of(tokens, actions, starts, args.frames)
        if beside:
            if lam_stage.restart_is_due(step, beside.args):
                lam_stage.restart(lam, clips, args)
            a = lam_step(beside, lam_net, clips.at(starts), step, args)
            model.buttons.copy_(lam.vq.codebook)
        with autocast(args):
            loss = net(z, a, args.noise, args.flaw)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        run.log(step, loss)

    if beside:
        beside.report(lam_stage.evaluate)
        if args.rank == 0:
            tokens, actions = encode(clips, tokenizer, lam, args)
    if args.rank == 0:
        learn_prior(model, tokens, actions, clips, args)
        run.save(args.steps)
    run.report(lambda model, args: evaluate(model, args, tokenizer, lam))


if __name__ == "__main__":
    command(main)
