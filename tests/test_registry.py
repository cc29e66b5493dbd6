"""Plugins as pip would install them: dist-info folders with entry points, on a path of their own."""

from __future__ import annotations

import importlib
import resource
import subprocess
import sys
import textwrap
import traceback
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ruvllm_cli.plugins_command import selections
from ruvllm_core import Registry, Settings, load_settings
from ruvllm_core.errors import ConfigError, PluginConflict, PluginError
from ruvllm_core.hookspecs import API_VERSION

HEAD = f"""
from ruvllm_core.hookspecs import Offer, hookimpl
RUVLLM_API_VERSION = {API_VERSION}
"""

GOOD = (
    HEAD
    + """
@hookimpl
def backends():
    return [Offer("steady", "json:dumps", "a backend that works")]
"""
)

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Put a distribution with one plugin onto the path: ``install("dist-name", "plugin", source)``."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(tmp_path))

    def put(distribution: str, plugin: str, source: str, *, version: str = "1.2.3", value: str | None = None) -> None:
        module = distribution.replace("-", "_") + "_hooks"
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(source), encoding="utf-8")
        info = tmp_path / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[ruvllm.plugins]\n{plugin} = {value or module}\n")
        importlib.invalidate_caches()

    yield put
    for name in set(sys.modules) - before:
        if name.endswith("_hooks"):
            del sys.modules[name]


def rows(registry: Registry, plugin: str) -> list[dict[str, str | None]]:
    return [row for row in registry.report() if row["plugin"] == plugin]


def discover(**settings: object) -> Registry:
    return Registry.discover(Settings(**settings))  # type: ignore[arg-type]


def test_a_plugin_is_found_with_its_distribution_and_version(install: Install) -> None:
    install("ruvllm-steady", "steady_plugin", GOOD)
    registry = discover()
    entry = registry.entry("backends", "steady")
    assert (entry.plugin, entry.distribution, entry.version) == ("steady_plugin", "ruvllm-steady", "1.2.3")
    assert registry.load("backends", "steady")([1]) == "[1]"
    (row,) = rows(registry, "steady_plugin")
    assert (row["kind"], row["status"], row["reason"]) == ("backends", "ok", None)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import module_that_is_nowhere", "ModuleNotFoundError: No module named 'module_that_is_nowhere'"),
        ("def broken(:\n    pass", "SyntaxError"),
        ("import sys\nsys.exit(3)", "SystemExit: 3"),
        ("1 / 0", "ZeroDivisionError"),
        (GOOD.replace(f"= {API_VERSION}", "= 999"), "written for API version 999"),
        (GOOD.replace("RUVLLM_API_VERSION", "API_VERSION"), "states no RUVLLM_API_VERSION"),
        (GOOD.replace("def backends", "def backend"), "unknown hook 'backend'"),
        (GOOD.replace("@hookimpl", ""), "it implements no hook"),
        (GOOD.replace("def backends()", "def backends(engine)"), "engine"),
        (HEAD + "@hookimpl\ndef backends():\n    return None", "returned NoneType, not a list of Offer"),
        (HEAD + "@hookimpl\ndef backends():\n    return 'steady'", "is no usable Offer"),
        (HEAD + "@hookimpl\ndef backends():\n    return [('a', 'b:c')]", "is no usable Offer"),
        (HEAD + "@hookimpl\ndef backends():\n    return [Offer('', 'b:c')]", "is no usable Offer"),
        (HEAD + "@hookimpl\ndef backends():\n    return [Offer('a', 'no_colon')]", "is no usable Offer"),
        (HEAD + "@hookimpl\ndef backends():\n    return [Offer(7, 'b:c')]", "is no usable Offer"),
        (HEAD + "@hookimpl\ndef backends():\n    return [Offer('a', 'b:c', priority='high')]", "is no usable Offer"),
        (HEAD + "@hookimpl\ndef backends():\n    return [Offer('a', 'b:c', probe='yes')]", "is no usable Offer"),
        (HEAD + "@hookimpl\ndef backends():\n    return [Offer('a', 'b:c', devices=(0,))]", "is no usable Offer"),
        (HEAD + "import sys\n@hookimpl\ndef backends():\n    sys.exit('bye')", "SystemExit: bye"),
        (GOOD + "\nSettings = {'rate': 1}", "its Settings is no pydantic BaseModel"),
    ],
)
def test_a_broken_plugin_is_quarantined_and_harms_nobody(install: Install, source: str, reason: str) -> None:
    install("ruvllm-broken", "broken", source)
    install("ruvllm-steady", "steady_plugin", GOOD)
    registry = discover()
    (row,) = rows(registry, "broken")
    assert row["status"] == "quarantined"
    assert row["reason"] is not None and reason in row["reason"]
    assert (row["distribution"], row["version"]) == ("ruvllm-broken", "1.2.3")
    assert registry.entry("backends", "steady").plugin == "steady_plugin"
    assert [entry.name for entry in registry.entries("kernels") if entry.plugin == "core"] == ["torch"]


