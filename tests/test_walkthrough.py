"""Tests of walkthrough.py: it fits two screens, and its assertions notice a model that is wrong."""

import pytest

import common  # noqa: F401    the first of ours
import matmla
import walkthrough


def test_every_claim_holds_and_is_printed_on_two_screens(capsys):
    walkthrough.walk()
    lines = capsys.readouterr().out.splitlines()
    assert [line[0] for line in lines if line[:1].isdigit()] == list("1234567")
    assert len(lines) <= 80 and max(map(len, lines)) <= 100


@pytest.mark.parametrize("kind, method, wrong", [
    (matmla.MLA, "read_absorbed", lambda self, x, rows, positions, m: self.read(x, rows, positions, m) * 1.01),
    (matmla.MatMLA, "write", lambda self, x, positions, m: matmla.Latent.write(self, x, positions, m) * m),
    (matmla.Latent, "write", lambda self, x, positions, m: matmla.torch.cat((self.W_DKV(x), self.W_KR(x)), -1)),
    (matmla.NestedMHA, "check", lambda self, heads, batch, most: (heads,)),
], ids=["absorbed is another result", "rows depend on m", "a row without norm and RoPE", "ragged rows read by more"])
def test_a_wrong_model_does_not_get_through(kind, method, wrong, monkeypatch):
    monkeypatch.setattr(kind, method, wrong)
    with pytest.raises((AssertionError, RuntimeError)):
        walkthrough.walk()
