"""Make a data set of short video clips, from the built-in game or from your own videos.

    python data.py                                    # the built-in game -> data/platformer/
    python data.py --videos my_videos/ --name mine    # films, pictures, arrays -> data/mine/
    python data.py --show --name mine                 # only draw a contact sheet of data/mine/

Genie was trained on 16-frame clips of platform games, at 10 frames/s (section 3). The built-in game
gives such clips, of 64x64 pixels. A clip is a few frames in a row, and an episode is one video
without a cut: here, one level played. A data set is a folder of these files:
    train.u8, valid.u8    raw uint8 frames (F, H, W, C), all episodes end to end: to train on, and
                          held out to choose by
    test.u8               built-in game only: held out to report by; nothing is ever chosen on it
    meta.json             frame size, frames per second, length of every episode, source, and the
                          date and a checksum of each .u8 file
    true_actions.npz      built-in game only: the buttons that the player really pressed
No training code opens true_actions.npz. It serves to score what was discovered without it, and to
measure how well anybody could do (python -m lab.oracle).
"""
import st_block     # first: so Ctrl-C ends the program in one line, even during the imports
import functools
import hashlib
import json
import logging
import math
import os
import re
import shutil
import sys
import warnings
import zlib
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from st_block import (check_writable, command, end_bars, lock, new_parser, save_picture, stop,
                      unlock, write_json)

# ------------------------------------------------------------------------------- the built-in game

# what the player can press in a frame; "a button" means one of these six, or its index
ACTIONS = ("none", "left", "right", "jump", "left+jump", "right+jump")

# The sizes and the physics of the game were chosen by hand. At full speed it takes some 215 frames
# from the start to the wall at the right end: more than an episode has. A jump rises 8 + 6 + 4 + 2
# = 20 pixels, which is two tiles and a little.
TILE = 8                # pixels along a side of a tile
VIEW = 64               # pixels along a side of a frame
WIDTH = 160             # tiles from one end of a level to the other
ROWS = VIEW // TILE     # tiles from the top of a level to the bottom
PLAYER_W = 6            # width of the player in pixels
PLAYER_H = 8            # height of the player in pixels
PLAYER_X = 24           # the player's column in a frame: the camera follows, the world scrolls
START = 48              # the column of tiles where the player starts

RUN = 4                 # top speed sideways, pixels per frame
ACCEL = 2               # gain of speed sideways, pixels per frame and frame
JUMP = 8                # speed upwards when a jump begins, pixels per frame
GRAVITY = 2             # gain of speed downwards, pixels per frame and frame
FALL = 8                # top speed downwards, pixels per frame

LEVELS = 1_000_000      # levels of a --seed: 0 has seeds 0 to 999,999, 1 has the next million
# The first level of each kind: to train on, to choose by, and to report by. Nothing is chosen on
# the last kind, so that its scores are not those of a lucky choice.
FIRST = dict(train=0, valid=500_000, test=750_000)

# the colours of a level, each (red, green, blue); a pit holds water or lava
Look = namedtuple("Look", "sky_high sky_low hill turf soil shade brick mortar pit player face")
LOOKS = (
    # a meadow
    Look(sky_high=(104, 176, 236), sky_low=(160, 212, 244), hill=(120, 188, 150),
         turf=(64, 160, 60), soil=(150, 100, 56), shade=(124, 80, 44),
         brick=(200, 120, 64), mortar=(140, 76, 36), pit=(40, 88, 200),
         player=(220, 48, 44), face=(255, 220, 180)),
    # a desert
    Look(sky_high=(244, 196, 120), sky_low=(252, 224, 168), hill=(226, 170, 104),
         turf=(216, 160, 76), soil=(196, 132, 64), shade=(168, 108, 48),
         brick=(150, 84, 60), mortar=(108, 56, 40), pit=(120, 40, 30),
         player=(36, 100, 180), face=(255, 236, 210)),
    # a night
    Look(sky_high=(20, 24, 60), sky_low=(40, 48, 96), hill=(34, 56, 84),
         turf=(70, 120, 120), soil=(64, 68, 100), shade=(48, 50, 78),
         brick=(110, 96, 150), mortar=(70, 60, 110), pit=(30, 140, 120),
         player=(240, 200, 60), face=(255, 244, 220)),
    # a cave
    Look(sky_high=(44, 36, 40), sky_low=(60, 48, 50), hill=(76, 60, 58),
         turf=(130, 120, 116), soil=(96, 84, 82), shade=(72, 62, 62),
         brick=(150, 110, 70), mortar=(100, 70, 44), pit=(230, 96, 24),
         player=(90, 210, 120), face=(240, 255, 230)),
)
COIN = (250, 210, 40)
EYE = (20, 20, 24)


def sprite(*rows):
    """An array (PLAYER_H, PLAYER_W) from rows of digits."""
    return np.array([[int(digit) for digit in row] for row in rows])


# the player facing right: 0 is background, 1 the player, 2 the face, 3 the eye
LEGS_APART = sprite("011110", "111111", "112232", "112222", "011110", "111111", "011110", "010010")
LEGS_BENT = sprite("011110", "111111", "112232", "112222", "011110", "111111", "111110", "000110")


def way_of(button):
    """Where a button, an index of ACTIONS, sends the player: -1 is left, 1 right, 0 neither."""
    return (0, -1, 1)[button % 3]


