"""What holds for every test, before anything else is imported."""

import os

import beartype.door  # noqa: F401  before nnsight, which mounts `save` on `object` and so breaks this import later

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a second thread only slows models of this size down
for _name in [name for name in os.environ if name.startswith("SIGHTLINE_")]:
    del os.environ[_name]  # a developer's own settings must not decide a test
