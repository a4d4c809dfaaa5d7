"""The world action model: noisy video and action tokens in, their velocities out (RepWAM Sec. 3.3, Eq. 5-7).

What follows from a layout alone is worked out once (`sequence.LayoutTensors`) and used in every pass over it. A pass is
then a function of tensors whose shapes do not change from chunk to chunk, as compilation and CUDA graphs ask for.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float
from repvitok.runtime.errors import UserError
from repvitok.runtime.pretrained import PretrainedModel, drawn_once
from torch import Tensor, nn
from torch.nn.functional import embedding

from repwam_core.model.attention import AttentionFn, make_attention
from repwam_core.model.blocks import (
    EmbeddedText,
    ExpertLayer,
    Modulation,
    NoiseLevelEmbedding,
    OutputHead,
    Projections,
    TextEmbedding,
    WAMLayer,
    normalise,
    with_lengths,
)
from repwam_core.model.config import ActionSpace, WAMConfig
from repwam_core.model.sequence import (
    AheadTokens,
    LayoutTensors,
    TokenLayout,
    Velocities,
    WAMInputs,
    layout_tensors,
    to_device,
)

if TYPE_CHECKING:
    from repwam_core.model.cache import Run

Levels = tuple[Float[Tensor, "b levels _"], Float[Tensor, "b levels 6 _"]]
"""The embedding of each noise level, and its modulation."""
Draw = Callable[[tuple[int, ...], torch.Generator | None], Float[Tensor, "..."]]

EMBEDDING_STD = 0.02
ZERO_OUTPUTS = ("video_out", "action_out", "project", "joint_out")
"""Linear layers that start at zero: velocities, and the modulation by the noise level."""


def initial_draws(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Parameter, Draw]]:
    """Every parameter of a model, or of a part called `prefix`, with its name and how its initial value is drawn.

    Xavier weights and zero biases, as in DiT; what enters and leaves an action space as torch has it, and so the first
    factor of a low-rank update, whose second is zero (`training.finetuning`); open gates, no
    modulation by the noise level and zero velocities at first: a plain pre-norm transformer. Linear layers come first,
    and what looks ahead last: the others are the same without it.
    """

    def turn(item: tuple[str, nn.Module]) -> tuple[bool, bool]:
        return item[0].startswith("look_ahead"), not isinstance(item[1], nn.Linear)

    modules = sorted(module.named_modules(prefix=prefix), key=turn)
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
    """How a parameter is drawn: each takes its shape and a generator, None for torch's own."""
    name = path.rpartition(".")[2]
    if isinstance(module, nn.Linear):
        as_torch = path.startswith("spaces.") or leaf == "lora_a"
        if leaf == "lora_b" or (leaf == "bias" and not as_torch):
            return _constant(0.0)
        fan = module.in_features + module.out_features
        bound = 1 / math.sqrt(module.in_features) if as_torch else math.sqrt(6 / fan)

        def uniform(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
            values = torch.empty(shape).uniform_(-bound, bound, generator=generator)
            # Zeros take as many random numbers: those after them do not depend on which outputs are zero.
            return values.zero_() if name in ZERO_OUTPUTS else values

        return uniform
    if isinstance(module, (nn.LayerNorm, Projections)):
        return _constant(0.0 if leaf == "bias" else 1.0)
    if leaf == "table":
        if not isinstance(module, ExpertLayer):
            return _constant(0.0)
        # Of shift, scale and gate, of self-attention and then of the feed-forward, the gates at one.
        return lambda shape, _: torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0, 1.0])[None, :, None].expand(shape)
    if leaf in ("views", "action_kinds", "slots", "null"):
        return lambda shape, generator: torch.empty(shape).normal_(0, EMBEDDING_STD, generator=generator)
    raise TypeError(f"no initial value is defined for {path}.{leaf} of a {type(module).__name__}")


def _constant(value: float) -> Draw:
    return lambda shape, _: torch.full(shape, value)


