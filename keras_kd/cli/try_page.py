"""`keras-kd try`: the exported files in a browser, on a page of this computer alone."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import socketserver
import threading
import time
import webbrowser
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote, urlsplit

import numpy as np
import typer

from keras_kd.cli import inputs, npm, options
from keras_kd.cli.connections import BoundedServer
from keras_kd.cli.console import Terminal, import_keras
from keras_kd.export import manifest
from keras_kd.export.report.scorecard import Scorecard, labels_of
from keras_kd.export.scratch import interrupts_once
from keras_kd.export.signature import Arrays, Signature, is_symbolic, pack
from keras_kd.export.verification import output_meaning, reverify
from keras_kd.utils.values import misfit

if TYPE_CHECKING:
    import keras


_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".wasm": "application/wasm",
}

_SECONDS = 20.0
"""How long a connection may be silent."""

# Enough to see that a teacher reads these inputs, and whether it answers in probabilities.
_PROBES = 16


def try_page(
    folder: options.Exported,
    teacher: Annotated[
        str | None,
        typer.Option(metavar="FILE.keras", help="Keras model that answers beside the files."),
    ] = None,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0 takes a free one.")
    ] = 0,
    open_page: Annotated[
        bool, typer.Option("--open/--no-open", help="Open the page in the browser.")
    ] = True,
    assets: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="The npm packages.  [default: a cache, filled by npm]"),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the address only.")] = False,
) -> None:
    """Run exported files in a browser: draw or drop an input and see what they answer.

    The TFLite file runs in LiteRT.js and the ONNX file in ONNX Runtime Web, beside the answers of a
    Keras model, on a page that only this computer can reach. The first start gets both runtimes
    from npm. Ctrl-C ends it.

    Exit code 0 after Ctrl-C, 2 if a file is missing, swapped or edited.
    """
    terminal = Terminal(as_json=False, quiet=quiet)
    export = Export(Path(folder))
    reference = None
    if teacher is not None:
        inputs.check_model_file(teacher, "teacher")
        import_keras()
        reference = Teacher(inputs.load_model(teacher, "teacher"), export)
    packages = npm.npm_packages(None if assets is None else Path(assets), terminal.note)
    with TryServer(export, packages, reference, port) as server:
        print(server.url, flush=True)
        terminal.note("Ctrl-C ends it.")
        if open_page:
            webbrowser.open(server.url)
        try:
            with interrupts_once():
                server.serve_forever()
        except KeyboardInterrupt:
            terminal.note("Stopped.")


class Export:
    """An exported folder, checked and described for the page.

    Args:
        folder: What `keras_kd.export` wrote.

    Raises:
        ManifestError: If the manifest or a file is not what was exported.
        ValueError: If the folder holds no file to run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.content = content = manifest.read(folder)
        manifest.check_files(folder, content)
        rows = [row for row in content["artifacts"] if row["file"] is not None]
        if not rows:
            raise ValueError(
                f"`{folder}` holds no exported file: every conversion failed. Its manifest says "
                "why; export again."
            )
        model = content["model"]
        self.signature = Signature.from_dict(model)
        arrays = reverify.stored_arrays(folder, content)
        self.inputs: Arrays = {
            info.name: arrays[f"x{i}"] for i, info in enumerate(self.signature.inputs)
        }
        self.outputs: Arrays = {
            info.name: arrays[f"y{i}"] for i, info in enumerate(self.signature.outputs)
        }
        self._labels = arrays.get("t0")
        self.count = len(next(iter(self.inputs.values())))
        self.files = {row["file"]: folder / row["file"] for row in rows}
        self._rows = rows
        self._card = Scorecard(content, content["best"])

    def describe(self, teacher: Teacher | None) -> dict[str, Any]:
        """Return what the page needs to know, as JSON values."""
        content, model = self.content, self.content["model"]
        kinds = content["evaluation"]["kinds"]
        return {
            "name": model["name"],
            "folder": self.folder.resolve().name,
            # On numbers that are no classes a name would be a false one.
            "labels": labels_of(content).get(model["outputs"][0]["name"]),
            "inputs": [
                {"name": name, "shape": list(x.shape[1:]), "count": math.prod(x.shape[1:])}
                for name, x in self.inputs.items()
            ],
            "outputs": [
                {
                    "name": name,
                    **_shown_as(kinds[name]["kind"], y),
                    "probabilities": kinds[name]["probabilities"],
                    "units": math.prod(y.shape[1:]),
                }
                for name, y in self.outputs.items()
            ],
            "image": self._image(),
            "samples": self.count,
            "files": [self._file(row) for row in self._rows],
            "chosen": {name: self._chosen(name) for name in ("tflite", "onnx")},
            "reference": teacher.describe()
            if teacher is not None
            else {
                "given": False,
                "name": "Keras model",
                "bytes": content["keras"].get("bytes"),
                "milliseconds": content["keras"].get("latency_ms"),
                "score": self._score(self._card.of(content["keras"])),
            },
        }

    def sample(self, index: int) -> dict[str, Any]:
        """Return a stored sample: inputs, the Keras model's outputs, and its class if known."""
        first = next(iter(self.outputs))
        kind = self.content["evaluation"]["kinds"][first]["kind"]
        label = None
        if self._labels is not None and kind in ("classes", "binary"):
            row = np.ravel(self._labels[index])
            # One-hot rows name their class by its place; -1 stands for no label.
            one_hot = row.size > 1 and row.size == self.outputs[first][index].size
            label = np.array([row.argmax()]) if one_hot else row[row >= 0]
        return {
            "inputs": {name: x[index].ravel().tolist() for name, x in self.inputs.items()},
            "outputs": {name: y[index].ravel().tolist() for name, y in self.outputs.items()},
            "label": int(label[0]) if label is not None and label.size == 1 else None,
        }

    def _score(self, value: float | None) -> str | None:
        """What a model is judged by, as text for its column: `accuracy 97.69 %`."""
        if value is None or self._card.heading is None:
            return None
        unit = " %" if self._card.name == "accuracy" else ""
        return f"{self._card.heading} {self._card.text(value)}{unit}"

    def _file(self, row: dict[str, Any]) -> dict[str, Any]:
        signature = row["signature"]
        # The file may leave sizes free; the page runs one input of the stored samples' shape.
        sizes = {name: [1, *x.shape[1:]] for name, x in self.inputs.items()}
        score = self._card.of(row.get("metrics") or {})
        return {
            **{key: row[key] for key in ("file", "format", "precision", "status")},
            "score": self._score(score),
            "bytes": self.files[row["file"]].stat().st_size,
            "inputs": [
                {**tensor, "sizes": sizes[tensor["name"]]} for tensor in signature["inputs"]
            ],
            "outputs": signature["outputs"],
        }

    def _chosen(self, name: str) -> str | None:
        rows = [row for row in self._rows if row["format"] == name]
        rows.sort(
            key=lambda row: (
                row["file"] != self.content["best"],
                row["status"] != "passed",
                row["bytes"],
            )
        )
        return rows[0]["file"] if rows else None

    def _image(self) -> dict[str, Any] | None:
        # One input of gray or RGB pixels; anything else is typed as numbers.
        name, x = next(iter(self.inputs.items()))
        if len(self.inputs) > 1 or x.ndim != 4 or x.shape[-1] not in (1, 3):
            return None
        calibration = self.content["calibration"] or {}
        low, high = calibration.get("ranges", {}).get(name, (float(x.min()), float(x.max())))
        border = np.concatenate([x[:, 0].ravel(), x[:, -1].ravel()])
        return {
            "height": x.shape[1],
            "width": x.shape[2],
            "channels": x.shape[3],
            "low": low,
            "high": high,
            # What is drawn on: paper, or a dark ground as in most digits.
            "light": bool(np.median(border) > (low + high) / 2),
        }


