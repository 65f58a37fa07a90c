"""What `pytest -k exercise` says beside the tests: how many exercises are done, or that there are none to grade."""

import re

import pytest

import exercises


def asked(config):
    return re.match(r"exercise\b", config.option.keyword) is not None


def pytest_configure(config):
    if asked(config) and not exercises.answers().exists():
        raise pytest.UsageError(f"nothing to grade: no {exercises.answers().name} (python exercises.py writes one)")


def pytest_terminal_summary(terminalreporter):
    config = terminalreporter.config
    config.done = sum("::test_exercise[" in report.nodeid for report in terminalreporter.stats.get("passed", ()))


def pytest_unconfigure(config):
    if asked(config) and hasattr(config, "done"):
        print(f"{config.done} of {len(exercises.EXERCISES)} done")
