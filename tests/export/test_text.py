"""Names of any letters, shown as letters wherever they go."""

import ast
import json
import re
import shutil
import subprocess
import unicodedata
import xml.etree.ElementTree
from pathlib import Path

import pytest

import keras_kd.export
from keras_kd.cli.console import Terminal
from keras_kd.export import Report, manifest
from keras_kd.export.report import plots, snippets
from keras_kd.export.report.layer_report import LayerReport
from keras_kd.utils import escaping

DIGITS = Path(__file__).parents[2] / "exported" / "digits"
WHOLE = manifest.read(DIGITS)

NAMES = {
    "escape": "a\x1b[31mred\x1b]0;title\x07",
    "lines": "a\nimport os\r\n# b\x0b\x0c\x1c\x85c",
    "separators": "a\u2028b\u2029c",
    "direction": "a\u202eb\u2066c",
    "nothing": "a\x00b\x7fc\x9bd",
    "quotes": "a\"b'c`d``e\\",
    "markdown": "[a](javascript:x) | b **c** <img src=x> # d ~~e~~ $f$ &copy; @g http://h www.i",
    "html": "</code><script>alert(1)</script>&lt;--><!--",
    "formula": r"$\frac{a}{0}$ $\undefined$ \$ $",
    "underscore": "__a__",
    "swift": r"\(system(1)) ??/ $x ${y}",
    "letters": "é 日本 🙂 क्‍ष",
}


def acting(text, keep="\n"):
    return [
        letter
        for letter in text
        if letter not in keep
        and unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp")
        and letter not in "\u200c\u200d"
    ]


def tensor(name):
    return {"name": name, "shape": [1, 2], "dtype": "int8", "scale": 0.5, "zero_point": 3}


def named(name):
    """A report in which everything that may have a name has this one."""
    content = json.loads(json.dumps(WHOLE))
    content["model"].update(name=name, labels=[name] * 10, normalization={})
    content["history"] = {name: [1.0, 0.5], f"val_{name}": [1.0, None]}
    content["layers"] = {
        fmt: [{"layer": name, "tensor": name, "sqnr": 9.0, "reads": [], "covers": [name]}]
        for fmt in ("tflite", "onnx")
    }
    content["versions"][name] = name
    content["calibration"] = {"samples": 1, "ranges": {name: [0.0, 1.0]}}
    for kind in ("inputs", "outputs"):
        content["model"][kind][0]["name"] = name
    content["evaluation"]["kinds"] = {name: WHOLE["evaluation"]["kinds"]["logits"]}
    for row in content["artifacts"]:
        row["flags"], row["notes"], row["reason"] = [name], [name], name
        row["worst_output"] = name
        figures = {**row["metrics"]["outputs"]["logits"], "drop": 0.0}
        row["metrics"]["outputs"] = {name: figures}
        row["signature"] = {"inputs": [tensor(name)], "outputs": [tensor(name)]}
    return content


def shown_as(folder, name):
    """All texts that are made of such a report, by what they are."""
    folder.mkdir()
    manifest.write(named(name), folder / manifest.FILE)
    report = Report.load(folder)
    texts = {f"table {w}": report.table(w) for w in (50, 80, 120)}
    texts |= {f"layers {w}": report.layers().table(w) for w in (50, 80)}
    texts["card"] = report.save_card(folder / "card.md").read_text()
    texts["html"] = report.save_html(folder / "report.html").read_text()
    for artifact in report.artifacts:
        for language, code in report.snippets(artifact).items():
            texts[f"{artifact.format} {language}"] = code
    return texts


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    return shown_as(tmp_path_factory.mktemp("usual") / "a", "a")


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_a_manifest_of_any_names_is_shown_whole(tmp_path, capsys, usual, name):
    texts = shown_as(tmp_path / "x", name)
    for what, text in texts.items():
        assert acting(text) == [], what
        if not what.startswith(("table", "layers", "html")):
            # As many lines as with a name of one letter: none has been broken by a name.
            assert text.count("\n") == usual[what].count("\n"), what
        if what.endswith("python"):
            ast.parse(text)
    for tag in ("<script", "<img", "<svg", "</html"):
        assert texts["html"].count(tag) == usual["html"].count(tag)
    Terminal(as_json=False, quiet=False).result({}, name)
    Terminal(as_json=False, quiet=False).note(name)
    said = capsys.readouterr()
    assert acting(said.out + said.err) == []


