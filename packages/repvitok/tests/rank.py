"""One rank of a run of `repvitok`: started by `runpy` in a process of its own, with its place in these globals."""

import os
import sys

import torch

place: dict[str, int]
arguments: list[str]

os.environ.update({name: str(value) for name, value in place.items()})
os.environ.update(
    {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0", "GLOO_SOCKET_IFNAME": "lo"}
)
torch.set_num_threads(1)

from repvitok.cli import main  # noqa: E402

sys.exit(main(arguments))
