"""Make a data set of CoinRun, the game of the paper's case study (appendix F).

    python -m lab.coinrun                      # a player who presses at random -> data/coinrun/
    python -m lab.coinrun --policy sticky      # one who holds his keys -> data/coinrun_sticky/
    python -m lab.coinrun --episodes 20        # a small one, for a first look
    python tokenizer.py --data data/coinrun    # and so on: lam.py, dynamics.py, play.py

CoinRun (Cobbe et al. 2018) is a platform game with procedural levels and momentum, 64x64 pixels. It
comes with an optional package, which exists for Python 3.11 and older: pip install procgen-mirror

The data set has the format of data.py, with true_actions.npz, which no training opens. A player has
nine moves: left, right or neither, with up, down or neither. Down shows in one frame in a hundred,
so a move counts as one of the six buttons of data.ACTIONS, whether with down or without. The game
can be saved and restored. So all nine moves are tried from every frame, and it is known which other
buttons would have led to the very same next frame.

    train    levels 0 to 9,999, as in the paper, in hard mode
    valid    levels from 500,000 on
    test     levels from 750,000 on
An episode ends where its level does, at the coin, at an enemy or in lava, or after --frames.

The second half of this file is for python -m lab.score --data data/coinrun, which plays a trained
world beside the true game.
"""
import contextlib
import io
import re
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import lam as lam_stage
from data import ACTIONS, FIRST, VIEW, displacement, standard_error, way_of
from st_block import command, load_model, new_parser, stop

# how many levels there are to train on
TRAIN_LEVELS = 10_000

# the nine moves, in the order in which the package counts them: left, neither, right; and of each
# with down, with neither, with up. Which button is each, as an index of data.ACTIONS?
MOVES = ("left+down", "left", "left+up", "down", "none", "up", "right+down", "right", "right+up")
BUTTON = np.array([1, 1, 4, 0, 0, 3, 2, 2, 5])
# which move is each button? One without down
MOVE = [MOVES.index(word) for word in ("none", "left", "right", "up", "left+up", "right+up")]

# ------------------------------------------------------------------------------- the game


def find_game():
    """The class of the package that runs the game. Ends with one sentence if it is missing."""
    try:
        # one of its own packages prints an advertisement when it is imported
        with contextlib.redirect_stderr(io.StringIO()):
            from procgen import ProcgenGym3Env
    except ImportError as e:
        stop(f"CoinRun comes with the optional package procgen-mirror ({e}); install it with: pip "
             "install procgen-mirror (it exists for Python 3.11 and older)")
    return ProcgenGym3Env


def is_installed():
    """Can the game be played here?"""
    try:
        find_game()
    except SystemExit:
        return False
    return True


class CoinRun:
    """A level of CoinRun, with the methods of data.Platformer that the lab uses.

    Fully determined by the seed of the level and the moves. The package runs many copies of a game
    at once. Nine copies are kept in the same state, so that all nine moves can be tried in one go.
    Where a level ends, the package goes back to its beginning at once. Then `over` is true.
    """

    def __init__(self, seed):
        self.copies = find_game()(num=len(MOVES), env_name="coinrun", distribution_mode="hard",
                                  start_level=seed, num_levels=1, num_threads=0)
        # the copies differ at first, in numbers that they draw later
        self.restore((self.copies.get_state()[0], False))

    def try_moves(self):
        """Make every move, each in a copy of its own. Returns the frames (9, 64, 64, 3) uint8 to
        which they lead. Nothing else may follow but `choose`."""
        self.copies.act(np.arange(len(MOVES)))
        _, seen, self.ended = self.copies.observe()
        return seen["rgb"].copy()

    def choose(self, move):
        """After `try_moves`: go on from where a move led to."""
        state = self.copies.get_state()[move]
        self.restore((state, self.over or bool(self.ended[move])))

    def step(self, button):
        """Advance by one frame under ACTIONS[button]."""
        self.copies.act(np.full(len(MOVES), MOVE[button]))
        _, _, ended = self.copies.observe()
        self.over = self.over or bool(ended[0])
        self.moment = None

    def frame(self):
        """What the screen shows now: (64, 64, 3) uint8."""
        _, seen, _ = self.copies.observe()
        return seen["rgb"][0].copy()

    def save(self):
        """The state of the game, as bytes, and whether the level is over."""
        # to ask the package takes as long as to play three frames: ask it once
        if self.moment is None:
            self.moment = self.copies.get_state()[0]
        return self.moment, self.over

    def restore(self, state):
        """Return to a moment of this level, as `save` described it."""
        self.moment, self.over = state
        self.copies.set_state([self.moment] * len(MOVES))

    def place(self):
        """Where the view is in the level: x and y, floats, in pixels to the right and downwards."""
        moment, _ = self.save()
        return find_place(moment)

    @property
    def x(self):
        return self.place()[0]

    @property
    def y(self):
        return self.place()[1]


