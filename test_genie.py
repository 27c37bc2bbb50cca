"""The properties that must hold, in the order of the paper. Run with: pytest -q test_genie.py

Read it as a lecture. Each section begins with what must be true, where the paper says so, and the
mistake that is made most often. Nearly all of these mistakes were found in published code. They
leave every shape right, and the loss still falls. So a test changes one thing that goes in, and
looks at what changes in what comes out. It does not ask how that is computed.

More tests stand in lab/: test_ours.py for each thing that we added, test_use.py for files and for
what users do wrong, test_window.py for the window.
"""
import json
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import dynamics as dyn
import lam as lam_stage
import play
import st_block as st
import tokenizer as tok
# the last three are fixtures
from lab.conftest import (inside, small_dynamics, small_lam, small_tokenizer, platformer, unscored,
                          world)

both_recipes = pytest.mark.parametrize("recipe", ["paper", "ours"])
both_quantizers = pytest.mark.parametrize("quantizer", [st.VectorQuantizer, st.OnlineKMeans])


def changed(a, b):
    """For each frame: is a (B, T, ...) another than b there?"""
    return [not torch.equal(x, y) for x, y in zip(a.unbind(1), b.unbind(1))]


def with_new_frame(x, t):
    """x (B, T, ...), pixels, tokens or actions, and the same with another entry number t."""
    y = x.clone()
    y[:, t - 1] = torch.rand_like(x[:, 0]) if x.is_floating_point() else (x[:, t - 1] + 1) % 24
    return x, y


def output_of(layer, model, *inputs):
    """What a layer puts out during model(*inputs). The model always has the same luck."""
    kept = []

    def keep(module, inputs, output):
        kept.append(output.detach())

    handle = layer.register_forward_hook(keep)
    torch.manual_seed(0)
    model(*inputs)
    handle.remove()
    return kept[-1]


# ------------------------------------------------------------------------------- the ST block

# Section 2. Spatial attention stays in its frame. Temporal attention stays in its place and never
# looks ahead. The classic mistake is a missing causal mask: the loss falls faster than ever, for
# the model reads the answer, and in play there is no answer to be read.


def touched(m, place):
    """Which tokens (T, N) of a transformer's output change with the token at `place`, (t, n)?"""
    x = torch.randn(1, 8, 4, 16)
    y = x.clone()
    # adding a constant would be lost in the norm
    y[0][place] += torch.randn(16)
    return (m(x) - m(y)).abs().amax(-1)[0] > 0


def test_patches_are_cut_row_by_row():
    """Patch 4 of a grid three patches wide is the second one of the second row."""
    x = torch.rand(2, 3, 16, 24, 3)
    patches = st.patchify(x, 8)
    assert torch.equal(patches[1, 2, 4].view(8, 8, 3), x[1, 2, 8:16, 8:16]), "another square"
    assert torch.equal(st.unpatchify(patches, 8, 16, 24), x), "unpatchify is not the inverse"


def test_attention_by_hand_is_the_fast_attention():
    """The lines that one can read, and the kernel of torch, compute the same."""
    q, k, v = torch.randn(3, 2, 4, 6, 8)
    for mask in (None, torch.ones(6, 6, dtype=torch.bool).tril()):
        by_hand = st.attention_by_hand(q, k, v, mask)
        assert torch.allclose(by_hand, st.attention(q, k, v, mask), atol=1e-6)


def test_spatial_attention_stays_in_its_frame():
    """With time switched off, a token touches every place of its own frame and no other frame."""
    m = st.STTransformer(4, 16, 1, 2, window=8, ffw=1)
    nn.init.zeros_(m.blocks[0].time.out.weight)
    own_frame = (torch.arange(8) == 3)[:, None].expand(8, 4)
    assert torch.equal(touched(m, (3, 2)), own_frame)


def test_temporal_attention_stays_in_its_place_and_looks_back_only():
    """With space switched off, a token touches its own place, now and later."""
    m = st.STTransformer(4, 16, 1, 2, window=8, ffw=1)
    nn.init.zeros_(m.blocks[0].space.out.weight)
    now_and_later = torch.arange(8)[:, None] >= 3
    assert torch.equal(touched(m, (3, 2)), now_and_later & (torch.arange(4) == 2))


def test_a_frame_sees_its_window_and_no_further():
    """In a window of 3, frame t still touches frame t+2, and no longer frame t+3."""
    m = st.STTransformer(4, 16, 1, 2, window=3, ffw=1)
    assert touched(m, (3, 2)).any(1).tolist() == [t in (3, 4, 5) for t in range(8)]


