"""What a training does besides its mathematics: learning rate, resuming, what it leaves, sizes."""
import signal
from types import SimpleNamespace

import pytest
import torch

import data
import dynamics as dyn
import lam as lam_stage
import play
import st_block as st
import tokenizer as tok
from lab.conftest import checkpoint, inside, scores


def test_learning_rate_warms_up_and_falls_to_a_tenth():
    args = SimpleNamespace(lr=2.0, warmup=10, steps=110)
    optimizer = torch.optim.SGD([torch.zeros(1)])
    rates = []
    for step in range(110):
        st.schedule(optimizer, step, args)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[:11] == pytest.approx([0.2 * t for t in range(1, 11)] + [2.0]), "warm-up"
    assert rates[60] == pytest.approx(1.1), "half way between 2 and 0.2"
    assert rates[-1] == pytest.approx(0.2, abs=1e-3)
    assert rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.parametrize("stage, recipe", [(tok, "paper"), (lam_stage, "paper"), (tok, "ours"),
                                           (lam_stage, "ours")])
def test_interrupted_and_resumed_is_bit_identical(stage, recipe, few, tmp_path, monkeypatch):
    """Ctrl-C, --resume, and weights and optimizer equal those of a run that nobody interrupted."""
    # what ours changes on the way: the error in step 4, before the interruption
    monkeypatch.setitem(lam_stage.ROOT_FROM, "test", 0.3)

    class Interrupted(st.Run):
        def log(self, step, *args, **kwargs):
            super().log(step, *args, **kwargs)
            if step == 5:
                signal.raise_signal(signal.SIGINT)

    whole = [*few, "--recipe", recipe, "--run", str(tmp_path / "whole")]
    parts = [*few, "--recipe", recipe, "--run", str(tmp_path / "parts")]
    stage.main(whole)
    with pytest.raises(SystemExit):
        stage.main(parts, runner=Interrupted)
    assert checkpoint(tmp_path / "parts", stage.__name__)["step"] == 6
    stage.main([*parts, "--resume"])
    first = checkpoint(tmp_path / "whole", stage.__name__)
    second = checkpoint(tmp_path / "parts", stage.__name__)
    assert first["fingerprint"] == second["fingerprint"]
    for a, b in zip(first["optimizer"]["state"].values(), second["optimizer"]["state"].values()):
        assert torch.equal(a["exp_avg_sq"], b["exp_avg_sq"]), "the optimizer began anew"


@pytest.mark.parametrize("stage", ["tokenizer", "lam", "dynamics"])
def test_every_stage_leaves_weights_scores_and_a_picture(world, stage):
    """The scores hold the curve of the loss, in training and on held-out levels. Both fell."""
    for kind in ("pt", "json", "png"):
        assert (world / f"runs/platformer/{stage}.{kind}").stat().st_size > 500
    found = scores(world, stage)
    assert {"steps", "seconds", "device", "seed", "parameters", "recipe"} <= found.keys()
    steps, training, held_out = zip(*found["curve"])
    assert steps[-1] == found["steps"] - 1
    assert training[-1] < training[0] and held_out[-1] < held_out[0]


def test_recipe_paper_runs_from_end_to_end(tmp_path):
    """A few steps of each stage. All is written, and it can be played, without a prior."""
    few = ["--device", "cpu", "--size", "test", "--recipe", "paper", "--steps", "4", "--batch", "2",
           "--scored", "8"]
    with inside(tmp_path):
        data.main(["--episodes", "2", "--frames", "40"])
        tok.main(few)
        lam_stage.main(few)
        dyn.main([*few, "--maskgit", "2"])
    folder = tmp_path / "runs/platformer"
    for stage in ("tokenizer", "lam", "dynamics"):
        for kind in ("pt", "json", "png"):
            assert (folder / f"{stage}.{kind}").stat().st_size > 500
    game = play.Game(play.load(folder, "cpu"), "cpu", steps=2)
    assert game.dynamics.prior is None
    game.reset(*next(play.starts(game, seed=0)))
    assert game.press(3).shape == (64, 64, 3)
    assert game.played == 3, "a code was replaced, and there is no prior to say by what"


@pytest.mark.parametrize("stage, expected", [
    (tok, dict(layers=8, dim=512, heads=8, vocabulary=1024, patch=4, latent_dim=32, batch=48,
               frames=16, steps=300_000, lr=3e-4, warmup=10_000)),
    (lam_stage, dict(layers=8, dim=512, heads=8, codes=6, latent_dim=32, batch=36, frames=16,
                     steps=200_000, lr=3e-5, warmup=5000)),
    (dyn, dict(layers=12, dim=512, heads=8, batch=36, frames=16, steps=200_000, lr=3e-5,
               warmup=5000, maskgit=25, temperature=1.0)),
])
def test_size_coinrun_recipe_paper_is_the_papers_case_study(stage, expected):
    """Appendix F, with the learning rates of appendix C."""
    flags = ["--device", "cpu", "--size", "coinrun", "--recipe", "paper"]
    args = st.settle(st.parser("", stage.KNOBS, stage.PAPER).parse_args(flags), stage.__name__)
    assert expected == {name: getattr(args, name) for name in expected}
