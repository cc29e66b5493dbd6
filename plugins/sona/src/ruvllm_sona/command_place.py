"""`Place`: where a user's memory of a model is; what every command of ``ruvllm sona`` begins with."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ruvllm_core.cli.app import App
from ruvllm_core.errors import LearningError
from ruvllm_sona.files import LOG

if TYPE_CHECKING:
    from ruvllm_core.model.loader import ModelFile
    from ruvllm_core.model.tokenizer import Tokenizer
    from ruvllm_core.protocols import LowRank
    from ruvllm_core.registry import Registry
    from ruvllm_sona.patterns import PatternBank
    from ruvllm_sona.settings import SonaSettings
    from ruvllm_sona.tenant import Tenant
    from ruvllm_sona.versions import Versions

_F = TypeVar("_F", bound=Callable[..., Any])

as_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON value.")
pattern_option = click.option(
    "--pattern", type=click.IntRange(0), default=0, show_default=True, help="Prompts of one kind; 0 is what all share."
)


def place_options(function: _F) -> _F:
    """The model as the last argument, and the user."""
    user = click.option("--user", metavar="NAME", default="", help="Whose; without it, whoever has no name.")
    model = click.argument("model", required=False)
    return model(user(function))


@dataclass(frozen=True, eq=False)
class Place:
    """A user's memory of one model, the model open but not loaded.

    Attributes:
        state_dir: of the plugin.
        folder: of this user and this model; it may not exist.
    """

    model: ModelFile
    name: str
    user: str
    state_dir: Path
    folder: Path
    settings: SonaSettings
    registry: Registry

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return self.model.tokenizer()

    @property
    def whose(self) -> str:
        """The user and the model, for messages."""
        return f"{f'user {self.user!r}' if self.user else 'the user without a name'} of {self.name}"

    def patterns(self) -> list[int]:
        """Those that may have versions."""
        names = (path.name for path in (self.folder / "versions").glob("*") if path.is_dir())
        return sorted({0, *(int(name) for name in names if name.isdecimal())})

    def bank(self) -> PatternBank:
        """The patterns as they were saved; a new bank if they never were. Raises `LearningError`."""
        from ruvllm_sona.files import load_tensors
        from ruvllm_sona.patterns import PatternBank

        bank = PatternBank(self.model.spec.hidden_size)
        if (path := self.folder / "state.safetensors").exists():
            arrays, metadata = load_tensors(path)
            own = {name[5:]: values for name, values in arrays.items() if name.startswith("bank.")}
            bank.restore(own, json.loads(metadata["state"])["bank"])
        return bank

    def versions(self, pattern: int) -> Versions:
        """What was published, to be read. Raises `LearningError` for a pattern that there is not."""
        from ruvllm_sona.versions import Versions

        if pattern not in (known := self.patterns()):
            raise LearningError(
                f"there is no pattern {pattern}",
                hint=f"there are {', '.join(map(str, known))}: see `ruvllm sona status`",
            )
        return Versions(self.folder / "versions" / f"{pattern:04d}", self.settings.keep_versions)

    def deltas(self, pattern: int, number: int | None) -> tuple[int, dict[str, LowRank]]:
        """A version, or the one in force, and its number. Raises `LearningError` if it is the base model."""
        versions = self.versions(pattern)
        number = versions.current if number is None else number
        if not number:
            kept = ", ".join(str(one.number) for one in versions.kept()) or "none"
            raise LearningError(
                "version 0 is the base model: there is nothing to write", hint=f"published versions: {kept}"
            )
        return number, versions.load(number)

    @contextmanager
    def tenant(self) -> Iterator[Tenant]:
        """The user's memory, to be changed. Raises `LearningError` if it is in use."""
        from ruvllm_sona.pooled import Pooler
        from ruvllm_sona.tenant import Tenant

        pooler = Pooler(self.model.weights["embed"], self.tokenizer)
        with closing(Tenant(self.folder, self.user, self.model.spec, self.settings, pooler)) as tenant:
            yield tenant


def open_place(app: App, model: str | None, user: str, *, new: bool = False) -> Place:
    """Where `user`'s memory of `model`, or of the one in the settings, is.

    Raises `LearningError` if there is none, unless it may be `new`, and whatever opening the model raises.
    """
    if model:
        app.set("model", model)
    from ruvllm_core.model.hub import resolve
    from ruvllm_core.model.loader import open_model, quantize_weights
    from ruvllm_sona.files import folder_name
    from ruvllm_sona.fingerprint import Fingerprint
    from ruvllm_sona.settings import SonaSettings

    settings, registry = app.settings, app.registry
    own = registry.options(registry.entry("commands", "sona").plugin)
    file = open_model(resolve(settings.model, settings), registry)
    if settings.quantization:  # then these are the weights that were learned with
        quantize_weights(file, registry.load("quantizers", settings.quantization))
    state_dir = settings.cache_dir / "learning" / "sona"
    folder = state_dir / folder_name(Fingerprint.of(file.spec, file.weights).text()) / folder_name(user)
    assert isinstance(own, SonaSettings)
    place = Place(file, settings.model, user, state_dir, folder, own, registry)
    if not new and not (folder / LOG).is_file():  # drafts are learned without any feedback
        raise LearningError(
            f"nothing was ever learned for {place.whose}",
            hint=f"`ruvllm chat {settings.model} --learn` does, from /good and /bad; its memory would be {folder}",
        )
    return place
