"""What we added to the paper, piece by piece: is each remedy what its name says?

The properties that both recipes share are in test_genie.py.
"""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import dynamics as dyn
import lam as lam_stage
import st_block as st
from lab.conftest import small_dynamics, small_lam, small_tokenizer
from test_genie import changed, seen_and_asked, with_new_frame

# ------------------------------------------------------------------------------- the quantizer


@pytest.mark.parametrize("quantizer", [st.VectorQuantizer, st.OnlineKMeans])
def test_tokens_are_the_same_under_autocast(quantizer):
    """Distances to a thousand codes drown in bf16: training and play would see other tokens."""
    torch.manual_seed(0)
    vq = quantizer(1024, 32, beta=0.25).eval()
    # vectors as far apart as the codes
    z = vq.codebook.detach().std() * torch.randn(500, 32)
    with torch.autocast("cpu", torch.bfloat16):
        index = vq.nearest(z)
    assert torch.equal(index, vq.nearest(z))


def test_our_code_is_the_mean_of_the_vectors_that_chose_it():
    """If this failed, online k-means would never arrive."""
    torch.manual_seed(0)
    vq = st.OnlineKMeans(8, 4, beta=0.25).train()
    z = F.rms_norm(torch.randn(500, 4), (4,))
    for _ in range(600):
        _, index, _ = vq(z)
    for code in range(8):
        off = (vq.codebook[code] - z[index == code].mean(0)).norm()
        assert off < 0.1, f"code {code} is {off:.2f} away from the mean of its vectors"


def test_our_dead_codes_come_back_to_life():
    """If this failed, few codes would have to say everything."""
    # all codes have lived in one place, far from all vectors: one is the nearest, the rest die
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
    """If this failed, equal codes would tie, and vectors would always choose the first of them."""
    # at first one code is nearest to all vectors, and all others are dead
    torch.manual_seed(0)
    vq = st.OnlineKMeans(32, 4, beta=0.25).train()
    vq(torch.tensor([1.0, 0, 0, 0]) + 0.1 * torch.randn(500, 4))
    distance = torch.cdist(vq.codebook, vq.codebook) + 9 * torch.eye(32)
    assert distance.min() > 1e-3, "two codes are alike"


def test_codes_begin_on_the_data():
    """After one batch no code is longer than the vectors, however many codes there are."""
    torch.manual_seed(0)
    vq = st.OnlineKMeans(1024, 32, beta=0.25).train()
    vq(torch.randn(8192, 32))
    length = vq.codebook.square().mean(1).sqrt()
    assert length.max() < 1.1


def test_a_code_of_two_parts_is_the_nearest_of_all_pairs():
    """Its number stands for the nearest code of either half, and its vector is theirs."""
    torch.manual_seed(0)
    vq = lam_stage.TwoPartQuantizer(6, 8, beta=0.25).eval()
    v = torch.randn(50, 8)
    e, index, _ = vq(v)
    assert vq.codebook.shape == (6, 8)
    assert torch.allclose(e, vq.codebook[index], atol=1e-6), "not the vector of its number"
    assert torch.equal(index, torch.cdist(vq.norm(v), vq.codebook).argmin(-1)), "not the nearest"
    assert torch.equal(index, vq.nearest(v)), "nearest says another code than forward"


@pytest.mark.parametrize("codes, parts", [(9, (3, 3)), (8, (4, 2)), (6, (3, 2)), (7, (7, 1))])
def test_codes_are_split_into_two_numbers_as_alike_as_can_be(codes, parts):
    assert lam_stage.two_factors(codes) == parts


# ------------------------------------------------------------------------------- the tokenizer


@pytest.mark.parametrize("recipe", ["paper", "ours"])
def test_frames_of_one_colour_do_no_harm(recipe):
    """Ours divides the error by the variance of the pixels, which is 0 here."""
    m = small_tokenizer(recipe).train()
    loss, _ = m(torch.full((2, 3, 32, 32, 3), 0.5))
    loss.backward()
    assert all(p.grad.isfinite().all() for p in m.parameters())


