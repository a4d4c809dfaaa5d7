"""The tokenizer: Eq. (3) exactly, the copy baseline as its start, clear refusals, strict storage; Eq. (4) by hand."""

import dataclasses
import json

import pytest
import torch
from jaxtyping import TypeCheckError
from latent_action.config import LatentActionConfig
from latent_action.dynamics import Transport
from latent_action.model import LatentActionTokenizer, composition_error, copy_loss, transition_losses
from latent_action.transfer import composed


@pytest.mark.parametrize(("tokens", "grid"), [(16, None), (24, (2, 3, 4)), (1, None)])
def test_decode_is_transport_plus_residual(lat, tokens, grid):
    z_t, l_t = torch.randn(3, tokens, 8), torch.randn(3, 4)
    matrix, residual = lat.transition(z_t, l_t, grid)
    assert matrix.shape == (3, tokens, tokens)
    assert residual.shape == z_t.shape
    torch.testing.assert_close(matrix.sum(-1), torch.ones(3, tokens))
    torch.testing.assert_close(lat.decode(z_t, l_t, grid), matrix @ z_t + residual, atol=1e-5, rtol=1e-5)


def test_encode_sees_each_pair_alone(lat):
    z = torch.randn(2, 5, 16, 8)
    actions = lat.encode(z)
    assert actions.shape == (2, 4, 4)
    for frame in range(4):
        torch.testing.assert_close(lat.encode(z[:, frame : frame + 2])[:, 0], actions[:, frame])


def test_the_reversed_pair_has_the_negative_action(lat):
    z = torch.randn(3, 2, 16, 8)
    forward, backward = lat.encode(z), lat.encode(z.flip(1))
    assert forward.abs().max() > 1e-2
    torch.testing.assert_close(backward, -forward)
    assert lat.encode(z[:, :1].repeat(1, 2, 1, 1)).abs().max() == 0


def test_antisymmetry_is_a_choice(lat):
    plain = LatentActionTokenizer(dataclasses.replace(lat.config, antisymmetric=False))
    plain.load_state_dict(lat.state_dict())
    z = torch.randn(3, 2, 16, 8)
    torch.testing.assert_close(plain.encode(z) - plain.encode(z.flip(1)), lat.encode(z))
    assert (plain.encode(z) + plain.encode(z.flip(1))).abs().max() > 1e-2


def test_the_transport_depends_on_the_action(lat):
    z_t = torch.randn(1, 16, 8)
    one, _ = lat.transition(z_t, torch.zeros(1, 4))
    other, _ = lat.transition(z_t, torch.ones(1, 4))
    assert (one - other).abs().max() > 1e-3


@pytest.mark.parametrize("grid", [(1, 4, 4), (1, 16, 16), (3, 4, 4)])
@pytest.mark.parametrize("pooling", ["attention", "mean"])
def test_a_new_model_is_nearly_the_copy_baseline(grid, pooling):
    lat = LatentActionTokenizer(LatentActionConfig(latent_dim=8, hidden=16, pooling=pooling))
    z = torch.randn(2, 2, grid[0] * grid[1] * grid[2], 8)
    matrix, residual = lat.transition(z[:, 0], lat.encode(z, grid)[:, 0], grid)
    assert residual.abs().max() == 0
    assert matrix.diagonal(dim1=1, dim2=2).min() > 0.95
    mean = (lat.decode(z[:, 0], lat.encode(z, grid)[:, 0], grid) - z[:, 0]).square().mean()
    assert mean < 0.01


