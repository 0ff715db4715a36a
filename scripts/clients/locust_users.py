"""The users of ``locust``: each asks 25 times, whole and streamed in turn; the tokens are printed at the end."""

# mypy: ignore-errors

import json

from client_checks import ANSWER, MESSAGES
from locust import HttpUser, events, task
from locust.exception import StopUser

USERS, ASKS = 8, 25
BODY = {"model": "demo", "messages": MESSAGES, "temperature": 0}
tokens = {"prompt_tokens": 0, "completion_tokens": 0}
finished = []


def count(usage: dict) -> None:
    """Add the usage of one answer."""
    for name in tokens:
        tokens[name] += usage[name]


class Asker(HttpUser):
    """Asks the same question, whole and streamed in turn."""

    def on_start(self) -> None:
        """Begin to count."""
        self.asked = 0

    @task
    def ask(self) -> None:
        """Ask once; stop after the last time, and end the test with the last user."""
        if self.asked == ASKS:
            finished.append(self)
            if len(finished) == USERS:
                self.environment.runner.quit()
            raise StopUser
        self.asked += 1
        streamed = self.asked % 2 == 0
        body = {**BODY, **({"stream": True, "stream_options": {"include_usage": True}} if streamed else {})}
        name = "streamed" if streamed else "whole"
        with self.client.post("/v1/chat/completions", json=body, name=name, catch_response=True) as answer:
            if streamed:
                lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
                parts = [json.loads(line) for line in lines]
                text = "".join(part["choices"][0]["delta"].get("content") or "" for part in parts if part["choices"])
                count(parts[-1]["usage"])
            else:
                text = answer.json()["choices"][0]["message"]["content"]
                count(answer.json()["usage"])
            if text != ANSWER:
                answer.failure(f"{text!r}")


@events.quitting.add_listener
def tell(**_: object) -> None:
    """Print the tokens."""
    print("tokens", tokens["prompt_tokens"], tokens["completion_tokens"], flush=True)
