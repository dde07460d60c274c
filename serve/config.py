"""Settings: one frozen tree, from a YAML file, the environment and the command line.

Later sources win: defaults, the YAML file, `KELVIN_*` variables (`KELVIN_STORAGE__BUCKET`),
explicit overrides. Credentials are never settings: boto3's usual chain finds them.
"""

# No `from __future__ import annotations` here: Ray Serve's builder needs real annotations.
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from cluster.pool_state import Stage
from serve.access_settings import HttpSettings as HttpSettings
from serve.access_settings import KeySettings
from serve.comfyui_settings import ComfyuiSettings
from serve.errors import ConfigurationError
from serve.heat_settings import AutoscalingSettings, GovernorSection, RoutingSection, Section
from serve.journal_settings import JournalSettings
from serve.lora_settings import LoraSettings
from serve.model_settings import ModelSettings as ModelSettings
from serve.spool_settings import SpoolSettings
from serve.storage_settings import StorageSettings as StorageSettings
from serve.tenant_settings import TenantSettings

Precision = Literal["auto", "fp8", "bf16", "fp32"]

# As Ray takes them (its docs, "Use labels to control scheduling"): Kubernetes' syntax of labels.
_LABEL = r"[a-zA-Z0-9]([a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?"
LabelName = Annotated[str, Field(pattern=rf"^({_LABEL}/)?{_LABEL}$")]
LabelCondition = Annotated[str, Field(pattern=rf"^!?({_LABEL}|in\({_LABEL}(, ?{_LABEL})*\))$")]


def _as_ray_counts(amount: float) -> float:
    if round(amount, 4) != amount:
        raise ValueError("Ray counts resources in steps of 0.0001")
    return amount


Reserved = Annotated[float, AfterValidator(_as_ray_counts)]


