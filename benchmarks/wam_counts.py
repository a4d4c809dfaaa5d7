"""How much work does the world action model give a device, counted where there is none?

Everything runs on the meta device: shapes without numbers, so that the paper's sizes are counted in seconds, and what
would wait for the device fails. An operation is a kernel at least: all but views and allocations. Indices are made on
the host, their copies to the device count. Bytes are those that operations other than matrix products and attention
read and write.

- a training step of packed short episodes against the same episodes as a batch (MT50's shape: 73 episodes of 12
  transitions of 4 x 4 tokens), forward and backward
- of these the share of one layer, and bytes a token
- a pass of a rollout of each kind

    python benchmarks/wam_counts.py [--documents 73] [--transitions 12] [--width 512] [--depth 12]

An attention call is one operation forward and one backward, as fused kernels are, and self-attention one call, as
FlexAttention is; with --attention blocked it is the CPU's calls. Weights are float32 without autocast.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from repwam_core.data.batches import Documents, Noise, SegmentBatch
from repwam_core.model.attention import AttentionFn, make_attention
from repwam_core.model.config import ActionSpace, WAMConfig
from repwam_core.model.rollout import Rollout
from repwam_core.model.sequence import TokenLayout
from repwam_core.model.wam import WorldActionModel
from repwam_core.training.losses import LossSettings, documents_loss, draw_noise
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GRID, VECTORS, CHUNK, TEXT = (1, 4, 4), 4, 2, 12
ALLOCATIONS = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "_unsafe_view")
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")


@torch.library.custom_op("wam_counts::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # noqa: ARG001
    """One kernel."""
    return torch.empty_like(q)


@torch.library.custom_op("wam_counts::attention_backward", mutates_args=())
def attention_backward(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ARG001
    """One kernel."""
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


attention.register_fake(lambda *inputs: torch.empty_like(inputs[0]))
attention_backward.register_fake(lambda *inputs: tuple(map(torch.empty_like, inputs[1:])))
attention.register_autograd(
    lambda ctx, gradient: attention_backward(gradient, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),  # noqa: ARG005
)


class FusedAttention(TorchFunctionMode):
    """Every call of torch's attention is one operation, which the meta device would take apart."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The stand-in, or the function itself."""
        return attention(*args[:3]) if func is scaled_dot_product_attention else func(*args, **(kwargs or {}))


class DeviceWork(TorchDispatchMode):
    """Counts operations with a tensor on a device, by name, and the bytes of those that are no products."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.operations, self.bytes = device, Counter(), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and count it."""
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
        name = func.overloadpacket.__name__
        if not func.is_view and name not in ALLOCATIONS and any(x.device.type == self.device for x in tensors):
            self.operations[name] += 1
            if name not in PRODUCTS and "attention" not in name:
                self.bytes += sum(math.prod(n for n, step in zip(x.shape, x.stride(), strict=True) if step or n == 1)
                                  * x.element_size() for x in tensors)  # fmt: skip
        return result

    @property
    def total(self) -> int:
        """All operations."""
        return self.operations.total()


def segments(count: int, transitions: int, config: WAMConfig) -> SegmentBatch:
    """Random segments."""
    space, tokens = config.space("robot"), math.prod(GRID)
    return SegmentBatch(
        latents=torch.randn(count, transitions + 1, tokens, config.latent_dim),
        actions=torch.randn(count, transitions, VECTORS, space.channels),
        state=None,
        text=torch.randn(count, TEXT, config.text_dim),
        text_mask=torch.ones(count, TEXT, dtype=torch.bool),
        valid=torch.ones(count, transitions, dtype=torch.bool),
        channel_mask=torch.ones(count, space.channels, dtype=torch.bool),
        episode=torch.arange(count),
        start=torch.zeros(count, dtype=torch.long),
    )


