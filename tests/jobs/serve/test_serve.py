"""The HTTP side with canned answers, and the whole of it on Ray Serve."""

import asyncio
import base64
import http.client
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import Any

import cv2
import numpy as np
import pytest

from jobs.locate import locate, prepare
from jobs.pictures import encode_png
from jobs.serve import __main__ as command
from jobs.serve.app import Limits
from jobs.serve.replica import Answer, BusyError, ask, deploy, stop
from jobs.shipped import load_shipped
from pipeline.errors import UserError
from pipeline.synthetic import SyntheticConfig, draw_image
from tests.jobs.kills import workers
from tests.jobs.serve.serving import BOXES, MASK, canned, server

TOKEN = "0123456789abcdef"
LIMITS = Limits(image_bytes=1000, waiting_bytes=5000, header_seconds=0.3, body_seconds=0.3)


async def troubled(data: bytes) -> Answer:
    """Answer as the image's bytes say."""
    if data == b"broken":
        return {"error": "no image format"}
    if data == b"dead":
        raise BusyError("the nets do not answer (ActorDiedError)")
    if data.startswith(b"slow"):
        await asyncio.sleep(0.5)
    return await canned(data)


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with server(troubled, LIMITS) as port:
        yield port


def send(
    port: int, body: Any = b"image", target: str = "/localize", method: str = "POST", **headers: str
) -> tuple[int, dict[str, Any]]:
    """Return the status code and the JSON of an answer."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=120)) as connection:
        connection.request(method, target, body, headers)
        response = connection.getresponse()
        data = response.read()
        is_json = response.headers.get_content_type() == "application/json"
        return response.status, json.loads(data) if is_json else {}


def test_an_image_is_answered_with_box_classes_and_the_mask_when_asked(port: int) -> None:
    status, content = send(port)
    assert (status, content["box"], content["class"]) == (200, BOXES["medoid"], "n0")
    assert "mask" not in content
    _, content = send(port, target="/localize?rule=otsu&mask=1")
    assert (content["rule"], content["box"]) == ("otsu", BOXES["otsu"])
    mask = cv2.imdecode(np.frombuffer(base64.b64decode(content["mask"]), np.uint8), 0)
    np.testing.assert_array_equal(mask, np.rint(255 * MASK))


@pytest.mark.parametrize(
    ("given", "status", "reason"),
    [
        ({"body": b""}, 400, "empty"),
        ({"target": "/localize?rule=best"}, 400, "rule=best .*medoid"),
        ({"target": "/localize?mask=yes"}, 400, "mask=yes .*0, 1"),
        ({"target": "/localize?size=3"}, 400, "size=3 .*rule.*mask"),
        ({"body": bytes(1001)}, 413, "1000 bytes"),
        ({"body": (bytes(400) for _ in range(4))}, 413, "1000 bytes"),  # sent in chunks
        ({"body": b"broken"}, 422, "no image format"),
        ({"body": b"dead"}, 503, "ActorDied"),
        ({"method": "GET", "body": None}, 405, None),
        ({"target": "/other"}, 404, None),
    ],
)
def test_every_fault_has_its_status_code_and_reason(
    given: dict[str, Any], status: int, reason: str | None, port: int
) -> None:
    got, content = send(port, **given)
    assert got == status
    if reason is not None:
        assert re.search(reason, content["error"])
    assert send(port)[0] == 200


def test_slow_clients_are_sent_away(port: int) -> None:
    begun = b"POST /localize HTTP/1.1\r\nHost: a\r\nContent-Length: 900\r\n\r\n some"
    for text, answered in ((b"POST /loc", b""), (begun, b"HTTP/1.1 408")):
        with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
            connection.sendall(text)
            received = b"".join(iter(partial(connection.recv, 4096), b""))
            assert received.startswith(answered)
            assert bool(received) == bool(answered)


def test_200_requests_at_once_are_answered_or_asked_to_come_again(port: int) -> None:
    body = b"slow" + bytes(900)
    with ThreadPoolExecutor(200) as pool:
        statuses = [status for status, _ in pool.map(lambda _: send(port, body), range(200))]
    assert set(statuses) == {200, 503}
    assert statuses.count(200) >= 5  # as many as may wait
    assert send(port)[0] == 200


def test_the_token_is_asked_for() -> None:
    with server(canned, LIMITS, TOKEN) as port:
        statuses = [
            send(port, **({"Authorization": f"Bearer {token}"} if token else {}))[0]
            for token in (None, TOKEN, "0123456789abcdeé")
        ]
    assert statuses == [401, 200, 401]


@pytest.mark.parametrize(
    ("host", "token", "refused"),
    [
        ("127.0.0.1", None, False),
        ("::1", TOKEN, False),
        ("localhost", None, False),
        ("0.0.0.0", TOKEN, False),
        ("0.0.0.0", None, True),
        ("", None, True),
        ("example.org", None, True),
        ("127.0.0.1", "short", True),
    ],
)
def test_only_loopback_does_without_a_token(
    host: str, token: str | None, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(command.TOKEN, raising=False)
    if token is not None:
        monkeypatch.setenv(command.TOKEN, token)
    if refused:
        with pytest.raises(UserError, match=command.TOKEN):
            command.read_token(host)
    else:
        assert command.read_token(host) == token
        assert command.TOKEN not in os.environ  # which processes would inherit


def test_a_port_in_use_is_named() -> None:
    with command.bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port}"):
            command.bind("127.0.0.1", port)


@pytest.fixture(scope="module")
def replica_port(ray_local: None) -> Iterator[int]:
    """The port of a server with one replica of the shipped nets."""
    pytest.importorskip("efficientnet_lite_pytorch", reason="pip install '.[photos]'")
    handle = deploy(None, accurate=False, replicas=1)
    with server(partial(ask, handle), Limits(image_bytes=2**20)) as port:
        yield port
    stop()


@pytest.fixture(scope="module")
def drawings() -> list[bytes]:
    drawing = SyntheticConfig(min_side=200, max_side=300)
    return [encode_png(draw_image(drawing, "val", i)[0]) for i in range(6)]


@pytest.mark.slow
def test_replicas_answer_as_jobs_localize_does(replica_port: int, drawings: list[bytes]) -> None:
    files = [*drawings, b"no image", b"P6 20000 20000 255\n"]  # the last of too many pixels
    with ThreadPoolExecutor(len(files)) as pool:
        answers = list(pool.map(partial(send, replica_port), files))
    assert [status for status, _ in answers] == [200] * 6 + [422] * 2
    nets = load_shipped()
    for data, (_, content) in zip(drawings, answers, strict=False):
        (alone,) = locate(nets, [prepare(nets.config, data)], batch_size=1)
        assert content["class"] == alone.top5[0][0]
        assert content["score"] == pytest.approx(alone.top5[0][2], abs=0.02)
        assert content["box"] == pytest.approx(alone.box, abs=15)  # batches round otherwise


@pytest.mark.slow
def test_a_killed_replica_is_replaced_and_its_clients_are_asked_to_come_again(
    replica_port: int, drawings: list[bytes]
) -> None:
    before = send(replica_port, drawings[0])
    (replica,) = workers("ServeReplica")
    replica.kill()
    statuses, deadline = [], time.monotonic() + 300
    while (after := send(replica_port, drawings[0]))[0] != 200 and time.monotonic() < deadline:
        statuses.append(after[0])
    assert set(statuses) <= {503}
    assert after == before
    assert workers("ServeReplica") != [replica]
