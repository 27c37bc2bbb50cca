"""The properties that must hold, in the order of the paper. Run with: pytest -q test_genie.py

Read it as a lecture. Each section begins with what must be true, where the paper says so, and the
mistake that is made most often. Nearly all of these mistakes were found in published code. They
leave every shape right, and the loss still falls. So a test changes one thing that goes in, and
looks at what changes in what comes out. It does not ask how that is computed. Each test says what
would be wrong if it failed.

Most run for both recipes. More stand in lab/: test_ours.py for what we added, test_training.py for
resuming and sizes, test_use.py for what users do wrong, test_planted.py for whether a test sees the
mistake that it is for.
"""
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import dynamics as dyn
import lam as lam_stage
import st_block as st
import tokenizer as tok
# the last four are fixtures
from lab.conftest import (checkpoint, scores, small_dynamics, small_lam, small_tokenizer, few,
                          platformer, unscored, world)

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
    """If this failed, neighbours on the grid would be no neighbours in the frame."""
    # patch 4 of a grid three patches wide is the second one of the second row
    x = torch.rand(2, 3, 16, 24, 3)
    patches = st.patchify(x, 8)
    assert torch.equal(patches[1, 2, 4].view(8, 8, 3), x[1, 2, 8:16, 8:16]), "another square"
    assert torch.equal(st.unpatchify(patches, 8, 16, 24), x), "unpatchify is not the inverse"


def test_attention_by_hand_is_the_fast_attention():
    """If this failed, the lines that one can read would not be what is computed."""
    q, k, v = torch.randn(3, 2, 4, 6, 8)
    for mask in (None, torch.ones(6, 6, dtype=torch.bool).tril()):
        by_hand = st.attention_by_hand(q, k, v, mask)
        assert torch.allclose(by_hand, st.attention(q, k, v, mask), atol=1e-6), "they differ"


def test_spatial_attention_stays_in_its_frame():
    """If this failed, a token could look at later frames, past the causal mask."""
    m = st.STTransformer(4, 16, 1, 2, window=8, ffw=1)
    # time is switched off
    nn.init.zeros_(m.blocks[0].time.out.weight)
    own_frame = (torch.arange(8) == 3)[:, None].expand(8, 4)
    assert torch.equal(touched(m, (3, 2)), own_frame), "not all of its frame, or another one"


def test_temporal_attention_stays_in_its_place_and_looks_back_only():
    """If this failed, a model could read the answer in a later frame. In play there is none."""
    m = st.STTransformer(4, 16, 1, 2, window=8, ffw=1)
    # space is switched off
    nn.init.zeros_(m.blocks[0].space.out.weight)
    now_and_later = torch.arange(8)[:, None] >= 3
    own_place = now_and_later & (torch.arange(4) == 2)
    assert torch.equal(touched(m, (3, 2)), own_place), "the past, or another place, has changed"


def test_a_frame_sees_its_window_and_no_further():
    """If this failed, play, whose cache holds a window, would differ from training."""
    m = st.STTransformer(4, 16, 1, 2, window=3, ffw=1)
    reached = touched(m, (3, 2)).any(1).nonzero().flatten().tolist()
    assert reached == [3, 4, 5], "in a window of 3, frame 3 touches these and no others"


def test_the_order_of_the_past_matters():
    """If this failed, a model would see the past as a set, and could not tell left from right."""
    m = st.STTransformer(4, 16, 1, 2, window=8, ffw=1)
    x = torch.randn(1, 4, 4, 16)
    swapped = x[:, [1, 0, 2, 3]]
    assert not torch.allclose(m(x)[:, 3], m(swapped)[:, 3], atol=1e-6), "time is not told"


def test_time_is_relative():
    """If this failed, a cache could not go on for ever: what it keeps was turned by its time."""
    q, k = torch.randn(2, 6, 8)
    found = []
    for start in (0, 1000):
        turn = st.rotary(torch.arange(start, start + 6), 8)
        found.append(st.rotate(q, *turn) @ st.rotate(k, *turn).T)
    assert torch.allclose(found[0], found[1], atol=1e-3), "it matters when the frames are"


