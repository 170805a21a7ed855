"""The responses of a file, one by one, each with the record that it answers. Nothing is left out silently."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from aapa_lightning.data.fields import text
from aapa_lightning.data.jsonl import iter_lines, parse_line
from aapa_lightning.data.records import prompt_hash
from aapa_lightning.data.responses import Response, parse_response
from aapa_lightning.errors import DataError, shown
from aapa_lightning.types import Record


@dataclass(frozen=True, slots=True)
class Answer:
    """A response and where it belongs.

    Args:
        response: the checked row.
        position: index of the record that it answers.
        key: the row's key as the file has it, text or whole number, else the record's; None where neither has one.
        line: line number in the file, from 1.
        raw: the line as it stands in the file.
    """

    response: Response
    position: int
    key: str | int | None
    line: int
    raw: bytes

    def labels(self) -> dict[str, Any]:
        """Columns that tell this response from the others: line, key, sample and temperature."""
        return {"line": self.line, "key": self.key, "sample": self.response.sample, "temperature": self.response.temperature}


class PromptIndex:
    """Finds the record that a response answers: by key where the response has one, else by prompt.

    Args:
        records: the prompts.

    Raises:
        DataError: two records have the same key.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = records
        self._by_key: dict[str, int] = {}
        self._by_prompt: dict[str, list[int]] = {}
        self._hashes: list[str] = []
        for i, record in enumerate(records):
            self._hashes.append(prompt_hash(record.prompt))
            self._by_prompt.setdefault(self._hashes[i], []).append(i)
            if record.key is None:
                continue
            first = self._by_key.setdefault(text(record.key, "key", record.source), i)
            if first != i:
                raise DataError(
                    f"{record.source}: key {shown(record.key)} is already that of {records[first].source}; expected one record a key, "
                    "remove one or rename it"
                )

    def position(self, response: Response) -> int:
        """Index of the record.

        Raises:
            DataError: no record has the key or the prompt, several have the prompt, or the record with the key has another prompt.
        """
        if response.key is None:
            return self._of_prompt(response)
        if response.key not in self._by_key:
            raise DataError(
                f"{response.source}: no prompt has the key {shown(response.key)}; expected {self._expected()}; check that both files "
                "belong to the same dataset, or remove the row"
            )
        found = self._by_key[response.key]
        if response.prompt_hash not in (None, self._hashes[found]):
            raise DataError(
                f"{response.source}: key {shown(response.key)} is that of {self.records[found].source}, but the prompts differ; the "
                "response answers another dataset: use its own prompts file"
            )
        return found

    def _of_prompt(self, response: Response) -> int:
        found = self._by_prompt.get(response.prompt_hash or "", [])
        if len(found) == 1:
            return found[0]
        if found:
            sources = " and ".join(self.records[i].source for i in found[:2])
            raise DataError(f"{response.source}: the response has no key, and {sources} have its prompt; give records and responses keys")
        raise DataError(
            f"{response.source}: no record has this response's prompt, and it has no key; check that both files belong together"
        )

    def _expected(self) -> str:
        keys = list(self._by_key)
        if not keys:
            return "responses without keys, since the prompts have none (give the responses a column 'prompt')"
        return f"one of {len(keys)} keys such as {shown(keys[0])}"


def read_answers(path: str, index: PromptIndex) -> Iterator[Answer]:
    """Read a response file line by line; several samples and temperatures of a prompt may be there, each once.

    Args:
        path: JSONL, rows as ``data.responses`` reads them.
        index: of the prompts.

    Yields:
        Answers in the order of the file.

    Raises:
        DataError: a malformed row, an unknown key or prompt, a second response with the same key, sample and temperature, or an empty file;
            names file and line.
    """
    seen: dict[tuple[int, int, float | None], int] = {}
    for source, raw in iter_lines(path):
        row = parse_line(source, raw)
        response = parse_response(row, source)
        if response.key is not None:
            text(response.key, "key", source)
        position = index.position(response)
        record, line = index.records[position], int(source.rpartition(":")[2])
        first = seen.setdefault((position, response.sample, response.temperature), line)
        if first != line:
            named = f"key {shown(response.key)}" if response.key is not None else f"the prompt of {record.source}"
            raise DataError(
                f"{source}: {named} is already answered in line {first}; expected one response a key (several need different values of "
                "'sample' or 'temperature'): remove one"
            )
        yield Answer(response, position, row["key"] if response.key is not None else record.key, line, raw)
    if not seen:
        raise DataError(f"{path} holds no responses; expected one JSON object a line with 'response' and 'key' or 'prompt'")
