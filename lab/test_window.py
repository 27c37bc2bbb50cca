"""Play: the window and its keys, the script, prompts, and the code that is played for a rare one.

The window is drawn on matplotlib's off-screen canvas. The keys are pressed by calling what
matplotlib would call.
"""
import importlib.util
import sys
import time
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn as nn

import data
import dynamics as dyn
import play
from lab.conftest import HERE, NO_GPU, inside, refuses, run, small_dynamics, small_tokenizer


@pytest.fixture
def window(world, tmp_path):
    """A window on the miniature world. Recordings go to `tmp_path`."""
    with matplotlib.rc_context():
        matplotlib.use("Agg", force=True)
        game = play.Game(play.load(world / "runs/platformer", "cpu"), "cpu", steps=1)
        window = play.Window(game, play.starts(game, seed=0), fps=10, folder=tmp_path)
        window.figure.canvas.draw()
        yield window
        window.plt.close(window.figure)


def press(window, *keys):
    for key in keys:
        window.on_press(SimpleNamespace(key=key))


def release(window, *keys):
    for key in keys:
        window.on_release(SimpleNamespace(key=key))


def beats(window, n):
    for _ in range(n):
        window.tick()


def paint(window, x, y, button=1, name="button_press_event"):
    """Touch the picture with the mouse at a pixel of the frame."""
    window.on_mouse(SimpleNamespace(name=name, inaxes=window.view, button=button, xdata=x, ydata=y))


# ------------------------------------------------------------------------------- keys


def test_a_digit_that_is_held_plays_its_code_at_every_beat(window):
    first = window.game.frame
    press(window, "3")
    beats(window, 3)
    assert window.game.count == 3
    assert not np.array_equal(window.game.frame, first)
    assert "code 3" in window.text.get_text()


def test_of_several_digits_the_last_one_counts(window):
    press(window, "3", "5")
    code, _ = window.choice()
    assert code == 4


def test_arrow_keys_press_the_codes_that_lam_py_found(window):
    """And two of them are one combination."""
    game = window.game
    assert window.choice() == (game.keys[0], 0)
    press(window, "left")
    assert window.choice() == (game.keys[1], 1)
    press(window, "up", "right")
    assert window.choice() == (game.keys[5], 5)


def test_the_true_game_is_played_along(window):
    twin = data.Platformer(0)
    # the same level, in the same state
    twin.__dict__.update(vars(window.game.true))
    twin.restore(window.game.true.save())
    press(window, "right")
    beats(window, 4)
    for _ in range(4):
        twin.step(2)
    assert np.array_equal(window.game.true.frame(), twin.frame())


def test_a_key_that_was_down_between_two_beats_has_the_next_one(window):
    game = window.game
    press(window, "left")
    release(window, "left")
    time.sleep(0.1)
    assert window.choice() == (game.keys[1], 1)
    beats(window, 1)
    assert window.shown == (game.keys[1], 1)
    assert window.choice() == (game.keys[0], 0), "then it is up"


def test_a_key_comes_up_whatever_else_is_down(window):
    """Matplotlib calls it shift+left then."""
    press(window, "left")
    beats(window, 1)
    release(window, "shift+left")
    time.sleep(0.1)
    assert window.choice() == (window.game.keys[0], 0)


def test_arrow_keys_can_be_given_codes_by_hand(window):
    window.game.assign(4, 2, 5, 1)
    press(window, "up", "right")
    assert window.choice() == (0, 5), "up wins"
    press(window, "down")
    assert window.choice() == (0, 5), "without a code, down does nothing"
    window.game.assign(4, 2, 5, 1, 7)
    assert window.choice() == (6, 0)


def test_keys_of_own_videos_are_guessed_until_somebody_chooses(window):
    game = window.game
    game.guessed = [3, 1, 4, 0, 0, 0, 6]
    game.sure = [0.9, 0.8, 0.7, 0.6, 0.6, 0.6, 0.5]
    assert game.guess() == "", "the true buttons are known"
    game.keys = None
    sentence = game.guess()
    assert "left plays 2 (80% sure)" in sentence and "down plays 7 (50% sure)" in sentence
    press(window, "left")
    assert window.choice() == (1, 1)
    press(window, "s")
    assert window.choice() == (6, 0)
    game.assign(4, 2, 5, 1)
    assert game.guess() == ""


