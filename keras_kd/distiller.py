"""One batch in, one optimizer step out: the hard loss, the teacher's, and the regularizers."""

import contextlib
import copy
from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from keras_kd import backends, checks, outputs, step, summaries, teachers, watch
from keras_kd.outputs import Placed
from keras_kd.saving import Saved
from keras_kd.taps import Answer, Reader, inference
from keras_kd.teachers import Teacher
from keras_kd.transfer import Transfer
from keras_kd.typing import Tensor

DEFAULT_ALPHA = 0.5
# Higher ones cost very small students accuracy: see `benchmarks/defaults.py`.
DEFAULT_TEMPERATURE = 1.0


class _Setup:
    """What the distiller must hold without Keras tracking it."""

    def __init__(self, from_logits: dict[str, bool | None]) -> None:
        self.from_logits = from_logits
        self.teacher: Teacher | None = None
        self.student: Any = None
        self.placed: list[Placed] = []
        self.restored: list[Placed] | None = None
        self.match = outputs.Match([0], [False])
        self.prepared = False
        # Transfers that came from a file, with their weights, are not made anew.
        self.kept = False
        self.explicit = False
        self.labeled = False
        self.evaluate_distillation = False
        self.compiled_with: dict[str, Any] = {}
        self.loaded: dict[str, Any] | None = None
        self.maps_inputs: dict[str, bool] = {}
        self.frozen: set[int] = set()
        self.shared: list[Any] = []
        self.live_values: dict[str, float] = {}


