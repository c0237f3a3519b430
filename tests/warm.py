"""Imported once by the server that test ranks are forked from, so that a rank starts in a tenth of a second."""

import warnings

warnings.filterwarnings("ignore")

import megatron.core.models.gpt  # noqa: E402, F401
import megatron.core.pipeline_parallel  # noqa: E402, F401
import transformers.models.llama.modeling_llama  # noqa: E402, F401
import transformers.models.qwen2.modeling_qwen2  # noqa: E402, F401
import transformers.models.qwen3.modeling_qwen3  # noqa: E402, F401

import megalign.trainers.grpo  # noqa: E402, F401
import megalign.trainers.sft  # noqa: E402, F401
