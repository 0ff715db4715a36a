"""Two workers and one machine: who gets what, what is counted together, and what a worker's death costs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
from fake_nodes import Script, until
from two_workers import FakeWorker, TwoWorkers, two_workers

from kvrelay.protocol.ids import RequestId
from kvrelay.protocol.request import SamplingParams
from router.events import ClientGone, Deliver, NewRequest, RequestErrored, StopMatched
from router.workers.messages import Stop, Submission, ToWorker

BODY = {"prompt": "Hello", "max_tokens": 8, "seed": 0}
UNCHANGED = (("/v1/models", None), ("/openapi.json", None))
CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 6, "seed": 0}


def run(check: Callable[[TwoWorkers], Awaitable[None]], script: Script | None = None, **router: object) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60), two_workers(script, **router) as workers:
            await check(workers)

    asyncio.run(bounded())


async def complete(worker: FakeWorker, key: str = "", **fields: object) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return await worker.client.post("/v1/completions", json=BODY | fields, headers=headers)


def without_ids(answer: httpx.Response) -> dict[str, object]:
    assert answer.status_code == 200, answer.text
    return {name: value for name, value in answer.json().items() if name not in ("id", "created")}


def test_workers_answer_as_a_router_without_workers() -> None:
    async def check(workers: TwoWorkers) -> None:
        for path, body in (("/v1/completions", BODY), ("/v1/chat/completions", CHAT), *UNCHANGED):
            answers = [
                await client.request("GET" if body is None else "POST", path, json=body)
                for client in (workers.router.client, workers.a.client, workers.b.client)
            ]
            expected, *given = map(without_ids, answers)
            assert given == [expected] * 2
        streams = [
            (await client.post("/v1/completions", json=BODY | {"stream": True})).text
            for client in (workers.router.client, workers.a.client)
        ]
        expected_text, text = (
            "".join(json.loads(line[6:])["choices"][0]["text"] for line in stream.splitlines() if '"text"' in line)
            for stream in streams
        )
        assert text == expected_text

    run(check)


def test_deliveries_go_to_the_worker_that_submitted() -> None:
    async def check(workers: TwoWorkers) -> None:
        given = await asyncio.gather(
            *(complete(worker, max_tokens=3 + number % 5) for number in range(20) for worker in (workers.a, workers.b))
        )
        expected = [3 + number % 5 for number in range(20) for _ in "ab"]
        assert [answer.json()["usage"]["completion_tokens"] for answer in given] == expected
        assert workers.a.link.num_requests == workers.b.link.num_requests == 0

    run(check, Script(pace_s=0.001))


def test_a_stop_string_ends_the_request_at_the_nodes() -> None:
    async def check(workers: TwoWorkers) -> None:
        whole = (await complete(workers.a, max_tokens=20)).json()["choices"][0]["text"]
        stopped = (await complete(workers.a, max_tokens=400, stop=[whole[4:7]])).json()["choices"][0]
        assert (stopped["text"], stopped["finish_reason"]) == (whole[:4], "stop")

    run(check, Script(pace_s=0.001))


def test_the_death_of_a_worker_ends_its_requests_and_no_others() -> None:
    async def check(workers: TwoWorkers) -> None:
        machine = workers.router.service.machine
        lost = [asyncio.create_task(complete(workers.a, max_tokens=400)) for _ in range(3)]
        kept = asyncio.create_task(complete(workers.b, max_tokens=100))
        await until(lambda: len(machine.requests) == 4)
        await workers.a.die()
        await until(lambda: len(machine.requests) <= 1)
        assert (await kept).json()["usage"]["completion_tokens"] == 100
        assert machine.counters["aborted"] == 3
        for task in lost:
            task.cancel()
        await asyncio.gather(*lost, return_exceptions=True)

    run(check, Script(pace_s=0.002))


def test_a_worker_cannot_end_the_requests_of_another() -> None:
    async def check(workers: TwoWorkers) -> None:
        asked = asyncio.create_task(
            workers.a.client.post("/v1/completions", json=BODY | {"max_tokens": 50}, headers={"X-Request-Id": "mine"})
        )
        await until(lambda: workers.a.link.num_requests)
        for kind in (ClientGone, StopMatched):
            workers.b.link.receive(kind(RequestId("cmpl-mine")))
        assert (await asked).json()["usage"]["completion_tokens"] == 50

    run(check, Script(pace_s=0.002))


def test_a_name_that_a_request_at_another_worker_has_is_not_used_twice() -> None:
    async def check(workers: TwoWorkers) -> None:
        headers = {"X-Request-Id": "mine"}
        first = asyncio.create_task(workers.a.client.post("/v1/completions", json=BODY, headers=headers))
        await until(lambda: workers.a.link.num_requests)
        second = await workers.b.client.post("/v1/completions", json=BODY, headers=headers)
        assert (await first).json()["id"] == "cmpl-mine"
        assert second.status_code == 200
        assert second.json()["id"] != "cmpl-mine"

    run(check, Script(pace_s=0.01))


def test_of_two_requests_that_take_one_name_at_once_the_second_is_refused() -> None:
    async def check(workers: TwoWorkers) -> None:
        at_b: list[ToWorker] = []
        workers.b.link._send = at_b.append
        first = asyncio.create_task(
            workers.a.client.post("/v1/completions", json=BODY, headers={"X-Request-Id": "mine"})
        )
        await until(lambda: workers.a.link.num_requests)
        same = NewRequest(RequestId("cmpl-mine"), [1], SamplingParams(max_tokens=1, seed=0))
        workers.b.link.receive(Submission([same]))
        (refusal,) = at_b
        assert isinstance(refusal, Deliver)
        assert isinstance(refusal.delivery, RequestErrored)
        assert refusal.delivery.param == "X-Request-Id"
        assert (await first).status_code == 200

    run(check, Script(pace_s=0.01))


def test_the_limit_of_requests_holds_over_all_workers() -> None:
    async def check(workers: TwoWorkers) -> None:
        running = asyncio.create_task(complete(workers.a, max_tokens=400))
        await until(lambda: len(workers.router.service.machine.requests) == 1)
        refused = await complete(workers.b)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert (await running).status_code == 200

    run(check, Script(pace_s=0.001), max_queued_requests=1)


def test_the_limits_of_a_key_hold_over_all_workers(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("alice sk-alice requests=1\nbob sk-bob tokens_per_minute=20\ncarol sk-carol\n")
    path.chmod(0o600)

    async def check(workers: TwoWorkers) -> None:
        running = asyncio.create_task(complete(workers.a, "sk-alice", max_tokens=400))
        await until(lambda: workers.a.link.num_requests)
        refused = await complete(workers.b, "sk-alice")
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        await workers.a.die()  # its uses end
        running.cancel()
        assert (await complete(workers.b, "sk-alice")).status_code == 200

        spent = await complete(workers.b, "sk-bob", max_tokens=20)
        assert spent.headers["x-ratelimit-limit-tokens"] == "20"
        refused = await complete(workers.b, "sk-bob")
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert (await complete(workers.b, "sk-carol")).status_code == 200
        assert (await complete(workers.b, "sk-wrong")).status_code == 401
        await asyncio.gather(running, return_exceptions=True)

    run(check, Script(pace_s=0.002), api_keys_file=str(path))


def test_metrics_are_those_of_all_workers() -> None:
    async def check(workers: TwoWorkers) -> None:
        for worker, count in ((workers.a, 2), (workers.b, 3)):
            for _ in range(count):
                assert (await complete(worker)).status_code == 200
        assert (await complete(workers.a, max_tokens=-1)).status_code == 400
        for worker in (workers.a, workers.b, workers.a):  # to read them does not change them
            lines = (await worker.client.get("/metrics")).text.splitlines()
            assert 'kvrelay_requests_total{api="completions",outcome="ok"} 5.0' in lines
            assert 'kvrelay_requests_total{api="completions",outcome="invalid_request_error"} 1.0' in lines
            assert "kvrelay_output_tokens_total 40.0" in lines
            assert "kvrelay_ttft_seconds_count 5.0" in lines
            (ended,) = [line for line in lines if line.startswith("vllm:request_success_total") and "length" in line]
            assert ended.endswith(" 5.0")

    run(check)


def test_what_the_machine_knows_is_asked() -> None:
    async def check(workers: TwoWorkers) -> None:
        name = (await complete(workers.a)).json()["id"]
        for worker in (workers.a, workers.b):
            assert (await worker.client.get("/ready")).json() == {"status": "ready"}
            assert (await worker.client.get("/load")).json() == {"server_load": 0}
            assert len((await worker.client.get("/cluster")).json()["nodes"]) == 2
            timeline = await worker.client.get(f"/cluster/requests/{name}")
            assert timeline.json()["request_id"] == name
            assert (await worker.client.get("/cluster/requests/é?x=1")).status_code == 404

    run(check)


def test_an_operator_cancels_a_request_of_a_worker() -> None:
    async def check(workers: TwoWorkers) -> None:
        asked = asyncio.create_task(complete(workers.a, max_tokens=400))
        machine = workers.router.service.machine
        await until(lambda: len(machine.requests) == 1)
        (request_id,) = workers.a.link._requests
        workers.router.service.cancel(request_id)
        answer = await asked
        assert (answer.status_code, answer.json()["error"]["code"]) == (410, "request_cancelled")

    run(check, Script(pace_s=0.002))


def test_a_router_that_ends_ends_the_requests_of_its_workers() -> None:
    async def check(workers: TwoWorkers) -> None:
        asked = asyncio.create_task(complete(workers.a, max_tokens=400))
        await until(lambda: len(workers.router.service.machine.requests) == 1)
        workers.router.service.stop()
        late = asyncio.create_task(complete(workers.b, max_tokens=400))
        workers.router.service.stop()
        for one in await asyncio.gather(asked, late):
            assert (one.status_code, one.json()["error"]["code"]) == (503, "no_node_available")

    run(check, Script(pace_s=0.002))


def test_a_worker_that_is_stopped_before_it_serves_does_not_wait() -> None:
    async def check(workers: TwoWorkers) -> None:
        workers.a.link._send(Stop())
        await asyncio.gather(workers.a.service.serving.wait(), workers.a.service.stopping.wait())

    run(check)


def test_metrics_do_not_wait_for_a_worker_that_is_starting() -> None:
    async def check(workers: TwoWorkers) -> None:
        workers.b.link.ready.clear()
        sent: list[ToWorker] = []
        workers.b.link._send = sent.append
        assert (await workers.a.client.get("/metrics")).status_code == 200
        assert not sent

    run(check)