def test_the_order_of_the_past_matters():
    """Attention sees a set. Only the rotary turn tells it which of two frames came first."""
    m = st.STTransformer(4, 16, 1, 2, window=8, ffw=1)
    x = torch.randn(1, 4, 4, 16)
    swapped = x[:, [1, 0, 2, 3]]
    assert not torch.allclose(m(x)[:, 3], m(swapped)[:, 3], atol=1e-6), "time is not told"


def test_time_is_relative():
    """How well a query meets a key depends on how far apart their frames are, and not on when they
    are. So a cache can go on for ever."""
    q, k = torch.randn(2, 6, 8)
    found = []
    for start in (0, 1000):
        turn = st.rotary(torch.arange(start, start + 6), 8)
        found.append(st.rotate(q, *turn) @ st.rotate(k, *turn).T)
    assert torch.allclose(found[0], found[1], atol=1e-3)


# ------------------------------------------------------------------------------- the quantizer

# VQ-VAE, equation 3. Rounding to the nearest code has no gradient, so the decoder's is handed to
# the encoder as if nothing had been rounded. Codes move to their vectors, and vectors stay near
# their codes. Classic mistakes: a codebook that gets no gradient at all, and dead codes that are
# revived as exact copies of live ones, which then tie with them for ever.


@both_quantizers
def test_a_vector_becomes_the_nearest_code(quantizer):
    vq = quantizer(16, 4, beta=0.25).eval()
    z = F.rms_norm(torch.randn(10, 4), (4,))
    e, index, _ = vq(z)
    assert torch.equal(index, torch.cdist(z, vq.codebook).argmin(-1)), "not the nearest"
    assert torch.allclose(e, vq.codebook[index], atol=1e-6), "not its vector"


@both_quantizers
def test_the_gradient_goes_straight_through(quantizer):
    """The vector gets the gradient of its code, as if it had not been rounded."""
    vq = quantizer(16, 4, beta=0.25).eval()
    z = torch.randn(10, 4, requires_grad=True)
    direction = torch.randn(10, 4)
    rounded, _, _ = vq(z)
    # ours brings vectors to unit length before it rounds them
    unrounded = vq.norm(z) if quantizer is st.OnlineKMeans else z
    got, = torch.autograd.grad((rounded * direction).sum(), z)
    expected, = torch.autograd.grad((unrounded * direction).sum(), z)
    assert torch.allclose(got, expected, atol=1e-6)


def test_a_code_moves_to_the_vectors_that_chose_it():
    """VQ-VAE's codebook loss: its gradient leads each chosen code to the mean of its vectors."""
    vq = st.VectorQuantizer(16, 4, beta=0.25)
    z = torch.randn(40, 4)
    _, index, loss = vq(z)
    assert loss.requires_grad, "the loss cannot teach the codebook"
    loss.backward()
    for code in index.unique():
        way = z[index == code].mean(0) - vq.codebook[code]
        step = -vq.codebook.grad[code]
        assert F.cosine_similarity(step, way, 0) > 0.999, f"code {code} moves elsewhere"


def test_a_vector_stays_near_its_code_with_weight_beta():
    """VQ-VAE's commitment loss: the pull on a vector is beta times the pull on its code."""
    vq = st.VectorQuantizer(16, 4, beta=0.25)
    z = torch.randn(1, 4, requires_grad=True)
    _, index, loss = vq(z)
    on_vector, on_codes = torch.autograd.grad(loss, (z, vq.codebook))
    assert torch.allclose(on_vector[0], -0.25 * on_codes[index[0]], atol=1e-7)


def test_our_code_is_the_mean_of_the_vectors_that_chose_it():
    """K-means online: the running mean of a code runs, and arrives."""
    torch.manual_seed(0)
    vq = st.OnlineKMeans(8, 4, beta=0.25).train()
    z = F.rms_norm(torch.randn(500, 4), (4,))
    for _ in range(600):
        _, index, _ = vq(z)
    for code in range(8):
        off = (vq.codebook[code] - z[index == code].mean(0)).norm()
        assert off < 0.1, f"code {code} is {off:.2f} away from the mean of its vectors"


