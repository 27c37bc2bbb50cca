"""Hostile inputs, and processes that are killed: one sentence each, and nothing is lost.

    pytest -q -m slow lab/test_hostile.py

A row of a table spoils one thing in a folder with a small data set and three trained stages, or
gives a command line that makes no sense. The command must end with one sentence, and with every
file as it was before.
"""
import hashlib
import json
import os
import pickle
import pty
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import dynamics
import lam
import play
import st_block as st
import tokenizer
from lab import export
from lab.conftest import HERE, NO_GPU, inside

pytestmark = pytest.mark.slow

FEW = ["--device", "cpu", "--size", "test", "--steps", "4", "--batch", "4", "--scored", "4"]
RUN = Path("runs/platformer")
DATA = Path("data/platformer")
LONG = "x" * 300


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a data set of the built-in game, and all stages after four steps."""
    folder = tmp_path_factory.mktemp("made")
    with inside(folder), pytest.MonkeyPatch.context() as patch:
        patch.setitem(dynamics.PRIOR_STEPS, "test", 2)
        data.main(["--episodes", "2", "--frames", "40"])
        for stage in (tokenizer, lam, dynamics):
            stage.main(FEW)
        np.save("film.npy", np.random.default_rng(0).integers(0, 255, (40, 64, 64, 3), np.uint8))
        (folder / "notes.txt").write_text("mine")
    return folder


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    """The working directory: a copy of that folder."""
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def files(folder):
    """Every file below a folder, by a hash of what is in it."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def ends(words, main, flags, capsys):
    """The command must end with one sentence, as a user sees it, and change no file."""
    before = files(Path("..").resolve())

    def run():
        main([str(flag) for flag in flags])

    with pytest.raises(SystemExit) as stopped:
        st.command(run)
    # argparse has its own way to say so
    if stopped.value.code == 2:
        sentence = capsys.readouterr().err.splitlines()[-1]
    else:
        sentence = stopped.value.code
        assert sentence.startswith("error: ") and len(sentence.splitlines()) == 1, sentence
    assert words in sentence
    assert len(sentence) < 1000
    assert files(Path("..").resolve()) == before


# ------------------------------------------------------------------------------- data sets


def change(**entries):
    """A spoiler of meta.json: entries are replaced, or removed where they are None."""
    def spoil():
        meta = json.loads((DATA / "meta.json").read_text())
        for name, value in entries.items():
            meta[name] = value
            if value is None:
                del meta[name]
        (DATA / "meta.json").write_text(json.dumps(meta))
    return spoil


def write(path, content):
    """A spoiler: the file holds something else."""
    def spoil():
        Path(path).write_bytes(content)
    return spoil


def shorten(path, share=0.5):
    def spoil():
        os.truncate(path, int(os.path.getsize(path) * share))
    return spoil


def remove(path):
    def spoil():
        Path(path).unlink()
    return spoil


def folder_instead(path):
    def spoil():
        Path(path).unlink()
        Path(path).mkdir()
    return spoil


def last_bit():
    with open(DATA / "train.u8", "r+b") as f:
        f.seek(-1, os.SEEK_END)
        last = f.read()
        f.seek(-1, os.SEEK_END)
        f.write(bytes([last[0] ^ 1]))


def nothing():
    pass


