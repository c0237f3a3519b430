"""Are a Hugging Face directory and a torch_dist checkpoint one model? Exit status 1 when they are not.

    python tools/check_conversion.py --hf DIR --checkpoint CKPT [--tolerance 1e-4] [--text "..." | --no-logits]

Every tensor is converted back and compared with the directory's. Then Megatron-Core loads the checkpoint, transformers
the directory, both in fp32, and their logits on the text (a reward model's scores) are compared: this needs memory for
both models.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

TEXT = "The quick brown fox jumps over the lazy dog. 12 + 7 = 19, and so on."


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    options = parse_arguments(arguments)
    # After --help has been answered.
    from megalign.checkpoints.check import differences
    from megalign.failure import report_uncaught

    report_uncaught()
    found = list(differences(options.hf, options.checkpoint))
    far = [difference for difference in found if not difference.largest <= options.tolerance]
    same = sum(difference.bitwise for difference in found)
    print(f"tensors: {len(found)}, {same} of them bitwise equal, {len(far)} past the tolerance {options.tolerance:g}")
    for name, largest, _ in far:
        print(f"  {name}: {largest:.3g}")
    failed = bool(far)
    if not options.no_logits:
        largest = logit_difference(options.hf, options.checkpoint, options.text)
        failed |= not largest <= options.tolerance
        print(f"{_outputs(options.hf)}: largest difference {largest:.3g}")
    sys.exit(int(failed))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", type=Path, required=True, metavar="DIR")
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="CKPT")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="largest difference of a number (default: 1e-4)")
    parser.add_argument("--text", default=TEXT)
    parser.add_argument("--no-logits", action="store_true", help="tensors alone, in bounded memory")
    options = parser.parse_args(arguments)
    if not options.tolerance >= 0 or math.isinf(options.tolerance):
        parser.error(f"--tolerance {options.tolerance} must be a number of at least 0")
    return options


def logit_difference(hf: Path, checkpoint: Path, text: str) -> float:
    """Between Megatron's logits from the checkpoint and transformers' from the directory."""
    tokens = tokens_of(hf, text)
    return (megatron_logits(hf, checkpoint, tokens) - transformers_logits(hf, tokens)).abs().max().item()


def transformers_logits(hf: Path, tokens: Tensor) -> Tensor:
    """[T, vocabulary]; a reward model's scores of the text up to each token, [T, 1]."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    scores = _outputs(hf) == "scores"
    kind = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    model = kind.from_pretrained(hf, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        if scores:  # its forward answers for one token
            return model.score(model.base_model(tokens[None]).last_hidden_state)[0].float()
        return model(tokens[None]).logits[0].float()


def tokens_of(hf: Path, text: str) -> Tensor:
    """The text's tokens; its bytes as ids where the directory has no tokenizer."""
    import torch
    from transformers import AutoTokenizer

    from megalign.conversion.hf_files import read_config

    if (hf / "tokenizer_config.json").exists():
        return torch.tensor(AutoTokenizer.from_pretrained(hf)(text)["input_ids"])
    size = read_config(hf)["vocab_size"]
    print(f"{hf} has no tokenizer: the text's bytes are taken for tokens")
    return torch.tensor([byte % size for byte in text.encode()])


def megatron_logits(hf: Path, checkpoint: Path, tokens: Tensor) -> Tensor:
    """[T, vocabulary] of one rank, or the scores [T, 1]."""
    import torch

    from megalign.batch import Batch
    from megalign.checkpoints.find import engine_directory
    from megalign.config import SFTConfig
    from megalign.conversion.families import architecture_of
    from megalign.conversion.hf_files import read_config
    from megalign.model import checkpoint as megatron_checkpoint
    from megalign.model.attention import PackedSequences
    from megalign.model.build import build_model
    from megalign.parallel.groups import initialize

    args = SFTConfig(output_dir="unused", bf16=False)
    groups, architecture = initialize(args), architecture_of(read_config(hf))
    (model,) = build_model(architecture, args, groups)
    megatron_checkpoint.load(str(engine_directory(checkpoint)), [model], None)
    lengths = torch.tensor([0, len(tokens)], dtype=torch.int32)
    packed = PackedSequences.of(Batch(tokens=tokens, cu_seqlens=lengths, num_sequences=1), groups.cp)
    with torch.no_grad():
        hidden = model(tokens[None], torch.arange(len(tokens))[None], None, packed_seq_params=packed)[:, 0]
        if architecture.num_labels is not None:
            return torch.nn.functional.linear(hidden, model.head_weight)
        logits = torch.nn.functional.linear(hidden, model.head_weight, model.head_bias)[:, : architecture.vocab_size]
    cap = architecture.logit_softcap
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _outputs(hf: Path) -> str:
    """What the two models are compared by."""
    from megalign.conversion.families import is_classifier
    from megalign.conversion.hf_files import read_config

    return "scores" if is_classifier(read_config(hf)) else "logits"


if __name__ == "__main__":
    main()
