"""A compiled policy acts as an uncompiled one, and compiles nothing again for a new episode or another instruction.

In a process of its own: the checks of shapes that tests install do not belong into a compiled graph.
"""

from __future__ import annotations

import subprocess
import sys

EPISODES = """
import sys
from functools import partial

import numpy as np
import torch
from torch._dynamo.testing import CompileCounter

counter = CompileCounter()
torch.compile = partial(torch.compile, backend=counter)

from repvitok.data import LeRobotReader
from repwam_core.interface import Observation
from repwam_core.policy import BatchedPolicy
from repwam_core.policy.folder import LoadedPolicy

reader, parts = LeRobotReader(sys.argv[2]), LoadedPolicy.load(sys.argv[1], "cpu")

def drive(policy, instruction, later):
    policy.reset([instruction], [3])
    for first, last in ((0, 1), (1, 5), (5, 9), (9, 13), (13, 17)):  # five latent frames; the ring holds four
        images = {camera: reader.frames(0, camera, range(first, last)) for camera in reader.camera_keys}
        state = reader.episode(0)["observation.state"][first:last].astype(np.float32)
        told = later if first == 9 else None
        yield policy.act([Observation(images=images, state=state, instruction=told)])[0].actions

plain, compiled = BatchedPolicy(parts), BatchedPolicy(parts, compile_passes=True)
after = []
for instruction, later in (("go left", None), (None, None), ("go up", "go left")):  # four text tokens, one, four
    for ours, expected in zip(drive(compiled, instruction, later), drive(plain, instruction, later), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=1e-4)
    after.append(counter.frame_count)
print("graphs", after)
"""


def test_a_compiled_policy_is_the_same_and_compiles_once_per_kind_of_pass(world):
    command = [sys.executable, "-c", EPISODES, str(world.policy), str(world.dataset)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.strip() == "graphs [6, 6, 6]"
    )  # two parts of a layer: frame 0; one observed frame; a planned chunk
