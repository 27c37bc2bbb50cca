"""Your own videos: whatever people point data.py at works, or is named and counted."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import data
import dynamics
import lam
import play
import tokenizer
from lab.conftest import HERE, NO_GPU, inside, refuses


def film_of(frames, height=96, width=160, seed=0):
    """Squares that scroll by 3 pixels a frame: (T, height, width, 3) uint8.

    Their colours are faint, because films store colour at half the resolution.
    """
    rng = np.random.default_rng(seed)
    shape = height // 16, 3 * frames // 16 + 20
    coarse = rng.integers(30, 225, (*shape, 1)) + rng.integers(-20, 20, (*shape, 3))
    wide = coarse.repeat(16, 0).repeat(16, 1).astype(np.uint8)
    return np.stack([wide[:, 3 * t:3 * t + width] for t in range(frames)])


def write_film(path, film, fps=20):
    import imageio.v2 as imageio
    how = dict(format="FFMPEG", fps=fps, macro_block_size=1, quality=9)
    if path.suffix == ".gif":
        how = dict(duration=1000 / fps, loop=0)
    if path.suffix == ".webm":
        how |= dict(codec="libvpx", quality=None, bitrate="4M")
    imageio.mimwrite(path, list(film), **how)


def write_pictures(folder, film, name="shot {}.png"):
    import imageio.v2 as imageio
    folder.mkdir()
    for number, frame in enumerate(film):
        imageio.imwrite(folder / name.format(number), frame)


def make(folder, *flags):
    """data.py with these flags, in a folder. Returns (frames, meta) of data/own: all its frames
    (F, H, W, 3) and its meta.json."""
    with inside(folder):
        data.main([str(flag) for flag in (*flags, "--name", "own")])
    meta = data.read_meta(folder / "data/own")
    parts = [np.fromfile(folder / f"data/own/{split}.u8", np.uint8).reshape(-1, *meta["frame"])
             for split in ("train", "valid")]
    return np.concatenate(parts), meta


def quality(a, b):
    return data.psnr(torch.from_numpy(a) / 255, torch.from_numpy(b) / 255).mean().item()


# ------------------------------------------------------------------------------- kinds of video


@pytest.mark.parametrize("kind", ["mp4", "gif", "webm", "avi", "pictures"])
def test_the_same_film_is_the_same_in_every_kind_of_file(kind, tmp_path):
    """Four seconds at 20 frames/s are 40 frames, the same as those of an array."""
    film = film_of(80)
    np.save(tmp_path / "film.npy", film)
    expected, _ = make(tmp_path, "--videos", "film.npy", "--from-fps", 20)
    if kind == "pictures":
        write_pictures(tmp_path / "film", film)
        path = tmp_path / "film"
    else:
        path = tmp_path / f"film.{kind}"
        write_film(path, film)
    frames, meta = make(tmp_path, "--videos", path, "--from-fps", 20, "--overwrite")
    assert len(expected) == 40 and abs(len(frames) - 40) <= 1
    least = 24 if kind == "gif" else 30
    assert quality(frames[:39], expected[:39]) > least
    assert meta["frame"] == [64, 64, 3] and meta["fps"] == 10


@pytest.mark.parametrize("white, dtype", [(1, np.float32), (255, np.float64), (65535, np.uint16)])
def test_arrays_of_any_number(white, dtype, tmp_path):
    film = film_of(40)
    np.save(tmp_path / "bytes.npy", film)
    np.save(tmp_path / "other.npy", (film / 255 * white).astype(dtype))
    expected, _ = make(tmp_path, "--videos", "bytes.npy")
    frames, _ = make(tmp_path, "--videos", "other.npy", "--overwrite")
    assert np.abs(frames.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("fit, words", [("crop", "cuts off 40%"), ("pad", "leaves 40%"),
                                        ("squash", "squeezes one side by 40%")])
def test_what_is_lost_of_each_picture_is_said(fit, words, tmp_path, capsys):
    """A white film of 96x160 pixels: nothing of it is black, unless borders are added."""
    film = film_of(80)
    film[:] = 140
    film[::4] = 180
    write_film(tmp_path / "white.mp4", film)
    frames, _ = make(tmp_path, "--videos", "white.mp4", "--fit", fit)
    assert words in capsys.readouterr().out
    dark = (frames.max(-1) < 40).mean()
    assert abs(dark - 0.4) < 0.05 if fit == "pad" else dark == 0


def test_nested_and_linked_folders_and_what_is_no_video(tmp_path, capsys):
    """A loop of links ends, a named pipe does not hang, a file is read once, and all is named."""
    mine = tmp_path / "mine"
    (mine / "deep/er").mkdir(parents=True)
    write_film(mine / "deep/er/a.MP4".lower(), film_of(40))
    write_film(tmp_path / "b.gif", film_of(40, seed=1))
    (mine / "deep/linked.gif").symlink_to(tmp_path / "b.gif")
    write_pictures(tmp_path / "shots", film_of(20, seed=2), "{}.jpg")
    (mine / "shots").symlink_to(tmp_path / "shots")
    (mine / "again").symlink_to(mine / "deep")
    (mine / "deep/up").symlink_to(mine)
    (mine / "itself").symlink_to(mine / "itself")
    os.mkfifo(mine / "pipe.mp4")
    (mine / "notes.txt").write_text("when I was out")
    (mine / "broken.mkv").write_text("no film")
    make(tmp_path, "--videos", "mine")
    printed = capsys.readouterr()
    assert "3 videos used, 1 skipped, 3 files that are no videos" in printed.out
    for name in ("pipe.mp4", "notes.txt", "itself", "skipped mine/broken.mkv"):
        assert name in printed.err


def test_a_playlist_reaches_for_nothing_in_the_network(tmp_path):
    (tmp_path / "list.mp4").write_text("#EXTM3U\n#EXTINF:9,\nhttp://127.0.0.1:9/a.ts\n")
    refuses("1 could not be used", data.main, "--videos", "list.mp4", cwd=tmp_path)


@pytest.mark.parametrize("shape", [(16, 8, 8), (16, 8, 8, 4), (0, 8, 8, 3)])
def test_an_array_that_is_no_film(shape, tmp_path, capsys):
    np.save(tmp_path / "a.npy", np.zeros(shape, np.uint8))
    refuses("1 could not be used", data.main, "--videos", "a.npy", cwd=tmp_path)
    assert "not (T, H, W, 3)" in capsys.readouterr().err


@pytest.mark.parametrize("flags, words", [
    (["--fps", "1000000"], "from 1 to 240"),
    (["--fps", "0"], "from 1 to 240"),
    (["--frame-size", "4"], "from 8 to 1024"),
    (["--frame-size", "64x5000"], "from 8 to 1024"),
    (["--name", "x" * 300], "plain word of at most"),
    (["--seed", "1" * 26], "at most a billion"),
])
def test_a_flag_that_makes_no_sense(flags, words, tmp_path):
    refuses(words, data.main, "--videos", "a.mp4", *flags, cwd=tmp_path)


# ------------------------------------------------------------------------------- episodes


def test_a_cut_ends_an_episode_and_a_fast_scroll_does_not(tmp_path):
    """Two scenes of other colours, each scrolling by 3 pixels a frame."""
    dark = film_of(40) // 3
    light = 255 - film_of(50, seed=1) // 3
    np.save(tmp_path / "film.npy", np.concatenate([dark, light]))
    _, meta = make(tmp_path, "--videos", "film.npy")
    assert meta["episodes"] == dict(train=[40, 34], valid=[16])


def test_a_game_without_a_cut_is_one_episode(tmp_path):
    frames, _, _ = data.play_episode(5, 200)
    np.save(tmp_path / "film.npy", frames)
    _, meta = make(tmp_path, "--videos", "film.npy")
    assert len(meta["episodes"]["train"]) == 1


@pytest.mark.parametrize("flags, expected", [([], 54), (["--keep-still"], 100)])
def test_no_clip_consists_of_a_pause(flags, expected, tmp_path, capsys):
    """After 40 frames nothing moves. Fifteen alike stay, one too few for a clip."""
    film = film_of(40)
    film = np.concatenate([film, film[-1:].repeat(60, 0)])
    np.save(tmp_path / "film.npy", film)
    frames, _ = make(tmp_path, "--videos", "film.npy", *flags)
    assert len(frames) == expected
    assert f"{100 - expected} frames left out in which nothing moved" in capsys.readouterr().out


def test_a_film_in_which_nothing_moves(tmp_path, capsys):
    np.save(tmp_path / "film.npy", film_of(1).repeat(90, 0))
    refuses("1 could not be used", data.main, "--videos", "film.npy", cwd=tmp_path)
    assert "no 16 frames in a row in which something moves" in capsys.readouterr().err


@pytest.mark.parametrize("lengths, share", [([600], 0), ([100] * 10, 0.1), ([900, 100], 0.1),
                                            ([500, 500], 0.5), ([100000, 20], 0),
                                            (list(range(100, 200)), 0.1)])
def test_whole_videos_are_held_out(lengths, share):
    """About a tenth of the frames. Where that cannot be, it is the end of the longest."""
    held = data.hold_out(lengths)
    assert abs(sum(lengths[i] for i in held) / sum(lengths) - share) < 0.03
    assert len(held) < len(lengths)


def test_no_video_is_in_both_splits(tmp_path, capsys):
    """Each video has a colour of its own."""
    for i in range(6):
        film = film_of(60, seed=i)
        film[..., 0] = 40 * i
        np.save(tmp_path / f"{i}.npy", film)
    make(tmp_path, "--videos", *(tmp_path / f"{i}.npy" for i in range(6)))
    clips = [data.Clips(tmp_path / "data/own", split, 16) for split in ("train", "valid")]
    seen = [set(np.unique(clip.frames[..., 0])) for clip in clips]
    assert seen[0].isdisjoint(seen[1]) and len(seen[0]) == 5 and len(seen[1]) == 1
    assert "(1 whole videos)" in capsys.readouterr().out


# ------------------------------------------------------------------------------- nothing is lost


def test_finished_videos_are_not_read_again(tmp_path, monkeypatch, capsys):
    """Ctrl-C in the second video. The same command reads the second alone."""
    for name in ("a", "b"):
        np.save(tmp_path / f"{name}.npy", film_of(60, seed=ord(name)))
    expected, _ = make(tmp_path, "--videos", "a.npy", "b.npy")
    shutil.rmtree(tmp_path / "data")
    read = []
    real = data.read_video

    def interrupted(path, how):
        read.append(path.name)
        for i, frame in enumerate(real(path, how)):
            if path.name == "b.npy" and i == 30 and len(read) == 2:
                raise KeyboardInterrupt
            yield frame

    monkeypatch.setattr(data, "read_video", interrupted)
    with pytest.raises(SystemExit) as stopped:
        make(tmp_path, "--videos", "a.npy", "b.npy")
    assert stopped.value.code == 130
    assert "reads no finished video again" in capsys.readouterr().err
    frames, _ = make(tmp_path, "--videos", "a.npy", "b.npy")
    assert read == ["a.npy", "b.npy", "b.npy"]
    assert np.array_equal(frames, expected)
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["own"]


def test_folders_of_others_are_not_touched(tmp_path):
    """x.part may be somebody's folder, and so may one that has the name of ours."""
    np.save(tmp_path / "film.npy", film_of(40))
    for name in ("own.part", ".own.replaced"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "diary.txt").write_text("mine")
    refuses("holds what data.py did not write", data.main, "--videos", "film.npy", "--name", "own",
            cwd=tmp_path)
    shutil.rmtree(tmp_path / "data/.own.replaced")
    make(tmp_path, "--videos", "film.npy")
    assert (tmp_path / "data/own.part/diary.txt").read_text() == "mine"


