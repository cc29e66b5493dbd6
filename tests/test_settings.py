"""Settings: who wins, how they merge, and what mistakes are told."""

from __future__ import annotations

from pathlib import Path

import pytest

from ruvllm_core import CacheConfig, ModelConfig, Settings, load_settings
from ruvllm_core.errors import ConfigError


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in list(os.environ):
        if name.startswith("RUVLLM_"):
            monkeypatch.delenv(name)


def toml(folder: Path, text: str) -> Path:
    file = folder / "run.toml"
    file.write_text(text, encoding="utf-8")
    return file


def test_defaults() -> None:
    settings = load_settings()
    assert settings == Settings()
    assert settings.cache_dir == Path("~/.cache/ruvllm").expanduser()
    assert (settings.log_level, settings.metal_device, settings.model) == ("info", 0, "smollm2")


def test_flags_beat_the_environment_beats_the_file_beats_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = toml(tmp_path, "threads = 1\nprefill_chunk = 10\nmax_context = 100\n")
    monkeypatch.setenv("RUVLLM_THREADS", "2")
    monkeypatch.setenv("RUVLLM_PREFILL_CHUNK", "20")
    settings = load_settings(file, threads=3)
    assert (settings.threads, settings.prefill_chunk, settings.max_context) == (3, 20, 100)
    assert settings.metal_device == 0
    assert type(settings) is Settings


def test_nested_settings_merge_key_by_key_across_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = toml(tmp_path, '[sampling]\ntop_k = 1\ntop_p = 0.5\nseed = 7\n[cache]\nprecision = "f32"\n')
    monkeypatch.setenv("RUVLLM_SAMPLING__TOP_K", "2")
    monkeypatch.setenv("RUVLLM_SAMPLING__MIN_P", "0.1")
    settings = load_settings(file, sampling={"min_p": 0.2}, cache={"policy": "paged"})
    sampling = settings.sampling
    assert (sampling.min_p, sampling.top_k, sampling.top_p, sampling.seed) == (0.2, 2, 0.5, 7)
    assert settings.cache == CacheConfig(policy="paged", precision="f32")


def test_plugin_settings_come_from_file_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = toml(tmp_path, "[plugins.sona]\nrank = 2\nlearning_rate = 0.1\n")
    monkeypatch.setenv("RUVLLM_PLUGINS__SONA__LEARNING_RATE", "0.5")
    options = load_settings(file).plugins["sona"]
    # Releases of pydantic-settings differ in whether they decode it; the plugin's own model does in any case.
    assert {name: float(value) for name, value in options.items()} == {"rank": 2.0, "learning_rate": 0.5}


@pytest.mark.parametrize(
    ("variable", "value", "field", "expected"),
    [
        ("RUVLLM_PLUGIN_BLOCK", "a, b,", "plugin_block", ["a", "b"]),
        ("RUVLLM_PLUGIN_ALLOW", "a", "plugin_allow", ["a"]),
        ("RUVLLM_PLUGIN_ALLOW", "a,b", "plugin_allow", ["a", "b"]),
        ("RUVLLM_KERNELS", "cpu,torch", "kernels", ["cpu", "torch"]),
        ("RUVLLM_KERNELS", "auto", "kernels", "auto"),
        ("RUVLLM_LEARNING", "", "learning", []),
        ("RUVLLM_OFFLINE", "1", "offline", True),
        ("RUVLLM_CACHE_DIR", "/somewhere", "cache_dir", Path("/somewhere")),
        ("RUVLLM_LOG_LEVEL", "debug", "log_level", "debug"),
        ("RUVLLM_METAL_DEVICE", "1", "metal_device", 1),
        ("RUVLLM_DEVICE", "cuda:3", "device", "cuda:3"),
        ("ruvllm_threads", "5", "threads", 5),
    ],
)
def test_values_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, field: str, expected: object
) -> None:
    monkeypatch.setenv(variable, value)
    assert getattr(load_settings(), field) == expected


