"""What `gpu_check.py` measures: one function a part, each of which tells its numbers as they come.

A share of the peak (MFU) counts the forward pass three times, as the field does: recomputation is time and no work.
Models are built where they run.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
import tomllib
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
VECTORS, CHANNELS, TEXT_TOKENS = 4, 16, 16
"""Action vectors of a transition, their channels, and tokens of an instruction."""


@dataclass(frozen=True)
class Run:
    """A part at work.

    Attributes:
        part: its name.
        device: "cuda" or "cpu".
        tiny: sizes for two CPU cores.
        out: where its numbers go.
        work: a folder for data, common to all parts.
        end_s: the clock's time at which it will be stopped.
        mt50: the data set to train a policy for MT50 on, from `gpu_check.py --embed`.
        wrong: what was not what it should have been.
    """

    part: str
    device: str
    tiny: bool
    out: Path
    work: Path
    end_s: float
    mt50: Path | None = None
    wrong: list[str] = field(default_factory=list)

    def tell(self, **numbers: Any) -> None:
        """Append one line of what was found."""
        with self.out.open("a") as file:
            file.write(json.dumps({"part": self.part, **numbers}) + "\n")

    @property
    def cuda(self) -> bool:
        """Whether there is a GPU to wait for."""
        return self.device.startswith("cuda")

    def has(self, seconds: float) -> bool:
        """Whether so much time is left."""
        return time.time() + seconds < self.end_s

    def wait(self) -> None:
        """Until the device has done all it was told."""
        if self.cuda:
            torch.cuda.synchronize()

    def autocast(self) -> AbstractContextManager[Any]:
        """bf16 on a GPU."""
        return torch.autocast("cuda", torch.bfloat16) if self.cuda else nullcontext()

    def peak(self) -> float | None:
        """FLOPs per second that the device's maker states."""
        from repwam_core.estimate import peak_flops

        return peak_flops(torch.cuda.get_device_name()) if self.cuda else None

    def memory_gib(self) -> float | None:
        """The most memory so far."""
        return round(torch.cuda.max_memory_allocated() / 2**30, 1) if self.cuda else None

    def timed(self, what: Callable[[], Any], most: int = 20, share: float = 0.2, warmup: int = 2) -> list[float]:
        """Seconds of each of up to `most` calls, after some to warm up, within a share of the time that is left."""
        for _ in range(warmup):
            what()
        self.wait()
        until, spent = time.time() + share * max(0.0, self.end_s - time.time()), []
        while not spent or (len(spent) < most and time.time() < until):
            start_s = time.perf_counter()
            what()
            self.wait()
            spent.append(time.perf_counter() - start_s)
        return spent


# -- the machine ------------------------------------------------------------------------------------------------------


def environment(run: Run) -> None:
    """What the machine is, what it lacks, and how fast it multiplies and copies at best."""
    device = torch.cuda.get_device_properties(0) if run.cuda else None
    run.tell(
        device=device.name if device else "CPU",
        memory_gib=round(device.total_memory / 2**30, 1) if device else None,
        cores=os.cpu_count(),
        python=sys.version.split()[0],
        torch=torch.__version__,
        triton=_version("triton"),
        commit=_commit(),
        lacks=list(_lacks()),
    )
    size, half = (8192, torch.bfloat16) if run.cuda else (256, torch.float32)
    a, b = (torch.randn(size, size, device=run.device, dtype=half) for _ in range(2))
    seconds = statistics.median(run.timed(lambda: a @ b))
    run.tell(matmul_tflops=round(2 * size**3 / seconds / 1e12, 2), size=size)
    source = torch.randn(2**30 if run.cuda else 2**20, device=run.device)
    target = torch.empty_like(source)
    seconds = statistics.median(run.timed(lambda: target.copy_(source)))
    run.tell(copied_tb_per_s=round(2 * source.nbytes / seconds / 1e12, 3), bytes=source.nbytes)
    small = torch.randn(16, device=run.device)

    def launches() -> None:
        for _ in range(1000):
            small.add_(1)

    run.tell(launch_us=round(1e3 * statistics.median(run.timed(launches, most=5)), 2))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _lacks() -> Iterator[str]:
    """Distributions that the packages need and that are not here, or too old."""
    from packaging.requirements import Requirement

    for name in ("repvitok", "latent-action", "repwam-client", "repwam-core"):
        project = tomllib.loads((ROOT / "packages" / name / "pyproject.toml").read_text())["project"]
        for need in map(Requirement, project["dependencies"]):
            here = _version(need.name)
            if here is None or not need.specifier.contains(here, prereleases=True):
                yield f"{need} (here: {here})"


def _commit() -> str | None:
    asked = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


# -- correctness ------------------------------------------------------------------------------------------------------


def correctness(run: Run) -> None:
    """Every kernel and every compiled, captured or recomputed form against the dense, eager one in float32."""
    for check in (_varlen, _training, _rollouts):
        check(run)
    if run.wrong:
        raise ArithmeticError(f"{len(run.wrong)} beyond their bounds: {'; '.join(run.wrong)}")