# ------------------------------------------------------------------------------- the quantizer

# VQ-VAE, equation 3. Rounding to the nearest code has no gradient, so the decoder's is handed to
# the encoder as if nothing had been rounded. Codes move to their vectors, and vectors stay near
# their codes. The classic mistake is a codebook that gets no gradient at all. (Dead codes, and how
# ours revives them: lab/test_ours.py.)


@both_quantizers
def test_a_vector_becomes_the_nearest_code(quantizer):
    """If this failed, the decoder would be told something else than the token says."""
    vq = quantizer(16, 4, beta=0.25).eval()
    z = F.rms_norm(torch.randn(10, 4), (4,))
    e, index, _ = vq(z)
    assert torch.equal(index, torch.cdist(z, vq.codebook).argmin(-1)), "not the nearest"
    assert torch.allclose(e, vq.codebook[index], atol=1e-6), "not its vector"


@both_quantizers
def test_the_gradient_goes_straight_through(quantizer):
    """If this failed, the encoder would not learn from the decoder, for rounding has no slope."""
    vq = quantizer(16, 4, beta=0.25).eval()
    z = torch.randn(10, 4, requires_grad=True)
    direction = torch.randn(10, 4)
    rounded, _, _ = vq(z)
    # ours brings vectors to unit length before it rounds them
    unrounded = vq.norm(z) if quantizer is st.OnlineKMeans else z
    got, = torch.autograd.grad((rounded * direction).sum(), z)
    expected, = torch.autograd.grad((unrounded * direction).sum(), z)
    assert torch.allclose(got, expected, atol=1e-6), "not as if it had not been rounded"


def test_a_code_moves_to_the_vectors_that_chose_it():
    """If this failed, the codebook would stay as it began. (VQ-VAE's codebook loss.)"""
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
    """If this failed, vectors would run away from their codes. (VQ-VAE's commitment loss.)"""
    vq = st.VectorQuantizer(16, 4, beta=0.25)
    z = torch.randn(1, 4, requires_grad=True)
    _, index, loss = vq(z)
    on_vector, on_codes = torch.autograd.grad(loss, (z, vq.codebook))
    expected = -0.25 * on_codes[index[0]]
    assert torch.allclose(on_vector[0], expected, atol=1e-7), "not beta times the pull on the code"


# ------------------------------------------------------------------------------- the tokenizer

# Section 2.1, ST-ViViT: a VQ-VAE whose encoder and decoder both run through time, causally. Token
# z_t knows x_1..x_t, and frame t is decoded from z_1..z_t. The classic mistake is to decode each
# new frame of a game alone, as if it were the first of a clip (see the cache, below).


@both_recipes
@torch.no_grad()
def test_tokenizer_encodes_causally(recipe):
    """If this failed, tokens would know of frames that are not yet there in play."""
    m = small_tokenizer(recipe)
    x, y = with_new_frame(torch.rand(1, 6, 32, 32, 3), 4)
    difference = changed(m.features(x), m.features(y))
    assert difference == [False, False, False, True, True, True], "frames 4 to 6 change, no others"


@both_recipes
@torch.no_grad()
def test_tokenizer_decodes_causally_and_remembers(recipe):
    """If this failed, shown frames would change later, or each be drawn as the first of a clip."""
    m = small_tokenizer(recipe)
    z, w = with_new_frame(torch.randint(24, (1, 6, 16)), 4)
    difference = changed(m.decode(z), m.decode(w))
    assert difference == [False, False, False, True, True, True], "frames 4 to 6 change, no others"


@both_recipes
def test_tokenizer_draws_from_codes_alone(recipe):
    """If this failed, pixels would pass the quantizer by, and in play there are none."""
    m = small_tokenizer(recipe)
    # if all vectors are alike, so are all tokens, and then two clips are drawn alike
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
    """If this failed, an action could say only what the past says anyway, or tell of the future."""
    m = small_lam(recipe)
    x, y = with_new_frame(torch.rand(1, 6, 32, 32, 3), 4)
    difference = changed(m.features(x), m.features(y))
    assert difference[2], "a_3 was computed without x_4"
    assert difference[:2] == [False, False], "an action sees further than the next frame"
    # the paper's encoder has a past, ours reads one pair of frames
    assert difference[4] == (recipe == "paper"), "a_5 leads from x_5 to x_6, and x_4 is the past"