META = DATA / "meta.json"
LENGTHS = dict(train=[40, 40], valid=[40] * 6, test=[40] * 6)
DATA_SETS = dict(
    no_source=(change(source=None), "is damaged"),
    source_a_number=(change(source=7), "no valid source"),
    frame_of_two=(change(frame=[64, 64]), "no valid frame"),
    frame_of_four=(change(frame=[64, 64, 3, 1]), "no valid frame"),
    frame_a_word=(change(frame="big"), "no valid frame"),
    frame_a_number=(change(frame=64), "is damaged"),
    grey=(change(frame=[64, 64, 1]), "no valid frame"),
    see_through=(change(frame=[64, 64, 4]), "no valid frame"),
    float_frame=(change(frame=[64.0, 64.0, 3]), "no valid numbers"),
    negative_frame=(change(frame=[-64, 64, 3]), "no valid numbers"),
    negative_length=(change(episodes=LENGTHS | dict(train=[-40, 120])), "no valid numbers"),
    length_a_word=(change(episodes=LENGTHS | dict(train=["forty"])), "no valid numbers"),
    lengths_a_number=(change(episodes=LENGTHS | dict(train=80)), "is damaged"),
    no_valid=(change(episodes=dict(train=[40, 40])), "no valid episodes"),
    no_episodes=(change(episodes=None), "is damaged"),
    other_lengths=(change(episodes=LENGTHS | dict(train=[40, 41])), "meta.json says 81"),
    date_a_word=(change(written="today"), "is damaged"),
    date_alone=(change(written=dict(train=[1])), "is damaged"),
    nested=(write(META, b"[" * 100_000), "is damaged"),
    null=(write(META, b"null"), "is damaged"),
    a_list=(write(META, b"[1, 2]"), "is damaged"),
    empty_meta=(write(META, b""), "is damaged"),
    half_meta=(shorten(META), "is damaged"),
    no_text=(write(META, bytes(range(256))), "is damaged"),
    no_meta=(remove(META), "is no data set"),
    meta_a_folder=(folder_instead(META), "cannot be used"),
    half_frames=(shorten(DATA / "train.u8"), "is damaged"),
    odd_frames=(shorten(DATA / "train.u8", 0.37), "is damaged"),
    no_frames=(write(DATA / "train.u8", b""), "is damaged"),
    frames_gone=(remove(DATA / "train.u8"), "is no data set"),
    held_out_gone=(remove(DATA / "valid.u8"), "is no data set"),
    one_bit=(last_bit, "train.u8 was changed"),
)


@pytest.mark.parametrize("row", DATA_SETS)
def test_a_data_set_that_is_wrong(row, place, capsys):
    spoil, words = DATA_SETS[row]
    spoil()
    ends(words, tokenizer.main, [*FEW, "--overwrite"], capsys)


def true_actions(argv):
    data.true_actions(DATA, "train")


def arrays(**more):
    """A spoiler of true_actions.npz: these arrays are others."""
    def spoil():
        with np.load(DATA / "true_actions.npz") as f:
            known = dict(f)
        np.savez(DATA / "true_actions.npz", **known | more)
    return spoil


TRUE_ACTIONS = dict(
    short=arrays(train_action=np.zeros(3, np.uint8)),
    of_101=arrays(train_action=np.full(80, 101, np.uint8)),
    floats=arrays(train_action=np.zeros(80)),
    narrow=arrays(train_same=np.zeros((80, 5), bool)),
    too_many_levels=arrays(train_seed=np.zeros(9, int)),
    pickled=arrays(train_seed=np.array([print, None])),
    half=shorten(DATA / "true_actions.npz"),
    empty=write(DATA / "true_actions.npz", b""),
)


@pytest.mark.parametrize("row", TRUE_ACTIONS)
def test_true_actions_that_are_wrong(row, place, capsys):
    TRUE_ACTIONS[row]()
    ends("true_actions.npz is damaged", true_actions, [], capsys)


# ------------------------------------------------------------------------------- checkpoints


class Malice:
    def __reduce__(self):
        return os.system, ("touch harmed",)


def entry(stage, /, **entries):
    """A spoiler of a checkpoint: entries are others, or gone where they are ...; a dictionary
    changes entries of the dictionary that is there."""
    def spoil():
        ckpt = torch.load(RUN / f"{stage}.pt", weights_only=True)
        for name, value in entries.items():
            if value is ...:
                del ckpt[name]
            elif isinstance(value, dict) and isinstance(ckpt[name], dict):
                ckpt[name] |= value
            else:
                ckpt[name] = value
        torch.save(ckpt, RUN / f"{stage}.pt")
    return spoil


def weight(stage, name, value):
    return entry(stage, model={name: value})


