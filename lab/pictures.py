"""Draw two pictures of a trained world: how control fades with time, and MaskGIT at work.

    python -m lab.pictures                      # the world of runs/platformer
    python -m lab.pictures --data data/mine     # the world that was trained on your own videos

delta_psnr.png shows the PSNR of generated frames, up to 16 frames ahead: under the actions that
the LAM inferred from real clips, under random actions, and of the prompt kept. The gap between the
first two is delta_t PSNR (section 3, Metrics). maskgit.gif shows how MaskGIT fills in the tokens
of a frame, step by step. Both go to the folder of the world, which must have tokenizer.pt, lam.pt
and dynamics.pt. The world is sampled as play.py samples it, unless the flags say otherwise.
"""
from pathlib import Path

import torch

import play
from data import Clips
from dynamics import SAMPLING, delta_psnr, new_world
from lab.score import check_lam, load_lam
from st_block import (check_writable, command, find_device, new_parser, patchify,
                      pyplot_for_files, save_figure, stop, unpatchify, write_gif)

# the curves of delta_psnr.png: what they are called, and how they are drawn
CURVES = (
    ("inferred actions", "-o"),
    ("random actions", "--o"),
    ("the prompt, kept", ":"),
)


# ------------------------------------------------------------------------------- delta_psnr.png


def curves(tokenizer, dynamics, lam, data_root, sampling, device="cpu", most=16, clips=32):
    """PSNR of generated frames, as `delta_psnr` returns it: (3, clips, frames), on the CPU.

    There are `most` frames, or fewer where no held-out episode is longer. sampling: see `generate`.
    """
    longest = max(Clips(data_root, "valid", 1).meta["episodes"]["valid"])
    frames = min(most, longest - 1)
    data = Clips(data_root, "valid", frames + 1, device)
    x = data.at(data.spread(clips))                                 # (clips, frames + 1, H, W, C)
    return delta_psnr(dynamics, tokenizer, lam, x, frames, sampling).cpu()


def draw_curves(found, path):
    """Draw what `curves` returned, with standard errors over clips, and print it as a table."""
    plt = pyplot_for_files()
    _, clips, frames = found.shape
    time = range(1, frames + 1)
    mean = found.mean(1)                                            # (3, frames)
    error = found.std(1) / clips ** 0.5                             # (3, frames)

    figure, axes = plt.subplots(figsize=(6, 3.5))
    for (label, style), middle, spread in zip(CURVES, mean, error):
        axes.plot(time, middle, style, label=label, markersize=3)
        axes.fill_between(time, middle - spread, middle + spread, alpha=0.2)
    axes.set(xlabel="generated frame t", ylabel="PSNR, dB",
             title=f"the gap is delta_t PSNR ({clips} held-out clips)")
    axes.legend()
    save_figure(path, figure, "how control fades with t")
    plt.close(figure)

    print("    t  inferred    random      kept     delta  (PSNR, dB)")
    for t, row in zip(time, mean.T):
        inferred, random, kept = row.tolist()
        print(f"{t:5d}{inferred:10.2f}{random:10.2f}{kept:10.2f}{inferred - random:10.2f}")


# ------------------------------------------------------------------------------- maskgit.gif


@torch.no_grad()
def film_of_maskgit(tokenizer, dynamics, lam, x, frames=6, steps=8, **sampling):
    """How MaskGIT fills in the frames after the first one of clip x (1, T, H, W, C), T > frames.

    Returns a list of pictures (H, W, C), on the CPU: the first frame, four times, then each of
    `frames` frames after each of `steps` steps. What is still masked is grey.
    """
    world = new_world(dynamics, steps=steps, **sampling)
    actions = lam.encode(x)                                         # (1, T-1)
    past = tokenizer.encode(x[:, :1])                               # (1, 1, N)
    world.prompt(past)
    film = [tokenizer.decode(past)[0, -1]] * 4
    for t in range(frames):
        drafts = []
        z = world.step(actions[:, t], film=drafts)                  # (1, 1, N)
        for draft in drafts:
            film.append(with_holes(tokenizer, past, draft, dynamics.MASK))
        past = torch.cat([past, z], 1)
    return [picture.cpu() for picture in film]


def with_holes(tokenizer, past, draft, MASK):
    """A picture (H, W, C) of a draft (1, 1, N) after frames past (1, T, N). Its holes are grey."""
    hole = draft == MASK                                            # (1, 1, N)
    # a hole has no pixels: decode what was there a frame ago, and paint over it
    z = torch.cat([past, torch.where(hole, past[:, -1:], draft)], 1)    # (1, T+1, N)
    pixels = tokenizer.decode(z)[:, -1:]                            # (1, 1, H, W, C)
    patches = patchify(pixels, tokenizer.patch)                     # (1, 1, N, P*P*C)
    patches = patches.masked_fill(hole[..., None], 0.5)
    return unpatchify(patches, tokenizer.patch, tokenizer.height, tokenizer.width)[0, 0]


# ------------------------------------------------------------------------------- command line


def read_arguments(argv):
    """The command line as a namespace. Ends with one sentence if it makes no sense."""
    p = new_parser(__doc__)
    add = p.add_argument
    add("--data", type=Path, default=Path("data/platformer"),
        help="the data that the world was trained on (default: %(default)s)")
    add("--run", type=Path, help="folder of the world (default: runs/NAME OF THE DATA)")
    add("--maskgit", type=int, help="MaskGIT steps per frame, for delta_psnr.png (default: as in "
                                    "play.py)")
    add("--temperature", type=float, help="of the sampled tokens (default: as in play.py)")
    add("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    args = p.parse_args(argv)
    fine = [
        args.maskgit is None or args.maskgit >= 1,
        args.temperature is None or args.temperature >= 0,
    ]
    if not all(fine):
        stop("--maskgit must be at least 1, and --temperature not negative")
    args.device = find_device(args.device)
    args.run = args.run or Path("runs") / args.data.name
    return args


def main(argv=None):
    args = read_arguments(argv)
    lam = load_lam(args.run, args.device)
    models = play.load(args.run, args.device)
    tokenizer, dynamics, _, _, recipe = models
    check_lam(lam, play.Game(models, args.device), args.run, args.data)
    check_writable(args.run)
    asked = dict(steps=args.maskgit, temperature=args.temperature)
    sampling = SAMPLING[recipe] | {name: v for name, v in asked.items() if v is not None}

    torch.manual_seed(0)
    found = curves(tokenizer, dynamics, lam, args.data, sampling, args.device)
    draw_curves(found, args.run / "delta_psnr.png")

    # the second of the three clips in dynamics.png, in eight steps, however many play takes
    torch.manual_seed(0)
    data = Clips(args.data, "valid", 9, args.device)
    x = data.at(data.spread(5)[2:3])                                # (1, 9, H, W, C)
    film = film_of_maskgit(tokenizer, dynamics, lam, x, temperature=sampling["temperature"],
                           order=sampling["order"])
    write_gif(args.run / "maskgit.gif", film, fps=5)


if __name__ == "__main__":
    command(main)
