"""Students that keep learning: streams of tasks, a memory, and methods that forget little."""

from keras_kd.lifelong.distilling import LearningWithoutForgetting
from keras_kd.lifelong.learner import Learner
from keras_kd.lifelong.memory import Memory, herding
from keras_kd.lifelong.method import FineTune, Joint, Method
from keras_kd.lifelong.rehearsal import DarkReplay, Replay
from keras_kd.lifelong.report import Report, average_accuracy, backward_transfer, forgetting
from keras_kd.lifelong.streams import Stream, Task

__all__ = [
    "DarkReplay",
    "FineTune",
    "Joint",
    "Learner",
    "LearningWithoutForgetting",
    "Memory",
    "Method",
    "Replay",
    "Report",
    "Stream",
    "Task",
    "average_accuracy",
    "backward_transfer",
    "forgetting",
    "herding",
]
