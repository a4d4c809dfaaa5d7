"""The device that a command line names, checked once for all verbs of the three packages."""

from __future__ import annotations

import torch

from repvitok.errors import UserError


def find_device(name: str | torch.device, process: int = 0) -> torch.device:
    """The device called `name`, tried out with one number.

    Args:
        name: "cpu", "cuda", "cuda:1", another of torch's devices, or "auto": CUDA where there is one.
        process: which of several processes on this machine asks: "auto" and "cuda" are spread over its GPUs.

    Raises:
        UserError: no such device, or this machine has none, or none that answers.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device: expected auto, cpu, cuda, cuda:1, ..., got {str(name)!r}") from error
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", process % torch.cuda.device_count())
    if device.type == "meta":
        raise UserError("--device meta: it holds no numbers; use cpu or cuda")
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"--device {name}: this machine has no such device ({reason[:120]}); use cpu") from error
    return device
