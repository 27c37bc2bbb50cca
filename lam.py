"""Stage 2: the latent action model (LAM, section 2.1). It discovers buttons that nobody labelled.

    python lam.py                            # data/platformer -> runs/platformer/lam.pt

The encoder sees frames x_1..x_t AND x_{t+1} and may say one of 8 words, a_t. The decoder sees x_1..x_t and that word, and
must draw x_{t+1}. Three bits are too few to describe a frame: they pay off most when they tell what the past could not,
and in a game that is what the player did. When playing, the player says the word; the encoder and decoder are thrown away.

Where it departs from the paper (each measured in the README's lab notes):
- the encoder reads every pair of frames twice, as (x_t, x_{t+1}) and as (x_{t+1}, x_t), and the code quantises the
  difference of the two readings. What does not depend on the direction of time (the level, its colours) cancels; motion
  does not. Without this, codes named the colours of the level, or "something moved" without saying which way;
- the decoder sees one frame, the last (`--past 1`; the paper: all of them). With the whole past it soon knows "still running
  right" by itself, and a code comes to mean "as before" or "the other way", never "right";
- the decoder's output is ADDED to x_t and starts at zero: training begins at copying the last frame, not far below it;
- the error is measured in units of the error of copying, so that the commitment loss stays a detail.
"""
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from data import ACTIONS, Clips, psnr, true_actions
from st_block import (Run, STTransformer, VectorQuantizer, autocast, check_patch, compile_blocks, fingerprint, make_optimizer, parallel,
                      parser, patchify, perplexity, settle, unpatchify, write_atomically)

KNOBS = dict(
    #            test  laptop   gpu  coinrun
    steps=      (300,    700, 20000, 200000, "training steps"),
    batch=      ( 16,     16,    36,     36, "clips in a step"),
    frames=     (  4,      4,    16,     16, "frames in a clip, and how far back a frame may look"),
    patch=      (  8,      8,     8,      8, "pixels along a patch's side (the paper: 16 at full scale, not listed for CoinRun)"),
    dim=        ( 64,    128,   512,    512, "width D"),
    layers=     (  1,      2,     8,      8, "ST blocks of the encoder, and of the decoder"),
    heads=      (  2,      2,     8,      8, "attention heads"),
    codes=      (  8,      8,     8,      6, "latent actions |A|: buttons on your keyboard"),
    code_dim=   (  8,     32,    32,     32, "dimensions of a latent action"),
    beta=       (0.05,  0.05,  0.05,   0.05, "weight of the commitment loss"),
    past=       (  1,      1,     1,     16, "frames that the decoder sees, the last ones before the one it draws"),
    lr=         (3e-3,  4e-3,  1e-4,   3e-5, "peak learning rate"),
    warmup=     ( 10,    100,  1000,   5000, "steps of linear warm-up"),
    scored=     ( 64,    256,   256,    256, "held-out clips in the scores"),
)
MODEL = ("patch", "dim", "layers", "heads", "codes", "code_dim", "beta", "past")


