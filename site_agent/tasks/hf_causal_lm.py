"""`hf-causal-lm`: any causal language model of Hugging Face transformers, from a directory on this machine.

The model is what `config.json` says; its weights come from the seed, or, for continued pre-training, from the directory
that `[run] init` names. Nothing is fetched, and no code of a model's own is run: a model that needs some is refused.

The data are files of text, JSONL or Parquet, tokenised once (`token_files.py`), or token ids as they are. As in
`byte-lm`, they are opened at the first use: a coordinator has none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import xxhash
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from shared.errors import ConfigError
from site_agent.tasks.options import Partition, library, validated
from site_agent.tasks.sampling import continued_text
from site_agent.tasks.text import Text, cut
from site_agent.tasks.token_files import read_tokens
from site_agent.tasks.token_loss import token_loss
from site_agent.tasks.tokenizer import Tokenizer, load_tokenizer
from site_agent.tasks.windowed import WindowTask

NOT_THE_FUNCTION = (
    "_name_or_path",
    "_commit_hash",
    "_attn_implementation",
    "attn_implementation",
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)
"""Keys of a config.json that say nothing about what the model computes."""


class HFCausalLMOptions(BaseModel):
    """Keys of the `[task]` and `[data]` tables. Each description completes "…; give …"."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    model: str = Field(min_length=1, description="a directory that has a config.json, or a config.json")
    tokenizer: str = Field("", description="a tokenizer.json, or a directory that has one (absent: the model's)")
    context: int = Field(1024, ge=1, le=2**24, description="tokens the model sees at once, a whole number from 1")
    paths: str | list[str] = Field([], description="a file, a directory, a pattern, or a list of them")
    text_key: str = Field("text", min_length=1, description="the key or column that holds the text, a string")
    token_dtype: Literal["uint16", "uint32"] = Field("uint16", description='"uint16" or "uint32"')
    held_out: float = Field(0.05, gt=0, lt=1, description="the held-out share of the data, between 0 and 1")
    block_tokens: int = Field(16_384, ge=2, le=2**40, description="a whole number above context")
    partition: Partition = Field("sharded", description='"sharded", "contiguous", "local" or "leased"')
    eval_batches: int = Field(32, ge=1, le=10**6, description="the most batches in an evaluation, from 1")
    attention: Literal["sdpa", "eager", "flash_attention_2"] = Field(
        "sdpa", description='"sdpa", "eager" or "flash_attention_2"'
    )
    cache: str = Field("", description="a directory for tokenised data (absent: ~/.cache/isthmus/tokens)")

    @model_validator(mode="after")
    def _combinations(self) -> HFCausalLMOptions:
        if self.block_tokens <= self.context:
            raise ValueError(
                f"[task] block_tokens: {self.block_tokens} holds no window of context + 1 = {self.context + 1} tokens; "
                f"give {self.context + 1} or more, or a smaller context"
            )
        return self


