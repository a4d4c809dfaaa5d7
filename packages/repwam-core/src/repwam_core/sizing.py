"""What a training run needs, by arithmetic: parameters, memory, FLOPs, time, data. No torch.

Matrix products are counted, two FLOPs per multiplication and addition, as `torch.utils.flop_counter` does; norms,
activations and the optimizer are not. Tests hold parameters, FLOPs and memory against the model itself at a small size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace

from repwam_core.model.config import ActionSpace, Recompute, WAMConfig

FREQUENCIES = 128
"""Frequencies of the noise level embedding, `blocks.NoiseLevelEmbedding.frequencies`."""


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
}


def peak_flops(name: str) -> float | None:
    """Peak FLOPs per second of a device by the name it reports, such as "NVIDIA H200"; None where it is not known."""
    words = name.lower().replace("-", " ").split()
    return next((device.peak_flops for key, device in DEVICES.items() if key in words), None)


@dataclass(frozen=True)
class SequenceCounts:
    """What one training sequence holds; sequences add up.

    Attributes:
        clean_video, noisy_video, clean_action, noisy_action, state: tokens.
        pairs: pairs of tokens of which one attends to the other.
        documents: episodes or pieces.
        levels: noise levels.
        text: text tokens over all documents, the null token of each included.
        text_video, text_side: pairs of a video, or an action or state, token and a text token.
        kept_text_video, kept_text_side: the same of noisy video and action tokens alone.
        groups: groups of video tokens of one noise level, a latent frame each.
    """

    clean_video: int = 0
    noisy_video: int = 0
    clean_action: int = 0
    noisy_action: int = 0
    state: int = 0
    pairs: int = 0
    documents: int = 0
    levels: int = 0
    text: int = 0
    text_video: int = 0
    text_side: int = 0
    kept_text_video: int = 0
    kept_text_side: int = 0
    groups: int = 0

    def __add__(self, other: SequenceCounts) -> SequenceCounts:
        return SequenceCounts(*(getattr(self, item.name) + getattr(other, item.name) for item in fields(self)))

    @property
    def video(self) -> int:
        """Video tokens, clean and noisy."""
        return self.clean_video + self.noisy_video

    @property
    def side(self) -> int:
        """Tokens of the action expert."""
        return self.clean_action + self.noisy_action + self.state

    @property
    def tokens(self) -> int:
        """All tokens."""
        return self.video + self.side


def document_counts(
    config: WAMConfig,
    chunk_sizes: Sequence[int],
    tokens: int,
    vectors: int,
    *,
    state: bool = False,
    text: int = 16,
    copies: int = 1,
    read: bool = True,
) -> SequenceCounts:
    """Count a document of `sequence.training_layout`, and the pairs that `masks.visible` lets see each other.

    Args:
        config: of the model.
        chunk_sizes: latent frames of each chunk.
        tokens: of a latent frame, over all cameras.
        vectors: action vectors per transition.
        state: whether clean frames have a state token.
        text: padded length of the instructions, without the null token.
        copies: documents of this kind.
        read: without the clean tokens of the last chunk that nothing reads, as `inputs.without_unread` leaves them out.
    """
    transitions, joint = sum(chunk_sizes), config.coupling == "joint"
    vectors_clean = vectors * int(config.action_history)
    unread = chunk_sizes[-1] if read else 0
    frames = transitions + 1 - (unread if joint else 0)
    one = SequenceCounts(
        clean_video=tokens * frames,
        noisy_video=tokens * transitions,
        clean_action=vectors_clean * (transitions - unread),
        noisy_action=vectors * transitions,
        state=int(state) * (transitions + 1 - unread),
        pairs=_pairs(config, chunk_sizes, tokens, vectors, state, read),
        documents=1,
        levels=3 * len(chunk_sizes) + 2,
        text=text + 1,
        groups=frames + transitions,
    )
    counts = replace(
        one,
        text_video=one.video * one.text,
        text_side=one.side * one.text,
        kept_text_video=one.noisy_video * one.text,
        kept_text_side=one.noisy_action * one.text,
    )
    return SequenceCounts(*(copies * getattr(counts, item.name) for item in fields(counts)))


def _pairs(config: WAMConfig, chunk_sizes: Sequence[int], tokens: int, vectors: int, state: bool, read: bool) -> int:
    """Visible pairs of one document, chunk by chunk; the prefix is chunk 0."""
    sequential, vectors_clean = config.coupling == "sequential", vectors * int(config.action_history)
    side_frame = int(state) + vectors_clean

    def clean(first: int, stop: int) -> int:
        frames = max(0, stop - first)
        return frames * (tokens + side_frame) - (vectors_clean if first == 0 and frames else 0)

    prefix_side = int(state)
    total = tokens**2 + prefix_side * clean(0, 1) if sequential else clean(0, 1) ** 2
    start = 1
    for number, size in enumerate(chunk_sizes):
        before = clean(max(0, start - config.window), start)
        video, side, action = size * tokens, size * side_frame, size * vectors
        last = read and number == len(chunk_sizes) - 1
        if sequential:
            total += video * (before + video) + action * (before + action + video)  # noisy
            total += video * (before + video) + (0 if last else side * (before + video + side))  # clean
        else:
            total += (video + action) * (before + video + action)
            total += 0 if last else (video + side) * (before + video + side)
        start += size
    return total


def parameter_counts(config: WAMConfig) -> dict[str, int]:
    """Parameters of the video expert, with the shared attention, and of the action expert."""
    w, a, d, text = config.width, config.action_width, config.latent_dim, config.text_dim
    video = d * w + w + w * d + d + config.max_views * w + _expert(w, text)
    action = _expert(a, text) + 2 * a + sum(_space(config, space) for space in config.spaces.values())
    for_video, for_action = _attention(config)
    video += config.depth * (for_video + _expert_layer(w, config.ffn, config.head_dim))
    action += config.depth * (for_action + _expert_layer(a, config.action_ffn, config.head_dim))
    return {"video": video, "action": action}


def hidden_parameters(config: WAMConfig) -> int:
    """Parameters that Muon steps: the weights of linear layers inside the stack of layers."""
    w, a, per_modality = config.width, config.action_width, config.attention == "per_modality"
    attention = 4 * w * w + (4 * a * w if per_modality else 2 * a * w)
    cross, ffn = 4 * w * w + 4 * a * a, 2 * w * config.ffn + 2 * a * config.action_ffn
    return config.depth * (attention + cross + ffn)


def _attention(config: WAMConfig) -> tuple[int, int]:
    """Parameters of a layer's self-attention, counted to the video and to the action expert."""
    w, a, head = config.width, config.action_width, config.head_dim
    video = 4 * (w * w + w) + 2 * head
    if config.attention == "shared":
        return video, 2 * a * w + w + a
    return video, 3 * (a * w + w) + w * a + a + 2 * head


