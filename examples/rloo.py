"""RLOO from Python with a reward of degrees, which says more than right or wrong. From the repository's root:

python tools/gguf_to_hf.py --output quickstart/smollm2
torchrun --nproc_per_node 2 examples/rloo.py [--max-steps 20] [--model DIR] [--output DIR]
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from datasets import load_dataset

from megalign import RLOOConfig, RLOOTrainer


def closeness_reward(completions: list[list[dict[str, str]]], answer: list[int], **kwargs: Any) -> list[float]:
    """1 for the answer, less the further the last number of a completion is from it; 0 without a number."""
    numbers = [re.findall(r"\d+", completion[0]["content"]) for completion in completions]
    pairs = zip(numbers, answer, strict=True)
    return [1 / (1 + abs(int(found[-1]) - right)) if found else 0.0 for found, right in pairs]


def main() -> None:
    """Train on the sums' prompts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="quickstart/smollm2")
    parser.add_argument("--output", default="runs/rloo_script")
    parser.add_argument("--max-steps", type=int, default=20)
    options = parser.parse_args()

    data = Path(__file__).parent / "data" / "sums.jsonl"
    args = RLOOConfig(
        output_dir=options.output,
        pipeline_model_parallel_size=2,
        num_generations=4,
        beta=0.05,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=4,
        max_completion_length=12,
        vllm_max_model_length=64,
        learning_rate=3e-5,
        lr_scheduler_type="constant",
        max_steps=options.max_steps,
        logging_steps=1,
        log_completions=True,
        num_completions_to_print=4,
        save_strategy="no",
    )
    trainer = RLOOTrainer(
        model=options.model,
        reward_funcs=closeness_reward,
        args=args,
        train_dataset=load_dataset("json", data_files=str(data), split="train"),
    )
    trainer.train()


if __name__ == "__main__":
    main()
