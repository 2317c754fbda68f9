"""Generation at batch 1, greedy, with a cache of keys and values: megakern beside transformers, in tokens a second.

    python -m benchmarks.bench_generate [--seconds N] [--quick] [--json FILE]

The same GPT-2 124M with the same random weights; each contestant is a process with all cores, and they take turns. In
fp32 all must choose the same tokens; bf16 rounds, so there the table says how many are those of the first contestant.
A token needs every weight once, so no program is faster than those can be read: in each turn PyTorch's dot product of
a vector that no cache holds, with itself, tells how fast that is.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import torch

import megakern as mk
from benchmarks import report, steps
from benchmarks.bench_train import gpt2, mk_parameters
from benchmarks.common import begin_part, end_part, part_parser
from benchmarks.contestants import Contestant, FailedError, NotHereError, goal, ratio_to
from benchmarks.peers.libraries import why_not
from megakern.train import machine

CONTESTANTS = ("transformers fp32", "transformers bf16", "megakern fp32", "megakern bf16")
GOALS = (
    ("fp32 beside transformers' fp32", "megakern fp32", ("transformers fp32",), 2.0),
    ("bf16 beside transformers' best", "megakern bf16", ("transformers fp32", "transformers bf16"), 2.0),
)
PROMPT, TOKENS, QUICK_TOKENS = 32, 64, 16
READ = 1 << 26  # elements of the vector that is read, fp32


def weights(config: mk.GPTConfig, device: torch.device) -> dict[str, torch.Tensor]:
    """Initial weights, those of the blocks larger: else a tied head says the last token again, for ever."""
    plain = steps.plain_weights(config, device)
    return {name: value * 8 if "blocks" in name and value.ndim == 2 else value for name, value in plain.items()}


class Generation:
    """One contestant, in its process. `setting` is the model's GPTConfig."""

    def __init__(self, name: str, setting: mk.GPTConfig) -> None:
        torch.set_num_threads(machine.cores())
        machine.keep_freed_memory()
        maker, _, precision = name.partition(" ")
        self.device, self.dtype = torch.device(machine.device_type()), machine.DTYPES[precision]
        self.prompt = torch.randint(
            0, setting.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(1)
        ).to(self.device)  # fmt: skip
        self.generate = {"transformers": self._transformers, "megakern": self._megakern}[maker](setting)

    def _transformers(self, config: mk.GPTConfig):
        if reason := why_not("transformers", self.device.type):
            raise NotHereError(reason)
        from benchmarks.peers import hugging_face

        model = hugging_face.model_of(config, self.device, weights(config, self.device)).to(self.dtype).eval()
        mask = torch.ones_like(self.prompt)

        def generate(count: int) -> list[int]:
            with torch.inference_mode():
                ids = model.generate(
                    self.prompt, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False,
                    use_cache=True, pad_token_id=0,
                )  # fmt: skip
            return ids[0, PROMPT:].tolist()

        return generate

    def _megakern(self, config: mk.GPTConfig):
        from megakern.model.generate import complete

        model = mk.GPT(config, device=self.device, dtype=self.dtype, compute_dtype=self.dtype).eval()
        steps.copy_weights(model, steps.from_plain(weights(config, self.device), config))
        prompts = self.prompt.tolist()
        return lambda count: complete(model, prompts, max_new_tokens=count)[0].tokens

    def run(self, count: int) -> tuple[float, list[int]]:
        """-> seconds and the tokens; they have been read, so the device is done."""
        start = time.perf_counter()
        tokens = self.generate(count)
        return time.perf_counter() - start, tokens

    def peak_bytes(self) -> int:
        return machine.peak_memory(self.device)


def read_rate(vector: torch.Tensor) -> float:
    """Bytes a second."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        torch.dot(vector, vector).item()
        seconds.append(time.perf_counter() - start)
    return vector.nbytes / min(seconds)


def bytes_a_token(name: str, config: mk.GPTConfig) -> int:
    """Of weights that contestant `name` reads: all but the positions' embedding, of which it is one row."""
    precision = name.partition(" ")[2]
    return (mk_parameters(config) - config.sequence_length * config.width) * machine.DTYPES[precision].itemsize


