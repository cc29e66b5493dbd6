"""Conformance suites: subclass the one of your kind of plugin in a test file, and pytest does the rest.

    from ruvllm_core.testing import CachePolicySuite

    class TestPagedCache(CachePolicySuite):
        def make_cache(self, context):
            return PagedCache(context)

`KernelSuite`, `BackendSuite`, `CachePolicySuite` and `LearningLoopSuite` want a ``make_…`` method, which does what the
target of an offer does; `ArchitectureSuite` and `QuantizerSuite` want attributes. Models are tiny and random
(`ruvllm_core.testing.tiny`): nothing is downloaded.
"""

try:
    import pytest
except ImportError as error:
    raise ImportError("ruvllm_core.testing needs pytest: pip install pytest") from error

pytest.register_assert_rewrite(*(f"{__name__}.{name}" for name in ("tiny", "kernels", "backends", "models", "state")))

from ruvllm_core.testing.backends import BackendSuite as BackendSuite  # noqa: E402
from ruvllm_core.testing.kernels import KernelSuite as KernelSuite  # noqa: E402
from ruvllm_core.testing.models import ArchitectureSuite as ArchitectureSuite  # noqa: E402
from ruvllm_core.testing.models import QuantizerSuite as QuantizerSuite  # noqa: E402
from ruvllm_core.testing.state import CachePolicySuite as CachePolicySuite  # noqa: E402
from ruvllm_core.testing.state import LearningLoopSuite as LearningLoopSuite  # noqa: E402