def _expert_layer(w: int, ffn: int, head: int) -> int:
    return 6 * w + 2 * w + 4 * (w * w + w) + 2 * head + 2 * w * ffn + ffn + w


def _expert(w: int, text: int) -> int:
    levels = 2 * FREQUENCIES * w + w + w * w + w + 6 * w * w + 6 * w
    return levels + text * w + w + w * w + w + w + 2 * w


def _space(config: WAMConfig, space: ActionSpace) -> int:
    a, c = config.action_width, space.channels
    state = space.state_channels * a + a if config.state_token and space.state_channels else 0
    return 2 * c * a + a + c + space.vectors_per_transition * a + state


def forward_flops(config: WAMConfig, counts: SequenceCounts, space: ActionSpace) -> float:
    """FLOPs of the forward pass of one sequence."""
    layers = (config.depth - 1) * _layer_flops(config, counts, last=False) + _layer_flops(config, counts, last=True)
    w, a, text = config.width, config.action_width, config.text_dim
    outside = 2 * config.latent_dim * w * (counts.video + counts.noisy_video)
    outside += 2 * space.channels * a * (counts.clean_action + 2 * counts.noisy_action)
    outside += 2 * space.state_channels * a * counts.state
    for width in (w, a):
        outside += 2 * (2 * FREQUENCIES * width + 7 * width * width) * counts.levels
        outside += 2 * (text * width + width * width) * (counts.text - counts.documents)
    return float(layers + outside)


