"""Tiny tokenizers in the shape of what people use: special tokens, who is named as what, and a chat template of each kind.

Every function gives a fresh tokenizer. The vocabularies are made here (bytes, or SentencePiece pieces of a few
words), the templates are short ones of our own that do what the named family's template does.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level(
    template: str | None, specials: Sequence[str], plain: Sequence[str] = (), **named: str
) -> Any:
    """Bytes as tokens. `specials` are added special tokens, `plain` added ones that decoding does not skip.

    Only what `named` says (eos_token, bos_token, pad_token) is named in the tokenizer's config.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in specials])
    core.add_tokens([AddedToken(t, special=False, normalized=False) for t in plain])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **named)
    tokenizer.chat_template = template
    return tokenizer


def chatml(template: str = CHATML) -> Any:
    """ChatML whose end of turn is the EOS (Qwen2.5, SmolLM2); a second end, <|endoftext|>, pads."""
    return byte_level(
        template,
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )


def sentencepiece(template: str, words: Sequence[str] = ("Paris", "Rome", "is", "A", "B")) -> Any:
    """Transformers' LlamaTokenizer: a space goes before each text, and joins the word after it."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for character in [*string.printable[:94], "\n", "▁"]:
        vocabulary.setdefault(character, len(vocabulary))
    merges: list[tuple[str, str]] = []
    for word in words:
        for text in (word, "▁" + word):
            piece = text[0]
            for character in text[1:]:
                if (piece, character) not in merges:
                    merges.append((piece, character))
                piece += character
                vocabulary.setdefault(piece, len(vocabulary))
    # As in SentencePiece, ▁ also joins a finished word.
    merges += [("▁", word) for word in words if len(word) > 1]
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=merges, legacy=True)
    tokenizer.pad_token = "</s>"
    tokenizer.chat_template = template
    return tokenizer


def zephyr() -> Any:
    """Zephyr 7B: the roles are plain text, a turn ends with </s>, the tokenizer is SentencePiece's."""
    return sentencepiece(
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}"
        "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
    )


def mistral() -> Any:
    """Mistral 7B: no generation prompt (the answer follows the question), [INST] and [/INST] in plain text, no system turn."""
    return sentencepiece(
        "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('After the optional system message, roles must alternate') }}{% endif %}"
        "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
    )


def gemma3() -> Any:
    """Gemma 3: BOS in the template, an end of turn that the tokenizer does not name, text trimmed."""
    return byte_level(
        "{{ bos_token }}{% for m in messages %}"
        "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
        "{{ m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"],
        eos_token="<eos>",
        bos_token="<bos>",
        pad_token="<pad>",
    )


def phi3() -> Any:
    """Phi-3: turns end with <|end|>, which is not named; the EOS comes once, after a finished conversation."""
    return byte_level(
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )


def llama3() -> Any:
    """Llama 3 as first released: the EOS is <|end_of_text|>, and <|eot_id|> ends turns unnamed."""
    return byte_level(
        "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
        "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}"
        "{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        [
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
        ],
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
    )


def qwen3() -> Any:
    """Qwen3: the last answer gets its thought, or an empty one; earlier thoughts are cut; `enable_thinking`."""
    return byte_level(
        "{% set ns = namespace(asked=-1) %}"
        "{% for m in messages %}{% if m.role == 'user' %}{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% set answer = m.content %}"
        "{% if m.role == 'assistant' %}{% set thought = m.reasoning_content or '' %}"
        "{% if '</think>' in m.content %}"
        "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
        "{% set answer = m.content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
        "{% if loop.index0 > ns.asked %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{% endif %}"
        "{{ answer + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
        "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}"
        "{% endif %}{% endif %}",
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        ["<think>", "</think>"],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )


def gpt_oss() -> Any:
    """gpt-oss: channels for thought and answer, <|return|> after the last answer and <|end|> after earlier ones, a date."""
    return byte_level(
        "{{ '<|start|>system<|message|>Current date: ' + strftime_now('%Y-%m-%d') }}"
        "{{ '\n\nReasoning: ' + (reasoning_effort or 'medium') + '<|end|>' }}"
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% if '<|channel|>' in m.content %}{{ raise_exception('no channels in the content') }}{% endif %}"
        "{% set last = loop.last and not add_generation_prompt %}"
        "{% if last and m.thinking %}"
        "{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
        "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content }}"
        "{{ '<|return|>' if last else '<|end|>' }}"
        "{% else %}{{ '<|start|>' + ('developer' if m.role == 'system' else m.role) }}"
        "{{ '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}",
        [
            "<|startoftext|>",
            "<|endoftext|>",
            "<|return|>",
            "<|channel|>",
            "<|start|>",
            "<|end|>",
            "<|message|>",
            "<|call|>",
        ],
        eos_token="<|return|>",
        bos_token="<|startoftext|>",
        pad_token="<|endoftext|>",
    )


