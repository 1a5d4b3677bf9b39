"""`run.toml` and `site.toml`: their models, their defaults, and errors that say what would do.

The run's config is held by the coordinator and sent to each site when it joins, so that it exists
once. A site's own file says only who it is, where the coordinator is and what is local: devices and
data. Unknown keys are refused (a misspelt key that is silently ignored costs a month of training).

Keys beyond those of the design's section 4: `[run] min_sites` (a run of several sites must not begin
with whoever came first, or its result depends on luck) and `coordinators` (models past one machine),
`[store]` (how much history the coordinator keeps), all of `[devices]`, `[site]
patience_seconds`, `checkpoint_seconds` and `evaluate`, and the keys of decoupled training (`[outer]
partial`, `period`, `delay_c`, `beta2`, `epsilon`; `[rounds] weight_cap`, `staleness_decay`; `[wire] topk`,
`feedback_decay`, `upload_grid`, `publish_grid`). Their reasons stand in docs/configuration.md.
"""

from __future__ import annotations

import difflib
import math
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from shared.errors import ConfigError
from shared.names import SITE_NAME

UploadCodec = Literal["fp32", "bf16", "fp16", "int8", "int4", "e3m0", "topk2"]
PublishCodec = Literal["fp32", "bf16", "fp16", "int8", "int4"]
TOPK_FEEDBACK = 0.95
"""β of SparseLoCo (arXiv 2508.15706)."""
RECEIVED = "received"
MOST = 10**6
"""No count that is not one of tokens is larger: it must fit everything that it goes through."""
URL = r"^https?://[^/\s]+/?$"


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class RunTable(_Table):
    name: str = Field(pattern=SITE_NAME, description="letters a-z, digits, '.', '_' and '-', at most 64")
    seed: int = Field(0, ge=0, lt=2**63, description="a whole number from 0")
    tokens: int = Field(gt=0, le=10**15, description="the token budget, a whole number from 1")
    init: str = Field("", description="a safetensors file or a Hugging Face directory; empty: from the seed")
    min_sites: int = Field(
        1, ge=1, le=10_000, description="how many sites must be ready at the start, a whole number from 1"
    )
    coordinators: list[Annotated[str, Field(pattern=URL)]] = Field(
        default_factory=list, description="the URLs of all coordinators, each once, as https://host:port"
    )

    @field_validator("coordinators")
    @classmethod
    def _coordinators(cls, value: list[str]) -> list[str]:
        if len({url.rstrip("/") for url in value}) < len(value):
            raise ValueError("named twice")
        return value