TOKENIZER = RUN / "tokenizer.pt"
NAN = torch.full((64,), float("nan"))
CHECKPOINTS = {f"no_{name}": (entry("tokenizer", **{name: ...}), "is damaged")
               for name in st.CHECKPOINT} | dict(
    step_a_word=(entry("tokenizer", step="four"), "step is 'four'"),
    step_negative=(entry("tokenizer", step=-4), "step -4 of 4"),
    step_beyond=(entry("tokenizer", step=5), "step 5 of 4"),
    curve_a_word=(entry("tokenizer", curve="up"), "curve is 'up'"),
    model_a_list=(entry("tokenizer", model=[1]), "model is [1]"),
    origin_a_number=(entry("tokenizer", origin=dict(data=4)), "origin is"),
    recipe_unknown=(entry("tokenizer", knobs=dict(recipe="cake")), "recipe cake"),
    size_unknown=(entry("tokenizer", knobs=dict(size="XL")), "size XL"),
    unfinished=(entry("tokenizer", step=3), "at step 3 of 4; finish it first"),
    other_data=(entry("tokenizer", origin=dict(data="films")), "was trained on films"),
    wide=(entry("tokenizer", config=dict(dim=10 ** 7)), "larger than its weights"),
    deep=(entry("tokenizer", config=dict(layers=10 ** 6)), "larger than its weights"),
    no_heads=(entry("tokenizer", config=dict(heads=0)), "does not fit"),
    no_patch=(entry("tokenizer", config=dict(patch=0)), "does not fit"),
    float_width=(entry("tokenizer", config=dict(dim=64.5)), "does not fit"),
    other_width=(entry("tokenizer", config=dict(dim=32)), "does not fit"),
    more_knobs=(entry("tokenizer", config=dict(taste="sweet")), "does not fit"),
    no_recipe=(entry("tokenizer", config=dict(recipe="cake")), "does not fit"),
    nan_weights=(weight("tokenizer", "embed.bias", NAN), "not all finite"),
    other_shape=(weight("tokenizer", "embed.bias", torch.zeros(3)), "does not fit"),
    weight_a_word=(weight("tokenizer", "embed.bias", "none"), "does not fit"),
    another_stage=(lambda: shutil.copy(RUN / "lam.pt", TOKENIZER), "is a checkpoint of lam.py"),
    half=(shorten(TOKENIZER), "is damaged"),
    nearly_whole=(shorten(TOKENIZER, 0.999), "is damaged"),
    empty=(write(TOKENIZER, b""), "is damaged"),
    text=(write(TOKENIZER, b"weights"), "is damaged"),
    a_list=(lambda: torch.save([1, 2], TOKENIZER), "is damaged"),
    malice=(write(TOKENIZER, pickle.dumps(Malice())), "is damaged"),
    gone=(remove(TOKENIZER), "does not exist"),
    a_folder=(folder_instead(TOKENIZER), "is damaged"),
    tokens_half=(shorten(RUN / "tokens.pt"), "delete it"),
    tokens_a_list=(lambda: torch.save([1, 2], RUN / "tokens.pt"), "delete it"),
)


@pytest.mark.parametrize("row", CHECKPOINTS)
def test_a_checkpoint_that_is_wrong(row, place, capsys):
    spoil, words = CHECKPOINTS[row]
    spoil()
    ends(words, dynamics.main, [*FEW, "--overwrite"], capsys)
    assert not (place / "harmed").exists()


def optimizer(change):
    """A spoiler of the optimizer's state in tokenizer.pt."""
    def spoil():
        ckpt = torch.load(TOKENIZER, weights_only=True)
        ckpt["optimizer"] = change(ckpt["optimizer"])
        torch.save(ckpt, TOKENIZER)
    return spoil


def first_moment(value):
    def change(optimizer):
        optimizer["state"][0]["exp_avg"] = value
        return optimizer
    return optimizer(change)


RESUMES = dict(
    optimizer_empty=(entry("tokenizer", optimizer=None), "cannot be resumed"),
    optimizer_hollow=(optimizer(lambda known: {}), "cannot be resumed"),
    optimizer_a_word=(entry("tokenizer", optimizer="adam"), "optimizer is 'adam'"),
    optimizer_without_groups=(optimizer(lambda known: dict(state={})), "cannot be resumed"),
    moment_short=(first_moment(torch.zeros(3)), "cannot be resumed"),
    moment_a_word=(first_moment("none"), "cannot be resumed"),
    weights_other=(weight("tokenizer", "embed.bias", torch.zeros(3)), "cannot be resumed"),
    weights_more=(weight("tokenizer", "taste", torch.zeros(3)), "cannot be resumed"),
    knob_a_word=(entry("tokenizer", knobs=dict(dim="wide")), "knew no --dim"),
    other_data=(entry("tokenizer", origin=dict(data="films")), "was begun on another data"),
    gone=(remove(TOKENIZER), "does not exist"),
)


@pytest.mark.parametrize("row", RESUMES)
def test_a_resume_of_what_is_wrong(row, place, capsys):
    spoil, words = RESUMES[row]
    spoil()
    ends(words, tokenizer.main, ["--device", "cpu", "--resume", "--steps", "8"], capsys)


