"""The conformance suite: a finished bundle, asked on a device whether it is what was exported.

``pytest device_tests --bundle DIR --target NAME`` runs on the device itself; it needs this
directory, ``edgekit[run-gguf]`` (or the extra of another format) and pytest, and no torch.

``--device=ssh://user@host`` reaches another machine with the system's ssh. It gets the bundle, and
what `edgekit validate` can do from afar runs there: hashes, memory, latency. The other tests hold
the model in their own process; for them copy this directory to the device and run pytest there.

``-m "not latency"`` leaves out the budget of time, which only a quiet device can be judged by, and
``-m "not slow"`` the reading of a prompt as long as the whole context.
"""

import itertools
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import edgekit.target
from edgekit.bundle.goldens import Goldens
from edgekit.bundle.manifest import Bundle
from edgekit.errors import EdgekitError, ToolchainError
from edgekit.measuring.devices import Device, connect
from edgekit.measuring.measure import DEFAULT_REPETITIONS
from edgekit.measuring.verdict import largest_mean_kl_nats
from edgekit.run import Runner
from edgekit.target import Target
from edgekit.text.tokenizer import Text


MARKERS = (
    "latency: judges a time or a rate; meaningless on a machine that has other work",
    "slow: reads as many tokens as the context holds",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    _refuse_code_in_the_bundle()
    group = parser.getgroup("edgekit", "the bundle under test")
    group.addoption("--bundle", type=Path, metavar="DIR", help="what `edgekit export` printed")
    group.addoption(
        "--target",
        metavar="NAME",
        help="whose budget is enforced; by default that of the target it was exported for",
    )
    group.addoption(
        "--device", default="this", help='"this" (the default) or "ssh://user@host", see conftest'
    )
    group.addoption(
        "--threads", type=int, metavar="N", help="by default as many as run and validate take"
    )
    group.addoption(
        "--repetitions",
        type=int,
        default=DEFAULT_REPETITIONS,
        metavar="N",
        help="fresh processes to begin the latency test with (default: %(default)s)",
    )


def _refuse_code_in_the_bundle() -> None:
    """Keep pytest from running a ``conftest.py`` that came with a stranger's model.

    pytest reads the command line before it knows our options, so in ``--bundle DIR`` it takes DIR
    for a place with tests, in the order of the words; ``--bundle=DIR`` it leaves alone.
    """
    for option, word in itertools.pairwise(sys.argv):
        directory = Path(word)
        if option == "--bundle" and directory.is_dir():
            found = [*directory.glob("conftest.py"), *directory.glob("test*/conftest.py")]
            if found:
                raise pytest.UsageError(f"{found[0]} does not belong to a bundle; nothing was run")


def pytest_configure(config: pytest.Config) -> None:
    for line in MARKERS:
        config.addinivalue_line("markers", line)
    if config.option.reportchars == "fE":  # pytest's default hides why a test was skipped
        config.option.reportchars = "fEs"


def pytest_sessionstart(session: pytest.Session) -> None:
    options = session.config.option
    if options.bundle is None and not options.collectonly:
        raise pytest.UsageError("pass --bundle=DIR, the directory that `edgekit export` printed")


def pytest_report_header(config: pytest.Config) -> str:
    options = config.option
    target = options.target or "the bundle's own"
    return f"bundle: {options.bundle}, target: {target}, device: {options.device}"


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print what was found where a test passed: a number within its limit is still a number."""
    reports = terminalreporter.getreports("passed")
    findings = [f"{name}: {value}" for report in reports for name, value in report.user_properties]
    if findings:
        terminalreporter.section("findings", sep="-")
        for finding in findings:
            terminalreporter.line(finding)


@contextmanager
def _refusals_in_a_sentence() -> Iterator[None]:
    """Report what edgekit refuses as it would to its user, without a traceback."""
    try:
        yield
    except EdgekitError as error:
        log = error.log if isinstance(error, ToolchainError) else ""
        pytest.fail("\n".join(filter(None, (str(error), error.hint, log))), pytrace=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Generator[None]:
    with _refusals_in_a_sentence():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None]:
    with _refusals_in_a_sentence():
        return (yield)


@pytest.fixture
def record_property(request: pytest.FixtureRequest) -> Callable[[str, object], None]:
    """Keep what a test found, for the terminal and for JUnit XML.

    Instead of pytest's own of that name. That one warns that a strict reader of the xunit2 schema
    may not know the properties of a test case; where warnings are errors, as in a checkout of
    edgekit, with ``--junitxml`` every test that found something would fail.
    """

    def record(name: str, value: object) -> None:
        request.node.user_properties.append((name, value))

    return record


@pytest.fixture(scope="session")
def bundle_directory(pytestconfig: pytest.Config) -> Path:
    return Path(pytestconfig.option.bundle)


@pytest.fixture(scope="session")
def device_name(pytestconfig: pytest.Config) -> str:
    return str(pytestconfig.option.device)


@pytest.fixture(scope="session")
def threads(pytestconfig: pytest.Config) -> int | None:
    chosen: int | None = pytestconfig.option.threads
    return chosen


@pytest.fixture(scope="session")
def bundle(bundle_directory: Path) -> Bundle:
    """The bundle, its hashes checked; nothing is asked of a damaged one."""
    return Bundle.load(bundle_directory)


@pytest.fixture(scope="session")
def target(pytestconfig: pytest.Config, bundle: Bundle) -> Target:
    return edgekit.target.load(pytestconfig.option.target or bundle.target)


@pytest.fixture(scope="session")
def device(device_name: str) -> Iterator[Device]:
    with connect(device_name) as connected:
        yield connected


@pytest.fixture(scope="session")
def on_this_machine(device_name: str) -> None:
    """Skip what holds the model in this process, if that is not the device."""
    if device_name != "this":
        pytest.skip(f"runs on the device only: run `pytest device_tests` on {device_name}")


@pytest.fixture(scope="session")
def text(on_this_machine: None, bundle: Bundle) -> Text:  # noqa: ARG001 - it may skip
    return Text.open(bundle.directory, bundle.text)


@pytest.fixture(scope="session")
def goldens(on_this_machine: None, bundle: Bundle) -> Goldens:  # noqa: ARG001 - it may skip
    if bundle.agreement is None:
        pytest.skip("the bundle was exported with --no-verify: nobody knows what it should say")
    return Goldens.load(bundle.directory)


# One at a time and none while memory is measured: the next module begins when it is closed.
@pytest.fixture(scope="module")
def runner(on_this_machine: None, bundle: Bundle, threads: int | None) -> Iterator[Runner]:  # noqa: ARG001 - it may skip
    with Runner.open(bundle.directory, threads=threads, check_hashes=False) as opened:
        yield opened


@pytest.fixture(scope="session")
def mean_kl_limit_nats(bundle: Bundle) -> float:
    """How far the logits may be from the goldens, see `edgekit.measuring.verdict`."""
    return largest_mean_kl_nats(bundle)
