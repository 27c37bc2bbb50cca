"""Play a trained world: press a key, and the model draws the next frame.

    python play.py                      # the world of runs/platformer, else the one in assets/
    python play.py --data data/mine     # the world that was trained on your own videos
    python play.py --prompt photo.png   # begin from any picture
    python play.py --script             # no window: write play.gif and buttons.png
    MPLBACKEND=WebAgg python play.py    # the window in a browser, for a machine far away

    arrows, WASD  go left and right, jump with up or W
    space         jump
    1 2 3 ...     play a latent action, by its code's number
    p             pause, and go on
    .             pause, and play a single frame
    u             take back a frame, and wait for a key
    r             back to the starting frame
    n             another starting frame
    b             show what each button leads to from here
    e             draw on the frame with the mouse (the right
                  button takes up a colour); e again plays it
    v             play each code as pressed, even where it can
                  hardly come; v again: as usual
    g             start a recording; g again writes a GIF
    h             show these keys
    q, Esc        quit

Each frame is one step of inference (section 2.2). The key stands for a latent action, and its code
selects a vector of the codebook that the latent action model learned (lam.py). Under that vector
MaskGIT (dynamics.py) fills in the tokens of the next frame, and the tokenizer's decoder turns them
into pixels. Pixels are never encoded again. Both transformers keep what they computed of past
frames (st_block.Cache), so a frame costs the same after an hour as at the start.
"""
import st_block     # first: so Ctrl-C ends the program in one line, even during the imports
import importlib.util
import itertools
import json
import math
import os
import signal
import sys
import textwrap
import time
from collections import deque
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import dynamics as dynamics_stage
import tokenizer as tokenizer_stage
from data import ACTIONS, FIRST, Clips, Platformer, Policy, Unreadable, psnr, read_picture
from lam import WAYS, ways_of
from st_block import (check_compiler, command, find_device, load_model, new_parser,
                      pyplot_for_files, save_figure, stop, write_gif)

ASSETS = Path(__file__).parent / "assets"
# the keys that move, and what they stand for
MOVES = {"left": "left", "a": "left", "right": "right", "d": "right", "up": "jump", "w": "jump",
         " ": "jump", "down": "down", "s": "down"}

# the table of keys in the docstring above, and the shortest form of it
KEYS = textwrap.dedent(__doc__.split("\n\n")[2])
SHORT_KEYS = """\
arrows or WASD move   space jump   1 2 3 codes   p pause   . one frame   h all keys
r restart   n new   u undo   b buttons   e draw   g record   v verbatim   q quit"""

# for how many frames the strip of the window holds each code down: long enough to see which way
# things go, chosen by hand
AHEAD = 4

# the backends of matplotlib that open a window into which `Window` can draw
WINDOWS = ("tkagg", "qtagg", "qt5agg", "gtk3agg", "gtk4agg", "wxagg", "macosx", "webagg")

# what the page of a window in a browser does otherwise than matplotlib's own: see `change_page`
PAGE = """
mpl.figure.prototype._init_toolbar = function () {
    this.buttons = {};
    this.message = document.createElement("h2");
    this.message.style.font = "bold 28px sans-serif";
    this.root.prepend(this.message);
    this.ws.addEventListener("close", () => {
        this.message.textContent = "The game has ended. You may close this page.";
    });
};
// space and arrow keys play, and do not scroll the page
mpl.figure.prototype._key_event_extra = function (event) { event.preventDefault(); };
"""

# the sequence of --script: a true button, and for how many frames it is held
HELD = (("right", 10), ("right+jump", 3), ("right", 12), ("left+jump", 2), ("left", 12),
        ("none", 4), ("jump", 2), ("none", 9), ("right", 8), ("right+jump", 3), ("right", 15))
SCRIPT = [word for word, frames in HELD for _ in range(frames)]


# ------------------------------------------------------------------------------- the game


