"""`keras-kd try`: what the server gives and refuses, and the page in headless Chromium."""

import base64
import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
import pytest

from keras_kd import datasets
from keras_kd.cli import npm as npm_module
from keras_kd.cli import try_page
from keras_kd.cli.npm import npm_packages
from keras_kd.cli.try_page import Export, Teacher, TryServer
from keras_kd.export import Report, manifest
from keras_kd.export.formats.runtime import open_file, run_all

DIGITS = Path(__file__).parents[2] / "exported" / "digits"
PAGE = Path(try_page.__file__).parent / "page"
LOCK = json.loads((PAGE / "package-lock.json").read_text())
NONE = "\N{EN DASH}"
POSIX = pytest.mark.skipif(os.name == "nt", reason="signals, pipes and scripts of POSIX")
FILES = ("digits_int8.tflite", "digits_int8.onnx")


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """The folder of the npm packages, each file holding its own address."""
    return fake_packages(tmp_path_factory.mktemp("npm"))


def fake_packages(folder):
    for package, names in npm_module.PACKAGES.items():
        for name in names:
            path = folder / package / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"/npm/{package}/{name}")
        version = LOCK["packages"][f"node_modules/{package}"]["version"]
        (folder / package / "package.json").write_text(json.dumps({"version": version}))
    return folder


@contextlib.contextmanager
def serving(packages, folder=DIGITS, model=None):
    export = Export(folder)
    teacher = None if model is None else Teacher(model, export)
    with TryServer(export, packages, teacher) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def server(packages):
    with serving(packages) as server:
        yield server


@pytest.fixture(scope="module")
def digits_teacher():
    keras.utils.set_random_seed(3)
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Flatten(),
            keras.layers.Dense(10, activation="softmax"),
        ],
        name="big_teacher",
    )


@pytest.fixture(scope="module")
def taught(packages, digits_teacher):
    with serving(packages, model=digits_teacher) as server:
        yield server


