"""From a trained network to something a clinic can run: bundles, prediction, export, cost."""

from medkd.deploy.bundle import LoadedBundle, load_bundle, write_bundle
from medkd.deploy.export import Export, export_model
from medkd.deploy.inference_config import inference_config
from medkd.deploy.metadata import segmentation_metadata
from medkd.deploy.predict import predict_ensemble, predict_probabilities, predict_volume
from medkd.deploy.profile import Cost, profile_bundles
from medkd.deploy.trust import bundle_sha256, list_code

__all__ = [
    "Cost",
    "Export",
    "LoadedBundle",
    "bundle_sha256",
    "export_model",
    "inference_config",
    "list_code",
    "load_bundle",
    "predict_ensemble",
    "predict_probabilities",
    "predict_volume",
    "profile_bundles",
    "segmentation_metadata",
    "write_bundle",
]