class TaskTable(BaseModel):
    """`use`, and whatever the task itself understands."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)
    use: str = Field(min_length=1, description='a task name such as "byte-lm", or "file.py:Class"')

    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class InnerTable(_Table):
    optimizer: Literal["adamw", "muon", "sgd"] = "adamw"
    lr: float = Field(1e-3, gt=0, le=1e6, description="a number above 0")
    steps: int = Field(50, ge=1, le=MOST, description="H, a whole number from 1")
    batch_size: int = Field(16, ge=1, le=MOST, description="sequences per inner step, a whole number from 1")
    schedule: Literal["constant", "cosine", "wsd"] = "cosine"
    warmup_tokens: int = Field(0, ge=0, le=10**15, description="a whole number from 0")
    clip_norm: float = Field(1.0, ge=0, le=1e9, description="a number from 0; 0: off")
    weight_decay: float = Field(0.1, ge=0, le=1e9, description="a number from 0")


class OuterTable(_Table):
    optimizer: Literal["nesterov", "sgd", "delayed-nesterov", "adam"] = "nesterov"
    lr: float = Field(1.0, gt=0, le=1e6, description="a number above 0")
    momentum: float = Field(0.5, ge=0, lt=1, description="a number from 0 to below 1")
    merge: Literal["mean", "rda"] = "mean"
    correction: Literal["none", "heloco"] = "none"
    partial: Literal["share", "full"] = "share"
    period: Literal["auto"] | int = Field(
        "auto", description='N: "auto" (the sites that train) or a whole number from 1'
    )
    delay_c: float = Field(0.0, ge=0, le=1, description="c, a number from 0 to 1/period")
    beta2: float = Field(0.99, ge=0, lt=1, description="a number from 0 to below 1")
    epsilon: float = Field(1e-8, ge=1e-30, le=1, description="a number from 1e-30 to 1")

    @field_validator("period")
    @classmethod
    def _period(cls, value: str | int) -> str | int:
        if isinstance(value, int) and not 1 <= value <= MOST:
            raise ValueError("out of range")
        return value


class RoundsTable(_Table):
    fragments: int = Field(4, ge=1, le=4096, description="P, a whole number from 1")
    layout: Literal["balanced", "strided"] = "balanced"
    quorum: Literal["all"] | int = Field(1, description='"all" or a whole number from 1')
    grace_seconds: Literal["auto"] | float = Field("auto", description='"auto" or seconds from 0')
    deadline_seconds: float = Field(600, gt=0, le=10**7, description="seconds above 0")
    max_staleness: Literal["auto"] | int = Field("auto", description='"auto" or versions, a whole number from 0')
    weighting: Literal["uniform", "tokens", "tokens2-per-step"] = "tokens"
    weight_cap: float = Field(8.0, ge=0, description="times the round's median weight, a number from 1, or 0: no cap")
    staleness_decay: float = Field(0.0, ge=0, le=10, description="a number from 0 (off)")
    overlap_steps: Literal["auto", "unbounded"] | int = Field(
        "auto", description='τ: a whole number from 0, "auto" or "unbounded"'
    )
    align: Literal["overwrite", "blend", "carry"] = "carry"
    blend: float = Field(0.5, ge=0, lt=1, description="α, a number from 0 to below 1")
    pacing: Literal["equal-steps", "equal-time", "follow"] = "equal-time"

    @field_validator("weight_cap")
    @classmethod
    def _cap(cls, value: float) -> float:
        if 0 < value < 1:
            raise ValueError("below 1")
        return value

    @field_validator("quorum")
    @classmethod
    def _quorum(cls, value: str | int) -> str | int:
        if isinstance(value, int) and not 1 <= value <= MOST:
            raise ValueError("out of range")
        return value

    @field_validator("max_staleness")
    @classmethod
    def _max_staleness(cls, value: str | int) -> str | int:
        if isinstance(value, int) and not 0 <= value <= MOST:
            raise ValueError("out of range")
        return value

    @field_validator("grace_seconds")
    @classmethod
    def _grace(cls, value: str | float) -> str | float:
        if isinstance(value, float) and value < 0:
            raise ValueError("below 0")
        return value

    @field_validator("overlap_steps")
    @classmethod
    def _overlap(cls, value: str | int) -> str | int:
        if isinstance(value, int) and not 0 <= value <= MOST:
            raise ValueError("out of range")
        return value


class WireTable(_Table):
    upload: UploadCodec = "int4"
    publish: PublishCodec = "int8"
    topk: int = Field(256, ge=1, le=1024, description="of each 4096 elements so many are sent, from 1 to 1024")
    error_feedback: bool = True
    feedback_decay: Literal["auto"] | float = Field("auto", description='β: "auto" or a number from 0 to 1')
    upload_grid: float = Field(0.0, ge=0, le=3, description="a number from 0 (the finest) to 3")
    publish_grid: float = Field(0.0, ge=0, le=3, description="a number from 0 (the finest) to 3")
    """The least step of the integers' grid, in root mean squares of a block (see shared.codecs.grid)."""
    zstd_level: Literal["auto"] | int = Field("auto", description='"auto", or a whole number from 0 (off) to 19')

    @field_validator("feedback_decay")
    @classmethod
    def _decay(cls, value: str | float) -> str | float:
        if isinstance(value, float) and not 0 < value <= 1:
            raise ValueError("out of range")
        return value

    @field_validator("zstd_level")
    @classmethod
    def _level(cls, value: str | int) -> str | int:
        if isinstance(value, int) and not 0 <= value <= 19:
            raise ValueError("out of range")
        return value

    @property
    def upload_codec(self) -> str:
        """The codec of contributions, by its name in containers."""
        return f"topk2-{self.topk}" if self.upload == "topk2" else self.upload

    @property
    def feedback(self) -> float:
        """β of e ← βe + Δ, by which what was not sent is kept; 0 without error feedback."""
        if not self.error_feedback:
            return 0.0
        if self.feedback_decay == "auto":
            return TOPK_FEEDBACK if self.upload == "topk2" else 1.0
        return self.feedback_decay