def test_our_dead_codes_come_back_to_life():
    """All codes have lived in one place, far from all vectors. One is the nearest, the rest die."""
    torch.manual_seed(0)
    vq = st.OnlineKMeans(32, 4, beta=0.25).train()
    vq.codebook.copy_(torch.tensor([2.0, 0, 0, 0]).expand(32, 4))
    vq.mean_count.fill_(500 / 32)
    vq.mean_sum.copy_(500 / 32 * vq.codebook)
    v = torch.randn(500, 4)
    v[:, 0] = -v[:, 0].abs() - 1
    for _ in range(400):
        _, index, _ = vq(v)
    used = len(index.unique())
    assert used >= 28, f"only {used} of 32 codes are in use: dead codes stay dead"


def test_our_dead_codes_come_back_to_life_as_no_copies():
    """At first one code is nearest to all vectors, and all others are dead."""
    torch.manual_seed(0)
    vq = st.OnlineKMeans(32, 4, beta=0.25).train()
    vq(torch.tensor([1.0, 0, 0, 0]) + 0.1 * torch.randn(500, 4))
    distance = torch.cdist(vq.codebook, vq.codebook) + 9 * torch.eye(32)
    assert distance.min() > 1e-3, "two codes are alike: vectors choose the first, never the second"


# ------------------------------------------------------------------------------- the tokenizer

# Section 2.1, ST-ViViT: a VQ-VAE whose encoder and decoder both run through time, causally. Token
# z_t knows x_1..x_t, and frame t is decoded from z_1..z_t. The classic mistake is to decode each
# new frame of a game alone, as if it were the first of a clip (see the cache, below).


@both_recipes
@torch.no_grad()
def test_tokenizer_encodes_causally(recipe):
    """A new frame 4 leaves the vectors of frames 1 to 3 as they are."""
    m = small_tokenizer(recipe)
    x, y = with_new_frame(torch.rand(1, 6, 32, 32, 3), 4)
    assert changed(m.features(x), m.features(y)) == [False, False, False, True, True, True]


@both_recipes
@torch.no_grad()
def test_tokenizer_decodes_causally_and_remembers(recipe):
    """New tokens of frame 4 leave frames 1 to 3 as they are, and later frames know of them."""
    m = small_tokenizer(recipe)
    z, w = with_new_frame(torch.randint(24, (1, 6, 16)), 4)
    assert changed(m.decode(z), m.decode(w)) == [False, False, False, True, True, True]


@both_recipes
def test_tokenizer_draws_from_codes_alone(recipe):
    """If all vectors are alike, so are all tokens, and then two clips are drawn alike."""
    m = small_tokenizer(recipe)
    nn.init.zeros_(m.to_latent.weight)
    first, second = torch.rand(2, 2, 4, 32, 32, 3)
    drawn = output_of(m.to_pixels, m, first)
    assert torch.equal(drawn, output_of(m.to_pixels, m, second)), "pixels reach the decoder"


# ------------------------------------------------------------------------------- latent actions

# Section 2.1, LAM. Action a_t tells what happened between x_t and x_{t+1}, so it must see both. The
# decoder must learn of x_{t+1} by the action alone. Classic mistakes: a_t is computed without
# x_{t+1} and can only say what the past says anyway, or the decoder is handed x_{t+1} by another
# way and needs no action.


@both_recipes
@torch.no_grad()
def test_an_action_sees_the_frame_it_leads_to_and_none_after_it(recipe):
    """A new frame 4 changes action 3, which leads to it, and neither action 1 nor action 2."""
    m = small_lam(recipe)
    x, y = with_new_frame(torch.rand(1, 6, 32, 32, 3), 4)
    difference = changed(m.features(x), m.features(y))
    assert difference[2], "a_3 was computed without x_4"
    assert difference[:2] == [False, False], "an action sees further than the next frame"
    # the paper's encoder has a past, ours reads one pair of frames
    assert difference[4] == (recipe == "paper"), "a_5 leads from x_5 to x_6, and x_4 is the past"


@both_recipes
def test_lam_decoder_learns_of_the_next_frame_by_the_action_alone(recipe):
    """If all actions are alike, then what is drawn for frame 5 does not depend on frame 5."""
    m = small_lam(recipe)
    nn.init.zeros_(m.to_latent.weight)
    x, y = with_new_frame(torch.rand(2, 5, 32, 32, 3), 5)
    drawn = output_of(m.to_pixels, m, x)
    assert torch.equal(drawn, output_of(m.to_pixels, m, y)), "the decoder was handed the answer"