class Game:
    """A learned world in play: press a code, get the next frame.

    Codes are integers from 0 here, and from 1 on the keyboard and the command line. Frames are
    arrays (H, W, C) in [0, 1]. Beside a world of the built-in game, the true game may be played.
    """

    def __init__(self, models, device, as_pressed=False, compile="off", **sampling):
        """models: what `load` returns. as_pressed: see `meant`. compile: "on" or "off".
        sampling: steps and temperature of MaskGIT, where they differ from the recipe's."""
        tokenizer, dynamics, origin, scores, recipe = models
        self.tokenizer = tokenizer
        self.dynamics = dynamics
        self.origin = origin
        self.device = torch.device(device)
        self.K = len(dynamics.codebook)
        self.built_in = origin["data"].startswith("platformer, ")

        # what lam.py found out: which code the arrow keys press for each button of data.ACTIONS,
        # which button each code means, and which code comes while the world stands still
        self.keys = scores.get("keys")
        self.meaning = scores.get("meaning")
        self.still = scores.get("still")
        # how the hero goes under each code, in pixels, and a guess of the keys by that
        self.moves = scores.get("moves")
        self.guessed = scores.get("guess")
        self.sure = scores.get("sure")
        # the PSNR of the tokenizer on first frames of held-out videos, in dB: see `familiar`
        self.usual = scores.get("psnr_frame_1")
        # the built-in game has no use for the down arrow: only --keys gives it a code
        self.down = None

        # the dynamics model and the decoder each remember the frames that they have seen
        sampling = dynamics_stage.SAMPLING[recipe] | sampling
        self.world = dynamics_stage.new_world(dynamics, **sampling)
        self.decoder_cache = tokenizer.decoder.new_cache(1)
        # 32 was chosen by hand
        self.undo = deque(maxlen=32)
        # the code that led to the newest frame, as it was played: see `meant`
        self.played = None

        # are codes played as pressed, even where they can hardly come?
        self.as_pressed = as_pressed
        # how alike are two codes? Twice the cosine of their vectors, see `meant`. A vector shorter
        # than 1 stays so: the code of "nothing happens" lies near 0 and points nowhere
        e = F.normalize(dynamics.codebook, dim=-1, eps=1.0)         # (codes, latent_dim)
        self.similarity = 2 * e @ e.T                               # (codes, codes)
        if compile == "on":
            self.compile()

    def compile(self):
        """Make one compiled graph of a pass of the dynamics, and one of a pass of the decoder."""
        # a CUDA graph may write only to tensors that never move
        for cache in (self.world.cache, self.decoder_cache):
            for kept in cache.keys + cache.values:
                torch._dynamo.mark_static_address(kept)
        # a pass is hundreds of small operations: on a GPU a CUDA graph, which records them once,
        # launches them all at once
        mode = "reduce-overhead" if self.device.type == "cuda" else None
        how = dict(fullgraph=True, dynamic=False, mode=mode)
        self.dynamics.features = torch.compile(self.dynamics.features, **how)
        self.tokenizer.decode = torch.compile(self.tokenizer.decode, **how)

    def assign(self, *codes):
        """Give the arrow keys their codes by hand, where nobody knows the true buttons.

        codes: numbers from 1, of no key, left, right, up and, if wanted, down. Fewer, more, or
        numbers that no code of this world has, end the program.
        """
        known = all(1 <= code <= self.K for code in codes)
        if len(codes) not in (4, 5) or not known:
            given = " ".join(str(code) for code in codes)
            stop(f"--keys {given}: that takes four codes or five (NONE LEFT RIGHT UP and perhaps "
                 f"DOWN); this world has 1 to {self.K}")
        none, left, right, up, *down = [code - 1 for code in codes]
        # in the order of data.ACTIONS: up wins over left and right
        self.keys = [none, left, right, up, up, up]
        self.down = down[0] if down else None

    def button(self, code):
        """The true button (an index of data.ACTIONS) that a code stands for. None if unknown."""
        # a code that an arrow key presses stands for that key, others for what lam.py found
        if self.keys and code in self.keys:
            return self.keys.index(code)
        if self.meaning:
            return self.meaning[code]
        return None

    def label(self, code):
        """What a code is, as far as anybody knows: its number, the button that it stands for, and
        the way in which the hero goes. Of `4 right ↘` and `8 right →`, the first is a fall."""
        words = [str(code + 1)]
        button = self.button(code)
        if button is not None:
            words.append(ACTIONS[button])
        if self.moves:
            words.append(WAYS[ways_of(self.moves)[code]])
        return " ".join(words)

    def guess(self):
        """Give the arrow keys the codes that lam.py guessed, where nobody knows the true buttons.

        Returns a sentence that says so and how sure that is, or nothing.
        """
        if self.keys or not self.guessed:
            return ""
        *self.keys, self.down = self.guessed
        parts = []
        for key, i in {"no key": 0, "left": 1, "right": 2, "up": 3, "down": 6}.items():
            parts.append(f"{key} plays {self.guessed[i] + 1} ({self.sure[i]:.0%} sure)")
        return f"keys guessed by how things move (--keys says otherwise): {', '.join(parts)}"

    @torch.inference_mode()
    def meant(self, code):
        """The code that is played when `code` is pressed: the same, wherever it can happen.

        A latent action says what happened between two frames, and not everything can happen
        everywhere: a hero in mid-air does not jump, a hero at a wall does not run on. No video
        shows what such a code leads to, so the model would have to invent it. Where the pressed
        code hardly ever comes, the game therefore plays a likely code of similar meaning.

        What is rare? The prior gives each code a chance to come next. A code is rare now if its
        chance is below prior.floor, after the code that was played last. The likeliest code is
        never rare.

        What did the player mean? By Bayes' rule a code is as credible as its chance, times the
        likelihood that a player who means it presses `code`. This is taken to grow as exp(2 cos),
        with the cosine between the vectors of the two codes in the LAM's codebook. (The 2 was
        chosen on held-out levels: lab/NOTES.md.)

        Without a prior (--recipe paper has none), and with as_pressed, codes stay as pressed.
        """
        prior = self.dynamics.prior
        if prior is None or self.as_pressed:
            return code
        world = self.world
        # how likely is each code to come next?
        likely = prior(world.last, world.before, world.action)[0, 0].softmax(-1)    # (codes,)
        # below what chance is it rare, after the code played last?
        floor = prior.floor[world.played[0]]                                        # (codes,)
        rare = (likely < floor) & (likely < likely.max())                           # (codes,)
        if not rare[code]:
            return code
        # the most credible of the codes that are not rare, by log chance + log likelihood
        credible = likely.log() + self.similarity[code]                             # (codes,)
        return credible.masked_fill(rare, -math.inf).argmax().item()

    @torch.inference_mode()
    def reset(self, frame, true=None):
        """Begin from frame, a tensor (H, W, C) in [0, 1]; return it as the world shows it.

        true: a Platformer in the state that the frame shows, to be played alongside.
        """
        self.first = frame
        self.true = true
        self.first_state = true.save() if true else None
        self.decoder_cache.clear()
        self.undo.clear()
        self.count = 0

        # one frame does not tell how fast things move, and a world begins at rest: if the LAM has
        # a code for standing still, the frame is shown twice, with that code in between
        picture = frame.to(self.device)[None, None]                 # (1, 1, H, W, C)
        if self.still is None:
            z = self.tokenizer.encode(picture)                      # (1, 1, N)
            self.world.prompt(z)
        else:
            twice = picture.expand(-1, 2, -1, -1, -1)               # (1, 2, H, W, C)
            z = self.tokenizer.encode(twice)                        # (1, 2, N)
            self.world.prompt(z, torch.tensor([[self.still]], device=self.device))

        # the decoder, too, has to see every frame of the prompt
        for tokens in dynamics_stage.frames_of(z):
            self.frame = self.draw(tokens)
        self.played = None
        return self.frame

    def restart(self):
        """Go back to the frame that `reset` began from."""
        if self.true:
            self.true.restore(self.first_state)
        self.reset(self.first, self.true)

    def draw(self, z):
        """Tokens z (1, 1, N) -> their frame (H, W, C), as the one after all drawn before."""
        x = self.tokenizer.decode(z, self.decoder_cache)            # (1, 1, H, W, C)
        self.decoder_cache.advance()
        return x[0, 0].cpu().numpy()                                # (H, W, C)

    def next_frame(self, code, moment):
        """Move the world on by a frame under a code; return the frame (H, W, C).

        moment: what `moment` says of the frame before.
        """
        last, before = self.world.last, self.world.before
        z = self.world.step(torch.tensor([code], device=self.device))
        # a third frame that shows the same tells nothing new, and is not remembered: no video shows
        # a rest as long as the whole memory, and nobody knows what comes after one
        if torch.equal(z, last) and torch.equal(z, before):
            self.come_back(moment)
            return self.frame
        return self.draw(z)

    @torch.inference_mode()
    def press(self, code, button=None):
        """Go on by one frame under a code, and return that frame (H, W, C). The true game, if
        there is one, goes on under a true button. Without a button it waits."""
        moment = self.moment()
        self.undo.append(moment)
        played = self.meant(code)
        self.frame = self.next_frame(played, moment)
        self.played = played
        if self.true and button is not None:
            self.true.step(button)
        self.count += 1
        return self.frame

    def moment(self):
        """All that it takes to come back here: the snapshots of the world, of the decoder's cache
        and of the true game (None if there is none), the frame (H, W, C), and the code played."""
        true = self.true.save() if self.true else None
        return self.world.snapshot(), self.decoder_cache.snapshot(), true, self.frame, self.played

    def come_back(self, moment):
        """Take back the frame since `moment`."""
        world, drawn, true, self.frame, self.played = moment
        self.world.restore(world)
        self.decoder_cache.restore(drawn)
        if self.true:
            self.true.restore(true)

    @torch.inference_mode()
    def take_back(self):
        """Undo the last press. The game remembers 32 of them."""
        if self.undo:
            self.come_back(self.undo.pop())
            self.count -= 1

    @torch.inference_mode()
    def every_button(self, frames=1):
        """The frame after so many frames under each code, without moving on: (K, H, W, C)."""
        result = []
        for code in range(self.K):
            moments = []
            for _ in range(frames):
                moments.append(self.moment())
                self.frame = self.next_frame(self.meant(code), moments[-1])
            result.append(self.frame)
            for moment in reversed(moments):
                self.come_back(moment)
        return np.stack(result)

    def familiar(self):
        """Right after `reset`: how like the training videos is the frame? One sentence, with what
        to expect.

        The tokenizer draws well what it has learned. So the measure is the PSNR of what it makes of
        the frame, beside its PSNR on first frames of held-out videos (tokenizer.json).
        """
        redrawn = psnr(torch.from_numpy(self.frame), self.first).item()
        # (3 and 8 dB below, twice and six times the squared error, were chosen by hand)
        words = f"this is redrawn at {redrawn:.0f} dB"
        if self.usual is None:
            return words
        words += f", the videos at {self.usual:.0f} dB: "
        if redrawn > self.usual - 3:
            return words + "like them, expect it to obey"
        if redrawn > self.usual - 8:
            return words + "somewhat unlike, expect blur"
        return words + "unlike them, expect it to dissolve"


