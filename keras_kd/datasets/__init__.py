"""Data in one form: images of classes (`load`), and rows of any task (`load_task`)."""

from keras_kd.datasets.dataset import Dataset
from keras_kd.datasets.images import load
from keras_kd.datasets.task_data import Rows, TaskData
from keras_kd.datasets.tasks import load_task

__all__ = ["Dataset", "Rows", "TaskData", "load", "load_task"]
