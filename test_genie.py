"""The properties that must hold, readable as a lecture. Run with: pytest -q test_genie.py

No test here asks for a shape alone: every defect on the list below was once found in a published reimplementation, where the
shapes were right and the loss fell. The miniature end-to-end run at the end asks whether a world was learned.
"""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

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
torch.set_num_threads(2)


def small_tokenizer(seed=0, window=4):
    torch.manual_seed(seed)
    return tok.Tokenizer(32, 32, window, patch=8, dim=16, layers=2, heads=2, codes=24, code_dim=8, beta=0.25).eval()


def small_lam(seed=0, window=4):
    torch.manual_seed(seed)
    m = lam_stage.LatentActionModel(32, 32, window, patch=8, dim=16, layers=2, heads=2, codes=8, code_dim=8, beta=0.05).eval()
    torch.nn.init.normal_(m.to_pixels.weight, std=0.1)          # it starts at zero: nothing would depend on anything
    return m


def small_dynamics(action="add", seed=0, window=4):
    torch.manual_seed(seed)
    m = dyn.Dynamics(tokens=16, codes=24, buttons=8, code_dim=8, window=window, dim=16, layers=2, heads=2, action=action).eval()
    m.buttons.copy_(torch.randn(8, 8))
    return m


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
    y[0, 1, 2] += 1
    touched = ((m(x) - m(y)).abs().amax(-1)[0] > 0)                              # (T, N)
    assert touched[1].all() and not touched[0].any() and touched[2:, 2].all()


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
    assert sum(t.numel() for t in cache.tensors()) == sum(t.numel() for t in m.new_cache(2).tensors())


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


def test_codebook_learns_and_dead_codes_revive_as_no_copy():
    """All codes start far from the data. Revival must spread them over it, and no two may be the same vector."""
    torch.manual_seed(0)
    vq = st.VectorQuantizer(32, 4).train()
    with torch.no_grad():
        vq.codebook.copy_(torch.tensor([2.0, 0, 0, 0]).expand(32, 4))
        vq.mean_sum.copy_(vq.codebook)
    z = torch.randn(500, 4)
    z[:, 0] = -z[:, 0].abs() - 1                                                 # far from every code
    first = vq(z)[2]
    for _ in range(200):
        _, index, commitment = vq(z)
    assert len(index.unique()) >= 28, "dead codes stay dead"
    assert commitment < 0.2 * first
    distance = torch.cdist(vq.codebook, vq.codebook) + torch.eye(32) * 9
    assert distance.min() > 1e-3, "a code was revived as an exact copy"


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


@torch.no_grad()
def test_latent_action_sees_the_next_frame_and_none_after_it():
    m, x = small_lam(), torch.rand(1, 6, 32, 32, 3)
    y = x.clone()
    y[:, 3] = torch.rand(32, 32, 3)                                              # x_4, the end of transition 3
    difference = changed(m.features(x), m.features(y), 1)
    assert difference[:2] == [False, False] and difference[2], "a_3 must depend on x_4, a_1 and a_2 must not"


@torch.no_grad()
def test_lam_decoder_sees_the_next_frame_only_through_the_action():
    m, x = small_lam(), torch.rand(1, 5, 32, 32, 3)
    y = x.clone()
    y[:, 4] = torch.rand(32, 32, 3)
    a = torch.randint(8, (1, 4))
    assert torch.equal(m.decode(x[:, :-1], a), m.decode(y[:, :-1], a))
    b = a.clone()
    b[:, 3] = (a[:, 3] + 1) % 8
    assert changed(m.decode(x[:, :-1], a), m.decode(x[:, :-1], b), 1) == [False, False, False, True]


@torch.no_grad()
def test_lam_training_does_not_leak_the_target():
    """In the training loss: with the code frozen, the prediction of frame t must not move when frame t does."""
    m, seen = small_lam(), []
    predict = m.predict
    m.predict = lambda x, e, mask=None: seen.append(x) or predict(x, e, mask)
    x = torch.rand(2, 5, 32, 32, 3)
    m(x)
    assert torch.equal(seen[0], x[:, :-1])


