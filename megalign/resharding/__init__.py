"""Weights into and out of a distributed Megatron model: from Hugging Face files, to streams, files, vLLM."""
