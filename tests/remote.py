"""An S3 server on loopback, and a proxy before it that counts requests and breaks them."""

import http.client
import http.server
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote, urlsplit

from pyarrow import fs

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "tests",
    "AWS_SECRET_ACCESS_KEY": "tests",
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
BUCKET = "sets"
Fault = Callable[[str, str, int], int | tuple[int] | None]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def s3_server(folder: Path, host: str = "127.0.0.1") -> Iterator[str]:
    """moto's S3 server as a process of its own; its endpoint, with an empty bucket."""
    port = free_port()
    with (folder / "moto.log").open("w") as log:
        command = [sys.executable, "-m", "moto.server", "-H", host, "-p", str(port)]
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection((host, port)).close()
                break
            except OSError:
                assert process.poll() is None, (folder / "moto.log").read_text()
                assert time.monotonic() < deadline, "moto did not start"
                time.sleep(0.05)
        client(f"http://{host}:{port}").create_dir(BUCKET)
        yield f"http://{host}:{port}"
    finally:
        process.kill()
        process.wait()


def client(endpoint: str) -> fs.S3FileSystem:
    return fs.S3FileSystem(
        access_key="tests",
        secret_key="tests",
        region="us-east-1",
        endpoint_override=endpoint,
        allow_bucket_creation=True,
    )


def upload(folder: Path, endpoint: str, name: str) -> str:
    """Copy a folder into the bucket; its URI, which names the endpoint."""
    fs.copy_files(
        str(folder),
        f"{BUCKET}/{name}",
        source_filesystem=fs.LocalFileSystem(),
        destination_filesystem=client(endpoint),
    )
    return uri(endpoint, name)


def uri(endpoint: str, name: str) -> str:
    return f"s3://{BUCKET}/{name}?endpoint_override={quote(endpoint, safe='')}"


def received(request: http.server.BaseHTTPRequestHandler) -> bytes:
    """The body of a request, of a stated length or in chunks."""
    if request.headers.get("Transfer-Encoding", "").lower() != "chunked":
        return request.rfile.read(int(request.headers.get("Content-Length", 0)))
    body = b""
    while size := int(request.rfile.readline().split(b";")[0], 16):
        body += request.rfile.read(size)
        request.rfile.readline()
    request.rfile.readline()
    return body


class Proxy:
    """Passes requests on to an endpoint and counts them, by method and last name of the path.

    fault: called with (method, name, how often this came before); a status to answer with instead,
    a number of bytes after which to cut the connection as (bytes,), or None. alter: changes bodies.
    """

    def __init__(self, endpoint: str) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self.fault: Fault = lambda method, name, before: None
        self.alter: Callable[[str, bytes, int], bytes] = lambda name, body, before: body
        self.delay = 0.0  # seconds before the second half of each body
        self.target = endpoint
        proxy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                proxy.handle(self)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def handle(self, request: http.server.BaseHTTPRequestHandler) -> None:
        name = urlsplit(request.path).path.split("/")[-1]
        before = self.counts[request.command, name]
        self.counts[request.command, name] += 1
        fault = self.fault(request.command, name, before)
        sent = received(request)
        if isinstance(fault, int):
            request.send_response(fault)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        connection = http.client.HTTPConnection(urlsplit(self.target).netloc)
        headers = {k: v for k, v in request.headers.items() if k.lower() != "transfer-encoding"}
        headers["Content-Length"] = str(len(sent))
        connection.request(request.command, request.path, sent, headers)
        answer = connection.getresponse()
        body = answer.read()
        if request.command == "GET":
            body = self.alter(name, body, before)
        request.send_response(answer.status)
        for header, value in answer.getheaders():
            if header.lower() not in ("connection", "transfer-encoding", "date", "server"):
                request.send_header(header, value)
        request.end_headers()
        half = len(body) // 2
        if fault is not None:
            request.wfile.write(body[: fault[0]])
            request.wfile.flush()
            request.connection.shutdown(socket.SHUT_RDWR)
            request.close_connection = True
            return
        try:
            request.wfile.write(body[:half])
            request.wfile.flush()
            time.sleep(self.delay * bool(body))
            request.wfile.write(body[half:])
        except ConnectionError:  # a killed reader
            request.close_connection = True

    def gets(self, extension: str) -> dict[str, int]:
        """How often each file of this extension was asked for."""
        return {
            name: count
            for (method, name), count in self.counts.items()
            if method == "GET" and name.endswith(extension)
        }

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
