"""Megatron's warnings and log lines that are known and mean nothing here. Whatever is not listed is shown."""

from __future__ import annotations

import logging
import re
import warnings

# Said on every rank, module by module, of what is chosen here: plain torch where Transformer Engine and Apex are not
# used. The calls of torch's that are old are upstream's to renew.
_WARNINGS = (
    ("Transformer Engine and Apex are not installed", UserWarning),
    ("Apex is not installed. Falling back to Torch Norm", UserWarning),
    ("If you are using transformer_engine as the transformer implementation", UserWarning),
    ("full scope is deprecated. Use empty cuda_graph_", UserWarning),  # transformer_config.py:1705/2415, by default
    ("MimoModelConfig is experimental", UserWarning),  # 0.19.2's optimizer imports it
    ("The .grad attribute of a Tensor that is not a leaf Tensor is being accessed", UserWarning),  # optimizer.py:66
    ("`torch.distributed.reduce_scatter_tensor` is deprecated", FutureWarning),
    ("`torch.distributed.all_gather_into_tensor` is deprecated", FutureWarning),
    ("Please use DTensor instead and we are deprecating ShardedTensor", FutureWarning),
    # Checkpoints, strategies/torch.py: 0.16.1's call of torch's at :799; 0.19.2's at :979, which loads rank by rank.
    ("`load_state_dict` is deprecated and will be removed in future versions", FutureWarning),
    ("The argument order of load has been changed", UserWarning),
    ("torch.distributed is disabled, unavailable or uninitialized, assuming the intent is to load", UserWarning),
)
# 0.19.2's: 0.16 has no HybridModel; DDP makes the layout itself when it is given none, which 0.16 always does; a
# synchronous save goes through the code of the asynchronous one.
_LOGS = (
    ("megatron.core.models.gpt.gpt_model", "GPTModel IS DEPRECATED"),
    ("megatron.core.distributed.distributed_data_parallel", "DistributedDataParallel: full_param_layout not provided"),
    ("megatron.core.dist_checkpointing.strategies.torch", "MCore's async save is deprecated"),
)
# tensor_parallel/layers.py:738/856; good advice on a GPU.
_ON_A_CPU = ("When using async grad allreduce it is recommended to set the environment variable", UserWarning)


def silence_known() -> None:
    """Hides the warnings, and what the loggers of those names say, that begin like this."""
    for start, category in _WARNINGS:
        _silence(start, category)
    for name, start in _LOGS:
        logging.getLogger(name).addFilter(lambda record, start=start: not record.getMessage().startswith(start))


def silence_known_on_a_cpu() -> None:
    """The same for what a CPU hears and should not."""
    _silence(*_ON_A_CPU)


def _silence(start: str, category: type[Warning]) -> None:
    warnings.filterwarnings("ignore", message=re.escape(start), category=category)
