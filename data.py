"""Videos in, clips out. Also the game that makes the videos when you have none.

    python data.py                                    # the built-in platformer -> data/platformer/
    python data.py --videos my_videos/ --name mine    # a folder of .mp4 / .gif -> data/mine/
    python data.py --show                             # a contact sheet of what is in there

A data set is a folder:
    train.u8, valid.u8    raw uint8 frames (F, H, W, C), all episodes end to end, memory-mapped when read
    meta.json             frame size, frames per second, the length of every episode, where it all came from
    true_actions.npz      built-in game only: which buttons were really pressed. NO TRAINING CODE OPENS IT. It is there to
                          score, afterwards, what was discovered without it (and for the ceiling of that: lam.py --oracle).

Genie's data were 16-frame clips at 10 frames/s of platformer videos (section 3). So are these, at 64x64.
"""
import argparse
import hashlib
import json
import logging
import math
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from st_block import command, save_picture, stop, write_atomically

# ------------------------------------------------------------------------------------------------ the built-in game

ACTIONS = ("none", "left", "right", "jump", "left+jump", "right+jump")     # the six combinations of three buttons
TILE, VIEW, WIDTH = 8, 64, 160           # pixels along a tile, pixels along a frame, tiles in a level
PLAYER_W, PLAYER_H, PLAYER_X = 6, 8, 24  # the camera keeps the player at this column: the world scrolls, the player stays
RUN, ACCEL, JUMP, GRAVITY, FALL = 4, 2, 8, 2, 8     # pixels per frame, or per frame and frame

LOOKS = (   # sky high and low, hills, turf, soil and its shade; brick, mortar, pit, player, face
    ((104, 176, 236), (160, 212, 244), (120, 188, 150), (64, 160, 60), (150, 100, 56), (124, 80, 44),          # meadow
     (200, 120, 64), (140, 76, 36), (40, 88, 200), (220, 48, 44), (255, 220, 180)),
    ((244, 196, 120), (252, 224, 168), (226, 170, 104), (216, 160, 76), (196, 132, 64), (168, 108, 48),        # desert
     (150, 84, 60), (108, 56, 40), (120, 40, 30), (36, 100, 180), (255, 236, 210)),
    ((20, 24, 60), (40, 48, 96), (34, 56, 84), (70, 120, 120), (64, 68, 100), (48, 50, 78),                    # night
     (110, 96, 150), (70, 60, 110), (30, 140, 120), (240, 200, 60), (255, 244, 220)),
    ((44, 36, 40), (60, 48, 50), (76, 60, 58), (130, 120, 116), (96, 84, 82), (72, 62, 62),                    # cave
     (150, 110, 70), (100, 70, 44), (230, 96, 24), (90, 210, 120), (240, 255, 230)),
)
COIN = (250, 210, 40)
SPRITES = [np.array([[int(c) for c in row] for row in rows.split()]) for rows in (      # 1 player, 2 face, 3 eye
    "011110 111111 112232 112222 011110 111111 011110 010010",
    "011110 111111 112232 112222 011110 111111 111110 000110")]