@both_recipes
@torch.no_grad()
def test_lam_decoder_draws_from_the_frames_so_far(recipe):
    """A new frame 2 changes what is drawn after it, and nothing before. Ours has no memory."""
    m = small_lam(recipe)
    x, y = with_new_frame(torch.rand(1, 4, 32, 32, 3), 2)
    a = torch.randint(8, (1, 4))
    remembers = recipe == "paper"
    assert changed(m.decode(x, a), m.decode(y, a)) == [False, True, remembers, remembers]


@both_recipes
@torch.no_grad()
def test_an_action_is_drawn_into_the_frame_it_leads_to_and_none_before(recipe):
    """Another action 3 changes the third prediction, and not the first two."""
    m = small_lam(recipe)
    x = torch.rand(1, 4, 32, 32, 3)
    a, b = with_new_frame(torch.tensor([[0, 1, 2, 3]]), 3)
    assert changed(m.decode(x, a), m.decode(x, b))[:3] == [False, False, True]


@both_recipes
def test_the_error_of_the_lam_is_that_of_the_next_frame(recipe):
    """Drawing the next frames is no error, and drawing the last ones again is."""
    m = small_lam(recipe)
    x = torch.rand(2, 5, 32, 32, 3)
    assert m.error(x[:, 1:], x) == 0
    assert m.error(x[:, :-1], x) > 0.01


# ------------------------------------------------------------------------------- the dynamics

# Section 2.1, ST-MaskGIT. Tokens of frames 2 to T are masked, at a rate that is drawn for each clip
# from U(0.5, 1), and the loss asks for what was there. Action a_t is added to frame t+1. Classic
# mistakes: the targets are read after masking, so that every answer is the mask; an action is
# attached one frame late; every clip is masked at the same rate.


def mask_last_frame(m, frames):
    """Let m mask every other token of the last frame, and nothing else. Returns the mask."""
    masked = torch.zeros(1, frames, 16, dtype=torch.bool)
    masked[0, -1, ::2] = True

    def draw_mask(z):
        return masked

    m.draw_mask = draw_mask
    return masked


@both_recipes
def test_dynamics_is_causal(recipe):
    """A new frame 4 leaves what is thought of frames 1 to 3 as it is."""
    m = small_dynamics(recipe)
    # of the last frame some tokens are masked, of frame 4 none
    mask_last_frame(m, frames=6)
    z, w = with_new_frame(torch.randint(24, (1, 6, 16)), 4)
    a = torch.randint(8, (1, 5))
    difference = changed(output_of(m.transformer, m, z, a), output_of(m.transformer, m, w, a))
    assert difference == [False, False, False, True, True, True]


@both_recipes
def test_action_reaches_the_frame_it_leads_to_and_not_before(recipe):
    """Action 3 leads from frame 3 to frame 4."""
    m = small_dynamics(recipe)
    z = torch.randint(24, (1, 6, 16))
    a, b = with_new_frame(torch.tensor([[0, 1, 2, 3, 4]]), 3)
    difference = changed(output_of(m.transformer, m, z, a), output_of(m.transformer, m, z, b))
    assert difference[3], "action 3 does not reach frame 4"
    assert difference[:3] == [False, False, False], "action 3 was known before it was pressed"


def test_the_mask_rate_is_drawn_for_each_clip():
    """From U(0.5, 1): its mean is 0.75 and its standard deviation 0.144."""
    m = small_dynamics("paper")
    hidden = m.draw_mask(torch.zeros(2000, 3, 200, dtype=torch.long))
    rate = hidden[:, 1:].float().mean((1, 2))
    assert rate.mean().item() == pytest.approx(0.75, abs=0.02)
    assert rate.std().item() == pytest.approx(0.144, abs=0.015), "clips are masked alike"


def test_our_mask_rate_is_drawn_for_each_frame():
    """Half of the frames are wholly masked, as at the first MaskGIT step, the others by
    U(0.25, 1): their mean is 0.625 and their standard deviation 0.217."""
    m = small_dynamics("ours")
    hidden = m.draw_mask(torch.zeros(2000, 3, 200, dtype=torch.long))
    rate = hidden[:, 1:].float().mean(2).flatten()
    assert (rate == 1).float().mean().item() == pytest.approx(0.5, abs=0.04)
    some = rate[rate < 1]
    assert some.mean().item() == pytest.approx(0.625, abs=0.02)
    assert some.std().item() == pytest.approx(0.217, abs=0.015), "frames are masked alike"


