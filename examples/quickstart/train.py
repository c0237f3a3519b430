"""GRPO on one-digit sums over two pipeline stages, with vLLM sampling inside the same two ranks.

    torchrun --nproc_per_node 2 examples/quickstart/train.py

examples/quickstart.sh calls it; the flags are in options.py. The accuracy, before and after, is that of answers
sampled as in training (temperature 1) to sums that are not trained on.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import datasets
import matplotlib
from datasets import Dataset

from megalign import GRPOConfig, GRPOTrainer
from megalign.device import multiplies_bf16

sys.path.insert(0, str(Path(__file__).parent))  # torchrun started elsewhere does not add it
from options import arguments
from sums import split, sum_reward

matplotlib.use("Agg")


def plot(rewards: list[float], path: Path) -> None:
    """The mean reward of each step, and its mean over five steps."""
    from matplotlib import pyplot

    smooth = [sum(part) / len(part) for i in range(len(rewards)) if (part := rewards[max(0, i - 4) : i + 1])]
    figure, axes = pyplot.subplots(figsize=(7, 4))
    steps = range(1, len(rewards) + 1)
    axes.plot(steps, rewards, color="tab:blue", alpha=0.35, label="each step")
    axes.plot(steps, smooth, color="tab:blue", label="mean of 5 steps")
    axes.set(xlabel="step", ylabel="mean reward", title="GRPO on one-digit sums, SmolLM2-135M, PP2 on a CPU")
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    """Train, evaluate before and after, leave the results in --output."""
    options = arguments()
    started = time.time()
    datasets.disable_progress_bars()  # a few rows; the training has a bar of its own
    train_rows, held_out = split()
    args = GRPOConfig(
        output_dir=str(options.output / "model"),
        pipeline_model_parallel_size=2,
        bf16=multiplies_bf16() if options.dtype == "auto" else options.dtype == "bf16",
        max_steps=options.steps,
        per_device_train_batch_size=options.microbatch,
        gradient_accumulation_steps=options.completions // options.microbatch,
        per_device_eval_batch_size=16,
        num_generations=8,
        num_generations_eval=8,
        max_completion_length=12,
        vllm_max_model_length=64,
        vllm_cpu_kv_cache_gib=0.25,
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant",
        loss_type="dapo",
        gradient_checkpointing=False,
        seed=options.seed,
        logging_steps=1,
        log_completions=True,
        num_completions_to_print=2,
        eval_on_start=True,
        save_strategy="no",
    )
    trainer = GRPOTrainer(
        model=options.model,
        reward_funcs=[sum_reward],
        args=args,
        train_dataset=Dataset.from_list(train_rows),
        eval_dataset=Dataset.from_list(held_out),
    )
    trainer.train()
    trainer.evaluate()
    if trainer.state.is_world_process_zero:
        history = trainer.state.log_history
        before, *_, after = [line["eval_reward"] for line in history if "eval_reward" in line]
        rewards = [line["reward"] for line in history if "reward" in line]
        plot(rewards, options.output / "reward.png")
        result = {
            "accuracy_before": before,
            "accuracy_after": after,
            "rewards": rewards,
            "seconds": time.time() - started,
        }
        (options.output / "result.json").write_text(json.dumps(result, indent=2) + "\n")
        print(f"accuracy before={before:.2f} after={after:.2f}")


if __name__ == "__main__":
    main()
