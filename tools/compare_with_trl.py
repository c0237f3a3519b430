"""Trains the same tiny models with TRL and with megalign and shows every step's numbers side by side.

    python tools/compare_with_trl.py --json FILE [--algorithms dpo kto] [--rows text] [--steps 10]

Whole trainers on both sides, from text to optimizer: one rank, fp32, CPU, the same rows in the same order, one
microbatch a step. Ends with status 1 where two numbers differ by more than --tolerance. The JSON file is a list of
algorithm, step, metric, trl, megalign and difference. TRL comes with tools/requirements-test.txt.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import io
import json
import os
import random
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

ALGORITHMS = {"sft": "SFT", "reward": "Reward", "dpo": "DPO", "kto": "KTO", "orpo": "ORPO"}  # the trainers' names
ENGINES = ("trl", "megalign")
WITH_REFERENCE = ("dpo", "kto")
BATCH = 4
MAX_LENGTH = 72  # cuts the longest rows; Reward would drop them
SPECIAL = ("<bos>", "<eos>", "<|im_start|>", "<|im_end|>")
# The marks say what SFT learns of; TRL needs them, and megalign reads them too.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>\n' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# TRL's are means over prompts and padding as well, so they depend on how rows were put into batches.
OTHERWISE_BY_DESIGN = {"orpo": ("logits/chosen", "logits/rejected")}

Row = dict[str, Any]
Lines = list[dict[str, float]]  # one a step, by metric


class Compared(NamedTuple):
    """One metric of one step."""

    algorithm: str
    step: int
    metric: str
    trl: float
    megalign: float
    difference: float  # without its sign


# ---- the models and the rows


def make_problems(count: int) -> list[dict[str, str]]:
    """Sums in words, each with a right and a wrong answer of quite another length; the same in every run."""
    draw = random.Random(0)
    problems = []
    for _ in range(count):
        numbers = [draw.randint(1, 99) for _ in range(draw.randint(2, 8))]
        question = f"What do you get when you add {', '.join(map(str, numbers))}?"
        right = f" {' + '.join(map(str, numbers))} = {sum(numbers)}, so it is {sum(numbers)}."
        wrong = f" It is {sum(numbers) + draw.randint(1, 9)}."
        if draw.random() < 0.5:
            right, wrong = f" {sum(numbers)}", f"{wrong} Or is it{wrong[6:]} Nobody can say."
        problems.append({"question": question, "right": right, "wrong": wrong})
    return problems


def make_rows(algorithm: str, form: str, count: int) -> list[Row]:
    """The problems as the algorithm's rows. Pairs of text have a prompt of their own, pairs of messages do not."""
    rows = []
    for place, problem in enumerate(make_problems(count)):
        prompt, right, wrong = (_words(form, role, problem[role]) for role in ("question", "right", "wrong"))
        if algorithm == "sft":
            rows.append({"messages": prompt + right} if form == "messages" else {"prompt": prompt, "completion": right})
        elif algorithm == "kto":
            is_right = place % 3 != 1  # both kinds in every step
            rows.append({"prompt": prompt, "completion": right if is_right else wrong, "label": is_right})
        elif form == "messages":
            rows.append({"chosen": prompt + right, "rejected": prompt + wrong})
        else:
            rows.append({"prompt": prompt, "chosen": right, "rejected": wrong})
        if algorithm == "reward":
            rows[-1]["margin"] = place % 5 / 10
    return rows


