"""Speed, without a clock: what is compiled and how often, what fits into memory, what is counted.

Tests named test_gpu_... need a GPU, and are skipped where there is none.
"""
import functools
import json
import tempfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch._dynamo.utils as dynamo
import torch.nn.functional as F

import dynamics as dynamics_stage
import lam as lam_stage
import play
import tokenizer as tokenizer_stage
from data import Clips, Platformer, psnr
from lab import bench
from lab.conftest import small_dynamics, small_lam, small_tokenizer
from st_block import RECIPES, SIZES, STBlock, autocast, prepare

STAGES = (tokenizer_stage, lam_stage, dynamics_stage)

every_stage = pytest.mark.parametrize("stage", STAGES, ids=[stage.__name__ for stage in STAGES])
every_recipe = pytest.mark.parametrize("recipe", RECIPES)
# Both see the same graphs. The first one runs them as they are, and inductor, which is what users
# have, makes C++ of them, for a minute.
every_backend = pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def small(stage, recipe="ours"):
    """A small model of a stage, always with the same weights, for clips of 32x32 pixels."""
    if stage is tokenizer_stage:
        return small_tokenizer(recipe)
    if stage is lam_stage:
        return small_lam(recipe)
    return small_dynamics(recipe)


def lesson(stage, B):
    """B clips to train `small(stage)` on: the arguments of its forward pass."""
    if stage is dynamics_stage:
        return torch.randint(24, (B, 4, 16)), torch.randint(8, (B, 3))
    return (torch.rand(B, 4, 32, 32, 3),)


def loss_of(model, inputs):
    """The loss alone: two of the stages return more."""
    found = model(*inputs)
    return found[0] if isinstance(found, tuple) else found


def same(x):
    return x


def how(compile="off", recompute="off", device="cpu"):
    """The arguments that `prepare` and `autocast` look at."""
    return SimpleNamespace(compile=compile, recompute=recompute, size="gpu",
                           device=torch.device(device))


@pytest.fixture
def graphs(backend, monkeypatch):
    """A function that tells how many graphs have been compiled since the test began."""
    torch._dynamo.reset()
    dynamo.counters.clear()
    before = 0

    def compiled(afresh=False):
        nonlocal before
        found = dynamo.counters["stats"]["unique_graphs"]
        if afresh:
            before = found
        return found - before

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    yield compiled
    torch._dynamo.reset()


# ------------------------------------------------------------------------------- torch.compile


@every_backend
@pytest.mark.parametrize("recompute", ["off", "on"])
def test_blocks_compile_without_graph_breaks_or_recompiles(recompute, graphs):
    """fullgraph=True makes an error of a graph break. Steps after the first compile nothing."""
    model = small(tokenizer_stage).train()
    # the codebook stays
    model.vq.eval()
    prepare(model, how(compile="on", recompute=recompute))
    # `prepare` has tried the compiler
    graphs(afresh=True)
    seen = []
    for step in range(4):
        loss_of(model, lesson(tokenizer_stage, 2)).backward()
        seen.append(graphs())
    assert seen[0] > 0
    assert len(set(seen)) == 1, seen

    # what is compiled computes what it did
    eager = small(tokenizer_stage)
    eager.load_state_dict(model.state_dict())
    x, = lesson(tokenizer_stage, 2)
    fast, slow = model(x)[1]["error"], eager(x)[1]["error"]
    assert torch.allclose(fast, slow, rtol=1e-4)


@every_backend
def test_loss_of_the_dynamics_compiles_once_whatever_is_masked(graphs):
    """As many holes as there may be: one graph, and the loss of the same model uncompiled."""
    model = small(dynamics_stage)
    compiled = torch.compile(model.loss, fullgraph=True, dynamic=False)
    for share in (0.1, 0.5, 0.9):
        x = torch.randn(2, 4, 16, 16, requires_grad=True)
        z = torch.randint(24, (2, 4, 16))
        masked = torch.rand(z.shape) < share
        fast = compiled(x, z, masked)
        slow = model.loss(x, z, masked)
        assert torch.allclose(fast, slow, atol=1e-5)
        fast_gradient, = torch.autograd.grad(fast, x)
        slow_gradient, = torch.autograd.grad(slow, x)
        assert torch.allclose(fast_gradient, slow_gradient, atol=1e-6)
        # tokens that were given teach nothing
        assert not slow_gradient[~masked].any()
        assert graphs() == 1


