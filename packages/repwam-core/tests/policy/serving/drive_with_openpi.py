"""Run in an environment that holds openpi-client and nothing of ours: clients side by side, their answers as JSON.

    python drive_with_openpi.py PORT CLIENTS REQUESTS H W CAMERA...

Client k plays an episode of seed k: a first request of one frame, then requests of four, every picture full of k and of
the request's number. Prints {"metadata": ..., "answers": [[rows of actions per request] per client]}.
"""

import json
import sys
import threading

import numpy as np
from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.websocket_client_policy import WebsocketClientPolicy


def request(client, number, size, cameras):
    shape = (4, *size, 3) if number else (*size, 3)
    picture = np.full(shape, 10 * client, np.uint8)
    picture[..., 1] = number % 256
    state = np.full((*shape[:-3], 2), 0.1 * client, np.float32)
    message = {"images": dict.fromkeys(cameras, picture), "state": state, "time_s": 0.1 * number}
    return message if number else message | {"reset": True, "seed": client, "prompt": ("go left", "go up")[client % 2]}


def drive(client, port, requests, size, cameras, answers):
    policy = WebsocketClientPolicy("127.0.0.1", port)
    got = [policy.infer(request(client, number, size, cameras)) for number in range(requests)]
    assert all(not answer["actions"].flags.writeable for answer in got), "openpi hands out read-only arrays"
    answers[client] = [answer["actions"].tolist() for answer in got]


def step_by_step(port, size, cameras):
    """openpi's broker cuts a chunk into single actions; it slices every array of the answer."""
    broker = ActionChunkBroker(WebsocketClientPolicy("127.0.0.1", port), action_horizon=4)
    return [broker.infer(request(0, 0, size, cameras))["actions"].tolist() for _ in range(4)]


def main(port, clients, requests, height, width, *cameras):
    port, size, answers = int(port), (int(height), int(width)), {}
    threads = [
        threading.Thread(target=drive, args=(client, port, int(requests), size, cameras, answers))
        for client in range(int(clients))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    metadata = WebsocketClientPolicy("127.0.0.1", port).get_server_metadata()
    steps = step_by_step(port, size, cameras)
    print(json.dumps({"metadata": metadata, "answers": [answers[k] for k in sorted(answers)], "steps": steps}))


main(*sys.argv[1:])
