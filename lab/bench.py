"""Measure the speed of training and of play. Nothing is trained, and nothing is left behind.

    python -m lab.bench                          # the three stages and play, at the usual size
    python -m lab.bench --size test --device cpu # a minute on two cores
    python -m lab.bench --only dynamics --size coinrun --recipe paper
    python -m lab.bench --run runs/platformer    # play alone, in a world that was trained

Each row is a line of JSON; lab/SPEED.md says what the fields mean. For a stage, the real training
loop runs on a small data set of the built-in game: 5 steps to warm up, then 20 that are timed. For
play, frames are drawn with the cache and without, the cost of the window is measured, and whether
a frame costs more after 2,000 others. memory_gb is the peak of the process: on a CPU, use --only
to have that of one stage.
"""
import contextlib
import gc
import itertools
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import dynamics as dynamics_stage
import lam as lam_stage
import tokenizer as tokenizer_stage
from data import build_platformer
from play import Game, Window, load, read_scores, starts
from st_block import (RECIPES, SIZES, Run, autocast, check_compiler, command, find_device, memory,
                      new_parser, parser, pyplot_for_files, settle, stop)

STAGES = dict(tokenizer=tokenizer_stage, lam=lam_stage, dynamics=dynamics_stage)

WARM = 5                # training steps before the clock starts: the first ones compile
TIMED = 20              # training steps that are timed
PHASES = ("data", "forward", "backward", "optimizer")


# ------------------------------------------------------------------------------- the clock


def seconds(call, n):
    """The median time that call() takes, of n times, after one to warm up."""
    took = []
    for _ in range(n + 1):
        began = time.perf_counter()
        call()
        took.append(time.perf_counter() - began)
    return float(np.median(took[1:]))