def test_tokenizer_error_is_in_units_of_the_variance():
    """Drawing the mean colour everywhere is an error of 1, on every video."""
    m = small_tokenizer("ours")
    for contrast in (1, 0.1):
        x = contrast * torch.rand(2, 4, 32, 32, 3)
        assert m.error(x.mean().expand_as(x), x).item() == pytest.approx(1, rel=0.01)


# ------------------------------------------------------------------------------- latent actions


@torch.no_grad()
def test_the_lam_reads_nothing_where_nothing_happens():
    """Its two readings cancel, whatever the frames show: standing still has one code."""
    m = small_lam("ours")
    x = torch.rand(3, 1, 32, 32, 3).expand(-1, 4, -1, -1, -1)
    assert m.features(x).abs().max() < 1e-5
    assert len(m.encode(x).unique()) == 1


@torch.no_grad()
def test_a_negative_reads_like_the_picture():
    """By motion energy a code means the same on light levels and on dark ones."""
    m = small_lam("ours")
    x = torch.rand(2, 4, 32, 32, 3)
    assert torch.allclose(m.features(1 - x), m.features(x), atol=1e-5)
    assert not torch.allclose(m.features(x.flip(1)), m.features(x), atol=1e-2), "it is blind"


@torch.no_grad()
def test_a_mirror_turns_round_what_goes_sideways():
    """And it leaves what goes up and down as it was: so each half names one of the two."""
    m = small_lam("ours")
    x = torch.rand(2, 4, 32, 32, 3)
    sideways, upwards = m.features(x).chunk(2, -1)
    mirrored, same = m.features(x.flip(3)).chunk(2, -1)
    assert sideways.abs().max() > 1e-3 and upwards.abs().max() > 1e-3, "it is blind"
    assert torch.allclose(mirrored, -sideways, atol=1e-5)
    assert torch.allclose(same, upwards, atol=1e-5)


@torch.no_grad()
def test_a_jump_by_a_whole_patch_has_a_direction():
    """Of a thing on the grid each patch alone sees that it came or went, and not from where."""
    m = small_lam("ours")
    # each patch by itself
    m.encoder = nn.Identity()
    x = torch.zeros(2, 2, 32, 32, 3)
    x[:, 0, 16:24, 8:16] = torch.rand(8, 8, 3)
    # the first clip: up by a patch; the second one: down
    x[0, 1] = x[0, 0].roll(-8, 0)
    x[1, 1] = x[1, 0].roll(8, 0)
    up, down = m.features(x)[:, 0, 4:]
    assert (up - down).abs().max() > 1e-3 * up.abs().max()


def test_shifted_clips_are_for_the_encoder_in_training():
    """Half of the clips are rolled by less than a patch, not always by the same."""
    m = small_lam("ours")
    x = torch.rand(4, 3, 32, 32, 3)
    assert torch.equal(m.shown_to_encoder(x), x), "in use every clip is read as it is"
    m.train()
    ways = set()
    for seed in range(8):
        torch.manual_seed(seed)
        seen = m.shown_to_encoder(x)
        assert torch.equal(seen[2:], x[2:])
        for way in np.ndindex(8, 8):
            if torch.equal(seen[:2], x[:2].roll(way, (2, 3))):
                ways.add(way)
    assert len(ways) > 4


def test_the_decoder_sees_no_shifted_clips():
    m = small_lam("ours").train()
    x = torch.rand(4, 3, 32, 32, 3)
    seen = []

    def keep(module, inputs, output):
        seen.append(output.detach())

    m.embed_past.register_forward_hook(keep)
    for seed in range(3):
        torch.manual_seed(seed)
        m(x)
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])


def test_the_decoder_begins_at_copying_the_last_frame():
    m = lam_stage.build("ours", height=32, width=32, window=4, patch=8, dim=16, layers=1, heads=2,
                        codes=8, latent_dim=8)
    x = torch.rand(1, 3, 32, 32, 3)
    assert torch.equal(m.predict(x, torch.randn(1, 3, 8)), x)


def test_the_error_leaves_out_the_border():
    """What comes into view at the edges is nobody's action, and nobody is blamed for it."""
    m = small_lam("ours")
    x = torch.rand(2, 4, 32, 32, 3)
    for row, counts in ((7, False), (8, True)):
        drawn = x[:, 1:].clone()
        drawn[:, :, row, 8:24] += 0.5
        assert (m.error(drawn, x) > 0) == counts, f"row {row}"