@pytest.mark.parametrize("name", ["broken", "ruvllm-broken"])
def test_a_broken_plugin_asked_for_by_name_raises_its_own_traceback(install: Install, name: str) -> None:
    install("ruvllm-broken", "broken", "def fall():\n    return {}['the missing key']\nfall()\n")
    with pytest.raises(PluginError, match="plugin broken is broken: KeyError: 'the missing key'") as caught:
        discover().entry("backends", name)
    cause = caught.value.__cause__
    assert isinstance(cause, KeyError)
    last = traceback.extract_tb(cause.__traceback__)[-1]
    assert (Path(last.filename).name, last.name) == ("ruvllm_broken_hooks.py", "fall")


def test_a_plugin_that_exits_keeps_its_traceback(install: Install) -> None:
    install("ruvllm-leaver", "leaver", "import sys\nsys.exit(3)")
    with pytest.raises(PluginError) as caught:
        discover().entry("backends", "leaver")
    assert isinstance(caught.value.__cause__, SystemExit)
    assert caught.value.__cause__.__traceback__ is not None


def test_entry_points_that_are_nonsense_are_quarantined(install: Install, tmp_path: Path) -> None:
    install("ruvllm-nonsense", "nonsense", "", value="not a module !")
    bare = tmp_path / "bare-1.0.dist-info"
    bare.mkdir()
    (bare / "entry_points.txt").write_text("[ruvllm.plugins]\nbare = nowhere_at_all\n")
    registry = discover()
    assert {plugin.plugin for plugin in registry.quarantined} >= {"nonsense", "bare"}
    assert all(isinstance(value, str) for row in rows(registry, "bare") for value in row.values())


def test_two_plugins_claiming_one_name_is_an_error_that_names_both(install: Install) -> None:
    install("first-backends", "first", GOOD, version="1.0")
    install("second-backends", "second", GOOD, version="2.0")
    registry = discover()
    with pytest.raises(PluginConflict) as caught:
        registry.entry("backends", "steady")
    for part in ("first-backends 1.0", "second-backends 2.0", "'steady'", "plugin_block"):
        assert part in str(caught.value)
    with pytest.raises(PluginConflict):
        registry.load_all("backends")
    (row,) = rows(registry, "first")
    assert (row["status"], row["reason"]) == ("conflict", "also claimed by second-backends")
    assert discover(plugin_block=["second"]).entry("backends", "steady").distribution == "first-backends"


def test_two_packages_with_one_plugin_name(install: Install) -> None:
    install("first-backends", "twin", GOOD, version="1.0")
    install("second-backends", "twin", GOOD.replace("steady", "other"), version="2.0")
    registry = discover()
    (kept,) = [entry for entry in registry.entries("backends") if entry.plugin == "twin"]
    (refused,) = [plugin for plugin in registry.quarantined if plugin.plugin == "twin"]
    assert {kept.distribution, refused.distribution} == {"first-backends", "second-backends"}
    assert isinstance(refused.error, PluginConflict)
    assert refused.reason == f"the plugin name twin is taken by {kept.distribution} {kept.version}"


