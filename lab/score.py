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
from data import (ACTIONS, COIN, PLAYER_W, PLAYER_X, Clips, displacement, psnr,
                  standard_error, way_of)
from dynamics import SAMPLING, delta_psnr
from lab import coinrun
from lab.fvd import score_fvd
from st_block import (check_writable, command, find_device, fingerprint, load_model, new_parser,
                      stop, write_json)

# all scores, in the order of the table
NAMES = ("stages", "delta", "codes", "counterfactual", "obeyed", "arrows", "fvd", "hero")

# what a stage measured when it was trained, and what of it belongs in the table
MEASURED = dict(
    tokenizer=("psnr", "copy_psnr", "tokens_in_use", "token_perplexity"),
    lam=("psnr", "copy_psnr", "codes_in_use", "code_perplexity", "lam_gain", "action_accuracy",
         "action_accuracy_se", "strict_accuracy", "chance", "nmi"),
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
def score_delta(tokenizer, dynamics, lam, data_root, split, sampling, device="cpu"):
    """Controllability (section 3, Metrics), 1, 4, 16 and 64 frames ahead, on held-out clips.

    sampling: how to sample, see `generate`. Returns a dictionary, all in dB:
        delta_psnr_tT           PSNR of frame T with inferred actions, minus that with random ones
        delta_psnr_tT_se        its standard error over levels
        psnr_tT, copy_psnr_tT   PSNR with inferred actions, and of the first frame kept
        delta_psnr_curve_T      a list: the difference at each frame from 1 to T
    Where no held-out episode is long enough, entries are missing, and a line on stderr says so.
    """
    result = {}
    longest = max(Clips(data_root, split, 1).meta["episodes"][split])
    for frames, n, moments in DELTAS:
        if longest <= frames:
            print(f"no delta {frames} frames ahead: no held-out episode is as long",
                  file=sys.stderr)
            continue
        clips = Clips(data_root, split, frames + 1, device)
        starts = clips.spread(n)
        x = clips.at(starts)                                        # (n, frames + 1, H, W, C)
        inferred, random, kept = delta_psnr(dynamics, tokenizer, lam, x, frames, sampling)
        delta = inferred - random                                   # (n, frames)
        for t in moments:
            at_t = delta[:, t - 1]                                  # (n,)
            result[f"delta_psnr_t{t}"] = at_t.mean().item()
            result[f"delta_psnr_t{t}_se"] = standard_error(at_t.cpu(), clips.levels(starts))
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
                counterfactual_psnr_se=over_prompts(by_prompt),
                counterfactual_psnr_tokenizer=tokenizer,
                counterfactual_copy_psnr=copy)


# ------------------------------------------------------------------------------- codes


# Two frames that differ by more than this, in dB, show different things. Two drawings of the same
# frame are nearer, a hero who has jumped or a view that has moved by 2 pixels is further away
DIFFERENT = 30


@torch.inference_mode()
def score_codes(game, supply, lam, prompts=100):
    """What do the codes do, where nobody knows a true action? Each is pressed from each prompt.

    supply: see play.starts. lam: None leaves out `cycle`. Returns a dictionary of shares:
        fork            of the pairs of codes, those that lead from one frame to different frames
        consistency     of the prompts, those at which a code moves the view as it does most often
                        (left, right or not, up, down or not); mean over codes. A world that ignores
                        its codes has 1 here, and 0 in fork
        cycle           of the presses, those after which the LAM reads the code pressed from the
                        two frames. Chance: 1 / codes
    with _se, their standard errors over prompts.
    """
    fork = np.zeros(prompts)
    moves = np.zeros((prompts, game.K, 2), int)
    cycle = np.zeros(prompts)
    upper = np.triu_indices(game.K, 1)
    for i in tqdm(range(prompts), desc="every code", dynamic_ncols=True):
        game.reset(*next(supply))
        first = torch.from_numpy(game.frame).expand(game.K, -1, -1, -1)     # (K, H, W, C)
        drawn = torch.from_numpy(game.every_button())                       # (K, H, W, C)
        alike = psnr(drawn[:, None], drawn[None])                           # (K, K)
        fork[i] = (alike.numpy()[upper] < DIFFERENT).mean()
        moves[i] = displacement(first, drawn).sign().numpy()
        if lam is not None:
            read = lam.encode(torch.stack([first, drawn], 1).to(game.device))[:, 0].cpu()
            cycle[i] = (read == torch.arange(game.K)).float().mean()
    # the nine ways in which a view can move
    way = 3 * moves[..., 0] + moves[..., 1]                                 # (prompts, K)
    usual = np.array([np.bincount(of_code + 4).argmax() - 4 for of_code in way.T])  # (K,)
    consistency = (way == usual).mean(1)                                    # (prompts,)
    found = dict(fork=fork, consistency=consistency)
    if lam is not None:
        found["cycle"] = cycle
    result = {}
    for name, by_prompt in found.items():
        result[name] = float(by_prompt.mean())
        result[f"{name}_se"] = over_prompts(by_prompt)
    return result


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
        result[f"{name}_se"] = over_prompts(right.mean(1))
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