def test_codes_of_like_meaning_have_different_labels(window):
    game = window.game
    game.keys = None
    game.meaning = [0, 2, 2, 1, 1, 3, 4, 5]
    game.moves = [[0, 0], [4, 0], [3, 4], [-4, 0], [-3, 4], [0, -5], [-3, -4], [4, -4]]
    assert game.label(1) == "2 right →"
    assert game.label(2) == "3 right ↘"
    assert game.label(0) == "1 none ·"


@pytest.mark.parametrize("codes", [(4, 2, 10, 1), (0, 2, 3, 1), (4, 2, 5)])
def test_codes_that_this_world_has_not(window, codes):
    def assign(argv):
        window.game.assign(*codes)

    refuses("four codes or five.*has 1 to 9", assign)


# ------------------------------------------------------------------------------- commands


def test_wasd_and_space_are_arrow_keys(window):
    for key, button in (("a", 1), ("D", 2), ("w", 3), (" ", 3), ("up", 3)):
        press(window, key)
        assert window.choice() == (window.game.keys[button], button), key
        window.held.clear()


def test_p_pauses_with_a_sign(window):
    press(window, "3", "p")
    beats(window, 3)
    assert window.game.count == 0
    assert "PAUSED" in window.sign.get_text()
    press(window, "p")
    beats(window, 3)
    assert window.game.count == 3
    assert not window.sign.get_text()


def test_a_point_plays_one_frame_also_with_a_key_held(window):
    game = window.game
    press(window, "right", ".")
    beats(window, 3)
    assert game.count == 1
    assert window.shown == (game.keys[2], 2)
    press(window, ".")
    assert game.count == 2
    assert "PAUSED" in window.sign.get_text()


def test_u_takes_back_a_step_and_waits_for_a_key_that_plays(window):
    press(window, "3")
    beats(window, 3)
    third = window.game.frame
    beats(window, 1)
    press(window, "u")
    assert window.game.count == 3
    assert np.array_equal(window.game.frame, third)
    beats(window, 1)
    assert window.game.count == 3
    assert "frame    3" in window.text.get_text()
    press(window, "left")
    beats(window, 1)
    assert window.game.count == 4


def test_h_shows_all_keys_and_any_key_goes_on(window):
    press(window, "h")
    beats(window, 2)
    assert window.game.count == 0
    for key in ("WASD", "space", "pause", "quit"):
        assert key in window.sign.get_text()
    press(window, "left")
    beats(window, 2)
    assert window.game.count == 2


@pytest.mark.parametrize("key", ["q", "escape"])
def test_q_and_escape_quit(window, key):
    press(window, key)
    assert not window.plt.fignum_exists(window.figure.number)


def test_the_code_of_a_key_that_is_down_lights_up(window):
    press(window, "right")
    beats(window, 1)
    lit = [code for code, light in enumerate(window.lights) if light.get_visible()]
    assert lit == sorted({window.game.keys[2], window.game.played})


def test_a_code_that_is_rewritten_says_so_and_v_plays_it(window, monkeypatch):
    game = window.game

    def other(code):
        return code if game.as_pressed else 5

    monkeypatch.setattr(game, "meant", other)
    press(window, "3")
    beats(window, 1)
    assert "played as 6" in window.text.get_text()
    lit = [code for code, light in enumerate(window.lights) if light.get_visible()]
    assert lit == [2, 5]
    press(window, "v")
    beats(window, 1)
    assert game.played == 2
    assert "played as 6" not in window.text.get_text()


@pytest.mark.parametrize("size", [(9.6, 7), (3, 3), (16, 4), (4, 9)])
def test_no_line_is_cut_at_any_size(window, size):
    press(window, "g", "3", "h")
    window.figure.set_size_inches(size)
    window.fit_letters()
    window.figure.canvas.draw()
    for text, *_ in window.texts:
        box = text.get_window_extent()
        assert box.x0 >= 0 and box.y0 >= 0, text.get_text()
        assert box.x1 <= window.figure.bbox.x1 and box.y1 <= window.figure.bbox.y1, text.get_text()


def test_r_goes_back_to_the_starting_frame(window):
    first = window.game.frame
    press(window, "3")
    beats(window, 3)
    press(window, "r")
    assert window.game.count == 0
    assert np.array_equal(window.game.frame, first)