@both_recipes
def test_lam_decoder_learns_of_the_next_frame_by_the_action_alone(recipe):
    """If this failed, the decoder would need no action, and actions would mean nothing."""
    m = small_lam(recipe)
    # if all actions are alike, what is drawn for frame 5 does not depend on frame 5
    nn.init.zeros_(m.to_latent.weight)
    x, y = with_new_frame(torch.rand(2, 5, 32, 32, 3), 5)
    drawn = output_of(m.to_pixels, m, x)
    assert torch.equal(drawn, output_of(m.to_pixels, m, y)), "the decoder was handed the answer"


@both_recipes
@torch.no_grad()
def test_lam_decoder_draws_from_the_frames_so_far(recipe):
    """If this failed, it would have to draw a level that it never saw."""
    m = small_lam(recipe)
    x, y = with_new_frame(torch.rand(1, 4, 32, 32, 3), 2)
    a = torch.randint(8, (1, 4))
    # ours sees one frame only
    remembers = recipe == "paper"
    difference = changed(m.decode(x, a), m.decode(y, a))
    assert difference == [False, True, remembers, remembers], "frame 2 was new"


@both_recipes
@torch.no_grad()
def test_an_action_is_drawn_into_the_frame_it_leads_to_and_none_before(recipe):
    """If this failed, codes would be learned for the frame before, or after, what they name."""
    m = small_lam(recipe)
    x = torch.rand(1, 4, 32, 32, 3)
    a, b = with_new_frame(torch.tensor([[0, 1, 2, 3]]), 3)
    difference = changed(m.decode(x, a), m.decode(x, b))
    assert difference[:3] == [False, False, True], "action 3 belongs to the third prediction"


@both_recipes
def test_the_error_of_the_lam_is_that_of_the_next_frame(recipe):
    """If this failed, it would learn to show the last frame again."""
    m = small_lam(recipe)
    x = torch.rand(2, 5, 32, 32, 3)
    assert m.error(x[:, 1:], x) == 0, "to draw the next frames is no error"
    assert m.error(x[:, :-1], x) > 0.01, "to draw the last ones again is one"


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
    """If this failed, training would read later frames, which play does not have."""
    m = small_dynamics(recipe)
    # of the last frame some tokens are masked, of frame 4 none
    mask_last_frame(m, frames=6)
    z, w = with_new_frame(torch.randint(24, (1, 6, 16)), 4)
    a = torch.randint(8, (1, 5))
    difference = changed(output_of(m.transformer, m, z, a), output_of(m.transformer, m, w, a))
    assert difference == [False, False, False, True, True, True], "frames 4 to 6 change, no others"


@both_recipes
def test_action_reaches_the_frame_it_leads_to_and_not_before(recipe):
    """If this failed, a key would act a frame too early or too late."""
    m = small_dynamics(recipe)
    z = torch.randint(24, (1, 6, 16))
    # action 3 leads from frame 3 to frame 4
    a, b = with_new_frame(torch.tensor([[0, 1, 2, 3, 4]]), 3)
    difference = changed(output_of(m.transformer, m, z, a), output_of(m.transformer, m, z, b))
    assert difference[3], "action 3 does not reach frame 4"
    assert difference[:3] == [False, False, False], "action 3 was known before it was pressed"


