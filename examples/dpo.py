"""DPO, as TRL's own scripts are written: the fields come from the command line and a YAML file. From the repository's
root:

python tools/gguf_to_hf.py --output quickstart/smollm2
torchrun --nproc_per_node 2 examples/dpo.py --config examples/dpo.yaml --output_dir runs/dpo_script
"""

from __future__ import annotations

from datasets import load_dataset

from megalign import DPOConfig, DPOTrainer, ModelConfig, ScriptArguments, TrlParser


def main() -> None:
    """Train on right answers against wrong ones; the reference is the model as it began."""
    parser = TrlParser((ScriptArguments, DPOConfig, ModelConfig))
    script_args, training_args, model_args = parser.parse_args_and_config()

    dataset = load_dataset("json", data_files=script_args.dataset_name)
    trainer = DPOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=dataset[script_args.dataset_train_split],
        eval_dataset=dataset[script_args.dataset_test_split] if training_args.eval_strategy != "no" else None,
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)


if __name__ == "__main__":
    main()