def test_what_a_killed_process_left_gets_into_no_data_set(tmp_path):
    np.save(tmp_path / "film.npy", film_of(40))
    (tmp_path / "data/.own.unfinished").mkdir(parents=True)
    (tmp_path / "data/.own.unfinished/test.u8").write_bytes(b"half")
    make(tmp_path, "--videos", "film.npy")
    assert not (tmp_path / "data/own/test.u8").exists()


def test_overwriting_a_data_set_does_not_delete_its_videos(tmp_path):
    np.save(tmp_path / "film.npy", film_of(40))
    make(tmp_path, "--videos", "film.npy")
    shutil.move(tmp_path / "film.npy", tmp_path / "data/own/film.npy")
    refuses(r"\(film.npy\), and will not be deleted", data.main, "--videos", "data/own",
            "--name", "own", "--overwrite", cwd=tmp_path)
    assert sorted(path.name for path in (tmp_path / "data/own").iterdir()) == [
        "film.npy", "meta.json", "sheet.png", "train.u8", "valid.u8"]


@pytest.mark.slow
def test_two_at_once_and_a_kill(tmp_path):
    """The second is told so, and harms nothing. After kill -9 the same command goes on."""
    write_film(tmp_path / "long.mp4", film_of(2400))
    command = [sys.executable, HERE / "data.py", "--videos", "long.mp4", "--fps", "240"]
    first = subprocess.Popen(command, cwd=tmp_path, env=NO_GPU, stderr=subprocess.DEVNULL,
                             stdout=subprocess.DEVNULL)
    while not list(tmp_path.glob("data/.long.unfinished/videos/*.u8")) and first.poll() is None:
        time.sleep(0.01)
    second = subprocess.run(command, cwd=tmp_path, env=NO_GPU, capture_output=True, text=True)
    assert "another process is writing" in second.stderr, first.poll()
    first.send_signal(signal.SIGKILL)
    first.wait()
    third = subprocess.run(command, cwd=tmp_path, env=NO_GPU, capture_output=True, text=True)
    assert third.returncode == 0, third.stderr
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["long"]


