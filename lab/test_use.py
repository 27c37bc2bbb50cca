"""What users do wrong, and what becomes of their files: one sentence, and nothing is lost."""
import ast
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tqdm import tqdm

import data
import dynamics as dyn
import lam as lam_stage
import play
import st_block as st
import tokenizer as tok
from lab.conftest import HERE, NO_GPU, inside, refuses, run, small_lam, small_tokenizer

STAGES = (tok, lam_stage, dyn)
CORE = ("st_block", "data", "tokenizer", "lam", "dynamics", "play")


@pytest.fixture
def few(few, tmp_path):
    """The flags of a short training, and where it is to leave its files."""
    return [*few, "--run", str(tmp_path / "run")]


class Interrupted(st.Run):
    """Somebody presses Ctrl-C during step 5."""

    def log(self, step, *args, **kwargs):
        super().log(step, *args, **kwargs)
        if step == 5:
            signal.raise_signal(signal.SIGINT)


def interrupted(stage, flags):
    """Train a stage, and press Ctrl-C during step 5."""
    with pytest.raises(SystemExit) as stopped:
        stage.main(flags, runner=Interrupted)
    assert stopped.value.code == 130


# ------------------------------------------------------------------------------- videos and data


def write_video(path, frames, fps=20):
    """A picture that scrolls, 160x96 pixels."""
    import imageio.v2 as imageio
    wide = np.random.default_rng(0).integers(0, 255, (96, 400, 3), dtype=np.uint8)
    film = [wide[:, 3 * t:3 * t + 160] for t in range(frames)]
    imageio.mimwrite(path, film, fps=fps, macro_block_size=1)


def test_own_videos_and_one_that_is_broken(tmp_path, capsys):
    """Of 20 frames/s half are kept, square. The broken video is named, skipped and counted."""
    (tmp_path / "mine").mkdir()
    write_video(tmp_path / "mine/good.mp4", 80)
    (tmp_path / "mine/broken.mp4").write_bytes(b"this is no video")
    with inside(tmp_path):
        data.main(["--videos", "mine", "--name", "own"])
    printed = capsys.readouterr()
    assert "broken.mp4" in printed.err and "1 skipped" in printed.out
    trained = data.Clips(tmp_path / "data/own", "train", 16)
    held = data.Clips(tmp_path / "data/own", "valid", 16)
    assert abs(len(trained.frames) + len(held.frames) - 40) <= 1
    assert trained.frames.shape[1:] == (64, 64, 3)
    assert data.true_actions(tmp_path / "data/own", "train") is None


def test_a_folder_without_videos(tmp_path):
    (tmp_path / "empty").mkdir()
    refuses("no video in", data.main, "--videos", "empty", cwd=tmp_path)


def test_a_folder_of_broken_videos_leaves_nothing_behind(tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/a.mp4").write_bytes(b"nothing")
    refuses("1 could not be used", data.main, "--videos", "broken", cwd=tmp_path)
    assert not list(tmp_path.glob("data/*"))


@pytest.mark.parametrize("name", ["..", ".", "a/b"])
def test_a_name_that_leads_out_of_data(tmp_path, name):
    """data/.. is where the user's own files are."""
    refuses("plain word", data.main, "--episodes", "1", "--name", name, cwd=tmp_path)


def test_a_folder_that_is_no_data_set_is_not_overwritten(tmp_path):
    (tmp_path / "data/own").mkdir(parents=True)
    refuses("is no data set", data.main, "--name", "own", "--overwrite", cwd=tmp_path)


def test_data_that_exist_are_not_made_again(platformer):
    refuses("already exists", data.main, cwd=platformer)


def test_data_behind_a_link_are_overwritten_there(tmp_path):
    """The folder of a data set may be a link to a larger disk."""
    (tmp_path / "disk/small").mkdir(parents=True)
    (tmp_path / "disk/small/meta.json").touch()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "disk/small", target_is_directory=True)
    for seed in (0, 1):
        data.build_platformer(link, 1, 20, seed, True)
        assert data.Clips(link, "train", 16).meta["source"] == f"platformer, seed {seed}"
    assert link.is_symlink()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["small"]


