"""`App`: what every command of ``ruvllm`` works with, and the options that all of them take."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from ruvllm_core.registry import Registry
    from ruvllm_core.settings import Settings

_Command = TypeVar("_Command", bound=Callable[..., Any] | click.Command)
LOG_LEVELS = ("debug", "info", "warning", "error")


class App:
    """The object of every click context (``ctx.obj``).

    Settings are read on first use: by then the options before and after the subcommand are all known.

    Attributes:
        debug: show the traceback of an error.
        config: the TOML file that settings are read from, if any.
        flags: settings that were given as options, nested as in the file.
    """

    def __init__(self) -> None:
        self.debug = False
        self.config: Path | None = None
        self.flags: dict[str, Any] = {}
        self._settings: Settings | None = None
        self._registry: Registry | None = None

    def use_config(self, file: Path) -> None:
        """Take settings from a TOML `file`."""
        if file != self.config:
            self.config, self._settings, self._registry = file, None, None

    def set(self, path: str, value: Any) -> None:
        """Put `value` of the setting at a dotted `path` over the environment and the configuration file."""
        level = self.flags
        *parents, name = path.split(".")
        for parent in parents:
            level = level.setdefault(parent, {})
        level[name] = value
        self._settings = self._registry = None

    @property
    def settings(self) -> Settings:
        """Settings of this call, and logging set up by them. Raises `ConfigError`."""
        if self._settings is None:
            from ruvllm_core.log import configure_logging
            from ruvllm_core.settings import load_settings

            self._settings = load_settings(self.config, **self.flags)
            configure_logging(self._settings.log_level)
        return self._settings

    @property
    def registry(self) -> Registry:
        """The installed plugins, their own settings not checked yet. Raises `ConfigError`."""
        if self._registry is None:
            from ruvllm_core.registry import Registry

            self._registry = Registry.discover(self.settings)
        return self._registry


pass_app = click.make_pass_decorator(App)


def setting(path: str, *names: str, **attributes: Any) -> Callable[[_Command], _Command]:
    """A decorator: an option whose value, if given, becomes the setting at `path`."""

    def remember(ctx: click.Context, param: click.Parameter, value: Any) -> None:
        if value is not None and value != ():
            ctx.find_root().ensure_object(App).set(path, value)

    return click.option(*names, expose_value=False, callback=remember, default=None, **attributes)


def _use_config(ctx: click.Context, param: click.Parameter, value: Path | None) -> None:
    if value is not None:
        ctx.find_root().ensure_object(App).use_config(value)


def _use_debug(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    ctx.find_root().ensure_object(App).debug |= value


def global_options(command: _Command) -> _Command:
    """The options that every command takes, before and after its name."""
    # --config is eager, so that `--config FILE --help` lists the commands of the plugins that FILE allows.
    file: dict[str, Any] = {"metavar": "FILE", "type": click.Path(path_type=Path), "help": "Settings in a TOML file."}
    debug = click.option("--debug", is_flag=True, expose_value=False, callback=_use_debug, help="Show tracebacks.")
    level = setting("log_level", "--log-level", type=click.Choice(LOG_LEVELS), help="What to log, to stderr.")
    config = click.option("--config", is_eager=True, expose_value=False, callback=_use_config, **file)
    return config(level(debug(command)))


def add_global_options(command: click.Command) -> click.Command:
    """A copy of `command` that takes the global options, but for those it has options of its own for.

    So do all below it. The plugin's own object stays as the plugin made it.
    """
    command = copy.copy(command)
    template = global_options(click.Command(None))
    taken = {name for parameter in command.params for name in parameter.opts}
    command.params = command.params + [option for option in template.params if not taken & set(option.opts)]
    if isinstance(command, click.Group):
        command.commands = {name: add_global_options(nested) for name, nested in command.commands.items()}
    return command
