"""A server under load with a real Prometheus watching it, configured by the files in deploy/."""

import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import yaml

from .files import PROMETHEUS, read_yaml

PATIENCE_S = 120.0
RATE_INTERVAL = "10s"  # what Grafana would choose is four scrapes or more; ours are a second apart
BASE = "tiny"
FILES = ("adapter_config.json", "adapter_model.safetensors")


def until(condition: Callable[[], Any], what: str) -> Any:
    """What `condition` gives as soon as it is true. Fails with `what` was waited for."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"still not: {what}")
        time.sleep(0.3)
    return found


@dataclass
class Prometheus:
    url: str

    def get(self, path: str, **params: str) -> Any:
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=params, timeout=30).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def query(self, expr: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.get("query", query=expr)["result"]
        return found

    def query_range(self, expr: str) -> list[dict[str, Any]]:
        """The last half minute."""
        now = time.time()
        found: list[dict[str, Any]] = self.get(
            "query_range", query=expr, start=f"{now - 30:.0f}", end=f"{now:.0f}", step="2"
        )["result"]
        return found

    def numbers(self, target: dict[str, Any], **variables: str) -> list[float]:
        """What Grafana would draw for a panel's query: every value that is a number."""
        expr = substituted(target["expr"], **variables)
        if target.get("instant"):
            values = [float(series["value"][1]) for series in self.query(expr)]
        else:
            values = [float(value) for series in self.query_range(expr) for _, value in series["values"]]
        return [value for value in values if value == value]


def substituted(expr: str, **variables: str) -> str:
    """The query as Grafana sends it: variables replaced, `All` being everything."""
    chosen = {"job": ".*", "instance": ".*", "tenant": ".*", "adapter": ".*", "top": "10"} | variables
    expr = expr.replace("$__rate_interval", RATE_INTERVAL).replace("$__range", "60s")
    for name, value in chosen.items():
        expr = expr.replace(f"${name}", value)
    assert "$" not in expr, expr
    return expr


@contextmanager
def prometheus(program: str, target: str, key_file: Path, folder: Path, port: int) -> Iterator[Prometheus]:
    """The configuration of deploy/, with this server and key in it, and a second between scrapes."""
    config = read_yaml(PROMETHEUS / "prometheus.yml")
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(PROMETHEUS / pattern) for pattern in config["rule_files"]]
    jobs = {job["job_name"]: job for job in config["scrape_configs"]}
    jobs["manylora"]["static_configs"] = [{"targets": [target]}]
    jobs["manylora"]["authorization"]["credentials_file"] = str(key_file)
    jobs["prometheus"]["static_configs"] = [{"targets": [f"127.0.0.1:{port}"]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    command = [
        program,
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'tsdb'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env={**os.environ, "GOMAXPROCS": "1"})
    watching = Prometheus(f"http://127.0.0.1:{port}")

    def is_up() -> bool:
        assert process.poll() is None, (folder / "prometheus.log").read_text()
        try:
            return httpx.get(f"{watching.url}/-/ready").status_code == 200
        except httpx.TransportError:
            return False

    try:
        until(is_up, "Prometheus answers")
        yield watching
    finally:
        process.kill()
        process.wait()


@dataclass
class Load:
    """What many users do at once, again and again, until it is stopped: all that has a metric."""

    url: str
    keys: dict[str, str]  # tenant -> key; the first one is an admin's
    adapters: tuple[str, ...]  # a part for each user, so that no two of them share what is loaded
    broken: str
    upload: Path
    failures: list[str] = field(default_factory=list)
    rounds: int = 0

    def __post_init__(self) -> None:
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(n,), daemon=True) for n in range(3)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def _run(self, number: int) -> None:
        tenant = list(self.keys)[number % len(self.keys)]
        headers = {"authorization": f"Bearer {self.keys[tenant]}"}
        try:
            with httpx.Client(base_url=self.url, headers=headers, timeout=60) as client:
                if number == 0:
                    self._try(client)
                while not self._is_over.is_set():
                    self._round(client, number)
                    self.rounds += 1
        except (AssertionError, httpx.HTTPError) as error:
            self.failures.append(f"{type(error).__name__}: {error}")

    def _round(self, client: httpx.Client, number: int) -> None:
        mine = self.adapters[number :: len(self._threads)]
        for name in (*mine, BASE):
            self._complete(client, 200, model=name, prompt="The quick brown fox jumps over the lazy dog", max_tokens=8)
        self._leave(client, mine[0])
        self._complete(client, 404, model="nobody", prompt="x")
        self._complete(client, 500, model=f"{self.broken}@1", prompt="x")
        for user in range(4):
            self._complete(
                client, (200, 500), model=self.broken, prompt="x", max_tokens=2, user=f"{self.rounds}/{user}"
            )
        if number == 0:
            self._upload(client)

    def _complete(self, client: httpx.Client, status: int | tuple[int, ...], **body: Any) -> None:
        answer = client.post("/v1/completions", json=body)
        assert answer.status_code in (status if isinstance(status, tuple) else (status,)), answer.text

    def _try(self, client: httpx.Client) -> None:
        """Let a version with files answer half of those who ask for the adapter that has lost its own."""
        files = [("files", (name, (self.upload / name).read_bytes())) for name in FILES]
        of_all = {"tenant": "public"}
        answer = client.post("/v1/adapters", params=of_all, data={"name": self.broken}, files=files)
        assert answer.status_code == 201, answer.text
        answer = client.put(f"/v1/adapters/{self.broken}/canary", params=of_all, json={"version": 2, "share": 0.5})
        assert answer.status_code == 200, answer.text

    def _leave(self, client: httpx.Client, name: str) -> None:
        """Ask for a long answer and go after its first words."""
        body = {"model": name, "prompt": "x", "max_tokens": 200, "ignore_eos": True, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as answer:
            next(answer.iter_lines())

    def _upload(self, client: httpx.Client) -> None:
        good = [("files", (name, (self.upload / name).read_bytes())) for name in FILES]
        answer = client.post("/v1/adapters", data={"name": "uploaded"}, files=good)
        assert answer.status_code in (200, 201), answer.text
        bad = [good[0], ("files", (FILES[1], b"no tensors"))]
        assert client.post("/v1/adapters", data={"name": "refused"}, files=bad).status_code == 422


def make_key(data_dir: Path, tenant: str, role: str, python: str) -> str:
    """With the command line, as an operator does."""
    command = [python, "-m", "manylora", "keys", "create", "--tenant", tenant, "--role", role, "--json"]
    done = subprocess.run(
        [*command, "--data-dir", str(data_dir)], check=True, capture_output=True, text=True, timeout=60
    )
    key: str = json.loads(done.stdout)["key"]
    return key