@pytest.mark.parametrize("action", ["add", "prepend"])
@torch.no_grad()
def test_action_reaches_the_frame_it_leads_to_and_not_before(action):
    m, z = small_dynamics(action), torch.randint(24, (1, 6, 16))
    a = torch.randint(8, (1, 5))
    b = a.clone()
    b[:, 2] = (a[:, 2] + 1) % 8                                                  # a_3 leads from frame 3 to frame 4
    assert changed(m.logits(z, m.actions(a)), m.logits(z, m.actions(b)), 1)[:4] == [False, False, False, True]


@torch.no_grad()
def test_dynamics_is_causal():
    m, z, a = small_dynamics(), torch.randint(24, (1, 6, 16)), torch.randint(8, (1, 5))
    w = z.clone()
    w[:, 3] = m.MASK
    assert changed(m.logits(z, m.actions(a)), m.logits(w, m.actions(a)), 1)[:4] == [False, False, False, True]


# ------------------------------------------------------------------------------------------------ masking

@pytest.mark.parametrize("masking", ["paper", "frames", "streams"])
def test_targets_are_the_true_tokens_and_frame_one_is_never_masked(masking, monkeypatch):
    m = small_dynamics()
    z, a = torch.randint(24, (8, 6, 16)), torch.randint(8, (8, 5))
    targets, inputs = [], []
    cross_entropy, logits = F.cross_entropy, m.logits
    monkeypatch.setattr(F, "cross_entropy", lambda p, t: targets.append(t) or cross_entropy(p, t))
    monkeypatch.setattr(m, "logits", lambda x, *rest: inputs.append(x) or logits(x, *rest))
    torch.manual_seed(0)
    m(z, a, masking, noise=0.0)
    x, target = inputs[0], targets[0]
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


@torch.no_grad()
def test_two_streams_train_exactly_what_playing_asks():
    """The masked stream's logits of frame t equal those of playing it: clean frames 1..t-1, then the masked frame t."""
    m = small_dynamics(window=4)
    z, a = torch.randint(24, (2, 7, 16)), torch.randint(8, (2, 6))
    masked, e = z.masked_fill(torch.rand(z.shape) < 0.6, m.MASK), m.actions(a)
    time, mask = dyn.two_streams(7, 4, z.device)
    both = m.logits(torch.cat([z, masked[:, 1:]], 1), torch.cat([e, e[:, 1:]], 1), time, mask)[:, 7:]
    for t in range(1, 7):
        play_it = m.logits(torch.cat([z[:, :t], masked[:, t:t + 1]], 1), e[:, :t + 1])[:, -1]
        assert torch.allclose(both[:, t - 1], play_it, atol=1e-4)


def test_noise_replaces_past_tokens_but_never_targets(monkeypatch):
    m, z, a = small_dynamics(), torch.randint(24, (4, 6, 16)), torch.randint(8, (4, 5))
    inputs, logits = [], m.logits
    monkeypatch.setattr(m, "logits", lambda x, *rest: inputs.append(x) or logits(x, *rest))
    m(z, a, "streams", noise=1.0)
    assert (inputs[0][:, :6] != z).float().mean() > 0.1
    assert ((inputs[0][:, 6:] == z[:, 1:]) | (inputs[0][:, 6:] == m.MASK)).all()


# ------------------------------------------------------------------------------------------------ sampling

def fixed_logits(scale=1.0):
    torch.manual_seed(1)
    table = scale * torch.randn(1, 1, 64, 10)
    return lambda z: table.expand(len(z), -1, -1, -1)


