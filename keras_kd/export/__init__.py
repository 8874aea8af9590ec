"""Export to TFLite and ONNX: convert, run, compare, time, weigh, choose.

`keras_kd.export` is both this package and the function: `keras_kd.export(student, folder, ...)` is
`keras_kd.export.export_model(student, folder, ...)`.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from keras_kd.export.exporter import export_model
    from keras_kd.export.loaded import LoadedModel, load
    from keras_kd.export.manifest import ManifestError
    from keras_kd.export.report.artifact import Artifact
    from keras_kd.export.report.export_report import Report
    from keras_kd.export.report.layer_report import LayerReport
    from keras_kd.export.report.runtime_report import RuntimeReport
    from keras_kd.export.report.scorecard import Scorecard
    from keras_kd.export.target import check_folder
    from keras_kd.export.verification.benchmark import BenchReport, bench
    from keras_kd.export.verification.reverify import verify

_HOME = {
    "Artifact": "report.artifact",
    "BenchReport": "verification.benchmark",
    "LayerReport": "report.layer_report",
    "LoadedModel": "loaded",
    "ManifestError": "manifest",
    "Report": "report.export_report",
    "Scorecard": "report.scorecard",
    "RuntimeReport": "report.runtime_report",
    "bench": "verification.benchmark",
    "check_folder": "target",
    "export_model": "exporter",
    "load": "loaded",
    "verify": "verification.reverify",
}

__all__ = [
    "Artifact",
    "BenchReport",
    "LayerReport",
    "LoadedModel",
    "ManifestError",
    "Report",
    "RuntimeReport",
    "Scorecard",
    "bench",
    "check_folder",
    "export_model",
    "load",
    "verify",
]


class _CallableModule(ModuleType):
    # The public face has `keras_kd.export(...)` for the everyday call and needs a package of the
    # same name for the rest. Importing the package binds it over any function called `export`, so
    # the package itself has to be callable.
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from keras_kd.export.exporter import export_model

        return export_model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        home = _HOME.get(name)
        if home is not None:
            module = importlib.import_module(f"{__name__}.{home}")
            value = getattr(module, name)
            setattr(self, name, value)
            return value
        if name == "__signature__":
            import inspect

            from keras_kd.export.exporter import export_model

            return inspect.signature(export_model)
        raise AttributeError(f"module `{__name__}` has no attribute `{name}`")


sys.modules[__name__].__class__ = _CallableModule
