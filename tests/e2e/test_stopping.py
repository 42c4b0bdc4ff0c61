"""How a server process ends: told to balancers first, whatever clients hold open."""

import signal
import socket
from collections.abc import Callable
from typing import Any

import httpx

BODY = {"model": "tiny", "prompt": "one two", "max_tokens": 2}


def test_within_the_delay_everything_is_answered_but_readiness(own_server: Callable[..., Any]) -> None:
    with own_server(drain_delay_s=3600) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        assert client.get("/ready").status_code == 200
        server.process.send_signal(signal.SIGTERM)
        while client.get("/ready").status_code != 503:
            assert server.process.poll() is None
        for _ in range(3):
            assert client.post("/v1/completions", json=BODY).status_code == 200
            assert httpx.get(f"{server.url}/health").status_code == 200  # on a connection of its own
        assert client.get("/v1/stats").json()["server"]["is_draining"] is True
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0


def test_half_sent_requests_end_with_the_server(own_server: Callable[..., Any]) -> None:
    upload = b"POST /v1/adapters HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: multipart/form-data; boundary=x\r\n"
    inference = b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
    part = b'--x\r\ncontent-disposition: form-data; name="files"; filename="adapter_model.safetensors"\r\n\r\nabc'
    parts = [
        b"GET /he",
        inference,
        inference + b"content-length: 50\r\n\r\n{",
        upload + b"content-length: 900\r\n\r\n" + part,
    ]
    with own_server() as server:
        url = httpx.URL(server.url)
        held = [socket.create_connection((url.host, url.port or 80)) for _ in range(20)]
        for number, sock in enumerate(held):
            sock.sendall(parts[number % len(parts)])
        assert httpx.get(f"{server.url}/health").status_code == 200
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
        log = server.stderr.read_text()
        for sock in held:
            sock.close()
    assert "Traceback" not in log
    assert "[error" not in log
