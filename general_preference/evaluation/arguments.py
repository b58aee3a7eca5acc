"""The flags of eval/run_preference_benchmarks.py, besides those of every script that runs a trained model."""

from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from general_preference.cli import check_at_least, flag
from general_preference.errors import InputError
from general_preference.evaluation.sets import SETS, EvaluationSet, choose_sets


@dataclass
class BenchmarkArguments:
    """Models, evaluation sets, and where the results go."""

    model: list[str] = field(
        default_factory=list, metadata={"help": "one or more trained preference or reward models: folders or hub names"}
    )
    sets: str = flag("all", f"all, or names by commas: {', '.join(SETS)}")
    data: str | None = flag(None, "folder with copies of the sets, laid out as on the hub or GitHub; default the hub")
    scores: str | None = flag(
        None,
        "file of scores instead of a model: a line {id, scores} for each record, with several sets also set; scores are K numbers or a K x K matrix",
    )
    output_dir: str = flag("./results", "folder of the results")
    model_name: list[str] = field(
        default_factory=list,
        metadata={"help": "names of the models in tables and files; default hub names or the folders' names"},
    )
    markdown: bool = flag(False, "print tables in Markdown, and write them to benchmarks.md")
    overwrite: bool = flag(False, "replace results of another model, other data or other settings of that name")
    max_length: int | None = flag(None, "tokens of prompt and one response; default what the model was trained with")
    batch_size: int = flag(64, "records in one call at most")
    ignore_columns: list[str] = field(
        default_factory=list,
        metadata={"help": "columns with text that may be left out, as in --ignore_columns notes draft"},
    )

    def check(self) -> None:
        """InputError for what cannot work, before anything is loaded."""
        if bool(self.model) == (self.scores is not None):
            raise InputError("--model M [M ...] or --scores FILE is needed, and not both")
        if self.scores is not None and not Path(self.scores).is_file():
            raise InputError(f"--scores {self.scores} is no file: correct the path")
        check_at_least(self, 1, "batch_size", "max_length")
        if self.model_name and len(self.model_name) != len(self.model or [self.scores]):
            raise InputError(
                f"--model_name has {len(self.model_name)} names for {len(self.model or [self.scores])} models"
            )
        names = self._names()
        for name in names:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or not path.name.strip():
                raise InputError(f"--model_name {name!r} is no name for files in --output_dir")
            if names.count(name) > 1:
                raise InputError(f"two models are called {name!r}: tell them apart by --model_name")

    @property
    def chosen(self) -> list[EvaluationSet]:
        """What is asked for."""
        return choose_sets(self.sets)

    @property
    def names(self) -> dict[str, str]:
        """{name of the results: path of the model, or of the file of scores}."""
        return dict(zip(self._names(), self.model or [self.scores], strict=True))

    def _names(self) -> list[str]:
        return self.model_name or list(map(_default_name, self.model or [self.scores]))


def _default_name(path: str) -> str:
    place = Path(path).expanduser()
    if place.is_file():
        return place.stem
    on_disk = place.is_dir() or place.is_absolute() or ".." in place.parts  # if it is there is said when it is loaded
    return place.resolve().name if on_disk else str(PurePosixPath(path))
