"""`keras-kd lifelong`: a `.keras` file that learns task after task, and what it forgets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from keras_kd.cli import inputs, options, outputs
from keras_kd.cli.console import Terminal, Work, import_keras
from keras_kd.export.staged_folder import written_together
from keras_kd.export.target import check_names_free, check_writable
from keras_kd.export.writing import write_file
from keras_kd.utils.errors import did_you_mean
from keras_kd.utils.types import Logs

_METHODS = {
    "fine-tune": "FineTune",
    "joint": "Joint",
    "lwf": "LearningWithoutForgetting",
    "replay": "Replay",
    "dark-replay": "DarkReplay",
    "icarl": "ICaRL",
    "less-forgetting": "LessForgetting",
    "podnet": "PodNet",
    "weight-aligning": "WeightAligning",
    "bias-correction": "BiasCorrection",
    "elastic-weights": "ElasticWeights",
}
"""Names on the command line, and the classes."""

_WRITTEN = ("model.keras", "report.html", "report.json")


def lifelong(
    student: Annotated[str, typer.Argument(metavar="STUDENT.keras", help="The model that learns.")],
    data: Annotated[
        str, typer.Option(metavar="DATA", help="A data set: digits, tfds:NAME or a .npz file.")
    ] = "digits",
    tasks: Annotated[int, typer.Option(help="Number of tasks, each with classes of its own.")] = 5,
    method: Annotated[str, typer.Option(help=f"Of: {', '.join(_METHODS)}.")] = "dark-replay",
    memory: Annotated[int, typer.Option(help="Rows that are kept for replay.")] = 200,
    policy: Annotated[
        str | None,
        typer.Option(help="`reservoir`, `balanced` or `herding`.  [default: as the method]"),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Folder for state, model and report; a run that was killed goes on there.  "
            "[default: runs/NAME-lifelong]",
        ),
    ] = None,
    epochs: Annotated[int, typer.Option(help="Passes over each task.")] = 1,
    batch_size: Annotated[int, typer.Option(help="Rows of the task a step.")] = 32,
    learning_rate: Annotated[float, typer.Option(help="Of SGD.")] = 0.03,
    seed: Annotated[int, options.seed("Of the order of the classes and of all draws.")] = 0,
    known_task: Annotated[
        bool, typer.Option("--known-task", help="Report accuracies with the task told.")
    ] = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Teach a model class after class, and say what it learns and what it forgets.

    The model ends in a Dense layer of logits, without an activation. Its weights are where the
    training begins; the file itself is not changed. The folder gets `model.keras`, `report.html`
    and `report.json`.

    Exit code 0 if it is done, 2 for bad input.
    """
    terminal = Terminal(as_json=as_json, quiet=quiet)
    if method not in _METHODS:
        hint = did_you_mean(method, _METHODS, quote="'")
        raise ValueError(f"`--method` is one of {', '.join(_METHODS)}. Received: {method!r}.{hint}")
    for name, value in (
        ("tasks", tasks),
        ("memory", memory),
        ("epochs", epochs),
        ("batch-size", batch_size),
        ("learning-rate", learning_rate),
    ):
        if not value > 0:
            raise ValueError(f"`--{name}` is positive. Received: {value}.")
    folder = outputs.folder_of(out, Path("runs") / f"{Path(student).stem}-lifelong")
    inputs.check_model_file(student, "model")
    inputs.check_data(data, "--data")
    check_writable(folder)
    check_names_free(folder, _WRITTEN)
    import_keras()
    import keras

    import keras_kd.datasets
    from keras_kd import lifelong as methods

    model = inputs.load_model(student, "model")
    found = keras_kd.datasets.load(data)
    stream = methods.Stream.by_class(
        found.x_train, found.y_train, tasks=tasks, seed=seed, test=(found.x_test, found.y_test)
    )
    chosen: Any = getattr(methods, _METHODS[method])()
    kept = None
    if chosen.uses_memory:
        herds = not chosen.draws
        kept = methods.Memory(memory, policy=policy or ("herding" if herds else "reservoir"))
    elif policy is not None:
        raise ValueError(f"`--policy` is of a memory, and `{method}` has none. Leave it out.")
    learner = methods.Learner(model, chosen, kept, folder, seed=seed)
    learner.compile(keras.optimizers.SGD(learning_rate), metrics=["accuracy"])
    with terminal.working() as work:
        for i, task in enumerate(stream):
            learner.fit(
                task,
                epochs=epochs,
                batch_size=batch_size,
                verbose=0,
                callbacks=[_progress(work, f"{task.name} ({i + 1}/{len(stream)})", epochs)],
            )
    report = learner.report(known_task=known_task)
    document = report.to_dict()
    with written_together(folder) as made:
        learner.model.save(made / "model.keras")
        write_file(made / "report.json", json.dumps(document, indent=2) + "\n")
        report.save_html(made / "report.html")
    terminal.result(
        document,
        report.table(terminal.width),
        "",
        f"model.keras and report.html are in {folder}.",
    )


def _progress(work: Work, name: str, epochs: int) -> Any:
    """A Keras callback that moves a bar."""
    import keras

    class Progress(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
            self.epoch = epoch

        def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
            steps = self.params["steps"]
            work(name, self.epoch * steps + batch + 1, epochs * steps)

    return Progress()
