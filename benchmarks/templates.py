"""How prefloop reads real chat templates: `python benchmarks/templates.py FOLDER ... [--json FILE]`.

Each FOLDER holds .jinja files (collections that publish such: TRL, llama.cpp and its forks, vLLM, axolotl,
chat_templates). Equal files count once. Every template gets a byte-level tokenizer with the special tokens that it
mentions; its EOS is none of them unless the template writes `eos_token`, so an end of turn must be found in the
template. What transformers' `apply_chat_template` gives is compared with what `prefloop.models.chat.Chat` gives.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from prefloop.errors import PrefloopError
from prefloop.models.chat import Chat
from prefloop.records import Message

QUESTION, ANSWER, THOUGHT = "What is 2+2?", "Four, surely.", "Two and two."
CUT = "Explain </think> and <think>, please."
SPECIAL = re.compile(
    r"<\|[^|<>\s'\"{}+]{1,40}\|>|<｜[^｜<>]{1,40}｜>|<\|[a-z_]{2,30}>|<[a-z_]{2,30}\|>|"
    r"<(?:s|bos|eos|pad|sop|unk|start_of_turn|end_of_turn|end_of_utterance|BOS_TOKEN|EOS_TOKEN|extra_id_\d|SPECIAL_\d+)>|"
    r"</s>|\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_RESULTS|TOOL_CALLS|THINK|gMASK|BOS|EOS)\]|]~[!b]?b?\]|\[e~\["
)
# (begin, end, whether they are special tokens), as the families' cards say.
THOUGHTS = (
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
    ("<|channel>thought\n", "<channel|>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("<mm:think>", "</mm:think>"),
    ("Here are my reasoning steps:\n", "\n[BEGIN FINAL RESPONSE]\n"),
    ("<think>", "</think>"),
)
VERDICTS = ("right", "differs, and says so", "refused in a sentence", "silently wrong")


class Row(NamedTuple):
    """What was found for one template."""

    name: str
    verdict: str
    prompt: bool | None = None
    continues: bool | None = None
    end: str | None = None
    thought: bool | None = None
    system: bool | None = None
    said: str = ""


def tokenizer_for(source: str) -> Any:
    """Bytes, and the special tokens that the template mentions."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    specials = list(dict.fromkeys([*SPECIAL.findall(source), "<|bos_here|>", "<|eos_here|>"]))
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in specials])
    core.add_tokens(
        [AddedToken(t, normalized=False) for t in ("<think>", "</think>") if t in source]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|bos_here|>", eos_token="<|eos_here|>"
    )
    tokenizer.chat_template = source
    return tokenizer


def rendered(tokenizer: Any, asked: list[tuple[str, str]], generate: bool) -> str:
    """The template's text by transformers alone; content as parts where a text comes out empty."""
    problem: Exception | None = None
    for form in (str, lambda text: [{"type": "text", "text": text}]):
        try:
            text = tokenizer.apply_chat_template(
                [{"role": role, "content": form(content)} for role, content in asked],
                tokenize=False,
                add_generation_prompt=generate,
            )
        except Exception as error:  # noqa: BLE001 (whatever a template raises)
            problem = problem or error
            continue
        if asked[0][1] in text:
            return str(text)
    raise problem or ValueError("the question is lost")


def judge(name: str, source: str) -> Row:
    """Compare one template's own rendering with Chat's tokens, for one turn and for three."""
    tokenizer = tokenizer_for(source)
    one = [("user", QUESTION)]
    three = [("user", "Hello."), ("assistant", "Hello to you."), *one]
    try:
        chat = Chat(tokenizer)
        said = chat.differences() or chat.differences(turns(three)) or ""
    except PrefloopError as error:
        return Row(name, VERDICTS[2], said=str(error))
    pairs = [compared(chat, tokenizer, conversation) for conversation in (one, three)]
    equal, continues = (all(pair[place] for pair in pairs) for place in (0, 1))
    completion = chat.completion_ids(turns(one), ANSWER)
    end = expected_end(tokenizer, rendered(tokenizer, [*one, ("assistant", ANSWER)], False))
    ends = chat.end_id == end and end in chat.stop_ids and completion[-1] == end
    thought = thought_kept(chat, tokenizer, source, rendered(tokenizer, one, True))
    stays = CUT in tokenizer.decode(chat.prompt_ids(turns([("user", CUT)])))
    fine = equal and continues and not said
    verdict = VERDICTS[0] if fine else VERDICTS[1] if said else VERDICTS[3]
    if not ends or thought is False or not stays:
        verdict = VERDICTS[3]
    name_of_end = str(tokenizer.convert_ids_to_tokens(chat.end_id)) if ends else "wrong"
    apart = thought if stays else False
    return Row(name, verdict, equal, continues, name_of_end, apart, takes_system(chat), said)