# ------------------------------------------------------------------------------- other shapes


def test_a_world_that_is_not_square_trains_and_plays(tmp_path, unscored, monkeypatch):
    """36x52 pixels are no whole number of patches: padded inside, cropped where they are shown."""
    monkeypatch.setitem(dynamics.PRIOR_STEPS, "test", 2)
    np.save(tmp_path / "film.npy", film_of(60))
    _, meta = make(tmp_path, "--videos", "film.npy", "--frame-size", "36x52")
    assert meta["frame"] == [36, 52, 3]
    few = ["--device", "cpu", "--size", "test", "--steps", "4", "--batch", "4", "--data",
           "data/own"]
    with inside(tmp_path):
        for stage in (tokenizer, lam, dynamics):
            stage.main(few)
        # what `unscored` left out
        run = tmp_path / "runs/own"
        (run / "lam.json").write_text(json.dumps(dict(
            fingerprint=torch.load(run / "lam.pt", weights_only=True)["fingerprint"])))
        game = play.Game(play.load(run, "cpu"), "cpu", steps=1)
        first, true = next(play.starts(game, 0, data="data/own", run=run))
        game.reset(first)
        assert true is None and game.press(2).shape == (36, 52, 3)
    assert (game.dynamics.N, game.tokenizer.tokens) == (35, 35)


