"""What `pytest -k exercise` says beside the tests: how many exercises are done, or that there are none to grade."""

import re

import pytest

import exercises


def asked(config):
    return re.match(r"exercise\b", config.option.keyword)


def pytest_configure(config):
    if asked(config) and not exercises.answers().exists():
        raise pytest.UsageError(
            f"nothing to grade: no {exercises.answers().name} (python exercises.py writes one)"
        )


@pytest.hookimpl(wrapper=True, tryfirst=True)  # so that it is the last line
def pytest_sessionfinish(session):
    yield
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter and asked(session.config):
        done = sum(
            "::test_exercise[" in report.nodeid for report in reporter.stats.get("passed", ())
        )
        reporter.write_line(f"{done} of {len(exercises.EXERCISES)} done")