def _varlen(run: Run) -> None:
    """torch's attention over sequences of any length, where there is one, against a call for each."""
    from torch.nn.functional import scaled_dot_product_attention

    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        varlen_attn = None
    if varlen_attn is None or not run.cuda:
        run.tell(attention="varlen", skipped="it wants a GPU" if varlen_attn else f"torch {torch.__version__} has none")
        return
    lengths = [300, 5, 77, 1000]
    borders = np.cumsum([0, *lengths]).tolist()
    starts = torch.tensor(borders, device=run.device, dtype=torch.int32)
    shape = borders[-1], 12, 128
    q, k, v = (torch.randn(shape, device=run.device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    towards = torch.randn(shape, device=run.device, dtype=torch.bfloat16)
    at_once = varlen_attn(q, k, v, starts, starts, max(lengths), max(lengths))
    each = torch.cat([
        scaled_dot_product_attention(*(x[a:b].float().transpose(0, 1) for x in (q, k, v))).transpose(0, 1)
        for a, b in pairwise(borders)
    ])  # fmt: skip
    grads = [torch.autograd.grad((output * towards).sum(), (q, k, v)) for output in (at_once, each)]
    _hold(run, [at_once, *grads[0]], [each, *grads[1]], BF16, attention="varlen")


def _training(run: Run) -> None:
    """Loss and gradients of a small model's first step on packed episodes, in every form that training has."""
    of = Sequences(3, 5, (1, 2, 2) if run.tiny else (1, 8, 8))
    fast = "flex" if run.cuda else "blocked"
    forms: list[tuple[str, dict[str, Any]]] = [
        ("32-true", {"attention": fast, "compile": False}),
        ("32-true", {"attention": "blocked", "compile": False, "recompute": "full"}),
        ("bf16-mixed", {"attention": fast, "compile": False}),
        ("32-true", {"attention": fast, "compile": True}),
        ("bf16-mixed", {"attention": fast, "compile": True, "recompute": "selective"}),
        ("32-true", {"attention": fast, "compile": False, "recompute": "selective"}),
        ("32-true", {"attention": fast, "compile": False, "recompute": "offload"}),
    ]

    def gradients(coupling: str, precision: str, scale: dict[str, Any]) -> list[Tensor]:
        kept = FirstGradients()
        fit(run, of, scale, kept, preset="tiny", sizes={"coupling": coupling, "depth": 2}, precision=precision)
        return kept.found

    for coupling, forms_of in (("joint", forms), ("sequential", forms[:3])):
        oracle = gradients(coupling, "32-true", {"attention": "dense", "compile": False})
        for precision, scale in forms_of:
            if run.has(10):
                bound = FLOAT32 if precision == "32-true" else BF16
                ours = gradients(coupling, precision, scale)
                _hold(run, ours, oracle, bound, training=coupling, precision=precision, **scale)


class FirstGradients(L.Callback):
    """Keeps the gradients of the first step, of weights that have all left zero."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Disturb the weights, or none but the last layer's would have a gradient."""
        del trainer
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in pl_module.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.device))

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep them, and stop."""
        grads = [parameter.grad for parameter in pl_module.parameters() if parameter.grad is not None]
        self.found = [torch.cat([grad.flatten().float() for grad in grads])]
        trainer.should_stop = True


def _rollouts(run: Run) -> None:
    """Chunks of a small rollout in each way that passes can be run, against the eager one."""
    config = _config("tiny", depth=2, window=4, text_dim=TEXT_TOKENS)
    grid = (1, 2, 2) if run.tiny else (1, 8, 8)

    def drive(coupling: str, mode: str) -> list[Tensor]:
        wam = _model(run, replace(config, coupling=coupling)).eval()
        torch.manual_seed(0)
        rollout, chunks = _rollout(wam, grid, mode), []
        observe(rollout, 1)
        for _ in range(4):
            chunk = rollout.plan(video_steps=2, action_steps=3)
            chunks += [chunk.actions, chunk.latents]
            observe(rollout, rollout.chunk_frames)
        return chunks

    for coupling in ("joint", "sequential"):
        oracle = drive(coupling, "eager")
        for mode in rollout_modes(run):
            if mode != "eager":
                _hold(run, drive(coupling, mode), oracle, FLOAT32, rollout=mode, coupling=coupling)


FLOAT32, BF16 = 1e-3, 3e-2
"""Largest relative errors, with room for TF32: float32 alone is under 1e-5, bf16 under 1e-2."""


def _hold(run: Run, ours: list[Tensor], oracle: list[Tensor], bound: float, **told: Any) -> None:
    """Tell the largest relative error |ours - oracle| / |oracle| over pairs of tensors, in Frobenius norms.

    What is above its bound is noted in `run.wrong`.
    """
    pairs = [(a.double(), b.double()) for a, b in zip(ours, oracle, strict=True)]
    errors = [((a - b).norm() / b.norm().clamp(min=1e-12)).item() for a, b in pairs]
    error = max(errors) if all(map(math.isfinite, errors)) else math.inf
    run.tell(**told, error=float(f"{error:.2e}"), holds=error <= bound)
    if error > bound:
        run.wrong.append(f"{told}: {error:.2e}")


# -- training ---------------------------------------------------------------------------------------------------------


class Sequences(NamedTuple):
    """What is trained on: episodes all alike, packed into sequences or side by side in batches."""

    documents: int
    transitions: int
    grid: tuple[int, int, int]
    packed: bool = True


def train_64k(run: Run) -> None:
    """1.3 B on one packed sequence of two episodes, as the recipe has it: step, share of the peak, memory, kernels."""
    of = Sequences(2, 4, (1, 4, 4)) if run.tiny else Sequences(2, 60, (1, 16, 16))
    residual = "bfloat16" if run.cuda else "float32"
    train(run, of, {"recompute": "selective", "residual": residual}, profiled=True)


def train_200k(run: Run) -> None:
    """The same of eight episodes, the paper's length."""
    of = Sequences(3, 4, (1, 4, 4)) if run.tiny else Sequences(8, 47, (1, 16, 16))
    train(run, of, {"recompute": "full"}, steps=3)


