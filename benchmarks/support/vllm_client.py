"""Runs in vLLM's environment: ``vllm bench serve`` repeatedly in one process, because its imports take half a minute.

Each line of the input is the JSON list of the arguments of a run; it is answered by a line with the run's scalars.
"""

from __future__ import annotations

import json
import os
import sys


def main() -> None:
    from vllm.benchmarks.serve import add_cli_args  # noqa: PLC0415
    from vllm.benchmarks.serve import main as serve  # noqa: PLC0415
    from vllm.utils.argparse_utils import FlexibleArgumentParser  # noqa: PLC0415

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what it prints is the log
    for line in sys.stdin:
        result = serve(parser.parse_args(json.loads(line)))
        scalars = {name: value for name, value in result.items() if isinstance(value, int | float)}
        answers.write(json.dumps(scalars) + "\n")


if __name__ == "__main__":
    main()
