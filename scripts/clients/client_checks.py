"""What the checks of Python clients share: the cluster's URL, a question, and the router's counters."""

from __future__ import annotations

import os
import re
import urllib.request

URL = os.environ["URL"]
BASE_URL = URL + "/v1"
QUESTION = "The red key lies in box 417. Where is the red key?"
ANSWER = "The red key lies in box 417."
MESSAGES = [{"role": "user", "content": QUESTION}]


def ok(check: str) -> None:
    """Print the line of a check that has passed."""
    print("ok:", check, flush=True)


def equal(name: str, found: object, wanted: object) -> None:
    """End the program with status 1 unless both are equal."""
    if found != wanted:
        raise SystemExit(f"{name}: {found!r} instead of {wanted!r}")


def counter(name: str) -> int:
    """Return the sum of all series of a counter of the router's ``/metrics``."""
    with urllib.request.urlopen(URL + "/metrics") as answer:
        text = answer.read().decode()
    found = re.findall(rf"^{re.escape(name)}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE)
    if not found:
        raise ValueError(f"/metrics has no {name}")
    return round(sum(map(float, found)))


class ServerTokens:
    """Counts the prompt and output tokens of the requests since it was made, as the router counts them."""

    def __init__(self) -> None:
        self._before = self._now()

    @staticmethod
    def _now() -> tuple[int, int]:
        return counter("vllm:prompt_tokens_total"), counter("vllm:generation_tokens_total")

    def since(self) -> tuple[int, int]:
        """Return (prompt tokens, output tokens)."""
        prompt, output = self._now()
        return prompt - self._before[0], output - self._before[1]
