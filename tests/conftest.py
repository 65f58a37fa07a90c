"""What the tests of several files use."""

import sys

import pytest
import torch


@pytest.fixture
def says(monkeypatch, capsys):
    """says(script, flags): what the script prints. The flags are a line, or a list of words."""

    def says(script, flags):
        words = flags.split() if isinstance(flags, str) else flags
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *words])
        capsys.readouterr()
        script.main()
        return capsys.readouterr().out

    return says


@pytest.fixture
def refuses(capsys):
    """refuses(words, call, ...): status 2 and one line on stderr with all words. Returns stdout."""

    def refuses(words, call, *arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit, match="^2$"):
            call(*arguments)
        out, message = capsys.readouterr()
        assert message.count("\n") == 1 and all(word in message for word in words), message
        return out

    return refuses


@pytest.fixture
def in_float64(monkeypatch):
    """transformers computes norms and angles in float32, whatever the weights are. Here not."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    for name in ("float", "float32"):
        monkeypatch.setattr(torch, name, torch.float64)