def request(server, path, method="GET", body=None, **headers):
    """Ask as written: the path is not normalized, no header is added but `Host`."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    headers = {"Host": f"127.0.0.1:{server.server_port}", **headers}
    for name, value in headers.items():
        if value is not None:
            connection.putheader(name.replace("_", "-"), value)
    connection.endheaders(body)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response, content


def ask(server, body, **headers):
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content_Type": "application/json", "Content_Length": str(len(body)), **headers}
    response, content = request(server, "/reference", "POST", body, **headers)
    return response.status, json.loads(content)


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ("/", "text/html; charset=utf-8"),
        ("/?sample=12", "text/html; charset=utf-8"),
        ("/app.js", "text/javascript; charset=utf-8"),
        ("/runtimes.js", "text/javascript; charset=utf-8"),
        ("/style.css", "text/css; charset=utf-8"),
        ("/try.json", "application/json"),
        ("/samples/0", "application/json"),
        ("/files/digits_int8.tflite", "application/octet-stream"),
        ("/npm/@litertjs/core/dist/index.js", "text/javascript; charset=utf-8"),
        ("/npm/@litertjs/core/wasm/litert_wasm_internal.wasm", "application/wasm"),
        ("/npm/onnxruntime-web/dist/ort.wasm.min.mjs", "text/javascript; charset=utf-8"),
    ],
)
def test_addresses_types_and_isolation(server, address, kind):
    response, body = request(server, address)
    assert response.status == 200
    assert body
    assert response.headers["Content-Type"] == kind
    assert response.headers["Cross-Origin-Opener-Policy"] == "same-origin"
    assert response.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
    assert response.headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert response.headers["Content-Security-Policy"].startswith("default-src 'self'; script-src")
    assert response.headers.get("Access-Control-Allow-Origin") is None


def test_files_and_packages_come_byte_for_byte(server, packages):
    for name in FILES:
        assert request(server, f"/files/{name}")[1] == (DIGITS / name).read_bytes()
    for path in packages.rglob("*.*"):
        if path.is_file() and path.name != "package.json":
            address = f"/npm/{path.relative_to(packages).as_posix()}"
            assert request(server, address)[1].decode() == address


@pytest.mark.parametrize(
    "address",
    [
        "/manifest.json",
        "/files/manifest.json",
        "/files/evaluation.npz",
        "/files/../manifest.json",
        "/files/%2e%2e%2fmanifest.json",
        "/files/..%5cmanifest.json",
        "/../../../../../../etc/passwd",
        "//etc/passwd",
        "/npm/@litertjs/core/package.json",
        "/npm/onnxruntime-web/dist/../package.json",
        "/npm/onnxruntime-web/",
        "/package.json",
        "/samples/216",
        "/samples/-1",
        "/samples/0.5",
        "/samples/",
        "/reference",
        "/index.html/..",
    ],
)
def test_nothing_else_is_served(server, address):
    response, body = request(server, address)
    assert response.status == 404
    assert json.loads(body) == {"error": "There is nothing at this address."}


@pytest.mark.parametrize("method", ["PUT", "DELETE", "HEAD", "OPTIONS"])
def test_other_methods_are_not_known(server, method):
    assert request(server, "/try.json", method)[0].status == 501


@pytest.mark.parametrize("host", [None, "", "evil.example", "127.0.0.1", "localhost:1"])
def test_a_foreign_host_is_refused(server, taught, host):
    for address in ("/", "/files/digits_int8.onnx", "/try.json"):
        assert request(server, address, Host=host)[0].status == 403
    assert ask(taught, {}, Host=host)[0] == 403


def test_localhost_is_this_computer(server):
    assert request(server, "/", Host=f"localhost:{server.server_port}")[0].status == 200
    assert server.server_address[0] == "127.0.0.1"


def test_the_page_learns_what_the_manifest_says(server):
    about = json.loads(request(server, "/try.json")[1])
    content = manifest.read(DIGITS)
    assert about["labels"] == [str(digit) for digit in range(10)]
    assert about["image"] == {
        "height": 8,
        "width": 8,
        "channels": 1,
        "low": 0.0,
        "high": 1.0,
        "light": False,
    }
    assert about["chosen"] == {"tflite": FILES[0], "onnx": FILES[1]}
    assert about["samples"] == 216
    assert about["outputs"] == [
        {"name": "logits", "kind": "classes", "probabilities": False, "units": 10}
    ]
    for said, row in zip(about["files"], content["artifacts"], strict=True):
        assert said["bytes"] == row["bytes"] == (DIGITS / said["file"]).stat().st_size
        assert said["inputs"] == [{**row["signature"]["inputs"][0], "sizes": [1, 8, 8, 1]}]
        assert said["outputs"] == row["signature"]["outputs"]
        assert said["score"] == f"accuracy {100 * row['metrics']['accuracy']:.2f} %"
    assert about["reference"] == {
        "given": False,
        "name": "Keras model",
        "bytes": content["keras"]["bytes"],
        "milliseconds": content["keras"]["latency_ms"],
        "score": f"accuracy {100 * content['keras']['accuracy']:.2f} %",
    }


def test_a_sample_is_the_stored_one(server):
    with np.load(DIGITS / "evaluation.npz") as stored:
        x, y, labels = (stored[name] for name in ("x0", "y0", "t0"))
    for index in (0, 215):
        sample = json.loads(request(server, f"/samples/{index}")[1])
        np.testing.assert_array_equal(np.float32(sample["inputs"]["image"]), x[index].ravel())
        np.testing.assert_array_equal(np.float32(sample["outputs"]["logits"]), y[index])
        assert sample["label"] == labels[index]


@pytest.mark.parametrize(
    ("kind", "names", "named", "label"),
    [
        ("classes", 10, True, True),
        ("values", 10, False, False),
        ("unknown", 10, False, False),
        ("multilabel", 10, True, False),
        ("classes", 3, False, True),
    ],
)
def test_names_stand_on_classes_alone(packages, copy, kind, names, named, label):
    content = manifest.read(copy)
    content["model"]["labels"] = [f"n{i}" for i in range(names)]
    content["evaluation"]["kinds"]["logits"]["kind"] = kind
    manifest.write(content, copy / "manifest.json")
    with np.load(copy / "evaluation.npz") as stored:
        first = int(stored["t0"][0])
    with serving(packages, copy) as server:
        about = json.loads(request(server, "/try.json")[1])
        assert about["labels"] == (content["model"]["labels"] if named else None)
        sample = json.loads(request(server, "/samples/0")[1])
        assert sample["label"] == (first if label else None)
    code = Report.load(copy).snippets()["python"]
    assert ("labels" in code) == named


def test_a_stored_label_is_a_class_or_nothing(packages, copy):
    content = manifest.read(copy)
    with np.load(copy / "evaluation.npz") as stored:
        arrays = dict(stored)
    first = arrays["t0"][0]
    for labels, want in (
        (np.eye(10)[arrays["t0"]], first),
        (np.where(np.arange(len(arrays["t0"])) == 0, -1, arrays["t0"]), None),
    ):
        np.savez(copy / "evaluation.npz", **{**arrays, "t0": labels})
        content["evaluation"]["sha256"] = manifest.digest(copy / "evaluation.npz")
        manifest.write(content, copy / "manifest.json")
        with serving(packages, copy) as server:
            assert json.loads(request(server, "/samples/0")[1])["label"] == want


def test_the_teacher_answers(taught, digits_teacher):
    about = json.loads(request(taught, "/try.json")[1])["reference"]
    assert about["given"]
    assert about["name"] == "big_teacher"
    assert about["bytes"] == 4 * (64 * 10 + 10)
    assert about["probabilities"] == {"logits": True}
    for x in datasets.load("digits").x_test[:3]:
        status, answer = ask(taught, {"inputs": {"image": x.ravel().tolist()}})
        assert status == 200
        assert answer["milliseconds"] > 0
        expected = keras.ops.convert_to_numpy(digits_teacher(x[None]))[0]
        np.testing.assert_allclose(answer["outputs"]["logits"], expected, atol=1e-6)


def test_the_own_page_may_ask_and_no_other(taught):
    body = {"inputs": {"image": [0.5] * 64}}
    own = f"http://127.0.0.1:{taught.server_port}"
    assert ask(taught, body, Origin=own)[0] == 200
    for origin in ("http://evil.example", "null", own + "0"):
        assert ask(taught, body, Origin=origin)[0] == 403


@pytest.mark.parametrize(
    ("body", "headers", "status", "reason"),
    [
        (b"{", {}, 400, "Expecting property name"),
        (b"[" * 2000, {}, 400, ""),
        (b"\xff\xfe", {}, 400, ""),
        ([], {}, 400, "`image` must be a flat list of 64 numbers"),
        ({"inputs": [1]}, {}, 400, "`image` must be"),
        ({"inputs": {"picture": [0.0] * 64}}, {}, 400, "`image` must be"),
        ({"inputs": {"image": [0.0] * 63}}, {}, 400, "64 numbers"),
        ({"inputs": {"image": [[0.0] * 8] * 8}}, {}, 400, "a flat list"),
        ({"inputs": {"image": ["ink"] * 64}}, {}, 400, "64 numbers"),
        ({"inputs": {"image": [float("nan")] * 64}}, {}, 400, "64 numbers"),
        ({}, {"Content_Type": "text/plain"}, 415, "application/json"),
        ({}, {"Content_Length": None}, 411, "length"),
        ({}, {"Content_Length": "-2"}, 411, "length"),
        ({}, {"Content_Length": "1000000"}, 413, "longer than any input"),
    ],
)
def test_a_bad_question_is_answered_with_its_reason(taught, body, headers, status, reason):
    got, answer = ask(taught, body, **headers)
    assert got == status
    assert reason in answer["error"]


def test_without_a_teacher_there_is_no_reference(server):
    status, answer = ask(server, {"inputs": {"image": [0.0] * 64}})
    assert status == 404
    assert answer["error"] == "No teacher was given. Start with --teacher."


@pytest.fixture
def copy(tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(DIGITS, folder)
    return folder


def refused(run, *arguments):
    """What `keras-kd try` says as it refuses. Where it would serve, the test fails and ends."""

    def served(server, poll_interval=0.5):
        pytest.fail(f"`keras-kd try` took {arguments} and serves; it was to be refused.")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TryServer, "serve_forever", served)
        code, out, err = run("try", "--no-open", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("keras-kd: ")
    assert err.count("\n") == 1
    return err


def test_what_is_not_refused_ends_the_test(run, packages):
    with pytest.raises(pytest.fail.Exception, match="it was to be refused"):
        refused(run, DIGITS, "--assets", packages)


def test_what_is_not_the_export_is_refused(run, copy, packages):
    path = copy / "manifest.json"
    original = path.read_text()
    edited = re.sub(r'"accuracy": 0\.\d+', '"accuracy": 0.999', original, count=1)
    assert edited != original
    path.write_text(edited)
    assert "was changed after the export" in refused(run, copy, "--assets", packages)
    content = json.loads(original)
    content["artifacts"][0]["file"] = "../digits_int8.tflite"
    manifest.write(content, path)
    assert "lies outside the folder" in refused(run, copy, "--assets", packages)
    path.write_text(original)
    shutil.copy(copy / FILES[1], copy / FILES[0])
    assert f"`{FILES[0]}` is not the file that was exported" in refused(
        run, copy, "--assets", packages
    )
    (copy / FILES[0]).unlink()
    assert f"`{FILES[0]}` is missing" in refused(run, copy, "--assets", packages)
    assert "has no manifest.json" in refused(run, copy.parent, "--assets", packages)


def test_a_file_that_goes_while_serving(packages, copy):
    with serving(packages, copy) as server:
        (copy / FILES[0]).unlink()
        response, body = request(server, f"/files/{FILES[0]}")
        assert response.status == 404
        assert str(copy) not in body.decode()


def test_an_export_without_files(run, copy, packages):
    content = manifest.read(copy)
    for row in content["artifacts"]:
        row.update(file=None, status="failed", bytes=None)
    manifest.write({**content, "best": None}, copy / "manifest.json")
    assert "holds no exported file" in refused(run, copy, "--assets", packages)


@pytest.mark.parametrize(
    ("model", "reason"),
    [("good", "cannot read the inputs"), ("lambda", "cannot be loaded"), (None, "does not exist")],
)
def test_a_teacher_that_does_not_fit(run, models, packages, model, reason):
    path = models[model] if model else "missing.keras"
    assert reason in refused(run, DIGITS, "--teacher", path, "--assets", packages)


def test_a_teacher_of_other_classes(packages):
    model = keras.Sequential(
        [keras.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dense(4)], name="four"
    )
    with pytest.raises(ValueError, match=r"`four` answers 16 samples .* shapes \[\(16, 4\)\]"):
        Teacher(model, Export(DIGITS))


def test_a_port_that_is_taken(run, server, packages):
    said = refused(run, DIGITS, "--port", server.server_port, "--assets", packages)
    assert f"Port {server.server_port} of 127.0.0.1 cannot be used" in said


def test_several_inputs_and_plain_numbers(packages, copy):
    content = manifest.read(copy)
    rng = np.random.default_rng(0)
    stored = {
        "x0": rng.normal(size=(5, 3)).astype("float32"),
        "x1": rng.integers(0, 9, (5, 2)).astype("int32"),
        "y0": rng.normal(size=(5, 1)).astype("float32"),
    }
    np.savez(copy / "evaluation.npz", **stored)
    content["model"].update(
        inputs=[
            {"name": "left", "shape": [None, 3], "dtype": "float32"},
            {"name": "right", "shape": [None, 2], "dtype": "int32"},
        ],
        outputs=[{"name": "sum", "shape": [None, 1], "dtype": "float32"}],
        labels=None,
    )
    content["evaluation"].update(
        stored=5,
        kinds={"sum": {"kind": "values", "probabilities": False}},
        sha256=manifest.digest(copy / "evaluation.npz"),
    )
    for row in content["artifacts"]:
        row["signature"] = {
            "inputs": [
                {"name": "right", "shape": ["batch", 2], "dtype": "int32"},
                {"name": "left", "shape": ["batch", "left_1"], "dtype": "float32"},
            ],
            "outputs": [{"name": "sum", "shape": ["batch", 1], "dtype": "float32"}],
        }
    manifest.write(content, copy / "manifest.json")
    left, right = keras.Input((3,), name="left"), keras.Input((2,), dtype="int32", name="right")
    total = keras.ops.sum(left, -1, keepdims=True) + keras.ops.cast(
        keras.ops.sum(right, -1, keepdims=True), "float32"
    )
    with serving(packages, copy, keras.Model({"left": left, "right": right}, total)) as server:
        about = json.loads(request(server, "/try.json")[1])
        assert about["image"] is None
        assert [(row["name"], row["count"]) for row in about["inputs"]] == [
            ("left", 3),
            ("right", 2),
        ]
        assert [row["sizes"] for row in about["files"][0]["inputs"]] == [[1, 2], [1, 3]]
        sample = json.loads(request(server, "/samples/2")[1])
        assert sample["inputs"]["right"] == stored["x1"][2].tolist()
        assert sample["label"] is None
        status, answer = ask(server, {"inputs": sample["inputs"]})
        assert status == 200
        expected = stored["x0"][2].sum() + stored["x1"][2].sum()
        np.testing.assert_allclose(answer["outputs"]["sum"], [expected], rtol=1e-5)


@POSIX
def test_ctrl_c_ends_it(packages, tmp_path):
    command = [sys.executable, "-m", "keras_kd", "try", DIGITS, "--no-open", "--assets", packages]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        # A shell that starts the tests in the background lets its children ignore the signal.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        url = process.stdout.readline().strip()
        with urllib.request.urlopen(url, timeout=20) as response:
            assert b"importmap" in response.read()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert (process.returncode, out) == (0, "")
    assert err == "Ctrl-C ends it.\nStopped.\n"


def test_the_lock_pins_versions_and_names_no_server():
    wanted = json.loads((PAGE / "package.json").read_text())["dependencies"]
    assert set(wanted) == {"@litertjs/core", "onnxruntime-web"}
    for name, row in LOCK["packages"].items():
        assert "resolved" not in row
        if name:
            assert row["integrity"].startswith("sha512-")
    for name, version in wanted.items():
        assert LOCK["packages"][f"node_modules/{name}"]["version"] == version
    assert "://" not in (PAGE / "package-lock.json").read_text()


def test_given_packages_are_checked(tmp_path):
    fake_packages(tmp_path / "node_modules")
    assert npm_packages(tmp_path, print) == tmp_path / "node_modules"
    assert npm_packages(tmp_path / "node_modules", print) == tmp_path / "node_modules"
    core = tmp_path / "node_modules" / "@litertjs" / "core"
    (core / "package.json").write_text('{"version": "0.1.0"}')
    with pytest.raises(ValueError, match=r"holds @litertjs/core 0\.1\.0, not "):
        npm_packages(tmp_path, print)
    (core / "dist" / "index.js").unlink()
    with pytest.raises(ValueError, match="lacks @litertjs/core/dist/index.js"):
        npm_packages(tmp_path, print)


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """A cache of its own, and an `npm` that runs the given lines of Python."""
    monkeypatch.setattr(npm_module, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))

    def make(code):
        path = tmp_path / "bin" / "npm"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!{sys.executable}\n{code}\n")
        path.chmod(0o755)

    return make


@POSIX
def test_packages_are_fetched_once(npm, tmp_path):
    source = fake_packages(tmp_path / "source")
    npm(
        "import pathlib, shutil, sys\n"
        "assert sys.argv[1:3] == ['ci', '--ignore-scripts']\n"
        "assert pathlib.Path('package-lock.json').read_bytes() == "
        f"pathlib.Path({str(PAGE / 'package-lock.json')!r}).read_bytes()\n"
        f"shutil.copytree({str(source)!r}, 'node_modules')\n"
        "pathlib.Path('node_modules/unused.js').write_text('x')"
    )
    notes = []
    found = npm_packages(None, notes.append)
    assert len(notes) == 1
    assert "@litertjs/core 2.5.3" in notes[0]
    assert not (found / "unused.js").exists()
    assert list(found.parent.iterdir()) == [found]
    npm("raise SystemExit(1)")
    assert npm_packages(None, notes.append) == found
    assert len(notes) == 1
    # A cache that lost a file is filled again.
    (found / "onnxruntime-web" / "dist" / "ort.wasm.min.mjs").unlink()
    with pytest.raises(OSError, match="`npm ci` failed"):
        npm_packages(None, notes.append)


@POSIX
def test_npm_that_is_missing_or_fails(run, npm, tmp_path):
    assert "`npm` is not installed. Install Node.js, or pass" in refused(run, DIGITS, "--quiet")
    npm("raise SystemExit('npm error network')")
    assert "so the page has no runtimes: npm error network" in refused(run, DIGITS, "--quiet")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


class Chromium:
    """A headless Chromium, driven over two pipes: the DevTools protocol, JSON and a zero byte."""

    # Chromium reads commands from descriptor 3 and writes answers to 4, which a child of Python
    # may not have free.
    _START = (
        "import fcntl, os, sys\n"
        "ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]\n"
        "os.dup2(ends[0], 3), os.dup2(ends[1], 4)\n"
        "os.execv(sys.argv[3], sys.argv[3:])"
    )

    def __init__(self, program, home):
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        self._rest, self._count, self._session = b"", 0, {}
        arguments = ["--headless", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run"]
        arguments += [f"--user-data-dir={home}", "--window-size=1280,900"]
        # In containers the sandbox and a large /dev/shm are missing; the only page is our own.
        arguments += ["--no-sandbox", "--disable-dev-shm-usage"]
        start = [sys.executable, "-c", self._START, str(theirs_in), str(theirs_out)]
        self._process = subprocess.Popen(
            [*start, program, *arguments, "about:blank"],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._session = {"sessionId": session}

    def call(self, method, **params):
        self._count += 1
        message = {"id": self._count, "method": method, "params": params, **self._session}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._count:
                assert "error" not in answer, answer["error"]
                return answer["result"]

    def _receive(self):
        while b"\0" not in self._rest:
            part = os.read(self._in, 1 << 20)
            if not part:
                raise EOFError("Chromium has ended.")
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def run(self, expression):
        """Value of a JavaScript expression, awaited."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def open(self, url):
        self.call("Page.navigate", url=url)
        # The old document answers until the new one is there.
        self.run(
            "new Promise(done => { const look = () => window.kerasKd "
            f"&& location.href === {json.dumps(url)} ? done(kerasKd.ready) : setTimeout(look, 20); "
            "look(); })"
        )

    def drag(self, points):
        box = self.run(
            "(({left, top, width, height}) => [left, top, width, height])"
            "(document.getElementById('pad').getBoundingClientRect())"
        )
        steps = ["mousePressed", *["mouseMoved"] * (len(points) - 1), "mouseReleased"]
        for kind, (x, y) in zip(steps, [*points, points[-1]], strict=True):
            self.call(
                "Input.dispatchMouseEvent",
                type=kind,
                x=box[0] + x * box[2],
                y=box[1] + y * box[3],
                button="left",
                buttons=1,
                clickCount=1,
            )

    def close(self):
        self._session = {}
        with contextlib.suppress(OSError, EOFError):
            self.call("Browser.close")
        try:
            self._process.wait(20)
        finally:
            self._process.kill()
            os.close(self._in)
            os.close(self._out)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip(f"none of {', '.join(names)} is installed")
    browser = Chromium(program, tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


class Live(NamedTuple):
    """The page with the real runtimes, at two addresses."""

    packages: Path
    plain: str
    taught: str


@pytest.fixture(scope="module")
def live(digits_teacher):
    try:
        packages = npm_packages(None, print)
    except OSError as error:
        pytest.skip(f"the npm packages of the page cannot be had: {error}")
    with serving(packages) as plain, serving(packages, model=digits_teacher) as taught:
        yield Live(packages, plain.url, taught.url)


@POSIX
@pytest.mark.parametrize("name", FILES)
def test_a_hundred_digits_in_the_browser_as_in_python(chromium, live, name):
    x = datasets.load("digits").x_test[:100]
    expected = run_all(open_file(DIGITS / name), {"image": x})["logits"]
    chromium.open(live.plain)
    rows = json.dumps(x.reshape(100, -1).tolist())
    answers = chromium.run(
        f"(async () => {{ const all = []; for (const row of {rows}) "
        f"all.push(await kerasKd.classify({json.dumps(name)}, new Float32Array(row))); "
        "return all.map(row => Array.from(row)); })()"
    )
    answers = np.float32(answers)
    step = np.diff(np.unique(expected.round(4))).min()
    print(f"{name}: largest difference {np.abs(answers - expected).max() / step:.4f} steps")
    np.testing.assert_array_equal(answers.argmax(-1), expected.argmax(-1))
    assert len(np.unique(answers.argmax(-1))) == 10
    assert np.abs(answers - expected).max() <= 1.01 * step


@POSIX
def test_the_javascript_to_paste_runs_in_the_browser(chromium, live):
    """The snippet for TFLite, with the addresses of this page in place of those beside it."""
    pytest.importorskip("jinja2")
    report = Report.load(DIGITS)
    artifact = next(row for row in report.artifacts if row.format == "tflite")
    code = report.snippets(artifact)["javascript"]
    code = code.replace(
        'import { loadLiteRt } from "@litertjs/core";',
        # The page has loaded the runtime already.
        'const { loadLiteRt, unloadLiteRt } = await import("@litertjs/core"); unloadLiteRt();',
    )
    code = code.replace('"./wasm/"', '"/npm/@litertjs/core/wasm/"')
    code = code.replace(f'fetch("{artifact.file}")', f'fetch("/files/{artifact.file}")')
    chromium.open(live.plain)
    answer = chromium.run(f"(async () => {{ {code}\n return result0; }})()")
    (given,) = artifact.details["signature"]["inputs"]
    x = np.full((1, *given["shape"][1:]), -given["zero_point"] * given["scale"], "float32")
    expected = run_all(open_file(DIGITS / artifact.file), {given["name"]: x})["logits"][0]
    np.testing.assert_allclose(answer, expected, rtol=1e-5)
    assert np.ptp(expected) > 0


@POSIX
def test_the_page_shows_a_sample_and_a_drawing(chromium, live):
    with np.load(DIGITS / "evaluation.npz") as stored:
        x, y, labels = (stored[name][11] for name in ("x0", "y0", "t0"))
    chromium.open(live.plain + "?sample=12")
    columns = [softmax(y)]
    for name in FILES:
        columns.append(softmax(run_all(open_file(DIGITS / name), {"image": x[None]})["logits"][0]))
    wanted = [[f"{100 * column[digit]:.1f} %" for column in columns] for digit in range(10)]
    assert cells(chromium) == wanted
    assert chromium.run("crossOriginIsolated")
    assert chromium.run("document.getElementById('verdict').textContent").endswith(f": {labels}")
    heads = chromium.run("document.querySelector('thead').textContent")
    assert f"{(DIGITS / FILES[0]).stat().st_size:,} B" in heads
    assert f"{(DIGITS / FILES[1]).stat().st_size:,} B" in heads
    # A stroke of the mouse takes the place of the sample: the files answer, no reference does.
    chromium.drag([(0.5, 0.1), (0.5, 0.5), (0.5, 0.9)])
    chromium.run("kerasKd.settled()")
    drawn = cells(chromium)
    assert drawn != wanted
    assert {row[0] for row in drawn} == {NONE}
    assert all("%" in cell for row in drawn for cell in row[1:])
    assert "No reference was given" in chromium.run("document.getElementById('note').textContent")


@POSIX
def test_the_headings_have_room_on_a_phone(chromium, live):
    screen = {"height": 740, "deviceScaleFactor": 1, "mobile": True}
    try:
        for width in (320, 360, 412):
            chromium.call("Emulation.setDeviceMetricsOverride", width=width, **screen)
            chromium.open(live.plain)
            # What a cell holds must end before its right padding does.
            spare = chromium.run(
                "Array.from(document.querySelectorAll('thead th'), cell => { "
                "const range = document.createRange(); range.selectNodeContents(cell); "
                "return cell.getBoundingClientRect().right - range.getBoundingClientRect().right; "
                "})"
            )
            assert min(spare) > 1, (width, spare)
            assert not chromium.run(
                "document.documentElement.scrollWidth > document.documentElement.clientWidth"
            )
    finally:
        chromium.call("Emulation.clearDeviceMetricsOverride")


@POSIX
def test_the_page_shows_the_teacher_beside_a_drawing(chromium, live, digits_teacher):
    chromium.open(live.taught)
    chromium.drag([(0.2, 0.2), (0.8, 0.8)])
    chromium.run("kerasKd.settled()")
    x = seen(chromium).reshape(1, 8, 8, 1)
    assert x.max() > 0.5
    expected = keras.ops.convert_to_numpy(digits_teacher(x))[0]
    shown = [float(row[0].removesuffix(" %")) / 100 for row in cells(chromium)]
    # The pixels on the page are rounded to 1/255.
    np.testing.assert_allclose(shown, expected, atol=5e-3)
    image = chromium.call("Page.captureScreenshot", format="png")["data"]
    assert base64.b64decode(image).startswith(b"\x89PNG")


@POSIX
def test_an_image_file_is_cropped_and_shrunk(chromium, live, tmp_path):
    pixels = np.random.default_rng(5).integers(0, 256, (32, 48, 1))
    keras.utils.save_img(tmp_path / "picture.png", pixels, scale=False)
    chromium.open(live.plain)
    root = chromium.call("DOM.getDocument")["root"]["nodeId"]
    field = chromium.call("DOM.querySelector", nodeId=root, selector="#picture")["nodeId"]
    chromium.call("DOM.setFileInputFiles", files=[str(tmp_path / "picture.png")], nodeId=field)
    # The middle square, each value the mean of 4 by 4 pixels.
    x = np.float32(pixels[:, 8:40]).reshape(8, 4, 8, 4).mean((1, 3)) / 255
    for expected, invert in ((x, False), (1 - x, True)):
        if invert:
            chromium.run("document.getElementById('invert').click()")
        chromium.run(
            "new Promise(done => { const look = () => "
            "document.getElementById('sample').value === '' && !kerasKd.settled() "
            "? done() : setTimeout(look, 20); look(); })"
        )
        np.testing.assert_allclose(seen(chromium), expected, atol=0.51 / 255)
        columns = [
            softmax(
                run_all(open_file(DIGITS / name), {"image": expected[None, ..., None]})["logits"]
            )
            for name in FILES
        ]
        shown = [[float(cell.removesuffix(" %")) for cell in row[1:]] for row in cells(chromium)]
        # The browser's gray of three equal colors may round a step of the input otherwise.
        np.testing.assert_allclose(shown, 100 * np.concatenate(columns).T, atol=5)


@POSIX
def test_a_file_that_fails_leaves_the_other_running(chromium, live, copy):
    with serving(live.packages, copy) as server:
        (copy / FILES[0]).unlink()
        chromium.open(server.url)
        heads = chromium.run("document.querySelector('thead').textContent")
        assert f"{FILES[0]}: 404 Not Found" in heads
        assert f"{(DIGITS / FILES[1]).stat().st_size:,} B" in heads
        for reference, tflite, onnx in cells(chromium):
            assert tflite == NONE
            assert "%" in reference
            assert "%" in onnx


def seen(chromium):
    """The preview of the model's input, in 0..1."""
    pixels = chromium.run(
        "Array.from(document.getElementById('seen').getContext('2d')"
        ".getImageData(0, 0, 8, 8).data).filter((_, i) => i % 4 === 0)"
    )
    return np.float32(pixels).reshape(8, 8) / 255


def cells(chromium):
    return chromium.run(
        "Array.from(document.querySelectorAll('tbody tr'), row => "
        "Array.from(row.querySelectorAll('td'), cell => cell.textContent))"
    )


def softmax(logits):
    powers = np.exp(np.float64(logits) - np.max(logits))
    return powers / powers.sum()


def test_hundreds_of_idle_connections_keep_nobody_out(server):
    before = threading.active_count()
    idle = []
    try:
        for i in range(400):
            one = socket.create_connection(("127.0.0.1", server.server_port), timeout=20)
            # Some say half of a request and fall silent.
            one.sendall(b"GET / HTTP/1.1\r\nHost:" if i % 2 else b"")
            idle.append(one)
            if i % 100 == 99:
                assert request(server, "/try.json")[0].status == 200
        assert threading.active_count() - before <= 100
        assert request(server, "/files/digits_int8.onnx")[0].status == 200
    finally:
        for one in idle:
            one.close()


def test_a_connection_that_says_nothing_is_ended(server, monkeypatch):
    monkeypatch.setattr(try_page._Handler, "timeout", 0.2)
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=20) as one:
        assert one.recv(1) == b""


def test_a_body_that_never_comes_is_not_waited_for(taught, monkeypatch):
    monkeypatch.setattr(try_page._Handler, "timeout", 0.2)
    said = request(
        taught, "/reference", "POST", b"{", Content_Type="application/json", Content_Length="9"
    )
    assert said[0].status == 408


def test_many_requests_over_few_places_are_all_answered(packages):
    with serving(packages) as server:
        server._connections._most = 4
        kept = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
        host = {"Host": f"127.0.0.1:{server.server_port}"}
        for _ in range(3):
            # One connection, one request after the other.
            kept.request("GET", "/try.json", headers=host)
            assert kept.getresponse().read()
        for i in range(12):
            assert request(server, f"/samples/{i}")[0].status == 200
        kept.close()
