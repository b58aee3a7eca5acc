"""Packaging: `pip install -e .` on a machine that has its own torch; exact versions stand in requirements.txt.

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
        "torch>=2.9",
        "transformers>=5",
        "safetensors",
        "datasets>=4",
        "scipy",
        "xxhash",
        "tqdm",
    ],
    extras_require={
        "train": ["deepspeed>=0.18", "wandb", "matplotlib"],
        "flash": ["flash-attn"],
        "liger": ["liger-kernel"],
        "lora": ["peft>=0.18"],
        "qlora": ["peft>=0.18", "bitsandbytes>=0.46.1"],
        "dev": ["pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "ruff", "peft>=0.18", "trl"],
    },
)
