"""Score a trained world: how good are its pictures, and do they obey the keys?

    python -m lab.score                          # the world of runs/platformer
    python -m lab.score --data data/mine         # the world that was trained on your own videos
    python -m lab.score --run assets             # the world that ships
    python -m lab.score --only arrows hero       # some of the scores, see --only
    python -m lab.score --prompts 20             # fewer starting frames, for a first impression

It prints one table and writes it to scores.json. A score that the world cannot have is named on
stderr, with the reason. Each score begins with the same random numbers, so it is the same alone
and among others. The world is sampled as play.py samples it, unless the flags say otherwise.
"""
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import lam as lam_stage
import play
from data import ACTIONS, COIN, PLAYER_W, PLAYER_X, Clips, displacement, psnr
from dynamics import SAMPLING, delta_psnr
from lab.fvd import score_fvd
from st_block import (check_writable, command, find_device, fingerprint, load_model, new_parser,
                      stop, write_json)

# all scores, in the order of the table
NAMES = ("stages", "delta", "counterfactual", "arrows", "fvd", "hero")

# what a stage measured when it was trained, and what of it belongs in the table
MEASURED = dict(
    tokenizer=("psnr", "copy_psnr", "tokens_in_use", "token_perplexity"),
    lam=("psnr", "copy_psnr", "codes_in_use", "code_perplexity", "lam_gain", "action_accuracy",
         "action_accuracy_se", "chance", "nmi"),
)

# delta_psnr: how many frames ahead, on how many held-out clips, at which frames t
DELTAS = (
    (4, 256, (1, 4)),
    (16, 64, (16,)),
    (64, 16, (64,)),
)

# the buttons that score_arrows holds, one after the other. No jump on the spot: it moves the view
# no more than no button does
HELD = [ACTIONS.index(word) for word in ("left", "right", "left+jump", "right+jump", "none")]


# ------------------------------------------------------------------------------- the stages


def score_stages(folder):
    """What the stages measured when they were trained, from their NAME.json in a run folder."""
    result = {}
    for stage, names in MEASURED.items():
        known = play.read_scores(folder / f"{stage}.json")
        for name in names:
            if name in known:
                result[f"{stage}.{name}"] = known[name]
    return result


# ------------------------------------------------------------------------------- delta_psnr


@torch.inference_mode()
def score_delta(tokenizer, dynamics, lam, data_root, sampling, device="cpu"):
    """Controllability (section 3, Metrics), 1, 4, 16 and 64 frames ahead, on held-out clips.

    sampling: how to sample, see `generate`. Returns a dictionary, all in dB:
        delta_psnr_tT           PSNR of frame T with inferred actions, minus that with random ones
        delta_psnr_tT_se        its standard error over clips
        psnr_tT, copy_psnr_tT   PSNR with inferred actions, and of the first frame kept
        delta_psnr_curve_T      a list: the difference at each frame from 1 to T
    Where no held-out episode is long enough, entries are missing, and a line on stderr says so.
    """
    result = {}
    longest = max(Clips(data_root, "valid", 1).meta["episodes"]["valid"])
    for frames, n, moments in DELTAS:
        if longest <= frames:
            print(f"no delta {frames} frames ahead: no held-out episode is as long",
                  file=sys.stderr)
            continue
        clips = Clips(data_root, "valid", frames + 1, device)
        x = clips.at(clips.spread(n))                               # (n, frames + 1, H, W, C)
        inferred, random, kept = delta_psnr(dynamics, tokenizer, lam, x, frames, sampling)
        delta = inferred - random                                   # (n, frames)
        for t in moments:
            at_t = delta[:, t - 1]                                  # (n,)
            result[f"delta_psnr_t{t}"] = at_t.mean().item()
            result[f"delta_psnr_t{t}_se"] = (at_t.std() / len(x) ** 0.5).item()
            result[f"psnr_t{t}"] = inferred[:, t - 1].mean().item()
            result[f"copy_psnr_t{t}"] = kept[:, t - 1].mean().item()
        curve = [round(value, 3) for value in delta.mean(0).tolist()]
        result[f"delta_psnr_curve_{frames}"] = curve
    return result


# ------------------------------------------------------------------------------- counterfactual