@keras.saving.register_keras_serializable(package="keras_kd")
class Distiller(Saved):
    """Trains a student to do the task and to answer like its teacher.

    Each step minimizes `alpha * hard + (1 - alpha) * distillation +
    regularizers`: the student's loss on the labels, the weighted sum of the
    transfers from the teacher, and what the student's layers add
    (`add_loss`, weight regularizers). It costs one forward and backward pass
    of the student and one forward pass of the teacher, with
    `training=False`; no gradient of the teacher is ever taken.

    The teacher stays as it was given: weights, BatchNorm statistics and
    `trainable` alike. A layer that the student shares with it is not trained
    and runs in inference mode.

    `predict`, `evaluate` and calling the distiller use the student alone.

    Args:
        student: The `keras.Model` that is trained.
        teacher: A built `keras.Model`, a list of them (an `Ensemble` with equal
            weights), a `keras_kd.teachers.Teacher`, or `None` to train on the
            labels alone.
        teacher_precision: `"float32"` runs the teacher as it is given, which is
            the default, since its answers are then exact. `"bfloat16"` and
            `"float16"` run a private copy with BatchNormalization folded, in
            that precision; `"auto"` times copies on the first rows and takes
            one only if it is faster and agrees. Teachers whose inner layers
            are read run as they are given.
        teacher_inputs: `fn(x)`: what the teacher reads of one batch `x`.
            Defaults to the batch itself. It runs inside the compiled step, so
            it is made of `keras.ops`, Keras layers or backend functions.
        student_inputs: The same for the student.
        from_logits: Whether the models' outputs are logits. Defaults to
            `None`: a model that ends in a softmax or sigmoid is recognized and
            its logits are read from before it. `False` takes the logarithm of
            the outputs, for models that hide how they make probabilities. A
            dict `{"teacher": ..., "student": ...}` sets the sides apart.
        name: Name of the distiller.

    Raises:
        TypeError: If teacher or student is no Keras 3 model.
        ValueError: If the teacher is not built or is the student itself.

    Example:
        >>> distiller = Distiller(student, teacher)
        >>> distiller.compile(
        ...     optimizer="adam",
        ...     loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        ...     metrics=["accuracy"],
        ... )
        >>> history = distiller.fit(x, y, epochs=20)
        >>> student = distiller.student

    Reference:
        - [Hinton et al., 2015](https://arxiv.org/abs/1503.02531), section 2
    """

    # Read by properties while Keras is still constructing the model.
    _setup: Any = None
    _books: step.Books | None = None
    # Keras's own, made by `make_train_function` and `make_test_function`.
    train_function: Any
    test_function: Any

    def __init__(
        self,
        student: Any,
        teacher: Any = None,
        *,
        teacher_precision: str = "float32",
        teacher_inputs: Callable[[Any], Any] | None = None,
        student_inputs: Callable[[Any], Any] | None = None,
        from_logits: bool | dict[str, bool | None] | None = None,
        name: str | None = None,
    ) -> None:
        teachers.require_model(student, "student")
        super().__init__(
            name=name or f"{student.name}_distiller",
            dtype=_policy_of(student),
            autocast=False,
        )
        if not isinstance(from_logits, dict):
            from_logits = {"teacher": from_logits, "student": from_logits}
        checks.known_keys(from_logits, ("teacher", "student"), "from_logits")
        self.student = student
        self.transfers: list[Transfer] = []
        self.teacher_inputs = teacher_inputs
        self.student_inputs = student_inputs
        # In a plain object Keras tracks nothing: the teacher must take no part
        # in weights, trainable flags, checkpoints and summaries.
        self._setup = _Setup(from_logits)
        self._setup.student = Reader(student, "student", from_logits.get("student"))
        self.temperature = _live(DEFAULT_TEMPERATURE, "temperature")
        self.alpha = _live(DEFAULT_ALPHA, "alpha")
        self.student_loss_weight = _live(DEFAULT_ALPHA, "student_loss_weight")
        self.distillation_loss_weight = _live(1 - DEFAULT_ALPHA, "distillation_loss_weight")
        # Without it Keras warns of masks that end here, those of the teacher's answer too.
        self.supports_masking = True
        # The student builds itself when it is first called.
        self.built = True
        self._attach(teachers.make(teacher, from_logits.get("teacher"), teacher_precision))

    def _attach(self, teacher: Teacher | None) -> None:
        self._setup.teacher = teacher
        if teacher is None:
            return
        if any(model is self.student for model in teacher.models):
            raise ValueError(
                f"The student `{self.student.name}` is the teacher itself. Pass a copy, "
                "`keras.models.clone_model(model)`, to distil a model into its own kind."
            )
        theirs = {id(v) for model in teacher.models for v in model.variables}
        self._share(
            [
                layer
                for layer in self.student._flatten_layers()
                if layer.variables and all(id(v) in theirs for v in layer.variables)
            ]
        )
        self._setup.frozen |= theirs & {id(v) for v in self.student.variables}

    def _share(self, layers: list[Any]) -> None:
        """Leave these layers of the student as the teacher has them."""
        self._setup.shared.extend(layers)
        self._setup.frozen |= {id(v) for layer in layers for v in layer.variables}

    @property
    def _frozen(self) -> set[int]:
        """Identities of the variables that the teacher owns as well."""
        return self._setup.frozen if self._setup is not None else set()

    @property
    def _shared(self) -> list[Any]:
        """Layers that the teacher owns as well."""
        return self._setup.shared if self._setup is not None else []

    @property
    def teacher(self) -> Any:
        """The teacher: a `keras.Model`, an `Ensemble`, a `Teacher` or `None`."""
        teacher = self._setup.teacher
        return teacher.model if isinstance(teacher, teachers.ModelTeacher) else teacher

    # ------------------------------------------------------------------ compile

    def compile(
        self,
        optimizer: Any = "adam",
        loss: Any = None,
        *,
        metrics: Any = None,
        distillation_loss: Any = None,
        alpha: float | None = None,
        temperature: float | None = None,
        student_loss_weight: float | None = None,
        distillation_loss_weight: float | None = None,
        evaluate_distillation: bool = False,
        **kwargs: Any,
    ) -> None:
        """Configure the training.

        Args:
            optimizer: As in `keras.Model.compile`.
            loss: The hard loss between labels and the student's output, as in
                `keras.Model.compile`. `None` trains without labels.
            metrics: Metrics of the student, as in `keras.Model.compile`.
            distillation_loss: A loss of `keras_kd.losses`, a `Transfer`, or a
                list of them that are summed. For several outputs, a list,
                tuple or dict of losses shaped like the outputs; a single loss
                then applies to each. Defaults to `SoftTargets()`, or to
                `BinarySoftTargets()` for sigmoid and one-unit classifiers.
            alpha: Weight of the hard loss in `[0, 1]`; the distillation loss
                has `1 - alpha`. Defaults to 0.5.
            temperature: Positive float, dimensionless, for every loss that has
                none of its own. Defaults to 1.
            student_loss_weight: Non-negative float. With
                `distillation_loss_weight` in place of `alpha`; one that is left
                out is 1.
            distillation_loss_weight: Non-negative float.
            evaluate_distillation: Whether `evaluate` also runs the teacher and
                reports the distillation loss and the agreement.
            **kwargs: `loss_weights`, `weighted_metrics`, `run_eagerly`,
                `steps_per_execution`, `jit_compile`, `auto_scale_loss`, as in
                `keras.Model.compile`.

        Raises:
            ValueError: If a value is out of range, `alpha` is given beside an
                explicit weight, there is no loss at all, a layer is not found,
                or the outputs do not fit together.
        """
        setup = self._setup
        teacher = setup.teacher
        restored = setup.restored
        checks.objective(loss, distillation_loss, teacher is not None or restored is not None)
        checks.weights(alpha, student_loss_weight, distillation_loss_weight, loss is not None)
        if temperature is not None:
            checks.temperature(temperature)
        checks.student_loss(loss, setup.student.kinds())
        placed = restored or []
        if teacher is not None:
            placed = self._plan(distillation_loss, loss)
        # Nothing of the distiller changes before this line.
        setup.explicit = student_loss_weight is not None or distillation_loss_weight is not None
        setup.labeled = loss is not None
        setup.evaluate_distillation = evaluate_distillation
        setup.prepared, setup.kept = False, restored is not None
        setup.compiled_with = {
            "loss": loss,
            "metrics": metrics,
            "distillation_loss": distillation_loss,
            "evaluate_distillation": evaluate_distillation,
            **kwargs,
        }
        self._books = None
        self._adopt(placed)
        if not self.distills:
            alpha, student_loss_weight = 1.0, 1.0 if student_loss_weight is None else None
        elif loss is None:
            alpha = 0.0
        self.temperature.assign(DEFAULT_TEMPERATURE if temperature is None else temperature)
        self.alpha.assign(DEFAULT_ALPHA if alpha is None else alpha)
        if setup.explicit:
            self.student_loss_weight.assign(_or_one(student_loss_weight))
            self.distillation_loss_weight.assign(_or_one(distillation_loss_weight))
        # Keras keeps the loss and metrics of an earlier `compile` beside `None`.
        self.loss, self._compile_loss, self._compile_metrics = None, None, None
        super().compile(optimizer=optimizer, loss=loss, metrics=metrics, **kwargs)

    def _plan(self, distillation_loss: Any, hard: Any) -> list[Placed]:
        """What is transferred where, checked as far as the models are known."""
        setup = self._setup
        if setup.student.template is None and isinstance(distillation_loss, dict):
            # A model without a graph shows the names of its outputs with the first batch.
            return []
        if distillation_loss is None:
            distillation_loss = outputs.default_loss(setup.student, hard)
        placed = outputs.place(distillation_loss, setup.student.template)
        checks.unique([transfer.name for transfer in outputs.transfers(placed)], "transfer")
        student, teacher = copy.copy(setup.student), teachers.apart(setup.teacher)
        student.reset(outputs.paths(p.transfer.student for p in placed))
        teacher.reset(outputs.paths(p.transfer.teacher for p in placed))
        outputs.match(placed, student, teacher)
        return placed

    def _adopt(self, placed: list[Placed]) -> None:
        """Transfer this from now on."""
        setup = self._setup
        setup.placed = placed
        if setup.teacher is not None:
            setup.student.reset(outputs.paths(p.transfer.student for p in placed))
            setup.teacher.reset(outputs.paths(p.transfer.teacher for p in placed))
            setup.match = outputs.match(placed, setup.student, setup.teacher)
        # Clearing the tracked list in place makes Keras forget old projectors.
        self.transfers.clear()
        for transfer in outputs.transfers(placed):
            self.transfers.append(transfer)
        books = ["student_loss"] if setup.labeled else []
        if self.distills:
            books += ["distillation_loss", *(t.name for t in self.transfers)]
            if setup.teacher is None or outputs.comparable(
                setup.match, setup.student.shapes, setup.teacher.output_shapes()
            ):
                books.append("agreement")
        # A step that was traced before writes into the metrics of that time.
        self._books = step.Books(books, self._books.means if self._books else {})

    def _prepare(self, rows: Any, real: bool = True) -> None:
        """Look at a few rows before the first step: build what they show, refuse what cannot work.

        Args:
            rows: A few rows of the data, `None` where nothing can be read.
            real: Whether they are rows of the data, or zeros in their shape.
        """
        setup = self._setup
        if setup.prepared or setup.teacher is None or rows is None:
            return
        x, record = setup.teacher.split(rows)
        mine, theirs = self._for_student(x), self._for_teacher(x)
        with self._scope():
            known = setup.student.settled
            setup.teacher.inspect(theirs)
            setup.student.inspect(mine)
            if known or setup.kept:
                setup.match = outputs.match(setup.placed, setup.student, setup.teacher)
            else:
                compiled = setup.compiled_with
                self._adopt(self._plan(compiled["distillation_loss"], compiled["loss"]))
            student = setup.student.read(mine, False, setup.match.binary)
            if record is not None or setup.teacher.models:
                answer = setup.teacher.read(theirs, record, setup.match.binary)
                if real and checks.finite(x) and not checks.finite((answer.logits, answer.tensors)):
                    raise ValueError(
                        f"The outputs of the teacher `{setup.teacher.name}` are NaN or infinite on "
                        "the first rows of the data, which are finite. Check the teacher's "
                        "weights: it may have diverged, or overflow in half precision."
                    )
                for placed in setup.placed:
                    self._sides(placed, answer, student)
                if not self.optimizer.built:
                    # Slots that exist before the first step can be restored by callbacks.
                    self.optimizer.build(self.trainable_variables)
        setup.prepared = True

    def _scope(self) -> Any:
        """Where variables are created, under `tf.distribute` too."""
        if keras.config.backend() == "tensorflow":
            return self.distribute_strategy.scope()
        return contextlib.nullcontext()

    # --------------------------------------------------------------------- step

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Run the student.

        Args:
            inputs: One batch, as given to `fit`.
            training: Passed on to the student.

        Returns:
            The student's output.
        """
        setup = self._setup
        whole = isinstance(inputs, step.Batch)
        if whole:
            x = inputs.x
        else:
            x = setup.teacher.split(inputs)[0] if setup.teacher else inputs
            x = self._for_student(x)
        with inference(self._shared):
            if not whole:
                return setup.student.run(x, bool(training))
            return setup.student.read(x, bool(training), setup.match.binary)

    def compute_mask(self, inputs: Any, previous_mask: Any) -> None:
        """Return nothing: the student's outputs carry their masks."""
        return

    def _for_student(self, x: Any) -> Any:
        return self.student_inputs(x) if self.student_inputs is not None else x

    def _for_teacher(self, x: Any) -> Any:
        return self.teacher_inputs(x) if self.teacher_inputs is not None else x

    def _require_teacher(self) -> None:
        if self._setup.teacher is None and self.distills:
            raise ValueError(
                "This distiller was loaded without its teacher. Load it with "
                "`keras_kd.load_distiller(path, teacher=teacher)` to go on training."
            )

    def _reads_outputs(self) -> bool:
        """Whether a transfer reads what the teacher returned, as it is."""
        return any(t.teacher is None and not t.reads_logits for t in self.transfers)

    def _sides(self, placed: Placed, teacher: Answer, student: Answer) -> tuple[Any, Any]:
        """What a transfer reads on either side; builds it for these shapes at first sight."""
        transfer, output = placed
        index = self._setup.match.order[output]
        theirs = step.pick(teacher, transfer.teacher, index, transfer.reads_logits)
        ours = step.pick(student, transfer.student, output, transfer.reads_logits)
        if not transfer.built:
            transfer.build(step.shapes(theirs), step.shapes(ours))
        return theirs, ours

    def _with_answer(self, data: Any, state: Sequence[Any] = ()) -> Any:
        """The batch with the teacher's answer, computed where no gradient is taken."""
        data, weights = backends.supplied(data)
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        setup = self._setup
        teacher = setup.teacher
        if teacher is None:
            self._require_teacher()
            answer, indices, finite = Answer(None, [], {}), None, None
        else:
            x, record = teacher.split(x)
            indices = record.get("indices") if isinstance(record, dict) else None
            values = list(zip(self._teacher_variables(), weights or ()))
            if state:
                # What the student shares with the teacher is in the state.
                values.extend(zip(self.non_trainable_variables, state[1]))
            with backends.inference_only(values):
                answer = teacher.read(self._for_teacher(x), record, setup.match.binary)
            answer, finite = step.stopped(answer, self._reads_outputs())
            x = step.zeros_unless(finite, x)
        return step.Batch(self._for_student(x), answer, indices, finite), y, sample_weight

    def _teacher_variables(self) -> list[Any]:
        """The teacher's variables that the student does not share."""
        teacher = self._setup.teacher
        models = teacher.models if teacher is not None else []
        found = {id(v): v for model in models for v in model.variables}
        return [v for key, v in found.items() if key not in self._frozen]

    def make_train_function(self, force: bool = False) -> Any:
        """Compile the train step, as `keras.Model` does."""
        before = self.train_function
        super().make_train_function(force)
        if self.train_function is not before and self._setup.teacher is not None:
            self.train_function = backends.supplying(self.train_function, self._teacher_variables)

    def make_test_function(self, force: bool = False) -> Any:
        """Compile the test step, as `keras.Model` does."""
        before = self.test_function
        super().make_test_function(force)
        if self.test_function is not before and self._setup.evaluate_distillation:
            self.test_function = backends.supplying(self.test_function, self._teacher_variables)

    def train_step(self, *args: Any) -> Any:
        """Take one optimizer step on one batch.

        Args:
            *args: The batch; on the JAX backend the state before it.

        Returns:
            The logs; on the JAX backend the logs and the new state.
        """
        *state, data = args
        return super().train_step(*state, self._with_answer(data, *state))

    def test_step(self, *args: Any) -> Any:
        """Evaluate one batch: the student alone, unless the teacher was asked for.

        Args:
            *args: The batch; on the JAX backend the state before it.

        Returns:
            The logs; on the JAX backend the logs and the new state.
        """
        if self._setup.evaluate_distillation and self.distills:
            *state, data = args
            return super().test_step(*state, self._with_answer(data, *state))
        result = super().test_step(*args)
        if isinstance(result, tuple):
            logs, *state = result
            return (self._student_logs(logs), *state)
        return self._student_logs(result)

    def _student_logs(self, logs: dict[str, Any]) -> dict[str, Any]:
        """Logs without those of the teacher, which was not run."""
        unused = set(self._books.means if self._books else ()) - {"student_loss"}
        return {name: value for name, value in logs.items() if name not in unused}

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Tensor:
        """Compute the total loss of one batch and book its parts.

        Args:
            x: The batch.
            y: Labels.
            y_pred: What `call` returned.
            sample_weight: Weights, as Keras passes them.
            training: Whether the student is being trained.

        Returns:
            A scalar.
        """
        answered = isinstance(y_pred, Answer)
        output = y_pred.output if answered else y_pred
        size = ops.shape(keras.tree.flatten(x)[0])[0]
        # Keras's own container of losses has no public door but a total that
        # already includes the regularizers.
        hard = self._compile_loss(y, output, sample_weight) if self._compile_loss else None
        extra = [self._aggregate_additional_loss(loss) for loss in self.losses]
        if hard is not None:
            self._book("student_loss", hard, size)
        if not answered or not self.distills:
            return step.total(extra if hard is None else [hard, *extra])
        distillation = self._distill(x, y, y_pred, sample_weight, training, size)
        if self._setup.explicit:
            weights = (self.student_loss_weight, self.distillation_loss_weight)
            hard_weight, distillation_weight = (ops.convert_to_tensor(w) for w in weights)
        else:
            hard_weight = ops.convert_to_tensor(self.alpha)
            distillation_weight = 1.0 - hard_weight
        terms = [step.times(distillation_weight, distillation)]
        if hard is not None:
            terms.append(step.times(hard_weight, hard))
        total = step.total(terms + extra)
        # A batch that the teacher fails on gives no gradient at all.
        return ops.where(x.finite, total, ops.zeros_like(total))

    def _distill(
        self,
        batch: step.Batch,
        y: Any,
        student: Answer,
        sample_weight: Any,
        training: bool,
        size: Any,
    ) -> Tensor:
        """The weighted sum of the transfers."""
        setup = self._setup
        labels = checks.per_output(y, setup.student.template)
        weights = checks.per_output(sample_weight, setup.student.template)
        # NaN in the logs, but not in the gradient, says that the teacher failed.
        alarm = ops.where(batch.finite, 0.0, float("nan"))
        total: Any = 0.0
        values: dict[str, Any] = {}
        for placed in setup.placed:
            transfer, output = placed
            theirs, ours = self._sides(placed, batch.answer, student)
            value = transfer.call(
                theirs,
                ours,
                sample_weight=weights[output],
                labels=labels[output],
                indices=batch.indices,
                temperature=ops.convert_to_tensor(self.temperature),
                training=training,
            )
            values[transfer.name] = values.get(transfer.name, 0.0) + value
            total = total + step.times(ops.convert_to_tensor(transfer.weight), value)
        for name, value in values.items():
            self._book(name, ops.cast(value, "float32") + alarm, size)
        self._book("distillation_loss", ops.cast(total, "float32") + alarm, size)
        if self._books is not None:
            self._books.add_agreement(setup.match, batch.answer, student)
        return total

    def _book(self, name: str, value: Tensor, size: Tensor) -> None:
        # Keras divides losses by the number of replicas; a log shows the mean.
        replicas = 1
        if keras.config.backend() == "tensorflow":
            replicas = self.distribute_strategy.num_replicas_in_sync
        if self._books is not None:
            self._books.add(name, value * replicas, size)

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """Update the student's metrics on one batch and return all results."""
        output = y_pred.output if isinstance(y_pred, Answer) else y_pred
        return super().compute_metrics(x, y, output, sample_weight)

    # ---------------------------------------------------------------------- fit

    def fit(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        epochs: int = 1,
        verbose: Any = "auto",
        callbacks: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Train the student, as `keras.Model.fit` does.

        Args:
            x: Inputs: arrays, or a dataset that yields batches.
            y: Labels; none with `loss=None`.
            batch_size: Samples a step, for arrays.
            epochs: Index of the epoch at which training ends.
            verbose: As in `keras.Model.fit`.
            callbacks: Keras callbacks, those of `keras_kd.callbacks` among them.
            **kwargs: As in `keras.Model.fit`.

        Returns:
            The Keras `History`.

        Raises:
            ValueError: If inputs are not finite, labels do not fit the loss,
                the data are empty, or outputs hide their logits.
            FloatingPointError: If the teacher's outputs stop being finite.
        """
        setup = self._setup
        self._require_teacher()
        if not self.trainable_weights and self.student.built:
            raise ValueError(
                f"No weight of the student `{self.student.name}` is trainable. Set "
                "`student.trainable = True`, or give it layers that it does not share with the "
                "teacher."
            )
        if self.compiled:
            checks.training_data(x, y, self.loss, setup.student, self.metrics_need_labels)
            checks.more_data(kwargs, self.loss, setup.student)
            if setup.teacher is not None:
                x, y, batch_size, kwargs = setup.teacher.join_fit(x, y, batch_size, kwargs)
            rows, real, x = checks.first_rows(x, not self._settled)
            self._prepare(rows, real)
        observer = watch.Watch(setup.teacher)
        if isinstance(callbacks, keras.callbacks.CallbackList):
            observer.set_model(self)
            callbacks.callbacks.insert(0, observer)
        else:
            given = keras.tree.flatten(callbacks) if callbacks else []
            callbacks = [observer, *given]
        return super().fit(
            x=x,
            y=y,
            batch_size=batch_size,
            epochs=epochs,
            verbose=verbose,
            callbacks=callbacks,
            **kwargs,
        )

    @property
    def _settled(self) -> bool:
        """Whether shapes alone tell all there is to know of the models."""
        setup = self._setup
        teacher_known = setup.teacher is None or setup.teacher.settled
        return setup.student.settled and teacher_known

    def evaluate(self, x: Any = None, y: Any = None, **kwargs: Any) -> Any:
        """Evaluate the student, as `keras.Model.evaluate` does.

        Args:
            x: Inputs: arrays, or a dataset that yields batches.
            y: Labels.
            **kwargs: As in `keras.Model.evaluate`.

        Returns:
            The loss, or the logs with `return_dict=True`.
        """
        if self._setup.evaluate_distillation and not self._setup.prepared:
            self._require_teacher()
            rows, real, x = checks.first_rows(x, not self._settled)
            self._prepare(rows, real)
        return super().evaluate(x, y, **kwargs)

    def train_on_batch(self, x: Any, y: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Take one optimizer step, as `keras.Model.train_on_batch` does.

        Args:
            x: Inputs.
            y: Labels.
            *args: As in `keras.Model.train_on_batch`.
            **kwargs: As in `keras.Model.train_on_batch`.

        Returns:
            The loss, or the logs with `return_dict=True`.

        Raises:
            FloatingPointError: If the teacher's outputs are not finite.
        """
        self._require_teacher()
        if self.compiled and not self._setup.prepared:
            self._prepare(checks.first_rows(x, True)[0])
        result = super().train_on_batch(x, y, *args, **kwargs)
        if self.distills and self._books is not None:
            loss = self._books.means["distillation_loss"].result()
            if not checks.finite(loss) and checks.finite(self.student.trainable_variables):
                raise watch.teacher_failed(self._setup.teacher.name, "this batch")
        return result

    @property
    def distills(self) -> bool:
        """Whether anything is transferred from a teacher."""
        return self._setup.teacher is not None or bool(self._setup.placed)

    @property
    def live_values(self) -> dict[str, float]:
        """What callbacks are changing at the moment, by the name it has in the logs."""
        return self._setup.live_values

    @property
    def weighs_by_alpha(self) -> bool:
        """Whether `alpha` weighs the hard loss against the distillation loss."""
        setup = self._setup
        return self.distills and setup.labeled and not setup.explicit

    @property
    def metrics_need_labels(self) -> bool:
        """Whether `compile` was given metrics of the student."""
        return self._compile_metrics is not None

    @property
    def output_names(self) -> Any:
        """Names of the student's outputs, by which losses and metrics are keyed."""
        return getattr(self.student, "output_names", None)

    @property
    def metrics(self) -> list[Any]:
        """Total loss, its parts, and the student's metrics."""
        found = super().metrics
        books = list(self._books.means.values()) if self._books else []
        return [*found[:1], *books, *found[1:]]

    @property
    def trainable_variables(self) -> list[Any]:
        """Variables of student and projectors that no teacher owns."""
        return [v for v in super().trainable_variables if id(v) not in self._frozen]

    @property
    def non_trainable_variables(self) -> list[Any]:
        """All other variables."""
        found = super().non_trainable_variables
        if self._frozen:
            known = {id(v) for v in found}
            found = found + [
                v for v in self.variables if id(v) in self._frozen and id(v) not in known
            ]
        return found

    @property
    def trainable_weights(self) -> list[Any]:
        """Weights of student and projectors that no teacher owns."""
        return [v for v in super().trainable_weights if id(v) not in self._frozen]

    @property
    def trainable(self) -> bool:
        """Whether the student trains; layers shared with the teacher never follow it."""
        return keras.Model.trainable.fget(self)

    @trainable.setter
    def trainable(self, value: bool) -> None:
        kept = [(layer, layer.trainable) for layer in self._shared]
        keras.Model.trainable.fset(self, value)
        for layer, before in kept:
            layer.trainable = before

    # ------------------------------------------------------------------ summary

    def summary(
        self,
        line_length: int | None = None,
        positions: Any = None,
        print_fn: Callable[[str], Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Print the student's summary and a table of the transfers.

        Args:
            line_length: As in `keras.Model.summary`.
            positions: As in `keras.Model.summary`, for the student.
            print_fn: Called with the text. Defaults to `print`.
            **kwargs: As in `keras.Model.summary`, for the student.
        """
        self.student.summary(line_length, positions, print_fn, **kwargs)
        summaries.render(self.name, self.summary_of_transfers(), line_length, print_fn)

    def summary_of_transfers(self) -> list[dict[str, Any]]:
        """What is transferred: one row a transfer.

        Returns:
            Dicts with `name`, `loss`, `teacher`, `student`, `projector`,
            `weight`; `teacher_shape` and `student_shape`, `None` where only a
            batch tells; `projection`, what the projector does, in words; and
            `parameters`, how many numbers of projector and loss train beside
            the student, `None` before they are made.
        """
        maps_inputs = self.student_inputs is not None or self.teacher_inputs is not None
        return summaries.rows(self.transfers, summaries.seen_shapes(self._setup, maps_inputs))


def load_distiller(
    path: Any,
    teacher: Any = None,
    teacher_inputs: Callable[[Any], Any] | None = None,
    student_inputs: Callable[[Any], Any] | None = None,
    teacher_precision: str = "float32",
    custom_objects: dict[str, Any] | None = None,
) -> Distiller:
    """Load what `distiller.save(path)` wrote and give it its teacher back.

    Args:
        path: A `.keras` file.
        teacher: The teacher that was trained with, as for `Distiller`.
        teacher_inputs: As for `Distiller`; functions are not saved.
        student_inputs: As for `Distiller`.
        teacher_precision: As for `Distiller`.
        custom_objects: Classes of the student that are not registered, by name.

    Returns:
        A compiled distiller that goes on where it stopped: weights, optimizer,
        temperature and alpha.

    Raises:
        FileNotFoundError: If there is no file.
        ValueError: If the file holds no distiller, the teacher is another one
            than the saved, or an input function is missing.

    Example:
        >>> distiller.save("d.keras")
        >>> distiller = load_distiller("d.keras", teacher=teacher)
        >>> history = distiller.fit(x, y, epochs=20, initial_epoch=10)
    """
    checks.keras_file(path)
    loaded = keras.saving.load_model(path, custom_objects=custom_objects, safe_mode=True)
    if not isinstance(loaded, Distiller):
        raise ValueError(
            f"`{path}` holds a {type(loaded).__name__}, not a distiller. Load a student with "
            "`keras.saving.load_model`."
        )
    setup = loaded._setup
    for argument, given in (("teacher_inputs", teacher_inputs), ("student_inputs", student_inputs)):
        if setup.maps_inputs.get(argument) and given is None:
            raise ValueError(
                f"`{path}` was trained with `{argument}`, and functions are not saved. Pass the "
                f"same function as `{argument}=`."
            )
    made = teachers.make(teacher, setup.from_logits.get("teacher"), teacher_precision)
    if setup.loaded is not None:
        if made is None:
            raise ValueError(
                f"`{path}` was trained with the teacher `{setup.loaded['name']}`. Pass it as "
                "`teacher=`."
            )
        if made.fingerprint() != setup.loaded["fingerprint"]:
            raise ValueError(
                f"`{path}` was trained with the teacher `{setup.loaded['name']}`, whose weights "
                f"differ from those of the given `{made.name}`. Pass the same teacher, or begin a "
                "new distiller with `loaded.student`."
            )
    loaded.teacher_inputs = teacher_inputs
    loaded.student_inputs = student_inputs
    loaded._attach(made)
    if made is not None and loaded.compiled:
        loaded._adopt(setup.placed)
    return loaded


def _live(value: float, name: str) -> Any:
    """A scalar that callbacks may assign at any time, without retracing."""
    return keras.Variable(value, trainable=False, dtype="float32", autocast=False, name=name)


def _or_one(weight: float | None) -> float:
    return 1.0 if weight is None else weight


def _policy_of(student: Any) -> Any:
    """float16 anywhere in the student asks for a scaled loss."""
    for layer in student._flatten_layers():
        if layer.dtype_policy.name == "mixed_float16":
            return layer.dtype_policy
    return student.dtype_policy
