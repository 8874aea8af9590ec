"""Estimators of scikit-learn, ONNX and TFLite files as teachers."""

import copy
import shutil
from pathlib import Path

import keras
import numpy as np
import pytest
from onnx import TensorProto, helper, load, numpy_helper, save
from sklearn.calibration import CalibratedClassifierCV
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from sklearn.tree import DecisionTreeClassifier
from small_models import CLASSES, FEATURES, crossentropy, kl, log_softmax, mlp, rows

import keras_kd as kd
from keras_kd.teachers import Ensemble, from_onnx, from_sklearn, from_tflite

EXPORTED = Path(__file__).parents[2] / "exported" / "digits"


def losses(teacher, x, y, student=None, loss=None, **options):
    student = student or mlp(name="student")
    made = kd.Distiller(student, teacher)
    made.compile(
        keras.optimizers.SGD(0.0), loss or crossentropy(), **{"temperature": 2.0, **options}
    )
    history = made.fit(x, y, batch_size=8, shuffle=False, verbose=0).history
    return history["distillation_loss"][0], student


@pytest.fixture(scope="module")
def data():
    x, y = rows(count=64)
    return x, (y + (x[:, 0] > 0)) % CLASSES


@pytest.mark.parametrize(
    "make",
    [
        lambda: HistGradientBoostingClassifier(max_iter=3, min_samples_leaf=5),
        lambda: make_pipeline(StandardScaler(), LogisticRegression()),
        lambda: RandomForestClassifier(3, max_depth=3, random_state=0),
    ],
)
def test_a_classifier_teaches_as_predict_proba_says(make, data):
    x, y = data
    estimator = make().fit(x, y)
    teacher = from_sklearn(estimator)
    assert teacher.output_shapes() == [(None, CLASSES)]
    assert teacher.classes == ["0", "1", "2", "3"]
    assert teacher.kinds == ["softmax"]
    found, student = losses(teacher, x[:20], y[:20])
    p = estimator.predict_proba(x[:20])
    expected = kl(np.log(np.maximum(p, 1e-300)), student(x[:20]), 2.0).mean()
    # What is 0 counts a little at a temperature of 2, as the least share of a leaf.
    assert found == pytest.approx(expected, rel=1e-4 if p.min() > 0 else 0.2)


def test_what_is_zero_of_those_that_count(data):
    x, y = data
    neighbors = KNeighborsClassifier(5).fit(x, y)
    found = np.array(from_sklearn(neighbors).answer(x).logits[0])
    expected = np.log(np.maximum(neighbors.predict_proba(x), 1 / 5))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    tree = DecisionTreeClassifier(max_depth=2, random_state=0).fit(x, y)
    p = tree.predict_proba(x)
    found = np.array(from_sklearn(tree).answer(x).logits[0])
    np.testing.assert_allclose(found, np.log(np.maximum(p, p[p > 0].min())), rtol=1e-5)
    forest = RandomForestClassifier(4, max_depth=2, random_state=0).fit(x, y)
    p = forest.predict_proba(x)
    found = np.exp(np.array(from_sklearn(forest).answer(x).logits[0], "float64"))
    np.testing.assert_allclose(found[p > 0], p[p > 0], rtol=1e-5)
    assert 0 < found[p == 0].max(initial=0.001) <= p[p > 0].min()


