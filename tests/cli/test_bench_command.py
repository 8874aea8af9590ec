"""`keras-kd bench` and `keras-kd report`, run on the committed export."""

import csv
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

DIGITS = Path(__file__).resolve().parents[2] / "exported" / "digits"
COLUMNS = ("p50_ms", "p90_ms", "cold_start_ms", "warm_start_ms", "peak_memory_bytes")


@pytest.fixture
def digits(tmp_path):
    return shutil.copytree(DIGITS, tmp_path / "digits")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A folder that the command wrote to, its exit code, and what it printed."""
    from contextlib import redirect_stderr, redirect_stdout
    from io import StringIO

    from keras_kd.cli import main

    folder = tmp_path_factory.mktemp("bench") / "made" / "here"
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(["bench", str(DIGITS), "--out", str(folder), "--seconds", "0.02", "--json"])
    return folder, code, out.getvalue(), err.getvalue()


def test_bench_writes_csv_json_and_plot(measured):
    folder, code, out, err = measured
    assert code == 0, err
    assert {path.name for path in folder.iterdir()} == {"bench.csv", "bench.json", "bench.png"}
    document = json.loads(out)
    assert json.loads((folder / "bench.json").read_text()) == document
    assert document["threads"] == 1
    rows = {row["name"]: row for row in document["rows"]}
    assert list(rows) == ["keras (at export)", "tflite int8", "onnx int8"]
    for name in ("tflite int8", "onnx int8"):
        assert rows[name]["bytes"] == (DIGITS / f"digits_int8.{name.split()[0]}").stat().st_size
        assert rows[name]["error"] is None
        assert 0 < rows[name]["p50_ms"] <= rows[name]["p90_ms"]
        assert all(rows[name][key] > 0 for key in COLUMNS)
    with open(folder / "bench.csv") as file:
        table = list(csv.DictReader(file))
    assert [row["name"] for row in table] == list(rows)
    assert float(table[1]["p50_ms"]) == rows["tflite int8"]["p50_ms"]
    with Image.open(folder / "bench.png") as image:
        assert image.format == "PNG"
        assert image.width > 1000
        # Points and bars in the colors of both formats are on it.
        colors = {color for _, color in image.convert("RGB").getcolors(1 << 20)}
        assert {(0x1F, 0x6F, 0x8B), (0xC1, 0x55, 0x3B)} <= colors


def test_the_table_fits_80_columns(run, digits):
    code, out, err = run("bench", "digits", "--seconds", "0.02", "--threads", "2", "--quiet")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == [
        *("2", "thread(s),", "batch", "of", "1", "acc", "size"),
        *("p50", "ms", "p90", "ms", "cold", "ms", "warm", "ms", "memory"),
    ]
    assert len(lines[2].split()) == 11
    assert out.split()[-3:] == ["are", "in", "digits."]


def test_the_keras_model_is_timed_beside_the_files(run, tmp_path):
    import keras

    from keras_kd.export import manifest

    keras.Sequential(
        [keras.Input((8, 8, 1), name="image"), keras.layers.Flatten(), keras.layers.Dense(10)]
    ).save(tmp_path / "student.keras")
    folder = shutil.copytree(DIGITS, tmp_path / "one")
    content = manifest.read(folder)
    content["artifacts"] = [row for row in content["artifacts"] if row["format"] == "onnx"]
    manifest.write(content, folder / "manifest.json")
    code, out, _ = run(
        *("bench", "one", "--model", "student.keras", "--seconds", "0.02", "--json", "--quiet")
    )
    rows = json.loads(out)["rows"]
    assert (code, [row["name"] for row in rows]) == (0, ["keras", "onnx int8"])
    assert all(rows[0][key] > 0 for key in COLUMNS)


def spoiled(folder):
    blob = bytearray((folder / "digits_int8.onnx").read_bytes())
    blob[len(blob) // 2] ^= 1
    (folder / "digits_int8.onnx").write_bytes(blob)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("nowhere",), "`nowhere` has no manifest.json"),
        (("digits", "--threads", "0"), "--threads"),
        (("digits", "--seconds", "0"), "must be positive"),
        (("digits", "--model", "none.keras"), "`none.keras` does not exist"),
        (("digits", "--out", "taken"), "taken"),
    ],
)
def test_bench_refuses_bad_input_in_one_line(run, tmp_path, digits, arguments, reason):
    (tmp_path / "taken").write_text("mine")
    before = sorted(path.name for path in digits.iterdir())
    code, out, err = run("bench", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert reason in err
    assert sorted(path.name for path in digits.iterdir()) == before
    assert (tmp_path / "taken").read_text() == "mine"


def test_bench_refuses_a_swapped_file(run, digits):
    spoiled(digits)
    code, out, err = run("bench", "digits")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "digits_int8.onnx" in err


def test_report_prints_the_table_and_writes_page_and_card(run, tmp_path, digits):
    code, out, err = run("report", "digits", "--out", "paper", "--layers", "--quiet")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    assert "tflite int8" in out
    # The committed export has no float32 file to compare layers with.
    assert "nothing to compare layer by layer" in out
    card = (tmp_path / "paper" / "card.md").read_text()
    assert card.startswith("# student\n")
    assert "digits_int8.tflite" in card
    assert (tmp_path / "paper" / "report.html").read_text().count("<svg") >= 2
    assert {path.name for path in (tmp_path / "paper").iterdir()} == {"report.html", "card.md"}
    code, out, _ = run("report", "digits", "--json", "--quiet")
    assert code == 0
    assert json.loads(out)["best"] in {path.name for path in digits.iterdir()}
    assert (digits / "card.md").read_text() == card


def test_report_refuses_an_edited_manifest(run, digits):
    path = digits / "manifest.json"
    path.write_text(path.read_text().replace('"int8"', '"int9"', 1))
    code, out, err = run("report", "digits")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "changed after the export" in err
    assert not (digits / "report.html").exists()


def test_another_model_than_the_exported_one_is_refused(run, digits, models):
    before = {path.name: path.read_bytes() for path in digits.iterdir()}
    code, out, err = run("bench", digits, "--model", models["good"], "--quiet")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1, err
    assert "is not the one that was exported to" in err
    assert {path.name: path.read_bytes() for path in digits.iterdir()} == before