def one_call(_: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Stands for FlexAttention: one operation, whatever the mask."""
    return scaled_dot_product_attention(q, k, v)


def step_work(config: WAMConfig, count: int, transitions: int, *, packed: bool, attention: str) -> DeviceWork:
    """The work of a forward and backward pass over episodes, in one sequence or as a batch."""
    with torch.device("meta"):
        wam = WorldActionModel(config)
    batch, chunks = segments(count, transitions, config), (CHUNK,) * (transitions // CHUNK)
    settings, generator = LossSettings(video_noise_prob=0.3, history_noise=0.1), torch.Generator().manual_seed(0)
    documents, noise, sizes = Documents.of_segments(batch, GRID), None, [chunks]
    if packed:
        rows = [{k: v[i : i + 1] for k, v in vars(batch).items() if isinstance(v, Tensor)} for i in range(count)]
        alone = [SegmentBatch(**row, state=None) for row in rows]
        documents, sizes = Documents.packed([Documents.of_segments(one, GRID) for one in alone]), sizes * count
        noise = Noise.packed([draw_noise(one, len(chunks), settings, generator) for one in alone])
    else:
        noise = draw_noise(batch, len(chunks), settings, generator)
    documents, noise = documents.to("meta"), noise.to("meta")

    def attend(layout: TokenLayout) -> AttentionFn:
        if attention == "one":
            return one_call
        return make_attention(layout, config.coupling, config.window, attention, "meta")

    with FusedAttention(), DeviceWork("meta") as work:
        documents_loss(wam, documents, sizes, noise, "robot", 1.0, attention=attend).total.backward()
    return work


def rollout_work(config: WAMConfig) -> dict[str, DeviceWork]:
    """The work of each kind of pass of a rollout, a chunk of two frames of one episode."""
    with torch.device("meta"):
        wam = WorldActionModel(config)
    rollout, tokens = _rollout(wam), math.prod(GRID)
    video, actions = torch.empty(1, CHUNK, tokens, config.latent_dim, device="meta"), torch.empty(
        1, CHUNK, VECTORS, config.space("robot").channels, device="meta"
    )  # fmt: skip
    passes: dict[str, Callable[[], Any]] = {
        "observe a chunk": lambda: rollout.observe(video, None, actions),
        "joint": lambda: rollout.velocities(video, actions),
        "actions alone": lambda: rollout.velocities(None, actions),
    }
    counted = {}
    for name, run in passes.items():
        run()
        with FusedAttention(), DeviceWork("meta") as counted[name]:
            run()
    return counted


def _rollout(wam: WorldActionModel) -> Rollout:
    text, mask = torch.empty(1, TEXT, wam.config.text_dim, device="meta"), torch.ones(1, TEXT, dtype=torch.bool)
    rollout = Rollout(wam, space="robot", grid=GRID, text=text, text_mask=mask, chunk_frames=CHUNK, static_shapes=True)
    rollout.observe(torch.empty(1, 1, math.prod(GRID), wam.config.latent_dim, device="meta"))
    return rollout


def main() -> None:
    """Print tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=73)
    parser.add_argument("--transitions", type=int, default=12)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--attention", choices=["one", "blocked", "dense"], default="one")
    options = parser.parse_args()
    space = ActionSpace(channels=4, vectors_per_transition=VECTORS)
    sizes = {"width": options.width, "heads": max(1, options.width // 64), "ffn": 4 * options.width}
    sizes |= {"action_width": options.width // 2, "action_ffn": 2 * options.width, "window": 4}

    def model(depth: int) -> WAMConfig:
        return WAMConfig.preset("1.3b", **sizes, depth=depth, spaces={"robot": space})

    per_episode = (2 * options.transitions + 1) * math.prod(GRID) + 2 * options.transitions * VECTORS
    tokens = options.documents * per_episode
    print("| training step, forward and backward | operations | of a layer | bytes a token and layer, widths |")
    print("|---|---|---|---|")
    for name, packed in (("a batch", False), ("packed", True)):
        deep, shallow = (
            step_work(model(depth), options.documents, options.transitions, packed=packed, attention=options.attention)
            for depth in (options.depth, options.depth - 1)
        )
        moved = (deep.bytes - shallow.bytes) / tokens
        row = f"{deep.total:,} | {deep.total - shallow.total} | {moved:,.0f}, {moved / (4 * options.width):.0f}"
        print(f"| {options.documents} episodes, {name} | {row} |", flush=True)
    print("\n| pass of a rollout | operations | of a layer |\n|---|---|---|")
    deep, shallow = rollout_work(model(options.depth)), rollout_work(model(options.depth - 1))
    for name, work in deep.items():
        print(f"| {name} | {work.total:,} | {work.total - shallow[name].total} |")


if __name__ == "__main__":
    main()
