import pytest

from aapa_lightning.errors import ConfigError
from aapa_lightning.rewards.text import LengthReward, RegexReward, SoftOverlongReward, soft_overlong
from aapa_lightning.types import Record


def score(reward, *responses):
    return reward(responses, [Record(prompt="p")] * len(responses))


def test_regex():
    assert score(RegexReward(r"\d+"), "a1", "a", "") == [1, 0, 0]
    assert score(RegexReward(r"\d+", full=True), "12", "a12") == [1, 0]
    assert score(RegexReward("^b.c$", flags="ims"), "a\nB\nC") == [1]
    with pytest.raises(ConfigError, match=r"reward 'regex': '\(' with flags '' is not a regular expression"):
        RegexReward("(")
    with pytest.raises(ConfigError, match="with flags 'q'"):
        RegexReward("a", flags="q")


def test_length():
    assert score(LengthReward(minimum=2, maximum=3), "a", "a b", " a  b\nc ", "a b c d") == [0, 1, 1, 0]
    assert score(LengthReward(minimum=2, unit="characters"), "é", "éé") == [0, 1]
    assert score(LengthReward(maximum=1), "", "a b") == [1, 0]
    for bounds in ({}, {"minimum": 3, "maximum": 2}, {"minimum": -1, "maximum": 2}):
        with pytest.raises(ConfigError, match="expected 0 <= minimum <= maximum"):
            LengthReward(**bounds)
    with pytest.raises(ConfigError, match="unit must be 'words' or 'characters', found 'tokens'"):
        LengthReward(minimum=1, unit="tokens")


def test_soft_overlong_equals_trls():
    from trl.rewards import get_soft_overlong_punishment

    theirs = get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)
    lengths = [0, 79, 80, 81, 90, 99, 100, 101, 500]
    expected = theirs(completion_ids=[[0] * length for length in lengths])
    assert [soft_overlong(length, 100, 20) for length in lengths] == pytest.approx(expected)
    responses = ["word " * length for length in lengths]
    assert score(SoftOverlongReward(100, 20), *responses) == pytest.approx(expected)
    assert score(SoftOverlongReward(100, 20, unit="characters"), *("x" * length for length in lengths)) == pytest.approx(expected)


@pytest.mark.parametrize(("limit", "buffer"), [(10, 0), (10, 11), (0, 0)])
def test_soft_overlong_bounds(limit, buffer):
    with pytest.raises(ConfigError, match="expected 0 < buffer <= limit"):
        SoftOverlongReward(limit, buffer)
