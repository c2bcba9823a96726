"""The content-addressed store: fingerprints, artifacts with manifests, atomic commits, leases."""

from tunery.store.artifacts import DEFAULT_STORE, Artifact, Store, new_output_dir
from tunery.store.context import Launcher, StageContext, StageResult
from tunery.store.fingerprint import fingerprint
from tunery.store.lease import Lease, LeaseHeld, LeaseLost, active_owner, live_owners

__all__ = [
    "DEFAULT_STORE",
    "Artifact",
    "Launcher",
    "Lease",
    "LeaseHeld",
    "LeaseLost",
    "StageContext",
    "StageResult",
    "Store",
    "active_owner",
    "fingerprint",
    "live_owners",
    "new_output_dir",
]
