"""The collapse laboratory: break a stage on purpose, and see how it fails.

    python -m lab.collapse                   # every row of both tables, about ten minutes
    python -m lab.collapse --only blind leak # these rows alone
    python -m lab.collapse --list            # what is broken in each row

Each flaw is a subclass of a few lines. The diff is the lesson: predict what the scores and the
pictures will look like, then run. The rows are trained at size test on a small data set of the
built-in game, which is made in seconds, and land in runs/collapse/ROW with their pictures (lam.png
has a row for each code, dynamics.png ends with one frame under every code). A row that is there
already is not trained again. To add a row: a subclass, and a line in LAMS or WORLDS.
"""
import contextlib
import json
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F

import data
import dynamics
import lam
import tokenizer
from dynamics import OurDynamics
from lab.variants import Blank, Prepend, Streams
from lam import OurLatentActionModel, TwoPartQuantizer
from st_block import OnlineKMeans, STTransformer, command, new_parser, patchify, stop

# ------------------------------------------------------------------------------- broken LAMs


class Blind(OurLatentActionModel):
    """a_t is computed without x_{t+1}: the encoder looks one transition back."""

    def features(self, x):
        return super().features(torch.cat([x[:, :1], x[:, :-1]], 1))


class Leak(OurLatentActionModel):
    """The decoder sees the frame that it must draw: its mask has one diagonal too many."""

    def __init__(self, dim, layers, heads, **config):
        super().__init__(dim=dim, layers=layers, heads=heads, **config)
        tokens = len(self.decoder.place)
        self.decoder = STTransformer(tokens, dim, layers, heads, window=2, ffw=self.ffw)
        self.decoder.visible = this_frame_and_the_next


def this_frame_and_the_next(T, device):
    return torch.ones(T, T, dtype=torch.bool, device=device).tril(1).triu(0)


class OneWay(OurLatentActionModel):
    """Each pair of frames is read forwards only, and the reading itself is quantized."""

    def features(self, x):
        patches = patchify(2 * x - 1, self.patch)                   # (B, T, N, P*P*C)
        pairs = torch.cat([patches[:, :-1], patches[:, 1:]], -1)
        return self.to_latent(self.read(pairs).mean(2))


class OnePart(OurLatentActionModel):
    """One k-means quantizes the whole vector."""
    quantizer = OnlineKMeans


class AnyLength(OnlineKMeans):
    def norm(self, z):
        return z.float()


class NoNorm(OurLatentActionModel):
    """Vectors are quantized as they come, at any length."""

    class quantizer(TwoPartQuantizer):
        kmeans = AnyLength


class StaysDead(OnlineKMeans):
    dead_below = 0.0

    def __init__(self, *args):
        super().__init__(*args)
        # every code counts as if one vector had chosen it: none is revived at the start
        self.mean_sum.copy_(self.codebook)
        self.mean_count.fill_(1.0)


class NoRevival(OurLatentActionModel):
    """Codes begin as random directions, and a dead one stays dead."""

    class quantizer(TwoPartQuantizer):
        kmeans = StaysDead


class Neither(StaysDead, AnyLength):
    pass


class Dead(OurLatentActionModel):
    """no-norm and no-revival together."""

    class quantizer(TwoPartQuantizer):
        kmeans = Neither


# ------------------------------------------------------------------------------- broken dynamics


class Late(OurDynamics):
    """In training, every action is attached to the frame after the one that it leads to."""

    def forward(self, z, a):
        return super().forward(z, F.pad(a[:, :-1], (1, 0)))


def every_frame(T, device):
    return torch.ones(T, T, dtype=torch.bool, device=device)


class Acausal(OurDynamics):
    """In training, a frame looks at all frames, later ones too."""

    def __init__(self, **config):
        super().__init__(**config)
        self.transformer.visible = every_frame


class AcausalStreams(Streams):
    """The same, where a masked frame sees its own clean copy beside it."""

    def two_streams(self, T, device):
        time, mask = super().two_streams(T, device)
        return time, torch.ones_like(mask)


# ------------------------------------------------------------------------------- the rows