def flex(run: Run) -> None:
    """FlexAttention alone on the 64 K sequence's mask, forward and with its backward pass, as torch tunes it."""
    from repwam_core.model.attention import flex_block_mask
    from repwam_core.model.sequence import concat, training_layout
    from torch.nn.attention.flex_attention import flex_attention

    if not run.cuda:
        return run.tell(skipped="it wants a GPU")
    layout = concat([training_layout(61, (2,) * 30, (1, 16, 16), VECTORS)] * 2).streams
    mask = flex_block_mask(layout, "joint", 32, run.device)
    shape = 1, mask.seq_lengths[0], 12, 128
    inputs = [torch.randn(shape, device=run.device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    q, k, v = (x.transpose(1, 2) for x in inputs)
    towards = torch.randn_like(q)

    def both(attend: Callable[..., Tensor], options: dict[str, Any] | None) -> None:
        torch.autograd.grad(attend(q, k, v, block_mask=mask, kernel_options=options), inputs, towards)

    for options in FLEX_SETTINGS:
        if not run.has(15):
            return None
        torch.compiler.reset()
        attend = torch.compile(flex_attention, dynamic=False, fullgraph=True)
        begun_s = time.perf_counter()
        try:
            both(attend, options)
            run.wait()
            ready_s = round(time.perf_counter() - begun_s, 1)
            with torch.no_grad():
                forward = run.timed(lambda: attend(q, k, v, block_mask=mask, kernel_options=options), most=10)  # noqa: B023
            backward = run.timed(lambda: both(attend, options), most=10)  # noqa: B023
        except Exception as error:
            run.tell(options=options, failed=f"{type(error).__name__}: {error}"[:300])
            continue
        numbers = {"forward_ms": forward, "with_backward_ms": backward}
        told = {name: round(1e3 * statistics.median(spent), 2) for name, spent in numbers.items()}
        run.tell(options=options, ready_s=ready_s, **told)
    return None


FLEX_SETTINGS: list[dict[str, Any] | None] = [
    None,
    {"bwd_BLOCK_M1": 64, "bwd_BLOCK_N1": 128, "bwd_BLOCK_M2": 128, "bwd_BLOCK_N2": 64, "bwd_num_warps": 8},
    {"USE_TMA": True},
    {"fwd_BLOCK_M": 128, "fwd_BLOCK_N": 64, "fwd_num_warps": 8, "fwd_num_stages": 3},
]
"""Options of FlexAttention's kernels."""


def cached(run: Run) -> None:
    """One layer's attention of a rollout with a full ring, its keys in one part and in several."""
    from repwam_core.model import cache

    if not run.cuda:
        return run.tell(skipped="it wants a GPU")
    heads, kept, half = 12, 9216, torch.bfloat16
    for queries in (522, 10):
        q = torch.randn(1, heads, queries, 128, device=run.device, dtype=half)
        k, v = (torch.randn(1, heads, kept, 128, device=run.device, dtype=half) for _ in range(2))
        seen = torch.rand(1, kept, device=run.device) < 0.9
        bias = torch.zeros(1, kept, device=run.device, dtype=half).masked_fill_(~seen, cache.MASKED)
        oracle = (q.float() @ k.float().mT / 128**0.5 + bias.float()).softmax(-1) @ v.float()

        def times(attend: Callable[[], Tensor], **told: Any) -> None:
            error = ((attend().float() - oracle).norm() / oracle.norm()).item()  # noqa: B023

            def layers() -> None:
                for _ in range(30):
                    attend()

            seconds = statistics.median(run.timed(layers, most=5, share=0.05)) / 30
            run.tell(queries=queries, **told, error=float(f"{error:.1e}"), ms=round(1e3 * seconds, 4))  # noqa: B023

        times(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias), parts=1)  # noqa: B023
        for parts in (2, 4, 8):
            times(lambda: cache.attention_in_parts(q, k, v, bias, parts), parts=parts)  # noqa: B023
    return None


def train_variants(run: Run) -> None:
    """The 64 K sequence with other choices: of recomputation and compilation, and of the loss."""
    of = Sequences(2, 4, (1, 4, 4)) if run.tiny else Sequences(2, 60, (1, 16, 16))
    selective = {"recompute": "selective"}
    losses = ({"look_ahead": 1}, {"look_ahead": 3}, {"delay": VECTORS})
    variants = [({"recompute": "full"}, {}), ({**selective, "compile": False}, {}), *((selective, x) for x in losses)]
    for scale, loss in variants:
        if run.has(20 if not run.tiny else 0):
            train(run, of, scale, steps=2, loss=loss)


def short_documents(run: Run) -> None:
    """73 short episodes packed into one sequence, and the same as a batch: MT50's sizes."""
    of = Sequences(3, 2, (1, 2, 2)) if run.tiny else Sequences(73, 12, (1, 4, 4))
    sizes = {"width": 512, "depth": 12, "heads": 8, "ffn": 2048, "action_width": 256, "action_ffn": 1024, "window": 4}
    sizes = {"action_history": False, **({} if run.tiny else sizes)}
    for compiled, packed in product((False, True), (True, False)):
        if run.has(0 if run.tiny else 25):
            scale = {"recompute": "none", "compile": compiled}
            train(run, of._replace(packed=packed), scale, preset="tiny", sizes=sizes, steps=6)


def train(
    run: Run, of: Sequences, scale: dict[str, Any], *, steps: int = 5, profiled: bool = False, **model: Any
) -> None:
    """Time steps of training on sequences; `model` as in `fit`. A GPU that is too small is told of, too."""
    clock = StepClock(run, of, scale | (model.get("loss") or {}), steps=1 if run.tiny else steps, profiled=profiled)
    try:
        fit(run, of, scale, clock, **model)
    except torch.OutOfMemoryError as error:
        run.tell(**clock.named, failed=str(error).splitlines()[0])
    if run.cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def fit(
    run: Run,
    of: Sequences,
    scale: dict[str, Any],
    callback: L.Callback,
    *,
    preset: str = "1.3b",
    sizes: dict[str, Any] | None = None,
    precision: str | None = None,
    loss: dict[str, int] | None = None,
) -> None:
    """`repwam fit`'s own module, data and trainer on episodes of noise, until the callback stops them."""
    from repvitok.runtime.training import OptimizerSettings
    from repwam_core.data.datamodule import WAMDataModule
    from repwam_core.data.packing import PackingSettings, token_cost
    from repwam_core.training.losses import LossSettings
    from repwam_core.training.module import WAMTraining
    from repwam_core.training.parallel import ScaleSettings

    if run.tiny:
        preset, sizes = "tiny", {**(sizes or {}), "depth": 2}
    text_dim, packing = 2048 if preset == "1.3b" else 384, None
    if of.packed:
        config = _config(preset, text_dim=text_dim, **(sizes or {}))
        budget = of.documents * token_cost(config, "robot", of.grid, VECTORS).of(of.transitions)
        packing = PackingSettings(token_budget=budget, open_sequences=1, chunk_multiple=2)
    module = WAMTraining(
        preset,
        wam=sizes,
        space="robot",
        chunk_sizes=(2, 2),
        loss=LossSettings(**(loss or {})),
        optimizer=OptimizerSettings(adamw_lr=3e-4, newton_schulz_dtype="bfloat16" if run.cuda else "float32"),
        scale=ScaleSettings(**scale),
    )
    data = WAMDataModule(
        _latents(run.work / f"latents-{of.documents}-{of.transitions}-{math.prod(of.grid)}-{text_dim}", of, text_dim),
        space="robot",
        transitions=of.transitions,
        batch_size=of.documents,
        held_out=0,
        packing=packing,
    )
    trainer = L.Trainer(
        accelerator="gpu" if run.cuda else "cpu",
        devices=1,
        max_steps=100,
        precision=precision or ("bf16-mixed" if run.cuda else "32-true"),  # type: ignore[arg-type]
        gradient_clip_val=2.0,
        limit_val_batches=0,
        log_every_n_steps=10**6,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,
        default_root_dir=run.work,
        callbacks=[callback],
    )
    trainer.fit(module, data)


class StepClock(L.Callback):
    """Times whole steps; then one step in its phases; then, if asked, the kernels of one.

    A step that is timed is not looked into: it begins when the one before it has left the GPU, and ends likewise.
    """

    def __init__(self, run: Run, of: Sequences, scale: dict[str, Any], *, steps: int, profiled: bool) -> None:
        self.run, self.of, self.scale, self.steps, self.profiled = run, of, scale, steps, profiled
        self.named = {"documents": of.documents, "transitions": of.transitions, "packed": of.packed, **scale}
        self.flops = self.planned_gib = self.start_s = 0.0
        self.marks: list[float] = []
        self.spent: list[float] = []
        self.began_s = time.perf_counter()
        self.profiler: Any = None

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:  # noqa: ARG002
        """The model is built and where it belongs; count what a step of it takes."""
        from repwam_core.estimate import DocumentCosts, activation_bytes, meta_model, state_bytes

        self.run.wait()
        built_s, of, config = time.perf_counter() - self.began_s, self.of, pl_module.wam.config
        costs = DocumentCosts(config, "robot", math.prod(of.grid), VECTORS, text=TEXT_TOKENS)
        cost = costs.of((2,) * (of.transitions // 2) + (1,) * (of.transitions % 2)) * of.documents
        kept = activation_bytes(config, cost, self.scale.get("recompute", "none"), bf16=self.run.cuda)
        self.flops, self.tokens = cost.training_flops, cost.tokens
        self.planned_gib = (kept + state_bytes(meta_model(config))) / 2**30
        self.named["tokens"] = cost.tokens
        self.run.tell(**self.named, built_s=round(built_s, 2))
        self.start_s = time.perf_counter()

    def _mark(self, *_: Any, **__: Any) -> None:
        if len(self.spent) > self.steps:
            self.run.wait()
            self.marks.append(time.perf_counter())

    on_before_backward = on_after_backward = on_before_optimizer_step = _mark

    def on_train_batch_start(self, *_: Any, **__: Any) -> None:
        """Begin to look into the last step."""
        self.marks = []
        self._mark()
        if self.profiled and len(self.spent) == self.steps + 2:
            self.profiler = profiler(self.run)
            self.profiler.__enter__()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        """A step is done: tell its time."""
        run = self.run
        run.wait()
        now_s = time.perf_counter()
        spent_s, self.start_s = now_s - self.start_s, now_s
        self._mark()
        if self.profiler is not None:
            self.profiler.__exit__(None, None, None)
            run.tell(**self.named, kernels=kernel_groups(run, self.profiler))
        elif len(self.spent) == self.steps + 1:
            phases = [round(b - a, 4) for a, b in pairwise(self.marks)]
            run.tell(**self.named, forward_backward_clip_optimizer_s=phases)
        self.spent.append(spent_s)
        if len(self.spent) <= self.steps + 1:
            self._tell_step()
        last = self.steps + 2 + self.profiled
        longer = (
            0.0 if len(self.spent) == 1 else 1.5 * spent_s
        )  # the first step compiles, which says nothing of the next
        trainer.should_stop = len(self.spent) >= last or not run.has(longer)

    def _tell_step(self) -> None:
        """The median so far; the first step, which compiles, by itself."""
        if len(self.spent) == 1:
            return self.run.tell(**self.named, first_step_s=round(self.spent[0], 2))
        step_s, peak = statistics.median(self.spent[1:]), self.run.peak()
        return self.run.tell(
            **self.named,
            steps=len(self.spent) - 1,
            step_s=round(step_s, 4),
            tokens_per_s=round(self.tokens / step_s),
            mfu=round(self.flops / step_s / peak, 4) if peak else None,
            peak_gib=self.run.memory_gib(),
            planned_gib=round(self.planned_gib, 1),
        )


KERNELS = (
    ("flex", r"flex|triton_tem"),
    ("attention", r"flash|fmha|cudnn|attention|attn"),
    ("matmul", r"nvjet|gemm|gemv|xmma|cutlass|cublas|addmm|aten::mm|aten::bmm"),
    ("norm", r"layer_norm|layernorm|LayerNorm|vector_norm|rms_norm"),
    ("copy", r"Memcpy|Memset|copy|cat|CatArray"),
    ("fused", r"^triton_"),
)
"""Groups of kernels by a pattern in their names, the first that fits; the rest is "elementwise"."""


def profiler(run: Run) -> Any:
    """torch's profiler of what the device runs."""
    kinds = torch.profiler.ProfilerActivity
    return torch.profiler.profile(activities=[kinds.CUDA if run.cuda else kinds.CPU])


def kernel_groups(run: Run, profile: Any) -> dict[str, Any]:
    """Milliseconds on the device and launches by group, and the ten kernels that take most."""
    own = "self_device_time_total" if run.cuda else "self_cpu_time_total"
    found = [(event.key, getattr(event, own) / 1e3, event.count) for event in profile.key_averages()]
    groups: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for name, spent_ms, count in found:
        group = next((group for group, pattern in KERNELS if re.search(pattern, name)), "elementwise")
        groups[group][0] += spent_ms
        groups[group][1] += count
    largest = sorted(found, key=lambda item: -item[1])[:10]
    return {
        "device_ms": round(sum(spent_ms for _, spent_ms, _ in found), 1),
        "launches": sum(count for *_, count in found),
        "ms_and_launches": {name: [round(values[0], 1), int(values[1])] for name, values in groups.items()},
        "largest": [[name[:60], round(spent_ms, 1), count] for name, spent_ms, count in largest],
    }


def _config(preset: str, **fields: Any) -> Any:
    from repwam_core.model.config import ActionSpace, WAMConfig

    space = ActionSpace(channels=CHANNELS, vectors_per_transition=VECTORS)
    return WAMConfig.preset(preset, spaces={"robot": space}, **fields)


def _model(run: Run, config: Any) -> Any:
    """A model with weights of its own, also where they begin at zero, made where it will run."""
    from repwam_core.model.wam import WorldActionModel

    torch.manual_seed(0)
    with torch.device(run.device):
        wam = WorldActionModel(config)
    with torch.no_grad():
        for parameter in wam.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.02)
    return wam


def _latents(folder: Path, of: Sequences, text_dim: int) -> Path:
    """Latent shards of noise, and their instruction as hidden states."""
    from repvitok.data import LatentEpisode, LatentMeta, LatentShardWriter

    if (folder / "meta.json").exists():
        return folder
    names = tuple(f"joint_{number}" for number in range(CHANNELS))
    meta = LatentMeta(
        tokenizer_digest="0" * 64, frame_rate_hz=10.0, stride=1, grid=of.grid, cameras=("top",), latent_dim=96,
        window=5, source="noise", action_names=names,
    )  # fmt: skip
    rng, tokens = np.random.default_rng(0), math.prod(of.grid)
    with LatentShardWriter(folder, meta) as writer:
        for number in range(of.documents):
            latents = rng.standard_normal((of.transitions + 1, tokens, 96), np.float32)
            actions = rng.standard_normal((of.transitions, VECTORS, CHANNELS), np.float32)
            writer.add(LatentEpisode(f"episode-{number}", number, 0, "go", latents, None, actions))
    _embed(folder, text_dim, "go")
    return folder


def _embed(latents: Path, text_dim: int, instruction: str) -> None:
    """Put hidden states of an instruction beside latents, so that no text model is needed."""
    from safetensors.torch import save_file

    told = {"text_encoder": "minilm", "instructions": json.dumps([instruction])}
    hidden = torch.randn(TEXT_TOKENS, text_dim, generator=torch.Generator().manual_seed(0))
    save_file({"0": hidden}, latents / "text-minilm.safetensors", told)


# -- chunks -----------------------------------------------------------------------------------------------------------


def latency(run: Run) -> None:
    """How long a robot waits for a chunk of two latent frames: 1.3 B in bf16, the ring of 32 frames full.

    Two observed frames and the executed actions go in, five video and ten action steps are made. Pixels are not in it.
    """
    rows = (2, 2) if run.tiny else (16, 16)
    models: dict[str, Any] = {}
    for mode in rollout_modes(run):
        for cameras, batch, coupling in EAGER_SETTINGS if mode == "eager" else product((1, 3), (1,), COUPLINGS):
            if not run.has(0 if run.tiny else 5):
                return
            if coupling not in models:
                models = {coupling: _policy_model(run, coupling)}
            start_s, told = (
                time.perf_counter(),
                {"coupling": coupling, "mode": mode, "cameras": cameras, "batch": batch},
            )
            rollout = steady(models[coupling], (cameras, *rows), mode, batch)
            run.tell(**told, ready_s=round(time.perf_counter() - start_s, 1))
            for video in ("imagine", "held", "skip") if coupling == "joint" else ("imagine",):
                _chunks(run, rollout, video, told)


def _chunks(run: Run, rollout: Any, video: str, told: dict[str, Any]) -> None:
    """Tell how long chunks take, and for one camera which kernels they are."""

    def chunk() -> None:
        observe(rollout, rollout.chunk_frames)
        rollout.plan(video="imagine" if video == "held" else video, hold_video=video == "held")

    spent = sorted(run.timed(chunk, most=1 if run.tiny else 30, share=0.06, warmup=1 if run.tiny else 3))
    high = spent[math.ceil(0.95 * len(spent)) - 1]
    numbers = {"median_ms": 1e3 * statistics.median(spent), "high_ms": 1e3 * high, "chunks": len(spent)}
    run.tell(**told, video=video, **{k: round(v, 2) for k, v in numbers.items()}, peak_gib=run.memory_gib())
    if video == "imagine" and told["cameras"] == told["batch"] == 1:
        with profiler(run) as profile:
            chunk()
            run.wait()
        run.tell(**told, kernels=kernel_groups(run, profile))


COUPLINGS = ("joint", "sequential")
EAGER_SETTINGS = [(1, 1, "joint"), (1, 1, "sequential"), (3, 1, "sequential"), (3, 1, "joint"), (1, 16, "joint")]
"""Cameras, episodes in step, coupling."""


def _policy_model(run: Run, coupling: str) -> Any:
    config = _config(
        "tiny" if run.tiny else "1.3b", coupling=coupling, **({"window": 4, "depth": 2} if run.tiny else {})
    )
    return _model(run, config).to(torch.bfloat16 if run.cuda else torch.float32).eval()


def rollout_modes(run: Run) -> list[str]:
    """The ways to run a rollout's passes."""
    return ["graphs and compiled", "graphs", "eager"] if run.cuda else ["eager"]


def _rollout(wam: Any, grid: tuple[int, int, int], mode: str, batch: int = 1) -> Any:
    """A rollout that has seen nothing yet."""
    from repwam_core.model.rollout import Rollout

    kind = {"device": wam.video_in.weight.device, "dtype": wam.video_in.weight.dtype}
    text = torch.randn(batch, TEXT_TOKENS, wam.config.text_dim, **kind)
    mask = torch.ones(batch, TEXT_TOKENS, dtype=torch.bool, device=kind["device"])
    options: dict[str, Any] = {}
    if "compiled" in mode:
        from repwam_core.model.wam import compiled_run

        options["run"] = compiled_run(wam)
    options["graphs"] = "graphs" in mode
    return Rollout(
        wam, space="robot", grid=grid, text=text, text_mask=mask, chunk_frames=2, static_shapes=True, **options
    )


def steady(wam: Any, grid: tuple[int, int, int], mode: str, batch: int) -> Any:
    """A rollout whose ring is full."""
    rollout = _rollout(wam, grid, mode, batch)
    observe(rollout, 1)
    while rollout.frame <= wam.config.window + rollout.chunk_frames:
        observe(rollout, rollout.chunk_frames)
    return rollout


def observe(rollout: Any, frames: int) -> None:
    """Show a rollout random frames and actions."""
    kind = {"device": rollout.device, "dtype": rollout.dtype}
    latents = torch.randn(rollout.batch, frames, rollout.cache.tokens, rollout.wam.config.latent_dim, **kind)
    rollout.observe(latents, None, torch.randn(rollout.batch, frames, VECTORS, CHANNELS, **kind))


# -- the tokenizer ----------------------------------------------------------------------------------------------------


def tokenizer(run: Run) -> None:
    """Training and encoding at 17 x 256 x 256 and the paper's size: clips per second, share of the peak, memory.

    A step is encode, decode, L1, backward, clip and AdamW under bf16, without teacher, LPIPS and adversary.
    """
    from repvitok import RepViTok, RepViTokConfig
    from repvitok.model import decode_flops, encode_flops

    batch, frames, side = (1, 5, 64) if run.tiny else (16, 17, 256)
    config = RepViTokConfig(width=48, depth=1, heads=4) if run.tiny else RepViTokConfig()
    shape = config, frames, (side, side)
    operations = {"encode": encode_flops(*shape), "train": 3 * (encode_flops(*shape) + decode_flops(*shape))}
    with torch.device(run.device):
        tok = RepViTok(config)
    video = torch.rand(batch, 3, frames, side, side, device=run.device) * 2 - 1
    found = []
    for tok.compile_blocks in (True, False):
        begun_s = time.perf_counter()
        tok.zero_grad(set_to_none=True)
        with run.autocast():
            loss = (tok(video)[0] - video).square().mean()
        loss.backward()
        found.append([torch.cat([parameter.grad.flatten().float() for parameter in tok.parameters()])])
        run.tell(compiled=tok.compile_blocks, gradients_s=round(time.perf_counter() - begun_s, 2))
    _hold(run, *found, BF16, tokenizer="gradients, compiled against eager")
    for compiled, kernel, checkpointing in TOKENIZER_SETTINGS:
        tok.compile_blocks, tok.attention_kernel, tok.gradient_checkpointing = compiled, kernel, checkpointing
        for what in ("train", "encode") if not checkpointing else ("train",):
            told = {
                "what": what,
                "batch": batch,
                "compiled": compiled,
                "attention": kernel,
                "recomputed": checkpointing,
            }
            if not run.has(0 if run.tiny else 5):
                return
            tok.zero_grad(set_to_none=True)
            if run.cuda:
                torch.cuda.reset_peak_memory_stats()
            step = (tokenizer_step if what == "train" else encoding)(run, tok, video)
            begun_s = time.perf_counter()
            step()
            run.wait()
            run.tell(**told, first_step_s=round(time.perf_counter() - begun_s, 2))
            seconds = statistics.median(run.timed(step, most=1 if run.tiny else 10, share=0.1))
            peak, rate = run.peak(), batch * operations[what] / seconds
            run.tell(
                **told,
                clips_per_s=round(batch / seconds, 1),
                step_s=round(seconds, 4),
                mfu=round(rate / peak, 4) if peak else None,
                peak_gib=run.memory_gib(),
            )
            if compiled and kernel == "flex" and not checkpointing:
                with profiler(run) as profile:
                    step()
                    run.wait()
                run.tell(**told, kernels=kernel_groups(run, profile))


TOKENIZER_SETTINGS: list[tuple[bool, Any, bool]] = [
    (True, "flex", False),
    (False, "frames", False),
    (True, "flex", True),
    (True, "frames", False),
]
"""Whether blocks are compiled, their attention, whether activations are recomputed; the first is the default on a GPU,
the second that of a CPU."""


def tokenizer_step(run: Run, tok: Any, video: Tensor) -> Callable[[], None]:
    """A training step of the plain reconstruction."""
    optimizer = torch.optim.AdamW(tok.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with run.autocast():
            video_hat, _ = tok(video)
            loss = (video_hat - video).abs().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tok.parameters(), 2.0)
        optimizer.step()

    return step


def encoding(run: Run, tok: Any, video: Tensor) -> Callable[[], None]:
    """Clips to latents."""

    def step() -> None:
        with torch.no_grad(), run.autocast():
            tok.encode(video)

    return step


# -- commands ---------------------------------------------------------------------------------------------------------


def commands(run: Run) -> None:
    """From videos to a driven policy on tiny data: encode, label, the three `fit` commands, export, CPU against GPU."""
    from latent_action.cli import main as latent_action
    from repvitok.cli import main as repvitok
    from repwam_core.cli import main as repwam

    folder, steps = run.work / f"commands-{int(time.time())}", 2 if run.tiny else 60
    dataset = _squares(folder / "dataset")
    accelerator = "gpu" if run.cuda else "cpu"
    fit = [
        f"--trainer.accelerator={accelerator}",
        f"--trainer.max_steps={steps}",
        f"--trainer.val_check_interval={steps}",
    ]
    recipes, bf16 = ROOT / "recipes", [f"--trainer.precision={'bf16-mixed' if run.cuda else '32-true'}"]
    small = [
        "--model.tokenizer.width=64",
        "--model.tokenizer.depth=1",
        "--model.tokenizer.heads=2",
        "--data.size=[32,32]",
    ]
    wam = [
        "--model.init_from=null",
        "--model.preset=tiny",
        f"--data.latents={folder / 'labelled'}",
        "--data.transitions=2",
    ]
    wam += ["--model.plan={chunk_frames: 1, video_steps: 2, action_steps: 2}", "--model.chunk_sizes=[1,2]"]

    def verb(main: Callable[[list[str]], int], *words: Any) -> None:
        start_s, name = time.perf_counter(), main.__module__.partition(".")[0]
        code = main([str(word) for word in words])
        run.tell(command=f"{name} {words[0]}", code=code, seconds=round(time.perf_counter() - start_s, 2))
        if code:
            raise RuntimeError(f"{name} {' '.join(map(str, words))} ended with {code}; the log says why")

    def fitted(main: Callable[[list[str]], int], recipe: str, name: str, *words: Any) -> Path:
        verb(main, "fit", "-c", recipes / recipe, f"--trainer.default_root_dir={folder / name}", *fit, *words)
        return folder / name / "last.ckpt"

    ckpt = fitted(repvitok, "1_repvitok/tiny.yaml", "tok", f"--data.folders=[{dataset}]", "--data.val_clips=2", *small)
    verb(repvitok, "export", "--ckpt", ckpt, "--out", folder / "tokenizer")
    where = ["--tokenizer", folder / "tokenizer", "--dataset", dataset, "--out", folder / "latents"]
    verb(repvitok, "encode", *where, "--size", "32", "--device", run.device)
    ckpt = fitted(latent_action, "2_latent_action/tiny.yaml", "act", f"--data.latents={folder / 'latents'}")
    verb(latent_action, "export", "--ckpt", ckpt, "--out", folder / "lat")
    verb(latent_action, "label", "--lat", folder / "lat", "--latents", folder / "latents", "--out", folder / "labelled")
    _embed(folder / "labelled", 384, "move the square")
    packing = "--data.packing={token_budget: 600, chunk_multiple: 2}"
    fitted(repwam, "3_repwam/tiny_pretrain.yaml", "pre", *wam, *bf16, packing)
    ckpt = fitted(repwam, "3_repwam/tiny_adapt.yaml", "wam", *wam, *bf16)
    where = ["--ckpt", ckpt, "--tokenizer", folder / "tokenizer", "--latents", folder / "labelled"]
    verb(repwam, "export", *where, "--out", folder / "policy")
    _drive(run, folder / "policy", dataset)


MT50_MINUTES = 20
"""What the training of `--preset mt50 --budget gpu` is sized for; in less time, every stage takes fewer steps."""
MT50_TEXT = "text-minilm.safetensors"


def mt50(run: Run) -> None:
    """A policy for MT50 from films that were collected before: every training stage, each told as it ends.

    `repwam rollout` then drives it, anywhere; the policy lies beside --out.
    """
    import argparse
    import shutil

    from repvitok.data import LeRobotReader
    from repwam_core.cli import main as repwam
    from repwam_core.quickstart import work
    from repwam_core.quickstart.config import load_config, shaped_like
    from repwam_core.sim.metaworld import MetaWorldSettings

    if run.mt50 is None:
        raise RuntimeError("--mt50 DATASET says what to train on")
    reader = LeRobotReader(run.mt50)
    share = min(1.0, (run.end_s - time.time()) / 60 / MT50_MINUTES)
    unused = dict.fromkeys(("dataset", "suite", "tasks", "episodes", "eval_episodes"))
    budget = 1e-6 if run.tiny else "gpu"
    config = load_config(argparse.Namespace(**unused, preset="mt50", budget=budget, size=None))
    config = shaped_like(config, *reader.frame_size(reader.camera_keys[0]))
    config = replace(config, steps=config.steps.scaled(share))
    folder = run.work / f"mt50-{int(time.time())}"
    run.tell(steps=vars(config.steps), episodes=len(reader.episodes), size=config.size)
    common = {"config": config, "seed": 0}
    tok, latents, lat, labelled = (folder / name for name in ("tokenizer", "encode", "latent-actions", "label"))

    def stage(name: str, make: Callable[..., dict[str, Any]], **arguments: Any) -> None:
        start_s = time.perf_counter()
        found = make(folder / name, **arguments)
        run.tell(stage=name, seconds=round(time.perf_counter() - start_s, 1), memory_gib=run.memory_gib(), **found)

    stage("tokenizer", work.train_tokenizer, **common, dataset=run.mt50)
    stage("encode", work.encode, config=config, dataset=run.mt50, tokenizer=tok / "tokenizer")
    stage("latent-actions", work.train_latent_actions, **common, latents=latents / "latents")
    stage("label", work.label, config=config, lat=lat / "lat", latents=latents / "latents")
    labelled = labelled / "latents"
    shutil.copyfile(run.mt50 / MT50_TEXT, labelled / MT50_TEXT)
    learned = {**common, "repwam": repwam, "latents": labelled}
    stage("pretrain", work.pretrain, **learned)
    start = {"pretrained": folder / "pretrain" / "wam", "tokenizer": tok / "tokenizer", "lat": lat / "lat"}
    robot = MetaWorldSettings().embodiment
    units = robot.action_units if reader.channel_names("action") == robot.action_names else ()
    stage("adapt", work.adapt, **learned, **start, steps=config.steps.adapt, action_units=units)
    shutil.copytree(folder / "adapt" / "policy", run.out.parent / "mt50-policy", dirs_exist_ok=True)


def embed_instructions(dataset: Path) -> Path:
    """Put the hidden states of a data set's instructions beside it, where there is a text model."""
    from repvitok.data import LeRobotReader
    from repwam_core.text import TextEncoder

    texts = {episode.task for episode in LeRobotReader(dataset).episodes} | {""}
    TextEncoder().save_cache(dataset / MT50_TEXT, sorted(texts))
    return dataset / MT50_TEXT


def _drive(run: Run, policy: Path, dataset: Path) -> None:
    """An exported policy on the device and on the CPU: the same actions, and the wait for them, pixels included."""
    from repvitok.data import LeRobotReader
    from repwam_core import Observation
    from repwam_core.policy.policy import BatchedPolicy

    reader = LeRobotReader(dataset)
    states = reader.episode(0)["observation.state"].astype(np.float32)
    (camera,) = reader.camera_keys

    def driven(device: str) -> tuple[np.ndarray, list[float]]:
        driver = BatchedPolicy.from_pretrained(policy, device)
        driver.reset(["move the square"], [0])
        actions, spent, frames = [], [], [range(1), *(range(first, first + 4) for first in range(1, 25, 4))]
        for seen in frames:
            observation = Observation({camera: reader.frames(0, camera, seen)}, states[seen.start : seen.stop])
            start_s = time.perf_counter()
            actions.append(driver.act([observation])[0].actions)
            spent.append(time.perf_counter() - start_s)
        return np.concatenate(actions), spent

    (ours, spent), (expected, _) = driven(run.device), driven("cpu")
    error = float(np.abs(ours - expected).max() / np.abs(expected).max())
    run.tell(policy=run.device, error=float(f"{error:.2e}"), act_ms=round(1e3 * statistics.median(spent), 2))


def _squares(root: Path) -> Path:
    """A LeRobot data set of six short episodes of a square that its actions move."""
    from repvitok.data import LeRobotWriter

    key, names = "observation.images.top", ["x", "y"]
    writer = LeRobotWriter(
        root, fps=40, cameras={key: (32, 32)}, state_names=names, action_names=names, robot_type="square"
    )
    for number in range(6):
        rng = np.random.default_rng(number)
        action = rng.uniform(-1, 1, (29, 2)).astype(np.float32)
        place = np.clip(np.cumsum(action, axis=0) + 16, 6, 26)
        frames = np.full((29, 32, 32, 3), 40, np.uint8)
        for frame, (x, y) in zip(frames, place.astype(int), strict=True):
            frame[y - 5 : y + 5, x - 5 : x + 5] = (220, 60, 30)
        writer.add_episode(
            number, frames={key: frames}, state=place.astype(np.float32), action=action, task="move the square"
        )
    writer.finalize()
    return root


# -- tests ------------------------------------------------------------------------------------------------------------


def tests(run: Run) -> None:
    """The tests that are marked for a GPU."""
    files = [path for path in ROOT.glob("packages/*/tests/**/test_*.py") if "mark.gpu" in path.read_text()]
    words = ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *map(str, files)]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr)
    lines = [
        line for line in done.stdout.splitlines() if re.match(r"(FAILED|ERROR|E  )|\d+ (passed|failed|skipped)", line)
    ]
    run.tell(pytest=done.returncode, said=[line[:300] for line in lines[-12:]])
    if done.returncode:
        raise RuntimeError(f"pytest ended with {done.returncode}")


PARTS: dict[str, tuple[Callable[[Run], None], float]] = {
    "environment": (environment, 25),
    "correctness": (correctness, 70),
    "train_64k": (train_64k, 100),
    "cached": (cached, 18),
    "latency": (latency, 65),
    "train_200k": (train_200k, 60),
    "flex": (flex, 65),
    "tokenizer": (tokenizer, 60),
    "short_documents": (short_documents, 55),
    "commands": (commands, 75),
    "tests": (tests, 45),
    "train_variants": (train_variants, 110),
    "mt50": (mt50, 60 * MT50_MINUTES),
}
"""What there is to run, the most valuable first, and the seconds after which each is stopped."""
