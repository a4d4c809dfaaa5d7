"""The estimate against the model itself: parameters and matrix products exactly, kept bytes by hooks."""

import math
from dataclasses import replace
from typing import get_args

import pytest
import torch
from repvitok.runtime.training import build_optimizer
from repwam_core.cli import main, tokens_of
from repwam_core.estimate import (
    DocumentCosts,
    RunRequest,
    SequenceCost,
    activation_bytes,
    estimate_run,
    meta_model,
    model_of_recipes,
    offloaded_bytes,
    peak_flops,
    state_bytes,
    training_of_recipes,
)
from repwam_core.model.attention import dense_mask, make_attention
from repwam_core.model.config import ActionSpace, Recompute, WAMConfig
from repwam_core.model.sequence import WAMInputs, concat, document_inputs, training_layout
from repwam_core.model.wam import WorldActionModel
from repwam_core.training.parallel import ScaleSettings, prepare_layers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

SPACE = ActionSpace(channels=3, vectors_per_transition=2, state_channels=2)
CHUNKS = ((2, 2, 1), (1, 1, 1, 1))
GRID = (1, 4, 4)
SMALL = RunRequest(preset="tiny", gpus=2, shard_size=2, tokens=5000, grid=GRID, vectors=1)


def config(**changes: object) -> WAMConfig:
    sizes = {"width": 64, "depth": 3, "heads": 4, "ffn": 160, "action_width": 32, "action_ffn": 96, "window": 2}
    settings = {**sizes, "text_dim": 16, "latent_dim": 8, "state_token": True, "spaces": {"robot": SPACE}, **changes}
    return WAMConfig.preset("tiny", **settings)


def inputs(config: WAMConfig) -> tuple[WAMInputs, SequenceCost]:
    state, history = config.has_state("robot"), config.action_history
    costs = DocumentCosts(config, "robot", 16, 2, state=state, text=5)
    cost = sum((costs.of(chunks) for chunks in CHUNKS), SequenceCost())
    layouts = [training_layout(sum(c) + 1, c, GRID, 2, state=state, action_history=history) for c in CHUNKS]
    layout, transitions = concat(layouts), sum(map(sum, CHUNKS))
    frames = transitions + len(CHUNKS)
    packed = document_inputs(
        layout,
        latents=torch.randn(1, frames * 16, 8),
        noisy_latents=torch.randn(1, transitions * 16, 8),
        actions=torch.randn(1, transitions, 2, 3),
        noisy_actions=torch.randn(1, transitions, 2, 3),
        states=torch.randn(1, frames, 2),
        times=torch.rand(1, len(layout.levels)),
        text=torch.randn(1, len(CHUNKS), 5, 16),
        text_mask=torch.ones(1, len(CHUNKS), 5, dtype=torch.bool),
        space="robot",
    )
    return packed, cost


@pytest.mark.parametrize("coupling", ["joint", "sequential"])
@pytest.mark.parametrize("history", [True, False])
@pytest.mark.parametrize("state", [True, False])
def test_tokens_and_visible_pairs_are_the_layouts(coupling, history, state):
    documents = *CHUNKS, (1,) * 9, (2,) * 6 + (1,), (3,) * 5  # also longer than the window
    model = config(coupling=coupling, action_history=history)
    layout = concat([training_layout(sum(c) + 1, c, GRID, 2, state=state, action_history=history) for c in documents])
    costs = DocumentCosts(model, "robot", 16, 2, state=state)
    cost = sum((costs.of(chunks) for chunks in documents), SequenceCost())
    assert (cost.tokens, cost.video) == (len(layout), len(layout.video))
    assert cost.clean_video == len(layout.video) - len(layout.noisy_video)
    assert cost.pairs == int(dense_mask(layout, coupling, model.window).sum())


def test_bytes_of_the_state_are_those_of_a_step():
    wanted = config()
    wam = WorldActionModel(wanted)
    optimizer = build_optimizer(wam, "muon", newton_schulz_dtype="float32")
    optimizer.create_states()
    moments = sum(value.nbytes for state in optimizer.state.values() for value in state.values() if value.ndim)
    parameters = sum(parameter.nbytes for parameter in wam.parameters())
    assert state_bytes(meta_model(wanted)) == 3 * parameters + moments  # and gradients and averages


