"""Installation: lower bounds only; every stage runs with the plain requirements, on a CPU."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
(VERSION,) = re.findall(r'^__version__ = "(.+)"$', (HERE / "beitv2_jax" / "__init__.py").read_text(), re.MULTILINE)

setup(
    name="beitv2_jax",
    version=VERSION,
    description="BEiT v2 for TPUs and GPUs in JAX and Flax: a visual tokenizer, masked image modelling on its codes, "
    "and their use.",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The beitv2_jax authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords="BEiT, vision transformer, self-supervised learning, masked image modeling, VQ-KD, JAX, Flax, TPU",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    packages=[*find_packages(include=["beitv2_jax", "beitv2_jax.*"]), "beitv2_jax.configs"],
    package_dir={"beitv2_jax.configs": "configs"},
    package_data={"beitv2_jax": ["py.typed", "report/*.html", "data/embedded/teacher/*"]},
    entry_points={"console_scripts": ["beitv2=beitv2_jax.cli:main"]},
    python_requires=">=3.11",
    install_requires=[
        "absl-py>=2.1",
        "array-record>=0.8.1",
        "chex>=0.1.90",
        "etils[epath]>=1.9",
        "flax>=0.12",
        "grain>=0.2.13",
        "importlib_resources>=6",  # tensorflow-datasets imports it without asking for it
        "jax>=0.10",
        "jaxtyping>=0.3",
        "kornia-rs>=0.2",
        "ml_collections>=1.1",
        "ml_dtypes>=0.5",
        "numpy>=2.0",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.11.30",
        "pillow>=10.3",
        "safetensors>=0.5",
        "scipy>=1.12",
        "simplejpeg>=1.8.2",
        "tensorboardX>=2.6.2",
        "tensorflow-datasets>=4.9.9",
        "tqdm>=4.66",
    ],
    extras_require={
        "benchmarks": ["matplotlib>=3.8", "opencv-python-headless>=4.10"],
        "beam": ["apache-beam>=2.69"],
        "browser": ["playwright>=1.45"],  # tests/extras/atlas_test.py; drives a Chromium that is installed already
        "cuda": ["jax[cuda13]>=0.10"],
        "dataflow": ["apache-beam[gcp]>=2.69", "gcsfs>=2024.2"],
        "docs": ["mkdocs-material>=9.5", "mkdocstrings[python]>=0.27"],
        "evaluate": ["matplotlib>=3.8"],
        "export": ["flatbuffers>=24.3"],  # jax needs it to write a function
        "gcs": ["array-record>=0.8.3", "fsspec>=2024.2", "gcsfs>=2024.2", "google-cloud-storage>=2.14"],  # gs://
        "hub": ["huggingface_hub>=0.24"],
        "notebooks": ["ipykernel>=6.29", "matplotlib>=3.8", "nbclient>=0.10"],
        "onnx": ["jax2onnx>=0.17", "onnxruntime>=1.20"],  # in an environment of its own: it needs an older Orbax
        "parquet": ["pyarrow>=15"],
        "peers": ["open_clip_torch>=2.30", "timm>=1.0.9", "torch>=2.6", "transformers>=4.49"],
        "plan": ["jax[tpu]>=0.10"],  # libtpu of the version that this jax compiles with; no TPU is needed
        "plan-gpu": ["jax-cuda13-plugin>=0.10", "jax-cuda13-pjrt>=0.10"],  # the compiler alone; "cuda" runs on GPUs
        "tpu": ["jax[tpu]>=0.10"],
        "wandb": ["wandb>=0.18"],
        "test": [
            "beartype>=0.20",
            "flatbuffers>=24.3",
            "gcsfs>=2024.2",
            "huggingface_hub>=0.24",
            "hypothesis>=6.100",
            "matplotlib>=3.8",
            "pyarrow>=15",
            "pytest>=8.0",
            "pytest-xdist>=3.8",
            "ruff>=0.9",
            "scikit-learn>=1.4",
        ],
    },
)