# ------------------------------------------------------------------------------- obeyed

# How long nobody presses anything before a key is pressed, in frames. The memory of a world has 16
RESTS = (0, 5, 15, 30, 300)
# Other moments at which keys are pressed, by what was pressed until then: (button, frames) each
MOMENTS = dict(
    walked=(("right", 8), ("none", 5)),
    run=(("right", 5),),
    run_left=(("left", 5),),
    air=(("jump", 2),),
)


@torch.inference_mode()
def score_obeyed(game, supply, prompts=200):
    """Does a single press of a key do in the world what it does in the true game?

    Before the press nobody presses anything for a while (RESTS), or somebody plays (MOMENTS), or
    the hero stands at a wall and the press is towards it. supply: see play.starts. Returns a
    dictionary of shares, None where the true game never did such a thing:
        obeyed.BUTTON.MOMENT    of the presses at which the true hero moved as he was told, sideways
                                and upwards, those at which the view moved the same way and the
                                drawn hero rose as well; at a `wall`, where the true hero stayed,
                                those at which the view stayed
        obeyed.BUTTON.MOMENT_se its standard error over prompts, each of which is another level
    """
    counted = {}
    for _ in tqdm(range(prompts), desc="obeyed", dynamic_ncols=True):
        frame, true = next(supply)
        state = true.save()
        # after a rest
        game.reset(frame, true)
        for t in range(max(RESTS) + 1):
            if t in RESTS:
                press_each(game, f"rest_{t}", counted)
            game.press(game.keys[0], 0)
        # after some play
        for moment, script in MOMENTS.items():
            true.restore(state)
            game.reset(frame, true)
            for word, frames in script:
                button = ACTIONS.index(word)
                for _ in range(frames):
                    game.press(game.keys[button], button)
            press_each(game, moment, counted)
        # at a wall
        for button in (1, 2):
            true.restore(state)
            if walk_to_wall(true, button):
                game.reset(torch.from_numpy(true.frame()).float() / 255, true)
                sideways, _, as_true = press_once(game, button)
                if sideways == 0:
                    counted.setdefault((button, "wall"), []).append(as_true)
    result = {}
    for button in range(1, len(ACTIONS)):
        for moment in [f"rest_{t}" for t in RESTS] + list(MOMENTS) + ["wall"]:
            right = np.array(counted.get((button, moment), []), bool)
            name = f"obeyed.{ACTIONS[button]}.{moment}"
            result[name] = share(right)
            if len(right):
                result[f"{name}_se"] = over_prompts(right)
    return result


def press_each(game, moment, counted):
    """Press each button for one frame and take it back. Notes in `counted` what was obeyed."""
    for button in range(1, len(ACTIONS)):
        sideways, upwards, as_true = press_once(game, button)
        game.take_back()
        # could the true hero do what he was told?
        if np.sign(sideways) == way_of(button) and (button < 3 or upwards < 0):
            counted.setdefault((button, moment), []).append(as_true)


def press_once(game, button):
    """Press a button for one frame. How did the true hero move, and did the drawn one as well?

    Returns the pixels to the right and downwards by which the true hero moved, and whether the
    view moved the same way sideways, and the drawn hero rose if the true one did.
    """
    before = game.frame
    x, y = game.true.x, game.true.y
    game.press(game.keys[button], button)
    sideways = game.true.x - x
    upwards = game.true.y - y
    pair = torch.from_numpy(np.stack([before, game.frame]))         # (2, H, W, C)
    seen = displacement(pair[:1], pair[1:])[0, 0].item()
    as_true = np.sign(seen) == np.sign(sideways)
    if upwards < 0:
        look = game.true.look
        rise = hero_row(before, look.player) - hero_row(game.frame, look.player)
        as_true = as_true and rise >= 2
    return sideways, upwards, bool(as_true)


