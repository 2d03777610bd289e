import pytest
import yaml
from pydantic import ValidationError

from prefloop.errors import JudgeError, RecipeError
from prefloop.generate.engines.fake import FakeEngine
from prefloop.generate.templates import PromptSet
from prefloop.judges import NoVerdict
from prefloop.judges.ensemble import Ensemble, fraction_beaten
from prefloop.recipe import Recipe, load_recipe
from prefloop.records import Message, Prompt

PROMPT = Prompt(id="p", messages=(Message(role="user", content="Where?"),), target="north")
SHORT = {"name": "rules", "max_words": 1}
NORTH = {"name": "rules", "include": ["north"], "exclude": ["south"]}


def score(group: list[str], **options: object) -> object:
    judge = Ensemble.model_validate({"judges": [SHORT, NORTH], **options})
    return judge.open(None, PromptSet("compact")).score([PROMPT], [group])[0]


def test_scores_are_averaged_by_weight() -> None:
    assert score(["north", "to the south"]) == (1.0, 0.0)
    assert score(["far north", "x"], weights=[3, 1]) == pytest.approx((0.25, 0.75 + 0.125))


def test_votes_weigh_who_beats_whom_not_by_how_much() -> None:
    """The first judge: a tie of the first two above the third. The second: 1 > 1/2 > 0 by halves."""
    group = ["north", "x", "north and south"]
    assert score(group, combine="vote", weights=[1, 3]) == pytest.approx(
        (0.25 * 0.75 + 0.75 * 1.0, 0.25 * 0.75 + 0.75 * 0.25, 0.75 * 0.25)
    )


def test_shares_of_opponents_beaten_by_hand() -> None:
    assert fraction_beaten((3.0, 1.0, 3.0)) == (0.75, 0.0, 0.75)
    assert fraction_beaten((2.0,)) == ()


def test_where_one_has_no_verdict_there_is_none() -> None:
    assert score(["north", ""]) == NoVerdict("empty response")
    assert score(["north"], combine="vote") == NoVerdict("nothing to compare with")


def test_it_needs_what_its_judges_need() -> None:
    both = Ensemble.model_validate({"judges": [{"name": "similarity"}, {"name": "self_judge"}]})
    assert both.needs_target
    assert both.needs_policy
    neither = Ensemble.model_validate({"judges": [SHORT, NORTH]})
    assert not neither.needs_target
    assert not neither.needs_policy
    assert not both.needs_moved_policy
    members = [{"name": "implicit"}, SHORT]
    assert Ensemble.model_validate({"judges": members}).needs_moved_policy
    with pytest.raises(JudgeError, match="no policy is loaded"):
        both.open(None, PromptSet("compact"))
    verdict = both.open(FakeEngine(), PromptSet("compact")).score([PROMPT], [["north", "x"]])[0]
    assert isinstance(verdict, tuple)


def test_models_of_its_judges_are_named_by_place() -> None:
    judge = Ensemble.model_validate(
        {"judges": [SHORT, {"name": "reward_model", "model": "owner/one"}]}
    )
    assert judge.sources == {"judges[1].model": "owner/one"}


def test_a_recipe_with_an_ensemble_survives_its_dump(tmp_path) -> None:
    values = {
        "name": "r",
        "method": {"name": "ial"},
        "judge": {"name": "ensemble", "judges": [SHORT, {"name": "similarity"}], "weights": [2, 1]},
    }
    recipe = Recipe.model_validate(values)
    dumped = yaml.safe_load(recipe.dump())["judge"]
    assert [member["name"] for member in dumped["judges"]] == ["rules", "similarity"]
    assert dumped["judges"][0]["max_words"] == 1
    (tmp_path / "r.yaml").write_text(recipe.dump())
    assert load_recipe(str(tmp_path / "r.yaml")) == recipe


@pytest.mark.parametrize(
    ("judges", "says"),
    [
        ([SHORT, {"name": "similarty"}], "did you mean 'similarity'"),
        ([SHORT, {"max_words": 1}], "section with the name of a judge"),
        ([SHORT, {"name": "rules", "max_word": 1}], "did you mean 'max_words'"),
    ],
)
def test_a_mistake_in_a_member_is_one_sentence(judges: list[object], says: str) -> None:
    values = {
        "name": "r",
        "method": {"name": "ial"},
        "judge": {"name": "ensemble", "judges": judges},
    }
    with pytest.raises((RecipeError, ValidationError), match=says):
        Recipe.model_validate(values)


def test_weights_must_be_one_positive_number_a_judge() -> None:
    for weights in ([1], [1, 0], [1, -1]):
        with pytest.raises(ValidationError, match="must hold 2 positive numbers"):
            score(["x"], weights=weights)
