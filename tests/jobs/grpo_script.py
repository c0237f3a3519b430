"""A user's own script: GRPO through the Python API, under torchrun.  grpo_script.py MODEL OUTPUT_DIR"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from megalign import GRPOConfig, GRPOTrainer

OUTPUT = Path(sys.argv[2])
ROWS = [{"prompt": f"{a} + {b} = ", "answer": a + b} for a in range(1, 5) for b in range(1, 4)]


class Watch(TrainerCallback):
    """Counts steps, and asks for an evaluation of its own after the second."""

    steps = 0
    evaluations: list[float] = []

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The protocol's event."""
        self.steps += 1
        control.should_evaluate = state.global_step == 2

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The protocol's event."""
        self.evaluations.append(kwargs["metrics"]["eval_reward"])


def few_distinct_letters(completions: list[str], answer: list[int], prompts: list[str], **kwargs: Any) -> list[float]:
    """A paid judge would be billed for each line that this writes."""
    with open(OUTPUT / "judged.txt", "a") as judged:
        judged.writelines(
            json.dumps([os.environ["RANK"], prompt, number, text]) + "\n"
            for prompt, number, text in zip(prompts, answer, completions, strict=True)
        )
    return [-float(len(set(text))) for text in completions]


async def ended(completion_ids: list[list[int]], **kwargs: Any) -> list[float | None]:
    """Not applicable to what was cut off."""
    return [None if len(ids) == 8 else 1.0 for ids in completion_ids]


def main() -> None:
    """Trains, evaluates, saves."""
    watch = Watch()
    trainer = GRPOTrainer(
        model=sys.argv[1],
        args=GRPOConfig(
            output_dir=str(OUTPUT),
            pipeline_model_parallel_size=2,
            max_steps=3,
            per_device_train_batch_size=4,
            per_device_eval_batch_size=4,
            gradient_accumulation_steps=2,
            num_generations=4,
            num_generations_eval=2,
            max_completion_length=8,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            report_to="tensorboard",
            log_completions=True,
            num_completions_to_print=2,
            reward_weights=[1.0, 0.5],
            vllm_cpu_kv_cache_gib=0.0625,
            vllm_max_model_length=64,
        ),
        reward_funcs=[few_distinct_letters, ended],
        train_dataset=ROWS,
        eval_dataset=ROWS[:6],
        callbacks=[watch],
    )
    output = trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model(str(OUTPUT / "saved"))
    if trainer.state.is_world_process_zero:
        told = {
            "global_step": output.global_step,
            "steps": watch.steps,
            "evaluations": watch.evaluations,
            "evaluate": metrics,
            "history": trainer.state.log_history,
        }
        (OUTPUT / "told.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main()
