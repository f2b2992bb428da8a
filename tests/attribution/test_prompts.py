"""From what a caller gives to tokens."""

import dataclasses

import numpy as np
import pytest
import torch

from attribution.errors import InvalidArgument
from attribution.operations.samples import estimate_memory
from attribution.prompts import tokens_of
from tests.models import tiny_tokenizer, traced


@pytest.mark.parametrize(
    "given", [[3, 1], (3, 1), np.array([3, 1]), torch.tensor([3, 1]), range(3, 5), [np.int64(3), torch.tensor(1)]]
)
def test_token_ids_are_taken_as_notebooks_have_them(given):
    checked = estimate_memory.validate({"prompts": [given]})["prompts"]
    assert checked == [[3, 1]] or checked == [[3, 4]]


@pytest.mark.parametrize("given", [3, None, 1.5, [1.5], [True], {"role": "user"}, ["a"], [1, "a"], [{}, 1], b"a"])
def test_what_is_no_prompt_is_refused_by_its_place(given):
    with pytest.raises(InvalidArgument, match=r"^prompts\.1\b"):
        estimate_memory.validate({"prompts": ["a", given]})


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('roles alternate') }}", "roles alternate"),
        ("{{ 1 +", "refuses"),
    ],
)
def test_messages_that_the_template_does_not_take_are_refused(template: str | None, message: str):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    model = dataclasses.replace(traced("llama"), tokenizer=tokenizer)
    with pytest.raises(InvalidArgument, match=message):
        tokens_of(model, [{"role": "user", "content": "a"}], special=True, name="messages")