class PoolSettings(Section):
    """One pool: one stage of one model on one kind of card, exactly one Ray Serve deployment."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$", description="deployment name")
    min_replicas: int | None = Field(
        None, ge=0, description="the fewest that autoscaling leaves; 0 lets an idle pool go"
    )
    max_replicas: int | None = Field(
        None,
        ge=1,
        validate_default=True,
        description="the most that autoscaling starts; with min_replicas, or not at all",
    )
    num_replicas: int = Field(
        1,
        ge=0,
        validate_default=True,
        description="processes, each with its own copy of the weights; with min_replicas and "
        "max_replicas those to begin with",
    )
    kind_speed: float | None = Field(
        None, gt=0, description="of a cool card, an H100 being 1; an estimate by its kind if absent"
    )
    cost_per_hour: float | None = Field(
        None, gt=0, description="of one replica; an estimate by the kind of card if absent"
    )
    start_s: float = Field(
        60.0, gt=0, description="seconds from asking for a replica to its first request"
    )
    num_gpus: Reserved = Field(0.0, ge=0.0, description="GPUs per replica; fractions share a card")
    num_cpus: Reserved = Field(0.25, ge=0.0, description="logical CPUs Ray reserves per replica")
    accelerator_type: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$",
        description="Ray accelerator type, e.g. L4, H100",
    )
    label_selector: dict[LabelName, LabelCondition] = Field(
        {},
        description="labels that a node must have, in Ray's words: `{market: spot}`, "
        "`{market: '!spot'}`, `{'ray.io/accelerator-type': 'in(L4, A10G)'}`",
    )
    max_replicas_per_node: int | None = Field(
        None, ge=1, le=100, description="spreads a pool: no node gets more of its replicas"
    )
    precision: Precision = Field("auto", description="auto chooses by hardware and says why")
    torch_threads: int | None = Field(
        None,
        ge=1,
        description="CPU threads; if absent half the cores, or all to denoise with one replica",
    )
    max_ongoing_requests: int = Field(
        16, ge=1, description="calls that one replica holds at a time; a denoiser's share forwards"
    )
    max_queued_requests: int = Field(
        256, ge=-1, description="calls that wait for a replica, per caller; -1 is unlimited"
    )
    max_surge_percent: int = Field(
        0,
        ge=0,
        le=100,
        description="of the replicas, rounded up: how many a redeploy starts before it stops old "
        "ones; they need free cards and it waits for them. 0: an old one goes first",
    )
    warm_sizes: tuple[tuple[int, int], ...] = Field(
        (),
        description="denoiser and vae_decoder: [width, height] in pixels that start-up makes fast, "
        "with the prompt length of the model's defaults; the model's own size if empty",
    )
    warm_rows: tuple[int, ...] = Field(
        (),
        description="denoiser only: rows of forwards that start-up makes fast and steps, beside 1 "
        "and 2 (without and with guidance); if empty, as many more as pay on this device",
    )
    checkpoint_every_steps: int = Field(
        5,
        ge=0,
        description="denoiser only: the most steps that are done again where a replica dies; 0: "
        "pictures do not move, they start again, and a replica that is to go ends them first",
    )
    decode_tiling: Literal["auto", "always", "off"] = Field(
        "auto",
        description="vae_decoder only: `auto` decodes in tiles what would not fit its memory whole",
    )
    decode_memory_gib: float = Field(
        3.0,
        gt=0,
        allow_inf_nan=False,
        description="vae_decoder only: GiB that the VAE and decoding may take; whole is quicker, "
        "and takes 11 at 2048x2048",
    )
    decode_compile: Literal["auto", "off"] = Field(
        "auto",
        description="vae_decoder only: `auto` compiles decoding of warm_sizes on a GPU, and keeps "
        "it where it is quicker",
    )

    @field_validator("num_gpus")
    @classmethod
    def _is_a_share_or_whole_cards(cls, cards: float) -> float:
        if cards > 1 and not cards.is_integer():
            raise ValueError("a share of one card, at most 1, or a whole number of cards")
        return cards

    @field_validator("max_replicas")
    @classmethod
    def _bounds_are_in_order(cls, most: int | None, info: ValidationInfo) -> int | None:
        least = info.data.get("min_replicas")
        if (least is None) != (most is None):
            raise ValueError("min_replicas and max_replicas are given together, or neither")
        if least is not None and most is not None and most < least:
            raise ValueError("max_replicas is not below min_replicas")
        return most

    @field_validator("num_replicas")
    @classmethod
    def _begins_within_bounds(cls, number: int, info: ValidationInfo) -> int:
        least, most = (info.data.get(name) for name in ("min_replicas", "max_replicas"))
        if least is None or most is None:
            if number < 1:
                raise ValueError("1 or more, where min_replicas and max_replicas are not given")
        elif not least <= number <= most:
            raise ValueError("lies between min_replicas and max_replicas")
        return number

    @property
    def is_autoscaled(self) -> bool:
        """True if replicas come and go."""
        return self.max_replicas is not None

    @property
    def most_replicas(self) -> int:
        """Return how many there can be at a time."""
        return self.num_replicas if self.max_replicas is None else self.max_replicas

    @property
    def surge_replicas(self) -> int:
        """Return how many a redeploy starts at most before it stops old ones."""
        return math.ceil(self.max_surge_percent * self.most_replicas / 100)

    @field_validator("warm_sizes")
    @classmethod
    def _sizes_are_whole_tokens(
        cls, sizes: tuple[tuple[int, int], ...]
    ) -> tuple[tuple[int, int], ...]:
        if any(side < 16 or side % 16 for size in sizes for side in size):
            raise ValueError("sides are multiples of 16 pixels, 16 or more")
        return sizes

    @field_validator("warm_rows")
    @classmethod
    def _rows_are_possible(cls, rows: tuple[int, ...]) -> tuple[int, ...]:
        if not all(1 <= each <= 32 for each in rows):
            raise ValueError("a forward has 1 to 32 rows")
        return rows


def _one_pool(name: str) -> Any:
    return Field(default_factory=lambda: (PoolSettings(name=name),))


class ModelEntry(Section):
    """A further model of the service, beside the one of section `model`."""

    model: ModelSettings = Field(description="which; its name is what requests say in `model`")
    denoiser: tuple[PoolSettings, ...] = Field(
        (), description="its pools; one like the service's own first one if empty"
    )
    text_encoder: tuple[PoolSettings, ...] = Field(
        (), description="the service's own if empty and the files are the same, else as denoiser"
    )
    vae_decoder: tuple[PoolSettings, ...] = Field((), description="as text_encoder")


class PipelineSettings(Section):
    """The deployment that joins the stages; it is also the HTTP ingress."""

    num_replicas: int = Field(1, ge=1, description="processes that take requests")
    num_cpus: Reserved = Field(0.25, ge=0.0, description="logical CPUs Ray reserves per replica")
    label_selector: dict[LabelName, LabelCondition] = Field(
        {}, description="labels that a node must have, as a pool's: off machines that may go"
    )
    max_replicas_per_node: int | None = Field(
        None, ge=1, le=100, description="no node gets more of them"
    )
    max_surge_percent: int = Field(
        1,
        ge=0,
        le=100,
        description="as a pool's; by default one more at a time, which takes no card. 0 where no "
        "node has room for it",
    )
    max_ongoing_requests: int = Field(
        256, ge=1, description="calls and followed event streams at a time, per replica"
    )
    max_body_bytes: int = Field(
        32 << 20, ge=1024, description="largest HTTP request body, start images included"
    )
    stage_retries: int = Field(
        2, ge=0, description="tries after a stage replica was lost; crashes have their own rule"
    )
    early_refusal: bool = Field(
        True,
        description="false: Serve's proxy refuses nothing by itself, and under overload every "
        "request reaches a Pipeline",
    )

    @property
    def surge_replicas(self) -> int:
        """Return how many a redeploy starts at most before it stops old ones."""
        return math.ceil(self.max_surge_percent * self.num_replicas / 100)


class EmbeddedStoreSettings(Section):
    """The SeaweedFS that `kelvin up` starts on loopback when no endpoint is given."""

    enabled: bool = Field(True, description="false: never start one")
    data_dir: str = Field("kelvin-data", description="folder that survives restarts")


class TelemetrySettings(Section):
    """OpenTelemetry; off until an endpoint is given."""

    otlp_endpoint: str | None = Field(
        None,
        pattern=r"^https?://[^/?#\s]+(/[^?#\s]*)?$",
        description="OTLP over HTTP for traces and metrics, e.g. http://127.0.0.1:4318",
    )
    service_name: str = Field("kelvin", description="`service.name` of every span and metric")
    sampling_ratio: float = Field(
        1.0, ge=0.0, le=1.0, description="share of requests that are traced"
    )
    log_format: Literal["text", "json"] = Field(
        "text", description="of Serve's log files; `json` has a line an event, with its trace id"
    )


class ThermalSettings(Section):
    """Where a replica reads its card's temperature, limits, power and clock."""

    source: Literal["nvml", "scripted", "off"] = Field(
        "nvml",
        description="`nvml` asks the card; `scripted` reads a file instead, for rehearsals, and "
        "everything drawn from it is marked so; `off` reads nothing",
    )
    script: str | None = Field(
        None, description="YAML file of the `scripted` source, the same on every node; only with it"
    )
    period_s: float = Field(0.5, gt=0, le=60, description="seconds between two readings")

    @model_validator(mode="after")
    def _script_goes_with_its_source(self) -> "ThermalSettings":
        if (self.source == "scripted") != (self.script is not None):
            raise ValueError(
                "source `scripted` needs a file in `script`, and no other source takes one"
            )
        return self