@pytest.mark.parametrize("rooted", [False, True])
def test_the_error_is_in_units_of_copying(rooted):
    """Drawing the last frame again is an error of 1, on every video."""
    m = small_lam("ours")
    m.rooted = rooted
    for contrast in (1, 0.01):
        x = contrast * torch.rand(2, 4, 32, 32, 3)
        assert m.error(x[:, :-1], x).item() == pytest.approx(1, rel=0.01)


def test_the_root_of_the_error_cares_for_little_motions():
    """A jump beside a view that scrolls: to miss it is nothing in a mean of squares."""
    m = small_lam("ours")
    x = torch.zeros(1, 3, 32, 32, 3)
    # much happens in the first transition, and little in the second
    x[:, 1:] += 0.3
    x[:, 2:, 8:12, 8:12] += 0.3
    # the first is drawn right, the second is missed
    drawn = torch.stack([x[:, 1], x[:, 1]], 1)
    plain = m.error(drawn, x)
    m.rooted = True
    assert plain < 0.1 < 0.15 < m.error(drawn, x)


@pytest.mark.parametrize("rooted", [False, True])
def test_a_batch_in_which_nothing_moves_does_no_harm(rooted):
    """The error of copying is 0 there, and a root has no gradient at 0."""
    m = small_lam("ours").train()
    m.rooted = rooted
    loss, _, _ = m(torch.rand(4, 1, 32, 32, 3).expand(-1, 3, -1, -1, -1))
    loss.backward()
    assert all(p.grad.isfinite().all() for p in m.parameters() if p.grad is not None)


# ------------------------------------------------------------------------------- the dynamics


def test_our_noise_puts_wrong_tokens_among_those_that_are_given():
    """If this failed, a world would fall apart of its own mistakes, which it had never seen."""
    # tokens from 64 on are not in the clips
    seen, _ = seen_and_asked("ours", vocabulary=128, clips=8, noise=1.0)
    assert seen[64:].sum() >= 8, "nothing was wrong: noise has no effect"


def test_our_noise_is_never_asked_for():
    """If this failed, the model would learn to make noise."""
    _, asked = seen_and_asked("ours", vocabulary=128, clips=8, noise=1.0)
    assert not asked[64:].any(), "the targets must be the tokens before the noise"


def test_the_canvas_shows_what_was_in_a_place_and_around_it():
    """A frame is drawn over the last one: a token there shows in its place and the eight around."""
    m = small_dynamics("ours")
    z = torch.zeros(1, 2, 16, dtype=torch.long)
    w = z.clone()
    # frame 1, row 1, column 2
    w[0, 0, 6] = 5
    shows = (m.paint(m.before(z)) != m.paint(m.before(w))).any(-1)[0].view(2, 4, 4)
    expected = torch.zeros(2, 4, 4, dtype=torch.bool)
    expected[1, 0:3, 1:4] = True
    assert torch.equal(shows, expected)


def test_our_mask_rate_is_drawn_for_each_frame():
    """Half of the frames are wholly masked, as at the first MaskGIT step, the others by
    U(0.25, 1): their mean is 0.625 and their standard deviation 0.217."""
    m = small_dynamics("ours")
    hidden = m.draw_mask(torch.zeros(2000, 3, 200, dtype=torch.long))
    rate = hidden[:, 1:].float().mean(2)                            # (2000, 2)
    assert (rate == 1).float().mean().item() == pytest.approx(0.5, abs=0.04)
    both = (rate == 1).all(1).float().mean().item()
    assert both == pytest.approx(0.25, abs=0.04), "the frames of a clip are masked alike"
    some = rate[rate < 1]
    assert some.mean().item() == pytest.approx(0.625, abs=0.02)
    assert some.std().item() == pytest.approx(0.217, abs=0.015), "frames are masked alike"


