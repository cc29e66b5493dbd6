"""Settings: flags over environment (``RUVLLM_*``) over a TOML file over defaults, checked as a whole."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_settings import BaseSettings, EnvSettingsSource, NoDecode, SettingsError

from ruvllm_core.errors import ConfigError, near
from ruvllm_core.generate.request import SamplingFields

_Model = TypeVar("_Model", bound=BaseModel)
ENV_PREFIX = "RUVLLM_"
_PROPOSERS = ("off", "ngram", "learned", "draft:MODEL")


def _split(value: Any) -> Any:
    """``a, b`` from an environment variable or flag as a list."""
    if isinstance(value, str) and value != "auto":
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


Names = Annotated[list[str], NoDecode, BeforeValidator(_split)]
AutoOrNames = Annotated[Literal["auto"] | list[str], NoDecode, BeforeValidator(_split)]


def _check_proposer(value: str) -> str:
    """Raises `ValueError`."""
    if value in _PROPOSERS[:-1] or (value.startswith("draft:") and value != "draft:"):
        return value
    raise ValueError(f"expected one of {', '.join(_PROPOSERS)}; {near(value, _PROPOSERS)}")


class CacheConfig(BaseModel):
    """Where keys and values live.

    Attributes:
        policy: name of a registered cache policy.
        precision: scheme of unquantized keys and values; ``auto`` is what the decoder prefers.
    """

    model_config = ConfigDict(extra="forbid")

    policy: str = "contiguous"
    precision: Literal["auto", "f32", "f16", "bf16"] = "auto"


class ModelFields(BaseModel):
    """How a model is loaded.

    Attributes:
        max_context: most tokens of a sequence; None is the model's own limit.
        quantization: quantize unquantized weights while loading, to a scheme or recipe that a plugin offers; None
            takes the file as it is. Where a repository has several GGUF files, it also says which one is meant.
        kernels: kernel providers in order of preference; ``auto`` tries all, best first.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
        dtype: arithmetic of unquantized math.
        threads: CPU threads; 0 follows the machine and its cgroup limits.
        prefill_chunk: most prompt tokens computed in one step.
        cache: the key/value cache.
        learning: learning loops to run; ``auto`` is all that are installed, an empty list none.
        speculative: who drafts tokens for speculative decoding: ``off`` is nobody, ``ngram`` the text itself,
            ``draft:MODEL`` a smaller model with the same vocabulary, ``learned`` a learning loop.
        draft_tokens: most tokens drafted at a time; None is 15 for ``ngram`` and 4 for the others.
    """

    max_context: int | None = Field(None, ge=1)
    quantization: str | None = None
    kernels: AutoOrNames = "auto"
    device: str = Field("auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    threads: int = Field(0, ge=0, le=1024)
    prefill_chunk: int = Field(512, ge=1)
    cache: CacheConfig = Field(default_factory=CacheConfig)
    learning: AutoOrNames = "auto"
    speculative: Annotated[str, AfterValidator(_check_proposer)] = "off"
    draft_tokens: int | None = Field(None, ge=1, le=64)


class ModelConfig(ModelFields):
    """How a model is loaded, for `Engine.load`; what is not set here comes from `Settings`."""

    model_config = ConfigDict(extra="forbid")

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise explain(error, type(self), "model configuration") from None


class RunConfig(BaseModel):
    """What ``ruvllm run --config`` does: prompts given here or in a JSONL file, answers to a JSONL file or stdout."""

    model_config = ConfigDict(extra="forbid")

    prompts: list[str] = Field(default_factory=list)
    prompt_file: Path | None = None
    output: Path | None = None
    system: str | None = None
    raw: bool = False


class Settings(ModelFields):
    """All settings. Use `load_settings`, which turns mistakes into `ConfigError`.

    Attributes:
        cache_dir: where models and learned state are kept.
        metal_device: index of the Metal device.
        offline: never ask the network for anything.
        model: a hub id, a path, or ``smollm2``.
        backend: name of a registered backend.
        plugin_allow, plugin_block: plugins by name; an allow list leaves out all others.
        sampling: defaults of requests.
        run: what ``ruvllm run --config`` does.
        plugins: each plugin's own settings, by plugin name.
    """

    model_config = ConfigDict(extra="forbid")

    cache_dir: Annotated[Path, AfterValidator(Path.expanduser)] = Field(Path("~/.cache/ruvllm"), validate_default=True)
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    metal_device: int = Field(0, ge=0)
    offline: bool = False
    model: str = Field("smollm2", min_length=1)
    backend: str = "candle"
    plugin_allow: Names | None = None
    plugin_block: Names = Field(default_factory=list)
    sampling: SamplingFields = Field(default_factory=SamplingFields)
    run: RunConfig = Field(default_factory=RunConfig)
    plugins: dict[str, dict[str, Any]] = Field(default_factory=dict)

    def with_model_config(self, config: ModelConfig) -> Settings:
        """A copy in which whatever `config` sets wins."""
        update = {name: getattr(config, name) for name in config.model_fields_set}
        if "cache" in update:
            update["cache"] = self.cache.model_copy(update=config.cache.model_dump(exclude_unset=True))
        return self.model_copy(update=update)


def load_settings(file: Path | None = None, **flags: Any) -> Settings:
    """Settings from `flags`, the environment, a TOML `file` and defaults, in this order of precedence.

    Nested settings are merged key by key. Raises `ConfigError` naming the source, the key, and the nearest right key.
    """
    from_file = _read_toml(file) if file is not None else {}
    of_plugins = _check_environment(os.environ)
    try:
        fields = cast(type[BaseSettings], Settings)
        from_environment = EnvSettingsSource(fields, env_prefix=ENV_PREFIX, env_nested_delimiter="__")()
    except SettingsError as error:
        raise ConfigError(f"an environment variable {ENV_PREFIX}… cannot be read: {error}") from None
    return _validate(Settings, _merged(from_file, of_plugins, from_environment, flags), "flags and environment")


def _merged(*sources: Mapping[str, Any]) -> dict[str, Any]:
    """All keys of `sources`, later ones going first; tables are merged key by key."""
    merged: dict[str, Any] = {}
    for key, value in (pair for source in sources for pair in source.items()):
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def validate_options(model: type[BaseModel], values: Mapping[str, Any], plugin: str) -> BaseModel:
    """A plugin's own settings through its own model, which need not forbid unknown keys. Raises `ConfigError`."""
    source, prefix = f"settings of plugin {plugin}", ("plugins", plugin)
    for key in values:
        if key not in model.model_fields:
            what = f"{source}: there is no setting plugins.{plugin}.{key}"
            raise ConfigError(what, hint=near(key, model.model_fields))
    return _validate(model, values, source, prefix)


