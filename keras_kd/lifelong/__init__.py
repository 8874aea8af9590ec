"""Students that keep learning: streams of tasks, a memory, and methods that forget little."""

from keras_kd.lifelong.correction import BiasCorrection, WeightAligning
from keras_kd.lifelong.distilling import LearningWithoutForgetting
from keras_kd.lifelong.exemplars import ICaRL, LessForgetting, PodNet
from keras_kd.lifelong.learner import Learner
from keras_kd.lifelong.memory import Memory, herding
from keras_kd.lifelong.method import FineTune, Joint, Method
from keras_kd.lifelong.refresh import Refreshed, refresh
from keras_kd.lifelong.regularizers import ElasticWeights
from keras_kd.lifelong.rehearsal import DarkReplay, Replay
from keras_kd.lifelong.report import Report, average_accuracy, backward_transfer, forgetting
from keras_kd.lifelong.streams import Stream, Task

__all__ = [
    "BiasCorrection",
    "DarkReplay",
    "ElasticWeights",
    "FineTune",
    "ICaRL",
    "Joint",
    "Learner",
    "LearningWithoutForgetting",
    "LessForgetting",
    "Memory",
    "Method",
    "PodNet",
    "Refreshed",
    "Replay",
    "Report",
    "Stream",
    "Task",
    "WeightAligning",
    "average_accuracy",
    "backward_transfer",
    "forgetting",
    "herding",
    "refresh",
]
