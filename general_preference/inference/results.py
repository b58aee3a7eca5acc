"""Results of a batch run on disk: parts while it runs, one ordered JSONL file when it is done.

Each process appends finished rows to its own part under `OUTPUT.parts/`, so a run that is killed at any moment loses
at most the row being written, and continues on any number of processes. `settings.json` beside the parts says what
they were made with; results of other settings are never mixed.
"""

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

from general_preference.errors import InputError
from general_preference.files import claim_folder, replace_lines, replace_text

logger = logging.getLogger(__name__)


class ResultStore:
    """The rows of one run over `count` comparisons, by index."""

    def __init__(self, output: Path, count: int, rank: int):
        self.output, self.count = output, count
        self.parts = output.with_name(output.name + ".parts")
        self.summary = output.with_name(output.stem + ".summary.json")
        self._part = self.parts / f"part-{rank}.jsonl"
        self._file = self._claim = None

    def claim(self, settings: dict, overwrite: bool) -> None:
        """Take the output for this run and get its parts ready. On the main process, before the others look.

        Args:
            settings: JSON-serialisable, what every row depends on.
            overwrite: drop what other settings left there.

        Raises:
            InputError: another run is writing, or the results there were made with other settings.
        """
        self._claim = claim_folder(self.parts, "--output_path")
        settings = json.loads(json.dumps(settings))
        found = self._settings()
        if found != settings and not overwrite and (found is not None or self.output.exists()):
            self._release_if_new()
            raise InputError(f"--output_path {self.output}: {_difference(found, settings)}; choose another path, or "
                             "pass --overwrite")  # fmt: skip
        if found != settings:
            for stale in [self.output, self.summary, *self.parts.glob("part-*.jsonl")]:
                stale.unlink(missing_ok=True)
        replace_text(self.parts / "settings.json", json.dumps(settings, indent=2))
        for part in self.parts.glob("part-*.jsonl"):
            _cut_after_last_line(part)

    def finished(self) -> set[int]:
        """Indices whose rows are on disk. Any process may ask once the output is claimed."""
        if self.output.exists():
            return set(range(self.count))
        return {index for part in sorted(self.parts.glob("part-*.jsonl")) for index, _ in _read_part(part)}

    def append(self, index: int, row: dict) -> None:
        """Put one finished row on disk."""
        if self._file is None:
            self._file = self._part.open("a", encoding="utf-8")
        self._file.write(json.dumps([index, row], ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Nothing more comes from this process; the output is free for another run."""
        for held in (self._file, self._claim):
            if held is not None:
                held.close()

    def merge(self) -> None:
        """Parts -> the output, in order. On the main process, when no process has more to append."""
        if self.output.exists():
            return
        lines: list[str | None] = [None] * self.count
        for part in sorted(self.parts.glob("part-*.jsonl")):
            for index, row in _read_part(part):
                lines[index] = row
        missing = lines.count(None)
        if missing:
            raise RuntimeError(f"{missing} of {self.count} rows are missing under {self.parts}: run this again")
        replace_lines(self.output, lines)

    def rows(self) -> Iterator[dict]:
        """The rows of the merged output, in order."""
        with self.output.open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)

    def finish(self, summary: dict) -> None:
        """Write the summary beside the output and drop the parts. On the main process."""
        settings = json.loads((self.parts / "settings.json").read_text(encoding="utf-8"))
        replace_text(self.summary, json.dumps({"settings": settings} | summary, indent=2))
        shutil.rmtree(self.parts)

    def _settings(self) -> dict | None:
        """What the rows that are there were made with; None if nothing is there or nothing says so."""
        for path, key in ((self.parts / "settings.json", None), (self.summary, "settings")):
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
                return found if key is None else found[key]
            except (OSError, ValueError, KeyError, TypeError):
                continue
        return None

    def _release_if_new(self) -> None:
        """Leave no empty parts folder beside the results of an earlier run."""
        self._claim.close()
        if not (self.parts / "settings.json").exists():
            shutil.rmtree(self.parts)


def _difference(found: dict | None, settings: dict) -> str:
    if found is None:
        return "there is a file that no run of this script left"
    names = [name for name in sorted({*found, *settings}) if found.get(name) != settings.get(name)]
    values = [f"{name} = {found.get(name)!r}, now {settings.get(name)!r}" for name in names]
    return f"the results there were made with {'; '.join(values)}"


def _read_part(part: Path) -> Iterator[tuple[int, str]]:
    """(index, row as JSON text) of every line."""
    with part.open(encoding="utf-8") as lines:
        for line in lines:
            index, row = json.loads(line)
            yield index, json.dumps(row, ensure_ascii=False)


def _cut_after_last_line(part: Path) -> None:
    """Drop what a killed process left of a line."""
    content = part.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with part.open("r+b") as file:
            file.truncate(whole)
