"""A text file as samples: every token once, in order, and what is kept apart is never trained on."""

from dataclasses import replace
from itertools import islice

import pytest

from attribution.errors import InvalidArgument
from attribution.features.texts import HELD_OUT_EVERY, TextFile
from tests.models import tiny_tokenizer, traced

TEXT = "the rest is in a while, and the sun is in the sea\n"


@pytest.mark.parametrize("bos", [False, True])
def test_pieces_are_the_text_and_those_kept_apart_are_not_trained_on(tmp_path, bos):
    model = replace(traced("llama"), tokenizer=tiny_tokenizer(add_bos=bos))
    first = model.tokenizer.bos_token_id
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{TEXT[: 5 + number % 40]}\n" for number in range(300)))
    file = TextFile(model, path, context=10)
    whole = model.tokenizer.encode(path.read_text(), add_special_tokens=False)
    length = 10 if first is None else 9
    pieces = [whole[start : start + length] for start in range(0, len(whole) - length + 1, length)]
    apart, trained = pieces[::HELD_OUT_EVERY], [one for n, one in enumerate(pieces) if n % HELD_OUT_EVERY]

    def bare(sample):
        assert len(sample.token_ids) == 10
        assert sample.kept().tolist() == [first is None] * (10 - length) + [True] * length
        if first is not None:
            assert sample.token_ids[0] == first
        return sample.token_ids[10 - length :]

    assert [bare(one) for one in file.held_out(3)] == apart[:3]
    assert len(file.held_out(10**6)) == len(apart)
    # twice through the file
    assert [bare(one) for one in islice(file.training(), 2 * len(trained))] == trained * 2


def test_a_text_that_gives_nothing_is_refused(tmp_path):
    model, path = traced("llama"), tmp_path / "text.txt"
    path.write_text(TEXT)
    with pytest.raises(InvalidArgument, match="is too short: 21 pieces of 16 tokens are needed"):
        TextFile(model, path, 16)
    with pytest.raises(InvalidArgument, match="context is from 2 to"):
        TextFile(model, path, 1)
    with pytest.raises(InvalidArgument, match="cannot be read: Is a directory"):
        TextFile(model, tmp_path, 16)