def _words(form: str, role: str, text: str) -> Any:
    if form == "text":
        return text
    return [{"role": "user" if role == "question" else "assistant", "content": text.strip()}]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the problems' text that puts <bos> before it, as Llama's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=331, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(problem.values()) for problem in make_problems(100)], trainer)
    bos = ("<bos>", tokenizer.token_to_id("<bos>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[bos]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|im_end|>",  # as SmolLM2's: a pad that occurs in rows, whose embedding transformers holds
        bos_token="<bos>",
        eos_token="<eos>",
        chat_template=CHAT_TEMPLATE,
    )


def save_models(directory: Path) -> dict[str, str]:
    """Writes a policy, a reference that differs from it everywhere, and a classifier; returns their paths."""
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        num_labels=1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    kinds = {
        "policy": AutoModelForCausalLM,
        "reference": AutoModelForCausalLM,
        "classifier": AutoModelForSequenceClassification,
    }
    for seed, (name, kind) in enumerate(kinds.items()):
        torch.manual_seed(seed)
        model = kind.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)  # norms that are not 1, attention that is not flat
        model.save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)
    return {name: str(directory / name) for name in kinds}


# ---- the runs


def shared_fields(algorithm: str, options: argparse.Namespace, output_dir: Path) -> dict[str, Any]:
    """The config fields that both are given."""
    fields: dict[str, Any] = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": BATCH,
        "max_steps": options.steps,
        "learning_rate": 1e-3,  # at more, Bradley-Terry on so small a model makes whole steps of rounding
        "lr_scheduler_type": "linear",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "max_length": MAX_LENGTH,
    }
    if algorithm == "reward":
        return {**fields, "max_length": None, "center_rewards_coefficient": 0.01}
    if algorithm == "sft":
        return {**fields, "assistant_only_loss": options.rows == "messages"}
    return fields


def train(engine: str, algorithm: str, options: argparse.Namespace, scratch: Path, paths: dict[str, str]) -> Lines:
    """What the engine's own trainer logs, line by line."""
    from datasets import Dataset

    fields = shared_fields(algorithm, options, scratch / engine / algorithm)
    rows = Dataset.from_list(make_rows(algorithm, options.rows, options.steps * BATCH))
    make = trl_trainer if engine == "trl" else megalign_trainer
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = make(algorithm, fields, rows, paths)
        trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]


def trl_trainer(algorithm: str, fields: dict[str, Any], rows: Any, paths: dict[str, str]) -> Any:
    """TRL's trainer, told to take the rows in order and to use torch's AdamW on the CPU."""
    import trl
    import trl.experimental.orpo as orpo

    package, name = orpo if algorithm == "orpo" else trl, ALGORITHMS[algorithm]
    own = {"train_sampling_strategy": "sequential", "optim": "adamw_torch", "use_cpu": True}
    given = {"processing_class": AutoTokenizer.from_pretrained(paths["policy"]), "train_dataset": rows}
    kind = AutoModelForSequenceClassification if algorithm == "reward" else AutoModelForCausalLM
    model = paths["classifier" if algorithm == "reward" else "policy"]
    loaded = {"model": kind.from_pretrained(model, dtype=torch.float32)}
    if algorithm in WITH_REFERENCE:
        loaded["ref_model"] = kind.from_pretrained(paths["reference"], dtype=torch.float32)
    args = getattr(package, f"{name}Config")(**fields, **own)
    return getattr(package, f"{name}Trainer")(args=args, **loaded, **given)


def megalign_trainer(algorithm: str, fields: dict[str, Any], rows: Any, paths: dict[str, str]) -> Any:
    """megalign's trainer, which reads models and tokenizer from their directories."""
    import megalign

    name = ALGORITHMS[algorithm]
    given = {"ref_model": paths["reference"]} if algorithm in WITH_REFERENCE else {}
    return getattr(megalign, f"{name}Trainer")(
        paths["classifier" if algorithm == "reward" else "policy"],
        args=getattr(megalign, f"{name}Config")(**fields, shuffle_dataset=False),
        train_dataset=rows,
        **given,
    )


# ---- the comparison


def compare(algorithm: str, trl: Lines, megalign: Lines) -> list[Compared]:
    """Every metric that TRL logs, step by step, but for those that differ by design."""
    left_out = ("step", *OTHERWISE_BY_DESIGN.get(algorithm, ()))
    found = []
    for step, (theirs, ours) in enumerate(zip(trl, megalign, strict=True), start=1):
        names = [name for name in theirs if name not in left_out]
        missing = [name for name in names if name not in ours]
        if missing:
            sys.exit(f"megalign: error: {algorithm}: only TRL logs {', '.join(missing)} in step {step}")
        for name in names:
            found.append(Compared(algorithm, step, name, theirs[name], ours[name], abs(theirs[name] - ours[name])))
    return found