def glm4() -> Any:
    """GLM-4: no token ends an answer; the model writes <|user|>, which begins the next turn."""
    return byte_level(
        "[gMASK]<sop>{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        [
            "<|endoftext|>",
            "[gMASK]",
            "<sop>",
            "<|system|>",
            "<|user|>",
            "<|assistant|>",
            "<|observation|>",
        ],
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )


def glm46() -> Any:
    """GLM-4.6: like GLM-4, and each answer has a thought, which may be empty."""
    tokenizer = glm4()
    tokenizer.add_tokens([AddedToken(t, special=False) for t in ("<think>", "</think>")])
    tokenizer.chat_template = (
        "[gMASK]<sop>{% for m in messages %}{{ '<|' + m.role + '|>\n' }}"
        "{% if m.role == 'assistant' %}"
        "{{ '<think>' + (m.reasoning_content or '') + '</think>\n' + m.content | trim }}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}"
        "{% if enable_thinking is defined and not enable_thinking %}{{ '\n<think></think>\n' }}"
        "{% endif %}{% endif %}"
    )
    return tokenizer


def r1() -> Any:
    """DeepSeek R1: its generation prompt opens <think>, and a finished conversation has no thought."""
    return byte_level(
        "{{ bos_token }}{% for m in messages %}"
        "{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
        "{% elif m.role == 'assistant' %}"
        "{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}",
        ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"],
        ["<think>", "</think>"],
        bos_token="<｜begin▁of▁sentence｜>",
        eos_token="<｜end▁of▁sentence｜>",
        pad_token="<｜end▁of▁sentence｜>",
    )


def cohere() -> Any:
    """Command R7B: an answer lies between tokens of its own inside a turn, and a thought before it."""
    return byte_level(
        "{{ bos_token }}{% for m in messages %}{{ '<|START_OF_TURN_TOKEN|>' }}"
        "{% if m.role == 'assistant' %}{{ '<|CHATBOT_TOKEN|>' }}"
        "{% if m.thinking %}{{ '<|START_THINKING|>' + m.thinking + '<|END_THINKING|>' }}{% endif %}"
        "{{ '<|START_RESPONSE|>' + m.content + '<|END_RESPONSE|>' }}"
        "{% else %}{{ '<|' + m.role | upper + '_TOKEN|>' + m.content }}{% endif %}"
        "{{ '<|END_OF_TURN_TOKEN|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}",
        [
            "<PAD>",
            "<BOS_TOKEN>",
            "<|START_OF_TURN_TOKEN|>",
            "<|END_OF_TURN_TOKEN|>",
            "<|USER_TOKEN|>",
            "<|CHATBOT_TOKEN|>",
            "<|SYSTEM_TOKEN|>",
            "<|START_THINKING|>",
            "<|END_THINKING|>",
            "<|START_RESPONSE|>",
            "<|END_RESPONSE|>",
        ],
        bos_token="<BOS_TOKEN>",
        eos_token="<|END_OF_TURN_TOKEN|>",
        pad_token="<PAD>",
    )


def idefics3() -> Any:
    """Idefics 3: content must be a list of parts; a text is taken for one and loses its question."""
    return byte_level(
        "<|begin_of_text|>{% for m in messages %}{{ m.role | capitalize }}"
        "{{ ':' if m.content[0].type == 'image' else ': ' }}"
        "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}"
        "{% elif part.type == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}"
        "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}",
        ["<|begin_of_text|>", "<|end_of_text|>", "<image>", "<end_of_utterance>"],
        bos_token="<|begin_of_text|>",
        eos_token="<end_of_utterance>",
        pad_token="<|end_of_text|>",
    )


def no_generation_prompt() -> Any:
    """ChatML by somebody who forgot the generation prompt."""
    return chatml(CHATML.partition("{% if add_generation_prompt")[0])


def dated() -> Any:
    """ChatML with today's date in a system turn (Llama 3.1, SmolLM3)."""
    return chatml("<|im_start|>system\nToday: {{ strftime_now('%d %b %Y') }}<|im_end|>\n" + CHATML)