def matmul_rate(device, dtype):
    """Floating-point operations per second of a large matrix product, the most there is to get."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=dtype)

    def multiply():
        # reading a number makes a GPU finish
        return (a @ a)[0, 0].item()

    return 2 * n ** 3 / seconds(multiply, 9)


def print_row(**fields):
    print(json.dumps(fields), flush=True)


# ------------------------------------------------------------------------------- training


class Done(Exception):
    """A runner has seen enough: it ends the training of a stage by raising this."""


class UntrainedRun(Run):
    """A Run that saves the model as it begins, as if it had been trained."""

    def steps(self):
        self.save(self.args.steps)
        raise Done


class BenchRun(Run):
    """A Run that lets the loop take a few steps, and prints how long their phases took."""

    def steps(self):
        """Yield the numbers of the steps, then print the row and raise Done."""
        args = self.args
        phases = yield from self.timed_steps()                      # (TIMED, 4) seconds
        peak = memory(args.device)
        forward = yield from self.counted_step()
        # by custom the backward pass counts as two forward passes
        flops = 3 * args.batch * forward
        total = np.median(phases.sum(1))
        milliseconds = 1000 * np.median(phases, 0)
        dtype = self.dtype()
        rate = matmul_rate(args.device, dtype)
        print_row(stage=self.stage, size=args.size, recipe=args.recipe, device=str(args.device),
                  threads=torch.get_num_threads(), compile=args.compile,
                  dtype=str(dtype).removeprefix("torch."), batch=args.batch, frames=args.frames,
                  parameters=sum(p.numel() for p in self.model.parameters()),
                  clips_per_second=round(args.batch / total, 2),
                  frames_per_second=round(args.batch * args.frames / total, 1),
                  milliseconds=dict(zip(PHASES, milliseconds.round(1).tolist())),
                  gflop_per_step=round(flops / 1e9, 1), matmul_gflops=round(rate / 1e9),
                  mfu=round(flops / total / rate, 3), memory_gb=peak)
        raise Done

    def timed_steps(self):
        """Yield WARM + TIMED steps; return how long the phases of the last TIMED took."""
        # when a step began, and when its phases ended
        marks = []

        def mark(*_):
            if self.args.device.type == "cuda":
                torch.cuda.synchronize(self.args.device)
            marks.append(time.perf_counter())

        hooks = [self.model.register_forward_pre_hook(mark),
                 self.model.register_forward_hook(mark),
                 self.optimizer.register_step_pre_hook(mark),
                 self.optimizer.register_step_post_hook(mark)]
        phases = []
        for step in tqdm(range(WARM + TIMED), desc=self.stage, dynamic_ncols=True):
            marks.clear()
            mark()
            yield step
            phases.append(np.diff(marks))                           # (4,)
        for hook in hooks:
            hook.remove()
        return np.stack(phases[WARM:])

    def counted_step(self):
        """Yield one more step; return the floating-point operations of one clip, forward.

        The backward pass is not counted, for it may compute blocks again (--recompute), and that
        is no progress.
        """
        counter = FlopCounterMode(display=False)
        found = []

        def first_clip(model, inputs):
            return tuple(x[:1] for x in inputs)

        def note(*_):
            found.append(counter.get_total_flops())

        self.model.register_forward_pre_hook(first_clip)
        self.model.register_forward_hook(note)
        with contextlib.ExitStack() as stack:
            # the counter knows torch's operations, not what the compiler makes of them
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            # nor does it know the kernel of attention on a CPU
            if self.args.device.type == "cpu":
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(counter)
            yield WARM + TIMED
        return found[0]

    def dtype(self):
        """The precision of the matrix products."""
        kind = self.args.device.type
        with autocast(self.args):
            if torch.is_autocast_enabled(kind):
                return torch.get_autocast_dtype(kind)
        return torch.float32

    def log(self, step, loss, **watch):
        """Say nothing: reading a loss makes a GPU wait."""


def run_stage(stage, runner, *flags):
    """Run the training of a stage until its runner has seen enough."""
    with contextlib.suppress(Done):
        stage.main(flags, runner=runner)
    # the next one shall begin afresh: without these models, their graphs, and their peak of memory
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def bench_stages(names, flags, options):
    """Time the training of stages, on a small data set that is deleted afterwards.

    flags: of the command line, which say what model it is. options: those of the timed runs alone.
    """
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data" / "platformer"
        # standard output is for the rows
        with contextlib.redirect_stdout(sys.stderr):
            build_platformer(data, episodes=8, frames=80, seed=0, overwrite=False)
        flags = (*flags, f"--data={data}", f"--run={folder}/run", "--overwrite")
        for name in names:
            # the dynamics is trained on the tokens and the codes of two other models
            if name == "dynamics":
                run_stage(tokenizer_stage, UntrainedRun, *flags)
                run_stage(lam_stage, UntrainedRun, *flags)
            run_stage(STAGES[name], BenchRun, *flags, *options)


# ------------------------------------------------------------------------------- play


def untrained(size, recipe, device):
    """What play.load returns, of a world with random weights that draws frames of 64x64 pixels."""
    def settings(stage):
        flags = [f"--size={size}", f"--recipe={recipe}", f"--device={device}"]
        p = parser(stage.__doc__, stage.KNOBS, stage.PAPER)
        return settle(p.parse_args(flags), stage.__name__)

    def model(stage):
        args = settings(stage)
        config = {name: getattr(args, name) for name in stage.MODEL}
        made = stage.build(recipe, height=64, width=64, window=args.frames, **config)
        return made.to(args.device).eval().requires_grad_(False)

    tokenizer = model(tokenizer_stage)
    lam = model(lam_stage)
    dynamics, _ = dynamics_stage.new_model(settings(dynamics_stage), tokenizer, lam)
    dynamics.eval().requires_grad_(False)
    return tokenizer, dynamics, dict(data="platformer, not learned"), {}, recipe


def bench_play(models, size, device, compile="off", steps=(1, 4, 8, 25), lengths=(20, 200, 2000)):
    """Print the rows of play, a JSON object each. models: what play.load returns.

    steps: numbers of MaskGIT steps to be timed, with the cache and without. lengths: after how
    many frames to time another one; left out where that would take more than ten minutes.
    """
    *_, recipe = models
    game = Game(models, device, compile=compile)
    device = game.device
    # a world of other videos begins anywhere: how fast it is does not depend on what it shows
    if game.built_in:
        supply = starts(game, seed=0)
    else:
        picture = torch.rand(game.tokenizer.height, game.tokenizer.width, 3)
        supply = itertools.repeat((picture, None))
    game.reset(*next(supply))
    about = dict(size=size, recipe=recipe, device=str(device), threads=torch.get_num_threads(),
                 compile=compile)
    bench_cache(game, recipe, steps, about)
    bench_window(game, supply, about)
    bench_growth(game, lengths, about)


def bench_cache(game, recipe, steps, about):
    """Print a row for each number of MaskGIT steps: frames/s with the cache and without."""
    rollout = dynamics_stage.rollout_ours if recipe == "ours" else dynamics_stage.rollout
    usual = game.world.steps
    for n in steps:
        game.world.steps = n
        cached, decoding, uncached = time_frame(game, rollout)
        # what is neither decoding nor a pass of the dynamics is shared out among the passes
        milliseconds = dict(frame=round(1000 * cached, 2), decoding=round(1000 * decoding, 2),
                            maskgit_step=round(1000 * (cached - decoding) / n, 2))
        print_row(stage="play", maskgit_steps=n, frames_per_second=round(1 / cached, 1),
                  milliseconds=milliseconds, uncached=round(1 / uncached, 3),
                  ratio=round(uncached / cached, 1), window=game.dynamics.transformer.window,
                  **about)
    game.world.steps = usual


@torch.inference_mode()
def time_frame(game, rollout):
    """The seconds that a frame takes: with the cache, its decoding alone, and without the cache.

    Without the cache, `rollout` and the decoder compute the whole window of frames anew. The three
    are timed in turns, because the speed of a shared machine changes by the minute.
    """
    d = game.dynamics
    world = game.world
    # all frames of the window but the last, and a code for each
    past = torch.randint(d.V, (1, d.transformer.window - 1, d.N), device=game.device)
    codes = torch.zeros_like(past[..., 0])

    def press():
        game.press(0)

    def decode():
        game.draw(world.last)

    def whole():
        z = rollout(d, past, codes, steps=world.steps, temperature=world.temperature)
        return game.tokenizer.decode(z)[0, -1].cpu()

    # of a large model, once has to do
    rows = [[seconds(press, 1), seconds(decode, 1), seconds(whole, 1)]]
    if rows[0][-1] < 1:
        rows = [[seconds(press, 9), seconds(decode, 9), seconds(whole, 3)] for _ in range(5)]
    return np.median(rows, 0).tolist()


def bench_window(game, supply, about):
    """Print a row: frames/s with the window of play.py, which is drawn off screen."""
    plt = pyplot_for_files()
    window = Window(game, supply, fps=10, folder=None)
    window.figure.canvas.draw()
    # a key is held down, and each beat of the clock plays a frame
    window.held["1"] = True
    drawn = seconds(window.tick, 20)
    pixels = "x".join(str(n) for n in window.figure.canvas.get_width_height())
    plt.close(window.figure)
    print_row(stage="play", maskgit_steps=game.world.steps,
              frames_per_second_drawn=round(1 / drawn, 1), pixels=pixels, **about)


def bench_growth(game, lengths, about):
    """Print a row for each length: what a frame costs after so many others."""
    def press():
        game.press(0)

    game.restart()
    took = seconds(press, 3)
    for length in lengths:
        if length * took > 600:
            break
        for _ in tqdm(range(game.count, length), desc="playing on", disable=length < 1000,
                      dynamic_ncols=True):
            press()
        print_row(stage="play", maskgit_steps=game.world.steps, after_frames=length,
                  milliseconds_per_frame=round(1000 * seconds(press, 20), 2),
                  memory_gb=memory(game.device), **about)


# ------------------------------------------------------------------------------- command line


def main(argv=None):
    every = [*STAGES, "play"]
    p = new_parser(__doc__)
    p.add_argument("--size", choices=SIZES, help="default: gpu with CUDA, else laptop")
    p.add_argument("--recipe", choices=RECIPES, help="default: ours")
    p.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    p.add_argument("--compile", choices=("auto", "on", "off"), default="auto",
                   help="torch.compile (auto: training compiles as usual, play does not)")
    p.add_argument("--only", nargs="+", choices=every, default=every, metavar="WHAT",
                   help="some of: " + ", ".join(every))
    p.add_argument("--run", type=Path,
                   help="play the world of this folder, instead of an untrained one; no training")
    p.add_argument("--batch", type=int, help="clips in a step of training, instead of the usual")
    p.add_argument("--recompute", choices=("auto", "on", "off"), default="auto",
                   help="in training, see the help of a stage")
    args = p.parse_args(argv)
    if args.run and (args.size or args.recipe or args.only != every):
        stop("--run plays a world of a size and a recipe of its own; leave out --size, --recipe "
             "and --only")
    if "WORLD_SIZE" in os.environ:
        stop("the bench is of one process; start it without torchrun")
    args.device = find_device(args.device)
    args.size = args.size or ("gpu" if args.device.type == "cuda" else "laptop")
    args.recipe = args.recipe or "ours"
    if args.compile == "on":
        check_compiler(args)

    stages = [name for name in STAGES if name in args.only and not args.run]
    if stages:
        flags = [f"--{name}={getattr(args, name)}"
                 for name in ("size", "recipe", "device", "compile", "recompute")]
        options = [f"--batch={args.batch}"] if args.batch is not None else []
        bench_stages(stages, flags, options)

    if "play" in args.only:
        if args.run:
            models = load(args.run, args.device)
            size = read_scores(args.run / "dynamics.json").get("size")
        else:
            models = untrained(args.size, args.recipe, args.device)
            size = args.size
        bench_play(models, size, args.device, "on" if args.compile == "on" else "off")


if __name__ == "__main__":
    command(main)