def beyond(found: Iterable[Compared], tolerance: float) -> list[Compared]:
    """Those that differ by more than the tolerance, or of which one is not a number."""
    return [one for one in found if not one.difference <= tolerance]


def step_table(algorithm: str, found: Sequence[Compared], tolerance: float) -> Table:
    """Both numbers of each metric and step."""
    table = Table("step", "metric", title=ALGORITHMS[algorithm])
    for heading in (*ENGINES, "difference"):
        table.add_column(heading, justify="right")
    before = 0
    for one in found:
        numbers = f"{one.trl:.6f}", f"{one.megalign:.6f}", f"{one.difference:.1e}"
        style = "red" if beyond([one], tolerance) else None
        table.add_row(str(one.step) if one.step != before else "", one.metric, *numbers, style=style)
        before = one.step
    return table


def summary(found: Sequence[Compared], steps: int) -> Table:
    """The largest difference of each algorithm's loss, rewards and other metrics."""
    table = Table(title=f"largest differences in {steps} steps")
    for heading in ("algorithm", "loss", "difference", "of rewards", "of any metric"):
        table.add_column(heading, justify="left" if heading == "algorithm" else "right")
    for algorithm in dict.fromkeys(one.algorithm for one in found):
        own = [one for one in found if one.algorithm == algorithm]
        losses = [one for one in own if one.metric == "loss"]
        rewards = [one.difference for one in own if "reward" in one.metric]
        worst = max(own, key=lambda one: one.difference)
        table.add_row(
            algorithm,
            f"{losses[0].trl:.4f} -> {losses[-1].trl:.4f}",
            f"{max(one.difference for one in losses):.1e}",
            f"{max(rewards):.1e}" if rewards else "-",
            f"{worst.difference:.1e} ({worst.metric})",
        )
    return table


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file for the list of results")
    parser.add_argument("--algorithms", nargs="+", choices=tuple(ALGORITHMS), default=list(ALGORITHMS))
    parser.add_argument("--rows", choices=("messages", "text"), default="messages")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--tolerance", type=float, default=1e-3)
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error(f"--steps {options.steps} leaves nothing to compare; give 1 or more")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, print, write."""
    options = parse_arguments(arguments)
    if importlib.util.find_spec("trl") is None:
        sys.exit("megalign: error: trl is not installed; tools/install.sh cpu --test installs it")
    # Read by the libraries that are imported from here on.
    os.environ.update(HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")
    console, found, lines = Console(), [], {}
    with tempfile.TemporaryDirectory() as scratch:
        paths = save_models(Path(scratch))
        for engine in ENGINES:  # one after the other: TRL's must not find megalign's process group
            for algorithm in options.algorithms:
                console.print(f"[dim]{engine}: {algorithm}")
                lines[engine, algorithm] = train(engine, algorithm, options, Path(scratch), paths)
    for algorithm in options.algorithms:
        found += compare(algorithm, *(lines[engine, algorithm] for engine in ENGINES))
    options.json.write_text(json.dumps([one._asdict() for one in found], indent=2) + "\n")
    for algorithm in options.algorithms:
        own = [one for one in found if one.algorithm == algorithm]
        console.print(step_table(algorithm, own, options.tolerance))
    console.print(summary(found, options.steps))
    console.print(f"rows: {options.rows}; trl {importlib.metadata.version('trl')}, torch {torch.__version__}, fp32")
    wrong = beyond(found, options.tolerance)
    if wrong:
        sys.exit(f"megalign: error: {len(wrong)} of {len(found)} numbers differ by more than {options.tolerance}")


if __name__ == "__main__":
    main()