# ------------------------------------------------------------------------------- what a game needs


def load(folder, device):
    """What `Game` needs of a run folder: (tokenizer, dynamics, origin, scores, recipe).

    origin says what the dynamics model was trained on. scores are those of the LAM. recipe is
    "paper" or "ours". A file that is missing, damaged or of another training ends the program.
    """
    tokenizer, first = load_model(folder / "tokenizer.pt", tokenizer_stage.build, "tokenizer",
                                  device)
    dynamics, last = load_model(folder / "dynamics.pt", dynamics_stage.build, "dynamics", device)
    scores = read_scores(folder / "lam.json")
    if not scores:
        stop(f"{folder}/lam.json does not exist, and it says which code is which; write it with: "
             "python lam.py --resume (and the same --data and --run)")
    check_scores(folder / "lam.json", scores, len(dynamics.codebook))
    # and how well the tokenizer draws, if it was scored
    scores["psnr_frame_1"] = read_scores(folder / "tokenizer.json").get("psnr_frame_1")

    # were the three stages trained on each other?
    origin = last["origin"]
    again = "train it again: python dynamics.py"
    same = "(and the same --data and --run)"
    if origin["tokenizer"] != first.get("fingerprint"):
        stop(f"{folder}/dynamics.pt was trained on another tokenizer than the one in {folder}; "
             f"{again} {same}")
    if origin["lam"] != scores.get("fingerprint"):
        stop(f"{folder}/dynamics.pt was trained on another lam than the one in {folder}; {again}, "
             f"and if lam.py was interrupted while scoring, first python lam.py --resume {same}")

    # the prior begins at zero and learns last
    if dynamics.prior is not None and not dynamics.prior.head.weight.any():
        print(f"{folder}/dynamics.pt is not finished (step {last['step']} of "
              f"{last['knobs']['steps']}, and no prior); go on with: python dynamics.py --resume "
              f"{same}", file=sys.stderr)
    return tokenizer, dynamics, origin, scores, last["config"]["recipe"]


def starts(game, seed, prompt=None, data=None, run=None, split="valid"):
    """An endless supply of starting frames. Yields a frame, a tensor (H, W, C) in [0, 1], and the
    true game in the state that the frame shows, or None.

    With a prompt, the path of a picture, every frame is that picture. A world of the built-in game
    starts in levels that no world was trained on, of the kind `split` (see data.FIRST). Other
    worlds start from held-out frames of the folder data. If it is not what the world of the folder
    run was trained on, the program ends.
    """
    rng = np.random.default_rng(seed)
    if prompt is not None:
        picture = read_image(prompt, game.tokenizer.height, game.tokenizer.width)
        yield from itertools.repeat((picture, None))
    elif game.built_in:
        while True:
            yield fresh_level(rng, split)
    else:
        same_data(game, data, run)
        clips = Clips(data, "valid", 1)
        while True:
            yield clips.at([rng.choice(clips.starts)])[0, 0], None