class Settings(Section):
    """Everything that can be set."""

    model: ModelSettings = ModelSettings()
    text_encoder: tuple[PoolSettings, ...] = _one_pool("text-encoder")
    denoiser: tuple[PoolSettings, ...] = _one_pool("denoiser")
    vae_decoder: tuple[PoolSettings, ...] = _one_pool("vae-decoder")
    models: tuple[ModelEntry, ...] = ()
    lora: LoraSettings = LoraSettings()
    pipeline: PipelineSettings = PipelineSettings()
    storage: StorageSettings = StorageSettings()
    journal: JournalSettings = JournalSettings()
    spool: SpoolSettings = SpoolSettings()
    embedded_store: EmbeddedStoreSettings = EmbeddedStoreSettings()
    http: HttpSettings = HttpSettings()
    keys: KeySettings = KeySettings()
    comfyui: ComfyuiSettings = ComfyuiSettings()
    tenants: TenantSettings = TenantSettings()
    telemetry: TelemetrySettings = TelemetrySettings()
    autoscaling: AutoscalingSettings = AutoscalingSettings()
    routing: RoutingSection = RoutingSection()
    governor: GovernorSection = GovernorSection()
    thermal: ThermalSettings = ThermalSettings()

    @field_validator("text_encoder", "denoiser", "vae_decoder")
    @classmethod
    def _at_least_one_pool(cls, pools: tuple[PoolSettings, ...]) -> tuple[PoolSettings, ...]:
        if not pools:
            raise ValueError("a stage needs a pool")
        return pools

    @property
    def uses_embedded_store(self) -> bool:
        """Whether the store is the SeaweedFS that Kelvin starts itself."""
        return self.storage.endpoint_url is None and self.embedded_store.enabled

    @property
    def pools(self) -> dict[Stage, tuple[PoolSettings, ...]]:
        """Stage -> its pools."""
        return {"text": self.text_encoder, "denoise": self.denoiser, "decode": self.vae_decoder}

    @model_validator(mode="after")
    def _memory_is_not_shared(self) -> "Settings":
        if not self.journal.enabled and self.pipeline.num_replicas > 1:
            raise ValueError(
                "without a journal (journal.enabled: false) a job is known to one Pipeline alone, "
                "so pipeline.num_replicas is 1"
            )
        return self

    @model_validator(mode="after")
    def _names_differ(self) -> "Settings":
        # Deployment names, and the Pipeline is one of them.
        names = [pool.name for pools in self.pools.values() for pool in pools]
        for entry in self.models:
            own = (*entry.denoiser, *entry.text_encoder, *entry.vae_decoder)
            names.extend(pool.name for pool in own)
        if len({"pipeline", *names}) != 1 + len(names):
            raise ValueError(
                f"each pool needs a name of its own, other than pipeline: {', '.join(names)}"
            )
        return self


