"""SFT from Python: TRL's API, the launcher being torchrun. From the repository's root:

python tools/gguf_to_hf.py --output quickstart/smollm2
torchrun --nproc_per_node 2 examples/sft.py [--max-steps 20] [--model DIR] [--output DIR]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from datasets import load_dataset

from megalign import SFTConfig, SFTTrainer


def main() -> None:
    """Train on the sums' worked answers."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="quickstart/smollm2")
    parser.add_argument("--output", default="runs/sft_script")
    parser.add_argument("--max-steps", type=int, default=20)
    options = parser.parse_args()

    data = Path(__file__).parent / "data" / "sums.jsonl"
    rows = load_dataset("json", data_files=str(data), split="train").train_test_split(8, seed=0)
    args = SFTConfig(
        output_dir=options.output,
        pipeline_model_parallel_size=2,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        max_length=64,
        learning_rate=2e-5,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        max_steps=options.max_steps,
        logging_steps=1,
        save_strategy="no",
    )
    trainer = SFTTrainer(model=options.model, args=args, train_dataset=rows["train"], eval_dataset=rows["test"])
    trainer.train()
    metrics = trainer.evaluate()
    if trainer.state.is_world_process_zero:
        print(f"eval_loss {metrics['eval_loss']:.3f}")


if __name__ == "__main__":
    main()