class SpaceProjections(nn.Module):
    """Where one action space enters and leaves the model (docs/decisions/000, entry 7).

    Everything else is common to all spaces.
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


class LookAhead(nn.Module):
    """A thin layer that predicts the chunk after the one that the layer before predicts, in training alone.

    Its tokens enter as the model's own do; what the layer before made of the token at the same place in the chunk
    before, normalised and through a matrix, is added. They see the noisy tokens of their chunk (`attention.visible`),
    and no token of the model sees them. Embeddings and heads are the model's (docs/decisions/081).
    """

    @drawn_once
    def __init__(self, config: WAMConfig) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):  # as in `SpaceProjections`
            self.layer = WAMLayer(replace(config, ffn=config.width, action_ffn=config.action_width))
            self.video_carry = nn.Linear(config.width, config.width)
            self.action_carry = nn.Linear(config.action_width, config.action_width)
        self.draw()

    def draw(self) -> None:
        """Give every parameter its initial value."""
        draw_in_turn(self, "look_ahead")

    def forward(
        self, tokens: tuple[Tensor, Tensor], before: tuple[Tensor, Tensor], modulations: tuple[Modulation, Modulation],
        texts: tuple[EmbeddedText, EmbeddedText], tensors: LayoutTensors, attention: AttentionFn,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Both streams after the layer; see `WAMLayer.forward`.

        Args:
            tokens: video (b, m_video, width) and actions (b, m_action, action_width) as they enter the model.
            before: of each of them what was made of the token before it.
            modulations, texts, tensors, attention: of these tokens.
        """
        carries = self.video_carry, self.action_carry
        carried = [carry(normalise(x)) for carry, x in zip(carries, before, strict=True)]
        video, side = ((x + y).to(x.dtype) for x, y in zip(tokens, carried, strict=True))
        return self.layer(0, video, side, modulations, texts, tensors, attention)


class Expert(nn.Module):
    """What one expert holds outside the layers: noise level and text embeddings, the last norm."""

    def __init__(self, width: int, text_dim: int) -> None:
        super().__init__()
        self.levels = NoiseLevelEmbedding(width)
        self.text = TextEmbedding(text_dim, width)
        self.head = OutputHead(width)


