"""One verb in a process of its own, started by `runpy` with these globals; its stderr goes to a file."""

import importlib
import os
import sys

import torch

package: str
arguments: list[str]
stderr: str

torch.set_num_threads(1)
file = os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
os.dup2(file, 1)
os.dup2(file, 2)
sys.exit(importlib.import_module(f"{package}.cli").main(arguments))