def seen_and_asked(recipe, vocabulary=64, clips=1, **more):
    """Which tokens does a model see of a clip, and which does the loss ask for? (V,), True there.

    No token comes twice in the clip: frame 1 has tokens 0 to 15, frame 2 has 16 to 31, and so on.
    So gradients tell. A token that was seen has one at its embedding. The loss pushes up the bias
    of a token that it asks for, and pushes down all others.
    """
    m = small_dynamics(recipe, vocabulary=vocabulary, **more)
    # a head that guesses nearly evenly
    nn.init.normal_(m.head.weight, std=1e-3)
    nn.init.zeros_(m.head.bias)
    z = torch.arange(64).view(1, 4, 16).expand(clips, -1, -1)
    m(z, torch.tensor([[1, 2, 3]]).expand(clips, -1)).backward()
    seen = m.embed.weight.grad[:vocabulary].abs().amax(1) > 0
    return seen, m.head.bias.grad < 0


@both_recipes
def test_the_first_frame_is_given_and_never_asked_for(recipe):
    """It is the prompt."""
    seen, asked = seen_and_asked(recipe)
    assert seen[:16].all(), "part of the first frame was masked"
    assert not asked[:16].any(), "the loss asks for the prompt"


@both_recipes
def test_the_loss_asks_for_what_is_hidden_and_for_nothing_else(recipe):
    """Each true token is either seen or asked for."""
    seen, asked = seen_and_asked(recipe)
    assert asked.any()
    assert torch.equal(seen, ~asked), "a token was both seen and asked for, or neither"


@both_recipes
def test_what_is_masked_cannot_be_read_anywhere(recipe):
    """Change one token of the last frame. Where it was masked, the model cannot tell."""
    m = small_dynamics(recipe)
    z = torch.randint(24, (1, 4, 16))
    a = torch.randint(8, (1, 3))
    masked = mask_last_frame(m, frames=4)
    before = output_of(m.transformer, m, z, a)
    for place in range(16):
        w = z.clone()
        w[0, 3, place] = (z[0, 3, place] + 1) % 24
        unnoticed = torch.equal(output_of(m.transformer, m, w, a), before)
        assert unnoticed == masked[0, 3, place], f"token {place}: masked is unseen, given is seen"


def test_our_noise_puts_wrong_tokens_among_those_that_are_given():
    """Tokens from 64 on are not in the clips. By noise the model sees some of them."""
    seen, _ = seen_and_asked("ours", vocabulary=128, clips=8, noise=1.0)
    assert seen[64:].sum() >= 8, "nothing was wrong: noise has no effect"


def test_our_noise_is_never_asked_for():
    """The targets are the tokens as they were before the noise."""
    _, asked = seen_and_asked("ours", vocabulary=128, clips=8, noise=1.0)
    assert not asked[64:].any(), "the model learns to make noise"


# ------------------------------------------------------------------------------- MaskGIT

# Section 2.2. All tokens of a new frame are holes at first. In each step some are drawn and stay.
# Classic mistakes: a temperature that divides probabilities, which changes nothing, and steps that
# do not see what the steps before them drew.


def stand_in(table):
    """For the model: these logits (64, 10) of 10 tokens at 64 places, whatever is drawn."""
    def predict(z, place):
        return table[None, None].take_along_dim(place.unsqueeze(-1), 2)

    return predict


@pytest.mark.parametrize("steps", [6, 25])
@pytest.mark.parametrize("order", ["random", "confidence"])
def test_what_is_drawn_stays_and_every_hole_is_filled(order, steps):
    """Each step draws something, the first one little. After the last one no hole is left."""
    film = []
    predict = stand_in(torch.randn(64, 10))
    z = dyn.maskgit(predict, 4, 64, 10, steps=steps, order=order, film=film)
    for before, after in zip(film, film[1:]):
        drawn = before != 10
        assert torch.equal(before[drawn], after[drawn]), "a token was drawn a second time"
        assert (after != 10).sum() > drawn.sum(), "a step drew nothing"
    assert len(film) == steps
    assert (film[0] == 10).float().mean() > 0.9, "a cosine begins slowly"
    assert (z < 10).all(), "a hole was left"


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_divides_logits(temperature):
    """Tokens come as often as softmax(logits / temperature) says."""
    torch.manual_seed(0)
    logits = torch.randn(64, 10)
    z = dyn.maskgit(stand_in(logits), 4000, 64, 10, steps=1, temperature=temperature)
    # the standard error of a share is 0.008 at most
    share = F.one_hot(z[:, 0], 10).float().mean(0)                  # (64, 10)
    assert (share - (logits / temperature).softmax(-1)).abs().max() < 0.04


