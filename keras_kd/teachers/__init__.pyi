# What type checkers read in place of `__init__.py`, which finds `CachedTeacher` on first use.

from keras_kd.cache.teacher import CachedTeacher as CachedTeacher
from keras_kd.models.fingerprint import fingerprint as fingerprint
from keras_kd.teachers.base import Teacher as Teacher
from keras_kd.teachers.black_box import BlackBox as BlackBox
from keras_kd.teachers.ensemble import Ensemble as Ensemble
from keras_kd.teachers.model import ModelTeacher as ModelTeacher
from keras_kd.teachers.onnx_files import from_onnx as from_onnx
from keras_kd.teachers.resolve import make as make
from keras_kd.teachers.row_numbers import Numbered as Numbered
from keras_kd.teachers.sklearn import from_sklearn as from_sklearn
from keras_kd.teachers.tflite_files import from_tflite as from_tflite
