"""`megakern serve`: a run behind OpenAI's API. Loopback only, unless a token guards it."""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
from pathlib import Path

import torch
import uvicorn

from megakern.config import ConfigError, require
from megakern.data.chat import ChatTemplate
from megakern.inference import Loaded
from megakern.model.cache import PagePool
from megakern.serve.app import Limits, Service, create_app
from megakern.serve.guard import LOCAL_HOSTS
from megakern.serve.worker import Worker

SHUTDOWN_SECONDS = 10  # that open answers get to end
SHORTEST_TOKEN = 16  # characters


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_token(path: Path | None) -> str | None:
    """Raises ConfigError."""
    if path is None:
        return None
    try:
        token = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--token-file {path}: cannot be read as ASCII text: {error}") from error
    require(
        len(token) >= SHORTEST_TOKEN and token.isprintable() and " " not in token,
        f"--token-file {path}: a token must have {SHORTEST_TOKEN} characters or more and no spaces, got {len(token)}; "
        f"make one with: openssl rand -hex 24 > {path}",
    )
    return token


def cache_tokens(loaded: Loaded, max_batch: int) -> int:
    """As many as `max_batch` texts of full length need, or as fit in 80 % of a GPU's free memory, 25 % of a CPU's."""
    each = PagePool.bytes_per_token(loaded.config.model, loaded.model.parallel, loaded.model.compute_dtype)
    if loaded.device.type == "cuda":
        memory = int(0.8 * torch.cuda.mem_get_info(loaded.device)[0])
    else:
        memory = _available_memory() // 4
    return max(1, min(max_batch * loaded.config.model.sequence_length, memory // each))


def _available_memory() -> int:
    """Bytes: what is free on Linux, half of all elsewhere."""
    path = Path("/proc/meminfo")
    lines = path.read_text().splitlines() if path.exists() else []
    found = next((line for line in lines if line.startswith("MemAvailable:")), None)
    if found is not None:
        return int(found.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def listen(host: str, port: int) -> socket.socket:
    """Raises ConfigError."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=512)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"cannot listen at {host}, port {port}: {error}; choose others: --host, --port") from error


def check_address(host: str, token: str | None) -> None:
    """Raises ConfigError for a server that others could reach and nothing guards."""
    require(
        is_loopback(host) or token is not None,
        f"--host {host} can be reached from other machines: guard it with --token-file FILE, or take 127.0.0.1",
    )


def serve(
    loaded: Loaded,
    template: ChatTemplate,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    name: str,
    limits: Limits,
    max_batch: int = 64,
    tokens: int | None = None,
    prefill_tokens: int = 512,
) -> int:
    """Serve the model until a signal ends it; returns the exit code. Raises ConfigError."""
    check_address(host, token)
    with listen(host, port) as listener:
        tokens = cache_tokens(loaded, max_batch) if tokens is None else tokens
        engine = loaded.engine(tokens=tokens, max_batch=max_batch, prefill_tokens=prefill_tokens)
        service = Service(loaded, template, Worker(engine, max_jobs=limits.max_requests), name=name, limits=limits)
        server = make_server(service, host, token)
        shown = f"[{host}]" if ":" in host else host
        print(f"{name} at http://{shown}:{listener.getsockname()[1]}, cache of {tokens:,} tokens", flush=True)
        return _run_until_signal(server, listener)


def _run_until_signal(server: uvicorn.Server, listener: socket.socket) -> int:
    """0, or 128 + n after signal n. uvicorn lets open answers end, and then raises the signal again for us to see."""
    seen = [0]

    def note(number: int, _frame) -> None:
        seen[0] = 128 + number

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.run(sockets=[listener])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return seen[0]


def make_server(service: Service, host: str, token: str | None) -> uvicorn.Server:
    guarded = None if token is not None else tuple(dict.fromkeys((*LOCAL_HOSTS, host)))
    config = uvicorn.Config(
        create_app(service, token=token, hosts=guarded),
        http="h11",
        ws="none",
        loop="asyncio",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        backlog=512,
        # Connections that wait for nothing cost little; those of answers are bounded by the worker.
        limit_concurrency=4 * service.limits.max_requests + 64,
    )
    return uvicorn.Server(config)