# ------------------------------------------------------------------------------- play


def scores(**entries):
    """A spoiler of lam.json: entries are others."""
    def spoil():
        known = json.loads((RUN / "lam.json").read_text())
        (RUN / "lam.json").write_text(json.dumps(known | entries))
    return spoil


LAM = RUN / "lam.json"
WORLDS = dict(
    scores_gone=(remove(LAM), "lam.json does not exist"),
    scores_a_folder=(folder_instead(LAM), "cannot be used"),
    scores_half=(shorten(LAM), "lam.json is damaged"),
    scores_null=(write(LAM, b"null"), "lam.json is damaged"),
    scores_nested=(write(LAM, b"[" * 100_000), "lam.json is damaged"),
    scores_no_text=(write(LAM, bytes(range(256))), "lam.json is damaged"),
    keys_words=(scores(keys=["a"] * 6), "keys is ['a'"),
    keys_few=(scores(keys=[0, 1]), "keys is [0, 1]"),
    keys_large=(scores(keys=[0, 1, 2, 3, 4, 8]), "keys is"),
    keys_floats=(scores(keys=[0.0] * 6), "keys is"),
    keys_a_number=(scores(keys=3), "keys is 3"),
    meaning_short=(scores(meaning=[0]), "meaning is [0]"),
    meaning_large=(scores(meaning=[6] * 8), "meaning is"),
    still_large=(scores(still=8), "still is 8"),
    still_negative=(scores(still=-1), "still is -1"),
    still_a_list=(scores(still=[1]), "still is [1]"),
    another_lam=(scores(fingerprint="other"), "another lam"),
    another_tokenizer=(entry("tokenizer", fingerprint="other"), "another tokenizer"),
    nan_dynamics=(weight("dynamics", "head.bias", torch.full((256,), float("nan"))),
                  "not all finite"),
    no_origin=(entry("dynamics", origin=dict(lam=None)), "origin is"),
    dynamics_half=(shorten(RUN / "dynamics.pt"), "dynamics.pt is damaged"),
)


@pytest.mark.parametrize("row", WORLDS)
def test_a_world_that_is_wrong(row, place, capsys):
    spoil, words = WORLDS[row]
    spoil()
    ends(words, play.main, ["--device", "cpu", "--script"], capsys)


# ------------------------------------------------------------------------------- command lines