class LatentActionModel(nn.Module):
    """Frames (B, T, H, W, C) -> one latent action per transition, (B, T-1) integers below `codes`."""

    def __init__(self, height, width, window, patch, dim, layers, heads, codes, code_dim, beta, past):
        super().__init__()
        self.height, self.width, self.patch, self.beta = height, width, patch, beta
        tokens, pixels = (height // patch) * (width // patch), 3 * patch * patch
        self.embed = nn.Linear(2 * pixels, dim)
        self.encoder = STTransformer(tokens, dim, layers, heads, window)
        self.to_code = nn.Linear(dim, code_dim, bias=False)
        self.vq = VectorQuantizer(codes, code_dim)
        self.embed_past = nn.Linear(pixels, dim)
        self.embed_action = nn.Linear(code_dim, dim)
        self.decoder = STTransformer(tokens, dim, layers, heads, past)
        self.to_pixels = nn.Linear(dim, pixels)
        nn.init.zeros_(self.to_pixels.weight)
        nn.init.zeros_(self.to_pixels.bias)

    def features(self, x):
        """What happened between each frame and the next: (B, T-1, code_dim). Entry t depends on x_1..x_{t+1}."""
        p = patchify(2 * x - 1, self.patch)                              # (B, T, N, P*P*C)
        forth, back = torch.cat([p[:, :-1], p[:, 1:]], -1), torch.cat([p[:, 1:], p[:, :-1]], -1)
        h, r = self.encoder(self.embed(torch.cat([forth, back]))).chunk(2)                # 2 x (B, T-1, N, D)
        return self.to_code((h - r).mean(2))                             # over the tokens of a frame

    def predict(self, x, e):
        """The next frames x_2..x_{T+1} from x_1..x_T (B, T, H, W, C) and action vectors e (B, T, code_dim)."""
        patches = patchify(2 * x - 1, self.patch)                        # (B, T, N, P*P*C)
        h = self.embed_past(patches) + self.embed_action(e).unsqueeze(2)  # additive actions (section 2.1)
        change = self.to_pixels(self.decoder(h)).float()
        return x + unpatchify(change, self.patch, self.height, self.width)

    def encode(self, x):
        """Frames (B, T, H, W, C) -> latent actions (B, T-1)."""
        return self.vq.nearest(self.vq.norm(self.features(x).float()))

    def decode(self, x, a):
        """Next frames for frames x (B, T, H, W, C) under actions a (B, T): (B, T, H, W, C) in [0, 1]."""
        return self.predict(x, F.embedding(a, self.vq.codebook)).clamp(0, 1)

    def forward(self, x):
        """Loss of clips x, and what to watch."""
        e, a, commitment = self.vq(self.features(x))                     # (B, T-1, code_dim)
        error = F.mse_loss(self.predict(x[:, :-1], e), x[:, 1:])
        error = error / F.mse_loss(x[:, :-1], x[:, 1:])                  # 1: no better than copying the last frame
        return error + self.beta * commitment, dict(error=error, commit=commitment, codes=perplexity(a, len(self.vq.codebook)))


def build(**config):
    return LatentActionModel(**config)


@torch.no_grad()
def actions_of(lam, clips, batch=16):
    """Latent actions of many clips, a few at a time: (B, T-1)."""
    return torch.cat([lam.encode(clips[i:i + batch]) for i in range(0, len(clips), batch)])


def score_actions(lam, args, T):
    """Against the true buttons, where somebody knows them (never used in training): action_accuracy, chance, nmi.

    Each code stands for the button that it most often goes with on training levels; on held-out levels it is right when
    that button would have led the true game to the very same next frame. `keys` is the way back, for playing: the code in
    which each button is purest, among transitions where it was decisive, that is, where no other would have led to that
    frame (a jump is not, in the air). Returns (scores, table of counts code x button) or None.
    """
    K, table = len(lam.vq.codebook), None
    for split in ("train", "valid"):
        truth = true_actions(args.data, split)
        if truth is None:
            return None
        data = Clips(args.data, split, T, args.device)
        starts = data.spread(args.scored)
        a = actions_of(lam, data.at(starts)).cpu().numpy()               # (clips, T-1)
        at = starts[:, None] + np.arange(T - 1)
        true, same = truth[0][at], truth[1][at]                          # (clips, T-1), (clips, T-1, 6)
        table = np.zeros((K, len(ACTIONS)))
        np.add.at(table, (a, true), 1)
        if split == "train":
            mapping = table.argmax(1)
            decisive = np.zeros_like(table)
            np.add.at(decisive, (a, true), same.sum(-1) == 1)
            keys = (decisive / decisive.sum(1, keepdims=True).clip(0.02 * decisive.sum())).argmax(0)
    p = table / table.sum()
    outer = p.sum(1, keepdims=True) * p.sum(0, keepdims=True)
    info = (p[p > 0] * np.log(p[p > 0] / outer[p > 0])).sum()
    entropy = lambda q: -(q[q > 0] * np.log(q[q > 0])).sum()
    hit = np.take_along_axis(same, mapping[a][..., None], 2)[..., 0]
    scores = dict(action_accuracy=float(hit.mean()), chance=float(same.mean((0, 1)).max()),
                  action_accuracy_se=float(hit.mean(1).std() / np.sqrt(len(hit))),
                  nmi=float(2 * info / (entropy(p.sum(0)) + entropy(p.sum(1)))), mapping=mapping.tolist(), keys=keys.tolist())
    return scores, table


@torch.no_grad()
def evaluate(lam, args):
    """Held-out levels: psnr of the next frame with inferred codes, shuffled codes, and the last frame copied."""
    lam.eval()
    T = lam.encoder.window
    valid = Clips(args.data, "valid", T, args.device)
    x = valid.at(valid.spread(args.scored))
    a = actions_of(lam, x)                                               # (clips, T-1)
    K = len(lam.vq.codebook)
    shuffled = a.flatten()[torch.randperm(a.numel(), generator=torch.Generator().manual_seed(0)).to(a.device)].view_as(a)
    score = lambda a: psnr(torch.cat([lam.decode(x[i:i + 16, :-1], a[i:i + 16]) for i in range(0, len(x), 16)]), x[:, 1:])
    share = torch.bincount(a.flatten(), minlength=K) / a.numel()
    scores = dict(psnr=score(a).mean().item(), psnr_shuffled=score(shuffled).mean().item(),
                  copy_psnr=psnr(x[:, :-1], x[:, 1:]).mean().item())
    scores |= dict(lam_gain=scores["psnr"] - scores["psnr_shuffled"], codes_in_use=int((share >= 0.02).sum()), codes=K,
                   code_perplexity=perplexity(a, K).item(), code_share=[round(s, 3) for s in share.tolist()])
    known = score_actions(lam, args, T)
    if known:
        scores |= known[0]
    picture(lam, args.run / "lam.png", x, a, known)
    return scores


def picture(lam, path, x, a, known):
    """What each code does: what the LAM's decoder makes of one frame under it, examples, and the true buttons it goes with."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    K, shown = len(lam.vq.codebook), 4
    figure, axes = plt.subplots(K, 2 + shown, figsize=(2.2 * (2 + shown), 1.3 * K), width_ratios=[1, 1.3] + [2] * shown)
    start = x[:1, :3].expand(K, -1, -1, -1, -1)                          # (K, 3, H, W, C)
    codes = torch.cat([a[:1, :2].expand(K, -1), torch.arange(K, device=a.device)[:, None]], 1)
    drawn = lam.decode(start, codes)[:, -1]
    for k, row in enumerate(axes):
        for ax in row:
            ax.set_xticks([]), ax.set_yticks([])
        row[0].imshow(drawn[k].cpu().numpy())
        row[0].set_ylabel(f"code {k + 1}", fontsize=9)
        if known:
            row[1].bar(range(len(ACTIONS)), known[1][k] / max(1, known[1][k].sum()))
            row[1].set_ylim(0, 1)
        for i, (clip, t) in enumerate((a == k).nonzero()[:: max(1, int((a == k).sum()) // shown)][:shown].tolist()):
            row[2 + i].imshow(torch.cat([x[clip, t], torch.ones_like(x[0, 0, :, :4]), x[clip, t + 1]], 1).cpu().numpy())
    axes[0, 0].set_title("one frame, every code", fontsize=8)
    axes[0, 2].set_title("examples: frame t and frame t+1", fontsize=8)
    if known:
        axes[0, 1].set_title("true buttons (held-out)", fontsize=8)
        axes[-1, 1].set_xticks(range(len(ACTIONS)), ACTIONS, rotation=90, fontsize=7)
    write_atomically(path, lambda f: figure.savefig(f, format="png", dpi=80, bbox_inches="tight"))
    plt.close(figure)
    print(f"{path}: what each latent action does")


def main(argv=None):
    args = settle(parser(__doc__, KNOBS).parse_args(argv), "lam")
    # the held-out clips too: that they are too short for --frames should show now, not after training
    clips, _ = (Clips(args.data, split, args.frames, args.device) for split in ("train", "valid"))
    height, width, _ = clips.meta["frame"]
    check_patch(args.patch, height, width)
    config = dict(height=height, width=width, window=args.frames) | {k: getattr(args, k) for k in MODEL}
    torch.manual_seed(args.seed)
    model = build(**config).to(args.device)
    optimizer = make_optimizer(model, args.lr)
    run = Run("lam", args, model, optimizer, config, data=clips.name)
    compile_blocks(model, args)
    net = parallel(model, args)

    for step in run.steps():
        x = clips.sample(args.batch // args.world)                       # (B, T, H, W, C)
        with autocast(args):
            loss, watch = net(x)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        run.log(step, loss, **watch)

    run.report(evaluate, fingerprint=fingerprint(model))


if __name__ == "__main__":
    main()
