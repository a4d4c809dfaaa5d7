"""`repwam estimate`: what a training run needs, read off the model itself: memory, FLOPs, time, data.

Parameters are counted on the model on the meta device and visible pairs on its mask. Matrix products, two FLOPs per
multiplication and addition as `torch.utils.flop_counter` counts them, follow from the tokens that pass each linear
layer; norms, activations and the optimizer are not counted. Only what layers keep for the backward pass is a formula.
Torch is loaded where a model is built: the command line reads its options' defaults and devices here.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from repvitok.config import RepViTokConfig
from repvitok.runtime.documents import load_yaml, parse
from repvitok.runtime.errors import UserError

from repwam_core.model.config import Recompute, WAMConfig

if TYPE_CHECKING:
    from repwam_core.model.sequence import TokenLayout
    from repwam_core.model.wam import WorldActionModel
    from repwam_core.training.finetuning import FineTuning

GIB = 2**30
FITTING_SHARE = 0.9
"""Of a device's memory: the rest is for what is not counted, and for fragments."""
MOST_FRAME_TOKENS = 65_536
ENCODE_FLOPS_PER_TOKEN = 259e9 / 1280
"""FLOPs of RepViTok's encoder per latent token: 259 GFLOP for a clip of 17 x 256 x 256, which has 5 x 256 tokens."""
RAW_FRAMES_PER_LATENT = RepViTokConfig().tubelet_frames
DECODE_FRAMES_PER_CORE_S = 500.0
"""Frames of video that a core decodes in a second, between PyAV's 299 and 702 at 256 pixels (benchmarks)."""


@dataclass(frozen=True)
class Device:
    """An accelerator as its maker states it: dense bf16 FLOPs per second, and memory in bytes."""

    peak_flops: float
    memory: float


DEVICES = {
    "a100": Device(312e12, 80e9),
    "b200": Device(2250e12, 180e9),
    "h20": Device(148e12, 96e9),
    "h100": Device(989e12, 80e9),
    "h200": Device(989e12, 141e9),
    "rtx4090": Device(165e12, 24e9),
}


def peak_flops(name: str) -> float | None:
    """Peak FLOPs per second of a device by the name it reports, such as "NVIDIA H200"; None where it is not known."""
    words = name.lower().replace("-", " ").split()
    words = [*words, *map("".join, pairwise(words))]  # "RTX 4090"
    return next((device.peak_flops for key, device in DEVICES.items() if key in words), None)


@dataclass(frozen=True)
class SequenceCost:
    """What one training sequence holds and takes; sequences add up.

    Attributes:
        documents: episodes or pieces.
        clean_video, video: tokens, of which `video` counts clean and noisy ones.
        side: tokens of the action expert.
        text: text tokens over all documents, the null token of each included.
        groups: groups of video tokens of one noise level, a latent frame each.
        pairs: pairs of tokens of which one attends to the other.
        flops: of the forward pass, look-ahead layers included.
        ahead_video, ahead_side: tokens of all look-ahead layers together.
    """

    documents: int = 0
    clean_video: int = 0
    video: int = 0
    side: int = 0
    text: int = 0
    groups: int = 0
    pairs: int = 0
    flops: int = 0
    ahead_video: int = 0
    ahead_side: int = 0

    def __add__(self, other: SequenceCost) -> SequenceCost:
        return SequenceCost(*(getattr(self, item.name) + getattr(other, item.name) for item in fields(self)))

    def __mul__(self, copies: int) -> SequenceCost:
        return SequenceCost(*(copies * getattr(self, item.name) for item in fields(self)))

    @property
    def tokens(self) -> int:
        """All tokens."""
        return self.video + self.side

    @property
    def training_flops(self) -> int:
        """Of forward and backward pass, the backward counted as two forward passes and recomputation not at all."""
        return 3 * self.flops


def meta_model(config: WAMConfig) -> WorldActionModel:
    """The model without its numbers."""
    import torch

    from repwam_core.model.wam import WorldActionModel

    with torch.device("meta"):
        return WorldActionModel(config)