class Platformer:
    """A level of the built-in game and its physics. Fully determined by the seed and the buttons.

    Left and right gain 2 pixels per frame, up to 4, and turn round at once. With neither of them
    the player stops on the ground and keeps his speed in the air. A jump starts from the ground
    only, and gravity rules it afterwards. So one frame does not tell what comes next, since it
    shows no speed, but two frames do. A fall into a pit costs time and never ends the episode.
    """

    def __init__(self, seed):
        rng = np.random.default_rng(seed)
        self.look = LOOKS[rng.integers(len(LOOKS))]
        # the colours of a sprite by its digits
        self.ink = np.array([(0, 0, 0), self.look.player, self.look.face, EYE], np.uint8)
        self.build(rng)
        self.paint(rng)
        # the upper left corner of the player, in pixels of the level
        self.x = START * TILE
        self.y = (ROWS - 1 - self.ground[START]) * TILE
        # his speed in pixels per frame, and 1 where he faces right, -1 where he faces left
        self.vx = 0
        self.vy = 0
        self.facing = 1

    # --------------------------------------------------------------------------- making a level

    def build(self, rng):
        """Draw the plan of the level: ground, pits, floating bricks and coins.

        How often each of them comes, and how long it is, was chosen by hand, for variety.
        """
        self.build_ground(rng)
        self.build_bricks(rng)
        self.build_coins(rng)

    def build_ground(self, rng):
        """Heights of the ground in tiles, `ground` (WIDTH,), and where the pits are, `is_pit`.

        A rise of 2 tiles, 16 pixels, can be jumped, since a jump reaches 20. Walking right, the
        player meets no higher one. Out of a pit to the left he may.
        """
        self.ground = np.zeros(WIDTH, int)
        self.is_pit = np.zeros(WIDTH, bool)
        column = 0
        height = int(rng.integers(2, 4))
        while column < WIDTH:
            # a stretch of level ground
            length = int(rng.integers(2, 7))
            self.ground[column:column + length] = height
            column += length
            highest = 4
            # sometimes a pit follows, and ground behind it that is low enough to jump onto
            if rng.random() < 0.35:
                length = int(rng.integers(1, 4))
                self.ground[column:column + length] = 1
                self.is_pit[column:column + length] = True
                column += length
                height = min(height, 3)
                highest = 3
            # the next stretch is up to two tiles higher or lower
            height = int(np.clip(height + rng.choice([-2, -1, 1, 1, 2]), 2, highest))
        # walls at both ends
        for end in (slice(None, 4), slice(-4, None)):
            self.ground[end] = ROWS
            self.is_pit[end] = False
        # level ground, and no pit, where the player starts
        first = START - 2
        self.ground[first:START + 3] = 2 if self.is_pit[first] else self.ground[first]
        self.is_pit[first:START + 3] = False

    def build_bricks(self, rng):
        """Rows of floating bricks, `bricks` (ROWS, WIDTH). With the ground they make `solid`."""
        earth = np.arange(ROWS)[:, None] >= ROWS - self.ground      # (ROWS, WIDTH)
        self.solid = earth.copy()
        column = 6
        while column < WIDTH - 10:
            # a gap, then a row of one to three bricks
            column += int(rng.integers(3, 9))
            length = int(rng.integers(1, 4))
            # the topmost row of earth below them
            top = 0
            if column + length < WIDTH - 4:
                top = ROWS - self.ground[column:column + length].max()
            # there must be headroom beneath, and a jump onto them must not leave the frame
            if top >= 5 and not START - 4 < column < START + 4:
                row = max(3, top - int(rng.integers(2, 4)))
                self.solid[row, column:column + length] = True
            column += length
        self.bricks = self.solid & ~earth

    def build_coins(self, rng):
        """Coins, `coins` (ROWS, WIDTH), on or one tile above what one can stand on."""
        self.coins = np.zeros((ROWS, WIDTH), bool)
        for column in range(5, WIDTH - 5):
            if rng.random() < 0.3 and column != START:
                topmost = int(np.argmax(self.solid[:, column]))
                row = topmost - 1 - int(rng.integers(0, 2))
                if row >= 1 and not self.solid[row, column]:
                    self.coins[row, column] = True

    def paint(self, rng):
        """Paint the level once, as `picture` (VIEW, pixels, 3). A frame is cut out of it."""
        picture = np.empty((VIEW, WIDTH * TILE, 3), np.uint8)
        # the sky
        picture[:24] = self.look.sky_high
        picture[24:] = self.look.sky_low
        # hills: all that is below a sum of three waves, in steps of two pixels
        x = np.arange(WIDTH * TILE)
        a, b, c = rng.uniform(0, 2 * math.pi, 3)
        crest = 34 + 8 * np.sin(x / 23 + a) + 6 * np.sin(x / 11 + b) + 3 * np.sin(x / 5 + c)
        picture[np.arange(VIEW)[:, None] >= crest // 2 * 2] = self.look.hill
        # ground and bricks
        for row in range(ROWS):
            for column in range(WIDTH):
                if self.solid[row, column]:
                    across = slice(column * TILE, (column + 1) * TILE)
                    tile = picture[row * TILE:(row + 1) * TILE, across]
                    self.paint_tile(tile, row, column, rng)
        # at the right end the view reaches beyond the level
        self.picture = np.pad(picture, ((0, 0), (0, TILE), (0, 0)), mode="edge")
        # the pixels of a tile that a coin covers: a disc
        self.coin = np.zeros((TILE, TILE), bool)
        self.coin[1:7, 2:6] = True
        self.coin[2:6, 1:7] = True

    def paint_tile(self, tile, row, column, rng):
        """Paint one solid tile in place; tile (TILE, TILE, 3) is a view of the picture."""
        look = self.look
        if self.bricks[row, column]:
            # two courses of bricks, their vertical joints staggered
            tile[:] = look.brick
            tile[[3, 7]] = look.mortar
            tile[:4, 7] = look.mortar
            tile[4:, 3] = look.mortar
        elif self.is_pit[column]:
            # ripples on water or lava
            tile[:] = look.pit
            tile[::4, 2:6] = look.sky_low
        else:
            # a spot at random makes tiles differ; among equal tiles a scroll would not show
            tile[:] = look.soil
            down, right = rng.integers(0, 3, 2) * 2
            tile[down:down + 2, right:right + 4] = look.shade
            # turf on the topmost tile, with an uneven edge
            if row == ROWS - self.ground[column]:
                tile[:3] = look.turf
                tile[3, :int(rng.integers(1, 4)) * 2] = look.turf

    # --------------------------------------------------------------------------- playing it

    def tiles(self, x, y):
        """The tiles that the player covers at pixel (x, y): a slice of rows, a slice of columns."""
        # above the frame he counts as at its top
        y = max(y, 0)
        rows = slice(y // TILE, (y + PLAYER_H - 1) // TILE + 1)
        columns = slice(x // TILE, (x + PLAYER_W - 1) // TILE + 1)
        return rows, columns

    def hits(self, x, y):
        """Would the player be inside something solid at pixel (x, y)?"""
        return self.solid[self.tiles(x, y)].any()

    def on_ground(self):
        """Does the player stand on something?"""
        return self.y >= VIEW - PLAYER_H or self.hits(self.x, self.y + 1)

    def step(self, button):
        """Advance by one frame (0.1 s) under ACTIONS[button]."""
        way = way_of(button)
        jump = button >= 3
        grounded = self.on_ground()
        # speed sideways
        if way:
            self.facing = way
            self.vx = way * min(RUN, max(0, way * self.vx) + ACCEL)
        elif grounded:
            self.vx = 0
        # speed up or down
        if not grounded:
            self.vy = min(FALL, self.vy + GRAVITY)
        elif jump:
            self.vy = -JUMP
        else:
            self.vy = 0
        # move sideways; a wall lets the player come up to it and no further
        x = self.x + self.vx
        if self.hits(x, self.y):
            if self.vx > 0:
                x = (x + PLAYER_W) // TILE * TILE - PLAYER_W
            else:
                x = (x // TILE + 1) * TILE
            self.vx = 0
        self.x = x
        # move up or down; ground, a ceiling and the bottom of the frame stop the player
        y = self.y + self.vy
        if self.vy and self.hits(x, y):
            if self.vy > 0:
                y = (y + PLAYER_H - 1) // TILE * TILE - PLAYER_H
            else:
                y = (y // TILE + 1) * TILE
            self.vy = 0
        self.y = min(y, VIEW - PLAYER_H)
        # coins that he touches are gone
        if self.y >= 0:
            self.coins[self.tiles(self.x, self.y)] = False

    def frame(self):
        """What the screen shows now: (64, 64, 3) uint8."""
        left = self.x - PLAYER_X
        frame = self.picture[:, left:left + VIEW].copy()
        # coins; of one at the edge, only the columns from a to b are in the frame
        first = left // TILE
        for row, column in zip(*np.nonzero(self.coins[:, first:first + ROWS + 1])):
            x = (first + column) * TILE - left
            a = max(0, -x)
            b = min(TILE, VIEW - x)
            place = frame[row * TILE:(row + 1) * TILE, x + a:x + b]
            place[self.coin[:, a:b]] = COIN
        # the player; his legs move every four pixels on the ground, and stay bent in the air
        image = LEGS_BENT
        if self.on_ground() and self.x // 4 % 2 == 0:
            image = LEGS_APART
        # in a high jump his head is above the frame
        above = max(0, -self.y)
        image = image[above:, ::self.facing]
        place = frame[self.y + above:self.y + PLAYER_H, PLAYER_X:PLAYER_X + PLAYER_W]
        place[image > 0] = self.ink[image[image > 0]]
        return frame

    def save(self):
        """The state of the game: x, y, vx, vy, facing, and the coins as bytes."""
        return self.x, self.y, self.vx, self.vy, self.facing, self.coins.tobytes()

    def restore(self, state):
        """Return to a moment of this level, as `save` described it."""
        self.x, self.y = state[:2]
        self.vx, self.vy = state[2:4]
        self.facing = state[4]
        self.coins = np.frombuffer(state[5], bool).reshape(self.coins.shape).copy()

    def visible(self):
        """All of the state that shows. Two moments of a level with equal `visible` look alike."""
        return self.x, self.y, self.facing, self.coins.tobytes()

    def outcomes(self):
        """What each of the six buttons would lead to, without moving on: [(visible, state)]."""
        before = self.save()
        after = []
        for button in range(len(ACTIONS)):
            self.restore(before)
            self.step(button)
            after.append((self.visible(), self.save()))
        self.restore(before)
        return after


class Policy:
    """The player of the videos. Called with a game, he returns the button that he presses.

    In most frames he presses a fresh button at random. He drifts right more than left, and he
    mostly hops over pits. Nearly every button stays likely at every moment, so that the past alone
    does not tell the next frame: only then have latent actions something to explain. He does not
    look ahead for walls and runs against them, because a model learns what a wall is only from
    videos in which somebody runs against one. The probabilities below were chosen by hand, for all
    this. Two other players were tried: who hops over walls teaches none, and who presses afresh in
    only a quarter of the frames can be foretold (lab/NOTES.md).
    """

    def __init__(self, rng):
        self.rng = rng
        # which way he wants to go: 1 is right, -1 is left
        self.mood = 1
        # none, left or right, as an index of ACTIONS
        self.held = 0

    def __call__(self, game):
        rng = self.rng
        # every three seconds or so he wants to go some way, two times of three to the right
        if rng.random() < 0.03:
            self.mood = 1 if rng.random() < 0.65 else -1
        # in three frames of four he presses afresh: mostly the way he wants to go, often nothing,
        # and often back
        if rng.random() < 0.75:
            way = rng.choice([0, self.mood, -self.mood], p=[0.27, 0.5, 0.23])
            self.held = {0: 0, -1: 1, 1: 2}[int(way)]
        # he jumps at any time, and more often where there is no ground 10 pixels ahead, which are
        # two or three frames away
        no_ground = not game.hits(game.x + 10 * self.mood, game.y + 4)
        if rng.random() < (0.6 if no_ground else 0.2):
            return self.held + 3
        return self.held


def play_episode(seed, frames):
    """One episode that the policy plays: frames (F, 64, 64, 3), buttons (F,), same (F, 6).

    buttons[t] was pressed between frame t and frame t+1. same[t, b] is true where button b would
    have led to the very same frame t+1.
    """
    game = Platformer(seed)
    policy = Policy(np.random.default_rng([seed, 1]))
    video = []
    buttons = []
    same = []
    for _ in range(frames):
        video.append(game.frame())
        button = policy(game)
        outcomes = game.outcomes()
        visible, state = outcomes[button]
        buttons.append(button)
        same.append([seen == visible for seen, _ in outcomes])
        game.restore(state)
    return np.stack(video), np.array(buttons, np.uint8), np.array(same)


# ------------------------------------------------------------------------------- making a data set

# all that may lie in the folder of a data set
FILES = ("train.u8", "valid.u8", "test.u8", "meta.json", "true_actions.npz", "sheet.png")
# in the folder of one that is being made: what was read of your own videos so far
READ = "videos"


def checked(folder):
    """End the program if a folder that is to be deleted holds anything that is not ours."""
    names = sorted(file.name for file in folder.iterdir()) if folder.exists() else []
    foreign = [name for name in names if name not in (*FILES, READ)]
    if foreign:
        stop(f"{folder} holds what data.py did not write ({', '.join(foreign[:3])}), and will not "
             "be deleted; move that, or choose another --name")
    return folder


def build(root, overwrite, source, fill):
    """Make the folder `root` of a data set as a whole, or not at all.

    fill(folder) writes the .u8 files into `folder` and returns the entries of meta.json, to which
    the dictionary `source` is added. What `fill` has in the folder READ outlives an interruption.
    Ends with one sentence where `root` cannot be written, or exists and may not be replaced.
    """
    if root.exists() and not overwrite:
        stop(f"{root} already exists; choose another --name, or --overwrite it")
    if root.exists() and not (root / "meta.json").exists():
        stop(f"{root} is no data set, and will not be overwritten; choose another --name")
    # the folder may be a link to a larger disk: work beside the place that it points to
    place = checked(Path(os.path.realpath(root)))
    part = checked(place.with_name(f".{place.name}.unfinished"))
    old = checked(place.with_name(f".{place.name}.replaced"))
    check_writable(part)
    lock(part)
    try:
        # what a killed process left, but for the videos that it had read
        for name in FILES:
            (part / name).unlink(missing_ok=True)
        meta = fill(part) | source
        meta["written"] = {file.stem: (file.stat().st_mtime_ns, checksum(file))
                           for file in part.glob("*.u8")}
        (part / "meta.json").write_text(json.dumps(meta))
        # all is on the disk before it replaces anything
        shutil.rmtree(part / READ, ignore_errors=True)
        for file in part.iterdir():
            with open(file, "r+b") as f:
                os.fsync(f.fileno())
        if place.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(place, old)
        os.replace(part, place)
    except OSError as e:
        stop(f"cannot write {root} ({e})")
    finally:
        unlock(part)
        # if the exchange was interrupted halfway, what was there before comes back
        if old.exists() and not place.exists():
            os.replace(old, place)
        shutil.rmtree(old, ignore_errors=True)
        if not (part / READ).exists():
            shutil.rmtree(part, ignore_errors=True)


def build_platformer(root, episodes, frames, seed, overwrite):
    """Make a data set of the built-in game: `episodes` training levels of `frames` frames each."""
    def fill(folder):
        # a twentieth, but some: standard errors are over levels
        held_out = max(6, episodes // 20)
        levels = dict(train=episodes, valid=held_out, test=held_out)
        true = {}
        for split, n in levels.items():
            first = seed * LEVELS + FIRST[split]
            true |= play_levels(folder, split, range(first, first + n), frames)
        np.savez_compressed(folder / "true_actions.npz", **true)
        print_buttons(true["train_action"], true["train_same"])
        lengths = {split: [frames] * n for split, n in levels.items()}
        return dict(frame=[VIEW, VIEW, 3], fps=10, episodes=lengths)

    build(root, overwrite, dict(source=f"platformer, seed {seed}"), fill)


def play_levels(folder, split, seeds, frames):
    """Play an episode of each level and write SPLIT.u8. Returns a dictionary for true_actions.npz:

    SPLIT_action (F,) and SPLIT_same (F, 6), see `play_episode`, SPLIT_seed (E,), a seed a level.
    """
    buttons = []
    same = []
    with open(folder / f"{split}.u8", "wb") as file:
        for seed in tqdm(seeds, desc=f"playing {split} levels", unit="level", dynamic_ncols=True):
            video, pressed, alike = play_episode(seed, frames)
            file.write(video.tobytes())
            buttons.append(pressed)
            same.append(alike)
    return {f"{split}_action": np.concatenate(buttons),
            f"{split}_same": np.concatenate(same),
            f"{split}_seed": np.array(seeds)}


def print_buttons(buttons, same):
    """Say how often each button was pressed, and how often the choice mattered."""
    shares = np.bincount(buttons, minlength=len(ACTIONS)) / len(buttons)
    pressed = ", ".join(f"{name} {share:.0%}" for name, share in zip(ACTIONS, shares))
    print(f"buttons pressed: {pressed}")
    other = ~same                                   # (F, 6)
    others = len(ACTIONS) - 1
    print("another button would have led to another frame in "
          f"{other.any(1).mean():.1%} of transitions; "
          f"of the five other buttons, {other.sum(1).mean() / others:.1%} would have")


# ------------------------------------------------------------------------------- your own videos

# the endings of films in a folder. A file that is named on the command line may have any ending
FILMS = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".gif", ".ts", ".mts", ".m2ts", ".mpg",
         ".mpeg", ".flv", ".3gp", ".wmv", ".ogv", ".npy")
PICTURES = (".png", ".jpg", ".jpeg")

# How videos become frames: pixels of a frame, --fit, frames per second, frames per second of what
# has no time of its own, are clips kept in which nothing moves, and how many frames a clip has
How = namedtuple("How", "height width fit fps from_fps keep_still shortest")

# chosen by hand
CUT = 0.15              # a cut moves more than this share of the pixels to another colour ...
SUDDEN = 3              # ... and so many times as much as any of the frames before it
STILL = 12              # a pixel that changes by more than this, of 255, moves


class Unreadable(Exception):
    """A video, or the rest of it, cannot be read."""


def reason(error):
    """The last line of an error. Of what ffmpeg printed, it is the one that says why."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1].rstrip(")")


# ............................................................ which files are videos?


def find_videos(paths, shortest):
    """Everything below the paths: (videos, others), lists of paths.

    Videos are films, arrays, and folders of at least `shortest` numbered pictures. Links are
    followed. What is reached twice counts once, so a loop of links has an end.
    """
    videos = []
    others = []
    seen = set()
    waiting = list(paths)
    while waiting:
        path = waiting.pop(0)
        place = os.path.realpath(path)
        if place in seen:
            continue
        seen.add(place)
        if path.is_dir():
            # a folder that may not be read is named with the others
            try:
                inside = set(path.iterdir())
            except OSError:
                others.append(path)
                continue
            pictures = numbered_pictures(path)
            if len(pictures) >= shortest:
                videos.append(path)
                inside -= set(pictures)
            waiting = sorted(inside) + waiting
        # anything else than a file, such as a named pipe, could keep us waiting for ever
        elif path.is_file() and (path in paths or path.suffix.lower() in FILMS):
            videos.append(path)
        else:
            others.append(path)
    return videos, others


def numbered_pictures(folder):
    """The pictures in a folder whose names end in a number, in the order of their numbers."""
    found = []
    for file in folder.iterdir():
        number = re.search(r"\d+$", file.stem)
        if number and file.suffix.lower() in PICTURES and file.is_file():
            found.append((int(number[0]), file.name, file))
    return [file for _, _, file in sorted(found)]


# ............................................................ pictures


def fitted(image, height, width, fit):
    """An 8-bit image of Pillow as pixels (height, width, 3) uint8. fit: see --fit."""
    from PIL import Image, ImageOps
    image = image.convert("RGB")
    # each pixel is the mean of those that it stands for
    if fit == "crop":
        image = ImageOps.fit(image, (width, height), Image.Resampling.BOX)
    elif fit == "pad":
        image = ImageOps.pad(image, (width, height), Image.Resampling.BOX)
    else:
        image = image.resize((width, height), Image.Resampling.BOX)
    return np.array(image)


def white_of(values):
    """Which number stands for white in an array: 1, 255 or 65535, whichever none exceeds."""
    top = np.nanmax(values)
    return next((white for white in (1, 255, 65535) if top <= white), top)


def eight_bits(values, white):
    """Numbers of any type as uint8, so that `white` becomes 255."""
    return (np.nan_to_num(values) * np.float32(255 / white)).clip(0, 255).astype(np.uint8)


def read_picture(path, height, width, fit="crop"):
    """Any image file as pixels (height, width, 3) uint8, upright. Raises Unreadable."""
    from PIL import ExifTags, Image, ImageOps
    # so large that scaling down twice does not show
    large = 8 * max(height, width)
    # every kind of image raises exceptions of its own
    try:
        with warnings.catch_warnings():
            # Pillow warns of pictures of more than 89 million pixels
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                # phones store how they were held
                if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
                    ImageOps.exif_transpose(image, in_place=True)
                # 16-bit integers, and floats
                if image.mode[0] == "I":
                    # 65535 / 257 = 255
                    pixels = (np.asarray(image) // 257).clip(0, 255).astype(np.uint8)
                    image = Image.fromarray(pixels)
                elif image.mode == "F":
                    values = np.asarray(image)
                    image = Image.fromarray(eight_bits(values, white_of(values)))
                # a large picture is scaled down roughly, a JPEG while it is read
                image.thumbnail((large, large), Image.Resampling.BOX)
                return fitted(image, height, width, fit)
    except Exception as e:
        raise Unreadable(reason(e)) from e


# ............................................................ frames


def read_video(path, how):
    """Yields the frames of a video, each (H, W, 3) uint8, how.fps of them a second.

    Raises Unreadable where it is damaged, after the frames before the damage.
    """
    if path.is_dir():
        pictures = numbered_pictures(path)
        for i in in_time(len(pictures), how):
            yield read_picture(pictures[i], how.height, how.width, how.fit)
    elif path.suffix.lower() == ".npy":
        yield from read_array(path, how)
    else:
        yield from read_film(path, how)


def in_time(count, how):
    """Which of `count` pictures, how.from_fps of them a second, make a video of how.fps?

    It takes the ones that ffmpeg would take of a film.
    """
    step = how.from_fps / how.fps
    for k in range(round(count / step)):
        yield min(count - 1, math.ceil((k + 0.5) * step) - 1)


def open_array(path):
    """An array (T, H, W, 3) of a .npy file, mapped into memory. Raises Unreadable."""
    try:
        film = np.load(path, mmap_mode="r", allow_pickle=False)
    # numpy raises half a dozen types, as the damage may be
    except Exception as e:
        raise Unreadable(reason(e)) from e
    if film.ndim != 4 or film.shape[3] != 3 or not film.size or film.dtype.kind not in "uif":
        raise Unreadable(f"its shape is {film.shape} of {film.dtype}, not (T, H, W, 3) of numbers")
    return film


def read_array(path, how):
    """`read_video` for a .npy file of bytes or other numbers, white being 1, 255 or 65535."""
    from PIL import Image
    film = open_array(path)
    white = 255 if film.dtype == np.uint8 else white_of(film)
    for i in in_time(len(film), how):
        image = Image.fromarray(eight_bits(film[i], white))
        yield fitted(image, how.height, how.width, how.fit)


def ffmpeg(path, *filters):
    """What ffmpeg makes of a film: first a dictionary about it, then its frames as bytes."""
    import imageio_ffmpeg
    # it would warn that the frames have another size than the film
    logging.getLogger("imageio_ffmpeg").setLevel(logging.ERROR)
    # a playlist, which may call itself film.mp4, reaches for nothing in the network
    return imageio_ffmpeg.read_frames(os.path.abspath(path),
                                      input_params=["-protocol_whitelist", "file"],
                                      output_params=list(filters))


def read_film(path, how):
    """`read_video` for a file that ffmpeg reads."""
    W, H = how.width, how.height
    # dar and sar: the shape of the picture and of its pixels, width to height
    fits = dict(
        crop=f"crop='min(iw,ih*{W}/{H}/sar)':'min(ih,iw*sar*{H}/{W})',scale={W}:{H}:flags=area",
        pad=f"scale='min({W},max(1,round({H}*dar)))':'min({H},max(1,round({W}/dar)))':flags=area,"
            f"format=rgb24,pad={W}:{H}:(ow-iw)/2:(oh-ih)/2",
        squash=f"scale={W}:{H}:flags=area")
    frames = ffmpeg(path, "-vf", f"fps={how.fps},{fits[how.fit]}")
    # the reader raises many types
    try:
        next(frames)
        for pixels in frames:
            yield np.frombuffer(pixels, np.uint8).reshape(H, W, 3)
    except Exception as e:
        raise Unreadable(reason(e)) from e
    finally:
        frames.close()


def look_at(path, how):
    """The height and the width of a video's pictures, and about how many frames it will give.

    Raises Unreadable.
    """
    # the reader raises many types
    try:
        if path.is_dir():
            from PIL import Image
            pictures = numbered_pictures(path)
            with Image.open(pictures[0]) as image:
                width, height = image.size
            return height, width, len(list(in_time(len(pictures), how)))
        if path.suffix.lower() == ".npy":
            count, height, width, _ = open_array(path).shape
            return height, width, len(list(in_time(count, how)))
        frames = ffmpeg(path)
        about = next(frames)
        frames.close()
        width, height = about["size"]
        return height, width, round(about["duration"] * how.fps)
    except Exception as e:
        raise Unreadable(reason(e)) from e


# ............................................................ episodes


def episodes_of(frames, how, found):
    """Of the frames of a video those that are kept. Yields (does an episode begin?, frame).

    A cut ends an episode: the colours of the picture change at once, as they did not before. A
    pause in which nothing moves is shortened, so that no clip consists of it (--keep-still keeps
    it). found["cuts"] and found["still"] count cuts and the frames left out.
    """
    last = None         # the last frame that was kept
    lately = 0.0        # how much the colours changed in the frames before
    rest = 0            # for how many frames nothing has moved
    for frame in frames:
        # how many pixels have each of 64 colours: 4 of red, times 4 of green, times 4 of blue?
        index = (frame >> 6) @ np.array([16, 4, 1], np.uint8)       # (H, W)
        colours = np.bincount(index.flat, minlength=64) / index.size
        begins = last is None
        if last is not None:
            moves = np.abs(frame.astype(np.int16) - last).max() > STILL
            rest = 0 if moves else rest + 1
            if rest > how.shortest - 2 and not how.keep_still:
                found["still"] += 1
                continue
            change = np.abs(colours - before).sum() / 2
            begins = change > CUT and change > SUDDEN * lately
            found["cuts"] += int(begins)
            # a change that was seen counts less from frame to frame: half of it after seven
            lately = 0.0 if begins else max(change, 0.9 * lately)
        last = frame
        before = colours
        yield begins, frame


def read_once(path, folder, how, bar):
    """Read a video into a file of `folder`, unless that was done before an interruption.

    Returns a dictionary: its `file`, the `lengths` of its episodes, how many `frames` were read,
    the counts of `episodes_of`, and `why` no more could be read ("" if all was).
    """
    # a video is known by its place, size and date, and by what is made of it
    stats = [file.stat() for file in (numbered_pictures(path) if path.is_dir() else [path])]
    known = [os.path.realpath(path), [(s.st_size, s.st_mtime_ns) for s in stats], how]
    file = folder / f"{hashlib.sha256(repr(known).encode()).hexdigest()[:16]}.u8"
    done = file.with_suffix(".json")
    if done.exists():
        found = json.loads(done.read_text())
        bar.update(found["frames"])
        return found
    found = dict(file=file.name, lengths=[], frames=0, cuts=0, still=0, why="")
    lengths = found["lengths"]
    size = how.height * how.width * 3

    def counted():
        for frame in read_video(path, how):
            bar.update()
            found["frames"] += 1
            yield frame

    with open(file, "wb") as f:
        try:
            for begins, frame in episodes_of(counted(), how, found):
                # an episode too short for a clip is overwritten by the next one
                if begins and lengths and lengths[-1] < how.shortest:
                    lengths.pop()
                    f.seek(sum(lengths) * size)
                if begins:
                    lengths.append(0)
                f.write(frame.tobytes())
                lengths[-1] += 1
        except Unreadable as e:
            found["why"] = f": {e}"
        if lengths and lengths[-1] < how.shortest:
            lengths.pop()
        f.truncate(sum(lengths) * size)
    write_json(done, found)
    return found


# ............................................................ a data set of them


def hold_out(lengths):
    """Which videos are held out, of videos of these lengths: a set of indices.

    Whole videos, at least one, that come near to a tenth of all frames. None of a single video, nor
    where they would be less than a hundredth.
    """
    tenth = sum(lengths) / 10
    missing = tenth
    # in some order that is always the same
    left = np.random.default_rng(0).permutation(len(lengths)).tolist()
    held = set()
    while len(left) > 1:
        far = [abs(lengths[i] - missing) for i in left]
        i = left[int(np.argmin(far))]
        # would one more be further from a tenth than none?
        if held and lengths[i] > 2 * missing:
            break
        left.remove(i)
        held.add(i)
        missing -= lengths[i]
    few = sum(lengths[i] for i in held) < tenth / 10
    return set() if few else held


def build_videos(root, paths, how, overwrite):
    """Make a data set of videos, or of all videos in folders. See `find_videos`.

    A video that cannot be read, or has no episode of how.shortest frames, is named, skipped and
    counted. A second run after an interruption reads no video again that was read to its end.
    """
    for path in paths:
        if not path.exists() and not path.is_symlink():
            stop(f"{path} does not exist")
    videos, others = find_videos(paths, how.shortest)
    if others:
        names = ", ".join(str(path) for path in others[:20])
        more = f" and {len(others) - 20} more" if len(others) > 20 else ""
        print(f"no videos, left out: {names}{more}", file=sys.stderr)
    where = ", ".join(str(path) for path in paths)
    if not videos:
        stop(f"no video in {where}: no file with the ending of one, such as .mp4 or .gif, and no "
             f"folder with {how.shortest} numbered pictures")

    def fill(folder):
        (folder / READ).mkdir(exist_ok=True)
        try:
            found = read_all(videos, folder / READ, how)
        except KeyboardInterrupt:
            end_bars()
            print("interrupted; the same command goes on, and reads no finished video again",
                  file=sys.stderr)
            raise SystemExit(130) from None
        used = [f for f in found if f["lengths"]]
        frames = [sum(f["lengths"]) for f in used]
        if len(used) < 2 and sum(frames) < 2 * how.shortest:
            shutil.rmtree(folder / READ)
            stop(f"of {len(videos)} videos in {where}, {len(videos) - len(used)} could not be "
                 f"used, and what is left has not the {2 * how.shortest} frames that give both a "
                 "training and a validation clip")
        held = hold_out(frames)
        lengths = join(folder, used, held, how)
        name_split = f"{len(held)} whole videos" if held else "the end of the longest video"
        print(f"{len(used)} videos used, {len(videos) - len(used)} skipped, {len(others)} files "
              f"that are no videos; frames: {sum(lengths['train'])} to train on, "
              f"{sum(lengths['valid'])} held out ({name_split}); {sum(f['cuts'] for f in found)} "
              f"cuts; {sum(f['still'] for f in found)} frames left out in which nothing moved")
        size = f"{how.height}x{how.width}"
        source = (f"videos in {where} at {size} pixels, {how.fps} frames/s, "
                  f"{checksum(folder / 'train.u8'):08x}")
        return dict(source=source, frame=[how.height, how.width, 3], fps=how.fps, episodes=lengths)

    build(root, overwrite, {}, fill)


def read_all(videos, folder, how):
    """`read_once` for each of the videos, with a bar. What cannot be used is named."""
    # what is ahead?
    ahead = {}
    for path in tqdm(videos, desc="looking at videos", unit="video", dynamic_ncols=True):
        try:
            ahead[path] = look_at(path, how)
        # it will be named when it is read
        except Unreadable:
            continue
    shapes = {height / width for height, width, _ in ahead.values()}
    want = how.height / how.width
    lost = [1 - min(shape, want) / max(shape, want) for shape in shapes] or [0]
    what = dict(crop=f"cuts off {max(lost):.0%} of the picture",
                pad=f"loses nothing, and leaves {max(lost):.0%} of the frame black",
                squash=f"loses nothing, and squeezes one side by {max(lost):.0%}")
    most = "" if len(shapes) < 2 else f", of the {len(shapes)} shapes the one that fits worst"
    print(f"--fit {how.fit} {what[how.fit]}{most}")
    # how much is that?
    total = sum(frames for _, _, frames in ahead.values())
    megabytes = total * how.height * how.width * 3 / 1e6
    print(f"{len(ahead)} videos of {total / how.fps / 60:.1f} minutes: {total} frames, "
          f"{megabytes:.0f} MB of disk; half an hour of video is a start. An hour of film takes up "
          "to seven minutes to read (720p). To train takes half an hour on two cores at size "
          "laptop, however much film there is")
    # read them
    found = []
    with tqdm(total=total, desc="reading videos", unit="frame", dynamic_ncols=True) as bar:
        for path in videos:
            f = read_once(path, folder, how, bar)
            found.append(f)
            # a file that was cut off ends without an error. (How many frames are ahead is an
            # estimate: a tenth less is no damage)
            _, _, expected = ahead.get(path, (0, 0, 0))
            if not f["why"] and f["frames"] < 0.9 * expected - 1:
                f["why"] = f": it should have had {expected}, and may be damaged"
            if not f["lengths"]:
                moving = " in which something moves" if f["still"] else ""
                tqdm.write(f"skipped {path}: it has no {how.shortest} frames in a row{moving} at "
                           f"{how.fps} frames/s{f['why']}", file=sys.stderr)
            elif f["why"]:
                tqdm.write(f"used only {f['frames']} frames of {path}{f['why']}", file=sys.stderr)
    return found


def join(folder, used, held, how):
    """Write train.u8 and valid.u8 from what was read. Returns the lengths of their episodes.

    used: what `read_once` returned. held: the indices of those that are held out. If there are
    none, it is the end of the longest: a tenth of all frames, but at least how.shortest.
    """
    size = how.height * how.width * 3
    frames = [sum(f["lengths"]) for f in used]
    longest = int(np.argmax(frames))
    # the frame of the longest video where the held-out end begins
    cut = frames[longest] - max(sum(frames) // 10, how.shortest)
    lengths = dict(train=[], valid=[])
    with open(folder / "train.u8", "wb") as train, open(folder / "valid.u8", "wb") as valid:
        files = dict(train=train, valid=valid)
        for i, f in enumerate(used):
            with open(folder / READ / f["file"], "rb") as read:
                end = 0
                for length in f["lengths"]:
                    first = end
                    end += length
                    parts = [("valid" if i in held else "train", first, end)]
                    if not held and i == longest:
                        middle = min(max(cut, first), end)
                        parts = [("train", first, middle), ("valid", middle, end)]
                    for split, a, b in parts:
                        # what the cut leaves may be too short for a clip
                        if b - a < how.shortest:
                            continue
                        lengths[split].append(b - a)
                        read.seek(a * size)
                        for _ in range(b - a):
                            files[split].write(read.read(size))
    return lengths


# ------------------------------------------------------------------------------- reading a data set

AGAIN = "make the data again by the command that made them, and --overwrite"


def checksum(path):
    """The CRC-32 of a file, computed once in a process unless the file changes."""
    stat = path.stat()
    return crc32(path, stat.st_size, stat.st_mtime_ns)


@functools.cache
def crc32(path, size, written):
    crc = 0
    with open(path, "rb") as f:
        while block := f.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc


def read_meta(root):
    """meta.json of a data set. Raises ValueError, KeyError or TypeError where it is none."""
    meta = json.loads((root / "meta.json").read_text())
    lengths = [n for episodes in meta["episodes"].values() for n in episodes]
    fine = dict(
        source=isinstance(meta["source"], str),
        frame=len(meta["frame"]) == 3 and meta["frame"][2] == 3,
        episodes=meta["episodes"].keys() >= {"train", "valid"},
        numbers=all(type(n) is int and n > 0 for n in (*meta["frame"], *lengths)),
    )
    wrong = [name for name, good in fine.items() if not good]
    if wrong:
        raise ValueError(f"meta.json has no valid {wrong[0]}")
    return meta


class Clips:
    """Clips of T frames from one split of a data set. No clip crosses the end of an episode.

    A clip is known by its start, the index of its first frame in the file. The frames stay uint8
    in a memory-mapped file, or in the memory of the GPU where they fit into half of what is free.
    Only the clips that are asked for become floats in [0, 1].
    """

    def __init__(self, root, split, T, device="cpu"):
        """Opens a split ("train", "valid", "test") of the folder `root`, for clips on `device`.

        Ends with one sentence if that is no data set, a damaged one, or one without such clips.
        """
        root = Path(root)
        self.T = T
        self.device = torch.device(device)
        self.path = root / f"{split}.u8"
        # open the files, and see whether they fit together
        try:
            self.meta = read_meta(root)
            shape = self.meta["frame"]
            lengths = self.meta["episodes"][split]
            self.frames = np.memmap(self.path, np.uint8, "r").reshape(-1, *shape)   # (F, H, W, C)
            self.hash = hashlib.sha256(self.frames[:100].tobytes()).hexdigest()[:8]
            if len(self.frames) != sum(lengths):
                raise ValueError(f"{self.path.name} holds {len(self.frames)} frames, "
                                 f"meta.json says {sum(lengths)}")
            # A file of another date may be a copy: its checksum tells, at about a second a GB.
            # (Data sets of old have neither.)
            date, crc = self.meta.get("written", {}).get(split, (None, None))
            other_date = crc is not None and date != self.path.stat().st_mtime_ns
            if other_date and checksum(self.path) != crc:
                raise ValueError(f"{self.path.name} was changed since it was made")
        except (FileNotFoundError, NotADirectoryError):
            how = "python data.py"
            if root.name.startswith("coinrun"):
                how = "python -m lab.coinrun"
            elif root.name != "platformer":
                how += f" --videos FOLDER --name {root.name}"
            stop(f"{root} is no data set; make one with: {how}")
        # JSON that is nested without end is a RecursionError
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            stop(f"{root} is damaged ({e}); {AGAIN}")
        # where may a clip start? an episode is known by its first frame and the one after its last
        self.episodes = []
        starts = []
        end = 0
        for length in lengths:
            first = end
            end += length
            if length >= T:
                self.episodes.append((first, end))
            starts.append(np.arange(first, end - T + 1))
        self.starts = np.concatenate(starts)
        if len(self.starts) == 0:
            stop(f"no episode in {self.path} has the {T} frames that a clip needs")
        # a data set that fits moves to the GPU as a whole
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            if self.frames.nbytes < 0.5 * free:
                self.frames = torch.from_numpy(np.array(self.frames)).to(self.device)

    @property
    def name(self):
        """Identifies the data in checkpoints: source, number of frames, a hash of the first 100."""
        return f"{self.meta['source']}, {len(self.frames)} frames, {self.hash}"

    def at(self, starts):
        """The clips (B, T, H, W, C) with these starts (B,), floats in [0, 1]."""
        index = np.asarray(starts)[:, None] + np.arange(self.T)     # (B, T)
        if isinstance(self.frames, torch.Tensor):
            clips = self.frames[torch.from_numpy(index).to(self.device)]
        else:
            clips = torch.from_numpy(self.frames[index]).to(self.device)
        return clips.float() / 255

    def draw(self, B):
        """The starts (B,) of random clips, drawn with torch's global generator."""
        return self.starts[torch.randint(len(self.starts), (B,)).numpy()]

    def sample(self, B):
        """B random clips (B, T, H, W, C)."""
        return self.at(self.draw(B))

    def cover(self):
        """The starts of the fewest clips that together hold every frame and every transition."""
        # neighbouring clips share one frame; only the last clip of an episode may share more
        starts = []
        for first, end in self.episodes:
            last = end - self.T
            starts.append(np.arange(first, last, self.T - 1))
            starts.append([last])
        return np.concatenate(starts)

    def levels(self, starts):
        """The episode that each clip is from, by its start: (B,) integers."""
        ends = np.cumsum(self.meta["episodes"][self.path.stem])
        return np.searchsorted(ends, starts, side="right")

    def spread(self, n):
        """The starts of n clips spread evenly over the split, or of all if there are fewer."""
        places = np.linspace(0, len(self.starts) - 1, n).astype(int)
        return self.starts[np.unique(places)]


# ------------------------------------------------------------------------------- for the scores


def true_actions(root, split):
    """For scores only: what the player really pressed in a split, or None if that is not known.

    Returns buttons (F,) and same (F, 6), see `play_episode`, and the seeds of the levels (E,).
    Ends with one sentence if the file is damaged.
    """
    path = Path(root) / "true_actions.npz"
    if not path.exists():
        return None
    try:
        lengths = read_meta(Path(root))["episodes"][split]
        with np.load(path) as f:
            buttons, same, seeds = (f[f"{split}_{name}"] for name in ("action", "same", "seed"))
        if same.shape != (sum(lengths), 6) or buttons.shape != same.shape[:1]:
            raise ValueError("another number of frames")
        if len(seeds) != len(lengths) or buttons.dtype != np.uint8 or buttons.max() > 5:
            raise ValueError("no buttons")
        return buttons, same, seeds
    except Exception as e:
        # numpy raises half a dozen types, as the damage may be
        stop(f"{path} is damaged ({type(e).__name__}); {AGAIN}")


def standard_error(values, levels):
    """The standard error of the mean of values (n,), which come from levels (n,), a float.

    What happens in one level is alike. So it is the levels that count, not the values: it is the
    spread of their means. A single level tells nothing: nan.
    """
    values = np.asarray(values, float)
    means = np.array([values[levels == level].mean() for level in np.unique(levels)])
    if len(means) < 2:
        return float("nan")
    return float(means.std(ddof=1) / len(means) ** 0.5)


def psnr(a, b):
    """Peak signal-to-noise ratio: how alike frames (..., H, W, C) in [0, 1] are, in dB, (...).

    It is -10 log10(MSE), with MSE the mean squared error. An error of 0.1 everywhere is 20 dB, one
    of 0.01 is 40 dB. It is capped at 60 dB, since equal frames would have infinitely many.
    """
    error = (a.float() - b.float()).square().mean((-1, -2, -3))
    return -10 * torch.log10(error.clamp(min=1e-6))


def moves_within(most):
    """All moves (dx, dy), pixels right and down, each within -most..most: the smallest first."""
    moves = [(dx, dy) for dx in range(-most, most + 1) for dy in range(-most, most + 1)]

    def distance(move):
        return abs(move[0]) + abs(move[1])

    return sorted(moves, key=distance)


def displacement(before, after, most=6):
    """How the camera moved between two frames, both (B, H, W, C): (B, 2), pixels right and down.

    Each is within -most..most (the game moves its camera by 4 at most). It is the move by which the
    two frames agree best where they overlap; of equally good moves, the smallest.

    The error of a pixel is capped at that of a colour that is off by a tenth. Without the cap the
    player, who stays in his place on the screen, outweighs a world of fainter colours that scrolls
    behind him, and one true move in eight is taken for none (lab/NOTES.md).
    """
    H, W = before.shape[1:3]
    moves = moves_within(most)
    errors = []
    for dx, dy in moves:
        # the parts of the two frames that show the same place
        a = before[:, max(0, dy):H + min(0, dy), max(0, dx):W + min(0, dx)]
        b = after[:, max(0, -dy):H + min(0, -dy), max(0, -dx):W + min(0, -dx)]
        error = (a - b).square().mean(3)                            # (B, h, w)
        errors.append(error.clamp(max=0.1 ** 2).mean((1, 2)))       # (B,)
    # of equal errors, argmin takes the first
    best = torch.stack(errors).argmin(0)                            # (B,)
    return torch.tensor(moves, device=before.device)[best]


# ------------------------------------------------------------------------------- command line


def contact_sheet(root, path):
    """Write a picture of clips from both splits: a row for each clip, a column for each frame."""
    rows = []
    for split in ("train", "valid"):
        clips = Clips(root, split, 16)
        rows += clips.at(clips.spread(4))[:, ::2]
    save_picture(path, rows, "four training clips, four held-out clips, every other frame")


def frame_size(text):
    """--frame-size as (height, width): 64 is 64x64."""
    sides = [int(side) for side in text.lower().split("x")]
    height, width = sides if len(sides) == 2 else sides * 2
    return height, width


def read_arguments(argv):
    """The command line as a namespace. Ends with one sentence if it makes no sense."""
    # without a usage line, --help opens with what the command does
    p = new_parser(__doc__)
    add = p.add_argument
    add("--videos", type=Path, nargs="+", metavar="PATH",
        help="films (whatever ffmpeg reads), .npy arrays (T, H, W, 3), and folders of them, or of "
             f"numbered pictures ({' '.join(PICTURES)}) (default: the built-in game)")
    add("--name", help="becomes data/NAME (default: platformer, or the name of the folder)")
    # with half as many levels the prior of dynamics.py learned them by heart (lab/NOTES.md)
    add("--episodes", type=int, default=1280,
        help="training levels of the built-in game (default: %(default)s)")
    add("--frames", type=int, default=200, help="frames in each of them (default: %(default)s)")
    add("--frame-size", type=frame_size, default=(64, 64), metavar="SIZE",
        help="own videos: pixels of a frame, 64 or, height x width, 48x80 (default: 64)")
    add("--fit", choices=("crop", "pad", "squash"), default="crop",
        help="own videos of another shape: cut off what is too much, add black borders, or "
             "squeeze (default: %(default)s)")
    add("--fps", type=int, default=10, help="own videos: frames per second (default: %(default)s)")
    add("--from-fps", type=int,
        help="frames per second of numbered pictures and arrays (default: those of --fps)")
    add("--keep-still", action="store_true",
        help="own videos: keep clips in which nothing moves")
    add("--seed", type=int, default=0, help="another seed, other levels (default: %(default)s)")
    add("--overwrite", action="store_true", help="replace a data set of that name")
    add("--show", action="store_true", help="only write a contact sheet, data/NAME/sheet.png")
    args = p.parse_args(argv)
    args.from_fps = args.from_fps or args.fps
    if not 0 <= args.seed <= 10 ** 9:
        stop("--seed must not be negative, and at most a billion")
    if not all(1 <= fps <= 240 for fps in (args.fps, args.from_fps)):
        stop("--fps and --from-fps must be from 1 to 240")
    if not all(8 <= side <= 1024 for side in args.frame_size):
        stop("--frame-size must be from 8 to 1024 pixels a side")
    # levels of one kind must not run into those of the next
    if not args.show and not args.videos:
        if not 1 <= args.episodes <= 500_000 or not 17 <= args.frames <= 100_000:
            stop("--episodes must be from 1 to 500000, and --frames from 17 to 100000")
    if not args.name:
        path = Path(os.path.abspath(args.videos[0])) if args.videos else Path("platformer")
        args.name = path.stem if path.is_file() else path.name
    if Path(args.name).name != args.name or args.name in ("", ".", "..") or len(args.name) > 100:
        stop(f"--name {args.name[:100]!r} cannot be the name of a folder; choose a plain word "
             "of at most 100 letters")
    return args


def main(argv=None):
    args = read_arguments(argv)
    root = Path("data") / args.name
    if not args.show:
        if args.videos:
            how = How(*args.frame_size, args.fit, args.fps, args.from_fps, args.keep_still, 16)
            build_videos(root, args.videos, how, args.overwrite)
        else:
            build_platformer(root, args.episodes, args.frames, args.seed, args.overwrite)
    contact_sheet(root, root / "sheet.png")


if __name__ == "__main__":
    command(main)
