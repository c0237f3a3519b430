"""KTO from Python: each answer is good or bad by itself. From the repository's root:

python tools/gguf_to_hf.py --output quickstart/smollm2
torchrun --nproc_per_node 2 examples/kto.py [--max-steps 20] [--model DIR] [--output DIR]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from datasets import load_dataset

from megalign import KTOConfig, KTOTrainer


def main() -> None:
    """Train on the right and the wrong answers of the pairs, which the trainer takes apart."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="quickstart/smollm2")
    parser.add_argument("--output", default="runs/kto_script")
    parser.add_argument("--max-steps", type=int, default=20)
    options = parser.parse_args()

    data = Path(__file__).parent / "data" / "pairs.jsonl"
    args = KTOConfig(
        output_dir=options.output,
        pipeline_model_parallel_size=2,
        beta=0.1,
        desirable_weight=1.0,
        undesirable_weight=1.0,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=2,
        max_length=64,
        learning_rate=5e-6,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        max_steps=options.max_steps,
        logging_steps=1,
        save_strategy="no",
    )
    trainer = KTOTrainer(
        model=options.model,
        args=args,
        train_dataset=load_dataset("json", data_files=str(data), split="train"),
    )
    trainer.train()


if __name__ == "__main__":
    main()