class StoreTable(_Table):
    """How much history the coordinator keeps, in outer steps of each fragment, and where the fragments are."""

    checkpoint_versions: int = Field(16, ge=1, le=MOST, description="outer steps of a fragment between checkpoints")
    keep_checkpoints: int = Field(2, ge=1, le=MOST, description="checkpoints kept of each fragment, from 1")
    keep_versions: int = Field(32, ge=1, le=MOST, description="published deltas kept of each fragment, from 1")
    keep_rounds: int = Field(256, ge=1, le=MOST, description="rounds of each fragment kept in the journal, from 1")
    mirror: str = Field("", description="any URL that fsspec knows, as s3://bucket/path; empty: no mirror")
    mirror_seconds: float = Field(600.0, ge=0, le=1e9, description="seconds between passes of the mirror, or more")
    resting: Literal["auto", "memory", "mapped"] = "auto"


class RunConfig(_Table):
    """The whole of `run.toml`."""

    run: RunTable
    task: TaskTable
    inner: InnerTable = Field(default_factory=InnerTable)
    outer: OuterTable = Field(default_factory=OuterTable)
    rounds: RoundsTable = Field(default_factory=RoundsTable)
    wire: WireTable = Field(default_factory=WireTable)
    store: StoreTable = Field(default_factory=StoreTable)

    @model_validator(mode="after")
    def _combinations(self, info: ValidationInfo) -> RunConfig:
        if info.context == RECEIVED:
            return self
        outer, rounds, inner = self.outer, self.rounds, self.inner
        stated = rounds.model_fields_set
        if rounds.align == "blend" and "overlap_steps" not in stated:
            raise ValueError(
                '[rounds] align = "blend" mixes by what τ steps changed, and overlap_steps is not stated: '
                "state it (0 is allowed), or use carry"
            )
        if rounds.align != "blend" and "blend" in stated:
            raise ValueError(f'[rounds] blend has no effect with align = "{rounds.align}": drop it, or align = "blend"')
        if (
            "overlap_steps" in stated
            and isinstance(rounds.overlap_steps, int)
            and rounds.overlap_steps >= max(1, inner.steps)
        ):
            raise ValueError(
                f"[rounds] overlap_steps = {rounds.overlap_steps} reaches the next snapshot of the same fragment: "
                f"at most {inner.steps - 1} with [inner] steps = {inner.steps}"
            )
        _check_outer(outer)
        _check_rounds(rounds, outer)
        _check_wire(self.wire, outer)
        if len(self.run.coordinators) > rounds.fragments:
            raise ValueError(
                f"[run] coordinators has {len(self.run.coordinators)} entries, and [rounds] fragments = "
                f"{rounds.fragments} leaves some without a fragment: raise fragments, or drop coordinators"
            )
        if inner.warmup_tokens >= self.run.tokens:
            raise ValueError(
                f"[inner] warmup_tokens = {inner.warmup_tokens} does not end within [run] tokens = {self.run.tokens}: "
                "make it smaller"
            )
        if isinstance(rounds.quorum, int) and rounds.quorum > self.run.min_sites > 1:
            raise ValueError(
                f"[rounds] quorum = {rounds.quorum} cannot be met by [run] min_sites = {self.run.min_sites}: "
                "raise min_sites or lower quorum"
            )
        if rounds.max_staleness != "auto" and rounds.quorum != "all":
            versions = math.ceil(self.run.min_sites / rounds.quorum)
            if rounds.max_staleness < versions - 1:
                raise ValueError(
                    f"[rounds] max_staleness = {rounds.max_staleness} refuses sites that are in time: a cycle of "
                    f"[run] min_sites = {self.run.min_sites} has up to {versions} versions with "
                    f'quorum = {rounds.quorum}; use "auto" or at least {versions - 1}'
                )
        return self