@torch.inference_mode()
def score_counterfactual(game, supply, prompts=100):
    """From one real frame, press each code: is the next frame that of the true game?

    The true game is played under the button that the code means (`meaning` of lam.py). supply: see
    play.starts. Returns a dictionary, all in dB, means over prompts and codes:
        counterfactual_psnr             PSNR of the drawn frame
        counterfactual_psnr_se          its standard error over prompts
        counterfactual_psnr_tokenizer   the same for the true frame, encoded and decoded
        counterfactual_copy_psnr        the same for the first frame kept
    """
    result = np.zeros((prompts, game.K, 3), np.float32)
    for i in tqdm(range(prompts), desc="every button", dynamic_ncols=True):
        game.reset(*next(supply))
        first = game.first                                          # (H, W, C)
        drawn = torch.from_numpy(game.every_button())               # (K, H, W, C)
        state = game.true.save()
        for code, button in enumerate(game.meaning):
            # what the true game shows
            game.true.step(button)
            truth = torch.from_numpy(game.true.frame()).float() / 255
            game.true.restore(state)
            # what the tokenizer makes of it; it may see the frame before
            pair = torch.stack([first, truth])[None].to(game.device)    # (1, 2, H, W, C)
            pair = game.tokenizer.decode(game.tokenizer.encode(pair))
            for column, frame in enumerate((drawn[code], pair[0, 1].cpu(), first)):
                result[i, code, column] = psnr(frame, truth)
    model, tokenizer, copy = result.mean((0, 1)).tolist()
    by_prompt = result[..., 0].mean(1)                              # (prompts,)
    return dict(counterfactual_psnr=model,
                counterfactual_psnr_se=standard_error(by_prompt),
                counterfactual_psnr_tokenizer=tokenizer,
                counterfactual_copy_psnr=copy)


# ------------------------------------------------------------------------------- arrow keys


def score_arrows(game, supply, prompts=200, presses=10):
    """Play the world beside the true game: does an arrow key move both the same way?

    A press counts as right if the view of the world moved left, right or not at all, just as that
    of the true game did. supply: see play.starts. Two scripts are played. In the first, `held`, a
    prompt has one button throughout, see HELD. In the second, `varied`, every press has a button
    of its own, any of the six, so that most come in mid-air or on the run. Returns a dictionary:
        arrow_presses                   the number of presses in each script
        arrow_keys_SCRIPT               the share of presses that were right
        arrow_keys_SCRIPT_se            its standard error over prompts
        arrow_keys_SCRIPT_walls         the number of presses at a wall: sideways, and the true
                                        hero could not go there
        arrow_keys_SCRIPT_at_walls      the share that was right of these, None if there are none
        arrow_keys_SCRIPT_elsewhere     the share that was right of all others
    """
    rng = np.random.default_rng(0)
    result = dict(arrow_presses=prompts * presses)
    for script in ("held", "varied"):
        right = np.zeros((prompts, presses), bool)
        wall = np.zeros((prompts, presses), bool)
        for i in tqdm(range(prompts), desc=f"arrow keys, {script}", dynamic_ncols=True):
            if script == "held":
                buttons = np.full(presses, HELD[i % len(HELD)])
            else:
                buttons = rng.integers(len(ACTIONS), size=presses)
            game.reset(*next(supply))
            right[i], wall[i] = play_beside(game, buttons)
        name = f"arrow_keys_{script}"
        result[name] = float(right.mean())
        result[f"{name}_se"] = standard_error(right.mean(1))
        result[f"{name}_walls"] = int(wall.sum())
        result[f"{name}_at_walls"] = share(right[wall])
        result[f"{name}_elsewhere"] = share(right[~wall])
    return result


def play_beside(game, buttons):
    """Press true buttons (presses,), indices of data.ACTIONS, in the world and in the true game.

    Returns two arrays of bool (presses,): did both views move the same way sideways, and did the
    button say left or right while the true hero stayed where he was, at a wall?
    """
    frames = [game.frame]
    places = [game.true.x]
    for button in buttons:
        frames.append(game.press(game.keys[button], button))
        places.append(game.true.x)
    drawn = torch.from_numpy(np.stack(frames))                      # (presses + 1, H, W, C)
    seen = displacement(drawn[:-1], drawn[1:])[:, 0].numpy()        # (presses,), pixels
    moved = np.diff(places)                                         # (presses,), pixels
    sideways = buttons % 3 > 0
    return np.sign(seen) == np.sign(moved), sideways & (moved == 0)


# ------------------------------------------------------------------------------- the hero