COMMANDS = [
    (data.main, ["--episodes", 2], "already exists"),
    (data.main, ["--episodes", 0, "--overwrite"], "--episodes must be"),
    (data.main, ["--episodes", 600_000, "--overwrite"], "--episodes must be"),
    (data.main, ["--frames", 16, "--overwrite"], "--frames from 17"),
    (data.main, ["--seed", -1, "--overwrite"], "--seed must not be negative"),
    (data.main, ["--seed", "1" * 26, "--overwrite"], "at most a billion"),
    (data.main, ["--name", LONG], "plain word"),
    (data.main, ["--name", "../x"], "plain word"),
    (data.main, ["--fps", 10 ** 6, "--videos", "film.npy"], "from 1 to 240"),
    (data.main, ["--from-fps", -1, "--videos", "film.npy"], "from 1 to 240"),
    (data.main, ["--fps", "ten", "--videos", "film.npy"], "invalid int value"),
    (data.main, ["--frame-size", "64x", "--videos", "film.npy"], "invalid frame_size value"),
    (data.main, ["--frame-size", 0, "--videos", "film.npy"], "from 8 to 1024"),
    (data.main, ["--frame-size", "1x1x1", "--videos", "film.npy"], "invalid frame_size value"),
    (data.main, ["--fit", "shrink", "--videos", "film.npy"], "invalid choice"),
    (data.main, ["--videos"], "expected at least one"),
    (data.main, ["--videos", "nowhere.mp4"], "does not exist"),
    (data.main, ["--videos", LONG], "File name too long"),
    (data.main, ["--videos", "notes.txt"], "1 could not be used"),
    (data.main, ["--videos", "runs"], "no video in runs"),
    (data.main, ["--videos", "film.npy", "--name", "platformer"], "already exists"),
    (data.main, ["--show", "--name", "nothing"], "is no data set"),
    (tokenizer.main, [*FEW], "tokenizer.pt already exists"),
    (lam.main, [*FEW], "lam.pt already exists"),
    (dynamics.main, [*FEW], "dynamics.pt already exists"),
    (dynamics.main, [*FEW, "--cotrain"], "lam.pt already exists"),
    (tokenizer.main, ["--overwrite", "--steps", "1" * 23], "at most a billion"),
    (tokenizer.main, ["--overwrite", "--batch", 0], "at least 1"),
    (tokenizer.main, ["--overwrite", "--batch", 10 ** 15], "at most a billion"),
    (tokenizer.main, [*FEW, "--overwrite", "--dim", 2 ** 28], "memory is full"),
    (tokenizer.main, [*FEW, "--overwrite", "--vocabulary", 10 ** 9, "--latent-dim", 10 ** 6],
     "memory is full"),
    (tokenizer.main, [*FEW, "--overwrite", "--lr", "nan"], "makes no sense"),
    (tokenizer.main, [*FEW, "--overwrite", "--patch", 100], "cannot be cut"),
    (tokenizer.main, [*FEW, "--overwrite", "--device", "meta"], "cannot be used here"),
    (tokenizer.main, [*FEW, "--overwrite", "--device", "toaster"], "cannot be used here"),
    (tokenizer.main, [*FEW, "--overwrite", "--data", "notes.txt"], "is no data set"),
    (tokenizer.main, [*FEW, "--overwrite", "--data", LONG], "File name too long"),
    (tokenizer.main, [*FEW, "--run", LONG], "File name too long"),
    (tokenizer.main, [*FEW, "--run", "notes.txt/run"], "Not a directory"),
    (tokenizer.main, [*FEW, "--run", "/proc/nowhere"], "cannot write to"),
    (tokenizer.main, [*FEW, "--recipe", "cake"], "invalid choice"),
    (play.main, ["--temperature", "-1"], "not negative"),
    (play.main, ["--temperature", "nan"], "not negative"),
    (play.main, ["--device", "meta"], "cannot be used here"),
    (play.main, ["--fps", 0], "--fps above 0"),
    (play.main, ["--worlds", 0, "--script"], "must be at least 1"),
    (play.main, ["--script", "--keys", 1, 2], "four codes or five"),
    (play.main, ["--script", "--keys", 0, 1, 2, 9], "this world has 1 to 9"),
    (play.main, ["--script", "--prompt", "nowhere.png"], "cannot read the picture"),
    (play.main, ["--script", "--prompt", "notes.txt"], "cannot read the picture"),
    (play.main, ["--script", "--prompt", "data"], "cannot read the picture"),
    (play.main, ["--script", "--run", "nowhere"], "does not exist"),
    (play.main, ["--script", "--run", LONG], "File name too long"),
    (export.main, ["--run", RUN, "--to", RUN], "name another folder"),
    (export.main, ["--run", "nowhere", "--to", "there"], "does not exist"),
    (export.main, ["--run", RUN, "--to", "notes.txt/there"], "Not a directory"),
]


@pytest.mark.parametrize("main, flags, words", COMMANDS)
def test_a_command_line_that_makes_no_sense(main, flags, words, place, capsys):
    ends(words, main, flags, capsys)


@pytest.mark.parametrize("temperature", ["1e-40", "inf"])
def test_a_temperature_at_the_end_of_the_scale(temperature, place):
    play.main(["--device", "cpu", "--script", "--maskgit", "1", "--temperature", temperature])


def test_the_tables_have_eighty_rows():
    tables = (DATA_SETS, TRUE_ACTIONS, CHECKPOINTS, RESUMES, WORLDS, COMMANDS)
    assert sum(len(table) for table in tables) >= 80


# ------------------------------------------------------------------------------- processes

# a training that saves every third step; of `killed` it is many lives
TRAIN = ("import st_block, tokenizer\n"
         "st_block.Run.save_every = 3\n"
         "st_block.command(tokenizer.main)\n")


def train(run, *flags, **how):
    """A training in a process of its own."""
    command = [sys.executable, "-c", TRAIN, "--device", "cpu", "--size", "test", "--data", DATA,
               "--run", run, "--batch", "2", "--scored", "4", *flags]
    environment = NO_GPU | dict(PYTHONPATH=str(HERE))
    return subprocess.Popen([str(word) for word in command], env=environment, **how)


