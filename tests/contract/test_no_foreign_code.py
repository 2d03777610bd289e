"""No model's own code runs unless the user says so: every load in the source says what it wants."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import prefloop

# They load weights into a class of ours, or an adapter into a model that is loaded already.
_NO_CODE = {"PeftModel", "_network()"}
_SAYS = ("False", "options.trust_remote_code")


def loads() -> Iterator[tuple[str, ast.Call]]:
    for path in sorted(Path(prefloop.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if node.func.attr == "from_pretrained":
                yield f"{path.name}:{node.lineno}", node


def test_every_from_pretrained_says_whether_it_trusts_code():
    found = list(loads())
    assert len(found) > 8, "the walk sees the loads"
    for place, call in found:
        assert isinstance(call.func, ast.Attribute)
        if ast.unparse(call.func.value) in _NO_CODE:
            continue
        said = {word.arg: ast.unparse(word.value) for word in call.keywords}
        assert said.get("trust_remote_code") in _SAYS, place


def test_data_sets_and_pipelines_are_never_asked_to_trust_code():
    for path in Path(prefloop.__file__).parent.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "trust_remote_code=True" not in text, path
        assert "torch.load(" not in text, path
        assert "pickle.load" not in text, path
