"""Layers that look ahead: what they predict, that nothing else changes with them, that exports have none."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from repvitok.runtime.checkpointing import read_checkpoint
from repvitok.runtime.errors import UserError
from repvitok.runtime.progress import read_curves
from repwam_core.data.batches import Documents, Noise, SegmentBatch
from repwam_core.estimate import DocumentCosts, SequenceCost, meta_model
from repwam_core.export import read_trained
from repwam_core.model.attention import flex_block_mask, make_attention
from repwam_core.model.config import ActionSpace, WAMConfig
from repwam_core.model.rollout import Rollout
from repwam_core.model.sequence import Modality, Velocities, concat, look_ahead_tokens, training_layout
from repwam_core.model.wam import WorldActionModel, compile_layers, compiled_run
from repwam_core.training.losses import (
    LossSettings,
    WAMLoss,
    documents_layout,
    documents_loss,
    draw_noise,
    noised_inputs,
)
from repwam_core.training.module import WAMTraining
from repwam_core.training.parallel import ScaleSettings, prepare_layers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

GRID = (2, 1, 2)
SPACE = ActionSpace(channels=3, vectors_per_transition=2, state_channels=5)
LAYERS = 2


def model(look_ahead: int = LAYERS, **changes: object) -> WorldActionModel:
    sizes = {"width": 32, "depth": 2, "heads": 2, "ffn": 48, "action_width": 16, "action_ffn": 24, "text_dim": 6}
    config = WAMConfig.preset(
        "tiny", **{**sizes, "latent_dim": 4, "window": 2, "state_token": True, "spaces": {"robot": SPACE}, **changes}
    )
    torch.manual_seed(0)
    wam = WorldActionModel(replace(config, look_ahead=look_ahead))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # no zero outputs, so that every path shows; the base first, the same whatever follows
        for parameter in wam.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return wam


def segments(transitions: int, b: int = 1) -> SegmentBatch:
    draw = torch.Generator().manual_seed(transitions)
    return SegmentBatch(
        latents=torch.randn(b, transitions + 1, 4, 4, generator=draw),
        actions=torch.randn(b, transitions, 2, 3, generator=draw),
        state=torch.randn(b, transitions + 1, 5, generator=draw),
        text=torch.randn(b, 4, 6, generator=draw),
        text_mask=torch.ones(b, 4, dtype=torch.bool),
        valid=torch.ones(b, transitions, dtype=torch.bool),
        channel_mask=torch.ones(b, 3, dtype=torch.bool),
        episode=torch.arange(b),
        start=torch.zeros(b, dtype=torch.long),
    )


def drawn(*chunk_sizes: tuple[int, ...], settings: LossSettings | None = None) -> tuple[Documents, Noise]:
    """Documents in one sequence, and the noise of a step."""
    settings = settings or LossSettings(history_noise=0.1)
    batches = [segments(sum(sizes)) for sizes in chunk_sizes]
    pairs = zip(batches, chunk_sizes, strict=True)
    noise = [draw_noise(one, len(sizes), settings, torch.Generator().manual_seed(len(sizes))) for one, sizes in pairs]
    return Documents.packed([Documents.of_segments(one, GRID) for one in batches]), Noise.packed(noise)


def loss(wam: WorldActionModel, *chunk_sizes: tuple[int, ...], **options: object) -> WAMLoss:
    return documents_loss(wam, *_placed(*chunk_sizes), "robot", 0.7, 0.3, **options)


def _placed(*chunk_sizes: tuple[int, ...]) -> tuple[Documents, list[tuple[int, ...]], Noise]:
    documents, noise = drawn(*chunk_sizes)
    return documents, list(chunk_sizes), noise


def run(wam: WorldActionModel, documents: Documents, chunk_sizes: list[tuple[int, ...]], noise: Noise) -> Velocities:
    layout = documents_layout(wam, documents, chunk_sizes, "robot")
    inputs = noised_inputs(documents, layout, noise, "robot")
    make = (wam.config.coupling, wam.config.window)
    steps = look_ahead_tokens(layout, wam.config.look_ahead)
    return wam(inputs, make_attention(layout, *make), ahead=[(s, make_attention(s.layout, *make)) for s in steps])


def test_each_layer_predicts_the_chunk_after_the_last_ones_as_far_as_there_is_one():
    documents = (2, 2, 1), (3,), (1, 2, 3, 1)  # chunks that end, documents of one chunk, chunks that grow
    layout = concat([training_layout(sum(sizes) + 1, sizes, GRID, 2, state=True) for sizes in documents])
    streams = layout.streams
    place = {  # of every noisy token by what it is
        (int(s.modality), int(s.document), int(s.chunk), int(s.frame - s.chunk_start), *map(int, rest)): number
        for number, (s, rest) in enumerate(
            (streams.take(torch.tensor([n])), _inside(streams, n)) for n in noisy(streams)
        )
    }
    before = place
    for step in look_ahead_tokens(layout, 3):
        now = {key: place[key] for key in place if (*key[:2], key[2] - 1, *key[3:]) in before}
        assert step.asked
        numbers = [*step.video.tolist(), *(step.actions + len(layout.noisy_video)).tolist()]
        assert numbers == sorted(now.values())
        order = {number: at for at, number in enumerate(sorted(before.values()))}
        keys = sorted(now, key=now.__getitem__)
        expected = [order[before[*key[:2], key[2] - 1, *key[3:]]] for key in keys]
        videos = sum(key[0] == Modality.VIDEO for key in before)
        assert [*step.video_before.tolist(), *(step.actions_before + videos).tolist()] == expected
        before = now
    assert not look_ahead_tokens(layout, 4)[-1].asked


def test_chunks_of_every_size_need_one_length_of_compiled_attention():
    layouts = [training_layout(9, sizes, (1, 8, 8), 4) for sizes in ((1,) * 8, (2,) * 4, (3, 3, 2), (4, 4))]
    masks = [flex_block_mask(s.layout, "joint", 4) for layout in layouts for s in look_ahead_tokens(layout, 3)]
    assert {mask.seq_lengths for mask in masks} == {(640, 640)}  # of 8 * (64 + 4) noisy tokens
    step = look_ahead_tokens(layouts[0], 1)[0]
    assert int(masks[0].to_dense().sum()) >= len(step.layout) // 128


def noisy(streams):
    return streams.noisy.nonzero()[:, 0].tolist()


def _inside(streams, number):
    return [getattr(streams, name)[number] for name in ("view", "row", "col", "vector")]


@pytest.mark.parametrize("coupling", ["joint", "sequential"])
def test_the_model_is_the_same_with_and_without(coupling):
    chunks = (2, 2, 1), (1, 1)
    plain, wam = model(0, coupling=coupling), model(coupling=coupling)
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, wam.state_dict()[name]), name
    documents, noise = drawn(*chunks)
    one, other = (run(each, documents, list(chunks), noise) for each in (plain, wam))
    assert torch.equal(one.video, other.video)
    assert torch.equal(one.actions, other.actions)
    assert [len(one.ahead), len(other.ahead)] == [0, LAYERS]
    without, with_them = loss(plain, *chunks), loss(wam, *chunks)
    assert without.look_ahead is None
    assert torch.equal(without.video, with_them.video)
    assert torch.equal(without.action, with_them.action)
    assert with_them.look_ahead is not None
    assert torch.equal(with_them.total, without.total + 0.3 * with_them.look_ahead)
    wam.set_look_ahead(0)
    assert torch.equal(loss(wam, *chunks).total, without.total)
    assert wam.digest() == plain.digest()
    assert "look_ahead" not in wam.config.to_dict()


@pytest.mark.parametrize("coupling", ["joint", "sequential"])
def test_what_a_chunk_tells_of_later_ones_comes_from_before_it(coupling):
    """Layer k of chunk c knows the clean frames before c and the noisy ones up to c + k: no clean one of c or later."""
    wam, sizes = model(coupling=coupling, window=8), (1, 1, 1, 1)
    documents, noise = drawn(sizes)
    whole = run(wam, documents, [sizes], noise).ahead
    for frame in range(5):
        moved = documents.latents.unflatten(1, (5, 4)).clone()
        moved[:, frame] += 1.0
        clean = replace(documents, latents=moved.flatten(1, 2))
        if frame:  # keep the noisy frame where it is: only the clean one has moved
            t = noise.video_t[:, frame - 1, None, None]
            eps = noise.video.unflatten(1, (4, 4)).clone()
            eps[:, frame - 1] -= t[:, 0] / (1 - t[:, 0]) * 1.0
            changed = run(wam, clean, [sizes], replace(noise, video=eps.flatten(1, 2))).ahead
        else:
            changed = run(wam, clean, [sizes], noise).ahead
        for k, (one, other) in enumerate(zip(whole, changed, strict=True), 1):
            of_chunk = (one.video - other.video).abs().unflatten(1, (-1, 4)).amax((0, 2, 3))
            knows = [frame < chunk for chunk in range(1, 5 - k)]  # layer k's first target follows chunk 1
            assert [bool(value > 1e-5) for value in of_chunk] == knows


def test_packed_documents_look_ahead_as_each_alone():
    wam, chunks = model(), [(2, 2, 1), (1,), (1, 1, 1)]
    whole = loss(wam, *chunks)
    alone = [loss(wam, sizes) for sizes in chunks]
    parts = [each.terms.ahead for each in alone]
    for name in ("video", "video_count", "action", "action_count"):
        expected = sum(getattr(part, name) for part in parts)
        torch.testing.assert_close(getattr(whole.terms.ahead, name), expected, atol=1e-5, rtol=1e-5)
    # Layer 1 predicts frames 3 .. 5 (offsets that both chunks have: 3, 4 and 5) and 2, 3; layer 2 frames 5 and 3.
    assert whole.terms.ahead.video_count == 3 + 2 + 1 + 1
    torch.testing.assert_close(whole.look_ahead, _mean(whole))


def _mean(whole: WAMLoss) -> torch.Tensor:
    ahead = whole.terms.ahead
    return ahead.video / ahead.video_count + 0.7 * ahead.action / ahead.action_count


def test_committed_actions_of_later_chunks_are_not_learned_again():
    wam, sizes = model(), (1, 1, 1)
    documents, noise = drawn(sizes, settings=LossSettings(delay=1))
    noise = replace(noise, committed=torch.tensor([[1, 0, 1]]))
    terms = documents_loss(wam, documents, [sizes], noise, "robot", 1.0).terms
    assert terms.action_count == 3 * (0.5 + 1 + 0.5)  # of three channels the mean over each transition's vectors
    assert terms.ahead.action_count == 3 * (1 + 0.5) + 3 * 0.5


def test_packed_documents_with_committed_actions_learn_as_each_alone():
    chunks, settings = [(2, 1), (1, 1, 1)], LossSettings(delay=1)
    wam = model(0)
    terms = []
    for sizes in ((chunks[0],), (chunks[1],), chunks):
        documents, noise = drawn(*sizes, settings=settings)
        counts = torch.cat([torch.arange(len(one)) % 2 for one in sizes])[None]
        noise = replace(noise, committed=counts)
        terms.append(documents_loss(wam, documents, list(sizes), noise, "robot", 1.0).terms)
    torch.testing.assert_close(terms[0].action + terms[1].action, terms[2].action, atol=1e-5, rtol=1e-5)
    assert terms[0].action_count + terms[1].action_count == terms[2].action_count


def test_nothing_is_learned_beyond_an_episodes_end():
    wam, sizes = model(1), (1, 1, 1)
    documents, noise = drawn(sizes)
    short = replace(documents, valid=torch.tensor([[True, True, False]]))
    ahead = documents_loss(wam, short, [sizes], noise, "robot", 1.0).terms.ahead
    assert (ahead.video_count, ahead.action_count) == (1, 3)  # the second transition, of three channels


def test_a_sequence_that_asks_nothing_gives_zero_gradients_and_no_loss():
    """All ranks must have gradients of the same parameters."""
    wam = model()
    without = loss(wam, (3,))
    assert without.look_ahead == 0
    without.total.backward()
    gradients = [parameter.grad for parameter in wam.look_ahead.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_every_layer_learns_and_so_does_the_model_below():
    wam = model()
    documents, noise = drawn((1, 1, 1))
    total = documents_loss(wam, documents, [(1, 1, 1)], noise, "robot", 1.0).look_ahead
    assert total is not None
    total.backward()
    lacking = [n for n, p in wam.named_parameters() if p.grad is None or not p.grad.any()]
    assert all(name.startswith(("action_kinds", "spaces.robot.state", "views")) or "bias" in name for name in lacking)


def test_jointly_predicted_actions_look_ahead_too():
    wam = model(joint_actions=6)
    batch, sizes = segments(3), (1, 1, 1)
    noise = draw_noise(batch, 3, LossSettings(), torch.Generator().manual_seed(0), joint=6)
    found = documents_loss(wam, Documents.of_segments(batch, GRID), [sizes], noise, "robot", 1.0).terms.ahead
    assert (found.video_count, found.action_count) == (2 + 1, 6)  # the last frame's slot holds no action


def test_recomputing_layers_look_ahead_the_same():
    chunks = (2, 2, 1), (1, 1)
    plain, again = model(), model()
    prepare_layers(again, ScaleSettings(recompute="selective", compile=False))
    assert all(part.layer.recompute == "selective" for part in again.look_ahead)
    losses = [loss(wam, *chunks) for wam in (plain, again)]
    assert torch.equal(losses[0].total, losses[1].total)
    for one in losses:
        one.total.backward()
    for (name, p), q in zip(plain.named_parameters(), again.parameters(), strict=True):
        assert p.grad is None or torch.equal(q.grad, p.grad), name


def test_layers_that_look_ahead_are_compiled_for_training_alone(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda part, **_: compiled.append(part) or part)
    compile_layers(model())
    assert len(compiled) == 2 * (2 + LAYERS)  # two halves of each layer
    compiled.clear()
    compiled_run(model())
    assert len(compiled) == 2 * 2


def test_an_estimate_counts_them_for_training_and_not_for_the_model_that_acts():
    wam, chunks = model(), [(2, 2, 1), (1, 1, 1, 1)]
    costs = DocumentCosts(wam.config, "robot", 4, 2, state=True, text=4)
    cost = sum((costs.of(sizes) for sizes in chunks), SequenceCost())
    documents, noise = drawn(*chunks)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run(wam, documents, chunks, noise)
    assert counter.get_total_flops() == cost.flops
    steps = look_ahead_tokens(documents_layout(wam, documents, chunks, "robot"), LAYERS)
    assert cost.ahead_video == sum(len(step.video) for step in steps)
    assert cost.ahead_side == sum(len(step.actions) for step in steps)
    counts, plain = wam.parameter_counts(), meta_model(replace(wam.config, look_ahead=0)).parameter_counts()
    assert counts["look_ahead"] == sum(p.numel() for p in wam.look_ahead.parameters())
    assert plain == {name: count for name, count in counts.items() if name != "look_ahead"}


AHEAD = ("--model.loss.look_ahead=2", "--model.chunk_sizes=[1,1]", "--trainer.max_steps=4")


def test_a_run_resumes_exactly_and_its_export_looks_nowhere(fit, tmp_path, capsys):
    whole = read_checkpoint(fit(tmp_path / "whole", *AHEAD))
    half = ("--trainer.limit_train_batches=2", "--trainer.max_epochs=1", "--checkpoint.every_n_steps=2")
    fit(tmp_path / "halves", *AHEAD, *half)
    path = fit(tmp_path / "halves", *AHEAD, "--ckpt_path=last")
    halves = read_checkpoint(path)
    assert any("look_ahead" in name for name in whole["state_dict"])
    for name, weight in whole["state_dict"].items():
        assert torch.equal(weight, halves["state_dict"][name]), name
    curves = read_curves(tmp_path / "whole")
    rows = [curves[f"train/{name}"][:, 1] for name in ("loss", "video", "action", "look_ahead")]
    np.testing.assert_allclose(rows[0], rows[1] + rows[2] + 0.3 * rows[3], rtol=1e-5)
    trained = read_trained(path).wam
    assert trained.config.look_ahead == 0
    assert not any("look_ahead" in name for name in trained.state_dict())
    # Actions with the layers in place are those without them, bit for bit.
    kept = WorldActionModel(WAMConfig.from_dict(json.loads(halves["repwam"]["json"])["config"])).eval()
    kept.load_state_dict(halves["repwam"]["ema"]["average"])
    assert kept.config.look_ahead == 2
    assert torch.equal(_planned(kept), _planned(trained))
    fit(tmp_path / "halves", *AHEAD[1:], "--trainer.max_steps=5", "--ckpt_path=last", expect=2)
    assert "loss.look_ahead" in capsys.readouterr().err


def _planned(wam: WorldActionModel) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    text, mask = torch.randn(1, 3, 16, generator=draw), torch.ones(1, 3, dtype=torch.bool)
    rollout = Rollout(wam, space="robot", grid=(1, 2, 2), text=text, text_mask=mask, chunk_frames=1)
    states = torch.zeros(1, 1, wam.config.space("robot").state_channels)
    rollout.observe(torch.randn(1, 1, 4, 8, generator=draw), states)
    return rollout.plan(1, generator=draw).actions


def test_a_pretrained_model_gets_layers_and_loses_those_it_came_with(fit, tmp_path):
    latent = ("--model.space=latent", "--data.space=latent", "--trainer.max_steps=1")
    fit(tmp_path / "pretrain", *latent)
    read_trained(tmp_path / "pretrain" / "last.ckpt").wam.save_pretrained(tmp_path / "wam")
    onto = (f"--model.init_from={tmp_path / 'wam'}", "--model.wam=null", "--trainer.max_steps=1")
    stored = read_checkpoint(fit(tmp_path / "adapt", *onto, "--model.loss.look_ahead=1"))
    assert any(name.startswith("wam.look_ahead.0.") for name in stored["state_dict"])
    assert not any(name.startswith("wam.look_ahead.1.") for name in stored["state_dict"])


def test_what_a_user_can_get_wrong():
    with pytest.raises(UserError, match=r"give loss\.look_ahead in its place"):
        WAMTraining("tiny", wam={"look_ahead": 2})
    with pytest.raises(UserError, match="look_ahead"):
        LossSettings(look_ahead=9)
    with pytest.raises(UserError, match="look_ahead_weight"):
        LossSettings(look_ahead_weight=0.0)