def _full_precision(device: str) -> AbstractContextManager[Any]:
    """No autocast; nor is there any on the meta device, where work is counted."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


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
    """

    format = "repwam"
    config_class = WAMConfig
    residual_dtype: torch.dtype | None = None
    """Type of the tokens between the layers' parts; None is what the embeddings give, float32 in training."""

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
        self.look_ahead = nn.ModuleList(LookAhead(config) for _ in range(config.look_ahead))

    def draw(self) -> None:
        """Give every parameter its initial value."""
        draw_in_turn(self)

    def add_action_space(self, name: str, space: ActionSpace) -> None:
        """Give the model projections for a further action space; everything it knows is kept.

        Adding a space that is there already, with the same sizes, changes nothing. `self.config` becomes a new object.
        """
        config = self.config.with_space(name, space)
        if name not in self.spaces:
            projections = SpaceProjections(space, config.action_width, config.state_token)
            self.spaces[name] = projections.to(self.video_in.weight.device, self.video_in.weight.dtype)
        self.config = config

    def set_look_ahead(self, layers: int) -> None:
        """Give the model so many look-ahead layers: the first ones it has are kept, others drawn, or all left out.

        What it predicts without them is the same, whatever their number. `self.config` becomes a new object.
        """
        kept, self.config = list(self.look_ahead)[:layers], replace(self.config, look_ahead=layers)
        drawn = [LookAhead(self.config).to(self.video_in.weight) for _ in range(layers - len(kept))]
        self.look_ahead = nn.ModuleList([*kept, *drawn])

    def parameter_counts(self) -> dict[str, int]:
        """How many parameters the video expert ("video", with the shared attention) and the action expert hold.

        Layers that look ahead, which training alone has, are counted as "look_ahead" where there are some.
        """
        counts = {"video": 0, "action": 0} | ({"look_ahead": 0} if self.config.look_ahead else {})
        for name, parameter in self.named_parameters():
            of_action = any(part.startswith("action") or part == "spaces" for part in name.split("."))
            ahead = name.startswith("look_ahead.")
            counts["look_ahead" if ahead else "action" if of_action else "video"] += parameter.numel()
        return counts

    def embed_text(
        self, text: Float[Tensor, "b docs s text"], mask: Bool[Tensor, "b docs s"], *, per_layer: bool = False
    ) -> tuple[EmbeddedText, EmbeddedText]:
        """Instructions as the video and the action expert read them.

        Args:
            text: hidden states of the text encoder.
            mask: which are real.
            per_layer: also compute the keys and values of every layer, worth it where many passes share the text.
        """
        texts = []
        for name, expert in (("video", self.video), ("action", self.action)):
            embedded = expert.text(text, mask)
            if per_layer:
                of_layers = [getattr(layer, name).cross.keys_values(embedded) for layer in self.layers]
                embedded = EmbeddedText(embedded.tokens, embedded.mask, of_layers)
            texts.append(embedded)
        return texts[0], texts[1]

    def forward(
        self,
        inputs: WAMInputs,
        attention: AttentionFn | None = None,
        texts: tuple[EmbeddedText, EmbeddedText] | None = None,
        ahead: Sequence[tuple[AheadTokens, AttentionFn]] = (),
    ) -> Velocities:
        """Velocities of the noisy tokens.

        Args:
            inputs: the batch.
            attention: self-attention over the tokens in `layout.streams` order; None is the teacher-forced pass, in
                which the tokens of `inputs` see each other as `attention.visible` says.
            texts: from `embed_text`, if they were computed before; None computes them from `inputs`.
            ahead: the tokens of the first look-ahead layers (`sequence.look_ahead_tokens`) and their attention, in
                training; without them these layers do not run.
        """
        inputs.check(self.config)
        device = inputs.video.device
        if attention is None:
            coupling, window = self.config.coupling, self.config.window
            attention = inputs.layout.once(make_attention, coupling, window, "blocked", device)
        texts = self.embed_text(inputs.text, inputs.text_mask) if texts is None else texts
        return self.run(inputs, self.tensors(inputs.layout, device), attention, texts, ahead)

    def tensors(self, layout: TokenLayout, device: torch.device) -> LayoutTensors:
        """What `run` needs to know of a layout; kept with the layout."""
        limit = self.config.max_views
        if layout.views > limit:
            raise UserError(f"expected at most max_views = {limit} cameras, got {layout.views}.")
        return layout.once(layout_tensors, self.config.head_dim, self.config.rope_base, device)

    def run(
        self,
        inputs: WAMInputs,
        tensors: LayoutTensors,
        attention: AttentionFn,
        texts: tuple[EmbeddedText, EmbeddedText],
        ahead: Sequence[tuple[AheadTokens, AttentionFn]] = (),
    ) -> Velocities:
        """`forward` without its preparations: nothing here depends on the numbers in a layout, only on its shapes.

        So one compiled graph serves every chunk of a rollout (`Rollout(run=compiled_run(wam))`).
        """
        video, side = self._embed(inputs, tensors)
        if self.residual_dtype is not None:
            video, side = video.to(self.residual_dtype), side.to(self.residual_dtype)
        entered = video, side
        with _full_precision(inputs.times.device.type):
            levels = self.video.levels(inputs.times), self.action.levels(inputs.times)
        modulations, readable = _of_tokens(levels, tensors), _readable(texts, tensors, entered)
        for number, layer in enumerate(self.layers):
            of_layer = readable[0].of_layer(number), readable[1].of_layer(number)
            video, side = layer(number, video, side, modulations, of_layer, tensors, attention)
        made = _noisy((video, side), tensors)
        velocities = self._velocities(inputs.space, made, levels, tensors)
        if not ahead:
            return velocities
        entered, of_steps = _noisy(entered, tensors), []
        for layer, (step, attend) in zip(self.look_ahead, ahead, strict=False):
            of_step = self.tensors(step.layout, video.device)
            tokens = _picked(entered, (step.video, step.actions))
            before = _picked(made, (step.video_before, step.actions_before))
            modulations, readable = _of_tokens(levels, of_step), _readable(texts, of_step, tokens)
            made = layer(tokens, before, modulations, readable, of_step, attend)
            of_steps.append(self._velocities(inputs.space, made, levels, of_step))
        return replace(velocities, ahead=tuple(of_steps))

    def _space(self, name: str) -> SpaceProjections:
        return cast(SpaceProjections, self.spaces[name])

    def _embed(self, inputs: WAMInputs, tensors: LayoutTensors) -> tuple[Tensor, Tensor]:
        """Video tokens (b, n_video, width), and the action expert's tokens (b, n_side, action_width)."""
        space, latent_dim = self._space(inputs.space), self.config.latent_dim
        video = self.video_in(inputs.video[..., :latent_dim]) + embedding(tensors.view, self.views)
        if self.joint_in is not None:
            video = video + self.joint_in(inputs.video[..., latent_dim:])
        side = space.action_in(inputs.actions) + self.action_kinds[:, :1] + embedding(tensors.vector, space.slots[0])
        if inputs.states is not None:
            if space.state_in is None:
                raise UserError(
                    f"the layout holds state tokens, but space {inputs.space!r} takes no states; build the "
                    "layout with state=config.has_state(space)."
                )
            side = torch.cat([side, space.state_in(inputs.states) + self.action_kinds[:, 1:]], dim=1)
        return video, side if tensors.side_order is None else side.index_select(1, tensors.side_order)

    def _velocities(
        self, space: str, noisy: tuple[Tensor, Tensor], levels: tuple[Levels, Levels], tensors: LayoutTensors
    ) -> Velocities:
        """Velocities of the noisy tokens in float32, whatever the precision of the layers."""
        video_levels = levels[0][0].index_select(1, tensors.video.noisy_level)
        side_levels = levels[1][0].index_select(1, tensors.side.noisy_level)
        with _full_precision(noisy[0].device.type):
            video = self.video.head(noisy[0].float(), video_levels.float())
            side = self.action.head(noisy[1].float(), side_levels.float())
            heads = (self.video_out, video), (self._space(space).action_out, side)
            latents, actions = (head(x.to(head.weight.dtype)).float() for head, x in heads)
            if self.joint_out is not None:
                latents = torch.cat([latents, self.joint_out(video.to(self.joint_out.weight.dtype)).float()], dim=-1)
            return Velocities(latents, actions)


