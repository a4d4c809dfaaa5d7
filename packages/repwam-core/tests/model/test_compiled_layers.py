"""The compiled halves of a layer: the eager numbers, one set of graphs for all layers and every packing.

In a process of its own: the checks of shapes that tests install do not belong into a compiled graph. It has no GPU, so
that attention over documents of any length is a loop over them here.
"""

import subprocess
import sys

import pytest

SCRIPT = """
import sys
import torch
from repwam_core.model import blocks
from repwam_core.model.attention import make_attention
from repwam_core.model.config import ActionSpace, WAMConfig
from repwam_core.model.sequence import WAMInputs, concat, training_layout
from repwam_core.model.wam import WorldActionModel
from repwam_core.training.parallel import ScaleSettings, prepare_layers

backend, recompute, residual = sys.argv[1:]

@torch.library.custom_op("test::varlen", mutates_args=())
def varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_starts: torch.Tensor, k_starts: torch.Tensor,
           longest: int, most: int) -> torch.Tensor:
    return looped(q, k, v, q_starts, k_starts)

def pieces(q_starts, k_starts):
    for i in range(len(q_starts) - 1):
        yield slice(q_starts[i], q_starts[i + 1]), slice(k_starts[i], k_starts[i + 1])

def weights(q, k):  # (heads, m, s)
    return torch.einsum("mhc,shc->hms", q, k).div(q.shape[-1] ** 0.5).softmax(-1)

def looped(q, k, v, q_starts, k_starts):
    out = torch.empty_like(q)
    for rows, keys in pieces(q_starts, k_starts):
        out[rows] = torch.einsum("hms,shc->mhc", weights(q[rows], k[keys]), v[keys])
    return out

@torch.library.custom_op("test::varlen_backward", mutates_args=())
def varlen_backward(grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_starts: torch.Tensor,
                    k_starts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dq, dk, dv = torch.empty_like(q), torch.full_like(k, torch.nan), torch.full_like(v, torch.nan)  # some unwritten
    for rows, keys in pieces(q_starts, k_starts):
        p, g = weights(q[rows], k[keys]), grad[rows]
        dp = torch.einsum("mhc,shc->hms", g, v[keys])
        ds = p * (dp - (dp * p).sum(-1, keepdim=True)) / q.shape[-1] ** 0.5
        dq[rows] = torch.einsum("hms,shc->mhc", ds, k[keys])
        dk[keys] = torch.einsum("hms,mhc->shc", ds, q[rows])
        dv[keys] = torch.einsum("hms,mhc->shc", p, g)
    return dq, dk, dv

varlen.register_fake(lambda q, *_: torch.empty_like(q))
varlen_backward.register_fake(lambda grad, q, k, v, *_: tuple(map(torch.empty_like, (q, k, v))))
varlen.register_autograd(
    lambda ctx, grad: (*varlen_backward(grad.contiguous(), *ctx.saved_tensors), None, None, None, None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:5]),
)

space = ActionSpace(channels=4, vectors_per_transition=2)
config = WAMConfig.preset("tiny", depth=3, text_dim=8, latent_dim=8, window=2, spaces={"robot": space})
torch.manual_seed(0)
wam = WorldActionModel(config)
with torch.no_grad():
    for parameter in wam.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape))

def inputs_of(lengths, words):
    layout = concat([training_layout(sum(sizes) + 1, sizes, (1, 2, 2), 2) for sizes in lengths])
    n = len(layout.document)
    mask = torch.rand(1, len(lengths), words) < 0.7
    return WAMInputs(
        layout=layout,
        video=torch.randn(1, len(layout.video), 8),
        actions=torch.randn(1, len(layout.actions), 4),
        states=None,
        times=torch.rand(1, len(layout.levels)),
        text=torch.randn(1, len(lengths), words, 8),
        text_mask=mask,
        space="robot",
    )

def step(inputs):
    wam.zero_grad(set_to_none=True)
    attention = make_attention(inputs.layout, config.coupling, config.window, "dense")
    out = wam(inputs, attention)
    (out.video.square().mean() + out.actions.square().mean()).backward()
    return [out.video.detach(), out.actions.detach(), *(p.grad for p in wam.parameters() if p.grad is not None)]

packings = [[(2, 1), (2,)], [(1,), (2, 2, 1), (2, 1)], [(2, 2)] * 4, [(1, 1), (2,), (2, 2), (1,), (2, 1)]]
packings = [inputs_of(packing, words) for packing in packings for words in (3, 5)]
plain = [step(inputs) for inputs in packings]

blocks.varlen_attn, blocks.on_gpu, blocks.HALF = varlen, lambda x: True, (torch.float32,)
for layer in wam.layers:
    layer.__dict__.pop("before", None)
if backend != "none":
    compiler = torch.compile
    torch.compile = lambda *a, **k: compiler(*a, **k, backend=backend)
prepare_layers(wam, ScaleSettings(compile=backend != "none", recompute=recompute))
graphs = []
for inputs, expected in zip(packings, plain, strict=True):
    for ours, theirs in zip(step(inputs), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-3)
    graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
print("graphs", *graphs)
"""


def run(*words: str) -> list[int]:
    done = subprocess.run([sys.executable, "-c", SCRIPT, *words], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr[-3000:]
    return [int(word) for word in done.stdout.split()[1:]]


def test_documents_of_any_length_are_attended_in_one_call():
    assert set(run("none", "none", "float32")) == {0}


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_all_layers_and_packings_share_the_graphs(recompute: str):
    graphs = run("aot_eager", recompute, "float32")
    # One before attention and one behind it; that of the first packing takes an equal pair of sizes for a rule.
    assert graphs == [2] + [3] * (len(graphs) - 1)


@pytest.mark.slow
def test_the_compiled_layer_computes_the_same():
    run("inductor", "selective", "float32")
