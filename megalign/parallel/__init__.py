import megalign.patches.megatron  # noqa: F401  (before Megatron itself)
