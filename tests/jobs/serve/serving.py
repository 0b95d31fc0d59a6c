"""A server in this process, with nets or with an answer that is always the same."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from jobs.pictures import encode_png, grey
from jobs.serve.app import Ask, Limits, make_server
from jobs.serve.replica import Answer
from model.localization import RULES

MASK = np.zeros((20, 40))
MASK[2:4, 5:9] = 0.6
MASK[8:16, 20:36] = 0.9
BOXES = {rule: [10 * i, 5, 100 + i, 80] for i, rule in enumerate(RULES)}


async def canned(data: bytes) -> Answer:
    """What the nets would say of a photograph of 400 x 200 pixels."""
    top = [{"class": f"n{i}", "name": f"a thing {i}", "score": 0.5 / 2**i} for i in range(5)]
    sides = {"width": 400, "height": 200}
    mask = {"found": True, "mask": encode_png(grey(MASK))}
    return {**sides, "rule": "medoid", "boxes": BOXES, **top[0], "top5": top, **mask}


@contextmanager
def server(ask: Ask, limits: Limits, token: str | None = None) -> Iterator[int]:
    """Yield the port of a server that runs in a thread."""
    running = make_server(ask, limits, token)
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listening:
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
        thread.start()
        yield listening.getsockname()[1]
        running.should_exit = True
        thread.join(timeout=20)
        assert not thread.is_alive()