def test_the_mask_rate_is_drawn_for_each_clip():
    """If this failed, MaskGIT's first step, at which all is masked, would be new to the model."""
    m = small_dynamics("paper")
    hidden = m.draw_mask(torch.zeros(2000, 3, 200, dtype=torch.long))
    rate = hidden[:, 1:].float().mean((1, 2))
    # U(0.5, 1) has a mean of 0.75 and a standard deviation of 0.144
    assert rate.mean().item() == pytest.approx(0.75, abs=0.02), "too few or too many are masked"
    assert rate.std().item() == pytest.approx(0.144, abs=0.015), "clips are masked alike"


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
    """If this failed, the model would learn to guess the prompt, which play is given."""
    seen, asked = seen_and_asked(recipe)
    assert seen[:16].all(), "part of the first frame was masked"
    assert not asked[:16].any(), "the loss asks for the prompt"


@both_recipes
def test_the_loss_asks_for_what_is_hidden_and_for_nothing_else(recipe):
    """If this failed, the model would learn to copy what it sees, or be asked for too little."""
    seen, asked = seen_and_asked(recipe)
    assert asked.any(), "the loss asks for no true token: are the targets the masks?"
    assert torch.equal(seen, ~asked), "a token was both seen and asked for, or neither"


@both_recipes
def test_what_is_masked_cannot_be_read_anywhere(recipe):
    """If this failed, the model would find the answers in what it is given."""
    m = small_dynamics(recipe)
    z = torch.randint(24, (1, 4, 16))
    a = torch.randint(8, (1, 3))
    masked = mask_last_frame(m, frames=4)
    before = output_of(m.transformer, m, z, a)
    # change one token of the last frame: where it was masked, the model cannot tell
    for place in range(16):
        w = z.clone()
        w[0, 3, place] = (z[0, 3, place] + 1) % 24
        unnoticed = torch.equal(output_of(m.transformer, m, w, a), before)
        assert unnoticed == masked[0, 3, place], f"token {place}: masked is unseen, given is seen"


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
    """If this failed, a frame would never be finished, or its first tokens would not count."""
    film = []
    predict = stand_in(torch.randn(64, 10))
    z = dyn.maskgit(predict, 4, 64, 10, steps=steps, order=order, film=film)
    for before, after in zip(film, film[1:]):
        drawn = before != 10
        assert torch.equal(before[drawn], after[drawn]), "a token was drawn a second time"
        assert (after != 10).sum() > drawn.sum(), "a step drew nothing"
    assert len(film) == steps, "another number of steps"
    assert (film[0] == 10).float().mean() > 0.9, "a cosine begins slowly"
    assert (z < 10).all(), "a hole was left"


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_divides_logits(temperature):
    """If this failed, the temperature would do nothing, or something else than its name says."""
    torch.manual_seed(0)
    logits = torch.randn(64, 10)
    z = dyn.maskgit(stand_in(logits), 4000, 64, 10, steps=1, temperature=temperature)
    # the standard error of a share is 0.008 at most
    share = F.one_hot(z[:, 0], 10).float().mean(0)                  # (64, 10)
    off = (share - (logits / temperature).softmax(-1)).abs().max()
    assert off < 0.04, f"a share is off by {off:.2f}: not softmax(logits / temperature)"


def test_each_step_sees_what_the_steps_before_it_drew():
    """If this failed, many steps would be as blind as one: half a hero here, half a hero there."""
    # tokens that must all agree cannot when drawn at once, and do when drawn in turn
    def agree(z, place):
        # tokens that are drawn already vote, strongly
        votes = F.one_hot(z.clamp(max=9), 10) * (z < 10).unsqueeze(-1)
        votes = votes.sum(2, keepdim=True).clamp(max=1)             # (B, 1, 1, 10)
        return 20.0 * votes.expand(-1, -1, place.size(-1), -1)

    def variety(steps):
        torch.manual_seed(0)
        z = dyn.maskgit(agree, 16, 64, 10, steps=steps)
        return np.mean([len(frame.unique()) for frame in z])

    assert variety(1) > 8, "drawn at once, they cannot know of each other"
    assert variety(64) < 2, "drawn in turn, they did not see each other"


# ------------------------------------------------------------------------------- cache and rollout

