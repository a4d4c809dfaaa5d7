"""One encoding as processes: what a command line asks for, on one or several devices."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from repvitok.data.contents import describe_contents
from repvitok.data.folders import open_episodes
from repvitok.encoding import encode_dataset
from repvitok.encoding_plan import EpisodeReader, JobSlice, choose_cameras, episodes_of_slice, infos_of
from repvitok.merging import merge_latents
from repvitok.model import load_tokenizer
from repvitok.runtime.errors import MOST_PROCESSES, UserError, run_cli
from repvitok.runtime.pretrained import find_device


@dataclass(frozen=True)
class EncodingJob:
    """What to encode; everything in it can be sent to another process.

    Attributes:
        tokenizer: folder or hub id.
        dataset: see `repvitok.data.folders.open_episodes`.
        out: folder for the shards.
        device: a torch device, or "auto": CUDA where there is one.
        cache_folder: for WebDataset shards.
        depth_range: what becomes black and what white of depth maps; None: they are refused.
        settings: keyword arguments of `encode_dataset`.
    """

    tokenizer: str
    dataset: str
    out: str
    device: str = "auto"
    cache_folder: str | None = None
    depth_range: Sequence[float | int] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def run(self, shard: JobSlice | None = None, process: int = 0, *, announce: bool = True) -> None:
        """Encodes the data set or a share of it, on the device of process number `process`.

        What the data hold is said first on stderr, with `announce`: a model takes its time to load, and a data set
        that later stages can do little with takes hours to encode.
        """
        reader = open_episodes(self.dataset, self.cache_folder, self.depth_range)
        if announce:
            self.announce(reader, shard)
        tokenizer: Any = load_tokenizer(self.tokenizer)
        tokenizer.to(find_device(self.device, process))
        encode_dataset(tokenizer, reader, self.out, shard=shard, report=print, **self.settings)

    def announce(self, reader: EpisodeReader, shard: JobSlice | None = None) -> None:
        """Says on stderr what the episodes and cameras to encode hold, and what later stages will miss."""
        episodes = episodes_of_slice(infos_of(reader, self.settings.get("episodes")), shard)
        cameras = choose_cameras(reader, self.settings.get("cameras"))
        describe_contents(reader, cameras, episodes).announce()


def run_job(job: EncodingJob, *, shard: JobSlice | None = None, processes: int = 1) -> None:
    """Encodes, in this process or in several, which share the episodes; several without a `shard` are merged at the
    end.
    """
    if not 1 <= processes <= MOST_PROCESSES:
        raise UserError(f"--processes: expected 1 to {MOST_PROCESSES} on this machine, got {processes}")
    if processes == 1:
        job.run(shard)
        return
    job.announce(open_episodes(job.dataset, job.cache_folder, job.depth_range), shard)
    index, shares = shard or (0, 1)
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    running = [
        context.Process(
            target=_run_slice, args=(job, (index * processes + number, shares * processes), number, processes)
        )
        for number in range(processes)
    ]
    try:
        for process in running:
            process.start()
        for process in running:
            process.join()
    finally:
        for process in running:
            process.terminate()
    failed = sum(process.exitcode != 0 for process in running)
    if failed:
        raise UserError(f"{failed} of {processes} processes failed, see above; the same command continues the rest")
    if shard is None:
        merge_latents(job.out)


def _run_slice(job: EncodingJob, shard: JobSlice, number: int, processes: int) -> None:
    """One process: its part of the cores, errors in one line."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    sys.exit(run_cli(lambda _: job.run(shard, number, announce=False))([]))
