"""A reward model, as TRL's own scripts are written: the fields come from the command line and a YAML file. From the
repository's root:

python tools/gguf_to_hf.py --output quickstart/smollm2
torchrun --nproc_per_node 2 examples/reward.py --config examples/reward.yaml --output_dir runs/reward_script
"""

from __future__ import annotations

from datasets import load_dataset

from megalign import ModelConfig, RewardConfig, RewardTrainer, ScriptArguments, TrlParser


def main() -> None:
    """Train a score head, and the model below it, on right answers against wrong ones."""
    parser = TrlParser((ScriptArguments, RewardConfig, ModelConfig))
    script_args, training_args, model_args = parser.parse_args_and_config()

    dataset = load_dataset("json", data_files=script_args.dataset_name)
    trainer = RewardTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=dataset[script_args.dataset_train_split],
    )
    trainer.train()

    # The head is new, so the last batches say more than the mean of the run.
    accuracies = [line["accuracy"] for line in trainer.state.log_history if "accuracy" in line][-5:]
    trainer.accelerator.print(f"accuracy of the last steps {sum(accuracies) / len(accuracies):.2f}")


if __name__ == "__main__":
    main()
