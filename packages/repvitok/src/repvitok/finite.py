"""Training stops at its first loss, gradient or weight that is no number: one mechanism for every trainer."""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from repvitok.errors import UserError
from repvitok.pretrained import first_not_finite
from repvitok.sharded import DTensor, local

Batch = Callable[[], str]
"""Says which data a step was on; called for a step that went wrong, and only then."""


class FiniteCheck:
    """What the steps since the last look computed; the look is one wait for the device, before the optimizer's step.

        losses -> note(losses, batch) -> backward -> norm = clip_gradients(...) -> check(module, norm) -> optimizer step

    With accumulated gradients several steps are noted before one check.
    """

    def __init__(self) -> None:
        self._noted: list[tuple[dict[str, Tensor], Batch]] = []

    def note(self, losses: Mapping[str, Tensor], batch: Batch) -> None:
        """Keeps a step's losses, scalars on the device, until the check."""
        self._noted.append(({name: loss.detach() for name, loss in losses.items()}, batch))

    def check(self, module: Any, *norms: Tensor) -> None:
        """Stops unless all losses noted and the norms of the gradients are finite; `module` is a LightningModule.

        Where gradients are scaled (16-mixed), a norm may overflow: the scaler leaves that step out by itself.

        Raises:
            UserError: the step, its losses, the norm and the batch.
        """
        noted, self._noted = self._noted, []
        scaled = getattr(module.trainer.precision_plugin, "scaler", None) is not None
        looked_at = [loss for losses, _ in noted for loss in losses.values()] + ([] if scaled else list(norms))
        if not looked_at or bool(torch.stack([value.float() for value in looked_at]).isfinite().all()):
            return
        told = ", ".join(f"{norm.item():.4g}" for norm in norms)
        for losses, batch in noted:
            values = {name: loss.item() for name, loss in losses.items()}
            if not all(map(math.isfinite, values.values())):
                self._stop(module, "loss", values, told, batch)
        losses, batch = noted[-1]
        self._stop(module, "gradient", {name: loss.item() for name, loss in losses.items()}, told, batch)

    def _stop(self, module: Any, what: str, losses: dict[str, float], norms: str, batch: Batch) -> None:
        raise UserError(
            f"the {what} is not finite at step {module.global_step} (losses {losses}, gradient norm {norms}) on "
            f"{batch()}. The last checkpoint is from before: lower the learning rate, lengthen the warmup or look at "
            "these data, then resume with --ckpt_path last"
        )


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float | int | None) -> Tensor:
    """Scales the gradients down to a norm of at most `limit` (None or 0: as they are); returns the norm before."""
    trained = list(parameters)
    norm = nn.utils.get_total_norm([parameter.grad for parameter in trained if parameter.grad is not None])
    if limit:
        nn.utils.clip_grads_with_norm_(trained, limit, norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def require_finite_weights(module: Any) -> None:
    """Stops before a checkpoint is written of weights that are no numbers: the one on disk stays. Every rank calls it.

    Every weight is read once.

    Raises:
        UserError: names the first such weight, or says that another rank has it.
    """
    named = chain(module.named_parameters(), module.named_buffers())
    bad = first_not_finite({name: local(value) for name, value in named})
    if module.trainer.strategy.reduce_boolean_decision(bad is None, all=True):
        return
    raise UserError(
        f"{bad or 'a weight of another rank'} is not finite at step {module.global_step}: this state is not saved, the "
        "last checkpoint stays. Lower the learning rate or lengthen the warmup, then resume with --ckpt_path last"
    )