def find_place(state):
    """Where the view is, from the bytes of a saved game: x and y in pixels, right and downwards.

    The package does not document what it saves. Its three generators of random numbers are saved as
    text, thousands of digits and blanks. Ten words of four bytes follow; the sixth and the seventh
    are the place of the view. A test compares it with how pictures move.
    """
    *_, text = re.finditer(rb"[0-9 ]{3000,}", state)
    words = np.frombuffer(state, np.float32, 10, text.end())
    return float(words[5]), -float(words[6])


# ------------------------------------------------------------------------------- the players


class RandomPlayer:
    """The player of the paper: any of the nine moves, a new one each frame."""

    def __init__(self, rng):
        self.rng = rng

    def __call__(self):
        """The next move, an index of MOVES."""
        return int(self.rng.integers(len(MOVES)))


class StickyPlayer:
    """A player who holds a move for 2 to 10 frames, and goes right more often than left.

    Of a random player the hero hardly gets away, since in CoinRun a key changes his speed by a
    fifth of its top. The probabilities were chosen by hand: neither of left and right is rare.
    """

    def __init__(self, rng):
        self.rng = rng
        self.left = 0

    def __call__(self):
        """The next move, an index of MOVES."""
        if self.left == 0:
            sideways = self.rng.choice(3, p=[0.25, 0.15, 0.6])
            up_or_down = self.rng.integers(3)
            self.move = int(3 * sideways + up_or_down)
            self.left = int(self.rng.integers(2, 11))
        self.left -= 1
        return self.move


PLAYERS = dict(random=RandomPlayer, sticky=StickyPlayer)
# So many levels give each of them 139,000 frames to train on, about as many as the built-in game
# has. Who gets on dies sooner.
EPISODES = dict(random=780, sticky=1300)

# ------------------------------------------------------------------------------- making a data set


def play_episode(seed, frames, player):
    """Play a level until it ends, for at most `frames` frames.

    Returns the frames (F, 64, 64, 3), buttons (F,), same (F, 6), and the places of the view (F, 2)
    in pixels. buttons[t] was pressed between frame t and frame t+1. same[t, b] is true where button
    b, with down or without, would have led to the very same frame t+1. What leads to the end of the
    level leads to no next frame: the last button of an episode is in no clip.
    """
    game = CoinRun(seed)
    video = []
    buttons = []
    same = []
    places = []
    for _ in range(frames):
        video.append(game.frame())
        places.append(game.place())
        # which of the nine moves lead to the frame to which the player's move leads?
        move = player()
        after = game.try_moves()                                    # (9, 64, 64, 3)
        alike = (after == after[move]).all((1, 2, 3))               # (9,)
        buttons.append(BUTTON[move])
        same.append([alike[BUTTON == button].any() for button in range(len(ACTIONS))])
        game.choose(move)
        if game.over:
            break
    return np.stack(video), np.array(buttons, np.uint8), np.array(same), np.array(places)


def play_levels(folder, split, seeds, frames, policy, seed):
    """Play an episode of each level and write SPLIT.u8.

    Returns a dictionary for true_actions.npz, as data.play_levels does, the lengths of the
    episodes, and how the view moved from frame to frame: (transitions, 2), pixels.
    """
    buttons = []
    same = []
    lengths = []
    moves = []
    with open(folder / f"{split}.u8", "wb") as file:
        for i, level in enumerate(tqdm(seeds, desc=f"playing {split} levels", unit="level",
                                       dynamic_ncols=True)):
            # the same level may come again, with another player
            player = PLAYERS[policy](np.random.default_rng([level, seed, i]))
            video, pressed, alike, places = play_episode(level, frames, player)
            file.write(video.tobytes())
            buttons.append(pressed)
            same.append(alike)
            lengths.append(len(video))
            moves.append(np.diff(places, axis=0))
    true = {f"{split}_action": np.concatenate(buttons),
            f"{split}_same": np.concatenate(same),
            f"{split}_seed": np.array(seeds)}
    return true, lengths, np.concatenate(moves)


