"""From messages to the prompt: what each kind of message and each template variable becomes."""

from pathlib import Path
from typing import Any

import pytest

from tests.models import save_tiny
from tests.server.support import HELLO, LAST_LOGITS, Served, encode, error_of, serve, tokenizer

ASSISTANT = "<|im_start|>assistant\n"


def _turn(role: str, content: str) -> str:
    return f"<|im_start|>{role}\n{content}<|im_end|>\n"


def _prompt(served: Served, model: str, messages: list[Any], **body: Any) -> str:
    """The prompt that the model was given, as text; its tokens are those of the text."""
    answer = served.chat(model, messages, max_tokens=1, savepoints=LAST_LOGITS, **body)
    choice = served.run(answer)["choices"][0]
    ids = choice["token_ids"][: choice["prompt_tokens"]]
    text = tokenizer().decode(ids, clean_up_tokenization_spaces=False)
    assert ids == encode(text)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(ids)
    return text


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([{"role": "user", "content": "Hi"}], _turn("user", "Hi")),
        (
            [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
            _turn("system", "Be brief.") + _turn("user", "Hi"),
        ),
        (
            [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
            _turn("system", "Be brief.") + _turn("user", "Hi"),
        ),
        (
            [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "One, "}, {"type": "text", "text": "two"}],
                }
            ],
            _turn("user", "One, two"),
        ),
        (
            [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Ho"},
                {"role": "user", "content": "Ha"},
            ],
            _turn("user", "Hi") + _turn("assistant", "Ho") + _turn("user", "Ha"),
        ),
        (
            [{"role": "user", "content": "Hi"}, {"role": "tool", "content": "42", "tool_call_id": "c1"}],
            _turn("user", "Hi") + _turn("tool", "42"),
        ),
        ([{"role": "user", "content": ""}], _turn("user", "")),
        ([{"role": "user", "content": "Grüße 你好 🙂"}], _turn("user", "Grüße 你好 🙂")),
    ],
    ids="user system developer parts turns tool empty unicode".split(),
)
def test_each_message_is_what_the_template_makes_of_it(house: Served, qwen: str, messages, expected):
    assert _prompt(house, qwen, messages) == expected + ASSISTANT


def test_an_answer_goes_back_into_the_conversation_as_the_sdk_returned_it(house: Served, qwen: str):
    first = house.chat(qwen, temperature=0, max_tokens=4, logit_bias={"34": 100}, savepoints=LAST_LOGITS)
    said = first.choices[0].message
    more = [*HELLO, said, {"role": "user", "content": "Go on"}]
    expected = _turn("user", "Hello there") + _turn("assistant", "CCCC") + _turn("user", "Go on")
    assert tokenizer().decode([34]) == "C"
    assert _prompt(house, qwen, more) == expected + ASSISTANT
    as_dict = [*HELLO, said.model_dump(), {"role": "user", "content": "Go on"}]
    assert _prompt(house, qwen, as_dict) == expected + ASSISTANT


def test_special_tokens_are_not_added_to_a_templated_prompt(tmp_path: Path):
    """The tokenizer adds `<|endoftext|>` to raw text; in a template only the template does."""
    from tests.models import tiny_tokenizer

    save_tiny("llama", tmp_path / "model")
    tiny_tokenizer(add_bos=True).save_pretrained(tmp_path / "model")
    model = str(tmp_path / "model")
    with serve(tmp_path, model=model) as served:
        assert _prompt(served, model, HELLO) == _turn("user", "Hello there") + ASSISTANT
        raw = served.openai.completions.create(model=model, prompt="Hello", max_tokens=1)
        assert raw.usage is not None
        assert raw.usage.prompt_tokens == len(encode("Hello")) + 1


TEMPLATE = (
    "{% if tools %}[{% for t in tools %}{{ t['function']['name'] }} {% endfor %}]{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "{{ m['role'] }}:{{ m['content'] }}"
    "{% for c in m['tool_calls'] or [] %}<{{ c['function']['name'] }}>{% endfor %}"
    "{% if m['tool_call_id'] %}#{{ m['tool_call_id'] }}{% endif %}"
    "{% if m['name'] %}@{{ m['name'] }}{% endif %};"
    "{% endfor %}"
    "{% if enable_thinking is defined and not enable_thinking %}no thinking{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def templated(tmp_path_factory: pytest.TempPathFactory):
    """A server with a model whose template knows tools and a variable, and one without any template."""
    folder = tmp_path_factory.mktemp("templates")
    save_tiny("gpt2", folder / "tools")
    (folder / "tools" / "chat_template.jinja").write_text(TEMPLATE)
    save_tiny("gpt2", folder / "bare")
    (folder / "bare" / "chat_template.jinja").unlink()
    with serve(folder, model=str(folder / "tools")) as served:
        served.http.post("/models/load", json={"model_id": str(folder / "bare")}).raise_for_status()
        yield served, str(folder / "tools"), str(folder / "bare")


def test_tools_go_through_the_template(templated):
    served, model, _ = templated
    messages = [
        {"role": "user", "content": "1+1"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "add", "arguments": "{}"}}],
        },
        {"role": "tool", "content": "2", "tool_call_id": "c1"},
    ]
    text = _prompt(served, model, messages, tools=[TOOL])
    assert text == "[add ]user:1+1;assistant:<add>;tool:2#c1;"


def test_a_name_of_a_message_goes_to_the_template(templated):
    served, model, _ = templated
    assert _prompt(served, model, [{"role": "user", "content": "Hi", "name": "Ann"}]) == "user:Hi@Ann;"


def test_chat_template_kwargs_are_variables_of_the_template(templated):
    served, model, _ = templated
    kwargs = {"enable_thinking": False}
    assert _prompt(served, model, HELLO, chat_template_kwargs=kwargs) == "user:Hello there;no thinking"
    assert _prompt(served, model, HELLO, chat_template_kwargs={}) == "user:Hello there;"


def test_tools_are_refused_when_the_template_has_no_place_for_them(house: Served, qwen: str):
    answer = house.post({"model": qwen, "messages": HELLO, "tools": [TOOL]})
    error = error_of(answer)
    assert (answer.status_code, error["param"]) == (400, "tools")
    assert "no place for tools" in error["message"]


def test_a_template_that_refuses_the_messages_is_quoted(templated):
    served, model, _ = templated
    answer = served.post({"model": model, "messages": [{"role": "system", "content": "x"}]})
    error = error_of(answer)
    assert (answer.status_code, error["param"]) == (400, "messages")
    assert "no system here" in error["message"]


def test_a_model_without_a_template_refuses_chat_and_serves_completions(templated):
    served, _, bare = templated
    answer = served.post({"model": bare, "messages": HELLO})
    error = error_of(answer)
    assert (answer.status_code, error["param"]) == (400, "messages")
    assert "/v1/completions" in error["message"]
    assert served.openai.completions.create(model=bare, prompt="Hello", max_tokens=2).choices[0].text is not None


@pytest.mark.parametrize(
    "kwargs",
    [
        {"chat_template": "{{ messages[0]['content'] }}"},
        {"tokenize": True},
        {"add_generation_prompt": False},
        {"return_dict": True},
    ],
    ids=lambda kwargs: next(iter(kwargs)),
)
def test_chat_template_kwargs_cannot_replace_the_template_or_how_it_is_used(templated, kwargs):
    served, model, _ = templated
    answer = served.post({"model": model, "messages": HELLO, "chat_template_kwargs": kwargs})
    assert (answer.status_code, error_of(answer)["param"]) == (400, "chat_template_kwargs")
    assert next(iter(kwargs)) in error_of(answer)["message"]