def test_every_parameter_gets_a_gradient_after_one_step():
    torch.manual_seed(0)
    lat = LatentActionTokenizer(LatentActionConfig(latent_dim=8, hidden=16))
    optimizer = torch.optim.SGD(lat.parameters(), lr=0.1)
    z = torch.randn(4, 2, 32, 8)
    for _ in range(2):
        optimizer.zero_grad()
        (lat.decode(z[:, 0], lat.encode(z, (2, 4, 4))[:, 0], (2, 4, 4)) - z[:, 1]).square().mean().backward()
        optimizer.step()
    without = [name for name, p in lat.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def test_bad_shapes_are_refused_with_what_was_expected(lat):
    z = torch.randn(2, 3, 16, 8)
    for call, told in [
        (lambda: lat.encode(z[:, :1]), "two latent frames"),
        (lambda: lat.encode(z[:, :0]), "empty"),
        (lambda: lat.encode(z[:0]), "empty"),
        (lambda: lat.encode(z[..., :5]), "5 channels"),
        (lambda: lat.encode(z[:, :, :12]), "no square view"),
        (lambda: lat.encode(z, (1, 4, 5)), "holds 20 tokens"),
        (lambda: lat.encode(z.repeat(1, 1, 5, 1), (5, 4, 4)), "max_views"),
        (lambda: lat.decode(z[:, 0], torch.zeros(2, 3)), r"\(2, 4\)"),
        (lambda: lat.transition(z[:, 0, :, :7], torch.zeros(2, 4)), "7 channels"),
        (lambda: lat.standardise(z), "no latent statistics"),
    ]:
        with pytest.raises(ValueError, match=told):
            call()


def test_nothing_but_transition_forms_the_matrix(lat, monkeypatch):
    def refuse(_):
        raise AssertionError("K_t was formed")

    monkeypatch.setattr(Transport, "matrix", refuse)
    z = torch.randn(2, 3, 16, 8)
    lat.decode(z[:, 0], lat.encode(z)[:, 0])
    losses = transition_losses(lat, z[:, 0], z[:, 1])
    (losses.forward + losses.consistency).backward()
    with pytest.raises(AssertionError, match="formed"):
        lat.transition(z[:, 0], torch.zeros(2, 4))


def test_missing_axes_are_refused(lat):
    """By the model's own check, or by the shape annotations where the tests check those first."""
    z = torch.randn(3, 16, 8)
    for call in (lambda: lat.encode(z), lambda: lat.decode(z[0], torch.zeros(1, 4))):
        with pytest.raises((ValueError, TypeCheckError), match=r"axes|annotation"):
            call()


def test_standardise_uses_the_config(fitted_lat):
    raw = torch.randn(3, 16, 8)
    torch.testing.assert_close(fitted_lat.standardise(raw), (raw - 0.1) / 2)


def test_storage_round_trip(fitted_lat, tmp_path):
    fitted_lat.save_pretrained(tmp_path / "lat")
    again = LatentActionTokenizer.from_pretrained(tmp_path / "lat")
    assert again.digest() == fitted_lat.digest()
    assert again.config == fitted_lat.config
    z = torch.randn(1, 3, 16, 8)
    torch.testing.assert_close(again.encode(z), fitted_lat.encode(z), atol=0, rtol=0)


def test_digest_covers_weights_and_statistics(fitted_lat):
    before = fitted_lat.digest()
    fitted_lat.config = dataclasses.replace(fitted_lat.config, latent_std=(3.0,) * 8)
    other_statistics = fitted_lat.digest()
    with torch.no_grad():
        fitted_lat.inverse_dynamics.mlp.first.bias[0] += 1
    assert len({before, other_statistics, fitted_lat.digest()}) == 3


def test_loading_is_strict(fitted_lat, tmp_path):
    folder = tmp_path / "lat"
    fitted_lat.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    for changed in (
        config | {"format": "repvitok"},
        config | {"format_version": 99},
        config | {"config": config["config"] | {"hidden": 32}},
        config | {"config": config["config"] | {"unknown": 1}},
    ):
        (folder / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=r"config\.json|safetensors"):
            LatentActionTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("antisymmetric", [True, False])
def test_losses_are_eq_4_by_hand(lat, antisymmetric):
    lat.inverse_dynamics.antisymmetric = antisymmetric
    z_t, z_next = torch.randn(5, 16, 8), torch.randn(5, 16, 8)
    losses = transition_losses(lat, z_t, z_next)

    action = lat.inverse_dynamics(z_t, z_next, (1, 4, 4))
    matrix, residual = lat.transition(z_t, action)
    torch.testing.assert_close(losses.forward, (matrix @ z_t + residual - z_next).square().mean())
    torch.testing.assert_close(losses.latent_actions, action)

    reversed_action = lat.inverse_dynamics(z_next, z_t, (1, 4, 4))
    matrix, residual = lat.transition(z_next, reversed_action)
    torch.testing.assert_close(losses.consistency, (matrix @ z_next + residual - z_t).square().mean())
    torch.testing.assert_close(losses.reversed_actions, reversed_action)


def test_swapping_the_pair_swaps_the_losses(lat):
    z_t, z_next = torch.randn(5, 16, 8), torch.randn(5, 16, 8)
    one, other = transition_losses(lat, z_t, z_next), transition_losses(lat, z_next, z_t)
    torch.testing.assert_close(one.forward, other.consistency)
    torch.testing.assert_close(one.consistency, other.forward)


def test_losses_are_means_over_elements(lat):
    """Doubling the batch, or copying it, changes neither loss."""
    z_t, z_next = torch.randn(3, 16, 8), torch.randn(3, 16, 8)
    one = transition_losses(lat, z_t, z_next)
    two = transition_losses(lat, z_t.repeat(2, 1, 1), z_next.repeat(2, 1, 1))
    torch.testing.assert_close(one.forward, two.forward)
    torch.testing.assert_close(one.consistency, two.consistency)


def test_copy_loss():
    assert copy_loss(torch.zeros(2, 4, 3), torch.full((2, 4, 3), 2.0)) == 4


def test_composition_error_by_hand():
    whole = torch.tensor([[1.0, 10.0], [3.0, 30.0]])  # variances 1 and 100
    parts = torch.tensor([[1.0, 20.0], [2.0, 30.0]])  # mean square errors 0.5 and 50
    assert composition_error(whole, parts).item() == pytest.approx((0.5 / 1 + 50 / 100) / 2)
    assert composition_error(whole, whole).item() == 0
    mean = whole.mean(dim=0).expand_as(whole)
    assert composition_error(whole, mean).item() == pytest.approx(1)


def test_shrinking_is_no_way_out_of_composition():
    """No number can lower it by its scale, and a collapsed model has the error of the mean."""
    torch.manual_seed(0)
    whole, parts = torch.randn(64, 3, dtype=torch.float64), torch.randn(64, 3, dtype=torch.float64)
    scale = torch.ones(3, dtype=torch.float64, requires_grad=True)
    composition_error(whole * scale, parts * scale).backward()
    torch.testing.assert_close(scale.grad, torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)
    shrunk = composition_error(whole * 1e-3, parts * 1e-3)
    torch.testing.assert_close(shrunk, composition_error(whole, parts))
    assert composition_error(torch.zeros(8, 3), torch.zeros(8, 3)).item() == 1


def test_composed_goes_by_way_of_b_and_of_another_b(lat):
    a, b, c = torch.randn(3, 6, 16, 8)
    whole, parts, elsewhere = composed(lat, a, b, c)
    with torch.no_grad():
        legs = lat.encode(torch.stack([a, b, c], dim=1))
        torch.testing.assert_close(parts, legs.sum(dim=1))
        torch.testing.assert_close(whole, lat.encode(torch.stack([a, c], dim=1))[:, 0])
        other = lat.encode(torch.stack([a, b.roll(3, dims=0), c], dim=1)).sum(dim=1)
    torch.testing.assert_close(elsewhere, other)
