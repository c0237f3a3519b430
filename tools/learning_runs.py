"""Whether the trainers that sample learn: the quickstart's one-digit sums, all from the same start.

    torchrun --nproc_per_node 2 tools/learning_runs.py ppo --model quickstart/smollm2 --json ppo.json

The figure is the accuracy of answers sampled to sums that are not trained on, eight a sum. All ranks are pipeline
stages. The JSON file has algorithm, seed, steps, before, after, curve (accuracy of each step's samples) and seconds.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import datasets

import megalign
from megalign.device import multiplies_bf16

sys.path.insert(0, str(Path(__file__).parents[1] / "examples/quickstart"))
from sums import split, sum_reward

ALGORITHMS = {
    "grpo": {"num_generations": 8},
    "rloo": {"num_generations": 8, "beta": 0.0},
    "ppo": {
        "num_ppo_epochs": 1,
        "kl_coef": 0.001,
        "critic_learning_rate": 1e-4,
        "vf_coef": 1.0,
        "temperature": 1.0,
    },
}


def right(completions: Any, answer: list[int], log_metric: Any, **kwargs: Any) -> list[float]:
    """The quickstart's reward; its mean is also logged by itself, since PPO logs other names."""
    rewards = sum_reward(completions, answer)
    log_metric("right", sum(rewards) / len(rewards))
    return rewards


def make_trainer(algorithm: str, options: argparse.Namespace, output: Path) -> Any:
    """The algorithm's trainer of the sums."""
    train_rows, held_out = split()
    name = algorithm.upper()
    return getattr(megalign, f"{name}Trainer")(
        model=options.model,
        reward_funcs=[right],
        args=getattr(megalign, f"{name}Config")(
            output_dir=str(output),
            pipeline_model_parallel_size=options.pipeline,
            bf16=multiplies_bf16(),
            max_steps=options.steps,
            learning_rate=3e-5,
            lr_scheduler_type="constant",
            gradient_checkpointing=False,
            seed=options.seed,
            logging_steps=1,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=4,
            per_device_eval_batch_size=16,
            num_generations_eval=8,
            eval_on_start=True,
            max_completion_length=12,
            vllm_max_model_length=64,
            vllm_cpu_kv_cache_gib=0.25,
            save_strategy="no",
            **ALGORITHMS[algorithm],
        ),
        train_dataset=datasets.Dataset.from_list(train_rows),
        eval_dataset=datasets.Dataset.from_list(held_out),
    )


def main() -> None:
    """Trains, evaluates before and after, and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("algorithm", choices=list(ALGORITHMS))
    parser.add_argument("--model", required=True, help="Hugging Face directory")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/learning"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--pipeline", type=int, default=2, help="pipeline stages")
    options = parser.parse_args()
    datasets.disable_progress_bars()
    started = time.time()
    trainer = make_trainer(options.algorithm, options, options.output / options.algorithm)
    trainer.train()
    trainer.evaluate()
    history = trainer.state.log_history
    before, *_, after = [line["eval_right"] for line in history if "eval_right" in line]
    found = {
        "algorithm": options.algorithm,
        "seed": options.seed,
        "steps": options.steps,
        "before": before,
        "after": after,
        "curve": [line["right"] for line in history if "right" in line],
        "seconds": time.time() - started,
    }
    if trainer.state.is_world_process_zero:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{options.algorithm}: accuracy before={before:.3f} after={after:.3f}", flush=True)


if __name__ == "__main__":
    main()