def test_damaged_data(tmp_path):
    def clips(argv):
        data.Clips(argv[0], "train", 16)

    def true_actions(argv):
        data.true_actions(argv[0], "train")

    (tmp_path / "meta.json").write_text("null")
    (tmp_path / "train.u8").write_bytes(b"")
    refuses("is damaged", clips, tmp_path)
    (tmp_path / "true_actions.npz").write_bytes(b"PK\x03\x04 half a file")
    refuses("is damaged", true_actions, tmp_path)


def test_other_frames_are_told_from_these(tmp_path):
    """The same game, seed and number of frames are not enough: the player's habits may change."""
    data.build_platformer(tmp_path / "small", 1, 40, 0, False)
    before = data.Clips(tmp_path / "small", "train", 16).name
    meta = json.loads((tmp_path / "small/meta.json").read_text())
    del meta["written"]
    (tmp_path / "small/meta.json").write_text(json.dumps(meta))
    with open(tmp_path / "small/train.u8", "r+b") as f:
        f.write(b"\xff")
    assert data.Clips(tmp_path / "small", "train", 16).name != before


def test_frames_that_were_changed_anywhere(platformer, tmp_path):
    """Somebody changed the very last one."""
    def clips(argv):
        data.Clips(argv[0], "train", 16)

    root = tmp_path / "platformer"
    shutil.copytree(platformer / "data/platformer", root)
    clips([root])
    with open(root / "train.u8", "r+b") as f:
        f.seek(-1, os.SEEK_END)
        f.write(bytes([f.peek(1)[0] ^ 1]))
    refuses("train.u8 was changed", clips, root)


# ------------------------------------------------------------------------------- flags


@pytest.mark.parametrize("flags, words", [
    (["--frames", "81"], "no episode"),
    (["--frames", "1"], "at least 2"),
    (["--codes", "1"], "at least 2"),
    (["--codes", "7"], "a product of two numbers"),
    (["--latent-dim", "5"], "an even number"),
    (["--batch", "0"], "at least 1"),
    (["--lr", "nan"], "finite"),
    (["--lr", "inf"], "finite"),
    (["--seed", "20261127000"], "too large"),
    (["--dim", "30", "--heads", "4"], "multiple of twice --heads"),
    (["--patch", "65"], "cannot be cut"),
    (["--patch", "32"], "nothing would be left"),
    (["--device", "cuda:99"], "cannot be used here"),
    (["--device", "meta"], "cannot be used here"),
    (["--steps", "1" * 23], "at most a billion"),
    (["--data", "data/nowhere"], "python data.py"),
    (["--resume", "--run", "runs/nowhere"], "does not exist"),
])
def test_a_flag_that_makes_no_sense(platformer, flags, words):
    refuses(words, lam_stage.main, "--device", "cpu", "--size", "test", *flags, cwd=platformer)


@pytest.mark.parametrize("flags, words", [
    (["--seed", "20261127000"], "at most a billion"),
    (["--fps", "nan"], "--fps above 0"),
    (["--run", "nowhere", "--script"], "does not exist"),
])
def test_a_flag_of_play_that_makes_no_sense(tmp_path, flags, words):
    refuses(words, play.main, "--device", "cpu", *flags, cwd=tmp_path)


@pytest.mark.parametrize("flags, words", [([], "python data.py"),
                                          (["--szie", "test"], "unrecognized")])