def _check_rounds(rounds: RoundsTable, outer: OuterTable) -> None:
    """Raises ValueError for settings of [rounds] that cannot work together, or not with [outer]."""
    stated = rounds.model_fields_set
    endless = rounds.overlap_steps == "unbounded" or (rounds.overlap_steps == "auto" and rounds.quorum != "all")
    if rounds.align == "blend" and endless:
        raise ValueError(
            f'[rounds] align = "blend" mixes by what τ steps changed, and with overlap_steps = "{rounds.overlap_steps}"'
            f" and quorum = {_toml(rounds.quorum)} there is no τ: name a number for overlap_steps, or use carry"
        )
    if rounds.weighting == "uniform" and "weight_cap" in stated and rounds.weight_cap > 0:
        raise ValueError(
            '[rounds] weight_cap has no effect with weighting = "uniform", under which all weigh the same: drop it, or '
            'weighting = "tokens"'
        )
    if rounds.grace_seconds != "auto" and rounds.grace_seconds >= rounds.deadline_seconds:
        raise ValueError(
            f"[rounds] grace_seconds = {rounds.grace_seconds:g} does not end before deadline_seconds = "
            f"{rounds.deadline_seconds:g}: make it smaller, or raise deadline_seconds"
        )
    if rounds.quorum == "all":
        if rounds.pacing == "follow":
            raise ValueError(
                '[rounds] pacing = "follow" joins rounds that have their quorum and are about to close, and with '
                'quorum = "all" none is: name a number for quorum, or use "equal-time"'
            )
        if "grace_seconds" in stated and rounds.grace_seconds != "auto":
            raise ValueError(
                '[rounds] grace_seconds has no effect with quorum = "all", which waits for everyone until '
                "deadline_seconds: drop it, or name a number for quorum"
            )
    if rounds.pacing == "follow":
        if rounds.grace_seconds == 0:
            raise ValueError(
                '[rounds] pacing = "follow" joins rounds within their grace, and grace_seconds = 0 leaves none: '
                'use grace_seconds = "auto" or a number above 0, or pacing = "equal-time"'
            )
        if rounds.grace_seconds == "auto" and rounds.overlap_steps == 0:
            raise ValueError(
                '[rounds] pacing = "follow" joins rounds within their grace, and grace_seconds = "auto" is none with '
                "overlap_steps = 0: name seconds for grace_seconds"
            )
    alone = rounds.quorum == 1 and rounds.grace_seconds == 0
    if alone and "deadline_seconds" in stated:
        raise ValueError(
            "[rounds] deadline_seconds has no effect with quorum = 1 and grace_seconds = 0, which close a round at its "
            "first contribution: drop it, or allow a grace"
        )
    if rounds.staleness_decay > 0 and alone:
        if outer.optimizer == "delayed-nesterov":
            raise ValueError(
                "[rounds] staleness_decay has no effect on rounds of one contribution with optimizer = "
                '"delayed-nesterov": drop it, or allow a grace, or optimizer = "nesterov"'
            )
        if outer.partial == "full":
            raise ValueError(
                '[rounds] staleness_decay has no effect on rounds of one contribution with partial = "full": '
                'drop it, or allow a grace, or partial = "share"'
            )