def test_patches_reach_beyond_the_frame_and_come_back():
    import st_block as st
    x = torch.rand(2, 3, 36, 52, 3)
    patches = st.patchify(x, 8)
    assert patches.shape == (2, 3, 5 * 7, 192)
    assert torch.equal(st.unpatchify(patches, 8, 36, 52), x)
    assert patches[:, :, -1].reshape(2, 3, 8, 8, 3)[..., 4:, 4:, :].eq(0).all()


# ------------------------------------------------------------------------------- pictures


def test_pictures_of_phones_and_of_science(tmp_path):
    """Upright, 16-bit and float images are as bright as their 8-bit kin."""
    from PIL import Image
    grey = np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1)).repeat(10, 0).repeat(10, 1)
    Image.fromarray(grey).save(tmp_path / "8.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16.png")
    Image.fromarray(grey.astype(np.float32) / 255).save(tmp_path / "float.tif")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(grey)).save(tmp_path / "turned.png", exif=exif)
    expected = play.read_image(tmp_path / "8.png", 64, 64)
    for name in ("16.png", "float.tif", "turned.png"):
        assert (play.read_image(tmp_path / name, 64, 64) - expected).abs().max() < 0.01, name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_a_picture_of_a_hundred_million_pixels(kind, tmp_path):
    """It is read without a warning, as what it is: light on the left, dark on the right."""
    from PIL import Image
    pixels = np.zeros((10_000, 10_000), np.uint8)
    pixels[:, :5000] = 200
    Image.fromarray(pixels).save(tmp_path / f"large.{kind}")
    x = play.read_image(tmp_path / f"large.{kind}", 64, 64)
    assert (x[:, :31] - 200 / 255).abs().max() < 0.02 and x[:, 33:].max() < 0.02


def test_a_picture_of_another_shape_keeps_its_middle(tmp_path):
    from PIL import Image
    wide = np.zeros((40, 120, 3), np.uint8)
    wide[:, 20:100] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert play.read_image(tmp_path / "wide.png", 48, 96).eq(1).all()