def test_each_step_sees_what_the_steps_before_it_drew():
    """Tokens that must all agree cannot when drawn at once, and do when drawn in turn."""
    def agree(z, place):
        # tokens that are drawn already vote, strongly
        votes = F.one_hot(z.clamp(max=9), 10) * (z < 10).unsqueeze(-1)
        votes = votes.sum(2, keepdim=True).clamp(max=1)             # (B, 1, 1, 10)
        return 20.0 * votes.expand(-1, -1, place.size(-1), -1)

    def variety(steps):
        torch.manual_seed(0)
        z = dyn.maskgit(agree, 16, 64, 10, steps=steps)
        return np.mean([len(frame.unique()) for frame in z])

    assert variety(1) > 8
    assert variety(64) < 2


# ------------------------------------------------------------------------------- cache and rollout

# Section 2.2 defines play: go on from the prompt, frame by frame. The past never depends on the new
# frame, so its keys and values can be kept. The cache must give the very tokens of the plain loop,
# also when the window has slid. Classic mistakes: a cache that is right up to the length of the
# training clips only, and a frame that is remembered as its first draft.


@torch.no_grad()
def test_cached_frames_equal_the_whole_past():
    """Thirteen frames one by one, in a window of four. A draft leaves no trace, nothing grows."""
    m = st.STTransformer(4, 16, 3, 2, window=4, ffw=1)
    x = torch.randn(2, 13, 4, 16)
    cache = m.new_cache(2)
    frames = []
    for t in range(13):
        # MaskGIT looks at drafts of a frame before it is done
        m(torch.randn(2, 1, 4, 16), cache)
        frames.append(m(x[:, t:t + 1], cache))
        cache.advance()
    assert torch.allclose(torch.cat(frames, 1), m(x), atol=1e-5)
    assert all(kept.size(2) == 4 for kept in cache.keys + cache.values), "the cache grows"


@both_recipes
def test_generate_draws_what_the_rollout_draws(recipe):
    """Same luck, same tokens, nine frames on, in a window of four."""
    rollout = dict(paper=dyn.rollout, ours=dyn.rollout_ours)[recipe]
    m = small_dynamics(recipe)
    z = torch.randint(24, (2, 2, 16))
    a = torch.randint(8, (2, 10))
    torch.manual_seed(0)
    plain = rollout(m, z, a, steps=3)
    torch.manual_seed(0)
    cached = dyn.generate(m, z, a, steps=3)
    assert plain.shape == (2, 11, 16)
    assert torch.equal(plain[:, :2], z), "it does not begin with the prompt"
    assert torch.equal(plain, cached)


@both_recipes
@torch.no_grad()
def test_frames_decoded_one_by_one_equal_those_decoded_together(recipe):
    """The decoder remembers, too. Decoded alone, each frame would look like the first of a clip."""
    m = small_tokenizer(recipe)
    z = torch.randint(24, (2, 11, 16))
    cache = m.decoder.new_cache(2)
    frames = []
    for frame in z.split(1, 1):
        frames.append(m.decode(frame, cache))
        cache.advance()
    assert torch.allclose(torch.cat(frames, 1), m.decode(z), atol=1e-5)


@both_recipes
def test_undo_takes_back_step_after_step(recipe):
    """Far past the window, where each new frame overwrites the oldest one in the cache."""
    m = small_dynamics(recipe)
    game = dyn.new_world(m, steps=2)
    game.prompt(torch.randint(24, (1, 6, 16)), torch.randint(8, (1, 5)))

    def step(i):
        torch.manual_seed(i)
        return game.step(torch.tensor([i]))

    kept = []
    drawn = []
    for i in range(6):
        kept.append((game.snapshot(), game.played, game.last))
        drawn.append(step(i))
    for snapshot, played, last in reversed(kept):
        game.restore(snapshot)
        assert torch.equal(game.played, played) and torch.equal(game.last, last)
    for i in range(6):
        assert torch.equal(step(i), drawn[i]), f"step {i} went otherwise the second time"


# ------------------------------------------------------------------------------- data and metrics

# Section 3 trains on videos of platform games. Ours has buttons that matter, and a momentum that
# one frame does not show. Classic mistakes: clips that run from one episode into the next, levels
# that are both trained on and scored on, and metrics that slice rows of pixels instead of frames.


