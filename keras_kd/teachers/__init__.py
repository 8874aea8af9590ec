"""What may stand as a teacher: a model, several models, or outputs read from disk."""

from keras_kd.endings import output_template as output_template
from keras_kd.teachers.cached import CachedTeacher
from keras_kd.teachers.choice import apart as apart
from keras_kd.teachers.choice import make as make
from keras_kd.teachers.ensemble import Ensemble
from keras_kd.teachers.identity import fingerprint
from keras_kd.teachers.model import ModelTeacher, Teacher
from keras_kd.teachers.model import require_model as require_model
from keras_kd.teachers.numbered import Numbered

__all__ = ["CachedTeacher", "Ensemble", "ModelTeacher", "Numbered", "Teacher", "fingerprint"]
