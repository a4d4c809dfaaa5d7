"""The world action model: noisy video and action tokens in, their velocities out (RepWAM Sec. 3.3, Eq. 5-7).

What follows from a layout alone is worked out once (`plan_pass`) and used in every pass over it. A pass is then a
function of tensors whose shapes do not change from chunk to chunk, which is what compilation and CUDA graphs ask for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from repvitok.errors import UserError
from repvitok.nn.rope import Rotary, axis_pairs
from repvitok.pretrained import PretrainedModel, drawn_once
from torch import Tensor, nn

from repwam_core.model.blocks import (
    ExpertLayer,
    Kept,
    LayerContext,
    NoiseLevelEmbedding,
    OutputHead,
    Projections,
    StreamContext,
    TextContext,
    TextEmbedding,
    Turn,
    WAMLayer,
    take,
)
from repwam_core.model.config import ActionSpace, WAMConfig
from repwam_core.model.inputs import Velocities, WAMInputs, without_unread
from repwam_core.model.masks import Attend
from repwam_core.model.sequence import Run, SequenceLayout


@dataclass(frozen=True, eq=False)
class StreamPlan:
    """One stream of a pass.

    Attributes:
        level: noise level of each group of tokens.
        documents: the ranges of tokens of one document, and which it is.
        kept: ranges of the noisy tokens, which leave the last layer.
        kept_groups: the same in groups.
        kept_documents: `documents` of the noisy tokens alone.
    """

    level: Int[Tensor, " groups"]
    documents: Sequence[tuple[Run, int]]
    kept: list[Run]
    kept_groups: list[Run]
    kept_documents: Sequence[tuple[Run, int]]

    def to(self, device: torch.device) -> StreamPlan:
        """The same plan for passes on a device."""
        return replace(self, level=self.level.to(device))

    def narrowed(self, context: StreamContext) -> StreamContext:
        """The context of the noisy tokens."""
        modulation = take(context.modulation.flatten(2), self.kept_groups).unflatten(2, (6, -1))
        return StreamContext(modulation, context.text, self.kept_documents)


@dataclass(frozen=True, eq=False)
class PassPlan:
    """Both streams of a pass.

    Attributes:
        view: camera of each video token.
        vector: which of its transition's action vectors each action token is.
        turn: where the tokens stand, video first.
        video, side: the streams.
        kept: ranges of the noisy tokens of both, video first.
    """

    view: Int[Tensor, " n_video"]
    vector: Int[Tensor, " n_action"]
    turn: Turn
    video: StreamPlan
    side: StreamPlan
    kept: list[Run]

    def to(self, device: torch.device) -> PassPlan:
        """The same plan for passes on a device."""
        return replace(
            self,
            view=self.view.to(device),
            vector=self.vector.to(device),
            turn=Turn(*(factor.to(device) for factor in self.turn)),
            video=self.video.to(device),
            side=self.side.to(device),
        )

    def kept_tokens(self, video: StreamContext, side: StreamContext) -> Kept:
        """What leaves the last layer: the tokens whose velocities are asked for."""
        return Kept(self.kept, self.video.kept, self.side.kept, self.video.narrowed(video), self.side.narrowed(side))


def plan_pass(layout: SequenceLayout, head_dim: int, rope_base: float) -> PassPlan:
    """Everything the model needs to know of a layout, on the CPU; `PassPlan.to` moves it."""
    video = _stream_plan(layout.video_stream, layout.noisy_video_runs, layout.group)
    side = _stream_plan(layout.side_stream, layout.noisy_action_runs, 1)
    videos = len(layout.video)
    return PassPlan(
        view=layout.video_stream.view,
        vector=layout.vector[layout.actions],
        turn=Turn.of(rotary_of(layout.streams.position, head_dim, rope_base)),
        video=video,
        side=side,
        kept=[*video.kept, *((start + videos, stop + videos) for start, stop in side.kept)],
    )


def rotary_of(position: Float[Tensor, "n 3"], head_dim: int, base: float) -> Rotary:
    """Rotary tables of arbitrary, also fractional, coordinates; angles in float64 so that frames may grow."""
    angles = [
        torch.outer(
            position[:, axis].double(),
            base ** -(torch.arange(pairs, device=position.device, dtype=torch.float64) / pairs),
        )
        for axis, pairs in enumerate(axis_pairs(head_dim))
    ]
    table = torch.cat(angles, dim=-1)
    return Rotary(table.cos().float(), table.sin().float())


def _stream_plan(stream: SequenceLayout, kept: list[Run], group: int) -> StreamPlan:
    groups = [(start // group, stop // group) for start, stop in kept]
    return StreamPlan(stream.level[::group], stream.document_runs, kept, groups, _narrowed(stream.document_runs, kept))


def _narrowed(documents: Sequence[tuple[Run, int]], tokens: list[Run]) -> list[tuple[Run, int]]:
    """The ranges of documents among some of the tokens of a stream."""
    narrowed, position = [], 0
    for start, stop in tokens:
        for (first, last), document in documents:
            if (length := min(stop, last) - max(start, first)) > 0:
                narrowed.append(((position, position + length), document))
                position += length
    return narrowed


Draw = Callable[[tuple[int, ...], torch.Generator | None], Float[Tensor, "..."]]

EMBEDDING_STD = 0.02
ZERO_OUTPUTS = ("video_out", "action_out", "project", "joint_out")
"""Linear layers that start at zero: velocities, and the modulation by the noise level."""


def initial_draws(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Parameter, Draw]]:
    """Every parameter of a model, or of a part called `prefix`, with its name and how its initial value is drawn.

    Xavier weights and zero biases, as in DiT; what enters and leaves an action space as torch has it; open gates, no
    modulation by the noise level and zero velocities at first: a plain pre-norm transformer. Linear layers come first.
    """
    modules = sorted(module.named_modules(prefix=prefix), key=lambda item: not isinstance(item[1], nn.Linear))
    for path, part in modules:
        for leaf, parameter in part.named_parameters(recurse=False):
            yield (f"{path}.{leaf}" if path else leaf), parameter, _draw(path, part, leaf)


@torch.no_grad()
def draw_in_turn(module: nn.Module, prefix: str = "") -> None:
    """Draw all parameters where they are, one after the other; on the meta device there is nothing to draw."""
    for _, parameter, draw in initial_draws(module, prefix):
        if not parameter.is_meta:
            with parameter.device:
                parameter.copy_(draw(tuple(parameter.shape), None))


def _draw(path: str, module: nn.Module, leaf: str) -> Draw:
    name = path.rpartition(".")[2]
    if isinstance(module, nn.Linear):
        of_space = path.startswith("spaces.")
        if leaf == "bias" and not of_space:
            return _constant(0.0)
        fan = module.in_features + module.out_features
        bound = 1 / math.sqrt(module.in_features) if of_space else math.sqrt(6 / fan)
        return _uniform(bound, zero=name in ZERO_OUTPUTS)
    if isinstance(module, (nn.LayerNorm, Projections)):
        return _constant(0.0 if leaf == "bias" else 1.0)
    if leaf == "table":
        return _open_gates if isinstance(module, ExpertLayer) else _constant(0.0)
    if leaf in ("views", "action_kinds", "slots", "null"):
        return lambda shape, generator: torch.empty(shape).normal_(0, EMBEDDING_STD, generator=generator)
    raise TypeError(f"no initial value is defined for {path}.{leaf} of a {type(module).__name__}")


def _constant(value: float) -> Draw:
    return lambda shape, _: torch.full(shape, value)


def _uniform(bound: float, zero: bool) -> Draw:
    """Uniform within a bound, or zeros that take as many random numbers: those after them do not depend on it."""

    def draw(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
        values = torch.empty(shape).uniform_(-bound, bound, generator=generator)
        return values.zero_() if zero else values

    return draw


def _open_gates(shape: tuple[int, ...], _: torch.Generator | None) -> Tensor:
    """Of shift, scale and gate, of self-attention and then of the feed-forward, the gates at one."""
    return torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0, 1.0])[None, :, None].expand(shape)


class SpaceProjections(nn.Module):
    """Where one action space enters and leaves the model (docs/decisions/000, entry 7).

    Everything else is common to all spaces.

    Args:
        space: the sizes.
        width: of the action expert.
        state_token: whether states enter too.
    """

    @drawn_once
    def __init__(self, space: ActionSpace, width: int, state_token: bool) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):  # torch's own draws would come before ours, which are the same
            self.action_in = nn.Linear(space.channels, width)
            self.action_out = nn.Linear(width, space.channels)
            self.slots = nn.Parameter(torch.zeros(1, space.vectors_per_transition, width))
            self.state_in = nn.Linear(space.state_channels, width) if state_token and space.state_channels else None
        self.draw()

    def draw(self) -> None:
        """Give every parameter its initial value."""
        draw_in_turn(self, "spaces")


class Expert(nn.Module):
    """What one expert holds outside the layers: noise level and text embeddings, the last norm."""

    def __init__(self, width: int, text_dim: int) -> None:
        super().__init__()
        self.levels = NoiseLevelEmbedding(width)
        self.text = TextEmbedding(text_dim, width)
        self.head = OutputHead(width)


class WorldActionModel(PretrainedModel):
    """A causal flow-matching transformer over video and action tokens.

    Parameters (docs/decisions/000, entry 5; `parameter_counts`, checked on the meta device):

    | preset | video, per layer                  | action, per layer                                | video  | action |
    |--------|-----------------------------------|--------------------------------------------------|--------|--------|
    | 1.3b   | 8 h^2 + 2 h * 7680,  h = 1536     | 2 h h_a + 4 h_a^2 + 2 h_a * 4480,  h_a = 768     | 1.30 B | 357 M  |
    | 5b     | 8 h^2 + 2 h * 14336, h = 3072     | 2 h h_a + 4 h_a^2 + 2 h_a * 3072                 | 5.00 B | 363 M  |

    times 30 layers, plus for each expert, at its width w: noise level embedding 256 -> w -> w, one projection
    w -> 6 w for all layers, text embedding text_dim -> w -> w. 4 h^2 each are self-attention and cross-attention;
    2 h h_a are the adapters through which the action stream uses the shared attention.

    Args:
        config: the sizes.
    """

    format = "repwam"
    config_class = WAMConfig

    @drawn_once
    def __init__(self, config: WAMConfig) -> None:
        super().__init__()
        self.config = config
        self.video_in = nn.Linear(config.latent_dim, config.width)
        self.video_out = nn.Linear(config.width, config.latent_dim)
        self.joint_in = nn.Linear(config.joint_actions, config.width) if config.joint_actions else None
        self.joint_out = nn.Linear(config.width, config.joint_actions) if config.joint_actions else None
        self.views = nn.Parameter(torch.zeros(config.max_views, config.width))
        self.video = Expert(config.width, config.text_dim)
        self.action = Expert(config.action_width, config.text_dim)
        self.action_kinds = nn.Parameter(torch.zeros(1, 2, config.action_width))
        self.layers = nn.ModuleList(WAMLayer(config) for _ in range(config.depth))
        self.spaces = nn.ModuleDict()
        draw_in_turn(self)
        for name, space in config.spaces.items():
            self.spaces[name] = SpaceProjections(space, config.action_width, config.state_token)

    def draw(self) -> None:
        """Give every parameter its initial value."""
        draw_in_turn(self)

    def add_action_space(self, name: str, space: ActionSpace) -> None:
        """Give the model projections for a further action space; everything it knows is kept.

        Adding a space that is there already, with the same sizes, changes nothing. `self.config` becomes a new object.

        Raises:
            ValueError: another space has that name.
        """
        config = self.config.with_space(name, space)
        if name not in self.spaces:
            projections = SpaceProjections(space, config.action_width, config.state_token)
            self.spaces[name] = projections.to(self.video_in.weight.device, self.video_in.weight.dtype)
        self.config = config

    def parameter_counts(self) -> dict[str, int]:
        """How many parameters the video expert ("video", with the shared attention) and the action expert hold."""
        counts = {"video": 0, "action": 0}
        for name, parameter in self.named_parameters():
            of_action = any(part.startswith("action") or part == "spaces" for part in name.split("."))
            counts["action" if of_action else "video"] += parameter.numel()
        return counts

    def embed_text(
        self, text: Float[Tensor, "b docs s text"], mask: Bool[Tensor, "b docs s"], *, per_layer: bool = False
    ) -> tuple[TextContext, TextContext]:
        """Instructions as the video and the action expert read them.

        Args:
            text: hidden states of the text encoder.
            mask: which are real.
            per_layer: also compute the keys and values of every layer, worth it where many passes share the text.
        """
        contexts = []
        for name, expert in (("video", self.video), ("action", self.action)):
            context = expert.text(text, mask)
            if per_layer:
                of_layers = [getattr(layer, name).cross.keys_values(context) for layer in self.layers]
                context = TextContext(context.tokens, context.mask, of_layers)
            contexts.append(context)
        return contexts[0], contexts[1]

    def forward(
        self,
        inputs: WAMInputs,
        attend: Attend | None = None,
        text: tuple[TextContext, TextContext] | None = None,
    ) -> Velocities:
        """Velocities of the noisy tokens.

        Args:
            inputs: the batch.
            attend: self-attention over the tokens in `layout.streams` order; None is the teacher-forced pass, in which
                the tokens of `inputs` see each other as `masks.visible` says.
            text: from `embed_text`, if it was computed before; None computes it from `inputs`.

        Raises:
            ValueError: tensors that do not fit the layout or the model.
        """
        inputs.check(self.config)
        if attend is None:
            inputs = without_unread(inputs, self.config.coupling)
            # Here, because a policy attends through its cache and needs no masks: it loads neither blocks nor kernels.
            from repwam_core.model.attention import masked_attend

            attend = masked_attend(inputs.layout, self.config.coupling, self.config.window)
        text = self.embed_text(inputs.text, inputs.text_mask) if text is None else text
        return self.run(inputs, self.plan(inputs.layout, inputs.video.device), attend, text)

    def plan(self, layout: SequenceLayout, device: torch.device) -> PassPlan:
        """What `run` needs to know of a layout; make it once where many passes share the layout.

        Args:
            layout: what the tokens are.
            device: where the passes are computed.

        Raises:
            ValueError: more cameras than the model has embeddings for.
        """
        limit = self.config.max_views
        if layout.views > limit:
            raise UserError(f"expected at most max_views = {limit} cameras, got {layout.views}.")
        return plan_pass(layout, self.config.head_dim, self.config.rope_base).to(device)

    def run(
        self, inputs: WAMInputs, plan: PassPlan, attend: Attend, text: tuple[TextContext, TextContext]
    ) -> Velocities:
        """`forward` without its preparations: nothing here depends on the numbers in a layout, only on its shapes.

        So one compiled graph serves every chunk of a rollout (`Rollout(run=torch.compile(wam.run, ...))`).

        Args:
            inputs: the batch, checked.
            plan: from `plan`.
            attend: self-attention over the tokens in `layout.streams` order.
            text: from `embed_text`.
        """
        video, side = self._embed(inputs, plan)
        video_context, video_levels = _stream_context(self.video, inputs.times, plan.video, text[0])
        side_context, side_levels = _stream_context(self.action, inputs.times, plan.side, text[1])
        context = LayerContext(video_context, side_context, plan.turn, attend)
        kept = plan.kept_tokens(video_context, side_context)
        for number, layer in enumerate(self.layers):
            video, side = layer(number, video, side, context, kept if number == self.config.depth - 1 else None)
        video_levels, side_levels = take(video_levels, plan.video.kept_groups), take(side_levels, plan.side.kept)
        return self._velocities(inputs.space, video, side, video_levels, side_levels)

    def _space(self, name: str) -> SpaceProjections:
        return cast(SpaceProjections, self.spaces[name])

    def _embed(self, inputs: WAMInputs, plan: PassPlan) -> tuple[Tensor, Tensor]:
        """Video tokens (b, n_video, width), and action then state tokens (b, n_side, action_width)."""
        space, latent_dim = self._space(inputs.space), self.config.latent_dim
        video = self.video_in(inputs.video[..., :latent_dim]) + self.views[plan.view]
        if self.joint_in is not None:
            video = video + self.joint_in(inputs.video[..., latent_dim:])
        side = space.action_in(inputs.actions) + self.action_kinds[:, :1] + space.slots[:, plan.vector]
        if inputs.states is not None:
            if space.state_in is None:
                raise UserError(
                    f"the layout holds state tokens, but space {inputs.space!r} takes no states; build the "
                    "layout with state=config.has_state(space)."
                )
            side = torch.cat([side, space.state_in(inputs.states) + self.action_kinds[:, 1:]], dim=1)
        return video, side

    def _velocities(
        self, space: str, video: Tensor, side: Tensor, video_levels: Tensor, side_levels: Tensor
    ) -> Velocities:
        """Velocities of the noisy tokens in float32, whatever the precision of the layers."""
        with torch.autocast(video.device.type, enabled=False):
            video = self.video.head(video.float(), video_levels.float())
            side = self.action.head(side.float(), side_levels.float())
            heads = (self.video_out, video), (self._space(space).action_out, side)
            latents, actions = (head(x.to(head.weight.dtype)).float() for head, x in heads)
            if self.joint_out is not None:
                latents = torch.cat([latents, self.joint_out(video.to(self.joint_out.weight.dtype)).float()], dim=-1)
            return Velocities(latents, actions)


def _stream_context(
    expert: Expert, times: Tensor, plan: StreamPlan, text: TextContext
) -> tuple[StreamContext, Float[Tensor, "b groups width"]]:
    """The context of one stream, and the noise level embedding of each group of tokens."""
    with torch.autocast(times.device.type, enabled=False):
        embedding, modulation = expert.levels(times)
    context = StreamContext(modulation.index_select(1, plan.level), text, plan.documents)
    return context, embedding.index_select(1, plan.level)