def test_n_begins_elsewhere(window):
    first = window.game.first
    press(window, "n")
    assert window.game.count == 0
    assert not torch.equal(window.game.first, first)


def strip_of(window):
    return [np.array(image.get_array()) for image in window.strip]


def test_b_shows_what_every_code_would_do_and_does_nothing(window):
    start = strip_of(window)
    assert not all(np.array_equal(image, start[0]) for image in start), "it shows that at once"
    press(window, "3")
    beats(window, 2)
    now = window.game.frame
    press(window, "b")
    assert window.game.count == 2
    assert np.array_equal(window.game.frame, now)
    assert not np.array_equal(strip_of(window), start)


def test_g_records_both_games(window, tmp_path):
    import imageio.v2 as imageio
    press(window, "g", "3")
    beats(window, 3)
    # a drawing has no true game, and goes on in the same recording
    press(window, "e", "e")
    beats(window, 1)
    press(window, "g")
    film = imageio.mimread(tmp_path / "recording-1.gif")
    assert 2 <= len(film) <= 5
    assert film[0].shape[1] == 4 * (64 + 4 + 64)
    press(window, "g", "g")
    assert (tmp_path / "recording-2.gif").exists(), "no recording replaces another"


def test_a_recording_outlives_a_full_disk(window, monkeypatch, capsys):
    """Somebody may make room, and press g again."""
    def full(*args, **kwargs):
        raise SystemExit("error: cannot write recording-1.gif")

    press(window, "g")
    monkeypatch.setattr(play, "write_gif", full)
    press(window, "g")
    assert "cannot write" in capsys.readouterr().err
    assert window.film is not None


def test_e_draws_and_then_begins_from_the_drawing(window):
    game = window.game
    first = game.frame
    press(window, "3", "e")
    paint(window, 20.2, 9.6)
    beats(window, 1)
    assert game.count == 0 and np.array_equal(game.frame, first), "a sketch waits until it is done"
    drawn = window.sketch.copy()
    assert (drawn[10, 20] == 1).all() and np.array_equal(drawn[40:], first[40:])
    press(window, "e")
    assert np.array_equal(game.first.numpy(), drawn)
    assert game.true is None, "no true game looks like that"
    assert "this is redrawn at" in window.message


def test_a_stroke_has_no_gaps(window):
    press(window, "e")
    paint(window, 10, 20)
    paint(window, 40, 35, name="motion_notify_event")
    middle = [(window.sketch[row, 10 + 2 * (row - 20)] == 1).all() for row in range(20, 36)]
    assert all(middle)


def test_the_right_button_takes_up_a_colour(window):
    press(window, "e")
    colour = window.sketch[50, 30].copy()
    paint(window, 30, 50, button=3)
    paint(window, 20, 10)
    assert (window.sketch[9:12, 19:22] == colour).all()


@pytest.mark.parametrize("key", ["r", "n", "u"])
def test_another_frame_ends_the_drawing(window, key):
    press(window, "e", key)
    assert window.sketch is None


def test_the_window_shows_the_frame_pixel_by_pixel(window):
    """The right way up."""
    press(window, "3")
    beats(window, 2)
    screen = np.asarray(window.figure.canvas.buffer_rgba())
    left, bottom, right, top = window.view.bbox.extents

    def middles(a, b):
        return (a + (np.arange(64) + 0.5) * (b - a) / 64).astype(int)

    rows = middles(len(screen) - top, len(screen) - bottom)
    seen = screen[rows[:, None], middles(left, right), :3]
    assert np.array_equal(seen, play.rgba(window.game.frame)[..., :3])


def test_a_window_in_a_browser_needs_tornado(monkeypatch):
    def nothing(name):
        return None

    def open_window(argv):
        play.can_open_window()

    with matplotlib.rc_context({"backend": "webagg"}):
        monkeypatch.setattr(importlib.util, "find_spec", nothing)
        refuses("pip install tornado", open_window)


# ------------------------------------------------------------------------------- the code played


class Expecting(nn.Module):
    """In the place of the prior: the chances of the next code, whatever comes."""

    def __init__(self, chances):
        super().__init__()
        self.logits = torch.tensor(chances).log()
        # below what chance is a code rare?
        self.floor = torch.full((9, 8), 0.03)
        # code 5 always comes with more, and code 3 with more than it ever has here
        self.floor[:, 5] = 0.3
        self.floor[:, 3] = 1
        # after code 2, code 4 comes with less
        self.floor[2, 4] = 0.0005

    def forward(self, z, last, e):
        return self.logits.view(1, 1, 8)


