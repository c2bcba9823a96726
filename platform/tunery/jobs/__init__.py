"""Run experiments as jobs of a Ray cluster: check the cluster, ship the code, submit, follow and stop."""
