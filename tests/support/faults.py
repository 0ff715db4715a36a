"""The faults that this cluster must survive, and the tests of each: those with the marker ``fault``.

Each of them happened in production to some server with prefill/decode disaggregation.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]

FAULTS = {
    "F01": "a client leaves while P still sends; D gives the blocks to another request",
    "F02": "a client leaves, then P dies: D's blocks come back within the lease",
    "F03": "D or the router refuses a request early: P frees its blocks at once",
    "F04": "`n` > 1 and several prompts: every choice ends and is released",
    "F05": "D's reservation outlives its lease while P renews it, and ends when nobody does",
    "F06": "a late message for an ended request is answered at once",
    "F07": "30 % of the prefills fail: D's slots are soon free again",
    "F08": "a request is cancelled at each boundary of its phases: both nodes give everything back",
    "F09": "a process stands still (SIGSTOP) until queues are full, and goes on",
    "F10": "preemption every three steps: tokens, logprobs, seeds, stops and penalties are equal",
    "F11": "running and reserved requests outgrow the pool together",
    "F12": "many chunked prompts share staging memory and credit for one or two of them",
    "F13": "P, D or the router is killed and starts again, at the same address or another",
    "F14": "a slot or an id is used again while a slow link still carries frames of its last use",
    "F15": "arrived KV, hand-off, abort, lost peer and end of the lease come in every order",
    "F16": "one message of a type is lost, whichever type it is",
    "F17": "edge cases of requests give the answer of a mixed node, field by field",
    "F18": "the router's counters return to 0 after any order of failures",
    "F19": "a node loses blocks of its prefix cache, or all: routing forgets them",
    "F20": "P and D drain under load: no request fails",
    "F21": "P computes a long chunk: the end of a transfer is noticed meanwhile",
    "F22": "the store promised blocks and misses them, or is slow, incomplete, corrupt or full",
    "F23": "P fails a request: D never decodes from its empty blocks",
    "F24": "layers are signalled before the reservation, after the slot is used again, or out of step",
    "F25": "the model's text contains `data: [DONE]`, newlines, halves of characters",
    "F26": "2,000 mixed requests: a fixed probe is answered the same each time, memory stays flat",
    "F27": "a peer of another geometry, block size, type or protocol version is refused when it registers",
    "F28": "garbage, forged names and replayed frames on every socket",
    "F29": "two processes hash a prompt alike",
    "F30": "Redis is lost and comes back: serving goes on, cache and registry recover",
}

LEVELS = {
    "unit": "one machine",
    "pair": "simulated cluster",
    "cluster": "real processes",
    "e2e": "real processes, real model",
    "storage": "real stores",
    "registry": "real Redis",
    "protocol": "bytes",
}
"""What the tests of each folder run."""


def marked_tests() -> dict[str, list[tuple[str, str]]]:
    """Return the tests of each fault as (file below tests, function), sorted."""
    found: dict[str, list[tuple[str, str]]] = {fault: [] for fault in FAULTS}
    for path in sorted(TESTS.rglob("test_*.py")):
        for function, faults in _marked(ast.parse(path.read_text())):
            for fault in sorted(faults):
                found.setdefault(fault, []).append((path.relative_to(TESTS).as_posix(), function))
    return found


def _marked(module: ast.Module) -> Iterator[tuple[str, set[str]]]:
    """Yield each test function of a module with its faults, those of the module included."""
    of_module: set[str] = set()
    for node in module.body:
        if isinstance(node, ast.Assign) and any(getattr(name, "id", "") == "pytestmark" for name in node.targets):
            of_module |= _faults(node.value)
    for item in ast.walk(module):
        if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef) and item.name.startswith("test_"):
            faults = of_module.union(*map(_faults, item.decorator_list))
            if faults:
                yield item.name, faults


def _faults(marks: ast.expr) -> set[str]:
    """Return the arguments of every ``pytest.mark.fault(...)`` in ``marks``."""
    return {
        argument.value
        for call in ast.walk(marks)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "fault"
        for argument in call.args
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str)
    }