def turns(conversation: list[tuple[str, str]]) -> tuple[Message, ...]:
    """A conversation as prefloop's records."""
    return tuple(Message(role=role, content=text) for role, text in conversation)  # type: ignore[arg-type]


def compared(chat: Chat, tokenizer: Any, asked: list[tuple[str, str]]) -> tuple[bool, bool]:
    """Whether the prompt is the template's, and whether a completion goes on as its finished conversation does."""

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    prompt, completion = chat.prompt_ids(turns(asked)), chat.completion_ids(turns(asked), ANSWER)
    own_prompt = rendered(tokenizer, asked, True)
    own = encode(rendered(tokenizer, [*asked, ("assistant", ANSWER)], False))
    both = prompt + completion
    rest = tokenizer.decode(own[len(both) :])
    # After the end come other ends and white space, or what always announces the next answer.
    nothing = not tokenizer.decode(own[len(both) :], skip_special_tokens=True).strip()
    continues = own[: len(both)] == both and (nothing or own_prompt.endswith(rest))
    return prompt == encode(own_prompt), continues


def expected_end(tokenizer: Any, whole: str) -> int:
    """The first special token after the answer; else the one that a next question begins with; else the EOS."""
    special = re.compile("|".join(map(re.escape, tokenizer.added_tokens_encoder)))
    after = whole.rpartition(ANSWER)[2]
    if found := special.search(after):
        return int(tokenizer.convert_tokens_to_ids(found.group()))
    try:
        longer = [("user", QUESTION), ("assistant", ANSWER), ("user", "And 3+3?")]
        after = rendered(tokenizer, longer, False).partition(ANSWER)[2].lstrip()
    except Exception:  # noqa: BLE001 (whatever a template raises)
        after = ""
    found = special.match(after)
    if found and found.group() != tokenizer.bos_token:
        return int(tokenizer.convert_tokens_to_ids(found.group()))
    return int(tokenizer.eos_token_id)


def thought_kept(chat: Chat, tokenizer: Any, source: str, prompt: str) -> bool | None:
    """Whether a sampled thought is kept apart; None for a template that knows none."""
    for begin, end in THOUGHTS:
        if end.rpartition("<|channel|>")[2].strip() not in source:
            continue
        opened = prompt.rstrip().endswith(begin.rstrip())
        text = f"{'' if opened else begin}{THOUGHT}{end}{ANSWER}"
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        answer = chat.split([*ids, chat.end_id])
        started = 0 if opened else len(tokenizer(begin, add_special_tokens=False)["input_ids"])
        cut = chat.split(ids[: started + 3])
        return answer == (ANSWER, THOUGHT) and not cut.text
    return None


def takes_system(chat: Chat) -> bool:
    """Whether a system turn comes out of the template."""
    asked = turns([("system", "Be brief."), ("user", QUESTION)])
    try:
        return "Be brief." in chat.tokenizer.decode(chat.prompt_ids(asked))
    except PrefloopError:
        return False


def templates(folders: list[Path]) -> list[tuple[str, str]]:
    """(name, source) of every different template below the folders."""
    seen: dict[str, tuple[str, str]] = {}
    for folder in folders:
        for file in sorted(folder.rglob("*.jinja*")):
            source = file.read_text(encoding="utf-8")
            if "messages" not in source:
                continue
            key = hashlib.sha256(source.strip().encode()).hexdigest()
            seen.setdefault(key, (f"{folder.name}/{file.name}".replace("+", "/"), source))
    return sorted(seen.values())


def table(rows: list[Row]) -> str:
    """Counts by verdict, then a line a template, as Markdown."""
    counts = Counter(row.verdict for row in rows)
    word = {True: "yes", False: "no", None: ""}
    lines = ["| verdict | templates |", "|---|--:|"]
    lines += [f"| {verdict} | {counts[verdict]} |" for verdict in VERDICTS]
    lines += [f"| all | {len(rows)} |", ""]
    lines += [
        "| template | verdict | prompt | continues | end | thought apart | system turn |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        end = f"`{row.end}`".replace("|", "\\|") if row.end else ""
        cells = [row.name.removesuffix(".jinja"), row.verdict, word[row.prompt]]
        cells += [word[row.continues], end, word[row.thought], word[row.system]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Read the folders, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    rows = [judge(*found) for found in templates(options.folders) if options.only in found[0]]
    if options.json:
        text = json.dumps([row._asdict() for row in rows], indent=1, ensure_ascii=False)
        options.json.write_text(text + "\n", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