def _shown_as(kind: str, y: np.ndarray) -> dict[str, Any]:
    """How the page shows an output: bars for a flat row of classes, a class for each position."""
    if y.ndim == 3 and kind == "classes":
        # How many positions, and how many classes.
        return {"kind": "positions", "positions": list(y.shape[1:])}
    return {"kind": kind if y.ndim == 2 and kind not in ("unknown", "decisions") else "values"}


class Teacher:
    """A Keras model that answers the page's inputs.

    Args:
        model: A built `keras.Model` with the inputs and outputs of the export.
        export: The export that it stands beside.

    Raises:
        ValueError: If the model cannot read the export's inputs, or has other outputs.
    """

    def __init__(self, model: keras.Model, export: Export) -> None:
        self._model = model
        self._export = export
        self._lock = threading.Lock()
        probes = {name: x[:_PROBES] for name, x in export.inputs.items()}
        wanted = {name: y[:_PROBES].shape for name, y in export.outputs.items()}
        advice = "Pass a model of the task that was exported, such as the student's teacher."
        try:
            self._check_inputs(probes)
            answers = self._run(probes)
        except Exception as error:
            # Each backend has its own types for a shape that does not fit.
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"The teacher `{model.name}` cannot read the inputs of `{export.folder}`: {reason} "
                f"{advice}"
            ) from error
        shapes = [y.shape for y in answers]
        if shapes != list(wanted.values()):
            raise ValueError(
                f"The teacher `{model.name}` answers {len(answers[0])} samples of "
                f"`{export.folder}` with shapes {shapes}, but the export's model with "
                f"{list(wanted.values())}. {advice}"
            )
        self._probabilities = {
            name: output_meaning.is_probability(y) for name, y in zip(wanted, answers, strict=True)
        }

    def describe(self) -> dict[str, Any]:
        """Return its name, bytes as float32, and which outputs are probabilities."""
        return {
            "given": True,
            "name": self._model.name,
            "bytes": int(sum(4 * math.prod(weight.shape) for weight in self._model.weights)),
            "milliseconds": None,
            "probabilities": self._probabilities,
        }

    def answer(self, request: Any) -> dict[str, Any]:
        """Answer one input.

        Args:
            request: `{"inputs": {name: flat list of numbers}}`.

        Returns:
            `outputs`, flat lists by name, and `milliseconds`, what the model took.

        Raises:
            ValueError: If an input is missing, or has another number of numbers.
        """
        given = request.get("inputs") if isinstance(request, dict) else None
        feed = {}
        for info in self._export.signature.inputs:
            shape = self._export.inputs[info.name].shape[1:]
            values = given.get(info.name) if isinstance(given, dict) else None
            try:
                x = np.asarray(values, np.float64)
            except (TypeError, ValueError):
                x = np.empty(0)
            if x.shape != (math.prod(shape),) or not np.isfinite(x).all():
                raise ValueError(
                    f"Input `{info.name}` must be a flat list of {math.prod(shape)} numbers."
                )
            dtype = self._export.inputs[info.name].dtype
            reason = misfit(x, dtype)
            if reason is not None:
                raise ValueError(f"Input `{info.name}` is of {dtype}, and {reason}.")
            feed[info.name] = x.reshape(1, *shape).astype(dtype)
        with self._lock:
            start = time.perf_counter()
            answers = self._run(feed)
            milliseconds = 1e3 * (time.perf_counter() - start)
        if not all(np.isfinite(y).all() for y in answers):
            raise ValueError(f"The teacher `{self._model.name}` answers NaN or infinite values.")
        names = [info.name for info in self._export.signature.outputs]
        outputs = {name: y.ravel().tolist() for name, y in zip(names, answers, strict=True)}
        return {"outputs": outputs, "milliseconds": milliseconds}

    def _check_inputs(self, probes: Arrays) -> None:
        # A convolution takes images of any size, and answers nonsense to those it does not know.
        if not is_symbolic(self._model):
            return
        takes = sorted(tuple(tensor.shape[1:]) for tensor in self._model.inputs)
        has = sorted(x.shape[1:] for x in probes.values())
        same = len(takes) == len(has) and all(
            len(a) == len(b) and all(m in (None, n) for m, n in zip(a, b, strict=True))
            for a, b in zip(takes, has, strict=True)
        )
        if not same:
            raise ValueError(f"it takes shapes {takes}, and the stored samples have {has}.")

    def _run(self, feed: Arrays) -> list[np.ndarray]:
        import keras

        from keras_kd.models.output_kinds import output_template

        # A teacher may be built in another way than the student that was exported.
        structure = self._export.signature.structure
        if isinstance(self._model, keras.Sequential):
            structure = "single"
        elif is_symbolic(self._model):
            structure = "functional"
        elif structure == "functional":
            structure = "single" if len(feed) == 1 else "list"
        signature = Signature(structure, self._export.signature.inputs, ())
        x = pack(self._model, signature, list(feed.values()))
        answers = keras.tree.flatten(self._model(x, training=False))
        arrays = [np.asarray(keras.ops.convert_to_numpy(y), np.float32) for y in answers]
        # By name where both have the same names: their order may differ.
        names = keras.tree.flatten(output_template(self._model))
        wanted = [info.name for info in self._export.signature.outputs]
        if len(wanted) > 1 and sorted(map(str, names)) == sorted(wanted):
            return [arrays[names.index(name)] for name in wanted]
        return arrays


