"""Files that the docs name exist, and so do the pages and headings that they link to."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
FILE = re.compile(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|h|cpp|md|txt|json|yaml))`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
PLACEHOLDER = re.compile(r"[A-Z]{3,}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page: Path) -> None:
    named = {name for name in FILE.findall(page.read_text()) if not PLACEHOLDER.search(name)}

    assert {name for name in named if not any((base / name).exists() for base in (ROOT, page.parent))} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    broken = [link for link in LINK.findall(page.read_text()) if "://" not in link and not _leads_somewhere(page, link)]

    assert broken == []


def _leads_somewhere(page: Path, link: str) -> bool:
    path, _, anchor = link.partition("#")
    target = page.parent / path if path else page
    return target.exists() and (not anchor or anchor in _anchors(target))


def _anchors(page: Path) -> set[str]:
    """Return the anchors of the headings of ``page``, as GitHub makes them."""
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in HEADING.findall(page.read_text())}


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "adr").glob("*.md")), ids=lambda page: page.name[:4])
def test_a_decision_has_its_number_and_its_status_at_the_top(page: Path) -> None:
    title, blank, status, *_ = page.read_text().split("\n")

    assert re.match(r"# (\d+)\. ", title)[1] == str(int(page.name[:4]))  # type: ignore[index]
    assert blank == ""
    assert status.startswith("**Status**: ")
