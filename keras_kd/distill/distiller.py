"""One batch in, one optimizer step out: the hard loss, the teacher's, and the regularizers."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from keras_kd import backends, teachers
from keras_kd.distill import (
    agreement,
    hooks,
    label_checks,
    monitor,
    objective,
    pairing,
    row_numbers,
    settings,
    transfer_summary,
)
from keras_kd.distill import batch as step
from keras_kd.distill import batch_transform as transform
from keras_kd.distill import penalties as penalty_terms
from keras_kd.distill.diagnostics import Measured
from keras_kd.distill.preparation import Prepared
from keras_kd.distill.saving import Saved
from keras_kd.distill.shared_layers import Guarded
from keras_kd.losses import counts
from keras_kd.models import lora
from keras_kd.models.model_reader import Answer
from keras_kd.models.taps import inference
from keras_kd.transfers import compatibility, output_pairing
from keras_kd.transfers.output_pairing import Placed
from keras_kd.transfers.transfer import Transfer
from keras_kd.utils import checks
from keras_kd.utils.types import Tensor

DEFAULT_ALPHA = 0.5
# Higher ones cost very small students accuracy: see `benchmarks/defaults.py`.
DEFAULT_TEMPERATURE = 1.0


@keras.saving.register_keras_serializable(package="keras_kd")
class Distiller(Guarded, Prepared, Measured, Saved):
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
            that precision; `"auto"` times copies on the first batch and takes
            one only if it is faster and agrees. `fit` and `evaluate` copy
            weights that have changed again; `train_on_batch` does not look
            for changes, which would cost it time. Teachers whose inner layers
            are read run as they are given.
        teacher_inputs: `fn(x)`: what the teacher reads of one batch `x`.
            Defaults to the batch itself. It runs inside the compiled step, so
            it is made of `keras.ops`, Keras layers or backend functions.
        student_inputs: The same for the student.
        from_logits: Whether the models' outputs are logits. Defaults to
            `None`: a model that ends in a softmax or sigmoid is recognized and
            its logits are read from before it; where the layers do not tell,
            the first rows of the data show whether outputs look like
            probabilities, which are refused. `False` takes the logarithm of
            the outputs, for models that hide how they make probabilities. A
            dict `{"teacher": ..., "student": ...}` sets the sides apart.
        name: Name of the distiller.

    Raises:
        TypeError: If teacher or student is no Keras 3 model.
        ValueError: If the teacher is not built or is the student itself.

    Examples:
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
    _books: step.Books | None = None
    # Keras's own, made by `make_train_function` and `make_test_function`.
    train_function: Any
    test_function: Any
    jit_compile: Any

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
        checks.require_model(student, "student")
        super().__init__(
            name=name or f"{student.name}_distiller",
            dtype=_policy_of(student),
            autocast=False,
        )
        checks.logits_flags(from_logits)
        checks.functions(teacher_inputs=teacher_inputs, student_inputs=student_inputs)
        if not isinstance(from_logits, dict):
            from_logits = {"teacher": from_logits, "student": from_logits}
        checks.known_keys(from_logits, ("teacher", "student"), "from_logits")
        self.student = student
        self.transfers: list[Transfer] = []
        self.penalties: list[penalty_terms.PenaltyTerm] = []
        # The batch transform, if there is one, in a list that Keras tracks.
        self.batch_transforms: list[hooks.Held] = []
        setup = self._setup = pairing.Wiring(student, from_logits)
        setup.teacher_inputs, setup.student_inputs = teacher_inputs, student_inputs
        setup.teacher_precision = teacher_precision
        self.temperature = _live(DEFAULT_TEMPERATURE, "temperature")
        self.alpha = _live(DEFAULT_ALPHA, "alpha")
        # Beside `alpha` they multiply its two weights, and are 1 unless balanced.
        self.student_loss_weight = _live(1.0, "student_loss_weight")
        self.distillation_loss_weight = _live(1.0, "distillation_loss_weight")
        # Without it Keras warns of masks that end here, those of the teacher's answer too.
        self.supports_masking = True
        # Past Keras's tracking, since its variables are the student's.
        object.__setattr__(self, "updates", lora.Updates(student))
        # The student builds itself when it is first called.
        self.built = True
        setup.attach(teachers.make(teacher, from_logits.get("teacher"), teacher_precision))

    @property
    def teacher(self) -> Any:
        """The teacher: a `keras.Model`, an `Ensemble`, a `Teacher` or `None`."""
        teacher = self._setup.teacher
        return teacher.original if teacher is not None else None

    @property
    def teacher_precision(self) -> str:
        """The precision that the teacher was asked to run in."""
        return str(self._setup.teacher_precision)

    @property
    def teacher_inputs(self) -> Any:
        """What maps a batch to what the teacher reads, or `None`."""
        return self._setup.teacher_inputs

    @property
    def student_inputs(self) -> Any:
        """What maps a batch to what the student reads, or `None`."""
        return self._setup.student_inputs

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
        penalties: Sequence[Any] | None = None,
        batch_transform: Callable[[hooks.Batch, Any], hooks.Batch] | None = None,
        **kwargs: Any,
    ) -> None:
        """Configure the training.

        Args:
            optimizer: As in `keras.Model.compile`.
            loss: The hard loss between labels and the student's output, as in
                `keras.Model.compile`. `None` trains without labels.
            metrics: Metrics of the student, as in `keras.Model.compile`.
            distillation_loss: A loss of `keras_kd.losses`, a `Transfer`, a loss
                of Keras or its name, as `"mse"`, which compares what the models
                return; or a list of them that are summed. For several outputs,
                a list, tuple or dict of losses shaped like the outputs; outputs
                that a dict leaves out, or that have `None`, are not distilled
                and need no counterpart in the teacher. A single loss applies
                to each. Defaults to `SoftTargets()` where the hard loss of the
                output is one between exclusive classes, and to
                `BinarySoftTargets()` where it is one of independent classes;
                where it tells neither, a softmax or sigmoid at the end does. They
                are reduced as the hard loss is, by `"sum"` too.
                Without any hard loss, `SoftTargets()` for several linear units.
                Regressions, and outputs of which nothing tells what they mean,
                are refused: name their loss, as `LogitMSE()`.
            alpha: Weight of the hard loss in `[0, 1]`; the distillation loss
                has `1 - alpha`. Defaults to 0.5.
            temperature: Positive float, dimensionless, for every loss that has
                none of its own. Defaults to 1.
            student_loss_weight: Non-negative float. With
                `distillation_loss_weight` in place of `alpha`; one that is left
                out is 1.
            distillation_loss_weight: Non-negative float.
            evaluate_distillation: Whether `evaluate` also runs the teacher and
                reports the distillation loss and the agreement. Without it
                and with `loss=None` nothing is computed that could be a loss,
                and `evaluate` and `val_...` logs hold the metrics alone.
            penalties: Terms of the objective of your own, each a `keras_kd.Penalty`
                or anything with a `name`, a `weight` and a
                `__call__(distiller, batch)` that returns a scalar or one value per
                sample. Their weighted sum is added to the rest; `alpha` does not
                touch it. They are logged by name.
            batch_transform: `fn(batch, distiller)`: from one `keras_kd.Batch` to
                what is trained on in its place, by student and teacher alike. It
                runs in the compiled training step, before the forward pass, and
                may run `distiller.student` and `distiller.teacher`; evaluation is
                left alone. The batch may grow. Beside a `CachedTeacher` the inputs
                must stay as they are, since its answers are those to them.
            **kwargs: `loss_weights`, `weighted_metrics`, `run_eagerly`,
                `steps_per_execution`, `jit_compile`, `auto_scale_loss`, as in
                `keras.Model.compile`.

        Raises:
            ValueError: If a value is out of range, `alpha` is given beside an
                explicit weight, there is no loss at all, nothing tells which
                distillation loss an output needs, a layer is not found, the
                outputs do not fit together, a projector or a loss with
                layers is another distiller's, or two logs would have one name.
            TypeError: If a penalty or the batch transform is nothing that can be
                called as one.
        """
        setup = self._setup
        checks.weights(alpha, student_loss_weight, distillation_loss_weight, loss is not None)
        if temperature is not None:
            checks.temperature(temperature)
        compatibility.student_loss(loss, setup.student)
        transform.require(batch_transform)
        compiled_with = {
            "loss": loss,
            "metrics": metrics,
            "distillation_loss": distillation_loss,
            "evaluate_distillation": evaluate_distillation,
            "penalties": penalty_terms.require(penalties, metrics),
            "batch_transform": batch_transform,
            **kwargs,
        }
        explicit = student_loss_weight is not None or distillation_loss_weight is not None
        others = self._known_variables()
        made = penalty_terms.terms(self, compiled_with["penalties"], others)
        changing = transform.held(batch_transform, others, self.student)
        # Nothing changes unless this succeeds.
        placed = setup.compile(compiled_with, explicit)
        self._books = None
        self._hold(made, changing, others)
        self.adopt(placed)
        if not self.distills:
            alpha, student_loss_weight = 1.0, None
        elif loss is None:
            alpha = 0.0
        self.temperature.assign(DEFAULT_TEMPERATURE if temperature is None else temperature)
        self.alpha.assign(DEFAULT_ALPHA if alpha is None else alpha)
        self.student_loss_weight.assign(_or_one(student_loss_weight))
        self.distillation_loss_weight.assign(_or_one(distillation_loss_weight))
        # Keras keeps the loss and metrics of an earlier `compile` beside `None`.
        self.loss, self._compile_loss, self._compile_metrics = None, None, None
        super().compile(optimizer=optimizer, loss=loss, metrics=metrics, **kwargs)

    def _known_variables(self) -> set[int]:
        """Identities of the variables of the distiller and the teacher, but for those of hooks."""
        setup = self._setup
        known = {id(v) for v in self.variables} - setup.held
        models = setup.teacher.models if setup.teacher is not None else []
        return known | {id(v) for model in models for v in model.variables}

    def _hold(
        self,
        terms: list[penalty_terms.PenaltyTerm],
        transforms: list[hooks.Held],
        others: set[int],
    ) -> None:
        """Take these hooks, in place of those of an earlier `compile`."""
        # As for the transfers in `adopt`, Keras forgets what is cleared in place.
        self.penalties.clear()
        self.batch_transforms.clear()
        self.penalties.extend(terms)
        self.batch_transforms.extend(transforms)
        held = [*self.penalties, *self.batch_transforms]
        self._setup.held = {id(v) for hook in held for v in hook.variables} - others

    def adopt(self, placed: list[Placed]) -> None:
        """Transfer this from now on: `compile` and `load_distiller` call it.

        Args:
            placed: Transfers with the outputs that they read.
        """
        output_pairing.require_names(placed, self.penalties)
        self._setup.adopt(placed)
        teacher = self._setup.teacher
        if teacher is not None and not teacher.compiled and not backends.host_calls_in_jit():
            # XLA on TensorFlow cannot call the host; Keras tells who asked for it.
            self.supports_jit = False
            if self.compiled and self.jit_compile:
                self.jit_compile = False
        # Clearing the tracked list in place makes Keras forget old projectors.
        self.transfers.clear()
        for transfer in output_pairing.transfers(placed):
            self.transfers.append(transfer)
        # A step that was traced before writes into the metrics of that time.
        names = [*self._setup.books(), *(term.name for term in self.penalties)]
        self._books = step.Books(names, self._books.means if self._books else {})

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
        x = inputs.x if whole else setup.for_student(setup.split(inputs)[0])
        with inference(self._shared):
            if not whole:
                return setup.student.run(x, bool(training))
            return setup.student.read(x, bool(training), setup.match.units)

    def compute_mask(self, inputs: Any, previous_mask: Any) -> None:
        """Return nothing: the student's outputs carry their masks."""
        return

    def _with_answer(self, data: Any, state: Sequence[Any] = ()) -> Any:
        """The batch with the teacher's answer, labels and weights."""
        data, weights = backends.supplied(data)
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        values = list(zip(self._setup.teacher_variables(), weights or ()))
        if state:
            # What the student shares with the teacher is in the state.
            values.extend(zip(self.non_trainable_variables, state[1]))
        return self._setup.answered(x, values), y, sample_weight

    def _transformed(self, data: Any, state: Sequence[Any]) -> Any:
        """The batch behind the batch transform, and the state with what that keeps."""
        for held in self.batch_transforms:
            data, state = transform.transformed(self, held.it, data, state)
        return data, state

    def make_train_function(self, force: bool = False) -> Any:
        """Compile the train step, as `keras.Model` does."""
        before = self.train_function
        super().make_train_function(force or self._setup.changed("train"))
        if self.train_function is not before and self._setup.teacher is not None:
            self.train_function = backends.supplying(
                self.train_function, self._setup.teacher_variables
            )

    def make_test_function(self, force: bool = False) -> Any:
        """Compile the test step, as `keras.Model` does."""
        before = self.test_function
        super().make_test_function(force or self._setup.changed("test"))
        if self.test_function is not before and self._setup.evaluate_distillation:
            self.test_function = backends.supplying(
                self.test_function, self._setup.teacher_variables
            )

    def train_step(self, *args: Any) -> Any:
        """Take one optimizer step on one batch.

        Args:
            *args: The batch; on the JAX backend the state before it.

        Returns:
            The logs; on the JAX backend the logs and the new state.
        """
        *state, data = args
        data, state = self._transformed(data, state)
        with penalty_terms.teacher_at_hand(self, data):
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
            given = keras.utils.unpack_x_y_sample_weight(backends.supplied(data)[0])[0]
            row_numbers.require(self._setup.split(given)[1], self.transfers)
            with penalty_terms.teacher_at_hand(self, data):
                return super().test_step(*state, self._with_answer(data, *state))
        result = super().test_step(*args)
        if isinstance(result, tuple):
            logs, *state = result
            return (self._student_logs(logs), *state)
        return self._student_logs(result)

    def _student_logs(self, logs: dict[str, Any]) -> dict[str, Any]:
        """Logs without those of the teacher, which was not run."""
        unused = set(self._books.means if self._books else ()) - {"student_loss"}
        kept = {name: value for name, value in logs.items() if name not in unused}
        # A compiled step of TensorFlow cannot return nothing.
        return self._without_empty_loss(kept) or kept

    def _without_empty_loss(self, logs: dict[str, Any]) -> dict[str, Any]:
        """Evaluation's logs without a loss that nothing was added to.

        What is left of it, 0 or the regularizers, says nothing of the student, and
        callbacks would act on it.
        """
        if self._compile_loss is not None or self._setup.evaluate_distillation:
            return logs
        return {name: value for name, value in logs.items() if name != "loss"}

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
        hard: Tensor = None
        labeled: list[Any] = []
        if self._compile_loss:
            theirs = []
            if answered:
                pairs = step.paired(self._setup.match, x.answer, y_pred)
                theirs = [tensor for tensor, _ in pairs]
            hard, after, labeled = step.hard_loss(
                self._compile_loss, y, output, sample_weight, self.loss, theirs
            )
            if answered:
                y_pred = step.read_on(y_pred, output, after)
        extra = [self._aggregate_additional_loss(loss) for loss in self.losses]
        if hard is not None:
            self._book("student_loss", hard, size)
        counted: list[counts.Counted] = []
        if answered and (self.distills or self.penalties):
            counted = self._setup.counted(x, y_pred, sample_weight, labeled)
        if answered and self.penalties:
            batch = hooks.Batch(*map(hooks.tensors, (x.x, y, sample_weight)))
            for term, value in penalty_terms.values(self, batch, counted):
                self._book(term.name, value, size)
                extra.append(step.times(ops.convert_to_tensor(term.weight), value))
        if not answered or not self.distills:
            return step.total(extra if hard is None else [hard, *extra])
        values, distillation = objective.distillation(
            self._setup, x, y, y_pred, counted, self.temperature, training
        )
        # NaN in the logs, but not in the gradient, says that the teacher failed.
        for name, value in {**values, "distillation_loss": distillation}.items():
            self._book(name, step.or_nan(value, x.finite), size)
        if self._books is not None:
            agreement.book(self._books, self._setup.match, x.answer, y_pred, counted)
        hard_weight, distillation_weight = self._weights()
        terms = [step.times(distillation_weight, distillation)]
        if hard is not None:
            terms.append(step.times(hard_weight, hard))
        total = step.total(terms + extra)
        # A batch that the teacher fails on gives no gradient at all.
        return ops.where(x.finite, total, ops.zeros_like(total))

    def _weights(self) -> tuple[Tensor, Tensor]:
        """What the hard loss and the distillation loss are multiplied by."""
        hard = ops.convert_to_tensor(self.student_loss_weight)
        distillation = ops.convert_to_tensor(self.distillation_loss_weight)
        if self._setup.explicit:
            return hard, distillation
        alpha = ops.convert_to_tensor(self.alpha)
        return alpha * hard, (1.0 - alpha) * distillation

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
        setup.require_teacher()
        setup.refresh()
        if not self.trainable_weights and self.student.built:
            raise ValueError(
                f"No weight of the student `{self.student.name}` is trainable. Set "
                "`student.trainable = True`, or give it layers that it does not share with the "
                "teacher."
            )
        setup.arrays = None
        setup.trains_on = functools.partial(settings.of_data, x, y, batch_size, dict(kwargs))
        if self.compiled:
            x, y, batch_size, kwargs = self._for_fit(x, y, batch_size, kwargs)
        observer = monitor.Watch(setup.teacher)
        if isinstance(callbacks, keras.callbacks.CallbackList):
            observer.set_model(self)
            callbacks.callbacks.insert(0, observer)
        else:
            given = keras.tree.flatten(callbacks) if callbacks else []
            callbacks = [observer, *given]
        try:
            with label_checks.explaining():
                return super().fit(
                    x=x,
                    y=y,
                    batch_size=batch_size,
                    epochs=epochs,
                    verbose=verbose,
                    callbacks=callbacks,
                    **kwargs,
                )
        finally:
            setup.arrays, setup.trains_on = None, None

    def evaluate(
        self, x: Any = None, y: Any = None, batch_size: int | None = None, **kwargs: Any
    ) -> Any:
        """Evaluate the student, as `keras.Model.evaluate` does.

        With `loss=None` there is no `loss` among the results, unless `compile`
        was given `evaluate_distillation=True`: then it is the distillation loss.
        A `CachedTeacher` can be asked about the arrays that it was written from, and
        about datasets that are joined.

        Args:
            x: Inputs: arrays, or a dataset that yields batches.
            y: Labels.
            batch_size: Samples a step, for arrays.
            **kwargs: As in `keras.Model.evaluate`.

        Returns:
            The loss and metrics, where there are any, or the logs with
            `return_dict=True`.
        """
        if self.compiled and not kwargs.get("_use_cached_eval_dataset"):
            # Keras asks so in every epoch of `fit`, which has looked at these data.
            x = self._for_evaluation(x, y, kwargs.get("sample_weight"))
        with label_checks.explaining():
            results = self._evaluate(x, y, batch_size, kwargs)
        failure = self._setup.teacher.failure() if self._setup.teacher is not None else None
        if failure is not None:
            raise failure
        return results

    def _evaluate(self, x: Any, y: Any, batch_size: int | None, kwargs: dict[str, Any]) -> Any:
        if self._setup.evaluate_distillation:
            self._setup.refresh()
            x, y, weight, batch_size = self._asked(
                x, y, kwargs.pop("sample_weight", None), batch_size
            )
            kwargs["sample_weight"] = weight
            if not self._setup.prepared:
                self._setup.require_teacher()
                rows, real, x = checks.first_rows(x, not self._setup.settled)
                self._prepare(rows, real)
        if self._compile_loss is not None or self._setup.evaluate_distillation:
            return super().evaluate(x, y, batch_size, **kwargs)
        as_dict = kwargs.pop("return_dict", False)
        logs = self._without_empty_loss(
            super().evaluate(x, y, batch_size, return_dict=True, **kwargs)
        )
        values = list(logs.values())
        return logs if as_dict else values[0] if len(values) == 1 else values

    @property
    def live_values(self) -> dict[str, float]:
        """What callbacks are changing at the moment, by the name it has in the logs."""
        return self._setup.live_values

    def trains_on(self) -> dict[str, Any]:
        """What `fit` was given, in plain values by name; nothing where it does not run."""
        return self._setup.trains_on() if self._setup.trains_on is not None else {}

    @property
    def weighs_by_alpha(self) -> bool:
        """Whether `alpha` weighs the hard loss against the distillation loss."""
        setup = self._setup
        return self.distills and setup.labeled and not setup.explicit

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
        transfer_summary.render(self.name, self.summary_of_transfers(), line_length, print_fn)

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
        return transfer_summary.rows(
            self.transfers, transfer_summary.seen_shapes(self._setup, maps_inputs)
        )


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
