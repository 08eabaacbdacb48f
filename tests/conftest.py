"""What all tests share."""

from __future__ import annotations

import os
import resource
import signal
from collections import Counter
from collections.abc import Generator, Iterator
from typing import Any

import pytest

import trtllm_thoughtx  # noqa: F401  # before any test imports onnxruntime: it turns the telemetry off

if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has its share of the cores: threads of one would spin where the others work
    number, count = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw")), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[number::count] or os.sched_getaffinity(0))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when numpy and torch are imported; models here are too small for two threads
os.environ["TRITON_INTERPRET"] = "1"  # kernels run on the CPU; Triton reads this when it is imported, which other packages may do

BEGAN = pytest.StashKey[float]()
LONGEST = ("test_readme.py", "test_outside.py", "test_slots.py", "test_parity.py", "test_drafts.py", "test_kernel.py")
HANGS_AFTER = 1800  # seconds; far above what any test takes on a busy machine, so that only a test that waits for ever meets it


def pytest_configure() -> None:
    """Take Ctrl-C even where the suite runs with SIGINT ignored (in the background): children inherit that, and tests interrupt them."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def no_hanging() -> Iterator[None]:
    """A read that blocks, or a child that never ends, becomes a failure and not a stuck run."""

    def stop(*_: object) -> None:
        raise AssertionError("the test hangs")

    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(HANGS_AFTER)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with much to do come first, so that no worker of `--dist loadfile --no-loadscope-reorder` ends long after the others."""
    num_slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: (LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST), -num_slow[item.path]))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cpu", type=int, default=0, metavar="N", help="list the N tests that take most CPU time, which a busy machine does not change"
    )


def cpu_seconds() -> float:
    """User and system time of this process and of the children that ended."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    item.stash[BEGAN] = cpu_seconds()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    report = yield
    if call.when == "teardown":
        report.user_properties.append(("cpu", cpu_seconds() - item.stash[BEGAN]))
    return report


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Fixtures count for the first test that asks for them; parameters of one test are added up."""
    if not config.getoption("--cpu"):
        return
    spent, num = Counter[str](), Counter[str]()
    for report in (one for reports in terminalreporter.stats.values() for one in reports if getattr(one, "when", "") == "teardown"):
        name = report.nodeid.partition("[")[0]
        spent[name] += dict(report.user_properties).get("cpu", 0.0)
        num[name] += 1
    terminalreporter.section(f"CPU seconds: {spent.total():.0f} in {num.total()} tests")
    for name, seconds in spent.most_common(config.getoption("--cpu")):
        terminalreporter.write_line(f"{seconds:7.1f}  {name}" + (f" ({num[name]} parameters)" if num[name] > 1 else ""))
