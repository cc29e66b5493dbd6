"""The seven hooks. A plugin's ``hooks.py`` implements those it needs; each returns a list of `Offer`.

They are called once, at discovery, and must import nothing heavy: an offer names its implementation as
``"package.module:attribute"``, imported only when somebody selects it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pluggy

#: Version of these hooks and of `ruvllm_core.protocols`. A plugin states the one it was written for as
#: ``RUVLLM_API_VERSION`` in its ``hooks.py``.
API_VERSION = 1
ENTRY_POINT_GROUP = "ruvllm.plugins"

hookspec = pluggy.HookspecMarker("ruvllm")
hookimpl = pluggy.HookimplMarker("ruvllm")


@dataclass(frozen=True)
class Offer:
    """One thing a plugin provides.

    Attributes:
        name: what users select it by; unique within its kind.
        target: ``"package.module:attribute"``: for backends, cache policies and learning loops a callable taking the
            context of `ruvllm_core.protocols`; for kernels a callable taking `DecoderOptions`; for architectures and
            quantizers the object itself; for commands a `click.Command`.
        summary: one line for ``ruvllm plugins`` and ``ruvllm --help``.
        probe: returns None if it can run here, else the reason why not. Must be quick and import nothing heavy.
        priority: kernels are tried from the highest down.
        devices: what kernels run on, as in ``("cpu",)``; empty is any device.
    """

    name: str
    target: str
    summary: str = ""
    probe: Callable[[], str | None] | None = None
    priority: int = 0
    devices: tuple[str, ...] = ()


@hookspec
def architectures() -> list[Offer]:  # type: ignore[empty-body]
    """Model families: `ruvllm_core.protocols.Architecture`."""


@hookspec
def backends() -> list[Offer]:  # type: ignore[empty-body]
    """Ways of executing requests: `ruvllm_core.protocols.Backend`."""


@hookspec
def kernels() -> list[Offer]:  # type: ignore[empty-body]
    """Operations of a device: `ruvllm_core.protocols.KernelProvider`."""


@hookspec
def cache_policies() -> list[Offer]:  # type: ignore[empty-body]
    """Places for keys and values: `ruvllm_core.protocols.KVCachePolicy`."""


@hookspec
def quantizers() -> list[Offer]:  # type: ignore[empty-body]
    """Encoders of weights: `ruvllm_core.protocols.Quantizer`."""


@hookspec
def learning_loops() -> list[Offer]:  # type: ignore[empty-body]
    """Ways of learning from finished requests: `ruvllm_core.protocols.LearningLoop`."""


@hookspec
def commands() -> list[Offer]:  # type: ignore[empty-body]
    """More subcommands of ``ruvllm``: `click.Command`."""


KINDS = ("architectures", "backends", "kernels", "cache_policies", "quantizers", "learning_loops", "commands")