@pytest.mark.parametrize("name", ["steady_plugin", "ruvllm-steady"])
def test_allow_and_block_lists_take_plugin_and_distribution_names(install: Install, name: str) -> None:
    install("ruvllm-steady", "steady_plugin", GOOD)
    install("ruvllm-other", "other_plugin", GOOD.replace("steady", "other"))
    blocked = discover(plugin_block=[name])
    assert [row["status"] for row in rows(blocked, "steady_plugin")] == ["blocked"]
    assert blocked.entry("backends", "other")
    with pytest.raises(PluginError, match=r"there is no 'steady'; not in use: .*steady_plugin \(named in plugin_block"):
        blocked.entry("backends", "steady")
    allowed = discover(plugin_allow=[name])
    assert allowed.entry("backends", "steady")
    assert [row["reason"] for row in rows(allowed, "other_plugin")] == ["not named in plugin_allow"]
    assert allowed.entry("kernels", "torch").plugin == "core"
    assert discover(plugin_allow=[name], plugin_block=[name]).quarantined


def test_a_blocked_plugin_is_not_even_imported(install: Install) -> None:
    install("ruvllm-broken", "broken", "raise RuntimeError('imported')")
    registry = discover(plugin_block=["broken"])
    assert [row["reason"] for row in rows(registry, "broken")] == ["named in plugin_block"]
    assert "ruvllm_broken_hooks" not in sys.modules


def test_a_misspelt_name_is_told_the_nearest(install: Install) -> None:
    install("ruvllm-steady", "steady_plugin", GOOD)
    with pytest.raises(PluginError, match="did you mean steady"):
        discover().entry("backends", "stedy")


PROBES = (
    HEAD
    + """
def absent():
    return "no such device"
def raising():
    raise OSError("driver is missing")
def leaving():
    raise SystemExit(1)
@hookimpl
def kernels():
    return [
        Offer("fast", "json:dumps", probe=absent, priority=300),
        Offer("faster", "json:dumps", probe=raising, priority=400),
        Offer("leaver", "json:dumps", probe=leaving, priority=500),
        Offer("good", "json:dumps", probe=lambda: None, priority=200),
        Offer("gone", "module_that_is_nowhere:thing", priority=-10),
    ]
"""
)


def test_probes_say_why_something_cannot_run_here(install: Install) -> None:
    install("ruvllm-probes", "probes", PROBES)
    registry = discover()
    found = {row["name"]: (row["status"], row["reason"]) for row in rows(registry, "probes")}
    assert found["fast"] == ("unavailable", "no such device")
    assert found["faster"] == ("unavailable", "its probe failed: OSError: driver is missing")
    assert found["leaver"][0] == "unavailable"
    assert found["good"] == ("ok", None)
    with pytest.raises(PluginError, match="cannot run here: no such device"):
        registry.load("kernels", "fast")


def test_selection_goes_by_priority_and_says_why_the_others_lost(install: Install) -> None:
    install("ruvllm-probes", "probes", PROBES)
    registry = discover()
    own = [entry.name for entry in registry.entries("kernels") if entry.plugin == "probes"]
    assert own == ["leaver", "faster", "fast", "good", "gone"]

    def select(*names: str) -> dict[str, Any]:
        settings = Settings(kernels=list(names)) if names else Settings()
        return selections(registry, settings)["kernels"]

    chosen = select()
    lost = {one["name"]: one["reason"] for one in chosen["lost"]}
    assert lost["fast"] == "no such device"
    assert lost["faster"] == "its probe failed: OSError: driver is missing"
    assert chosen["selected"] == ["good"] and lost["torch"] == lost["gone"] == "good comes first"
    assert select("fast", "torch", "good")["selected"] == ["torch"]
    assert "nothing can run here (fast: no such device)" in select("fast")["error"]
    assert "did you mean faster or fast" in select("fastr")["error"]


