from __future__ import annotations

from interpreting import prepare_interpreter

prepare_interpreter()
