#!/usr/bin/env bash
# transformers 5.23.0, tokenizers 0.23.3, jinja2 3.1.6 (no torch), 2026-11-29.
#
# Guess, before it was run: the mask of return_assistant_tokens_mask marks the tokens of answers, whatever is padded or
# cut: where the left is cut off (truncation_side="left"), what is left of the answers stays marked.
#
# What happens: padding on either side is right, and so is a cut on the right. A cut on the left that falls inside an
# answer, or behind one, unmarks everything: the first answer whose beginning is gone ends the search ("break", where
# the next answer's turn would come), and answers that are there whole, the last one too, are marked 0. Nothing is
# said; a loss over the mask learns nothing from such a row, and the longest conversations are the ones that are cut.
# (Marked tokens are in capitals.)
#
# Output seen:
#   pad right     : [user] one two THREE FOUR [END] [user] five SIX SEVEN [END]
#   pad right     : [user] eight NINE [END] <pad> <pad> <pad> <pad> <pad> <pad> <pad>
#   pad left      : [user] one two THREE FOUR [END] [user] five SIX SEVEN [END]
#   pad left      : <pad> <pad> <pad> <pad> <pad> <pad> <pad> [user] eight NINE [END]
#   cut right to 7: [user] one two THREE FOUR [END] [user]
#   cut left to 8 : THREE FOUR [END] [user] five SIX SEVEN [END]
#   cut left to 7 : four [end] [user] five six seven [end]
#   cut left to 5 : [user] five six seven [end]
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet --no-compile --disable-pip-version-check transformers==5.23.0 tokenizers==0.23.3 jinja2==3.1.6
cat > "$work/try.py" <<'PY'
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

words = "<pad> [user] [end] one two three four five six seven eight nine ten".split()
core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
template = (
    "{% for turn in messages %}{% if turn.role == 'user' %}[user] {{ turn.content }} "
    "{% else %}{% generation %}{{ turn.content }} [end]{% endgeneration %} {% endif %}{% endfor %}"
)


def turns(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


long = turns("one two", "three four", "five", "six seven")
short = turns("eight", "nine")


def show(label, conversations, padding_side="right", truncation_side="right", **arguments):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", padding_side=padding_side, truncation_side=truncation_side
    )
    tokenizer.chat_template = template
    out = tokenizer.apply_chat_template(
        conversations, return_dict=True, return_assistant_tokens_mask=True, padding=True, **arguments
    )
    for ids, marks in zip(out["input_ids"], out["assistant_masks"]):
        tokens = tokenizer.convert_ids_to_tokens(ids)
        print(f"{label:<14}: " + " ".join(t.upper() if mark else t for t, mark in zip(tokens, marks)))


show("pad right", [long, short])
show("pad left", [long, short], padding_side="left")
show("cut right to 7", [long], truncation=True, max_length=7)
for length in (8, 7, 5):
    show(f"cut left to {length}", [long], truncation_side="left", truncation=True, max_length=length)
PY
"$work/env/bin/python" "$work/try.py" 2>/dev/null | tee "$work/seen"
diff "$work/seen" - <<'SEEN'
pad right     : [user] one two THREE FOUR [END] [user] five SIX SEVEN [END]
pad right     : [user] eight NINE [END] <pad> <pad> <pad> <pad> <pad> <pad> <pad>
pad left      : [user] one two THREE FOUR [END] [user] five SIX SEVEN [END]
pad left      : <pad> <pad> <pad> <pad> <pad> <pad> <pad> [user] eight NINE [END]
cut right to 7: [user] one two THREE FOUR [END] [user]
cut left to 8 : THREE FOUR [END] [user] five SIX SEVEN [END]
cut left to 7 : four [end] [user] five six seven [end]
cut left to 5 : [user] five six seven [end]
SEEN
