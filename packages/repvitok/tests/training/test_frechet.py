"""The Frechet distance against scipy's matrix root, torchmetrics, and cases known in closed form."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from repvitok.training.metrics import FrechetStatistics, frechet_distance


def features(count, dim, seed, mean=0.0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    return torch.randn(count, dim, generator=generator, dtype=torch.float64) @ mixing + mean


def scipy_distance(a, b):
    """Heusel et al. 2017 written out, with scipy's root of the product of numpy's covariances."""
    linalg = pytest.importorskip("scipy.linalg")
    a, b = a.numpy(), b.numpy()
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = linalg.sqrtm(cov_a @ cov_b).real
    return np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a + cov_b - 2 * root)


def statistics(values):
    return FrechetStatistics(values.shape[1]).update(values)


@pytest.mark.parametrize(("count", "dim"), [(200, 8), (60, 24), (500, 1)])
def test_distance_equals_scipys(count, dim):
    a, b = features(count, dim, 0), features(count + 7, dim, 1, mean=0.7)
    if dim == 1:
        mean, deviation = (a.mean() - b.mean()) ** 2, (a.std() - b.std()) ** 2
        assert statistics(a).distance(statistics(b)) == pytest.approx((mean + deviation).item(), rel=1e-9)
        return
    assert statistics(a).distance(statistics(b)) == pytest.approx(scipy_distance(a, b), rel=1e-7)


def test_distance_equals_torchmetrics():
    fid = pytest.importorskip("torchmetrics.image.fid")

    class Pool(torch.nn.Module):
        def forward(self, images):
            return torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)

    generator = torch.Generator().manual_seed(0)
    real, fake = (torch.randint(0, 256, (40, 3, 16, 16), generator=generator, dtype=torch.uint8) for _ in range(2))
    fake = (fake.float() * 0.8).to(torch.uint8)
    metric = fid.FrechetInceptionDistance(feature=Pool(), input_img_size=(3, 16, 16)).set_dtype(torch.float64)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    ours = statistics(Pool()(real).double()).distance(statistics(Pool()(fake).double()))
    assert ours == pytest.approx(metric.compute().item(), rel=1e-5)


def test_singular_covariances_need_no_diagonal():
    """Fewer samples than dimensions: with a common orthonormal basis the distance is that of the deviations."""
    basis = torch.linalg.qr(features(30, 30, 0))[0][:, :3]
    scale_a, scale_b = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([2.0, 2.0, 0.5]).double()
    cov_a, cov_b = ((basis * s.square()) @ basis.T for s in (scale_a, scale_b))
    zero = torch.zeros(30, dtype=torch.float64)
    assert frechet_distance(zero, cov_a, zero, cov_b) == pytest.approx((scale_a - scale_b).square().sum().item())


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 50), max_size=4), offset=st.sampled_from([0.0, 1e3, 1e6]))
def test_batches_do_not_matter_and_large_means_do_not_cancel(cuts, offset):
    values = features(50, 5, 3) + offset
    parts = torch.tensor_split(values, sorted(cuts))
    left, right = FrechetStatistics(5), FrechetStatistics(5)
    for i, part in enumerate(parts):
        (left if i % 2 else right).update(part)
    merged = left.merge(right)
    assert merged.count == 50
    np.testing.assert_allclose(merged.mean, values.mean(0), rtol=1e-12)
    np.testing.assert_allclose(merged.covariance, np.cov(values.numpy() - offset, rowvar=False), rtol=1e-7, atol=1e-9)


def test_a_set_has_no_distance_to_itself_and_the_distance_is_symmetric():
    a, b = statistics(features(40, 6, 0)), statistics(features(40, 6, 1))
    assert a.distance(a) == pytest.approx(0, abs=1e-6)
    assert a.distance(b) == pytest.approx(b.distance(a))


def test_what_has_no_distance_is_refused():
    with pytest.raises(ValueError, match="two or more feature vectors, got 1"):
        statistics(features(1, 3, 0)).distance(statistics(features(9, 3, 0)))
    with pytest.raises(ValueError, match="features of 3 numbers, got 4"):
        FrechetStatistics(3).update(features(2, 4, 0))
    with pytest.raises(ValueError, match="not finite"):
        FrechetStatistics(1).update(torch.tensor([[float("nan")]]))
