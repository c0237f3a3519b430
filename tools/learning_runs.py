"""Whether the trainers learn, on the quickstart's one-digit sums and from the same start.

    torchrun --nproc_per_node 2 tools/learning_runs.py ppo --model quickstart/smollm2 --json ppo.json

grpo, rloo and ppo sample with vLLM; their figure is the accuracy of answers sampled to sums that are not trained on.
reward and dpo learn from pairs of a right and a wrong answer; their figures are the held-out accuracy and margin.
All ranks are pipeline stages. The JSON file has algorithm, seed, steps, metric, before, after, curve and seconds.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import datasets

import megalign

sys.path.insert(0, str(Path(__file__).parents[1] / "examples/quickstart"))
from sums import row, split, sum_reward

ONLINE = {
    "grpo": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4, "num_generations": 8},
    "rloo": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4, "num_generations": 8, "beta": 0.0},
    "ppo": {
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 4,
        "num_ppo_epochs": 1,
        "kl_coef": 0.001,
        "critic_learning_rate": 1e-4,
        "vf_coef": 1.0,
        "temperature": 1.0,
    },
}
OFFLINE = {
    "reward": {"learning_rate": 3e-5},
    "dpo": {"learning_rate": 1e-5},
}
# The metric that the figures are of.
METRICS = {**dict.fromkeys(ONLINE, "right"), "reward": "accuracy", "dpo": "rewards/margins"}


def pairs(rows: list[dict[str, Any]], *, seed: int) -> list[dict[str, Any]]:
    """Each sum with its answer and a wrong one near it."""
    draw = random.Random(seed)
    made = []
    for sum_row in rows:
        right = sum_row["answer"]
        wrong = draw.choice([near for near in range(max(0, right - 5), right + 6) if near != right])
        chosen, rejected = ([{"role": "assistant", "content": str(number)}] for number in (right, wrong))
        made.append({"prompt": sum_row["prompt"], "chosen": chosen, "rejected": rejected})
    return made


def common(options: argparse.Namespace, output: Path) -> dict[str, Any]:
    """What all runs share."""
    return {
        "output_dir": str(output),
        "pipeline_model_parallel_size": options.pipeline,
        "bf16": True,
        "max_steps": options.steps,
        "learning_rate": 3e-5,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": False,
        "seed": options.seed,
        "logging_steps": 1,
        "per_device_eval_batch_size": 16,
        "eval_on_start": True,
        "save_strategy": "no",
    }


def right(completions: Any, answer: list[int], log_metric: Any, **kwargs: Any) -> list[float]:
    """The quickstart's reward; its mean is also logged by itself, since PPO logs other names."""
    rewards = sum_reward(completions, answer)
    log_metric("right", sum(rewards) / len(rewards))
    return rewards


def online(algorithm: str, options: argparse.Namespace, output: Path) -> Any:
    """A trainer that samples."""
    fields = common(options, output) | ONLINE[algorithm]
    fields |= {"max_completion_length": 12, "num_generations_eval": 8}
    fields |= {"vllm_max_model_length": 64, "vllm_cpu_kv_cache_gib": 0.25}
    train_rows, held_out = split()
    return _trainer(algorithm)(
        model=options.model,
        reward_funcs=[right],
        args=_config(algorithm)(**fields),
        train_dataset=datasets.Dataset.from_list(train_rows),
        eval_dataset=datasets.Dataset.from_list(held_out),
    )


def offline(algorithm: str, options: argparse.Namespace, output: Path) -> Any:
    """A trainer on pairs."""
    fields = common(options, output) | OFFLINE[algorithm]
    train_rows, held_out = split()
    sums = [row(a, b) for a in range(10, 20) for b in range(10)] if algorithm == "reward" else []
    return _trainer(algorithm)(
        model=options.model,
        args=_config(algorithm)(**fields, per_device_train_batch_size=16),
        train_dataset=datasets.Dataset.from_list(pairs(train_rows + sums, seed=1)),
        eval_dataset=datasets.Dataset.from_list(pairs(held_out, seed=2)),
    )


def _trainer(algorithm: str) -> Any:
    return getattr(megalign, f"{_spelling(algorithm)}Trainer")


def _config(algorithm: str) -> Any:
    return getattr(megalign, f"{_spelling(algorithm)}Config")


def _spelling(algorithm: str) -> str:
    return "Reward" if algorithm == "reward" else algorithm.upper()


def main() -> None:
    """Trains, evaluates before and after, and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("algorithm", choices=list(METRICS))
    parser.add_argument("--model", required=True, help="Hugging Face directory")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/learning"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--pipeline", type=int, default=2, help="pipeline stages")
    options = parser.parse_args()
    datasets.disable_progress_bars()
    started = time.time()
    make = online if options.algorithm in ONLINE else offline
    trainer = make(options.algorithm, options, options.output / options.algorithm)
    trainer.train()
    trainer.evaluate()
    history, metric = trainer.state.log_history, METRICS[options.algorithm]
    before, *_, after = [line[f"eval_{metric}"] for line in history if f"eval_{metric}" in line]
    found = {
        "algorithm": options.algorithm,
        "seed": options.seed,
        "steps": options.steps,
        "metric": metric,
        "before": before,
        "after": after,
        "curve": [line[metric] for line in history if metric in line],
        "seconds": time.time() - started,
    }
    if trainer.state.is_world_process_zero:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{options.algorithm}: {metric} before={before:.3f} after={after:.3f}", flush=True)


if __name__ == "__main__":
    main()
