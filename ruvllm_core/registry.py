"""Finds plugins and hands out what they offer. Discovery reads entry points and imports no implementation."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any

import pluggy
from pydantic import BaseModel

from ruvllm_core import __version__, hookspecs
from ruvllm_core.errors import ConfigError, PluginConflict, PluginError, near
from ruvllm_core.hookspecs import API_VERSION, ENTRY_POINT_GROUP, KINDS, Offer
from ruvllm_core.log import get_logger
from ruvllm_core.settings import Settings, validate_options

BUILTIN = "core"
_log = get_logger("registry")


@dataclass(frozen=True)
class Owner:
    """A plugin, and the distribution that it comes with."""

    plugin: str
    distribution: str
    version: str


@dataclass(frozen=True)
class Entry(Owner):
    """An offer, and which plugin of which distribution makes it."""

    kind: str
    offer: Offer

    @property
    def name(self) -> str:
        return self.offer.name

    def reason(self, device: str = "auto") -> str | None:
        """Why it cannot run here, or not on `device`; or None."""
        if self.offer.devices and device.partition(":")[0] not in ("auto", *self.offer.devices):
            return f"it runs on {' and '.join(self.offer.devices)}, not on {device}"
        if self.offer.probe is None:
            return None
        try:
            return self.offer.probe()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a probe is foreign code; what it raises is its reason
            return f"its probe failed: {type(error).__name__}: {error}"

    def load(self) -> Any:
        """Import the implementation. Raises `PluginError` from whatever went wrong."""
        module_name, _, attribute = self.offer.target.partition(":")
        try:
            with redirect_stdout(sys.stderr):  # stdout is for answers
                value: Any = importlib.import_module(module_name)
            for part in attribute.split("."):
                value = getattr(value, part)
            return value
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise PluginError(
                f"{self.kind} {self.name!r} of {self.distribution} {self.version} cannot be loaded from "
                f"{self.offer.target}: {type(error).__name__}: {error}",
                hint="reinstall the package, or block the plugin with plugin_block",
            ) from error


@dataclass(frozen=True)
class Quarantined(Owner):
    """A plugin not in use, or one thing of a plugin; `error` is None when the settings leave it out."""

    reason: str
    error: BaseException | None = None


class Registry:
    """All offers of all plugins, after the allow and block lists.

    A plugin that cannot be imported, was written for another API version, or offers something malformed is
    quarantined: it is listed, and raises only if somebody asks for it by name.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        self._settings = settings or Settings()
        self._entries: list[Entry] = []
        self._modules: dict[str, tuple[ModuleType, Owner]] = {}
        self.quarantined: list[Quarantined] = []

    @classmethod
    def discover(cls, settings: Settings | None = None) -> Registry:
        """A registry of the built-ins and of every installed plugin."""
        registry = cls(settings)
        registry.register(importlib.import_module("ruvllm_core.builtin"), BUILTIN, "ruvllm-core", __version__)
        # By distribution too: who keeps a name that two claim must not depend on where they are installed.
        points = entry_points(group=ENTRY_POINT_GROUP)
        for point in sorted(points, key=lambda point: (point.name, point.dist.name if point.dist else "")):
            registry._register_entry_point(point)
        return registry

    def register(self, module: ModuleType, plugin: str, distribution: str, version: str) -> None:
        """Add a plugin's hooks module. One that breaks the rules is quarantined."""
        self._admit(lambda: module, Owner(plugin, distribution, version))

    def entries(self, kind: str) -> list[Entry]:
        """All offers of `kind`; kernels by falling priority, others by name."""
        found = [entry for entry in self._entries if entry.kind == kind]
        return sorted(found, key=lambda entry: (-entry.offer.priority, entry.name))

    def entry(self, kind: str, name: str) -> Entry:
        """The one offer called `name`. Raises `PluginConflict`, or `PluginError` with the nearest names."""
        found = [entry for entry in self._entries if entry.kind == kind and entry.name == name]
        if len(found) > 1:
            owners = " and ".join(f"{entry.distribution} {entry.version} (plugin {entry.plugin})" for entry in found)
            hint = "uninstall one, or name one in plugin_block"
            raise PluginConflict(f"{kind}: {name!r} is claimed by {owners}", hint=hint)
        if found:
            return found[0]
        for plugin in self.quarantined:
            if plugin.error is not None and name in (plugin.plugin, plugin.distribution):
                raise PluginError(f"plugin {plugin.plugin} is broken: {plugin.reason}") from plugin.error
        known = [entry.name for entry in self.entries(kind)]
        raise PluginError(f"{kind}: there is no {name!r}{self.not_in_use}", hint=near(name, known))

    @property
    def not_in_use(self) -> str:
        """The plugins left out and why, for the end of a message about what is missing; empty if there are none."""
        left_out = ", ".join(f"{plugin.plugin} ({plugin.reason})" for plugin in self.quarantined)
        return left_out and f"; not in use: {left_out}"

    def load(self, kind: str, name: str, device: str = "auto") -> Any:
        """The implementation called `name`, its probe passed. Raises `PluginError`."""
        entry = self.entry(kind, name)
        if reason := entry.reason(device):
            raise PluginError(f"{kind}: {name!r} of {entry.distribution} cannot run here: {reason}")
        return entry.load()

    def load_all(self, kind: str) -> dict[str, Any]:
        """Every implementation of `kind` that can run here, by name. Raises `PluginConflict` if two share a name.

        One that cannot be imported is left out: a warning says so, and it is added to `quarantined`.
        """
        found = {}
        for entry in [self.entry(kind, entry.name) for entry in self.entries(kind) if entry.reason() is None]:
            try:
                found[entry.name] = entry.load()
            except PluginError as error:
                broken = Quarantined(entry.plugin, entry.distribution, entry.version, error.message, error)
                if broken.reason not in [plugin.reason for plugin in self.quarantined]:
                    _log.warning("left out", plugin=entry.plugin, reason=broken.reason)
                    self.quarantined.append(broken)
        return found

    def options(self, plugin: str) -> BaseModel | None:
        """The plugin's settings through its ``Settings`` model, or None if it has none. Raises `ConfigError`."""
        values = self._settings.plugins.get(plugin, {})
        module, _ = self._modules.get(plugin, (None, None))
        model = getattr(module, "Settings", None)
        if model is None:
            if values:
                raise ConfigError(f"plugin {plugin} has no settings, but {', '.join(sorted(values))} is set")
            return None
        return validate_options(model, values, plugin)

    @property
    def variables(self) -> list[tuple[str, str, str]]:
        """Environment variables of plugins' own (``ENVIRONMENT`` in ``hooks.py``): variable, plugin, its setting."""
        tables = [(plugin, getattr(module, "ENVIRONMENT", {})) for plugin, (module, _) in self._modules.items()]
        return [(variable, plugin, key) for plugin, table in tables for variable, key in table.items()]

    def check_settings(self) -> None:
        """Check every plugin's settings. Raises `ConfigError`, also for settings of a plugin that is not there."""
        quarantined = {name for out in self.quarantined for name in (out.plugin, out.distribution)}
        known = quarantined.union(self._modules)
        for plugin in self._settings.plugins:
            if plugin not in known:
                raise ConfigError(f"settings for plugin {plugin!r}, which is not installed", hint=near(plugin, known))
        allowed = set(self._settings.plugin_allow or ())
        for name in sorted(allowed - known - {entry.distribution for entry in self._entries}):
            raise ConfigError(f"plugin_allow names {name!r}, which is not installed", hint=near(name, known))
        for plugin in self._modules:
            self.options(plugin)

    def report(self) -> list[dict[str, str | None]]:
        """A row for each offer and each plugin not in use: name, kind, distribution, version, status, reason."""
        rows: list[dict[str, str | None]] = []
        for kind in KINDS:
            entries = self.entries(kind)
            for entry in entries:
                rivals = [other.distribution for other in entries if other.name == entry.name and other is not entry]
                reason = f"also claimed by {', '.join(rivals)}" if rivals else entry.reason()
                status = "conflict" if rivals else "unavailable" if reason else "ok"
                rows.append(_row(entry, entry.name, kind, status=status, reason=reason, summary=entry.offer.summary))
        for plugin in self.quarantined:
            status = "quarantined" if plugin.error else "blocked"
            rows.append(_row(plugin, plugin.plugin, "plugin", status=status, reason=plugin.reason, summary=""))
        return rows

    def _register_entry_point(self, point: EntryPoint) -> None:
        # A dist-info folder without its METADATA has neither name nor version.
        distribution = (point.dist and point.dist.name) or point.value
        owner = Owner(point.name, distribution, (point.dist and point.dist.version) or "unknown")
        names = {point.name, distribution}
        allowed, blocked = self._settings.plugin_allow, self._settings.plugin_block
        if names & set(blocked):
            self.quarantined.append(Quarantined(**vars(owner), reason="named in plugin_block"))
        elif allowed is not None and not names & set(allowed):
            self.quarantined.append(Quarantined(**vars(owner), reason="not named in plugin_allow"))
        else:
            self._admit(point.load, owner)

    def _admit(self, load: Callable[[], ModuleType], owner: Owner) -> None:
        try:
            with redirect_stdout(sys.stderr):  # stdout is for answers
                module = load()
            if taken := self._modules.get(owner.plugin):
                holder = f"{taken[1].distribution} {taken[1].version}"
                raise PluginConflict(f"the plugin name {owner.plugin} is taken by {holder}")
            self._entries += _collect(module, owner)
            self._modules[owner.plugin] = module, owner
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # sys.exit() or a native panic on import is one more broken plugin
            reason = str(error) if isinstance(error, PluginError) else f"{type(error).__name__}: {error}"
            self.quarantined.append(Quarantined(**vars(owner), reason=reason, error=error))


