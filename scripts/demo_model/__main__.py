"""``scripts/train_demo_model``: train the demo model, or check the committed one."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
MODEL_DIR = REPOSITORY / "models" / "demo"
CHECK_SEED = 2026


def main() -> int:
    """Run the command; return the exit code: 1 if the check finds the model below its bar."""
    parser = argparse.ArgumentParser(prog="scripts/train_demo_model", description=__doc__)
    parser.add_argument("--check", action="store_true", help="train nothing; print accuracy by task and length")
    parser.add_argument("--model", type=Path, default=MODEL_DIR, help="directory of the model (default: models/demo)")
    parser.add_argument("--seed", type=int, help="of training, or of the questions of the check")
    parser.add_argument("--per-cell", type=int, default=100, help="questions in each cell of the check (default: 100)")
    parser.add_argument("--threads", type=int, default=2, help="default: 2")
    arguments = parser.parse_args()
    if arguments.check:
        from demo_model.check import check  # noqa: PLC0415

        seed = CHECK_SEED if arguments.seed is None else arguments.seed
        return 0 if check(arguments.model, seed, arguments.per_cell, arguments.threads) else 1
    from demo_model.train import Recipe, train  # noqa: PLC0415  (needs PyTorch)

    recipe = Recipe() if arguments.seed is None else Recipe(seed=arguments.seed)
    train(recipe, REPOSITORY / ".kvrelay" / "demo_model", arguments.model, arguments.threads)
    return 0


if __name__ == "__main__":
    sys.exit(main())
