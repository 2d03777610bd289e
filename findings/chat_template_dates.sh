#!/usr/bin/env bash
# transformers 5.23.0, tokenizers 0.23.3, jinja2 3.1.6 (no torch), 2026-11-28.
#
# Guess, before it was run: an argument of apply_chat_template reaches the template as it is, so that a datetime.date
# is printed as 2025-03-01 and a function given as `strftime_now` takes the place of the built-in one, as Jinja's
# render arguments take the place of its globals.
#
# What happens: every argument is first rebuilt out of JSON types. A date becomes the text "<date>" and goes into the
# prompt without a word; its fields are undefined, and undefined prints nothing. A function becomes the text
# "<function>", which hides the built-in `strftime_now`, so that the template fails with "'str' object is not callable".
# A Decimal, a Path or a set fares like the date. Who fixes the day of a prompt must give finished text.
#
# Output seen:
#   date object     : 'Today is <date>.'
#   its year        : 'It is .'
#   Decimal         : 'At <Decimal> degrees.'
#   own strftime_now: TypeError: 'str' object is not callable
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 tokenizers==0.23.3 jinja2==3.1.6
cat > "$work/try.py" <<'PY'
from datetime import date
from decimal import Decimal

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={"a": 0}, merges=[])))
turns = [{"role": "user", "content": "Hi"}]


def rendered(template, **arguments):
    tokenizer.chat_template = template
    try:
        return repr(tokenizer.apply_chat_template(turns, tokenize=False, **arguments))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


day = date(2025, 3, 1)
print("date object     :", rendered("Today is {{ today }}.", today=day))
print("its year        :", rendered("It is {{ today.year }}.", today=day))
print("Decimal         :", rendered("At {{ t }} degrees.", t=Decimal("0.7")))
print("own strftime_now:", rendered("{{ strftime_now('%Y') }}", strftime_now=lambda form: "2025"))
PY
"$work/env/bin/python" "$work/try.py" 2>/dev/null | tee "$work/seen"
diff "$work/seen" - <<'SEEN'
date object     : 'Today is <date>.'
its year        : 'It is .'
Decimal         : 'At <Decimal> degrees.'
own strftime_now: TypeError: 'str' object is not callable
SEEN