def test_sampling_by_confidence_draws_the_surest_first():
    """Along this frame the model grows ever surer, so it is filled from its end."""
    torch.manual_seed(0)
    logits = torch.zeros(64, 10)
    logits[:, 3] = torch.linspace(0, 12, 64)
    film = []

    def predict(z, place):
        return logits[None, None].take_along_dim(place.unsqueeze(-1), 2)

    dyn.maskgit(predict, 1, 64, 10, steps=8, order="confidence", film=film)
    first = (film[1][0, 0] != 10).nonzero()
    assert first.float().mean() > 45


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_sampling_apart_in_few_steps_fills_every_hole(steps):
    """Several corners are drawn at once, none twice."""
    film = []
    z = dyn.maskgit_apart(lambda z, place: torch.zeros(*place.shape, 10), 2, 15, 10, steps=steps,
                          columns=5, film=film)
    assert (z != 10).all() and len(film) == steps
    for before, after in zip(film, film[1:]):
        assert torch.equal(before[before != 10], after[before != 10])


@pytest.mark.parametrize("steps", [4, 7, 8])
def test_sampling_apart_never_draws_neighbours_together(steps):
    """No two of the tokens that one step draws touch, not even by a corner."""
    torch.manual_seed(0)
    film = []
    drawn = []

    def predict(z, place):
        assert (z.gather(-1, place) == 10).all(), "what is drawn was not masked"
        drawn.append(torch.zeros(3, 1, 64).scatter(-1, place, 1).view(3, 1, 8, 8))
        return torch.zeros(*place.shape, 10)

    dyn.maskgit_apart(predict, 3, 64, 10, steps=steps, columns=8, film=film)
    assert (film[-1] != 10).all(), "a hole was left"
    assert len(drawn) == steps
    for now in drawn:
        # in every square of 2x2 places, wherever it lies, one was drawn
        assert (F.avg_pool2d(now, 2, 1) == 0.25).all()
    # from the fifth step on, what was drawn first is drawn anew
    for first, again in zip(drawn, drawn[4:]):
        assert torch.equal(first, again)


def test_given_tokens_reach_their_neighbours_before_any_block():
    """What is given at one place tells the eight around it, and at first nothing."""
    torch.manual_seed(0)
    m = small_dynamics("ours")
    x = torch.randn(1, 1, 16, m.embed.embedding_dim)
    assert torch.equal(m.given(x), x), "it begins as if it were not there"
    nn.init.normal_(m.given.conv.weight)
    y = x.clone()
    y[0, 0, 5] += 1
    told = (m.given(x) != m.given(y)).any(-1).view(4, 4)
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[0:3, 0:3] = True
    assert torch.equal(told, expected)


def test_temperature_zero_takes_the_likeliest():
    logits = torch.randn(100, 10)
    assert torch.equal(dyn.sample(logits, 0.0), logits.argmax(-1))


@pytest.mark.parametrize("recipe", ["paper", "ours"])
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


# ------------------------------------------------------------------------------- the prior


def guesses(m, z, a):
    """What the prior thinks after each frame of z (B, T, N), told actions a (B, T-1)."""
    return m.prior(z, m.before(z), m.actions(a))


def small_prior():
    """A small dynamics model, each of its tokens with a look of its own."""
    m = small_dynamics("ours")
    m.prior.appearance.normal_()
    return m


def test_prior_embeds_few_tokens_as_it_embeds_many():
    """In training each token of the vocabulary is embedded once, in play only those in sight."""
    m = small_prior()
    nn.init.normal_(m.prior.head.weight)
    z = torch.randint(24, (2, 6, 16))
    a = torch.randint(8, (2, 5))
    many = guesses(m, z, a)
    assert torch.allclose(many[:1, :1], guesses(m, z[:1, :1], a[:1, :0]), atol=1e-5)


def test_prior_knows_two_frames_and_the_action_between():
    """One that sees the frame to which a code leads is sure of every code, and no use in play."""
    m = small_prior()
    nn.init.normal_(m.prior.head.weight)
    z, w = with_new_frame(torch.randint(24, (2, 6, 16)), 4)
    a, b = with_new_frame(torch.randint(7, (2, 5)), 4)
    before = guesses(m, z, a)
    assert changed(before, guesses(m, w, a)) == [False, False, False, True, True, False]
    assert changed(before, guesses(m, z, b)) == [False, False, False, False, True, False]


