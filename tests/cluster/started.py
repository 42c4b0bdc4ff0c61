"""A cluster that `manylora cluster` started, as its starter and its clients see it."""

import signal
import subprocess
import sys
from pathlib import Path

import httpx
import psutil

PATIENCE_S = 240.0


class Running:
    """The cluster as its starter sees it."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        self.arguments = arguments
        self.log = log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "manylora", "cluster", *arguments],
                stdout=subprocess.PIPE, stderr=errors, text=True,
            )  # fmt: skip
        assert self.process.stdout is not None
        said = iter(self.process.stdout.readline, "")
        self.url = next((line.split()[-1].removesuffix("/v1") for line in said if "API" in line), "")
        assert self.url, log.read_text()

    def update(self, *more: str) -> None:
        """Other settings, replica by replica."""
        command = [sys.executable, "-m", "manylora", "cluster", *self.arguments, *more, "--address", "auto"]
        with self.log.open("a") as errors:
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=errors, timeout=PATIENCE_S)

    def replicas(self) -> list[psutil.Process]:
        return [
            process
            for process in psutil.process_iter(["cmdline"])
            if " ".join(process.info["cmdline"] or ()).startswith("ray::ServeReplica:manylora:engine")
        ]

    def end(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.communicate(timeout=90)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
            raise


async def complete(client: httpx.AsyncClient, model: str, num_tokens: int = 4, key: str = "") -> httpx.Response:
    body = {"model": model, "prompt": "The quick brown fox", "max_tokens": num_tokens, "temperature": 0}
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return await client.post("/v1/completions", json={**body, "ignore_eos": True}, headers=headers)