def with_limit(reached: dict[str, Any], ours: dict[str, Any], rate: float) -> dict[str, Any]:
    """A goal as it is, or with what limits it, where weights cannot be read fast enough for it."""
    most = reached["reached"] / ours["of_read_rate"]
    if most >= reached["wanted"]:
        return reached
    read = f"{report.size(ours['bytes_a_token'])} of weights a token at {report.size(rate)}/s"
    return {**reached, "limit": f"at most {most:.2f}: {read}"}


def measure(config: mk.GPTConfig, count: int, deadline: float) -> dict[str, Any]:
    """Results as generate.json keeps them. Seconds a token are those of `count` tokens less those of the first."""
    contestants = [Contestant(Generation, name, config) for name in CONTESTANTS]
    rows: dict[str, dict[str, Any]] = {}
    ready, expected = [], None
    try:
        for contestant in contestants:
            row = rows[contestant.name] = {"contestant": contestant.name}
            try:
                _, tokens = contestant.call("run", count)
                expected = expected or tokens
                row["same_tokens"] = sum(a == b for a, b in zip(tokens, expected, strict=True))
                if "fp32" in contestant.name and tokens != expected:
                    at = next(i for i, (a, b) in enumerate(zip(tokens, expected, strict=True)) if a != b)
                    row["error"] = f"token {at} is {tokens[at]}, the first contestant has {expected[at]}"
                    continue
                ready.append(contestant)
            except NotHereError as reason:
                row["missing"] = str(reason)
            except FailedError as error:
                row["error"] = str(error)
        turns: dict[str, list[tuple[float, float]]] = {contestant.name: [] for contestant in ready}
        vector, rates = torch.ones(READ, device=machine.device_type()), []
        while ready and (not turns[ready[0].name] or time.monotonic() < deadline):
            rates.append(read_rate(vector))
            for contestant in ready:
                first = contestant.call("run", 1)[0]
                turns[contestant.name].append((first, (contestant.call("run", count)[0] - first) / (count - 1)))
            if len(turns[ready[0].name]) >= 9:
                break
        rate = statistics.median(rates) if rates else None
        for contestant in ready:
            own = [each for _, each in turns[contestant.name]]
            read = bytes_a_token(contestant.name, config)
            rows[contestant.name] |= {
                "tokens_per_second": 1 / statistics.median(own),
                "fastest": 1 / min(own),
                "slowest": 1 / max(own),
                "ms_to_first": statistics.median(first for first, _ in turns[contestant.name]) * 1e3,
                "ratio_to_first": ratio_to([each for _, each in turns[ready[0].name]], own),
                "tokens": count,
                "bytes_a_token": read,
                "of_read_rate": read / statistics.median(own) / rate,
                "peak_bytes": contestant.call("peak_bytes"),
            }
    finally:
        for contestant in contestants:
            contestant.end()
    found = [(goal(list(rows.values()), *each, "tokens_per_second"), rows[each[1]]) for each in GOALS]
    goals = [with_limit(reached, ours, rate) for reached, ours in found if reached]
    return {"model": "GPT-2 124M", "prompt": PROMPT, "read_rate": rate, "rows": list(rows.values()), "goals": goals}


def main(arguments: list[str] | None = None) -> int:
    less = f"{QUICK_TOKENS} tokens instead of {TOKENS}"
    parser = part_parser(__doc__, seconds=70.0, until="no turn begins after that, but the first", quick=less)
    options = begin_part(parser, arguments)
    results = measure(gpt2("gpt2-124m"), QUICK_TOKENS if options.quick else TOKENS, options.deadline)
    end_part(options, results, report.generate_table)
    return 1 if report.failures(results["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
