"""The verb `repwam serve`: its options, and a policy folder behind a websocket until it is stopped."""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import logging
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from repvitok.runtime.commands import MANY, number, path_argument, text_argument, whole_number
from repvitok.runtime.errors import UserError

from repwam_core.sampling import add_sampling_arguments, given_sampling

if TYPE_CHECKING:
    from repwam_core.policy.policy import Policy
    from repwam_core.policy.serving.protocol import ServerMetadata
    from repwam_core.policy.serving.server import PolicyServer

MEBIBYTE = 2**20


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `repwam serve`."""
    parser.add_argument("--policy", type=text_argument, required=True, help="policy folder, a name, or hf://owner/name")
    parser.add_argument(
        "--host", type=text_argument, default="127.0.0.1", help="address to listen on (default: this machine only)"
    )
    parser.add_argument(
        "--port", type=whole_number(0, 65_535), default=8000, help="0 takes a free one (default: %(default)s)"
    )
    parser.add_argument(
        "--api-key-file", type=path_argument, metavar="FILE", help="file with the key that clients must send"
    )
    parser.add_argument("--device", type=text_argument, default="cpu", help="cpu, cuda, cuda:1 (default: %(default)s)")
    parser.add_argument(
        "--max-sessions", type=whole_number(1, 100_000), default=16, help="clients at a time (default: %(default)s)"
    )
    parser.add_argument(
        "--idle-timeout",
        type=number(0, MANY, above=True),
        default=600.0,
        metavar="SECONDS",
        help="without a request for so long, a session is closed and its place is free (default: %(default)s)",
    )
    parser.add_argument(
        "--max-message-mib", type=whole_number(1, 4096), default=64, help="size of one request (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="of the model's weights (default: float32)"
    )
    parser.add_argument(
        "--compile", action="store_true", help="compile the model's layers before the first client comes, for a GPU"
    )
    parser.add_argument(
        "--hold-frames",
        action="store_true",
        help="take one frame for all since the last answer: for clients that send the newest alone, as openpi's do",
    )
    add_sampling_arguments(parser)


def serve(options: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM; connections are closed then. Returns 130 and 143."""
    try:
        from repwam_core.policy.serving.server import PolicyServer, ServeSettings
    except ModuleNotFoundError as error:
        raise UserError(f"serving needs {error.name}: install repwam-core[serve]") from error
    import torch

    from repwam_core.policy.folder import LoadedPolicy
    from repwam_core.policy.policy import Policy

    settings = ServeSettings(
        host=options.host,
        port=options.port,
        api_key=_api_key(options.api_key_file),
        max_message_bytes=options.max_message_mib * MEBIBYTE,
        max_sessions=options.max_sessions,
        idle_timeout_s=options.idle_timeout,
        hold_frames=options.hold_frames,
    )
    parts = LoadedPolicy.load(options.policy, options.device, dtype=getattr(torch, options.dtype))
    plan = {**given_sampling(options), "compile_passes": options.compile}
    warm = [Policy(parts, **plan)]  # the first session's, with all that it captured
    warm_up(warm[0])
    metadata = metadata_of(warm[0])
    server = PolicyServer(lambda: warm.pop() if warm else Policy(parts, **plan), metadata, settings)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    if settings.api_key is None and not _is_local(settings.host):
        logging.getLogger(__name__).warning("listening on %s without an API key: see --api-key-file", settings.host)
    return 128 + asyncio.run(_serve_until_signal(server))


def warm_up(policy: Policy) -> None:
    """Plan two chunks from black pictures, so that no robot waits for what is loaded or compiled only once."""
    import numpy as np

    from repwam_core.interface import Observation

    robot, manifest = policy.embodiment, policy.parts.manifest
    policy.reset(None)
    frames = 1
    for _ in range(2):
        pictures = np.zeros((frames, *manifest.size, 3), np.uint8)
        state = np.zeros((frames, len(robot.state_channels)), np.float32) if robot.state_channels else None
        frames = len(policy.act(Observation(dict.fromkeys(robot.cameras, pictures), state)))


def metadata_of(policy: Policy) -> ServerMetadata:
    """What clients must know of a policy."""
    from repwam_core.policy.serving.protocol import ServerMetadata

    manifest, batched = policy.parts.manifest, policy.batched
    return ServerMetadata(
        embodiment=policy.embodiment,
        image_size=manifest.size,
        frames_per_latent=batched.frames_per_latent,
        max_frames=batched.frames_per_latent * policy.plan.chunk_frames,
        policy=manifest.digests["wam"],
        action_kind=policy.action_kind,
        takes_committed=True,
    )


async def _serve_until_signal(server: PolicyServer) -> int:
    """The number of the signal that ended it."""
    loop = asyncio.get_running_loop()
    stopped: asyncio.Future[int] = loop.create_future()
    for which in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(which, lambda which=which: stopped.done() or stopped.set_result(which))
    async with server.listening() as port:
        print(f"serving on ws://{server.settings.host}:{port}", flush=True)
        return await stopped


def _api_key(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        key = path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected an API key on one line, got no text ({error})") from error
    if not key:
        raise UserError(f"{path}: expected an API key on one line, got nothing")
    return key


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
