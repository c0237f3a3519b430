"""What needs a CUDA device: one rank over NCCL. Skipped without one.

    MEGALIGN_MEGATRON=0.19.2 python -m pytest tests/gpu

MEGALIGN_GPU_TESTS_ON_CPU=1 runs them on a CPU, to try the tests themselves; what asks for the GPU's memory,
Transformer Engine or vLLM stays out.
"""