def test_two_classes_in_one_unit_and_a_regressor(data):
    x, _ = data
    y = np.where(x[:, 0] + x[:, 1] > 0, ">50K", "<=50K")
    estimator = LogisticRegression().fit(x, y)
    teacher = from_sklearn(estimator, units=1, classes=["<=50K", ">50K"])
    found, student = losses(
        teacher,
        x,
        (y == ">50K").astype("float32")[:, None],
        mlp(classes=1, name="student"),
        keras.losses.BinaryCrossentropy(from_logits=True),
    )
    z, s = estimator.decision_function(x) / 2, np.array(student(x), "float64")[:, 0] / 2
    p, q = 1 / (1 + np.exp(-z)), 1 / (1 + np.exp(-s))
    expected = 4 * (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).mean()
    assert found == pytest.approx(expected, rel=1e-4)
    regressor = LinearRegression().fit(x, x[:, 0])
    found, student = losses(
        from_sklearn(regressor),
        x,
        x[:, :1],
        mlp(classes=1, name="student"),
        "mse",
        distillation_loss=kd.losses.LogitMSE(),
        temperature=1.0,
    )
    expected = ((regressor.predict(x)[:, None] - np.array(student(x))) ** 2).mean()
    assert found == pytest.approx(expected, rel=1e-4)


def test_images_are_flattened_and_columns_put_in_order(data):
    x, y = data
    estimator = LogisticRegression().fit(x, y)
    estimator.feature_names_in_ = np.array(["a", "b", "c", "d", "e", "f"], object)
    teacher = from_sklearn(estimator)
    expected = np.array(teacher.answer(x).logits[0])
    images = np.array(teacher.answer(x.reshape(-1, 2, 3, 1)).logits[0])
    np.testing.assert_allclose(images, expected, rtol=1e-6)
    columns = {name: x[:, i] for i, name in reversed(list(enumerate("abcdef")))}
    by_name = np.array(teacher.answer(columns).logits[0])
    np.testing.assert_allclose(by_name, expected, rtol=1e-6)


def test_several_labels_a_row(data):
    x, _ = data
    flags = (x[:, :3] > 0).astype(int)
    forest = RandomForestClassifier(3, max_depth=3, random_state=0).fit(x, flags)
    teacher = from_sklearn(forest, binary=True)
    assert teacher.output_shapes() == [(None, 3)]
    assert teacher.kinds == ["sigmoid"]
    p = np.stack([each[:, 1] for each in forest.predict_proba(x)], axis=-1)
    sure = (p > 0) & (p < 1)
    found = np.array(teacher.answer(x).logits[0])
    np.testing.assert_allclose(found[sure], np.log(p[sure] / (1 - p[sure])), rtol=1e-4)
    by_output = from_sklearn(forest)
    assert by_output.output_template() == {f"output_{i}": f"output_{i}" for i in range(3)}


def test_labels_that_every_row_or_none_has(data):
    x, y = data
    labels = np.stack([y > 0, y >= 0, y < 0], axis=-1).astype(int)
    forest = RandomForestClassifier(5, random_state=0).fit(x, labels)
    answers = np.array(from_sklearn(forest, binary=True).answer(x[:4]).output)
    assert (answers[:, 1] > 0.5).all()
    assert (answers[:, 2] < 0.5).all()
    wide = RandomForestClassifier(5, random_state=0).fit(x, np.stack([y, y > 0], axis=-1))
    with pytest.raises(ValueError, match="Label 0 of .* a label is there or not"):
        from_sklearn(wide, binary=True)


def test_the_fingerprint_is_what_was_learned(data):
    x, y = data

    def fitted(**options):
        booster = HistGradientBoostingClassifier(
            max_iter=2, min_samples_leaf=5, random_state=0, **options
        )
        return from_sklearn(booster.fit(x, y)).fingerprint()

    assert fitted() == fitted(verbose=0)
    assert len({fitted(), fitted(learning_rate=0.11), fitted(max_depth=2)}) == 3
    forests = [RandomForestClassifier(2, random_state=seed).fit(x, y) for seed in (0, 0, 1)]
    one, same, other = (from_sklearn(forest).fingerprint() for forest in forests)
    assert one == same != other
    assert from_sklearn(copy.deepcopy(forests[0])).fingerprint() == one
    nested = CalibratedClassifierCV(LinearSVC(random_state=0), cv=2).fit(x, y)
    assert len(from_sklearn(nested).fingerprint()) == 64


