"""The sections of a run's configuration that every mode reads: their keys, each with its meaning, bounds and default.

Sections of single modes and of adapters are in `ds_llm.config.mode_sections`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ds_llm.config.options import key
from ds_llm.config.text_metrics import METRICS
from ds_llm.config.text_metrics import TOKENIZERS as WORD_TOKENIZERS

DTYPES = ("fp32", "bf16", "fp16")


@dataclass
class ModelConfig:
    path: str | None = key(
        None, "Folder or hub name of a model to start from; none builds the decoder below from scratch"
    )
    config: str | None = key(
        None, "pretrain: folder, JSON file or hub name of an architecture to train from scratch, not the decoder below"
    )
    add_tokens: list[str] = key(
        [], "conversations: special tokens added to the vocabulary; their embeddings start as the mean of all others"
    )
    freeze: list[str] = key(
        [],
        "Parts of the model at model.path that keep their weights: beginnings of parameter names, as [sub_models.0], "
        "the first model of a boosted one",
    )
    dim: int = key(512, "Hidden size", at_least=1)
    n_layers: int = key(8, "Number of layers", at_least=1)
    n_heads: int = key(8, "Number of attention heads", at_least=1)
    n_kv_heads: int | None = key(None, "Number of key/value heads (GQA); none: as many as n_heads", at_least=1)
    vocab_size: int | None = key(None, "Vocabulary size; none: the tokenizer's", at_least=1)
    max_seq_len: int = key(512, "Longest sequence in tokens", at_least=1)
    rope_theta: float = key(10000.0, "Base of the rotary frequencies", above=0)
    rope_scaling: Any = key(
        None, "Scaled rotary positions as transformers writes them: {rope_type: linear, llama3 or yarn, factor: ...}"
    )
    qk_norm: bool = key(False, "RMSNorm of each head's queries and keys before the rotation, as in Qwen3")
    sliding_window: int | None = key(None, "Tokens that a token sees, its own among them; none: all", at_least=1)
    full_attention_every: int = key(
        0, "With sliding_window: every so many layers one that sees all tokens; 0: none", at_least=0
    )
    norm_eps: float = key(1e-6, "Epsilon of RMSNorm", above=0)
    dropout: float = key(0.0, "Dropout probability on attention and MLP outputs", at_least=0, below=1)
    multiple_of: int = key(64, "The MLP width is rounded up to a multiple of this", at_least=1)
    intermediate_size: int | None = key(None, "MLP width; none: 8/3 of dim, rounded up to multiple_of", at_least=1)
    tie_embeddings: bool = key(True, "Use the token embedding as the output head")
    attention: str = key(
        "auto",
        "Attention kernel; auto takes flash-attn on a GPU where it is installed, else SDPA",
        choices=("auto", "sdpa", "flash_attention_2", "eager"),
    )
    use_moe: bool = key(False, "Replace the MLP of every layer by a mixture of experts")
    n_routed_experts: int = key(8, "Number of routed experts", at_least=1, at_most=512)
    num_experts_per_tok: int = key(2, "Experts a token is sent to", at_least=1)
    n_shared_experts: int = key(0, "Experts every token passes, beside the routed ones", at_least=0)
    moe_intermediate_size: int | None = key(None, "Width of one expert; none: as the dense MLP", at_least=1)
    first_dense_layers: int = key(0, "With use_moe: so many first layers keep a dense MLP", at_least=0)
    router_bias_speed: float = key(
        0.0,
        "Balance experts by a bias on their scores, moved by so much each step (arXiv:2408.15664, there 0.001); 0: off",
        at_least=0,
    )
    scoring_func: str = key("softmax", "Router scores", choices=("softmax", "sigmoid"))
    norm_topk_prob: bool = key(True, "Normalise the weights of the chosen experts to sum to 1")
    aux_loss_alpha: float = key(0.01, "Weight of the load-balancing loss", at_least=0)
    seq_aux: bool = key(True, "Balance experts within each sequence; false: over the whole micro-batch")
    z_loss_alpha: float = key(
        0.0, "Weight of the router z-loss (mean squared logsumexp of the router logits)", at_least=0
    )


@dataclass
class DataConfig:
    train: list[str] = key(
        [],
        "pretrain: token files (.bin). sparse, router: these or conversations. All others: JSONL, JSON or Parquet "
        "files, folders, patterns or hub names",
    )
    val: list[str] = key(
        [],
        "What to evaluate on, of the same kind as data.train, or for token files any texts (.txt, .jsonl, .parquet); "
        "empty: no evaluation",
    )
    chat_template: str | None = key(
        None,
        "conversations: chat template, a .jinja file or chatml, llama3, gemma, mistral, alpaca; none: the tokenizer's",
    )
    tokenizer: str | None = key(None, "Tokenizer folder; none: the one recorded beside the token file, else model.path")
    seq_len: int | None = key(
        None, "Tokens of a training sample, and of the longest conversation; none: model.max_seq_len", at_least=2
    )
    isolate_documents: bool = key(
        True, "pretrain: restart positions and attention at document boundaries within a sample; sft always does"
    )
    format: str = key(
        "auto",
        "sft: format of the rows; auto recognises it by their fields",
        choices=("auto", "messages", "prompt_completion", "alpaca", "text"),
    )
    train_on: str = key(
        "all", "sft: assistant turns that are learned; last: only a conversation's last one", choices=("all", "last")
    )
    truncate: str = key(
        "right",
        "conversations: what happens to samples longer than data.seq_len; right: cut their end off",
        choices=("right", "drop"),
    )
    weights: list[float] = key(
        [],
        "pretrain, sft: how often an epoch takes each data.train entry; 0.5: half of it, 2: it all twice; empty: once",
    )
    subset_ratio: float | None = key(
        None,
        "router: share of the samples that is trained on, drawn once by train.seed; none: 0.05",
        above=0,
        at_most=1,
    )
    packing: bool = key(
        True, "sft: put several samples into a row of data.seq_len tokens; false: batches of samples of similar length"
    )
    tokens_per_batch: int | None = key(
        None,
        "sft without packing: tokens of a micro-batch, padding included; none: 4 x data.seq_len. train.batch_size "
        "must be 1",
        at_least=2,
    )


@dataclass
class OptimConfig:
    name: str = key("adamw", "Optimizer", choices=("adamw", "adam", "muon", "lion", "adamw8bit"))
    lr: float = key(5e-4, "Peak learning rate", above=0)
    muon_lr: float = key(
        0.02, "Peak learning rate of the matrices under muon; all other weights are trained by AdamW at lr", above=0
    )
    momentum: float = key(0.95, "Muon's decay rate of the momentum", at_least=0, below=1)
    betas: list[float] = key([0.9, 0.95], "Decay rates of Adam's two moments; of Lion's update and its momentum")
    eps: float = key(1e-8, "Adam's epsilon", above=0)
    weight_decay: float = key(
        0.1, "Weight decay (L2 for adam, decoupled for the others); not on norms, biases and 1-D weights", at_least=0
    )
    grad_clip: float = key(1.0, "Largest global gradient norm; 0 turns clipping off", at_least=0)
    schedule: str = key(
        "cosine", "Learning-rate curve after warm-up", choices=("cosine", "linear", "polynomial", "constant", "wsd")
    )
    warmup_steps: int | None = key(None, "Warm-up steps; none: warmup_ratio", at_least=0)
    warmup_ratio: float = key(0.02, "Warm-up as a share of all steps, when warmup_steps is none", at_least=0, at_most=1)
    min_lr_ratio: float = key(0.1, "Final learning rate as a share of the peak", at_least=0, at_most=1)
    power: float = key(2.0, "Exponent of the polynomial schedule", above=0)
    decay_ratio: float = key(0.2, "Share of all steps in the final decay of the wsd schedule", at_least=0, at_most=1)


@dataclass
class TrainConfig:
    epochs: float = key(1.0, "Passes over the data", above=0)
    max_steps: int | None = key(None, "Optimizer steps; overrides epochs", at_least=1)
    batch_size: int = key(8, "Samples per rank and micro-step", at_least=1)
    accumulation_steps: int = key(1, "Micro-steps per optimizer step", at_least=1)
    dtype: str = key("bf16", "Numbers of the forward and backward pass", choices=DTYPES)
    activation_checkpointing: bool = key(False, "Recompute layers in the backward pass to save memory")
    kernels: bool = key(True, "Use the project's RoPE and routing kernels in supported transformers models")
    seed: int = key(0, "Seed of initialisation, sample order and dropout", at_least=0)


@dataclass
class EmaConfig:
    enabled: bool = key(
        False, "Keep an exponential moving average of the trained weights; it is evaluated and exported"
    )
    decay: float = key(0.999, "Share of the old average kept at each step", at_least=0, below=1)


@dataclass
class EvalConfig:
    before: bool = key(True, "Evaluate before the first step, as the baseline of the trend")
    every_steps: int = key(0, "Also evaluate every so many steps; 0: only at the end of each epoch", at_least=0)
    batch_size: int | None = key(None, "Rows per forward pass; none: train.batch_size", at_least=1)
    token_length: int | None = key(
        None, "pretrain: window of the perplexity protocol; none: the training sequence length", at_least=2
    )
    stride: int | None = key(None, "pretrain: step between windows; none: token_length (no overlap)", at_least=1)
    max_windows: int = key(0, "Use only the first windows, or packs, pairs, answers; 0: all", at_least=0)
    prompts: list[str] = key(
        [], "Prompts answered greedily at every evaluation and logged; with conversations as a chat"
    )
    max_new_tokens: int = key(64, "Tokens generated per prompt", at_least=1)
    generation_metrics: list[str] = key(
        [],
        "Compare greedy answers to prompts with the references of their rows at every evaluation",
        choices=tuple(METRICS),
    )
    generation_data: list[str] = key(
        [], "Rows with prompts and references, as conversations or prompt and completion; empty: data.val"
    )
    generation_rows: int = key(64, "Use only the first usable rows; 0: all", at_least=0)
    generation_tokenizer: str = key(
        "13a",
        "What BLEU and ROUGE count as words: 13a for English and its like, zh for Chinese, intl, char",
        choices=WORD_TOKENIZERS,
    )
    early_stopping: bool = key(False, "Stop when the perplexity has not improved for `patience` evaluations")
    patience: int = key(5, "Evaluations without improvement before stopping", at_least=1)


@dataclass
class CheckpointConfig:
    every_steps: int = key(
        1000, "Save every so many steps; 0: only at the end of each epoch and of the run", at_least=0
    )
    every_epoch: bool = key(True, "Save at the end of each epoch")
    keep: int = key(3, "Newest checkpoints kept; the best one is kept besides; 0 keeps all", at_least=0)
    best: bool = key(True, "Save when the perplexity is the best so far, and keep that checkpoint")
    last: bool = key(True, "Save at the end of the run")
    elastic: bool = key(True, "Continue on other numbers of processes and other ZeRO stages too; false: refuse them")


@dataclass
class StabilityConfig:
    max_bad_steps: int = key(10, "End the run after so many skipped steps in a row", at_least=1)
    spike_factor: float = key(
        0.0, "Skip a step whose loss exceeds this multiple of the recent median; 0: off", at_least=0
    )
    spike_window: int = key(50, "Steps the recent median is taken over", at_least=2)
    hang_timeout: float = key(
        1800.0,
        "Seconds within which a step or an evaluation's batch must end, else the run ends with the stacks of all "
        "processes; 0: no limit",
        at_least=0,
    )
    lost_timeout: float = key(
        120.0, "Seconds without a sign of life until a process counts as lost, which ends the run", above=0
    )


@dataclass
class ParallelConfig:
    expert: int = key(
        1, "Processes that share the experts of every layer; each holds its part of them, and tokens travel", at_least=1
    )
    sequence: int = key(
        1, "Processes that share the rows of a micro-batch; each computes on its part of every row's tokens", at_least=1
    )
    tensor: int = key(
        1, "Processes that share every attention and MLP layer; each holds a slice of its weights", at_least=1
    )


@dataclass
class WandbConfig:
    enabled: bool = key(False, "Log to Weights & Biases")
    project: str = key("ds_llm", "Project name")
    run_name: str | None = key(None, "Run name; none: the output folder's name")
    mode: str = key("online", "offline writes to disk for `wandb sync`", choices=("online", "offline", "disabled"))
    log_model: bool = key(False, "Upload the exported model as an artifact")
    log_code: bool = key(False, "Upload the source and the resolved configuration as an artifact")
    log_every: int = key(1, "Steps between points sent", at_least=1)
    watch: str = key(
        "none", "Histograms of the parameters and gradients", choices=("none", "gradients", "parameters", "all")
    )
    watch_every: int = key(100, "Steps between histograms", at_least=1)


@dataclass
class TrackingConfig:
    log_every: int = key(10, "Steps between progress lines on a non-terminal", at_least=1)
    tensorboard: bool = key(True, "Write TensorBoard event files")
    report: bool = key(True, "Write report.html at every evaluation and at the end")
    wandb: WandbConfig = field(default_factory=WandbConfig)
