"""The curves of a training run, as a picture."""

from __future__ import annotations

from pathlib import Path

from matplotlib import pyplot  # type: ignore[import-not-found]

TASKS = ("where", "count", "unknown", "repeat", "talk", "copy")


def draw(log: list[dict[str, float]], path: Path) -> None:
    """Loss, right answers by task and facts per chat over the steps of ``log``, into a PNG at ``path``."""
    chats = [entry for entry in log if entry["loss"] > 0]
    figure, (losses, shares, sizes) = pyplot.subplots(3, 1, figsize=(8, 8), sharex=True, layout="constrained")
    losses.plot([entry["step"] for entry in chats], [entry["loss"] for entry in chats])
    losses.set(ylabel="loss on answers", yscale="log")
    for task in TASKS:
        found = [entry for entry in log if task in entry]
        shares.plot([entry["step"] for entry in found], [entry[task] for entry in found], label=task)
    shares.set(ylabel="answers right in training", ylim=(0, 1.01))
    shares.legend(loc="lower right", ncols=3)
    sizes.plot([entry["step"] for entry in log], [entry["num_facts"] for entry in log])
    sizes.set(ylabel="most facts in a chat", xlabel="step")
    for axes in (losses, shares, sizes):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
