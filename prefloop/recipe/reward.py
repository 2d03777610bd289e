"""A reward model's recipe: its base, its pairs, its training. Read, overridden and dumped like a run's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field, field_validator

from prefloop.config import SHIPPED, Options, build, dump_yaml, here_or_shipped, read_recipe
from prefloop.data.formats import FieldOptions
from prefloop.errors import RecipeError, nearest
from prefloop.train.options import RewardModelOptions, RewardTrainOptions

FOLDER = Path("rewards")
"""Where trained reward models lie: rewards/NAME."""


class RewardDataOptions(FieldOptions):
    """Labelled pairs, in the formats that docs/data.md shows."""

    train: tuple[str, ...] = Field(min_length=1)
    """Files, folders or Hub data sets with labelled pairs."""
    split: str = "train"
    """Split of those sources that are data sets or folders."""
    holdout: float = Field(default=0.25, gt=0.0, lt=1.0)
    """Share of the prompts, drawn by the seed, whose pairs only measure; written to held_out.jsonl."""
    margin_field: str | None = None
    """Column with the margin by which the scores of a pair should differ; null is 0 for all."""
    limit: int | None = Field(default=None, ge=1)
    """Read only the first so many pairs of each source; null reads all."""


class RewardRecipe(Options):
    """Every option of `prefloop reward train`."""

    name: str = Field(strict=True, pattern=r"^[A-Za-z0-9][\w.-]*$")
    """The folder's name, rewards/NAME; the recipe file's stem where it is left out."""
    seed: int = Field(default=0, ge=0, lt=2**63, strict=True)
    """Fixes the split, the head's first weights, the order of the pairs and dropout."""
    model: RewardModelOptions = Field(default_factory=RewardModelOptions)
    """What the reward model is made from."""
    data: RewardDataOptions
    """The labelled pairs."""
    train: RewardTrainOptions = Field(default_factory=RewardTrainOptions)
    """How they are trained on."""

    @field_validator("model", "data", "train", mode="before")
    @classmethod
    def _strictly(cls, value: object, info: object) -> object:
        name = str(getattr(info, "field_name", ""))
        kind = _SECTIONS[name]
        return value if isinstance(value, kind) else build(kind, value, name)

    def dump(self) -> str:
        """The recipe as YAML with every value; loading it gives an equal recipe."""
        return dump_yaml(self.model_dump(mode="json"))


_SECTIONS: dict[str, type[Options] | type[RewardModelOptions] | type[RewardTrainOptions]] = {
    "model": RewardModelOptions,
    "data": RewardDataOptions,
    "train": RewardTrainOptions,
}


def load_reward_recipe(path_or_name: str, overrides: Sequence[str] = ()) -> RewardRecipe:
    """Read a reward recipe: a file, or the NAME of recipes/reward/NAME.yaml. Raises RecipeError."""
    path = here_or_shipped(Path(path_or_name))
    if not path.is_file():
        shipped = shipped_reward_recipes()
        if path_or_name not in shipped:
            known = sorted(shipped)
            raise RecipeError(f"no reward recipe {path_or_name!r}; {nearest(path_or_name, known)}")
        path = shipped[path_or_name]
    return read_recipe(path, RewardRecipe, overrides, needs="data")


def shipped_reward_recipes() -> dict[str, Path]:
    """Reward recipes that can be loaded by name; the working directory's hide shipped ones.

    They lie in a folder of their own, for a run's recipe has other sections.
    """
    folders = (SHIPPED, Path(SHIPPED.name))
    return {
        path.stem: path for folder in folders for path in sorted((folder / "reward").glob("*.yaml"))
    }