def _noisy(streams: tuple[Tensor, Tensor], tensors: LayoutTensors) -> tuple[Tensor, Tensor]:
    """The noisy tokens of both streams."""
    return streams[0].index_select(1, tensors.video.noisy), streams[1].index_select(1, tensors.side.noisy)


def _picked(streams: tuple[Tensor, Tensor], places: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Some tokens of both streams, by their places on the CPU."""
    video, side = (x.index_select(1, to_device(index, x.device)) for x, index in zip(streams, places, strict=True))
    return video, side


def _of_tokens(levels: tuple[Levels, Levels], tensors: LayoutTensors) -> tuple[Modulation, Modulation]:
    """The modulation of each level as that of each group of tokens: (b, levels, 6, width) -> (b, groups, 6, width)."""
    return levels[0][1].index_select(1, tensors.video.level), levels[1][1].index_select(1, tensors.side.level)


def _readable(
    texts: tuple[EmbeddedText, EmbeddedText], tensors: LayoutTensors, streams: tuple[Tensor, Tensor]
) -> tuple[EmbeddedText, EmbeddedText]:
    """The instructions as the tokens of both streams attend to them."""
    return with_lengths(texts[0], tensors.video, streams[0]), with_lengths(texts[1], tensors.side, streams[1])


def compile_layers(wam: WorldActionModel, **options: Any) -> None:
    """Compile what surrounds attention in every layer, when it first runs.

    Attention itself depends on the packing and has kernels of its own, so that no new packing compiles anything again.
    """
    for layer in [part for part in wam.modules() if isinstance(part, WAMLayer)]:
        for name in ("before", "after"):
            setattr(layer, name, torch.compile(getattr(layer, name), fullgraph=True, **options))


def compiled_run(wam: WorldActionModel, **options: Any) -> Run:
    """`wam.run` with compiled layers; the model is left as it is, and its weights are shared.

    einops remembers which kinds of arrays it has met, and a compiled graph is thrown away when that memory grows: it
    meets both kinds before anything is compiled.
    """
    for values in (np.zeros(1), torch.zeros(1)):
        rearrange(values, "one -> one")
    other = copy.copy(wam)
    layers = nn.ModuleList(copy.copy(layer) for layer in wam.layers)
    other.__dict__["_modules"] = {**wam._modules, "layers": layers, "look_ahead": nn.ModuleList()}
    compile_layers(other, dynamic=False, **options)
    return other.run