def fresh_level(rng, split):
    """A starting frame, a tensor (64, 64, 3) in [0, 1], and the true game in that state."""
    # one of the first 100,000 levels of that kind; there are 250,000
    true = Platformer(FIRST[split] + int(rng.integers(100_000)))
    # run into the level as the player of the videos does, for up to six seconds
    policy = Policy(rng)
    for _ in range(int(rng.integers(60))):
        true.step(policy(true))
    # come to rest, so that one frame tells all
    while not true.on_ground() or true.vx:
        true.step(0)
    return torch.from_numpy(true.frame()).float() / 255, true


def first_start(supply):
    """The first start of a supply at which every button does something, of a hundred.

    That is open ground, as the true game sees it. Worlds that have no true game begin anywhere.
    """
    for frame, true in itertools.islice(supply, 100):
        if true is None or is_open(true):
            break
    return frame, true


def is_open(true):
    """Does each button, held for six frames, move the true hero as on an endless plain?"""
    before = true.save()
    moves = []
    for button in range(len(ACTIONS)):
        heights = []
        for _ in range(6):
            true.step(button)
            heights.append(before[1] - true.y)
        # without a jump he is to end at the height at which he began
        rise = max(heights) if button >= 3 else heights[-1]
        moves.append((true.x - before[0], rise))
        true.restore(before)
    # 2 + 5 * 4 pixels sideways, 8 + 6 + 4 + 2 upwards: see the physics in data.py
    return moves == [(0, 0), (-22, 0), (22, 0), (0, 20), (-22, 20), (22, 20)]


def same_data(game, data, run):
    """End the program unless the world of the folder run was trained on the folder data."""
    name = Clips(data, "train", 1).name
    if name != game.origin["data"]:
        stop(f"{run} was trained on {game.origin['data']}, but {data} is {name}; name the right "
             "one with --data")


ANEW = "write it anew with: python {}.py --resume (and the same --data and --run)"


def read_scores(path):
    """The scores that a stage wrote to NAME.json, as a dictionary. Empty if there is no file."""
    if not path.exists():
        return {}
    try:
        scores = json.loads(path.read_text())
        if not isinstance(scores, dict):
            raise ValueError("these are no scores")
        return scores
    # JSON that is nested without end is a RecursionError
    except (ValueError, RecursionError) as e:
        stop(f"{path} is damaged ({e}); {ANEW.format(path.stem)}")


def check_scores(path, scores, K):
    """End the program if the scores of a LAM name codes or buttons that its K codes cannot have."""
    # how many numbers there are, and below what each of them is
    sizes = dict(keys=(len(ACTIONS), K), meaning=(K, len(ACTIONS)), still=(1, K),
                 guess=(len(ACTIONS) + 1, K))
    for name, (count, below) in sizes.items():
        given = scores.get(name)
        if given is None:
            continue
        numbers = [given] if name == "still" else given
        fine = isinstance(numbers, list) and len(numbers) == count
        if not fine or not all(type(n) is int and 0 <= n < below for n in numbers):
            stop(f"{path} is damaged ({name} is {given!r:.40}); {ANEW.format('lam')}")


def read_image(path, H, W):
    """Any image file as a frame (H, W, 3) in [0, 1]: upright, its middle, averaged down."""
    try:
        pixels = read_picture(path, H, W)
    except Unreadable as e:
        stop(f"cannot read the picture {path} ({e})")
    return torch.from_numpy(pixels).float() / 255


# ------------------------------------------------------------------------------- the window