def frames_after(game, buttons):
    """What a game shows after each of the buttons."""
    frames = []
    for button in buttons:
        game.step(button)
        frames.append(game.frame())
    return np.stack(frames)


def test_the_game_is_deterministic_and_can_go_back():
    game = data.Platformer(7)
    first, second = np.random.default_rng(0).integers(0, 6, (2, 60))
    once = frames_after(game, first)
    assert np.array_equal(once, frames_after(data.Platformer(7), first)), "it depends on luck"
    saved = game.save()
    once = frames_after(game, second)
    game.restore(saved)
    assert np.array_equal(once, frames_after(game, second)), "something was not restored"


def test_one_frame_does_not_show_the_momentum():
    """Two moments look alike, the same button is pressed, and the futures differ."""
    game = data.Platformer(7)
    x, y, _, _, *rest = game.save()
    pictures = []
    for vx, vy in ((0, 0), (4, -8)):
        game.restore((x, y, vx, vy, *rest))
        pictures.append((game.frame(), frames_after(game, [2])))
    (now, future), (same_now, other_future) = pictures
    assert np.array_equal(now, same_now)
    assert not np.array_equal(future, other_future)


def test_clips_never_cross_an_episode(platformer):
    """The episodes have 80 frames. Every clip that fits is there, and begins where it says."""
    clips = data.Clips(platformer / "data/platformer", "train", 16)
    assert (clips.starts // 80 == (clips.starts + 15) // 80).all()
    assert len(clips.starts) == 60 * (80 - 15)
    start = clips.draw(1)
    frame = clips.at(start)[0, 5].numpy()
    assert np.allclose(frame * 255, clips.frames[start[0] + 5])


def test_held_out_levels_are_never_trained_on(platformer):
    _, _, train = data.true_actions(platformer / "data/platformer", "train")
    _, _, valid = data.true_actions(platformer / "data/platformer", "valid")
    assert not set(train) & set(valid)


def test_psnr_is_that_of_each_frame():
    """An error of 0.1 everywhere is 20 dB, and no error is 60 dB."""
    a = torch.zeros(1, 2, 4, 4, 3)
    b = a.clone()
    b[:, 0] = 0.1
    assert torch.allclose(data.psnr(a, b), torch.tensor([[20.0, 60.0]]))


# ------------------------------------------------------------------------------- training

# Appendix C: AdamW, a linear warm-up, a cosine down to a tenth. Each model must be able to learn
# one batch by heart: what cannot do that has a gradient missing somewhere. Section 2.1 trains LAM
# and dynamics together, with a stop-gradient between them. Classic mistakes: a resume that starts
# the optimizer and the step count anew, and true actions that leak into training.


def start_of(stage, recipe):
    """A small model, about to learn, and the one batch that it is to learn: a tuple."""
    if stage is dyn:
        m = small_dynamics(recipe, dim=32, vocabulary=64)
        return m.train(), (torch.randint(64, (4, 4, 16)), torch.randint(8, (4, 3)))
    video = [data.play_episode(seed, 4)[0] for seed in range(4)]
    x = torch.from_numpy(np.stack(video))[:, :, 16:48, :32] / 255   # (4, 4, 32, 32, 3)
    m = small_tokenizer(recipe, dim=32) if stage is tok else small_lam(recipe, dim=32)
    # from here ours begins at copying the last frame
    nn.init.zeros_(m.to_pixels.weight)
    return m.train(), (x,)


@both_recipes
@pytest.mark.parametrize("stage", [tok, lam_stage, dyn])
def test_every_stage_learns_one_batch_by_heart(stage, recipe):
    """In 100 steps the error falls below a third."""
    m, batch = start_of(stage, recipe)
    optimizer = st.make_optimizer(m, 3e-3)
    errors = []
    for _ in range(100):
        if stage is dyn:
            loss = error = m(*batch)
        else:
            loss, *_, watch = m(*batch)
            error = watch["error"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(error.item())
    # what is masked changes from step to step
    assert np.mean(errors[-10:]) < errors[0] / 3, f"from {errors[0]:.3f} to {errors[-1]:.3f}"


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


@pytest.fixture
def few(tmp_path, monkeypatch, unscored):
    """The flags of a training of 12 steps, on two levels of 40 frames. Nothing is scored."""
    monkeypatch.setitem(dyn.PRIOR_STEPS, "test", 2)
    data.build_platformer(tmp_path / "small", 2, 40, 0, False)
    return ["--device", "cpu", "--size", "test", "--data", str(tmp_path / "small"),
            "--steps", "12", "--batch", "4", "--frames", "4"]


def checkpoint(folder, stage):
    return st.read_checkpoint(folder / f"{stage}.pt", stage)


@both_recipes
def test_no_training_code_opens_the_true_actions(recipe, few, tmp_path):
    """Their file holds garbage the second time, and whoever opens it stops. Same weights."""
    found = []
    for folder in ("first", "second"):
        for stage in (tok, lam_stage, dyn):
            stage.main([*few, "--recipe", recipe, "--run", str(tmp_path / folder)])
            found.append(checkpoint(tmp_path / folder, stage.__name__)["fingerprint"])
        (tmp_path / "small/true_actions.npz").write_bytes(b"garbage")
    assert found[:3] == found[3:]


@pytest.mark.parametrize("stage, recipe", [(tok, "paper"), (lam_stage, "paper"), (tok, "ours"),
                                           (lam_stage, "ours")])
def test_interrupted_and_resumed_is_bit_identical(stage, recipe, few, tmp_path, monkeypatch):
    """Ctrl-C, --resume, and weights and optimizer equal those of a run that nobody interrupted."""
    # what ours changes on the way: the error in step 4, before the interruption, codes in step 8
    monkeypatch.setitem(lam_stage.ROOT_FROM, "test", 0.3)
    monkeypatch.setitem(lam_stage.RESTART, "test", 0.7)

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


@both_recipes
def test_cotraining_stops_the_gradient_at_the_actions(recipe, few, tmp_path):
    """Whatever the dynamics learns, the LAM beside it comes out the same, to the bit."""
    models = []

    class Kept(dyn.MODELS[recipe]):
        def __init__(self, **config):
            super().__init__(**config)
            models.append(self)

    flags = [*few, "--recipe", recipe, "--run", str(tmp_path)]
    tok.main(flags)
    lams = []
    for lr in ("3e-3", "1e-5"):
        dyn.main([*flags, "--cotrain", "--overwrite", "--lr", lr], model_class=Kept)
        lams.append(checkpoint(tmp_path, "lam"))
        assert checkpoint(tmp_path, "dynamics")["origin"]["lam"] == lams[-1]["fingerprint"]
    assert lams[0]["step"] == 12
    assert lams[0]["fingerprint"] == lams[1]["fingerprint"], "the dynamics' loss reached the LAM"
    for model in models:
        assert not model.codebook.requires_grad, "a gradient leads from the dynamics to the LAM"


# ------------------------------------------------------------------------------- the prior

# Ours. After training, a small network learns which codes can come next, and play.py asks it before
# it plays a code that no video has ever shown there. It must know the past alone: a prior that sees
# the frame to which a code leads would be sure of every code, and of no use in play.


def guesses(m, z, a):
    """What the prior thinks after each frame of z (B, T, N), told actions a (B, T-1)."""
    return m.prior(z, m.before(z), m.actions(a))


def test_prior_knows_two_frames_and_the_action_between():
    m = small_dynamics("ours")
    m.prior.appearance.normal_()
    nn.init.normal_(m.prior.head.weight)
    z, w = with_new_frame(torch.randint(24, (2, 6, 16)), 4)
    a, b = with_new_frame(torch.randint(7, (2, 5)), 4)
    before = guesses(m, z, a)
    assert changed(before, guesses(m, w, a)) == [False, False, False, True, True, False]
    assert changed(before, guesses(m, z, b)) == [False, False, False, False, True, False]


# ------------------------------------------------------------------------------- a world

# All stages, one after the other, as a user runs them. A world in miniature, of two minutes, must
# have learned something. The paper's recipe only has to run here: it wants more steps.


def scores(folder, stage):
    return json.loads((folder / f"runs/platformer/{stage}.json").read_text())


def test_miniature_tokenizer_beats_copying(world):
    found = scores(world, "tokenizer")
    assert found["psnr"] > found["copy_psnr"]
    assert found["tokens_in_use"] > 0.5


def test_miniature_codes_mean_the_true_buttons(world):
    found = scores(world, "lam")
    assert found["lam_gain"] > 0.3, "codes dealt at random draw as well as those inferred"
    assert found["codes_in_use"] >= 3
    assert found["action_accuracy"] > found["chance"] + 2 * found["action_accuracy_se"]


def test_miniature_world_obeys_its_codes(world):
    found = scores(world, "dynamics")
    assert found["delta_psnr"] > 2 * found["delta_psnr_se"] > 0, "random codes do as well"


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
