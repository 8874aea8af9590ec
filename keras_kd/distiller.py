"""One batch in, one optimizer step out: the hard loss, the teacher's, and the regularizers."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_kd import backends, checks, teachers
from keras_kd.losses.base import joint_mask
from keras_kd.losses.logits import BinarySoftTargets, SoftTargets
from keras_kd.masks import keras_mask, with_keras_mask
from keras_kd.taps import Answer, Reader, inference
from keras_kd.teachers import Teacher
from keras_kd.transfer import Transfer
from keras_kd.typing import Tensor
from keras_kd.watch import Watch


class Batch(NamedTuple):
    """What one step of the distiller reads: a pytree, so that any backend passes it on.

    Attributes:
        x: What the student reads.
        answer: What the teacher says of the batch.
        indices: `(batch,)` row numbers in the data, where they are known.
        finite: Whether the teacher's tensors are all finite, a boolean scalar.
    """

    x: Any
    answer: Answer
    indices: Any
    finite: Any


class _Placed(NamedTuple):
    """A transfer and the flat output that it reads where it names no layer."""

    transfer: Transfer
    output: int


class _Books:
    """The distiller's own metrics, kept where Keras does not track them twice."""

    def __init__(self, names: Sequence[str]) -> None:
        self.means = {name: keras.metrics.Mean(name=name) for name in names}

    def add(self, name: str, values: Tensor, weight: Tensor) -> None:
        self.means[name].update_state(ops.stop_gradient(values), sample_weight=weight)