class Window:
    """A matplotlib window: the world, the true game beside it if there is one, and below them a
    strip with what each button leads to.

    What moves is drawn by hand, over a background that matplotlib draws once (blitting).
    """

    DARK = "#16161a"
    LIGHT = "#c8c8d0"
    PRESSED = "#ffb020"     # the code of a key that is down, and the sign of a pause
    PLAYED = "#50e070"      # the code that is played for it

    def __init__(self, game, supply, fps, folder):
        """supply: see `starts`. fps: beats of the clock per second. folder: for recordings."""
        import matplotlib.pyplot as plt
        self.plt = plt
        self.game = game
        self.supply = supply
        self.fps = fps
        self.folder = folder

        # the keys that are down, in the order pressed: has a beat of the clock seen them yet?
        self.held = {}
        # the keys that came up, and when
        self.released = {}
        # the digits that press codes: from the tenth on a code has none
        self.codes = [str(code + 1) for code in range(min(game.K, 9))]
        self.commands = {
            "p": self.pause,
            ".": self.single_step,
            "u": self.take_back,
            "r": self.restart,
            "n": self.new_start,
            "b": self.try_every_code,
            "e": self.draw_or_play,
            "v": self.verbatim,
            "g": self.record,
            "h": self.help,
            "q": self.quit,
            "escape": self.quit,
        }

        self.paused = False
        # was the last command an undo? Then a key that plays ends the pause
        self.undone = False
        # are all keys shown?
        self.helping = False
        # the frames of a recording, if there is one
        self.film = None
        # the frame that is being drawn on, the colour of the brush, and where it was last
        self.sketch = None                                          # (H, W, C)
        self.ink = np.ones(3, np.float32)                           # (C,)
        self.brush = None
        # when the last frames were played: their rate is shown
        self.times = deque(maxlen=21)
        # the choice that led to the newest frame, and a message
        self.shown = None
        self.message = ""
        # what was on the screen last, and when it was drawn
        self.seen = None
        self.drawn = 0.0
        # what lies behind all that moves
        self.background = None

        game.reset(*next(supply))
        self.lay_out()
        self.begin()
        connect = self.figure.canvas.mpl_connect
        connect("key_press_event", self.on_press)
        connect("key_release_event", self.on_release)
        connect("button_press_event", self.on_mouse)
        connect("motion_notify_event", self.on_mouse)
        connect("resize_event", self.fit_letters)
        connect("draw_event", self.on_draw)

    def lay_out(self):
        """Make the figure: one or two large pictures, the strip, four lines of text."""
        game = self.game
        # matplotlib's own shortcuts would swallow our keys
        for name in list(self.plt.rcParams):
            if name.startswith("keymap."):
                self.plt.rcParams[name] = []
        self.plt.rcParams["toolbar"] = "None"

        two = game.true is not None
        size = (9.6, 7.0) if two else (5.4, 7.0)
        self.figure = self.plt.figure("Genie", figsize=size, facecolor=self.DARK)
        grid = self.figure.add_gridspec(2, game.K, height_ratios=[5, 1], left=0.02, right=0.98,
                                        top=0.95, bottom=0.13, wspace=0.08, hspace=0.15)
        # all text, with the room that each may take: see `fit_letters`
        self.texts = []
        self.grey = rgba(np.full_like(game.frame, 0.1))             # (H, W, 4)
        middle = game.K // 2 if two else game.K
        self.view = self.picture(grid[0, :middle], "the learned world").axes
        self.beside = None
        if two:
            self.beside = self.picture(grid[0, middle:], "the true game, same keys").axes
            self.nothing = self.write(0.75, 0.6, "no true game for a drawing", 0.45, 0.05, 14,
                                      ha="center")
        # the strip, and the frames around it that light up
        self.strip = []
        self.lights = []
        for code in range(game.K):
            label = game.label(code).replace(" ", "\n", 1)
            image = self.picture(grid[1, code], label, 0.9 / game.K, moving=False)
            self.strip.append(image)
            light = self.plt.Rectangle((0, 0), 1, 1, transform=image.axes.transAxes, fill=False,
                                       linewidth=4, clip_on=False, animated=True)
            self.lights.append(image.axes.add_patch(light))

        self.text = self.write(0.02, 0.066, "", 0.96, 0.055, 9, columns=78)
        self.write(0.02, 0.01, SHORT_KEYS, 0.96, 0.055, 9, animated=False)
        # the sign that the game waits, across the top of the pictures
        self.sign = self.write(0.5, 0.93, "", 0.9, 0.7, 18, ha="center", va="top", weight="bold",
                               ma="left", color=self.DARK)
        self.sign.set_bbox(dict(facecolor=self.PRESSED, pad=8))
        self.fit_letters()

    def picture(self, cell, title, across=0.45, moving=True):
        """A grey picture in axes of its own. matplotlib never draws a moving one, `draw_pictures`
        does: here it only gives the axes their shape, and the mouse its coordinates."""
        axes = self.figure.add_subplot(cell)
        axes.set_xticks([])
        axes.set_yticks([])
        heading = axes.set_title(title, color=self.LIGHT, family="monospace", pad=4)
        self.texts.append((heading, across, 0.045, 9, 0))
        return axes.imshow(self.grey, interpolation="nearest", animated=moving)

    def write(self, x, y, words, across, up, most, columns=0, animated=True, **how):
        """Put words at a place of the window. They may take the shares `across` and `up` of it, in
        letters of at most so many points, and have room for so many columns."""
        how = dict(color=self.LIGHT, family="monospace", animated=animated) | how
        text = self.figure.text(x, y, words, **how)
        self.texts.append((text, across, up, most, columns))
        return text

    def fit_letters(self, event=None):
        """Choose the size of all letters so that no line is cut, in a window of any size."""
        point = self.figure.dpi / 72                                # in pixels
        for text, across, up, most, columns in self.texts:
            lines = text.get_text().splitlines() or [""]
            columns = max(columns, *[len(line) for line in lines], 1)
            # matplotlib makes a letter some whole number of pixels wide, and 1.65 times as high
            # (with 1.64 it is rather too small than too large)
            letter = max(1, int(across * self.figure.bbox.width / columns))
            line = up * self.figure.bbox.height / len(lines)
            # a line takes 1.3 times the height of a letter
            text.set_fontsize(min(most, 1.64 * letter / point, line / 1.3 / point))

    # ............................................................ keys and mouse

    def on_press(self, event):
        """Obey a key that goes down. A key that plays waits for the next beat of the clock."""
        key = plain(event.key)
        # a key that is held down comes up and goes down again, 30 times a second
        self.released.pop(key, None)
        # any key puts the table of keys away
        self.helping = self.helping and key == "h"
        if key in MOVES or key in self.codes:
            self.held.setdefault(key, False)
            if self.undone:
                self.paused = False
                self.undone = False
        elif key in self.commands:
            self.commands[key]()
        # whatever it did, all is drawn
        self.seen = None
        self.show()

    def on_release(self, event):
        """Note when a key comes up."""
        self.released[plain(event.key)] = time.time()

    def on_mouse(self, event):
        """Paint on the sketch with the left mouse button, take up a colour with another one."""
        drawing = self.sketch is not None and event.inaxes is self.view
        if not drawing or not event.button:
            self.brush = None
            return
        # (at the edge of the last pixel, rounding would leave the picture)
        place = np.clip([event.ydata, event.xdata], 0, np.array(self.sketch.shape[:2]) - 1)
        if event.button != 1:
            row, column = place.round().astype(int)
            self.ink = self.sketch[row, column].copy()
            return
        # the mouse reports a few places of a stroke: paint the line between
        if self.brush is None or event.name == "button_press_event":
            self.brush = place
        steps = int(abs(place - self.brush).max()) + 2
        for row, column in np.linspace(self.brush, place, steps).round().astype(int):
            self.sketch[max(0, row - 1):row + 2, max(0, column - 1):column + 2] = self.ink
        self.brush = place
        self.show()

    def pause(self):
        self.paused = not self.paused
        self.undone = False

    def single_step(self):
        """Play one frame under the keys that are down, and stay paused."""
        self.paused = True
        self.undone = False
        if self.sketch is None:
            self.step()

    def take_back(self):
        self.sketch = None
        self.paused = True
        self.undone = True
        self.shown = None
        self.game.take_back()

    def restart(self):
        self.game.restart()
        self.begin()

    def new_start(self):
        self.game.reset(*next(self.supply))
        self.begin()

    def begin(self):
        """The game was reset: show what every button does from here."""
        self.sketch = None
        self.shown = None
        # where no true game can show it, how like the videos is this?
        self.message = "" if self.game.true else self.game.familiar()
        self.try_every_code()

    def try_every_code(self):
        """Fill the strip with what each code leads to, held for four frames."""
        for image, frame in zip(self.strip, self.game.every_button(AHEAD)):
            image.set_data(rgba(frame))
        # the strip does not move: the whole window has to be drawn anew
        self.background = None

    def draw_or_play(self):
        """Copy the frame, to draw on it. The second time, begin from the drawing."""
        if self.sketch is None:
            self.sketch = self.game.frame.copy()
            return
        self.game.reset(torch.from_numpy(self.sketch))
        self.begin()
        print(self.message)

    def verbatim(self):
        """Play codes as pressed, or again as usual."""
        self.game.as_pressed = not self.game.as_pressed
        self.message = "a code that can hardly come is played as a likely one"
        if self.game.as_pressed or self.game.dynamics.prior is None:
            self.message = "each code is played as pressed"

    def record(self):
        """Start a recording. The second time, write it."""
        if self.film is None:
            self.film = [side_by_side(self.game)]
            return
        # if the disk is full, game and recording go on
        try:
            self.write_film()
        except SystemExit as e:
            print(e, file=sys.stderr)

    def write_film(self):
        """Write the recording to recording-1.gif, or the first number that is free."""
        for number in itertools.count(1):
            path = self.folder / f"recording-{number}.gif"
            if not path.exists():
                break
        # a drawing has no true game beside it: its frames become as wide as the others
        widest = max(frame.shape[1] for frame in self.film)
        film = [np.pad(frame, ((0, 0), (0, widest - frame.shape[1]), (0, 0)))
                for frame in self.film]
        write_gif(path, film, self.fps)
        self.film = None
        self.message = f"{path} is written"

    def help(self):
        self.helping = not self.helping

    def quit(self):
        self.plt.close(self.figure)
        # the server of a window in a browser would go on
        if self.plt.get_backend().lower() == "webagg":
            signal.raise_signal(signal.SIGINT)

    # ............................................................ a beat of the clock

    def run(self):
        """Open the window and play until it is closed."""
        timer = self.figure.canvas.new_timer(interval=2)
        timer.add_callback(self.beat_if_due)
        self.due = time.time()
        timer.start()
        self.show()
        self.plt.show()
        if self.film:
            self.write_film()

    def beat_if_due(self):
        """The timer calls this every 2 milliseconds. (On a Mac, a timer keeps its interval.)"""
        if time.time() >= self.due:
            self.due = max(self.due + 1 / self.fps, time.time())
            self.tick()

    def tick(self):
        """One beat of the clock: advance the world under the keys that are down, and show it."""
        waits = self.paused or self.helping or self.sketch is not None
        if waits:
            # a pause is not a slow frame
            self.times.clear()
        else:
            self.step()
        lit = self.lit()
        # every key that is down has had this beat
        self.held = dict.fromkeys(self.held, True)
        # of a world that stands still, only the lights change
        if not waits or self.seen is None or lit != self.seen[2]:
            self.show()

    def step(self):
        """Play a frame under the keys that are down, if they stand for a code."""
        self.shown = self.choice()
        if self.shown is None:
            self.times.clear()
            return
        self.game.press(*self.shown)
        self.times.append(time.time())
        if self.film is not None:
            self.film.append(side_by_side(self.game))

    def choice(self):
        """What the keys that are down stand for: a code, and its true button or None. Or None, if
        none is down and no code is known to mean that."""
        self.forget_released_keys()
        # of several digits, the one pressed last
        digits = [key for key in self.held if key in self.codes]
        if digits:
            code = self.codes.index(digits[-1])
            return code, self.game.button(code)
        if self.game.keys is None:
            return None
        moves = [MOVES[key] for key in self.held if key in MOVES]
        if "down" in moves and self.game.down is not None:
            return self.game.down, ACTIONS.index("none")
        button = button_of(moves)
        return self.game.keys[button], button

    def forget_released_keys(self):
        """Take the keys that came up out of those that are held."""
        now = time.time()
        for key, since in list(self.released.items()):
            # a key that is held down is down again after a thirtieth of a second, see on_press. It
            # is up when twice that has passed. A key that went down and up between two beats is
            # to have the next one
            seen = self.held.get(key, True)
            if now - since > 0.06 and seen:
                self.held.pop(key, None)
                self.released.pop(key)

    # ............................................................ drawing

    def show(self):
        """Bring the screen up to date."""
        seen = self.sign_words(), self.words(), self.lit()
        # letters take longer to draw than all the rest: numbers alone are renewed twice a second
        due = seen != self.seen or time.time() - self.drawn > 0.5
        if due:
            self.drawn = time.time()
            self.seen = seen
            self.renew_letters(*seen)
        canvas = self.figure.canvas
        if self.background is None or not canvas.supports_blit:
            # the whole window has to be drawn, and `on_draw` adds what moves
            canvas.draw_idle()
            return
        if due:
            canvas.restore_region(self.background)
            self.draw_letters()
        self.draw_pictures()
        canvas.blit(self.figure.bbox)

    def renew_letters(self, sign, words, lit):
        """Set all that moves besides the pictures: the sign, the lines of words, the lights."""
        message, news = words
        pressed, played = lit
        self.sign.set_text(sign)
        numbers = f"frame {self.game.count:4d}   {self.rate():4.1f} frames/s"
        self.text.set_text(f"{message}\n{numbers}   {news}")
        self.fit_letters()
        for code, light in enumerate(self.lights):
            light.set_visible(code in lit)
            light.set_edgecolor(self.PLAYED if code == played else self.PRESSED)

    def sign_words(self):
        """What stands across the pictures while the game waits."""
        if self.helping:
            return f"{KEYS}\nany key goes on"
        if self.undone:
            return "PAUSED\nany key that plays goes on"
        if self.paused:
            return "PAUSED\np goes on, . plays one frame"
        return ""

    def words(self):
        """A message, and what goes on now, in words."""
        words = []
        if self.sketch is not None:
            words.append("DRAWING: e plays it")
        if self.film is not None:
            words.append("RECORDING")
        if self.shown is not None:
            pressed, _ = self.shown
            words.append(f"code {self.game.label(pressed)}")
            if self.game.played not in (None, pressed):
                words.append(f"cannot come, played as {self.game.label(self.game.played)}")
        return self.message, "   ".join(words)

    def lit(self):
        """Which codes light up: that of the keys that are down, and the one played for it."""
        choice = self.choice()
        if choice is None:
            return None, None
        pressed, _ = choice
        return pressed, self.game.played if choice == self.shown else None

    def rate(self):
        """Frames per second, over the last 20."""
        if len(self.times) < 2:
            return 0
        return (len(self.times) - 1) / (self.times[-1] - self.times[0])

    def draw_pictures(self):
        """Give the renderer every pixel of the moving pictures. matplotlib would resample them,
        which takes ten times as long."""
        game = self.game
        pictures = {self.view: game.frame if self.sketch is None else self.sketch}
        if self.beside:
            true = game.true.frame() / 255 if game.true else np.zeros_like(game.frame)
            pictures[self.beside] = true                            # (H, W, C)
        context = self.renderer.new_gc()
        for axes, frame in pictures.items():
            left, bottom, right, top = axes.bbox.extents.round().astype(int)
            pixels = enlarged(frame, top - bottom, right - left)
            self.renderer.draw_image(context, left, bottom, pixels)
        if self.beside and not game.true:
            self.figure.draw_artist(self.nothing)
        # the sign lies over the pictures
        if self.sign.get_text():
            self.figure.draw_artist(self.sign)

    def draw_letters(self):
        """Draw all else that moves."""
        for artist in (*self.lights, self.text):
            self.figure.draw_artist(artist)

    def on_draw(self, event):
        """All that does not move was drawn anew. Add what moves before it gets to the screen."""
        self.renderer = event.renderer
        self.background = self.figure.canvas.copy_from_bbox(self.figure.bbox)
        self.draw_pictures()
        self.draw_letters()


