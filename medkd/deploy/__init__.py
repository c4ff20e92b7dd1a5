"""From a trained network to something a clinic can run: bundles, prediction, export, cost."""