@every_backend
@every_recipe
@torch.inference_mode()
def test_playing_compiles_once_however_long(recipe, graphs):
    """One graph of each model: the prompt meets every shape and stride there is.

    What the graphs compute is what the uncompiled models compute.
    """
    models = bench.untrained("test", recipe, "cpu")
    game = play.Game(models, "cpu", compile="on", steps=3, temperature=0.0)
    window = game.dynamics.transformer.window
    # a prompt of one frame, and one of two
    for game.still in (None, 0):
        game.reset(torch.rand(64, 64, 3))
        for _ in range(window + 5):
            game.press(3)
        game.every_button()
        game.take_back()
        game.press(1)
        game.restart()
        game.press(1)
        assert graphs() == 2, "one of the dynamics, one of the decoder"

    d, tokenizer, world = game.dynamics, game.tokenizer, game.world
    z = torch.randint(d.V, (1, 1, d.N))
    world.start_frame(d.vectors(torch.tensor([[3]])), torch.tensor([3]))
    fast = world.run_pass(z), tokenizer.decode(z, game.decoder_cache)
    assert graphs() == 2
    # without the compiled functions, the methods are there again
    del d.features, tokenizer.decode
    slow = world.run_pass(z), tokenizer.decode(z, game.decoder_cache)
    torch.testing.assert_close(fast, slow, atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------- memory


@every_stage
@every_recipe
def test_recomputed_blocks_give_the_same_gradients_with_less_memory(stage, recipe):
    """Memory is here what the tensors weigh that are kept for the backward pass."""
    inputs = lesson(stage, 2)

    def gradients(recompute):
        model = small(stage, recipe).train()
        prepare(model, how(recompute=recompute))
        kept = {}

        def keep(t):
            storage = t.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return t

        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(keep, same):
            loss = loss_of(model, inputs)
        loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad], sum(kept.values())

    usual, usual_memory = gradients("off")
    again, less_memory = gradients("on")
    assert all(torch.equal(a, b) for a, b in zip(usual, again))
    assert less_memory < 0.6 * usual_memory


def knobs(stage, size, recipe):
    """The knobs of a stage at a size, as a dictionary."""
    table = stage.KNOBS | (stage.PAPER if recipe == "paper" else {})
    return {name: values[SIZES.index(size)] for name, values in table.items()}


def large(stage, size, recipe):
    """An untrained model of a size, for frames of 64x64 pixels."""
    mine = knobs(stage, size, recipe)
    config = {name: mine[name] for name in stage.MODEL} | dict(window=mine["frames"])
    if stage is dynamics_stage:
        patch = knobs(tokenizer_stage, size, recipe)["patch"]
        lam = knobs(lam_stage, size, recipe)
        config |= dict(rows=64 // patch, columns=64 // patch, vocabulary=1024,
                       codes=lam["codes"], latent_dim=lam["latent_dim"])
        if recipe == "ours":
            config |= dict(pixels=3 * patch ** 2)
    else:
        config |= dict(height=64, width=64)
    return stage.build(recipe, **config)