def plain(key):
    """The name of a key, whatever else is down: that of "shift+left" and that of "A" are plain."""
    # a plus sign is a key, too
    return (key or "").rpartition("+")[2].lower()


def button_of(moves):
    """The true button (an index of data.ACTIONS) for what the keys that are down stand for."""
    # of left and right, the one pressed last
    parts = [move for move in moves if move in ("left", "right")][-1:]
    if "jump" in moves:
        parts.append("jump")
    return ACTIONS.index("+".join(parts) or "none")


def can_open_window():
    """Does matplotlib find a toolkit here that opens windows?"""
    try:
        import matplotlib.pyplot as plt
        backend = plt.get_backend()
        if backend.lower() == "webagg" and not importlib.util.find_spec("tornado"):
            stop("the window in a browser needs the package tornado: pip install tornado")
        if backend.lower() == "webagg":
            change_page()
        plt.switch_backend(backend)
    # MPLBACKEND names one that does not work here
    except (ImportError, ValueError):
        return False
    return backend.lower() in WINDOWS


def change_page():
    """The page of WebAgg without its toolbar, but with a line that says when the game has ended."""
    from matplotlib.backends.backend_webagg_core import FigureManagerWebAgg
    usual = FigureManagerWebAgg.get_javascript()

    def get_javascript():
        return usual + PAGE

    FigureManagerWebAgg.get_javascript = staticmethod(get_javascript)