def _read_toml(file: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        values: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration file {file}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid TOML: {error}") from None
    # On trial by itself, so that its mistakes are not taken for the environment's.
    _validate(Settings, values, str(file))
    return values


def _check_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    """Refuse ``RUVLLM_*`` variables that no setting answers to: pydantic-settings would pass over them.

    Returns the settings that are set by variables of plugins' own.
    """
    found: dict[str, dict[str, str]] = {}
    for variable, value in environment.items():
        if not variable.upper().startswith(ENV_PREFIX):
            continue
        path = tuple(variable[len(ENV_PREFIX) :].lower().split("__"))
        if path[0] not in Settings.model_fields:
            path = path[:1]
        elif path[0] == "plugins" or path[:2] == ("sampling", "logit_bias"):
            continue  # of these, anything goes here
        known = _keys(Settings, path[:-1])
        if path[-1] not in known:
            from ruvllm_core.registry import Registry  # it needs this module; and few variables are a plugin's own

            owned = Registry.discover(Settings()).variables
            names = [ENV_PREFIX + "__".join((*path[:-1], key)).upper() for key in known] + [name for name, *_ in owned]
            if variable.upper() not in names:
                what = f"no setting answers to the environment variable {variable}"
                raise ConfigError(what, hint=near(variable, names))
            found |= {
                plugin: {**found.get(plugin, {}), key: value} for n, plugin, key in owned if n == variable.upper()
            }
    return {"plugins": found}


def _keys(model: type[BaseModel], path: tuple[str | int, ...]) -> list[str]:
    """Field names of the model at `path` below `model`; empty where there is none."""
    for part in path:
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)


def _validate(model: type[_Model], values: Mapping[str, Any], source: str, prefix: tuple[str, ...] = ()) -> _Model:
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise explain(error, model, source, prefix) from None


def explain(error: ValidationError, model: type[BaseModel], source: str, prefix: tuple[str, ...] = ()) -> ConfigError:
    """What is wrong with values from `source` for `model`, in one message with the nearest right name."""
    lines: list[str] = []
    hint: str | None = None
    for problem in error.errors():
        location = problem["loc"]
        name = ".".join(map(str, (*prefix, *location)))
        if problem["type"] == "extra_forbidden":
            lines.append(f"there is no setting {name}")
            hint = hint or near(str(location[-1]), _keys(model, location[:-1]))
        else:
            lines.append(f"{name}: {problem['msg']} (got {problem['input']!r})")
    return ConfigError(f"{source}: " + "; ".join(dict.fromkeys(lines)), hint=hint)
