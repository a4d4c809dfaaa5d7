"""What a run trains: all of a pretrained model, a part, low-rank updates (LoRA); and how much of the tokenizer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from repvitok.runtime.documents import Above0, Positive, check_arguments, check_fields
from repvitok.runtime.errors import UserError
from torch import Tensor, nn
from torch.nn.functional import linear

from repwam_core.model.wam import WorldActionModel

PARTS = {
    "trunk": r"layers\.",
    "video_layers": r"layers\.\d+\.(video\.|attention\.(shared|video)\.)",
    "action_layers": r"layers\.\d+\.(action\.|attention\.action)",
    "text": r"(video|action)\.text\.",
    "noise_levels": r"(video|action)\.levels\.",
    "video_input": r"(video_in|joint_in)\.|views$",
    "video_head": r"(video\.head|video_out|joint_out)\.",
    "action_input": r"spaces\.\w+\.(action_in\.|state_in\.|slots$)|action_kinds$",
    "action_head": r"action\.head\.|spaces\.\w+\.action_out\.",
}
"""Parts of a `WorldActionModel` by a user's word, as patterns that the names of their parameters begin with.

"trunk" is all layers, of which "video_layers" are the video expert's, with the self-attention that both experts share,
and "action_layers" the action expert's, with its ways in and out of it. The other parts surround them; with "trunk"
they are all but the look-ahead layers, which training alone has and always trains.
"""
TARGETS = {
    "attention": r"layers\.\d+\.attention\.",
    "cross_attention": r"layers\.\d+\.(video|action)\.cross\.",
    "mlp": r"layers\.\d+\.(video|action)\.ffn_",
}
"""Linear layers of the trunk by a user's word: self-attention, attention to the instruction, feed-forward."""
LORA = ("lora_a", "lora_b")
"""How the names of the factors of low-rank updates end."""


@dataclass(frozen=True, kw_only=True)
class LoRASettings:
    """Low-rank updates of the trunk's linear layers; every other weight stays as it is.

    Attributes:
        rank: of the updates.
        alpha: an update is scaled by alpha / rank; `rank` when None.
        targets: which linear layers: "attention", "cross_attention", "mlp".
        also_train: parts that are trained whole beside the updates, words of `PARTS`.
    """

    rank: Positive = 16
    alpha: Above0 | None = None
    targets: list[str] = field(default_factory=lambda: list(TARGETS))
    also_train: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_fields(self)
        require_words("model.lora.targets", self.targets, TARGETS)
        require_words("model.lora.also_train", self.also_train, PARTS)
        if not self.targets:
            raise UserError(f"model.lora.targets: expected some of {', '.join(TARGETS)}; got none")


class LoRALinear(nn.Linear):
    """A linear layer with a low-rank update: y = W x + b + (alpha / rank) B A x (arXiv 2106.09685, Eq. 3).

    The names of W and b are those of the layer it replaces. B starts at zero (`initial_draws`): the function is then
    the layer's own.
    """

    def __init__(self, layer: nn.Linear, rank: int, alpha: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias, self.scale = layer.weight, layer.bias, alpha / rank
        self.lora_a = nn.Parameter(layer.weight.new_empty(rank, self.in_features))
        self.lora_b = nn.Parameter(layer.weight.new_zeros(self.out_features, rank))

    def forward(self, input: Tensor) -> Tensor:
        """The layer's output and its update's."""
        return super().forward(input) + self.scale * linear(linear(input, self.lora_a), self.lora_b)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """An ordinary layer of the same function, but for rounding."""
        layer = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        layer.weight = nn.Parameter(torch.addmm(self.weight, self.lora_b, self.lora_a, alpha=self.scale))
        layer.bias = self.bias
        return layer


@dataclass(frozen=True)
class FineTuning:
    """What a run trains of its model.

    Attributes:
        freeze: words of `PARTS` that stay as they are; none with `lora`, which leaves all but its updates.
        lora: the updates, if there are some.
        anew: beginnings of the names of parameters that no pretrained model has, which are trained in any case: those
            of a new action space, and layers that look ahead.
    """

    freeze: Sequence[str] = ()
    lora: LoRASettings | None = None
    anew: Sequence[str] = ()

    def __post_init__(self) -> None:
        require_words("model.freeze", self.freeze, PARTS)
        if self.freeze and self.lora is not None:
            raise UserError(
                "model.lora leaves every weight but its updates as it is; remove model.freeze, and name what is to be "
                "trained beside them in model.lora.also_train"
            )

    def __bool__(self) -> bool:
        """Whether anything stays as it is."""
        return bool(self.freeze) or self.lora is not None

    def apply(self, wam: WorldActionModel) -> None:
        """Give the model its updates, and mark what is trained; updates are yet to be drawn."""
        if self.lora is not None:
            _add_lora(wam, self.lora)
        kept = [re.compile(PARTS[word]) for word in (self.lora.also_train if self.lora else self.freeze)]
        trained = 0
        for name, parameter in wam.named_parameters():
            listed = any(pattern.match(name) for pattern in kept)
            update = name.endswith(LORA)
            parameter.requires_grad_(
                (listed or update if self.lora else not listed) or name.startswith(tuple(self.anew))
            )
            trained += parameter.requires_grad
        if not trained:
            raise UserError(f"model.freeze: {', '.join(self.freeze)} leave nothing to train")

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        lora = None if self.lora is None else asdict(self.lora)
        return {"freeze": list(self.freeze), "lora": lora, "anew": list(self.anew)}


@dataclass(frozen=True, kw_only=True)
class TuneTokenizer:
    """Which part of which tokenizer is trained with the policy, and on which frames.

    Attributes:
        tokenizer: folder of the RepViTok that made the latents.
        dataset: what they were made from.
        last_k: blocks of its encoder that are trained, the last ones, with the projection to latents behind them.
        lr_factor: their learning rate, as a share of the rate of AdamW's parameters.
        memory_limit_gb: decoded frames are kept in memory up to this, others are decoded for every batch.
    """

    tokenizer: str | Path
    dataset: str | Path
    last_k: Positive = 1
    lr_factor: Above0 = 0.1
    memory_limit_gb: Above0 = 8.0

    def __post_init__(self) -> None:
        check_arguments(TuneTokenizer, vars(self))


def merge_lora(wam: WorldActionModel) -> None:
    """Put every update into its layer's weights: an ordinary model, all of which may be trained again."""
    for path, layer in list(wam.named_modules()):
        if isinstance(layer, LoRALinear):
            wam.set_submodule(path, layer.merged())
    wam.requires_grad_(True)


def require_words(option: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse words that an option does not know."""
    if strange := [word for word in given if word not in known]:
        raise UserError(f"{option}: expected some of {', '.join(known)}; got {', '.join(map(repr, strange))}")


def _add_lora(wam: WorldActionModel, settings: LoRASettings) -> None:
    patterns = [re.compile(TARGETS[word]) for word in settings.targets]
    for path, layer in list(wam.named_modules()):
        if isinstance(layer, nn.Linear) and any(pattern.match(path) for pattern in patterns):
            if settings.rank > (most := min(layer.in_features, layer.out_features)):
                raise UserError(f"model.lora.rank: {settings.rank} is more than the {most} of {path}; lower it")
            wam.set_submodule(path, LoRALinear(layer, settings.rank, float(settings.alpha or settings.rank)))
