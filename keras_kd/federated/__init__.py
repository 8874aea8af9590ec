"""One student from many clients that keep their rows, labels and weights to themselves.

`Federation` asks clients about public rows, joins their answers and lets everybody learn from them;
`FedMD`, `DSFL` and `FedDF` say how. `InProcess` needs nothing more; `Flower` and the two apps of a
deployment need the extra `federated`, and Flower is imported in `engine` alone.
"""

from typing import TYPE_CHECKING, Any

from keras_kd.utils import lazy

if TYPE_CHECKING:
    from keras_kd.federated.client import Client as Client
    from keras_kd.federated.engine import Flower as Flower
    from keras_kd.federated.engine import client_app as client_app
    from keras_kd.federated.engine import server_app as server_app
    from keras_kd.federated.engine import write_app as write_app
    from keras_kd.federated.engines import InProcess as InProcess
    from keras_kd.federated.federation import Federation as Federation
    from keras_kd.federated.history import History as History
    from keras_kd.federated.methods import DSFL as DSFL
    from keras_kd.federated.methods import FedDF as FedDF
    from keras_kd.federated.methods import FedMD as FedMD
    from keras_kd.federated.methods import Method as Method
    from keras_kd.federated.privacy import Gaussian as Gaussian

_PUBLIC = {
    "Client": "keras_kd.federated.client",
    "DSFL": "keras_kd.federated.methods",
    "FedDF": "keras_kd.federated.methods",
    "FedMD": "keras_kd.federated.methods",
    "Federation": "keras_kd.federated.federation",
    "Flower": "keras_kd.federated.engine",
    "Gaussian": "keras_kd.federated.privacy",
    "History": "keras_kd.federated.history",
    "InProcess": "keras_kd.federated.engines",
    "Method": "keras_kd.federated.methods",
    "client_app": "keras_kd.federated.engine",
    "server_app": "keras_kd.federated.engine",
    "write_app": "keras_kd.federated.engine",
}

__all__ = [
    "DSFL",
    "Client",
    "FedDF",
    "FedMD",
    "Federation",
    "Flower",
    "Gaussian",
    "History",
    "InProcess",
    "Method",
    "client_app",
    "server_app",
    "write_app",
]


def __getattr__(name: str) -> Any:
    return lazy.attribute(__name__, _PUBLIC, name)


def __dir__() -> list[str]:
    return sorted(__all__)