class Platformer:
    """A level and its physics. Deterministic given (seed, actions); `save` and `restore` go back to any moment.

    Left and right speed up by 2 pixels per frame to at most 4 and turn round at once; with neither, the player stops on the
    ground and flies on in the air. A jump starts from the ground only and is ruled by gravity after that. So one frame does
    not show what comes next (how fast? rising or falling?), but two do. Falling into a pit costs time, never the episode.
    """

    def __init__(self, seed):
        rng = np.random.default_rng(seed)
        palette = LOOKS[rng.integers(len(LOOKS))]
        (self.sky_high, self.sky_low, self.hill, self.turf, self.soil, self.shade,
         self.brick, self.mortar, self.pit, body, face) = palette
        self.ink = np.array([(0, 0, 0), body, face, (20, 20, 24)], np.uint8)
        self.build(rng)
        self.paint(rng)
        self.x, self.vx, self.vy, self.facing = 48 * TILE, 0, 0, 1
        self.y = (7 - self.ground[48]) * TILE

    def build(self, rng):
        """Ground heights, pits, floating bricks and coins; every rise to the right can be jumped (2 tiles = 16 of the
        jump's 20 pixels); to the left, out of a pit, not every one."""
        self.ground, self.is_pit = np.zeros(WIDTH, int), np.zeros(WIDTH, bool)
        c, height = 0, int(rng.integers(2, 4))
        while c < WIDTH:                                                 # (a slice ends where the level does)
            n, highest = int(rng.integers(2, 7)), 4
            self.ground[c:c + n] = height                                # a stretch of level ground
            c += n
            if rng.random() < 0.35:                                      # a pit, with water or lava at the bottom
                n, height, highest = int(rng.integers(1, 4)), min(height, 3), 3
                self.ground[c:c + n], self.is_pit[c:c + n] = 1, True
                c += n
            height = int(np.clip(height + rng.choice([-2, -1, 1, 1, 2]), 2, highest))
        self.ground[:4] = self.ground[-4:] = 8                           # walls at the two ends
        self.is_pit[:4] = self.is_pit[-4:] = False
        self.ground[46:51] = 2 if self.is_pit[46] else self.ground[46]   # level ground to begin on
        self.is_pit[46:51] = False
        earth = np.arange(8)[:, None] >= 8 - self.ground                 # (8, WIDTH)
        self.solid = earth.copy()
        c = 6
        while c < WIDTH - 10:                                            # floating bricks, a tile of headroom beneath
            c, n = c + int(rng.integers(3, 9)), int(rng.integers(1, 4))
            top = 8 - self.ground[c:c + n].max() if c + n < WIDTH - 4 else 0
            if top >= 5 and not 44 < c < 52:
                row = max(3, top - int(rng.integers(2, 4)))             # not so high that a jump leaves the frame
                self.solid[row, c:c + n] = True
            c += n
        self.bricks = self.solid & ~earth
        self.coins = np.zeros((8, WIDTH), bool)
        for c in range(5, WIDTH - 5):                                    # coins lie one tile over whatever one stands on
            if rng.random() < 0.3 and c != 48:
                row = int(np.argmax(self.solid[:, c])) - 1 - int(rng.integers(0, 2))
                if row >= 1 and not self.solid[row, c]:
                    self.coins[row, c] = True

    def paint(self, rng):
        """The level without coins and player, once, as one long picture (64, 8 * WIDTH, 3); a frame is cut out of it."""
        picture = np.empty((VIEW, WIDTH * TILE, 3), np.uint8)
        picture[:24], picture[24:] = self.sky_high, self.sky_low
        x = np.arange(WIDTH * TILE)
        a, b, c = rng.uniform(0, 2 * math.pi, 3)
        crest = 34 + 8 * np.sin(x / 23 + a) + 6 * np.sin(x / 11 + b) + 3 * np.sin(x / 5 + c)
        picture[np.arange(VIEW)[:, None] >= crest // 2 * 2] = self.hill
        for row in range(8):
            for col in range(WIDTH):
                if not self.solid[row, col]:
                    continue
                tile = picture[row * TILE:(row + 1) * TILE, col * TILE:(col + 1) * TILE]
                if self.bricks[row, col]:
                    tile[:] = self.brick
                    tile[[3, 7]], tile[:4, 7], tile[4:, 3] = self.mortar, self.mortar, self.mortar
                elif self.is_pit[col]:
                    tile[:], tile[::4, 2:6] = self.pit, self.sky_low
                else:
                    tile[:] = self.soil
                    spots = rng.integers(0, 3, 2) * 2                    # no two tiles alike, or a scroll would not show
                    tile[spots[0]:spots[0] + 2, spots[1]:spots[1] + 4] = self.shade
                    if row == 8 - self.ground[col]:
                        tile[:3], tile[3, :int(rng.integers(1, 4)) * 2] = self.turf, self.turf
        self.picture = np.pad(picture, ((0, 0), (0, TILE), (0, 0)), mode="edge")      # at the right-hand wall one sees beyond
        self.coin = np.zeros((TILE, TILE), bool)
        self.coin[1:7, 2:6] = self.coin[2:6, 1:7] = True

    def tiles(self, x, y):
        """Rows and columns of the level that the player covers with his upper left corner at pixel (x, y); above the frame he counts as at its top."""
        y = max(y, 0)
        return slice(y // TILE, (y + PLAYER_H - 1) // TILE + 1), slice(x // TILE, (x + PLAYER_W - 1) // TILE + 1)

    def hits(self, x, y):
        """Would he be in something solid there?"""
        return self.solid[self.tiles(x, y)].any()

    def on_ground(self):
        return self.y >= VIEW - PLAYER_H or self.hits(self.x, self.y + 1)

    def step(self, action):
        """Advance by one frame (0.1 s) under ACTIONS[action]."""
        way = (0, -1, 1)[action % 3]
        grounded = self.on_ground()
        if way:
            self.facing = way
            self.vx = way * min(RUN, max(0, way * self.vx) + ACCEL)
        elif grounded:
            self.vx = 0
        if grounded:
            self.vy = -JUMP if action >= 3 else 0
        else:
            self.vy = min(FALL, self.vy + GRAVITY)
        x = self.x + self.vx
        if self.hits(x, self.y):                                         # against a wall: up to it and no further
            x = (x + PLAYER_W) // TILE * TILE - PLAYER_W if self.vx > 0 else (x // TILE + 1) * TILE
            self.vx = 0
        self.x = x
        y = self.y + self.vy
        if self.vy and self.hits(x, y):
            y = (y + PLAYER_H - 1) // TILE * TILE - PLAYER_H if self.vy > 0 else (y // TILE + 1) * TILE
            self.vy = 0
        self.y = min(y, VIEW - PLAYER_H)
        if self.y >= 0:
            self.coins[self.tiles(self.x, self.y)] = False

    def frame(self):
        """What the player sees: (64, 64, 3) uint8."""
        left = self.x - PLAYER_X
        frame = self.picture[:, left:left + VIEW].copy()
        first = left // TILE
        for row, col in zip(*np.nonzero(self.coins[:, first:first + 9])):
            x = (first + col) * TILE - left
            a, b = max(0, -x), min(TILE, VIEW - x)                       # a coin may stick out of the frame
            frame[row * TILE:(row + 1) * TILE, x + a:x + b][self.coin[:, a:b]] = COIN
        top = max(0, -self.y)
        sprite = SPRITES[self.x // 4 % 2 if self.on_ground() else 1][top:, ::self.facing]
        box = frame[self.y + top:self.y + PLAYER_H, PLAYER_X:PLAYER_X + PLAYER_W]
        box[sprite > 0] = self.ink[sprite[sprite > 0]]
        return frame

    def save(self):
        return self.x, self.y, self.vx, self.vy, self.facing, self.coins.tobytes()

    def restore(self, state):
        self.x, self.y, self.vx, self.vy, self.facing, coins = state
        self.coins = np.frombuffer(coins, bool).reshape(self.coins.shape).copy()

    def visible(self):
        """All of the state that shows in a frame: two moments of a level with equal `visible` look the same."""
        return self.x, self.y, self.facing, self.coins.tobytes()

    def outcomes(self):
        """What each of the six buttons would lead to: a list of (visible, state to restore). The game itself stays put."""
        before, after = self.save(), []
        for action in range(len(ACTIONS)):
            self.restore(before)
            self.step(action)
            after.append((self.visible(), self.save()))
        self.restore(before)
        return after


class Policy:
    """Who plays: presses a fresh random button in most frames, drifts right more than left, hops over pits. Nearly every button
    stays likely at every moment, so the next frame cannot be told from the past alone: only then is there something for latent
    actions to explain. Against a wall he runs like anybody who does not look ahead: in a video of players who hop in time, nobody
    can learn what a wall is (see the README's lab notes)."""

    def __init__(self, rng):
        self.rng, self.mood, self.action = rng, 1, 0

    def __call__(self, game):
        rng = self.rng
        if rng.random() < 0.03:
            self.mood = 1 if rng.random() < 0.65 else -1
        if rng.random() < 0.75:
            way = rng.choice([0, self.mood, -self.mood], p=[0.27, 0.5, 0.23])
            self.action = {0: 0, -1: 1, 1: 2}[int(way)]
        pit = not game.hits(game.x + 10 * self.mood, game.y + 4)
        jump = rng.random() < (0.6 if pit else 0.2)
        return self.action + 3 * jump


def play_episode(seed, frames):
    """One episode of the policy: frames (F, 64, 64, 3), actions (F,), same (F, 6).

    actions[t] leads from frame t to frame t+1; same[t, a]: button a would have led to the very same frame t+1.
    """
    game, policy = Platformer(seed), Policy(np.random.default_rng([seed, 1]))
    video, actions, same = [], [], []
    for _ in range(frames):
        video.append(game.frame())
        action, after = policy(game), game.outcomes()
        actions.append(action)
        same.append([seen == after[action][0] for seen, _ in after])
        game.restore(after[action][1])
    return np.stack(video), np.array(actions, np.uint8), np.array(same)


# ------------------------------------------------------------------------------------------------ building a data set

def build(root, overwrite, source, fill):
    """Make the folder `root` as a whole or not at all. fill(folder) writes the .u8 files, returns {split: episode lengths}."""
    if root.exists() and not overwrite:
        stop(f"{root} already exists; choose another --name, or --overwrite it")
    if root.exists() and not (root / "meta.json").exists():
        stop(f"{root} is no data set, and will not be overwritten; choose another --name")
    place = root.resolve()                          # it may be a link to a larger disk
    part, old = place.with_name(f"{place.name}.part"), place.with_name(f".{place.name}.replaced")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        meta = fill(part)
        write_atomically(part / "meta.json", lambda f: f.write(json.dumps(source | meta).encode()))
        if place.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(place, old)
        os.replace(part, place)
    except OSError as e:
        stop(f"cannot write {root} ({e})")
    finally:
        if old.exists() and not place.exists():     # interrupted between the two
            os.replace(old, place)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(part, ignore_errors=True)


def build_platformer(root, episodes, frames, seed, overwrite):
    def fill(folder):
        lengths, actions = {}, {}
        for split, count, first in (("train", episodes, 0), ("valid", max(6, episodes // 20), 500_000)):
            seeds = [seed * 1_000_000 + first + i for i in range(count)]         # levels of valid are never in train
            with open(folder / f"{split}.u8", "wb") as f:
                played = []
                for s in tqdm(seeds, desc=f"playing {split} levels", unit="level", dynamic_ncols=True):
                    video, pressed, same = play_episode(s, frames)
                    f.write(video.tobytes())
                    played.append((pressed, same))
            lengths[split] = [frames] * count
            pressed, same = map(np.concatenate, zip(*played))
            actions |= {f"{split}_action": pressed, f"{split}_same": same, f"{split}_seed": np.array(seeds)}
        np.savez_compressed(folder / "true_actions.npz", **actions)
        same, pressed = actions["train_same"], actions["train_action"]
        shares = np.bincount(pressed, minlength=6) / len(pressed)
        print(f"buttons pressed: {', '.join(f'{a} {p:.0%}' for a, p in zip(ACTIONS, shares))}")
        print(f"another button would have led to another frame in {(~same).any(1).mean():.1%} of transitions; "
              f"of the five other buttons, {(~same).sum(1).mean() / 5:.1%} would have")
        return dict(frame=[VIEW, VIEW, 3], fps=10, episodes=lengths)
    build(root, overwrite, dict(source=f"platformer, seed {seed}"), fill)


class Unreadable(Exception):
    """A video that the decoder gives up on."""


def read_video(file, size, fps):
    """Yields the frames (size, size, 3) of a video: its middle square, scaled, resampled to `fps`."""
    import imageio.v2 as imageio
    logging.getLogger("imageio.plugins.ffmpeg").setLevel(logging.ERROR)          # it would warn that we scale the frames
    crop = f"crop='min(iw,ih)':'min(iw,ih)',scale={size}:{size}:flags=area,fps={fps}"
    try:
        with imageio.get_reader(file, format="FFMPEG", size=(size, size), output_params=["-vf", crop]) as reader:
            for frame in reader:
                yield np.ascontiguousarray(frame[..., :3])
    except Exception as e:                          # whatever ffmpeg says of a broken file; its last line is the reason
        raise Unreadable((str(e).strip() or type(e).__name__).splitlines()[-1].rstrip(")")) from e


def build_videos(root, videos, size, fps, shortest, overwrite):
    """Every .mp4 and .gif below a folder (or one file): cropped to a square, scaled to `size`, resampled to `fps`.

    The last tenth of each video is held out, but at least `shortest` frames, and none of a video that is not twice as long. A file
    that cannot be read is named, skipped and counted.
    """
    if not videos.exists():
        stop(f"{videos} does not exist")
    files = [videos] if videos.is_file() else sorted(p for p in videos.rglob("*") if p.suffix.lower() in (".mp4", ".gif"))
    if not files:
        stop(f"no .mp4 or .gif in {videos}")

    def fill(folder):
        lengths, skipped = {"train": [], "valid": []}, 0
        with open(folder / "train.u8", "w+b") as train, open(folder / "valid.u8", "wb") as valid:
            for file in tqdm(files, desc="reading videos", unit="video", dynamic_ncols=True):
                count, start, why = 0, train.tell(), ""
                try:
                    for frame in read_video(file, size, fps):
                        train.write(frame.tobytes())
                        count += 1
                except Unreadable as e:             # what came before the damage is kept, if it is long enough
                    why = f": {e}"
                    if count >= shortest:
                        tqdm.write(f"used only {count} frames of {file}{why}", file=sys.stderr)
                if count < shortest:
                    tqdm.write(f"skipped {file}, {count} frames at {fps} frames/s, fewer than {shortest}{why}", file=sys.stderr)
                    skipped += 1
                    train.seek(start)
                    train.truncate()
                    continue
                held = max(count // 10, shortest) if count >= 2 * shortest else 0
                cut = start + (count - held) * size * size * 3           # in bytes: the frames after it are held out
                train.seek(cut)
                shutil.copyfileobj(train, valid)
                train.seek(cut)
                train.truncate()
                lengths["train"].append(count - held)
                if held:
                    lengths["valid"].append(held)
        if not lengths["valid"]:
            stop(f"of {len(files)} videos in {videos}, {skipped} could not be used and none has {2 * shortest} frames, "
                 f"the least that gives both a training and a validation clip")
        print(f"{len(files) - skipped} videos used, {skipped} skipped; frames: {sum(lengths['train'])} to train on, "
              f"{sum(lengths['valid'])} held out")
        return dict(frame=[size, size, 3], fps=fps, episodes=lengths)
    build(root, overwrite, dict(source=f"videos in {videos} at {size} pixels, {fps} frames/s"), fill)


# ------------------------------------------------------------------------------------------------ reading it

AGAIN = "make the data again by the command that made them, and --overwrite"


class Clips:
    """Clips of T frames from one split of a data set; none crosses the end of an episode.

    The frames stay where they are, uint8 in a memory-mapped file, or on a GPU as a whole when that fits into half of its
    free memory; only the clips drawn become floats in [0, 1].
    """

    def __init__(self, root, split, T, device="cpu"):
        root, self.T, self.device = Path(root), T, torch.device(device)
        self.path = root / f"{split}.u8"
        try:
            self.meta = json.loads((root / "meta.json").read_text())
            shape, lengths = self.meta["frame"], self.meta["episodes"][split]
            frames = np.memmap(self.path, np.uint8, "r")
            self.frames = frames.reshape(-1, *shape)                             # (F, H, W, C)
            self.hash = hashlib.sha256(self.frames[:100].tobytes()).hexdigest()[:8]
            if len(self.frames) != sum(lengths):
                raise ValueError(f"{self.path.name} holds {len(self.frames)} frames, meta.json says {sum(lengths)}")
        except OSError:
            stop(f"{root} is no data set; make one with: python data.py" + (f" --videos FOLDER --name {root.name}" if root.name != "platformer" else ""))
        except (ValueError, KeyError, TypeError) as e:
            stop(f"{root} is damaged ({e}); {AGAIN}")
        ends = np.cumsum(lengths)
        self.episodes = [(e - n, e) for e, n in zip(ends, lengths) if n >= T]
        self.starts = np.concatenate([np.arange(e - n, e - T + 1) for e, n in zip(ends, lengths)])
        if len(self.starts) == 0:
            stop(f"no episode in {self.path} has the {T} frames that a clip needs")
        if self.device.type == "cuda" and self.frames.nbytes < 0.5 * torch.cuda.mem_get_info(self.device)[0]:
            self.frames = torch.from_numpy(np.array(self.frames)).to(self.device)

    @property
    def name(self):
        """Identifies the data in checkpoints: where they came from, how many they are, and how they begin."""
        return f"{self.meta['source']}, {len(self.frames)} frames, {self.hash}"

    def at(self, starts):
        """The clips (B, T, H, W, C), float in [0, 1], that begin at these frames."""
        index = np.asarray(starts)[:, None] + np.arange(self.T)
        if isinstance(self.frames, torch.Tensor):
            clips = self.frames[torch.from_numpy(index).to(self.device)]
        else:
            clips = torch.from_numpy(self.frames[index]).to(self.device)
        return clips.float() / 255

    def draw(self, B):
        """The starts of B random clips. Uses torch's global generator, which every training step seeds anew."""
        return self.starts[torch.randint(len(self.starts), (B,)).numpy()]

    def sample(self, B):
        """B random clips (B, T, H, W, C)."""
        return self.at(self.draw(B))

    def cover(self):
        """The starts of clips that together hold every frame and transition, each again as seldom as can be."""
        return np.concatenate([np.append(np.arange(first, end - self.T, self.T - 1), end - self.T) for first, end in self.episodes])

    def spread(self, n):
        """The starts of n clips (of all, if there are fewer) spread evenly over the split: the same for every model that is scored."""
        return self.starts[np.unique(np.linspace(0, len(self.starts) - 1, n).astype(int))]


def true_actions(root, split):
    """For SCORING only: (actions (F,), same (F, 6), seeds of the levels (E,)) of a split, or None if nobody knows them."""
    path = Path(root) / "true_actions.npz"
    if not path.exists():
        return None
    try:
        with np.load(path) as f:
            return f[f"{split}_action"], f[f"{split}_same"], f[f"{split}_seed"]
    except Exception as e:                                                       # half a dozen types, as the damage may be
        stop(f"{path} is damaged ({type(e).__name__}); {AGAIN}")


def psnr(a, b):
    """Peak signal-to-noise ratio in dB of frames in [0, 1], (..., H, W, C) -> (...): -10 log10(MSE), capped at 60."""
    return -10 * torch.log10((a.float() - b.float()).square().mean((-1, -2, -3)).clamp(min=1e-6))


def displacement(before, after, most=6):
    """How the view moved between frames (B, H, W, C) and (B, H, W, C): (B, 2), the pixels right and down, each within -most..most,
    by which a camera must have moved for the two to agree best where they overlap. Of equals, the smallest.

    A pixel costs at most what a colour costs that is off by a tenth. Else the hero, who stays in his place on screen while a world
    of fainter colours scrolls by, outvotes it: one true move in eight was taken for none (README, lab notes)."""
    H, W = before.shape[1:3]
    moves = sorted(((dx, dy) for dx in range(-most, most + 1) for dy in range(-most, most + 1)), key=lambda m: abs(m[0]) + abs(m[1]))
    error = []
    for dx, dy in moves:
        a = before[:, max(0, dy):H + min(0, dy), max(0, dx):W + min(0, dx)]
        b = after[:, max(0, -dy):H + min(0, -dy), max(0, -dx):W + min(0, -dx)]
        error.append((a - b).square().mean(3).clamp(max=0.1 ** 2).mean((1, 2)))
    return torch.tensor(moves, device=before.device)[torch.stack(error).argmin(0)]


def contact_sheet(root, path):
    """A picture of clips from both splits: rows are clips, columns are frames."""
    rows = []
    for split in ("train", "valid"):
        clips = Clips(root, split, 16)
        rows += clips.at(clips.spread(4))[:, ::2]
    save_picture(path, rows, "four training clips, four held-out clips, every other frame")


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--videos", type=Path, help="folder of .mp4 / .gif, or one file (default: the built-in game)")
    p.add_argument("--name", help="the data set becomes data/NAME (default: platformer, or the name of the folder)")
    p.add_argument("--episodes", type=int, default=640, help="training levels of the built-in game (default: %(default)s)")
    p.add_argument("--frames", type=int, default=200, help="frames in each of them (default: %(default)s)")
    p.add_argument("--frame-size", type=int, default=64, help="pixels along a side, your own videos (default: %(default)s)")
    p.add_argument("--fps", type=int, default=10, help="frames per second, your own videos (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="another seed, other levels (default: %(default)s)")
    p.add_argument("--overwrite", action="store_true", help="replace a data set of that name")
    p.add_argument("--show", action="store_true", help="only write a contact sheet of the data set, sheet.png in its folder")
    args = p.parse_args(argv)
    if args.seed < 0 or args.fps < 1 or args.frame_size < 8:
        stop("--seed must not be negative, --fps at least 1, --frame-size at least 8")
    path = args.videos.resolve() if args.videos else Path("platformer")
    name = args.name or (path.stem if path.is_file() else path.name)
    if Path(name).name != name or name in ("", ".", ".."):
        stop(f"--name {name!r} cannot be the name of a folder; choose a plain word")
    root = Path("data") / name
    if not args.show:
        if args.videos:
            build_videos(root, args.videos, args.frame_size, args.fps, 16, args.overwrite)
        else:
            if args.episodes < 1 or args.frames < 17:
                stop("--episodes must be at least 1 and --frames at least 17")
            build_platformer(root, args.episodes, args.frames, args.seed, args.overwrite)
    contact_sheet(root, root / "sheet.png")


if __name__ == "__main__":
    command(main)
