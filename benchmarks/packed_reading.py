"""What does it cost to leave latents on disk? Start-up, memory and seconds per packed sequence, in memory and mapped.

    python benchmarks/packed_reading.py [--gigabytes 2] [--token-budget 200000] [--sequences 20]

Writes latents of noise (256 tokens of 96 numbers a frame in float16, episodes of 60 to 240 latent frames, 20 action
channels) into a temporary folder, then reads packed sequences in a process of its own for each way. Memory is the
process's own (anonymous) memory, after the last; pages of mapped files belong to the system's cache.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from repvitok.data import LatentEpisode, LatentMeta, LatentShardWriter
from repwam_core.data.packing import DataSetSettings, Mixture, PackingSettings, make_packer, read_packed
from repwam_core.model.config import ActionSpace, WAMConfig
from safetensors.torch import save_file

CHANNELS, TOKENS, WIDTH = 20, 256, 96


def main() -> None:
    """Write the latents and measure both ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of latents on disk")
    parser.add_argument("--token-budget", type=int, default=200_000)
    parser.add_argument("--sequences", type=int, default=20)
    parser.add_argument("--read", nargs=2, metavar=("LATENTS", "LIMIT_GB"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        print(json.dumps(measure(Path(options.read[0]), float(options.read[1]), options)))
        return
    print("| latents | start, s | seconds per sequence, median | CPU s per sequence | own memory, GB |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "latents", options.gigabytes)
        for name, limit_gb in (("in memory", "1000"), ("on disk", "0")):
            command = [sys.executable, __file__, *sys.argv[1:], "--read", f"{folder}/latents", limit_gb]
            told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            print(f"| {name} | {told['start']:.1f} | {told['wall']:.3f} | {told['cpu']:.3f} | {told['memory']:.2f} |")


def write(folder: Path, gigabytes: float) -> None:
    """Latents of noise with actions and states."""
    names = tuple(f"channel_{number}" for number in range(CHANNELS))
    meta = LatentMeta(
        tokenizer_digest="0" * 64, frame_rate_hz=30.0, stride=1, grid=(1, 16, 16), cameras=("top",), latent_dim=WIDTH,
        window=32, source="noise", action_names=names, state_names=names,
    )  # fmt: skip
    rng, written, number = np.random.default_rng(0), 0, 0
    with LatentShardWriter(folder, meta, dtype="float16", measure=False) as writer:
        while written < gigabytes * 1e9:
            frames = int(rng.integers(60, 240))
            latents = rng.standard_normal((frames, TOKENS, WIDTH), np.float32)
            actions = rng.standard_normal((frames - 1, 4, CHANNELS), np.float32)
            state = rng.standard_normal((frames, CHANNELS), np.float32)
            writer.add(LatentEpisode(f"episode-{number}", number, 0, "go", latents, state, actions))
            written, number = written + latents.size * 2, number + 1
    metadata = {"text_encoder": "minilm", "instructions": json.dumps(["go"])}
    save_file({"0": torch.randn(3, 384)}, folder / "text-minilm.safetensors", metadata)


def measure(latents: Path, limit_gb: float, options: argparse.Namespace) -> dict[str, float]:
    """Start the store and read sequences."""
    start_s = time.perf_counter()
    mixture = Mixture([DataSetSettings(latents=latents)], memory_limit_gb=limit_gb)
    start = time.perf_counter() - start_s
    space = ActionSpace(channels=CHANNELS, vectors_per_transition=4, state_channels=CHANNELS)
    packer = make_packer(
        mixture,
        PackingSettings(token_budget=options.token_budget),
        WAMConfig.preset("tiny", spaces={"robot": space}),
        0,
    )
    walls, cpu_s = [], time.process_time()
    for _ in range(options.sequences):
        start_s = time.perf_counter()
        read_packed(mixture, next(packer), options.token_budget)
        walls.append(time.perf_counter() - start_s)
    cpu = (time.process_time() - cpu_s) / options.sequences
    return {"start": start, "wall": float(np.median(walls)), "cpu": cpu, "memory": own_memory_gb()}


def own_memory_gb() -> float:
    """Anonymous memory of this process, which file maps are no part of."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon"))) / 1e6


if __name__ == "__main__":
    main()