# Section 2.2 defines play: go on from the prompt, frame by frame. The past never depends on the new
# frame, so its keys and values can be kept. The cache must give the very tokens of the plain loop,
# also when the window has slid. Classic mistakes: a cache that is right up to the length of the
# training clips only, and a frame that is remembered as its first draft.


@torch.no_grad()
def test_cached_frames_equal_the_whole_past():
    """If this failed, a world would remember another past than the one that it has shown."""
    # thirteen frames one by one, in a window of four
    m = st.STTransformer(4, 16, 3, 2, window=4, ffw=1)
    x = torch.randn(2, 13, 4, 16)
    cache = m.new_cache(2)
    frames = []
    for t in range(13):
        # MaskGIT looks at drafts of a frame before it is done
        m(torch.randn(2, 1, 4, 16), cache)
        frames.append(m(x[:, t:t + 1], cache))
        cache.advance()
    assert torch.allclose(torch.cat(frames, 1), m(x), atol=1e-5), "not what the whole past gives"
    assert all(kept.size(2) == 4 for kept in cache.keys + cache.values), "the cache grows"


@both_recipes
def test_generate_draws_what_the_rollout_draws(recipe):
    """If this failed, what play does would not be what the twelve lines of `rollout` say."""
    rollout = dict(paper=dyn.rollout, ours=dyn.rollout_ours)[recipe]
    # nine frames on, in a window of four
    m = small_dynamics(recipe)
    z = torch.randint(24, (2, 2, 16))
    a = torch.randint(8, (2, 10))
    torch.manual_seed(0)
    plain = rollout(m, z, a, steps=3)
    torch.manual_seed(0)
    cached = dyn.generate(m, z, a, steps=3)
    assert plain.shape == (2, 11, 16), "two frames of prompt and nine more"
    assert torch.equal(plain[:, :2], z), "it does not begin with the prompt"
    assert torch.equal(plain, cached), "the same luck gave other tokens"


@both_recipes
@torch.no_grad()
def test_frames_decoded_one_by_one_equal_those_decoded_together(recipe):
    """If this failed, each frame of play would be drawn as if it were the first of a clip."""
    m = small_tokenizer(recipe)
    z = torch.randint(24, (2, 11, 16))
    cache = m.decoder.new_cache(2)
    frames = []
    for frame in z.split(1, 1):
        frames.append(m.decode(frame, cache))
        cache.advance()
    assert torch.allclose(torch.cat(frames, 1), m.decode(z), atol=1e-5), "the decoder forgets"


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
    """If this failed, nobody could say what would have happened under another button."""
    game = data.Platformer(7)
    first, second = np.random.default_rng(0).integers(0, 6, (2, 60))
    once = frames_after(game, first)
    assert np.array_equal(once, frames_after(data.Platformer(7), first)), "it depends on luck"
    saved = game.save()
    once = frames_after(game, second)
    game.restore(saved)
    assert np.array_equal(once, frames_after(game, second)), "something was not restored"


def test_one_frame_does_not_show_the_momentum():
    """If this failed, a model would need no past, and the past would not be tested."""
    game = data.Platformer(7)
    x, y, _, _, *rest = game.save()
    pictures = []
    for vx, vy in ((0, 0), (4, -8)):
        game.restore((x, y, vx, vy, *rest))
        pictures.append((game.frame(), frames_after(game, [2])))
    (now, future), (same_now, other_future) = pictures
    assert np.array_equal(now, same_now), "the speed shows in a frame"
    assert not np.array_equal(future, other_future), "the speed makes no difference"


