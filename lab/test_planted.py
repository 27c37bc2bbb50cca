"""Does the lecture see what it says it sees? Mistakes are planted, one at a time.

    pytest -q -m slow lab/test_planted.py        # one or two minutes

Most of these mistakes were found in published code, where all shapes were right and the loss fell.
Each is a change of one line in a copy of the core. The test beside it must fail then. It stands in
test_genie.py, lab/test_ours.py or lab/test_training.py. To add a mistake: the file, the line as it
is, the line as it would be, and the test.
"""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent.parent

# name: the file, the line (its first occurrence), what it becomes, the test that must fail
MISTAKES = {
    "patches column by column": (
        "st_block.py", "x.permute(0, 1, 2, 4, 3, 5, 6)", "x.permute(0, 1, 4, 2, 3, 5, 6)",
        "test_patches_are_cut_row_by_row"),
    "scores not divided by the root of dh": (
        "st_block.py", " / math.sqrt(q.size(-1))", "",
        "test_attention_by_hand_is_the_fast_attention"),
    "no causal mask": (
        "st_block.py", ".tril().triu(1 - self.window)", ".triu(1 - self.window)",
        "test_temporal_attention_stays_in_its_place_and_looks_back_only"),
    "an endless window": (
        "st_block.py", ".tril().triu(1 - self.window)", ".tril()",
        "test_a_frame_sees_its_window_and_no_further"),
    "time is not told": (
        "st_block.py", "qk = rotate(qk, *turn)", "pass",
        "test_the_order_of_the_past_matters"),
    "all frames in one sequence": (
        "st_block.py", "s = self.norm_space(x).view(B * T, N, D)",
        "s = self.norm_space(x).view(B, T * N, D)",
        "test_spatial_attention_stays_in_its_frame"),
    "every frame in one slot of the cache": (
        "st_block.py", "self.slot = time % window", "self.slot = time * 0",
        "test_cached_frames_equal_the_whole_past"),
    "no gradient through the quantizer": (
        "st_block.py", "e = v + (e - v).detach()", "pass",
        "test_the_gradient_goes_straight_through"),
    "a codebook without a gradient": (
        "st_block.py", "index, codebook_loss + self.beta", "index, self.beta",
        "test_a_code_moves_to_the_vectors_that_chose_it"),
    "no commitment": (
        "st_block.py", "codebook_loss + self.beta * commitment_loss", "codebook_loss",
        "test_a_vector_stays_near_its_code_with_weight_beta"),
    "a running mean that never runs": (
        "st_block.py", "decay = 0.98", "decay = 1.0",
        "test_our_code_is_the_mean_of_the_vectors_that_chose_it"),
    "dead codes stay dead": (
        "st_block.py", "dead_below = 0.03", "dead_below = -1.0",
        "test_our_dead_codes_come_back_to_life"),
    "dead codes revived as copies of live ones": (
        "st_block.py", "fresh = fresh + self.noise * torch.randn_like(fresh)",
        "fresh = self.codebook[index[:1]].expand_as(fresh)",
        "test_our_dead_codes_come_back_to_life_as_no_copies"),
    "the learning rate is not warmed up": (
        "st_block.py", "share = (step + 1) / args.warmup", "share = 1.0",
        "test_learning_rate_warms_up_and_falls_to_a_tenth"),
    "resuming begins with a new optimizer": (
        "st_block.py", 'self.optimizer.load_state_dict(ckpt["optimizer"])', "pass",
        "test_interrupted_and_resumed_is_bit_identical"),
    "a_t is computed without x_{t+1}": (
        "lam.py", "h = h[:, 1:].mean(2)", "h = h[:, :-1].mean(2)",
        "test_an_action_sees_the_frame_it_leads_to_and_none_after_it"),
    "the decoder is handed the frame that it must draw": (
        "lam.py", "y = self.predict(x[:, :-1], e)", "y = self.predict(x[:, 1:], e)",
        "test_lam_decoder_learns_of_the_next_frame_by_the_action_alone"),
    "the LAM draws the frame that it has": (
        "lam.py", "return F.mse_loss(y, x[:, 1:])", "return F.mse_loss(y, x[:, :-1])",
        "test_the_error_of_the_lam_is_that_of_the_next_frame"),
    "the encoder reads one way": (
        "lam.py", "(h - reverse).mean(2)", "h.mean(2)",
        "test_the_lam_reads_nothing_where_nothing_happens"),
    "an action reaches the frame after the one it leads to": (
        "dynamics.py", "F.pad(self.vectors(a), (0, 0, 1, 0))",
        "F.pad(self.vectors(a)[:, :-1], (0, 0, 2, 0))",
        "test_action_reaches_the_frame_it_leads_to_and_not_before"),
    "a fixed mask rate": (
        "dynamics.py", "rate = torch.rand(B, 1, 1, device=z.device) * 0.5 + 0.5",
        "rate = torch.full((B, 1, 1), 0.75, device=z.device)",
        "test_the_mask_rate_is_drawn_for_each_clip"),
    "the frames of a clip are masked alike": (
        "dynamics.py", "rate = torch.rand(B, T, 1, device=z.device)",
        "rate = torch.rand(B, 1, 1, device=z.device)",
        "test_our_mask_rate_is_drawn_for_each_frame"),
    "the prompt is masked": (
        "dynamics.py", "masked[:, 0] = False", "pass",
        "test_the_first_frame_is_given_and_never_asked_for"),
    "nothing is masked": (
        "dynamics.py", "z.masked_fill(masked, self.MASK), self.actions(a))",
        "z, self.actions(a))",
        "test_what_is_masked_cannot_be_read_anywhere"),
    "targets read after masking": (
        "dynamics.py", "return self.loss(x, z, masked)",
        "return self.loss(x, z.masked_fill(masked, 0), masked)",
        "test_the_loss_asks_for_what_is_hidden_and_for_nothing_else"),
    "targets taken from the noised tokens": (
        "dynamics.py", "as they were\n        return self.loss(x, z, masked)",
        "as they were\n        return self.loss(x, given, masked)",
        "test_our_noise_is_never_asked_for"),
    "noise is ignored": (
        "dynamics.py", "given = self.with_noise(z)", "given = z",
        "test_our_noise_puts_wrong_tokens_among_those_that_are_given"),
    "a temperature that divides probabilities": (
        "dynamics.py", "(logits / temperature).softmax(-1)", "(logits.softmax(-1) / temperature)",
        "test_temperature_divides_logits"),
    "committed tokens are drawn again": (
        "dynamics.py", "place = shuffled[..., done:upto]", "place = shuffled[..., :upto]",
        "test_what_is_drawn_stays_and_every_hole_is_filled"),
    "no step sees what the others drew": (
        "dynamics.py", "logits = predict(z, place)",
        "logits = predict(torch.full_like(z, MASK), place)",
        "test_each_step_sees_what_the_steps_before_it_drew"),
    "the past is not finished": (
        "dynamics.py", "remembers_finished = True", "remembers_finished = False",
        "test_generate_draws_what_the_rollout_draws"),
    "the dynamics trains the LAM": (
        "dynamics.py", "            model.codebook.copy_(lam.vq.codebook.detach())",
        "            model.codebook.copy_(lam.vq.codebook)",
        "test_cotraining_stops_the_gradient_at_the_actions"),
}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_seen(mistake, tmp_path):
    file, line, wrong, test = MISTAKES[mistake]
    for source in HERE.glob("*.py"):
        shutil.copy(source, tmp_path)
    (tmp_path / "lab").mkdir()
    for source in (HERE / "lab").glob("*.py"):
        shutil.copy(source, tmp_path / "lab")
    text = (tmp_path / file).read_text()
    assert line in text, f"{file} has no such line any more: {line}"
    (tmp_path / file).write_text(text.replace(line, wrong, 1))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
               "test_genie.py", "lab/test_ours.py", "lab/test_training.py", "-k", test]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})
    # 1: a test failed; 2 to 5: none was run, or pytest itself failed
    assert result.returncode == 1, result.stdout[-2000:]
    assert "FAILED" in result.stdout and test in result.stdout, result.stdout[-2000:]