def test_kernels_say_which_devices_they_run_on(install: Install) -> None:
    source = "@hookimpl\ndef kernels():\n    return [Offer('near', 'json:dumps', priority=5, devices=('cpu', 'mps'))]\n"
    install("ruvllm-near", "near", HEAD + source)
    registry = discover()
    for device, chosen in (("auto", "near"), ("cpu", "near"), ("mps", "near"), ("cuda:1", "torch")):
        found = selections(registry, Settings(device=device, kernels=["near", "torch"]))["kernels"]
        assert found["selected"] == [chosen], device
    assert {"name": "near", "reason": "it runs on cpu and mps, not on cuda:1"} in found["lost"]
    with pytest.raises(PluginError, match="'near' of ruvllm-near cannot run here: it runs on cpu and mps, not on cuda"):
        registry.load("kernels", "near", "cuda")
    assert registry.load("kernels", "near", "cpu").__name__ == "dumps"


def test_an_implementation_that_cannot_be_imported_names_its_package(install: Install) -> None:
    install("ruvllm-probes", "probes", PROBES)
    with pytest.raises(PluginError, match=r"'gone' of ruvllm-probes 1.2.3 .*module_that_is_nowhere") as caught:
        discover().load("kernels", "gone")
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


FAMILIES = (
    HEAD
    + """
@hookimpl
def architectures():
    return [Offer("broken_family", "{module}:family"), Offer("working_family", "types:SimpleNamespace")]
"""
)


@pytest.mark.parametrize("module", ["module_that_is_nowhere", "ruvllm_families_leaver"])
def test_one_broken_implementation_does_not_hide_the_others(
    install: Install, tmp_path: Path, capsys: pytest.CaptureFixture[str], module: str
) -> None:
    (tmp_path / "ruvllm_families_leaver.py").write_text("import sys\nsys.exit(3)\n")
    install("ruvllm-families", "families", FAMILIES.replace("{module}", module))
    registry = discover(plugin_allow=["families"])
    for _ in range(2):  # the second time without another warning
        assert registry.load_all("architectures") == {"working_family": types.SimpleNamespace}
    warned = capsys.readouterr().err
    reason = f"architectures 'broken_family' of ruvllm-families 1.2.3 cannot be loaded from {module}:family"
    assert warned.count("left out") == 1
    assert "families" in warned and reason in warned
    assert [plugin.reason.startswith(reason) for plugin in registry.quarantined if plugin.error] == [True]
    assert registry.entry("architectures", "working_family")
    with pytest.raises(PluginError, match=f"{reason}: (ModuleNotFoundError|SystemExit)") as caught:
        registry.load("architectures", "broken_family")
    assert caught.value.hint is not None and "plugin_block" in caught.value.hint


WITH_SETTINGS = (
    GOOD
    + """
from pydantic import BaseModel, Field
class Settings(BaseModel):
    learning_rate: float = Field(0.1, gt=0)
    rank: int = 2
"""
)


def test_a_plugins_own_settings_are_checked_by_its_own_model(install: Install) -> None:
    install("ruvllm-tuned", "tuned", WITH_SETTINGS)
    registry = discover(plugins={"tuned": {"learning_rate": "0.5"}})
    registry.check_settings()
    options = registry.options("tuned")
    assert options is not None and options.model_dump() == {"learning_rate": 0.5, "rank": 2}


