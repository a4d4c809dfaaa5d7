"""What is left out is what no prediction depends on: a dense pass over all tokens gives the same numbers."""

from __future__ import annotations

import pytest
import torch
from repwam_core.model.attention import DenseAttend
from repwam_core.model.config import ActionSpace, WAMConfig
from repwam_core.model.inputs import WAMInputs, document_inputs, pack, read_tokens
from repwam_core.model.masks import dense_mask
from repwam_core.model.sequence import Modality, training_layout
from repwam_core.model.wam import WorldActionModel
from torch import Tensor

COUPLINGS = pytest.mark.parametrize("coupling", ["joint", "sequential"])


def model_of(coupling: str) -> WorldActionModel:
    space = ActionSpace(channels=3, vectors_per_transition=2, state_channels=2)
    config = WAMConfig(
        width=32, depth=3, heads=2, ffn=48, action_width=16, action_ffn=32, text_dim=6, latent_dim=5,
        state_token=True, coupling=coupling, window=2, spaces={"robot": space},
    )  # fmt: skip
    model = WorldActionModel(config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def document(chunks: tuple[int, ...], seed: int) -> WAMInputs:
    generator = torch.Generator().manual_seed(seed)
    frames = sum(chunks) + 1
    layout = training_layout(frames, chunks, (1, 2, 1), 2, state=True)

    def draw(*shape: int) -> Tensor:
        return torch.randn(2, *shape, generator=generator)

    return document_inputs(
        layout,
        latents=draw(frames, 2, 5), noisy_latents=draw(frames - 1, 2, 5), actions=draw(frames - 1, 2, 3),
        noisy_actions=draw(frames - 1, 2, 3), states=draw(frames, 2),
        times=torch.rand(2, len(layout.levels), generator=generator), text=draw(3, 6),
        text_mask=torch.ones(2, 3, dtype=torch.bool), space="robot",
    )  # fmt: skip


@COUPLINGS
@pytest.mark.parametrize("documents", [[(2, 1, 2)], [(1,), (2, 2)]])
def test_outputs_and_gradients_are_those_of_all_tokens(coupling: str, documents: list[tuple[int, ...]]) -> None:
    model = model_of(coupling)
    inputs = pack([document(chunks, seed) for seed, chunks in enumerate(documents)])
    every = DenseAttend(dense_mask(inputs.layout.streams, coupling, model.config.window))
    results = []
    for attend in (None, every):
        output = model(inputs, attend)
        loss = output.video.square().mean() + output.actions.square().mean()
        results.append([output.video, output.actions, *torch.autograd.grad(loss, list(model.parameters()))])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-3)


@COUPLINGS
def test_what_is_left_out(coupling: str) -> None:
    layout = training_layout(4, (1, 2), (1, 2, 1), 2, state=True)
    kept = read_tokens(layout, coupling).layout
    tokens = zip(kept.chunk.tolist(), kept.modality.tolist(), kept.noisy.tolist(), strict=True)
    clean = {(chunk, modality) for chunk, modality, noisy in tokens if not noisy}
    assert {(0, Modality.VIDEO), (0, Modality.STATE), (1, Modality.ACTION)} <= clean
    of_last = {modality for chunk, modality in clean if chunk == 2}
    assert of_last == ({Modality.VIDEO} if coupling == "sequential" else set())
    assert int(kept.noisy.sum()) == int(layout.noisy.sum())
