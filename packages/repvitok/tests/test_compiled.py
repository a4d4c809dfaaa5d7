"""Compiled blocks give the numbers of uncompiled ones, from one set of graphs for all batches.

Each in a process of its own: the tests' checks of shapes cannot be traced.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

SETTING = """
import sys
from functools import partial

import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

counter = CompileCounterWithBackend(sys.argv[1])
torch.compile = partial(torch.compile, backend=counter)

from repvitok import RepViTok, RepViTokConfig

device = sys.argv[2]
torch.manual_seed(0)
tok = RepViTok(RepViTokConfig(patch_size=4, width=64, depth=3, heads=2, latent_dim=6)).to(device)
tight = {"rtol": 1e-3, "atol": 1e-4}

def clips(batch, frames=9, size=(32, 48)):  # three latent frames of 96 tokens
    return torch.rand(batch, 3, frames, *size, device=device) * 2 - 1

def both(function, video):
    for tok.compile_blocks in (False, True):
        yield function(video)
"""

WITHOUT_GRADIENTS = """
@torch.no_grad()
def there_and_back(video, window="config"):
    z = tok.encode(video, window)
    return z, tok.decode(z, video.shape[-2:], window)

for batch in (2, 3, 5):
    assert_close(*both(there_and_back, clips(batch)), **tight)
    assert counter.frame_count == 2  # a block, of the encoder and of the decoder; the projection
for tok.attention_kernel in ("flex", "frames"):
    video = clips(2)
    for window in (None, 2):
        assert_close(*both(partial(there_and_back, window=window), video), **tight)
assert counter.frame_count == 8  # for each window and kernel
for frames, size in ((1, (32, 48)), (9, (16, 16)), (5, (32, 16))):
    assert_close(*both(there_and_back, clips(2, frames, size)), **tight)
z = tok.encode(video)  # a stream is not compiled, and agrees
known, stream = counter.frame_count, tok.stream(2)
parts = [stream.encode(part) for part in (video[:, :, :5], video[:, :, 5:])]
assert_close(torch.cat(parts, dim=1), z.detach(), **tight)
with torch.compiler.set_stance("force_eager"):
    assert_close(*both(there_and_back, clips(4, 13)), **tight)
assert counter.frame_count == known
"""

TRAINING = """
tok.attention_kernel = sys.argv[3]

def gradients(video):
    tok.zero_grad()
    video_hat, z = tok(video)
    (video_hat.square().mean() + z[..., 0].mean()).backward()
    return [parameter.grad for parameter in tok.parameters()]

with torch.inference_mode():  # validation comes first, and leaves masks behind
    assert_close(*both(tok, clips(2)), **tight)
known = counter.frame_count
for tok.gradient_checkpointing in (False, True):
    for batch in (2, 3):
        assert_close(*both(gradients, clips(batch)), **tight)
        assert counter.frame_count == known + 2
with torch.autocast(device, torch.bfloat16):
    eager, compiled = both(gradients, clips(2))
for ours, expected in zip(compiled, eager, strict=True):
    assert (ours - expected).norm() <= 0.05 * expected.norm()
"""

UNASKED = """
tok.compile_blocks = None
tok.encode(clips(2))
assert not counter.frame_count
"""

ON_A_GPU = """
found = []
for tok.compile_blocks in (None, False):  # 288 tokens: blocks of FlexAttention are visible in full, in part, and not
    torch.manual_seed(1)
    tok.zero_grad()
    video_hat, z = tok(clips(2))
    (video_hat.square().mean() + z[..., 0].mean()).backward()
    found.append([video_hat, z, *(parameter.grad for parameter in tok.parameters())])
    assert counter.frame_count == 2
for ours, expected in zip(*found, strict=True):
    assert (ours - expected).norm() <= 1e-2 * expected.norm() + 1e-6
"""


def run(script: str, *arguments: str) -> None:
    """A script in another process, or what it said when it failed."""
    command = [sys.executable, "-c", SETTING + script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("script", [WITHOUT_GRADIENTS, TRAINING], ids=["without-gradients", "training"])
def test_compiled_blocks_are_the_same_and_share_their_graphs(script: str) -> None:
    run(script, "aot_eager", "cpu", "frames")


def test_a_cpu_does_not_compile_unless_asked() -> None:
    run(UNASKED, "eager", "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_compiles_by_itself_and_has_the_same_gradients() -> None:
    run(ON_A_GPU, "inductor", "cuda")