def test_estimators_that_cannot_teach(data, tmp_path):
    x, y = data
    with pytest.raises(TypeError, match="takes a fitted estimator.*str.*Load it yourself"):
        from_sklearn("model.joblib")
    with pytest.raises(TypeError, match="takes a fitted estimator"):
        from_sklearn(LogisticRegression)
    with pytest.raises(ValueError, match="`LogisticRegression` is not fitted"):
        from_sklearn(LogisticRegression())
    with pytest.raises(ValueError, match="`LinearSVC` has no `predict_proba`"):
        from_sklearn(LinearSVC().fit(x, y))
    with pytest.raises(TypeError, match="a classifier or a regressor.*`StandardScaler`"):
        from_sklearn(StandardScaler().fit(x))
    estimator = LogisticRegression().fit(x, y)
    with pytest.raises(ValueError, match=r"has the classes \['0', '1', '2', '3'\], in this order"):
        from_sklearn(estimator, classes=[1, 0, 2, 3])
    with pytest.raises(ValueError, match="`units` is 1 for two classes"):
        from_sklearn(estimator, units=1)
    with pytest.raises(ValueError, match="failed on rows 0 to 7 .*expecting 6 features"):
        kd.cache.write(from_sklearn(estimator), x[:8, :5], tmp_path / "cache")


# -------------------------------------------------------------------------- files