# In clips of two frames there is no transition before and no frame to leak, so clips have four.
FOUR = ["--frames", "4", "--batch", "16"]
# name: the model, flags of its stage, and what is broken or other
LAMS = {
    "none": (None, FOUR, "nothing: --recipe ours"),
    "paper": (None, ["--recipe", "paper"], "nothing: --recipe paper"),
    "blind": (Blind, FOUR, Blind.__doc__),
    "leak": (Leak, FOUR, Leak.__doc__),
    "one-way": (OneWay, FOUR, OneWay.__doc__),
    "one-part": (OnePart, FOUR, OnePart.__doc__),
    "no-norm": (NoNorm, FOUR, NoNorm.__doc__),
    "no-revival": (NoRevival, FOUR, NoRevival.__doc__),
    "dead": (Dead, FOUR, Dead.__doc__),
}
WORLDS = {
    "world": (None, [], "nothing: --recipe ours"),
    "late": (Late, [], Late.__doc__),
    "acausal": (Acausal, [], Acausal.__doc__),
    "acausal-streams": (AcausalStreams, [], AcausalStreams.__doc__),
    "streams": (Streams, [], "A clean past beside a masked copy of the clip."),
    "blank": (Blank, [], "The paper's blank canvas."),
    "prepend": (Prepend, [], "The action as one more token of the frame."),
    "cotrain": (None, ["--cotrain"], "The LAM learns beside it, as in the paper."),
}
SCORES_OF_LAM = ("codes_in_use", "code_perplexity", "psnr", "copy_psnr", "lam_gain",
                 "action_accuracy", "chance", "nmi")
SCORES_OF_WORLD = ("training_loss", "held_out_loss", "delta_psnr", "delta_psnr_se", "psnr_t4",
                   "copy_psnr_t4")


def main(argv=None):
    p = new_parser(__doc__)
    p.add_argument("--only", nargs="+", choices=[*LAMS, *WORLDS], metavar="ROW",
                   help="rows to run (default: all)")
    p.add_argument("--list", action="store_true", help="say what is broken in each row, and stop")
    p.add_argument("--run", type=Path, default=Path("runs/collapse"),
                   help="folder for the rows (default: %(default)s)")
    p.add_argument("--device", default="cpu", help="cpu, cuda ... (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="of all trainings (default: %(default)s)")
    p.add_argument("--steps", type=int, help="of each training (default: those of size test)")
    args = p.parse_args(argv)
    if args.list:
        for name, (_, _, what) in (LAMS | WORLDS).items():
            print(f"{name:>16}  {what}")
        return
    wanted = args.only or [*LAMS, *WORLDS]
    make_data(args)
    run_row(tokenizer, "tokenizer", None, [], args)
    # the worlds stand on the LAM of the first row
    lams = [name for name in LAMS if name in wanted or name == "none"]
    worlds = [name for name in WORLDS if name in wanted]
    for name in lams:
        model, flags, _ = LAMS[name]
        run_row(lam, name, model, flags, args)
    for name in worlds:
        model, flags, _ = WORLDS[name]
        borrow(args.run / "tokenizer", args.run / name)
        borrow(args.run / "none", args.run / name)
        run_row(dynamics, name, model, flags, args)
    print()
    print_table(args.run, "lam", lams, SCORES_OF_LAM)
    if worlds:
        print_table(args.run, "dynamics", worlds, SCORES_OF_WORLD)


def make_data(args):
    """A small data set of the built-in game: 120 training levels of 100 frames."""
    if not (args.run / "data").exists():
        data.build_platformer(args.run / "data", 120, 100, 0, False)


def run_row(stage, name, model_class, flags, args):
    """Train one row in a folder of its own, unless its scores are there."""
    folder = args.run / name
    if (folder / f"{stage.__name__}.json").exists():
        return
    print(f"\n{name}: {stage.__name__}")
    flags = ["--size", "test", "--device", args.device, "--seed", str(args.seed), "--overwrite",
             "--data", str(args.run / "data"), "--run", str(folder), *flags]
    if args.steps:
        flags += ["--steps", str(args.steps)]
    # what a stage prints of its scores comes again in the table
    with contextlib.redirect_stdout(None):
        stage.main(flags, model_class=model_class)


def borrow(source, target):
    """Copy the trained models of another row, and the tokens made by them."""
    target.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.pt", "lam.pt", "tokens.pt"):
        if (source / name).exists() and not (target / name).exists():
            shutil.copy(source / name, target / name)


def print_table(run, stage, rows, names):
    """Print a table in Markdown: a line for each row, a column for each score."""
    print(f"| {stage} | {' | '.join(names)} |")
    print("|" + "---|" * (len(names) + 1))
    for row in rows:
        try:
            found = json.loads((run / row / f"{stage}.json").read_text())
        except (OSError, ValueError) as e:
            stop(f"{run / row / stage}.json cannot be read ({e}); delete {run / row}, and it will "
                 "be made anew")
        _, found["training_loss"], found["held_out_loss"] = found["curve"][-1]
        cells = [f"{found[name]:.3g}" if name in found else "" for name in names]
        print(f"| {row} | {' | '.join(cells)} |")
    print()


if __name__ == "__main__":
    command(main)
