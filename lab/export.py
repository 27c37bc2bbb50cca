"""Write a world for play alone, to hand it on: a tenth of the bytes, and nothing to train with.

    python -m lab.export --run runs/platformer --to my_world
    python play.py --run my_world          # who has the folder plays it like any other

The folder gets the tokenizer and the dynamics in half precision, without their optimizers, and the
scores of all three stages, which say what the codes mean. Of the LAM only the codebook is needed,
and the dynamics has a copy. The files are written all together, or none is.
"""
from pathlib import Path

import torch

from play import load
from st_block import command, lock, new_parser, read_checkpoint, stop, write_atomically

STAGES = ("tokenizer", "lam", "dynamics")


def halved(weights):
    """The weights of a model in half precision, {name: tensor}, but for what does not fit in it."""
    small = {}
    for name, w in weights.items():
        half = w.half() if w.is_floating_point() else w
        # some counts of the training are above 65504; play has no use for them
        small[name] = half if half.isfinite().all() else w
    return small


def is_training(folder):
    """Does a checkpoint with an optimizer lie there?"""
    for stage in STAGES:
        path = folder / f"{stage}.pt"
        if path.exists() and read_checkpoint(path, stage)["optimizer"] is not None:
            return True
    return False


def export(run, to):
    """Write the world of the folder `run` to the folder `to`.

    Ends with one sentence, and nothing written, if the stages do not fit together, or if a
    training in `to` would be overwritten.
    """
    if to.resolve() == run.resolve():
        stop(f"--to {to} would write weights for play alone over those of --run; name another "
             "folder")
    if is_training(to):
        stop(f"--to {to} holds a training, which would be lost; name another folder")
    if to.exists():
        lock(to)
    # is all there, and was it trained together?
    load(run, "cpu")

    files = []
    for stage in ("tokenizer", "dynamics"):
        ckpt = read_checkpoint(run / f"{stage}.pt", stage)
        ckpt |= dict(optimizer=None, model=halved(ckpt["model"]))
        files.append((to / f"{stage}.pt", saving(ckpt)))
    for stage in STAGES:
        path = run / f"{stage}.json"
        if path.exists():
            files.append((to / path.name, writing(path.read_bytes())))
    (path, write), *more = files
    write_atomically(path, write, *more)
    size = sum(path.stat().st_size for path, _ in files)
    print(f"{to}: {len(files)} files, {size / 1e6:.1f} MB")


def saving(ckpt):
    """What writes a checkpoint to an open file."""
    def write(file):
        torch.save(ckpt, file)
    return write


def writing(data):
    """What writes bytes to an open file."""
    def write(file):
        file.write(data)
    return write


def main(argv=None):
    p = new_parser(__doc__)
    p.add_argument("--run", type=Path, required=True, help="the folder of a trained world")
    p.add_argument("--to", type=Path, required=True, help="the folder to write to")
    args = p.parse_args(argv)
    export(args.run, args.to)


if __name__ == "__main__":
    command(main)
