"""PSNR and SSIM against independent numpy computations."""

import numpy as np
import pytest
import torch
from repvitok.metrics import ReconstructionMetrics, psnr, ssim
from repvitok.pictures import reconstruction_sheet


def clips(seed, shape=(2, 3, 3, 32, 40)):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def numpy_psnr(a, b):
    a, b = (np.clip((x.numpy().astype(np.float64) + 1) / 2, 0, 1) for x in (a, b))
    return np.array(
        [[10 * np.log10(1 / ((a - b)[i, :, t] ** 2).mean()) for t in range(a.shape[2])] for i in range(len(a))]
    )


def numpy_ssim(a, b):
    """Wang et al. 2004 on one channel in [0, 1]: 11 x 11 Gaussian window at every pixel, borders reflected."""
    a, b = (np.pad(image, 5, mode="reflect") for image in (a, b))
    offsets = np.arange(11) - 5
    line = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(line, line) / np.outer(line, line).sum()
    values = []
    for y in range(a.shape[0] - 10):
        for x in range(a.shape[1] - 10):
            p, q = a[y : y + 11, x : x + 11], b[y : y + 11, x : x + 11]
            mp, mq = (window * p).sum(), (window * q).sum()
            vp, vq = (window * p**2).sum() - mp**2, (window * q**2).sum() - mq**2
            cov = (window * p * q).sum() - mp * mq
            c1, c2 = 0.01**2, 0.03**2
            values.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    return np.mean(values)


def test_psnr_equals_numpy():
    a, b = clips(0), clips(1)
    np.testing.assert_allclose(psnr(a, b).numpy(), numpy_psnr(a, b), rtol=1e-5)


def test_psnr_clips_what_no_image_can_hold():
    assert psnr(torch.full((1, 3, 1, 8, 8), 5.0), torch.ones(1, 3, 1, 8, 8)).item() == pytest.approx(100)


def test_ssim_equals_numpy():
    a = clips(2, (1, 3, 1, 32, 32))
    b = (a + 0.3 * clips(3, (1, 3, 1, 32, 32))).clamp(-1, 1)
    x, y = ((v[0, :, 0].numpy().astype(np.float64) + 1) / 2 for v in (a, b))
    expected = np.mean([numpy_ssim(x[c], y[c]) for c in range(3)])
    assert ssim(b, a).item() == pytest.approx(expected, abs=1e-4)


def test_metrics_average_over_frames_whatever_the_batches():
    a, b = clips(4), clips(5)
    whole, parts = ReconstructionMetrics(), ReconstructionMetrics()
    whole.update(a, b)
    for i in range(2):
        parts.update(a[i : i + 1], b[i : i + 1])
    for name, value in whole.compute().items():
        torch.testing.assert_close(parts.compute()[name], value)
    assert whole.compute()["psnr"].item() == pytest.approx(numpy_psnr(a, b).mean(), rel=1e-5)


def test_no_frames_is_an_error():
    with pytest.raises(ValueError, match="the validation set is empty"):
        ReconstructionMetrics().compute()


def test_reconstruction_sheet_puts_originals_above():
    sheet = reconstruction_sheet(torch.ones(2, 3, 3, 16, 16), -torch.ones(2, 3, 3, 16, 16))
    assert sheet.shape == (64, 48, 3)
    assert (sheet[:16] == 255).all()
    assert (sheet[16:32] == 0).all()
