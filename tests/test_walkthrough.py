"""Tests of walkthrough.py: it fits two screens, and its assertions notice a model that is wrong."""

import pytest

import matmla
import walkthrough


@pytest.mark.parametrize("kind, method, wrong", [
    (matmla.MLA, "read_absorbed", lambda self, *given: self.read(*given) * 1.01),
    (matmla.MatMLA, "write", lambda self, x, positions, m: matmla.Latent.write(self, x, positions, m) * m),
    (matmla.Latent, "write", lambda self, x, *_: matmla.torch.cat((self.W_DKV(x), self.W_KR(x)), -1)),
    (matmla.NestedMHA, "check", lambda self, heads, *_: (heads,)),    # then ragged rows are read by more heads
])
def test_every_claim_holds_on_two_screens_and_a_wrong_model_is_noticed(kind, method, wrong, capsys, monkeypatch):
    walkthrough.walk()
    lines = capsys.readouterr().out.splitlines()
    assert [line[0] for line in lines if line[:1].isdigit()] == list("1234567")
    assert len(lines) <= 80 and max(map(len, lines)) <= 100
    monkeypatch.setattr(kind, method, wrong)
    with pytest.raises(AssertionError):
        walkthrough.walk()