def _check_wire(wire: WireTable, outer: OuterTable) -> None:
    """Raises ValueError for settings of [wire] that cannot work together, or not with [outer]."""
    stated = wire.model_fields_set
    if wire.upload == "topk2":
        if outer.optimizer != "sgd" and "momentum" not in outer.model_fields_set:
            raise ValueError(
                '[wire] upload = "topk2" is meant for an outer step without momentum (its error feedback is one), '
                'and [outer] momentum is not stated: use [outer] optimizer = "sgd", or state momentum'
            )
        if not wire.error_feedback:
            raise ValueError(
                '[wire] upload = "topk2" without error_feedback never sends most of what is trained: drop '
                'error_feedback = false, or upload = "int4"'
            )
    elif "topk" in stated:
        raise ValueError(f'[wire] topk has no effect with upload = "{wire.upload}": drop it, or upload = "topk2"')
    for key, codec in (("upload_grid", wire.upload), ("publish_grid", wire.publish)):
        if key in stated and codec not in ("int8", "int4"):
            raise ValueError(
                f'[wire] {key} has no effect with "{codec}", which has no even grid: drop it, or use "int4"'
            )
    if wire.upload_grid and not wire.error_feedback:
        raise ValueError(
            "[wire] upload_grid above 0 leaves much of what is trained to error_feedback, and that is false: drop it, "
            "or error_feedback = true"
        )
    if not wire.error_feedback and "feedback_decay" in stated:
        raise ValueError(
            "[wire] feedback_decay has no effect with error_feedback = false: drop it, or error_feedback = true"
        )


def _toml(value: str | int) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


def _check_outer(outer: OuterTable) -> None:
    """Raises ValueError for settings of [outer] that cannot work together."""
    stated = outer.model_fields_set
    if outer.optimizer == "adam" and "lr" not in stated:
        raise ValueError(
            '[outer] lr is not stated, and the default is for pseudo-gradients as they are; optimizer = "adam" '
            "makes each element's step about lr long: state it, 1e-3 for a start"
        )
    if outer.correction == "heloco" and outer.optimizer != "sgd" and outer.momentum == 0:
        raise ValueError(
            '[outer] correction = "heloco" corrects against the momentum, and momentum = 0 leaves only the last '
            'round\'s: state a momentum above 0, or correction = "none"'
        )
    if outer.optimizer == "sgd" and outer.momentum != 0 and "momentum" in stated:
        raise ValueError('[outer] momentum has no effect with optimizer = "sgd": drop it, or optimizer = "nesterov"')
    if outer.optimizer == "sgd" and outer.correction == "heloco":
        raise ValueError(
            '[outer] correction = "heloco" corrects against a momentum, and optimizer = "sgd" has none: '
            'use "nesterov", "delayed-nesterov" or "adam", or correction = "none"'
        )
    for keys, optimizer in ((("period", "delay_c"), "delayed-nesterov"), (("beta2", "epsilon"), "adam")):
        for key in keys:
            if key in stated and outer.optimizer != optimizer:
                raise ValueError(
                    f'[outer] {key} has no effect with optimizer = "{outer.optimizer}": '
                    f'drop it, or optimizer = "{optimizer}"'
                )
    if isinstance(outer.period, int) and outer.delay_c * outer.period > 1:
        raise ValueError(
            f"[outer] delay_c = {outer.delay_c} is more than 1/period: at most {1 / outer.period:g} "
            f"with period = {outer.period}"
        )
    if outer.delay_c > 0 and outer.period == "auto":
        raise ValueError("[outer] delay_c is bounded by 1/period, and period is not stated: name a number for period")
    if outer.optimizer == "delayed-nesterov" and "partial" in stated:
        raise ValueError(
            '[outer] partial has no effect with optimizer = "delayed-nesterov", which has its own way with rounds of '
            'few sites: drop it, or optimizer = "nesterov"'
        )


