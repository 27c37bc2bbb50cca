"""Make a data set of short video clips, from the built-in game or from your own videos.

    python data.py                                    # the built-in game -> data/platformer/
    python data.py --videos my_videos/ --name mine    # a folder of .mp4 / .gif -> data/mine/
    python data.py --show --name mine                 # only draw a contact sheet of data/mine/

Genie was trained on 16-frame clips of platform games, at 10 frames/s (section 3). The built-in game
gives such clips, of 64x64 pixels. A data set is a folder of these files:
    train.u8, valid.u8    raw uint8 frames (F, H, W, C), all episodes end to end: to train on, and
                          held out to choose by
    test.u8               built-in game only: held out to report by; nothing is ever chosen on it
    meta.json             frame size, frames per second, length of every episode, source
    true_actions.npz      built-in game only: the buttons that the player really pressed
No training code opens true_actions.npz. It serves to score what was discovered without it, and to
measure how well anybody could do (python -m lab.oracle).
"""
import hashlib
import json
import logging
import math
import os
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from st_block import command, new_parser, save_picture, stop

# ------------------------------------------------------------------------------- the built-in game

# what the player can press in a frame; "a button" means one of these six, or its index
ACTIONS = ("none", "left", "right", "jump", "left+jump", "right+jump")

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
        """Draw the plan of the level: ground, pits, floating bricks and coins."""
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
    videos in which somebody runs against one (lab/NOTES.md). The probabilities below were chosen
    by hand, for that.
    """

    def __init__(self, rng):
        self.rng = rng
        # which way he wants to go: 1 is right, -1 is left
        self.mood = 1
        # none, left or right, as an index of ACTIONS
        self.held = 0

    def __call__(self, game):
        rng = self.rng
        # now and then he wants to go another way
        if rng.random() < 0.03:
            self.mood = 1 if rng.random() < 0.65 else -1
        # in most frames he presses afresh: nothing, the way he wants to go, or back
        if rng.random() < 0.75:
            way = rng.choice([0, self.mood, -self.mood], p=[0.27, 0.5, 0.23])
            self.held = {0: 0, -1: 1, 1: 2}[int(way)]
        # he jumps at any time, and more often where there is no ground ahead
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


def build(root, overwrite, source, fill):
    """Make the folder `root` of a data set as a whole, or not at all.

    fill(folder) writes the .u8 files into `folder` and returns the entries of meta.json, to which
    the dictionary `source` is added. Ends with one sentence where `root` cannot be written, or
    exists and may not be replaced.
    """
    if root.exists() and not overwrite:
        stop(f"{root} already exists; choose another --name, or --overwrite it")
    if root.exists() and not (root / "meta.json").exists():
        stop(f"{root} is no data set, and will not be overwritten; choose another --name")
    # the folder may be a link to a larger disk: work beside the place that it points to
    place = root.resolve()
    part = place.with_name(f"{place.name}.part")
    old = place.with_name(f".{place.name}.replaced")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        meta = source | fill(part)
        (part / "meta.json").write_text(json.dumps(meta))
        # all is written: put it into its place
        if place.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(place, old)
        os.replace(part, place)
    except OSError as e:
        stop(f"cannot write {root} ({e})")
    finally:
        # if the exchange was interrupted halfway, what was there before comes back
        if old.exists() and not place.exists():
            os.replace(old, place)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(part, ignore_errors=True)


def build_platformer(root, episodes, frames, seed, overwrite):
    """Make a data set of the built-in game: `episodes` training levels of `frames` frames each."""
    def fill(folder):
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


class Unreadable(Exception):
    """The decoder cannot read a video any further."""


def read_video(file, size, fps):
    """Yields the frames of a video, each (size, size, 3) uint8, resampled to `fps` frames/s.

    A frame is the middle square of the picture, scaled down. Raises Unreadable where the file is
    damaged, after the frames before the damage.
    """
    import imageio.v2 as imageio
    # imageio would warn that the frames have another size than the file says
    logging.getLogger("imageio.plugins.ffmpeg").setLevel(logging.ERROR)
    crop = "crop='min(iw,ih)':'min(iw,ih)'"
    filters = f"{crop},scale={size}:{size}:flags=area,fps={fps}"
    how = dict(format="FFMPEG", size=(size, size), output_params=["-vf", filters])
    try:
        with imageio.get_reader(file, **how) as reader:
            for frame in reader:
                yield np.ascontiguousarray(frame[..., :3])
    except Exception as e:
        # imageio raises many types; the last line of what ffmpeg printed is the reason
        lines = (str(e).strip() or type(e).__name__).splitlines()
        raise Unreadable(lines[-1].rstrip(")")) from e


def build_videos(root, videos, size, fps, shortest, overwrite):
    """Make a data set of a video file, or of every .mp4 and .gif file below a folder.

    Frames are cropped to a square, scaled to `size` pixels and resampled to `fps`. The end of each
    video is held out, see `add_video`. A video that cannot be read, or has less than `shortest`
    frames, is named, skipped and counted.
    """
    if not videos.exists():
        stop(f"{videos} does not exist")
    if videos.is_file():
        files = [videos]
    else:
        files = [p for p in sorted(videos.rglob("*")) if p.suffix.lower() in (".mp4", ".gif")]
    if not files:
        stop(f"no .mp4 or .gif in {videos}")

    def fill(folder):
        lengths = dict(train=[], valid=[])
        skipped = 0
        with open(folder / "train.u8", "w+b") as train, open(folder / "valid.u8", "wb") as valid:
            for file in tqdm(files, desc="reading videos", unit="video", dynamic_ncols=True):
                trained, held = add_video(file, train, valid, size, fps, shortest)
                if trained:
                    lengths["train"].append(trained)
                else:
                    skipped += 1
                if held:
                    lengths["valid"].append(held)
        if not lengths["valid"]:
            stop(f"of {len(files)} videos in {videos}, {skipped} could not be used and none has "
                 f"{2 * shortest} frames, the least that gives both a training and a validation "
                 "clip")
        print(f"{len(files) - skipped} videos used, {skipped} skipped; "
              f"frames: {sum(lengths['train'])} to train on, {sum(lengths['valid'])} held out")
        return dict(frame=[size, size, 3], fps=fps, episodes=lengths)

    source = f"videos in {videos} at {size} pixels, {fps} frames/s"
    build(root, overwrite, dict(source=source), fill)


def add_video(file, train, valid, size, fps, shortest):
    """Append the frames of one video to the open files `train` and `valid`.

    The last tenth is held out, but at least `shortest` frames, and nothing of a video that has not
    twice as many. Returns how many frames were added to each; (0, 0) if the video was skipped.
    """
    start = train.tell()
    count = 0
    why = ""
    # write all frames to `train`; of a damaged video, those before the damage
    try:
        for frame in read_video(file, size, fps):
            train.write(frame.tobytes())
            count += 1
    except Unreadable as e:
        why = f": {e}"
    if count < shortest:
        tqdm.write(f"skipped {file}, {count} frames at {fps} frames/s, fewer than {shortest}{why}",
                   file=sys.stderr)
        train.seek(start)
        train.truncate()
        return 0, 0
    if why:
        tqdm.write(f"used only {count} frames of {file}{why}", file=sys.stderr)
    # move the end of the video from `train` to `valid`
    held = max(count // 10, shortest) if count >= 2 * shortest else 0
    cut = start + (count - held) * size * size * 3
    train.seek(cut)
    shutil.copyfileobj(train, valid)
    train.seek(cut)
    train.truncate()
    return count - held, held


# ------------------------------------------------------------------------------- reading a data set

AGAIN = "make the data again by the command that made them, and --overwrite"


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
            self.meta = json.loads((root / "meta.json").read_text())
            shape = self.meta["frame"]
            lengths = self.meta["episodes"][split]
            self.frames = np.memmap(self.path, np.uint8, "r").reshape(-1, *shape)   # (F, H, W, C)
            self.hash = hashlib.sha256(self.frames[:100].tobytes()).hexdigest()[:8]
            if len(self.frames) != sum(lengths):
                raise ValueError(f"{self.path.name} holds {len(self.frames)} frames, "
                                 f"meta.json says {sum(lengths)}")
        except OSError:
            how = "python data.py"
            if root.name != "platformer":
                how += f" --videos FOLDER --name {root.name}"
            stop(f"{root} is no data set; make one with: {how}")
        except (ValueError, KeyError, TypeError) as e:
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
        with np.load(path) as f:
            return f[f"{split}_action"], f[f"{split}_same"], f[f"{split}_seed"]
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
    """-10 log10(MSE), in dB, capped at 60, of frames (..., H, W, C) in [0, 1] -> (...)."""
    error = (a.float() - b.float()).square().mean((-1, -2, -3))
    return -10 * torch.log10(error.clamp(min=1e-6))


def displacement(before, after, most=6):
    """How the camera moved between two frames, both (B, H, W, C): (B, 2), pixels right and down.

    Each is within -most..most. It is the move by which the two frames agree best where they
    overlap; of equally good moves, the smallest.

    The error of a pixel is capped at that of a colour that is off by a tenth. Without the cap the
    player, who stays in his place on the screen, outweighs a world of fainter colours that scrolls
    behind him, and one true move in eight is taken for none (lab/NOTES.md).
    """
    H, W = before.shape[1:3]
    # every move, the smallest first
    moves = [(dx, dy) for dx in range(-most, most + 1) for dy in range(-most, most + 1)]

    def distance(move):
        return abs(move[0]) + abs(move[1])

    moves.sort(key=distance)
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


def read_arguments(argv):
    """The command line as a namespace. Ends with one sentence if it makes no sense."""
    # without a usage line, --help opens with what the command does
    p = new_parser(__doc__)
    add = p.add_argument
    add("--videos", type=Path,
        help="folder of .mp4 / .gif, or one file (default: the built-in game)")
    add("--name", help="becomes data/NAME (default: platformer, or the name of the folder)")
    add("--episodes", type=int, default=640,
        help="training levels of the built-in game (default: %(default)s)")
    add("--frames", type=int, default=200, help="frames in each of them (default: %(default)s)")
    add("--frame-size", type=int, default=64,
        help="own videos: pixels along a side of a frame (default: %(default)s)")
    add("--fps", type=int, default=10, help="own videos: frames per second (default: %(default)s)")
    add("--seed", type=int, default=0, help="another seed, other levels (default: %(default)s)")
    add("--overwrite", action="store_true", help="replace a data set of that name")
    add("--show", action="store_true", help="only write a contact sheet, data/NAME/sheet.png")
    args = p.parse_args(argv)
    if args.seed < 0 or args.fps < 1 or args.frame_size < 8:
        stop("--seed must not be negative, --fps at least 1, --frame-size at least 8")
    if not args.show and not args.videos and (args.episodes < 1 or args.frames < 17):
        stop("--episodes must be at least 1 and --frames at least 17")
    if not args.name:
        path = args.videos.resolve() if args.videos else Path("platformer")
        args.name = path.stem if path.is_file() else path.name
    if Path(args.name).name != args.name or args.name in ("", ".", ".."):
        stop(f"--name {args.name!r} cannot be the name of a folder; choose a plain word")
    return args


def main(argv=None):
    args = read_arguments(argv)
    root = Path("data") / args.name
    if not args.show:
        if args.videos:
            build_videos(root, args.videos, args.frame_size, args.fps, 16, args.overwrite)
        else:
            build_platformer(root, args.episodes, args.frames, args.seed, args.overwrite)
    contact_sheet(root, root / "sheet.png")


if __name__ == "__main__":
    command(main)