def _layer_flops(config: WAMConfig, counts: SequenceCounts, last: bool) -> int:
    """FLOPs of one layer; only the noisy tokens leave the last one."""
    w, a = config.width, config.action_width
    video, side = (counts.noisy_video, counts.noisy_action) if last else (counts.video, counts.side)
    of_video, of_side = (
        (counts.kept_text_video, counts.kept_text_side) if last else (counts.text_video, counts.text_side)
    )
    if config.attention == "shared":
        around = 6 * w * w * counts.tokens + 2 * a * w * counts.side + 2 * w * w * (video + side) + 2 * w * a * side
    else:
        around = 6 * w * w * counts.video + 6 * a * w * counts.side + 2 * w * w * video + 2 * w * a * side
    attention = 4 * w * counts.pairs
    cross = 4 * w * w * (video + counts.text) + 4 * w * of_video + 4 * a * a * (side + counts.text) + 4 * a * of_side
    return around + attention + cross + 4 * w * config.ffn * video + 4 * a * config.action_ffn * side


def training_flops(config: WAMConfig, counts: Iterable[SequenceCounts], space: ActionSpace) -> float:
    """FLOPs of forward and backward pass, the backward counted as two forward passes and recomputation not at all."""
    return 3 * sum(forward_flops(config, one, space) for one in counts)


@dataclass(frozen=True)
class StateBytes:
    """Bytes of what lasts from step to step, over all ranks that share one copy."""

    parameters: int
    gradients: int
    optimizer: int
    average: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.gradients + self.optimizer + self.average


def state_bytes(config: WAMConfig) -> StateBytes:
    """Parameters, gradients, moments and averages in float32: one moment for Muon's, two for AdamW's."""
    total, hidden = sum(parameter_counts(config).values()), hidden_parameters(config)
    return StateBytes(4 * total, 4 * total, 4 * (2 * total - hidden), 4 * total)


def activation_bytes(
    config: WAMConfig, counts: SequenceCounts, recompute: Recompute = "none", bf16: bool = True
) -> float:
    """Bytes that the layers keep for the backward pass of one sequence, at their peak.

    FlexAttention or another attention that keeps queries, keys, values, outputs and one number per head is assumed, and
    one q, k, v, o for all tokens. With recomputation a layer keeps its inputs alone ("full") or also what attention
    keeps ("selective"), and one layer at a time everything; with "offload" inputs are on the host but for one layer's.
    Weights that autocast converts are not counted.

    Args:
        config: the model.
        counts: the sequence.
        recompute: "none", "selective", "full" or "offload".
        bf16: under bf16 autocast; else everything in float32.
    """
    layer = _layer_bytes(config, counts, bf16)
    if recompute == "none":
        return config.depth * layer
    kept = _input_bytes(config, counts)
    if recompute == "selective":
        kept += counts.tokens * (4 * config.width * (2 if bf16 else 4) + 4 * config.heads)
    return (1 if recompute == "offload" else config.depth) * kept + layer


def offloaded_bytes(config: WAMConfig, counts: SequenceCounts) -> int:
    """Bytes of the host's memory that the inputs of all layers take with recompute "offload"."""
    return config.depth * _input_bytes(config, counts)


def _input_bytes(config: WAMConfig, counts: SequenceCounts) -> int:
    """What enters a layer: both streams, in float32 under autocast, too."""
    return 4 * (config.width * counts.video + config.action_width * counts.side)


def _layer_bytes(config: WAMConfig, counts: SequenceCounts, bf16: bool) -> float:
    """What one layer keeps: in each bracket the numbers in the autocast type, then those that are float32 always.

    Counted off the layer's code: of all tokens the inputs of q, k, v (three casts under bf16, one tensor otherwise), q
    and k before their norm, q, k, v, what attention returned and what the output layer made of it; of one expert's
    tokens what its norms, gates, cross-attention and feed-forward keep, and the modulation, which the action expert has
    for each token.
    """
    w, a, heads = config.width, config.action_width, config.heads
    side_heads = a // config.head_dim
    low, casts = (2, 2) if bf16 else (4, 0)
    common = counts.tokens * (low * (8 + casts) * w + 4 * 3 * heads)
    video = counts.video * (low * (7 * w + 2 * config.ffn) + 4 * (5 * w + 2 * heads + 6))
    side = counts.side * (low * (8 * a + 2 * config.action_ffn) + 4 * (13 * a + 2 * side_heads + 6))
    text = counts.text * low * (3 + casts) * (w + a)
    return float(common + video + side + text + counts.groups * 4 * 8 * w)