def test_a_mistake_is_no_traceback(tmp_path, flags, words):
    """As a user sees it: the last line says what is wrong, and the exit code is not 0."""
    result = run(HERE / "tokenizer.py", *flags, cwd=tmp_path)
    assert result.returncode != 0
    assert words in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_ctrl_c_is_no_traceback(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        st.command(main)
    assert stopped.value.code == 130
    assert "interrupted" in capsys.readouterr().err


def test_an_error_stands_on_a_line_of_its_own(capsys):
    """Not behind a progress bar that was on the screen."""
    bar = tqdm(total=10)
    bar.update(3)
    with pytest.raises(SystemExit):
        st.stop("no")
    assert bar.disable and capsys.readouterr().err.endswith("\n")


def no_compiler(*args, **kwargs):
    raise RuntimeError("No working C++ compiler found\nand a page of details")


def test_without_a_compiler_training_goes_on(monkeypatch, capsys):
    """It says so, and why."""
    monkeypatch.setattr(torch, "compile", no_compiler)
    args = SimpleNamespace(compile="auto", recompute="off", size="laptop",
                           device=torch.device("cpu"))
    m = small_tokenizer("ours")
    st.prepare(m, args)
    m(torch.rand(2, 3, 32, 32, 3))[0].backward()
    assert args.compile == "off"
    assert "No working C++ compiler found" in capsys.readouterr().err


@pytest.mark.parametrize("main", [lam_stage.main, play.main])
def test_who_asks_for_a_compiler_is_told_why_not(main, platformer, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", no_compiler)
    refuses("leave out --compile on", main, "--device", "cpu", "--compile", "on", "--run",
            tmp_path / "run", cwd=platformer)


# ------------------------------------------------------------------------------- checkpoints


WHOLE = dict(stage="tokenizer", config=dict(recipe="ours", size=3), origin=dict(data="films"),
             knobs=dict(steps=3, recipe="ours", size="test"), step=3, seconds=1.0, curve=[],
             model=dict(w=torch.zeros(9)), optimizer=None, fingerprint="")


@pytest.mark.parametrize("content, words", [
    (None, "tokenizer.pt does not exist"),
    (b"PK\x03\x04 half a file", "damaged"),
    (dict(stage="lam"), "lam.py, but one of tokenizer.py"),
    (dict(stage="tokenizer", config={}, model={}), "damaged .*KeyError"),
    (WHOLE | dict(step="six"), "step is 'six'"),
    (WHOLE | dict(step=-1), "step -1 of 3"),
    (WHOLE, "does not fit"),
])
def test_a_checkpoint_that_is_none(tmp_path, platformer, content, words):
    path = tmp_path / "tokenizer.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        torch.save(content, path)
    refuses(words, dyn.main, "--device", "cpu", "--size", "test", "--run", tmp_path,
            cwd=platformer)


on_a_full_disk = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")


def into_the_full(f):
    with open("/dev/full", "wb", buffering=0) as full:
        full.write(b"x")


@on_a_full_disk
def test_a_full_disk_leaves_no_half_files(tmp_path):
    with pytest.raises(SystemExit, match="cannot write"):
        st.write_atomically(tmp_path / "x.bin", into_the_full)
    assert not list(tmp_path.iterdir())


@on_a_full_disk
def test_of_two_files_that_belong_together_both_are_written_or_none(tmp_path):
    def after(f):
        f.write(b"after")

    (tmp_path / "lam.pt").write_bytes(b"before")
    with pytest.raises(SystemExit, match="cannot write"):
        st.write_atomically(tmp_path / "lam.pt", after, (tmp_path / "dynamics.pt", into_the_full))
    assert (tmp_path / "lam.pt").read_bytes() == b"before"
    assert len(list(tmp_path.iterdir())) == 1


def test_weights_that_are_not_numbers_never_replace_a_checkpoint(few, tmp_path):
    class Spoiled(st.Run):
        save_every = 4

        def log(self, step, *args, **kwargs):
            if step == 6:
                with torch.no_grad():
                    self.model.embed.weight[0, 0] = float("nan")

    with pytest.raises(SystemExit, match="no longer finite"):
        tok.main(few, runner=Spoiled)
    assert st.read_checkpoint(tmp_path / "run/tokenizer.pt", "tokenizer")["step"] == 4


def test_a_model_is_replaced_only_on_request(few, tmp_path):
    """A training that was started again by accident says so, and touches nothing."""
    interrupted(tok, few)
    before = (tmp_path / "run/tokenizer.pt").read_bytes()
    refuses("already exists; .*--resume.*--overwrite", tok.main, *few)
    assert (tmp_path / "run/tokenizer.pt").read_bytes() == before
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["tokenizer.pt"]


LOCKED = """
import sys
from pathlib import Path
from st_block import lock
lock(Path(sys.argv[1]))
print("locked", flush=True)
sys.stdin.read()
"""


def test_a_second_writer_is_told_so(few, tmp_path):
    """Another process holds the folder. Once it is dead, however it died, the folder is free."""
    (tmp_path / "run").mkdir()
    other = subprocess.Popen([sys.executable, "-c", LOCKED, tmp_path / "run"], cwd=HERE,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"locked\n"
    refuses("another process is writing to", tok.main, *few)
    other.kill()
    other.communicate()
    tok.main(few)


def test_a_file_of_the_users_called_like_one_of_ours_stays(few, tmp_path):
    (tmp_path / "run").mkdir()
    for name in ("writable", "tokenizer.pt.part"):
        (tmp_path / "run" / name).write_text("mine")
    tok.main(few)
    assert (tmp_path / "run/writable").read_text() == "mine"
    assert (tmp_path / "run/tokenizer.pt.part").read_text() == "mine"


def test_ctrl_c_while_a_file_is_written_leaves_no_half_file(tmp_path):
    def write(f):
        f.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        st.write_atomically(tmp_path / "x.bin", write)
    assert not list(tmp_path.iterdir())


def test_a_pair_that_was_half_renamed_is_completed(few, tmp_path, monkeypatch):
    """The process was killed after the new lam.pt was in its place, before dynamics.pt was."""
    class Killed(st.Run):
        save_every = 8

    def replace(a, b):
        if Path(b).name == "dynamics.pt":
            raise RuntimeError("killed")
        os.rename(a, b)

    def steps():
        return [st.read_checkpoint(tmp_path / f"run/{name}.pt", name)["step"]
                for name in ("lam", "dynamics")]

    tok.main(few)
    interrupted(dyn, [*few, "--cotrain"])
    with monkeypatch.context() as patch:
        # a process that is killed tidies up nothing
        patch.setattr(os, "replace", replace)
        patch.setattr(Path, "unlink", lambda path: None)
        with pytest.raises(SystemExit):
            dyn.main([*few, "--resume"], runner=Killed)
    assert steps() == [8, 6]
    dyn.main([*few, "--resume"])
    assert steps() == [12, 12]
    assert not list((tmp_path / "run").glob("*.part"))


def test_data_replaced_during_a_training(few, tmp_path):
    """The weights are saved. They are not scored on data that they were not trained on."""
    class Replaced(st.Run):
        def log(self, step, *args, **kwargs):
            super().log(step, *args, **kwargs)
            if step == 6:
                data.build_platformer(tmp_path / "small", 2, 40, 1, True)

    with pytest.raises(SystemExit, match="was changed during the training"):
        tok.main(few, runner=Replaced)
    assert st.read_checkpoint(tmp_path / "run/tokenizer.pt", "tokenizer")["step"] == 12


def test_an_optimizer_of_another_shape(few, tmp_path):
    interrupted(tok, few)
    path = tmp_path / "run/tokenizer.pt"
    ckpt = torch.load(path, weights_only=True)
    ckpt["optimizer"]["state"][0]["exp_avg"] = torch.zeros(1)
    torch.save(ckpt, path)
    refuses("cannot be resumed here", tok.main, *few, "--resume")


def test_a_loss_that_is_not_a_number_stops_the_training(few, tmp_path):
    class Spoiled(st.Run):
        def log(self, step, loss, **watch):
            super().log(step, loss * float("nan"), **watch)

    with pytest.raises(SystemExit, match="the loss is nan.*lower --lr"):
        tok.main(few, runner=Spoiled)


def test_what_an_earlier_training_left_is_kept_once(few, tmp_path):
    tok.main(few)
    earlier = (tmp_path / "run/tokenizer.pt").read_bytes()
    tok.main([*few, "--seed", "1", "--overwrite"])
    assert (tmp_path / "run/tokenizer.old.pt").read_bytes() == earlier


def test_a_model_of_the_lab_is_no_model_of_the_core(few, tmp_path):
    """Its checkpoint names its class, and is not taken for one of a recipe."""
    class Flawed(tok.OurTokenizer):
        pass

    def load(argv):
        st.load_model(argv[0], tok.build, "tokenizer")

    tok.main(few, model_class=Flawed)
    path = tmp_path / "run/tokenizer.pt"
    assert st.read_checkpoint(path, "tokenizer")["config"]["recipe"] == "Flawed"
    refuses("Flawed", load, path)


# ------------------------------------------------------------------------------- resume


def test_an_interrupted_stage_says_how_to_go_on(few, capsys):
    interrupted(tok, few)
    assert "saved at step 6; go on with the same command and --resume" in capsys.readouterr().err


@pytest.mark.parametrize("flags, words", [
    (["--lr", "1"], "--lr 1.0 was asked for, but .* was begun with"),
    (["--recipe", "paper"], "--recipe paper was asked for"),
    (["--steps", "5"], "beyond --steps 5"),
])
def test_a_resume_that_contradicts_the_run(few, flags, words):
    interrupted(tok, few)
    refuses(words, tok.main, *few, "--resume", *flags)


def test_a_resume_on_other_data(few, tmp_path):
    interrupted(tok, few)
    data.build_platformer(tmp_path / "other", 2, 40, 1, False)
    refuses("begun on another data", tok.main, *few, "--resume", "--data", tmp_path / "other")


def test_a_stage_on_one_that_is_not_finished(few):
    interrupted(tok, few)
    refuses("at step 6 of 12; finish it first", dyn.main, *few)


def test_an_interrupted_pair_goes_on_together(few, tmp_path):
    """Dynamics and LAM trained together, Ctrl-C, --resume: as if nobody had interrupted them."""
    def prints():
        return [st.read_checkpoint(tmp_path / f"run/{name}.pt", name)["fingerprint"]
                for name in ("lam", "dynamics")]

    tok.main(few)
    dyn.main([*few, "--cotrain"])
    whole = prints()
    interrupted(dyn, [*few, "--cotrain", "--overwrite"])
    assert prints()[0] != whole[0] and prints()[1] != whole[1]
    dyn.main([*few, "--resume"])
    assert prints() == whole


@pytest.mark.slow
def test_ctrl_c_in_a_real_process(platformer, tmp_path):
    """The signal, the sentence, the exit code, the checkpoint, and the way on."""
    command = [sys.executable, HERE / "tokenizer.py", "--device", "cpu", "--size", "test",
               "--run", tmp_path, "--steps", "100000", "--batch", "2"]
    process = subprocess.Popen(command, cwd=platformer, env=NO_GPU, stderr=subprocess.PIPE,
                               text=True)
    # the bar appears with the first steps
    while process.poll() is None and "tokenizer:" not in process.stderr.read(80):
        pass
    time.sleep(5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "--resume" in errors and "Traceback" not in errors
    step = st.read_checkpoint(tmp_path / "tokenizer.pt", "tokenizer")["step"]
    result = run(*command[1:7], tmp_path, "--resume", "--steps", step + 2, cwd=platformer)
    assert result.returncode == 0, result.stderr


# ------------------------------------------------------------------------------- encoded once


class Encoded:
    """A data set of six episodes of 80 frames, and small models to encode it by.

    A token is the mean colour of its frame, an action how much the frame changes. They are counted.
    """

    def __init__(self, root, run):
        self.clips = data.Clips(root, "valid", 4)
        self.args = SimpleNamespace(device=torch.device("cpu"), compile="off", run=run, rank=0)
        self.tokenizer = small_tokenizer("ours")
        self.lam = small_lam("ours")
        self.tokenizer.encode = self.mean_colour
        self.lam.encode = self.change
        self.tokens_made = 0
        self.actions_made = 0

    def mean_colour(self, x):
        self.tokens_made += 1
        return (23 * x.mean((2, 3, 4))).round()[..., None].expand(-1, -1, self.tokenizer.tokens)

    def change(self, x):
        self.actions_made += 1
        return (255 * (x[:, 1:] - x[:, :-1]).abs().mean((2, 3, 4))).round().clamp(max=7)

    def encode(self):
        return dyn.encode(self.clips, self.tokenizer, self.lam, self.args)


@pytest.fixture
def encoded(platformer, tmp_path):
    return Encoded(platformer / "data/platformer", tmp_path)


def test_data_encoded_once_are_what_each_clip_would_be_encoded_as(encoded):
    """Each frame has its own token, and each transition its own action. None leads into the next
    episode."""
    z, a = encoded.encode()
    whole = torch.from_numpy(np.array(encoded.clips.frames))[None] / 255
    assert torch.equal(z.float(), encoded.mean_colour(whole)[0])
    expected = encoded.change(whole)[0]
    expected[79::80] = -1
    assert torch.equal(a[:-1].float(), expected)
    assert expected.max() > 5


def test_a_frame_has_the_token_of_the_clip_in_which_it_has_most_past(encoded):
    """Two neighbouring clips share one. (Here a token is the place of its frame in the clip.)"""
    def place(x):
        return torch.arange(4)[:, None].expand(len(x), 4, encoded.tokenizer.tokens)

    encoded.tokenizer.encode = place
    z, _ = encoded.encode()
    starts = encoded.clips.cover()
    most = [max(f - s for s in starts if s <= f < s + 4) for f in range(len(z))]
    assert z[:, 0].tolist() == most


def test_what_is_encoded_is_kept(encoded):
    first = encoded.encode()
    made = encoded.tokens_made, encoded.actions_made
    second = encoded.encode()
    assert (encoded.tokens_made, encoded.actions_made) == made
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_another_lam_changes_actions_alone(encoded):
    encoded.encode()
    made = encoded.tokens_made, encoded.actions_made
    encoded.lam.vq.first.codebook += 1
    encoded.encode()
    assert encoded.tokens_made == made[0] and encoded.actions_made > made[1]


@pytest.mark.parametrize("what", ["another tokenizer", "longer clips"])
def test_tokens_are_made_anew_for(encoded, what):
    encoded.encode()
    made = encoded.tokens_made
    if what == "longer clips":
        encoded.clips = data.Clips(encoded.clips.path.parent, "valid", 5)
    else:
        encoded.tokenizer.vq.codebook += 1
    encoded.encode()
    assert encoded.tokens_made > made


@pytest.mark.parametrize("tokens", [torch.zeros(5, 16, dtype=torch.int), "none",
                                    torch.full((480, 16), 24, dtype=torch.int)])
def test_kept_tokens_that_cannot_be_are_made_anew(encoded, tokens, tmp_path):
    """Too few, no tensor, or a token that the vocabulary does not have."""
    first, _ = encoded.encode()
    kept = torch.load(tmp_path / "tokens.pt", weights_only=True)
    torch.save(kept | dict(tokens=tokens), tmp_path / "tokens.pt")
    second, _ = encoded.encode()
    assert torch.equal(first, second)


def test_kept_tokens_that_are_damaged(encoded, tmp_path):
    def encode(argv):
        encoded.encode()

    (tmp_path / "tokens.pt").write_bytes(b"PK\x03\x04 half a file")
    refuses("delete it", encode)


# ------------------------------------------------------------------------------- a trained world


@pytest.fixture
def copied(world, tmp_path):
    """What play.py needs of the miniature world, in a folder where it may be spoiled."""
    for file in ("tokenizer.pt", "dynamics.pt", "lam.json"):
        shutil.copy(world / "runs/platformer" / file, tmp_path)
    return tmp_path


def load(argv):
    play.load(Path(argv[0]), "cpu")


def test_a_world_on_another_tokenizer_than_its_own(copied):
    ckpt = torch.load(copied / "tokenizer.pt", weights_only=True)
    torch.save(ckpt | dict(fingerprint="other"), copied / "tokenizer.pt")
    refuses("another tokenizer", load, copied)


def test_a_world_on_another_lam_than_its_own(copied):
    scored = json.loads((copied / "lam.json").read_text())
    (copied / "lam.json").write_text(json.dumps(scored | dict(fingerprint="other")))
    refuses("another lam", load, copied)


def test_scores_that_are_damaged(copied):
    (copied / "lam.json").write_text("{half")
    refuses("damaged", load, copied)


def test_a_world_without_the_scores_of_its_lam(copied):
    (copied / "lam.json").unlink()
    refuses("lam.json does not exist", load, copied)


def test_a_world_that_is_not_finished_says_so(copied, capsys):
    """The weights are saved before the prior has learned."""
    play.load(copied, "cpu")
    assert "not finished" not in capsys.readouterr().err
    ckpt = torch.load(copied / "dynamics.pt", weights_only=True)
    ckpt["model"]["prior.head.weight"].zero_()
    torch.save(ckpt, copied / "dynamics.pt")
    play.load(copied, "cpu")
    assert "not finished (step 300 of 300, and no prior)" in capsys.readouterr().err


def test_a_world_of_other_videos(world, tmp_path):
    """A world must start from frames of the data that it was trained on."""
    data.build_platformer(tmp_path / "other", 1, 40, 5, False)
    _, _, origin, _, _ = play.load(world / "runs/platformer", "cpu")
    game = SimpleNamespace(built_in=False, origin=origin)

    def start(argv):
        next(play.starts(game, 0, data=argv[0], run="runs/platformer"))

    refuses("was trained on platformer, seed 0", start, tmp_path / "other")


# ------------------------------------------------------------------------------- two processes


def one_of_two(rank, folder):
    """A process of two. It has half of a batch, and hears of a Ctrl-C or not."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank,
                                         world_size=2)
    args = SimpleNamespace(world=2, device=torch.device("cpu"))
    m = small_tokenizer("ours")
    net = st.parallel(m, args)
    torch.manual_seed(0)
    x = torch.rand(4, 3, 32, 32, 3)[2 * rank:2 * rank + 2]
    # in eval the codebook stays
    net(x)[1]["error"].backward()
    gradients = [p.grad.clone() for p in m.parameters()]
    # now it learns
    net.train()
    used = []

    def keep(module, inputs):
        used.append(m.vq.codebook.clone())

    m.register_forward_pre_hook(keep)
    for _ in range(2):
        net(x)[0].backward()
    # Ctrl-C, heard by the second alone
    run = SimpleNamespace(args=args, stopped=rank == 1)
    stops = [step for step in range(42) if st.Run.must_stop(run, step)]
    torch.save(dict(gradients=gradients, used=used, learned=m.vq.codebook, stops=stops),
               f"{folder}/{rank}.pt")
    # neither leaves while the other still talks; and at once, for if gloo's thread frees a tensor
    # while Python shuts down, the process aborts
    torch.distributed.barrier()
    os._exit(0)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What the two processes saw."""
    folder = tmp_path_factory.mktemp("two")
    torch.multiprocessing.spawn(one_of_two, (folder,), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_two_processes_compute_the_gradients_of_one(two):
    """Each has half of the clips. The error is in units of the variance of all of them."""
    first, second = two
    m = small_tokenizer("ours")
    torch.manual_seed(0)
    parts = torch.rand(4, 3, 32, 32, 3).split(2)
    loss = sum(m(part)[1]["error"] for part in parts) / 2
    loss.backward()
    for p, g, h in zip(m.parameters(), first["gradients"], second["gradients"]):
        assert torch.allclose(p.grad, g, atol=1e-6)
        assert torch.equal(g, h)


def test_two_processes_share_the_codebook_of_the_first(two):
    first, second = two
    assert not torch.equal(first["used"][0], first["used"][1]), "it does not learn"
    assert torch.equal(first["used"][1], second["used"][1])
    assert not torch.equal(first["learned"], second["learned"]), "each learns another"


def test_two_processes_stop_after_the_same_step(two):
    first, second = two
    assert first["stops"] == second["stops"] == [0, 20, 40]


def test_a_batch_that_cannot_be_shared(platformer, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    refuses("cannot be shared by 2", tok.main, "--device", "cpu", "--size", "test", "--batch", "3",
            cwd=platformer)


# ------------------------------------------------------------------------------- the house


def imports_of(path):
    """The packages that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("name", CORE)
def test_the_core_never_imports_the_lab(name):
    assert "lab" not in imports_of(HERE / f"{name}.py")


def test_no_line_is_longer_than_100_columns():
    files = [HERE / f"{name}.py" for name in (*CORE, "test_genie")]
    files += sorted((HERE / "lab").glob("*.py"))
    long = []
    for path in files:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if len(line) > 100:
                long.append(f"{path.name}:{number}")
    assert not long


def test_a_stage_has_at_most_eight_flags_of_its_own(capsys):
    """Beyond those that all three have."""
    flags = {}
    for stage in STAGES:
        with pytest.raises(SystemExit):
            stage.main(["--help"])
        text = capsys.readouterr().out
        listed = text[text.index("--help"):].splitlines()
        flags[stage.__name__] = {line.split()[0] for line in listed if line.startswith("  --")}
    common = set.intersection(*flags.values())
    assert "--steps" in common
    for stage, known in flags.items():
        assert len(known - common) <= 8, f"{stage}: {sorted(known - common)}"


# ------------------------------------------------------------------------------- own videos


def draw_sprite_video(path, frames):
    """A video of a disc that goes left, right, up and down, or rests, over a still ground."""
    import imageio.v2 as imageio
    rng = np.random.default_rng(0)
    ground = np.kron(rng.integers(60, 120, (16, 16, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    rows, columns = np.mgrid[:128, :128]
    place = np.array([64, 64])
    step = np.zeros(2, int)
    with imageio.get_writer(path, fps=10, macro_block_size=1, quality=9) as video:
        for _ in range(frames):
            # every few frames another direction, and at the edges the way back
            if rng.random() < 0.3:
                step = 6 * np.array([(0, 0), (0, 1), (0, -1), (1, 0), (-1, 0)])[rng.integers(5)]
            if ((place + step < 16) | (place + step > 112)).any():
                step = -step
            place = place + step
            frame = ground.copy()
            frame[np.hypot(rows - place[0], columns - place[1]) < 11] = (240, 60, 40)
            video.append_data(frame)


def place_of_disc(x):
    """The middle of the disc in frames x (B, H, W, C): columns and rows (B, 2), in pixels."""
    red = ((x[..., 0] > 0.6) & (x[..., 1] < 0.45)).float()          # (B, H, W)
    places = torch.stack(torch.meshgrid(torch.arange(x.size(2)), torch.arange(x.size(1)),
                                        indexing="xy"), -1).float()  # (H, W, 2)
    return (red[..., None] * places).sum((1, 2)) / red.sum((1, 2))[:, None].clamp(min=1)


@pytest.mark.slow
def test_the_keys_of_own_videos_are_guessed(tmp_path):
    """Of four directions, at least three get a code under which the disc goes that way."""
    draw_sprite_video(tmp_path / "disc.mp4", 6000)
    with inside(tmp_path):
        data.main(["--videos", "disc.mp4", "--name", "disc"])
        lam_stage.main(["--data", "data/disc", "--size", "test", "--device", "cpu"])
        scores = json.loads((tmp_path / "runs/disc/lam.json").read_text())
        m, _ = st.load_model(tmp_path / "runs/disc/lam.pt", lam_stage.build, "lam")
        clips = data.Clips("data/disc", "train", 2)
    x = clips.at(clips.spread(1000))
    a = lam_stage.actions_of(m, x)[:, 0]
    moves = place_of_disc(x[:, 1]) - place_of_disc(x[:, 0])         # (1000, 2)
    right = 0
    for i, way in ((1, "←"), (2, "→"), (3, "↑"), (6, "↓")):
        uses = a == scores["guess"][i]
        ways = lam_stage.ways_of(moves[uses])
        usual = np.bincount(ways, minlength=9).argmax()
        right += lam_stage.WAYS[usual] == way
    assert right >= 3, scores
