"""The ceiling of action_accuracy: the encoder of our LAM, trained WITH the true buttons.

    python -m lab.oracle                     # of data/platformer -> runs/platformer/oracle.json
    python -m lab.oracle --seed 1 --run runs/s1

It learns as long and on as many clips as the LAM does, from labels that no LAM ever sees. A LAM
may pass it by a little, because the oracle sees no shifted clips. The flags are those of lam.py.
"""
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import lam as lam_stage
from data import ACTIONS, Clips, true_actions
from st_block import (autocast, check_patch, check_writable, command, make_optimizer, parser,
                      prepare, schedule, settle, stop, write_json)


class Oracle(lam_stage.OurLatentActionModel):
    """Our encoder with a head that names the true button."""

    def __init__(self, latent_dim, **config):
        super().__init__(latent_dim=latent_dim, **config)
        self.to_button = nn.Linear(latent_dim, len(ACTIONS))

    def forward(self, x):
        """Clips x (B, T, H, W, C) -> logits of the buttons (B, T-1, 6)."""
        return self.to_button(self.vq.norm(self.features(x)))

    def encode(self, x):
        """Clips x (B, T, H, W, C) -> the likeliest buttons (B, T-1)."""
        return self(x).argmax(-1)


def train(args):
    """An Oracle trained on the true buttons of the training levels."""
    known = true_actions(args.data, "train")
    if known is None:
        stop(f"nobody knows the true actions of {args.data}: there is no ceiling to measure")
    buttons = torch.from_numpy(known[0]).long().to(args.device)     # (F,)
    clips = Clips(args.data, "train", args.frames, args.device)
    height, width, _ = clips.meta["frame"]
    check_patch(args.patch, height, width)
    config = {name: getattr(args, name) for name in lam_stage.MODEL}
    torch.manual_seed(args.seed)
    model = Oracle(height=height, width=width, window=args.frames, **config).to(args.device)
    optimizer = make_optimizer(model, args.lr)
    prepare(model, args)
    for step in tqdm(range(args.steps), desc="oracle", dynamic_ncols=True):
        schedule(optimizer, step, args)
        # a batch of random clips and the buttons pressed in them
        starts = clips.draw(args.batch)
        index = torch.from_numpy(starts[:, None] + np.arange(args.frames - 1))
        target = buttons[index.to(args.device)]                     # (B, T-1)
        with autocast(args):
            logits = model(clips.at(starts))                        # (B, T-1, 6)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), target.flatten())
        # learn from the error
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


def main(argv=None):
    args = settle(parser(__doc__, lam_stage.KNOBS, {}).parse_args(argv), "lam")
    if args.recipe != "ours" or args.resume or args.world > 1:
        stop("the oracle is our encoder, trained in one go by one process: "
             "leave out --recipe, --resume and torchrun")
    check_writable(args.run)
    model = train(args)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        scores, _ = lam_stage.score_actions(model, args)
    # the very button, by the best constant guess
    pressed, _, _ = true_actions(args.data, "valid")
    scores["strict_chance"] = float(np.bincount(pressed).max() / len(pressed))
    path = args.run / "oracle.json"
    write_json(path, scores | dict(seed=args.seed, steps=args.steps))
    print(f"action_accuracy with true labels: {scores['action_accuracy']:.3f} "
          f"+- {scores['action_accuracy_se']:.3f} (chance {scores['chance']:.3f}), "
          f"strict_accuracy {scores['strict_accuracy']:.3f} "
          f"(chance {scores['strict_chance']:.3f}), "
          f"nmi {scores['nmi']:.3f}; all of it in {path}")


if __name__ == "__main__":
    command(main)
