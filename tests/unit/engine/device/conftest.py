from __future__ import annotations

import os

import pytest

pytest.importorskip("torch", reason="kvrelay[torch] is not installed")

# Triton decides when it is imported whether its kernels are interpreted: test_interpreted.py starts a process for that.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
