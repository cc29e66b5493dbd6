"""`App`: what every command of ``ruvllm`` works with, and the options that all of them take."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ruvllm_core.registry import Registry
    from ruvllm_core.settings import Settings


class App:
    """The object of every click context (``ctx.obj``).

    Settings are read on first use: by then the options before and after the subcommand are all known.

    Attributes:
        debug: show the traceback of an error.
    """

    def __init__(self) -> None:
        self.debug = False
        self._config: Path | None = None
        self._flags: dict[str, Any] = {}
        self._settings: Settings | None = None
        self._registry: Registry | None = None

    def use_config(self, file: Path) -> None:
        """Take settings from a TOML `file`."""
        if file != self._config:
            self._config, self._settings, self._registry = file, None, None

    def override(self, **flags: Any) -> Settings:
        """Put `flags` over the environment and the configuration file; those that are None say nothing."""
        self._flags.update({name: value for name, value in flags.items() if value is not None})
        self._settings = self._registry = None
        return self.settings

    @property
    def settings(self) -> Settings:
        """Settings of this call, and logging set up by them. Raises `ConfigError`."""
        if self._settings is None:
            from ruvllm_core.log import configure_logging
            from ruvllm_core.settings import load_settings

            self._settings = load_settings(self._config, **self._flags)
            configure_logging(self._settings.log_level)
        return self._settings

    @property
    def registry(self) -> Registry:
        """The installed plugins. Raises `ConfigError`, also for settings that no plugin answers to."""
        if self._registry is None:
            self._registry = self.discover()
            self._registry.check_settings()
        return self._registry

    def sources(self) -> list[dict[str, Any]]:
        """Every setting: name, value, and where it comes from (``flag``, ``environment``, the file, ``default``)."""
        from ruvllm_core.settings import ENV_PREFIX

        variables = [name.upper() for name in os.environ]
        rows = []
        for name, value in self.settings.model_dump(mode="json").items():
            own = (ENV_PREFIX + name).upper()
            if name in self._flags:
                source = "flag"
            elif any(variable == own or variable.startswith(own + "__") for variable in variables):
                source = "environment"
            else:
                source = str(self._config) if name in self.settings.model_fields_set else "default"
            rows.append({"name": name, "value": value, "source": source})
        return rows

    def discover(self) -> Registry:
        """The installed plugins, their settings unchecked."""
        from ruvllm_core.registry import Registry

        return Registry.discover(self.settings)


pass_app = click.make_pass_decorator(App)


def _remember(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    app = ctx.find_root().ensure_object(App)
    if param.name == "config" and value is not None:
        app.use_config(value)
    elif param.name == "log_level" and value is not None:
        app.override(log_level=value)
    elif param.name == "debug":
        app.debug = app.debug or value


def _option(*names: str, **attributes: Any) -> click.Option:
    # Eager, so that `--config FILE --help` lists the commands of the plugins that FILE allows.
    return click.Option(names, expose_value=False, is_eager=True, callback=_remember, **attributes)


GLOBAL_OPTIONS = (
    _option("--config", metavar="FILE", type=click.Path(path_type=Path), help="Settings in a TOML file."),
    _option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="What to log, to stderr."),
    _option("--debug", is_flag=True, help="Show the traceback of an error."),
)


def add_global_options(command: click.Command) -> click.Command:
    """Have `command`, and all below it, take the global options it has not options of its own for."""
    taken = {name for parameter in command.params for name in parameter.opts}
    command.params += [option for option in GLOBAL_OPTIONS if not taken & set(option.opts)]
    if isinstance(command, click.Group):
        for nested in command.commands.values():
            add_global_options(nested)
    return command