@every_stage
@pytest.mark.parametrize("recipe", [pytest.param("paper", marks=pytest.mark.slow), "ours"])
def test_size_gpu_trains_within_16_gb(stage, recipe):
    """A whole step at the usual batch, uncompiled, in bf16, with the optimizer's moments.

    It runs on tensors that have shapes but no memory.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker
    mine = knobs(stage, "gpu", recipe)
    B, T = mine["batch"], mine["frames"]
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = large(stage, "gpu", recipe)
        # the prior of the dynamics learns when all else is done
        model.prior = None
        # in training the LAM shifts clips by random numbers, and these tensors have no numbers
        model.training = False
        prepare(model, how())
        optimizer = torch.optim.AdamW(model.parameters())
        # after the first step the moments are there
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.zero_grad()
        if stage is dynamics_stage:
            inputs = (torch.zeros(B, T, model.N, dtype=torch.long),
                      torch.zeros(B, T - 1, dtype=torch.long))
        else:
            inputs = (torch.zeros(B, T, 64, 64, 3),)
        tracker = MemTracker()
        tracker.track_external(model, optimizer)
        with tracker:
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(model, inputs)
            loss.backward()
            optimizer.step()
        peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    print(f"{stage.__name__}, size gpu, recipe {recipe}, {B} clips: {peak / 1e9:.1f} GB")
    # what is kept for the backward pass weighs far more than weights, gradients and two moments,
    # of 4 bytes each; if it does not, the tracker has missed it
    learned = 16 * sum(p.numel() for p in model.parameters())
    assert 6 * learned < peak < 16e9


# ------------------------------------------------------------------------------- sizes


# in millions
PARAMETERS = [
    (tokenizer_stage, "gpu", "ours", 33.9),
    (lam_stage, "gpu", "ours", 7.1),
    (dynamics_stage, "gpu", "ours", 126.5),
    (tokenizer_stage, "coinrun", "ours", 67.5),
    (lam_stage, "coinrun", "ours", 53.2),
    (dynamics_stage, "coinrun", "ours", 56.9),
    (tokenizer_stage, "coinrun", "paper", 42.4),
    (lam_stage, "coinrun", "paper", 42.4),
    (dynamics_stage, "coinrun", "paper", 32.7),
]


@pytest.mark.parametrize("stage, size, recipe, expected", PARAMETERS)
def test_large_sizes_build(stage, size, recipe, expected):
    """On the meta device: the architecture and its number of parameters, without the memory."""
    with torch.device("meta"):
        model = large(stage, size, recipe)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert millions == pytest.approx(expected, abs=0.05)


# the models of which the paper gives the size: [(layers, width D), ...], parameters
PUBLISHED = [
    ([(18, 512)], 41e6),
    ([(16, 768)], 96e6),
    ([(20, 1024)], 192e6),
    ([(21, 1536)], 404e6),
    ([(20, 2048)], 811e6),
    ([(28, 2560)], 1.6e9),
    ([(36, 3072)], 2.7e9),
    ([(48, 5120)], 10.1e9),
    # tokenizer and LAM: encoder and decoder
    ([(12, 512), (20, 1024)], 200e6),
    ([(20, 1024), (20, 1024)], 300e6),
]


def test_a_block_of_the_paper_is_about_as_large_as_its_totals_imply():
    """The totals imply 7 to 10 D^2 a block, whatever is embedded; ours with ffw = 1 has 10.

    The two attentions have 4 D^2 each. The usual ffw = 4 would add 8 D^2, and make 16.
    """
    implied = []
    for stacks, total in PUBLISHED:
        squares = sum(layers * D ** 2 for layers, D in stacks)
        implied.append(total / squares)
    assert 7 < min(implied) < 8
    assert 9.5 < max(implied) < 10.5
    with torch.device("meta"):
        for ffw, expected in ((1, 10), (4, 16)):
            block = STBlock(512, 8, 16, ffw)
            parameters = sum(p.numel() for p in block.parameters())
            assert parameters / 512 ** 2 == pytest.approx(expected, rel=0.01)


# ------------------------------------------------------------------------------- the bench


@pytest.fixture
def benched(tmp_path, monkeypatch, capsys):
    """A function that runs the bench at size test on the CPU, and returns its rows."""
    (tmp_path / "here").mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))

    def run(*flags):
        bench.main(["--size=test", "--device=cpu", *flags])
        # whatever it was, nothing is left behind
        assert not list((tmp_path / "here").iterdir())
        assert not list((tmp_path / "temporary").iterdir())
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return run


def work_of_a_block(D, N, T, ffw):
    """Multiplications and additions for one token in one ST block, forward."""
    attentions = 2 * (3 * D * D + D * D)
    scores = 2 * N * D + 2 * T * D
    return 2 * (attentions + scores + 2 * ffw * D * D)


@every_recipe
def test_bench_counts_the_arithmetic_of_a_step(recipe, benched):
    """One row, and its operations are those that one gets with pencil and paper."""
    row, = benched("--only=tokenizer", f"--recipe={recipe}")
    k = SimpleNamespace(**knobs(tokenizer_stage, "test", recipe))
    assert row["milliseconds"].keys() == {"data", "forward", "backward", "optimizer"}
    assert row["frames_per_second"] == pytest.approx(k.frames * row["clips_per_second"], rel=0.01)
    # 64 tokens a frame, and 3 * 8 * 8 numbers a patch
    tokens = k.batch * k.frames * 64
    blocks = 2 * k.layers * work_of_a_block(k.dim, 64, k.frames, ffw=4 if recipe == "ours" else 1)
    pixels = 2 * 2 * 192 * k.dim
    vectors = 2 * 2 * k.dim * k.latent_dim
    quantizer = 2 * k.latent_dim * k.vocabulary
    forward = tokens * (blocks + pixels + vectors + quantizer)
    # it is rounded to a tenth
    assert row["gflop_per_step"] == pytest.approx(3 * forward / 1e9, rel=0.02, abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("recipe, compile", [("paper", "off"), ("ours", "on")])
def test_bench_of_the_other_stages(recipe, compile, benched):
    """The dynamics needs a tokenizer and a LAM, which the bench makes for it."""
    rows = benched("--only", "lam", "dynamics", f"--recipe={recipe}", f"--compile={compile}",
                   "--batch=2")
    assert [row["stage"] for row in rows] == ["lam", "dynamics"]
    for row in rows:
        assert row["recipe"] == recipe
        assert row["compile"] == compile
        assert row["batch"] == 2
        assert 0 < row["mfu"] < 1.2
        assert row["gflop_per_step"] > 0.01


@every_recipe
def test_bench_of_play(recipe, capsys):
    models = bench.untrained("test", recipe, "cpu")
    bench.bench_play(models, "test", "cpu", steps=(1, 2), lengths=(20, 40))
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    one, two, drawn, *after = rows
    assert [one["maskgit_steps"], two["maskgit_steps"]] == [1, 2]
    for row in (one, two):
        assert row["frames_per_second"] > 0
        assert row["milliseconds"].keys() == {"frame", "decoding", "maskgit_step"}
        assert row["milliseconds"]["decoding"] < row["milliseconds"]["frame"]
    assert drawn["maskgit_steps"] == dynamics_stage.SAMPLING[recipe]["steps"]
    assert drawn["frames_per_second_drawn"] > 0
    assert [row["after_frames"] for row in after] == [20, 40]


@pytest.mark.slow
def test_bench_of_a_trained_world(world, capsys):
    bench.main(["--run", str(world / "runs" / "platformer"), "--device=cpu"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {row["stage"] for row in rows} == {"play"}
    assert {row["size"] for row in rows} == {"test"}


@pytest.mark.parametrize("flags, words", [
    (["--run=some", "--size=test"], "leave out --size, --recipe and --only"),
    (["--run=some", "--only=play"], "leave out --size, --recipe and --only"),
    (["--only=tokenizer", "--device=tea"], "--device tea"),
    (["--only=tokenizer", "--device=cpu", "--batch=0"], "--batch 0 makes no sense"),
])
def test_a_mistake_at_the_bench_is_one_sentence(flags, words):
    with pytest.raises(SystemExit, match=words):
        bench.main(flags)


# ------------------------------------------------------------------------------- on a GPU


@on_a_gpu
@every_stage
@every_recipe
def test_gpu_step_compiled_in_bf16_is_the_eager_one_in_fp32(stage, recipe):
    """Its loss to a few parts in a hundred, and gradients that point the same way."""
    inputs = [t.cuda() for t in lesson(stage, 4)]

    def step(compile):
        torch._dynamo.reset()
        model = small(stage, recipe).cuda()
        args = how(compile=compile, device="cuda")
        prepare(model, args)
        torch.manual_seed(0)
        precision = autocast(args) if compile == "on" else torch.autocast("cuda", enabled=False)
        with precision:
            loss = loss_of(model, inputs)
        loss.backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        return loss.item(), torch.cat(gradients)

    slow, exact = step("off")
    fast, rounded = step("on")
    assert fast == pytest.approx(slow, rel=0.03)
    assert F.cosine_similarity(exact, rounded, 0) > 0.97


@torch.inference_mode()
def some_play(device, compile):
    """From one frame of the shipped world, the frame under each code, then 20 under code 0.

    Returns (codes + 20, H, W, C).
    """
    models = play.load(play.ASSETS, device)
    game = play.Game(models, device, compile=compile, steps=1, temperature=0.0)
    true = Platformer(500_000)
    game.reset(torch.from_numpy(true.frame()).float() / 255)
    frames = list(game.every_button())
    for _ in range(20):
        frames.append(game.press(0))
    return torch.from_numpy(np.stack(frames))


@on_a_gpu
@pytest.mark.parametrize("compile", ["off", "on"])
def test_gpu_plays_what_the_cpu_plays(compile):
    """In one pass a frame, and the likeliest token everywhere, so that no luck is in it.

    The first frames come before rounding can add up. The later ones prove that a graph, captured
    once, goes on writing where the cache is.
    """
    torch._dynamo.reset()
    alike = psnr(some_play("cpu", "off"), some_play("cuda", compile))
    assert alike[:10].min() > 40, alike
    assert alike.median() > 30, alike


@on_a_gpu
def test_gpu_holds_the_data_and_cuts_the_same_clips(platformer):
    root = platformer / "data" / "platformer"
    there = Clips(root, "train", 5, "cuda")
    here = Clips(root, "train", 5, "cpu")
    assert there.frames.device.type == "cuda"
    assert torch.allclose(there.at([3, 40]).cpu(), here.at([3, 40]), atol=1e-6)


@on_a_gpu
def test_gpu_bench_of_every_stage(benched):
    rows = benched("--compile=on", "--only", "tokenizer", "lam", "dynamics", "--device=cuda")
    assert [row["dtype"] for row in rows] == ["bfloat16"] * 3