def score_hero(game, supply, prompts=40, frames=32):
    """Is the hero still there, and only once? He is played by a new random button every 4 frames.

    The size of the hero is measured by his pixels, see `hero_pixels`, in units of those that he
    has in the prompt. supply: see play.starts. Returns a dictionary of shares of frames:
        hero_once               size between 0.6 and 1.4
        hero_once_se            its standard error over prompts
        hero_gone               size 0.6 or less
        hero_doubled            size 1.4 or more
        hero_once_true_game     hero_once of the true game, where he may jump half out of the frame
    """
    rng = np.random.default_rng(0)
    drawn = np.zeros((prompts, frames))
    true = np.zeros((prompts, frames))
    for i in tqdm(range(prompts), desc="the hero", dynamic_ncols=True):
        game.reset(*next(supply))
        colour = game.true.look.player
        one = hero_pixels(game.true.frame() / 255, colour)
        for t in range(frames):
            if t % 4 == 0:
                button = rng.integers(len(ACTIONS))
            frame = game.press(game.keys[button], button)           # (H, W, C)
            drawn[i, t] = hero_pixels(frame, colour) / one
            true[i, t] = hero_pixels(game.true.frame() / 255, colour) / one
    once = (drawn > 0.6) & (drawn < 1.4)
    once_true = (true > 0.6) & (true < 1.4)
    return dict(hero_once=float(once.mean()),
                hero_gone=float((drawn <= 0.6).mean()),
                hero_doubled=float((drawn >= 1.4).mean()),
                hero_once_true_game=float(once_true.mean()),
                hero_once_se=standard_error(once.mean(1)))


def hero_pixels(frame, colour):
    """How many pixels of a frame (H, W, C) in [0, 1] have the hero's colour, in his columns.

    colour: (red, green, blue), bytes. A pixel counts if no channel is off by 0.15 or more, and if
    it is nearer to the hero's colour than to a coin's: at night both are yellow.
    """
    strip = frame[:, PLAYER_X:PLAYER_X + PLAYER_W]                  # (H, PLAYER_W, C)
    from_hero = np.abs(strip - np.array(colour) / 255).max(-1)      # (H, PLAYER_W)
    from_coin = np.abs(strip - np.array(COIN) / 255).max(-1)        # (H, PLAYER_W)
    return (from_hero < np.minimum(0.15, from_coin)).sum()


# ------------------------------------------------------------------------------- which scores


def standard_error(by_prompt):
    """The standard error of the mean of values (prompts,), a float."""
    return float(by_prompt.std() / len(by_prompt) ** 0.5)


def share(right):
    """The share of true values in an array of bool (n,), a float; None of no values at all."""
    return float(right.mean()) if len(right) else None


def obstacle(name, game, folder):
    """Why the world of a run folder cannot have a score: a clause. None if it can."""
    if name in ("delta", "fvd") and not (folder / "lam.pt").exists():
        return f"it needs a LAM to infer actions, and {folder} has no lam.pt"
    if name in ("counterfactual", "arrows", "hero"):
        if not game.built_in:
            return "it compares with the true game, and this world was trained on other videos"
        if not game.keys or not game.meaning:
            return f"{folder}/lam.json does not say which button a code means"
    return None


def load_lam(folder, device):
    """The LAM of a run folder, frozen."""
    lam, _ = load_model(folder / "lam.pt", lam_stage.build, "lam", device)
    return lam


def check_lam(lam, game, folder, data_root):
    """End the program unless the world of a run folder was trained on this LAM and this data."""
    if fingerprint(lam) != game.origin["lam"]:
        stop(f"{folder}/dynamics.pt was trained on another lam than {folder}/lam.pt; train it "
             "again: python dynamics.py (and the same --data and --run)")
    play.same_data(game, data_root, folder)


def measure(name, game, lam, sampling, args):
    """One of NAMES: a dictionary of scores. game: fresh. lam: None where the score needs none."""
    # the number of prompts, where it was given
    how = {}
    if args.prompts is not None:
        how["prompts"] = args.prompts
    supply = play.starts(game, args.seed, data=args.data, run=args.run)
    models = game.tokenizer, game.dynamics, lam
    if name == "stages":
        return score_stages(args.run)
    if name == "delta":
        return score_delta(*models, args.data, sampling, args.device)
    if name == "fvd":
        return score_fvd(*models, args.data, args.out.parent, sampling, device=args.device)
    if name == "counterfactual":
        return score_counterfactual(game, supply, **how)
    if name == "arrows":
        return score_arrows(game, supply, **how)
    return score_hero(game, supply, **how)