def walk_to_wall(true, button):
    """Hold a sideways button until a wall stops the hero, who stands on the ground. Did it?"""
    for _ in range(60):
        x = true.x
        true.step(button)
        if true.x == x and true.on_ground():
            return True
    return False


def hero_row(frame, colour):
    """The mean row of the hero's pixels in a frame (H, W, C); the last row if there are none."""
    rows = np.nonzero(is_hero(frame, colour))[0]
    return rows.mean() if len(rows) else len(frame)


# ------------------------------------------------------------------------------- the hero


# After how many frames the hero is counted. The first is two windows of training
HERO_FRAMES = (32, 80, 300)


def score_hero(game, supply, prompts=40):
    """Is the hero still there, and only once? He is played by a new random button every 4 frames.

    The size of the hero is measured by his pixels, see `hero_pixels`, in units of those that he
    has in the prompt. supply: see play.starts. Returns a dictionary, shares of frames but for the
    last entry, of the first FRAMES frames, one of HERO_FRAMES:
        hero_once_FRAMES            size between 0.6 and 1.4
        hero_once_FRAMES_se         its standard error over prompts
        hero_gone_FRAMES            size 0.6 or less
        hero_doubled_FRAMES         size 1.4 or more
        hero_once_FRAMES_true_game  hero_once of the true game, where he may jump half out of the
                                    frame
        motion_ratio_FRAMES         mean absolute change from frame to frame, over that of the true
                                    game under the same buttons: 0 of a frozen world
    """
    rng = np.random.default_rng(0)
    size = np.zeros((2, prompts, max(HERO_FRAMES)))
    change = np.zeros((2, prompts, max(HERO_FRAMES)))
    for i in tqdm(range(prompts), desc="the hero", dynamic_ncols=True):
        game.reset(*next(supply))
        colour = game.true.look.player
        frames = [game.frame, game.true.frame() / 255]
        one = hero_pixels(frames[1], colour)
        for t in range(max(HERO_FRAMES)):
            if t % 4 == 0:
                button = rng.integers(len(ACTIONS))
            last = frames
            game.press(game.keys[button], button)
            frames = [game.frame, game.true.frame() / 255]
            for j in range(2):
                size[j, i, t] = hero_pixels(frames[j], colour) / one
                change[j, i, t] = np.abs(frames[j] - last[j]).mean()
    once = (size > 0.6) & (size < 1.4)
    result = {}
    for t in HERO_FRAMES:
        result[f"hero_once_{t}"] = float(once[0, :, :t].mean())
        result[f"hero_once_{t}_se"] = over_prompts(once[0, :, :t].mean(1))
        result[f"hero_gone_{t}"] = float((size[0, :, :t] <= 0.6).mean())
        result[f"hero_doubled_{t}"] = float((size[0, :, :t] >= 1.4).mean())
        result[f"hero_once_{t}_true_game"] = float(once[1, :, :t].mean())
        drawn, true = change[:, :, :t].mean((1, 2))
        result[f"motion_ratio_{t}"] = float(drawn / true)
    return result


def hero_pixels(frame, colour):
    """How many pixels of a frame (H, W, C) in [0, 1] have the hero's colour, in his columns."""
    return is_hero(frame, colour).sum()


def is_hero(frame, colour):
    """Which pixels of the hero's columns, of a frame (H, W, C), have his colour: (H, PLAYER_W).

    colour: (red, green, blue), bytes. A pixel counts if no channel is off by 0.15 or more, and if
    it is nearer to the hero's colour than to a coin's: at night both are yellow.
    """
    strip = frame[:, PLAYER_X:PLAYER_X + PLAYER_W]                  # (H, PLAYER_W, C)
    from_hero = np.abs(strip - np.array(colour) / 255).max(-1)      # (H, PLAYER_W)
    from_coin = np.abs(strip - np.array(COIN) / 255).max(-1)        # (H, PLAYER_W)
    return from_hero < np.minimum(0.15, from_coin)


# ------------------------------------------------------------------------------- which scores