class HFCausalLM(WindowTask[HFCausalLMOptions]):
    """Next-token prediction. Batches are (B, T+1) int64, T the context."""

    path_options = ("paths", "model", "tokenizer", "cache")

    def __init__(self, options: Mapping[str, Any]) -> None:
        """Raises ConfigError for unknown keys and for values that will not do."""
        super().__init__(options)
        self.settings = validated(HFCausalLMOptions, self.options, "hf-causal-lm")

    # ---- the model

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """None where none is named and the model's directory has none: data that is tokenised needs none."""
        if self.settings.tokenizer:
            return load_tokenizer(Path(self.settings.tokenizer))
        beside = self._config_file.parent / "tokenizer.json"
        return load_tokenizer(beside) if beside.is_file() else None

    def build_model(self) -> nn.Module:
        """fp32 weights as the model's own class makes them. Raises ConfigError where config, context and tokenizer do
        not go together."""
        config, s = self._config, self.settings
        longest = getattr(config, "max_position_embeddings", None)
        if isinstance(longest, int) and s.context > longest:
            raise ConfigError(
                f"[task] context: {s.context} tokens are more than the {longest} positions of {self._config_file} "
                f"(max_position_embeddings); give {longest} or fewer"
            )
        if self.tokenizer and self.tokenizer.vocabulary > self._vocabulary:
            raise ConfigError(
                f"[task] tokenizer: {self.tokenizer.path} has ids up to {self.tokenizer.vocabulary - 1}, and "
                f"{self._config_file} a vocab_size of {self._vocabulary}; name the model's own tokenizer, or raise "
                "vocab_size for a model that is trained from its seed"
            )
        try:
            model: nn.Module = self._classes.from_config(
                config, attn_implementation=s.attention, dtype=torch.float32, trust_remote_code=False
            )
        except (ImportError, ValueError) as error:
            raise ConfigError(
                f"[task] model: {self._config_file} cannot be built with attention = {s.attention!r}: {_line(error)}"
            ) from None
        return model

    def pretrained(self, directory: Path) -> nn.Module:
        """The model with the weights in `directory` that `save_pretrained` wrote, also where they are under other names
        there than in the model. Raises ConfigError where they do not fit."""
        try:
            model, info = self._classes.from_pretrained(
                str(directory),
                config=self._config,
                dtype=torch.float32,
                attn_implementation=self.settings.attention,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        except (ImportError, OSError, ValueError, RuntimeError) as error:
            raise ConfigError(f"[run] init: {directory} does not fit the task: {_line(error)}") from None
        if missing := sorted(info["missing_keys"]):
            raise ConfigError(
                f"[run] init: {directory} does not fit the task: it has no weights for {missing[0]} "
                f"({len(missing)} are missing); its config.json must be that of [task] model"
            )
        loaded: nn.Module = model
        return loaded

    def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, int]:
        """Mean cross entropy in nats per token, and the B·T tokens that it counts; while it trains, with the router's
        auxiliary loss where the config asks for it (`output_router_logits`)."""
        batch = batch.to(next(model.parameters()).device, non_blocking=True)
        targets = batch[:, 1:]  # (B, T)
        out = model(input_ids=batch[:, :-1])
        loss = token_loss(out.logits, targets)  # of (B, T, V)
        auxiliary = getattr(out, "aux_loss", None)
        if auxiliary is not None and model.training:
            loss = loss + getattr(self._config, "router_aux_loss_coef", 0.0) * auxiliary.to(loss.device)
        return loss, targets.numel()

    def fingerprint(self) -> Mapping[str, str]:
        """What config.json says of the function, and the tokenizer's where there is one."""
        said = {key: value for key, value in self._config_json.items() if key not in NOT_THE_FUNCTION}
        canonical = json.dumps(said, sort_keys=True, separators=(",", ":")).encode()
        model = {"model": xxhash.xxh3_128(canonical).hexdigest()}
        return model | (self.tokenizer.fingerprint() if self.tokenizer else {})

    @property
    def _config_file(self) -> Path:
        path = Path(self.settings.model)
        return path / "config.json" if path.is_dir() else path

    @cached_property
    def _config_json(self) -> Mapping[str, Any]:
        path = self._config_file
        if not path.is_file():
            raise ConfigError(
                f"[task] model: no file {path}; name a directory on this machine that has a config.json (hf download "
                "MODEL --local-dir DIRECTORY makes one), or a config.json"
            )
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"[task] model: {path} cannot be read: {error}") from None
        if not isinstance(said, dict) or "model_type" not in said:
            raise ConfigError(f"[task] model: {path} has no model_type, so it is no config.json of transformers")
        return said

    @cached_property
    def _config(self) -> Any:
        """A `PreTrainedConfig`."""
        said, auto = self._config_json, library("transformers").AutoConfig
        try:
            config = auto.from_pretrained(str(self._config_file), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # of many kinds, and each is about what stands in the file
            raise ConfigError(
                f"[task] model: transformers does not take {self._config_file} (model_type {said['model_type']!r}): "
                f"{_line(error)}"
            ) from None
        config.use_cache = False
        return config

    @property
    def _classes(self) -> Any:
        return library("transformers").AutoModelForCausalLM

    @property
    def _vocabulary(self) -> int:
        return int(self._config.get_text_config().vocab_size)

    # ---- the data

    @cached_property
    def text(self) -> Text:
        s = self.settings
        corpus = read_tokens(
            s.paths,
            self.tokenizer,
            self._vocabulary,
            text_key=s.text_key,
            token_dtype=s.token_dtype,
            cache=Path(s.cache) if s.cache else None,
        )
        return cut(corpus, s.context, s.block_tokens, s.held_out)

    # ---- what becomes of it

    def generate(self, model: nn.Module, prompt: str, tokens: int, seed: int) -> str:
        """`prompt` and `tokens` further tokens, as text. Raises ConfigError without a tokenizer."""
        if not self.tokenizer:
            raise ConfigError("[task] tokenizer: not set, and the model's directory has none; name one to sample text")

        def forward(ids: Tensor) -> Tensor:
            logits: Tensor = model(input_ids=ids).logits
            return logits

        return continued_text(self.tokenizer, model, forward, prompt, tokens, self.settings.context, seed)

    def hf_files(self) -> dict[str, bytes]:
        """`config.json` as it is but for the weights' dtype, and what else the directory has for generation and the
        tokenizer."""
        config = {key: value for key, value in self._config_json.items() if key not in ("torch_dtype", "dtype")}
        known = library("transformers.models.auto.modeling_auto").MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        if config["model_type"] in known:
            config.setdefault("architectures", [known[config["model_type"]]])
        config["torch_dtype"] = "float32"  # the key that all versions read
        files = {"config.json": (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()}
        generation = self._config_file.parent / "generation_config.json"
        if generation.is_file():
            files["generation_config.json"] = generation.read_bytes()
        longest = config.get("max_position_embeddings")
        longest = longest if isinstance(longest, int) else self.settings.context
        return files | (self.tokenizer.files(longest) if self.tokenizer else {})


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
