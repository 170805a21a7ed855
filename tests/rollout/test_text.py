import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from aapa_lightning.rollout.text import decode_with_ends


class _Slow:
    """The same tokenizer without what the fast path needs."""

    is_fast = False

    def __init__(self, tokenizer) -> None:
        self._tokenizer = tokenizer

    def decode(self, ids, **kwargs) -> str:
        return self._tokenizer.decode(ids, **kwargs)


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=40))
def test_any_text_comes_back_with_the_end_of_every_token(tiny_tokenizer, text: str) -> None:
    assume(not any(token in text for token in tiny_tokenizer.all_special_tokens))
    ids = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
    decoded, ends = decode_with_ends(tiny_tokenizer, ids)
    assert decoded == text
    assert len(ends) == len(ids)
    assert ends == sorted(ends)
    if not ids:
        return
    assert ends[-1] == len(text)
    # independent: the UTF-8 bytes of a byte-level token are its length in characters of the byte alphabet
    written, expected = 0, []
    for token in tiny_tokenizer.convert_ids_to_tokens(ids):
        written += len(token)
        whole = text.encode()[:written].decode("utf-8", "ignore")
        # text that ends in a replacement character cannot be told from an unfinished one: it counts with the next character
        expected.append(len(whole.rstrip("\ufffd")) if written < len(text.encode()) else len(text))
    assert ends == expected


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_slow_path_equals_fast_path_also_on_broken_bytes(tiny_tokenizer, data) -> None:
    ids = data.draw(st.lists(st.integers(0, len(tiny_tokenizer) - 1), max_size=25))
    text, ends = decode_with_ends(tiny_tokenizer, ids)
    assert decode_with_ends(_Slow(tiny_tokenizer), ids) == (text, ends)
    assert text == tiny_tokenizer.decode(ids, skip_special_tokens=True)
    assert ends == sorted(ends)
    assert all(0 <= end <= len(text) for end in ends)


def test_a_character_split_over_tokens_counts_when_it_is_complete(tiny_tokenizer) -> None:
    ids = tiny_tokenizer("a\u20acb", add_special_tokens=False)["input_ids"]  # the euro sign is three bytes
    assert len(ids) == 5
    assert decode_with_ends(tiny_tokenizer, ids) == ("a\u20acb", [1, 1, 1, 2, 3])


def test_special_tokens_write_nothing(tiny_tokenizer) -> None:
    a, b = tiny_tokenizer("a")["input_ids"], tiny_tokenizer("b")["input_ids"]
    start, end = tiny_tokenizer.convert_tokens_to_ids("<|im_start|>"), tiny_tokenizer.eos_token_id
    assert decode_with_ends(tiny_tokenizer, [start, *a, start, *b, end]) == ("ab", [0, 1, 1, 2, 2])
    assert decode_with_ends(tiny_tokenizer, [end]) == ("", [0])
    assert decode_with_ends(tiny_tokenizer, []) == ("", [])


def test_an_unfinished_character_at_the_end_counts_at_the_last_token(tiny_tokenizer) -> None:
    ids = tiny_tokenizer("a\u20ac", add_special_tokens=False)["input_ids"][:-1]
    text, ends = decode_with_ends(tiny_tokenizer, ids)
    assert text == "a\ufffd"
    assert ends == [1, 1, 2]


@pytest.fixture(scope="module")
def sentencepiece_like():
    """A tokenizer that marks words as SentencePiece does: the space belongs to the token, and the first one is dropped in decoding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<unk>", "</s>", "\u2581the", "\u2581boat", "s", ".", "<0xE2>", "<0x82>", "<0xAC>", "<0x0A>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{"eos_token": "</s>"}, clean_up_tokenization_spaces=False)


def test_ends_follow_a_tokenizer_that_drops_the_first_space(sentencepiece_like) -> None:
    text, ends = decode_with_ends(sentencepiece_like, [2, 3, 4, 6, 7, 8, 5, 1])
    assert text == "the boats\u20ac."
    assert ends == [3, 8, 9, 9, 9, 10, 11, 11]
    assert decode_with_ends(_Slow(sentencepiece_like), [2, 3, 4, 6, 7, 8, 5, 1]) == (text, ends)


@pytest.mark.parametrize("ids", [[2, 9, 6, 3], [2, 6, 9, 7, 3], [9, 8]])
def test_broken_bytes_that_rewrite_what_stood_before_them(sentencepiece_like, ids) -> None:
    """A line break written as a byte is undone by the broken byte that follows it, which tokenizers' own stream refuses."""
    text, ends = decode_with_ends(sentencepiece_like, ids)
    assert text == sentencepiece_like.decode(ids)
    assert "\ufffd" in text
    assert decode_with_ends(_Slow(sentencepiece_like), ids) == (text, ends)
    assert ends == sorted(ends)
    assert ends[-1] == len(text)