# ------------------------------------------------------------------------------- command line


def read_arguments(argv):
    """The command line as a namespace. Ends with one sentence if it makes no sense."""
    p = new_parser(__doc__)
    add = p.add_argument
    ours = SAMPLING["ours"]
    paper = SAMPLING["paper"]
    add("--data", type=Path, default=Path("data/platformer"),
        help="the data that the world was trained on (default: %(default)s)")
    add("--run", type=Path, help="folder of the world (default: runs/NAME OF THE DATA)")
    add("--only", nargs="+", choices=NAMES, metavar="NAME",
        help="stages: what the stages measured when they were trained; delta: delta_psnr; "
             "counterfactual: each code from one frame; arrows: the arrow keys; fvd: see lab.fvd; "
             "hero: is he still there? (default: all of them)")
    add("--prompts", type=int,
        help="starting frames (default: 200 for arrows, 100 for counterfactual, 40 for hero)")
    add("--maskgit", type=int,
        help=f"MaskGIT steps per frame (default: {ours['steps']}; for a world of --recipe paper "
             f"{paper['steps']})")
    add("--temperature", type=float,
        help=f"of the sampled tokens (default: {ours['temperature']:g}; for a world of --recipe "
             f"paper {paper['temperature']:g})")
    add("--order", choices=("random", "confidence"), default="random",
        help="which of the sampled tokens stay, see maskgit in dynamics.py (default: %(default)s)")
    add("--least", type=float, default=0.02, metavar="SHARE",
        help="see play.py; 0: codes are played as pressed (default: %(default)s)")
    add("--seed", type=int, default=0, help="which starting frames (default: %(default)s)")
    add("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    add("--out", type=Path, metavar="FILE.json",
        help="where the scores go (default: scores.json in the folder of --run; of the world that "
             "ships, runs/platformer/scores.json)")
    args = p.parse_args(argv)
    fine = [
        args.prompts is None or args.prompts >= 1,
        args.maskgit is None or args.maskgit >= 1,
        args.temperature is None or args.temperature >= 0,
        0 <= args.seed <= 10 ** 9,
        0 <= args.least <= 0.1,
    ]
    if not all(fine):
        stop("--prompts and --maskgit must be at least 1, --temperature and --seed not negative "
             "(a seed at most a billion), --least from 0 to 0.1")
    args.device = find_device(args.device)
    args.run = args.run or Path("runs") / args.data.name
    if args.out is None:
        # the world that ships stays as it is
        ships = args.run.resolve() == play.ASSETS.resolve()
        args.out = (Path("runs/platformer") if ships else args.run) / "scores.json"
    return args


def main(argv=None):
    args = read_arguments(argv)
    wanted = [name for name in NAMES if name in (args.only or NAMES)]

    lam = None
    if {"delta", "fvd"} & set(wanted) and (args.run / "lam.pt").exists():
        lam = load_lam(args.run, args.device)
    models = play.load(args.run, args.device)
    recipe = models[-1]
    asked = dict(steps=args.maskgit, temperature=args.temperature, order=args.order)
    sampling = SAMPLING[recipe] | {name: v for name, v in asked.items() if v is not None}

    # what can be scored? Better asked before an hour of play than after it
    game = play.Game(models, args.device, args.least, **sampling)
    possible = []
    for name in wanted:
        reason = obstacle(name, game, args.run)
        if reason:
            print(f"no {name}: {reason}", file=sys.stderr)
        else:
            possible.append(name)
    if not possible:
        stop("none of these scores can be measured")
    if lam is not None:
        check_lam(lam, game, args.run, args.data)
    check_writable(args.out.parent)

    result = dict(sampling, least=args.least, seed=args.seed)
    if args.prompts is not None:
        result["prompts"] = args.prompts
    for name in possible:
        # a game of its own, and the same random numbers as all the others have
        torch.manual_seed(0)
        game = play.Game(models, args.device, args.least, **sampling)
        result |= measure(name, game, lam, sampling, args)

    for name, value in result.items():
        print(f"{name:>32}  {round(value, 3) if isinstance(value, float) else value}")
    write_json(args.out, result)
    print(f"{args.out}: these scores")


if __name__ == "__main__":
    command(main)