def rgba(frame):
    """A frame (H, W, 3) in [0, 1] as bytes (H, W, 4): red, green, blue, opaque."""
    colours = (np.clip(frame, 0, 1) * 255).astype(np.uint8)
    return np.pad(colours, ((0, 0), (0, 0), (0, 1)), constant_values=255)


def enlarged(frame, height, width):
    """A frame (H, W, 3) in [0, 1] as bytes (height, width, 4), enlarged without smoothing. The
    lowest row comes first, as matplotlib's renderers take it."""
    rows = np.arange(height)[::-1] * frame.shape[0] // height       # (height,)
    columns = np.arange(width) * frame.shape[1] // width            # (width,)
    # the four bytes of a pixel travel together, as one number
    pixels = rgba(frame).view(np.uint32)[..., 0]                    # (H, W)
    large = pixels[rows[:, None], columns]                          # (height, width)
    return large.view(np.uint8).reshape(height, width, 4)


# ------------------------------------------------------------------------------- without a window


def play_script(game, supply, folder, worlds=1):
    """Play SCRIPT from `worlds` starting frames. Write to the folder play.gif, with the true game
    on the right if there is one, and buttons.png, the same frame under every code."""
    film = []
    for _ in range(worlds):
        game.reset(*next(supply))
        for word in tqdm(SCRIPT, desc="playing", unit="frame", dynamic_ncols=True):
            film.append(scripted_frame(game, ACTIONS.index(word)))
    write_gif(folder / "play.gif", film)
    if game.true:
        print("left: the learned world; right: the true game from the same frame under the same "
              "keys; below: which of left, jump and right are down")

    # hold each code for eight frames, always from the same frame
    plt = pyplot_for_files()
    figure, rows = plt.subplots(game.K, 9, figsize=(11, 1.25 * game.K), squeeze=False)
    for code in range(game.K):
        game.restart()
        frames = [game.frame]
        for _ in range(8):
            frames.append(game.press(code))
        for frame, axes in zip(frames, rows[code]):
            axes.imshow(frame)
            axes.set(xticks=[], yticks=[])
        rows[code, 0].set_ylabel(game.label(code), rotation=0, ha="right", va="center")
    for t, axes in enumerate(rows[0]):
        axes.set_title(f"frame {t}")
    figure.subplots_adjust(wspace=0.05, hspace=0.05)
    save_figure(folder / "buttons.png", figure,
                "the same frame, then eight frames under every code, a row each")
    plt.close(figure)