def test_prior_and_dynamics_do_not_teach_each_other():
    m = small_prior()
    nn.init.normal_(m.prior.head.weight)
    z = torch.randint(24, (2, 6, 16))
    a = torch.randint(8, (2, 5))

    def taught():
        names = set()
        for name, p in m.named_parameters():
            if p.grad is not None and p.grad.any():
                names.add(name.split(".")[0])
        return names

    m(z, a).backward()
    assert "head" in taught() and "prior" not in taught()
    m.zero_grad()
    m.prior.requires_grad_(True)
    dyn.surprise(m, z, a).backward()
    assert taught() == {"prior"}


def test_prior_knows_what_can_come_next_by_what_tokens_look_like(monkeypatch):
    """The look of the first token tells which two codes can come. Tokens that never came in
    training look like others that did, so the prior understands them as well. Learned once more,
    as after --resume, it is the same to the bit."""
    monkeypatch.setitem(dyn.PRIOR_STEPS, "test", 150)
    m = small_prior()
    m.prior.appearance[12:24] = m.prior.appearance[:12] + 0.05 * torch.randn(12, 192)
    tokens = torch.randint(12, (1200, 16))
    actions = 2 * (tokens[:, 0] % 4) + torch.randint(2, (1200,))
    clips = SimpleNamespace(starts=np.arange(1196))
    args = SimpleNamespace(seed=0, size="test", frames=4, device=torch.device("cpu"), compile="off")
    dyn.learn_prior(m, tokens, actions, clips, args)
    once = m.prior.head.weight.clone()
    z = torch.randint(12, (16, 1, 16))
    nothing = torch.zeros(16, 0, dtype=torch.long)
    possible = 2 * (z[:, 0, :1] % 4) + torch.arange(2)              # (16, 2)
    for frames in (z, z + 12):
        likely = guesses(m, frames, nothing)[:, 0].softmax(-1)      # (16, 8)
        assert likely.gather(1, possible).sum(1).mean() > 0.8
    dyn.learn_prior(m, tokens, actions, clips, args)
    assert torch.equal(m.prior.head.weight, once)


class Luck(nn.Module):
    """A stand-in for the prior: it expects less of the code that came last, and else guesses.

    The tokens of a frame are the code that led to it.
    """

    def __init__(self):
        super().__init__()
        self.floor = torch.zeros(9, 8)

    def forward(self, z, last, e):
        return torch.rand(*z.shape[:2], 8).log() - 2 * F.one_hot(z[..., 0], 8)


def test_the_floor_tells_what_is_rare():
    """It is a share of the usual chance of a code, after each code before it."""
    torch.manual_seed(0)
    m = small_dynamics("ours")
    m.prior = Luck()
    # 3 or 4, but 1 a few times
    actions = torch.randint(3, 5, (60000,))
    actions[:9] = 1
    tokens = F.pad(actions[:-1], (1, 0))[:, None].expand(-1, 16)
    table = dyn.floor_of(m, tokens, actions, np.arange(59997), 4)
    for last, code in ((3, 3), (3, 4), (4, 3), (4, 4)):
        moments = m.prior(torch.full((20000, 1, 1), last), None, None)
        new = moments[:, 0].softmax(-1)[:, code]
        weight = 1 / new.clamp(min=0.002)
        below = weight[new < table[last, code] / dyn.RARE].sum() / weight.sum()
        assert below.item() == pytest.approx(0.5, abs=0.05), "the usual chance is no median"
    assert torch.equal(table[0, 3], table[1, 3]), "what never came before 3 says nothing of it"
    assert (table[:, [0, 2, 5, 6, 7]] == 1).all(), "a code that never came is always rare"


class Seldom(nn.Module):
    """A stand-in for the prior: where the token is 0, code 3 comes in half of the moments, else in
    a tenth of them. It knows that, and is never sure to a hair."""

    def __init__(self):
        super().__init__()
        self.floor = torch.zeros(9, 8)

    def forward(self, z, last, e):
        chance = torch.where(z[..., 0] == 0, 0.5, 0.1) * (1 + 0.01 * torch.rand(z.shape[:2]))
        rest = ((1 - chance) / 7)[..., None].expand(-1, -1, 8).clone()
        rest[..., 3] = chance
        return rest.log()


