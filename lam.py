"""Stage 2: the latent action model (LAM, section 2.1). It discovers buttons that nobody labelled.

    python lam.py                            # data/platformer -> runs/platformer/lam.pt
    python lam.py --oracle                   # the ceiling: the same encoder, told the true buttons
    python lam.py --run runs/blind --flaw blind --frames 4 --batch 16      # the collapse laboratory: break it, look at lam.png

The encoder sees frames x_1..x_t AND x_{t+1} and may say one of 8 words, a_t. The decoder sees x_1..x_t and that word, and
must draw x_{t+1}. Three bits are too few to describe a frame: they pay off most when they tell what the past could not,
and in a game that is what the player did. When playing, the player says the word; the encoder and decoder are thrown away.

Where it departs from the paper (most of it measured in the README's lab notes):
- the encoder reads every pair of frames twice, as (x_t, x_{t+1}) and as (x_{t+1}, x_t), and the code quantises the
  difference of the two readings. What does not depend on the direction of time (the level, its colours) cancels; motion
  does not. Without this, codes named the colours of the level, or "something moved" without saying which way;
- the decoder sees one frame, the last (`--past 1`; the paper: all of them). With the whole past it soon knows "still running
  right" by itself, and a code comes to mean "as before" or "the other way", never "right". With two (`--past 2`) codes say less
  of what happened, and the world that is trained on them is a worse one;
- the encoder looks no further back than the decoder. One that does has nothing of use to say about the past, but the past
  leaks: where nothing moved, the difference of its readings was not zero but a faint trace of what had moved before; brought to
  unit length, it was faint no longer, and got the codes of jumps. On the ground three quarters of these meant "nothing"; now that
  has a code of its own;
- a clip is two frames, and there are many of them: what a decoder of one frame learns from the transitions of a longer clip is
  nearly the same thing over and over. It draws the next frame better, in fewer minutes;
- k-means is tried twice more, from other beginnings, when the encoder has learned what to look at and when it is nearly done
  (`--restart`, at size laptop): it ends in the local minimum that it began near, and "left and jump" had no code of its own for want of
  another beginning;
- the vectors that are quantised are kept from lying on a line or in a plane (`--spread`), where codes are directions around a
  circle, and each must do for whatever lies between its neighbours;
- encoder and decoder may agree on other words for every way in which the level, or the hero, lies to the grid of patches, and for
  dark levels and light: "up" here is "down" there. Neither loses by it; a player does, and two seeds of five were of that kind.
  Against the first, half of the clips are shown to the encoder shifted, by up to a patch (`--shifted`), and to the decoder as they
  are. Against the second, the encoder reads squares of linear filters over two frames, as the motion energy model of human vision
  does (Adelson & Bergen 1985): a filter that moves along with an edge answers alike to a bright one and to a dark one;
- the decoder sees each patch together with its neighbours (a convolution): what moves, moves over the edges of patches;
- the decoder's output is ADDED to x_t and starts at zero: training begins at copying the last frame, not far below it;
- the error is measured in units of the error of copying, so that the commitment loss stays a detail;
- it begins as the mean square and ends, at sizes laptop and gpu, as the root of that, transition by transition (`--root-from`): a hero who jumps is 1 %
  of the picture, and beside a view that scrolls his jump is lost in a mean of squares. The root alone is a gamble: while nothing
  is learned yet it cares most for transitions in which nothing happens, and one seed of four collapsed;
- it leaves out the patches along the edges of the frame (`--border`): what comes into view there cannot be known from the last
  frame, so it would pay to spend codes on it, and nobody's button did it.
"""
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from data import ACTIONS, Clips, displacement, psnr, true_actions
from st_block import (Neighbours, Run, STTransformer, VectorQuantizer, autocast, check_patch, check_writable, command, counts, make_optimizer,
                      parallel, parser, patchify, perplexity, prepare_blocks, pyplot_for_files, save_figure, schedule, settle, stop, unpatchify, write_json)

FLAWS = ("none",
         "blind",           # the encoder looks one transition back: a_t is computed without x_{t+1}
         "leak",            # the decoder's causal mask has one diagonal too many: it sees the frame that it must draw (not the last of a clip)
         "one-way",         # every pair of frames is read forwards only, and the reading itself is quantised
         "no-norm",         # vectors are quantised as they come, of any length
         "no-revival",      # codes begin as random directions, and a dead one stays dead
         "dead")            # no-norm and no-revival together