class SiteTable(_Table):
    name: str = Field(pattern=SITE_NAME, description="letters a-z, digits, '.', '_' and '-', at most 64")
    coordinator: str = Field(pattern=URL, description="the coordinator's URL, https://host:port")
    token_file: str = Field("", description="the file that holds this site's token")
    state: str = Field("state", min_length=1, description="a directory for local checkpoints")
    ca: str = Field("", description="a CA bundle file")
    client_cert: str = Field("", description="a certificate file, for mutual TLS")
    client_key: str = Field("", description="its key file")
    patience_seconds: float = Field(30, ge=0, description="how long to go on trying to reach the coordinator at start")
    outage_seconds: float = Field(3600, ge=0, description="how long to go on through an outage while training")
    outage_steps: int = Field(500, ge=0, le=MOST, description="inner steps to train on without the coordinator, from 0")
    stop_seconds: float = Field(30, ge=1, le=10**6, description="how long a stop may take, from 1")
    checkpoint_seconds: float = Field(300, gt=0, description="seconds between local checkpoints")
    evaluate: bool = Field(True, description="true or false: whether this site may be asked to evaluate")


Share = Annotated[float, Field(gt=0, le=1)]
GroupName = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?$")]


class DevicesTable(_Table):
    """Lists have an entry for each process on this machine, in the order of `device`."""

    device: str | list[str] = Field(
        "", description='"cpu", "cuda", "cuda:0", or a list of them; empty: every accelerator found, else the CPU'
    )
    threads: int = Field(0, ge=0, le=4096, description="a number of CPU threads for torch; 0: torch's own choice")
    throttle: Share | list[Share] = Field(
        1.0, description="a share of full speed to train at, above 0 to 1, or a list of such numbers"
    )
    group: Literal[""] | GroupName | list[Literal[""] | GroupName] = Field(
        "", description="a name of letters a-z, digits and '-', at most 32, that sets devices apart, or a list of names"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    micro_batch: int = Field(
        0, ge=0, le=MOST, description="a number of sequences, the most of a pass on a device; 0: as many as fit"
    )
    compile: bool = False
    recompute: bool = False
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    mixed: Literal["auto", "average", "learners"] = "auto"


class MetricsTable(_Table):
    port: int = Field(9471, ge=0, le=65535, description="a port; 0: off")
    host: str = Field("127.0.0.1", description="the address to listen on")


class SiteTaskTable(_Table):
    use: str = Field(min_length=1, description='a task name, or "file.py:Class"')


class SiteConfig(_Table):
    """The whole of `site.toml`. `base` is the directory of the file: its relative paths start there."""

    site: SiteTable
    devices: DevicesTable = Field(default_factory=DevicesTable)
    data: dict[str, Any] = Field(default_factory=dict)
    task: SiteTaskTable | None = None
    metrics: MetricsTable = Field(default_factory=MetricsTable)
    base: Path = Field(default=Path(), exclude=True)

    @model_validator(mode="after")
    def _pairs(self) -> SiteConfig:
        if bool(self.site.client_cert) != bool(self.site.client_key):
            raise ValueError("[site] client_cert and client_key go together: name both, or neither")
        return self

    def path(self, name: str) -> Path:
        """`name` as this file means it: relative to the file's own directory."""
        return (self.base / Path(name).expanduser()).resolve()


def load_run(path: Path) -> RunConfig:
    """The run config in the file `path`. Raises ConfigError that names file, key and what would do."""
    return parse(RunConfig, _read_toml(path), path.name)


def load_site(path: Path) -> SiteConfig:
    """The site config in the file `path`; its relative paths count from the file's directory."""
    values = _read_toml(path)
    if "base" in values:
        raise ConfigError(f"{path.name}: [base]: unknown table; it may have: {_keys(SiteConfig)}")
    return parse(SiteConfig, values, path.name).model_copy(update={"base": path.resolve().parent})


def received_run(values: dict[str, Any]) -> RunConfig:
    """The run config as the coordinator sent it: every key stated, its combinations checked there."""
    return parse(RunConfig, values, "the coordinator's run config", context=RECEIVED)


Model = TypeVar("Model", bound=BaseModel)


def parse(model: type[Model], values: dict[str, Any], source: str, context: str | None = None) -> Model:
    """`values` as `model`, or ConfigError with one sentence for each thing that is wrong."""
    try:
        return model.model_validate(values, context=context)
    except ValidationError as error:
        sentences = dict.fromkeys(_sentence(model, dict(e), values) for e in error.errors(include_url=False))
        raise ConfigError("; ".join(f"{source}: {sentence}" for sentence in sentences)) from None


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; name a TOML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: is not TOML: {error}") from None


def _keys(model: type[BaseModel]) -> str:
    return ", ".join(name for name, field in model.model_fields.items() if not field.exclude)


def _sentence(root: type[BaseModel], error: dict[str, Any], values: dict[str, Any]) -> str:
    """One validation error in words: which key, what was found, what would do."""
    table, field, location = _find(root, [part for part in error["loc"] if isinstance(part, str)])
    key = ".".join(location[1:]) if len(location) > 1 else ""
    where = f"[{location[0]}] {key}".strip() if location else ""
    if error["type"] == "extra_forbidden":
        name = location[-1]
        near = difflib.get_close_matches(name, _keys(table).split(", "), n=1)
        kind = "key" if len(location) > 1 else "table"
        hint = f'; did you mean "{near[0]}"?' if near else ""
        return f"{where}: unknown {kind}{hint or '; it may have: ' + _keys(table)}"
    if error["type"] == "missing":
        what = getattr(field, "description", None) or "a table"
        return f"{where}: missing; {what} is needed"
    if error["type"] == "value_error" and field is None:
        return re.sub(r"^Value error, ", "", error["msg"])
    found = _found(error, location, values)
    return f"{where}: got {found}; {_would_do(field)} would do"


def _find(root: type[BaseModel], location: list[str]) -> tuple[type[BaseModel], Any, list[str]]:
    """The table that a location lies in, its field (None for a whole model), and the location up to it."""
    table: type[BaseModel] = root
    field: Any = None
    for depth, part in enumerate(location, start=1):
        field = table.model_fields.get(part)
        if field is None:
            return table, None, location[:depth]
        inner = [c for c in (field.annotation, *get_args(field.annotation)) if isinstance(c, type)]
        nested = next((c for c in inner if issubclass(c, BaseModel)), None)
        if nested is None:
            return table, field, location[:depth]
        table = nested
    return table, field, location


def _found(error: dict[str, Any], location: list[str], values: dict[str, Any]) -> str:
    value: Any = values
    for part in location:
        value = value.get(part, error.get("input")) if isinstance(value, dict) else error.get("input")
    text = f'"{value}"' if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else repr(value)
    kinds = {str: "text", bool: "a truth value", int: "a whole number", float: "a number", list: "a list"}
    kinds |= {dict: "a table"}
    return f"{text[:80]} ({kinds.get(type(value), type(value).__name__)})"


def _would_do(field: Any) -> str:
    if field is None:
        return "another value"
    if field.description:
        return str(field.description)
    choices = get_args(field.annotation)
    if choices and all(isinstance(choice, str) for choice in choices):
        listed = [f'"{choice}"' for choice in choices]
        return f"one of {', '.join(listed)}" if len(listed) > 1 else listed[0]
    if field.annotation is bool:
        return "true or false"
    candidates = [get_origin(c) or c for c in (field.annotation, *get_args(field.annotation))]
    table = any(isinstance(c, type) and issubclass(c, BaseModel | dict) for c in candidates)
    return "a table" if table else "another value"