class DocumentCosts:
    """The costs of documents of one kind, by the sizes of their chunks (`sequence.training_layout`).

    All but self-attention grows by the same amounts with each transition and each chunk. Three documents of at most two
    transitions tell them. They pass a narrow twin of the model, with the same layers, on the CPU.

    Args:
        config: of the model.
        space: name of the action space.
        tokens: of a latent frame, over all cameras.
        vectors: action vectors per transition; 0 where the video expert predicts the actions.
        state: whether clean frames have a state token.
        text: padded length of the instructions, without the null token.
    """

    def __init__(
        self, config: WAMConfig, space: str, tokens: int, vectors: int, *, state: bool = False, text: int = 16
    ) -> None:
        import torch

        from repwam_core.model.wam import WorldActionModel

        self.config, self.space, self.tokens, self.vectors = config, space, tokens, vectors
        self.state, self.text = state, text
        narrow = {"width": 8, "heads": 1, "ffn": 1, "action_width": 8, "action_ffn": 1, "latent_dim": 1, "text_dim": 1}
        with torch.random.fork_rng(devices=[]):
            twin, model = WorldActionModel(replace(config, **narrow)), meta_model(config)
        shortest, long_chunk, two_chunks = (self._pass(twin, model, sizes) for sizes in ((1,), (2,), (1, 1)))
        self._shortest, self._per_transition = shortest, long_chunk + shortest * -1
        self._per_chunk = two_chunks + long_chunk * -1
        if config.look_ahead:  # of one layer, where it predicts one transition, and two; more take as much again each
            one, two = (self._pass(twin, model, (size, size), ahead=1).flops for size in (1, 2))
            self._ahead_first = one - two_chunks.flops
            self._ahead_more = two - self._pass(twin, model, (2, 2)).flops - self._ahead_first

    def without_attention(self, chunk_sizes: Sequence[int]) -> SequenceCost:
        """The cost of a document, but for the pairs of self-attention."""
        transitions, chunks = sum(chunk_sizes), len(chunk_sizes)
        return self._shortest + self._per_transition * (transitions - 1) + self._per_chunk * (chunks - 1)

    def of(self, chunk_sizes: Sequence[int]) -> SequenceCost:
        """The cost of a document."""
        config, cost = self.config, self.without_attention(chunk_sizes)
        history = config.action_history, config.coupling, config.window
        pairs = visible_pairs(tuple(chunk_sizes), self.tokens, self.vectors, self.state, *history)
        # Per pair and layer a product with the query and one with the value: no counter sees into FlexAttention.
        cost = replace(cost, pairs=pairs, flops=cost.flops + 4 * config.width * config.depth * pairs)
        return cost + self._look_ahead(chunk_sizes)

    def _look_ahead(self, chunk_sizes: Sequence[int]) -> SequenceCost:
        """What the look-ahead layers take; those that have nothing to predict are not counted."""
        cost, sizes = SequenceCost(), list(chunk_sizes)
        for _ in range(self.config.look_ahead):
            sizes = [min(size, other) for size, other in zip(sizes[1:], sizes, strict=False)]
            if not sizes:
                break
            video, side = ([size * of_frame for size in sizes] for of_frame in (self.tokens, self.vectors))
            if self.config.coupling == "joint":
                pairs = sum((n + m) ** 2 for n, m in zip(video, side, strict=True))
            else:
                pairs = sum(n * n + m * m for n, m in zip(video, side, strict=True))
            flops = self._ahead_first + (sum(sizes) - 1) * self._ahead_more + 4 * self.config.width * pairs
            cost += SequenceCost(flops=flops, ahead_video=sum(video), ahead_side=sum(side))
        return cost

    def _pass(
        self, twin: WorldActionModel, model: WorldActionModel, chunk_sizes: tuple[int, ...], ahead: int = 0
    ) -> SequenceCost:
        """What a short document holds, and the FLOPs that its pass through the twin would take in the model.

        `ahead` of the look-ahead layers run.
        """
        import torch
        from torch import nn

        from repwam_core.model.blocks import CrossAttention
        from repwam_core.model.sequence import Modality, WAMInputs, look_ahead_tokens

        layout = _layout(chunk_sizes, self.tokens, self.vectors, self.state, self.config.action_history)
        space, narrow = self.config.space(self.space), twin.config
        inputs = WAMInputs(
            layout=layout,
            video=torch.zeros(1, len(layout.video), narrow.latent_dim + narrow.joint_actions),
            actions=torch.zeros(1, len(layout.actions), space.channels),
            states=torch.zeros(1, len(layout.states), space.state_channels) if len(layout.states) else None,
            times=torch.zeros(1, len(layout.levels)),
            text=torch.zeros(1, 1, self.text, narrow.text_dim),
            text_mask=torch.ones(1, 1, self.text, dtype=torch.bool),
            space=self.space,
        )
        flops = 0

        def count(of_token: int) -> Callable[..., None]:
            def hook(_module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
                nonlocal flops
                flops += of_token * (output.numel() // output.shape[-1])

            return hook

        hooks = []
        for module, wide in zip(twin.modules(), model.modules(), strict=True):
            if isinstance(wide, nn.Linear):
                hooks.append(module.register_forward_hook(count(2 * wide.weight.numel())))
            elif isinstance(wide, CrossAttention):  # a product with each text token's key, one with its value
                of_token = 4 * wide.projections.query.out_features * (self.text + 1)
                hooks.append(module.register_forward_hook(count(of_token)))

        def unattended(_layer: int, _queries: torch.Tensor, _keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
            return values

        with torch.no_grad():
            twin(inputs, unattended, ahead=[(step, unattended) for step in look_ahead_tokens(layout, ahead)])
        for hook in hooks:
            hook.remove()
        clean_video = int((~layout.noisy & (layout.modality == Modality.VIDEO)).sum())
        video, side = len(layout.video), len(layout.actions) + len(layout.states)
        return SequenceCost(1, clean_video, video, side, self.text + 1, video // self.tokens, 0, flops)


def _layout(chunk_sizes: tuple[int, ...], tokens: int, vectors: int, state: bool, history: bool) -> TokenLayout:
    from repwam_core.model.sequence import training_layout

    frames = sum(chunk_sizes) + 1
    return training_layout(frames, chunk_sizes, (1, 1, tokens), vectors, state=state, action_history=history)


@lru_cache(maxsize=1024)
def visible_pairs(
    chunk_sizes: tuple[int, ...], tokens: int, vectors: int, state: bool, history: bool, coupling: str,
    window: int,
) -> int:  # fmt: skip
    """Pairs of tokens of a document of which one attends to the other (`attention.visible`).

    The mask tells neither the video tokens of a frame apart nor the action vectors of a transition: one token stands
    for all of them in the layout whose blocks are counted.
    """
    import numpy as np

    from repwam_core.model.attention import block_plan
    from repwam_core.model.sequence import Modality

    size = chunk_sizes[0]
    equal = next((number for number, other in enumerate(chunk_sizes) if other != size), len(chunk_sizes))
    if (further := equal - window // size - 3) > 0:  # their windows end after the prefix: each chunk adds the same
        rest = tokens, vectors, state, history, coupling, window
        long, short = (visible_pairs(chunk_sizes[further + less :], *rest) for less in (0, 1))
        return long + further * (long - short)
    layout = _layout(chunk_sizes, 1, min(vectors, 1), state, history)
    weight = np.array([tokens, vectors, 1])[layout.modality.numpy()]  # in the order of Modality
    assert [*Modality] == [Modality.VIDEO, Modality.ACTION, Modality.STATE]
    plan = block_plan(layout, coupling, window)
    of_segment = np.add.reduceat(weight, np.cumsum([0, *plan.sizes[:-1]]))
    return sum(
        int(of_segment[list(block.queries)].sum()) * int(of_segment[list(block.keys)].sum()) for block in plan.blocks
    )


def state_bytes(model: WorldActionModel, muon: bool = True) -> int:
    """Bytes of what lasts from step to step, over all ranks that share one copy, in float32.

    Parameters, and of those that are trained gradients, averages, and moments: one for each parameter that Muon steps,
    two for AdamW's.
    """
    from repvitok.runtime.training import parameter_groups

    hidden = sum(parameter.numel() for parameter in parameter_groups(model)[0]) if muon else 0
    total = sum(parameter.numel() for parameter in model.parameters())
    return 4 * (total + 4 * trained_parameters(model) - hidden)


def trained_parameters(model: WorldActionModel) -> int:
    """How many numbers of a model are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def activation_bytes(config: WAMConfig, cost: SequenceCost, recompute: Recompute = "none", bf16: bool = True) -> int:
    """Bytes that the layers keep for the backward pass of one sequence, at their peak.

    FlexAttention or another attention that keeps queries, keys, values, outputs and one number per head is assumed, and
    one q, k, v, o for all tokens. With recomputation a layer keeps its inputs alone ("full") or also what attention
    keeps ("selective"), and one layer at a time everything; with "offload" inputs are on the host but for one layer's.
    Weights that autocast converts are not counted.

    Args:
        config: the model.
        cost: the sequence.
        recompute: "none", "selective", "full" or "offload".
        bf16: under bf16 autocast; else everything in float32.
    """
    layer, ahead = _layer_bytes(config, cost, bf16), _ahead_bytes(config, cost, recompute, bf16)
    if recompute == "none":
        return config.depth * layer + ahead
    kept = offloaded_bytes(config, cost) // config.depth
    if recompute == "selective":
        kept += cost.tokens * (4 * config.width * (2 if bf16 else 4) + 4 * config.heads)
    return (1 if recompute == "offload" else config.depth) * kept + layer + ahead


def _ahead_bytes(config: WAMConfig, cost: SequenceCost, recompute: Recompute, bf16: bool) -> int:
    """What all look-ahead layers keep: a layer's numbers for their tokens, with their narrow feed-forwards.

    With recomputation what enters them; around the layer, always, what came before and was carried, and with what head.
    """
    if not cost.ahead_video:
        return 0
    low, w, a = 2 if bf16 else 4, config.width, config.action_width
    around = (2 * low + 3 * 4) * (w * cost.ahead_video + a * cost.ahead_side)
    if recompute != "none":
        return around + 4 * (w * cost.ahead_video + a * cost.ahead_side)
    groups = cost.groups * cost.ahead_video // cost.video
    own = SequenceCost(video=cost.ahead_video, side=cost.ahead_side, text=config.look_ahead * cost.text, groups=groups)
    return around + _layer_bytes(replace(config, ffn=w, action_ffn=a), own, bf16)


def offloaded_bytes(config: WAMConfig, cost: SequenceCost) -> int:
    """Bytes of what enters all layers, which recompute "offload" keeps on the host: float32 under autocast, too."""
    return 4 * config.depth * (config.width * cost.video + config.action_width * cost.side)


def _layer_bytes(config: WAMConfig, cost: SequenceCost, bf16: bool) -> int:
    """What one layer keeps: in each bracket the numbers in the autocast type, then those that are float32 always.

    Counted off the layer's code: of all tokens the inputs of q, k, v (three casts under bf16, one tensor otherwise), q
    and k before their norm and before its scale, q, k, v, what attention returned and what the output layer made of it;
    of one expert's tokens what its norms, gates, cross-attention and feed-forward keep, and the modulation, which the
    action expert has for each token.
    """
    w, a, heads = config.width, config.action_width, config.heads
    side_heads = a // config.head_dim
    low, casts = (2, 2) if bf16 else (4, 0)
    common = cost.tokens * (low * (6 + casts) * w + 4 * (4 * w + 3 * heads))
    video = cost.video * (low * (6 * w + 2 * config.ffn) + 4 * (7 * w + 2 * heads + 6))
    side = cost.side * (low * (8 * a + 2 * config.action_ffn) + 4 * (13 * a + 2 * side_heads + 6))
    text = cost.text * (low * (2 + casts) + 4 * 2) * (w + a)
    return common + video + side + text + cost.groups * 4 * 6 * w


@dataclass(frozen=True, kw_only=True)
class RunRequest:
    """The run to estimate.

    Attributes:
        preset: of `WAMConfig`.
        look_ahead: look-ahead layers, of training alone.
        gpus: devices; one packed sequence each per step.
        tokens: of a packed sequence.
        gpu: a name of `DEVICES`.
        total_tokens: of the run.
        mfu: share of the device's peak that training reaches: an assumption, to be replaced by a measurement.
        shard_size: devices over which a copy of the model is spread.
        recompute: as in `ScaleSettings`.
        grid: (views, rows, columns) of a latent frame.
        transitions: of an episode.
        chunk: latent frames of a chunk.
        vectors: action vectors per transition.
        passes: how often training goes through the data.
    """

    preset: str = "5b"
    look_ahead: int = 0
    gpus: int = 128
    tokens: int = 160_000
    gpu: str = "h20"
    total_tokens: int = 100_000_000_000
    mfu: float = 0.4
    shard_size: int = 8
    recompute: Recompute = "full"
    grid: tuple[int, int, int] = (1, 16, 16)
    transitions: int = 96
    chunk: int = 2
    vectors: int = 4
    passes: float = 1.0

    def __post_init__(self) -> None:
        for name in ("gpus", "tokens", "total_tokens", "shard_size", "transitions", "chunk", "vectors", "passes"):
            if not getattr(self, name) > 0:
                raise UserError(f"--{name.replace('_', '-')}: expected a number above 0, got {getattr(self, name)}")
        if not 0 < self.mfu <= 1:
            raise UserError(f"--mfu: expected a share in (0, 1], got {self.mfu}")
        if self.gpu not in DEVICES:
            raise UserError(f"--gpu: expected one of {sorted(DEVICES)}, got {self.gpu!r}")
        if self.gpus % self.shard_size:
            raise UserError(f"--shard-size: expected a divisor of --gpus {self.gpus}, got {self.shard_size}")
        if not 1 <= math.prod(self.grid) <= MOST_FRAME_TOKENS:
            raise UserError(f"--grid: expected 1 to {MOST_FRAME_TOKENS:,} tokens, got {math.prod(self.grid):,}")


@dataclass(frozen=True)
class RunEstimate:
    """The answers; bytes and seconds are per device unless they say otherwise.

    Attributes:
        sequence: a packed one.
        parameters: of the video and of the action expert, and of look-ahead layers.
        trained: parameters that are trained, all or some; low-rank updates are among them.
        state: bytes of parameters, gradients, moments and averages on one device.
        activations: bytes kept for the backward pass, by `recompute`.
        offloaded: bytes of the host's memory that recompute "offload" takes.
        flops: of a step, forward and backward, recomputation counted not at all.
        step_s: of a step, at the assumed share of the peak.
        steps, days: of the run.
        latents_bytes: of the data's latents in float16, over all.
        encode_gpu_hours, decode_core_hours: of making them, over all.
    """

    sequence: SequenceCost
    parameters: dict[str, int]
    state: float
    activations: dict[Recompute, int]
    offloaded: int
    flops: int
    step_s: float
    steps: float
    days: float
    latents_bytes: float
    encode_gpu_hours: float
    decode_core_hours: float
    trained: int


def model_of_recipes(recipes: Sequence[str | Path]) -> tuple[WAMConfig, int | None]:
    """The model that recipes laid over each other train, and the tokens of its packed sequences, where they say."""
    preset, sizes, tokens = "1.3b", {}, None
    for path in recipes:
        recipe = load_yaml(path)
        model, data = ((recipe.get(name) if isinstance(recipe, dict) else None) or {} for name in ("model", "data"))
        preset = model.get("preset") or preset
        sizes |= model.get("wam") or {}
        tokens = (data.get("packing") or {}).get("token_budget") or tokens
    if unknown := sorted(sizes.keys() - {item.name for item in fields(WAMConfig)}):
        raise UserError(f"--recipe: expected settings of the model under model.wam, got {', '.join(unknown)}")
    return WAMConfig.preset(preset, **sizes), tokens


def training_of_recipes(recipes: Sequence[str | Path]) -> tuple[FineTuning, bool]:
    """What of their model recipes laid over each other train, and whether by Muon."""
    from repvitok.runtime.training import OptimizerSettings

    from repwam_core.training.finetuning import FineTuning, LoRASettings

    model: dict[str, Any] = {}
    muon = OptimizerSettings().name == "muon"
    for path in recipes:
        recipe = load_yaml(path)
        over = (recipe.get("model") if isinstance(recipe, dict) else None) or {}
        muon = (over.get("optimizer") or {}).get("name", "muon" if muon else "adamw") == "muon"
        model |= over
    lora = parse(model["lora"], LoRASettings, "--recipe: model.lora") if model.get("lora") else None
    freeze = parse(model.get("freeze") or [], list[str], "--recipe: model.freeze")
    return FineTuning(tuple(freeze), lora), muon


def estimate_run(
    request: RunRequest,
    config: WAMConfig | None = None,
    finetuning: FineTuning | None = None,
    muon: bool = True,
) -> RunEstimate:
    """Answer a request, for another model than its preset if `config` is one, of which `finetuning` trains a part.

    FLOPs and activations are those of training all of it: bounds from above where a part is trained, but for the few
    numbers of low-rank updates.
    """
    config = config or WAMConfig.preset(request.preset, look_ahead=request.look_ahead)
    device = DEVICES[request.gpu]
    name, space = next(iter(config.spaces.items()))
    config = replace(config, spaces={name: replace(space, vectors_per_transition=request.vectors)})
    sequence, model = packed_sequence(config, request), meta_model(config)
    parameters = model.parameter_counts()
    if finetuning:
        finetuning.apply(model)
    flops = sequence.training_flops
    recomputed = {"none": 0.0, "selective": 0.3, "full": 1 / 3, "offload": 1 / 3}[request.recompute]
    step_s = flops * (1 + recomputed) / (device.peak_flops * request.mfu)
    steps = request.total_tokens / (sequence.tokens * request.gpus)
    latent_tokens = request.total_tokens * sequence.clean_video / sequence.tokens / request.passes
    raw_frames = latent_tokens / math.prod(request.grid) * request.grid[0] * RAW_FRAMES_PER_LATENT
    return RunEstimate(
        sequence=sequence,
        parameters=parameters,
        trained=trained_parameters(model),
        state=state_bytes(model, muon) / request.shard_size,
        activations={name: activation_bytes(config, sequence, name) for name in get_args(Recompute)},
        offloaded=offloaded_bytes(config, sequence),
        flops=flops,
        step_s=step_s,
        steps=steps,
        days=steps * step_s / 86400,
        latents_bytes=latent_tokens * config.latent_dim * 2,
        encode_gpu_hours=latent_tokens * ENCODE_FLOPS_PER_TOKEN / (device.peak_flops * request.mfu) / 3600,
        decode_core_hours=raw_frames / DECODE_FRAMES_PER_CORE_S / 3600,
    )


def packed_sequence(config: WAMConfig, request: RunRequest) -> SequenceCost:
    """A sequence of equal episodes, as many as fit the token budget; of a piece of one where not even one fits."""
    costs = DocumentCosts(config, next(iter(config.spaces)), math.prod(request.grid), request.vectors)

    def tokens(chunks: int) -> int:
        return costs.without_attention((request.chunk,) * chunks).tokens

    largest = max(1, request.transitions // request.chunk)
    chunks = max(1, bisect_right(range(1, largest + 1), request.tokens, key=tokens))
    copies = request.tokens // tokens(chunks)
    if not copies:
        raise UserError(f"--tokens: not even one chunk of {tokens(1)} tokens fits {request.tokens}")
    return costs.of((request.chunk,) * chunks) * copies


def format_estimate(request: RunRequest, run: RunEstimate) -> list[str]:
    """The estimate in words, one fact a line, with what it rests on."""
    device, sequence = DEVICES[request.gpu], run.sequence
    each = ", ".join(f"{name} {value / GIB:,.0f} GiB" for name, value in run.activations.items())
    needed = {name: run.state + activations for name, activations in run.activations.items()}
    fits = {name: memory < FITTING_SHARE * device.memory for name, memory in needed.items()}
    memory = f"memory: {needed[request.recompute] / GIB:.0f} of {device.memory / GIB:.0f} GiB"
    host = f"{run.offloaded / GIB:.0f} GiB of the host's per device"
    if request.recompute == "offload":
        memory += f" and {host}"
    if fits[request.recompute]:
        memory += ", fits"
    elif fits["offload"]:
        memory += f", does not fit; with recompute offload {needed['offload'] / GIB:.0f} GiB and {host} would"
    else:
        memory += ", does not fit; take fewer tokens or more devices per copy"
    ahead = run.parameters.get("look_ahead", 0)
    ahead = f", and {ahead / 1e6:.0f} M that look ahead in training alone" if ahead else ""
    return [
        f"{request.preset} on {request.gpus} x {request.gpu}, {request.shard_size} to a copy, recompute "
        f"{request.recompute}, {request.mfu:.0%} of the peak assumed",
        f"parameters: video {run.parameters['video'] / 1e9:.3f} B, action {run.parameters['action'] / 1e6:.0f} M"
        + ahead,
        f"sequence: {sequence.tokens:,} tokens in {sequence.documents} episodes ({sequence.video:,} video, "
        f"{sequence.side:,} action), {sequence.pairs / sequence.tokens:,.0f} visible keys per token",
        f"state per device: {run.state / GIB:.1f} GiB (float32 parameters; gradients, moments and average of "
        + ("all)" if run.trained >= sum(run.parameters.values()) else f"the {run.trained / 1e6:,.1f} M trained)"),
        f"activations per device, by recompute: {each}",
        memory,
        f"step: {run.flops / 1e15:.3g} PFLOP per device, {run.step_s:.1f} s, "
        f"{sequence.tokens * request.gpus / run.step_s:,.0f} tokens/s over all",
        f"run: {request.total_tokens / 1e9:,.3g} G tokens, {run.steps:,.0f} steps, "
        + (f"{run.days:.1f} days" if run.days >= 2 else f"{24 * run.days:.1f} hours"),
        f"data: {run.latents_bytes / 1e12:.2f} TB of float16 latents, {run.encode_gpu_hours:,.0f} GPU hours to "
        f"encode, {run.decode_core_hours:,.0f} core hours to decode",
    ]
