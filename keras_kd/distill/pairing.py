"""Student and teacher, and how their outputs and layers meet.

`Pairing` owns the models of a distiller: it plans the transfers between them, looks at first rows
for what layers alone do not tell, and asks both about a batch. What is minimized of their answers
is in `objective.py`.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras

from keras_kd import backends, teachers
from keras_kd.cache.join_datasets import Joined
from keras_kd.cache.memory import Remembered, is_remembered
from keras_kd.distill import hooks
from keras_kd.distill.batch import (
    Batch,
    Step,
    UnderWay,
    paired,
    pick,
    shapes,
    without_gradient,
    zero_if_not_finite,
)
from keras_kd.distill.compiled import Compiled
from keras_kd.distill.shared_layers import Shared
from keras_kd.losses import counts
from keras_kd.losses.counts import Counted
from keras_kd.models import meaning
from keras_kd.models.model_reader import Answer, Reader
from keras_kd.models.taps import inference
from keras_kd.teachers import Teacher, row_numbers
from keras_kd.teachers.base import TeacherLike
from keras_kd.transfers import compatibility, output_pairing
from keras_kd.transfers.output_pairing import Placed
from keras_kd.transfers.transfer import Transfer
from keras_kd.utils import checks
from keras_kd.utils.data import are_arrays
from keras_kd.utils.types import Data, Losses, Tensor, Tensors


class Pairing:
    """The models and how they are joined, in a plain object.

    Keras tracks nothing in it: the teacher must take no part in weights,
    trainable flags, checkpoints and summaries.

    Args:
        student: The model that is trained.
        shared: What the student does not train.
        from_logits: For `"teacher"` and `"student"` whether outputs are logits.

    Attributes:
        student: The `Reader` of the student.
        teacher: The `Teacher`, or `None`.
        compiled: How the distiller was compiled.
        placed: The transfers, with the output that each reads.
        restored: The transfers of a file that is being loaded, or `None`.
        match: How the outputs of student and teacher meet.
        prepared: Whether rows were looked at since `compile`.
        under_way: The step that this thread is taking.
        remembered: The teacher's answers in memory, where they are joined to the rows.
    """

    def __init__(
        self, student: keras.Model, shared: Shared, from_logits: dict[str, bool | None]
    ) -> None:
        self.from_logits = from_logits
        self.student: Any = Reader(student, "student", from_logits.get("student"))
        self.teacher: Teacher | None = None
        self.teacher_inputs: Any = None
        self.student_inputs: Any = None
        self.teacher_precision = "float32"
        self.compiled = Compiled({})
        self.placed: list[Placed] = []
        self.restored: list[Placed] | None = None
        self.match = output_pairing.Match([0], [meaning.CLASSES], [True])
        self.prepared = False
        self.under_way = UnderWay()
        self.remembered: Remembered | None = None
        # Counts how often a compiled step reads what it was not made for.
        self._forgotten = 0
        self._ask_anew = False
        self._shared = shared
        # Transfers that came from a file, with their weights, are not made anew.
        self._kept = False
        self._baked: dict[str, Any] = {}
        # Says whose a projector is, and outlives nothing else.
        self._owner = object()

    @property
    def distills(self) -> bool:
        """Whether anything is transferred from a teacher."""
        return self.teacher is not None or bool(self.placed)

    def complete(
        self,
        teacher: TeacherLike,
        teacher_inputs: Callable[[Any], Any] | None = None,
        student_inputs: Callable[[Any], Any] | None = None,
        teacher_precision: str = "float32",
        check: Callable[[Teacher | None, Sequence[str]], None] | None = None,
    ) -> None:
        """Take the teacher, and what no file holds.

        Args:
            teacher: As given to `Distiller`.
            teacher_inputs: As given to `Distiller`.
            student_inputs: As given to `Distiller`.
            teacher_precision: As given to `Distiller`.
            check: `fn(teacher, names of the functions given)`, which raises for what does not fit.
        """
        functions = {"teacher_inputs": teacher_inputs, "student_inputs": student_inputs}
        checks.functions(**functions)
        made = teachers.make(teacher, self.from_logits.get("teacher"), teacher_precision)
        if check is not None:
            check(made, [name for name, function in functions.items() if function is not None])
        self.teacher_inputs, self.student_inputs = teacher_inputs, student_inputs
        self.teacher_precision = teacher_precision
        self.attach(made)

    def attach(self, teacher: Teacher | None) -> None:
        """Take this teacher, and find what the student shares with it.

        Raises:
            ValueError: If it is the student itself.
        """
        self.teacher = teacher
        if teacher is None:
            return
        student = self.student.model
        if any(model is student for model in teacher.models):
            raise ValueError(
                f"The student `{student.name}` is the teacher itself. Pass a copy, "
                "`keras.models.clone_model(model)`, to distil a model into its own kind."
            )
        theirs = {id(v) for model in teacher.models for v in model.variables}
        self._shared.add(
            layer
            for layer in student._flatten_layers()
            if layer.variables and all(id(v) in theirs for v in layer.variables)
        )
        self._shared.variables |= theirs & {id(v) for v in student.variables}

    def require_teacher(self) -> None:
        """Raise `ValueError` if there are transfers and nobody to learn from."""
        if self.teacher is None and self.placed:
            raise ValueError(
                "This distiller was loaded without its teacher. Load it with "
                "`keras_kd.load_distiller(path, teacher=teacher)` to go on training."
            )

    def refresh(self) -> None:
        """Follow weights of the teacher that were set since it was copied."""
        if self.teacher is not None and self.teacher.refresh():
            self.prepared = False

    @property
    def settled(self) -> bool:
        """Whether shapes alone tell all there is to know of the models."""
        return self.student.settled and (self.teacher is None or self.teacher.settled)

    def changed(self, kind: str) -> bool:
        """Whether a compiled step holds what the teacher no longer says, as other weights."""
        baked = self.teacher.baked if self.teacher is not None else None
        # A step that reads memory may be one of XLA, which asks no teacher on the host.
        now = (self._forgotten, baked, self.asks_host and self.remembered is None)
        before = self._baked.get(kind, now)
        self._baked[kind] = now
        return bool(before != now)

    @property
    def asks_host(self) -> bool:
        """Whether the teacher is asked outside of the compiled step, by calling the host."""
        return self.teacher is not None and not self.teacher.compiled

    def teacher_variables(self) -> list[Any]:
        """The teacher's variables that the student does not share."""
        models = self.teacher.models if self.teacher is not None else []
        found = {id(v): v for model in models for v in model.variables}
        return [v for key, v in found.items() if key not in self._shared.frozen]

    def supplying(self, function: Callable[..., Any] | None) -> Any:
        """The train or test function, with the teacher's weights beside every batch on JAX."""
        if self.teacher is None:
            return function
        return backends.supplying(function, self.teacher_variables)

    def variables_beside(self, model: keras.Model) -> set[int]:
        """Identities of all variables of a distiller and its teacher, but for those of hooks."""
        known = {id(v) for v in model.variables} - self._shared.of_hooks
        models = self.teacher.models if self.teacher is not None else []
        return known | {id(v) for each in models for v in each.variables}

    # ---------------------------------------------------------------- transfers

    def compile(self, compiled: Compiled, trained_with: str | None) -> list[Placed]:
        """Find what is transferred, and note how the distiller was compiled.

        Args:
            compiled: The arguments of `compile`.
            trained_with: The name of the teacher of a saved distiller, or `None`.

        Returns:
            The transfers, with the output that each reads.

        Raises:
            ValueError: If there is nothing to minimize, a layer is not found,
                or outputs do not fit together. Nothing has changed then.
        """
        distills = self.teacher is not None or self.restored is not None
        if trained_with is not None and not distills:
            raise ValueError(
                f"This distiller was trained with the teacher `{trained_with}` and was "
                "made again without it. Load it with `keras_kd.load_distiller(path, "
                "teacher=teacher)`, or train `distiller.student` on the labels alone."
            )
        checks.objective(compiled.loss, compiled.distillation_loss, distills)
        placed = self.restored or []
        if self.teacher is not None:
            placed = self.plan(compiled.distillation_loss, compiled.loss)
        output_pairing.require_names(placed, compiled.arguments["penalties"] or ())
        self.prepared, self._kept = False, self.restored is not None
        self.compiled = compiled
        return placed

    def plan(self, distillation_loss: object, hard: Losses) -> list[Placed]:
        """What is transferred where, checked as far as the models are known."""
        if self.student.template is None and isinstance(distillation_loss, dict):
            # A model without a graph shows the names of its outputs with the first batch.
            return []
        if distillation_loss is None:
            distillation_loss = output_pairing.default_loss(self.student, self._known_teacher, hard)
        output_pairing.refuse_spread(distillation_loss, self.student.template, hard)
        placed = output_pairing.place(distillation_loss, self.student.template)
        each = output_pairing.transfers(placed)
        for transfer in each:
            checks.number_of_layers(transfer)
        output_pairing.number(each)
        checks.unique([transfer.name for transfer in each], "transfer")
        for transfer in each:
            transfer.require_free(self._owner)
        student, teacher = copy.copy(self.student), self._known_teacher.apart()
        student.reset(output_pairing.paths(p.transfer.student for p in placed))
        teacher.reset(output_pairing.paths(p.transfer.teacher for p in placed))
        self._refuse_forms(placed, output_pairing.match(placed, student, teacher, hard), hard)
        return placed

    def _refuse_forms(
        self, placed: list[Placed], match: output_pairing.Match, hard: Losses
    ) -> None:
        """Refuse losses of Keras where outputs are known to be of another form."""
        student, teacher = self.student, self._known_teacher
        each = checks.per_output(hard, student.template)
        for transfer, output in placed:
            if transfer.reads_logits:
                continue
            regression = meaning.of_loss(each[output]) == meaning.VALUES
            index = match.counterpart(output)
            forms = []
            for side, tap, name, kinds, place, doubtful in (
                (
                    "teacher",
                    transfer.teacher,
                    teacher.name,
                    teacher.kinds,
                    index,
                    teacher.is_doubtful(index),
                ),
                (
                    "student",
                    transfer.student,
                    student.model.name,
                    student.kinds(),
                    output,
                    student.is_doubtful(output),
                ),
            ):
                if tap is not None:
                    continue
                kind = kinds[place] if place < len(kinds) else "unknown"
                told = self.from_logits.get(side) is False
                forms.append("probabilities" if told or doubtful else kind)
                if forms[-1] == "logits":
                    compatibility.loss_of_probabilities(transfer, side, name)
            if len(forms) == 2 and not regression:
                compatibility.same_form(transfer, *forms)

    def adopt(self, placed: list[Placed]) -> None:
        """Transfer this from now on."""
        self.placed = placed
        for transfer in output_pairing.transfers(placed):
            transfer.claim(self._owner)
        if self.teacher is not None:
            self.student.reset(output_pairing.paths(p.transfer.student for p in placed))
            self.teacher.reset(output_pairing.paths(p.transfer.teacher for p in placed))
            self.match_outputs()

    def match_outputs(self) -> None:
        """Match the outputs by what is known of the models now."""
        self.match = output_pairing.match(
            self.placed, self.student, self._known_teacher, self.compiled.loss
        )

    def inspect(self, rows: Tensors) -> list[Placed] | None:
        """Find out from a few rows what the layers alone do not tell.

        Returns:
            The transfers, if only now it shows what they are.
        """
        x, _ = self.split(rows)
        known = self.student.settled
        self._known_teacher.inspect(self.for_teacher(x))
        self.student.inspect(self.for_student(x))
        if known or self._kept:
            decides = self.match.decides
            self.match_outputs()
            self._refuse_forms(self.placed, self.match, self.compiled.loss)
            # Other decisions than the layers promised are other logs.
            return None if self.match.decides == decides else self.placed
        return self.plan(self.compiled.distillation_loss, self.compiled.loss)

    @property
    def _known_teacher(self) -> Teacher:
        if self.teacher is None:
            raise ValueError("There is no teacher. Pass one: `Distiller(student, teacher)`.")
        return self.teacher

    def logs(self) -> list[str]:
        """Names of the distiller's own logs, but for those of penalties."""
        names = ["student_loss"] if self.compiled.labeled else []
        if self.distills:
            names += ["distillation_loss", *(t.name for t in output_pairing.transfers(self.placed))]
            if any(self.match.decides):
                names.append("agreement")
        return names

    def _sides(self, placed: Placed, teacher: Answer, student: Answer) -> tuple[Any, Any]:
        """What a transfer reads on either side; builds it for these shapes at first sight."""
        transfer, output = placed
        index = self.match.counterpart(output)
        theirs = pick(teacher, transfer.teacher, index, transfer.reads_logits)
        ours = pick(student, transfer.student, output, transfer.reads_logits)
        if not transfer.built:
            transfer.build(shapes(theirs), shapes(ours))
        return theirs, ours

    def look(self, rows: Tensors, real: bool) -> bool:
        """Run both models on a few rows; build the transfers, refuse what cannot work.

        Args:
            rows: A few rows of the data.
            real: Whether they are rows of the data, or zeros in their shape.

        Returns:
            Whether the teacher could answer, so that all transfers are built.

        Raises:
            ValueError: If the teacher's outputs are not finite.
        """
        teacher = self._known_teacher
        x, record = self.split(rows)
        student = backends.in_one_program(
            lambda x: self.student.read(x, False, self.match.units),
            [self.student.model],
            self.for_student(x),
        )
        if record is None and self.reads_records:
            return False
        answer = backends.in_one_program(
            lambda x: self.ask(x, record),
            teacher.models,
            self.for_teacher(x),
        )
        if real and checks.finite(x) and not checks.finite((answer.logits, answer.tensors)):
            raise ValueError(
                f"The outputs of the teacher `{teacher.name}` are NaN or infinite on the first "
                "rows of the data, which are finite. Check the teacher's weights: it may have "
                "diverged, or overflow in half precision."
            )
        for placed in self.placed:
            self._sides(placed, answer, student)
        return True

    def try_validation(self, given: object) -> None:
        """Run the student on one row of validation arrays, where no graph tells what it reads.

        Raises:
            ValueError: If it cannot.
        """
        model = self.student.model
        declared = getattr(model, "inputs", None)
        if not isinstance(given, list | tuple) or not model.built:
            return
        x = keras.utils.unpack_x_y_sample_weight(tuple(given))[0]
        if not are_arrays(x) or (declared and self.student_inputs is None):
            return
        row = keras.tree.map_structure(lambda leaf: leaf[:1], x)
        try:
            self.student.run(self.for_student(row), False)
        except Exception as error:
            # Whatever the layers, the backend or the user's own code raises.
            forms = [tuple(leaf.shape) for leaf in keras.tree.flatten(x)]
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"The student `{model.name}` cannot read `validation_data` of shape "
                f"{', '.join(map(str, forms))}: {said[:300]} Pass data of the form that it is "
                "trained on."
            ) from error

    # -------------------------------------------------------------------- batch

    @property
    def reads_records(self) -> bool:
        """Whether the teacher's answers come with the data, and no model of it is at hand."""
        return self.teacher is not None and self.teacher.needs_join

    def remember(self, answers: Remembered) -> None:
        """Read these answers where they were joined to a batch."""
        self.remembered = answers
        self._forgotten += self._ask_anew
        self._ask_anew = False

    def forget(self, for_good: bool = False) -> None:
        """Ask the teacher again; `for_good` also about batches that answers were joined to."""
        self.remembered = None
        self._forgotten += for_good
        self._ask_anew = self._ask_anew or for_good

    def ask(self, x: Tensors, record: Any = None) -> Answer:
        """What the teacher says of what it reads.

        Args:
            x: What the teacher reads.
            record: What was joined to the batch.
        """
        if is_remembered(record):
            if self.remembered is not None:
                return self.remembered.answer(record)
            record = None
        return self._known_teacher.answer(x, record, self.match.teacher_units)

    def split(self, x: Tensors) -> tuple[Any, Any]:
        """What the models read of one batch, and what was joined to it."""
        if isinstance(x, Joined):
            return x.x, x.record
        return self.teacher.split(x) if self.teacher is not None else row_numbers.split(x)

    def for_student(self, x: Tensors) -> Any:
        """What the student reads of a batch."""
        return _mapped(self.student_inputs, x, "student_inputs")

    def for_teacher(self, x: Tensors) -> Any:
        """What the teacher reads of a batch."""
        return _mapped(self.teacher_inputs, x, "teacher_inputs")

    def answered(self, x: Tensors, values: Sequence[tuple[Any, Any]] = ()) -> Batch:
        """The batch with the teacher's answer, computed where no gradient is taken.

        Args:
            x: The batch as the data deliver it.
            values: Variables and what they hold in this step, on JAX.
        """
        x, record = self.split(x)
        answer, indices, finite = Answer(None, [], {}), None, None
        if self.teacher is None:
            self.require_teacher()
        else:
            indices = record.get("indices") if isinstance(record, dict) else None
            with backends.inference_only(values):
                answer = self.ask(self.for_teacher(x), record)
            # Those in memory were found to be finite when the teacher gave them.
            sound = self.remembered is not None and is_remembered(record)
            # What nobody reads of the answer is not kept.
            answer, finite = without_gradient(answer, self.reads_output, sound)
            x = x if finite is None else zero_if_not_finite(finite, x)
        return Batch(self.for_student(x), answer, indices, finite)

    @property
    def reads_output(self) -> bool:
        """Whether a loss reads what the teacher returns as it is, beside its logits."""
        return any(p.transfer.teacher is None and not p.transfer.reads_logits for p in self.placed)

    @contextlib.contextmanager
    def answering(
        self, data: Data, distiller: hooks.Trained, state: Sequence[Any] = ()
    ) -> Iterator[Any]:
        """Take a step in here: the teacher has answered, and `run` notes the student's answer.

        Args:
            data: The batch as Keras hands it to the step.
            distiller: What takes the step.
            state: On JAX one tuple of the values that its variables have in this step.

        Yields:
            The batch `(x, y, sample_weight)` without what came beside it.
        """
        data, weights = backends.supplied(data)
        lent = list(zip(self.teacher_variables(), weights or ()))
        # What the student shares with the teacher is in the state.
        held = list(zip(distiller.non_trainable_variables, state[0][1])) if state else []
        batch = self.answered(keras.utils.unpack_x_y_sample_weight(data)[0], [*lent, *held])
        lends = bool(distiller.penalties)
        with self.taking(Step(batch, lent if lends else ())):
            yield data

    @contextlib.contextmanager
    def telling_failures(self) -> Iterator[None]:
        """Raise behind it what a compiled step could not raise of the teacher."""
        yield
        failure = self.teacher.failure() if self.teacher is not None else None
        if failure is not None:
            raise failure

    @contextlib.contextmanager
    def taking(self, under_way: Step) -> Iterator[None]:
        """Take this step in here."""
        self.under_way.step = under_way
        try:
            yield
        finally:
            self.under_way.step = None

    def run(self, x: Tensors, training: bool) -> Any:
        """What the student returns of a batch; in a step its whole answer is noted.

        Args:
            x: The batch as the data deliver it.
            training: Passed on to the student.
        """
        under_way = self.under_way.step
        batch = under_way.take() if under_way is not None else None
        with inference(self._shared.layers):
            if under_way is None or batch is None:
                return self.student.run(self.for_student(self.split(x)[0]), training)
            under_way.student = self.student.read(batch.x, training, self.match.units)
            return under_way.student.output

    def counted(
        self,
        batch: Batch,
        student: Answer,
        sample_weight: Tensors | None,
        labeled: Sequence[Any] = (),
    ) -> list[Counted]:
        """What counts of each flat output of the student.

        Args:
            batch: The batch with the teacher's answer.
            student: The student's answer.
            sample_weight: Weights, as Keras passes them.
            labeled: For each flat output where the hard loss reads labels, as
                `hard_loss.computed` tells; nothing without one.
        """
        weights = checks.per_output(sample_weight, self.student.template)
        pairs = paired(self.match, batch.answer, student)
        return [
            counts.counted(
                theirs,
                ours,
                weights[i] if i < len(weights) else None,
                labeled[i] if i < len(labeled) else None,
            )
            for i, (theirs, ours) in enumerate(pairs)
        ]

    def compared(
        self,
        batch: Batch,
        y: Tensors | None,
        student: Answer,
        counted: Sequence[Counted],
        temperature: Tensor,
        training: bool,
    ) -> list[tuple[Transfer, Tensor]]:
        """The value of each transfer, one for each output that it reads.

        Args:
            batch: The batch with the teacher's answer.
            y: Labels.
            student: The student's answer.
            counted: What counts of each flat output of the student.
            temperature: The distiller's.
            training: Whether the student is being trained.

        Returns:
            The transfers with scalars, not yet multiplied by their weights.
        """
        labels = checks.per_output(y, self.student.template)
        found = []
        for placed in self.placed:
            theirs, ours = self._sides(placed, batch.answer, student)
            value = placed.transfer.call(
                theirs,
                ours,
                counted=counted[placed.output],
                labels=labels[placed.output],
                indices=batch.indices,
                temperature=temperature,
                training=training,
            )
            found.append((placed.transfer, value))
        return found


def _mapped(function: Callable[[Any], Any] | None, x: Tensors, name: str) -> Any:
    """What an input function makes of a batch, or the batch where there is none.

    Raises:
        ValueError: If it returns nothing that a model can read.
    """
    if function is None:
        return x
    value = function(x)
    leaves = keras.tree.flatten(value)
    if not leaves or any(leaf is None for leaf in leaves):
        raise ValueError(
            f"`{name}` gave {value!r} for a batch. It returns what the model reads: an array, or a "
            "structure of arrays."
        )
    return value


def policy_of(student: keras.Model) -> Any:
    """The policy that a student trains by: float16 anywhere in it asks for a scaled loss."""
    for layer in student._flatten_layers():
        if layer.dtype_policy.name == "mixed_float16":
            return layer.dtype_policy
    return student.dtype_policy