def test_biases_by_token_id_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUVLLM_SAMPLING__LOGIT_BIAS__5", "-1.5")
    assert load_settings().sampling.logit_bias == {5: -1.5}


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("thread = 1", ["there is no setting thread", "did you mean threads"]),
        ("[cache]\npolcy = 'paged'", ["there is no setting cache.polcy", "did you mean policy"]),
        ("[sampling]\ntemprature = 1", ["there is no setting sampling.temprature", "did you mean temperature"]),
        ("[run]\nprompt = ['a']", ["there is no setting run.prompt", "prompts"]),
        ("threads = 'many'", ["threads: Input should be a valid integer", "got 'many'"]),
        ("threads = -1", ["threads: Input should be greater than or equal to 0"]),
        ("log_level = 'loud'", ["log_level", "got 'loud'"]),
        ("device = 'gpu'", ["device", "got 'gpu'"]),
        ("model = ''", ["model: String should have at least 1 character"]),
        ("[sampling]\ntop_p = 2", ["sampling.top_p: Input should be less than or equal to 1"]),
        ("[sampling]\nstop = ['']", ["sampling.stop", "at least 1 character"]),
        ("[cache]\nprecision = 'f8'", ["cache.precision", "got 'f8'"]),
        ("plugins = 3", ["plugins: Input should be a valid dictionary"]),
        ("threads = ", ["is not valid TOML"]),
    ],
)
def test_mistakes_in_the_file_name_file_key_and_remedy(tmp_path: Path, text: str, messages: list[str]) -> None:
    file = toml(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_settings(file)
    for message in [str(file), *messages]:
        assert message in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the configuration file .*absent\.toml: No such file"):
        load_settings(tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match=r"cannot read the configuration file .*: Is a directory"):
        load_settings(tmp_path)
    file = tmp_path / "latin.toml"
    file.write_bytes('model = "caf\xe9"'.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.toml is not valid TOML: 'utf-8' codec"):
        load_settings(file)


@pytest.mark.parametrize(
    ("variable", "value", "messages"),
    [
        ("RUVLLM_THREAD", "1", ["environment variable RUVLLM_THREAD", "did you mean RUVLLM_THREADS"]),
        ("RUVLLM_CACHE__POLCY", "paged", ["RUVLLM_CACHE__POLCY", "did you mean RUVLLM_CACHE__POLICY"]),
        ("RUVLLM_CASHE__POLICY", "paged", ["RUVLLM_CASHE__POLICY", "RUVLLM_CACHE"]),
        ("RUVLLM_MODEL__NAME", "x", ["RUVLLM_MODEL__NAME"]),
        ("RUVLLM_THREADS", "many", ["threads: Input should be a valid integer", "got 'many'"]),
        ("RUVLLM_OFFLINE", "perhaps", ["offline", "got 'perhaps'"]),
        ("RUVLLM_CACHE", "{not json", ["RUVLLM_"]),
        ("RUVLLM_SAMPLING__TOP_P", "7", ["sampling.top_p"]),
    ],
)
def test_mistakes_in_the_environment(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, messages: list[str]
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError) as caught:
        load_settings()
    for message in messages:
        assert message in str(caught.value)


def test_mistakes_in_flags() -> None:
    with pytest.raises(ConfigError, match=r"there is no setting thread\n.*did you mean threads"):
        load_settings(thread=1)


def test_a_mistake_in_the_file_is_found_even_where_the_environment_would_win(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUVLLM_THREADS", "1")
    with pytest.raises(ConfigError, match=r"run\.toml: threads"):
        load_settings(toml(tmp_path, "threads = 'many'"))


def test_a_model_config_lays_over_settings_only_what_it_sets(tmp_path: Path) -> None:
    settings = load_settings(toml(tmp_path, "threads = 2\ndevice = 'cpu'\n[cache]\nprecision = 'f32'\n"))
    merged = settings.with_model_config(ModelConfig(threads=1, cache=CacheConfig(policy="paged")))
    assert (merged.threads, merged.device) == (1, "cpu")
    assert merged.cache == CacheConfig(policy="paged", precision="f32")
    assert settings.threads == 2 and settings.cache.policy == "contiguous"
    assert settings.with_model_config(ModelConfig()) == settings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"quantisation": "q4_k"}, "there is no setting quantisation\n  did you mean quantization"),
        ({"cache": {"polcy": "paged"}}, "there is no setting cache.polcy\n  did you mean policy"),
        ({"max_context": 0}, "max_context: Input should be greater than or equal to 1"),
    ],
)
def test_a_model_config_that_makes_no_sense(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig(**values)
    assert message in str(caught.value)