@pytest.mark.parametrize("attention", ["shared", "per_modality"])
@pytest.mark.parametrize("coupling", ["joint", "sequential"])
def test_flops_are_those_of_the_matrix_products(attention, coupling):
    wanted = config(attention=attention, coupling=coupling)
    wam = WorldActionModel(wanted)
    packed, cost = inputs(wanted)
    attention = make_attention(packed.layout, coupling, wanted.window)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        velocities = wam(packed, attention)
        forward = counter.get_total_flops()
        (velocities.video.square().mean() + velocities.actions.square().mean()).backward()
    assert forward == cost.flops
    assert counter.get_total_flops() == pytest.approx(3 * forward, rel=0.03)


class Kept(torch.autograd.Function):
    """Keeps what a fused attention keeps: queries, keys, values, outputs, one number per query and head."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.zeros_like(v)
        ctx.save_for_backward(q, k, v, out, q.new_zeros(q.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, gradient):
        return gradient, gradient, gradient


def kept_bytes(wanted: WAMConfig, bf16: bool, recompute: Recompute = "none") -> int:
    """Bytes of all distinct storages that a forward pass keeps here, without parameters and their casts."""
    wam = WorldActionModel(wanted)
    prepare_layers(wam, ScaleSettings(recompute=recompute))
    packed, _ = inputs(wanted)
    own = {parameter.untyped_storage().data_ptr() for parameter in wam.parameters()}
    shapes = {tuple(p.shape) for p in wam.parameters()} | {tuple(p.T.shape) for p in wam.parameters() if p.ndim == 2}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        cast = tensor.dtype == torch.bfloat16 and tuple(tensor.shape) in shapes
        if storage.data_ptr() not in own and not cast:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", torch.bfloat16, bf16):
        wam(packed, lambda _, q, k, v: Kept.apply(q.to(v.dtype), k.to(v.dtype), v))
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("bf16", [False, True])
def test_kept_bytes_are_those_of_the_saved_tensors(bf16):
    deep, shallow = config(depth=4), config(depth=2)
    _, cost = inputs(deep)
    measured = (kept_bytes(deep, bf16) - kept_bytes(shallow, bf16)) / 2
    assert activation_bytes(config(depth=1), cost, "none", bf16) == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("bf16", [False, True])
def test_recomputed_layers_keep_their_inputs_and_offloaded_ones_nothing(bf16):
    deep, shallow = config(depth=4), config(depth=2)
    _, cost = inputs(deep)
    full, offloaded = (kept_bytes(deep, bf16, name) - kept_bytes(shallow, bf16, name) for name in ("full", "offload"))
    assert full == offloaded_bytes(config(depth=2), cost)
    assert offloaded == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_offloaded_inputs_leave_the_gpu_until_the_backward_pass():
    wanted = config(depth=8)
    packed, cost = inputs(wanted)
    tensors = {name: value.cuda() for name, value in vars(packed).items() if isinstance(value, torch.Tensor)}
    packed = replace(packed, **tensors)
    kept, gradients = {}, {}
    for recompute in ("full", "offload"):
        torch.manual_seed(0)
        wam = WorldActionModel(wanted).cuda()
        prepare_layers(wam, ScaleSettings(recompute=recompute, compile=False))
        before = torch.cuda.memory_allocated()
        velocities = wam(packed, make_attention(packed.layout, wanted.coupling, wanted.window, "dense", "cuda"))
        kept[recompute] = torch.cuda.memory_allocated() - before
        (velocities.video.square().mean() + velocities.actions.square().mean()).backward()
        gradients[recompute] = [parameter.grad for parameter in wam.parameters() if parameter.grad is not None]
    assert kept["full"] - kept["offload"] == pytest.approx(offloaded_bytes(wanted, cost), rel=0.2)
    torch.testing.assert_close(gradients["offload"], gradients["full"])


def test_recomputation_keeps_less():
    wanted = WAMConfig.preset("1.3b")
    cost = DocumentCosts(wanted, "latent", 256, 1).of((2,) * 48) * 4
    none, selective, full, offload = (activation_bytes(wanted, cost, name) for name in get_args(Recompute))
    assert offload < full < selective < none / 4
    assert full - offload == pytest.approx(offloaded_bytes(wanted, cost) * 29 / 30)


def test_the_estimate_holds_together():
    run = estimate_run(RunRequest(preset="5b", gpus=128, tokens=160_000, gpu="h20"))
    assert run.parameters["video"] == pytest.approx(5.00e9, rel=0.01)
    assert 0.9 * 160_000 < run.sequence.tokens <= 160_000
    assert run.step_s == pytest.approx(run.flops * 4 / 3 / (148e12 * 0.4))
    assert run.days == pytest.approx(100e9 / (run.sequence.tokens * 128) * run.step_s / 86400)
    twice = estimate_run(RunRequest(preset="5b", gpus=256, tokens=160_000, gpu="h20"))
    assert twice.days == pytest.approx(run.days / 2)
    six_flops_per_weight = 6 * 5.0e9 * run.sequence.tokens
    assert 0.7 < run.flops / six_flops_per_weight < 2


def test_the_command_prints_the_estimate_under_its_old_name_too(capsys):
    arguments = ["--preset", "5b", "--gpus", "128", "--tokens", "160k", "--gpu", "h20"]
    assert main(["estimate", *arguments]) == 0
    text, errors = capsys.readouterr()
    assert errors == ""
    assert main(["plan", *arguments]) == 0
    assert capsys.readouterr() == (
        text,
        "repwam plan is now repwam estimate; the old name goes with the next version\n",
    )
    assert all(word in text for word in ("5b on 128 x h20", "parameters", "GiB", "days", "latents"))
    assert "does not fit; with recompute offload" in text
    assert main(["estimate", "--recompute", "offload"]) == 0
    assert "per device, fits" in capsys.readouterr().out


def test_a_recipe_says_the_model_and_its_tokens(tmp_path, capsys):
    base, over = tmp_path / "small.yaml", tmp_path / "over.yaml"
    base.write_text("model: {preset: tiny, wam: {width: 64, heads: 2}}\ndata: {packing: {token_budget: 5000}}\n")
    over.write_text("model: {wam: null}\n")
    config, tokens = model_of_recipes([base, over])
    assert config == WAMConfig.preset("tiny", width=64, heads=2)
    assert tokens == 5000
    assert main(["estimate", "--recipe", str(base), str(over), "--gpu", "rtx4090", "--total-tokens", "1m"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("small + over on 128 x rtx4090")
    assert "0.001 G tokens" in told
    assert "hours" in told
    over.write_text("model: {wam: {widht: 64}}\n")
    assert main(["estimate", "--recipe", str(over)]) == 2
    assert "--recipe: expected settings of the model under model.wam, got widht" in capsys.readouterr().err


def test_a_recipe_says_what_is_trained_of_the_model(tmp_path, capsys):
    base, over = tmp_path / "small.yaml", tmp_path / "over.yaml"
    base.write_text("model: {preset: tiny, optimizer: {name: adamw, lr: 1e-3}}\n")
    model = meta_model(WAMConfig.preset("tiny"))
    total = sum(parameter.numel() for parameter in model.parameters())
    config = model_of_recipes([base])[0]
    whole = estimate_run(SMALL, config, *training_of_recipes([base]))
    assert whole.state == 4 * 5 * total / SMALL.shard_size
    over.write_text("model: {lora: {rank: 2, targets: [mlp]}}\n")
    updates = estimate_run(SMALL, config, *training_of_recipes([base, over]))
    assert updates.trained == 4 * 2 * 2 * 2 * (128 + 512)  # layers, experts, matrices, rank
    assert updates.state == 4 * (total + 5 * updates.trained) / SMALL.shard_size
    over.write_text("model: {freeze: [trunk]}\n")
    frozen = estimate_run(SMALL, config, *training_of_recipes([base, over]))
    assert frozen.trained == total - sum(parameter.numel() for parameter in model.layers.parameters())
    assert main(["estimate", "--recipe", str(base), str(over)]) == 0
    assert f"average of the {frozen.trained / 1e6:.1f} M trained)" in capsys.readouterr().out
    over.write_text("model: {freeze: [trunc]}\n")
    assert main(["estimate", "--recipe", str(base), str(over)]) == 2
    assert "model.freeze: expected some of trunk" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--gpu h21", "--gpu: invalid choice: 'h21'"),
        ("--tokens many", "expected a number of tokens"),
        ("--gpus 10", "--shard-size: expected a divisor of --gpus 10, got 8"),
        ("--mfu 2", "--mfu: expected a number above 0 to 1"),
        ("--tokens 100", "not even one chunk"),
        ("--grid 4 256 256", "--grid: expected 1 to 65,536 tokens, got 262,144"),
    ],
)
def test_impossible_runs_are_refused(arguments, message, capsys):
    assert main(["estimate", "--preset", "tiny", *arguments.split()]) == 2
    assert message in capsys.readouterr().err


def test_numbers_of_tokens():
    assert [tokens_of(text) for text in ("160000", "160k", "0.2m", "100g")] == [160_000, 160_000, 200_000, 10**11]
    assert math.isclose(peak_flops("NVIDIA H200") or 0, 989e12)
    assert peak_flops("NVIDIA GeForce RTX 4090") == 165e12
    assert peak_flops("Quadro") is None
