"""Installs the library. `kernels/` is importable as `ds_llm.kernels`; nothing is installed as a top-level `kernels`."""

from setuptools import find_packages, setup

INSTALL = [
    "torch>=2.11,<2.14",  # tensors, autograd, SDPA, grouped matrix products
    "deepspeed>=0.19.8,<0.19.9",  # ZeRO, the launcher, CPU-Adam; its patch releases change what we work with
    "transformers>=5.17,<5.25",  # models, tokenizer loading, generation
    "tokenizers>=0.22",  # BPE training and parallel encoding
    "safetensors>=0.6",  # model files without pickle
    "peft>=0.19,<0.22",  # low-rank adapters
    "datasets>=4.0,<5.3",  # data sets by hub name
    "omegaconf>=2.3",  # typed configuration, YAML and key=value overrides
    "rich>=13",  # progress, tables, readable terminal output
    "numpy>=1.26",  # token files
    "pyarrow>=17",  # Parquet input
    "zstandard>=0.22",  # .jsonl.zst input
    "psutil>=5.9",  # memory of a process without a GPU
    "filelock>=3.12",  # one preparation at a time per output
    "scikit-learn>=1.5",  # clustering, principal components
    "matplotlib>=3.8",  # histograms and report plots
    "jinja2>=3.1.6",  # chat templates (transformers 5.22 asks for this version), the HTML report
    "tensorboard>=2.16",  # event files
    "ninja>=1.11",  # DeepSpeed compiles CPU-Adam and the shared-memory communication on first use
]
EXTRAS = {
    "wandb": ["wandb>=0.17"],  # online or offline tracking
    "metrics": [
        "sacrebleu>=2.3",  # BLEU and chrF of generated answers
        "rouge-score>=0.1.2",  # ROUGE of generated answers
    ],
    "sweep": [
        "optuna>=5.0,<5.1",  # chooses the values of trials: TPE, random; importance of parameters
        "scipy>=1.10",  # beta distributions
    ],
    "eval": ["lm-eval>=0.4.13,<0.4.14", "accelerate>=1.0"],  # benchmarks: prompts, metrics, standard errors
    "gguf": ["gguf>=0.10", "accelerate>=1.0"],  # loads GGUF checkpoints through transformers
    "qlora": ["bitsandbytes>=0.45", "accelerate>=1.0"],  # base models held in 4 bits under adapters
    "gpu": ["triton>=3.6,<3.10", "liger-kernel>=0.5"],  # kernels on CUDA devices
    "flash-attn": ["flash-attn>=2.7"],  # variable-length attention on CUDA devices
}
EXTRAS["test"] = [
    *EXTRAS["wandb"],
    *EXTRAS["metrics"],
    *EXTRAS["sweep"],
    *EXTRAS["eval"],
    *EXTRAS["gguf"],
    "triton>=3.6,<3.10",  # the interpreter and the sm_80 / sm_90 compiler run without a GPU
    "pytest>=8",
    "pytest-timeout>=2.3",  # a hang fails instead of stopping the suite
    "pytest-xdist>=3.6",  # two files of tests at once: most wait for processes to start
    "hypothesis>=6.100",  # fresh random shapes
    "ruff>=0.6",
    "import-linter>=2.7",  # holds the rooms of ds_llm in their order
]

setup(
    name="ds_llm",
    version="0.1.0",
    description="DeepSpeed trainer for language models: pretraining, fine-tuning, data selection, sparse models",
    python_requires=">=3.11,<3.14",
    packages=[*find_packages(include=["ds_llm", "ds_llm.*"]), "ds_llm.kernels"],
    package_dir={"ds_llm.kernels": "kernels"},
    package_data={"ds_llm.data": ["templates/*.jinja"]},
    install_requires=INSTALL,
    extras_require=EXTRAS,
)