def test_clips_never_cross_an_episode(platformer):
    """If this failed, models would learn that levels change in a twinkling."""
    # there are 60 episodes of 80 frames
    clips = data.Clips(platformer / "data/platformer", "train", 16)
    assert (clips.starts // 80 == (clips.starts + 15) // 80).all(), "a clip runs into the next one"
    assert len(clips.starts) == 60 * (80 - 15), "a clip that fits is missing"
    start = clips.draw(1)
    frame = clips.at(start)[0, 5].numpy()
    assert np.allclose(frame * 255, clips.frames[start[0] + 5]), "it begins elsewhere"


def test_held_out_levels_are_never_trained_on(platformer):
    """If this failed, a score would tell how well a level was learned by heart."""
    _, _, train = data.true_actions(platformer / "data/platformer", "train")
    _, _, valid = data.true_actions(platformer / "data/platformer", "valid")
    assert not set(train) & set(valid), "a level is in both splits"


def test_psnr_is_that_of_each_frame():
    """If this failed, scores could not be compared with those of papers."""
    # an error of 0.1 everywhere is 20 dB, and no error is 60 dB
    a = torch.zeros(1, 2, 4, 4, 3)
    b = a.clone()
    b[:, 0] = 0.1
    found = data.psnr(a, b)
    assert torch.allclose(found, torch.tensor([[20.0, 60.0]])), "not -10 log10(MSE) of each frame"


# ------------------------------------------------------------------------------- training

# Each model must be able to learn one batch by heart: what cannot do that has a gradient missing
# somewhere. Section 2.1 trains LAM and dynamics together, with a stop-gradient between them. The
# classic mistake is a leak: of the true actions into training, or of the dynamics' loss into the
# LAM. (The learning rate of appendix C, and resuming: lab/test_training.py.)


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
    """If this failed, a gradient would be missing somewhere, and no training could succeed."""
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
    # (each step masks other tokens: hence the mean)
    assert np.mean(errors[-10:]) < errors[0] / 3, f"from {errors[0]:.3f} to {errors[-1]:.3f}"


@both_recipes
def test_no_training_code_opens_the_true_actions(recipe, few, tmp_path):
    """If this failed, nothing would have been discovered: the answers had been looked up."""
    found = []
    for folder in ("first", "second"):
        for stage in (tok, lam_stage, dyn):
            stage.main([*few, "--recipe", recipe, "--run", str(tmp_path / folder)])
            found.append(checkpoint(tmp_path / folder, stage.__name__)["fingerprint"])
        # who opens the file the second time is stopped
        (tmp_path / "small/true_actions.npz").write_bytes(b"garbage")
    assert found[:3] == found[3:], "other true actions led to other weights"


@both_recipes
def test_cotraining_stops_the_gradient_at_the_actions(recipe, few, tmp_path):
    """If this failed, actions would be bent to what the dynamics finds easy to draw."""
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
        named = checkpoint(tmp_path, "dynamics")["origin"]["lam"]
        assert named == lams[-1]["fingerprint"], "the dynamics names another LAM"
    assert lams[0]["step"] == 12, "the LAM was not trained along"
    assert lams[0]["fingerprint"] == lams[1]["fingerprint"], "the dynamics' loss reached the LAM"
    for model in models:
        assert not model.codebook.requires_grad, "a gradient leads from the dynamics to the LAM"


# ------------------------------------------------------------------------------- a world

# All stages, one after the other, as a user runs them, with --recipe ours. A world in miniature, of
# two minutes, must have learned something. The classic mistake is to look at the loss alone: it
# falls as well where the codes mean nothing. (The paper's recipe wants more steps than that.)


def test_miniature_tokenizer_beats_copying(world):
    """If this failed, its pictures would be worse than showing the last frame again."""
    found = scores(world, "tokenizer")
    assert found["psnr"] > found["copy_psnr"], "worse than the last frame"
    assert found["tokens_in_use"] > 0.5, "most of the vocabulary is never used"


def test_miniature_codes_mean_the_true_buttons(world):
    """If this failed, what was discovered would be something else than what the player did."""
    found = scores(world, "lam")
    assert found["lam_gain"] > 0.3, "codes dealt at random draw as well as those inferred"
    assert found["codes_in_use"] >= 3, "the codes have collapsed"
    sure = found["action_accuracy"] - 2 * found["action_accuracy_se"]
    assert sure > found["chance"], "one constant button is right as often"


def test_miniature_world_obeys_its_codes(world):
    """If this failed, keys would do nothing."""
    found = scores(world, "dynamics")
    assert found["delta_psnr"] > 2 * found["delta_psnr_se"] > 0, "random codes do as well"
