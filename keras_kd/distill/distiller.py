"""One batch in, one optimizer step out: what Keras asks of a model, handed to who knows it.

`Distiller` owns the student, the live values and the transfers, which Keras tracks, and holds four
plain objects that know the rest: the `Pairing` of the models, the `Objective`, the `Preparation` of
the data and the `TrainingMetrics`. A new term of the objective is one more entry of its list, in
`_make_objective`; a new argument of `compile` is checked before anything changes and noted in
`Compiled`.
"""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any, Self, Unpack

import keras

from keras_kd import backends
from keras_kd.distill import (
    batch_transform,
    diagnostics,
    hooks,
    label_checks,
    monitor,
    objective,
    pairing,
    row_numbers,
    saving,
    training_metrics,
    transfer_summary,
)
from keras_kd.distill import penalties as penalty_terms
from keras_kd.distill.compiled import DEFAULT_ALPHA, DEFAULT_TEMPERATURE, Compiled, Weights, live
from keras_kd.distill.given import Given
from keras_kd.distill.preparation import Preparation
from keras_kd.distill.shared_layers import Shared, SharedLayersModel
from keras_kd.models import lora
from keras_kd.teachers.base import TeacherLike
from keras_kd.transfers import compatibility, output_pairing
from keras_kd.transfers.transfer import Transfer
from keras_kd.utils import checks
from keras_kd.utils.types import Array, CompileOptions, Data, Losses, PathLike, Tensor, Tensors

if TYPE_CHECKING:
    from keras_kd.distill.method_choice import MethodChoice


