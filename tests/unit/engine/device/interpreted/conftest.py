from __future__ import annotations

from interpreting import prepare_interpreter
from interpreting_paddle import take_paddle_tensors

prepare_interpreter()
take_paddle_tensors()