def played(code, before=None, as_pressed=False):
    """The code that is played when `code` is pressed. before: the one that was played last."""
    m = small_dynamics("ours")
    # the vectors of the codes lie on an arc. That of 4 is nearest to 3, and nearly as near to 5
    angle = 0.3 * torch.arange(8.0)
    angle[3] += 0.05
    m.codebook.zero_()
    m.codebook[:, :2] = 3 * torch.stack([angle.cos(), angle.sin()], 1)
    # "nothing happens" points nowhere
    m.codebook[0] = 1e-9
    m.prior = Expecting([0.2, 0.2, 0.2, 0.2, 0.001, 0.1, 0.098, 0.001])
    models = small_tokenizer("ours"), m, dict(data="my videos"), dict(still=before), "ours"
    game = play.Game(models, "cpu", as_pressed, steps=2)
    game.reset(torch.rand(32, 32, 3))
    game.press(code)
    return game.played


def test_of_a_frame_that_is_not_remembered_the_code_is(window):
    """The words on the screen and the strip say what was played."""
    game = window.game

    def rest(action):
        return game.world.last

    game.world.before = game.world.last
    game.world.step = rest
    game.as_pressed = True
    game.press(3)
    assert game.played == 3
    game.press(5)
    assert game.played == 5
    game.take_back()
    assert game.played == 3


def test_a_code_that_can_come_is_played_as_pressed():
    assert played(1) == 1


def test_a_code_that_cannot_come_is_played_as_a_likely_one_that_means_nearly_the_same():
    assert played(4) == 3
    assert played(7) == 6


def test_what_can_come_depends_on_the_code_played_last():
    assert played(4, before=1) == 3
    assert played(4, before=2) == 4


def test_each_code_has_a_measure_of_its_own():
    """Code 5 usually comes with more than it has now, and code 6, as rare as that, with less."""
    assert played(5) == 3
    assert played(6) == 6


def test_the_likeliest_code_is_never_replaced():
    """Code 3 is rarer than usual here, and no code is likelier."""
    assert played(3) == 3


def test_where_nobody_asks_codes_stay_as_pressed():
    assert played(4, as_pressed=True) == 4


# ------------------------------------------------------------------------------- prompts


def test_any_picture_can_be_a_prompt(tmp_path):
    import imageio.v2 as imageio
    colours = np.random.default_rng(0).integers(0, 255, (2, 40, 60, 3), dtype=np.uint8)
    imageio.imwrite(tmp_path / "colour.png", colours[0])
    imageio.imwrite(tmp_path / "grey.png", colours[0, ..., 0])
    see_through = np.concatenate([colours[0], colours[1, ..., :1]], 2)
    imageio.imwrite(tmp_path / "see_through.png", see_through)
    imageio.mimwrite(tmp_path / "film.gif", list(colours))
    for file in sorted(tmp_path.iterdir()):
        x = play.read_image(file, 64, 64)
        assert x.shape == (64, 64, 3), file
        assert 0 <= x.min() and x.max() <= 1 and 0.3 < x.mean() < 0.7, file


def test_a_prompt_that_is_no_picture(tmp_path):
    def read(argv):
        play.read_image(argv[0], 64, 64)

    (tmp_path / "no.png").write_text("a letter")
    refuses("cannot read the picture", read, tmp_path / "no.png")


def test_a_picture_has_no_true_game_beside_it(world, tmp_path):
    import imageio.v2 as imageio
    imageio.imwrite(tmp_path / "grey.png", np.full((64, 64, 3), 128, np.uint8))
    game = play.Game(play.load(world / "runs/platformer", "cpu"), "cpu", steps=1)
    frame, true = next(play.starts(game, 0, prompt=tmp_path / "grey.png"))
    assert true is None
    game.reset(frame, true)
    assert game.press(3).shape == (64, 64, 3)


