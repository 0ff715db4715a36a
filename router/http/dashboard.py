"""``GET /dashboard``: one page that shows what the operators' endpoints answer. It has no data itself."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

PATH = "/dashboard"

_FILE = Path(__file__).with_name("dashboard.html")


class Dashboard:
    """The page. Browsers run its own script and style only, and may ask this server only."""

    def __init__(self) -> None:
        self._page = _FILE.read_bytes()
        scripts, styles = self._hashes("script"), self._hashes("style")
        policy = f"default-src 'none'; script-src {scripts}; style-src {styles}; connect-src 'self'; base-uri 'none'; "
        self._headers = {
            "Content-Security-Policy": policy + "form-action 'none'; frame-ancestors 'none'",
            "Cache-Control": "no-cache",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }

    async def page(self, _: Request) -> Response:
        """``GET /dashboard``: a page for browsers."""
        return Response(self._page, media_type="text/html; charset=utf-8", headers=self._headers)

    def _hashes(self, tag: str) -> str:
        contents = re.findall(rb"<%b>(.*?)</%b>" % (tag.encode(), tag.encode()), self._page, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(content).digest()).decode() for content in contents]
        return " ".join(f"'sha256-{digest}'" for digest in digests)