def over_prompts(values):
    """The standard error of values (prompts,), of which each is from another level."""
    return standard_error(values, np.arange(len(values)))


def share(right):
    """The share of true values in an array of bool (n,), a float; None of no values at all."""
    return float(right.mean()) if len(right) else None


def obstacle(name, game, folder):
    """Why the world of a run folder cannot have a score: a clause. None if it can."""
    if name in ("delta", "fvd") and not (folder / "lam.pt").exists():
        return f"it needs a LAM to infer actions, and {folder} has no lam.pt"
    if coinrun.is_coinrun(game) and coinrun.obstacle(name):
        return coinrun.obstacle(name)
    if name in ("counterfactual", "obeyed", "arrows", "hero"):
        if not game.built_in and not coinrun.is_coinrun(game):
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
    supply = play.starts(game, args.seed, data=args.data, run=args.run, split=args.split)
    # a world of CoinRun has another true game beside it, and in part other rulers
    if coinrun.is_coinrun(game) and coinrun.is_installed():
        supply = coinrun.starts(game, args.seed, args.split)
        if name in ("obeyed", "arrows"):
            return coinrun.score(name, game, supply, args.run, args.data, **how)
    models = game.tokenizer, game.dynamics, lam
    if name == "stages":
        return score_stages(args.run)
    if name == "delta":
        return score_delta(*models, args.data, args.split, sampling, args.device)
    if name == "fvd":
        return score_fvd(*models, args.data, args.split, args.out.parent, sampling,
                         device=args.device)
    if name == "codes":
        return score_codes(game, supply, lam, **how)
    if name == "counterfactual":
        return score_counterfactual(game, supply, **how)
    if name == "obeyed":
        return score_obeyed(game, supply, **how)
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
             "codes: does each do one thing of its own? counterfactual: each code from one frame; "
             "obeyed: a single press, after a rest and otherwise; arrows: ten presses; fvd: see "
             "lab.fvd; hero: is he still there? (default: all of them)")
    add("--prompts", type=int,
        help="starting frames (default: 200 for obeyed and arrows, 100 for codes and "
             "counterfactual, 40 for hero)")
    add("--maskgit", type=int,
        help=f"MaskGIT steps per frame (default: {ours['steps']}; for a world of --recipe paper "
             f"{paper['steps']})")
    add("--temperature", type=float,
        help=f"of the sampled tokens (default: {ours['temperature']:g}; for a world of --recipe "
             f"paper {paper['temperature']:g})")
    add("--order", choices=("random", "confidence", "apart"),
        help=f"which tokens are drawn when, see maskgit in dynamics.py (default: {ours['order']}; "
             f"for a world of --recipe paper {paper['order']})")
    add("--as-pressed", action="store_true",
        help="play every code as pressed, see play.py")
    add("--split", choices=("valid", "test"),
        help="held-out levels: valid to choose by, test to report by (default: test; own videos "
             "have valid only)")
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
    ]
    if not all(fine):
        stop("--prompts and --maskgit must be at least 1, --temperature and --seed not negative "
             "(a seed at most a billion)")
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
    if {"delta", "fvd", "codes"} & set(wanted) and (args.run / "lam.pt").exists():
        lam = load_lam(args.run, args.device)
    models = play.load(args.run, args.device)
    recipe = models[-1]
    asked = dict(steps=args.maskgit, temperature=args.temperature, order=args.order)
    sampling = SAMPLING[recipe] | {name: v for name, v in asked.items() if v is not None}

    # what can be scored? Better asked before an hour of play than after it
    game = play.Game(models, args.device, args.as_pressed, **sampling)
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
    has_test = game.built_in or coinrun.is_coinrun(game)
    args.split = args.split or ("test" if has_test else "valid")
    check_writable(args.out.parent)

    result = dict(sampling, split=args.split, as_pressed=args.as_pressed, seed=args.seed)
    if args.prompts is not None:
        result["prompts"] = args.prompts
    for name in possible:
        # a game of its own, and the same random numbers as all the others have
        torch.manual_seed(0)
        game = play.Game(models, args.device, args.as_pressed, **sampling)
        result |= measure(name, game, lam, sampling, args)

    for name, value in result.items():
        print(f"{name:>32}  {round(value, 3) if isinstance(value, float) else value}")
    write_json(args.out, result)
    print(f"{args.out}: these scores")


if __name__ == "__main__":
    command(main)