@torch.no_grad()
def test_a_prompt_is_a_world_at_rest(world):
    """The frame is shown twice, with the code for standing still between."""
    game = play.Game(play.load(world / "runs/platformer", "cpu"), "cpu", as_pressed=True, steps=1,
                     temperature=0.0)
    assert game.still is not None, "the built-in game stands still often enough to have such a code"
    frame, _ = next(play.starts(game, seed=0))
    game.reset(frame)
    game.press(3)
    z = game.tokenizer.encode(frame.expand(1, 2, -1, -1, -1))
    a = torch.tensor([[game.still, 3]])
    plain = dyn.rollout_ours(game.dynamics, z, a, steps=1, temperature=0.0)
    expected = game.tokenizer.decode(plain)[0, -1]
    assert torch.allclose(torch.from_numpy(game.frame), expected, atol=1e-4)


@torch.no_grad()
def test_a_rest_is_not_remembered(world):
    """Of equal frames two are. Otherwise a rest would fill the memory, and no video shows that."""
    game = play.Game(play.load(world / "runs/platformer", "cpu"), "cpu", as_pressed=True, steps=1,
                     temperature=0.0)
    frame, _ = next(play.starts(game, seed=0))
    game.reset(frame)
    still = game.world.last.clone()
    before = game.world.cache.now
    # the model draws the same frame again and again
    step = game.world.step

    def rest(a):
        step(a)
        game.world.last = still
        return still

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(game.world, "step", rest)
        for _ in range(20):
            game.press(3)
    assert game.world.cache.now == before
    # the press after it leads where it would have led without a rest
    moved = game.press(3)
    game.reset(frame)
    assert np.array_equal(moved, game.press(3))
    assert game.world.cache.now == before + 1, "what changes is remembered"


def test_the_first_start_is_open_ground(world):
    game = play.Game(play.load(world / "runs/platformer", "cpu"), "cpu", steps=1)
    for seed in range(3):
        _, true = play.first_start(play.starts(game, seed))
        assert play.is_open(true)


def test_own_videos_start_from_held_out_frames(platformer):
    """Where the built-in game is not what was learned."""
    root = platformer / "data/platformer"
    name = data.Clips(root, "train", 1).name
    game = SimpleNamespace(built_in=False, origin=dict(data=name))
    frame, true = next(play.starts(game, 0, data=root, run="runs/mine"))
    held_out = data.Clips(root, "valid", 1).frames
    pixels = (frame * 255).round().byte().numpy()
    assert true is None
    assert (held_out == pixels).all((1, 2, 3)).any()


# ------------------------------------------------------------------------------- the script


def test_the_script_goes_on_past_the_window_and_shows_the_true_game(world, tmp_path):
    """It writes a film, and a grid of one frame under every code."""
    import imageio.v2 as imageio
    game = play.Game(play.load(world / "runs/platformer", "cpu"), "cpu", steps=1)
    play.play_script(game, play.starts(game, seed=0), tmp_path)
    film = imageio.mimread(tmp_path / "play.gif", memtest=False)
    # (the file has equal frames once, and shows them longer)
    assert 32 < len(film) <= len(play.SCRIPT)
    assert film[0].shape[1] > 1.5 * film[0].shape[0], "the true game is beside it"
    assert any(not np.array_equal(film[0], frame) for frame in film[1:])
    # 8 codes, 9 frames each
    height, width = imageio.imread(tmp_path / "buttons.png").shape[:2]
    assert height > 8 * 64 and width > 9 * 64


def test_the_world_that_ships_plays(tmp_path, capsys):
    """Nothing is trained here: play.py takes the small world in assets/."""
    with inside(tmp_path):
        play.main(["--device", "cpu", "--script", "--maskgit", "1"])
    assert "nothing trained in" in capsys.readouterr().err
    assert (tmp_path / "runs/platformer/play.gif").exists()


def test_the_world_that_ships_is_small():
    assert sum(path.stat().st_size for path in play.ASSETS.glob("*.pt")) < 16e6


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["", "module://of_a_notebook"])
def test_without_a_display_the_script_is_played(world, backend):
    """As a user sees it. MPLBACKEND may name one that is not there."""
    if not backend and sys.platform != "linux":
        pytest.skip("there is always a display")
    hidden = ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND")
    environment = {name: value for name, value in NO_GPU.items() if name not in hidden}
    if backend:
        environment["MPLBACKEND"] = backend
    film = world / "runs/platformer/play.gif"
    film.unlink(missing_ok=True)
    result = run(HERE / "play.py", cwd=world, env=environment)
    assert result.returncode == 0, result.stderr
    assert "no window can be opened" in result.stderr
    assert film.exists()
