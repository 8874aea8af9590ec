"""docs/errors.md: each example fails, with the very message that stands below it."""

import re
import textwrap
from pathlib import Path

import keras
import pytest

from keras_kd.cli import main

PAGE = (Path(__file__).parents[2] / "docs" / "errors.md").read_text(encoding="utf-8")
ENTRIES = re.split(r"^(?=##+ )", PAGE, flags=re.M)


def alike(message):
    """A message on one line, without the numbers that differ from processor to processor."""
    return re.sub(r"-?\d+(\.\d+)?", "#", " ".join(message.split()))


def test_each_example_fails_as_it_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    keras.utils.clear_session()
    for name, content in re.findall(r'^```text title="(\S+)"\n(.*?)^```', PAGE, re.M | re.S):
        Path(name).write_text(content)
    names, seen = {}, 0
    for entry in ENTRIES:
        title = entry.partition("\n")[0]
        code = re.search(r"^```python\n(.*?)^```", entry, re.M | re.S)
        message = re.search(r"^```text\n(.*?)^```", entry, re.M | re.S)
        command = re.search(r"^```console\n\$ keras-kd (.*?)\n(.*?)^```", entry, re.M | re.S)
        if code and not message:
            exec(compile(code[1], title, "exec"), names)
        elif code:
            with pytest.raises(Exception) as found:  # noqa: PT011
                exec(compile(code[1], title, "exec"), names)
            said = f"{found.type.__name__}: {found.value}"
            assert alike(said) == alike(message[1]), f"{title}\n{textwrap.fill(said, 100)}"
        elif command:
            capsys.readouterr()
            assert main(command[1].split()) == 2
            assert alike(capsys.readouterr().err) == alike(command[2]), title
        seen += bool(message or command)
    assert seen >= 25


def test_each_entry_has_cause_and_cure():
    for entry in ENTRIES:
        if entry.startswith("### "):
            assert re.search(r"^- \*\*Cause\.\*\* \S", entry, re.M), entry
            assert re.search(r"^- \*\*Cure\.\*\* \S", entry, re.M), entry
