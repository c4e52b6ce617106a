from __future__ import annotations

import pytest

_summary: list[str] = []


@pytest.fixture
def closing_lines() -> list[str]:
    """What stands at the end of the run's output."""
    return _summary


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in _summary:
        terminalreporter.write_line(line)
