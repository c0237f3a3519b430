"""PPO from Python, with a critic and rewards from a reward model, which examples/reward.yaml trains. From the
repository's root:

python tools/gguf_to_hf.py --output quickstart/smollm2
torchrun --nproc_per_node 2 -m megalign reward --config examples/reward.yaml
torchrun --nproc_per_node 2 examples/ppo.py [--max-steps 20] [--model DIR] [--reward-model DIR] [--output DIR]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from datasets import load_dataset

from megalign import PPOConfig, PPOTrainer


def main() -> None:
    """Train on the sums' prompts; the critic begins as the reward model."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="quickstart/smollm2")
    parser.add_argument("--reward-model", default="runs/reward")
    parser.add_argument("--output", default="runs/ppo_script")
    parser.add_argument("--max-steps", type=int, default=20)
    options = parser.parse_args()

    data = Path(__file__).parent / "data" / "sums.jsonl"
    args = PPOConfig(
        output_dir=options.output,
        pipeline_model_parallel_size=2,
        num_ppo_epochs=2,
        kl_coef=0.05,
        missing_eos_penalty=1.0,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=4,
        max_completion_length=12,
        temperature=1.0,
        vllm_max_model_length=64,
        learning_rate=5e-6,
        critic_learning_rate=1e-5,
        lr_scheduler_type="constant",
        max_steps=options.max_steps,
        logging_steps=1,
        log_completions=True,
        num_completions_to_print=4,
        save_strategy="no",
    )
    trainer = PPOTrainer(
        model=options.model,
        reward_model=options.reward_model,
        args=args,
        train_dataset=load_dataset("json", data_files=str(data), split="train"),
    )
    trainer.train()


if __name__ == "__main__":
    main()
