"""Losses against independent numpy computations; what stops training when weights or files are missing."""

import numpy as np
import pytest
import torch
from repvitok.training.losses import (
    Discriminator,
    LeCam,
    LossWeights,
    PerceptualLoss,
    alignment_loss,
    generator_loss,
    gradient_loss,
    hinge_discriminator_loss,
    l1_loss,
    l2_loss,
)


def clips(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_pixel_losses_equal_numpy():
    a, b = clips(2, 3, 5, 8, 6), clips(2, 3, 5, 8, 6, seed=1)
    x, y = a.numpy().astype(np.float64), b.numpy().astype(np.float64)
    assert l1_loss(a, b).item() == pytest.approx(np.abs(x - y).mean(), rel=1e-5)
    assert l2_loss(a, b).item() == pytest.approx(((x - y) ** 2).mean(), rel=1e-5)
    expected = sum(np.abs(np.diff(x, axis=axis) - np.diff(y, axis=axis)).mean() for axis in (2, 3, 4))
    assert gradient_loss(a, b).item() == pytest.approx(expected, rel=1e-5)


def test_gradient_loss_ignores_a_constant_offset_and_takes_images():
    image = clips(1, 3, 1, 8, 8)
    assert gradient_loss(image + 0.25, image).item() == pytest.approx(0, abs=1e-6)
    assert gradient_loss(clips(1, 3, 1, 8, 8, seed=1), image) > 0


def test_alignment_equals_eq_2_written_out():
    z = clips(2, 3, 4, 5)  # batch, latent frames, tokens, channels
    features = clips(2, 9, 4, 7, seed=1)  # as many frames as the clip has
    weight = clips(7, 5, seed=2)
    total = 0.0
    for b in range(2):
        for token in range(4):
            mean_z = z[b, :, token].numpy().mean(axis=0)
            mean_g = features[b, :, token].numpy().mean(axis=0)
            total += np.sum((weight.numpy() @ mean_z - mean_g) ** 2)
    ours = alignment_loss(z @ weight.T, features)
    assert ours.item() == pytest.approx(total / (2 * 4), rel=1e-5)


def test_hinge_and_generator_losses():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 0.0])
    assert hinge_discriminator_loss(real, fake).item() == pytest.approx(0.5 * (0.25 + 0.5))
    assert generator_loss(fake).item() == pytest.approx(1.0)


def test_lecam_pulls_towards_the_other_sides_average():
    lecam = LeCam(decay=0.0)
    real, fake = torch.tensor([1.0, 3.0]), torch.tensor([-1.0, -1.0])
    assert lecam(real, fake).item() == pytest.approx(((1 + 1) ** 2 + (3 + 1) ** 2) / 2 + (-1 - 2) ** 2)


@pytest.mark.parametrize("frames", [1, 5, 17])
def test_discriminator_scores_clips_and_images(frames):
    torch.manual_seed(0)
    scores = Discriminator(width=8)(clips(2, 3, frames, 32, 48))
    assert len(scores) == (1 if frames == 1 else 2)
    assert all(score.shape[0] == 2 and torch.isfinite(score).all() for score in scores)


def test_discriminator_score_does_not_depend_on_the_rest_of_the_batch():
    torch.manual_seed(0)
    discriminator = Discriminator(width=8).eval()
    batch = clips(3, 3, 5, 32, 32)
    for whole, alone in zip(discriminator(batch), discriminator(batch[:1]), strict=True):
        torch.testing.assert_close(whole[:1], alone, atol=1e-5, rtol=1e-5)


def test_perceptual_loss_without_weights_says_how_to_get_them():
    pytest.importorskip("lpips")
    with pytest.raises(ValueError, match=r"alexnet-owt-7be5be79\.pth.*weights_path"):
        PerceptualLoss("/nowhere/alexnet.pth", net="alex")
    with pytest.raises(ValueError, match="expected an LPIPS backbone among"):
        PerceptualLoss("/nowhere", net="resnet")


def test_perceptual_loss_reads_torchvisions_file(tmp_path):
    lpips = pytest.importorskip("lpips")
    torch.manual_seed(0)
    reference = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()
    stored = {"features." + k.split(".", 1)[1]: v for k, v in reference.net.state_dict().items()}
    torch.save(stored | {"classifier.1.weight": torch.zeros(2, 2)}, tmp_path / "alexnet.pth")
    loss = PerceptualLoss(str(tmp_path / "alexnet.pth"), net="alex")
    a, b = clips(2, 3, 2, 64, 64), clips(2, 3, 2, 64, 64, seed=1)
    frames = [reference(a[:, :, t], b[:, :, t]).mean() for t in range(2)]
    torch.testing.assert_close(loss(a, b), torch.stack(frames).mean())
    assert loss(a, a).item() == pytest.approx(0, abs=1e-6)
    assert not any(p.requires_grad for p in loss.parameters())
    del stored["features.0.weight"]
    torch.save(stored, tmp_path / "broken.pth")
    with pytest.raises(ValueError, match=r"does not hold torchvision's alex weights: expected features\.0\.weight"):
        PerceptualLoss(str(tmp_path / "broken.pth"), net="alex")


def test_perceptual_loss_draws_frames_by_seed():
    pytest.importorskip("lpips")
    loss = PerceptualLoss("", net="alex", frames_per_clip=2, random_backbone_for_tests=True)
    a, b = clips(1, 3, 5, 64, 64), clips(1, 3, 5, 64, 64, seed=1)
    assert torch.equal(loss(a, b, seed=3), loss(a, b, seed=3))


def test_loss_weights_refuse_what_cannot_train():
    with pytest.raises(ValueError, match="l1 or l2 above 0"):
        LossWeights(l1=0.0, l2=0.0)
    with pytest.raises(ValueError, match=r"gan: expected float >= 0\.0"):
        LossWeights(gan=-1.0)