class TryServer(BoundedServer):
    """The page on 127.0.0.1: nothing but the page, its runtimes, the files and stored samples.

    Args:
        export: What is tried.
        packages: Folder with the npm packages.
        teacher: Answers beside the files; `None` without one.
        port: 0 takes a free one.

    Raises:
        OSError: If the port is taken.
    """

    def __init__(
        self, export: Export, packages: Path, teacher: Teacher | None = None, port: int = 0
    ) -> None:
        self.export = export
        self.teacher = teacher
        page = (npm.PAGE / "index.html").read_bytes()
        description = json.dumps(export.describe(teacher), allow_nan=False).encode()
        # Whole addresses, looked up as they are: no part of one is ever joined to a path.
        self.texts = {
            "/": (page, _TYPES[".html"]),
            "/try.json": (description, "application/json"),
        }
        for name in ("app.js", "runtimes.js", "style.css"):
            self.texts[f"/{name}"] = ((npm.PAGE / name).read_bytes(), _TYPES[Path(name).suffix])
        self.paths = {f"/files/{quote(name, safe='')}": path for name, path in export.files.items()}
        for package, names in npm.PACKAGES.items():
            for name in names:
                self.paths[f"/npm/{package}/{name}"] = packages / package / name
        self.policy = _policy(page)
        # The largest request: all inputs, with 32 characters a number.
        numbers = sum(math.prod(x.shape[1:]) for x in export.inputs.values())
        self.longest = 4096 + 32 * numbers
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except OSError as error:
            raise OSError(
                f"Port {port} of 127.0.0.1 cannot be used: {error.strerror}. Choose another "
                "`--port`, or 0 for a free one."
            ) from error

    @property
    def url(self) -> str:
        """The address of the page."""
        return f"http://127.0.0.1:{self.server_port}/"

    @property
    def hosts(self) -> set[str]:
        """What a browser on this computer calls the server."""
        return {f"127.0.0.1:{self.server_port}", f"localhost:{self.server_port}"}

    def server_bind(self) -> None:
        """Bind without the reverse name lookup of `HTTPServer`, which may wait for a network."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "127.0.0.1", int(self.server_address[1])


class _Handler(BaseHTTPRequestHandler):
    server: TryServer
    protocol_version = "HTTP/1.1"
    timeout = _SECONDS

    def handle_one_request(self) -> None:
        super().handle_one_request()
        self.server.answering(self.connection, False)

    def do_GET(self) -> None:
        self.server.answering(self.connection, True)
        if not self._is_ours():
            return
        address = urlsplit(self.path).path
        number = re.fullmatch(r"/samples/(\d{1,9})", address)
        if address in self.server.texts:
            self._send(*self.server.texts[address])
        elif address in self.server.paths:
            path = self.server.paths[address]
            try:
                body = path.read_bytes()
            except OSError:
                self._fail(HTTPStatus.NOT_FOUND, f"`{path.name}` has gone from the disk.")
                return
            self._send(body, _TYPES.get(path.suffix, "application/octet-stream"))
        elif number and int(number[1]) < self.server.export.count:
            self._json(self.server.export.sample(int(number[1])))
        else:
            self._fail(HTTPStatus.NOT_FOUND, "There is nothing at this address.")

    def do_POST(self) -> None:
        # A body that is not read would be taken for the next request.
        self.close_connection = True
        if not self._is_ours():
            return
        origin = self.headers.get("Origin")
        length = self.headers.get("Content-Length", "")
        if urlsplit(self.path).path != "/reference":
            self._fail(HTTPStatus.NOT_FOUND, "There is nothing at this address.")
        elif origin is not None and origin not in {f"http://{host}" for host in self.server.hosts}:
            self._fail(HTTPStatus.FORBIDDEN, "Only this server's own page may ask.")
        elif self.headers.get_content_type() != "application/json":
            # Which a foreign page cannot send without asking first.
            self._fail(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "The request must be application/json.")
        elif not length.isdecimal():
            self._fail(HTTPStatus.LENGTH_REQUIRED, "The request must say its length.")
        elif int(length) > self.server.longest:
            self._fail(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "The request is longer than any input.")
        elif self.server.teacher is None:
            self._fail(HTTPStatus.NOT_FOUND, "No teacher was given. Start with --teacher.")
        else:
            try:
                text = self.rfile.read(int(length))
                self.server.answering(self.connection, True)
                request = json.loads(text)
                answer = self.server.teacher.answer(request)
            except TimeoutError:
                self._fail(HTTPStatus.REQUEST_TIMEOUT, "The request did not come to its end.")
            except (ValueError, RecursionError) as error:
                self._fail(HTTPStatus.BAD_REQUEST, str(error))
            else:
                self._json(answer)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _is_ours(self) -> bool:
        # A foreign name that resolves to 127.0.0.1 would make a foreign page the server's own.
        if self.headers.get("Host") in self.server.hosts:
            return True
        self.close_connection = True
        self._fail(HTTPStatus.FORBIDDEN, f"Open {self.server.url} on this computer.")
        return False

    def _json(self, document: dict[str, Any]) -> None:
        # JSON has no NaN: a number that is not finite becomes null.
        self._send(
            json.dumps(manifest.plain(document), allow_nan=False).encode(), "application/json"
        )

    def _fail(self, status: HTTPStatus, reason: str) -> None:
        self._send(json.dumps({"error": reason}).encode(), "application/json", status)

    def _send(self, body: bytes, kind: str, status: HTTPStatus = HTTPStatus.OK) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        # Isolated, a page has threads and a clock of 5 microseconds; otherwise 100.
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("Content-Security-Policy", self.server.policy)
        self.end_headers()
        self.wfile.write(body)


def _policy(page: bytes) -> str:
    # The import map is the one script within the page: its hash allows it and no other.
    found = re.search(rb'<script type="importmap">(.*?)</script>', page, re.S)
    if found is None:
        raise ValueError("The page `index.html` has no import map. Install keras_kd again.")
    digest = base64.b64encode(hashlib.sha256(found[1]).digest()).decode()
    return (
        f"default-src 'self'; script-src 'self' 'sha256-{digest}' 'wasm-unsafe-eval'; "
        "img-src 'self' blob: data:; base-uri 'none'; frame-ancestors 'none'"
    )