def test_places_count_not_presses():
    """Of four places, code 3 is liked in one and seldom pressed in three: those are the usual."""
    torch.manual_seed(0)
    m = small_dynamics("ours")
    m.prior = Seldom()
    tokens = torch.randint(4, (60000, 1))
    likely = torch.where(tokens[:, 0] == 0, 0.5, 0.1)
    actions = torch.where(torch.rand(60000) < likely, 3, 5)
    # most presses are in the one place, and yet it is not the usual one
    assert (actions[tokens[:, 0] == 0] == 3).sum() > (actions[tokens[:, 0] > 0] == 3).sum()
    table = dyn.floor_of(m, tokens.expand(-1, 16), actions, np.arange(59997), 4)
    assert table[5, 3].item() == pytest.approx(dyn.RARE * 0.1, rel=0.02)


# ------------------------------------------------------------------------------- game and scores


def test_recorded_buttons_and_what_others_would_have_done():
    """The buttons of a video replay it, and `same` says which others would have, too."""
    video, buttons, same = data.play_episode(11, 60)
    game = data.Platformer(11)
    for t in range(59):
        before = game.save()
        for button in range(6):
            game.restore(before)
            game.step(button)
            assert np.array_equal(game.frame(), video[t + 1]) == same[t, button]
        game.restore(before)
        game.step(buttons[t])
    assert (~same).any(1).mean() > 0.95, "buttons hardly matter"


def test_videos_show_what_a_wall_is():
    """A player who hops over every wall in time teaches nobody that one cannot go through."""
    blocked = 0
    for seed in range(10):
        game = data.Platformer(seed)
        policy = data.Policy(np.random.default_rng(seed))
        for _ in range(200):
            ground = game.on_ground()
            x = game.x
            button = policy(game)
            game.step(button)
            # left or right on the ground, no jump, and no way
            blocked += ground and button in (1, 2) and game.x == x
    assert blocked > 0.015 * 2000, f"{blocked} moments of 2000"


def test_a_frame_has_its_size_at_both_ends_of_a_level():
    game = data.Platformer(7)
    for x in (4 * data.TILE, (data.WIDTH - 4) * data.TILE - data.PLAYER_W):
        game.x = x
        assert game.frame().shape == (64, 64, 3)


def test_displacement_is_that_of_the_camera():
    wide = torch.rand(2, 32, 48, 3)

    def view(x, y):
        return wide[:, y:y + 20, x:x + 20]

    for dx, dy in ((0, 0), (4, 0), (-2, 0), (3, -5)):
        moved = data.displacement(view(10, 6), view(10 + dx, 6 + dy))
        assert moved.tolist() == [[dx, dy]] * 2


def test_displacement_is_not_fooled_by_the_hero_who_stays_in_his_place():
    """He is brighter than what scrolls behind him. (Every look of the game, and every button.)"""
    looks = {data.Platformer(seed).ink.tobytes(): seed for seed in range(7, 27)}
    assert len(looks) == len(data.LOOKS)
    for seed in looks.values():
        for button in (1, 2, 4, 5):
            game = data.Platformer(seed)
            frames = []
            x = []
            for _ in range(8):
                frames.append(torch.from_numpy(game.frame()) / 255)
                x.append(game.x)
                game.step(button)
            moved = data.displacement(torch.stack(frames[:-1]), torch.stack(frames[1:]))
            assert moved.tolist() == [[dx, 0] for dx in np.diff(x)]


def test_a_perfect_lam_is_scored_as_one(platformer, monkeypatch):
    """Codes that are the buttons, in reverse order: all right, and each key finds its code."""
    root = platformer / "data/platformer"

    def buttons_instead_of_frames(clips, starts):
        pressed, _, _ = data.true_actions(root, clips.path.stem)
        at = np.asarray(starts)[:, None] + np.arange(clips.T - 1)
        return torch.from_numpy(5 - pressed[at].astype(int))

    monkeypatch.setattr(data.Clips, "at", buttons_instead_of_frames)
    lam = SimpleNamespace(vq=SimpleNamespace(codebook=range(6)), encode=torch.clone)
    args = SimpleNamespace(data=root, device="cpu", scored=64, frames=4)
    scores, _ = lam_stage.score_actions(lam, args)
    assert scores["action_accuracy"] == 1
    assert scores["nmi"] > 0.999
    assert scores["keys"] == scores["meaning"] == [5, 4, 3, 2, 1, 0]