def onnx_file(path, ends=("Softmax",), batch="n", extra=False, labels=None):
    """A dense layer, and what follows it; the labels of the classes as another output."""
    kernel = np.random.default_rng(3).normal(size=(FEATURES, CLASSES)).astype("float32")
    nodes, name = [helper.make_node("MatMul", ["x", "w"], ["z"])], "z"
    for i, end in enumerate(ends):
        nodes.append(helper.make_node(end, [name], [f"y{i}"]))
        name = f"y{i}"
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, CLASSES])]
    if extra:
        nodes.append(helper.make_node("ArgMax", [name], ["label"], axis=1, keepdims=0))
        outputs.insert(0, helper.make_tensor_value_info("label", TensorProto.INT64, [batch]))
    graph = helper.make_graph(
        nodes,
        "dense",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, FEATURES])],
        outputs,
        [numpy_helper.from_array(kernel, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    if labels:
        helper.set_model_props(model, {"labels": labels})
    save(model, path)
    return kernel


@pytest.mark.parametrize("batch", ["n", 3, 1])
def test_an_onnx_file_teaches_whatever_batch_it_takes(batch, tmp_path):
    kernel = onnx_file(tmp_path / "t.onnx", batch=batch, extra=True)
    x, y = rows(count=20)
    teacher = from_onnx(tmp_path / "t.onnx")
    assert (teacher.name, teacher.kinds) == ("t.onnx", ["softmax"])
    assert teacher.output_shapes() == [(None, CLASSES)]
    found, student = losses(teacher, x, y)
    assert found == pytest.approx(kl(x @ kernel, student(x), 2.0).mean(), rel=1e-4)
    manifest = kd.cache.write(teacher, x, tmp_path / "cache")
    assert manifest.teacher["fingerprint"] == teacher.fingerprint()
    shutil.copy(tmp_path / "t.onnx", tmp_path / "copy.onnx")
    assert from_onnx(tmp_path / "copy.onnx").fingerprint() == teacher.fingerprint()


def test_weights_beside_an_onnx_file_count(tmp_path):
    onnx_file(tmp_path / "t.onnx")
    prints = []
    for sign in (1, -1):
        model = load(tmp_path / "t.onnx")
        kernel = numpy_helper.to_array(model.graph.initializer[0]) * sign
        model.graph.initializer[0].CopyFrom(numpy_helper.from_array(kernel, "w"))
        (tmp_path / "w.bin").unlink(missing_ok=True)
        options = {"location": "w.bin", "size_threshold": 0, "save_as_external_data": True}
        save(model, tmp_path / "t.onnx", **options)
        prints.append(from_onnx(tmp_path / "t.onnx").fingerprint())
    assert prints[0] != prints[1]


def test_what_an_onnx_file_ends_in(tmp_path):
    x, _ = rows(count=6)
    path = tmp_path / "t.onnx"
    z = x @ onnx_file(path, ())
    np.testing.assert_allclose(from_onnx(path).answer({"x": x}).logits[0], z, rtol=1e-4)
    onnx_file(path, ("Sigmoid",))
    teacher = from_onnx(path)
    assert teacher.kinds == ["sigmoid"]
    np.testing.assert_allclose(teacher.answer(x).logits[0], z, rtol=1e-3)
    onnx_file(path, ("LogSoftmax", "Identity"))
    np.testing.assert_allclose(from_onnx(path).answer(x).logits[0], log_softmax(z), rtol=1e-3)
    # A softmax that nothing in the graph names.
    onnx_file(path, ("Softmax", "Abs"), labels='["a", "b", "c", "d"]')
    with pytest.raises(ValueError, match="lie between 0 and 1.*`outputs='probabilities'`"):
        from_onnx(path).inspect(x)
    teacher = from_onnx(path, "probabilities")
    np.testing.assert_allclose(teacher.answer(x).logits[0], log_softmax(z), rtol=1e-3)
    assert teacher.classes == list("abcd")
    both = Ensemble([mlp(name="model"), teacher])
    assert both.classes == list("abcd")
    with pytest.raises(ValueError, match=r"has the classes \['a', 'b', 'c', 'd'\]"):
        from_onnx(path, "probabilities", classes=["b", "a", "c", "d"])
    with pytest.raises(ValueError, match=r"`outputs` names \['z'\]"):
        from_onnx(path, {"z": "logits"})
    with pytest.raises(ValueError, match=r"reads `x` of shape \(None, 6\).*\(6, 5\)"):
        teacher.answer(x[:, :5])
    with pytest.raises(ValueError, match="does not exist"):
        from_onnx(tmp_path / "none.onnx")
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is no ONNX file"):
        from_onnx(path)
    with pytest.raises(ValueError, match="is no TFLite file"):
        from_tflite(path)


def test_a_quantized_tflite_file_teaches_in_real_numbers(tmp_path):
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.interpreter import Interpreter
    from flatbuffers import Builder

    file = EXPORTED / "digits_int8.tflite"
    with np.load(EXPORTED / "evaluation.npz") as stored:
        x = np.concatenate([stored[name] for name in stored.files if stored[name].ndim == 4])[:5]
    x = x.astype("float32")
    teacher = from_tflite(file)
    found = np.array(teacher.answer(x).logits[0])
    runner = Interpreter(model_path=str(file)).get_signature_runner()
    (given,), (made,) = (
        runner.get_input_details().values(),
        runner.get_output_details().values(),
    )

    scale, zero = given["quantization"]
    feed = np.clip(np.round(x / scale) + zero, -128, 127).astype(given["dtype"])
    scale, zero = made["quantization"]
    (answered,) = runner(**dict.fromkeys(runner.get_input_details(), feed)).values()
    expected = (answered.astype("float32") - zero) * scale if scale else answered
    if teacher.kinds == ["softmax"]:
        expected = np.log(np.maximum(expected, scale))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    # Without the signature, as files of other converters are.
    model = schema.ModelT.InitFromPackedBuf(file.read_bytes(), 0)
    model.signatureDefs = None
    builder = Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    (tmp_path / "bare.tflite").write_bytes(bytes(builder.Output()))
    bare = from_tflite(tmp_path / "bare.tflite")
    np.testing.assert_allclose(bare.answer(x).logits[0], found, rtol=1e-6)
    assert bare.fingerprint() != teacher.fingerprint()
    # Another number of rows, and back.
    np.testing.assert_allclose(teacher.answer(x[:2]).logits[0], found[:2], rtol=1e-6)
    np.testing.assert_allclose(teacher.answer(x).logits[0], found, rtol=1e-6)