KNOBS = dict(
    #            test  laptop   gpu  coinrun
    steps=      (300,   1800,  1200, 200000, "training steps"),
    batch=      ( 48,     48,    96,     36, "clips in a step"),
    frames=     (  2,      2,     2,     16, "frames in a clip: --past 1 needs but two, and more clips teach more than longer ones"),
    patch=      (  8,      8,     8,      8, "pixels along a patch's side (the paper: 16 at full scale, not listed for CoinRun)"),
    dim=        ( 64,    128,   256,    512, "width D"),
    layers=     (  1,      2,     4,      8, "ST blocks of the encoder, and of the decoder"),
    heads=      (  2,      2,     4,      8, "attention heads"),
    codes=      (  8,      8,     8,      6, "latent actions |A|: buttons on your keyboard"),
    code_dim=   (  8,     32,    32,     32, "dimensions of a latent action"),
    beta=       (0.05,  0.05,  0.05,   0.05, "weight of the commitment loss"),
    border=     (  1,      1,     1,      0, "patches along each edge of the frame that the error leaves out (the paper: none)"),
    spread=     (0.02,  0.02,  0.02,     0., "weight of the loss that keeps codes from lying on a line or in a plane (the paper: 0)"),
    past=       (  1,      1,     1,     16, "frames that each layer looks at: the last ones before the one that comes"),
    shifted=    (0.5,    0.5,   0.5,    0.0, "share of the clips that the encoder sees shifted against the grid of patches (the paper: 0)"),
    root_from=  (1.0,    0.4,   0.4,    1.0, "share of the steps with the mean square error (the paper: all); then its root, transition by transition"),
    restart=    (1.0,    0.4,   1.0,    1.0, "share of the steps between tries of k-means from other beginnings (0.4: at 40 and 80 %; 1: never, the paper's)"),
    flaw=       ("none", "none", "none", "none", "break it, to see what happens (README, the collapse laboratory): " + ", ".join(FLAWS[1:])),
    lr=         (3e-3,  4e-3,  1e-3,   3e-5, "peak learning rate"),
    warmup=     ( 10,    100,   100,   5000, "steps of linear warm-up"),
    scored=     (192,    768,   768,    256, "held-out clips in the scores"),
)
MODEL = ("patch", "dim", "layers", "heads", "codes", "code_dim", "beta", "border", "spread", "past", "flaw")


