"""Hugging Face <-> Megatron as data: configs, names, two-way weight rules. No ranks, no collectives."""
