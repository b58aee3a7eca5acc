"""The flags that say how the records of a data set are read: the same in every script that reads comparisons."""

from dataclasses import dataclass, field

from general_preference.cli import flag
from general_preference.datasets.reading import Reading
from general_preference.errors import InputError


@dataclass
class ReadingArguments:
    """Which columns hold what, and what happens to records that do not fit. See docs/data.md."""

    # fmt: off
    is_custom_dataset: bool = flag(False, "require the custom format: instruction, chosen, reject")
    on_bad_record: str = flag("stop", "a record that does not fit: stop the run, or skip and count it", choices=["stop", "skip"])
    prompt_key: str | None = flag(None, "column that holds the prompt; default: known by the columns")
    chosen_key: str | None = flag(None, "column that holds the preferred response")
    rejected_key: str | None = flag(None, "column that holds the other response")
    system_key: str | None = flag(None, "column that holds the system prompt")
    ignore_columns: list[str] = field(default_factory=list, metadata={"help": "columns with text that may be left out, as in --ignore_columns notes draft"})
    criterion: str | None = flag(None, "which rating decides in a set that has several, such as helpfulness; default their mean")
    preference_strength: str = flag("margin", "what a stated strength becomes: a margin (used by --margin_loss), or a soft label", choices=["margin", "label"])
    # fmt: on

    def reading(self) -> Reading:
        """How columns are read. InputError where the flags contradict each other."""
        keys = [self.prompt_key, self.chosen_key, self.rejected_key, self.system_key]
        if self.is_custom_dataset and any(keys):
            raise InputError("--is_custom_dataset names the columns itself: drop it, or the flags that end in _key")
        if any(keys) and self.criterion:
            raise InputError("--criterion chooses a rating of a known set, whose columns need no flags: drop one")
        return Reading(
            self.is_custom_dataset, *keys, tuple(self.ignore_columns), self.criterion, self.preference_strength
        )
