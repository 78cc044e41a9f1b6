"""The configuration of a boosted model."""

# no `from __future__ import annotations` here: the configuration's types are checked at run time
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from ds_llm.compat.hf_model import CACHE
from ds_llm.compat.transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING
from ds_llm.models import predecessor

OWN_KEYS = ("num_sub_models", "sub_model_cfgs", "fusion_lambda", "is_llmboost", "connection")


@strict
class QwenBoostConfig(PreTrainedConfig):
    """Configuration of a boosted model.

    num_sub_models (also read as `num_submodels`): how many; sub_model_cfgs: the configuration of each, as dictionaries
    with `model_type`; fusion_lambda: weight of the second of two; is_llmboost: each sees what its predecessor sees,
    `connection` says how (linear, gated). All five may also stand in a dictionary `ensemble_config`. Where
    `sub_model_cfgs` is missing, every sub-model has the architecture that the rest of the file describes.

    Raises ValueError (`huggingface_hub.errors.StrictDataclassError` where only a type is wrong) for what does not fit
    together.
    """

    model_type = "qwen_boost"
    has_no_defaults_at_init = True
    attribute_map = {"num_submodels": "num_sub_models"}  # noqa: RUF012 (transformers reads it from the class)
    keys_to_ignore_at_inference = [CACHE]  # noqa: RUF012

    num_sub_models: int | None = None
    sub_model_cfgs: list[dict] | None = None
    fusion_lambda: float | int = 0.5
    is_llmboost: bool = False
    connection: str = "linear"

    def __post_init__(self, **kwargs):
        if not self.sub_model_cfgs:
            raise ValueError("a boosted model's configuration needs sub_model_cfgs")
        super().__post_init__(**kwargs)
        parts = [sub_config(values) for values in self.sub_model_cfgs]
        texts = [part.get_text_config() for part in parts]
        self.sub_model_cfgs = [part.to_dict() for part in parts]
        self.num_sub_models = len(parts) if self.num_sub_models is None else self.num_sub_models
        self._check([text.vocab_size for text in texts])
        first = texts[0]
        self.vocab_size, self.hidden_size = first.vocab_size, first.hidden_size
        limits = [n for text in texts if (n := getattr(text, "max_position_embeddings", None))]
        self.max_position_embeddings = min(limits, default=None)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(self, name, None) is None:
                setattr(self, name, getattr(first, name, None))
        self.tie_word_embeddings = False  # a sub-model ties its own where its configuration says so
        self.use_cache = True
        # one cache holds the layers of all sub-models, one behind the other
        self.num_hidden_layers = sum(text.num_hidden_layers for text in texts)
        self.layer_types = [kind for text in texts for kind in _layer_types(text)]
        windows = {w for text in texts if (w := getattr(text, "sliding_window", None))}
        if len(windows) > 1:
            raise ValueError(f"sub_model_cfgs: attention windows differ ({', '.join(map(str, sorted(windows)))})")
        self.sliding_window = windows.pop() if windows else None

    def _check(self, vocabularies: list[int]) -> None:
        if self.num_sub_models != len(vocabularies) or self.num_sub_models < 2:
            raise ValueError(
                f"num_sub_models: {self.num_sub_models}, with {len(vocabularies)} sub_model_cfgs; it takes at least two"
            )
        if len(set(vocabularies)) > 1:
            raise ValueError(f"sub_model_cfgs: vocabularies differ ({', '.join(map(str, vocabularies))})")
        if not 0 <= self.fusion_lambda <= 1:
            raise ValueError(f"fusion_lambda: {self.fusion_lambda} is not between 0 and 1")
        if self.connection not in predecessor.CONNECTIONS:
            raise ValueError(f"connection: '{self.connection}' is not one of {', '.join(predecessor.CONNECTIONS)}")

    @property
    def vote(self) -> list[float]:
        """Weight of each sub-model's logits."""
        if self.num_sub_models == 2:
            return [1 - self.fusion_lambda, self.fusion_lambda]
        return [1 / self.num_sub_models] * self.num_sub_models

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        values = dict(config_dict)
        nested = values.pop("ensemble_config", None) or {}
        kind = values.pop("model_type", None)
        for name in OWN_KEYS:
            found = [d[key] for d in (values, nested) for key in (name, name.replace("sub_m", "subm")) if key in d]
            if found:
                values[name] = found[0]
        values.pop("num_submodels", None)
        if not values.get("sub_model_cfgs") and kind in CONFIG_MAPPING and kind != cls.model_type:
            rest = {k: v for k, v in values.items() if k not in (*OWN_KEYS, "architectures")}
            values["sub_model_cfgs"] = [{**rest, "model_type": kind}] * (values.get("num_sub_models") or 0)
        return super().from_dict(values, **kwargs)


def sub_config(values: dict) -> PreTrainedConfig:
    """The configuration of one sub-model. Raises ValueError for what is no causal language model."""
    kind = values.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"sub_model_cfgs: model_type '{kind}' is not known to this version of transformers")
    config = CONFIG_MAPPING[kind].from_dict({k: v for k, v in values.items() if k != "model_type"})
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"sub_model_cfgs: a '{kind}' model is not a causal language model")
    return config


def _layer_types(config: PreTrainedConfig) -> list[str]:
    """Kind of cache that each layer needs."""
    usual = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    return getattr(config, "layer_types", None) or [usual] * config.num_hidden_layers