def decoded(literal, language):
    """What a compiler of the language makes of a literal, after its own rules of escapes."""
    assert literal[0] == literal[-1] == '"'
    inner = literal[1:-1]
    assert not re.search(r'(?<!\\)(\\\\)*"', inner)
    if language == "python":
        return ast.literal_eval(literal)
    if language == "kotlin":
        assert not re.search(r"(?<!\\)(\\\\)*\$", inner)
        return json.loads(re.sub(r"\\\$", "$", literal))
    if language == "javascript":
        return json.loads(literal)
    if language == "swift":
        text = re.sub(r"\\u\{([0-9a-f]+)\}", lambda m: f"\\U{int(m[1], 16):08x}", inner)
        assert not re.search(r"(?<!\\)(\\\\)*\\\(", inner)
        return ast.literal_eval(f'"{text}"')
    blob = inner.encode()
    blob = re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), blob)
    assert b"??" not in blob
    return re.sub(rb"\\(.)", rb"\1", blob).decode()


@pytest.mark.parametrize("language", snippets.LANGUAGES)
def test_a_literal_is_the_text_in_every_language(language):
    for text in (*NAMES.values(), "", "\U000e0041", "a\x1bb1", "\\u0041", "\\\\"):
        assert decoded(escaping.quoted(text, language), language) == text


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_node_reads_the_literals(tmp_path):
    texts = list(NAMES.values())
    code = "console.log(JSON.stringify([" + ",".join(
        escaping.quoted(text, "javascript") for text in texts
    )
    (tmp_path / "a.js").write_text(code + "]));\n", encoding="utf-8")
    said = subprocess.run(
        ["node", str(tmp_path / "a.js")], capture_output=True, check=True, encoding="utf-8"
    )
    assert json.loads(said.stdout) == texts


@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler of C++ is installed")
def test_a_compiler_of_cpp_reads_the_literals_and_comments(tmp_path):
    texts = list(NAMES.values())
    lines = ["#include <cstdio>", "int main() {"]
    for text in texts:
        lines += [f"  // {escaping.comment(text)}", f"  // {escaping.comment(text)}: end"]
        size = len(text.encode()) + 1
        literal = escaping.quoted(text, "cpp")
        lines += [f"  static_assert(sizeof({literal}) == {size});"]
        lines += [f"  fwrite({literal}, 1, {size}, stdout);"]
    (tmp_path / "a.cpp").write_text("\n".join([*lines, "}"]) + "\n", encoding="utf-8")
    command = ["g++", "-std=c++17", "-trigraphs", "-w", "a.cpp", "-o", "a"]
    subprocess.run(command, cwd=tmp_path, check=True)
    said = subprocess.run([str(tmp_path / "a")], capture_output=True, check=True).stdout
    assert said == b"".join(text.encode() + b"\0" for text in texts)


def test_a_code_span_keeps_its_backticks_and_a_cell_its_bars():
    assert escaping.code("a") == "`a`"
    assert escaping.code("a`b") == "``a`b``"
    assert escaping.code("`a``") == "``` `a`` ```"
    assert escaping.code("a|b", cell=True) == "`a\\|b`"
    assert escaping.code("a|b") == "`a|b`"
    assert escaping.code("") == "`   `"
    assert escaping.markdown("a_b http://c") == "a\\_b http\\://c"


def test_formulas_and_underscores_in_a_plot_are_drawn_as_letters():
    rows = {
        "onnx": [
            {"layer": name, "tensor": "t", "sqnr": 9.0} for name in (r"$\frac$", "_hidden", "$x^2$")
        ]
    }
    layers = LayerReport(rows)
    text = plots.layer_plot(layers.rows(), layers.names())
    xml.etree.ElementTree.fromstring(text)
    for name in (r"$\frac$", "_hidden", "$x^2$"):
        assert f"<!-- {name} -->" in text or f"<!--  {name} -->" in text
    curves = plots.curves({"_loss": [1.0, 2.0], "$loss$": [2.0, 1.0]})[0]["svg"]
    assert "_loss" in curves
    assert "$loss$" in curves


def test_a_user_who_writes_with_tex_gets_the_plots_all_the_same():
    import matplotlib

    with matplotlib.rc_context({"text.usetex": True}):
        layers = LayerReport({"onnx": [{"layer": "a_b", "tensor": "t", "sqnr": 9.0}]})
        assert plots.layer_plot(layers.rows(), layers.names()).startswith("<svg")


def test_a_tensor_that_no_language_has_is_one_error():
    content = named("x")
    content["artifacts"][0]["signature"]["inputs"][0]["dtype"] = "float64"
    report = Report(DIGITS, content)
    with pytest.raises(ValueError, match="of float64, for which there is no code"):
        report.snippets(report.artifacts[0])


def test_halves_of_surrogates_are_refused_in_a_manifest(tmp_path):
    content = json.loads(json.dumps(WHOLE))
    content["model"]["name"] = "\ud800"
    manifest.write(content, tmp_path / manifest.FILE)
    with pytest.raises(keras_kd.export.ManifestError, match="`model.name` holds half of"):
        manifest.read(tmp_path)
