"""Who waits for what: drawing and tables are imported by the commands that draw and tabulate."""

import ast
from collections.abc import Iterator

from tests.contract.test_floors import MODULES

# What the verbs run, check and ls import before they do their work.
FIRST = {
    "prefloop.cli",
    "prefloop.methods",
    "prefloop.judges",
    "prefloop.generate.engines",
    "prefloop.recipe",
    "prefloop.recipe.check",
    "prefloop.recipe.reward",
    "prefloop.evaluate.suites",
    "prefloop.report.summary",
    "prefloop.run.loop",
}
HEAVY = {"matplotlib", "pandas", "scipy", "sklearn", "mlflow", "wandb", "tensorboard", "trl"}


def at_import(body: list[ast.stmt]) -> Iterator[str]:
    """Dotted names that are imported when a module is, not when a function of it is called."""
    for node in body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Try):
            yield from at_import(node.body)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
            yield from at_import([*node.body, *node.orelse])


def imported(firsts: set[str]) -> tuple[set[str], set[str]]:
    """Modules of this package that are imported with the first ones, and other packages."""
    todo, found, others = list(firsts), set[str](), set[str]()
    while todo:
        module = todo.pop()
        if module in found:
            continue
        found.add(module)
        # A module's packages are imported before it.
        todo += [above for above in (module.rpartition(".")[0],) if above]
        for name in at_import(ast.parse(MODULES[module].read_text(encoding="utf-8")).body):
            if not name.startswith("prefloop"):
                others.add(name.partition(".")[0])
                continue
            while name not in MODULES:
                name = name.rpartition(".")[0]
            todo.append(name)
    return found, others


def test_no_verb_waits_for_what_only_the_report_needs() -> None:
    found, others = imported(FIRST)
    assert "prefloop.run.session" in found, "a run's own modules are looked at"
    assert not others & HEAVY
    assert "matplotlib" in imported({"prefloop.report.html"})[1]
    assert "scipy" in imported({"prefloop.run.rlaif"})[1]


def test_checking_a_recipe_does_not_wait_for_what_loads_models() -> None:
    """Templates and tokenizers need transformers alone, which imports what it wants itself."""
    checking = FIRST - {"prefloop.run.loop", "prefloop.report.summary"}
    checking |= {"prefloop.models.chat", "prefloop.models.tokenizer"}
    judges = {name for name in MODULES if name.startswith("prefloop.judges.")}
    found, others = imported(checking | judges)
    assert "transformers" in others
    assert "prefloop.models.policy" not in found
    assert not others & {"torch", "peft", "accelerate", "sacrebleu"}


def test_listing_methods_does_not_wait_for_torch() -> None:
    assert not imported({"prefloop.cli", "prefloop.methods"})[1] & {"torch", "transformers", "peft"}
