"""A tiny model behind a real server in this process, for tests of the server and of its page."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import uvicorn

import megakern as mk
from megakern.data.chat import ChatTemplate
from megakern.data.tokenizer import Tokenizer
from megakern.inference import Loaded
from megakern.model.engine import Engine
from megakern.serve.app import Limits, Service
from megakern.serve.server import listen, make_server
from megakern.serve.worker import Worker
from megakern.train.config import RunConfig

SIZES = {"vocab_size": 257, "sequence_length": 512, "init_std": 0.2}


def tiny_loaded(**sizes) -> Loaded:
    """Untrained, with the byte tokenizer; it writes letters only, so that text can be compared and looked at."""
    model = mk.GPT(dataclasses.replace(mk.presets["tiny-llama"], **{**SIZES, **sizes}), seed=4)
    with torch.no_grad():
        kept = torch.zeros(len(model.head.weight), 1)  # logit 0: far below the likeliest of 27 letters
        kept[list(b"abcdefghijklmnopqrstuvwxyz ")], kept[256] = 5.0, 4.0
        model.head.weight *= kept
    tokenizer = Tokenizer.load("bytes")
    config = RunConfig(model=model.config)
    return Loaded(model.eval(), tokenizer, config, Path("none"), torch.device("cpu"), (tokenizer.eod,))


@dataclass(frozen=True)
class Running:
    service: Service
    server: uvicorn.Server
    url: str

    @property
    def pool(self):
        return self.service.worker.engine.pool

    def wait_until_free(self, seconds: float = 10.0) -> None:
        """All pages are back and no text is open."""
        end = time.monotonic() + seconds
        while self.pool.free < self.pool.count or self.service.worker.open:
            assert time.monotonic() < end, (
                f"{self.pool.count - self.pool.free} pages are held, {self.service.worker.open} open"
            )
            time.sleep(0.01)


@contextlib.contextmanager
def serving(
    loaded: Loaded, *, limits: Limits | None = None, token: str | None = None, tokens: int = 8192
) -> Iterator[Running]:
    engine = Engine(loaded.model, tokens=tokens, max_batch=32, prefill_tokens=128)
    limits = limits or Limits()
    worker = Worker(engine, max_jobs=limits.max_requests)
    template = ChatTemplate(special_tokens={"eos_token": loaded.tokenizer.eod_token})
    service = Service(loaded, template, worker, name="tiny", limits=limits)
    server, listener = make_server(service, "127.0.0.1", token), listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server has not started"
        time.sleep(0.01)
    try:
        yield Running(service, server, f"http://127.0.0.1:{listener.getsockname()[1]}")
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()
        assert not thread.is_alive(), "the server has not ended"
