"""What does RepViTok cost beside other video tokenizers, and how does its cost grow with the length of a clip?

    uv run python benchmarks/tokenizer_cost.py --out benchmarks/results/NAME.md [--parts compare scaling streaming]

compare: one 17x256x256 clip, encoded and decoded by RepViTok (paper's size), by the VAE of Wan2.2, by Cosmos CV8x8x8
and by LTX-Video's VAE (diffusers, random weights, float32). Each model and direction runs in a process of its own, one
after the other; a small clip warms it up. CPU time is the process's; peak memory its maximum resident size, with what
the interpreter and the libraries take before the model is made beside it.
scaling: RepViTok on 17, 33, 65 and 129 frames, against its operations (`repvitok.model`).
streaming: latent frames one by one with a window of 5: CPU time per latent frame, early and late.

With --runs FILE every measurement is appended to a JSON lines file as it is made and taken from there when the command
runs again, so that an interrupted comparison goes on.

CPU time on one thread is stable to a few percent on a machine that others use too; elapsed time is not reported.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

SIZE, FRAMES = 256, 17
MODELS = ("repvitok", "wan2.2", "cosmos-cv8x8x8", "ltx")
LENGTHS = (17, 33, 65, 129)
STREAMED, WINDOW = 25, 5


def main() -> None:
    """Run the parts asked for, each measurement in a process of its own, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="Markdown file for the tables (default: print them)")
    parser.add_argument("--parts", nargs="+", default=["compare", "scaling", "streaming"])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--repeats", type=int, default=3, help="of RepViTok; the others run once")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=Path, help="JSON lines file of measurements, read and appended to")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.measure:
        print(json.dumps(MEASUREMENTS[options.measure[0]](*options.measure[1:])))
        return
    sections = [_machine(options.threads)]
    sections += [PARTS[part](options) for part in options.parts]
    text = "\n\n".join(sections) + "\n"
    print(text)
    if options.out is not None:
        options.out.write_text(text, encoding="utf-8")


def measure_model(name: str, direction: str) -> dict[str, float]:
    """CPU seconds of one clip through one direction of a model, and memory in GB before the model and at the peak."""
    before_gb = _peak_gb()
    torch.manual_seed(0)
    parameters, call = _prepare(name, direction)
    with torch.no_grad():
        call(9, 32)
        gc.collect()
        seconds = _cpu_seconds(lambda: call(FRAMES, SIZE))
    return {"cpu_s": seconds, "peak_gb": _peak_gb(), "before_gb": before_gb, "parameters_m": parameters / 1e6}


def measure_length(frames: str) -> dict[str, float]:
    """CPU seconds of RepViTok's encode and decode on a clip of so many frames, and their operations."""
    from repvitok import RepViTok, RepViTokConfig
    from repvitok.model import decode_flops, encode_flops

    torch.manual_seed(0)
    tok, video = RepViTok(RepViTokConfig()).eval(), torch.rand(1, 3, int(frames), SIZE, SIZE) * 2 - 1
    with torch.no_grad():
        z = tok.encode(video[:, :, :1])
        encode_s = _cpu_seconds(lambda: tok.encode(video))
        z = torch.randn(1, tok.num_latent_frames(int(frames)), z.shape[2], z.shape[3])
        decode_s = _cpu_seconds(lambda: tok.decode(z, (SIZE, SIZE)))
    shape = (tok.config, int(frames), (SIZE, SIZE))
    return {
        "encode_s": encode_s,
        "decode_s": decode_s,
        "encode_gflop": encode_flops(*shape) / 1e9,
        "decode_gflop": decode_flops(*shape) / 1e9,
        "peak_gb": _peak_gb(),
    }


def measure_stream() -> dict[str, list[float]]:
    """CPU seconds of every latent frame of a stream, encoded and decoded; one raw frame, then four at a time."""
    from repvitok import RepViTok, RepViTokConfig

    torch.manual_seed(0)
    stream = RepViTok(RepViTokConfig()).eval().stream(window=WINDOW)
    found: dict[str, list[float]] = {"encode_s": [], "decode_s": [], "peak_gb": []}
    for number in range(STREAMED):
        frames = torch.rand(1, 3, 4 if number else 1, SIZE, SIZE) * 2 - 1
        latents: list[torch.Tensor] = []
        found["encode_s"].append(_cpu_seconds(lambda f=frames, out=latents: out.append(stream.encode(f))))
        found["decode_s"].append(_cpu_seconds(lambda out=latents: stream.decode(out[0])))
        found["peak_gb"].append(_peak_gb())
    return found