@pytest.mark.parametrize("order", ["random", "confidence"])
def test_committed_tokens_stay_committed_and_every_hole_is_filled(order):
    film = []
    z = dyn.maskgit(fixed_logits(), 4, 64, 10, steps=6, order=order, film=film)
    for before, after in zip(film, film[1:]):
        kept = before != 10
        assert torch.equal(before[kept], after[kept])
        assert (after == 10).sum() < (before == 10).sum()
    assert (z < 10).all() and len(film) == 6 and (film[0] == 10).float().mean() > 0.9


def test_temperature_and_step_count_change_samples():
    def entropy(temperature):
        torch.manual_seed(0)
        z = dyn.maskgit(fixed_logits(3.0), 200, 64, 10, steps=2, temperature=temperature)
        p = F.one_hot(z[:, 0], 10).float().mean(0)
        return -(p * p.clamp(min=1e-9).log()).sum(-1).mean()
    cold, warm, hot = entropy(0.0), entropy(1.0), entropy(4.0)
    assert cold == 0 and warm > 0.3 and hot > warm + 0.5, "temperature must divide logits"
    calls = []
    dyn.maskgit(lambda z: calls.append((z == 10).float().mean()) or fixed_logits()(z), 1, 64, 10, steps=8)
    assert len(calls) == 8 and calls == sorted(calls, reverse=True), "each step must see the tokens of the last"


def test_several_steps_see_what_one_step_cannot():
    """Tokens that must all agree: sampled at once they disagree, sampled one after the other they follow the first."""
    def agree(z):                                               # committed tokens vote, strongly
        votes = F.one_hot(z.clamp(max=9), 10).float() * (z < 10).unsqueeze(-1)
        return 20 * votes.sum(2, keepdim=True).expand(-1, -1, 64, -1).clamp(max=1)
    torch.manual_seed(0)
    at_once = dyn.maskgit(agree, 16, 64, 10, steps=1)
    in_turn = dyn.maskgit(agree, 16, 64, 10, steps=64)
    variety = lambda z: np.mean([len(row.unique()) for row in z])
    assert variety(at_once) > 8 and variety(in_turn) < 2


def test_confidence_commits_the_likeliest_first():
    film, logits = [], torch.zeros(1, 1, 64, 10)
    logits[0, 0, torch.arange(64), 3] = torch.linspace(0, 12, 64)                # ever surer of token 3 along the frame
    torch.manual_seed(0)
    dyn.maskgit(lambda z: logits, 1, 64, 10, steps=8, order="confidence", film=film)
    first = (film[1][0, 0] != 10).nonzero().flatten().float().mean()
    assert first > 45


@pytest.mark.parametrize("action", ["add", "prepend"])
def test_cached_sampling_equals_full_recomputation(action):
    """Same seed, same tokens, well past the window; and pixels decoded one by one equal those decoded together."""
    m, z, a = small_dynamics(action, window=4), torch.randint(24, (2, 2, 16)), torch.randint(8, (2, 10))
    torch.manual_seed(0)
    fast = dyn.rollout(m, z, a, steps=3)
    torch.manual_seed(0)
    slow = dyn.rollout(m, z, a, cached=False, steps=3)
    assert torch.equal(fast, slow) and fast.shape == (2, 11, 16)
    t = small_tokenizer(window=4)
    together, cache, single = t.decode(fast), t.decoder.new_cache(2), []
    for i in range(11):
        single.append(t.decode(fast[:, i:i + 1], cache))
        cache.advance()
    assert torch.allclose(together, torch.cat(single, 1), atol=1e-5)


def test_undo_restores_the_cache():
    m = small_dynamics()
    world = dyn.World(m, steps=2)
    world.prompt(torch.randint(24, (1, 3, 16)), torch.randint(8, (1, 2)))
    before = world.cache.snapshot()
    torch.manual_seed(0)
    first = world.step(torch.tensor([1]))
    world.step(torch.tensor([5]))
    world.cache.restore(before)
    torch.manual_seed(0)
    assert torch.equal(world.step(torch.tensor([1])), first)
