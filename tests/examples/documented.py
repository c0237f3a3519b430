"""Examples of the shape of TRL's documentation, written against TRL: a test changes their import and runs them.

Models and datasets are directories beside the scripts, under the names that the scripts give. The scripts of
`OFFLINE` run in TRL as they stand; those of `QUICK_STARTS` and `ONLINE` sample completions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from tests.data.tokenizers_made_here import CHATML, make_tokenizer, marked
from tests.tiny import save_tiny_classifier, save_tiny_model

Rows = Sequence[Mapping[str, Any]]

# question, beginning of a sentence, its good end, its bad end
FACTS = [
    ("How many legs has a spider?", "A spider has", " eight legs.", " six legs."),
    ("What is ice?", "Ice is", " water that froze.", " a kind of glass."),
    ("Where do fish live?", "Fish live", " in water.", " in the trees and under the ground."),
    ("What does a cow eat?", "A cow eats", " grass, and hay in winter.", " mice."),
    ("When is it dark?", "It is dark", " at night.", " at noon."),
    ("What is 1 + 2?", "1 + 2 =", " 3.", " 4, or perhaps 5."),
]
TOOL = {"type": "function", "function": {"name": "look_up", "description": "Looks a word up."}}


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text.strip()}]


def labelled(rows: Rows) -> Rows:
    return [{**row, "label": place % 3 != 1} for place, row in enumerate(rows)]


DATASETS: dict[str, Rows] = {
    "texts": [{"text": start + good} for _, start, good, _ in FACTS],
    "conversations": [{"messages": user(ask) + assistant(good)} for ask, _, good, _ in FACTS],
    "completions": [{"prompt": start, "completion": good} for _, start, good, _ in FACTS],
    "chat-completions": [{"prompt": user(ask), "completion": assistant(good)} for ask, _, good, _ in FACTS],
    "tools": [{"messages": user(ask) + assistant(good), "tools": [TOOL]} for ask, _, good, _ in FACTS],
    "tools-as-text": [
        {"messages": user(ask) + assistant(good), "tools": json.dumps([TOOL])} for ask, _, good, _ in FACTS
    ],
    "medical": [{"Question": ask, "Reasoning": start, "Response": good} for ask, start, good, _ in FACTS],
    "pairs": [{"prompt": start, "chosen": good, "rejected": bad} for _, start, good, bad in FACTS],
    "pairs-implicit": [{"chosen": start + good, "rejected": start + bad} for _, start, good, bad in FACTS],
    "chat-pairs": [
        {"prompt": user(ask), "chosen": assistant(good), "rejected": assistant(bad)} for ask, _, good, bad in FACTS
    ],
    # As trl-lib/ultrafeedback_binarized: no prompt, and columns that nobody reads.
    "chat-pairs-implicit": [
        {"chosen": user(ask) + assistant(good), "rejected": user(ask) + assistant(bad), "score_chosen": 9.0}
        for ask, _, good, bad in FACTS
    ],
    "tool-pairs": [
        {"prompt": user(ask), "chosen": assistant(good), "rejected": assistant(bad), "tools": [TOOL]}
        for ask, _, good, bad in FACTS
    ],
    "votes": [
        {"ask": json.dumps([ask]), "a": bad, "b": good, "a_wins": 0, "tie": int(ask.startswith("When"))}
        for ask, _, good, bad in FACTS
    ],
    "unpaired": labelled([{"prompt": start, "completion": good} for _, start, good, _ in FACTS]),
    # As trl-lib/kto-mix-14k, which the documentation also gives to SFT.
    "chat-unpaired": labelled([{"prompt": user(ask), "completion": assistant(good)} for ask, _, good, _ in FACTS]),
    # As trl-lib/DeepMath-103K.
    "maths": [{"prompt": user(f"What is $1 + {n}$?"), "solution": f"${1 + n}$"} for n in range(4)],
    "questions": [{"prompt": ask, "ground_truth": good.strip(), "task": "talk"} for ask, _, good, _ in FACTS[:4]],
}


def write_workshop(root: Path) -> None:
    """tiny/chat, tiny/base and tiny/brief (models), tiny/judge (a reward model), data/* (datasets)."""
    # A multiple of 64: where a tokenizer is cloned, TRL would give a smaller model new rows of random numbers.
    sizes = {"vocab_size": 448, "head_dim": 32, "max_position_embeddings": 1024, "eos_token_id": 2}
    template = "{% if tools %}{{ tools | tojson }}{% endif %}" + marked(CHATML)
    for name, save, chats in (
        ("chat", save_tiny_model, True),
        ("base", save_tiny_model, False),
        ("brief", save_tiny_model, True),
        ("judge", save_tiny_classifier, True),
    ):
        save("qwen3", root / "tiny" / name, bos_token_id=None, **sizes)
        tokenizer = make_tokenizer(template if chats else None, eos_token="<|im_end|>")
        tokenizer.pad_token, tokenizer.bos_token = "<|endoftext|>", None
        tokenizer.save_pretrained(root / "tiny" / name)
    end_sooner(root / "tiny" / "brief" / "model.safetensors")
    for name, rows in DATASETS.items():
        (root / "data" / name).mkdir(parents=True)
        (root / "data" / name / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def end_sooner(weights: Path) -> None:
    """Makes the end token likely after many tokens: some 15 are sampled of the 512 that a default allows."""
    tensors = load_file(weights)
    tensors["model.embed_tokens.weight"][2] *= 32
    save_file(tensors, weights, metadata={"format": "pt"})


def simplest(trainer: str, dataset: str, model: str = "tiny/chat") -> str:
    """The quick start of each trainer: a model and a dataset, no arguments."""
    return f"""
        from trl import {trainer}Trainer
        from datasets import load_dataset

        trainer = {trainer}Trainer(
            model="{model}",
            train_dataset=load_dataset("data/{dataset}", split="train"),
        )
        trainer.train()
    """


def configured(trainer: str, dataset: str, fields: str) -> str:
    """With a config of its own."""
    return f"""
        import torch
        from trl import {trainer}Config, {trainer}Trainer
        from datasets import load_dataset

        training_args = {trainer}Config({fields})
        trainer = {trainer}Trainer(
            model="tiny/chat",
            args=training_args,
            train_dataset=load_dataset("data/{dataset}", split="train"),
        )
        trainer.train()
    """


HALF = "model_init_kwargs={'dtype': torch.bfloat16}"
SMALL_STEPS = "per_device_train_batch_size=1, gradient_accumulation_steps=4"

OFFLINE: dict[str, str] = {
    **{f"sft {data}": simplest("SFT", data) for data in ("texts", "conversations", "completions", "chat-completions")},
    **{f"sft {data}": simplest("SFT", data) for data in ("tools", "tools-as-text")},
    "sft half": configured("SFT", "conversations", HALF),
    "sft packing": configured("SFT", "conversations", "packing=True"),
    "sft assistant only": configured("SFT", "conversations", "assistant_only_loss=True"),
    "sft completion only": configured("SFT", "chat-unpaired", "completion_only_loss=True"),
    "sft prompt too": configured("SFT", "chat-unpaired", "completion_only_loss=False"),
    "sft both": configured("SFT", "chat-completions", "assistant_only_loss=True"),
    "sft dft": configured("SFT", "texts", "loss_type='dft'"),
    "sft small steps": configured("SFT", "texts", f"{SMALL_STEPS}, learning_rate=2e-5"),
    "sft preprocessed": """
        from datasets import load_dataset
        from trl import SFTTrainer

        dataset = load_dataset("data/medical")

        def to_chat(example):
            answer = "<think>" + example["Reasoning"] + "</think>" + example["Response"]
            return {
                "prompt": [{"role": "user", "content": example["Question"]}],
                "completion": [{"role": "assistant", "content": answer}],
            }

        dataset = dataset.map(to_chat, remove_columns=["Question", "Response", "Reasoning"])
        trainer = SFTTrainer("tiny/chat", train_dataset=dataset["train"])
        trainer.train()
    """,
    "sft instruction tuning": """
        from trl import SFTConfig, SFTTrainer
        from datasets import load_dataset

        trainer = SFTTrainer(
            model="tiny/base",
            args=SFTConfig(output_dir="base-Instruct", chat_template_path="tiny/chat"),
            train_dataset=load_dataset("data/conversations", split="train"),
        )
        trainer.train()
    """,
    **{f"dpo {data}": simplest("DPO", data) for data in ("pairs", "pairs-implicit", "chat-pairs")},
    **{f"dpo {data}": simplest("DPO", data) for data in ("chat-pairs-implicit", "tool-pairs")},
    "dpo half": configured("DPO", "chat-pairs", HALF),
    "dpo several losses": configured(
        "DPO", "chat-pairs", "loss_type=['sigmoid', 'bco_pair', 'sft'], loss_weights=[0.8, 0.2, 1.0]"
    ),
    "dpo small steps": configured("DPO", "pairs", f"{SMALL_STEPS}, learning_rate=1e-5"),
    **{f"kto {data}": simplest("KTO", data) for data in ("unpaired", "chat-unpaired", "chat-pairs")},
    "kto apo": configured("KTO", "chat-unpaired", "loss_type='apo_zero_unpaired'"),
    "kto tokenizer": """
        from datasets import load_dataset
        from trl import KTOConfig, KTOTrainer
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained("tiny/chat")
        train_dataset = load_dataset("data/chat-unpaired", split="train")

        training_args = KTOConfig(output_dir="chat-KTO")
        trainer = KTOTrainer(
            model="tiny/chat", args=training_args, processing_class=tokenizer, train_dataset=train_dataset
        )
        trainer.train()
    """,
    **{f"reward {data}": simplest("Reward", data, "tiny/judge") for data in ("pairs", "pairs-implicit", "chat-pairs")},
    **{f"reward {data}": simplest("Reward", data, "tiny/judge") for data in ("chat-pairs-implicit", "tool-pairs")},
    "reward new head": simplest("Reward", "chat-pairs-implicit", "tiny/chat"),
    "reward half": configured("Reward", "chat-pairs", HALF),
    "reward centred": configured("Reward", "chat-pairs", "center_rewards_coefficient=1e-2"),
    "reward preprocessed": """
        import json
        from datasets import load_dataset
        from trl import RewardTrainer

        dataset = load_dataset("data/votes")
        dataset = dataset.filter(lambda example: example["tie"] == 0)

        def by_winner(example):
            better, worse = ("a", "b") if example["a_wins"] == 1 else ("b", "a")
            question = [{"role": "user", "content": json.loads(example["ask"])[0]}]
            return {
                "chosen": question + [{"role": "assistant", "content": example[better]}],
                "rejected": question + [{"role": "assistant", "content": example[worse]}],
            }

        dataset = dataset.map(by_winner).select_columns(["chosen", "rejected"])
        trainer = RewardTrainer(model="tiny/judge", train_dataset=dataset["train"])
        trainer.train()
    """,
}


def sampled(trainer: str, rewards: str, reward_funcs: str, fields: str = "", dataset: str = "questions") -> str:
    """An online trainer with rewards that are written out in the script."""
    groups = "per_device_train_batch_size=4, num_generations=4, max_completion_length=8, learning_rate=1e-3"
    return f"""
        import asyncio
        import re
        from datasets import load_dataset
        from trl import {trainer}Config, {trainer}Trainer
        from trl.rewards import think_format_reward

        {rewards}

        trainer = {trainer}Trainer(
            model="tiny/chat",
            args={trainer}Config(output_dir="run", {groups}, max_steps=2, {fields}),
            reward_funcs={reward_funcs},
            train_dataset=load_dataset("data/{dataset}", split="train"),
        )
        trainer.train()
    """


def quick_start(trainer: str) -> str:
    """A model, a reward and a dataset, no arguments: groups of the default size, up to 512 tokens."""
    return f"""
        from datasets import load_dataset
        from trl import {trainer}Trainer
        from trl.rewards import accuracy_reward

        dataset = load_dataset("data/maths", split="train")

        trainer = {trainer}Trainer(
            model="tiny/brief",
            reward_funcs=accuracy_reward,
            train_dataset=dataset,
        )
        trainer.train()
    """


TOKENS = """def reward_func(completion_ids, **kwargs):
            return [float(sum(ids)) for ids in completion_ids]"""
LETTERS = """def reward_func(completions, **kwargs):
            return [float(len(set(text))) for text in completions]"""
CONTENTS = """def reward_func(completions, **kwargs):
            contents = [completion[0]["content"] for completion in completions]
            return [1.0 if re.match(r"^<think>.*?</think>", text) else len(text) / 10 for text in contents]"""
TASKS = """def talk_reward(prompts, completions, task, **kwargs):
            return [float(len(set(c))) if t == "talk" else None for p, c, t in zip(prompts, completions, task)]

        def coding_reward(prompts, completions, task, **kwargs):
            return [1.0 if t == "coding" else None for t in task]"""
WAITING = """async def reward_func(prompts, completions, **kwargs):
            await asyncio.sleep(0.01)
            return [float(len(completion)) for completion in completions]"""
LOGGED = """def reward_func(completions, ground_truth, log_extra=None, log_metric=None, **kwargs):
            rewards = [float(len(set(c) & set(truth))) for c, truth in zip(completions, ground_truth)]
            if log_extra:
                log_extra("golden_answer", list(ground_truth))
            if log_metric:
                log_metric("accuracy", sum(rewards) / len(rewards))
            return rewards"""

QUICK_STARTS: dict[str, str] = {"grpo quick start": quick_start("GRPO"), "rloo quick start": quick_start("RLOO")}

ONLINE: dict[str, str] = {
    "rloo letters": sampled("RLOO", LETTERS, "reward_func", "use_vllm=True"),
    "grpo conversations": sampled("GRPO", CONTENTS, "[reward_func, think_format_reward]", dataset="maths"),
    "grpo tasks": sampled("GRPO", TASKS, "[talk_reward, coding_reward]", "reward_weights=[1.0, 2.0]"),
    "grpo async": sampled("GRPO", WAITING, "reward_func", "entropy_coef=0.05"),
    "rloo async": sampled("RLOO", WAITING, "[reward_func, think_format_reward]"),
    "grpo logged": sampled("GRPO", LOGGED, "reward_func", "logging_steps=1, log_completions=True"),
    "grpo judge": sampled("GRPO", LETTERS, "['tiny/judge', reward_func]", "logging_steps=1"),
    "rloo judge": sampled("RLOO", "", "'tiny/judge'"),
    "grpo sequences": sampled(
        "GRPO", TOKENS, "reward_func", "importance_sampling_level='sequence', loss_type='grpo', scale_rewards=False"
    ),
    "grpo adaptive": sampled(
        "GRPO", TOKENS, "reward_func", "loss_type='dr_grpo', entropy_coef=0.01, use_adaptive_entropy=True, beta=0.04"
    ),
}
