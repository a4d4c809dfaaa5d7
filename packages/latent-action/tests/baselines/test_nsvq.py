"""Noise substitution: the right code, an error of the right length, gradients for both sides, no idle codes."""

import torch
from latent_action.baselines.lapa import NoiseSubstitution, code_usage


def quantizer() -> NoiseSubstitution:
    quantize = NoiseSubstitution(4, 2)
    with torch.no_grad():
        quantize.codebook.copy_(torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0], [50.0, 50.0]]))
    return quantize


def test_evaluation_gives_the_nearest_code():
    codes, index = quantizer().eval()(torch.tensor([[[1.0, 0.5], [3.0, 1.0]], [[0.5, 5.0], [0.1, 0.0]]]))
    assert index.tolist() == [[0, 1], [2, 0]]
    assert codes.tolist() == [[[0, 0], [4, 0]], [[0, 4], [0, 0]]]


def test_training_moves_by_the_quantisation_error_in_a_random_direction():
    quantize, x = quantizer().train(), torch.tensor([[3.0, 4.0]]).repeat(2000, 1)
    noisy, index = quantize(x)
    assert index.unique().tolist() == [2]
    torch.testing.assert_close((noisy - x).norm(dim=-1), torch.full((2000,), 3.0))
    assert (noisy - x).mean(dim=0).norm() < 0.2


def test_both_the_codebook_and_the_input_get_a_gradient():
    quantize, x = quantizer().train(), torch.tensor([[3.0, 1.0]], requires_grad=True)
    noisy, _ = quantize(x)
    (noisy * torch.tensor([1.0, 2.0])).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert quantize.codebook.grad is not None
    assert (quantize.codebook.grad.abs().sum(dim=1) > 0).tolist() == [False, True, False, False]


def test_idle_codes_move_beside_used_ones_and_used_ones_stay():
    quantize = quantizer()
    before = quantize.codebook.detach().clone()
    used = code_usage(torch.tensor([[0, 1], [1, 1]]), 4)
    assert used.tolist() == [1, 3, 0, 0]
    assert quantize.replace_unused(used) == 2
    after = quantize.codebook.detach()
    torch.testing.assert_close(after[:2], before[:2], atol=0, rtol=0)
    assert torch.cdist(after[2:], before[:2]).min(dim=1).values.max() < 2
    assert quantize.replace_unused(torch.zeros(4, dtype=torch.long)) == 4  # nothing was counted: nothing to copy from
    torch.testing.assert_close(quantize.codebook.detach(), after, atol=0, rtol=0)