class LatentActionModel(nn.Module):
    """Frames (B, T, H, W, C) -> one latent action per transition, (B, T-1) integers below `codes`."""

    def __init__(self, height, width, patch, dim, layers, heads, codes, code_dim, beta, border, spread, past, flaw="none"):
        super().__init__()
        self.height, self.width, self.patch, self.beta, self.spread, self.flaw = height, width, patch, beta, spread, flaw
        self.inner = slice(border * patch, height - border * patch), slice(border * patch, width - border * patch)
        tokens, pixels = (height // patch) * (width // patch), 3 * patch * patch
        self.embed = nn.Linear(2 * pixels, dim, bias=False)
        self.encoder = STTransformer(tokens, dim, layers, heads, past)
        self.to_code = nn.Linear(dim, code_dim, bias=False)
        self.vq = VectorQuantizer(codes, code_dim, normalise=flaw not in ("no-norm", "dead"), revive=flaw not in ("no-revival", "dead"))
        self.embed_past = nn.Linear(pixels, dim)
        self.around = Neighbours(height // patch, width // patch, dim)
        self.embed_action = nn.Linear(code_dim, dim)
        self.decoder = STTransformer(tokens, dim, layers, heads, past + (flaw == "leak"))
        self.to_pixels = nn.Linear(dim, pixels)
        nn.init.zeros_(self.to_pixels.weight)
        nn.init.zeros_(self.to_pixels.bias)

    def features(self, x):
        """What happened between each frame and the next: (B, T-1, code_dim). Entry t depends on x_{t+1} and on the `past` frames before it
        (on more, with --past above 1: each layer looks back as far)."""
        p = patchify(2 * x - 1, self.patch)                              # (B, T, N, P*P*C)
        if self.flaw == "blind":
            p = torch.cat([p[:, :1], p[:, :-1]], 1)
        forth, back = torch.cat([p[:, :-1], p[:, 1:]], -1), torch.cat([p[:, 1:], p[:, :-1]], -1)
        read = lambda pairs: self.encoder(self.embed(pairs).square())    # motion energy: x and -x are read alike
        if self.flaw == "one-way":
            return self.to_code(read(forth).mean(2))
        h, r = read(torch.cat([forth, back])).chunk(2)                   # 2 x (B, T-1, N, D)
        return self.to_code((h - r).mean(2))                             # over the tokens of a frame

    def predict(self, x, e):
        """The next frames x_2..x_{T+1} from x_1..x_T (B, T, H, W, C) and action vectors e (B, T, code_dim)."""
        patches = patchify(2 * x - 1, self.patch)                        # (B, T, N, P*P*C)
        h = self.around(self.embed_past(patches)) + self.embed_action(e).unsqueeze(2)     # additive actions (section 2.1)
        mask = None
        if self.flaw == "leak":                                          # its window is one frame longer, ahead instead of back
            mask = torch.ones(h.size(1), h.size(1), dtype=torch.bool, device=h.device).tril(1).triu(2 - self.decoder.window)
        change = self.to_pixels(self.decoder(h, mask=mask)).float()
        return x + unpatchify(change, self.patch, self.height, self.width)

    def encode(self, x):
        """Frames (B, T, H, W, C) -> latent actions (B, T-1)."""
        return self.vq.nearest(self.vq.norm(self.features(x).float()))

    def decode(self, x, a):
        """Next frames for frames x (B, T, H, W, C) under actions a (B, T): (B, T, H, W, C) in [0, 1]."""
        return self.predict(x, F.embedding(a, self.vq.codebook)).clamp(0, 1)

    def forward(self, x, root=False, shifted=0.0):
        """Loss of clips x (B, T, H, W, C), their latent actions (B, T-1), and what to watch. root, shifted: see --root-from, --shifted."""
        watched = x
        if n := round(shifted * len(x)):
            by = torch.randint(self.patch, (2,)).tolist()
            watched = torch.cat([x[:n].roll(by, (2, 3)), x[n:]])
        z = self.features(watched)                                       # (B, T-1, code_dim)
        e, a, commitment = self.vq(z)                                    # (B, T-1, code_dim)
        seen = lambda y: y[:, :, self.inner[0], self.inner[1]]           # without the border
        mse = lambda y: (seen(y) - seen(x[:, 1:])).square().mean((2, 3, 4))              # (B, T-1)
        error, copying = mse(self.predict(x[:, :-1], e)), mse(x[:, :-1])
        if root:                                                         # (at zero a root has no gradient)
            error, copying = error.clamp(min=1e-8).sqrt(), copying.clamp(min=1e-8).sqrt()
        error = error.mean() / copying.mean().clamp(min=1e-6)            # 1: no better than copying the last frame
        narrow = narrowness(self.vq.norm(z.float()))                     # not of e: no gradient leads out of a plane that all codes lie in
        watch = dict(error=error, commit=commitment, codes=perplexity(a, len(self.vq.codebook)), narrow=narrow)
        return error + self.beta * commitment + self.spread * narrow, a, watch


def narrowness(z):
    """How few directions vectors z (..., D) spread in: 1 if they lie on a line, 1/2 in a plane (if in all directions alike), 1/D at
    best. tr(C^2) / tr(C)^2 of their covariance C, the inverse of the participation ratio."""
    with torch.autocast(z.device.type, enabled=False):
        z = z.float().flatten(0, -2)
        z = z - z.mean(0)
        C = z.T @ z                                                      # (D, D); its scale does not matter (torch.cov would synchronise the GPU)
    return C.square().sum() / C.trace().square().clamp(min=1e-9)


build = LatentActionModel       # for load_model


@torch.no_grad()
def actions_of(lam, clips, batch=16):
    """Latent actions of many clips, a few at a time: (B, T-1)."""
    return torch.cat([lam.encode(clips[i:i + batch]) for i in range(0, len(clips), batch)])


def labelled(lam, args, T, split, n):
    """Of n clips of T frames, spread over a split: codes (clips, T-1), true buttons (clips, T-1), and which of the six buttons would have led
    to the same frame (clips, T-1, 6)."""
    data = Clips(args.data, split, T, args.device)
    starts = data.spread(n)
    parts = np.array_split(starts, math.ceil(len(starts) / 256))         # a few hundred clips in memory at once
    a = torch.cat([actions_of(lam, data.at(part)) for part in parts]).cpu().numpy()
    pressed, same, _ = true_actions(args.data, split)
    at = starts[:, None] + np.arange(T - 1)
    return a, pressed[at], same[at]


def score_actions(lam, args, T):
    """Against the true buttons, where somebody knows them (never used in training): action_accuracy, chance, nmi.

    Each code stands for the button that it most often goes with on training levels; on held-out levels it is right when that button
    would have led the true game to the very same next frame. For playing, `meaning` is the button that would most often have led to
    what a code was used for, pressed or not; of buttons equal to 1 in 20 (in mid-air, with up and without), the first. `keys` is the
    way back, from transitions where no other button would have led to the same frame (a jump in the air does not count): for each
    button the code that goes with it best, by the F-measure with beta = 1/2 (van Rijsbergen 1979: purity counts more).
    Returns scores, and a table (codes, 6) of how often each code went with each button; ({}, None) where nobody knows the buttons.
    """
    if true_actions(args.data, "train") is None:
        return {}, None
    K, one_hot = max(len(lam.vq.codebook), len(ACTIONS)), np.eye(len(ACTIONS))           # the oracle always has six

    def by_code(a, rows):
        """Rows (clips, T-1, 6) added up for each code: (K, 6)."""
        table = np.zeros((K, len(ACTIONS)))
        np.add.at(table, a, rows)
        return table

    a, pressed, same = labelled(lam, args, T, "train", 8 * args.scored)          # a decisive jump is rare: keys need many clips
    table, leads = by_code(a, one_hot[pressed]), by_code(a, same)
    decisive = by_code(a, one_hot[pressed] * (same.sum(-1, keepdims=True) == 1))
    mapping = table.argmax(1)
    meaning = (leads >= leads.max(1, keepdims=True) - 0.05 * table.sum(1, keepdims=True)).argmax(1)
    recall = decisive / decisive.sum(0).clip(1)                          # P(code | button)
    precision = recall / recall.sum(1, keepdims=True).clip(1e-9)         # P(button | code), were all buttons equally common
    keys = (1.25 * precision * recall / (0.25 * precision + recall).clip(1e-9)).argmax(0)

    a, pressed, same = labelled(lam, args, T, "valid", args.scored)
    table = by_code(a, one_hot[pressed])
    p = table / table.sum()
    outer = p.sum(1, keepdims=True) * p.sum(0, keepdims=True)
    info = (p[p > 0] * np.log(p[p > 0] / outer[p > 0])).sum()
    entropy = lambda q: -(q[q > 0] * np.log(q[q > 0])).sum()
    hit = np.take_along_axis(same, mapping[a][..., None], 2)[..., 0]
    scores = dict(action_accuracy=float(hit.mean()), chance=float(same.mean((0, 1)).max()),
                  action_accuracy_se=float(hit.mean(1).std() / np.sqrt(len(hit))),
                  nmi=float(2 * info / (entropy(p.sum(0)) + entropy(p.sum(1)))), mapping=mapping.tolist(),
                  meaning=meaning.tolist(), keys=keys.tolist())
    return scores, table


class Oracle(LatentActionModel):
    """The same encoder, told the true buttons: what a LAM may hope for. (It sees no shifted clips, so a LAM may pass it by a little.)"""

    def __init__(self, **config):
        super().__init__(**config)
        self.to_button = nn.Linear(config["code_dim"], len(ACTIONS))

    def forward(self, x):
        return self.to_button(self.vq.norm(self.features(x)))            # (B, T-1, 6)

    def encode(self, x):
        return self(x).argmax(-1)


def score_oracle(args, clips, config):
    """action_accuracy of a LAM's encoder trained WITH the true buttons, as long and on as many clips: about the ceiling of one trained without."""
    known = true_actions(args.data, "train")
    if known is None:
        stop(f"nobody knows the true actions of {args.data}: there is no ceiling to measure")
    buttons = torch.from_numpy(known[0]).long().to(args.device)          # (F,)
    torch.manual_seed(args.seed)
    model = Oracle(**config).to(args.device)
    optimizer = make_optimizer(model, args.lr)
    prepare_blocks(model, args)
    for step in tqdm(range(args.steps), desc="oracle", dynamic_ncols=True):
        schedule(optimizer, step, args)
        starts = clips.draw(args.batch)
        with autocast(args):
            logits = model(clips.at(starts))
            loss = F.cross_entropy(logits.flatten(0, 1).float(), buttons[starts[:, None] + np.arange(args.frames - 1)].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.compiler.set_stance("force_eager"):
        return score_actions(model.eval(), args, args.frames)[0]


@torch.no_grad()
def evaluate(lam, args):
    """Held-out levels: psnr of the next frame with inferred codes, shuffled codes, and the last frame copied."""
    lam.eval()
    T = args.frames
    valid = Clips(args.data, "valid", T, args.device)
    x = valid.at(valid.spread(args.scored))
    a = actions_of(lam, x)                                               # (clips, T-1)
    K = len(lam.vq.codebook)
    shuffled = a.flatten()[torch.randperm(a.numel(), generator=torch.Generator().manual_seed(0)).to(a.device)].view_as(a)
    score = lambda a: psnr(torch.cat([lam.decode(x[i:i + 16, :-1], a[i:i + 16]) for i in range(0, len(x), 16)]), x[:, 1:])
    share = counts(a, K) / a.numel()
    scores = dict(psnr=score(a).mean().item(), psnr_shuffled=score(shuffled).mean().item(),
                  copy_psnr=psnr(x[:, :-1], x[:, 1:]).mean().item())
    scores |= dict(lam_gain=scores["psnr"] - scores["psnr_shuffled"], codes_in_use=int((share >= 0.02).sum()), codes=K,
                   code_perplexity=perplexity(a, K).item(), code_share=[round(s, 3) for s in share.tolist()])
    change = (x[:, 1:] - x[:, :-1]).square().mean((2, 3, 4))             # (clips, T-1)
    still = change < min(1e-4, 0.01 * change.mean())                     # a world at rest: its code is for prompts (play.py)
    scores["still"] = a[still].mode().values.item() if still.float().mean() > 0.01 else None
    found, table = score_actions(lam, args, T)
    picture(lam, args.run / "lam.png", x, a, table)
    return scores | found


def picture(lam, path, x, a, table):
    """What each code does, a row each: how the view moved in frames that carry it (mean and spread), its true buttons (a row of `table`, see
    score_actions; where nobody knows them: what it draws that the others do not), what the decoder makes of one frame under it, and examples."""
    plt = pyplot_for_files()
    K, shown = len(lam.vq.codebook), 4
    moved = displacement(x[:, :-1].flatten(0, 1), x[:, 1:].flatten(0, 1)).view(*a.shape, 2).float().cpu()
    figure, axes = plt.subplots(K, 3 + shown, figsize=(2.2 * (3 + shown), 1.3 * K), width_ratios=[1, 1.5, 1] + [2] * shown, squeeze=False)
    start = x[:1, :3].expand(K, -1, -1, -1, -1)                          # (K, min(T, 3), H, W, C): as in the clip so far, then every code
    codes = torch.cat([a[:1, :2].expand(K, -1), torch.arange(K, device=a.device)[:, None]], 1)
    drawn = lam.decode(start, codes)[:, -1]
    for k, row in enumerate(axes):
        for ax in row:
            ax.set_xticks([]), ax.set_yticks([])
        mine = moved[a.cpu() == k].numpy()                               # (how often, 2)
        row[0].set(xlim=(-7, 7), ylim=(7, -7))                           # image coordinates: down is positive
        row[0].set_ylabel(f"code {k + 1}\n{len(mine) / a.numel():.0%}", fontsize=9)
        if len(mine):
            places, times = np.unique(mine, axis=0, return_counts=True)
            row[0].scatter(*places.T, s=150 * times / len(mine), color="silver")
            row[0].annotate("", mine.mean(0), (0, 0), arrowprops=dict(arrowstyle="->", color="crimson", lw=2))
        if table is not None:
            share = table[k] / max(1, table[k].sum())
            row[1].imshow(share[None], vmin=0, vmax=1, cmap="Blues", aspect="auto")
            for i, s in enumerate(share):
                row[1].text(i, 0, f"{100 * s:.0f}", ha="center", va="center", fontsize=7, color="white" if s > 0.5 else "black")
        else:                                                            # gray: as the codes draw it on average
            row[1].imshow((0.5 + drawn[k] - drawn.mean(0)).clamp(0, 1).cpu().numpy())
        row[2].imshow(drawn[k].cpu().numpy())
        where = (a == k).nonzero()                                       # (how often, 2): clip and frame
        for ax, (clip, t) in zip(row[3:], where[::max(1, len(where) // shown)].tolist()):
            ax.imshow(torch.cat([x[clip, t], torch.ones_like(x[0, 0, :, :4]), x[clip, t + 1]], 1).cpu().numpy())
    titles = ["how the view\nmoves (pixels)", "true buttons, %\n(held-out levels)" if table is not None else "the next column,\nless its mean",
              "one frame,\nevery code", "examples: frame t and t+1"]
    for ax, title in zip(axes[0], titles):
        ax.set_title(title, fontsize=8)
    if table is not None:
        axes[-1, 1].set_xticks(range(len(ACTIONS)), ACTIONS, rotation=90, fontsize=7)
    save_figure(path, figure, "what each latent action does")
    plt.close(figure)


def begin(args):
    """What is trained, and on what: the clips, the configuration of the model."""
    if args.frames < 3 and (args.past > 1 or args.flaw in ("blind", "leak")):
        what = f"--past {args.past}" if args.past > 1 else f"--flaw {args.flaw}"
        stop(f"{what} does nothing in clips of two frames, which have but one transition: add --frames 4 and a third of the --batch")
    # the held-out clips too: that they are too short for --frames should show now, not after training
    clips, _ = (Clips(args.data, split, args.frames, args.device) for split in ("train", "valid"))
    height, width, _ = clips.meta["frame"]
    check_patch(args.patch, height, width)
    if args.codes < 2:
        stop(f"--codes {args.codes}: a single word can tell nothing; it must be at least 2")
    if args.restart <= 0:
        stop(f"--restart {args.restart:g} would try k-means anew before every step; 0.4: at 40 and 80 % of them, 1: never")
    if min(height, width) <= 2 * args.border * args.patch:
        stop(f"--border {args.border}: nothing would be left of frames of {width}x{height} pixels in patches of {args.patch}")
    return clips, dict(height=height, width=width) | {k: getattr(args, k) for k in MODEL}


def restart_is_due(step, args):
    """Before this step? After every share --restart of the steps: 0.4 is at 40 and at 80 %, 1 is never."""
    return step > 0 and step % max(1, int(args.restart * args.steps)) == 0


def restart(lam, clips, args, batches=100):
    """Look at the codebook with what has been learned so far (VectorQuantizer.restart), on clips spread over the data. In batches like
    those of training, gradient or not: so nothing is compiled anew."""
    size = args.batch // args.world
    parts = np.resize(clips.spread(batches * size), (batches, size))     # of few clips, some twice
    with autocast(args):
        z = torch.cat([lam.features(clips.at(part)).detach().flatten(0, 1) for part in parts])         # (M, code_dim)
    mine, best = lam.vq.restart(z)
    if args.rank == 0:
        tqdm.write(f"k-means of {len(z)} transitions: {mine:.3f} from the codebook as it is, {best:.3f} from the best of other beginnings")


def main(argv=None):
    p = parser(__doc__, KNOBS, flaw=FLAWS)
    p.add_argument("--oracle", action="store_true", help="score only: the same encoder trained with the true buttons, the ceiling of action_accuracy")
    args = settle(p.parse_args(argv), "lam")
    clips, config = begin(args)
    if args.oracle:
        if args.world > 1 or args.bench or args.resume:
            stop("--oracle is a score: it has no --bench, no --resume and one process")
        check_writable(args.run)
        scores = score_oracle(args, clips, config)
        write_json(args.run / "oracle.json", scores | dict(seed=args.seed, steps=args.steps))
        print(f"action_accuracy with true labels: {scores['action_accuracy']:.3f} +- {scores['action_accuracy_se']:.3f} "
              f"(chance {scores['chance']:.3f}), nmi {scores['nmi']:.3f}; all of it in {args.run}/oracle.json")
        return
    torch.manual_seed(args.seed)
    model = LatentActionModel(**config).to(args.device)
    run = Run("lam", args, model, make_optimizer(model, args.lr), config, data=clips.name)
    prepare_blocks(model, args)
    net = parallel(model, args)

    for step in run.steps():
        if restart_is_due(step, args):
            restart(model, clips, args)
        x = clips.sample(args.batch // args.world)                       # (B, T, H, W, C)
        with autocast(args):
            loss, _, watch = net(x, step >= args.root_from * args.steps, args.shifted)
        run.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        run.optimizer.step()
        run.log(step, loss, **watch)

    run.report(evaluate)


if __name__ == "__main__":
    command(main)
