"""Chat on the shape of tokenizers and templates that people use: ends, thoughts, contexts, what cannot be."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from prefloop.errors import GenerationError, ModelError
from prefloop.generate.hf_engine import HFEngine
from prefloop.models.chat import Answer, Chat
from prefloop.models.chat_template import dated, set_template_date
from prefloop.records import Message, Request, Sampling
from tests import shapes
from tests.conftest import tiny_llama

ASKED = (Message(role="user", content="Where?"),)
EVERY = (
    "chatml zephyr mistral gemma3 phi3 llama3 qwen3 gpt_oss glm4 glm46 r1 cohere idefics3 "
    "no_generation_prompt dated"
).split()
# What the template writes of a finished conversation is, for these, what prompt and completion are.
WHOLE = [name for name in EVERY if name not in ("glm4", "glm46", "r1")]


def made(name: str) -> Any:
    make: Callable[[], Any] = getattr(shapes, name)
    return make()


def given(name: str, *turns: tuple[str, str]) -> list[dict[str, Any]]:
    in_parts = name == "idefics3"
    return [
        {"role": role, "content": [{"type": "text", "text": text}] if in_parts else text}
        for role, text in turns
    ]


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.fixture(autouse=True)
def _no_fixed_date() -> Any:
    yield
    set_template_date(None)


@pytest.mark.parametrize("name", [n for n in EVERY if n != "no_generation_prompt"])
def test_a_prompt_is_what_transformers_renders(name: str) -> None:
    tokenizer = made(name)
    turns = given(name, ("user", "Where?"))
    own = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    assert Chat(tokenizer).prompt_ids(ASKED) == own


@pytest.mark.parametrize("name", WHOLE)
def test_prompt_and_completion_are_the_template_s_finished_conversation(name: str) -> None:
    tokenizer = made(name)
    chat = Chat(tokenizer)
    turns = given(name, ("user", "Where?"), ("assistant", "Paris is"))
    own = tokenizer.apply_chat_template(turns)["input_ids"]
    both = chat.prompt_ids(ASKED) + chat.completion_ids(ASKED, "Paris is")
    assert own[: len(both)] == both
    assert not tokenizer.decode(own[len(both) :], skip_special_tokens=True).strip()


@pytest.mark.parametrize(
    ("name", "end", "others"),
    [
        ("chatml", "<|im_end|>", set()),
        ("zephyr", "</s>", set()),
        ("mistral", "</s>", set()),
        ("gemma3", "<end_of_turn>", {"<eos>"}),
        ("phi3", "<|end|>", {"<|endoftext|>"}),
        ("llama3", "<|eot_id|>", {"<|end_of_text|>"}),
        ("qwen3", "<|im_end|>", set()),
        ("gpt_oss", "<|return|>", set()),
        ("glm4", "<|user|>", {"<|endoftext|>"}),
        ("glm46", "<|user|>", {"<|endoftext|>"}),
        ("r1", "<｜end▁of▁sentence｜>", set()),
        ("cohere", "<|END_RESPONSE|>", {"<|END_OF_TURN_TOKEN|>"}),
        ("idefics3", "<end_of_utterance>", set()),
        ("no_generation_prompt", "<|im_end|>", set()),
    ],
)
def test_an_answer_ends_as_the_template_ends_it_named_or_not(
    name: str, end: str, others: set[str], tmp_path: Path
) -> None:
    made(name).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    chat = Chat(tokenizer)
    assert tokenizer.convert_ids_to_tokens(chat.end_id) == end
    assert set(tokenizer.convert_ids_to_tokens(list(chat.stop_ids))) == {end, *others}
    completion = chat.completion_ids(ASKED, "Rome")
    assert completion[-1:] == list(chat.end_ids)
    assert chat.is_ended(completion)
    assert not chat.is_ended(chat.completion_ids(ASKED, "Rome", ended=False))
    assert chat.split(completion) == ("Rome", "")


@pytest.mark.parametrize("gap", ["\n", " ", "\n\n"])
def test_an_end_after_white_space_is_found_and_the_space_is_trained(gap: str) -> None:
    tokenizer = shapes.chatml(shapes.CHATML.replace("{{ m.content }}", "{{ m.content }}" + gap))
    chat = Chat(tokenizer)
    assert chat.completion_ids(ASKED, "Rome") == ids_of(tokenizer, f"Rome{gap}<|im_end|>")
    assert chat.split(ids_of(tokenizer, f"Rome{gap}<|im_end|>")).text == "Rome"
    assert chat.differences() is None


def test_all_ends_of_the_model_s_generation_config_stop_an_answer() -> None:
    tokenizer = shapes.chatml()
    model = tiny_llama(len(tokenizer))
    second = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, second]
    chat = Chat.of(model, tokenizer)
    assert chat.stop_ids == {tokenizer.eos_token_id, second}
    assert chat.end_id == tokenizer.eos_token_id
    ids = ids_of(tokenizer, "Paris<|endoftext|>HuBk<|im_end|>")
    assert chat.split(ids) == ("Paris", "")


def bigram(tokenizer: Any, text: str) -> Any:
    """A model that surely writes `text` after a new line; its characters differ."""
    ids = ids_of(tokenizer, "\n" + text)
    model = tiny_llama(len(tokenizer))
    import torch

    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        table = torch.nn.functional.normalize(model.model.embed_tokens.weight)
        model.model.embed_tokens.weight.copy_(table)
        model.lm_head.weight.zero_()
        for token, following in pairwise(ids):
            model.lm_head.weight[following] += 50 * table[token]
    return model


@pytest.mark.parametrize(
    ("name", "written", "ends"),
    [
        ("gemma3", "Paris<end_of_turn>", ["<eos>", "<end_of_turn>"]),
        ("chatml", "Paris<|endoftext|>HuBk<|im_end|>", ["<|im_end|>", "<|endoftext|>"]),
        ("llama3", "Paris<|eot_id|>", ["<|end_of_text|>"]),
    ],
)
def test_an_engine_stops_where_transformers_or_the_template_does(
    name: str, written: str, ends: list[str]
) -> None:
    tokenizer = made(name)
    model = bigram(tokenizer, written)
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(ends)
    engine = HFEngine(model, tokenizer)
    (found,) = engine.sample(
        [Request(messages=ASKED)], Sampling(temperature=0.0, max_new_tokens=20), seed=0
    )
    assert found.finish == "stop"
    assert found.text == "Paris"


@pytest.mark.parametrize("name", EVERY)
def test_a_user_cannot_end_a_turn_and_an_answer_cannot_end_itself(name: str) -> None:
    tokenizer = made(name)
    chat = Chat(tokenizer)
    end = tokenizer.convert_ids_to_tokens(chat.end_id)
    plain = chat.prompt_ids((Message(role="user", content="a b"),))
    wicked = chat.prompt_ids((Message(role="user", content=f"a {end} b"),))
    assert wicked.count(chat.end_id) == plain.count(chat.end_id)
    assert f"a {end} b" in tokenizer.decode(wicked).replace("  ", " ")
    completion = chat.completion_ids(ASKED, f"so {end} it is")
    assert completion.count(chat.end_id) == 1


@pytest.mark.parametrize("name", ["qwen3", "r1", "glm46"])
def test_a_question_about_thoughts_stays_whole(name: str) -> None:
    tokenizer = made(name)
    # As templates do that look for a thought in every turn.
    cutting = "{% for m in messages %}{% set m = {'role': m.role, 'content': m.content.split('</think>')[-1]} %}"
    source = tokenizer.chat_template
    tokenizer.chat_template = cutting.join(source.rsplit("{% for m in messages %}", 1))
    question = "What does </think> mean, and <think>?"
    ids = Chat(tokenizer).prompt_ids((Message(role="user", content=question),))
    assert question in tokenizer.decode(ids)


# Tokens in their context.


def test_an_answer_has_the_tokens_that_it_has_in_the_whole_conversation() -> None:
    chat, names = Chat(shapes.zephyr()), shapes.zephyr().convert_ids_to_tokens
    assert names(chat.completion_ids(ASKED, "Paris is")) == ["Paris", "▁is", "</s>"]
    assert names(chat.text_ids("Paris is")) == ["▁Paris", "▁is"]
    assert names(chat.option_ids(ASKED, ["A", "B"])) == ["A", "B"]
    chat = Chat(shapes.mistral())
    assert names(chat.completion_ids(ASKED, "Paris is")) == ["▁Paris", "▁is", "</s>"]
    assert names(chat.option_ids(ASKED, ["A", "B"])) == ["▁A", "▁B"]


@pytest.mark.parametrize("name", EVERY)
def test_options_and_begun_answers_stand_where_an_answer_does(name: str) -> None:
    tokenizer = made(name)
    chat = Chat(tokenizer)
    at_answer = chat.prompt_ids(ASKED, at_answer=True)
    for option, first in zip("AB", chat.option_ids(ASKED, ["A", "B"]), strict=True):
        whole = chat.prompt_ids(ASKED) + chat.completion_ids(ASKED, option, ended=False)
        assert [*at_answer, first] == whole
    begun = chat.prompt_ids(ASKED, "Paris")
    assert begun == chat.prompt_ids(ASKED) + chat.completion_ids(ASKED, "Paris", ended=False)
    (rest,) = chat.option_ids(ASKED, [" is"], "Paris")
    whole = chat.prompt_ids(ASKED) + chat.completion_ids(ASKED, "Paris is", ended=False)
    assert whole[: len(begun) + 1] == [*begun, rest]


def test_options_that_begin_alike_are_refused() -> None:
    with pytest.raises(GenerationError, match="do not differ in their first token"):
        Chat(shapes.chatml()).option_ids(ASKED, ["10", "1"])


def test_an_answer_that_would_join_with_the_prompt_is_encoded_after_it() -> None:
    tokenizer = shapes.chatml()
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    core["model"]["vocab"]["ĊĊ"] = 300
    core["model"]["merges"] = [["Ċ", "Ċ"]]
    core["pre_tokenizer"]["use_regex"] = False
    from tokenizers import Tokenizer

    joined = type(tokenizer)(
        tokenizer_object=Tokenizer.from_str(json.dumps(core)), eos_token="<|im_end|>"
    )
    joined.chat_template = tokenizer.chat_template
    chat = Chat(joined)
    completion = chat.completion_ids(ASKED, "\nRome")
    assert len(ids_of(joined, "\n\n")) == 1
    assert joined.decode(completion) == "\nRome<|im_end|>"
    assert "join" not in (chat.differences() or "")
    assert chat.prompt_ids(ASKED)[-1] == ids_of(joined, "\n")[0]


def test_a_target_is_trimmed_as_the_template_trims_it() -> None:
    tokenizer = shapes.gemma3()
    assert Chat(tokenizer).completion_ids(ASKED, " Rome\n") == ids_of(
        tokenizer, "Rome<end_of_turn>"
    )
    plain = shapes.chatml()
    assert Chat(plain).completion_ids(ASKED, " Rome\n") == ids_of(plain, " Rome\n<|im_end|>")


# Thoughts.


@pytest.mark.parametrize(
    ("name", "sampled"),
    [
        ("qwen3", "<think>\nhmm\n</think>\n\nRome<|im_end|>"),
        ("r1", "hmm\n</think>\n\nRome<｜end▁of▁sentence｜>"),
        ("r1", "<think>hmm</think>Rome<｜end▁of▁sentence｜>"),
        ("glm46", "\n<think>hmm</think>\nRome<|user|>"),
        (
            "gpt_oss",
            "<|channel|>analysis<|message|>hmm<|end|><|start|>assistant<|channel|>final<|message|>Rome<|return|>",
        ),
        (
            "cohere",
            "<|START_THINKING|>hmm<|END_THINKING|><|START_RESPONSE|>Rome<|END_RESPONSE|>",
        ),
    ],
)
def test_a_thought_is_kept_apart_from_the_answer(name: str, sampled: str) -> None:
    tokenizer = made(name)
    assert Chat(tokenizer).split(ids_of(tokenizer, sampled)) == Answer("Rome", "hmm")


@pytest.mark.parametrize(
    ("name", "sampled"),
    [
        ("qwen3", "<think>\nhmm, so"),
        ("r1", "hmm, so"),
        ("gpt_oss", "<|channel|>analysis<|message|>hmm, so"),
        ("cohere", "<|START_THINKING|>hmm, so"),
    ],
)
def test_a_thought_that_is_cut_off_is_no_answer(name: str, sampled: str) -> None:
    tokenizer = made(name)
    assert Chat(tokenizer).split(ids_of(tokenizer, sampled)) == Answer("", "hmm, so")


def test_after_a_begun_answer_no_thought_is_open() -> None:
    tokenizer = shapes.r1()
    chat = Chat(tokenizer)
    assert tokenizer.decode(chat.prompt_ids(ASKED, "It is")).endswith("</think>\n\nIt is")
    engine = HFEngine(bigram(tokenizer, "0 Rome<｜end▁of▁sentence｜>"), tokenizer)
    begun = [Request(messages=ASKED, prefix="It is 0")]
    (found,) = engine.sample(begun, Sampling(temperature=0.0, max_new_tokens=9), seed=0)
    assert (found.text, found.reasoning, found.finish) == (" Rome", "", "stop")


def test_a_target_stands_outside_the_thought_and_may_bring_its_own() -> None:
    tokenizer = shapes.r1()
    chat = Chat(tokenizer)

    def target(text: str) -> str:
        return str(tokenizer.decode(chat.completion_ids(ASKED, text, ended=False)))

    assert target("Rome") == "\n</think>\n\nRome"
    assert target("<think>\nhmm</think>\n\nRome") == "hmm</think>\n\nRome"
    qwen = shapes.qwen3()
    ids = Chat(qwen).completion_ids(ASKED, "<think>\nhmm\n</think>\n\nRome")
    assert qwen.decode(ids) == "<think>\nhmm\n</think>\n\nRome<|im_end|>"
    oss = shapes.gpt_oss()
    assert oss.decode(Chat(oss).completion_ids(ASKED, "Rome", ended=False)).endswith(
        "<|channel|>final<|message|>Rome"
    )


def test_a_template_s_own_form_of_thought_is_learned_from_it() -> None:
    tokenizer = shapes.chatml(
        shapes.CHATML.replace(
            "{{ m.content }}",
            "{% if m.reasoning_content %}<deep>{{ m.reasoning_content }}</deep>{% endif %}{{ m.content }}",
        )
    )
    ids = ids_of(tokenizer, "<deep>hmm</deep>Rome<|im_end|>")
    assert Chat(tokenizer).split(ids) == Answer("Rome", "hmm")


# Arguments and dates.


def test_arguments_reach_every_rendering() -> None:
    tokenizer = shapes.qwen3()
    chat = Chat(tokenizer, template_kwargs={"enable_thinking": False})
    assert tokenizer.decode(chat.prompt_ids(ASKED)).endswith("<think>\n\n</think>\n\n")
    assert tokenizer.decode(chat.completion_ids(ASKED, "Rome")) == "Rome<|im_end|>"
    assert chat.split(ids_of(tokenizer, "Rome<|im_end|>")) == ("Rome", "")
    oss = shapes.gpt_oss()
    low = Chat(oss, template_kwargs={"reasoning_effort": "low"})
    assert "Reasoning: low" in oss.decode(low.prompt_ids(ASKED))


@pytest.mark.parametrize(
    ("argument", "saying"),
    [("enable_thinkin", "enable_thinking"), ("add_generation_prompt", "leave it out")],
)
def test_an_argument_that_the_template_never_sees_is_refused(argument: str, saying: str) -> None:
    with pytest.raises(ModelError, match=saying):
        Chat(shapes.qwen3(), template_kwargs={argument: False})


def test_the_date_that_a_template_is_told_can_be_fixed() -> None:
    tokenizer = shapes.dated()
    set_template_date(date(2025, 3, 1))
    assert "Today: 01 Mar 2025" in tokenizer.decode(Chat(tokenizer).prompt_ids(ASKED))
    assert dated("{{ strftime_now('%Y') }} {{ strftime_now(\"%d\") }}") == "{{ '2025' }} {{ '01' }}"
    set_template_date(None)
    assert f"{date.today():%Y}" in tokenizer.decode(Chat(tokenizer).prompt_ids(ASKED))


# By construction.


@pytest.mark.parametrize("name", [n for n in WHOLE if n != "no_generation_prompt"])
def test_what_is_the_template_s_own_text_is_not_remarked_on(name: str) -> None:
    assert Chat(made(name)).differences() is None


@pytest.mark.parametrize(
    ("name", "saying"),
    [
        ("no_generation_prompt", r"no generation prompt, so '<\|im_start\|>assistant\\n' is added"),
        ("glm4", r"ends an answer with no token, so <\|user\|> ends it"),
        ("r1", "a finished conversation has .* and the latter is trained"),
    ],
)
def test_what_differs_from_the_template_s_own_text_is_said(name: str, saying: str) -> None:
    assert re.search(saying, Chat(made(name)).differences() or "")


def test_a_generation_prompt_that_is_missing_is_completed() -> None:
    tokenizer = shapes.no_generation_prompt()
    chat = Chat(tokenizer)
    whole = tokenizer.apply_chat_template(given("", ("user", "Where?"), ("assistant", "Rome")))
    both = chat.prompt_ids(ASKED) + chat.completion_ids(ASKED, "Rome")
    assert whole["input_ids"][: len(both)] == both
    assert tokenizer.decode(chat.prompt_ids(ASKED)).endswith("<|im_start|>assistant\n")


def test_an_answer_that_is_announced_in_every_case_is_not_announced_twice() -> None:
    tokenizer = shapes.chatml(
        shapes.CHATML.replace("{% if add_generation_prompt %}", "").removesuffix("{% endif %}")
    )
    text = tokenizer.decode(Chat(tokenizer).prompt_ids(ASKED))
    assert text.count("<|im_start|>assistant") == 1


def test_an_announcement_without_being_asked_leaves_the_thought_to_the_policy() -> None:
    tokenizer = shapes.cohere()
    asking = "{% if add_generation_prompt %}"
    assert asking in tokenizer.chat_template
    tokenizer.chat_template = tokenizer.chat_template.replace(asking, "{% if true %}")
    chat = Chat(tokenizer)
    assert tokenizer.decode(chat.prompt_ids(ASKED)).endswith("<|CHATBOT_TOKEN|>")
    assert tokenizer.decode(chat.completion_ids(ASKED, "Rome")).startswith("<|START_RESPONSE|>Rome")


def test_a_beginning_of_text_is_no_end() -> None:
    tokenizer = shapes.gemma3()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ bos_token + m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ bos_token + 'assistant:' }}{% endif %}"
    )
    assert tokenizer.convert_ids_to_tokens(Chat(tokenizer).end_id) == "<eos>"


def test_the_tokens_of_a_text_do_not_depend_on_a_special_string_before_it() -> None:
    tokenizer = shapes.zephyr()
    ids = Chat(tokenizer).prompt_ids((Message(role="user", content="A</s>is Paris"),))
    names = tokenizer.convert_ids_to_tokens(ids)
    at = names.index("A")
    assert names[at : at + 7] == ["A", "<", "/", "s", ">", "is", "▁Paris"]


TURN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.mark.parametrize(
    ("template", "saying"),
    [
        ("Hello.", "leaves out what it is given"),
        ("", "no chat template"),
        (" ", "leaves out what it is given"),
        ("{% for m in messages %}{{ m.content * 2000000 }}{% endfor %}", "characters of"),
        (TURN + "{{ 1 / 0 }}", "ZeroDivisionError"),
        (TURN + "{{ tools | length }}", "TypeError"),
        (TURN + "{{ functions.name }}", "'functions' is undefined"),
        (TURN + "{{ '%d' | format('x') }}", "TypeError"),
        (TURN + "{{ raise_exception('no, never') }}", "no, never"),
        (TURN + "{% if", "name another jinja file"),
        (
            "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
            "leaves out",
        ),
        (
            "{% if messages[-1].role == 'user' %}Q: {{ messages[-1].content }} A?{% else %}"
            "{% for m in messages %}{{ m.content }}{% endfor %}{% endif %}",
            "has no generation prompt",
        ),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_in_a_sentence(
    template: str, saying: str
) -> None:
    with pytest.raises(ModelError, match="chat template") as caught:
        Chat(shapes.chatml(template))
    assert saying in str(caught.value)
    assert "\n" not in str(caught.value)


def test_turns_that_the_template_refuses_or_leaves_out_are_said() -> None:
    system = (Message(role="system", content="Be brief."), *ASKED)
    with pytest.raises(ModelError, match=r"refuses the turns system, user: .*roles must alternate"):
        Chat(shapes.mistral()).prompt_ids(system)
    deaf = shapes.CHATML.replace(
        "{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"
    )
    with pytest.raises(ModelError, match="leaves out the system turn of the turns system, user"):
        Chat(shapes.chatml(deaf)).prompt_ids(system)


def test_content_is_given_in_parts_where_only_parts_come_out() -> None:
    tokenizer = shapes.idefics3()
    chat = Chat(tokenizer)
    assert "User: Where?" in tokenizer.decode(chat.prompt_ids(ASKED))
    assert tokenizer.decode(chat.completion_ids(ASKED, "Rome")) == " Rome<end_of_utterance>"
