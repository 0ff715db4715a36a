"""Operators' endpoints that have processes write their recordings to files."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kvrelay.protocol.ids import NodeId
from kvrelay.protocol.messages.base import ErrorInfo
from kvrelay.runtime.dumps import Written
from router.openai.errors import AnswerError
from router.openai.field_types import shown
from router.service import RouterService


class DumpEndpoints:
    """Each answers with the files: process, path on its host or error."""

    def __init__(self, service: RouterService) -> None:
        self._service = service

    async def router(self, request: Request) -> Response:
        """``POST /cluster/dump``: this router's recording. With ``?prompts=true`` tokens are in it."""
        return _files([await self._service.dumps.write(prompts=_with_prompts(request))])

    async def node(self, request: Request) -> Response:
        """``POST /cluster/nodes/{node_id}/dump``: those of a node and its messager, on its host."""
        name = request.path_params["node_id"]
        node = self._service.machine.node_table.named(name)
        if node is None:
            return _refusal("not_found", f"no node is called {shown(name)}", 404)
        if not node.registration.can_dump:
            return _refusal("not_supported", f"{name} runs an earlier version, which records nothing", 409)
        written = await self._service.node_dumps.of_node(NodeId(name), node.role, with_prompts=_with_prompts(request))
        if not written:
            return _refusal("timeout", f"{name} has not answered", 504)
        return _files(written)


def _with_prompts(request: Request) -> bool:
    return request.query_params.get("prompts") == "true"


def _files(written: Sequence[Written]) -> Response:
    return JSONResponse({"files": [item._asdict() for item in written]})


def _refusal(code: str, message: str, status: int) -> Response:
    error = AnswerError(ErrorInfo(code=code, message=message, http_status=status))
    return JSONResponse(error.body, error.status)
