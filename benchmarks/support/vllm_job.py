"""Runs in vLLM's environment: greedy outputs of prompts, and its log probabilities along outputs that are given.

Usage: python vllm_job.py JOB RESULT, both JSON. The job: ``model``, ``dtype``, ``max_model_len``, ``prompts`` and
``forced`` (token ids, as many lists of each), ``num_tokens`` to generate, ``num_logprobs`` to report. The result:
``outputs`` (token ids) and ``logprobs``: for each prompt and each of its forced tokens, the most likely tokens there.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    from vllm import LLM, SamplingParams  # noqa: PLC0415  # the engine's process imports this file too

    job = json.loads(Path(sys.argv[1]).read_text())
    llm = LLM(
        model=job["model"],
        dtype=job["dtype"],
        max_model_len=job["max_model_len"],
        max_logprobs=job["num_logprobs"],
        enable_prefix_caching=False,
        max_num_seqs=64,
        seed=0,
    )
    greedy = SamplingParams(temperature=0.0, max_tokens=job["num_tokens"], ignore_eos=True, detokenize=False)
    generated = llm.generate([{"prompt_token_ids": prompt} for prompt in job["prompts"]], greedy, use_tqdm=False)
    along = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=job["num_logprobs"], detokenize=False)
    pairs = list(zip(job["prompts"], job["forced"], strict=True))
    forced = llm.generate([{"prompt_token_ids": prompt + tokens} for prompt, tokens in pairs], along, use_tqdm=False)
    result = {
        "outputs": [list(one.outputs[0].token_ids) for one in generated],
        "logprobs": [
            [_plain(place) for place in one.prompt_logprobs[len(prompt) :]]
            for one, (prompt, _) in zip(forced, pairs, strict=True)
        ],
    }
    Path(sys.argv[2]).write_text(json.dumps(result))


def _plain(place: dict[int, Any]) -> dict[int, float]:
    return {token: entry.logprob for token, entry in place.items()}


if __name__ == "__main__":
    main()
