"""`keras-kd robust`: how a model or an exported file stands up to attacks and corruptions."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import typer

from keras_kd.cli import inputs, options, outputs, stored_rows
from keras_kd.cli.console import Terminal, import_keras
from keras_kd.export.loaded import LoadedModel, find
from keras_kd.utils.types import Shape


def robust(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE", help="A .keras model, a .tflite or .onnx file, or an export's folder."
        ),
    ],
    data: Annotated[
        str, typer.Option(metavar="DATA", help="Inputs and labels that were not trained on.")
    ],
    epsilon: Annotated[
        str | None,
        typer.Option(help="How far an attack may move an input, such as 0.1 or 8/255."),
    ] = None,
    norm: Annotated[str, typer.Option(help="What it measures by: `linf` or `l2`.")] = "linf",
    step: Annotated[
        str | None, typer.Option(help="Length of a step.  [default: 2.5 * epsilon / steps]")
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of an attack.")] = 20,
    restarts: Annotated[int, typer.Option(help="How often an attack begins anew.")] = 1,
    bounds: Annotated[
        str, typer.Option(help="Least and greatest value of an input, or `none`.")
    ] = "0,1",
    twin: Annotated[
        str | None,
        typer.Option(metavar="MODEL.keras", help="The model that an exported file was made from."),
    ] = None,
    corruptions: Annotated[
        str | None,
        typer.Option(help="`all`, `image`, `audio`, or names separated by commas."),
    ] = None,
    severities: Annotated[str, typer.Option(help="Of 1 to 5, separated by commas.")] = "1,2,3,4,5",
    second_opinion: Annotated[
        str | None, typer.Option(help="`art`: the Adversarial Robustness Toolbox as well.")
    ] = None,
    calibrate_on: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Held-out data: which temperature would calibrate it."),
    ] = None,
    samples: Annotated[int, typer.Option(help="The first so many rows; 0 takes all.")] = 1000,
    queries: Annotated[
        int, typer.Option(help="Answers that the square attack may ask for, for each row.")
    ] = 500,
    seed: Annotated[int, options.seed("Of attacks and corruptions.")] = 0,
    html: Annotated[
        str | None, typer.Option(metavar="PATH", help="Write the report as a page.")
    ] = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Attack and corrupt the inputs of a model or file, and say how often it is still right.

    DATA is a `.npz` file that holds `x` and `y`, or a data set, `digits`, `tfds:NAME` or a
    `.npz` file with `x_train`, `y_train`, `x_test`, `y_test`: then its test rows are
    attacked, and its validation rows calibrate. Without `--epsilon` nothing is attacked.

    Exit code 0 if nothing contradicts the figures, 1 if a flag does, 2 for bad input.
    """
    terminal = Terminal(as_json=as_json, quiet=quiet)
    if samples < 0:
        raise ValueError(f"`--samples` is not negative. Received: --samples {samples}.")
    radius, length = _number("--epsilon", epsilon), _number("--step", step)
    if radius is None and (twin is not None or second_opinion is not None or step is not None):
        raise ValueError("Nothing is attacked without `--epsilon`. Pass it, such as 8/255.")
    if norm not in ("linf", "l2"):
        raise ValueError(f"`--norm` is `linf` or `l2`. Received: --norm {norm}.")
    page = None if html is None else Path(html)
    outputs.check_file_to_write(html, "--html")
    # The cheap checks come first: Keras and its backend take seconds to import.
    if file.endswith(".keras"):
        inputs.check_model_file(file, "model")
    else:
        find(file)
    if twin is not None:
        inputs.check_model_file(twin, "twin")
    inputs.check_data(data, "--data")
    inputs.check_data(calibrate_on, "--calibrate-on")
    within, names, levels = _bounds(bounds), _names(corruptions), _levels(severities)
    import_keras()
    import keras_kd.export
    from keras_kd.robust import L2, Linf, evaluate

    threat = None
    if radius is not None:
        kind = Linf if norm == "linf" else L2
        threat = kind(radius, length, steps, restarts, within)
    model = (
        inputs.load_model(file, "model") if file.endswith(".keras") else keras_kd.export.load(file)
    )
    shapes = _shapes(model)
    x, y = _labeled(data, "test", shapes)
    x, y = (x[:samples], y[:samples]) if samples else (x, y)
    with terminal.working() as work:
        report = evaluate(
            model,
            x,
            y,
            threat,
            corruptions=names,
            severities=levels,
            second_opinion=second_opinion,
            calibrate_on=None
            if calibrate_on is None
            else _labeled(calibrate_on, "validation", shapes),
            twin=None if twin is None else inputs.load_model(twin, "twin"),
            queries=queries,
            seed=seed,
            progress=work,
        )
    if page is not None:
        report.save_html(page)
    written = [] if page is None else [f"The report is in {page}."]
    if radius is None and names is None:
        written.append(
            "Nothing was attacked or corrupted: `--epsilon 8/255` attacks, `--corruptions all` "
            "corrupts."
        )
    terminal.result(report.to_dict(), report.table(terminal.width), *written)
    raise typer.Exit(1 if report.flags else 0)


def _number(option: str, text: str | None) -> float | None:
    if text is None:
        return None
    try:
        return float(Fraction(text.strip()))
    except (ValueError, ZeroDivisionError):
        raise ValueError(
            f"`{option}` is a number or a fraction, such as 0.1 or 8/255. Received: {option} "
            f"{text}."
        ) from None


def _bounds(text: str) -> tuple[float, float] | None:
    if text.strip() == "none":
        return None
    parts = [_number("--bounds", part) for part in text.split(",")]
    if len(parts) != 2 or parts[0] is None or parts[1] is None:
        raise ValueError(
            "`--bounds` are two numbers separated by a comma, such as 0,1, or `none`. Received: "
            f"--bounds {text}."
        )
    return parts[0], parts[1]


def _names(text: str | None) -> Any:
    if text is None:
        return None
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise ValueError("`--corruptions` names nothing. Leave it out, or pass `all`.")
    return words[0] if len(words) == 1 else words


def _levels(text: str) -> list[int]:
    try:
        found = [int(word) for word in text.split(",")]
    except ValueError:
        found = [0]
    if not all(1 <= level <= 5 for level in found):
        raise ValueError(
            f"`--severities` are whole numbers from 1 to 5, separated by commas. Received: "
            f"--severities {text}."
        )
    return found


def _shapes(model: Any) -> dict[str, Shape]:
    """Shapes of the inputs by name, of a Keras model or an exported file."""
    if isinstance(model, LoadedModel):
        return {row["name"]: tuple(row["shape"][1:]) for row in model.inputs}
    return stored_rows.shapes_of(model)


def _labeled(path: str, part: str, shapes: dict[str, Shape]) -> tuple[Any, Any]:
    """Inputs and labels of a `.npz` file, or of a split of a data set."""
    from keras_kd import datasets
    from keras_kd.datasets import files

    if path.endswith(".npz"):
        arrays = files.read(path)
        if "x" in arrays and "y" in arrays:
            return arrays["x"], arrays["y"]
        if stored_rows.are_splits(arrays, shapes):
            return stored_rows.split(path, arrays, shapes, part)
        raise ValueError(
            f"`{path}` holds {', '.join(f'`{name}`' for name in arrays) or 'no arrays'}. Store "
            "`x` and `y`, or `x_train`, `y_train`, `x_test` and `y_test`."
        )
    found = datasets.load(path)
    if part == "test":
        return found.x_test, found.y_test
    return found.x_validation, found.y_validation