def load_settings(
    path: str | Path | None = None, overrides: Mapping[str, Any] | None = None
) -> Settings:
    """Read settings from defaults, a YAML file, `KELVIN_*` variables and overrides.

    Args:
        path: YAML file with the tree of `Settings`, or None.
        overrides: Nested mapping that wins over everything else.

    Raises:
        ConfigurationError: Naming the setting, its value and what would be right.
    """
    from_file: dict[str, Any] = {}
    if path is not None:
        try:
            loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigurationError(
                f"Cannot read settings file: {error}",
                field="config",
                value=str(path),
                allowed="a readable YAML file in UTF-8, such as cluster/local.yaml",
            ) from None
        if not isinstance(loaded, dict | None):
            raise ConfigurationError(
                "The settings file is not a mapping.",
                field="config",
                value=str(path),
                allowed="a YAML mapping with sections such as model, denoiser, storage",
            )
        from_file = loaded or {}

    class _Sources(Settings, BaseSettings):
        model_config = SettingsConfigDict(
            frozen=True,
            extra="forbid",
            env_prefix="KELVIN_",
            env_nested_delimiter="__",
        )

        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            # Not as arguments of the class: pydantic-settings has options of its own among those.
            given = InitSettingsSource(settings_cls, init_kwargs=dict(overrides or {}))
            file_settings = InitSettingsSource(settings_cls, init_kwargs=from_file)
            return given, env_settings, file_settings

    try:
        merged = _Sources()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        setting = ".".join(map(str, first["loc"])) or "pools"  # several, judged together
        raise ConfigurationError(
            f"Setting {setting!r}: {first['msg']}.",
            field=setting,
            value=None if first["type"] == "missing" or not first["loc"] else first["input"],
            allowed="see the table of settings in README.md",
        ) from None
    except SettingsError as error:
        # A whole section in one variable. The message names the section, not what was in it.
        section = str(error).split('"')[1]
        raise ConfigurationError(
            f"The environment variable for the settings section {section!r} is not JSON.",
            field=section,
            allowed="JSON, or one variable a setting: KELVIN_STORAGE__BUCKET=pictures",
        ) from None
    return Settings.model_validate(merged.model_dump())