def compare(options: argparse.Namespace) -> str:
    """The table of models."""
    rows = {}
    for name in options.models:
        repeats = options.repeats if name == "repvitok" else 1
        rows[name] = {
            direction: [_in_process(options, number, "model", name, direction) for number in range(repeats)]
            for direction in ("encode", "decode")
        }
    base = rows.get("repvitok")
    lines = [
        "## One 17x256x256 clip",
        "",
        "| model | M parameters | encode, CPU s | x ours | decode, CPU s | x ours | peak, GB (enc / dec) | before it |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, found in rows.items():
        encode_s, decode_s = (_median(found[d], "cpu_s") for d in ("encode", "decode"))
        ratios = [
            f"{mine / _median(base[d], 'cpu_s'):.1f}" if base else "not run"
            for mine, d in ((encode_s, "encode"), (decode_s, "decode"))
        ]
        peaks = " / ".join(f"{max(run['peak_gb'] for run in found[d]):.2f}" for d in ("encode", "decode"))
        first = found["encode"][0]
        lines.append(
            f"| {name} | {first['parameters_m']:.0f} | {encode_s:.2f}{_range(found['encode'])} | {ratios[0]} | "
            f"{decode_s:.2f}{_range(found['decode'])} | {ratios[1]} | {peaks} | {first['before_gb']:.2f} |"
        )
    return "\n".join(lines)


def scaling(options: argparse.Namespace) -> str:
    """The table of lengths."""
    lines = [
        "## RepViTok by length of the clip, whole prefix visible, 256x256",
        "",
        "| frames | encode, CPU s | GFLOP | GFLOP per s | decode, CPU s | GFLOP | GFLOP per s | peak, GB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for frames in LENGTHS:
        run = _in_process(options, 0, "length", str(frames))
        cells = [
            f"{run[f'{d}_s']:.2f} | {run[f'{d}_gflop']:.0f} | {run[f'{d}_gflop'] / run[f'{d}_s']:.1f}"
            for d in ("encode", "decode")
        ]
        lines.append(f"| {frames} | {cells[0]} | {cells[1]} | {run['peak_gb']:.2f} |")
    return "\n".join(lines)


def streaming(options: argparse.Namespace) -> str:
    """The table of a stream's early and late latent frames."""
    run = _in_process(options, 0, "stream")
    lines = [
        f"## A stream of {STREAMED} latent frames ({1 + 4 * (STREAMED - 1)} raw frames), window {WINDOW}, 256x256",
        "",
        "| latent frames | encode, CPU s per latent frame | decode, CPU s per latent frame | peak so far, GB |",
        "|---|---|---|---|",
    ]
    for begin, end in ((0, 1), (1, 5), (5, 10), (10, 15), (15, 20), (20, 25)):
        cells = [f"{statistics.median(run[d][begin:end]):.3f}" for d in ("encode_s", "decode_s")]
        name = f"{begin}" if end == begin + 1 else f"{begin} to {end - 1}"
        lines.append(f"| {name} | {cells[0]} | {cells[1]} | {run['peak_gb'][end - 1]:.2f} |")
    return "\n".join(lines)


PARTS = {"compare": compare, "scaling": scaling, "streaming": streaming}
MEASUREMENTS: dict[str, Callable[..., dict]] = {
    "model": measure_model,
    "length": measure_length,
    "stream": measure_stream,
}


def _prepare(name: str, direction: str) -> tuple[int, Callable[[int, int], object]]:
    """A model's number of parameters, and a call that encodes or decodes a random clip of (frames, side)."""
    if name in ("repvitok", "wan2.2"):
        from repvitok import RepViTok, RepViTokConfig
        from repvitok.baselines.wan import WanVae

        tok = RepViTok(RepViTokConfig()).eval() if name == "repvitok" else WanVae.from_config()
        dim = tok.config.latent_dim

        def call(frames: int, side: int) -> object:
            if direction == "encode":
                return tok.encode(torch.rand(1, 3, frames, side, side) * 2 - 1)
            return tok.decode(torch.randn(1, 1 + (frames - 1) // 4, (side // 16) ** 2, dim), (side, side))

        return _count(tok), call
    import diffusers

    cosmos = name.startswith("cosmos")
    vae = (diffusers.AutoencoderKLCosmos if cosmos else diffusers.AutoencoderKLLTXVideo)().eval()
    channels, patch = (16, 8) if cosmos else (128, 32)

    def call_diffusers(frames: int, side: int) -> object:
        if direction == "encode":
            return vae.encode(torch.rand(1, 3, frames, side, side) * 2 - 1).latent_dist.mode()
        return vae.decode(torch.randn(1, channels, 1 + (frames - 1) // 8, side // patch, side // patch)).sample

    return _count(vae), call_diffusers


def _in_process(options: argparse.Namespace, repeat: int, *measure: str) -> dict:
    """One measurement in a fresh process, whose last line is its result; or the one that was made before."""
    key = [options.threads, repeat, *measure]
    known = options.runs.read_text().splitlines() if options.runs and options.runs.exists() else []
    for made, result in map(json.loads, known):
        if made == key:
            return result
    print(" ".join(measure), file=sys.stderr, flush=True)
    command = [sys.executable, __file__, "--threads", str(options.threads), "--measure", *measure]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result = json.loads(done.stdout.strip().splitlines()[-1])
    if options.runs:
        with options.runs.open("a") as file:
            file.write(json.dumps([key, result]) + "\n")
    return result


def _cpu_seconds(call: Callable[[], object]) -> float:
    begun = time.process_time()
    call()
    return time.process_time() - begun


def _peak_gb() -> float:
    """The process's largest resident size so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _median(runs: list[dict], key: str) -> float:
    return statistics.median(run[key] for run in runs)


def _range(runs: list[dict]) -> str:
    values = [run["cpu_s"] for run in runs]
    return f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else " (one run)"


def _machine(threads: int) -> str:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return (
        f"torch {torch.__version__}, Python {platform.python_version()}, {threads} thread(s), "
        f"commit {commit.stdout.strip() or 'unknown'}, {time.strftime('%Y-%m')}; float32, seed 0"
    )


if __name__ == "__main__":
    main()
