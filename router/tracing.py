"""OpenTelemetry traces: a span for each HTTP request that generates, and one for each phase of its requests.

Off unless ``router.otlp_endpoint`` is set; then nothing of this module is imported. The spans of all processes are made
here, from the timelines that the nodes report, and are sent by a thread of the OpenTelemetry library.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeAlias

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvrelay.protocol.ids import ROUTER, RequestId
from kvrelay.protocol.phases import phases
from router.http.request_span import SPAN

TimelineOf: TypeAlias = Callable[[RequestId], Awaitable[dict[str, Any] | None]]

SETTLE_S = 2.0
"""Seconds after its end until the phases of a request are sent: nodes report when its blocks are free."""

_NS_PER_S = 1_000_000_000


class Tracing:
    """Makes and sends spans. Of a trace without a parent a share of ``sample_ratio`` is sampled.

    ``timeline_of`` returns the timeline of a request in progress or recently ended, if it is kept.
    """

    def __init__(self, timeline_of: TimelineOf, endpoint: str, sample_ratio: float) -> None:
        self._timeline_of = timeline_of
        self._processor = BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint))
        self._sampler = ParentBased(TraceIdRatioBased(sample_ratio))
        self._tracers: dict[str, Any] = {}
        self._pending: dict[asyncio.TimerHandle, tuple[Any, Sequence[RequestId]]] = {}
        self._sending: set[asyncio.Task[None]] = set()

    def tracer(self, node: str) -> Any:
        """Return the tracer whose spans are those of the process ``node``."""
        if node not in self._tracers:
            resource = Resource.create({"service.name": "kvrelay", "service.instance.id": node})
            provider = TracerProvider(sampler=self._sampler, resource=resource, shutdown_on_exit=False)
            provider.add_span_processor(self._processor)
            self._tracers[node] = provider.get_tracer("kvrelay")
        return self._tracers[node]

    def ended(self, context: Any, request_ids: Sequence[RequestId]) -> None:
        """Send the phases of ``request_ids`` below the span of ``context`` when the nodes have reported them."""
        handle = asyncio.get_running_loop().call_later(SETTLE_S, self._begin_to_send, context, request_ids)
        for fired in [pending for pending in self._pending if pending.when() < handle.when() - SETTLE_S]:
            del self._pending[fired]
        self._pending[handle] = context, request_ids

    def _begin_to_send(self, context: Any, request_ids: Sequence[RequestId]) -> None:
        task = asyncio.get_running_loop().create_task(self._send_phases(context, request_ids))
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    async def _send_phases(self, context: Any, request_ids: Sequence[RequestId]) -> None:
        for request_id in request_ids:
            timeline = await self._timeline_of(request_id)
            if timeline is not None:
                self._send(timeline, context)

    def _send(self, timeline: dict[str, Any], context: Any) -> None:
        attributes = {"kvrelay.request_id": str(timeline["request_id"])}
        parent = context
        for phase in phases(timeline):
            tracer = self.tracer(phase.node)
            start_ns, end_ns = int(phase.start_s * _NS_PER_S), int(max(phase.start_s, phase.end_s) * _NS_PER_S)
            span = tracer.start_span(phase.name, parent, attributes=attributes, start_time=start_ns)
            if phase.node == ROUTER and phase.name == "request":  # the first, which contains the others
                span.set_attribute("kvrelay.kv_bytes_moved", timeline["kv_bytes_moved"])
                parent = trace.set_span_in_context(span, context)
            span.end(end_ns)

    def traced(self, app: ASGIApp) -> ASGIApp:
        """Return ``app`` with spans."""
        return Traced(app, self)

    async def close(self) -> None:
        """Send what is left. Takes as long as the collector takes to answer, but only some seconds."""
        for handle, (context, request_ids) in self._pending.items():
            if not handle.cancelled() and handle.when() > asyncio.get_running_loop().time():
                handle.cancel()
                self._begin_to_send(context, request_ids)
        if self._sending:
            await asyncio.wait(self._sending)
        await asyncio.to_thread(self._processor.shutdown)


class Traced:
    """Serves ``app`` with a span for each request, whose parent is that of the request's ``traceparent``.

    The answer has a ``traceparent`` with the ids of this span.
    """

    def __init__(self, app: ASGIApp, tracing: Tracing) -> None:
        self._app = app
        self._tracing = tracing
        self._propagator = TraceContextTextMapPropagator()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        given = {
            name.decode("latin-1"): value.decode("latin-1")
            for name, value in scope["headers"]
            if name in (b"traceparent", b"tracestate")
        }
        attributes = {"http.request.method": scope["method"], "url.path": scope["path"]}
        span = self._tracing.tracer(ROUTER).start_span(
            f"{scope['method']} {scope['path']}",
            self._propagator.extract(given),
            kind=trace.SpanKind.SERVER,
            attributes=attributes,
        )
        context = trace.set_span_in_context(span)
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, context)
        headers = [(name.encode(), value.encode("latin-1")) for name, value in carrier.items()]
        request_ids: list[RequestId] = []
        scope[SPAN] = request_ids

        def with_ids(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *headers]
                span.set_attribute("http.response.status_code", message["status"])
            return send(message)

        try:
            await self._app(scope, receive, with_ids)
        finally:
            span.end()
            if request_ids and span.get_span_context().trace_flags.sampled:
                self._tracing.ended(context, request_ids)
