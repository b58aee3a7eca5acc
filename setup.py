"""Packaging: `pip install -e .[train]` on a machine that has its own torch.

The tests run with the exact versions of requirements.txt; requirements-oldest.txt pins the floors below.

Only the package is installed. The folders scripts, eval, rewardbench_eval and data are run from the checkout; as
top-level packages their names would collide with other projects'.
"""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="general-preference",
    version="0.1.0",
    description="General Preference Models and Bradley-Terry reward models: training, evaluation, inference",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["general_preference", "general_preference.*"]),
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.13.0",  # the first torchrun with --shutdown-timeout
        "transformers>=5.2.0",
        "huggingface_hub>=1.4.0",
        "tokenizers>=0.22.2",
        "sentencepiece>=0.2.1",  # this and protobuf: a model whose tokenizer is tokenizer.model alone
        "protobuf>=5.29.1",
        "safetensors>=0.7.0",
        "pyyaml>=6.0.2",
        "numpy>=2.1.0",
        "datasets>=4.5.0",
        "pyarrow>=21.0.0",
        "pandas>=2.2.3",
        "scipy>=1.14.1",
        "networkx>=3.4.2",
        "xxhash>=3.5.0",
        "tqdm>=4.67.1",
    ],
    extras_require={
        # Older DeepSpeed has wrong ZeRO-3 gradients on several processes; a newer minor version is not tested.
        "train": [
            "deepspeed>=0.19.6,<0.20",
            "pydantic>=2.12.0",
            "accelerate>=1.12.0",
            "wandb>=0.24.1",
            "matplotlib>=3.10.0",
        ],
        "remote": ["httpx>=0.27.0"],
        "serve": [
            "fastapi>=0.136.0",
            "uvicorn>=0.44.0",
            "prometheus-client>=0.24.1",
            "pydantic>=2.12.0",
            "httpx>=0.27.0",
        ],
        "flash": ["flash-attn"],
        "liger": ["liger-kernel"],
        "lora": ["peft>=0.20.0"],
        "qlora": ["peft>=0.20.0", "bitsandbytes>=0.46.1"],
        "dev": [
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "peft>=0.20.0",
            "trl>=1.16.0",
            "nbclient",
            "ipykernel",
        ],
    },
)