@pytest.mark.parametrize(
    ("plugins", "message"),
    [
        ({"tuned": {"learning_rat": 1}}, "plugins.tuned.learning_rat\n  did you mean learning_rate"),
        ({"tuned": {"learning_rate": 0}}, "plugins.tuned.learning_rate: Input should be greater than 0"),
        ({"tuned": {"rank": "two"}}, "plugins.tuned.rank"),
        ({"tunde": {"rank": 1}}, "settings for plugin 'tunde', which is not installed\n  did you mean tuned"),
        ({"core": {"rank": 1}}, "plugin core has no settings, but rank is set"),
    ],
)
def test_wrong_plugin_settings_are_errors(install: Install, plugins: dict[str, object], message: str) -> None:
    install("ruvllm-tuned", "tuned", WITH_SETTINGS)
    with pytest.raises(ConfigError) as caught:
        discover(plugins=plugins).check_settings()
    assert message in str(caught.value)


def test_a_plugin_may_own_an_environment_variable(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("ruvllm-tuned", "tuned", WITH_SETTINGS + "ENVIRONMENT = {'RUVLLM_TUNE_RANK': 'rank'}\n")
    install("ruvllm-other", "other", WITH_SETTINGS + "ENVIRONMENT = {'RUVLLM_TUNE_RANK': 'rank'}\n")
    install("ruvllm-wrong", "wrong", WITH_SETTINGS + "ENVIRONMENT = {'RUVLLM_TUNE_RATE': 'rate'}\n")
    install("ruvllm-worse", "worse", WITH_SETTINGS + "ENVIRONMENT = 'RUVLLM_TUNE_RATE'\n")
    monkeypatch.setenv("RUVLLM_TUNE_RANK", "7")
    settings = load_settings(plugins={"tuned": {"learning_rate": 0.5}, "other": {"rank": 8}})
    registry = Registry.discover(settings)
    tuned, other = registry.options("tuned"), registry.options("other")
    assert tuned is not None and tuned.model_dump() == {"learning_rate": 0.5, "rank": 7}
    assert other is not None and other.model_dump()["rank"] == 8, "a flag goes first"
    assert {row["name"]: row["reason"] for row in rows(registry, "wrong") + rows(registry, "worse")} == {
        "wrong": "its ENVIRONMENT names settings that it does not have",
        "worse": "AttributeError: 'str' object has no attribute 'values'",
    }
    monkeypatch.setenv("RUVLLM_PLUGINS__TUNED__RANK", "9")
    assert load_settings().plugins == {"tuned": {"rank": "9"}, "other": {"rank": "7"}}, "the long name goes first"
    monkeypatch.setenv("RUVLLM_TUNE_RANG", "7")
    with pytest.raises(ConfigError, match=r"variable RUVLLM_TUNE_RANG\n.*did you mean RUVLLM_TUNE_RANK"):
        load_settings()
    monkeypatch.delenv("RUVLLM_TUNE_RANG")
    monkeypatch.setenv("RUVLLM_TUNE_RANK", "many")
    with pytest.raises(ConfigError, match=r"settings of plugin other: plugins\.other\.rank: .*integer"):
        Registry.discover(load_settings()).options("other")


def test_an_allow_list_that_names_nobody_is_an_error(install: Install) -> None:
    install("ruvllm-tuned", "tuned", WITH_SETTINGS)
    with pytest.raises(ConfigError, match=r"plugin_allow names 'tunde'.*\n.*did you mean tuned"):
        discover(plugin_allow=["tunde"]).check_settings()
    discover(plugin_allow=["ruvllm-tuned"]).check_settings()


def test_discovery_is_quick_and_imports_no_torch() -> None:
    program = textwrap.dedent("""
        import sys
        from ruvllm_core.registry import Registry
        from ruvllm_core.settings import load_settings
        Registry.discover(load_settings()).report()
        heavy = {"torch", "transformers", "tokenizers", "huggingface_hub", "safetensors", "jinja2"} & set(sys.modules)
        sys.exit(f"discovery imported {heavy}" if heavy else 0)
    """)
    seconds = []
    for _ in range(2):  # the first may have to compile
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", program], check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # Processor time: one thread that waits for nothing, so it is the wall clock of a machine that is not shared.
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.5, seconds