def _collect(module: ModuleType, owner: Owner) -> list[Entry]:
    """A plugin's offers. Raises whatever is wrong with it."""
    stated = getattr(module, "RUVLLM_API_VERSION", None)
    if stated != API_VERSION:
        written = "states no RUVLLM_API_VERSION" if stated is None else f"was written for API version {stated}"
        raise PluginError(f"it {written}; this ruvllm has version {API_VERSION}")
    settings = getattr(module, "Settings", BaseModel)
    if not (isinstance(settings, type) and issubclass(settings, BaseModel)):
        raise PluginError("its Settings is no pydantic BaseModel")
    if not set(getattr(module, "ENVIRONMENT", {}).values()) <= set(settings.model_fields):
        raise PluginError("its ENVIRONMENT names settings that it does not have")
    manager = pluggy.PluginManager("ruvllm")  # one for each plugin: what one breaks, no other meets
    manager.add_hookspecs(hookspecs)
    manager.register(module, owner.plugin)
    manager.check_pending()
    if not manager.get_hookcallers(module):
        raise PluginError("it implements no hook; is @hookimpl missing?")
    entries: list[Entry] = []
    for kind in KINDS:
        for implementation in getattr(manager.hook, kind).get_hookimpls():
            offers = implementation.function()
            if not isinstance(offers, Iterable):
                raise PluginError(f"its hook {kind} returned {type(offers).__name__}, not a list of Offer")
            for offer in offers:
                if not _usable(offer):
                    raise PluginError(f"its hook {kind} returned {offer!r}, which is no usable Offer")
                entries.append(Entry(**vars(owner), kind=kind, offer=offer))
    return entries


def _usable(offer: object) -> bool:
    if not isinstance(offer, Offer):
        return False
    texts = all(isinstance(text, str) for text in (offer.name, offer.target, offer.summary, *offer.devices))
    probe = offer.probe is None or callable(offer.probe)
    return texts and probe and isinstance(offer.priority, int) and bool(offer.name) and ":" in offer.target


def _row(owner: Owner, name: str, kind: str, **state: str | None) -> dict[str, str | None]:
    origin = {"plugin": owner.plugin, "distribution": owner.distribution, "version": owner.version}
    return {"name": name, "kind": kind, **origin, **state}