def step_of(path):
    if not path.exists():
        return 0
    return st.read_checkpoint(path, "tokenizer")["step"]


def wait_for_steps(process, path, least):
    """Until the checkpoint is so far, or the process has ended."""
    while process.poll() is None and step_of(path) < least:
        time.sleep(0.01)


def state(path):
    """All that a training has made: weights and optimizer, as one list of tensors."""
    ckpt = st.read_checkpoint(path, "tokenizer")
    moments = [m for s in ckpt["optimizer"]["state"].values() for m in s.values()]
    return [*ckpt["model"].values(), *moments]


def test_killed_twenty_times_and_resumed_it_ends_with_the_same_bits(place):
    """At random moments, by every signal there is, many of them within a save. What another
    process of this machine sees is a whole checkpoint at any time."""
    steps = ["--steps", "1500"]
    assert train("whole", *steps, stderr=subprocess.DEVNULL).wait() == 0
    path = place / "killed/tokenizer.pt"
    chance = random.Random(0)
    kills = 0
    flags = []
    while kills < 20:
        before = step_of(path)
        process = train("killed", *steps, *flags, stderr=subprocess.PIPE, text=True)
        wait_for_steps(process, path, before + 1)
        time.sleep(chance.uniform(0, 0.7))
        number = chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGHUP,
                                signal.SIGINT])
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert "Traceback" not in errors, errors
        assert process.returncode in (130, -9), (process.returncode, errors)
        if number != signal.SIGKILL:
            assert "stopped and saved at step" in errors
        kills += 1
        flags = ["--resume"]
    assert step_of(path) < 1500, "it was finished before it was killed 20 times"
    assert train("killed", *steps, "--resume", stderr=subprocess.DEVNULL).wait() == 0
    for a, b in zip(state(place / "whole/tokenizer.pt"), state(path), strict=True):
        assert torch.equal(a, b)
    # what the kills left half written was cleaned up
    assert not list((place / "killed").glob("*.part"))


def test_a_terminal_that_is_closed(place):
    """The training saves, though nobody reads its bar any more."""
    master, slave = pty.openpty()

    def own_terminal():
        import fcntl
        import termios
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = train("run", "--steps", "100000", stdin=slave, stdout=slave, stderr=slave,
                    preexec_fn=own_terminal)
    os.close(slave)
    path = place / "run/tokenizer.pt"
    wait_for_steps(process, path, 3)
    saved = step_of(path)
    os.close(master)
    assert process.wait(timeout=60) != 0
    assert step_of(path) >= saved
    assert not list(place.glob("run/*.part"))


def test_two_trainings_in_one_folder(place):
    """The second ends at once, and the first goes on."""
    first = train("run", "--steps", "100000", stderr=subprocess.DEVNULL)
    path = place / "run/tokenizer.pt"
    wait_for_steps(first, path, 3)
    for flags in (["--overwrite"], ["--resume"]):
        second = train("run", "--steps", "10", *flags, stderr=subprocess.PIPE, text=True)
        _, errors = second.communicate(timeout=60)
        assert "another process is writing" in errors.splitlines()[-1]
    saved = step_of(path)
    wait_for_steps(first, path, saved + 3)
    assert first.poll() is None
    first.kill()
    first.wait()


@pytest.mark.parametrize("script", ["data", "tokenizer", "lam", "dynamics", "play"])
def test_ctrl_c_while_torch_is_loaded(script, place):
    """One line. The signal comes when numpy is there already, and torch is next."""
    for delay in (0.0, 0.1, 0.2):
        process = subprocess.Popen([sys.executable, HERE / f"{script}.py", "--help"], env=NO_GPU,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        loaded = Path(f"/proc/{process.pid}/maps")
        while process.poll() is None and "numpy" not in loaded.read_text():
            time.sleep(0.001)
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert errors == "interrupted; nothing was begun\n", (delay, errors)
        assert process.returncode == 130


def test_checkpoints_come_by_the_clock_too(place, monkeypatch):
    """Every two minutes, though 500 steps may take an hour. Here: after no time at all."""
    assert st.Run.save_after == 120
    seen = []

    class Slow(st.Run):
        save_after = -1

        def save(self, step):
            super().save(step)
            seen.append(step)

    tokenizer.main([*FEW, "--run", "clock"], runner=Slow)
    assert seen == [1, 2, 3, 4, 4]