def build_coinrun(root, episodes, frames, policy, seed, overwrite):
    """Make a data set of `episodes` training levels, of at most `frames` frames each."""
    find_game()

    def fill(folder):
        held_out = max(6, episodes // 20)
        levels = dict(
            train=[level % TRAIN_LEVELS for level in range(episodes)],
            valid=range(FIRST["valid"], FIRST["valid"] + held_out),
            test=range(FIRST["test"], FIRST["test"] + held_out),
        )
        true = {}
        lengths = {}
        for split, seeds in levels.items():
            found, lengths[split], moves = play_levels(folder, split, seeds, frames, policy, seed)
            true |= found
            if split == "train":
                seen = moves
        np.savez_compressed(folder / "true_actions.npz", **true)
        print_facts(true["train_action"], true["train_same"], lengths["train"], seen)
        return dict(frame=[VIEW, VIEW, 3], fps=15, episodes=lengths)

    source = f"coinrun, {policy} player, seed {seed}"
    data.build(root, overwrite, dict(source=source), fill)


def print_facts(buttons, same, lengths, moves):
    """Say what is in the training levels: lengths, buttons, and how the view moves.

    buttons (F,), same (F, 6), lengths (E,), moves (transitions, 2) in pixels right and down.
    """
    print(f"{sum(lengths):,} frames to train on in {len(lengths)} episodes; half of these are "
          f"shorter than {np.median(lengths):.0f} frames")
    data.print_buttons(buttons, same)
    for button in np.unique(buttons):
        name = ACTIONS[button]
        others = np.delete(np.arange(len(ACTIONS)), button)
        shares = same[buttons == button].mean(0)                    # (6,)
        alike = ", ".join(f"{ACTIONS[other]} {shares[other]:.1%}" for other in others)
        print(f"where {name} was pressed, the same frame would have followed from: {alike}")
    constant = np.bincount(buttons, minlength=len(ACTIONS)) / len(buttons)
    print(f"the best constant guess is the very button in {constant.max():.3f} of transitions, and "
          f"would have led to the very same frame in {same.mean(0).max():.3f}")
    # of the buttons that lead to what was seen, the commonest is the best guess
    best = (same * constant).argmax(1)                              # (F,)
    print("who knew where every button leads would name the very button in "
          f"{(best == buttons).mean():.3f}")
    for name, along in (("sideways", moves[:, 0]), ("upwards", -moves[:, 1])):
        spread = ", ".join(f"{value:+.1f}" for value in np.percentile(along, [1, 5, 25, 50, 75, 95,
                                                                              99]))
        print(f"pixels per frame by which the view moves {name}: at the percentiles 1, 5, 25, 50, "
              f"75, 95, 99 {spread}; mean square {np.square(along).mean():.2f}, unmoved in "
              f"{(np.abs(along) < 0.01).mean():.1%}")


# ------------------------------------------------------------------------------- scores


def is_coinrun(game):
    """Was the world of a play.Game trained on data that this file made?"""
    return game.origin["data"].startswith("coinrun, ")


def starts(game, seed, split="test"):
    """An endless supply of starting frames, as play.starts has it for the built-in game: a frame,
    a tensor (64, 64, 3) in [0, 1], and the CoinRun in the state that the frame shows.

    The levels are of the kind `split`. The player of the world's videos has played up to 60 frames,
    and then the hero has come to rest.
    """
    rng = np.random.default_rng(seed)
    policy = game.origin["data"].split()[1]
    while True:
        true = CoinRun(FIRST[split] + int(rng.integers(100_000)))
        player = PLAYERS[policy](rng)
        for _ in range(int(rng.integers(60))):
            true.step(int(BUTTON[player()]))
        if come_to_rest(true):
            yield torch.from_numpy(true.frame()).float() / 255, true


def come_to_rest(true, frames=60):
    """Press nothing until the view stands still. Does it, before the level is over?"""
    for _ in range(frames):
        before = true.place()
        true.step(0)
        if true.over:
            return False
        if np.abs(np.subtract(true.place(), before)).max() < 0.02:
            return True
    return False


def obstacle(name):
    """Why the world of CoinRun cannot have a score of lab.score: a clause. None if it can."""
    if name == "hero":
        return "it knows the hero by his colour, and CoinRun has heroes of several colours"
    if name in ("counterfactual", "obeyed", "arrows") and not is_installed():
        return ("it compares with the true game, which is in the optional package procgen-mirror: "
                "pip install procgen-mirror (Python 3.11 and older)")
    return None


def score(name, game, supply, run, root, **how):
    """The score "obeyed" or "arrows" of lab.score, for a world of CoinRun: a dictionary.

    The codes of the arrow keys are found anew, from few labels, where the folder `run` has the LAM
    and the folder `root` the data. Otherwise they are those of lam.json.
    """
    if (run / "lam.pt").exists() and data.true_actions(root, "train") is not None:
        lam, ckpt = load_model(run / "lam.pt", lam_stage.build, "lam", game.device)
        game.keys = keys_from_labels(lam, root, game.device, ckpt["config"]["window"])
    if name == "obeyed":
        return score_obeyed(game, supply, **how)
    return score_arrows(game, supply, **how)


def keys_from_labels(lam, root, device, frames, labels=1000):
    """For each button the code that an arrow key presses, from so few true buttons: a list (6,).

    The clips of `frames` frames are spread over the training levels of the folder `root`. See
    `name_codes` in lam.py.
    """
    clips = max(1, round(labels / (frames - 1)))
    args = Namespace(data=root, device=device, frames=frames)
    a, pressed, same, _ = lam_stage.labelled(lam, args, "train", clips)
    _, _, keys = lam_stage.name_codes(a, pressed, same, len(lam.vq.codebook))
    return keys.tolist()


# A key is held for HOLD frames, and the view is looked at over the last LOOK of them. In one frame
# a key changes the speed by half a pixel, which a picture hardly shows, and who runs turns round in
# three
HOLD = 6
LOOK = 3

# the moments at which keys are pressed, by what was held until then: (button, frames) each
MOMENTS = dict(
    rest_0=(),
    rest_5=(("none", 5),),
    run=(("right", 6),),
    run_left=(("left", 6),),
)


def hold(game, button, most=8):
    """Hold a button for HOLD frames. How did both views move sideways over the last LOOK of them?

    most: see data.displacement. Returns pixels to the right of the true view, a float, and of the
    drawn one, a whole number.
    """
    for t in range(HOLD):
        if t == HOLD - LOOK:
            before = game.frame
            x = game.true.x
        game.press(game.keys[button], button)
    pair = torch.from_numpy(np.stack([before, game.frame]))         # (2, H, W, C)
    seen = displacement(pair[:1], pair[1:], most)[0, 0].item()
    return game.true.x - x, seen


def score_obeyed(game, supply, prompts=200):
    """Does a key that is held for a moment do in the world what it does in the true game?

    supply: see `starts`. Returns a dictionary of shares, None where the true game never did such a
    thing:
        obeyed.BUTTON.MOMENT    left and right: of the presses at which the true view went where it
                                was told, by a pixel or more, those at which the drawn one did, see
                                `hold`. jump: of the presses at which the true view rose by two
                                pixels or more in the first frame, those at which the drawn one rose
        obeyed.sideways         the mean of left and right over all moments
    with _se, their standard errors over prompts, each of which is another level.
    """
    counted = {}
    for i in tqdm(range(prompts), desc="obeyed", dynamic_ncols=True):
        frame, true = next(supply)
        state = true.save()
        for moment, script in MOMENTS.items():
            for button in (1, 2, 3):
                true.restore(state)
                game.reset(frame, true)
                for word, frames in script:
                    for _ in range(frames):
                        game.press(game.keys[ACTIONS.index(word)], ACTIONS.index(word))
                told, obeyed = press_and_see(game, button)
                if told and not true.over:
                    counted.setdefault((ACTIONS[button], moment), []).append((i, obeyed))
    result = {}
    for name in ACTIONS[1:4]:
        for moment in MOMENTS:
            add_share(result, f"obeyed.{name}.{moment}", counted.get((name, moment), []))
    both = [pair for (name, _), pairs in counted.items() if name != "jump" for pair in pairs]
    add_share(result, "obeyed.sideways", both)
    return result


def press_and_see(game, button):
    """Press left, right or jump. Did the true view do as told, and did the drawn one as well?"""
    way = way_of(button)
    if way:
        moved, seen = hold(game, button)
        return moved * way >= 1, seen * way > 0
    before = game.frame
    y = game.true.y
    game.press(game.keys[button], button)
    pair = torch.from_numpy(np.stack([before, game.frame]))         # (2, H, W, C)
    rose = -displacement(pair[:1], pair[1:], most=9)[0, 1].item()
    return y - game.true.y >= 2, rose > 0


def add_share(result, name, pairs):
    """Add the share of true values, with its standard error, to a dictionary of results.

    pairs: (prompt, value) each.
    """
    if not pairs:
        result[name] = None
        return
    prompts, values = np.array(pairs).T
    result[name] = float(values.mean())
    result[f"{name}_se"] = standard_error(values, prompts)


def score_arrows(game, supply, prompts=100, presses=5):
    """Play the world beside the true game. Do both views move the same way sideways?

    Every press has a button of its own, any of the six, and is held, see `hold`. Right, left and
    neither are told apart. Presses do not count after the end of a level, nor where the true view
    moved by 0.3 to 1 pixel, which a picture does not show clearly. supply: see `starts`. Returns a
    dictionary:
        arrow_presses           the number of presses that count
        arrow_keys_varied       the share at which both views moved the same way
        arrow_keys_varied_se    its standard error over prompts
        arrow_keys_chance       the share at which the true view moved as it does most often
    """
    rng = np.random.default_rng(0)
    pairs = []
    ways = []
    for i in tqdm(range(prompts), desc="arrow keys", dynamic_ncols=True):
        game.reset(*next(supply))
        for button in rng.integers(len(ACTIONS), size=presses):
            # in three frames a jump moves the view up by 22 pixels
            moved, seen = hold(game, button, most=22)
            if game.true.over:
                break
            if 0.3 <= abs(moved) < 1:
                continue
            way = np.sign(moved) if abs(moved) >= 1 else 0
            pairs.append((i, np.sign(seen) == way))
            ways.append(way)
    result = dict(arrow_presses=len(pairs))
    add_share(result, "arrow_keys_varied", pairs)
    if ways:
        result["arrow_keys_chance"] = max(ways.count(way) for way in (-1, 0, 1)) / len(ways)
    return result


# ------------------------------------------------------------------------------- command line


def read_arguments(argv):
    """The command line as a namespace. Ends with one sentence if it makes no sense."""
    p = new_parser(__doc__)
    add = p.add_argument
    add("--policy", choices=tuple(PLAYERS), default="random",
        help="who plays. random: any of the nine moves, a new one each frame, as in the paper; "
             "sticky: a move is held for 2 to 10 frames, more often to the right (default: "
             "%(default)s)")
    add("--name", help="becomes data/NAME (default: coinrun; of the sticky player coinrun_sticky)")
    add("--episodes", type=int,
        help="episodes to train on, a level each; from the 10,001st on, levels come again "
             f"(default: {EPISODES['random']}; of the sticky player {EPISODES['sticky']})")
    add("--frames", type=int, default=200,
        help="most frames in each of them; a level ends by itself after 1,000 (default: "
             "%(default)s)")
    add("--seed", type=int, default=0,
        help="another seed, other moves in the same levels (default: %(default)s)")
    add("--overwrite", action="store_true", help="replace a data set of that name")
    args = p.parse_args(argv)
    if args.episodes is None:
        args.episodes = EPISODES[args.policy]
    if args.seed < 0 or args.episodes < 1 or args.frames < 17:
        stop("--seed must not be negative, --episodes at least 1, --frames at least 17")
    if not args.name:
        args.name = "coinrun" if args.policy == "random" else f"coinrun_{args.policy}"
    if Path(args.name).name != args.name or args.name in ("", ".", ".."):
        stop(f"--name {args.name!r} cannot be the name of a folder; choose a plain word")
    return args


def main(argv=None):
    args = read_arguments(argv)
    root = Path("data") / args.name
    build_coinrun(root, args.episodes, args.frames, args.policy, args.seed, args.overwrite)
    data.contact_sheet(root, root / "sheet.png")


if __name__ == "__main__":
    command(main)
