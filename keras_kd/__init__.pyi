# What type checkers read in place of `__init__.py`, which finds these names on first use.

from typing import Final

from keras_kd import cache as cache
from keras_kd import callbacks as callbacks
from keras_kd import compress as compress
from keras_kd import datasets as datasets
from keras_kd import federated as federated
from keras_kd import lifelong as lifelong
from keras_kd import losses as losses
from keras_kd import robust as robust
from keras_kd import search as search
from keras_kd import students as students
from keras_kd import teachers as teachers
from keras_kd.distill.chain import born_again as born_again
from keras_kd.distill.chain import distill_chain as distill_chain
from keras_kd.distill.distiller import Distiller as Distiller
from keras_kd.distill.hooks import Batch as Batch
from keras_kd.distill.loading import load_distiller as load_distiller
from keras_kd.distill.mutual import MutualLearning as MutualLearning
from keras_kd.distill.mutual import SelfDistillation as SelfDistillation
from keras_kd.distill.penalties import Penalty as Penalty
from keras_kd.export.exporter import export_model as _export_model
from keras_kd.export.loaded import LoadedModel as _LoadedModel
from keras_kd.export.loaded import load as _load
from keras_kd.export.manifest import ManifestError as _ManifestError
from keras_kd.export.report.artifact import Artifact as _Artifact
from keras_kd.export.report.export_report import Report as _Report
from keras_kd.export.report.layer_report import LayerReport as _LayerReport
from keras_kd.export.report.runtime_report import RuntimeReport as _RuntimeReport
from keras_kd.export.report.scorecard import Scorecard as _Scorecard
from keras_kd.export.target import check_folder as _check_folder
from keras_kd.export.verification.benchmark import BenchReport as _BenchReport
from keras_kd.export.verification.benchmark import bench as _bench
from keras_kd.export.verification.reverify import verify as _verify
from keras_kd.transfers.layer_matching import LayerPairs as LayerPairs
from keras_kd.transfers.layer_matching import match_layers as match_layers
from keras_kd.transfers.transfer import Transfer as Transfer

# `keras_kd.export` is a package and is called as well, which a module cannot be for a type checker.
class _Export:
    Artifact = _Artifact
    BenchReport = _BenchReport
    LayerReport = _LayerReport
    LoadedModel = _LoadedModel
    ManifestError = _ManifestError
    Report = _Report
    RuntimeReport = _RuntimeReport
    Scorecard = _Scorecard
    bench = staticmethod(_bench)
    check_folder = staticmethod(_check_folder)
    export_model = staticmethod(_export_model)
    load = staticmethod(_load)
    verify = staticmethod(_verify)
    __call__ = staticmethod(_export_model)

export: _Export
__version__: Final[str]
