"""Runs in the environment of ``lm_eval_harness``: evaluates tasks of local data; the last line is JSON, task by task.

Arguments: the name of lm-eval's model, its arguments as JSON, a folder to write the tasks to.
"""

# mypy: ignore-errors

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import yaml
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

WORDS = "the red key lies in box seven and blue lamp stands near room nine where old map was found again"
NUM_DOCUMENTS = 12

TASKS = {
    "continuation": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{text}}",
        "doc_to_target": " {{options[answer]}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{options}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{long}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
}


def write_tasks(folder: Path) -> None:
    """Write the tasks and their documents."""
    rng = random.Random(11)

    def words(fewest: int, most: int) -> str:
        return " ".join(rng.choice(WORDS.split()) for _ in range(rng.randint(fewest, most)))

    documents = [
        {
            "text": words(3, 20).capitalize(),
            "options": [words(1, 4) for _ in range(4)],
            "answer": rng.randrange(4),
            "long": words(5, 120).capitalize() + ".",
        }
        for _ in range(NUM_DOCUMENTS)
    ]
    data = folder / "documents.jsonl"
    data.write_text("\n".join(json.dumps(document) for document in documents))
    for name, task in TASKS.items():
        whole = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            **task,
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(whole))


def log_likelihoods(sample: dict) -> list[float]:
    """Return those of one document: one, or one for each choice."""
    return [response[0][0] if isinstance(response[0], (list, tuple)) else response[0] for response in sample["resps"]]


def main() -> None:
    """Evaluate."""
    model, arguments, folder = sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3])
    write_tasks(folder)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    evaluated = simple_evaluate(
        model=model, model_args=arguments, tasks=list(TASKS), task_manager=manager, log_samples=True,
        batch_size=arguments.pop("batch_size", 1), bootstrap_iters=0,
    )  # fmt: skip
    values = {
        task: [
            value
            for sample in sorted(samples, key=lambda sample: sample["doc_id"])
            for value in log_likelihoods(sample)
        ]
        for task, samples in evaluated["samples"].items()
    }
    print(json.dumps(values))


if __name__ == "__main__":
    main()
