"""Safeguards to switch off one at a time, each with a test that must fail then. See tests/mutation_check.py."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]

PREFILL = "tests/unit/prefill_node/test_prefill_machine.py"
DECODE = "tests/unit/decode_node/test_decode_machine.py"
MESSAGER = "tests/unit/cache_messager/test_messager_faults.py"
ROUTER = "tests/unit/router/test_router_machine.py"


class Mutant(NamedTuple):
    """In ``file``, ``old`` (which it has once) becomes ``new``; then ``test`` must fail."""

    safeguard: str
    file: str
    old: str
    new: str
    test: str

    def applied_to(self, source: str) -> str:
        """Return ``source`` with the safeguard switched off. Raises ValueError unless it has ``old`` once."""
        if source.count(self.old) != 1:
            raise ValueError(f"{self.file} does not have the safeguard {self.safeguard!r} once: adapt the mutant")
        return source.replace(self.old, self.new)


MUTANTS = [
    # ---------------------------------------------------------------- frames
    Mutant(
        "epoch fence",
        "cache_messager/receiver.py",
        "        expectation = self._expectations.get(attempt)\n        if link is None or",
        "        attempts = [e.attempt for e in self._expectations if e.attempt.request_id == frame.request_id]\n"
        "        expectation = self._expectations.get(attempts[0]) if attempts else None\n"
        "        if link is None or",
        f"{MESSAGER}::test_frame_of_an_earlier_epoch_does_not_touch_the_slot_it_aimed_at",
    ),
    Mutant(
        "sender of frames",
        "cache_messager/receiver.py",
        "            or expectation.message.sender not in (None, peer)\n",
        "",
        f"{MESSAGER}::test_frames_of_another_messager_than_the_prefill_nodes_are_not_written",
    ),
    Mutant(
        "digest of payload",
        "cache_messager/links/payload.py",
        "if frame.digest != UNCHECKED and _digest(payload) != frame.digest:",
        "if False:",
        "tests/pair/test_network_faults.py::test_a_damaged_frame_is_a_failed_transfer_and_never_a_wrong_token",
    ),
    Mutant(
        "credit",
        "cache_messager/receiver.py",
        "        if link.unacked_bytes + frame.num_bytes > self._credit_bytes:",
        "        if False:",
        f"{MESSAGER}::test_receiver_takes_no_more_than_its_credit",
    ),
    Mutant(
        "signal buffer",
        "cache_messager/transfers.py",
        "        transfer.pending.append(signal)\n",
        "",
        "tests/unit/cache_messager/test_messager_transfer.py"
        "::test_signals_before_the_reservation_are_kept_and_sent_as_one_frame",
    ),
    Mutant(
        "wait for writes under way",
        "cache_messager/expectations.py",
        "        if expectation.num_writing or expectation.status is ExpectationStatus.ENDED:",
        "        if expectation.status is ExpectationStatus.ENDED:",
        f"{MESSAGER}::test_cancel_waits_for_the_write_under_way",
    ),
    Mutant(
        "wait for reads under way",
        "cache_messager/transfers.py",
        "        if transfer.inflight or transfer.reading:",
        "        if False:",
        f"{MESSAGER}::test_close_waits_for_the_frames_under_way",
    ),
    # ---------------------------------------------------------------- blocks
    Mutant(
        "CLOSING waits for holders",
        "kvrelay/node/endings.py",
        "        if request.holders or request.status is",
        "        if request.status is",
        f"{DECODE}::test_blocks_stay_until_the_messager_says_that_nothing_writes_to_them",
    ),
    Mutant(
        "CLOSING waits for plans in flight",
        "kvrelay/node/endings.py",
        " or request in self._in_flight:\n            return",
        ":\n            return",
        f"{DECODE}::test_blocks_stay_until_the_running_step_is_over",
    ),
    Mutant(
        "the messager is reminded",
        "kvrelay/node/machine.py",
        "        self._endings.remind_messager(self._node.cluster.heartbeat_s)\n",
        "",
        "tests/pair/test_every_message_lost.py::test_one_message_of_a_type_is_lost[KVCancelled]",
    ),
    Mutant(
        "D publishes at the hand-off",
        "decode_node/reservations.py",
        "        request.holders.discard(Holder.MESSAGER)\n        request.mark",
        "        self._publisher.publish_blocks(request, len(request.hashes))\n"
        "        request.holders.discard(Holder.MESSAGER)\n        request.mark",
        "tests/pair/test_failing_sequences.py::test_kv_of_a_failing_step_that_has_arrived_is_shared_with_nobody",
    ),
    Mutant(
        "P publishes what is computed",
        "prefill_node/steps.py",
        "        self._number += 1\n        self._spans",
        "        self._number += 1\n"
        "        for request, chunk in batch:\n"
        "            request.num_computed_tokens = chunk.end\n"
        "            self._admission.publish(request)\n"
        "        self._spans",
        "tests/unit/prefill_node/test_prefill_failures.py"
        "::test_what_the_failing_step_computed_is_not_shared_and_what_earlier_steps_did_is",
    ),
    # ---------------------------------------------------------------- reservations
    Mutant(
        "lease",
        "decode_node/reservations.py",
        "[request for request in receiving if request.lease_until_s <= now]",
        "[request for request in receiving if False]",
        "tests/pair/test_network_faults.py::test_a_reservation_nobody_renews_is_given_up",
    ),
    Mutant(
        "renewal by the sender only",
        "decode_node/reservations.py",
        "            elif request.sender == peer:\n                request.lease_until_s",
        "            else:\n                request.lease_until_s",
        f"{DECODE}::test_nobody_renews_the_lease_of_another",
    ),
    Mutant(
        "partner cancel: P tells D",
        "prefill_node/endings.py",
        "            self._outbox.send(request.target.peer, cancel)\n",
        "            del cancel\n",
        f"{PREFILL}::test_every_order_of_what_can_befall_a_prompt",
    ),
    Mutant(
        "partner cancel: D tells P",
        "decode_node/reservations.py",
        "            self._outbox.send(request.sender, _ended(request.attempt, error.message))\n",
        "            pass\n",
        f"{DECODE}::test_failed_kv_is_told_to_p_and_router_and_never_decoded",
    ),
    Mutant(
        "partner cancel: the router aborts the other node",
        "router/attempts.py",
        "        self.abort_nodes(request, exclude=by)\n        request.avoid",
        "        request.avoid",
        f"{ROUTER}::test_lost_prefill_node_aborts_its_decode_node",
    ),
    Mutant(
        "prefill nodes are introduced",
        "decode_node/reservations.py",
        "        if not self._is_introduced(peer):",
        "        if False:",
        f"{DECODE}::test_only_prefill_nodes_that_a_router_has_named_get_reservations",
    ),
    Mutant(
        "lost PrefillNodes is asked for",
        "decode_node/machine.py",
        "            self._membership.register_again()  # the answer names the prefill nodes\n",
        "",
        "tests/pair/test_network_faults.py::test_a_decode_node_is_not_told_of_a_prefill_node",
    ),
    Mutant(
        "late answers are answered",
        "prefill_node/reservations.py",
        "                self._outbox.send(peer, cancel)\n            return\n",
        "                del cancel\n            return\n",
        f"{PREFILL}::test_a_grant_of_a_request_that_is_over_is_given_back",
    ),
    # ---------------------------------------------------------------- the router
    Mutant(
        "cancel reaches the nodes",
        "router/requests.py",
        "            self._attempts.abort_nodes(request)\n            error = RequestCancelledError",
        "            error = RequestCancelledError",
        f"{ROUTER}::test_cancelled_request_is_aborted_on_both_nodes_at_once_and_ends_with_an_error",
    ),
    Mutant(
        "nodes heed the router's Abort",
        "kvrelay/node/machine.py",
        '                    self._endings.close(request, "aborted")\n',
        "                    pass\n",
        "tests/pair/test_cancelled_requests.py"
        "::test_a_request_is_cancelled_and_nothing_is_left[computed with blocks reserved-operator]",
    ),
    Mutant(
        "a node found again is told what is over",
        "router/machine.py",
        "                self.requests.take_held(peer, attempts)\n",
        "                del attempts\n",
        "tests/pair/test_endings.py::test_a_node_that_was_lost_and_is_found_holds_no_old_attempts",
    ),
    Mutant(
        "deadline",
        "router/request_table.py",
        '        self.set_timer(request, "deadline", self._outbox.now + timeout_s)\n',
        "",
        f"{ROUTER}::test_request_timeout_ends_and_aborts",
    ),
    Mutant(
        "counters are released",
        "router/request_table.py",
        "        request.lifecycle.move(status, self._outbox.now)\n        self._placement.release(request)\n",
        "        request.lifecycle.move(status, self._outbox.now)\n",
        "tests/unit/router/test_router_machine_random.py"
        "::test_every_request_ends_once_with_its_tokens_in_order_and_nothing_is_left",
    ),
    Mutant(
        "tokens of the request's nodes only",
        "router/requests.py",
        "        if peer not in request.participants:",
        "        if False:",
        f"{ROUTER}::test_tokens_of_who_has_no_part_in_the_attempt_are_not_delivered",
    ),
    Mutant(
        "silent nodes are removed together",
        "router/nodes.py",
        '        self._lose_together(silent, f"not heard for {self._peer_timeout_s:g} s")\n',
        '        for peer in silent:\n            self.lose(peer, f"not heard for {self._peer_timeout_s:g} s")\n',
        f"{ROUTER}::test_silent_nodes_are_all_gone_before_their_requests_are_retried",
    ),
    Mutant(
        "missing prefix reports are noticed",
        "router/prefixes.py",
        "        elif message.number != self._number:",
        "        elif False:",
        "tests/pair/test_routing_by_prefixes.py::test_a_report_is_lost_or_comes_twice",
    ),
    # ---------------------------------------------------------------- processes and doors
    Mutant(
        "an own pause is nobody's silence",
        "kvrelay/machine/liveness.py",
        "            if num_pauses < MAX_PAUSES:",
        "            if False:",
        "tests/pair/test_endings.py::test_a_process_that_stopped_blames_nobody_else",
    ),
    Mutant(
        "ROUTER_HANDOVER",
        "kvrelay/runtime/transport.py",
        "        self._router.setsockopt(zmq.ROUTER_HANDOVER, 1)\n",
        "",
        "tests/unit/runtime/test_transport.py"
        "::test_a_peer_that_reconnects_before_its_old_connection_is_seen_to_end_takes_its_place",
    ),
    Mutant(
        "key check",
        "kvrelay/runtime/authenticator.py",
        ' if mechanism == b"CURVE" and credentials else None\n',
        ' if mechanism == b"CURVE" and credentials else None\n            name = name or "p0"\n',
        "tests/unit/runtime/test_keys.py::test_nothing_is_heard_from_who_has_no_key_or_an_unknown_one",
    ),
    Mutant(
        "operators' key",
        "router/http/operators.py",
        "        if hmac.compare_digest(_digest(key), self._digest):",
        "        if True:",
        "tests/unit/router/test_operators.py::test_without_the_key_nobody_is_let_in",
    ),
    Mutant(
        "digest of stored KV",
        "kvstore/storage/block_format.py",
        "    digest.update(value[HEADER_BYTES:].data)\n",
        "",
        "tests/storage/test_block_format.py::test_every_single_byte_counts",
    ),
    # ---------------------------------------------------------------- what strangers and files may cost
    Mutant(
        "one log line a minute for each client that sends no HTTP",
        "router/http/protocol.py",
        "if self._limits.log_limit.permits(host, self.loop.time()):",
        "if True:",
        "tests/unit/router/test_http_limits.py::test_what_is_no_http_is_logged_once_a_minute_for_each_client",
    ),
    Mutant(
        "number of values in a config",
        "kvrelay/config/document.py",
        "if _num_values(root, {}) > _MAX_VALUES:",
        "if False:",
        "tests/unit/test_every_decoder.py::test_inputs_that_were_found_are_accepted_or_refused",
    ),
]
