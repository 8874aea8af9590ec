"""Students: smaller models of the teacher's kind, and what they start and train with."""

from keras_kd.students.adapt import enable_lora, freeze
from keras_kd.students.initialize import Copied, CopiedLayer, initialize_from
from keras_kd.students.shrink import shrink

__all__ = ["Copied", "CopiedLayer", "enable_lora", "freeze", "initialize_from", "shrink"]