def names_of(game):
    """The labels of all codes, in a row."""
    return ", ".join(game.label(code) for code in range(game.K))


def scripted_frame(game, button):
    """The frame after a true button, or after some code where nobody knows what codes mean."""
    if not game.keys:
        game.press(button % game.K)
        return side_by_side(game)
    game.press(game.keys[button], button)
    frame = side_by_side(game)                                      # (H, W, C)
    # below it a light for each key, on where it is down: left, jump, right
    lights = np.full((8, *frame.shape[1:]), 0.1)
    middle = frame.shape[1] // 2
    for key, x in (("left", -12), ("jump", -3), ("right", 6)):
        down = key in ACTIONS[button]
        lights[1:7, middle + x:middle + x + 6] = 1 if down else 0.3
    return np.concatenate([frame, lights])


def side_by_side(game):
    """The frame of the world, and the true game beside it if there is one: (H, W, C)."""
    if not game.true:
        return game.frame
    gap = np.zeros_like(game.frame[:, :4])
    return np.concatenate([game.frame, gap, game.true.frame() / 255], 1)


# ------------------------------------------------------------------------------- command line


def parser():
    p = new_parser(__doc__)
    p.add_argument("--data", type=Path, default=Path("data/platformer"),
                   help="the data that the world was trained on, where starting frames of your "
                        "own videos come from")
    p.add_argument("--run", type=Path,
                   help="folder of the world (default: runs/NAME OF THE DATA, else assets/)")
    p.add_argument("--prompt", type=Path, help="begin from this picture")
    p.add_argument("--keys", type=int, nargs="+", metavar="CODE",
                   help="the codes (1, 2, ...) of no key, left, right, up and perhaps down, for a "
                        "world of your own videos")
    ours = dynamics_stage.SAMPLING["ours"]
    paper = dynamics_stage.SAMPLING["paper"]
    p.add_argument("--maskgit", type=int,
                   help=f"MaskGIT steps per frame (default: {ours['steps']}; for a world of "
                        f"--recipe paper {paper['steps']})")
    p.add_argument("--temperature", type=float,
                   help="of the sampled tokens; 0: always the likeliest (default: "
                        f"{ours['temperature']:g}; for a world of --recipe paper "
                        f"{paper['temperature']:g})")
    p.add_argument("--as-pressed", action="store_true",
                   help="play every code as pressed; otherwise one that can hardly come now is "
                        "played as a likely one of similar meaning")
    p.add_argument("--fps", type=float, default=10,
                   help="frames per second (default: %(default)s)")
    p.add_argument("--worlds", type=int, default=1,
                   help="how many starting frames --script plays through")
    p.add_argument("--seed", type=int, default=0, help="of starting frames and sampling")
    p.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    p.add_argument("--compile", choices=("on", "off"), default="off",
                   help="on: a wait before the first frame, then faster ones")
    p.add_argument("--script", action="store_true",
                   help="no window: write play.gif and buttons.png")
    return p


def check(args):
    """End the program if a flag has a value that makes no sense."""
    fine = [
        args.maskgit is None or args.maskgit >= 1,
        args.temperature is None or args.temperature >= 0,
        args.fps > 0,
        args.worlds >= 1,
        0 <= args.seed <= 10 ** 9,
    ]
    if not all(fine):
        stop("--maskgit and --worlds must be at least 1, --fps above 0, --temperature and --seed "
             "not negative (a seed at most a billion)")


def main(argv=None):
    p = parser()
    args = p.parse_args(argv)
    check(args)
    args.device = find_device(args.device)
    check_compiler(args)

    # which world? Where none is trained, the one that ships: what is written still goes to --run
    if args.run is None:
        args.run = Path("runs") / args.data.name
    folder = args.run
    default = args.data == p.get_default("data") and args.run == Path("runs/platformer")
    if default and not (folder / "dynamics.pt").exists():
        folder = ASSETS
        print(f"nothing trained in {args.run} yet: playing the small world in {ASSETS.name}/",
              file=sys.stderr)

    # what nobody asks for is as in the recipe of the world
    asked = dict(steps=args.maskgit, temperature=args.temperature)
    sampling = {name: value for name, value in asked.items() if value is not None}

    torch.manual_seed(args.seed)
    models = load(folder, args.device)
    game = Game(models, args.device, args.as_pressed, args.compile, **sampling)
    if args.keys:
        game.assign(*args.keys)
    print(game.guess() or f"the codes: {names_of(game)}")
    supply = starts(game, args.seed, args.prompt, args.data, args.run)
    supply = itertools.chain([first_start(supply)], supply)

    if not args.script and not can_open_window():
        print("no window can be opened (no display, no GUI toolkit: on Linux, install python3-tk, "
              "or MPLBACKEND says so): playing a scripted sequence instead", file=sys.stderr)
        args.script = True
    if args.prompt:
        game.reset(*next(supply))
        print(game.familiar())
    if args.script:
        play_script(game, supply, args.run, args.worlds)
    else:
        print(KEYS)
        Window(game, supply, args.fps, args.run).run()


if __name__ == "__main__":
    # Play takes one thread, unless OMP_NUM_THREADS says otherwise. The operations of a frame are
    # small: alone on two cores, two threads are no faster than one. Beside a training, which is
    # busy on both, two take 80 times as long, since threads that wait for each other spin
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    command(main)
