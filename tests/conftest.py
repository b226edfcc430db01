from __future__ import annotations

from hypothesis import settings

from tests.kafka.broker import noida, own, tansu  # noqa: F401  # the fixtures, for whoever names one

# no test may depend on the speed of the machine, and the first example of one may compile
settings.register_profile("streamrec", deadline=None)
settings.load_profile("streamrec")
