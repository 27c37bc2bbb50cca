"""Other ways to build the dynamics, each a subclass: train one, and compare.

    python -m lab.variants prepend           # the action as one more token of the frame
    python -m lab.variants streams           # a clean past beside a masked copy of the clip
    python -m lab.variants blank             # the paper's blank canvas, with all else ours

Flags after the name are those of dynamics.py. The run folder must hold a tokenizer and a LAM; the
dynamics is written to RUN-NAME, with copies of these two. To add a variant, write a subclass that
changes one thing, and name it in VARIANTS. What these three bring: lab/COLLAPSE.md.
"""
import math
import shutil
from pathlib import Path

import torch

import dynamics
from dynamics import OurDynamics
from st_block import STTransformer, command, new_parser, rotary, stop


class Prepend(OurDynamics):
    """The action is one more token of its frame, instead of being added to every token.

    Jasmine (2510.27002) found this essential. The paper found adding better than concatenating.
    """

    def __init__(self, layers, heads, window, dim, **config):
        super().__init__(layers=layers, heads=heads, window=window, dim=dim, **config)
        self.transformer = STTransformer(self.N + 1, dim, layers, heads, window, self.ffw)

    def features(self, z, e, canvas, cache=None):
        x = self.given(self.embed(z)) + canvas                      # (B, T, N, D)
        x = torch.cat([e.unsqueeze(2), x], 2)                       # (B, T, N+1, D)
        return self.transformer(x, cache)[:, :, 1:]


class Blank(OurDynamics):
    """The paper's blank canvas: nothing of the last frame is there to draw over."""
    remembers_finished = True     # a frame is known by its own tokens alone

    def paint(self, last):
        return torch.zeros(*last.shape, 1, device=last.device)


class Streams(OurDynamics):
    """Every masked frame has a clean past, as in play. It takes nearly twice the tokens.

    The clip is read twice in one pass: a clean copy, and a masked copy whose frame t looks at
    frames 1..t-1 of the clean one and at itself.
    """
    remembers_finished = True     # it was trained on a finished past

    def draw_mask(self, z):
        """A rate for each frame, by the cosine of MaskGIT: often near 1."""
        B, T, N = z.shape
        rate = torch.cos(0.5 * math.pi * torch.rand(B, T, 1, device=z.device))
        masked = torch.rand(B, T, N, device=z.device) < rate
        # frame 1 is the prompt; with few clips there might be nothing to score
        masked[:, 0] = False
        masked[:, -1, 0] = True
        return masked

    def forward(self, z, a):
        T = z.size(1)
        masked = self.draw_mask(z)
        given = self.with_noise(z)
        # the clean clip, then frames 2..T masked; actions and canvas are the same for both
        holes = z.masked_fill(masked, self.MASK)
        both = torch.cat([given, holes[:, 1:]], 1)                 # (B, 2T-1, N)
        e = twice(self.actions(a))                                  # (B, 2T-1, D)
        canvas = twice(self.paint(self.before(given)))              # (B, 2T-1, N, D)
        x = self.given(self.embed(both)) + canvas + e.unsqueeze(2)
        time, mask = self.two_streams(T, z.device)
        turn = rotary(time, x.size(-1) // self.transformer.heads)
        x = self.transformer.run_blocks(x, turn, mask)
        return self.loss(x[:, T:], z[:, 1:], masked[:, 1:])

    def two_streams(self, T, device):
        """The times (2T-1,) and the mask (2T-1, 2T-1) of a clean clip and its masked copy."""
        frames = torch.arange(T, device=device)
        time = torch.cat([frames, frames[1:]])
        masked = torch.arange(2 * T - 1, device=device) >= T
        # frames from the query back to the key
        back = time[:, None] - time
        # clean frames look at clean frames up to themselves, masked ones at those before them
        nearest = masked[:, None].long()
        clean = ~masked & (back >= nearest) & (back < self.transformer.window)
        # and all of them at themselves
        return time, clean | torch.eye(2 * T - 1, dtype=torch.bool, device=device)


def twice(x):
    """x (B, T, ...), then its frames 2..T once more: (B, 2T-1, ...)."""
    return torch.cat([x, x[:, 1:]], 1)


VARIANTS = dict(prepend=Prepend, blank=Blank, streams=Streams)


def main(argv=None):
    p = new_parser(__doc__)
    p.add_argument("variant", choices=VARIANTS)
    p.add_argument("--data", type=Path, default=Path("data/platformer"), help="see dynamics.py")
    p.add_argument("--run", type=Path, help="the folder that holds tokenizer.pt and lam.pt")
    args, rest = p.parse_known_args(argv)
    run = args.run or Path("runs") / args.data.name
    target = run.with_name(f"{run.name}-{args.variant}")
    target.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.pt", "lam.pt"):
        if not (run / name).exists():
            stop(f"{run / name} does not exist; train it first")
        shutil.copy(run / name, target / name)
    dynamics.main(["--data", str(args.data), "--run", str(target), *rest],
                  model_class=VARIANTS[args.variant])


if __name__ == "__main__":
    command(main)