@keras.saving.register_keras_serializable(package="keras_kd")
class Distiller(keras.Model):
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
    _books: "_Books | None" = None

    def __init__(
        self,
        student: Any,
        teacher: Any = None,
        *,
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
        # The student builds itself when it is first called.
        self.built = True
        self._attach(teachers.make(teacher, from_logits.get("teacher")))

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
        self._setup.frozen = theirs & {id(v) for v in self.student.variables}
        self._setup.shared = [
            layer
            for layer in self.student._flatten_layers()
            if layer.variables and all(id(v) in theirs for v in layer.variables)
        ]

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
                none of its own. Defaults to 2.
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
        if loss is None and teacher is None and not setup.loaded:
            raise ValueError(
                "There is nothing to minimize: the distiller has no teacher and `loss=None`. "
                "Pass a teacher, or a loss on the labels."
            )
        checks.weights(alpha, student_loss_weight, distillation_loss_weight, loss is not None)
        if temperature is not None:
            checks.temperature(temperature)
        checks.student_loss(loss, setup.student.kinds())
        explicit = student_loss_weight is not None or distillation_loss_weight is not None
        placed = setup.restored or []
        if teacher is not None:
            placed = self._place(distillation_loss, loss)
        names = [transfer.name for transfer in dict.fromkeys(p.transfer for p in placed)]
        checks.unique(names, "transfer")
        if teacher is not None:
            setup.student.reset(_paths(p.transfer.student for p in placed))
            teacher.reset(_paths(p.transfer.teacher for p in placed))
        # Nothing of the distiller changes before this line.
        setup.explicit = explicit
        setup.labeled = loss is not None
        setup.evaluate_distillation = evaluate_distillation
        setup.compiled_with = {
            "optimizer": optimizer,
            "loss": loss,
            "metrics": metrics,
            "distillation_loss": distillation_loss,
            "evaluate_distillation": evaluate_distillation,
            **kwargs,
        }
        # Clearing the tracked list in place makes Keras forget old projectors.
        self.transfers.clear()
        for transfer in dict.fromkeys(p.transfer for p in placed):
            self.transfers.append(transfer)
        setup.placed = placed
        if not placed:
            alpha, student_loss_weight = 1.0, 1.0 if student_loss_weight is None else None
        elif loss is None:
            alpha = 0.0
        self.temperature.assign(DEFAULT_TEMPERATURE if temperature is None else temperature)
        self.alpha.assign(DEFAULT_ALPHA if alpha is None else alpha)
        if explicit:
            self.student_loss_weight.assign(_or_one(student_loss_weight))
            self.distillation_loss_weight.assign(_or_one(distillation_loss_weight))
        books = ["student_loss"] if loss is not None else []
        if placed:
            books += ["distillation_loss", *names, "agreement"]
        self._books = _Books(books)
        # Keras keeps the loss and metrics of an earlier `compile` beside `None`.
        self.loss, self._compile_loss, self._compile_metrics = None, None, None
        super().compile(optimizer=optimizer, loss=loss, metrics=metrics, **kwargs)

    def _place(self, distillation_loss: Any, hard: Any) -> list[_Placed]:
        """Every transfer with the flat output it reads."""
        template = teachers.output_template(self.student)
        count = 1 if template is None else len(keras.tree.flatten(template))
        if distillation_loss is None:
            distillation_loss = self._default_loss(hard, count)
        shaped = template is not None and _shaped_like(distillation_loss, template)
        placed: list[_Placed] = []
        if shaped:
            for i, entry in enumerate(_aligned(distillation_loss, template)):
                for loss in entry if isinstance(entry, list | tuple) else [entry]:
                    if loss is not None:
                        placed.append(_Placed(_as_transfer(loss, i, count, template), i))
        elif isinstance(distillation_loss, dict):
            checks.known_keys(distillation_loss, _flat_names(template), "distillation_loss")
        else:
            entries = (
                list(distillation_loss)
                if isinstance(distillation_loss, list | tuple)
                else [distillation_loss]
            )
            for entry in entries:
                on_layers = isinstance(entry, Transfer) and None not in (
                    entry.teacher,
                    entry.student,
                )
                for i in range(1 if on_layers else count):
                    placed.append(_Placed(_as_transfer(entry, i, count, template), i))
        self._check_outputs(placed, count)
        return placed

    def _default_loss(self, hard: Any, count: int) -> Any:
        """`SoftTargets`, or `BinarySoftTargets` where the outputs are independent."""
        kinds, shapes = self._setup.student.kinds(), self._student_shapes()
        chosen = []
        for i in range(count):
            one_unit = shapes is not None and shapes[i][-1] == 1
            sigmoid = kinds[i if i < len(kinds) else 0] == "sigmoid"
            if one_unit and not sigmoid:
                checks.one_unit_is_binary(hard, self.student.name)
            chosen.append(BinarySoftTargets() if one_unit or sigmoid else SoftTargets())
        if count == 1:
            return chosen[0]
        return keras.tree.pack_sequence_as(teachers.output_template(self.student), chosen)

    def _student_shapes(self) -> list[Any] | None:
        outputs = getattr(self.student, "outputs", None)
        return [tuple(t.shape) for t in keras.tree.flatten(outputs)] if outputs else None

    def _check_outputs(self, placed: Sequence[_Placed], count: int) -> None:
        """Refuse outputs that cannot be compared, before any work starts."""
        setup = self._setup
        if setup.teacher is None:
            return
        theirs = setup.teacher.output_template()
        ours = teachers.output_template(self.student)
        setup.order = list(range(count))
        if theirs is not None and ours is not None:
            setup.order = checks.output_order(ours, theirs)
        binary = [False] * count
        shapes, teacher_shapes = self._student_shapes(), setup.teacher.output_shapes()
        student_kinds, teacher_kinds = setup.student.kinds(), setup.teacher.kinds
        for transfer, output in placed:
            if not transfer.reads_logits:
                continue
            is_binary = isinstance(transfer.loss, BinarySoftTargets)
            binary[output] = binary[output] or is_binary
            if transfer.student is None and shapes is not None:
                checks.logit_loss_fits(
                    transfer, is_binary, student_kinds[output], shapes[output], "student"
                )
            if transfer.teacher is None and teacher_shapes is not None:
                index = setup.order[output]
                checks.logit_loss_fits(
                    transfer, is_binary, teacher_kinds[index], teacher_shapes[index], "teacher"
                )
                if transfer.student is None and shapes is not None:
                    checks.same_classes(teacher_shapes[index], shapes[output])
        setup.binary = binary

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
        if isinstance(inputs, Batch):
            with inference(self._shared):
                return setup.student.read(inputs.x, bool(training), setup.binary)
        x, record = setup.teacher.split(inputs) if setup.teacher else (inputs, None)
        if not all(transfer.built for transfer in self.transfers):
            return self._build_transfers(x, record)
        with inference(self._shared):
            reading = setup.student.read(self._for_student(x), bool(training), setup.binary)
        return reading.output

    def _for_student(self, x: Any) -> Any:
        return self.student_inputs(x) if self.student_inputs is not None else x

    def _for_teacher(self, x: Any) -> Any:
        return self.teacher_inputs(x) if self.teacher_inputs is not None else x

    def _build_transfers(self, x: Any, record: Any) -> Any:
        """Make projectors for the shapes that one batch shows."""
        setup = self._setup
        student = setup.student.read(self._for_student(x), False, setup.binary)
        if setup.teacher is None:
            raise ValueError(_NO_TEACHER)
        answer = setup.teacher.read(self._for_teacher(x), record, setup.binary)
        for placed in setup.placed:
            self._sides(placed, answer, student)
        return student.output

    def _sides(self, placed: _Placed, teacher: Answer, student: Answer) -> tuple[Any, Any]:
        """What a transfer reads on either side; builds it for these shapes at first sight."""
        transfer, output = placed
        theirs = _pick(teacher, transfer.teacher, self._setup.order[output], transfer.reads_logits)
        ours = _pick(student, transfer.student, output, transfer.reads_logits)
        if not transfer.built:
            transfer.build(_shapes(theirs), _shapes(ours))
        return theirs, ours

    def _with_answer(self, data: Any, state: Sequence[Any] = ()) -> Any:
        """The batch with the teacher's answer, computed where no gradient is taken."""
        data, weights = backends.supplied(data)
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        setup = self._setup
        teacher = setup.teacher
        if teacher is None:
            if setup.placed:
                raise ValueError(_NO_TEACHER)
            answer, indices, finite = Answer(None, [], {}), None, None
        else:
            x, record = teacher.split(x)
            indices = record.get("indices") if isinstance(record, dict) else None
            values = list(zip(self._teacher_variables(), weights or ()))
            if state:
                # What the student shares with the teacher is in the state.
                values.extend(zip(self.non_trainable_variables, state[1]))
            with backends.inference_only(values):
                answer = teacher.read(self._for_teacher(x), record, setup.binary)
            answer, finite = _stopped(answer)
        return Batch(self._for_student(x), answer, indices, finite), y, sample_weight

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
        if self.train_function is not before and self._setup.placed:
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
        if self._setup.evaluate_distillation and self._setup.placed:
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
        extra = [ops.sum(ops.cast(loss, "float32")) for loss in self.losses]
        if hard is not None:
            self._book("student_loss", hard, size)
        if not answered or not self._setup.placed:
            terms = extra if hard is None else [hard, *extra]
            return _total(terms)
        distillation = self._distill(x, y, y_pred, sample_weight, training, size)
        if self._setup.explicit:
            weights = (self.student_loss_weight, self.distillation_loss_weight)
            hard_weight, distillation_weight = (ops.convert_to_tensor(w) for w in weights)
        else:
            hard_weight = ops.convert_to_tensor(self.alpha)
            distillation_weight = 1.0 - hard_weight
        terms = [distillation_weight * distillation]
        if hard is not None:
            terms.append(hard_weight * hard)
        return _total(terms + extra)

    def _distill(
        self, batch: Batch, y: Any, student: Answer, sample_weight: Any, training: bool, size: Any
    ) -> Tensor:
        """The weighted sum of the transfers."""
        setup = self._setup
        count = len(setup.order)
        labels, weights = _per_output(y, count), _per_output(sample_weight, count)
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
            total = total + ops.convert_to_tensor(transfer.weight) * value
        for name, value in values.items():
            self._book(name, value + alarm, size)
        self._book("distillation_loss", total + alarm, size)
        self._book_agreement(batch.answer, student)
        return total

    def _book(self, name: str, value: Tensor, size: Tensor) -> None:
        # Keras divides losses by the number of replicas; a log shows the mean.
        replicas = 1
        if keras.config.backend() == "tensorflow":
            replicas = self.distribute_strategy.num_replicas_in_sync
        if self._books is not None:
            self._books.add(name, value * replicas, size)

    def _book_agreement(self, teacher: Answer, student: Answer) -> None:
        """Top-1 agreement with the teacher over samples and valid positions."""
        for i, ours in enumerate(student.logits):
            if i >= len(self._setup.order) or self._setup.order[i] >= len(teacher.logits):
                continue
            theirs = teacher.logits[self._setup.order[i]]
            if len(theirs.shape) != len(ours.shape) or theirs.shape[-1] != ours.shape[-1]:
                continue
            mask = joint_mask(theirs, ours)
            if self._setup.binary[i]:
                same = ops.equal(ops.greater(ours, 0), ops.greater(theirs, 0))
                same = ops.mean(ops.cast(same, "float32"), axis=-1)
            else:
                same = ops.equal(ops.argmax(ours, axis=-1), ops.argmax(theirs, axis=-1))
            if self._books is not None:
                self._books.add("agreement", ops.cast(same, "float32"), mask)

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
        if setup.placed and setup.teacher is None:
            raise ValueError(_NO_TEACHER)
        if not self.trainable_weights and self.student.built:
            raise ValueError(
                f"No weight of the student `{self.student.name}` is trainable. Set "
                "`student.trainable = True`, or give it layers that it does not share with the "
                "teacher."
            )
        shapes = self._student_shapes()
        checks.training_data(x, y, self.loss, shapes, self.metrics_need_labels)
        self._inspect(x)
        watch = Watch()
        if isinstance(callbacks, keras.callbacks.CallbackList):
            watch.set_model(self)
            callbacks.callbacks.insert(0, watch)
        else:
            given = keras.tree.flatten(callbacks) if callbacks else []
            callbacks = [watch, *given]
        return super().fit(
            x=x,
            y=y,
            batch_size=batch_size,
            epochs=epochs,
            verbose=verbose,
            callbacks=callbacks,
            **kwargs,
        )

    def _inspect(self, x: Any) -> None:
        """Look at a few rows where the layers alone do not tell logits from probabilities."""
        setup = self._setup
        if setup.teacher is None or not any(p.transfer.reads_logits for p in setup.placed):
            return
        if "unknown" not in (*setup.student.kinds(), *setup.teacher.kinds):
            return
        batch = checks.first_batch(x)
        if batch is None:
            return
        batch, _ = setup.teacher.split(batch)
        setup.teacher.inspect(self._for_teacher(batch))
        setup.student.inspect(self._for_student(batch))
        self._check_outputs(setup.placed, len(setup.order))

    @property
    def distills(self) -> bool:
        """Whether anything is transferred from a teacher."""
        return bool(self._setup.placed)

    @property
    def live_values(self) -> dict[str, float]:
        """What callbacks are changing at the moment, by the name it has in the logs."""
        return self._setup.live_values

    @property
    def weighs_by_alpha(self) -> bool:
        """Whether `alpha` weighs the hard loss against the distillation loss."""
        setup = self._setup
        return bool(setup.placed) and setup.labeled and not setup.explicit

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

    # ------------------------------------------------------------------- saving

    def get_config(self) -> dict[str, Any]:
        """Return what rebuilds the distiller, without its teacher."""
        setup = self._setup
        teacher = setup.teacher
        record = setup.loaded
        if teacher is not None:
            record = {"name": teacher.name, "fingerprint": teacher.fingerprint()}
        return {
            "name": self.name,
            "student": keras.saving.serialize_keras_object(self.student),
            "teacher": record,
            "from_logits": dict(setup.from_logits),
            "maps_inputs": {
                "teacher_inputs": self.teacher_inputs is not None,
                "student_inputs": self.student_inputs is not None,
            },
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Distiller":
        """Rebuild a distiller that still lacks its teacher."""
        distiller = cls(
            keras.saving.deserialize_keras_object(config["student"]),
            from_logits=config["from_logits"],
            name=config["name"],
        )
        distiller._setup.loaded = config["teacher"]
        distiller._setup.maps_inputs = config["maps_inputs"]
        return distiller

    def get_compile_config(self) -> dict[str, Any] | None:
        """Return what `compile_from_config` needs, transfers with their shapes included."""
        if not self.compiled:
            return None
        setup = self._setup
        config = {
            name: keras.saving.serialize_keras_object(value)
            for name, value in setup.compiled_with.items()
            if name not in ("distillation_loss", "optimizer")
        }
        config["optimizer"] = keras.saving.serialize_keras_object(self.optimizer)
        config["transfers"] = [
            {
                "config": keras.saving.serialize_keras_object(transfer),
                "shapes": transfer.get_build_config(),
            }
            for transfer in self.transfers
        ]
        config["placed"] = [[self.transfers.index(p.transfer), p.output] for p in setup.placed]
        config["setup"] = {
            "explicit": setup.explicit,
            "order": setup.order,
            "binary": setup.binary,
        }
        return config

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compile with a saved configuration; live values come with the weights."""
        config = dict(config)
        saved, placed = config.pop("transfers"), config.pop("placed")
        setup_config = config.pop("setup")
        arguments = {
            name: keras.saving.deserialize_keras_object(value) for name, value in config.items()
        }
        transfers = []
        for entry in saved:
            transfer = keras.saving.deserialize_keras_object(entry["config"])
            if entry["shapes"] is not None and not transfer.built:
                transfer.build_from_config(entry["shapes"])
            transfers.append(transfer)
        setup = self._setup
        setup.restored = [_Placed(transfers[i], output) for i, output in placed]
        self.compile(**arguments)
        setup.restored = None
        setup.explicit = setup_config["explicit"]
        setup.order = setup_config["order"]
        setup.binary = setup_config["binary"]
        if self.student.built:
            # The optimizer's state is loaded into slots that must exist by then.
            self.optimizer.build(self.trainable_variables)

    def get_build_config(self) -> None:
        """Return nothing: student and transfers carry their own shapes."""
        return

    def summary_of_transfers(self) -> list[dict[str, Any]]:
        """What is transferred: one row a transfer.

        Returns:
            Dicts with `name`, `loss`, `teacher`, `student`, `projector`,
            `weight`.
        """
        return [
            {
                "name": transfer.name,
                "loss": type(transfer.loss).__name__,
                "teacher": transfer.teacher or "output",
                "student": transfer.student or "output",
                "projector": transfer.projector,
                "weight": float(ops.convert_to_numpy(transfer.weight)),
            }
            for transfer in self.transfers
        ]


DEFAULT_ALPHA = 0.5
DEFAULT_TEMPERATURE = 2.0

_NO_TEACHER = (
    "This distiller was loaded without its teacher. Load it with "
    "`keras_kd.load_distiller(path, teacher=teacher)` to go on training."
)


class _Setup:
    """What the distiller must hold without Keras tracking it."""

    def __init__(self, from_logits: dict[str, bool | None]) -> None:
        self.from_logits = from_logits
        self.teacher: Teacher | None = None
        self.student: Any = None
        self.placed: list[_Placed] = []
        self.restored: list[_Placed] | None = None
        self.order: list[int] = [0]
        self.binary: list[bool] = [False]
        self.explicit = False
        self.labeled = False
        self.evaluate_distillation = False
        self.compiled_with: dict[str, Any] = {}
        self.loaded: dict[str, Any] | None = None
        self.maps_inputs: dict[str, bool] = {}
        self.frozen: set[int] = set()
        self.shared: list[Any] = []
        self.live_values: dict[str, float] = {}


def load_distiller(
    path: Any,
    teacher: Any = None,
    teacher_inputs: Callable[[Any], Any] | None = None,
    student_inputs: Callable[[Any], Any] | None = None,
    custom_objects: dict[str, Any] | None = None,
) -> Distiller:
    """Load what `distiller.save(path)` wrote and give it its teacher back.

    Args:
        path: A `.keras` file.
        teacher: The teacher that was trained with, as for `Distiller`.
        teacher_inputs: As for `Distiller`; functions are not saved.
        student_inputs: As for `Distiller`.
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
    made = teachers.make(teacher, setup.from_logits.get("teacher"))
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
    if made is not None:
        setup.student.reset(_paths(p.transfer.student for p in setup.placed))
        made.reset(_paths(p.transfer.teacher for p in setup.placed))
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


def _paths(taps: Any) -> list[str]:
    paths: dict[str, None] = {}
    for tap in taps:
        for path in tap if isinstance(tap, list) else [tap]:
            if path is not None:
                paths[path] = None
    return list(paths)


def _pick(answer: Answer, taps: Any, output: int, logits: bool) -> Any:
    """What a transfer reads of one model's answer."""
    if taps is None:
        return (answer.logits if logits else keras.tree.flatten(answer.output))[output]
    if isinstance(taps, list):
        return [answer.tensors[path] for path in taps]
    return answer.tensors[taps]


def _shapes(tensors: Any) -> Any:
    if isinstance(tensors, list):
        return [_shapes(tensor) for tensor in tensors]
    return (None, *tensors.shape[1:])


def _total(terms: Sequence[Tensor]) -> Tensor:
    total: Any = ops.zeros(())
    for term in terms:
        total = total + ops.cast(term, "float32")
    return total


def _per_output(values: Any, count: int) -> list[Any]:
    """Labels or weights for each flat output; a single one serves all."""
    if values is None:
        return [None] * count
    flat = keras.tree.flatten(values)
    if len(flat) == count:
        return list(flat)
    return [flat[0]] * count if len(flat) == 1 else [None] * count


def _stopped(answer: Answer) -> tuple[Answer, Tensor]:
    """The answer without gradients, zeroed and flagged if anything in it is not finite."""
    read = (answer.logits, answer.tensors)
    finite: Any = ops.convert_to_tensor(True)
    for tensor in keras.tree.flatten(read):
        # One sum finds a NaN or infinity without a tensor of booleans.
        finite = ops.logical_and(finite, ops.isfinite(ops.sum(ops.cast(tensor, "float32"))))

    def clean(tensor: Any) -> Any:
        cleaned = ops.stop_gradient(ops.where(finite, tensor, ops.zeros_like(tensor)))
        return with_keras_mask(cleaned, keras_mask(tensor))

    logits, tensors = keras.tree.map_structure(clean, read)
    # The output beside its logits is read by losses between final outputs.
    output = keras.tree.map_structure(clean, answer.output)
    return Answer(output, logits, tensors), finite


def _shaped_like(losses: Any, template: Any) -> bool:
    """Whether losses are given output by output."""
    if not isinstance(template, list | tuple | dict):
        return False
    names = _flat_names(template)
    if isinstance(losses, dict):
        return set(losses) <= set(names)
    if not isinstance(losses, list | tuple) or len(losses) != len(names):
        return False
    return not any(isinstance(loss, Transfer) for loss in losses)


def _flat_names(template: Any) -> list[str]:
    return list(keras.tree.flatten(template)) if template is not None else []


def _aligned(losses: Any, template: Any) -> list[Any]:
    """One entry a flat output, in the order of the flat outputs."""
    if isinstance(losses, dict):
        if isinstance(template, dict):
            order = list(keras.tree.flatten({key: key for key in template}))
            return [losses.get(key) for key in order]
        return [losses.get(name) for name in _flat_names(template)]
    return list(losses)


def _as_transfer(loss: Any, output: int, count: int, template: Any) -> Transfer:
    if isinstance(loss, Transfer):
        return loss
    if count == 1:
        return Transfer(loss)
    name = getattr(loss, "name", None) or loss.__name__
    return Transfer(loss, name=f"{_flat_names(template)[output]}_{name}")
