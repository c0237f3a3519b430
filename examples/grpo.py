"""GRPO from Python with a reward function of your own. From the repository's root:

python tools/gguf_to_hf.py --output quickstart/smollm2
torchrun --nproc_per_node 2 examples/grpo.py [--max-steps 20] [--model DIR] [--output DIR]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from datasets import load_dataset

from megalign import GRPOConfig, GRPOTrainer


def answer_reward(completions: list[list[dict[str, str]]], answer: list[int], **kwargs: Any) -> list[float]:
    """1 where the completion ends with the answer, which is a column of the dataset."""
    texts = [completion[0]["content"].rstrip(" .\n") for completion in completions]
    pairs = zip(texts, answer, strict=True)
    return [float(text.split(" ")[-1] == str(right)) for text, right in pairs]


def main() -> None:
    """Train on the sums' prompts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="quickstart/smollm2")
    parser.add_argument("--output", default="runs/grpo_script")
    parser.add_argument("--max-steps", type=int, default=20)
    options = parser.parse_args()

    data = Path(__file__).parent / "data" / "sums.jsonl"
    args = GRPOConfig(
        output_dir=options.output,
        pipeline_model_parallel_size=2,
        num_generations=8,
        reward_weights=[1.0, 0.01],
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
    trainer = GRPOTrainer(
        model=options.model,
        reward_funcs=[answer_reward, "length_reward"],
        args=args,
        train_dataset=load_dataset("json", data_files=str(data), split="train"),
    )
    trainer.train()


if __name__ == "__main__":
    main()
