"""Train the demo model (PyTorch, CPU): counting first, then all of it, with more and more facts.

Every hundred steps it prints and logs a line of numbers and saves the weights; the last step writes the model.
"""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch  # type: ignore[import-not-found]
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional  # type: ignore[import-not-found]

from demo_model.batches import IGNORED, Batch, Batches
from demo_model.config import ModelConfig
from demo_model.curves import draw
from demo_model.dialogue import Mix
from demo_model.export import save_checkpoint
from demo_model.initialise import Roles, counting_head, initialise
from demo_model.model import DemoModel
from demo_model.tokenizer import ASSISTANT, BEGIN, build_tokenizer, token_id
from demo_model.vocabulary import PLURALS

REPORT_EVERY = 100
COUNTING = Mix(num_facts=8, num_questions=3, unknown=0, count=1, talk=0, corrected=0, noisy=0, invented=0, repeated=0)


@dataclass(frozen=True)
class Recipe:
    """Everything that fixes a training run."""

    steps: int = 7400
    seed: int = 1
    learning_rate: float = 8e-4
    warmup_steps: int = 100
    decay_from: float = 0.6  # share of the steps after which the learning rate falls to nothing
    weight_decay: float = 0.01
    copy_every: int = 10  # one batch of copying in so many
    tokens_per_batch: int = 3600
    count_steps: int = 600  # of counting before anything else is asked
    hold_steps: int = 100  # in which the head that counts stays as it began
    first_num_facts: int = 8
    last_num_facts: int = 245
    growth: float = 1.5  # of the number of facts, when enough answers are right
    grow_at: tuple[tuple[str, float], ...] = (("where", 0.95), ("count", 0.9))
    grow_after: tuple[int, int] = (50, 400)  # steps between growths: at least, at most

    def rate(self, step: int) -> float:
        """Learning rate of a step: linear up, level, linear down."""
        falling = (self.steps - step) / (self.steps * (1 - self.decay_from))
        return self.learning_rate * min(1.0, (step + 1) / self.warmup_steps, falling)


class Scores:
    """Running shares of right answers by task."""

    def __init__(self) -> None:
        self.right: dict[str, float] = defaultdict(float)

    def add(self, batch: Batch, is_right: Tensor) -> None:
        """Take in a batch; ``is_right`` [rows, length] tells of every target whether it was predicted."""
        by_task: dict[str, list[bool]] = defaultdict(list)
        for answer in batch.answers:
            by_task[answer.task].append(bool(is_right[answer.row, answer.start : answer.stop].all()))
        for task, answers in by_task.items():
            self.right[task] += 0.05 * (sum(answers) / len(answers) - self.right[task])


class Curriculum:
    """How many facts a chat has: more whenever the answers are right."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._rng = Random(recipe.seed)
        self._grown_at = 0
        self.num_facts = recipe.first_num_facts

    def next_mix(self) -> Mix:
        """A third of the chats with as many facts as allowed, the others with fewer: short as often as long."""
        num_facts = self.num_facts
        if self._rng.random() < 0.67:
            num_facts = round(math.exp(self._rng.uniform(0.0, math.log(num_facts))))
        return Mix(num_facts=num_facts, num_questions=7 if num_facts < 60 else 64)

    def rows(self, mix: Mix) -> int:
        """Chats that fill a batch."""
        return max(1, self._recipe.tokens_per_batch // (9 * mix.num_facts + 18 * mix.num_questions))

    def advance(self, step: int, right: dict[str, float]) -> None:
        """Grow if ``right``, the shares of right answers by task, are high enough or it has been long."""
        least, most = self._recipe.grow_after
        waited = step - self._grown_at
        is_good = all(right[task] > share for task, share in self._recipe.grow_at)
        if waited >= most or (waited >= least and is_good):
            self.num_facts = min(self._recipe.last_num_facts, math.ceil(self.num_facts * self._recipe.growth))
            self._grown_at = step


def train_step(
    model: DemoModel,
    hidden: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    held: Sequence[tuple[Tensor, slice]] = (),
) -> tuple[float, Tensor]:
    """One update; ``hidden`` is the forward of ``model``, compiled; the ``held`` rows of weights stay as they are.

    Returns the loss, and which targets were predicted: [rows, length], true where there is no target.
    """
    targets = torch.from_numpy(batch.targets)
    is_target = targets != IGNORED
    logits = model.logits(hidden(torch.from_numpy(batch.tokens))[is_target])
    wanted = targets[is_target]
    loss = functional.cross_entropy(logits.float(), wanted)
    optimizer.zero_grad()
    loss.backward()
    for weight, rows in held:
        weight.grad[rows] = 0
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    is_right = torch.ones_like(is_target)
    is_right[is_target] = logits.argmax(-1) == wanted
    return loss.item(), is_right


def roles(tokenizer: Tokenizer) -> Roles:
    """What training is told of the language before it starts."""

    def word(text: str) -> int:
        return token_id(tokenizer, f"Ġ{text}")

    return Roles(
        begin=token_id(tokenizer, BEGIN),
        plurals=[(word(one), word(many)) for one, many in PLURALS.items()],
        facts=[(the, back) for the in (word("The"), token_id(tokenizer, "The")) for back in (2, 1)],
        answers=[(token_id(tokenizer, ASSISTANT), back) for back in (3, 2)],
    )


def train(recipe: Recipe, work: Path, model_dir: Path, threads: int) -> None:
    """Run the recipe on so many threads; logs and checkpoints go to ``work``, the model to ``model_dir``."""
    torch.set_num_threads(threads)
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)
    tokenizer = build_tokenizer()
    model = DemoModel(ModelConfig(tokenizer.get_vocab_size()))
    initialise(model, roles(tokenizer))
    held = counting_head(model)
    hidden = torch.compile(model, dynamic=True)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=recipe.weight_decay, fused=True
    )
    batches, curriculum, scores = Batches(tokenizer, recipe.seed), Curriculum(recipe), Scores()
    started, losses = time.perf_counter(), []
    log: list[dict[str, float]] = []
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        is_copying = step % recipe.copy_every == 0
        mix = COUNTING if step < recipe.count_steps else curriculum.next_mix()
        batch = batches.copies(32) if is_copying else batches.chats(mix, curriculum.rows(mix))
        loss, is_right = train_step(model, hidden, optimizer, batch, held if step < recipe.hold_steps else ())
        scores.add(batch, is_right)
        if not is_copying:
            losses.append(loss)
            if step >= recipe.count_steps:
                curriculum.advance(step, scores.right)
        if step % REPORT_EVERY == REPORT_EVERY - 1:
            mean = sum(losses) / max(1, len(losses))
            losses.clear()
            log.append(
                {
                    "step": step + 1,
                    "seconds": round(time.perf_counter() - started, 1),
                    "cpu_seconds": round(time.process_time(), 1),
                    "num_facts": curriculum.num_facts,
                    "loss": round(mean, 5),
                    **{task: round(right, 4) for task, right in scores.right.items()},
                }
            )
            print(json.dumps(log[-1]), flush=True)
            (work / "training.json").write_text(json.dumps(log))
            torch.save(model.state_dict(), work / "checkpoint.pt")
    save_checkpoint(model, tokenizer, model_dir)
    (model_dir / "training.json").write_text("[\n" + ",\n".join(json.dumps(line) for line in log) + "\n]\n")
    draw(log, model_dir / "training.png")
