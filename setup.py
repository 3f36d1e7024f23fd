"""Installation: lower bounds only; every stage runs with the plain requirements, on a CPU."""

from setuptools import find_packages, setup

setup(
    name="beitv2_jax",
    version="0.1.0",
    description="BEiT v2 in JAX/Flax: a visual tokenizer, masked image modelling on its codes, and their use.",
    packages=find_packages(include=["beitv2_jax", "beitv2_jax.*"]),
    python_requires=">=3.11",
    install_requires=[
        "absl-py>=2.1",
        "array-record>=0.8.1",
        "chex>=0.1.90",
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
        "cuda": ["jax[cuda13]>=0.10"],
        "dataflow": ["apache-beam[gcp]>=2.69", "gcsfs>=2024.2"],
        "peers": ["open_clip_torch>=2.30", "timm>=1.0.9", "torch>=2.6", "transformers>=4.49"],
        "plan": ["jax[tpu]>=0.10"],  # libtpu of the version that this jax compiles with; no TPU is needed
        "plan-gpu": ["jax-cuda13-plugin>=0.10", "jax-cuda13-pjrt>=0.10"],  # the compiler alone; "cuda" runs on GPUs
        "tpu": ["jax[tpu]>=0.10"],
        "test": ["beartype>=0.20", "hypothesis>=6.100", "pytest>=8.0", "pytest-xdist>=3.8", "ruff>=0.9"],
    },
)