@keras.saving.register_keras_serializable(package="keras_kd")
class Distiller(SharedLayersModel):
    """Trains a student to do the task and to answer like its teacher.

    Each step minimizes `alpha * hard + (1 - alpha) * distillation + regularizers`: the student's
    loss on the labels, the weighted sum of the transfers from the teacher, and what the student's
    layers add (`add_loss`, weight regularizers). It costs one forward and backward pass of the
    student and one forward pass of the teacher, with `training=False`; no gradient of the teacher
    is ever taken.

    The teacher stays as it was given: weights, BatchNorm statistics and `trainable` alike. A layer
    that the student shares with it is not trained and runs in inference mode. `predict`,
    `evaluate` and calling the distiller use the student alone.

    Args:
        student: The `keras.Model` that is trained.
        teacher: A built `keras.Model`, a list of them (an `Ensemble` with equal weights), a
            `keras_kd.teachers.Teacher`, or `None` to train on the labels alone.
        teacher_precision: `"float32"` runs the teacher as it is given, which is the default, since
            its answers are then exact. `"bfloat16"` and `"float16"` run a private copy with
            BatchNormalization folded, in that precision; `"auto"` times copies on the first batch
            and takes one only if it is faster and agrees. `fit` and `evaluate` copy weights that
            have changed again; `train_on_batch` does not look for changes, which would cost it
            time. Teachers whose inner layers are read run as they are given.
        teacher_inputs: `fn(x)`: what the teacher reads of one batch `x`. Defaults to the batch
            itself. It runs inside the compiled step, so it is made of `keras.ops`, Keras layers or
            backend functions.
        student_inputs: The same for the student.
        teacher_answers: `"auto"`: `fit` from arrays with two or more epochs asks the teacher once
            about each row and keeps the answers in memory, where they fit a tenth of what is free,
            `teacher_inputs` makes the same of a row every time, and there is no `batch_transform`;
            a teacher whose weights change is asked again. `"live"` asks in every step, `"memory"`
            raises where answers cannot be kept. The losses are the same.
        from_logits: Whether the models' outputs are logits. Defaults to `None`: a model that ends
            in a softmax or sigmoid is recognized and its logits are read from before it; where the
            layers do not tell, the first rows of the data show whether outputs look like
            probabilities, which are refused. `False` takes the logarithm of the outputs, for models
            that hide how they make probabilities. A dict of `"teacher"` and `"student"` tells both.
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

    chooses_method = False
    """Whether the next `fit` begins with choosing the method."""
    method_choice: "MethodChoice | None" = None
    """What `compile(distillation_loss="auto")` found, once `fit` has chosen."""
    # Read by properties while Keras is still constructing the model.
    _metrics_of_terms = training_metrics.TrainingMetrics()
    # Keras's own, made by `make_train_function` and `make_test_function`.
    train_function: Any
    test_function: Any

    def __init__(
        self,
        student: keras.Model,
        teacher: TeacherLike = None,
        *,
        teacher_precision: str = "float32",
        teacher_inputs: Callable[[Any], Any] | None = None,
        student_inputs: Callable[[Any], Any] | None = None,
        teacher_answers: str = "auto",
        from_logits: bool | dict[str, bool | None] | None = None,
        name: str | None = None,
    ) -> None:
        checks.require_model(student, "student")
        super().__init__(
            name=name or f"{student.name}_distiller",
            dtype=pairing.policy_of(student),
            autocast=False,
        )
        flags = checks.logits_flags(from_logits)
        checks.functions(teacher_inputs=teacher_inputs, student_inputs=student_inputs)
        self.student = student
        self.transfers: list[Transfer] = []
        self.penalties: list[penalty_terms.PenaltyTerm] = []
        # The batch transform, if there is one, in a list that Keras tracks.
        self.batch_transforms: list[hooks.Held] = []
        self.shared = Shared()
        self._pairing = pairing.Pairing(student, self.shared, flags)
        self._preparation = Preparation(self._pairing, teacher_answers, self.name)
        self._metrics_of_terms = training_metrics.TrainingMetrics()
        self._objective = objective.Objective([])
        self._origin = saving.Origin()
        self.temperature = live(DEFAULT_TEMPERATURE, "temperature")
        self.alpha = live(DEFAULT_ALPHA, "alpha")
        # Beside `alpha` they multiply its two weights, and are 1 unless balanced.
        self.student_loss_weight = live(1.0, "student_loss_weight")
        self.distillation_loss_weight = live(1.0, "distillation_loss_weight")
        # Without it Keras warns of masks that end here, those of the teacher's answer too.
        self.supports_masking = True
        # Past Keras's tracking, since its variables are the student's.
        object.__setattr__(self, "updates", lora.Updates(student))
        # The student builds itself when it is first called.
        self.built = True
        self._pairing.complete(teacher, teacher_inputs, student_inputs, teacher_precision)

    @property
    def teacher(self) -> Any:
        """The teacher: a `keras.Model`, an `Ensemble`, a `Teacher` or `None`."""
        teacher = self._pairing.teacher
        return teacher.original if teacher is not None else None

    @property
    def pairing(self) -> pairing.Pairing:
        """The models and how they meet, for what is built on the distiller."""
        return self._pairing

    @property
    def teacher_precision(self) -> str:
        """The precision that the teacher was asked to run in."""
        return str(self._pairing.teacher_precision)

    @property
    def teacher_inputs(self) -> Any:
        """What maps a batch to what the teacher reads, or `None`."""
        return self._pairing.teacher_inputs

    @property
    def student_inputs(self) -> Any:
        """What maps a batch to what the student reads, or `None`."""
        return self._pairing.student_inputs

    @property
    def distills(self) -> bool:
        """Whether anything is transferred from a teacher."""
        return self._pairing.distills

    @property
    def metrics_need_labels(self) -> bool:
        """Whether `compile` was given metrics of the student."""
        return self._compile_metrics is not None

    @property
    def weighs_by_alpha(self) -> bool:
        """Whether `alpha` weighs the hard loss against the distillation loss."""
        compiled = self._pairing.compiled
        return self.distills and compiled.labeled and not compiled.explicit

    @property
    def live_values(self) -> dict[str, float]:
        """What callbacks are changing at the moment, by the name it has in the logs."""
        return self._metrics_of_terms.live_values

    @property
    def output_names(self) -> Any:
        """Names of the student's outputs, by which losses and metrics are keyed."""
        return getattr(self.student, "output_names", None)

    @property
    def metrics(self) -> list[Any]:
        """Total loss, its parts, and the student's metrics."""
        found = super().metrics
        return [*found[:1], *self._metrics_of_terms.listed(), *found[1:]]

    # ------------------------------------------------------------------ compile

    def compile(
        self,
        optimizer: str | keras.optimizers.Optimizer = "adam",
        loss: Losses = None,
        *,
        metrics: Sequence[object] | Mapping[str, object] | None = None,
        distillation_loss: object = None,
        alpha: float | None = None,
        temperature: float | None = None,
        student_loss_weight: float | None = None,
        distillation_loss_weight: float | None = None,
        evaluate_distillation: bool = False,
        penalties: Sequence[Any] | None = None,
        batch_transform: Callable[[hooks.Batch, Any], hooks.Batch] | None = None,
        adversary: hooks.Adversary | None = None,
        **kwargs: Unpack[CompileOptions],
    ) -> None:
        """Configure the training.

        Args:
            optimizer: As in `keras.Model.compile`.
            loss: The hard loss between labels and the student's output, as in
                `keras.Model.compile`. `None` trains without labels.
            metrics: Metrics of the student, as in `keras.Model.compile`.
            distillation_loss: A loss of `keras_kd.losses`, a `Transfer`, a loss of Keras or its
                name, as `"mse"`, which compares what the models return; or a list of them that are
                summed. For several outputs, a list, tuple or dict of losses shaped like the
                outputs; those that have `None`, or none at all, are not distilled and need no
                counterpart in the teacher. A single loss applies to each. Defaults to
                `SoftTargets()` where the hard loss of the output is one between exclusive classes,
                and to `BinarySoftTargets()` for one of independent classes; where it tells neither,
                a softmax or sigmoid at the end does. They are reduced as the hard loss is, by
                `"sum"` too. Without any hard loss, `SoftTargets()` for several linear units.
                Regressions, and outputs of which nothing tells what they mean, are refused: name
                their loss, as `LogitMSE()`. `"auto"` tries several methods on tenths of the
                labeled rows at the start of the first `fit`, plain training among them, and takes
                the one that is better beyond chance: see `keras_kd.search.best_method`;
                `method_choice` then holds what it found.
            alpha: Weight of the hard loss in `[0, 1]`; the distillation loss has `1 - alpha`.
                Defaults to 0.5.
            temperature: Positive float, dimensionless, for every loss that has none of its own.
                Defaults to 1.
            student_loss_weight: Non-negative float. With `distillation_loss_weight` in place of
                `alpha`; one that is left out is 1.
            distillation_loss_weight: Non-negative float.
            evaluate_distillation: Whether `evaluate` also runs the teacher and reports the
                distillation loss and the agreement. Without it and with `loss=None` nothing is
                computed that could be a loss, and `evaluate` and `val_...` logs hold the metrics
                alone.
            penalties: Terms of the objective of your own, each a `keras_kd.Penalty` or anything
                with a `name`, a `weight` and a `__call__(distiller, batch)` that returns a scalar
                or one value per sample. Their weighted sum is added to the rest; `alpha` does not
                touch it. They are logged by name.
            batch_transform: `fn(batch, distiller)`: from one `keras_kd.Batch` to what is trained on
                in its place, by student and teacher alike. It runs in the compiled training step,
                before the forward pass, and may run `distiller.student` and `distiller.teacher`;
                evaluation is left alone. The batch may grow. Beside a `CachedTeacher` the inputs
                must stay as they are, since its answers are those to them.
            adversary: What attacks the inputs while the student trains, one of `keras_kd.robust`:
                `PGDTraining`, `TRADES`, `ARD`, `RSLAD`, `IAD` or `AdaAD`. It adds its penalty or
                its batch transform to yours, and sets the weights of its method.
            **kwargs: `loss_weights`, `weighted_metrics`, `run_eagerly`, `steps_per_execution`,
                `jit_compile`, `auto_scale_loss`, as in `keras.Model.compile`.
                `steps_per_execution="auto"` takes as many short steps at once as last a quarter of
                a second, at most an epoch, and says how often callbacks of single batches run.

        Raises:
            ValueError: If a value is out of range, `alpha` is given beside an explicit weight,
                there is no loss at all, nothing tells which distillation loss an output needs, a
                layer is not found, the outputs do not fit together, a projector or a loss with
                layers is another distiller's, or two logs would have one name.
            TypeError: If a penalty or the batch transform cannot be called as one.
        """
        weights = Weights(alpha, temperature, student_loss_weight, distillation_loss_weight)
        hooked = penalties, batch_transform
        given = Given(loss, metrics, distillation_loss, weights, evaluate_distillation, *hooked)
        chooses, given = given.against(adversary, self).for_now()
        given.weights.check(loss is not None)
        self._plan(given.compiled({**kwargs}))
        given.weights.assign(self, loss is not None)
        for_keras = self._preparation.steps.given({**kwargs})
        self._compile_for_keras(optimizer=optimizer, loss=loss, metrics=metrics, **for_keras)
        self.chooses_method, self.method_choice = chooses, None

    def _compile_for_keras(self, **arguments: object) -> None:
        """Have Keras make its part, and list the terms of the objective by that."""
        # Keras keeps the loss and metrics of an earlier `compile` beside `None`.
        self.loss, self._compile_loss, self._compile_metrics = None, None, None
        super().compile(**arguments)
        self._preparation.host_calls.settle(self, arguments.get("jit_compile"))
        # Its container of losses has no public door but a total with the regularizers.
        more = [penalty_terms.OfPenalty(term, self) for term in self.penalties]
        self._objective = objective.of_distiller(self, self._pairing, self._compile_loss, more)

    def _plan(self, compiled: Compiled) -> None:
        """Find what is transferred and take the hooks; nothing changes unless all of it fits."""
        compatibility.student_loss(compiled.loss, self._pairing.student)
        others = self._pairing.variables_beside(self)
        terms = penalty_terms.terms(self, compiled.arguments["penalties"], others)
        changing = batch_transform.held(compiled.arguments["batch_transform"], others, self.student)
        placed = self._pairing.compile(compiled, self._origin.name)
        self._metrics_of_terms.clear()
        for kept, now in ((self.penalties, terms), (self.batch_transforms, changing)):
            # As for the transfers in `adopt`, Keras forgets what is cleared in place.
            kept.clear()
            kept.extend(now)
        held = [*terms, *changing]
        self.shared.of_hooks = {id(v) for hook in held for v in hook.variables} - others
        self.adopt(placed)

    def adopt(self, placed: list[output_pairing.Placed]) -> None:
        """Transfer this from now on: `compile` and `take_teacher` call it."""
        output_pairing.require_names(placed, self.penalties)
        self._pairing.adopt(placed)
        # Clearing the tracked list in place makes Keras forget old projectors.
        self.transfers.clear()
        self.transfers.extend(output_pairing.transfers(placed))
        # A step that was traced before writes into the metrics of that time.
        penalties = [term.name for term in self.penalties]
        self._metrics_of_terms.keep([*self._pairing.logs(), *penalties])

    def take_teacher(
        self,
        teacher: TeacherLike,
        path: PathLike = "the file",
        teacher_answers: str = "auto",
        **arguments: Any,
    ) -> None:
        """Give a loaded distiller back what no file holds, as `load_distiller` is given it.

        Raises:
            ValueError: If this is not what it was trained with; `path` is named then.
        """
        self._preparation.memory.mode = teacher_answers
        self._pairing.complete(teacher, **arguments, check=self._origin.checking(path))
        if teacher is not None and self.compiled:
            self.adopt(self._pairing.placed)
            self._preparation.host_calls.settle(self)

    # --------------------------------------------------------------------- step

    def call(self, inputs: Tensors, training: bool | None = None) -> Any:
        """Run the student on one batch, as given to `fit`; returns its output."""
        return self._pairing.run(inputs, bool(training))

    def make_train_function(self, force: bool = False) -> Any:
        """Compile the train step, as `keras.Model` does."""
        before, held = self.train_function, self._pairing
        with self._preparation.host_calls.compiling(self, asks=held.remembered is None):
            super().make_train_function(force or held.changed("train"))
            if self.train_function is not before:
                made = self._preparation.steps.function(self, self.train_function)
                self.train_function = held.supplying(made)

    def make_test_function(self, force: bool = False) -> Any:
        """Compile the test step, as `keras.Model` does."""
        before, held = self.test_function, self._pairing
        with self._preparation.host_calls.compiling(self, asks=held.compiled.asks_in_evaluation):
            super().make_test_function(force or held.changed("test"))
        if self.test_function is not before and held.compiled.asks_in_evaluation:
            self.test_function = held.supplying(self.test_function)

    def train_step(self, *args: object) -> Any:
        """Take one optimizer step on one batch; JAX passes the state before it."""
        *state, data = args
        data, state = batch_transform.transformed(self, self._pairing, data, state)
        with self._pairing.answering(data, self, state) as plain:
            return super().train_step(*state, plain)

    def test_step(self, *args: object) -> Any:
        """Evaluate one batch: the student alone, unless the teacher was asked for."""
        *state, data = args
        if self._pairing.compiled.asks_in_evaluation and self.distills:
            given = keras.utils.unpack_x_y_sample_weight(backends.supplied(data)[0])[0]
            row_numbers.require(self._pairing.split(given)[1], self.transfers)
            with self._pairing.answering(data, self, state) as plain:
                return super().test_step(*state, plain)
        result = super().test_step(*args)
        has_loss = self._compile_loss is not None or self._pairing.compiled.asks_in_evaluation
        return self._metrics_of_terms.of_student(result, has_loss)

    def compute_loss(
        self,
        x: Tensors | None = None,
        y: Tensors | None = None,
        y_pred: Tensors | None = None,
        sample_weight: Tensors | None = None,
        training: bool = True,
    ) -> Tensor:
        """Compute the total loss of one batch, a scalar, and book its parts."""
        extra = [self._aggregate_additional_loss(loss) for loss in self.losses]
        given = objective.Given(x, y, y_pred, sample_weight, training)
        return self._objective.minimized(self._pairing, given, extra, self._metrics_of_terms)

    # ---------------------------------------------------------------------- fit

    def fit(
        self,
        x: Data | None = None,
        y: Tensors | None = None,
        batch_size: int | None = None,
        epochs: int = 1,
        verbose: int | str = "auto",
        callbacks: Sequence[keras.callbacks.Callback] | None = None,
        **kwargs: object,
    ) -> Any:
        """Train the student, as `keras.Model.fit` does.

        Args:
            x: Inputs: arrays, or a dataset that yields batches.
            y: Labels; none with `loss=None`.
            batch_size: Samples a step, for arrays.
            epochs: Index of the epoch at which training ends.
            verbose: As in `keras.Model.fit`, as `callbacks` and all others are.
            callbacks: Keras callbacks, those of `keras_kd.callbacks` among them.
            **kwargs: The others.

        Returns:
            The Keras `History`.

        Raises:
            ValueError: If inputs are not finite, labels do not fit the loss, the data are empty, or
                outputs hide their logits.
            FloatingPointError: If the teacher's outputs stop being finite.
        """
        preparation = self._preparation
        preparation.require_trainable(self, x)
        if self.chooses_method:
            # Not before it is needed: it compares methods, which few programs do.
            from keras_kd.distill import auto

            auto.choose(self, x, y, batch_size, epochs, verbose, kwargs)
        with preparation.training(x, y, batch_size, kwargs), label_checks.explaining():
            if self.compiled:
                given = x, y, batch_size, kwargs
                x, y, batch_size, kwargs = preparation.for_fit(self, given, epochs, callbacks)
            observer = monitor.TrainingMonitor(self._pairing.teacher, preparation)
            callbacks = monitor.first(observer, callbacks, self)
            with observer.placing():
                return super().fit(x, y, batch_size, epochs, verbose, callbacks, **kwargs)

    def evaluate(
        self,
        x: Data | None = None,
        y: Tensors | None = None,
        batch_size: int | None = None,
        **kwargs: object,
    ) -> Any:
        """Evaluate the student, as `keras.Model.evaluate` does.

        With `loss=None` there is no `loss` among the results, unless `compile` was given
        `evaluate_distillation=True`: then it is the distillation loss. A `CachedTeacher` can be
        asked about the arrays that it was written from, and about datasets that are joined.

        Args:
            x: Inputs: arrays, or a dataset that yields batches.
            y: Labels.
            batch_size: Samples a step, for arrays.
            **kwargs: As in `keras.Model.evaluate`.

        Returns:
            The loss and metrics, where there are any, or the logs with `return_dict=True`.
        """
        known = bool(kwargs.get("_use_cached_eval_dataset"))
        with label_checks.explaining(), self._pairing.telling_failures():
            # Keras asks so in every epoch of `fit`, which has looked at these data.
            x, y, batch_size, kwargs = self._preparation.for_evaluation(
                self, x, y, batch_size, kwargs, known
            )
            if self._compile_loss is not None or self._pairing.compiled.asks_in_evaluation:
                return super().evaluate(x, y, batch_size, **kwargs)
            as_dict = bool(kwargs.pop("return_dict", False))
            logs = super().evaluate(x, y, batch_size, return_dict=True, **kwargs)
        return training_metrics.results(training_metrics.without_loss(logs), as_dict)

    def train_on_batch(self, x: Data, y: Tensors | None = None, *args: Any, **kwargs: Any) -> Any:
        """Take one optimizer step, as `keras.Model.train_on_batch` does.

        Raises:
            FloatingPointError: If the teacher's outputs are not finite.
        """
        self._preparation.for_batch(self, x, y)
        result = super().train_on_batch(x, y, *args, **kwargs)
        monitor.require_finite(self, self._metrics_of_terms.means.get("distillation_loss"))
        return result

    def test_on_batch(self, x: Data, y: Tensors | None = None, *args: Any, **kwargs: Any) -> Any:
        """Evaluate one batch, as `keras.Model.test_on_batch` does."""
        if self.compiled:
            self._preparation.require_labels(self, y)
        return super().test_on_batch(x, y, *args, **kwargs)

    def trains_on(self) -> dict[str, Any]:
        """What `fit` was given, in plain values by name; nothing where it does not run."""
        trains_on = self._preparation.trains_on
        return trains_on() if trains_on is not None else {}

    # ------------------------------------------------------------------ measure

    def term_losses(self, data: Data) -> dict[str, float]:
        """Measure the terms of the objective on one batch, each without its weight.

        Nothing changes: neither weights and statistics nor metrics, random states and memories.

        Args:
            data: One batch `(x, y)`, `(x, y, sample_weight)` or `(x,)`, as `fit` reads it.

        Returns:
            The value of `student_loss`, of every transfer and of every penalty, by name, with
            `training=True`.

        Raises:
            ValueError: If the distiller is not compiled or lacks its teacher.
        """
        return diagnostics.term_losses(self._measured(data))

    def gradient_norms(self, data: Data) -> dict[str, float]:
        """Measure how strongly each term pulls on the student, without its weight.

        Args:
            data: As for `term_losses`.

        Returns:
            `||d term / d theta||` by the name of the term, the Euclidean norm over all trainable
            parameters `theta` of the student.

        Raises:
            ValueError: If the distiller is not compiled or lacks its teacher.
        """
        return diagnostics.gradient_norms(self._measured(data), self)

    def _measured(self, data: Data) -> Callable[[], dict[str, Tensor]]:
        """What computes the terms on one batch."""
        data = self._preparation.one_batch(self, data)
        # What the transform draws and keeps is dropped with the scope.
        with diagnostics.no_trace():
            data, _ = batch_transform.transformed(self, self._pairing, data, [])
        return diagnostics.terms_of(self, self._pairing, self._objective, data)

    def sample_rows(self, count: int = 256) -> Any:
        """Take some rows of the arrays that `fit` is reading.

        Args:
            count: How many at most; they are spread evenly over the data.

        Returns:
            `(x, y, sample_weight)`, or `None` outside of `fit` and where it reads no arrays or has
            `class_weight`. A `CachedTeacher`'s answers are joined to them.
        """
        return self._preparation.sample_rows(count)

    # ------------------------------------------------------------------ to disk

    def __reduce__(self) -> Any:
        """Refuse copies and pickles, which Keras makes of what is saved: without the teacher."""
        if self._pairing.teacher is not None:
            raise saving.copied(self.name)
        return super().__reduce__()

    def save(self, filepath: PathLike, *args: object, **kwargs: object) -> None:
        """Write the distiller without its teacher, as `keras.Model.save` does.

        Raises:
            ValueError: If no file can name a penalty or the batch transform; a file of before is
                left as it was.
        """
        hooks.require_registered(self.name, self._pairing.compiled.arguments)
        super().save(filepath, *args, **kwargs)

    def save_own_variables(self, store: MutableMapping[str, Array]) -> None:
        """Save the live values and the states of the random generators."""
        super().save_own_variables(store)
        saving.store_seeds(self, store)

    def load_own_variables(self, store: MutableMapping[str, Array]) -> None:
        """Load the live values and the states of the random generators."""
        super().load_own_variables(saving.load_seeds(self, store))

    def get_config(self) -> dict[str, Any]:
        """Return what rebuilds the distiller, without its teacher."""
        return saving.config(self, self._pairing, self.shared, self._origin)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Rebuild a distiller that still lacks its teacher."""
        student, shared, origin = saving.restored(config)
        distiller = cls(student, from_logits=config["from_logits"], name=config["name"])
        distiller._origin = origin
        distiller.shared.add(shared)
        return distiller

    def get_compile_config(self) -> dict[str, Any] | None:
        """Return what `compile_from_config` needs; refused for hooks that no file can name."""
        hooks.require_registered(self.name, self._pairing.compiled.arguments)
        return self.compile_settings()

    def compile_settings(self) -> dict[str, Any] | None:
        """Return the arguments of `compile`; hooks that no file can name by their class alone."""
        return saving.compile_config(self, self._pairing)

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compile with a saved configuration; live values come with the weights."""
        saving.compile_again(self, self._pairing, config)

    def summary(
        self,
        line_length: int | None = None,
        positions: Sequence[float] | None = None,
        print_fn: Callable[[str], Any] | None = None,
        **kwargs: object,
    ) -> None:
        """Print the student's summary and a table of the transfers.

        Args:
            line_length: As in `keras.Model.summary`.
            positions: For the student.
            print_fn: Called with the text. Defaults to `print`.
            **kwargs: For the student.
        """
        self.student.summary(line_length, positions, print_fn, **kwargs)
        transfer_summary.render(self.name, self.summary_of_transfers(), line_length, print_fn)

    def summary_of_transfers(self) -> list[dict[str, Any]]:
        """What is transferred: one row a transfer.

        Returns:
            Dicts with `name`, `loss`, `teacher`, `student`, `projector`, `weight`; `teacher_shape`
            and `student_shape`, `None` where only a batch tells; `projection`, what the projector
            does, in words; and `parameters`, how many numbers of projector and loss train beside
            the student, `None` before they are made.
        """
        shapes = transfer_summary.seen_shapes(self._pairing)
        return transfer_summary.rows(self.transfers, shapes)
