"""The documentation is held to the code: what the code has is described, what is described exists."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pydantic import BaseModel

import ruvllm_core
from ruvllm_core import errors, hookspecs
from ruvllm_core.settings import CacheConfig, RunConfig, Settings, load_settings

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PLUGIN = ROOT / "examples" / "third_party_plugin"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *ROOT.glob("plugins/*/README.md"), PLUGIN / "README.md"])


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", read(page), flags=re.MULTILINE | re.DOTALL)


def rows(page: Path, section: str) -> dict[str, list[str]]:
    """The tables of a section: cells by the name in backticks in the first one."""
    text = read(page).partition(f"\n{section}\n")[2]
    text = re.split(r"\n## |\n### ", text)[0]
    found = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("|") and (name := re.match(r"`([\w.-]+)`", cells[0])):
            found[name[1]] = cells
    return found


def test_the_pages_are_there() -> None:
    assert {page.name for page in PAGES} >= {
        *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "DECISIONS.md"),
        *("architecture.md", "plugins.md", "cli.md", "configuration.md"),
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", read(page)):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", read(ROOT / "Makefile"), flags=re.MULTILINE))
    assert targets >= {"run", "test", "check", "format", "dist", "bench", "clean", "help"}
    named = re.findall(r"(?:^    |`)make ([a-z-]+(?: [a-z-]+)*)", read(page), flags=re.MULTILINE)
    assert {target for names in named for target in names.split()} <= targets


def test_every_python_block_compiles_and_uses_names_that_exist() -> None:
    found = [(page, block) for page in PAGES for block in blocks(page, "python")]
    assert len(found) >= 3
    for page, block in found:
        # PEP 723 aside, a top-level `await` is how examples for asyncio are written.
        tree = ast.parse(block, filename=str(page))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ruvllm_core"):
                module = importlib.import_module(node.module or "")
                for name in node.names:
                    assert hasattr(module, name.name), f"{page.name}: {node.module} has no {name.name}"


def test_modules_named_in_the_pages_exist() -> None:
    for page in PAGES:
        for name in set(re.findall(r"`(ruvllm_core(?:\.\w+)+)`", read(page))):
            head, _, tail = name.rpartition(".")
            try:
                importlib.import_module(name)
            except ModuleNotFoundError:
                assert hasattr(importlib.import_module(head), tail), f"{page.name} names {name}"


def test_architecture_names_files_that_exist_and_all_folders_of_core() -> None:
    text = read(DOCS / "architecture.md")
    core = ROOT / "ruvllm_core"
    for name in re.findall(r"`([\w/]+\.py)`", text):
        places = [core / name, *ROOT.glob(f"plugins/*/src/*/{name}")]
        assert any(place.is_file() for place in places), name
    for folder in ("model", "decode", "generate", "cli", "testing"):
        assert f"{folder}/" in text
    assert len(text.split()) < 1000, "one page"


def test_the_command_line_reference_is_in_step() -> None:
    generator = script("cli_reference")
    written = read(DOCS / "cli.md").partition(generator.START)[2]
    assert written == "\n" + generator.reference(), "run `make format`, which writes the reference anew"


def test_commands_of_the_readme_exist() -> None:
    names = {name for name, _ in script("cli_reference").commands()}
    used = set(re.findall(r"(?:^    |`)ruvllm ([a-z]+)", read(ROOT / "README.md"), flags=re.MULTILINE))
    assert len(used) >= 10
    assert used <= names
    options = {
        option: name for name, option in re.findall(r"ruvllm ([a-z]+)[^\n]* (--[a-z-]+)", read(ROOT / "README.md"))
    }
    known = {
        name: {flag for parameter in command.params for flag in parameter.opts}
        for name, command in script("cli_reference").commands()
    }
    for option, name in options.items():
        assert option in known[name], f"ruvllm {name} has no {option}"


def leaves(model: type[BaseModel]) -> dict[str, Any]:
    return {
        name: field.get_default(call_default_factory=True)
        for name, field in model.model_fields.items()
        if not isinstance(field.get_default(call_default_factory=True), BaseModel) and name != "plugins"
    }


def as_toml(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (str, Path)):
        return f'`"{value}"`'
    return f"`{list(value) if isinstance(value, tuple) else value}`"


@pytest.mark.parametrize(
    ("section", "model"),
    [
        ("## Settings", Settings),
        ("### `[cache]`: keys and values", CacheConfig),
        ("### `[sampling]`: defaults of every request", Settings.model_fields["sampling"].annotation),
        ("### `[run]`: what `ruvllm run --config` does", RunConfig),
    ],
)
def test_every_setting_is_described_with_its_default(section: str, model: type[BaseModel]) -> None:
    described = {name: cells[1] for name, cells in rows(DOCS / "configuration.md", section).items()}
    expected = {name: as_toml(value).replace("`false`", "false") for name, value in leaves(model).items()}
    assert {name: cell.replace("`false`", "false") for name, cell in described.items()} == expected


def test_every_plugins_settings_are_described() -> None:
    text = read(DOCS / "configuration.md").partition("### `[plugins.NAME]`")[2].partition("\n## ")[0]
    described = re.findall(r"^\| `(\w+)` \| `(\w+)` \| `?([^|`]+)`? \|", text, flags=re.MULTILINE)
    registry = ruvllm_core.Registry.discover(Settings())
    ours = {entry.plugin for entry in registry.entries("architectures") if entry.distribution.startswith("ruvllm-")}
    assert ours >= {"candle_like", "mistral"}
    expected = set()
    for plugin in ours | {"quantizers", "kernels_cpu", "kernels_cuda", "kernels_neon", "kv_cache", "sona"}:
        options = registry.options(plugin)
        defaults = options.model_dump(mode="json") if options else {}
        expected |= {(plugin, name, as_toml(value).strip('`"')) for name, value in defaults.items()}
    assert set(described) == expected


def test_the_complete_file_is_complete_and_valid(tmp_path: Path) -> None:
    (block,) = blocks(DOCS / "configuration.md", "toml")
    file = tmp_path / "run.toml"
    file.write_text(block, encoding="utf-8")
    settings = load_settings(file)
    ruvllm_core.Registry.discover(settings).check_settings()
    written = tomllib.loads(block)
    missing = {
        f"{section}.{name}" if section else name
        for section, model in (("", Settings), ("cache", CacheConfig), ("run", RunConfig))
        for name in leaves(model)
        if name not in (written[section] if section else written)
    }
    assert missing == {"quantization", "plugin_allow", "run.prompt_file"}


def test_environment_variables_of_the_pages_exist() -> None:
    owned = {name for name, *_ in ruvllm_core.Registry.discover(Settings()).variables} | {"RUVLLM_JOURNAL"}
    for page in PAGES:
        for variable in set(re.findall(r"RUVLLM_[A-Z][A-Z_]*[A-Z]", read(page))) - {"RUVLLM_API_VERSION"}:
            name, *rest = variable.removeprefix("RUVLLM_").lower().split("__")
            if variable in owned:
                continue
            assert name in Settings.model_fields, f"{page.name}: {variable}"
            if rest and name != "plugins":
                annotation = Settings.model_fields[name].annotation
                assert isinstance(annotation, type) and rest[0] in annotation.model_fields  # type: ignore[attr-defined]


def test_defaults_in_the_readme_are_those_of_the_code() -> None:
    described = {
        name.removeprefix("RUVLLM_").lower(): cells[2].strip("` ")
        for name, cells in rows(ROOT / "README.md", "## Settings").items()
    }
    assert {"cache_dir", "log_level", "metal_device"} <= set(described)
    for name, default in leaves(Settings).items():
        if name in described:
            assert described[name] == ("none" if default in (None, []) else as_toml(default).strip('`"'))


def test_extras_are_described_as_they_are() -> None:
    manifest = tomllib.loads(read(ROOT / "pyproject.toml"))["project"]["optional-dependencies"]
    assert script("extras").extras() == list(manifest)
    readme = re.findall(r"^\| ((?:`[a-z-]+`(?:, )?)+) \|", read(ROOT / "README.md"), flags=re.MULTILINE)
    assert set(re.findall(r"`([a-z-]+)`", " ".join(readme))) >= set(manifest)
    table = rows(DOCS / "configuration.md", "## Extras")
    assert set(table) == set(manifest)
    for name, cells in table.items():
        packages = [requirement.partition("==")[0] for requirement in manifest[name]]
        assert packages == [f"ruvllm-{package}" for package in cells[1].split(", ")]


def test_every_extra_names_distributions_of_this_repository_at_their_version() -> None:
    projects = [tomllib.loads(read(path))["project"] for path in sorted(ROOT.glob("plugins/*/pyproject.toml"))]
    here = {f"{project['name']}=={project['version']}" for project in projects}
    extras = tomllib.loads(read(ROOT / "pyproject.toml"))["project"]["optional-dependencies"]
    for requirements in extras.values():
        assert set(requirements) <= here
    assert set(extras["all"]) == here, "a plugin that `all` forgets"
    core = tomllib.loads(read(ROOT / "pyproject.toml"))["project"]
    assert core["version"] == ruvllm_core.__version__
    for project in projects:
        assert f"ruvllm-core=={core['version']}" in project["dependencies"]
        assert project["requires-python"] == core["requires-python"]
        assert project["license"] == core["license"] and project["license-files"] == core["license-files"]


@pytest.mark.parametrize("name", hookspecs.KINDS)
def test_every_hook_is_in_the_tutorial(name: str) -> None:
    cells = rows(DOCS / "plugins.md", "## The hooks")[name]
    suite = cells[3].strip("` ")
    assert not suite or hasattr(importlib.import_module("ruvllm_core.testing"), suite)


def test_every_field_of_an_offer_is_in_the_tutorial() -> None:
    text = read(DOCS / "plugins.md")
    for field in hookspecs.Offer.__dataclass_fields__:
        assert f"| `{field}` |" in text


def test_the_tutorial_shows_the_example_as_it_is() -> None:
    shown = blocks(DOCS / "plugins.md", "python") + blocks(DOCS / "plugins.md", "toml")
    files = [PLUGIN / "pyproject.toml", *PLUGIN.glob("src/*/*.py"), *PLUGIN.glob("tests/*.py")]
    assert sorted(shown) == sorted(text for file in files if (text := read(file)).strip())
    assert sum(len(read(file).splitlines()) for file in PLUGIN.glob("src/*/*.py")) < 65


def test_the_readme_shows_the_error_tree() -> None:
    tree = (errors.__doc__ or "").partition("\n\n")[2].rpartition("\n\n")[0]
    assert tree in read(ROOT / "README.md")


def test_licences_are_the_same_everywhere() -> None:
    for name in ("LICENSE-APACHE", "LICENSE-MIT"):
        for copy in ROOT.glob(f"plugins/*/{name}"):
            assert read(copy) == read(ROOT / name)
    assert "http://www.apache.org/licenses/" in read(ROOT / "LICENSE-APACHE")


def test_only_pinned_packages_are_needed_for_tests() -> None:
    pinned = {
        line.partition("==")[0].lower().replace("_", "-")
        for line in read(ROOT / "constraints.txt").splitlines()
        if line and not line.startswith("#")
    }
    wanted = [line for line in read(ROOT / "requirements-test.txt").splitlines() if line and not line.startswith("#")]
    core = tomllib.loads(read(ROOT / "pyproject.toml"))["project"]["dependencies"]
    for requirement in (*wanted, *core):
        name = re.match(r"[\w-]+", requirement)
        assert name is not None and name[0].lower().replace("_", "-") in pinned, requirement
